"""Every input of every node has an effect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .inside import inside

HERE = Path(__file__).parent
SCHEMAS = json.loads((HERE / "object_info.json").read_text())
INPUTS = [
    (node, name)
    for node, schema in SCHEMAS.items()
    for kind in ("required", "optional")
    for name in schema["input"].get(kind, ())
]


# the table runs each node three times for each of its inputs
pytestmark = pytest.mark.timeout(900)

# at the end of the path, since ComfyUI has modules of the same names as this folder
IMPORT = f"""
sys.path += [{str(HERE)!r}, {str(HERE.parent)!r}]
from input_cases import changes, time_limits
"""


@pytest.fixture(scope="module")
def changes() -> dict[str, dict[str, list]]:
    """The result of `input_cases.changes`."""
    return inside(IMPORT + "answer(changes())", timeout=850)


def test_every_input_has_a_case(changes):
    assert {(node, name) for node, cases in changes.items() for name in cases} == {*INPUTS}
    assert not [(node, name) for node, name in INPUTS if not changes[node][name]]


@pytest.mark.parametrize("node, name", INPUTS)
def test_every_input_has_an_effect(changes, node, name):
    before, again, after = changes[node][name]
    assert again == before  # a difference below comes from the changed input
    assert after != before


def test_every_learner_ends_in_time():
    """With a fake clock, which advances by half a second whenever it is read."""
    runs = inside(IMPORT + "answer(time_limits())", timeout=850)
    assert len(runs) == 2 * len([node for node, name in INPUTS if name == "time_limit"])
    for run in runs:
        assert 270 < run["elapsed"] <= 310, run
        if run["effort"] == "fast":  # its swaps go on until the limit
            assert run["step"] == run["steps"] > 14, run
        else:
            assert 1 < run["step"] < run["steps"], run
