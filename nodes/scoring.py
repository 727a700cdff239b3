"""PEZ Score Prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io

from ..pez_core.errors import ArgumentError
from ..pez_core.scoring import Pruned, WordContribution, contributions, prune_towards
from ..pez_core.targets import encode_targets
from . import inputs
from .errors import naming_widgets
from .inputs import CATEGORY, PezClip
from .live import show_text, showing_errors
from .memory import LoadedClip, cancellable
from .values import Values, lines


@dataclass(frozen=True)
class _Scored:
    """One prompt with its scores.

    Attributes:
        prompt: the text.
        similarity: its mean similarity with the images.
        words: its words with their contributions.
        pruned: the prompt without the words that do not help.
        judged: its mean similarity by the judge; None without one.
    """

    prompt: str
    similarity: float
    words: list[WordContribution]
    pruned: Pruned
    judged: float | None

    @property
    def rank(self) -> float:
        return self.similarity if self.judged is None else self.judged


class ScorePrompt(io.ComfyNode):
    """How well prompts fit images, and which words contribute."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PEZ_ScorePrompt",
            display_name="PEZ Score Prompt",
            category=CATEGORY,
            description="Scores the similarity of prompts with images or texts, shows the "
            "contribution of each word, and drops words that do not help.",
            search_aliases=["clip score", "compare prompts", "prompt quality", "prune prompt"],
            is_input_list=True,
            is_output_node=True,
            inputs=_inputs(),
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, **given: Any) -> io.NodeOutput:
        values = Values(cls.define_schema(), given)
        names = {"prompts": "`text`", "prompt": "`text`"}
        with showing_errors(cls.hidden), naming_widgets(names):
            scored = _score(values)
        report = "\n".join(line for one in scored for line in _lines(one))
        show_text(cls.hidden, report)
        event = {"state": "done", "items": [_item(one) for one in scored], "changed": []}
        return io.NodeOutput(
            max(scored, key=lambda one: one.rank).prompt,
            [one.similarity for one in scored],
            [one.judged for one in scored if one.judged is not None],
            [one.pruned.prompt for one in scored],
            report,
            ui={"text": [report], "pez": [event]},
        )


def _inputs() -> list[io.Input]:
    return [
        inputs.clip(),
        io.MultiType.Input(
            "images",
            inputs.IMAGES,
            optional=True,
            tooltip="One image or several, also from CLIP Vision Encode. The mean of their "
            "similarities counts.",
        ),
        inputs.text(
            "text",
            multiline=True,
            placeholder="a prompt",
            tooltip="The prompt. The prompts of a list, such as all candidates, are compared.",
        ),
        io.Float.Input(
            "max_loss",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.005,
            **inputs.RARE,
            tooltip="Similarity that a prompt may lose when words are dropped.",
        ),
        inputs.text(
            "target",
            multiline=True,
            optional=True,
            placeholder="or texts to compare with, one per line",
            tooltip="Texts that the prompts are compared with, one per line, beside the images or "
            "instead of them.",
        ),
        PezClip.Input(
            "judge",
            optional=True,
            tooltip="A held-out CLIP, which the prompts were not learned with. Its scores are "
            "fairer.",
        ),
        inputs.fit(),
    ]


def _outputs() -> list[io.Output]:
    return [
        io.String.Output(
            "best", tooltip="The prompt with the highest similarity, by the judge if there is one."
        ),
        io.Float.Output(
            "similarity", is_output_list=True, tooltip="Mean similarity of each prompt."
        ),
        io.Float.Output(
            "judge_similarity",
            is_output_list=True,
            tooltip="Mean similarity of each prompt by the judge; empty without one.",
        ),
        io.String.Output(
            "pruned",
            is_output_list=True,
            tooltip="Each prompt without the words that do not help, by `clip`.",
        ),
        io.String.Output("report", tooltip="All results as text."),
    ]


def _score(values: Values) -> list[_Scored]:
    prompts = values.texts("text")
    if not prompts:
        raise ArgumentError("text", "is empty", "give a prompt to score")
    images = [*values.pictures("images"), *lines(values["target"])]
    if not images:
        raise ArgumentError("images", "is not connected", "connect one, or write a `target`")
    fit = values["fit"]
    with values["clip"].in_use() as model, cancellable(model):
        similarities, feature = _similarities(model, prompts, images, fit)
        words, pruned = [], []
        for prompt in prompts:
            words.append(contributions(model, prompt, feature))
            pruned.append(prune_towards(model, prompt, feature, values["max_loss"]))
    judged = [None] * len(prompts)
    judge: LoadedClip | None = values["judge"]
    if judge is not None:
        with judge.in_use() as model, cancellable(model):
            judged, _ = _similarities(model, prompts, images, fit)
    columns = zip(prompts, similarities, words, pruned, judged, strict=True)
    return [_Scored(*row) for row in columns]


def _similarities(
    model: Any, prompts: Sequence[str], images: Sequence[Any], fit: str
) -> tuple[list[float], torch.Tensor]:
    """The similarity of each prompt with images and texts, and the mean feature of these."""
    feature = encode_targets("images", model, images, fit).mean(0)
    return (encode_targets("text", model, prompts) @ feature).tolist(), feature


def _item(scored: _Scored) -> dict[str, Any]:
    """A prompt for the live view."""
    return {
        "prompt": scored.prompt,
        "similarity": round(scored.similarity, 5),
        "words": [(one.word, round(one.contribution, 5)) for one in scored.words],
        "curve": [],
        "note": _note(scored.pruned),
    }


def _note(pruned: Pruned) -> str:
    if not pruned.dropped:
        return ""
    return f"without words that do not help: {pruned.similarity:.4f}  {pruned.prompt}"


def _lines(scored: _Scored) -> list[str]:
    """A prompt in the report."""
    lines = [f"{scored.similarity:.4f}  {scored.prompt}"]
    if scored.judged is not None:
        lines.append(f"{scored.judged:.4f}  by the judge")
    lines += [f"    {one.contribution:+.4f}  {one.word}" for one in scored.words]
    return lines + ([f"  {note}"] if (note := _note(scored.pruned)) else [])
