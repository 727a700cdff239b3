"""Names of files as text, in any locale.

Python decodes them by the encoding of the locale; bytes that it cannot decode become surrogates.
Ids, Parquet files and JSON hold text, which has to be the same in every locale: names are UTF-8
there.
"""

from __future__ import annotations

import os


def text_of(name: str) -> str:
    """A name of this machine -> text.

    Raises:
        UnicodeError: the name is not UTF-8.
    """
    return os.fsencode(name).decode("utf-8")


def name_of(text: str) -> str:
    """Text -> the name under which this machine finds the file."""
    return os.fsdecode(text.encode("utf-8"))


def as_utf8(text: str) -> str:
    """A text with names that the locale decoded -> the text with their characters.

    Bytes that are not UTF-8 stay surrogates.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # it holds surrogates that stand for no byte
        return text


def printable(message: str) -> str:
    """A message as text, with "?" for what is not UTF-8 in the names that it holds."""
    text = message.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return text.replace("\N{REPLACEMENT CHARACTER}", "?")
