"""`invert` on the bundled CLIP: its reports agree with the public path of the same text."""

import pytest
import torch
from conftest import EXAMPLES, CustomTextCLIP, all_words, make_clip, paper
from PIL import Image

from pez_core import (
    ArgumentError,
    JointClip,
    Report,
    Result,
    SearchOptions,
    Vocabulary,
    explain,
    invert,
    load_clip,
    runner,
    score,
)
from pez_core.caption import Caption
from pez_core.clip.images import load_image
from pez_core.problem import default_len
from pez_core.prompt_text import chunks, read
from pez_core.seeds import restart_seed
from pez_core.verify import _round_trip

STEPS = 40


@pytest.fixture(scope="module")
def images():
    return [load_image(path) for path in EXAMPLES[:3]]


@pytest.fixture(scope="module")
def results(emoji_clip, images):
    return invert(emoji_clip, images, paper(STEPS, restarts=2))


def public_similarity(clip, prompt, image):
    """Nothing of pez_core: open_clip's tokenizer, transforms and towers."""
    import open_clip

    prepare = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**clip.model.visual.preprocess_cfg), is_train=False
    )
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    with torch.no_grad():
        text = clip.model.encode_text(tokenizer([prompt]), normalize=True)
        picture = clip.model.encode_image(prepare(image)[None], normalize=True)
    return (text @ picture.T).item()


def test_the_similarity_is_that_of_the_printed_string(emoji_clip, images, results):
    for image, result in zip(images, results, strict=True):
        expected = public_similarity(emoji_clip, result.prompt, image)
        assert result.similarity == pytest.approx(expected, abs=1e-5)
        assert emoji_clip.tokenizer.encode(result.prompt) == result.token_ids
        assert len(result.token_ids) == 8
        assert set(result.token_ids) <= set(emoji_clip.vocabulary.tolist())


def test_the_search_improves_and_reports_it(results):
    for result in results:
        steps, similarities = zip(*result.history, strict=True)
        assert steps[0] == 1 and steps[-1] == STEPS
        assert list(similarities) == sorted(similarities)
        assert similarities[-1] > similarities[0] + 0.1
        assert similarities[-1] == pytest.approx(result.similarity, abs=1e-5)


@pytest.mark.slow
def test_restarts_return_the_best_and_keep_the_others(emoji_clip, images, results):
    for image, result in zip(images, results, strict=True):
        assert len(result.candidates) == 2
        best, other = result.candidates
        assert (best.prompt, best.similarity) == (result.prompt, result.similarity)
        assert best.similarity >= other.similarity and best.prompt != other.prompt
        (alone,) = invert(emoji_clip, image, paper(STEPS))
        (second,) = invert(emoji_clip, image, paper(STEPS, seed=restart_seed(0, 1)))
        assert {alone.prompt, second.prompt} == {best.prompt, other.prompt}


def test_every_form_of_images_gives_a_list(emoji_clip, images):
    forms = {
        "PIL image": (images[0], 1),
        "path object": (EXAMPLES[0], 1),
        "path": (str(EXAMPLES[0]), 1),
        "tensor": (torch.rand(3, 9, 9), 1),
        "list of one": (images[:1], 1),
        "tuple": (tuple(images[:2]), 2),
        "batch": (torch.rand(2, 9, 9, 3), 2),
        "features": (emoji_clip.encode_images(images), 3),
    }
    for name, (given, count) in forms.items():
        results = invert(emoji_clip, given, paper(2))
        assert isinstance(results, list) and len(results) == count, name
        assert {type(result) for result in results} == {Result}
    for shared in (True, [1, 2]):
        assert [type(r) for r in invert(emoji_clip, images[:2], paper(2), shared=shared)] == [
            Result
        ]


def test_a_result_does_not_depend_on_its_batch(emoji_clip, images, results):
    (alone,) = invert(emoji_clip, images[1], paper(STEPS, restarts=2))
    assert alone.prompt == results[1].prompt
    assert alone.similarity == pytest.approx(results[1].similarity, abs=1e-6)


def test_the_same_seed_gives_the_same_prompts(emoji_clip, images, results):
    again = invert(emoji_clip, images, paper(STEPS, restarts=2))
    assert [r.candidates for r in again] == [r.candidates for r in results]
    other = invert(emoji_clip, images, paper(STEPS, restarts=2, seed=7))
    assert all(a.prompt != b.prompt for a, b in zip(other, results, strict=True))


def test_the_same_seed_after_loading_again(images, results):
    clip = load_clip("emoji-clip", device="cpu")
    again = invert(clip, images, paper(STEPS, restarts=2))
    assert [r.token_ids for r in again] == [r.token_ids for r in results]


def test_shared_prompt_is_scored_against_all_images(emoji_clip, images):
    (result,) = invert(emoji_clip, images, paper(STEPS), shared=True)
    each = [public_similarity(emoji_clip, result.prompt, image) for image in images]
    assert result.similarity == pytest.approx(sum(each) / len(each), abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.slow
def test_pieces_of_words_give_only_surviving_prompts(seed):
    """On random weights most prompts on the way do not survive being printed."""
    clip = make_clip()
    options = paper(30, prompt_len=12, seed=seed, vocabulary=Vocabulary(whole_words=False))
    for result in invert(clip, torch.rand(6, 9, 9, 3), options):
        assert clip.tokenizer.encode(result.prompt) == result.token_ids
        assert 0 < len(result.token_ids) <= 12
        text = clip.encode_texts([result.prompt])
        assert text.isfinite().all()


def test_a_prompt_that_does_not_survive_is_repaired(emoji_clip):
    """Pieces that fuse, special tokens, nothing at all."""
    encoder = emoji_clip.tokenizer.encoder
    for ids in ([encoder["app"], encoder["le</w>"], encoder["red</w>"]], [49407, 736], [49407]):
        found = _round_trip(emoji_clip, Caption(emoji_clip), ids)
        assert found and emoji_clip.tokenizer.encode(emoji_clip.tokenizer.decode(found)) == found
    assert _round_trip(emoji_clip, Caption(emoji_clip), [736, 3055]) == [736, 3055]


@pytest.mark.slow
def test_pieces_of_words_are_tokens_that_the_default_leaves_out(emoji_clip, images):
    options = paper(STEPS, vocabulary=Vocabulary(whole_words=False))
    (result,) = invert(emoji_clip, images[0], options)
    assert set(result.token_ids) - set(emoji_clip.vocabulary.tolist())


@pytest.mark.parametrize("prompt_len", [4, 16])
def test_one_text_forward_and_backward_over_two_more_positions_per_step(
    emoji_clip, images, prompt_len
):
    forwards, backwards = [], []
    first = emoji_clip.model.transformer.resblocks[0].ln_1
    hooks = [
        first.register_forward_pre_hook(lambda module, inputs: forwards.append(inputs[0].shape)),
        first.register_full_backward_hook(lambda module, *grads: backwards.append(1)),
    ]
    invert(emoji_clip, images[:2], paper(6, prompt_len=prompt_len))
    for hook in hooks:
        hook.remove()
    start, *steps, verification = forwards
    assert start[:2] == (1, 1)  # the start token's position, once
    assert [shape[:2] for shape in steps] == [(2, prompt_len + 1)] * 6 and len(backwards) == 6
    assert verification[:2] == (2, 77)  # the printed strings, the public way


def test_a_callback_gets_reports_and_can_stop(emoji_clip, images):
    reports = []

    def callback(report):
        reports.append(report)
        return report.step == 7

    options = paper(500, restarts=2)
    results = invert(emoji_clip, images[:2], options, callback=callback)
    assert len(reports) == 7
    last = reports[-1]
    assert isinstance(last, Report)
    assert last.steps == 500 and last.elapsed > 0
    assert last.prompts == [r.prompt for r in results]
    best = max((0, 1), key=last.similarities.__getitem__)
    assert last.similarity == max(last.similarities)
    assert last.prompt == results[best].prompt
    assert last.similarities == pytest.approx([r.similarity for r in results], abs=1e-5)
    expected = explain(emoji_clip, results[1].prompt, images[1])
    assert [c.word for c in last.explain(1)] == results[1].prompt.split()
    assert [c.contribution for c in last.explain(1)] == pytest.approx(
        [c.contribution for c in expected], abs=1e-5
    )
    other = explain(emoji_clip, "a red fish", images[0])
    assert [c.contribution for c in last.explain(0, "a red fish")] == pytest.approx(
        [c.contribution for c in other], abs=1e-5
    )


def test_searches_can_run_a_few_side_by_side(emoji_clip, images):
    """Less memory, the same prompts; a stop keeps the searches that had ended."""
    whole = invert(emoji_clip, images[:2], paper(20, restarts=3))
    reports = []
    few = paper(20, restarts=3, batch_size=2)
    parts = invert(emoji_clip, images[:2], few, callback=reports.append)
    for a, b in zip(whole, parts, strict=True):
        assert sorted(c.prompt for c in a.candidates) == sorted(c.prompt for c in b.candidates)
        assert b.similarity == pytest.approx(a.similarity, abs=1e-5)
        assert [score for _, score in b.history] == sorted(score for _, score in b.history)
        assert b.history[-1][1] == pytest.approx(b.similarity, abs=1e-5)
    assert [report.step for report in reports] == list(range(1, 61))
    assert {report.steps for report in reports} == {60}
    assert reports[-1].prompts == [r.prompt for r in parts]

    stopped = invert(emoji_clip, images[:2], few, callback=lambda report: report.step >= 25)
    assert all(len(result.candidates) == 3 for result in stopped)
    # two of the first image's three searches had ended by then
    both = {c.prompt for c in whole[0].candidates} & {c.prompt for c in stopped[0].candidates}
    assert len(both) >= 2
    with pytest.raises(ArgumentError, match=r"`batch_size` has to be at least 1 but is 0"):
        all_words(batch_size=0)


def test_a_prompt_without_a_turn_says_so(emoji_clip, images):
    few = paper(20, batch_size=1)
    first, second = invert(emoji_clip, images[:2], few, callback=lambda report: True)
    assert first.note == "" and first.history
    assert "before this prompt had its turn" in second.note and not second.history


def test_a_search_that_fails_does_not_lose_the_others(emoji_clip, images, monkeypatch):
    descend, whole, turns = runner.descend, invert(emoji_clip, images, paper(5)), []

    def failing(*arguments):
        turns.append(None)
        if len(turns) in bad:
            raise FloatingPointError("the loss is NaN")
        return descend(*arguments)

    monkeypatch.setattr(runner, "descend", failing)
    bad = [2]
    results = invert(emoji_clip, images, paper(5, batch_size=1))
    assert [r.prompt for r in results][::2] == [r.prompt for r in whole][::2]
    notes = [result.note for result in results]
    assert notes[::2] == ["", ""]
    assert notes[1] == "The search failed (the loss is NaN); this is the initial prompt."
    turns, bad = [], [1, 2, 3]
    with pytest.raises(FloatingPointError, match="the loss is NaN"):
        invert(emoji_clip, images, paper(5, batch_size=1))
    turns, bad = [], [1]
    restarts = paper(5, batch_size=1, restarts=3)
    (result,) = invert(emoji_clip, images[0], restarts)
    assert result.note == "1 of 3 searches failed (the loss is NaN)."
    assert result.similarity == max(one.similarity for one in result.candidates)
    # a batch tries the images of such a call again, one by one
    monkeypatch.setattr(runner, "refine_span", failing)
    turns, bad = [], [2]
    with pytest.raises(FloatingPointError, match="the loss is NaN"):
        invert(emoji_clip, images, SearchOptions(steps=3, swaps=3))


def test_steps_are_those_of_the_prompt_behind_a_search_that_fails(emoji_clip, images, monkeypatch):
    descend, turns = runner.descend, []

    def failing(*arguments):
        turns.append(None)
        if len(turns) == 1:
            raise FloatingPointError("the loss is NaN")
        return descend(*arguments)

    whole = invert(emoji_clip, images, paper(5, trajectory=True))
    monkeypatch.setattr(runner, "descend", failing)
    results = invert(emoji_clip, images, paper(5, trajectory=True, batch_size=1))
    assert results[0].trajectory is None
    for a, b in zip(whole[1:], results[1:], strict=True):
        assert a.trajectory.ids.equal(b.trajectory.ids)


def test_patience_ends_early(emoji_clip, images):
    (result,) = invert(emoji_clip, images[0], paper(5000, patience=20))
    assert result.history[-1][0] < 5000


def test_inside_inference_mode_with_inference_tensors(emoji_clip):
    """As ComfyUI calls it."""
    with torch.inference_mode():
        image = torch.rand(1, 32, 32, 3)
        assert len(invert(emoji_clip, image, paper(3))) == 1


def test_longest_prompt(emoji_clip, images):
    (result,) = invert(emoji_clip, images[0], paper(3, prompt_len=75))
    expected = public_similarity(emoji_clip, result.prompt, images[0])
    assert len(result.token_ids) == 75 and result.similarity == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"prompt_len": 0}, ValueError, "`prompt_len` has to be at least 1 but is 0"),
        ({"prompt_len": 76}, ValueError, "`prompt_len` has to be from 1 to 75 but is 76"),
        ({"prompt_len": "8"}, TypeError, "`prompt_len`"),
        ({"steps": 0}, ValueError, "`steps`"),
        ({"restarts": 0}, ValueError, "`restarts` has to be at least 1"),
        ({"seed": -1}, ValueError, "`seed`"),
        ({"lr": -0.1}, ValueError, "`lr`"),
    ],
)
def test_bad_arguments(tiny_clip, options, error, message):
    with pytest.raises(error, match=message):
        invert(tiny_clip, Image.new("RGB", (9, 9)), all_words(**options))


def test_images_may_have_been_encoded_before(tiny_clip):
    images = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    features = tiny_clip.encode_images(images)
    options = paper(3, prompt_len=3)
    again = invert(tiny_clip, features, options)
    assert [r.prompt for r in again] == [r.prompt for r in invert(tiny_clip, images, options)]
    with pytest.raises(
        ValueError, match=r"`images` has shape \(2, 15\), but features of tiny have"
    ):
        invert(tiny_clip, features[:, 1:], options)
    with pytest.raises(ValueError, match="`images` is empty; give at least one image"):
        invert(tiny_clip, features[:0], options)


# ------------------------------------------------------------------------- captions


SENTENCE = "a photo of a green bird that sits on a branch in front of a blue sky , "


@pytest.fixture(scope="module", params=["causal", "joint", "not causal"])
def any_clip(request, tiny_clip):
    if request.param == "causal":
        return tiny_clip
    if request.param == "joint":
        return JointClip([tiny_clip, make_clip(seed=1)])
    return make_clip(CustomTextCLIP, {"no_causal_mask": True, "pool_type": "last"})


@pytest.mark.slow
@pytest.mark.parametrize("words", [65, 76, 200])
@pytest.mark.parametrize("place", ["behind", "in front", "inside"])
@pytest.mark.parametrize(
    "effort", [{"effort": "fast", "steps": 3, "swaps": 12}, {"steps": 6, "swaps": 0}]
)
def test_captions_of_any_length(any_clip, words, place, effort):
    """The search and the result have the mean of the contexts as score cuts them."""
    encode, decode = any_clip.text.words.encode, any_clip.text.words.decode
    text = decode(encode(SENTENCE * 20)[:words])
    at = {"behind": len(text), "in front": 0, "inside": text.rindex(" sits") + 1}[place]
    caption = f"{text[:at].rstrip()} {{}} {text[at:].lstrip()}".strip()
    image = any_clip.encode_texts(["a boat"])
    reports = []
    options = all_words(prompt_len=10, **effort)
    (result,) = invert(any_clip, image, options, caption=caption, callback=reports.append)
    assert result.prompt == caption.replace("{}", result.learned)
    assert result.token_ids == encode(result.prompt) and len(result.token_ids) == words + 10
    parts = chunks([result.token_ids], any_clip.text.max_prompt_len)
    expected = (any_clip.encode_chunks(parts) @ image[0]).item()
    assert result.similarity == pytest.approx(expected, abs=1e-4)
    assert reports[-1].similarities[0] == pytest.approx(expected, abs=1e-3)
    assert bool(result.note) == (words > 65)
    if result.note:
        assert f"{words + 10} tokens" in result.note and f"in {len(parts)} parts" in result.note


@pytest.mark.parametrize(
    "words, caption",
    [
        (68, "{} (a blue boat on a lake:1.2)"),  # a short piece goes whole into the next context
        (66, "(a blue boat on a lake:1.2) {}"),
        (141, "(a blue boat:1.2) {} (on a lake:1.3)"),
    ],
)
def test_long_captions_with_weights_are_cut_as_score_cuts_them(tiny_clip, words, caption):
    encode, decode = tiny_clip.text.words.encode, tiny_clip.text.words.decode
    text = decode(encode(SENTENCE * 20)[:words])
    image = Image.linear_gradient("L").resize((20, 20))
    reports = []
    options = all_words(effort="fast", steps=2, swaps=2, prompt_len=5)
    (result,) = invert(
        tiny_clip, image, options, caption=f"{text} {caption}", callback=reports.append
    )
    expected = score(tiny_clip, result.prompt, image).similarity.item()
    assert result.note
    assert result.similarity == pytest.approx(expected, abs=1e-5)
    assert reports[-1].similarities[0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_a_caption_with_weights_and_tags_is_read_like_any_prompt(emoji_clip):
    image = emoji_clip.encode_texts(["a blue fish"])
    caption = "<lora:x (y):1> (a {} fish:1.2), {in|on} \\(water\\)"
    (result,) = invert(
        emoji_clip, image, SearchOptions(effort="fast", prompt_len=3), caption=caption
    )
    assert result.prompt == caption.replace("{}", result.learned)
    spoken = f"a {result.learned} fish in (water)"  # a comma between pieces of syntax is not read
    assert result.token_ids == emoji_clip.tokenizer.encode(spoken)
    expected = (emoji_clip.encode_texts([spoken]) @ image[0]).item()
    assert result.similarity == pytest.approx(expected, abs=1e-5)
    score_of = score(emoji_clip, result.prompt, EXAMPLES[0]).similarity
    spoken = spoken.replace("(", r"\(").replace(
        ")", r"\)"
    )  # to `score` they are a weight otherwise
    assert torch.allclose(score_of, score(emoji_clip, spoken, EXAMPLES[0]).similarity, atol=1e-5)
    with pytest.raises(ArgumentError, match=r"`caption` .* not read"):
        invert(emoji_clip, image, SearchOptions(), caption="{red|a {}} fish")


def test_a_weighted_text_to_start_from_or_to_avoid(emoji_clip):
    image = emoji_clip.encode_texts(["a blue fish"])

    def found(start_from, avoid):
        options = paper(1, prompt_len=2, start_from=start_from)
        return invert(emoji_clip, image, options, avoid=avoid)[0]

    plain = found("red car", "a big dog")
    weighted = found("(red car:1.3)", "a [big] dog <lora:x:1>")
    assert plain.learned == "red car" and plain.token_ids == weighted.token_ids
    assert plain.avoided == pytest.approx(weighted.avoided)


def test_written_text_among_inserts_is_read_as_the_same_tokens(emoji_clip):
    encode = emoji_clip.text.words.encode
    around = ("(big:1.2) ", " <lora:x:1>"), ("big ", "")
    inserts = [(3, "<lora:y:1>", ""), (5, "(red:1.2)", "red")]
    frame = Caption(emoji_clip, *around, inserts, as_written=True)
    ids = encode("dog , cat . , in snow")
    text = frame.print(ids)
    assert text == "(big:1.2) dog, cat <lora:y:1> . , (red:1.2) in snow <lora:x:1>"
    assert frame.learned(ids) == "dog, cat . , in snow"
    assert frame.round_trips(ids)
    assert encode(read(text)) == frame.reread(ids) == frame.ids(ids)


def test_a_caption_that_fills_the_context_leaves_the_default_length(tiny_clip):
    decode = tiny_clip.text.words.decode
    ids = tiny_clip.text.words.encode(SENTENCE * 20)
    assert default_len(tiny_clip, 16, decode(ids[:10]) + " {}") == 16
    assert default_len(tiny_clip, 16, decode(ids[:70]) + " {}") == 5
    assert default_len(tiny_clip, 16, decode(ids[:75]) + " {}") == 16
