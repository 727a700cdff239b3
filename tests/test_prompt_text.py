import sys
from itertools import chain

import pytest

from pez_core import prompt_text
from pez_core.prompt_text import (
    Piece,
    all_pieces,
    chunks,
    contexts,
    has_syntax,
    pieces,
    read,
    sections,
    separators,
    tags,
)

# prompt -> its syntax in order, and what a text encoder reads
SYNTAX = {
    "a <lora:Detail Tweaker (SDXL):0.8> cat": (["<lora:Detail Tweaker (SDXL):0.8>"], "a cat"),
    "<lyco:Foo (v1.0):1:0.5> cat": (["<lyco:Foo (v1.0):1:0.5>"], "cat"),
    "<hypernet:x:1> <wildcard:a/b> x": (["<hypernet:x:1>", "<wildcard:a/b>"], "x"),
    "1girl, saber \\(fate\\), sky": (["saber \\(fate\\)"], "1girl, saber (fate) , sky"),
    "a fox like one artoria pendragon \\(fate stay\\) here": (
        ["one artoria pendragon \\(fate stay\\)"],
        "a fox like one artoria pendragon (fate stay) here",
    ),
    "[cat:dog:0.5] in rain": (["[cat:dog:0.5]"], "cat in rain"),
    "[:dog:10] [dog::10] [dog:3]": (["[:dog:10]", "[dog::10]", "[dog:3]"], "dog dog dog"),
    "[red|blue|] hat [soft]": (["[red|blue|]", "[soft]"], "red hat soft"),
    "[note: no number]": (["[note: no number]"], "note: no number"),
    "a cat AND a dog :1.2": (["AND", ":1.2"], "a cat a dog"),
    "a cat :0.5 AND a dog:2 AND (c:1)": ([":0.5", "AND", ":2", "AND", "(c:1)"], "a cat a dog c"),
    "a wide picture, 16:9": ([], "a wide picture, 16:9"),
    "cats and dogs, break": ([], "cats and dogs, break"),
    "{red|blue} car": (["{red|blue}"], "red car"),
    "{2$$red|blue} {0.25::big hat|0.75::cap} {1-2$$x|y}": (
        ["{2$$red|blue}", "{0.25::big hat|0.75::cap}", "{1-2$$x|y}"],
        "red big hat x",
    ),
    "{|{dark (red:1.1)|pink}} car": (["{|{dark (red:1.1)|pink}}"], "dark red car"),
    "__color__ car, __dir/my-hats_2__": (["__color__", "__dir/my-hats_2__"], "car,"),
    "snake_case __ and __a b__": ([], "snake_case __ and __a b__"),
    "embedding:name, (embedding:b:1.2)": (["embedding:name,", "(embedding:b:1.2)"], ""),
    "a BREAK b": (["BREAK"], "a b"),
    "(a [b) c]": (["(a [b)"], "a [b c]"),
    "((a:1.2) b:0.5e)": (["((a:1.2) b:0.5e)"], "a b:0.5e"),
    "a\nb: c": ([], "a\nb: c"),
    "(x(big)y<lora:z:1>(a BREAK b {}):1.1)": (
        ["(x(big)y<lora:z:1>(a BREAK b {}):1.1)"],
        "x big y a b {}",
    ),
    "{a:1.2} (a|b:1.1)": (["{a:1.2}", "(a|b:1.1)"], "a:1.2 a|b"),
    "[[cat|dog]:bird:3] {{2$$red|blue} sky|x}": (
        ["[[cat|dog]:bird:3]", "{{2$$red|blue} sky|x}"],
        "cat red sky",
    ),
    "a | 2 AND b :x AND c : 3": (["AND", "AND", ": 3"], "a | 2 b :x c"),
    "a) b] c}": ([], "a) b] c}"),
    "[!:?:b:0.5] [!:0.5] !": (["[!:?:b:0.5]", "[!:0.5]"], "b ! !"),
    "({0.5::a (b) c|x} {!|d})": (["({0.5::a (b) c|x} {!|d})"], "a b c d"),
    "({0.5::a|x} {0.5::b|y} w {!|c})": (["({0.5::a|x} {0.5::b|y} w {!|c})"], "a b w c"),
}
# names with escaped brackets: at the beginning, behind other syntax and commas, side by side
NAMES = {
    "\\(water\\) lily": ["\\(water\\)"],
    "(red:1.2) saber \\(fate\\)": ["(red:1.2)", "saber \\(fate\\)"],
    "<lora:x:1> saber \\(fate\\)": ["<lora:x:1>", "saber \\(fate\\)"],
    "saber \\(fate\\) emiya \\(fate\\)": ["saber \\(fate\\)", "emiya \\(fate\\)"],
    "\\(a\\)\\(b\\)": ["\\(a\\)", "\\(b\\)"],
    "a \\(b \\(c\\)": ["a \\(b \\(c\\)"],
    "fox,saber \\(fate\\)": ["saber \\(fate\\)"],
    "fox\nsaber \\(fate\\)": ["saber \\(fate\\)"],
    "a \\) b \\(c": [],
    "a \\(" + "|" * 7 + "\\)": ["a \\(|||||||\\)"],
    "a \\(" + "|" * 8 + "\\)": [],
    "x" * 300 + "\\(a\\)": ["x" * 200 + "\\(a\\)"],
}


@pytest.mark.parametrize("prompt", NAMES)
def test_names_with_escaped_brackets(prompt):
    assert [piece.printed for piece in all_pieces(prompt) if piece.kept] == NAMES[prompt]


def test_sections_lie_outside_of_brackets():
    prompt = "(a BREAK b) c BREAK ((d) AND e) f AND g"
    assert sections(prompt) == ["(a BREAK b) c", "((d) AND e) f", "g"]
    assert separators(prompt) == ["BREAK", "AND"]


def test_a_bracket_has_its_partner_among_the_last_that_were_opened():
    near, far = ("(" + "[" * n + ")" for n in (31, 32))
    assert [piece.kept for piece in all_pieces(near)] == [True]
    assert [piece.kept for piece in all_pieces(far)] == [False]


def test_text_that_is_no_syntax():
    kept = Piece("(b:1.2)", "b", True)
    assert pieces(" a (b:1.2) c ") == [Piece("a", "a", False), kept, Piece("c", "c", False)]
    assert pieces("a cat :1.2") == [Piece("a cat :1.2", "a cat :1.2", False)]
    assert tags("a cat :1.2") == ""
    assert all_pieces(" , ") == [Piece(",", ",", False)] and all_pieces("  ") == []
    assert read("a \\) b") == "a ) b" and has_syntax("a \\) b")
    assert read("(a AND b:1.2)") == "a AND b"
    assert read("a \\n b") == "a \\n b" and not has_syntax("a \\n b")


@pytest.mark.parametrize("prompt", SYNTAX)
def test_what_is_syntax(prompt):
    kept, words = SYNTAX[prompt]
    assert [piece.printed for piece in all_pieces(prompt) if piece.kept] == kept
    assert read(prompt) == words
    assert has_syntax(prompt) == bool(kept)
    assert not has_syntax(words) or "(fate" in words or "[b c]" in words


HARD = {
    "a weight": lambda n: "(:" + "1" * n,
    "a weight in brackets": lambda n: "(a:" + "1" * n + "x)",
    "colons": lambda n: "(" + ":1" * n + ")",
    "brackets": lambda n: "(" * n + "a" + ")" * n,
    "nested weights": lambda n: "(a:" * n + ")" * n,
    "nested alternatives": lambda n: "{a|" * n + "}" * n,
    "empty alternatives": lambda n: "{|" * n + "a" + "}" * n,
    "open brackets": lambda n: "([{" * n + ")" * n,
    "tags": lambda n: "<lora:" * n,
    "wildcards": lambda n: "__a" * n,
    "names": lambda n: "a \\(" * n + "\\)" * n,
    "sections": lambda n: "a BREAK b AND " * n,
}


@pytest.mark.parametrize("kind", HARD)
def test_the_work_grows_with_the_length(kind):
    """By the number of lines that run, and of characters that regular expressions are given."""

    def work(n):
        text, lines = HARD[kind](n), 0

        def count(frame, event, _):
            nonlocal lines
            ours = frame.f_code.co_filename == prompt_text.__file__
            lines += ours and event == "line"
            return count if ours else None

        before = sys.gettrace()
        sys.settrace(count)
        try:
            all_pieces(text)
        finally:
            sys.settrace(before)
        return lines

    assert work(400) < 2.5 * work(200) + 100


@pytest.mark.slow
@pytest.mark.parametrize("text", ["1", ":1", "1.", "__a", "<a", "<a:", "embedding:", " ", "AND"])
def test_no_expression_goes_back(text):
    """An expression that goes back at each character of a long text would take minutes."""
    long = text * (40_000 // len(text))
    for start in ("(:", "{", "__", "<a:", ""):
        printed = "".join(piece.printed for piece in all_pieces(start + long + ")"))
        assert len(printed) <= len(long) + 4


@pytest.mark.parametrize(
    "section, printed",
    [
        ("<lora:a:1>, <lora:b:1>", ["<lora:a:1>,", "<lora:b:1>"]),
        ("(a:1.2) , ,{b|c},", ["(a:1.2), ,", "{b|c},"]),
        (", (a:1.2), cat", ["(a:1.2)", ", cat"]),
    ],
)
def test_a_comma_between_pieces_of_syntax_is_printed_with_the_first(section, printed):
    found = pieces(section)
    assert [piece.printed for piece in found] == printed
    assert "," not in "".join(piece.read for piece in found if piece.kept)


def test_what_is_read_and_what_is_not():
    prompt = "a (red:1.3) car <lora:x:1> BREAK embedding:y, \\(big\\)"
    assert read(prompt) == "a red car (big)"
    assert tags(prompt) == "<lora:x:1> embedding:y"


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ([10], [10]),
        ([75], [75]),
        ([76], [75, 1]),
        ([200], [75, 75, 50]),
        ([70, 7], [70, 7]),  # a short piece is not cut ...
        ([70, 8], [75, 3]),  # ... a long one is
        ([70, 5, 3], [75, 3]),
        ([], []),
    ],
)
def test_contexts(sizes, expected):
    groups = [[k] * size for k, size in enumerate(sizes)]
    found = chunks(groups, 75)
    assert list(map(len, found)) == expected
    assert list(chain(*found)) == list(chain(*groups))


def test_a_prompt_in_contexts():
    """Texts behind syntax are encoded behind a word; a short one is not cut."""
    found = contexts(
        lambda text: ["first", *text],
        lambda text: ["behind", *text],
        "a (b:1.2), <lora:x:1> c d BREAK e",
        9,
    )
    assert found == [
        ["first", "a", "behind", " ", "b"],
        ["behind", " ", "c", " ", "d", "behind", " ", "e"],
    ]


@pytest.mark.parametrize("size", range(1, 8))
def test_a_piece_that_no_context_holds_is_cut(size):
    groups = [[0], [1] * 7, [2] * 3]
    found = chunks(groups, size)
    assert all(0 < len(context) <= size for context in found)
    assert list(chain(*found)) == list(chain(*groups))
