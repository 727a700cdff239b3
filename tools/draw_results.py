"""Draw the README's picture from `benchmarks/results/examples.json`: images and their prompts.

    python tools/draw_results.py

Takes the first four examples of every style in the order of the table, hits and misses alike.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parent.parent
PICTURE, GAP, WIDTH, LINE = 120, 20, 420, 22
PER_STYLE, COLUMNS = 4, 2


def wrapped(words: list[str], font, width: float) -> list[list[str]]:
    lines: list[list[str]] = [[]]
    for word in words:
        if lines[-1] and font.getlength(" ".join([*lines[-1], word])) > width:
            lines.append([])
        lines[-1].append(word)
    return lines


def first_of_each_style(rows: list[dict]) -> list[dict]:
    index = map(json.loads, (ROOT / "examples/index.jsonl").open())
    styles = {row["file"]: row["style"] for row in index}
    shown, counts = [], Counter()
    for row in rows:
        style = styles[row["file"]]
        counts[style] += 1
        if counts[style] <= PER_STYLE:
            shown.append(row)
    return shown


def main(out: Path = ROOT / "benchmarks/results/examples.png") -> None:
    rows = json.loads((ROOT / "benchmarks/results/examples.json").read_text())
    shown = first_of_each_style(rows)
    font, small = ImageFont.load_default(17), ImageFont.load_default(14)
    height = PICTURE + GAP
    sheet = Image.new(
        "RGB",
        (COLUMNS * (PICTURE + WIDTH + 2 * GAP), -(-len(shown) // COLUMNS) * height + GAP),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for k, row in enumerate(shown):
        x = GAP + (k % COLUMNS) * (PICTURE + WIDTH + 2 * GAP)
        y = GAP + (k // COLUMNS) * height
        image = Image.open(ROOT / "examples" / row["file"]).resize((PICTURE, PICTURE))
        sheet.paste(image, (x, y))
        text_x = x + PICTURE + GAP
        note = f"{row['similarity']:.2f}    (drawn as: {row['name']})"
        draw.text((text_x, y), note, fill=(110, 110, 110), font=small)
        for n, words in enumerate(wrapped(row["prompt"].split(), font, WIDTH)):
            at = text_x
            for word in words:
                true = word in row["hits"]
                colour = (180, 30, 30) if true else (25, 25, 25)
                draw.text((at, y + 24 + n * LINE), word, fill=colour, font=font)
                at += font.getlength(word + " ")
    sheet.save(out, optimize=True)


if __name__ == "__main__":
    main()
