"""Models and tokenizers of open_clip, from names, files and configs.

A config may come from a stranger. It never runs code and never makes anything reach the network.
"""

from __future__ import annotations

import copy
import logging
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import open_clip
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP, set_model_preprocess_cfg
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.transformer import AttentionalPooler, LayerScale, TextTransformer
from safetensors import SafetensorError
from torch.overrides import TorchFunctionMode

from ..errors import ArgumentError, first_line
from .files import check_header, config_of, is_safetensors
from .weights import find_in_hub_cache

_WRONG = (RuntimeError, AssertionError, LookupError, AttributeError, TypeError, ValueError)
_DAMAGED = (SafetensorError, pickle.UnpicklingError, BadZipFile, EOFError, OSError)
_LEFT_IN_FLOAT32 = (
    (LayerScale, "gamma"),
    (TextTransformer, "cls_emb"),
    (AttentionalPooler, "query"),
)
_PREPROCESS = ("mean", "std", "interpolation", "resize_mode")
# Options of a tokenizer that a config may set. The others choose files, or code to run.
_TOKENIZER_OPTIONS = {"clean": str, "strip_sep_token": bool, "language": str}
_SAFE_TORCH = "2.6"
_CLEANING = ("canonicalize", "lower", "whitespace")


def create_model(
    name: str,
    path: Path,
    read: Callable[[Path], dict[str, torch.Tensor]] | None = None,
    **options: Any,
) -> Any:
    """open_clip's `create_model`, with errors that name the weights.

    Args:
        name: an architecture, or `local-dir:` and a folder.
        path: the file or folder of the weights.
        read: gives the tensors of the file under open_clip's names, where open_clip itself does not
            read them.
        options: of `open_clip.create_model`.

    Raises:
        ArgumentError: the weights are damaged or belong to another architecture.
    """
    with naming_weights(path, name):
        if path.is_file():
            check_header(path)
        check_torch(path)
        with _only_real_warnings(), _WithoutRandomWeights():
            if read is None:
                model = open_clip.create_model(
                    name, require_pretrained=True, weights_only=True, **options
                )
            else:
                tensors = read(path)
                model = open_clip.create_model(name, **options)
                _put_in(model, tensors)
        return _with_one_precision(model)


@contextmanager
def naming_weights(path: Path, name: str = "a CLIP") -> Iterator[None]:
    """Turn errors about weights into errors that name their file.

    Args:
        path: of the file.
        name: of the architecture.

    Raises:
        ArgumentError: the weights are damaged or belong to another architecture.
    """
    try:
        yield
    except (torch.cuda.OutOfMemoryError, ArgumentError):
        raise  # kinds of the errors below, but the file is good
    except _DAMAGED as error:
        raise ArgumentError(
            "pretrained",
            f"is {str(path)!r}, which is damaged or not a weights file ({first_line(error)})",
            "fetch it again or convert it to safetensors",
        ) from error
    except _WRONG as error:
        raise ArgumentError(
            "pretrained",
            f"is {str(path)!r}, which does not hold weights of {name} ({first_line(error)})",
            "give the architecture it was trained with",
        ) from error


def _put_in(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Load tensors into a model; only the scale of similarities may be missing, or too much."""
    own = model.state_dict()
    given = dict(tensors)
    for key in [key for key in given if key.startswith("logit_") and key not in own]:
        del given[key]
    for key in own:
        if key.startswith("logit_"):
            value = given[key] if key in given else own[key]
            given[key] = value.reshape(own[key].shape)
    model.load_state_dict(given)


def check_torch(path: Path) -> None:
    """Raise where this torch may run code that a PyTorch file holds.

    Before 2.6 `weights_only` can be bypassed (CVE-2025-32434). open_clip also loads a file without
    it after a TypeError, which a file can provoke.
    """
    is_safe = is_safetensors(path) if path.is_file() else any(path.glob("*.safetensors"))
    if not is_safe and torch.__version__ < _SAFE_TORCH:
        raise ArgumentError(
            "pretrained",
            f"is {str(path)!r} in PyTorch's format, which may run code with torch "
            f"{torch.__version__}",
            f"convert it to safetensors, or install torch {_SAFE_TORCH} or later",
        )


@contextmanager
def _only_real_warnings() -> Iterator[None]:
    """Inside, open_clip does not say that a model has random weights, which are loaded afterwards.

    It logs at the root logger, whose filters see only what is logged there directly.
    """

    def keep(record: logging.LogRecord) -> bool:
        return "initialized randomly" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)


class _WithoutRandomWeights(TorchFunctionMode):
    """Inside, new modules in this thread keep memory as it is where they would draw weights.

    All weights are loaded afterwards. To draw those of a large CLIP takes seconds, and would move
    torch's global random numbers on.
    """

    _DRAWS = (
        torch.Tensor.normal_,
        torch.Tensor.uniform_,
        torch.Tensor.erfinv_,
        torch.nn.init.normal_,
        torch.nn.init.uniform_,
        torch.nn.init.kaiming_normal_,
        torch.nn.init.kaiming_uniform_,
    )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._DRAWS:
            return args[0] if args else kwargs["tensor"]
        if func is torch.randn:
            return torch.empty(*args, **kwargs)
        return func(*args, **kwargs)


def _with_one_precision(model: Any) -> Any:
    """Lower the parameters that open_clip leaves in float32 in half precision.

    These are LayerScale, the class token of CoCa's text tower and the queries of its image tower,
    which would turn everything behind them into float32. Norms compute in float32 by themselves,
    and embeddings are cast where they are used.
    """
    dtype = getattr(model, "text", model).transformer.get_cast_dtype()
    for module in model.modules():
        for kind, name in _LEFT_IN_FLOAT32:
            if isinstance(module, kind) and getattr(module, name, None) is not None:
                parameter = getattr(module, name)
                parameter.data = parameter.data.to(dtype)
    return model


def preprocessing(name: str, tag: dict) -> dict | None:
    """How images are prepared: as the tag has it; without one, as all tags of the architecture do.

    None: the tags differ.
    """
    tags = (
        [tag] if tag else [get_pretrained_cfg(name, t) for t in list_pretrained_tags_by_model(name)]
    )
    found = [{key: t[key] for key in _PREPROCESS} for t in tags]
    return found[0] if found and all(one == found[0] for one in found) else None


def tokenizer_of_name(name: str, download: bool = False) -> Any:
    """The public tokenizer of an architecture; some lie on the Hugging Face Hub.

    Raises:
        ArgumentError: the tokenizer is not on this disk and `download` is off, or it needs a
            package that is missing.
    """
    repository = config_of(name)["text_cfg"].get("hf_tokenizer_name")
    if not repository:
        return open_clip.get_tokenizer(name)
    missing = ArgumentError(
        "name",
        f"is {name!r}, whose tokenizer {repository} is not on this disk",
        "fetch it with `download`",
    )
    if not download and not find_in_hub_cache(repository, "tokenizer_config.json"):
        raise missing
    return _hub_tokenizer(name, name, missing, local_files_only=not download)


def tokenizer_of_folder(folder: Path, model_cfg: dict) -> Any:
    """The tokenizer of a folder whose config passed `problem_of_config`.

    Raises:
        ArgumentError: the folder lacks files of the tokenizer, or it needs a package that is
            missing.
    """
    source = f"local-dir:{folder}"
    if "hf_tokenizer_name" not in model_cfg["text_cfg"]:
        return open_clip.get_tokenizer(source)
    missing = ArgumentError("name", f"is {folder}, which holds no tokenizer that can be read")
    return _hub_tokenizer(source, str(folder), missing, local_files_only=True)


def _hub_tokenizer(source: str, name: str, missing: ArgumentError, local_files_only: bool) -> Any:
    try:
        # by default transformers asks on the terminal whether to run code of the repository
        return open_clip.get_tokenizer(
            source, trust_remote_code=False, local_files_only=local_files_only
        )
    except ImportError as error:
        raise ArgumentError(
            "name",
            f"is {name!r}, whose tokenizer needs the package transformers",
            "pip install transformers",
        ) from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        if not local_files_only and isinstance(error, OSError):
            raise  # the download failed
        problem = f"{missing.problem} ({first_line(error)})"
        raise ArgumentError(missing.argument, problem, missing.remedy) from error


def saved_config(model_cfg: dict, quick_gelu: bool = False, tokenizer: str | None = None) -> dict:
    """The config, fit for JSON, of which `from_config` builds the same model."""
    model_cfg = copy.deepcopy(model_cfg) | ({"quick_gelu": True} if quick_gelu else {})
    if "timm_model_name" in model_cfg["vision_cfg"]:
        model_cfg["vision_cfg"]["timm_model_pretrained"] = False
    return {"model_cfg": model_cfg, "tokenizer": tokenizer}


def from_config(config: dict, preprocess_cfg: dict) -> tuple[Any, Any]:
    """`Clip.config` and how images are prepared -> an open_clip model and its tokenizer.

    The weights are those of its initialisation, in float32.

    Raises:
        ArgumentError: the config is damaged, would run code, or needs files from the network.
    """
    problem = problem_of_config(config.get("model_cfg"))
    name = config.get("tokenizer")
    if name and name not in open_clip.list_models():
        problem = f"names the tokenizer {name!r}, which is not that of an architecture of open_clip"
    if problem:
        raise ArgumentError("config", problem, "use a CLIP that was saved by this package")
    model_cfg = saved_config(config["model_cfg"])["model_cfg"]
    custom = model_cfg.pop("custom_text", False)
    kind = CustomTextCLIP if custom else CLIP
    if custom and "multimodal_cfg" in model_cfg:
        kind = CoCa
    try:
        model = kind(**model_cfg)
        set_model_preprocess_cfg(model, preprocess_cfg)
    except _WRONG as error:
        raise ArgumentError(
            "config",
            f"gives no CLIP that works ({first_line(error)})",
            "use a CLIP that was saved by this package",
        ) from error
    if name:
        return model, tokenizer_of_name(name)
    text = model_cfg["text_cfg"]
    return model, open_clip.SimpleTokenizer(
        context_length=text.get("context_length", 77), **text.get("tokenizer_kwargs", {})
    )


def problem_of_config(model_cfg: object) -> str:
    """Why a model must not be built from the config of a stranger; "" where it may.

    open_clip passes much of a config to other packages. Some of them run code or download files
    that the config names.
    """
    towers = model_cfg if isinstance(model_cfg, dict) else {}
    vision, text = towers.get("vision_cfg"), towers.get("text_cfg")
    if not isinstance(vision, dict) or not isinstance(text, dict):
        return "has no model_cfg with vision_cfg and text_cfg"
    if "hf_model_name" in text:
        return "has a text tower of Hugging Face, which takes ids only and cannot be searched"
    tower = vision.get("timm_model_name", "")
    if not isinstance(tower, str) or re.search(r"[^\w.-]", tower):
        return f"names the image tower {tower!r}, which is no model of timm itself"
    options = text.get("tokenizer_kwargs", {})
    if not isinstance(options, dict):
        return f"has {options!r} for tokenizer_kwargs"
    for option, value in options.items():
        kind = _TOKENIZER_OPTIONS.get(option)
        if kind is None or not isinstance(value, kind):
            return f"sets {option!r} of the tokenizer to {value!r}, which is not allowed"
    if options.get("clean", "lower") not in _CLEANING:
        return f"sets 'clean' of the tokenizer to {options['clean']!r}, which does not exist"
    return ""
