"""What is installed beside this package. Imports nothing but the standard library.

ComfyUI brings a torch, a torchvision and a numpy of its own, which nothing here may replace. They
are built for each other, while installers take the newest torchvision where there is none, of
another build. So open_clip_torch, which asks for one, is installed without its dependencies.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

OPEN_CLIP = "open_clip_torch>=3.3,<4"
"""Installed without its dependencies: those that are needed are in requirements.txt."""

_MODULES = (
    "torch",
    "numpy",
    "torchvision",
    "open_clip",
    "ftfy",
    "regex",
    "huggingface_hub",
    "safetensors",
    "filelock",
    "tqdm",
    "PIL",
)
_OLDEST_OPEN_CLIP, _NEXT_OPEN_CLIP = (3, 3), (4,)


def problem(remedy: str) -> str:
    """What is missing, and how to mend it; "" where all is there. Nothing is imported.

    Args:
        remedy: the command that mends it.
    """
    missing = [name for name in _MODULES if find_spec(name) is None]
    if missing:
        return f"PEZ needs {' and '.join(missing)}, not installed here: run {remedy}"
    found = _version("open_clip_torch")
    if found and not _OLDEST_OPEN_CLIP <= _numbers(found) < _NEXT_OPEN_CLIP:
        return f"PEZ needs {OPEN_CLIP}, and {found} is installed here: run {remedy}"
    return ""


def torchvision_problem(remedy: str) -> str:
    """Why torchvision cannot be imported, and how to mend it; "" where it can.

    Args:
        remedy: the command that mends it.
    """
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # of any type, for one of another build
        line = (str(error) or type(error).__name__).splitlines()[0]
        return (
            f"torchvision {_version('torchvision') or '(missing)'} does not fit torch "
            f"{_version('torch') or '(missing)'} ({line}): run {remedy}"
        )
    return ""


def installer(python: str = sys.executable) -> list[str]:
    """The command that installs packages for a Python: its pip, or uv where it has none."""
    has_pip = subprocess.run([python, "-c", "import pip"], capture_output=True).returncode == 0
    return [python, "-m", "pip", "install"] if has_pip else _uv(python)


def commands(requirements: Path, python: str = sys.executable) -> list[list[str]]:
    """The commands, in their order, that add what is missing and move nothing else.

    Args:
        requirements: requirements.txt.
        python: the Python to install for.

    Raises:
        RuntimeError: torch is missing, of which each computer needs another build.
    """
    torch = _version("torch")
    if torch is None:
        raise RuntimeError("torch is not installed; see https://pytorch.org")
    install = installer(python)
    found = [[*install, "-r", str(requirements)]]
    open_clip = _version("open_clip_torch")
    if open_clip is None or not _OLDEST_OPEN_CLIP <= _numbers(open_clip) < _NEXT_OPEN_CLIP:
        found.append([*install, "--no-deps", OPEN_CLIP])
    if torchvision_problem(""):
        found += torchvision_commands(torch, python)
    return found


def torchvision_commands(torch: str, python: str = sys.executable) -> list[list[str]]:
    """The commands that install the torchvision of a version of torch, and of its build."""
    release, _, build = torch.partition("+")
    major, minor = _numbers(release)[:2]
    wanted = f"torchvision==0.{minor + 15}.*" if major == 2 else "torchvision"
    forced = ["--force-reinstall"] if _version("torchvision") else []
    arguments, install = ["--no-deps", *forced, wanted], installer(python)
    if not build:
        return [[*install, *arguments]]
    # uv alone finds the packages of a build by its name
    arguments = ["--torch-backend", build, *arguments]
    if install == _uv(python):
        return [[*install, *arguments]]
    return [[*install, "uv"], [python, "-m", *_uv(python), *arguments]]


def _uv(python: str) -> list[str]:
    return ["uv", "pip", "install", "--python", python]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])
