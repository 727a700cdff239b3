"""PEZ as a ComfyUI node pack; the search itself is the package `pez_core` beside this file."""

import logging
import re
import sys
from importlib.util import find_spec
from pathlib import Path

WEB_DIRECTORY = "./web"

OLDEST_COMFYUI = "0.16.3"
_INSTALL = f'"{sys.executable}" "{Path(__file__).resolve().parent / "install.py"}" and restart.'

log = logging.getLogger(__name__)


def _numbers(version):
    return [int(part) for part in re.findall(r"\d+", version)[:3]]


def _outdated():
    """What to do about a ComfyUI that is too old; "" where it is not, or where there is none."""
    try:
        from comfyui_version import __version__ as version
    except ImportError:
        if find_spec("folder_paths") is None:
            return ""
        version = "older"  # than this file, which is in ComfyUI since 0.3
    if version != "older" and _numbers(version) >= _numbers(OLDEST_COMFYUI):
        return ""
    return f"PEZ needs ComfyUI {OLDEST_COMFYUI} or newer, and this is {version}: update ComfyUI."


# here, since a ComfyUI that is too old does not call what is below
if _problem := _outdated():
    log.warning(_problem)


async def comfy_entrypoint():
    """What ComfyUI asks for the nodes; nothing of ComfyUI is needed to import this file."""
    from .pez_core import installed

    if problem := installed.problem(_INSTALL):
        raise ImportError(problem)  # ComfyUI prints one line, which is this one
    try:
        from .nodes import PezExtension
    except Exception as error:
        if problem := _outdated() or installed.torchvision_problem(_INSTALL):
            raise ImportError(problem) from error
        # ComfyUI prints one line of it, which says too little to mend anything
        log.exception("The PEZ nodes cannot be loaded")
        raise
    return PezExtension()
