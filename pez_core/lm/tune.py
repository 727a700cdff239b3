"""Hard prompts that make a language model classify (section 5 of the paper)."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..baselines.soft import SoftProgress
from ..errors import (
    ArgumentError,
    ArgumentTypeError,
    check_choice,
    check_integer,
    check_number,
    check_string,
)
from ..pez import PezSettings
from ..seeds import restart_seed
from ..space import TokenSpace
from ..tracker import Progress
from .checkpoint import FileCheckpoint, digest
from .choices import OPTIMIZERS
from .classifier import PromptedClassifier, classifier_of, frozen
from .evaluation import check_context, perplexity_of
from .methods import METHODS
from .objective import Encoded, Holdout, TaskLoss, classify
from .splits import split_holdout
from .text import SENTINEL, Example, Format, all_tokens, whole_words

log = logging.getLogger(__name__)

# The gradient of a prompt is clipped to this norm, as in the paper's code.
_MAX_GRAD_NORM = 1.0
# Weight of the fluency where none is given (section 5).
_FLUENCY = 0.003
# Seed of the draw of a template for each example; with fewer examples of a label per template,
# every example is read with every template.
_TEMPLATES_SEED, _FEW = 0, 5


@dataclass(frozen=True)
class TunedPrompt:
    """The prompt that one restart learned.

    Attributes:
        prompt: the text.
        accuracy, loss, perplexity: of the text, tokenized again, on the holdout; see
            `PromptEvaluation`.
        token_ids: the tokens of the text, tokenized again.
        seed: of this restart.
        steps: steps done.
        history: `(step, best score so far)` of each check of the holdout; see `Holdout` for the
            score.
        embeddings: (prompt_len, dim) of a soft prompt, with which the last step began; else None.
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
    """The result of `tune_prompt`: the prompt of the best restart, and the other ones.

    Attributes:
        candidates: one per restart, by accuracy on the holdout, then by loss; the first is this
            prompt. Fewer than `restarts` where the callback ended the search.
        seconds: of the whole search.
    """

    candidates: list[TunedPrompt] = field(repr=False, kw_only=True)
    seconds: float = field(kw_only=True)


@dataclass(frozen=True)
class TuneReport:
    """The state of a running search, for a callback.

    Attributes:
        step, steps: steps done by this restart, and how many there will be.
        restart, restarts: number of this restart, counted from 0, and how many there will be.
        prompt, score: the best at the last check of the holdout.
        elapsed: seconds since this restart began.
    """

    step: int
    steps: int
    restart: int
    restarts: int
    prompt: str
    score: float
    elapsed: float


TuneCallback = Callable[[TuneReport], "bool | None"]


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
    start_from: str | None = None,
    whole_words_only: bool = True,
    other_templates: Sequence[str] = (),
    check_every: int = 100,
    accumulate: int = 1,
    max_length: int = 128,
    checkpoint: str | Path | None = None,
    callback: TuneCallback | None = None,
) -> Tuned:
    """Learn a hard prompt for a classification task (section 5; defaults are the paper's).

    The prompt stands before the example. The loop is that of CLIP, `pez_core.search`, on
    (1 - fluency) * task loss + fluency * next-token loss of the prompt. The best prompt is the one
    with the highest accuracy on the holdout, measured on the printed text, tokenized again.

    Args:
        model: of transformers, causal or encoder-decoder, in any precision; it is not changed.
        tokenizer: its tokenizer.
        dataset: examples, `(text, label)`, where text may also be a mapping from the names of the
            template's columns to text. Texts may be empty.
        template: the text of an example for the model, such as "{text} It was"; the word of the
            label follows. For T5 it may hold `<extra_id_0>` at the place of the word.
        verbalizer: label -> word, such as {0: "negative", 1: "positive"}; see `Format`.
        prompt_len: tokens of the prompt, at least 1.
        steps: at least 1.
        lr: learning rate, above 0.
        fluency: lambda, from 0 to 1. None: 0.003, and 0 for encoder-decoders, which give no
            likelihood of a prompt that their encoder reads.
        batch_size: examples per step, at least 1.
        optimizer: "adafactor" as in the paper, or "adamw"; gradients are clipped to a norm of 1.
        holdout: examples by which the best prompt is chosen. None: half of `dataset`, at most 500,
            the same for every seed; nothing is learned from them.
        method: "pez", or a baseline: "autoprompt-sgd", "fluentprompt", "soft-prompt",
            "pez-as-released" (see `pez_core.lm.methods`), "empty" (the template alone).
        weight_decay: of the optimiser, 0 or more.
        seed: of the initial prompt and of the batches; restarts beyond the first have independent
            streams of it.
        restarts: searches one after the other, at least 1.
        start_from: text that the search starts from, repeated and cut to `prompt_len`. None: random
            tokens.
        whole_words_only: only tokens that begin a word, so that the printed prompt round-trips,
            except for the first word, which has no space before it. False: all tokens, as in the
            paper. In either case the printed prompt is the one that is chosen by and reported.
        other_templates: further templates, such as "{text} The film is". Each example, also of the
            holdout, is read with one of them or with `template`, drawn once; if a label has few
            examples, each is read with all templates. Prompts that work with several templates
            transfer to other models more evenly.
        check_every: steps between two checks of the holdout, at least 1.
        accumulate: parts that a batch is processed in, to save memory, at least 1.
        max_length: tokens of an example with its template; longer texts are cut at their end.
        checkpoint: file in which the search is saved every `check_every` steps, and from which it
            resumes where the file exists; with several restarts one file each, with the number of
            the restart in its name.
        callback: called with a `TuneReport` after each step (on a GPU every 25 steps, with
            "soft-prompt" at each check of the holdout). A true return value ends the search, which
            returns the best so far.

    Raises:
        ArgumentError: an argument is not as above; the message names it.
        FloatingPointError: a loss or gradient became NaN or infinite, which half precision can
            cause; the message names a precision to try.
    """
    given = locals().copy()
    began = time.monotonic()
    for name in _COUNTS:
        check_integer(name, given[name], 1)
    check_integer("seed", seed, -(2**63), 2**63 - 1)
    check_choice("method", method, tuple(METHODS))
    settings = _settings(model, method, steps, lr, weight_decay, optimizer, check_every)
    dataset, holdout = split_holdout(dataset, holdout)
    with frozen(model):
        formats = _formats(tokenizer, template, other_templates, verbalizer, max_length)
        classifier = classifier_of(model, formats[0])
        fluency = _fluency(fluency, classifier)
        examples, held = _encoded(formats, dataset, True), _encoded(formats, holdout, True)
        check_context(classifier, prompt_len, [*examples, *held], "prompt_len")
        search = METHODS[method]
        if search is None:
            held = _encoded(formats, holdout, False)
            found = [_measured(classifier, "", held, batch_size, seed)]
        else:
            options = {name: given[name] for name in _OPTIONS} | {"fluency": fluency}
            words = whole_words(tokenizer) if whole_words_only else all_tokens(tokenizer)
            space = TokenSpace(classifier.table, words.to(classifier.device))
            tuning = _Tuning(
                classifier, space, search, examples, held, settings, accumulate, options
            )
            found = tuning.run(restarts, checkpoint, callback)
    found.sort(key=lambda one: (-one.accuracy, one.loss))
    log.debug("tuned %d prompts", len(found))
    return Tuned(**vars(found[0]), candidates=found, seconds=time.monotonic() - began)


_COUNTS = ("prompt_len", "batch_size", "restarts", "check_every", "accumulate", "max_length")
# Arguments that a checkpoint has to agree with.
_OPTIONS = (
    "template", "other_templates", "method", "prompt_len", "steps", "lr", "fluency", "batch_size",
    "optimizer", "weight_decay", "start_from", "whole_words_only", "check_every", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class _Tuning:
    """The search of `tune_prompt`, after its arguments are checked and its examples are encoded.

    Attributes:
        search: of `METHODS`.
        options: the arguments of `_OPTIONS`.
    """

    classifier: PromptedClassifier
    space: TokenSpace
    search: Callable[..., Progress]
    examples: list[Encoded]
    held: list[Encoded]
    settings: PezSettings
    accumulate: int
    options: dict[str, Any]

    def run(
        self, restarts: int, checkpoint: str | Path | None, callback: TuneCallback | None
    ) -> list[TunedPrompt]:
        """One prompt per restart; fewer where the callback ends the search or a restart fails."""
        files = self._files(restarts, checkpoint)
        found: list[TunedPrompt] = []
        for restart in range(restarts):
            report = callback and partial(
                _report, callback, self.classifier.text, restart, restarts
            )
            try:
                prompt, stopped = self._restart(restart, files[restart], report)
            except FloatingPointError as error:
                if not found:
                    raise
                log.warning("restart %d of %d failed: %s", restart + 1, restarts, error)
                continue
            found.append(prompt)
            if stopped:
                break
        return found

    def _restart(
        self,
        restart: int,
        checkpoint: FileCheckpoint | None,
        report: Callable[[Progress], bool | None] | None,
    ) -> tuple[TunedPrompt, bool]:
        """The prompt, and whether the callback ended the search."""
        options, text = self.options, self.classifier.text
        seed, batch_size = restart_seed(options["seed"], restart), options["batch_size"]
        generator = torch.Generator().manual_seed(seed)
        holdout = Holdout(self.classifier, self.held, batch_size)
        loss = TaskLoss(
            self.classifier, self.space, self.examples, holdout, batch_size, options["fluency"],
            self.accumulate, self.settings.steps, options["check_every"], seed,
        )  # fmt: skip
        progress = self.search(
            self.space,
            loss,
            self._initial_ids(generator),
            self.settings,
            report,
            generator=generator,
            checkpoint=checkpoint,
        )
        soft = progress.embeddings[0].cpu() if isinstance(progress, SoftProgress) else None
        history = [
            (step, scores[0]) for step, scores in progress.history if loss.checks_holdout(step)
        ]
        prompt = text.decode(progress.ids[0].tolist())
        measured = _measured(self.classifier, prompt, self.held, batch_size, seed)
        measured = replace(measured, steps=progress.step, history=history, embeddings=soft)
        return measured, progress.stopped

    def _initial_ids(self, generator: torch.Generator) -> torch.Tensor:
        """(1, prompt_len) ids to start from."""
        start_from, prompt_len = self.options["start_from"], self.options["prompt_len"]
        if start_from is None:
            return self.space.random(1, prompt_len, generator)
        words = check_string("start_from", start_from).strip()
        if not words:
            raise ArgumentError(
                "start_from", f"is {start_from!r}", "give words, or None for random tokens"
            )
        ids = self.classifier.text.ids_inside_text(words)
        times = -(-prompt_len // len(ids))
        return torch.tensor([(ids * times)[:prompt_len]], device=self.space.table.device)

    def _files(self, restarts: int, checkpoint: str | Path | None) -> list[FileCheckpoint | None]:
        """The checkpoint of each restart."""
        if checkpoint is None:
            return [None] * restarts
        search = self.options | {
            "other_templates": list(self.options["other_templates"]),
            "model": _digest_of(self.classifier.model),
            "dataset": digest(json.dumps([self.examples, self.held]).encode()),
            "verbalizer": self.classifier.text.label_ids,
        }
        path = Path(checkpoint)
        return [
            FileCheckpoint(
                path if restarts == 1 else path.with_name(f"{path.stem}-{k}{path.suffix}"),
                search | {"seed": search["seed"] + k},
                search["check_every"],
            )
            for k in range(restarts)
        ]


def _settings(
    model: torch.nn.Module,
    method: str,
    steps: int,
    lr: float,
    weight_decay: float,
    optimizer: str,
    check_every: int,
) -> PezSettings:
    if method == "soft-prompt":
        # each report projects and scores the prompt
        report_every = check_every
    elif next(model.parameters()).device.type == "cpu":
        report_every = None
    else:
        # each report waits for the device; every check of the holdout is one of them
        report_every = math.gcd(25, check_every)
    return PezSettings(
        steps=steps,
        lr=lr,
        weight_decay=weight_decay,
        report_every=report_every,
        optimizer=_optimizer(optimizer, lr, weight_decay),
    )


def _optimizer(
    name: str, lr: float, weight_decay: float
) -> Callable[[list[torch.Tensor]], torch.optim.Optimizer]:
    check_choice("optimizer", name, OPTIMIZERS)

    def make(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
        if name == "adamw":
            optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
        else:
            from transformers.optimization import Adafactor

            fixed = {"relative_step": False, "scale_parameter": False, "warmup_init": False}
            optimizer = Adafactor(parameters, lr=lr, weight_decay=weight_decay, **fixed)

        def clip_gradient(*_: object) -> None:
            torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRAD_NORM)

        optimizer.register_step_pre_hook(clip_gradient)
        return optimizer

    return make


def _formats(
    tokenizer: Any,
    template: str,
    other_templates: Sequence[str],
    verbalizer: Mapping[Hashable, str],
    max_length: int,
) -> list[Format]:
    """One for each template."""
    if isinstance(other_templates, str) or not isinstance(other_templates, Sequence):
        raise ArgumentTypeError(
            "other_templates", f"has to be a list of templates but is {other_templates!r}"
        )
    formats = []
    for k, one in enumerate((template, *other_templates)):
        with _errors_of_template(k):
            formats.append(Format(tokenizer, one, verbalizer, max_length))
    if len({SENTINEL in text.template for text in formats}) > 1:
        raise ArgumentError(
            "other_templates",
            f"is {other_templates!r} and `template` {template!r}",
            f"{SENTINEL} has to be in all of them or in none",
        )
    return formats


@contextmanager
def _errors_of_template(k: int) -> Iterator[None]:
    """Inside, errors about template number `k` name the argument that it comes from."""
    try:
        yield
    except ArgumentError as error:
        if k == 0 or error.argument != "template":
            raise
        raise error.about("other_templates") from error


def _encoded(
    formats: Sequence[Format], dataset: Sequence[Example], prompted: bool
) -> list[Encoded]:
    """Examples, each with one of the templates, the same for every seed of a search.

    If a label has few examples, each is read with all templates: else a template could reveal the
    label.
    """
    generator = torch.Generator().manual_seed(_TEMPLATES_SEED)
    drawn = torch.randint(len(formats), (len(dataset),), generator=generator).tolist()
    each = list(zip(drawn, dataset, strict=True))
    if min(Counter(str(label) for _, label in dataset).values()) < _FEW * len(formats):
        each = [(k, example) for example in dataset for k in range(len(formats))]
    rows: list[Encoded] = []
    for k, example in each:
        with _errors_of_template(k):
            rows += formats[k].encode_examples([example], prompted)
    return rows


def _fluency(fluency: float | None, classifier: PromptedClassifier) -> float:
    if fluency is None:
        return _FLUENCY if classifier.has_fluency else 0.0
    fluency = check_number("fluency", fluency, 0, 1)
    if fluency > 0 and not classifier.has_fluency:
        raise ArgumentError(
            "fluency",
            f"is {fluency}, but an encoder-decoder gives no likelihood of a prompt that its "
            "encoder reads",
            "set it to 0",
        )
    return fluency


def _report(
    callback: TuneCallback, text: Format, restart: int, restarts: int, progress: Progress
) -> bool | None:
    prompt = text.decode(progress.ids[0].tolist())
    score = float(progress.scores[0])
    return callback(
        TuneReport(
            progress.step, progress.steps, restart, restarts, prompt, score, progress.elapsed
        )
    )


def _measured(
    classifier: PromptedClassifier,
    prompt: str,
    held: Sequence[Encoded],
    batch_size: int,
    seed: int,
) -> TunedPrompt:
    """The printed prompt on the held-out examples."""
    ids = classifier.text.prompt_ids(prompt)
    check_context(classifier, len(ids), held, "prompt_len")
    found = classify(classifier, ids, held, batch_size)
    perplexity = perplexity_of(found.fluency)
    return TunedPrompt(prompt, found.accuracy, found.loss, perplexity, ids, seed, 0, [])


def _digest_of(model: Any) -> str:
    """Differs where the architecture or the first numbers of any weight differ."""
    beginnings = [weight.detach().flatten()[:64].float().cpu() for weight in model.parameters()]
    config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    return digest(config.encode(), torch.cat(beginnings).numpy().tobytes())
