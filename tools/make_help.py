"""Write the tables of the help pages: python tools/make_help.py URL_OF_A_RUNNING_COMFYUI

The texts of inputs and outputs stand in the schemas of the nodes, and their translations in
locales/. The pages in web/docs repeat them as tables; everything else there is written by hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "web/docs"
HEADINGS = {
    "en": {"Inputs": ("Input", "Description"), "Outputs": ("Output", "Description")},
    "zh": {"输入": ("输入", "说明"), "输出": ("输出", "说明")},
}
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
HIDDEN = "kept"  # a widget that nobody sees

Row = tuple[str, str]


def page_path(node: str, language: str) -> Path:
    """The help page of a node; English is what other languages fall back to."""
    return PAGES / f"{node}.md" if language == "en" else PAGES / node / f"{language}.md"


def with_tables(text: str, info: dict[str, Any], texts: dict[str, Any], language: str) -> str:
    """A page with new tables.

    Args:
        text: of the page.
        info: of its node, as in ComfyUI's object_info.
        texts: of the node in this language, as in nodeDefs.json; {} for English.
        language: a key of `HEADINGS`.
    """
    (inputs, input_cells), (outputs, output_cells) = HEADINGS[language].items()
    text = _replaced(text, inputs, _table(input_cells, input_rows(info, texts)))
    return _replaced(text, outputs, _table(output_cells, output_rows(info, texts)))


def input_rows(info: dict[str, Any], texts: dict[str, Any]) -> list[Row]:
    """Name and text of each input, wires first."""
    kinds = [info["input"].get(kind, {}) for kind in ("required", "optional")]
    specs = {name: spec for kind in kinds for name, spec in kind.items() if name != HIDDEN}
    order = sorted(specs, key=lambda name: _is_widget(specs[name][0]))
    return [_row(name, specs[name][1], texts.get("inputs", {}).get(name, {})) for name in order]


def output_rows(info: dict[str, Any], texts: dict[str, Any]) -> list[Row]:
    """Name and text of each output."""
    outputs = zip(info["output_name"], info["output_tooltips"], strict=True)
    return [
        _row(name, {"tooltip": tooltip}, texts.get("outputs", {}).get(str(k), {}))
        for k, (name, tooltip) in enumerate(outputs)
    ]


def _is_widget(kind: Any) -> bool:
    return isinstance(kind, list) or kind in WIDGETS


def _row(name: str, options: dict[str, Any], translated: dict[str, str]) -> Row:
    cell = f"`{name}`" + (f"（{translated['name']}）" if translated else "")
    return cell, translated.get("tooltip") or options["tooltip"]


def _table(head: Row, rows: list[Row]) -> list[str]:
    return [f"| {a} | {b} |" for a, b in (head, ("---", "---"), *rows)]


def _replaced(text: str, heading: str, table: list[str]) -> str:
    """The text with another table under a heading of the second level."""
    return "\n".join(_with_table(text.split("\n"), f"## {heading}", table))


def _with_table(lines: list[str], heading: str, table: list[str]) -> Iterator[str]:
    start = lines.index(heading) + 2
    end = next(k for k in range(start, len(lines)) if not lines[k].startswith("|"))
    yield from (*lines[:start], *table, *lines[end:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server", help="URL of a running ComfyUI that has this pack")
    server = parser.parse_args().server.rstrip("/")
    nodes = requests.get(f"{server}/object_info", timeout=30).json()
    for language in HEADINGS:
        file = ROOT / "locales" / language / "nodeDefs.json"
        texts = json.loads(file.read_text("utf-8")) if file.exists() else {}
        for node in (name for name in nodes if name.startswith("PEZ_")):
            path = page_path(node, language)
            page = with_tables(path.read_text("utf-8"), nodes[node], texts.get(node, {}), language)
            path.write_text(page, "utf-8")


if __name__ == "__main__":
    main()
