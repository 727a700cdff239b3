"""Training images of `emoji-clip`: drawings, moved, tinted and put on backgrounds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from emoji_data import SIZE, Drawing, words_of

BACKGROUNDS = {
    "white": (255, 255, 255),
    "red": (214, 40, 40),
    "orange": (247, 148, 29),
    "yellow": (250, 220, 60),
    "green": (60, 160, 70),
    "blue": (40, 90, 200),
    "sky blue": (140, 205, 245),
    "purple": (130, 60, 160),
    "pink": (250, 170, 200),
    "brown": (130, 90, 60),
    "gray": (150, 150, 150),
    "black": (20, 20, 20),
}
BLACK_STYLES = {"emojione-monotone", "fluent-emoji-high-contrast"}
PAIRS, TWICE = 0.12, 0.25  # share of views with two drawings; of these with the same one twice
WHITE = 0.6  # share of views on white, which is what pictures are put on outside training
_CHUNK = 256


@dataclass(frozen=True)
class View:
    """The content of one training image.

    Attributes:
        shown: one drawing, or two side by side from left to right.
        flip: it is mirrored.
        background: a name in `BACKGROUNDS`.
    """

    shown: tuple[int, ...]
    flip: bool
    background: str


def draw_view(
    drawings: Sequence[Drawing], i: int, index: Sequence[int], rng: random.Random
) -> View:
    """A view of drawing `i`, at times with another one of `index` beside it."""
    shown = (i,)
    if rng.random() < PAIRS:
        other = i if rng.random() < TWICE else rng.choice(index)
        shown = (i, other) if rng.random() < 0.5 else (other, i)
    sided = any({"left", "right"} & set(_words(drawings[k])) for k in shown)
    flip = len(shown) == 1 and not sided and rng.random() < 0.5
    background = "white" if rng.random() < WHITE else rng.choice(list(BACKGROUNDS))
    if background == "black" and {drawings[k].style for k in shown} & BLACK_STYLES:
        background = "yellow"
    return View(shown, flip, background)


def _words(drawing: Drawing) -> list[str]:
    return [w for text in (drawing.name, *drawing.keywords) for w in words_of(text)]


def composite(rgba: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """(N, 4, H, W) in [0, 1] over (N, 3) colours -> model input (N, 3, H, W) in [-1, 1]."""
    alpha = rgba[:, 3:]
    return (rgba[:, :3] * alpha + colours[:, :, None, None] * (1 - alpha)) * 2 - 1


class Images:
    """Model inputs from the rendered drawings."""

    def __init__(self, pixels: np.ndarray, generator: torch.Generator) -> None:
        self.pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        self.generator = generator

    def _uniform(self, n: int, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, generator=self.generator)

    def _shown(self, views: Sequence[View]) -> torch.Tensor:
        """(N, 4, SIZE, SIZE) premultiplied, so that resampling keeps edges clean."""
        first = self.pixels[[v.shown[0] for v in views]].float() / 255
        first[:, :3] *= first[:, 3:]
        for k, view in enumerate(views):
            if len(view.shown) == 2:
                second = self.pixels[view.shown[1]].float() / 255
                second[:3] *= second[3:]
                both = torch.stack([first[k], second])
                halves = F.interpolate(both, scale_factor=0.5, mode="area")
                first[k] = 0
                first[k, :, SIZE // 4 : 3 * SIZE // 4] = torch.cat([*halves], dim=-1)
        return first

    def _placements(self, views: Sequence[View]) -> torch.Tensor:
        """(N, 2, 3) for `affine_grid`: turned, scaled, stretched, shifted, some mirrored."""
        n = len(views)
        angle, scale = self._uniform(n, -0.2, 0.2), self._uniform(n, 0.88, 1.3)
        mirror = torch.tensor([-1.0 if v.flip else 1.0 for v in views])
        stretch = self._uniform(n, 0.88, 1.14)
        theta = torch.zeros(n, 2, 3)
        theta[:, 0, 0], theta[:, 0, 1] = mirror * scale * angle.cos(), -scale * angle.sin()
        theta[:, 1, 0], theta[:, 1, 1] = mirror * scale * angle.sin(), scale * angle.cos() * stretch
        for axis in (0, 1):
            theta[:, axis, 2] = self._uniform(n, -0.12, 0.12)
        return theta

    def augmented(self, views: Sequence[View]) -> torch.Tensor:
        """(N, 3, SIZE, SIZE) of what the views show."""
        n = len(views)
        grid = F.affine_grid(self._placements(views), (n, 4, SIZE, SIZE), align_corners=False)
        rgba = F.grid_sample(self._shown(views), grid, align_corners=False)
        rgb, alpha = rgba[:, :3], rgba[:, 3:]
        # little, so that the colours keep their names
        gain = 1 + 0.06 * torch.randn(n, 3, 1, 1, generator=self.generator)
        rgb = (rgb * gain).clamp(max=1)
        colours = torch.tensor([BACKGROUNDS[v.background] for v in views]) / 255
        colours = (colours + 0.04 * torch.randn(n, 3, generator=self.generator)).clamp(0, 1)
        x = rgb + colours[:, :, None, None] * (1 - alpha)
        return (x * 2 - 1).contiguous(memory_format=torch.channels_last)

    def plain(self, index: Sequence[int]) -> torch.Tensor:
        """(N, 3, SIZE, SIZE) of whole drawings on white."""
        return composite(self.pixels[list(index)].float() / 255, torch.ones(len(index), 3))


def cached_round(
    number: int,
    folder: Path,
    drawings: Sequence[Drawing],
    pixels: np.ndarray,
    trunk: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[list[View], np.ndarray]:
    """A view of each training drawing, and its activations in the frozen part of the image tower.

    Written to `folder` once and read from there afterwards.

    Returns:
        The views, and an array in half precision with one row each.
    """
    text, array = folder / f"views-{number}.json", folder / f"views-{number}.npy"
    if not text.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rng = random.Random(1000 + number)
        images = Images(pixels, torch.Generator().manual_seed(1000 + number))
        index = [i for i, d in enumerate(drawings) if d.split == "train"]
        views = [draw_view(drawings, i, index, rng) for i in index]
        parts = [views[k : k + _CHUNK] for k in range(0, len(views), _CHUNK)]
        with torch.no_grad():
            rows = [trunk(images.augmented(part)).half().numpy() for part in parts]
        np.save(array, np.concatenate(rows))
        text.write_text(json.dumps([asdict(view) for view in views]))
    found = [View(**row | {"shown": tuple(row["shown"])}) for row in json.loads(text.read_text())]
    return found, np.load(array)
