"""What the site adds to docs/, as hooks of MkDocs (mkdocs.yml): `make docs`.

* README.md, CONTRIBUTING.md, CHANGELOG.md and shards/README.md are pages too. Links between pages and files of the
  repository stay as they are in the files, and are rewritten here.
* A drawing (docs/images/*.svg) is put into its page, so that its colors follow the page's.
* A notebook (docs/notebooks/*.ipynb) is shown as a page, with its outputs.
* A page that would fetch anything from another host fails the build.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
OUTSIDE |= {"shards/README.md": "cards.md"}
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_COLORS = re.compile(r"\x1b\[[0-9;]*m")  # of a terminal
_FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|video)[^>]+src=["']?(?:https?:)?//|<link(?![^>]+canonical)[^>]+href=["']?(?:https?:)?//"""
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/, and the files of the repository that pages link to."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        name = f"notebooks/{notebook.stem}.md"
        files.append(File.generated(config, name, content=notebook_page(json.loads(notebook.read_text("utf-8")))))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links that were written for readers of the repository."""
    target = page.file.src_uri
    source = {page: source for source, page in OUTSIDE.items()}.get(target, f"docs/{target}")

    def rewrite(link: re.Match[str]) -> str:
        before, path, fragment, after = link.groups()
        if re.match(r"[a-z]+:", path):
            return link[0]
        return before + _in_site(source, target, path, files, config) + (fragment or "") + after

    return _LINK.sub(rewrite, markdown)


def _in_site(source: str, page: str, path: str, files: Files, config: MkDocsConfig) -> str:
    """The link of a page to what `path` is from its source; a file from outside docs/ is copied into the site."""
    named = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    uri = OUTSIDE.get(named) or (named.removeprefix("docs/") if named.startswith("docs/") else f"files/{named}")
    if uri.endswith(".ipynb"):
        uri = uri.removesuffix("ipynb") + "md"
    if files.get_file_from_path(uri) is None and (ROOT / named).is_file():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / named)))
    return posixpath.relpath(uri, posixpath.dirname(page) or ".")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put drawings into the page, in place of the images that show them."""
    return re.sub(r'<img[^>]+src="[^"]*images/([\w-]+\.svg)"[^>]*>', lambda image: _drawing(image[1]), html)


def _drawing(name: str) -> str:
    """The drawing; what it does in the dark, it does in the page's dark mode."""
    svg = (ROOT / "docs" / "images" / name).read_text(encoding="utf-8")
    svg = re.sub(r"@media \(prefers-color-scheme:dark\)\{(.*)\}(?=</style>)", r"[data-md-color-scheme=slate] \1", svg)
    return f'<div class="drawing-frame">{svg}</div>'


def notebook_page(notebook: dict[str, Any]) -> str:
    """A notebook as Markdown: text, code, and what the code printed."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![output](data:image/png;base64,{''.join(data['image/png']).strip()})")
            else:
                printed = _COLORS.sub("", "".join(output.get("text", data.get("text/plain", ""))))
                parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Fail where a page would fetch something from another host."""
    if fetched := _FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri} fetches from another host: {fetched[0]}")
    return output
