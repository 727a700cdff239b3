"""Dispatch to the commands, errors and the exit status."""

from __future__ import annotations

import argparse
import getpass
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from .. import __version__
from ..errors import ArgumentError
from ..lm import command as lm
from . import batch, doctor, learn, models, score
from .arguments import option_name

# Errors that a user can do something about; a traceback would not help.
_EXPECTED = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit status: 0; 1 where one of several items failed; 2 for an error; 130 after Ctrl-C;
        141 where the reader of the output has gone, as for a process that SIGPIPE ends.
    """
    _open_streams()
    _name_user()
    _share_cores()
    status = 0
    try:
        try:
            with _ending_on_ctrl_c():
                status = _run(build_parser().parse_args(argv))
                return status
        finally:
            sys.stdout.flush()  # at exit a closed pipe would be an error that nobody can catch
    except BrokenPipeError:
        _discard_output()
        return 141
    except OSError as error:  # the disk behind the output is full
        _discard_output()
        return status or _fail(str(error))
    except KeyboardInterrupt:
        print("pez: interrupted", file=sys.stderr)
        return 130


def _run(arguments: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.ERROR, format="pez: %(message)s")
    try:
        return arguments.run(arguments)
    except BrokenPipeError:
        raise
    except ArgumentError as error:
        return _fail(error.render(lambda name: option_name(arguments, name)))
    except RecursionError:
        return _fail("an argument or a file is nested too deeply.")
    except _EXPECTED as error:
        return _fail(str(error) or type(error).__name__)


def _share_cores() -> None:
    """Let threads that wait for one another sleep, where torch is not imported yet.

    By default the threads of OpenMP spin while they wait, which takes the cores from those that
    they wait for where other processes use them, too.
    """
    if "torch" not in sys.modules and "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _fail(message: str) -> int:
    print(f"pez: error: {message}", file=sys.stderr)
    return 2


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="pez",
        description="Turn images and long prompts into short text prompts with similar features by "
        "CLIP.",
    )
    parser.add_argument("--version", action="version", version=f"pez {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (learn, score, batch, lm, models, doctor):
        module.add_commands(commands)
    return parser


def _open_streams() -> None:
    """Replace closed streams, and let a terminal show prompts whose letters it lacks."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, as cron and daemons do
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open until the end
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _name_user() -> None:
    """Give a user without a name one, as containers have: torch asks for it when it is imported."""
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):  # ImportError on Windows
        os.environ["USER"] = f"uid{os.getuid()}" if hasattr(os, "getuid") else "user"


@contextmanager
def _ending_on_ctrl_c() -> Iterator[None]:
    """Inside, Ctrl-C ends the command also while torch is imported."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield  # a caller in Python has its own way
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    if getattr(spec, "_initializing", False):
        # an exception here would end the process in C++ code of torch, with a message of its own
        os.write(2, b"pez: interrupted\n")
        os._exit(130)
    raise KeyboardInterrupt


def _discard_output() -> None:
    """Send what is still buffered nowhere, so that Python does not fail to write it at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
