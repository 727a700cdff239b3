"""`pez doctor`: a self-test of this machine."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_commands(commands: Any) -> None:
    """Add `doctor` to the subparsers of `pez`."""
    command = commands.add_parser(
        "doctor",
        help="test this machine, and print what a bug report needs",
        description="Test this machine for about ten seconds, and print what a bug report needs: "
        "versions, rates, the time of a step, and whether the results of the device agree with "
        "those of the CPU.",
    )
    command.add_argument(
        "--device", metavar="NAME", help="cuda, mps or cpu (default: the first that is available)"
    )
    command.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from ..doctor import examine

    found = examine(arguments.device, lambda part: print(f"testing: {part}", file=sys.stderr))
    print(found)
    return 0 if found.healthy else 1
