"""Messages between the host and one worker, over an inherited socket pair.

A message is a JSON object. Its frame is a 4-byte length, one byte with the number of file descriptors, and UTF-8 text.
The descriptors (shared memory) are passed with it by SCM_RIGHTS. Nothing is unpickled, so a message can never run code.
All other data is refused, and occupies no more memory than was actually sent.
"""

from __future__ import annotations

import array
import json
import math
import os
import select
import socket
import struct
import threading
import time
from typing import Any

Message = dict[str, Any]

LONGEST = 256 << 20
"""Maximum bytes of a text. A step has a few KB, ComfyUI's longest sampling (10,000 steps, cond and uncond) 29 MB."""
_HEADER = struct.Struct("!IB")  # length of the text, number of descriptors
_MAX_FDS = 16
_PIECE = 1 << 20


class ChannelClosed(ConnectionError):
    """The other end has closed the connection."""


class ChannelGarbled(ChannelClosed):
    """The other end sent data that is not a message; nothing after it can be parsed."""


class ChannelBlocked(ChannelClosed):
    """The other end does not read. Part of the message may have been sent, so nothing more can be sent."""


class Channel:
    """One end of the socket. `send` may be called from several threads, `receive` from one.

    Args:
        sock: one socket of a pair.
        send_timeout_s: timeout of `send` for space in the socket's buffer; None: no timeout.
        receive_timeout_s: timeout for the rest of a message after its first byte; None: no timeout.
    """

    def __init__(
        self, sock: socket.socket, send_timeout_s: float | None = None, receive_timeout_s: float | None = None
    ):
        self._sock = sock
        if send_timeout_s is not None:  # Python's own timeout would apply to `receive`, too
            limit = struct.pack("@ll", int(send_timeout_s), int(send_timeout_s % 1 * 1e6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self._receive_timeout_s = receive_timeout_s
        self._garbled = ""
        self._lock = threading.Lock()

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        """Sends one message; the receiver gets its own duplicates of `fds`.

        Raises:
            ValueError: the message is longer than `LONGEST`, or has numbers that are not finite.
            ChannelClosed: the other end has closed the connection.
            ChannelBlocked: the socket's buffer had no space for longer than `send_timeout_s`.
        """
        assert len(fds) <= _MAX_FDS
        text = json.dumps(message, separators=(",", ":"), allow_nan=False).encode()
        if len(text) > LONGEST:
            raise ValueError(f"a message of {len(text)} bytes; the longest may have {LONGEST}")
        frame = _HEADER.pack(len(text), len(fds)) + text
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            with self._lock:
                sent = self._sock.sendmsg([frame], ancillary)
                if sent < len(frame):
                    self._sock.sendall(frame[sent:])
        except BlockingIOError as error:
            raise ChannelBlocked("the other end takes no messages") from error
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive(self) -> tuple[Message, list[int]]:
        """Waits for the next message. The caller owns the returned descriptors.

        Raises:
            ChannelClosed: the other end closed, or its process ended.
            ChannelGarbled: the other end sent data that is not a message, or only part of one within
                `receive_timeout_s`. Every further call raises it again. Descriptors that were received are closed.
        """
        if self._garbled:
            raise ChannelGarbled(self._garbled)
        fds: list[int] = []
        try:
            return self._read_message(fds), fds
        except BaseException as error:
            for fd in fds:
                os.close(fd)
            if isinstance(error, ChannelGarbled):
                self._garbled = str(error)
            raise

    def close(self) -> None:
        self._sock.close()

    def _read_message(self, fds: list[int]) -> Message:
        # Descriptors arrive with the first byte of their frame; reading no further than the frame's end keeps them
        # with their message.
        header = self._piece(_HEADER.size, fds)
        end = math.inf if self._receive_timeout_s is None else time.monotonic() + self._receive_timeout_s
        header += self._rest(_HEADER.size - len(header), fds, end)
        length, count = _HEADER.unpack(header)
        if length > LONGEST:
            raise ChannelGarbled(f"a message of {length} bytes is announced; the longest may have {LONGEST}")
        text = self._rest(length, fds, end)
        if len(fds) != count:
            raise ChannelGarbled(f"{count} descriptors are announced, {len(fds)} came")
        return _parsed(text)

    def _rest(self, size: int, fds: list[int], end: float) -> bytearray:
        """Reads `size` bytes; allocates memory as they arrive. After `end`, reads only bytes that have arrived."""
        found = bytearray()
        while len(found) < size:
            if end < math.inf:
                arrives = select.poll()
                arrives.register(self._sock, select.POLLIN)
                if not arrives.poll(max(0.0, end - time.monotonic()) * 1000):
                    raise ChannelGarbled(f"the rest of a message did not come within {self._receive_timeout_s:g} s")
            found += self._piece(min(size - len(found), _PIECE), fds)
        return found

    def _piece(self, size: int, fds: list[int]) -> bytes:
        """Reads the available bytes, up to `size`; waits for the first one."""
        room = socket.CMSG_LEN(_MAX_FDS * array.array("i").itemsize)
        try:
            piece, ancillary, flags, _ = self._sock.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            raise ChannelClosed(str(error)) from error
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                received = array.array("i")
                received.frombytes(content[: len(content) - len(content) % received.itemsize])
                fds += received
        if flags & socket.MSG_CTRUNC:
            raise ChannelGarbled(f"more than {_MAX_FDS} descriptors came at once")
        if not piece:
            raise ChannelClosed("the other end closed the connection")
        return piece


def _parsed(text: bytearray) -> Message:
    """Parses the text of a message.

    Raises:
        ChannelGarbled: it is not a JSON object.
    """
    try:
        message = json.loads(text.decode(), parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ChannelGarbled(f"no JSON: {error}: {bytes(text[:80])!r}") from error
    if not isinstance(message, dict):
        raise ChannelGarbled(f"no JSON object: {bytes(text[:80])!r}")
    return message


def _finite(text: str) -> float:
    """Parses a number; refuses NaN, Infinity and numbers that overflow, such as `1e999`."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not finite")
    return number
