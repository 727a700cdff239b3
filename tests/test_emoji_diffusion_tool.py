"""The training of `emoji-diffusion`, on a few drawings and with small networks."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import train_emoji_diffusion as train
from emoji_data import Drawing

COLOURS = {"red": (221, 46, 68), "green": (92, 170, 60), "blue": (40, 90, 200)}
CLIP = Path(__file__).parent.parent / train.CLIP


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder in which an autoencoder of random weights lies, as if it were trained."""
    monkeypatch.setattr(train, "AUTOENCODER", train.AUTOENCODER | {"block_out_channels": [8] * 3})
    monkeypatch.setattr(
        train, "UNET", train.UNET | {"block_out_channels": [16, 16, 16], "norm_num_groups": 8}
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = train.AutoencoderKL.from_config(train.AUTOENCODER)
    torch.save({"average": model.state_dict()}, tmp_path / "autoencoder.pt")
    return tmp_path


@pytest.fixture
def data():
    drawings, pixels = [], np.zeros((6, 64, 64, 4), np.uint8)
    for k, (name, colour) in enumerate([*COLOURS.items(), *COLOURS.items()]):
        drawings.append(Drawing("noto", "x", "", f"{name} bar", ["bar"], 3, "train"))
        pixels[k, 10 + 2 * k : 40, 8:56] = (*colour, 255)
    index = list(range(len(drawings)))
    return train.Data(drawings, torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), index)


def test_latents_of_an_autoencoder_that_is_trained_on_are_computed_again(tmp_path, data):
    runs = tmp_path
    train.train_autoencoder(data, runs, 2, 2, 0)
    before = train.encode_all(data, runs)
    train.train_autoencoder(data, runs, 2, 2, 0)  # no further step
    assert torch.equal(train.encode_all(data, runs), before)
    train.train_autoencoder(data, runs, 4, 2, 0)
    plain = train.load_autoencoder(runs)
    after = train.encode_all(data, runs)
    assert not torch.equal(after, before)
    latents = plain.encode(data.on([4], ["white"])).latent_dist.mode()[0]
    state = torch.load(runs / train.LATENTS, weights_only=True)
    own = (latents - state["mean"][:, None, None]) / state["std"][:, None, None]
    torch.testing.assert_close(after[4].float(), own, atol=5e-3, rtol=1e-2)


def test_all_stages_follow_one_another(monkeypatch, tmp_path):
    done = []
    for name in ("train_autoencoder", "train_unet", "export"):
        monkeypatch.setattr(train, name, lambda *_, name=name: done.append(name))
    for name in ("load_data", "build"):
        monkeypatch.setattr(train, name, lambda *_: None)
    monkeypatch.setattr("sys.argv", ["train", "all", "--runs", str(tmp_path)])
    train.main()
    assert done == ["train_autoencoder", "train_unet", "export"]
    monkeypatch.setattr("sys.argv", ["train", "all", "--steps", "3"])
    with pytest.raises(SystemExit):
        train.main()


def test_latents_are_normalised_and_decode_to_the_same_pixels(runs, data):
    plain = train.load_autoencoder(runs)
    latents = train.encode_all(data, runs)
    assert latents.shape == (6, 4, 16, 16)
    assert latents.float().mean((0, 2, 3)).abs().max() < 1e-2
    torch.testing.assert_close(latents.float().std((0, 2, 3)), torch.ones(4), atol=1e-2, rtol=0)

    folded = train.load_autoencoder(runs)
    x = data.on([4], ["white"])
    found, expected = folded.encode(x).latent_dist, plain.encode(x).latent_dist
    torch.testing.assert_close(found.mode(), latents[4:5].float(), atol=5e-3, rtol=0)
    state = torch.load(runs / "latents.pt", weights_only=True)
    torch.testing.assert_close(found.std, expected.std / state["std"][:, None, None])
    decoded, wanted = folded.decode(found.mode()).sample, plain.decode(expected.mode()).sample
    torch.testing.assert_close(decoded, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_training_resumes_and_becomes_a_pipeline(runs, data, monkeypatch):
    with torch.random.fork_rng():
        train.train_unet(data, runs, 2, 3, 0, CLIP)
        first = torch.load(runs / "unet.pt", weights_only=True)
        train.train_unet(data, runs, 3, 3, 0, CLIP)
        second = torch.load(runs / "unet.pt", weights_only=True)
    assert (first["step"], second["step"]) == (2, 3)
    name = "conv_in.weight"
    assert not torch.equal(first["average"][name], second["average"][name])
    pipe = train.build(runs, CLIP)
    torch.testing.assert_close(pipe.unet.state_dict()[name], second["average"][name])
    pipe.set_progress_bar_config(disable=True)
    made = pipe("a red bar", num_inference_steps=2, output_type="np").images
    assert made.shape == (1, 64, 64, 3) and np.isfinite(made).all()


def test_styles_without_colours_are_left_out(monkeypatch):
    styles = ["noto", "emojione-monotone", "twemoji", "fluent-emoji-high-contrast"]
    drawings = [Drawing(style, "x", "", "bar", [], 3, "train") for style in styles]
    drawings.append(Drawing("noto", "x", "", "bar", [], 3, "held-out name"))
    pixels = np.zeros((5, 64, 64, 4), np.uint8)
    monkeypatch.setattr(train, "prepare", lambda folder: (drawings, pixels))
    assert train.load_data(Path("x")).index == [0, 2]


@pytest.mark.slow
def test_the_unet_sees_two_styles(runs, data, monkeypatch):
    for k in (1, 4):
        data.drawings[k] = Drawing("openmoji", "x", "", "a green bar", [], 3, "train")
    seen = []

    def latents(data, runs):
        return torch.arange(6.0)[:, None, None, None].expand(6, 4, 16, 16)

    def loss(model, scheduler, z, states, generator):
        seen.extend(z[:, 0, 0, 0].tolist())
        return model.conv_in.weight.sum()

    monkeypatch.setattr(train, "encode_all", latents)
    monkeypatch.setattr(train, "_diffusion_loss", loss)
    monkeypatch.setattr(train, "WHITE", 1.0)
    with torch.random.fork_rng():
        train.train_unet(data, runs, 4, 2, 0, CLIP)
    assert sorted(seen) == [0, 0, 2, 2, 3, 3, 5, 5]


def test_timesteps_are_those_that_leave_something_to_the_text():
    scheduler = train.DDIMScheduler.from_config(train.SCHEDULER)
    steps = train._timesteps(scheduler, 20_000, torch.Generator().manual_seed(0))
    signal = scheduler.alphas_cumprod[steps]
    logs = (signal / (1 - signal)).log()
    mean, deviation = train.LOG_SNR
    assert abs(logs.mean() - mean) < 0.05 and abs(logs.std() - deviation) < 0.1
    assert steps.min() >= 0 and steps.max() <= 999
