"""Run every check, in order, and stop at the first that fails.

  export   tracebook/ is what the notebooks export
  clean    the notebooks hold nothing that nbdev-clean would remove
  readme   README.md is what nbs/index.ipynb says
  nbdev    the notebooks run
  pytest   the tests pass; arguments that are not listed below go to pytest

The first three work in a copy and never change your files. With --colab the notebooks and the tests run instead in an
environment with the versions that Colab ships (tools/colab.txt); it is made on first use and takes about 6 GB.
"""
import argparse
import difflib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from notebooks import NBS, ROOT, copy_tree, default_exp, notebooks, settings

LIB = settings()["lib_path"]
FLAGS = ("slow", "cuda", "hub")
MEND = "nbdev-export (if you edited a module, nbdev-update first; if a notebook is gone, delete its module)"


class Failed(Exception):
    "A check that failed: what is wrong and what mends it."
    def __init__(self, wrong, mend="", code=1):
        super().__init__(wrong)
        self.mend, self.code = mend, code


@contextmanager
def step(name, title):
    "Head a check and time it."
    print(f"── {name}: {title}", flush=True)
    start = time.perf_counter()
    yield
    print(f"   ok, {time.perf_counter() - start:.1f} s", flush=True)


def command(name):
    "A script of this Python's environment."
    beside = Path(sys.executable).parent/name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found: raise Failed(f"{name} is not installed", "pip install -c constraints.txt -e '.[dev]'")
    return found


def run(args, mend="", **kwargs):
    "Run a command and raise what it says if it fails."
    done = subprocess.run([str(a) for a in args], **kwargs)
    if done.returncode: raise Failed((done.stdout or "").strip() or "failed: the reason stands above", mend, done.returncode)
    return done


def quiet(args, cwd, mend=""):
    "Run a command whose output matters only if it fails."
    return run(args, mend, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def snapshot(root):
    "The modules and the notebooks below `root`, as {path: text}."
    found = [*(root/LIB).rglob("*.py"), *(root/"nbs").rglob("*.ipynb"), *(root/"nbs").glob("llms.txt")]
    return {p.relative_to(root).as_posix(): p.read_text(encoding="utf-8") for p in found}


def differences(old, new, mend):
    "Raise if the files differ, with the start of each difference."
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    if not changed: return
    said = []
    for name in changed:
        if name not in new: said.append(f"{name}: no notebook exports it")
        elif name not in old: said.append(f"{name}: not there, though a notebook exports it")
        else: said += [f"{name}: not up to date", *list(difflib.unified_diff(
            old[name].splitlines(), new[name].splitlines(), "yours", "made", lineterm="", n=0))[2:10]]
    raise Failed("\n".join(said), mend)


def check_export(copy):
    "The modules are what the notebooks export, no more and no less."
    old = snapshot(copy)
    for name in old:
        if name.endswith(".py") and Path(name).name != "__init__.py": (copy/name).unlink()
    quiet([command("nbdev-export")], copy)
    numbered = [p for p in notebooks() if p.parent == NBS and p.name[0].isdigit()]
    lost = [p.relative_to(ROOT) for p in numbered if not default_exp(p)]
    if lost: raise Failed(f"{lost[0]}: exports no module", "give it a cell with #| default_exp NAME")
    differences(old, snapshot(copy), MEND)


def check_clean(copy):
    "nbdev-clean finds nothing to remove."
    old = snapshot(copy)
    quiet([command("nbdev-clean")], copy)
    differences(old, snapshot(copy), "nbdev-clean")


def here(args, flags, cells, env):
    "The checks in this environment; returns the exit status of pytest."
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)/ROOT.name
        copy_tree(copy)
        with step("export", f"{LIB}/ is what the notebooks export"): check_export(copy)
        with step("clean", "the notebooks are clean"): check_clean(copy)
    with step("readme", "README.md is what nbs/index.ipynb says"):
        quiet([sys.executable, "tools/readme.py", "--check"], ROOT)
    with step("nbdev", "the notebooks run"):
        run([command("nbdev-test"), "--n-workers", os.cpu_count(), "--flags", " ".join(cells)], cwd=ROOT, env=env)
    # Files of tests run beside each other; benchmarks, which are slow tests, need the machine for themselves.
    beside = [] if "slow" in flags or not find_spec("xdist") else ["-n", str(min(os.cpu_count(), 8)), "--dist", "loadfile"]
    return pytest(sys.executable, [*beside, *args], flags, env)


def colab(args, flags, cells, env, folder, python):
    "The notebooks and the tests in Colab's environment; returns the exit status of pytest."
    import colab
    with step("colab", f"the environment in {folder}"): python = colab.environment(folder, python)
    with step("notebooks", "the notebooks run as on Colab"):
        run([python, "tools/run_notebooks.py", "--flags", " ".join(cells)], cwd=ROOT, env=env | {"MPLBACKEND": colab.BACKEND})
    return pytest(python, args, flags, env)


def pytest(python, args, flags, env):
    "Run the tests; nothing is printed after them, so that their closing line comes last."
    print("── pytest: the tests pass", flush=True)
    given = [f"--{flag}" for flag in flags]
    return subprocess.run([python, "-m", "pytest", "-q", "tests", *given, *args], cwd=ROOT, env=env).returncode


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    for flag in FLAGS:
        parser.add_argument(f"--{flag}", action="store_true", help=f"run the cells and tests marked {flag} too")
    parser.add_argument("--colab", action="store_true", help="run with the versions that Colab ships")
    parser.add_argument("--colab-env", type=Path, metavar="DIR", help="where that environment is "
                        "(default: $TRACEBOOK_COLAB_ENV or .colab-env)",
                        default=os.environ.get("TRACEBOOK_COLAB_ENV", ROOT/".colab-env"))
    parser.add_argument("--python", metavar="PATH", help="the Python 3.13 to make it with (default: looked for)")
    given, args = parser.parse_known_args()
    flags = [flag for flag in FLAGS if getattr(given, flag)]
    cells = flags + ["real"] * bool(os.environ.get("TRACEBOOK_SHARED"))  # cells that need real tokenizers and outputs
    if not given.colab and find_spec("trl"): cells.append("trl")  # Colab has none
    os.environ.pop("IN_TEST", None)  # nbdev-export does nothing where it is set
    env = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "0" if given.hub else "1"}
    try:
        if given.colab: return colab(args, flags, cells, env, Path(given.colab_env).absolute(), given.python)
        return here(args, flags, cells, env)
    except Failed as e:
        print(e, *([f"mend with: {e.mend}"] if e.mend else []), sep="\n", flush=True)
        return e.code


if __name__ == "__main__": sys.exit(main())
