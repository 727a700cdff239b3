"""Turns prompts, examples and labels into the tokens of a language model."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from string import Formatter
from typing import Any

import torch

from ..errors import ArgumentError, ArgumentTypeError, check_string

# An example: its text, or its columns by name, and its label.
Example = tuple["str | Mapping[str, str]", Hashable]

# Text put in front of a text so that it is tokenized as inside a running text.
_LEFT = "a"
# No token has more characters, so longer texts can be cut before they are tokenized.
_LONGEST = 256
# Marks in templates for T5 the place of the word that its decoder has to predict.
SENTINEL = "<extra_id_0>"


def columns_of(template: str) -> list[str]:
    """The columns that a template names, in its order.

    Raises:
        ArgumentError: it names none, or something that is not a plain column.
    """
    try:
        parts = [part[1:] for part in Formatter().parse(template)]
    except ValueError as error:
        raise ArgumentError(
            "template", f"is {template!r}, which is no valid template ({error})"
        ) from error
    names = [name for name, _, _ in parts if name is not None]
    plain = all(
        name.isidentifier() and not spec and not how
        for name, spec, how in parts
        if name is not None
    )
    if not names or not plain:
        raise ArgumentError(
            "template",
            f"is {template!r}",
            "it has to name a column, such as '{text} It was'",
        )
    return list(dict.fromkeys(names))


class Format:
    """Turns prompts, examples and labels into token ids.

    A model reads the special tokens that begin a text, the prompt, a space and the filled template,
    and then has to predict the word of a label. Special tokens stand where the tokenizer itself
    puts them: none for GPT-2, BOS for OPT and Gemma, `</s>` behind the text for T5.

    Args:
        tokenizer: of transformers.
        template: text with the columns of an example in braces, such as "{text} It was"; the word
            of the label follows.
        verbalizer: label -> word. The model's predictions are compared at the first token of each
            word in running text, as in the paper's code; the first tokens have to differ.
        max_length: tokens of a filled template, at least 1. In longer ones the longest column is
            cut at its end.

    Attributes:
        labels: the labels in the order of `verbalizer`.
        label_ids: first token of the word of each.
        before, after: special tokens that begin and end a text.
        columns: names of the columns in the template.

    Raises:
        ArgumentError: `template` is no text, has no plain column or is longer than `max_length`;
            `verbalizer` is no mapping from two or more labels to words, or two words begin with the
            same token.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        verbalizer: Mapping[Hashable, str],
        max_length: int = 128,
    ) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self._left = self._ids(_LEFT)
        whole = tokenizer(_LEFT)["input_ids"]
        at = next(k for k in range(len(whole)) if whole[k : k + len(self._left)] == self._left)
        self.before, self.after = whole[:at], whole[at + len(self._left) :]
        self._set_template(template)
        self._set_verbalizer(verbalizer)

    def _set_template(self, template: str) -> None:
        self.template = check_string("template", template).rstrip()
        self.columns = columns_of(template)
        empty = dict.fromkeys(self.columns, "")
        needed = max(len(self._encode(empty, prompted)) for prompted in (True, False))
        if needed > self.max_length:
            raise ArgumentError(
                "max_length", f"is {self.max_length}, but the `template` alone has {needed} tokens"
            )

    def _set_verbalizer(self, verbalizer: Mapping[Hashable, str]) -> None:
        if not isinstance(verbalizer, Mapping):
            raise ArgumentTypeError(
                "verbalizer", f"has to map labels to words but is {verbalizer!r}"
            )
        if len(verbalizer) < 2:
            raise ArgumentError(
                "verbalizer", f"has to hold two labels or more but is {verbalizer!r}"
            )
        first: dict[int, Hashable] = {}
        for label, word in verbalizer.items():
            if not isinstance(word, str) or not word.strip():
                raise ArgumentError(
                    "verbalizer", f"gives label {label!r} the word {word!r}", "give it text"
                )
            token = self.ids_inside_text(word.strip())[0]
            if token in first:
                raise ArgumentError(
                    "verbalizer",
                    f"gives the labels {first[token]!r} and {label!r} words that begin with the "
                    f"same token, {self.tokenizer.decode([token])!r}",
                    "choose words whose first tokens differ",
                )
            first[token] = label
        self.labels, self.label_ids = list(verbalizer), list(first)
        self._numbers = {label: k for k, label in enumerate(self.labels)}

    def number(self, label: Hashable) -> int:
        """Place of a label in `labels`.

        Raises:
            ArgumentError: the verbalizer has no word for it.
        """
        if not isinstance(label, Hashable):
            raise ArgumentTypeError(
                "dataset", f"has to hold labels that are numbers or text but holds {label!r}"
            )
        if label not in self._numbers:
            raise ArgumentError(
                "verbalizer",
                f"has no word for the label {label!r} of an example; it has words for "
                f"{', '.join(map(repr, self.labels))}",
            )
        return self._numbers[label]

    def encode_examples(
        self, examples: Sequence[Example], prompted: bool
    ) -> list[tuple[list[int], int]]:
        """Ids of each filled template and the number of its label.

        Args:
            examples: see `Example`.
            prompted: a prompt stands before them; otherwise they begin the text.
        """
        return [(self._fill(text, prompted), self.number(label)) for text, label in examples]

    def _fill(self, text: str | Mapping[str, str], prompted: bool) -> list[int]:
        if not isinstance(text, (str, Mapping)):
            raise ArgumentTypeError(
                "dataset",
                f"has to hold examples of text, or of columns of text, but holds {text!r}",
            )
        columns = {self.columns[0]: text} if isinstance(text, str) else dict(text)
        for name in self.columns:
            if not isinstance(columns.get(name), str):
                raise ArgumentError(
                    "template",
                    f"names the column {name!r}, but an example has {columns.get(name)!r} there; "
                    f"its columns are {', '.join(columns)}",
                )
        columns = {name: columns[name][: self.max_length * _LONGEST] for name in self.columns}
        ids = self._encode(columns, prompted)
        if not ids:
            raise ArgumentError(
                "template",
                f"is {self.template!r}, which leaves nothing of an example whose text is empty",
                "add words to it or leave such examples out",
            )
        return ids if len(ids) <= self.max_length else self._cut(columns, prompted)

    def _cut(self, columns: dict[str, str], prompted: bool) -> list[int]:
        """Ids with the longest column cut, and with shorter ones cut where that is not enough."""
        ids: list[int] = []
        for name in sorted(self.columns, key=lambda name: -len(columns[name])):
            whole, fits, too_long = columns[name], 0, len(columns[name])
            while too_long - fits > 1:
                middle = (fits + too_long) // 2
                columns[name] = whole[:middle]
                if len(self._encode(columns, prompted)) <= self.max_length:
                    fits = middle
                else:
                    too_long = middle
            columns[name] = whole[:fits]
            ids = self._encode(columns, prompted)
            if len(ids) <= self.max_length:
                break
        return ids

    def _encode(self, columns: Mapping[str, str], prompted: bool) -> list[int]:
        filled = self.template.format(**columns).strip()
        # lone surrogates, as in damaged data, cannot be encoded
        filled = filled.encode("utf-8", "replace").decode("utf-8")
        if not filled:
            return []
        return self.ids_inside_text(filled) if prompted else self._ids(filled)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of a printed prompt."""
        return self._ids(prompt)

    def decode(self, ids: Sequence[int]) -> str:
        """The printed prompt: decoded, without the space before its first word."""
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False).strip()

    def ids_inside_text(self, text: str) -> list[int]:
        """Ids of `text` inside a running text, behind a space."""
        return self._ids(f"{_LEFT} {text}")[len(self._left) :]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def whole_words(tokenizer: Any) -> torch.Tensor:
    """Sorted ids of the tokens that begin a word and round-trip through decoding and encoding.

    Such tokens can follow each other in any order: none fuses with the one before it. Only at the
    beginning of a text, without a space, a tokenizer may have another token for the same word.
    """
    ids = _plain(tokenizer)
    (left,) = tokenizer([_LEFT], add_special_tokens=False)["input_ids"]
    pairs = [[*left, token] for token in ids]
    texts = tokenizer.batch_decode(pairs, clean_up_tokenization_spaces=False)
    again = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor(
        [
            token
            for token, text, pair, read in zip(ids, texts, pairs, again, strict=True)
            if read == pair and text.startswith(f"{_LEFT} ") and text.split() == text.split(" ")
        ]
    )


def all_tokens(tokenizer: Any) -> torch.Tensor:
    """Sorted ids of all tokens that are not special."""
    return torch.tensor(_plain(tokenizer))


def _plain(tokenizer: Any) -> list[int]:
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return sorted(set(tokenizer.get_vocab().values()) - special)
