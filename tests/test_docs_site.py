"""The site's own parts: links between pages, drawings in their pages, notebooks as pages, nothing fetched."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import docs_site
from mkdocs.config import load_config
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.fixture
def config():
    config = load_config(str(ROOT / "mkdocs.yml"), plugins=[])
    config.plugins._current_plugin = "docs_site"  # as in a build
    return config


@pytest.fixture
def files(config):
    """What the site has besides docs/."""
    return docs_site.on_files(Files([]), config)


@pytest.fixture
def page(config, files):
    """`page(name, text)`: what is written into a page of the site, of a text."""

    def made(name, text):
        file = next((each for each in files if each.src_uri == name), None)
        if file is None:
            file = docs_site.File.generated(config, name, content="")
        return docs_site.on_page_markdown(text, Page(None, file, config), config, files)

    return made


@pytest.mark.parametrize(
    ("name", "written", "shown"),
    [
        ("index.md", "[a](docs/data.md#card)", "[a](data.md#card)"),
        ("index.md", "![a](docs/images/x.png)", "![a](images/x.png)"),
        ("cards.md", "[a](../docs/data.md)", "[a](data.md)"),
        ("data.md", "[a](../shards/README.md)", "[a](cards.md)"),
        ("results/history.md", "[a](../results.md)", "[a](../results.md)"),
        ("start.md", "[a](notebooks/own_loop.ipynb)", "[a](notebooks/own_loop.md)"),
        ("notebooks/own_images.md", "[a](../data.md)", "[a](../data.md)"),
        ("data.md", "[a](https://example.org/b.md) [b](#c)", "[a](https://example.org/b.md) [b](#c)"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(page, name, written, shown):
    assert page(name, written) == shown


def test_a_file_outside_docs_that_a_page_links_to_is_copied(page, files):
    """Such as a license; what does not exist is left for the strict build to name."""
    assert page("cards.md", "[a](fashion-mnist-lt/LICENSE)") == "[a](files/shards/fashion-mnist-lt/LICENSE)"
    assert files.get_file_from_path("files/shards/fashion-mnist-lt/LICENSE")
    assert page("cards.md", "[a](none.txt)") == "[a](files/shards/none.txt)"
    assert files.get_file_from_path("files/shards/none.txt") is None


def test_a_drawing_is_put_into_its_page_and_is_dark_with_it(files, config):
    """Not with the reader's system."""
    page = Page(None, files.get_file_from_path("index.md"), config)
    html = docs_site.on_page_content('<p><img alt="a" src="images/queue.svg" /></p>', page, config, files)
    assert html.count("<svg") == html.count("[data-md-color-scheme=slate]") == 1
    assert "prefers-color-scheme" not in html


@pytest.mark.parametrize(
    ("html", "fetched"),
    [
        ('<script src="https://example.org/a.js"></script>', True),
        ("<link rel=stylesheet href=//example.org/a.css>", True),
        ('<img src="http://example.org/a.png">', True),
        ('<link rel="canonical" href="https://example.org/">', False),
        ('<a href="https://example.org">a</a><img src="images/a.png">', False),
    ],
)
def test_a_page_that_fetches_from_another_host_fails_the_build(files, config, html, fetched):
    file = files.get_file_from_path("index.md")
    if fetched:
        with pytest.raises(PluginError, match="fetches from another host"):
            docs_site.on_post_page(html, Page(None, file, config), config)
    else:
        assert docs_site.on_post_page(html, Page(None, file, config), config) == html


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_a_page_with_its_outputs_and_names_no_machine(notebook):
    """Light: code, text and at most one small picture."""
    text = notebook.read_text(encoding="utf-8")
    assert len(text) < 100_000
    assert "/tmp/" not in text
    assert "/work/" not in text
    shown = docs_site.notebook_page(json.loads(text))
    assert shown.startswith("# ")
    assert "```python" in shown
    assert "```text" in shown


def test_the_build_is_strict():
    """MkDocs counts only warnings that it shows: with `--quiet`, `--strict` passes over broken links."""
    (command,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if "mkdocs build" in line]
    assert "--strict" in command
    assert "--quiet" not in command
