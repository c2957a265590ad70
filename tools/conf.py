"How Sphinx shows the pages that tools/docs.py prepares."
import re
import sys
from pathlib import Path

from latex2mathml.converter import convert
from docutils import nodes
from sphinx.util import logging

sys.path.insert(0, str(Path(__file__).parent))
from notebooks import settings

cfg = settings()
project, author, copyright, version = cfg["name"], cfg["author"], cfg["copyright"], cfg["version"]
extensions = ["myst_nb"]
nb_execution_mode = "off"
nb_ipywidgets_js = {}
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]
html_theme = "sphinx_book_theme"
html_title = project
html_theme_options = dict(repository_url=cfg["git_url"], use_repository_button=True, use_download_button=False,
                          navbar_persistent=[], show_toc_level=2)
html_math_renderer = "mathml"
html_copy_source = html_show_sourcelink = toc_object_entries = False


def math(display):
    "A visitor that writes a formula as MathML, which browsers draw by themselves."
    def visit(self, node):
        try: made = re.sub(r"\\([_%#&$])", r"\1", convert(node.astext(), display=display))
        except Exception as e: made = f"\\ {type(e).__name__}"
        unknown = re.search(r"\\[^<]*", made)
        if unknown: logging.getLogger("math").warning("formula %r: cannot show %s", node.astext(), unknown[0], location=node)
        self.body.append(made)
        raise nodes.SkipNode
    return visit, None


def setup(app): app.add_html_math_renderer("mathml", math("inline"), math("block"))
