"""From token embeddings to CLIP text features: the way into open_clip's text towers that they lack.

open_clip's `encode_text` starts from ids. Here it starts from the embeddings of the learned tokens,
and where the tower is causal it runs over `prompt_len + 2` positions instead of the whole context:
what follows the end token cannot reach it. The start token's position is computed once per search.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from open_clip.hf_model import HFTextEncoder
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import ResidualAttentionBlock
from torch import nn

# Numbers of the size of its input that a block keeps for the way back: two of norms, four of
# attention, one behind it, eight of the MLP; fewer where none of them is copied.
_KEPT = 14


class Words:
    """One face for open_clip's two kinds of tokenizer: text to ids, ids to text, nothing added.

    Attributes:
        special_ids: start, end and padding tokens; they never survive.
        size: ids from 0 to `size - 1` are known.
        separable: tokens that survive alone survive side by side too, as CLIP's own do.
    """

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self._hf = getattr(tokenizer, "tokenizer", None)
        inner = tokenizer if self._hf is None else self._hf
        self.special_ids = set(inner.all_special_ids)
        self.size = tokenizer.vocab_size if self._hf is None else len(inner)
        self.separable = self._hf is None
        # tokenizers of the same vocabulary, cleaning and kind do the same
        self._same = (
            (type(tokenizer), tokenizer.clean_fn, tuple(tokenizer.encoder))
            if type(tokenizer) is SimpleTokenizer
            else id(tokenizer)
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Words) and self._same == other._same

    def __hash__(self) -> int:
        return hash(self._same)

    def encode(self, text: str) -> list[int]:
        """Ids of `text` without start, end and padding tokens."""
        if self._hf is not None:
            return self._hf.encode(self.tokenizer.clean_fn(text), add_special_tokens=False)
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text that people see; to survive means `encode(decode(ids)) == ids`."""
        if self._hf is not None:
            return self._hf.decode(list(ids)).strip()
        return self.tokenizer.decode(ids).strip()

    def survives(self, ids: Sequence[int]) -> bool:
        """Whether the printed text means these very tokens, none of them a special one."""
        if self.special_ids & set(ids) or not all(0 <= i < self.size for i in ids):
            return False
        return self.encode(self.decode(ids)) == list(ids)


class Encoder(Protocol):
    """Text features of learned tokens, between fixed ones."""

    def __call__(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(rows, prompt_len, width) token embeddings -> (rows, features), unnormalised."""

    def given(self, embeddings: torch.Tensor) -> Encoder:
        """The encoder of what follows the first learned tokens.

        A causal tower looks at those here, once, and no more.

        Args:
            embeddings: (problems, n, width) of the first n learned tokens.

        Returns:
            An encoder of the other tokens of one or more prompts per problem, all those of a
            problem in a row.
        """


class TextTower:
    """Text features of an open_clip model from the embeddings of learned tokens.

    Args:
        model: an open_clip model (`CLIP`, `CustomTextCLIP` or `CoCa`).
        tokenizer: its public tokenizer; it decides what stands around the learned tokens.

    Attributes:
        words: text to ids and back.
        max_prompt_len: tokens that the context holds beside start and end token.
        causal: what follows the end token cannot reach it.
        known_word: id of an ordinary word.

    Raises:
        ValueError: the text tower is a Hugging Face model.
    """

    def __init__(self, model: nn.Module, tokenizer) -> None:
        tower = getattr(model, "text", model)
        if isinstance(tower, HFTextEncoder):
            raise ValueError(
                "`clip` has a Hugging Face text tower, which takes ids only and cannot be "
                "searched; choose a CLIP with open_clip's own text tower, like ViT-L-14."
            )
        self.tower = tower
        self.words = Words(tokenizer)
        self.context_length = int(tower.context_length)
        # CLIP keeps the pooling rule under other names than TextTransformer does
        self._pool = getattr(tower, "text_pool_type", None) or tower.pool_type
        self._cls = getattr(tower, "cls_emb", None)
        self.causal = (
            tower.attn_mask is not None and self._cls is None and self._pool in ("argmax", "eos")
        )
        self._plain_blocks = self.causal and all(
            type(block) is ResidualAttentionBlock for block in tower.transformer.resblocks
        )
        # Positions around the prompt, from the row the public tokenizer makes of a known word.
        word = self.words.encode("a")
        row = tokenizer(["a"])[0].tolist()
        start = next(i for i in range(len(row)) if row[i : i + len(word)] == word)
        self.known_word = word[0]
        # lists, so that nothing is left behind when the model moves to another device
        self._before, self._after = row[:start], row[start + len(word) :]
        self.max_prompt_len = self.context_length - start - 1  # one place is the end token's

    @property
    def token_embedding(self) -> torch.Tensor:
        """(vocab_size, width) embedding table."""
        return self.tower.token_embedding.weight

    @property
    def parts(self) -> list[tuple[int, float]]:
        """Columns and weight of each encoder in the table, of which there is one."""
        return [(self.token_embedding.shape[1], 1.0)]

    def encoder(
        self, fixed: Sequence[tuple[Sequence[int], Sequence[int]]] = (((), ()),)
    ) -> Encoder:
        """The tower as a function of the learned tokens alone.

        Where the tower is causal and the fixed text is the same for all rows, keys and values of
        what stands before the learned tokens do not depend on them and are computed here, once. The
        function is good for as long as the weights stay as they are.

        Args:
            fixed: ids before and behind the learned tokens, without start and end token; one pair
                for all rows, or one pair per row.

        Returns:
            (rows, prompt_len, width) token embeddings -> (rows, features), unnormalised.
        """
        if len(fixed) > 1 or not self._plain_blocks:
            return _Whole(self, fixed)
        before = self._embed(self._ids([*self._before, *fixed[0][0]]))[None]
        after = self._embed(self._ids([*fixed[0][1], *self._after[:1]]))
        nothing = _Causal(self, after, 0, [None] * len(self.tower.transformer.resblocks))
        return nothing.given(before)

    def memory_per_prompt(self, prompt_len: int) -> int:
        """About how many bytes a step holds for each prompt until its gradient is there.

        What the blocks keep for the way back; beside it a search takes what the weights and the
        allowed vocabulary take, whatever the number of prompts.
        """
        blocks = len(self.tower.transformer.resblocks)
        positions = prompt_len + 1 if self._plain_blocks else self.context_length
        width, size = self.token_embedding.shape[1], self.token_embedding.element_size()
        return _KEPT * blocks * positions * width * size

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


class _Causal:
    """The tower over learned tokens and what is behind them, by causal blocks alone.

    Args:
        text: whose tower.
        after: (n, width) embeddings of what is behind the learned tokens, the end token the last.
        start: positions that precede the learned tokens.
        past: keys and values of these in each block; None where nothing precedes.
    """

    def __init__(self, text: TextTower, after: torch.Tensor, start: int, past: list) -> None:
        self.text, self.after, self.start, self.past = text, after, start, past

    def __call__(self, embeddings: torch.Tensor) -> torch.Tensor:
        tower, after = self.text.tower, self.after.expand(len(embeddings), -1, -1)
        x = torch.cat([embeddings.to(after.dtype), after], dim=1)
        x = x + self.text._positions(self.start, x.shape[1])
        mask = self._mask(x)
        *blocks, last = zip(tower.transformer.resblocks, self.past, strict=True)
        for block, keys_values in blocks:
            x, _ = _causal_block(block, x, mask, keys_values)
        x, _ = _causal_block(last[0], x, mask[-1:], last[1], only_last=True)
        return self.text._project(tower.ln_final(x)[:, 0])

    def _mask(self, x: torch.Tensor) -> torch.Tensor:
        """(length, start + length) what each position of x may look at; one for all blocks."""
        shape = x.shape[1], self.start + x.shape[1]
        return torch.ones(shape, dtype=torch.bool, device=x.device).tril(self.start)

    @torch.no_grad()
    def given(self, embeddings: torch.Tensor) -> _Causal:
        past, length = [], embeddings.shape[1]
        if length == 0:
            return self
        x = embeddings.to(self.after.dtype) + self.text._positions(self.start, length)
        mask = self._mask(x)
        for block, before in zip(self.text.tower.transformer.resblocks, self.past, strict=True):
            x, keys_values = _causal_block(block, x, mask, before)
            past.append(keys_values)
        return _Causal(self.text, self.after, self.start + length, past)


class _Whole:
    """The tower over every position, for any mask and for rows of different fixed text."""

    def __init__(
        self, text: TextTower, fixed: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> None:
        self.text, self.fixed = text, fixed
        self._layout: tuple[int, tuple[torch.Tensor, ...]] | None = None

    def __call__(self, embeddings: torch.Tensor) -> torch.Tensor:
        text, tower, (rows, prompt_len, _) = self.text, self.text.tower, embeddings.shape
        if self._layout is None or self._layout[0] != prompt_len:  # the same in every step
            self._layout = prompt_len, self._lay_out(prompt_len)
        ids, firsts, ends = (part.expand(rows, *part.shape[1:]) for part in self._layout[1])
        every = torch.arange(rows, device=ids.device)
        places = firsts[:, None] + torch.arange(prompt_len, device=ids.device)

        x = text._embed(ids)
        x = x.index_put((every[:, None], places), embeddings.to(x.dtype))
        if text._cls is not None:
            x = torch.cat([x, text._cls.detach().to(x.dtype).expand(rows, 1, -1)], dim=1)
        x = x + text._positions(0, x.shape[1])
        x = tower.ln_final(tower.transformer(x, attn_mask=text._mask(x, ids)))
        if text._cls is not None or text._pool == "last":
            return text._project(x[:, -1])
        return text._project(x[:, 0] if text._pool == "first" else x[every, ends])

    def given(self, embeddings: torch.Tensor) -> Encoder:
        return _Given(self, embeddings)

    def _lay_out(self, prompt_len: int) -> tuple[torch.Tensor, ...]:
        """(rows, length) ids, (rows,) first learned positions and (rows,) end positions."""
        text, start = self.text, len(self.text._before)
        # any id that is not padding stands for the learned ones: only padding is looked at
        texts = [[*b, *[text.known_word] * prompt_len, *a] for b, a in self.fixed]
        # without a causal mask the padding takes part, and the context has to be filled up
        length = max(map(len, texts)) + 1 if text.causal else text.context_length - start
        return (
            text._ids([text._before + (row + text._after)[:length] for row in texts]),
            text._ids([start + len(before) for before, _ in self.fixed]),
            text._ids([start + len(row) for row in texts]),
        )


class _Given:
    """An encoder with the first learned tokens in place, which it looks at every time."""

    def __init__(self, encode: Encoder, embeddings: torch.Tensor) -> None:
        self.encode, self.embeddings = encode, embeddings

    def __call__(self, embeddings: torch.Tensor) -> torch.Tensor:
        first = self.embeddings.repeat_interleave(len(embeddings) // len(self.embeddings), dim=0)
        return self.encode(torch.cat([first, embeddings], dim=1))

    def given(self, embeddings: torch.Tensor) -> _Given:
        return _Given(self, embeddings)


def _causal_block(
    block: ResidualAttentionBlock,
    x: torch.Tensor,
    mask: torch.Tensor,
    past: tuple[torch.Tensor, torch.Tensor] | None = None,
    only_last: bool = False,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """One pre-norm transformer block; with `only_last` just the output at the last position.

    The same sums as the block's own forward, but told what keys and values precede; `mask` is that
    of the positions whose output is wanted. Nothing but the last position of the last block is ever
    read. Returns the output (problems, length, width) and keys and values (problems, heads, length,
    width / heads).
    """
    attn, width = block.attn, block.attn.embed_dim
    normed = block.ln_1(x)
    weight, bias = attn.in_proj_weight, attn.in_proj_bias
    if only_last:
        keys, values = _heads(F.linear(normed, weight[width:], bias[width:]), attn.num_heads, 2)
        x = x[:, -1:]
        (query,) = _heads(F.linear(normed[:, -1:], weight[:width], bias[:width]), attn.num_heads, 1)
    else:
        query, keys, values = _heads(F.linear(normed, weight, bias), attn.num_heads, 3)
    if past is not None:
        # several rows may have one past
        keys, values = (
            torch.cat([before.repeat_interleave(len(x) // len(before), dim=0), now], dim=2)
            for before, now in zip(past, (keys, values), strict=True)
        )
    mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    x = x + block.ls_1(attn.out_proj(mixed.transpose(1, 2).reshape(x.shape)))
    return x + block.ls_2(block.mlp(block.ln_2(x))), (keys, values)


def _heads(x: torch.Tensor, heads: int, parts: int) -> torch.Tensor:
    """(problems, length, parts * width) -> (parts, problems, heads, length, width / heads)."""
    problems, length, _ = x.shape
    return x.view(problems, length, parts, heads, -1).permute(2, 0, 3, 1, 4)
