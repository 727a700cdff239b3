"""Several CLIPs searched as one: every part of it against each CLIP by itself."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import EXAMPLES, ROOT, all_words, make_clip, paper

from pez_core import JointClip, Vocabulary, distill, fuse, invert, load_clip, score, style
from pez_core.clip.images import load_image
from pez_core.clip.model import Clip


@pytest.fixture(scope="module")
def joint(emoji_clip, vit_clip):
    return JointClip([emoji_clip, vit_clip], weights=[3, 1])


def test_the_second_clip_has_really_learned(vit_clip):
    rows = list(map(json.loads, (ROOT / "examples/index.jsonl").open()))
    images = vit_clip.encode_images([load_image(ROOT / "examples" / r["file"]) for r in rows])
    texts = vit_clip.encode_texts([" ".join([row["name"], *row["words"]]) for row in rows])
    hits = (images @ texts.T).argmax(1) == torch.arange(len(rows))
    assert hits.float().mean() > 0.9


def test_dot_products_are_weighted_means_of_cosines(joint, emoji_clip, vit_clip):
    pictures = [load_image(path) for path in EXAMPLES[:3]]
    texts = ["a red cat", "happy face"]
    ours = joint.encode_texts(texts) @ joint.encode_images(pictures).T
    each = [c.encode_texts(texts) @ c.encode_images(pictures).T for c in (emoji_clip, vit_clip)]
    torch.testing.assert_close(ours, 0.75 * each[0] + 0.25 * each[1])


def test_features_of_embeddings_equal_those_of_the_text(joint):
    ids = joint.vocabulary[torch.tensor([[5, 80, 900], [7, 7, 1200]])]
    words = joint.text.words
    encode = joint.text.encoder([(words.encode("a photo of"), words.encode("at night"))])
    texts = [f"a photo of {words.decode(row)} at night" for row in ids.tolist()]
    torch.testing.assert_close(
        encode(F.embedding(ids, joint.text.token_embedding)),
        joint.encode_texts(texts),
        atol=2e-6,
        rtol=1e-5,
    )


@pytest.mark.slow
def test_one_prompt_is_better_for_both_than_what_one_alone_finds(joint, emoji_clip, vit_clip):
    """On average over images, by the CLIP that the other search has not used."""
    options = paper(150, prompt_len=8)
    ours = invert(joint, EXAMPLES[:4], options)
    for result, image in zip(ours, EXAMPLES, strict=False):
        parts = {c.name: score(c, result.prompt, image).similarity for c in (emoji_clip, vit_clip)}
        for name, similarity in parts.items():
            assert result.encoders[name] == pytest.approx(similarity.item(), abs=1e-5)
        mean = 0.75 * result.encoders["emoji-clip"] + 0.25 * result.encoders["vit"]
        assert result.similarity == pytest.approx(mean, abs=1e-5)
        assert result.history[-1][1] == pytest.approx(result.similarity, abs=1e-5)
    for alone, other in ((emoji_clip, vit_clip), (vit_clip, emoji_clip)):
        found = invert(alone, EXAMPLES[:4], options)
        judged = [
            score(other, f.prompt, i).similarity for f, i in zip(found, EXAMPLES, strict=False)
        ]
        assert sum(r.encoders[other.name] for r in ours) > sum(judged) + 0.2


@pytest.mark.slow
def test_the_weight_of_a_clip_decides_its_influence(emoji_clip, vit_clip):
    options = paper(100, prompt_len=4)
    first = invert(JointClip([emoji_clip, vit_clip], [20, 1]), EXAMPLES[:3], options)
    second = invert(JointClip([emoji_clip, vit_clip], [1, 20]), EXAMPLES[:3], options)

    def total(results, name):
        return sum(result.encoders[name] for result in results)

    assert total(first, "emoji-clip") > total(second, "emoji-clip") + 0.1
    assert total(second, "vit") > total(first, "vit") + 0.1


def test_every_task_takes_it(joint):
    both = {"emoji-clip", "vit"}
    assert set(style(joint, EXAMPLES[:3], paper(10)).encoders) == both
    rules = Vocabulary(only=["red car", "cat", "happy dog"], min_embedding_std=1e-4)
    options = paper(10, prompt_len=4, vocabulary=rules)
    (result,) = invert(joint, EXAMPLES[0], options)
    assert set(result.prompt.split()) <= {"red", "car", "cat", "happy", "dog"}
    short = distill(joint, "a happy dog in a red car", all_words(steps=3, swaps=3))
    assert set(short.encoders) == both
    assert set(fuse(joint, ["a dog", EXAMPLES[0]], paper(3)).encoders) == both
    judged = score(joint, ["a cat", "dog"], EXAMPLES[:3], judge=joint.clips[1])
    assert judged.similarity.shape == judged.judge.shape == (2, 3)
    torch.testing.assert_close(judged.judge, judged.encoders["vit"])


def test_loaded_by_a_list_of_names(tmp_path):
    other = tmp_path / "other"
    shutil.copytree(ROOT / "pez_core/models/emoji-clip", other)
    clip = load_clip(["emoji-clip", str(other)], device="cpu", weights=[1, 3])
    assert [weight for _, weight in clip.text.parts] == [0.25, 0.75]
    assert load_clip(["emoji-clip"]).name == "emoji-clip"


def test_tokenizers_that_differ(emoji_clip):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")

    class Other:
        tokenizer, context_length = fast, 77
        clean_fn = staticmethod(str)

        def __call__(self, texts):
            rows = [fast.encode(text) for text in texts]
            return torch.tensor([row + [1] * (77 - len(row)) for row in rows])

    clip = Clip(make_clip().model, Other(), "other")
    with pytest.raises(ValueError, match="emoji-clip and other, whose tokenizers differ"):
        JointClip([emoji_clip, clip])


def test_bad_lists(emoji_clip, vit_clip):
    with pytest.raises(ValueError, match="at least two CLIPs but holds 1"):
        JointClip([emoji_clip])
    with pytest.raises(ValueError, match="holds one CLIP twice"):
        JointClip([emoji_clip, emoji_clip])
    for weights in ([1], [1, 0], [1, float("nan")]):
        with pytest.raises(ValueError, match=r"`weights` has to (hold 2 numbers|be finite)"):
            JointClip([emoji_clip, vit_clip], weights)
    with pytest.raises(ValueError, match="`name` is an empty list"):
        load_clip([])
    with pytest.raises(ValueError, match="`name` holds one CLIP twice"):
        load_clip(["emoji-clip", "emoji-clip"])
    with pytest.raises(ValueError, match="`weights` has to hold 2 numbers"):
        load_clip(["emoji-clip", "x"], weights=[1])
    with pytest.raises(ValueError, match="but there is one CLIP"):
        load_clip("emoji-clip", weights=[1])
    with pytest.raises(ValueError, match="but `name` is a list"):
        load_clip(["emoji-clip", "x"], pretrained="y")
