"""Options and arguments: checks, the work of each effort, and the effect of every one of them."""

import inspect
import math
import re
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import all_words, make_clip

from pez_core import (
    UNSAFE_WORDS,
    ArgumentError,
    Avoid,
    Result,
    SearchOptions,
    Vocabulary,
    baselines,
    distill,
    explain,
    fuse,
    invert,
    prune,
    score,
    style,
)
from pez_core.options import EFFORTS, Effort

NAMES = [field.name for field in fields(SearchOptions)]


# ------------------------------------------------------------------------- checks

OUT_OF_RANGE = {
    "prompt_len": [0, -1],
    "effort": ["slow", ""],
    "time_limit": [0, -1, math.nan, math.inf],
    "restarts": [0, -3],
    "seed": [-1, [0, -1]],
    "wording": ["prose", "", "Tags"],
    "readability": [-0.1, 1.1, math.nan],
    "batch_size": [0],
    "steps": [0, -1],
    "swaps": [-1],
    "lr": [0, -1, math.nan, math.inf],
    "weight_decay": [-1, math.nan, math.inf],
    "patience": [0],
    "fit": ["squash", "", "Crop"],
}
WRONG_TYPE = {
    "prompt_len": [2.5, True, "8"],
    "effort": [None, 3],
    "time_limit": ["5", True],
    "restarts": [1.5, None, "2", True],
    "seed": [0.5, "0", "", None, True, [0, "1"], (0, None)],
    "vocabulary": ["words.txt", ["cat"]],
    "block_unsafe": [None, 1, "yes"],
    "repeats": [None, 1, "no"],
    "fit": [None, 1, ["crop"]],
    "start_from": [3, ["a"], Path("a")],
    "wording": [None, 1, ["tags"]],
    "readability": ["0.5", None, True],
    "language_model": ["smollm2", 3],
    "batch_size": [1.5, True, "all"],
    "steps": [2.5, True, "3"],
    "swaps": [0.5, True, "3"],
    "lr": ["0.1", None, True],
    "weight_decay": [None, True],
    "patience": [1.5, True],
    "extra_loss": [3, "loss", len],
    "method": [3, "gcg", {}],
    "trajectory": [None, 1, "yes"],
}


def test_every_field_has_a_wrong_value():
    assert set(OUT_OF_RANGE) | set(WRONG_TYPE) == set(NAMES)


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]
)
def test_a_value_out_of_range(name, value):
    with pytest.raises(ArgumentError, match=f"^`{name}` has to be ") as caught:
        SearchOptions(**{name: value})
    assert caught.value.argument == name and not isinstance(caught.value, TypeError)


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, values in WRONG_TYPE.items() for value in values]
)
def test_a_value_of_the_wrong_type(name, value):
    with pytest.raises(ArgumentError, match=f"^`{name}` has to be ") as caught:
        SearchOptions(**{name: value})
    assert caught.value.argument == name and isinstance(caught.value, TypeError)


class Loss:
    """An extra loss: the length of the first four columns of the embeddings."""

    weight, projection, prompts, parts = 0.5, 0.5, 1, ((4, 1.0),)
    refinable = False

    def __init__(self, clip):
        self.token_embedding = clip.text.token_embedding.detach().float()[:, :4].contiguous()

    def objective(self, before, after, goals):
        return lambda embeddings: embeddings.norm(dim=-1).mean(dim=-1)

    def losses(self, texts, goals):
        return torch.tensor([float(len(text)) for text in texts])


class Letters:
    """A language model that likes one letter."""

    def __init__(self, letter):
        self.letter = letter

    def _likes(self, text):
        return text.count(self.letter) / max(len(text), 1)

    def table(self, words):
        return words

    def next_words(self, texts, table):
        return torch.tensor([list(map(self._likes, table))] * len(texts))

    def readability_score(self, texts):
        return torch.tensor(list(map(self._likes, texts)))

    def perplexity(self, texts):
        return 1 - self.readability_score(texts)


@pytest.mark.parametrize(
    "given, argument, message",
    [
        ({"effort": "paper", "swaps": 3}, "swaps", "is 3, but `effort` 'paper' has no swaps"),
        ({"effort": "paper", "readability": 0.5}, "readability", "this search has none"),
        ({"swaps": 0, "readability": 0.5}, "readability", "this search has none"),
        ({"effort": "paper", "wording": "tags"}, "wording", "is 'tags', which needs swaps"),
        ({"swaps": 0, "wording": "sentence"}, "wording", "is 'sentence', which needs swaps"),
        ({"wording": "tags", "steps": 3}, "steps", "is 3, but belongs to Algorithm 1, which"),
        ({"wording": "sentence", "lr": 1.0}, "lr", 'take the `wording` "free"'),
        ({"wording": "tags", "weight_decay": 0.0}, "weight_decay", "is 0.0, but belongs to"),
        ({"wording": "tags", "steps": 3, "vocabulary": Vocabulary()}, "steps", "the `wording`"),
        ({"extra_loss": "of the test"}, "extra_loss", "cannot be refined by swaps"),
        ({"extra_loss": "of the test", "swaps": 1}, "extra_loss", "set `swaps` to 0"),
    ],
)
def test_fields_that_do_not_go_together(given, argument, message, tiny_clip):
    if "extra_loss" in given:
        given = given | {"extra_loss": Loss(tiny_clip)}
    with pytest.raises(ArgumentError) as caught:
        SearchOptions(**given)
    assert caught.value.argument == argument and message in str(caught.value)


def test_fields_that_go_together(tiny_clip):
    assert SearchOptions(effort="paper", swaps=0).work.swaps == 0
    listed = PETS & Vocabulary(ascii_only=True)
    for given in ({"start_from": "cat"}, {"vocabulary": PETS}, {"vocabulary": listed}):
        assert SearchOptions(wording="tags", steps=3, lr=1.0, **given).work.steps == 3
    for given in ({"effort": "paper"}, {"swaps": 0}):
        assert SearchOptions(extra_loss=Loss(tiny_clip), **given).work.swaps == 0


def test_options_are_frozen_and_have_names():
    options = SearchOptions()
    with pytest.raises(FrozenInstanceError):
        options.steps = 3
    with pytest.raises(TypeError):
        SearchOptions(16)
    assert replace(options, steps=3).steps == 3 and options.steps is None
    assert hash(SearchOptions(seed=[1, 2])) == hash(SearchOptions(seed=(1, 2)))
    with pytest.raises(ArgumentError, match="`steps`"):  # a copy is checked, too
        replace(options, steps=0)


def test_one_seed_for_all_or_one_for_each():
    assert SearchOptions(seed=4).seeds(3) == [4, 4, 4]
    for seeds in ([4, 9], (4, 9), range(4, 10, 5)):
        assert SearchOptions(seed=seeds).seeds(2) == [4, 9]
    with pytest.raises(ArgumentError, match=r"`seed` has to be one number or 3 of them"):
        SearchOptions(seed=[4, 9]).seeds(3)


# ------------------------------------------------------------------------- effort


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, Effort(150, 32, 4, 32)),
        ({"effort": "fast"}, Effort(60, 16, 2, 32)),
        ({"effort": "balanced"}, Effort(150, 32, 4, 32)),
        ({"effort": "best"}, Effort(300, 128, 8, 64)),
        ({"effort": "paper"}, Effort(3000, 0, 1, 128)),
        ({"steps": 7}, Effort(7, 32, 4, 32)),
        ({"swaps": 7}, Effort(150, 7, 4, 32)),
        ({"swaps": 0}, Effort(150, 0, 1, 32)),
        ({"effort": "best", "steps": 1, "swaps": 2}, Effort(1, 2, 8, 64)),
        ({"effort": "paper", "steps": 7}, Effort(7, 0, 1, 128)),
        ({"time_limit": 5}, Effort(150, 32, 4, 32, until_time_limit=True)),
        ({"time_limit": 5, "steps": 7}, Effort(7, 32, 4, 32, until_time_limit=True)),
        ({"time_limit": 5, "swaps": 7}, Effort(150, 7, 4, 32)),
        ({"time_limit": 5, "swaps": 0}, Effort(150, 0, 1, 32)),
        ({"time_limit": 5, "effort": "paper"}, Effort(3000, 0, 1, 128)),
        ({"readability": 0.5}, Effort(150, 32, 4, 32)),
        ({"readability": 0.5, "effort": "best"}, Effort(300, 128, 4, 64)),
        ({"wording": "tags"}, Effort(150, 32, 4, 32)),
        ({"wording": "sentence", "effort": "best"}, Effort(300, 128, 4, 64)),
    ],
)
def test_the_work_of_an_effort(given, expected):
    work = SearchOptions(**given).work
    assert work == expected and work.total == expected.steps + expected.swaps


def test_the_table_of_the_docstring_is_that_of_the_efforts():
    rows = re.findall(r'^    \| `"(\w+)"`[^|]*\|([^|]*)\|([^|]*)\|([^|]*)\|$', _doc(), re.M)
    table = {
        name: tuple(0 if cell.strip() == "none" else int(cell) for cell in cells)
        for name, *cells in rows
    }
    assert table == {name: (e.steps, e.swaps, e.trials) for name, e in EFFORTS.items()}
    # the rows below it
    trials = re.search(r"^    \| `readability` above 0, [^|]*\| \| \| (\d+) \|$", _doc(), re.M)[1]
    for read in ({"readability": 0.1}, {"wording": "tags"}):
        assert SearchOptions(**read).work.trials == int(trials)
    assert "`swaps=0` leaves one trial" in _doc()
    assert SearchOptions(swaps=0).work.trials == 1


def test_the_docstring_describes_every_field():
    attributes = _doc().partition("Attributes:")[2].partition("Raises:")[0]
    described = re.findall(r"^        (\w+): ", attributes, re.M)
    assert described == NAMES


def _doc() -> str:
    return SearchOptions.__doc__


def test_the_paper_effort_has_every_token():
    assert all_words(effort="paper").allowed == Vocabulary(whole_words=False)
    rules = Vocabulary(only=["cat"])
    assert all_words(effort="paper", vocabulary=rules).allowed is rules
    safe = SearchOptions(effort="paper").allowed
    assert safe == Vocabulary(whole_words=False) & Vocabulary(block=UNSAFE_WORDS, whole_words=False)


def test_the_vocabulary_with_the_list_of_unsafe_words():
    rules = Vocabulary(only=["cat"])
    unsafe = Vocabulary(block=UNSAFE_WORDS, whole_words=False)
    assert all_words(vocabulary=rules).allowed is rules
    assert SearchOptions(block_unsafe=False).allowed == Vocabulary()
    assert SearchOptions().allowed == Vocabulary() & unsafe
    assert SearchOptions().block_unsafe is True


def test_the_published_algorithm_has_every_token_any_number_of_times():
    paper = SearchOptions(effort="paper")
    assert paper.words == Vocabulary(whole_words=False) and paper.may_repeat
    assert replace(paper, block_unsafe=False).allowed == Vocabulary(whole_words=False)
    assert replace(paper, vocabulary=Vocabulary()).words.dictionary
    assert not SearchOptions().may_repeat and SearchOptions(repeats=True).may_repeat


# ------------------------------------------------------------------------- effects of the fields


@pytest.fixture(scope="module")
def clip():
    """All tokens may be used."""
    clip = make_clip()
    clip.trained_tokens = None
    return clip


@pytest.fixture(scope="module")
def pictures():
    generator = torch.Generator().manual_seed(0)
    return list(torch.rand(3, 16, 16, 3, generator=generator))


SMALL = {"prompt_len": 3, "effort": "fast", "steps": 3, "swaps": 4, "block_unsafe": False}
SMALL |= {"vocabulary": Vocabulary(dictionary=False), "repeats": True}
ALONE = {"steps": 10, "swaps": 0, "lr": 0.5}  # PEZ without the refinement
FIRST = {"steps": 1, "swaps": 0}
PETS = Vocabulary(only=["cat", "dog", "fish"])

# Field -> options beside it and its changed value.
FIELD_CASES = {
    "prompt_len": ({}, 4),
    "effort": ({"steps": None, "swaps": None, "prompt_len": 2}, "balanced"),
    "time_limit": ({"swaps": None}, 0.5),
    "restarts": ({}, 2),
    "seed": ({}, 1),
    "vocabulary": ({}, PETS),
    "block_unsafe": (FIRST | {"vocabulary": Vocabulary(only=["nude", "cat"])}, True),
    "repeats": (FIRST | {"start_from": "cat cat cat"}, False),
    "start_from": (FIRST, "cat dog fish"),
    "fit": ({}, "pad"),
    "wording": ({"steps": None}, "tags"),
    "readability": ({"language_model": Letters("e")}, 1.0),
    "language_model": ({"readability": 1.0, "language_model": Letters("e")}, Letters("o")),
    "batch_size": ({"restarts": 2}, 1),
    "steps": ({}, 4),
    "swaps": ({}, 5),
    "lr": (ALONE, 3.0),
    "weight_decay": (ALONE, 1.9),
    "patience": (ALONE | {"steps": 40}, 1),
    "extra_loss": (ALONE, Loss),
    "method": (ALONE, baselines.autoprompt_sgd),
    "trajectory": (ALONE, True),
}


def test_every_field_has_a_case():
    assert set(FIELD_CASES) == set(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIELD_CASES)
def test_every_field_changes_the_result(name, clip, pictures, clock):
    beside, changed = FIELD_CASES[name]
    if name == "block_unsafe":
        beside = beside | {"start_from": "nude nude nude"}
    if changed is Loss:
        changed = Loss(clip)
    clock.tick = 0.01

    def found(**fields):
        reports = []
        options = SearchOptions(**(SMALL | beside | fields))
        picture = pictures[0] if name != "fit" else torch.cat(pictures, 1)  # a wide one
        results = invert(clip, picture, options, callback=reports.append)
        return plain(results), [(report.step, report.steps) for report in reports]

    before = found()
    assert found() == before  # a difference below comes from the changed field
    assert found(**{name: changed}) != before


def plain(value):
    """Results without the time they took, tensors as lists."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return list(map(plain, value))
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, Result):
        value = replace(value, seconds=0.0, tower_flops=0.0)
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    return value


# ------------------------------------------------------------------------- effects of arguments


def stop(report):
    return True


def small(**fields):
    return SearchOptions(**(SMALL | fields))


TEXT = "a cat and a dog in a red car near the old house"
BEGUN = small(vocabulary=PETS, start_from="cat dog fish", **FIRST)


# Task -> argument -> arguments beside it and its changed value. A function is called with a second
# CLIP and the pictures.
def wide(other, pictures):
    """A picture that is not square."""
    return torch.cat(pictures, 1)


CASES = {
    invert: {
        "clip": ({}, lambda other, pictures: other),
        "images": ({}, lambda other, pictures: pictures[1]),
        "options": ({}, small(seed=3)),
        "caption": ({}, "a photo of"),
        "avoid": ({}, "a cat"),
        "shared": ({"images": lambda other, pictures: pictures}, True),
        "negative_prompt": ({}, True),
        "callback": ({}, stop),
    },
    style: {
        "clip": ({}, lambda other, pictures: other),
        "images": ({}, lambda other, pictures: pictures[1:]),
        "options": ({}, small(seed=3)),
        "keep_content": ({}, True),
        "content": ({"options": BEGUN}, ["a cat", "dog"]),
        "images_per_step": ({"options": small(**ALONE), "keep_content": True}, 1),
        "callback": ({}, stop),
    },
    distill: {
        "clip": ({}, lambda other, pictures: other),
        "prompt": ({}, TEXT + " at night"),
        "options": ({}, small(seed=3)),
        "ratio": ({"options": small(prompt_len=None)}, 0.5),
        "callback": ({}, stop),
    },
    fuse: {
        "clip": ({}, lambda other, pictures: other),
        "sources": ({}, ["a cat", "a fish"]),
        "options": ({"always_learn": True}, small(seed=3)),
        "weights": ({}, [1, 9]),
        "max_tokens": ({"options": small(prompt_len=None)}, 2),
        "always_learn": ({}, True),
        "callback": ({"always_learn": True}, stop),
    },
    score: {
        "clip": ({}, lambda other, pictures: other),
        "prompts": ({}, ["a cat", "a fish"]),
        "images": ({}, lambda other, pictures: pictures[1:]),
        "judge": ({}, lambda other, pictures: other),
        "fit": ({"images": wide}, "pad"),
    },
    explain: {
        "clip": ({}, lambda other, pictures: other),
        "prompt": ({}, "a cat in a red bus"),
        "target": ({}, lambda other, pictures: pictures[1]),
        "fit": ({"target": wide}, "pad"),
    },
    prune: {
        "clip": ({}, lambda other, pictures: other),
        "prompt": ({}, "a cat in a red bus"),
        "target": ({}, lambda other, pictures: pictures[1]),
        "max_loss": ({"target": "a cat in a red car"}, 2.0),
        "fit": ({"target": wide}, "pad"),
    },
}


def base(task, clip, pictures):
    """Arguments that every case of a task begins with."""
    options = {"options": small()} if "options" in inspect.signature(task).parameters else {}
    return (
        options
        | {
            invert: {"clip": clip, "images": pictures[0]},
            style: {"clip": clip, "images": pictures},
            distill: {"clip": clip, "prompt": TEXT},
            fuse: {"clip": clip, "sources": ["a cat", "a dog"]},
            score: {"clip": clip, "prompts": ["a cat", "a dog"], "images": pictures[:2]},
            explain: {"clip": clip, "prompt": "a cat in a red car", "target": pictures[0]},
            prune: {"clip": clip, "prompt": "a cat in a red car", "target": pictures[0]},
        }[task]
    )


@pytest.mark.parametrize("task", CASES)
def test_every_argument_has_a_case(task):
    assert list(CASES[task]) == list(inspect.signature(task).parameters)


@pytest.mark.parametrize(
    "task, name", [(task, name) for task, cases in CASES.items() for name in cases]
)
def test_every_argument_changes_the_result(task, name, clip, pictures):
    beside, changed = CASES[task][name]
    other = make_clip(seed=1)
    made = {
        key: value(other, pictures) if callable(value) and value is not stop else value
        for key, value in (beside | {"changed": changed}).items()
    }
    changed = made.pop("changed")
    given = base(task, clip, pictures) | made
    before = plain(task(**given))
    assert plain(task(**given)) == before
    assert plain(task(**(given | {name: changed}))) != before


@pytest.mark.parametrize("name, value", [("targets", "a fish"), ("weight", 0.9), ("weight", [0.9])])
def test_every_field_of_avoid_changes_the_result(name, value, clip, pictures):
    def found(avoid):
        return plain(invert(clip, pictures[0], small(), avoid=avoid))

    avoid = Avoid("a cat", 0.5)
    assert found(replace(avoid, **{name: value})) != found(avoid)


VOCABULARY_CASES = {
    "only": ({}, ["cat"]),
    "block": ({}, ["cat"]),
    "ascii_only": ({}, True),
    "whole_words": ({}, False),
    "dictionary": ({}, False),
    "min_embedding_std": ({}, 0.3),
}


def test_every_field_of_a_vocabulary_has_a_case():
    assert list(VOCABULARY_CASES) == [field.name for field in fields(Vocabulary)]


@pytest.mark.parametrize("name", VOCABULARY_CASES)
def test_every_field_of_a_vocabulary_changes_the_words(name, clip):
    beside, changed = VOCABULARY_CASES[name]
    before = Vocabulary(**beside).lexicon(clip).phrases
    after = Vocabulary(**(beside | {name: changed})).lexicon(clip).phrases
    assert after and after != before
