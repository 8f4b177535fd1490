"""State of a process in the Linux kernel (proc(5)), and its description for messages."""

from __future__ import annotations

from pathlib import Path

HALTED = frozenset("TZX")
"""States of a process stopped by a signal, or ended: it cannot go on by itself. A debugger's stop ("t") is not one."""
ENDED = "X"

_WORDS = {
    "R": "it is running",
    "S": "it is asleep, waiting for something",
    "D": "it waits in the kernel and cannot be interrupted",
    "T": "a signal (SIGSTOP) has stopped it; SIGCONT would let it go on",
    "t": "a debugger has stopped it",
    "Z": "it has ended, but something that it started still holds its connection",
    "X": "it has ended",
}


def state(pid: int) -> str:
    """Returns the state of the process's main thread, a letter of proc(5); `ENDED` if there is no such process, "?" if
    the system does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ENDED if Path("/proc/self/stat").exists() else "?"
    return stat.rpartition(")")[2].split()[0]


def in_words(letter: str) -> str:
    """Describes a state, e.g. "state D: it waits in the kernel and cannot be interrupted"."""
    return f"state {letter}: {_WORDS[letter]}" if letter in _WORDS else f"state {letter}"
