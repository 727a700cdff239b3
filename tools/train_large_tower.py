"""Train a text tower of ViT-B/32's shape behind the image tower of `emoji-clip`, for benchmarks.

    python tools/train_large_tower.py [--minutes M] [--out build/emoji-clip-large]

What a search costs depends on the text tower: that of `emoji-clip` has 3 layers, that of ViT-B/32
has 12 and is 60 times as much work. benchmarks/equal_work.py compares methods on both. The large
tower learns to give the features of the small one (a mean squared error of unit vectors) and its
similarities with the training drawings (Kullback-Leibler divergence), on captions, false captions,
bags of true words and bags of random words, so that it is a CLIP with a mind of its own. It is
not part of the package. --checkpoint is written every few minutes, and the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from emoji_captions import Captions, Lexicon
from emoji_data import prepare
from emoji_views import Images, View
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_emoji_clip import MODELS, autocast, encode_rows, evaluate

log = logging.getLogger("train_large_tower")

SMALL = MODELS["emoji-clip"]
TEXT = {"width": 512, "heads": 8, "layers": 12}
HEAT = 20.0  # factor of the similarities with drawings
SHOWN = 1024  # drawings in a step
LONGEST = 24  # tokens of a text
LOG_EVERY, SAVE_SECONDS = 50, 300


def large_config() -> dict:
    """open_clip's `model_cfg` of the CLIP with the large text tower."""
    return SMALL.config | {"text_cfg": SMALL.config["text_cfg"] | TEXT}


def compact(model: CLIP, tokens: Sequence[int]) -> CLIP:
    """The model with the rows of some tokens only in its table."""
    table = model.token_embedding.weight.detach()[tokens].clone()
    model.token_embedding = nn.Embedding.from_pretrained(table, freeze=False)
    return model


def small_model() -> CLIP:
    state = load_file(SMALL.out / "open_clip_model.safetensors")
    model = CLIP(**SMALL.config)
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model.eval().requires_grad_(False)


def large_model(small: CLIP) -> CLIP:
    """With the image tower of the small one; its table is that of the small one, rotated."""
    model = CLIP(**large_config())
    model.visual.load_state_dict(small.visual.state_dict())
    model.visual.requires_grad_(False).eval()
    table = small.token_embedding.weight
    turn = nn.init.orthogonal_(torch.empty(table.shape[1], TEXT["width"]))
    spread = model.token_embedding.weight.std() / table.std()
    with torch.no_grad():
        model.token_embedding.weight.copy_(table @ turn * spread * 2)
    return model


class Texts:
    """Draws texts of every kind that a search meets."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng, self.lexicon = random.Random(seed), Lexicon()
        self.drawings, pixels = prepare(folder)
        self.captions = Captions(self.drawings, pixels, self.lexicon, self.rng)
        self.index = [i for i, one in enumerate(self.drawings) if one.split == "train"]
        self.images = Images(pixels, torch.Generator().manual_seed(seed))

    def batch(self, size: int) -> list[list[int]]:
        return [self._one() for _ in range(size)]

    def _one(self) -> list[int]:
        view = View((self.rng.choice(self.index),), False, "white")
        caption = self.captions.caption(view, LONGEST - 4)
        kind, ids = self.rng.random(), self.lexicon.ids
        if kind < 0.4:
            return ids(caption.text)
        if kind < 0.55:
            return ids(self.captions.nearly(caption, view))
        words = range(3, len(self.lexicon.tokens))
        length = self.rng.randint(1, 16)
        if kind < 0.7:
            return self.rng.choices(words, k=length)
        true = ids(" ".join(self.captions.true_words(view)))
        share = self.rng.random()
        return [
            self.rng.choice(true if self.rng.random() < share else words) for _ in range(length)
        ]


class Training:
    """The models, and the steps of the training."""

    def __init__(self, a: argparse.Namespace) -> None:
        torch.manual_seed(a.seed)
        self.a, self.step, self.spent = a, 0, 0.0
        self.texts = Texts(a.folder, a.seed)
        whole = small_model()
        large = large_model(whole)
        self.whole_table = large.token_embedding.weight.detach().clone()
        tokens = self.texts.lexicon.tokens
        self.large, self.small = compact(large, tokens), compact(whole, tokens)
        self.shown = self._features(self.texts.index)
        trained = [p for p in self.large.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.05},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=a.lr, betas=(0.9, 0.98), fused=True)
        if a.checkpoint.exists():
            state = torch.load(a.checkpoint, weights_only=True)
            self.large.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.spent = state["step"], state["spent"]
        self.texts.rng.seed(a.seed + self.step)

    @torch.no_grad()
    def _features(self, index: list[int]) -> torch.Tensor:
        """Unit features of drawings on white."""
        parts = [index[k : k + 64] for k in range(0, len(index), 64)]
        visual, plain = self.small.visual, self.texts.images.plain
        return torch.cat([F.normalize(visual(plain(part)).float(), dim=-1) for part in parts])

    def train_step(self, progress: float) -> dict[str, float]:
        rate = self.a.lr * min(1, (self.step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rows = self.texts.batch(self.a.batch)
        with torch.no_grad():
            goal = encode_rows(self.small, rows, LONGEST)
        # the fused attention is slower for texts this short
        with autocast(), sdpa_kernel(SDPBackend.MATH):
            found = encode_rows(self.large, rows, LONGEST)
        drawings = self.shown[torch.randperm(len(self.shown))[:SHOWN]]
        wanted = (HEAT * goal @ drawings.T).log_softmax(-1)
        given = (HEAT * found @ drawings.T).log_softmax(-1)
        apart = F.kl_div(given, wanted, reduction="batchmean", log_target=True)
        error = (found - goal).square().sum(-1).mean()
        self.optimizer.zero_grad(set_to_none=True)
        (error + apart).backward()
        nn.utils.clip_grad_norm_(self.large.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return {"similarity": 1 - error.item() / 2, "divergence": apart.item()}

    def save(self) -> None:
        part = self.a.checkpoint.with_suffix(".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        kept = {"model": self.large.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(kept | {"step": self.step, "spent": self.spent}, part)
        part.replace(self.a.checkpoint)

    def run(self) -> None:
        """Train until the minutes are over, and write the CLIP."""
        saved, sums = self.spent, {}
        while self.spent < 60 * self.a.minutes:
            began = time.monotonic()
            for name, value in self.train_step(self.spent / 60 / self.a.minutes).items():
                sums[name] = sums.get(name, 0.0) + value / LOG_EVERY
            self.spent += time.monotonic() - began
            if self.step % LOG_EVERY == 0:
                means = {name: round(value, 4) for name, value in sums.items()}
                log.info("step %d, %.0f s: %s", self.step, self.spent, means)
                sums = {}
            if self.spent - saved > SAVE_SECONDS:
                saved = self.spent
                self.save()
        self.save()
        self.export()

    @torch.no_grad()
    def export(self) -> None:
        """Write open_clip's config and weights in half precision, and what they reach."""
        texts = self.texts

        def encode(lines: list[str]) -> torch.Tensor:
            return encode_rows(self.large, [texts.lexicon.ids(line) for line in lines], 40)

        metrics = evaluate(encode, self._features, texts.drawings) | {"steps": self.step}
        log.info("%s", metrics)
        state = self.large.state_dict()
        table = self.whole_table
        table[texts.lexicon.tokens] = state["token_embedding.weight"]
        state["token_embedding.weight"] = table
        halves = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
        out = self.a.out
        out.mkdir(parents=True, exist_ok=True)
        kept = {name: value.contiguous() for name, value in halves.items()}
        save_file(kept, out / "open_clip_model.safetensors")
        config = json.loads((SMALL.out / "open_clip_config.json").read_text())
        config["model_cfg"] = large_config()
        (out / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
        (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        shutil.copy(SMALL.out / "vocabulary.json", out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("build/emoji"))
    parser.add_argument("--out", type=Path, default=Path("build/emoji-clip-large"))
    parser.add_argument("--checkpoint", type=Path, default=Path("build/large-tower/state.pt"))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    Training(a).run()


if __name__ == "__main__":
    main()
