"""Record the prompts of many searches, and compare those of changed code with them.

Refactoring must not change a prompt. Rounding differs between processors, so no recorded prompt is
part of the tests; record them before a change and compare after it, on one machine:

    python tools/record_prompts.py record before.json
    python tools/record_prompts.py compare before.json

A comparison needs the same weights, whose digests are recorded, too. Give names of cases to run
only those: `compare before.json style fuse`. All cases take some minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from pez_core import (
    Avoid,
    Result,
    SearchOptions,
    Vocabulary,
    distill,
    explain,
    fuse,
    invert,
    load_clip,
    prune,
    score,
    style,
)

ROOT = Path(__file__).parent.parent
SEARCHED = ROOT / "pez_core/models/emoji-clip"
JUDGE = ROOT / "benchmarks/models/emoji-clip-judge"
IMAGES = sorted((ROOT / "examples").glob("*.png"))
LONG = (
    "a small round drawing of a yellow face with open eyes, (red tongue:1.2) sticking out, soft "
    "gradient, <lora:x:0.5> white background, happy party, cool and sweet"
)
SECTIONS = (
    "a red fish on a blue plate with green leaves BREAK a cat with a hat near the house and the "
    "tree"
)


def options(effort: str = "fast", **fields) -> SearchOptions:
    """Options with every word of the CLIP, unless a case asks for less."""
    return SearchOptions(effort=effort, **({"block_unsafe": False} | fields))


def cases() -> dict[str, Callable[[], object]]:
    """The searches by name; nothing runs yet."""
    clip = load_clip(str(SEARCHED), device="cpu")
    joint = load_clip([str(SEARCHED), str(JUDGE)], device="cpu", weights=[2, 1])
    return inverting(clip, joint) | other_tasks(clip, joint)


def inverting(clip, joint) -> dict[str, Callable[[], object]]:
    """Cases of `invert`: efforts, steering, vocabularies, batches."""
    words = Vocabulary(only=["red car", "blue", "fish", "green apple", "flat"])
    features = clip.encode_images([Image.open(IMAGES[0]).convert("RGB")])
    # fields of the options, images, arguments
    given: dict[str, tuple[dict, object, dict]] = {
        "invert fast": ({}, IMAGES[:3], {}),
        "invert seed": ({"seed": 1}, IMAGES[:3], {}),
        "invert balanced": ({"effort": "balanced"}, IMAGES[:2], {}),
        "invert best": ({"effort": "best", "prompt_len": 8, "swaps": 96}, IMAGES[3], {}),
        "invert paper": (
            {
                "effort": "paper",
                "steps": 60,
                "restarts": 2,
                "lr": 0.2,
                "weight_decay": 0.05,
                "seed": 5,
            },
            IMAGES[:2],
            {},
        ),
        "invert steps": ({"steps": 5}, IMAGES[4], {}),
        "invert swaps": ({"effort": "balanced", "steps": 10, "swaps": 20}, IMAGES[4], {}),
        "invert without swaps": ({"swaps": 0}, IMAGES[4], {}),
        "invert patience": (
            {"swaps": 0, "steps": 300, "patience": 20},
            IMAGES[9],
            {},
        ),
        "invert in turns": (
            {"restarts": 2, "batch_size": 2, "seed": [3, 4, 5]},
            IMAGES[:3],
            {},
        ),
        "invert features": ({}, features, {}),
        "invert shared": ({}, IMAGES[:3], {"shared": [1, 2, 3]}),
        "invert caption": (
            {"prompt_len": 6, "start_from": "red"},
            IMAGES[5],
            {"caption": "a drawing of {} , flat"},
        ),
        "invert avoid": ({}, IMAGES[6], {"avoid": Avoid(["white background", IMAGES[7]], 0.4)}),
        "invert avoid by weight": ({}, IMAGES[6], {"avoid": Avoid(["white", "blue"], [0.4, 0.2])}),
        "invert negative": (
            {},
            IMAGES[6],
            {"avoid": ["white background"], "negative_prompt": True},
        ),
        "invert negative alone": ({}, IMAGES[6], {"negative_prompt": True}),
        "invert phrases": ({"vocabulary": words, "prompt_len": 6}, IMAGES[8], {}),
        "invert blocked": (
            {"vocabulary": Vocabulary(block=["emoji", "face"], ascii_only=True)},
            IMAGES[8],
            {},
        ),
        "invert safe": ({"block_unsafe": True}, IMAGES[8], {}),
        "invert pieces": (
            {"vocabulary": Vocabulary(whole_words=False), "prompt_len": 6},
            IMAGES[8],
            {},
        ),
    }
    made = {
        name: lambda case=case: invert(clip, case[1], options(**case[0]), **case[2])
        for name, case in given.items()
    }
    return made | {"invert two CLIPs": lambda: invert(joint, IMAGES[10], options())}


def other_tasks(clip, joint) -> dict[str, Callable[[], object]]:
    """Cases of the other tasks and of the scores."""
    alone, images = options(swaps=0, steps=40, restarts=4), IMAGES[10:16]
    return {
        "style": lambda: style(clip, images, options(restarts=4), content=["fish"]),
        "style balanced": lambda: style(clip, images, options("balanced", restarts=2)),
        "style with content": lambda: style(
            joint, images, alone, keep_content=True, images_per_step=2
        ),
        "distill": lambda: distill(clip, LONG, options(restarts=4)),
        "distill sections": lambda: distill(clip, SECTIONS, options(restarts=2, seed=2), ratio=0.5),
        "distill paper": lambda: distill(clip, LONG, options("paper", steps=30, prompt_len=4)),
        "fuse joined": lambda: fuse(clip, ["a red car", "a green tree"]),
        "fuse learned": lambda: fuse(
            clip, ["a red car", "a green tree", IMAGES[0]], options(restarts=4), weights=[1, 1, 2]
        ),
        "fuse too long": lambda: fuse(
            clip, ["a red car <lora:a:1>", "a green tree"], options(restarts=4), max_tokens=5
        ),
        "score": lambda: score(clip, ["a red fish", "emoji face"], IMAGES[:3], joint.clips[1]),
        "explain": lambda: explain(clip, "a red fish emoji", IMAGES[0]),
        "prune": lambda: prune(clip, "a red fish emoji white cat", IMAGES[0], 0.01),
    }


def plain(value: object) -> object:
    """Results as JSON has them, without the time that they took."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        kept = dict(vars(value))
        if isinstance(value, Result):
            del kept["seconds"], kept["tower_flops"]  # less where the CLIP keeps features
        return plain(kept)
    return value


def digest(folder: Path) -> str:
    """Of the weights of a CLIP."""
    return hashlib.sha256((folder / "open_clip_model.safetensors").read_bytes()).hexdigest()


def differences(old: object, new: object, where: str = "") -> list[str]:
    """What differs between two values of JSON, by its place."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{where}.{k}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [d for k, (a, b) in pairs for d in differences(a, b, f"{where}[{k}]")]
    return [] if old == new else [f"{where.lstrip('.')}: {old!r} -> {new!r}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("file", type=Path, help="JSON file of the recorded results")
    parser.add_argument("cases", nargs="*", help="run only cases whose name holds one of these")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (2)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    setup = {
        "weights": {folder.name: digest(folder) for folder in (SEARCHED, JUDGE)},
        "torch": str(torch.__version__),
        "threads": given.threads,
    }
    recorded = {"setup": setup, "results": {}}
    if given.action == "compare":
        recorded = json.loads(given.file.read_text())
        if recorded["setup"] != setup:
            print(f"{given.file} was recorded with {recorded['setup']}, not {setup}")
            return 2
    changed = 0
    for name, run in cases().items():
        if given.cases and not any(part in name for part in given.cases):
            continue
        result = json.loads(json.dumps(plain(run())))
        if given.action == "record":
            recorded["results"][name] = result
            print(f"recorded  {name}", flush=True)
            continue
        if name not in recorded["results"]:
            print(f"new       {name}", flush=True)
            continue
        found = differences(recorded["results"][name], result)
        changed += bool(found)
        print(f"{'DIFFERENT' if found else 'same     '} {name}", *found[:5], sep="\n  ", flush=True)
    if given.action == "record":
        given.file.write_text(json.dumps(recorded, indent=1) + "\n")
    return int(changed > 0)


if __name__ == "__main__":
    sys.exit(main())
