"""A frozen language model as a classifier: from the embeddings of a prompt to logits of labels."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import ArgumentError
from .text import SENTINEL, Format


class PromptedClassifier(ABC):
    """A frozen language model that classifies examples behind a prompt; made by `classifier_of`.

    Args:
        model: of transformers.
        text: the format of prompts, examples and labels.
    """

    # Whether `label_logits` can compute the likelihood of the prompt itself.
    has_fluency: bool

    def __init__(self, model: torch.nn.Module, text: Format) -> None:
        # the methods of transformers are not those of Module
        self.model: Any = model
        self.text = text
        self.device = next(model.parameters()).device
        self.dtype = self.model.get_input_embeddings().weight.dtype
        parameters = inspect.signature(model.forward).parameters
        # transformers 5 has another name for it
        self._cache = "cache" if "cache" in parameters else "past_key_values"
        self._words = torch.tensor(text.label_ids, device=self.device)

    @cached_property
    def table(self) -> torch.Tensor:
        """(vocabulary, dim) token embeddings as the first layer receives them."""
        embed = self.model.get_input_embeddings()
        if type(embed) is torch.nn.Embedding:
            return embed.weight.detach()
        # some models scale embeddings in the module that looks them up
        with torch.no_grad():
            return embed(torch.arange(embed.weight.shape[0], device=self.device)).detach()

    @property
    def context(self) -> int | None:
        """Length of the model's context in tokens; None: no limit."""
        config = self.model.config.get_text_config()
        length = getattr(config, "max_position_embeddings", None)
        return length if length and length > 0 else None

    @abstractmethod
    def label_logits(
        self, prompt: torch.Tensor, examples: Sequence[list[int]], ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of the labels of examples behind prompts.

        Args:
            prompt: (rows, prompt_len, dim) embeddings; prompt_len 0: no prompt.
            examples: ids of n filled templates.
            ids: (rows, prompt_len) tokens of the prompts, to compute their fluency.

        Returns:
            (rows, n, labels) fp32 logits of the words of the labels, and (rows,) the mean negative
            log-likelihood of each token of a prompt given those before it, None without `ids`.
            In a model with tied input and output embeddings, the embeddings of the prompt replace
            the rows of their tokens in the output layer, so that gradients reach them there, too:
            p(e_m | e_<m) = exp(h_<m e_m) / sum over v of exp(h_<m e_v)
            (FluentPrompt, section 3.3, arXiv 2212.10539).
        """

    def _embed(self, ids: Sequence[int]) -> torch.Tensor:
        """(1, n, dim) embeddings of fixed tokens."""
        return self.model.get_input_embeddings()(torch.tensor([list(ids)], device=self.device))

    def _pad(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, longest) ids, and a (n, longest) mask of 1 for ids and 0 for padding."""
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)  # any token serves as padding
        mask = torch.zeros_like(ids)
        for k, row in enumerate(rows):
            ids[k, : len(row)], mask[k, : len(row)] = torch.tensor(row), 1
        return ids.to(self.device), mask.to(self.device)


class CausalClassifier(PromptedClassifier):
    """A causal model: one pass over the prompt serves all examples of a call."""

    has_fluency = True

    def label_logits(
        self, prompt: torch.Tensor, examples: Sequence[list[int]], ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows, n = len(prompt), len(examples)
        prompt = prompt.to(self.dtype, copy=True)  # some models write into their input
        start = self.text.before
        if start:
            prompt = torch.cat([self._embed(start).expand(rows, -1, -1), prompt], dim=1)
        past, cache, fluency = prompt.shape[1], None, None
        if past:
            with self._tied_outputs(prompt, ids, len(start)):
                read = self.model(inputs_embeds=prompt, use_cache=True)
            cache = getattr(read, self._cache, None)
            if not _is_of_attention(cache):
                cache = None
            if ids is not None:
                fluency = self._fluency(read.logits, ids, len(start))
        tokens, mask = self._pad(examples)
        tokens = tokens.repeat(rows, 1)
        # a causal model does not read to the right, so padding there needs no mask, and positions
        # and sliding windows are those of the text alone
        if cache is not None:
            cache.batch_repeat_interleave(n)
            given = {"input_ids": tokens, self._cache: cache, "use_cache": True}
        elif past:
            behind = self.model.get_input_embeddings()(tokens)
            given = {"inputs_embeds": torch.cat([prompt.repeat_interleave(n, 0), behind], dim=1)}
        else:
            given = {"input_ids": tokens}
        ends = mask.sum(1).repeat(rows) - 1 + (0 if cache is not None else past)
        with self._logits_only_at(ends):
            logits = self.model(**given).logits
        return logits[:, 0, self._words].float().view(rows, n, -1), fluency

    @cached_property
    def _tied(self) -> float | None:
        """The output row of a token as a multiple of its embedding; None: they are not tied."""
        output = getattr(self.model.get_output_embeddings(), "weight", None)
        if output is None or output is not self.model.get_input_embeddings().weight:
            return None
        return float(output.float().norm() / self.table.float().norm())

    @contextmanager
    def _tied_outputs(
        self, prompt: torch.Tensor, ids: torch.Tensor | None, start: int
    ) -> Iterator[None]:
        """Inside, logits of the prompt's tokens are computed with its embeddings."""
        first = max(start, 1)  # a first token without any before it has no likelihood
        if ids is None or self._tied is None:
            yield
            return
        predicted = ids[:, first - start :]
        # zero for a hard prompt, but with a gradient
        difference = self._tied * (prompt[:, first:] - F.embedding(predicted, self.table))

        def add(_, hidden: tuple[torch.Tensor, ...], logits: torch.Tensor) -> torch.Tensor:
            more = (hidden[0][:, first - 1 : -1] * difference).sum(-1, keepdim=True)
            added = torch.zeros_like(logits)
            added[:, first - 1 : -1].scatter_(-1, predicted[..., None], more.to(logits.dtype))
            return logits + added

        hook = self.model.get_output_embeddings().register_forward_hook(add)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def _logits_only_at(self, places: torch.Tensor) -> Iterator[None]:
        """Inside, the model computes logits at one place of each row, (n,), as if of length 1."""

        def pick(_, hidden: tuple[torch.Tensor, ...]) -> torch.Tensor:
            return hidden[0][torch.arange(len(places), device=places.device), places][:, None]

        hook = self.model.get_output_embeddings().register_forward_pre_hook(pick)
        try:
            yield
        finally:
            hook.remove()

    @staticmethod
    def _fluency(logits: torch.Tensor, ids: torch.Tensor, start: int) -> torch.Tensor:
        """(rows,) from (rows, start + prompt_len, vocabulary) logits."""
        if start:
            predicted, before = ids, logits[:, start - 1 : -1]
        else:  # the first token has no likelihood
            predicted, before = ids[:, 1:], logits[:, :-1]
        if predicted.shape[1] == 0:
            return logits.new_zeros(len(ids), dtype=torch.float32)
        losses = F.cross_entropy(
            before.float().flatten(0, 1), predicted.flatten(), reduction="none"
        )
        return losses.view(predicted.shape).mean(dim=1)


class EncoderDecoderClassifier(PromptedClassifier):
    """An encoder reads prompt and example, and a decoder predicts the word, as in T5.

    Where the template has `<extra_id_0>`, the decoder gets it as well: T5 was trained to predict
    the text at that place behind it. T5-LM and similar models are used without it.
    """

    has_fluency = False

    def label_logits(
        self, prompt: torch.Tensor, examples: Sequence[list[int]], ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows, n = len(prompt), len(examples)
        text = self.text
        tokens, mask = self._pad([[*one, *text.after] for one in examples])
        parts = [prompt.to(self.dtype).repeat_interleave(n, 0)]
        if text.before:
            parts.insert(0, self._embed(text.before).expand(rows * n, -1, -1))
        parts.append(self.model.get_input_embeddings()(tokens).repeat(rows, 1, 1))
        embeddings = torch.cat(parts, dim=1)
        mask = F.pad(mask, (embeddings.shape[1] - mask.shape[1], 0), value=1).repeat(rows, 1)
        places = (self.model.config, self.model.generation_config)
        starts = (getattr(place, "decoder_start_token_id", None) for place in places)
        start = [next(token for token in starts if token is not None)]
        if SENTINEL in text.template:
            start.append(text.tokenizer.convert_tokens_to_ids(SENTINEL))
        begun = torch.tensor([start], device=self.device).expand(rows * n, -1)
        logits = self.model(
            inputs_embeds=embeddings, attention_mask=mask, decoder_input_ids=begun
        ).logits
        return logits[:, -1, self._words].float().view(rows, n, -1), None


def classifier_of(model: Any, text: Format) -> PromptedClassifier:
    """The classifier of a causal or an encoder-decoder model.

    Raises:
        ArgumentError: the model takes no embeddings, or reads those of tokens in another way than
            the tokens themselves.
    """
    kind = EncoderDecoderClassifier if model.config.is_encoder_decoder else CausalClassifier
    classifier = kind(model, text)
    _check_embeddings(model, [*text.before, *text.prompt_ids(text.template)], classifier.device)
    return classifier


# Relative difference of the logits; half precision reaches 0.02.
_SAME = 0.05


@torch.no_grad()
def _check_embeddings(model: Any, ids: list[int], device: torch.device) -> None:
    """Raise unless the model reads the embeddings of tokens as it reads the tokens.

    Some scale embeddings only where they look them up themselves, such as Pegasus and Marian.
    """
    tokens = torch.tensor([ids], device=device)
    begun = {"decoder_input_ids": tokens[:, :1]} if model.config.is_encoder_decoder else {}
    remedy = "take another model, such as SmolLM2 or GPT-2"
    try:
        embeddings = model.get_input_embeddings()(tokens)
        ours = model(inputs_embeds=embeddings, **begun).logits.float()
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ArgumentError(
            "model", f"takes no embeddings in place of tokens ({error})", remedy
        ) from error
    theirs = model(input_ids=tokens, **begun).logits.float()
    if float((ours - theirs).norm()) > _SAME * float(theirs.norm()):
        raise ArgumentError(
            "model",
            "scales the embeddings of tokens, but not embeddings given in their place, so that "
            "prompts learned with it would be wrong",
            remedy,
        )


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model has no dropout and no gradients of weights; it is restored afterwards."""
    training = [module for module in model.modules() if module.training]
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    model.eval()
    for weight in learning:
        weight.requires_grad_(False)
    try:
        with torch.inference_mode(False):  # inference tensors have no gradients
            yield
    finally:
        for module in training:
            module.training = True
        for weight in learning:
            weight.requires_grad_(True)


def _is_of_attention(cache: Any) -> bool:
    """Whether a cache holds only keys and values, which can be repeated and have gradients."""
    layers = getattr(cache, "layers", ())
    kinds = {type(layer).__name__ for layer in layers}
    return bool(kinds) and kinds <= {"DynamicLayer", "DynamicSlidingWindowLayer"}
