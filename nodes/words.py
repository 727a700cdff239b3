"""PEZ Vocabulary."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..pez_core import UNSAFE_WORDS, Vocabulary
from .inputs import CATEGORY, PezVocabulary, naming_widgets, phrases
from .models import FOLDER

_NO_LIST = "none"


class MakeVocabulary(io.ComfyNode):
    """What may appear in learned prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        lists = [f for f in folder_paths.get_filename_list(FOLDER) if f.endswith(".txt")]
        return io.Schema(
            node_id="PEZ_Vocabulary",
            display_name="PEZ Vocabulary",
            category=CATEGORY,
            description="Says which words learned prompts are made of.",
            search_aliases=[
                "word list",
                "block words",
                "safe words",
                "keyword bank",
                "banned words",
            ],
            inputs=[
                io.String.Input(
                    "only",
                    default="",
                    multiline=True,
                    placeholder="all words",
                    tooltip="Prompts are made of these words and phrases alone; one a line, or "
                    "with commas between. Empty: of every word that the CLIP knows.",
                ),
                io.String.Input(
                    "blocked",
                    default="",
                    multiline=True,
                    placeholder="blocked words",
                    tooltip="Words and phrases that must not be read in the prompt, however they "
                    "are spelled. A * at the end stands for any ending.",
                ),
                io.Boolean.Input(
                    "block_unsafe",
                    default=True,
                    tooltip="Also block a list of unsafe words. No list is complete.",
                ),
                io.Boolean.Input(
                    "ascii_only",
                    default=False,
                    tooltip="Only what can be typed on any keyboard: no emoji, no other scripts.",
                ),
                io.Combo.Input(
                    "word_list",
                    options=[_NO_LIST, *lists],
                    default=_NO_LIST,
                    optional=True,
                    advanced=True,
                    tooltip="A text file in models/pez with one phrase a line, used like `only`.",
                ),
                io.Boolean.Input(
                    "whole_words",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Off: also pieces of words, as in the paper.",
                ),
                io.Float.Input(
                    "min_embedding_std",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    optional=True,
                    advanced=True,
                    tooltip="Leave out tokens whose embedding was hardly trained. 0.005 does it "
                    "for ViT-H/14.",
                ),
                PezVocabulary.Input(
                    "and_also",
                    optional=True,
                    tooltip="Another vocabulary, whose rules hold as well.",
                ),
            ],
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
        blocked: str,
        block_unsafe: bool,
        ascii_only: bool,
        word_list: str = _NO_LIST,
        whole_words: bool = True,
        min_embedding_std: float = 0.0,
        and_also: Vocabulary | None = None,
    ) -> io.NodeOutput:
        bank = phrases(only)
        if word_list != _NO_LIST:
            path = _list_file(word_list)
            if path is None:
                raise ValueError(
                    f"`word_list` is {word_list!r}, which is not in models/{FOLDER}; put the file "
                    "there and press R, or choose another."
                )
            with naming_widgets({"`bank`": "`word_list`"}):
                bank += Vocabulary(bank=path).bank
        vocabulary = Vocabulary(
            bank=bank or None,
            blocked=phrases(blocked),
            ascii_only=ascii_only,
            whole_words=whole_words,
            min_embedding_std=min_embedding_std,
        )
        if block_unsafe:
            vocabulary &= Vocabulary(blocked=UNSAFE_WORDS, whole_words=False)
        if and_also is not None:
            vocabulary &= and_also
        return io.NodeOutput(vocabulary)


def _list_file(name: str) -> Path | None:
    path = folder_paths.get_full_path(FOLDER, name) if name and name != _NO_LIST else None
    return Path(path) if path and path.endswith(".txt") else None
