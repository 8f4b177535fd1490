"""The panel's routes refuse what no panel sends: forms of other sites, broken bodies, other methods."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest

from tests.comfyui.fixtures import ServerFactory
from tests.comfyui.graphs import Setting, Swapped, fresh, sampling_graph
from tests.comfyui.server import HOST, ComfyServer

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

FRIEND = "http://friend.example"
READ, CHANGE = ("status", "report"), ("watch", "free", "restart")
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: Any
    """None if it is no JSON."""


def ask(server: ComfyServer, method: str, name: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
    connection = http.client.HTTPConnection(HOST, server.port, timeout=30)
    try:
        connection.request(method, f"/sequence_parallel/{name}", body, headers or {})
        response = connection.getresponse()
        text = response.read()
    finally:
        connection.close()
    try:
        return Answer(response.status, response.headers, json.loads(text))
    except ValueError:
        return Answer(response.status, response.headers, None)


@pytest.fixture(scope="module")
def open_server(start_server: ServerFactory) -> Iterator[ComfyServer]:
    """One that may be asked by pages of another site."""
    with start_server("--enable-cors-header", FRIEND) as server:
        yield server


@pytest.fixture(params=["alone", "open to one site"])
def working(request: pytest.FixtureRequest) -> Iterator[ComfyServer]:
    """Each server, with workers; afterwards they are the same as before."""
    server: ComfyServer = request.getfixturevalue("server" if request.param == "alone" else "open_server")
    if not server.workers():
        assert server.run(sampling_graph(fresh(Setting()), Swapped("cpu"))).status == "success"
    before = server.workers()
    assert before
    yield server
    assert server.alive
    assert server.workers() == before


def refused(answer: Answer, status: int, text: str) -> None:
    assert answer.status == status
    assert text in answer.body["error"]


FORMS = [
    {},
    {"Content-Type": "text/plain"},
    {"Content-Type": "text/plain; x=application/json"},
    {"Content-Type": "application/x-www-form-urlencoded"},
    {"Content-Type": "multipart/form-data; boundary=application/json"},
    {"Content-Type": ""},
]
"""What a browser sends to another site without asking first; with plain http outside loopback it says no more."""


@pytest.mark.slow
def test_a_form_of_another_site_changes_nothing(working: ComfyServer) -> None:
    body = json.dumps({"client": working.client_id, "visible": True})
    elsewhere = {"Host": f"gpu.local:{working.port}", "Origin": "http://elsewhere.example"}
    for name, form, origin in product(CHANGE, FORMS, ({}, elsewhere)):
        refused(ask(working, "POST", name, body, form | origin), 415, "allowed is application/json")


@pytest.mark.parametrize("name", CHANGE)
@pytest.mark.parametrize("headers", [{"Origin": "http://elsewhere.example"}, {"Sec-Fetch-Site": "cross-site"}], ids=str)
def test_comfyui_refuses_other_origins_by_itself(server: ComfyServer, name: str, headers: dict[str, str]) -> None:
    assert ask(server, "POST", name, b"{}", JSON | headers).status == 403


@pytest.mark.parametrize("name", CHANGE)
def test_a_browser_is_not_allowed_to_send_json_from_elsewhere(
    server: ComfyServer, open_server: ComfyServer, name: str
) -> None:
    """It asks by OPTIONS first; that both servers answer, and only the friend may."""
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    for origin in ("http://elsewhere.example", FRIEND):
        alone = ask(server, "OPTIONS", name, headers=asked | {"Origin": origin})
        assert "Access-Control-Allow-Origin" not in alone.headers
        opened = ask(open_server, "OPTIONS", name, headers=asked | {"Origin": origin})
        assert opened.headers["Access-Control-Allow-Origin"] == FRIEND


BODIES = [
    (b"", 400),
    (b"no json", 400),
    (b"\xff\xfe", 400),
    (b"[]", 400),
    (b"null", 400),
    (b'"restart"', 400),
    (b"[" * 4000, 400),
    (b'{"x":' * 800, 400),
    (b'{"x": "' + b"x" * 4096 + b'"}', 413),
    (b"{}" + b" " * (8 << 20), 413),
]


def test_a_broken_body_changes_nothing(working: ComfyServer) -> None:
    for name, (body, status) in product(CHANGE, BODIES):
        refused(ask(working, "POST", name, body, JSON), status, "the body")
    for name in CHANGE:
        in_pieces = iter([b" " * 1000] * 100)
        refused(ask(working, "POST", name, in_pieces, JSON), 413, "the body has more than 4096 bytes")
        packed = ask(working, "POST", name, b"no deflate", JSON | {"Content-Encoding": "deflate"})
        assert 400 <= packed.status < 500


def test_a_watch_of_the_wrong_types_is_refused(working: ComfyServer) -> None:
    for wrong in ({"client": 5}, {"client": None}, {"client": ["x"]}, {"visible": 1}, {"visible": "yes"}):
        body = json.dumps({"client": working.client_id, "visible": True} | wrong)
        refused(ask(working, "POST", "watch", body, JSON), 400, "the body must be")


def test_other_methods_are_refused(working: ComfyServer) -> None:
    for name, method in product(READ + CHANGE, ("GET", "POST", "PUT", "PATCH", "DELETE")):
        allowed = "GET" if name in READ else "POST"
        if method != allowed:
            answer = ask(working, method, name, b"{}", JSON)
            refused(answer, 405, f"the method is {method}; allowed is {allowed}")
            assert answer.headers["Allow"] == allowed


def test_a_panel_is_still_heard(open_server: ComfyServer) -> None:
    """Also one of the site that is allowed."""
    body = json.dumps({"client": open_server.client_id, "visible": True})
    for headers in (JSON, {"Content-Type": "application/json; charset=utf-8", "Origin": FRIEND}):
        assert ask(open_server, "POST", "watch", body, headers).status == 200
    assert ask(open_server, "POST", "free", b"{}", JSON).status == 200
    assert ask(open_server, "GET", "status").status == 200
