"""HTML pages: templates whose values are escaped, and data and scripts that stand in the page itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from paco_ds.errors import printable
from paco_ds.evaluation.groups import percent

HERE = Path(__file__).parent


def render(template: str, context: Mapping[str, Any]) -> str:
    """Render a template of this package; all values are escaped, credentials redacted."""
    return printable(_templates().get_template(template).render(context))


def with_scripts(page: str, data: Any) -> str:
    """The page with `data` as JSON, the chart library and page.js before the end of its body.

    They come after `render`: redaction looks at text, and what it takes for a URL may begin in one JSON string and end
    in the next. Strings of the data are redacted one by one.
    """
    scripts = "\n".join(f"<script>{(HERE / name).read_text('utf-8')}</script>" for name in _SCRIPTS)
    data = f'<script type="application/json" id="data">{_as_json(data)}</script>'
    head, end, tail = page.rpartition("</body>")
    return f"{head}{data}\n{scripts}\n{end}{tail}"


_SCRIPTS = ("vega/charts.min.js", "templates/page.js")


@cache
def _templates() -> jinja2.Environment:
    """Compiled once: a page is drawn at every evaluation."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["percent"] = percent
    return environment


def _as_json(data: Any) -> str:
    """JSON in ASCII that cannot end the <script> it stands in, whatever a class is called."""
    text = json.dumps(_printable(data), allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _printable(data: Any) -> Any:
    if isinstance(data, str):
        return printable(data)
    if isinstance(data, Mapping):
        return {printable(str(key)): _printable(value) for key, value in data.items()}
    return [_printable(value) for value in data] if isinstance(data, list | tuple) else data
