"What the tools in tools/ make and refuse."
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent/"tools"))
import notebooks as nbs  # noqa: E402
import offline  # noqa: E402
import readme  # noqa: E402


def cell(source, *outputs, kind="code"):
    "A notebook cell."
    return dict(cell_type=kind, source=source, outputs=list(outputs), metadata={})


def result(text, mime="text/plain"):
    "An output of a cell."
    return dict(output_type="execute_result", data={mime: text}, metadata={})


def test_directives_stand_at_the_top():
    source = "#| echo: false\n#|slow\nx = '#| hide'\n#| notest"
    assert nbs.directives(source) == {"echo": "false", "slow": ""}
    assert nbs.code(source) == "x = '#| hide'\n#| notest"


@pytest.mark.parametrize("made, expected", [
    (cell("1+1", result("2")), ["```python\n1+1\n```", "```text\n2\n```"]),
    (cell("#| echo: false\nt", result("| a |", "text/markdown")), ["| a |"]),
    (cell("#| output: false\nt", result("2")), ["```python\nt\n```", ]),
    (cell("#| hide\nt", result("2")), []),
    (cell("t", result("a ``` b")), ["```python\nt\n```", "````text\na ``` b\n````"]),
    (cell("[a](00_a.ipynb) [b](../LICENSE) [c](https://d.e) `[x](y)`", kind="markdown"),
     ["[a](nbs/00_a.ipynb) [b](LICENSE) [c](https://d.e) `[x](y)`"]),
])
def test_readme_blocks(made, expected):
    assert list(readme.blocks(made, "cell")) == expected


def test_readme_refuses_embedded_images():
    with pytest.raises(SystemExit, match="cell 3: .* embedded image"):
        list(readme.blocks(cell("plot()", result("iVBO", "image/png")), "cell 3"))


@pytest.mark.parametrize("page, loads", [
    ('<a href="https://a.b">x</a><link rel="canonical" href="https://a.b">', []),
    ('<script src="//a.b/x.js"></script>', ["//a.b/x.js"]),
    ('<link rel="stylesheet" href="https://a.b/c.css">', ["https://a.b/c.css"]),
    ('<img src="x.png" srcset="x.png 1x, https://a.b/y.png 2x">', ["https://a.b/y.png"]),
    ('<p style="background:url(https://a.b/i.png)">', ["https://a.b/i.png"]),
    ("<style>@import 'https://a.b/f.css'; /* url(https://no.no) */</style>", ["https://a.b/f.css"]),
    ('<script>import("https://a.b/m.js"); // see https://c.d\n</script>', ["https://a.b/m.js"]),
    ('<iframe srcdoc="&lt;img src=&quot;https://a.b/i.png&quot;&gt;"></iframe>', ["https://a.b/i.png"]),
])
def test_offline(tmp_path, page, loads):
    (tmp_path/"p.html").write_text(page)
    assert offline.outside(tmp_path/"p.html") == loads


def test_notebooks_in_reading_order():
    names = [p.relative_to(nbs.NBS).as_posix() for p in nbs.notebooks()]
    numbered = [n for n in names if n[0].isdigit()]
    assert names[0] == "index.ipynb" and numbered == sorted(numbered) == names[1:len(numbered) + 1]


def test_the_copy_is_what_git_would_keep(tmp_path):
    nbs.copy_tree(tmp_path)
    assert (tmp_path/"settings.ini").exists() and not (tmp_path/"_docs").exists() and not (tmp_path/".git").exists()
    assert json.loads((tmp_path/"nbs"/"index.ipynb").read_text(encoding="utf-8"))["cells"]
