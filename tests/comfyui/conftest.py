from __future__ import annotations

import importlib.util
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .server import Client, ComfyServer

HERE = Path(__file__).parent
INPUTS = ("noto-parrot", "noto-fish", "fxemoji-dog", "twemoji-mountain-cableway")

# the other tests must be collectable without the extra `comfyui`
_NEEDED = ("psutil", "requests", "websocket")
collect_ignore_glob = [] if all(map(importlib.util.find_spec, _NEEDED)) else ["test_*.py"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("comfyui")


@pytest.fixture(scope="session")
def server() -> Iterator[ComfyServer]:
    """One ComfyUI for all tests, with some of the examples in its input folder."""
    from .server import ROOT, ComfyServer

    # a stopped test run ends its server too
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # not pytest's own folder: that one is kept, and the models are large
    with TemporaryDirectory(prefix="comfyui-") as folder:
        (Path(folder) / "input").mkdir()
        for name in INPUTS:
            shutil.copy(ROOT / f"examples/{name}.png", Path(folder) / "input")
        with ComfyServer(Path(folder)) as server:
            yield server


@pytest.fixture(scope="session")
def client(server: ComfyServer) -> Iterator[Client]:
    from .server import Client

    with Client(server.url) as client:
        yield client


@pytest.fixture(scope="session")
def sd15(server: ComfyServer) -> str:
    """Name of a Stable Diffusion 1.5 with random weights among the server's diffusers models."""
    from .sd15 import write_sd15

    write_sd15(server.folder / "models/diffusers/sd15")
    return "sd15"


@pytest.fixture(autouse=True)
def _show_the_log(request: pytest.FixtureRequest) -> Iterator[None]:
    """pytest prints it for failed tests only."""
    if "server" not in request.fixturenames:
        yield
        return
    server = request.getfixturevalue("server")
    start = len(server.log)
    yield
    print(server.log[start:])
