"""Loading: what is there loads, what is not is named with its size and place."""

import hashlib
import io
import json
import os
import pathlib
import pickle
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import open_clip
import pytest
import torch
from conftest import EXAMPLES, ROOT, TEXT, VISION, make_model
from PIL import Image
from safetensors.torch import load_file, save_file

from pez_core import ArgumentError, SearchOptions, invert, load_clip
from pez_core.clip import PRESETS, activation, build, files
from pez_core.clip.images import load_image
from pez_core.clip.models import BUNDLED
from pez_core.clip.weights import download_size, fetch_weights, find_on_disk, weights_of_tag


@pytest.fixture(scope="module")
def architecture(tmp_path_factory):
    """A tiny architecture that open_clip knows by name."""
    folder = tmp_path_factory.mktemp("configs")
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
    (folder / "pez-tiny.json").write_text(json.dumps(config))
    (folder / "pez-wide.json").write_text(
        json.dumps(config | {"embed_dim": 24, "text_cfg": TEXT | {"width": 64}})
    )
    hf_text = {"hf_model_name": "roberta-base", "hf_tokenizer_name": "roberta-base"}
    (folder / "pez-hf.json").write_text(json.dumps(config | {"text_cfg": hf_text}))
    open_clip.add_model_config(folder)
    return "pez-tiny"


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_file(make_model(seed=3).state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def empty_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("PEZ_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def same_text(clip, model):
    ids = open_clip.SimpleTokenizer()(["a red apple"])
    theirs = torch.nn.functional.normalize(model.encode_text(ids), dim=-1)
    return torch.allclose(clip.encode_texts(["a red apple"]).cpu(), theirs, atol=1e-5)


def test_bundled(emoji_clip):
    assert emoji_clip.name == "emoji-clip" and emoji_clip.dtype == torch.float32
    assert 2_000 < len(emoji_clip.vocabulary) < 6_000
    assert all(emoji_clip.text.words.round_trips([i]) for i in emoji_clip.vocabulary.tolist())


def test_loading_draws_no_random_weights(architecture, weights):
    before = torch.random.get_rng_state()
    clip = load_clip(f"{architecture}:{weights}", device="cpu")
    assert torch.equal(torch.random.get_rng_state(), before)
    own, file = clip.model.state_dict(), load_file(weights)
    assert own.keys() == file.keys()
    assert all(torch.equal(own[name], file[name]) for name in own)
    # drawing works again behind it
    assert not torch.equal(torch.nn.Linear(3, 3).weight, torch.nn.Linear(3, 3).weight)


@pytest.mark.slow
def test_a_file_gives_its_weights(architecture, weights):
    for clip in (
        load_clip(architecture, pretrained=weights, device="cpu"),
        load_clip(architecture, pretrained=str(weights), device="cpu"),
        load_clip(f"{architecture}:{weights}", device="cpu"),
    ):
        assert same_text(clip, make_model(seed=3))
    assert len(clip.vocabulary) == 34_277


def test_a_torch_file_gives_its_weights(architecture, tmp_path):
    torch.save({"state_dict": make_model(seed=4).state_dict()}, tmp_path / "tiny.pt")
    clip = load_clip(architecture, tmp_path / "tiny.pt", device="cpu")
    assert same_text(clip, make_model(seed=4))


def test_a_folder_gives_model_and_vocabulary(tmp_path, weights):
    weights.rename(tmp_path / "open_clip_model.safetensors")
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    )
    (tmp_path / "vocabulary.json").write_text("[320, 736, 3055, 49407]")
    clip = load_clip(str(tmp_path), device="cpu")
    assert same_text(clip, make_model(seed=3))
    assert clip.vocabulary.tolist() == [320, 736, 3055]
    assert list(clip.model.visual.preprocess_cfg["mean"]) == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype(architecture, weights, dtype):
    clip = load_clip(architecture, weights, device="cpu", dtype=dtype)
    assert clip.dtype == dtype
    features = clip.encode_texts(["a red apple"])
    assert features.dtype == torch.float32 and features.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_bundled_model_in_half_precision(emoji_clip, dtype):
    clip = load_clip("emoji-clip", device="cpu", dtype=dtype)
    image = load_image(EXAMPLES[0])
    for ours, full in (
        (clip.encode_images([image]), emoji_clip.encode_images([image])),
        (clip.encode_texts(["red apple"]), emoji_clip.encode_texts(["red apple"])),
    ):
        assert (ours * full).sum() > 0.999
    (result,) = invert(clip, image, SearchOptions(swaps=0, steps=5))
    assert result.similarity == pytest.approx(result.history[-1][1], abs=0.01)


def test_inference_mode_outside_does_not_spoil_the_weights(architecture, weights):
    with torch.inference_mode():
        clip = load_clip(architecture, weights)
    assert not clip.text.token_embedding.is_inference()


def test_tags_placed_by_hand_are_found(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    save_file({}, folder / "ViT-B-32.openai.safetensors")
    found = find_on_disk("ViT-B-32", "openai")
    assert found == folder / "ViT-B-32.openai.safetensors"
    assert find_on_disk("ViT-B-32", "laion2b_s34b_b79k") is None
    (folder / "ViT-B-32.laion2b_s34b_b79k.bin").write_bytes(b"x")
    assert find_on_disk("ViT-B-32", "laion2b_s34b_b79k").suffix == ".bin"


@pytest.mark.slow
def test_openai_tags_use_quick_gelu(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    model = open_clip.create_model("ViT-B-32", precision="fp16")
    save_file(model.state_dict(), folder / "ViT-B-32.openai.safetensors")
    clip = load_clip("ViT-B-32:openai", device="cpu")
    gelu = clip.model.transformer.resblocks[0].mlp.gelu
    assert isinstance(gelu, open_clip.transformer.QuickGELU)


def test_nothing_is_downloaded_unless_asked(monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)  # any use would fail otherwise
    with pytest.raises(ValueError) as caught:
        load_clip("ViT-H-14", pretrained="laion2b_s32b_b79k")
    message = str(caught.value)
    for part in ("3.94 GB", "`download`", "laion/CLIP-ViT-H-14", "by hand as"):
        assert part in message, message


def test_presets_are_open_clips_own():
    for preset in PRESETS:
        found = open_clip.get_pretrained_cfg(preset.name, preset.pretrained)
        assert found["hf_hub"] == preset.repository + "/"


def test_presets_and_files_on_disk_are_found_without_open_clip():
    """What lists models answers at once; open_clip and torch take seconds to import."""
    script = """
import sys, types
package = types.ModuleType("pez_core")
package.__path__ = [sys.argv[1]]
sys.modules["pez_core"] = package
import pez_core.clip, pez_core.clip.models, pez_core.clip.weights
for preset in pez_core.clip.PRESETS:
    pez_core.clip.weights.find_on_disk(preset.name, preset.pretrained)
    pez_core.clip.weights.download_size(preset.name, preset.pretrained)
assert not {"open_clip", "torch", "numpy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script, str(ROOT / "pez_core")], check=True)


def test_sizes_of_presets_are_those_of_their_architectures():
    for preset in PRESETS:
        with torch.device("meta"):
            model = open_clip.create_model(preset.name, load_weights=False, device="meta")
        size = sum(p.numel() for p in model.parameters()) * 4 / 1e9
        assert preset.size == pytest.approx(size, abs=0.01)
    assert download_size("ViT-B-16", "openai") == pytest.approx(0.6, abs=0.01)


class Hub(BaseHTTPRequestHandler):
    """The part of the Hugging Face Hub that serves a file."""

    content, etag, asked = b"", None, []

    def _headers(self, length, status=200):
        self.send_response(status)
        self.send_header("X-Repo-Commit", "a" * 40)
        etag = self.etag or hashlib.sha256(self.content).hexdigest()
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def do_HEAD(self):
        if self.path.endswith("open_clip_model.safetensors"):
            self._headers(len(self.content))
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()

    def do_GET(self):
        asked = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-")
        start = int(asked.split("-")[0] or 0)
        Hub.asked.append(start)
        self._headers(len(self.content) - start, 206 if start else 200)
        self.wfile.write(self.content[start:])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch):
    """Makes huggingface_hub ask a server on this machine, or one that is not there."""
    servers = []

    def start(handler):
        address = "http://127.0.0.1:9"
        if handler:
            server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            servers.append(server)
            address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )

    Hub.content = os.urandom(100_000)
    yield start
    for server in servers:
        server.shutdown()


def test_download_when_asked(hub):
    """Fetched once, then found on disk."""
    hub(Hub)
    path = weights_of_tag("ViT-H-14", "laion2b_s32b_b79k", download=True)
    assert path.read_bytes() == Hub.content
    assert find_on_disk("ViT-H-14", "laion2b_s32b_b79k").samefile(path)


class BrokenHub(Hub):
    """Closes the connection in the middle of every file."""

    def do_GET(self):
        self._headers(len(self.content))
        self.wfile.write(self.content[: len(self.content) // 2])
        self.close_connection = True


@pytest.mark.parametrize("handler", [BrokenHub, None])
def test_a_failed_download_says_so(hub, handler):
    hub(handler)
    with pytest.raises(OSError, match=r"Could not download .*resumed"):
        weights_of_tag("ViT-H-14", "laion2b_s32b_b79k", download=True)


def test_a_tokenizer_on_the_hub_is_not_fetched_unless_asked(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "ViT-B-16-SigLIP.webli.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"tokenizer .*`download`"):
        load_clip("ViT-B-16-SigLIP:webli")


def test_a_file_is_prepared_as_all_tags_of_its_architecture_say():
    assert build.preprocessing("ViT-B-16-SigLIP", {})["mean"] == (0.5, 0.5, 0.5)
    assert build.preprocessing("ViT-B-16-SigLIP", {})["resize_mode"] == "squash"
    assert build.preprocessing("pez-unknown", {}) is None


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.slow
def test_bad_weights(architecture, weights, tmp_path):
    def file(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    whole = weights.read_bytes()
    cases = [
        (file("empty.safetensors", b""), "damaged.*empty"),
        (file("cut.safetensors", whole[: len(whole) // 2]), "damaged"),
        (file("text.safetensors", b"hello, world"), "damaged"),
        (file("text.pt", b"hello, world"), "damaged"),
        (file("list.pt", pickle.dumps([1, 2, 3])), "damaged"),
        (file("evil.pt", pickle.dumps(Evil(str(tmp_path / "was-here")))), "damaged"),
    ]
    script = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    script.save(str(tmp_path / "script.pt"))
    cases.append((tmp_path / "script.pt", "TorchScript.*convert it to safetensors"))
    torch.save({"optimizer": 3}, tmp_path / "other.pt")
    cases.append((tmp_path / "other.pt", "does not hold weights of pez-tiny"))
    for path, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            load_clip(architecture, path)
        assert str(path) in str(caught.value) and "`pretrained`" in str(caught.value)
    assert not (tmp_path / "was-here").exists()
    with pytest.raises(ValueError, match=r"does not hold weights of pez-wide"):
        load_clip("pez-wide", weights)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("ViT-H-41", {}, r"`name` is 'ViT-H-41'.*emoji-clip.*ViT-H-14"),
        ("ViT-H-14", {}, r"`pretrained` is missing.*laion2b_s32b_b79k"),
        ("ViT-H-14", {"pretrained": "laion9b"}, r"neither a file nor a tag.*laion2b_s32b_b79k"),
        ("pez-hf", {"pretrained": "x"}, "Hugging Face model"),
        ("emoji-clip", {"pretrained": "x"}, "comes with its weights"),
        ("emoji-clip", {"device": "toaster"}, "`device` is 'toaster'"),
        ("emoji-clip", {"dtype": torch.int8}, "`dtype` is torch.int8"),
    ],
)
def test_bad_arguments(architecture, name, options, message):
    with pytest.raises(ValueError, match=message):
        load_clip(name, **options)


def test_encoders_in_memory_have_their_own_function():
    for given in (torch.nn.Linear(2, 2), [torch.nn.Linear(2, 2)]):
        with pytest.raises(TypeError, match="holds a Linear; use `clip_from_encoders`"):
            load_clip(given)


def test_wrong_types():
    with pytest.raises(TypeError, match="`name`"):
        load_clip(3)
    with pytest.raises(TypeError, match="`pretrained`"):
        load_clip("ViT-B-32", 3)
    with pytest.raises(TypeError, match="`device`"):
        load_clip(device=0.5)
    with pytest.raises(TypeError, match="`dtype`"):
        load_clip(dtype=[])


def test_bad_folders(tmp_path, weights):
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    weights.rename(tmp_path / "weights.txt")
    with pytest.raises(ValueError, match="holds no weights"):
        load_clip(str(tmp_path))
    (tmp_path / "weights.txt").rename(tmp_path / "open_clip_model.safetensors")
    for text in ("nonsense", '["dog"]', "3"):
        (tmp_path / "vocabulary.json").write_text(text)
        with pytest.raises(ValueError, match=r"vocabulary.json has to be a JSON list"):
            load_clip(str(tmp_path))
    (tmp_path / "vocabulary.json").write_text("[320, 60000]")
    assert load_clip(str(tmp_path), device="cpu").vocabulary.tolist() == [320]


@pytest.mark.slow
def test_paths_may_hold_colons(architecture, tmp_path, monkeypatch):
    """As all paths of Windows do."""
    save_file(small_model().state_dict(), tmp_path / "a:b.safetensors")
    assert load_clip(str(tmp_path / "a:b.safetensors"), device="cpu").name == "a:b"
    monkeypatch.chdir(tmp_path)
    assert load_clip("a:b.safetensors", device="cpu").name == "a:b"
    save_file(small_model().state_dict(), r"C:\clips\small.safetensors")
    for name in (r"C:\clips\small.safetensors", r"ViT-S-32-alt:C:\clips\small.safetensors"):
        assert same_text(load_clip(name, device="cpu"), small_model()), name
    for missing in (r"D:\a.safetensors", "D:/a.safetensors", "no:where.safetensors"):
        with pytest.raises(ValueError, match=r"`name` is the file .* does not exist"):
            load_clip(missing)
    with pytest.raises(ValueError, match=r"`name` is 'ViT-H-41'"):
        load_clip("ViT-H-41:openai")


CODE = "from pathlib import Path\nPath({!r}).touch()\n"


@pytest.fixture
def stranger(tmp_path, weights):
    """A folder whose tokenizer is Python code that leaves a file `was-here`."""
    folder = tmp_path / "stranger"
    folder.mkdir()
    weights.rename(folder / "open_clip_model.safetensors")
    (folder / "tokens.py").write_text(CODE.format(str(tmp_path / "was-here")))
    auto_map = {"AutoTokenizer": ["tokens.Tokens", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))

    def write(vision=None, text=None):
        towers = {"vision_cfg": VISION | (vision or {}), "text_cfg": TEXT | (text or {})}
        config = {"model_cfg": {"embed_dim": 16, **towers}}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        return str(folder)

    yield write
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize(
    "vision, text, message",
    [
        ({}, {"tokenizer_kwargs": {"trust_remote_code": True}}, "'trust_remote_code'"),
        ({}, {"tokenizer_kwargs": {"bpe_path": "/etc/hostname"}}, "'bpe_path'"),
        ({}, {"tokenizer_kwargs": {"clean": ["lower"]}}, "'clean'"),
        ({}, {"tokenizer_kwargs": {"clean": "dirty"}}, "'dirty'"),
        ({}, {"tokenizer_kwargs": 3}, "3 for tokenizer_kwargs"),
        ({}, {"hf_model_name": "someone/text"}, "text tower of Hugging Face"),
        ({"timm_model_name": "hf-hub:someone/tower"}, {}, "hf-hub:someone/tower"),
        ({"timm_model_name": "local-dir:/tmp/tower"}, {}, "local-dir:/tmp/tower"),
        ({"timm_model_name": 3}, {}, "no model of timm"),
    ],
)
def test_the_config_of_a_folder_runs_no_code_and_stays_offline(stranger, vision, text, message):
    folder = stranger(vision, {"hf_tokenizer_name": "x"} | text)
    with pytest.raises(
        ValueError, match=f"`name` is the folder .*open_clip_config.json.*{message}"
    ):
        load_clip(folder)
    config = json.loads((pathlib.Path(folder) / "open_clip_config.json").read_text())
    with pytest.raises(ValueError, match=f"`config` .*{message}"):
        build.from_config(config | {"tokenizer": None}, {})


@pytest.mark.parametrize(
    "text, prepared",
    [
        ({"embed_cls": True}, {}),
        ({"pool_type": "eos", "eos_id": "x"}, {}),
        ({"tokenizer_kwargs": {"strip_sep_token": True}}, {}),
        ({}, {"mean": "x"}),
        ({}, {"std": [0.0, 0.0, 0.0]}),
        ({}, {"interpolation": 5}),
    ],
)
def test_a_folder_whose_config_fails_when_it_is_used_is_named(stranger, text, prepared):
    folder = pathlib.Path(stranger({}, text))
    config = json.loads((folder / "open_clip_config.json").read_text())
    (folder / "open_clip_config.json").write_text(json.dumps(config | {"preprocess_cfg": prepared}))
    with pytest.raises(ArgumentError, match=r"is the folder .*stranger.* CLIP that works"):
        load_clip(folder)


def test_the_tokenizer_of_a_folder_runs_no_code(stranger, monkeypatch):
    """Nobody is asked on the terminal, either."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="no tokenizer that can be read"):
        load_clip(stranger({}, {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"clean": "lower"}}))


@pytest.mark.parametrize("kind", ["local-dir:{}", "hf-hub:someone/clip", "no-such-name", 3, ["a"]])
def test_a_saved_config_names_only_tokenizers_of_open_clip(stranger, kind):
    folder = stranger({}, {"hf_tokenizer_name": "x"})
    name = kind.format(folder) if isinstance(kind, str) else kind
    model_cfg = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
    with pytest.raises(ValueError, match="`config` names the tokenizer"):
        build.from_config({"model_cfg": model_cfg, "tokenizer": name}, {})


@pytest.mark.parametrize("text", [{"width": "x"}, {"layers": None}, {"heads": 5}, {"odd": 1}])
def test_a_saved_config_that_gives_no_model_is_named(text):
    model_cfg = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT | text}
    with pytest.raises(ArgumentError, match="`config` gives no CLIP that works"):
        build.from_config({"model_cfg": model_cfg, "tokenizer": None}, {})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model_cfg": 3}', "[" * 200_000, "\xff"])
def test_a_folder_without_a_readable_config(tmp_path, weights, text):
    weights.rename(tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"open_clip_config.json (cannot be read|has no model_cfg)"
    ):
        load_clip(str(tmp_path))


@cache
def small_model(quick_gelu=False):
    """The smallest plain CLIP that open_clip knows, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return open_clip.create_model("ViT-S-32-alt", force_quick_gelu=quick_gelu).eval()


def as_transformers(model) -> dict:
    """The weights as transformers' CLIPModel names them, by splitting what open_clip joins."""
    from transformers import CLIPConfig, CLIPModel

    ours = model.state_dict()

    def sizes(tower):
        blocks = tower.transformer.resblocks
        return {
            "hidden_size": blocks[0].attn.embed_dim,
            "intermediate_size": blocks[0].mlp.c_fc.out_features,
            "num_hidden_layers": len(blocks),
            "num_attention_heads": blocks[0].attn.num_heads,
        }

    patch = {"patch_size": model.visual.patch_size[0], "image_size": model.visual.image_size[0]}
    config = CLIPConfig(
        text_config=sizes(model) | {"eos_token_id": 49407},
        vision_config=sizes(model.visual) | patch,
        projection_dim=model.text_projection.shape[1],
    )
    theirs = CLIPModel(config).eval()
    for key, tensor in theirs.state_dict().items():
        name = files._rename(key)
        if match := re.search(r"\.attn\.([qkv])_proj\.(weight|bias)$", name):
            joined = ours[name[: match.start()] + f".attn.in_proj_{match[2]}"]
            tensor.copy_(joined.chunk(3)["qkv".index(match[1])])
        elif name in ("visual.proj", "text_projection"):
            tensor.copy_(ours[name].T)
        elif not name.endswith("position_ids"):
            tensor.copy_(ours[name])
    return theirs


@pytest.mark.parametrize("layout", ["open_clip", "transformers"])
@pytest.mark.slow
def test_the_tensors_of_a_file_show_which_clip_it_holds(layout, tmp_path):
    """Both layouts give the features that the libraries that wrote them give."""
    ours = small_model(quick_gelu=layout == "transformers")
    ids = open_clip.get_tokenizer("ViT-S-32-alt")(["a red car", "snow"])
    pixels = torch.rand(2, 3, 224, 224)
    path = tmp_path / "some-clip.safetensors"
    with torch.no_grad():
        if layout == "open_clip":
            tensors = ours.state_dict()
            text, image = ours.encode_text(ids), ours.encode_image(pixels)
        else:
            theirs = as_transformers(ours)
            theirs.config.save_pretrained(tmp_path)  # tells the activation
            tensors = theirs.state_dict()
            read = theirs(input_ids=ids, pixel_values=pixels)
            text, image = read.text_embeds, read.image_embeds
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)

    transformers = layout == "transformers"
    found = files.find_clip(path)
    assert found == files.FoundClip("ViT-S-32-alt", (files.Reading(transformers),))
    clip = load_clip(str(path), device="cpu")
    assert clip.name == "some-clip"
    with torch.no_grad():
        for a, b in ((clip.model.encode_text(ids), text), (clip.model.encode_image(pixels), image)):
            a, b = torch.nn.functional.normalize(a), torch.nn.functional.normalize(b)
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_one_file_is_loaded_alike_however_it_is_named(tmp_path, monkeypatch, caplog):
    """By itself, as a path, as the folder of transformers, and as weights of its architecture."""
    ours = small_model(quick_gelu=True)
    theirs = as_transformers(ours)
    theirs.config.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in theirs.state_dict().items()}, path)
    texts = ["a red car", "snow"]
    caplog.clear()
    clips = [
        load_clip(str(path), device="cpu"),
        load_clip(path, device="cpu"),
        load_clip(tmp_path, device="cpu"),
        load_clip("ViT-S-32-alt", path, device="cpu"),
        load_clip(f"ViT-S-32-alt:{path}", device="cpu"),
    ]
    for clip in clips[1:]:
        assert torch.equal(clip.encode_texts(texts), clips[0].encode_texts(texts))
        assert clip.model.visual.preprocess_cfg == clips[0].model.visual.preprocess_cfg
    assert not [r for r in caplog.records if "initialized randomly" in r.getMessage()]


def test_a_file_that_names_its_tag_is_loaded_as_the_tag(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr("pez_core.clip.load.create_model", lambda *_, **o: made.append(o) or 1 / 0)
    pretend_to_be(monkeypatch, "ViT-L-14")
    for name in ("ViT-L-14.openai", "clip-laion2b-fine"):
        path = tmp_path / f"{name}.safetensors"
        save_file(make_model().state_dict(), path)
        for given in ((str(path),), ("ViT-L-14", path), (f"ViT-L-14:{path}",)):
            with pytest.raises(ZeroDivisionError):
                load_clip(*given, device="cpu")
        a, b, c = [(o["force_quick_gelu"], o["force_preprocess_cfg"]) for o in made[-3:]]
        assert a == b == c and a[0] is ("openai" in name)
    assert made[0]["force_preprocess_cfg"] != made[3]["force_preprocess_cfg"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("openai/clip-vit-base-patch32", (), "write 'ViT-B-32:openai' for it"),
        ("hf-hub:laion/CLIP-ViT-H-14-laion2B-s32B-b79K", (), "write 'ViT-H-14:laion2b_s32b_b79k'"),
        ("hf-hub:somebody/some-clip", (), "fetch its files into a folder"),
        ("ViT-B/32", (), "write 'ViT-B-32:openai' for it"),
        ("ViT-L/14", (), "write 'ViT-L-14:openai' for it"),
        (
            "old",
            ("config.json", "pytorch_model-00001-of-00002.bin"),
            "whose weights are in parts in PyTorch's format; save the model as one",
        ),
        ("empty", ("config.json",), "which holds neither open_clip_config.json nor"),
        ("weights.bin", None, "weights.bin', which is damaged or not a weights file"),
    ],
)
def test_other_layouts_and_names_are_refused_for_what_they_are(name, content, message, tmp_path):
    if content is None:
        (tmp_path / name).write_bytes(b"PK")
        name = str(tmp_path / name)
    elif content:
        folder = tmp_path / name
        folder.mkdir()
        for file in content:
            (folder / file).write_text("{}")
        name = str(folder)
    with pytest.raises(ArgumentError, match=re.escape(message)):
        load_clip(name)


@pytest.mark.parametrize(
    "name, architecture, quick",
    [
        ("clip-vit-large-patch14-openai", "ViT-L-14", {True}),
        ("ViT-L-14.laion2b_s32b_b82k", "ViT-L-14", {False}),
        ("laion400m", "ViT-L-14", {False}),
        ("laion400m", "ViT-B-32", {True}),
        ("DFN2B-CLIP-ViT-L-14", "ViT-L-14", {True, False}),  # two weights have such names
        ("ViT-L-14.dfn2b", "ViT-L-14", {True}),
        ("DFN2B-CLIP-ViT-B-16", "ViT-B-16", {True}),
        ("ViT-L-14.dfn2b_s39b", "ViT-L-14", {False}),
        ("model", "ViT-L-14", {True, False}),
        ("model", "ViT-H-14", {True, False}),
        ("model", "ViT-H-14-378", {True}),  # all public weights have it
        ("model", "ViT-L-14-336", {True}),
        ("model", "ViT-g-14", {False}),
        ("model", "ViT-S-32-alt", {False}),  # there are no public weights
    ],
)
def test_the_name_of_a_file_and_public_weights_tell_the_activation(
    monkeypatch, tmp_path, name, architecture, quick
):
    pretend_to_be(monkeypatch, architecture)
    path = tmp_path / f"{name}.safetensors"
    save_file(make_model().state_dict(), path)
    found = files.find_clip(path)
    assert {one.quick_gelu for one in found.readings} == quick
    with_laions_mean = files.reading_of_tag("ViT-L-14", "laion2b_s32b_b82k")
    assert (with_laions_mean in found.readings) == (
        architecture == "ViT-L-14" and ("laion2b" in name or name == "model")
    )


def pretend_to_be(monkeypatch, architecture):
    """Every whole CLIP is found to be of this architecture."""

    class Same(dict):
        def get(self, key):
            return architecture

    monkeypatch.setattr(files, "_plain_clips", Same)


def of_both_kinds(seed):
    """A tiny ViT with random weights, with GELU and with QuickGELU: by whether it is QuickGELU."""
    models = {}
    for quick in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            models[quick] = open_clip.model.CLIP(
                embed_dim=32,
                vision_cfg=VISION | {"image_size": 32, "width": 64, "layers": 2},
                text_cfg=TEXT | {"width": 48, "layers": 2},
                quick_gelu=quick,
            ).eval()
    for name, weight in models[False].named_parameters():
        if "mlp.c_fc" in name:  # so that it matters
            weight.data *= 20
    models[True].load_state_dict(models[False].state_dict())
    return models


def agreement(model):
    """How likely the names of ten drawings are, by open_clip alone."""
    prepare = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(size=32), is_train=False
    )
    pixels = torch.stack([prepare(picture) for picture in activation._pictures()])
    texts = open_clip.SimpleTokenizer()([f"an emoji of a {name}" for name in activation._NAMES])
    with torch.no_grad():
        images, words, scale = model(pixels, texts)
    logits = scale * images @ words.T
    return sum(float(x.log_softmax(1).diagonal().mean()) for x in (logits, logits.T))


@pytest.fixture
def two_kinds(tmp_path, monkeypatch):
    """An architecture whose public weights have GELU or QuickGELU."""
    config = {
        "embed_dim": 32,
        "vision_cfg": VISION | {"image_size": 32, "width": 64, "layers": 2},
        "text_cfg": TEXT | {"width": 48, "layers": 2},
    }
    (tmp_path / "pez-two-kinds.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "pez-two-kinds.json")
    tags = {k: open_clip.pretrained._pcfg(quick_gelu=k == "quick") for k in ("quick", "plain")}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "pez-two-kinds", tags)
    return "pez-two-kinds"


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("quick", [True, False])
def test_an_activation_that_nothing_tells_is_measured(two_kinds, tmp_path, caplog, quick, ending):
    """The one with which drawings and their names agree more is taken, and the log names it."""
    pairs = map(of_both_kinds, range(20))
    models = next(m for m in pairs if agreement(m[quick]) > agreement(m[not quick]))
    model, path = models[quick], tmp_path / f"model.{ending}"
    (save_file if ending == "safetensors" else torch.save)(model.state_dict(), path)
    kinds = ("quick_gelu", "gelu") if quick else ("gelu", "quick_gelu")
    for name in (path, f"{two_kinds}:{path}"):
        caplog.clear()
        clip = load_clip(name, device="cpu")
        assert same_text(clip, model) and not same_text(clip, models[not quick])
        (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
        assert f"{kinds[0]} was taken" in record.getMessage()
        assert f"activation='{kinds[1]}'" in record.getMessage()
        assert clip.config["model_cfg"].get("quick_gelu", False) is quick
    saved, _ = build.from_config(clip.config, clip.model.visual.preprocess_cfg)
    saved.load_state_dict(clip.model.state_dict())
    pixels = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(saved.encode_image(pixels), model.encode_image(pixels))


@pytest.mark.parametrize("name", ["emoji-clip", str(ROOT / "benchmarks/models/emoji-clip-judge")])
def test_the_measured_activation_is_that_of_the_training(name):
    """With trained weights of two CLIPs, whichever activation comes first."""
    if not os.path.isdir(name) and name != "emoji-clip":
        pytest.skip("the judge is not part of the package")
    clip = load_clip(name, device="cpu")
    readings = [files.Reading(True), files.Reading(False)]
    for order in (readings, readings[::-1]):
        best = activation.most_agreeing(clip.model, clip.tokenizer, order)
        assert best == files.Reading(False)


@pytest.mark.slow
def test_the_activation_may_be_given(two_kinds, tmp_path, caplog):
    model, path = of_both_kinds(0)[True], tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    caplog.clear()
    for name in (path, f"{two_kinds}:{path}"):
        assert same_text(load_clip(name, device="cpu", activation="quick_gelu"), model)
        assert not same_text(load_clip(name, device="cpu", activation="gelu"), model)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    named = tmp_path / "plain.safetensors"
    save_file(model.state_dict(), named)
    assert not same_text(load_clip(named, device="cpu"), model)
    assert same_text(load_clip(named, device="cpu", activation="quick_gelu"), model)
    for wrong in ("relu", True):
        with pytest.raises(ArgumentError, match="`activation` has to be one of"):
            load_clip(path, activation=wrong)
    with pytest.raises(ArgumentError, match="`activation` is 'gelu', but emoji-clip comes with"):
        load_clip("emoji-clip", activation="gelu")


def test_every_public_clip_has_one_of_the_readings_of_its_architecture():
    for name in files._plain_clips().values():
        public = files._public_readings(name)
        for one in (name, f"{name}-quickgelu"):
            for tag in open_clip.pretrained.list_pretrained_tags_by_model(one):
                config = open_clip.get_pretrained_cfg(one, tag)
                assert dict(public[tag].preprocess)["mean"] == config["mean"]
                assert public[tag].quick_gelu or not config.get("quick_gelu", False)


def scaled(tensors, name="scale_weight", rows=False):
    """Matrices in fp8, each with a scale, or with one for each of its rows."""
    found = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for key, tensor in tensors.items():
        if not key.endswith(".weight") or tensor.ndim != 2 or "embedding" in key:
            found[key] = tensor
            continue
        largest = tensor.abs().amax(1, keepdim=True) if rows else tensor.abs().max()
        scale = largest / 400
        found[key] = (tensor / scale).to(torch.float8_e4m3fn)
        found[key.removesuffix("weight") + name] = scale.squeeze()
        found[key.removesuffix("weight") + "scale_input"] = torch.ones(())
    return found


def with_prefix(prefix):
    return lambda tensors: {prefix + key: tensor for key, tensor in tensors.items()}


FORMS = {
    "upper-case ending": ("clip.SAFETENSORS", dict),
    "short ending": ("clip.sft", dict),
    "prefix clip.": ("a.safetensors", with_prefix("clip.")),
    "prefix module.": ("a.safetensors", with_prefix("module.")),
    "prefix of prefixes": ("a.safetensors", with_prefix("module.model.")),
    "beside another model": (
        "a.safetensors",
        lambda t: with_prefix("clip.")(t) | {"vae.conv.weight": torch.zeros(3)},
    ),
    "fp8": ("a.safetensors", scaled),
    "fp8, other names": ("a.safetensors", partial(scaled, name="weight_scale")),
    "fp8 by rows": ("a.safetensors", partial(scaled, rows=True)),
    "fp8 with a prefix": ("a.safetensors", lambda t: with_prefix("clip.")(scaled(t))),
    "without the scale of similarities": (
        "a.safetensors",
        lambda t: {key: tensor for key, tensor in t.items() if key != "logit_scale"},
    ),
    "bin": ("a.bin", dict),
    "pt": ("a.PT", lambda t: {"state_dict": t, "epoch": 3}),
    "pth": ("a.pth", with_prefix("module.")),
    "ckpt": ("a.ckpt", lambda t: {"state_dict": with_prefix("clip.")(t), "step": 1}),
}


@pytest.mark.parametrize("layout", ["open_clip", "transformers"])
@pytest.mark.parametrize("form", FORMS)
def test_files_are_loaded_in_any_form_that_people_have(form, layout, tmp_path, architecture):
    quick = layout == "transformers"  # as their config says by default
    model = make_model(seed=3, quick_gelu=True) if quick else make_model(seed=3)
    tensors, given = model.state_dict(), FORMS[form]
    if layout == "transformers":
        theirs = as_transformers(model)
        theirs.config.save_pretrained(tmp_path)
        tensors = theirs.state_dict()
    tensors, path = given[1](dict(tensors)), tmp_path / given[0]
    if files.is_safetensors(path):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
        assert files.find_clip(path) is not None
    else:
        torch.save(tensors, path)
    ids = open_clip.SimpleTokenizer()(["a red apple", "snow"])
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for name in (str(path), f"{architecture}:{path}"):
        clip = load_clip(name, device="cpu")
        for kind, encoded in (("text", ids), ("image", pixels)):
            ours, theirs = (
                getattr(one, f"encode_{kind}")(encoded, normalize=True)
                for one in (clip.model, model)
            )
            assert (ours * theirs).sum(1).min() > (0.98 if "fp8" in form else 0.9999)


def _longer(tensors):
    return tensors | {"positional_embedding": torch.zeros(248, 32)}


def _only(*prefixes):
    return lambda tensors: {k: t for k, t in tensors.items() if k.startswith(prefixes)}


def _without(*names):
    return lambda tensors: {k: t for k, t in tensors.items() if k not in names}


NO_CLIPS = {
    "image tower": (_only("visual."), "holds an image encoder alone; choose a file with both"),
    "text tower": (
        lambda t: {k: v for k, v in t.items() if not k.startswith("visual.")},
        "holds a text encoder alone; choose a file with both",
    ),
    "another kind of image tower": (
        _without("visual.conv1.weight", "visual.positional_embedding"),
        "holds a CLIP of an unknown architecture; write ARCHITECTURE:FILE",
    ),
    "another kind of text tower": (
        lambda t: {k if "visual" in k else f"text.{k}": v for k, v in t.items()},
        "holds a CLIP of an unknown architecture",
    ),
    "ResNet": (_without("visual.positional_embedding"), "holds a CLIP of an unknown architecture"),
    "LongCLIP": (_longer, "is a LongCLIP, which reads 248 tokens .*; choose the CLIP that it was"),
    "no projection of texts": (_without("text_projection"), "lacks the projection of its text"),
    "no projection of images": (_without("visual.proj"), "lacks the projection of its image"),
    "positions without a length": (
        lambda t: t | {"positional_embedding": torch.zeros(())},
        "holds a CLIP of an unknown architecture",
    ),
    "other size": (
        lambda t: t | {"text_projection": torch.zeros(32, 9), "visual.proj": torch.zeros(32, 9)},
        "holds a CLIP of an unknown architecture; write ARCHITECTURE:FILE",
    ),
    "no CLIP": (_only("transformer."), "holds no CLIP"),
    "quantised": (
        lambda t: {k: v.to(torch.int8) if k.endswith("c_fc.weight") else v for k, v in t.items()},
        r"is quantised \((I8|int8)\); take the file in float16",
    ),
}


@pytest.mark.parametrize("kind", NO_CLIPS)
def test_files_that_cannot_be_searched_are_named_for_what_they_are(
    kind, tmp_path, caplog, architecture
):
    change, message = NO_CLIPS[kind]
    tensors = change(dict(make_model().state_dict()))
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    caplog.clear()
    assert files.find_clip(path) is None
    assert not caplog.records  # such files are common
    with pytest.raises(ArgumentError, match=f"`name` is the file '{path}', which {message}"):
        load_clip(str(path))
    torch.save(tensors, tmp_path / "a.pt")
    with pytest.raises(ArgumentError, match=f"a.pt', which {message}"):
        load_clip(str(tmp_path / "a.pt"))


@pytest.mark.parametrize("kind", [["F32"], None, 3, {}])
def test_a_header_with_strange_types_is_passed_over(kind, tmp_path, architecture):
    """One such file must not take the list of models with it."""
    path = tmp_path / "a.safetensors"
    save_file(dict(make_model().state_dict()), path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name in [name for name in header if name != "__metadata__"][::2]:
        header[name]["dtype"] = kind
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + length :])
    assert files.find_clip(path) is None
    with pytest.raises(ArgumentError, match=r"is quantised|cannot be read"):
        load_clip(str(path))


DAMAGED = {
    "empty": (b"", "is empty; fetch it again"),
    "junk": (os.urandom(100), "cannot be read as safetensors"),
    "LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
        "is a pointer of Git LFS, .*; run `git lfs pull`",
    ),
    "web page": (b"\n<!DOCTYPE html><html>", "is a web page, .*; download the file itself"),
    "PyTorch": (b"PK\x03\x04 and so on", "is a PyTorch file; give it the ending .bin"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_files_that_hold_no_weights_are_named_for_what_they_are(kind, tmp_path, caplog):
    content, message = DAMAGED[kind]
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert files.find_clip(path) is None
    (record,) = caplog.records  # one line says which file it is
    assert str(path) in record.getMessage()
    with pytest.raises(ArgumentError, match=f"a.safetensors', which {message}"):
        load_clip(str(path))


def test_a_file_that_is_cut_off_is_not_offered(tmp_path, architecture):
    path = tmp_path / "a.safetensors"
    save_file(make_model().state_dict(), path)
    assert files.find_clip(path).name == architecture
    whole = path.read_bytes()
    for missing in (1, len(whole) // 2):
        path.write_bytes(whole[:-missing])
        assert files.find_clip(path) is None
        with pytest.raises(ArgumentError, match=f"is cut off: {missing:,} bytes are missing"):
            load_clip(str(path))
    with pytest.raises(ValueError, match=r"missing.safetensors', which does not exist"):
        load_clip(str(tmp_path / "missing.safetensors"))


def in_parts(folder, tensors, first):
    """Save tensors in two files with an index; the first file holds the first ones."""
    names = list(tensors)
    places = {}
    for k, part in enumerate((names[:first], names[first:]), start=1):
        file = f"model-{k:05}-of-00002.safetensors"
        save_file({name: tensors[name].contiguous() for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("layout", ["open_clip", "transformers"])
def test_the_parts_of_a_clip_are_loaded_by_their_folder_or_their_index(
    tmp_path, architecture, layout
):
    quick = layout == "transformers"
    model = make_model(seed=3, quick_gelu=True) if quick else make_model(seed=3)
    tensors = model.state_dict()
    if layout == "transformers":
        theirs = as_transformers(model)
        theirs.config.save_pretrained(tmp_path)
        tensors = theirs.state_dict()
    index = in_parts(tmp_path, tensors, len(tensors) // 2)
    assert files.find_clip(index).name == architecture
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for name in (str(tmp_path), str(index), f"{architecture}:{index}"):
        clip = load_clip(name, device="cpu")
        assert torch.allclose(clip.model.encode_image(pixels), model.encode_image(pixels))
    assert load_clip(index, device="cpu").name == "model"


@pytest.mark.parametrize("layout", ["open_clip", "transformers"])
def test_a_part_of_several_files_is_named(tmp_path, layout):
    tensors = make_model().state_dict()
    if layout == "transformers":
        tensors = as_transformers(make_model()).state_dict()
    # the last cut leaves nearly all of both towers in the first part
    for first in (1, 9, len(tensors) - 1):
        in_parts(tmp_path, tensors, first)
        for part in tmp_path.glob("*.safetensors"):
            with pytest.raises(ArgumentError, match=r"is one of several parts of a model; give"):
                load_clip(str(part))
            torch.save(load_file(part), part.with_suffix(".bin"))
            with pytest.raises(ArgumentError, match=r"parts of a model; save the model as one"):
                load_clip(str(part.with_suffix(".bin")))


def test_an_index_whose_parts_are_not_there_or_not_beside_it_is_named(tmp_path):
    index = in_parts(tmp_path, make_model().state_dict(), 9)
    whole = index.read_text()
    second = tmp_path / "model-00002-of-00002.safetensors"
    content = second.read_bytes()

    def refused(message):
        assert files.find_clip(index) is None
        with pytest.raises(ArgumentError, match=message):
            load_clip(str(index))

    second.unlink()
    refused("names model-00002-of-00002.safetensors, which is not there; put all parts beside it")
    second.write_bytes(content[:-1])
    refused("names model-00002-of-00002.safetensors, which is cut off: 1 bytes")
    save_file({"other": torch.zeros(2)}, second)
    refused("which lacks [0-9]+ of its tensors")
    for text in (
        "{}",
        "[" * 100_000,
        whole.replace(second.name, f"../{second.name}"),
        whole.replace(second.name, str(second)),
        whole.replace(second.name, "code.bin"),
        '{"weight_map": {"a": 3}}',
    ):
        index.write_text(text)
        refused("is no index of safetensors files")
    index.write_text('{"weight_map": {}}')
    refused("holds no CLIP")


def test_a_folder_of_transformers_may_hold_a_torch_file(tmp_path):
    model = make_model(seed=3, quick_gelu=True)
    theirs = as_transformers(model)
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    clip = load_clip(tmp_path, device="cpu")
    assert torch.allclose(clip.model.encode_image(pixels), model.encode_image(pixels))


def test_a_torch_file_by_its_path_runs_no_code(tmp_path):
    path = tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps({"a": Evil(str(tmp_path / "was-here"))}))
    torch.save({"a": Evil(str(tmp_path / "was-here"))}, tmp_path / "zip.bin")
    for one in (path, tmp_path / "zip.bin"):
        with pytest.raises(ArgumentError, match=f"{one.name}', which is damaged"):
            load_clip(str(one))
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize(
    "header",
    [
        "[" * 200_000,
        '{"a":' * 200_000,
        "[]",
        "3",
        '{"a": 3}',
        '{"a": {"shape": 3}}',
        '{"visual.conv1.weight": {"shape": []}}',
        '{"visual.conv1.weight": {"shape": [[1], {}, "x", null]}}',
        "\xff",
        None,
    ],
)
def test_a_file_with_a_crafted_header_holds_no_clip(header, tmp_path):
    tensors = small_model().state_dict()
    shapes = {key: {"shape": list(tensor.shape)} for key, tensor in tensors.items()}
    if header is None:  # all names are there, one of them with an odd shape
        shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"] = {"shape": []}
        shapes["visual.proj"] = {"shape": [[1]]}
        header = json.dumps(shapes)
    content = header.encode("latin-1")
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(content)) + content)
    assert files.find_clip(tmp_path / "a.safetensors") is None
    (tmp_path / "config.json").write_text("[" * 200_000)
    assert files._configured_activation(tmp_path / "config.json") is None


class Ended(BaseException):
    """What a person's cancel is in some programs."""


def test_a_file_that_cannot_be_read_is_named_in_the_log(tmp_path, caplog):
    broken, tower = tmp_path / "broken.safetensors", tmp_path / "tower.safetensors"
    broken.write_bytes(b"\x05\0\0\0\0\0\0\0{not}")
    save_file({"visual.proj": torch.zeros(2, 3)}, tower)
    assert files.find_clip(broken) is None and files.find_clip(tower) is None
    (record,) = caplog.records
    assert str(broken) in record.getMessage()


def test_weights_are_fetched_to_a_place_and_resumed(hub, tmp_path):
    """A download that is ended midway goes on where it was, and appears only when it is whole."""
    path, reports = tmp_path / "ViT-H-14.safetensors", []
    Hub.content, Hub.asked = os.urandom(3_000_000), []
    hub(Hub)

    def cancel(done, total):
        reports.append((done, total))
        if done > 0:
            raise Ended

    with pytest.raises(Ended):
        fetch_weights("ViT-H-14", "laion2b_s32b_b79k", path, cancel)
    assert not path.exists() and reports[-1][1] == len(Hub.content)
    here = reports[-1][0]
    reports.clear()
    fetch_weights("ViT-H-14", "laion2b_s32b_b79k", path, lambda *report: reports.append(report))
    assert path.read_bytes() == Hub.content and list(tmp_path.iterdir()) == [path]
    assert Hub.asked == [0, here] and reports[-1] == (len(Hub.content), len(Hub.content))


def test_a_damaged_download_is_not_kept(hub, monkeypatch, tmp_path):
    hub(Hub)
    path = tmp_path / "ViT-H-14.safetensors"
    for tag, good in ((hashlib.sha256(Hub.content).hexdigest(), True), ("0" * 64, False)):
        monkeypatch.setattr(Hub, "etag", tag)
        if good:
            fetch_weights("ViT-H-14", "laion2b_s32b_b79k", path)
            path.unlink()
        else:
            with pytest.raises(OSError, match=r"arrived damaged"):
                fetch_weights("ViT-H-14", "laion2b_s32b_b79k", path)
        assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_two_downloads_of_one_file_do_not_destroy_each_other(hub, tmp_path):
    """The second waits, can be cancelled, and finds the file of the first."""
    path, wait = tmp_path / "ViT-H-14.safetensors", threading.Event()
    Hub.content, Hub.asked = os.urandom(3_000_000), []
    hub(Hub)

    def slow(done, total):
        assert wait.wait(60)

    def cancel(done, total):
        raise Ended

    fetch = partial(fetch_weights, "ViT-H-14", "laion2b_s32b_b79k", path)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(fetch, slow)
        while not list(tmp_path.glob(".*.part")):
            time.sleep(0.01)
        with pytest.raises(Ended):
            fetch(cancel)
        second = pool.submit(fetch)
        wait.set()
        assert first.result() == second.result() == path
    assert path.read_bytes() == Hub.content and Hub.asked == [0]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("tag", ["v1", "W/abc", "", "0" * 40])
def test_a_file_that_cannot_be_verified_is_not_downloaded(hub, monkeypatch, tmp_path, tag):
    hub(Hub)
    monkeypatch.setattr(Hub, "etag", tag or " ")
    Hub.asked = []
    with pytest.raises(OSError, match="no SHA-256"):
        fetch_weights("ViT-H-14", "laion2b_s32b_b79k", tmp_path / "a.safetensors")
    assert not Hub.asked and not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["{}", 'W/"{}"'])
def test_the_sha256_may_be_written_in_capitals_or_as_a_weak_tag(hub, monkeypatch, tmp_path, form):
    hub(Hub)
    digest = hashlib.sha256(Hub.content).hexdigest().upper()
    monkeypatch.setattr(Hub, "etag", form.format(digest).strip('"'))
    path = tmp_path / "a.safetensors"
    assert fetch_weights("ViT-H-14", "laion2b_s32b_b79k", path).read_bytes() == Hub.content


class EndlessHub(Hub):
    """Sends more than it announced."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(self.content)
            while True:
                self.wfile.write(bytes(1 << 20))


def test_a_download_ends_at_its_size(hub, tmp_path):
    hub(EndlessHub)
    path = fetch_weights("ViT-H-14", "laion2b_s32b_b79k", tmp_path / "a.safetensors")
    assert path.read_bytes() == Hub.content


@pytest.mark.parametrize(
    "address", ["http://example.org/a", "file:///etc/hostname", "ftp://localhost/a"]
)
def test_only_encrypted_addresses_are_downloaded_from(hub, monkeypatch, tmp_path, address):
    """As the place of the file, and as the end of a redirection."""
    hub(Hub)
    found = SimpleNamespace(etag="0" * 64, size=5, location=address)
    with monkeypatch.context() as patched:
        patched.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: found)
        with pytest.raises(OSError, match="is not https"):
            fetch_weights("ViT-H-14", "laion2b_s32b_b79k", tmp_path / "a.safetensors")

    class Elsewhere(Hub):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", address)
            self.end_headers()

    hub(Elsewhere)
    with pytest.raises(OSError, match=r"is not (https|allowed)"):
        fetch_weights("ViT-H-14", "laion2b_s32b_b79k", tmp_path / "a.safetensors")


def test_no_tensor_of_a_clip_stays_behind_when_its_module_moves(emoji_clip, tiny_clip):
    """Whoever moves the model to another device moves everything that is used in a step."""
    for clip in (emoji_clip, tiny_clip):
        for part in (clip, clip.text):
            tensors = {k for k, v in vars(part).items() if isinstance(v, torch.Tensor)}
            assert tensors <= {"vocabulary", "_cls"}, tensors
        assert clip.text._cls is None and clip.vocabulary.device.type == "cpu"


def test_the_image_tower_is_lent_for_as_long_as_it_is_used(tiny_clip):
    events = []

    @contextmanager
    def lend():
        events.append("lent")
        yield
        events.append("back")

    tiny_clip.image_tower = lend
    try:
        tiny_clip.encode_images([Image.new("RGB", (20, 20))] * 2)
        tiny_clip.encode_texts(["a"])
    finally:
        tiny_clip.image_tower = nullcontext
    assert events == ["lent", "back"]


def test_with_low_memory_the_image_tower_is_on_the_device_only_while_it_encodes(
    monkeypatch, emoji_clip
):
    clip = load_clip(device="meta", low_memory=True)  # a device that holds nothing
    assert clip.device.type == "meta"
    weights = dict(clip.model.named_parameters())
    for name, weight in weights.items():
        assert weight.device.type == ("cpu" if name.startswith("visual.") else "meta")

    clip, moves = load_clip(device="cpu", low_memory=True), []
    move = clip.model.visual.to
    monkeypatch.setattr(
        clip.model.visual, "to", lambda where: moves.append(str(where)) or move(where)
    )
    picture = load_image(EXAMPLES[0])
    features, expected = (one.encode_images([picture]) for one in (clip, emoji_clip))
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)
    assert moves == ["cpu", "cpu"]  # there and back
    with pytest.raises(OSError):
        clip.encode_images([Image.open(io.BytesIO(EXAMPLES[0].read_bytes()[:300]))])
    assert len(moves) % 2 == 0


def test_several_clips_have_low_memory_each(tmp_path):
    shutil.copytree(BUNDLED["emoji-clip"], tmp_path / "other")
    joint = load_clip(["emoji-clip", str(tmp_path / "other")], device="meta", low_memory=True)
    for part in joint.clips:
        assert next(part.model.visual.parameters()).device.type == "cpu"
        assert part.device.type == "meta"


def test_a_torch_that_may_run_code_of_a_file_reads_safetensors_only(
    architecture, weights, tmp_path, monkeypatch
):
    """open_clip reads a file again without `weights_only` where it raises a TypeError."""
    pickled = tmp_path / "open_clip_pytorch_model.bin"
    torch.save(make_model().state_dict(), pickled)
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.5.1+cu121"))
    load_clip(architecture, weights)
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (pickled, tmp_path / "open_clip_config.json"):
        shutil.copy(path, folder)
    for given in ((architecture, pickled), (folder, None)):
        with pytest.raises(ArgumentError, match=r"may run code with torch 2\.5\.1"):
            load_clip(*given)
