"""A ComfyUI server of its own folders and port, driven over HTTP and WebSocket as the front end drives it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.comfyui.installation import Installation
from tests.comfyui.processes import Process, descendants, wait_until
from tests.comfyui.websocket import WebSocket, WebSocketClosed

AT_START = Path(__file__).parent / "at_start"
HOST = "127.0.0.1"
MODEL_FOLDERS = ("diffusion_models", "checkpoints", "loras", "vae", "text_encoders")
_FINAL = {"execution_success": "success", "execution_error": "error", "execution_interrupted": "interrupted"}
_PREVIEW, _PREVIEW_WITH_METADATA = 1, 4

Graph = dict[str, dict[str, Any]]


class ServerError(RuntimeError):
    """The server did not start, died or did not answer."""


@dataclass(frozen=True)
class Event:
    """One WebSocket event; `preview` events carry the encoded image under "image"."""

    when: float
    kind: str
    data: dict[str, Any]


@dataclass(frozen=True)
class PromptResult:
    """How a prompt ended: success, error, interrupted, or rejected by validation."""

    prompt_id: str
    status: str
    message: str = ""
    node_type: str = ""
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0
    ended: float = 0.0


class ComfyServer:
    """Context manager around one `main.py --cpu` process; `packs` are linked into its custom_nodes folder.

    `wrapper` goes before its command, and is to become it in the end, as `exec` does.
    """

    def __init__(
        self,
        installation: Installation,
        base: Path,
        packs: Mapping[str, Path],
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        wrapper: Sequence[str] = (),
    ) -> None:
        self.installation = installation
        self.base = base
        self.packs = {name: base / "custom_nodes" / name for name in packs}
        self.log_path = base / "server.log"
        self.models = base / "models"
        self.port = 0
        self.client_id = uuid.uuid4().hex
        self._sources = dict(packs)
        self._arguments = list(arguments)
        self._wrapper = list(wrapper)
        self._environment = dict(environment or {})
        self._popen: subprocess.Popen[bytes] | None = None
        self._websocket: WebSocket | None = None
        self._events: list[Event] = []
        self._changed = threading.Condition()
        self._disconnected = False
        self._seen: set[Process] = set()

    # --- life ---------------------------------------------------------------------------------

    def __enter__(self) -> ComfyServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        assert self._popen is not None, "the server has not been started"
        return self._popen.pid

    @property
    def output(self) -> Path:
        """Its output folder as it sees it, which may have mounts of its own."""
        return self.seen(self.base / "output")

    def seen(self, path: Path) -> Path:
        """A path for what the server finds at `path`."""
        return Path(f"/proc/{self.pid}/root{path}")

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def alive(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    @property
    def process(self) -> Process:
        process = Process.find(self.pid)
        assert process is not None, f"the server is gone\n{self.log_tail()}"
        return process

    def start(self, timeout: float = 120.0) -> None:
        self._make_folders()
        self.port = _free_port()
        command = [self.installation.python, self.installation.path / "main.py", "--cpu", "--disable-auto-launch"]
        command += ["--base-directory", self.base, "--listen", HOST, "--port", str(self.port)]
        command += ["--database-url", f"sqlite:///{self.base / 'user' / 'comfyui.db'}", "--disable-api-nodes"]
        with self.log_path.open("wb") as log:
            self._popen = subprocess.Popen(
                [str(part) for part in self._wrapper + command + self._arguments],
                cwd=self.base,
                env=self._make_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_heed_ctrl_c,
            )
        try:
            if not wait_until(self._is_ready, timeout, interval=0.2):
                raise ServerError(f"ComfyUI was not ready after {timeout:.0f} s\n{self.log_tail()}")
            self._websocket = WebSocket(HOST, self.port, f"/ws?clientId={self.client_id}")
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._listen, args=(self._websocket,), daemon=True).start()

    def close(self) -> None:
        """Stop the server as Ctrl-C does, then make sure that nothing of it is left."""
        if self._popen is None:
            return
        self._seen.update(descendants(self.pid))
        if self.alive:
            self._popen.send_signal(signal.SIGINT)
            try:
                self._popen.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._popen.kill()
        self._popen.wait()
        if self._websocket is not None:
            self._websocket.close()
        wait_until(lambda: not any(process.alive for process in self._seen), timeout=3)
        for process in self._seen:
            process.kill()

    def kill(self) -> None:
        """SIGKILL the server alone, as the kernel's out-of-memory killer would."""
        assert self._popen is not None
        self._seen.update(descendants(self.pid))
        self._popen.kill()
        self._popen.wait()

    def workers(self) -> list[Process]:
        """Processes below the server that run code of one of the linked packs, in order of their ids."""
        below = descendants(self.pid)
        self._seen.update(below)
        places = [str(path) for path in (*self.packs.values(), *(path.resolve() for path in self._sources.values()))]
        return sorted(
            (process for process in below if any(place in " ".join(process.command_line) for place in places)),
            key=lambda process: process.pid,
        )

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def log_tail(self, lines: int = 60) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    # --- requests -----------------------------------------------------------------------------

    def get(self, path: str) -> Any:
        return self._request(path)[1]

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
        return self._request(path, body or {})

    def has_node(self, node_id: str) -> bool:
        return bool(self.get(f"/object_info/{node_id}"))

    def queue(self, graph: Graph) -> str | PromptResult:
        """The prompt's id, or the result with the reasons when validation rejects the graph."""
        status, answer = self.post("/prompt", {"prompt": graph, "client_id": self.client_id})
        if status == 200 and answer.get("prompt_id"):
            return answer["prompt_id"]
        return PromptResult("", "rejected", _validation_message(answer), ended=time.monotonic())

    def wait(self, prompt_id: str, timeout: float = 120.0) -> PromptResult:
        """Wait for the end of a prompt."""
        final = self.wait_for_event(lambda event: event.kind in _FINAL, prompt_id, timeout)
        started = next(
            (event.when for event in self.events(prompt_id=prompt_id) if event.kind == "execution_start"), final.when
        )
        wait_until(lambda: prompt_id in self.get(f"/history/{prompt_id}"), timeout=10)
        return PromptResult(
            prompt_id,
            _FINAL[final.kind],
            final.data.get("exception_message", "").strip(),
            final.data.get("node_type", ""),
            self.get(f"/history/{prompt_id}").get(prompt_id, {}).get("outputs", {}),
            final.when - started,
            final.when,
        )

    def run(self, graph: Graph, timeout: float = 120.0) -> PromptResult:
        queued = self.queue(graph)
        return queued if isinstance(queued, PromptResult) else self.wait(queued, timeout)

    def interrupt(self) -> None:
        self.post("/interrupt")

    def free(self, unload_models: bool = True, free_memory: bool = True) -> None:
        """Takes effect between prompts; just after a prompt it can take ComfyUI ten seconds to look."""
        self.post("/free", {"unload_models": unload_models, "free_memory": free_memory})

    def settle(self, timeout: float = 10.0) -> bool:
        """Drop what is queued and stop what runs; whether the server is idle then."""
        try:
            self.post("/queue", {"clear": True})
            deadline = time.monotonic() + timeout
            while self.get("/queue")["queue_running"]:
                if time.monotonic() > deadline:
                    return False
                self.interrupt()
                time.sleep(0.2)
        except OSError:
            return False
        return True

    # --- events -------------------------------------------------------------------------------

    def mark(self) -> int:
        """A position for `events(since=...)`."""
        with self._changed:
            return len(self._events)

    def events(self, kind: str | None = None, prompt_id: str | None = None, since: int = 0) -> list[Event]:
        """Events so far; previews belong to no prompt, so select those with `since`."""
        with self._changed:
            found = self._events[since:]
        if kind is not None:
            found = [event for event in found if event.kind == kind]
        if prompt_id is not None:
            found = [event for event in found if event.data.get("prompt_id") == prompt_id]
        return found

    def wait_for_event(self, wanted: Callable[[Event], bool], prompt_id: str, timeout: float) -> Event:
        """The first event of this prompt that is wanted; fails at once when the server dies."""
        deadline = time.monotonic() + timeout
        position = 0
        with self._changed:
            while True:
                for event in self._events[position:]:
                    if event.data.get("prompt_id") == prompt_id and wanted(event):
                        return event
                position = len(self._events)
                if self._disconnected:
                    raise ServerError(f"the server closed the connection\n{self.log_tail()}")
                if time.monotonic() > deadline:
                    raise ServerError(f"prompt {prompt_id}: nothing after {timeout:.0f} s\n{self.log_tail()}")
                self._changed.wait(timeout=0.2)

    def wait_for_node(self, class_type: str, graph: Graph, prompt_id: str, timeout: float = 60.0) -> Event:
        """Wait until a node of this type starts to execute."""
        nodes = {node_id for node_id, node in graph.items() if node["class_type"] == class_type}
        return self.wait_for_event(
            lambda event: event.kind == "executing" and event.data.get("node") in nodes, prompt_id, timeout
        )

    # --- private ------------------------------------------------------------------------------

    def _make_folders(self) -> None:
        for name in ("input", "output", "temp", "user", "custom_nodes"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        for name in MODEL_FOLDERS:
            (self.models / name).mkdir(parents=True, exist_ok=True)
        for name, link in self.packs.items():
            if not link.is_symlink():
                link.symlink_to(self._sources[name], target_is_directory=True)

    def _make_environment(self) -> dict[str, str]:
        drop = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
        environment = {key: value for key, value in os.environ.items() if key not in drop}
        # One thread here and in each worker: with other numbers some CPUs' convolutions give other bits.
        environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
        environment |= {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        environment |= {"PYTHONPATH": str(AT_START)}
        environment |= {"XDG_CACHE_HOME": str(self.base / "cache")}  # compiled blocks go there
        return environment | self._environment

    def _is_ready(self) -> bool:
        if not self.alive:
            raise ServerError(f"ComfyUI ended at start\n{self.log_tail()}")
        try:
            return self._request("/system_stats")[0] == 200
        except OSError:
            return False

    def _request(self, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                status, text = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        try:
            return status, json.loads(text) if text else None
        except ValueError:
            return status, text

    def _listen(self, websocket: WebSocket) -> None:
        while True:
            try:
                event = _decode_event(websocket.receive())
            except WebSocketClosed:
                break
            with self._changed:
                self._events.append(event)
                self._changed.notify_all()
        with self._changed:
            self._disconnected = True
            self._changed.notify_all()


def _heed_ctrl_c() -> None:
    """In the child: a test run in the background of a shell ignores SIGINT, and so would the server."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _decode_event(message: str | bytes) -> Event:
    now = time.monotonic()
    if isinstance(message, str):
        parsed = json.loads(message)
        return Event(now, parsed["type"], parsed.get("data") or {})
    kind = int.from_bytes(message[:4], "big")
    if kind == _PREVIEW:
        return Event(now, "preview", {"image": message[8:]})
    if kind == _PREVIEW_WITH_METADATA:
        size = int.from_bytes(message[4:8], "big")
        return Event(now, "preview", {**json.loads(message[8 : 8 + size]), "image": message[8 + size :]})
    return Event(now, f"binary {kind}", {"bytes": message[4:]})


def _validation_message(answer: Any) -> str:
    """All that the front end shows of a rejected prompt, in one text."""
    if not isinstance(answer, dict):
        return str(answer)
    errors = [answer["error"]] if isinstance(answer.get("error"), dict) else [{"message": str(answer.get("error"))}]
    for node in (answer.get("node_errors") or {}).values():
        errors += [{**error, "node": node.get("class_type", "")} for error in node.get("errors", [])]
    return "\n".join(
        " ".join(str(error[key]) for key in ("node", "message", "details") if error.get(key)) for error in errors
    )
