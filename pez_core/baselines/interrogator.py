"""CLIP Interrogator: phrases from lists, chained greedily behind a caption."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from ..clip import AnyClip
from ..errors import ArgumentError, check_choice, check_integer, check_number

# Texts encoded at once.
_TEXTS = 256
# Phrases from which the chain chooses.
_PRESELECTED = 2048
# Kinds of phrases in a prompt, in the order of the original tool.
_KINDS = ("artists", "flavors", "mediums", "movements", "trendings")
_MODES = ("best", "fast", "classic", "chain")
_SITES = [
    "Artstation", "behance", "cg society", "cgsociety", "deviantart", "dribbble", "flickr",
    "instagram", "pexels", "pinterest", "pixabay", "pixiv", "polycount", "reddit",
    "shutterstock", "tumblr", "unsplash", "zbrush central",
]  # fmt: skip


def load_bank(folder: str | Path | None = None) -> dict[str, list[str]]:
    """The phrases of CLIP Interrogator 0.6, or others in files of the same names.

    Args:
        folder: with artists.txt, flavors.txt, mediums.txt, movements.txt and negative.txt, one
            phrase per line. None: the folder of the installed package, which is not imported.

    Returns:
        Phrases by kind, in their form in prompts: each artist as "by ..." and as "inspired by ...".
        "trendings" come from trendings.txt or, without such a file, from the names of 18 sites, as
        in the original tool.

    Raises:
        ArgumentError: the package is not installed, or a file is missing.
    """
    if folder is None:
        package = find_spec("clip_interrogator")
        if package is None or package.submodule_search_locations is None:
            raise ArgumentError(
                "folder",
                "is None, but the package with the phrases is not installed",
                "run pip install --no-deps clip-interrogator",
            )
        folder = Path(package.submodule_search_locations[0]) / "data"
    folder = Path(folder)

    bank = {}
    for kind in ("artists", "flavors", "mediums", "movements", "negative", "trendings"):
        file = folder / f"{kind}.txt"
        if file.exists():
            lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
            bank[kind] = [line.strip() for line in lines if line.strip()]
        elif kind != "trendings":
            raise ArgumentError("folder", f"has to hold {file.name}, but there is no {file}")
    artists = bank["artists"]
    bank["artists"] = [f"by {a}" for a in artists] + [f"inspired by {a}" for a in artists]
    if "trendings" not in bank:
        ways = ("{}", "trending on {}", "featured on {}", "{} contest winner")
        bank["trendings"] = [way.format(site) for way in ways for site in _SITES]
    return bank


@dataclass
class Interrogation:
    """The state of an interrogation, for its callback and as its result.

    Attributes:
        prompt: the best so far; "" while there is none.
        score: its similarity, the mean over the images.
        step: links of the chain done.
        steps: links at most.
        elapsed: seconds since the interrogation began.
        history: one `(step, score)` per report.
        stopped: the callback ended the chain early.
    """

    prompt: str
    score: float
    step: int
    steps: int
    elapsed: float = 0.0
    history: list[tuple[int, float]] = field(default_factory=list)
    stopped: bool = False


class Interrogator:
    """CLIP Interrogator 0.6 (pharmapsychotic, clip_interrogator.py) on any CLIP.

    As in the tool, the 2,048 phrases most similar to the image are preselected. Each link of the
    chain compares all of them behind the prompt, joined by ", ", and appends the best. The first
    `min_flavors` links are appended even if the prompt gets worse; later the chain ends there, and
    after `max_flavors` links in any case. The result is the best of all prompts on the way. Other
    modes are "fast" (caption and the `max_flavors` nearest phrases) and "classic" (caption, medium,
    artist, trending, movement and flavors), cut at a comma, and "best", the most similar of
    caption, classic, fast and chain.

    Unlike the tool, it does not caption images. Phrases that would make the prompt too long are
    skipped, where the tool ends the chain at the first of them and lets the tokenizer cut it. The
    tool preselects in blocks, at most 37 phrases from each block of 2,048, and rounds the features
    of the phrases to fp16; here they are compared exactly. There is no negative mode, and
    "negative" phrases are not used.

    Args:
        clip: from `load_clip`.
        bank: phrases by kind, as from `load_bank`; prompts leave out missing kinds. A plain
            sequence of phrases counts as flavors.

    Raises:
        ArgumentError: `bank` has no phrase.
    """

    def __init__(self, clip: AnyClip, bank: Mapping[str, Sequence[str]] | Sequence[str]) -> None:
        if not isinstance(bank, Mapping):
            bank = {"flavors": bank}
        self.clip = clip
        self._phrases: list[str] = []
        self._of_kind: dict[str, slice] = {}
        for kind in _KINDS:
            start = len(self._phrases)
            self._phrases += bank.get(kind, ())
            self._of_kind[kind] = slice(start, len(self._phrases))
        if not self._phrases:
            raise ArgumentError("bank", f"has to hold phrases of {', '.join(_KINDS)} but has none")
        self._features = self._encode(self._phrases)
        self._tokens = torch.tensor([self._count(phrase) for phrase in self._phrases])

    def interrogate(
        self,
        images: Sequence[Image.Image] | torch.Tensor,
        caption: str = "",
        max_tokens: int | None = None,
        min_flavors: int = 8,
        max_flavors: int | None = None,
        mode: str = "best",
        callback: Callable[[Interrogation], bool | None] | None = None,
        time_limit: float | None = None,
    ) -> Interrogation:
        """One prompt for one or more images.

        Args:
            images: RGB pictures, or (n, features) their features.
            caption: the beginning of prompts, such as a caption from BLIP; "": the chain begins
                with the best single phrase, as in the tool.
            max_tokens: tokens of the prompt without start and end token, from 1; the PEZ paper's 8
                and 77 are 8 and 75 here. None: as many as the context holds.
            min_flavors, max_flavors: links of the chain, see above. `max_flavors` None: 32, but 3
                flavors in the mode "classic".
            mode: "best", "fast", "classic" or "chain".
            callback: called after each link of the chain; a true return value ends it.
            time_limit: the link that is compared when these seconds are over is the last; above 0.
                None: no limit.

        Returns:
            The prompt and its score.

        Raises:
            ArgumentError: an option is out of range, `caption` is longer than `max_tokens`, or
                there is no caption and no phrase is short enough.
        """
        room = self.clip.text.max_prompt_len
        max_tokens = room if max_tokens is None else max_tokens
        if max_flavors is None:
            max_flavors = 3 if mode == "classic" else 32
        check_integer("max_tokens", max_tokens, 1, room)
        check_integer("min_flavors", min_flavors, 0)
        check_integer("max_flavors", max_flavors, 1)
        if time_limit is not None:
            check_number("time_limit", time_limit, above=True)
        check_choice("mode", mode, _MODES)
        self._check_length(caption, max_tokens)

        began = time.monotonic()
        done = Interrogation("", -torch.inf, 0, max_flavors)

        def report(prompt: str, score: float) -> bool:
            done.step += 1
            done.prompt, done.score = prompt, score
            done.elapsed = time.monotonic() - began
            done.history.append((done.step, score))
            done.stopped = callback is not None and bool(callback(done))
            return done.stopped or (time_limit is not None and done.elapsed >= time_limit)

        if not isinstance(images, torch.Tensor):
            images = self.clip.encode_images(images)
        target = F.normalize(images.to(self.clip.device).float(), dim=-1).mean(dim=0)
        prompts = []
        if mode in ("best", "chain"):
            chain = self._chain(target, caption, max_tokens, min_flavors, done, report)
            prompts += [caption, chain]
        if mode in ("best", "fast"):
            prompts.append(self._fast(target, caption, max_tokens, max_flavors))
        if mode in ("best", "classic"):
            prompts.append(self._classic(target, caption, max_tokens, max_flavors))
        done.prompt, done.score = self._best(target, [prompt for prompt in prompts if prompt])
        done.elapsed = time.monotonic() - began
        return done

    def _check_length(self, caption: str, max_tokens: int) -> None:
        """Raise where no prompt has at most `max_tokens` tokens."""
        if self._count(caption) > max_tokens:
            raise ArgumentError(
                "caption",
                f"has {self._count(caption)} tokens, but `max_tokens` is {max_tokens}",
                "shorten it or raise `max_tokens`",
            )
        if not caption and int(self._tokens.min()) > max_tokens:
            raise ArgumentError(
                "max_tokens",
                f"is {max_tokens}, but the shortest phrase has {int(self._tokens.min())} tokens",
                "raise it or give a `caption`",
            )

    def _chain(
        self,
        target: torch.Tensor,
        caption: str,
        max_tokens: int,
        min_flavors: int,
        done: Interrogation,
        report: Callable[[str, float], bool],
    ) -> str:
        phrases = list(dict.fromkeys(self._nearest(target, _PRESELECTED, max_tokens)))
        prompt, score = self._best(target, [caption or phrases.pop(0)])
        best, best_score = prompt, score
        for link in range(done.steps):
            longer = [(f"{prompt}, {phrase}", phrase) for phrase in phrases]
            longer = {text: phrase for text, phrase in longer if self._count(text) <= max_tokens}
            if not longer:
                break
            found, value = self._best(target, list(longer))
            better = value > score
            if value > best_score:
                best, best_score = found, value
            if report(best, best_score) or not (better or link < min_flavors):
                break
            prompt, score = found, value
            phrases.remove(longer[found])
        return best

    def _fast(self, target: torch.Tensor, caption: str, max_tokens: int, count: int) -> str:
        return self._cut([caption, *self._nearest(target, count, max_tokens)], max_tokens)

    def _classic(self, target: torch.Tensor, caption: str, max_tokens: int, count: int) -> str:
        medium, artist, trending, movement = (
            "".join(self._nearest(target, 1, max_tokens, kind))
            for kind in ("mediums", "artists", "trendings", "movements")
        )
        begins = medium and caption.startswith(medium)
        first = [f"{caption} {artist}"] if begins else [caption, f"{medium} {artist}"]
        flavors = self._nearest(target, count, max_tokens, "flavors")
        parts = [part.strip() for part in [*first, trending, movement, *flavors]]
        return self._cut(parts, max_tokens)

    def _cut(self, parts: Sequence[str], max_tokens: int) -> str:
        """The parts joined by commas, up to the first that makes the prompt too long."""
        prompt = ""
        for part in ", ".join(filter(None, parts)).split(", "):
            longer = f"{prompt}, {part}" if prompt else part
            if self._count(longer) <= max_tokens:
                prompt = longer
            elif prompt:
                break
        return prompt

    def _nearest(
        self, target: torch.Tensor, count: int, max_tokens: int, kind: str | None = None
    ) -> list[str]:
        """The most similar phrases of at most `max_tokens` tokens, best first."""
        few = slice(None) if kind is None else self._of_kind[kind]
        phrases, fits = self._phrases[few], self._tokens[few] <= max_tokens
        similarities = (self._features[few] @ target).cpu().masked_fill(~fits, -torch.inf)
        top = similarities.topk(min(count, int(fits.sum()))).indices
        return [phrases[k] for k in top.tolist()]

    def _best(self, target: torch.Tensor, texts: Sequence[str]) -> tuple[str, float]:
        """The most similar text, and its similarity."""
        score, place = (self._encode(texts) @ target).max(dim=0)
        return texts[int(place)], float(score)

    def _encode(self, texts: Sequence[str]) -> torch.Tensor:
        chunks = [texts[k : k + _TEXTS] for k in range(0, len(texts), _TEXTS)]
        return torch.cat([self.clip.encode_texts(chunk) for chunk in chunks])

    def _count(self, text: str) -> int:
        return len(self.clip.text.words.encode(text))
