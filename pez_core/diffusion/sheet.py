"""A contact sheet: targets, prompts and images in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

CELL, GAP, MARGIN = 176, 8, 16
_LINE, _SIZE = 20, 15
_COLUMNS = 6  # images side by side; more go into further lines
_LARGEST_ROW = 4  # targets of one prompt that are shown
_BACK, _TEXT, _FRAME = "white", "#1d1d1f", "#d9d9de"

Row: TypeAlias = tuple[Sequence[Image.Image | str], Sequence[Image.Image], str]
"""Targets, images made of a prompt, and the text below them."""


def draw_sheet(rows: Sequence[Row]) -> Image.Image:
    """Draw one row below the other.

    The font has Latin letters only; other characters of a prompt are boxes.
    """
    columns = max(min(max((len(images) for _, images, _ in rows), default=1), _COLUMNS), 2)
    width = 2 * MARGIN + CELL + 2 * GAP + columns * (CELL + GAP)
    font = ImageFont.load_default(_SIZE)
    parts = [_draw_row(row, width, columns, font) for row in rows]
    sheet = Image.new("RGB", (width, MARGIN + sum(part.height for part in parts)), _BACK)
    top = MARGIN
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    return sheet


def _draw_row(
    row: Row, width: int, columns: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> Image.Image:
    targets, images, text = row
    lines = [part for line in text.split("\n") for part in _wrap(line, width - 2 * MARGIN, font)]
    cells = max(-(-len(images) // columns), 1)
    top = cells * (CELL + GAP)
    picture = Image.new("RGB", (width, top + len(lines) * _LINE + MARGIN), _BACK)
    _paste_targets(picture, targets, font)
    left = MARGIN + CELL + 2 * GAP
    for k, image in enumerate(images):
        line, column = divmod(k, columns)
        place = left + column * (CELL + GAP), line * (CELL + GAP)
        _paste(picture, image, place, CELL)
    draw = ImageDraw.Draw(picture)
    for k, line in enumerate(lines):
        draw.text((MARGIN, top + k * _LINE), line, _TEXT, font)
    return picture


def _paste_targets(
    picture: Image.Image,
    targets: Sequence[Image.Image | str],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """One target in a cell, or up to four in quarters of it."""
    shown = targets[:_LARGEST_ROW]
    side = CELL if len(shown) == 1 else (CELL - GAP) // 2
    draw = ImageDraw.Draw(picture)
    for k, target in enumerate(shown):
        line, column = divmod(k, 2)
        x, y = MARGIN + column * (side + GAP), line * (side + GAP)
        if isinstance(target, str):
            for n, part in enumerate(_wrap(target, side, font)[: side // _LINE]):
                draw.text((x, y + n * _LINE), part, _TEXT, font)
        else:
            _paste(picture, target, (x, y), side)


def _paste(picture: Image.Image, image: Image.Image, place: tuple[int, int], side: int) -> None:
    """An image in a square, whole and in its own shape, with a frame."""
    scale = side / max(image.size)
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    x = place[0] + (side - size[0]) // 2
    y = place[1] + (side - size[1]) // 2
    picture.paste(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), (x, y))
    frame = (x, y, x + size[0] - 1, y + size[1] - 1)
    ImageDraw.Draw(picture).rectangle(frame, outline=_FRAME)


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Lines of a text that are no wider; a word that is wider is cut."""
    lines = [""]
    for word in text.split():
        while font.getlength(word) > width:
            cut = next(n for n in range(len(word), 0, -1) if font.getlength(word[:n]) <= width)
            lines += [word[:cut]]
            word = word[cut:]
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return [line for line in lines if line] or [""]
