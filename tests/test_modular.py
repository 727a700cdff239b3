"""The block of Modular Diffusers: alone, and in front of those of Stable Diffusion XL."""

import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import ModularPipeline, ModularPipelineBlocks, StableDiffusionXLAutoBlocks
from PIL import Image
from tiny_diffusion import stable_diffusion_xl

from pez_core import Vocabulary, invert
from pez_core.diffusion import PezClipModel
from pez_core.diffusion.modular import PezPromptStep
from pez_core.presets import PRESETS

FISH, GLASSES = (ROOT / "examples" / f"noto-{name}.png" for name in ("fish", "glasses"))
QUICK = {"prompt_len": 4, "pez_steps": 5, "restarts": 2}
DENOISE = {"num_inference_steps": 2, "output": "images"}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def found(clip, images, seed, **options):
    return invert(clip, images, prompt_len=4, steps=5, restarts=2, seed=seed, **options)


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
    expected = found(emoji_clip, FISH, seed=3)
    assert state.get("prompt") == [expected.prompt]
    (result,) = state.get("pez_results")
    assert result.similarity == pytest.approx(expected.similarity, abs=1e-5)
    assert torch.equal(drawn.get_state(), before)

    pictures = [Image.open(FISH), GLASSES]
    both = [found(emoji_clip, [FISH, GLASSES], seed=[3, 4])[k].prompt for k in (0, 1)]
    assert (
        alone(
            target_image=pictures, generator=[generator(3), generator(4)], output="prompt", **QUICK
        )
        == both
    )
    # two images of each prompt
    four = [generator(seed) for seed in (3, 8, 4, 9)]
    assert alone(target_image=pictures, generator=four, output="prompt", **QUICK) == both


def test_without_a_generator_the_seed_is_drawn(alone, emoji_clip):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prompts = [alone(target_image=FISH, output="prompt", **QUICK) for _ in range(2)]
        torch.manual_seed(0)
        seeds = [int(torch.randint(2**31, ())) for _ in range(2)]
    assert prompts == [[found(emoji_clip, FISH, seed).prompt] for seed in seeds]
    assert prompts[0] != prompts[1]


def test_further_arguments_go_to_invert(alone, emoji_clip):
    reports = []
    options = {"vocabulary": Vocabulary(ascii_only=True), "template": "a photo of {}"}
    (prompt,) = alone(
        target_image=[FISH, GLASSES],
        generator=generator(),
        output="prompt",
        pez_kwargs=options | {"shared": True, "callback": reports.append},
        **QUICK,
    )
    expected = found(emoji_clip, [FISH, GLASSES], 0, shared=True, **options)
    assert prompt == expected.prompt
    assert [report["step"] for report in reports] == [1, 2, 3, 4, 5]
    stopped = alone(
        target_image=FISH,
        generator=generator(),
        pez_kwargs={"callback": lambda report: report["step"] == 2},
        **QUICK,
    ).get("pez_results")
    assert stopped[0].history[-1][0] == 2


def bar(preset):
    """What the progress bar of a whole search says in the end."""
    return f"{PRESETS[preset].total}/{PRESETS[preset].total}"


def test_without_steps_it_is_the_balanced_preset(alone, emoji_clip, capfd):
    settings = {"target_image": FISH, "prompt_len": 3, "restarts": 1, "generator": generator()}
    prompts = alone(**settings, output="prompt")
    assert prompts == [invert(emoji_clip, FISH, 3, preset="balanced").prompt]
    assert bar("balanced") in capfd.readouterr().err
    fast = alone(**settings, pez_kwargs={"preset": "fast"}, output="prompt")
    assert fast == [invert(emoji_clip, FISH, 3, preset="fast").prompt]
    assert bar("fast") in capfd.readouterr().err
    alone(**settings, pez_kwargs={"time_limit": 0.5})
    assert "100%" in capfd.readouterr().err


def test_its_prompt_takes_the_place_of_the_users(joined, xl):
    assert "prompt" in xl.blocks.input_names and "prompt" not in joined.blocks.input_names
    assert {"target_image", "prompt_2", "negative_prompt", "image"} < set(joined.blocks.input_names)
    defaults = joined.default_call_parameters
    assert (defaults["prompt_len"], defaults["pez_steps"], defaults["restarts"]) == (16, None, 4)
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
    prompt = found(emoji_clip, FISH, seed=3).prompt
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


def test_what_cannot_be_done_is_said(alone, emoji_clip):
    with pytest.raises(ValueError, match="'target_image' is missing"):
        alone(**QUICK)
    with pytest.raises(ValueError, match=r"`target_image`: .* does not exist"):
        alone(target_image="nowhere.png", **QUICK)
    for name, instead in (("steps", "pez_steps"), ("seed", "generator"), ("clip", "clip")):
        with pytest.raises(TypeError, match=f"`pez_kwargs` holds '{name}'; give `{instead}`"):
            alone(target_image=FISH, pez_kwargs={name: 1}, **QUICK)
    with pytest.raises(TypeError, match="`pez_kwargs` holds 'stepz', which"):
        alone(target_image=FISH, pez_kwargs={"stepz": 1}, **QUICK)
    with pytest.raises(ValueError, match="`preset` has to be one of 'fast'"):
        alone(target_image=FISH, pez_kwargs={"preset": "slow"}, **QUICK)
    with pytest.raises(ValueError, match="`generator` has to hold one for each of 2 prompts"):
        alone(target_image=[FISH, GLASSES], generator=[generator()] * 3, **QUICK)
    with pytest.raises(TypeError, match="`clip` has to be a PezClipModel but is NoneType"):
        PezPromptStep().init_pipeline()(target_image=FISH, **QUICK)
