"""Fixed text around the learned words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .errors import ArgumentError, check_string
from .readability import as_written as written_form
from .vocabulary import Blocklist, count_words

if TYPE_CHECKING:
    from .clip import AnyClip


_EXAMPLE = "a"  # an ordinary word


def check_caption(caption: object) -> str:
    """The caption with `{}` in the place of the learned words: at its end, unless it has `{}`.

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


class Caption:
    """A caption with a place for the learned words.

    Args:
        clip: its tokenizer and context count.
        caption: text with `{}` where the learned words go.
        encoded: the caption for the text encoder, without tags and weights; None:
            the caption itself.
        as_written: print the learned words with the spacing of written text, "a bird, in a tree",
            where the tokenizer reads it as the same tokens.

    Attributes:
        before, after: token ids of the fixed text.
        room: tokens that the context holds beside it.
        separate: learned words cannot fuse with the fixed text.
        opens: the learned words are read as at the beginning of a text, where the tokenizer has
            other tokens (`Words.bare_start`).

    Raises:
        ArgumentError: the fixed text would fuse with the learned words.
    """

    def __init__(
        self,
        clip: AnyClip,
        caption: str = "{}",
        encoded: str | None = None,
        *,
        as_written: bool = False,
    ) -> None:
        self._words, self._as_written = clip.text.words, as_written
        self._printed = caption.split("{}", 1)
        self._encoded = self._printed if encoded is None else encoded.split("{}", 1)
        before, after = self._encoded
        self.before, self.after = self._words.encode(before), self._words.encode_behind(after)
        spaced = bool(before.strip()) and before[-1].isspace()
        self.opens = self._words.bare_start and not spaced
        self._words_around = count_words(before), count_words(after)
        self.room = clip.text.max_prompt_len - len(self.before) - len(self.after)
        # beside a space nothing fuses; beside a comma other punctuation does, but words do not
        self.separate = (not before or before[-1].isspace()) and (not after or after[0].isspace())
        if self.room > 0 and not self.round_trips(self.encode(_EXAMPLE)):
            raise ArgumentError(
                "caption",
                f"is {caption!r}, whose text would fuse with the learned words",
                "put a space on both sides of {}",
            )

    def check_room(self, prompt_len: int, max_prompt_len: int) -> None:
        """Raise unless `prompt_len` tokens fit beside the fixed text."""
        if prompt_len <= self.room:
            return
        fixed = len(self.before) + len(self.after)
        if not fixed:
            raise ArgumentError(
                "prompt_len", f"has to be from 1 to {max_prompt_len} but is {prompt_len}"
            )
        raise ArgumentError(
            "prompt_len",
            f"is {prompt_len}, but beside the {fixed} tokens of the `caption` there is room for "
            f"{max(self.room, 0)}",
            "shorten the `caption` or learn fewer tokens",
        )

    def encode(self, text: str) -> list[int]:
        """The tokens of learned words where they stand in the prompt."""
        return self._words.encode(text) if self.opens else self._words.encode_behind(f" {text}")

    def ids(self, learned: Sequence[int]) -> list[int]:
        """The tokens of the whole prompt."""
        return [*self.before, *learned, *self.after]

    def reread(self, learned: Sequence[int]) -> list[int]:
        """The tokens of the whole prompt as the tokenizer reads its text."""
        return self._words.encode(self.text(learned))

    def print(self, learned: Sequence[int]) -> str:
        """The whole prompt for people, with tags and weights."""
        return self.learned(learned).join(self._printed)

    def text(self, learned: Sequence[int]) -> str:
        """The whole prompt for the text encoder, without tags and weights."""
        return self.learned(learned).join(self._encoded)

    def learned(self, learned: Sequence[int]) -> str:
        """The learned words as they are printed."""
        text = self._words.decode(learned)
        if not self._as_written:
            return text
        plain = self._words.encode(text.join(self._encoded))
        words = text.split()
        printed = written_form(text)
        if self._words.encode(printed.join(self._encoded)) == plain:
            return printed
        # two marks in a row are other tokens without the space between them
        printed = ""
        for k, word in enumerate(words):
            closer = written_form(f"{printed} {word}") if printed else word
            rest = " ".join(["", *words[k + 1 :]])
            same = self._words.encode((closer + rest).join(self._encoded)) == plain
            printed = closer if same else f"{printed} {word}"
        return printed

    def round_trips(self, learned: Sequence[int]) -> bool:
        """Whether the printed prompt, encoded again, has exactly these tokens."""
        if not self.before and not self.after:
            return self._words.round_trips(learned)
        special = self._words.special_ids & set(learned)
        return not special and self._words.encode(self._plain(learned)) == self.ids(learned)

    def _plain(self, learned: Sequence[int]) -> str:
        """`text` with a space between any two words."""
        return self._words.decode(learned).join(self._encoded)

    def blocked_word(self, learned: Sequence[int], blocked: Blocklist) -> str | None:
        """A blocked word that the learned part spells, or spells together with the fixed text."""
        text = self._plain(learned)
        before, after = self._words_around
        found = blocked.find(text, before, count_words(text) - after)
        return found or blocked.find_mark(self._words.decode(learned))
