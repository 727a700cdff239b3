"""PezClipModel: every kind of CLIP comes back from disk as it was."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import open_clip
import pytest
import torch
from conftest import EXAMPLES, ROOT, TEXT, VISION, CustomTextCLIP, make_clip

from pez_core import Clip, JointClip, PezPipeline, SearchOptions, invert, load_clip
from pez_core.clip.build import from_config, saved_config
from pez_core.clip.images import load_image
from pez_core.clip.models import BUNDLED
from pez_core.diffusion import PezClipModel
from pez_core.errors import ArgumentError

TOKENS = {"output_tokens": True}
TEXTS = ["a red cat", "blue fish at night"]


def _close(a, b):
    # where weights lie in memory decides how they round
    return a.shape == b.shape and (a - b).abs().max() < 1e-5


def _built(size=16, **model_cfg):
    """A CLIP with random weights from a config."""
    config = {"model_cfg": {"embed_dim": 16, "custom_text": True, **model_cfg}, "tokenizer": None}
    preprocess = {**open_clip.transform.PreprocessCfg().__dict__, "size": size}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, tokenizer = from_config(config, preprocess)
    return Clip(model, tokenizer, "tiny", range(320, 400), config)


def _coca():
    """Its text tower appends a parameter of its own to the token embeddings."""
    return _built(
        vision_cfg=VISION | {"attentional_pool": True, "attn_pooler_heads": 2, **TOKENS},
        text_cfg=TEXT | {"context_length": 76, "embed_cls": True, **TOKENS},
        multimodal_cfg=TEXT | {"context_length": 76, "heads": 2, "attn_pooler_heads": 2},
    )


def _kinds():
    return {
        "plain": lambda: make_clip(),
        "quick": lambda: make_clip(quick_gelu=True),
        "custom": lambda: make_clip(CustomTextCLIP),
        "no mask": lambda: make_clip(CustomTextCLIP, {"no_causal_mask": True, "pool_type": "last"}),
        "coca": _coca,
        "short": lambda: make_clip(text={"context_length": 32}),
        "two": lambda: JointClip([load_clip("emoji-clip", device="cpu"), make_clip()], [3, 1]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", _kinds())
def test_saved_and_loaded_again(kind, tmp_path):
    clip = _kinds()[kind]()
    model = PezClipModel.from_clip(clip)
    model.save_pretrained(tmp_path)
    loaded = PezClipModel.from_pretrained(tmp_path)
    pictures = [load_image(path) for path in EXAMPLES[:2]]
    for other in (model.clip, loaded.clip):
        assert _close(other.encode_texts(TEXTS), clip.encode_texts(TEXTS))
        assert _close(other.encode_images(pictures), clip.encode_images(pictures))
        assert torch.equal(other.vocabulary, clip.vocabulary)
        assert other.trained_tokens == clip.trained_tokens
        assert other.text.parts == clip.text.parts and other.name == clip.name
    options = SearchOptions(prompt_len=3, swaps=0, steps=5)
    (expected,) = invert(clip, EXAMPLES[0], options)
    (result,) = loaded(lambda one: invert(one, EXAMPLES[0], options))
    assert result.prompt == expected.prompt


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["coca", "short", "no mask"])
def test_a_pipeline_searches_on_it(kind):
    clip = _kinds()[kind]()
    options = SearchOptions(prompt_len=2, effort="fast", steps=2, swaps=2)
    pez = PezPipeline(clip)
    pez.set_progress_bar_config(disable=True)
    pez(image=EXAMPLES[0], options=options)
    assert pez.prompts == [invert(clip, EXAMPLES[0], options)[0].prompt]
    # weights that are replaced, as by loading, are those of the search
    with torch.no_grad():
        state = {name: w.clone() for name, w in clip.model.state_dict().items()}
    text = next((name for name in state if name.endswith("cls_emb")), None)
    if text:
        state[text] += 1
        clip.model.load_state_dict(state, assign=True)
        ids = clip.vocabulary[None, :2]
        ours = torch.nn.functional.normalize(clip.text(clip.text.token_embedding[ids]), dim=-1)
        assert _close(ours, clip.encode_texts([clip.text.words.decode(ids[0].tolist())]))


def test_the_folder_holds_safetensors_and_readable_json(tmp_path):
    PezClipModel.from_clip(make_clip(quick_gelu=True)).save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["towers"][0]["config"]["model_cfg"]["quick_gelu"] is True


def test_wrapping_shares_weights_and_changes_nothing():
    clip = make_clip()
    weight = clip.model.token_embedding.weight
    model = PezClipModel.from_clip(clip)
    assert model.models[0].token_embedding.weight.data_ptr() == weight.data_ptr()
    model.to(torch.float64)
    assert clip.model.token_embedding.weight is weight and weight.dtype == torch.float32
    assert weight.requires_grad and not any(w.requires_grad for w in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-B-16-SigLIP", "coca_ViT-B-32"])
def test_what_open_clip_knows_by_name_is_built_alike(name):
    """Names and shapes of all weights, without the weights."""
    from open_clip.factory import get_model_config

    theirs = open_clip.create_model(name, load_weights=False, device="meta")
    config = saved_config(get_model_config(name))
    with torch.device("meta"):
        ours, _ = from_config(config, theirs.visual.preprocess_cfg)
    assert type(ours) is type(theirs)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_a_folder_is_known_by_its_config(tmp_path):
    for path in BUNDLED["emoji-clip"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = PezClipModel.from_clip(load_clip(str(tmp_path), device="cpu"))
    assert model.config.towers[0]["config"]["model_cfg"]["embed_dim"] == 256
    assert model.clip.trained_tokens == load_clip("emoji-clip", device="cpu").trained_tokens


def test_a_clip_without_config_is_refused():
    clip = make_clip()
    clip.config = None
    with pytest.raises(ArgumentError, match="`clip` has no `config`: tiny was built by hand"):
        PezClipModel.from_clip(clip)


@pytest.mark.slow
def test_image_towers_of_timm_compute_while_they_are_built(tmp_path):
    """ViTamin's does, which fails on weights that are not there yet."""
    vision = {
        "timm_model_name": "vitamin_small_224",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": 224,
    }
    clip = _built(224, vision_cfg=vision, text_cfg=dict(TEXT))
    PezClipModel.from_clip(clip).save_pretrained(tmp_path)
    loaded = PezClipModel.from_pretrained(tmp_path)
    pictures = [load_image(path) for path in EXAMPLES[:2]]
    assert _close(loaded.clip.encode_images(pictures), clip.encode_images(pictures))


# Models of strangers.


def _stranger(folder, tokenizer):
    """A saved CLIP whose config names another tokenizer."""
    PezClipModel.from_clip(make_clip()).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["towers"][0]["config"]["tokenizer"] = tokenizer
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _with_code(folder, marker):
    """A folder with a tokenizer whose code leaves a marker when it runs."""
    folder.mkdir()
    text = dict(TEXT) | {
        "hf_tokenizer_name": "theirs",
        "tokenizer_kwargs": {"trust_remote_code": True},
    }
    model_cfg = {"embed_dim": 16, "vision_cfg": dict(VISION), "text_cfg": text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}))
    auto = {"auto_map": {"AutoTokenizer": ["theirs.Theirs", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(auto))
    (folder / "theirs.py").write_text(f"open({str(marker)!r}, 'w')\nclass Theirs: pass\n")
    return folder


def test_code_that_a_config_names_is_not_run(tmp_path):
    marker = tmp_path / "marker"
    code = _with_code(tmp_path / "code", marker)
    folder = _stranger(tmp_path / "clip", f"local-dir:{code}")
    with pytest.raises(ArgumentError, match="names the tokenizer 'local-dir:"):
        PezClipModel.from_pretrained(folder)
    (tmp_path / "model_index.json").write_text(
        json.dumps(
            {
                "_class_name": "PezPipeline",
                "clip": ["pez_core.diffusion.clip_model", "PezClipModel"],
                "pipeline": [None, None],
            }
        )
    )
    with pytest.raises(ArgumentError, match="names the tokenizer 'local-dir:"):
        PezPipeline.from_pretrained(tmp_path)
    assert not marker.exists()
    # it would have run
    with contextlib.suppress(Exception):
        open_clip.get_tokenizer(f"local-dir:{code}")
    assert marker.exists()


@pytest.mark.slow
def test_a_config_does_not_reach_the_network(tmp_path):
    folder = _stranger(tmp_path / "clip", "hf-hub:stranger/repository")
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "import sys, contextlib\n"
        "from pez_core.diffusion import PezClipModel\n"
        "with contextlib.suppress(Exception):\n"
        "    PezClipModel.from_pretrained(sys.argv[1])\n"
        "print('before')\n"
        "import open_clip\n"
        "with contextlib.suppress(Exception):\n"
        "    open_clip.get_tokenizer('hf-hub:stranger/repository')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ
        | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
        },
    )
    assert process.stdout.readline() == "before\n" and asked == []
    process.communicate()
    server.shutdown()
    assert any("stranger/repository" in path for path in asked)  # it would have


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"towers": 3},
        {"towers": [{"config": {}}]},
        {"towers": [{"config": {"model_cfg": {"vision_cfg": {}, "text_cfg": {}}}}]},
    ],
)
def test_a_damaged_config_is_named(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "PezClipModel"}))
    with pytest.raises(ArgumentError, match=r"config\.json is not that of a PezClipModel"):
        PezClipModel.from_pretrained(tmp_path)
