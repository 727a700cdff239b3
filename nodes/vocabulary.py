"""PEZ Vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..pez_core import Vocabulary
from ..pez_core.vocabulary import UNSAFE_WORDS
from .errors import naming_widgets
from .inputs import CATEGORY, RARE, PezVocabulary, text
from .models import FOLDER
from .values import phrases

_NO_LIST = "none"


class MakeVocabulary(io.ComfyNode):
    """The words that may appear in learned prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PEZ_Vocabulary",
            display_name="PEZ Vocabulary",
            category=CATEGORY,
            description="Rules for the words that may appear in learned prompts.",
            search_aliases=[
                "word list",
                "block words",
                "safe words",
                "keyword bank",
                "banned words",
            ],
            inputs=[*_usual_inputs(), *_rare_inputs()],
            outputs=[PezVocabulary.Output("vocabulary", tooltip="For the PEZ nodes that learn.")],
        )

    @classmethod
    def validate_inputs(cls, word_list: str = _NO_LIST) -> bool:
        # A list that is missing may never be needed: a kept prompt works without it.
        return True

    @classmethod
    def fingerprint_inputs(cls, word_list: str = _NO_LIST, **_: object) -> tuple[int, int] | None:
        path = _list_file(word_list)
        return (path.stat().st_mtime_ns, path.stat().st_size) if path else None

    @classmethod
    def execute(
        cls,
        only: str,
        block: str,
        block_unsafe: bool,
        ascii_only: bool,
        word_list: str = _NO_LIST,
        and_also: Vocabulary | None = None,
        **rules: Any,
    ) -> io.NodeOutput:
        """`rules`: further arguments of `Vocabulary`."""
        words = [*phrases(only, "only"), *_listed(word_list)]
        vocabulary = Vocabulary(
            only=words or None, block=phrases(block, "block"), ascii_only=ascii_only, **rules
        )
        if block_unsafe:
            vocabulary &= Vocabulary(block=UNSAFE_WORDS, whole_words=False)
        if and_also is not None:
            vocabulary &= and_also
        return io.NodeOutput(vocabulary)


def _usual_inputs() -> list[io.Input]:
    return [
        text(
            "only",
            multiline=True,
            placeholder="all words",
            tooltip="Prompts consist of these words and phrases alone; one per line, or separated "
            "by commas. Empty: words of an English dictionary.",
        ),
        text(
            "block",
            multiline=True,
            placeholder="blocked words",
            tooltip="Words and phrases that must not appear, in any spelling. A * at the end "
            "stands for any ending.",
        ),
        io.Boolean.Input(
            "block_unsafe",
            default=True,
            tooltip="Also block a list of unsafe words. No list is complete.",
        ),
        io.Boolean.Input(
            "ascii_only",
            default=False,
            tooltip="Only characters of an English keyboard: no emoji, no other scripts.",
        ),
    ]


def _rare_inputs() -> list[io.Input]:
    lists = [f for f in folder_paths.get_filename_list(FOLDER) if f.endswith(".txt")]
    return [
        io.Combo.Input(
            "word_list",
            options=[_NO_LIST, *lists],
            default=_NO_LIST,
            **RARE,
            tooltip="A text file in models/pez with one phrase per line, used like `only`.",
        ),
        io.Boolean.Input(
            "whole_words",
            default=True,
            **RARE,
            tooltip="Off: word pieces may appear, too, as in the paper.",
        ),
        io.Float.Input(
            "min_embedding_std",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.001,
            **RARE,
            tooltip="Leave out tokens that were hardly trained, by the standard deviation of "
            "their embedding. 0.005 works for ViT-H/14.",
        ),
        PezVocabulary.Input(
            "and_also",
            optional=True,
            tooltip="Another vocabulary, whose rules apply as well.",
        ),
        io.Boolean.Input(
            "dictionary",
            default=True,
            optional=True,
            advanced=True,
            tooltip="Only words of an English dictionary: no word endings, hashtags, names or "
            "emoji. Off: every word of the CLIP.",
        ),
    ]


def _listed(name: str) -> tuple[str, ...]:
    """The phrases of a word list."""
    if name == _NO_LIST:
        return ()
    path = _list_file(name)
    if path is None:
        raise ValueError(
            f"`word_list` is {name!r}, which is not in models/{FOLDER}; put the file there and "
            "press R, or choose another."
        )
    with naming_widgets({"only": "`word_list`"}):
        return tuple(Vocabulary(only=path).only or ())


def _list_file(name: str) -> Path | None:
    path = folder_paths.get_full_path(FOLDER, name) if name and name != _NO_LIST else None
    return Path(path) if path and path.endswith(".txt") else None
