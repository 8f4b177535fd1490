"""Damaged messages, as the worker and as the host read them: python -m tests.fuzz.wire --cases 100000 [--seed N]"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import socket
import struct
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from parallel.wire import messages
from parallel.wire.channel import Channel, ChannelClosed
from parallel.wire.shared import Segment, TensorRef
from parallel.wire.trees import restore
from parallel.wire.typed import from_plain, to_plain
from tests.fuzz.mutations import damaged_bytes, damaged_json, text_of
from tests.fuzz.runs import main
from tests.unit.test_messages import MESSAGES, PLACE

_SIZE = 4096
_MEMORY = messages.MemoryUse(used=1, free=None, cached=2)
_FAILURE = messages.Failure(
    type="ValueError", message="m", traceback="t", expected=True, out_of_memory=False, resumable=True
)
_RESULT = {"out": [to_plain(PLACE)], "structure": {"dict": {"a": {"tensor": "0"}, "b": {"set": [1]}}}, "seconds": 0.5}
REPLIES = [
    messages.Reply(id=1, launched={"world": 3}, memory=_MEMORY, result=_RESULT),
    messages.Reply(id=2, launched={}, memory=None, error=_FAILURE),
]


def read_damaged(random_: random.Random) -> bool:
    """One message, or a few; whether one of them was accepted."""
    files = [_file() for _ in range(random_.choice((0, 0, 0, 1, 2, 20)))]
    _segment()  # has one for all cases
    before = len(os.listdir("/proc/self/fd"))
    theirs, ours = socket.socketpair()
    channel = Channel(ours, receive_timeout_s=10)
    accepted = False
    with contextlib.closing(channel), theirs, contextlib.suppress(ChannelClosed):  # also garbled
        content = b"".join(_frame(random_, len(files)) for _ in range(random_.choice((1, 1, 2))))
        if random_.random() < 0.5:
            content = damaged_bytes(random_, content)
        if content:
            socket.send_fds(theirs, [content], files)
        theirs.close()
        while True:
            message, fds = channel.receive()
            accepted |= _read(message, fds)
    assert len(os.listdir("/proc/self/fd")) == before, "descriptors are left"
    for file in files:
        os.close(file)
    return accepted


@cache
def _documents() -> list[dict[str, Any]]:
    announced = [{"name": "step", "size": _SIZE}, {"name": "s", "size": 1}]
    sent = [message.to_json(number, announced[: number % 3]) for number, message in enumerate(MESSAGES)]
    return [*sent, *(to_plain(reply) for reply in REPLIES)]


def _frame(random_: random.Random, descriptors: int) -> bytes:
    document = random_.choice(_documents())
    for _ in range(random_.choice((0, 1, 1, 2))):
        document = damaged_json(random_, document)
    text = text_of(document)
    if random_.random() < 0.2:
        text = damaged_bytes(random_, text)
    count = descriptors if random_.random() < 0.9 else random_.randrange(256)
    return struct.pack("!IB", len(text), count) + text


def _read(message: dict[str, Any], fds: list[int]) -> bool:
    """As whoever gets it; whether it was accepted."""
    announced = message.get("segments")
    for fd, entry in zip(fds, announced if isinstance(announced, list) else [], strict=False):
        size = entry.get("size") if isinstance(entry, dict) else None
        with contextlib.suppress(ValueError):
            Segment("announced", os.dup(fd), size if type(size) is int else -1).close()
    for fd in fds:
        os.close(fd)
    try:
        if "op" in message:
            _use(messages.read(message))
        else:
            reply = from_plain(messages.Reply, message)
            if isinstance(reply.result, dict):
                for place in reply.result.get("out") or ():
                    _segment().tensor(from_plain(TensorRef, place))
                restore(reply.result.get("structure"), {"0": torch.ones(1)}.__getitem__)
    except (TypeError, ValueError):
        return False
    return True


def _use(operation: messages.Operation) -> None:
    """Every tensor, and every nest."""
    for part in _parts(operation):
        if isinstance(part, TensorRef):
            assert _segment().tensor(part).sum() == 0
        elif isinstance(part, messages.Request | messages.Call):
            restore(part.arguments, {"x": torch.ones(1)}.__getitem__)


def _parts(value: Any) -> Iterator[Any]:
    yield value
    if dataclasses.is_dataclass(value):
        value = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    if isinstance(value, dict | list | tuple) and not isinstance(value, TensorRef):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _parts(item)


@cache
def _segment() -> Segment:
    return Segment.create("step", _SIZE)


def _file() -> int:
    fd = os.memfd_create("fuzz")
    os.ftruncate(fd, _SIZE)
    return fd


if __name__ == "__main__":
    main(read_damaged)
