"""PEZ as a block of Modular Diffusers: images in, prompts out."""

# diffusers does not mark its public names as exported
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import ModularPipeline, ModularPipelineBlocks
from diffusers.modular_pipelines import (
    ComponentSpec,
    InputParam,
    LoopSequentialPipelineBlocks,
    OutputParam,
    PipelineState,
)

from ..clip.images import ImageInput
from ..errors import ArgumentTypeError
from ..options import SearchOptions
from ..results import Report, Result
from ..tasks import invert
from .clip_model import PezClipModel
from .inputs import (
    check_keywords,
    check_options,
    is_shared,
    keywords_of,
    load_pictures,
    named,
    search_seeds,
)


class PezPromptStep(ModularPipelineBlocks):
    """Block that learns a short text prompt for each image (paper, section 4).

    By itself:

        pipe = PezPromptStep().init_pipeline()
        pipe.update_components(clip=PezClipModel.load("ViT-L-14:openai"))
        prompts = pipe(target_image="photo.jpg", output="prompt")

    In front of the blocks of an image pipeline it replaces the input `prompt`:

        blocks = StableDiffusionXLAutoBlocks()
        blocks.sub_blocks.insert("pez", PezPromptStep(), 0)
        pipe = blocks.init_pipeline("stabilityai/stable-diffusion-xl-base-1.0")
        pipe.load_components()
        pipe.update_components(
            clip=PezClipModel.load(["ViT-L-14:openai", "ViT-bigG-14:laion2b_s39b_b160k"])
        )
        images = pipe(target_image="photo.jpg", output="images")

    The input is `target_image`, since `image` would turn Stable Diffusion XL to image-to-image; a
    call may have both. All components have to be on one device: use `pipe.to`. To hide the progress
    bar of the block alone, call `set_progress_bar_config` before `init_pipeline`.

    `pipe.save_pretrained(folder)`, where `folder` is a string, saves the CLIP with the other
    components. Diffusers cannot find this class by name, so load the folder with the same blocks:
    `pipe = blocks.init_pipeline(folder)`, then `pipe.load_components()`. For
    `ModularPipelineBlocks.from_pretrained(folder, trust_remote_code=True)` the folder needs the
    output of `PezPromptStep().save_pretrained(folder)` and a file `modular.py` with the line
    `from pez_core.diffusion import PezPromptStep`.
    """

    # the bar of the denoising blocks, which are silenced together with this one
    progress_bar = LoopSequentialPipelineBlocks.progress_bar
    set_progress_bar_config = LoopSequentialPipelineBlocks.set_progress_bar_config

    @property
    def description(self) -> str:
        return "Step that learns a short text prompt for each target image with PEZ"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("clip", PezClipModel, "The CLIP that prompts are searched on")]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam(
                "target_image",
                type_hint=ImageInput | list[ImageInput],
                required=True,
                description=(
                    "One image or several to learn a prompt for: PIL images, paths, or tensors and "
                    "arrays of values in [0, 1]"
                ),
            ),
            InputParam(
                "options",
                type_hint=SearchOptions,
                description=(
                    "How to search (`pez_core.SearchOptions`). Its seed counts where there is no "
                    "generator"
                ),
            ),
            InputParam(
                "task_kwargs",
                type_hint=dict,
                description=(
                    "Further arguments of `pez_core.invert`: `caption`, `avoid`, `shared`, "
                    "`negative_prompt` and `callback`"
                ),
            ),
            InputParam(
                "generator",
                type_hint=torch.Generator | list[torch.Generator],
                description=(
                    "Torch generator for deterministic generation. Its initial seed is the seed of "
                    "the search, which draws nothing from it. Of a list with one per image made, "
                    "the search takes the first of each prompt"
                ),
            ),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("prompt", type_hint=list[str], description="The prompts learned"),
            OutputParam(
                "pez_results",
                type_hint=list[Result],
                description="The result of each search: similarity, tokens, other candidates",
            ),
        ]

    @torch.no_grad()
    def __call__(
        self, components: ModularPipeline, state: PipelineState
    ) -> tuple[ModularPipeline, PipelineState]:
        block_state: Any = self.get_block_state(state)
        options = check_options(block_state.options)
        check_keywords("task_kwargs", block_state.task_kwargs, "invert", keywords_of(invert))
        task_kwargs = dict(block_state.task_kwargs or {})
        images = load_pictures("target_image", block_state.target_image)
        prompts = 1 if is_shared(task_kwargs) else len(images)
        seeds = search_seeds(block_state.generator, options, prompts)
        options = replace(options, seed=tuple(seeds))
        callback = task_kwargs.pop("callback", None)
        _check_clip(components.clip)

        new_bar: Any = self.progress_bar
        with new_bar(total=options.work.total) as progress_bar:

            def report(state: Report) -> bool | None:
                progress_bar.total = state.steps
                progress_bar.update(state.step - progress_bar.n)
                progress_bar.set_postfix(similarity=f"{state.similarity:.4f}")
                return callback(state) if callback is not None else None

            with named(images="target_image"):
                block_state.pez_results = components.clip(
                    lambda clip: invert(clip, images, options, callback=report, **task_kwargs)
                )
        block_state.prompt = [result.prompt for result in block_state.pez_results]
        self.set_block_state(state, block_state)
        return components, state


def _check_clip(clip: PezClipModel | None) -> None:
    if not isinstance(clip, PezClipModel):
        raise ArgumentTypeError(
            "clip",
            f"has to be a PezClipModel but is {type(clip).__name__}",
            "give it by update_components(clip=PezClipModel.load(...)) or load_components()",
        )
