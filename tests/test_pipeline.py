"""PezPipeline on tiny but real image pipelines, from an example image to pictures."""

import copy
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from conftest import EXAMPLES, ROOT, Clock, make_clip
from diffusers import (
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from test_readability import make_lm
from tiny_diffusion import flux, stable_diffusion, stable_diffusion_xl

from pez_core import (
    ArgumentError,
    Avoid,
    JointClip,
    PezPipeline,
    Report,
    SearchOptions,
    Vocabulary,
    fuse,
    invert,
    load_clip,
    prepare_caption,
    style,
)
from pez_core.diffusion import DenoisingLoss, PezClipModel, PezPipelineOutput, PezPriorOutput
from pez_core.diffusion.image_models import with_both_sizes
from pez_core.diffusion.tasks import TASKS, task_keywords
from pez_core.options import EFFORTS

FISH, GLASSES = (ROOT / "examples" / f"noto-{name}.png" for name in ("fish", "glasses"))
FOUND = SearchOptions(prompt_len=4, swaps=0, steps=6, restarts=2)
QUICK = {"options": FOUND, "num_inference_steps": 2}
SHORT = {"options": replace(FOUND, prompt_len=None), "num_images_per_prompt": 1}
SHORT["num_inference_steps"] = 2


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pipe(emoji_clip):
    pez = PezPipeline.from_pipe(stable_diffusion(), emoji_clip)
    pez.set_progress_bar_config(disable=True)
    return pez


@pytest.fixture
def xl(emoji_clip, second_clip):
    joint = JointClip([emoji_clip, second_clip])
    pez = PezPipeline(joint, stable_diffusion_xl())
    pez.set_progress_bar_config(disable=True)
    return pez


@pytest.fixture(scope="module")
def second_clip():
    return make_clip()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pipe", "xl"])
def test_an_image_becomes_a_prompt_and_pictures(kind, request, tmp_path):
    pez = request.getfixturevalue(kind)
    output = pez(image=str(FISH), generator=generator(), **QUICK)
    assert isinstance(output, PezPipelineOutput)
    assert len(output.images) == 4 and len(output.prompts) == len(output.similarities) == 1
    assert output.images is output[0] and list(output) == ["images", "prompts", "similarities"]
    for k, image in enumerate(output.images):
        image.save(tmp_path / f"{k}.png")
    assert Image.open(tmp_path / "3.png").size == (64, 64)

    (expected,) = invert(pez.clip.clip, FISH, replace(FOUND, seed=generator().initial_seed()))
    assert output.prompts == [expected.prompt] == [r.prompt for r in output.results]
    assert output.similarities == [pytest.approx(expected.similarity, abs=1e-6)]
    alone = pez.pipeline(
        expected.prompt,
        num_inference_steps=2,
        guidance_scale=9.0,
        num_images_per_prompt=4,
        generator=generator(),
    )
    for ours, theirs in zip(output.images, alone.images, strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.slow
def test_flux_takes_prompts_and_keeps_its_own_guidance(emoji_clip, tmp_path):
    pez = PezPipeline.from_pipe(flux(), emoji_clip)
    pez.save_pretrained(tmp_path)
    pez = PezPipeline.from_pretrained(tmp_path)
    pez.set_progress_bar_config(disable=True)
    small = {"height": 32, "width": 32, "max_sequence_length": 32, "num_images_per_prompt": 1}
    images = pez(image=FISH, output_type="pt", **small, **QUICK).images
    assert images.shape == (1, 3, 32, 32) and images.isfinite().all()
    assert pez.guidance_scale == 3.5
    with pytest.raises(ArgumentError, match="`pipeline` has to have unet"):
        pez(image=FISH, denoising_weight=0.5, **small, **QUICK)


def test_several_images_and_generators(pipe):
    settings = QUICK | {"num_images_per_prompt": 2, "output_type": "pt"}
    generators = [generator(seed) for seed in (1, 2, 3, 4)]
    images, prompts, similarities = pipe(
        image=[FISH, GLASSES], generator=generators, return_dict=False, **settings
    )
    assert images.shape == (4, 3, 64, 64) and len(prompts) == len(similarities) == 2
    alone = pipe(image=GLASSES, generator=[generator(3), generator(4)], **settings)
    assert alone.prompts == prompts[1:]
    torch.testing.assert_close(alone.images, images[2:], atol=1e-4, rtol=0)
    assert pipe(image=[FISH], generator=generator(5), **settings).prompts != prompts[:1]


@pytest.mark.parametrize(
    "output_type, kind", [("pil", list), ("pt", torch.Tensor), ("np", np.ndarray)]
)
def test_output_types(pipe, output_type, kind):
    output = pipe(image=FISH, output_type=output_type, num_images_per_prompt=1, **QUICK)
    assert isinstance(output.images, kind) and len(output.images) == 1


@pytest.mark.slow
def test_a_style_is_given_to_subjects(pipe):
    fx = [path for path in EXAMPLES if path.name.startswith("fxemoji")][:3]
    output = pipe(
        image=fx,
        prompt=["a cat", "a castle"],
        task="style",
        generator=generator(),
        num_images_per_prompt=1,
        **QUICK,
    )
    expected = style(pipe.clip.clip, fx, FOUND)
    assert output.prompts == [expected.apply("a cat"), expected.apply("a castle")]
    assert output.similarities == [pytest.approx(expected.similarity)] * 2
    assert len(output.images) == 2 and len(output.results) == 1
    alone = pipe(image=fx, task="style", generator=generator(), num_images_per_prompt=1, **QUICK)
    assert alone.prompts == [expected.prompt]


@pytest.mark.slow
def test_prompts_are_distilled_and_joined(pipe):
    long = ["a yellow face with big eyes and a red hat", "a blue fish under a big white moon"]
    output = pipe(prompt=long, task="distill", generator=generator(), **SHORT)
    assert len(output.images) == 2
    assert [r.tokens_after for r in output.results] == [3, 2]
    one = pipe(prompt=long[1], task="distill", generator=generator(), **SHORT)
    assert one.prompts == output.prompts[1:]

    output = pipe(prompt=["a red car", "at night"], task="fuse", **SHORT)
    assert output.prompts == ["a red car at night"] and len(output.images) == 1
    output = pipe(image=FISH, prompt="a red car", task="fuse", **SHORT)
    assert output.results[0].fused and len(output.results[0].similarities) == 2


def test_syntax_that_diffusers_lacks_counts_as_words(pipe):
    text = "a (red:1.3) cat on a very long mat BREAK a blue sky <lora:foo:1> over a green sea"
    (prompt,) = pipe(prompt=text, task="distill", **SHORT).prompts
    assert not set("()<>:") & set(prompt) and "BREAK" not in prompt
    assert pipe.results[0].tokens_before == 15
    joined = pipe(prompt=["a (red:1.3) cat", "<lora:foo:1> sea"], task="fuse", **SHORT)
    assert joined.prompts == ["a red cat sea"]


@pytest.mark.slow
def test_each_image_may_have_a_caption(pipe):
    captions, settings = ["a fish", "some glasses"], QUICK | {"num_images_per_prompt": 1}
    output = pipe(image=[FISH, GLASSES], prompt=captions, generator=generator(), **settings)
    alone = pipe(image=GLASSES, prompt=captions[1], generator=generator(), **settings)
    assert output.prompts[0].startswith("a fish ")
    assert output.prompts[1] == alone.prompts[0] and len(output.images) == 2


def test_a_caption_that_the_image_pipeline_would_cut_is_refused(pipe):
    """Without one it is encoded in parts, as in ComfyUI."""
    caption = " ".join(["fish"] * 80)
    with pytest.raises(ArgumentError, match=r"`prompt` has 80 tokens.* reads 75 and cuts"):
        pipe(image=FISH, prompt=caption, **QUICK)
    searcher = PezPipeline(pipe.clip)
    searcher.set_progress_bar_config(disable=True)
    output = searcher(image=FISH, prompt=caption, options=FOUND)
    assert output.prompt[0].startswith(f"{caption} ")
    assert "in 2 parts" in output.results[0].note


def test_a_caption_stays_where_it_is(pipe):
    output = pipe(image=FISH, prompt="a drawing of", num_images_per_prompt=1, **QUICK)
    assert output.prompts[0].startswith("a drawing of ")
    output = pipe(image=FISH, prompt="a {} at night", num_images_per_prompt=1, **QUICK)
    assert output.prompts[0].startswith("a ") and output.prompts[0].endswith(" at night")


def test_the_text_of_a_captioner_is_continued(pipe):
    text = "**Caption:** The image shows a blue fish."
    caption, _ = prepare_caption(pipe.clip.clip, text, FOUND, prune_for=FISH)
    output = pipe(image=FISH, prompt=caption, num_images_per_prompt=1, **QUICK)
    assert caption.endswith(", {}") and output.prompts[0].startswith(caption.removesuffix("{}"))


FX = [path for path in EXAMPLES if path.name.startswith("fxemoji")][:3]
# arguments of each task, which all change the result
TASK_KWARGS = {
    "invert": (
        {"image": [FISH, GLASSES]},
        {"avoid": Avoid("a fish", 2), "shared": True, "negative_prompt": True},
    ),
    "style": (
        {"image": FX, "prompt": "a cat"},
        {
            "keep_content": True,
            "content": "face eyes emoji smile",
            "images_per_step": 1,
            "style_template": "{style} {subject}",
        },
    ),
    "distill": ({"prompt": "a yellow face with big eyes and a red hat"}, {"ratio": 0.6}),
    "fuse": (
        {"image": FISH, "prompt": ["a red car", "at night"]},
        {"weights": [1, 5, 1], "max_tokens": 2, "always_learn": True},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_task_kwargs_reach_the_task(task, emoji_clip):
    prior = PezPipeline(emoji_clip)
    prior.set_progress_bar_config(disable=True)
    inputs, arguments = TASK_KWARGS[task]
    captions = {"clean_caption", "prune_caption"} if task == "invert" else set()
    assert {*arguments, *captions} == set(task_keywords(task))
    options = replace(FOUND, prompt_len=None)

    def results(**task_kwargs):
        found = inputs | {"task": task, "options": options}
        output = prior(**found, task_kwargs=task_kwargs)
        return output.prompt, [(r.similarities, r.avoided) for r in output.results]

    plain = results()
    needed = {"images_per_step": {"keep_content": True}}
    for name, value in arguments.items():
        if name == "always_learn":  # an image is always learned
            texts = inputs["prompt"]
            (prompt,) = prior(
                prompt=texts, task="fuse", options=options, task_kwargs={name: value}
            ).prompt
            assert prompt == fuse(emoji_clip, texts, options, always_learn=True).prompt
            continue
        before = results(**needed[name]) if name in needed else plain
        assert results(**needed.get(name, {}), **{name: value}) != before, name


def test_one_prompt_may_serve_several_images(pipe):
    output = pipe(
        image=[FISH, GLASSES],
        generator=[generator(1)],
        task_kwargs={"shared": [1, 3]},
        num_images_per_prompt=1,
        **QUICK,
    )
    (expected,) = invert(pipe.clip.clip, [FISH, GLASSES], replace(FOUND, seed=1), shared=[1, 3])
    assert output.prompts == [expected.prompt] and len(output.images) == 1


@pytest.mark.slow
def test_options_reach_the_search(emoji_clip):
    prior = PezPipeline(emoji_clip)
    prior.set_progress_bar_config(disable=True)
    words = ["red", "blue", "fish", "snow", "night"]
    options = replace(FOUND, vocabulary=Vocabulary(only=words), seed=(3, 5))
    output = prior(image=[FISH, GLASSES], options=options)
    expected = invert(emoji_clip, [FISH, GLASSES], options)
    assert output.prompt == [result.prompt for result in expected]
    assert {word for prompt in output.prompt for word in prompt.split()} <= set(words)
    # each prompt has its own seed in several calls, too
    output = prior(image=[FISH, GLASSES], prompt=["", ""], options=options)
    assert output.prompt == [result.prompt for result in expected]
    # the default options are those of `invert`
    prior(image=FISH, pez_callback_on_step_end=lambda *_: True)
    (usual,) = invert(emoji_clip, FISH, callback=lambda _: True)
    (step, similarity), *more = prior.results[0].history
    assert [(step, pytest.approx(similarity, abs=1e-6)), *more] == usual.history


def test_a_prior_takes_a_generator_for_each_prompt(emoji_clip):
    """It makes no images, of which each would need one."""
    prior = PezPipeline(emoji_clip)
    prior.set_progress_bar_config(disable=True)
    output = prior(image=[FISH, FISH], options=FOUND, generator=[generator(0), generator(7)])
    alone = [invert(emoji_clip, FISH, replace(FOUND, seed=seed))[0].prompt for seed in (0, 7)]
    assert output.prompt == alone
    with pytest.raises(ArgumentError, match="`generator` has to hold one for each of 2 prompts"):
        prior(image=[FISH, FISH], options=FOUND, generator=[generator(0)] * 3)


def test_none_means_the_same_in_an_evaluation(pipe, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "pez_core.diffusion.pipeline.evaluate", lambda *_, **given: asked.append(given)
    )
    pipe.evaluate(FISH, pipe.clip, ["a"])
    pipe.evaluate(FISH, pipe.clip, ["a"], num_inference_steps=None, guidance_scale=None)
    assert asked[0] == asked[1] and asked[0]["num_inference_steps"] == 25


def test_the_seed_is_that_of_the_generator_or_of_the_options(emoji_clip):
    prior = PezPipeline(emoji_clip)
    prior.set_progress_bar_config(disable=True)
    found = {seed: invert(emoji_clip, FISH, replace(FOUND, seed=seed))[0].prompt for seed in (0, 7)}
    assert found[0] != found[7]
    seven = replace(FOUND, seed=7)
    assert prior(image=FISH, options=FOUND).prompt == [found[0]]
    assert prior(image=FISH, options=seven).prompt == [found[7]]
    assert prior(image=FISH, options=seven, generator=generator(0)).prompt == [found[0]]
    with pytest.raises(ArgumentError, match="`seed` has to be one number or 1 of them"):
        prior(image=FISH, options=replace(FOUND, seed=(1, 2)))


@pytest.mark.slow
def test_everything_else_reaches_the_image_pipeline(pipe, monkeypatch):
    asked = {}
    call = StableDiffusionPipeline.__call__

    def spy(self, *args, **kwargs):
        asked.update(kwargs)
        return call(self, *args, **kwargs)

    spy.__signature__ = __import__("inspect").signature(call)
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", spy)
    pipe(
        image=FISH,
        negative_prompt="blurry",
        eta=0.5,
        height=32,
        width=48,
        num_images_per_prompt=1,
        **QUICK,
    )
    assert asked["negative_prompt"] == ["blurry"] and asked["eta"] == 0.5
    assert (asked["height"], asked["width"]) == (32, 48)
    assert asked["guidance_scale"] == 9.0 and asked["num_inference_steps"] == 2
    latents = torch.zeros(1, 4, 32, 32)
    asked.clear()
    one = {"image": FISH, "options": FOUND, "num_images_per_prompt": 1}
    pipe(**one, guidance_scale=3.0, latents=latents, output_type="latent")
    assert asked["guidance_scale"] == 3.0 and asked["num_inference_steps"] == 25
    assert asked["latents"] is latents and asked["output_type"] == "latent"
    assert "height" not in asked


def test_a_prior_feeds_any_pipeline(emoji_clip):
    prior = PezPipeline(clip=emoji_clip)
    prior.set_progress_bar_config(disable=True)
    output = prior(image=FISH, generator=generator(), **QUICK)
    assert isinstance(output, PezPriorOutput) and list(output) == ["prompt"]
    assert output.similarities == [output.results[0].similarity]
    for t2i in (stable_diffusion(), stable_diffusion_xl()):
        images = t2i(**output, num_inference_steps=1, output_type="pt").images
        assert images.shape == (1, 3, 64, 64)
    assert prior(image=FISH, return_dict=False, generator=generator(), **QUICK)[0] == output.prompt


@pytest.mark.slow
def test_a_name_is_enough(tmp_path):
    stable_diffusion().save_pretrained(tmp_path)
    pez = PezPipeline.from_pretrained(tmp_path, clip="emoji-clip", dtype=torch.bfloat16)
    assert isinstance(pez.pipeline, StableDiffusionPipeline)
    assert {component.dtype for component in (pez.clip, pez.pipeline.unet)} == {torch.bfloat16}
    assert pez.clip.clip.dtype == torch.bfloat16
    assert PezPipeline(clip="emoji-clip").clip.clip.name == "emoji-clip"
    assert PezPipeline.from_pipe(pez.pipeline, "emoji-clip").clip.dtype == torch.bfloat16
    again = PezPipeline.from_pipe(pez)
    assert again.clip is pez.clip and again.pipeline is pez.pipeline
    with pytest.raises(ValueError, match=r"`clip` has to be given.*StableDiffusionPipeline"):
        PezPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`clip` has to be given"):
        PezPipeline.from_pipe(pez.pipeline)


@pytest.mark.parametrize("kind", ["pipe", "xl"])
@pytest.mark.slow
def test_saved_as_a_whole_and_loaded_again(kind, request, tmp_path):
    pez = request.getfixturevalue(kind)
    pez.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.bin"))
    assert (tmp_path / "clip/diffusion_pytorch_model.safetensors").is_file()
    assert (tmp_path / "pipeline/unet/diffusion_pytorch_model.safetensors").is_file()

    loaded = PezPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    first, second = (p(image=FISH, generator=generator(), **QUICK) for p in (pez, loaded))
    assert first.prompts == second.prompts
    assert np.array_equal(np.asarray(first.images[3]), np.asarray(second.images[3]))
    assert loaded.clip.clip.trained_tokens == pez.clip.clip.trained_tokens or kind == "xl"
    half = PezPipeline.from_pretrained(tmp_path, dtype=torch.float16)
    assert half.dtype == half.pipeline.dtype == torch.float16


@pytest.mark.slow
def test_variants_and_another_clip(pipe, tmp_path):
    pipe.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    loaded = PezPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert loaded.pipeline.unet.dtype == loaded.clip.dtype == torch.float16
    with pytest.raises((ValueError, OSError)):
        PezPipeline.from_pretrained(tmp_path)
    other = PezPipeline.from_pretrained(tmp_path, variant="fp16", clip=make_clip())
    assert other.clip.clip.name == "tiny"


def test_a_prior_is_saved_without_an_image_pipeline(emoji_clip, tmp_path):
    PezPipeline(clip=emoji_clip).save_pretrained(tmp_path)
    assert PezPipeline.from_pretrained(tmp_path).pipeline is None
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "PezPipeline"
    pez = PezPipeline.from_pretrained(tmp_path, pipeline=stable_diffusion())
    assert isinstance(pez.pipeline, StableDiffusionPipeline)


@pytest.mark.slow
def test_loaded_in_a_process_that_imports_the_public_name_alone(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    code = (
        "from pez_core import PezPipeline; "
        f"print(PezPipeline.from_pretrained({str(tmp_path)!r}).clip.clip.name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "emoji-clip", done.stderr


class Hub(BaseHTTPRequestHandler):
    """The part of the Hugging Face Hub that serves a repository."""

    folder = None

    def do_GET(self):
        path = self.path.split("?")[0]
        if path == "/api/models/me/pez/revision/main":
            files = [{"rfilename": str(p)} for p in self._files()]
            body = json.dumps({"id": "me/pez", "sha": "a" * 40, "siblings": files}).encode()
        elif path == f"/api/models/me/pez/tree/{'a' * 40}":
            files = [{"type": "file", "path": str(p), "size": 1, "oid": "b"} for p in self._files()]
            body = json.dumps(files).encode()
        else:
            file = self.folder / path.split("/", 5)[5]
            if not file.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.end_headers()
                return
            body = file.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def _files(self):
        return [p.relative_to(self.folder) for p in self.folder.rglob("*") if p.is_file()]

    def log_message(self, *arguments):
        pass


@pytest.mark.slow
def test_loaded_from_a_repository_of_the_hub(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(Hub, "folder", tmp_path / "saved")
    pipe.save_pretrained(Hub.folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "from pez_core import PezPipeline; pez = PezPipeline.from_pretrained('me/pez'); "
        "print(pez.clip.clip.name, type(pez.pipeline).__name__)"
    )
    address = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    places = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | address | places,
    )
    server.shutdown()
    assert done.stdout.split() == ["emoji-clip", "StableDiffusionPipeline"], done.stderr


def _state(pipeline, places=False):
    modules = {k: v for k, v in pipeline.components.items() if isinstance(v, torch.nn.Module)}
    return {
        name: (
            module.dtype,
            module.device,
            module.training,
            [(w.requires_grad, w.dtype, places and w.data_ptr()) for w in module.parameters()],
            [len(m._forward_hooks) for m in module.modules()],
        )
        for name, module in modules.items()
    }, dict(pipeline.scheduler.config)


@pytest.mark.slow
@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_xl])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_of_the_callers_pipeline_changes(make, dtype, emoji_clip):
    t2i = make().to(dtype)
    t2i.vae.requires_grad_(False)
    t2i("a cat", num_inference_steps=1, output_type="latent")  # transformers adds hooks of its own
    before = _state(t2i, places=True)
    pez = PezPipeline.from_pipe(t2i, emoji_clip)
    assert _state(t2i, places=True) == before
    before = _state(t2i)
    pez.set_progress_bar_config(disable=True)
    pez(image=FISH, num_images_per_prompt=1, **QUICK)
    assert _state(t2i) == before
    assert emoji_clip.model.ln_final.weight.requires_grad and emoji_clip.dtype == torch.float32
    assert all(w.grad is None for w in t2i.unet.parameters())


def test_moved_as_a_whole(pipe):
    assert pipe.to(torch.float16) is pipe
    assert pipe.dtype == pipe.clip.clip.dtype == pipe.pipeline.unet.dtype == torch.float16
    assert pipe.to("cpu", torch.float32).pipeline.unet.dtype == torch.float32
    assert pipe.to("meta").pipeline.device == pipe.device == torch.device("meta")


@pytest.mark.slow
def test_offloaded_as_a_whole(pipe):
    settings = QUICK | {"image": FISH, "num_images_per_prompt": 1, "output_type": "pt"}
    expected = pipe(generator=generator(), **settings)
    pipe.enable_model_cpu_offload(device="cpu")
    assert hasattr(pipe.clip, "_hf_hook") and hasattr(pipe.pipeline.unet, "_hf_hook")
    for _ in range(2):
        output = pipe(generator=generator(), **settings)
        assert output.prompts == expected.prompts
        torch.testing.assert_close(output.images, expected.images, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_one_way_of_offloading_after_the_other(pipe):
    expected = pipe(image=FISH, generator=generator(), **QUICK).prompts
    pipe.enable_sequential_cpu_offload(device="cpu")
    pipe.enable_model_cpu_offload(device="cpu")
    assert {w.device.type for w in pipe.pipeline.unet.parameters()} == {"cpu"}
    assert pipe(image=FISH, generator=generator(), **QUICK).prompts == expected


def test_sequential_offloading_leaves_the_clip_whole(pipe, emoji_clip):
    pipe.enable_sequential_cpu_offload(device="cpu")
    assert {w.device.type for w in pipe.pipeline.unet.parameters()} == {"meta"}
    assert {w.device.type for w in pipe.clip.parameters()} == {"cpu"}
    prior = PezPipeline(emoji_clip)
    prior.set_progress_bar_config(disable=True)
    expected = prior(image=FISH, generator=generator(), **QUICK)
    prior.enable_sequential_cpu_offload(device="cpu")
    assert prior(image=FISH, generator=generator(), **QUICK) == expected


def test_the_clip_is_offloaded_before_images_are_made(pipe, monkeypatch):
    pipe.enable_model_cpu_offload(device="cpu")
    order = []
    (hook,) = pipe._all_hooks
    monkeypatch.setattr(type(hook), "offload", lambda self: order.append("offload"))
    pipe(
        image=FISH,
        num_images_per_prompt=1,
        callback_on_step_end=lambda pipe, i, t, kwargs: order.append("step") or kwargs,
        **QUICK,
    )
    assert order.index("offload") < order.index("step")


def test_a_named_clip_is_whole_beside_a_pipeline_that_is_offloaded_in_pieces():
    t2i = stable_diffusion()
    t2i.enable_sequential_cpu_offload(device="cpu")
    pez = PezPipeline.from_pipe(t2i, "emoji-clip")
    assert {w.device.type for w in pez.clip.parameters()} == {"cpu"}


def test_a_named_clip_follows_an_offloaded_pipeline():
    t2i = stable_diffusion()
    t2i.enable_model_cpu_offload(device="cpu")
    hooks = list(t2i._all_hooks)
    pez = PezPipeline.from_pipe(t2i, "emoji-clip")
    assert hasattr(pez.clip, "_hf_hook") and t2i._all_hooks == hooks
    assert pez.pipeline is t2i


def test_progress_bars(pipe, capsys):
    pipe.set_progress_bar_config(desc="here")
    pipe(image=FISH, num_images_per_prompt=1, **QUICK)
    err = capsys.readouterr().err
    assert "6/6" in err and "similarity=0." in err and "2/2" in err
    pipe.set_progress_bar_config(disable=True)
    pipe(image=FISH, num_images_per_prompt=1, **QUICK)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_the_progress_bar_has_the_steps_of_the_options(emoji_clip, capsys):
    prior = PezPipeline(emoji_clip)
    total = EFFORTS["fast"].total
    fast = SearchOptions(prompt_len=3, effort="fast")
    found = prior(image=FISH, options=fast).results[0]
    assert f"{total}/{total}" in capsys.readouterr().err and found.history[-1][0] == total
    prior(image=FISH, options=replace(fast, steps=4, swaps=3))
    assert "7/7" in capsys.readouterr().err


@pytest.mark.slow
def test_a_time_limit_is_for_the_whole_call(emoji_clip, capsys, clock):
    clock.tick = 0.02
    prior = PezPipeline(emoji_clip)
    options = SearchOptions(prompt_len=3, effort="fast", time_limit=3)
    for inputs, each in (
        ({"image": [FISH, GLASSES]}, 3),  # side by side
        ({"image": [FISH, GLASSES], "prompt": ["a fish", "glasses"]}, 1.5),
        ({"task": "distill", "prompt": ["a big blue fish", "a yellow face at night"]}, 1.5),
    ):
        results = prior(**inputs, options=options).results
        assert "100%" in capsys.readouterr().err and len(results) == 2
        # a search reads the clock a few times before it ends
        seconds = [result.seconds for result in results]
        assert all(each - 0.2 < one < 1.2 * each for one in seconds), seconds


def test_the_time_of_pruning_counts(emoji_clip, monkeypatch):
    found, limits = PezPipeline(emoji_clip)(image=FISH, options=FOUND).results, []

    def change(clip, images, options, arguments):
        clock.now += 2
        return {"caption": "a fish"}, ""

    def search(clip, images, options, **arguments):
        limits.append(options.time_limit)
        return found

    clock = Clock()
    monkeypatch.setattr("pez_core.diffusion.pipeline.time", clock)
    monkeypatch.setattr("pez_core.options.time", clock)
    monkeypatch.setattr("pez_core.diffusion.pipeline.change_caption", change)
    monkeypatch.setitem(TASKS, "invert", search)
    pruned = {"prompt": "a fish", "task_kwargs": {"prune_caption": True}}
    PezPipeline(emoji_clip)(image=[FISH, FISH], options=SearchOptions(time_limit=10), **pruned)
    # of 10 s half, of which 2 are gone; then the 8 that are left, of which 2 are gone
    assert limits == [3, 6]


@pytest.mark.slow
def test_a_language_model_is_loaded_once(emoji_clip, monkeypatch):
    lm = make_lm()
    loaded = []
    monkeypatch.setattr(
        "pez_core.priors.load_language_model", lambda **given: loaded.append(given) or lm
    )
    prior = PezPipeline(emoji_clip)
    prior.set_progress_bar_config(disable=True)

    def results(**options):
        options = SearchOptions(prompt_len=2, effort="fast", swaps=4, **options)
        given = {"image": [FISH, GLASSES], "prompt": ["a fish", "a pair of"]}
        return prior(**given, options=options).results

    for options in ({"readability": 0.5}, {"wording": "tags"}):
        assert all(result.perplexity is not None for result in results(**options))
    assert loaded == []  # the bundled one serves
    monkeypatch.setattr("pez_core.priors.reads_like_clip", lambda words: False)
    assert all(result.perplexity > 1 for result in results(readability=0.5))
    assert len(loaded) == 1


@pytest.mark.slow
@pytest.mark.parametrize("wording", ["tags", "sentence"])
def test_a_wording_is_that_of_the_core(emoji_clip, wording):
    options = SearchOptions(prompt_len=3, effort="fast", swaps=4, wording=wording)
    prior = PezPipeline(emoji_clip)
    prior.set_progress_bar_config(disable=True)
    (result,) = prior(image=FISH, options=options).results
    (expected,) = invert(emoji_clip, FISH, options)
    assert result.prompt == expected.prompt and result.perplexity is not None


@pytest.mark.slow
def test_the_denoising_loss_needs_a_search_without_swaps(pipe):
    settings = {"image": FISH, "num_images_per_prompt": 1, "num_inference_steps": 1}
    settings |= {"denoising_weight": 0.5, "denoising_kwargs": {"samples": 1}}
    for options in (None, SearchOptions(effort="fast"), SearchOptions(readability=0.5)):
        with pytest.raises(ArgumentError, match="`denoising_weight` cannot be refined by swaps"):
            pipe(**settings, options=options)
    totals = []

    def stop(pez, step, report):
        totals.append(report.steps)
        return True

    for options in (SearchOptions(effort="paper"), SearchOptions(swaps=0)):
        (result,) = pipe(**settings, options=options, pez_callback_on_step_end=stop).results
        assert result.extra_loss is not None
    assert totals == [3000, EFFORTS["balanced"].steps]


def test_a_loss_of_ones_own_is_not_replaced(pipe):
    loss = DenoisingLoss(pipe.pipeline, FISH, pipe.clip.clip, 0.5, samples=1)
    options = replace(FOUND, extra_loss=loss)
    with pytest.raises(ArgumentError, match="`denoising_weight` is an `extra_loss`, and"):
        pipe(image=FISH, options=options, denoising_weight=0.5)


@pytest.mark.slow
def test_denoising_arguments_reach_the_loss(pipe):
    def loss(weight=0.5, **kwargs):
        output = pipe(
            image=FISH,
            denoising_weight=weight,
            denoising_kwargs=kwargs,
            num_images_per_prompt=1,
            **QUICK,
        )
        return output.prompts, output.results[0].extra_loss

    one = loss(samples=1)
    assert loss(samples=1) == one
    assert loss(samples=2) != one and loss(samples=1, timesteps=(0.1, 0.2)) != one
    assert loss(samples=1, generator=generator(1)) != one
    assert loss(0.999, samples=1)[0] != one[0] or loss(1, samples=1)[0] != one[0]


def test_two_separate_callbacks(pipe):
    learning, making = [], []

    def learned(pez, step, report):
        assert pez is pipe and isinstance(report, Report)
        assert report.prompts == pez.prompts and report.step == step and report.steps == 6
        (words,) = [report.explain(k) for k in range(len(report.prompts))]
        assert " ".join(word.word for word in words) == report.prompt
        learning.append(step)

    def made(t2i, i, t, kwargs):
        assert t2i is pipe.pipeline and set(kwargs) == {"latents"}
        making.append(i)
        return kwargs

    settings = {"callback_on_step_end": made, "callback_on_step_end_tensor_inputs": ["latents"]}
    pipe(image=FISH, pez_callback_on_step_end=learned, **settings, **QUICK)
    assert learning == [1, 2, 3, 4, 5, 6] and making == [0, 1]
    assert pipe.num_timesteps == 2 and pipe.guidance_scale == 9.0


def test_interrupting_the_search_makes_images_of_the_best_so_far(pipe):
    steps = []

    def stop(pez, step, report):
        steps.append((step, report.prompts))
        pez._interrupt = step == 3
        return report  # as callbacks of diffusers return their last argument

    output = pipe(image=FISH, pez_callback_on_step_end=stop, **QUICK)
    assert [step for step, _ in steps] == [1, 2, 3]
    assert output.prompts == steps[-1][1] and len(output.images) == 4
    assert pipe.interrupt
    assert len(pipe(image=FISH, **QUICK).results[0].history) == 6 and not pipe.interrupt


def test_returning_true_ends_the_search_too_and_what_was_not_reached_is_left_out(pipe):
    long = ["a yellow face with big eyes and a red hat", "a blue fish under a big white moon"]
    output = pipe(
        prompt=long,
        task="distill",
        generator=[generator(1), generator(2)],
        pez_callback_on_step_end=lambda pez, step, report: step == 2,
        **SHORT,
    )
    assert len(output.prompts) == len(output.images) == 1 and pipe.interrupt


def test_a_failure_while_making_images_keeps_the_prompts(pipe, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(pipe.pipeline.unet, "forward", fail)
    with (
        caplog.at_level(logging.ERROR, "pez_core"),
        pytest.raises(torch.OutOfMemoryError, match="no memory left"),
    ):
        pipe(image=[FISH, GLASSES], generator=generator(), **QUICK)
    assert len(pipe.prompts) == len(pipe.results) == 2
    assert pipe.prompts == [result.prompt for result in pipe.results]
    assert pipe.prompts[0] in caplog.text


def test_a_failure_while_learning_keeps_the_best_so_far(pipe):
    def fail(pez, step, report):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(image=FISH, pez_callback_on_step_end=fail, **QUICK)
    assert len(pipe.prompts) == 1 and pipe.prompts[0].split()
    assert pipe.results == []
    with pytest.raises(ValueError):
        pipe(image="nothing.png")
    assert pipe.prompts == []


def test_calls_from_two_threads_do_not_mix(pipe):
    """The first call waits, after its first step, for the second one to begin."""
    settings = QUICK | {"num_images_per_prompt": 1, "output_type": "pt"}
    inputs = {"a": (FISH, 1), "b": (GLASSES, 2)}
    expected = {
        name: pipe(image=image, generator=generator(seed), **settings)
        for name, (image, seed) in inputs.items()
    }
    first_runs, second_begins = threading.Event(), threading.Event()
    outputs = {}

    def wait(pez, step, report):
        first_runs.set()
        second_begins.wait(20)

    def call(name):
        image, seed = inputs[name]
        if name == "b":
            first_runs.wait(20)
            threading.Timer(0.5, second_begins.set).start()
        callback = wait if name == "a" else None
        outputs[name] = pipe(
            image=image,
            generator=generator(seed),
            pez_callback_on_step_end=callback,
            **settings,
        )

    threads = [threading.Thread(target=call, args=(name,)) for name in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, output in outputs.items():
        assert output.prompts == expected[name].prompts and len(output.results) == 1
        assert output.results[0].prompt == output.prompts[0]
        # the last bits depend on the alignment of memory
        torch.testing.assert_close(output.images, expected[name].images, atol=1e-5, rtol=1e-4)


def test_a_copy_has_a_lock_of_its_own(emoji_clip):
    prior = PezPipeline(emoji_clip)
    prior.set_progress_bar_config(disable=True)
    other = copy.deepcopy(prior)
    assert other.clip is not prior.clip
    found = []

    def ask(pez, step, report):
        if not found:  # another thread uses the copy meanwhile
            thread = threading.Thread(
                target=lambda: found.append(other(image=FISH, options=FOUND).prompt)
            )
            thread.start()
            thread.join(60)

    output = prior(image=FISH, options=FOUND, pez_callback_on_step_end=ask)
    assert found == [output.prompt]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "`image` has to be given for the task 'invert'"),
        ({"image": FISH, "task": "paint"}, "`task` has to be one of 'invert', 'style'.*'paint'"),
        ({"image": FISH, "prompt": 3}, "`prompt` has to be a string or a list of strings"),
        ({"image": FISH, "prompt": [3]}, "`prompt` has to be a string"),
        ({"image": FISH, "prompt": ["a", "b"]}, "`prompt` has to hold one caption for each of 1"),
        (
            {"image": FISH, "prompt": ["a"], "task_kwargs": {"shared": True}},
            "`prompt` has to be one string with `shared`",
        ),
        ({"image": FISH, "prompt": "a {} {}"}, "`prompt` has to hold {} once"),
        (
            {"image": FISH, "prompt": "word " * 72, "options": SearchOptions(prompt_len=16)},
            "`prompt` has 72 tokens, and 16 are learned at least",
        ),
        ({"image": FISH, "options": {"steps": 3}}, "`options` has to be a SearchOptions"),
        ({"image": FX, "task": "style", "task_kwargs": {"style_template": "a"}}, "`style_temp"),
        (
            {"image": FX, "task": "style", "task_kwargs": {"style_template": "{subject} {style}"}},
            "`style_template` needs a subject; give it as `prompt`",
        ),
        ({"prompt": ["a"], "task": "fuse"}, "`prompt` and `image` have to hold two sources"),
        ({"image": FISH, "task": "fuse"}, "`prompt` and `image` have to hold two sources"),
        ({"image": FX, "task": "style", "prompt": [3]}, "`prompt` has to be a string but is 3"),
        ({"image": FX, "task": "style", "prompt": []}, "`prompt` is empty"),
        ({"prompt": [3], "task": "distill"}, "`prompt` has to be a string but is 3"),
        ({"image": FISH, "denoising_kwargs": {"samples": 2}}, "needs a `denoising_weight` above"),
        ({"image": FISH, "num_images_per_prompt": 0}, "`num_images_per_prompt` has to be at least"),
        ({"image": FISH, "num_inference_steps": 0}, "`num_inference_steps` has to be at least 1"),
        ({"image": FISH, "num_inference_steps": 1000}, "was made for fewer than 1000"),
        ({"image": FISH, "guidance_scale": float("nan")}, "`guidance_scale` has to be finite"),
        ({"image": FISH, "task_kwargs": {"prune_caption": True}}, "requires a caption; give it as"),
        ({"task": "distill"}, "`prompt` has to be given for the task 'distill'"),
        ({"task": "distill", "prompt": "a b c", "image": FISH}, "`image` cannot be used"),
        ({"image": FISH, "task": "style"}, "`image` has to hold at least two"),
        ({"image": "nothing.png"}, "`image`.*nothing.png"),
        ({"image": FISH, "output_type": "jpg"}, "`output_type` has to be one of 'pil', 'pt'"),
        ({"image": FISH, "generator": [generator()]}, "`generator` has to hold one for each of 4"),
        ({"image": FISH, "denoising_weight": 2}, "`denoising_weight` has to be from 0 to 1"),
        (
            {"prompt": "a b", "task": "distill", "denoising_weight": 0.5},
            "`denoising_weight` needs an image pipeline and the task 'invert'",
        ),
    ],
)
def test_wrong_arguments_are_named(pipe, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        pipe(**arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image": [FISH, GLASSES], "prompt": ["a", "{}{}"]}, "`prompt` has to hold {} once"),
        ({"image": [FISH, GLASSES], "prompt": ["a", "a " * 80]}, "`prompt` has 80 tokens"),
        ({"task": "distill", "prompt": ["a red dog", "<lora:a:1>"]}, "`prompt` holds no words"),
        ({"task": "distill", "prompt": ["a red dog", str(FISH)]}, "`prompt`.* image"),
        (
            {"image": [FISH, GLASSES], "prompt": ["a", "b"], "denoising_weight": 0.5},
            "`denoising_weight` needs one caption for all images, as a string",
        ),
        ({"image": FISH, "negative_prompt": ("x",)}, "`negative_prompt` has to be a string or"),
        ({"image": FISH, "negative_prompt": 3}, "`negative_prompt` has to be a string or"),
        ({"image": FISH, "callback_on_step_end": 3}, "`callback_on_step_end` has to be a func"),
        ({"image": FISH, "pez_callback_on_step_end": 3}, "`pez_callback_on_step_end` has to be"),
        ({"image": FISH, "latents": "x"}, "`latents` has to be a tensor"),
        ({"image": FISH, "latents": torch.zeros(3, 4, 8, 8)}, "`latents` has to hold one for each"),
        ({"image": FISH, "latents": torch.zeros(())}, r"`latents` .* has shape \(\)"),
        ({"image": FISH, "height": -64, "width": 64}, "`height` has to be at least 1"),
        ({"image": FISH, "height": "64", "width": 64}, "`height` has to be an integer"),
    ],
)
def test_what_would_fail_later_is_found_before_the_search(pipe, monkeypatch, arguments, message):
    monkeypatch.setattr(pipe, "_learn", lambda *given, **named: pytest.fail("searched"))
    options = SearchOptions(steps=2, swaps=0, prompt_len=2)
    with pytest.raises(ArgumentError, match=message):
        pipe(**{"options": options} | arguments)


@pytest.mark.parametrize(
    "kind, message",
    [
        ("StableDiffusionImg2ImgPipeline", "which is no text-to-image pipeline; learn the prompts"),
        ("NoSuchPipeline", "which this version of diffusers does not have; update diffusers, or"),
    ],
)
def test_another_kind_of_pipeline_is_refused_before_anything_is_loaded(
    kind, message, tmp_path, monkeypatch
):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    monkeypatch.setattr(PezClipModel, "load", lambda *given, **named: pytest.fail("loaded"))
    with pytest.raises(ArgumentError, match=message):
        PezPipeline.from_pretrained(tmp_path, clip="emoji-clip")


def test_an_own_clip_needs_a_loaded_pipeline(tmp_path):
    stable_diffusion().save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match=r"call PezPipeline.from_pipe\(pipeline, clip='own'\)"):
        PezPipeline.from_pretrained(tmp_path, clip="own")


def test_arguments_for_each_prompt_end_with_those_that_were_learned(pipe):
    output = pipe(
        image=[FISH, GLASSES],
        prompt=["a", "b"],
        negative_prompt=["x", "y"],
        latents=torch.randn(2, 4, 8, 8, generator=generator()),
        num_images_per_prompt=1,
        pez_callback_on_step_end=lambda *given: True,
        **QUICK,
    )
    assert len(output.prompts) == len(output.images) == 1


def test_negative_prompts_are_repeated_with_the_prompts(emoji_clip):
    asked = []

    class OnePerPrompt(DiffusionPipeline):
        def __call__(self, prompt, negative_prompt=None, generator=None):
            asked.append((prompt, negative_prompt))
            return SimpleNamespace(images=[Image.new("RGB", (8, 8))] * len(prompt)).images, None

    pez = PezPipeline(emoji_clip, OnePerPrompt())
    pez.set_progress_bar_config(disable=True)
    given = {"negative_prompt": ["x", "y"], "num_images_per_prompt": 2, "return_dict": False}
    _, (first, second), _ = pez([FISH, GLASSES], options=FOUND, **given)
    assert asked == [([first, first, second, second], ["x", "x", "y", "y"])]


def test_one_side_of_the_images_has_an_effect(pipe):
    size = {"num_images_per_prompt": 1, **QUICK}
    assert pipe(image=FISH, width=128, **size).images[0].size == (128, 64)
    assert pipe(image=FISH, height=32, **size).images[0].size == (64, 32)
    assert with_both_sizes(flux(), {"height": 32}) == {"height": 32}  # which completes it itself


def test_the_number_and_kind_of_images_may_be_left_out(pipe):
    output = pipe(image=FISH, num_images_per_prompt=None, output_type=None, **QUICK)
    assert len(output.images) == 4 and isinstance(output.images[0], Image.Image)


def test_a_style_that_is_cut_off_is_named(pipe, caplog):
    pipe(image=FX, task="style", prompt="a cat on a mat " * 20, num_images_per_prompt=1, **QUICK)
    assert "cuts off" in caplog.text and pipe.results[0].prompt.split()[-1] in caplog.text
    style = pipe.results[0]
    assert style.apply("") == style.apply(" ") == style.prompt
    with pytest.raises(ArgumentError, match="`subject` has to be a string"):
        style.apply(3)


@pytest.mark.parametrize(
    "wrong, remedy",
    [
        ("num_inference_step", "perhaps `num_inference_steps` is meant"),
        ("images", "perhaps `image` is meant"),
        ("negative_promt", "perhaps `negative_prompt` is meant"),
        ("xyz", "leave it out"),
        ("steps", r"write options=SearchOptions\(steps=...\)"),
        ("seed", r"write options=SearchOptions\(seed=...\)"),
        ("avoid", r"write task_kwargs=\{'avoid': ...\}"),
    ],
)
def test_misspelt_arguments_are_found_before_the_search(pipe, wrong, remedy):
    with pytest.raises(TypeError, match=f"`{wrong}` is not an arg.*Stable.*; {remedy}"):
        pipe(image=FISH, **{wrong: 3})


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"height": 33, "width": 33}, "divisible by 8"),
        ({"callback_on_step_end_tensor_inputs": ["nope"]}, "nope"),
        ({"prompt_embeds": torch.zeros(1, 77, 16)}, "prompt_embeds"),
    ],
)
def test_what_the_image_pipeline_refuses_is_found_before_the_search(pipe, wrong, message):
    steps = []
    with pytest.raises(ValueError, match=message):
        pipe(image=FISH, pez_callback_on_step_end=lambda *one: steps.append(one), **wrong)
    assert not steps and pipe.prompts == []


@pytest.mark.parametrize("name", ["negative_prompt", "negative_prompt_2"])
def test_as_many_negative_prompts_as_prompts(name, emoji_clip):
    pez = PezPipeline(emoji_clip, stable_diffusion_xl())
    reports = []
    given = {"options": FOUND, "pez_callback_on_step_end": lambda *a: reports.append(a)}
    for wrong in (["blurry"], ["a", "b", "c"], []):
        with pytest.raises(
            ArgumentError, match=f"`{name}` has to be a string or one for each of 2"
        ):
            pez(image=[FISH, GLASSES], **given, **{name: wrong})
    assert not reports


def test_further_arguments_are_checked(pipe, emoji_clip):
    with pytest.raises(TypeError, match="`negative_prompt` is not an argument of PezPipeline"):
        PezPipeline(emoji_clip)(image=FISH, negative_prompt="blurry")
    for given, message in (
        ({"learning": 1}, "has the key 'learning', but the task 'invert' takes avoid, shared, neg"),
        ({"caption": "a"}, "has the key 'caption', but the task 'invert' takes avoid"),
        ({"seed": 1}, "has the key 'seed', .*; give it in `options`"),
        ([1], "has to be a dict"),
    ):
        with pytest.raises(TypeError, match=f"`task_kwargs` {message}"):
            pipe(image=FISH, task_kwargs=given)
    for given in ({"weight": 1}, {"shared": True}):
        with pytest.raises(
            TypeError, match=r"`denoising_kwargs` has the key .*DenoisingLoss takes"
        ):
            pipe(image=FISH, options=FOUND, denoising_weight=0.5, denoising_kwargs=given)
    with pytest.raises(TypeError, match=r"`generator` has to be a torch.Generator"):
        pipe(image=FISH, generator=3)
    with pytest.raises(TypeError, match="`denoising_weight` has to be a number"):
        pipe(image=FISH, denoising_weight="much")


def test_pipelines_that_need_an_image_are_refused(emoji_clip):
    t2i = stable_diffusion()
    i2i = StableDiffusionImg2ImgPipeline(**t2i.components, requires_safety_checker=False)
    for put in (PezPipeline.from_pipe, lambda pipe, clip: PezPipeline(clip, pipe)):
        with pytest.raises(ValueError, match=r"`pipeline` has to be a text-to-image .*Img2Img"):
            put(i2i, emoji_clip)
        with pytest.raises(TypeError, match=r"`pipeline` has to be a loaded .* but is str"):
            put("some/repository", emoji_clip)
    prior = PezPipeline(emoji_clip)
    prior.set_progress_bar_config(disable=True)
    start = Image.open(FISH).convert("RGB").resize((64, 64))
    images = i2i(**prior(image=FISH, **QUICK), image=start, num_inference_steps=4).images
    assert images[0].size == (64, 64)


def test_pipelines_that_take_less_get_less(emoji_clip):
    class Small(StableDiffusionPipeline):
        def __call__(self, prompt, num_inference_steps=2, negative_prompt=None, guidance_scale=1):
            return super().__call__(
                prompt, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale
            )

    t2i = stable_diffusion()
    pez = PezPipeline(emoji_clip, Small(**t2i.components, requires_safety_checker=False))
    pez.pipeline.set_progress_bar_config(disable=True)
    output = pez(image=[FISH, GLASSES], generator=generator(), **QUICK)
    assert len(output.images) == 8 and len(output.prompts) == 2


def test_the_scheduler_is_that_of_the_image_pipeline(pipe):
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert isinstance(pipe.pipeline.scheduler, EulerDiscreteScheduler)
    assert pipe(image=FISH, num_images_per_prompt=1, **QUICK).images
    with pytest.raises(AttributeError, match=r"`unet` belongs to .* write `\.pipeline\.unet`"):
        pipe.unet.to("cpu")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pipe.nothing()


def test_the_flags_of_a_safety_checker_are_passed_on(pipe, monkeypatch):
    monkeypatch.setattr(pipe.pipeline, "run_safety_checker", lambda x, *_: (x, [True] * len(x)))
    output = pipe(image=FISH, num_images_per_prompt=2, **QUICK)
    assert output.nsfw_content_detected == [True, True]


def test_what_is_no_clip_is_refused(tiny_clip):
    with pytest.raises(TypeError, match="`clip` has to be a CLIP from `load_clip` but is int"):
        PezPipeline(clip=3)
    from pez_core import Clip

    unknown = Clip(tiny_clip.model, tiny_clip.tokenizer, "mine", range(320, 400))
    with pytest.raises(ArgumentError, match="`clip` has no `config`: mine was built by hand"):
        PezPipeline(clip=unknown)


def test_half_precision_clips_are_taken_as_they_are(emoji_clip):
    """open_clip keeps some layers of a half precision model in float32; a component is all half."""
    mixed = load_clip("emoji-clip", device="cpu", dtype=torch.bfloat16)
    assert mixed.model.ln_final.weight.dtype == torch.float32
    model = PezClipModel.from_clip(mixed)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert mixed.model.ln_final.weight.dtype == torch.float32
    texts = ["a red cat", "a blue fish"]
    a, b, c = (x.encode_texts(texts) for x in (model.clip, mixed, emoji_clip))
    torch.testing.assert_close(a, b, atol=2e-2, rtol=0)
    assert (a * c).sum(1).min() > 0.999


@pytest.mark.slow
def test_the_example_of_the_docstring_runs(tmp_path, monkeypatch):
    """With the names of the models exchanged for tiny ones, and fewer steps."""
    stable_diffusion().save_pretrained(tmp_path / "sd")
    code = re.search(r"```py\n(.*?)```", PezPipeline.__call__.__doc__, re.S)[1]
    lines = re.findall(r"^\s*(?:>>>|\.\.\.) ?(.*)$", code, re.M)
    code = "\n".join(lines)
    for old, new in (
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", str(tmp_path / "sd")),
        ("ViT-L-14:openai", "emoji-clip"),
        ('"cuda"', '"cpu"'),
        ("photo.jpg", str(FISH)),
        ('effort="fast"', 'effort="fast", steps=2, swaps=1'),
        ("generator=", "num_inference_steps=1, generator="),
    ):
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert Image.open(tmp_path / "like-photo.png").size == (64, 64)


@pytest.mark.slow
def test_the_core_imports_diffusers_only_for_the_pipeline():
    # open_clip itself imports transformers where it is installed
    code = (
        "import sys; sys.modules['transformers'] = None; "
        "import pez_core; assert 'diffusers' not in sys.modules; "
        "from pez_core import *; assert not hasattr(pez_core, 'nothing'); "
        "del sys.modules['transformers']; "
        "pez_core.PezPipeline; assert {'diffusers', 'transformers'} <= set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.slow
def test_without_diffusers_the_error_names_the_extra():
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "from pez_core import *\n"
        "try:\n    from pez_core import PezPipeline\n"
        "except ImportError as error:\n    assert 'the extra `diffusers`' in str(error), error\n"
        "else:\n    raise AssertionError"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.slow
def test_a_subclass_loads_what_it_is_made_of(pipe, tmp_path):
    class Mine(PezPipeline):
        pass

    pipe.save_pretrained(tmp_path)
    assert isinstance(Mine.from_pretrained(tmp_path).pipeline, StableDiffusionPipeline)


def test_it_is_a_pipeline_of_diffusers(pipe):
    assert isinstance(pipe, DiffusionPipeline) and set(pipe.components) == {"clip", "pipeline"}
    assert diffusers.DiffusionPipeline.from_pretrained is not PezPipeline.from_pretrained
