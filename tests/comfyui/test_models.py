"""Models from ComfyUI's own folders, and downloads into them."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from .inside import inside
from .server import Client, ComfyServer

NODES = {
    "fish": {"class_type": "LoadImage", "inputs": {"image": "noto-fish.png"}},
    "pez": {
        "class_type": "PEZ_ImageToPrompt",
        "inputs": {"clip": ["clip", 0], "images": ["fish", 0], "prompt_len": 3,
                   "preset": "paper (by steps)", "steps": 3, "restarts": 1, "seed": 0},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights of the smallest plain CLIP that open_clip knows, in half precision."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model("ViT-S-32-alt")
    return {name: tensor.half() for name, tensor in model.state_dict().items()}


@pytest.fixture
def files(server: ComfyServer, small: dict[str, torch.Tensor]) -> Iterator[Path]:
    """A whole CLIP beside an image tower alone, as artists have them in `models/clip_vision`."""
    folder = server.folder / "models/clip_vision"
    folder.mkdir(parents=True, exist_ok=True)
    whole, half = folder / "whole-clip.safetensors", folder / "image-tower.safetensors"
    save_file(small, whole)
    save_file({k: t for k, t in small.items() if k.startswith("visual.")}, half)
    yield whole
    whole.unlink()
    half.unlink()


def options(client: Client) -> list[str]:
    return client.object_info("PEZ_LoadCLIP")["input"]["required"]["model"][1]["options"]


def test_a_file_with_both_towers_is_offered_and_works(client: Client, files: Path):
    assert [o for o in options(client) if "/" in o and ".safetensors" in o] == [
        "clip_vision/whole-clip.safetensors"
    ]
    clip = {"model": "clip_vision/whole-clip.safetensors", "download": False}
    run = client.run(NODES | {"clip": {"class_type": "PEZ_LoadCLIP", "inputs": clip}})
    assert run.status == "success", run.error

    clip["model"] = "clip_vision/image-tower.safetensors"
    run = client.run(NODES | {"clip": {"class_type": "PEZ_LoadCLIP", "inputs": clip}})
    assert "holds an image encoder alone" in run.error["exception_message"]


class Hub(BaseHTTPRequestHandler):
    """The part of the Hugging Face Hub that serves a file, which breaks off once."""

    content, breaks = b"", 1

    def _head(self, length: int, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(self.content).hexdigest()}"')
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def do_HEAD(self) -> None:
        self._head(len(self.content))

    def do_GET(self) -> None:
        if "/resolve/" not in self.path:  # what the hub's own client asks about itself
            self.send_error(404)
            return
        start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self._head(len(self.content) - start, 206)
        stop = len(self.content)
        if Hub.breaks:
            Hub.breaks -= 1
            stop //= 2
            self.close_connection = True
        self.wfile.write(self.content[start:stop])

    def log_message(self, *arguments: object) -> None:
        pass


def test_a_preset_is_downloaded_only_when_asked(
    small: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Into models/pez, with progress, going on where the connection broke, then found there."""
    save_file(small, tmp_path / "served.safetensors")
    Hub.content = (tmp_path / "served.safetensors").read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    folder = tmp_path / "models"
    folder.mkdir()
    try:
        refused, unasked, asked_nothing, reports, files, name = inside(
            f"""
import folder_paths, open_clip
folder_paths.models_dir = {str(folder)!r}
from pez_pack.nodes import models
models.register_folder()
models.PRESETS["small"] = [models.Weights("ViT-S-32-alt", "a_tag")]
open_clip.pretrained._PRETRAINED["ViT-S-32-alt"] = {{
    "a_tag": open_clip.pretrained._pcfg(hf_hub="someone/small/")
}}
try:
    models.load("small", False, device="cpu")
except ValueError as error:
    refused = str(error)
reports = []
progress = lambda done, total: reports.append([done, total])
from pez_pack.nodes import consent
try:
    models.load("small", True, progress, device="cpu")
except ValueError as error:
    unasked = str(error)
asked_nothing = not reports
consent.agree("small")
models.load("small", True, progress, device="cpu")
count = len(reports)
clip = models.load("small", False, progress, device="cpu")
assert len(reports) == count
import os
listed = sorted(os.listdir({str(folder / "pez")!r}))
answer([refused, unasked, asked_nothing, reports[-1], listed, clip.name])
"""
        )
    finally:
        server.shutdown()
    assert "Turn on `download`" in refused and "ViT-S-32-alt.a_tag.safetensors" in refused
    assert reports == [len(Hub.content)] * 2 and Hub.breaks == 0
    assert "by hand" in unasked and asked_nothing
    assert (
        files == ["ViT-S-32-alt.a_tag.safetensors", "downloads.json"]
        and name == "ViT-S-32-alt.a_tag"
    )
    assert os.path.getsize(folder / "pez" / files[0]) == len(Hub.content)


def test_a_folder_that_cannot_be_written_is_named_before_a_download(tmp_path: Path):
    (tmp_path / "models").write_text("a file where a folder has to be")
    message = inside(
        f"""
import folder_paths
folder_paths.models_dir = {str(tmp_path / "models")!r}
from pez_pack.nodes import consent, models
models.register_folder()
models.consent.agreed = lambda model: True
models.fetch_weights = lambda *_, **__: answer("fetched")
try:
    models.load("SD 1.5 (ViT-L/14)", True, device="cpu")
except ValueError as error:
    answer(str(error))
"""
    )
    assert str(tmp_path / "models/pez") in message and "may not write" in message


def test_three_hundred_files_are_listed_at_once(small: dict[str, torch.Tensor], tmp_path: Path):
    """Of a drive with large models, which are not read; a second time no header is read again."""
    folder = tmp_path / "text_encoders"
    folder.mkdir()
    save_file(small, folder / "clip.SAFETENSORS")
    whole = (folder / "clip.SAFETENSORS").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:-1])
    layers = {f"model.layers.{k}.mlp.weight": {} for k in range(1000)}
    for one in layers.values():
        one |= {"dtype": "BF16", "shape": [4096, 4096], "data_offsets": [0, 5_000_000_000]}
    header = json.dumps(layers).encode()
    for k in range(300):
        with (folder / f"model-{k}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + 5_000_000_000)  # sparse
    os.symlink(tmp_path / "gone.safetensors", folder / "link.safetensors")
    first, second, offered = inside(
        f"""
import time
import folder_paths
from pez_pack.nodes import models
folder_paths.folder_names_and_paths["text_encoders"] = ([{str(folder)!r}], {{".safetensors"}})
times = []
for _ in range(2):
    began = time.process_time()
    choices = models.choices()
    times.append(time.process_time() - began)
answer([*times, [one for one in choices if one.startswith("text_encoders")]])
"""
    )
    assert offered == ["text_encoders/clip.SAFETENSORS"]
    assert first < 5 and second < first / 5


def test_the_parts_of_a_clip_are_offered_by_their_index(
    small: dict[str, torch.Tensor], tmp_path: Path
):
    """Once all of them are there; ComfyUI itself lists the parts and not the index."""
    folder = tmp_path / "clip_vision" / "large"
    folder.mkdir(parents=True)
    names = list(small)
    parts = [f"model-{k:05}-of-00002.safetensors" for k in (1, 2)]
    places = {name: parts[name not in names[:20]] for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    save_file({name: small[name] for name in names[:20]}, folder / parts[0])
    second = tmp_path / "second.safetensors"
    save_file({name: small[name] for name in names[20:]}, second)
    before, offered, name = inside(
        f"""
import os
import folder_paths
from pez_pack.nodes import models
folder_paths.folder_names_and_paths["clip_vision"] = (
    [{str(folder.parent)!r}], {{".safetensors"}}
)
def offered():
    return [one for one in models.choices() if one.startswith("clip_vision")]
before = offered()
os.replace({str(second)!r}, {str(folder / parts[1])!r})
folder_paths.filename_list_cache.clear()
after = offered()
answer([before, after, models.load(after[0], False, device="cpu").name])
"""
    )
    assert before == [] and offered == ["clip_vision/large/model.safetensors.index.json"]
    assert name == "model"


def test_folders_that_are_gone_do_not_matter(tmp_path: Path):
    """Missing, read-only, or on a drive that does not answer: the schema is there all the same."""
    (tmp_path / "models").write_text("a file where a folder has to be")
    listed, warned = inside(
        f"""
import logging
import folder_paths
lines = []
logging.getLogger().addFilter(lambda record: lines.append(record.getMessage()) or True)
folder_paths.models_dir = {str(tmp_path / "models")!r}
from pez_pack.nodes import LoadCLIP, models
models.register_folder()
folder_paths.folder_names_and_paths.pop("clip_vision")
def dead(folder):
    raise OSError(116, "Stale file handle")
real, folder_paths.get_filename_list = folder_paths.get_filename_list, dead
models.os.stat, stat = lambda path: dead(path), models.os.stat
assert not models._holds_clip("/net/a.safetensors")
models.os.stat = stat
choices = models.choices()
folder_paths.get_filename_list = real
assert models.choices() == choices
answer([LoadCLIP.define_schema().inputs[0].options == choices, lines])
"""
    )
    assert listed and not [line for line in warned if "pez" in line]
