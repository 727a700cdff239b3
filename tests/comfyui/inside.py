"""Python code inside of ComfyUI's own modules, where our names do not hide theirs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tools.get_comfyui import comfyui_path

ROOT = Path(__file__).resolve().parent.parent.parent

_BEFORE = """
import importlib.util, json, sys
import comfy.cli_args
comfy.cli_args.args.cpu = True
import comfy.model_management as mm
import torch
import server
class NoServer:
    client_id = None
server.PromptServer.instance = NoServer()
spec = importlib.util.spec_from_file_location(
    "pez_pack", {init!r}, submodule_search_locations=[{root!r}]
)
pack = importlib.util.module_from_spec(spec)
sys.modules["pez_pack"] = pack
spec.loader.exec_module(pack)
def answer(value):
    print("ANSWER " + json.dumps(value))
"""


def inside(code: str, timeout: float = 280) -> Any:
    """Run `code` with the pack as `pez_pack`; returns what it gives to `answer`.

    Raises:
        AssertionError: the code failed; with what it printed.
    """
    source = comfyui_path()
    before = _BEFORE.format(init=str(ROOT / "__init__.py"), root=str(ROOT))
    with TemporaryDirectory() as folder:  # where `code` may leave what it writes
        done = subprocess.run(
            [sys.executable, "-c", before + code],
            cwd=source,
            env={**os.environ, "PYTHONPATH": str(source), "TMPDIR": folder},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    return json.loads(line.removeprefix("ANSWER "))
