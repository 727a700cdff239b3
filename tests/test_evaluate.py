"""Images made of prompts, judged by a held-out CLIP."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload_with_hook
from conftest import EXAMPLES, ROOT, make_clip
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_diffusion import stable_diffusion, stable_diffusion_xl

from pez_core import JointClip, load_clip
from pez_core.clip.images import load_image
from pez_core.clip.models import BUNDLED
from pez_core.diffusion import PezClipModel
from pez_core.diffusion.evaluation import EvaluationError, evaluate

FISH, GLASSES = (ROOT / "examples" / f"noto-{name}.png" for name in ("fish", "glasses"))
NAMES = {
    row["name"]: ROOT / "examples" / row["file"]
    for row in map(json.loads, (ROOT / "examples/index.jsonl").open())
}
PROMPTS = ["a blue fish", "red glasses and a hat"]
QUICK = {"num_images_per_prompt": 2, "num_inference_steps": 2}
CLOSE = {"atol": 1e-5, "rtol": 1e-4}  # the last bits depend on the alignment of memory


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def sd():
    return stable_diffusion()


@pytest.fixture(scope="module")
def component(emoji_clip):
    return PezClipModel.from_clip(emoji_clip)


class Album(DiffusionPipeline):
    """Returns the example with the name in the prompt; takes neither guidance nor a number."""

    def __call__(self, prompt: list[str]):
        return ([load_image(NAMES[text]) for text in prompt],)


def cosines(clip, pictures, others):
    """By open_clip alone, one picture at a time."""

    def feature(picture):
        with torch.no_grad():
            return clip.model.encode_image(clip._prepare(picture)[None])[0]

    return [[F.cosine_similarity(feature(a), feature(b), dim=0) for b in others] for a in pictures]


@pytest.mark.slow
@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_xl])
def test_the_numbers_are_those_made_by_hand(make, vit_clip, emoji_clip, component):
    pipe = make()
    found = evaluate(
        pipe, PROMPTS, [FISH, GLASSES], vit_clip, generator=generator(), searched=component, **QUICK
    )
    drawn, targets = generator(), [load_image(FISH), load_image(GLASSES)]
    for k, (prompt, target) in enumerate(zip(PROMPTS, targets, strict=True)):
        pictures = pipe(
            prompt,
            guidance_scale=9.0,
            num_inference_steps=2,
            num_images_per_prompt=2,
            generator=drawn,
        ).images
        for ours, theirs in zip(found.images[k], pictures, strict=True):
            assert np.array_equal(np.asarray(ours), np.asarray(theirs))
        for clip, similarities in (
            (vit_clip, found.similarities),
            (emoji_clip, found.searched_similarities),
        ):
            expected = torch.tensor(cosines(clip, pictures, [target]))[:, 0]
            torch.testing.assert_close(similarities[k], expected, atol=1e-5, rtol=0)
        with torch.no_grad():
            text = vit_clip.model.encode_text(vit_clip.tokenizer([prompt]), normalize=True)[0]
            image = vit_clip.model.encode_image(vit_clip._prepare(target)[None], normalize=True)[0]
        assert found.prompt_similarities[k].item() == pytest.approx((text @ image).item(), abs=1e-5)

    values = found.similarities.numpy().astype(float)
    assert found.per_prompt.numpy() == pytest.approx(values.mean(1))
    assert found.mean == pytest.approx(values.mean())
    error = np.std(values.mean(1), ddof=1) / np.sqrt(2)
    assert found.standard_error == pytest.approx(error, rel=1e-3)
    assert found.judge == "vit" and found.prompts == PROMPTS
    assert str(found).startswith(f"{found.mean:.4f} ± {found.standard_error:.4f} by vit, ")


def test_the_standard_error_of_one_prompt_is_that_of_its_images(sd, emoji_clip):
    found = evaluate(sd, PROMPTS[0], FISH, emoji_clip, 3, 1, generator=generator())
    error = np.std(found.similarities[0].numpy(), ddof=1) / np.sqrt(3)
    assert found.standard_error == pytest.approx(error, rel=1e-3)
    assert found.searched_similarities is None
    found = evaluate(sd, PROMPTS[0], FISH, emoji_clip, 1, 1)
    assert math.isnan(found.standard_error) and found.similarities.shape == (1, 1)


@pytest.mark.parametrize("judge", ["emoji_clip", "component"])
def test_an_image_is_most_similar_to_itself(judge, sd, request):
    judge = request.getfixturevalue(judge)
    pictures = [
        sd(PROMPTS[0], num_inference_steps=2, guidance_scale=9.0, generator=generator(s)).images[0]
        for s in range(3)
    ]
    found = evaluate(
        sd, PROMPTS[0], pictures[1], judge, 3, 2, generator=[generator(s) for s in range(3)]
    )
    assert found.similarities[0, 1].item() == pytest.approx(1, abs=1e-5)
    assert found.similarities[0, [0, 2]].max() < 0.999


def test_right_prompts_are_told_from_wrong_ones(vit_clip):
    names = list(NAMES)[::3]
    wrong = names[1:] + names[:1]
    targets = [NAMES[name] for name in names]
    right = evaluate(Album(), names, targets, vit_clip, num_images_per_prompt=2)
    other = evaluate(Album(), wrong, targets, vit_clip, num_images_per_prompt=2)
    assert right.similarities.shape == (len(names), 2)
    torch.testing.assert_close(right.similarities, torch.ones(len(names), 2))
    assert other.per_prompt.max() < 0.999
    assert right.mean - right.standard_error > other.mean + other.standard_error
    assert right.prompt_similarities.mean() > other.prompt_similarities.mean() + 0.2


def test_a_judge_that_took_part_is_refused(sd, emoji_clip, component, vit_clip):
    tiny = make_clip()
    joint = JointClip([emoji_clip, tiny])
    for judge, searched in [
        (emoji_clip, component),
        (component, emoji_clip),
        (tiny, joint),
        (joint, component),
    ]:
        with pytest.raises(ValueError, match=r"`judge` is (tiny|emoji-clip), on which the prompts"):
            evaluate(sd, PROMPTS, FISH, judge, searched=searched)
    found = evaluate(sd, PROMPTS[0], FISH, vit_clip, searched=joint, **QUICK)
    assert found.searched_similarities.shape == (1, 2)
    renamed = load_clip(str(BUNDLED["emoji-clip"]), device="cpu", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"`judge` is .*emoji-clip, on which the prompts"):
        evaluate(sd, PROMPTS, FISH, renamed, searched=emoji_clip)


def test_a_failure_leaves_what_was_finished(sd, emoji_clip):
    calls = []

    def fail_later(pipe, step, timestep, tensors):
        calls.append(step)
        if len(calls) == 5:
            raise MemoryError("none left")
        return tensors

    options = QUICK | {"generator": generator(), "callback_on_step_end": fail_later}
    with pytest.raises(EvaluationError, match=r"Prompt 3 of 3, 'a cat', failed \(none") as caught:
        evaluate(sd, [*PROMPTS, "a cat"], FISH, emoji_clip, **options)
    assert isinstance(caught.value.__cause__, MemoryError)
    partial = caught.value.partial
    whole = evaluate(sd, PROMPTS, FISH, emoji_clip, generator=generator(), **QUICK)
    assert partial.prompts == PROMPTS and len(partial.images) == 2
    torch.testing.assert_close(partial.similarities, whole.similarities, **CLOSE)
    torch.testing.assert_close(partial.prompt_similarities, whole.prompt_similarities, **CLOSE)

    with pytest.raises(EvaluationError) as caught:
        evaluate(sd, PROMPTS, FISH, emoji_clip, latents="none", searched=make_clip())
    partial = caught.value.partial
    assert partial.images == partial.prompts == [] and math.isnan(partial.mean)
    assert partial.similarities.shape == partial.searched_similarities.shape == (0, 4)


class Broken:
    """Some features of a CLIP are NaN, as where half precision overflows."""

    def __init__(self, clip, monkeypatch):
        self.encode, self.broken = clip.model.encode_image, set()
        self.calls, self.clip = 0, clip
        clip.cache.clear()
        monkeypatch.setattr(clip.model, "encode_image", self)

    def next(self, *calls):
        """Break some of the next calls, without the features of images before."""
        self.calls, self.broken = 0, set(calls)
        self.clip.cache.clear()

    def __call__(self, *given, **keywords):
        features = self.encode(*given, **keywords)
        self.calls += 1
        return features * torch.nan if self.calls in self.broken else features


@pytest.mark.parametrize("which", ["judge", "searched"])
def test_similarities_that_are_nan_raise_and_leave_what_was_finished(which, vit_clip, monkeypatch):
    clips = {"judge": vit_clip, "searched": make_clip()}
    broken, name = Broken(clips[which], monkeypatch), clips[which].name
    names = ["fish", "parrot", "glasses"]
    broken.broken = {1}  # the targets
    with pytest.raises(FloatingPointError, match=f"similarities by {name} are NaN or infinite; "):
        evaluate(Album(), names, FISH, **clips, num_images_per_prompt=2)

    broken.next(2)  # the images of the second prompt; those of the first are the target
    with pytest.raises(EvaluationError, match="Prompt 2 of 3, 'parrot', failed") as caught:
        evaluate(Album(), names, FISH, **clips, num_images_per_prompt=2)
    assert isinstance(caught.value.__cause__, FloatingPointError)
    assert f"similarities by {name} are NaN or infinite; " in str(caught.value.__cause__)
    partial = caught.value.partial
    assert partial.prompts == ["fish"] and len(partial.images) == 1
    assert partial.similarities.isfinite().all() and partial.similarities.shape == (1, 2)
    assert partial.searched_similarities.shape == (1, 2)


def test_prompts_whose_similarity_is_nan_raise(vit_clip, monkeypatch):
    encode = vit_clip.encode_chunks
    monkeypatch.setattr(vit_clip, "encode_chunks", lambda *a, **k: encode(*a, **k) * torch.inf)
    with pytest.raises(FloatingPointError, match="similarities by vit are NaN or infinite"):
        evaluate(Album(), ["fish"], FISH, vit_clip)


def test_a_callback_gets_the_evaluation_so_far_and_can_end_it(sd, emoji_clip):
    seen = []

    def callback(i, n, evaluation):
        seen.append((i, n, evaluation))
        return i == 2

    found = evaluate(sd, [*PROMPTS, "a cat"], FISH, emoji_clip, callback=callback, **QUICK)
    assert [(i, n, len(e.prompts), len(e.images)) for i, n, e in seen] == [
        (1, 3, 1, 1),
        (2, 3, 2, 2),
    ]
    assert found.prompts == PROMPTS and found.similarities.shape == (2, 2)
    assert found.prompt_similarities.shape == (2,)


def test_several_targets_count_by_their_mean(emoji_clip):
    name, others = "parrot", [FISH, GLASSES, EXAMPLES[0]]
    pictures = [load_image(path) for path in others]
    expected = torch.tensor(cosines(emoji_clip, [load_image(NAMES[name])], pictures)).mean()

    def evaluated(prompts, images):
        return evaluate(Album(), prompts, images, emoji_clip, 1).similarities[:, 0]

    several = [evaluated(name, others), evaluated(name, [others]), evaluated([name], pictures)]
    several += [evaluated([name, "fish"], [others, FISH])[:1]]
    for found in several:
        torch.testing.assert_close(found, expected[None], atol=1e-5, rtol=0)
    each = [evaluated(["fish", "glasses"], [path, path]) for path in (FISH, GLASSES)]
    for path, both in zip((FISH, GLASSES), each, strict=True):
        torch.testing.assert_close(evaluated(["fish", "glasses"], path), both, **CLOSE)
        tensor = torch.tensor(np.asarray(load_image(path)) / 255.0).float()
        stacked = evaluated(["fish", "glasses"], torch.stack([tensor] * 2))
        torch.testing.assert_close(stacked, both, **CLOSE)
    with pytest.raises(
        ValueError, match=r"`images` has to hold one entry, .* 2 prompts but holds 3"
    ):
        evaluated(["fish", "glasses"], others)


@pytest.mark.slow
def test_generators_make_it_reproducible(sd, emoji_clip):
    def evaluated(generator):
        return evaluate(sd, PROMPTS, FISH, emoji_clip, generator=generator, **QUICK).similarities

    seeds = [5, 6, 7, 8]
    listed = evaluated([generator(seed) for seed in seeds])
    again = evaluated([generator(seed) for seed in seeds])
    torch.testing.assert_close(listed, again, **CLOSE)
    torch.testing.assert_close(evaluated(generator()), evaluated(generator()), **CLOSE)
    swapped = evaluated([generator(seed) for seed in (6, 5, 7, 8)])
    torch.testing.assert_close(swapped, listed[[[0], [1]], [[1, 0], [0, 1]]], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="`generator` has to hold one for each of 4 images but h"):
        evaluated([generator()] * 2)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_pictures_that_came_to_nothing_are_kept(sd, emoji_clip):
    latents = torch.full((1, 4, 32, 32), torch.nan)
    found = evaluate(sd, PROMPTS[0], FISH, emoji_clip, 1, 1, latents=latents)
    assert found.images[0][0].getextrema() == ((0, 0),) * 3
    black = cosines(emoji_clip, [Image.new("RGB", (64, 64))], [load_image(FISH)])
    assert found.mean == pytest.approx(black[0][0].item(), abs=1e-5)


def test_what_the_pipeline_does_not_take_is_refused_at_once(sd, emoji_clip):
    drawn = generator()
    before = drawn.get_state()
    for name in ("hight", "callback_steps", "output_type", "return_dict"):
        with pytest.raises(TypeError, match=f"`{name}` is no argument of Stable"):
            evaluate(sd, PROMPTS, FISH, emoji_clip, generator=drawn, **{name: 64})
    with pytest.raises(TypeError, match="`generator` is no argument of Album"):
        evaluate(Album(), "fish", FISH, emoji_clip, generator=drawn)
    with pytest.raises(TypeError, match="`pipeline` has to be a text-to-image pipeline"):
        evaluate(emoji_clip, PROMPTS, FISH, emoji_clip)
    with pytest.raises(TypeError, match=r"`judge` has to be a CLIP .* but is str"):
        evaluate(sd, PROMPTS, FISH, "ViT-bigG-14")
    with pytest.raises(TypeError, match="`prompts` has to be a string but is 3"):
        evaluate(sd, [3], FISH, emoji_clip)
    with pytest.raises(ValueError, match="`prompts` is empty"):
        evaluate(sd, [], FISH, emoji_clip)
    with pytest.raises(ValueError, match="`num_images_per_prompt` has to be at least 1"):
        evaluate(sd, PROMPTS, FISH, emoji_clip, num_images_per_prompt=0)
    assert torch.equal(drawn.get_state(), before)


def test_what_is_none_is_left_to_the_pipeline(sd, emoji_clip):
    found = evaluate(sd, PROMPTS[0], FISH, emoji_clip, 1, 2, None, generator(), height=32, width=32)
    (alone,) = sd(
        PROMPTS[0], num_inference_steps=2, generator=generator(), height=32, width=32
    ).images
    assert np.array_equal(np.asarray(found.images[0][0]), np.asarray(alone))


def test_an_offloaded_judge_is_away_while_images_are_made(sd, component, monkeypatch):
    _, hook = cpu_offload_with_hook(component, "cpu")
    events = []
    for name in ("pre_forward", "init_hook"):
        method = getattr(hook.hook, name)
        monkeypatch.setattr(
            hook.hook, name, lambda *a, m=method, n=name, **k: (events.append(n), m(*a, **k))[1]
        )

    def making(pipe, step, timestep, tensors):
        events.append("making")
        return tensors

    try:
        evaluate(sd, PROMPTS, FISH, component, 1, 1, callback_on_step_end=making)
    finally:
        hook.remove()
    assert events.count("making") == 2
    for before, event in pairwise(events):
        assert (before == "pre_forward") == (event == "init_hook")
