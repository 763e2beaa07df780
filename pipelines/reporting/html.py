"""Pages that need nothing but themselves: their Content-Security-Policy names the one style sheet by its digest."""

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template


def html_template(file: Path) -> Template:
    """A template of HTML: what it is given is escaped, and what it was not given is an error."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["source_of_style"] = _source_of_style
    return environment.from_string(file.read_text(encoding="utf-8"))


def _source_of_style(style: str) -> str:
    """What a Content-Security-Policy calls this style sheet and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}'"
