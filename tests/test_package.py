"""What a user gets: a pack that imports anywhere, a package that carries its model."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from conftest import EXAMPLES, ROOT

import pez_core
from pez_core import installed
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


def _requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _asked_for(requirement: str, extras: str = "") -> set[str]:
    """What an installer looks at for a requirement: itself, and all that it asks for here."""
    seen, todo = set(), [requirement]
    while todo:
        name = re.split(r"[^\w.-]", todo.pop())[0].lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        try:
            todo += [one for one in requires(name) or [] if "extra ==" not in one]
        except PackageNotFoundError:
            continue  # for another system
    return seen


def test_requirements_never_lead_to_torch_torchvision_or_numpy():
    """ComfyUI has them of its own, of builds that fit each other."""
    assert {"torch", "torchvision", "numpy"} < _asked_for("open_clip_torch")  # the test finds them
    for requirement in _requirements():
        assert not {"torch", "torchvision", "numpy"} & _asked_for(requirement), requirement


def test_requirements_and_the_installer_give_all_that_the_package_needs():
    ours = {"torch", "numpy"}  # of ComfyUI
    given = {*_requirements(), installed.OPEN_CLIP} - {"ftfy", "regex"}
    needed = {one for one in PYPROJECT["project"]["dependencies"]}
    assert {one for one in needed if not one.startswith(tuple(ours))} == given
    # of what open_clip asks for, timm alone is left out: it has towers that plain CLIPs lack
    asked = {one for one in requires("open_clip_torch") if "extra ==" not in one}
    names = {re.split(r"[^\w-]", one)[0].lower().replace("-", "_") for one in asked}
    found = {re.split(r"[^\w-]", one)[0].lower().replace("-", "_") for one in _requirements()}
    assert names - found == {"torch", "torchvision", "timm"}


@pytest.mark.slow
def test_plain_clips_need_no_timm():
    """An older one may be there for another pack, and stays."""
    code = (
        "import sys; sys.modules['timm'] = None; import pez_core; "
        "assert pez_core.load_clip('emoji-clip').encode_texts(['a']).isfinite().all()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


PIP = [sys.executable, "-m", "pip", "install"]
UV = ["uv", "pip", "install", "--python"]


@pytest.mark.parametrize(
    "torch, wanted, build",
    [
        ("2.11.0", "torchvision==0.26.*", ""),
        ("2.6.0+cu124", "torchvision==0.21.*", "cu124"),
        ("2.13.0+cpu", "torchvision==0.28.*", "cpu"),
        ("3.0.1", "torchvision", ""),
    ],
)
def test_the_torchvision_is_that_of_the_torch(monkeypatch, torch, wanted, build):
    versions = {"torch": torch, "open_clip_torch": "3.3.0"}
    monkeypatch.setattr(installed, "_version", versions.get)
    by_uv = [sys.executable, "-m", *UV, sys.executable, "--torch-backend", build]
    expected = [[*PIP, "uv"], [*by_uv, "--no-deps", wanted]]
    if not build:
        expected = [[*PIP, "--no-deps", wanted]]
    assert installed.torchvision_commands(torch) == expected
    monkeypatch.setitem(sys.modules, "torchvision", None)
    requirements = Path("requirements.txt")
    assert installed.commands(requirements) == [[*PIP, "-r", str(requirements)], *expected]
    versions["torchvision"] = "0.1"  # of another build
    *_, last = installed.torchvision_commands(torch)
    assert last[-3:] == ["--no-deps", "--force-reinstall", wanted]
    del versions["torchvision"]
    monkeypatch.setattr(installed, "installer", lambda python: [*UV, python])
    (command,) = installed.torchvision_commands(torch, "python")
    backend = ["--torch-backend", build] if build else []
    assert command == [*UV, "python", *backend, "--no-deps", wanted]


def test_another_open_clip_is_replaced_and_torch_is_not_installed(monkeypatch):
    found = {"torch": "2.11.0", "open_clip_torch": "2.24"}
    monkeypatch.setattr(installed, "_version", found.get)
    wanted = [[*PIP, "-r", "a"], [*PIP, "--no-deps", installed.OPEN_CLIP]]
    assert installed.commands(Path("a")) == wanted
    monkeypatch.setattr(installed, "_version", lambda package: None)
    with pytest.raises(RuntimeError, match="torch is not installed"):
        installed.commands(Path("a"))


def test_what_is_missing_is_said_with_the_command(monkeypatch):
    assert installed.problem("THIS") == installed.torchvision_problem("THIS") == ""
    found = installed.find_spec
    monkeypatch.setattr(
        installed, "find_spec", lambda m: None if m in ("ftfy", "PIL") else found(m)
    )
    assert installed.problem("THIS") == "PEZ needs ftfy and PIL, not installed here: run THIS"
    monkeypatch.undo()
    monkeypatch.setattr(installed, "_version", lambda package: "2.24.0")
    assert installed.problem("THIS") == (
        "PEZ needs open_clip_torch>=3.3,<4, and 2.24.0 is installed here: run THIS"
    )


def test_a_torchvision_of_another_build_is_named(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator nms does not exist\\n')")
    code = "from pez_core import installed; print(installed.torchvision_problem('THIS'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.fullmatch(
        r"torchvision \S+ does not fit torch \S+ \(operator nms does not exist\): run THIS\n",
        done.stdout,
    )


def test_the_installer_runs_pip_or_uv_of_this_python(tmp_path):
    assert installed.installer() == PIP
    without = tmp_path / "python"
    without.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    without.chmod(0o755)
    assert installed.installer(str(without)) == [*UV, str(without)]


def test_the_templates_name_the_pack_that_they_need():
    paths = [*(ROOT / "example_workflows").glob("*.json")]
    assert paths
    for path in paths:
        for node in json.loads(path.read_text())["nodes"]:
            ours = node["type"].startswith("PEZ_")
            properties = node["properties"]
            assert properties["cnr_id"] == (
                PYPROJECT["project"]["name"] if ours else "comfy-core"
            ), path
            assert not ours or properties["ver"] == PYPROJECT["project"]["version"]


def test_the_registry_lacks_only_what_its_publisher_adds():
    project, comfy = PYPROJECT["project"], PYPROJECT["tool"]["comfy"]
    for name in ("name", "version", "description", "requires-python", "license", "classifiers"):
        assert project[name]
    assert comfy["DisplayName"] and comfy["requires-comfyui"]
    text = (ROOT / "docs/contributing.md").read_text()
    for left in ("PublisherId", "Icon", "Repository"):
        assert left not in comfy and left in text


def test_the_registry_gets_the_drawings_of_the_templates():
    """A pattern without a slash in front would match `web/examples` as well as `examples`."""
    patterns = (ROOT / ".comfyignore").read_text().split()
    assert "/examples/" in patterns and all(one.startswith("/") for one in patterns)


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


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_the_wheel_has_all_files_of_the_models(sdist, tmp_path):
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=sdist, check=True, capture_output=True)
    (archive,) = tmp_path.glob("pez_core-*.whl")
    with zipfile.ZipFile(archive) as wheel:
        found = {name for name in wheel.namelist() if name.startswith("pez_core/models/")}
    models = [path for path in (ROOT / "pez_core/models").rglob("*") if path.is_file()]
    assert found == {path.relative_to(ROOT).as_posix() for path in models}
    weights = {Path(name).parts[2:-1] for name in found if name.endswith(".safetensors")}
    parts = [("emoji-diffusion", part) for part in ("unet", "vae", "text_encoder")]
    assert weights == {("emoji-clip",), ("token-lm",), *parts}


def test_each_drawing_and_each_model_has_a_source():
    attribution = (ROOT / "examples/ATTRIBUTION.md").read_text()
    assert all(f"`{path.name}`" in attribution for path in EXAMPLES)
    notice = (ROOT / "NOTICE").read_text()
    models = [f"pez_core/models/{name}" for name in ("emoji-clip", "emoji-diffusion", "token-lm")]
    for folder in (*models, "benchmarks/models/emoji-clip-judge"):
        assert (ROOT / folder / "SOURCES.md").exists() and folder in notice


def test_the_licence_names_those_of_all_parts_in_the_package():
    notice, names = (ROOT / "NOTICE").read_text(), set()
    table = notice[notice.index("Part  ") : notice.index("examples/ATTRIBUTION.md")]
    for row in re.findall(r"^pez_core/\S+ +(.+(?:\n {37}\S.*)*)", table, re.M):
        names |= set(re.findall(r"Apache-2\.0|CC BY 4\.0|SCOWL(?=,)|WordNet 3\.0|MIT|GPL", row))
    assert len(names) == 4
    parts = PYPROJECT["project"]["license"].split(" AND ")
    assert {part.removeprefix("LicenseRef-") for part in parts} == {
        name.replace(" ", "-") for name in names
    }


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
