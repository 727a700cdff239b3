"""Lists of jobs in one call of `distill` and `fuse`."""

import time
from dataclasses import replace

import pytest
import torch
from conftest import all_words

from pez_core import ArgumentError, DistillResult, FuseResult, distill, fuse

TEXTS = ["a cat and a dog in a red car near the old house", "a blue fish on a white plate at night"]
JOBS = [["a red cat", "a blue dog"], ["an old house", "a car", "a fish"]]
QUICK = all_words(effort="fast", steps=2, swaps=3, prompt_len=3)


def picture():
    return torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(0))


def plain(result):
    return replace(result, seconds=0.0, tower_flops=0.0)


def test_a_list_of_prompts_is_shortened_one_by_one(tiny_clip):
    results = distill(tiny_clip, TEXTS, QUICK)
    assert [type(one) for one in results] == [DistillResult] * 2
    alone = [distill(tiny_clip, text, QUICK) for text in TEXTS]
    assert [type(one) for one in alone] == [DistillResult] * 2
    assert list(map(plain, results)) == list(map(plain, alone))
    (single,) = distill(tiny_clip, TEXTS[:1], QUICK)
    assert plain(single) == plain(alone[0])


def test_a_list_of_jobs_is_fused_one_by_one(tiny_clip):
    results = fuse(tiny_clip, JOBS, QUICK, always_learn=True)
    assert [type(one) for one in results] == [FuseResult] * 2
    alone = [fuse(tiny_clip, job, QUICK, always_learn=True) for job in JOBS]
    assert list(map(plain, results)) == list(map(plain, alone))
    pictures = [[picture(), "a cat"], [picture(), picture()]]
    assert len(fuse(tiny_clip, pictures, QUICK)) == 2
    assert isinstance(fuse(tiny_clip, pictures[0], QUICK), FuseResult)


def test_each_job_may_have_a_seed(tiny_clip):
    seeds = replace(QUICK, seed=[4, 9])
    for task, jobs, more in ((distill, TEXTS, {}), (fuse, JOBS, {"always_learn": True})):
        results = task(tiny_clip, jobs, seeds, **more)
        alone = [
            task(tiny_clip, job, replace(QUICK, seed=seed), **more)
            for job, seed in zip(jobs, (4, 9), strict=True)
        ]
        assert list(map(plain, results)) == list(map(plain, alone))
        with pytest.raises(ArgumentError, match="`seed` has to be one number or 2"):
            task(tiny_clip, jobs, replace(QUICK, seed=[1, 2, 3]), **more)


def test_reports_count_through_all_jobs_and_a_stop_ends_them(tiny_clip):
    steps = []
    distill(tiny_clip, TEXTS, QUICK, callback=lambda r: steps.append((r.step, r.steps)))
    assert steps == [(k, 10) for k in range(1, 11)]
    found = fuse(tiny_clip, JOBS, QUICK, always_learn=True, callback=lambda r: r.step == 2)
    assert len(found) == 1 and found[0].prompt
    found = fuse(tiny_clip, JOBS, QUICK, always_learn=True, callback=lambda r: r.step == 7)
    assert len(found) == 2


def test_reports_of_later_jobs_count_the_seconds_of_all(tiny_clip):
    seconds = []
    began = time.monotonic()
    distill(tiny_clip, TEXTS, QUICK, callback=lambda report: seconds.append(report.elapsed))
    assert seconds == sorted(seconds) and len(seconds) > 2
    assert seconds[-1] <= time.monotonic() - began


def test_jobs_share_the_time_limit(tiny_clip, clock):
    clock.tick = 0.02
    began = clock.now
    distill(tiny_clip, TEXTS, all_words(effort="fast", time_limit=1.0, prompt_len=3))
    assert 1.0 <= clock.now - began < 1.3


@pytest.mark.parametrize(
    "task, jobs, argument",
    [
        (distill, [], "prompt"),
        (distill, ["a cat", 3], "prompt"),
        (distill, 3, "prompt"),
        (fuse, [["a cat", "a dog"], []], "sources"),
        (fuse, [["a cat", "a dog"], "a fish"], "sources"),
        (fuse, [], "sources"),
    ],
)
def test_jobs_that_cannot_be_done(task, jobs, argument, tiny_clip):
    with pytest.raises(ArgumentError) as caught:
        task(tiny_clip, jobs, QUICK)
    assert caught.value.argument == argument
