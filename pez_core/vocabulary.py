"""Vocabularies: rules for the words of a prompt that can be combined and saved."""

from __future__ import annotations

import difflib
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .errors import ArgumentError, ArgumentTypeError, check_bool, check_number

if TYPE_CHECKING:
    from .clip import AnyClip

UNSAFE_WORDS = Path(__file__).parent / "words" / "unsafe.txt"
"""A list of unsafe words; its head states source and limits."""
ENGLISH_WORDS = Path(__file__).parent / "words" / "english.txt"
"""The dictionary of English words; its head states sources and what is left out."""

# Vocabularies within one another in a file. Each is some calls deep in a search.
_DEEPEST = 100


class Blocklist:
    """Finds blocked words in a text, in any spelling by pieces of words and punctuation.

    Case, accents, punctuation and spaces do not hide a word: `n-u d e` holds `nude`, `menu details`
    does not. An entry that ends in `*` matches every word that begins like it. A word that pieces
    could spell counts as spelled. Entries without letters and digits match exactly.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        entries = [entry.strip() for entry in entries if entry.strip()]
        self._marks = [entry for entry in entries if not _words(entry)]
        spelled = {"".join(_words(entry)): entry for entry in entries}
        self._begins = {word: e for word, e in spelled.items() if word and e[-1] == "*"}
        # a word is looked up once per length, however many entries there are
        self._lengths = sorted({len(word) for word in self._begins})
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
                    for length in self._lengths:
                        if length > len(joined):
                            break
                        if joined[:length] in self._begins:
                            return self._begins[joined[:length]]
                if len(joined) >= self._longest:
                    break
        return None


def count_words(text: str) -> int:
    """The number of words of `text`, as `Blocklist.find` counts them."""
    return len(_words(text))


def _words(text: str) -> list[str]:
    plain = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    return re.findall(r"[^\W_]+", plain)


@cache
def english_words() -> frozenset[str]:
    """The words of `ENGLISH_WORDS`, in lower case."""
    return frozenset(_phrases("dictionary", ENGLISH_WORDS))


@dataclass(frozen=True)
class Lexicon:
    """A `Vocabulary` applied to one CLIP.

    Attributes:
        phrases: token ids of all words and phrases that may appear.
        blocked: words that must not appear in the decoded prompt.
    """

    phrases: frozenset[tuple[int, ...]]
    blocked: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Rules:
    """A vocabulary for one CLIP, before it is combined: phrases, and filters for all phrases.

    Attributes:
        given: phrases that pass if the filters admit them.
        admits: the filter for all phrases.
        blocked: words that must not appear.
        bank: the phrases of `only` as written; None: no such list.
        listed: their token ids, for which `dictionary` does not count.
        dictionary: the filter for all phrases but these; None: there is none.
    """

    given: set[tuple[int, ...]]
    admits: Callable[[tuple[int, ...]], bool]
    blocked: frozenset[str]
    bank: frozenset[str] | None
    listed: frozenset[tuple[int, ...]] = frozenset()
    dictionary: Callable[[tuple[int, ...]], bool] | None = None

    def passes(self, phrase: tuple[int, ...]) -> bool:
        """Whether a phrase passes both filters."""
        listed = self.dictionary is None or phrase in self.listed or self.dictionary(phrase)
        return listed and self.admits(phrase)

    @cached_property
    def phrases(self) -> set[tuple[int, ...]]:
        """The given phrases that pass the filters."""
        return set(filter(self.passes, self.given))


@dataclass(frozen=True)
class Vocabulary:
    """A rule for the words that may appear in the learned part of a prompt.

    Give it as `SearchOptions(vocabulary=...)`. Without arguments it has the English words of the
    CLIP. The other arguments narrow or widen this.

    Vocabularies can be combined:

    - `a & b` has the words that both have. Blocked is what either blocks.
    - `a | b` has the words that either has. Blocked is only what both block.
    - `a - b` has the words of `a` that `b` does not have. If `b` has `only`, its phrases are
      blocked beside what `a` blocks.

    In `a & b`, where only one of them has `only`, the other filters its phrases: each stays or goes
    as a whole. `Vocabulary(only=["red car"]) & Vocabulary(ascii_only=True)` has the phrase "red
    car".

    Args:
        only: build prompts of these words and phrases alone; a phrase may have several tokens. A
            list of strings, or the path of a text file with one phrase per line, in which lines
            that begin with `# ` are comments. A single string is a path. None: every word of the
            CLIP that passes the other arguments.
        block: words and phrases that must not appear in the prompt, not even spelled by several
            tokens (see `Blocklist`): a list, or a path as for `only`, such as `UNSAFE_WORDS`.
        ascii_only: only ASCII words; no emoji, no other scripts.
        whole_words: only tokens that round-trip as a word by themselves. Where the folder of a CLIP
            lists the tokens that it was trained on, only these. False: all tokens, as in the paper,
            also pieces of words; a piece is printed without a space, so that the text may be read
            as other tokens. No effect on `only`.
        dictionary: only words of `ENGLISH_WORDS`, and the comma: no word endings such as `tering`,
            hashtags, names of people, emoji, or words that are unkind about people. No effect on
            `only`, with `whole_words=False`, or where a CLIP has no such words. False: every whole
            word of the CLIP.
        min_embedding_std: leave out tokens whose embedding has a lower standard deviation over its
            columns; 0 or more. Tokens that were hardly trained lie close to zero; 0.005 leaves
            46,164 of ViT-H-14's 49,408.

    Raises:
        ArgumentError: a file cannot be read or holds no phrase, `only` or `block` is neither a path
            nor a list of strings, or `min_embedding_std` is negative.
    """

    only: tuple[str, ...] | Sequence[str] | str | os.PathLike | None = None
    block: tuple[str, ...] | Iterable[str] | str | os.PathLike = ()
    ascii_only: bool = False
    whole_words: bool = True
    dictionary: bool = True
    min_embedding_std: float = 0.0

    def __post_init__(self) -> None:
        if self.only is not None:
            object.__setattr__(self, "only", _phrases("only", self.only))
            if not self.only:
                raise ArgumentError("only", "holds no phrase", "write one phrase per line")
        object.__setattr__(self, "block", _phrases("block", self.block))
        for name in ("ascii_only", "whole_words", "dictionary"):
            check_bool(name, getattr(self, name))
        check_number("min_embedding_std", self.min_embedding_std)

    @property
    def _only(self) -> tuple[str, ...] | None:
        return cast("tuple[str, ...] | None", self.only)

    @property
    def _blocked(self) -> tuple[str, ...]:
        return cast("tuple[str, ...]", self.block)

    @property
    def _reads_weights(self) -> bool:
        return self.min_embedding_std > 0

    @property
    def lists_phrases(self) -> bool:
        """Whether it has a list `only`, whose phrases may have several tokens."""
        return self.only is not None

    def __and__(self, other: Vocabulary) -> Vocabulary:
        return _Combination(operation="&", left=self, right=other)

    def __or__(self, other: Vocabulary) -> Vocabulary:
        return _Combination(operation="|", left=self, right=other)

    def __sub__(self, other: Vocabulary) -> Vocabulary:
        return _Combination(operation="-", left=self, right=other)

    def lexicon(self, clip: AnyClip) -> Lexicon:
        """The words and phrases of one CLIP that pass the rules.

        Those of the last vocabulary are kept in `clip.cache`, since a CLIP has tens of thousands,
        unless they depend on its weights, which may change in place.

        Raises:
            ArgumentError: there are none; for `only` it lists usable words near them.
        """
        if self._reads_weights:
            return self._lexicon(clip)
        last = clip.cache.get("lexicon")
        if last is None or last[0] != self:
            clip.cache["lexicon"] = last = (self, self._lexicon(clip))
        return last[1]

    def _lexicon(self, clip: AnyClip) -> Lexicon:
        rules = self._resolve(clip)
        if not rules.phrases and rules.bank:
            raise _nothing_usable(clip, sorted(rules.bank), Blocklist(rules.blocked))
        if not rules.phrases:
            raise ArgumentError(
                "vocabulary",
                f"leaves no word of {clip.name}: everything is blocked or ruled out",
                "take back one of its rules",
            )
        return Lexicon(frozenset(rules.phrases), rules.blocked)

    def _resolve(self, clip: AnyClip) -> _Rules:
        words = clip.text.words
        blocked, default = Blocklist(self._blocked), set(clip.vocabulary.tolist())
        trained = None
        if self.min_embedding_std:
            table = clip.text.token_embedding.detach().float()
            parts = table.split([n for n, _ in clip.text.parts], dim=1)
            strong = [(part.std(dim=1) >= self.min_embedding_std).tolist() for part in parts]
            trained = [all(flags) for flags in zip(*strong, strict=True)]
        only = None
        if self._only is not None:
            encoded = {tuple(words.encode_behind(f" {text}")) for text in self._only or ()}
            only = {phrase for phrase in encoded if phrase and _is_usable(clip, phrase)}

        def admits(phrase: tuple[int, ...]) -> bool:
            if only is not None and phrase not in only:
                return False
            # a usable single token of another rule's `only` is in the default, too
            single = len(phrase) == 1 and only is None
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

        if only is not None:
            phrases = only
        elif self.whole_words:
            phrases = {(i,) for i in default}
        else:
            size = min(words.size, len(clip.text.token_embedding))
            phrases = {(i,) for i in range(size) if i not in words.special_ids}
        bank = frozenset(self._only) if self._only is not None else None
        dictionary = None
        if only is None and self.whole_words and self.dictionary:
            dictionary = _dictionary(clip, default)
        listed = frozenset(only or ())
        return _Rules(phrases, admits, frozenset(self._blocked), bank, listed, dictionary)

    def save(self, path: str | os.PathLike) -> None:
        """Write the rules, banks and blocked words included, as a JSON file.

        Raises:
            OSError: the file cannot be written.
        """
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | os.PathLike) -> Vocabulary:
        """Read a file of `save`.

        Raises:
            ArgumentError: the file cannot be read or is not a saved vocabulary.
        """
        try:
            return _from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except RecursionError as error:
            raise ArgumentError("path", f"{path} is nested too deeply") from error
        except OSError as error:
            raise ArgumentError("path", f"{path} cannot be read ({error})") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            # the messages of the others are about code
            why = f" ({error})" if isinstance(error, ValueError) else ""
            remedy = "write one with `Vocabulary.save`"
            raise ArgumentError("path", f"{path} is not a saved vocabulary{why}", remedy) from error

    def to_json(self) -> dict:
        """The rules as `save` writes them."""
        return {
            "only": None if self._only is None else list(self._only),
            "block": list(self._blocked),
            "ascii_only": self.ascii_only,
            "whole_words": self.whole_words,
            "dictionary": self.dictionary,
            "min_embedding_std": self.min_embedding_std,
        }


@dataclass(frozen=True)
class _Combination(Vocabulary):
    """Two vocabularies and the operation that joins them."""

    operation: str = "&"
    left: Vocabulary = field(default_factory=lambda: Vocabulary())
    right: Vocabulary = field(default_factory=lambda: Vocabulary())

    @property
    def _reads_weights(self) -> bool:
        return self.left._reads_weights or self.right._reads_weights

    @property
    def lists_phrases(self) -> bool:
        return self.left.lists_phrases or self.right.lists_phrases

    def _resolve(self, clip: AnyClip) -> _Rules:
        a, b = self.left._resolve(clip), self.right._resolve(clip)
        if self.operation == "&":
            bank = a.bank if b.bank is None else b.bank if a.bank is None else a.bank | b.bank
            return _Rules(
                a.given | b.given,
                lambda p: a.admits(p) and b.admits(p),
                a.blocked | b.blocked,
                bank,
                a.listed | b.listed,
                lambda p: all(r.dictionary is None or r.dictionary(p) for r in (a, b)),
            )
        if self.operation == "|":
            bank = None if a.bank is None or b.bank is None else a.bank | b.bank
            return _Rules(
                a.phrases | b.phrases,
                lambda p: a.passes(p) or b.passes(p),
                a.blocked & b.blocked,
                bank,
                a.listed | b.listed,
            )
        gone = b.bank or frozenset()
        blocked = Blocklist(gone)

        def admits(phrase: tuple[int, ...]) -> bool:
            if not a.passes(phrase) or b.passes(phrase):
                return False
            text = clip.text.words.decode(phrase) if blocked else ""
            return not (blocked.find(text) or blocked.find_mark(text))

        return _Rules(a.phrases, admits, a.blocked | gone, a.bank, a.listed)

    def to_json(self) -> dict:
        return {
            "operation": self.operation,
            "left": self.left.to_json(),
            "right": self.right.to_json(),
        }


def _from_json(rules: dict, depth: int = 0) -> Vocabulary:
    if depth > _DEEPEST:
        raise ValueError(f"more than {_DEEPEST} are combined one in another")
    if "operation" not in rules:
        for name in ("only", "block"):
            # a string would be a path: files from strangers must not name other files to read
            if isinstance(rules.get(name), str):
                raise ValueError(f"{name!r} has to be a list")
        # before there was a dictionary, every whole word was allowed
        given: dict[str, Any] = {"dictionary": False} | rules
        return Vocabulary(**given)
    if rules["operation"] not in ("&", "|", "-"):
        raise ValueError(f"unknown operation {rules['operation']!r}")
    return _Combination(
        operation=rules["operation"],
        left=_from_json(rules["left"], depth + 1),
        right=_from_json(rules["right"], depth + 1),
    )


def _phrases(name: str, source: object) -> tuple[str, ...]:
    """Phrases of a list or of a text file, in order and once each."""
    if isinstance(source, (str, os.PathLike)):
        try:
            lines = Path(source).expanduser().read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError, RuntimeError) as error:  # also names that no file can have
            raise ArgumentError(
                name,
                f"names the file {str(source)[:200]!r}, which cannot be read ({error})",
                "give a text file, or a list for single words",
            ) from error
        # hashtags are phrases
        source = [line for line in lines if line.strip() != "#" and not line.startswith("# ")]
    if not isinstance(source, Iterable):
        raise ArgumentTypeError(name, f"has to be a path or a list of strings but is {source!r}")
    phrases = list(source)
    for phrase in phrases:
        if not isinstance(phrase, str):
            raise ArgumentTypeError(name, f"has to hold strings but holds {phrase!r}")
    return tuple(dict.fromkeys(phrase.strip() for phrase in phrases if phrase.strip()))


def _is_usable(clip: AnyClip, phrase: Sequence[int]) -> bool:
    trained = clip.trained_tokens is None or clip.trained_tokens.issuperset(phrase)
    fits = len(phrase) <= clip.text.max_prompt_len
    return trained and fits and clip.text.words.round_trips_inside(phrase)


def _dictionary(clip: AnyClip, default: Iterable[int]) -> Callable[[tuple[int, ...]], bool] | None:
    """The filter for words of the dictionary; None where a CLIP has none of them."""
    name, dictionary = "words of the dictionary", english_words()
    if name not in clip.cache:
        printed = ((i, clip.text.words.decode([i])) for i in default)
        clip.cache[name] = {i for i, word in printed if word == "," or word.lower() in dictionary}
    words = clip.cache[name]
    return (lambda phrase: len(phrase) == 1 and phrase[0] in words) if words else None


def _nothing_usable(clip: AnyClip, bank: Sequence[str], blocked: Blocklist) -> ArgumentError:
    words = [clip.text.words.decode([i]) for i in clip.vocabulary.tolist()]
    words = [word for word in words if not blocked.find(word)]
    near = difflib.get_close_matches(bank[0].lower(), words, n=3, cutoff=0)
    return ArgumentError(
        "only",
        f"holds {len(bank)} phrases, of which {clip.name} can use none: their tokens are not in "
        "its vocabulary, do not round-trip, or another rule forbids them, such as `block_unsafe`",
        f"words near {bank[0]!r} that it can use: {', '.join(near)}",
    )
