"""The loss of a prompt for a language model, and the score by which the best prompt is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..space import TokenSpace
from .classifier import PromptedClassifier

# Examples of one pass on a CPU, where padding costs more than small batches do.
_ON_CPU = 8
# The ids of a filled template, and the number of its label.
Encoded = tuple[list[int], int]


class TaskLoss:
    """(1 - fluency) * task loss + fluency * next-token loss of the prompt (section 5).

    The task loss is the cross-entropy over the words of the labels, on a batch that is drawn
    without replacement and depends on `seed` and step alone. The score is that of `holdout` after
    the first step, after every `check_every` steps and after the last; -inf in all other steps.

    Args:
        classifier: the language model.
        space: of the prompts; maps embeddings to tokens.
        examples: the training examples.
        holdout: scores prompts, to choose the best.
        batch_size: examples per step, at most all.
        fluency: lambda, from 0 to 1.
        accumulate: the least number of parts that a batch is processed in, to save memory.
        steps, check_every: see above.
        seed: of the batches.
    """

    def __init__(
        self,
        classifier: PromptedClassifier,
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
        self.classifier, self.space, self.examples, self.holdout = (
            classifier,
            space,
            examples,
            holdout,
        )
        self.batch_size = min(batch_size, len(examples))
        self.fluency, self.accumulate, self.seed = fluency, accumulate, seed
        self.steps, self.check_every = steps, check_every
        self._epoch, self._order = -1, []

    def __call__(self, embeddings: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = self.space.nearest(embeddings.detach())
        # texts of similar lengths together, for little padding
        batch = sorted(self.batch(step), key=lambda one: len(one[0]))
        size = -(-len(batch) // self.accumulate)
        if embeddings.device.type == "cpu":
            size = min(size, _ON_CPU)
        parts = [batch[k : k + size] for k in range(0, len(batch), size)]
        if len(parts) == 1 or not embeddings.requires_grad:
            losses = (self._loss(embeddings, ids, part, len(batch)) for part in parts)
            loss = sum(losses, torch.zeros(len(embeddings), device=embeddings.device))
        else:
            loss = self._accumulated(embeddings, ids, parts, len(batch))
        if self.checks_holdout(step + 1):
            return loss, self.holdout.scores(ids)
        return loss, torch.full_like(loss.detach(), -torch.inf)

    def checks_holdout(self, done: int) -> bool:
        """Whether the `done`-th step, counted from 1, computes scores."""
        return done == 1 or done == self.steps or done % self.check_every == 0

    def batch(self, step: int) -> list[Encoded]:
        """The examples of a step; the batches of an epoch are a permutation of all examples."""
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
        """(rows,) the contribution of a part to the loss of a batch of `whole` examples."""
        texts, labels = zip(*part, strict=True)
        prompts = ids if self.fluency > 0 else None
        logits, fluency = self.classifier.label_logits(embeddings, texts, prompts)
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
        """The loss, with its gradient, with the graph of only one part in memory at a time."""
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
    """Scores printed prompts on held-out examples.

    The score is the accuracy. Between equal accuracies the smaller loss is better, by less than the
    accuracy of one example in ten thousand.

    Args:
        classifier: the language model.
        examples: at least one.
        batch_size: examples of one pass.
    """

    def __init__(
        self, classifier: PromptedClassifier, examples: Sequence[Encoded], batch_size: int
    ) -> None:
        self.classifier, self.examples, self.batch_size = classifier, examples, batch_size
        self._scores: dict[str, float] = {}

    def scores(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows,) scores of (rows, prompt_len) ids."""
        return torch.tensor([self._score(row) for row in ids.tolist()], device=ids.device)

    def _score(self, ids: Sequence[int]) -> float:
        prompt = self.classifier.text.decode(ids)
        if prompt not in self._scores:
            again = self.classifier.text.prompt_ids(prompt)
            # a printed prompt may have more tokens than the learned one
            if spare_context(self.classifier, len(again), self.examples) < 0:
                return float("-inf")
            found = classify(self.classifier, again, self.examples, self.batch_size)
            self._scores[prompt] = found.accuracy - 1e-4 * found.loss / (1 + found.loss)
        return self._scores[prompt]


def spare_context(
    classifier: PromptedClassifier, prompt_len: int, examples: Sequence[Encoded]
) -> float:
    """Free tokens of the context beside a prompt and the longest example; below 0: too few."""
    text = classifier.text
    if classifier.context is None:
        return float("inf")
    longest = max(len(ids) for ids, _ in examples)
    return classifier.context - len(text.before) - prompt_len - longest - len(text.after)


class Classified(NamedTuple):
    """Examples classified behind a prompt.

    Attributes:
        labels: the number of the predicted label of each example.
        accuracy: share of correct labels.
        loss: mean cross-entropy over the words of the labels.
        fluency: mean negative log-likelihood of the prompt's tokens; None for an encoder-decoder, a
            soft or an empty prompt, or a single token without any before it.
    """

    labels: list[int]
    accuracy: float
    loss: float
    fluency: float | None


@torch.no_grad()
def classify(
    classifier: PromptedClassifier,
    prompt: Sequence[int] | torch.Tensor,
    examples: Sequence[Encoded],
    batch_size: int,
) -> Classified:
    """Classify examples behind a prompt.

    Args:
        classifier: the language model.
        prompt: its ids, or (prompt_len, dim) embeddings of a soft prompt.
        examples: at least one.
        batch_size: examples of one pass.

    Raises:
        FloatingPointError: a loss is NaN or infinite.
    """
    ids = None
    if not isinstance(prompt, torch.Tensor):
        ids = torch.tensor([list(prompt)], dtype=torch.long, device=classifier.device)
        prompt = F.embedding(ids, classifier.table)[0]
    predicted, losses = torch.empty(len(examples), dtype=torch.long), torch.empty(len(examples))
    fluency = None
    # a first token without any before it has no likelihood
    countable = ids is not None and classifier.has_fluency and len(prompt) > 0
    countable = countable and len(prompt) + len(classifier.text.before) > 1
    # texts of similar lengths together, for little padding
    order = sorted(range(len(examples)), key=lambda k: len(examples[k][0]))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        texts, labels = zip(*(examples[k] for k in places), strict=True)
        once = ids if start == 0 and countable else None
        logits, of_prompt = classifier.label_logits(prompt[None], texts, once)
        fluency = float(of_prompt) if of_prompt is not None else fluency
        predicted[places] = logits[0].argmax(-1).cpu()
        losses[places] = _cross_entropy(logits, labels)[0].cpu()
    if not losses.isfinite().all():
        raise FloatingPointError(
            "The losses of examples became NaN or infinite; load the model with "
            "dtype=torch.float32, or with torch.bfloat16 if it was float16. With float32 its "
            "weights are damaged."
        )
    right = predicted == torch.tensor([label for _, label in examples])
    accuracy = int(right.sum()) / len(right)
    return Classified(predicted.tolist(), accuracy, float(losses.mean()), fluency)


def _cross_entropy(logits: torch.Tensor, labels: Sequence[int]) -> torch.Tensor:
    """(rows, n) from (rows, n, labels) logits and n numbers of labels."""
    wanted = torch.tensor(labels, device=logits.device)
    return -logits.log_softmax(-1)[:, torch.arange(len(labels), device=wanted.device), wanted]
