"""The prior of single words, and the features that it asks for."""

import statistics
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import EXAMPLES, Alone, all_words

from pez_core import TokenSpace, invert, load_clip
from pez_core.single_words import SingleWordPrior, WordFeatures, familiarity


class Tower:
    """A CLIP whose text tower records how many texts it gets at once."""

    device = torch.device("cpu")

    def __init__(self, tokens, causal=True):
        self.sizes, self.cache = [], {}
        table = torch.randn(tokens, 6, generator=torch.Generator().manual_seed(0))
        self.text = SimpleNamespace(
            causal=causal, token_embedding=table, encoder=lambda: self.encode
        )

    def encode(self, embeddings):
        self.sizes.append(len(embeddings))
        return embeddings[:, 0, :4] * 2

    @property
    def expected(self):
        return F.normalize(self.text.token_embedding[:, :4], dim=1)


def test_features_are_computed_once_and_kept_until_the_weights_change():
    clip = Tower(40)
    features = WordFeatures(clip)
    assert clip.sizes == []
    ids = torch.tensor([3, 7, 3])
    torch.testing.assert_close(features(ids), clip.expected[ids])
    assert clip.sizes == [2]
    features(torch.tensor([7, 9]))
    assert clip.sizes == [2, 1]
    # the next search knows them, after a look at up to four
    again = WordFeatures(clip)
    torch.testing.assert_close(again(torch.tensor([9, 7, 3])), clip.expected[[9, 7, 3]])
    assert clip.sizes == [2, 1, 3]
    clip.text.token_embedding[3] += 1
    fresh = WordFeatures(clip)
    torch.testing.assert_close(fresh(torch.tensor([9, 3])), clip.expected[[9, 3]])
    assert clip.sizes == [2, 1, 3, 3, 2]


@pytest.mark.parametrize(
    ("causal", "tokens", "sizes"), [(True, 5000, [2048, 2048, 904]), (False, 140, [64, 64, 12])]
)
def test_few_texts_are_encoded_at_once(causal, tokens, sizes):
    clip = Tower(tokens, causal)
    torch.testing.assert_close(WordFeatures(clip)(torch.arange(tokens)), clip.expected)
    assert clip.sizes == sizes


def test_features_are_those_of_the_words_as_texts(emoji_clip):
    ids = emoji_clip.vocabulary[::500]
    texts = [emoji_clip.text.words.decode([i]) for i in ids.tolist()]
    emoji_clip.cache.clear()
    torch.testing.assert_close(
        WordFeatures(emoji_clip)(ids), emoji_clip.encode_texts(texts), atol=1e-5, rtol=0
    )


@pytest.fixture
def parts():
    """A space of 40 of 60 tokens, features of all tokens, and two targets."""
    draw = torch.Generator().manual_seed(0)
    space = TokenSpace(torch.randn(60, 5, generator=draw), torch.arange(10, 50))
    features = F.normalize(torch.randn(60, 8, generator=draw), dim=1)
    return space, features, F.normalize(torch.randn(2, 8, generator=draw), dim=1)


def expected_parts(space, features, towards, sample):
    """By problem and token, what the score counts a token with and what its first estimate is."""
    known = dict(
        zip(space.allowed.tolist(), familiarity(space.table[space.allowed]).tolist(), strict=True)
    )
    exact, first = [], []
    for target in towards:
        own = {i: float(features[i] @ target) for i in space.allowed.tolist()}
        some = [own[i] for i in space.allowed.tolist()[:: 40 // sample]]
        spread = 0.7 * statistics.pstdev(some)
        exact.append({i: own[i] + spread * known[i] for i in own})
        first.append({i: statistics.mean(some) + spread * known[i] for i in own})
    return exact, first


def test_single_words_count_by_similarity_and_familiarity(parts):
    space, features, towards = parts
    prior = SingleWordPrior(Alone(features, sample=10), space, towards, 0.5)
    exact, _ = expected_parts(space, features, towards, 10)
    ids = space.random(6, 4, torch.Generator().manual_seed(1))
    for row, bonus in enumerate(prior.score(ids).tolist()):
        assert bonus == pytest.approx(0.5 * sum(exact[row // 3][i] for i in ids[row].tolist()))


def test_a_word_is_estimated_until_it_is_compared(parts):
    space, features, towards = parts
    words = Alone(features, sample=10)
    prior = SingleWordPrior(words, space, towards, 0.5)
    exact, first = expected_parts(space, features, towards, 10)
    ids = space.random(4, 3, torch.Generator().manual_seed(1))  # two rows of each problem

    def screened():
        return [dict(zip(space.allowed.tolist(), r.tolist(), strict=True)) for r in
                prior.screen(ids, 0)]  # fmt: skip

    for row, values in enumerate(screened()):
        assert values == pytest.approx({i: 0.5 * v for i, v in first[row // 2].items()}, abs=1e-6)
    words.asked.clear()
    swaps = torch.tensor([[20, 31], [31, 20], [12, 20], [45, 12]])[..., None]
    changes = prior.corrections(swaps)
    assert len(words.asked) == 1  # no other word was encoded
    for row, change in enumerate(changes.tolist()):
        for token, one in zip(swaps[row, :, 0].tolist(), change, strict=True):
            right = exact[row // 2][token] - first[row // 2][token]
            assert one == pytest.approx(0.5 * right, abs=1e-6)
    # compared once, they are known, for this problem alone
    for row, values in enumerate(screened()):
        met = ({20, 31}, {12, 20, 45})[row // 2]
        for token, value in values.items():
            kind = exact if token in met else first
            assert value == pytest.approx(0.5 * kind[row // 2][token], abs=1e-6)
    assert not prior.corrections(swaps).any()
    # a word that the other problem has met is still an estimate here
    (change,) = prior.corrections(torch.tensor([[[12]], [[20]]]))[0].tolist()
    assert change == pytest.approx(0.5 * (exact[0][12] - first[0][12]), abs=1e-6)


def test_all_words_are_known_at_once_where_a_graph_needs_that(parts):
    space, features, towards = parts
    prior = SingleWordPrior(Alone(features, all_at_once=True, sample=10), space, towards, 0.5)
    exact, _ = expected_parts(space, features, towards, 10)
    (row, _) = prior.screen(space.random(2, 3, torch.Generator()), 1)
    assert row.tolist() == pytest.approx(
        [0.5 * exact[0][i] for i in space.allowed.tolist()], abs=1e-6
    )
    assert prior.capturable
    assert not prior.corrections(torch.tensor([[[20]], [[31]]])).any()


def test_no_swap_is_no_word(parts):
    """-1 stands where a row has fewer swaps."""
    space, features, towards = parts
    prior = SingleWordPrior(Alone(features, sample=10), space, towards, 0.5)
    changes = prior.corrections(torch.tensor([[[20], [-1]], [[-1], [-1]]]))
    assert changes.shape == (2, 2) and changes.isfinite().all()


def test_familiar_tokens_are_far_from_the_mean():
    directions = torch.eye(5).repeat(2, 1)
    directions[5:] *= -1  # the mean is zero
    lengths = torch.tensor([3.0, 1, 7, 2, 5, 3.1, 1.1, 7.1, 2.1, 5.1])
    known = familiarity(directions * lengths[:, None] + 100.0)
    assert known.argsort().tolist() == [1, 6, 3, 8, 0, 5, 4, 9, 2, 7]
    assert known.mean() == pytest.approx(0, abs=1e-6)
    assert familiarity(torch.ones(1, 3)).isfinite().all()


@pytest.mark.slow
def test_features_of_single_words_follow_changed_weights():
    used, fresh = (load_clip("emoji-clip", device="cpu") for _ in range(2))

    def find(clip):
        options = all_words(prompt_len=3, effort="fast", steps=2, swaps=6)
        return invert(clip, EXAMPLES[0], options)[0].prompt

    before = find(used)
    with torch.no_grad():
        for clip in (used, fresh):
            clip.text.token_embedding.copy_(clip.text.token_embedding.flip(0))
    assert find(used) == find(fresh) != before
