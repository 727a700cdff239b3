"""Whether a CLIP is the one whose text encoder an image pipeline has."""

# diffusers does not mark its public names as exported
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import logging
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..clip import AnyClip, JointClip
from ..clip.text import TextTower

logger = logging.getLogger(__name__)

_TEXT = "a photo of a red apple on a table"
# Relative difference of hidden states. Half precision reaches 0.03; another model has 1.
_TOLERANCE = 0.1


def warn_where_foreign(clip: AnyClip, pipeline: DiffusionPipeline) -> None:
    """Log a warning where no text encoder of the pipeline is that of a CLIP."""
    if problem := foreign(clip, pipeline):
        logger.warning("%s", problem)


def foreign(clip: AnyClip, pipeline: DiffusionPipeline) -> str:
    """How a CLIP differs from the text encoders of a pipeline, "" where one of them is its own.

    Prompts of a search on such a CLIP mean something else to the pipeline. Nothing is compared
    where the pipeline has no text encoder of CLIP.
    """
    encoders = text_encoders(pipeline)
    for one in clip.clips if isinstance(clip, JointClip) else [clip]:
        found = [(_difference(one.text, *pair), name) for name, pair in encoders.items()]
        if found and all(problem for problem, _ in found):
            differences = ", and ".join(f"its `{name}` has {problem}" for problem, name in found)
            return (
                f"{one.name} does not belong to this {type(pipeline).__name__}: {differences}. Its "
                "prompts may mean something else there; search with the CLIP that the pipeline was "
                "trained with."
            )
    return ""


def text_encoders(pipeline: DiffusionPipeline) -> dict[str, tuple[nn.Module, Any]]:
    """The text encoders of CLIP that a pipeline has, each with its tokenizer, by their names."""
    found = {}
    try:
        components = pipeline.components
    except (AttributeError, ValueError):  # of a class that does not register its modules
        return found
    for name, part in components.items():
        # not by class, which would import transformers' models for pipelines without one
        if name.startswith("text_encoder") and type(part).__name__.startswith("CLIPText"):
            tokenizer = pipeline.components.get(name.replace("text_encoder", "tokenizer"))
            found[name] = part, tokenizer
    return found


def _difference(text: TextTower, encoder: Any, tokenizer: Any) -> str:
    """What tells a text encoder of transformers from a text tower; "" where they are the same."""
    table, config = text.token_embedding, encoder.config
    if config.hidden_size != table.shape[1]:
        return f"a width of {config.hidden_size}, not {table.shape[1]}"
    if config.vocab_size != len(table):
        return f"a vocabulary of {config.vocab_size} tokens, not {len(table)}"
    words = text.words.encode(_TEXT)
    if tokenizer is not None and tokenizer(_TEXT, add_special_tokens=False)["input_ids"] != words:
        return "a tokenizer that reads texts as other tokens"
    parameters = [*encoder.parameters(), *text.tower.parameters()]
    if any(one.is_meta for one in parameters) or hasattr(encoder, "_hf_hook"):
        return ""  # offloaded
    ours, theirs = _hidden_states(text, words), _theirs(text, encoder, words)
    for k in sorted({0, 1, min(len(ours), len(theirs)) - 1}):
        a, b = ours[k], theirs[k]
        if float((a - b).norm() / a.norm().clamp(min=1e-6)) > _TOLERANCE:
            return f"other hidden states (behind {k} of its blocks)"
    return ""


@torch.no_grad()
def _hidden_states(text: TextTower, words: list[int]) -> list[torch.Tensor]:
    """(length, width) states of a text before the first block and behind each, on the CPU."""
    ids = text._ids([*text.ids_before, *words, text.ids_behind[0]])
    x = text._embed(ids)[None] + text._positions(0, len(ids))
    mask, states = text._mask(x, ids[None]), [x]
    for block in text.tower.transformer.resblocks:
        x = block(x, attn_mask=mask)
        states.append(x)
    return [state[0].float().cpu() for state in states]


@torch.no_grad()
def _theirs(text: TextTower, encoder: Any, words: list[int]) -> list[torch.Tensor]:
    """As `_hidden_states`, of a text encoder of transformers."""
    ids = [*text.ids_before, *words, text.ids_behind[0]]
    given = torch.tensor([ids], device=next(encoder.parameters()).device)
    states = encoder(given, output_hidden_states=True).hidden_states
    return [state[0].float().cpu() for state in states]
