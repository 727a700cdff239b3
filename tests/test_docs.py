"""README and docs/: every block of code runs, with tiny models, and every link leads somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from dataclasses import dataclass
from types import MappingProxyType

import pytest
from conftest import ROOT

import pez_core

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "examples/ATTRIBUTION.md"]
LANGUAGES = ("python", "bash")
# .ci/run runs these two as they are printed.
MARKED = ("demo command", "test command")

# Files that the examples name, and drawings in their place.
FILES = {
    "photo.jpg": "noto-fish",
    "dog.png": "fxemoji-dog",
    "dog1.png": "fxemoji-dog",
    "dog2.png": "fxemoji-bird",
    "cat.png": "twemoji-cat-with-tears-of-joy",
    "a.jpg": "fxemoji-anchor",
    "b.jpg": "fxemoji-bird",
    "c.jpg": "fxemoji-dog",
    "photos/1.png": "noto-fish",
    "photos/more/2.png": "noto-glasses",
}
# Models and options that tests cannot afford, and what they run with.
SMALLER = {
    '["ViT-L-14:openai", "ViT-bigG-14:laion2b_s39b_b160k"]': '"emoji-clip"',
    '"ViT-L-14:openai"': '"emoji-clip"',
    "torch.bfloat16": "torch.float32",  # which CPUs compute faster
    '"cuda"': '"cpu"',
    "enable_model_cpu_offload()": 'enable_model_cpu_offload(device="cpu")',
    "pipe(image=": "pipe(height=32, width=32, image=",
    'load_clip("ViT-bigG-14:laion2b_s39b_b160k", download=True)': "neutral",
    "--time-limit 60": "--time-limit 0.1",
    "judge, num_images_per_prompt=4": "judge, num_images_per_prompt=4, height=32, width=32",
    "--images 4": "--images 1",
}
TINY = {"steps": 2, "swaps": 2, "trials": 2, "screened": 8}


@dataclass
class Block:
    """A block of code, and the comment above it."""

    language: str
    comment: str
    code: str


def blocks_of(page) -> list[Block]:
    """The blocks of a page in one of `LANGUAGES`."""
    pattern = r"(?:^<!-- (.*?) -->\n)?^( *)```(\w+)\n(.*?)^ *```$"
    found = re.findall(pattern, page.read_text(), re.S | re.M)
    return [Block(kind, comment, code) for comment, _, kind, code in found if kind in LANGUAGES]


def is_run(block: Block) -> bool:
    if block.comment.startswith("run if: "):
        return importlib.util.find_spec(block.comment.removeprefix("run if: ")) is not None
    return not block.comment.startswith("not run") and block.comment not in MARKED


RUN = [
    pytest.param(page, marks=() if page.stem == "README" else pytest.mark.slow, id=page.stem)
    for page in PAGES
    if any(map(is_run, blocks_of(page)))
]


@pytest.fixture
def tiny(monkeypatch):
    """All efforts as short as they can be."""
    from pez_core import options

    efforts = {
        name: type(effort)(**{**TINY, "swaps": min(effort.swaps, 2)})
        for name, effort in options.EFFORTS.items()
    }
    monkeypatch.setattr(options, "EFFORTS", MappingProxyType(efforts))


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with the files that examples name, the current one."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for name, drawing in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / f"examples/{drawing}.png", tmp_path / name)
    (tmp_path / "flavors.txt").write_text("red\na white dog\n# a comment\nsmall\nblue\n")
    captions = "prompt\na smiling yellow face with big eyes\na red hat on a small blue boat\n"
    (tmp_path / "captions.csv").write_text(captions)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def image_model(monkeypatch, tmp_path_factory):
    """A tiny `emoji-diffusion` in place of the bundled one."""
    if importlib.util.find_spec("diffusers") is None:
        return
    from tiny_diffusion import export_emoji_diffusion

    from pez_core.diffusion.image_models import BUNDLED

    folder = tmp_path_factory.mktemp("models") / "emoji-diffusion"
    export_emoji_diffusion(folder)
    model = BUNDLED["emoji-diffusion"]
    monkeypatch.setitem(
        BUNDLED, "emoji-diffusion", type(model)(folder, model.clip, {"num_inference_steps": 2})
    )


def make_tables(folder) -> None:
    """The table and the tar of docs/datasets.md."""
    import tarfile

    import pyarrow as pa
    import pyarrow.parquet as pq

    table = {"image": ["photo.jpg", "dog.png"], "prompt": ["a fish", "a dog"]}
    pq.write_table(pa.table(table), folder / "pairs.parquet")
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards/0.tar", "w") as tar:
        tar.add(folder / "photo.jpg", "a.jpg")


def run_python(code: str, scope: dict, folder) -> None:
    for name, make in tiny_models().items():
        if name in code:
            make().save_pretrained(folder / "model")
            code = code.replace(name, str(folder / "model"))
    for old, new in SMALLER.items():
        code = code.replace(old, new)
    exec(compile(code, "a block", "exec"), scope)


def tiny_models() -> dict:
    """Names of image models, and tiny ones in their place."""
    if importlib.util.find_spec("diffusers") is None:
        return {}
    from tiny_diffusion import flux, stable_diffusion, stable_diffusion_xl

    return {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": stable_diffusion,
        "stabilityai/stable-diffusion-xl-base-1.0": stable_diffusion_xl,
        "black-forest-labs/FLUX.1-schnell": flux,
    }


def run_bash(code: str, folder) -> None:
    """The `pez` commands of a block, in this process."""
    from pez_core.cli import main

    for old, new in SMALLER.items():
        code = code.replace(old, new)
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "pez", f"only `pez` commands are run: {line}"
        arguments = []
        for word in words[1:]:
            paths = sorted(folder.glob(word)) if "*" in word and "tar" not in word else []
            arguments += [str(path.relative_to(folder)) for path in paths] or [word]
        assert main(arguments) == 0, line


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", RUN)
def test_the_blocks_of_a_page_run(page, desk, tiny, tiny_clip, image_model, capsys):
    if page.stem == "datasets":
        make_tables(desk)
    scope: dict = {"neutral": tiny_clip}
    for block in filter(is_run, blocks_of(page)):
        capsys.readouterr()
        if block.language == "python":
            run_python(block.code, scope, desk)
        else:
            run_bash(block.code, desk)
        if "print(" in block.code or block.language == "bash":
            assert capsys.readouterr().out.strip()
    if page.stem in ("README", "diffusers"):
        assert (desk / "like-photo.png").exists()
    if page.stem == "diffusers":
        assert scope["found"].similarities.shape == (1, 4)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_block_that_is_not_run_has_a_reason(page):
    for block in blocks_of(page):
        if not is_run(block) and block.comment not in MARKED:
            assert re.match(r"(not run( here)?|run if): \S", block.comment), block.code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_options_of_commands_that_are_not_run_exist(page, capsys):
    from pez_core.cli import main

    for block in blocks_of(page):
        if block.language != "bash":
            continue
        for line in block.code.replace("\\\n", " ").splitlines():
            found = re.search(r"\bpez ((?:lm )?[a-z]+)\b(.*)", line.split(" #")[0])
            if found is None or found[1] in ("core",):
                continue
            with pytest.raises(SystemExit):
                main([*found[1].split(), "--help"])
            known = capsys.readouterr().out
            for option in re.findall(r"(?<= )--[a-z-]+", found[2].split(">")[0]):
                assert re.search(rf"{option}\b", known), f"{option} in {line}"


def test_there_is_an_example_for_each_image_model_and_the_table_names_them():
    page = ROOT / "docs/diffusers.md"
    blocks = [block.code for block in blocks_of(page)]
    for name in tiny_models():
        found = [code for code in blocks if name in code]
        assert found and all(6 <= len(code.strip().splitlines()) <= 13 for code in found)
    assert "| Stable Diffusion 2.1 |" in page.read_text() and "| Flux.1 |" in page.read_text()


def anchors(page) -> set[str]:
    """What a link to a heading of a page ends in."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.S | re.M)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"^ *```.*?^ *```|`[^`]*`", "", page.read_text(), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(file), target


def test_the_readme_is_short_and_has_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    for name in MARKED:
        assert len(re.findall(rf"<!-- {name} -->\n```bash\n.+\n```\n", text)) == 1


def test_the_api_page_names_every_public_function():
    page = (ROOT / "docs/python.md").read_text()
    named = set(re.findall(r"^::: pez_core\.(?:\w+\.)*(\w+)$", page, re.M))
    functions = {
        name
        for name in pez_core.__all__
        if not isinstance(getattr(pez_core, name), type) and callable(getattr(pez_core, name))
    }
    assert functions <= named
    assert all(hasattr(pez_core, name) for name in named)


def test_the_changelog_names_no_option_that_is_still_there():
    """A rename is finished: the old spelling is gone from every page but the changelog."""
    gone = r"--preset|--refine-steps|--held-out|--initial\b|pez concat|extract_style|refine_steps"
    for page in PAGES:
        assert not re.findall(gone, page.read_text()), page.name


def test_no_page_has_the_forbidden_patterns():
    """Some of the patterns of docs/contributing.md, which itself has them as examples."""
    forbidden = r"has its opinion|took no part|has nothing to say|is worth\b|flatters"
    for page in PAGES:
        if page.stem != "contributing":
            assert not re.findall(forbidden, page.read_text()), page.name
