"""The small language model over CLIP's tokens."""

import math

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file, save_file

from pez_core.token_lm import END, FOLDER, KINDS, Shape, TokenLM, chosen, load_token_lm, repeated

SMALL = Shape(vocab_size=50, table_width=8, width=16, heads=2, layers=2, context=9)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = TokenLM(SMALL).eval().requires_grad_(False)
    model.positions.normal_()
    model.bias.normal_()
    return model


@pytest.fixture
def ids():
    return torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(1))


def test_tokens_are_read_in_parts_as_at_once(model, ids):
    _, state = model.start(torch.tensor([0, 1, 2]))
    whole, all_state = model.extend(ids, state)
    parts, now = [], state
    for part in (ids[:, :1], ids[:, 1:5], ids[:, 5:]):
        queries, now = model.extend(part, now)
        parts.append(queries)
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)
    assert all(torch.allclose(a[0], b[0], atol=1e-5) for a, b in zip(now, all_state, strict=True))


def test_no_token_is_read_before_its_turn(model, ids):
    _, state = model.start(torch.tensor([0, 1, 2]))
    before, _ = model.extend(ids, state)
    other = ids.clone()
    other[:, 4] = (other[:, 4] + 1) % 50
    after, _ = model.extend(other, state)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:], atol=1e-3)


def test_order_and_kind_count(model, ids):
    queries, state = model.start(torch.tensor([0, 1, 1]))
    assert torch.equal(queries[1], queries[2]) and not torch.allclose(queries[0], queries[1])
    same = ids[:1].expand(3, -1)
    turned, _ = model.extend(same.flip(1), state)
    straight, _ = model.extend(same, state)
    assert not torch.allclose(turned[:, -1], straight[:, -1], atol=1e-3)


def test_states_of_some_rows(model, ids):
    _, state = model.start(torch.tensor([0]))
    _, state = model.extend(ids[:1], state)
    _, three = model.start(torch.tensor([0, 0, 0]))
    _, three = model.extend(ids[:1].expand(3, -1), three)
    for (a, b), (c, d) in zip(repeated(state, 3), three, strict=True):
        assert torch.allclose(a, c, atol=1e-6) and torch.allclose(b, d, atol=1e-6)
    _, three = model.start(torch.tensor([0, 1, 2]))
    for (a, _), (b, _) in zip(chosen(three, torch.tensor([2, 0])), three, strict=True):
        assert torch.equal(a, b[[2, 0]])


def test_likelihoods_are_logits(model, ids):
    queries, _ = model.start(torch.tensor([0, 1, 2]))
    every = torch.arange(50)
    table = model.next_tokens(queries[:, 0], every)
    expected = queries[:, 0] @ model.table.weight.T + model.bias
    assert torch.allclose(table, expected, atol=1e-6)
    one = model.likelihoods(queries[:, 0], ids[:, 0])
    assert torch.allclose(one, expected.gather(1, ids[:, :1])[:, 0], atol=1e-6)


def test_saved_and_loaded(model, ids, tmp_path):
    model.save(tmp_path)
    loaded = load_token_lm(tmp_path)
    assert loaded.shape == SMALL and not any(p.requires_grad for p in loaded.parameters())
    assert load_token_lm(tmp_path) is loaded
    with torch.inference_mode():  # as ComfyUI runs nodes
        there = load_token_lm(tmp_path, device="meta")
    assert load_token_lm(tmp_path, device=torch.device("meta")) is there
    assert not there.bias.is_inference() and there.bias.device.type == "meta"
    assert loaded.bias.device.type == "cpu" and not there.training
    stored = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.allclose(value, model.state_dict()[name], atol=1e-3, rtol=1e-3), name


def test_weights_of_another_shape_are_refused(model, tmp_path):
    model.save(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({n: v for n, v in state.items() if n != "bias"}, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="bias"):
        load_token_lm(tmp_path)


# The weights of the package.

CAPTIONS = [
    "a brown dog lying on a blue blanket",
    "a woman riding a bicycle down the street",
    "a small red bird sitting on a branch",
    "two cups of coffee on a wooden table",
    "a smiling face with big round eyes",
    "a yellow flower in a glass vase",
]
TAGS = [
    "a blue fish, side view, soft gradient, white background",
    "portrait of a king, golden crown, dramatic lighting, oil painting",
    "cute cat, big eyes, cartoon style, simple icon",
]


def likelihood(text, kind):
    """The mean log-likelihood of a text's tokens and its end, and the largest normaliser."""
    model, ids = load_token_lm(), SimpleTokenizer().encode(text)
    query, state = model.start(torch.tensor([KINDS.index(kind)]))
    rest, _ = model.extend(torch.tensor([ids]), state)
    queries = torch.cat([query, rest], dim=1)
    every = model.next_tokens(queries[0], torch.arange(model.shape.vocab_size))
    own = model.likelihoods(queries[0], torch.tensor([*ids, END])).mean().item()
    return own, every.logsumexp(-1).abs().mean().item()


def test_the_shipped_model_fits_the_package():
    model = load_token_lm()
    count = sum(p.numel() for p in model.parameters())
    assert 5e6 <= count <= 15e6 and model.shape == Shape()
    assert (FOLDER / "model.safetensors").stat().st_size < 25e6


def test_captions_are_more_likely_than_their_words_in_disorder():
    for text in CAPTIONS:
        turned = " ".join(reversed(text.split()))
        assert likelihood(text, "sentence")[0] > likelihood(turned, "sentence")[0] + 1, text


def test_captions_are_likelier_than_word_salad():
    salad = ["vehicle arrow bicycle cartoon bones mount game dish", "of the the lizard at teal a"]
    worst = min(likelihood(text, "sentence")[0] for text in CAPTIONS)
    assert worst > max(likelihood(text, "sentence")[0] for text in salad) + 1


def test_a_kind_expects_its_own_form():
    for text in TAGS:
        assert likelihood(text, "tags")[0] > likelihood(text, "sentence")[0], text
    for text in CAPTIONS:
        assert likelihood(text, "sentence")[0] > likelihood(text, "tags")[0] - 0.5, text


def test_logits_are_nearly_normalised():
    spread = [likelihood(text, kind)[1] for text in CAPTIONS for kind in ("sentence", "tags")]
    assert sum(spread) / len(spread) < 0.5 and math.isfinite(max(spread))
