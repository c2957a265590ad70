"""Build the documentation site from the notebooks.

nbdev processes the notebooks without running their examples again; Sphinx lays them out, with every warning an error.
Formulas become MathML and whatever a page loads lies beside it, so the site can be read without a network. At the end
every page, every exported name and every asset is checked. Nothing that git tracks is changed.
"""
import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import import_module
from inspect import getsource, isclass
from pathlib import Path

import offline
from notebooks import NBS, ROOT, cells, code, copy_tree, default_exp, directives, notebooks, settings, text

try:
    from fastcore.docments import DocmentTbl
    from nbdev.serve import proc_nbs
    from nbdev.showdoc import BasicMarkdownRenderer
except ImportError as e: raise SystemExit(f"{e}: run pip install -c constraints.txt -e '.[dev]'") from None

CFG = settings()
LIB, BLOB = CFG["lib_path"], f"{CFG['git_url']}/blob/{CFG['branch']}"
BADGE = re.compile(r"\[!\[[^\]]*\]\([^)]*colab-badge\.svg\)\]")
HTML = set("a b br code dd details div dl dt em hr i img kbd li ol p small span strong sub summary sup table tbody td "
           "th thead tr u ul".split())
FENCE = r"^(?P<fence>```+|~~~+|:::+).*?^(?P=fence)[ \t]*$"
TICKS = r"(?P<tick>`+)(?!`).*?(?<!`)(?P=tick)(?!`)"
NOT_PROSE = re.compile(rf"{FENCE}|{TICKS}|\$\$.*?\$\$|\$[^$\n]+\$|<!--.*?-->|<https?:[^>]+>", re.M | re.S)
# Backticked names, after all that must stay as it is: fences, headings, links, roles, formulas.
NAME = re.compile(FENCE + r"|^#+ .*?$|\[[^\]\n]*\]\([^)\n]*\)|\{[\w:]+\}`[^`\n]*`|\$\$.*?\$\$"
                  r"|(?<!`)`(?P<name>[A-Za-z_][\w.]*)(?P<call>\(\))?`(?!`)|" + TICKS, re.M | re.S)


def stored(node):
    "The names that an assignment gives a value."
    if not isinstance(node, (ast.Assign, ast.AnnAssign)): return []
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


def full_names(function):
    "A function's name, or `Class.name` for each class it is patched into."
    patches = [d for d in function.decorator_list if ast.unparse(d).startswith("patch")]
    if not patches: return [function.name]
    to = patches[0].args[0] if "patch_to" in ast.unparse(patches[0]) else function.args.args[0].annotation
    return [f"{name}.{function.name}" for name in re.findall(r"\w+", ast.unparse(to))]


class Module:
    "An exported module: its page, its `__all__`, and its names as {name: (kind, line)}."
    def __init__(self, notebook):
        self.name, self.pages = f"{LIB}.{default_exp(notebook)}", [notebook.relative_to(NBS).with_suffix("").as_posix()]
        self.file, self.all, self.names, self.inner = f"{self.name.replace('.', '/')}.py", [], {}, {}
        if not (ROOT/self.file).exists(): raise SystemExit(f"{self.file} is not there: run nbdev-export")
        for node in ast.parse((ROOT/self.file).read_text(encoding="utf-8")).body:
            if stored(node) == ["__all__"]: self.all = ast.literal_eval(node.value)
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self.names |= {n: ("method" if "." in n else "function", node.lineno) for n in full_names(node)}
            elif isinstance(node, ast.ClassDef):
                self.names[node.name] = "class", node.lineno
                self.inner |= {f"{node.name}.{f.name}": node.name for f in node.body if hasattr(f, "name")}
            else: self.names |= {n: ("data", node.lineno) for n in stored(node)}
        self.names = {n: v for n, v in self.names.items() if "." in n or n in self.all}

    def find(self, name):
        "The anchor of a name: its own, or that of the class it belongs to."
        name = self.inner.get(name, name)
        return f"{self.name}.{name}" if name in self.names else None

    def anchor(self, name):
        "The heading of a name, known to Sphinx, with a link to its source."
        kind, line = self.names[name]
        return (f"```{{py:{kind}}} {name}\n:no-typesetting:\n:no-index-entry:\n```\n\n### {name}\n\n"
                f"[source]({BLOB}/{self.file}#L{line})")


def link(markdown, module, modules):
    "Markdown in which backticked names lead to their anchors: the own module's first, else the only one there is."
    def one(m):
        name = m["name"]
        if not name: return m[0]
        if name in modules: return f"{{py:mod}}`{name}`"
        own = module.find(name) if module else None
        found = [own] if own else [f for mod in modules.values() if (f := mod.find(name.removeprefix(f"{mod.name}.")))]
        return f"{{py:obj}}`{name}{m['call'] or ''} <{found[0]}>`" if len(found) == 1 else m[0]
    return NAME.sub(one, markdown)


def relink(markdown, folder, pages):
    "Markdown whose links to files that are no pages lead to the repository; the Colab badge becomes a text link."
    def one(m):
        target = os.path.normpath(f"nbs/{folder}/{m[1].partition('#')[0]}")
        if re.match(r"[a-z]+:|#", m[1]) or (pages/target.removeprefix("nbs/")).exists(): return m[0]
        return f"]({BLOB}/{target})" if (ROOT/target).exists() else m[0]
    return re.sub(r"\]\(([^)\s]+)\)", one, BADGE.sub("[Open in Colab]", markdown))


def complain(markdown, where):
    "Stop at a raw tag that is no HTML: outside of code, `<think>` would vanish from the page."
    for tag in re.findall(r"</?([A-Za-z|][\w|-]*)[^<>\n]*>", NOT_PROSE.sub("", markdown)):
        if tag.lower() not in HTML:
            raise SystemExit(f"{where}: <{tag}> outside of code would not be shown; put it in backticks")


def fields(cls):
    "Signature and table of a named tuple, whose constructor says nothing."
    found = re.findall(r"^    (\w+): ([^=#\n]+?)(?: = ([^#\n]+?))?(?:\s*# (.*))?$", getsource(cls), re.M)
    names = [f"{n}: {t}" + f" = {d}" * bool(d) for n, t, d, _ in found if n in cls._fields]
    plain = lambda x: x.replace("|", r"\|").replace("<", "&lt;")
    rows = [f"| {n} | {plain(t)} | {plain(d)} | {plain(c)} |" for n, t, d, c in found if n in cls._fields]
    table = "\n".join(["|  | Type | Default | Details |", "|---|---|---|---|", *rows])
    return f"class {cls.__name__}(\n    " + ",\n    ".join(names) + "\n)", table


class Api(BasicMarkdownRenderer):
    "How nbdev shows a name: its signature, its docstring and the table of its documented parameters."
    modules = {}

    def _repr_markdown_(self):
        # A class that a notebook's cell made has no source to read comments from; the module's has.
        owner = next((m for m in self.modules.values() if isclass(self.sym) and self.sym.__name__ in m.all), None)
        sym = getattr(import_module(owner.name), self.sym.__name__) if owner else self.sym
        try: table = DocmentTbl(sym)
        except (TypeError, ValueError): table = None  # a property has no signature
        rows = table._repr_markdown_().replace("<factory>", "a new one") if table is not None and table.has_docment else ""
        if rows:
            for p in self.dm.dm.values(): p["docment"] = None
        signature = re.sub(rf"\b(?:__main__|{LIB}\.\w+)\.(?=\w)", "", f"{self.dm}")
        if isclass(sym) and hasattr(sym, "_fields"): signature, rows = fields(sym)
        return "\n\n".join(filter(None, [f"### {self.nm}", f"```python\n{signature}\n```", self.docs, rows]))


def add_constants(path, module):
    "Show exported constants in a notebook's copy; nbdev shows functions and classes only."
    nb = json.loads(path.read_text(encoding="utf-8"))
    for i, cell in reversed(list(enumerate(cells(path)))):
        if cell["cell_type"] != "code" or not directives(cell["source"]).keys() & {"export", "exports"}: continue
        for node in reversed(ast.parse(code(cell["source"])).body):
            names = [n for n in stored(node) if n in module.names]
            if not names: continue
            body = f"\n\n```python\n{ast.get_source_segment(code(cell['source']), node)}\n```"
            shown = "\n\n".join(module.anchor(n) for n in names) + body
            nb["cells"].insert(i + 1, dict(cell_type="markdown", id=f"{cell['id']}c", metadata={}, source=shown))
    path.write_text(json.dumps(nb), encoding="utf-8")


def process(copy, modules):
    "Let nbdev process the notebooks of the copy; returns the folder of the results."
    for module in modules.values():
        for page in module.pages: add_constants(copy/"nbs"/f"{page}.ipynb", module)
    config, old = copy/"pyproject.toml", os.getcwd()
    ours = '[tool.nbdev]\nskip_procs = "add_links"\nrenderer = "docs.Api"'
    sys.modules["docs"] = sys.modules[__name__]
    config.write_text(config.read_text(encoding="utf-8").replace("[tool.nbdev]", ours), encoding="utf-8")
    sys.path.insert(0, str(copy))
    Api.modules = modules
    os.chdir(copy)
    try: return proc_nbs(n_workers=0, force=True)
    except Exception as e: raise SystemExit(f"a notebook cannot be documented: {e}") from None
    finally: os.chdir(old)


def pieces(cell, module):
    "A processed cell as cells for the page: Markdown for Markdown outputs, and whatever `#|` hides left out."
    flags = directives(cell["source"])
    if flags.get("include") == "false": return
    if cell["cell_type"] == "markdown": yield "markdown", cell["source"], []
    if cell["cell_type"] != "code": return
    outputs = [] if flags.get("output") == "false" else cell["outputs"]
    source, group = code(cell["source"]) * (flags.get("echo") != "false"), []
    for out in outputs:
        if "text/markdown" not in out.get("data", {}): group.append(out)
        else:
            if source or group: yield "code", source, group
            source, group, shown = "", [], text(out["data"]["text/markdown"])
            name = re.match(r"### (\S+)$", shown, re.M) if code(cell["source"]).startswith("show_doc(") else None
            if name and module and name[1] in module.names: shown = module.anchor(name[1]) + shown[name.end():]
            yield "markdown", shown, []
    if source or group: yield "code", source, group


def write_page(notebook, pages, modules, end=""):
    "Replace a processed notebook by its page."
    name = notebook.relative_to(NBS)
    head, exp, made = cells(notebook)[0], default_exp(notebook), []
    if not head["source"].startswith("# "): raise SystemExit(f"nbs/{name}: the first cell must be the title, `# ...`")
    module = modules[f"{LIB}.{exp}"] if exp else None
    first = module and module.pages[0] == name.with_suffix("").as_posix()
    if module: made.append(("markdown", f"```{{py:{'module' if first else 'currentmodule'}}} {module.name}\n```", []))
    processed = [c for c in cells(pages/name) if c["source"].strip() and "THIS FILE WAS AUTOGENERATED" not in c["source"]]
    for cell in [head, *processed]: made += pieces(cell, module)
    if end: made.append(("markdown", end, []))
    nb = dict(cells=[], metadata=dict(language_info=dict(name="python")), nbformat=4, nbformat_minor=5)
    for i, (kind, source, outputs) in enumerate(made):
        if kind == "markdown":
            complain(source, f"nbs/{name}")
            source = link(relink(source, name.parent.as_posix(), pages), module, modules)
        cell = dict(cell_type=kind, id=f"c{i}", metadata={}, source=source)
        if kind == "code": cell |= dict(outputs=outputs, execution_count=None)
        if kind == "code" and not source: cell["metadata"]["tags"] = ["remove-input"]
        nb["cells"].append(cell)
    (pages/name).write_text(json.dumps(nb), encoding="utf-8")


def contents(paths):
    "The table of contents: numbered notebooks, then each folder."
    names = [p.relative_to(NBS).with_suffix("").as_posix() for p in paths if p != NBS/"index.ipynb"]
    parts = {}
    for name in names: parts.setdefault((name.rpartition("/")[0] or "notebooks").capitalize(), []).append(name)
    return "\n\n".join("\n".join(["```{toctree}", ":hidden:", f":caption: {part}", "", *found, "```"])
                       for part, found in parts.items())


def sphinx(pages, out):
    "Run Sphinx with warnings as errors; stop with what it says."
    args = ["-Wnq", "--keep-going", "-b", "html", "-c", ROOT/"tools", pages, out]
    done = subprocess.run([sys.executable, "-m", "sphinx", *args], capture_output=True, text=True)
    if done.returncode: raise SystemExit(f"Sphinx found faults:\n{done.stderr.replace(f'{pages}', 'nbs').strip()}")


def missing(site, paths, modules):
    "One line for each page, exported name or asset that is not as it should be."
    for path in paths:
        if not (site/path.relative_to(NBS).with_suffix(".html")).exists(): yield f"{path.relative_to(ROOT)} has no page"
    for module in modules.values():
        shown = "".join((site/f"{page}.html").read_text(encoding="utf-8") for page in module.pages)
        lost = [name for name in module.all if f'id="{module.name}.{name}"' not in shown]
        yield from (f"{module.name}.{name} has no anchor on {' or '.join(module.pages)}" for name in lost)
    yield from offline.problems(site)


def build(out):
    "Build the site in the folder `out`."
    if out.exists() and any(out.iterdir()) and not (out/"objects.inv").exists():
        raise SystemExit(f"{out} holds something else than a site; give another --out")
    paths = notebooks()
    modules = {}
    for module in map(Module, filter(default_exp, paths)):
        if module.name in modules: modules[module.name].pages += module.pages
        else: modules[module.name] = module
    with tempfile.TemporaryDirectory() as tmp:
        copy, site = Path(tmp)/"tree", Path(tmp)/"site"
        copy_tree(copy)
        pages = process(copy, modules)
        for path in paths: write_page(path, pages, modules, contents(paths) if path == NBS/"index.ipynb" else "")
        sphinx(pages, site)
        faults = [fault.replace(f"{site}/", "") for fault in missing(site, paths, modules)]
        if faults: raise SystemExit("\n".join(faults))
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(site, out, ignore=shutil.ignore_patterns(".doctrees", ".buildinfo"))
    print(f"{len(paths)} pages, {sum(len(m.all) for m in modules.values())} exported names: {out/'index.html'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT/CFG["doc_path"], help="folder of the site (default: %(default)s)")
    build(parser.parse_args().out.resolve())


if __name__ == "__main__": main()
