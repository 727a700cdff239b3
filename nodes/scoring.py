"""PEZ Score Prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management as mm
from comfy_api.latest import io

from ..pez_core.judge import contributions, prune_towards
from ..pez_core.targets import encode_targets
from . import inputs
from .inputs import CATEGORY, PezClip, naming_widgets, one, pictures, texts
from .live import tell
from .memory import LoadedClip


class ScorePrompt(io.ComfyNode):
    """What prompts are worth, and which of their words carry them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PEZ_ScorePrompt",
            display_name="PEZ Score Prompt",
            category=CATEGORY,
            description="Says how similar prompts and images are, which words carry a prompt, and "
            "what is left without those that do not.",
            search_aliases=["clip score", "compare prompts", "prompt quality", "prune prompt"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                inputs.clip(),
                io.Image.Input(
                    "images", tooltip="One image or several, whose mean similarity counts."
                ),
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    placeholder="a prompt",
                    tooltip="The prompt. A list, such as all candidates, is compared.",
                ),
                io.Float.Input(
                    "max_loss",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    optional=True,
                    advanced=True,
                    tooltip="Similarity that dropping words may cost.",
                ),
                PezClip.Input(
                    "held_out",
                    optional=True,
                    tooltip="Another CLIP, which took no part in the search, as a fairer judge.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "best",
                    tooltip="The prompt of the highest similarity; by the "
                    "held-out CLIP if there is one.",
                ),
                io.Float.Output("similarity", is_output_list=True, tooltip="Of each prompt."),
                io.Float.Output(
                    "held_out_similarity",
                    is_output_list=True,
                    tooltip="Of each prompt by the held-out CLIP; empty without one.",
                ),
                io.String.Output(
                    "pruned",
                    is_output_list=True,
                    tooltip="Each prompt without the words that do not pay, by `clip`.",
                ),
                io.String.Output("report", tooltip="All of it as text."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        clip: Sequence[LoadedClip],
        images: Sequence[Any],
        text: Sequence[str],
        max_loss: Sequence[float] = (0.0,),
        held_out: Sequence[LoadedClip | None] = (None,),
    ) -> io.NodeOutput:
        prompts, all_images = texts(text), pictures(images)
        if not prompts:
            raise ValueError("`text` is empty; give a prompt to score.")
        judged: list[float] = []
        with naming_widgets({"`prompts`": "`text`", "`target`": "`images`"}):
            with one(clip).in_use() as model:
                feature = encode_targets("images", model, all_images).mean(0)
                similarities = (encode_targets("text", model, prompts) @ feature).tolist()
                words, pruned = [], []
                for prompt in prompts:
                    mm.throw_exception_if_processing_interrupted()
                    words.append(contributions(model, prompt, feature))
                    pruned.append(prune_towards(model, prompt, feature, one(max_loss) or 0.0))
            if judge := one(held_out):
                with judge.in_use() as model:
                    feature = encode_targets("images", model, all_images).mean(0)
                    judged = (encode_targets("text", model, prompts) @ feature).tolist()
        ranked = judged or similarities
        best = max(range(len(prompts)), key=ranked.__getitem__)
        items = [
            {
                "prompt": prompt,
                "similarity": round(similarity, 5),
                "words": [(w.word, round(w.contribution, 5)) for w in each],
                "curve": [],
                "note": f"without idle words: {rest.similarity:.4f}  {rest.prompt}"
                if rest.dropped
                else "",
            }
            for prompt, similarity, each, rest in zip(
                prompts, similarities, words, pruned, strict=True
            )
        ]
        report = _report(items, judged)
        tell(cls.hidden, report)
        return io.NodeOutput(
            prompts[best],
            similarities,
            judged,
            [rest.prompt for rest in pruned],
            report,
            ui={"text": [report], "pez": [{"state": "done", "items": items, "changed": []}]},
        )


def _report(items: list[dict[str, Any]], judged: list[float]) -> str:
    lines = []
    for k, item in enumerate(items):
        lines.append(f"{item['similarity']:.4f}  {item['prompt']}")
        if judged:
            lines.append(f"{judged[k]:.4f}  by the held-out CLIP")
        lines += [f"    {value:+.4f}  {word}" for word, value in item["words"]]
        if item["note"]:
            lines.append(f"  {item['note']}")
    return "\n".join(lines)
