"""Draw assets/sheet.png: the sheet that README's first command writes, in two columns.

    python tools/draw_sheet.py

Runs `pez` with the arguments of that command, which takes a minute or two.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from pez_core.cli import main as pez
from pez_core.diffusion.sheet import MARGIN

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "assets/sheet.png"
SCALE = 0.75


def arguments(readme: str) -> list[str]:
    """What README's first command gives to `pez`, with the paths of all images."""
    command = re.search(r"<!-- demo command -->\n```bash\n.*?/pez (.+)\n```", readme)
    if command is None:
        raise ValueError("the README has no command that runs `pez`")
    found = []
    for word in shlex.split(command[1]):
        found += sorted(map(str, ROOT.glob(word))) if "*" in word else [word]
    return found


def in_two_columns(sheet: Image.Image) -> Image.Image:
    """The first half of the rows of a sheet beside the second half."""
    blank = (np.asarray(sheet.convert("L")) == 255).all(1)
    # there is less white between two lines of text, and between images and text
    starts = [k for k in range(MARGIN, len(blank)) if not blank[k] and blank[k - MARGIN : k].all()]
    middle = starts[(len(starts) + 1) // 2]
    left = sheet.crop((0, 0, sheet.width, middle))
    right = sheet.crop((0, middle - MARGIN, sheet.width, sheet.height))
    both = Image.new("RGB", (2 * sheet.width, max(left.height, right.height)), "white")
    both.paste(left, (0, 0))
    both.paste(right, (sheet.width, 0))
    return both


def main(out: Path = OUT) -> None:
    with TemporaryDirectory() as folder:
        page = Path(folder) / "page"
        status = pez([*arguments((ROOT / "README.md").read_text("utf-8")), "--page", str(page)])
        if status:
            raise SystemExit(status)
        with Image.open(page / "sheet.png") as sheet:
            wide = in_two_columns(sheet)
        size = round(SCALE * wide.width), round(SCALE * wide.height)
        wide.resize(size, Image.Resampling.LANCZOS).quantize(256).save(out, optimize=True)


if __name__ == "__main__":
    main()
