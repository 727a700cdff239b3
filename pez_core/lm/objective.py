"""What a prompt for a language model is optimised for, and what it is chosen by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..space import TokenSpace
from .reader import Reader

# Examples read at once on a CPU, where reading gaps between texts costs more than short batches.
_ON_CPU = 8
# Ids of a filled template and the number of its label.
Encoded = tuple[list[int], int]


class TaskLoss:
    """(1 - fluency) * task loss + fluency * next-token loss of the prompt (section 5).

    The task loss is the cross-entropy over the words of the labels, on a batch that is drawn
    without replacement and by `seed` and step alone. The score is that of `holdout` after the first
    step, after every `check_every` steps and after the last; -inf in all others.

    Args:
        reader: the language model.
        space: of the prompts; tells which tokens embeddings stand for.
        examples: to learn from.
        holdout: to choose the best prompt by.
        batch_size: examples per step; all where there are fewer.
        fluency: lambda, from 0 to 1.
        accumulate: parts, at least, that a batch is read in one after the other, to save memory.
        steps, check_every: see above.
        seed: of the batches.
    """

    def __init__(
        self,
        reader: Reader,
        space: TokenSpace,
        examples: Sequence[Encoded],
        holdout: Holdout,
        batch_size: int,
        fluency: float,
        accumulate: int,
        steps: int,
        check_every: int,
        seed: int,
    ) -> None:
        self.reader, self.space, self.examples, self.holdout = reader, space, examples, holdout
        self.batch_size = min(batch_size, len(examples))
        self.fluency, self.accumulate, self.seed = fluency, accumulate, seed
        self.steps, self.check_every = steps, check_every
        self._epoch, self._order = -1, []

    def __call__(self, embeddings: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = self.space.nearest(embeddings.detach())
        # texts of like lengths together, so that little is read in vain
        batch = sorted(self.batch(step), key=lambda one: len(one[0]))
        size = -(-len(batch) // self.accumulate)
        if embeddings.device.type == "cpu":
            size = min(size, _ON_CPU)
        parts = [batch[k : k + size] for k in range(0, len(batch), size)]
        if len(parts) == 1 or not embeddings.requires_grad:
            loss = sum(self._loss(embeddings, ids, part, len(batch)) for part in parts)
        else:
            loss = self._accumulated(embeddings, ids, parts, len(batch))
        if self.looks_at_holdout(step + 1):
            return loss, self.holdout.scores(ids)
        return loss, torch.full_like(loss.detach(), -torch.inf)

    def looks_at_holdout(self, done: int) -> bool:
        """Whether the step that is the `done`-th, counted from 1, has scores."""
        return done == 1 or done == self.steps or done % self.check_every == 0

    def batch(self, step: int) -> list[Encoded]:
        """The examples of a step: those of an epoch are a permutation of all."""
        first = step * self.batch_size
        batch: list[Encoded] = []
        while len(batch) < self.batch_size:
            epoch, place = divmod(first + len(batch), len(self.examples))
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
                order = torch.randperm(len(self.examples), generator=generator)
                self._epoch, self._order = epoch, order.tolist()
            some = self._order[place : place + self.batch_size - len(batch)]
            batch += [self.examples[k] for k in some]
        return batch

    def _loss(
        self, embeddings: torch.Tensor, ids: torch.Tensor, part: Sequence[Encoded], whole: int
    ) -> torch.Tensor:
        """(rows,) the share of a part in the loss of a batch of `whole` examples."""
        texts, labels = zip(*part, strict=True)
        asked = ids if self.fluency > 0 else None
        logits, fluency = self.reader.read(embeddings, texts, asked)
        losses = _cross_entropy(logits, labels).sum(1) / whole
        if fluency is None:
            return losses
        return (1 - self.fluency) * losses + self.fluency * fluency * len(part) / whole

    def _accumulated(
        self,
        embeddings: torch.Tensor,
        ids: torch.Tensor,
        parts: Sequence[Sequence[Encoded]],
        whole: int,
    ) -> torch.Tensor:
        """The loss, with its gradient, while only one part is held in memory at a time."""
        leaf = embeddings.detach().requires_grad_()
        total, slope = 0.0, torch.zeros_like(leaf)
        for part in parts:
            loss = self._loss(leaf, ids, part, whole)
            slope += torch.autograd.grad(loss.sum(), leaf)[0]
            total = total + loss.detach()
        # has the value of the loss and, at these embeddings, its gradient
        plane = (embeddings * slope).sum((1, 2))
        return plane - plane.detach() + total


class Holdout:
    """Scores prompts, as they are printed, on examples that they are not learned from.

    The score is the accuracy; of equals the one with the smaller loss is better, by less than the
    accuracy of one example in ten thousand.

    Args:
        reader: the language model.
        examples: at least one.
        batch_size: examples read at once.
    """

    def __init__(self, reader: Reader, examples: Sequence[Encoded], batch_size: int) -> None:
        self.reader, self.examples, self.batch_size = reader, examples, batch_size
        self._known: dict[str, float] = {}

    def scores(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows,) scores of (rows, prompt_len) ids."""
        return torch.tensor([self._score(row) for row in ids.tolist()], device=ids.device)

    def _score(self, ids: Sequence[int]) -> float:
        prompt = self.reader.text.print(ids)
        if prompt not in self._known:
            read = self.reader.text.prompt_ids(prompt)
            if room_for(self.reader, len(read), self.examples) < 0:  # it may have grown
                return float("-inf")
            _, accuracy, loss, _ = judge(self.reader, read, self.examples, self.batch_size)
            self._known[prompt] = accuracy - 1e-4 * loss / (1 + loss)
        return self._known[prompt]


def room_for(reader: Reader, prompt_len: int, examples: Sequence[Encoded]) -> float:
    """Tokens that the model could read beside a prompt and the longest example; below 0: not it."""
    text = reader.text
    if reader.context is None:
        return float("inf")
    longest = max(len(ids) for ids, _ in examples)
    return reader.context - len(text.before) - prompt_len - longest - len(text.after)


@torch.no_grad()
def judge(
    reader: Reader,
    prompt: Sequence[int] | torch.Tensor,
    examples: Sequence[Encoded],
    batch_size: int,
) -> tuple[list[int], float, float, float | None]:
    """How a prompt does on examples.

    Args:
        prompt: its ids, or (prompt_len, dim) embeddings of a soft prompt.

    Returns:
        The numbers of the predicted labels, the accuracy, the mean cross-entropy, and the mean
        negative log-likelihood of the prompt's tokens: None for an encoder-decoder, a soft or an
        empty prompt, or a single token with nothing before it.

    Raises:
        FloatingPointError: a loss is NaN or infinite.
    """
    ids = None
    if not isinstance(prompt, torch.Tensor):
        ids = torch.tensor([list(prompt)], dtype=torch.long, device=reader.device)
        prompt = F.embedding(ids, reader.table)[0]
    predicted, losses = torch.empty(len(examples), dtype=torch.long), torch.empty(len(examples))
    fluency = None
    # a first token without anything before it has no likelihood
    countable = ids is not None and reader.has_fluency and len(prompt) > 0
    countable = countable and len(prompt) + len(reader.text.before) > 1
    # texts of like lengths together, so that little is read in vain
    order = sorted(range(len(examples)), key=lambda k: len(examples[k][0]))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        texts, labels = zip(*(examples[k] for k in places), strict=True)
        ask = ids if start == 0 and countable else None
        logits, said = reader.read(prompt[None], texts, ask)
        fluency = float(said) if said is not None else fluency
        predicted[places] = logits[0].argmax(-1).cpu()
        losses[places] = _cross_entropy(logits, labels)[0].cpu()
    if not losses.isfinite().all():
        raise FloatingPointError(
            "The losses of examples became NaN or infinite; load the model with "
            "dtype=torch.float32, or with torch.bfloat16 if it was float16."
        )
    right = predicted == torch.tensor([label for _, label in examples])
    return predicted.tolist(), int(right.sum()) / len(right), float(losses.mean()), fluency


def _cross_entropy(logits: torch.Tensor, labels: Sequence[int]) -> torch.Tensor:
    """(rows, n) from (rows, n, labels) logits and n numbers of labels."""
    wanted = torch.tensor(labels, device=logits.device)
    return -logits.log_softmax(-1)[:, torch.arange(len(labels), device=wanted.device), wanted]
