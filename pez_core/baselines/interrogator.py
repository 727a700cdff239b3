"""CLIP Interrogator: phrases of a bank, chained greedily behind a caption."""

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
from ..errors import check_integer, check_positive

# Texts encoded at once.
_TEXTS = 256
# Phrases that the chain chooses from.
_PRESELECTED = 2048
# Kinds of phrases that a prompt is made of, in the tool's order.
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
        folder: with artists.txt, flavors.txt, mediums.txt, movements.txt and negative.txt, a phrase
            a line. None: that of the installed package, which is read and not imported.

    Returns:
        Phrases by kind, as they come into prompts: each artist as "by ..." and as "inspired by
        ...". "trendings" are those of trendings.txt or, where there is no such file, those that the
        tool itself makes of the names of 18 sites.

    Raises:
        ValueError: the package is not installed; a file is missing.
    """
    if folder is None:
        package = find_spec("clip_interrogator")
        if package is None:
            raise ValueError(
                "`folder` is None, but the package with the phrases is not installed; run "
                "pip install --no-deps clip-interrogator."
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
            raise ValueError(f"`folder` has to hold {file.name}, but there is no {file}.")
    artists = bank["artists"]
    bank["artists"] = [f"by {a}" for a in artists] + [f"inspired by {a}" for a in artists]
    if "trendings" not in bank:
        ways = ("{}", "trending on {}", "featured on {}", "{} contest winner")
        bank["trendings"] = [way.format(site) for way in ways for site in _SITES]
    return bank


@dataclass
class Interrogation:
    """What the interrogator hands to its callback, and what it returns in the end.

    Attributes:
        prompt: best so far; "" while there is none.
        score: its similarity, the mean over the images.
        step: links of the chain done.
        steps: links that it may have.
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

    Kept: the phrases that are most similar to the image are preselected, 2,048 of them; each link
    of the chain tries all of them behind the prompt, joined by ", ", and appends the best; up to
    `min_flavors` links it does so even if the prompt gets worse, later it ends there, and after
    `max_flavors` links in any case; the best of all prompts on the way counts. The modes "fast"
    (caption and the `max_flavors` nearest phrases) and "classic" (caption, medium, artist,
    trending, movement and flavors), cut at a comma, and "best", the most similar of caption,
    classic, fast and chain.

    Not kept: it captions no image itself. Phrases that would make the prompt too long are not
    tried, where the tool ends the chain at the first and lets the tokenizer cut it. The tool
    preselects in blocks of the bank, at most 37 from each block of 2,048 of its own bank, and
    rounds the features of the bank to fp16; here they are compared exactly. There is no negative
    mode, and "negative" phrases are not used.

    Args:
        clip: what `load_clip` returns.
        bank: phrases by kind, as `load_bank` gives them; prompts leave out kinds that it does not
            have. A plain sequence of phrases is one of flavors.

    Raises:
        ValueError: `bank` has no phrase.
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
            raise ValueError(f"`bank` has to hold phrases of {', '.join(_KINDS)} but has none.")
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
            caption: what prompts begin with, such as what BLIP says; "": the chain begins at the
                best single phrase, as the tool's own does when it has nothing to begin with.
            max_tokens: tokens of the prompt without start and end token, from 1; the PEZ paper's 8
                and 77 are 8 and 75 here. None: as many as the context has room for.
            min_flavors, max_flavors: links of the chain, see above. `max_flavors` None: 32, but 3
                flavors in the mode "classic".
            mode: "best", "fast", "classic" or "chain".
            callback: called after each link of the chain; a true return value ends it.
            time_limit: seconds after which the link at hand is the last, above 0; None: no limit.

        Returns:
            The prompt and its score.

        Raises:
            ValueError: an option is out of its range; `caption` is longer than `max_tokens`;
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
            check_positive("time_limit", time_limit)
        if mode not in _MODES:
            raise ValueError(f"`mode` has to be one of {', '.join(_MODES)} but is {mode!r}.")
        if self._count(caption) > max_tokens:
            raise ValueError(
                f"`caption` has {self._count(caption)} tokens, but `max_tokens` is {max_tokens}; "
                "shorten it or raise `max_tokens`."
            )
        if not caption and int(self._tokens.min()) > max_tokens:
            raise ValueError(
                f"`max_tokens` is {max_tokens}, but the shortest phrase has "
                f"{int(self._tokens.min())} tokens; raise it or give a `caption`."
            )

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
        """Joined by commas up to the first part between commas that is too much."""
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
        """The most similar phrases, the best first, that are short enough to stand alone."""
        few = slice(None) if kind is None else self._of_kind[kind]
        phrases, fits = self._phrases[few], self._tokens[few] <= max_tokens
        similarities = (self._features[few] @ target).cpu().masked_fill(~fits, -torch.inf)
        top = similarities.topk(min(count, int(fits.sum()))).indices
        return [phrases[k] for k in top.tolist()]

    def _best(self, target: torch.Tensor, texts: Sequence[str]) -> tuple[str, float]:
        """The text that is most similar, and its similarity."""
        score, place = (self._encode(texts) @ target).max(dim=0)
        return texts[int(place)], float(score)

    def _encode(self, texts: Sequence[str]) -> torch.Tensor:
        chunks = [texts[k : k + _TEXTS] for k in range(0, len(texts), _TEXTS)]
        return torch.cat([self.clip.encode_texts(chunk) for chunk in chunks])

    def _count(self, text: str) -> int:
        return len(self.clip.text.words.encode(text))
