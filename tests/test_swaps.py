"""Refinement: better prompts, one swap at a time, within all the rules."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from conftest import EXAMPLES, all_words, paper

from pez_core import (
    ArgumentError,
    JointClip,
    PezSettings,
    PhraseSpace,
    SwapSettings,
    TokenSpace,
    Vocabulary,
    invert,
    refine,
    search,
    style,
)
from pez_core.caption import Caption
from pez_core.clip.images import load_image
from pez_core.objectives import Similarity
from pez_core.priors import ReadabilityPrior, SumOfPriors
from pez_core.readability import as_written
from pez_core.single_words import SingleWordPrior, WordFeatures

QUICK = SwapSettings(steps=12, trials=3, screened=8)


@pytest.fixture(scope="module")
def features(emoji_clip):
    return emoji_clip.encode_images([load_image(path) for path in EXAMPLES[:4]])


@pytest.fixture(scope="module")
def space(emoji_clip):
    return TokenSpace(emoji_clip.text.token_embedding, emoji_clip.vocabulary)


def objective(clip, features):
    return Similarity(clip.text.encoder(), features[:, None])


def begin(space, problems, prompt_len, trials, seed=0):
    generators = [torch.Generator().manual_seed(seed + k) for k in range(problems)]
    return torch.cat([space.random(trials, prompt_len, one) for one in generators])


@torch.no_grad()
def best_swap(space, objective, row, i):
    """By brute force: the best prompt that differs from `row` at position i only."""
    rows = row.repeat(len(space.allowed), 1)
    rows[:, i] = space.allowed
    _, scores = objective(space.embed(rows), 0)
    return rows[scores.argmax()], scores.max()


def plain_cosines(model, rows, target):
    """Cosines of (n, prompt_len, dim) embeddings with a target, by all 77 tokens."""
    table, n = model.token_embedding.weight, rows.shape[1]
    edge = table[[49406, 49407]].detach().expand(len(rows), -1, -1)
    padding = table[:1].detach().expand(len(rows), 77 - n - 2, -1)
    x = torch.cat([edge[:, :1], rows, edge[:, 1:], padding], dim=1) + model.positional_embedding
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
    return torch.cosine_similarity(x[:, n + 1] @ model.text_projection, target[None])


def plain_refine(model, allowed, ids, target, steps, screened, candidates, seed, kicks=True):
    """The refinement of one prompt, slowly and independently of pez_core.

    Returns the best prompt after each step. Without `kicks` no token changes at random after a
    round.
    """
    table = model.token_embedding.weight.detach()
    order = torch.Generator().manual_seed(0)
    draws = torch.Generator().manual_seed(seed)
    x = [row.clone() for row in ids]

    def cosines(rows):
        with torch.no_grad():
            return plain_cosines(model, table[torch.stack(rows)], target).tolist()

    scores = cosines(x)
    best_score = max(scores)
    best = x[scores.index(best_score)].clone()
    places, trace = [], []
    for _ in range(steps):
        if not places:
            places = torch.randperm(len(best), generator=order).tolist()
        place = places.pop()
        embeddings = table[torch.stack(x)].requires_grad_()
        loss = (1 - plain_cosines(model, embeddings, target)).sum()
        gradient = torch.autograd.grad(loss, embeddings)[0][:, place].mean(0)

        def swapped(row, token, place=place):
            row = row.clone()
            row[place] = token
            return row

        # the tokens with the best slope, compared in the best trial
        slopes = (table[allowed] @ gradient).tolist()
        likely = sorted(range(len(allowed)), key=slopes.__getitem__)[:screened]
        lead = x[scores.index(max(scores))]
        exact = cosines([swapped(lead, allowed[k]) for k in likely])
        ranked = sorted(range(len(likely)), key=lambda k: -exact[k])[:candidates]
        tokens = [allowed[likely[k]] for k in ranked]
        # the best of them in each trial, where it is better
        for k, row in enumerate(x):
            tried = cosines([swapped(row, token) for token in tokens])
            if max(tried) > scores[k]:
                x[k], scores[k] = swapped(row, tokens[tried.index(max(tried))]), max(tried)
        if max(scores) > best_score:
            best_score = max(scores)
            best = x[scores.index(best_score)].clone()
        trace.append((best.tolist(), best_score))
        if not places and kicks:
            fresh = torch.randint(len(allowed), (len(x), len(best)), generator=draws)
            where = torch.randint(len(best), (len(x), 1), generator=draws)[:, 0].tolist()
            x = [best.clone() for _ in x]
            for k, i in enumerate(where):
                x[k][i] = allowed[fresh[k, i]]
            scores = cosines(x)
    return trace


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "emoji-clip"])
def test_every_step_equals_a_plain_implementation(name, tiny_clip, emoji_clip):
    """Rounds, candidates and the random changes between the rounds."""
    clip = {"tiny": tiny_clip, "emoji-clip": emoji_clip}[name]
    space = TokenSpace(clip.text.token_embedding, clip.vocabulary[::10])
    ids = begin(space, 2, 3, 4)
    targets = clip.encode_texts(["a red fish", "two small dogs"])
    settings = SwapSettings(steps=15, trials=4, screened=12, candidates=3)
    found = []

    def record(progress):
        found.append((progress.ids.tolist(), progress.scores.tolist()))

    refine(space, objective(clip, targets), ids, settings, record, seeds=[5, 6])
    changed = False
    for k in range(2):
        given = (clip.model, space.allowed, ids[4 * k : 4 * k + 4], targets[k])
        plain = plain_refine(*given, 15, 12, 3, seed=5 + k)
        assert [rows[k] for rows, _ in found] == [row for row, _ in plain]
        assert [scores[k] for _, scores in found] == pytest.approx(
            [score for _, score in plain], abs=1e-5
        )
        changed |= plain_refine(*given, 15, 12, 3, seed=5 + k, kicks=False)[-1] != plain[-1]
    assert changed  # the random changes matter here


def test_one_step_is_the_best_of_all_swaps_where_all_are_candidates(emoji_clip, features):
    space = TokenSpace(emoji_clip.text.token_embedding, emoji_clip.vocabulary[::40])
    ids = begin(space, 2, 5, 1)
    settings = SwapSettings(steps=1, trials=1, screened=len(space.allowed))
    found = refine(space, objective(emoji_clip, features[:2]), ids, settings, seeds=[0, 1])
    position = torch.randperm(5, generator=torch.Generator().manual_seed(0))[-1]
    for k in range(2):
        one = objective(emoji_clip, features[k : k + 1])
        row, score = best_swap(space, one, ids[k], position)
        assert found.ids[k].tolist() == row.tolist()
        assert found.scores[k] == pytest.approx(float(score), abs=1e-5)


@pytest.mark.slow
def test_a_few_rounds_end_where_no_single_swap_is_better(emoji_clip, features):
    space = TokenSpace(emoji_clip.text.token_embedding, emoji_clip.vocabulary[::60])
    settings = SwapSettings(steps=80, trials=2, screened=len(space.allowed))
    ids = begin(space, 1, 4, 2)
    one = objective(emoji_clip, features[:1])
    found = refine(space, one, ids, settings, seeds=[0])
    for i in range(4):
        _, score = best_swap(space, one, found.ids[0], i)
        assert score <= found.scores[0] + 1e-5


class Linear:
    """An objective that is linear in the embeddings; records how many rows it gets."""

    capturable = True

    def __init__(self, goal, before=0, rows=None):
        self.goal, self.before, self.rows = goal, before, [] if rows is None else rows

    def __call__(self, embeddings, step):
        self.rows.append(len(embeddings))
        score = (embeddings * self.goal).sum((1, 2)).view(*self._lead(embeddings)) + self.before
        return -score.flatten(), score.flatten()

    def _lead(self, embeddings):
        return (len(self.before), -1) if torch.is_tensor(self.before) else (-1,)

    def given(self, embeddings):
        first = embeddings.shape[1]
        before = (embeddings * self.goal[:first]).sum((1, 2))[:, None]
        return Linear(self.goal[first:], before, self.rows)


class Bonus:
    """A prior: a number for each token."""

    capturable = False

    def __init__(self, space, bonus):
        self.space, self.bonus = space, bonus

    def screen(self, ids, position):
        return self.bonus[self.space.allowed].expand(len(ids), -1)

    def corrections(self, swaps):
        return 0.0

    def score(self, ids):
        return self.bonus[ids].sum(1)


class Late(Bonus):
    """The same number, which is not known before a swap is compared."""

    def screen(self, ids, position):
        return torch.zeros(len(ids), len(self.space.allowed))

    def corrections(self, swaps):
        return self.bonus[swaps[..., 0]]


@pytest.fixture
def linear():
    """A space of few tokens, and an objective of three positions."""
    table = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    return TokenSpace(table), Linear(torch.randn(3, 4, generator=torch.Generator().manual_seed(1)))


START = torch.zeros(1, 3, dtype=torch.long)


def test_the_first_order_estimate_is_exact_for_a_linear_objective(linear):
    space, objective = linear
    settings = SwapSettings(steps=3, trials=1, screened=1)
    found = refine(space, objective, START, settings, seeds=[0])
    assert found.ids[0].tolist() == (objective.goal @ space.table.T).argmax(1).tolist()


@pytest.mark.parametrize(
    ("prior", "screened", "candidates"),
    [(Bonus, 1, 1), (Bonus, 30, 1), (Bonus, 30, 30), (Late, 30, 1), (Late, 30, 30)],
)
def test_a_prior_counts_in_each_choice_and_not_in_the_scores(linear, prior, screened, candidates):
    space, objective = linear
    bonus = torch.randn(30, generator=torch.Generator().manual_seed(2)) * 4
    settings = SwapSettings(steps=3, trials=1, screened=screened, candidates=candidates)
    found = refine(space, objective, START, settings, seeds=[0], prior=prior(space, bonus))
    alone = objective.goal @ space.table.T
    best = (alone + bonus).argmax(1)
    assert found.ids[0].tolist() == best.tolist() != alone.argmax(1).tolist()
    assert found.scores.item() == pytest.approx(alone[range(3), best].sum().item(), abs=1e-5)


def test_the_best_acceptable_candidate_is_swapped_in(linear):
    """However many better ones are refused; no prompt is asked about that is not better."""
    space, objective = linear
    alone, asked = objective.goal @ space.table.T, []
    refused = alone.topk(7).indices[:, :6].flatten()

    def acceptable(rows):
        asked.append(len(rows))
        return ~torch.isin(rows, refused).any(1)

    settings = SwapSettings(steps=3, trials=2, screened=30, candidates=30)
    first = next(token for token in range(30) if token not in refused)
    ids = torch.full((2, 3), first)
    found = refine(space, objective, ids, settings, acceptable=acceptable, seeds=[0])
    alone[:, refused] = -torch.inf
    assert found.ids[0].tolist() == alone.argmax(1).tolist()
    assert min(asked) > 0 and max(asked) <= 2


def test_the_random_changes_follow_the_seeds(linear, monkeypatch):
    space, objective = linear
    seeds, changed = [], TokenSpace.changed

    def record(self, ids, count, generator):
        seeds.append(generator.initial_seed())
        return changed(self, ids, count, generator)

    monkeypatch.setattr(TokenSpace, "changed", record)
    settings, ids = SwapSettings(steps=4, trials=2), START.repeat(6, 1)
    refine(space, objective, ids, settings, seeds=[5, 2**63 - 1, 2**63 + 7])
    assert seeds == [5, 2**63 - 1, 7]


def test_few_prompts_are_compared_at_once(linear, monkeypatch):
    space, objective = linear
    settings, ids = SwapSettings(steps=7, trials=2, screened=8), START.repeat(2, 1)
    found = []
    for rows in (2048, 6, 1):
        objective.rows.clear()
        monkeypatch.setattr("pez_core.swaps.ROWS", rows)
        found.append(refine(space, objective, ids, settings, seeds=[0]))
        assert max(objective.rows) == {2048: 8, 6: 6, 1: 2}[rows]
    assert found[0].history == found[1].history == found[2].history


def test_no_token_is_swapped_in_twice(linear):
    space, objective = linear
    once = TokenSpace(space.table, once=torch.arange(30))
    ids = torch.tensor([[0, 1, 2], [3, 4, 5]])
    # the second position is best with the token of the first
    objective.goal[1] = objective.goal[0] * 1.1
    free, found = (
        refine(one, objective, ids, SwapSettings(steps=24, trials=2, screened=30), seeds=[0])
        for one in (space, once)
    )
    every = torch.cartesian_prod(*[torch.arange(30)] * 3)
    scores = objective(space.embed(every), 0)[1]
    assert free.ids[0].tolist() == every[scores.argmax()].tolist()
    assert free.ids[0, 0] == free.ids[0, 1]
    scores[once.repeated(every)] = -torch.inf
    assert found.ids[0].tolist() == every[scores.argmax()].tolist()


class Eager:
    """A recorder whose graphs are the steps themselves."""

    failed = False

    def __init__(self):
        self.records = 0

    def warm_up(self, step):
        step()

    def record(self, step):
        self.records += 1
        return step


@pytest.mark.parametrize(
    "steps, capture, prior, records",
    [(15, True, None, 3), (14, True, None, 0), (15, False, None, 0), (15, True, Bonus, 0)],
)
def test_each_position_is_captured_where_that_pays(
    linear, monkeypatch, steps, capture, prior, records
):
    space, objective = linear
    recorder, ids = Eager(), START.repeat(2, 1)
    prior = prior and prior(space, torch.zeros(30))

    def run(capture):
        settings = SwapSettings(steps=steps, trials=2, screened=8, capture=capture)
        return refine(space, objective, ids, settings, seeds=[0], prior=prior)

    plain = run(False)
    monkeypatch.setattr("pez_core.capture.recorder_for", lambda device: recorder)
    assert run(capture).history == plain.history and recorder.records == records


def test_the_effort_of_the_defaults():
    settings = SwapSettings()
    assert (settings.steps, settings.trials) == (128, 16)
    assert (settings.screened, settings.candidates) == (128, 4)


@pytest.mark.slow
def test_it_beats_more_of_pez(emoji_clip, space, features):
    ids = begin(space, 4, 6, 4)
    one = objective(emoji_clip, features)
    start = search(space, one, ids, PezSettings(steps=20))
    longer = search(space, one, ids, PezSettings(steps=150)).scores.view(4, 4).max(1).values
    found = refine(space, one, start.ids, SwapSettings(steps=36, trials=4), seeds=range(4))
    assert (found.scores > longer).all()
    again = one(space.embed(found.ids), 0)[1]
    torch.testing.assert_close(found.scores, again, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_results_depend_on_nothing_in_the_batch(emoji_clip, space, features):
    ids = begin(space, 3, 5, 3)
    together = refine(space, objective(emoji_clip, features[:3]), ids, QUICK, seeds=[5, 6, 7])
    for k in range(3):
        one = objective(emoji_clip, features[k : k + 1])
        alone = refine(space, one, ids[3 * k : 3 * k + 3], QUICK, seeds=[5 + k])
        assert alone.ids.tolist() == together.ids[k : k + 1].tolist()
    other = refine(space, objective(emoji_clip, features[:3]), ids, QUICK, seeds=[8, 9, 10])
    assert other.ids.tolist() != together.ids.tolist()


def test_a_changed_prompt_differs_in_one_place_at_most(space):
    (ids,) = begin(space, 1, 6, 1)
    rows = space.changed(ids, 50, torch.Generator().manual_seed(0))
    differ = (rows != ids).sum(1)
    assert differ.max() == 1 and differ.float().mean() > 0.95
    assert set((rows != ids).nonzero()[:, 1].tolist()) == set(range(6))


def test_a_changed_phrase_is_a_phrase(emoji_clip):
    encode = emoji_clip.text.words.encode
    phrases = [tuple(encode(text)) for text in ("red car", "blue sky", "green tree", "a big fish")]
    space = PhraseSpace(emoji_clip.text.token_embedding, phrases, 7)
    (ids,) = begin(space, 1, 7, 1)
    rows = space.changed(ids, 30, torch.Generator().manual_seed(0))
    assert space.only_allowed(None)(rows).all() and (rows != ids).any(1).sum() > 4


def test_swaps_leave_whole_phrases(emoji_clip):
    encode = emoji_clip.text.words.encode
    phrases = [tuple(encode(text)) for text in ("red car", "blue", "yellow face", "a big fish")]
    space = PhraseSpace(emoji_clip.text.token_embedding, phrases, 7)
    ids = begin(space, 5, 7, 1)
    for position in range(7):
        gradient = torch.randn(5, 7 - position, emoji_clip.text.token_embedding.shape[1])
        swaps, bonus = space.swaps(ids, gradient, position, 4)
        swapped = space.swapped(ids, swaps, position)
        assert space.only_allowed(None)(swapped.flatten(0, 1)).all()
        # what fits nowhere changes nothing and is never among the best
        assert ((swapped == ids[:, None]).all(-1) >= (bonus == -torch.inf)).all()


def test_phrases_of_several_tokens_alone(emoji_clip):
    words = Vocabulary(only=["red car", "blue sky", "white snow", "yellow face", "green tree"])
    options = all_words(prompt_len=8, steps=3, swaps=24, vocabulary=words)
    (result,) = invert(emoji_clip, EXAMPLES[0], options)
    assert len(result.prompt.split()) == 8


def test_a_style_of_a_few_images_per_step(emoji_clip):
    options = all_words(prompt_len=4, steps=3, swaps=4, restarts=4)
    found = style(emoji_clip, EXAMPLES[:3], options, keep_content=True, images_per_step=2)
    assert len(found.candidates) == 4


def test_a_stop_at_the_last_step_of_pez_ends_all(emoji_clip):
    steps = []

    def stop(report):
        steps.append(report.step)
        return report.step == 5

    invert(emoji_clip, EXAMPLES[0], all_words(prompt_len=4, steps=5, swaps=9), callback=stop)
    assert steps == [1, 2, 3, 4, 5]


def test_only_acceptable_prompts_are_swapped_in(emoji_clip, space, features):
    ids = begin(space, 2, 5, 3)
    one = objective(emoji_clip, features[:2])
    free = refine(space, one, ids, QUICK, seeds=[0, 1])
    banned = set(free.ids.flatten().tolist()) - set(ids.flatten().tolist())
    asked = []

    def acceptable(rows):
        asked.append(len(rows))
        return torch.tensor([not banned & set(row) for row in rows.tolist()])

    found = refine(space, one, ids, QUICK, acceptable=acceptable, seeds=[0, 1])
    assert banned and not banned & set(found.ids.flatten().tolist())
    assert (found.scores > one(space.embed(ids[::3]), 0)[1]).all() and max(asked) <= len(ids)


@pytest.mark.slow
def test_whole_phrases_are_swapped_for_whole_phrases(emoji_clip, features):
    encode = emoji_clip.text.words.encode
    texts = ["red car", "blue", "yellow face", "a big fish", "sky", "white snow", "cat", "glass"]
    phrases = [tuple(encode(text)) for text in texts]
    space = PhraseSpace(emoji_clip.text.token_embedding, phrases, 5)
    ids = begin(space, 4, 5, 3)
    one = objective(emoji_clip, features)
    before = one(space.embed(ids), 0)[1].view(4, 3).max(1).values
    found = refine(space, one, ids, SwapSettings(steps=40, trials=3, screened=8), seeds=range(4))
    # every sequence of phrases of five tokens, and the best of them
    every = {
        sum(some, ())
        for n in range(1, 6)
        for some in itertools.product(phrases, repeat=n)
        if len(sum(some, ())) == 5
    }
    assert all(tuple(row) in every for row in found.ids.tolist())
    assert (found.scores > before).all()
    rows = torch.tensor(sorted(every))
    for k in range(4):
        scores = objective(emoji_clip, features[k : k + 1])(space.embed(rows), 0)[1]
        assert found.scores[k] >= scores.quantile(0.99)


def test_cancel_time_limit_patience_and_reports(emoji_clip, space, features, clock):
    ids = begin(space, 1, 5, 2)
    one = objective(emoji_clip, features[:1])
    seen = []

    def stop(progress):
        seen.append((progress.step, progress.scores.tolist()))
        return progress.step == 4

    settings = SwapSettings(steps=50, trials=2, screened=4)
    found = refine(space, one, ids, settings, stop, seeds=[0])
    assert found.stopped and found.step == 4 and found.history == seen
    scores = [score for _, (score,) in seen]
    assert scores == sorted(scores)

    clock.tick = 0.1  # the clock is read once per step, at its end
    limited = SwapSettings(steps=10**9, trials=2, screened=4, time_limit=0.75)
    found = refine(space, one, ids, limited, seeds=[0])
    assert found.step == 8 and found.elapsed == pytest.approx(0.8) and not found.stopped
    clock.tick = 0.0

    patient = SwapSettings(steps=10**4, trials=2, screened=4, patience=8)
    assert refine(space, one, ids, patient, seeds=[0]).step < 10**4


def test_a_nan_is_an_error(emoji_clip, space, features):
    broken = features[:1].clone()
    broken[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="float32"):
        refine(space, objective(emoji_clip, broken), begin(space, 1, 4, 3), QUICK, seeds=[0])


@pytest.mark.parametrize("name", ["steps", "trials", "screened", "candidates"])
def test_settings_out_of_range(name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        SwapSettings(**{name: 0})


def test_the_number_of_prompts_has_to_fit(emoji_clip, space, features):
    with pytest.raises(ValueError, match="1 \\* 3"):
        refine(space, objective(emoji_clip, features[:1]), begin(space, 1, 4, 2), QUICK, seeds=[0])


def test_products_are_dot_products_for_several_encoders():
    table = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    rows = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    allowed = torch.tensor([1, 4, 9, 30])
    for parts in (None, [(3, 0.25), (4, 0.75)]):
        space = TokenSpace(table, allowed, parts)
        torch.testing.assert_close(space.products(rows), rows @ table[allowed].T)


@pytest.mark.slow
def test_a_prior_moves_the_choice_and_not_the_score(emoji_clip, space, features):
    ids = begin(space, 2, 5, 3)
    one = objective(emoji_clip, features[:2])
    prior = SingleWordPrior(WordFeatures(emoji_clip), space, features[:2], 2.0)
    settings = SwapSettings(steps=20, trials=3, screened=8)
    free = refine(space, one, ids, settings, seeds=[0, 1])
    found = refine(space, one, ids, settings, seeds=[0, 1], prior=SumOfPriors([prior]))
    assert (prior.score(found.ids) > prior.score(free.ids)).all()
    again = one(space.embed(found.ids), 0)[1]
    torch.testing.assert_close(found.scores, again, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------- through the tasks


@pytest.mark.slow
def test_more_effort_finds_better_prompts(emoji_clip):
    means = {}
    for effort in ("fast", "balanced"):
        results = invert(emoji_clip, EXAMPLES[:4], all_words(prompt_len=8, effort=effort))
        for result in results:
            again = emoji_clip.encode_texts([result.prompt])[0]
            image = emoji_clip.encode_images([load_image(EXAMPLES[results.index(result)])])[0]
            assert result.similarity == pytest.approx(float(again @ image), abs=1e-5)
            assert result.history[-1][1] == pytest.approx(result.similarity, abs=1e-5)
        means[effort] = sum(result.similarity for result in results) / 4
    results = invert(emoji_clip, EXAMPLES[:4], paper(200, prompt_len=8))
    plain = sum(result.similarity for result in results) / 4
    assert plain < means["fast"] < means["balanced"]


def test_a_search_without_swaps_is_algorithm_1_alone(emoji_clip, features):
    (result,) = invert(emoji_clip, EXAMPLES[0], paper(25, prompt_len=6))
    generator = torch.Generator().manual_seed(0)
    space = TokenSpace(emoji_clip.text.token_embedding, emoji_clip.vocabulary)
    found = search(
        space,
        objective(emoji_clip, features[:1]),
        space.random(1, 6, generator),
        PezSettings(steps=25),
    )
    assert result.token_ids == found.ids[0].tolist() and result.history[-1][0] == 25


@pytest.mark.slow
def test_searches_in_turns_find_the_same(emoji_clip):
    options = all_words(prompt_len=5, steps=5, swaps=8, restarts=2, seed=3)
    together = invert(emoji_clip, EXAMPLES[:2], options)
    reports = []
    in_turns = replace(options, batch_size=1)
    apart = invert(emoji_clip, EXAMPLES[:2], in_turns, callback=reports.append)
    for a, b in zip(together, apart, strict=True):
        assert [c.prompt for c in a.candidates] == [c.prompt for c in b.candidates]
        assert b.history[-1][1] == pytest.approx(max(c.similarity for c in b.candidates), abs=1e-5)
    steps = [report.step for report in reports]
    assert steps == list(range(1, 4 * 13 + 1)) and {r.steps for r in reports} == {52}


def test_cancel_keeps_the_best_in_either_phase(emoji_clip):
    for last in (3, 9):
        seen = []

        def stop(report, seen=seen, last=last):
            seen.append(report)
            return report.step == last

        options = all_words(prompt_len=5, steps=5, swaps=20)
        (result,) = invert(emoji_clip, EXAMPLES[0], options, callback=stop)
        assert len(seen) == last and result.prompt == seen[-1].prompt
        assert result.similarity == pytest.approx(seen[-1].similarity, abs=1e-5)


@pytest.mark.slow
def test_rules_hold_in_swaps(emoji_clip):
    options = all_words(prompt_len=6, steps=5, swaps=24)
    (free,) = invert(emoji_clip, EXAMPLES[0], options)
    blocked = free.learned.split()[:3]
    (result,) = invert(
        emoji_clip,
        EXAMPLES[0],
        replace(options, vocabulary=Vocabulary(block=blocked, ascii_only=True)),
        caption="a picture of {} on white",
        avoid="a red heart",
    )
    assert result.prompt.startswith("a picture of ") and result.prompt.endswith(" on white")
    assert not set(blocked) & set(result.learned.split()) and result.learned.isascii()
    assert emoji_clip.text.words.encode(result.prompt) == result.token_ids
    score = result.similarity - 0.5 * result.avoided[0]
    assert result.history[-1][1] == pytest.approx(score, abs=1e-5)


@pytest.mark.slow
def test_two_encoders_are_refined_as_one(emoji_clip, vit_clip):
    both = JointClip([emoji_clip, vit_clip])
    (result,) = invert(
        both, EXAMPLES[0], all_words(effort="best", prompt_len=5, steps=10, swaps=15)
    )
    (plain,) = invert(both, EXAMPLES[0], paper(40, prompt_len=5))
    assert result.similarity > plain.similarity
    for clip in (emoji_clip, vit_clip):
        own = clip.encode_texts([result.prompt]) @ clip.encode_images([load_image(EXAMPLES[0])]).T
        assert result.encoders[clip.name] == pytest.approx(float(own), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"effort": "slow"}, "`effort` has to be one of 'fast', 'balanced', 'best'"),
        ({"time_limit": 0}, "`time_limit` has to be finite and above 0"),
        ({"swaps": -1}, "`swaps` has to be at least 0"),
        ({"readability": 1.5}, "`readability` has to be from 0 to 1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ArgumentError, match=message):
        all_words(**options)


# ------------------------------------------------------------------------- a language model


@pytest.fixture(scope="module")
def language_model():
    pytest.importorskip("transformers")
    from test_readability import make_lm

    return make_lm()


@pytest.mark.slow
def test_readable_prompts_read_better_and_report_it(emoji_clip, language_model, monkeypatch):
    # to an untrained model all texts are nearly the same
    monkeypatch.setattr("pez_core.priors._NAT", 0.5)
    options = all_words(steps=5, swaps=24, prompt_len=4)
    readable = replace(options, readability=1.0, language_model=language_model)
    plain, readable = (
        invert(emoji_clip, EXAMPLES[:2], chosen, caption="an emoji of {}")
        for chosen in (options, readable)
    )
    scores = [
        language_model.readability_score([result.prompt for result in results])
        for results in (plain, readable)
    ]
    assert (scores[1] > scores[0]).all()
    for result in readable:
        assert result.perplexity == pytest.approx(
            language_model.perplexity([as_written(result.prompt)]).item(), rel=1e-4
        )
        assert result.history[-1][1] == pytest.approx(result.similarity, abs=1e-5)
    assert {result.perplexity for result in plain} == {None}


@pytest.mark.slow
def test_only_whole_words_are_readable(emoji_clip, language_model):
    options = all_words(
        prompt_len=4,
        steps=5,
        swaps=8,
        readability=0.5,
        language_model=language_model,
        vocabulary=Vocabulary(whole_words=False),
    )
    (result,) = invert(emoji_clip, EXAMPLES[0], options)
    assert set(result.token_ids) <= set(emoji_clip.vocabulary.tolist())


def test_the_readability_prior_is_the_weighted_likelihood(emoji_clip, language_model):
    space = TokenSpace(emoji_clip.text.token_embedding, emoji_clip.vocabulary[::40])
    words = emoji_clip.text.words
    caption = Caption(emoji_clip, "a photo of {}")
    prior = ReadabilityPrior(language_model, words, caption, space, 0.4)
    ids = begin(space, 2, 3, 2)
    texts = [f"a photo of {words.decode(row)}" for row in ids.tolist()]
    expected = 0.02 * language_model.readability_score(texts)
    torch.testing.assert_close(prior.score(ids), expected, atol=1e-5, rtol=1e-4)
    table = language_model.table([words.decode([i]) for i in space.allowed.tolist()])
    rows = [["a", "photo", "of", *map(words.decode, [[i] for i in row])] for row in ids.tolist()]
    likely = language_model.screen(rows, table)[:, 4]
    torch.testing.assert_close(prior.screen(ids, 1), likely * 0.02 / 3, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"effort": "paper"}, {"steps": 5, "swaps": 0}])
def test_readability_needs_swaps(language_model, options):
    with pytest.raises(ArgumentError, match=r"`readability` is 0\.5, but it counts in the choice"):
        all_words(readability=0.5, language_model=language_model, **options)
