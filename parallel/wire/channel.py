"""Messages between the host and one worker, over an inherited socket pair.

A message is a JSON object; its frame is a 4-byte length, then UTF-8 text. File descriptors (shared memory) ride along
by SCM_RIGHTS. Nothing is unpickled, so a message can never run code.
"""

from __future__ import annotations

import array
import json
import socket
import struct
import threading
from typing import Any

Message = dict[str, Any]

_HEADER = struct.Struct("!IB")  # length of the text, number of descriptors
_MAX_FDS = 16


class ChannelClosed(ConnectionError):
    """The other end is gone."""


class ChannelBlocked(ChannelClosed):
    """The other end takes nothing; a part of the message may be under way, so nothing can be sent any more."""


class ChannelGarbled(ChannelClosed):
    """The other end sent what is no message; nothing after it can be understood."""


class Channel:
    """One end of the socket. `send` may be called from several threads, `receive` from one.

    Args:
        sock: of a socket pair.
        send_timeout_s: how long `send` may wait for room in the socket's buffer; by default for ever.
    """

    def __init__(self, sock: socket.socket, send_timeout_s: float | None = None):
        self._sock = sock
        if send_timeout_s is not None:  # Python's own time-out would be one of `receive`, too
            limit = struct.pack("@ll", int(send_timeout_s), int(send_timeout_s % 1 * 1e6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self._lock = threading.Lock()

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        """Sends one message; the receiver gets its own duplicates of `fds`.

        Raises:
            ChannelClosed: nobody is at the other end.
            ChannelBlocked: there is no room in its buffer for longer than `send_timeout_s`.
        """
        assert len(fds) <= _MAX_FDS
        text = json.dumps(message, separators=(",", ":"), allow_nan=False).encode()
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
        """
        # The descriptors arrive with the first byte of the frame they were sent with; reading exactly one header
        # keeps them with their message.
        header, fds = self._read(_HEADER.size, with_fds=True)
        length, count = _HEADER.unpack(header)
        text, _ = self._read(length)
        assert len(fds) == count, f"{count} descriptors announced, {len(fds)} received"
        return json.loads(text), fds

    def close(self) -> None:
        self._sock.close()

    def _read(self, size: int, with_fds: bool = False) -> tuple[bytes, list[int]]:
        parts: list[bytes] = []
        fds: list[int] = []
        while size:
            try:
                if with_fds:
                    part, got, _, _ = socket.recv_fds(self._sock, size, _MAX_FDS)
                    fds += got
                else:
                    part = self._sock.recv(min(size, 1 << 20))
            except OSError as error:
                raise ChannelClosed(str(error)) from error
            if not part:
                raise ChannelClosed("the other end closed the connection")
            parts.append(part)
            size -= len(part)
        return b"".join(parts), fds
