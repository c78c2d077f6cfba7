"""What the documentation names exists: links, files, recipes, commands, messages, make targets; its examples work."""

import ast
import math
import re
import sys
import tomllib
import types
from functools import cache
from pathlib import Path

import pytest
import torch

from paco_ds.config.loss import LossSettings
from paco_ds.losses import Anchors, make_loss

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("README.md", "CONTRIBUTING.md", "shards/README.md")
PAGES = sorted([*(ROOT / page for page in OUTSIDE), *(ROOT / "docs").rglob("*.md")])
EXAMPLE = re.compile(r"NAME|poly")  # modules that a reader would add
WRITTEN = {"recipe.yaml", "card.yaml", "manifest.json", "manifest-1.json", "metrics.json", "metrics_targets.json"}
WRITTEN |= {"started_from.json", "config.json", "state.json", "KEY.json", "outcome.json"}  # by builds and runs


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _anchors(page: Path) -> set[str]:
    """Fragments of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", _text(page), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Relative links whose file or heading does not exist."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", _text(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (fragment and fragment not in _anchors(target)):
            broken.append(link)
    return broken


def missing_paths(text: str) -> list[str]:
    """Paths of files of the repository, and bare names of files in code font, that do not exist."""
    paths = re.findall(r"(?<![\w/.-])((?:paco_ds|tools|tests|ds_configs|shards|docs)/[\w./-]*\w\.\w+)", text)
    missing = [path for path in paths if not EXAMPLE.search(path) and not (ROOT / path).exists()]
    bare = re.findall(r"`([\w-]+\.(?:py|yaml|json|md))\b", text)
    return missing + [name for name in bare if name not in WRITTEN and name not in _file_names()]


@cache
def _file_names() -> set[str]:
    folders = ("paco_ds", "tools", "tests", "ds_configs", "shards", "docs")
    return {file.name for folder in folders for file in (ROOT / folder).rglob("*.*")} | {"CONTRIBUTING.md", "README.md"}


def unknown_names(text: str) -> list[str]:
    """Console commands, make targets and recipes that do not exist."""
    commands = tomllib.loads(_text(ROOT / "pyproject.toml"))["project"]["scripts"]
    targets = set(re.findall(r"^([a-z-]+):", _text(ROOT / "Makefile"), re.MULTILINE))
    unknown = [name for name in re.findall(r"(?<![\w/])paco-[a-z-]+", text) if name not in commands]
    made = re.findall(r"(?:`|^    )make ([a-z-]+)", text, re.MULTILINE)
    unknown += [f"make {name}" for name in made if name not in targets]
    recipes = re.findall(r"`((?:gpaco_)?(?:cifar100_lt|imagenet_lt|inaturalist2018|places_lt)_\w+)`", text)
    return unknown + [name for name in recipes if not (ROOT / f"ds_configs/recipes/{name}.yaml").exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    assert broken_links(page) == []
    assert missing_paths(_text(page)) == []
    assert unknown_names(_text(page)) == []


def test_names_that_do_not_exist_are_found(tmp_path: Path) -> None:
    """The checks above can fail."""
    page = tmp_path / "page.md"
    page.write_text("# A title\n[a](#a-title) [b](#other) [c](none.md) [d](https://example.org/none)\n")
    assert broken_links(page) == ["#other", "none.md"]
    text = (
        "see `paco_ds/none.py`, paco_ds/train.py, `tools/bench/none.py` and `make nothing`, `paco-none`, `zero9.json`"
    )
    assert missing_paths(text) == ["paco_ds/none.py", "tools/bench/none.py", "zero9.json"]
    assert unknown_names(text + " `imagenet_lt_resnet18`") == [
        "paco-none",
        "make nothing",
        "imagenet_lt_resnet18",
    ]


def messages_of(source: str) -> list[str]:
    """The texts of a module, `…` for each value that is put into one."""
    texts = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return [re.sub("…+", "…", text) for text in texts]


def test_messages_of_the_faq_are_in_the_code() -> None:
    """Each heading is a part of a text of the package, word for word."""
    quoted = re.findall(r"^### `(.+)`$", _text(ROOT / "docs/faq.md"), re.MULTILINE)
    assert 20 <= len(quoted) == len(set(quoted))
    texts = [text for file in (ROOT / "paco_ds").rglob("*.py") for text in messages_of(_text(file))]
    assert [message for message in quoted if not any(message in text for text in texts)] == []


def test_a_text_with_values_is_compared_with_its_gaps() -> None:
    """The check above can fail."""
    texts = messages_of("""error(f"{path} has {n} " f"members: " "pack it")""")
    assert "… has … members: pack it" in texts
    assert not any("… has … images" in text for text in texts)


def test_the_method_of_contributing_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two files, as the page has them: Poly-1 of p_y = 1/2 is log 2 + epsilon / 2."""
    blocks = re.findall(r"```python\n(.*?)```", _text(ROOT / "CONTRIBUTING.md"), re.DOTALL)
    for name, code in zip(("paco_ds.config.methods.poly", "paco_ds.losses.poly"), blocks, strict=True):
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(code, name, "exec", dont_inherit=True), vars(module))
    settings = {"method": "paco_ds.config.methods.poly:PolySettings", "options": {"epsilon": 2}}
    loss = make_loss(LossSettings.model_validate(settings), [3, 2])
    anchors = Anchors(torch.tensor([0, 1]), torch.zeros(2, 2))
    assert float(loss(anchors).loss) == pytest.approx(math.log(2) + 1)
