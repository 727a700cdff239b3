"""Fixed text around the learned words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .errors import ArgumentError, check_string
from .vocabulary import Blocklist, count_words

if TYPE_CHECKING:
    from .clip import AnyClip


def check_caption(caption: object) -> str:
    """The caption with `{}` where the learned words go: behind it, where it does not say.

    Raises:
        ArgumentError: it is no string, or holds `{}` twice.
    """
    text = check_string("caption", caption)
    if text.count("{}") > 1:
        raise ArgumentError(
            "caption",
            f"has to hold {{}} once at most, where the learned words go, but is {text!r}",
        )
    return text if "{}" in text else f"{text} {{}}".strip()


def _around(caption: str | tuple[str, str]) -> tuple[str, str]:
    """The text before and behind the learned words."""
    if not isinstance(caption, str):
        return caption
    before, after = caption.split("{}", 1)
    return before, after


class Caption:
    """A caption with a place for the learned words.

    Args:
        clip: its tokenizer and context count.
        caption: text with `{}` where the learned words go, or the text before and behind them.
        encoded: the caption as the text encoder gets it, where tags and weights are left out; None:
            the caption itself.
        inserts: fixed text between learned words: the number of learned tokens before it, the text
            as it is printed, and as the text encoder gets it; in order.

    Attributes:
        before, after: token ids of the fixed text.
        inserts: the number of learned tokens before each insert, and its token ids.
        room: tokens that the context holds beside the fixed text.
        separate: learned words cannot fuse with the fixed text.

    Raises:
        ArgumentError: the fixed text would fuse with the learned words.
    """

    def __init__(
        self,
        clip: AnyClip,
        caption: str | tuple[str, str] = "{}",
        encoded: str | tuple[str, str] | None = None,
        inserts: Sequence[tuple[int, str, str]] = (),
    ) -> None:
        self._words, self._size = clip.text.words, clip.text.max_prompt_len
        self._printed = _around(caption)
        self._encoded = self._printed if encoded is None else _around(encoded)
        self._printed_inserts = [(place, printed) for place, printed, _ in inserts]
        self._encoded_inserts = [(place, text) for place, _, text in inserts if text]
        self.inserts = [(place, self._words.encode(text)) for place, text in self._encoded_inserts]
        before, after = self._encoded
        self.before, self.after = self._words.encode(before), self._words.encode(after)
        self._words_around = count_words(before), count_words(after)
        between = sum(len(ids) for _, ids in self.inserts)
        self.room = self._size - len(self.before) - len(self.after) - between
        # beside a space nothing fuses; beside a comma other punctuation does, but words do not
        self.separate = (not before or before[-1].isspace()) and (not after or after[0].isspace())
        if not self.round_trips([clip.text.example_token]):
            raise ArgumentError(
                "caption",
                f"is {caption!r}, whose text would fuse with the learned words",
                "put a space on both sides of {}",
            )

    def check_room(self, prompt_len: int, one_context: bool) -> None:
        """Raise unless `prompt_len` tokens fit.

        Args:
            prompt_len: tokens to learn.
            one_context: with the fixed text, they have to fit into one context.
        """
        if prompt_len > self._size:
            raise ArgumentError(
                "prompt_len", f"has to be from 1 to {self._size} but is {prompt_len}"
            )
        if one_context and prompt_len > self.room:
            raise ArgumentError(
                "prompt_len",
                f"is {prompt_len}, but beside the {self._size - self.room} tokens of the `caption` "
                f"there is room for {max(self.room, 0)}",
                "shorten the `caption` or learn fewer tokens",
            )

    def contexts(
        self, prompt_len: int
    ) -> list[tuple[list[int], list[int], tuple[int, int]]] | None:
        """How a prompt that is longer than the context is cut, as ComfyUI does; None: it is not.

        Returns:
            Of each context the ids before and behind the learned tokens, the first of the learned
            tokens that it holds, and the one behind the last.
        """
        if prompt_len <= self.room:
            return None
        first, last = len(self.before), len(self.before) + prompt_len
        cuts = []
        for start in range(0, last + len(self.after), self._size):
            end = start + self._size
            learned = (min(max(start - first, 0), prompt_len), min(max(end - first, 0), prompt_len))
            before = self.before[start:end]
            cuts.append((before, self.after[max(start - last, 0) : max(end - last, 0)], learned))
        return cuts

    def note(self, prompt_len: int) -> str:
        """A remark on a prompt that is longer than the context, "" on others."""
        cuts = self.contexts(prompt_len)
        if cuts is None:
            return ""
        tokens = len(self.before) + prompt_len + len(self.after)
        return (
            f"The prompt has {tokens} tokens, and CLIP reads {self._size} at a time. It is encoded "
            f"in {len(cuts)} parts, as by CLIP Text Encode; the similarity is that of their mean."
        )

    def ids(self, learned: Sequence[int]) -> list[int]:
        """The tokens of the whole prompt."""
        found, start = list(self.before), 0
        for place, ids in self.inserts:
            found += [*learned[start:place], *ids]
            start = place
        return [*found, *learned[start:], *self.after]

    def print(self, learned: Sequence[int]) -> str:
        """The whole prompt as people read it."""
        return self._filled(learned, self._printed_inserts).join(self._printed)

    def text(self, learned: Sequence[int]) -> str:
        """The whole prompt as the text encoder gets it."""
        return self._filled(learned, self._encoded_inserts).join(self._encoded)

    def _stretches(self, learned: Sequence[int], places: Sequence[int]) -> list[str]:
        """The learned words between the places."""
        ends = [*places, len(learned)]
        starts = [0, *places]
        return [self._words.decode(learned[a:b]) for a, b in zip(starts, ends, strict=True)]

    def _filled(self, learned: Sequence[int], inserts: Sequence[tuple[int, str]]) -> str:
        """The learned words, and the inserts between them."""
        first, *others = self._stretches(learned, [place for place, _ in inserts])
        parts = [first]
        for (_, text), words in zip(inserts, others, strict=True):
            parts += [text, words]
        return " ".join(filter(None, parts)) if inserts else first

    def round_trips(self, learned: Sequence[int]) -> bool:
        """Whether the tokenizer reads the printed prompt as these very tokens."""
        if not self.before and not self.after and not self._printed_inserts:
            return self._words.round_trips(learned)
        special = self._words.special_ids & set(learned)
        return not special and self._words.encode(self.text(learned)) == self.ids(learned)

    def blocked_word(self, learned: Sequence[int], blocked: Blocklist) -> str | None:
        """A blocked word that the learned part spells, or spells together with the fixed text."""
        if self._printed_inserts:  # which are the user's own words
            places = [place for place, _ in self._printed_inserts]
            found = [blocked.find(words) for words in self._stretches(learned, places)]
            return next(filter(None, found), blocked.find_mark(self._words.decode(learned)))
        text = self.text(learned)
        before, after = self._words_around
        found = blocked.find(text, before, count_words(text) - after)
        return found or blocked.find_mark(self._words.decode(learned))
