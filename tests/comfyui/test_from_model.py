"""PEZ CLIP from Model on real ComfyUI CLIPs, against ComfyUI's own encoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .inside import inside

HERE = Path(__file__).parent

# models of full width
pytestmark = pytest.mark.timeout(900)

# at the end of the path, since ComfyUI has modules of the same names as this folder
BEFORE = f"""
sys.path.append({str(HERE)!r})
import gc, weakref
import comfy.sd, comfy.weight_adapter
import folder_paths
from pathlib import Path
from own_models import *
from pez_pack.nodes import encoders, from_model, memory, models
from pez_pack.pez_core import distill, fuse, invert, load_clip
models.register_folder()
cpu = torch.device("cpu")
TEXT = "a red fish at night"
unit = lambda x: torch.nn.functional.normalize(x.float(), dim=-1)

def pooled(clip, text):
    return unit(clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)[1][0])

def refused(call, *given):
    try:
        call(*given)
    except ValueError as error:
        return str(error)

def state(clip):
    patcher = clip.patcher
    tensors = patcher.model.state_dict().items()
    kept = [(name, t.clone(), t.data_ptr(), t.dtype, t.device) for name, t in tensors]
    return kept, patcher.patches_uuid, len(patcher.backup), sorted(patcher.pinned)

def unchanged(before, after):
    same = [
        a[0] == b[0] and torch.equal(a[1], b[1]) and a[2:] == b[2:]
        for a, b in zip(before[0], after[0], strict=True)
    ]
    return all(same) and before[1:] == after[1:]
"""


def run(code: str) -> Any:
    indented = "\n".join(f"    {line}" for line in code.strip().splitlines())
    return inside(f"{BEFORE}\nwith torch.inference_mode():\n{indented}", timeout=850)


def test_the_emoji_models_own_clip_gives_the_prompts_of_load_clip():
    """The trained text tower of the demo model, whose projection is in the bundled file."""
    line, ours, theirs, image, encoded, mixed, expected = run(
        """
clip = load_clip("emoji-clip", device="cpu")
loaded = memory.LoadedClip(clip, cpu, cpu)
image = picture("noto-fish")
searches = [
    lambda clip, options: distill(clip, LONG, options),
    lambda clip, options: fuse(clip, ["a red bird", "the sea"], options, always_learn=True),
]
def found(value, run):
    result = value.search(run, QUICK)
    return [result.prompt, result.similarity]
value, line = execute(emoji_clip())
ours, theirs = [[found(one, run) for run in searches] for one in (value, loaded)]
vision = ImageTower(clip)
with_images = execute(emoji_clip(), vision)[0]
def learn(value, *images):
    node = nodes.ImageToPrompt.PREPARE_CLASS_CLONE(None)
    given = dict(effort="paper", steps=5, prompt_len=3, restarts=1, clip=value)
    outputs = node.execute(images=list(images), **{k: [v] for k, v in given.items()}).args
    return [outputs[0], outputs[1]]
output = vision.encode_image(image)
answer([
    line, ours, theirs, learn(with_images, image), learn(with_images, output),
    learn(with_images, output, picture("fxemoji-dog")),
    learn(loaded, image, picture("fxemoji-dog")),
])
"""
    )
    assert line == "Searched: clip_l, for texts alone (for images connect clip_vision)."
    for (prompt, similarity), (same, expected_similarity) in zip(ours, theirs, strict=True):
        assert prompt == same and similarity == pytest.approx(expected_similarity, abs=1e-5)
    prompts, similarities = expected
    assert image[0] == encoded[0] == prompts[:1] and mixed[0] == prompts
    assert image[1] == pytest.approx(similarities[:1], abs=1e-5)
    assert encoded[1] == pytest.approx(similarities[:1], abs=1e-5)
    assert mixed[1] == pytest.approx(similarities, abs=1e-5)


def test_sdxl_is_searched_as_comfyui_encodes_it_and_stays_as_it_is():
    lines, similarity, judged, target, same, gone, apart, messages = run(
        """
clip, images = sdxl(), vision(1280)
value, line = execute(clip, images)
before = state(clip), state(images)
image = picture("noto-fish")
models_seen = []
def learn(model, options):
    models_seen.append(weakref.ref(model.model))
    return invert(model, list(image), options)[0]
result = value.search(learn, STEPS)
feature = unit(images.encode_image(image)["image_embeds"][0])
target = float(feature @ pooled(clip, result.prompt))
same = [unchanged(a, b) for a, b in zip(before, (state(clip), state(images)), strict=True)]
gc.collect()
gone = models_seen[0]() is None
texts, both = execute(clip)
result_of_texts = texts.search(lambda model, options: distill(model, LONG, options), STEPS)
raw = clip.cond_stage_model.clip_l
def of_l(text):
    raw.return_projected_pooled = False
    tokens = clip.tokenize(text)["l"]
    return unit(raw.encode_token_weights(tokens)[1][0])
short = result_of_texts.prompt
apart = [
    [result_of_texts.encoders["clip_g"], float(pooled(clip, LONG) @ pooled(clip, short))],
    [result_of_texts.encoders["clip_l"], float(of_l(LONG) @ of_l(short))],
]
messages = [
    refused(texts.search, lambda model, options: invert(model, list(image), options), STEPS),
    refused(execute, clip, vision(768)),
    refused(execute, clip, vision(0)),  # as SigLIP
]
answer([[line, both], result.similarity, target, len(models_seen), same, gone, apart, messages])
"""
    )
    line, both = lines
    assert line.startswith("Searched: clip_g. Left out: clip_l (no file here has its text proj")
    assert "a whole ViT-L/14 such as clip-vit-large-patch14 (1.71 GB)" in line
    assert both == "Searched: clip_l, clip_g, for texts alone (for images connect clip_vision)."
    assert similarity == pytest.approx(judged, abs=1e-5) and target == 1
    assert same == [True, True] and gone
    for reported, expected in apart:
        assert reported == pytest.approx(expected, abs=1e-5)
    of_images, width, kind = messages
    assert "`clip` is clip_l without an image encoder" in of_images and "`clip_vision`" in of_images
    assert "clip_g (its CLIP_VISION is not connected: clip_vision_g" in width
    assert "CLIP_VISION 1 (no encoder has 768 features)" in width
    assert "CLIP_VISION 1 (its features cannot be compared)" in kind


def test_a_lora_counts_with_its_strength_whether_it_is_loaded_or_not():
    moved, errors, same, plain, backup = run(
        """
clip, images = sdxl(), vision(1280)
tuned, weak = clip.clone(), clip.clone()
generator = torch.Generator().manual_seed(1)
up, down = (torch.randn(*s, generator=generator) * 0.1 for s in ((5120, 4), (4, 1280)))
lora = comfy.weight_adapter.LoRAAdapter(set(), (up, down, 4.0, None, None, None))
key = "clip_g.transformer.text_model.encoder.layers.1.mlp.fc1.weight"
tuned.add_patches({key: lora}, 0.7)
weak.add_patches({key: lora}, 0.1)
def feature(clip):
    with execute(clip, images)[0].in_use() as model:
        return model.encode_texts([TEXT])[0].clone()
before = state(tuned)
first, weakly, none = feature(tuned), feature(weak), feature(clip)
same = unchanged(before, state(tuned))
expected = pooled(tuned, TEXT)  # from here on ComfyUI has loaded the patched weights
errors = [(feature(tuned) - expected).abs().max().item(), (first - expected).abs().max().item()]
backup = len(tuned.patcher.backup)
plain = [(feature(clip) - none).abs().max().item(), (feature(weak) - weakly).abs().max().item()]
answer([[float(first @ none), float(weakly @ none)], errors, same, plain, backup])
"""
    )
    assert moved[0] < 0.998 < moved[1] < 0.99999
    assert max(errors) < 1e-5 and max(plain) < 1e-6
    assert same and backup == 1


def test_the_projection_of_a_files_encoder_is_judged_by_the_file():
    """A CLIP-L of full size in ComfyUI's own loader, whose projection is memory or in the file."""
    lines, equal, trained = run(
        """
from safetensors.torch import save_file
from tempfile import mkdtemp
folder = Path(mkdtemp())
generator = torch.Generator().manual_seed(2)
def draw(*shape):
    return (torch.randn(*shape, generator=generator) * 0.05).half()
tower = {"embeddings.token_embedding.weight": draw(49408, 768),
         "embeddings.position_embedding.weight": draw(77, 768)}
shapes = {"self_attn.q_proj": (768, 768), "self_attn.k_proj": (768, 768),
          "self_attn.v_proj": (768, 768), "self_attn.out_proj": (768, 768),
          "mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}
for k in range(12):
    for name, shape in shapes.items():
        tower[f"encoder.layers.{k}.{name}.weight"] = draw(*shape)
        tower[f"encoder.layers.{k}.{name}.bias"] = draw(shape[0])
    for name in ("layer_norm1", "layer_norm2"):
        tower[f"encoder.layers.{k}.{name}.weight"] = torch.ones(768).half()
        tower[f"encoder.layers.{k}.{name}.bias"] = draw(768)
tower["final_layer_norm.weight"] = torch.ones(768).half()
tower["final_layer_norm.bias"] = draw(768)
bare = {f"text_model.{name}": tensor for name, tensor in tower.items()}
projection = draw(768, 768)
save_file(bare, folder / "bare.safetensors")
save_file(bare | {"text_projection.weight": projection}, folder / "whole.safetensors")
def load(name, junk=None):
    clip = comfy.sd.load_clip([str(folder / name)])
    if junk is not None:  # what memory may hold: weights of another model
        weight = clip.cond_stage_model.clip_l.transformer.text_projection.weight
        weight.data.copy_(junk)
    return clip
images = vision(768)
junk = draw(768, 768)
lines = [
    refused(execute, load("bare.safetensors", junk), images),
    execute(load("whole.safetensors"), images)[1],
    refused(execute, load("whole.safetensors", junk), images),
]
unknown = load("whole.safetensors")
unknown.patcher.cached_patcher_init = None
lines.append(refused(execute, unknown, images))
# mended by another file among the models: a tower that was trained a little further, any layout
donor = {"token_embedding.weight": tower["embeddings.token_embedding.weight"]
         + 0.1 * draw(49408, 768), "text_projection": projection.T.contiguous()}
folder_paths.add_model_folder_path("clip_vision", str(folder / "donors"))
(folder / "donors").mkdir()
save_file(donor, folder / "donors/vit-l.safetensors")
folder_paths.filename_list_cache.clear()
value, line = execute(load("bare.safetensors", junk), images)
lines.append(line)
own, _ = execute(load("whole.safetensors"), images)
with value.in_use() as model:
    mended = model.encode_texts([TEXT])[0].clone()
with own.in_use() as model:
    equal = float((model.encode_texts([TEXT])[0] - mended).abs().max())
clip = load("whole.safetensors")
clip.cond_stage_model.clip_l.return_projected_pooled = True
clip.cond_stage_model.clip_l.options_default = ("last", None, True)
answer([lines, equal, float((pooled(clip, TEXT) - mended).abs().max())])
"""
    )
    without, own, swapped, unknown, mended = lines
    for line in (without, swapped, unknown):
        assert "no file here has its text projection" in line
    assert own == mended == "Searched: clip_l."
    assert equal < 1e-6 and trained < 1e-5


def test_models_of_all_kinds_are_told_apart():
    lines, depths = run(
        """
import comfy.text_encoders.flux as flux
import comfy.text_encoders.sd2_clip as sd2
import comfy.text_encoders.sd3_clip as sd3
clip = comfy_clip(sd2.SD2Tokenizer, sd2.SD2ClipModel)
lines = [execute(clip)[1], refused(execute, clip, vision(1024))]
# a file of SD 2.x without the last layer, in whose place there is memory
from tempfile import mkdtemp
from safetensors.torch import save_file
path = Path(mkdtemp()) / "h.safetensors"
inner = clip.cond_stage_model.clip_h.transformer.text_model.state_dict()
short = {name: t for name, t in inner.items() if "layers.2." not in name}
def load(tensors):
    named = {f"cond_stage_model.model.text_model.{n}": t.half() for n, t in tensors.items()}
    save_file({n: t for n, t in named.items() if "mlp.fc1" in n or "token" in n}, path)
    clip.patcher.cached_patcher_init = (None, ([str(path)],))
load(inner)
lines.append(execute(clip)[1])
load(short)
lines.append(refused(execute, clip))
clip.patcher.cached_patcher_init = None
layers = clip.cond_stage_model.clip_h.transformer.text_model.encoder.layers
layers[2].mlp.fc1.weight.data.zero_()
lines.append(refused(execute, clip))
with torch.device("meta"):  # of full size: T5 has 19 GB
    model = flux.flux_clip()(device="meta", dtype=torch.float16)
    many = sd3.SD3ClipModel(device="meta", dtype=torch.float16)
for one in (model, many):
    found, others = encoders.text_encoders(SimpleNamespace(cond_stage_model=one))
    lines.append([[e.name for e in found], [e.width for e in found], others])
depths = [len(one.model.text_model.encoder.layers) for one in found]
other = SimpleNamespace(cond_stage_model=torch.nn.ModuleDict({"t5xxl": torch.nn.Linear(2, 2)}))
lines.append(refused(from_model.choose, other, []))
answer([lines, depths])
"""
    )
    h, h_refused, h_whole, *cut, flux, sd3, nothing = lines
    assert h_whole == h and len(cut) == 2
    for line in cut:
        assert "clip_h (its file lacks its last layer; use PEZ Load CLIP)" in line
    assert h == "Searched: clip_h, for texts alone (for images connect clip_vision)."
    assert "clip_h (no file here has its text projection)" in h_refused
    assert flux == [["clip_l"], [768], ["t5xxl"]]
    assert sd3 == [["clip_l", "clip_g"], [768, 1280], ["t5xxl"]] and depths == [12, 32]
    assert "t5xxl (no CLIP)" in nothing and "plain sentences" in nothing


def test_encoded_images_and_texts_stand_where_images_do():
    fused, scored, texts, wrong = run(
        """
clip = load_clip("emoji-clip", device="cpu")
vision, image = ImageTower(clip), picture("noto-fish")
value = execute(emoji_clip(), vision)[0]
alone = execute(emoji_clip())[0]
output = vision.encode_image(image)
def call(node, **given):
    here = node.PREPARE_CLASS_CLONE(None)
    return here.execute(**{name: [one] for name, one in given.items()}).args
short = dict(effort="paper", steps=3, prompt_len=3, always_learn=True, prompt_1="a red car")
fused = [call(nodes.FusePrompts, clip=value, images_1=one, **short)[0] for one in (image, output)]
given = dict(clip=value, text="red fish")
scored = [call(nodes.ScorePrompt, images=one, **given)[1] for one in (image, output)]
texts = call(nodes.ScorePrompt, clip=alone, text="red fish", target="a fish\\na red bird")[1]
expected = clip.encode_texts(["red fish", "a fish", "a red bird"])
texts = [texts[0], float((expected[:1] @ expected[1:].T).mean())]
tokens = vision.encode_image(image)
tokens["image_embeds"] = tokens["image_embeds"][None]
other = vision.encode_image(image)
other["image_embeds"] = torch.ones(1, 7)
wrong = [
    refused(lambda: call(nodes.ScorePrompt, images=tokens, **given)),
    refused(lambda: call(nodes.ScorePrompt, images=other, **given)),
    refused(lambda: call(nodes.ScorePrompt, **given)),
]
answer([fused, scored, texts, wrong])
"""
    )
    assert fused[0] == fused[1] and scored[0] == pytest.approx(scored[1], abs=1e-6)
    assert texts[0] == pytest.approx(texts[1], abs=1e-6)
    assert "`images` has a CLIP_VISION_OUTPUT that was not made by a CLIP" in wrong[0]
    assert "`images` holds an encoded image of 7 numbers" in wrong[1]
    assert wrong[2] == "`images` is not connected; connect one, or write a `target`."
