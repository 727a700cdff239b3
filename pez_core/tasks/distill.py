"""Shorter prompts with the same features."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, overload

import torch

from ..errors import ArgumentError, ArgumentTypeError, check_number, check_string, check_type
from ..options import SearchOptions, with_share_of_time
from ..problem import PromptTarget
from ..prompt_text import SYNTAX, Piece, chunks, pieces, read, sections, separators
from ..results import ReportCallback, Result
from ..runner import learn
from ..targets import check_callback, check_clip, check_text
from .jobs import in_turn, one_by_one

if TYPE_CHECKING:
    from ..clip import AnyClip


@dataclass(frozen=True)
class DistillResult(Result):
    """A shorter prompt.

    Attributes:
        tokens_before: tokens of the words that CLIP reads in the given prompt, without weights and
            tags.
        tokens_after: those of this prompt.
    """

    tokens_before: int = 0
    tokens_after: int = 0

    @property
    def tokens_saved(self) -> int:
        """`tokens_before` less `tokens_after`."""
        return self.tokens_before - self.tokens_after


@overload
def distill(  # pyright: ignore[reportOverlappingOverload] - a string is a sequence, too
    clip: AnyClip,
    prompt: str,
    options: SearchOptions = SearchOptions(),
    *,
    ratio: float = 0.3,
    callback: ReportCallback | None = None,
) -> DistillResult: ...


@overload
def distill(
    clip: AnyClip,
    prompt: Sequence[str],
    options: SearchOptions = SearchOptions(),
    *,
    ratio: float = 0.3,
    callback: ReportCallback | None = None,
) -> list[DistillResult]: ...


def distill(
    clip: AnyClip,
    prompt: str | Sequence[str],
    options: SearchOptions = SearchOptions(),
    *,
    ratio: float = 0.3,
    callback: ReportCallback | None = None,
) -> DistillResult | list[DistillResult]:
    """Find a shorter prompt with similar features (paper, section 4.5).

    A text longer than the context is encoded in chunks as in ComfyUI; its feature is the mean over
    the chunks, weighted by their tokens.

    Syntax stays unchanged, at about the same place among the words: weights such as `(word:1.2)`,
    `embedding:name`, tags like `<lora:name:0.8>` and all else that `pez_core.prompt_text` names.
    Only the plain text around it is shortened. The sections between `BREAK`s and `AND`s are
    shortened one by one and joined again.

    Args:
        clip, callback: as in `invert`.
        prompt: the text to shorten, or a list of texts, which are shortened one after the other.
        options: see `SearchOptions`. `options.prompt_len` is the number of tokens to learn for each
            section and replaces `ratio`. For a list of texts `time_limit` is that of all together,
            and `seed` may be a list with one for each.
        ratio: tokens to learn for each token of the plain text, above 0, at most 1 (the paper has
            0.7, 0.5, 0.3 and 0.1). With 0.3 a text of 50 tokens gets 15, at least 1.

    Returns:
        A `DistillResult`, with the token counts `tokens_before` and `tokens_after`; for a list of
        texts a list with one for each. After a callback has ended the search, the list has the
        texts that were begun, and misses the others.

        `similarity` compares the words of the new prompt with those of the given one, words in
        weights included and tags left out. With several sections it is their mean, weighted by
        tokens. A section that has no more tokens than wanted stays unchanged; one whose learned and
        kept words do not fit the context together gets fewer learned ones. The `note` mentions
        both.

    Raises:
        ArgumentError: the prompt holds no words, or is the name of an image file, or an argument is
            out of range or of the wrong type.
        FloatingPointError: a score or gradient became NaN or infinite.
        JobError: a text failed after others were done; its `partial` has their results.
    """
    check_clip("clip", clip)
    check_callback(callback)
    check_type("options", options, SearchOptions)
    check_number("ratio", ratio, 0, 1, above=True)

    def prepare(text: str) -> _Text:
        return _Text(clip, text)

    def search(text: _Text, own: SearchOptions, report: ReportCallback | None) -> DistillResult:
        return _distill(clip, text, own, ratio, report)

    if isinstance(prompt, str):
        return search(prepare(prompt), options, callback)
    if not isinstance(prompt, Sequence):
        raise ArgumentTypeError("prompt", f"has to be a string or a list but is {prompt!r}")
    for text in prompt:
        check_string("prompt", text)
    return one_by_one("prompt", prompt, options, callback, prepare, search)


def check_prompt(clip: AnyClip, prompt: str) -> None:
    """Raise unless `distill` can shorten a text."""
    _Text(clip, prompt)


class _Text:
    """A prompt to shorten, and its sections."""

    def __init__(self, clip: AnyClip, prompt: str) -> None:
        check_text("prompt", prompt, "for a prompt of an image use `invert`")
        self.prompt, self.between = prompt, separators(prompt)
        self.parts = [_Section(clip, one, "AND" in self.between) for one in sections(prompt)]
        spoken = any(map(str.isalnum, read(prompt))) or any(part.plain for part in self.parts)
        if not spoken or not any(part.ids for part in self.parts):
            raise ArgumentError("prompt", "holds no words to distill", "give a text")


def _distill(
    clip: AnyClip,
    text: _Text,
    options: SearchOptions,
    ratio: float,
    callback: ReportCallback | None,
) -> DistillResult:
    parts = text.parts
    if any(part.kept for part in parts):
        options = replace(options, vocabulary=options.vocabulary_without(SYNTAX))
    lengths = [part.learned_length(ratio, options.prompt_len) for part in parts]
    searched = [k for k, length in enumerate(lengths) if length is not None]
    in_place = any(part.kept for part in parts) and _can_be_parted(clip, options)
    results: list[Result] = []
    stopped: list[bool] = []
    began = time.monotonic()
    with torch.inference_mode(False):
        one = torch.ones(1, device=clip.device)
        for turn, k in enumerate(searched):
            if any(stopped):
                break
            target = PromptTarget(parts[k].feature(clip)[None], one, one < 0)
            length = lengths[k] or 1
            results += learn(
                clip,
                [target],
                with_share_of_time(options, 1 / (len(searched) - turn), began),
                length,
                callback and in_turn(callback, turn, len(searched), stopped, began),
                **parts[k].fixed(length, in_place),
            )
    found = dict(zip(searched, results, strict=False))
    return _distilled(clip, text, found, ratio, options.prompt_len)


def _can_be_parted(clip: AnyClip, options: SearchOptions) -> bool:
    """Whether syntax may stand between any two learned tokens: not within a phrase of several."""
    if options.extra_loss is not None:
        return False
    return all(len(phrase) == 1 for phrase in options.allowed.lexicon(clip).phrases)


class _Section:
    """The text between two `BREAK`s or `AND`s."""

    def __init__(self, clip: AnyClip, section: str, weighted: bool) -> None:
        self.printed = section
        parts = pieces(section, weighted)
        encode, encode_behind = clip.text.words.encode, clip.text.words.encode_behind
        first = next((k for k, piece in enumerate(parts) if piece.read), 0)
        groups = [
            encode_behind(f" {piece.read}") if k > first else encode(piece.read)
            for k, piece in enumerate(parts)
        ]
        self.kept = any(piece.kept for piece in parts)
        self._parts = list(zip(parts, map(len, groups), strict=True))
        self.plain = sum(len(g) for g, p in zip(groups, parts, strict=True) if not p.kept)
        self.ids = [token for group in groups for token in group]
        self.room = clip.text.max_prompt_len - (len(self.ids) - self.plain)
        self._chunks = chunks(groups, clip.text.max_prompt_len)

    def wanted(self, ratio: float, prompt_len: int | None) -> int:
        return prompt_len or max(1, round(ratio * self.plain))

    def learned_length(self, ratio: float, prompt_len: int | None) -> int | None:
        """Tokens to learn, or None where the section is not changed."""
        wanted = min(self.wanted(ratio, prompt_len), self.room)
        return None if wanted >= self.plain or self.room < 1 else wanted

    def fixed(self, length: int, in_place: bool) -> dict[str, Any]:
        """The arguments of `learn` for the syntax around and among `length` learned tokens.

        Each piece of syntax stands behind the same share of the words as in the given prompt;
        behind all words, where it must not stand among them.
        """
        at: dict[int, list[Piece]] = {}
        seen = 0
        for piece, tokens in self._parts:
            if not piece.kept:
                seen += tokens
                continue
            place = round(length * seen / self.plain)
            at.setdefault(place if in_place or place == 0 else length, []).append(piece)

        def joined(pieces_: Sequence[Piece], name: str) -> str:
            return " ".join(filter(None, (getattr(piece, name) for piece in pieces_)))

        first, last = at.pop(0, []), at.pop(length, [])
        around = {
            argument: (f"{joined(first, name)} ".lstrip(), f" {joined(last, name)}".rstrip())
            for argument, name in (("caption", "printed"), ("encoded", "read"))
        }
        inserts = [(k, joined(at[k], "printed"), joined(at[k], "read")) for k in sorted(at)]
        return {**around, "inserts": inserts}

    def feature(self, clip: AnyClip) -> torch.Tensor:
        """(features,) of all its words, chunk by chunk."""
        return clip.encode_chunks(self._chunks)

    def note(self, ratio: float, prompt_len: int | None, reached: bool, where: str) -> str:
        """A remark on a section that does not have the length of the options, "" where it has."""
        wanted = self.wanted(ratio, prompt_len)
        if wanted >= self.plain and self.plain <= self.room:
            return f"{where} is short enough already and is unchanged."
        if not reached and self.room > 0:
            return f"{where} was not reached and is unchanged."
        if self.room < 1:
            return f"{where} keeps its weighted words, which fill a context."
        if wanted > self.room:
            return (
                f"{where} was shortened further, to the size of one context: {self.room} learned "
                f"tokens, not {wanted}."
            )
        return ""


def _distilled(
    clip: AnyClip,
    text: _Text,
    results: dict[int, Result],
    ratio: float,
    prompt_len: int | None,
) -> DistillResult:
    """One result of those of the sections; sections without one stay as they are."""
    parts = text.parts
    before = sum(len(part.ids) for part in parts)
    shares = [len(part.ids) / before for part in parts]
    worded = next(part for part in parts if part.ids)
    names = clip.split(worded.feature(clip)) if not results else results[min(results)].encoders

    def mean(value: Callable[[Result], float]) -> float:
        return sum(
            share * (value(results[k]) if k in results else 1.0) for k, share in enumerate(shares)
        )

    def where(k: int) -> str:
        return f"Section {k + 1}" if len(parts) > 1 else "The prompt"

    notes = [p.note(ratio, prompt_len, k in results, where(k)) for k, p in enumerate(parts)]
    notes += dict.fromkeys(result.note for result in results.values())
    only = results[0] if len(parts) == 1 and results else None
    ids = [
        i for k, p in enumerate(parts) for i in (results[k].token_ids if k in results else p.ids)
    ]
    printed = [results[k].prompt if k in results else p.printed for k, p in enumerate(parts)]
    similarity = mean(lambda result: result.similarity)
    return DistillResult(
        prompt=_rejoined(printed, text.between) if results else text.prompt,
        similarity=similarity,
        token_ids=ids,
        learned=" ".join(result.learned for result in results.values()),
        similarities=[similarity],
        avoided=[],
        encoders={name: mean(lambda result, name=name: result.encoders[name]) for name in names},
        candidates=only.candidates if only else [],
        history=only.history if only else [],
        seconds=sum(result.seconds for result in results.values()),
        tower_flops=sum(result.tower_flops for result in results.values()),
        note=" ".join(filter(None, notes)),
        extra_loss=only.extra_loss if only else None,
        perplexity=only.perplexity if only else None,
        loop_similarity=only.loop_similarity if only else None,
        trajectory=only.trajectory if only else None,
        tokens_before=before,
        tokens_after=len(ids),
    )


def _rejoined(printed: Sequence[str], between: Sequence[str]) -> str:
    """The sections and what stood between them."""
    parts = [printed[0]]
    for separator, section in zip(between, printed[1:], strict=True):
        parts += [separator, section]
    return " ".join(filter(None, parts))
