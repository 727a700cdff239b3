"""Train, evaluate and export `emoji-clip`, the small real CLIP that ships with pez_core.

    pip install -e . resvg-py && python tools/train_emoji_clip.py --init pez_core/models/emoji-clip

Downloads and renders the drawings (`emoji_data.py`), trains an ordinary open_clip model with the
ordinary CLIP tokenizer on them and writes weights, config, vocabulary and metrics to `--out`. The
state is kept in `--checkpoint`; `--resume` goes on from there. The seed is fixed.

With `--init` it goes on from a trained model: what is new (tokens, text layers) is added, and the
image tower up to its third stage stays as it is, so that most views are encoded that far only once.
Without, all is trained from nothing, which takes several times as long.

`emoji-clip-judge` is a second model, of other widths, depths and seed, that takes no part in any
search: benchmarks ask it whether a prompt means to another CLIP what it means to the one that it
was learned on. It goes to `benchmarks/models/emoji-clip-judge` and is not part of the package.

Searched prompts exploit every weakness of the text tower. So training differs from plain CLIP:

* Most captions are sentences that are true of the drawing, colours included (`emoji_captions.py`);
  the others are bags of its own words in random order, up to the full context.
* Captions that one change makes false are extra negatives of their own image.
* Corrupted captions, half of whose words are random, are extra negatives.
* Later on, bags of the false words that are, each for itself, most similar to the image are extra
  negatives, and so are prompts that a search by swaps goes on improving against the growing model.
* The temperature stays high, so that true captions have to be much more similar than false ones.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from emoji_captions import EOT, SOT, Caption, Captions, Lexicon
from emoji_data import SIZE, STYLES, Drawing, prepare, words_of
from emoji_views import Images, View, cached_round, draw_view
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

log = logging.getLogger("train_emoji_clip")


@dataclass(frozen=True)
class Model:
    """Configuration, place and seed of a model that this tool makes."""

    config: dict  # open_clip's `model_cfg`
    out: Path
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
        _config(256, {"layers": [1, 1, 1, 1]}, {"width": 128, "heads": 4, "layers": 3}),
        Path("pez_core/models/emoji-clip"),
        seed=0,
    ),
    "emoji-clip-judge": Model(
        _config(192, {"layers": [1, 1, 2, 1]}, {"width": 160, "heads": 5, "layers": 3}),
        Path("benchmarks/models/emoji-clip-judge"),
        seed=1,
    ),
}
PREPROCESS = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}

CONTENT = 20  # tokens of most captions at most
ADVERSARIAL_LEN = 16
SALADS, CORRUPTED, NEARLY = 48, 32, 112  # negatives of each kind in a batch
HUNTED, CANDIDATES = 16, 24  # prompts of the hunt, and tokens tried for each in a step
HUNTED_FOR = 64  # steps that a prompt stays in the hunt
READ_EVERY = 40  # steps after which all single words are encoded anew
TEMPTING = 40  # false words that an image's salads are made of
EACH = 2  # captions of each view, since images take longer than texts
SAVE_EVERY, LOG_EVERY = 50, 25  # steps
ROUNDS = 4  # views of each drawing that are encoded before training, with `--init`
DEV = 60  # drawings for the figures during training, never trained on


@dataclass(frozen=True)
class Schedule:
    """How to train.

    Attributes:
        steps, lr, seed: as usual.
        batch: captions in a step.
        init: the folder of the model to start from; None: from nothing.
        adversarial_from: share of the steps after which adversarial prompts take part.
        hottest: the largest factor of cosines in the loss; small ones ask for large differences.
        alignment: weight of the similarity of true captions itself, less those of any captions
            and of false words that are similar to the image.
        evaluate_every: steps between two measurements on what was never trained on.
    """

    steps: int
    batch: int
    lr: float
    seed: int
    init: Path | None = None
    adversarial_from: float = 0.35
    hottest: float = 20.0
    alignment: float = 4.0
    evaluate_every: int = 250


def _has_bf16() -> bool:
    """Whether this CPU multiplies in bfloat16; where it does not, that is far slower than fp32."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


BF16 = _has_bf16()


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=BF16)


def pack(rows: Sequence[Sequence[int]], longest: int) -> tuple[torch.Tensor, torch.Tensor]:
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
    mask = model.attn_mask[:length, :length]
    x = embeddings + model.positional_embedding[:length]
    *blocks, last = model.transformer.resblocks
    for block in blocks:
        x = block(x, attn_mask=mask)
    x = _at_end(last, x, ends)
    return F.normalize((model.ln_final(x) @ model.text_projection).float(), dim=-1)


def _at_end(block: nn.Module, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """(N, width) output of the last block at the end positions, the only ones that are used."""
    n, length, width = x.shape
    heads, attention = block.attn.num_heads, block.attn
    h, rows = block.ln_1(x), torch.arange(n)
    w_q, w_kv = attention.in_proj_weight.split([width, 2 * width])
    b_q, b_kv = attention.in_proj_bias.split([width, 2 * width])
    q = F.linear(h[rows, ends], w_q, b_q).view(n, heads, 1, -1)
    k, v = F.linear(h, w_kv, b_kv).view(n, length, 2, heads, -1).permute(2, 0, 3, 1, 4)
    seen = (torch.arange(length) <= ends[:, None])[:, None, None]
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    x = x[rows, ends] + attention.out_proj(mixed.reshape(n, width))
    return x + block.mlp(block.ln_2(x))


def attention_pool(pool: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The same as `pool(x)` in a third of the time: there is one query, so that a projection of it
    takes the place of those of all keys, and one of the mixed values that of all values."""
    n, heads = len(x), pool.num_heads
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + pool.positional_embedding
    width = x.shape[-1]
    q = pool.q_proj(x[:, 0]).view(n, heads, -1).transpose(0, 1)
    keys, values = (p.weight.view(heads, -1, width) for p in (pool.k_proj, pool.v_proj))
    q = torch.bmm(q, keys).transpose(0, 1) * (width // heads) ** -0.5
    weights = torch.bmm(q, x.transpose(1, 2)).softmax(-1)
    mixed = torch.bmm(weights, x).transpose(0, 1)
    mixed = torch.bmm(mixed, values.transpose(1, 2)).transpose(0, 1).reshape(n, width)
    return pool.c_proj(mixed + pool.v_proj.bias)


def encode_rows(model: CLIP, rows: Sequence[Sequence[int]], longest: int) -> torch.Tensor:
    """Compact id rows -> unit features; rows of about the same length go together."""
    order = sorted(range(len(rows)), key=lambda k: len(rows[k]))
    parts = [order[k : k + 128] for k in range(0, len(order), 128)]
    found = []
    for part in parts:
        ids, ends = pack([rows[k] for k in part], longest)
        found.append(encode_text(model, model.token_embedding(ids), ends))
    return torch.cat(found)[torch.tensor(order).argsort()]


def contrastive_loss(
    image: torch.Tensor,
    text: torch.Tensor,
    wrong: torch.Tensor,
    nearly: torch.Tensor,
    same: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    """CLIP loss with further texts, true of no image, as negatives of the images.

    Args:
        image, text: (N, features) pairs.
        wrong: negatives of all images.
        nearly: negatives of the first len(nearly) images, one of each.
        same: (N, N) pairs that do not count, as the text may be true of the image.
        scale: of the cosines.
    """
    logits = (scale * image @ text.T).masked_fill(same, float("-inf"))
    own = F.pad(
        scale * (image[: len(nearly)] * nearly).sum(1),
        (0, len(image) - len(nearly)),
        value=float("-inf"),
    )[:, None]
    with_negatives = torch.cat([logits, scale * image @ wrong.T, own], dim=1)
    target = torch.arange(len(image))
    return (F.cross_entropy(with_negatives, target) + F.cross_entropy(logits.T, target)) / 2


class Hunt:
    """Prompts that are improved step by step against the model in training.

    Each belongs to a drawing and is changed at one position in each step, to the best of a few
    tokens that the gradient promises most of. From time to time the oldest gives way to a new one,
    which begins with words that are similar to its drawing each for itself. So at any time some of
    them are as strong as those that a whole search finds. Half of them are made of false words and
    should not be similar at all; the others of any words, and should not be more similar than
    sentences are.

    Attributes:
        drawings: of each prompt.
        prompts: (HUNTED, ADVERSARIAL_LEN) compact ids.
        barred: (HUNTED, tokens) 0 for tokens that may be used, -inf for the others.
        free: (HUNTED,) any words may be used.
        oldest: place of the prompt that goes next.
    """

    def __init__(self) -> None:
        self.drawings: list[int] = []
        self.prompts = torch.zeros(0, ADVERSARIAL_LEN, dtype=torch.long)
        self.barred = torch.zeros(0, 0)
        self.free = torch.zeros(0, dtype=torch.bool)
        self.oldest = 0

    def add(self, drawing: int, prompt: torch.Tensor, barred: torch.Tensor, free: bool) -> None:
        """A new prompt, in place of the oldest where there are enough."""
        if len(self.drawings) < HUNTED:
            self.drawings.append(drawing)
            self.prompts = torch.cat([self.prompts, prompt[None]])
            self.barred = torch.cat([self.barred.view(-1, len(barred)), barred[None]])
            self.free = torch.cat([self.free, torch.tensor([free])])
            return
        k = self.oldest
        self.drawings[k], self.prompts[k] = drawing, prompt
        self.barred[k], self.free[k] = barred, free
        self.oldest = (k + 1) % HUNTED

    def improve(self, model: CLIP, image: torch.Tensor, position: int) -> None:
        """Change one position of each prompt for the better.

        Args:
            model: with the compact token table.
            image: (HUNTED, features) unit features of the drawings.
            position: in the prompts.
        """
        table = model.token_embedding.weight.detach()
        embeddings = table[_edged(self.prompts)].requires_grad_()
        now = self._cosines(model, embeddings, image)
        (gradient,) = torch.autograd.grad(now.sum(), embeddings)
        promise = gradient[:, position + 1] @ table.T + self.barred
        tokens = promise.topk(CANDIDATES).indices
        swapped = self.prompts[:, None].repeat(1, CANDIDATES, 1)
        swapped[:, :, position] = tokens
        with torch.no_grad():
            rows = table[_edged(swapped.flatten(0, 1))]
            found = self._cosines(model, rows, image.repeat_interleave(CANDIDATES, dim=0))
        best = found.view(-1, CANDIDATES).max(1)
        every = torch.arange(len(self.prompts))
        better = best.values > now.detach()
        self.prompts = torch.where(better[:, None], swapped[every, best.indices], self.prompts)

    @staticmethod
    def _cosines(model: CLIP, embeddings: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        ends = torch.full((len(embeddings),), ADVERSARIAL_LEN + 1)
        with autocast():
            return (encode_text(model, embeddings, ends) * image).sum(1)


def _edged(ids: torch.Tensor) -> torch.Tensor:
    """Compact ids (N, L) with the start token before and the end token behind them."""
    return F.pad(F.pad(ids, (1, 0), value=1), (0, 1), value=2)


TextEncoder = Callable[[list[str]], torch.Tensor]
ImageEncoder = Callable[[list[int]], torch.Tensor]


@torch.no_grad()
def zero_shot(
    encode_texts: TextEncoder,
    encode_images: ImageEncoder,
    drawings: list[Drawing],
    index: list[int],
) -> torch.Tensor:
    """(len(index),) bool: is the drawing's own name the best of all the names in `index`."""
    own = [" ".join(words_of(drawings[i].name)) for i in index]
    names = sorted(set(own))
    templates = ("{}", "{} emoji", "a picture of {}")
    features = sum(encode_texts([t.format(n) for n in names]) for t in templates)
    pictures = torch.cat([encode_images(index[k : k + 256]) for k in range(0, len(index), 256)])
    best = (pictures @ features.T).argmax(1).tolist()
    return torch.tensor([names[b] == name for b, name in zip(best, own, strict=True)])


def evaluate(
    encode_texts: TextEncoder, encode_images: ImageEncoder, drawings: list[Drawing]
) -> dict:
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


def _fused(block: nn.Module) -> None:
    """Put each batch norm behind a convolution of the block into that."""
    for k in (1, 2, 3):
        conv, norm = getattr(block, f"conv{k}"), getattr(block, f"bn{k}")
        setattr(block, f"conv{k}", fuse_conv_bn_eval(conv, norm))
        setattr(block, f"bn{k}", nn.Identity())
    if getattr(block, "downsample", None) is not None:
        pool, conv, norm = block.downsample
        block.downsample = nn.Sequential(pool, fuse_conv_bn_eval(conv, norm))


def frozen_trunk(visual: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The image tower up to its third stage, as it is now, for looking only."""
    tower = copy.deepcopy(visual).eval()
    _fused(tower)
    for stage in (tower.layer1, tower.layer2, tower.layer3):
        for block in stage:
            _fused(block)

    @torch.no_grad()
    def trunk(x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        with autocast():
            return tower.layer3(tower.layer2(tower.layer1(tower.stem(x)))).float().contiguous()

    return trunk


class Pictures:
    """Views of the training drawings, as far as they need not be encoded anew in each step.

    Args:
        drawings, images: all of them.
        index: drawings that are trained on.
        rng: draws views.
        trunk: frozen part of the image tower; None: nothing is frozen, and each view is new.
        folder: where the first encoded views are kept.
    """

    def __init__(
        self,
        drawings: list[Drawing],
        images: Images,
        index: list[int],
        rng: random.Random,
        trunk: Callable[[torch.Tensor], torch.Tensor] | None,
        folder: Path,
    ) -> None:
        self.drawings, self.images, self.index, self.rng = drawings, images, index, rng
        self.trunk = trunk
        self.row = {i: k for k, i in enumerate(index)}
        self.rounds = []
        if trunk is not None:
            pixels = images.pixels.permute(0, 2, 3, 1).numpy()
            for k in range(ROUNDS):
                self.rounds.append(cached_round(k, folder, drawings, pixels, trunk))

    def draw(self, chosen: Sequence[int]) -> tuple[list[View], torch.Tensor]:
        """A view of each chosen drawing and what the trained part of the tower takes in.

        With a trunk an eighth of the views are new, and take the place of others in the pool.
        """
        fresh = len(chosen) if self.trunk is None else len(chosen) // 8
        views = [draw_view(self.drawings, i, self.index, self.rng) for i in chosen[:fresh]]
        x = self.images.augmented(views)
        if self.trunk is None:
            return views, x
        parts = [self.trunk(x)]
        for i, view, row in zip(chosen, views, parts[0], strict=False):
            known, array = self.rng.choice(self.rounds)
            known[self.row[i]], array[self.row[i]] = view, row.half().numpy()
        rows = []
        for i in chosen[fresh:]:
            known, array = self.rng.choice(self.rounds)
            views.append(known[self.row[i]])
            rows.append(array[self.row[i]])
        parts.append(torch.from_numpy(np.stack(rows)).float())
        return views, torch.cat(parts).contiguous(memory_format=torch.channels_last)


def make_model(config: dict, lexicon: Lexicon, init: Path | None) -> tuple[CLIP, torch.Tensor]:
    """A model with the compact token table, and the whole table.

    What `init` has is taken from there. Further text layers begin as ones that change nothing, and
    tokens that it was not trained on as random ones of the kind of those that it was.
    """
    model = CLIP(**config)
    full_table = model.token_embedding.weight.detach().clone()
    if init is not None:
        state = load_file(init / "open_clip_model.safetensors")
        state = {name: value.float() for name, value in state.items()}
        full_table = state["token_embedding.weight"]
        for block in model.transformer.resblocks:
            for last in (block.attn.out_proj, block.mlp.c_proj):
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
        missing, unexpected = model.load_state_dict(state, strict=False)
        if unexpected or any(not name.startswith("transformer.resblocks") for name in missing):
            raise ValueError(f"{init} has another shape: {missing} {unexpected}")
        trained = json.loads((init / "vocabulary.json").read_text())
        new = sorted(set(lexicon.tokens) - {*trained, 0, SOT, EOT})
        known = full_table[trained]
        full_table[new] = known.mean(0) + known.std(0) * torch.randn(len(new), known.shape[1]) / 2
    model.token_embedding = nn.Embedding.from_pretrained(
        full_table[lexicon.tokens].clone(), freeze=False
    )
    model.visual = model.visual.to(memory_format=torch.channels_last)
    return model, full_table


class Training:
    """All that a training run has, and its steps.

    Args:
        folder: of the drawings.
        model: what to train.
        schedule: of the training.
        checkpoint: file that the state is kept in.
        paraphrases: see `Captions`.
    """

    def __init__(
        self,
        folder: Path,
        model: Model,
        schedule: Schedule,
        checkpoint: Path,
        paraphrases: Path | None = None,
    ) -> None:
        torch.manual_seed(schedule.seed)
        self.schedule, self.config, self.checkpoint = schedule, model.config, checkpoint
        self.rng = random.Random(schedule.seed)
        self.generator = torch.Generator().manual_seed(schedule.seed)
        self.drawings, pixels = prepare(folder)
        self.lexicon = Lexicon()
        self.captions = Captions(self.drawings, pixels, self.lexicon, self.rng, paraphrases)
        self.index = [i for i, d in enumerate(self.drawings) if d.split == "train"]
        names: dict[str, int] = {}
        self.name_id = torch.tensor([names.setdefault(d.name, len(names)) for d in self.drawings])
        self.style_id = torch.tensor([list(STYLES).index(d.style) for d in self.drawings])
        self.model, self.full_table = make_model(model.config, self.lexicon, schedule.init)
        self.images = Images(pixels, self.generator)
        visual = self.model.visual
        self.trunk = None if schedule.init is None else frozen_trunk(visual)
        self.pictures = Pictures(
            self.drawings,
            self.images,
            self.index,
            self.rng,
            self.trunk,
            checkpoint.parent / "views",
        )
        if self.trunk is not None:
            for part in (visual.layer1, visual.layer2, visual.layer3):
                part.requires_grad_(False)
            for k in (1, 2, 3):
                getattr(visual, f"conv{k}").requires_grad_(False)
                getattr(visual, f"bn{k}").requires_grad_(False)
        self.optimizer = self._optimizer()
        self.hunt = Hunt()
        self.step, self.left = 0, []
        self.alone: torch.Tensor | None = None  # features of each token, as a word alone
        self.seen: dict[tuple[int, ...], torch.Tensor] = {}  # what the trunk makes of test images
        self.dev = self._dev_set()
        log.info("%d drawings, %d tokens, bf16 %s", len(self.index), len(self.lexicon.tokens), BF16)

    def _optimizer(self) -> torch.optim.Optimizer:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        decayed = [p for p in trained if p.ndim >= 2]
        others = [p for p in trained if p.ndim < 2]
        groups = [
            {"params": decayed, "weight_decay": 0.2},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.schedule.lr, betas=(0.9, 0.98), fused=True)

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "hunt": vars(self.hunt),
            "step": self.step,
            "left": self.left,
            "rng": self.rng.getstate(),
            "generator": self.generator.get_state(),
            "torch": torch.get_rng_state(),
            "tokens": self.lexicon.tokens,
        }
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        whole = self.checkpoint.with_suffix(".part")
        torch.save(state, whole)
        whole.replace(self.checkpoint)

    def resume(self) -> None:
        """Go on from the checkpoint; views that were renewed since the start are drawn again."""
        state = torch.load(self.checkpoint, weights_only=False)
        if state["tokens"] != self.lexicon.tokens:
            raise ValueError(f"{self.checkpoint} was made with other captions.")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.left = state["step"], state["left"]
        if len(state["hunt"]["drawings"]) == HUNTED:
            vars(self.hunt).update(state["hunt"])
        self.rng.setstate(state["rng"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch"])

    def encode_images(self, x: torch.Tensor) -> torch.Tensor:
        """Unit features of what `Pictures` gives."""
        visual = self.model.visual
        if self.trunk is not None:
            features = attention_pool(visual.attnpool, visual.layer4(x))
        else:
            features = visual(x)
        return F.normalize(features.float(), dim=-1)

    def _plain(self, index: list[int]) -> torch.Tensor:
        key = tuple(index)
        if self.trunk is None or key not in self.seen:
            x = self.images.plain(index).contiguous(memory_format=torch.channels_last)
            if self.trunk is None:
                return self.encode_images(x)
            self.seen[key] = self.trunk(x)
        return self.encode_images(self.seen[key])

    def _texts(self, lines: list[str]) -> torch.Tensor:
        return encode_rows(self.model, [self.lexicon.ids(line) for line in lines], 40)

    def _dev_set(self) -> list[tuple[int, str]]:
        """Held-out drawings with captions; those of the tests and examples are not among them."""
        root = Path(__file__).parent.parent
        apart = {row["file"] for row in map(json.loads, (root / "examples/index.jsonl").open())}
        tests = (root / "benchmarks/data/unseen_captions.jsonl").open()
        apart |= {f"{row['style']}-{row['icon']}.png" for row in map(json.loads, tests)}
        rng, kept = random.Random(5), self.captions.rng
        self.captions.rng = rng
        found, names = [], set()
        for style in ("noto", "twemoji", "fxemoji"):
            index = [
                i
                for i, d in enumerate(self.drawings)
                if d.style == style
                and d.split != "train"
                and f"{style}-{d.icon}.png" not in apart
                and self.captions.phrases[i]
                and d.name not in names
            ]
            for i in rng.sample(index, DEV // 3):
                names.add(self.drawings[i].name)
                found.append((i, self.captions.from_phrase(i, self.captions.phrases[i])))
        self.captions.rng = kept
        return found

    @torch.no_grad()
    def measure(self) -> dict:
        """Retrieval of the dev set in both directions, and zero-shot figures."""
        self.model.eval()
        image = self._plain([i for i, _ in self.dev])
        text = self._texts([caption for _, caption in self.dev])
        cosines = image @ text.T
        own = torch.arange(len(self.dev))
        figures = {
            "dev_caption_to_image": (cosines.argmax(0) == own).float().mean().item(),
            "dev_image_to_caption": (cosines.argmax(1) == own).float().mean().item(),
            "dev_similarity": cosines.diag().mean().item(),
            "dev_similarity_of_others": cosines[~torch.eye(len(own), dtype=bool)].mean().item(),
        }
        figures = {name: round(value, 4) for name, value in figures.items()}
        zero = evaluate(self._texts, self._plain, self.drawings)
        self.model.train()
        return zero | figures

    def _chosen(self) -> list[int]:
        count = self.schedule.batch // EACH
        if len(self.left) < count:
            self.left = self.index.copy()
            self.rng.shuffle(self.left)
        chosen, self.left = self.left[:count], self.left[count:]
        return chosen

    def _written(self, views: list[View], longest: int) -> list[Caption]:
        short = CONTENT - 6
        return [
            self.captions.caption(view, longest if self.rng.random() < 0.3 else short)
            for view in views
        ]

    def _same(self, chosen: list[int], written: list[Caption]) -> torch.Tensor:
        """(N, N) which texts may be true of which other images: those of the same name."""
        same = self.name_id[chosen][:, None] == self.name_id[chosen][None, :]
        other_style = self.style_id[chosen][:, None] != self.style_id[chosen][None, :]
        styled = torch.tensor([caption.styled for caption in written])
        same &= ~(other_style & styled[None, :])
        return same.fill_diagonal_(False)

    def _hunted(self) -> torch.Tensor | None:
        """(HUNTED, features) of the hunted drawings, after a step of the hunt; None at first."""
        if self.alone is None:
            return None
        hunt = self.hunt
        full, due = len(hunt.drawings) == HUNTED, self.step % (HUNTED_FOR // HUNTED) == 0
        for _ in range(int(due) if full else HUNTED):
            i, free = self.rng.choice(self.index), self.rng.random() < 0.5
            barred = self._false_tokens(None if free else View((i,), False, "white"))
            with torch.no_grad():
                cosines = self._as_shown([i])[0] @ self.alone.T
            prompt = self._tempting(cosines[None], barred[None, 3:])[0]
            hunt.add(i, prompt, barred, free)
        with torch.no_grad():
            image = self._as_shown(hunt.drawings)
        hunt.improve(self.model, image, self.rng.randrange(ADVERSARIAL_LEN))
        return image

    def _as_shown(self, index: list[int]) -> torch.Tensor:
        """Unit features of whole drawings on white, by the model as it is outside training."""
        self.model.visual.eval()
        parts = [self._plain([i]) if self.trunk is None else self._stages(i) for i in index]
        features = torch.cat(parts)
        if self.trunk is not None:
            features = self.encode_images(features)
        self.model.visual.train()
        return features

    def _stages(self, i: int) -> torch.Tensor:
        key = (i,)
        if key not in self.seen:
            self.seen[key] = self.trunk(self.images.plain([i]))
        return self.seen[key]

    def _false_tokens(self, view: View | None) -> torch.Tensor:
        """(tokens,) 0, or -inf for the special ones and those of words that are true of `view`."""
        false = torch.zeros(len(self.lexicon.tokens))
        true = [] if view is None else self.lexicon.ids(" ".join(self.captions.true_words(view)))
        false[[0, 1, 2, *true]] = -math.inf
        return false

    def _tempting(self, cosines: torch.Tensor, false: torch.Tensor) -> torch.Tensor:
        """(N, words) cosines and which are false -> (N, ADVERSARIAL_LEN) similar false words."""
        best = (cosines + false).topk(TEMPTING)
        weights = (self.schedule.hottest * best.values).softmax(-1)
        picks = weights.multinomial(ADVERSARIAL_LEN, replacement=True, generator=self.generator)
        return best.indices.gather(1, picks) + 3

    @torch.no_grad()
    def _salads(self, views: list[View], image: torch.Tensor) -> list[list[int]]:
        """For the first images bags of the false words that are most similar to them alone.

        A search finds much the same and takes far longer. There are none at the beginning.
        """
        if self.step < self.schedule.adversarial_from * self.schedule.steps:
            return []
        if self.alone is None or self.step % READ_EVERY == 0:
            words = range(3, len(self.lexicon.tokens))
            self.alone = encode_rows(self.model, [[word] * 3 for word in words], 3)
        part = slice(0, SALADS * EACH, EACH)
        false = torch.stack([self._false_tokens(view)[3:] for view in views[part]])
        rows = self._tempting(image[part] @ self.alone.T, false).tolist()
        return [row[: self.rng.randint(4, ADVERSARIAL_LEN)] for row in rows]

    def train_step(self) -> dict[str, float]:
        """One step; returns what it is logged by."""
        schedule, ids = self.schedule, self.lexicon.ids
        share = self.step / schedule.steps
        rate = schedule.lr * min(1, (self.step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * share))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        chosen = self._chosen()
        views, x = self.pictures.draw(chosen)
        with autocast():
            image = self.encode_images(x).repeat_interleave(EACH, dim=0)
        chosen, views = ([one for one in many for _ in range(EACH)] for many in (chosen, views))
        longest = 74 if self.step % 16 == 15 else CONTENT
        written = self._written(views, longest)
        wrong = [ids(self.captions.corrupted(caption)) for caption in written[:CORRUPTED]]
        pairs = zip(written[:NEARLY], views, strict=False)
        nearly = [ids(self.captions.nearly(caption, view)) for caption, view in pairs]
        salads = self._salads(views, image)
        hunted = self._hunted()
        attacked = [] if hunted is None else self.hunt.prompts.tolist()
        rows = [ids(caption.text) for caption in written] + wrong + attacked + salads + nearly
        with autocast():
            features = encode_rows(self.model, rows, longest)
        sizes = [len(written), CORRUPTED, len(attacked), len(salads), NEARLY]
        text, wrong, attacked, salads, nearly = features.split(sizes)
        false = [] if hunted is None else [attacked[~self.hunt.free]]
        negatives = torch.cat([wrong, *false, salads])
        scale = self.model.logit_scale.exp()
        same = self._same(chosen, written)
        loss = contrastive_loss(image, text, negatives, nearly, same, scale)
        true = (image * text).sum(1)
        sentences = true[[not caption.bag for caption in written]]
        others = (image @ text.T).mean()
        fooled = (image[: len(salads) * EACH : EACH] * salads).sum(1)
        apart = 1 - sentences.mean() + others.relu() + fooled.relu().sum() / SALADS
        if hunted is not None:
            found = (hunted * attacked).sum(1)
            limit = self.hunt.free * sentences.mean().detach()
            apart = apart + (found - limit).relu().mean()
        self._update(loss + schedule.alignment * apart)
        levels = {
            "loss": loss,
            "true": true.mean(),
            "sentences": sentences.mean(),
            "others": others,
            "corrupted": (image[:CORRUPTED] * wrong).sum(1).mean(),
            "nearly": (image[:NEARLY] * nearly).sum(1).mean(),
            "nearly_higher": ((image[:NEARLY] * nearly).sum(1) > true[:NEARLY]).float().mean(),
            "scale": scale,
        }
        if len(salads):
            levels["salads"] = fooled.mean()
        if len(attacked):
            for name, kind in (("false", ~self.hunt.free), ("free", self.hunt.free)):
                levels[name] = found[kind].mean()
        self.step += 1
        return {name: value.item() for name, value in levels.items()}

    def _update(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=math.log(self.schedule.hottest))

    def run(self, out: Path) -> None:
        """All steps that are left."""
        began, last, sums = time.monotonic(), self.step, {}
        while self.step < self.schedule.steps:
            for name, value in self.train_step().items():
                sums.setdefault(name, []).append(value)
            if self.step % LOG_EVERY == 0:
                seconds = (time.monotonic() - began) / (self.step - last)
                means = {k: round(sum(v) / len(v), 3) for k, v in sums.items()}
                log.info("step %d, %.2f s each: %s", self.step, seconds, means)
                sums = {}
            done = self.step == self.schedule.steps
            if done or self.step % SAVE_EVERY == 0:
                self.save()
            if done or self.step % self.schedule.evaluate_every == 0:
                metrics = self.measure()
                log.info("step %d: %s", self.step, metrics)
                metrics |= {"steps": self.step, "seed": self.schedule.seed}
                export(self.model, self.config, self.full_table, self.lexicon, metrics, out)


def export(
    model: CLIP,
    config: dict,
    full_table: torch.Tensor,
    lexicon: Lexicon,
    metrics: dict,
    out: Path,
) -> None:
    """Write open_clip config, fp16 safetensors, default vocabulary and metrics.

    The vocabulary is what prompts are made of by default: the tokens that are a word of a name, a
    keyword, a phrase, a colour or a style. Pieces of words were trained too but are not in it.
    """
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
    (out / "vocabulary.json").write_text(json.dumps(sorted(lexicon.whole)) + "\n")
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="emoji-clip")
    parser.add_argument("--folder", type=Path, default=Path("build/emoji"))
    parser.add_argument("--out", type=Path, help="default: where the model belongs")
    parser.add_argument("--init", type=Path, help="folder of the model to start from")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, help="default: that of the model")
    parser.add_argument("--hottest", type=float, default=Schedule.hottest)
    parser.add_argument("--alignment", type=float, default=Schedule.alignment)
    parser.add_argument("--paraphrases", type=Path, help="what paraphrase_captions.py writes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, help="default: build/MODEL/checkpoint.pt")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--evaluate", action="store_true", help="measure what is in --out, as JSON")
    a = parser.parse_args()
    model = MODELS[a.model]
    out = a.out or model.out
    if a.evaluate:
        print(json.dumps(evaluate_exported(a.folder, out)))
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(a.threads)
    seed = model.seed if a.seed is None else a.seed
    schedule = Schedule(
        a.steps, a.batch, a.lr, seed, a.init, hottest=a.hottest, alignment=a.alignment
    )
    checkpoint = a.checkpoint or Path("build") / a.model / "checkpoint.pt"
    training = Training(a.folder, model, schedule, checkpoint, a.paraphrases)
    if a.resume:
        training.resume()
    training.run(out)


if __name__ == "__main__":
    main()
