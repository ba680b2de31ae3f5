"""The rooms of `linearize/`: imports run down the list of rooms only, no files import each other in a circle, and each
room opens with its page.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "linearize"
ROOMS = (
    "cli",
    "runs",
    "stages",
    "hub",
    "evaluation",
    "hardware",
    "conversion",
    "training",
    "data",
    "config",
    "ground",
    "modeling",
    "kernels",
)
"""From the top floor down. `ground` is the files beside the rooms, which every room may import; `modeling` and
`kernels` are the folders of the checkout that the package links to."""
GROUND = {"errors", "failures", "files", "lazy", "load_errors", "paths", "processes", "tables"}
OUTSIDE = ("configs", "demo_text")
"""Folders without code."""
OWED: dict[tuple[str, str], str] = {}
"""(file, what it imports) that run upward still -> why. The list only shrinks."""
PAGE_LINES = 20
FUNCTION_LINES = 60
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def _files() -> dict[str, Path]:
    """Modules by their dotted name; links are followed."""
    found = {}
    for folder in (ROOT / PACKAGE, ROOT / PACKAGE / "modeling", ROOT / PACKAGE / "kernels"):
        real = folder.resolve()
        for path in sorted(real.rglob("*.py")):
            parts = (folder / path.relative_to(real)).relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _files()


def _statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports at any depth, those for type checking left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _statements(other)
        else:
            yield from _statements(child)


def _offered(tree: ast.Module, module: str) -> dict[str, str]:
    """Name -> module of what a page offers by `on_first_use`."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "on_first_use" and len(node.args) == 2:
            for file, names in ast.literal_eval(node.args[1]).items():
                found |= dict.fromkeys(names, module + file if file.startswith(".") else file)
    return found


def _imported(package: str, statement: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Modules of ours that a statement in a file of a package imports."""
    if isinstance(statement, ast.Import):
        yield from (alias.name for alias in statement.names if alias.name.split(".")[0] == PACKAGE)
        return
    base = statement.module or ""
    if statement.level:
        parents = package.split(".")[: len(package.split(".")) + 1 - statement.level]
        base = ".".join([*parents, *([base] if base else [])])
    if base.split(".")[0] == PACKAGE:
        for alias in statement.names:
            yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base


@cache
def imports() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports anywhere in its code."""
    found = {}
    for module, path in MODULES.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = {name for statement in _statements(tree) for name in _imported(package, statement)}
        found[module] = (named | set(_offered(tree, module).values())) - {module}
    return found


def room(module: str) -> str:
    parts = module.split(".")
    if parts[1:] == ["__main__"]:
        return "cli"
    if len(parts) == 1 or parts[1] in GROUND:
        return "ground"
    return parts[1]


def upward() -> set[tuple[str, str]]:
    """Imports of another room that is not below; the package itself, whose names all rooms use, is on the ground."""
    floor = {name: number for number, name in enumerate(ROOMS)}
    return {
        (module, target)
        for module, targets in imports().items()
        if module != PACKAGE
        for target in targets
        if floor[room(target)] < floor[room(module)]
    }


def circles() -> list[list[str]]:
    """Groups of files that import each other, directly or through others (Tarjan's strong components)."""
    graph, order, low, stack, found = imports(), {}, {}, [], []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target == PACKAGE or target not in graph:
                continue
            if target not in order:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], order[target])
        if low[node] == order[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in order and node != PACKAGE:
            visit(node)
    return found


def test_every_file_is_in_a_room():
    folders = {path.name for path in (ROOT / PACKAGE).iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {*ROOMS, *OUTSIDE} - {"ground"}
    assert {path.stem for path in (ROOT / PACKAGE).glob("*.py")} - {"__init__", "__main__"} == GROUND


def test_imports_are_found():
    assert "linearize.data.packing" in imports()["linearize.data.sequences"]  # at the top
    assert "linearize.hub.repository" in imports()["linearize.cli.app"]  # inside a function
    assert "linearize.kernels.launching" in imports()["linearize.kernels.hybrid_linear.fused"]  # by its place
    assert len(imports()) > 150


def test_imports_run_down_only():
    assert sorted(upward() - OWED.keys()) == []


def test_what_is_owed_is_still_owed():
    assert sorted(OWED.keys() - upward()) == []


def test_only_the_command_line_uses_the_package_itself():
    """What `linearize` offers comes from all rooms: a room that took it from there would import upward unseen."""
    found = []
    for module, path in MODULES.items():
        if module == PACKAGE or room(module) in ("cli", "modeling", "kernels"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            offered = isinstance(node, ast.ImportFrom) and node.module == PACKAGE
            used = isinstance(node, ast.Attribute) and ast.unparse(node.value) == PACKAGE
            if offered or (used and node.attr != "__version__"):
                found.append((module, ast.unparse(node)))
    assert found == []


def test_what_a_room_offers_is_there_and_hidden_by_no_file():
    for module, path in MODULES.items():
        for name, file in _offered(ast.parse(path.read_text(encoding="utf-8")), module).items():
            assert f"{module}.{name}" not in MODULES, f"{module} offers {name}, and has a file of that name"
            assert name in _names(file), f"{file} has no {name}"


def test_every_public_name_is_there():
    import linearize

    assert [name for name in linearize.__all__ if getattr(linearize, name, None) is None] == []


def _names(module: str) -> set[str]:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    return {node.name for node in tree.body if hasattr(node, "name")} | _offered(tree, module).keys()


def test_no_files_import_each_other_in_a_circle():
    assert circles() == []


def test_functions_of_the_rooms_are_short():
    """`modeling` and `kernels` have a style of their own."""
    long = []
    for module, path in MODULES.items():
        if room(module) in ("modeling", "kernels"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            lines = node.end_lineno - node.lineno + 1 if isinstance(node, FUNCTIONS) else 0
            if lines > FUNCTION_LINES:
                long.append((module, node.name, lines))
    assert long == []


ROOM_PAGES = sorted(
    path.parent.relative_to(ROOT / PACKAGE).as_posix()
    for folder in (ROOT / PACKAGE).iterdir()
    if folder.is_dir() and folder.name not in ("modeling", "kernels")
    for path in folder.rglob("__init__.py")
)


@pytest.mark.parametrize("name", ROOM_PAGES)
def test_a_room_opens_with_its_page(name):
    folder = ROOT / PACKAGE / name
    page = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    assert 2 < len(page.splitlines()) <= PAGE_LINES
    files = {path.name for path in folder.glob("*.py") if not path.name.startswith("__")}
    named = {word for word in page.replace("(", " ").split() if word.strip(",;:)").endswith(".py") and "/" not in word}
    assert {word.strip(",;:)") for word in named} == files
