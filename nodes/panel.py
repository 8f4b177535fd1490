"""Connection of the panel with the workers: routes on ComfyUI's own server, and events over its WebSocket.

Nothing is computed or sent for a panel that is not visible: a visible one reports itself every few seconds
(`_VISIBLE_S`), and only then is the state read, a few times a second.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from ..parallel.errors import EngineError
from ..parallel.host import running, status
from . import settings
from .report import report

log = logging.getLogger("sequence_parallel")

_Handler = Callable[[web.Request], Awaitable[web.Response]]

_BUSY_INTERVAL_S = 0.25
_IDLE_INTERVAL_S = 1.0
_VISIBLE_S = 15.0
"""Seconds that a panel counts as visible after it has reported so; `js/panel/connection.js` repeats it in time."""
_LONGEST_BODY = 4096
"""Maximum bytes of a request's body."""
_GRAIN = 64 * 2**20
"""Bytes to which free memory is rounded down: it changes all the time, and smaller changes are not sent."""


def register(server: Any) -> None:
    """Adds the routes; to be called once, while ComfyUI loads the pack.

    Args:
        server: ComfyUI's PromptServer. Its rules on origins and hosts hold for these routes, too.
    """
    publisher = _Publisher(server)
    routes: web.RouteTableDef = server.routes
    status.listen(lambda event: server.send_sync("sequence_parallel.event", event.to_json(), None))
    running.keep_alive(settings.keep_alive_seconds)

    async def get_status(_: web.Request) -> web.Response:
        return web.json_response(_snapshot())

    async def get_report(_: web.Request) -> web.Response:
        text = await asyncio.get_running_loop().run_in_executor(None, report)
        return web.json_response({"text": text})

    async def watch(wish: dict[str, Any]) -> web.Response:
        """Notes that a panel is visible or hidden: {"client": its WebSocket's id, "visible": true or false}."""
        client, visible = wish.get("client"), wish.get("visible")
        if not isinstance(client, str) or not isinstance(visible, bool):
            return _refused('the body must be {"client": "…", "visible": true or false}', 400)
        if visible and client not in server.sockets:
            return _refused("no such client is connected", 404)
        publisher.set_visible(client, visible)
        return web.json_response(_snapshot() if visible else {})

    async def free(_: dict[str, Any]) -> web.Response:
        """Unloads all of ComfyUI's models between prompts, like Unload Models; the workers stay, without weights."""
        server.prompt_queue.set_flag("unload_models", True)
        return web.json_response({})

    async def restart(_: dict[str, Any]) -> web.Response:
        """Ends all workers, even in the middle of a step, and starts new ones on the same devices."""
        try:
            groups = await asyncio.get_running_loop().run_in_executor(None, running.restart)
        except EngineError as error:
            return _refused(str(error), 500)
        return web.json_response({"groups": groups})

    for name, answer in {"status": get_status, "report": get_report}.items():
        _register(routes, "GET", name, answer)
    for name, change in {"watch": watch, "free": free, "restart": restart}.items():
        _register(routes, "POST", name, _of_json(change))


def _of_json(answer: Callable[[dict[str, Any]], Awaitable[web.Response]]) -> _Handler:
    """Returns a handler that passes the request's JSON object to `answer`."""

    async def handle(request: web.Request) -> web.Response:
        body = await _body(request)
        return body if isinstance(body, web.Response) else await answer(body)

    return handle


def _register(routes: web.RouteTableDef, method: str, name: str, handle: _Handler) -> None:
    """Adds a route for one method, and refuses all others."""

    async def refuse(request: web.Request) -> web.Response:
        refused = _refused(f"the method is {request.method}; allowed is {method}", 405)
        refused.headers["Allow"] = method
        return refused

    path = f"/sequence_parallel/{name}"
    routes.route(method, path)(handle)
    routes.route("*", path)(refuse)


async def _body(request: web.Request) -> dict[str, Any] | web.Response:
    """Returns the JSON object of a request, or the refusal of a request without one.

    A form on another site's page can send any text, but not as application/json: browsers first ask the server whether
    a script of that site may (CORS), and ComfyUI refuses all but the origin of --enable-cors-header. ComfyUI's own
    comparison of origins is not enough: it needs a loopback host or headers that browsers leave out with plain http,
    and is not made with --enable-cors-header.
    """
    if request.content_type != "application/json":
        return _refused(f"the content type is {request.content_type}; allowed is application/json", 415)
    try:
        await request.content.readexactly(_LONGEST_BODY + 1)
        return _refused(f"the body has more than {_LONGEST_BODY} bytes", 413)
    except asyncio.IncompleteReadError as end:
        text = end.partial
    except web.RequestPayloadError as error:
        return _refused(f"the body cannot be read: {error}", 400)
    try:
        body = json.loads(text.decode())
    except (ValueError, RecursionError):
        body = None
    return body if isinstance(body, dict) else _refused("the body must be a JSON object", 400)


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
    """Sender of the state to the visible panels, whenever it has changed."""

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
