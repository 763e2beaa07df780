"""Loads the Jinja templates of self-contained HTML pages.

The Content-Security-Policy of a page allows only the page's own style sheet, which it names by a digest.
"""

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template


def load_template(file: Path) -> Template:
    """Load a template. Values are escaped, and an undefined variable is an error."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["csp_source"] = _make_csp_source
    return environment.from_string(file.read_text(encoding="utf-8"))


def _make_csp_source(style: str) -> str:
    """Return the name of a style sheet in a Content-Security-Policy: `'sha256-...'`."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}'"
