"""Draw the thumbnails of the example workflows: their pictures and the words learned from them.

The one of the workflow with the bundled image model also has images that this model makes of the
words.

    python tools/draw_thumbnails.py ["A first look" ...]

Runs the search of each workflow with its own settings and the bundled CLIP. ComfyUI shows the
thumbnails small, so that the words are in big letters.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from pez_core import Clip, Result, SearchOptions, distill, fuse, invert, load_clip, style

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = ROOT / "example_workflows"
DRAWINGS = ROOT / "web/examples"

WIDTH, HEIGHT = 800, 600
MARGIN, GAP, ARROW = 36, 14, 52
MADE = 2  # images of the words
NIGHT, PAPER, QUIET = "#17203a", "#fffaf0", "#9aa5c4"
COLOURS = ("#ff5d5d", "#ff9f43", "#ffd23f", "#4ecdc4", "#8fd3f4")


def learned(clip: Clip, nodes: Sequence[dict[str, Any]]) -> tuple[list[Path], str, Result]:
    """Pictures and text that a workflow starts from, and its result."""
    images = [DRAWINGS / n["widgets_values"][0] for n in nodes if n["type"] == "LoadImage"]
    texts = [n["widgets_values"][0] for n in nodes if n["type"] == "PrimitiveStringMultiline"]
    kinds = {node["type"]: node["widgets_values"] for node in nodes}
    if values := kinds.get("PEZ_DistillPrompt"):
        return [], values[0], distill(clip, values[0], ratio=values[1])
    if "PEZ_ExtractStyle" in kinds:
        return images, "", style(clip, images)
    if "PEZ_ConcatPrompts" in kinds:
        return images, "", fuse(clip, images)
    (caption,) = texts or [""]
    options = SearchOptions(prompt_len=kinds["PEZ_ImageToPrompt"][0])
    (result,) = invert(clip, images, options, caption=caption)
    return images, caption, result


def images_of(result: Result, nodes: Sequence[dict[str, Any]]) -> list[Image.Image]:
    """Images by the bundled image model, if a workflow has it."""
    if not any(node["type"] == "PEZ_EmojiModel" for node in nodes):
        return []
    from pez_core.diffusion import load_pipeline
    from pez_core.diffusion.image_models import default_settings, draw

    pipeline = load_pipeline("emoji-diffusion", "cpu")
    pipeline.set_progress_bar_config(disable=True)
    return draw(pipeline, result.prompt, range(MADE), default_settings(pipeline))


def thumbnail(
    images: Sequence[Path], text: str, result: Result, made: Sequence[Image.Image] = ()
) -> Image.Image:
    """Pictures above, or the text where there are none; the learned words below.

    Args:
        images: that the words were learned from.
        text: the same, or a caption.
        result: the learned words.
        made: images of them, shown behind an arrow.
    """
    sheet = Image.new("RGB", (WIDTH, HEIGHT), NIGHT)
    pen = ImageDraw.Draw(sheet)
    top = MARGIN
    if images:
        pictures = [Image.open(path).convert("RGB") for path in images] + [*made]
        room = WIDTH - 2 * MARGIN - (len(pictures) - 1) * GAP - ARROW * bool(made)
        size = min(250, room // len(pictures))
        left = MARGIN + (room - len(pictures) * size) // 2
        for k, picture in enumerate(pictures):
            if k == len(images):
                draw_arrow(pen, left, top + size // 2)
                left += ARROW
            pen.rounded_rectangle((left, top, left + size, top + size), 22, PAPER)
            sheet.paste(picture.resize((size - 28, size - 28)), (left + 14, top + 14))
            left += size + GAP
        top += size
    else:
        font = ImageFont.load_default(22)
        for line in wrapped(text.split(), font, WIDTH - 2 * MARGIN, 0):
            pen.text((MARGIN, top), " ".join(line), QUIET, font)
            top += 29
    draw_words(pen, result.prompt.split(), text.split() if images else [], top + 24)
    return sheet


def draw_arrow(pen: ImageDraw.ImageDraw, x: int, y: int) -> None:
    """An arrow to the right, in a gap of `ARROW` pixels that begins at x."""
    tip, head = x + ARROW - GAP, 14
    pen.line((x, y, tip - head, y), QUIET, 8)
    pen.polygon([(tip - head, y - head), (tip, y), (tip - head, y + head)], QUIET)


def draw_words(pen: ImageDraw.ImageDraw, words: list[str], fixed: list[str], top: int) -> None:
    """Words as coloured bricks, as large as the room below `top` allows; fixed ones are plain."""
    for size in range(64, 20, -2):
        font = ImageFont.load_default(size)
        lines = wrapped(words, font, WIDTH - 2 * MARGIN, size)
        step = round(size * 1.6)
        if top + len(lines) * step <= HEIGHT - MARGIN // 2:
            break
    y = top + (HEIGHT - MARGIN // 2 - top - len(lines) * step) // 2
    k = 0
    for line in lines:
        widths = [font.getlength(word) + size for word in line]
        x = (WIDTH - sum(widths) - GAP * (len(line) - 1)) / 2
        for word, width in zip(line, widths, strict=True):
            plain = k < len(fixed)
            if not plain:
                brick = (x, y, x + width, y + step - 10)
                pen.rounded_rectangle(brick, size // 3, COLOURS[k % len(COLOURS)])
            colour = PAPER if plain else NIGHT
            middle = x + width / 2, y + (step - 10) / 2
            pen.text(middle, word, colour, font, anchor="mm", stroke_width=1)
            x, k = x + width + GAP, k + 1
        y += step


def wrapped(words: list[str], font: Any, width: float, pad: int) -> list[list[str]]:
    """Words in lines; each takes `pad` pixels more than its letters, and a gap where it has any."""
    between = GAP if pad else font.getlength(" ")
    lines, used = [[]], 0.0
    for word in words:
        room = font.getlength(word) + pad + between
        if lines[-1] and used + room - between > width:
            lines.append([])
            used = 0.0
        lines[-1].append(word)
        used += room
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="of workflows; default: all")
    names = parser.parse_args().names
    clip = load_clip("emoji-clip")
    for path in sorted(WORKFLOWS.glob("*.json")):
        if names and path.stem not in names:
            continue
        nodes = json.loads(path.read_text("utf-8"))["nodes"]
        images, text, result = learned(clip, nodes)
        sheet = thumbnail(images, text, result, images_of(result, nodes))
        sheet.save(path.with_suffix(".jpg"), quality=85)


if __name__ == "__main__":
    main()
