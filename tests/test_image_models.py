"""The bundled image model, and image models by name."""

import inspect
import json
import socket
from types import SimpleNamespace

import diffusers
import numpy as np
import open_clip
import pytest
import torch
from conftest import EXAMPLES, ROOT
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image
from tiny_diffusion import export_emoji_diffusion, flux, stable_diffusion, tokenizer
from transformers import CLIPTextModel, CLIPTokenizer

from pez_core import ArgumentError, ArgumentTypeError, PezPipeline, SearchOptions
from pez_core.clip.images import load_image
from pez_core.diffusion import evaluate, load_pipeline, make_gallery
from pez_core.diffusion.image_models import (
    BUNDLED,
    BundledModel,
    Stopped,
    default_settings,
    draw,
    draws_from_prompts,
    unread_end,
)

FOLDER = BUNDLED["emoji-diffusion"].folder
QUICK = {"num_inference_steps": 2}
FOUND = SearchOptions(prompt_len=4, effort="paper", steps=4)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of an `emoji-diffusion` with random weights."""
    folder = tmp_path_factory.mktemp("models") / "emoji-diffusion"
    export_emoji_diffusion(folder)
    return folder


@pytest.fixture(params=["random", "bundled"])
def either(request, exported):
    """This folder, and the one of the package."""
    return exported if request.param == "random" else FOLDER


@pytest.fixture
def offline(monkeypatch):
    """No network."""

    def refuse(*arguments, **options):
        pytest.fail("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def bundled(exported, offline, monkeypatch):
    """The folder with random weights in place of the bundled one, and no network."""
    model = BUNDLED["emoji-diffusion"]
    replaced = type(model)(exported, model.clip, model.settings)
    monkeypatch.setitem(BUNDLED, "emoji-diffusion", replaced)
    return replaced


@pytest.fixture(scope="module")
def texts():
    """What people write: captions, names and keywords, prompts, and odd characters."""
    rows = map(json.loads, (ROOT / "benchmarks/data/unseen_captions.jsonl").open())
    names = map(json.loads, (ROOT / "examples/index.jsonl").open())
    phrases = [line.split("\t")[0] for line in (ROOT / "tools/emoji_phrases.tsv").open()]
    odd = [
        "",
        "A Red CAR!",
        "it's a dog's life",
        "two  spaces",
        "naïve café",
        "😂 🐟",
        "東京",
        "x" * 400,
    ]
    found = [row["caption"] for row in rows]
    found += [" ".join([row["name"], *row["words"]]) for row in names]
    return [*found, *phrases[:300], *odd, "x" * 400, " ".join(["word"] * 200)]


def test_the_text_encoder_has_the_hidden_states_of_open_clip(either, texts, emoji_clip):
    encoder = CLIPTextModel.from_pretrained(either / "text_encoder")
    assert encoder.dtype == torch.float32
    model, ids = emoji_clip.model, open_clip.tokenize(texts[::7])
    with torch.no_grad():
        x = model.token_embedding(ids) + model.positional_embedding
        expected = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
        found = encoder(ids).last_hidden_state
        # of the end token, the feature of the search
        ends = found[torch.arange(len(ids)), ids.argmax(1)] @ model.text_projection
        features = torch.nn.functional.normalize(ends, dim=1)
        torch.testing.assert_close(
            features, model.encode_text(ids, normalize=True), atol=2e-5, rtol=0
        )
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_the_tokenizer_has_the_ids_of_open_clip(either, texts):
    words = CLIPTokenizer.from_pretrained(either / "tokenizer")
    assert len(texts) > 300
    for text, expected in zip(texts, open_clip.tokenize(texts), strict=True):
        end = expected.argmax() + 1
        found = words(text, truncation=True).input_ids
        assert found == expected[:end].tolist(), text
    padded = words(["a dog"], padding="max_length", truncation=True).input_ids
    assert len(padded[0]) == 77


def test_plain_diffusers_loads_it(either):
    pipe = StableDiffusionPipeline.from_pretrained(either)
    pipe.set_progress_bar_config(disable=True)
    assert {pipe.vae.dtype, pipe.unet.dtype, pipe.text_encoder.dtype} == {torch.float32}
    (image,) = pipe("a red fish", num_inference_steps=2).images
    assert image.size == (64, 64)


def test_the_bundled_weights_load_offline_and_are_small(offline, capfd):
    capfd.readouterr()
    pipe = load_pipeline("emoji-diffusion", "cpu")
    assert isinstance(pipe, StableDiffusionPipeline) and pipe.dtype == torch.float32
    assert default_settings(pipe) == BUNDLED["emoji-diffusion"].settings
    assert capfd.readouterr() == ("", "")
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 40e6


def test_the_bundled_weights_make_images_of_the_prompt(emoji_clip):
    pipe = load_pipeline("emoji-diffusion", "cpu")
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a red heart", "a yellow face", "a green tree"]
    settings = default_settings(pipe) | {"num_inference_steps": 10}
    images = [draw(pipe, prompt, [0, 1], settings) for prompt in prompts]
    features = torch.stack([emoji_clip.encode_images(few).mean(0) for few in images])
    similar = features @ emoji_clip.encode_texts(prompts).T
    assert torch.equal(similar.argmax(1), torch.arange(3)), similar


@pytest.mark.slow
def test_the_name_brings_its_clip_along_and_needs_no_network(bundled, emoji_clip):
    pez = PezPipeline.from_pretrained("emoji-diffusion")
    pez.set_progress_bar_config(disable=True)
    assert pez.clip.clip.name == "emoji-clip"
    output = pez(image=EXAMPLES[0], options=FOUND, num_images_per_prompt=2, **QUICK)
    assert [image.size for image in output.images] == [(64, 64)] * 2
    text = ["a red fish on a blue background"]
    encoded, _ = pez.pipeline.encode_prompt(text, "cpu", 1, False)
    projected = encoded[0, 8] @ emoji_clip.model.text_projection
    similarity = torch.nn.functional.cosine_similarity(
        projected, emoji_clip.encode_texts(text)[0], 0
    )
    assert similarity > 0.9999


def test_another_clip_may_be_given(bundled, tiny_clip):
    pez = PezPipeline.from_pretrained("emoji-diffusion", clip=tiny_clip)
    assert pez.clip.clip.name == "tiny"


def test_missing_weights_are_named(monkeypatch, tmp_path):
    model = BUNDLED["emoji-diffusion"]
    gone = type(model)(tmp_path / "none", model.clip, model.settings)
    monkeypatch.setitem(BUNDLED, "emoji-diffusion", gone)
    for load in (PezPipeline.from_pretrained, load_pipeline):
        with pytest.raises(ArgumentError, match=r"weights are not in .*none; install"):
            load("emoji-diffusion")


@pytest.mark.slow
def test_a_bundled_model_has_settings_of_its_own(bundled, emoji_clip, monkeypatch):
    calls = []
    call = StableDiffusionPipeline.__call__

    def recorded(self, *arguments, **options):
        calls.append(options["guidance_scale"])
        return call(self, *arguments, **options | QUICK)

    recorded.__signature__ = inspect.signature(call)
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", recorded)
    pez = PezPipeline.from_pretrained("emoji-diffusion")
    pez.set_progress_bar_config(disable=True)
    pez(image=EXAMPLES[0], options=FOUND, num_images_per_prompt=1)
    pez(image=EXAMPLES[0], options=FOUND, num_images_per_prompt=1, guidance_scale=2.5)
    assert calls == [bundled.settings["guidance_scale"], 2.5]
    assert default_settings(pez.pipeline) == bundled.settings
    assert default_settings(stable_diffusion())["guidance_scale"] == 9.0
    assert default_settings(flux()) == {}


def test_a_folder_is_loaded_in_silence(tmp_path, capfd):
    stable_diffusion().save_pretrained(tmp_path)
    capfd.readouterr()
    pipe = load_pipeline(tmp_path, "cpu")
    assert isinstance(pipe, StableDiffusionPipeline) and pipe.dtype == torch.float32
    assert capfd.readouterr() == ("", "")


def test_what_is_not_there_is_refused_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ArgumentError, match="'nobody/nothing', which is not on this disk; add `download`"
    ):
        load_pipeline("nobody/nothing")
    with pytest.raises(ArgumentError, match="neither a folder nor a repository"):
        load_pipeline("emoji-difusion")
    with pytest.raises(ArgumentError, match=r"holds no model_index\.json"):
        load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FuturePipeline"}')
    with pytest.raises(ArgumentError, match="this version of diffusers cannot load"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize("load", ["load_pipeline", "PezPipeline", "saved"])
def test_code_of_a_processor_never_runs(tmp_path, tiny_clip, monkeypatch, load):
    """transformers would ask on the terminal whether to run it."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = tmp_path / "pipeline"
    stable_diffusion().save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["feature_extractor"] = ["transformers", "CLIPProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    processor = folder / "feature_extractor"
    (folder / "tokenizer").rename(processor)
    tokenizer().save_pretrained(folder / "tokenizer")
    kind = {"image_processor_type": "CLIPImageProcessor"}
    (processor / "preprocessor_config.json").write_text(json.dumps(kind))
    auto = {"auto_map": {"AutoTokenizer": ["tokens.Tokens", "tokens.Tokens"]}}
    (processor / "tokenizer_config.json").write_text(json.dumps(auto))
    marker = str(tmp_path / "was-here")
    (processor / "tokens.py").write_text(f"open({marker!r}, 'w')\nclass Tokens: pass\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        if load == "load_pipeline":
            load_pipeline(folder, "cpu")
        elif load == "PezPipeline":
            PezPipeline.from_pretrained(folder, tiny_clip)
        else:
            index = {"_class_name": "PezPipeline", "pipeline": ["diffusers", "DiffusionPipeline"]}
            (tmp_path / "model_index.json").write_text(json.dumps(index))
            PezPipeline.from_pretrained(tmp_path, tiny_clip)
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize(
    "index", ["[]", "{}", '{"_class_name": "StableDiffusionPipeline", "unet": 3}', "[" * 9999]
)
def test_a_damaged_folder_is_named(tmp_path, index):
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(ArgumentError, match=f"`pipeline` is '{tmp_path}', which cannot be loaded"):
        load_pipeline(tmp_path)


def test_a_download_is_asked_for(monkeypatch):
    asked = []

    def from_pretrained(name, **options):
        asked.append((name, options["local_files_only"]))
        return stable_diffusion()

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", from_pretrained)
    load_pipeline("somebody/something", "cpu", download=True)
    assert asked == [("somebody/something", False)]


def test_pipelines_that_need_an_image_are_refused(tmp_path):
    sd = stable_diffusion()
    StableDiffusionImg2ImgPipeline(**sd.components, requires_safety_checker=False).save_pretrained(
        tmp_path
    )
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionImg2ImgPipeline"
    with pytest.raises(ArgumentError, match="has to be a text-to-image pipeline"):
        load_pipeline(tmp_path, "cpu")


FROM_PROMPTS = """StableDiffusion StableDiffusionXL Flux Chroma QwenImage ZImage Flux2 Flux2Klein
GlmImage Wan WanVACE Sana PixArtSigma HunyuanDiT Lumina2"""
FROM_MORE = """StableDiffusionImg2Img StableDiffusionInpaint StableDiffusionXLImg2Img FluxFill
StableDiffusionControlNet FluxControlNet StableDiffusionUpscale WanVideoToVideo LucyEdit
AudioLDM WanImageToVideo"""


@pytest.mark.parametrize("name", FROM_PROMPTS.split())
def test_pipelines_that_draw_from_a_prompt_are_accepted(name):
    assert draws_from_prompts(getattr(diffusers, f"{name}Pipeline"))


@pytest.mark.parametrize("name", FROM_MORE.split())
def test_pipelines_that_need_more_than_a_prompt_are_refused(name):
    assert not draws_from_prompts(getattr(diffusers, f"{name}Pipeline"))


def test_a_pipeline_for_videos_makes_one_frame_for_each_seed(tiny_clip):
    asked = []

    class Video(DiffusionPipeline):
        def __call__(self, prompt, num_frames=81, generator=None, output_type="pil"):
            asked.append((prompt, num_frames, len(generator or [])))
            frames = [[Image.new("RGB", (8, 8), colour)] for colour in ("red", "blue")]
            return SimpleNamespace(frames=frames).frames, None

    images = draw(Video(), "a dog", [3, 4], {"num_frames": 16})
    assert [image.getpixel((0, 0)) for image in images] == [(255, 0, 0), (0, 0, 255)]
    assert asked == [(["a dog", "a dog"], 1, 2)]
    red = Image.new("RGB", (8, 8), "red")
    found = evaluate(Video(), "a dog", red, tiny_clip, num_images_per_prompt=2)
    assert found.similarities.shape == (1, 2) and asked[1:] == [(["a dog"] * 2, 1, 0)]


def test_images_that_a_safety_checker_blanks_are_named(monkeypatch, caplog):
    pipe = stable_diffusion()

    def blank(self, image, device, dtype):
        return image, [True, False]

    monkeypatch.setattr(StableDiffusionPipeline, "run_safety_checker", blank)
    draw(pipe, "a dog", [3, 4], QUICK)
    assert "blanked 1 of 2 images of 'a dog'" in caplog.text


def test_a_copy_of_a_bundled_model_has_its_settings(monkeypatch, tmp_path):
    pipe, other = stable_diffusion(), stable_diffusion(seed=1)
    pipe.save_pretrained(tmp_path / "bundled")
    model = BundledModel(tmp_path / "bundled", "tiny", {"num_inference_steps": 3})
    monkeypatch.setitem(BUNDLED, "tiny", model)
    pipe.save_pretrained(tmp_path / "copy")
    assert default_settings(load_pipeline(tmp_path / "copy", "cpu")) == model.settings
    other.unet.register_to_config(sample_size=64)
    assert default_settings(other)["num_inference_steps"] == 25
    strange = SimpleNamespace(unet=SimpleNamespace(config=object()))
    assert default_settings(strange)["num_inference_steps"] == 25


def test_what_is_no_folder_of_an_image_pipeline_has_a_remedy(tmp_path, tiny_clip):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ArgumentError, match=r"is a file; .* `from_single_file`"):
        load_pipeline(file, "cpu")
    PezPipeline(tiny_clip, stable_diffusion()).save_pretrained(tmp_path / "saved")
    with pytest.raises(ArgumentError, match=r"wrote; give '.*pipeline', the image pipeline in it"):
        load_pipeline(tmp_path / "saved", "cpu")
    with pytest.raises(ArgumentTypeError, match="has to be a name or a folder but is None"):
        load_pipeline(None, "cpu")


def test_an_image_depends_on_its_own_seed():
    pipe = stable_diffusion()
    both = draw(pipe, "a dog", [3, 4], QUICK)
    (alone,) = draw(pipe, "a dog", [4], QUICK)
    (plain,) = pipe("a dog", generator=torch.Generator().manual_seed(4), **QUICK).images
    # a batch of another size is rounded in another way
    assert np.abs(np.asarray(both[1], float) - np.asarray(alone, float)).max() <= 1
    assert np.array_equal(np.asarray(alone), np.asarray(plain))


def test_steps_are_reported_and_end_where_that_is_asked_for():
    shares = []
    draw(stable_diffusion(), "a dog", [0], {"num_inference_steps": 4}, shares.append)
    assert shares == [0.25, 0.5, 0.75, 1.0]
    with pytest.raises(Stopped):
        draw(stable_diffusion(), "a dog", [0], QUICK, lambda share: share >= 0.5)


def test_what_is_cut_off_a_long_prompt_is_named(tiny_clip, caplog):
    pipeline = stable_diffusion()
    long = "fish " * 75 + "house tree"
    assert unread_end(pipeline, long) == "house tree"
    assert unread_end(pipeline, "fish " * 75) == ""
    options = {"num_inference_steps": 1, "num_images_per_prompt": 1}
    make_gallery(pipeline, ["fish", long], ["a fish", "a fish"], tiny_clip, **options)
    assert caplog.text.count("cuts off 'house tree'") == 1
    # another text encoder may read on
    components = {**pipeline.components, "text_encoder_2": torch.nn.Linear(1, 1)}
    assert unread_end(SimpleNamespace(components=components), long) == ""
    assert unread_end(SimpleNamespace(components={}), long) == ""


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_inference_steps": 0}, "`num_inference_steps` has to be at least 1"),
        ({"num_inference_steps": 1000}, "was made for fewer than 1000"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` has to be finite"),
    ],
)
def test_settings_that_no_image_can_be_made_with(tiny_clip, wrong, message):
    pipeline, image = stable_diffusion(), load_image(EXAMPLES[0])
    with pytest.raises(ArgumentError, match=message):
        make_gallery(pipeline, "a", "a fish", tiny_clip, **wrong)
    with pytest.raises(ArgumentError, match=message):
        evaluate(pipeline, "a", image, tiny_clip, **wrong)
