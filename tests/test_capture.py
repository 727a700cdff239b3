"""Captured steps: a capture does what the step does, tested without a GPU."""

import logging
from functools import partial

import pytest
import torch
from conftest import Alone, all_words, make_clip
from torch.fx.experimental.proxy_tensor import make_fx

from pez_core import (
    JointClip,
    PezSettings,
    PhraseSpace,
    SwapSettings,
    TokenSpace,
    invert,
    refine,
    search,
)
from pez_core.caption import Caption
from pez_core.capture import NoWaiting, Replay, _place, recorder_for, trust
from pez_core.fluency import FluencyLoss
from pez_core.objectives import SampledSimilarity, Similarity, WeightedSum
from pez_core.priors import FluencyPrior, SumOfPriors
from pez_core.single_words import SingleWordPrior
from pez_core.token_lm import load_token_lm

pytestmark = pytest.mark.slow


class Traced:
    """A recorder for CPUs. As in a CUDA graph every number that Python has becomes a constant, and
    reading one from a tensor is an error. Unlike there, the step runs while it is captured."""

    failed = False

    def __init__(self):
        self.records = self.replays = 0

    def warm_up(self, step):
        step()

    def record(self, step):
        with NoWaiting():
            graph = make_fx(lambda: step())()
        self.records += 1

        def replay():
            self.replays += 1
            graph()

        return replay


@pytest.fixture
def traced(monkeypatch):
    monkeypatch.setenv("PEZ_CAPTURE", "1")
    recorder = Traced()
    monkeypatch.setattr("pez_core.capture.recorder_for", lambda device: recorder)
    fused = partial(torch.optim.AdamW, fused=True)  # the one that CUDA gets
    monkeypatch.setattr(
        PezSettings, "optimizer_of", lambda self, P: fused([P], lr=self.lr, weight_decay=0.1)
    )
    return recorder


@pytest.fixture
def problem(tiny_clip):
    space = TokenSpace(tiny_clip.text.token_embedding, tiny_clip.vocabulary)
    targets = tiny_clip.encode_texts(["a red fish", "two small dogs", "a house"])[:, None]
    objective = Similarity(tiny_clip.text.encoder(), targets)
    ids = space.random(3, 5, torch.Generator().manual_seed(0))
    return space, objective, ids


def same(a, b):
    assert torch.equal(a.ids, b.ids) and torch.equal(a.scores, b.scores)
    assert a.history == b.history and a.step == b.step


@pytest.mark.parametrize("patience", [None, 4])
@pytest.mark.parametrize("asked", [False, True])
def test_a_captured_search_is_the_search(traced, problem, patience, asked):
    acceptable = (lambda rows: rows[:, 0] % 3 > 0) if asked else None
    options = {"steps": 40, "patience": patience, "lr": 0.5}
    plain = search(*problem, PezSettings(**options, capture=False), None, acceptable)
    assert traced.records == 0
    recorded = search(*problem, PezSettings(**options), None, acceptable)
    same(recorded, plain)
    assert traced.records == 1 and traced.replays == plain.step - 3


@pytest.mark.parametrize(("prior", "asked"), [(False, False), (True, True)])
def test_a_captured_refinement_is_the_refinement(traced, problem, prior, asked, tiny_clip):
    space, objective, ids = problem
    acceptable = (lambda rows: rows[:, 0] % 3 > 0) if asked else None
    ids = space.random(3 * 4, 3, torch.Generator().manual_seed(1))
    words = None
    if prior:
        alone = torch.randn(len(space.table), 16, generator=torch.Generator().manual_seed(2))
        alone = Alone(alone, all_at_once=True)
        words = SumOfPriors([SingleWordPrior(alone, space, objective.target, 0.1)])
    options = {"steps": 16, "trials": 4, "screened": 16}
    found = [
        refine(
            space, objective, ids, SwapSettings(**options, capture=record), None, acceptable,
            seeds=[0, 1, 2], prior=words,
        )
        for record in (False, True)
    ]  # fmt: skip
    same(*found)
    assert traced.records == 3  # once for each position
    assert traced.replays == 16 - 3


@pytest.mark.parametrize("caption", ["{}", "a photo of {} in red"])
def test_a_captured_refinement_with_a_language_model(traced, problem, tiny_clip, caption):
    """As on a card, where the model reads the beginning of each candidate again."""
    space, objective, _ = problem
    ids = space.random(3 * 4, 3, torch.Generator().manual_seed(1))
    options = {"steps": 16, "trials": 4, "screened": 16}

    def found(joins, record):
        prior = FluencyPrior(load_token_lm(), Caption(tiny_clip, caption), space, 3, "text", 0.5)
        assert (prior._joins_beginnings, prior.capturable) == (True, False)
        prior._joins_beginnings, prior.capturable = joins, not joins
        return refine(
            space, objective, ids, SwapSettings(**options, capture=record), seeds=[0, 1, 2],
            prior=SumOfPriors([prior]),
        )  # fmt: skip

    plain, there, recorded = found(True, False), found(False, False), found(False, True)
    same(recorded, there)
    assert (traced.records, traced.replays) == (3, 16 - 3)
    assert torch.equal(plain.ids, there.ids)
    torch.testing.assert_close(plain.scores, there.scores)
    assert not torch.equal(plain.ids, refine_alone(space, objective, ids, options))


def refine_alone(space, objective, ids, options):
    """What the swaps find without the language model."""
    settings = SwapSettings(**options, capture=False)
    return refine(space, objective, ids, settings, seeds=[0, 1, 2]).ids


def test_captured_steps_with_a_fluency_loss(traced, problem, tiny_clip):
    space, similarity, ids = problem
    loss = FluencyLoss(tiny_clip, 0.2, prompts=3)
    table = torch.cat([space.table, loss.token_embedding], dim=1)
    columns = space.table.shape[1]
    space = TokenSpace(table, space.allowed, [(columns, 0.7), (129, 0.3)])
    likely = loss.objective(tiny_clip.text.words.encode("a photo of"), [], [0, 1, 2])
    objective = WeightedSum(similarity, likely, columns, loss.weight)
    found = [
        search(space, objective, ids, PezSettings(steps=12, lr=0.5, capture=record))
        for record in (False, None)
    ]
    same(*found)
    assert (traced.records, traced.replays) == (1, 9)
    assert sum(found[0].history[-1][1]) > sum(found[0].history[0][1])
    ids = space.random(3 * 4, 3, torch.Generator().manual_seed(1))
    found = [
        refine(
            space, objective, ids, SwapSettings(steps=16, trials=4, screened=16, capture=record),
            seeds=[0, 1, 2],
        )
        for record in (False, None)
    ]  # fmt: skip
    same(*found)
    assert traced.records == 1 + 3  # once for each position


def test_several_encoders_and_fixed_text_are_captured_too(traced, emoji_clip, vit_clip):
    clip = JointClip([emoji_clip, vit_clip], [0.25, 0.75])
    options = all_words(prompt_len=3, steps=8, swaps=15)
    features = clip.encode_texts(["a fish"])
    found = invert(clip, features, options, caption="a drawing of {}")
    assert traced.replays > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pez_core.capture.recorder_for", lambda device: None)
        again = invert(clip, features, options, caption="a drawing of {}")
    assert again[0].prompt == found[0].prompt and again[0].history == found[0].history


def test_a_step_that_draws_at_random_is_not_captured(traced, problem, tiny_clip):
    space, _, ids = problem
    targets = tiny_clip.encode_texts(["a fish", "two dogs", "a house"])[None].expand(3, -1, -1)
    draws = torch.Generator().manual_seed(0)
    sampled = SampledSimilarity(tiny_clip.text.encoder(), targets, None, 1, draws)
    search(space, sampled, ids, PezSettings(steps=9))
    assert traced.records == 0


def test_a_step_that_cannot_be_captured_runs_eagerly(caplog):
    class Fails:
        failed = False

        def warm_up(self, step):
            step()

        def record(self, step):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    calls = []
    replay = Replay(lambda: calls.append(0), Fails(), list, warm_up=2)
    with caplog.at_level(logging.WARNING, "pez_core"):
        for _ in range(5):
            replay()
    assert len(calls) == 5
    (record,) = caplog.records
    assert record.getMessage().endswith("(operation not permitted when stream is capturing)")


def test_a_graph_that_does_nothing_is_not_used():
    """However little the step does."""

    class Idle:
        failed = False

        def warm_up(self, step):
            step()

        def record(self, step):
            return lambda: None

    x = torch.ones(3)
    replay = Replay(lambda: x.add_(1e-3), Idle(), lambda: [x], warm_up=1)
    for _ in range(4):
        replay()
    torch.testing.assert_close(x, torch.full((3,), 1.004))


class Wrong(Traced):
    """The first `good` graphs are right, the others do nothing."""

    def __init__(self, good):
        super().__init__()
        self.good = good

    def record(self, step):
        right = super().record(step)
        return right if self.records <= self.good else lambda: None


@pytest.mark.parametrize("good", [0, 1])
def test_a_graph_with_another_result_is_not_used(traced, problem, monkeypatch, caplog, good):
    space, objective, ids = problem
    wrong = Wrong(good)
    monkeypatch.setattr("pez_core.capture.recorder_for", lambda device: wrong)

    def find(record):
        if good == 0:
            return search(space, objective, ids, PezSettings(steps=9, capture=record))
        x = space.random(3 * 2, 3, torch.Generator().manual_seed(1))
        settings = SwapSettings(steps=15, trials=2, screened=16, capture=record)
        return refine(space, objective, x, settings, seeds=[0, 1, 2])

    with caplog.at_level(logging.WARNING, "pez_core"):
        same(find(True), find(False))
    (record,) = caplog.records
    assert record.getMessage().endswith("gave another result than the step)")
    assert wrong.records == 1 + good  # nothing is captured after the one that is wrong


@pytest.mark.parametrize("kind", ["cpu", "mps", "meta"])
def test_other_devices_have_no_recorder(kind, caplog):
    with caplog.at_level(logging.DEBUG, "pez_core"):
        assert recorder_for(torch.device(kind)) is None
    (record,) = caplog.records
    assert f"not captured on {kind}" in record.getMessage()


@pytest.fixture
def card(tmp_path, monkeypatch):
    """A CUDA device without a result of the self-test."""
    monkeypatch.delenv("PEZ_CAPTURE", raising=False)
    monkeypatch.setenv("PEZ_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "A card")
    return torch.device("cuda")


@pytest.mark.parametrize("settings", [PezSettings, SwapSettings])
def test_steps_are_captured_where_the_self_test_has_passed(card, settings, monkeypatch):
    def captures(**options):
        return settings(**options).captures_on(card)

    assert not captures() and captures(capture=True)
    assert trust(card, True)
    assert captures() and not captures(capture=False)
    assert not settings().captures_on(torch.device("cpu"))
    for other in (
        lambda patch: patch.setattr("torch.cuda.get_device_name", lambda device: "Another"),
        lambda patch: patch.setattr("torch.__version__", "9.9"),
        lambda patch: patch.setattr("pez_core.capture.__version__", "9.9"),
    ):
        with monkeypatch.context() as patch:
            other(patch)
            assert not captures()
    assert trust(card, False)
    assert not captures()


@pytest.mark.parametrize("value, captures", [("0", False), ("1", True)])
def test_the_environment_decides_before_the_self_test(card, monkeypatch, value, captures):
    assert trust(card, not captures)
    monkeypatch.setenv("PEZ_CAPTURE", value)
    assert PezSettings().captures_on(card) is captures
    assert PezSettings(capture=not captures).captures_on(card) is not captures


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"CARD": 1}', "\xff"])
def test_a_damaged_record_holds_no_result(card, tmp_path, text):
    path = tmp_path / "models/captures.json"
    path.parent.mkdir()
    path.write_bytes(text.replace("CARD", _place(card)).encode("latin1"))
    assert not PezSettings().captures_on(card)
    assert trust(card, True) and PezSettings().captures_on(card)


def test_a_folder_that_cannot_be_written_is_said(card, tmp_path, monkeypatch, caplog):
    (tmp_path / "models").write_text("a file")
    assert not trust(card, True)
    assert "cannot be written" in caplog.text and not PezSettings().captures_on(card)


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.index_put_([x > 0], torch.ones(())),
        lambda x: torch.equal(x, x),
        lambda x: x.to("meta"),
    ],
)
def test_an_operation_that_would_wait_for_the_device_is_an_error(waits):
    x = torch.ones(3)
    with NoWaiting(), pytest.raises(RuntimeError, match="waits for the device"):
        waits(x)
    with NoWaiting():  # and this does not
        (x.to(torch.float16) @ x.half())[None][torch.zeros(1, dtype=torch.long)].copy_(x[:1])


def test_the_optimiser_of_cuda_can_be_captured(monkeypatch):
    """The options that torch needs to capture an optimiser step, without a GPU."""
    asked = []
    made = torch.optim.AdamW
    monkeypatch.setattr(
        torch.optim,
        "AdamW",
        lambda parameters, **options: asked.append(options) or made(parameters),
    )
    PezSettings().optimizer_of(torch.zeros(1, requires_grad=True))
    PezSettings().optimizer_of(Cuda())
    assert [(one["fused"], one["capturable"]) for one in asked] == [(False, False), (True, True)]


class Cuda(torch.Tensor):
    """A tensor whose device is a GPU."""

    @property
    def device(self):
        return torch.device("cuda")


def test_phrases_are_refined_the_same(tiny_clip):
    phrases = [[320], [321], *([400 + k, 500 + k] for k in range(18))]
    space = PhraseSpace(tiny_clip.text.token_embedding, phrases, 6)
    target = tiny_clip.encode_texts(["a red fish"])[:, None]
    objective = Similarity(tiny_clip.text.encoder(), target)
    ids = space.random(4, 6, torch.Generator().manual_seed(0))
    found = [
        refine(space, objective, ids, SwapSettings(steps=40, trials=4, capture=r), seeds=[0])
        for r in (False, True)
    ]
    same(*found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_find_the_same(problem):
    space, objective, ids = problem
    space = TokenSpace(space.table.cuda(), space.allowed.cuda())
    clip = make_clip()
    clip.model.cuda()
    objective = Similarity(clip.text.encoder(), objective.target[:, None].cuda())
    graphs, record = [], torch.cuda.CUDAGraph.replay
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda.CUDAGraph, "replay", lambda g: graphs.append(g) or record(g))
        found = [
            search(space, objective, ids.cuda(), PezSettings(steps=60, capture=r))
            for r in (False, True)
        ]
    same(*found)
    assert len(graphs) == 57
