"""What a language model reads for an example, and the words that stand for labels."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from string import Formatter
from typing import Any

import torch

# An example: its text, or its columns by name, and its label.
Example = tuple["str | Mapping[str, str]", Hashable]

# Stands in for what is to the left while something in running text is tokenized.
_LEFT = "a"
# No token has more characters, so that texts beyond so many of them need not be looked at.
_LONGEST = 256
# Where the templates of T5 have the word that its decoder is to say.
SENTINEL = "<extra_id_0>"


def columns_of(template: str) -> list[str]:
    """The columns that a template names, in its order.

    Raises:
        ValueError: it names none, or something that is not a plain column.
    """
    try:
        parts = [part for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(
            f"`template` is {template!r}, which is cut or damaged: {error}."
        ) from error
    names = [name for _, name, _, _ in parts]
    plain = all(n.isidentifier() and not spec and not how for _, n, spec, how in parts)
    if not names or not plain:
        raise ValueError(
            f"`template` is {template!r}; it has to name a column, such as '{{text}} It was'."
        )
    return list(dict.fromkeys(names))


class Format:
    """Turns prompts, examples and labels into token ids.

    A model reads the special tokens that begin a text, the prompt, a space, the filled template,
    and then has to say the word of a label. Special tokens come where the tokenizer itself puts
    them, so none for GPT-2, BOS for OPT and Gemma, `</s>` behind the text for T5.

    Args:
        tokenizer: of transformers.
        template: text with the columns of an example in braces, such as "{text} It was"; the word
            of the label follows.
        verbalizer: label -> word. What is compared is the first token of each word in running text,
            as in the paper's code; the first tokens have to differ.
        max_length: tokens of a filled template, at least 1. Longer ones lose the end of their
            longest column.

    Attributes:
        labels: the labels in the order of `verbalizer`.
        label_ids: first token of the word of each.
        before, after: special tokens that begin and end a text.
        columns: names of the columns in the template.

    Raises:
        TypeError: `template` is no text, or `verbalizer` no mapping from labels to text.
        ValueError: a template without a plain column or longer than `max_length`; fewer than two
            labels, a word that is empty, or words that begin with the same token.
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
        if not isinstance(template, str):
            raise TypeError(f"`template` has to be text but is {template!r}.")
        self.template = template.rstrip()
        self.columns = columns_of(template)
        nothing = dict.fromkeys(self.columns, "")
        needed = max(len(self._encode(nothing, prompted)) for prompted in (True, False))
        if needed > self.max_length:
            raise ValueError(
                f"`max_length` is {self.max_length}, but the template alone has {needed} tokens."
            )

    def _set_verbalizer(self, verbalizer: Mapping[Hashable, str]) -> None:
        if not isinstance(verbalizer, Mapping):
            raise TypeError(f"`verbalizer` has to map labels to words but is {verbalizer!r}.")
        if len(verbalizer) < 2:
            raise ValueError(f"`verbalizer` has to have two labels or more but is {verbalizer!r}.")
        first: dict[int, Hashable] = {}
        for label, word in verbalizer.items():
            if not isinstance(word, str) or not word.strip():
                raise ValueError(
                    f"`verbalizer` gives label {label!r} the word {word!r}; give it text."
                )
            token = self.continuation(word.strip())[0]
            if token in first:
                raise ValueError(
                    f"`verbalizer` gives the labels {first[token]!r} and {label!r} words that "
                    f"begin with the same token, {self.tokenizer.decode([token])!r}; choose words "
                    "that differ from their first token on."
                )
            first[token] = label
        self.labels, self.label_ids = list(verbalizer), list(first)
        self._numbers = {label: k for k, label in enumerate(self.labels)}

    def number(self, label: Hashable) -> int:
        """Place of a label in `labels`.

        Raises:
            ValueError: the verbalizer has no word for it.
        """
        if not isinstance(label, Hashable):
            raise TypeError(f"A label has to be a number or text but is {label!r}.")
        if label not in self._numbers:
            raise ValueError(
                f"The examples have the label {label!r}, for which `verbalizer` has no word; it "
                f"has {', '.join(map(repr, self.labels))}."
            )
        return self._numbers[label]

    def read(self, examples: Sequence[Example], prompted: bool) -> list[tuple[list[int], int]]:
        """Ids of each filled template and the number of its label.

        Args:
            examples: see `Example`.
            prompted: a prompt stands before them; else they begin the text.
        """
        return [(self._fill(text, prompted), self.number(label)) for text, label in examples]

    def _fill(self, text: str | Mapping[str, str], prompted: bool) -> list[int]:
        if not isinstance(text, (str, Mapping)):
            raise TypeError(f"An example has to have text, or columns of it, but has {text!r}.")
        columns = {self.columns[0]: text} if isinstance(text, str) else dict(text)
        for name in self.columns:
            if not isinstance(columns.get(name), str):
                raise ValueError(
                    f"`template` names the column {name!r}, but an example has "
                    f"{columns.get(name)!r} there; its columns are {', '.join(columns)}."
                )
        columns = {name: columns[name][: self.max_length * _LONGEST] for name in self.columns}
        ids = self._encode(columns, prompted)
        if not ids:
            raise ValueError(
                f"`template` is {self.template!r}, which leaves nothing of an example whose text "
                "is empty; add words to it or leave such examples out."
            )
        # the longest column first; where it does not do to leave it out, the others, too
        for name in sorted(self.columns, key=lambda name: -len(columns[name])):
            if len(ids) <= self.max_length:
                break
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
        return ids

    def _encode(self, columns: Mapping[str, str], prompted: bool) -> list[int]:
        filled = self.template.format(**columns).strip()
        # halves of surrogate pairs, which damaged data have, cannot be encoded
        filled = filled.encode("utf-8", "replace").decode("utf-8")
        if not filled:
            return []
        return self.continuation(filled) if prompted else self._ids(filled)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of a prompt as it is printed."""
        return self._ids(prompt)

    def print(self, ids: Sequence[int]) -> str:
        """A prompt as people get it: decoded, without the space before its first word."""
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False).strip()

    def continuation(self, text: str) -> list[int]:
        """Ids of `text` in running text, behind a space."""
        return self._ids(f"{_LEFT} {text}")[len(self._left) :]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def whole_words(tokenizer: Any) -> torch.Tensor:
    """Ids, in rising order, of the tokens that begin a word and are read back as they are printed.

    Such tokens may stand in any order: none fuses with the one before it. Only at the beginning of
    a text, where there is no space, a tokenizer may have another token for the same word.
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
    """Ids, in rising order, of all tokens that are not special."""
    return torch.tensor(_plain(tokenizer))


def _plain(tokenizer: Any) -> list[int]:
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return sorted(set(tokenizer.get_vocab().values()) - special)
