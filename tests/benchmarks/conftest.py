"Collects the rows of the benchmark table and prints it at the end."
import gc
import os
import platform
from importlib.metadata import version

import pytest
import torch

ROWS = []


@pytest.fixture
def row():
    "Adds a row to the table: what, the figure here, what stands beside it, their ratio, the limit."
    return lambda what, here, beside, ratio, limit: ROWS.append((what, here, beside, f"{ratio:.2f}", limit))


@pytest.fixture
def alone():
    "One thread, so that the time of the process is the time of the work, and no collections of garbage."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    torch.set_num_threads(threads)


def machine():
    "Processor, cores and versions, as far as the system tells."
    try: model = next(l.split(":")[1].strip() for l in open("/proc/cpuinfo", encoding="utf-8") if l.startswith("model name"))
    except (OSError, StopIteration): model = platform.processor() or platform.machine()
    libraries = ", ".join(f"{p} {version(p)}" for p in ("numpy", "pyarrow"))
    return f"{model}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, {libraries}"


def pytest_terminal_summary(terminalreporter):
    if not ROWS: return
    lines = ["| what | here | beside it | ratio | limit |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in ROWS]
    terminalreporter.write_line("\n".join(["", *lines, "", machine() + ".", "", "(end of table)"]))
