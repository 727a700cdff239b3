"""Imports that take long or need an extra happen only where they are used; functions are short.

tests/test_architecture.py has the rules for modules.
"""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

# Lines of a function without its docstring.
LONGEST = 60


def modules_after(code: str) -> set[str]:
    """Names of all modules that a fresh Python has imported after running some code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import pez_core",
        "from pez_core import SearchOptions, Vocabulary; SearchOptions(vocabulary=Vocabulary())",
        "from pez_core import ArgumentError, UNSAFE_WORDS",
        "import pez_core; dir(pez_core), pez_core.__version__",
    ],
)
def test_options_and_vocabularies_need_neither_torch_nor_open_clip(code):
    assert not {"torch", "open_clip", "numpy", "PIL", "transformers"} & modules_after(code)


@pytest.mark.slow
def test_image_tasks_import_neither_language_models_nor_baselines():
    found = modules_after(
        "from pez_core import *\n"
        "clip = load_clip('emoji-clip', device='cpu')\n"
        "options = SearchOptions(prompt_len=2, effort='fast', steps=1, swaps=1)\n"
        f"images = [{str(ROOT / 'examples/noto-fish.png')!r}] * 2\n"
        "invert(clip, images, options), style(clip, images, options)\n"
        "distill(clip, 'a red dog in a car', options)\n"
        "fuse(clip, ['a dog', 'a cat'], options, always_learn=True)\n"
        "score(clip, 'a', images), explain(clip, 'a dog', 'cat'), prune(clip, 'a dog', 'cat')"
    )
    rooms = ("lm", "baselines", "cli", "batch", "diffusion", "nodes")
    unwanted = {
        name
        for name in found
        if name.split(".")[0] in ("diffusers", "pyarrow", "ray")  # open_clip has transformers
        or (name.startswith("pez_core.") and name.split(".")[1] in rooms)
    }
    assert not unwanted


def test_every_public_name_is_there():
    import pez_core

    for name in pez_core.__all__:
        assert getattr(pez_core, name) is not None
    assert set(pez_core.__all__) <= set(dir(pez_core))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pez_core.nothing  # noqa: B018


def test_type_checkers_and_python_find_the_same_names():
    """The imports under TYPE_CHECKING, the lazy imports and `__all__` agree."""
    import pez_core

    tree = ast.parse((ROOT / "pez_core/__init__.py").read_text())
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in checked.body for alias in node.names}
    assert typed == {name: module for name, module in pez_core._HOME.items()}
    # names that need an extra, and the version, are not part of `import *`
    assert set(typed) - set(pez_core.__all__) <= {"PezPipeline", "__version__"}
    assert pez_core.__all__ == sorted(pez_core.__all__, key=_ruff_order)


def _ruff_order(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def lengths(path):
    """Name and length of each function in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node, clean=False) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            yield node.name, lines


@pytest.mark.parametrize("folder", ["pez_core", "nodes"])
def test_functions_are_short(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    long = [
        f"{path.relative_to(ROOT).as_posix()}: {name} has {lines} lines"
        for path in files
        for name, lines in lengths(path)
        if lines > LONGEST
    ]
    assert not long, "\n".join(long)
