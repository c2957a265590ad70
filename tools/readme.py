"""Turn nbs/index.ipynb into README.md.

Markdown stays, code becomes fenced blocks with their text outputs. `#| hide` drops a cell, `#| echo: false` its code,
`#| output: false` its outputs. Relative links are made to start at the project's root.
"""
import argparse
import difflib
import re
import sys
from posixpath import normpath

from notebooks import NBS, ROOT, cells, code, directives, text

SOURCE, TARGET = NBS/"index.ipynb", ROOT/"README.md"
ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
CODE_OR_LINK = re.compile(r"(?P<code>^(?P<fence>```+|~~~+).*?^(?P=fence)|(?P<tick>`+)(?!`).*?(?<!`)(?P=tick)(?!`))"
                          r"|(?:(?<=\]\()|(?<=src=\"))(?P<link>[^)\"\s]+)", re.M | re.S)


def relink(markdown):
    "Let the relative links of a notebook in nbs/ start at the root; code is left alone."
    def one(m):
        link = m["link"]
        return m[0] if not link or re.match(r"[a-z]+:|[#/]", link) else normpath(f"nbs/{link}")
    return CODE_OR_LINK.sub(one, markdown)


def fenced(body, language):
    "A fenced block whose fence is longer than any in the body."
    fence = max(re.findall(r"`{3,}", body), key=len, default="``") + "`"
    return f"{fence}{language}\n{body}\n{fence}"


def output(out, where):
    "One output as Markdown, or an empty string."
    data = out.get("data", {})
    if any(kind.startswith("image/") for kind in data):
        raise SystemExit(f"{where}: README.md cannot hold an embedded image; save it as a file and link it")
    if "text/markdown" in data: return relink(text(data["text/markdown"]).strip("\n"))
    shown = {"stream": out.get("text", ""), "error": "\n".join(out.get("traceback", []))}
    body = ANSI.sub("", text(shown.get(out["output_type"], data.get("text/plain", "")))).rstrip()
    return fenced(body, "text") if body else ""


def blocks(cell, where):
    "The Markdown blocks of a cell."
    flags = directives(cell["source"])
    if cell["cell_type"] == "raw" or "hide" in flags or "default_exp" in flags or flags.get("include") == "false": return
    if cell["cell_type"] == "markdown":
        if "](attachment:" in cell["source"]:
            raise SystemExit(f"{where}: README.md cannot hold an attached image; save it as a file and link it")
        yield relink(code(cell["source"]))
        return
    if flags.get("echo") != "false" and code(cell["source"]): yield fenced(code(cell["source"]), "python")
    if flags.get("output") != "false": yield from (output(out, where) for out in cell["outputs"])


def render():
    "README.md as the notebook has it."
    parts = [block for i, cell in enumerate(cells(SOURCE), 1) for block in blocks(cell, f"nbs/index.ipynb, cell {i}")]
    return "\n\n".join(filter(None, parts)) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if README.md is not up to date")
    check, new = parser.parse_args().check, render()
    if not check: return TARGET.write_text(new, encoding="utf-8", newline="\n") and None
    old = TARGET.read_bytes().decode("utf-8") if TARGET.exists() else ""
    if old == new: return None
    diff = difflib.unified_diff(old.splitlines(), new.splitlines(), "README.md", "nbs/index.ipynb", lineterm="", n=1)
    print("README.md is not what nbs/index.ipynb says: run python tools/readme.py", *list(diff)[:20], sep="\n")
    return 1


if __name__ == "__main__": sys.exit(main())
