"""Loading CLIPs by name, from folders and from files."""

from __future__ import annotations

import difflib
import json
import logging
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import open_clip
import torch
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from PIL import Image

from ..errors import (
    ArgumentError,
    ArgumentTypeError,
    check_bool,
    check_choice,
    check_weights,
    first_line,
)
from .activation import most_agreeing
from .build import (
    check_torch,
    create_model,
    naming_weights,
    preprocessing,
    problem_of_config,
    saved_config,
    tokenizer_of_folder,
    tokenizer_of_name,
)
from .device import keep_image_tower_in_main_memory, pick_device, pick_precision
from .files import (
    INDEX,
    FoundClip,
    NoClipError,
    Reading,
    as_open_clip,
    config_of,
    examine,
    find_clip,
    found_among,
    is_index,
    is_safetensors,
    read_safetensors,
    read_torch,
)
from .joint import JointClip
from .model import Clip
from .models import ACTIVATIONS, BUNDLED, TRANSFORMERS_NAMES
from .weights import SUFFIXES, TORCH_SUFFIXES, WEIGHTS, weights_of_tag

log = logging.getLogger(__name__)

_CONFIG = "open_clip_config.json"


def load_clip(
    name: str | os.PathLike | Sequence[str | os.PathLike] = "emoji-clip",
    pretrained: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    download: bool = False,
    weights: Sequence[float] | None = None,
    low_memory: bool = False,
    activation: str | None = None,
) -> Clip | JointClip:
    """Load a CLIP to search prompts on, or several to search as one.

    Args:
        name: `"emoji-clip"` (bundled, nothing to download), an open_clip architecture such as
            `"ViT-H-14"`, a folder with `open_clip_config.json` and weights, a folder that
            transformers wrote (`config.json` and `model.safetensors`, in parts or in one), or a
            file, safetensors, the index of its parts, or a PyTorch file as below, that holds both
            towers of a CLIP, as open_clip or transformers write it, with any prefix of its names
            and also in fp8 with scales (see `examine`).
            `"NAME:PRETRAINED"` is `pretrained` in the same string. A list of such strings loads
            several CLIPs as one, for models that read a prompt with more than one: for SDXL
            `["ViT-L-14:openai", "ViT-bigG-14:laion2b_s39b_b160k"]`.
        pretrained: weights of an architecture: an open_clip tag such as `"laion2b_s32b_b79k"`, or
            the path of a file, safetensors or a PyTorch file that
            `torch.load(..., weights_only=True)` accepts. A safetensors file whose path contains a
            tag gets the activation and the normalisation of images of this tag.
        device: such as `"cuda"`. None: the first available of CUDA, MPS and the CPU.
        dtype: of the weights: `torch.float32`, `torch.float16` or `torch.bfloat16`. None: on CUDA
            bfloat16 (float16 on cards without it), float32 elsewhere; on processors that measure
            faster in bfloat16, a search for a large CLIP multiplies in it (`matrix_dtype` of
            `pez_core.clip.text.TextTower`). The continuous prompts of a search and all similarities
            of results are float32 in any case.
        download: True: fetch the weights of a tag if they are not on disk. False: raise an error
            that names the files and the place for them.
        weights: one number above 0 per CLIP of a list, for how much each counts; only their ratio
            matters. None: all count the same.
        low_memory: keep the image tower, the larger one, in main memory, and move it to the device
            only while it encodes images.
        activation: of the CLIP in a file, `"gelu"` or `"quick_gelu"`, which weights do not show.
            None: as the name of the file, a config beside it, or the architecture says. Where none
            of these does, some texts and pictures are encoded with each, and the one with which
            they agree most is taken and logged.

    Returns:
        A `Clip`; for a list of several a `JointClip`. All tasks take both as `clip`.

    Raises:
        ArgumentError: unknown architecture, tag, device or dtype; weights that are missing, damaged
            or of another architecture; a text tower that is a Hugging Face model, which takes ids
            only and cannot be searched; a folder whose config would run code or use the network.
        OSError: the download failed; run it again to resume.
    """
    names = _check_names(name, pretrained)
    check_bool("download", download)
    check_bool("low_memory", low_memory)
    if activation is not None:
        check_choice("activation", activation, ACTIVATIONS)
    if weights is not None:
        if isinstance(name, (str, os.PathLike)):
            raise ArgumentError("weights", f"is {weights!r}, but there is one CLIP", "leave it out")
        check_weights("weights", weights, len(names))
    target = pick_device(device)
    precision = pick_precision(target, dtype)
    # Weights that are created in ComfyUI's inference mode have no backward pass.
    with torch.inference_mode(False):
        clips: list[Clip] = []
        for one in names:
            place = torch.device("cpu") if low_memory else target
            clip = _load_one(one, pretrained, activation, precision, place, download)
            clip.text.matrix_dtype = dtype
            clips.append(keep_image_tower_in_main_memory(clip, target) if low_memory else clip)
        return JointClip(clips, weights) if len(clips) > 1 else clips[0]


def _check_names(name: object, pretrained: object) -> list[str]:
    """The names as a list; raise where `name` or `pretrained` has a wrong type."""
    if not isinstance(pretrained, (str, os.PathLike, type(None))):
        raise ArgumentTypeError(
            "pretrained", f"has to be a tag or a path but is a {type(pretrained).__name__}"
        )
    if isinstance(name, (str, os.PathLike)):
        return [os.fspath(name)]
    kinds = (str, os.PathLike)
    if not isinstance(name, (list, tuple)) or not all(isinstance(one, kinds) for one in name):
        models = [one for one in _listed(name) if isinstance(one, torch.nn.Module)]
        shown = f"holds a {type(models[0]).__name__}" if models else f"is {name!r}"
        raise ArgumentTypeError(
            "name",
            f"has to be a string or a list of strings but {shown}",
            "use `clip_from_encoders` for encoders in memory" if models else "",
        )
    name = [os.fspath(one) for one in name]
    if not name:
        raise ArgumentError("name", "is an empty list", "give at least one CLIP")
    if len(set(name)) < len(name):
        raise ArgumentError("name", f"holds one CLIP twice: {', '.join(name)}")
    if pretrained is not None:
        raise ArgumentError(
            "pretrained",
            f"is {str(pretrained)!r}, but `name` is a list",
            "write each as NAME:PRETRAINED",
        )
    return list(name)


def _listed(name: object) -> list[object]:
    return list(name) if isinstance(name, (list, tuple)) else [name]


def _load_one(
    name: str,
    pretrained: str | os.PathLike | None,
    activation: str | None,
    precision: str,
    device: torch.device,
    download: bool,
) -> Clip:
    if pretrained is None:
        name, pretrained = _split_name(name)
    path = BUNDLED.get(name) or Path(os.path.expanduser(name))
    if name and os.path.isfile(path / _CONFIG):
        if pretrained is not None:
            raise ArgumentError(
                "pretrained",
                f"is {str(pretrained)!r}, but {name} comes with its weights",
                "leave it out",
            )
        if activation is not None:
            raise ArgumentError(
                "activation",
                f"is {activation!r}, but {name} comes with its own",
                "leave it out",
            )
        return _load_folder(path, name, precision, device)
    if name and path.is_dir() and pretrained is None:
        path = _file_of_transformers(path)
    is_file = path.suffix.lower() in TORCH_SUFFIXES and path.is_file()
    if pretrained is None and (is_file or is_safetensors(path)):
        return _load_file(path, activation, precision, device)
    if pretrained is None and path.is_file():
        raise ArgumentError(
            "name",
            f"is {name!r}, a file that is not named like one of weights",
            f"give one that ends with {', '.join(sorted({*SUFFIXES, *TORCH_SUFFIXES}))}",
        )
    return _load_architecture(name, pretrained, activation, precision, device, download)


def _file_of_transformers(folder: Path) -> Path:
    """The weights in a folder that transformers wrote; raise where they are in another form."""
    file = folder / "model.safetensors"
    for one in (file, folder / f"model{INDEX}", folder / "pytorch_model.bin"):
        if one.is_file():
            return one
    problem = f"is the folder {folder}, which holds neither {_CONFIG} nor {file.name}"
    if list(folder.glob("*.bin")):
        problem = f"is the folder {folder}, whose weights are in parts in PyTorch's format"
    raise ArgumentError("name", problem, f"save the model as one {file.name}")


def _split_name(name: str) -> tuple[str, str | None]:
    """NAME:PRETRAINED in its parts; a path stays whole, with any colons in it."""
    path = os.path.expanduser(name)
    head, colon, tail = name.partition(":")
    if not colon or head == "hf-hub" or os.path.exists(path):
        return name, None
    windows = PureWindowsPath(path)
    unsplit = windows.drive and windows.root  # such as C:\clips
    if unsplit or (head not in open_clip.list_models() and is_safetensors(Path(path))):
        return name, None
    return head, tail


def _load_folder(folder: Path, name: str, precision: str, device: torch.device) -> Clip:
    """A folder with open_clip config, weights and, optionally, the tokens it was trained on."""
    if not any(path.suffix in (*SUFFIXES, ".pth") for path in folder.iterdir()):
        raise ArgumentError(
            "name", f"is the folder {folder}, which holds no weights", f"add {WEIGHTS[0]}"
        )
    model_cfg = _folder_config(folder)
    model = create_model(f"local-dir:{folder}", folder, precision=precision, device=device)
    # a tokenizer that lies in the folder cannot be saved with the model
    config = None if "hf_tokenizer_name" in model_cfg["text_cfg"] else saved_config(model_cfg)
    try:
        tokenizer = tokenizer_of_folder(folder, model_cfg)
        clip = Clip(model, tokenizer, name, _trained_tokens(folder), config)
        # what a config sets may only fail when it is used
        clip.encode_texts(["a"])
        clip._prepare(Image.new("RGB", (8, 8)))
    except (ArgumentError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ArgumentError(
            "name",
            f"is the folder {folder}, whose {_CONFIG} gives no CLIP that works "
            f"({first_line(error)})",
        ) from error
    return clip


def _folder_config(folder: Path) -> dict:
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        model_cfg = config["model_cfg"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        problem = f"cannot be read ({type(error).__name__}: {error})"
    else:
        problem = problem_of_config(model_cfg)
        if not problem:
            return model_cfg
    raise ArgumentError("name", f"is the folder {folder}, whose {_CONFIG} {problem}")


def _trained_tokens(folder: Path) -> list[int] | None:
    """The ids in the folder's vocabulary.json; None where there is no such file."""
    file = folder / "vocabulary.json"
    if not file.is_file():
        return None
    try:
        return [operator.index(i) for i in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, RecursionError) as error:
        raise ArgumentError(
            "name",
            f"is the folder {folder}, whose {file.name} has to be a JSON list of token ids "
            f"({error})",
        ) from error


def _load_file(
    path: Path, activation: str | None, precision: str, device: torch.device, name: str = ""
) -> Clip:
    """The CLIP in a file, whose architecture is found by its tensors.

    Args:
        path, activation, precision, device: as in `load_clip`.
        name: of the result, where it is not that of the file.
    """
    if not path.is_file():
        raise ArgumentError(
            "name", f"is the file {str(path)!r}, which does not exist", "check the path"
        )
    if is_safetensors(path):
        tensors, found = read_safetensors, _examined(path)
    else:
        check_torch(path)
        content = _read_torch(path)
        tensors, found = lambda _: content, _examined(path, content)
    readings = _with_activation(found.readings, activation)
    quick = readings[0].quick_gelu
    model = create_model(
        found.name,
        path,
        read=lambda file: as_open_clip(tensors(file), found.prefix),
        precision=precision,
        device=device,
        force_quick_gelu=quick,
        force_preprocess_cfg=dict(readings[0].preprocess or ()) or None,
    )
    tokenizer = tokenizer_of_name(found.name)
    if len(readings) > 1:
        quick = _measured(model, tokenizer, readings, path)
    log.info("%s holds %s%s", path, found.name, ", QuickGELU" * quick)
    config = saved_config(config_of(found.name), quick, found.name)
    stem = path.name[: -len(INDEX)] if is_index(path) else path.stem
    return Clip(model, tokenizer, name or stem, config=config)


def _examined(path: Path, content: Mapping[str, torch.Tensor] | None = None) -> FoundClip:
    """The CLIP in a file, or among its tensors; raise where there is none that can be searched."""
    try:
        return examine(path) if content is None else found_among(path, content)
    except NoClipError as error:
        problem = f"is the file {str(path)!r}, which {error.problem}"
        raise ArgumentError("name", problem, error.remedy) from error


def _read_torch(path: Path) -> dict[str, torch.Tensor]:
    with naming_weights(path):
        return read_torch(path)


def _with_activation(readings: tuple[Reading, ...], activation: str | None) -> tuple[Reading, ...]:
    """The readings that have the given activation; all where none is given."""
    if activation is None:
        return readings
    quick = activation == "quick_gelu"
    having = tuple(one for one in readings if one.quick_gelu == quick)
    return having or (Reading(quick, readings[0].preprocess),)


def _measured(model: Any, tokenizer: Any, readings: Sequence[Reading], path: Path) -> bool:
    """Whether a model has QuickGELU, by which reading agrees most with pictures."""
    best = most_agreeing(model, tokenizer, readings)
    if len({one.quick_gelu for one in readings}) > 1:
        taken, other = ("quick_gelu", "gelu") if best.quick_gelu else ("gelu", "quick_gelu")
        log.warning(
            "%s does not show its activation: %s was taken, with which ten pictures and their "
            "names agree most (activation=%r takes the other).",
            path,
            taken,
            other,
        )
    return best.quick_gelu


def _load_architecture(
    name: str,
    pretrained: str | os.PathLike | None,
    activation: str | None,
    precision: str,
    device: torch.device,
    download: bool,
) -> Clip:
    """An architecture of open_clip, with the weights of a tag or of a file."""
    config = _architecture(name)
    tags = list_pretrained_tags_by_model(name)
    if pretrained is None:
        raise ArgumentError(
            "pretrained",
            f"is missing: {name} needs weights",
            f"give a file or one of the tags {', '.join(tags) or '(there are none)'}",
        )
    tag = get_pretrained_cfg(name, str(pretrained))
    if tag:
        path = weights_of_tag(name, str(pretrained), download)
    else:
        path = Path(os.path.expanduser(pretrained))
        if not path.is_file():
            raise ArgumentError(
                "pretrained",
                f"is {str(pretrained)!r}, which is neither a file nor a tag of {name}",
                f"its tags are {', '.join(tags) or 'none'}",
            )
        plain = name.removesuffix("-quickgelu")
        if (found := _found_as(path)) is not None and found.name == plain:
            if plain != name:
                activation = activation or "quick_gelu"
            return _load_file(path, activation, precision, device, f"{name}:{pretrained}")
    quick_gelu = tag.get("quick_gelu", False) if activation is None else activation == "quick_gelu"
    tokenizer = tokenizer_of_name(name, download)
    model = create_model(
        name,
        path,
        pretrained=str(path),
        precision=precision,
        device=device,
        force_quick_gelu=quick_gelu,
        force_preprocess_cfg=preprocessing(name, tag),
    )
    built = saved_config(config, quick_gelu, name)
    return Clip(model, tokenizer, f"{name}:{pretrained}", config=built)


def _found_as(path: Path) -> FoundClip | None:
    """The CLIP that is found in a file by itself; None: open_clip has to read it."""
    if is_safetensors(path):
        return find_clip(path)
    try:
        check_torch(path)
        return found_among(path, read_torch(path))
    except Exception:  # of any type; open_clip then reads it, with errors that name the file
        return None


def _architecture(name: str) -> dict:
    """open_clip's config of an architecture; raise where it has none or cannot be searched."""
    config = config_of(name) if name in open_clip.list_models() else None
    if config is None:
        others = [*BUNDLED, *open_clip.list_models()]
        raise ArgumentError(
            "name",
            f"is {name!r}, which is no architecture of open_clip and not bundled",
            _other_name(name, others),
        )
    if "hf_model_name" in config["text_cfg"]:
        raise ArgumentError(
            "name",
            f"is {name!r}, whose text tower is a Hugging Face model: it takes ids only and cannot "
            "be searched",
            "choose one with open_clip's own, like ViT-L-14",
        )
    return config


def _other_name(name: str, others: Sequence[str]) -> str:
    """What to write in place of a name that is not known."""
    repository = name.removeprefix("hf-hub:").partition("@")[0]
    if repository in TRANSFORMERS_NAMES:
        return f"write {TRANSFORMERS_NAMES[repository]!r} for it"
    if "openai" in list_pretrained_tags_by_model(repository.replace("/", "-")):
        openai = repository.replace("/", "-")  # their names have a slash, as in ViT-B/32
        return f"write '{openai}:openai' for it"
    if name.startswith("hf-hub:"):
        return "fetch its files into a folder and give that, or write ARCHITECTURE:TAG"
    close = difflib.get_close_matches(name.replace("/", "-"), others, n=5, cutoff=0.4)
    close = close or ["ViT-B-32", "ViT-L-14", "ViT-H-14"]
    names = f"bundled: {', '.join(BUNDLED)}; others: {', '.join(close)}, ..."
    return f"{names}; the command 'pez models' lists all"
