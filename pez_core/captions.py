"""Captions of other models, made fit for a prompt."""

from __future__ import annotations

import re
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from .articles import article_of
from .continuation import OPEN_WORDS, behind
from .errors import ArgumentError, check_integer, check_string
from .options import SearchOptions
from .prompt_text import SLOT, all_pieces, kept_spans, read

if TYPE_CHECKING:
    import torch

    from .caption import Caption
    from .clip import AnyClip
    from .clip.images import ImageInput

# --- all in one


def prepare_caption(
    clip: AnyClip,
    text: str,
    options: SearchOptions = SearchOptions(),
    prune_for: ImageInput | Sequence[ImageInput] | torch.Tensor | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[str, str]:
    """The text of a captioner as the `caption` of `invert`: `clean_caption` to `fit_caption`.

    The learned words go where the text has `{}`, else behind it: after a space where they continue
    a sentence, which is so with the wording "sentence" and behind a word such as "of"; else, and
    behind a list of tags, after a comma. `caption_wording` tells a list of tags from a sentence.

    Args:
        clip: from `load_clip`.
        text: of any captioner, with or without `{}`.
        options: of the search, whose `wording`, `prompt_len`, `fit` and `time_limit` count.
        prune_for: drop the words that lower the similarity with these images, as `prune_caption`
            does; None: keep all. It takes half of the time limit at most.
        stop: called before each round of this; a true value keeps the other words.

    Returns:
        The caption, "" where nothing is left of the text, and a remark for the user, which names
        the words that were pruned or cut, or says that nothing is left; "" where neither happened.

    Raises:
        ArgumentError: an image cannot be read, the text has `{}` twice, or not even the text behind
            `{}` fits.
        FloatingPointError: a similarity is NaN or infinite.
    """
    from .caption import check_caption
    from .tasks.invert import PROMPT_LEN

    check_caption(text)
    caption, remark = clean_caption(text), ""
    if prune_for is not None and read(caption.replace(SLOT, "")):
        caption, remark = pruned(clip, caption, prune_for, options.fit, in_time(options, stop))
        caption = clean_caption(caption)
    if not _DESCRIBES.search(caption.replace(SLOT, "")):
        given = text.replace(SLOT, "").strip(" \t\n,;.")
        return "", _NOTHING if given else ""
    placed = caption if SLOT in caption else caption + behind(caption, options.wording) + SLOT
    fitting, cut = fit_caption(clip, placed, options.prompt_len or PROMPT_LEN)
    return fitting, f"{remark} {cut}".strip()


def in_time(options: SearchOptions, stop: Callable[[], bool]) -> Callable[[], bool]:
    """`stop`, which is also true when half of the time limit is over, counted from this call."""
    limit, began = options.time_limit, time.monotonic()
    return lambda: stop() or (limit is not None and time.monotonic() - began > limit / 2)


_NOTHING = "The caption holds no description, so the prompt has none."
# a letter or number, or a sign such as an emoji
_DESCRIBES = re.compile(r"[^\W_]|[^\x00-\x7f]")


def text_of_caption(caption: str) -> str:
    """A caption without the place of the learned words at its end."""
    return caption.removesuffix(SLOT).rstrip(" ,")


def check_captioner(captioner: str | None, prune_caption: bool, **others: object) -> None:
    """Raise where a captioner, or its switch, does not go with the other arguments.

    Args:
        captioner: name of the model; None: there is none.
        prune_caption: drop words of its caption, or of that of the user.
        others: the values of arguments in `_EXCLUDED` that the front end has.
    """
    if captioner is None:
        if prune_caption and not others.get("caption"):
            raise ArgumentError(
                "prune_caption", "requires `captioner` or `caption`", "add one of them"
            )
        if prune_caption and others.get("negative_prompt"):
            raise ArgumentError(
                "prune_caption",
                "keeps words that are similar to the images, which a negative prompt must not be",
                "leave `prune_caption` or `negative_prompt` out",
            )
        return
    for name, value in others.items():
        if value:
            raise ArgumentError(
                "captioner",
                f"cannot be combined with `{name}`: {_EXCLUDED[name]}",
                "leave one of the two out",
            )


_EXCLUDED = {
    "caption": "the captioner writes it",
    "captions": "the captioner writes them",
    "shared": "each image has a caption of its own",
    "negative_prompt": "it would begin with a description of the image",
}

# --- clean

# What models write for themselves. Names of embeddings like `<cat-toy>` are none of these.
_THOUGHT = re.compile(r"<(think|thinking)>.*?</\1>", re.DOTALL)
# the instruction may have opened it, and the longest text may end before it is closed
_THOUGHT_BEFORE = re.compile(r"\A.*</(?:think|thinking)>", re.DOTALL)
_THOUGHT_BEHIND = re.compile(r"<(?:think|thinking)>.*\Z", re.DOTALL)
_SPECIAL = re.compile(
    r"<[|｜][^<>|｜]{1,40}[|｜]>|<0x[0-9A-F]{2}>|<loc_\d+>|</?[A-Z][A-Z_]+>"
    r"|</?(?:s|p|b|i|em|strong|pad|unk|bos|eos|mask|cls|sep|image|caption|answer|(?:start|end)_of_\w+)>"
    r"|<br ?/?>|\[/?(?:INST|CLS|SEP|PAD|UNK|MASK|BOS|EOS)\]"
)
# BLIP writes "arafed" without any meaning
_MEANINGLESS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\ufeff]|\baraff?e[de]?\b")
_FENCE = re.compile(r"^[ \t]*```[\w-]*[ \t]*$", re.MULTILINE)
_STARS = re.compile(r"(\*{1,3})(?![\s*])([^*\n]+)(?<!\s)\1")
_HEADING = re.compile(r"[ \t]*#{1,6}[ \t]+")
_BULLET = re.compile(r"[ \t]*(?:[-*•+>]|\d{1,2}[.)])[ \t]+(?=\S)")
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»"}

_ABOUT = r"(?:caption|description|prompt|summary|answer|response|tags?|keywords?|alt[ -]text)s?"
_KIND = r"(?:the|an?|your|image|photo|picture|short|long|brief|detailed|descriptive|final)"
_LABEL = rf"(?:{_KIND}\s+){{0,4}}{_ABOUT}"
_IMAGE = (
    r"(?:image|picture|scene|photo|photograph|illustration|painting|drawing|artwork|screenshot"
    r"|sketch|portrait|render|rendering)"
)
_SHOWS = (
    r"(?:shows|depicts|features|displays|portrays|captures|presents|illustrates|showcases|contains"
    r"|is (?:showing|depicting|featuring|of)|(?:appears|seems) to (?:show|depict|feature))"
)
_ADVERB = r"(?:(?:clearly|vividly|primarily|prominently|mainly|beautifully)\s+)?"
_SEE = r"(?:(?:we|you|I|one)\s+(?:can\s+)?(?:clearly\s+)?see|there(?:\s+is|\s+are|['’]s))"
# Openings that describe nothing, with what follows of them; tried in this order.
_CHATTER = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?:sure(?: thing)?|certainly|of course|absolutely|okay|ok|great|gladly)\s*[!,.:]+\s+",
        r"I(?:['’]d| would) be (?:happy|glad) to [^.!:\n]{0,80}[.!:]\s+",
        rf"(?:based on [^,\n]{{1,60}},\s*)?(?:here(?:['’]s|\s+is|\s+are)|this\s+is|below\s+is)\s"
        rf"[^.,:\n]{{0,60}}?{_ABOUT}\b[^.:\n]{{0,80}}:\s+",
        rf"{_LABEL}\s*:\s+",
        rf"{_LABEL}[ \t]*\n\s*",
        rf"(?:the|this)\s+{_IMAGE}\s+(?:is|appears to be|seems to be)\s+(?=(?:an?|the)\s)",
        r"(?:this|it)(?:\s+is|['’]s)\s+(?=(?:an?|the)\s)",
        rf"it\s+{_ADVERB}{_SHOWS}\s+",
        rf"in\s+(?:the|this)\s+{_IMAGE}(?:\s*,)?\s+{_SEE}\s+",
        rf"in\s+(?:the|this)\s+{_IMAGE}\s*,\s*",
        rf"{_SEE}\s+(?=\S)",
    )
]
# "This old photo shows a dog" -> "an old photo of a dog", "The image shows a dog" -> "a dog"
_SHOWN = re.compile(
    rf"(?:the|this)\s+(?P<kind>(?:(?!{_SHOWS})[\w-]+\s+){{0,4}}?{_IMAGE})\s+{_ADVERB}{_SHOWS}\s+(?=\S)",
    re.IGNORECASE,
)
_GIVEN = re.compile(r"\b(?:given|provided|attached|uploaded|above)\s+", re.IGNORECASE)
_PLAIN = ("image", "picture", "scene")
_CLOSING_CHATTER = re.compile(
    r"(?:(?<=[.!?])\s+|\n\s*)(?:let me know|I hope this|would you like|feel free to|please let me"
    r"|if you(?:['’]d| would) like)\b[^\n]*\Z",
    re.IGNORECASE,
)
_KEPT = re.compile(r"\x00(\d+)\x00")


def clean_caption(text: str) -> str:
    """The text of a captioner as a caption for a prompt: what does not describe the image goes.

    These go: thoughts that end with `</think>` or begin with `<think>`, openings such as "Sure!
    Here is a caption:" and "The image shows" (the kind of an image stays: "This oil painting
    depicts a dog" becomes "an oil painting of a dog"), questions and offers at the end, markdown,
    quotation marks around the whole, special tokens such as `</s>` and `<CAPTION>`, and the full
    stop at the end. Lines become one; between the items of a list stand commas. Weights, tags,
    wildcards and `{}` stay; see `pez_core.prompt_text`.

    Args:
        text: of any captioner.

    Returns:
        The caption in one line, "" where nothing is left. Cleaned again it stays the same.

    Raises:
        ArgumentError: `text` is no string.
    """
    check_string("text", text)
    before = None
    while text != before:
        before, text = text, _cleaned(text)
    return text


def _cleaned(text: str) -> str:
    """The text after each rule was used once."""
    text = _THOUGHT_BEFORE.sub("", _THOUGHT.sub(" ", text.replace("\r\n", "\n")))
    text = _THOUGHT_BEHIND.sub("", text)
    text = _MEANINGLESS.sub("", _SPECIAL.sub(" ", text))
    text, kept = _without_syntax(text)
    text = re.sub(r"\n\s*\n", "\n\n", re.sub(r"[ \t]+", " ", text))
    text = _STARS.sub(r"\2", _FENCE.sub("", text)).replace("`", "").strip()
    text = _unquoted(_CLOSING_CHATTER.sub("", _without_opening(text)))
    text = _one_line(text)
    text = re.sub(r"\s+(?=[,.](?:\s|$))", "", text)
    text = re.sub(r",(?:\s*,)+", ",", text).strip().lstrip(",;").rstrip(" ,;.")
    return _KEPT.sub(lambda found: kept[int(found[1])], text).strip()


def _without_syntax(text: str) -> tuple[str, list[str]]:
    """The text with numbers in the place of its syntax, and the syntax in one line each."""
    out, kept, at = [], [], 0
    for start, end in kept_spans(text):
        out += [text[at:start], f"\x00{len(kept)}\x00"]
        kept.append(re.sub(r"\s*\n\s*", " ", text[start:end]))
        at = end
    return "".join([*out, text[at:]]), kept


def _without_opening(text: str) -> str:
    """The text without chatter at its beginning."""
    mark = _HEADING.match(text) or _BULLET.match(text)
    whole = rest = text[mark.end() :] if mark else text
    while (shorter := _shortened(rest)) != rest:
        rest = shorter
    return text if rest == whole else rest  # a mark without chatter is that of a list


def _shortened(text: str) -> str:
    """The text without one piece of chatter at its beginning."""
    for pattern in _CHATTER:
        if (found := pattern.match(text)) and found.end() < len(text):
            return text[found.end() :]
    if not (found := _SHOWN.match(text)):
        return text
    kind = " ".join(_GIVEN.sub("", found["kind"]).split())
    if kind.lower() in _PLAIN:
        return text[found.end() :]
    return f"{article_of(kind)} {kind} of {text[found.end() :]}"


def _unquoted(text: str) -> str:
    """The text without quotation marks around the whole."""
    inner = text[1:-1]
    if len(text) < 3 or _QUOTES.get(text[0]) != text[-1]:
        return text
    # an apostrophe stands between letters
    marks = re.sub(r"(?<=\w)['’](?=\w)", "", inner)
    return text if text[0] in marks or text[-1] in marks else inner


def _one_line(text: str) -> str:
    """The lines of a text behind one another, with commas between items and paragraphs."""
    joined, comma = "", False
    for line in text.split("\n"):
        item = _BULLET.match(line) or _HEADING.match(line)
        line = " ".join((line[item.end() :] if item else line).split())
        if not line:
            comma = True  # between paragraphs
            continue
        if item:
            line, comma = line.rstrip(". "), True
        if joined:
            joined += " " if joined[-1] in ".,;:!?" or not comma else ", "
        joined, comma = joined + line, bool(item)
    return joined


# --- prune


def prune_caption(
    clip: AnyClip,
    caption: str,
    images: ImageInput | Sequence[ImageInput] | torch.Tensor,
    fit: str = "crop",
) -> str:
    """Drop the words of a caption that lower its similarity with an image.

    Those that do most harm go first, several in a round while the similarity rises, until no word
    does harm. An article goes with its noun, and becomes "a" or "an" as the next word requires.
    `prune` goes further: it also drops words that help, down to the similarity of the
    whole prompt. Tags stay, and weights like `(two words:1.2)` stay or go whole.

    Args:
        clip: from `load_clip`.
        caption: with or without `{}`, which stays.
        images: as in `invert`; of several their mean similarity counts.
        fit: how images become squares, as in `SearchOptions`.

    Returns:
        The words that are left, at least one, and no "of" or "is" alone.

    Raises:
        ArgumentError: the caption is empty, or an image cannot be read.
        FloatingPointError: a similarity is NaN or infinite.
    """
    return pruned(clip, caption, images, fit)[0]


def pruned(
    clip: AnyClip,
    caption: str,
    images: ImageInput | Sequence[ImageInput] | torch.Tensor,
    fit: str = "crop",
    stop: Callable[[], bool] = lambda: False,
) -> tuple[str, str]:
    """`prune_caption`, and a remark for the user that names the words, "" where all are left.

    Args:
        clip, caption, images, fit: as in `prune_caption`.
        stop: called before each round; a true value leaves the other words.
    """
    import torch

    from .readability import FUNCTION_WORDS
    from .scoring import split, towards
    from .tasks.invert import encode_images

    words = split(caption, "caption")
    plain = [word.replace(SLOT, "").strip() for word, _ in words]
    # a tag changes nothing here, but the image
    places = {k for k, (word, is_read) in enumerate(words) if is_read and SLOT not in word}
    says_nothing = OPEN_WORDS | FUNCTION_WORDS | {"there", "here", "these"}
    meaning = {k for k in places if _bare(plain[k]) not in says_nothing}
    gone: set[int] = set()
    with torch.inference_mode(False):
        feature = encode_images(clip, images, fit).mean(0)

        def similarities(more: Sequence[set[int]]) -> list[float]:
            """Of the words that are left when more of them go."""
            texts = [
                [word for k, word in enumerate(plain) if word and k not in gone | some]
                for some in more
            ]
            return towards(clip, texts, feature)

        while len(left := sorted(places - gone)) > 1 and not stop():
            whole, *without = similarities([set(), *({k} for k in left)])
            gains = {k: one - whole for k, one in zip(left, without, strict=True) if one > whole}
            if not gains:
                break
            # those do no more harm that gain nothing behind worse ones
            worst = sorted(gains, key=lambda k: -gains[k])
            if (needed := meaning - gone or set(left)) <= gains.keys():  # one of these has to stay
                worst.remove(next(k for k in reversed(worst) if k in needed))
            if not worst:
                break
            firsts = [set(worst[:count]) for count in range(1, len(worst) + 1)]
            found = similarities(firsts)
            rises = [b > a for a, b in pairwise(found)]
            gone |= firsts[[*rises, False].index(False)]
    if gone:
        words = _with_articles(words, gone)
    remaining = " ".join(word for k, (word, _) in enumerate(words) if k not in gone)
    dropped = _quoted([words[k][0] for k in sorted(gone)])
    return remaining, dropped and f"Dropped, since they lower the similarity: {dropped}."


_AROUND = " ,;:.!?()"


def _bare(word: str) -> str:
    """A word in lower case, without the marks around it."""
    return word.lower().strip(_AROUND)


def _with_articles(words: Sequence[tuple[str, bool]], gone: set[int]) -> list[tuple[str, bool]]:
    """The words with "a" or "an" as the next word requires.

    Args:
        words: each with whether it is read.
        gone: places of the words that go; articles that have lost their noun are added.
    """
    from .readability import FUNCTION_WORDS

    found, following = list(words), ""
    for k in reversed(range(len(words))):
        word, is_read = words[k]
        if k in gone:
            continue
        if is_read and word.lower() in ("a", "an") and SLOT not in following:
            if _bare(following) not in FUNCTION_WORDS | {""}:
                article = article_of(following.lstrip(_AROUND))
                found[k] = (article.capitalize() if word[0].isupper() else article, is_read)
            elif len(gone) + 1 < len(words):
                gone.add(k)
                continue
        following = word
    return found


def _quoted(words: Sequence[str]) -> str:
    """Words for a remark, without the middle where they are many; "" where there are none."""
    text = " ".join(words)
    if len(text) > _LONGEST_QUOTE:
        begin, end = text[: 2 * _LONGEST_QUOTE // 3], text[-_LONGEST_QUOTE // 3 :]
        text = f"{begin.rpartition(' ')[0] or begin} … {end.partition(' ')[2] or end}"
    return text and f'"{text}"'


_LONGEST_QUOTE = 90  # characters


# --- fit

# How much of a cut caption has to be left where it ends with a phrase.
_PHRASE_SHARE = 0.6


def fit_caption(clip: AnyClip, caption: str, prompt_len: int) -> tuple[str, str]:
    """Cut a caption so that the learned words fit into one context with it.

    It is cut behind a phrase, or behind a word where the last phrase is long. Punctuation in front
    of the learned words stays, and so do tags, such as `<lora:name:1>`, and all text behind `{}`.

    Args:
        clip: from `load_clip`.
        caption: as in `invert`, with or without `{}`.
        prompt_len: tokens to learn.

    Returns:
        The caption, and a remark for the user that names what was cut, "" where all of it fits.

    Raises:
        ArgumentError: an argument is out of range, or not even the text behind `{}` fits.
    """
    from .caption import check_caption

    fixed = check_caption(caption)
    check_integer("prompt_len", prompt_len, 1)
    whole = _as_read(clip, fixed)
    if prompt_len <= whole.room:
        return caption, ""
    before, after = fixed.split(SLOT, 1)
    text = before.rstrip(" \t\n,;:.")
    mark, units = before[len(text) :], _units(text)

    def with_first(count: int) -> str:
        first = _first(units, count)
        between = mark if count else " " * bool(first)
        return f"{first}{between}{SLOT}{after}"

    def is_too_long(count: int) -> bool:
        return prompt_len > _as_read(clip, with_first(count)).room

    _as_read(clip, with_first(0)).check_room(prompt_len, one_context=True)
    # tokens become more with each word
    fitting = bisect_left(range(1, len(units)), True, key=is_too_long)
    kept = _phrase_end(units, fitting)
    cut, left_out = with_first(kept), [unit for unit, is_tag in units[kept:] if not is_tag]
    size, room = clip.text.max_prompt_len, _as_read(clip, cut).room
    remark = (
        f"The caption was cut from {size - whole.room} to {size - room} tokens: the context of the "
        f"CLIP has {size}, and {prompt_len} are learned. Left out: {_quoted(left_out)}."
    )
    cut = cut if SLOT in caption else cut.replace(SLOT, "").rstrip()
    return cut, remark if left_out else ""


def _as_read(clip: AnyClip, fixed: str) -> Caption:
    """A caption with `{}` as the text encoder reads it."""
    from .caption import Caption, spoken_caption

    return Caption(clip, fixed, spoken_caption(fixed))


def _units(text: str) -> list[tuple[str, bool]]:
    """The words of a text, and its syntax, each with whether it is syntax that is not read."""
    return [
        (word, not piece.read)
        for piece in all_pieces(text)
        for word in ([piece.printed] if piece.kept else _WORD.findall(piece.printed))
    ]


# Chinese has no spaces; there a caption is cut behind a mark
_MARKS = "，。、；：！？"
_WORD = re.compile(rf"[^\s{_MARKS}]*[{_MARKS}]+|[^\s{_MARKS}]+")


def _first(units: list[tuple[str, bool]], count: int) -> str:
    """The first units without the comma behind them, and all later tags."""
    text = " ".join(unit for unit, _ in units[:count]).rstrip(" ,;:." + _MARKS)
    return " ".join(filter(None, [text, *(unit for unit, is_tag in units[count:] if is_tag)]))


def _phrase_end(units: list[tuple[str, bool]], count: int) -> int:
    """How many of the first `count` units to keep, so that a phrase ends behind them."""
    for end in range(count, max(1, int(count * _PHRASE_SHARE)), -1):
        if units[end - 1][0][-1] in ",;:.!?" + _MARKS:
            return end
    while count > 1 and units[count - 1][0].lower() in OPEN_WORDS:
        count -= 1
    return count
