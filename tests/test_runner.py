"""One search for several targets: its parts, its time, its reports and its rules."""

import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import EXAMPLES, CustomTextCLIP, all_words, make_clip, paper
from PIL import Image

from pez_core import (
    ArgumentError,
    PezSettings,
    SearchOptions,
    SwapSettings,
    TokenSpace,
    Vocabulary,
    distill,
    explain,
    fuse,
    invert,
    refine,
    score,
    search,
    style,
)
from pez_core.caption import Caption
from pez_core.objectives import Similarity
from pez_core.priors import SumOfPriors
from pez_core.single_words import WORD_WEIGHT, SingleWordPrior, WordFeatures

TEXT = "a cat and a dog in a red car near the old house"


@pytest.fixture(scope="module")
def picture():
    return torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def small_clip():
    """A CLIP with few words."""
    clip = make_clip()
    clip.vocabulary = clip.vocabulary[::8]
    return clip


@pytest.fixture
def all_tokens_clip():
    """A CLIP whose prompts may have every token."""
    clip = make_clip()
    clip.trained_tokens = None
    return clip


# ------------------------------------------------------------------------- the parts


def by_hand(clip, target, steps, swaps, word_weight):
    """Both parts of the search for one target, with the words of the CLIP."""
    effort = all_words(effort="best", steps=steps, swaps=swaps).work
    space = TokenSpace(clip.text.token_embedding, clip.vocabulary)
    draws = torch.Generator().manual_seed(0)
    ids = torch.cat([space.random(1, 4, draws) for _ in range(effort.trials)])
    objective = Similarity(clip.text.encoder(), target[None, None])
    begun = search(space, objective, ids, PezSettings(steps=steps))
    prior = None
    if word_weight:
        words = WordFeatures(clip)
        prior = SumOfPriors([SingleWordPrior(words, space, target[None], word_weight)])
    settings = SwapSettings(steps=swaps, trials=effort.trials, screened=effort.screened)
    found = refine(space, objective, begun.ids, settings, seeds=[0], prior=prior)
    return found.ids[0].tolist()


def test_a_search_is_pez_and_then_swaps_with_the_prior_of_single_words(small_clip, picture):
    options = all_words(prompt_len=4, effort="best", steps=5, swaps=12)
    (result,) = invert(small_clip, picture, options)
    (target,) = small_clip.encode_images([_pil(picture)])
    assert WORD_WEIGHT > 0
    assert result.token_ids == by_hand(small_clip, target, 5, 12, WORD_WEIGHT)
    # the prior changes the choice, so that this test fails without it
    assert result.token_ids != by_hand(small_clip, target, 5, 12, 0)


def test_prompts_of_texts_have_no_prior_of_single_words(tiny_clip, picture, monkeypatch):
    weights = []

    class Recorded(SingleWordPrior):
        def __init__(self, words, space, towards, weight):
            weights.append(weight)
            super().__init__(words, space, towards, weight)

    monkeypatch.setattr("pez_core.runner.SingleWordPrior", Recorded)
    options = all_words(prompt_len=3, effort="fast", steps=2, swaps=2)
    invert(tiny_clip, picture, options)
    assert weights == [WORD_WEIGHT]
    style(tiny_clip, [picture, picture.flip(0)], options)
    distill(tiny_clip, TEXT, options)
    fuse(tiny_clip, ["a dog", "a cat"], options, always_learn=True)
    assert weights == [WORD_WEIGHT]


def _pil(tensor):
    return Image.fromarray((tensor * 255).round().to(torch.uint8).numpy())


def test_a_seed_for_each_image(tiny_clip):
    pictures = list(torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(1)))
    options = all_words(prompt_len=3, steps=3, swaps=3, effort="fast")
    together = invert(tiny_clip, pictures, replace(options, seed=[7, 9]))
    for picture, seed, result in zip(pictures, (7, 9), together, strict=True):
        (alone,) = invert(tiny_clip, picture, replace(options, seed=seed))
        assert alone.prompt == result.prompt
    same = invert(tiny_clip, [pictures[0]] * 2, options)
    assert same[0].prompt == same[1].prompt


# ------------------------------------------------------------------------- time


@pytest.mark.parametrize("batch_size", [None, 1])
def test_a_time_limit_is_for_the_whole_call(tiny_clip, clock, batch_size):
    clock.tick = 0.02
    pictures = list(torch.rand(3, 16, 16, 3, generator=torch.Generator().manual_seed(1)))
    options = all_words(prompt_len=3, effort="fast", time_limit=1.5, batch_size=batch_size)
    reports = []
    began = clock.now
    results = invert(tiny_clip, pictures, options, callback=reports.append)
    # a search reads the clock a few times before it ends
    assert 1.5 <= clock.now - began < 1.5 * 1.2
    assert all(result.seconds == results[0].seconds for result in results)
    assert 1.4 < results[0].seconds < 1.5 * 1.2
    steps = [report.step for report in reports]
    assert steps == sorted(steps) and len(set(steps)) == len(steps)
    assert all(report.step <= report.steps for report in reports)
    assert [report.elapsed for report in reports] == sorted(report.elapsed for report in reports)
    # the number of steps is extrapolated from the speed so far
    assert reports[-1].step == pytest.approx(reports[len(reports) // 2].steps, rel=0.3)


@pytest.mark.slow
def test_a_time_limit_ends_both_kinds_of_steps_early(tiny_clip, picture, clock):
    clock.tick = 0.02

    def steps(**fields):
        (result,) = invert(tiny_clip, picture, all_words(prompt_len=3, **fields))
        return result.history[-1][0]

    assert 10 < steps(effort="paper", time_limit=0.5) <= 26
    # PEZ has half of the time, so that swaps follow whatever its speed
    half = steps(effort="fast", steps=10**6, swaps=10**6, time_limit=1.0)
    assert 10**6 < half <= 10**6 + 51
    # its own end comes first where it is earlier
    assert steps(effort="paper", steps=5, time_limit=100) == 5
    assert steps(effort="fast", steps=5, swaps=7, time_limit=100) == 12


def test_a_time_limit_is_shared_by_the_sections_of_a_prompt(tiny_clip, clock):
    clock.tick = 0.02
    began = clock.now
    options = all_words(effort="fast", time_limit=1.0)
    result = distill(tiny_clip, f"{TEXT} BREAK {TEXT}", options)
    assert 1.0 <= clock.now - began < 1.3
    first, second = result.prompt.split(" BREAK ")
    assert TEXT not in (first, second)


# ------------------------------------------------------------------------- contexts and masks


@pytest.fixture
def full_clip():
    """A CLIP that encodes every word over the whole context, with few words."""
    clip = make_clip(CustomTextCLIP, {"no_causal_mask": True, "context_length": 16})
    clip.vocabulary = clip.vocabulary[:600]
    return clip


class SlowTower:
    """Counts the texts that a tower encodes, and lets each take a second of the clock."""

    def __init__(self, clip, clock, monkeypatch):
        self.texts, self.largest, original = 0, 0, clip.text.encoder

        def encoder(fixed=(((), ()),), inserts=()):
            encode = original(fixed, inserts)

            def counted(embeddings):
                if embeddings.shape[1] == 1:  # single words
                    self.texts += len(embeddings)
                    self.largest = max(self.largest, len(embeddings))
                    clock.now += len(embeddings)
                return encode(embeddings)

            counted.given = encode.given
            return counted

        monkeypatch.setattr(clip.text, "encoder", encoder)


def test_few_words_are_encoded_where_each_takes_a_context(full_clip, picture):
    """Of 600 words a sample of 60, those of the prompts, and those that are compared."""
    options = all_words(prompt_len=4, effort="fast", steps=2, swaps=1)
    (result,) = invert(full_clip, picture, options)
    _, computed = full_clip.cache["single tokens"]
    prompts = options.work.trials * 4
    assert result.learned and 60 <= computed.sum() <= 60 + prompts + options.work.screened


def test_single_words_do_not_overrun_the_time_limit(full_clip, picture, clock, monkeypatch):
    """The first words take 60 to 92 s, and more than half of 100 s, which four of them show."""
    tower, began = SlowTower(full_clip, clock, monkeypatch), clock.now
    options = all_words(prompt_len=4, effort="fast", steps=2, swaps=3, time_limit=100)
    (result,) = invert(full_clip, picture, options)
    assert result.learned and tower.texts == 4 and clock.now - began < 100
    # with time enough they count
    invert(full_clip, picture, replace(options, time_limit=1300))
    assert tower.texts > 60 and tower.largest <= 64


def test_single_words_report_and_can_be_ended(full_clip, picture, clock, monkeypatch):
    tower = SlowTower(full_clip, clock, monkeypatch)
    options = all_words(prompt_len=4, effort="fast", steps=2, swaps=3)
    elapsed = []
    (whole,) = invert(full_clip, picture, options, callback=lambda r: elapsed.append(r.elapsed))
    assert max(b - a for a, b in pairwise(elapsed)) <= 64
    assert whole.history[-1][0] == 5
    full_clip.cache.clear()
    tower.texts, reports = 0, []
    (ended,) = invert(
        full_clip, picture, options, callback=lambda r: reports.append(r.step) or r.elapsed > 10
    )
    assert reports[-1] == 2 and ended.learned and tower.texts <= 4 + 64


@pytest.mark.parametrize("length, expected", [(8, 6), (16, 14), (77, 16)])
def test_none_means_what_the_context_holds(length, expected, picture):
    clip = make_clip(text={"context_length": length})
    quick = all_words(effort="fast", steps=1, swaps=1)
    (result,) = invert(clip, picture, quick)
    assert len(result.token_ids) == min(8, expected)
    (beside,) = invert(clip, picture, quick, caption="a photo of")
    assert len(beside.token_ids) == min(8 + 3, length - 2)
    found = style(clip, [picture, 1 - picture], quick)
    assert len(found.token_ids) == min(8, length - 2)
    fused = fuse(clip, ["a cat", "a dog"], quick, always_learn=True)
    assert fused.tokens == expected
    words = "a cat a dog a red car a blue house a fish"
    assert fuse(clip, [words, words], quick).fused == (length < 30)
    with pytest.raises(ArgumentError, match="`prompt_len`"):
        invert(clip, picture, replace(quick, prompt_len=length - 1))


# ------------------------------------------------------------------------- reports


def test_reports_decode_prompts_only_when_they_are_read(tiny_clip, picture, monkeypatch):
    printed = []
    original = Caption.print
    monkeypatch.setattr(
        Caption, "print", lambda self, ids: printed.append(list(ids)) or original(self, ids)
    )
    options = all_words(prompt_len=3, effort="fast", steps=4, swaps=4, restarts=2)

    def prints(callback):
        printed.clear()
        invert(tiny_clip, [picture] * 2, options, callback=callback)
        return len(printed)

    silent = prints(None)  # the candidates at the end
    assert silent == 4
    assert prints(lambda report: None) == silent
    assert prints(lambda report: report.similarity > 2 or report.similarities == []) == silent
    # two results in each of eight reports; a second look costs nothing
    assert prints(lambda report: not report.prompts or not report.prompt) == silent + 2 * 8
    assert prints(lambda report: report.step == 3 and not report.prompt) == silent + 2


def test_a_report_is_one_of_its_own_step(tiny_clip, picture):
    """Reports that are kept do not change with the search."""
    kept, at_once = [], []

    def callback(report):
        kept.append(report)
        at_once.append((report.step, list(report.similarities), list(report.prompts)))

    invert(tiny_clip, picture, paper(20, prompt_len=3), callback=callback)
    assert at_once == [(r.step, r.similarities, r.prompts) for r in kept]
    assert len({prompts[0] for _, _, prompts in at_once}) > 1
    late = []
    invert(tiny_clip, picture, paper(20, prompt_len=3), callback=late.append)
    assert [report.prompts for report in late] == [prompts for _, _, prompts in at_once]


# ------------------------------------------------------------------------- images


def test_images_are_loaded_and_encoded_once(tiny_clip, monkeypatch):
    opened, encoded = Counter(), []
    original, encode = Image.open, tiny_clip.model.encode_image

    def count(file, *arguments, **options):
        opened[str(file)] += 1
        return original(file, *arguments, **options)

    def record(pixels, *arguments, **options):
        encoded.append(len(pixels))
        return encode(pixels, *arguments, **options)

    monkeypatch.setattr(Image, "open", count)
    monkeypatch.setattr(tiny_clip.model, "encode_image", record)
    files = EXAMPLES[:3]
    options = paper(3, prompt_len=3, restarts=2)

    def check(call, *expected):
        opened.clear()
        encoded.clear()
        tiny_clip.cache.clear()  # of the images before
        call()
        assert opened == Counter(map(str, files))
        assert encoded == list(expected)

    check(lambda: invert(tiny_clip, files, options), 3)
    check(lambda: invert(tiny_clip, files, options, shared=True), 3)
    check(lambda: invert(tiny_clip, files[0], options, avoid=files[1:]), 1, 2)
    check(lambda: style(tiny_clip, files, options, keep_content=True), 3)
    check(lambda: style(tiny_clip, files, options), 3, 36)  # and those that are perturbed
    check(lambda: fuse(tiny_clip, ["a dog", *files], options), 3)
    check(lambda: score(tiny_clip, ["a", "b"], files), 3)
    check(lambda: score(tiny_clip, ["a", "b"], files, judge=tiny_clip), 3)
    check(lambda: explain(tiny_clip, "a red dog", files), 3)


# ------------------------------------------------------------------------- rules


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"effort": "fast"},
        {"effort": "fast", "restarts": 2, "start_from": "anchor anchor anchor"},
        {"effort": "fast", "steps": 40, "swaps": 0},
    ],
)
def test_no_word_twice(emoji_clip, options):
    image = emoji_clip.encode_texts(["anchor"])
    options = SearchOptions(**options, prompt_len=8)
    for result in invert(emoji_clip, image, options)[0].candidates:
        words = [word for word in result.learned.split() if word != ","]
        assert len(words) == len(set(words))
    (free,) = invert(emoji_clip, image, replace(options, repeats=True))
    assert free.learned.split().count("anchor") > 1


@pytest.mark.slow
def test_no_word_of_the_caption_again(emoji_clip):
    image = emoji_clip.encode_texts(["anchor"])
    options = SearchOptions(effort="fast", prompt_len=6)
    (result,) = invert(emoji_clip, image, options, caption="an anchor, {} in white")
    assert not {"an", "anchor", "in", "white"} & set(result.learned.split())
    # the best of these words stands in the caption
    words = """anchor penguin banana guitar cloud hammer rocket turtle mushroom candle pizza robot
    camel violin tomato spider pencil bridge lemon trumpet"""
    few = replace(options, vocabulary=Vocabulary(only=words.split()))
    for repeats in (True, False):
        again = replace(few, repeats=repeats)
        (found,) = invert(emoji_clip, image, again, caption="an anchor, {}")
        assert ("anchor" in found.learned.split()) == repeats


def test_a_short_list_of_words_is_used_more_than_once(emoji_clip):
    few = ["anchor", "ship", "fish", "house", "guitar", "cloud", "cat", "dog", "tree", "car", "sun"]
    options = SearchOptions(effort="fast", prompt_len=6, vocabulary=Vocabulary(only=few))
    image, remark = emoji_clip.encode_texts(["anchor"]), "Words may occur twice"
    (result,) = invert(emoji_clip, image, options)
    assert len(result.learned.split()) == 6 and result.note.startswith(remark)
    assert len(few) == 11  # one less than two for each token
    enough = Vocabulary(only=[*few, "moon"])
    for other in (replace(options, vocabulary=enough), replace(options, repeats=True)):
        assert not invert(emoji_clip, image, other)[0].note


@pytest.mark.slow
def test_unsafe_words_are_blocked_by_default(all_tokens_clip, picture):
    words = Vocabulary(only=["nude", "cat"])
    given = dict(prompt_len=3, effort="paper", vocabulary=words, start_from="nude nude nude")

    def learned(**fields):
        return invert(all_tokens_clip, picture, SearchOptions(**given, **fields))[0].learned

    assert learned(steps=1) == "cat cat cat"
    assert learned(steps=1, block_unsafe=False) == "nude nude nude"
    # in swaps, too, where "nude" is the better word
    (target,) = all_tokens_clip.encode_texts(["nude nude nude"])
    for block_unsafe, found in ((True, {"cat"}), (False, {"nude"})):
        options = SearchOptions(
            prompt_len=3,
            effort="fast",
            steps=1,
            swaps=6,
            vocabulary=words,
            block_unsafe=block_unsafe,
        )
        (result,) = invert(all_tokens_clip, target[None], options)
        assert set(result.learned.split()) == found


@pytest.mark.slow
def test_unsafe_words_are_not_spelled_by_pieces_or_with_the_caption(all_tokens_clip, picture):
    clip = all_tokens_clip
    # "nu" and "de" spell the word across the border of the caption, too
    words = Vocabulary(only=["de", "cat"])
    given = {"prompt_len": 1, "effort": "paper", "steps": 1, "vocabulary": words}
    options = SearchOptions(**given)
    (safe,) = invert(clip, picture, options, caption="a nu {}")
    assert safe.learned == "cat"
    (free,) = invert(
        clip,
        picture,
        SearchOptions(**given, block_unsafe=False, start_from="de"),
        caption="a nu {}",
    )
    assert free.learned == "de"


@pytest.mark.slow
@pytest.mark.parametrize("task", ["invert", "style", "distill", "fuse"])
def test_unsafe_words_are_blocked_in_every_task(task, all_tokens_clip, picture):
    clip, words = all_tokens_clip, Vocabulary(only=["nude", "cat"])
    safe = SearchOptions(
        prompt_len=3, effort="paper", steps=1, vocabulary=words, start_from="nude nude nude"
    )
    call = {
        "invert": lambda options: invert(clip, picture, options)[0],
        "style": lambda options: style(clip, [picture, picture.flip(0)], options),
        "distill": lambda options: distill(clip, TEXT, options),
        "fuse": lambda options: fuse(clip, ["a dog", "a cat"], options, always_learn=True),
    }[task]
    assert "nude" not in call(safe).prompt
    assert "nude" in call(replace(safe, block_unsafe=False)).prompt


@pytest.mark.slow
def test_only_ascii_words(all_tokens_clip, picture):
    clip = all_tokens_clip
    (target,) = clip.encode_texts(["café café café"])
    for ascii_only, found in ((False, {"café"}), (True, {"cat"})):
        rules = Vocabulary(only=["café", "cat"], ascii_only=ascii_only)
        options = all_words(
            prompt_len=3, effort="fast", steps=1, swaps=6, vocabulary=rules, start_from="café"
        )
        (result,) = invert(clip, target[None], options)
        assert set(result.learned.split()) == found


@pytest.mark.slow
def test_a_vocabulary_that_leaves_no_prompt(all_tokens_clip, picture):
    words = Vocabulary(only=["hot", "dog"]) & Vocabulary(block=["hot dog"], whole_words=False)
    options = paper(1, prompt_len=2, vocabulary=words)
    blocked = replace(options, vocabulary=words & Vocabulary(block=["dog dog", "hot hot"]))
    assert invert(all_tokens_clip, picture, options)
    blocked = replace(blocked, vocabulary=blocked.vocabulary & Vocabulary(block=["dog hot", "hot"]))
    with pytest.raises(ArgumentError, match="gives no prompt that round-trips") as caught:
        invert(all_tokens_clip, picture, blocked)
    assert caught.value.argument == "vocabulary"


# ------------------------------------------------------------------------- an extra loss


class Length:
    """An extra loss: the distance of a prompt's length in letters from a number."""

    parts, refinable = ((4, 1.0),), False

    def __init__(self, clip, prompts, weight):
        self.prompts, self.weight, self.projection = prompts, weight, weight
        self.token_embedding = clip.text.token_embedding.detach().float()[:, :4].contiguous()

    def objective(self, before, after, goals):
        return lambda embeddings: embeddings.norm(dim=-1).mean(dim=-1)

    def losses(self, texts, goals):
        return torch.tensor([abs(len(text) - 12) / 10 for text in texts])


def test_candidates_are_ranked_by_both_losses(tiny_clip, picture):
    for weight in (0.1, 1.0):
        loss = Length(tiny_clip, 1, weight)
        options = paper(6, prompt_len=3, restarts=5, extra_loss=loss)
        (result,) = invert(tiny_clip, picture, options)
        for candidate in result.candidates:
            expected = loss.losses([candidate.prompt], [0]).item()
            assert candidate.extra_loss == pytest.approx(expected)
        totals = [(1 - weight) * c.similarity - weight * c.extra_loss for c in result.candidates]
        assert totals == sorted(totals, reverse=True)
    by_similarity = [c.similarity for c in result.candidates]
    assert by_similarity != sorted(by_similarity, reverse=True)


def test_an_extra_loss_for_another_number_of_prompts(tiny_clip, picture):
    options = paper(1, extra_loss=Length(tiny_clip, 3, 0.5))
    with pytest.raises(ArgumentError, match="made for 3 prompts, but 1 are learned") as caught:
        invert(tiny_clip, picture, options)
    assert caught.value.argument == "extra_loss"
    with pytest.raises(ArgumentError, match="moves prompts towards the images") as caught:
        invert(tiny_clip, picture, options, negative_prompt=True)
    assert caught.value.argument == "extra_loss"


def test_the_module_of_a_task_is_hidden_by_its_function():
    """`pez_core.tasks.invert` is the function; its module is found in `sys.modules`."""
    assert sys.modules["pez_core.tasks.invert"].invert is invert


def test_a_report_has_the_steps_of_the_part_that_runs(tiny_clip):
    options = all_words(
        effort="fast", steps=3, swaps=4, prompt_len=2, restarts=2, batch_size=1, seed=0
    )
    parts = []
    invert(tiny_clip, torch.rand(16, 16, 3), options, callback=lambda r: parts.append(r.part))
    # two turns, since one search runs at a time
    descent = [(k, 3, True) for k in (1, 2, 3)]
    assert parts[:3] == descent and parts[-7:-4] == descent
    assert {part[1:] for part in parts[3:-7]} == {(4, True)}
    assert {part[1:] for part in parts[-4:]} == {(4, False)} and parts[-1][0] == 4
