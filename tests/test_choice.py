"""Candidates that are chosen by the images that they make."""

import inspect
from dataclasses import replace

import numpy as np
import pytest
from conftest import EXAMPLES, ROOT
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_diffusion import stable_diffusion

from pez_core import ArgumentError, PezPipeline, SearchOptions, invert
from pez_core.clip.images import load_image
from pez_core.diffusion import evaluate, make_gallery
from pez_core.diffusion.choice import choose_by_image

FOUND = SearchOptions(prompt_len=4, effort="paper", steps=4, restarts=4)
FISH, GLASSES = (ROOT / "examples" / f"noto-{name}.png" for name in ("fish", "glasses"))


class Album(DiffusionPipeline):
    """Makes the image that belongs to a prompt; takes no number of images."""

    def __init__(self, images):
        super().__init__()
        self.calls, self.images = [], images

    def __call__(self, prompt: list[str]):
        self.calls.append(prompt)
        return ([load_image(self.images[text]) for text in prompt],)


def candidates_of(emoji_clip, image=FISH, restarts=4):
    (result,) = invert(emoji_clip, image, replace(FOUND, restarts=restarts))
    assert len({one.prompt for one in result.candidates}) == restarts
    return result


@pytest.mark.parametrize("best", range(4))
def test_the_candidate_with_the_most_similar_images_is_chosen(best, emoji_clip):
    result = candidates_of(emoji_clip)
    others = iter([path for path in EXAMPLES if path != FISH])
    album = Album({one.prompt: next(others) for one in result.candidates})
    album.images[result.candidates[best].prompt] = FISH
    chosen = choose_by_image(album, emoji_clip, result, [load_image(FISH)], [0, 1])
    expected = result.candidates[best]
    assert chosen.prompt == expected.prompt == chosen.candidates[0].prompt
    assert chosen.similarity == expected.similarity and chosen.token_ids == expected.token_ids
    assert chosen.history == result.history
    goal = emoji_clip.encode_images([load_image(FISH)])[0]
    values = [
        (emoji_clip.encode_images([load_image(album.images[one.prompt])]) @ goal).item()
        for one in chosen.candidates
    ]
    assert values == sorted(values, reverse=True)
    assert album.calls == [[one.prompt] * 2 for one in result.candidates]


def test_candidates_without_images_are_not_chosen(emoji_clip):
    result = candidates_of(emoji_clip)
    album = Album(dict.fromkeys((one.prompt for one in result.candidates), GLASSES))
    album.images[result.candidates[3].prompt] = FISH
    asked = iter([False, False, True, True])
    chosen = choose_by_image(
        album, emoji_clip, result, [load_image(FISH)], [0], ended=lambda: next(asked)
    )
    assert chosen.candidates == result.candidates and len(album.calls) == 2


def test_several_targets_count_as_their_mean(emoji_clip):
    result = candidates_of(emoji_clip, restarts=2)
    first, second = (one.prompt for one in result.candidates)
    for targets, expected in [([FISH, FISH, GLASSES], second), ([GLASSES, GLASSES, FISH], first)]:
        album = Album({first: GLASSES, second: FISH})
        pictures = [load_image(path) for path in targets]
        chosen = choose_by_image(album, emoji_clip, result, pictures, [0])
        assert chosen.prompt == expected


def test_targets_have_weights(emoji_clip):
    result = candidates_of(emoji_clip, restarts=2)
    first, second = (one.prompt for one in result.candidates)
    pictures = [load_image(path) for path in (FISH, GLASSES)]
    for weights, expected in [([3, 1], second), ([1, 3], first)]:
        album = Album({first: GLASSES, second: FISH})
        chosen = choose_by_image(album, emoji_clip, result, pictures, [0], weights=weights)
        assert chosen.prompt == expected


def test_equal_prompts_are_drawn_once(emoji_clip):
    result = candidates_of(emoji_clip, restarts=2)
    result = replace(result, candidates=[*result.candidates, *result.candidates])
    first, second = (one.prompt for one in result.candidates[:2])
    album = Album({first: GLASSES, second: FISH})
    chosen = choose_by_image(album, emoji_clip, result, [load_image(FISH)], [0])
    assert [one.prompt for one in chosen.candidates] == [second, second, first, first]
    assert album.calls == [[first], [second]]


@pytest.fixture
def pipe(emoji_clip):
    pez = PezPipeline.from_pipe(stable_diffusion(), emoji_clip)
    pez.set_progress_bar_config(disable=True)
    return pez


QUICK = {"options": FOUND, "num_inference_steps": 2, "num_images_per_prompt": 2}


@pytest.mark.slow
def test_the_pipeline_chooses_for_each_image(pipe, emoji_clip):
    output = pipe(image=[FISH, GLASSES], choose_by="image", **QUICK)
    assert len(output.images) == 4 and len(output.prompts) == 2
    plain = pipe(image=[FISH, GLASSES], **QUICK)
    expected = [
        choose_by_image(
            pipe.pipeline,
            emoji_clip,
            result,
            [load_image(path)],
            [0, 1],
            {"num_inference_steps": 2},
        )
        for result, path in zip(plain.results, (FISH, GLASSES), strict=True)
    ]
    assert output.prompts == [one.prompt for one in expected]
    assert output.similarities == [one.similarity for one in expected]
    assert pipe.prompts == plain.prompts
    assert [one.prompt for one in output.results] == output.prompts
    assert {one.prompt for one in output.results[0].candidates} == {
        one.prompt for one in plain.results[0].candidates
    }


def test_the_chosen_prompt_is_that_of_the_images(pipe, monkeypatch):
    """The fourth candidate makes the target, all others make glasses."""
    drawn = []

    def painted(self, prompt, num_inference_steps=0, generator=None, num_images_per_prompt=1):
        drawn.append([prompt] if isinstance(prompt, str) else prompt)
        image = load_image(FISH if len(drawn) == 4 else GLASSES)
        return ([image] * num_images_per_prompt * len(drawn[-1]),)

    monkeypatch.setattr(type(pipe.pipeline), "__call__", painted)
    assert "prompt" in inspect.signature(type(pipe.pipeline).__call__).parameters
    output = pipe(image=FISH, choose_by="image", **QUICK)
    assert len(drawn) == 5 and drawn[4] == output.prompts == drawn[3]


@pytest.mark.slow
def test_each_prompt_has_its_own_negative_prompt(pipe, monkeypatch):
    given = []
    call = type(pipe.pipeline).__call__

    def recorded(self, prompt, negative_prompt, **options):
        given.append(negative_prompt)
        return call(self, prompt, negative_prompt=negative_prompt, **options)

    recorded.__signature__ = inspect.signature(call)
    monkeypatch.setattr(type(pipe.pipeline), "__call__", recorded)
    pipe(image=[FISH, GLASSES], choose_by="image", negative_prompt=["red", "blue"], **QUICK)
    assert given == ["red"] * 4 + ["blue"] * 4 + [["red", "blue"]]


@pytest.mark.slow
def test_a_shared_prompt_is_chosen_by_all_images(pipe):
    output = pipe(image=[FISH, GLASSES], choose_by="image", task_kwargs={"shared": True}, **QUICK)
    assert len(output.prompts) == 1 and len(output.images) == 2


@pytest.mark.slow
def test_the_images_of_a_shared_prompt_have_its_weights(pipe, emoji_clip, monkeypatch):
    given = []

    def recorded(*arguments):
        given.append(arguments[-1])
        return choose_by_image(*arguments)

    monkeypatch.setattr("pez_core.diffusion.pipeline.choose_by_image", recorded)
    for shared, expected in [([2, 1], [2, 1]), (True, None)]:
        kwargs = {"task_kwargs": {"shared": shared}}
        pipe(image=[FISH, GLASSES], choose_by="image", **kwargs, **QUICK)
        assert given.pop() == expected


def test_an_interrupted_search_is_not_chosen_by_images(pipe, monkeypatch):
    made = []
    call = type(pipe.pipeline).__call__

    def recorded(self, prompt, **options):
        made.append(prompt)
        return call(self, prompt, **options)

    recorded.__signature__ = inspect.signature(call)
    monkeypatch.setattr(type(pipe.pipeline), "__call__", recorded)
    output = pipe(
        image=FISH,
        choose_by="image",
        pez_callback_on_step_end=lambda pipe, step, report: True,
        **QUICK,
    )
    assert made == [output.prompts]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"choose_by": "luck"}, "`choose_by` has to be one of 'prompt', 'image'"),
        ({"options": SearchOptions()}, "`restarts` is 1"),
        (
            {"task": "distill", "prompt": "a dog", "image": None},
            "needs an image pipeline, the task",
        ),
        ({"task_kwargs": {"negative_prompt": True}}, "no `negative_prompt`"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(pipe, given, message):
    with pytest.raises(ArgumentError, match=message):
        pipe(**{"image": FISH, "choose_by": "image"} | QUICK | given)


def test_a_prior_has_no_images_to_choose_by(emoji_clip):
    with pytest.raises(ArgumentError, match="needs an image pipeline"):
        PezPipeline.from_pipe(None, emoji_clip)(image=FISH, choose_by="image", options=FOUND)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_images_are_compared_as_the_search_reads_them(fit, emoji_clip, monkeypatch):
    """By the choice of a candidate, by a page, and by an evaluation."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 90, 3), np.uint8))
    encoded, encode = [], emoji_clip.encode_images

    def watch(images, fit="crop"):
        encoded.append(fit)
        return encode(images, fit)

    monkeypatch.setattr(emoji_clip, "encode_images", watch)
    options = SearchOptions(effort="fast", steps=1, swaps=1, restarts=2, prompt_len=2, fit=fit)
    (result,) = invert(emoji_clip, picture, options)
    album = Album({one.prompt: FISH for one in result.candidates})
    choose_by_image(album, emoji_clip, result, [picture], [0], fit=fit)
    make_gallery(album, [result.prompt], picture, emoji_clip, fit=fit, num_images_per_prompt=1)
    evaluate(album, [result.prompt], picture, emoji_clip, 1, None, None, fit=fit)
    assert len(encoded) == 1 + 3 + 2 + 2 and {*encoded} == {fit}
