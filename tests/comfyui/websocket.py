"""A minimal WebSocket client: enough to read the events of a server on this machine."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import struct

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


class WebSocketClosed(ConnectionError):
    """The server has gone."""


class WebSocket:
    """One client connection; `receive` is to be called from a single thread."""

    def __init__(self, host: str, port: int, path: str) -> None:
        self._socket = socket.create_connection((host, port), timeout=10)
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._stream = self._socket.makefile("rb")
        status = self._stream.readline()
        if b" 101 " not in status:
            raise WebSocketClosed(f"no WebSocket at {path}: {status!r}")
        while self._stream.readline().strip():
            pass
        self._socket.settimeout(None)

    def receive(self) -> str | bytes:
        """The next message, text or binary."""
        kind, payload = 0, b""
        while True:
            final, opcode, data = self._receive_frame()
            if opcode == PING:
                self._send(PONG, data)
                continue
            if opcode == CLOSE:
                raise WebSocketClosed("closed by the server")
            if opcode == PONG:
                continue
            kind = opcode or kind
            payload += data
            if final:
                return payload.decode() if kind == TEXT else payload

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _receive_frame(self) -> tuple[bool, int, bytes]:
        first, second = self._read(2)
        length = second & 0x7F
        if length == 126:
            (length,) = struct.unpack(">H", self._read(2))
        elif length == 127:
            (length,) = struct.unpack(">Q", self._read(8))
        return bool(first & 0x80), first & 0x0F, self._read(length)

    def _read(self, size: int) -> bytes:
        try:
            data = self._stream.read(size)
        except (OSError, ValueError) as error:
            raise WebSocketClosed(str(error)) from error
        if data is None or len(data) < size:
            raise WebSocketClosed("connection lost")
        return data

    def _send(self, opcode: int, data: bytes) -> None:
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))
        self._socket.sendall(struct.pack(">BB", 0x80 | opcode, 0x80 | len(data)) + mask + masked)
