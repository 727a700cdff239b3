"""What may appear in a prompt: rules that people can name, combine and save."""

from __future__ import annotations

import difflib
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .clip import AnyClip

UNSAFE_WORDS = Path(__file__).parent / "words" / "unsafe.txt"
"""A list of words that many people do not want to see; source and limits are in its head."""


class Blocklist:
    """Finds blocked words in a text, from whatever pieces and with whatever marks they are spelled.

    Case, accents, punctuation and spaces do not hide a word: `n-u d e` holds `nude`, `menu details`
    does not. An entry that ends in `*` stands for every word that begins like it. Where pieces
    could spell a word, it counts as spelled. Entries without letters and digits are searched as
    they are.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        entries = [entry.strip() for entry in entries if entry.strip()]
        self._marks = [entry for entry in entries if not _words(entry)]
        spelled = {"".join(_words(entry)): entry for entry in entries}
        self._begins = {word: e for word, e in spelled.items() if word and e[-1] == "*"}
        self._whole = {w: e for w, e in spelled.items() if w and w not in self._begins}
        self._longest = max(map(len, spelled), default=0)

    def __bool__(self) -> bool:
        return self._longest > 0 or bool(self._marks)

    def find_mark(self, text: str) -> str | None:
        """The first entry without letters and digits that is in `text`, or None."""
        return next((mark for mark in self._marks if mark in text), None)

    def find(self, text: str, first: int = 0, last: int | None = None) -> str | None:
        """The first entry found that touches the words `first` to `last` of `text`, or None."""
        words = _words(text)
        if last is None:
            last = len(words)
        for start in range(last):
            joined = ""
            for end in range(start, len(words)):
                joined += words[end]
                if end >= first:
                    if joined in self._whole:
                        return self._whole[joined]
                    for beginning, entry in self._begins.items():
                        if joined.startswith(beginning):
                            return entry
                if len(joined) >= self._longest:
                    break
        return None


def count_words(text: str) -> int:
    """How many words `Blocklist.find` sees in `text`."""
    return len(_words(text))


def _words(text: str) -> list[str]:
    plain = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    return re.findall(r"[^\W_]+", plain)


@dataclass(frozen=True)
class Lexicon:
    """What a `Vocabulary` comes to in one CLIP.

    Attributes:
        phrases: token ids of everything that prompts may be made of.
        blocked: words that must not be read in the prompt.
    """

    phrases: frozenset[tuple[int, ...]]
    blocked: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Rules:
    """A vocabulary on its way to a lexicon: what it offers, and what of others' it admits."""

    offers: set[tuple[int, ...]]
    admits: Callable[[tuple[int, ...]], bool]
    blocked: frozenset[str]
    bank: frozenset[str] | None  # its phrases as written, where it is a list of phrases

    @cached_property
    def phrases(self) -> set[tuple[int, ...]]:
        """What it offers and admits itself."""
        return set(filter(self.admits, self.offers))


@dataclass(frozen=True)
class Vocabulary:
    """Everything that may appear in the learned part of a prompt.

    `a & b` allows what both allow and blocks what either blocks; `a | b` allows what either allows
    and blocks what both block; `a - b` allows what `a` allows without what `b` allows, and where
    `b` is a list of phrases, these are blocked words in the result. Rules without a bank take the
    phrases of a bank as a whole: `Vocabulary(bank=["red car"]) & Vocabulary(ascii_only=True)` has
    the phrase.

    Args:
        bank: phrases that prompts are made of, of any number of tokens: a list, or a text file with
            one phrase a line (`# ` begins a comment line). None: every word of the CLIP.
        blocked: words and phrases that must not be read in the decoded prompt, also when they are
            spelled from pieces (see `Blocklist`): a list, or a file like that of `bank`.
            `UNSAFE_WORDS` is such a file.
        ascii_only: only what is written in ASCII; no emoji, no other scripts.
        whole_words: only tokens that are words by themselves, and that the CLIP is known to have
            been trained on. False adds every other token, pieces of words among them, which fuse
            with what follows when they are printed; this is what the paper searches. Without effect
            on a bank.
        min_embedding_std: floor on the standard deviation of a token's embedding. Tokens that were
            hardly trained lie close to zero; 0.005 leaves 46,164 of ViT-H-14's 49,408.

    Raises:
        ValueError: a file cannot be read or holds no phrase; `min_embedding_std` is negative.
        TypeError: `bank` or `blocked` is neither a path nor a list of strings.
    """

    bank: tuple[str, ...] | Sequence[str] | str | os.PathLike | None = None
    blocked: tuple[str, ...] | Iterable[str] | str | os.PathLike = ()
    ascii_only: bool = False
    whole_words: bool = True
    min_embedding_std: float = 0.0

    def __post_init__(self) -> None:
        if self.bank is not None:
            object.__setattr__(self, "bank", _phrases("bank", self.bank))
            if not self.bank:
                raise ValueError("`bank` holds no phrase; write one phrase a line.")
        object.__setattr__(self, "blocked", _phrases("blocked", self.blocked))
        if not self.min_embedding_std >= 0:
            raise ValueError(
                f"`min_embedding_std` has to be 0 or more but is {self.min_embedding_std!r}."
            )

    def __and__(self, other: Vocabulary) -> Vocabulary:
        return _Combination(operation="&", left=self, right=other)

    def __or__(self, other: Vocabulary) -> Vocabulary:
        return _Combination(operation="|", left=self, right=other)

    def __sub__(self, other: Vocabulary) -> Vocabulary:
        return _Combination(operation="-", left=self, right=other)

    def lexicon(self, clip: AnyClip) -> Lexicon:
        """What is left of the rules in one CLIP.

        Raises:
            ValueError: nothing is left; where there is a bank, with the usable words near it.
        """
        rules = self._resolve(clip)
        if not rules.phrases and rules.bank:
            raise ValueError(_nothing_usable(clip, sorted(rules.bank), Blocklist(rules.blocked)))
        if not rules.phrases:
            raise ValueError(
                "`vocabulary` leaves no word to make a prompt of in "
                f"{clip.name}: everything is blocked or ruled out; take back one of its rules."
            )
        return Lexicon(frozenset(rules.phrases), rules.blocked)

    def _resolve(self, clip: AnyClip) -> _Rules:
        words, table = clip.text.words, clip.text.token_embedding
        blocked, default = Blocklist(self.blocked), set(clip.vocabulary.tolist())
        trained = None
        if self.min_embedding_std:
            parts = table.detach().float().split([n for n, _ in clip.text.parts], dim=1)
            weak = sum((part.std(dim=1) < self.min_embedding_std).long() for part in parts)
            trained = (weak == 0).tolist()
        known = None
        if self.bank is not None:
            encoded = {tuple(words.encode(text)) for text in self.bank}
            known = {phrase for phrase in encoded if phrase and _is_usable(clip, phrase)}

        def admits(phrase: tuple[int, ...]) -> bool:
            if known is not None and phrase not in known:
                return False
            # a single token of another's bank that can be used is in the default, too
            single = len(phrase) == 1 and known is None
            if single and self.whole_words and phrase[0] not in default:
                return False
            if trained is not None and not all(trained[i] for i in phrase):
                return False
            if not self.ascii_only and not blocked:
                return True
            text = words.decode(phrase)
            if self.ascii_only and not text.isascii():
                return False
            return not (blocked.find(text) or blocked.find_mark(text))

        if known is not None:
            offers = known
        elif self.whole_words:
            offers = {(i,) for i in default}
        else:
            size = min(words.size, len(table))
            offers = {(i,) for i in range(size) if i not in words.special_ids}
        bank = frozenset(self.bank) if self.bank is not None else None
        return _Rules(offers, admits, frozenset(self.blocked), bank)

    def save(self, path: str | os.PathLike) -> None:
        """Write the rules, banks and blocked words included, as a JSON file."""
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | os.PathLike) -> Vocabulary:
        """Read what `save` wrote.

        Raises:
            ValueError: the file cannot be read or is not a saved vocabulary.
        """
        try:
            return _from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not a saved vocabulary ({error}).") from error

    def to_json(self) -> dict:
        return {
            "bank": None if self.bank is None else list(self.bank),
            "blocked": list(self.blocked),
            "ascii_only": self.ascii_only,
            "whole_words": self.whole_words,
            "min_embedding_std": self.min_embedding_std,
        }


@dataclass(frozen=True)
class _Combination(Vocabulary):
    """Two vocabularies and what joins them."""

    operation: str = "&"
    left: Vocabulary | None = None
    right: Vocabulary | None = None

    def _resolve(self, clip: AnyClip) -> _Rules:
        a, b = self.left._resolve(clip), self.right._resolve(clip)
        if self.operation == "&":
            bank = a.bank if b.bank is None else b.bank if a.bank is None else a.bank | b.bank
            return _Rules(
                a.offers | b.offers,
                lambda p: a.admits(p) and b.admits(p),
                a.blocked | b.blocked,
                bank,
            )
        if self.operation == "|":
            bank = None if a.bank is None or b.bank is None else a.bank | b.bank
            return _Rules(
                a.phrases | b.phrases,
                lambda p: a.admits(p) or b.admits(p),
                a.blocked & b.blocked,
                bank,
            )
        gone = b.bank or frozenset()
        blocked = Blocklist(gone)

        def admits(phrase: tuple[int, ...]) -> bool:
            if not a.admits(phrase) or b.admits(phrase):
                return False
            text = clip.text.words.decode(phrase) if blocked else ""
            return not (blocked.find(text) or blocked.find_mark(text))

        return _Rules(a.phrases, admits, a.blocked | gone, a.bank)

    def to_json(self) -> dict:
        return {
            "operation": self.operation,
            "left": self.left.to_json(),
            "right": self.right.to_json(),
        }


def _from_json(rules: dict) -> Vocabulary:
    if "operation" not in rules:
        return Vocabulary(**rules)
    if rules["operation"] not in ("&", "|", "-"):
        raise ValueError(f"unknown operation {rules['operation']!r}")
    return _Combination(
        operation=rules["operation"],
        left=_from_json(rules["left"]),
        right=_from_json(rules["right"]),
    )


def _phrases(name: str, source: object) -> tuple[str, ...]:
    """Phrases of a list or of a text file, in order and once each."""
    if isinstance(source, (str, os.PathLike)):
        try:
            lines = Path(source).expanduser().read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"`{name}`: the file {str(source)[:200]!r} cannot be read ({error}); "
                "give a text file, or a list for single words."
            ) from error
        # hashtags are phrases
        source = [line for line in lines if line.strip() != "#" and not line.startswith("# ")]
    if not isinstance(source, Iterable):
        raise TypeError(f"`{name}` has to be a path or a list of strings but is {source!r}.")
    phrases = list(source)
    for phrase in phrases:
        if not isinstance(phrase, str):
            raise TypeError(f"`{name}` has to hold strings but holds {phrase!r}.")
    return tuple(dict.fromkeys(phrase.strip() for phrase in phrases if phrase.strip()))


def _is_usable(clip: AnyClip, phrase: Sequence[int]) -> bool:
    known = clip.trained_tokens is None or clip.trained_tokens.issuperset(phrase)
    return known and len(phrase) <= clip.text.max_prompt_len and clip.text.words.round_trips(phrase)


def _nothing_usable(clip: AnyClip, bank: Sequence[str], blocked: Blocklist) -> str:
    words = [clip.text.words.decode([i]) for i in clip.vocabulary.tolist()]
    words = [word for word in words if not blocked.find(word)]
    near = difflib.get_close_matches(bank[0].lower(), words, n=3, cutoff=0)
    return (
        f"`bank`: none of its {len(bank)} phrases can be used with {clip.name}: it does not know "
        f"their tokens or cannot print them, or another rule forbids them. "
        f"Usable words near {bank[0]!r}: {', '.join(near)}."
    )
