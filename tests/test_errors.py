"""Errors about arguments: their text under any names, and the mistakes that they catch."""

import inspect
import math
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import EXAMPLES, paper

from pez_core import (
    ArgumentError,
    ArgumentTypeError,
    Avoid,
    SearchOptions,
    Vocabulary,
    distill,
    explain,
    fuse,
    invert,
    load_clip,
    objective_for,
    prune,
    score,
    style,
)
from pez_core.errors import (
    check_bool,
    check_choice,
    check_integer,
    check_number,
    check_string,
    check_type,
    check_weights,
    first_line,
)

ERROR = ArgumentError(
    "prompt_len", "is 16, more than `max_tokens` 3", "lower `prompt_len` or raise `max_tokens`"
)


def test_the_message_names_arguments_in_backticks():
    assert str(ERROR) == (
        "`prompt_len` is 16, more than `max_tokens` 3; lower `prompt_len` or raise `max_tokens`."
    )
    assert str(ArgumentError("lr", "has to be above 0")) == "`lr` has to be above 0."
    # one full stop at the end, whatever the problem ends with
    assert str(ArgumentError("lr", "is wrong.")) == "`lr` is wrong."
    assert str(ArgumentError("lr", "is wrong.", "raise it")) == "`lr` is wrong; raise it."


def test_a_front_end_shows_its_own_names():
    options = {"prompt_len": "--prompt-len", "max_tokens": "--max-tokens"}
    assert ERROR.render(options.__getitem__) == (
        "--prompt-len is 16, more than --max-tokens 3; lower --prompt-len or raise --max-tokens."
    )
    assert ERROR.render() == str(ERROR)
    # text in backticks that is no name stays
    other = ArgumentError("prompt", "is `a b`, not `x`")
    assert other.render(str.upper) == "PROMPT is `a b`, not X."


@pytest.mark.parametrize(
    "value", ["`lr`", "it's `lr`", "'`lr`\"", "\\'`lr`", ["`lr`", {"`lr`": 1}]]
)
def test_a_name_in_a_value_of_the_user_stays(value):
    error = ArgumentError("steps", f"is {value!r}, not `lr`", f"write {value!r} or CLIP's `lr`")
    text = f"STEPS is {value!r}, not LR; write {value!r} or CLIP's LR."
    assert error.render(str.upper) == text
    assert error.renamed({"lr": "rate"}).problem == f"is {value!r}, not `rate`"


VALUES_IN_MESSAGES = {
    "a choice": lambda clip, path: SearchOptions(effort="`steps`"),
    "a text": lambda clip, path: invert(clip, EXAMPLES[0], caption="`steps` {} {}"),
    "a path": lambda clip, path: invert(clip, path / "`steps`.png"),
    "an address": lambda clip, path: invert(clip, "https://x/`steps`"),
    "a word": lambda clip, path: Vocabulary(only=["`steps`"]).lexicon(clip),
    "a list of words": lambda clip, path: Vocabulary(only=path / "`steps`"),
    "a CLIP": lambda clip, path: load_clip(str(path / "`steps`.safetensors")),
}


@pytest.mark.parametrize("case", VALUES_IN_MESSAGES)
def test_front_ends_show_values_of_the_user_unchanged(case, tiny_clip, tmp_path):
    with pytest.raises(ArgumentError) as caught:
        VALUES_IN_MESSAGES[case](tiny_clip, tmp_path)
    assert "`steps`" in caught.value.render(lambda name: f"--{name}")


def test_names_in_the_error_of_another_library_are_no_arguments():
    assert first_line(ImportError("`steps` needs\nmore")) == "'steps' needs"
    assert first_line(KeyError()) == "KeyError" and first_line(ValueError("  a  ")) == "a"


@pytest.mark.parametrize("kind", [ArgumentError, ArgumentTypeError])
def test_an_error_survives_pickling(kind):
    error = kind("seed", "has to be 0 or more but is -1", "raise it")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == str(error)
    assert (again.argument, again.problem, again.remedy) == (
        "seed",
        "has to be 0 or more but is -1",
        "raise it",
    )


@pytest.mark.parametrize("kind", [ArgumentError, ArgumentTypeError])
def test_the_same_error_about_another_argument(kind):
    error = kind("images", "is empty", "give an image")
    other = error.about("content")
    assert type(other) is kind
    assert str(other) == "`content` is empty; give an image."
    assert error.argument == "images"


def test_the_kinds_of_errors():
    assert issubclass(ArgumentError, ValueError) and not issubclass(ArgumentError, TypeError)
    assert issubclass(ArgumentTypeError, ArgumentError)
    assert issubclass(ArgumentTypeError, TypeError) and issubclass(ArgumentTypeError, ValueError)


@pytest.mark.parametrize(
    "check, kind, message",
    [
        (lambda: check_integer("n", 0, 1), ArgumentError, "`n` has to be at least 1 but is 0."),
        (lambda: check_integer("n", 9, 1, 8), ArgumentError, "`n` has to be from 1 to 8 but is 9."),
        (lambda: check_integer("n", True, 0), ArgumentTypeError, "`n` has to be an integer"),
        (lambda: check_integer("n", 2.0, 0), ArgumentTypeError, "`n` has to be an integer"),
        (lambda: check_integer("n", np.arange(2), 0), ArgumentTypeError, "`n` has to be an int"),
        (lambda: check_integer("n", torch.ones(()), 0), ArgumentTypeError, "`n` has to be an int"),
        (lambda: check_number("x", -1), ArgumentError, "`x` has to be finite and 0 or more"),
        (lambda: check_number("x", 0, above=True), ArgumentError, "`x` has to be finite and above"),
        (lambda: check_number("x", 2, 0, 1), ArgumentError, "`x` has to be from 0 to 1 but is 2."),
        (
            lambda: check_number("x", 0, 0, 1, above=True),
            ArgumentError,
            "`x` has to be above 0 and at most 1 but is 0.",
        ),
        (lambda: check_number("x", math.nan), ArgumentError, "`x` has to be finite"),
        (lambda: check_number("x", math.inf), ArgumentError, "`x` has to be finite"),
        (lambda: check_number("x", 10**400), ArgumentError, "`x` has to be finite"),
        (lambda: check_number("x", "1"), ArgumentTypeError, "`x` has to be a number but is '1'."),
        (lambda: check_number("x", True), ArgumentTypeError, "`x` has to be a number"),
        (lambda: check_string("t", 3), ArgumentTypeError, "`t` has to be a string but is 3."),
        (lambda: check_bool("b", 1), ArgumentTypeError, "`b` has to be True or False but is 1."),
        (
            lambda: check_choice("c", "z", ("x", "y")),
            ArgumentError,
            "`c` has to be one of 'x', 'y' but is 'z'.",
        ),
        (lambda: check_choice("c", 3, ("x",)), ArgumentTypeError, "`c` has to be one of 'x' but"),
        (lambda: check_type("k", 3, str), ArgumentTypeError, "`k` has to be a str but is 3."),
        (lambda: check_weights("w", [1], 2), ArgumentError, "`w` has to hold 2 numbers but holds"),
        (lambda: check_weights("w", [1, 0], 2), ArgumentError, "`w` has to be finite and above 0"),
        (lambda: check_weights("w", [1, "a"], 2), ArgumentTypeError, "`w` has to be a number"),
        (lambda: check_weights("w", "12", 2), ArgumentTypeError, "`w` has to be a list of numbers"),
        (lambda: check_weights("w", 1, 1), ArgumentTypeError, "`w` has to be a list of numbers"),
    ],
)
def test_checks(check, kind, message):
    with pytest.raises(ArgumentError) as caught:
        check()
    assert type(caught.value) is kind and str(caught.value).startswith(message)


def test_good_values_pass():
    check_integer("n", 1, 1, 1)
    check_integer("n", np.int64(1), 1, 1)
    assert check_number("x", 0) == 0.0 and check_number("x", 1, 0, 1) == 1.0
    assert check_string("t", "a") == "a"
    check_bool("b", False)
    check_choice("c", "x", ("x", "y"))
    check_type("k", "a", str)
    assert check_weights("w", (1, 2.5), 2) == [1.0, 2.5]


# ------------------------------------------------------------------------- text or image

NAME_TAKEN_FOR_TEXT = {
    "avoid": (lambda clip, name: invert(clip, EXAMPLES[0], avoid=name), True),
    "avoid, in a list": (lambda clip, name: invert(clip, EXAMPLES[0], avoid=["a", name]), True),
    "avoid, as Avoid": (lambda clip, name: invert(clip, EXAMPLES[0], avoid=Avoid([name])), True),
    "sources": (lambda clip, name: fuse(clip, ["a dog", name]), True),
    "sources, with spaces": (lambda clip, name: fuse(clip, ["a dog", f" {name} "]), True),
    "targets": (lambda clip, name: objective_for(clip, name), True),
    "target": (lambda clip, name: explain(clip, "a dog", name), True),
    "target, to prune": (lambda clip, name: prune(clip, "a dog", ["a cat", name]), True),
    "prompt": (lambda clip, name: explain(clip, name, "a dog"), False),
    "prompt, to prune": (lambda clip, name: prune(clip, name, "a dog"), False),
    "prompt, to distill": (lambda clip, name: distill(clip, name), False),
    "prompts": (lambda clip, name: score(clip, name, EXAMPLES[0]), False),
    "prompts, in a list": (lambda clip, name: score(clip, ["a", name], EXAMPLES[0]), False),
}


@pytest.mark.parametrize("case", NAME_TAKEN_FOR_TEXT)
def test_the_name_of_an_image_file_is_no_text(case, tiny_clip, tmp_path):
    call, image_may_stand = NAME_TAKEN_FOR_TEXT[case]
    file = tmp_path / "A Fish.PNG"
    shutil.copy(EXAMPLES[0], file)
    with pytest.raises(ArgumentError, match="is the name of an image file") as caught:
        call(tiny_clip, str(file))
    assert caught.value.argument == case.partition(",")[0]
    assert ("write Path(" in caught.value.remedy) == image_may_stand
    assert caught.value.remedy


def test_a_text_that_only_looks_like_a_file_is_a_text(tiny_clip):
    assert len(explain(tiny_clip, "a dog", "missing.png")) == 2
    assert score(tiny_clip, "missing.png", EXAMPLES[0]).similarity.shape == (1, 1)


# ------------------------------------------------------------------------- other mistakes

TASKS = {
    "invert": lambda clip, options: invert(clip, EXAMPLES[0], options),
    "style": lambda clip, options: style(clip, EXAMPLES[:2], options),
    "distill": lambda clip, options: distill(clip, "a dog in a red car", options),
    "fuse": lambda clip, options: fuse(clip, ["a dog", "a cat"], options),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("value", [16, None, {"steps": 3}])
def test_options_of_the_wrong_type(task, value, tiny_clip):
    with pytest.raises(ArgumentTypeError, match="`options` has to be a SearchOptions"):
        TASKS[task](tiny_clip, value)


@pytest.mark.parametrize("task", TASKS)
def test_as_many_seeds_as_prompts(task, tiny_clip):
    with pytest.raises(ArgumentError, match="has to be one number or 1 of them") as caught:
        options = paper(2, prompt_len=2, seed=[1, 2])
        if task == "fuse":
            fuse(tiny_clip, ["a dog", "a cat"], options, always_learn=True)
        else:
            TASKS[task](tiny_clip, options)
    assert caught.value.argument == "seed"


WRONG = {
    "clip": [3, "emoji-clip", None],
    "callback": [5, "print"],
}


@pytest.mark.parametrize("task", [invert, style, distill, fuse, score, explain, prune])
@pytest.mark.parametrize("name", WRONG)
def test_clips_and_callbacks_of_the_wrong_type(task, name, tiny_clip):
    parameters = inspect.signature(task).parameters
    if name not in parameters:
        pytest.skip("it takes none")
    given = ["a cat", "a dog"] if task is fuse else "a cat"
    more = ["a cat"] if task in (score, explain, prune) else []
    for value in WRONG[name]:
        clip = value if name == "clip" else tiny_clip
        keywords = {} if name == "clip" else {name: value}
        with pytest.raises(ArgumentTypeError) as caught:
            task(clip, given, *more, **keywords)
        assert caught.value.argument == name and repr(value) in str(caught.value)


def test_a_judge_and_switches_of_the_wrong_type(tiny_clip):
    with pytest.raises(ArgumentTypeError, match="`judge` has to be a CLIP"):
        score(tiny_clip, "a cat", torch.rand(8, 8, 3), judge="x")
    with pytest.raises(ArgumentTypeError, match="`prompts` has to be a string or a list"):
        score(tiny_clip, 3, torch.rand(8, 8, 3))
    for name in ("download", "low_memory"):
        with pytest.raises(ArgumentTypeError, match=f"`{name}` has to be True or False"):
            load_clip("emoji-clip", **{name: "yes"})
