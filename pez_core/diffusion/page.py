"""Galleries of prompts and their images as a page and as a picture."""

from __future__ import annotations

import base64
import os
import statistics
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path

from PIL import Image

from ..errors import ArgumentError
from .sheet import draw_sheet

PAGE, SHEET = "index.html", "sheet.png"
_LARGEST = 512  # pixels of the longer side of a target; images that were made stay whole

# Nothing is fetched: images are part of the page, and the policy forbids all else.
_HEAD = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Prompts and their images</title>
<style>
:root { color-scheme: light dark; --back: #fff; --card: #f5f5f7; --text: #1d1d1f;
  --faint: #6a6a70; --line: #d9d9de }
@media (prefers-color-scheme: dark) {
  :root { --back: #151517; --card: #202024; --text: #ececf0; --faint: #a0a0a8; --line: #38383e }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif }
main { max-width: 1200px; margin: 0 auto; padding: 24px 16px 48px }
h1 { font-size: 24px; margin: 0 0 4px }
p, figure { margin: 0; overflow-wrap: anywhere }
.faint, figcaption { color: var(--faint); font-size: 13px }
article { display: grid; grid-template-columns: minmax(140px, 1fr) 4fr; gap: 16px;
  margin-top: 16px; padding: 16px; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px }
@media (max-width: 640px) { article { grid-template-columns: 1fr } }
h2 { font-size: 13px; font-weight: 600; color: var(--faint); margin: 0 0 4px }
.prompt { font-size: 18px; user-select: all }
.text { white-space: pre-wrap }
.images { display: grid; gap: 12px; margin-top: 12px;
  grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)) }
.targets { display: grid; gap: 12px; align-content: start }
.several { grid-template-columns: 1fr 1fr }
img { display: block; width: 100%; height: auto; border-radius: 8px;
  border: 1px solid var(--line) }
</style>
</head>
<body>
<main>
"""


@dataclass(frozen=True)
class Similarities:
    """Cosine similarities with a target, by one CLIP.

    Attributes:
        clip: its name.
        prompt: of the prompt.
        images: of each image made of it.
    """

    clip: str
    prompt: float
    images: list[float]

    @property
    def mean(self) -> float | None:
        """Of the images; None where there are none."""
        return statistics.mean(self.images) if self.images else None


@dataclass(frozen=True)
class Target:
    """What a prompt was learned from.

    Attributes:
        shown: an image, or a text.
        name: of the file, "" where there is none.
    """

    shown: Image.Image | str
    name: str = ""


@dataclass(frozen=True)
class Entry:
    """A prompt and the images made of it.

    Attributes:
        prompt: as it was learned.
        targets: one or several.
        images: in the order of the seeds; empty where the work ended before.
        similarities: by the CLIP of the search and, where there is one, by the judge; the mean over
            the targets.
        title: what kind of prompt it is, "" where there is one kind only.
    """

    prompt: str
    targets: list[Target]
    images: list[Image.Image]
    similarities: list[Similarities]
    title: str = ""


@dataclass(frozen=True)
class Gallery:
    """Prompts, the images made of them, and their similarities with the targets.

    Attributes:
        entries: one per prompt.
        seeds: of the images of each prompt.
        facts: settings, by what they are called on the page.
    """

    entries: list[Entry]
    seeds: list[int]
    facts: Mapping[str, str]

    def save(self, folder: str | Path) -> Path:
        """Write `index.html` and `sheet.png` into a folder, which is made where it is missing.

        The page has its images within it, so that this one file can be passed on. It loads nothing.

        Returns:
            The path of the page.

        Raises:
            ArgumentError: the folder has one of the two files already.
            OSError: the folder cannot be written to.
        """
        folder = Path(folder)
        check_free(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(_page(self))
        # names of files may hold bytes that are no text
        (folder / PAGE).write_bytes(text.encode("utf-8", "backslashreplace"))
        draw_sheet([_row(entry) for entry in self.entries]).save(folder / SHEET)
        return folder / PAGE


def check_free(folder: Path) -> None:
    """Raise where a gallery would overwrite a file."""
    for name in (PAGE, SHEET):
        if (folder / name).exists():
            raise ArgumentError(
                "folder", f"is {str(folder)!r}, which has {name} already", "choose another"
            )
    if os.path.lexists(folder) and not folder.is_dir():
        raise ArgumentError("folder", f"is {str(folder)!r}, which is a file", "choose another")


def scores_line(similarities: Sequence[Similarities]) -> str:
    """The similarities of a prompt in words."""
    parts = []
    for one in similarities:
        images = "" if one.mean is None else f", images {one.mean:.3f}"
        parts.append(f"{Path(one.clip).name}: prompt {one.prompt:.3f}{images}")
    return " · ".join(parts)


def _page(gallery: Gallery) -> Iterator[str]:
    yield _HEAD
    yield "<h1>Prompts and their images</h1>\n"
    facts = " · ".join(f"{name}: {value}" for name, value in gallery.facts.items())
    yield f'<p class="faint">{_text(facts)}</p>\n'
    for entry in gallery.entries:
        yield from _article(entry, gallery.seeds)
    yield (
        '<p class="faint" style="margin-top: 16px">Numbers are cosine similarities with the target '
        "by the named CLIP, at most 1. Those of a prompt and those of images have different "
        "scales. The search optimised the similarity of the prompt.</p>\n"
        "</main>\n</body>\n</html>\n"
    )


def _article(entry: Entry, seeds: Sequence[int]) -> Iterator[str]:
    several = " several" if len(entry.targets) > 1 else ""
    yield f'<article>\n<div class="targets{several}">\n'
    for target in entry.targets:
        yield _target(target)
    yield "</div>\n<div>\n"
    if entry.title:
        yield f"<h2>{_text(entry.title)}</h2>\n"
    yield f'<p class="prompt">{_text(entry.prompt)}</p>\n'
    yield f'<p class="faint">{_text(scores_line(entry.similarities))}</p>\n'
    yield '<div class="images">\n'
    for k, image in enumerate(entry.images):
        scores = " · ".join(f"{one.images[k]:.3f}" for one in entry.similarities)
        yield _figure(image, f"image {k + 1} of {entry.prompt}", f"{scores} · seed {seeds[k]}")
    if not entry.images:
        yield '<p class="faint">No images: the command ended before.</p>\n'
    yield "</div>\n</div>\n</article>\n"


def _target(target: Target) -> str:
    if isinstance(target.shown, str):
        return f'<div><h2>target</h2><p class="text">{_text(target.shown)}</p></div>\n'
    shown = target.shown.copy()
    shown.thumbnail((_LARGEST, _LARGEST))
    name = Path(target.name).name
    return _figure(shown, f"target {name}", f"target {name}")


def _figure(image: Image.Image, alt: str, caption: str) -> str:
    file = BytesIO()
    image.convert("RGB").save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{_text(alt)}" '
        f'width="{image.width}" height="{image.height}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>\n"
    )


def _text(text: str) -> str:
    """A text as HTML. Control characters, which HTML does not have, are left out."""
    return escape("".join(c for c in text if unicodedata.category(c) != "Cc" or c in "\n\t"))


def _row(entry: Entry) -> tuple[list[Image.Image | str], list[Image.Image], str]:
    """What the sheet shows of an entry."""
    title = f"{entry.title}: " if entry.title else ""
    text = f"{title}{entry.prompt}\n{scores_line(entry.similarities)}"
    return [target.shown for target in entry.targets], entry.images, text
