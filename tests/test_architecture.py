"""The rules of docs/architecture.md: who imports whom."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

import pez_core

PACKAGE = ROOT / "pez_core"


def modules_of(folder: str) -> dict[str, Path]:
    """The file of each module below a folder."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


MODULES = modules_of("pez_core")
ALL_MODULES = MODULES | modules_of("nodes")
FRONT_ENDS = ("cli", "batch", "diffusion", "lm")
SEARCH = ("pez", "swaps", "tracker", "capture", "space", "objectives")


def _nodes(tree: ast.AST, in_function: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Import statements, and whether they run when a function is called; without type checking."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node, in_function
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from _nodes(node, in_function or function)


def imports_of(module: str, with_functions: bool = True) -> set[str]:
    """Modules of this package, and names of other packages, that a module imports."""
    path, found = ALL_MODULES[module], set()
    for node, in_function in _nodes(ast.parse(path.read_text())):
        if in_function and not with_functions:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif node.level:
            parts = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
            base = ".".join(parts[: len(parts) - node.level + 1])
            full = f"{base}.{node.module}" if node.module else base
            names = [f"{full}.{alias.name}" for alias in node.names]
            found |= {name if name in ALL_MODULES else full for name in names}
        else:
            found.add(node.module.partition(".")[0])
    return found


def in_room(module: str, *rooms: str) -> bool:
    return any(
        module == f"pez_core.{room}" or module.startswith(f"pez_core.{room}.") for room in rooms
    )


CORE = [name for name in MODULES if not in_room(name, *FRONT_ENDS, "baselines", "__main__")]


def test_there_is_no_cycle():
    graph = {name: imports_of(name) & ALL_MODULES.keys() - {name} for name in ALL_MODULES}
    # a package loads its names from its modules, which do not count as its users
    packages = {"pez_core", "nodes"}
    graph = {name: used - packages for name, used in graph.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" > ".join(error.args[1]))


@pytest.mark.parametrize("module", CORE)
def test_the_core_imports_no_front_end(module):
    assert not [one for one in imports_of(module) if in_room(one, *FRONT_ENDS, "baselines")]


@pytest.mark.parametrize("name", SEARCH)
def test_the_search_does_not_import_clip(name):
    assert not [one for one in imports_of(f"pez_core.{name}") if in_room(one, "clip")]


@pytest.mark.parametrize(
    "package, rooms",
    [
        ("open_clip", ("clip", "cli.models")),
        ("diffusers", ("diffusion",)),
        ("pyarrow", ("batch",)),
        ("ray", ("batch",)),
    ],
)
def test_a_package_is_imported_in_its_rooms_only(package, rooms):
    users = [name for name in MODULES if package in imports_of(name)]
    assert users and all(in_room(name, *rooms) for name in users), users


@pytest.mark.parametrize("room", FRONT_ENDS)
def test_a_front_end_imports_no_other(room):
    # cli starts the others
    others = [] if room == "cli" else [one for one in FRONT_ENDS if one != room]
    for module in filter(lambda name: in_room(name, room), MODULES):
        assert not [one for one in imports_of(module) if in_room(one, *others)], module


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    return lines - (function.body[0].end_lineno - function.body[0].lineno + 1)


@pytest.mark.parametrize("module", ALL_MODULES)
def test_functions_are_short(module):
    functions = [
        node
        for node in ast.walk(ast.parse(ALL_MODULES[module].read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    assert not [(one.name, lines_of(one)) for one in functions if lines_of(one) > 60]


# Names with a private or with several meanings; docs/contributing.md has the terms for them.
AVOIDED = {"Frame", "Goal", "Learning", "Plan", "WordsAlone", "Sum", "Mixed"} | {
    *("offer", "asked", "worth", "known", "rival")
}


@pytest.mark.parametrize("module", [one for one in ALL_MODULES if one != "nodes.encoders"])
def test_names_are_terms_of_the_glossary(module):
    tree = ast.parse(ALL_MODULES[module].read_text())
    names = {
        getattr(node, field, None) for node in ast.walk(tree) for field in ("id", "attr", "name")
    }
    assert not {name.strip("_") for name in names if isinstance(name, str)} & AVOIDED


@pytest.mark.parametrize("task", ["invert", "style", "distill", "fuse"])
def test_the_tasks_take_at_most_eight_arguments_in_one_shape(task):
    clip, _, options, *others = inspect.signature(getattr(pez_core, task)).parameters.values()
    assert clip.name == "clip" and options.name == "options" and others[-1].name == "callback"
    assert all(one.kind is one.KEYWORD_ONLY for one in others) and len(others) <= 5


def test_the_package_and_its_help_need_no_torch():
    code = (
        "import contextlib, io, sys, pez_core; from pez_core.cli import main; "
        "out = io.StringIO()\n"
        "with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit): main(['--help'])\n"
        "assert 'invert' in out.getvalue(); "
        "assert not {'torch', 'open_clip', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_page_names_every_file():
    page = (ROOT / "docs/architecture.md").read_text()
    for path in PACKAGE.iterdir():
        name = f"{path.name}/" if path.is_dir() else path.name
        if path.suffix == ".py" or path.is_dir():
            assert f"`{name}`" in page or name in (
                "__init__.py",
                "__main__.py",
                "models/",
                "__pycache__/",
            )
