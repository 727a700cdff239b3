"""Algorithm 1: equal to a plain implementation of the paper, and well behaved around it."""

import copy
import math
from functools import partial

import pytest
import torch
from conftest import make_clip

from pez_core import PezSettings, TokenSpace, search
from pez_core.objectives import Similarity
from pez_core.tracker import Budget, Tracker


def plain_pez(model, ids, target, steps, lr=0.1, weight_decay=0.1):
    """The paper's Algorithm 1 on one prompt, slowly and independently of pez_core.

    77 tokens through open_clip's modules, the whole vocabulary compared one token at a time, AdamW
    written out (Loshchilov & Hutter 2019, algorithm 2). Returns the ids of every step.
    """
    table = model.token_embedding.weight.detach()
    P = table[ids].clone()
    m, v = torch.zeros_like(P), torch.zeros_like(P)
    trace = []
    for t in range(1, steps + 1):
        projected = []
        for row in P:
            cosines = (table @ row) / (table.norm(dim=1) * row.norm())
            projected.append(int(cosines.argmax()))
        trace.append(projected)

        P_projected = table[projected].clone().requires_grad_()
        padding = table[torch.zeros(77 - len(ids) - 2, dtype=torch.long)]
        x = torch.cat([table[49406][None], P_projected, table[49407][None], padding])
        x = (x + model.positional_embedding)[None]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
        feature = x[0, len(ids) + 1] @ model.text_projection
        loss = 1 - (feature @ target) / (feature.norm() * target.norm())
        (g,) = torch.autograd.grad(loss, P_projected)

        P = P * (1 - lr * weight_decay)
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        P = P - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return trace


class Traced(TokenSpace):
    """A space that records the projection of every step."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.trace = []

    def nearest(self, embeddings):
        ids = super().nearest(embeddings)
        self.trace.append(ids)
        return ids


@pytest.mark.parametrize("name", ["tiny", "emoji-clip"])
@pytest.mark.slow
def test_ids_of_every_step_equal_a_plain_implementation(name, tiny_clip, emoji_clip):
    clip = {"tiny": tiny_clip, "emoji-clip": emoji_clip}[name]
    ids = torch.randint(49408, (3, 8), generator=torch.Generator().manual_seed(5))
    targets = torch.randn(3, clip.model.text_projection.shape[1], generator=torch.Generator())
    space = Traced(clip.text.token_embedding)  # the whole vocabulary, special tokens and all
    search(space, Similarity(clip.text, targets[:, None]), ids, PezSettings(steps=40))
    ours = torch.stack(space.trace, dim=1).tolist()
    plain = [
        plain_pez(clip.model, row.tolist(), target, 40)
        for row, target in zip(ids, targets, strict=True)
    ]
    assert ours == plain
    assert len({tuple(step) for step in plain[0]}) > 5  # it really moves


def quadratic(goal):
    """An objective without any CLIP: get close to `goal` (prompt_len, dim)."""

    def objective(embeddings, step):
        loss = ((embeddings - goal) ** 2).sum((-1, -2))
        return loss, -loss

    return objective


@pytest.fixture
def grid():
    """Tokens on a circle, two turns of growing radius left out: cosine decides."""
    angles = torch.arange(64) * (2 * math.pi / 64)
    return TokenSpace(torch.stack([angles.cos(), angles.sin()], dim=1))


def test_solves_a_problem_with_a_known_answer(grid):
    goal = grid.table[[3, 40]]
    found = search(grid, quadratic(goal), torch.tensor([[60, 20]]), PezSettings(steps=200))
    assert found.ids.tolist() == [[3, 40]]
    assert found.scores.item() == pytest.approx(0)


def test_keeps_the_best_prompt_not_the_last(grid):
    """The score rewards token 10 alone; the loss drives the prompt past it, to token 20."""
    passed = []

    def objective(embeddings, step):
        loss = ((embeddings - grid.table[20]) ** 2).sum((-1, -2))
        score = -((embeddings - grid.table[10]) ** 2).sum((-1, -2))
        passed.append(score.item())
        return loss, score

    found = search(grid, objective, torch.tensor([[1]]), PezSettings(steps=150))
    assert found.scores.item() == max(passed) > passed[-1]
    assert found.ids.item() in (9, 10, 11)  # one step may jump over a token


def test_the_initial_prompt_counts(grid):
    goal = grid.table[[5]]
    found = search(grid, quadratic(goal), torch.tensor([[5]]), PezSettings(steps=1))
    assert found.ids.tolist() == [[5]]


@pytest.mark.slow
def test_a_problem_does_not_depend_on_its_neighbours(tiny_clip):
    generator = torch.Generator().manual_seed(1)
    space = TokenSpace(tiny_clip.text.token_embedding, tiny_clip.vocabulary)
    ids = space.random(5, 6, generator)
    targets = torch.randn(5, 1, 16, generator=generator)
    settings = PezSettings(steps=60)
    together = search(space, Similarity(tiny_clip.text, targets), ids, settings)
    for k in range(5):
        one = slice(k, k + 1)
        alone = search(space, Similarity(tiny_clip.text, targets[one]), ids[one], settings)
        assert alone.ids.tolist() == together.ids[one].tolist()
        torch.testing.assert_close(alone.scores, together.scores[one])


@pytest.mark.slow
def test_patience_ends_each_problem_on_its_own(tiny_clip):
    """A neighbour that keeps the batch running must not give a stalled problem more steps."""
    generator = torch.Generator().manual_seed(2)
    space = TokenSpace(tiny_clip.text.token_embedding, tiny_clip.vocabulary)
    ids = space.random(6, 4, generator)
    targets = torch.randn(6, 1, 16, generator=generator)
    settings = PezSettings(steps=400, patience=10)
    together = search(space, Similarity(tiny_clip.text, targets), ids, settings)
    ends = set()
    for k in range(6):
        one = slice(k, k + 1)
        alone = search(space, Similarity(tiny_clip.text, targets[one]), ids[one], settings)
        assert alone.step < 400
        assert alone.ids.tolist() == together.ids[one].tolist()
        ends.add(alone.step)
    assert len(ends) > 1 and together.step == max(ends)


def test_a_callback_gets_progress_and_stops(grid):
    seen = []

    def callback(progress):
        seen.append((progress.step, progress.scores.item()))
        return progress.step >= 20

    found = search(
        grid,
        quadratic(grid.table[[40]]),
        torch.tensor([[0]]),
        PezSettings(steps=500, report_every=10),
        callback,
    )
    assert [step for step, _ in seen] == [1, 10, 20]
    assert found.stopped and found.step == 20
    assert found.history == [(step, [score]) for step, score in seen]
    assert seen == sorted(seen, key=lambda row: row[1])


def test_the_last_step_is_reported(grid):
    settings = PezSettings(steps=7, report_every=3)
    found = search(grid, quadratic(grid.table[[40]]), torch.tensor([[0]]), settings)
    assert [step for step, _ in found.history] == [1, 3, 6, 7] and found.step == 7


def test_the_step_at_which_the_time_is_over_is_the_last(grid, clock):
    clock.tick = 0.25
    settings = PezSettings(steps=99, time_limit=0.75)
    found = search(grid, quadratic(grid.table[[40]]), torch.tensor([[0]]), settings)
    assert found.step == 3 and found.elapsed == 0.75


def test_the_defaults_are_those_of_the_paper():
    settings = PezSettings()
    assert (settings.steps, settings.lr, settings.weight_decay) == (3000, 0.1, 0.1)


def test_the_optimiser_of_the_cpu_is_the_plain_one():
    prompt = torch.zeros(1, requires_grad=True)
    one = PezSettings(lr=0.3, weight_decay=0.2).optimizer_of(prompt)
    assert isinstance(one, torch.optim.AdamW)
    options = {name: one.defaults[name] for name in ("lr", "weight_decay", "fused", "capturable")}
    assert options == {"lr": 0.3, "weight_decay": 0.2, "fused": False, "capturable": False}


def test_an_optimiser_of_ones_own(grid):
    calls, begin = [], grid.table[[30]]
    settings = PezSettings(steps=2, optimizer=partial(torch.optim.SGD, lr=0.25))
    objective = quadratic(grid.table[[40]])
    search(
        grid, objective, torch.tensor([[30]]), settings, on_step=lambda *step: calls.append(step)
    )
    (ids, losses, first), (_, _, second) = calls
    assert ids.tolist() == [[30]] and torch.equal(first, begin[None])
    assert losses.item() == objective(begin, 0)[0].item() and not losses.requires_grad
    torch.testing.assert_close(second, first - 0.25 * 2 * (begin - grid.table[[40]]))


@pytest.mark.parametrize(
    "options, on_step, wanted",
    [
        ({}, None, True),
        ({"capture": False}, None, False),
        ({"optimizer": partial(torch.optim.SGD, lr=0.1)}, None, False),
        ({}, lambda *step: None, False),
    ],
)
def test_steps_are_captured_unless_python_takes_part(grid, monkeypatch, options, on_step, wanted):
    asked = []

    def captured(step, device, changed, **given):
        asked.append(given)
        return step

    monkeypatch.setattr("pez_core.pez.captured", captured)
    settings = PezSettings(**{"steps": 1, "capture": True} | options)
    objective = quadratic(grid.table[[40]])
    search(grid, objective, torch.tensor([[0]]), settings, on_step=on_step)
    assert asked == [{"wanted": wanted, "parts": (grid, objective)}]


class Store:
    """A checkpoint in memory that holds all states that were saved, and gives one of them."""

    def __init__(self, every, state=None):
        self.every, self.state, self.saved = every, state, []

    def load(self):
        return self.state

    def save(self, state):
        self.saved.append(copy.deepcopy(state))


def test_a_search_resumes_from_each_of_its_checkpoints(grid, clock):
    """The score rises on every third step: with this patience, no step may be lost."""
    clock.tick = 0.5

    def objective(embeddings, step):
        loss = ((embeddings - grid.table[40]) ** 2).sum((-1, -2))
        return loss, loss.detach() * 0 + step // 3

    def run(store, ids, steps=20):
        prompts = []
        settings = PezSettings(steps=steps, patience=3, report_every=6)
        found = search(
            grid, objective, torch.tensor([[ids]]), settings, checkpoint=store,
            on_step=lambda ids, losses, prompt: prompts.append(prompt),
        )  # fmt: skip
        return found, prompts

    store = Store(8)
    whole, prompts = run(store, 0)
    assert [state["step"] for state in store.saved] == [8, 16, 20]
    assert [step for step, _ in whole.history] == [1, 6, 8, 12, 16, 18, 20]
    for state in store.saved:
        done, again_store = state["step"], Store(8, state)
        again, rest = run(again_store, 9)
        assert torch.equal(again.ids, whole.ids) and torch.equal(again.scores, whole.scores)
        assert again.history == whole.history and again.step == 20
        assert len(rest) == 20 - done
        assert all(map(torch.equal, rest, prompts[done:]))
        if done < 20:
            (one, _) = run(Store(8, state), 9, done + 1)
            assert one.elapsed == state["elapsed"] + 0.5
            assert again_store.saved[-1]["scores"].tolist() == [6]
        else:
            assert again.elapsed == state["elapsed"]


def test_a_stop_is_a_checkpoint(grid):
    store = Store(10)
    objective, ids = quadratic(grid.table[[40]]), torch.tensor([[0]])
    search(grid, objective, ids, PezSettings(steps=30), lambda p: p.step == 13, checkpoint=store)
    assert [state["step"] for state in store.saved] == [10, 13]


def test_a_checkpoint_holds_the_state_of_the_method():
    def parts(number):
        P = torch.full((1, 1, 2), float(number), requires_grad=True)
        draws = [torch.Generator().manual_seed(number + k) for k in range(2)]
        return P, torch.optim.SGD([P], lr=1.0), draws, [torch.full((2,), number), P.detach() + 1]

    store, ids = Store(1), torch.tensor([[7]])
    tracker = Tracker(ids, Budget(steps=9), checkpoint=store)
    first = parts(1)
    assert tracker.resume(*first) == 0
    tracker.update(ids + 1, torch.tensor([2.0]))
    tracker.end_step()
    again, other = Tracker(ids, Budget(steps=9), checkpoint=Store(1, store.saved[0])), parts(5)
    assert again.resume(*other) == 1
    assert torch.equal(other[0], first[0]) and all(map(torch.equal, other[3], first[3]))
    for one, two in zip(other[2], first[2], strict=True):
        assert torch.equal(torch.rand(3, generator=one), torch.rand(3, generator=two))
    assert again.progress.ids.tolist() == [[8]] and again.progress.scores.tolist() == [2]
    assert again.progress.step == 1 and again.progress.history == [(1, [2.0])]


def test_all_tensors_that_a_step_changes_are_listed():
    tracker = Tracker(
        torch.zeros(2, 3, dtype=torch.long),
        Budget(),
        acceptable=lambda ids: torch.ones(len(ids), dtype=torch.bool),
    )
    tracker.end_step()
    values = [
        v
        for value in vars(tracker).values()
        for v in (value if isinstance(value, tuple) else [value])
    ]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    before = [tensor.clone() for tensor in tensors]
    tracker.propose(torch.ones_like(tracker.ids), torch.tensor([1.0, 2.0]))
    tracker.accept()
    tracker.check_finite(torch.tensor(math.nan))
    changed = {id(a) for a, b in zip(tensors, before, strict=True) if not torch.equal(a, b)}
    assert changed == {id(tensor) for tensor in tracker.changed()} and len(changed) == 7


def test_only_acceptable_prompts_are_kept(grid):
    found = search(
        grid,
        quadratic(grid.table[[40]]),
        torch.tensor([[20]]),
        PezSettings(steps=200),
        acceptable=lambda ids: (ids % 2 == 1).all(-1),
    )
    assert found.ids.item() in (39, 41)
    asked = []
    nothing = search(
        grid,
        quadratic(grid.table[[40]]),
        torch.tensor([[20]]),
        PezSettings(steps=5),
        acceptable=lambda ids: asked.append(len(ids)) or torch.zeros(len(ids), dtype=torch.bool),
    )
    assert asked == [1] * 5
    assert nothing.scores.item() == -math.inf and nothing.ids.tolist() == [[20]]


def test_works_inside_inference_mode(grid):
    with torch.inference_mode():
        found = search(
            grid, quadratic(grid.table[[3]].clone()), torch.tensor([[9]]), PezSettings(steps=99)
        )
    assert found.ids.tolist() == [[3]]


def test_nothing_global_is_touched(grid):
    state, grad = torch.get_rng_state(), torch.is_grad_enabled()
    search(grid, quadratic(grid.table[[3]]), torch.tensor([[9]]), PezSettings(steps=3))
    assert torch.equal(state, torch.get_rng_state()) and torch.is_grad_enabled() == grad


def test_a_nan_is_an_error_with_a_remedy(grid):
    def objective(embeddings, step):
        loss = embeddings.sum((-1, -2)) * (math.nan if step == 3 else 1)
        return loss, loss

    with pytest.raises(FloatingPointError, match=r"step 4.*float32"):
        search(grid, objective, torch.tensor([[9]]), PezSettings(steps=9))
    with pytest.raises(FloatingPointError, match=r"step 5"):  # remembered until the next report
        search(grid, objective, torch.tensor([[9]]), PezSettings(steps=9, report_every=5))


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_an_error(grid, score):
    def objective(embeddings, step):
        loss = embeddings.sum((-1, -2))
        return loss, torch.full_like(loss, score)

    with pytest.raises(FloatingPointError):
        search(grid, objective, torch.tensor([[9]]), PezSettings(steps=3))


def test_a_score_that_was_not_computed_never_becomes_the_best(grid):
    def objective(embeddings, step):
        loss = embeddings.sum((-1, -2))
        return loss, torch.full_like(loss, -math.inf if step % 2 else -step)

    found = search(grid, objective, torch.tensor([[9]]), PezSettings(steps=4))
    assert found.scores.tolist() == [0] and found.ids.tolist() == [[9]]


def test_a_nan_gradient_behind_a_finite_loss_is_an_error(grid):
    def objective(embeddings, step):
        length = (embeddings * 0).norm(dim=-1).sum(-1)  # the slope of a norm at 0
        return length.sqrt(), length.detach()

    with pytest.raises(FloatingPointError):
        search(grid, objective, torch.tensor([[9]]), PezSettings(steps=3))


@pytest.mark.parametrize("every, patience, ends", [(1, 1, 60), (3, 3, 60), (3, 2, 3)])
def test_patience_counts_the_steps_without_improvement(grid, every, patience, ends):
    """The score rises on every `every`-th step and on no other."""

    def objective(embeddings, step):
        loss = embeddings.sum((-1, -2))
        return loss, loss.detach() * 0 + step // every

    found = search(grid, objective, torch.tensor([[9]]), PezSettings(steps=60, patience=patience))
    assert found.step == ends


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"steps": 0}, ValueError, "`steps` has to be at least 1 but is 0"),
        ({"steps": 2.5}, TypeError, "`steps` has to be an integer but is 2.5"),
        ({"steps": True}, TypeError, "`steps`"),
        ({"lr": 0}, ValueError, "`lr` has to be finite and above 0"),
        ({"lr": math.nan}, ValueError, "`lr`"),
        ({"lr": "fast"}, TypeError, "`lr` has to be a number"),
        ({"weight_decay": -1}, ValueError, "`weight_decay` has to be finite and 0 or more"),
        ({"patience": 0}, ValueError, "`patience`"),
        ({"report_every": 0}, ValueError, "`report_every`"),
        ({"time_limit": 0}, ValueError, "`time_limit`"),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        PezSettings(**options)


@pytest.mark.parametrize("shape", [(4,), (0, 4), (1, 0)])
def test_bad_initial_ids(grid, shape):
    with pytest.raises(ValueError, match="`ids`"):
        search(grid, quadratic(grid.table[[3]]), torch.zeros(shape, dtype=torch.long))


def test_half_precision_tower_keeps_the_prompt_in_fp32():
    clip = make_clip()
    clip.model.bfloat16()
    space = TokenSpace(clip.text.token_embedding, clip.vocabulary)
    seen = []

    def objective(embeddings, step):
        seen.append(embeddings.dtype)
        return Similarity(clip.text, torch.ones(1, 1, 16))(embeddings, step)

    found = search(space, objective, clip.vocabulary[:4][None], PezSettings(steps=3))
    assert seen == [torch.float32] * 3 and found.scores.dtype == torch.float32
