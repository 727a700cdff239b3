"""PEZ Choose by Image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import comfy.samplers
import torch
from comfy_api.latest import io

from nodes import VAEDecode, common_ksampler

from ..pez_core.errors import ArgumentError
from ..pez_core.targets import encode_targets
from . import inputs
from .errors import naming_widgets
from .inputs import CATEGORY
from .live import show_text, showing_errors
from .memory import cancellable
from .values import Values


class ChooseByImage(io.ComfyNode):
    """The prompt whose images are most similar to the pictures that it was learned from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PEZ_ChooseByImage",
            display_name="PEZ Choose by Image",
            category=CATEGORY,
            description="Makes images of each candidate, and gives the prompt whose images are "
            "most similar to yours.",
            search_aliases=["best prompt", "compare prompts", "rank prompts", "best of n"],
            is_input_list=True,
            is_output_node=True,
            inputs=[*_compared(), *_sampling()],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, **given: Any) -> io.NodeOutput:
        values = Values(cls.define_schema(), given)
        names = {"prompts": "`prompts`", "target": "`images`"}
        with showing_errors(cls.hidden), naming_widgets(names):
            # candidates of several searches may be equal
            prompts = list(dict.fromkeys(values.texts("prompts")))
            if not prompts:
                raise ArgumentError("prompts", "is empty", "connect the candidates of a PEZ node")
            goals = _features(values, [values.pictures("images")])[0]
            made = [_images_of(prompt, values) for prompt in prompts]
            features = _features(values, map(list, made))
            similarities = [float((one @ goals.T).mean()) for one in features]
        order = sorted(range(len(prompts)), key=lambda k: similarities[k], reverse=True)
        report = "\n".join(f"{similarities[k]:.4f}  {prompts[k]}" for k in order)
        show_text(cls.hidden, report)
        event = {"state": "done", "items": [_item(prompts[k], similarities[k]) for k in order]}
        return io.NodeOutput(
            prompts[order[0]],
            made[order[0]],
            [prompts[k] for k in order],
            [similarities[k] for k in order],
            ui={"text": [report], "pez": [event | {"changed": []}]},
        )


def _compared() -> list[io.Input]:
    return [
        inputs.clip(),
        io.MultiType.Input(
            "images", inputs.IMAGES, tooltip="The images that the prompts were learned from."
        ),
        io.String.Input(
            "prompts",
            force_input=True,
            tooltip="The prompts to choose from: `candidates` of a PEZ node with several restarts.",
        ),
    ]


def _sampling() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The image model, as for KSampler."),
        io.Clip.Input("text_encoder", tooltip="The CLIP of the image model."),
        io.Vae.Input("vae", tooltip="The VAE of the image model."),
        io.Latent.Input(
            "latent_image",
            tooltip="From Empty Latent Image. Its batch size is the number of images per prompt.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate="fixed",
            tooltip="Seed of the noise, which is the same for each prompt.",
        ),
        io.Int.Input(
            "num_inference_steps", default=20, min=1, max=1000, tooltip="Steps of the sampler."
        ),
        io.Float.Input(
            "guidance_scale",
            default=7.0,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="How closely the images follow the prompt; KSampler calls it cfg.",
        ),
        io.Combo.Input(
            "sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip="As in KSampler."
        ),
        io.Combo.Input(
            "scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="As in KSampler."
        ),
        inputs.text(
            "negative_prompt",
            optional=True,
            multiline=True,
            placeholder="negative prompt (optional)",
            tooltip="Things that the images must not show.",
        ),
        inputs.fit(),
    ]


def _outputs() -> list[io.Output]:
    return [
        io.String.Output("prompt", tooltip="The prompt whose images are most similar."),
        io.Image.Output("images", tooltip="Its images."),
        io.String.Output("prompts", is_output_list=True, tooltip="All prompts, best first."),
        io.Float.Output(
            "similarity",
            is_output_list=True,
            tooltip="Mean cosine similarity of the images of each prompt with yours, by the CLIP.",
        ),
    ]


def _images_of(prompt: str, values: Values) -> torch.Tensor:
    """(images, height, width, 3) of a prompt."""
    text_encoder = values["text_encoder"]
    positive, negative = (
        text_encoder.encode_from_tokens_scheduled(text_encoder.tokenize(text))
        for text in (prompt, values["negative_prompt"])
    )
    (latent,) = common_ksampler(
        values["model"],
        values["seed"],
        values["num_inference_steps"],
        values["guidance_scale"],
        values["sampler_name"],
        values["scheduler"],
        positive,
        negative,
        values["latent_image"],
    )
    (images,) = VAEDecode().decode(values["vae"], latent)
    return images


def _features(values: Values, groups: Iterable[Sequence[Any]]) -> list[torch.Tensor]:
    """(pictures, features) of each group of pictures."""
    with values["clip"].in_use() as model, cancellable(model):
        return [encode_targets("images", model, group, values["fit"]) for group in groups]


def _item(prompt: str, similarity: float) -> dict[str, Any]:
    """A prompt for the live view."""
    return {
        "prompt": prompt,
        "similarity": round(similarity, 5),
        "words": [],
        "curve": [],
        "note": "",
    }
