"""ComfyUI's front end in a headless browser, driven through its own `window.app`."""

from __future__ import annotations

import json
import os
import shutil
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.comfyui.installation import PACK_NAME
from tests.comfyui.processes import wait_until
from tests.comfyui.server import ComfyServer, Graph

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Locator, Route

CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


VUE_NODES = "Comfy.VueNodes.Enabled"
"""The setting *Nodes 2.0*: each node is HTML, in place of a drawing on the canvas."""
_SETTINGS = {
    "Comfy.TutorialCompleted": True,  # else the first visit opens the templates dialog
    VUE_NODES: False,
}
"""What a page starts with, whatever the one before has left."""


def find_chromium() -> str | None:
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


# Text encoders, VAEs and pictures to load are replaced: the tests have tiny checkpoints of the transformers only.
_REPLACE_LARGE_MODELS = """
([vae, text, vision, size]) => {
    const graph = window.app.graph
    const add = (type, values, pos) => {
        const node = window.LiteGraph.createNode(type)
        graph.add(node)
        node.pos = [...pos]
        for (const [name, value] of Object.entries(values))
            node.widgets.find((widget) => widget.name === name).value = value
        return node
    }
    const gives = (node, type) => (node.outputs ?? []).findIndex((output) => output.type === type)
    const replace = (node, type, other) => {
        for (const id of [...(node.outputs[gives(node, type)].links ?? [])]) {
            const link = graph.links.get(id)
            other.connect(0, graph.getNodeById(link.target_id), link.target_slot)
        }
    }
    const old = [...graph.nodes]
    const loads = (node, type) => gives(node, type) >= 0 && /Load/.test(node.type)
    const encoders = old.filter((node) => node.type.startsWith('CLIPTextEncode'))
    encoders.forEach((node, seed) =>
        replace(node, 'CONDITIONING', add('SPTestConditioning', { seed, ...text }, node.pos)))
    const vaes = old.filter((node) => loads(node, 'VAE'))
    vaes.forEach((node) => replace(node, 'VAE', add('SPTestRandomVAE', { kind: vae }, node.pos)))
    const visions = old.filter((node) => node.type === 'CLIPVisionEncode')
    visions.forEach((node) => replace(node, 'CLIP_VISION_OUTPUT', add('SPTestCLIPVisionOutput', vision, node.pos)))
    const pictures = old.filter((node) => node.type === 'LoadImage')
    pictures.forEach((node) => replace(node, 'IMAGE', add('EmptyImage', { width: 64, height: 64 }, node.pos)))
    for (const node of old)
        if (loads(node, 'CLIP') || loads(node, 'CLIP_VISION')) graph.remove(node)
    for (const node of [...encoders, ...vaes, ...visions, ...pictures]) if (node.graph) graph.remove(node)
    for (const node of graph.nodes)
        for (const widget of node.widgets ?? [])
            if (widget.name in size && /Latent|ToVideo|Scheduler|ImageScale/.test(node.type))
                widget.value = size[widget.name]
}
"""
_SAVE_LATENTS = """
(type) => {
    const graph = window.app.graph
    const made = []
    for (const node of graph.nodes.filter((node) => node.type === type)) {
        const save = window.LiteGraph.createNode('SaveLatent')
        graph.add(save)
        save.pos = [node.pos[0], node.pos[1] - 150]
        node.connect(0, save, 0)
        made.push(String(save.id))
    }
    return made
}
"""


_QUIET = """
(polls) => new Promise((resolve) => {
    let saved, quiet = 0
    const observer = new MutationObserver(() => (quiet = 0))
    observer.observe(document.body, { subtree: true, childList: true, characterData: true })
    const poll = () => {
        const now = JSON.stringify((window.app.rootGraph ?? window.app.graph).serialize())
        quiet = now === saved ? quiet + 1 : 0
        saved = now
        if (quiet < polls) return requestAnimationFrame(() => setTimeout(poll, 30))
        observer.disconnect()
        resolve()
    }
    poll()
})
"""


class FrontEnd:
    """One page with ComfyUI open in it."""

    def __init__(self, browser: Browser, server: ComfyServer, settings: dict[str, Any] | None = None) -> None:
        self.server = server
        self.errors: list[str] = []
        self.requests: list[str] = []
        """Addresses, from the first one on."""
        self.page = browser.new_page(viewport={"width": 1600, "height": 1000})
        self.page.route("**/*", self._stay_on_this_machine)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(f"{error}\n{error.stack or ''}"))
        self.page.on("console", self._note_console_error)
        _set(server, _SETTINGS | (settings or {}))
        self.page.goto(server.url)
        # The start-up ends by opening a default workflow, in place of whatever was opened before that.
        ready = "window.app?.vueAppReady && window.app.extensionManager?.workflow?.activeWorkflow"
        self.page.wait_for_function(ready, timeout=60_000)

    def close(self) -> None:
        self.page.close()

    def load_workflow(self, workflow: dict[str, Any], *, wait: bool = True) -> None:
        """Open a workflow as saved by the front end.

        Args:
            wait: for messages about it.
        """
        self.page.evaluate("(workflow) => window.app.loadGraphData(workflow)", workflow)
        if wait:
            self.settle()

    def edit_menu_item(self, label: str) -> Locator:
        """An item of the main menu's *Edit*, shown. The pointer moves there again until it is: on a busy machine *Edit*
        may be drawn under a pointer that does not move any more, and then opens nothing."""
        edit = self.page.get_by_text("Edit", exact=True).first
        item = self.page.get_by_text(label, exact=True).first

        def shown() -> bool:
            if not edit.is_visible():
                self.page.locator(".comfy-menu-button-wrapper, [data-testid='comfy-menu-button']").first.click()
                edit.wait_for()
            self.page.mouse.move(800, 800)
            edit.hover()
            self.page.wait_for_timeout(1000)
            return item.is_visible()

        assert wait_until(shown, 60), f"the menu Edit does not show {label!r}"
        return item

    def load_graph(self, graph: Graph) -> None:
        """Open a graph in API format."""
        self.page.evaluate("(graph) => window.app.loadApiJson(graph, 'graph')", graph)
        self.settle()

    def open_template(self, pack: str, name: str) -> None:
        """Open a template of a custom node pack as a user does, in the templates dialog."""
        self.page.evaluate("window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        dialog = self.page.get_by_role("dialog")
        dialog.get_by_text(pack, exact=True).first.click()
        dialog.get_by_text(name, exact=True).first.click()
        dialog.wait_for(state="hidden", timeout=15_000)
        self.settle()

    def node_types(self) -> list[str]:
        return self.page.evaluate("window.app.graph.nodes.map((node) => node.type)")

    def missing_nodes(self) -> list[str]:
        """Node types that the front end does not know, which it draws red with a message."""
        # `has_errors` would not do: it is set on loaders of absent models too.
        unknown = "(node) => !(node.type in window.LiteGraph.registered_node_types)"
        found = self.page.evaluate(f"window.app.graph.nodes.filter({unknown}).map((node) => node.type)")
        return found or (["a message says so"] if "Missing node" in self.text() else [])

    def text(self) -> str:
        """All text on the page."""
        return self.page.evaluate("document.body.innerText")

    def node_texts(self) -> str:
        """What nodes show about their last run, one per line. Far zoomed out, newer front ends do not draw it."""
        texts = "(node) => (node.widgets ?? []).filter((widget) => widget.name === '$$node-text-preview')"
        return "\n".join(self.page.evaluate(f"window.app.graph.nodes.flatMap({texts}).map((widget) => widget.value)"))

    def set_widget(self, node_type: str, name: str, *values: Any) -> None:
        """Set a widget of all nodes of a type: to one value, or each node's to its own."""
        changed = self.page.evaluate(
            """([type, name, values]) => {
                const nodes = window.app.graph.nodes.filter((node) => node.type === type)
                const widgets = nodes.map((node) => node.widgets.find((widget) => widget.name === name))
                widgets.forEach((widget, i) => {
                    widget.value = values[i % values.length]
                    widget.callback?.(widget.value)
                })
                return widgets.length
            }""",
            [node_type, name, list(values)],
        )
        assert changed and len(values) in (1, changed), f"there are {changed} {node_type} in the graph"

    def replace_large_models(
        self, *, vae: str, text: dict[str, Any], vision: dict[str, Any], size: dict[str, int]
    ) -> None:
        """Random conditioning, VAEs and pictures take the places of those that models or files give.

        Args:
            vae: one of the test pack's `NETWORKS`.
            text: widgets of SPTestConditioning.
            vision: widgets of SPTestCLIPVisionOutput.
            size: width, height and length of what is made, in pixels and frames.
        """
        self.page.evaluate(_REPLACE_LARGE_MODELS, [vae, text, vision, size])

    def save_latents(self, node_type: str) -> list[str]:
        """Put a SaveLatent behind each node of a type; their ids, in the nodes' order."""
        return self.page.evaluate(_SAVE_LATENTS, node_type)

    def serialize(self) -> dict[str, Any]:
        """The workflow as *Save* writes it."""
        return json.loads(self.page.evaluate("JSON.stringify(window.app.graph.serialize())"))

    def api_graph(self) -> Graph:
        """What the front end would send to the server."""
        return self.page.evaluate("async () => (await window.app.graphToPrompt()).output")

    def queue(self) -> bool:
        """Press Run; whether the server took the prompt."""
        return self.page.evaluate("window.app.queuePrompt(0)")

    def error_details(self) -> str:
        """All that the message about a failed or refused prompt leads to."""
        self.page.get_by_role("button", name="View details").first.click()
        self.settle()
        for button in self.page.get_by_role("button", name="Info for").all():
            button.click()
        self.settle()
        return self.text()

    def run(self, timeout: float = 90.0) -> dict[str, Any]:
        """Press Run and wait for the end; the prompt's entry in the server's history."""
        before = set(self.server.get("/history"))
        assert self.queue(), f"the prompt was not queued:\n{self.text()}"

        def finished() -> set[str]:
            self.page.wait_for_timeout(50)  # lets the page work
            return set(self.server.get("/history")) - before

        assert wait_until(lambda: bool(finished()), timeout), f"not finished\n{self.server.log_tail()}"
        return self.server.get("/history")[finished().pop()]

    def screenshot(self, path: Path) -> Path:
        self.page.evaluate("window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.settle()
        self.page.screenshot(path=path)
        return path

    def own_errors(self) -> list[str]:
        """Errors and warnings in the console that name this pack."""
        return [error for error in self.errors if PACK_NAME in error or "sequence_parallel" in error]

    def settle(self) -> None:
        """Wait until nothing changes any more, neither on the page nor in the graph, for some frames."""
        self.page.evaluate(_QUIET, 8)

    def _stay_on_this_machine(self, route: Route) -> None:
        if route.request.url.startswith((self.server.url, "data:", "blob:")):
            route.continue_()
        else:
            route.abort()

    def _note_console_error(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(f"{message.location.get('url', '')}: {message.text}")


def _set(server: ComfyServer, settings: dict[str, Any]) -> None:
    body = json.dumps(settings).encode()
    request = urllib.request.Request(f"{server.url}/settings", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=10).close()
