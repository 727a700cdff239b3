"""For research: the published search, baselines in the same call, steps, seeds and errors."""

import statistics
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import all_words, make_clip
from test_tokenizers import picture

from pez_core import (
    PezSettings,
    SearchOptions,
    TokenSpace,
    Vocabulary,
    baselines,
    invert,
    over_seeds,
    style,
)
from pez_core.baselines.common import per_problem
from pez_core.caption import Caption
from pez_core.clip.images import load_image
from pez_core.errors import ArgumentError
from pez_core.objectives import Similarity
from pez_core.problem import PromptTarget, prepare
from pez_core.seeds import child_seed, restart_seed

BASELINES = {
    "autoprompt": baselines.autoprompt,
    "autoprompt_sgd": baselines.autoprompt_sgd,
    "fluent_prompt": baselines.fluent_prompt,
    "soft_prompt": baselines.soft_prompt,
    "gcg": partial(baselines.gcg, topk=4, width=6),
}


def published(**fields):
    return SearchOptions(effort="paper", block_unsafe=False, **fields)


def algorithm_1(clip, target, allowed, seed, prompt_len, steps):
    """A plain rewrite of Algorithm 1 on one target: its best tokens and their similarity."""
    table = clip.text.token_embedding.detach()
    generator = torch.Generator().manual_seed(seed)
    ids = allowed[torch.randint(len(allowed), (1, prompt_len), generator=generator)]
    P = table[ids].clone().requires_grad_()
    optimizer = torch.optim.AdamW([P], lr=0.1, weight_decay=0.1)
    directions = F.normalize(table[allowed], dim=-1)
    best, top, losses = None, -2.0, []
    for _ in range(steps):
        near = allowed[(F.normalize(P.detach(), dim=-1) @ directions.T).argmax(-1)]
        projected = table[near].clone().requires_grad_()
        loss = 1 - (F.normalize(clip.text(projected), dim=-1) @ target).sum()
        (P.grad,) = torch.autograd.grad(loss, projected)
        optimizer.step()
        losses.append(float(loss.detach()))
        if 1 - losses[-1] > top:
            best, top = near[0].tolist(), 1 - losses[-1]
    return best, top, losses


@pytest.fixture(scope="module")
def clip():
    """All tokens may be used."""
    clip = make_clip()
    clip.trained_tokens = None
    return clip


def target_of(clip):
    return clip.encode_images([load_image(picture()[0])])[0]


# ------------------------------------------------------------------------- the published search


@pytest.mark.slow
def test_the_paper_effort_is_algorithm_1_on_all_tokens(clip):
    (result,) = invert(clip, picture(), published(prompt_len=5, steps=40))
    tokens = torch.tensor([i for i in range(49408) if i not in clip.text.words.special_ids])
    best, top, _ = algorithm_1(clip, target_of(clip), tokens, 0, 5, 40)
    assert result.loop_similarity == pytest.approx(top, abs=1e-5)
    assert result.learned == clip.text.words.decode(best)
    # pieces of words are among them, so that the text is read as other tokens
    words = clip.text.words
    assert result.token_ids == words.encode(result.prompt) != best
    feature = clip.encode_texts([result.prompt])[0]
    assert result.similarity == pytest.approx(float(feature @ target_of(clip)), abs=1e-5)
    assert abs(result.similarity - result.loop_similarity) > 1e-3


@pytest.mark.slow
def test_only_the_paper_effort_leaves_what_round_trips(clip):
    (result,) = invert(clip, picture(), all_words(prompt_len=5, swaps=0, steps=40))
    assert result.loop_similarity is None
    assert clip.text.words.encode(result.prompt) == result.token_ids
    # a vocabulary that is given counts for both
    words = Vocabulary(only=["cat", "dog", "fish"])
    (result,) = invert(clip, picture(), published(prompt_len=3, steps=5, vocabulary=words))
    assert {*result.learned.split()} <= {"cat", "dog", "fish"}
    assert result.loop_similarity == pytest.approx(result.similarity, abs=1e-5)


def test_the_paper_effort_knows_the_tokens_that_a_clip_was_trained_on(tiny_clip):
    (result,) = invert(tiny_clip, picture(), published(prompt_len=1, steps=30, trajectory=True))
    assert tiny_clip.trained_tokens.issuperset(result.trajectory.ids.flatten().tolist())


@pytest.mark.slow
def test_unsafe_words_stay_blocked_unless_they_are_allowed(clip, monkeypatch):
    """Also where pieces spell them: "nu" and "de" are both tokens."""
    encoder = clip.text.words.tokenizer.encoder
    pieces = torch.tensor(sorted([encoder["nu"], encoder["de</w>"]]))
    monkeypatch.setattr(
        "pez_core.problem._space", lambda clip, *_: TokenSpace(clip.text.token_embedding, pieces)
    )
    options = published(prompt_len=3, steps=30, lr=1.0, seed=range(24))
    pictures = [
        torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(k)) for k in range(24)
    ]

    def unsafe(options):
        return ["nude" in one.prompt.split() for one in invert(clip, pictures, options)]

    assert any(unsafe(options))
    assert not any(unsafe(replace(options, block_unsafe=True)))


# ------------------------------------------------------------------------- baselines


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_in_the_same_call_is_the_baseline_itself(name, clip):
    options = all_words(prompt_len=4, swaps=0, steps=6, method=BASELINES[name], restarts=2)
    (result,) = invert(clip, picture(), options)
    target = PromptTarget(target_of(clip)[None], torch.ones(1), torch.zeros(1).bool())
    problem = prepare(clip, [target], options, 4, Caption(clip), 0.0)
    objective = Similarity(clip.text.encoder(), target.features[None].repeat(2, 1, 1))
    draws = [torch.Generator().manual_seed(child_seed(seed, 0, 0)) for seed in problem.search_seeds]
    settings, ids = PezSettings(steps=6), problem.ids.flatten(0, 1)
    found = BASELINES[name](problem.space, objective, ids, settings, generator=draws)
    rows = [one.token_ids for one in result.candidates]
    assert sorted(rows) == sorted(found.ids.tolist())
    plain = invert(clip, picture(), replace(options, method=None))[0]
    assert [c.token_ids for c in plain.candidates] != rows


@pytest.mark.parametrize("name", BASELINES)
def test_the_result_of_a_baseline_does_not_depend_on_its_neighbours(name, clip):
    options = all_words(prompt_len=3, swaps=0, steps=5, method=BASELINES[name])
    pictures = [*picture(), 1 - picture()[0]]
    together = invert(clip, pictures, options)
    alone = [invert(clip, one, options)[0] for one in pictures]
    assert [one.prompt for one in together] == [one.prompt for one in alone]


def test_a_baseline_keeps_the_rules_of_the_call(clip):
    words = Vocabulary(only=["red car", "blue house", "old dog"])
    options = SearchOptions(
        prompt_len=4, swaps=0, steps=6, method=BASELINES["gcg"], vocabulary=words, effort="fast"
    )
    (result,) = invert(clip, picture(), options, caption="a photo of")
    parts = result.learned.split()
    assert {" ".join(parts[:2]), " ".join(parts[2:])} <= {"red car", "blue house", "old dog"}
    reports = []
    invert(clip, picture(), options, callback=reports.append)
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6]
    assert len(invert(clip, picture(), options, callback=lambda report: True)[0].history) == 1


def test_generators_of_problems():
    many = [torch.Generator().manual_seed(k) for k in range(3)]
    assert per_problem(many, 3) == many
    one = per_problem(torch.Generator().manual_seed(0), 3)
    assert len({g.initial_seed() for g in one}) == 3


@pytest.mark.parametrize(
    "fields, argument",
    [
        ({"method": baselines.gcg}, "method"),
        ({"method": baselines.gcg, "swaps": 0, "trajectory": True}, "trajectory"),
    ],
)
def test_a_baseline_is_measured_alone(fields, argument):
    with pytest.raises(ArgumentError) as caught:
        SearchOptions(**fields)
    assert caught.value.argument == argument


# ------------------------------------------------------------------------- steps


def test_the_trajectory_is_every_step_of_algorithm_1(clip):
    options = all_words(prompt_len=4, swaps=0, steps=12, restarts=2, trajectory=True)
    (result,) = invert(clip, picture(), options)
    found = {one.learned: one.trajectory for one in result.candidates}
    for restart in range(2):
        best, _, losses = algorithm_1(
            clip, target_of(clip), clip.vocabulary, restart_seed(0, restart), 4, 12
        )
        steps = found[clip.text.words.decode(best)]
        assert steps.ids.shape == (12, 1, 4) and steps.embeddings.shape == (12, 1, 4, 32)
        torch.testing.assert_close(steps.losses[:, 0], torch.tensor(losses), atol=1e-5, rtol=0)
        assert best in steps.ids[:, 0].tolist()
        space = TokenSpace(clip.text.token_embedding, clip.vocabulary)
        assert torch.equal(space.nearest(steps.embeddings[:, 0]), steps.ids[:, 0])
    assert invert(clip, picture(), replace(options, trajectory=False))[0].trajectory is None


def test_the_trajectory_changes_nothing_and_has_all_trials(clip):
    options = all_words(prompt_len=3, effort="fast", steps=4, swaps=3)
    (plain,) = invert(clip, picture(), options)
    (result,) = invert(clip, picture(), replace(options, trajectory=True))
    assert result.prompt == plain.prompt and result.history == plain.history
    assert result.trajectory.ids.shape == (4, options.work.trials, 3)


def test_the_trajectory_of_a_search_that_is_ended_early(clip):
    options = all_words(prompt_len=3, swaps=0, steps=9, restarts=2, batch_size=1, trajectory=True)
    (result,) = invert(clip, picture(), options, callback=lambda report: report.step == 3)
    lengths = [c.trajectory and len(c.trajectory.ids) for c in result.candidates]
    assert sorted(lengths, key=str) == [3, None]


# ------------------------------------------------------------------------- seeds


def test_seeds_are_independent_streams(clip):
    target = PromptTarget(target_of(clip)[None], torch.ones(1), torch.zeros(1).bool())
    starts = []
    for seed in range(3):
        options = all_words(prompt_len=8, swaps=0, restarts=4, seed=seed)
        problem = prepare(clip, [target], options, 8, Caption(clip), 0.0)
        starts += [tuple(row) for row in problem.ids[:, 0].tolist()]
        assert len(set(problem.search_seeds)) == 4
    assert len(set(starts)) == 12
    # the first restart starts from the seed itself
    children = np.random.SeedSequence(7).spawn(3)
    expected = [int(child.generate_state(1, np.uint64)[0]) % 2**63 for child in children]
    assert [restart_seed(7, k) for k in range(4)] == [7, *expected]
    assert restart_seed(2**63 + 5, 0) == 5


def test_one_restart_is_the_first_of_many(clip):
    options = all_words(prompt_len=3, swaps=0, steps=5)
    (one,) = invert(clip, picture(), options)
    (many,) = invert(clip, picture(), replace(options, restarts=3))
    assert one.prompt in [candidate.prompt for candidate in many.candidates]


@pytest.mark.slow
def test_mean_and_standard_error_over_seeds(clip):
    options = all_words(prompt_len=3, swaps=0, steps=5)
    found = over_seeds(lambda seed: invert(clip, picture(), replace(options, seed=seed)), range(4))
    values = [
        invert(clip, picture(), replace(options, seed=seed))[0].similarity for seed in range(4)
    ]
    assert found.values == values and len(found.results) == 4
    assert found.mean == pytest.approx(statistics.mean(values))
    assert found.standard_error == pytest.approx(statistics.stdev(values) / 2)
    assert str(found) == f"{found.mean:.4f} ± {found.standard_error:.4f} (4 seeds)"
    # images of one seed count as their mean, and other numbers can be taken
    both = [*picture(), 1 - picture()[0]]
    found = over_seeds(
        lambda seed: invert(clip, both, replace(options, seed=seed)),
        [3, 5],
        lambda result: len(result.prompt),
    )
    for seed, value in zip((3, 5), found.values, strict=True):
        results = invert(clip, both, replace(options, seed=seed))
        assert value == sum(len(result.prompt) for result in results) / 2
    single = over_seeds(lambda seed: style(clip, both, replace(options, seed=seed)), [0, 1])
    assert single.values == [result.similarity for result in single.results]


@pytest.mark.parametrize("seeds", [[1], [], [2, 2], [0, -1], ["0", 1]])
def test_seeds_that_give_no_error(seeds):
    with pytest.raises(ArgumentError, match="`seeds` has to"):
        over_seeds(lambda seed: None, seeds)
