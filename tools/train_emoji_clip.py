"""Train, evaluate and export `emoji-clip`, the small real CLIP that ships with pez_core.

    pip install -e . resvg-py && python tools/train_emoji_clip.py [--model emoji-clip-judge]

Downloads and renders the drawings (`emoji_data.py`), trains an ordinary open_clip model with the
ordinary CLIP tokenizer on them and writes weights, config, vocabulary and metrics to
`pez_core/models/emoji-clip`. About 75 minutes on two cores with AVX-512 bf16; the seed is fixed.

`emoji-clip-judge` is a second model, of other widths, depths and seed, that takes no part in any
search: benchmarks ask it whether a prompt means to another CLIP what it means to the one that it
was learned on. It goes to `benchmarks/models/emoji-clip-judge` and is not part of the package.

What differs from plain CLIP training, and why: prompts that are *searched* for find every weakness
of the text tower, so it is trained to be honest about lists of words.

* Half of the captions are bags of the drawing's own words in random order, up to the full context.
* Corrupted captions, half of whose words are random, are extra negatives.
* In the second half, prompts that PEZ itself finds are extra negatives: a pool keeps one 16-token
  prompt per drawing, and for a quarter of each batch it is improved by a few steps of the search
  against the current weights, with the drawing's true words excluded. (Gradient-ranked token swaps
  were tried in its place and found far weaker prompts in the same time.)
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from emoji_data import SIZE, STYLES, Drawing, prepare, words_of
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file
from torch import nn

from pez_core import PezSettings, TokenSpace, search

log = logging.getLogger("train_emoji_clip")


@dataclass(frozen=True)
class Model:
    """What differs between the models that this tool makes."""

    config: dict  # open_clip's `model_cfg`
    out: Path
    epochs: int
    seed: int


def _config(features: int, image: dict, text: dict) -> dict:
    vision = {"image_size": SIZE, "width": 32, "head_width": 64, "patch_size": None}
    return {
        "embed_dim": features,
        "vision_cfg": vision | image,
        "text_cfg": {"context_length": 77, "vocab_size": 49408} | text,
    }


MODELS = {
    "emoji-clip": Model(
        _config(256, {"layers": [1, 1, 1, 1]}, {"width": 128, "heads": 4, "layers": 2}),
        Path("pez_core/models/emoji-clip"),
        epochs=80,
        seed=0,
    ),
    "emoji-clip-judge": Model(
        _config(192, {"layers": [1, 1, 2, 1]}, {"width": 160, "heads": 5, "layers": 3}),
        Path("benchmarks/models/emoji-clip-judge"),
        epochs=40,
        seed=1,
    ),
}
PREPROCESS = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}

BACKGROUNDS = {
    "white": (255, 255, 255),
    "red": (214, 40, 40),
    "orange": (247, 148, 29),
    "yellow": (250, 220, 60),
    "green": (60, 160, 70),
    "blue": (40, 90, 200),
    "sky blue": (140, 205, 245),
    "purple": (130, 60, 160),
    "pink": (250, 170, 200),
    "brown": (130, 90, 60),
    "gray": (150, 150, 150),
    "black": (20, 20, 20),
}
TEMPLATES = [
    "{style} emoji of {name} on {background} background",
    "{name} , {style} , {background} background",
    "a {style} {name}",
    "{style} drawing of {name} , {background}",
    "a picture of {name}",
    "{name}",
    "{name} emoji",
    "{name} in {style} style",
]
BLACK_STYLES = {"emojione-monotone", "fluent-emoji-high-contrast"}
SOT, EOT, CONTENT = 49406, 49407, 18
ADVERSARIAL_LEN = 16
ADVERSARIAL_FROM = 0.5  # share of the training after which adversarial prompts take part
ADVERSARIAL_STEPS = 5  # of PEZ, each time an adversarial prompt is improved


class Lexicon:
    """Token ids of words, and the compact ids of the tokens that training uses at all."""

    def __init__(self) -> None:
        self.tokenizer = open_clip.SimpleTokenizer()
        self.cache: dict[str, list[int]] = {}
        self.compact: dict[int, int] = {}
        for token in (0, SOT, EOT):
            self._add(token)

    def _add(self, token: int) -> int:
        return self.compact.setdefault(token, len(self.compact))

    def ids(self, text: str) -> list[int]:
        """Compact token ids of a text; the same as tokenizing it whole, word by word and cached."""
        out = []
        for word in text.split():
            if word not in self.cache:
                self.cache[word] = [self._add(t) for t in self.tokenizer.encode(word)]
            out += self.cache[word]
        return out

    @property
    def tokens(self) -> list[int]:
        return list(self.compact)


class Captions:
    """Writes captions, word bags and corrupted captions for drawings."""

    def __init__(self, drawings: list[Drawing], lexicon: Lexicon, rng: random.Random) -> None:
        self.drawings, self.lexicon, self.rng = drawings, lexicon, rng
        self.names = [" ".join(words_of(d.name)) or d.name for d in drawings]
        self.words = [
            sorted({w for text in (d.name, *d.keywords) for w in words_of(text)}) for d in drawings
        ]
        self.every_word = sorted(
            {w for ws in self.words for w in ws}
            | {w for s, (_, phrases) in STYLES.items() for p in phrases for w in p.split()}
            | {w for b in BACKGROUNDS for w in b.split()}
        )
        for text in [*self.every_word, *TEMPLATES, ", emoji and next to"]:
            lexicon.ids(text.replace("{", "").replace("}", ""))

    def true_words(self, shown: list[int], background: str) -> list[str]:
        words = {w for i in shown for w in self.words[i]} | set(background.split()) | {"emoji"}
        for i in shown:
            for phrase in STYLES[self.drawings[i].style][1]:
                words |= set(phrase.split())
        return sorted(words)

    def caption(self, shown: list[int], background: str, longest: int) -> tuple[list[str], bool]:
        """Words of one true caption, and whether they say the style."""
        rng = self.rng
        if rng.random() < 0.5:
            words = self.true_words(shown, background)
            own = [w for i in shown for w in self.names[i].split()]
            # a name's own words are what people search for: they come up more often than keywords
            bag = rng.choices(words + own * 2, k=rng.randint(1, longest))
            return bag, False
        style = rng.choice(STYLES[self.drawings[shown[0]].style][1])
        names = []
        for i in shown:
            name = self.names[i]
            extra = self.drawings[i].keywords
            if extra and rng.random() < 0.35:
                name = " ".join([name, *rng.sample(extra, min(len(extra), rng.randint(1, 3)))])
            elif extra and rng.random() < 0.15:
                name = rng.choice(extra)
            names.append(name)
        joint = rng.choice([" and ", " next to "])
        template = rng.choice(TEMPLATES)
        text = template.format(name=joint.join(names), style=style, background=background)
        words = [w for part in text.split() for w in ([part] if part == "," else words_of(part))]
        return words, "{style}" in template

    def corrupted(self, words: list[str]) -> list[str]:
        """The same words with half of them (at least one) replaced by random ones, shuffled."""
        rng = self.rng
        words = list(words)
        for k in rng.sample(range(len(words)), max(1, len(words) // 2)):
            words[k] = rng.choice(self.every_word)
        if rng.random() < 0.5:
            rng.shuffle(words)
        return words


def pack(rows: list[list[int]], longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compact id rows -> (N, L) ids with start and end tokens, and (N,) end positions."""
    rows = [row[:longest] for row in rows]
    ends = torch.tensor([len(row) + 1 for row in rows])
    ids = torch.zeros(len(rows), int(ends.max()) + 1, dtype=torch.long)
    for row, out in zip(rows, ids, strict=True):
        out[: len(row) + 2] = torch.tensor([1, *row, 2])
    return ids, ends


def encode_text(model: CLIP, embeddings: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """(N, L, width) embeddings -> (N, embed_dim) unit features; exact, as the tower is causal."""
    length = embeddings.shape[1]
    x = embeddings + model.positional_embedding[:length]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    x = model.ln_final(x)[torch.arange(len(x)), ends] @ model.text_projection
    return F.normalize(x.float(), dim=-1)


def encode_image(model: CLIP, images: torch.Tensor) -> torch.Tensor:
    return F.normalize(model.visual(images).float(), dim=-1)


def composite(rgba: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """(N, 4, H, W) in [0, 1] over (N, 3) colours -> model input (N, 3, H, W) in [-1, 1]."""
    alpha = rgba[:, 3:]
    return (rgba[:, :3] * alpha + colours[:, :, None, None] * (1 - alpha)) * 2 - 1


class Images:
    """Augmented model inputs from the rendered drawings."""

    def __init__(self, pixels: np.ndarray, generator: torch.Generator) -> None:
        self.pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        self.generator = generator

    def _uniform(self, n: int, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, generator=self.generator)

    def augmented(self, shown: list[list[int]], flip: list[bool], colours) -> torch.Tensor:
        first = self.pixels[[s[0] for s in shown]].float() / 255
        first[..., :3, :, :] *= first[:, 3:]  # premultiplied, so that resampling keeps edges clean
        for k, drawings in enumerate(shown):
            if len(drawings) == 2:
                second = self.pixels[drawings[1]].float() / 255
                second[:3] *= second[3:]
                halves = F.interpolate(
                    torch.stack([first[k], second]), scale_factor=0.5, mode="area"
                )
                first[k] = 0
                first[k, :, SIZE // 4 : 3 * SIZE // 4] = torch.cat([*halves], dim=-1)
        n = len(shown)
        angle = self._uniform(n, -0.25, 0.25)
        scale = self._uniform(n, 0.85, 1.35)
        mirror = torch.tensor([-1.0 if f else 1.0 for f in flip])
        stretch = self._uniform(n, 0.88, 1.14)
        theta = torch.zeros(n, 2, 3)
        theta[:, 0, 0], theta[:, 0, 1] = mirror * scale * angle.cos(), -scale * angle.sin()
        theta[:, 1, 0], theta[:, 1, 1] = mirror * scale * angle.sin(), scale * angle.cos() * stretch
        theta[:, 0, 2], theta[:, 1, 2] = (
            self._uniform(n, -0.12, 0.12),
            self._uniform(n, -0.12, 0.12),
        )
        grid = F.affine_grid(theta, (n, 4, SIZE, SIZE), align_corners=False)
        rgba = F.grid_sample(first, grid, align_corners=False)
        rgb, alpha = rgba[:, :3], rgba[:, 3:]
        gain = 1 + 0.12 * torch.randn(n, 3, 1, 1, generator=self.generator)
        rgb = (rgb * gain).clamp(max=1)
        colours = (colours + 0.04 * torch.randn(n, 3, generator=self.generator)).clamp(0, 1)
        x = rgb + colours[:, :, None, None] * (1 - alpha)
        return x * 2 - 1

    def plain(self, index: list[int]) -> torch.Tensor:
        return composite(self.pixels[index].float() / 255, torch.ones(len(index), 3))


def contrastive_loss(
    image: torch.Tensor, text: torch.Tensor, negatives: torch.Tensor, same: torch.Tensor, scale
) -> torch.Tensor:
    """CLIP loss whose image side also sees `negatives`; pairs in `same` do not count."""
    logits = scale * image @ text.T
    logits = logits.masked_fill(same, float("-inf"))
    with_negatives = torch.cat([logits, scale * image @ negatives.T], dim=1)
    target = torch.arange(len(image))
    return (F.cross_entropy(with_negatives, target) + F.cross_entropy(logits.T, target)) / 2


class FalseWords(TokenSpace):
    """A space in which each problem has tokens of its own that it must not use."""

    def __init__(self, table: torch.Tensor, true_ids: list[list[int]]) -> None:
        super().__init__(table)
        self.directions = F.normalize(self.table, dim=-1)
        self.forbidden = torch.zeros(len(true_ids), len(table))
        self.forbidden[:, :3] = float("-inf")  # padding, start and end
        for row, ids in zip(self.forbidden, true_ids, strict=True):
            row[ids] = float("-inf")

    def nearest(self, embeddings: torch.Tensor) -> torch.Tensor:
        return (embeddings @ self.directions.T + self.forbidden[:, None]).argmax(-1)


def attack(model, pool, chosen, image, true_ids, generator) -> torch.Tensor:
    """Improve the pooled prompts of the `chosen` drawings by a few steps of PEZ.

    Args:
        pool: (drawings, 16) compact ids, updated in place.
        image: (len(chosen), features) unit image features to get close to.
        true_ids: for each chosen drawing the tokens that describe it truly; they are never used.

    Returns:
        (len(chosen), 16) prompts of false words that the model finds similar to the images.
    """
    space = FalseWords(model.token_embedding.weight, true_ids)
    prompts = pool[chosen]
    fresh = torch.randint(3, len(space.table), prompts.shape, generator=generator)
    restart = torch.rand(len(prompts), 1, generator=generator) < 0.1
    prompts = torch.where(restart | (space.forbidden.gather(1, prompts) < 0), fresh, prompts)
    edges = space.embed(torch.tensor([1, 2])).expand(len(prompts), -1, -1)
    ends = torch.full((len(prompts),), ADVERSARIAL_LEN + 1)
    image = image.detach()

    def similarity(embeddings: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings = torch.cat([edges[:, :1], embeddings, edges[:, 1:]], dim=1)
        with torch.autocast("cpu", torch.bfloat16):
            features = encode_text(model, embeddings, ends)
        cosine = (features * image).sum(-1)
        return 1 - cosine, cosine

    pool[chosen] = search(space, similarity, prompts, PezSettings(steps=ADVERSARIAL_STEPS)).ids
    return pool[chosen]


@torch.no_grad()
def zero_shot(encode_texts, encode_images, drawings: list[Drawing], index: list[int]):
    """(len(index),) bool: is the drawing's own name the best of all the names in `index`."""
    own = [" ".join(words_of(drawings[i].name)) for i in index]
    names = sorted(set(own))
    templates = ("{}", "{} emoji", "a picture of {}")
    features = sum(encode_texts([t.format(n) for n in names]) for t in templates)
    pictures = torch.cat([encode_images(index[k : k + 256]) for k in range(0, len(index), 256)])
    best = (pictures @ features.T).argmax(1).tolist()
    return torch.tensor([names[b] == name for b, name in zip(best, own, strict=True)])


def evaluate(encode_texts, encode_images, drawings: list[Drawing]) -> dict:
    """Zero-shot top-1 on the drawings that were left out of training.

    Args:
        encode_texts: list of texts -> (n, features) unit features.
        encode_images: list of drawing indices -> (n, features) unit features, on white.
        drawings: all drawings.
    """
    names = [i for i, d in enumerate(drawings) if d.split == "held-out name"]
    style = [i for i, d in enumerate(drawings) if d.split == "held-out style"]
    hits = zero_shot(encode_texts, encode_images, drawings, names)
    by_style = {
        s: round(hits[[drawings[i].style == s for i in names]].float().mean().item(), 4)
        for s in sorted({drawings[i].style for i in names})
    }
    style_hits = zero_shot(encode_texts, encode_images, drawings, style)
    return {
        "zero_shot_top1_held_out_names": round(hits.float().mean().item(), 4),
        "zero_shot_top1_by_style": by_style,
        "held_out_name_images": len(names),
        "zero_shot_top1_held_out_style": round(style_hits.float().mean().item(), 4),
        "held_out_style_images": len(style),
    }


def evaluate_in_training(model: CLIP, images: Images, lexicon: Lexicon, drawings) -> dict:
    def texts(lines: list[str]) -> torch.Tensor:
        ids, ends = pack([lexicon.ids(line) for line in lines], 40)
        return encode_text(model, model.token_embedding(ids), ends)

    model.eval()
    metrics = evaluate(texts, lambda index: encode_image(model, images.plain(index)), drawings)
    model.train()
    return metrics


def evaluate_exported(folder: Path, out: Path) -> dict:
    """The same figures from the files in `out`, through pez_core and its public path."""
    from pez_core import load_clip

    drawings, pixels = prepare(folder)
    images = Images(pixels, torch.Generator())
    clip = load_clip(str(out), device="cpu")
    return evaluate(
        clip.encode_texts,
        lambda index: F.normalize(clip.model.encode_image(images.plain(index)), dim=-1),
        drawings,
    )


def train(
    folder: Path,
    config: dict,
    out: Path,
    epochs: int,
    batch: int,
    lr: float,
    seed: int,
    threads: int,
    resume: bool,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    drawings, pixels = prepare(folder)
    lexicon = Lexicon()
    captions = Captions(drawings, lexicon, rng)
    images = Images(pixels, generator)
    index = [i for i, d in enumerate(drawings) if d.split == "train"]
    names = {}
    name_id = torch.tensor([names.setdefault(d.name, len(names)) for d in drawings])
    style_id = torch.tensor([list(STYLES).index(d.style) for d in drawings])

    model = CLIP(**config)
    full_table = model.token_embedding.weight.detach().clone()
    model.token_embedding = nn.Embedding.from_pretrained(
        full_table[lexicon.tokens].clone(), freeze=False
    )
    vocabulary_size = len(lexicon.tokens)
    first_epoch = 0
    if resume:
        state = load_file(out / "open_clip_model.safetensors")
        state["token_embedding.weight"] = state["token_embedding.weight"][lexicon.tokens]
        model.load_state_dict({name: value.float() for name, value in state.items()})
        first_epoch = json.loads((out / "metrics.json").read_text())["epochs"]
    model.visual = model.visual.to(memory_format=torch.channels_last)
    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.2}, {"params": plain, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.98),
    )
    steps_per_epoch = len(index) // batch
    total = epochs * steps_per_epoch
    pool = torch.randint(3, vocabulary_size, (len(drawings), ADVERSARIAL_LEN), generator=generator)
    log.info("%d drawings, %d tokens, %d steps", len(index), vocabulary_size, total)

    first_step = step = first_epoch * steps_per_epoch
    began = time.monotonic()
    for epoch in range(first_epoch, epochs):
        rng.shuffle(index)
        running = 0.0
        for k in range(steps_per_epoch):
            share = step / total
            rate = (
                lr * min(1, (step + 1 - first_step) / 200) * 0.5 * (1 + math.cos(math.pi * share))
            )
            for group in optimizer.param_groups:
                group["lr"] = rate

            chosen = index[k * batch : (k + 1) * batch]
            shown, flip, backgrounds = [], [], []
            for i in chosen:
                pair = rng.random() < 0.1
                shown.append([i, rng.choice(index)] if pair else [i])
                left_or_right = {"left", "right"} & set(captions.words[i])
                flip.append(rng.random() < 0.5 and not left_or_right and not pair)
                plain_white = rng.random() < 0.5
                background = "white" if plain_white else rng.choice(list(BACKGROUNDS))
                if background == "black" and {drawings[j].style for j in shown[-1]} & BLACK_STYLES:
                    background = "yellow"
                backgrounds.append(background)
            colours = torch.tensor([BACKGROUNDS[b] for b in backgrounds]) / 255
            x = images.augmented(shown, flip, colours).contiguous(memory_format=torch.channels_last)

            longest = 74 if step % 16 == 15 else CONTENT
            written = [
                captions.caption(s, b, longest if rng.random() < 0.3 else CONTENT - 4)
                for s, b in zip(shown, backgrounds, strict=True)
            ]
            ids, ends = pack([lexicon.ids(" ".join(w)) for w, _ in written], longest)
            quarter = batch // 4
            wrong = [lexicon.ids(" ".join(captions.corrupted(w))) for w, _ in written[:quarter]]
            negative_batches = [pack(wrong, CONTENT)]

            named = name_id[chosen]
            same = named[:, None] == named[None, :]
            styled = torch.tensor([s for _, s in written])
            other_style = style_id[chosen][:, None] != style_id[chosen][None, :]
            same &= ~(other_style & styled[None, :])
            same.fill_diagonal_(False)

            with torch.autocast("cpu", torch.bfloat16):
                image = encode_image(model, x)

            if share >= ADVERSARIAL_FROM:
                attacked = range(batch - batch // 4, batch)
                true_ids = [
                    lexicon.ids(" ".join(captions.true_words(shown[k], backgrounds[k])))
                    for k in attacked
                ]
                prompts = attack(
                    model, pool, [chosen[k] for k in attacked], image[attacked], true_ids, generator
                )
                negative_batches.append(pack(prompts.tolist(), ADVERSARIAL_LEN))

            with torch.autocast("cpu", torch.bfloat16):
                text = encode_text(model, model.token_embedding(ids), ends)
                negatives = [
                    encode_text(model, model.token_embedding(i), e) for i, e in negative_batches
                ]
            loss = contrastive_loss(
                image, text, torch.cat(negatives), same, model.logit_scale.exp()
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(60))
            running += loss.item()
            if step % 50 == 0:
                with torch.no_grad():
                    shown_of = [image[:quarter], image[-quarter:]]
                    levels = [
                        f"{(i * n).sum(1).mean():.3f}"
                        for i, n in zip(shown_of, negatives, strict=False)
                    ]
                    log.info(
                        "step %d loss %.3f true %.3f corrupted, adversarial %s scale %.1f %.0fs",
                        step,
                        loss.item(),
                        (image * text).sum(1).mean(),
                        levels,
                        model.logit_scale.exp(),
                        time.monotonic() - began,
                    )
            step += 1
        if epoch % 5 == 4 or epoch == epochs - 1:
            metrics = evaluate_in_training(model, images, lexicon, drawings)
            log.info("epoch %d loss %.3f %s", epoch + 1, running / steps_per_epoch, metrics)
            metrics |= {"epochs": epoch + 1, "seed": seed}
            export(model, config, full_table, lexicon, metrics, out)


def export(
    model: CLIP,
    config: dict,
    full_table: torch.Tensor,
    lexicon: Lexicon,
    metrics: dict,
    out: Path,
) -> None:
    """Write open_clip config, fp16 safetensors, default vocabulary and metrics."""
    out.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    table = full_table.clone()
    table[lexicon.tokens] = model.token_embedding.weight.detach()
    state["token_embedding.weight"] = table
    state = {
        name: value.half().contiguous() if value.is_floating_point() else value.contiguous()
        for name, value in state.items()
    }
    save_file(state, out / "open_clip_model.safetensors")
    whole = {"model_cfg": config, "preprocess_cfg": PREPROCESS}
    (out / "open_clip_config.json").write_text(json.dumps(whole, indent=2) + "\n")
    tokens = sorted(t for t in lexicon.tokens if t not in (0, SOT, EOT))
    (out / "vocabulary.json").write_text(json.dumps(tokens) + "\n")
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="emoji-clip")
    parser.add_argument("--folder", type=Path, default=Path("build/emoji"))
    parser.add_argument("--out", type=Path, help="default: where the model belongs")
    parser.add_argument("--epochs", type=int, help="default: those of the model")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, help="default: that of the model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last export in --out; the optimiser starts anew",
    )
    parser.add_argument("--evaluate", action="store_true", help="measure what is in --out, as JSON")
    arguments = vars(parser.parse_args())
    model = MODELS[arguments.pop("model")]
    for name, value in arguments.items():
        arguments[name] = getattr(model, name) if value is None else value
    if arguments.pop("evaluate"):
        print(json.dumps(evaluate_exported(arguments["folder"], arguments["out"])))
    else:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        train(config=model.config, **arguments)
