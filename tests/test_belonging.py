"""A CLIP that does not belong to an image pipeline is named in a warning."""

import logging

import pytest
import torch
from conftest import EXAMPLES, make_clip
from tiny_diffusion import stable_diffusion, stable_diffusion_xl, text_config
from transformers import CLIPTextConfig, CLIPTextModel

from pez_core import JointClip, PezPipeline
from pez_core.cli.main import main
from pez_core.diffusion import make_gallery


def as_text_encoder(clip, layers=None, **config):
    """The text tower as transformers has it."""
    tower = clip.model
    blocks = list(tower.transformer.resblocks)[:layers]
    width = tower.token_embedding.weight.shape[1]
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            bos_token_id=49406,
            eos_token_id=49407,
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=blocks[0].attn.num_heads,
            num_hidden_layers=len(blocks),
            hidden_act="gelu",
            **config,
        )
    ).eval()
    inner = getattr(encoder, "text_model", encoder)
    inner.embeddings.token_embedding.weight.data = tower.token_embedding.weight.data
    inner.embeddings.position_embedding.weight.data = tower.positional_embedding.data
    for ours, theirs in zip(blocks, inner.encoder.layers, strict=True):
        attention = theirs.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        for k, projection in enumerate(projections):
            projection.weight.data = ours.attn.in_proj_weight.data.chunk(3)[k]
            projection.bias.data = ours.attn.in_proj_bias.data.chunk(3)[k]
        attention.out_proj.load_state_dict(ours.attn.out_proj.state_dict())
        theirs.layer_norm1.load_state_dict(ours.ln_1.state_dict())
        theirs.layer_norm2.load_state_dict(ours.ln_2.state_dict())
        theirs.mlp.fc1.load_state_dict(ours.mlp.c_fc.state_dict())
        theirs.mlp.fc2.load_state_dict(ours.mlp.c_proj.state_dict())
    return encoder


@pytest.fixture
def warnings_of(caplog):
    def warnings_of(clip, pipeline):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="pez_core.diffusion.belonging"):
            PezPipeline(clip, pipeline)
        return [r.getMessage() for r in caplog.records if r.name.endswith("belonging")]

    return warnings_of


@pytest.fixture(scope="module")
def clip():
    return make_clip()


@pytest.mark.parametrize("layers", [3, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_clip_of_the_pipeline_gives_no_warning(clip, layers, dtype, warnings_of):
    """Stable Diffusion 2 leaves the last block out."""
    pipeline = stable_diffusion()
    pipeline.register_modules(text_encoder=as_text_encoder(clip, layers).to(dtype))
    assert warnings_of(clip, pipeline) == []


def test_another_clip_gives_a_warning(clip, warnings_of, emoji_clip):
    pipeline = stable_diffusion()
    (warning,) = warnings_of(clip, pipeline)
    assert "tiny does not belong to this StableDiffusionPipeline" in warning
    assert "its `text_encoder` has a width of 16, not 32" in warning
    pipeline.register_modules(text_encoder=as_text_encoder(make_clip(seed=1)))
    (warning,) = warnings_of(clip, pipeline)
    assert "other hidden states (behind 0 of its blocks)" in warning
    # the same embeddings, and another last block
    other = as_text_encoder(clip)
    inner = getattr(other, "text_model", other)
    with torch.no_grad():
        inner.encoder.layers[-1].mlp.fc2.weight.normal_()
    pipeline.register_modules(text_encoder=other)
    (warning,) = warnings_of(clip, pipeline)
    assert "other hidden states (behind 3 of its blocks)" in warning
    config = text_config(32, 16)
    config.vocab_size = 49000
    config.eos_token_id = 48999
    pipeline.register_modules(text_encoder=CLIPTextModel(config))
    assert "a vocabulary of 49000 tokens, not 49408" in warnings_of(clip, pipeline)[0]


def test_a_gallery_and_the_command_warn(clip, caplog, monkeypatch, tmp_path, capsys):
    pipeline = stable_diffusion()
    make_gallery(pipeline, "a", "a fish", clip, num_inference_steps=1, num_images_per_prompt=1)
    assert "tiny does not belong to this StableDiffusionPipeline" in caplog.text
    pipeline.save_pretrained(tmp_path / "foreign")
    for pipeline, message in [
        (str(tmp_path / "foreign"), "pez: warning: emoji-clip does not belong to this"),
        ("emoji-diffusion", ""),
    ]:
        given = (
            f"invert {EXAMPLES[0]} --images 1 --num-inference-steps 1 --effort fast --prompt-len"
        )
        page = tmp_path / f"page{len(message)}"
        assert main([*given.split(), "2", "--pipeline", pipeline, "--page", str(page)]) == 0
        error = capsys.readouterr().err
        assert message in error and ("Name that with --clip." in error) == bool(message)


@pytest.mark.slow
def test_each_of_several_clips_is_compared_with_each_encoder(clip, warnings_of):
    pipeline, second = stable_diffusion_xl(), make_clip(seed=1)
    pipeline.register_modules(text_encoder_2=as_text_encoder(second))
    joint = JointClip([clip, second])
    (warning,) = warnings_of(joint, pipeline)
    assert warning.startswith("tiny does not belong")
    assert "`text_encoder` has a width" in warning and "`text_encoder_2` has other" in warning
    pipeline.register_modules(text_encoder=as_text_encoder(clip))
    assert warnings_of(joint, pipeline) == []


def test_all_ways_to_a_pipeline_compare(clip, caplog, tmp_path):
    pipeline = stable_diffusion()
    for make in (
        lambda: PezPipeline.from_pipe(pipeline, clip),
        lambda: PezPipeline.from_pretrained(tmp_path, clip=clip),
    ):
        caplog.clear()
        pez = make()
        assert [r for r in caplog.records if r.name.endswith("belonging")]
        if not list(tmp_path.iterdir()):
            pez.save_pretrained(tmp_path)
    caplog.clear()
    PezPipeline(clip)
    assert not [r for r in caplog.records if r.name.endswith("belonging")]
