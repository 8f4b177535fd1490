"""ComfyUI's front end in a headless browser, driven through its own `window.app`."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.comfyui.processes import wait_until
from tests.comfyui.server import ComfyServer, Graph

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Route

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

# Text encoders, VAEs and what hangs on them are replaced: the tests have a tiny checkpoint of the transformer only.
_REPLACE_LARGE_MODELS = """
([latent, conditioning]) => {
    const graph = window.app.graph
    const slots = (node) => [...(node.inputs ?? []), ...(node.outputs ?? [])].map((slot) => slot.type)
    const add = (type, values) => {
        const node = window.LiteGraph.createNode(type)
        graph.add(node)
        for (const [name, value] of Object.entries(values))
            node.widgets.find((widget) => widget.name === name).value = value
        return node
    }
    for (const node of graph.nodes.filter((node) => node.type.startsWith('CLIPTextEncode'))) {
        const random = add('SPTestConditioning', conditioning)
        random.pos = [...node.pos]
        for (const id of [...(node.outputs[0].links ?? [])]) {
            const link = graph.links.get(id)
            random.connect(0, graph.getNodeById(link.target_id), link.target_slot)
        }
    }
    const samplers = graph.nodes.filter((node) => /Sampler/.test(node.type) && node.outputs?.[0]?.type === 'LATENT')
    for (const node of samplers) {
        const save = add('SaveLatent', { filename_prefix: 'latents/browser' })
        save.pos = [node.pos[0] + node.size[0] + 60, node.pos[1]]
        node.connect(0, save, 0)
    }
    const large = ['CLIP', 'VAE', 'IMAGE', 'VIDEO', 'CLIP_VISION']
    for (const node of graph.nodes.filter((node) => slots(node).some((type) => large.includes(type))))
        graph.remove(node)
    for (const node of graph.nodes.filter((node) => /^Empty.*Latent/.test(node.type)))
        for (const widget of node.widgets) if (widget.name in latent) widget.value = latent[widget.name]
}
"""


class FrontEnd:
    """One page with ComfyUI open in it."""

    def __init__(self, browser: Browser, server: ComfyServer) -> None:
        self.server = server
        self.errors: list[str] = []
        self.page = browser.new_page(viewport={"width": 1600, "height": 1000})
        self.page.route("**/*", self._stay_on_this_machine)
        self.page.on("pageerror", lambda error: self.errors.append(f"{error}\n{error.stack or ''}"))
        self.page.on("console", self._note_console_error)
        _skip_the_tutorial(server)
        self.page.goto(server.url)
        # The start-up ends by opening a default workflow, in place of whatever was opened before that.
        ready = "window.app?.vueAppReady && window.app.extensionManager?.workflow?.activeWorkflow"
        self.page.wait_for_function(ready, timeout=60_000)

    def close(self) -> None:
        self.page.close()

    def load_workflow(self, workflow: dict[str, Any]) -> None:
        """Open a workflow as saved by the front end."""
        self.page.evaluate("(workflow) => window.app.loadGraphData(workflow)", workflow)
        self._let_messages_appear()

    def load_graph(self, graph: Graph) -> None:
        """Open a graph in API format."""
        self.page.evaluate("(graph) => window.app.loadApiJson(graph, 'graph')", graph)
        self._let_messages_appear()

    def open_template(self, pack: str, name: str) -> None:
        """Open a template of a custom node pack as a user does, in the templates dialog."""
        self.page.evaluate("window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        dialog = self.page.get_by_role("dialog")
        dialog.get_by_text(pack, exact=True).first.click()
        dialog.get_by_text(name, exact=True).first.click()
        dialog.wait_for(state="hidden", timeout=15_000)
        self._let_messages_appear()

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

    def set_widget(self, node_type: str, name: str, value: Any) -> None:
        """Set a widget of all nodes of a type."""
        changed = self.page.evaluate(
            """([type, name, value]) => {
                const nodes = window.app.graph.nodes.filter((node) => node.type === type)
                const widgets = nodes.map((node) => node.widgets.find((widget) => widget.name === name))
                for (const widget of widgets) {
                    widget.value = value
                    widget.callback?.(value)
                }
                return widgets.length
            }""",
            [node_type, name, value],
        )
        assert changed, f"there is no {node_type} in the graph"

    def replace_large_models(self, *, width: int, height: int, length: int, text_width: int = 64) -> None:
        """Random conditioning and SaveLatent take the places of text encoders and of everything behind the VAE."""
        latent = {"width": width, "height": height, "length": length, "batch_size": 1}
        self.page.evaluate(_REPLACE_LARGE_MODELS, [latent, {"width": text_width, "guidance": 6}])

    def serialize(self) -> dict[str, Any]:
        return self.page.evaluate("window.app.graph.serialize()")

    def api_graph(self) -> Graph:
        """What the front end would send to the server."""
        return self.page.evaluate("async () => (await window.app.graphToPrompt()).output")

    def queue(self) -> bool:
        """Press Run; whether the server took the prompt."""
        return self.page.evaluate("window.app.queuePrompt(0)")

    def error_details(self) -> str:
        """All that the message about a failed or refused prompt leads to."""
        self.page.get_by_role("button", name="View details").first.click()
        self._let_messages_appear()
        for button in self.page.get_by_role("button", name="Info for").all():
            button.click()
        self._let_messages_appear()
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
        self.page.wait_for_timeout(500)
        self.page.screenshot(path=path)
        return path

    def _let_messages_appear(self) -> None:
        self.page.wait_for_timeout(1000)

    def _stay_on_this_machine(self, route: Route) -> None:
        if route.request.url.startswith((self.server.url, "data:", "blob:")):
            route.continue_()
        else:
            route.abort()

    def _note_console_error(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(f"{message.location.get('url', '')}: {message.text}")


def _skip_the_tutorial(server: ComfyServer) -> None:
    """Without this setting the first visit opens the templates dialog."""
    settings = json.dumps({"Comfy.TutorialCompleted": True}).encode()
    request = urllib.request.Request(f"{server.url}/settings", settings, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=10).close()
