"""The nodes in a real ComfyUI, through what it offers to everyone: HTTP and a websocket."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from .server import ROOT, Client, ComfyServer, Rejected, Run

BUNDLED = "bundled emoji CLIP (no download)"


def load(model: str = BUNDLED) -> dict:
    return {"class_type": "PEZ_LoadCLIP", "inputs": {"model": model, "download": False}}


def image(file: str) -> dict:
    return {"class_type": "LoadImage", "inputs": {"image": file}}


def pez(node: str, **inputs) -> dict:
    search = {"prompt_len": 4, "effort": "paper", "steps": 20, "restarts": 2, "seed": 0}
    search["readability"] = 0  # as the page writes 0.0
    if node in ("PEZ_ScorePrompt", "PEZ_Vocabulary"):
        search = {}
    return {"class_type": node, "inputs": search | {"clip": ["clip", 0]} | inputs}


def shown(source: str, slot: int = 0) -> dict:
    return {"class_type": "PreviewAny", "inputs": {"source": [source, slot]}}


SOURCES = {
    "clip": load(),
    "fish": image("noto-fish.png"),
    "parrot": image("noto-parrot.png"),
    "both": {
        "class_type": "ImageBatch",
        "inputs": {"image1": ["fish", 0], "image2": ["parrot", 0]},
    },
}


def one_image(**inputs) -> dict:
    return {
        "clip": load(),
        "fish": image("noto-fish.png"),
        "pez": pez("PEZ_ImageToPrompt", images=["fish", 0], **inputs),
        "prompt": shown("pez"),
    }


def texts(run: Run, node: str) -> list[str]:
    assert run.status == "success", run.error
    return list(run.outputs[node]["text"])


def result(run: Run, node: str = "pez") -> dict:
    assert run.status == "success", run.error
    (event,) = run.outputs[node]["pez"]
    return event


def test_every_node_runs_on_real_images(client: Client):
    prompt = SOURCES | {
        "words": {
            "class_type": "PEZ_Vocabulary",
            "inputs": {"only": "", "block": "fish", "block_unsafe": True, "ascii_only": True},
        },
        "invert": pez("PEZ_ImageToPrompt", images=["both", 0], vocabulary=["words", 0]),
        "style": pez("PEZ_ExtractStyle", images=["both", 0], subject="a cat\na castle"),
        "distill": pez("PEZ_DistillPrompt", text="a red fish in deep blue water", ratio=0.5),
        "concat": pez("PEZ_ConcatPrompts", prompt_1="a red car", images_1=["fish", 0]),
        "score": pez("PEZ_ScorePrompt", images=["fish", 0], text=["invert", 2]),
        "styled": shown("style"),
        "saved": shown("distill", 2),
        "best": shown("score"),
        "pruned": shown("score", 3),
    }
    prompt["distill"]["inputs"]["prompt_len"] = 0
    run = client.run(prompt)
    first, second = texts(run, "invert")
    assert first != second
    (style,) = texts(run, "style")
    assert texts(run, "styled") == [f"a cat, {style}", f"a castle, {style}"]
    (short,) = texts(run, "distill")
    assert 1 <= len(short.split()) <= 4
    assert len(texts(run, "concat")) == 1
    items = result(run, "score")["items"]
    assert len(items) == 4 and all(len(item["words"]) == 4 for item in items)
    assert all(re.fullmatch(r"[\x00-\x7f]+", item["prompt"]) for item in items)
    for node in ("invert", "style", "distill", "concat"):
        for found in result(run, node)["items"]:
            assert -1 <= found["similarity"] <= 1
            assert found["candidates"][0][0] == found["prompt"]
            assert [word for word, _ in found["words"]] == found["prompt"].split()


def test_a_second_run_is_a_cache_hit(client: Client):
    prompt = one_image(seed=101)
    first, second = client.run(prompt), client.run(prompt)
    assert "pez" in first.executed and second.executed == []
    assert texts(second, "prompt") == texts(first, "prompt") == texts(first, "pez")


@pytest.mark.parametrize("effort", ["fast", "paper"])
def test_what_was_learned_is_printed_by_the_core(client: Client, effort: str):
    """The node finds what the library finds with the same words; `steps` count in one effort.

    The words are those of the dictionary, or all tokens with the effort paper.
    """
    options = {"steps": 20} if effort == "paper" else {}
    expected = by_the_core(restarts=2, seed=7, effort=effort, **options)
    (item,) = result(client.run(one_image(seed=7, effort=effort, steps=20)))["items"]
    assert item["prompt"] == expected.prompt
    assert item["similarity"] == pytest.approx(expected.similarity, abs=1e-4)
    assert [prompt for prompt, _ in item["candidates"]] == [c.prompt for c in expected.candidates]


def by_the_core(effort: str, **options):
    from pez_core import SearchOptions, Vocabulary, invert, load_clip
    from pez_core.prompt_text import SYNTAX

    words = Vocabulary(block=SYNTAX, whole_words=effort != "paper")
    options = SearchOptions(prompt_len=4, vocabulary=words, effort=effort, **options)
    clip, image = load_clip("emoji-clip", device="cpu"), ROOT / "examples/noto-fish.png"
    (found,) = invert(clip, image, options)
    return found


def test_a_language_model_takes_part_in_the_choice(client: Client):
    settings = {"effort": "fast", "restarts": 1, "seed": 0}
    expected = by_the_core(readability=1.0, **settings)
    with_it = texts(client.run(one_image(readability=1.0, **settings)), "pez")
    without = texts(client.run(one_image(readability=0.0, **settings)), "pez")
    assert with_it == [expected.prompt] and with_it != without


LEARNERS = {
    "PEZ_ImageToPrompt": {"images": ["fish", 0]},
    "PEZ_ExtractStyle": {"images": ["both", 0], "subject": ""},
    "PEZ_DistillPrompt": {"text": "a red fish in deep blue water with bubbles", "ratio": 0.5},
    "PEZ_ConcatPrompts": {"images_1": ["fish", 0], "prompt_1": "a red car"},
}


@pytest.mark.parametrize("kind", LEARNERS)
def test_every_learner_has_efforts(client: Client, kind: str):
    from pez_core.options import EFFORTS

    def steps(**inputs) -> tuple[list[tuple[int, int]], Run]:
        node = pez(kind, **LEARNERS[kind], **inputs, restarts=1)
        run = client.run(SOURCES | {"pez": node})
        events = [data for name, data in run.events if name == "pez.live" and data.get("steps")]
        return [(data["step"], data["steps"]) for data in events][-1:], run

    last, run = steps(effort="fast", steps=7)
    assert run.status == "success", run.error
    total = EFFORTS["fast"].total
    assert last == [(total, total)]
    last, _ = steps(effort="paper", steps=7)
    assert last == [(7, 7)]
    _, run = steps(effort="paper", readability=0.5)
    assert "choose another `effort`" in run.error["exception_message"]


@pytest.mark.parametrize("wording", ["tags", "sentence"])
def test_a_wording_is_that_of_the_core(client: Client, wording: str):
    expected = by_the_core(effort="fast", wording=wording, restarts=1)
    learned = texts(client.run(one_image(effort="fast", wording=wording, restarts=1)), "pez")
    assert learned == [expected.prompt]
    # files from before there were wordings mean free words
    free = texts(client.run(one_image(effort="fast", restarts=1)), "pez")
    assert learned != free == [by_the_core(effort="fast", restarts=1).prompt]


def test_the_published_algorithm_has_free_words(client: Client):
    plain, tags = (
        texts(client.run(one_image(effort="paper", steps=4, wording=wording)), "pez")
        for wording in ("free", "tags")
    )
    assert plain == tags


def test_a_kept_prompt_needs_neither_clip_nor_image(client: Client):
    learned = result(client.run(one_image(seed=1)))
    prompt = one_image(seed=1, keep=True, kept=learned["kept"])
    prompt["clip"] = load("pez/not-on-this-disk.safetensors")
    run = client.run(prompt)
    assert result(run)["items"] == learned["items"] and result(run)["state"] == "kept"
    assert not {"clip", "fish"} & {*run.executed}
    assert result(run)["changed"] == ["clip"]

    # nor does it take the file of the image, which ComfyUI itself would ask for
    prompt["fish"] = image("not-on-this-disk.png")
    run = client.run(prompt)
    assert result(run)["items"] == learned["items"]
    assert result(run)["changed"] == ["clip", "images"]
    del prompt["pez"]["inputs"]["images"]
    assert texts(client.run(prompt), "prompt") == [learned["items"][0]["prompt"]]

    after_download = one_image(seed=1, keep=True, kept=learned["kept"])
    after_download["clip"]["inputs"]["download"] = True
    assert result(client.run(after_download))["changed"] == []
    same = client.run(one_image(seed=1, keep=True, kept=learned["kept"]))
    assert result(same)["changed"] == []
    # the page sets another seed after each run where it is set to randomize
    reseeded = client.run(one_image(seed=2, keep=True, kept=learned["kept"]))
    assert result(reseeded)["changed"] == [] and reseeded.executed == []
    other = one_image(seed=1, steps=30, keep=True, kept=learned["kept"])
    other["fish"] = image("noto-parrot.png")
    assert result(client.run(other))["changed"] == ["images", "steps"]


ITEM = '{"version":1,"items":[{"prompt":"a","similarity":%s}],"inputs":{}}'


@pytest.mark.parametrize("kept", ["", "{", "[]", ITEM % "[]", ITEM % "NaN", ITEM % ("9" * 400)])
def test_without_a_usable_kept_prompt_one_is_learned(client: Client, kept: str):
    run = client.run(one_image(seed=2, keep=True, kept=kept))
    assert result(run)["state"] == "done" and "clip" in {*run.executed, *run.cached}


def test_a_style_gets_new_subjects_without_a_search(client: Client):
    def prompt(**inputs) -> dict:
        style = pez("PEZ_ExtractStyle", images=["both", 0], **inputs)
        return SOURCES | {"pez": style, "prompts": shown("pez")}

    first = client.run(prompt(subject="a cat"))
    (style,) = texts(first, "pez")
    assert texts(first, "prompts") == [f"a cat, {style}"]
    kept = {"keep": True, "kept": result(first)["kept"], "style_template": "{style}: {subject}"}
    second = client.run(prompt(subject="a dog\na car", **kept))
    assert texts(second, "prompts") == [f"{style}: a dog", f"{style}: a car"]
    assert result(second)["changed"] == []


def test_cancel_ends_the_search(client: Client):
    prompt_id = client.queue(one_image(steps=20000, seed=3))
    client.until(prompt_id, lambda kind, data: data.get("state") == "running")
    client.interrupt()
    run = client.wait(prompt_id)
    assert run.status == "interrupted"
    ended = [data for kind, data in run.events if kind == "pez.live"][-1]
    assert ended["state"] == "cancelled" and ended["items"][0]["prompt"]
    assert ended["step"] < 20000
    assert client.get("/pez/live").json() == []


def test_finish_now_passes_on_the_best_so_far(client: Client):
    prompt_id = client.queue(one_image(steps=20000, seed=4))
    client.until(prompt_id, lambda kind, data: data.get("state") == "running")
    (running,) = client.get("/pez/live").json()
    assert running["node"] == "pez" and running["prompt_id"] == prompt_id
    other = {"node": "pez", "prompt_id": "another run"}
    assert client.post("/pez/finish", other).json() == {"finishing": False}
    assert client.post("/pez/finish", {"node": "pez"}).json() == {"finishing": True}
    run = client.wait(prompt_id)
    assert result(run)["state"] == "finished"
    assert texts(run, "prompt") == texts(run, "pez")
    last = [data for kind, data in run.events if kind == "pez.live"][-1]
    assert last["step"] < 20000
    assert client.post("/pez/finish", {"node": "pez"}).json() == {"finishing": False}


def test_a_screen_with_the_live_view_gets_no_plain_text(server: ComfyServer):
    with Client(server.url) as plain, Client(server.url) as live:
        live.post("/pez/live", {"client_id": live.id})
        without, with_view = plain.run(one_image(seed=5)), live.run(one_image(seed=6))
    assert without.texts and not with_view.texts
    for run in (without, with_view):
        events = [data for kind, data in run.events if kind == "pez.live"]
        assert events[-1]["step"] == events[-1]["steps"] == 20
        assert any(kind == "progress_state" for kind, _ in run.events)


def test_images_of_any_size_are_searched_side_by_side(server: ComfyServer, client: Client):
    folder = server.folder / "input/sizes"
    folder.mkdir(exist_ok=True)
    for k, name in enumerate(("noto-fish", "noto-parrot", "fxemoji-dog")):
        with Image.open(ROOT / f"examples/{name}.png") as drawing:
            drawing.convert("RGB").resize((64 + 16 * k, 80)).save(folder / f"{k}.png")
    loaded = {"class_type": "LoadImageDataSetFromFolder", "inputs": {"folder": "sizes"}}
    node = pez("PEZ_ImageToPrompt", images=["folder", 0])
    run = client.run({"clip": load(), "folder": loaded, "pez": node, "prompt": shown("pez")})
    assert len(texts(run, "prompt")) == 3 == len(set(texts(run, "prompt")))
    assert run.executed.count("pez") == 1

    node["inputs"]["shared"] = True
    run = client.run({"clip": load(), "folder": loaded, "pez": node, "prompt": shown("pez", 2)})
    assert len(texts(run, "pez")) == 1 and len(result(run)["items"][0]["similarities"]) == 3
    assert len(texts(run, "prompt")) == 2  # the candidates of two restarts


def test_each_prompt_of_a_list_is_conditioned_by_itself(client: Client, sd15: str):
    """A list of prompts fans out into one conditioning each."""
    prompt = SOURCES | {
        "pez": pez("PEZ_ImageToPrompt", images=["both", 0]),
        "model": {"class_type": "DiffusersLoader", "inputs": {"model_path": sd15}},
        "text": {
            "class_type": "CLIPTextEncode",
            "inputs": {"clip": ["model", 1], "text": ["pez", 0]},
        },
        "seen": shown("text"),
    }
    run = client.run(prompt)
    assert run.status == "success" and len(run.outputs["seen"]["text"]) == 2


def test_a_caption_stays_and_is_sharpened(client: Client):
    run = client.run(one_image(caption="a drawing of a fish", seed=8))
    (prompt,) = texts(run, "pez")
    assert prompt.startswith("a drawing of a fish ") and len(prompt.split()) > 5
    (prompt,) = texts(client.run(one_image(caption="a {} fish", seed=8)), "pez")
    assert prompt.startswith("a ") and prompt.endswith(" fish")
    long = "a fish and " * 30  # 90 tokens, more than one context holds
    run = client.run(one_image(caption=long, seed=8, steps=5, restarts=1))
    (prompt,) = texts(run, "pez")
    assert prompt.startswith(long) and len(prompt) > len(long)


def test_each_image_may_have_a_caption_of_its_own(server: ComfyServer, client: Client):
    captions = {
        "class_type": "PEZ_ScorePrompt",  # gives a list of texts: each prompt without idle words
        "inputs": {"clip": ["clip", 0], "images": ["fish", 0], "text": ["words", 0]},
    }
    words = pez("PEZ_ImageToPrompt", images=["both", 0], prompt_len=1)
    learned = pez("PEZ_ImageToPrompt", images=["both", 0], caption=["captions", 3])
    run = client.run(SOURCES | {"words": words, "captions": captions, "pez": learned})
    first, second = texts(run, "words")
    assert [prompt.split()[0] for prompt in texts(run, "pez")] == [first, second]
    assert len(result(run)["items"]) == 2


def test_what_the_page_asks_may_be_nonsense(client: Client):
    chain = {str(k): {"class_type": "X", "inputs": {"x": [str(k + 1), 0]}} for k in range(3000)}
    chain["pez"] = {"class_type": "PEZ_ImageToPrompt", "inputs": {"images": ["0", 0]}}
    chain["pez"]["inputs"]["kept"] = ITEM % "0.5"
    assert client.post("/pez/changed", {"prompt": chain}).json() == {"pez": ["images"]}
    for body in ([], {"prompt": 1}):
        assert client.post("/pez/changed", body).status_code == 400
    assert client.post("/pez/finish", []).status_code == 400
    nonsense = {"a": 1, "b": {"class_type": "PEZ_X", "inputs": 3}, "c": {"class_type": 2}}
    assert client.post("/pez/changed", {"prompt": nonsense}).json() == {}
    assert client.post("/pez/changed", {"prompt": one_image()}).json() == {}


@pytest.mark.parametrize("route", ["live", "finish", "agree", "changed"])
def test_a_body_that_is_too_deep_is_a_bad_request(client: Client, route: str):
    deep = "[" * 100_000 + "]" * 100_000
    assert client.post_text(f"/pez/{route}", deep).status_code == 400


def test_lists_of_words_have_a_limit(client: Client):
    many = ",".join(f"w{k}*" for k in range(20_000))
    run = client.run(one_image(block=many) | {"out": shown("pez")})
    assert "`block` holds 20,000 phrases, more than 10,000" in run.error["exception_message"]


def test_cancel_ends_the_score_of_a_long_text(client: Client):
    text = " ".join(f"word{k}" for k in range(2000))
    score = pez("PEZ_ScorePrompt", images=["fish", 0], text=text)
    queued = client.queue(SOURCES | {"pez": score})
    client.until(queued, lambda kind, data: kind == "executing" and data["node"] == "pez")
    client.interrupt()
    assert client.wait(queued).status == "interrupted"


@pytest.mark.parametrize("model", [5, {}, True])
def test_a_model_that_is_no_name_is_refused(client: Client, model):
    message = client.run(one_image() | {"clip": load(model)}).error["exception_message"]
    assert "`model` is" in message and "not on this disk" in message


def test_a_workflow_cannot_start_a_download_by_itself(client: Client):
    shared = one_image() | {"clip": load("SD 1.5 (ViT-L/14)")}
    shared["clip"]["inputs"]["download"] = True
    message = client.run(shared).error["exception_message"]
    assert "switch `download` off and on again by hand" in message and "1.71 GB" in message
    # what pages of other sites can post, and what no person can have meant
    agreed = '{"model": "SD 1.5 (ViT-L/14)"}'
    assert client.post_text("/pez/agree", agreed, "text/plain").status_code == 415
    for model in (None, ["SD 1.5 (ViT-L/14)"], "../x", BUNDLED):
        assert client.post("/pez/agree", {"model": model}).status_code == 400
    assert "by hand" in client.run(shared).error["exception_message"]


def test_blocked_words_and_syntax_stay_out(client: Client):
    (before,) = texts(client.run(one_image(seed=9, steps=60)), "pez")
    block = ",".join(before.split()[:2])
    (after,) = texts(client.run(one_image(seed=9, steps=60, block=block)), "pez")
    assert not {*block.split(",")} & {*after.split()}
    only = {"class_type": "PEZ_Vocabulary", "inputs": {"only": "( ) [ ] red, blue"}}
    only["inputs"] |= {"block": "", "block_unsafe": False, "ascii_only": False}
    prompt = one_image(seed=9, vocabulary=["words", 0]) | {"words": only}
    assert {*texts(client.run(prompt), "pez")[0].split()} <= {"red", "blue"}


def test_bad_widgets_are_refused_before_anything_runs(client: Client):
    with pytest.raises(Rejected) as caught:
        client.run(one_image(steps=0))
    (error,) = caught.value.node_errors["pez"]["errors"]
    assert error["extra_info"]["input_name"] == "steps"


FAILS = {
    "no image": (
        {"clip": load(), "pez": pez("PEZ_ImageToPrompt")},
        ["`images` is not connected"],
    ),
    "model not here": (
        one_image() | {"clip": load("SD 2.x (ViT-H/14)")},
        ["not on this disk", "3.94 GB", "models/pez", "ViT-H-14.laion2b_s32b_b79k.safetensors",
         "download"],
    ),
    "both of SDXL": (one_image() | {"clip": load("SDXL (L + bigG)")}, ["11.87 GB"]),
    "file that is gone": (one_image() | {"clip": load("pez/gone.safetensors")}, ["models/pez"]),
    "way out of the folder": (
        one_image() | {"clip": load("pez/../../../../etc/passwd")}, ["not on this disk"],
    ),
    "another folder": (one_image() | {"clip": load("checkpoints/x")}, ["not on this disk"]),
    "nothing to choose from": (
        one_image(readability=0.5),
        ["`readability` is 0.5", "`effort` paper", "choose another `effort`"],
    ),
    "two places": (one_image(caption="{} and {}"), ["caption", "once"]),
    "one image": (
        SOURCES | {"pez": pez("PEZ_ExtractStyle", images=["fish", 0], subject="")},
        ["at least two images", "PEZ Image to Prompt"],
    ),
    "nothing to shorten": (
        {"clip": load(), "pez": pez("PEZ_DistillPrompt", text=" ", ratio=0.5)}, ["`text` is empty"],
    ),
    "one source": ({"clip": load(), "pez": pez("PEZ_ConcatPrompts", prompt_1="a")}, ["two"]),
    "weights": (
        {"clip": load(),
         "pez": pez("PEZ_ConcatPrompts", prompt_1="a", prompt_2="b", weights="1,x")},
        ["`weights`", "'1,x'"],
    ),
    "unknown words": (
        one_image(vocabulary=["words", 0])
        | {"words": {"class_type": "PEZ_Vocabulary", "inputs": {
            "only": "qqxyzzy", "block": "", "block_unsafe": True, "ascii_only": False}}},
        ["`only` holds 1 phrases", "use none"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILS)
def test_errors_say_what_to_do(client: Client, case: str):
    prompt, parts = FAILS[case]
    run = client.run(prompt | {"out": shown("pez")})
    assert run.status == "error"
    message = run.error["exception_message"]
    assert all(part in message for part in parts), message
    assert run.error["exception_type"] in ("ValueError", "TypeError")


def test_errors_go_to_the_live_view_as_well(client: Client):
    for prompt, part in (
        (one_image(caption="{} and {}"), "`caption` has to hold {} once at most"),
        ({"clip": load(), "pez": pez("PEZ_ImageToPrompt")}, "`images` is not connected"),
        (
            {"clip": load(), "fish": image("noto-fish.png"),
             "pez": pez("PEZ_ScorePrompt", images=["fish", 0], text=" ")},
            "`text` is empty",
        ),
    ):  # fmt: skip
        run = client.run(prompt | {"out": shown("pez")})
        (*_, event) = [data for name, data in run.events if name == "pez.live"]
        assert event["node"] == "pez" and event["state"] == "failed"
        assert part in event["message"] and part in run.error["exception_message"]


def test_any_order_of_nodes_leaves_weights_fit_for_gradients(client: Client):
    """ComfyUI runs everything in inference mode, whose tensors gradients cannot pass."""
    scaled = {
        "class_type": "ImageScale",
        "inputs": {"image": ["fish", 0], "upscale_method": "bicubic", "width": 90, "height": 70,
                   "crop": "disabled"},
    }  # fmt: skip
    for k in range(3):
        score = pez("PEZ_ScorePrompt", images=["scaled", 0], text=f"a fish {k}")
        invert = pez("PEZ_ImageToPrompt", images=["scaled", 0], seed=200 + k)
        distill = pez("PEZ_DistillPrompt", text=["pez", 0], ratio=0.5, seed=k)
        distill["inputs"]["prompt_len"] = 2
        prompt = SOURCES | {"scaled": scaled, "score": score, "pez": invert, "last": distill}
        order = list(prompt) if k % 2 else list(prompt)[::-1]
        run = client.run({name: prompt[name] for name in order})
        assert run.status == "success", run.error
        client.post("/free", {"unload_models": True, "free_memory": k == 1})


def test_thirty_runs_do_not_grow_memory(server: ComfyServer, client: Client):
    sizes = []
    for k in range(30):
        assert client.run(one_image(seed=300 + k)).status == "success"
        sizes.append(server.rss())
    # the first ten fill caches of the allocator and of ComfyUI
    assert sizes[-1] - sizes[9] < 30e6, [size >> 20 for size in sizes]


def test_a_whole_image_carries_the_prompt_that_made_it(
    server: ComfyServer, client: Client, sd15: str
):
    """Image -> prompt -> conditioning -> sampler -> PNG, whose workflow holds the prompt."""
    sample = {"seed": 0, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal"}
    latent = {"width": 64, "height": 64, "batch_size": 1}
    prompt = {
        "1": load(),
        "2": image("noto-fish.png"),
        "12:3": pez("PEZ_ImageToPrompt", clip=["1", 0], images=["2", 0], seed=11),
        "4": {"class_type": "DiffusersLoader", "inputs": {"model_path": sd15}},
        "5": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 1], "text": ["12:3", 0]}},
        "6": {"class_type": "EmptyLatentImage", "inputs": latent},
        "7": {
            "class_type": "KSampler",
            "inputs": sample | {"model": ["4", 0], "positive": ["5", 0], "negative": ["5", 0],
                                "latent_image": ["6", 0], "denoise": 1.0},
        },
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["7", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "pez"}},
    }  # fmt: skip
    values = [4, "paper", 2, 11, "fixed", 0.0, False, "", "", 0.5, False, "", "", 0.0, 20, 0.1, 0.1]
    values += [0, False, "", False, "crop", "free", "of another pack, whose widget every node has"]
    inside = {"id": 3, "type": "PEZ_ImageToPrompt", "widgets_values": list(values)}
    workflow = {
        "id": "a-workflow",
        "nodes": [{"id": 12, "type": "some-subgraph"}],
        "definitions": {"subgraphs": [{"id": "some-subgraph", "nodes": [inside]}]},
    }
    run = client.run(prompt, {"extra_pnginfo": {"workflow": workflow}}, timeout=200)
    (learned,) = texts(run, "12:3")
    (saved,) = run.outputs["9"]["images"]
    with Image.open(server.folder / "output" / saved["filename"]) as picture:
        assert picture.size == (64, 64)
        stored = json.loads(picture.info["workflow"])
    (node,) = stored["definitions"]["subgraphs"][0]["nodes"]
    at = len(values) - 5  # behind it are newer widgets and what another pack adds
    kept = json.loads(node["widgets_values"][at])
    assert [item["prompt"] for item in kept["items"]] == [learned]
    assert node["widgets_values"][:at] == values[:at]
    assert node["widgets_values"][at + 1 :] == values[at + 1 :]


def saving(seed: int, **inputs) -> dict:
    """A search whose candidates name the files that are saved behind it.

    They are whole words of a dictionary: a token such as `/` would name a folder.
    """
    words = {"only": "", "block": "", "block_unsafe": True, "ascii_only": True}
    save = {"images": ["fish", 0], "filename_prefix": ["pez", 2]}
    return one_image(seed=seed, vocabulary=["words", 0], **inputs) | {
        "words": {"class_type": "PEZ_Vocabulary", "inputs": words},
        "save": {"class_type": "SaveImage", "inputs": save},
    }


def test_an_image_without_a_workflow_carries_its_prompt_too(server: ComfyServer, client: Client):
    """As for clients that have no page."""
    run = client.run(saving(71))
    event = result(run)
    name = run.outputs["save"]["images"][0]["filename"]
    with Image.open(server.folder / "output" / name) as picture:
        carried = json.loads(picture.info["prompt"])
    assert carried["pez"]["inputs"]["kept"] == event["kept"]
    again = client.run(carried)  # which searches as before, since `keep` is off
    assert result(again)["state"] == "done"
    assert texts(again, "pez") == texts(run, "pez")


def test_the_history_has_the_finds_of_each_node(client: Client):
    def run(seed: int, workflow: str, **inputs) -> dict:
        extra = {"extra_pnginfo": {"workflow": {"id": workflow}}}
        return result(client.run(saving(seed, **inputs), extra))

    first, second = run(72, "mine"), run(73, "mine")
    run(74, "another")
    run(72, "mine", keep=True, kept=first["kept"])  # is no new find
    found = client.get("/pez/finds?workflow=mine").json()["pez"]
    assert [one["kept"] for one in found] == [first["kept"], second["kept"]]
    for one, event in zip(found, (first, second), strict=True):
        candidates = [prompt for prompt, _ in event["items"][0]["candidates"]]
        assert [picture["filename"][:-11] for picture in one["pictures"]] == candidates
        assert {picture["type"] for picture in one["pictures"]} == {"output"}
    assert client.get("/pez/finds?workflow=nobody's").json() == {}

    without = one_image(seed=75)
    client.run(without, {"extra_pnginfo": {"workflow": {"id": "without images"}}})
    (one,) = client.get("/pez/finds?workflow=without images").json()["pez"]
    assert one["pictures"] == [{"filename": "noto-fish.png", "subfolder": "", "type": "input"}]


def test_the_finds_are_bounded(client: Client):
    for seed in range(80, 95):
        extra = {"extra_pnginfo": {"workflow": {"id": "many"}}}
        client.run(one_image(seed=seed, steps=1, restarts=1), extra)
    found = client.get("/pez/finds?workflow=many").json()["pez"]
    assert len(found) == 12
    seeds = {json.loads(one["kept"])["items"][0]["prompt"] for one in found}
    assert len(seeds) == 12


def test_a_cancelled_search_says_what_it_was_made_from(client: Client):
    """So that the page can keep its best so far."""
    client.post("/pez/live", {"client_id": client.id})
    done = result(client.run(one_image(seed=96)))
    prompt_id = client.queue(one_image(seed=96, steps=20000))
    client.until(prompt_id, lambda kind, data: kind == "pez.live" and bool(data["items"]))
    client.interrupt()
    events = [data for kind, data in client.wait(prompt_id).events if kind == "pez.live"]
    assert events[-1]["state"] == "cancelled" and events[-1]["items"]
    inputs = json.loads(done["kept"])["inputs"]
    changed = {name for name in inputs if events[-1]["inputs"][name] != inputs[name]}
    assert changed == {"steps"}


def test_the_machine_is_tested(client: Client):
    run = client.run({"pez": {"class_type": "PEZ_Doctor", "inputs": {}}, "shown": shown("pez")})
    (report,) = texts(run, "shown")
    assert "device: cpu" in report and "search: ok" in report and "FAILED" not in report


def test_the_nodes_look_as_shared_workflows_expect(client: Client):
    """`object_info` of all nodes, as committed; a change here may break workflows of others."""
    path = Path(__file__).parent / "object_info.json"
    names = [n for n in client.get("/object_info").json() if n.startswith("PEZ_")]
    seen = {name: client.object_info(name) for name in sorted(names)}
    for info in seen.values():
        for key in ("python_module", "has_intermediate_output", "price_badge"):
            info.pop(key, None)
        for kind in info["input"].values():
            for options in kind.values():
                if isinstance(options, list) and len(options) > 1:
                    options[1].pop("tooltip", None)  # words may change, wires may not
    text = json.dumps(seen, indent=1, ensure_ascii=False) + "\n"
    if not path.exists():
        path.write_text(text)
        pytest.fail(f"{path.name} was not there and has been written; look at it and commit it")
    assert json.loads(path.read_text()) == seen
