"""The fluency loss: its value, its gradient, and searches with it."""

from dataclasses import replace

import pytest
import torch
from conftest import EXAMPLES, all_words

from pez_core import ArgumentError, SearchOptions, TokenSpace, fluency, invert
from pez_core.caption import Caption
from pez_core.capture import NoWaiting, capturable
from pez_core.fluency import FluencyLoss
from pez_core.objectives import Similarity, WeightedSum
from pez_core.priors import FluencyPrior
from pez_core.token_lm import Shape, TokenLM

LENGTH = 5
CAPTIONS = ["{}", "a photo of {}", "{} , in the dark", "the {} here, and there"]


def make_model(**shape):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TokenLM(replace(Shape(table_width=8, width=16, heads=2, layers=2), **shape))
        model.positions.data.normal_()
        model.bias.data.normal_(std=3)
    return model.eval().requires_grad_(False)


@pytest.fixture
def model(monkeypatch):
    """A language model with random weights, which likes some tokens far more than others."""
    model = make_model()
    monkeypatch.setattr(fluency, "load_token_lm", lambda device: model)
    return model


def some_ids(rows, length=LENGTH, seed=1):
    return torch.randint(320, 3000, (rows, length), generator=torch.Generator().manual_seed(seed))


def objective_of(clip, caption):
    frame, loss = Caption(clip, caption), FluencyLoss(clip)
    return loss, loss.objective(frame.before, frame.after, [0])


@pytest.mark.parametrize("caption", CAPTIONS)
def test_the_loss_is_minus_the_score_of_the_prior(tiny_clip, model, caption):
    loss, objective = objective_of(tiny_clip, caption)
    space = TokenSpace(tiny_clip.text.token_embedding)
    prior = FluencyPrior(model, Caption(tiny_clip, caption), space, LENGTH, "text", 1.0)
    ids = some_ids(3)
    found = objective(loss.token_embedding[ids])
    assert found.std() > 0.01
    assert torch.allclose(found, -prior.score(ids) / prior.weight, atol=1e-5)


@pytest.mark.parametrize("caption", CAPTIONS)
@pytest.mark.parametrize("context", [77, 9])
def test_tokens_that_are_given_count_as_before(tiny_clip, monkeypatch, caption, context):
    model = make_model(context=context)
    monkeypatch.setattr(fluency, "load_token_lm", lambda device: model)
    loss, objective = objective_of(tiny_clip, caption)
    length = 7  # with what stands behind more than the smaller context holds
    ids = some_ids(6, length)
    for n in range(length):
        ids[:, :n] = ids[::3, :n].repeat_interleave(3, dim=0)
        rows = loss.token_embedding[ids]
        behind = objective.given(rows[::3, :n])
        assert torch.allclose(behind(rows[:, n:]), objective(rows), atol=1e-5)
        assert torch.allclose(behind(rows[::3, n:]), objective(rows[::3]), atol=1e-5)


def test_the_gradient_is_that_of_finite_differences(tiny_clip, monkeypatch):
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model = make_model()
        monkeypatch.setattr(fluency, "load_token_lm", lambda device: model)
        loss, objective = objective_of(tiny_clip, "the {} here")
        rows = loss.token_embedding[some_ids(2, 3)].requires_grad_()
        assert torch.autograd.gradcheck(objective, rows)
        behind = objective.given(rows[:1, :1])
        assert torch.autograd.gradcheck(behind, rows[:, 1:].detach().requires_grad_())
    finally:
        torch.set_default_dtype(usual)


def test_the_loss_of_a_text_is_that_of_its_tokens(tiny_clip, model):
    loss, objective = objective_of(tiny_clip, "{}")
    texts = ["a red fish", "two small dogs in a house"]
    rows = [loss.token_embedding[torch.tensor([tiny_clip.text.words.encode(t)])] for t in texts]
    expected = torch.cat([objective(row) for row in rows])
    assert torch.allclose(loss.losses(texts, [0, 0]), expected)


def test_of_a_long_text_the_last_tokens_count(tiny_clip, monkeypatch):
    monkeypatch.setattr(fluency, "load_token_lm", lambda device: make_model(context=6))
    loss, last = FluencyLoss(tiny_clip), "small dogs in a house"
    found = loss.losses([f"two {last}", f"one red fish and {last}", last], [0, 0, 0])
    assert torch.allclose(found[:2], found[2])
    with pytest.raises(ArgumentError, match="`prompt_len` is 7, but the language model reads 6"):
        loss.objective([], [], [0])(loss.token_embedding[some_ids(1, 7)])


def test_the_kind_of_text_counts(tiny_clip, model):
    rows = model.table_with_bias()[some_ids(2)]
    found = [
        FluencyLoss(tiny_clip, wording=wording).objective([], [], [0])(rows)
        for wording in ("free", "tags", "sentence")
    ]
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[1], found[2])


def test_a_step_waits_for_no_device(tiny_clip, model):
    loss, objective = objective_of(tiny_clip, "a photo of {} here")
    similarity = Similarity(tiny_clip.text.encoder(), tiny_clip.encode_texts(["a fish"])[None])
    columns = tiny_clip.text.token_embedding.shape[1]
    both = WeightedSum(similarity, objective, columns, 0.3)
    assert capturable(both) and capturable(both.given(torch.zeros(1, 2, columns + 9)))
    assert not capturable(WeightedSum(similarity, lambda rows: rows.sum((1, 2)), columns, 0.3))
    table = torch.cat([tiny_clip.text.token_embedding.detach(), loss.token_embedding], dim=1)
    rows = table[some_ids(3)].requires_grad_()
    both(rows, 0)  # reads the caption
    with NoWaiting():
        value, _ = both(rows, 0)
        torch.autograd.grad(value.sum(), rows)
        value, _ = both.given(rows[:, :2])(rows[:, 2:], 0)
        torch.autograd.grad(value.sum(), rows)


def test_a_sum_of_given_tokens_is_the_sum(tiny_clip, model):
    loss, objective = objective_of(tiny_clip, "{}")
    similarity = Similarity(tiny_clip.text.encoder(), tiny_clip.encode_texts(["a fish"])[None])
    clip_table = tiny_clip.text.token_embedding.detach()
    both = WeightedSum(similarity, objective, clip_table.shape[1], 0.3)
    rows = torch.cat([clip_table, loss.token_embedding], dim=1)[some_ids(1)]
    value, score = both(rows, 0)
    part = both.given(rows[:, :3])(rows[:, 3:], 0)
    assert torch.allclose(value, part[0], atol=1e-5) and torch.allclose(score, part[1], atol=1e-5)
    similar = similarity(rows[..., : clip_table.shape[1]], 0)[1]
    likely = objective(rows[..., clip_table.shape[1] :])
    assert torch.allclose(score, 0.7 * similar - 0.3 * likely, atol=1e-5)


@pytest.mark.parametrize("swaps", [0, 10])
@pytest.mark.parametrize("caption", ["{}", "a photo of {} here"])
def test_a_search_finds_likelier_prompts(tiny_clip, model, swaps, caption):
    options = all_words(prompt_len=4, effort="fast", steps=25, swaps=swaps, restarts=2)
    plain, fluent = [], []
    for seed in range(2):
        now = replace(options, seed=seed)
        (found,) = invert(tiny_clip, EXAMPLES[0], now, caption=caption)
        loss = FluencyLoss(tiny_clip, 0.2)
        plain.append(loss.losses([found.prompt], [0]).item())
        now = replace(now, extra_loss=loss)
        (found,) = invert(tiny_clip, EXAMPLES[0], now, caption=caption)
        fluent.append(loss.losses([found.prompt], [0]).item())
        assert found.extra_loss == pytest.approx(fluent[-1], abs=1e-5)
        scores = [0.8 * c.similarity - 0.2 * c.extra_loss for c in found.candidates]
        assert scores == sorted(scores, reverse=True)
    assert sum(fluent) < sum(plain) - 1


def test_it_replaces_only_what_algorithm_1_descends(tiny_clip, model):
    loss = FluencyLoss(tiny_clip)
    assert SearchOptions(extra_loss=loss).work == SearchOptions().work
    with pytest.raises(ArgumentError, match="the `wording` 'tags' replaces") as caught:
        SearchOptions(extra_loss=loss, wording="tags")
    assert caught.value.argument == "extra_loss"


@pytest.mark.parametrize(
    "given, argument",
    [
        ({"weight": 0}, "weight"),
        ({"weight": 1.0}, "weight"),
        ({"weight": "x"}, "weight"),
        ({"projection": 1}, "projection"),
        ({"projection": -0.5}, "projection"),
        ({"prompts": 0}, "prompts"),
        ({"wording": "verse"}, "wording"),
    ],
)
def test_arguments_out_of_range(tiny_clip, given, argument):
    with pytest.raises(ArgumentError) as caught:
        FluencyLoss(tiny_clip, **given)
    assert caught.value.argument == argument


def test_a_clip_with_another_tokenizer(tiny_clip, monkeypatch):
    monkeypatch.setattr(tiny_clip.text.words, "separable", False)
    with pytest.raises(ArgumentError, match="tokenizer is not CLIP's own") as caught:
        FluencyLoss(tiny_clip)
    assert caught.value.argument == "clip"


def test_the_model_of_the_package_is_used(tiny_clip):
    loss = FluencyLoss(tiny_clip)
    assert loss.token_embedding.shape == (49408, 129) and loss.parts == [(129, 1.0)]
    good, bad = loss.losses(["a brown dog on a blanket", "blanket a brown on dog a"], [0, 0])
    assert good < bad - 1
