"""The masks come out the same with the lowest `transformers` that the requirements admit.

They run in an environment of its own that borrows all the rest from this one. It is made in a temporary folder, or in the one
that TRACEBOOK_LOWEST_ENV names, which is kept and used again."""
import configparser
import os
import re
import subprocess
import sys
import sysconfig
import venv
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WITH_MASKS = ("test_masking.py", "test_templates.py", "test_compat.py")  # those that are there
UNREACHABLE = ("(from versions: none)", "Failed to establish a new connection", "Temporary failure in name resolution", "Network is unreachable",
               "Connection refused", "ConnectionError", "ConnectTimeout", "ReadTimeout", "Max retries exceeded", "ProxyError", "SSLError", "No module named pip")


def lowest(requirements, package):
    "The bound of a package from below, as a version of three numbers."
    bound, = re.findall(rf"(?:^|\s){re.escape(package)}(?:\[[^\]]*\])?>=([\d.]+)", requirements)
    return ".".join((bound.split(".") + ["0", "0"])[:3])


def requirements():
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT/"settings.ini", encoding="utf-8")
    return config["DEFAULT"]["requirements"]


def version_in(python, package):
    "What this interpreter imports; empty if it cannot."
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    try: return subprocess.run([python, "-c", code], capture_output=True, text=True, env=clean()).stdout.strip()
    except OSError: return ""


def clean(**more):
    "The environment of a process that sees this checkout and nothing that other checkouts put in its way."
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "PYTHONPATH", "PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST")} | dict(PYTHONPATH=str(ROOT)) | more


def environment(folder, version):
    "An environment that borrows the packages of this one, all but transformers and what that needs in other versions; its interpreter."
    python = folder/("Scripts" if os.name == "nt" else "bin")/Path(sys.executable).name
    kept = python.exists() and version_in(python, "transformers") == version
    if not kept: venv.create(folder, with_pip=True, clear=True)
    own = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True).stdout.strip()
    borrowed = dict.fromkeys(p for p in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")) if p != own)
    (Path(own)/"borrowed.pth").write_text("".join(f"{p}\n" for p in borrowed), encoding="utf-8")  # read after the environment's own, which win
    if kept: return python
    done = subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--retries", "1", "--timeout", "30", f"transformers=={version}"], capture_output=True, text=True, env=clean())
    if done.returncode and (why := next((u for u in UNREACHABLE if u in done.stderr), None)): pytest.skip(f"pip cannot get transformers {version}: {why}")
    assert done.returncode == 0, done.stderr[-2000:]
    return python


@pytest.mark.parametrize("text, version", [("a>=1 transformers>=5.0 torch>=2.11", "5.0.0"), ("transformers>=5.3.1,<6", "5.3.1"), ("sentence-transformers>=3 transformers[x]>=5", "5.0.0")])
def test_the_bound_is_read(text, version):
    assert lowest(text, "transformers") == version


@pytest.mark.slow
def test_masks_with_the_lowest_transformers(tmp_path):
    version = lowest(requirements(), "transformers")
    python = environment(Path(os.environ.get("TRACEBOOK_LOWEST_ENV") or tmp_path/"env"), version)
    said = subprocess.run([python, "-c", "import transformers, tracebook; print(transformers.__version__, tracebook.__file__)"], capture_output=True, text=True, env=clean(), cwd=ROOT)
    assert said.returncode == 0, said.stderr[-2000:]
    imported, where = said.stdout.strip().rsplit("\n", 1)[-1].split(" ", 1)
    assert imported == version and Path(where).resolve().is_relative_to(ROOT.resolve())
    modules, report = [f"tests/{m}" for m in WITH_MASKS if (ROOT/"tests"/m).exists()], tmp_path/"report.xml"
    done = subprocess.run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *modules], cwd=ROOT, capture_output=True, text=True, env=clean(HF_HUB_OFFLINE="1"))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    suite = ET.parse(report).getroot().find("testsuite")
    ran = int(suite.get("tests")) - int(suite.get("skipped"))
    by_module = {m: [c for c in suite.iter("testcase") if c.get("classname").split(".")[1] == Path(m).stem and c.find("skipped") is None] for m in modules}
    assert ran >= 8 and all(by_module.values())
