from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from .server import Client, ComfyServer, Rejected


def test_the_server_comes_up_with_the_pack(server: ComfyServer, client: Client):
    (line,) = [line for line in server.log.splitlines() if line.endswith("custom_nodes/pez")]
    assert "IMPORT FAILED" not in line
    assert client.object_info("LoadImage")["output"] == ["IMAGE", "MASK"]


def grey(value: int) -> dict:
    size = {"width": 32, "height": 16, "batch_size": 1}
    return {
        "1": {"class_type": "EmptyImage", "inputs": {**size, "color": value * 0x010101}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }


def test_a_second_run_comes_from_the_cache(client: Client):
    first = client.run(grey(10))
    assert (first.status, first.error) == ("success", None)
    assert (first.cached, first.executed) == ([], ["1", "2"])
    assert len(first.outputs["2"]["images"]) == 1

    second = client.run(grey(10))
    assert second.status == "success"
    assert (sorted(second.cached), second.executed) == (["1", "2"], [])
    assert second.outputs == first.outputs

    third = client.run(grey(20))
    assert (third.cached, third.executed) == ([], ["1", "2"])


def test_events_seen_while_it_runs_are_not_lost(client: Client):
    prompt_id = client.queue(grey(30))
    kind, data = client.until(prompt_id, lambda kind, data: data.get("node") == "2")
    assert (kind, data["prompt_id"]) == ("executing", prompt_id)
    assert client.wait(prompt_id).executed == ["1", "2"]


def test_a_bad_prompt_is_rejected(client: Client):
    prompt = grey(0)
    prompt["1"]["inputs"]["width"] = -1
    with pytest.raises(Rejected) as caught:
        client.run(prompt)
    (error,) = caught.value.node_errors["1"]["errors"]
    assert error["type"] == "value_smaller_than_min"


def test_an_error_in_a_node_is_reported(server: ComfyServer, client: Client):
    (server.folder / "input/broken.png").write_text("no image")
    run = client.run(
        {
            "1": {"class_type": "LoadImage", "inputs": {"image": "broken.png"}},
            "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        }
    )
    assert (run.status, run.executed) == ("error", ["1"])
    assert run.error["node_type"] == "LoadImage"


def test_an_uploaded_image_can_be_used(client: Client, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    name = client.upload(tmp_path / "red.png")
    run = client.run(
        {
            "1": {"class_type": "LoadImage", "inputs": {"image": name}},
            "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        }
    )
    assert run.status == "success"


def test_an_image_chain_on_random_weights(server: ComfyServer, client: Client, sd15: str):
    start = len(server.log)
    run = client.run(
        {
            "1": {"class_type": "DiffusersLoader", "inputs": {"model_path": sd15}},
            "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a parrot"}},
            "3": {
                "class_type": "EmptyLatentImage",
                "inputs": {"width": 64, "height": 64, "batch_size": 1},
            },
            "4": {
                "class_type": "KSampler",
                "inputs": {
                    "model": ["1", 0],
                    "positive": ["2", 0],
                    "negative": ["2", 0],
                    "latent_image": ["3", 0],
                    "seed": 0,
                    "steps": 1,
                    "cfg": 1.0,
                    "sampler_name": "euler",
                    "scheduler": "normal",
                    "denoise": 1.0,
                },
            },
            "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
            "6": {
                "class_type": "SaveImage",
                "inputs": {"images": ["5", 0], "filename_prefix": "chain"},
            },
        }
    )
    assert run.status == "success", run.error
    assert "missing" not in server.log[start:]
    (saved,) = run.outputs["6"]["images"]
    pixels = np.asarray(Image.open(server.folder / "output" / saved["filename"]))
    assert pixels.shape == (64, 64, 3)
    # NaN would be saved as one plain colour
    assert pixels.std() > 1
