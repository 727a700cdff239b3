"""The base of the nodes that learn prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from comfy_api.latest import io

from ..pez_core import SearchOptions, Vocabulary
from ..pez_core.errors import ArgumentError
from ..pez_core.prompt_text import SYNTAX, read
from . import inputs
from .errors import naming_widgets
from .found import Found
from .inputs import CATEGORY, PAPER
from .kept import Kept, digests
from .live import Live, show_text, showing_errors
from .prompts import out_of_date
from .reading import language_model
from .saved import store_in_prompt, store_in_workflow
from .values import Values, phrases, widget_names

_OPTIMISER = ("lr", "weight_decay")
"""Settings of Algorithm 1, which prompts that are written do without."""

_HIDDEN = [io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo]


class Learner(io.ComfyNode):
    """Learns prompts, or gives those that were kept.

    All inputs arrive as lists, so that images of different sizes are searched side by side.
    """

    NEEDED_TO_LEARN: ClassVar[tuple[str, ...]] = ()
    """Wires that a search uses, and a kept prompt does not."""
    REQUIRED: ClassVar[tuple[str, ...]] = ("clip",)
    """Wires that a search cannot do without."""
    WIDGETS: ClassVar[dict[str, str]] = {}
    """An argument in errors of `pez_core` -> the widget it came from, as in `naming_widgets`."""

    @classmethod
    def learn(cls, live: Live, values: Values) -> list[Found]:
        """Search."""
        raise NotImplementedError

    @classmethod
    def outputs(cls, found: list[Found], values: Values) -> tuple:
        """Turn prompts into the outputs of the node."""
        raise NotImplementedError

    @classmethod
    def check_lazy_status(cls, **given: Any) -> list[str]:
        if _kept(Values(cls.define_schema(), given)):
            return []
        return [name for name in cls.NEEDED_TO_LEARN if name in given]

    @classmethod
    def execute(cls, **given: Any) -> io.NodeOutput:
        schema = cls.define_schema()
        values = Values(schema, given)
        node, prompt = str(cls.hidden.unique_id), cls.hidden.prompt or {}
        if kept := _kept(values):
            with showing_errors(cls.hidden), naming_widgets(cls.WIDGETS):
                outputs = cls.outputs(kept.found, values)
            return _output(cls.hidden, outputs, kept, "kept", out_of_date(kept, prompt, node))
        learned_from = digests(prompt, node)
        live = Live(cls.hidden, values["time_limit"], learned_from)
        with live, naming_widgets(cls.WIDGETS):
            cls._check_wires(values)
            found, remark = cls.learn(live, values), unused(values)
            learned = Kept([one.with_remark(remark) for one in found], learned_from)
            outputs = cls.outputs(learned.found, values)
        text = learned.to_text()
        store_in_workflow(cls.hidden.extra_pnginfo, node, widget_names(schema), text)
        store_in_prompt(prompt, node, text)
        return _output(cls.hidden, outputs, learned, "finished" if live.finished else "done")

    @classmethod
    def _check_wires(cls, values: Values) -> None:
        for name in cls.REQUIRED:
            if values[name] is None:
                raise ValueError(f"`{name}` is not connected, and no prompt is stored.")


def _kept(values: Values) -> Kept | None:
    """The prompts that the node has to repeat, if any."""
    return Kept.from_text(values["kept"]) if values["keep"] else None


def _output(
    hidden: Any, outputs: tuple, kept: Kept, state: str, changed: Sequence[str] = ()
) -> io.NodeOutput:
    text = "\n".join(found.prompt for found in kept.found)
    if changed:
        text += f"\n(kept; out of date: {', '.join(changed)})"
    show_text(hidden, text)
    event = {
        "state": state,
        "items": [found.to_json() for found in kept.found],
        "changed": list(changed),
        "kept": kept.to_text(),
    }
    return io.NodeOutput(*outputs, ui={"text": [f.prompt for f in kept.found], "pez": [event]})


def learner_schema(
    *,
    inputs_: list[io.Input],
    outputs: list[io.Output],
    reads_images: bool = True,
    wording: str = SearchOptions.wording,
    newest: Sequence[io.Input] = (),
    **described: Any,
) -> io.Schema:
    """A schema with the sockets and widgets that all learning nodes share around the node's own.

    Workflows store the values of widgets by place, so that `newest` ones come last.
    """
    return io.Schema(
        category=CATEGORY,
        is_input_list=True,
        is_output_node=True,
        inputs=[
            inputs.clip(lazy=True, optional=True),
            *inputs_,
            *inputs.words(),
            *inputs.rarely_used(),
            *inputs.keep(),
            inputs.repeats(),
            *([inputs.fit()] if reads_images else []),
            inputs.wording(wording),
            *newest,
        ],
        outputs=[*outputs, *_candidates()],
        hidden=_HIDDEN,
        **described,
    )


def _candidates() -> list[io.Output]:
    return [
        io.String.Output(
            "candidates",
            is_output_list=True,
            tooltip="The prompts of all restarts, best first. A sampler behind this output makes "
            "an image of each.",
        ),
        io.Float.Output(
            "candidate_similarities",
            is_output_list=True,
            tooltip="The similarity of each candidate.",
        ),
    ]


def search_options(values: Values, live: Live) -> SearchOptions:
    """The options of a search, from the widgets that all learning nodes share.

    Args:
        values: of the node.
        live: shows what takes the time while a language model is loaded.

    Raises:
        ArgumentError: two widgets do not go together.
        ValueError: the package with the language model is missing.
    """
    effort, readability = values["effort"], values["readability"]
    optimiser = () if _writes(values) else _OPTIMISER
    if effort == PAPER and readability:
        raise ArgumentError(
            "readability",
            f"is {readability}, but the `effort` paper has no swaps, which it needs",
            "choose another `effort`, such as balanced, or set `readability` to 0",
        )
    vocabulary = values["vocabulary"]
    options = SearchOptions(
        prompt_len=values["prompt_len"] or None,
        effort=effort,
        time_limit=values["time_limit"] or None,
        restarts=values["restarts"],
        seed=values["seed"],
        vocabulary=allowed(vocabulary, values["block"], effort),
        repeats=values["repeats"],
        block_unsafe=vocabulary is None,  # a connected vocabulary has its own switch for that
        start_from=_start_from(values),
        wording=_wording(values),
        readability=readability,
        fit=values.get("fit", SearchOptions.fit),
        steps=values["steps"] if effort == PAPER else None,
        patience=values["patience"] or None,
        **{name: values[name] for name in optimiser},
    )
    model = language_model(readability, values["clip"], live)
    return replace(options, language_model=model)


def _wording(values: Values) -> str:
    """The wording of a search: "free" where nothing can be written."""
    writes = values["effort"] != PAPER and values["clip"].reads_like_clip
    return values["wording"] if writes else "free"


def _writes(values: Values) -> bool:
    """Whether prompts are written in place of Algorithm 1."""
    vocabulary = values["vocabulary"]
    lists_phrases = vocabulary is not None and vocabulary.lists_phrases
    begins = read(_start_from(values) or "")
    return _wording(values) != "free" and not begins and not lists_phrases


def _start_from(values: Values) -> str | None:
    return values.get("start_from", "").strip() or None


def unused(values: Values) -> str:
    """A remark on widgets that were set and have no effect, "" where there are none."""
    wording = values["wording"]
    if wording != _wording(values):
        is_paper = values["effort"] == PAPER
        cause = "`effort` is paper" if is_paper else "the CLIP has another tokenizer"
        return f"Without effect: `wording` {wording}, since {cause}; the prompt is free."
    changed = [name for name in _OPTIMISER if values[name] != getattr(SearchOptions, name)]
    if changed and _writes(values):
        names = " and ".join(f"`{name}`" for name in changed)
        return f"Without effect: {names}, since `wording` is {wording}."
    return ""


def allowed(vocabulary: Vocabulary | None, block: str, effort: str) -> Vocabulary:
    """The vocabulary of a search, without the characters that CLIP Text Encode would parse."""
    rule = Vocabulary(block=[*SYNTAX, *phrases(block, "block")], whole_words=False)
    return (Vocabulary(whole_words=effort != PAPER) if vocabulary is None else vocabulary) & rule


def all_prompts(found: list[Found]) -> tuple[list[str], list[float]]:
    """The best prompts and their similarities."""
    return _columns([(one.prompt, one.similarity) for one in found])


def all_candidates(found: list[Found]) -> tuple[list[str], list[float]]:
    """The prompts of all restarts and their similarities."""
    return _columns([candidate for one in found for candidate in one.candidates])


def _columns(pairs: Sequence[tuple[str, float]]) -> tuple[list[str], list[float]]:
    return [prompt for prompt, _ in pairs], [float(similarity) for _, similarity in pairs]
