"""The live view in a browser, in both of ComfyUI's renderers."""

from __future__ import annotations

import itertools
import json
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from PIL import Image
from playwright.sync_api import Browser, Route, expect

from .browser import SETTINGS, Editor, chromium
from .server import ROOT, Client, ComfyServer

IMAGE, CLIP, LEARNER, PREVIEW, SCORE = "1", "2", "3", "4", "5"
# place among a saved node's values: before `repeats`, `fit`, `wording`, `clean_caption`,
# `prune_caption` and the live view
KEPT = -7
EMOJI_CLIP = "bundled emoji CLIP (no download)"

SEEDS = itertools.count(1)  # a run must not come out of the cache of the one before

# a page may have to wait for a busy processor
expect.set_options(timeout=180_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module", params=["classic", "nodes2"])
def renderer(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def open_editor(browser: Browser, server: ComfyServer, client: Client, renderer: str) -> Editor:
    nodes2 = renderer == "nodes2"
    client.post("/settings", {**SETTINGS, "Comfy.VueNodes.Enabled": nodes2}).raise_for_status()
    editor = Editor(browser, server.url)
    yield editor
    editor.close()


@pytest.fixture
def editor(open_editor: Editor, client: Client) -> Iterator[Editor]:
    yield open_editor
    client.interrupt()
    complaints, open_editor.complaints = open_editor.complaints, []
    assert complaints == []


@pytest.fixture
def snap(open_editor: Editor, renderer: str, tmp_path: Path):
    """Save what the browser shows, for a person to look at."""
    folder = Path(os.environ.get("PEZ_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return lambda name: open_editor.page.screenshot(path=folder / f"{renderer}-{name}.png")


def workflow(images: int = 1, kept: str = "", keep: bool = False, **values: Any) -> dict:
    """LoadImage and PEZ Load CLIP -> PEZ Image to Prompt -> PreviewAny and PEZ Score Prompt."""
    search = {"prompt_len": 8, "effort": "paper", "restarts": 2, "seed": next(SEEDS)}
    settings = search | {"caption": "", "block": "", "time_limit": 0.0, "steps": 600} | values
    learner = [
        *(settings[name] for name in ("prompt_len", "effort", "restarts", "seed")),
        *("fixed", 0.0, False, settings["caption"], "", 0.5, False, "", settings["block"]),
        *(settings["time_limit"], settings["steps"], 0.1, 0.1, 0, keep, kept),
    ]
    nodes = [
        node(IMAGE, "LoadImage", (40, 40), [], [("IMAGE", "IMAGE")], ["noto-parrot.png", "image"]),
        node(CLIP, "PEZ_LoadCLIP", (40, 460), [], [("clip", "PEZ_CLIP")], [EMOJI_CLIP, False]),
        node(
            LEARNER,
            "PEZ_ImageToPrompt",
            (420, 40),
            [("clip", "PEZ_CLIP"), ("images", "IMAGE")],
            [("prompt", "STRING")],
            learner,
            size=(420, 720),
        ),
        node(PREVIEW, "PreviewAny", (940, 40), [("source", "*")], [], []),
    ]
    links = [(CLIP, LEARNER, 0), (IMAGE, LEARNER, 1), (LEARNER, PREVIEW, 0)]
    if images > 1:
        batch = {"id": 6, "type": "ImageBatch", "pos": [40, 640], "size": [200, 60]}
        batch["inputs"] = [slot("image1", "IMAGE"), slot("image2", "IMAGE")]
        batch["outputs"] = [slot("IMAGE", "IMAGE")]
        nodes.append(batch)
        links = [(CLIP, LEARNER, 0), (IMAGE, "6", 0), (IMAGE, "6", 1), ("6", LEARNER, 1)]
    return wired(nodes, links)


def node(
    node_id: str,
    kind: str,
    pos: tuple[int, int],
    inputs: list[tuple[str, str]],
    outputs: list[tuple[str, str]],
    values: list[Any],
    size: tuple[int, int] = (280, 320),
) -> dict[str, Any]:
    return {
        "id": int(node_id),
        "type": kind,
        "pos": list(pos),
        "size": list(size),
        "inputs": [slot(*one) for one in inputs],
        "outputs": [slot(*one) for one in outputs],
        "widgets_values": values,
    }


def slot(name: str, kind: str) -> dict[str, Any]:
    return {"name": name, "type": kind}


def wired(nodes: list[dict], links: list[tuple[str, str, int]]) -> dict[str, Any]:
    """A workflow of these nodes, with links from first outputs to inputs by their numbers."""
    by_id = {str(one["id"]): one for one in nodes}
    table = []
    for k, (source, target, place) in enumerate(links, start=1):
        out, into = by_id[source]["outputs"][0], by_id[target]["inputs"][place]
        out.setdefault("links", []).append(k)
        into["link"] = k
        table.append([k, int(source), 0, int(target), place, out["type"]])
    return {
        "id": str(uuid.uuid4()),
        "last_node_id": max(map(int, by_id)),
        "last_link_id": len(table),
        "nodes": nodes,
        "links": table,
        "version": 0.4,
    }


def saving_candidates(**values: Any) -> dict[str, Any]:
    """The same, with images that get the candidates as the names of their files.

    They are whole words of a dictionary: a token such as `/` would name a folder.
    """
    made = workflow(**values)
    nodes = made["nodes"][:3]
    for one in nodes:
        for place in [*one["inputs"], *one["outputs"]]:
            place.pop("link", None)
            place.pop("links", None)
    learner = nodes[-1]
    learner["outputs"] = [slot("prompt", "STRING"), slot("similarity", "FLOAT")]
    learner["outputs"].append(slot("candidates", "STRING"))
    sockets = [("images", "IMAGE"), ("filename_prefix", "STRING")]
    save = node("9", "SaveImage", (940, 40), sockets, [], ["x"])
    save["inputs"][1]["widget"] = {"name": "filename_prefix"}
    learner["inputs"].append(slot("vocabulary", "PEZ_VOCABULARY"))
    rules = node(
        "10", "PEZ_Vocabulary", (40, 640), [], [("vocabulary", "PEZ_VOCABULARY")],
        ["", "", True, True],
    )  # fmt: skip
    links = [(CLIP, LEARNER, 0), (IMAGE, LEARNER, 1), (IMAGE, "9", 0), ("10", LEARNER, 2)]
    made = wired([*nodes, save, rules], links)
    made["links"].append([5, int(LEARNER), 2, 9, 1, "STRING"])
    made["last_link_id"] = save["inputs"][1]["link"] = 5
    learner["outputs"][2]["links"] = [5]
    return made


def kept_text(*prompts: str, inputs: dict[str, str] | None = None) -> str:
    items = [
        {
            "prompt": prompt,
            "similarity": 0.5,
            "words": [[word, 0.1 - 0.06 * k] for k, word in enumerate(prompt.split())],
            "curve": [[1, 0.1], [20, 0.4], [50, 0.5]],
        }
        for prompt in prompts
    ]
    return json.dumps({"version": 1, "items": items, "inputs": inputs or {}})


def kept_in(saved: dict[str, Any], node_id: str = LEARNER) -> str:
    (one,) = [one for one in saved["nodes"] if str(one["id"]) == node_id]
    return one["widgets_values"][KEPT]


def state(editor: Editor, *states: str) -> None:
    """Wait until the live view says one of these."""
    expect(editor.live()).to_have_attribute("data-state", re.compile(f"^({'|'.join(states)})$"))


def words(editor: Editor) -> list[str]:
    return editor.live().locator(".pez-word").all_inner_texts()


def queue_and_wait(editor: Editor, client: Client) -> dict[str, Any]:
    """Queue the open workflow; returns what the server's history says of the run."""
    before = set(client.get("/history").json())
    editor.queue()
    for _ in range(2400):
        after = client.get("/history").json()
        if new := after.keys() - before:
            return after[new.pop()]
        editor.page.wait_for_timeout(100)
    raise TimeoutError("The prompt does not end")


def block_and_run(editor: Editor, client: Client, word: str) -> None:
    """Click a word and search again, which works if the view on the screen is that of the node."""
    editor.live().get_by_role("button", name=word).first.click()
    assert editor.widget(LEARNER, "block")
    queue_and_wait(editor, client)
    state(editor, "done")
    assert words(editor) == json.loads(kept_in(editor.serialized()))["items"][0]["prompt"].split()


def wait_until_idle(editor: Editor, client: Client) -> None:
    """Wait for the server to have run all that is queued."""
    for _ in range(2400):
        queue = client.get("/queue").json()
        if not queue["queue_running"] and not queue["queue_pending"]:
            return
        editor.page.wait_for_timeout(100)
    raise TimeoutError("The prompt does not end")


def cached(run: dict[str, Any]) -> set[str]:
    messages = dict(run["status"]["messages"])
    return set(messages["execution_cached"]["nodes"])


def test_a_prompt_grows_stays_and_goes_out_of_date(editor: Editor, client: Client, snap):
    editor.load(workflow(steps=600))
    state(editor, "idle")
    snap("idle")

    editor.queue()
    state(editor, "running")
    expect(editor.live().locator(".pez-word").first).to_be_visible()
    step = editor.live().locator(".pez-status")
    first = step.inner_text()
    assert re.match(r"Step \d+ of 600\b", first)
    snap("running")
    expect(step).not_to_have_text(first)
    state(editor, "done")
    assert words(editor)
    snap("done")

    saved = kept_in(editor.serialized())
    assert json.loads(saved)["items"][0]["prompt"].split() == words(editor)

    again = queue_and_wait(editor, client)
    assert cached(again) >= {IMAGE, CLIP, LEARNER, PREVIEW}

    # before the switch, for the next prompt has to be the kept one
    editor.set_widget(LEARNER, "keep", True)
    expect(editor.live().locator(".pez-status")).to_have_text("Kept")
    kept = queue_and_wait(editor, client)
    assert kept["outputs"][LEARNER]["pez"][0]["state"] == "kept"
    assert kept["outputs"][LEARNER]["text"] == [" ".join(words(editor))]

    changed = editor.live().locator(".pez-changed")
    expect(changed).to_be_empty()
    editor.set_widget(LEARNER, "steps", 601)
    expect(changed).to_have_text("Learned with other settings: steps")
    snap("out-of-date")
    editor.set_widget(LEARNER, "steps", 600)
    expect(changed).to_be_empty()


def test_the_kept_text_is_no_widget_to_see(editor: Editor, renderer: str):
    editor.load(workflow(kept=kept_text("red parrot")))
    state(editor, "stored")
    shown = editor.page.evaluate(
        """async id => {
            const node = app.rootGraph.getNodeById(id);
            node.showAdvanced = true;
            return node.getLayoutWidgets().map(widget => widget.name);
        }""",
        LEARNER,
    )
    assert "patience" in shown and "pez_live" in shown and "kept" not in shown
    if renderer == "nodes2":
        expect(editor.page.get_by_text("patience", exact=True)).to_be_visible()
        assert not editor.page.get_by_text("kept", exact=True).count()


def test_an_error_is_shown_on_the_node(editor: Editor, client: Client, snap):
    editor.load(workflow(caption="{} and {}"))
    editor.queue()
    state(editor, "failed")
    message = editor.live().locator(".pez-message")
    expect(message).to_contain_text("caption has to hold {} once at most")
    expect(message.locator("b").first).to_have_text("caption")
    expect(editor.live().locator(".pez-status")).to_have_text("Failed")
    snap("failed")

    unwired = workflow(kept=kept_text("red parrot"), steps=5)
    unwired["links"] = [link for link in unwired["links"] if link[4] != 1]
    unwired["nodes"][2]["inputs"][1]["link"] = None
    editor.load(unwired)
    editor.queue()
    expect(message).to_contain_text("images is not connected")
    assert words(editor) == ["red", "parrot"]  # which is stored, and would be given
    snap("failed-with-a-stored-prompt")

    wait_until_idle(editor, client)
    editor.set_widget(LEARNER, "keep", True)
    editor.queue()
    expect(editor.live().locator(".pez-status")).to_have_text("Kept")
    expect(message).to_be_hidden()


def test_missing_wires_are_named_before_a_run(editor: Editor):
    unwired = workflow(steps=5)
    for k in (0, 1):
        unwired["nodes"][2]["inputs"][k]["link"] = None
    unwired["links"] = unwired["links"][2:]
    editor.load(unwired)
    hint = editor.live().locator(".pez-hint")
    expect(hint).to_have_text("Connect clip, images first.")
    for source, place in ((CLIP, 0), (IMAGE, 1)):
        editor.page.evaluate(
            """([source, target, place]) => {
                const [from, into] = [source, target].map((id) => app.rootGraph.getNodeById(id));
                from.connect(0, into, place);
            }""",
            [source, LEARNER, place],
        )
    expect(hint).to_contain_text("Run the workflow")


def test_an_error_is_shown_on_a_node_without_a_live_view(editor: Editor, client: Client, snap):
    broken = workflow(steps=5)
    broken["nodes"][1]["widgets_values"][0] = "pez/gone.safetensors"
    editor.load(broken)
    editor.queue()
    problem = editor.page.locator(".pez-problem")
    expect(problem).to_contain_text("model is 'pez/gone.safetensors', which is not on this disk")
    snap("problem")
    (loader,) = [one for one in editor.serialized()["nodes"] if one["type"] == "PEZ_LoadCLIP"]
    assert not any("gone" in str(v) for v in loader["widgets_values"][1:])
    wait_until_idle(editor, client)
    editor.set_widget(CLIP, "model", EMOJI_CLIP)
    queue_and_wait(editor, client)
    expect(problem).to_have_count(0)
    state(editor, "done")


def test_keep_shows_the_prompt_that_the_node_gives(editor: Editor, client: Client):
    """Also after a later search was cancelled, whose words are not kept."""
    editor.load(workflow(kept=kept_text("red parrot"), steps=20_000))
    editor.queue()
    state(editor, "running")
    expect(editor.live().locator(".pez-word").first).to_be_visible()
    client.interrupt()
    state(editor, "cancelled")
    assert words(editor) != ["red", "parrot"]
    editor.set_widget(LEARNER, "keep", True)
    expect(editor.live().locator(".pez-status")).to_have_text("Kept")
    assert words(editor) == ["red", "parrot"]
    run = queue_and_wait(editor, client)
    assert run["outputs"][LEARNER]["text"] == ["red parrot"]
    assert words(editor) == ["red", "parrot"]


def test_the_best_of_a_cancelled_run_can_be_kept(editor: Editor, client: Client, snap):
    editor.load(workflow(kept=kept_text("red parrot"), steps=20_000, caption="a bird in {} light"))
    keep_this = editor.live().get_by_role("button", name="Keep this")
    expect(keep_this).to_be_hidden()
    editor.queue()
    state(editor, "running")
    expect(editor.live().locator(".pez-word").nth(2)).to_be_visible()
    expect(keep_this).to_be_hidden()
    client.interrupt()
    state(editor, "cancelled")
    best = words(editor)
    snap("keep-this")
    keep_this.click()
    expect(editor.live().locator(".pez-status")).to_have_text("Kept")
    expect(keep_this).to_be_hidden()
    run = queue_and_wait(editor, client)
    assert run["outputs"][LEARNER]["text"] == [" ".join(best)]
    assert words(editor) == best
    assert editor.live().locator("button.pez-word").all_inner_texts() == best[3:-1]
    editor.set_widget(LEARNER, "steps", 20)
    changed = editor.live().locator(".pez-changed")
    expect(changed).to_have_text("Learned with other settings: steps")


def test_a_click_uses_a_candidate_or_an_earlier_prompt_and_keeps_it(
    editor: Editor, client: Client, snap
):
    editor.load(saving_candidates(steps=10, restarts=3))
    found = []
    for seed in (500, 600):  # neighbours share starts, and may find the same prompt
        editor.set_widget(LEARNER, "seed", seed)
        run = queue_and_wait(editor, client)
        (item,) = run["outputs"][LEARNER]["pez"][0]["items"]
        found.append([prompt for prompt, _ in item["candidates"]])
    candidates, history = (editor.live().locator(".pez-picks").nth(k) for k in (0, 1))
    expect(history.locator("summary")).to_have_text("2 prompts so far")
    for fold in (candidates, history):
        fold.locator("summary").click()
    # each with the image that was made of it
    expect(candidates.locator("img")).to_have_count(3)
    expect(history.locator("img")).to_have_count(2)
    files = candidates.locator("img").evaluate_all("all => all.map(one => one.src)")
    for file, prompt in zip(files, found[1], strict=True):
        assert parse_qs(urlsplit(file).query)["filename"][0].startswith(prompt)
    widths = candidates.locator("img").evaluate_all(
        "all => Promise.all(all.map(one => one.decode().then(() => one.naturalWidth)))"
    )
    assert all(widths)
    snap("picks")

    candidates.locator("button").nth(2).click()
    expect(editor.live().locator(".pez-status")).to_have_text("Kept")
    assert " ".join(words(editor)) == found[1][2]
    assert editor.widget(LEARNER, "keep") is True
    run = queue_and_wait(editor, client)
    assert run["outputs"][LEARNER]["text"] == [found[1][2]]
    assert not run["outputs"][LEARNER]["pez"][0]["changed"]
    assert candidates.locator("[aria-pressed=true]").all_inner_texts()[0].endswith(found[1][2])
    snap("picked")

    history.locator("button").last.click()
    expect(editor.live()).to_contain_text(found[0][0].split()[0])
    assert " ".join(words(editor)) == found[0][0]
    run = queue_and_wait(editor, client)
    assert run["outputs"][LEARNER]["text"] == [found[0][0]]
    expect(editor.live().locator(".pez-changed")).to_be_empty()  # a seed alone changes nothing
    editor.page.keyboard.press("Control+z")
    editor.page.wait_for_function(
        "([node, prompt]) => JSON.parse(app.rootGraph.getNodeById(node).widgets"
        ".find(w => w.name === 'kept').value).items[0].prompt === prompt",
        arg=[LEARNER, found[1][2]],
    )
    assert editor.widget(LEARNER, "keep") is True

    editor.reload()
    expect(editor.live().locator(".pez-picks").nth(1).locator("summary")).to_be_visible()


def test_undo_does_not_take_a_result_back(editor: Editor, client: Client):
    editor.load(workflow(steps=5))
    editor.set_widget(LEARNER, "restarts", 3)
    queue_and_wait(editor, client)
    state(editor, "done")
    learned, kept = words(editor), editor.widget(LEARNER, "kept")
    editor.page.keyboard.press("Control+z")
    expect(editor.live().locator(".pez-word")).to_have_count(len(learned))
    editor.page.wait_for_function(
        "id => app.rootGraph.getNodeById(id).widgets.find(w => w.name === 'restarts').value === 2",
        arg=LEARNER,
    )
    assert editor.widget(LEARNER, "kept") == kept
    assert words(editor) == learned

    block_and_run(editor, client, learned[0])


def test_a_redo_and_an_undone_deletion_leave_the_live_view_alive(editor: Editor, client: Client):
    editor.load(workflow(steps=5))
    editor.set_widget(LEARNER, "restarts", 3)
    queue_and_wait(editor, client)
    state(editor, "done")
    learned = words(editor)
    restarts = "id => app.rootGraph.getNodeById(id)?.widgets.find(w => w.name === 'restarts').value"
    for keys, value in (("Control+z", 2), ("Control+y", 3)):
        editor.page.keyboard.press(keys)
        editor.page.wait_for_function(f"id => ({restarts})(id) === {value}", arg=LEARNER)
        expect(editor.live().locator(".pez-word")).to_have_count(len(learned))
        assert words(editor) == learned

    editor.delete(LEARNER)
    expect(editor.page.locator(".pez-live:visible")).to_have_count(0)
    editor.page.keyboard.press("Control+z")
    expect(editor.live().locator(".pez-word")).to_have_count(len(learned))
    assert words(editor) == learned

    block_and_run(editor, client, learned[0])


OTHER_PACK = """() => app.registerExtension({
    name: "another.pack",
    nodeCreated(node) {
        if (node.comfyClass !== "PEZ_ImageToPrompt" || !window.anotherPack) return;
        node.addWidget("text", "behind", "", () => {});
        const before = node.addWidget("text", "before", "", () => {});
        node.widgets.splice(node.widgets.indexOf(before), 1);
        node.widgets.unshift(before);
    },
})"""


def test_widgets_of_another_pack_and_the_kept_prompt_stay_apart(
    editor: Editor, client: Client, server: ComfyServer
):
    """Whatever the order of the widgets is, in a saved workflow and in that of a saved image."""
    editor.page.evaluate(OTHER_PACK)
    editor.page.evaluate("() => { window.anotherPack = true; }")
    ours = saving_candidates(steps=5)
    values = ours["nodes"][2]["widgets_values"]
    newer = [False, "crop", "free", True, False]
    values[:] = ["theirs, before", *values, *newer, "", "theirs, behind"]
    editor.load(ours)
    run = queue_and_wait(editor, client)
    state(editor, "done")
    learned = words(editor)
    name = run["outputs"]["9"]["images"][0]["filename"]
    with Image.open(server.folder / "output" / name) as picture:
        carried = json.loads(picture.info["workflow"])
    try:
        for saved in (editor.serialized(), carried | {"id": str(uuid.uuid4())}):
            editor.load(saved)
            state(editor, "done", "stored")
            assert words(editor) == learned
            assert editor.widget(LEARNER, "before") == "theirs, before"
            assert editor.widget(LEARNER, "behind") == "theirs, behind"
            assert json.loads(editor.widget(LEARNER, "kept"))["items"]
            (node,) = [n for n in editor.serialized()["nodes"] if str(n["id"]) == LEARNER]
            assert "pez_kept" not in node["properties"]
    finally:
        editor.page.evaluate("() => { window.anotherPack = false; }")


def test_another_seed_alone_leaves_a_kept_prompt_up_to_date(editor: Editor, client: Client):
    editor.load(workflow(steps=5))
    queue_and_wait(editor, client)
    state(editor, "done")
    editor.set_widget(LEARNER, "keep", True)
    queue_and_wait(editor, client)
    changed = editor.live().locator(".pez-changed")
    editor.set_widget(LEARNER, "seed", 123)
    assert cached(queue_and_wait(editor, client)) >= {LEARNER, PREVIEW}
    expect(changed).to_be_empty()
    editor.set_widget(LEARNER, "steps", 6)
    expect(changed).to_have_text("Learned with other settings: seed, steps")


def test_words_of_a_caption_are_no_buttons(editor: Editor, snap):
    editor.load(workflow(steps=5, caption="a drawing of {} in flight"))
    editor.queue()
    state(editor, "done")
    fixed = editor.live().locator(".pez-fixed")
    assert fixed.all_inner_texts() == ["a", "drawing", "of", "in", "flight"]
    buttons = editor.live().locator("button.pez-word").all_inner_texts()
    assert buttons == words(editor)[3:-2] and buttons
    snap("caption")

    editor.load(workflow(kept=kept_text("red fish (blue water:1.2) BREAK <lora:x:0.5> sea")))
    state(editor, "stored")
    assert editor.live().locator("button.pez-word").all_inner_texts() == ["red", "fish", "sea"]


def test_a_click_on_a_word_blocks_it(editor: Editor, client: Client, snap):
    editor.load(workflow(kept=kept_text("red, “parrot” sea"), block="blue"))
    state(editor, "stored")
    assert words(editor) == ["red,", "“parrot”", "sea"]
    word = editor.live().get_by_role("button", name="“parrot”")
    word.click()
    expect(word).to_have_attribute("aria-pressed", "true")
    assert editor.widget(LEARNER, "block") == "blue, parrot"
    expect(editor.live().locator(".pez-blocked")).to_be_visible()
    snap("blocked")
    word.click()
    expect(word).to_have_attribute("aria-pressed", "false")
    assert editor.widget(LEARNER, "block") == "blue"
    expect(editor.live().locator(".pez-blocked")).to_be_hidden()


def test_what_a_strangers_workflow_keeps_is_text(editor: Editor):
    evil = "<img src=x onerror=alert(1)> <b>bold</b>"
    editor.load(workflow(kept=kept_text(evil), keep=True))
    expect(editor.live().locator(".pez-status")).to_have_text("Kept")
    assert words(editor) == evil.split()
    assert not editor.live().locator("img, b").count()
    for broken in ("{", "[]", '{"items": [{"prompt": 3}]}', '{"items": {"a": 1}}'):
        editor.load(workflow(kept=broken))
        state(editor, "idle")
        assert kept_in(editor.serialized()) == broken


def test_several_prompts_are_rows(editor: Editor, snap):
    editor.load(workflow(kept=kept_text("red parrot", "blue fish in the sea", "old dog")))
    rows = editor.live().locator(".pez-row")
    expect(rows).to_have_count(3)
    snap("rows")
    rows.nth(1).click()
    assert words(editor) == ["blue", "fish", "in", "the", "sea"]
    editor.live().get_by_role("button", name="Copy", exact=True).click()
    assert editor.page.evaluate("navigator.clipboard.readText()") == "blue fish in the sea"
    snap("row-opened")
    rows.nth(1).click()
    editor.live().get_by_role("button", name="Copy all").click()
    copied = editor.page.evaluate("navigator.clipboard.readText()")
    assert copied.split("\n") == ["red parrot", "blue fish in the sea", "old dog"]


def test_a_time_limit_moves_the_last_step_but_not_past_the_end(editor: Editor):
    editor.load(workflow(effort="fast", time_limit=5.0))
    editor.queue()
    state(editor, "running")
    bar = editor.live().get_by_role("progressbar")
    seen = []
    while editor.live().get_attribute("data-state") == "running":
        seen.append(int(bar.get_attribute("aria-valuenow")))
        editor.page.wait_for_timeout(200)
    state(editor, "done")
    # a busy page may see few of the steps, or none
    assert all(value <= 100 for value in seen) and seen[-1:] >= seen[:1]
    (item,) = json.loads(kept_in(editor.serialized()))["items"]
    steps = [step for step, _ in item["curve"]]
    assert steps == sorted(steps)


def test_two_images_are_learned_side_by_side(editor: Editor):
    editor.load(workflow(images=2, steps=30))
    editor.queue()
    expect(editor.live().locator(".pez-row")).to_have_count(2)
    state(editor, "done")
    assert len(json.loads(kept_in(editor.serialized()))["items"]) == 2


def test_a_reload_finds_the_run_again_and_finish_ends_it(editor: Editor, client: Client, snap):
    editor.load(workflow(steps=20_000))
    editor.queue()
    state(editor, "running")
    editor.reload()
    state(editor, "running")
    expect(editor.live().locator(".pez-word").first).to_be_visible()
    editor.live().get_by_role("button", name="Finish now").click()
    state(editor, "finished")
    assert client.get("/pez/live").json() == []
    assert json.loads(kept_in(editor.serialized()))["items"][0]["prompt"].split() == words(editor)
    snap("finished")


def test_a_result_is_found_that_came_while_the_page_was_away(editor: Editor, client: Client):
    editor.load(workflow(steps=600))
    editor.queue()
    state(editor, "running")
    editor.page.goto("about:blank")
    wait_until_idle(editor, client)
    editor.open()
    state(editor, "done")
    assert json.loads(kept_in(editor.serialized()))["items"][0]["prompt"].split() == words(editor)


def test_a_second_page_shows_the_run_too(
    editor: Editor, browser: Browser, server: ComfyServer, client: Client
):
    shared = workflow(steps=20_000)
    editor.load(shared)
    editor.queue()
    state(editor, "running")
    second = Editor(browser, server.url)
    second.load(shared)
    state(second, "running")
    second.live().get_by_role("button", name="Finish now").click()
    for page in (editor, second):
        state(page, "finished")
        assert json.loads(kept_in(page.serialized()))["items"][0]["prompt"].split() == words(page)
    second.close()
    assert second.complaints == []


def test_two_pages_with_the_same_node_ids_run_one_after_the_other(
    editor: Editor, browser: Browser, server: ComfyServer, client: Client
):
    editor.load(workflow(steps=20_000, prompt_len=4))
    editor.queue()
    state(editor, "running")
    second = Editor(browser, server.url)
    second.load(workflow(steps=5, prompt_len=6))
    second.queue()
    editor.live().get_by_role("button", name="Finish now").click()
    state(editor, "finished")
    state(second, "done")
    for page, prompt_len in ((editor, 4), (second, 6)):
        (kept,) = json.loads(kept_in(page.serialized()))["items"]
        assert kept["prompt"].split() == words(page)
        assert len(words(page)) <= prompt_len
    assert words(editor) != words(second)
    second.close()
    assert second.complaints == []


def test_a_cancelled_run_still_shows_its_best(editor: Editor, client: Client, snap):
    editor.load(workflow(steps=20_000))
    editor.queue()
    expect(editor.live().locator(".pez-word").first).to_be_visible()
    client.interrupt()
    state(editor, "cancelled")
    assert words(editor)
    assert kept_in(editor.serialized()) == ""
    snap("cancelled")


def test_a_result_waits_for_its_workflow(editor: Editor, client: Client):
    first, second = workflow(steps=600), workflow(steps=600)
    editor.load(first)
    editor.queue()
    state(editor, "running")
    editor.load(second)
    state(editor, "idle")
    wait_until_idle(editor, client)
    state(editor, "idle")
    assert kept_in(editor.serialized()) == ""
    editor.open_previous()
    state(editor, "done")
    assert editor.serialized()["id"] == first["id"]
    assert json.loads(kept_in(editor.serialized()))["items"][0]["prompt"].split() == words(editor)


def test_a_node_in_a_subgraph_has_its_live_view(editor: Editor, snap):
    editor.load(workflow(steps=30))
    editor.page.evaluate(
        "id => app.rootGraph.convertToSubgraph(new Set([app.rootGraph.getNodeById(id)]))", LEARNER
    )
    editor.queue()
    editor.page.evaluate("() => app.canvas.setGraph([...app.rootGraph.subgraphs.values()][0])")
    state(editor, "done")
    assert words(editor)
    snap("subgraph")
    (subgraph,) = editor.serialized()["definitions"]["subgraphs"]
    (learner,) = [one for one in subgraph["nodes"] if one["type"] == "PEZ_ImageToPrompt"]
    assert json.loads(learner["widgets_values"][KEPT])["items"][0]["prompt"].split() == words(
        editor
    )
    editor.page.evaluate("() => app.canvas.setGraph(app.rootGraph)")


SHOW_OUTSIDE = """([id, names]) => {
    const node = app.rootGraph.getNodeById(id);
    const outside = app.rootGraph.convertToSubgraph(new Set([node])).node;
    const [inside] = outside.subgraph.nodes;
    for (const name of names) {
        const socket = inside.inputs.find(input => input.widget?.name === name);
        outside.subgraph.addInput(name, socket.type).connect(socket, inside);
    }
    return String(outside.id);
}"""


def test_a_subgraph_can_show_widgets_of_the_node(editor: Editor, client: Client, snap):
    editor.load(workflow(steps=8, restarts=2))
    outside = editor.page.evaluate(SHOW_OUTSIDE, [LEARNER, ["keep", "block"]])
    run = queue_and_wait(editor, client)
    inside = f"{outside}:{LEARNER}"
    (item,) = run["outputs"][inside]["pez"][0]["items"]
    editor.page.evaluate("() => app.canvas.setGraph([...app.rootGraph.subgraphs.values()][0])")
    state(editor, "done")
    editor.live().locator(".pez-picks summary").first.click()
    editor.live().locator(".pez-pick").nth(1).click()
    expect(editor.live().locator(".pez-status")).to_have_text("Kept")
    assert editor.widget(outside, "keep") is True
    second = item["candidates"][1][0]
    assert queue_and_wait(editor, client)["outputs"][inside]["text"] == [second]
    editor.live().locator("button.pez-word").first.click()
    assert editor.widget(outside, "block") == words(editor)[0]
    snap("subgraph-widgets")
    editor.page.evaluate("() => app.canvas.setGraph(app.rootGraph)")
    editor.set_widget(outside, "keep", False)
    run = queue_and_wait(editor, client)
    assert second.split()[0] not in run["outputs"][inside]["text"][0].split()


def test_app_mode_can_show_the_live_view(editor: Editor, client: Client, snap):
    chosen = [["1", "image"], [LEARNER, "keep"], [LEARNER, "pez_live"]]
    extra = {"linearMode": True, "linearData": {"inputs": chosen, "outputs": [PREVIEW]}}
    editor.load(workflow(steps=8, restarts=2) | {"extra": extra})
    expect(editor.page.get_by_text("live view", exact=True)).to_be_visible()
    queue_and_wait(editor, client)
    state(editor, "done")
    learned = words(editor)
    # whole, though it is narrow here
    view, number = editor.live().bounding_box(), editor.live().locator(".pez-similarity")
    right = number.bounding_box()
    assert right["x"] + right["width"] <= view["x"] + view["width"]
    snap("app-mode")
    editor.page.evaluate("() => app.extensionManager.command.execute('Comfy.ToggleLinear')")
    expect(editor.page.get_by_text("live view", exact=True)).to_be_hidden()
    state(editor, "done")
    assert words(editor) == learned


def test_scores_are_shown(editor: Editor, snap):
    text = "a green parrot with a red head"
    score = node(
        SCORE,
        "PEZ_ScorePrompt",
        (420, 40),
        [("clip", "PEZ_CLIP"), ("images", "IMAGE")],
        [],
        [text, 0.0],
        size=(420, 500),
    )
    nodes = [one for one in workflow()["nodes"] if str(one["id"]) in (IMAGE, CLIP)]
    for one in nodes:
        one["outputs"] = [slot(out["name"], out["type"]) for out in one["outputs"]]
    editor.load(wired([*nodes, score], [(CLIP, SCORE, 0), (IMAGE, SCORE, 1)]))
    state(editor, "idle")
    editor.queue()
    state(editor, "done")
    assert words(editor) == text.split()
    assert not editor.live().locator("button.pez-word").count()
    snap("score")


def test_only_a_person_agrees_to_a_download(editor: Editor):
    agreed = []

    def answer(route: Route) -> None:
        agreed.append(route.request.post_data_json["model"])
        route.fulfill(json={})

    editor.page.route("**/pez/agree", answer)  # the server must not remember it
    shared = workflow()
    (loader,) = [one for one in shared["nodes"] if str(one["id"]) == CLIP]
    loader["widgets_values"] = ["SD 1.5 (ViT-L/14)", True]
    try:
        editor.load(shared)
        assert editor.widget(CLIP, "download") is True
        editor.set_widget(CLIP, "model", "SDXL (L + bigG)")
        editor.set_widget(CLIP, "download", False)
        assert agreed == []
        with editor.page.expect_response("**/pez/agree"):
            editor.set_widget(CLIP, "download", True)
        with editor.page.expect_response("**/pez/agree"):
            editor.set_widget(CLIP, "model", "SD 2.x (ViT-H/14)")
    finally:
        editor.page.unroute("**/pez/agree")
    assert agreed == ["SDXL (L + bigG)", "SD 2.x (ViT-H/14)"]


def test_a_kept_prompt_of_a_megabyte_opens(editor: Editor):
    many = json.loads(kept_text("a red dog"))
    many["items"][0]["words"] = [[f"w{k}", 0.1] for k in range(130_000)]
    editor.load(workflow(kept=json.dumps(many), keep=True))
    expect(editor.live().locator(".pez-status")).to_have_text("Kept")
    assert words(editor) == ["a", "red", "dog"]
    rows = json.loads(kept_text(*["dog"] * 5000))
    editor.load(workflow(kept=json.dumps(rows), keep=True))
    expect(editor.live().locator(".pez-row")).to_have_count(1000)


def test_rarely_used_inputs_are_folded_away(editor: Editor):
    editor.load(workflow())
    shown = """() => app.rootGraph.nodes.flatMap(node => node.widgets ?? [])
        .filter(widget => !widget.hidden && !widget.options.hidden).map(widget => widget.name)"""
    few = editor.page.evaluate(shown)
    assert {"effort", "seed", "readability", "wording", "block", "keep", "model"} <= {*few}
    rare = {"steps", "time_limit", "lr", "patience", "start_from", "precision", "clean_caption"}
    assert not rare & {*few} and "kept" not in few
    editor.page.evaluate("() => app.rootGraph.nodes.forEach(node => node.toggleAdvanced())")
    every = editor.page.evaluate(shown)
    assert rare <= {*every} and "kept" not in every


def test_an_example_runs_in_the_page(
    editor: Editor, server: ComfyServer, client: Client, sd15: str, snap
):
    """As it comes, but with models that are here."""
    example = json.loads((ROOT / "example_workflows/Image to image via a prompt.json").read_text())
    ours = {
        "PEZ_LoadCLIP": {0: EMOJI_CLIP},
        "LoadImage": {0: "noto-parrot.png"},
        "CheckpointLoaderSimple": {0: sd15},
        "EmptyLatentImage": {0: 64, 1: 64},
        "KSampler": {2: 1},
    }
    for one in example["nodes"]:
        one["mode"] = 0  # what makes images is muted
        for k, value in ours.get(one["type"], {}).items():
            one["widgets_values"][k] = value
        if one["type"] == "CheckpointLoaderSimple":
            one |= {"type": "DiffusersLoader", "properties": {}}
    before = set(client.get("/history").json())
    editor.load(example)
    editor.queue()
    expect(editor.live().get_by_role("button", name="Finish now")).to_be_visible()
    expect(editor.live()).to_contain_text("Learned")
    snap("example")

    def ended() -> list[dict[str, Any]]:
        history = client.get("/history").json()
        return [run for id, run in history.items() if id not in before]

    for _ in range(480):
        if ended():
            break
        editor.page.wait_for_timeout(500)
    (run,) = ended()
    assert run["status"]["status_str"] == "success"
    images = [image for outputs in run["outputs"].values() for image in outputs.get("images", [])]
    saved = [image for image in images if image["type"] == "output"]
    with Image.open(server.folder / "output" / saved[0]["filename"]) as picture:
        (learned,) = [
            json.loads(node["widgets_values"][KEPT])["items"][0]["prompt"]
            for node in json.loads(picture.info["workflow"])["nodes"]
            if node["type"] == "PEZ_ImageToPrompt"
        ]
    shown = "".join(editor.live().locator(".pez-word").all_inner_texts())
    assert shown.replace(" ", "") == learned.replace(" ", "")
