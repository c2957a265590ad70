"What the tools and the tests share: the settings, the notebooks and a copy of the tree."
import json
import re
import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/"nbs"


def settings():
    "The values of settings.ini."
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT/"settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def notebooks(folder=NBS):
    "Every notebook in reading order: index, the numbered ones, then those in folders."
    found = [p for p in folder.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(folder).parts)]
    return sorted(found, key=lambda p: (p != folder/"index.ipynb", len(p.relative_to(folder).parts), p.as_posix()))


def cells(path):
    "The cells of a notebook, each with its source and text outputs as one string."
    found = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    for cell in found: cell["source"] = "".join(cell["source"])
    return found


def _split(source):
    "The `#|` lines at the top of a cell, and the rest."
    lines = source.splitlines()
    n = next((i for i, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#|")), len(lines))
    return lines[:n], lines[n:]


def directives(source):
    "The `#|` lines at the top of a cell as a dict: `#| eval: false` -> {'eval': 'false'}."
    pairs = [re.fullmatch(r"\s*#\|\s*([\w-]+)\s*:?\s*(.*?)\s*", line) for line in _split(source)[0]]
    return {m[1]: m[2] for m in pairs if m}


def code(source):
    "The source of a cell without its `#|` lines."
    return "\n".join(_split(source)[1]).strip("\n")


def exports(cell):
    "Does this cell go into the module?"
    return cell["cell_type"] == "code" and bool(directives(cell["source"]).keys() & {"export", "exports", "exporti"})


def default_exp(path):
    "The module a notebook is exported to, its own or that of the chapter it goes on with (`#| export NAME`), or None."
    flags = [directives(c["source"]) for c in cells(path) if c["cell_type"] == "code"]
    return next(filter(None, (f.get(kind) for kind in ("default_exp", "export") for f in flags)), None)


def text(value):
    "The string of an output field, which may be a list of lines."
    return value if isinstance(value, str) else "".join(value)


def tree():
    "The project's files, relative to its root: what git tracks or could add, else every file that is not hidden."
    git = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode == 0: found = {Path(name) for name in git.stdout.split("\0") if name}
    else: found = {p.relative_to(ROOT) for p in ROOT.rglob("*")}
    skip = {"__pycache__", "_docs", "_proc"}
    return sorted(p for p in found if (ROOT/p).is_file() and not skip & set(p.parts)
                  and (git.returncode == 0 or not any(part[0] == "." for part in p.parts)))


def copy_tree(target):
    "Copy the project's files to the folder `target`."
    for path in tree():
        (target/path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/path, target/path)
