"""Errors of `pez_core` under the names that people see on the nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ..pez_core.errors import ArgumentError


@contextmanager
def naming_widgets(names: Mapping[str, str]) -> Iterator[None]:
    """Raise errors about arguments as errors about widgets.

    Args:
        names: an argument of `pez_core` -> the widget it came from. An argument that is not listed
            has the name of its widget.
    """
    try:
        yield
    except ArgumentError as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(error.render(lambda name: names.get(name, f"`{name}`"))) from error
    except FloatingPointError as error:
        raise FloatingPointError(
            "Score or gradient became NaN or infinite; choose another `precision` in PEZ Load "
            "CLIP, such as float32."
        ) from error
