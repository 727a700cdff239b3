"""The version, which `pyproject.toml` has and nothing else."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path

_PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def read_version(pyproject: Path = _PYPROJECT) -> str:
    """The version of this package.

    A clone has `pyproject.toml` beside the package, whether it is installed or, as in ComfyUI, only
    imported; what an installer wrote down earlier may be older. Elsewhere the installer knows it.
    """
    try:
        text = pyproject.read_text(encoding="utf-8")
    except OSError:
        text = ""
    if re.search(r'^name = "pez-core"$', text, re.M):
        found = re.search(r'^version = "(.+)"$', text, re.M)
        if found is not None:
            return found[1]
    try:
        return installed_version("pez-core")
    except PackageNotFoundError:
        return "0+unknown"


__version__ = read_version()
