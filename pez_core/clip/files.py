"""Weights files: the CLIP that a file holds, and its tensors under open_clip's names."""

from __future__ import annotations

import json
import logging
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import get_model_config
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from safetensors.torch import load_file

from .device import first_line

log = logging.getLogger(__name__)

_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
# Errors of a file with a damaged header.
_MALFORMED = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
    struct.error,
)

# Names of tensors in files of transformers' CLIPModel, and their names in open_clip.
_RENAMED = (
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.", ".attn."),
)
_PARTS = re.compile(r"\.attn\.q_proj\.(weight|bias)$")
# The first tensors of the towers, in the layouts of open_clip and of transformers.
_IMAGE_TOWER = ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight")
_TEXT_TOWER = ("token_embedding.weight", "text_model.embeddings.token_embedding.weight")
_OF_IMAGES = re.compile(r"(^|\.)(visual|vision_model|visual_projection)\.")
# Scales of weights in 8 bits, as ComfyUI stores them, and its marks of such files.
_SCALE = re.compile(r"^(.*)\.(?:scale_weight|weight_scale)$")
_MARK = re.compile(r"(^|\.)(scaled_fp8|scale_input|input_scale|comfy_quant|position_ids)$")
# Types of weights that are not quantised, as safetensors and torch spell them.
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_FLOATS |= {"float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"}
_PART_OF_SEVERAL = re.compile(r"-\d{5}-of-(?!00001$)\d{5}$")
_SAFETENSORS = (".safetensors", ".sft")
INDEX = ".safetensors.index.json"
"""Ending of the file that says in which of several files each tensor lies."""
_PREPROCESS = ("mean", "std", "interpolation", "resize_mode")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Reading:
    """What the weights of a CLIP do not show about it.

    Attributes:
        quick_gelu: its activation is QuickGELU, else GELU.
        preprocess: how images are prepared, as in open_clip's tags; None: by its default.
    """

    quick_gelu: bool
    preprocess: tuple[tuple[str, Any], ...] | None = None


@dataclass(frozen=True)
class FoundClip:
    """The CLIP in a file.

    Attributes:
        name: open_clip's name of the architecture.
        readings: what its activation and preparation of images may be; one where they are known.
        prefix: of the names of all its tensors, such as `"module."`.
    """

    name: str
    readings: tuple[Reading, ...]
    prefix: str = ""


class NoClipError(Exception):
    """A file holds no CLIP that can be searched.

    Args:
        problem: to be read behind the name of the file.
        remedy: what to do.
        readable: the file is sound, and holds something else.
    """

    def __init__(self, problem: str, remedy: str, readable: bool = True) -> None:
        super().__init__(problem)
        self.problem, self.remedy, self.readable = problem, remedy, readable


def is_safetensors(path: Path) -> bool:
    """Whether a path is that of a safetensors file, or of the index of several."""
    return path.suffix.lower() in _SAFETENSORS or is_index(path)


def is_index(path: Path) -> bool:
    """Whether a path is that of the index of several safetensors files."""
    return path.name.lower().endswith(INDEX)


def find_clip(path: Path) -> FoundClip | None:
    """The CLIP in a safetensors file, by its header; None unless `examine` finds one."""
    try:
        return examine(path)
    except NoClipError as error:
        if not error.readable:
            log.warning("%s is passed over: it %s.", path, error.problem)
        return None


def examine(path: Path) -> FoundClip:
    """The CLIP in a safetensors file, or in several by their index; only headers are read.

    Its activation and the preparation of its images are those of a `config.json` of transformers in
    the same folder, or of the tag that the name of the file or of its folder contains, or of the
    tags whose first word it contains (such as `openai` or `laion2b`); else they may be those of any
    tag of the architecture.

    Raises:
        NoClipError: it holds none that can be searched.
    """
    header = _headers_by_index(path) if is_index(path) else _whole_header(path)
    try:
        shapes = {key: tuple(header[key]["shape"]) for key in header}
        types = {key: header[key]["dtype"] for key in header}
        return found_in(path, shapes, types)
    except _MALFORMED as error:
        raise NoClipError(f"cannot be read ({first_line(error)})", "fetch it again", False) from (
            error
        )


def found_in(path: Path, shapes: Shapes, types: Mapping[str, str]) -> FoundClip:
    """The CLIP that has tensors of these shapes.

    Args:
        path: of the file, whose name may show which weights they are.
        shapes: by the names of the tensors.
        types: by the same names, as safetensors ("F32") or torch ("float32") spells them.

    Raises:
        NoClipError: there is none that can be searched.
    """
    if _PART_OF_SEVERAL.search(path.stem):
        raise NoClipError(
            "is one of several parts of a model",
            f"give the file that ends in {INDEX}, with all parts beside it"
            if is_safetensors(path)
            else "save the model as one model.safetensors",
        )
    prefix = _prefix(shapes)
    inside = {key.removeprefix(prefix): shapes[key] for key in _of_towers(shapes, prefix)}
    transformers = _TEXT_TOWER[1] in inside
    named = {_rename(key): shape for key, shape in inside.items()}
    try:
        name = _plain_clips().get(_dimensions(named))
    except _MALFORMED:  # it lacks a tensor, or has it in another shape
        name = None
    if name is None:
        raise _unknown(named)
    quantised = {str(types[key]) for key in _of_towers(shapes, prefix)} - _FLOATS
    if quantised:
        raise NoClipError(
            f"is quantised ({', '.join(sorted(quantised))})",
            "take the file in float16, or in fp8",
        )
    return FoundClip(name, _readings(path, name, transformers), prefix)


def found_among(path: Path, tensors: Mapping[str, torch.Tensor]) -> FoundClip:
    """The CLIP that has these tensors; see `found_in`."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    types = {key: str(tensor.dtype).removeprefix("torch.") for key, tensor in tensors.items()}
    return found_in(path, shapes, types)


def _whole_header(path: Path) -> dict[str, Any]:
    """The tensors in the header of a safetensors file; raise where the file is not whole."""
    try:
        header, missing = _header(path)
    except _MALFORMED as error:
        raise _unreadable(path, error) from error
    if missing:
        raise NoClipError(
            f"is cut off: {missing:,} bytes are missing at its end", "fetch it again", False
        )
    return header


def _headers_by_index(index: Path) -> dict[str, Any]:
    """The tensors in the headers of all files of an index."""
    header: dict[str, Any] = {}
    for file, names in _files_of_index(index).items():
        try:
            found = _whole_header(file)
        except NoClipError as error:
            problem = f"names {file.name}, which {error.problem}"
            raise NoClipError(problem, error.remedy, error.readable) from error
        lacking = [name for name in names if name not in found]
        if lacking:
            raise NoClipError(
                f"names {file.name}, which lacks {len(lacking)} of its tensors",
                "fetch both again",
                False,
            )
        header.update((name, found[name]) for name in names)
    return header


def _files_of_index(index: Path) -> dict[Path, list[str]]:
    """The files of an index, which lie beside it, and the tensors to be read from each."""
    files: dict[Path, list[str]] = {}
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        for name, file in places.items():
            if Path(file).name != file or not file.lower().endswith(".safetensors"):
                raise ValueError(f"{file!r} is no safetensors file beside it")
            files.setdefault(index.parent / file, []).append(name)
    except _MALFORMED as error:
        problem = f"is no index of safetensors files ({first_line(error)})"
        raise NoClipError(problem, "fetch it again", False) from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise NoClipError(
            f"names {', '.join(sorted(missing))}, which {'is' if len(missing) == 1 else 'are'} "
            "not there",
            "put all parts beside it",
            False,
        )
    return files


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The tensors in the header of a safetensors file, and the bytes that are missing behind."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _LONGEST_HEADER:
            raise ValueError("not a safetensors file")
        header = json.loads(file.read(length))
        here = file.seek(0, 2)
    tensors = {key: header[key] for key in header if key != "__metadata__"}
    ends = [one["data_offsets"][1] for one in tensors.values() if "data_offsets" in one]
    return tensors, max(0, 8 + length + max(ends, default=0) - here)


def _unreadable(path: Path, error: Exception) -> NoClipError:
    """What a file is that has no header of safetensors."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return NoClipError(f"cannot be read ({first_line(error)})", "check it", False)
    if start.startswith(b"version https://git-lfs"):
        problem = "is a pointer of Git LFS, which stands for the weights"
        return NoClipError(problem, "run `git lfs pull` in its folder, or download the file", False)
    if start.lstrip()[:1] == b"<":
        problem = "is a web page, such as that of an error"
        return NoClipError(problem, "download the file itself", False)
    if start[:2] in (b"PK", b"\x80\x02"):
        return NoClipError("is a PyTorch file", "give it the ending .bin", False)
    if not start:
        return NoClipError("is empty", "fetch it again", False)
    return NoClipError(
        f"cannot be read as safetensors ({first_line(error)})", "fetch it again", False
    )


def _prefix(shapes: Shapes) -> str:
    """What stands before the names of all tensors of both towers.

    Raises:
        NoClipError: there is but one tower, or none.
    """
    text, image = (_before(shapes, tower) for tower in (_TEXT_TOWER, _IMAGE_TOWER))
    if both := text & image:
        return min(both, key=len)
    wanted = "choose a file with both encoders of one CLIP"
    has_text = bool(text) or any(".text." in f".{key}" for key in shapes)
    has_image = bool(image) or any(_OF_IMAGES.search(key) for key in shapes)
    if has_text and has_image:
        raise _unknown({})
    if has_text:
        raise NoClipError("holds a text encoder alone", wanted)
    if has_image:
        raise NoClipError("holds an image encoder alone", wanted)
    raise NoClipError("holds no CLIP", wanted)


def _before(shapes: Iterable[str], names: tuple[str, ...]) -> set[str]:
    found = {key[: -len(name)] for key in shapes for name in names if key.endswith(name)}
    return {prefix for prefix in found if not prefix or prefix.endswith(".")}


def _of_towers(shapes: Iterable[str], prefix: str) -> list[str]:
    """The tensors with this prefix, without scales and marks."""
    return [
        key
        for key in shapes
        if key.startswith(prefix) and not _SCALE.match(key) and not _MARK.search(key)
    ]


def _has_projections(shapes: Shapes) -> bool:
    return "visual.proj" in shapes and "text_projection" in shapes


def _unknown(shapes: Shapes) -> NoClipError:
    """Why a file with both towers holds no architecture of open_clip."""
    if not _has_projections(shapes) and "visual.class_embedding" in shapes:
        which = "text" if "visual.proj" in shapes else "image"
        return NoClipError(
            f"lacks the projection of its {which} encoder, so that texts and images cannot be "
            "compared",
            "choose a whole CLIP, such as models for image search are",
        )
    context = (shapes.get("positional_embedding") or (77,))[0]
    if context > 77:
        return NoClipError(
            f"is a LongCLIP, which reads {context} tokens at a time; prompts of image models are "
            "read 77 at a time",
            "choose the CLIP that it was made from",
        )
    return NoClipError(
        "holds a CLIP of an unknown architecture",
        "write ARCHITECTURE:FILE if open_clip has its architecture",
    )


def _readings(path: Path, name: str, transformers: bool) -> tuple[Reading, ...]:
    """What is not in the weights, as far as the file shows it."""
    public = _public_readings(name)
    title = f"{path.parent.name}/{path.stem}".lower().replace("_", "-")
    tags = {tag: tag.replace("_", "-") for tag in public}
    # a tag of one word may be the beginning of another's name: dfn2b, dfn2b_s39b
    whole = [
        tag for tag, text in tags.items() if text in title and ("-" in text or _ends(title, text))
    ]
    begun = [tag for tag, text in tags.items() if text.split("-")[0] in title]
    named = [max(whole, key=len)] if whole else begun
    if named:
        return _distinct(public[tag] for tag in named)
    readings = _distinct(public.values()) or (Reading(False),)
    quick = _configured_activation(path.parent / "config.json") if transformers else None
    if quick is None:
        return readings
    return tuple(one for one in readings if one.quick_gelu == quick) or (Reading(quick),)


def _ends(title: str, tag: str) -> bool:
    """Whether a file has the name that downloads get: ARCHITECTURE.TAG."""
    return title.endswith(f".{tag}")


def _public_readings(name: str) -> dict[str, Reading]:
    """How open_clip's weights of an architecture are to be read, by their tags."""
    found = {}
    for one in (name, f"{name}-quickgelu"):
        for tag in list_pretrained_tags_by_model(one):
            found.setdefault(tag, reading_of_tag(name, tag) or reading_of_tag(one, tag))
    return found


def reading_of_tag(name: str, tag: str) -> Reading | None:
    """How the weights of a tag are to be read; None where there is no such tag."""
    config = get_pretrained_cfg(name, tag)
    if not config:
        return None
    quick = bool(config.get("quick_gelu")) or name.endswith("-quickgelu")
    return Reading(quick, tuple((key, config[key]) for key in _PREPROCESS))


def _distinct(readings: Iterable[Reading]) -> tuple[Reading, ...]:
    return tuple(dict.fromkeys(readings))


def as_open_clip(tensors: Mapping[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a CLIP under open_clip's names, of its layout or that of transformers.

    Args:
        tensors: of a file.
        prefix: of the names of those of the CLIP.
    """
    scales = {match[1]: tensors[key] for key in tensors if (match := _SCALE.match(key))}
    named = {}
    for key in _of_towers(tensors, prefix):
        tensor = tensors[key]
        scale = scales.get(key.removesuffix(".weight"))
        if scale is not None:
            tensor = _unscaled(tensor, scale)
        elif tensor.is_floating_point() and tensor.element_size() == 1:
            tensor = tensor.half()  # which holds all numbers in 8 bits, and can be joined
        named[_rename(key.removeprefix(prefix))] = tensor
    if _TEXT_TOWER[1] not in {key.removeprefix(prefix) for key in tensors}:
        return named
    for key in [key for key in named if _PARTS.search(key)]:
        parts = [named.pop(key.replace(".q_proj.", f".{x}_proj.")) for x in "qkv"]
        if len({part.dtype for part in parts}) > 1:
            parts = [part.float() for part in parts]
        named[_PARTS.sub(r".attn.in_proj_\1", key)] = torch.cat(parts)
    for key in ("visual.proj", "text_projection"):
        named[key] = named[key].T.contiguous()
    return named


def _unscaled(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A weight in 8 bits with its scale, which may be one number, or one for each row."""
    scale = scale.float()
    return weight.float() * (scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(()))


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, whatever its ending, or of several by their index."""
    if not is_index(path):
        return load_file(path)
    tensors: dict[str, torch.Tensor] = {}
    for file, names in _files_of_index(path).items():
        found = load_file(file)
        tensors.update((name, found[name]) for name in names)
    return tensors


def read_torch(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a PyTorch file, which may hold other things beside them, but no code."""
    check_header(path)
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise pickle.UnpicklingError("it holds no tensors by their names")
    return {
        key: tensor
        for key, tensor in content.items()
        if isinstance(key, str) and isinstance(tensor, torch.Tensor)
    }


def _rename(key: str) -> str:
    for pattern, name in _RENAMED:
        key = re.sub(pattern, name, key)
    return key


def _dimensions(shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The dimensions in which architectures differ, independent of how projections are stored."""
    width, _, patch, _ = shapes["visual.conv1.weight"]
    positions, _ = shapes["visual.positional_embedding"]
    words, text_width = shapes["token_embedding.weight"]
    context, _ = shapes["positional_embedding"]
    shared = {*shapes["visual.proj"]} & {*shapes["text_projection"]}
    hidden = shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0]
    embed_dim = min(shared) if shared else 0
    layers = [_layers(shapes, prefix) for prefix in ("visual.transformer", "transformer")]
    return embed_dim, width, patch, positions, hidden, text_width, words, context, *layers


def _layers(shapes: dict[str, tuple[int, ...]], prefix: str) -> int:
    found = re.compile(rf"^{re.escape(prefix)}\.resblocks\.(\d+)\.")
    return len({match[1] for key in shapes if (match := found.match(key))})


def _plain_clips() -> dict[tuple[int, ...], str]:
    """Names of open_clip's plain CLIPs by their dimensions."""
    names: dict[tuple[int, ...], str] = {}
    for name in open_clip.list_models():
        config = config_of(name)
        image, text = config["vision_cfg"], config["text_cfg"]
        if config.get("custom_text") or "multimodal_cfg" in config or config.get("quick_gelu"):
            continue
        if not isinstance(image.get("layers"), int) or "hf_model_name" in text:
            continue
        if set(text) - {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}:
            continue
        width, patch = image["width"], image["patch_size"]
        dimensions = (
            config["embed_dim"],
            width,
            patch,
            (image["image_size"] // patch) ** 2 + 1,
            int(width * image.get("mlp_ratio", 4.0)),
            text["width"],
            text["vocab_size"],
            text["context_length"],
            image["layers"],
            text["layers"],
        )
        names.setdefault(dimensions, name)
    return names


def config_of(name: str) -> dict[str, Any]:
    """open_clip's config of one of its architectures."""
    config = get_model_config(name)
    if config is None:
        raise KeyError(name)
    return config


def _configured_activation(path: Path) -> bool | None:
    """Whether a config of transformers names QuickGELU; None where there is none."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return config["text_config"].get("hidden_act", "quick_gelu") == "quick_gelu"
    except _MALFORMED:
        return None


def check_header(path: Path) -> None:
    """Raise if a file cannot hold weights; torch would raise any kind of exception for some files.

    Raises:
        EOFError: the file is empty.
        UnpicklingError: it is no PyTorch file, or one that holds code.
    """
    with path.open("rb") as file:
        start = file.read(2)
    if not start:
        raise EOFError("the file is empty")
    if is_safetensors(path):
        return
    if start not in (b"PK", b"\x80\x02"):
        raise pickle.UnpicklingError("not a PyTorch file")
    if start == b"PK" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise pickle.UnpicklingError("a TorchScript archive, which holds code")
