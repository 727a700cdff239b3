"""Captions for the drawings that `emoji-clip` learns from: true ones, and ones that are just wrong.

True words of a drawing come from three places: its name and keywords, hand-written phrases for the
name (`emoji_phrases.tsv`), and its pixels, from which colours, their positions and shape are
computed. Phrases with a colour word are used only for drawings that have the colour.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import open_clip
from emoji_data import STYLES, Drawing, words_of
from emoji_views import BACKGROUNDS, BLACK_STYLES, View

PHRASES = Path(__file__).with_name("emoji_phrases.tsv")
SOT, EOT = 49406, 49407

# shades with examples of what drawings have of them
_PALETTE = {
    "red": [(221, 46, 68), (230, 30, 40), (255, 70, 70), (200, 35, 40), (240, 80, 80)],
    "dark red": [(130, 20, 30), (160, 30, 40)],
    "orange": [(244, 144, 12), (255, 120, 20), (240, 100, 40), (255, 165, 70), (225, 110, 30)],
    "gold": [(225, 165, 40), (200, 145, 40), (240, 180, 50)],
    "yellow": [(255, 204, 77), (255, 220, 40), (252, 234, 43), (255, 235, 110), (250, 195, 40)],
    "cream": [(255, 243, 200), (250, 230, 180)],
    "tan": [(215, 175, 130), (190, 150, 105), (235, 200, 155)],
    "brown": [(140, 85, 50), (165, 105, 60), (193, 105, 79), (115, 70, 45), (180, 110, 40)],
    "dark brown": [(80, 48, 35), (100, 60, 45)],
    "green": [(92, 170, 60), (60, 160, 70), (30, 180, 80), (119, 178, 85), (0, 200, 0)],
    "light green": [(170, 220, 120), (190, 235, 160), (150, 215, 60)],
    "dark green": [(30, 90, 45), (20, 115, 60), (62, 114, 29)],
    "olive": [(120, 120, 50), (150, 150, 60)],
    "teal": [(0, 160, 150), (60, 190, 180), (20, 120, 125)],
    "light blue": [(140, 205, 245), (187, 221, 245), (93, 173, 236), (100, 200, 230)],
    "blue": [(40, 90, 200), (59, 136, 195), (30, 130, 235), (34, 102, 153), (0, 0, 255)],
    "dark blue": [(25, 45, 110), (38, 55, 100), (20, 60, 120)],
    "purple": [(130, 60, 160), (146, 102, 204), (100, 50, 140), (120, 80, 220)],
    "light purple": [(190, 160, 230), (170, 142, 214)],
    "dark purple": [(70, 30, 90)],
    "pink": [(250, 170, 200), (244, 171, 186), (255, 140, 170), (234, 89, 110), (255, 120, 190)],
    "magenta": [(210, 40, 130), (235, 60, 150)],
    "light gray": [(204, 214, 221), (200, 200, 200), (220, 224, 228)],
    "gray": [(150, 150, 150), (153, 170, 181), (120, 125, 130), (102, 117, 127)],
    "dark gray": [(75, 80, 85), (85, 95, 105), (65, 65, 65)],
    "black": [(15, 15, 15), (41, 47, 51), (30, 35, 45)],
    "white": [(255, 255, 255), (242, 244, 246)],
}
# how each is called, the most usual name more than once
_CALLED = {
    "red": ["red", "red", "red", "bright red"],
    "dark red": ["red", "dark red", "dark red", "maroon"],
    "orange": ["orange"],
    "gold": ["gold", "golden", "yellow", "orange"],
    "yellow": ["yellow", "yellow", "yellow", "yellow", "golden", "bright yellow"],
    "cream": ["cream", "light yellow", "pale yellow", "beige", "cream colored"],
    "tan": ["tan", "beige", "light brown", "brown"],
    "brown": ["brown"],
    "dark brown": ["brown", "brown", "dark brown"],
    "green": ["green", "green", "green", "bright green"],
    "light green": ["green", "light green", "light green", "lime green"],
    "dark green": ["green", "dark green"],
    "olive": ["olive green", "green", "olive"],
    "teal": ["teal", "turquoise", "blue green", "green", "blue"],
    "light blue": ["light blue", "light blue", "blue", "blue", "sky blue", "pale blue"],
    "blue": ["blue", "blue", "blue", "bright blue"],
    "dark blue": ["blue", "dark blue", "dark blue", "navy blue", "navy"],
    "purple": ["purple", "purple", "purple", "violet"],
    "light purple": ["purple", "light purple", "lavender", "lilac"],
    "dark purple": ["purple", "dark purple"],
    "pink": ["pink", "pink", "pink", "light pink"],
    "magenta": ["pink", "magenta", "bright pink", "dark pink"],
    "light gray": ["gray", "light gray", "silver"],
    "gray": ["gray", "gray", "silver"],
    "dark gray": ["dark gray", "gray", "black"],
    "black": ["black"],
    "white": ["white"],
}
# the shades that make a colour word true, generously
_FITS = {
    "red": ["red", "dark red", "magenta"],
    "orange": ["orange", "gold", "yellow"],
    "yellow": ["yellow", "gold", "orange", "cream"],
    "green": ["green", "light green", "dark green", "olive", "teal"],
    "blue": ["blue", "light blue", "dark blue", "teal"],
    "purple": ["purple", "light purple", "dark purple", "magenta"],
    "pink": ["pink", "magenta"],
    "brown": ["brown", "dark brown", "tan", "gold"],
    "gray": ["gray", "light gray", "dark gray"],
    "black": ["black", "dark gray"],
    "white": ["white", "light gray"],
}
_ALIKE = {
    "orange": ["reddish"],
    "yellow": ["gold", "golden", "blond", "blonde", "amber", "yellowish", "brass"],
    "brown": ["tan", "bronze", "copper", "wooden", "brownish"],
    "gray": ["grey", "silver", "silvery", "metal", "metallic", "steel", "grayish", "greyish"],
    "purple": ["violet", "lavender", "lilac"],
    "pink": ["pinkish", "rosy"],
    "green": ["olive", "teal", "turquoise", "greenish", "lime"],
    "blue": ["cyan", "navy", "bluish"],
    "red": ["maroon", "crimson"],
}
_FITS |= {word: _FITS[colour] for colour, words in _ALIKE.items() for word in words}
_FITS |= {
    "beige": ["tan", "cream", "yellow"],
    "cream": ["cream", "tan", "yellow", "white"],
    "tan": ["tan", "cream", "brown", "yellow"],
    "copper": ["brown", "orange", "gold"],
    "silver": [*_FITS["gray"], "white", "light blue"],
    "reddish": ["red", "orange", "dark red", "brown"],
    "turquoise": ["teal", "light blue"],
    "magenta": ["magenta", "pink", "purple"],
}
BASIC = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "gray", "black"]
BASIC.append("white")
COLOUR_WORDS = frozenset(_FITS)
_COLOURFUL = {"colorful", "colourful", "rainbow", "multicolored", "multicoloured"}
_USUAL = 25  # names
_PRESENT, _CERTAIN = 0.02, 0.004  # share of the pixels from which a colour is said, and may be


def _lab(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) values in [0, 255] -> CIE Lab."""
    linear = np.where(rgb <= 10.3, rgb / 3294.6, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0178, 0.1095, 0.8727]]
    )
    xyz = np.maximum(linear @ to_xyz.T, 0)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack(
        [116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1
    )


SHADES = list(_PALETTE)


def _table() -> np.ndarray:
    """(32, 32, 32) number of the nearest shade for each colour of five bits per channel."""
    steps = np.arange(32) * 8 + 4
    grid = _lab(np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).astype(float))
    best, nearest = np.full((32, 32, 32), np.inf), np.zeros((32, 32, 32), int)
    for k, examples in enumerate(_PALETTE.values()):
        for example in examples:
            distance = ((grid - _lab(np.array(example, float))) ** 2).sum(-1)
            nearest = np.where(distance < best, k, nearest)
            best = np.minimum(best, distance)
    return nearest


@dataclass
class Look:
    """Colours and shape of a drawing, from its pixels.

    Attributes:
        shares: of each shade that it has, the largest first.
        places: the shade of most of its "top", "bottom", "left", "right" and "middle".
        shapes: words for its outline.
    """

    shares: dict[str, float]
    places: dict[str, str] = field(default_factory=dict)
    shapes: list[str] = field(default_factory=list)

    @property
    def colours(self) -> list[str]:
        """The shades that can be said of it."""
        return [shade for shade, share in self.shares.items() if share >= _PRESENT]

    def has(self, word: str, least: float = _PRESENT) -> bool:
        """Whether a colour word is true of it."""
        return sum(self.shares.get(shade, 0) for shade in _FITS[word]) >= least

    def false_colours(self) -> list[str]:
        return [word for word in BASIC if not self.has(word, _CERTAIN)]


def _shares(shades: np.ndarray) -> dict[str, float]:
    counts = np.bincount(shades, minlength=len(SHADES)) / max(1, len(shades))
    return {SHADES[k]: float(counts[k]) for k in (-counts).argsort() if counts[k] > 0}


def looks(pixels: np.ndarray) -> list[Look]:
    """Colours and shape of each of (N, H, W, 4) drawings."""
    table = _table()
    return [_look(image, table) for image in pixels]


def _look(image: np.ndarray, table: np.ndarray) -> Look:
    visible = image[..., 3] >= 128
    if not visible.any():
        return Look({})
    r, g, b = (image[..., k] >> 3 for k in range(3))
    shades = table[r, g, b]
    ys, xs = np.nonzero(visible)
    top, bottom, left, right = ys.min(), ys.max() + 1, xs.min(), xs.max() + 1
    height, width = bottom - top, right - left
    third, side = max(1, height // 3), max(1, width // 3)
    parts = {
        "top": np.s_[top : top + third, left:right],
        "bottom": np.s_[bottom - third : bottom, left:right],
        "left": np.s_[top:bottom, left : left + side],
        "right": np.s_[top:bottom, right - side : right],
        "middle": np.s_[top + third : bottom - third, left + side : right - side],
    }
    places = {}
    for place, part in parts.items():
        inside = _shares(shades[part][visible[part]])
        shade = next(iter(inside), None)
        if shade is not None and inside[shade] > 0.5:
            places[place] = shade
    return Look(_shares(shades[visible]), places, _shapes(visible[top:bottom, left:right]))


def _shapes(outline: np.ndarray) -> list[str]:
    height, width = outline.shape
    words = []
    if outline.sum() < 450:
        words.append("small")
    if width > 1.6 * height:
        words += ["wide", "long"]
    elif height > 1.6 * width:
        words += ["tall", "narrow"]
    elif max(width, height) < 1.1 * min(width, height):
        y, x = np.mgrid[:height, :width]
        disc = ((y + 0.5) / height - 0.5) ** 2 + ((x + 0.5) / width - 0.5) ** 2 <= 0.25
        if (outline & disc).sum() > 0.94 * (outline | disc).sum():
            words += ["round", "circular"]
        elif outline.mean() > 0.94:
            words.append("square")
    return words


class Lexicon:
    """Token ids of words, and the compact ids of the tokens that training uses at all."""

    def __init__(self) -> None:
        self.tokenizer = open_clip.SimpleTokenizer()
        self.cache: dict[str, list[int]] = {}
        self.compact: dict[int, int] = {}
        self.whole: set[int] = set()  # tokens that are a word
        for token in (0, SOT, EOT):
            self._add(token)

    def _add(self, token: int) -> int:
        return self.compact.setdefault(token, len(self.compact))

    def ids(self, text: str) -> list[int]:
        """Compact token ids of a text; the same as tokenizing it whole, word by word and cached."""
        out = []
        for word in text.split():
            if word not in self.cache:
                tokens = self.tokenizer.encode(word)
                self.cache[word] = [self._add(t) for t in tokens]
                if len(tokens) == 1 and word.isalnum():
                    self.whole.add(tokens[0])
            out += self.cache[word]
        return out

    @property
    def tokens(self) -> list[int]:
        return list(self.compact)


@dataclass(frozen=True)
class Caption:
    """A true caption.

    Attributes:
        text: words, with commas where a person would put them.
        styled: it has words for the style, so that it is false of other styles of the same name.
        bag: it is a list of words and no sentence.
    """

    text: str
    styled: bool = False
    bag: bool = False


_NAMED = """
{a} {name}
{name}
{name} emoji
{a} {name} emoji
a picture of {a} {name}
a drawing of {a} {name}
an icon of {a} {name}
an emoji of {a} {name}
a small picture of {a} {name}
this is {a} {name}
it shows {a} {name}
here is {a} {name}
there is {a} {name}
we see {a} {name}
{a} {name} on its own
the {name} symbol
an icon that shows {a} {name}
a cartoon of {a} {name}
a simple drawing of the {name}
the sign for {name}
{a} {name} in the middle of the picture
""".strip().splitlines()
_COLOURED = """
{a1} {c1} {name}
{a1} {c1} {name}
{a1} {c1} {name}
{a1} {c1} and {c2} {name}
{a1} {c1} and {c2} {name}
{a1} {c1} {name} with {c2}
{a1} {c1} {name} with {c2} details
{a1} {c1} {name} with {c2} parts
{a1} {c1} {name} with some {c2} on it
{a1} {c1} {name} with a bit of {c2}
{a1} {c1} {name} with {c2} and {c3}
{a1} {c1}, {c2} and {c3} {name}
{a} {name} in {c1}
{a} {name} in {c1} and {c2}
{a} {name} that is {c1}
{a} {name} that is {c1} and {c2}
{a} {name} with {c2} details
{a} {name} with {c1} and {c2}
the {name} is {c1}
the {name} is {c1} and {c2}
the {name} is mostly {c1} with some {c2}
{a} mostly {c1} {name}
a picture of {a1} {c1} {name}
a drawing of {a1} {c1} {name}
a drawing of {a1} {c1} and {c2} {name}
an emoji of {a1} {c1} {name}
there is {a1} {c1} {name}
{c1} {name}
{c1} and {c2} {name}
{name}, {c1} and {c2}
{a} {name} colored {c1}
""".strip().splitlines()
_PLACED = """
{a} {name}, {p1} at the {place1} and {p2} at the {place2}
{a} {name} with {p1} at the {place1} and {p2} at the {place2}
{a} {name} that is {p1} at the {place1} and {p2} at the {place2}
the {name} is {p1} at the {place1} and {p2} at the {place2}
{a} {name}, {p1} {place1} and {p2} {place2}
""".strip().splitlines()
_CENTRED = """
{a} {name} with {p1} in the middle
{a} {name}, {p1} in the middle
{a} {name} that is {p1} in the center
""".strip().splitlines()
_SHAPED = """
a {shape} {name}
a {shape} {c1} {name}
a {c1} {name} with a {shape} shape
the {name} is {shape}
something {shape}, {a} {name}
""".strip().splitlines()
_ON = """
{text} on {a_b} {b} background
{text} on a plain {b} background
{text} on {b}
{text} in front of {a_b} {b} background
{text}, {b} background
{text} against {a_b} {b} background
""".strip().splitlines()
_STYLED = """
{a_s} {s} drawing of {text}
{a_s} {s} picture of {text}
{a_s} {s} icon of {text}
{text}, {s} style
{text} in {s} style
{text} drawn in a {s} style
{text}, {s}
""".strip().splitlines()
_IN_WORDS = {
    "emojione-monotone": ["a black silhouette of {text}", "a solid black shape of {text}"],
    "fluent-emoji": ["a 3d render of {text}", "a shiny 3d model of {text}"],
    "fluent-emoji-high-contrast": ["a black and white drawing of {text}"],
    "openmoji": ["an outline drawing of {text}", "a line drawing of {text}"],
    "twemoji": ["a flat drawing of {text}"],
    "fluent-emoji-flat": ["a flat drawing of {text}"],
}
_BESIDE = """
{x} and {y}
{x} next to {y}
{x} beside {y}
{x} on the left and {y} on the right
{x} to the left of {y}
{y} to the right of {x}
two things, {x} and {y}
{x} with {y} beside it
""".strip().splitlines()
_ORDERED = ("left", "right")
_TWICE = ["two of the same, {x}", "{x} twice", "two pictures of {x}", "{x} and another one"]
OPPOSITE = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}
OPPOSITE |= {"above": "below", "below": "above", "open": "closed", "closed": "open"}
OPPOSITE |= {"up": "down", "down": "up", "happy": "sad", "sad": "happy"}
_SMALL_WORDS = """a an the of and with in on at to for its it is are has by from into out that this
one two three four some as or up down left right top bottom middle center above below behind over
under side front back small big large little long short round square tall wide narrow open closed
white black"""


def article(text: str) -> str:
    """Which of "a" and "an" stands before a text."""
    return "an" if re.match(r"[aeio]|u[nmp]", text) else "a"


def _with_article(noun: str) -> str:
    last = noun.split(" with ")[0].split()[-1]
    if last.endswith("s") and not last.endswith(("ss", "us", "is")):
        return ""
    return article(noun)


def tidy(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace(" ,", ",").strip()


def read_phrases(path: Path = PHRASES) -> dict[str, list[str]]:
    """Name -> what people call it, in lower-case words."""
    found = {}
    for line in path.read_text("utf-8").splitlines():
        name, _, phrases = line.partition("\t")
        parts = [
            re.sub(r"[^a-z0-9 ,]", "", p.lower().replace("-", " ")) for p in phrases.split("|")
        ]
        found[" ".join(words_of(name))] = [tidy(p) for p in parts if p.strip()]
    return found


class Captions:
    """Writes captions, word bags and wrong captions for drawings.

    Args:
        drawings: what they are about.
        pixels: (drawings, height, width, 4) of them.
        lexicon: is told all words.
        rng: draws the captions.
        paraphrases: file of `paraphrase_captions.py`, whose texts are phrases, too. None: there
            are none.
    """

    def __init__(
        self,
        drawings: Sequence[Drawing],
        pixels: np.ndarray,
        lexicon: Lexicon,
        rng: random.Random,
        paraphrases: Path | None = None,
    ) -> None:
        self.drawings, self.lexicon, self.rng = drawings, lexicon, rng
        self.looks = looks(pixels)
        self.names = [" ".join(words_of(d.name)) for d in drawings]
        self.keywords = [[" ".join(words_of(k)) for k in d.keywords] for d in drawings]
        written = read_phrases()
        for name, texts in read_phrases(paraphrases).items() if paraphrases else ():
            written.setdefault(name, []).extend(texts)
        self.phrases = [
            [p for p in written.get(name, []) if self._fits(i, p)]
            for i, name in enumerate(self.names)
        ]
        self.words = [self._own_words(i) for i in range(len(drawings))]
        counts = Counter(w for ps in written.values() for w in {w for p in ps for w in words_of(p)})
        # words in the phrases of many names do not describe one of them
        self.usual = {w for w, count in counts.items() if count > _USUAL} - COLOUR_WORDS
        known = {w for words in self.words for w in words} | set(_SMALL_WORDS.split())
        known |= {w for phrases in written.values() for p in phrases for w in words_of(p)}
        for texts in ([*_CALLED.values()], [p for _, p in STYLES.values()], _IN_WORDS.values()):
            known |= {w for group in texts for text in group for w in words_of(text)}
        self.every_word = sorted(known | {w for b in BACKGROUNDS for w in b.split()})
        templates = [*_NAMED, *_COLOURED, *_PLACED, *_CENTRED, *_SHAPED, *_ON, *_STYLED, *_BESIDE]
        fixed = " ".join([*templates, *_TWICE]).replace("{", " ").replace("}", " ")
        for word in [*self.every_word, *words_of(fixed), *sorted(COLOUR_WORDS), *OPPOSITE, ","]:
            lexicon.ids(word)
        for word in ["emoji", "colorful", "square", "circular", "grey"]:
            lexicon.ids(word)
        self.all_names = sorted(set(self.names))

    def _fits(self, i: int, phrase: str) -> bool:
        """Whether drawing `i` has every colour that a phrase names."""
        words = set(phrase.split())
        if self.drawings[i].style in BLACK_STYLES:
            return not words & (COLOUR_WORDS | _COLOURFUL)
        if words & _COLOURFUL and len(self.looks[i].colours) < 3:
            return False
        return all(self.looks[i].has(word) for word in words & COLOUR_WORDS)

    def _own_words(self, i: int) -> list[str]:
        texts = [self.names[i], *self.keywords[i]]
        return sorted({w for text in texts for w in text.split()})

    def _called(self, shade: str) -> str:
        return self.rng.choice(_CALLED[shade])

    def true_words(self, view: View) -> list[str]:
        """Every word that is true of a view."""
        words = set(view.background.split()) | {"emoji"}
        for i in view.shown:
            words |= set(self.words[i]) | set(self.looks[i].shapes)
            words |= {w for p in self.phrases[i] for w in words_of(p)}
            words |= {
                w for shade in self.looks[i].colours for c in _CALLED[shade] for w in c.split()
            }
            words |= {word for word in COLOUR_WORDS if self.looks[i].has(word)}
            words |= {w for p in STYLES[self.drawings[i].style][1] for w in p.split()}
        return sorted(words)

    def caption(self, view: View, longest: int) -> Caption:
        """One true caption of a view; a bag has up to `longest` words."""
        rng = self.rng
        if rng.random() < 0.3:
            return self._bag(view, longest)
        single = len(view.shown) == 1
        text = self._single(view.shown[0], view.flip) if single else self._both(view)
        styled = False
        roll = rng.random()
        if roll < 0.1:
            text, styled = self._in_style(view.shown[0], text), True
        if 0.07 < roll < (0.12 if view.background == "white" else 0.35):
            b = view.background
            text = rng.choice(_ON).format(text=text, b=b, a_b=article(b))
        if rng.random() < 0.4:
            text = text.replace("gray", "grey")
        return Caption(tidy(text), styled)

    def _bag(self, view: View, longest: int) -> Caption:
        """Words in any order: mostly of names and keywords, at times of a phrase or of colours."""
        rng = self.rng
        words: list[str] = []
        for i in view.shown:
            # a name's own words are what people search for: they come up more often than keywords
            words += self.words[i] + self.names[i].split() * 2
            said = [w for p in self.phrases[i] for w in words_of(p)]
            words += [w for w in said if len(w) > 2 and w not in self.usual]
            words += [w for shade in self.looks[i].colours[:4] for w in self._called(shade).split()]
            if rng.random() < 0.3:
                words += [w for p in STYLES[self.drawings[i].style][1] for w in p.split()]
        if view.background != "white" or rng.random() < 0.2:
            words += view.background.split()
        return Caption(" ".join(rng.choices(words, k=rng.randint(1, longest))), bag=True)

    def _in_style(self, i: int, text: str) -> str:
        style = self.drawings[i].style
        if style in _IN_WORDS and self.rng.random() < 0.5:
            return self.rng.choice(_IN_WORDS[style]).format(text=text)
        s = self.rng.choice(STYLES[style][1])
        return self.rng.choice(_STYLED).format(text=text, s=s, a_s=article(s))

    def _single(self, i: int, flip: bool) -> str:
        rng = self.rng
        phrases = self._phrases_of(i, flip)
        roll = rng.random()
        if phrases and roll < 0.45:
            return self.from_phrase(i, phrases)
        if roll < 0.53 and self.keywords[i]:
            extra = rng.sample(self.keywords[i], min(len(self.keywords[i]), rng.randint(1, 3)))
            return " ".join([self.names[i], *extra]) if rng.random() < 0.7 else rng.choice(extra)
        return self._from_name(i, flip)

    def _phrases_of(self, i: int, flip: bool) -> list[str]:
        phrases = self.phrases[i]
        return [p for p in phrases if not set(_ORDERED) & set(p.split())] if flip else phrases

    def from_phrase(self, i: int, phrases: list[str]) -> str:
        """A phrase, some with a colour put into it or with a second phrase behind it."""
        rng = self.rng
        phrase = rng.choice(phrases)
        if not set(phrase.split()) & COLOUR_WORDS and rng.random() < 0.5:
            phrase = self._tinted(i, phrase)
        elif len(phrases) > 1 and rng.random() < 0.12:
            phrase = f"{phrase}, {rng.choice(phrases)}"
        elif rng.random() < 0.12:
            phrase = rng.choice(["a picture of {}", "a drawing of {}", "an emoji of {}"]).format(
                phrase
            )
        return phrase

    def _tinted(self, i: int, phrase: str) -> str:
        """A phrase with a colour of the drawing said of its first noun."""
        first, _, rest = phrase.partition(" ")
        shades = self._said(i)
        if first not in ("a", "an", "the") or not rest or not shades:
            return phrase
        c1 = self._called(shades[0])
        if len(shades) > 1 and self.rng.random() < 0.3:
            c1 = f"{c1} and {self._called(shades[1])}"
        return f"{'the' if first == 'the' else article(c1)} {c1} {rest}"

    def _said(self, i: int) -> list[str]:
        """Shades that are said of a drawing, one of each kind, the first of much of it."""
        if self.drawings[i].style in BLACK_STYLES:
            return ["black"]
        shades = self.looks[i].colours
        kinds = {}
        for shade in shades:
            kinds.setdefault(shade.split()[-1], shade)
        return list(kinds.values())

    def _from_name(self, i: int, flip: bool) -> str:
        rng, name, look = self.rng, self.names[i], self.looks[i]
        if self.keywords[i] and rng.random() < 0.12:
            name = rng.choice(self.keywords[i])
        shades = self._said(i)
        roll = rng.random()
        if roll < 0.12 and look.shapes:
            c1 = self._called(shades[0]) if shades else ""
            template = rng.choice(_SHAPED)
            return template.format(
                a=_with_article(name), name=name, c1=c1, shape=rng.choice(look.shapes)
            )
        if roll < 0.3 and len(shades) > 1:
            placed = self._placed(i, name, flip)
            if placed is not None:
                return placed
        if roll < 0.6 and shades:
            return self._coloured(name, shades)
        return rng.choice(_NAMED).format(a=_with_article(name), name=name)

    def _coloured(self, name: str, shades: list[str]) -> str:
        count = min(3, len(shades))
        fits = [t for t in _COLOURED if not any(f"{{c{k}}}" in t for k in range(count + 1, 4))]
        c = [self._called(s) for s in shades[:3]]
        if len(c) == 3 and self.rng.random() < 0.5:
            c[1], c[2] = c[2], c[1]
        a1 = article(c[0]) if _with_article(name) else ""
        values = {f"c{k + 1}": colour for k, colour in enumerate(c)}
        template = self.rng.choice(fits)
        return template.format(a=_with_article(name), a1=a1, name=name, **values)

    def _placed(self, i: int, name: str, flip: bool) -> str | None:
        """Colours and where they are; None where no two places differ."""
        rng, places = self.rng, dict(self.looks[i].places)
        if self.drawings[i].style in BLACK_STYLES:
            return None
        if flip:
            for a, b in (_ORDERED,):
                places[a], places[b] = places.get(b), places.get(a)
        pairs = [
            (a, b)
            for a, b in (("top", "bottom"), ("bottom", "top"), _ORDERED, _ORDERED[::-1])
            if places.get(a) and places.get(b) and not _alike(places[a], places[b])
        ]
        middle = places.get("middle")
        if middle and (not pairs or rng.random() < 0.3) and middle != self._said(i)[0]:
            p1 = self._called(middle)
            return rng.choice(_CENTRED).format(a=_with_article(name), name=name, p1=p1)
        if not pairs:
            return None
        a, b = rng.choice(pairs)
        p1, p2 = self._called(places[a]), self._called(places[b])
        template = rng.choice(_PLACED)
        return template.format(a=_with_article(name), name=name, p1=p1, p2=p2, place1=a, place2=b)

    def _both(self, view: View) -> str:
        rng = self.rng
        x, y = (self._short(i) for i in view.shown)
        if view.shown[0] == view.shown[1] and rng.random() < 0.8:
            return rng.choice(_TWICE).format(x=x)
        return rng.choice(_BESIDE).format(x=x, y=y)

    def _short(self, i: int) -> str:
        """A few words for one of two drawings."""
        rng = self.rng
        phrases = [p for p in self.phrases[i] if len(p.split()) <= 7]
        if phrases and rng.random() < 0.35:
            return rng.choice(phrases)
        name, shades = self.names[i], self._said(i)
        a = _with_article(name)
        if shades and rng.random() < 0.4:
            c1 = self._called(shades[0])
            return tidy(f"{article(c1) if a else ''} {c1} {name}")
        return tidy(f"{a} {name}")

    def corrupted(self, caption: Caption) -> str:
        """The words with half of them (at least one) replaced by random ones, some shuffled."""
        rng = self.rng
        words = caption.text.replace(",", "").split()
        for k in rng.sample(range(len(words)), max(1, len(words) // 2)):
            words[k] = rng.choice(self.every_word)
        if rng.random() < 0.5:
            rng.shuffle(words)
        return " ".join(words)

    def nearly(self, caption: Caption, view: View) -> str:
        """A caption that one change makes false: of a colour, the name, a word or a side."""
        words = caption.text.replace(",", " ,").split()
        changes = [self._other_colour, self._other_side, self._other_thing, self._added_colour]
        self.rng.shuffle(changes)
        for change in changes:
            found = change(words, view)
            if found is not None:
                return tidy(" ".join(found))
        return tidy(" ".join(self._other_word(words, view)))

    def _false_colours(self, view: View) -> list[str]:
        false = set.intersection(*(set(self.looks[i].false_colours()) for i in view.shown))
        return sorted(false - set(view.background.split()) - {"white"})

    def _other_colour(self, words: list[str], view: View) -> list[str] | None:
        places = [k for k, w in enumerate(words) if w in COLOUR_WORDS]
        false = self._false_colours(view)
        if not places or not false:
            return None
        k = self.rng.choice(places)
        return _mended([*words[:k], self.rng.choice(false), *words[k + 1 :]])

    def _added_colour(self, words: list[str], view: View) -> list[str] | None:
        false = self._false_colours(view)
        articles = [k for k, w in enumerate(words[:-1]) if w in ("a", "an", "the")]
        if not articles or not false or set(words) & COLOUR_WORDS:
            return None
        k, colour = self.rng.choice(articles), self.rng.choice(false)
        first = "the" if words[k] == "the" else article(colour)
        return [*words[:k], first, colour, *words[k + 1 :]]

    def _other_side(self, words: list[str], view: View) -> list[str] | None:
        """The opposite of what is said of place or state; both of two sides keep their colours."""
        if not set(words) & set(OPPOSITE) or self.rng.random() < 0.3:
            return None
        if len(set(view.shown)) == 1 and len(view.shown) == 2:
            return None
        return [OPPOSITE.get(w, w) for w in words]

    def _other_thing(self, words: list[str], view: View) -> list[str] | None:
        """The name, or a word of a phrase, replaced by that of something else."""
        true = {w for i in view.shown for w in self.names[i].split()}
        name = self.names[self.rng.choice(view.shown)]
        text, other = " ".join(words), self.rng.choice(self.all_names)
        if f" {name} " in f" {text} " and not set(other.split()) & true:
            return _mended(f" {text} ".replace(f" {name} ", f" {other} ").split())
        return self._other_word(words, view)

    def _other_word(self, words: list[str], view: View) -> list[str]:
        true = set(self.true_words(view))
        places = [k for k, w in enumerate(words) if len(w) > 3] or list(range(len(words)))
        k = self.rng.choice(places)
        for _ in range(10):
            other = self.rng.choice(self.every_word)
            if other not in true and len(other) > 2:
                break
        return _mended([*words[:k], other, *words[k + 1 :]])


def _mended(words: list[str]) -> list[str]:
    """The words with "a" and "an" corrected, so that the articles do not give a change away."""
    pairs = zip(words, [*words[1:], ""], strict=True)
    return [article(after) if word in ("a", "an") else word for word, after in pairs]


def _alike(one: str, other: str) -> bool:
    """Whether a colour word could mean both of two shades."""
    return any(one in _FITS[word] and other in _FITS[word] for word in BASIC)
