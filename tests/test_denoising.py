"""The denoising loss of an image pipeline, against known answers and against the public path."""

import copy
import subprocess
import sys
import weakref
from contextlib import contextmanager
from dataclasses import replace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_clip
from diffusers import (
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tiny_diffusion import stable_diffusion, stable_diffusion_xl, text_config, tokenizer, unet
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from pez_core import ArgumentError, JointClip, PezPipeline, SearchOptions, Vocabulary, invert
from pez_core.diffusion import DenoisingLoss
from pez_core.diffusion.denoising import denoising_loss

pytestmark = pytest.mark.slow

PAPER = SearchOptions(swaps=0, steps=3000)
FISH, GLASSES = (ROOT / "examples" / f"noto-{name}.png" for name in ("fish", "glasses"))
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 180, 40),
    "blue": (30, 50, 220),
    "yellow": (240, 220, 40),
}
SQUARES = [Image.new("RGB", (8, 8), colour) for colour in COLOURS.values()]


def attentive(pipe):
    """Words that differ, and a UNet that attends to them: random weights hardly do."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for encoder in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
            if encoder is not None:
                torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=0.3)
        for name, weight in pipe.unet.named_parameters():
            if "attn2" in name or "add_embedding" in name:
                weight.mul_(4)
    pipe.vae.register_to_config(scaling_factor=10.0)  # latents as large as noise
    return pipe


KINDS = {
    "sd": lambda: attentive(stable_diffusion()),
    "v_prediction": lambda: attentive(stable_diffusion(prediction_type="v_prediction")),
    "xl": lambda: attentive(stable_diffusion_xl()),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small gain nothing from threads, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=KINDS)
def pipe(request):
    return KINDS[request.param]()


@pytest.fixture
def sd():
    return KINDS["sd"]()


def some_ids(clip, rows, prompt_len, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return clip.vocabulary[
        torch.randint(len(clip.vocabulary), (rows, prompt_len), generator=generator)
    ]


def embeddings_of(loss, ids):
    return F.embedding(ids, loss.token_embedding).requires_grad_()


# Values and gradients.


def by_hand(pipe, text, picture, samples, seed):
    """The loss of one text and image, written down as it is defined, with nothing shared."""
    generator = torch.Generator().manual_seed(seed)
    places = (torch.arange(samples) + torch.rand(samples, generator=generator)) / samples
    noise = torch.randn(samples, 4, 32, 32, generator=generator)
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    pixels = pipe.image_processor.preprocess(picture, 64, 64)
    latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor

    def error(words):
        states, *others = pipe.encode_prompt(
            prompt=words, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        added = others[1:] and {
            "text_embeds": others[1],
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]),
        }
        errors = []
        for place, one in zip(places, noise, strict=True):
            t = ((0.5 + 0.4 * place) * 1000).long()[None]
            assert 500 <= t.item() < 900
            noisy = schedule.add_noise(latents, one[None], t)
            target = one[None]
            if pipe.scheduler.config.prediction_type == "v_prediction":
                target = schedule.get_velocity(latents, one[None], t)
            guess = pipe.unet(noisy, t, states, added_cond_kwargs=added or None).sample
            errors.append(F.mse_loss(guess, target))
        return torch.stack(errors).mean()

    with torch.no_grad():
        return (error(text) / error("")).item()


def test_the_loss_is_what_it_is_defined_as(pipe):
    found = denoising_loss(
        pipe,
        ["a red cat", "snow"],
        [FISH, GLASSES],
        samples=3,
        batch_size=2,
        generator=torch.Generator().manual_seed(5),
    )
    assert found.shape == (2, 2) and found.std() > 1e-3
    for i, text in enumerate(["a red cat", "snow"]):
        for k, path in enumerate([FISH, GLASSES]):
            picture = Image.open(path).convert("RGBA")
            white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            expected = by_hand(pipe, text, white.convert("RGB"), 3, seed=5)
            assert found[i, k].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("template", ["{}", "a photo of {} at night"])
def test_the_loss_of_the_search_is_that_of_the_public_path(pipe, template, emoji_clip):
    loss = DenoisingLoss(pipe, [FISH, GLASSES], emoji_clip, samples=2)
    words = emoji_clip.text.words
    before, after = map(words.encode, template.split("{}"))
    ids = some_ids(emoji_clip, 3, 4)
    texts = [template.replace("{}", words.decode(row)) for row in ids.tolist()]
    ours = loss.objective(before, after, [0, 1, 1])(embeddings_of(loss, ids))
    public = loss.losses(texts, [0, 1, 1])
    assert public.std() > 1e-3
    torch.testing.assert_close(ours, public, atol=1e-5, rtol=0)
    both = denoising_loss(pipe, texts, [FISH, GLASSES], samples=2)
    torch.testing.assert_close(public, both[[0, 1, 2], [0, 1, 1]], atol=1e-5, rtol=0)

    shared = DenoisingLoss(pipe, [FISH, GLASSES], emoji_clip, samples=2, shared=True)
    ours = shared.objective(before, after, [0, 0, 0])(embeddings_of(shared, ids))
    torch.testing.assert_close(ours, both.mean(1), atol=1e-5, rtol=0)


def test_the_gradient_is_that_of_finite_differences(pipe, emoji_clip):
    loss = DenoisingLoss(pipe, [FISH, GLASSES], emoji_clip, samples=2)
    objective = loss.objective([320], [], [1, 0])
    x = embeddings_of(loss, some_ids(emoji_clip, 2, 3))
    (gradient,) = torch.autograd.grad(objective(x).sum(), x)
    for seed in range(3):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        # towards the gradient, so that the change is larger than the rounding
        way = F.normalize(gradient + 0.3 * gradient.std() * noise, dim=(1, 2)) * 1e-3
        with torch.no_grad():
            change = (objective(x + way) - objective(x - way)) / 2
        expected = (gradient * way).sum((1, 2))
        assert expected.abs().min() > 3e-6
        torch.testing.assert_close(change, expected, rtol=0.03, atol=0)


def test_pieces_make_no_difference_but_to_memory(pipe, emoji_clip):
    found, peaks = [], []
    ids = some_ids(emoji_clip, 3, 4)
    for size in (1, 5, 12):
        loss = DenoisingLoss(pipe, FISH, emoji_clip, samples=4, batch_size=size)
        x = embeddings_of(loss, ids)
        with activations() as peak:
            value = loss.objective([], [], [0, 0, 0])(x)
            (gradient,) = torch.autograd.grad(value.sum(), x)
        found.append((value.detach(), gradient))
        peaks.append(peak[0])
    for value, gradient in found[1:]:
        torch.testing.assert_close(value, found[0][0], atol=1e-5, rtol=0)
        torch.testing.assert_close(gradient, found[0][1], atol=1e-6, rtol=1e-3)
    assert peaks[1] > 4 * peaks[0] and peaks[2] > 10 * peaks[0]


@contextmanager
def activations():
    """The most numbers that autograd kept at any time."""
    now, peak = [0], [0]

    def drop(count):
        now[0] -= count

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor
            now[0] += tensor.numel()
            peak[0] = max(peak[0], now[0])
            weakref.finalize(self, drop, tensor.numel())

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        yield peak


def test_losses_need_no_activations(sd, emoji_clip):
    loss = DenoisingLoss(sd, FISH, emoji_clip, samples=1)
    x = embeddings_of(loss, some_ids(emoji_clip, 1, 2))
    with activations() as peak:
        loss.losses(["a cat"], [0])
        assert not loss.objective([], [], [0])(x.detach()).requires_grad
        with torch.no_grad():
            loss.objective([], [], [0])(x)
    assert peak == [0]


def test_pictures_are_cropped_to_the_centre(sd):
    """Pictures of another shape are cropped to that of the pipeline, not squeezed."""
    square = Image.open(FISH).convert("RGB").resize((64, 64))
    wide = Image.new("RGB", (128, 64), "red")
    wide.paste(square, (32, 0))
    losses = denoising_loss(sd, "a red cat", [square, wide, wide.resize((64, 64))], samples=2)[0]
    assert losses[0] == losses[1] != losses[2]


def test_noise_and_timesteps(sd, emoji_clip):
    make = lambda **options: DenoisingLoss(sd, FISH, emoji_clip, samples=5, **options)  # noqa: E731
    seeded = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    default, same, other = make(), make(generator=seeded[0]), make(generator=seeded[1])
    ask = lambda loss: loss.losses(["a cat"], [0])  # noqa: E731
    assert torch.equal(ask(default), ask(same)) and not torch.equal(ask(default), ask(other))
    steps = default._model._steps.tolist()
    assert [(t - 500) // 80 for t in steps] == [0, 1, 2, 3, 4]
    assert set(make(timesteps=(0.999, 1))._model._steps.tolist()) == {999}


# A known answer: a UNet that has learned to paint four colours by their names.


@pytest.fixture(scope="module")
def painter():
    """Predicts velocities, which depend most on the prompt at late timesteps."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        pipe = stable_diffusion(prediction_type="v_prediction")
        pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
        pipe.tokenizer.model_max_length = 12
        pipe.unet = UNet2DConditionModel(
            block_out_channels=(16, 32),
            layers_per_block=1,
            sample_size=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            norm_num_groups=4,
            attention_head_dim=2,
        )
        table = pipe.text_encoder.get_input_embeddings().weight
        torch.nn.init.normal_(table)  # words that differ
        pipe.text_encoder.requires_grad_(False)
        latents = _teach_vae(pipe)
        ids = pipe.tokenizer([*COLOURS, ""], padding="max_length", return_tensors="pt").input_ids
        schedule = DDPMScheduler.from_config(pipe.scheduler.config)
        optimizer = torch.optim.AdamW(pipe.unet.parameters(), lr=1e-2)
        fade = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, 300)
        for _ in range(300):
            # blends of two colours under blends of two words, so that the way from word to word is
            # known, and grey under the empty prompt
            a, b = torch.randint(0, 4, (2, 48))
            share = torch.rand(48).masked_fill(torch.arange(48) < 24, 1)[:, None]
            words = share * table[ids[a, 1]] + (1 - share) * table[ids[b, 1]]
            share = share[..., None, None]
            x = share * latents[a] + (1 - share) * latents[b]
            words[:8], x[:8] = table[ids[4, 1]], latents.mean(0)
            states = _read(pipe, ids[0], words)
            t, noise = torch.randint(500, 900, (48,)), torch.randn(x.shape)
            guess = pipe.unet(schedule.add_noise(x, noise, t), t, states).sample
            loss = F.mse_loss(guess, schedule.get_velocity(x, noise, t))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            fade.step()
        optimizer.zero_grad()
    return pipe


def _read(pipe, ids, words):
    """The text encoder's states for prompts of one word that is any blend of words."""
    hook = pipe.text_encoder.get_input_embeddings().register_forward_hook(
        lambda _, __, out: torch.cat([out[:, :1], words[:, None], out[:, 2:]], dim=1)
    )
    states = pipe.text_encoder(ids.expand(len(words), -1))[0]
    hook.remove()
    return states


def _teach_vae(pipe):
    """Different latents of -1 and 1 for each of the four colours."""
    pipe.vae.register_to_config(scaling_factor=1.0)
    pixels = pipe.image_processor.preprocess(SQUARES, 8, 8)
    wanted = torch.eye(4).mul(2).sub(1)[..., None, None]
    optimizer = torch.optim.AdamW(pipe.vae.encoder.parameters(), lr=1e-2)
    for _ in range(60):
        latents = pipe.vae.encode(pixels).latent_dist.mode()
        optimizer.zero_grad()
        (latents - wanted).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    return latents.detach()


# the embeddings of this encoder have norm 4, so that steps have to be longer than usual
PAINT = SearchOptions(swaps=0, steps=60, lr=0.3, restarts=2)


@pytest.fixture(scope="module")
def painted(painter, emoji_clip):
    return DenoisingLoss(painter, SQUARES, emoji_clip, samples=2, batch_size=8)


@pytest.mark.parametrize("start", COLOURS)
def test_the_right_word_is_found_from_any_other(painted, emoji_clip, start):
    words = {"vocabulary": Vocabulary(only=list(COLOURS)), "start_from": start}
    options = replace(PAINT, prompt_len=1, extra_loss=painted, **words)
    results = invert(emoji_clip, SQUARES, options)
    assert [result.prompt for result in results] == list(COLOURS)
    assert all(result.extra_loss < 0.3 for result in results)


def test_the_whole_vocabulary_has_prompts_as_good_as_the_true_word(painted, painter, emoji_clip):
    """Far better ones than as many random prompts have among them."""
    options = {"samples": 2, "batch_size": 32}
    results = invert(emoji_clip, SQUARES, replace(PAINT, prompt_len=4, extra_loss=painted))
    prompts = [*COLOURS, *(result.prompt for result in results)]
    losses = denoising_loss(painter, prompts, SQUARES, **options)
    true, found = losses[:4].diag(), losses[4:].diag()
    assert found.tolist() == pytest.approx([r.extra_loss for r in results], abs=1e-5)
    assert (found < true + 0.05).all() and (found < 0.3).all()
    ids = some_ids(emoji_clip, 2 * PAINT.steps, 4)
    texts = [emoji_clip.text.words.decode(row) for row in ids.tolist()]
    random = denoising_loss(painter, texts, SQUARES, **options).amin(0)
    assert (found < 0.7 * random).all()


def test_each_weight_gets_its_share(painter, emoji_clip):
    target = Image.open(FISH)
    found = {}
    for weight in (0, 0.5, 1):
        extra = weight and DenoisingLoss(
            painter, target, emoji_clip, weight, samples=2, batch_size=8
        )
        options = replace(PAINT, prompt_len=6, extra_loss=extra or None)
        (found[weight],) = invert(emoji_clip, target, options)
    assert found[0].extra_loss is None
    alone = denoising_loss(painter, found[0].prompt, target, samples=2).item()
    assert found[1].extra_loss < found[0.5].extra_loss < alone
    assert found[1].similarity < found[0.5].similarity < found[0].similarity


# What the search has beside: restarts, captions, vocabularies, seeds, several CLIPs.


def test_restarts_are_ranked_by_both(sd, emoji_clip):
    # losses differ less than similarities, and should count here
    extra = DenoisingLoss(sd, [FISH, GLASSES], emoji_clip, weight=0.95, samples=1, batch_size=4)
    reports = []
    options = replace(PAPER, prompt_len=4, steps=4, restarts=3, extra_loss=extra)
    results = invert(emoji_clip, [FISH, GLASSES], options, callback=reports.append)
    for k, result in enumerate(results):
        scores = [0.05 * c.similarity - 0.95 * c.extra_loss for c in result.candidates]
        assert scores == sorted(scores, reverse=True) and len(scores) == 3
        public = denoising_loss(sd, [c.prompt for c in result.candidates], [FISH, GLASSES], 1)
        expected = [c.extra_loss for c in result.candidates]
        assert public[:, k].tolist() == pytest.approx(expected, abs=1e-6)
        assert result.extra_loss == result.candidates[0].extra_loss
        assert result.history[-1][1] == pytest.approx(scores[0], abs=1e-5)
        assert reports[-1].similarities[k] == pytest.approx(scores[0], abs=1e-5)


@pytest.mark.parametrize(
    "changed, arguments",
    [
        ({}, {"caption": "a photo of {} at night"}),
        ({"vocabulary": Vocabulary(only=["oil painting", "red", "snow white", "sky", "a b"])}, {}),
        (
            {"vocabulary": Vocabulary(block=["chevron"]), "start_from": "fish", "seed": [3, 4]},
            {},
        ),
        ({"patience": 3}, {"avoid": "a fish"}),
    ],
)
def test_the_rest_of_the_search_goes_with_it(sd, emoji_clip, changed, arguments):
    both = DenoisingLoss(sd, [FISH, GLASSES], emoji_clip, weight=0.5, samples=1, batch_size=4)
    options = replace(PAPER, prompt_len=4, steps=5, restarts=2, extra_loss=both, **changed)
    results = invert(emoji_clip, [FISH, GLASSES], options, **arguments)
    again = invert(emoji_clip, [FISH, GLASSES], options, **arguments)
    assert [r.prompt for r in again] == [r.prompt for r in results]
    one_by_one = invert(emoji_clip, [FISH, GLASSES], replace(options, batch_size=1), **arguments)
    assert [r.prompt for r in one_by_one] == [r.prompt for r in results]
    # an image alone meets the same noise
    single = DenoisingLoss(sd, GLASSES, emoji_clip, weight=0.5, samples=1, batch_size=4)
    own = replace(options, seed=changed.get("seed", [0, 0])[1], extra_loss=single)
    (alone,) = invert(emoji_clip, GLASSES, own, **arguments)
    assert alone.prompt == results[1].prompt
    assert alone.extra_loss == pytest.approx(results[1].extra_loss, abs=1e-6)
    public = denoising_loss(sd, alone.prompt, GLASSES, samples=1).item()
    assert alone.extra_loss == pytest.approx(public, abs=1e-6)
    if "caption" in arguments:
        assert alone.prompt.startswith("a photo of ") and alone.prompt.endswith(" at night")


def short(extra, prompt_len=3, steps=3, **others):
    return replace(PAPER, prompt_len=prompt_len, steps=steps, extra_loss=extra, **others)


def test_one_prompt_for_several_images(sd, emoji_clip):
    extra = DenoisingLoss(sd, [FISH, GLASSES], emoji_clip, 0.5, samples=2, shared=True)
    (result,) = invert(emoji_clip, [FISH, GLASSES], short(extra, 3, 4), shared=True)
    public = denoising_loss(sd, result.prompt, [FISH, GLASSES], samples=2).mean().item()
    assert result.extra_loss == pytest.approx(public, abs=1e-6)


def test_with_weight_1_the_clip_takes_no_part(sd, emoji_clip, tiny_clip, monkeypatch):
    """Two CLIPs that share nothing but words find the same."""
    words = Vocabulary(only=["red", "blue", "snow", "sky", "cat", "house", "fish"])
    found = []
    for clip in (emoji_clip, tiny_clip):
        extra = DenoisingLoss(sd, FISH, clip, samples=1)
        monkeypatch.setattr(clip.text, "encoder", None)
        (result,) = invert(clip, FISH, short(extra, 3, 6, vocabulary=words))
        found.append(result.prompt)
    assert found[0] == found[1]


def test_both_encoders_of_xl_with_several_clips(emoji_clip):
    joint = JointClip([emoji_clip, make_clip()], weights=[3, 1])
    pipe = KINDS["xl"]()
    extra = DenoisingLoss(pipe, FISH, joint, weight=0.4, samples=1)
    assert extra.parts == [(16, 0.5), (24, 0.5)] and extra.token_embedding.shape == (49408, 40)
    (result,) = invert(joint, FISH, short(extra, 4, 4))
    public = denoising_loss(pipe, result.prompt, FISH, samples=1).item()
    assert result.extra_loss == pytest.approx(public, abs=1e-6)
    assert set(result.encoders) == {"emoji-clip", "tiny"}


def test_in_the_pipeline(sd, emoji_clip):
    pez = PezPipeline.from_pipe(sd, emoji_clip)
    pez.set_progress_bar_config(disable=True)
    output = pez(
        image=FISH,
        options=short(None),
        denoising_weight=0.5,
        denoising_kwargs={"samples": 1},
        num_inference_steps=1,
        generator=torch.Generator().manual_seed(0),
    )
    public = denoising_loss(
        sd, output.prompts, FISH, samples=1, generator=torch.Generator().manual_seed(0)
    )
    assert output.results[0].extra_loss == pytest.approx(public.item(), abs=1e-6)


# Nothing of the caller's changes.


def state(pipe):
    """All of a pipeline that could be changed."""
    # the first use of its text encoders leaves hooks of transformers' own in them
    pipe.encode_prompt(
        prompt="", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    modules = {}
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            tensors = [*component.named_parameters(), *component.named_buffers()]
            modules[name] = {
                "tensors": [(n, w.requires_grad, w.dtype, w.grad is None) for n, w in tensors],
                "values": [w.detach().clone() for _, w in tensors],
                "modules": [
                    (n, m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
                    for n, m in component.named_modules()
                ],
            }
    rest = {n: str(value) for n, value in vars(pipe.scheduler).items()}
    rest |= {n: value for n, value in vars(pipe).items() if isinstance(value, (str, int))}
    return modules, rest


def assert_same(before, after):
    assert before[1] == after[1]
    for name, one in before[0].items():
        values = zip(one.pop("values"), after[0][name].pop("values"), strict=True)
        assert all(torch.equal(a, b) for a, b in values)
        assert one == after[0][name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_nothing_of_the_pipeline_changes_in_any_precision(kind, dtype, emoji_clip):
    pipe = KINDS[kind]().to(dtype=dtype)
    pipe.unet.requires_grad_(False)
    pipe.unet.conv_in.requires_grad_(True)
    pipe.text_encoder.train()
    pipe.scheduler.set_timesteps(7)
    before = state(pipe)
    extra = DenoisingLoss(pipe, FISH, emoji_clip, weight=0.5, samples=1)
    (result,) = invert(emoji_clip, FISH, short(extra))
    assert_same(before, state(pipe))
    assert 0.5 < result.extra_loss < 1.5

    x = embeddings_of(extra, some_ids(emoji_clip, 2, 3))
    (gradient,) = torch.autograd.grad(extra.objective([], [], [0, 0])(x).sum(), x)
    full = DenoisingLoss(pipe.to(dtype=torch.float32), FISH, emoji_clip, samples=1)
    (exact,) = torch.autograd.grad(full.objective([], [], [0, 0])(x).sum(), x)
    assert F.cosine_similarity(gradient.flatten(1), exact.flatten(1)).min() > 0.95
    tolerance = 0.2 if dtype is torch.bfloat16 else 0.1
    assert (gradient.norm() / exact.norm() - 1).abs() < tolerance


def test_half_precision_leaves_a_vae_that_overflows_in_it_alone(emoji_clip, monkeypatch):
    pipe = KINDS["xl"]().to(dtype=torch.float16)
    assert pipe.vae.config.force_upcast
    dtypes = []
    encode = pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda x: dtypes.append(x.dtype) or encode(x))
    DenoisingLoss(pipe, FISH, emoji_clip, samples=1)
    assert dtypes == [torch.float32] and pipe.vae.dtype == torch.float16


@pytest.mark.parametrize("name", ["unet", "text_encoder_2", "vae"])
def test_nothing_changes_when_it_fails(name, emoji_clip, monkeypatch):
    pipe = KINDS["xl"]().to(dtype=torch.float16)
    before = state(pipe)
    extra = DenoisingLoss(pipe, FISH, emoji_clip, samples=1)
    x = embeddings_of(extra, some_ids(emoji_clip, 1, 2))

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(getattr(pipe, name), "encode" if name == "vae" else "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        if name == "vae":
            DenoisingLoss(pipe, FISH, emoji_clip, samples=1)
        else:
            extra.objective([], [], [0])(x)
    monkeypatch.undo()
    assert_same(before, state(pipe))


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_an_offloaded_pipeline_gives_the_same(kind, emoji_clip):
    pipe = KINDS[kind]()
    results = []
    for offloaded in (False, True):
        if offloaded:
            pipe.enable_model_cpu_offload(device="cpu")
            hooks = len(pipe._all_hooks)
        extra = DenoisingLoss(pipe, FISH, emoji_clip, weight=0.5, samples=1)
        results += invert(emoji_clip, FISH, short(extra))
    assert results[0].prompt == results[1].prompt and len(pipe._all_hooks) == hooks


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_gradients_use_weights_only_while_they_are_there(kind, emoji_clip):
    """As with offloading to a device: a model's turn sends the one before it away."""
    pipe = KINDS[kind]()
    extra = DenoisingLoss(pipe, FISH, emoji_clip, samples=2)
    x = embeddings_of(extra, some_ids(emoji_clip, 2, 3))
    (expected,) = torch.autograd.grad(extra.objective([], [], [0, 0])(x).sum(), x)
    names = ["text_encoder", "text_encoder_2", "unet"] if kind == "xl" else ["text_encoder", "unet"]
    chain = [getattr(pipe, name) for name in names]
    kept = {module: [w.data for w in module.parameters()] for module in chain}

    def place(module, present):
        for weight, data in zip(module.parameters(), kept[module], strict=True):
            weight.data = data if present else torch.full_like(data, torch.nan)

    for k, module in enumerate(chain):
        if k:
            module.register_forward_pre_hook(lambda *_, before=chain[k - 1]: place(before, False))
        module.register_forward_pre_hook(lambda module, _: place(module, True))
        place(module, False)
    value = extra.objective([], [], [0, 0])(x)
    for module in chain:
        place(module, False)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert torch.equal(gradient, expected)


def test_under_inference_mode(sd, emoji_clip):
    with torch.inference_mode():
        extra = DenoisingLoss(sd, FISH, emoji_clip, weight=0.5, samples=1)
        (result,) = invert(emoji_clip, FISH, short(extra, 2, 2))
    assert result.extra_loss == pytest.approx(
        denoising_loss(sd, result.prompt, FISH, samples=1).item()
    )


def test_the_benchmark_runs(tmp_path):
    script, out = ROOT / "benchmarks/denoising.py", tmp_path / "table.md"
    arguments = ["--tiny", "--threads", "1", "--steps", "2", "--out", out]
    subprocess.run([sys.executable, script, *map(str, arguments)], check=True)
    rows = [line.split(" | ") for line in out.read_text().splitlines() if line.startswith("| the")]
    assert [row[1:3] for row in rows] == [["-", "-"], ["1", "1"], ["4", "1"], ["4", "4"]]
    assert float(rows[2][3].rstrip("x")) > float(rows[0][3].rstrip("x")) == 1


# Wrong arguments.


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weight": 0}, "`weight` has to be above 0 and at most 1"),
        ({"weight": 1.5}, "`weight` has to be above 0 and at most 1"),
        ({"samples": 0}, "`samples` has to be at least 1"),
        ({"batch_size": 1.5}, "`batch_size` has to be an integer"),
        ({"timesteps": 0.5}, "`timesteps` has to hold two numbers"),
        ({"timesteps": (0.9, 0.5)}, "`timesteps` has to rise"),
        ({"timesteps": (0.5, 2)}, "`timesteps` has to be from 0 to 1 but is 2"),
        ({"images": []}, "`images` is empty"),
    ],
)
def test_wrong_numbers_are_named(sd, emoji_clip, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        DenoisingLoss(**{"pipeline": sd, "images": FISH, "clip": emoji_clip} | options)


def _without_unet():
    nothing = [
        "vae",
        "transformer",
        *(f"{k}{n}" for k in ("text_encoder", "tokenizer") for n in ("", "_2")),
    ]
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), **dict.fromkeys(nothing))


def _refiner():
    pipe = stable_diffusion_xl()
    pipe.text_encoder = pipe.tokenizer = None
    return pipe


def _with(**components):
    def make():
        pipe = stable_diffusion()
        for name, component in components.items():
            setattr(pipe, name, component())
        return pipe

    return make


def _offloaded():
    pipe = stable_diffusion()
    pipe.enable_sequential_cpu_offload(device="cpu")
    return pipe


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: "sd", "`pipeline` has to be a DiffusionPipeline but is str"),
        (_without_unet, "FluxPipeline has no unet, vae, tokenizer"),
        (_refiner, "StableDiffusionXLPipeline has no tokenizer, text_encoder"),
        (
            _with(text_encoder=lambda: CLIPTextModelWithProjection(text_config(16, 16))),
            "has a CLIPTextModelWithProjection",
        ),
        (_with(unet=lambda: _inpainting()), "has 9 and None; give a text-to-image pipeline"),
        (
            _with(scheduler=FlowMatchEulerDiscreteScheduler),
            "FlowMatchEulerDiscreteScheduler has None",
        ),
        (_with(scheduler=lambda: DDPMScheduler(prediction_type="sample")), "and sample"),
        (_offloaded, "by enable_sequential_cpu_offload"),
    ],
)
def test_other_pipelines_are_refused(make, message, emoji_clip):
    with pytest.raises((TypeError, ValueError), match=message):
        DenoisingLoss(make(), FISH, emoji_clip)


def _inpainting():
    config = dict(unet(16).config) | {"in_channels": 9}
    return UNet2DConditionModel.from_config(config)


def test_tokenizers_that_differ_are_refused(sd, emoji_clip):
    words = open_clip.SimpleTokenizer()
    vocab = tokenizer().get_vocab()
    vocab["red</w>"], vocab["blue</w>"] = vocab["blue</w>"], vocab["red</w>"]
    merges = sorted(words.bpe_ranks, key=words.bpe_ranks.get)
    sd.tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    with pytest.raises(ValueError, match="emoji-clip and StableDiffusionPipeline differ in 2 of"):
        DenoisingLoss(sd, FISH, emoji_clip)


def test_a_prompt_that_the_pipeline_has_no_room_for(sd, emoji_clip):
    sd.tokenizer = copy.deepcopy(sd.tokenizer)
    sd.tokenizer.model_max_length = 8
    extra = DenoisingLoss(sd, FISH, emoji_clip)
    with pytest.raises(ArgumentError, match=r"3 tokens of the `caption` .* has room for 3"):
        invert(emoji_clip, FISH, short(extra, 4, 2), caption="a photo of")


def test_wrong_uses_are_named(sd, emoji_clip):
    extra = DenoisingLoss(sd, [FISH, GLASSES], emoji_clip, samples=1)
    with pytest.raises(ArgumentError, match="`extra_loss` is made for 2 prompts, but 1 are"):
        invert(emoji_clip, FISH, short(extra))
    with pytest.raises(ArgumentError, match="`extra_loss` is made for 2 prompts, but 1 are"):
        invert(emoji_clip, [FISH, GLASSES], short(extra), shared=True)
    with pytest.raises(ArgumentError, match=r"`extra_loss` .* `negative_prompt`"):
        invert(emoji_clip, [FISH, GLASSES], short(extra), negative_prompt=True)
    with pytest.raises(TypeError, match="`extra_loss` has to be a loss"):
        short(0.5)
    with pytest.raises(ArgumentError, match="`extra_loss` cannot be refined"):
        SearchOptions(extra_loss=extra)
    with pytest.raises(ValueError, match="`prompts` is empty"):
        denoising_loss(sd, [], FISH)
    with pytest.raises(TypeError, match="`prompts` has to be a string"):
        denoising_loss(sd, [3], FISH)
