"""Searches may multiply in bfloat16; what they find is checked in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import make_clip

from pez_core import SearchOptions, TokenSpace, invert, load_clip, precision
from pez_core.clip import matrices
from pez_core.clip.matrices import BlockMatrices, fastest_dtype
from pez_core.space import _LARGE_TABLE, _LOOKED_AT, _Screen


def rows_of(clip, rows=3, prompt_len=5):
    generator = torch.Generator().manual_seed(0)
    ids = clip.vocabulary[
        torch.randint(len(clip.vocabulary), (rows, prompt_len), generator=generator)
    ]
    return clip.text.token_embedding.detach()[ids].float()


def test_products_in_bfloat16_are_close_and_have_gradients(tiny_clip):
    clip, embeddings = make_clip(), rows_of(tiny_clip)
    exact = clip.text.encoder()(embeddings)
    clip.text.matrix_dtype = torch.bfloat16
    embeddings.requires_grad_()
    encode = clip.text.encoder()
    rounded = encode(embeddings)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert F.cosine_similarity(rounded, exact).min() > 0.999
    rest = encode.given(embeddings[:, :2].detach())(embeddings[:, 2:])
    assert F.cosine_similarity(rest, exact).min() > 0.999
    (gradient,) = torch.autograd.grad(rounded.sum(), embeddings)
    clip.text.matrix_dtype = torch.float32
    (wanted,) = torch.autograd.grad(clip.text.encoder()(embeddings).sum(), embeddings)
    assert F.cosine_similarity(gradient.flatten(1), wanted.flatten(1)).min() > 0.99


def test_a_copy_is_kept_until_the_weights_change():
    clip = make_clip()
    clip.text.matrix_dtype = torch.bfloat16
    block = clip.text.tower.transformer.resblocks[0]

    def widened():
        return clip.text._matrices(torch.bfloat16)[0].widen[0]

    first = widened()
    assert widened() is first
    with torch.no_grad():
        block.mlp.c_fc.weight.mul_(2)
    assert torch.equal(widened(), block.mlp.c_fc.weight.bfloat16())
    # in their own dtype they are no copies
    clip.text.matrix_dtype = None
    (one, *_) = clip.text._matrices(torch.float32)
    assert one.widen[0] is block.mlp.c_fc.weight


@pytest.mark.parametrize("faster", [True, False])
def test_only_large_towers_in_float32_are_measured(monkeypatch, faster):
    small = BlockMatrices.of(make_clip().text.tower.transformer.resblocks[0]).tensors()
    large = [torch.empty(matrices._SMALL)]
    monkeypatch.setattr(matrices, "bfloat16_pays", lambda: faster)
    assert fastest_dtype(small) == torch.float32
    assert fastest_dtype(large) == (torch.bfloat16 if faster else torch.float32)
    assert fastest_dtype([large[0].half()]) == torch.float16
    assert fastest_dtype([large[0].to("meta")]) == torch.float32


@pytest.mark.parametrize(("plain", "low", "pays"), [(1.6, 1, True), (1.4, 1, False), (1, 5, False)])
def test_the_measurement_decides(monkeypatch, plain, low, pays):
    def seconds(product):
        return plain if product[0].dtype == torch.float32 else low

    monkeypatch.setattr(precision, "_seconds", seconds)
    precision.bfloat16_pays.cache_clear()
    assert precision.bfloat16_pays() is pays
    precision.bfloat16_pays.cache_clear()


@pytest.mark.parametrize("interrupted", range(8))
def test_an_interruption_does_not_decide(monkeypatch, interrupted):
    low = []

    def sample(product):
        if product[0].dtype == torch.float32:
            return 2.0
        low.append(product)
        return 100.0 if len(low) - 1 == interrupted else 1.0

    monkeypatch.setattr(precision, "_seconds", sample)
    precision.bfloat16_pays.cache_clear()
    assert precision.bfloat16_pays()
    precision.bfloat16_pays.cache_clear()


def test_a_given_dtype_is_that_of_the_search():
    assert load_clip(device="cpu").text.matrix_dtype is None
    clip = load_clip(device="cpu", dtype=torch.float32)
    assert clip.text.matrix_dtype == torch.float32
    assert clip.to(dtype=torch.bfloat16).text.matrix_dtype == torch.bfloat16


def test_similarities_of_results_are_in_float32(emoji_clip):
    clip = load_clip(device="cpu")
    clip.text.matrix_dtype = torch.bfloat16
    (target,) = emoji_clip.encode_texts(["a blue fish"])
    options = SearchOptions(prompt_len=4, steps=10, swaps=4, seed=1)
    (found,) = invert(clip, target[None], options)
    expected = float(emoji_clip.encode_texts([found.prompt])[0] @ target)
    assert found.similarity == pytest.approx(expected, abs=1e-5)


def test_the_screen_finds_what_an_exact_product_finds(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(3000, 64, generator=generator)
    table[7] = table[2000]  # of equals the first is found
    # others that differ by less than bfloat16 tells apart, and by more than float32 rounds
    table[100:180] = table[99] + 1e-2 * torch.randn(80, 64, generator=generator)
    rows = torch.cat([table[[7, 99, 150, 1234]], torch.randn(200, 64, generator=generator)])
    space = TokenSpace(table)
    assert space._screen is None  # it is small
    plain = space.nearest(rows)
    space._screen = _Screen(F.normalize(table, dim=-1))
    position, sure = space._screen.best(rows)
    assert not sure.all() and sure.float().mean() > 0.9
    assert torch.equal(position[sure], plain[sure])
    assert torch.equal(space.nearest(rows), plain)


def test_the_screen_is_for_large_tables_on_processors_that_gain(monkeypatch):
    large = torch.ones(_LARGE_TABLE // 64, 64)
    for pays in (True, False):
        monkeypatch.setattr("pez_core.space.bfloat16_pays", lambda pays=pays: pays)
        assert (TokenSpace(large)._screen is not None) == pays
        assert TokenSpace(large[: 2 * _LOOKED_AT])._screen is None
