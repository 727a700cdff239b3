"""How `token-lm` is trained: on sampled words, and on the probabilities they were sampled from."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

from expect_captions import Expected
from train_token_lm import Text, goals_of, losses, padded

from pez_core.token_lm import END, KINDS, Shape, TokenLM

TEACHER = {5: 0.5, 6: 0.3}  # of the first token; 0.2 are of words that it does not tell
OTHERS = {7: 0.15, 8: 0.05}


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = Shape(vocab_size=49408, table_width=4, width=16, heads=2, layers=1)
    return TokenLM(shape).eval().requires_grad_(False)


def text(token, expected=True):
    ids, shares = torch.tensor([[5, 6], [0, 0]]), torch.tensor([[0.5, 0.3], [0.0, 0.0]])
    return Text(KINDS.index("sentence"), [token], (ids, shares) if expected else None)


def test_probabilities_and_samples_have_the_same_mean(model):
    """What is trained is the cross-entropy with all probabilities, with less noise."""
    told, sampled = 0.0, 0.0
    for token, share in (TEACHER | OTHERS).items():
        told += share * losses(model, [text(token)])[0]
        sampled += share * losses(model, [text(token, expected=False)])[0]
    # the first place; those behind it have nothing expected, and the same loss in both
    torch.testing.assert_close(told, sampled, atol=2e-3, rtol=0)
    known = [losses(model, [text(token)])[0][0] for token in TEACHER]
    torch.testing.assert_close(known[0], known[1])


def test_a_word_that_was_expected_has_no_weight_of_its_own():
    _, ids, counts = padded([text(5), text(7), text(7, expected=False)])
    goals, weights = goals_of([text(5), text(7), text(7, expected=False)], ids, counts)
    assert goals[:, 0].tolist() == [5, END, 7, END, 7, END]
    first, end, other, _, alone, _ = weights.tolist()
    assert first == pytest.approx([0, 0.5, 0.3]) and other == pytest.approx([1, 0.5, 0.3])
    assert end == alone == [1, 0, 0]


def test_a_part_of_the_tokens_stands_for_all(model):
    """The sum over sampled tokens is near that over all."""
    torch.manual_seed(1)
    whole, total = losses(model, [text(5)])
    part, estimate = losses(model, [text(5)], sampled=4096)
    torch.testing.assert_close(part, whole, atol=0.05, rtol=0)
    torch.testing.assert_close(estimate, total, atol=0.05, rtol=0)
    assert total[0] == pytest.approx(math.log(49408), abs=2)


class Words:
    """A tokenizer whose tokens are given."""

    def __init__(self, pieces):
        self.pieces = pieces

    def batch_decode(self, rows):
        return [self.pieces[k] for (k,) in rows]


@pytest.mark.parametrize(
    ("pieces", "places"),
    [
        (["a", " cat", " on", " a", " sofa"], [None, None, 2, 3, 4, 5]),
        # "cat on" begins nowhere but at the whole of it
        (["a", " c", "at on", " a", " sofa"], [None, None, None, 3, 4, 5]),
        # up to the subject a sampler gave the words
        (["a", " hat", " on", " a", " sofa"], [None, None, None, None, None, None]),
    ],
)
def test_places_are_where_both_begin_a_token(pieces, places):
    import open_clip

    expected = Expected.__new__(Expected)
    expected.clip, expected.given = open_clip.SimpleTokenizer(), {"cat"}
    expected.tokenizer = Words(pieces)
    found = expected.places("".join(pieces), list(range(len(pieces))))
    assert found == places
