"""One prompt of several prompts and images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, overload

import torch

from ..errors import ArgumentError, check_bool, check_integer, check_type, check_weights
from ..options import SearchOptions
from ..problem import PromptTarget
from ..prompt_text import SYNTAX, read, tags
from ..results import ReportCallback, Result
from ..runner import learn
from ..scoring import check_finite
from ..targets import Target, as_list, check_callback, check_clip, check_text, encode_targets
from .jobs import one_by_one

if TYPE_CHECKING:
    from ..clip import AnyClip

PROMPT_LEN = 16
"""Tokens to learn if `prompt_len` is None, at most `max_tokens`."""


@dataclass(frozen=True)
class FuseResult(Result):
    """One prompt of several sources.

    Attributes:
        fused: it was learned towards all sources; False: it is their plain join.
        tokens: of the prompt.
    """

    fused: bool = field(default=False, kw_only=True)

    @property
    def tokens(self) -> int:
        """The number of tokens of the prompt."""
        return len(self.token_ids)


@overload
def fuse(
    clip: AnyClip,
    sources: Sequence[Target],
    options: SearchOptions = SearchOptions(),
    *,
    weights: Sequence[float] | None = None,
    max_tokens: int | None = None,
    always_learn: bool = False,
    callback: ReportCallback | None = None,
) -> FuseResult: ...


@overload
def fuse(
    clip: AnyClip,
    sources: Sequence[Sequence[Target]],
    options: SearchOptions = SearchOptions(),
    *,
    weights: Sequence[float] | None = None,
    max_tokens: int | None = None,
    always_learn: bool = False,
    callback: ReportCallback | None = None,
) -> list[FuseResult]: ...


def fuse(
    clip: AnyClip,
    sources: Sequence[Target] | Sequence[Sequence[Target]],
    options: SearchOptions = SearchOptions(),
    *,
    weights: Sequence[float] | None = None,
    max_tokens: int | None = None,
    always_learn: bool = False,
    callback: ReportCallback | None = None,
) -> FuseResult | list[FuseResult]:
    """Join several texts and images into one prompt (paper, section 4.4).

    Texts that are short enough together are joined with spaces, as they are. Otherwise, and where
    there is an image, one prompt is learned by the weighted mean of its similarities with all
    sources.

    Args:
        clip, callback: as in `invert`.
        sources: a list of two or more texts and images. A string is always a text; images are path
            objects such as `Path("cat.png")`, PIL images, and arrays or tensors as in `invert`. A
            list of such lists is a list of jobs with one result each.

            A join keeps the texts with all their syntax. Where a prompt is learned, weights such as
            `(word:1.2)` are dropped and their words read like others; `embedding:name` and tags
            like `<lora:name:0.8>` are put behind the learned words. Neither these tags nor weights
            count as tokens.
        options: see `SearchOptions`. By default 16 tokens are learned, or `max_tokens` where that
            is less; `options.prompt_len` must not be above `max_tokens`. For a list of jobs
            `time_limit` is that of all together, and `seed` may be a list with one for each.
        weights: one number above 0 for each source, for how much it counts; for a list of jobs
            every job takes the same ones. They do not change a join. None: all sources count the
            same.
        max_tokens: largest number of tokens of a join, from 1 to the size of the context. Where the
            join has more, one prompt is learned instead, with a `note`. None: the size of the
            context (75 for CLIP).
        always_learn: True: learn one prompt even where the join is short enough.

    Returns:
        A `FuseResult`, whose `similarities` has one similarity per source, in their order, and
        whose `fused` is True where the prompt was learned. For a list of jobs it is a list with one
        for each; after a callback has ended the search it has the jobs that were begun, and misses
        the others.

    Raises:
        ArgumentError: there are fewer than two sources, a text is empty or the name of an image
            file, an image cannot be read, or an argument is out of range or of the wrong type.
        FloatingPointError: a score or gradient became NaN or infinite.
        JobError: a job failed after others were done; its `partial` has their results.
    """
    check_clip("clip", clip)
    check_callback(callback)
    check_type("options", options, SearchOptions)
    several = isinstance(sources, (list, tuple)) and any(
        isinstance(job, (list, tuple)) for job in sources
    )

    def prepare(job: Any) -> _Sources:
        return _prepared(clip, job, options, weights, max_tokens, always_learn)

    def search(job: _Sources, own: SearchOptions, report: ReportCallback | None) -> FuseResult:
        return _fuse(clip, job, own, report)

    if several:
        return one_by_one("sources", sources, options, callback, prepare, search)
    return search(prepare(sources), options, callback)


@dataclass(frozen=True)
class _Sources:
    """The sources of one job, read and encoded.

    Attributes:
        texts: those that are texts, as given.
        join: the tokens of the join of all sources; None: one has to be learned.
        features: (sources, features) unit vectors.
        shares: the weight of each, summing to 1.
        longest: tokens that a join may have.
    """

    texts: list[str]
    join: list[int] | None
    features: torch.Tensor
    shares: list[float]
    longest: int


def _prepared(
    clip: AnyClip,
    sources: Sequence[Target],
    options: SearchOptions,
    weights: Sequence[float] | None,
    max_tokens: int | None,
    always_learn: bool,
) -> _Sources:
    given = as_list(sources)
    if len(given) < 2:
        raise ArgumentError("sources", f"has to hold at least two but holds {len(given)}")
    longest = clip.text.max_prompt_len if max_tokens is None else max_tokens
    check_integer("max_tokens", longest, 1, clip.text.max_prompt_len)
    check_bool("always_learn", always_learn)
    shares = (
        [1.0] * len(given) if weights is None else check_weights("weights", weights, len(given))
    )
    shares = [share / sum(shares) for share in shares]
    texts = [check_text("sources", s.strip()) for s in given if isinstance(s, str)]
    with torch.inference_mode(False):
        features = encode_targets("sources", clip, given, options.fit)
    ids = clip.text.words.encode(read(" ".join(texts)))  # as it is printed
    could_join = not always_learn and len(texts) == len(given)
    is_learned = not could_join or len(ids) > longest
    if is_learned and (options.prompt_len or 0) > longest:
        raise ArgumentError(
            "prompt_len", f"is {options.prompt_len}, more than `max_tokens` {longest}", "lower it"
        )
    return _Sources(texts, ids if could_join else None, features, shares, longest)


def _fuse(
    clip: AnyClip, job: _Sources, options: SearchOptions, callback: ReportCallback | None
) -> FuseResult:
    with torch.inference_mode(False):
        if job.join is not None and len(job.join) <= job.longest:
            return _joined(clip, job, job.join)
        result = _learned(clip, options, job, callback)
    if job.join is None:
        return FuseResult(**vars(result), fused=True)
    note = (
        f"The join has {len(job.join)} tokens, more than max_tokens {job.longest}; one prompt was "
        "learned instead."
    )
    return FuseResult(**vars(replace(result, note=f"{note} {result.note}".strip())), fused=True)


def _joined(clip: AnyClip, job: _Sources, ids: list[int]) -> FuseResult:
    """The plain join of texts, scored."""
    feature, shares = clip.encode_chunks([ids]), job.features.new_tensor(job.shares)
    parts, targets = clip.split(feature), clip.split(job.features)
    similarities = check_finite(job.features @ feature, clip).tolist()
    return FuseResult(
        prompt=" ".join(job.texts),
        similarity=sum(s * w for s, w in zip(similarities, job.shares, strict=True)),
        token_ids=ids,
        learned="",
        similarities=similarities,
        avoided=[],
        encoders={name: float(targets[name] @ parts[name] @ shares) for name in parts},
        candidates=[],
        history=[],
        seconds=0.0,
    )


def _learned(
    clip: AnyClip, options: SearchOptions, job: _Sources, callback: ReportCallback | None
) -> Result:
    """One prompt towards all features, with the tags of the texts behind it."""
    features = job.features
    prompt_len = options.prompt_len or min(PROMPT_LEN, job.longest)
    kept = " ".join(filter(None, map(tags, job.texts)))
    if kept:
        options = replace(options, vocabulary=options.vocabulary_without(SYNTAX))
    none = features.new_zeros(len(features)).bool()
    target = PromptTarget(features, features.new_tensor(job.shares), none)
    caption = f"{{}} {kept}".strip()
    (result,) = learn(clip, [target], options, prompt_len, callback, caption=caption, encoded="{}")
    return result
