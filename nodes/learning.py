"""The nodes that learn prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

from comfy_api.latest import io

from ..pez_core import concatenate, distill, extract_style, invert
from ..pez_core.presets import Plan, make_plan
from ..pez_core.tasks import check_style_template
from . import inputs as shared
from .found import Found
from .inputs import BY_STEPS, CATEGORY, allowed, lines, naming_widgets, one, pictures, texts
from .kept import Kept, digests, out_of_date, store_in_workflow
from .live import Live, tell
from .memory import LoadedClip
from .reading import language_model

T = TypeVar("T")

_HIDDEN = [io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo]


class _Learns(io.ComfyNode):
    """Learns prompts, or gives those that were kept.

    All inputs arrive as lists, so that images of different sizes are searched side by side.
    """

    NEEDED_TO_LEARN: ClassVar[tuple[str, ...]] = ()
    REQUIRED: ClassVar[tuple[str, ...]] = ("clip",)
    """Wires without which nothing can be learned; a kept prompt does without them."""
    WIDGETS: ClassVar[dict[str, str]] = {}
    """What `pez_core` calls an argument in its errors -> the widget that it came from."""

    @classmethod
    def learn(cls, live: Live, **values: Any) -> list[Found]:
        """The search; gets every input but `keep` and `kept`."""
        raise NotImplementedError

    @classmethod
    def outputs(cls, found: list[Found], **values: Any) -> tuple:
        """What leaves the node."""
        raise NotImplementedError

    @classmethod
    def check_lazy_status(cls, keep=(False,), kept=("",), **values: Any) -> list[str]:
        if one(keep) and Kept.from_text(one(kept) or ""):
            return []
        return [name for name in cls.NEEDED_TO_LEARN if name in values]

    @classmethod
    def execute(cls, keep=(False,), kept=("",), **values: Any) -> io.NodeOutput:
        node, prompt = str(cls.hidden.unique_id), cls.hidden.prompt or {}
        before = Kept.from_text(one(kept) or "") if one(keep) else None
        if before:
            changed = out_of_date(before, prompt, node)
            with naming_widgets(cls.WIDGETS):
                outputs = cls.outputs(before.found, **values)
            return _output(cls.hidden, outputs, before, "kept", changed)
        for name in cls.REQUIRED:
            if one(values.get(name)) is None:
                raise ValueError(f"`{name}` is not connected, and there is no kept prompt to give.")
        limit = one(values.get("time_limit")) or 0.0
        with Live(cls.hidden, limit) as live, naming_widgets(cls.WIDGETS):
            learned = Kept(cls.learn(live, **values), digests(prompt, node))
            outputs = cls.outputs(learned.found, **values)
        store_in_workflow(cls.hidden.extra_pnginfo, node, learned.to_text())
        return _output(cls.hidden, outputs, learned, "finished" if live.finished else "done")


def _output(
    hidden: Any, outputs: tuple, kept: Kept, state: str, changed: Sequence[str] = ()
) -> io.NodeOutput:
    text = "\n".join(found.prompt for found in kept.found)
    if changed:
        text += f"\n(kept; out of date: {', '.join(changed)})"
    tell(hidden, text)
    event = {
        "state": state,
        "items": [found.to_json() for found in kept.found],
        "changed": list(changed),
        "kept": kept.to_text(),
    }
    return io.NodeOutput(*outputs, ui={"text": [f.prompt for f in kept.found], "pez": [event]})


def _candidates() -> list[io.Output]:
    return [
        io.String.Output(
            "candidates",
            is_output_list=True,
            tooltip="The prompts of all restarts, best first: a sampler behind it tries them all.",
        ),
        io.Float.Output(
            "candidate_similarities",
            is_output_list=True,
            tooltip="The similarity of each candidate.",
        ),
    ]


def _schema(*, inputs: list[io.Input], outputs: list[io.Output], **described: Any) -> io.Schema:
    """A schema with what all nodes that learn have in common around what is their own."""
    return io.Schema(
        category=CATEGORY,
        is_input_list=True,
        is_output_node=True,
        inputs=[
            shared.clip(lazy=True, optional=True),
            *inputs,
            *shared.words(),
            *shared.rarely_used(),
            *shared.keep(),
        ],
        outputs=[*outputs, *_candidates()],
        hidden=_HIDDEN,
        **described,
    )


def _all_candidates(found: list[Found]) -> tuple[list[str], list[float]]:
    return _columns([pair for one_found in found for pair in one_found.candidates])


def _all_prompts(found: list[Found]) -> tuple[list[str], list[float]]:
    return _columns([(one_found.prompt, one_found.similarity) for one_found in found])


def _columns(pairs: Sequence[tuple[str, float]]) -> tuple[list[str], list[float]]:
    return [prompt for prompt, _ in pairs], [float(similarity) for _, similarity in pairs]


def _plan(values: dict[str, Any]) -> Plan:
    """What is done in each search."""
    limit = one(values.get("time_limit")) or None
    return make_plan(**_preset(values), refine_steps=None, time_limit=limit)


def _preset(values: dict[str, Any]) -> dict[str, Any]:
    preset = one(values["preset"])
    by_steps = preset == BY_STEPS
    return {
        "preset": None if by_steps else preset,
        "steps": one(values.get("steps", [3000])) if by_steps else None,
        "readability": one(values.get("readability")) or 0.0,
    }


def _options(values: dict[str, Any]) -> dict[str, Any]:
    """The settings that all tasks of `pez_core` share, by their names there."""
    _plan(values)  # before a language model is loaded in vain
    preset = _preset(values)
    return preset | {
        "language_model": language_model(preset["readability"]),
        "restarts": one(values["restarts"]),
        "seed": one(values["seed"]),
        "lr": one(values.get("lr", [0.1])),
        "weight_decay": one(values.get("weight_decay", [0.1])) or 0.0,
        "patience": one(values.get("patience", [0])) or None,
        "vocabulary": allowed(one(values.get("vocabulary")), one(values.get("blocked"))),
    }


class ImageToPrompt(_Learns):
    """A prompt for each image, or one for all."""

    NEEDED_TO_LEARN = ("clip", "images", "vocabulary", "avoid_images")
    REQUIRED = ("clip", "images")
    WIDGETS: ClassVar[dict[str, str]] = {
        "template": "caption",
        "`negative_weights`": "`avoid_weight`",
        "`negative`": "`avoid`",
    }
    _EACH, _ALL = "one prompt per image", "one prompt for all images"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            node_id="PEZ_ImageToPrompt",
            display_name="PEZ Image to Prompt",
            description="Finds a short text prompt for an image. Wire it to CLIP Text Encode.",
            search_aliases=[
                "image to text",
                "interrogate",
                "clip interrogator",
                "caption",
                "reverse prompt",
                "hard prompts made easy",
                "describe image",
            ],
            inputs=[
                io.Image.Input(
                    "images",
                    lazy=True,
                    optional=True,
                    tooltip="One image or a batch; sizes may differ.",
                ),
                *shared.search(16, "Length of the prompt in tokens, which are about words."),
                io.Combo.Input(
                    "batch",
                    options=[cls._EACH, cls._ALL],
                    default=cls._EACH,
                    optional=True,
                    tooltip="What several images become.",
                ),
                io.String.Input(
                    "caption",
                    default="",
                    multiline=True,
                    optional=True,
                    placeholder="your caption (optional)",
                    tooltip="Text that stays, for example of a captioner node. The learned words "
                    "add what it missed; they come behind it, or where it says {}.",
                ),
                io.String.Input(
                    "avoid",
                    default="",
                    multiline=True,
                    optional=True,
                    advanced=True,
                    placeholder="things to stay away from",
                    tooltip="Things that the prompt stays away from, one a line.",
                ),
                io.Image.Input(
                    "avoid_images",
                    lazy=True,
                    optional=True,
                    tooltip="Images that the prompt stays away from.",
                ),
                io.Float.Input(
                    "avoid_weight",
                    default=0.5,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="How much staying away counts; the images count 1.",
                ),
                io.Boolean.Input(
                    "negative_prompt",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="On: find a negative prompt, far from the images and close to what is "
                    "to be avoided.",
                ),
                io.String.Input(
                    "initial",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Text to start the first search from, at most prompt_len tokens.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "prompt",
                    is_output_list=True,
                    tooltip="A prompt for each image, or one for all.",
                ),
                io.Float.Output(
                    "similarity",
                    is_output_list=True,
                    tooltip="How similar CLIP finds prompt and image, at most 1. For a negative "
                    "prompt: prompt and what is to be avoided.",
                ),
            ],
        )

    @classmethod
    def learn(cls, live: Live, **values: Any) -> list[Found]:
        images = pictures(values["images"])
        captions = [(caption or "").strip() for caption in values.get("caption") or [""]]
        shared = one(values.get("batch")) == cls._ALL
        options = _options(values) | {
            "prompt_len": one(values["prompt_len"]),
            "negative": lines(one(values.get("avoid"))) + pictures(values.get("avoid_images")),
            "negative_weights": one(values.get("avoid_weight", [0.5])) or 0.0,
            "learn_negative": bool(one(values.get("negative_prompt"))),
            "initial": (one(values.get("initial")) or "").strip() or None,
            "shared": shared,
        }
        if len(set(captions)) == 1:
            groups = [(images, captions[0])]
        elif shared or len(captions) != len(images):
            raise ValueError(
                f"`caption` brings {len(captions)} captions for {len(images)} images; give one "
                "caption, or one for each image with a prompt per image."
            )
        else:
            groups = [([image], caption) for image, caption in zip(images, captions, strict=True)]

        def run(clip: Any, at_once: int | None) -> list[Found]:
            live.begin()
            found = []
            for turns, (group, caption) in _countdown(groups):
                results = invert(
                    clip,
                    group,
                    template=_template(caption),
                    callback=live.turn(turns),
                    time_limit=live.time_left(turns),
                    at_once=at_once,
                    **options,
                )
                found += live.found([results] if shared else results)
            return found

        return _searched(values, run, 1 if shared else len(groups[0][0]), options["prompt_len"])

    @classmethod
    def outputs(cls, found: list[Found], **values: Any) -> tuple:
        return (
            *_all_prompts(found),
            *_all_candidates(found),
        )


def _template(caption: str) -> str:
    """Where the learned words go beside a caption."""
    if caption.count("{}") > 1:
        raise ValueError("`caption` has to hold {} once at most, where the learned words go.")
    return caption if "{}" in caption else f"{caption} {{}}".strip()


def _countdown(items: Sequence[T]) -> Iterator[tuple[int, T]]:
    """Each item with the number of those that are left, itself included."""
    return zip(range(len(items), 0, -1), items, strict=True)


def _searched(
    values: dict[str, Any], run: Callable[[Any, int | None], list[Found]], goals: int, length: int
) -> list[Found]:
    loaded: LoadedClip = one(values["clip"])
    return loaded.search(run, goals * one(values["restarts"]), length, _plan(values))


class ExtractStyle(_Learns):
    """What several images have in common, as words."""

    NEEDED_TO_LEARN = ("clip", "images", "vocabulary")
    REQUIRED = ("clip", "images")
    WIDGETS: ClassVar[dict[str, str]] = {
        "`template`": "`style_template`",
        "`invert`": "PEZ Image to Prompt",
    }
    _MODES: ClassVar[dict[str, str]] = {
        "style without content": "separate",
        "all that they share": "joint",
    }

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            node_id="PEZ_ExtractStyle",
            display_name="PEZ Extract Style",
            description="Finds words for the style that several images share, and gives it to new "
            "subjects.",
            search_aliases=["style transfer", "style prompt", "art style", "reverse style"],
            inputs=[
                io.Image.Input(
                    "images",
                    lazy=True,
                    optional=True,
                    tooltip="Two or more images of different things in one style; six do well.",
                ),
                io.String.Input(
                    "subject",
                    default="a cat",
                    multiline=True,
                    placeholder="subjects, one a line",
                    tooltip="What is to be made in the style, one a line. With `keep` on, changing "
                    "it needs no new search.",
                ),
                *shared.search(8, "Length of the style prompt in tokens, which are about words."),
                io.String.Input(
                    "style_template",
                    default="{subject}, {style}",
                    optional=True,
                    advanced=True,
                    tooltip="How a subject gets the style.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(cls._MODES),
                    default=next(iter(cls._MODES)),
                    optional=True,
                    advanced=True,
                    tooltip="The second is the paper's; it also says what the images show.",
                ),
                io.String.Input(
                    "content",
                    default="",
                    multiline=True,
                    optional=True,
                    advanced=True,
                    placeholder="what the images show",
                    tooltip="Words that describe what the images show, so that the style prompt "
                    "does without them.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "prompt", is_output_list=True, tooltip="Each subject in the style."
                ),
                io.String.Output("style", tooltip="The style alone."),
                io.Float.Output(
                    "similarity", tooltip="The style's mean similarity with the images."
                ),
            ],
        )

    @classmethod
    def learn(cls, live: Live, **values: Any) -> list[Found]:
        check_style_template(one(values.get("style_template", ["{subject}, {style}"])))
        images = pictures(values["images"])
        mode = one(values.get("mode")) or next(iter(cls._MODES))
        length = one(values["prompt_len"])
        options = _options(values)

        def run(clip: Any, at_once: int | None) -> list[Found]:
            live.begin()
            style = extract_style(
                clip,
                images,
                prompt_len=length,
                mode=cls._MODES.get(mode, mode),
                content=lines(one(values.get("content"))),
                callback=live.report,
                time_limit=live.time_left(),
                at_once=at_once,
                **options,
            )
            return live.found([style])

        return _searched(values, run, 1, length)

    @classmethod
    def outputs(cls, found: list[Found], **values: Any) -> tuple:
        style = found[0]
        template = one(values.get("style_template", ["{subject}, {style}"]))
        check_style_template(template)
        subjects = [subject for text in values["subject"] for subject in lines(text)]
        prompts = [
            template.replace("{style}", style.prompt).replace("{subject}", subject)
            for subject in subjects
        ]
        return (
            prompts or [style.prompt],
            style.prompt,
            float(style.similarity),
            *_all_candidates(found),
        )


class DistillPrompt(_Learns):
    """A shorter prompt that means the same."""

    NEEDED_TO_LEARN = ("clip", "vocabulary")
    WIDGETS: ClassVar[dict[str, str]] = {"`prompt`": "`text`"}

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            node_id="PEZ_DistillPrompt",
            display_name="PEZ Distill Prompt",
            description="Shortens a prompt. Weights, LoRA tags, embeddings and BREAK stay.",
            search_aliases=["shorten prompt", "compress prompt", "77 tokens", "prompt too long"],
            inputs=[
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    placeholder="long prompt",
                    tooltip="The prompt to shorten. Longer than 77 tokens is fine.",
                ),
                io.Float.Input(
                    "ratio",
                    default=0.3,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Length of the new prompt against the old one.",
                ),
                *shared.search(0, "Exact length in tokens. 0: by the ratio."),
            ],
            outputs=[
                io.String.Output("prompt", is_output_list=True, tooltip="The shorter prompt."),
                io.Float.Output(
                    "similarity",
                    is_output_list=True,
                    tooltip="How similar CLIP finds it to the long one, at most 1.",
                ),
                io.Int.Output(
                    "tokens_saved", is_output_list=True, tooltip="Tokens that it is shorter by."
                ),
            ],
        )

    @classmethod
    def learn(cls, live: Live, **values: Any) -> list[Found]:
        prompts = [text or "" for text in values["text"]]
        if not any(texts(prompts)):
            raise ValueError("`text` is empty; give a prompt to shorten.")
        length = one(values["prompt_len"]) or None
        ratio = one(values["ratio"])
        options = _options(values)

        def run(clip: Any, at_once: int | None) -> list[Found]:
            live.begin()
            found = []
            for turns, prompt in _countdown(prompts):
                if not prompt.strip():  # one of a list must not cost the others theirs
                    found.append(Found(prompt, 1.0, [(prompt, 1.0)], note="There was no text."))
                    continue
                result = distill(
                    clip,
                    prompt,
                    ratio=ratio,
                    prompt_len=length,
                    callback=live.turn(turns),
                    time_limit=live.time_left(turns),
                    at_once=at_once,
                    **options,
                )
                found += live.found([result])
            return found

        return _searched(values, run, 1, length or 75)

    @classmethod
    def outputs(cls, found: list[Found], **values: Any) -> tuple:
        return (
            *_all_prompts(found),
            [one_found.tokens_saved for one_found in found],
            *_all_candidates(found),
        )


class ConcatPrompts(_Learns):
    """Several prompts and images as one prompt."""

    _PROMPTS = ("prompt_1", "prompt_2", "prompt_3", "prompt_4")
    _IMAGES = ("images_1", "images_2")
    NEEDED_TO_LEARN = ("clip", "vocabulary", *_IMAGES)
    WIDGETS: ClassVar[dict[str, str]] = {"`prompts`": "one of `prompt_1` to `prompt_4`"}

    @classmethod
    def define_schema(cls) -> io.Schema:
        prompts = [
            io.String.Input(
                name,
                default="",
                multiline=k < 2,
                optional=True,
                advanced=True if k >= 2 else None,
                placeholder="a prompt",
                tooltip="A prompt that goes into the one. A list gives several.",
            )
            for k, name in enumerate(cls._PROMPTS)
        ]
        images = [
            io.Image.Input(
                name,
                lazy=True,
                optional=True,
                tooltip="Images that go into the prompt, each of a batch by itself.",
            )
            for name in cls._IMAGES
        ]
        return _schema(
            node_id="PEZ_ConcatPrompts",
            display_name="PEZ Concat Prompts",
            description="Makes one prompt of several prompts and images. Prompts that fit are "
            "joined; else one prompt is learned towards all.",
            search_aliases=[
                "combine prompts",
                "merge prompts",
                "mix images",
                "fuse",
                "blend images",
            ],
            inputs=[
                *images,
                *prompts,
                io.Boolean.Input(
                    "fuse",
                    default=False,
                    optional=True,
                    label_on="always learn",
                    label_off="join if it fits",
                    tooltip="On: learn one prompt even where the prompts fit side by side.",
                ),
                *shared.search(16, "Length of a learned prompt in tokens, which are about words."),
                io.String.Input(
                    "weights",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="How much each source counts, with commas between: the prompts first, "
                    "then the images. Empty: all the same.",
                ),
                io.Int.Input(
                    "max_tokens",
                    default=75,
                    min=1,
                    max=75,
                    optional=True,
                    advanced=True,
                    tooltip="What a simple join may take.",
                ),
            ],
            outputs=[
                io.String.Output("prompt", tooltip="One prompt for all sources."),
                io.Float.Output("similarity", tooltip="Its mean similarity with the sources."),
                io.Float.Output(
                    "similarities",
                    is_output_list=True,
                    tooltip="Its similarity with each source: prompts first, then images.",
                ),
            ],
        )

    @classmethod
    def learn(cls, live: Live, **values: Any) -> list[Found]:
        prompts = [text for name in cls._PROMPTS for text in texts(values.get(name))]
        images = [image for name in cls._IMAGES for image in pictures(values.get(name))]
        if len(prompts) + len(images) < 2:
            raise ValueError(
                "Nothing to bring together: give at least two prompts or images, for example "
                "`images_1` and `prompt_1`."
            )
        length = one(values["prompt_len"])
        options = _options(values)

        def run(clip: Any, at_once: int | None) -> list[Found]:
            live.begin()
            result = concatenate(
                clip,
                [*prompts, *images],
                weights=_weights(one(values.get("weights"))),
                max_tokens=one(values.get("max_tokens", [75])),
                prompt_len=length,
                fuse=bool(one(values.get("fuse"))),
                callback=live.report,
                time_limit=live.time_left(),
                at_once=at_once,
                **options,
            )
            return live.found([result])

        return _searched(values, run, 1, length)

    @classmethod
    def outputs(cls, found: list[Found], **values: Any) -> tuple:
        only = found[0]
        return (
            only.prompt,
            float(only.similarity),
            [float(similarity) for similarity in only.similarities],
            *_all_candidates(found),
        )


def _weights(text: str | None) -> list[float] | None:
    if not (text or "").strip():
        return None
    try:
        return [float(number) for number in text.replace(";", ",").split(",")]
    except ValueError as error:
        raise ValueError(
            f"`weights` is {text!r}; write numbers with commas between, like 1, 2, 0.5."
        ) from error
