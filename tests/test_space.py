import pytest
import torch

from pez_core import TokenSpace, space


@pytest.fixture
def table():
    return torch.randn(500, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("chunk, block", [(2**26, 2**14), (1000, 500), (1, 7)])
def test_nearest_is_the_highest_cosine(table, chunk, block, packed, monkeypatch):
    monkeypatch.setattr(space, "_CHUNK", chunk)
    monkeypatch.setattr(space, "_CPU_BLOCK", block)
    if not packed:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    queries = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(1))
    cosines = torch.nn.functional.cosine_similarity(queries[..., None, :], table, dim=-1)
    assert torch.equal(TokenSpace(table).nearest(queries), cosines.argmax(-1))


def test_the_first_of_equal_tokens_is_taken(table, monkeypatch):
    monkeypatch.setattr(space, "_CPU_BLOCK", 100)
    twice = torch.cat([table, table])
    ids = torch.arange(500)
    assert torch.equal(TokenSpace(twice).nearest(twice[:500]), ids)


def test_only_allowed_tokens_are_nearest(table):
    allowed = torch.tensor([3, 77, 400])
    here = TokenSpace(table, allowed)
    queries = torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    cosines = torch.nn.functional.cosine_similarity(queries[:, None], table[allowed], dim=-1)
    assert torch.equal(here.nearest(queries), allowed[cosines.argmax(-1)])
    assert set(here.random(20, 5, torch.Generator()).flatten().tolist()) == {3, 77, 400}


def test_a_token_is_nearest_to_itself_at_any_scale(table):
    ids = torch.arange(500).view(50, 10)
    here = TokenSpace(table)
    assert torch.equal(here.nearest(here.embed(ids) * 1e-3), ids)


def test_random_is_reproducible_and_leaves_the_global_generator_alone(table):
    state = torch.get_rng_state()
    first, second = (
        TokenSpace(table).random(2, 8, torch.Generator().manual_seed(4)) for _ in range(2)
    )
    assert torch.equal(first, second) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("allowed", [[], [500], [-1]])
def test_bad_vocabulary(table, allowed):
    with pytest.raises(ValueError, match="`allowed`"):
        TokenSpace(table, torch.tensor(allowed, dtype=torch.long))
