"""Similarity of prompts with images, the contribution of each word, and pruning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from .clip.images import ImageInput, load_images
from .errors import ArgumentError, ArgumentTypeError, check_number
from .prompt_text import all_pieces, contexts, read
from .targets import Target, as_list, check_clip, check_text, encode_targets

if TYPE_CHECKING:
    from .clip import AnyClip


@dataclass(frozen=True)
class Scores:
    """Similarities of prompts with images.

    Attributes:
        similarity: (prompts, images) cosines.
        encoders: the same by the name of each encoder.
        judge: (prompts, images) by a held-out CLIP; None: there was none.
    """

    similarity: torch.Tensor
    encoders: dict[str, torch.Tensor] = field(repr=False)
    judge: torch.Tensor | None = None


def score(
    clip: AnyClip,
    prompts: str | Sequence[str],
    images: ImageInput | Sequence[ImageInput] | torch.Tensor,
    judge: AnyClip | None = None,
    fit: str = "crop",
) -> Scores:
    """How similar prompts and images are.

    A search overfits its own CLIP: the similarity that it reports is optimistic for other models. A
    held-out CLIP, on which nothing was learned, gives an unbiased one.

    Args:
        clip: from `load_clip`.
        prompts: one text or several, read as ComfyUI does: those longer than the context in chunks,
            and without weights and tags.
        images: one picture or several, as in `invert`, but no features.
        judge: a held-out CLIP: the prompts were not learned on it. None: there is none.
        fit: how images become squares, as in `SearchOptions`.

    Returns:
        `Scores`. `similarity` is a (prompts, images) tensor of cosines, `judge` the same by the
        held-out CLIP, or None.

    Raises:
        ArgumentError: no prompt, an empty prompt, no image, an image that cannot be read, or an
            argument of the wrong type.
        FloatingPointError: a similarity is NaN or infinite.
    """
    check_clip("clip", clip)
    if judge is not None:
        check_clip("judge", judge)
    if not isinstance(prompts, Iterable):
        raise ArgumentTypeError("prompts", f"has to be a string or a list but is {prompts!r}")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise ArgumentError("prompts", "is empty", "give at least one prompt")
    for text in texts:
        if not isinstance(text, str):
            raise ArgumentTypeError("prompts", f"has to hold strings but holds {text!r}")
        check_text("prompts", text, "give the file as one of the `images`")
    pictures, _ = load_images(images)

    def pairs(one: AnyClip) -> tuple[torch.Tensor, torch.Tensor]:
        return encode_targets("prompts", one, texts), one.encode_images(pictures, fit)

    with torch.inference_mode(False):
        a, b = pairs(clip)
        similarity = check_finite(a @ b.T, clip)
        parts_a, parts_b = clip.split(a), clip.split(b)
        encoders = {name: parts_a[name] @ parts_b[name].T for name in parts_a}
        other = None
        if judge is not None:
            c, d = pairs(judge)
            other = check_finite(c @ d.T, judge)
        return Scores(similarity, encoders, other)


def check_finite(values: torch.Tensor, clip: AnyClip) -> torch.Tensor:
    """The similarities that a CLIP has computed.

    Raises:
        FloatingPointError: one of them is NaN or infinite.
    """
    if not values.isfinite().all():
        remedy = "load it with dtype=torch.float32"
        if all(one.dtype == torch.float32 for one in getattr(clip, "clips", [clip])):
            remedy = "its weights are damaged, load others"
        raise FloatingPointError(f"similarities by {clip.name} are NaN or infinite; {remedy}.")
    return values


@dataclass(frozen=True)
class WordContribution:
    """The contribution of one word of a prompt.

    Attributes:
        word: with its punctuation.
        contribution: similarity lost when the word is dropped; below 0 where it does harm.
    """

    word: str
    contribution: float


def explain(
    clip: AnyClip, prompt: str, target: Target | Sequence[Target], fit: str = "crop"
) -> list[WordContribution]:
    """The contribution of each word of a prompt to its similarity with a target.

    Words are dropped one at a time, so that of two synonyms both have a low contribution. A weight
    like `(two words:1.2)` counts as one word. Tags like `<lora:name:0.8>` contribute nothing.

    Args:
        clip: from `load_clip`.
        prompt: words separated by spaces, read as in `score`.
        target: a text, an image, or a list of these, whose mean similarity counts. A string is
            always a text; an image is a path object such as `Path("cat.png")`, a PIL image, or an
            array or tensor as in `invert`.
        fit: how images become squares, as in `SearchOptions`.

    Returns:
        A list with a `WordContribution` for each word, in the order of the prompt. `contribution`
        is the similarity that is lost without the word, below 0 where the word does harm.

    Raises:
        ArgumentError: an empty prompt, a target that cannot be read, or an argument of the wrong
            type.
        FloatingPointError: a similarity is NaN or infinite.
    """
    check_clip("clip", clip)
    split(prompt)
    with torch.inference_mode(False):
        return contributions(clip, prompt, _mean_feature(clip, target, fit))


def contributions(clip: AnyClip, prompt: str, feature: torch.Tensor) -> list[WordContribution]:
    """`explain` by the dot product with a (features,) target."""
    words = [word for word, _ in split(prompt)]
    with torch.inference_mode(False):
        whole, *without = towards(clip, [words, *_one_dropped(words)], feature)
    return [WordContribution(w, whole - s) for w, s in zip(words, without, strict=True)]


@dataclass(frozen=True)
class Pruned:
    """A prompt after pruning.

    Attributes:
        prompt: the remaining words.
        similarity: its similarity with the target.
        similarity_before: that of the whole prompt.
        dropped: the removed words, in the order of their removal.
    """

    prompt: str
    similarity: float
    similarity_before: float
    dropped: list[str]


def prune(
    clip: AnyClip,
    prompt: str,
    target: Target | Sequence[Target],
    max_loss: float = 0.0,
    fit: str = "crop",
) -> Pruned:
    """Drop words of a prompt that contribute little or nothing to its similarity with a target.

    Words are dropped one at a time, each time the one without which the similarity is highest,
    until more than `max_loss` would be lost. At least one word is left. Tags like `<lora:name:0.8>`
    and `BREAK` stay; weights like `(two words:1.2)` stay or go whole.

    Args:
        clip: from `load_clip`.
        prompt: words separated by spaces, read as in `score`.
        target: a text, an image, or a list of these, whose mean similarity counts. A string is
            always a text; an image is a path object such as `Path("cat.png")`, a PIL image, or an
            array or tensor as in `invert`.
        max_loss: how far the cosine similarity may fall in total, compared with the whole prompt; 0
            or more. At 0 the pruned prompt is at least as similar as the whole.
        fit: how images become squares, as in `SearchOptions`.

    Returns:
        `Pruned`, with the remaining text `prompt`, its `similarity`, the `similarity_before` and
        the list `dropped` of the words that went.

    Raises:
        ArgumentError: an empty prompt, a target that cannot be read, `max_loss` below 0, or an
            argument of the wrong type.
        FloatingPointError: a similarity is NaN or infinite.
    """
    check_clip("clip", clip)
    max_loss = check_number("max_loss", max_loss)
    split(prompt)
    with torch.inference_mode(False):
        return prune_towards(clip, prompt, _mean_feature(clip, target, fit), max_loss)


def prune_towards(
    clip: AnyClip, prompt: str, feature: torch.Tensor, max_loss: float = 0.0
) -> Pruned:
    """`prune` by the dot product with a (features,) target."""
    words, dropped = split(prompt), []
    with torch.inference_mode(False):
        (before,) = towards(clip, [[word for word, _ in words]], feature)
        now = before
        while sum(is_read for _, is_read in words) > 1:
            # a tag changes nothing here, but the image
            places = [k for k, (_, is_read) in enumerate(words) if is_read]
            left = _one_dropped([word for word, _ in words])
            rest = towards(clip, [left[k] for k in places], feature)
            best = max(range(len(rest)), key=rest.__getitem__)
            if rest[best] < before - max_loss:
                break
            now = rest[best]
            dropped.append(words.pop(places[best])[0])
    return Pruned(" ".join(word for word, _ in words), now, before, dropped)


def split(prompt: str, name: str = "prompt") -> list[tuple[str, bool]]:
    """The words of a prompt, and its syntax, each with whether a text encoder reads of it.

    Args:
        prompt: words separated by spaces.
        name: of the argument that it was given as, for errors.
    """
    if not isinstance(prompt, str):
        raise ArgumentTypeError(name, f"has to be a string but is {prompt!r}")
    if not prompt.split():
        raise ArgumentError(name, "is empty", "give at least one word")
    check_text(name, prompt, "give a text, and the file as the `target`")
    words = [
        (word, piece.read != "")
        for piece in all_pieces(prompt)
        for word in ([piece.printed] if piece.kept else piece.printed.split())
    ]
    if not any(is_read for _, is_read in words):
        raise ArgumentError(name, "holds only tags, no words", "give at least one word")
    return words


def _one_dropped(words: list[str]) -> list[list[str]]:
    return [words[:k] + words[k + 1 :] for k in range(len(words))]


def _mean_feature(clip: AnyClip, target: Target | Sequence[Target], fit: str) -> torch.Tensor:
    return encode_targets("target", clip, as_list(target), fit).mean(0)


def towards(clip: AnyClip, texts: list[list[str]], feature: torch.Tensor) -> list[float]:
    """Dot products of texts, given as lists of words, with a (features,) target."""
    prompts = [" ".join(words) for words in texts]
    plain = [read(prompt) for prompt in prompts]
    if max(len(clip.text.words.encode(text)) for text in plain) <= clip.text.max_prompt_len:
        features = clip.encode_texts(plain)
    else:
        words, size = clip.text.words, clip.text.max_prompt_len
        parts = [contexts(words.encode, words.encode_behind, one, size) for one in prompts]
        features = clip.encode_texts([""]).repeat(len(prompts), 1)
        read_ones = [k for k, one in enumerate(parts) if one]
        features[read_ones] = clip.encode_long_texts([parts[k] for k in read_ones])
    return check_finite(features @ feature, clip).tolist()
