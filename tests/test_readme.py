"""The diffusers examples of the README, with tiny models in place of those that they name."""

import re

import pytest
from conftest import ROOT
from tiny_diffusion import flux, stable_diffusion, stable_diffusion_xl

SECTION = re.search(r"\n## diffusers\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.S)[1]
BLOCKS = re.findall(r"```python\n(.*?)```", SECTION, re.S)
MODELS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": stable_diffusion,
    "stabilityai/stable-diffusion-xl-base-1.0": stable_diffusion_xl,
    "black-forest-labs/FLUX.1-schnell": flux,
}
SMALLER = {
    '["ViT-L-14:openai", "ViT-bigG-14:laion2b_s39b_b160k"]': '"emoji-clip"',
    '"ViT-L-14:openai"': '"emoji-clip"',
    "torch.bfloat16": "torch.float32",  # which CPUs compute faster
    '"cuda"': '"cpu"',
    "enable_model_cpu_offload()": 'enable_model_cpu_offload(device="cpu")',
    '"photo.jpg"': f'"{ROOT}/examples/noto-fish.png"',
    '["a.jpg", "b.jpg", "c.jpg"]': f'sorted(Path("{ROOT}/examples").glob("fxemoji-*"))[:3]',
    "pipe(image=": "pipe(pez_steps=2, height=32, width=32, image=",
    'load_clip("ViT-bigG-14:laion2b_s39b_b160k", download=True)': "neutral",
}


def _made_small(code, tmp_path):
    for name, make in MODELS.items():
        if name in code:
            make().save_pretrained(tmp_path)
            code = code.replace(name, str(tmp_path))
    for old, new in SMALLER.items():
        code = code.replace(old, new)
    return "from pathlib import Path\n" + code


def test_there_is_an_example_for_each_model_and_the_table_names_them():
    assert [sum(name in block for block in BLOCKS) for name in MODELS] == [1, 1, 1]
    assert "| Stable Diffusion 2.1 |" in SECTION and "| Flux.1 |" in SECTION


@pytest.mark.parametrize("name", MODELS)
def test_the_examples_run(name, tmp_path, monkeypatch, capsys, tiny_clip):
    monkeypatch.chdir(tmp_path)
    (code,) = [block for block in BLOCKS if name in block]
    assert 6 <= len(code.strip().splitlines()) <= 13
    scope = {"neutral": tiny_clip}
    exec(_made_small(code, tmp_path / "model"), scope)
    assert capsys.readouterr().out.strip()
    (judging,) = [block for block in BLOCKS if "evaluate" in block]
    if name.startswith("stable-diffusion"):
        assert (tmp_path / "like-photo.png").exists()
        exec(_made_small(judging, tmp_path / "model"), scope)
        assert scope["found"].similarities.shape == (1, 4)
