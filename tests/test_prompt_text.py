from itertools import chain

import pytest

from pez_core.prompt_text import chunks, pieces, read, sections, tags


def parts(prompt):
    return [[(p.printed, p.read, p.kept) for p in pieces(s)] for s in sections(prompt)]


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("a cat", [[("a cat", "a cat", False)]]),
        ("", [[]]),
        (
            "a (red:1.3) car, in rain",
            [[("a", "a", False), ("(red:1.3)", "red", True), ("car, in rain",) * 2 + (False,)]],
        ),
        (
            "x, <lora:foo:0.8> embedding:bad-hands, y",
            [
                [
                    ("x,", "x,", False),
                    ("<lora:foo:0.8>", "", True),
                    ("embedding:bad-hands", "", True),
                    (", y", ", y", False),
                ]
            ],
        ),
        ("((big) old:1.2)", [[("((big) old:1.2)", "big old", True)]]),
        ("(embedding:x:1.2)", [[("(embedding:x:1.2)", "", True)]]),
        ("a \\(b\\) c", [[("a \\(b\\) c", "a (b) c", False)]]),
        ("(a \\(b\\):1.1)", [[("(a \\(b\\):1.1)", "a (b)", True)]]),
        ("a BREAK b", [[("a", "a", False)], [("b", "b", False)]]),
        (
            "a BREAK, b,BREAK c",
            [[("a",) * 2 + (False,)], [(", b,",) * 2 + (False,)], [("c",) * 2 + (False,)]],
        ),
        ("(a BREAK b:1.2)", [[("(a BREAK b:1.2)", "a b", True)]]),
        (":( (a:1.2)", [[(":(", ":(", False), ("(a:1.2)", "a", True)]]),
        ("BREAKFAST break", [[("BREAKFAST break", "BREAKFAST break", False)]]),
        ("left ( open", [[("left ( open", "left ( open", False)]]),
        ("right ) open", [[("right ) open", "right ) open", False)]]),
        ("3 < 4 > 2", [[("3 < 4 > 2", "3 < 4 > 2", False)]]),
    ],
)
def test_what_is_text_and_what_is_kept(prompt, expected):
    assert parts(prompt) == expected


def test_what_is_read_and_what_is_not():
    prompt = "a (red:1.3) car <lora:x:1> BREAK embedding:y, \\(big\\)"
    assert read(prompt) == "a red car , (big)"
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
