"""The parts of one search for several targets, each alone and on numbers."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import all_words, make_clip, paper
from test_readability import make_lm

from pez_core import ArgumentError, SearchOptions, TokenSpace, Vocabulary, invert, search
from pez_core.best import BestSoFar
from pez_core.caption import Caption
from pez_core.objectives import SampledSimilarity
from pez_core.options import with_share_of_time
from pez_core.problem import Problem, PromptTarget, _openings, _space, _Start, default_len
from pez_core.prompt_text import chunks
from pez_core.runner import _similarity, learn
from pez_core.seeds import child_seed, restart_seed
from pez_core.tracker import Progress
from pez_core.verify import _round_trip, _shares, _with_right_articles
from pez_core.vocabulary import Blocklist, Lexicon


def test_time_is_shared_by_the_turns_that_are_left(clock):
    def left(limit, turns):
        options = SimpleNamespace(time_limit=limit)
        return Problem.time_left(SimpleNamespace(options=options, began=1000.0), turns)

    clock.now = 1004.0
    assert left(10, 1) == 6 and left(10, 3) == 2
    assert left(3, 2) == 1e-3 / 2  # a moment remains, whatever the time
    assert left(None, 2) is None


def test_a_share_of_the_time_that_is_left(clock):
    options, began = SearchOptions(time_limit=8, restarts=3), clock.now
    assert with_share_of_time(options, 0.25, began) == SearchOptions(time_limit=2, restarts=3)
    assert with_share_of_time(options, 1, began - 6) == SearchOptions(time_limit=2, restarts=3)
    assert with_share_of_time(options, 1, began - 9).time_limit == 1e-3  # a moment remains
    assert with_share_of_time(SearchOptions(), 0.25, began) == SearchOptions()


def target(weights, avoid, **fields):
    features = F.normalize(torch.arange(8.0).view(len(weights), -1) + 1, dim=1)
    return PromptTarget(features, torch.tensor(weights), torch.tensor(avoid), **fields)


def test_shares_of_targets_in_the_similarity():
    assert _shares(target([3.0, 1.0], [False, False])).tolist() == [0.75, 0.25]
    assert _shares(target([3.0, -1.0], [False, True])).tolist() == [1, 0]
    assert _shares(target([-3.0, -1.0], [True, True])).tolist() == [0.75, 0.25]


def test_the_targets_of_each_row_and_how_they_are_sampled():
    one, two = target([2.0, -1.0], [False, True]), target([1.0, 3.0], [False, False])
    problem = SimpleNamespace(encoder=None, targets=[one, two], seeds=[2**63 + 3])
    found = _similarity(problem, [1, 0, 1], sampled=True)
    assert torch.allclose(found.target, torch.stack([t.towards for t in (two, one, two)]))
    assert not isinstance(found, SampledSimilarity)
    problem.targets = [target([2.0, 1.0], [False, False], batch_size=1)]
    sampled = _similarity(problem, [0], sampled=True)
    assert isinstance(sampled, SampledSimilarity) and sampled.batch_size == 1
    assert sampled.generator.initial_seed() == 3
    assert not isinstance(_similarity(problem, [0]), SampledSimilarity)
    direction = torch.tensor([0.0, 0.6, 0.8, 0.0])
    problem.targets = [target([2.0, 1.0], [False, False], direction=direction)]
    assert torch.allclose(_similarity(problem, [0]).target, direction[None])
    assert torch.equal(problem.targets[0].towards, direction)


# ------------------------------------------------------------------------- the best so far


def problem_of(targets, restarts, trials, **fields):
    work = SimpleNamespace(total=100, swaps=fields.pop("swaps", 60), until_time_limit=False)
    options = SimpleNamespace(restarts=restarts, batch_size=None, time_limit=None)
    vars(options).update(fields)
    work.until_time_limit = options.time_limit is not None
    ids = torch.arange(targets * restarts * trials * 2).view(-1, trials, 2)
    return SimpleNamespace(
        options=options, work=work, ids=ids, targets=[None] * targets, began=1000.0,
        caption=SimpleNamespace(print=lambda row: f"prompt {row}"),
    )  # fmt: skip


def test_the_best_of_targets_whose_restarts_run_in_several_turns():
    """Two targets with three restarts of two trials each, two searches at a time."""
    best = BestSoFar(problem_of(2, 3, 2, batch_size=2))
    assert best.spans == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert best.ids.tolist() == [[4 * k, 4 * k + 1] for k in range(6)]
    turns = [[0.1, 0.4, 0.2, 0.3], [0.1, 0.2, 0.6, 0.5], [0.3, 0.7, 0.1, 0.2]]
    for span, scores in zip(best.spans, turns, strict=True):
        ids = torch.arange(8).view(4, 2) + 100 * span.start
        halved = [score / 2 for score in scores]
        history = [(1, halved), (9, scores)]
        progress = Progress(9, 40, ids, torch.tensor(scores), 0.0, history)
        best.take(span, progress, before=5)
    assert best.ids.tolist() == [[2, 3], [6, 7], [202, 203], [204, 205], [402, 403], [406, 407]]
    assert best.scores.tolist() == pytest.approx([0.4, 0.3, 0.2, 0.6, 0.7, 0.2])
    # the step within all turns, and the best of the restarts of the target so far
    first = [(6, 0.2), (14, 0.4), (106, 0.4), (114, 0.4)]
    second = [(106, 0.3), (114, 0.6), (206, 0.6), (214, 0.7)]
    for found, expected in zip(best.history, (first, second), strict=True):
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [s for _, s in found] == pytest.approx([s for _, s in expected])


def test_a_report_of_one_turn(clock):
    problem = problem_of(2, 1, 1, batch_size=1)
    best = BestSoFar(problem)
    progress = Progress(7, 40, torch.tensor([[8, 9]]), torch.tensor([0.5]), 0.0)
    clock.now = 1010.0
    report = best.report(best.spans[1], progress, before=3)
    assert (report.step, report.steps, report.elapsed) == (110, 200, 10)
    assert report.prompts == ["prompt [0, 1]", "prompt [8, 9]"]
    assert report.similarities == [-torch.inf, 0.5]
    assert best.scores.tolist() == [-torch.inf] * 2  # a report stores nothing
    # the swaps of the last turn are the last part
    assert report.part == (7, 40, False)
    assert best.report(best.spans[0], progress, before=3).part == (7, 40, True)
    assert best.report(best.spans[1], progress).part == (7, 40, True)
    problem.work.swaps = 0
    assert best.report(best.spans[1], progress).part == (7, 40, False)
    problem.work.swaps = 1
    assert best.report(best.spans[1], progress).part == (7, 40, True)


def test_the_steps_of_a_time_limit_are_extrapolated(clock):
    best = BestSoFar(problem_of(2, 1, 1, batch_size=1, time_limit=50))
    progress = Progress(20, 10**9, torch.tensor([[8, 9]]), torch.tensor([0.5]), 0.0)
    clock.now = 1010.0
    report = best.report(best.spans[0], progress, before=3)
    assert (report.step, report.steps, report.part) == (20, 100, (20, 100, False))
    best.take(best.spans[0], progress, before=3)
    clock.now = 1060.0  # beyond the limit
    report = best.report(best.spans[1], progress)
    assert (report.step, report.steps) == (40, 40)
    clock.now = 1000.0  # no time has passed: it counts as a thousandth of a second
    assert best.report(best.spans[1], progress).steps == 40 * 50 * 1000


# ------------------------------------------------------------------------- the start


@pytest.fixture(scope="module")
def clip():
    clip = make_clip()
    clip.trained_tokens = None
    return clip


def test_the_phrases_that_can_begin_a_prompt():
    """As other tokens; those that would be longer than any phrase count if there are no others."""
    begin = {(1,): (11,), (2,): (12, 13, 14), (3, 4): (15, 16)}
    words = SimpleNamespace(openings=lambda phrases: list(map(begin.get, phrases)))
    clip = SimpleNamespace(trained_tokens=None, text=SimpleNamespace(words=words))

    def openings(*trained):
        clip.trained_tokens = frozenset(trained) or None
        return _openings(clip, [(3, 4), (2,), (1,), (9,)])

    assert openings() == [(11,), (15, 16)]
    assert openings(11, 12, 13, 14) == [(11,)]
    assert openings(12, 13, 14) == [(12, 13, 14)]
    with pytest.raises(ArgumentError, match="has no word that can begin a prompt"):
        openings(99)


def test_pieces_that_fuse_are_replaced_by_what_they_print(clip):
    words, encoder = clip.text.words, clip.tokenizer.encoder
    pieces = [encoder[piece] for piece in ("app", "le</w>", "red</w>")]
    caption = Caption(clip)
    assert _round_trip(clip, caption, pieces) == words.encode("apple red")
    assert _round_trip(clip, caption, words.encode("red apple")) == words.encode("red apple")
    first = words.encode(words.decode(clip.vocabulary[:1].tolist()))
    assert _round_trip(clip, caption, [49407]) == first


def test_a_caption_longer_than_a_context_is_searched_in_its_contexts(clip, caplog):
    caplog.set_level("INFO", "pez_core")
    encode, decode = clip.text.words.encode, clip.text.words.decode
    text = decode(encode("a photo of a green bird " * 20)[:80])
    (goal,) = clip.encode_texts(["a boat"])
    one = PromptTarget(goal[None], torch.ones(1), torch.zeros(1).bool())
    options, reports = all_words(effort="fast", steps=1, swaps=2), []
    (result,) = learn(clip, [one], options, 3, reports.append, caption=text + " {}")
    parts = chunks([result.token_ids], 75)
    assert list(map(len, parts)) == [75, 8]
    similarity = (clip.encode_chunks(parts) @ goal).item()
    assert result.similarity == pytest.approx(similarity, abs=1e-5)
    assert reports[-1].similarities[0] == pytest.approx(similarity, abs=1e-4)
    assert result.note and result.note in caplog.messages
    caplog.clear()
    learn(clip, [one], options, 3, caption="a photo {}")
    assert not caplog.messages
    full = decode(encode("a photo of a green bird " * 20)[:75])  # no room beside it
    assert default_len(clip, 16, full + " {}") == 16


@pytest.mark.parametrize("caption, enough", [("{}", 4), ("a photo {}", 8)])
def test_words_repeat_where_there_are_fewer_than_two_for_each_token(clip, caption, enough):
    words = ["cat", "dog", "car", "sky", "red", "hat", "sun", "sea"]
    for count in (enough - 1, enough):
        options = SearchOptions(vocabulary=Vocabulary(only=words[:count]), block_unsafe=False)
        lexicon = options.allowed.lexicon(clip)
        assert len(lexicon.phrases) == count
        space = _space(clip, options, lexicon, 2, Caption(clip, caption))
        twice = space.allowed[:1].repeat(1, 2)
        assert bool(space.repeated(twice)) == (count == enough)


def test_the_last_token_that_fits_the_context_is_learned(clip):
    words = clip.text.words
    text = words.decode(words.encode("a photo of a green bird " * 20)[:74])
    assert default_len(clip, 16, text + " {}") == 1


def test_baselines_get_the_settings_and_draws_of_each_search(clip):
    calls = []

    def method(space, objective, ids, settings, callback, acceptable, *, generator):
        calls.append((settings, [one.initial_seed() for one in generator]))
        return search(space, objective, ids, settings, callback, acceptable)

    options = paper(2, restarts=2, seed=[3, 4], method=method, lr=0.3, weight_decay=0.2, patience=9)
    one = PromptTarget(torch.eye(16)[:1], torch.ones(1), torch.zeros(1).bool())
    results = learn(clip, [one, one], options, 3)
    ((settings, seeds),) = calls
    assert (settings.steps, settings.patience) == (2, 9)
    assert (settings.lr, settings.weight_decay) == (0.3, 0.2)
    each_seed = [restart_seed(seed, restart) for seed in (3, 4) for restart in range(2)]
    assert seeds == [child_seed(one, 0, 0) for one in each_seed]
    assert [len(result.candidates) for result in results] == [2, 2]


@pytest.mark.parametrize("readability, printed", [(0.5, "cat, dog"), (0.0, "cat , dog")])
def test_readable_prompts_are_printed_as_people_write(clip, readability, printed):
    options = SearchOptions(
        prompt_len=3,
        effort="fast",
        steps=1,
        swaps=1,
        vocabulary=Vocabulary(only=["cat , dog"]),
        readability=readability,
        language_model=make_lm(),
    )
    (result,) = invert(clip, clip.encode_texts(["a boat"]), options)
    assert result.prompt == printed


def test_initial_prompts_are_drawn_from_words_that_round_trip(tiny_clip):
    """From all, where all do; phrases of several tokens stay."""
    words = tiny_clip.vocabulary[:4].tolist()
    phrases = [*((word,) for word in words), (words[0], words[1])]
    lexicon, frame = Lexicon(frozenset(phrases)), Caption(tiny_clip)
    space = _space(tiny_clip, SearchOptions(), lexicon, 2, frame)

    def source(single):
        start = _Start(
            tiny_clip, SearchOptions(), lexicon, single, space, 2, frame, Blocklist([]), None
        )
        return start._source

    assert source(words) is space
    drawn = source(words[2:]).random(200, 2, torch.Generator().manual_seed(0))
    assert set(map(tuple, drawn.tolist())) == {
        *((a, b) for a in words[2:] for b in words[2:]),
        tuple(words[:2]),
    }


@pytest.mark.parametrize(("blocked", "printed"), [((), "an apple"), (("an apple",), "a apple")])
def test_an_article_that_would_spell_a_blocked_word_stays(emoji_clip, blocked, printed):
    words, caption, block = emoji_clip.text.words, Caption(emoji_clip), Blocklist(blocked)

    def acceptable(rows):
        return torch.tensor([not caption.blocked_word(row, block) for row in rows.tolist()])

    ids = words.encode("a apple")
    allowed = torch.tensor(sorted([*ids, *words.encode("an")]))
    space = TokenSpace(emoji_clip.text.token_embedding, allowed)
    problem = SimpleNamespace(
        clip=emoji_clip, caption=caption, space=space, acceptable=acceptable if blocked else None
    )
    assert words.decode(_with_right_articles(problem, ids)) == printed
