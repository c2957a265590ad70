"The environment that stands in for Colab: made from tools/colab.txt, kept, and brought up to date when that changes."
import shutil
import subprocess
import sys
from pathlib import Path

from notebooks import ROOT

VERSION = (3, 13)
BACKEND = "module://matplotlib_inline.backend_inline"
PINS = ROOT/"tools"/"colab.txt"


def is_version(python):
    "Is this the interpreter of a Python of Colab's version?"
    try: done = subprocess.run([python, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True, text=True)
    except OSError: return False
    return done.stdout.strip() == str(VERSION)


def find_python(given=None):
    "The interpreter to make the environment with."
    name = f"python{VERSION[0]}.{VERSION[1]}"
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{VERSION[0]}.{VERSION[1]}*/bin/python"))
    tried = [given] if given else [sys.executable, shutil.which(name), *pyenv]
    for python in filter(None, tried):
        if is_version(python): return str(python)
    raise SystemExit(f"{given} is not {name}" if given else f"no {name} found: install it, or name one with --python PATH")


def pip(python, *args):
    "Run pip in the environment, quietly."
    done = subprocess.run([python, "-m", "pip", "install", "-q", *args], cwd=ROOT, capture_output=True, text=True)
    if done.returncode: raise SystemExit(f"pip could not install {' '.join(map(str, args))}:\n{done.stderr.strip()[-2000:]}")


def environment(folder, given=None):
    "Make or update the environment in `folder`; returns its interpreter."
    python, stamp = folder/"bin"/"python", folder/"colab.txt"
    if not python.exists():
        print("   made on first use: this takes some minutes and about 6 GB", flush=True)
        subprocess.run([find_python(given), "-m", "venv", folder], check=True)
    if not is_version(python): raise SystemExit(f"{folder} is not an environment of Python {VERSION[0]}.{VERSION[1]}: remove it")
    if not stamp.exists() or stamp.read_bytes() != PINS.read_bytes():
        pip(python, "-r", PINS)
        shutil.copy(PINS, stamp)
    # The pins as constraints: an install that would change what Colab ships fails here.
    pip(python, "--no-build-isolation", "-c", PINS, "-e", ".")
    return python
