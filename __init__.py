"""PEZ as a ComfyUI node pack; the search itself is the package `pez_core` beside this file."""

import logging
import re
import sys
from importlib.util import find_spec
from pathlib import Path

WEB_DIRECTORY = "./web"

OLDEST_COMFYUI = "0.16.3"
_PACKAGES = ("open_clip", "huggingface_hub", "safetensors", "filelock", "tqdm")

log = logging.getLogger(__name__)


def _numbers(version):
    return [int(part) for part in re.findall(r"\d+", version)[:3]]


def _outdated():
    """What to do about a ComfyUI that is too old; "" where it is not, or where there is none."""
    try:
        from comfyui_version import __version__ as version
    except ImportError:
        return ""
    if _numbers(version) >= _numbers(OLDEST_COMFYUI):
        return ""
    return f"PEZ needs ComfyUI {OLDEST_COMFYUI} or newer, and this is {version}: update ComfyUI."


def _missing():
    """How to install what is missing; "" where all is there."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if not missing:
        return ""
    file = Path(__file__).resolve().parent / "requirements.txt"
    return (
        f"PEZ needs {' and '.join(missing)}, not installed here: run "
        f'"{sys.executable}" -m pip install -r "{file}" and restart ComfyUI.'
    )


# here, since a ComfyUI that is too old does not call what is below
if _problem := _outdated():
    log.warning(_problem)


async def comfy_entrypoint():
    """What ComfyUI asks for the nodes; nothing of ComfyUI is needed to import this file."""
    if problem := _missing():
        raise ImportError(problem)  # ComfyUI prints one line, which is this one
    try:
        from .nodes import PezExtension
    except Exception as error:
        if problem := _outdated():
            raise ImportError(problem) from error
        # ComfyUI prints one line of it, which says too little to mend anything
        log.exception("The PEZ nodes cannot be loaded")
        raise
    return PezExtension()
