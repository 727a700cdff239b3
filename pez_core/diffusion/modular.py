"""PEZ as a block of Modular Diffusers: images in, prompts out."""

from __future__ import annotations

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
from ..learn import Result
from ..tasks import invert
from .clip_model import PezClipModel
from .inputs import check_options, pictures, seeds
from .pipeline import planned

# arguments of `invert` that have an input of their own
_INPUTS = {
    "clip": "clip",
    "images": "target_image",
    "prompt_len": "prompt_len",
    "steps": "pez_steps",
    "restarts": "restarts",
    "seed": "generator",
}


class PezPromptStep(ModularPipelineBlocks):
    """Learns a short text prompt for each image (paper, section 4).

    By itself:

        pipe = PezPromptStep().init_pipeline()
        pipe.update_components(clip=PezClipModel.load("ViT-L-14:openai"))
        prompts = pipe(target_image="photo.jpg", output="prompt")

    In front of the blocks of an image pipeline its `prompt` takes the place of the user's:

        blocks = StableDiffusionXLAutoBlocks()
        blocks.sub_blocks.insert("pez", PezPromptStep(), 0)
        pipe = blocks.init_pipeline("stabilityai/stable-diffusion-xl-base-1.0")
        pipe.load_components()
        pipe.update_components(
            clip=PezClipModel.load(["ViT-L-14:openai", "ViT-bigG-14:laion2b_s39b_b160k"])
        )
        images = pipe(target_image="photo.jpg", output="images")

    The target is not called `image`, which would turn Stable Diffusion XL to image-to-image; both
    can be given. All components have to be on one device, as `pipe.to` puts them. Where the block
    is alone, its progress bar is silenced by `set_progress_bar_config` before `init_pipeline`.

    `pipe.save_pretrained(folder)`, where `folder` is a string, saves the CLIP with the other
    components. Diffusers does not know this class by name, so make the same blocks to load it:
    `pipe = blocks.init_pipeline(folder)`, then `pipe.load_components()`. For a folder that
    `ModularPipelineBlocks.from_pretrained(folder, trust_remote_code=True)` can read, put a file
    `modular.py` with the line `from pez_core.diffusion import PezPromptStep` next to what
    `PezPromptStep().save_pretrained(folder)` writes.
    """

    # a bar like those of the blocks that denoise, silenced together with them
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
                    "Images to learn a prompt for, one or several: pictures, paths, or values in "
                    "[0, 1]"
                ),
            ),
            InputParam(
                "prompt_len", type_hint=int, default=16, description="Tokens to learn, 1 to 75"
            ),
            InputParam(
                "pez_steps",
                type_hint=int,
                description=(
                    "Steps of PEZ; by themselves the paper's search, whose number is 3000. By "
                    "default those of the preset 'balanced', which swaps single tokens after them"
                ),
            ),
            InputParam(
                "restarts",
                type_hint=int,
                default=4,
                description="Searches from different starts, of which the best counts",
            ),
            InputParam(
                "generator",
                type_hint=torch.Generator | list[torch.Generator],
                description=(
                    "Torch generator for deterministic generation. Its initial seed is the "
                    "search's, which does not draw from it; of a list with one for each image "
                    "made, the first of each prompt is the search's"
                ),
            ),
            InputParam(
                "pez_kwargs",
                type_hint=dict,
                description=(
                    "Further arguments of `pez_core.invert`, such as `vocabulary`, `preset`, "
                    "`time_limit` and `readability`"
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
                description="What is known of each prompt: similarity, tokens, other candidates",
            ),
        ]

    @torch.no_grad()
    def __call__(
        self, components: ModularPipeline, state: PipelineState
    ) -> tuple[ModularPipeline, PipelineState]:
        block_state = self.get_block_state(state)
        options = dict(block_state.pez_kwargs or {})
        _check_clip(components.clip)
        check_options("pez_kwargs", options, invert, _INPUTS)
        images = pictures("target_image", block_state.target_image)
        prompts = 1 if options.get("shared") else len(images)
        starts = seeds(block_state.generator, prompts)
        plan = planned(block_state.pez_steps, options, extra=options.get("extra") is not None)
        callback = options.pop("callback", None)

        with self.progress_bar(total=plan.total) as progress_bar:

            def report(progress: dict) -> bool | None:
                progress_bar.total = progress["steps"]
                progress_bar.update(progress["step"] - progress_bar.n)
                progress_bar.set_postfix(similarity=f"{progress['similarity']:.4f}")
                return callback(progress) if callback is not None else None

            found = components.clip(
                lambda clip: invert(
                    clip,
                    images,
                    prompt_len=block_state.prompt_len,
                    steps=block_state.pez_steps,
                    restarts=block_state.restarts,
                    seed=starts,
                    callback=report,
                    **options,
                )
            )
        block_state.pez_results = [found] if isinstance(found, Result) else found
        block_state.prompt = [result.prompt for result in block_state.pez_results]
        self.set_block_state(state, block_state)
        return components, state


def _check_clip(clip: PezClipModel | None) -> None:
    if not isinstance(clip, PezClipModel):
        raise TypeError(
            f"`clip` has to be a PezClipModel but is {type(clip).__name__}; give it by "
            "`update_components(clip=PezClipModel.load(...))` or `load_components()`."
        )
