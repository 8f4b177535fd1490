"""Main loop of a worker: joins the group, then handles the host's messages in order until `stop` or the host's end.

The operations are implemented in `models`, `steps`, `tiles` and `benchmarks`.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
import queue
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .. import numerics
from ..attention import kernels
from ..attention.common_memory import CommonMemory
from ..errors import StepCancelled
from ..wire.channel import Channel, ChannelClosed, Message
from ..wire.messages import FP8Support, FreeMemory, MemoryUse, Recover, Reply, Rest, read
from ..wire.typed import to_plain
from . import faults
from .benchmarks import Benchmarks
from .fp8_linear import support
from .free_memory import device_memory, host_memory
from .host_link import HostLink
from .libraries import Libraries
from .models import Models
from .ranks import Ranks, join
from .steps import Steps
from .tiles import Operations, Tiles

_PR_SET_PDEATHSIG = 1


class Worker:
    """The state of one rank.

    Args:
        channel: connection to the host.
        settings: see `host.process`. The library of its `first` model is imported while the ranks meet.
        device: this rank's device.
    """

    def __init__(self, channel: Channel, settings: Mapping[str, Any], device: torch.device):
        self._channel = channel
        self._device = device
        rank, weights, attention = settings["rank"], tuple(settings["weights"]), settings["attention"]
        usable = device.type == "cpu" and CommonMemory.supported()
        memory = CommonMemory(settings["common"], rank, len(weights)) if usable else None
        self._ranks = Ranks(weights, device, kernels.select(attention, device), memory, chosen=attention != "auto")
        self._libraries = Libraries(settings["first"], device)
        join(rank, len(weights), device, settings["store"])
        self._link = HostLink(channel, rank)
        self._models = Models(self._link, self._ranks, self._libraries, self._give_memory_back)
        self._benchmarks = Benchmarks(self._link, self._ranks)
        self._operations: Operations = {
            FP8Support: self._fp8_support,
            FreeMemory: self._free_memory,
            Recover: self._recover,
            Rest: self._rest,
            **self._models.operations,
            **Steps(self._link, self._ranks, self._models).operations,
            **Tiles(self._link, device, self._give_memory_back).operations,
            **self._benchmarks.operations,
        }

    def run(self, inbox: queue.Queue[tuple[Message, list[int]]]) -> None:
        """Answers messages until `stop`."""
        while True:
            message, fds = inbox.get()
            if message["op"] == "stop":
                return
            if message["op"] == "attach":
                self._link.attach(message["segments"], fds)
                continue
            memory: MemoryUse | None = None
            outcome: dict[str, Any] = {}
            attached = False
            try:
                self._link.attach(message["segments"], fds)
                attached = True
                self._libraries.wait()
                with self._benchmarks.pace():
                    operation = read(message)
                    outcome = {"result": self._operations[type(operation)](operation)}
            except StepCancelled:
                pass
            except BaseException as error:
                memory = self._memory_use()
                outcome = {"error": faults.describe(error, attached)}
                faults.let_go(error)
            memory = memory or self._memory_use()
            reply = Reply(id=message["id"], launched=self._ranks.launched(), memory=memory, **outcome)
            self._channel.send(to_plain(reply))

    # --- operations ---------------------------------------------------------------------------------------------

    def _fp8_support(self, message: FP8Support) -> dict[str, Any]:
        with torch.no_grad():
            return {"support": support(self._device)}

    def _free_memory(self, message: FreeMemory) -> dict[str, Any]:
        self._give_memory_back()
        return {"device": asdict(device_memory(self._device)), "host": asdict(host_memory())}

    def _recover(self, message: Recover) -> dict[str, Any]:
        self._models.forget_caches()
        self._give_memory_back()
        faults.probe(self._device)
        return {}

    def _rest(self, message: Rest) -> dict[str, Any]:
        """Frees cached CUDA memory. A CPU worker keeps its memory, which is faster and which the system can reclaim."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return {}

    # --- parts --------------------------------------------------------------------------------------------------

    def _give_memory_back(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            ctypes.CDLL(None).malloc_trim(0)
        if self._ranks.memory is not None:
            self._ranks.memory.release()

    def _memory_use(self) -> MemoryUse | None:
        if self._device.type != "cuda":
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
            return MemoryUse(used=resident, free=None, cached=0)
        with contextlib.suppress(RuntimeError):  # the device has failed
            used, allocated = torch.cuda.memory_reserved(self._device), torch.cuda.memory_allocated(self._device)
            free = int(torch.cuda.mem_get_info(self._device)[0])
            return MemoryUse(used=used, free=free, cached=used - allocated)
        return None


class _ToHost(logging.Handler):
    """Log handler that sends this worker's own records to the host, which logs them with the rank."""

    def __init__(self, channel: Channel):
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self._channel.send({"event": "log", "level": record.levelno, "text": self.format(record)})


def main(settings: dict[str, Any], entered: float) -> None:
    """Runs the worker process.

    Args:
        settings: see `host.process`.
        entered: time at which Python ran the process's first line, by `time.monotonic`: on Linux one clock for all
            processes.
    """
    phases: dict[str, float] = {}
    """Seconds of each phase of the start, in order."""

    def ended(name: str, at: float) -> None:
        phases[name] = at - settings["started"] - sum(phases.values())

    ended("python", entered)
    ended("torch", time.monotonic())
    faulthandler.enable()
    # Kills this process when the host ends, also by SIGKILL. _listen detects the same by the closed socket, but this
    # works even while the interpreter is busy.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != settings["host_pid"]:
        sys.exit("the host is gone")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches us too; the host decides
    torch.set_num_threads(settings["threads"])
    numerics.apply(settings["switches"])
    device = torch.device(settings["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.synchronize(device)  # creates the context here, where it is timed
    ended("device", time.monotonic())

    channel = Channel(socket.socket(fileno=settings["fd"]))
    root = logging.getLogger("sequence_parallel")
    root.setLevel(logging.INFO)
    root.addHandler(_ToHost(channel))
    inbox: queue.Queue[tuple[Message, list[int]]] = queue.Queue()
    threading.Thread(target=_listen, args=(channel, inbox), name="listen", daemon=True).start()
    worker = Worker(channel, settings, device)
    ended("meeting", time.monotonic())
    channel.send({"event": "ready", "pid": os.getpid(), "seconds": phases, **_describe_device(device)})
    worker.run(inbox)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # taking down an interpreter with all its modules costs seconds on a busy machine


def _describe_device(device: torch.device) -> dict[str, Any]:
    """Returns the device's display name and its memory in bytes."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"title": properties.name, "total": int(properties.total_memory)}
    return {"title": "CPU", "total": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}


def _listen(channel: Channel, inbox: queue.Queue[tuple[Message, list[int]]]) -> None:
    """Reads the host's messages while the main thread computes, and ends the process at once when the host is gone."""
    while True:
        try:
            inbox.put(channel.receive())
        except ChannelClosed:
            os._exit(0)
