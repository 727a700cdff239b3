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


def test_nearest_of_several_encoders_is_the_highest_mean_cosine(table):
    other = torch.randn(500, 5, generator=torch.Generator().manual_seed(2)) * 40
    here = TokenSpace(torch.cat([table, other], dim=1), parts=[(12, 0.3), (5, 0.7)])
    queries = torch.randn(40, 17, generator=torch.Generator().manual_seed(1))
    cosine = torch.nn.functional.cosine_similarity
    mean = 0.3 * cosine(queries[:, None, :12], table, dim=-1)
    mean += 0.7 * cosine(queries[:, None, 12:], other, dim=-1)
    assert torch.equal(here.nearest(queries), mean.argmax(-1))
    assert not torch.equal(here.nearest(queries), TokenSpace(here.table).nearest(queries))


PHRASES = [(3,), (4, 5), (3, 9, 11), (8, 8), (20, 21, 22, 23), (6,)]


def every_prompt(prompt_len):
    """All that PHRASES can make, as tuples of tokens."""
    made = {0: {()}}
    for length in range(1, prompt_len + 1):
        made[length] = {
            head + phrase for phrase in PHRASES for head in made.get(length - len(phrase), ())
        }
    return sorted(made[prompt_len])


@pytest.mark.parametrize("chunk", [2**26, 1])
@pytest.mark.parametrize("prompt_len", [1, 4, 6])
def test_nearest_phrases_are_the_best_of_all_there_are(table, prompt_len, chunk, monkeypatch):
    monkeypatch.setattr(space, "_CHUNK", chunk)
    here = space.PhraseSpace(table, PHRASES, prompt_len)
    queries = torch.randn(9, prompt_len, 12, generator=torch.Generator().manual_seed(3))
    queries *= torch.rand(9, prompt_len, 1, generator=torch.Generator().manual_seed(4)) * 9 + 0.1
    prompts = torch.tensor(every_prompt(prompt_len))
    cosines = torch.nn.functional.cosine_similarity(queries[:, None], table[prompts], dim=-1)
    assert torch.equal(here.nearest(queries), prompts[cosines.sum(-1).argmax(-1)])


def test_phrases_of_one_token_are_a_token_space(table):
    allowed = torch.tensor([3, 77, 400])
    queries = torch.randn(5, 8, 12, generator=torch.Generator().manual_seed(1))
    phrases = space.PhraseSpace(table, [(77,), (3,), (400,)], 8)
    assert torch.equal(phrases.nearest(queries), TokenSpace(table, allowed).nearest(queries))


def test_random_phrases_fill_the_prompt(table):
    prompts = set(every_prompt(6))
    rows = space.PhraseSpace(table, PHRASES, 6).random(50, 6, torch.Generator().manual_seed(0))
    assert {tuple(row) for row in rows.tolist()} <= prompts
    assert len({tuple(row) for row in rows.tolist()}) > 10


def test_a_prompt_stays_where_it_is_while_nothing_moves_it(table):
    here = space.PhraseSpace(table, PHRASES, 6)
    rows = here.random(20, 6, torch.Generator().manual_seed(5))
    assert torch.equal(here.nearest(here.embed(rows)), rows)


def test_phrases_that_cannot_add_up(table):
    with pytest.raises(ValueError, match=r"`prompt_len` is 7.*3, 5 tokens.*6 or 8"):
        space.PhraseSpace(table, [(1, 2, 3), (1, 2, 3, 4, 5)], 7)


# ------------------------------------------------------------------------- no word twice


def test_nearest_without_repeats(table):
    """From left to right, each the nearest of those that are left: compared with a plain loop."""
    beside, length = [3, 17], 6
    once = torch.arange(40)
    here = TokenSpace(table, torch.arange(60), once=once, beside=beside)
    rows = torch.randn(20, 1, table.shape[1], generator=torch.Generator().manual_seed(2))
    queries = rows + 0.1 * rows.roll(1).repeat(1, length, 1) * torch.arange(length)[:, None]
    similar = torch.nn.functional.cosine_similarity
    cosines = similar(queries[:, :, None], table[:60], dim=-1)
    expected = []
    for row in cosines.tolist():
        ids = list(beside)
        for values in row:
            order = sorted(range(60), key=lambda i: -values[i])
            ids.append(next(i for i in order if i >= 40 or i not in ids))
        expected.append(ids[len(beside) :])
    found = here.nearest(queries)
    assert found.tolist() == expected
    plain = TokenSpace(table, torch.arange(60)).nearest(queries)
    assert not torch.equal(found, plain)  # the queries of a row are alike
    assert not here.repeated(found).any()
    # those that may repeat do
    assert any(len(set(row)) < length for row in found.tolist())


def test_which_prompts_repeat_a_word(table):
    here = TokenSpace(table, once=torch.arange(10), beside=[4, 20])
    rows = torch.tensor([[1, 2, 3], [1, 2, 1], [30, 30, 1], [4, 1, 2], [20, 1, 20]])
    assert here.repeated(rows).tolist() == [False, True, False, True, False]
    assert here.repeated(rows[:, None]).tolist() == [[False], [True], [False], [True], [False]]
    assert not TokenSpace(table).repeated(rows).any()


def test_random_prompts_and_swaps_without_repeats(table):
    here = TokenSpace(table, torch.arange(12), once=torch.arange(12), beside=[0, 50])
    generator = torch.Generator().manual_seed(0)
    rows = here.random(30, 8, generator)
    assert not here.repeated(rows).any() and len(rows.unique()) == 11
    gradient = torch.randn(30, 8, table.shape[1], generator=generator)
    swaps, _ = here.swaps(rows, gradient, 0, 4)
    swapped = here.swapped(rows, swaps, 0)
    # 12 words without seven others and one beside: the four are the only ones left
    assert not here.repeated(swapped).any()
