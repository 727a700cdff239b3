"""The other methods, on problems with a known answer."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from conftest import EXAMPLES

from pez_core import PezSettings, TokenSpace, search
from pez_core.baselines import (
    Interrogator,
    autoprompt,
    autoprompt_sgd,
    common,
    fluent_prompt,
    gcg,
    interrogator,
    load_bank,
    soft_prompt,
    vgd,
)
from pez_core.clip.images import load_image
from pez_core.objectives import Similarity

METHODS = {
    "autoprompt": partial(autoprompt, candidates=6),
    "autoprompt k=1": partial(autoprompt, candidates=1),
    "gcg": partial(gcg, topk=16, width=24),
    "autoprompt_sgd": autoprompt_sgd,
    "fluent_prompt": fluent_prompt,
    "soft_prompt": soft_prompt,
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
drawing_method = pytest.mark.parametrize("name", ["autoprompt", "gcg", "fluent_prompt"])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Recorded(TokenSpace):
    """A space that remembers all that was to be projected, and what it became."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.asked, self.answers = [], []

    def nearest(self, embeddings):
        self.asked.append(embeddings.clone())
        self.answers.append(super().nearest(embeddings))
        return self.answers[-1]


@pytest.fixture
def space():
    """40 random tokens in 6 dimensions, the first and last five not allowed."""
    return TokenSpace(torch.randn(40, 6, generator=seeded(7)), torch.arange(5, 35))


def circle(count):
    angles = torch.arange(count) * (2 * math.pi / count)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


class Pointwise:
    """A loss that is a sum over positions, for several candidates per problem.

    `passes` holds the embeddings and losses of every call that had a gradient, `tries` of the
    others.
    """

    def __init__(self, goals, loss):
        self.goals, self.loss = goals, loss
        self.passes, self.tries = [], []

    def __call__(self, embeddings, step):
        rows = embeddings.view(len(self.goals), -1, *embeddings.shape[1:])
        loss = self.loss(rows, self.goals[:, None]).sum((-1, -2)).flatten()
        calls = self.passes if embeddings.requires_grad else self.tries
        calls.append((embeddings.detach().clone(), loss.detach()))
        return loss, -loss


def quadratic(goals):
    return Pointwise(goals, lambda rows, goals: (rows - goals) ** 2)


def linear(goals):
    return Pointwise(goals, lambda rows, goals: -rows * goals)


def optimum(space, objective):
    """(problems, prompt_len) ids of the lowest loss, each position by itself."""
    tokens = space.table[space.allowed]
    each = objective.loss(tokens, objective.goals[:, :, None]).sum(-1)
    return space.allowed[each.argmin(-1)]


def ids_of(space, embeddings):
    return torch.cdist(embeddings, space.table.expand(len(embeddings), -1, -1)).argmin(-1)


@pytest.fixture
def start():
    return torch.tensor([[5, 6, 7, 8], [30, 30, 30, 30], [34, 5, 34, 5]])


GOALS = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(3))


# AutoPrompt


def test_autoprompt_that_tries_every_token_finds_the_optimum(space, start):
    objective = quadratic(GOALS)
    method = partial(autoprompt, candidates=len(space.allowed), generator=seeded())
    found = method(space, objective, start, PezSettings(steps=60))
    assert found.ids.tolist() == optimum(space, objective).tolist()


def test_one_estimate_is_exact_where_the_loss_is_linear(space, start):
    """A position is right from the step on that draws it, and nothing is tried."""
    objective = linear(GOALS)
    best = optimum(space, objective)
    assert not (start == best).any()
    found = autoprompt(
        space, objective, start, PezSettings(steps=40), generator=seeded(), candidates=1
    )
    assert found.ids.tolist() == best.tolist()
    assert not objective.tries
    wrong = torch.stack([(ids_of(space, e) != best).sum(1) for e, _ in objective.passes])
    fewer = wrong[:-1] - wrong[1:]
    assert wrong[0].tolist() == [4, 4, 4] and fewer.min() == 0 and fewer.max() == 1
    assert wrong[1].tolist() == [3, 3, 3]  # the first draw cannot miss


def test_one_estimate_is_taken_as_it_is_and_more_have_to_lower_the_loss(space, start):
    losses = {}
    for k in (1, 4):
        objective = quadratic(GOALS)
        autoprompt(space, objective, start, PezSettings(steps=30), generator=seeded(), candidates=k)
        losses[k] = torch.stack([loss for _, loss in objective.passes])
    assert (losses[1].diff(dim=0) > 0).any()
    assert (losses[4].diff(dim=0) <= 1e-5).all() and (losses[4].diff(dim=0) < 0).any()


def test_autoprompt_tries_the_best_estimates_at_one_position(space, start):
    objective = quadratic(GOALS)
    found = autoprompt(
        space, objective, start, PezSettings(steps=1), generator=seeded(), candidates=5
    )
    losses = torch.cat([objective.passes[0][1][:, None], objective.tries[0][1].view(3, 5)], dim=1)
    torch.testing.assert_close(found.scores, -losses.min(dim=1).values)
    tried = ids_of(space, objective.tries[0][0]).view(3, 5, 4)
    slope = 2 * (space.table[start] - GOALS)
    places = set()
    for k in range(3):
        (place,) = (tried[k] != start[k]).any(0).nonzero()[:, 0].tolist()
        estimates = {
            token: float(slope[k, place] @ (space.table[token] - space.table[start[k, place]]))
            for token in space.allowed.tolist()
        }
        assert tried[k, :, place].tolist() == sorted(estimates, key=estimates.get)[:5]
        places.add(place)
    assert len(places) > 1  # each problem draws its own


# GCG


def test_gcg_finds_the_optimum(space, start):
    objective = quadratic(GOALS)
    found = gcg(space, objective, start, PezSettings(steps=30), generator=seeded(), width=300)
    assert found.ids.tolist() == optimum(space, objective).tolist()


def test_gcg_swaps_one_token_for_one_that_the_one_hot_gradient_favours(space, start):
    objective = quadratic(GOALS)
    gcg(space, objective, start, PezSettings(steps=1), generator=seeded(), topk=3, width=200)
    tried = ids_of(space, objective.tries[0][0]).view(3, 200, 4)
    one_hot = torch.nn.functional.one_hot(start, 40).float().requires_grad_()
    (((one_hot @ space.table) - GOALS) ** 2).sum().backward()
    seen = set()
    for k in range(3):
        for row in tried[k]:
            changed = (row != start[k]).nonzero()[:, 0].tolist()
            assert len(changed) == 1
            seen.add((k, changed[0], int(row[changed[0]])))
    favoured = {
        (k, place, token)
        for k in range(3)
        for place in range(4)
        for token in sorted(range(5, 35), key=lambda t: float(one_hot.grad[k, place, t]))[:3]
    }
    assert seen == favoured


def test_gcg_goes_on_from_the_best_candidate_even_if_it_is_worse(space, start):
    objective = quadratic(GOALS)
    found = gcg(space, objective, start, PezSettings(steps=30), generator=seeded(), topk=1, width=4)
    losses = torch.stack([loss for _, loss in objective.passes])
    assert (losses.diff(dim=0) > 0).any()
    for (_, tried), now in zip(objective.tries, losses[1:], strict=False):
        torch.testing.assert_close(tried.view(3, 4).min(1).values, now)
    every = torch.cat([losses, *(tried.view(3, 4).T for _, tried in objective.tries)])
    torch.testing.assert_close(found.scores, -every.min(0).values)


@pytest.mark.parametrize("name", ["autoprompt", "gcg"])
def test_candidates_may_be_encoded_in_parts(space, start, name, monkeypatch):
    method = METHODS[name]
    whole = method(space, quadratic(GOALS), start, PezSettings(steps=9), generator=seeded())
    monkeypatch.setattr(common, "_ROWS", 10)
    objective = quadratic(GOALS)
    parts = method(space, objective, start, PezSettings(steps=9), generator=seeded())
    assert max(len(embeddings) for embeddings, _ in objective.tries) == 9
    assert parts.ids.tolist() == whole.ids.tolist() and parts.history == whole.history


# projected gradient descent


def test_projected_sgd_begins_like_search_and_then_forgets():
    goals = torch.randn(1, 3, 6, generator=seeded(9))
    table, ids = torch.randn(40, 6, generator=seeded(8)), torch.tensor([[5, 6, 7]])
    spaces = Recorded(table), Recorded(table)
    search(spaces[0], quadratic(goals), ids, PezSettings(steps=4))
    autoprompt_sgd(spaces[1], quadratic(goals), ids, PezSettings(steps=4))
    theirs, ours = (torch.stack(space.asked) for space in spaces)
    assert torch.equal(ours[:2], theirs[:2])
    assert not torch.equal(ours[2:], theirs[2:])
    # each step of it begins at a token, from which AdamW takes it by lr at most in each coordinate
    for answer, after in zip(spaces[1].answers[:-1], ours[1:], strict=True):
        assert (after - table[answer] * (1 - 0.1 * 0.1)).abs().max() <= 0.1 * 1.5


def test_steps_shorter_than_half_the_spacing_lead_nowhere_without_memory():
    """Eight tokens on a circle of radius 1: half way to the next is 0.39, a step about 0.14."""
    table = circle(8)
    space, ids = TokenSpace(table), torch.tensor([[0]])
    found = search(space, quadratic(table[[3]][None]), ids, PezSettings(steps=100))
    assert found.ids.item() == 3
    objective = quadratic(table[[3]][None])
    found = autoprompt_sgd(space, objective, ids, PezSettings(steps=100))
    assert found.ids.item() == 0
    assert all(torch.equal(embeddings, table[ids]) for embeddings, _ in objective.passes)
    found = autoprompt_sgd(space, quadratic(table[[3]][None]), ids, PezSettings(steps=100, lr=0.5))
    assert found.ids.item() == 3


def test_noise_has_the_stated_scale_and_falls_geometrically():
    steps, lr = 20, 0.05
    space = Recorded(torch.randn(50, 400, generator=seeded()))
    flat = lambda embeddings, step: (embeddings.sum((-1, -2)) * 0,) * 2  # noqa: E731
    ids = torch.zeros(4, 5, dtype=torch.long)
    settings = PezSettings(steps=steps, lr=lr, weight_decay=0)
    fluent_prompt(space, flat, ids, settings, generator=seeded(1))
    for step in range(steps - 1):
        noise = space.asked[step + 1] - space.table[space.answers[step]]
        expected = math.sqrt(2 * lr * 10 ** (-4 * step / steps))
        assert noise.std().item() == pytest.approx(expected, rel=0.03)
        assert abs(noise.mean().item()) < 0.05 * expected
        assert not torch.isclose(noise[0], noise[1]).all()  # each problem draws its own


@pytest.mark.parametrize("name", ["autoprompt_sgd", "fluent_prompt"])
@pytest.mark.slow
def test_fluency_is_weighed_against_the_loss_and_scores_are_without_it(name):
    ids, fluent = torch.tensor([[20]]), circle(64)[[30]]
    plain = quadratic(circle(64)[[10]][None])
    fluency = lambda embeddings: ((embeddings - fluent) ** 2).sum((-1, -2))  # noqa: E731

    def run(objective, **options):
        space = Recorded(circle(64))
        found = METHODS[name](
            space, objective, ids, PezSettings(steps=300), generator=seeded(), **options
        )
        return torch.cat(space.answers).flatten().tolist(), found.scores.item()

    def both(embeddings, step):
        loss, score = plain(embeddings, step)
        return 0.7 * loss + 0.3 * fluency(embeddings), score

    mixed = run(plain, fluency=fluency, fluency_weight=0.3)
    assert mixed == run(both)
    alone = run(plain)
    assert alone == run(plain, fluency=fluency, fluency_weight=0.0) != mixed
    assert alone[0][-5:] == [10] * 5
    assert run(plain, fluency=fluency, fluency_weight=1.0)[0][-5:] == pytest.approx([30] * 5, abs=1)
    assert run(plain, fluency=fluency) == run(plain, fluency=fluency, fluency_weight=0.003)


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_bad_fluency_weight(space, start, weight):
    with pytest.raises(ValueError, match="`fluency_weight` has to be from 0 to 1"):
        autoprompt_sgd(space, quadratic(GOALS), start, fluency_weight=weight)


# soft prompts


def test_a_soft_prompt_reaches_the_optimum_and_its_projection_is_returned():
    space = Recorded(circle(16))
    goal = 1.7 * circle(64)[[9, 49]][None]  # between tokens 2 and 3, and 12 and 13
    settings = PezSettings(steps=400, weight_decay=0, report_every=150)
    found = soft_prompt(space, quadratic(goal), torch.tensor([[8, 5]]), settings)
    torch.testing.assert_close(found.embeddings, goal, atol=1e-2, rtol=0)
    assert found.soft_scores.item() == pytest.approx(0, abs=1e-3)
    assert found.ids.tolist() == [[2, 12]]
    hard = -((space.table[[2, 12]] - goal) ** 2).sum()
    assert found.scores.item() == pytest.approx(hard.item())
    # projected at the reports and nowhere else
    assert [step for step, _ in found.history] == [1, 150, 300, 400] and len(space.asked) == 4
    torch.testing.assert_close(space.asked[-1], found.embeddings)


@pytest.mark.parametrize("report_every", [1, 40])
def test_the_last_soft_prompt_counts_and_not_the_best(report_every):
    """The score rewards token 10 alone; the loss drives the prompt past it, to token 20."""
    space = TokenSpace(circle(64))

    def objective(embeddings, step):
        loss = ((embeddings - space.table[20]) ** 2).sum((-1, -2))
        return loss, -((embeddings - space.table[10]) ** 2).sum((-1, -2))

    seen = []
    settings = PezSettings(steps=200, weight_decay=0, report_every=report_every, patience=5)
    found = soft_prompt(
        space,
        objective,
        torch.tensor([[1]]),
        settings,
        lambda progress: seen.append((progress.step, progress.scores.tolist())),
    )
    assert found.step == 200 and found.ids.item() == 20
    assert found.history == seen
    _, scores = objective(space.table[20][None, None], 0)
    assert found.scores.item() == pytest.approx(scores.item())
    if report_every == 1:
        assert found.scores.item() < max(score for _, (score,) in seen) - 0.5


def test_a_soft_prompt_whose_projection_is_not_acceptable_has_none():
    space = TokenSpace(circle(64))
    found = soft_prompt(
        space,
        quadratic(space.table[[20]][None]),
        torch.tensor([[1]]),
        PezSettings(steps=200, weight_decay=0),
        acceptable=lambda ids: (ids % 2 == 1).all(-1),
    )
    assert found.scores.item() == -math.inf and found.ids.item() == 1
    assert max(score for _, (score,) in found.history) > -math.inf  # it passed odd tokens


# what all of them have in common


@every_method
def test_finds_better_prompts_for_a_clip(method, tiny_clip):
    space = TokenSpace(tiny_clip.text.token_embedding, tiny_clip.vocabulary)
    ids = space.random(2, 4, seeded(1))
    targets = torch.randn(2, 1, 16, generator=seeded(2))
    objective = Similarity(tiny_clip.text, targets)
    scores = lambda ids: objective(space.embed(ids), 0)[1].detach()  # noqa: E731
    # shorter steps leave projected SGD where it is
    found = method(space, objective, ids, PezSettings(steps=40, lr=0.5), generator=seeded())
    torch.testing.assert_close(found.scores, scores(found.ids))
    assert torch.isin(found.ids, space.allowed).all()
    if method is not soft_prompt:
        assert (found.scores > scores(ids)).all()
        assert found.history[0][1] <= found.history[-1][1]


@every_method
def test_a_problem_does_not_depend_on_its_neighbours(method, tiny_clip):
    space = TokenSpace(tiny_clip.text.token_embedding, tiny_clip.vocabulary)
    ids = space.random(3, 4, seeded(1))
    targets = torch.randn(3, 1, 16, generator=seeded(2))

    def run(rows):
        objective = Similarity(tiny_clip.text, targets[rows])
        return method(space, objective, ids[rows], PezSettings(steps=20), generator=seeded())

    alone, beside, other = run([0]), run([0, 1]), run([0, 2, 1])
    for found in (beside, other):
        assert found.ids[0].tolist() == alone.ids[0].tolist()
        torch.testing.assert_close(found.scores[:1], alone.scores)
    assert other.ids[2].tolist() != alone.ids[0].tolist()


@drawing_method
def test_generators_reproduce(name, space, start):
    settings = PezSettings(steps=6)
    runs = [
        METHODS[name](space, quadratic(GOALS), start, settings, generator=seeded(k)).history
        for k in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]


@drawing_method
def test_restarts_of_one_problem_draw_differently(name, space):
    start, goals = torch.full((4, 4), 5), GOALS[:1].expand(4, -1, -1)
    objective = quadratic(goals)
    METHODS[name](space, objective, start, PezSettings(steps=3, lr=1), generator=seeded())
    assert len(set(objective.passes[-1][1].tolist())) > 1


@every_method
def test_callback_sees_progress_and_stops(method, space, start):
    seen = []

    def callback(progress):
        seen.append((progress.step, progress.scores.tolist()))
        return progress.step >= 20

    settings = PezSettings(steps=500, report_every=10)
    found = method(space, quadratic(GOALS), start, settings, callback, generator=seeded())
    assert [step for step, _ in seen] == [1, 10, 20]
    assert found.stopped and found.step == 20 and found.history == seen


@every_method
def test_time_limit_ends_with_the_step_at_hand(method, space, start, clock):
    clock.tick = 0.1
    settings = PezSettings(steps=10**6, report_every=10**6, time_limit=2)
    found = method(space, quadratic(GOALS), start, settings, generator=seeded())
    assert 1 < found.step <= 20 and not found.stopped
    assert 2 <= found.elapsed < 2.5 and found.history[-1][0] == found.step


@every_method
def test_only_acceptable_prompts_are_kept(method, space, start):
    found = method(
        space,
        quadratic(GOALS),
        start,
        PezSettings(steps=5),
        acceptable=lambda ids: torch.zeros(len(ids), dtype=torch.bool),
        generator=seeded(),
    )
    assert found.scores.tolist() == [-math.inf] * 3 and torch.equal(found.ids, start)


@every_method
def test_works_inside_inference_mode_and_leaves_nothing_global_behind(method, space, start):
    state = torch.get_rng_state()
    outside = method(space, quadratic(GOALS), start, PezSettings(steps=5), generator=seeded())
    with torch.inference_mode():
        objective = quadratic(GOALS.clone())
        inside = method(space, objective, start.clone(), PezSettings(steps=5), generator=seeded())
    assert inside.history == outside.history
    with torch.no_grad():
        method(space, quadratic(GOALS), start, PezSettings(steps=1), generator=seeded())
        assert not torch.is_grad_enabled()
    assert torch.equal(state, torch.get_rng_state())


@every_method
def test_nan_is_an_error(method, space, start):
    def objective(embeddings, step):
        loss = quadratic(GOALS)(embeddings, step)[0] * (math.nan if step == 3 else 1)
        return loss, loss.detach()

    with pytest.raises(FloatingPointError, match="step 4"):
        method(space, objective, start, PezSettings(steps=9), generator=seeded())


@every_method
def test_a_nan_gradient_behind_a_finite_loss_is_an_error(method, space, start):
    def objective(embeddings, step):
        length = (embeddings * 0).norm(dim=-1).sum(-1)  # the slope of a norm at 0
        return length.sqrt(), length.detach()

    with pytest.raises(FloatingPointError):
        method(space, objective, start, PezSettings(steps=3), generator=seeded())


@every_method
@pytest.mark.parametrize("shape", [(4,), (0, 4), (1, 0)])
def test_bad_initial_ids(method, space, shape):
    with pytest.raises(ValueError, match="`ids`"):
        method(space, quadratic(GOALS), torch.full(shape, 9), generator=seeded())


@pytest.mark.parametrize(
    "method, options", [(autoprompt, "candidates"), (gcg, "topk"), (gcg, "width")]
)
def test_bad_counts(method, options, space, start):
    with pytest.raises(ValueError, match=f"`{options}` has to be at least 1 but is 0"):
        method(space, quadratic(GOALS), start, generator=seeded(), **{options: 0})


# CLIP Interrogator

BANK = {
    "artists": ["by Alan Lee", "inspired by Alan Lee", "by Hokusai"],
    "flavors": [
        "cute",
        "white background",
        "pixel art",
        "hd",
        "red and yellow",
        "smiling",
        "a fish in water",
        "food",
        "black and white",
        "sharp focus",
        "animal",
        "bright colors",
        "sad",
        "flat",
        "night",
        "love",
        "glass",
        "tree",
        "warm light",
        "round",
    ],
    "mediums": ["a cartoon", "a sketch", "a painting"],
    "movements": ["pop art", "cubism"],
    "trendings": ["unsplash", "trending on pixiv"],
    "negative": ["ugly"],
}
PHRASES = [phrase for kind in list(BANK)[:5] for phrase in BANK[kind]]


@pytest.fixture(scope="module")
def interrogate(emoji_clip):
    return Interrogator(emoji_clip, BANK).interrogate


@pytest.fixture(scope="module")
def fish(emoji_clip):
    return emoji_clip.encode_images([load_image(EXAMPLES[1])])


def greedy(clip, target, phrases, prompt, low, high, max_tokens=75):
    """The tool's chain, one text at a time. Returns the best prompt and the links tried."""
    similar = lambda text: float(clip.encode_texts([text])[0] @ target[0])  # noqa: E731
    short = lambda text: len(clip.tokenizer.encode(text)) <= max_tokens  # noqa: E731
    phrases = [phrase for phrase in phrases if short(phrase)]
    if not prompt:
        prompt = max(phrases, key=similar)
        phrases.remove(prompt)
    now, seen, links = similar(prompt), [prompt], 0
    while links < high and any(short(f"{prompt}, {p}") for p in phrases):
        options = [p for p in phrases if short(f"{prompt}, {p}")]
        phrase = max(options, key=lambda p: similar(f"{prompt}, {p}"))
        then = similar(f"{prompt}, {phrase}")
        links += 1
        if then <= now and links > low:
            break
        prompt, now = f"{prompt}, {phrase}", then
        phrases.remove(phrase)
        seen.append(prompt)
    return max(seen, key=similar), links


@pytest.mark.parametrize(
    "caption, low, high, max_tokens",
    [
        ("", 0, 32, None),
        ("", 9, 32, None),
        ("", 2, 3, None),
        ("a drawing of a dish", 0, 32, None),
        ("a drawing of a dish", 4, 10, 8),
        ("", 8, 32, 8),
        ("", 8, 32, 2),
    ],
)
@pytest.mark.slow
def test_the_chain_equals_a_plain_one(
    emoji_clip, interrogate, fish, caption, low, high, max_tokens
):
    found = interrogate(fish, caption, max_tokens, low, high, "chain")
    prompt, links = greedy(emoji_clip, fish, PHRASES, caption, low, high, max_tokens or 75)
    assert (found.prompt, found.step) == (prompt, links)
    assert found.score == pytest.approx(float(emoji_clip.encode_texts([prompt])[0] @ fish[0]))
    assert prompt.startswith(caption)
    assert len(emoji_clip.tokenizer.encode(prompt)) <= (max_tokens or 75)


@pytest.mark.slow
def test_the_cases_above_differ_in_what_they_test(emoji_clip, fish):
    plain = partial(greedy, emoji_clip, fish, PHRASES, "")
    assert plain(0, 32)[1] < plain(9, 32)[1]  # it goes on although it gets worse
    assert plain(9, 32)[0].count(", ") < plain(9, 32)[1]  # and the best on the way counts
    assert plain(2, 3)[1] == 3


def test_the_chain_chooses_among_the_preselected(emoji_clip, interrogate, fish, monkeypatch):
    monkeypatch.setattr(interrogator, "_PRESELECTED", 4)
    near = (emoji_clip.encode_texts(PHRASES) @ fish[0]).argsort(descending=True)[:4]
    few = [PHRASES[k] for k in near]
    found = interrogate(fish, mode="chain", min_flavors=6)
    assert (found.prompt, found.step) == greedy(emoji_clip, fish, few, "", 6, 32)
    assert found.step == 3  # then there are no more


@pytest.mark.slow
def test_fast_and_classic_modes_and_the_best_of_all(emoji_clip, interrogate, fish):
    def near(phrases, count=1):
        order = (emoji_clip.encode_texts(phrases) @ fish[0]).argsort(descending=True)
        return ", ".join(phrases[k] for k in order[:count])

    medium, artist = near(BANK["mediums"]), near(BANK["artists"])
    rest = f"{near(BANK['trendings'])}, {near(BANK['movements'])}, {near(BANK['flavors'], 3)}"
    expected = {
        "fast": (f"a dish, {near(PHRASES, 5)}", {"max_flavors": 5}),
        "classic": (f"a dish, {medium} {artist}, {rest}", {}),
    }
    for mode, (prompt, options) in expected.items():
        assert interrogate(fish, "a dish", mode=mode, **options).prompt == prompt
    assert interrogate(fish, mode="fast", max_flavors=5).prompt == near(PHRASES, 5)
    assert interrogate(fish, mode="classic").prompt == f"{medium} {artist}, {rest}"
    caption = f"{medium} of a fish"  # the medium is not said twice
    assert interrogate(fish, caption, mode="classic").prompt == f"{caption} {artist}, {rest}"

    for image in emoji_clip.encode_images([load_image(path) for path in EXAMPLES[:4]]):
        found = {
            mode: interrogate(image[None], "a dish", max_flavors=4, min_flavors=0, mode=mode)
            for mode in ("best", "fast", "classic", "chain")
        }
        best = max(one.score for one in found.values())
        assert found["best"].score == pytest.approx(best, abs=1e-6)
        assert found["best"].prompt in {found[m].prompt for m in ("fast", "classic", "chain")}


def test_the_caption_alone_may_be_the_best(emoji_clip):
    caption = "fish"
    target = emoji_clip.encode_texts([caption])
    found = Interrogator(emoji_clip, ["sad", "night"]).interrogate(target, caption)
    assert found.prompt == caption and found.score == pytest.approx(1)


@pytest.mark.parametrize("mode", ["best", "fast", "classic", "chain"])
@pytest.mark.parametrize("max_tokens", [1, 3, 5, 8, 20])
def test_no_mode_is_longer_than_it_may_be(emoji_clip, interrogate, fish, mode, max_tokens):
    found = interrogate(fish, max_tokens=max_tokens, max_flavors=9, mode=mode)
    assert 0 < len(emoji_clip.tokenizer.encode(found.prompt)) <= max_tokens


def test_several_images_have_one_prompt(emoji_clip, interrogate):
    images = [load_image(path) for path in EXAMPLES[:2]]
    features = emoji_clip.encode_images(images)
    found = interrogate(images, max_flavors=3)
    assert found.prompt == interrogate(5 * features, max_flavors=3).prompt
    similarities = emoji_clip.encode_texts([found.prompt]) @ features.T
    assert found.score == pytest.approx(similarities.mean().item())


def test_callback_and_time_limit_end_the_chain(interrogate, fish):
    seen = []

    def callback(done):
        seen.append((done.step, done.score))
        return done.step == 3

    found = interrogate(fish, callback=callback)
    assert found.stopped and found.step == 3 and found.history == seen
    assert all(a <= b for (_, a), (_, b) in pairwise(seen)) and found.score >= seen[-1][1] - 1e-6
    found = interrogate(fish, time_limit=1e-6)
    assert found.step == 1 and not found.stopped and found.elapsed > 0


def test_a_bank_may_lack_kinds(emoji_clip, fish):
    near = (emoji_clip.encode_texts(BANK["flavors"]) @ fish[0]).argsort(descending=True)[:3]
    found = Interrogator(emoji_clip, BANK["flavors"]).interrogate(fish, mode="classic")
    assert found.prompt == ", ".join(BANK["flavors"][k] for k in near)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "turbo"}, "`mode` has to be one of 'best', .* but is 'turbo'"),
        ({"max_tokens": 0}, "`max_tokens` has to be from 1 to 75 but is 0"),
        ({"max_tokens": 76}, "`max_tokens` has to be from 1 to 75 but is 76"),
        ({"min_flavors": -1}, "`min_flavors`"),
        ({"max_flavors": 0}, "`max_flavors`"),
        ({"time_limit": 0}, "`time_limit`"),
        ({"caption": "a red fish", "max_tokens": 2}, "`caption` has 3 tokens"),
    ],
)
def test_bad_options(interrogate, fish, options, message):
    with pytest.raises(ValueError, match=message):
        interrogate(fish, **options)


def test_bad_banks(emoji_clip, fish):
    for bank in ([], {"negative": ["ugly"]}):
        with pytest.raises(ValueError, match="`bank` has to hold phrases"):
            Interrogator(emoji_clip, bank)
    with pytest.raises(ValueError, match="the shortest phrase has 3 tokens"):
        Interrogator(emoji_clip, ["a red fish"]).interrogate(fish, max_tokens=2)


def write_bank(folder):
    folder.mkdir(parents=True)
    for kind in ("artists", "flavors", "mediums", "movements", "negative"):
        (folder / f"{kind}.txt").write_text(f"one {kind} é\n\n two {kind} \n", encoding="utf-8")
    return folder


def test_load_bank_from_a_folder(tmp_path):
    folder = write_bank(tmp_path / "bank")
    bank = load_bank(folder)
    assert bank["flavors"] == ["one flavors é", "two flavors"]
    assert bank["artists"] == [
        "by one artists é",
        "by two artists",
        "inspired by one artists é",
        "inspired by two artists",
    ]
    assert len(bank["trendings"]) == len(set(bank["trendings"])) == 4 * 18
    assert {"behance", "trending on behance", "featured on behance"} < set(bank["trendings"])
    (folder / "trendings.txt").write_text("everywhere")
    assert load_bank(folder)["trendings"] == ["everywhere"]
    (folder / "mediums.txt").unlink()
    with pytest.raises(ValueError, match=r"`folder` has to hold mediums\.txt"):
        load_bank(folder)


def test_load_bank_from_the_package_without_importing_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(ValueError, match="pip install --no-deps clip-interrogator"):
        load_bank()
    write_bank(tmp_path / "site/clip_interrogator/data")
    (tmp_path / "site/clip_interrogator/__init__.py").write_text("raise SystemError")
    monkeypatch.setattr("sys.path", [str(tmp_path / "site")])
    assert load_bank()["movements"] == ["one movements é", "two movements"]


# ------------------------------------------------------------------------------------------ VGD


class Letters:
    """A stand-in for the language model: it likes a token the more, the higher its id."""

    def __init__(self, allowed):
        self.allowed, self.read_tokens = allowed, []

    def reader(self, rows):
        return self

    def next_tokens(self):
        rows = max(1, len(self.read_tokens[-1]) if self.read_tokens else 1)
        return (self.allowed.float() / 10).expand(rows, -1)

    def read(self, tokens, parents):
        self.read_tokens.append(tokens)


class Reach:
    """The score of a prompt is higher, the nearer the sum of its embeddings is to a point."""

    def __init__(self, goal, before=None):
        self.goal, self.before = goal, before

    def __call__(self, embeddings, step):
        total = embeddings.sum(dim=1)
        if self.before is not None:
            total = total + self.before.repeat_interleave(len(total) // len(self.before), dim=0)
        near = -(total - self.goal).norm(dim=1) / 100
        return -near, near

    def given(self, embeddings):
        return Reach(self.goal, embeddings.sum(dim=1))


def vgd_by_hand(space, goal, length, beams, expansions, weight):
    """The same, one beginning after the other."""
    kept = [((), 0.0)]
    for _ in range(length):
        found = []
        for tokens, rank in kept:
            left = [k for k in range(39, -1, -1) if k not in tokens][:expansions]
            found += [((*tokens, k), rank + k / 10) for k in left]
        sums = torch.stack([space.table[list(tokens)].sum(0) for tokens, _ in found])
        scores = -(sums - goal).norm(dim=1) / 100
        guided = (100 * scores).log_softmax(0).tolist()
        ranked = [
            (t, r + weight * g, s) for (t, r), g, s in zip(found, guided, scores, strict=True)
        ]
        ranked = sorted(ranked, key=lambda one: -one[1])[:beams]
        kept = [(tokens, rank) for tokens, rank, _ in ranked]
    return list(max(ranked, key=lambda one: one[2])[0])


@pytest.mark.parametrize("weight", [0.4, 1.5])
def test_vgd_is_a_beam_search_that_clip_ranks(weight):
    table = torch.randn(40, 6, generator=seeded(3))
    space = TokenSpace(table, once=torch.arange(40))
    goal = torch.randn(6, generator=seeded(4)) * 4
    steps = []
    found = vgd(
        space,
        Reach(goal),
        Letters(space.allowed),
        4,
        lambda progress: steps.append(progress.step),
        beams=3,
        expansions=7,
        clip_weight=weight,
    )
    assert found.ids.tolist() == [vgd_by_hand(space, goal, 4, 3, 7, weight)]
    assert steps == [1, 2, 3, 4] and found.scores.isfinite().all()
