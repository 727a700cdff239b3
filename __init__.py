"""PEZ as a ComfyUI node pack; the search itself is the package `pez_core` beside this file."""

import logging

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """What ComfyUI asks for the nodes; nothing of ComfyUI is needed to import this file."""
    try:
        from .nodes import PezExtension
    except Exception:
        # ComfyUI prints one line of it, which says too little to mend anything
        logging.getLogger(__name__).exception("The PEZ nodes cannot be loaded")
        raise
    return PezExtension()
