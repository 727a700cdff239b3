"""Weights of open_clip's tags: where they are on this disk, and how they are downloaded."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import urllib.request
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import ArgumentError
from ..folders import models_folder
from .models import find_preset

WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Names of the weights in open_clip's repositories and folders."""

SUFFIXES = (".safetensors", ".bin", ".pt")
"""Endings of files that may hold weights."""

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
"""Endings of PyTorch files."""

Progress = Callable[[int, int], None]
"""Called with the bytes on disk and with all bytes; an exception ends the download."""

_CHUNK = 1 << 20  # bytes per read; small, so that a cancel takes effect soon
_LOCAL = ("localhost", "127.0.0.1", "::1")  # hosts to which nothing has to be encrypted


def find_on_disk(name: str, pretrained: str) -> Path | None:
    """The weights of a tag if they are on this disk. Never uses the network."""
    for suffix in SUFFIXES:
        placed = models_folder() / f"{name}.{pretrained}{suffix}"
        if placed.is_file():
            return placed
    repository, files = _source(name, pretrained)
    return next(filter(None, (find_in_hub_cache(repository, file) for file in files)), None)


def tags_on_disk() -> list[tuple[str, str]]:
    """Architecture and tag of all weights that `find_on_disk` finds."""
    import open_clip

    return [(name, tag) for name, tag in open_clip.list_pretrained() if find_on_disk(name, tag)]


def find_in_hub_cache(repository: str, file: str) -> Path | None:
    """A file of a repository in the cache of huggingface_hub, or None."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repository, file)
    return Path(cached) if isinstance(cached, str) else None


def _source(name: str, pretrained: str) -> tuple[str, list[str]]:
    """Repository and possible files of a tag, safetensors first."""
    if preset := find_preset(name, pretrained):
        return preset.repository, list(WEIGHTS)
    from open_clip.pretrained import get_pretrained_cfg

    hub = get_pretrained_cfg(name, pretrained).get("hf_hub", "")
    repository, _, file = hub.rpartition("/")
    if not file:
        return repository, list(WEIGHTS)
    safe = str(Path(file).with_suffix(".safetensors"))
    return repository, [safe, file] if safe != file else [file]


def download_size(name: str, pretrained: str) -> float:
    """GB of the weights of a tag: as published for presets, else from the architecture."""
    if preset := find_preset(name, pretrained):
        return preset.size
    import open_clip
    import torch

    with torch.device("meta"):
        model = open_clip.create_model(name, load_weights=False, device="meta")
    return sum(p.numel() for p in model.parameters()) * 4 / 1e9


def weights_of_tag(name: str, pretrained: str, download: bool) -> Path:
    """The weights of a tag from this disk, or downloaded.

    Raises:
        ArgumentError: the weights are not on this disk, and `download` is off.
        OSError: the download failed.
    """
    found = find_on_disk(name, pretrained)
    if found is not None:
        return found
    placed = models_folder() / f"{name}.{pretrained}.safetensors"
    if download:
        return fetch_weights(name, pretrained, placed)
    repository, files = _source(name, pretrained)
    raise ArgumentError(
        "name",
        f"is {name}:{pretrained}, which is not on this disk, and nothing is downloaded unless "
        "asked",
        f"fetch about {download_size(name, pretrained):.2f} GB with `download`, or place "
        f"{' or '.join(files)} of the Hugging Face repository {repository} by hand as {placed} "
        "(or .bin), or give the file as `pretrained`",
    )


def fetch_weights(
    name: str,
    pretrained: str,
    path: str | os.PathLike,
    progress: Progress | None = None,
    only_safetensors: bool = False,
) -> Path:
    """Download the weights of an open_clip tag. The file appears whole or not at all.

    Two processes may download the same file; the second waits for the first.

    Args:
        name, pretrained: architecture and tag.
        path: of the new file, `.safetensors`; PyTorch files get the suffix `.bin`. An
            interrupted download leaves its part beside it, and the next call resumes it.
        progress: called with the bytes on disk and with all bytes. An exception ends the
            download.
        only_safetensors: take no other kind of file.

    Returns:
        The path of the file.

    Raises:
        OSError: the download failed, the repository has no such file, or the file has no SHA-256
            to verify it with.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    repository, files = _source(name, pretrained)
    if only_safetensors:
        files = [file for file in files if file.endswith(".safetensors")]
    for file in files:
        place = Path(path)
        if not file.endswith(".safetensors"):
            place = place.with_suffix(".bin")
        try:
            found = get_hf_file_metadata(hf_hub_url(repository, file), timeout=30)
        except EntryNotFoundError:
            continue  # not every repository has safetensors
        except Exception as error:  # huggingface_hub lets errors of its HTTP library through
            raise _download_failed(repository, file, error) from error
        try:
            _download(found, place, progress)
        except (OSError, http.client.HTTPException) as error:  # not what `progress` raises
            raise _download_failed(repository, file, error) from error
        return place
    raise _download_failed(repository, " or ".join(files) or "weights", "no such file")


def _download(found: Any, path: Path, progress: Progress | None) -> None:
    """Download the file that the hub's metadata `found` describes to `path`."""
    digest = re.sub(r'^W/|"', "", found.etag or "").lower()
    if not re.fullmatch(r"[0-9a-f]{64}", digest):  # the hub's tag of a large file is its SHA-256
        raise OSError("the server gives no SHA-256 to verify the file with")
    if not found.size:
        raise OSError("the server gives no size of the file")
    path.parent.mkdir(parents=True, exist_ok=True)
    # with the SHA-256 in its name, so that parts of two versions are never joined
    part = path.with_name(f".{path.name}.{digest[:16]}.part")
    with _only_one(path, part, found.size, progress):
        if path.is_file():
            return  # another process has downloaded it meanwhile
        _resume(found.location, found.size, part, progress)
        if _sha256(part, found.size, progress) != digest:
            part.unlink()
            raise OSError("the file arrived damaged and was deleted")
        os.replace(part, path)


@contextmanager
def _only_one(path: Path, part: Path, size: int, progress: Progress | None):
    """Wait until no other process downloads to `path`; then keep others away."""
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_name(f".{path.name}.lock"))
    while True:
        try:
            lock.acquire(timeout=1)
            break
        except Timeout:
            if progress and part.is_file():
                progress(part.stat().st_size, size)
    try:
        yield
    finally:
        lock.release()
    # Only after a whole file: processes that wait for the lock then find it.
    with suppress(OSError):
        os.unlink(lock.lock_file)


def _resume(address: str, size: int, part: Path, progress: Progress | None) -> None:
    """Add to `part` what is missing of `size` bytes."""
    opener = urllib.request.build_opener(_SafeRedirects)
    with part.open("ab") as file:
        while (here := file.tell()) < size:
            request = urllib.request.Request(_safe(address), headers={"Range": f"bytes={here}-"})
            with opener.open(request, timeout=30) as response:
                if here and response.status != 206:
                    file.seek(0)  # the server begins anew
                    file.truncate()
                while chunk := response.read1(min(_CHUNK, size - file.tell())):
                    file.write(chunk)
                    if progress:
                        progress(file.tell(), size)
            if file.tell() <= here:
                raise OSError("the connection was closed")


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections to safe addresses only."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return super().redirect_request(req, fp, code, msg, headers, _safe(newurl))


def _safe(address: str) -> str:
    """The address; raise unless it is encrypted or on this machine."""
    parts = urlsplit(address)
    if parts.scheme != "https" and (parts.scheme, parts.hostname in _LOCAL) != ("http", True):
        raise OSError(f"{parts.scheme}://{parts.hostname} is not https")
    return address


def _sha256(part: Path, size: int, progress: Progress | None) -> str:
    digest = hashlib.sha256()
    with part.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if progress:  # a large file takes a while, in which the user may cancel
                progress(size, size)
    return digest.hexdigest()


def _download_failed(repository: str, file: str, why: object) -> OSError:
    reason = (str(why) or type(why).__name__).splitlines()[0]
    return OSError(
        f"Could not download {file} of {repository} ({reason}); check the connection and run it "
        "again, a partial download is resumed."
    )
