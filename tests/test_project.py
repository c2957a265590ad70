"The project holds together: notebooks, modules, metadata and README say the same."
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

sys.path.insert(0, str(Path(__file__).parent.parent/"tools"))
from notebooks import NBS, ROOT, cells, code, default_exp, directives, exports, notebooks, settings, tree  # noqa: E402

CFG = settings()
LIB, GIT = CFG["lib_path"], CFG["git_url"]
NOTEBOOKS = notebooks()
MODULES = [p for p in sorted((ROOT/LIB).rglob("*.py")) if p.name not in ("__init__.py", "_modidx.py")]
INSTALL = f"#| hide\n#| eval: false\n! [ -e /content ] && pip install -Uqq git+{GIT}"
HERE = [f"/{top}/" for top in ("work", "root", "tmp/w")]  # built from parts, so that this file holds none of them

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(NBS).as_posix())


def code_cells(path):
    "The sources of a notebook's code cells."
    return [c["source"] for c in cells(path) if c["cell_type"] == "code"]


def parsed(source):
    "The statements of a cell; shell and magic lines are left out."
    return ast.parse(re.sub(r"^[!%].*$", "", code(source), flags=re.M)).body if not source.startswith("%%") else []


def imported(source):
    "The modules of the package that a cell imports."
    found = []
    for node in (n for stmt in parsed(source) for n in ast.walk(stmt)):
        if isinstance(node, ast.Import): found += [a.name for a in node.names]
        if isinstance(node, ast.ImportFrom): found += [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
    return {m.split(".")[1] for m in found if m.startswith(f"{LIB}.")}


def number(path):
    "The number of a notebook, 09b after 09: tutorials and the index come after all."
    found = re.match(r"(\d\d)([a-z]?)_", path.name) if path.parent == NBS else None
    return (int(found[1]), found[2]) if found else (100, "")


@each_notebook
def test_head(path):
    "Title, subtitle and a badge that opens this very notebook."
    head = cells(path)[0]["source"]
    badge = (f"[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/"
             f"github/{GIT.removeprefix('https://github.com/')}/blob/{CFG['branch']}/nbs/{path.relative_to(NBS).as_posix()})")
    assert re.match(r"# \S[^\n]*\n\n> \S[^\n]*\n", head) and badge in head


@each_notebook
def test_install_cell(path):
    "The first code cell installs the package on Colab, and no other cell does."
    sources = code_cells(path)
    assert sources[0] == INSTALL
    assert not [s for s in sources[1:] if "pip install" in s]


@each_notebook
def test_outputs(path):
    "A notebook is a tutorial: it keeps its outputs."
    assert any(c.get("outputs") for c in cells(path))


@each_notebook
def test_import_cells(path):
    "Import cells hold imports only: they run when the documentation is built."
    for source in code_cells(path):
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in parsed(source)}
        assert len(kinds) < 2, f"imports and other code in one cell:\n{source}"


@each_notebook
def test_imports_only_from_above(path):
    "A notebook imports only modules of notebooks with a lower number."
    order = {default_exp(p): number(p) for p in sorted(NOTEBOOKS, key=number, reverse=True) if default_exp(p)}  # of the first, where several make one module
    for module in {m for source in code_cells(path) for m in imported(source)} & order.keys():
        assert order[module] < number(path), f"{path.name} imports {module}, which comes later"


@each_notebook
def test_export_cells_are_short(path):
    "No exported cell has more than 40 lines."
    for cell in filter(exports, cells(path)):
        lines = [line for line in code(cell["source"]).splitlines() if line.strip()]
        assert len(lines) <= 40, f"{len(lines)} lines:\n{lines[0]}"


@each_notebook
def test_flags_are_known(path):
    "A misspelt directive would be ignored in silence."
    known = set("hide default_exp export exports exporti eval echo output include slow cuda hub real trl notest hide_line "
                "exec_doc filter_stream".split())
    unknown = {d for source in code_cells(path) for d in directives(source)} - known
    assert not unknown


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.name)
def test_module_has_its_notebook(path):
    "Every module names the notebook it comes from."
    named = re.search(r"File to edit: (\S+\.ipynb)", path.read_text(encoding="utf-8"))
    assert named and (path.parent/named[1]).resolve() in NOTEBOOKS


@pytest.mark.parametrize("path", sorted((ROOT / "tracebook").glob("*.py")), ids=lambda p: p.name)
def test_names_are_defined_once(path):
    "Rooms that go on in several notebooks share a module: none takes a name of another."
    own = [n.name for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not any("patch" in ast.unparse(d) for d in n.decorator_list)]
    assert sorted(own) == sorted(set(own))


def test_version():
    "One version: settings.ini's."
    found = re.search(r'__version__ = "(.+)"', (ROOT/LIB/"__init__.py").read_text(encoding="utf-8"))
    assert found[1] == CFG["version"]
    assert f"## {CFG['version']}" in (ROOT/"CHANGELOG.md").read_text(encoding="utf-8")


def test_one_address():
    "The README knows the repository under its one address."
    readme = (ROOT/"README.md").read_text(encoding="utf-8")
    assert GIT in readme
    name = GIT.rpartition("/")[2]
    assert set(re.findall(rf"https://github\.com/[\w.-]+/{name}(?![\w-])", readme)) == {GIT}


def test_constraints_meet_the_bounds():
    "The tested set lies within the requirements."
    lines = (ROOT/"constraints.txt").read_text().split()
    pins = {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}
    wanted = " ".join(CFG[key] for key in ("requirements", "dev_requirements", "docs_requirements")).split()
    for req in map(Requirement, wanted):
        assert pins[canonicalize_name(req.name)] in req.specifier, req


def test_no_path_of_this_machine():
    "No file holds a path of the machine it was written on."
    for path in tree():
        content = (ROOT/path).read_text(encoding="utf-8", errors="ignore")
        found = [line.strip()[:200] for line in content.splitlines() for there in HERE if re.search(rf"(?<![\w.]){there}", line)]
        assert not found, f"{path}: {found[0]}"


ALONE = """
import socket, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("nbdev", "execnb"): raise ImportError(name + " is blocked")
def no_network(*args, **kwargs): raise OSError("the network is blocked")
sys.meta_path.insert(0, Block())
socket.socket.connect = socket.getaddrinfo = no_network
import importlib
for name in sys.argv[1:]: importlib.import_module(name)
"""


def test_package_stands_alone():
    "Every module imports without nbdev and without a network."
    names = [LIB, *(".".join(p.relative_to(ROOT).with_suffix("").parts) for p in MODULES)]
    done = subprocess.run([sys.executable, "-c", ALONE, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
