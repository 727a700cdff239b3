"""A small language model over CLIP's own tokens, for prompts that read like language.

It shares the tokenizer of CLIP, so that a search needs no second tokenization: the token ids that
a CLIP compares are the ids that this model reads. The weights come with the package
(`load_token_lm`); tools/train_token_lm.py trains them.

A likelihood is read off a logit without a softmax over the 49,408 tokens. The training keeps the
logarithm of the sum of their exponentials near 0 (self-normalisation: Devlin et al. 2014, "Fast
and Robust Neural Network Joint Models", section 2.2).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from .errors import ArgumentError

FOLDER = Path(__file__).parent / "models" / "token-lm"
"""The weights that come with the package."""
KINDS = ("text", "sentence", "tags")
"""What a prompt is read as: any text, a sentence, or phrases with commas between them."""
END = 49407
"""The token behind the last one of a prompt."""

END_SHARE = 4.0
"""Weight of the end of a prompt in its likelihood, where a token has 1: a prompt that breaks off is
the worst to read."""

State = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values (rows, heads, tokens, size) of each layer."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a `TokenLM`.

    Attributes:
        vocab_size: of CLIP's tokenizer.
        table_width: columns of the embedding table, which is that of the output, too.
        width, heads, layers: of the transformer.
        context: tokens of the longest prompt.
    """

    vocab_size: int = 49408
    table_width: int = 128
    width: int = 256
    heads: int = 8
    layers: int = 4
    context: int = 77


class _Block(nn.Module):
    """A layer: attention to the tokens before, then two linear ones."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.read, self.write = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(
        self, x: torch.Tensor, before: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        rows, n, _ = x.shape
        parts = self.read(self.norm_1(x)).view(rows, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = parts
        if before is not None:
            k, v = torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)
        # plain products: torch's fused attention is slower on a CPU for prompts of this length
        weights = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
        if n > 1:
            later = torch.ones(n, k.shape[2], dtype=torch.bool, device=x.device)
            weights = weights.masked_fill(later.triu(k.shape[2] - n + 1), -torch.inf)
        y = weights.softmax(-1) @ v
        x = x + self.write(y.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.widen(self.norm_2(x)))), (k, v)


class TokenLM(nn.Module):
    """A causal transformer over the tokens of CLIP.

    Args:
        shape: its sizes.
    """

    def __init__(self, shape: Shape = Shape()) -> None:
        super().__init__()
        self.shape = shape
        self.table = nn.Embedding(shape.vocab_size, shape.table_width)
        self.bias = nn.Parameter(torch.zeros(shape.vocab_size))
        self.kinds = nn.Embedding(len(KINDS), shape.width)
        self.positions = nn.Parameter(torch.zeros(shape.context + 1, shape.width))
        self.enter = nn.Linear(shape.table_width, shape.width)
        self.blocks = nn.ModuleList(_Block(shape.width, shape.heads) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.leave = nn.Linear(shape.width, shape.table_width)

    def start(self, kinds: torch.Tensor) -> tuple[torch.Tensor, State]:
        """(rows,) numbers of `KINDS` -> (rows, 1, table_width) first query, and the state."""
        return self._read(self.kinds(kinds)[:, None] + self.positions[0], None)

    def extend(self, ids: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        """Read tokens behind others.

        Args:
            ids: (rows, n).
            state: of the tokens before.

        Returns:
            (rows, n, table_width) queries for the token behind each of them, and the state.
        """
        return self.extend_embedded(self.table(ids), state)

    def extend_embedded(self, embeddings: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        """`extend`, with (rows, n, table_width) rows of the table in place of ids."""
        first = state[0][0].shape[2]
        places = self.positions[first : first + embeddings.shape[1]]
        return self._read(self.enter(embeddings) + places, state)

    def _read(self, x: torch.Tensor, state: State | None) -> tuple[torch.Tensor, State]:
        after: State = []
        for k, block in enumerate(self.blocks):
            x, one = block(x, state[k] if state else None)
            after.append(one)
        return self.leave(self.norm(x)), after

    def likelihoods(self, queries: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """(..., table_width) queries and (...) ids -> (...) log-likelihood of these tokens."""
        return (queries * self.table(ids)).sum(-1) + self.bias[ids]

    def next_tokens(self, queries: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """(rows, table_width) queries -> (rows, n) log-likelihood of each of (n,) tokens."""
        return torch.addmm(self.bias[ids], queries, self.table(ids).T)

    def table_with_bias(self) -> torch.Tensor:
        """(vocab_size, table_width + 1): the table and, in the last column, the bias."""
        return torch.cat([self.table.weight, self.bias[:, None]], dim=1)

    def save(self, folder: Path) -> None:
        """Write config and weights, in half precision."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(self.shape), indent=2) + "\n")
        state = {name: value.half().contiguous() for name, value in self.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


class FixedText:
    """The fixed text around learned tokens, as a `TokenLM` reads it.

    Args:
        model: the language model.
        before: ids of the text before; read here, once.
        behind: ids of everything behind it, -1 in the place of each learned token, without the end.
        kind: one of `KINDS`.

    Raises:
        ArgumentError: the learned tokens do not fit the context of the model.

    Attributes:
        tokens: (n,) `behind` and the end, cut to the context of the model.
        slots: (learned,) the places of the learned tokens among them.
        shares: (n,) the weight of each token in the likelihood of a prompt; that of the end, where
            it is not cut off, is `END_SHARE`.
        embedded: (n, table_width + 1) their embeddings and biases, those of id 0 in the slots.
        start: (1, 1, table_width) query for the first of `tokens`, and the state.
    """

    def __init__(
        self, model: TokenLM, before: Sequence[int], behind: Sequence[int], kind: str
    ) -> None:
        device, context = model.bias.device, model.shape.context
        if -1 in behind[context:]:
            raise ArgumentError(
                "prompt_len",
                f"is {behind.count(-1)}, but the language model reads {context} tokens, with the "
                "fixed text between the learned ones",
                'learn fewer, or take the `wording` "free" without `readability`',
            )
        self.tokens = torch.tensor([*behind, END][:context], device=device)
        self.slots = (self.tokens < 0).nonzero()[:, 0]
        self.shares = torch.ones(len(self.tokens), device=device)
        if len(behind) < context:
            self.shares[-1] = END_SHARE
        # of a long caption, what stands directly before
        before = before[max(0, len(before) + len(self.tokens) - context) :]
        with torch.inference_mode(False), torch.no_grad():
            query, state = model.start(torch.tensor([KINDS.index(kind)], device=device))
            if before:
                query, state = model.extend(torch.tensor([before], device=device), state)
            self.embedded = model.table_with_bias()[self.tokens.clamp(min=0)]
        self.start: tuple[torch.Tensor, State] = query[:, -1:], state


def repeated(state: State, count: int) -> State:
    """A state with each row `count` times in a row."""
    return [(k.repeat_interleave(count, 0), v.repeat_interleave(count, 0)) for k, v in state]


def chosen(state: State, rows: torch.Tensor) -> State:
    """The state of some rows."""
    return [(k[rows], v[rows]) for k, v in state]


def load_token_lm(folder: Path = FOLDER, device: str | torch.device = "cpu") -> TokenLM:
    """The model in a folder, in float32 on a device.

    It is loaded once for each folder and device. All searches share it, so do not change it.
    """
    return _loaded(folder, torch.device(device))


@cache
def _loaded(folder: Path, device: torch.device) -> TokenLM:
    with torch.inference_mode(False):  # inference tensors have no gradients
        if device.type != "cpu":
            return deepcopy(load_token_lm(folder)).to(device)
        model = TokenLM(Shape(**json.loads((folder / "config.json").read_text())))
        weights = load_file(folder / "model.safetensors")
        model.load_state_dict({name: value.float() for name, value in weights.items()})
        return model.eval().requires_grad_(False)
