"""Exceptions of the engine, each with a message that a user can act on."""

from __future__ import annotations


class EngineError(RuntimeError):
    """Base class of every error that the engine raises on purpose."""

    # A pack's module name is the path of its folder; ComfyUI would show it before the name of an error.
    __module__ = "sequence_parallel"

    def __init_subclass__(cls) -> None:
        cls.__module__ = EngineError.__module__


class ConfigError(EngineError, ValueError):
    """A setting is not usable. The message names the knob, the value received and what is allowed."""


class CheckpointError(EngineError):
    """A checkpoint file is missing, damaged, or not what its model's class expects."""


class UnsupportedError(EngineError, NotImplementedError):
    """A model, input or option that this engine would compute wrongly or not at all, refused by name."""


class UnknownModelError(UnsupportedError):
    """A file whose model, or whose quantisation, ComfyUI does not recognise."""


class WorkerError(EngineError):
    """A worker failed while it ran an operation.

    Attributes:
        rank: rank of the failing worker.
        remote_type: class name of the exception in the worker.
        remote_traceback: the worker's traceback, every line prefixed with its rank.
        lost: True if the workers have been ended; otherwise they stay usable.
        left_behind: True if a worker could not be ended and still holds its device's memory.
    """

    def __init__(
        self, message: str, *, rank: int, remote_type: str = "", remote_traceback: str = "", lost: bool = True
    ):
        super().__init__(message)
        self.rank = rank
        self.lost = lost
        self.left_behind = False
        self.remote_type = remote_type
        self.remote_traceback = remote_traceback


class WorkerOutOfMemoryError(WorkerError):
    """A worker's device ran out of memory."""


class WorkerDiedError(WorkerError):
    """A worker process ended, was killed, or stopped answering."""


class NotFiniteError(WorkerError):
    """A prediction with NaN or infinite values. The workers stay usable."""


class StepCancelled(EngineError):
    """A stop requested by the host; raised inside the workers, on every rank at the same block."""
