"""Hard prompts that make a language model classify (section 5 of the paper)."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..baselines.soft import SoftProgress
from ..checkpoint import DIGEST, FileCheckpoint
from ..errors import check_integer, check_positive
from ..pez import PezSettings
from ..tracker import Progress
from ..space import TokenSpace
from .methods import METHODS
from .objective import Encoded, Holdout, TaskLoss, judge, room_for
from .reader import Reader, frozen, reader_of
from .text import SENTINEL, Example, Format, all_tokens, whole_words

log = logging.getLogger(__name__)

OPTIMIZERS = ("adafactor", "adamw")
# The gradient of a prompt is cut to this length, as the paper's code does.
_MAX_GRAD_NORM = 1.0
# Weight of the fluency where none is given (section 5).
_FLUENCY = 0.003
# Examples that are held out where no holdout is given, and the seed that draws them.
_HELD_OUT, _HOLDOUT_SEED = 500, 0
# Draws the template that each example is read with, and how many of a label for each are few.
_TEMPLATES_SEED, _FEW = 0, 5


@dataclass(frozen=True)
class Evaluation:
    """How a prompt does on examples.

    Attributes:
        prompt: the text; "" is the template alone, None a soft prompt.
        accuracy: share of examples whose label has the likeliest word, from 0 to 1.
        loss: mean cross-entropy over the words of the labels, in nats.
        perplexity: of the prompt to the model, exp of its mean negative log-likelihood per token;
            None for an encoder-decoder, a soft or an empty prompt.
        labels: the predicted label of each example.
    """

    prompt: str | None
    accuracy: float
    loss: float
    perplexity: float | None
    labels: list[Hashable] = field(repr=False)


@dataclass(frozen=True)
class TunedPrompt:
    """A prompt that one restart learned.

    Attributes:
        prompt: the text.
        accuracy, loss, perplexity: of the text, read again, on the holdout; see `Evaluation`.
        token_ids: the tokens of the text, read again.
        seed: of this restart.
        steps: that were done.
        history: `(step, best score so far)` of each look at the holdout; `Holdout` says what the
            score is.
        embeddings: (prompt_len, dim) of a soft prompt, those that the last step began with; else
            None.
    """

    prompt: str
    accuracy: float
    loss: float
    perplexity: float | None
    token_ids: list[int] = field(repr=False)
    seed: int
    steps: int
    history: list[tuple[int, float]] = field(repr=False)
    embeddings: torch.Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Tuned(TunedPrompt):
    """What `tune_prompt` returns: the best restart and how it was found.

    Attributes:
        candidates: one per restart, by accuracy on the holdout, then by loss; the first is this
            prompt. Fewer than asked for where the callback ended the search.
        seconds: of the whole search.
    """

    candidates: list[TunedPrompt] = field(repr=False, kw_only=True)
    seconds: float = field(kw_only=True)


def tune_prompt(
    model: torch.nn.Module,
    tokenizer: Any,
    dataset: Sequence[Example],
    template: str,
    verbalizer: Mapping[Hashable, str],
    prompt_len: int = 10,
    steps: int = 5000,
    lr: float = 0.3,
    fluency: float | None = None,
    batch_size: int = 32,
    optimizer: str = "adafactor",
    *,
    holdout: Sequence[Example] | None = None,
    method: str = "pez",
    weight_decay: float = 0.0,
    seed: int = 0,
    restarts: int = 1,
    initial: str | None = None,
    whole_words_only: bool = True,
    other_templates: Sequence[str] = (),
    check_every: int = 100,
    accumulate: int = 1,
    max_length: int = 128,
    checkpoint: str | Path | None = None,
    callback: Callable[[dict], bool | None] | None = None,
) -> Tuned:
    """Learn a hard prompt for a classification task (section 5; defaults are the paper's).

    The prompt stands before the example. The loop is that of CLIP, `pez_core.search.search`, on
    (1 - fluency) * task loss + fluency * next-token loss of the prompt. The best prompt is the one
    with the highest accuracy on the holdout, measured on the text as it is printed and read again.

    Args:
        model: of transformers, causal or encoder-decoder, in any precision; left as it was.
        tokenizer: its tokenizer.
        dataset: examples, `(text, label)`, where text may also be a mapping from the names of the
            template's columns to text. Texts may be empty.
        template: what the model reads for an example, such as "{text} It was"; the word of the
            label follows. For T5 it may have `<extra_id_0>` where the word belongs.
        verbalizer: label -> word, such as {0: "negative", 1: "positive"}; see `Format`.
        prompt_len: tokens of the prompt, at least 1.
        steps: at least 1.
        lr: learning rate, above 0.
        fluency: lambda, from 0 to 1. None: 0.003, and 0 for encoder-decoders, which cannot tell how
            likely a prompt is that their encoder reads.
        batch_size: examples per step, at least 1.
        optimizer: "adafactor" as in the paper, or "adamw"; gradients are cut to a norm of 1.
        holdout: examples to choose the best prompt by. None: half of `dataset`, at most 500, the
            same for every seed; they are not learned from.
        method: "pez", or a rival of it: "autoprompt-sgd", "fluentprompt", "soft-prompt",
            "pez-as-released" (see `pez_core.lm.methods`), "empty" (the template alone).
        weight_decay: of the optimiser, 0 or more.
        seed: of the initial prompt and of the batches; restart k has `seed + k`.
        restarts: searches one after the other, at least 1.
        initial: text to start from, repeated and cut to `prompt_len`. None: random tokens.
        whole_words_only: only tokens that begin a word, so that the printed prompt is read back as
            it was learned, but for the first word, which has no space before it. False: all tokens,
            as in the paper. What is printed is what is chosen by and reported in either case.
        other_templates: further templates, such as "{text} The film is". Each example, those of the
            holdout, too, is read with one of them or with `template`, drawn once; where a label has
            few, each is read with all. Prompts that suit several carry over to other models more
            evenly.
        check_every: steps between two looks at the holdout, at least 1.
        accumulate: parts that a batch is read in to save memory, at least 1.
        max_length: tokens of an example with its template; longer texts are cut at their end.
        checkpoint: file that the search is kept in every `check_every` steps, and goes on from
            where it is there; with several restarts one each, with the restart in its name.
        callback: gets one dict per step (on a GPU every 25, with "soft-prompt" one per look at the
            holdout): `step`, `steps`, `restart`, `restarts`, `prompt` and `score` of the best at
            the last look, `elapsed` seconds. A true return value ends the search, and the best so
            far is returned.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        FloatingPointError: a loss or gradient became NaN or infinite, as half precision may; says
            which precision to try.
    """
    began = time.monotonic()
    for name, value in [
        ("prompt_len", prompt_len),
        ("batch_size", batch_size),
        ("restarts", restarts),
        ("check_every", check_every),
        ("accumulate", accumulate),
        ("max_length", max_length),
    ]:
        check_integer(name, value, 1)
    check_integer("seed", seed, -(2**63), 2**63 - 1)
    if method not in METHODS:
        raise ValueError(f"`method` is {method!r}; it has to be one of {', '.join(METHODS)}.")
    settings = PezSettings(
        steps=steps,
        lr=lr,
        weight_decay=weight_decay,
        # a soft prompt is projected and read once more for each report; on a GPU, where a report
        # waits for the device, there is one for each look at the holdout and a few between
        report_every=check_every
        if method == "soft-prompt"
        else (None if _device(model).type == "cpu" else math.gcd(25, check_every)),
        optimizer=_optimizer(optimizer, lr, weight_decay),
    )
    dataset, holdout = _held_out(dataset, holdout)
    with frozen(model):
        texts = _formats(tokenizer, template, other_templates, verbalizer, max_length)
        text = texts[0]
        reader = reader_of(model, text)
        fluency = _fluency(fluency, reader)
        examples, held = _read(texts, dataset, True), _read(texts, holdout, True)
        _check_context(reader, prompt_len, [*examples, *held])
        if METHODS[method] is None:
            held = _read(texts, holdout, False)
            found = [_result(reader, "", held, batch_size, seed)]
            return Tuned(**vars(found[0]), candidates=found, seconds=time.monotonic() - began)
        words = whole_words(tokenizer) if whole_words_only else all_tokens(tokenizer)
        space = TokenSpace(reader.table, words.to(reader.device))
        # what a checkpoint has to agree on
        search = {
            "model": _digest_of(model),
            "dataset": _digest(json.dumps([examples, held]).encode()),
            "template": template,
            "other_templates": list(other_templates),
            "verbalizer": text.label_ids,
            "method": method,
            "prompt_len": prompt_len,
            "steps": steps,
            "lr": lr,
            "fluency": fluency,
            "batch_size": batch_size,
            "optimizer": optimizer,
            "weight_decay": weight_decay,
            "initial": initial,
            "whole_words_only": whole_words_only,
            "check_every": check_every,
        }
        files: list[FileCheckpoint | None] = [None] * restarts
        if checkpoint is not None:
            files = [
                FileCheckpoint(path, search | {"seed": seed + restart}, check_every)
                for restart, path in enumerate(_paths(Path(checkpoint), restarts))
            ]
        found: list[TunedPrompt] = []
        for restart in range(restarts):
            generator = torch.Generator().manual_seed((seed + restart) % 2**63)
            chooser = Holdout(reader, held, batch_size)
            loss = TaskLoss(
                reader, space, examples, chooser, batch_size, fluency, accumulate, steps,
                check_every, seed + restart,
            )  # fmt: skip
            try:
                progress = METHODS[method](
                    space,
                    loss,
                    _initial(initial, text, space, prompt_len, generator),
                    settings,
                    callback and partial(_report, callback, text, restart, restarts),
                    generator=generator,
                    checkpoint=files[restart],
                )
            except FloatingPointError as error:
                if not found:
                    raise
                log.warning("restart %d of %d failed: %s", restart + 1, restarts, error)
                continue
            soft = progress.embeddings[0].cpu() if isinstance(progress, SoftProgress) else None
            history = [
                (step, scores[0])
                for step, scores in progress.history
                if loss.looks_at_holdout(step)
            ]
            prompt = text.print(progress.ids[0].tolist())
            how = (seed + restart, progress.step, history, soft)
            found.append(_result(reader, prompt, held, batch_size, *how))
            if progress.stopped:
                break
    found.sort(key=lambda one: (-one.accuracy, one.loss))
    log.debug("tuned %d prompts", len(found))
    return Tuned(**vars(found[0]), candidates=found, seconds=time.monotonic() - began)


def evaluate(
    model: torch.nn.Module,
    tokenizer: Any,
    prompt: str | torch.Tensor,
    dataset: Sequence[Example],
    template: str,
    verbalizer: Mapping[Hashable, str],
    batch_size: int = 32,
    max_length: int = 128,
) -> Evaluation:
    """How well a model classifies behind a prompt; the prompt may come from another model.

    Args:
        model, tokenizer, template, verbalizer, max_length: as in `tune_prompt`.
        prompt: text; "" for the template alone. Or (prompt_len, dim) embeddings of a soft prompt,
            which no other model can read.
        dataset: examples, at least one.
        batch_size: examples read at once.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        FloatingPointError: losses are NaN or infinite, as half precision may make them.
    """
    check_integer("batch_size", batch_size, 1)
    check_integer("max_length", max_length, 1)
    soft = isinstance(prompt, torch.Tensor)
    if not soft and not isinstance(prompt, str):
        raise TypeError(f"`prompt` has to be text or embeddings but is {prompt!r}.")
    _check_examples("dataset", dataset)
    with frozen(model):
        text = Format(tokenizer, template, verbalizer, max_length)
        reader = reader_of(model, text)
        width = reader.table.shape[1]
        if soft and (prompt.ndim != 2 or prompt.shape[1] != width):
            raise ValueError(
                f"`prompt` has to be (prompt_len, {width}) embeddings for this model but is "
                f"{tuple(prompt.shape)}."
            )
        given = prompt.to(reader.device) if soft else text.prompt_ids(prompt)
        examples = text.read(dataset, len(given) > 0)
        _check_context(reader, len(given), examples)
        predicted, accuracy, loss, said = judge(reader, given, examples, batch_size)
    labels = [text.labels[k] for k in predicted]
    return Evaluation(None if soft else prompt, accuracy, loss, _perplexity(said), labels)


def few_shot(
    dataset: Sequence[Example], shots: int, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """Few examples to learn from and as many to choose by (section 5.1).

    Args:
        dataset: examples.
        shots: of each label in each of the two (k in the paper), at least 1.
        seed: of the draw.

    Raises:
        ValueError: a label has fewer than `2 * shots` examples.
    """
    check_integer("shots", shots, 1)
    by_label: dict[Hashable, list[Example]] = defaultdict(list)
    for example in dataset:
        by_label[example[1]].append(example)
    generator = torch.Generator().manual_seed(seed % 2**63)
    learned: list[Example] = []
    held: list[Example] = []
    for label, examples in by_label.items():
        if len(examples) < 2 * shots:
            raise ValueError(
                f"`shots` is {shots}, but label {label!r} has {len(examples)} examples, not the "
                f"{2 * shots} for learning and choosing."
            )
        order = torch.randperm(len(examples), generator=generator).tolist()
        learned += [examples[k] for k in order[:shots]]
        held += [examples[k] for k in order[shots : 2 * shots]]
    return learned, held


def _optimizer(
    name: str, lr: float, weight_decay: float
) -> Callable[[list[torch.Tensor]], torch.optim.Optimizer]:
    if name not in OPTIMIZERS:
        raise ValueError(f"`optimizer` is {name!r}; it has to be one of {', '.join(OPTIMIZERS)}.")

    def make(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
        if name == "adamw":
            optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
        else:
            from transformers.optimization import Adafactor

            fixed = {"relative_step": False, "scale_parameter": False, "warmup_init": False}
            optimizer = Adafactor(parameters, lr=lr, weight_decay=weight_decay, **fixed)

        def cut(*_: object) -> None:
            torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRAD_NORM)

        optimizer.register_step_pre_hook(cut)
        return optimizer

    return make


def _held_out(
    dataset: Sequence[Example], holdout: Sequence[Example] | None
) -> tuple[list[Example], list[Example]]:
    dataset = list(dataset)
    _check_examples("dataset", dataset)
    if holdout is not None:
        _check_examples("holdout", holdout)
        return dataset, list(holdout)
    if len(dataset) < 2:
        raise ValueError("`dataset` has one example; give more, or a `holdout`.")
    generator = torch.Generator().manual_seed(_HOLDOUT_SEED)
    order = torch.randperm(len(dataset), generator=generator).tolist()
    count = min(len(dataset) // 2, _HELD_OUT)
    return [dataset[k] for k in order[count:]], [dataset[k] for k in order[:count]]


def _check_examples(name: str, examples: Sequence[Example]) -> None:
    if len(examples) == 0:
        raise ValueError(f"`{name}` is empty; give at least one example.")
    for example in examples:
        if not isinstance(example, (tuple, list)) or len(example) != 2:
            raise TypeError(f"`{name}` has to hold (text, label) pairs but holds {example!r}.")


def _formats(
    tokenizer: Any,
    template: str,
    other_templates: Sequence[str],
    verbalizer: Mapping[Hashable, str],
    max_length: int,
) -> list[Format]:
    """One for each template."""
    if isinstance(other_templates, str) or not isinstance(other_templates, Sequence):
        raise TypeError(
            f"`other_templates` has to be a list of templates but is {other_templates!r}."
        )
    texts = []
    for k, one in enumerate((template, *other_templates)):
        with _naming(k):
            texts.append(Format(tokenizer, one, verbalizer, max_length))
    if len({SENTINEL in text.template for text in texts}) > 1:
        raise ValueError(
            f"`other_templates` is {other_templates!r} and `template` {template!r}; {SENTINEL} has "
            "to be in all of them or in none."
        )
    return texts


@contextmanager
def _naming(k: int) -> Iterator[None]:
    """Inside, errors about the template with number `k` name the argument that it comes from."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if k == 0:
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        text = str(error).replace("`template`", f"`other_templates[{k - 1}]`")
        raise kind(text) from error


def _read(texts: Sequence[Format], dataset: Sequence[Example], prompted: bool) -> list[Encoded]:
    """Examples, each with one of the templates, whichever the seed of a search is.

    Where a label has few, each is read with all: else a template would tell the label.
    """
    generator = torch.Generator().manual_seed(_TEMPLATES_SEED)
    drawn = torch.randint(len(texts), (len(dataset),), generator=generator).tolist()
    each = list(zip(drawn, dataset, strict=True))
    if min(Counter(str(label) for _, label in dataset).values()) < _FEW * len(texts):
        each = [(k, one) for one in dataset for k in range(len(texts))]
    rows: list[Encoded] = []
    for k, one in each:
        with _naming(k):
            rows += texts[k].read([one], prompted)
    return rows


def _fluency(fluency: float | None, reader: Reader) -> float:
    if fluency is None:
        return _FLUENCY if reader.has_fluency else 0.0
    check_positive("fluency", fluency, or_zero=True)
    if fluency > 1:
        raise ValueError(f"`fluency` has to be from 0 to 1 but is {fluency}.")
    if fluency > 0 and not reader.has_fluency:
        raise ValueError(
            f"`fluency` is {fluency}, but an encoder-decoder cannot tell how likely the prompt is "
            "that its encoder reads; set it to 0."
        )
    return float(fluency)


def _check_context(reader: Reader, prompt_len: int, examples: Sequence[Encoded]) -> None:
    if room_for(reader, prompt_len, examples) < 0:
        longest = max(len(ids) for ids, _ in examples)
        raise ValueError(
            f"A prompt of {prompt_len} tokens (`prompt_len`) and an example of {longest} do not "
            f"fit in the {reader.context} tokens that the model reads; take a shorter prompt or a "
            "lower `max_length`."
        )


def _initial(
    initial: str | None,
    text: Format,
    space: TokenSpace,
    prompt_len: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """(1, prompt_len) ids to start from."""
    if initial is None:
        return space.random(1, prompt_len, generator)
    if not isinstance(initial, str):
        raise TypeError(f"`initial` has to be text or None but is {initial!r}.")
    ids = text.continuation(initial.strip())
    if not initial.strip():
        raise ValueError(f"`initial` is {initial!r}; give words, or None for random tokens.")
    times = -(-prompt_len // len(ids))
    return torch.tensor([(ids * times)[:prompt_len]], device=space.table.device)


def _report(
    callback: Callable[[dict], bool | None],
    text: Format,
    restart: int,
    restarts: int,
    progress: Progress,
) -> bool | None:
    return callback(
        {
            "step": progress.step,
            "steps": progress.steps,
            "restart": restart,
            "restarts": restarts,
            "prompt": text.print(progress.ids[0].tolist()),
            "score": float(progress.scores[0]),
            "elapsed": progress.elapsed,
        }
    )


def _result(
    reader: Reader,
    prompt: str,
    held: Sequence[Encoded],
    batch_size: int,
    seed: int,
    steps: int = 0,
    history: Sequence[tuple[int, float]] = (),
    embeddings: torch.Tensor | None = None,
) -> TunedPrompt:
    ids = reader.text.prompt_ids(prompt)
    _check_context(reader, len(ids), held)
    _, accuracy, loss, said = judge(reader, ids, held, batch_size)
    measured = (accuracy, loss, _perplexity(said))
    return TunedPrompt(prompt, *measured, ids, seed, steps, list(history), embeddings)


def _perplexity(fluency: float | None) -> float | None:
    return None if fluency is None else math.exp(fluency)


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def _paths(path: Path, restarts: int) -> list[Path]:
    """The file of each restart."""
    if restarts == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{k}{path.suffix}") for k in range(restarts)]


def _digest_of(model: torch.nn.Module) -> str:
    """Differs where the architecture or any weight matrix begins otherwise."""
    beginnings = [weight.detach().flatten()[:64].float().cpu() for weight in model.parameters()]
    config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    return _digest(config.encode() + torch.cat(beginnings).numpy().tobytes())


def _digest(data: bytes) -> str:
    return DIGEST + hashlib.sha256(data).hexdigest()[:16]
