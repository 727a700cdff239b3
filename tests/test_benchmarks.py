"""The benchmarks and tools at tiny size."""

import ast
import json
import random
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, make_clip
from diffusers import StableDiffusionPipeline
from PIL import Image
from test_lm import make_llama, make_tokenizer, snippets
from test_readability import make_lm
from tiny_diffusion import export_emoji_diffusion, stable_diffusion

from pez_core import (
    PezSettings,
    SearchOptions,
    TokenSpace,
    baselines,
    explain,
    prune_caption,
    search,
)
from pez_core.caption import Caption
from pez_core.clip.images import load_image
from pez_core.objectives import Similarity
from pez_core.problem import PromptTarget
from pez_core.readability import as_written
from pez_core.runner import learn
from pez_core.tower_work import counted

pytest.importorskip("matplotlib")
sys.path.insert(0, str(ROOT / "tools"))
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench
import distinct_words
import drafts
import draw_icon
import draw_results
import edits
import equal_work
import first_prompt
import fluency
import fluency_methods
import get_comfyui
import gpu
import limit
import lm
import mutate
import paper
import pictures
import pictures_tasks
import quality
import readability
import remedies
import step_time
import style
import text_to_image
import tries
from unseen import EVERY_WORD, from_folder, unseen

import examples

pytestmark = pytest.mark.slow

DRAWINGS = {"food": ("noto-fish", "noto-wine-glass"), "things": ("noto-glasses",)}
STEPS = {"0.1": 2, "0.2": 5}  # by budget


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name, files in DRAWINGS.items():
        (folder / name).mkdir()
        for file in files:
            shutil.copy(ROOT / f"examples/{file}.png", folder / name)
    words = "Wine glass\nbar, drink\n"
    (folder / "food/noto-wine-glass.txt").write_text(words)
    return folder


@pytest.fixture
def run(images, tmp_path):
    """Runs the script on three images and gives the folder of its results."""
    out = tmp_path / "results"

    def run(*arguments, methods=("PEZ as published", "PEZ"), seeds=1):
        quality.main(
            [
                *arguments,
                *("--images", str(images), "--judge", "emoji-clip", "--out", str(out / "quality")),
                *("--seeds", str(seeds), "--prompt-len", "4", "--budgets", "0.1", "0.2"),
                *("--at-once", "2", "--language-model", "none.gguf", "--methods", *methods),
            ]
        )
        return out

    return run


@pytest.fixture
def calibrated(tmp_path):
    """Replaces a calibration, whose steps depend on the machine."""
    (tmp_path / "results").mkdir()
    calibration = {
        "machine": "a machine",
        "clip": "emoji-clip",
        "steps": {name: {"4": STEPS, "75": STEPS} for name in quality.METHODS},
        "seconds": {name: {"0": 0.0, "4": 0.16} for name in [*quality.METHODS, "ours (test)"]},
        "work": {"PEZ": {"4": {"0.2": 3e9}}},
        "speed": {"4": {"authors": 4.0, "our loop": 2.0}},
        "rates": {},
    }
    (tmp_path / "results/quality-calibration.json").write_text(json.dumps(calibration))


def lines(path):
    return list(map(json.loads, path.read_text().splitlines()))


def test_the_search_resumes(run, calibrated):
    found = run("--search", methods=["PEZ"]) / "quality.jsonl"
    first = found.read_text()
    assert len(lines(found)) == 3 * 2  # images, budgets
    run("--search", seeds=2)
    whole = found.read_text()
    assert whole.startswith(first)
    assert len(lines(found)) == 2 * 2 * 3 * 2
    assert len({(r["method"], r["seed"], r["place"], r["budget"]) for r in lines(found)}) == 24

    run("--search", seeds=2)
    assert found.read_text() == whole
    found.write_text(first)  # as if it had been killed
    run("--search", seeds=2)
    assert found.read_text() == whole


def test_prompts_are_those_of_a_search_of_so_many_steps(run, calibrated, images, emoji_clip):
    rows = lines(run("--search", seeds=2) / "quality.jsonl")
    features = emoji_clip.encode_images([one.image for one in from_folder(images)])
    for allowed, name in ((None, "PEZ as published"), (emoji_clip.vocabulary, "PEZ")):
        space = TokenSpace(emoji_clip.text.token_embedding, allowed)
        for row in (row for row in rows if row["method"] == name):
            generator = torch.Generator().manual_seed(row["seed"] * 100_003 + row["place"])
            ids = space.random(1, 4, generator)
            target = features[row["place"]][None, None]
            objective = Similarity(emoji_clip.text.encoder(), target)
            alone = search(space, objective, ids, PezSettings(steps=row["steps"]))
            assert row["token_ids"] == alone.ids[0].tolist()
            assert row["score"] == pytest.approx(alone.scores.item(), abs=1e-5)
            assert row["prompt"] == emoji_clip.text.words.decode(row["token_ids"])
            assert row["steps"] == STEPS[f"{row['budget']:g}"]


def test_the_table_has_the_right_numbers(run, calibrated, images, emoji_clip):
    out = run("--search", "--report", methods=["PEZ as published", "PEZ", "true name"], seeds=2)
    rows, pictures = lines(out / "quality.jsonl"), from_folder(images)
    features = emoji_clip.encode_images([one.image for one in pictures])

    def per_image(method, value):
        return [
            statistics.mean(
                value(row, pictures[place], features[place])
                for row in rows
                if (row["method"], row["budget"], row["place"]) == (method, 0.2, place)
            )
            for place in range(3)
        ]

    def own(row, picture, feature):
        return float(emoji_clip.encode_texts([row["prompt"]])[0] @ feature)

    def lost(row, picture, feature):
        words = explain(emoji_clip, row["prompt"], picture.image)
        return statistics.mean(word.contribution for word in words)

    def hit(row, picture, feature):
        return any(word in picture.words for word in row["prompt"].split())

    def cell(values, sign=""):
        return f"{statistics.mean(values):{sign}.3f} ± {statistics.stdev(values) / 3**0.5:.3f}"

    ours, published = per_image("PEZ", own), per_image("PEZ as published", own)
    gain = cell([a - b for a, b in zip(ours, published, strict=True)], "+")
    text = (out / "quality.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| 0.2 | PEZ |")]
    cells = [part.strip() for part in line.strip("|").split("|")][2:]
    # the judge is the same CLIP
    assert cells[:4] == [gain, gain, cell(ours), cell(ours)]
    assert cells[4] == f"{statistics.mean(per_image('PEZ', lambda row, *_: row['score'])):.3f}"
    assert cells[5].startswith(f"{statistics.mean(per_image('PEZ', hit)):.0%} ± ")
    assert cells[6:8] == [cell(per_image("PEZ", lost))] * 2
    assert cells[-2:] == ["5", "3.0"]  # steps, GFLOP
    assert "| 0.0 | true name | " in text
    assert "| our loop | 4 | 2.0x | 2.00 |" in text
    assert "a machine" in text
    assert "There are no perplexities: `name_or_path`" in text
    assert str(ROOT) not in text
    assert Image.open(out / "quality.png").width > 500


def test_ours_is_compared_with_pez_as_published(run, calibrated, images, emoji_clip, monkeypatch):
    method = quality.Method(partial(quality.ours, swaps=0, steps=2), budgeted=False)
    monkeypatch.setitem(quality.METHODS, "ours (test)", method)
    out = run("--search", "--report", methods=["PEZ as published", "ours (test)"], seeds=2)
    features = emoji_clip.encode_images([one.image for one in from_folder(images)])

    def printed(method, budget):
        return {
            (row["place"], row["seed"]): float(
                emoji_clip.encode_texts([row["prompt"]])[0] @ features[row["place"]]
            )
            for row in lines(out / "quality.jsonl")
            if row["method"] == method and row["budget"] == budget
        }

    text = (out / "quality.md").read_text().splitlines()
    mine = printed("ours (test)", None)
    assert len(mine) == 6
    for budget in (0.1, 0.2):
        published = printed("PEZ as published", budget)
        wins = statistics.mean(mine[key] > published[key] for key in mine)
        start = f"| 4 | ours (test), 0.2 s | {budget} s | "
        (line,) = [line for line in text if line.startswith(start)]
        assert line.endswith(f" {wins:.0%} |")


def test_a_missing_stage_is_named(run, calibrated, tmp_path):
    with pytest.raises(SystemExit, match=r"has no rates, AutoPrompt SGD, lr.*--tune"):
        run("--search", methods=["AutoPrompt SGD"])
    (tmp_path / "results/quality-calibration.json").unlink()
    with pytest.raises(SystemExit, match="run --calibrate"):
        run("--search")


def test_other_images_need_another_file(run, calibrated, images):
    run("--search", methods=["PEZ"])
    extra = images / "food/noto-fish-2.png"
    shutil.copy(images / "food/noto-fish.png", extra)
    try:
        with pytest.raises(SystemExit, match="other images"):
            run("--search")
    finally:
        extra.unlink()


def test_calibration_counts_steps_seconds_and_work(run, monkeypatch, emoji_clip):
    """With a clock that advances by 0.03 s at each call."""
    ticks = count()
    clock = SimpleNamespace(perf_counter=lambda: 0.03 * next(ticks))
    monkeypatch.setattr(quality, "time", clock)
    monkeypatch.setattr(quality, "SPEED_STEPS", 2)
    run("--calibrate", methods=["PEZ", "true name"])
    out = run("--calibrate", methods=["PEZ as published"])
    measured = json.loads((out / "quality-calibration.json").read_text())
    for name in ("PEZ", "PEZ as published"):
        steps = measured["steps"][name]["4"]
        assert steps == {"0.1": 3, "0.2": 6}
        # the start token, and steps forward and backward with the end token
        token = emoji_clip.text.flops_per_token
        work = {budget: (1 + n * 2 * (4 + 1)) * token for budget, n in steps.items()}
        assert measured["work"][name]["4"] == work
    assert measured["seconds"]["true name"]["0"] > 0
    assert measured["work"]["true name"]["0"] == {"": emoji_clip.text.context_length * token}
    assert measured["speed"]["4"]["PEZ as published, 2 steps, our loop"] > 0


def test_tuning_takes_the_learning_rate_that_finds_more(run, calibrated, monkeypatch):
    monkeypatch.setattr(quality, "LEARNING_RATES", (1e-6, 0.3))  # the first moves nothing
    out = run("--tune", "--search", "--report", methods=["PEZ as published", "AutoPrompt SGD"])
    rate = json.loads((out / "quality-calibration.json").read_text())["rates"]["AutoPrompt SGD"]
    assert rate["lr"] == 0.3
    assert rate["grid"]["0.3"] > rate["grid"]["1e-06"] + 0.01
    assert "| AutoPrompt SGD | 0.3 | " in (out / "quality.md").read_text()
    (scores,) = {
        tuple(row["score"] for row in lines(out / "quality.jsonl") if row["budget"] == 0.2)[-3:]
    }
    assert statistics.mean(scores) > rate["grid"]["1e-06"]


def test_steps_of_the_interrogator_are_links(run, calibrated, monkeypatch, emoji_clip):
    bank = {"flavors": [f"{colour} {thing}" for colour in ("red", "blue") for thing in ("a", "b")]}
    monkeypatch.setattr(baselines, "load_bank", lambda: bank)
    rows = lines(run("--search", methods=["Interrogator, 75 tokens"], seeds=2) / "quality.jsonl")
    assert {row["seed"] for row in rows} == {0}
    assert len(rows) == 3 * 2
    for early, late in zip(rows[::2], rows[1::2], strict=True):
        assert early["place"] == late["place"] and early["score"] <= late["score"] + 1e-6
        assert late["prompt"].count(",") <= STEPS["0.2"]
        assert emoji_clip.text.words.encode(late["prompt"]) == late["token_ids"]


def test_the_name_stays_before_learned_tokens(run, calibrated, images, emoji_clip, monkeypatch):
    name = "true name + 4 learned"
    few = partial(quality.pez, words=quality.default_words, steps=5)
    monkeypatch.setitem(quality.METHODS, name, replace(quality.METHODS[name], run=few))
    rows = lines(run("--search", methods=[name]) / "quality.jsonl")
    for row, picture in zip(rows, from_folder(images), strict=True):
        assert row["prompt"].startswith(f"{picture.name} ")
        assert row["token_ids"][:-4] == emoji_clip.text.words.encode(picture.name)
        assert emoji_clip.text.words.encode(row["prompt"]) == row["token_ids"]


def test_images_of_the_prompts_are_made_once(run, calibrated, images, emoji_clip, tmp_path):
    stable_diffusion().save_pretrained(tmp_path / "sd")
    arguments = ["--search", "--report", "--pipeline", str(tmp_path / "sd"), "--pictures", "2"]
    out = run(*arguments, methods=["PEZ"])
    made = (out / "quality-images.jsonl").read_text()
    run(*arguments, methods=["PEZ"])
    assert (out / "quality-images.jsonl").read_text() == made

    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "sd")
    rows = [row for row in lines(out / "quality.jsonl") if row["budget"] == 0.2]
    picture = from_folder(images)[1].image
    from pez_core.diffusion.evaluation import evaluate

    alone = evaluate(
        pipe,
        rows[1]["prompt"],
        picture,
        emoji_clip,
        2,
        generator=[torch.Generator().manual_seed(seed) for seed in (2, 3)],
    )
    judged = [json.loads(line)["images"] for line in made.splitlines()]
    assert len(judged) == 3
    assert judged[1] == pytest.approx(alone.mean, abs=1e-4)
    error = statistics.stdev(judged) / 3**0.5
    assert (
        f" | {statistics.mean(judged):.3f} ± {error:.3f} | 5 |" in (out / "quality.md").read_text()
    )


PICTURED = [
    "ours (fast)",
    "ours (balanced)",
    "PEZ as published",
    "AutoPrompt SGD",
    "GCG",
    "ours (balanced), 4 restarts by image",
    "PEZ, a tenth of the steps, denoising_weight 0.5",
    "ours (balanced), no repeats, weight of words 0",
    "ours (balanced), no repeats, words differ (pairs, 0.3)",
    "ours (tags)",
    "VGD (sentence)",
    "VGD (sentence), then swaps",
    "soft prompt",
    "true name",
    "true caption",
    "true caption + 4 learned",
    "true caption, pruned",
    "true caption, pruned + 4 learned (tags)",
    "autoencoder",
    "another drawing's prompt",
]


@pytest.fixture(scope="module")
def image_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "emoji-diffusion"
    export_emoji_diffusion(folder)
    return folder


@pytest.fixture
def draws(images, image_model, tmp_path, monkeypatch):
    """Runs pictures.py on three images and gives its rows."""
    monkeypatch.setattr(pictures, "default_settings", lambda pipe: {"num_inference_steps": 2})
    monkeypatch.setattr(pictures, "load_clip", partial(load_tiny, pictures.load_clip))

    def draws(*methods, seeds=1, more=()):
        pictures.main(
            [
                *("--folder", str(images), "--pipeline", str(image_model), "--judge", "judge"),
                *("--images", "2", "--seeds", str(seeds), "--prompt-len", "4", "--steps", "10"),
                *("--at-once", "2", "--out", str(tmp_path / "pictures"), *more),
                *("--methods", *methods),
            ]
        )
        return lines(tmp_path / "pictures.jsonl")

    return draws


def load_tiny(load, name, **options):
    return make_clip(seed=1) if name == "judge" else load(name, **options)


def pruned_words(found, place):
    return set(found["true caption, pruned", place]["prompt"].split())


def test_prompts_are_judged_by_their_images(draws, images, image_model, emoji_clip, tmp_path):
    rows = draws(*PICTURED)
    assert Counter(row["method"] for row in rows) == dict.fromkeys(PICTURED, 3)
    found = {(row["method"], row["place"]): row for row in rows}
    drawings, judge = from_folder(images), make_clip(seed=1)
    pipe = StableDiffusionPipeline.from_pretrained(image_model)
    row = found["ours (fast)", 1]
    made = [
        pipe(
            row["prompt"],
            num_inference_steps=2,
            num_images_per_prompt=2,
            generator=[torch.Generator().manual_seed(k) for k in (2, 3)],
        ).images
    ]
    for key, clip in (("own", emoji_clip), ("judge", judge)):
        (goal,) = clip.encode_images([drawings[1].image])
        assert row[key] == pytest.approx((clip.encode_images(made[0]) @ goal).tolist(), abs=1e-4)
        text = (clip.encode_texts([row["prompt"]]) @ goal).item()
        assert row[f"{key}_text"] == pytest.approx(text, abs=1e-4)
    one, other = judge.encode_images(made[0])
    assert row["alike"] == pytest.approx((one @ other).item(), abs=1e-4)
    assert found["autoencoder", 1]["alike"] is None  # one image
    assert found["true name", 1]["prompt"] == "wine glass"
    assert found["true caption + 4 learned", 1]["prompt"].startswith("wine glass ")
    name = "ours (balanced), no repeats, weight of words 0"
    one, goal = torch.ones(1), emoji_clip.encode_images([drawings[1].image])
    options = SearchOptions(prompt_len=4, seed=1, **EVERY_WORD | {"repeats": False})
    (alone,) = learn(emoji_clip, [PromptTarget(goal, one, one < 0)], options, 4)
    assert found[name, 1]["prompt"] == alone.prompt
    pruned = prune_caption(emoji_clip, "wine glass", drawings[1].image)
    assert found["true caption, pruned", 1]["prompt"] == pruned
    tags = found["true caption, pruned + 4 learned (tags)", 1]["prompt"]
    assert tags.startswith(f"{pruned}, ")
    for place in range(3):
        other = found["ours (balanced)", (place + 1) % 3]["prompt"]
        assert found["another drawing's prompt", place]["prompt"] == other
    bound = pictures.through_autoencoder(pipe, drawings[0].image)
    (goal,) = judge.encode_images([drawings[0].image])
    expected = (judge.encode_images([bound]) @ goal).tolist()
    assert found["autoencoder", 0]["judge"] == pytest.approx(expected, abs=1e-4)

    table = (tmp_path / "pictures.md").read_text()
    values = [statistics.mean(found["GCG", place]["judge"]) for place in range(3)]
    base = [statistics.mean(found["PEZ as published", place]["judge"]) for place in range(3)]
    differences = [a - b for a, b in zip(values, base, strict=True)]
    error = statistics.stdev(differences) / 3**0.5
    expected = f"{statistics.mean(differences):+.3f} ± {error:.3f}"
    assert f"| GCG | 3 | 1 | 4.0 | {statistics.mean(values):.3f} ± " in table
    (head,) = [line for line in table.splitlines() if line.startswith("| method |")]
    column = head.split(" | ").index("true word")
    cells = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    shares = {cell[0]: cell[column] for cell in cells}
    assert shares["| true name"] == "100% ± 0%" and shares["| autoencoder"] == "-"
    named = [place for place in range(3) if pruned_words(found, place) & drawings[place].words]
    assert shares["| true caption, pruned"].startswith(f"{len(named) / 3:.0%} ± ")
    assert f"| {expected} | {statistics.mean(differences[::2]):+.3f} ± " in table
    assert Image.open(tmp_path / "pictures.png").width > 100
    # seconds are those of one machine
    for place in (1, 2):
        found["GCG", place] |= {"machine": "another machine", "seconds": 9e9}
    names, words = dict.fromkeys(("images", "search", "judge"), "a"), [d.words for d in drawings]
    pictures.report(list(found.values()), tmp_path / "two", names, list(pictures.METHODS), words)
    table = (tmp_path / "two.md").read_text()
    assert "; another machine." in table
    (row,) = [line for line in table.splitlines() if line.startswith("| GCG |")]
    assert row.endswith(f"| {found['GCG', 0]['seconds']:.2f} |")


@pytest.mark.parametrize("kind", distinct_words.KINDS)
def test_words_that_differ_have_a_higher_score(emoji_clip, kind):
    words = ["fish", "salmon", "house", "a", "guitar", "tuna"]
    encode = emoji_clip.text.words.encode
    allowed = torch.tensor(sorted(token for word in words for token in encode(word)))
    space = TokenSpace(
        emoji_clip.text.token_embedding, allowed, once=allowed[allowed != encode("a")[0]]
    )
    problem = SimpleNamespace(space=space, clip=emoji_clip)
    term = distinct_words.DistinctWords(problem, 0.5, kind)

    features = emoji_clip.encode_texts(
        [emoji_clip.text.words.decode([k]) for k in allowed.tolist()]
    )
    features = torch.nn.functional.normalize(features - features.mean(0), dim=1)
    place = {token: k for k, token in enumerate(allowed.tolist())}

    def expected(ids):
        alike = torch.zeros(len(ids), len(ids))
        for j, one in enumerate(ids):
            for k, other in enumerate(ids):
                if j != k and encode("a")[0] not in (one, other):
                    alike[j, k] = (features[place[one]] @ features[place[other]]).clamp(min=0)
        pairs = len(ids) * (len(ids) - 1)
        return -0.5 * (alike.sum() / pairs if kind == "pairs" else alike.amax(1).mean()).item()

    rows = [
        [token for word in text.split() for token in encode(word)]
        for text in ("fish salmon a tuna", "fish house a guitar", "fish salmon house guitar")
    ]
    found = term.score(torch.tensor(rows)).tolist()
    assert found == pytest.approx([expected(row) for row in rows], abs=1e-4)
    assert found[0] < found[1] <= 0
    screened = term.screen(torch.tensor(rows[:1]), 1)[0]
    swapped = [[*rows[0][:1], *encode(word), *rows[0][2:]] for word in ("house", "guitar")]
    changes = [expected(one) - expected([*one[:1], *encode("a"), *one[2:]]) for one in swapped]
    if kind == "pairs":  # exactly what the word brings
        found = [screened[place[one[1]]].item() for one in swapped]
        assert found == pytest.approx(changes, abs=1e-4)
    assert screened[place[rows[0][3]]] < screened[place[encode("guitar")[0]]] <= 0


def test_methods_are_read_at_the_same_work(images, image_model, tmp_path, monkeypatch):
    monkeypatch.setattr(equal_work, "UNIT_STEPS", 10)
    monkeypatch.setattr(equal_work, "SHARES", (0.5, 1.0))
    monkeypatch.setattr(equal_work, "default_settings", lambda pipe: {"num_inference_steps": 2})
    monkeypatch.setattr(equal_work, "load_clip", partial(load_tiny, equal_work.load_clip))
    load = equal_work.load_pipeline
    monkeypatch.setattr(equal_work, "load_pipeline", lambda _, device: load(image_model, device))
    out = tmp_path / "equal_work"
    arguments = [*("--folder", str(images), "--images", "3", "--pictures", "1"), "--prompt-len"]
    arguments += ["4", "--clips", "emoji-clip", "--judge", "judge", "--out", str(out), "--methods"]
    equal_work.main([*arguments, "PEZ as published", "ours (fast)"])
    rows = lines(out.with_suffix(".jsonl"))
    equal_work.main([*arguments, "PEZ as published", "ours (fast)"])
    assert rows == lines(out.with_suffix(".jsonl"))

    by_key = {(row["method"], row["share"], row["place"]): row for row in rows}
    assert len(by_key) == len(rows) == 9
    clip = equal_work.load_clip("emoji-clip")
    few = bench.Bench(clip, from_folder(images)[:3], {}, [4], range(1), [], 8, out)
    method = quality.METHODS["PEZ as published"]
    for place, one in enumerate(bench.find(few, method, 4, 0, {None: 5}, None)):
        row = by_key["PEZ as published", 0.5, place]
        assert row["prompt"] == one["prompt"] and row["work"] == pytest.approx(0.5, abs=0.11)
    base = [by_key["PEZ as published", 1.0, place]["own"] for place in range(3)]
    fast = [by_key["ours (fast)", None, place]["own"] for place in range(3)]
    shown = f"{statistics.mean(a - b for a, b in zip(fast, base, strict=True)):.4f}"
    (line,) = [one for one in out.with_suffix(".md").read_text().splitlines() if "(fast)" in one]
    assert f"| {statistics.mean(fast):.3f} | {shown} ± " in line


@pytest.mark.parametrize("name", [name for name in drafts.METHODS if "then" in name])
def test_a_draft_is_refined_on_the_clip_itself(images, emoji_clip, name):
    few = bench.Bench(emoji_clip, from_folder(images)[:2], {}, [4], range(1), [], 8, images)
    method, plain = drafts.METHODS[name], quality.METHODS["ours (fast)"]
    with counted() as work:
        found = method.run(few.problems(method, [0, 1], 4, 0), lambda *_: None)
    with counted() as usual:
        plain.run(few.problems(plain, [0, 1], 4, 0), lambda *_: None)
    # half of the work of `fast`, and half of its swaps
    assert 0.5 * usual.flops < work.flops < (2 if "emoji" in name else 1) * usual.flops
    own = (emoji_clip.encode_texts([one.prompt for one in found]) * few.features).sum(1)
    torch.testing.assert_close(own, torch.tensor([one.score for one in found]))


def test_a_draft_is_like_its_clip_and_leaves_it_alone(emoji_clip):
    texts = ["a blue fish", "three red hearts", "a man with a beard"]
    before = emoji_clip.encode_texts(texts)
    for make, least in ((drafts.first_half, -1.0), (drafts.low_rank, 0.5)):
        draft = make(emoji_clip)
        after = draft.clip.encode_texts(texts)
        assert ((before * after).sum(1) < 0.9999).all() and ((before * after).sum(1) > least).all()
        assert draft.clip.vocabulary.tolist() == emoji_clip.vocabulary.tolist()
    assert torch.equal(before, emoji_clip.encode_texts(texts))


def test_the_edits_of_prompts_are_judged(draws, images, image_model, emoji_clip, tmp_path):
    rows = draws("true name", "ours (fast)", seeds=2)
    found = tmp_path / "edits"
    arguments = [
        *("--folder", str(images), "--pipeline", str(image_model), "--judge", "emoji-clip"),
        *("--prompts", str(tmp_path / "pictures.jsonl"), "--methods", "true name", "ours (fast)"),
        *("--images", "1", "--out", str(found)),
    ]
    edits.main([*arguments, "--seeds", "1"])
    edits.main(arguments)  # goes on with the second seed
    by_case = {(row["method"], row["seed"], row["place"]): row for row in rows}
    changed = lines(tmp_path / "edits.jsonl")
    assert len(changed) == 12 and [row["method"] for row in changed[:3]] == ["true name"] * 3
    for row in changed:
        assert row["prompt"] == by_case[row["method"], row["seed"], row["place"]]["prompt"]
        assert row["edited"] == edits.edited(row["prompt"], row["word"], row["other"])
        # without that word the prompt is less similar than without another one
        (goal,) = emoji_clip.encode_images([from_folder(images)[row["place"]].image])
        words = row["prompt"].split()
        near = {
            word: (emoji_clip.encode_texts([" ".join(set(words) - {word}) or "a"]) @ goal).item()
            for word in words
            if len(words) == 2
        }
        assert not near or min(near, key=near.__getitem__) == row["word"]
    row = changed[0]
    pipe = StableDiffusionPipeline.from_pretrained(image_model)
    made = [
        pipe(text, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
        for text in (row["prompt"], row["edited"])
    ]
    (thing,) = emoji_clip.encode_texts([f"a {row['other']}"])
    before, after = (emoji_clip.encode_images(one)[0] for one in made)
    assert row["gain"] == pytest.approx(((after - before) @ thing).item(), abs=1e-4)
    assert row["same"] == pytest.approx((after @ before).item(), abs=1e-4)
    table = (tmp_path / "edits.md").read_text()
    own = [[row for row in changed if row["place"] == place][::2] for place in range(3)]
    assert [row["seed"] for row in own[0]] == [0, 1]
    seen = torch.tensor([[float(row["gain"] >= 0.1) for row in pair] for pair in own]).mean(1)
    error = seen.std() / 3**0.5
    assert f"| true name | 6 | 2 | {seen.mean():.0%} ± {error:.0%} | " in table
    edits.main(arguments)  # nothing is left to do
    assert lines(tmp_path / "edits.jsonl") == changed
    with pytest.raises(SystemExit, match="another number of images; give another --out"):
        edits.main([*arguments, "--images", "2"])
    others = [row | {"prompt": "something else"} for row in rows]
    (tmp_path / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    with pytest.raises(SystemExit, match="edits of other prompts; give another --out"):
        edits.main(arguments)


@pytest.mark.parametrize(
    ("prompt", "word", "other", "expected"),
    [
        ("a red fish in water", "fish", "owl", "a red owl in water"),
        ("an apple, red", "apple", "bird", "a bird, red"),
        ("a bird and an egg", "bird", "owl", "an owl and an egg"),
        ("fish fishing", "fish", "cat", "cat fishing"),
    ],
)
def test_a_word_is_replaced(prompt, word, other, expected):
    assert edits.edited(prompt, word, other) == expected


def quick_options(place, seed, **given):
    return SearchOptions(seed=place, effort="paper", steps=5, **given)


def test_other_tasks_are_judged_by_their_images(
    images, image_model, emoji_clip, tmp_path, monkeypatch
):
    monkeypatch.setattr(pictures, "default_settings", lambda pipe: {"num_inference_steps": 2})
    monkeypatch.setattr(pictures_tasks, "load_clip", partial(load_tiny, pictures_tasks.load_clip))
    monkeypatch.setattr(pictures_tasks, "own_options", quick_options)

    def rows(*parts, more=()):
        pictures_tasks.main(
            [
                *("--folder", str(images), "--pipeline", str(image_model), "--judge", "judge"),
                *("--images", "2", "--seeds", "1", "--prompt-len", "4"),
                *("--out", str(tmp_path / "tasks"), "--parts", *parts, *more),
            ]
        )
        return lines(tmp_path / "tasks.jsonl")

    first = rows("distill")
    whole = rows("distill", "fuse")
    assert whole[: len(first)] == first
    with pytest.raises(SystemExit, match="other settings; give another --out"):
        rows("distill", more=["--images", "3"])
    with pytest.raises(SystemExit, match="other settings; give another --out"):
        rows("distill", more=["--prompt-len", "5"])
    assert Counter((row["part"], row["case"]) for row in whole) == {
        (part, case): count for part, count in (("distill", 6), ("fuse", 4)) for case in range(3)
    }
    judge, drawings = make_clip(seed=1), from_folder(images)
    pipe = StableDiffusionPipeline.from_pretrained(image_model)

    def features(prompt, case):
        made = pipe(
            prompt,
            num_inference_steps=2,
            num_images_per_prompt=2,
            generator=[torch.Generator().manual_seed(2 * case + k) for k in range(2)],
        )
        return judge.encode_images(made.images)

    found = {(row["method"], row["case"]): row for row in whole}
    long, short = found["the long prompt, other noise", 1], found["ratio 0.5", 1]
    assert long["prompt"].startswith("wine glass")
    near = (features(short["prompt"], 1) * features(long["prompt"], 1)).sum(-1).mean().item()
    assert short["images"] == pytest.approx(near, abs=1e-4)
    assert found["ratio 0.1", 1]["tokens"] <= short["tokens"] < long["tokens"]
    row, ends = found["fused", 0], judge.encode_images([drawings[k].image for k in (0, 1)])
    near = (features(row["prompt"], 0) @ ends.T).mean(0).tolist()
    assert [row["first"], row["second"]] == pytest.approx(near, abs=1e-4)
    assert row["lower"] == min(row["first"], row["second"])
    alone = [found[name, 0]["lower"] for name in ("of the first", "of the second")]
    assert row["both"] == (row["lower"] > max(alone))

    table = (tmp_path / "tasks.md").read_text()
    values = [found["ratio 0.5", case]["images"] for case in range(3)]
    error = statistics.stdev(values) / 3**0.5
    assert f"{statistics.mean(values):.3f} ± {error:.3f} |" in table


def test_styles_are_judged_by_the_images_of_new_subjects(image_model, emoji_clip, monkeypatch):
    monkeypatch.setattr(pictures, "default_settings", lambda pipe: {"num_inference_steps": 2})
    monkeypatch.setattr(pictures_tasks, "own_options", quick_options)
    styles, pictured = pictures_tasks.STYLES, {}
    for k in range(7 * len(styles)):
        colour = tuple(random.Random(k).choices(range(256), k=3))
        pictured[k] = Image.new("RGB", (32, 32), colour)
    drawings = SimpleNamespace(
        places={style: {"fish": 7 * k} for k, style in enumerate(styles)},
        rows=[SimpleNamespace(name="a fish")] * len(pictured),
        picture=pictured.__getitem__,
    )
    trial = {"style": styles[1], "images": [8, 9, 10, 11, 12, 13], "subject": "fish"}
    judge = make_clip(seed=1)
    pipe = StableDiffusionPipeline.from_pretrained(image_model)
    bench = SimpleNamespace(clip=emoji_clip)
    setup = pictures.Setup(bench, pipe, judge, steps=0, images=2)
    learned, named, alone = pictures_tasks.styled(drawings, [trial], setup, 0, 0)
    assert alone["prompt"] == "a fish" and learned["prompt"].startswith("a fish, ")
    assert named["prompt"].startswith("a fish, ") and named["prompt"] != learned["prompt"]
    made = pipe(
        learned["prompt"],
        num_inference_steps=2,
        num_images_per_prompt=2,
        generator=[torch.Generator().manual_seed(k) for k in range(2)],
    )
    goals = judge.encode_images([pictured[7 * k] for k in range(len(styles))])
    near = (judge.encode_images(made.images) @ goals.T).mean(0).tolist()
    assert learned["own"] == pytest.approx(near[1], abs=1e-4)
    assert learned["other"] == pytest.approx((sum(near) - near[1]) / 4, abs=1e-4)
    assert learned["right"] == (max(near) == near[1])


def test_an_image_model_is_judged_by_names_and_captions(tiny_clip):
    colours = ("red", "green", "blue", "white")
    items = [
        text_to_image.Item(name, f"a {name} thing", Image.new("RGB", (32, 32), name))
        for name in colours
    ]

    def pipeline(prompts, generator, **settings):
        seeds.extend(one.initial_seed() for one in generator)
        words = [next(c for c in colours if c in prompt) for prompt in prompts]
        # names give the same image, captions that of their drawing
        found = ["red" if p == w else w for p, w in zip(prompts, words, strict=True)]
        return SimpleNamespace(images=[Image.new("RGB", (32, 32), word) for word in found])

    seeds: list[int] = []
    names = sorted(colours)
    row = text_to_image.measure(pipeline, tiny_clip, items, names)
    assert seeds == [0, 1, 2, 3] * 2  # the same noise for captions and names
    drawn = tiny_clip.encode_images([item.image for item in items])
    assert row["true"] == pytest.approx([1.0] * 4, abs=1e-5)
    assert row["other"] == pytest.approx(
        [float(drawn[k] @ drawn[(k + 2) % 4]) for k in range(4)], abs=1e-5
    )
    texts = [template.format(name) for name in names for template in text_to_image.TEMPLATES]
    features = tiny_clip.encode_texts(texts).view(4, 3, -1).mean(1)
    best = [names[k] for k in (drawn @ features.T).argmax(1)]
    assert row["drawings"] == sum(a == b for a, b in zip(best, colours, strict=True)) / 4
    assert row["images"] == sum(best[0] == one for one in colours) / 4

    row |= {"drawings": 0.5, "images": 0.25}
    table = text_to_image.report({"trained on": row}, 4, "judge", "model")
    assert "| trained on | 4 | 25% | 50% | 50% | 1.000 | " in table


def test_pictures_resume(draws, tmp_path):
    draws("true name", "ours (fast)", seeds=1)
    whole = draws("true name", "ours (fast)", seeds=2)
    assert len(whole) == 2 * 2 * 3
    first = [row for row in whole if row["seed"] == 0]
    assert whole[: len(first)] == first
    path = tmp_path / "pictures.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in whole[:7]))
    again = draws("true name", "ours (fast)", seeds=2)
    assert all((row["gflop"] > 0) == (row["method"] != "true name") for row in whole)
    times = ("seconds", "drawn", "gflop")  # work that is shared counts for fewer drawings

    def comparable(rows):
        rows = [{k: v for k, v in row.items() if k not in times} for row in rows]
        return sorted(rows, key=lambda row: (row["method"], row["seed"], row["place"]))

    assert comparable(again) == comparable(whole)
    assert draws("true name", seeds=2, more=["--report"]) == again
    for change, other in [
        ({"name": "something else"}, "drawings"),
        ({"place": 3}, "drawings"),
        ({"judge": [0.5] * 4}, "numbers of images"),
        ({"steps": 11}, "steps"),
        ({"models": ["another", "pair", "of models"]}, "models"),
        ({"prompt_len": 5}, "lengths"),
    ]:
        path.write_text(json.dumps(whole[0] | change) + "\n")
        for more in ([], ["--report"]):
            with pytest.raises(SystemExit, match=f"about other {other}; give another --out"):
                draws("true name", more=more)


def test_the_bound_below_needs_the_prompts_of_others(draws):
    with pytest.raises(SystemExit, match="come first"):
        draws("another drawing's prompt")


def test_a_soft_prompt_of_tokens_is_read_like_these_tokens(image_model, emoji_clip):
    pipe = StableDiffusionPipeline.from_pretrained(image_model)
    text = "a red fish in the blue sea"
    ids = torch.tensor(emoji_clip.text.words.encode(text))
    states = pictures.hidden_states(pipe, emoji_clip.text.token_embedding[ids].detach())
    expected, _ = pipe.encode_prompt(text, "cpu", 1, False)
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)
    others = pictures.hidden_states(pipe, 2 * emoji_clip.text.token_embedding[ids].detach())
    assert not torch.allclose(others, expected, atol=1e-2)
    again, _ = pipe.encode_prompt(text, "cpu", 1, False)  # nothing of it stays
    assert torch.equal(again, expected)


@pytest.mark.skipif(
    not (ROOT / "build/emoji/pixels.npy").exists(), reason="the drawings are not rendered"
)
def test_captioned_drawings_come_first():
    found = pictures.subjects(ROOT / "build/emoji", 65)
    assert len(found) == 65 and [bool(one.caption) for one in found] == [True] * 60 + [False] * 5
    assert len({(one.set, one.name) for one in found}) == 65


def test_images_of_a_folder_have_captions_or_the_names_of_their_files(images):
    fish, glass, glasses = from_folder(images)
    assert (fish.set, fish.name, fish.words) == ("food", "noto fish", {"noto", "fish"})
    assert (glass.name, glass.words) == ("wine glass", {"wine", "glass", "bar", "drink"})
    assert glasses.set == "things"
    assert glasses.image.tobytes() == load_image(ROOT / "examples/noto-glasses.png").tobytes()
    with pytest.raises(ValueError, match="no folder in"):
        from_folder(images / "food")


@pytest.mark.skipif(
    not (ROOT / "build/emoji/pixels.npy").exists(), reason="the drawings are not rendered"
)
def test_unseen_drawings_are_of_three_sets_and_apart():
    test, others = unseen(), unseen(12, 1)
    apart = unseen(12, 1, apart=test)
    assert [sum(one.set == name for one in test) for name in ("noto", "twemoji", "fxemoji")] == [
        34
    ] * 3
    assert len({one.name for one in test}) == 102
    assert all(set(one.name.split()) & one.words for one in test if len(one.name) > 1)
    assert {one.name for one in others} & {one.name for one in test}
    assert not {one.name for one in apart} & {one.name for one in test}
    assert [one.name for one in unseen()] == [one.name for one in test]


def test_the_learning_rate_with_the_best_prompt_is_taken(tmp_path):
    bench = lm.Bench(SimpleNamespace(model=None, out=tmp_path / "lm"))
    soft = "soft prompt"
    assert bench.rate(soft) == 0.3
    for method, lr, holdout, loss in [
        (soft, 0.3, 0.5, 0.1), (soft, 1.0, 0.7, 0.6), (soft, 3.0, 0.7, 0.5),
        (soft, 9.0, 0.6, 0.2), ("FluentPrompt", 0.1, 0.9, 0.1), ("PEZ", 9.0, 0.9, 0.1),
    ]:  # fmt: skip
        bench.add({"kind": "rate", "method": method, "lr": lr, "holdout": holdout, "loss": loss})
    assert bench.rate(soft) == 3.0 and bench.rate("FluentPrompt") == 0.1
    assert bench.rate("PEZ") == 0.3


def test_language_models_are_measured_and_runs_resume(tmp_path, capsys):
    words = sorted({word for one in lm.TASKS.values() for word in one.verbalizer.values()})
    for seed, name in enumerate(("own", "other")):
        tokenizer = make_tokenizer([*words, "It", "was", "about"])
        tokenizer.save_pretrained(tmp_path / name)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            make_llama(len(tokenizer)).save_pretrained(tmp_path / name)
    for name, content in snippets().items():
        rows = [f"{k}\t{rating}\ta {word} film {k}\r\n" for k in range(30) for rating, word in
                [("3", "red"), ("-3", "black")]]  # fmt: skip
        (tmp_path / name).write_text("".join(rows) if name.startswith("movie") else content)
    files = ["--model", f"own={tmp_path / 'own'}", "--to", f"other={tmp_path / 'other'}"]
    sizes = "--steps 3 --check-every 2 --batch-size 4 --holdout 8 --seeds 2 --limit 10 --shots 2"
    common = [*files, "--source", str(tmp_path), "--out", str(tmp_path / "lm"), *sizes.split()]
    common += ["--device", "cpu", "--rounds", "1"]
    tried = ["--methods", "PEZ", "FluentPrompt", "soft prompt"]
    lm.main(["--rates", *common, *tried])
    lm.main(["--tune", "--few-shot", "--test", *common])
    rows = (tmp_path / "lm.jsonl").read_text().splitlines()
    rates = [row for row in map(json.loads, rows) if row["kind"] == "rate"]
    assert [row["lr"] for row in rates] == [*lm.RATES] * 2
    prompts = [row for row in map(json.loads, rows) if row["kind"] == "prompt"]
    best = max(rates[:3], key=lambda row: (row["holdout"], -row["loss"]))
    assert {row["lr"] for row in prompts if row["method"] == "FluentPrompt"} == {best["lr"]}
    assert {row["lr"] for row in prompts if row["method"] == "PEZ"} == {0.3}
    assert len(prompts) == 2 * 2 * len(lm.METHODS)
    tests = [row for row in map(json.loads, rows) if row["kind"] == "test"]
    assert len(tests) == 2 * len({row["prompt"] for row in prompts})
    lm.main(["--rates", *common, *tried])  # nothing is left to do
    lm.main(["--tune", "--few-shot", "--test", *common])
    assert (tmp_path / "lm.jsonl").read_text().splitlines() == rows
    lm.main(["--speed", "--report", *common])
    report = (tmp_path / "lm.md").read_text()
    found = next(row for row in prompts if row["method"] == "PEZ" and row["shots"] is None)
    assert found["prompt"] in report and "times as fast as one of a plain loop" in report
    accuracies = [
        100 * row["accuracy"]
        for seed in range(2)
        for row in tests
        if row["model"] == "other"
        and row["prompt"]
        == next(
            one["prompt"]
            for one in prompts
            if (one["method"], one["seed"], one["shots"]) == ("PEZ", seed, None)
        )
    ]
    (line,) = [x for x in report.split("learned from")[0].splitlines() if x.startswith("| PEZ |")][
        :1
    ]
    error = statistics.stdev(accuracies) / 2**0.5
    assert line.split(" | ")[3] == f"{statistics.fmean(accuracies):.1f} ± {error:.1f}"


def test_memory_is_counted_without_a_card(tmp_path):
    sizes = "--memory --models ViT-S-32-alt --prompt-len 3 --batch 1 64 --dtype bfloat16"
    gpu.main([*sizes.split(), "--out", str(tmp_path / "gpu")])
    rows = (tmp_path / "gpu-memory.md").read_text().splitlines()[-2:]
    (tower, one), (_, many) = ([float(cell) for cell in row.split("|")[4:6]] for row in rows)
    with torch.random.fork_rng():
        clip = gpu.random_clip("ViT-S-32-alt", torch.bfloat16, "cpu")
    text = [x for name, x in clip.model.state_dict().items() if not name.startswith("visual")]
    mask = clip.model.attn_mask.nbytes
    assert tower == round((sum(x.nbytes for x in text) + mask) / 1e9, 3)
    # with one prompt most is the vocabulary, in half precision and in single
    vocabulary = len(clip.vocabulary) * clip.model.token_embedding.weight.shape[1] * 6 / 1e9
    assert one == pytest.approx(tower + vocabulary, abs=2e-3) and many > one + 5e-3


def test_memory_is_read_after_many_searches(tmp_path):
    gpu.main(["--searches", "3", "--device", "cpu", "--out", str(tmp_path / "gpu")])
    rows = (tmp_path / "gpu-searches.md").read_text().splitlines()[-3:]
    read = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:3] for row in read] == [[str(k), "-", "-"] for k in (1, 2, 3)]
    assert 100 < float(read[0][3]) <= float(read[2][3])


def test_speed_is_compared_with_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROUNDS", 1)
    sizes = "--models ViT-S-32-alt --prompt-len 2 3 --batch 1 2 --steps 3 --copy-bytes 4000000"
    gpu.main(
        [*sizes.split(), "--dtype", "float32", "--device", "cpu", "--out", str(tmp_path / "gpu")]
    )
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [(row["prompt_len"], row["batch"]) for row in rows] == [(2, 1), (2, 2), (3, 1), (3, 2)]
    (line,) = [
        x
        for x in (tmp_path / "gpu.md").read_text().splitlines()
        if x.startswith("| ViT-S-32-alt | 3 | 2 ")
    ]
    first, last = rows[0], rows[3]
    cells = line.split(" | ")
    assert cells[4] == f"{last['uncaptured']['ms'] / last['ours']['ms']:.2f}x"
    mine = last["ours"]["ms"] * 3000 + last["ours"]["set_up"]
    assert cells[10] == f"{2 * 60e3 / mine:.1f}"
    assert "**4 of 4 cases were not captured.**" in (tmp_path / "gpu.md").read_text()
    assert (tmp_path / "gpu.png").stat().st_size > 0
    # twice the prompts and four tokens in place of three: 8 / 3 of the products; weights as before
    assert first["limit"]["memory"] == last["limit"]["memory"]
    assert 2.6 < last["limit"]["arithmetic"] / first["limit"]["arithmetic"] < 3.1


def test_a_step_is_compared_with_the_rates_of_the_processor(tmp_path, monkeypatch, emoji_clip):
    def missing(*_):
        raise NotImplementedError

    monkeypatch.setattr(gpu, "ROUNDS", 1)
    monkeypatch.setattr(torch, "_int_mm", missing)
    rows, measure = [], limit.measure
    monkeypatch.setattr(
        limit, "measure", lambda *given: (rows.append(row) or row for row in measure(*given))
    )
    sizes = "--models emoji-clip --batch 1 4 --prompt-len 3 --steps 2 --copy-bytes 4000000"
    limit.main([*sizes.split(), "--matrix", "64", "--out", str(tmp_path / "limit")])
    cases = [(row["batch"], row["dtype"]) for row in rows]
    assert cases == [(1, "float32"), (1, "bfloat16"), (4, "float32"), (4, "bfloat16")]
    for row in rows:
        parts = row["parts"]
        assert row["limits"][row["dtype"]] == max(parts.values())
        # forward and backward, with the end token
        assert row["flops"] == row["batch"] * (3 + 1) * 2 * emoji_clip.text.flops_per_token
        assert len(row["largest"]) == 3 and sum(share for _, share in row["largest"]) < 1
        binds = max(parts, key=parts.get)
        case = f"| emoji-clip | {row['batch']} | {row['dtype']} | "
        line = f"{case}{row['ms'] / parts[binds]:.1f}x | {binds} | "
        assert line in (tmp_path / "limit.md").read_text()
    one, low, four, _ = (row["parts"] for row in rows)
    assert low["memory"] < one["memory"] == four["memory"]
    assert four["arithmetic"] == pytest.approx(4 * one["arithmetic"])
    assert "| product of matrices, int8 | - GFLOP/s |" in (tmp_path / "limit.md").read_text()


def test_the_benchmarks_of_quality_import_each_other_in_one_direction():
    code = "import quality_report, sys; assert 'quality' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks", check=True)


def test_step_times_are_compared(tmp_path, monkeypatch, emoji_clip):
    times = []

    def of(*case):
        times.append(case)
        return len(times) / 1e3

    monkeypatch.setattr(step_time, "time_ours", of)
    monkeypatch.setattr(step_time, "random_clip", lambda *_: emoji_clip)
    step_time.main(["--rounds", "1", "--out", str(tmp_path / "times.md")])
    assert {case[1] for case in times} == {1, 8} and len(times) == 5 * 2 * 2 * 2
    # of the second runs, since the first ones warm up
    row = "| emoji-clip | 8 | - | - | 7.0 | 8.0 | - | 0.9 | - |"
    assert row in (tmp_path / "times.md").read_text().splitlines()
    monkeypatch.undo()
    clock = iter((10.0, 10.5))  # before and after two steps
    monkeypatch.setattr(step_time, "time", SimpleNamespace(perf_counter=clock.__next__))
    assert step_time.time_ours(emoji_clip, 2, 3, 2, emoji_clip.vocabulary) == 0.25


def test_growth_is_measured_and_drawn(tmp_path, monkeypatch):
    growth, cases = pytest.importorskip("growth"), []
    for name, values in {
        "LENGTHS": (2, 4, 99),  # the last does not fit
        "BATCHES": (1, 3),
        "VOCABULARIES": (100, 400),
        "RESTARTS": (1, 2),
    }.items():
        monkeypatch.setattr(growth, name, values)

    def time_ours(clip, batch, prompt_len, steps, allowed):
        cases.append((batch, prompt_len, len(allowed)))
        return batch * prompt_len / 1e3

    def in_process(threads, images, out, count, search, workers):
        assert len(list(images.glob("*.png"))) == 7
        done.append((threads, count, search, workers))
        return {"ms": 8.0 + threads - workers, "megabytes": 50.0}

    done = []
    monkeypatch.setattr(growth, "time_ours", time_ours)
    monkeypatch.setattr(growth, "in_process", in_process)
    arguments = [
        "--rounds",
        "1",
        "--images",
        "3",
        "6",
        "--ray",
        "7",
        "--note",
        "Other programs ran.",
    ]
    growth.main([*arguments, "--out", str(tmp_path / "growth")])
    everything = len(growth.clip_of("emoji-clip").vocabulary)
    lengths, batches = [(1, n, everything) for n in (2, 4)], [(n, 16, everything) for n in (1, 3)]
    vocabularies = [(1, 16, n) for n in (100, 400)]
    twice = [2 * some for some in (lengths, batches, vocabularies)]  # the first ones warm up
    assert cases == [case for some in twice for case in some]
    assert done == [(1, 3, "short", 0), (1, 6, "short", 0), (2, 7, "fast", 0), (1, 7, "fast", 2)]
    text = (tmp_path / "growth.md").read_text()
    for line in (
        "| prompt_len | 4 | ms per step | 4.0 | 2.0 | 2.00 |  |",
        "| batch | 3 | ms per step | 48.0 | 3.0 | 3.00 | 16.00 |",
        "| vocabulary | 400 | ms per step | 16.0 | 4.0 | 1.00 |  |",
        "| images | 6 | ms per image of a job | 9.0 | 2.0 | 1.00 |  |",
        "| images | 6 | MB of a job | 50.0 | 2.0 | 1.00 |  |",
        "| Ray, two workers of one thread | 7.0 |",
    ):
        assert line in text.splitlines()
    assert text.count("| restarts | ") == 2 and "Other programs ran." in text
    assert "an image takes 30.0% less time with Ray" in text
    assert Image.open(tmp_path / "growth.png").width > 500

    cases.clear()
    growth.main(["--only", "images", "--images", "7", "--out", str(tmp_path / "part")])
    text = (tmp_path / "part.md").read_text()
    assert not cases and done[4:] == [(1, 7, "short", 0)] and "](part.png)" in text
    measured = [line.split(" | ")[0] for line in text.splitlines() if " 7 | " in line]
    assert measured == ["| images"] * 2 and "restarts |" not in text


def test_a_job_is_timed_behind_its_first_images(tmp_path, monkeypatch):
    growth = pytest.importorskip("growth")
    pytest.importorskip("pez_core.batch")
    monkeypatch.setitem(growth.SIZES, "short", {"batch_size": 2, "chunk": 2})
    clock = SimpleNamespace(monotonic=lambda ticks=count(): next(ticks))
    monkeypatch.setattr(sys.modules["pez_core.batch.run"], "time", clock)
    images = growth.noise(tmp_path / "images", 6)
    found = growth.job(images, tmp_path / "out", 6, "short", 0)
    # the clock is read once for each report, of two images
    assert found["ms"] == 500 and found["megabytes"] > 50


def test_a_step_through_a_pipeline_is_measured(tmp_path):
    import denoising

    out = tmp_path / "denoising.md"
    denoising.main(["--tiny", "--steps", "1", "--cases", "2,1", "--out", str(out)])
    lines = out.read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| the")] == [
        "| the CLIP alone",
        "| the pipeline alone",
    ]


def test_the_examples_are_searched(tmp_path, emoji_clip):
    examples.main(["--steps", "2", "--count", "3", "--out", str(tmp_path / "examples")])
    rows = json.loads((tmp_path / "examples.json").read_text())
    index = [json.loads(line) for line in (ROOT / "examples/index.jsonl").open()][:3]
    for row, one in zip(rows, index, strict=True):
        assert row["file"] == one["file"] and set(row["hits"]) <= set(one["words"])
        image = emoji_clip.encode_images([load_image(ROOT / "examples" / row["file"])])
        similarity = (emoji_clip.encode_texts([row["prompt"]]) @ image.T).item()
        assert row["similarity"] == pytest.approx(similarity, abs=1e-3)
    assert (tmp_path / "examples.md").read_text().count("\n| ") == 4


def test_readability_is_measured(tmp_path, images, monkeypatch):
    monkeypatch.setattr(readability, "VALUES", (0.0, 0.5))
    monkeypatch.setattr(readability, "SHOWN", (0.0, 0.5))
    monkeypatch.setattr(readability, "load_language_model", lambda *_, **__: make_lm())
    monkeypatch.setattr(readability, "JUDGE", "emoji-clip")
    common = ["--folder", str(images), "--prompt-len", "3", "--effort", "fast"]
    readability.main([*common, "--out", str(tmp_path / "readability")])
    text = (tmp_path / "readability.md").read_text()
    assert text.count("| 0.5 | ") == 1 and "| noto fish | " in text
    assert Image.open(tmp_path / "readability.png").width > 100


def test_the_ways_to_readable_prompts_are_measured(tmp_path, images, monkeypatch):
    monkeypatch.setattr(fluency, "JUDGE", "emoji-clip")
    monkeypatch.setattr(fluency, "STEPS", 4)
    monkeypatch.setattr(fluency, "SWAPS", 2)
    monkeypatch.setattr(fluency, "gemma", lambda: None)
    monkeypatch.setattr(fluency, "load_language_model", lambda *_, **__: make_lm())
    monkeypatch.setattr(fluency, "phrases", lambda: ["red fish", "a glass of wine", "food", "sun"])
    out = tmp_path / "fluency.md"
    arguments = ["--folder", str(images), "--prompt-len", "3", "--seconds", "0.1", "--seeds", "1"]
    fluency.main([*arguments, "--out", str(out)])
    rows = [line.split(" | ") for line in out.read_text().splitlines() if " ± " in line][1:]
    assert len({row[0] for row in rows}) == len(rows) == 15
    nats = {row[0].removeprefix("| "): float(row[3].split(" ± ")[0]) for row in rows}
    assert {f"Algorithm 1, fluency loss, projection {p}" for p in fluency.PROJECTIONS} < nats.keys()
    assert all(0 < value < 20 for value in nats.values())
    found = out.with_suffix(".jsonl")
    of_phrases = [row for row in map(json.loads, found.open()) if "phrases" in row["method"]]
    assert {word for row in of_phrases for word in row["prompt"].split()} <= {
        *("red", "fish", "food", "sun", "food,", "sun,")
    }
    # the same command searches nothing again
    before, text = found.read_text(), out.read_text()
    monkeypatch.setattr(fluency, "invert", None)
    fluency.main([*arguments, "--out", str(out)])
    assert (found.read_text(), out.read_text()) == (before, text)


def test_text_is_read_word_by_word_as_at_once(emoji_clip):
    words = emoji_clip.text.words
    allowed = torch.tensor(sorted(words.encode("a red fish , glass - dog cat house")))
    space = TokenSpace(emoji_clip.text.token_embedding, allowed)
    model = make_lm()
    prior = fluency_methods.WritingPrior(model, words, Caption(emoji_clip), space, 1.0)
    reader, rows = prior.reader(3), [[], [], []]
    table = model.table([words.decode([k]) for k in allowed.tolist()])
    steps = ["a fish red", "red - ,", "house glass a", "dog , -"]
    for step, parents in zip(steps, ([0, 1, 2], [2, 0, 0], [1, 2, 0], None), strict=True):
        tokens = words.encode(step)
        reader.read(torch.tensor(tokens), None if parents is None else torch.tensor(parents))
        rows = [[*rows[k], token] for k, token in zip(parents or range(3), tokens, strict=True)]
        texts = [as_written(words.decode(row)) for row in rows]
        expected = model.next_words(texts, table)
        some = reader.of(torch.tensor([2, 0])).next_tokens()
        assert torch.allclose(some, expected[[2, 0]], atol=1e-4)
        assert torch.allclose(reader.next_tokens(), expected, atol=1e-4)


def test_the_beam_search_over_phrases_finds_the_best(emoji_clip, images):
    image = load_image(images / "food/noto-fish.png")
    (feature,) = emoji_clip.encode_images([image])
    texts = ["red", "fish", "blue fish", "sun", "a house", "tropical"]
    bank = fluency_methods.usable(emoji_clip, texts, 4)
    assert len(bank) == len(texts)
    prompt = fluency_methods.PhraseBeams(emoji_clip, bank, 4).find(feature, 60.0)
    prompts = [*texts, *(f"{a}, {b}" for a in texts for b in texts if a != b)]
    fit = [one for one in prompts if len(emoji_clip.text.words.encode(one)) <= 4]
    best = (emoji_clip.encode_texts(fit) @ feature).argmax()
    assert prompt == fit[int(best)] and len(fit) < len(prompts)


def test_remedies_are_compared(tmp_path, images, monkeypatch):
    monkeypatch.setattr(remedies, "JUDGE", "emoji-clip")
    out = tmp_path / "remedies.md"
    remedies.main(["--folder", str(images), "--prompt-len", "3", "--out", str(out)])
    rows = [line for line in out.read_text().splitlines() if line.startswith("| ")][1:]
    names = [row.split(" | ")[0].removeprefix("| ") for row in rows]
    assert names[0] == "none" and len(names) == len(set(names)) == 8
    # with no weight of similarity or familiarity the prompts are others
    assert len({row.split(" | ", 1)[1] for row in rows}) > 3


def test_the_findings_of_the_paper_are_measured(tmp_path, images, calibrated, monkeypatch):
    monkeypatch.setattr(paper, "unseen", lambda *_: from_folder(images))
    for name, values in [("LENGTHS", (2,)), ("RATES", (0.1, 0.3)), ("RATIOS", (0.5,))]:
        monkeypatch.setattr(paper, name, values)
    monkeypatch.setattr(bench.Bench, "rows", lambda self: [])
    arguments = ["--images", "3", "--steps", "3", "--out", str(tmp_path / "paper")]
    paper.main(arguments)
    parts = json.loads((tmp_path / "paper.json").read_text())
    assert {part: set(rows) for part, rows in parts.items()} == {
        "lengths": {"PEZ as published", "PEZ", "ours (balanced)"},
        "rates": {"PEZ", "AutoPrompt SGD", "FluentPrompt", "soft prompt"},
        "ratios": {"the whole text", "PEZ as published", "ours (balanced)"},
    }
    assert "## Distillation (figure 6)" in (tmp_path / "paper.md").read_text()


def test_the_committed_report_of_batches_is_that_of_its_numbers():
    batch = pytest.importorskip("batch")
    found = json.loads((ROOT / "benchmarks/results/batch.json").read_text())
    lines = batch.report(found).splitlines()
    committed = (ROOT / "benchmarks/results/batch.md").read_text().splitlines()
    assert len(lines) == len(committed)
    differ = [a for a, b in zip(lines, committed, strict=True) if a != b]
    assert len(differ) <= 1 and all("--effort fast" in line for line in differ)


drawings = pytest.mark.skipif(
    not (ROOT / "build/emoji/pixels.npy").exists(), reason="the drawings are not rendered"
)


@drawings
def test_style_prompts_are_measured(tmp_path):
    out = tmp_path / "style.md"
    style.main(["--trials", "4", "--steps", "2", "--restarts", "1", "--out", str(out)])
    assert out.read_text().count("| separate | **") == 2 * len(style.TEMPLATES)


def test_the_icon_and_the_banner_are_drawn(tmp_path):
    draw_icon.main(tmp_path)
    assert Image.open(tmp_path / "icon.png").size == (400, 400)
    assert Image.open(tmp_path / "banner.png").size == (1260, 540)


def test_the_results_are_drawn(tmp_path):
    draw_results.main(tmp_path / "results.png")
    rows = json.loads((ROOT / "benchmarks/results/examples.json").read_text())
    shown = draw_results.first_of_each_style(rows)
    assert len(shown) == 3 * draw_results.PER_STYLE
    image = Image.open(tmp_path / "results.png").convert("L")
    # the last row of pictures is there, too
    assert image.crop((0, image.height - 100, image.width, image.height)).getextrema()[0] < 100


def test_a_named_source_tree_of_comfyui_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"main\.py"):
        get_comfyui.comfyui_path()
    (tmp_path / "main.py").touch()
    assert get_comfyui.comfyui_path() == tmp_path


@drawings
def test_examples_are_drawn_again(tmp_path):
    import make_examples

    pytest.importorskip("resvg_py")
    make_examples.main(ROOT / "build/emoji", tmp_path)
    index = (ROOT / "examples/index.jsonl").read_text()
    assert (tmp_path / "index.jsonl").read_text() == index
    assert len(list(tmp_path.glob("*.png"))) == len(index.splitlines())


def test_the_picture_of_the_readme_is_the_sheet_of_its_command():
    pytest.importorskip("diffusers")
    import draw_sheet as tool

    from pez_core.diffusion.sheet import draw_sheet

    found = tool.arguments((ROOT / "README.md").read_text())
    assert found[0] == "invert" and found[-2:] == ["--images", "4"]
    images = [path for path in found if path.endswith(".png")]
    assert images == [str(path) for path in sorted((ROOT / "examples").glob("noto-*.png"))]
    rows = [
        ([Image.new("RGB", (64, 64), colour)], [Image.new("RGB", (64, 64), "white")] * 4, text)
        for colour, text in [
            ("red", "Ggjpq\nyyy"),
            ("white", "long words " * 30),
            ("blue", "a"),
            ("green", "b"),
        ]
    ]
    for shown, left in ((3, 2), (4, 2)):
        wide = tool.in_two_columns(draw_sheet(rows[:shown]))
        start = 0
        for column in (draw_sheet(rows[:left]), draw_sheet(rows[left:shown])):
            box = (start, 0, start + column.width, column.height)
            assert wide.crop(box).tobytes() == column.tobytes()
            start += column.width
        assert start == wide.width


FAULTY = '''"""A module."""
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os


def larger(a: int, b: int = 0) -> int:
    """The larger one."""
    if a > b and not b == 7:
        return a
    return b
'''
FAULTY_TEST = """
from small import larger

def test_larger():
    assert larger(2, 1) == 2 and larger(1, 2) == 2 and larger(1, 1) == 1
"""


def test_faults_are_those_of_code_that_runs():
    found = mutate.mutants("small.py", FAULTY)
    changes = {(one.kind, one.before, one.after) for one in found}
    assert {("comparison", "b == 7", "b != 7"), ("constant", "7", "8")} < changes
    assert Counter(one.kind for one in found) == {
        "constant": 2, "condition": 1, "removed": 2, "and, or": 1, "comparison": 2, "unary": 1,
    }  # fmt: skip
    contents = [ast.unparse(mutate.with_fault(FAULTY, one.number)) for one in found]
    plain = ast.unparse(ast.parse(FAULTY))
    assert len({*contents, plain}) == len(found) + 1
    for content in contents:
        differ = [
            a for a, b in zip(content.splitlines(), plain.splitlines(), strict=True) if a != b
        ]
        assert len(differ) == 1


def test_mutants_are_killed_or_survive_and_runs_resume(tmp_path, monkeypatch, capsys):
    (tmp_path / "small.py").write_text(FAULTY)
    (tmp_path / "test_small.py").write_text(FAULTY_TEST)
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    out = tmp_path / "build/mutants.jsonl"
    arguments = ["small.py", "--tests", "test_small.py", "--out", str(out)]
    mutate.main([*arguments, "--sample", "2"])
    first = out.read_text()
    mutate.main(arguments)
    assert out.read_text().startswith(first)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    killed = [row["number"] for row in rows if row["killed"]]
    assert len(set(killed)) == len(killed) and len({row["number"] for row in rows}) == 9
    survivors = {row["before"] for row in rows if not row["killed"]}
    # no test is about 7, nor about the default, and equal numbers may give either
    assert survivors == {"0", "7", "a > b"}
    shown = capsys.readouterr().out
    assert "| all | 9 | 67% (6/9) |" in shown and "- small.py:10 (comparison): `a > b`" in shown
    mutate.main([*arguments, "--report"])
    assert out.read_text().count("\n") == len(rows)
    assert (tmp_path / "small.py").read_text() == FAULTY


def test_a_mutant_that_loops_for_ever_is_killed(tmp_path, monkeypatch):
    (tmp_path / "small.py").write_text("def wait(n):\n    while n:\n        n = 0\n")
    test = "from small import wait\n\ndef test_wait():\n    wait(1)\n"
    (tmp_path / "test_small.py").write_text(test)
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    monkeypatch.setattr(mutate, "LEAST_LIMIT", 1)
    out = tmp_path / "mutants.jsonl"
    mutate.main(["small.py", "--tests", "test_small.py", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["before"]: row["killed"] for row in rows}["n = 0"] == "time limit"


def test_a_first_prompt_is_reported_part_by_part(tmp_path, monkeypatch):
    times = {"imports": 1.0, "load": 2.0, "encode_image": 0.5, "first": 4.0, "second": 3.0}
    work = {"fast": 2.0, "balanced": 5.0, "paper": 40.0}
    cases = []

    def run(command, **options):
        cases.append(command[-4:])
        found = times | {"words": 9, "tflop": work[command[-3]]}
        return SimpleNamespace(stdout=json.dumps(found))

    def weights(model, folder):
        path = folder / model
        path.touch()
        return path

    monkeypatch.setattr(first_prompt, "weights", weights)
    monkeypatch.setattr(first_prompt, "subprocess", SimpleNamespace(run=run))
    first_prompt.main(["--models", "A", "B", "--out", str(tmp_path / "first")])
    dtypes = first_prompt.DTYPES
    assert cases == [
        [model, effort, one, "free"] for model in "AB" for effort in work for one in dtypes
    ]
    row = "| A | fast | default | 7.5 | 1.00 | 2.00 | 0.50 | 4.00 | 3.00 | 2.00 | 20.0x |"
    assert row in (tmp_path / "first.md").read_text().splitlines()
    arguments = ["--models", "A", "--efforts", "fast", "--dtypes", "default", "--wordings"]
    first_prompt.main([*arguments, "free", "tags", "--out", str(tmp_path / "wordings")])
    assert [case[3] for case in cases[-2:]] == ["free", "tags"]
    row = "| A | fast, tags | default | 7.5 | 1.00 | 2.00 | 0.50 | 4.00 | 3.00 | 2.00 | - |"
    assert row in (tmp_path / "wordings.md").read_text().splitlines()


def test_the_first_step_of_the_node_is_reported(tmp_path, monkeypatch):
    commands, seconds = [], {"first run": 2.5, "another seed": 0.25, "another image": 0.375}

    def run(command, **options):
        commands.append(command[-2:])
        assert options["cwd"] == tmp_path and options["env"]["PYTHONPATH"] == str(tmp_path)
        return SimpleNamespace(stdout="a line of ComfyUI\n" + json.dumps(seconds))

    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    (tmp_path / "main.py").touch()
    monkeypatch.setattr(first_prompt, "weights", lambda model, folder: f"{model}.safetensors")
    monkeypatch.setattr(first_prompt, "subprocess", SimpleNamespace(run=run, PIPE=None))
    first_prompt.main(["--node", "--models", "emoji-clip", "B", "--out", str(tmp_path / "first")])
    assert commands == [["--node-case", "emoji-clip"], ["--node-case", "B:B.safetensors"]]
    rows = (tmp_path / "first-node.md").read_text().splitlines()
    assert "| B | 2.50 | 0.25 | 0.38 |" in rows


avx512 = pytest.mark.skipif(not tries.HAS_AVX512, reason="needs a processor with AVX-512")


@avx512
def test_what_was_tried_is_compared(tmp_path, monkeypatch, emoji_clip):
    for name, value in {"FEW": 8, "MANY": 24, "BEST": 4, "LOOKED_AT": 12, "PROMPT_LEN": 4}.items():
        monkeypatch.setattr(tries, name, value)
    monkeypatch.setattr(tries, "PLACE", 2)
    monkeypatch.setattr(tries, "random_clip", lambda name: emoji_clip)
    monkeypatch.setattr(tries, "load_clip", lambda *_, **__: emoji_clip)
    state = {"seconds": 60.0, "eager": 30.0, "compiled": 20.0}
    failed = {"seconds": 5.0, "error": "InvalidCxxCompiler"}

    def run(command, env, **options):
        broken = env.get("CXX") == tries.NO_COMPILER["CXX"]
        return SimpleNamespace(stdout=json.dumps(failed if broken else state))

    monkeypatch.setattr(tries, "subprocess", SimpleNamespace(run=run, PIPE=None))
    tries.main(["--rounds", "1", "--out", str(tmp_path / "tries")])
    text = (tmp_path / "tries.md").read_text()
    for name in tries.ways(emoji_clip):
        (row,) = [
            line for line in text.splitlines() if line.startswith(f"| {name} | ") and "%" in line
        ]
        assert row.count("100%") == 2 or "int8" in row or "all in" in row
    assert text.count("| full cache, new process | 1.50x | 60.0 | 30.0 | 20.0 |") == 3
    assert text.count("InvalidCxxCompiler; 5.0 where errors are suppressed") == 3
    assert "| int8 in the screening alone | " in text


@avx512
def test_the_ways_that_were_tried_multiply(emoji_clip):
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    linear = torch.nn.Linear(64, 32).requires_grad_(False)
    matrix, exact = (linear.weight, linear.bias), linear(x)
    for multiply in (tries.int8_of_torch(), tries.int8_by_rows(), tries.packed()):
        rows = x.clone().requires_grad_(multiply.__qualname__.startswith("packed"))
        found = multiply(rows, matrix).float()
        assert 0 < (found - exact).abs().max() < 0.05
        if rows.requires_grad:
            found.sum().backward()
            torch.testing.assert_close(rows.grad[0, 0], linear.weight.sum(0), atol=0.05, rtol=0.05)
