"""What a user gets: a pack that imports anywhere, a package that carries its model."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile

import pytest
from conftest import EXAMPLES, ROOT

import pez_core
from pez_core.version import read_version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


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


def test_the_oldest_comfyui_is_the_same_for_the_registry_and_for_the_pack():
    text = (ROOT / "__init__.py").read_text()
    (oldest,) = re.findall(r'^OLDEST_COMFYUI = "(.*)"', text, re.M)
    assert PYPROJECT["tool"]["comfy"]["requires-comfyui"] == f">={oldest}"


@pytest.mark.slow
def test_the_core_needs_neither_comfyui_nor_diffusers_nor_transformers():
    code = (
        "import sys; sys.modules |= dict.fromkeys(['comfy', 'diffusers', 'transformers']); "
        "import pez_core; pez_core.load_clip('emoji-clip')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_requirements_pin_neither_torch_nor_numpy_and_match_the_package():
    """ComfyUI has a torch and a numpy of its own, which `pip install -r` must not replace."""
    requirements = (ROOT / "requirements.txt").read_text().split()
    assert {"torch", "numpy"} <= set(requirements)
    needed = PYPROJECT["project"]["dependencies"]
    assert [re.sub("^(torch|numpy)>=.*", r"\1", one) for one in needed] == requirements


@pytest.mark.slow
def test_a_search_needs_neither_pyarrow_nor_filelock():
    code = (
        "import sys; sys.modules |= dict.fromkeys(['pyarrow', 'filelock']); "
        "import pez_core; from pez_core.cli import main; main(['models'])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_batch_without_pyarrow_says_what_to_install():
    code = (
        "import sys; sys.modules |= {'pyarrow': None}; "
        "from pez_core.cli import main; sys.exit(main(['batch', 'a', 'b']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "install the extra `batch`" in done.stderr


def test_the_version_is_that_of_pyproject_in_a_clone_and_of_the_installer_elsewhere(tmp_path):
    version = PYPROJECT["project"]["version"]
    assert pez_core.__version__ == read_version() == version
    other = tmp_path / "pyproject.toml"
    other.write_text('[project]\nname = "pez-core"\nversion = "9.8.7"\n')
    assert read_version(other) == "9.8.7"
    other.write_text('[project]\nname = "something-else"\nversion = "1.0"\n')
    assert read_version(other) == read_version(tmp_path / "missing") != "1.0"
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heading[1] == version


def test_an_index_gets_absolute_links_once_the_repository_has_an_address():
    with_absolute_links = runpy.run_path(str(ROOT / "setup.py"))["with_absolute_links"]
    text = "![a](assets/a.png) [b](docs/b.md#c) [![d](e.png)](f.md) [g](https://h.org/i) [j](#k)"
    assert with_absolute_links(text, "https://forge.org/me/pez.git", "1.2") == (
        "![a](https://forge.org/me/pez/raw/v1.2/assets/a.png) "
        "[b](https://forge.org/me/pez/blob/v1.2/docs/b.md#c) "
        "[![d](https://forge.org/me/pez/raw/v1.2/e.png)](https://forge.org/me/pez/blob/v1.2/f.md) "
        "[g](https://h.org/i) [j](#k)"
    )
    readme = with_absolute_links((ROOT / "README.md").read_text(), "https://forge.org/p", "1")
    assert not re.findall(r"\]\((?!https?:|#)", readme)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, unpacked."""
    pytest.importorskip("setuptools", minversion="77", reason="install the extra `test` again")
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"  # a build writes into its tree
    ignored = shutil.ignore_patterns(".git", ".venv*", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (archive,) = folder.glob("pez_core-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_the_sdist_has_all_that_its_tests_read(sdist):
    assert (sdist / "pez_core/py.typed").exists()
    assert (sdist / "pez_core/models/emoji-clip/open_clip_model.safetensors").exists()
    assert not (sdist / "benchmarks/models").exists()
    for folder, kinds in {"tests": "*.py", "examples": "*.png", "docs": "*.md"}.items():
        names = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(kinds)}
        assert names == {str(path.relative_to(sdist)) for path in (sdist / folder).rglob(kinds)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/test_space.py", "tests/test_docs.py"],
        cwd=sdist,
        env=os.environ | {"PYTHONPATH": str(sdist), "PYTEST_ADDOPTS": "-k 'space or link_leads'"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_each_drawing_and_each_model_has_a_source():
    attribution = (ROOT / "examples/ATTRIBUTION.md").read_text()
    assert all(f"`{path.name}`" in attribution for path in EXAMPLES)
    notice = (ROOT / "NOTICE").read_text()
    models = ("pez_core/models/emoji-clip", "pez_core/models/emoji-diffusion")
    for folder in (*models, "benchmarks/models/emoji-clip-judge"):
        assert (ROOT / folder / "SOURCES.md").exists() and folder in notice


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
