"""PEZ as a ComfyUI node pack; the search itself is the package `pez_core` beside this file."""

NODE_CLASS_MAPPINGS: dict = {}  # ComfyUI reports a pack without it as failed
