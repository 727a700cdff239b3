"""Download, render and describe the emoji that `emoji-clip` is trained and tested on.

    python tools/emoji_data.py            # fills build/emoji (about two minutes)

Needs `npm` (the drawings come as npm packages) and the Python package `resvg-py`.

What is left out of training is decided here, by a fixed seed and before any training:

* one whole style, `fxemoji`;
* 400 names in two further styles, `noto` and `twemoji`. `noto-v1` often holds the same drawing as
  `noto`, so it loses these names too.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import subprocess
import sys
import unicodedata
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

SIZE = 64
HELD_OUT_STYLE = "fxemoji"
HELD_OUT_NAME_STYLES = ("noto", "twemoji")
HELD_OUT_NAMES = 400
EMOJIBASE = "emojibase-data@17.0.0"

# npm package version and the words that describe the drawing style
STYLES = {
    "noto": ("1.2.9", ["soft gradient", "shaded vector"]),
    "noto-v1": ("1.2.5", ["rounded blob", "soft cartoon"]),
    "twemoji": ("1.2.5", ["flat", "simple flat vector"]),
    "openmoji": ("1.2.29", ["outlined sketch", "thin black outline"]),
    "emojione": ("1.2.3", ["bright cartoon", "bold clip art"]),
    "emojione-v1": ("1.2.3", ["glossy retro", "shiny old"]),
    "emojione-monotone": ("1.2.1", ["black silhouette", "solid black icon"]),
    "fxemoji": ("1.2.2", ["muted flat"]),
    "fluent-emoji": ("1.2.7", ["3d glossy", "3d render"]),
    "fluent-emoji-flat": ("1.2.6", ["pastel flat", "modern minimal"]),
    "fluent-emoji-high-contrast": (
        "1.2.6",
        ["high contrast black and white", "monochrome stencil"],
    ),
}

_SKIN_TONE = re.compile(
    r"(^|-)(skin|tone\d?)(-|$)|-(dark|medium|light|medium-dark|medium-light)$|tone\d"
)
_FLAG = re.compile(r"(^|-)flags?(-|$)|^regional-indicator|flag-for")
_SKIPPED_GROUPS = (None, 2, 9)  # unassigned, skin-tone components, flags
_GLUE = {"of", "the", "with", "and", "in", "on", "a", "an", "at", "to", "for", "no", "not", "s"}


@dataclass
class Drawing:
    """One emoji in one style."""

    style: str
    icon: str  # the icon's own name in its package
    hexcode: str  # Unicode code points, "" when the drawing is not an emoji of the standard
    name: str
    keywords: list[str]  # further words for it, from emojibase
    group: int  # emojibase group, -1 when unknown
    split: str  # "train", "held-out name" or "held-out style"


def words_of(text: str) -> list[str]:
    """Lower-case ASCII words of `text`."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.findall(r"[a-z0-9]+", ascii_text.replace("'", ""))


def content_words(drawing: Drawing) -> set[str]:
    """Words that name `drawing`: of its name and keywords, no glue words, no single letters."""
    words = words_of(drawing.name) + [w for k in drawing.keywords for w in words_of(k)]
    return {w for w in words if w not in _GLUE and len(w) > 1}


def download(folder: Path) -> Path:
    """Install the npm packages into `folder`; returns its `node_modules`."""
    folder.mkdir(parents=True, exist_ok=True)
    modules = folder / "node_modules"
    packages = [f"@iconify-json/{s}@{version}" for s, (version, _) in STYLES.items()] + [EMOJIBASE]
    if not all((modules / p.rsplit("@", 1)[0]).is_dir() for p in packages):
        (folder / "package.json").write_text("{}")
        subprocess.run(
            ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", *packages],
            cwd=folder,
            check=True,
            stdout=sys.stderr,  # stdout belongs to the figures of the tools
        )
    return modules


def _slug(text: str) -> str:
    return "-".join(words_of(text.replace("’", "").replace("'", "").replace("&", " and ")))


def _find_drawings(modules: Path) -> list[tuple[Drawing, str]]:
    """Every usable drawing with its SVG text."""
    emoji = {}
    for entry in json.loads((modules / "emojibase-data/en/data.json").read_text()):
        if entry.get("group") not in _SKIPPED_GROUPS:
            emoji[entry["hexcode"].lower().replace("-fe0f", "")] = entry

    by_name: dict[str, str] = {}
    own_names: dict[str, dict[str, str]] = {}
    for style in STYLES:
        chars = json.loads((modules / f"@iconify-json/{style}/chars.json").read_text())
        own_names[style] = {}
        for code, icon in chars.items():
            code = code.lower().replace("-fe0f", "")
            if code in emoji:
                own_names[style].setdefault(icon, code)
                by_name.setdefault(icon, code)
    for code, entry in emoji.items():
        by_name.setdefault(_slug(entry["label"]), code)
    # fxemoji writes its names without any separator
    joined = {name.replace("-", ""): code for name, code in by_name.items()}
    for file in sorted((modules / "emojibase-data/en/shortcodes").glob("*.json")):
        for code, names in json.loads(file.read_text()).items():
            code = code.lower().replace("-fe0f", "")
            if code in emoji:
                for name in [names] if isinstance(names, str) else names:
                    joined.setdefault("".join(words_of(name)), code)

    found = []
    for style in STYLES:
        icons = json.loads((modules / f"@iconify-json/{style}/icons.json").read_text())
        seen = set()
        for icon, body in icons["icons"].items():
            if _SKIN_TONE.search(icon) or _FLAG.search(icon) or body.get("hidden"):
                continue
            code = (
                own_names[style].get(icon) or by_name.get(icon) or joined.get(icon.replace("-", ""))
            )
            if code in seen or (code is None and style == HELD_OUT_STYLE):
                continue
            if code is None:
                drawing = Drawing(style, icon, "", icon.replace("-", " "), [], -1, "")
            else:
                seen.add(code)
                entry = emoji[code]
                name = " ".join(words_of(entry["label"]))
                tags = [tag for tag in entry.get("tags", []) if words_of(tag)]
                drawing = Drawing(style, icon, code, name, tags, entry["group"], "")
            if not words_of(drawing.name):
                continue
            width = body.get("width", icons.get("width", 16))
            height = body.get("height", icons.get("height", 16))
            left, top = body.get("left", 0), body.get("top", 0)
            svg = (
                '<svg xmlns="http://www.w3.org/2000/svg" '
                'xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{left} {top} {width} {height}">{body["body"]}</svg>'
            )
            found.append((drawing, svg.replace("currentColor", "#000000")))

    shared = set.intersection(
        *({d.hexcode for d, _ in found if d.style == s and d.hexcode} for s in HELD_OUT_NAME_STYLES)
    )
    held_out = set(random.Random(0).sample(sorted(shared), HELD_OUT_NAMES))
    kept = []
    for drawing, svg in found:
        if drawing.style == HELD_OUT_STYLE:
            drawing.split = "held-out style"
        elif drawing.hexcode in held_out and drawing.style in HELD_OUT_NAME_STYLES:
            drawing.split = "held-out name"
        elif drawing.hexcode in held_out and drawing.style == "noto-v1":
            continue
        else:
            drawing.split = "train"
        kept.append((drawing, svg))
    return kept


def render(svg: str, size: int = SIZE) -> np.ndarray:
    """SVG text -> (size, size, 4) uint8 RGBA."""
    import resvg_py
    from PIL import Image

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA").resize((size, size)))


def prepare(folder: Path) -> tuple[list[Drawing], np.ndarray]:
    """Drawings and their RGBA pixels (N, 64, 64, 4) uint8, rendered once and cached in `folder`."""
    index, pixels = folder / "drawings.json", folder / "pixels.npy"
    if index.exists() and pixels.exists():
        return [Drawing(**row) for row in json.loads(index.read_text())], np.load(pixels)
    found = _find_drawings(download(folder))
    with ProcessPoolExecutor() as pool:
        images = np.stack(list(pool.map(render, [svg for _, svg in found], chunksize=64)))
    visible = images[..., 3].max((1, 2)) > 0
    drawings = [d for (d, _), keep in zip(found, visible, strict=True) if keep]
    images = images[visible]
    np.save(pixels, images)
    index.write_text(json.dumps([asdict(d) for d in drawings]))
    return drawings, images


def load_svgs(folder: Path) -> dict[tuple[str, str], str]:
    """(style, icon) -> SVG text, for rendering the examples at a larger size."""
    return {(d.style, d.icon): svg for d, svg in _find_drawings(download(folder))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("build/emoji"))
    rows, _ = prepare(parser.parse_args().folder)
    for style in STYLES:
        for split in ("train", "held-out name", "held-out style"):
            count = sum(d.style == style and d.split == split for d in rows)
            if count:
                print(f"{style:28s} {split:15s} {count:6d}")
    print(f"{len(rows)} drawings")
