"""Settings of Sphinx: python -m sphinx -W docs build/docs"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import disalign

project, author, copyright = "disalign", "the disalign authors", "the disalign authors, Apache-2.0"
version = release = disalign.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
html_theme = "furo"
html_title = f"disalign {release}"
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give shapes and dtypes

#: Pages that the repository keeps at its root.
AT_THE_ROOT = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changes.md"}


def link(match):
    """Of a link to a folder, or to a file that is no page here, the text alone."""
    text, target = match.groups()
    name = target.partition("#")[0]
    if name in AT_THE_ROOT:
        return f"[{text}]({AT_THE_ROOT[name]})"
    outside = name.startswith("../") or name == "CITATION.cff" or name.startswith("disalign/")
    return text if outside else match[0]


def without_links_outside(content):
    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", link, content)


def setup(app):
    def read(app, name, content):
        content[0] = without_links_outside(content[0])

    def included(app, path, page, content):
        content[0] = without_links_outside(content[0])

    def shapes(app, what, name, thing, options, lines):
        lines[:] = [re.sub(r"(?<=, )\*(?=[,)])", r"\\*", line) for line in lines]  # (N, K, *) has no emphasis

    app.connect("source-read", read)
    app.connect("include-read", included)
    app.connect("autodoc-process-docstring", shapes)
