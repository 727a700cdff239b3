"""From token embeddings to CLIP text features, for which open_clip has no function.

open_clip's `encode_text` starts from ids. The towers here start from the embeddings of the learned
tokens. A causal tower runs over `prompt_len + 2` positions instead of the whole context, since
nothing behind the end token can change its features. The start token is computed once per search.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from open_clip.hf_model import HFTextEncoder
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import ResidualAttentionBlock
from torch import nn

from .. import tower_work
from ..errors import ArgumentError
from .matrices import BlockMatrices, Matrices, multiply

# A word that others are read behind.
_LEFT = "a"

# Tensors of the size of its input that a block keeps for the backward pass: two of norms, four of
# attention, one behind it, eight of the MLP; 14 because not all of them are copies.
_KEPT = 14
_AT_ONCE = 64  # words that are read as one text


class Words:
    """One interface for open_clip's two kinds of tokenizer: text to ids and back, nothing added.

    Attributes:
        special_ids: start, end and padding tokens; they never round-trip.
        size: the ids are those from 0 to `size - 1`.
        separable: tokens that round-trip alone do so side by side, too, as CLIP's own do.
        bare_start: a word that begins a text is another token than behind a space, as in Gemma's
            tokenizer, which puts no space before the first word. The tokens of a vocabulary are
            then those behind a space.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._hf = getattr(tokenizer, "tokenizer", None)
        inner = tokenizer if self._hf is None else self._hf
        self.special_ids = set(inner.all_special_ids)
        self.size: int = tokenizer.vocab_size if self._hf is None else len(inner)
        self.separable = self._hf is None
        self._left = self.encode(_LEFT)
        self.bare_start = self._hf is not None and self.encode_behind(f" {_LEFT}") != self._left
        self._round_trips_inside: dict[int, bool] = {}
        self._openings: dict[tuple[int, ...], tuple[int, ...] | None] = {}

    def equals(self, other: Words) -> bool:
        """Whether both are CLIP's own tokenizer, with the same vocabulary and the same cleaning.

        Then they encode and decode alike.
        """
        a, b = self.tokenizer, other.tokenizer
        return (
            type(a) is type(b) is SimpleTokenizer
            and a.clean_fn is b.clean_fn
            and a.encoder == b.encoder
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text` without start, end and padding tokens."""
        if self._hf is not None:
            return self._hf.encode(self.tokenizer.clean_fn(text), add_special_tokens=False)
        return self.tokenizer.encode(text)

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text; tokenizers of transformers are faster with all at once."""
        if self._hf is None or not texts:
            return list(map(self.encode, texts))
        cleaned = list(map(self.tokenizer.clean_fn, texts))
        return self._hf(cleaned, add_special_tokens=False)["input_ids"]

    def encode_behind(self, text: str) -> list[int]:
        """Ids of `text` behind a word; a space between them is part of `text`."""
        if self._hf is None:
            return self.encode(text)
        ids, left = self.encode(_LEFT + text), len(self._left)
        # a text that fuses with the word before it is read by itself
        return ids[left:] if ids[:left] == self._left else self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a prompt, without spaces at its ends."""
        if self._hf is not None:
            return self._hf.decode(list(ids)).strip()
        return self.tokenizer.decode(ids).strip()

    def round_trips(self, ids: Sequence[int]) -> bool:
        """Whether `encode(decode(ids)) == ids`, and none of them is a special token."""
        return self._are_plain(ids) and self.encode(self.decode(ids)) == list(ids)

    def _are_plain(self, ids: Sequence[int]) -> bool:
        """Whether all ids exist and none is a special token."""
        return not self.special_ids & set(ids) and all(0 <= i < self.size for i in ids)

    def round_trips_inside(self, ids: Sequence[int]) -> bool:
        """Whether a word or phrase round-trips inside a prompt, behind another word.

        Most tokenizers read a word alike everywhere; with `bare_start` the word has to be behind a
        space, which is part of its first token. Marks need no space.
        """
        if not self.bare_start:
            return self.round_trips(ids)
        whole = [*self._left, *ids]
        if not self._are_plain(ids) or not self._is_apart(self.decode(whole), ids):
            return False
        return self.round_trips(whole)

    def _is_apart(self, text: str, ids: Sequence[int]) -> bool:
        """Whether a word, in a text behind another word, has a space before it or needs none."""
        return text.startswith(f"{_LEFT} ") or not any(map(str.isalnum, self.decode(ids)))

    def openings(self, phrases: Iterable[Sequence[int]]) -> list[tuple[int, ...] | None]:
        """The tokens of phrases where they begin a text; None: a phrase cannot stand there.

        They are remembered from call to call.
        """
        found, wanted = self._openings, list(map(tuple, phrases))
        new = [phrase for phrase in dict.fromkeys(wanted) if phrase not in found]
        starts = self._encode_all([self.decode(phrase) for phrase in new])
        again = self._encode_all([self.decode(start) for start in starts])
        for phrase, start, same in zip(new, starts, again, strict=True):
            good = bool(start) and same == start and self._are_plain(start)
            found[phrase] = tuple(start) if good else None
        return [found[phrase] for phrase in wanted]

    def round_trip_ids(self, ids: Iterable[int]) -> list[int]:
        """Sorted `ids` of the tokens that are words by themselves; remembered from call to call.

        They round-trip inside a prompt. In CLIP's tokenizer these are whole words and punctuation,
        34,277 of 49,408 tokens: a word piece without its word end would fuse with its neighbour
        when it is printed.
        """
        found, ids = self._round_trips_inside, sorted(set(ids))
        if self.separable:
            self._read_together(i for i in ids if i not in found)
        left = self._left if self.bare_start else []
        new = [i for i in ids if i not in found and self._are_plain([i])]
        texts = [self.decode([*left, i]) for i in new]
        for i, text, same in zip(new, texts, self._encode_all(texts), strict=True):
            apart = not self.bare_start or self._is_apart(text, [i])
            found[i] = apart and same == [*left, i]
        return [i for i in ids if found.get(i)]

    def _read_together(self, ids: Iterable[int]) -> None:
        """Find most of the tokens that round-trip by reading many of them as one text.

        CLIP's tokenizer reads words between spaces independently, and its cleaning leaves ASCII
        text as it is, so that each token of a text that round-trips also does so alone.
        """
        words = []
        for i in ids:
            if not self._are_plain([i]):
                continue
            text = self.tokenizer.decode([i])
            if not text.endswith(" "):  # a piece: what is read always ends a word
                self._round_trips_inside[i] = False
            elif text.isascii():
                words.append((i, text.strip()))
        parts = [words[k : k + _AT_ONCE] for k in range(0, len(words), _AT_ONCE)]
        while parts:
            part = parts.pop()
            tokens = [i for i, _ in part]
            if self.encode(" ".join(text for _, text in part)) == tokens:
                self._round_trips_inside.update(dict.fromkeys(tokens, True))
            elif len(part) > 1:
                parts += [part[: len(part) // 2], part[len(part) // 2 :]]


class Encoder(Protocol):
    """Text features of learned tokens, between fixed ones."""

    def __call__(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(rows, prompt_len, width) token embeddings -> (rows, features), unnormalised."""
        ...

    def given(self, embeddings: torch.Tensor) -> Encoder:
        """An encoder of the remaining tokens, with the first tokens fixed.

        A causal tower computes the first ones here, once for all later calls.

        Args:
            embeddings: (problems, n, width) of the first n learned tokens.

        Returns:
            An encoder of the other tokens, of one or more prompts per problem; the prompts of a
            problem are consecutive rows.
        """
        ...


class TextTower:
    """Text features of an open_clip model from the embeddings of learned tokens.

    Args:
        model: an open_clip model (`CLIP`, `CustomTextCLIP` or `CoCa`).
        tokenizer: its public one; it adds start, end and padding to the learned tokens.

    Attributes:
        words: text to ids and back.
        max_prompt_len: tokens that the context holds beside start and end token.
        causal: no position can change the features of an earlier one.
        example_token: id of an ordinary word, for where some token is needed.
        ids_before, ids_behind: ids that the tokenizer puts around a text of one token.
        flops_per_token: operations of a pass through the blocks; see `pez_core.tower_work`.
        matrix_dtype: in which searches multiply by the matrices of a causal tower. None: that of
            the weights, or bfloat16 for a large float32 tower on a processor that measures faster
            in it. Features of texts, by `Clip.encode_texts`, are in the dtype of the weights.

    Raises:
        ArgumentError: the text tower is a Hugging Face model, or the tokenizer pads at the left.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        tower = getattr(model, "text", model)
        if isinstance(tower, HFTextEncoder):
            raise ArgumentError(
                "clip",
                "has a Hugging Face text tower, which takes ids only and cannot be searched",
                "choose a CLIP with open_clip's own text tower, like ViT-L-14",
            )
        self.tower: Any = tower
        self.words = Words(tokenizer)
        self.context_length = int(tower.context_length)
        # CLIP and TextTransformer have different names for the pooling rule
        self._pool = getattr(tower, "text_pool_type", None) or tower.pool_type
        self.causal = (
            tower.attn_mask is not None and self._cls is None and self._pool in ("argmax", "eos")
        )
        self._plain_blocks = self.causal and all(
            type(block) is ResidualAttentionBlock for block in tower.transformer.resblocks
        )
        self.matrix_dtype: torch.dtype | None = None
        self._matrices = Matrices(tower.transformer.resblocks)
        # The ids around a prompt, from the row that the public tokenizer makes of one token.
        word = self.words.encode("a")
        row = tokenizer(["a"])[0].tolist()
        start = next(i for i in range(len(row)) if row[i : i + len(word)] == word)
        self._check_padding(tokenizer, row, start, word)
        self.example_token = word[0]
        # lists, since tensors would stay behind when the model moves to another device
        self.ids_before, self.ids_behind = row[:start], row[start + len(word) :]
        self.max_prompt_len = self.context_length - start - 1  # one place is the end token's
        blocks = [p for p in tower.transformer.parameters() if p.ndim > 1]  # matrices
        self.flops_per_token = 2.0 * sum(p.numel() for p in blocks)

    @staticmethod
    def _check_padding(tokenizer: Any, row: list[int], start: int, word: list[int]) -> None:
        """Raise where what stands before a text depends on its length."""
        longer = tokenizer(["a a"])[0].tolist()
        if longer[: start + len(word)] != row[: start + len(word)]:
            raise ArgumentError(
                "clip",
                "has a tokenizer that puts padding before the text, where prompts cannot be "
                "searched",
                "let its tokenizer pad at the right, as in `padding_side` of its config",
            )

    @property
    def token_embedding(self) -> torch.Tensor:
        """(vocab_size, width) embedding table."""
        return self.tower.token_embedding.weight

    @property
    def _cls(self) -> torch.Tensor | None:
        """CoCa's class token, which loading weights may replace; None: the tower has none."""
        return getattr(self.tower, "cls_emb", None)

    @property
    def parts(self) -> list[tuple[int, float]]:
        """Columns and weight of each encoder in the table, of which there is one."""
        return [(self.token_embedding.shape[1], 1.0)]

    def encoder(
        self,
        fixed: Sequence[tuple[Sequence[int], Sequence[int]]] = (((), ()),),
        inserts: Sequence[tuple[int, Sequence[int]]] = (),
    ) -> Encoder:
        """The tower as a function of the learned tokens alone.

        Where the tower is causal and the fixed text is the same for all rows, the keys and values
        before the learned tokens do not depend on them and are computed here, once. Make a new
        encoder after a change of the weights.

        Args:
            fixed: ids before and behind the learned tokens, without start and end token; one pair
                for all rows, or one pair per row.
            inserts: ids between learned tokens, in order, each behind as many learned ones as its
                number.

        Returns:
            (rows, prompt_len, width) token embeddings -> (rows, features), unnormalised.
        """
        if inserts:
            embedded = [(place, self._embed(self._ids(ids))[None]) for place, ids in inserts]
            return _InterleavedEncoder(self.encoder(fixed), embedded)
        if len(fixed) > 1 or not self._plain_blocks:
            return _FullEncoder(self, fixed)
        before = self._embed(self._ids([*self.ids_before, *fixed[0][0]]))[None]
        after = self._embed(self._ids([*fixed[0][1], *self.ids_behind[:1]]))
        blocks = self.tower.transformer.resblocks
        layers = list(zip(blocks, self._matrices(self.matrix_dtype), strict=True))
        return _CausalEncoder(self, layers, after, 0, [None] * len(layers)).given(before)

    def encoder_of_contexts(
        self, contexts: Sequence[tuple[Sequence[int], Sequence[int], tuple[int, int]]]
    ) -> Encoder:
        """The mean feature of several contexts, by their tokens, as a function of the learned ones.

        That is the feature of `Clip.encode_chunks`.

        Args:
            contexts: of each the ids before and behind the learned tokens, the first of the learned
                tokens that it holds, and the one behind the last.
        """
        parts, constant = [], torch.zeros((), device=self.token_embedding.device)
        for before, after, learned in contexts:
            encode = self.encoder([(before, after)])
            tokens = len(before) + len(after) + learned[1] - learned[0]
            if learned[0] == learned[1]:
                nothing = self._embed(self._ids([]))[None]
                with torch.no_grad():
                    constant = constant + _weighted(encode, nothing, tokens)
            else:
                parts.append((encode, learned, tokens))
        return _ContextsEncoder(parts, constant)

    def memory_per_prompt(self, prompt_len: int) -> int:
        """About how many bytes a step holds for each prompt until its gradient is computed.

        That is what the blocks keep for the backward pass. A search also needs the memory of the
        weights and of the allowed vocabulary, whatever the number of prompts.
        """
        blocks = len(self.tower.transformer.resblocks)
        positions = prompt_len + 1 if self._plain_blocks else self.context_length
        width, size = self.token_embedding.shape[1], self.token_embedding.element_size()
        return _KEPT * blocks * positions * width * size

    def count(self, rows: int, positions: int, backward: bool = False) -> None:
        """Count a pass through the blocks, and the backward pass that follows it."""
        tower_work.count(self.flops_per_token * rows * positions * (2 if backward else 1))

    def _mask(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor | None:
        """The additive attention mask that the tower's own forward would use for these ids."""
        tower, length = self.tower, x.shape[1]
        mask = tower.attn_mask
        if mask is not None:
            mask = mask[:length, :length].to(x.dtype)
        if self._cls is not None:
            padding = tower._build_additive_mask(ids, length, x.dtype)
            mask = padding if mask is None else mask + padding
        return mask

    def _ids(self, ids: Sequence) -> torch.Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self.token_embedding.device)

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        table = self.token_embedding.detach()
        dtype = self.tower.transformer.get_cast_dtype()
        return F.embedding(ids.to(table.device), table).to(dtype)

    def _positions(self, start: int, length: int) -> torch.Tensor:
        positions = self.tower.positional_embedding[start : start + length].detach()
        return positions.to(self.tower.transformer.get_cast_dtype())

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        projection = self.tower.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection.detach()

    def __call__(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(rows, prompt_len, width) token embeddings -> (rows, features), unnormalised."""
        return self.encoder()(embeddings)


class _ContextsEncoder:
    """The sum of the unit features of several contexts, each times its number of tokens.

    Args:
        parts: the encoder, the learned tokens and the number of tokens of each context that holds
            learned tokens.
        constant: the sum for all others; one row, or one for each problem.
    """

    def __init__(
        self, parts: Sequence[tuple[Encoder, tuple[int, int], int]], constant: torch.Tensor
    ) -> None:
        self.parts, self.constant = parts, constant

    def __call__(self, embeddings: torch.Tensor) -> torch.Tensor:
        total = self.constant
        if total.ndim == 2:
            total = total.repeat_interleave(len(embeddings) // len(total), dim=0)
        for encode, (first, last), tokens in self.parts:
            total = total + _weighted(encode, embeddings[:, first:last], tokens)
        return total.expand(len(embeddings), -1)

    @torch.no_grad()
    def given(self, embeddings: torch.Tensor) -> Encoder:
        """As `Encoder.given`."""
        n, constant, parts = embeddings.shape[1], self.constant, []
        for encode, (first, last), tokens in self.parts:
            if last <= n:
                constant = constant + _weighted(encode, embeddings[:, first:last], tokens)
                continue
            if first < n:
                encode = encode.given(embeddings[:, first:n])
            parts.append((encode, (max(first - n, 0), last - n), tokens))
        return _ContextsEncoder(parts, constant)


def _weighted(encode: Encoder, embeddings: torch.Tensor, tokens: int) -> torch.Tensor:
    return tokens * F.normalize(encode(embeddings).float(), dim=-1)


class _InterleavedEncoder:
    """An encoder of learned tokens with fixed ones in between.

    Args:
        encode: of all of them.
        inserts: the number of learned tokens before each stretch of fixed ones, in order, and its
            (1, n, width) embeddings.
    """

    def __init__(self, encode: Encoder, inserts: Sequence[tuple[int, torch.Tensor]]) -> None:
        self.encode, self.inserts = encode, inserts

    def _filled(self, embeddings: torch.Tensor, inserts: Sequence) -> torch.Tensor:
        parts, start = [], 0
        for place, fixed in inserts:
            fixed = fixed.to(embeddings.dtype).expand(len(embeddings), -1, -1)
            parts += [embeddings[:, start:place], fixed]
            start = place
        return torch.cat([*parts, embeddings[:, start:]], dim=1)

    def __call__(self, embeddings: torch.Tensor) -> torch.Tensor:
        return self.encode(self._filled(embeddings, self.inserts))

    def given(self, embeddings: torch.Tensor) -> Encoder:
        """As `Encoder.given`."""
        n = embeddings.shape[1]
        before = [(place, fixed) for place, fixed in self.inserts if place < n]
        left = [(place - n, fixed) for place, fixed in self.inserts if place >= n]
        return _InterleavedEncoder(self.encode.given(self._filled(embeddings, before)), left)


class _CausalEncoder:
    """A causal tower over the learned tokens and those behind them, up to the end token.

    Args:
        text: the text tower.
        layers: its blocks, and their matrices in the dtype to multiply in.
        after: (n, width) embeddings behind the learned tokens; the end token is the last one.
        start: number of positions before the learned tokens.
        past: keys and values of these in each block; None where there are no such positions.
    """

    def __init__(
        self,
        text: TextTower,
        layers: list[tuple[Any, BlockMatrices]],
        after: torch.Tensor,
        start: int,
        past: list,
    ) -> None:
        self.text, self.layers = text, layers
        self.after, self.start, self.past = after, start, past

    def __call__(self, embeddings: torch.Tensor) -> torch.Tensor:
        tower, after = self.text.tower, self.after.expand(len(embeddings), -1, -1)
        x = torch.cat([embeddings.to(after.dtype), after], dim=1)
        self.text.count(*x.shape[:2], backward=x.requires_grad)
        x = x + self.text._positions(self.start, x.shape[1])
        mask = self._mask(x)
        *layers, last = zip(self.layers, self.past, strict=True)
        for layer, keys_values in layers:
            x, _ = _causal_block(*layer, x, mask, keys_values)
        x, _ = _causal_block(*last[0], x, mask[-1:], last[1], only_last=True)
        return self.text._project(tower.ln_final(x)[:, 0])

    def _mask(self, x: torch.Tensor) -> torch.Tensor:
        """(length, start + length) positions that each position of x attends to, in all blocks."""
        shape = x.shape[1], self.start + x.shape[1]
        return torch.ones(shape, dtype=torch.bool, device=x.device).tril(self.start)

    @torch.no_grad()
    def given(self, embeddings: torch.Tensor) -> _CausalEncoder:
        past, length = [], embeddings.shape[1]
        if length == 0:
            return self
        self.text.count(len(embeddings), length)
        x = embeddings.to(self.after.dtype) + self.text._positions(self.start, length)
        mask = self._mask(x)
        for layer, before in zip(self.layers, self.past, strict=True):
            x, keys_values = _causal_block(*layer, x, mask, before)
            past.append(keys_values)
        return _CausalEncoder(self.text, self.layers, self.after, self.start + length, past)


class _FullEncoder:
    """The tower over all positions, for any mask and for rows with different fixed text."""

    def __init__(
        self, text: TextTower, fixed: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> None:
        self.text, self.fixed = text, fixed
        self._layout: tuple[int, tuple[torch.Tensor, ...]] | None = None

    def __call__(self, embeddings: torch.Tensor) -> torch.Tensor:
        text, tower, (rows, prompt_len, _) = self.text, self.text.tower, embeddings.shape
        if self._layout is None or self._layout[0] != prompt_len:  # equal in all steps of a search
            self._layout = prompt_len, self._lay_out(prompt_len)
        ids, firsts, ends = (part.expand(rows, *part.shape[1:]) for part in self._layout[1])
        every = torch.arange(rows, device=ids.device)
        places = firsts[:, None] + torch.arange(prompt_len, device=ids.device)

        x = text._embed(ids)
        x = x.index_put((every[:, None], places), embeddings.to(x.dtype))
        if text._cls is not None:
            x = torch.cat([x, text._cls.detach().to(x.dtype).expand(rows, 1, -1)], dim=1)
        text.count(*x.shape[:2], backward=x.requires_grad)
        x = x + text._positions(0, x.shape[1])
        x = tower.ln_final(tower.transformer(x, attn_mask=text._mask(x, ids)))
        if text._cls is not None or text._pool == "last":
            return text._project(x[:, -1])
        return text._project(x[:, 0] if text._pool == "first" else x[every, ends])

    def given(self, embeddings: torch.Tensor) -> Encoder:
        return _PrefixedEncoder(self, embeddings)

    def _lay_out(self, prompt_len: int) -> tuple[torch.Tensor, ...]:
        """(rows, length) ids, (rows,) first learned positions and (rows,) end positions."""
        text, start = self.text, len(self.text.ids_before)
        # any id but padding can stand for the learned ones: masks depend on padding alone
        texts = [[*b, *[text.example_token] * prompt_len, *a] for b, a in self.fixed]
        # without a causal mask the padding takes part, and the context has to be filled up
        length = max(map(len, texts)) + 1 if text.causal else text.context_length - start
        return (
            text._ids([text.ids_before + (row + text.ids_behind)[:length] for row in texts]),
            text._ids([start + len(before) for before, _ in self.fixed]),
            text._ids([start + len(row) for row in texts]),
        )


class _PrefixedEncoder:
    """An encoder with fixed first tokens, which it computes again in every call."""

    def __init__(self, encode: Encoder, embeddings: torch.Tensor) -> None:
        self.encode, self.embeddings = encode, embeddings

    def __call__(self, embeddings: torch.Tensor) -> torch.Tensor:
        first = self.embeddings.repeat_interleave(len(embeddings) // len(self.embeddings), dim=0)
        return self.encode(torch.cat([first, embeddings], dim=1))

    def given(self, embeddings: torch.Tensor) -> _PrefixedEncoder:
        return _PrefixedEncoder(self, embeddings)


def _causal_block(
    block: Any,
    matrices: BlockMatrices,
    x: torch.Tensor,
    mask: torch.Tensor,
    past: tuple[torch.Tensor, torch.Tensor] | None = None,
    only_last: bool = False,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """One pre-norm transformer block; with `only_last` only the output at the last position.

    The same sums as the block's own forward, behind earlier keys and values.

    Args:
        block: an open_clip `ResidualAttentionBlock`.
        matrices: its matrices.
        x: (problems, length, width) input.
        mask: of the positions whose output is wanted.
        past: keys and values of the positions before `x`.
        only_last: for the last block, of which no other position is used.

    Returns:
        (problems, length, width) output, and (problems, heads, length, width / heads) keys and
        values.
    """
    heads, width = block.attn.num_heads, block.attn.embed_dim
    normed, (weight, bias) = block.ln_1(x), matrices.read
    if only_last:
        below = weight[width:], bias[width:]
        keys, values = _heads(multiply(normed, below).to(x.dtype), heads, 2)
        x, first = x[:, -1:], (weight[:width], bias[:width])
        (query,) = _heads(multiply(normed[:, -1:], first).to(x.dtype), heads, 1)
    else:
        query, keys, values = _heads(multiply(normed, matrices.read).to(x.dtype), heads, 3)
    if past is not None:
        keys, values = (
            torch.cat([_for_rows(before, len(x)), now], dim=2)
            for before, now in zip(past, (keys, values), strict=True)
        )
    mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    mixed = multiply(mixed.transpose(1, 2).reshape(x.shape), matrices.mix).to(x.dtype)
    x = x + block.ls_1(mixed)
    wide = block.mlp.gelu(multiply(block.ln_2(x), matrices.widen))
    return x + block.ls_2(multiply(wide, matrices.narrow).to(x.dtype)), (keys, values)


def _for_rows(before: torch.Tensor, rows: int) -> torch.Tensor:
    """(problems, ...) keys or values -> (rows, ...), those of each problem for all of its rows."""
    if len(before) == 1:
        return before.expand(rows, -1, -1, -1)
    return before.repeat_interleave(rows // len(before), dim=0)


def _heads(x: torch.Tensor, heads: int, parts: int) -> torch.Tensor:
    """(problems, length, parts * width) -> (parts, problems, heads, length, width / heads)."""
    problems, length, _ = x.shape
    return x.view(problems, length, parts, heads, -1).permute(2, 0, 3, 1, 4)
