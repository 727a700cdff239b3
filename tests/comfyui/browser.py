"""ComfyUI's page in a headless Chromium."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, sync_playwright

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
)
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.InstalledVersion": "1.47.12",
    "Comfy.Release.Status": "what's new seen",
    "Comfy.Workflow.ShowMissingModelsWarning": False,
}
# what the page itself complains about with an empty user folder, and when it asks for the models of
# its own first workflow in vain
_KNOWN = re.compile(
    r"404 \(Not Found\) \S+/(user\.css|api/userdata\S+)$|graph accessed before initialization"
    r"|/assets/missingModelDownload-"
)
# and what it says of itself at every start, without any pack
_OWN_DEPRECATIONS = re.compile(r"legacy queue/history menu|ComfyApp\.open_maskeditor")


@contextmanager
def chromium() -> Iterator[Browser]:
    path = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


class Editor:
    """One browser tab with ComfyUI's graph editor."""

    def __init__(self, browser: Browser, url: str) -> None:
        self._context = browser.new_context(viewport={"width": 1500, "height": 1000})
        self._context.grant_permissions(["clipboard-read", "clipboard-write"])
        # a search keeps the processor busy meanwhile
        self._context.set_default_navigation_timeout(240_000)
        self.page: Page = self._context.new_page()
        self._url = url
        self.complaints: list[str] = []
        self.page.on("console", self._listen)
        self.page.on("pageerror", lambda error: self.complaints.append(f"page error: {error}"))
        self.open()

    def open(self) -> None:
        self.page.goto(self._url)
        self._wait_until_ready()

    def close(self) -> None:
        self._context.close()

    def _wait_until_ready(self) -> None:
        self.page.wait_for_function(
            "() => window.app?.extensionManager && window.app.isGraphReady"
            " && LiteGraph.registered_node_types.PEZ_ImageToPrompt",
            timeout=120_000,
        )

    def reload(self) -> None:
        self.page.reload()
        self._wait_until_ready()

    def load(self, workflow: Mapping[str, Any]) -> None:
        """Open a workflow in a tab of its own."""
        self.page.evaluate("workflow => app.loadGraphData(workflow)", workflow)

    def queue(self) -> None:
        self.page.evaluate("() => app.queuePrompt(0)")

    def serialized(self) -> dict[str, Any]:
        """The workflow as it would be saved."""
        return self.page.evaluate("() => app.rootGraph.serialize()")

    def live(self, k: int = 0) -> Locator:
        """The live view of the k-th PEZ node on the screen."""
        return self.page.locator(".pez-live:visible").nth(k)

    def widget(self, node: str, name: str) -> Any:
        return self.page.evaluate(
            "([node, name]) => app.rootGraph.getNodeById(node)"
            ".widgets.find(w => w.name === name).value",
            [node, name],
        )

    def set_widget(self, node: str, name: str, value: Any) -> None:
        """As a person does it: ComfyUI looks for changes when a button of the mouse comes up."""
        self.page.evaluate(
            """([node, name, value]) => {
                const widget = app.rootGraph.getNodeById(node).widgets.find(w => w.name === name);
                widget.value = value;
                widget.callback?.(value);
                window.dispatchEvent(new MouseEvent("mouseup"));
            }""",
            [node, name, value],
        )

    def delete(self, node: str) -> None:
        """As the command of the Delete key; ComfyUI looks for changes as with `set_widget`."""
        self.page.evaluate(
            """async (node) => {
                app.canvas.selectNode(app.rootGraph.getNodeById(node));
                const { command } = app.extensionManager;
                await command.execute("Comfy.Canvas.DeleteSelectedItems");
                window.dispatchEvent(new MouseEvent("mouseup"));
            }""",
            node,
        )

    def open_previous(self) -> None:
        """Go to the workflow tab before this one."""
        self.page.evaluate(
            "() => app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')"
        )

    def _listen(self, message: ConsoleMessage) -> None:
        where = message.location.get("url", "")
        ours = "/extensions/pez/" in where or "/extensions/pez/" in message.text
        known = _KNOWN.search(f"{message.text} {where}")
        deprecated = "deprecat" in message.text.lower()
        bad = ours or (deprecated and not _OWN_DEPRECATIONS.search(message.text))
        if (message.type == "error" and not known) or (message.type == "warning" and bad):
            self.complaints.append(f"{message.type}: {message.text} ({where})")
