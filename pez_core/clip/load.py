"""Finding, downloading (only when asked) and loading CLIPs."""

from __future__ import annotations

import copy
import hashlib
import http.client
import json
import logging
import operator
import os
import pickle
import re
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import open_clip
import torch
from open_clip.coca_model import CoCa
from open_clip.factory import get_model_config
from open_clip.model import CLIP, CustomTextCLIP, set_model_preprocess_cfg
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from safetensors import SafetensorError

from .files import find_clip, read_transformers
from .joint import JointClip
from .model import Clip

log = logging.getLogger(__name__)

BUNDLED = {"emoji-clip": Path(__file__).parent.parent / "models" / "emoji-clip"}
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_SUFFIXES = (".safetensors", ".bin", ".pt")
_CHUNK = 1 << 20  # bytes read at a time, small enough to notice a cancel at once
_PREPROCESS = ("mean", "std", "interpolation", "resize_mode")


@dataclass(frozen=True)
class Preset:
    """A CLIP that people ask for by what it is good for."""

    name: str
    pretrained: str
    purpose: str
    size: float  # GB to download


PRESETS = (
    Preset("ViT-L-14", "openai", "Stable Diffusion 1.5, first encoder of SDXL", 1.71),
    Preset("ViT-H-14", "laion2b_s32b_b79k", "Stable Diffusion 2.x", 3.94),
    Preset("ViT-bigG-14", "laion2b_s39b_b160k", "second encoder of SDXL", 10.16),
    Preset("ViT-B-32", "laion2b_s34b_b79k", "small and fast, for a first look", 0.61),
)

# the same weights as transformers has them, by which people know them
_ON_THE_HUB = {
    "openai/clip-vit-large-patch14": "ViT-L-14:openai",
    "openai/clip-vit-base-patch32": "ViT-B-32:openai",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "ViT-H-14:laion2b_s32b_b79k",
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": "ViT-bigG-14:laion2b_s39b_b160k",
}


def models_folder() -> Path:
    """Where weights placed by hand are looked for: `PEZ_MODELS`, else `~/.cache/pez`."""
    return Path(os.environ.get("PEZ_MODELS", Path.home() / ".cache" / "pez")).expanduser()


def find_on_disk(name: str, pretrained: str) -> Path | None:
    """The weights of an open_clip tag if they are on this disk, without asking the network."""
    for suffix in _SUFFIXES:
        placed = models_folder() / f"{name}.{pretrained}{suffix}"
        if placed.is_file():
            return placed
    repository, files = _source(name, pretrained)
    return next(filter(None, (_cached(repository, file) for file in files)), None)


def _cached(repository: str, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repository, file)
    return Path(cached) if isinstance(cached, str) else None


def load_clip(
    name: str | Sequence[str] = "emoji-clip",
    pretrained: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    download: bool = False,
    weights: Sequence[float] | None = None,
    low_memory: bool = False,
) -> Clip | JointClip:
    """Load a CLIP to search prompts on, or several to search as one.

    Args:
        name: `"emoji-clip"` (bundled, nothing to download), an open_clip architecture such as
            `"ViT-H-14"`, a folder with `open_clip_config.json` and weights, or a safetensors file
            that holds both towers of a CLIP, as open_clip or transformers write it (see
            `find_clip`).
            `"NAME:PRETRAINED"` is `pretrained` in the same string. A list of such strings loads
            several CLIPs as one, for models that read a prompt with more than one: for SDXL
            `["ViT-L-14:openai", "ViT-bigG-14:laion2b_s39b_b160k"]`.
        pretrained: an open_clip tag such as `"laion2b_s32b_b79k"`, or a weights file, safetensors
            or a PyTorch file that `weights_only` loading accepts. OpenAI's weights need the
            `-quickgelu` architecture when they come as a file; a tag knows by itself.
        device: None takes CUDA, then MPS, then the CPU, whichever is there first.
        dtype: of the towers; float32, float16 or bfloat16. None: on CUDA bfloat16 (float16 on cards
            without it), float32 elsewhere. Prompts and similarities are float32 in any case.
        download: fetch the weights of a tag that are not on disk. Off: an error says what would be
            fetched and how to place it by hand.
        weights: how much each of several CLIPs counts; None: all the same.
        low_memory: the image tower, which is the larger one, stays in main memory and visits the
            device only while images are encoded.

    Raises:
        ValueError: unknown architecture, tag, device or dtype; weights that are missing, damaged or
            of another architecture; a text tower that cannot be searched.
        OSError: the download failed; run it again to resume.
    """
    if isinstance(name, (list, tuple)):
        if pretrained is not None:
            raise ValueError(
                f"`pretrained` is {str(pretrained)!r}, but `name` is a list; write each as "
                "NAME:PRETRAINED."
            )
        if weights is not None and len(weights) != len(name):
            raise ValueError(
                f"`weights` has to hold one number for each of {len(name)} CLIPs but is {weights}."
            )
        if len(set(name)) < len(name):
            raise ValueError(f"`name` holds one CLIP twice: {', '.join(name)}.")
        if len(name) > 1:
            options = {"dtype": dtype, "download": download, "low_memory": low_memory}
            clips = [load_clip(one, None, device, **options) for one in name]
            with torch.inference_mode(False):
                return JointClip(clips, weights)
        if not name:
            raise ValueError("`name` is an empty list; give at least one CLIP.")
        name, weights = name[0], None
    if weights is not None:
        raise ValueError(f"`weights` is {weights!r}, but there is one CLIP; leave it out.")
    if not isinstance(name, str):
        raise TypeError(
            f"`name` has to be a string or a list of strings but is {type(name).__name__}."
        )
    if not isinstance(pretrained, (str, os.PathLike, type(None))):
        raise TypeError(
            f"`pretrained` has to be a tag or a path but is {type(pretrained).__name__}."
        )
    if pretrained is None and ":" in name and not Path(name).is_dir():
        name, pretrained = name.split(":", 1)
    device = pick_device(device)
    precision = _precision(device, dtype)
    if low_memory:
        kind = default_dtype(device) if dtype is None else dtype
        clip = load_clip(name, pretrained, "cpu", kind, download)
        with torch.inference_mode(False):
            return apart(clip, device)

    # Under ComfyUI's inference mode, weights would be created unfit for backward.
    with torch.inference_mode(False):
        folder = BUNDLED.get(name, Path(name).expanduser())
        if (folder / "open_clip_config.json").is_file():
            if pretrained is not None:
                raise ValueError(
                    f"`pretrained` is {str(pretrained)!r}, but {name} comes with its weights; "
                    "leave it out."
                )
            return _load_folder(folder, name, precision, device)
        if folder.suffix == ".safetensors" and pretrained is None:
            return _load_file(folder, precision, device)
        config = get_model_config(name)
        if config is None:
            raise ValueError(
                f"`name` is {name!r}, which is no architecture of open_clip and not bundled. "
                f"Bundled: {', '.join(BUNDLED)}. "
                + (
                    f"For {name} write {_ON_THE_HUB[name]!r}."
                    if name in _ON_THE_HUB
                    else f"Others: {_like(name, [*BUNDLED, *open_clip.list_models()])}."
                )
            )
        if "hf_model_name" in config["text_cfg"]:
            raise ValueError(
                f"`name` is {name!r}, whose text tower is a Hugging Face model: it takes ids only "
                "and cannot be searched. Choose one with open_clip's own, like ViT-L-14."
            )
        if pretrained is None:
            raise ValueError(
                f"`pretrained` is missing: {name} needs weights, a file or one of the tags "
                f"{', '.join(list_pretrained_tags_by_model(name)) or '(none known)'}."
            )
        tag = get_pretrained_cfg(name, str(pretrained))
        if tag:
            path = find_on_disk(name, str(pretrained)) or _fetch(name, str(pretrained), download)
        else:
            path = Path(pretrained).expanduser()
            if not path.is_file():
                raise ValueError(
                    f"`pretrained` is {str(pretrained)!r}, which is neither a file nor a tag of "
                    f"{name}. Tags: {', '.join(list_pretrained_tags_by_model(name)) or 'none'}."
                )
        tokenizer = _tokenizer(name, config, download)
        model = _create(
            name,
            path,
            pretrained=str(path),
            precision=precision,
            device=device,
            force_quick_gelu=tag.get("quick_gelu", False),
            force_preprocess_cfg=_preprocess(name, tag),
        )
        built = _config(config, tag.get("quick_gelu", False), name)
        return Clip(model, tokenizer, f"{name}:{pretrained}", config=built)


def apart(clip: Clip, device: torch.device) -> Clip:
    """A CLIP on the CPU with all but its image tower, which visits, on the device."""
    model, tower = clip.model, clip.model.visual
    model.visual = torch.nn.Identity()
    model.to(device)
    model.visual = tower
    clip.image_tower = partial(_visiting, tower, device)
    return clip


@contextmanager
def _visiting(tower: torch.nn.Module, device: torch.device) -> Iterator[None]:
    tower.to(device)
    try:
        yield
    finally:
        tower.to("cpu")


def _load_folder(folder: Path, name: str, precision: str, device: torch.device) -> Clip:
    """A folder with open_clip config, weights and, optionally, the tokens it was trained on."""
    source = f"local-dir:{folder}"
    if not any(path.suffix in (*_SUFFIXES, ".pth") for path in folder.iterdir()):
        raise ValueError(f"`name`: the folder {folder} holds no weights; add {_WEIGHTS[0]}.")
    model = _create(source, folder, precision=precision, device=device)
    tokens, vocabulary = folder / "vocabulary.json", None
    if tokens.is_file():
        try:
            vocabulary = [operator.index(i) for i in json.loads(tokens.read_text())]
        except (ValueError, TypeError) as error:
            message = f"`name`: {tokens} has to be a JSON list of token ids ({error})."
            raise ValueError(message) from error
    model_cfg = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    # a tokenizer that lies in the folder cannot be made anew elsewhere
    config = None if "hf_tokenizer_name" in model_cfg["text_cfg"] else _config(model_cfg)
    return Clip(model, open_clip.get_tokenizer(source), name, vocabulary, config)


def _load_file(path: Path, precision: str, device: torch.device) -> Clip:
    """A file that says by itself what it holds."""
    if not path.is_file():
        raise ValueError(f"`name`: the file {path} does not exist; check the path.")
    found = find_clip(path)
    if found is None:
        raise ValueError(
            f"`name`: {path} does not hold both towers of a CLIP that open_clip knows; files with "
            "an image tower or a text encoder alone cannot be searched."
        )
    log.info("%s holds %s%s", path, found.name, ", QuickGELU" * found.quick_gelu)
    tag = get_pretrained_cfg(found.name, found.tag) if found.tag else {}
    model = _create(
        found.name,
        path,
        pretrained=None if found.transformers else str(path),
        tensors=read_transformers if found.transformers else None,
        precision=precision,
        device=device,
        force_quick_gelu=found.quick_gelu,
        force_preprocess_cfg=_preprocess(found.name, tag),
    )
    config = _config(get_model_config(found.name), found.quick_gelu, found.name)
    return Clip(model, open_clip.get_tokenizer(found.name), path.stem, config=config)


def _config(model_cfg: dict, quick_gelu: bool = False, tokenizer: str | None = None) -> dict:
    """What `from_config` makes the same model of, as JSON can hold it."""
    model_cfg = copy.deepcopy(model_cfg) | ({"quick_gelu": True} if quick_gelu else {})
    if "timm_model_name" in model_cfg["vision_cfg"]:
        model_cfg["vision_cfg"]["timm_model_pretrained"] = False
    return {"model_cfg": model_cfg, "tokenizer": tokenizer}


def from_config(config: dict, preprocess_cfg: dict) -> tuple[torch.nn.Module, Callable]:
    """`Clip.config` and how images are prepared -> an open_clip model and its tokenizer.

    The weights are those of its initialisation, in float32.
    """
    model_cfg = copy.deepcopy(config["model_cfg"])
    custom = model_cfg.pop("custom_text", False)
    kind = CustomTextCLIP if custom else CLIP
    if custom and "multimodal_cfg" in model_cfg:
        kind = CoCa
    model = kind(**model_cfg)
    set_model_preprocess_cfg(model, preprocess_cfg)
    if config["tokenizer"]:
        return model, _tokenizer(config["tokenizer"], model_cfg, download=False)
    text = model_cfg["text_cfg"]
    return model, open_clip.SimpleTokenizer(
        context_length=text.get("context_length", 77), **text.get("tokenizer_kwargs", {})
    )


def _preprocess(name: str, tag: dict) -> dict | None:
    """How images are prepared: as the tag says; for a file, as all tags of its architecture say."""
    tags = (
        [tag] if tag else [get_pretrained_cfg(name, t) for t in list_pretrained_tags_by_model(name)]
    )
    known = [{key: t[key] for key in _PREPROCESS} for t in tags]
    return known[0] if known and all(k == known[0] for k in known) else None


def _tokenizer(name: str, config: dict, download: bool):
    """The public tokenizer; those of some architectures lie on the Hugging Face Hub."""
    repository = config["text_cfg"].get("hf_tokenizer_name")
    if repository and not download and not _cached(repository, "tokenizer_config.json"):
        raise ValueError(
            f"`name` is {name!r}, whose tokenizer {repository} is not on this disk; fetch it with "
            "download=True (`--download` for the command), or by "
            f"open_clip.get_tokenizer({name!r})."
        )
    try:
        return open_clip.get_tokenizer(name)
    except ImportError as error:
        raise ValueError(
            f"`name` is {name!r}, whose tokenizer needs the package transformers; "
            "pip install transformers."
        ) from error


def _create(
    name: str,
    path: Path,
    tensors: Callable[[Path], dict[str, torch.Tensor]] | None = None,
    **options,
) -> torch.nn.Module:
    """open_clip's `create_model`, with errors that say what is wrong with the weights in `path`.

    `tensors` reads files that open_clip itself does not understand.
    """
    try:
        if path.is_file():
            _check_header(path)
        if tensors is None:
            return open_clip.create_model(
                name, require_pretrained=True, weights_only=True, **options
            )
        model = open_clip.create_model(name, **options)
        model.load_state_dict(tensors(path))
        return model
    except torch.cuda.OutOfMemoryError:
        raise  # a RuntimeError like those below, but not the file's fault
    except (SafetensorError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise ValueError(
            f"`pretrained`: {path} is damaged or not a weights file; fetch it again or convert it "
            f"to safetensors. ({_first_line(error)})"
        ) from error
    except (RuntimeError, AssertionError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(
            f"`pretrained`: {path} does not hold weights of {name}; give the architecture it was "
            f"trained with. ({_first_line(error)})"
        ) from error


def _check_header(path: Path) -> None:
    """Torch answers a file that is no weights file at all with all sorts of exceptions."""
    with path.open("rb") as file:
        start = file.read(2)
    if not start:
        raise EOFError("the file is empty")
    if path.suffix == ".safetensors":
        return
    if start not in (b"PK", b"\x80\x02"):
        raise pickle.UnpicklingError("not a PyTorch file")
    if start == b"PK" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise pickle.UnpicklingError("a TorchScript archive, which holds code")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0][:200]


def pick_device(device: str | torch.device | None) -> torch.device:
    """CUDA, then MPS, then the CPU, whichever is there first, or the one that is asked for."""
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"`device` is {str(device)!r}, which cannot be used here ({_first_line(error)}); "
            "leave it out, or use 'cpu'."
        ) from error
    return device


def default_dtype(device: torch.device) -> torch.dtype:
    """What towers compute in on a device unless something else is asked for."""
    if device.type != "cuda":
        return torch.float32
    # asked of the card, since torch's own check counts emulation, too
    major, _ = torch.cuda.get_device_capability(device)
    return torch.bfloat16 if major >= 8 else torch.float16


def _precision(device: torch.device, dtype: torch.dtype | None) -> str:
    dtype = default_dtype(device) if dtype is None else dtype
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    if dtype not in names:
        raise ValueError(
            f"`dtype` is {dtype!r}; use torch.float32, torch.float16, torch.bfloat16 or None."
        )
    return names[dtype]


def _source(name: str, pretrained: str) -> tuple[str, list[str]]:
    """Repository and candidate files of a tag, safetensors first."""
    hub = get_pretrained_cfg(name, pretrained).get("hf_hub", "")
    repository, _, file = hub.rpartition("/")
    if not file:
        return repository, list(_WEIGHTS)
    safe = str(Path(file).with_suffix(".safetensors"))
    return repository, [safe, file] if safe != file else [file]


def download_size(name: str, pretrained: str) -> float:
    """GB that the weights of a tag take: as published for presets, else from the architecture."""
    for preset in PRESETS:
        if (preset.name, preset.pretrained) == (name, pretrained):
            return preset.size
    with torch.device("meta"):
        model = open_clip.create_model(name, load_weights=False, device="meta")
    return sum(p.numel() for p in model.parameters()) * 4 / 1e9


def _fetch(name: str, pretrained: str, download: bool) -> Path:
    repository, files = _source(name, pretrained)
    placed = models_folder() / f"{name}.{pretrained}.safetensors"
    if not download:
        size = download_size(name, pretrained)
        raise ValueError(
            f"{name}:{pretrained} is not on this disk and nothing is downloaded unless asked. "
            f"Fetch about {size:.2f} GB with download=True (command line: --download), or place "
            f"{' or '.join(files)} of the Hugging Face repository {repository} by hand as {placed} "
            "(or .bin), or give the file as `pretrained`."
        )
    return fetch_weights(name, pretrained, placed)


def fetch_weights(
    name: str,
    pretrained: str,
    path: str | os.PathLike,
    progress: Callable[[int, int], None] | None = None,
    only_safetensors: bool = False,
) -> Path:
    """Download the weights of an open_clip tag; the file appears whole or not at all.

    Args:
        name, pretrained: architecture and tag.
        path: where the file goes, `.safetensors`; PyTorch files get the suffix `.bin`. What a
            broken download has brought lies beside it, and running it again goes on from there.
        progress: called with the bytes that are here and all bytes. What it raises ends the
            download.
        only_safetensors: take nothing else.

    Returns:
        The path of the file.

    Raises:
        OSError: the download failed, or the repository has no such file.
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
        except Exception as error:  # of whichever HTTP library the hub's client is built on
            raise OSError(_download_failed(repository, file, error)) from error
        try:
            _download(found, place, progress)
        except (OSError, http.client.HTTPException) as error:  # and not what `progress` raises
            raise OSError(_download_failed(repository, file, error)) from error
        return place
    raise OSError(_download_failed(repository, " or ".join(files) or "weights", "no such file"))


def _download(found, path: Path, progress: Callable[[int, int], None] | None) -> None:
    """Bring the file of which `found` is the hub's metadata to `path`, from where it broke off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # the tag of the content is in the name: the rest of another version must not be added to it
    part = path.with_name(f".{path.name}.{re.sub(r'[^0-9a-zA-Z]', '', found.etag)[:16]}.part")
    with part.open("ab") as file:
        while (here := file.tell()) < found.size:
            request = urllib.request.Request(found.location, headers={"Range": f"bytes={here}-"})
            with urllib.request.urlopen(request, timeout=30) as response:
                if here and response.status != 206:
                    file.truncate(0)  # the server begins anew
                while chunk := response.read1(_CHUNK):
                    file.write(chunk)
                    if progress:
                        progress(file.tell(), found.size)
            if file.tell() <= here:
                raise OSError("the connection was closed")
    if re.fullmatch(r"[0-9a-f]{64}", found.etag):  # large files have their SHA-256 as a tag
        digest = hashlib.sha256()
        with part.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                if progress:  # a large file takes a while
                    progress(found.size, found.size)
        if digest.hexdigest() != found.etag:
            part.unlink()
            raise OSError("the file arrived damaged and was deleted")
    os.replace(part, path)


def _download_failed(repository: str, file: str, why: object) -> str:
    reason = (str(why) or type(why).__name__).splitlines()[0]
    return (
        f"Could not download {file} of {repository} ({reason}); check the connection and run it "
        "again, a partial download is resumed."
    )


def _like(name: str, names: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name.replace("/", "-"), names, n=5, cutoff=0.4)
    return ", ".join(close or ["ViT-B-32", "ViT-L-14", "ViT-H-14"]) + ", ..."
