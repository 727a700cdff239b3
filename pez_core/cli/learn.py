"""`pez invert`, `style`, `distill` and `fuse`: the commands that search prompts."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..captions import check_captioner
from ..errors import ArgumentError
from ..interrupts import interruptible
from ..names import as_utf8
from ..options import IMAGE_WORDING, with_share_of_time
from .arguments import (
    Files,
    add_clip,
    add_search,
    add_vocabulary,
    check_texts,
    option_name,
    prepare,
    search_options,
)
from .captions import Captions, add_captioner
from .pictures import Pictures, add_pictures
from .show import print_json, print_result, row_of, search_bar

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..clip import AnyClip
    from ..options import SearchOptions
    from ..results import Report, Result
    from ..tasks import DistillResult, FuseResult, StyleResult

    Callback = Callable[[Report], bool]
    Interrupted = Callable[[], bool]
    AddCaption = Callable[
        [dict[str, Any], Image, SearchOptions, Interrupted], tuple[str, SearchOptions]
    ]
    Drawn = list[dict[str, Any]]

# Variants of prompts that are searched side by side, of all images and restarts: enough to share
# the cost of a step, few enough to print results early. With the effort "paper" these are 16
# images; "balanced" has 4 variants for each image.
SIDE_BY_SIDE = 16

# Errors in the work for some images, after which the others are still searched.
_FAILURES = (RuntimeError, ArithmeticError, MemoryError)


def add_commands(commands: Any) -> None:
    """Add these commands to the subparsers of `pez`."""
    _add_invert(commands)
    _add_style(commands)
    _add_distill(commands)
    _add_fuse(commands)


# --- invert


def _add_invert(commands: Any) -> None:
    command = commands.add_parser(
        "invert",
        help="find a prompt for each image",
        description="Find a short text prompt for each image. Ctrl-C keeps the best so far.",
    )
    command.add_argument(
        "images", nargs="+", action=Files, metavar="IMAGE", help="image file, or a pattern of files"
    )
    add_search(command, prompt_len="8", wording=IMAGE_WORDING)
    add_steering(command)
    group = command.add_argument_group("several images")
    group.add_argument("--shared", action="store_true", help="find one prompt for all images")
    group.add_argument(
        "--weight",
        action="append",
        type=float,
        metavar="X",
        help="weight of an image with --shared, one for each (default: all the same)",
    )
    add_vocabulary(command)
    add_pictures(command)
    add_clip(command)
    names = {"weights": "--weight", "avoid": "--avoid or --avoid-image"}
    command.set_defaults(run=_invert, names=names)


def add_steering(command: argparse.ArgumentParser, batch: bool = False) -> None:
    """Add the options of `invert` that steer a prompt.

    Args:
        command: to add them to.
        batch: leave out those that need images beside the items.
    """
    group = command.add_argument_group("steering")
    group.add_argument(
        "--caption",
        default="",
        metavar="TEXT",
        help="fixed text of the prompt; learned words go where it has {}, else behind it",
    )
    if batch:
        group.add_argument(
            "--captions",
            action="store_true",
            help="each image has a caption: the text file beside it, or --prompt-column",
        )
    add_captioner(group)
    group.add_argument("--start-from", metavar="TEXT", help="text that the search starts from")
    group.add_argument(
        "--avoid",
        action="append",
        default=[],
        metavar="TEXT",
        help="text that the prompt must not be similar to; may be repeated",
    )
    if not batch:
        group.add_argument(
            "--avoid-image",
            action="append",
            default=[],
            metavar="FILE",
            help="image that the prompt must not be similar to; may be repeated",
        )
    group.add_argument(
        "--avoid-weight",
        type=float,
        default=0.5 if batch else None,
        metavar="X",
        help="weight of all that is avoided, together; the image has weight 1 (default: 0.5)",
    )
    if not batch:
        group.add_argument(
            "--negative-prompt",
            action="store_true",
            help="find a negative prompt: words similar to --avoid and far from the images",
        )


def _prepare(arguments: argparse.Namespace) -> tuple[AnyClip, SearchOptions, Pictures]:
    """The CLIP, the options of the search, and how to show what it finds."""
    search_options(arguments)  # an error in these comes before the models are loaded
    pictures = Pictures(arguments)
    clip, options = prepare(arguments)
    pictures.use(clip)
    return clip, options, pictures


def _invert(arguments: argparse.Namespace) -> int:
    if arguments.weight and not arguments.shared:
        raise ArgumentError("weights", "requires `shared`", "add it")
    check_texts("avoid", arguments.avoid, "--avoid-image")
    check_captioner(
        arguments.captioner,
        arguments.prune_caption,
        caption=arguments.caption,
        shared=arguments.shared,
        negative_prompt=arguments.negative_prompt,
    )
    avoided = arguments.avoid or arguments.avoid_image
    if arguments.avoid_weight is not None and not avoided:
        raise ArgumentError("avoid_weight", "requires `avoid`", "add it")
    needs_captions = arguments.captioner is not None or arguments.prune_caption
    clip, options, pictures = _prepare(arguments)
    captions = Captions(arguments) if needs_captions and not arguments.shared else None
    from .. import Avoid, invert
    from ..clip.images import load_images

    avoid = [*arguments.avoid, *map(Path, arguments.avoid_image)]
    weight = Avoid().weight if arguments.avoid_weight is None else arguments.avoid_weight
    search = partial(
        invert,
        clip,
        caption=arguments.caption,
        avoid=Avoid(avoid, weight) if avoid else (),
        negative_prompt=arguments.negative_prompt,
    )
    if not arguments.shared:
        add = None if captions is None else partial(captions.add, clip=clip)
        return _invert_each(arguments, options, search, pictures, add)
    if arguments.weight:
        arguments.names["shared"] = "--weight"
    shared = arguments.weight or True

    written: dict[str, Any] = {}  # for `--json`

    def task(callback: Callback, interrupted: Interrupted) -> Result:
        if not arguments.prune_caption:
            return search(arguments.images, options, shared=shared, callback=callback)[0]
        began, images = time.monotonic(), load_images(arguments.images)[0]
        caption, own = Captions(arguments).add_given(written, images, options, interrupted, clip)
        own = with_share_of_time(own, 1, began)
        result = search(images, own, caption=caption, shared=shared, callback=callback)[0]
        return replace(result, note=f"{written.pop('note', '')} {result.note}".strip())

    images, weights = list(map(Path, arguments.images)), arguments.weight or None

    def draw(result: Result, interrupted: Interrupted) -> Drawn:
        return pictures.make([result.prompt], [images], interrupted, weights)

    return _one_result(arguments, options, task, pictures, draw, lambda result: written)


def _invert_each(
    arguments: argparse.Namespace,
    options: SearchOptions,
    search: Callable[..., list[Result]],
    pictures: Pictures,
    add_caption: AddCaption | None = None,
) -> int:
    """Search a prompt for each image, some side by side, and print each as soon as it is found.

    Args:
        arguments: of the command.
        options: of the search.
        search: the task without images, options and callback.
        pictures: of the command.
        add_caption: writes the caption of an image into its row, and returns it with the place of
            the learned words, and the options of its search.
    """
    rows: list[dict[str, Any]] = [{"image": path} for path in arguments.images]
    count = 1 if add_caption else _images_side_by_side(options)
    began = time.monotonic()
    try:
        with interruptible() as interrupted:
            for start in range(0, len(rows), count):
                if interrupted():
                    break
                group = rows[start : start + count]
                loaded = _load(arguments, group)
                share = len(group) / (len(rows) - start)
                limited = with_share_of_time(options, share, began)
                captions, own = _with_caption(loaded, limited, interrupted, add_caption)
                limited = replace(own, time_limit=options.time_limit)
                limited = with_share_of_time(limited, share, began)
                with search_bar(limited, _label(start, len(group), len(rows))) as show:
                    watched = partial(
                        search,
                        options=limited,
                        callback=lambda report, show=show: show(report) or interrupted(),
                        **captions,
                    )
                    found = _fill(loaded, watched)
                if not arguments.json:  # not beside the bar
                    _print_found(found)
            _add_pictures(rows, pictures, interrupted)
            was_interrupted = interrupted()
    finally:  # results are printed whatever ends the search
        # an error of the whole command is said once, by its caller
        said_once = sys.exc_info()[0] is not None and not any("prompt" in row for row in rows)
        for row in rows:
            if "prompt" not in row:
                is_known = "error" in row
                row.setdefault("error", "not searched: the command ended before this image")
                if not arguments.json and (is_known or not said_once):
                    print(f"pez: error: {as_utf8(_naming(row))}", file=sys.stderr)
        if arguments.json:
            print_json(rows)
    if was_interrupted:
        return 130
    return 1 if any("error" in row for row in rows) else pictures.status


def _add_pictures(
    rows: Sequence[dict[str, Any]], pictures: Pictures, interrupted: Interrupted
) -> None:
    """Make images of all prompts that were found."""
    found = [row for row in rows if "prompt" in row]
    prompts, images = [row["prompt"] for row in found], [[Path(row["image"])] for row in found]
    for row, drawn in zip(found, pictures.make(prompts, images, interrupted), strict=False):
        row |= {"pictures": [drawn], "page": pictures.page_name}


def _naming(row: dict[str, Any]) -> str:
    """The error of a row, with the name of its image."""
    image, error = row["image"], row["error"]
    return error if image in error or repr(image) in error else f"{image}: {error}"


def _images_side_by_side(options: SearchOptions) -> int:
    if options.language_model is not None:  # takes most of the time, and shares nothing
        return 1
    return max(1, SIDE_BY_SIDE // (options.work.trials * options.restarts))


def _label(start: int, count: int, total: int) -> str:
    """Which images are being searched, "" for a single one."""
    if total == 1:
        return ""
    first, last = start + 1, start + count
    return f"{f'image {first}' if first == last else f'images {first}-{last}'} of {total}"


def _load(
    arguments: argparse.Namespace, rows: Sequence[dict[str, Any]]
) -> list[tuple[dict[str, Any], Image]]:
    """The rows whose image can be read, with it; the others get an error."""
    from ..clip.images import load_image

    loaded = []
    for row in rows:
        try:
            loaded.append((row, load_image(row["image"])))
        except ArgumentError as error:
            row["error"] = error.render(lambda name: option_name(arguments, name))
        except (ValueError, OSError) as error:
            row["error"] = str(error)
    return loaded


def _with_caption(
    loaded: list[tuple[dict[str, Any], Image]],
    options: SearchOptions,
    interrupted: Interrupted,
    add_caption: AddCaption | None,
) -> tuple[dict[str, str], SearchOptions]:
    """The caption of a single image as an argument of the search, and the options for it.

    Where the captioner fails, the row gets an error, and the image is taken out of `loaded`.
    """
    if not loaded or add_caption is None:
        return {}, options
    try:
        caption, options = add_caption(*loaded[0], options, interrupted)
        return {"caption": caption}, options
    except _FAILURES as error:
        loaded.pop()[0]["error"] = str(error) or type(error).__name__
        return {}, options


def _fill(
    loaded: Sequence[tuple[dict[str, Any], Image]], search: Callable[..., list[Result]]
) -> list[tuple[dict[str, Any], Result]]:
    """Search the images together, and fill in their rows; errors where the search fails.

    Returns:
        The rows that have a result, with it.
    """
    if not loaded:
        return []
    rows, images = zip(*loaded, strict=True)
    try:
        results = search(list(images))
        found = [row_of(result) for result in results]
    except _FAILURES as error:
        for row in rows:
            row["error"] = str(error) or type(error).__name__
        return []
    for row, result, fields in zip(rows, results, found, strict=True):
        if "note" in row and "note" in fields:
            fields["note"] = f"{row['note']} {fields['note']}"
        row |= fields | {"seconds": round(result.seconds / len(rows), 3)}
    return list(zip(rows, results, strict=True))


def _print_found(found: Sequence[tuple[dict[str, Any], Result]]) -> None:
    for row, result in found:
        print(as_utf8(row["image"]))
        if "caption" in row:
            print(f"  caption: {as_utf8(row['caption']) or '(empty)'}")
        print("  ", end="")
        print_result(result)
        if "note" in row:
            print(f"pez: {row['note']}", file=sys.stderr)
    sys.stdout.flush()


# --- tasks with one result


def _one_result(
    arguments: argparse.Namespace,
    options: SearchOptions,
    task: Callable[[Callback, Interrupted], Any],
    pictures: Pictures,
    draw: Callable[[Any, Interrupted], Drawn],
    fields: Callable[[Any], dict[str, Any]] = lambda result: {},
    lines: Callable[[Any], list[str]] = lambda result: [],
) -> int:
    """Run a task with a bar, and print its result; Ctrl-C keeps the best so far.

    Args:
        arguments: of the command.
        options: that `task` searches with.
        task: the search, which gets the callback and whether Ctrl-C was pressed.
        pictures: of the command.
        draw: makes images of the result with them.
        fields: of the result, for `--json`.
        lines: about the result, for the terminal.
    """
    with interruptible() as interrupted:
        with search_bar(options) as show:
            result = task(lambda report: show(report) or interrupted(), interrupted)
        if not arguments.json:
            print_result(result)
            for line in lines(result):
                print(line)
            if result.note:
                print(f"pez: {result.note}", file=sys.stderr)
            sys.stdout.flush()
        made: dict[str, Any] = {}
        try:
            if drawn := draw(result, interrupted):
                made = {"pictures": drawn, "page": pictures.page_name}
        finally:
            if arguments.json:
                print_json(row_of(result) | fields(result) | made)
        return 130 if interrupted() else pictures.status


def _add_style(commands: Any) -> None:
    command = commands.add_parser(
        "style",
        help="find one prompt for the style of several images",
        description="Find one prompt for the style that several images share.",
    )
    command.add_argument(
        "images", nargs="+", action=Files, metavar="IMAGE", help="image files of one style"
    )
    add_search(command, prompt_len="8")
    group = command.add_argument_group("style")
    group.add_argument(
        "--subject",
        action="append",
        default=[],
        metavar="TEXT",
        help="also print a prompt for this subject in the style; may be repeated",
    )
    group.add_argument(
        "--style-template",
        metavar="TEXT",
        help="form of a prompt with a subject and the style (default: '{subject}, {style}')",
    )
    group.add_argument(
        "--content",
        action="append",
        default=[],
        metavar="TEXT",
        help="words for the content of the images, which the style prompt must not use; may be "
        "repeated",
    )
    group.add_argument(
        "--keep-content",
        action="store_true",
        help="learn the content that the images share, too, as in the paper",
    )
    group.add_argument(
        "--images-per-step",
        type=int,
        metavar="N",
        help="images drawn at random for each step, with --keep-content (default: all)",
    )
    add_vocabulary(command)
    add_pictures(command)
    add_clip(command)
    command.set_defaults(run=_style)


def _style(arguments: argparse.Namespace) -> int:
    from ..tasks import check_style_template
    from ..tasks.style import STYLE_TEMPLATE

    if arguments.style_template is not None and not arguments.subject:
        raise ArgumentError("style_template", "requires `subject`", "add it")
    template = arguments.style_template
    style_template = STYLE_TEMPLATE if template is None else template
    check_style_template(style_template)
    clip, options, pictures = _prepare(arguments)
    from .. import style

    def task(callback: Callback, _: Interrupted) -> StyleResult:
        return style(
            clip,
            arguments.images,
            options,
            keep_content=arguments.keep_content,
            content=arguments.content,
            images_per_step=arguments.images_per_step,
            callback=callback,
        )

    def applied(result: StyleResult) -> list[str]:
        return [result.apply(subject, style_template) for subject in arguments.subject]

    images = list(map(Path, arguments.images))

    def draw(result: StyleResult, interrupted: Interrupted) -> Drawn:
        prompts = applied(result) or [result.prompt]
        return pictures.make(prompts, [images] * len(prompts), interrupted)

    return _one_result(
        arguments,
        options,
        task,
        pictures,
        draw,
        lambda result: {"applied": applied(result)} if arguments.subject else {},
        lambda result: [f"        {prompt}" for prompt in applied(result)],
    )


def _add_distill(commands: Any) -> None:
    command = commands.add_parser(
        "distill",
        help="shorten a prompt",
        description="Find a shorter prompt with similar CLIP features. Weights and tags stay.",
    )
    command.add_argument("prompt", metavar="PROMPT", help="text to shorten; - reads it from stdin")
    add_search(command, prompt_len="by --ratio")
    add_ratio(command)
    add_vocabulary(command)
    add_pictures(command)
    add_clip(command)
    command.set_defaults(run=_distill)


def add_ratio(command: argparse.ArgumentParser) -> None:
    """Add `--ratio`."""
    command.add_argument(
        "--ratio",
        type=float,
        default=0.3,
        metavar="X",
        help="learned tokens per token of the prompt to shorten (default: 0.3)",
    )


def _distill(arguments: argparse.Namespace) -> int:
    prompt = _from_stdin() if arguments.prompt == "-" else arguments.prompt
    clip, options, pictures = _prepare(arguments)
    from .. import distill

    def task(callback: Callback, _: Interrupted) -> DistillResult:
        return distill(clip, prompt, options, ratio=arguments.ratio, callback=callback)

    def draw(result: DistillResult, interrupted: Interrupted) -> Drawn:
        titles = ("the given prompt", "the shorter prompt")
        return pictures.make([prompt, result.prompt], [[prompt]] * 2, interrupted, titles=titles)

    names = ("tokens_before", "tokens_after", "tokens_saved")
    return _one_result(
        arguments,
        options,
        task,
        pictures,
        draw,
        lambda result: {name: getattr(result, name) for name in names},
        lambda result: [
            f"        {result.tokens_before} tokens before, {result.tokens_after} now, "
            f"{result.tokens_saved} saved"
        ],
    )


def _from_stdin() -> str:
    if sys.stdin is None:
        raise ArgumentError("prompt", "is -, but stdin is closed", "give the text itself")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ArgumentError("prompt", f"from stdin cannot be decoded ({error})") from error


def _add_fuse(commands: Any) -> None:
    command = commands.add_parser(
        "fuse",
        help="join prompts and images into one prompt",
        description="Join prompts, or learn one prompt that is similar to all prompts and images.",
    )
    command.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to join")
    command.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="image as a further source; may be repeated",
    )
    command.add_argument(
        "--weight",
        action="append",
        type=float,
        metavar="X",
        help="weight of a source, one for each prompt and then one for each image (default: all "
        "the same)",
    )
    command.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="most tokens of joined prompts; if they have more, one prompt is learned (default: "
        "the context of the CLIP, 75)",
    )
    command.add_argument(
        "--always-learn",
        action="store_true",
        help="learn one prompt even if the joined prompts fit",
    )
    add_search(command, prompt_len="16")
    add_vocabulary(command)
    add_pictures(command)
    add_clip(command)
    names = {"weights": "--weight", "sources": "PROMPT or --image"}
    command.set_defaults(run=_fuse, names=names)


def _fuse(arguments: argparse.Namespace) -> int:
    check_texts("sources", arguments.prompts, "--image")
    clip, options, pictures = _prepare(arguments)
    sources = [*arguments.prompts, *map(Path, arguments.image)]
    from .. import fuse

    def task(callback: Callback, _: Interrupted) -> FuseResult:
        return fuse(
            clip,
            sources,
            options,
            weights=arguments.weight,
            max_tokens=arguments.max_tokens,
            always_learn=arguments.always_learn,
            callback=callback,
        )

    def lines(result: FuseResult) -> list[str]:
        made = "learned" if result.fused else "joined"
        similarities = zip(result.similarities, sources, strict=True)
        return [
            f"        {result.tokens} tokens, {made}",
            *(f"  {similarity:.4f}  {source}" for similarity, source in similarities),
        ]

    def draw(result: FuseResult, interrupted: Interrupted) -> Drawn:
        return pictures.make([result.prompt], [sources], interrupted, arguments.weight)

    return _one_result(
        arguments,
        options,
        task,
        pictures,
        draw,
        lambda result: {"tokens": result.tokens, "fused": result.fused},
        lines,
    )
