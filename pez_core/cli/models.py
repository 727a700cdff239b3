"""`pez models`: the CLIPs that can be searched on."""

from __future__ import annotations

import argparse
from typing import Any


def add_commands(commands: Any) -> None:
    """Add `models` to the subparsers of `pez`."""
    command = commands.add_parser(
        "models",
        help="list the CLIPs on this disk and those that can be downloaded",
        description="List the CLIPs on this disk and those that can be downloaded.",
    )
    command.set_defaults(run=_models)


def _models(arguments: argparse.Namespace) -> int:
    from ..clip.models import BUNDLED, PRESETS
    from ..clip.weights import tags_on_disk
    from ..folders import models_folder

    print("Bundled (no download):")
    for name in BUNDLED:
        print(f"  {name}")
    print("\nOn this disk:")
    tags = tags_on_disk()
    for name, tag in tags:
        print(f"  {name}:{tag}")
    if not tags:
        print("  none")
    print(f"  (searched: the Hugging Face cache, and {models_folder()} for NAME.TAG.safetensors)")
    print("\nFor download (only with --download):")
    for preset in PRESETS:
        name = f"{preset.name}:{preset.pretrained}"
        print(f"  {name:32s} {preset.size:5.2f} GB  {preset.purpose}")
    return 0
