"""How well prompts read: their likelihood as text under a small language model.

A CLIP accepts word salad; a language model does not. One forward pass scores whole prompts
(`LanguageModel.readability_score`) or every word of a vocabulary at every position of a prompt
(`LanguageModel.screen`), which is fast enough for use inside a search.

All likelihoods are natural logarithms. The package transformers is imported when a model is
loaded. Nothing here caches a model: whoever loads one keeps it and passes it on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F

from .errors import ArgumentError
from .language_models import load_model

# Positions of one forward pass: the logits of 512 positions take 100 MB at 49,152 LM tokens.
_BATCH = 512
# Written without a space before it: marks, the ends of words like "it's", and hyphens.
_CLOSES = re.compile(r"[,.;:!?%)\]}…]+|'(s|t|re|ve|m|ll|d)|[-/]")
# Written without a space behind it.
_OPENS = re.compile(r"(?:^|\s)[(\[{#$@]+$|\w[-/]$")
_WORD_OR_MARK = re.compile(r"[^\W_]+(?:'[^\W_]+)?|[^\w\s]")
# Words and marks that good text repeats.
FUNCTION_WORDS = frozenset(
    re.findall(
        r"\S+",
        "a an and are as at be by for from has have he her his i in is it its my of on or our she "
        "that the their they this to was we were with you your , . ; : ! ? - / & ' \" ( )",
    )
)
# Cost of a repeated word: random words have a log-likelihood of -9 each, repeated ones of -1.
_REPEAT = 8.0


def as_written(prompt: str) -> str:
    """A decoded CLIP prompt with the spacing of written text, on which language models are trained.

    CLIP's tokenizer puts a space around everything: "a close - up of a cat , it 's sleeping"
    becomes "a close-up of a cat, it's sleeping". Spaces go before , . ; : ! ? % ) ] } and the like,
    after ( [ { # $ @, and on both sides of - and / between words. Case stays lower, and digits,
    which CLIP reads one by one, stay apart. Text in normal spacing is returned unchanged.
    """
    text = ""
    for word in prompt.split():
        space = "" if not text or _CLOSES.fullmatch(word) or _OPENS.search(text) else " "
        text += space + word
    return text


def repeated_share(text: str) -> float:
    """The share of the words of a text, from 0 to 1, that repeat earlier words.

    A word counts if it has occurred before, a number if any number has. Function words such as
    "the" and marks may occur again, but neither twice in a row nor behind the same word.
    """
    words = ["0" if w.isdigit() else w for w in _WORD_OR_MARK.findall(text.casefold())]
    earlier: set[str] = set()
    pairs: set[tuple[str, str]] = set()
    repeated = 0
    for before, word in zip(["", *words], words, strict=False):
        free = word in FUNCTION_WORDS and word != before and (before, word) not in pairs
        repeated += word in earlier and not free
        earlier.add(word)
        pairs.add((before, word))
    return repeated / max(1, len(words))


class WordTable:
    """The words of a vocabulary in the tokens of a language model; made by `LanguageModel.table`.

    Attributes:
        words: (vocabulary) the words.
        after_space: (vocabulary,) first LM token of each word behind a space, and (vocabulary,)
            the log-likelihood of its other LM tokens given the first ones and no other text; 0 for
            words of one LM token.
        without_space: the same for words without a space before them, as behind "(" and "-";
            computed at its first use.
    """

    def __init__(
        self, words: list[str], read: Callable[[bool], tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        self.words, self._read = words, read

    @cached_property
    def after_space(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._read(True)

    @cached_property
    def without_space(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._read(False)


class LanguageModel:
    """A causal language model that scores prompts.

    Texts are read behind `opening`, which is not scored itself. It prepares the model for a
    caption: with SmolLM2-135M the mean log-likelihoods of natural captions and of word salad are
    -4.0 and -8.8 behind "Image:", but -5.6 and -8.8 behind nothing.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        opening: text before each text; "" for none.

    Attributes:
        start: id of the LM token that begins a document: `<|endoftext|>` where the tokenizer has
            it (the BOS of chat models begins a turn instead), else BOS, else EOS.
        progress: called while a `table` is made, with the number of passes done and of all; what it
            raises ends that. None: nobody asks.
    """

    def __init__(self, model: torch.nn.Module, tokenizer, opening: str = "Image:") -> None:
        self.model, self.tokenizer, self.opening = model.eval(), tokenizer, opening
        vocabulary = tokenizer.get_vocab()
        special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
        first = vocabulary.get("<|endoftext|>")
        self.start = next(i for i in [first, *special] if i is not None)
        self._given = 1 + len(self._ids([opening])[0])
        after = len(self._ids(["a"])[0])
        stops = {i for ids in self._ids(["a.", "a\n"]) for i in ids[after : after + 1]}
        self._ends = sorted(stops | {i for i in [self.start, *special] if i is not None})
        self._table: WordTable | None = None
        self.progress: Callable[[int, int], object] | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def log_likelihoods(self, texts: Sequence[str]) -> torch.Tensor:
        """(n,) mean log-likelihood per LM token of n texts, which are read unchanged.

        Raises:
            ArgumentError: a text is empty.
        """
        return self._means(texts, end=False)

    def perplexity(self, texts: Sequence[str]) -> torch.Tensor:
        """(n,) `exp(-log_likelihoods)` of n texts."""
        return (-self.log_likelihoods(texts)).exp()

    def readability_score(self, prompts: Sequence[str]) -> torch.Tensor:
        """(n,) readability of decoded CLIP prompts; larger is better, in log-likelihood per token.

        A search for the mean log-likelihood alone has two cheap solutions. The first is
        repetition, which language models expect: over all words such a search ends in "0 0 0 1 1
        1 1 1". So 8 times `repeated_share` is subtracted. The second is a text that breaks off; so
        the end of the text counts like one more LM token (-0.8 after whole captions, -9 after "a
        brown dog sitting on the"). A search for this score ends in "a swipe of the torch and the
        light".

        SmolLM2-135M, mean (lowest to highest):

        | prompts                | mean log-likelihood  | this score             |
        |------------------------|----------------------|------------------------|
        | natural captions       | -4.0 (-6.1 to -2.8)  | -3.6 (-5.3 to -2.5)    |
        | word salad in order    | -6.9 (-8.9 to -5.5)  | -6.2 (-7.8 to -5.0)    |
        | word salad             | -8.8 (-10.1 to -7.2) | -9.8 (-12.6 to -7.3)   |
        | "a cat a cat a cat" &c | -5.1 (-7.9 to -3.4)  | -10.2 (-12.3 to -6.2)  |

        Raises:
            ArgumentError: a prompt is empty.
        """
        texts = [as_written(prompt) for prompt in prompts]
        repeated = torch.tensor([repeated_share(text) for text in texts], device=self.device)
        return self._means(texts, end=True) - _REPEAT * repeated

    def next_words(self, prefixes: Sequence[str], words: Sequence[str] | WordTable) -> torch.Tensor:
        """(prefixes, words) log-likelihood of each word as the next word of each text.

        Args:
            prefixes: texts, read unchanged; "" is the beginning.
            words: the words, or a `table` of them, which is faster for repeated calls.

        Raises:
            ArgumentError: no words, or one that is empty or has a space in it.
        """
        table = words if isinstance(words, WordTable) else self.table(words)
        rows = self._rows(prefixes)
        result = torch.empty(len(rows), len(table.words), device=self.device)
        for k, logits in self._logits(rows):
            result[k] = self._look_up(logits[-1:], prefixes[k : k + 1], table)
        return result

    def table(self, words: Sequence[str]) -> WordTable:
        """The words of a vocabulary, prepared for `screen` and `next_words`.

        A word of several LM tokens is scored by its first token in the text, plus an estimate for
        the others that does not depend on the text: their likelihood after the first ones at the
        beginning of a document (correlation with that in a text 0.85). With SmolLM2-135M in
        bfloat16 on one core a table takes 3 s for the 3,617 words of emoji-clip and 34 s for all
        34,277 of CLIP. The last table is kept on this object.

        Args:
            words: decoded CLIP tokens that are whole words or marks.

        Raises:
            ArgumentError: no words, or one that is empty or has a space in it.
        """
        words = list(words)
        if not words:
            raise ArgumentError("words", "is empty", "give at least one word")
        for word in words:
            if word.split() != [word]:
                raise ArgumentError("words", f"has to hold single words but holds {word!r}")
        if self._table is None or self._table.words != words:
            self._table = WordTable(words, partial(self._read, words))
            _ = self._table.after_space  # computed here, not in the first step of a search
        return self._table

    def screen(self, prompts: Sequence[Sequence[str]], table: WordTable) -> torch.Tensor:
        """(problems, positions, vocabulary) log-likelihoods of words given the text to their left.

        One forward pass over the prompts. Neither the text to the right nor `repeated_share`
        counts, so words that the prompt already holds rank high: leave them out, and compare the
        best few by the score of whole prompts.

        Args:
            prompts: for each problem the words at its positions, decoded CLIP tokens.
            table: the words to choose from.

        Raises:
            ArgumentError: the prompts are empty or differ in length.
        """
        positions = len(prompts[0]) if prompts else 0
        if positions == 0 or any(len(words) != positions for words in prompts):
            lengths = [len(words) for words in prompts]
            raise ArgumentError(
                "prompts",
                f"has to hold prompts of one length, at least 1, but they have {lengths} words",
            )
        left = [
            [as_written(" ".join(words[:i])) for i in range(positions + 1)] for words in prompts
        ]
        rows = [self._rows(texts) for texts in left]
        size = (len(prompts), positions, len(table.words))
        result = torch.empty(size, device=self.device)
        for k, logits in self._logits([texts[-1] for texts in rows]):
            # the LM tokens before a word are those that it shares with the text up to this word
            last = [_shared(before, rows[k][-1]) - 1 for before in rows[k][:-1]]
            result[k] = self._look_up(logits[last], left[k][:-1], table)
        return result

    def _look_up(self, logits: torch.Tensor, left: Sequence[str], table: WordTable) -> torch.Tensor:
        """(n, LM vocabulary) logits behind n texts -> (n, vocabulary) log-likelihoods of words."""
        log_p = logits.log_softmax(-1)
        rows = []
        for row, text in zip(log_p, left, strict=True):
            glue = _OPENS.search(text) if text else not self.opening
            first, rest = table.without_space if glue else table.after_space
            rows.append(row[first] + rest)
        return torch.stack(rows)

    def _read(self, words: list[str], spaced: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """First LM token and log-likelihood of the others, as in `WordTable`."""
        before = len(self._ids(["a"])[0]) if spaced else 0
        texts = [as_written(f"a {word}") if spaced else word for word in words]
        pieces = [ids[before:] for ids in self._ids(texts)]
        # words that differ in their last LM token only share a row
        same: dict[tuple[int, ...], list[int]] = {}
        for k, ids in enumerate(pieces):
            if len(ids) > 1:
                same.setdefault(tuple(ids[:-1]), []).append(k)
        groups = list(same.values())
        rest = torch.zeros(len(words), device=self.device)
        rows = [[self.start, *ids] for ids in same]
        for done, (number, logits) in enumerate(self._logits(rows)):
            if self.progress is not None:
                self.progress(done, len(rows))
            log_p = logits[1:].log_softmax(-1)
            others = torch.tensor([pieces[k][1:] for k in groups[number]], device=self.device)
            rest[groups[number]] = log_p.gather(-1, others.T).sum(0)
        return torch.tensor([ids[0] for ids in pieces], device=self.device), rest

    def _means(self, texts: Sequence[str], end: bool) -> torch.Tensor:
        """(n,) mean log-likelihoods; `end`: the end of the text counts as one more LM token."""
        rows, given = self._rows(texts), self._given
        for text, row in zip(texts, rows, strict=True):
            if len(row) <= given:
                raise ArgumentError("texts", f"has to hold texts with words, but one is {text!r}")
        result = torch.empty(len(rows), device=self.device)
        for k, logits in self._logits(rows):
            ids = torch.tensor(rows[k][given:], device=self.device)
            log_p = -F.cross_entropy(logits[given - 1 : -1], ids, reduction="none")
            if end:
                ends = logits[-1].log_softmax(-1)[self._ends].logsumexp(-1)
                log_p = torch.cat([log_p, ends[None]])
            result[k] = log_p.mean()
        return result

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def _rows(self, texts: Sequence[str]) -> list[list[int]]:
        """LM tokens of texts behind the start token and the opening."""
        space = " " if self.opening else ""
        whole = [self.opening + (space + text if text else "") for text in texts]
        return [[self.start, *ids] for ids in self._ids(whole)]

    @torch.no_grad()
    def _logits(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, torch.Tensor]]:
        """The number of each row and its (len(row), LM vocabulary) fp32 logits, in any order."""
        for batch in _batches([len(row) for row in rows]):
            length = max(len(rows[k]) for k in batch)
            # a causal model does not read to the right, so any token serves as padding
            padded = [[*rows[k], *[self.start] * (length - len(rows[k]))] for k in batch]
            ids = torch.tensor(padded, device=self.device)
            logits = self.model(ids, use_cache=False).logits
            for k, row in zip(batch, logits, strict=True):
                yield k, row[: len(rows[k])].float()


def load_language_model(
    name_or_path: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    download: bool = False,
) -> LanguageModel:
    """Load a language model that scores prompts.

    Every call loads the model anew: keep it and pass it as `language_model` to every search.

    Args:
        name_or_path, device, dtype, download: see `pez_core.language_models.load_model`.
            bfloat16 halves the time on processors that support it and changes scores by at most
            0.04.

    Raises:
        ArgumentError: no such model on this disk, a package is missing, or the files are damaged.
    """
    return LanguageModel(*load_model(name_or_path, device, dtype, download))


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of rows in batches of like lengths, at most `_BATCH` positions each."""
    batch: list[int] = []
    for k in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[k] > _BATCH:
            yield batch
            batch = []
        batch.append(k)
    if batch:
        yield batch


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of elements at which two sequences agree before they first differ."""
    differ = (k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differ, min(len(a), len(b)))
