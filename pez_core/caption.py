"""Fixed text around the learned words."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING

from .continuation import behind
from .errors import ArgumentError, check_decoded, check_string
from .prompt_text import SLOT, all_pieces, chunks, has_syntax, read
from .readability import as_written as written_form
from .vocabulary import Blocklist, count_words

if TYPE_CHECKING:
    from .clip import AnyClip


_EXAMPLE = "a"  # an ordinary word


def check_caption(caption: object, wording: str = "free") -> str:
    """The caption with `{}` in the place of the learned words: at its end, unless it has `{}`.

    Args:
        caption: of the user.
        wording: of the learned words; another one than "free" may put a comma between.

    Raises:
        ArgumentError: it is no string, or holds `{}` twice.
    """
    text = check_decoded("caption", check_string("caption", caption))
    if text.count("{}") > 1:
        raise ArgumentError(
            "caption",
            f"has to hold {{}} once at most, where the learned words go, but is {text!r}",
        )
    if SLOT in text:
        return text
    if wording == "free":
        return f"{text} {SLOT}".strip()
    return f"{text.rstrip()}{behind(text, wording)}{SLOT}".strip()


def spoken_caption(caption: str) -> str | None:
    """A caption with `{}` for the text encoder, without weights and tags; None: it has none.

    Raises:
        ArgumentError: the learned words would stand in syntax that is not read.
    """
    if not has_syntax(caption):
        return None
    spoken = read(caption)
    if SLOT not in spoken:
        raise ArgumentError(
            "caption",
            f"is {caption!r}, whose {{}} stands in syntax that is not read",
            "put {} into text, or into the first of several alternatives",
        )
    return spoken


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
        encoded: the caption for the text encoder, without tags and weights; None:
            the caption itself.
        inserts: fixed text between learned words: the number of learned tokens before it, the text
            as it is printed, and as the text encoder gets it; in order.
        as_written: print the learned words with the spacing of written text, "a bird, in a tree",
            where the tokenizer reads it as the same tokens.

    Attributes:
        before, after: token ids of the fixed text.
        inserts: the number of learned tokens before each insert, and its token ids.
        room: tokens that the context holds beside the fixed text.
        separate: learned words cannot fuse with the fixed text.
        opens: the learned words are read as at the beginning of a text, where the tokenizer has
            other tokens (`Words.bare_start`).

    Raises:
        ArgumentError: the fixed text would fuse with the learned words.
    """

    def __init__(
        self,
        clip: AnyClip,
        caption: str | tuple[str, str] = "{}",
        encoded: str | tuple[str, str] | None = None,
        inserts: Sequence[tuple[int, str, str]] = (),
        *,
        as_written: bool = False,
    ) -> None:
        self._words, self._size = clip.text.words, clip.text.max_prompt_len
        self._as_written = as_written
        self._printed = _around(caption)
        self._encoded = self._printed if encoded is None else _around(encoded)
        self._places = [place for place, _, _ in inserts]
        self._printed_inserts = [printed for _, printed, _ in inserts]
        self._encoded_inserts = [text for _, _, text in inserts]
        encode_behind = self._words.encode_behind
        self.inserts = [(k, encode_behind(f" {text}")) for k, _, text in inserts if text]
        before, after = self._encoded
        self.before, self.after = self._words.encode(before), self._words.encode_behind(after)
        spaced = bool(before.strip()) and before[-1].isspace()
        self.opens = self._words.bare_start and not spaced
        self._words_around = count_words(before), count_words(after)
        between = sum(len(ids) for _, ids in self.inserts)
        self.room = self._size - len(self.before) - len(self.after) - between
        # beside a space nothing fuses; beside a comma other punctuation does, but words do not
        self.separate = (not before or before[-1].isspace()) and (not after or after[0].isspace())
        if not self.round_trips(self.encode(_EXAMPLE)):
            raise ArgumentError(
                "caption",
                f"is {caption!r}, whose text would fuse with the learned words",
                "put a space on both sides of {}",
            )

    def without_end(self) -> Caption:
        """The same without the text behind the learned words."""
        other = copy(self)
        other._printed, other._encoded = (self._printed[0], ""), (self._encoded[0], "")
        other.after, other._words_around = [], (self._words_around[0], 0)
        return other

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
        for start, end in self._cuts(prompt_len):
            learned = (min(max(start - first, 0), prompt_len), min(max(end - first, 0), prompt_len))
            before = self.before[start:end]
            cuts.append((before, self.after[max(start - last, 0) : max(end - last, 0)], learned))
        return cuts

    def cut(self, ids: Sequence[int]) -> list[list[int]]:
        """The tokens of the whole prompt in its contexts."""
        learned = max(0, len(ids) - len(self.before) - len(self.after))
        return [list(ids[start:end]) for start, end in self._cuts(learned)]

    def _cuts(self, prompt_len: int) -> list[tuple[int, int]]:
        """Where each context of the whole prompt starts and ends."""
        stretches, start = [], 0
        for size in self._groups(prompt_len):
            stretches.append(range(start, start + size))
            start += size
        return [(places[0], places[-1] + 1) for places in chunks(stretches, self._size)]

    def _groups(self, prompt_len: int) -> list[int]:
        """Tokens of each piece of text and syntax; the learned words are part of one."""
        before, after = self._printed
        found = [piece.read for piece in all_pieces(f"{before}{SLOT}{after}") if piece.read]
        place = next(k for k, text in enumerate(found) if SLOT in text)
        left, right = found[place].split(SLOT, 1)

        def sizes(texts: Sequence[str]) -> list[int]:
            return [len(self._words.encode_behind(f" {text}")) for text in texts]

        own = sum(sizes([text for text in (left, right) if text.strip()])) + prompt_len
        groups = [*sizes(found[:place]), own, *sizes(found[place + 1 :])]
        total = len(self.before) + prompt_len + len(self.after)
        return groups if sum(groups) == total else [total]

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

    def words_before(self, learned: Sequence[int], place: int) -> list[str]:
        """The words that the text encoder reads before learned token number `place`."""
        ids, start = [self.before], 0
        for k, fixed in [*self.inserts, (place, [])]:
            if k <= place:
                ids += [*([token] for token in learned[start:k]), fixed]
                start = k
        return [word for part in ids for word in self._words.decode(part).split()]

    def encode(self, text: str) -> list[int]:
        """The tokens of learned words where they stand in the prompt."""
        return self._words.encode(text) if self.opens else self._words.encode_behind(f" {text}")

    def ids(self, learned: Sequence[int]) -> list[int]:
        """The tokens of the whole prompt."""
        found, start = list(self.before), 0
        for place, ids in self.inserts:
            found += [*learned[start:place], *ids]
            start = place
        return [*found, *learned[start:], *self.after]

    def reread(self, learned: Sequence[int]) -> list[int]:
        """The tokens of the whole prompt as the tokenizer reads its text."""
        return self._words.encode(self.text(learned))

    def print(self, learned: Sequence[int]) -> str:
        """The whole prompt for people, with tags and weights."""
        return self._filled(self._parts(learned), self._printed_inserts).join(self._printed)

    def text(self, learned: Sequence[int]) -> str:
        """The whole prompt for the text encoder, without tags and weights."""
        return self._encoded_text(self._parts(learned))

    def learned(self, learned: Sequence[int]) -> str:
        """The learned words as they are printed, without the inserts."""
        return " ".join(filter(None, self._parts(learned)))

    def _parts(self, learned: Sequence[int]) -> list[str]:
        """The learned words as they are printed, in the stretches between the inserts."""
        parts = self._stretches(learned)
        if not self._as_written:
            return parts
        plain = self._words.encode(self._encoded_text(parts))

        def is_same() -> bool:
            return self._words.encode(self._encoded_text(printed)) == plain

        printed = [written_form(part) for part in parts]
        if is_same():
            return printed
        # two marks in a row are other tokens without the space between them
        printed = list(parts)
        for n, part in enumerate(parts):
            words, done = part.split(), ""
            for k, word in enumerate(words):
                closer = written_form(f"{done} {word}") if done else word
                printed[n] = closer + " ".join(["", *words[k + 1 :]])
                done = closer if is_same() else f"{done} {word}"
            printed[n] = done
        return printed

    def _stretches(self, learned: Sequence[int]) -> list[str]:
        """The learned words between the inserts, with a space between any two words."""
        starts, ends = [0, *self._places], [*self._places, len(learned)]
        return [self._words.decode(learned[a:b]) for a, b in zip(starts, ends, strict=True)]

    def _filled(self, parts: Sequence[str], inserts: Sequence[str]) -> str:
        """Stretches of learned words, and the inserts between them."""
        first, *others = parts
        pairs = zip(inserts, others, strict=True)
        return " ".join(filter(None, [first, *(text for pair in pairs for text in pair)]))

    def _encoded_text(self, parts: Sequence[str]) -> str:
        """The whole prompt for the text encoder, from the stretches of learned words."""
        return self._filled(parts, self._encoded_inserts).join(self._encoded)

    def round_trips(self, learned: Sequence[int]) -> bool:
        """Whether the printed prompt, encoded again, has exactly these tokens."""
        if not self.before and not self.after and not self._places:
            return self._words.round_trips(learned)
        special = self._words.special_ids & set(learned)
        return not special and self._words.encode(self._plain(learned)) == self.ids(learned)

    def _plain(self, learned: Sequence[int]) -> str:
        """`text` with a space between any two words."""
        return self._encoded_text(self._stretches(learned))

    def blocked_word(self, learned: Sequence[int], blocked: Blocklist) -> str | None:
        """A blocked word that the learned part spells, or spells together with the fixed text."""
        if self._places:  # the inserts are the user's own words
            found = [blocked.find(words) for words in self._stretches(learned)]
            return next(filter(None, found), blocked.find_mark(self._words.decode(learned)))
        text = self._plain(learned)
        before, after = self._words_around
        found = blocked.find(text, before, count_words(text) - after)
        return found or blocked.find_mark(self._words.decode(learned))
