"""Draw the icon and the banner of the pack: words leave a picture as a stack of bricks.

    python tools/draw_icon.py

writes assets/icon.png and assets/banner.png. The drawing is deterministic.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SCALE = 4  # everything is drawn larger and shrunk, for smooth edges

NIGHT = "#17203a"
WHITE = "#fffaf0"
SKY = "#8fd3f4"
SUN = "#ffd23f"
HILL = "#2a9d6f"
FRONT_HILL = "#1f7a57"
BRICKS = ("#ff5d5d", "#ff9f43", "#ffd23f", "#4ecdc4")

Box = tuple[float, float, float, float]


class Canvas:
    """A picture in final pixels, drawn `SCALE` times as large."""

    def __init__(self, width: int, height: int, colour: str | None = None) -> None:
        self.size = width, height
        self.image = Image.new("RGBA", (width * SCALE, height * SCALE), colour or (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.image)

    def box(self, box: Box, radius: float, colour: str) -> None:
        self.draw.rounded_rectangle([v * SCALE for v in box], radius * SCALE, colour)

    def text(self, at: tuple[float, float], text: str, size: float, colour: str) -> None:
        """Text that begins at `at`, the middle of its height."""
        font = ImageFont.load_default(size * SCALE)
        place = [v * SCALE for v in at]
        bold = round(size * SCALE * 0.02)
        self.draw.text(place, text, colour, font, anchor="lm", stroke_width=bold)

    def save(self, path: Path) -> None:
        self.image.resize(self.size, Image.Resampling.LANCZOS).save(path, optimize=True)


def draw_picture(canvas: Canvas, box: Box) -> None:
    """A framed landscape."""
    left, top, right, bottom = box
    rim = (bottom - top) * 0.09
    canvas.box(box, rim * 2, WHITE)
    width, height = round(right - left - 2 * rim), round(bottom - top - 2 * rim)
    inner = Canvas(width, height, SKY)

    def disc(x: float, y: float, radius: float, colour: str) -> None:
        """In heights of the picture; `x` from its middle."""
        x, y, radius = (v * height * SCALE for v in (x, y, radius))
        x += width * SCALE / 2
        inner.draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)

    disc(-0.36, 0.36, 0.19, SUN)
    disc(0.52, 1.2, 0.76, HILL)
    disc(-0.55, 1.36, 0.78, FRONT_HILL)
    mask = Canvas(width, height)
    mask.box((0, 0, width - 1, height - 1), rim, WHITE)
    place = round((left + rim) * SCALE), round((top + rim) * SCALE)
    canvas.image.paste(inner.image, place, mask.image)


def draw_brick(canvas: Canvas, box: Box, colour: str, marks: tuple[float, ...]) -> None:
    """A word as a sweet: `marks` are the lengths of its letters' strokes, of its inner width."""
    left, top, right, bottom = box
    height = bottom - top
    canvas.box(box, height * 0.3, colour)
    start, inside = left + height * 0.36, right - left - height * 0.72
    gap = height * 0.22
    room = inside - gap * (len(marks) - 1)
    for mark in marks:
        end = start + room * mark / sum(marks)
        canvas.box((start, top + height * 0.39, end, bottom - height * 0.39), height * 0.11, NIGHT)
        start = end + gap


def draw_dispenser(canvas: Canvas, x: float, y: float, size: float) -> None:
    """The frame dispenses words: a stack rises out of it, and the topmost is on its way out."""

    def place(left: float, top: float, right: float, bottom: float) -> Box:
        return x + left * size, y + top * size, x + right * size, y + bottom * size

    draw_brick(canvas, place(0.3, 0.0, 0.98, 0.165), BRICKS[0], (3, 2))
    draw_brick(canvas, place(0.16, 0.185, 0.84, 0.35), BRICKS[1], (1, 1))
    draw_brick(canvas, place(0.16, 0.37, 0.84, 0.535), BRICKS[2], (2, 3))
    draw_picture(canvas, place(0.02, 0.5, 0.98, 1.0))


def draw_icon() -> Canvas:
    canvas = Canvas(400, 400)
    canvas.box((0, 0, 399, 399), 84, NIGHT)
    draw_dispenser(canvas, 40, 40, 320)
    return canvas


def draw_banner() -> Canvas:
    canvas = Canvas(1260, 540, NIGHT)
    draw_dispenser(canvas, 90, 84, 372)
    canvas.text((545, 178), "PEZ", 150, WHITE)
    canvas.text((552, 292), "pictures in, prompts out", 46, SKY)
    left = 552
    for k, marks in enumerate(((3, 2), (4,), (2, 4), (3,))):
        width = 52 + 20 * sum(marks)
        draw_brick(canvas, (left, 366, left + width, 426), BRICKS[k], marks)
        left += width + 14
    return canvas


def main(folder: Path = ASSETS) -> None:
    folder.mkdir(exist_ok=True)
    draw_icon().save(folder / "icon.png")
    draw_banner().save(folder / "banner.png")


if __name__ == "__main__":
    main()
