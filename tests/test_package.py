"""What a user gets: a pack that imports anywhere, a package that carries its model."""

import json
import re
import subprocess
import sys

import pytest
from conftest import EXAMPLES, ROOT


def test_the_root_imports_without_comfyui():
    code = (
        "import importlib.util as u, sys; "
        f"s = u.spec_from_file_location('pez_pack', r'{ROOT / '__init__.py'}', "
        f"submodule_search_locations=[r'{ROOT}']); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); "
        "assert m.WEB_DIRECTORY == './web' and callable(m.comfy_entrypoint); "
        "assert not hasattr(m, 'NODE_CLASS_MAPPINGS'); "  # it would hide the entrypoint
        "assert not {'torch', 'comfy', 'nodes'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_core_needs_neither_comfyui_nor_diffusers_nor_transformers():
    code = (
        "import sys; sys.modules |= dict.fromkeys(['comfy', 'diffusers', 'transformers']); "
        "import pez_core; pez_core.load_clip('emoji-clip')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_requirements_pin_neither_torch_nor_numpy_and_match_the_package():
    requirements = (ROOT / "requirements.txt").read_text().split("\n")
    assert {"torch", "numpy"} <= set(requirements)
    listed = re.search(r"\ndependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S)
    needed = re.findall(r'"(.*?)"', listed[1])
    # the nodes search one queue at a time; `pez batch` alone writes datasets
    assert [n for n in needed if n not in ("filelock", "pyarrow")] == list(
        filter(None, requirements)
    )


def test_a_search_needs_neither_pyarrow_nor_filelock():
    code = (
        "import sys; sys.modules |= dict.fromkeys(['pyarrow', 'filelock']); "
        "import pez_core, pez_core.cli; pez_core.cli.main(['models'])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_bundled_model_is_small_and_says_what_it_reached():
    folder = ROOT / "pez_core/models/emoji-clip"
    assert (folder / "open_clip_model.safetensors").stat().st_size <= 25e6
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["zero_shot_top1_held_out_names"] >= 0.5
    assert (folder / "SOURCES.md").exists()


def test_open_clip_alone_can_load_the_bundled_model():
    import open_clip

    folder = ROOT / "pez_core/models/emoji-clip"
    model, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert prepare and model.context_length == 77


def test_there_are_enough_examples():
    index = list(map(json.loads, (ROOT / "examples/index.jsonl").open()))
    assert len(EXAMPLES) >= 24
    assert sorted(row["file"] for row in index) == [path.name for path in EXAMPLES]


def test_the_bundled_model_recognises_the_examples(emoji_clip):
    """Names of all the examples against their images, none of which it saw in training."""
    from pez_core.clip.images import load_image

    index = list(map(json.loads, (ROOT / "examples/index.jsonl").open()))
    images = emoji_clip.encode_images([load_image(ROOT / "examples" / r["file"]) for r in index])
    names = emoji_clip.encode_texts([row["name"] for row in index])
    best = (images @ names.T).argmax(1).tolist()
    assert sum(k == b for k, b in enumerate(best)) / len(index) >= 0.6


@pytest.mark.network
@pytest.mark.timeout(900)
def test_the_bundled_model_reaches_what_it_says(tmp_path):
    """Renders the held-out drawings anew and measures zero-shot accuracy on all of them."""
    done = subprocess.run(
        [sys.executable, ROOT / "tools/train_emoji_clip.py", "--evaluate", "--folder", tmp_path],
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(done.stdout)
    said = json.loads((ROOT / "pez_core/models/emoji-clip/metrics.json").read_text())
    assert measured["zero_shot_top1_held_out_names"] >= 0.5
    for name, value in measured.items():
        if isinstance(value, float):
            assert value == pytest.approx(said[name], abs=0.01)
