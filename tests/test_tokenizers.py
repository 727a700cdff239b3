"""CLIPs whose tokenizers are of other families than CLIP's own: SentencePiece and Gemma's.

The classes are those of transformers, with vocabularies that are made here. Gemma's puts no space
before the first word, so that a word has one token where it begins a text and another one behind a
space.
"""

import json
import re

import open_clip
import pytest
import torch
from conftest import ROOT, CustomTextCLIP, make_model

from pez_core import Clip, SearchOptions, Vocabulary, distill, fuse, invert
from pez_core.caption import Caption
from pez_core.clip.images import load_image
from pez_core.errors import ArgumentError
from pez_core.space import PhraseSpace

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

TEXT = re.sub(r"[^a-z ]+", " ", (ROOT / "docs/method.md").read_text().lower())
WORDS = re.findall(r"\w+", "a red green blue apple dog car house table on of photo old night")


def gemma(side="right"):
    """Gemma's: byte pairs in which the space is a letter."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "merged_with_next")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, show_progress=False
    )
    lines = [TEXT, " ".join(WORDS * 50), *(word for word in WORDS for _ in range(50))]
    trained.train_from_iterator(lines, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = transformers.GemmaTokenizer(model["vocab"], merges, padding_side=side)
    return _with_end(tokenizer, "<eos>")


def t5():
    """SigLIP's: unigrams of SentencePiece, which puts a space before the first word, too."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [(f"▁{word}", -2.0) for word in WORDS]
    letters = [(letter, -9.0) for letter in "abcdefghijklmnopqrstuvwxyz▁"]
    return transformers.T5Tokenizer(vocab=[*special, *words, *letters], extra_ids=0)


def _with_end(tokenizer, end):
    backend = tokenizer.backend_tokenizer
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, backend.token_to_id(end))]
    )
    return tokenizer


def make(tokenizer, folder, **text):
    tokenizer.save_pretrained(folder)
    read = open_clip.tokenizer.HFTokenizer(str(folder), context_length=16, clean="canonicalize")
    text = {"no_causal_mask": True, "pool_type": "last"} | text
    text |= {"context_length": 16, "vocab_size": len(read.tokenizer)}
    return Clip(make_model(CustomTextCLIP, text), read, "tiny")


@pytest.fixture(scope="module")
def siglip2(tmp_path_factory):
    return make(gemma(), tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    return make(t5(), tmp_path_factory.mktemp("t5"))


@pytest.fixture(params=["siglip2", "siglip"])
def clip(request):
    return request.getfixturevalue(request.param)


def words_of(clip):
    return {clip.text.words.decode([i]) for i in clip.vocabulary.tolist()}


def small(**fields):
    options = {"prompt_len": 3, "effort": "fast", "steps": 3, "swaps": 4, "block_unsafe": False}
    return SearchOptions(**(options | fields))


def test_all_words_are_in_the_default_vocabulary(clip):
    assert set(WORDS) <= words_of(clip)


def test_gemmas_tokens_are_those_behind_a_space(siglip2, siglip):
    words = siglip2.text.words
    assert words.bare_start and not siglip.text.words.bare_start
    assert not words.round_trips(words.encode_behind(" apple"))  # not alone
    assert words.round_trips_inside(words.encode_behind(" apple"))
    assert not words.round_trips_inside(words.encode("apple"))  # fuses with the word before it
    assert words.openings([words.encode_behind(" apple")]) == [tuple(words.encode("apple"))]
    pieces = [i for i in siglip2.vocabulary.tolist() if words.encode(words.decode([i])) == [i]]
    assert not [i for i in pieces if words.decode([i]).isalnum()]


def exact(clip, result, pictures):
    """The prompt consists of separate words, and its similarity is that of the printed text."""
    words = clip.text.words
    assert words.encode(result.prompt) == result.token_ids
    feature = clip.encode_texts([result.prompt])
    targets = clip.encode_images(pictures)
    assert float(feature @ targets.T.mean(1)) == pytest.approx(result.similarity, abs=1e-5)
    # and it is what the loop saw
    embeddings = clip.text.token_embedding.detach()[torch.tensor([result.token_ids])]
    seen = torch.nn.functional.normalize(clip.text(embeddings), dim=-1)
    torch.testing.assert_close(seen, feature, atol=2e-6, rtol=1e-5)


def picture():
    return [torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize(
    "options", [small(), small(effort="fast", steps=3, swaps=0), small(restarts=2, prompt_len=6)]
)
def test_a_prompt_is_separate_words(clip, options):
    pictures = [load_image(one) for one in picture()]
    (result,) = invert(clip, picture(), options)
    assert len(result.learned.split()) == options.prompt_len
    exact(clip, result, pictures)


@pytest.mark.parametrize(
    "caption", ["a photo of {}", "{} on a table", "a photo of {} on a table", "of {}"]
)
def test_a_caption_around_learned_words(clip, caption):
    (result,) = invert(clip, picture(), small(), caption=caption)
    before, after = caption.split("{}")
    assert result.prompt.startswith(before) and result.prompt.endswith(after)
    assert len(result.learned.split()) == 3
    assert clip.text.words.encode(result.prompt) == result.token_ids
    frame = Caption(clip, caption)
    assert frame.ids(result.token_ids[len(frame.before) :][:3]) == result.token_ids


def test_a_bank_of_words_and_phrases(clip):
    bank = ["red apple", "old house", "dog", "night"]
    options = small(prompt_len=4, vocabulary=Vocabulary(only=bank), swaps=12)
    (result,) = invert(clip, picture(), options)
    assert re.fullmatch(r"((red apple|old house|dog|night)( |$))+", result.prompt)
    assert len(result.token_ids) == 4


def test_a_text_to_start_from(clip):
    options = small(start_from="red apple", steps=1, swaps=0, vocabulary=Vocabulary(only=WORDS))
    (result,) = invert(clip, picture(), options)
    assert result.prompt.startswith("red apple ")
    (result,) = invert(clip, picture(), options, caption="a photo of")
    assert result.learned.startswith("red apple ")


def test_a_start_with_a_blocked_word_is_named(siglip2):
    vocabulary = Vocabulary(only=WORDS) & Vocabulary(block=["red apple"])
    with pytest.raises(ArgumentError, match="`start_from` begins with a blocked word"):
        invert(siglip2, picture(), small(start_from="red apple", vocabulary=vocabulary))


def test_distill_and_fuse(clip):
    text = "a red apple on a old table of a house"
    short = distill(clip, text, small(prompt_len=None), ratio=0.4)
    assert len(short.learned.split()) == 4 and short.tokens_before == 10
    kept = distill(clip, "a red dog on a table (blue car:1.2)", small(prompt_len=2))
    assert kept.prompt.endswith(" (blue car:1.2)") and kept.tokens_before == 8
    fused = fuse(clip, ["red apple", "blue car"], small(), always_learn=True)
    assert len(fused.prompt.split()) == 3
    assert fuse(clip, ["red apple", "blue car"]).token_ids == clip.text.words.encode(
        "red apple blue car"
    )


def test_the_first_phrase_of_a_space_comes_from_a_set_of_its_own():
    table = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    first, behind = [(0,), (1, 2)], [(3,), (4,), (5, 6)]
    space = PhraseSpace(table, behind, 4, None, first)
    wanted = torch.randn(20, 4, 5, generator=torch.Generator().manual_seed(1))
    found = space.nearest(wanted)

    def fill(row, left):
        if not left:
            return [row]
        phrases = behind if row else first
        return [r for p in phrases if len(p) <= left for r in fill([*row, *p], left - len(p))]

    prompts = torch.tensor(fill([], 4))
    directions = torch.nn.functional.normalize(table, dim=-1)[prompts]
    cosines = (torch.nn.functional.normalize(wanted, dim=-1)[:, None] * directions).sum((-1, -2))
    assert torch.equal(found, prompts[cosines.argmax(dim=1)])
    known = {tuple(row) for row in prompts.tolist()}
    generator = torch.Generator().manual_seed(2)
    drawn = space.random(400, 4, generator).tolist()
    assert {tuple(row) for row in drawn} == known
    changed = space.changed(torch.tensor(drawn[0]), 40, generator).tolist()
    assert {tuple(row) for row in changed} <= known and len({*map(tuple, changed)}) > 1
    for position in range(4):
        ids = torch.tensor(drawn[:6])
        gradient = torch.randn(6, 4 - position, 5, generator=generator)
        swaps, _ = space.swaps(ids, gradient, position, 3)
        tried = space.swapped(ids, swaps, position).flatten(0, 1)
        assert {tuple(row) for row in tried.tolist()} <= known
    with pytest.raises(ArgumentError, match="take 1 or 3 or 5"):
        PhraseSpace(table, [(5, 6)], 4, None, [(0,)])


def test_a_tokenizer_that_pads_at_the_left_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="puts padding before the text"):
        make(gemma("left"), tmp_path)


def test_all_tokens_at_once_are_read_like_each_alone(clip):
    words = clip.text.words
    ids = range(-2, words.size + 2)
    assert words.round_trip_ids(ids) == [i for i in ids if words.round_trips_inside([i])]
    phrases = [(i,) for i in range(words.size)]
    for phrase, start in zip(phrases, words.openings(phrases), strict=True):
        alone = words.encode(words.decode(phrase))
        assert start == (tuple(alone) if alone and words.round_trips(alone) else None)
