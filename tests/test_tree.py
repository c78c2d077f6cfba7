"""The rooms of the code: how many, what they import, and what every module has."""

import ast
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import tree

ROOT = Path(__file__).resolve().parents[1]
FILES = tree.modules(ROOT)
IN_PACKAGE = {module: file for module, file in FILES.items() if module.startswith("paco_ds")}


def test_there_are_few_rooms():
    """At most 22 at the top two levels, seven modules among them."""
    assert len(tree.rooms(ROOT)) <= 22, tree.rooms(ROOT)
    at_the_top = {module.partition(".")[2] for module in IN_PACKAGE if module.count(".") == 1}
    modules = {name for name in at_the_top if (ROOT / "paco_ds" / f"{name}.py").is_file()}
    assert modules <= {"train", "evaluate", "checkpoint", "command", "errors", "files", "randomness"}


def test_imports_follow_the_datas_way_without_a_circle():
    """Of paco_ds and of tools; `make tree` prints the same lines."""
    assert tree.violations(tree.imports(FILES)) == []


def test_modules_have_a_docstring_and_no_name_of_the_standard_library():
    """The launcher puts the folder of train.py first on the path: `import random` would find ours."""
    bare = [module for module, file in IN_PACKAGE.items() if not ast.get_docstring(ast.parse(file.read_text()))]
    assert bare == []
    assert not {path.stem for path in (ROOT / "paco_ds").iterdir()} & sys.stdlib_module_names


def test_deepspeed_is_imported_in_one_place():
    """At the top of a module; see there why."""
    importers = set()
    for module, file in IN_PACKAGE.items():
        for node in ast.parse(file.read_text()).body:
            named = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", ())]
            if any(str(name).partition(".")[0] == "deepspeed" for name in named):
                importers.add(module)
    assert importers == {"paco_ds.distributed.load_deepspeed"}


def test_no_docstring_begins_with_owns():
    """What a module is for is said as the field would say it."""
    owners = [
        m for m, file in IN_PACKAGE.items() if (ast.get_docstring(ast.parse(file.read_text())) or "")[:5] == "Owns "
    ]
    assert owners == []


def test_few_functions_take_the_whole_recipe():
    """Components take their own section; `tools/tree.py --recipe` lists those that do not."""
    assert len(tree.takes_recipe(FILES)) <= 12, tree.takes_recipe(FILES)


def made(folder: Path, **sources: str) -> dict[str, Path]:
    """Modules with these sources, `data__card` in paco_ds/data/card.py."""
    for name, source in sources.items():
        file = folder / "paco_ds" / (name.replace("__", "/") + ".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    return tree.modules(folder)


@pytest.mark.parametrize(
    "statement",
    [
        "import paco_ds.models.heads",
        "from paco_ds.models import heads",
        "from paco_ds.models.heads import Linear",
        "from ..models.heads import Linear",
        "def read():\n    from paco_ds.models import heads",
    ],
)
def test_an_import_to_the_right_is_seen_however_it_is_written(tmp_path, statement):
    """And marked in the drawing."""
    files = made(tmp_path, data__card=statement, models__heads="from paco_ds.errors import DataError", errors="")
    found = tree.imports(files)
    assert tree.violations(found) == ["paco_ds.data.card imports paco_ds.models.heads, to its right"]
    assert [line.split()[1] for line in tree.drawing(files, found).splitlines() if "X" in line] == ["data"]


def test_circles_are_named_once_each_and_types_alone_are_no_import(tmp_path):
    """Two circles in one room; what stands under TYPE_CHECKING closes none."""
    files = made(
        tmp_path,
        data__a="from paco_ds.data import b, d",
        data__b="from paco_ds.data import c",
        data__c="import paco_ds.data.a",
        data__d="def later():\n    from paco_ds.data.a import name",
        data__e="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from paco_ds.data import f",
        data__f="from paco_ds.data import e",
    )
    circles = tree.violations(tree.imports(files))
    assert sorted(len(set(circle.removeprefix("circle: ").split(" > "))) for circle in circles) == [2, 3]
    assert not any("data.e" in circle for circle in circles)


def test_a_room_without_a_place_and_a_recipe_in_a_signature_are_seen(tmp_path):
    """Whole, optional or quoted; a section or a result is no whole recipe."""
    source = """
def a(recipe: Recipe) -> None: ...
def b(*, recipe: "config.recipe.Recipe | None") -> None: ...
def c(step: StepSection) -> Recipe: ...
"""
    files = made(tmp_path, attic="", data__a=source)
    assert tree.violations(tree.imports(files)) == [
        "room attic has no place in the data's way: give it one in ROOMS of tools/tree.py"
    ]
    assert tree.takes_recipe(files) == ["paco_ds.data.a.a", "paco_ds.data.a.b"]
