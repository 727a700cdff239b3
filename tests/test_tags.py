"""The order of the phrases of tags: the most important first."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import EXAMPLES

from pez_core import Avoid, SearchOptions, distill, invert, score
from pez_core.caption import Caption
from pez_core.clip.images import load_images
from pez_core.problem import PromptTarget, prepare
from pez_core.tags import Tags
from pez_core.verify import _by_importance

OPTIONS = SearchOptions(prompt_len=10, effort="fast", wording="tags")


def test_phrases_change_places_and_commas_stay():
    tags = Tags.of([5, 6, 0, 7, 0, 8, 9], 0, [], [])
    assert tags.without() == [[7, 0, 8, 9], [5, 6, 0, 8, 9], [5, 6, 0, 7]]
    assert tags.orders([0.3, 0.1, 0.2]) == [[7, 0, 8, 9, 0, 5, 6], [7, 0, 5, 6, 0, 8, 9]]
    assert (
        tags.orders([0.2, 0.2, 0.2]) == [[5, 6, 0, 7, 0, 8, 9]] * 2
    )  # equals as they were written


def test_places_without_a_phrase_stay():
    tags = Tags.of([0, 5, 0, 0, 6, 0], 0, [], [])
    assert tags.without() == [[0, 0, 6, 0], [0, 5, 0, 0]]
    assert tags.orders([0.2, 0.1]) == [[0, 6, 0, 0, 5, 0]] * 2


@pytest.mark.parametrize(
    ("before", "behind", "ordered"),
    [
        ([], [], [3, 0, 2, 0, 1]),
        ([9, 0], [0, 9], [3, 0, 2, 0, 1]),
        ([0, 9], [], [1, 0, 3, 0, 2]),
        ([], [9, 0], [2, 0, 1, 0, 3]),
        ([9], [9], [1, 0, 2, 0, 3]),
    ],
)
def test_a_phrase_that_goes_on_in_the_fixed_text_keeps_its_place(before, behind, ordered):
    tags = Tags.of([1, 0, 2, 0, 3], 0, before, behind)
    scores = [3.0 - k for k in tags.movable] if tags.without() else []
    assert tags.orders(scores)[0] == ordered


@pytest.fixture
def written(monkeypatch):
    """The learned tokens of each search before they are put in order."""
    rows, usual = [], Tags.of
    monkeypatch.setattr(Tags, "of", lambda ids, *rest: rows.append(ids) or usual(ids, *rest))
    return rows


def in_order(clip, row, images, before="", behind="", weights=(1.0,)):
    """The words of `row`, its phrases by the similarity that is left without each.

    Where this costs more than 0.01, the first of them is moved alone, or none.
    """
    phrases = [phrase.strip() for phrase in clip.text.words.decode(row).split(",")]
    full = [k for k, phrase in enumerate(phrases) if phrase]
    if len(full) > 1:
        texts = [before + ", ".join(phrases[:k] + phrases[k + 1 :]) + behind for k in full]
        pairs = zip(images, weights, strict=True)
        left = torch.zeros(len(full))
        for image, weight in pairs:
            left += weight * score(clip, texts, Path(image)).similarity[:, 0]
        order = left.argsort(stable=True).tolist()
        first = [order[0], *(k for k in range(len(full)) if k != order[0])]
        found = []
        for one in (order, first, range(len(full))):
            ordered = [phrases[full[k]] for k in one]
            found.append(", ".join(ordered.pop(0) if phrase else "" for phrase in phrases))
        scores = torch.zeros(3)
        for image, weight in zip(images, weights, strict=True):
            texts = [f"{before}{text}{behind}" for text in found]
            scores += weight * score(clip, texts, Path(image)).similarity[:, 0]
        good = [k for k in range(3) if scores[k] >= scores[2] - 0.01]
        return without_articles(found[good[0]])
    return without_articles(", ".join(phrases))


def without_articles(text):
    """`text` without "a" and "an", which may be put right in the end."""
    return [word for word in text.replace(",", " ,").split() if word not in ("a", "an")]


@pytest.mark.parametrize(("before", "behind"), [("", ""), ("a drawing, ", ", on white")])
def test_the_phrases_of_a_result_are_in_order(emoji_clip, written, before, behind):
    options = replace(OPTIONS, restarts=2, seed=1)
    found = invert(emoji_clip, EXAMPLES[:3], options, caption=f"{before}{{}}{behind}")
    assert len(written) == 6
    changed = 0
    for k, (image, result) in enumerate(zip(EXAMPLES, found, strict=False)):
        rows = written[2 * k : 2 * k + 2]
        expected = [in_order(emoji_clip, row, [image], before, behind) for row in rows]
        learned = [without_articles(one.learned) for one in result.candidates]
        assert sorted(learned) == sorted(expected)
        changed += sum(
            without_articles(emoji_clip.text.words.decode(r)) not in learned for r in rows
        )
        for one in result.candidates:
            assert one.prompt == f"{before}{one.learned}{behind}"
            again = score(emoji_clip, one.prompt, Path(image)).similarity.item()
            assert one.similarity == pytest.approx(again, abs=1e-5)
            assert emoji_clip.text.words.encode(one.prompt) == one.token_ids
    assert changed >= 1


def test_they_are_in_order_when_a_search_is_ended(emoji_clip, written):
    (one,) = invert(emoji_clip, EXAMPLES[0], OPTIONS, callback=lambda report: report.step == 12)
    assert without_articles(one.learned) == in_order(emoji_clip, written[0], EXAMPLES[:1])


def test_the_order_is_by_the_targets_of_the_search(emoji_clip, written):
    avoid = Avoid([Path(EXAMPLES[1])], weight=0.5)
    (one,) = invert(emoji_clip, EXAMPLES[0], OPTIONS, avoid=avoid)
    expected = in_order(emoji_clip, written[0], EXAMPLES[:2], weights=(1, -0.5))
    assert without_articles(one.learned) == expected


def problem_of(clip, row, caption="{}"):
    one = torch.ones(1)
    target = PromptTarget(clip.encode_images(load_images(EXAMPLES[:1])[0]), one, one < 0)
    return prepare(clip, [target], OPTIONS, len(row), Caption(clip, caption), 0.0)


def test_an_order_that_is_refused_is_not_taken(emoji_clip):
    row = emoji_clip.text.words.encode("snow, red boat, old anchor")
    problem = problem_of(emoji_clip, row)
    (ordered,) = _by_importance(problem, [row])
    assert emoji_clip.text.words.decode(ordered) == "old anchor , snow , red boat"

    def acceptable(rows):
        return torch.tensor([one != ordered for one in rows.tolist()])

    assert _by_importance(replace(problem, acceptable=acceptable), [row]) == [row]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.491, 0.6, 0.5], "c , b , a"),
        ([0.489, 0.491, 0.5], "c , a , b"),
        ([0.489, 0.489, 0.5], "a , b , c"),
    ],
)
def test_an_order_that_costs_too_much_is_not_taken(emoji_clip, monkeypatch, scores, expected):
    row = emoji_clip.text.words.encode("a, b, c")
    problem = replace(problem_of(emoji_clip, row), acceptable=None)
    values = [[[0.3, 0.2, 0.1]], [scores]]  # without each phrase, and of each order
    monkeypatch.setattr("pez_core.verify._similarities", lambda *_: values.pop(0))
    (found,) = _by_importance(problem, [row])
    assert emoji_clip.text.words.decode(found) == expected


def test_tags_behind_a_caption_longer_than_the_context_are_in_order(emoji_clip):
    before = " ".join(["white blue green small"] * 20) + ", "
    rows = [
        emoji_clip.text.words.encode(text)
        for text in ("snow, red boat, old anchor", "old anchor, red boat, snow")
    ]
    problem = problem_of(emoji_clip, rows[0], before + "{}")
    assert problem.caption.contexts(len(rows[0])) is not None
    for row in rows:
        (ordered,) = _by_importance(problem, [row])
        found = without_articles(emoji_clip.text.words.decode(ordered))
        assert found == in_order(emoji_clip, row, EXAMPLES[:1], before)


def test_words_around_fixed_text_keep_their_places(emoji_clip, monkeypatch):
    monkeypatch.setattr(Tags, "of", None)  # nothing is ordered
    text = "a small brown dog with a (red collar:1.2) that is lying on a blue blanket in the sun"
    assert "(red collar:1.2)" in distill(emoji_clip, text, OPTIONS).prompt
