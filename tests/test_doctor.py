"""The self-test of a machine."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import make_clip
from test_backends import DEVICE, Device, _Factories
from test_capture import Traced

import pez_core.doctor as doctor
from pez_core import capture, load_clip
from pez_core.cli import main


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_SECONDS", 0.01)
    monkeypatch.setattr(doctor, "STEPS", 12)
    monkeypatch.setenv("PEZ_MODELS", str(tmp_path))
    monkeypatch.delenv("PEZ_CAPTURE", raising=False)


@pytest.mark.slow
def test_what_a_bug_report_needs_is_printed(capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    for wanted in (
        f"torch: {torch.__version__}",
        "device: cpu",
        "GB/s",
        "GFLOP/s",
        "search: ok",
        "times the limit of",
    ):
        assert wanted in printed.out
    assert "testing: rates" in printed.err
    assert main(["doctor", "--device", "nothing"]) == 2
    assert "--device" in capsys.readouterr().err


def test_rates_are_those_of_what_was_run(monkeypatch):
    monkeypatch.setattr(doctor, "_per_second", lambda device, run: 10.0)
    measured = doctor.Rates()
    rates = dict(doctor._rates(torch.device("cpu"), measured))
    assert rates["copy"] == f"{2 * 2**28 * 10 / 1e9:.1f} GB/s"  # read and written
    assert rates["matrix product, float32"] == f"{2 * 1024**3 * 10 / 1e9:,.0f} GFLOP/s"
    assert (measured.moved, measured.operations[torch.float32]) == (
        2 * 2**28 * 10,
        2 * 1024**3 * 10,
    )


def test_rates_are_not_those_of_launching(monkeypatch):
    clock, launched = SimpleNamespace(now=0.0), []

    def wait(device):
        clock.now += 0.001 + 0.002 * len(launched)  # the wait itself, and what was launched
        launched.clear()

    monkeypatch.setattr(doctor.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(doctor, "_wait", wait)
    monkeypatch.setattr(doctor, "_SECONDS", 0.2)
    rate = doctor._per_second(torch.device("cuda"), lambda: launched.append(1))
    assert rate == pytest.approx(500, rel=0.01)


def test_any_device_is_waited_for():
    with _Factories(), Device() as device:  # torch has no module of its name
        doctor._wait(DEVICE)
    assert device.operations["_local_scalar_dense"] == 1


# Of width 32 (see conftest): weights and biases of a block, the last norm, the projection.
BLOCK, REST = 12 * 32**2 + 13 * 32, 2 * 32 + 32 * 16


def test_the_limit_of_a_step_is_that_of_its_memory_and_its_arithmetic(tiny_clip):
    rates = doctor.Rates(1e6, {torch.float32: 1e9, torch.bfloat16: 4e9})
    words = len(tiny_clip.vocabulary)
    limits = rates.least(tiny_clip, 2, 7)
    assert limits["memory"] == pytest.approx((2 * (3 * BLOCK + REST) + words * 32) * 4 / 1e6)
    # eight positions with the end token; keys and values of all in the last block, all of one
    tower = 2 * 4 * ((2 * BLOCK + REST) * 8 + BLOCK * (8 + 5) / 6)
    compared = 2 * 2 * 7 * words * 32
    assert limits["arithmetic"] == pytest.approx((tower + compared) / 1e9)
    low = rates.least(tiny_clip, 2, 7, torch.bfloat16, torch.bfloat16)
    assert low["memory"] == pytest.approx(limits["memory"] / 2)
    assert low["arithmetic"] == pytest.approx(limits["arithmetic"] / 4)


@pytest.mark.parametrize(
    "rates, said",
    [
        (doctor.Rates(1e9, {torch.float32: 1e15}), "memory"),
        (doctor.Rates(1e15, {torch.float32: 1e9}), "arithmetic"),
        (doctor.Rates(1e9), None),
        (doctor.Rates(0, {torch.float32: 1e9}), None),
    ],
)
def test_a_step_is_compared_with_its_limit(tiny_clip, monkeypatch, rates, said):
    clock = SimpleNamespace(now=0.0)

    def search(space, objective, ids, settings):
        assert ids.shape == (1, 16)
        clock.now += 0.5 + 2e-3 * settings.steps

    monkeypatch.setattr(doctor.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(doctor, "search", search)
    found = doctor._step(tiny_clip, rates)
    assert found.startswith("2.00 ms for a prompt of 16 tokens with tiny")
    if said is None:
        assert "limit" not in found
    else:
        limit = rates.least(tiny_clip, 1, 16)[said]
        assert f", {2e-3 / limit:.1f} times the limit of {1e3 * limit:.2f} ms ({said})" in found


@pytest.fixture
def simulated(monkeypatch):
    """The self-test of a device without some operations, by the command."""

    def run(*hidden):
        with _Factories(), Device(hidden):
            return main(["doctor", "--device", str(DEVICE)])

    monkeypatch.setattr(doctor, "_BYTES", 2**10)
    monkeypatch.setattr(doctor, "_MATRIX", 4)
    monkeypatch.setattr(doctor, "load_clip", lambda name, device: make_clip().to(device))
    return run


def test_what_a_device_lacks_is_named_beside_what_it_has(simulated, capsys):
    assert simulated("addcdiv_") == 1  # of the optimiser
    lines = capsys.readouterr().out.splitlines()
    error = "FAILED (NotImplementedError: The operator 'aten::addcdiv_' is not implemented"
    failed = [line.partition(": ") for line in lines if "FAILED" in line]
    assert [name for name, _, _ in failed] == ["search", "step"]
    assert all(text.startswith(error) for _, _, text in failed)
    found = {line.split(" (")[0] for line in lines}
    assert {"texts: ok", "gradients: ok", "steps as CUDA graphs: not needed"} <= found


def test_what_was_measured_before_an_error_is_printed(simulated, capsys, monkeypatch):
    calls = []

    def per_second(device, run):
        calls.append(run)
        if len(calls) > 1:
            raise MemoryError("no memory\nand more")
        return 1.0

    def missing(name, device):
        raise OSError("no weights")

    monkeypatch.setattr(doctor, "_per_second", per_second)
    monkeypatch.setattr(doctor, "load_clip", missing)
    assert simulated() == 1
    printed = capsys.readouterr().out
    for wanted in (f"torch: {torch.__version__}", "device: meta", "copy: ", "search: FAILED"):
        assert wanted in printed
    assert printed.count("FAILED (OSError: no weights)") == len(doctor.PARTS) - 1
    assert "rates: FAILED (MemoryError: no memory)" in printed


def device(clip, **changes):
    """A CLIP that computes on another device, as far as the self-test can tell."""
    fields = {name: getattr(clip, name) for name in ("text", "dtype", "vocabulary")}
    fields |= {name: getattr(clip, name) for name in ("encode_texts", "encode_images")}
    return SimpleNamespace(**fields | {"device": torch.device("meta")} | changes)


def test_a_device_that_computes_something_else_is_found(emoji_clip, monkeypatch):
    monkeypatch.setattr(
        doctor,
        "_problem",
        lambda clip, original=doctor._problem: original(
            SimpleNamespace(**vars(clip) | {"device": "cpu"})
            if isinstance(clip, SimpleNamespace)
            else clip
        ),
    )

    def passed(clip):
        return {check.name: check.passed for check in doctor._compared(clip, emoji_clip)}

    assert passed(device(emoji_clip)) == {"texts": True, "images": True, "gradients": True}

    def noisy(texts):
        features = emoji_clip.encode_texts(texts)
        return features + 0.1 * torch.randn(features.shape, generator=torch.Generator())

    assert passed(device(emoji_clip, encode_texts=noisy))["texts"] is False
    nan = lambda images: emoji_clip.encode_images(images) * torch.nan  # noqa: E731
    assert passed(device(emoji_clip, encode_images=nan))["images"] is False


def test_a_search_that_finds_nothing_is_found(emoji_clip, monkeypatch):
    assert doctor._searched(emoji_clip).passed
    start = lambda space, objective, ids, settings: SimpleNamespace(  # noqa: E731
        scores=torch.full((doctor.PROBLEMS,), -1.0)
    )
    monkeypatch.setattr(doctor, "search", start)
    assert doctor._searched(emoji_clip).passed is False


@pytest.mark.parametrize(
    "difference, slower, passed",
    [(0, 0, True), (0.5, 0, False), (0.5, 9, False), (torch.nan, 0, False), (0, 9, None)],
)
def test_captured_steps_have_to_be_equal_and_faster(
    emoji_clip, monkeypatch, difference, slower, passed
):
    monkeypatch.setattr(capture, "recorder_for", lambda device: Traced())
    monkeypatch.setattr(capture, "noted", lambda: nullcontext(capture.Captures(used=1)))
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: clock.now)

    def searches(clip, captured):
        clock.now += 1 + slower if captured else 2
        yield SimpleNamespace(scores=torch.full((4,), 0.5 + difference * captured))

    monkeypatch.setattr(doctor, "_searches", searches)
    found = doctor._captured(emoji_clip)
    assert found.passed is passed
    assert capture._trusted() == {capture._place(emoji_clip.device): passed is True}
    assert ("not used" in str(found)) == (passed is None)


class Refuses(Traced):
    def record(self, step):
        raise RuntimeError("capturing is not permitted\nhere")


def nothing(recorder):
    """A recorder whose graphs do nothing."""
    recorder.record = lambda step: lambda: None
    return recorder


@pytest.mark.parametrize(
    "recorder, capturable, said",
    [
        (Traced, True, "similarities differ by 0.0000"),
        (Refuses, True, "FAILED (capturing is not permitted)"),
        (lambda: nothing(Traced()), True, "FAILED (the graph of a step gave another result"),
        (Traced, False, "FAILED (no step was captured)"),
    ],
    ids=["captured", "refused", "wrong", "never tried"],
)
def test_eager_steps_do_not_pass_for_captured_ones(
    tiny_clip, monkeypatch, recorder, capturable, said
):
    fused = partial(torch.optim.AdamW, fused=True)  # the one that CUDA gets
    monkeypatch.setattr(doctor.PezSettings, "optimizer_of", lambda self, P: fused([P], lr=self.lr))
    monkeypatch.setattr(capture, "recorder_for", lambda device: recorder())
    monkeypatch.setattr(capture, "capturable", lambda *parts: capturable)
    monkeypatch.setattr(doctor, "refine", lambda *_, **__: SimpleNamespace(scores=torch.ones(4)))
    found = doctor._captured(tiny_clip)
    assert said in str(found)
    trusted = capture._trusted()[capture._place(tiny_clip.device)]
    assert not trusted or "FAILED" not in said


def test_without_graphs_there_is_nothing_to_compare(tmp_path):
    found = doctor._captured(load_clip("emoji-clip", device="cpu"))
    assert found.passed is None and not (tmp_path / "captures.json").exists()
    examined = doctor.Examination({}, [found])
    assert examined.healthy and "not needed" in str(examined)
    failed = doctor.Check("search", False, "")
    assert not doctor.Examination({}, [found, failed]).healthy


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
def test_a_card_is_healthy():
    found = doctor.examine("cuda")
    assert found.healthy, str(found)
    assert capture.wanted(torch.device("cuda"))
