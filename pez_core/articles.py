"""The English articles of learned prompts: "an" before the sound of a vowel, "a" elsewhere."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Sequence

_OTHER = {"a": "an", "an": "a"}
# By their first letters; what begins like "you" or "won" is no vowel to the ear.
_VOWEL = re.compile(r"[aeiou]|hour|honou?r|honest|heir|8|1[18](?!\d)")
_NO_VOWEL = re.compile(
    r"one(?:s|\b)|once\b|eu|ewe|ufo\b|usb\b"
    r"|u(?:ni(?!n|m|d)|s(?:a[bg]|e|ua|ur)|t[aei]|to[pn]|k[ru]|r[au][nlg]|rin|biq)"
)
# Letters that are read one by one: "X-ray", "MRI".
_SPELLED = re.compile(r"[A-Z]+(?![a-z])")
_VOWEL_NAMES = "AEFHILMNORSX"


def article_of(word: str) -> str:
    """The article that stands before a word: "an" or "a"."""
    if _SPELLED.match(word):
        return "an" if word[0] in _VOWEL_NAMES else "a"
    word = word.lower()
    return "an" if _VOWEL.match(word) and not _NO_VOWEL.match(word) else "a"


def with_right_articles(
    ids: Sequence[int],
    decode: Callable[[Sequence[int]], str],
    encode: Callable[[str], list[int]],
    allowed: Collection[int],
) -> list[int]:
    """The tokens of a prompt with "a" or "an" as the sound of the next word requires.

    Args:
        ids: of the prompt, whole words.
        decode, encode: of the tokenizer.
        allowed: an article that is not among these tokens is not put in.
    """
    words = [decode([i]) for i in ids]
    found = list(ids)
    for k, (word, behind) in enumerate(itertools.pairwise(words)):
        if word in _OTHER and behind[:1].isalpha() and word != article_of(behind):
            other = encode(_OTHER[word])
            if len(other) == 1 and other[0] in allowed:
                found[k] = other[0]
    return found
