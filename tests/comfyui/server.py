"""A real ComfyUI as a subprocess, and a client that speaks its protocol."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests
import websocket

from tools.get_comfyui import comfyui_path

ROOT = Path(__file__).resolve().parent.parent.parent
PACK = "pez"
FOLDERS = ("models/diffusers", "input", "output", "user", "custom_nodes")

Event = tuple[str, dict[str, Any]]
Prompt = Mapping[str, Mapping[str, Any]]

_ENDS = {
    "execution_success": "success",
    "execution_error": "error",
    "execution_interrupted": "interrupted",
}
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
HANGS = 280  # seconds after which nothing more is to be expected, however busy the machine is
_TEXT = 3  # binary event with a node's progress text; the others are preview images


class ComfyServer:
    """ComfyUI with one node pack, in a folder of its own; ready once it is made."""

    def __init__(
        self,
        folder: Path,
        *,
        pack: Path = ROOT,
        cpu: bool = True,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        timeout: float = HANGS,
    ):
        self.folder = folder
        for name in FOLDERS:
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "custom_nodes" / PACK).symlink_to(pack, target_is_directory=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

        source = comfyui_path()
        command = [sys.executable, str(source / "main.py"), "--listen", "127.0.0.1"]
        command += ["--port", str(port), "--disable-api-nodes"]
        command += ["--base-directory", str(folder), "--user-directory", str(folder / "user")]
        command += ["--database-url", "sqlite:///:memory:"]
        command += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK]
        command += ["--cpu"] * cpu + list(args)
        self._log = folder / "server.log"
        start = time.monotonic()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=folder,  # ComfyUI's own folder stays as it is
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait(start + timeout)
        except BaseException:
            self.stop()
            raise
        self.startup_seconds = time.monotonic() - start

    @property
    def log(self) -> str:
        """All that the server has printed so far, without colours."""
        return _COLOURS.sub("", self._log.read_text(errors="replace"))

    def rss(self) -> int:
        """Resident memory of the server in bytes."""
        return psutil.Process(self._process.pid).memory_info().rss

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> ComfyServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait(self, deadline: float) -> None:
        with _local_session() as http:
            while True:
                if self._process.poll() is not None:
                    raise self._failure(f"ComfyUI ended with {self._process.returncode}")
                if time.monotonic() > deadline:
                    raise self._failure("ComfyUI does not answer")
                try:
                    if http.get(f"{self.url}/system_stats", timeout=5).ok:
                        break
                except requests.RequestException:
                    time.sleep(0.2)
        # some of ComfyUI's own nodes may fail for a missing package: only the pack's line counts
        if re.search(rf"\(IMPORT FAILED\): .*custom_nodes.{PACK}$", self.log, re.M):
            raise self._failure("The pack does not import")

    def _failure(self, what: str) -> RuntimeError:
        return RuntimeError(f"{what}; the end of its log:\n{self.log[-6000:]}")


class Rejected(Exception):
    """ComfyUI refused a prompt before running it; `body` is its answer."""

    def __init__(self, body: dict[str, Any]):
        super().__init__(json.dumps(body, indent=1))
        self.body = body

    @property
    def node_errors(self) -> dict[str, Any]:
        return self.body["node_errors"]


@dataclass
class Run:
    """What happened in one prompt."""

    prompt_id: str
    events: list[Event]
    texts: list[tuple[str, str]]  # (node id, progress text)
    status: str  # "success", "error" or "interrupted"
    error: dict[str, Any] | None  # data of `execution_error`
    cached: list[str]  # node ids
    executed: list[str]  # ids of the nodes that really ran, in their order
    outputs: dict[str, Any]  # node id -> what its UI shows
    seconds: float  # by the server's clock, without the time in the queue


class Client:
    """One browser's worth of ComfyUI client; not for several threads."""

    def __init__(self, url: str):
        self.id = uuid.uuid4().hex
        self._url = url
        self._http = _local_session()
        self._events: dict[str, list[Event]] = {}
        self._texts: dict[str, list[tuple[str, str]]] = {}
        self._running = ""
        # before the first prompt, or its events are lost
        self._socket = websocket.create_connection(
            f"{url.replace('http', 'ws', 1)}/ws?clientId={self.id}", timeout=HANGS
        )

    def close(self) -> None:
        self._socket.close()
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, path: str) -> requests.Response:
        return self._http.get(self._url + path, timeout=HANGS)

    def post(self, path: str, json: Any = None) -> requests.Response:
        return self._http.post(self._url + path, json=json, timeout=HANGS)

    def post_text(self, path: str, text: str, kind: str = "application/json") -> requests.Response:
        """Post a body of any text and type."""
        headers = {"Content-Type": kind}
        return self._http.post(self._url + path, text, headers=headers, timeout=60)

    def upload(self, path: Path) -> str:
        """Put an image into the input folder; returns its name there."""
        with path.open("rb") as file:
            answer = self._http.post(
                f"{self._url}/upload/image",
                files={"image": (path.name, file)},
                data={"overwrite": "true"},
                timeout=HANGS,
            )
        answer.raise_for_status()
        return answer.json()["name"]

    def object_info(self, node: str) -> dict[str, Any]:
        """What the server tells of the node class `node`."""
        info = self.get(f"/object_info/{node}").json()
        if node not in info:
            raise KeyError(f"ComfyUI has no node {node}")
        return info[node]

    def queue(self, prompt: Prompt, extra_data: Mapping[str, Any] | None = None) -> str:
        body = {"prompt": prompt, "client_id": self.id, "extra_data": dict(extra_data or {})}
        answer = self.post("/prompt", body)
        if answer.status_code == 400:
            raise Rejected(answer.json())
        answer.raise_for_status()
        # a prompt with one good and one bad branch is queued without the bad one
        if answer.json()["node_errors"]:
            raise Rejected(answer.json())
        return answer.json()["prompt_id"]

    def run(
        self, prompt: Prompt, extra_data: Mapping[str, Any] | None = None, timeout: float = HANGS
    ) -> Run:
        return self.wait(self.queue(prompt, extra_data), timeout)

    def interrupt(self) -> None:
        self.post("/interrupt", {}).raise_for_status()

    def until(
        self,
        prompt_id: str,
        predicate: Callable[[str, dict[str, Any]], bool],
        timeout: float = HANGS,
    ) -> Event:
        """First event of the prompt with `predicate(type, data)`, past events included."""
        deadline = time.monotonic() + timeout
        seen = 0
        while True:
            events = self._events.get(prompt_id, [])
            for event in events[seen:]:
                if predicate(*event):
                    return event
                if event[0] in _ENDS:
                    raise AssertionError(f"The prompt ended before the event: {event}")
            seen = len(events)
            self._receive(deadline)

    def wait(self, prompt_id: str, timeout: float = HANGS) -> Run:
        deadline = time.monotonic() + timeout
        while not any(kind in _ENDS for kind, _ in self._events.get(prompt_id, [])):
            self._receive(deadline)
        # the history is written just after the last event
        while prompt_id not in (history := self.get(f"/history/{prompt_id}").json()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"No history of prompt {prompt_id}")
            time.sleep(0.02)

        events = list(self._events[prompt_id])
        first: dict[str, dict[str, Any]] = {}
        for kind, data in events:
            first.setdefault(kind, data)
        (end,) = first.keys() & _ENDS.keys()
        ran = [d["node"] for kind, d in events if kind == "executing" and d["node"] is not None]
        return Run(
            prompt_id=prompt_id,
            events=events,
            texts=list(self._texts.get(prompt_id, [])),
            status=_ENDS[end],
            error=first.get("execution_error"),
            cached=first.get("execution_cached", {}).get("nodes", []),
            executed=list(dict.fromkeys(ran)),
            outputs=history[prompt_id]["outputs"],
            seconds=(first[end]["timestamp"] - first["execution_start"]["timestamp"]) / 1000,
        )

    def _receive(self, deadline: float) -> None:
        """Take one message off the socket and file it under its prompt."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("ComfyUI sends nothing more")
        self._socket.settimeout(left)
        try:
            message = self._socket.recv()
        except websocket.WebSocketTimeoutException:
            raise TimeoutError("ComfyUI sends nothing more") from None
        if isinstance(message, bytes):
            if struct.unpack_from(">I", message)[0] == _TEXT:
                (length,) = struct.unpack_from(">I", message, 4)
                node, text = message[8 : 8 + length].decode(), message[8 + length :].decode()
                self._texts.setdefault(self._running, []).append((node, text))
            return
        event = json.loads(message)
        kind, data = event["type"], event.get("data") or {}
        # a node's own events and texts do not say which prompt they belong to
        prompt_id = data.get("prompt_id") or (self._running if kind.startswith("pez.") else None)
        if kind == "execution_start":
            self._running = prompt_id
        if prompt_id:
            self._events.setdefault(prompt_id, []).append((kind, data))


def _local_session() -> requests.Session:
    session = requests.Session()
    session.trust_env = False  # a proxy of the environment cannot reach this machine
    return session
