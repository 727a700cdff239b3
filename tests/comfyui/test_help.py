"""Help pages and translations, as ComfyUI serves them and its page looks for them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tools.make_help import HIDDEN, page_path, with_tables

from .server import PACK, ROOT, Client

LANGUAGES = ("en", "zh")
TRANSLATED = ("zh",)  # the page falls back to the schemas, which are English
# what the page runs through its message compiler: `{name}`, `@:link`, `one | many`, `%`-modulo
_COMPILED = re.compile(r"[{}@|%]")
_BETWEEN_BACKTICKS = re.compile(r"`([^`\n]+)`")

Texts = dict[tuple[str, ...], str]


@pytest.fixture(scope="module")
def nodes(client: Client) -> dict[str, dict[str, Any]]:
    """ComfyUI's object_info of each node of the pack."""
    info = client.get("/object_info").json()
    found = {k: v for k, v in info.items() if v["python_module"] == f"custom_nodes.{PACK}"}
    assert found, "the pack has no nodes"
    return found


@pytest.fixture(scope="module")
def locales(client: Client) -> dict[str, dict[str, Any]]:
    """The node texts of each language that has a file."""
    served = client.get("/i18n").json()
    assert {*TRANSLATED} == served.keys(), f"/i18n has {sorted(served)}"
    return {language: served[language].get("nodeDefs", {}) for language in TRANSLATED}


def inputs_of(node: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of each input that a person sees."""
    shown = [node["input"].get(kind, {}) for kind in ("required", "optional")]
    return {name: spec[1] for part in shown for name, spec in part.items()}


def schema_texts(nodes: dict[str, dict[str, Any]]) -> Texts:
    """All that is to be translated, by its place in `nodeDefs.json`."""
    texts: Texts = {}
    for key, node in nodes.items():
        texts[key, "display_name"] = node["display_name"]
        texts[key, "description"] = node["description"]
        for name, options in inputs_of(node).items():
            texts[key, "inputs", name, "name"] = options.get("display_name") or name
            texts[key, "inputs", name, "tooltip"] = options.get("tooltip") or ""
        outputs = zip(node["output_name"], node["output_tooltips"], strict=True)
        for k, (name, tooltip) in enumerate(outputs):
            texts[key, "outputs", str(k), "name"] = name
            texts[key, "outputs", str(k), "tooltip"] = tooltip or ""
    return texts


def flat(tree: Any, place: tuple[str, ...] = ()) -> Texts:
    if not isinstance(tree, dict):
        return {place: tree}
    return {k: v for name, part in tree.items() for k, v in flat(part, (*place, name)).items()}


def listed(places: Any) -> str:
    return "\n".join(" / ".join(place) for place in sorted(places))


def help_page(client: Client, node: str, language: str) -> tuple[str, str]:
    """Path and text of the page that is shown in a language; "" where there is none."""
    for path in (f"{node}/{language}.md", f"{node}.md"):
        answer = client.get(f"/extensions/{PACK}/docs/{path}")
        # a server may answer with its start page where there is no file
        if answer.status_code == 200 and "text/html" not in answer.headers["content-type"]:
            return path, answer.content.decode()
    return "", ""


def test_the_schemas_explain_everything(nodes):
    empty = {place for place, text in schema_texts(nodes).items() if not text.strip()}
    assert not empty, f"without a text:\n{listed(empty)}"
    unfound = [key for key, node in nodes.items() if not node.get("search_aliases")]
    assert not unfound, f"without search aliases: {unfound}"


@pytest.mark.parametrize("language", TRANSLATED)
def test_every_text_is_there_and_none_is_stale(nodes, locales, language):
    ours = {key: node for key, node in locales[language].items() if key in nodes}
    folder = ROOT / "locales" / language
    assert ours, f"/i18n has none of our nodes; is {folder.relative_to(ROOT)} there?"
    wanted, got = schema_texts(nodes), flat(ours)
    missing = {place for place in wanted if not str(got.get(place) or "").strip()}
    assert not missing, f"missing in {language}:\n{listed(missing)}"
    stale = got.keys() - wanted.keys()
    assert not stale, f"no longer in the schemas but in {language}:\n{listed(stale)}"
    # the server has no other pack, so that any other node is ours and gone
    gone = locales[language].keys() - nodes.keys()
    assert not gone, f"no longer nodes but in {language}: {sorted(gone)}"


def test_chinese_is_chinese(nodes, locales):
    """Tooltips and descriptions; names may be CLIP alone."""
    plain = {
        place
        for place, text in flat(locales["zh"]).items()
        if place[-1] != "name" and not re.search(r"[\u4e00-\u9fff]", text)
    }
    assert not plain, f"not translated:\n{listed(plain)}"


def test_every_label_and_placeholder_is_translated(nodes):
    """By the page of the pack: ComfyUI's own does not translate these."""
    strings = (ROOT / "web/strings.js").read_text("utf-8")
    texts = {
        options[name]
        for node in nodes.values()
        for options in inputs_of(node).values()
        for name in ("label_on", "label_off", "placeholder")
        if options.get(name)
    }
    missing = {text for text in texts if f'  "{text}": "' not in strings}
    assert texts and not missing, f"not in strings.js: {sorted(missing)}"
    table = strings[strings.index("CHINESE_WIDGETS") :]
    stale = set(re.findall(r'^  "([^"]+)": ', table, re.M)) - texts
    assert not stale, f"no longer in the schemas: {sorted(stale)}"


def test_chinese_texts_have_chinese_punctuation(locales):
    """Half-width commas and colons only beside half-width characters."""
    strings = (ROOT / "web/strings.js").read_text("utf-8")
    texts = [*flat(locales["zh"]).values(), *strings.splitlines()]
    wrong = [text for text in texts if re.search(r"[\u4e00-\u9fff][,:;?!]", text)]
    assert not wrong, wrong


@pytest.mark.parametrize("language", TRANSLATED)
def test_the_page_can_compile_what_it_compiles(locales, language):
    """Tooltips are taken as they are; names and descriptions are message templates."""
    bad = {
        place
        for place, text in flat(locales[language]).items()
        if place[-1] != "tooltip" and _COMPILED.search(text)
    }
    assert not bad, f"with characters of the template syntax:\n{listed(bad)}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_has_a_help_page(client, nodes, language):
    for key, node in nodes.items():
        path, text = help_page(client, key, language)
        assert path, f"no help page of {key} in {language}"
        is_chinese = bool(re.search(r"[\u4e00-\u9fff]", text))
        assert is_chinese == (language == "zh"), f"{path} is in another language"
        names = {*inputs_of(node), *node["output_name"]} - {HIDDEN}
        untold = names - set(_BETWEEN_BACKTICKS.findall(text))
        assert not untold, f"{path} does not explain {sorted(untold)}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_tables_of_the_help_pages_are_up_to_date(nodes, locales, language):
    for key, info in nodes.items():
        path = page_path(key, language)
        page, texts = path.read_text("utf-8"), locales.get(language, {}).get(key, {})
        assert with_tables(page, info, texts, language) == page, "run tools/make_help.py"


@pytest.mark.parametrize("language", LANGUAGES)
def test_help_pages_use_the_names_of_today(nodes, language):
    """Names between backticks are inputs and outputs of some node, or words of the interface."""
    for key in nodes:
        text = page_path(key, language).read_text("utf-8")
        every = {name for node in nodes.values() for name in inputs_of(node)}
        every |= {name for node in nodes.values() for name in node["output_name"]}
        unknown = set(_BETWEEN_BACKTICKS.findall(text)) - every
        assert not unknown, f"{key}: {sorted(unknown)}"


def test_other_languages_get_the_english_page(client, nodes):
    for key in nodes:
        path, _ = help_page(client, key, "fr")
        assert path == f"{key}.md", f"{key} shows {path or 'nothing'} in French"


def test_no_help_page_is_stale(nodes):
    folder = ROOT / "web/docs"
    pages = [page.relative_to(folder) for page in folder.rglob("*.md")]
    gone = [str(page) for page in pages if Path(page.parts[0]).stem not in nodes]
    assert not gone, f"pages of unknown nodes: {gone}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_tables_name_what_is_there(client, nodes, language):
    """The first cell of a table's row is an input or an output."""
    for key, node in nodes.items():
        path, text = help_page(client, key, language)
        rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
        told = {name for row in rows for name in _BETWEEN_BACKTICKS.findall(row)}
        unknown = told - {*inputs_of(node), *node["output_name"]}
        assert told, f"{path} has no table"
        assert not unknown, f"{path} tells of {sorted(unknown)}, which {key} has not"
