"""The texts of the live view, by the page's own functions without a page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pez_core import (
    SearchOptions,
    Vocabulary,
    fit_caption,
    fuse,
    invert,
    load_clip,
    prepare_caption,
)
from pez_core.captions import pruned
from pez_core.continuation import continuing
from pez_core.errors import ArgumentError
from pez_core.tasks.distill import _Section

ROOT = Path(__file__).resolve().parent.parent.parent
FISH = ROOT / "examples/noto-fish.png"

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")

APP = """
export const app = { extensionManager: { setting: { get: () => "LOCALE" } } };
"""
RUN = """
import * as strings from "./strings.js";
import * as message from "./message.js";
const given = GIVEN;
console.log(JSON.stringify(EXPRESSION));
"""


@pytest.fixture
def javascript(tmp_path):
    """Evaluate an expression with the modules of the page, in a language."""

    def evaluate(expression: str, given: object, locale: str = "zh"):
        page, scripts = tmp_path / "extensions/pez", tmp_path / "scripts"
        for folder in (page, scripts):
            folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / "package.json").write_text('{"type": "module"}')
        (scripts / "app.js").write_text(APP.replace("LOCALE", locale))
        for name in ("strings", "message", "graph", "dom"):
            shutil.copy(ROOT / f"web/{name}.js", page)
        run = RUN.replace("GIVEN", json.dumps(given)).replace("EXPRESSION", expression)
        (page / "run.js").write_text(run)
        done = subprocess.run(["node", page / "run.js"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return evaluate


def notes() -> list[str]:
    """All notes of the core and the nodes."""

    def of(wanted: int, plain: int, room: int, reached: bool, where: str) -> str:
        section = SimpleNamespace(wanted=lambda *_: wanted, plain=plain, room=room)
        return _Section.note(section, 0.3, None, reached, where)

    states = [(9, 5, 75, True), (3, 5, 75, False), (3, 5, 0, True), (90, 99, 75, True)]
    found = [of(*state, where) for where in ("The prompt", "Section 12") for state in states]
    options = SearchOptions(effort="paper", steps=1, prompt_len=1)
    clip = load_clip("emoji-clip", device="cpu")
    found.append(fuse(clip, ["a red car", "a blue fish"], options, max_tokens=2).note)
    (long,) = invert(clip, FISH, replace(options, prompt_len=None), caption="dog " * 72)
    found.append(long.note)
    tags = SearchOptions(wording="sentence")
    red = Vocabulary(only=["red", "dog"])
    found.append(continuing(tags, "1, 2, 3")[1])
    found.append(prepare_caption(clip, "<think>", options)[1])
    found.append(fit_caption(clip, "1 " * 80, 8)[1])
    found.append(pruned(clip, "2 1 3 4 5 6 7 8 9", FISH)[1])
    written = SearchOptions(
        wording="sentence", swaps=1, steps=2, prompt_len=1, vocabulary=red, lr=1.0
    )
    found.append(invert(clip, FISH, written)[0].note)
    found += ["Without effect: `wording` tags, since `effort` is paper; the prompt is free."]
    found += ["Without effect: `lr` and `weight_decay`, since `wording` is tags."]
    ours = [
        "There was no text.",
        "Finished before its turn; a first guess.",
        "without words that do not help:",
    ]
    sources = "".join(path.read_text("utf-8") for path in (ROOT / "nodes").glob("*.py"))
    assert all(note in sources for note in ours)
    assert all(found)
    return [*found, *ours, f"{found[0]} {found[1]} {ours[1]}"]


def test_every_note_is_translated(javascript):
    english = notes()
    assert javascript("given.map(strings.translateNote)", english, "en") == english
    for note in javascript("given.map(strings.translateNote)", english):
        words = set(re.findall("[A-Za-z]+", note)) - {"token", "CLIP"}
        assert not words and re.search("[\u4e00-\u9fff]", note), note
    pruned = "without words that do not help: 0.3000  The prompt is red"
    assert javascript("strings.translateNote(given)", pruned).endswith(" 0.3000  The prompt is red")


def test_every_text_of_the_page_is_in_both_languages():
    strings = (ROOT / "web/strings.js").read_text("utf-8")

    def keys(table: str) -> list[str]:
        (body,) = re.findall(rf"^const {table} = {{$(.*?)^}};$", strings, re.M | re.S)
        return re.findall(r"^  (\w+): ", body, re.M)

    assert keys("ENGLISH") == keys("CHINESE") and len(keys("ENGLISH")) > 30


def test_an_error_has_the_labels_of_the_page_but_the_values_of_the_user(javascript):
    value = 'it\'s `seed` and "`seed`"'
    error = ArgumentError("steps", f"is {value!r}, unlike the CLIP's `seed`", "lower `steps`")
    node = {"inputs": [{"name": "steps", "label": "Schritte"}, {"name": "seed", "label": "Kern"}]}
    parts = javascript("message.messageParts(...given)", [node, str(error)])
    assert parts == [
        *("", "Schritte", f" is {value!r}, unlike the CLIP's ", "Kern"),
        *("; lower ", "Schritte", "."),
    ]
    assert javascript("message.messageParts(...given)", [node, " plain "]) == ["plain"]


def test_the_page_names_the_wires_that_a_search_needs():
    line = re.search(r"^const REQUIRED = \{(.*)\};$", (ROOT / "web/node.js").read_text(), re.M)[1]
    page = {kind: json.loads(wires) for kind, wires in re.findall(r"(PEZ_\w+): (\[.*?\])", line)}
    python = {}
    for file in (ROOT / "nodes").glob("*.py"):
        text = file.read_text()
        if wires := re.search(r"^    REQUIRED = \((.*)\)$", text, re.M):
            python[re.search(r'"(PEZ_\w+)"', text)[1]] = json.loads(f"[{wires[1]}]")
    assert page == python and page
