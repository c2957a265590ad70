"""Run notebooks in fresh kernels of this Python, the way nbdev-test would; needs nbclient and ipykernel, not nbdev.

Cells with `#| eval: false`, or with a flag of tst_flags in pyproject.toml that --flags does not name, are skipped.
"""
import argparse
import os
import re
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from notebooks import ROOT, directives, notebooks

ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


def skipped(cell, flags):
    "Is this cell left out?"
    given = directives(cell.source)
    return cell.cell_type == "code" and (given.get("eval") == "false" or bool(flags & given.keys()))


def run(path, flags, timeout):
    "Run a notebook; returns its number of cells, seconds and error, if any."
    nb, start, error, started = nbformat.read(path, 4), time.perf_counter(), None, []
    ran = [cell for cell in nb.cells if cell.cell_type == "code" and not skipped(cell, flags)]
    for cell in nb.cells:
        if skipped(cell, flags): cell.source = ""
    client = NotebookClient(nb, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}},
                            on_cell_start=lambda cell, cell_index: started.append(cell_index))
    try: client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as e: error = ANSI.sub("", str(e))
    if error: error = f"{path.relative_to(ROOT)}, cell {started[-1] + 1 if started else 1}:\n{error}"
    return len(ran), time.perf_counter() - start, error


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks (default: all)")
    parser.add_argument("--flags", default="", help="flags to run all the same, such as 'slow hub'")
    parser.add_argument("--timeout", type=int, default=600, help="seconds a cell may take (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="notebooks at a time (default: %(default)s)")
    args = parser.parse_args()
    config = tomllib.loads((ROOT/"pyproject.toml").read_text(encoding="utf-8"))["tool"]["nbdev"]
    flags = set(config["tst_flags"].split()) - set(args.flags.split())
    os.environ |= {"IN_TEST": "1", "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    paths, errors = [p.resolve() for p in args.paths] or notebooks(), []
    with ThreadPoolExecutor(args.workers) as pool:
        for path, (n, seconds, error) in zip(paths, pool.map(lambda p: run(p, flags, args.timeout), paths)):
            print(f"{'FAILED' if error else 'ok':6} {seconds:6.1f} s  {n:4} cells  {path.relative_to(ROOT)}", flush=True)
            errors += filter(None, [error])
    print(*errors, sep="\n\n", end="\n" if errors else "")
    return bool(errors)


if __name__ == "__main__": sys.exit(main())
