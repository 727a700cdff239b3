"""How learned words continue a caption: in its own style, a list of tags or a sentence."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from .prompt_text import SLOT

if TYPE_CHECKING:
    from .options import SearchOptions

OPEN_WORDS = {
    *("a", "an", "the", "and", "or", "but", "of", "in", "on", "at", "by", "to", "with", "for"),
    *("from", "into", "its", "his", "her", "their", "is", "are", "that", "which", "as", "very"),
}
"""Words at which no phrase ends."""

_SYNTAX = re.compile(r"<[^<>]*>|:[\d.]+|[()\[\]{}\\]")
_SENTENCE_END = re.compile(r"[.!?]\s+\S")
# Words that tags lack, apart from "and" inside of one, as in "black and white".
_OF_SENTENCES = {
    *("is", "are", "was", "were", "has", "have", "who", "which", "that", "while", "there", "it"),
    *("its", "his", "her", "their", "he", "she", "they"),
}
_LEADING = {"and", "or", "but", "with"}
# Words of one tag at most, and of one in the mean.
_LONGEST, _MEAN = 5, 3
# The same of a list of two, which may be a short sentence.
_LONGEST_OF_TWO = 2


def caption_wording(caption: str) -> str:
    """The `wording` in which a caption goes on: "tags" behind a list of short phrases.

    Weights and tags such as `<lora:name:1>` do not count.

    Args:
        caption: with or without `{}`.

    Returns:
        "tags" or "sentence".
    """
    text = _SYNTAX.sub(" ", caption).lower().strip(" \t\n,;.")
    if _SENTENCE_END.search(text):
        return "sentence"
    words = text.replace(",", " ").split()
    if words and 2 * sum("_" in word for word in words) >= len(words):  # of boorus
        return "tags"
    phrases = [phrase.split() for phrase in re.split(r"[,;\n]", text) if phrase.strip()]
    longest = max(map(len, phrases), default=0)
    is_short = longest <= _LONGEST and len(words) <= _MEAN * len(phrases)
    is_list = len(phrases) > 2 or (len(phrases) == 2 and longest <= _LONGEST_OF_TWO)
    leads = {phrase[0] for phrase in phrases}
    of_sentence = _LEADING & leads or _OF_SENTENCES.intersection(words)
    return "tags" if is_short and is_list and not of_sentence else "sentence"


def behind(text: str, wording: str) -> str:
    """What stands between a caption and the learned words behind it.

    Args:
        text: of the caption.
        wording: of the learned words.

    Returns:
        A space where they continue a sentence, or a word such as "of"; else a comma and a space.
    """
    text = text.rstrip()
    if not text or text[-1] in ",;:.!?" or text.split()[-1].lower() in OPEN_WORDS:
        return " "
    return " " if wording == "sentence" and caption_wording(text) == "sentence" else ", "


def continuing(options: SearchOptions, caption: str) -> tuple[SearchOptions, str]:
    """The options of words that continue a caption in its own style: tags behind tags.

    Args:
        options: of the search; only the wording "sentence" changes.
        caption: with or without `{}`.

    Returns:
        The options, and a remark for the user where the wording changed, else "".
    """
    if options.wording != "sentence" or caption_wording(caption.replace(SLOT, "")) != "tags":
        return options, ""
    remark = "The caption is a list of tags, so the learned words are tags, too."
    return replace(options, wording="tags"), remark
