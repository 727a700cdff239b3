"""Prompts written from left to right, and the prior of their language model."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import EXAMPLES, all_words

from pez_core import ArgumentError, SearchOptions, TokenSpace, Vocabulary, distill, invert, style
from pez_core.caption import Caption
from pez_core.objectives import Similarity
from pez_core.options import EFFORTS, WORDINGS
from pez_core.priors import FluencyPrior
from pez_core.readability import FUNCTION_WORDS
from pez_core.token_lm import END, KINDS, Shape, TokenLM, load_token_lm
from pez_core.writing import WritingSettings, write

WORDS = list(range(320, 620))


@pytest.fixture(scope="module")
def model():
    """A language model with random weights, which likes some tokens far more than others."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TokenLM(replace(Shape(), table_width=8, width=16, heads=2, layers=2))
        model.positions.data.normal_()
        model.bias.data.normal_(std=3)
    return model.eval().requires_grad_(False)


def make_prior(clip, model, caption="{}", inserts=(), length=5, once=None, readability=0.8):
    frame = Caption(clip, caption, inserts=inserts)
    space = TokenSpace(clip.text.token_embedding, torch.tensor(WORDS), once=once)
    return FluencyPrior(model, frame, space, length, "tags", readability)


def mean_likelihood(model, before, behind, end=4):
    """Of the tokens behind others and of the end, which counts more, one by one."""
    query, state = model.start(torch.tensor([KINDS.index("tags")]))
    values = []
    for place, token in enumerate([*before, *behind, END]):
        if place >= len(before):
            every = model.next_tokens(query[:, -1], torch.arange(model.shape.vocab_size))
            values.append(every[0, token])
        query, state = model.extend(torch.tensor([[token]]), state)
    return ((sum(values) + (end - 1) * values[-1]) / (len(values) + end - 1)).item()


FRAMES = [
    ("{}", ()),
    ("a photo of {}", ()),
    ("{} , in the dark", ()),
    ("the {} here", ((2, "and then", "and then"), (4, "with", "with"))),
]


@pytest.mark.parametrize(("caption", "inserts"), FRAMES)
def test_the_score_is_the_weighted_mean_likelihood(tiny_clip, model, caption, inserts):
    prior = make_prior(tiny_clip, model, caption, inserts)
    ids = prior.space.random(3, 5, torch.Generator().manual_seed(1))
    for row, score in zip(ids.tolist(), prior.score(ids).tolist(), strict=True):
        whole = prior.caption.ids(row)
        before = prior.caption.before
        expected = mean_likelihood(model, before, whole[len(before) :])
        assert score == pytest.approx(0.8 * 0.1 * expected, abs=1e-5)
    assert prior.scores_of(ids.tolist()) == pytest.approx(prior.score(ids).tolist(), abs=1e-6)
    perplexities = [-math.log(value) for value in prior.perplexities(ids.tolist())]
    for row, value in zip(ids.tolist(), perplexities, strict=True):
        behind = prior.caption.ids(row)[len(before) :]
        assert value == pytest.approx(mean_likelihood(model, before, behind, end=1), abs=1e-4)


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize(("caption", "inserts"), FRAMES)
def test_what_screen_leaves_out_is_corrected(tiny_clip, model, caption, inserts, position):
    prior = make_prior(tiny_clip, model, caption, inserts)
    lead = prior.space.random(2, 5, torch.Generator().manual_seed(position))
    screened = prior.screen(lead, position)
    assert screened.shape == (2, len(WORDS))
    swaps = torch.tensor([[400, 401, 320, 619], [500, 350, 333, 444]])[..., None]
    corrected = prior.corrections(swaps)
    for row in range(2):
        for k, token in enumerate(swaps[row, :, 0].tolist()):
            other = lead[row : row + 1].clone()
            other[0, position] = token
            part = screened[row, WORDS.index(token)]
            assert part + corrected[row, k] == pytest.approx(prior.score(other).item(), abs=1e-5)


def test_candidates_with_one_beginning_have_the_scores_that_they_have_alone(tiny_clip, model):
    prior = make_prior(tiny_clip, model, "a photo of {} there")
    lead = prior.space.random(2, 5, torch.Generator().manual_seed(0))
    rows = lead.repeat_interleave(20, dim=0)
    rows[:, 3:] = prior.space.random(40, 2, torch.Generator().manual_seed(1))
    alone = torch.cat([prior.score(row[None]) for row in rows])
    prior.screen(lead, 3)
    reads, extend = [], model.extend_embedded
    prior.model = SimpleNamespace(
        extend=lambda ids, state: reads.append(ids.numel()) or extend(model.table(ids), state),
        likelihoods=model.likelihoods,
    )
    torch.testing.assert_close(prior.score(rows), alone, atol=1e-5, rtol=0)
    # three tokens of each beginning, and what is behind them but for the last
    assert sum(reads) == 2 * 3 + 40 * (2 + len(prior.caption.after))


@pytest.mark.parametrize(("caption", "inserts"), FRAMES)
def test_a_reader_expects_what_screen_does(tiny_clip, model, caption, inserts):
    prior = make_prior(tiny_clip, model, caption, inserts)
    ids = prior.space.random(3, 5, torch.Generator().manual_seed(4))
    reader = prior.reader(3)
    for position in range(5):
        expected = prior.screen(ids, position) / prior.token_weight
        torch.testing.assert_close(reader.next_tokens(), expected, atol=1e-4, rtol=1e-4)
        other = reader.of(torch.tensor([2, 0]))
        torch.testing.assert_close(other.next_tokens(), expected[[2, 0]], atol=1e-4, rtol=1e-4)
        if position < 4:
            other.read(torch.tensor([321, 322]))  # leaves the first reader alone
            order = torch.tensor([1, 2, 0])
            ids = ids[order]
            reader.read(ids[:, position], order)


# ------------------------------------------------------------------------------ the beam search


def task(clip, images, model, readability=0.8, once=None, length=5):
    prior = make_prior(clip, model, length=length, once=once, readability=readability)
    targets = clip.encode_images(images)[:, None]
    return prior.space, Similarity(clip.text.encoder(), targets), prior


def written(clip, images, model, seeds, length=5, settings=None, **options):
    space, objective, prior = task(clip, images, model, length=length, **options)
    settings = settings or WritingSettings(steps=length, beams=4, proposals=12, results=2)
    return prior, write(space, objective, prior, length, settings, seeds=seeds)


def pictures(count):
    from pez_core.clip.images import load_images

    return load_images(EXAMPLES[:count])[0]


def test_prompts_are_written_whole_and_do_not_depend_on_their_neighbours(emoji_clip, model):
    images = pictures(3)
    _, together = written(emoji_clip, images, model, [5, 6, 7])
    assert together.ids.shape == (6, 5) and together.step == 5
    assert set(together.ids.flatten().tolist()) <= set(WORDS)
    for k in range(3):
        _, alone = written(emoji_clip, images[k : k + 1], model, [5 + k])
        assert torch.equal(alone.ids, together.ids[2 * k : 2 * k + 2])
        torch.testing.assert_close(
            alone.scores, together.scores[2 * k : 2 * k + 2], atol=1e-5, rtol=0
        )


def test_before_the_first_token_there_is_one_beginning(tiny_clip, model):
    """As many candidates of one token are encoded as there are proposals, whatever the beams."""
    prior, rows = make_prior(tiny_clip, model, length=2), []
    encode = tiny_clip.text.encoder()

    class Counted:
        def __call__(self, embeddings):
            rows.append(len(embeddings))
            return encode(embeddings)

        def given(self, embeddings):
            return self if not embeddings.shape[1] else encode.given(embeddings)

    objective = Similarity(Counted(), torch.randn(1, 1, tiny_clip.feature_size))
    settings = WritingSettings(steps=2, beams=4, proposals=6)
    found = write(prior.space, objective, prior, 2, settings, seeds=[0])
    # the first guess, the probes of the gradient, the proposals, and the prompt that was written
    assert rows == [1, 4, 6, 1] and found.ids.shape == (1, 2)
    few = WritingSettings(steps=2, beams=8, proposals=3, results=8)  # more beams than beginnings
    found = write(prior.space, objective, prior, 2, few, seeds=[0])
    assert found.ids.shape == (8, 2) and found.scores.isfinite().all()


@pytest.mark.parametrize("problems", [3, 100])
def test_many_searches_take_no_more_memory_than_swaps(emoji_clip, model, problems):
    prior = make_prior(emoji_clip, model, length=2)
    encode, rows, learned = emoji_clip.text.encoder(), [], []

    class Counted:
        def __init__(self, encode):
            self.encode = encode

        def __call__(self, embeddings):
            (learned if embeddings.requires_grad else rows).append(len(embeddings))
            return self.encode(embeddings)

        def given(self, embeddings):
            return Counted(self.encode.given(embeddings))

    objective = Similarity(Counted(encode), torch.randn(problems, 1, emoji_clip.feature_size))
    settings = WritingSettings(steps=2, proposals=24)
    write(prior.space, objective, prior, 2, settings, seeds=range(problems))
    assert max(rows) <= max(2048, 8 * problems) and max(learned) <= max(256, 8 * problems)
    # every beginning is compared with every proposal, and every probe is taken
    assert sum(rows) == problems * (1 + 24 + 8 * 24 + 1)
    assert sum(learned) == problems * 4 * (1 + 8)


def test_the_results_of_a_problem_differ(emoji_clip, model):
    _, found = written(emoji_clip, pictures(2), model, [5, 6])
    assert len({tuple(row) for row in found.ids.tolist()}) == 4
    _, other = written(emoji_clip, pictures(2), model, [105, 106])
    assert found.ids.tolist() != other.ids.tolist()


def test_writing_beats_what_the_language_model_writes_alone(emoji_clip, model):
    space, objective, prior = task(emoji_clip, pictures(2), model)
    settings = WritingSettings(steps=5, beams=4, proposals=12)
    seen = []

    def note(progress):
        seen.append((progress.step, progress.ids.clone(), progress.scores.clone()))

    found = write(space, objective, prior, 5, settings, note, seeds=[1, 2])
    assert [step for step, *_ in seen] == [1, 2, 3, 4, 5]
    plain, scores = seen[0][1:]
    # the language model alone takes the likeliest token at each place
    reader = prior.reader(2)
    for k in range(5):
        assert torch.equal(plain[:, k], space.allowed[reader.next_tokens().argmax(dim=1)])
        reader.read(plain[:, k])
    assert (found.scores + prior.score(found.ids) > scores + prior.score(plain)).all()
    torch.testing.assert_close(
        found.scores, objective(space.embed(found.ids), 0)[1], atol=1e-5, rtol=0
    )


def test_a_search_that_ends_early_returns_whole_prompts(emoji_clip, model):
    space, objective, prior = task(emoji_clip, pictures(2), model)
    settings = WritingSettings(steps=5, beams=4, proposals=12)
    ended = write(
        space, objective, prior, 5, settings, lambda progress: progress.step == 2, seeds=[1, 2]
    )
    assert ended.stopped and ended.step == 2 and ended.ids.shape == (2, 5)
    torch.testing.assert_close(
        ended.scores, objective(space.embed(ended.ids), 0)[1], atol=1e-5, rtol=0
    )
    limited = write(space, objective, prior, 5, replace(settings, time_limit=1e-9), seeds=[1, 2])
    assert limited.step == 1 and not limited.stopped and limited.ids.shape == (2, 5)


def test_what_a_prompt_must_not_begin_with_leaves_the_search_early(emoji_clip, model):
    space, objective, prior = task(emoji_clip, pictures(2), model)
    settings = WritingSettings(steps=5, beams=4, proposals=12, results=4)
    free = write(space, objective, prior, 5, settings, seeds=[1, 2])
    usual = free.ids[:, 0].unique()
    asked = []

    def acceptable(ids):
        asked.append(ids)
        return ~torch.isin(ids[:, 0], usual)

    other = write(space, objective, prior, 5, settings, None, acceptable, seeds=[1, 2])
    assert acceptable(other.ids).all() and other.scores.isfinite().all()
    # the search goes on from other beginnings, and not from what the language model alone writes
    assert len({tuple(row) for row in other.ids.tolist()}) == 8
    assert other.scores.mean() > 0.5 * free.scores.mean()
    # few are checked: of 24 to 96 beginnings of a step those that would stay
    assert max(map(len, asked)) == 2 * 4
    assert {ids.shape[1] for ids in asked} == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("end", [1, 3, None])
def test_where_nothing_can_be_written_the_first_prompts_stay(emoji_clip, model, end):
    space, objective, prior = task(emoji_clip, pictures(2), model)
    settings, seen = WritingSettings(steps=5, beams=4, proposals=12), []
    start = space.random(2, 5, torch.Generator().manual_seed(0))

    def acceptable(ids):
        if ids.shape[1] < 5:
            return torch.zeros(len(ids), dtype=torch.bool)
        return (ids[:, None] == start).all(dim=2).any(dim=1)

    def note(progress):
        seen.append(progress.ids.tolist())
        return progress.step == end

    found = write(space, objective, prior, 5, settings, note, acceptable, seeds=[1, 2], start=start)
    assert found.ids.tolist() == start.tolist() and seen == [start.tolist()] * (end or 5)
    torch.testing.assert_close(found.scores, objective(space.embed(start), 0)[1])


def test_the_language_model_alone_writes_no_refused_word(emoji_clip, model):
    space, objective, prior = task(emoji_clip, pictures(1), model, once=torch.tensor(WORDS))
    settings = WritingSettings(steps=5, beams=4, proposals=12)
    plain = []

    def end(progress):
        plain.append(progress.ids[0])
        return True

    write(space, objective, prior, 5, settings, end, seeds=[1])

    def acceptable(ids):
        return ~torch.isin(ids, plain[0][2:]).any(dim=1)

    found = write(space, objective, prior, 5, settings, end, acceptable, seeds=[1])
    # the same as far as it is acceptable
    assert plain[1][:2].tolist() == plain[0][:2].tolist()
    assert acceptable(torch.stack([plain[1], found.ids[0]])).all()
    assert found.scores.isfinite().all()


def test_words_that_may_occur_once_do(emoji_clip, model):
    likely = make_prior(emoji_clip, model).reader(1).next_tokens()[0]
    favourite = WORDS[int(likely.argmax())]
    kept = torch.tensor([w for w in WORDS if w != favourite])
    _, found = written(emoji_clip, pictures(2), model, [1, 2], once=kept, length=8)
    for row in found.ids.tolist():
        others = [token for token in row if token != favourite]
        assert len(others) == len(set(others))


def test_the_weight_of_the_language_model_counts(emoji_clip, model):
    values = []
    for readability in (0.05, 1.0):
        prior, found = written(emoji_clip, pictures(3), model, [1, 2, 3], readability=readability)
        likely = (prior.score(found.ids) / prior.weight).mean().item()
        values.append((likely, found.scores.mean().item()))
    assert values[1][0] > values[0][0] + 0.3 and values[1][1] < values[0][1]


# --------------------------------------------------------------------------- the search options


@pytest.mark.parametrize("wording", WORDINGS[1:])
def test_a_wording_reads_better_and_is_similar(emoji_clip, wording):
    options = SearchOptions(prompt_len=8, effort="fast", seed=3)
    free = invert(emoji_clip, EXAMPLES[:4], options)
    found = invert(emoji_clip, EXAMPLES[:4], replace(options, wording=wording))
    prior = FluencyPrior(
        load_token_lm(),
        Caption(emoji_clip),
        TokenSpace(emoji_clip.text.token_embedding),
        8,
        wording,
        0.5,
    )
    for one, other in zip(found, free, strict=True):
        assert one.perplexity is not None and other.perplexity is None
        rows = [one.token_ids, other.token_ids]
        own, theirs = prior.perplexities(rows)
        assert own == pytest.approx(one.perplexity, rel=1e-3)
        assert own < theirs / 10
        assert one.similarity > 0.5 * other.similarity
        assert len(one.token_ids) == 8
        words = [w for w in one.prompt.replace(",", " ").split() if w not in FUNCTION_WORDS]
        assert len(words) == len(set(words))
    assert found[0].history[0][0] == 1 and found[0].history[-1][0] == 8 + EFFORTS["fast"].swaps


@pytest.mark.parametrize("end", [1, 4, None])
@pytest.mark.parametrize("caption", ["{}", "a photo of {} ,"])
def test_no_prompt_that_is_reported_has_a_blocked_phrase(emoji_clip, caption, end):
    options = SearchOptions(prompt_len=6, effort="fast", wording="sentence")
    seen = []

    def note(report):
        seen.extend(report.prompts)
        return report.step == end

    def first_words(prompts):
        before = caption.split("{}")[0].split()
        return {" ".join(prompt.split()[len(before) :][:2]) for prompt in prompts}

    (free,) = invert(emoji_clip, EXAMPLES[0], options, callback=note, caption=caption)
    blocked = first_words([*seen, *(c.prompt for c in free.candidates)])
    seen.clear()
    words = Vocabulary(dictionary=False, block=blocked)
    given = replace(options, vocabulary=words)
    (one,) = invert(emoji_clip, EXAMPLES[0], given, callback=note, caption=caption)
    assert not blocked & first_words([*seen, one.prompt])
    assert end or one.similarity > 0.5 * free.similarity


def test_tags_have_commas_and_sentences_do_not(emoji_clip):
    options = SearchOptions(prompt_len=12, effort="fast")
    commas = {}
    for wording in WORDINGS[1:]:
        found = invert(emoji_clip, EXAMPLES[:4], replace(options, wording=wording))
        commas[wording] = sum(one.prompt.count(",") for one in found)
        # as people write: no space before a comma
        assert not any(" ," in one.prompt for one in found)
    assert commas["tags"] > 4 > commas["sentence"]


def test_a_caption_is_continued(emoji_clip):
    options = SearchOptions(prompt_len=6, effort="fast", wording="sentence")
    (one,) = invert(emoji_clip, EXAMPLES[0], options, caption="a drawing of {} on white")
    assert one.prompt.startswith("a drawing of ") and one.prompt.endswith(" on white")
    learned = one.learned.split()
    assert learned[0] not in ("of", "drawing", "on")


@pytest.mark.parametrize("words", [66, 75, 76, 150])
def test_long_captions_are_read_as_far_as_the_model_can(emoji_clip, words):
    caption = " ".join(["red blue green old"] * 40).split()[:words]
    options = SearchOptions(prompt_len=8, effort="fast", swaps=1)
    for wording, readability, steps in (("tags", 0, None), ("free", 0.5, 2)):
        given = replace(options, wording=wording, readability=readability, steps=steps)
        for text in (" ".join(caption) + " {}", "{} " + " ".join(caption)):
            (one,) = invert(emoji_clip, EXAMPLES[0], given, caption=text)
            assert one.learned and one.perplexity > 1


def test_where_the_end_is_cut_off_no_other_token_has_its_weight(tiny_clip, model):
    prior = make_prior(tiny_clip, model, "{} " + " ".join(["red blue green old"] * 20))
    ids = prior.space.random(2, 5, torch.Generator().manual_seed(1))
    for row, score in zip(ids.tolist(), prior.score(ids).tolist(), strict=True):
        read = torch.tensor([prior.caption.ids(row)[: model.shape.context]])
        query, state = model.start(torch.tensor([KINDS.index("tags")]))
        queries = torch.cat([query, model.extend(read, state)[0][:, :-1]], dim=1)
        expected = model.likelihoods(queries, read).mean().item()
        assert score == pytest.approx(0.8 * 0.1 * expected, abs=1e-5)


def test_more_tokens_than_the_language_model_reads_are_refused(tiny_clip):
    model = TokenLM(replace(Shape(), table_width=8, width=16, heads=2, layers=2, context=6))
    assert make_prior(tiny_clip, model, length=6).slots.tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ArgumentError, match="`prompt_len` is 7, but the language model reads 6"):
        make_prior(tiny_clip, model, length=7)
    inserts = [(4, "and then", "and then")]
    with pytest.raises(ArgumentError, match="with the fixed text between the learned ones"):
        make_prior(tiny_clip, model, inserts=inserts)


def test_what_stands_directly_before_is_read_of_a_long_caption(emoji_clip, model):
    last = " ".join(["old"] * 30)
    ids = torch.tensor([WORDS[:5]])
    scores = [
        make_prior(emoji_clip, model, " ".join([*first, *["old"] * 71]) + " {}").score(ids).item()
        for first in (["red"] * 20, ["blue"] * 40)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert scores[0] != pytest.approx(
        make_prior(emoji_clip, model, f"{last} {{}}").score(ids).item()
    )


def test_other_tasks_have_wordings(emoji_clip):
    options = SearchOptions(prompt_len=6, effort="fast", wording="tags")
    assert len(style(emoji_clip, EXAMPLES[:3], options).token_ids) == 6
    text = "a small brown dog with a red collar that is lying on a blue blanket in the sun"
    short = distill(emoji_clip, text, options)
    assert len(short.token_ids) == 6 and short.perplexity < 1e5


def test_words_given_by_the_user_are_used(emoji_clip):
    only = ["a", "red", "blue", "round", "face", "ball", "of", "with", "eyes", "big", "the", "sun"]
    options = SearchOptions(
        prompt_len=5, effort="fast", wording="sentence", vocabulary=Vocabulary(only=only)
    )
    (one,) = invert(emoji_clip, EXAMPLES[0], options)
    assert set(one.prompt.split()) <= set(only)


@pytest.mark.parametrize("wording", ["tags", "sentence"])
def test_restarts_differ_and_results_repeat(emoji_clip, wording):
    options = SearchOptions(prompt_len=6, effort="fast", wording=wording, restarts=4, seed=4)
    results = invert(emoji_clip, EXAMPLES[:3], options)
    assert min(len({c.prompt for c in one.candidates}) for one in results) >= 3
    one = results[1]
    (alone,) = invert(emoji_clip, EXAMPLES[1], replace(options, restarts=1))
    assert alone.prompt in [c.prompt for c in one.candidates]
    # by similarity and likelihood together, so a better one need not be more similar
    assert one.prompt == alone.prompt or one.similarity != alone.similarity
    (again,) = invert(emoji_clip, EXAMPLES[:2][1], options)
    assert [c.prompt for c in again.candidates] == [c.prompt for c in one.candidates]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wording": "poem"}, "`wording` has to be one of 'free', 'tags', 'sentence'"),
        ({"wording": "tags", "effort": "paper"}, "`wording` is 'tags', which needs swaps"),
        ({"wording": "sentence", "swaps": 0}, "`wording` is 'sentence', which needs swaps"),
        ({"wording": "tags", "trajectory": True}, "`trajectory` records Algorithm 1"),
    ],
)
def test_wordings_that_cannot_be(options, message):
    with pytest.raises(ArgumentError, match=message):
        SearchOptions(**options)


def test_phrases_and_a_given_beginning_are_searched_by_pez(emoji_clip, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("nothing is written here")

    monkeypatch.setattr("pez_core.runner.write", refused)
    words = Vocabulary(only=["traffic light", "red", "car", "on", "blue", "house", "old"])
    options = SearchOptions(prompt_len=3, effort="fast", wording="tags", steps=4, vocabulary=words)
    (one,) = invert(emoji_clip, EXAMPLES[0], options)
    assert one.perplexity > 1 and len(one.token_ids) == 3 and one.note == ""
    begun = replace(options, start_from="red house", vocabulary=None)
    (two,) = invert(emoji_clip, EXAMPLES[0], begun)
    assert two.perplexity > 1 and two.history[-1][0] == 4 + EFFORTS["fast"].swaps
    for nothing in (None, "", " ", "<lora:x:1>"):
        with pytest.raises(AssertionError, match="written"):
            invert(emoji_clip, EXAMPLES[0], replace(begun, start_from=nothing, steps=None))
        with pytest.raises(ArgumentError, match="`steps` is 4, but belongs to Algorithm 1"):
            replace(begun, start_from=nothing)


def test_steps_beside_a_list_of_single_tokens_are_named(emoji_clip):
    words = Vocabulary(only=["red", "car", "on", "blue", "house", "old", "dog"])
    options = SearchOptions(prompt_len=2, wording="sentence", steps=4, vocabulary=words, swaps=1)
    (result,) = invert(emoji_clip, EXAMPLES[0], options)
    assert result.note.startswith("Without effect: `steps`, since the prompt was written")


def test_another_tokenizer_is_named(emoji_clip, monkeypatch):
    monkeypatch.setattr("pez_core.problem.reads_like_clip", lambda words: False)
    options = all_words(prompt_len=3, effort="fast", wording="tags")
    with pytest.raises(ArgumentError, match="CLIP's own tokenizer"):
        invert(emoji_clip, EXAMPLES[0], options)
