"""`parallel/worker/boot.py` of workers that fail where a test says so; see `faults.Faults`, which has them started.

What stands in for a failure is as close to it as a rank can get: out of memory is PyTorch's exception, raised with a
large tensor alive in its frame and in words that differ from rank to rank; a broken context makes every later operation
of PyTorch fail, too. On a CUDA rank that is a real one.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

BOOT = Path(__file__).parents[2] / "parallel" / "worker" / "boot.py"
FILE = "SEQUENCE_PARALLEL_TEST_FAULT"
"""Environment variable: path of the file in which the test writes the fault."""
HELD_BYTES = 256 << 20
"""Of the tensor that is alive where memory runs out."""
OUT_OF_MEMORY, AND_BROKEN, AND_HANGS, BROKEN = "out of memory", "out of memory and broken", "and hangs", "broken"
EXITS, IS_KILLED, IS_STOPPED, RAISES, SLOW = "exits", "is killed", "is stopped", "raises", "slow"
UNREADABLE, NO_ROOM, VANISHED = "cannot read", "no room", "file vanished"
"""Errors of the system: EIO, ENOSPC, and SIGBUS, which ends a process whose mapped file has been cut."""
NOT_A_NUMBER = "not a number"
"""In a prediction, once."""
GARBAGE, SHORT, STRAY, CLOSED = "garbage", "short message", "stray reply", "closed connection"
"""What its host receives: no message, the beginning of one, an answer that nobody waits for, nothing any more."""
EXIT_CODE = 3


SIGNALS = {IS_KILLED: signal.SIGKILL, IS_STOPPED: signal.SIGSTOP, VANISHED: signal.SIGBUS}
ERRORS = {UNREADABLE: errno.EIO, NO_ROOM: errno.ENOSPC}


class Fault:
    """What the file says, for one rank."""

    def __init__(self, rank: int, device: str, channel: Callable[[], Any]):
        self._rank, self._device, self._channel = rank, device, channel
        self._path = Path(os.environ[FILE])
        self._passed: Counter[tuple[str, str]] = Counter()

    def passes(self, place: str) -> None:
        """Fails if it is time to."""
        if (kind := self.due(place)) is not None:
            self._fail(kind)

    def due(self, place: str) -> str | None:
        """What happens now; slow ranks have been it already."""
        try:
            fault = json.loads(self._path.read_text())
        except FileNotFoundError:
            return None
        if fault["places"].get(str(self._rank)) != place:
            return None
        self._passed[fault["id"], place] += 1
        if fault["kind"] == SLOW:
            time.sleep(0.05)
            return None
        return fault["kind"] if self._passed[fault["id"], place] == fault["count"] else None

    def hangs(self) -> None:
        """Takes longer than anybody waits, if it is to."""
        if self._path.exists() and json.loads(self._path.read_text())["kind"] == AND_HANGS:
            time.sleep(3600)

    def _fail(self, kind: str) -> None:
        if kind == EXITS:
            os._exit(EXIT_CODE)
        if kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[kind])
            return
        if kind == RAISES:
            raise RuntimeError(f"a fault of rank {self._rank}")
        if kind in ERRORS:
            raise OSError(ERRORS[kind], os.strerror(ERRORS[kind]))
        if kind in (GARBAGE, SHORT, STRAY, CLOSED):
            self._misspeak(kind)
            return
        import torch

        if kind == BROKEN:
            self._break()
        held = torch.ones(HELD_BYTES // 4)
        if kind == AND_BROKEN:
            with contextlib.suppress(RuntimeError):
                self._break()
        raise torch.OutOfMemoryError(
            f"CUDA out of memory. Tried to allocate {held.nbytes >> 20} MiB. GPU {self._rank} has a total capacity of"
            f" {23 + self._rank}.65 GiB"
        )

    def _misspeak(self, kind: str) -> None:
        """Sends what no worker sends, and waits for the end."""
        channel = self._channel()
        if kind == STRAY:
            channel.send({"id": 10**9, "launched": {}, "memory": None, "result": {}, "error": None})
            return
        if kind == CLOSED:
            channel._sock.shutdown(socket.SHUT_RDWR)
        else:
            channel._sock.sendall(b"\xff" * 64 if kind == GARBAGE else b"\x00\x00\x01\x00\x00{")
        time.sleep(3600)

    def _break(self) -> None:
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        if self._device.startswith("cuda"):  # a device-side assertion: the context is lost, as after an illegal access
            torch.zeros(1, device=self._device)[torch.tensor([1 << 20], device=self._device)]
            torch.cuda.synchronize()

        class Broken(TorchDispatchMode):
            def __torch_dispatch__(self, *_: Any) -> Any:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

        Broken().__enter__()
        torch.zeros(1)


def put_in(fault: Fault, engine: str) -> None:
    """Has the engine pass the places at which it can fail."""

    def before(owner: Any, name: str, place: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def passing(*args: Any, **options: Any) -> Any:
            fault.passes(f"before {place}")
            result = function(*args, **options)
            fault.passes(f"after {place}")
            return result

        setattr(owner, name, passing)

    before(import_module(f"{engine}.worker.ranks").ParallelContext, "enter_block", "block")
    before(import_module(f"{engine}.attention.common_memory").CommonMemoryExchange, "publish", "exchange")
    before(import_module(f"{engine}.attention.exchange").CollectiveExchange, "transfer", "exchange")
    before(import_module(f"{engine}.attention.ring").RingAttention, "exchange", "exchange")
    before(import_module(f"{engine}.worker.packed").Weight, "install", "parameter")
    before(import_module(f"{engine}.worker.benchmarks").Benchmarks, "_echo", "echo")
    before(import_module(f"{engine}.attention.row_check").RowCheck, "__call__", "self-check")
    models = import_module(f"{engine}.worker.models").Models
    before(models, "_weights", "LoRA")
    before(models, "_unload", "unload")
    before(import_module(f"{engine}.worker.split_network").SplitNetwork, "compiled", "compile")
    before(import_module(f"{engine}.worker.sampling").Sampling, "_network", "pass")
    before(import_module(f"{engine}.worker.loop"), "join", "meeting")
    network = import_module(f"{engine}.worker.split_network")
    all_finite = network.all_finite

    def poisoned(prediction: Any) -> Any:
        if fault.due("before check") == NOT_A_NUMBER:
            prediction.fill_(float("nan"))
        return all_finite(prediction)

    network.all_finite = poisoned
    worker = import_module(f"{engine}.worker.loop").Worker
    recover = worker._recover

    def hanging(*args: Any) -> Any:
        fault.hangs()
        return recover(*args)

    worker._recover = hanging


if __name__ == "__main__":
    entered = time.monotonic()
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    spec = importlib.util.spec_from_file_location("boot", BOOT)
    assert spec is not None and spec.loader is not None
    boot = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(boot)
    boot.import_engine()
    settings = json.loads(sys.argv[1])
    channels: list[Any] = []
    fault = Fault(settings["rank"], settings["device"], lambda: channels[-1])
    channel_class = import_module(f"{boot.ENGINE}.wire.channel").Channel
    make = channel_class.__init__

    def made(self: Any, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        channels.append(self)

    channel_class.__init__ = made
    put_in(fault, boot.ENGINE)
    fault.passes("before start")
    import_module(f"{boot.ENGINE}.worker.loop").main(settings, entered)
