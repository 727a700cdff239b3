"""What SmolLM2 expects at each place of the sampled captions, to distil a smaller model from.

    python tools/sample_captions.py wordnet/package/dict
    python tools/expect_captions.py wordnet/package/dict

For every caption in --sampled, the probabilities of the most probable next words are read at those
places where a token of SmolLM2 and one of CLIP begin, as tokens of CLIP. Words of several tokens
have none, and neither do the first words up to the subject, which the sampler gave. Writes
safetensors to --out, where the places of all captions follow one another:

* `first`: (captions + 1,) the first place of each caption; there is one more than it has tokens.
* `ids`: (places, WORDS) tokens of CLIP, 0 where there are fewer.
* `shares`: (places, WORDS) their probabilities under the sampling that made the captions.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from sample_captions import (
    EXAMPLES,
    HEADS,
    OUT,
    SENTENCES,
    STARTS,
    TAGS,
    TEMPERATURE,
    TOP_P,
    subjects,
)

from pez_core import load_language_model
from pez_core.readability import FUNCTION_WORDS
from pez_core.token_lm import END

WORDS = 32  # of a place
BATCH = 64
MARKS = {",": ",", "'s": "'s", "-": "-", "\n": None}  # None: the end


class Expected:
    """Reads captions with SmolLM2.

    Args:
        known: words that its tokens may stand for; others are mostly the beginnings of long ones.
        given: words that are subjects of captions.
    """

    def __init__(self, known: set[str], given: set[str]) -> None:
        self.given = given
        one = load_language_model(dtype=torch.bfloat16)
        self.model, self.tokenizer, self.start = one.model, one.tokenizer, one.start
        self.clip = open_clip.SimpleTokenizer()
        size = self.model.get_input_embeddings().weight.shape[0]
        pieces = self.tokenizer.batch_decode([[k] for k in range(size)])
        self.as_clip = torch.zeros(size, dtype=torch.long)
        for k, piece in enumerate(pieces):
            if piece in MARKS:
                mark = MARKS[piece]
                self.as_clip[k] = END if mark is None else self.clip.encoder[f"{mark}</w>"]
                continue
            word = piece.removeprefix(" ")
            if piece != word and word in known and f"{word}</w>" in self.clip.encoder:
                self.as_clip[k] = self.clip.encoder[f"{word}</w>"]
        self.heads: dict[str, torch.Tensor] = {}
        for kind, examples in (("sentence", SENTENCES), ("tags", TAGS)):
            head = HEADS[kind] + "\n".join(examples.strip().splitlines()[:EXAMPLES]) + "\n"
            self.heads[kind] = torch.tensor([[self.start, *self._ids(head)]])

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def places(self, text: str, ids: list[int]) -> list[int | None]:
        """For each token of CLIP and the end, how many of `ids` stand before it.

        Both count the letters and marks, but no spaces, that they have read. None: another number
        of them, or up to the subject.
        """
        read, before = 0, {0: 0}
        for k, piece in enumerate(self.tokenizer.batch_decode([[k] for k in ids])):
            read += len(piece.replace(" ", ""))
            before[read] = k + 1
        found, read, word, shown = [], 0, "", False
        for token in self.clip.encode(text):
            found.append(before.get(read) if shown and not word else None)
            piece = self.clip.decoder[token]
            word += piece.removesuffix("</w>")
            read += len(piece.removesuffix("</w>"))
            if piece.endswith("</w>"):
                shown, word = shown or word in self.given, ""
        return [*found, before.get(read) if shown else None]

    @torch.inference_mode()
    def read(self, kind: str, texts: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(places, WORDS) ids and shares of each text."""
        rows = [self._ids(text) for text in texts]
        cache = self.model(self.heads[kind][:, :-1], use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(rows))
        last = int(self.heads[kind][0, -1])
        batch = torch.full((len(rows), 1 + max(map(len, rows))), last)
        for k, row in enumerate(rows):
            batch[k, 1 : 1 + len(row)] = torch.tensor(row)
        logits = self.model(batch, past_key_values=cache).logits
        found = []
        for row, text, of_row in zip(rows, texts, logits, strict=True):
            places = self.places(text, row)
            ids = torch.zeros(len(places), WORDS, dtype=torch.long)
            shares = torch.zeros(len(places), WORDS)
            here = [k for k, place in enumerate(places) if place is not None]
            at = [place for place in places if place is not None]
            ids[here], shares[here] = self._most_probable(of_row[at].float())
            found.append((ids, shares))
        return found

    def _most_probable(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, tokens of SmolLM2) logits -> (n, WORDS) tokens of CLIP and their probabilities."""
        values, tokens = (logits / TEMPERATURE).topk(200)  # as they were drawn
        shares = values.softmax(-1)
        shares[shares.cumsum(-1) - shares > TOP_P] = 0
        shares = shares / shares.sum(-1, keepdim=True)
        ids = self.as_clip[tokens]
        best = shares.masked_fill(ids == 0, 0).topk(WORDS)
        return ids.gather(1, best.indices) * (best.values > 0), best.values


def known_words(wordnet: Path, rows: list[dict]) -> set[str]:
    """Lower-case words: those of WordNet, of the captions, and function words."""
    found = {line.split("%")[0] for line in (wordnet / "index.sense").open()}
    found |= {word for row in rows for word in re.findall(r"[a-z]+", row["text"])}
    return {word for word in found | FUNCTION_WORDS if re.fullmatch("[a-z]+", word)}


def subject_words(wordnet: Path) -> set[str]:
    """The last words of all subjects, but for those that the sampler puts before a subject."""
    before = {word for kind in STARTS.values() for start in kind for word in start.split()}
    return {name.split()[-1] for name in subjects(wordnet)[0]} - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wordnet", type=Path, help="folder of its dictionary files")
    parser.add_argument("--sampled", type=Path, default=OUT)
    parser.add_argument("--out", type=Path, default=OUT.with_name("expected.safetensors"))
    a = parser.parse_args()
    rows = list(map(json.loads, a.sampled.open()))
    expected = Expected(known_words(a.wordnet, rows), subject_words(a.wordnet))
    found: list[tuple[torch.Tensor, torch.Tensor]] = [None] * len(rows)  # type: ignore[list-item]
    order = sorted(range(len(rows)), key=lambda k: (rows[k]["kind"], len(rows[k]["text"])))
    began = time.monotonic()
    for kind in HEADS:
        own = [k for k in order if rows[k]["kind"] == kind]
        for start in range(0, len(own), BATCH):
            part = own[start : start + BATCH]
            read = expected.read(kind, [rows[k]["text"] for k in part])
            for k, one in zip(part, read, strict=True):
                found[k] = one
            if start % (20 * BATCH) == 0:
                done = sum(one is not None for one in found)
                print(f"{done} of {len(rows)}, {time.monotonic() - began:.0f} s", flush=True)
    ids, shares = (torch.cat(part) for part in zip(*found, strict=True))
    read = shares.sum(1)[shares.sum(1) > 0]
    print(
        f"{len(read) / len(shares):.1%} of the places, {read.mean():.1%} of the probability there"
    )
    counts = torch.tensor([0, *(len(one) for one, _ in found)])
    kept = {"first": counts.cumsum(0), "ids": ids.int(), "shares": shares.half()}
    save_file(kept, a.out)


if __name__ == "__main__":
    main()
