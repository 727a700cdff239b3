"""`distill` and `fuse`: prompts in, shorter or joined prompts out."""

import pickle
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import EXAMPLES, all_words, paper

from pez_core import (
    ArgumentError,
    JobError,
    JointClip,
    SearchOptions,
    Vocabulary,
    distill,
    fuse,
    load_clip,
)
from pez_core.prompt_text import read
from pez_core.targets import encode_targets

LONG = (
    "a very happy dog with a big hat sitting in front of a green tree , bright sun , yellow "
    "flower , smile , blue sky with white cloud and a rainbow"
)
QUICK = paper(60)


def count(clip, text):
    return len(clip.tokenizer.encode(text))


@pytest.mark.parametrize("ratio", [0.7, 0.5, 0.3, 0.1])
def test_ratios_of_the_paper(emoji_clip, ratio):
    result = distill(emoji_clip, LONG, QUICK, ratio=ratio)
    before = count(emoji_clip, LONG)
    assert result.tokens_before == before
    assert result.tokens_after == len(result.token_ids) == round(ratio * before)
    assert result.tokens_saved == before - result.tokens_after
    assert emoji_clip.tokenizer.encode(result.prompt) == result.token_ids
    a, b = emoji_clip.encode_texts([LONG, result.prompt])
    assert result.similarity == pytest.approx((a @ b).item(), abs=1e-5)
    # it is closer than as many of the prompt's own first words
    cut = emoji_clip.text.words.decode(emoji_clip.tokenizer.encode(LONG)[: result.tokens_after])
    assert result.similarity > (emoji_clip.encode_texts([cut])[0] @ a).item()
    assert result.note == "" and len(result.candidates) == 1


def test_a_number_of_tokens(emoji_clip):
    result = distill(emoji_clip, LONG, paper(60, prompt_len=5))
    assert result.tokens_after == 5
    best = distill(emoji_clip, LONG, paper(60, prompt_len=5, restarts=3))
    assert len(best.candidates) == 3 and best.similarity >= result.similarity


def test_longer_than_the_context_is_never_cut(emoji_clip):
    """Two prompts that only differ behind the context are two different targets."""
    head = " , ".join(["red car"] * 25)
    ending = "blue fish in water " * 12
    assert count(emoji_clip, head) == 74
    options = paper(60, prompt_len=6)
    first = distill(emoji_clip, head, options)
    second = distill(emoji_clip, f"{head} {ending}", options)
    assert second.tokens_before == 74 + 48
    fish = emoji_clip.encode_texts(["blue fish in water"])[0]
    close = [(emoji_clip.encode_texts([r.prompt])[0] @ fish).item() for r in (first, second)]
    assert close[1] > close[0] + 0.2
    # the target is the mean of both contexts by their tokens
    ids = emoji_clip.tokenizer.encode(f"{head} {ending}")
    parts = emoji_clip.encode_texts(
        [emoji_clip.text.words.decode(ids[:75]), emoji_clip.text.words.decode(ids[75:])]
    )
    target = torch.nn.functional.normalize(75 * parts[0] + 47 * parts[1], dim=0)
    expected = (emoji_clip.encode_texts([second.prompt])[0] @ target).item()
    assert second.similarity == pytest.approx(expected, abs=1e-5)


def test_a_prompt_beyond_one_context_is_shortened_further_with_a_note(emoji_clip):
    result = distill(emoji_clip, LONG + " , " + LONG + " , " + LONG, paper(3), ratio=0.9)
    assert result.tokens_after == 75
    assert "the size of one context: 75 learned tokens, not " in result.note
    whole = distill(emoji_clip, " , ".join([LONG] * 4), paper(3), ratio=1.0)
    assert whole.tokens_after == 75 and "shortened further" in whole.note


def test_weights_and_tags_stay(emoji_clip):
    prompt = f"(red:1.3) cat, {LONG} <lora:foo:0.8>, embedding:bad-hands"
    result = distill(emoji_clip, prompt, QUICK, ratio=0.3)
    assert result.prompt == f"(red:1.3) {result.learned} <lora:foo:0.8>, embedding:bad-hands"
    assert not set("()<>[]\\") & set(result.learned)
    # CLIP reads the weighted word and no tag
    assert emoji_clip.tokenizer.encode(f"red {result.learned}") == result.token_ids
    a, b = emoji_clip.encode_texts([f"red cat, {LONG}", f"red {result.learned}"])
    assert result.similarity == pytest.approx((a @ b).item(), abs=2e-2)
    assert result.tokens_before == count(emoji_clip, f"red cat, {LONG}")


IN_PLACE = [
    "<lora:Detail Tweaker (SDXL):0.8>",
    "<lyco:Foo (v1.0):1:0.5>",
    "saber \\(fate\\)",
    "[cat:dog:0.5]",
    "{red|blue}",
    "__color__",
    "embedding:name",
    "(two words:1.2)",
]


@pytest.mark.parametrize("syntax", IN_PLACE)
def test_syntax_stays_in_its_place(emoji_clip, syntax):
    middle = LONG.index(" sitting")
    prompt = f"{LONG[:middle]}, {syntax}, {LONG[middle:]}"
    result = distill(emoji_clip, prompt, paper(40, prompt_len=8))
    first, last = (part.split() for part in result.prompt.split(syntax))
    assert (len(first), len(last)) == (2, 6)  # 9 of 33 tokens stand before it
    assert " ".join(first + last) == result.learned
    # the similarity is that of the prompt as it is printed
    texts = [read(prompt), read(result.prompt)]
    assert result.token_ids == emoji_clip.tokenizer.encode(texts[1])
    a, b = emoji_clip.encode_texts(texts)
    assert result.similarity == pytest.approx((a @ b).item(), abs=1e-5)


@pytest.mark.slow
def test_syntax_among_the_words_counts_in_each_step(emoji_clip):
    """The swaps encode the fixed words among the learned ones, whatever the position."""
    options = SearchOptions(effort="fast", prompt_len=6)
    reports = []
    prompt = f"(fish:1.2) {LONG} (boat:1.2), {LONG} [ship] end"
    result = distill(emoji_clip, prompt, options, callback=reports.append)
    assert max(r.similarities[0] for r in reports) == pytest.approx(result.similarity, abs=1e-4)
    assert (
        result.prompt.startswith("(fish:1.2) ") and "(boat:1.2)" in result.prompt.split("[ship]")[0]
    )


@pytest.mark.slow
def test_syntax_among_the_words_with_several_clips(emoji_clip):
    clip = JointClip([emoji_clip, load_clip("emoji-clip", device="cpu")])
    options, reports = SearchOptions(effort="fast", steps=3, swaps=6, prompt_len=6), []
    result = distill(clip, f"{LONG} (boat:1.2) {LONG}", options, callback=reports.append)
    assert " (boat:1.2) " in result.prompt
    assert reports[-1].similarities[0] == pytest.approx(result.similarity, abs=1e-4)


def test_a_phrase_is_not_parted_by_syntax(emoji_clip):
    words = Vocabulary(only=["happy dog", "yellow sun"])
    options = paper(20, prompt_len=4, vocabulary=words)
    result = distill(emoji_clip, f"{LONG[:60]} (big:1.2) {LONG[60:]}", options)
    assert result.prompt == f"{result.learned} (big:1.2)"


def test_parts_of_and_keep_their_weights(emoji_clip):
    prompt = f"{LONG} :1.2 AND {LONG} fish:0.8 BREAK {LONG}"
    result = distill(emoji_clip, prompt, paper(20, prompt_len=3))
    first, rest = result.prompt.split(" AND ")
    second, third = rest.split(" BREAK ")
    assert [len(part.split()) for part in (first, second, third)] == [4, 4, 3]
    assert first.endswith(" :1.2") and second.endswith(" :0.8")


@pytest.mark.slow
def test_sections_are_shortened_each_for_itself(emoji_clip):
    reports = []
    result = distill(
        emoji_clip,
        f"{LONG} BREAK a cat BREAK {LONG} (big:1.2)",
        paper(20),
        ratio=0.2,
        callback=reports.append,
    )
    first, second, third = result.prompt.split(" BREAK ")
    assert len(first.split()) < 12 and third.endswith("(big:1.2)")
    assert len(second.split()) == 1
    assert [r.step for r in reports] == list(range(1, 61))
    assert {r.steps for r in reports} == {60}
    short = distill(emoji_clip, f"{LONG} BREAK a cat", paper(60, prompt_len=4))
    assert short.prompt.endswith(" BREAK a cat") and "Section 2 is short enough" in short.note


def test_a_stop_keeps_what_was_found(emoji_clip):
    result = distill(
        emoji_clip,
        f"{LONG} BREAK {LONG}",
        paper(50),
        ratio=0.2,
        callback=lambda report: report.step >= 10,
    )
    first, second = result.prompt.split(" BREAK ")
    assert len(first.split()) < 12 and second == LONG
    assert "Section 2 was not reached" in result.note


@pytest.mark.parametrize("ratio, options", [(1, {}), (0.3, {"prompt_len": 60})])
def test_a_prompt_that_is_short_enough_comes_back(emoji_clip, ratio, options):
    options = SearchOptions(**options)
    result = distill(emoji_clip, "A Dog,  (red:1.2), <lora:x:1>", options, ratio=ratio)
    assert result.prompt == "A Dog,  (red:1.2), <lora:x:1>"
    assert result.similarity == 1 and result.tokens_saved == 0
    assert "short enough" in result.note


@pytest.mark.parametrize("prompt", ["BREAK a dog", "<lora:x:1> BREAK a cat", "(a dog:1.2)"])
@pytest.mark.slow
def test_sections_without_plain_words(emoji_clip, prompt):
    result = distill(emoji_clip, prompt)
    assert "unchanged" in result.note and result.tokens_after >= 1
    assert result.prompt.endswith(prompt.split()[-1])


def test_braces_in_a_tag_are_no_place_for_learned_words(emoji_clip):
    result = distill(emoji_clip, LONG + " (a {} b:1.2)", paper(60, prompt_len=3))
    assert result.prompt == f"{result.learned} (a {{}} b:1.2)"


def test_distilling_within_a_vocabulary(emoji_clip):
    words = Vocabulary(only=["happy dog", "tree", "sun", "sky"])
    result = distill(emoji_clip, LONG, paper(60, prompt_len=4, vocabulary=words))
    assert set(result.prompt.split()) <= {"happy", "dog", "tree", "sun", "sky"}


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"prompt": ""}, ValueError, "`prompt` holds no words"),
        ({"prompt": " , "}, ValueError, "`prompt` holds no words"),
        ({"prompt": "<lora:x:1>"}, ValueError, "`prompt` holds no words"),
        ({"prompt": 3}, TypeError, "`prompt`"),
        ({"ratio": 0}, ValueError, "`ratio` has to be above 0 and at most 1 but is 0"),
        ({"ratio": 1.5}, ValueError, "`ratio` has to be above 0 and at most 1"),
        ({"ratio": float("nan")}, ValueError, "`ratio`"),
        ({"ratio": "0.3"}, TypeError, "`ratio`"),
    ],
)
def test_bad_distilling(emoji_clip, options, error, message):
    with pytest.raises(error, match=message):
        distill(emoji_clip, **({"prompt": LONG} | options))


def test_a_join_that_fits_is_the_plain_join(emoji_clip):
    result = fuse(emoji_clip, ["a red dog", " happy face "], weights=[3, 1])
    assert result.prompt == "a red dog happy face" and not result.fused
    assert result.tokens == count(emoji_clip, result.prompt) == 5
    a, b, c = emoji_clip.encode_texts(["a red dog", "happy face", result.prompt])
    assert result.similarities == pytest.approx([(a @ c).item(), (b @ c).item()], abs=1e-5)
    mean = 0.75 * (a @ c).item() + 0.25 * (b @ c).item()
    assert result.similarity == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize(
    "sources",
    [["a red cat AND a blue dog", "a green bird :1.2"], ["(red cat", "blue dog:1.3)"]],
)
def test_a_join_is_measured_as_it_is_printed(emoji_clip, sources):
    """Syntax may reach from one source into the next."""
    result = fuse(emoji_clip, sources)
    assert result.prompt == " ".join(sources)
    assert result.tokens == count(emoji_clip, read(result.prompt))
    features = encode_targets("sources", emoji_clip, [*sources, result.prompt])
    expected = (features[:-1] @ features[-1]).tolist()
    assert result.similarities == pytest.approx(expected, abs=1e-5)


def test_a_join_needs_no_room_for_learned_words(emoji_clip):
    options = SearchOptions(prompt_len=16)
    assert fuse(emoji_clip, ["a cat", "a dog"], options, max_tokens=10).prompt == "a cat a dog"


def test_a_join_that_does_not_fit_is_learned(emoji_clip):
    options = paper(60, prompt_len=10)
    result = fuse(emoji_clip, [LONG, LONG, "a red fish"], options, max_tokens=12)
    assert result.fused and result.tokens == 10
    assert "more than max_tokens 12" in result.note
    assert len(result.similarities) == 3 and len(result.candidates) == 1


@pytest.mark.slow
def test_prompts_and_images_fuse(emoji_clip):
    sources = ["a red dog", Path(EXAMPLES[3]), LONG + " , " + LONG + " , " + LONG]
    options = paper(100, restarts=2)
    result = fuse(emoji_clip, sources, options)
    assert result.fused and result.tokens == 16 and result.note == ""
    tilted = fuse(emoji_clip, sources, options, weights=[1, 20, 1])
    assert tilted.similarities[1] > result.similarities[1]
    options = paper(60, prompt_len=3)
    asked = fuse(emoji_clip, ["a red dog", "blue fish"], options, always_learn=True)
    assert asked.fused and asked.tokens == 3 and asked.note == ""


@pytest.mark.parametrize(
    "options, argument, message",
    [
        ({"sources": ["one"]}, "sources", "has to hold at least two but holds 1"),
        ({"sources": "one"}, "sources", "has to hold at least two but holds 1"),
        ({"sources": ["one", ""]}, "sources", "holds an empty text"),
        ({"sources": ["one", "<lora:x:1>"]}, "sources", "holds only tags, no words"),
        ({"sources": ["one", "caf\udce9"]}, "sources", "which holds bytes that are not UTF-8"),
        ({"sources": ["one", Path("missing.png")]}, "sources", "missing.png.* does not exist"),
        ({"max_tokens": 76}, "max_tokens", "has to be from 1 to 75"),
        (
            {"max_tokens": 3, "options": all_words(prompt_len=16)},
            "prompt_len",
            "is 16, more than `max_tokens` 3",
        ),
        ({"weights": [1]}, "weights", "has to hold 2 numbers"),
    ],
)
def test_bad_joins(emoji_clip, options, argument, message):
    with pytest.raises(ArgumentError, match=message) as error:
        fuse(emoji_clip, **({"sources": ["a dog", "a red cat"]} | options))
    assert error.value.argument == argument


def test_tags_of_the_sources_stay_and_weights_are_read(emoji_clip):
    sources = ["a (red:1.3) dog <lora:x:1>", "a blue fish embedding:y"]
    joined = fuse(emoji_clip, sources)
    assert joined.prompt == " ".join(sources) and joined.tokens == 6
    assert joined.similarities == fuse(emoji_clip, ["a red dog", "a blue fish"]).similarities
    fused = fuse(emoji_clip, sources, QUICK, always_learn=True, max_tokens=5)
    assert fused.prompt == f"{fused.learned} <lora:x:1> embedding:y" and fused.tokens == 5
    text = emoji_clip.encode_texts([fused.learned])[0]
    close = (emoji_clip.encode_texts(["a red dog", "a blue fish"]) @ text).tolist()
    assert fused.similarities == pytest.approx(close, abs=1e-5)


def test_all_jobs_are_checked_before_the_first_search(emoji_clip):
    reports = []
    with pytest.raises(ArgumentError, match="empty text"):
        jobs = [["a dog", "a cat"], ["a cat", ""]]
        fuse(emoji_clip, jobs, QUICK, always_learn=True, callback=reports.append)
    with pytest.raises(ArgumentError, match="no words"):
        distill(emoji_clip, [LONG, "<lora:x:1>"], QUICK, callback=reports.append)
    assert reports == []


def test_a_job_that_fails_keeps_those_before_it(emoji_clip, monkeypatch):
    def failing(*arguments, **keywords):
        if done:
            raise FloatingPointError("the loss is NaN")
        done.append(None)
        return learn(*arguments, **keywords)

    for task, jobs in ((distill, [LONG, LONG]), (fuse, [[LONG, Path(EXAMPLES[0])]] * 2)):
        module = import_module(task.__module__)
        learn, done = module.learn, []
        first = task(emoji_clip, jobs[0], paper(5))
        monkeypatch.setattr(module, "learn", failing)
        with pytest.raises(JobError, match=r"Job 2 of 2 failed \(the loss is NaN\)") as error:
            task(emoji_clip, jobs, paper(5))
        assert [one.prompt for one in error.value.partial] == [first.prompt]
        again = pickle.loads(pickle.dumps(error.value))
        assert str(again) == str(error.value) and again.partial == error.value.partial
        monkeypatch.undo()
        with monkeypatch.context() as patch, pytest.raises(FloatingPointError):
            patch.setattr(module, "learn", failing)
            task(emoji_clip, jobs, paper(5))


def test_the_result_of_one_section_keeps_what_its_search_says(emoji_clip):
    words = Vocabulary(only=["happy", "dog", "tree"])
    result = distill(emoji_clip, LONG, SearchOptions(vocabulary=words, steps=3, swaps=2))
    assert "Words may occur twice" in result.note
    result = fuse(
        emoji_clip,
        [LONG, LONG],
        SearchOptions(vocabulary=words, steps=3, swaps=2, prompt_len=9),
        max_tokens=10,
    )
    assert "one prompt was learned instead. Words may occur twice" in result.note
    options = SearchOptions(effort="paper", steps=3, trajectory=True)
    result = distill(emoji_clip, LONG, options)
    assert result.loop_similarity is not None and result.trajectory is not None
