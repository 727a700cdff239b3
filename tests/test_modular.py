"""The block of Modular Diffusers: alone, and in front of those of Stable Diffusion XL."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import ModularPipeline, ModularPipelineBlocks, StableDiffusionXLAutoBlocks
from PIL import Image
from tiny_diffusion import stable_diffusion_xl

from pez_core import ArgumentError, Report, SearchOptions, Vocabulary, invert
from pez_core.diffusion import PezClipModel
from pez_core.diffusion.modular import PezPromptStep
from pez_core.options import EFFORTS

FISH, GLASSES = (ROOT / "examples" / f"noto-{name}.png" for name in ("fish", "glasses"))
FOUND = SearchOptions(prompt_len=4, swaps=0, steps=5, restarts=2)
QUICK = {"options": FOUND}
DENOISE = {"num_inference_steps": 2, "output": "images"}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def found(clip, images, seed, **arguments):
    return invert(clip, images, replace(FOUND, seed=seed), **arguments)


@pytest.fixture(scope="module")
def component(emoji_clip):
    return PezClipModel.from_clip(emoji_clip)


@pytest.fixture(scope="module")
def alone(component):
    pipe = PezPromptStep().init_pipeline()
    pipe.update_components(clip=component)
    return pipe


@pytest.fixture(scope="module")
def tiny():
    """Components of Stable Diffusion XL."""
    return {k: v for k, v in stable_diffusion_xl().components.items() if v is not None}


@pytest.fixture(scope="module")
def xl(tiny):
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(**tiny)
    return pipe


@pytest.fixture(scope="module")
def joined(tiny, component):
    blocks = StableDiffusionXLAutoBlocks()
    blocks.sub_blocks.insert("pez", PezPromptStep(), 0)
    pipe = blocks.init_pipeline()
    pipe.update_components(clip=component, **tiny)
    return pipe


def gap(ours, theirs):
    """The largest difference of two lists of pictures, in 255ths."""
    pairs = zip(ours, theirs, strict=True)
    return max(np.abs(np.subtract(a, b, dtype=float)).max() for a, b in pairs)


def test_the_prompts_are_those_of_invert(alone, emoji_clip):
    drawn = generator(3)
    before = drawn.get_state()
    state = alone(target_image=str(FISH), generator=drawn, **QUICK)
    (expected,) = found(emoji_clip, FISH, seed=3)
    assert state.get("prompt") == [expected.prompt]
    (result,) = state.get("pez_results")
    assert result.similarity == pytest.approx(expected.similarity, abs=1e-5)
    assert torch.equal(drawn.get_state(), before)

    pictures = [Image.open(FISH), GLASSES]
    both = [result.prompt for result in found(emoji_clip, [FISH, GLASSES], seed=[3, 4])]
    assert (
        alone(
            target_image=pictures, generator=[generator(3), generator(4)], output="prompt", **QUICK
        )
        == both
    )
    # two images of each prompt
    four = [generator(seed) for seed in (3, 8, 4, 9)]
    assert alone(target_image=pictures, generator=four, output="prompt", **QUICK) == both


def test_without_a_generator_the_seed_is_that_of_the_options(alone, emoji_clip):
    inputs = {"target_image": FISH, "output": "prompt"}
    seven = replace(FOUND, seed=7)
    prompts = [alone(**inputs, **QUICK), alone(**inputs, options=seven)]
    assert prompts == [[found(emoji_clip, FISH, seed)[0].prompt] for seed in (0, 7)]
    assert prompts[0] != prompts[1]
    assert alone(**inputs, options=seven, generator=generator(0)) == prompts[0]


def test_further_arguments_go_to_invert(alone, emoji_clip):
    reports = []
    arguments = {"caption": "a photo of {}", "shared": True, "avoid": "a fish"}
    options = replace(FOUND, vocabulary=Vocabulary(ascii_only=True))
    (prompt,) = alone(
        target_image=[FISH, GLASSES],
        output="prompt",
        options=options,
        task_kwargs=arguments | {"callback": reports.append},
    )
    (expected,) = invert(emoji_clip, [FISH, GLASSES], options, **arguments)
    assert prompt == expected.prompt and isinstance(reports[0], Report)
    assert [report.step for report in reports] == [1, 2, 3, 4, 5]
    stopped = alone(
        target_image=FISH, task_kwargs={"callback": lambda report: report.step == 2}, **QUICK
    ).get("pez_results")
    assert stopped[0].history[-1][0] == 2
    negative = alone(target_image=FISH, task_kwargs={"negative_prompt": True}, **QUICK)
    (expected,) = found(emoji_clip, FISH, 0, negative_prompt=True)
    assert negative.get("prompt") == [expected.prompt]


def bar(effort):
    """The end of the progress bar of a whole search."""
    return f"{EFFORTS[effort].total}/{EFFORTS[effort].total}"


@pytest.mark.slow
def test_the_options_are_those_of_invert(alone, emoji_clip, capfd, clock):
    prompts = alone(target_image=FISH, output="prompt")
    assert prompts == [invert(emoji_clip, FISH)[0].prompt]
    assert bar("balanced") in capfd.readouterr().err
    options = SearchOptions(prompt_len=3, effort="fast")
    fast = alone(target_image=FISH, options=options, output="prompt")
    assert fast == [invert(emoji_clip, FISH, options)[0].prompt]
    assert bar("fast") in capfd.readouterr().err
    clock.tick = 0.01
    alone(target_image=FISH, options=replace(options, time_limit=0.5))
    assert "100%" in capfd.readouterr().err


def test_its_prompt_takes_the_place_of_the_users(joined, xl):
    assert "prompt" in xl.blocks.input_names and "prompt" not in joined.blocks.input_names
    assert {"target_image", "prompt_2", "negative_prompt", "image"} < set(joined.blocks.input_names)
    assert {"options", "task_kwargs"} < set(joined.blocks.input_names)
    assert "target_image" in joined.doc and "clip (`PezClipModel`)" in joined.doc


@pytest.mark.parametrize("kind", ["text2image", "image2image"])
def test_from_a_target_to_a_picture(kind, joined, xl, emoji_clip):
    options = DENOISE
    if kind == "image2image":
        start = Image.open(GLASSES).convert("RGB").resize((64, 64))
        options = DENOISE | {"image": start, "strength": 0.5}
    images = joined(target_image=FISH, generator=generator(3), **QUICK, **options)
    (image,) = images
    assert isinstance(image, Image.Image) and image.size == (64, 64)
    prompt = found(emoji_clip, FISH, seed=3)[0].prompt
    assert gap(images, xl(prompt=prompt, generator=generator(3), **options)) <= 1
    assert gap(images, xl(prompt="a", generator=generator(3), **options)) > 4
    if kind == "image2image":
        assert gap(images, xl(prompt=prompt, generator=generator(3), **DENOISE)) > 4


def test_several_targets_and_pictures_of_each(joined, xl, emoji_clip):
    generators = [[generator(seed) for seed in (1, 2, 3, 4)] for _ in range(2)]
    options = DENOISE | {"num_images_per_prompt": 2}
    images = joined(target_image=[FISH, GLASSES], generator=generators[0], **QUICK, **options)
    assert len(images) == 4
    prompts = [result.prompt for result in found(emoji_clip, [FISH, GLASSES], seed=[1, 3])]
    assert gap(images, xl(prompt=prompts, generator=generators[1], **options)) <= 1


@pytest.mark.slow
def test_a_saved_pipeline_is_loaded_by_its_blocks(joined, tmp_path):
    joined.save_pretrained(str(tmp_path / "saved"), overwrite_modular_index=True)
    folder = shutil.move(tmp_path / "saved", tmp_path / "moved")
    pipe = joined.blocks.init_pipeline(str(folder))
    pipe.load_components()
    assert isinstance(pipe.clip, PezClipModel) and pipe.clip is not joined.clip
    images = [
        one(target_image=FISH, generator=generator(), **QUICK, **DENOISE) for one in (joined, pipe)
    ]
    assert gap(*images) <= 1


def test_a_folder_that_names_the_block_is_loaded_without_it(alone, tmp_path, monkeypatch):
    cache = str(tmp_path / "cache")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", cache)
    folder = str(tmp_path / "saved")
    alone.save_pretrained(folder, overwrite_modular_index=True)
    PezPromptStep().save_pretrained(folder)
    (tmp_path / "saved/modular.py").write_text("from pez_core.diffusion import PezPromptStep\n")
    blocks = ModularPipelineBlocks.from_pretrained(folder, trust_remote_code=True)
    assert type(blocks) is PezPromptStep
    pipe = ModularPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.load_components()
    prompts = [
        one(target_image=FISH, generator=generator(), output="prompt", **QUICK)
        for one in (alone, pipe)
    ]
    assert prompts[0] == prompts[1]


def test_the_bar_is_silenced_with_the_others(joined, component, capfd):
    joined(target_image=FISH, **QUICK, **DENOISE)
    shown = capfd.readouterr().err
    assert "5/5" in shown and "similarity=" in shown
    joined.set_progress_bar_config(disable=True)
    joined(target_image=FISH, **QUICK, **DENOISE)
    joined.set_progress_bar_config()
    assert "similarity=" not in capfd.readouterr().err

    block = PezPromptStep()
    block.set_progress_bar_config(disable=True)
    pipe = block.init_pipeline()
    pipe.update_components(clip=component)
    pipe(target_image=FISH, **QUICK)
    assert "similarity=" not in capfd.readouterr().err


def test_wrong_arguments_are_named(alone, emoji_clip):
    with pytest.raises(ValueError, match="'target_image' is missing"):
        alone(**QUICK)
    with pytest.raises(ArgumentError, match=r"`target_image`.*nowhere.png"):
        alone(target_image="nowhere.png", **QUICK)
    with pytest.raises(TypeError, match="`options` has to be a SearchOptions"):
        alone(target_image=FISH, options={"steps": 3})
    for name, remedy in (("steps", "; give it in `options`"), ("stepz", ""), ("images", "")):
        message = f"`task_kwargs` has the key '{name}', but invert takes caption, avoid.*{remedy}"
        with pytest.raises(TypeError, match=message):
            alone(target_image=FISH, task_kwargs={name: 1}, **QUICK)
    with pytest.raises(ArgumentError, match=r"`caption` has to hold .* once"):
        alone(target_image=FISH, task_kwargs={"caption": "{} {}"}, **QUICK)
    with pytest.raises(ValueError, match="`generator` has to hold one for each of 2 prompts"):
        alone(target_image=[FISH, GLASSES], generator=[generator()] * 3, **QUICK)
    with pytest.raises(TypeError, match="`clip` has to be a PezClipModel but is NoneType"):
        PezPromptStep().init_pipeline()(target_image=FISH, **QUICK)
