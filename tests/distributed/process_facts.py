"""What the kernel says about processes (Linux)."""

from __future__ import annotations

import ipaddress
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_LISTENING = "0A"


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def is_running(pid: int) -> bool:
    """Whether the process exists and has not ended (one that nobody has waited for yet has)."""
    try:
        return _stat(pid)[0] not in "ZX"
    except OSError:
        return False


def all_ended(pids: Iterable[int]) -> bool:
    return not any(is_running(pid) for pid in pids)


def cpu_seconds(pid: int) -> float:
    """User and system time so far, in steps of 10 ms."""
    user, system = _stat(pid)[11:13]
    return (int(user) + int(system)) / _TICKS_PER_S


def address_space(pid: int) -> int:
    """Bytes of virtual memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def limit_memory(pid: int, spare: int) -> None:
    """Lets the process allocate `spare` more bytes."""
    limit = address_space(pid) + spare
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))


def memory(pid: int, kind: str) -> int:
    """Resident bytes of `Anon` (the process's own), `File` (pages of mapped files) or `Shmem`."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"Rss{kind}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"process {pid} has no memory")  # it has ended


def weight_copies(pids: Iterable[int]) -> int:
    """Bytes of the memory files of weights that these processes map, each file once."""
    sizes: dict[str, int] = {}
    for pid in pids:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, _, _, _, inode, *name = line.split()
            if "weights" in "".join(name):
                start, stop = (int(end, 16) for end in span.split("-"))
                sizes[inode] = stop - start
    return sum(sizes.values())


class MemoryPeaks:
    """Largest `memory` of some processes during a `with` block, sampled every few milliseconds."""

    def __init__(self, pids: Iterable[int], kind: str = "Anon"):
        self._pids, self._kind = tuple(pids), kind
        self.before = {pid: memory(pid, kind) for pid in self._pids}
        self.peak = dict(self.before)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> MemoryPeaks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.005):
            for pid in self._pids:
                self.peak[pid] = max(self.peak[pid], memory(pid, self._kind))


def open_tcp_sockets(pid: int) -> list[tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, bool]]:
    """Local address of each TCP socket of the process, and whether it listens."""
    targets = [_target(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    inodes = {target.removeprefix("socket:[").removesuffix("]") for target in targets if target.startswith("socket:[")}
    sockets = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in inodes:
                sockets.append((_address(fields[1].partition(":")[0]), fields[3] == _LISTENING))
    return sockets


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The kernel prints an address as 32-bit words in the machine's byte order."""
    words = [int(text[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(text), 8)]
    address = ipaddress.ip_address(b"".join(words))
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # closed meanwhile
        return ""
