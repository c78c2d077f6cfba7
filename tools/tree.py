#!/usr/bin/env python3
"""Draw which room of paco_ds imports which, and say where an import goes against the data's way: `make tree`.

A room is one entry of the top two levels of the code: a module or a package directly under paco_ds/, and tools/,
ds_configs/ and shards/ beside it. (tests/ and docs/ are about the code and do not count.) ROOMS has those that hold
code in the order of the data's way. A module imports from its own room and from rooms before it, at the top of the
module or inside a function; imports under TYPE_CHECKING do not count. No modules import each other in a circle.

Exit status 1, and a line each on standard error, where that does not hold.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

PACKAGE = "paco_ds"
BESIDE = ("tools", "ds_configs", "shards")
DATAS_WAY = (
    "errors command files randomness config distributed data models contrast losses checkpoint evaluation metrics "
    "report training planning paper train evaluate tools"
)
ROOMS = DATAS_WAY.split()

Imports = dict[str, set[str]]


def rooms(root: Path) -> list[str]:
    """Names of the rooms, in alphabetical order."""
    inside = [p for p in (root / PACKAGE).iterdir() if p.is_dir() or p.suffix == ".py"]
    return sorted([p.stem for p in inside if not p.name.startswith("__")] + [b for b in BESIDE if (root / b).is_dir()])


def modules(root: Path) -> dict[str, Path]:
    """The file of each module of the package and of tools/, by its full name; a package is its `__init__`."""
    files = sorted((root / PACKAGE).rglob("*.py")) + sorted((root / "tools").rglob("*.py"))
    names = (".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for file in files)
    return dict(zip(names, files, strict=True))


def imports(files: Mapping[str, Path]) -> Imports:
    """The modules of `files` that each of them imports, itself excepted."""
    found: Imports = {}
    for module, file in files.items():
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        named: set[str] = set()
        for node in _statements(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                source = resolve_name("." * node.level + (node.module or ""), package)
                # `from package import module` imports the module, `from module import name` the name's
                named |= {full if (full := f"{source}.{alias.name}") in files else source for alias in node.names}
        found[module] = (named & files.keys()) - {module}
    return found


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Everything in a module but what stands under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from _statements(child)


def room_of(module: str) -> str:
    """`paco_ds.data.card` is in `data`, `tools.bench.step` in `tools`."""
    first, *rest = module.split(".")
    return rest[0] if first == PACKAGE and rest else first


def violations(found: Imports) -> list[str]:
    """A line for each import to the right, each room without a place in the order, and each circle."""
    homeless = sorted({room_of(module) for module in found if module != PACKAGE} - set(ROOMS))
    lines = [f"room {room} has no place in the data's way: give it one in ROOMS of tools/tree.py" for room in homeless]
    place = {room: number for number, room in enumerate(ROOMS)}
    for module, targets in found.items():
        here, there = place.get(room_of(module), len(ROOMS)), {t: place.get(room_of(t), -1) for t in targets}
        lines += [f"{module} imports {target}, to its right" for target in sorted(targets) if there[target] > here]
    return lines + [f"circle: {circle}" for circle in circles(found)]


def circles(graph: Imports) -> list[str]:
    """Circles as `a > b > a`, as many as have to be broken until none is left."""
    rest = {node: set(targets) for node, targets in graph.items()}
    found = []
    while True:
        try:
            TopologicalSorter(rest).prepare()
        except CycleError as error:
            circle = error.args[1][::-1]  # given as what comes first
            found.append(" > ".join(circle))
            rest[circle[0]].discard(circle[1])
        else:
            return found


def takes_recipe(files: Mapping[str, Path]) -> list[str]:
    """`module.function` of each signature in the package with a parameter annotated `Recipe`."""
    found = []
    for module, file in files.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if module.startswith(PACKAGE) and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                annotations = [ast.unparse(a.annotation).strip("'\"").split(" | ") for a in given if a.annotation]
                if any(part.rpartition(".")[2] == "Recipe" for parts in annotations for part in parts):
                    found.append(f"{module}.{node.name}")
    return found


def drawing(files: Mapping[str, Path], found: Imports) -> str:
    """A row for each room in the data's way: its modules, its lines, and a mark under the number of each room that it
    imports: `o`, or `X` to its right."""
    order = [*ROOMS, *sorted({room_of(module) for module in found if module != PACKAGE} - set(ROOMS))]
    rows = [f"{'modules  lines':>32} " + "".join(f"{number:3d}" for number in range(1, len(order) + 1))]
    for row, room in enumerate(order):
        members = [module for module in files if room_of(module) == room]
        length = sum(len(files[module].read_text(encoding="utf-8").splitlines()) for module in members)
        targets = {room_of(target) for module in members for target in found[module]}
        left = ["o" if other in targets else "." for other in order[:row]]
        right = ["X" if other in targets else " " for other in order[row + 1 :]]
        marks = "".join(f"{mark:>3}" for mark in [*left, "#", *right]).rstrip()
        rows.append(f"{row + 1:2d} {room:14}{len(members):8d} {length:6,d} {marks}")
    return "\n".join(rows)


def main() -> int:
    """Print the drawing, or with --recipe the signatures; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="store_true", help="list the functions that take a whole Recipe instead")
    listed = parser.parse_args().recipe
    root = Path(__file__).resolve().parents[1]
    files = modules(root)
    if listed:
        takers = takes_recipe(files)
        print("\n".join(takers), f"{len(takers)} functions take a whole Recipe", sep="\n")
        return 0
    found = imports(files)
    print(drawing(files, found), f"\n{len(rooms(root))} rooms: {', '.join(rooms(root))}", sep="\n")
    wrong = violations(found)
    print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
