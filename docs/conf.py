"""Sphinx configuration: plain reST, the stock theme, nothing fetched from anywhere."""

from __future__ import annotations

project = "s2s"
author = "the s2s authors"
project_copyright = "the s2s authors"
extensions: list[str] = []
exclude_patterns = ["_build"]
root_doc = "index"
html_theme = "alabaster"
html_theme_options = {
    "description": "A signed, durable link between a server and an engine",
    "page_width": "1100px",
    "show_powered_by": False,
}
html_show_sourcelink = False
# Code samples are JSON, hex dumps and pseudo-code: none is to be coloured as Python.
highlight_language = "none"
nitpicky = True
