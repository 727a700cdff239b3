"""The work of text towers, counted by hand."""

from __future__ import annotations

import pytest
import torch
from conftest import all_words, make_clip, paper
from open_clip.model import CustomTextCLIP
from PIL import Image

from pez_core import JointClip, distill, invert
from pez_core.capture import Replay
from pez_core.tower_work import count, counted

# Three blocks of width 32 in the tiny CLIP: query, key and value, output, and an MLP of four times
# the width; two operations for each weight.
TOKEN = 2 * 3 * (3 + 1 + 4 + 4) * 32**2
CONTEXT = 77


def test_a_pass_counts_its_tokens_and_the_backward_pass_again(tiny_clip):
    encode = tiny_clip.text.encoder()  # computes the start token
    embeddings = tiny_clip.text.token_embedding.detach()[torch.randint(1000, 2000, (3, 5))]
    with counted() as work:
        encode(embeddings)
    assert work.flops == 3 * (5 + 1) * TOKEN  # and the end token
    with counted() as work:
        encode(embeddings.clone().requires_grad_())
    assert work.flops == 2 * 3 * (5 + 1) * TOKEN
    with counted() as work:
        rest = encode.given(embeddings[:, :2])
        rest(embeddings[:, 2:].repeat_interleave(4, dim=0))
    assert work.flops == (3 * 2 + 12 * (3 + 1)) * TOKEN
    with counted() as work:
        tiny_clip.encode_texts(["a fish", "a bird"])
    assert work.flops == 2 * CONTEXT * TOKEN


def test_a_tower_that_is_not_causal_takes_its_whole_context():
    clip = make_clip(CustomTextCLIP, text={"no_causal_mask": True, "pool_type": "last"})
    embeddings = clip.text.token_embedding.detach()[torch.randint(1000, 2000, (3, 5))]
    with counted() as work:
        clip.text.encoder()(embeddings)
    assert work.flops == 3 * CONTEXT * TOKEN


def test_blocks_count_for_the_blocks_around_them():
    count(1)  # nobody listens
    with counted() as outer:
        count(2)
        with counted() as inner:
            count(3)
        count(4)
    assert (outer.flops, inner.flops) == (9, 3)
    with counted() as outer, counted(alone=True) as inner:
        count(6)
    assert (outer.flops, inner.flops) == (0, 6)
    with counted() as outer, pytest.raises(KeyError), counted():
        count(5)
        raise KeyError
    assert outer.flops == 5


def test_a_replayed_step_counts_like_the_step():
    class Recorder:
        failed = False

        def warm_up(self, step):
            step()

        def record(self, step):
            step()
            return lambda: total.add_(1)  # a graph launches kernels, and runs nothing of Python

    def step():
        total.add_(1)
        count(10)

    total = torch.zeros(())
    replay = Replay(step, Recorder(), lambda: [total], warm_up=1)
    for calls in range(1, 5):  # an eager one, the capture, and two of the graph
        with counted() as work:
            replay()
        assert work.flops == 10 and total == calls


def test_a_result_has_the_work_of_its_search(tiny_clip):
    drawing = Image.new("RGB", (20, 20), "red")
    start = 1 * TOKEN  # the start token, computed once
    verified = CONTEXT * TOKEN
    (result,) = invert(tiny_clip, drawing, paper(steps=7, prompt_len=4))
    assert result.tower_flops == start + 7 * 2 * (4 + 1) * TOKEN + verified
    (more,) = invert(tiny_clip, drawing, all_words(steps=7, swaps=3, prompt_len=4))
    assert more.tower_flops > result.tower_flops
    joint = JointClip([tiny_clip, make_clip(seed=1)])
    assert joint.feature_size == 32  # encodes a text, once
    (two,) = invert(joint, drawing, paper(steps=7, prompt_len=4))
    assert two.tower_flops == 2 * result.tower_flops
    both = invert(tiny_clip, [drawing, drawing], paper(steps=7, prompt_len=4))
    assert [one.tower_flops for one in both] == [2 * result.tower_flops - start] * 2


def test_sections_of_a_long_prompt_add_up(tiny_clip):
    options = paper(steps=2, prompt_len=2)
    one = distill(tiny_clip, "a large green fish in the sea", options)
    two = distill(tiny_clip, "a large green fish in the sea BREAK a small red bird", options)
    assert 0 < one.tower_flops < two.tower_flops
