"""PEZ as a ComfyUI node pack; the search itself is the package `pez_core` beside this file."""
