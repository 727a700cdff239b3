"""Run tests on changed copies of a module, in forks of one process that has collected the tests."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

# A run that waits instead of computing ends after this many times its limit, and ten minutes.
WAITING, AT_LEAST = 10, 600
MEMORY = 8 << 30  # bytes that a run may take
CALLS = 1000  # calls of a function that are traced in each test


def fork(work: Callable[[], bool], limit: int | None = None) -> str:
    """Run a function in a fork: "" where it returns True, "failed" or "time limit".

    Args:
        work: the function; what it prints is lost.
        limit: seconds of processor time; other load of the machine does not count.
    """
    pid = os.fork()
    if not pid:
        code = 2
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            if limit:
                resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, 1)
            os.dup2(nothing, 2)
            code = 0 if work() else 1
        finally:
            os._exit(code)
    end = time.monotonic() + (WAITING * limit + AT_LEAST if limit else float("inf"))
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        time.sleep(0.01)
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # processes that tests started
    code = os.waitstatus_to_exitcode(ended[1])
    if code == 2:
        raise RuntimeError("A fork failed.")
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return "time limit"
    return "failed" if code else ""


class Record:
    """The tests that run each line of a file, and their seconds.

    Args:
        file: its path, as its module has it.
        items: all tests, which run in a fork.

    The program ends where a test fails.
    """

    def __init__(self, file: str, items: Sequence[pytest.Item]) -> None:
        self._file, self._items = file, {item.nodeid: item for item in items}
        with tempfile.NamedTemporaryFile("w+") as out:
            failed = fork(lambda: self._write(Path(out.name)))
            found = json.load(out)
        if failed:
            pytest.exit(f"{found['failed']}\nfails without any fault.", 1)
        self._lines: dict[str, list[str]] = found["lines"]
        self._seconds: dict[str, float] = found["seconds"]
        for name in found["modules"]:  # those that tests import, so that forks have them
            with suppress(Exception):
                importlib.import_module(name)

    def _write(self, out: Path) -> bool:
        lines: dict[int, set[str]] = {}
        calls: Counter[CodeType] = Counter()
        seconds, now = {}, ""

        def trace(frame: FrameType, event: str, _: object) -> Any:
            if frame.f_code.co_filename != self._file:
                return None
            if event == "call":
                calls[frame.f_code] += 1
                return trace if calls[frame.f_code] <= CALLS else None
            if event == "line":
                lines.setdefault(frame.f_lineno, set()).add(now)
            return trace

        items = list(self._items.values())
        for item, after in zip(items, [*items[1:], None], strict=True):
            now, began = item.nodeid, time.monotonic()
            calls.clear()
            sys.settrace(trace)  # a test may have set another
            failed = failure(item, after)
            sys.settrace(None)
            seconds[now] = time.monotonic() - began
            if failed:
                out.write_text(json.dumps({"failed": f"{failed}\n{now}"}))
                return False
        found = {line: sorted(names) for line, names in lines.items()}
        found = {"lines": found, "seconds": seconds, "modules": list(sys.modules)}
        out.write_text(json.dumps(found))
        return True

    def tests(self, lines: Iterable[int] | None) -> list[pytest.Item]:
        """The tests that run any of some lines, the quick ones first; None: all."""
        if lines is None:
            names = set(self._items)
        else:
            names = {name for line in lines for name in self._lines.get(str(line), ())}
        return [self._items[name] for name in sorted(names, key=self._seconds.__getitem__)]

    def seconds(self, items: Iterable[pytest.Item]) -> float:
        return sum(self._seconds[item.nodeid] for item in items)


def failure(item: pytest.Item, after: pytest.Item | None) -> str:
    """Run a test; the message where it fails. `after` is the next one, which may share fixtures."""
    reports = runtestprotocol(item, log=False, nextitem=after)
    return "\n".join(report.longreprtext for report in reports if report.failed)


def all_pass(items: Sequence[pytest.Item]) -> bool:
    following = [*items[1:], None]
    try:
        return not any(failure(*pair) for pair in zip(items, following, strict=True))
    except BaseException:  # a test may end the program
        return False


def replace_code(module: ModuleType, code: ast.Module) -> bool:
    """Give a module the code of a changed copy, wherever its functions and classes are referred to.

    The functions of the module stay the same objects, with other code and defaults.

    Returns:
        False where the copy cannot be imported.
    """
    new = ModuleType(module.__name__)
    vars(new).update(__package__=module.__package__, __file__=module.__file__)
    try:
        exec(compile(code, str(module.__file__), "exec", dont_inherit=True), vars(new))
    except Exception:
        return False
    _merge(module, new, module)
    return True


def _merge(old: Any, new: Any, module: ModuleType) -> None:
    """Move the functions and values of a module or class to another of the same names."""
    for name, value in list(vars(new).items()):
        before = vars(old).get(name)
        function, previous = _function(value), _function(before)
        if value is before:
            continue
        if isinstance(value, type) and value.__module__ == module.__name__:
            _merge(before, value, module)
        elif function and previous:
            if len(function.__code__.co_freevars) != len(previous.__code__.co_freevars):
                # it no longer calls `super`; the function itself could not get such code
                setattr(old, name, FunctionType(function.__code__, vars(module)))
                function, previous = _function(value), vars(old)[name]
            previous.__code__ = function.__code__
            previous.__defaults__ = function.__defaults__
            previous.__kwdefaults__ = function.__kwdefaults__
        elif not name.startswith("__") and name != "_abc_impl":
            setattr(old, name, value)
        if hasattr(before, "cache_clear"):
            before.cache_clear()
    for name in set(vars(old)) - set(vars(new)):
        if not name.startswith("__"):
            delattr(old, name)


def _function(value: Any) -> FunctionType | None:
    """The function of a method, property or decorated function."""
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, cached_property):
        value = value.func
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if not isinstance(value, type) and callable(value):
        value = inspect.unwrap(value)
    return value if isinstance(value, FunctionType) else None
