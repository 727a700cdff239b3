"""Install what the pack needs, for the Python that runs this file: python install.py

ComfyUI-Manager runs it after requirements.txt. Neither torch nor numpy are changed, and torchvision
only where it is missing or cannot be imported with this torch.
"""

import importlib
import subprocess
import sys
from pathlib import Path

from pez_core import installed

HERE = Path(__file__).resolve().parent


def main() -> int:
    try:
        commands = installed.commands(HERE / "requirements.txt")
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    for command in commands:
        print("+", " ".join(command), flush=True)
        try:
            status = subprocess.run(command).returncode
        except OSError as error:
            print(f"neither pip nor uv can be run ({error})", file=sys.stderr)
            return 1
        if status:
            return status
    importlib.invalidate_caches()
    return 0


if __name__ == "__main__":
    sys.exit(main())
