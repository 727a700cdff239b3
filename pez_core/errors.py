"""Errors about arguments, in a form that every front end can show under its own names."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, SupportsIndex

# A text in quotation marks, as `repr` writes it, is a value of the user. An apostrophe behind a
# letter is no quotation mark.
_VALUE_OR_NAME = re.compile(
    r"""(?<!\w)'(?:[^'\\]|\\.)*' | "(?:[^"\\]|\\.)*" | `(?P<name>\w+)`""", re.VERBOSE
)


class ArgumentError(ValueError):
    """An argument has a value that cannot be used.

    Both texts name arguments in backticks, so that a front end can show its own names for them.
    Values of the user stand in quotation marks (`{value!r}`), in which nothing is replaced.

    Args:
        argument: its name in `pez_core`.
        problem: the rest of a sentence that begins with the name: "has to be above 0 but is -1".
        remedy: an imperative without a full stop, "add it"; "" where `problem` implies it.
    """

    def __init__(self, argument: str, problem: str, remedy: str = "") -> None:
        self.argument, self.problem, self.remedy = argument, problem, remedy
        super().__init__(self.render())

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.argument, self.problem, self.remedy)

    def render(self, name_of: Callable[[str], str] = "`{}`".format) -> str:
        """The message with other names for the arguments.

        Args:
            name_of: the name of an argument in `pez_core` -> what stands for it in the message.
        """
        end = f"; {self.remedy}." if self.remedy else "."
        text = f"`{self.argument}` {self.problem}".rstrip(".") + end
        return _replaced(text, name_of)

    def renamed(self, names: Mapping[str, str]) -> ArgumentError:
        """The same error with other names for the arguments that `names` holds."""

        def name_of(name: str) -> str:
            return f"`{names.get(name, name)}`"

        argument = names.get(self.argument, self.argument)
        problem, remedy = (_replaced(text, name_of) for text in (self.problem, self.remedy))
        return type(self)(argument, problem, remedy)

    def about(self, argument: str) -> ArgumentError:
        """The same error about another argument, through which the value came."""
        return type(self)(argument, self.problem, self.remedy)


class PartialError(RuntimeError):
    """A part of some work failed; its `__cause__` is the reason.

    Attributes:
        partial: the work before it.
    """

    def __init__(self, message: str, partial: Any) -> None:
        super().__init__(message)
        self.partial = partial

    def __reduce__(self) -> tuple[type, tuple[str, Any]]:
        return type(self), (str(self), self.partial)


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument has a value of the wrong type: an `ArgumentError` that is a TypeError, too."""


def _replaced(text: str, name_of: Callable[[str], str]) -> str:
    """A text with other names for its arguments."""
    return _VALUE_OR_NAME.sub(
        lambda found: name_of(found["name"]) if found["name"] else found[0], text
    )


def first_line(error: BaseException) -> str:
    """The first line of another library's error, or its type where it has no text.

    Backticks become apostrophes: the names in them are no arguments of this project.
    """
    line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return line.replace("`", "'")


def check_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise unless the argument `name` is an integer from `low` to `high`."""
    problem = f"has to be an integer but is {value!r}"
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise ArgumentTypeError(name, problem)
    try:
        number = operator.index(value)
    except TypeError as error:  # arrays and tensors of other numbers
        raise ArgumentTypeError(name, problem) from error
    if number < low or (high is not None and number > high):
        span = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ArgumentError(name, f"has to be {span} but is {value}")


def check_number(
    name: str, value: object, low: float = 0, high: float | None = None, *, above: bool = False
) -> float:
    """The number; raise unless it is finite and from `low` to `high`.

    Args:
        name: of the argument.
        value: what was given for it.
        low, high: the range; None: without end.
        above: `low` itself is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentTypeError(name, f"has to be a number but is {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    below = number < low or (above and number == low)
    if not math.isfinite(number) or below or (high is not None and number > high):
        if high is not None:
            bound = f"above {low} and at most {high}" if above else f"from {low} to {high}"
        else:
            bound = f"finite and above {low}" if above else f"finite and {low} or more"
        raise ArgumentError(name, f"has to be {bound} but is {value}")
    return number


def check_string(name: str, value: object) -> str:
    """The string; raise where it is something else."""
    if not isinstance(value, str):
        raise ArgumentTypeError(name, f"has to be a string but is {value!r}")
    return value


def check_decoded(name: str, text: str) -> str:
    """The text; raise where it holds bytes that Python could not decode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f"is {text!r}, which holds bytes that are not UTF-8"
        raise ArgumentError(name, problem, "write it in UTF-8") from error
    return text


def check_bool(name: str, value: object) -> None:
    """Raise unless the value is True or False."""
    if not isinstance(value, bool):
        raise ArgumentTypeError(name, f"has to be True or False but is {value!r}")


def check_weights(name: str, weights: object, count: int) -> list[float]:
    """One number above 0 for each of `count`; raise where there are others."""
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise ArgumentTypeError(name, f"has to be a list of numbers but is {weights!r}")
    numbers = [check_number(name, weight, above=True) for weight in weights]
    if len(numbers) != count:
        raise ArgumentError(name, f"has to hold {count} numbers but holds {len(numbers)}")
    return numbers


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise unless the argument `name` is one of `choices`."""
    problem = f"has to be one of {', '.join(map(repr, choices))} but is {value!r}"
    if not isinstance(value, str):
        raise ArgumentTypeError(name, problem)
    if value not in choices:
        raise ArgumentError(name, problem)


def check_type(name: str, value: object, kind: type) -> None:
    """Raise unless the argument `name` is of a class."""
    if not isinstance(value, kind):
        raise ArgumentTypeError(name, f"has to be a {kind.__name__} but is {value!r}")
