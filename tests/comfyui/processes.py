"""What the operating system says about processes: children, CPU time, memory, sockets, shared memory (Linux)."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
SHARED_MEMORY = Path("/dev/shm")
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_LISTEN = "0A"


@dataclass(frozen=True)
class Process:
    """A process that stays itself when its id is used again: the start time belongs to the identity."""

    pid: int
    started: int

    @classmethod
    def find(cls, pid: int) -> Process | None:
        fields = _stat(pid)
        return cls(pid, int(fields[19])) if fields else None

    @property
    def alive(self) -> bool:
        fields = _stat(self.pid)
        return fields is not None and int(fields[19]) == self.started and fields[0] not in "ZX"

    @property
    def parent(self) -> int:
        fields = _stat(self.pid)
        return int(fields[1]) if fields else 0

    @property
    def command_line(self) -> list[str]:
        return _read(PROC / str(self.pid) / "cmdline").split("\0")[:-1]

    @property
    def cpu_seconds(self) -> float:
        fields = _stat(self.pid)
        return (int(fields[11]) + int(fields[12])) / _TICKS if fields else 0.0

    @property
    def resident_bytes(self) -> int:
        fields = _read(PROC / str(self.pid) / "statm").split()
        return int(fields[1]) * _PAGE if fields else 0

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.alive:
            os.kill(self.pid, number)


def descendants(pid: int) -> list[Process]:
    """All living processes below this one."""
    children: dict[int, list[Process]] = {}
    for entry in PROC.iterdir():
        process = Process.find(int(entry.name)) if entry.name.isdigit() else None
        if process is not None and process.alive:
            children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    pending = [pid]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += [process.pid for process in below]
    return found


def total_cpu_seconds(processes: Iterable[Process]) -> float:
    return sum(process.cpu_seconds for process in processes)


def gains_cpu(processes: list[Process], seconds: float, within: float = 5.0) -> bool:
    """Whether they compute for so long, within a time of waiting."""
    before = total_cpu_seconds(processes)
    return wait_until(lambda: total_cpu_seconds(processes) - before > seconds, timeout=within)


def total_resident_bytes(processes: Iterable[Process]) -> int:
    return sum(process.resident_bytes for process in processes)


def listening_addresses(pids: Iterable[int]) -> list[tuple[str, int]]:
    """Addresses and ports of the TCP sockets that these processes listen on."""
    inodes = {name[8:-1] for pid in pids for name in _open_files(pid) if name.startswith("socket:[")}
    found = []
    for table in ("tcp", "tcp6"):
        for line in _read(PROC / "net" / table).splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN and fields[9] in inodes:
                found.append(_parse_address(fields[1]))
    return found


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def shared_memory_files() -> set[str]:
    return {str(path) for path in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.is_dir() else set()


def shared_memory_in_use() -> set[str]:
    """Names under /dev/shm that a living process holds open or has mapped."""
    used = set()
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            lines = _read(entry / "maps").splitlines()
            used |= {line[line.index("/dev/shm/") :] for line in lines if "/dev/shm/" in line}
            used |= {name for name in _open_files(int(entry.name)) if name.startswith("/dev/shm/")}
    return used


def wait_until(condition: Callable[[], bool], timeout: float, interval: float = 0.05) -> bool:
    """Whether the condition became true in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(interval)
    return True


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/<pid>/stat after the command name: state, parent, ..."""
    text = _read(PROC / str(pid) / "stat")
    return text[text.rindex(")") + 2 :].split() if text else None


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _open_files(pid: int) -> list[str]:
    names = []
    try:
        for link in (PROC / str(pid) / "fd").iterdir():
            try:
                names.append(os.readlink(link))
            except OSError:
                continue
    except OSError:
        pass
    return names


def _parse_address(text: str) -> tuple[str, int]:
    """An address of /proc/net/tcp: 32-bit words in host byte order, then the port."""
    host, port = text.split(":")
    order = "<" if sys.byteorder == "little" else ">"
    words = [int(host[i : i + 8], 16) for i in range(0, len(host), 8)]
    packed = struct.pack(f"{order}{len(words)}I", *words)
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    return socket.inet_ntop(family, packed), int(port, 16)
