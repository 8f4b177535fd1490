"""The panel's way to the workers: routes on ComfyUI's own server, and events over its WebSocket.

Nothing is computed and nothing is sent for a panel that nobody sees: an open one says so every few seconds
(`_VISIBLE_S`), and only then the state is read, a few times a second.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from aiohttp import web

from ..parallel.errors import EngineError
from ..parallel.host import running, status
from . import settings
from .report import report

log = logging.getLogger("sequence_parallel")

_BUSY_INTERVAL_S = 0.25
_IDLE_INTERVAL_S = 1.0
_VISIBLE_S = 15.0
"""How long a panel counts as visible after it said so; `js/panel/connection.js` repeats it in time."""
_GRAIN = 64 * 2**20
"""Bytes; the system's free memory changes all the time, and smaller changes are no news."""


def register(server: Any) -> None:
    """Adds the routes; to be called once, while ComfyUI loads the pack.

    Args:
        server: ComfyUI's PromptServer. Its rules on origins and hosts hold for these routes, too.
    """
    publisher = _Publisher(server)
    routes: web.RouteTableDef = server.routes
    status.listen(lambda event: server.send_sync("sequence_parallel.event", event.to_json(), None))
    running.keep_alive(settings.keep_alive_seconds)

    @routes.get("/sequence_parallel/status")
    async def get_status(_: web.Request) -> web.Response:
        return web.json_response(_snapshot())

    @routes.get("/sequence_parallel/report")
    async def get_report(_: web.Request) -> web.Response:
        text = await asyncio.get_running_loop().run_in_executor(None, report)
        return web.json_response({"text": text})

    @routes.post("/sequence_parallel/watch")
    async def watch(request: web.Request) -> web.Response:
        """A panel is visible, or not any more: {"client": its WebSocket's id, "visible": true or false}."""
        try:
            wish = await request.json()
            client, visible = wish["client"], wish["visible"]
            if not isinstance(client, str) or not isinstance(visible, bool):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            return _refused('the body must be {"client": "…", "visible": true or false}', 400)
        if visible and client not in server.sockets:
            return _refused("no such client is connected", 404)
        publisher.set_visible(client, visible)
        return web.json_response(_snapshot() if visible else {})

    @routes.post("/sequence_parallel/free")
    async def free(_: web.Request) -> web.Response:
        """As Unload Models: ComfyUI lets go of all models, between prompts; the workers stay, without weights."""
        server.prompt_queue.set_flag("unload_models", True)
        return web.json_response({})

    @routes.post("/sequence_parallel/restart")
    async def restart(_: web.Request) -> web.Response:
        """Ends all workers, whatever they do, and starts them on the same devices."""
        try:
            groups = await asyncio.get_running_loop().run_in_executor(None, running.restart)
        except EngineError as error:
            return _refused(str(error), 500)
        return web.json_response({"groups": groups})


def _refused(message: str, code: int) -> web.Response:
    return web.json_response({"error": message}, status=code)


def _snapshot() -> dict[str, Any]:
    groups = running.snapshot()
    for group in groups:
        for rank in group["ranks"]:
            if rank["free"] is not None:
                rank["free"] -= rank["free"] % _GRAIN
    return {"groups": groups}


class _Publisher:
    """Sends the state to the panels that are visible, when it has changed."""

    def __init__(self, server: Any):
        self._server = server
        self._until: dict[str, float] = {}
        self._task: asyncio.Task[None] | None = None

    def set_visible(self, client: str, visible: bool) -> None:
        if not visible:
            self._until.pop(client, None)
            return
        self._until[client] = asyncio.get_running_loop().time() + _VISIBLE_S
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._publish())

    async def _publish(self) -> None:
        sent: dict[str, Any] | None = None
        while clients := self._visible():
            state = _snapshot()
            if state != sent:
                sent = state
                for client in clients:
                    await self._server.send_json("sequence_parallel.status", state, client)
            busy = any(group["state"] not in ("idle", "dead", "stopped") for group in state["groups"])
            await asyncio.sleep(_BUSY_INTERVAL_S if busy else _IDLE_INTERVAL_S)

    def _visible(self) -> list[str]:
        now = asyncio.get_running_loop().time()
        self._until = {client: until for client, until in self._until.items() if until > now}
        return list(self._until)
