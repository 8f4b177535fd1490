"""What a rank does between the message of a sampling and its first pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from parallel.errors import StepCancelled
from parallel.worker import loop
from parallel.worker.loop import Worker

MESSAGE: dict[str, Any] = {"degrees": [{"cfg": 2}], "compile": {}, "cache": None}


class OtherRanks:
    """Stands for the agreement with them: `stopped` is what they say."""

    def __init__(self, stopped: bool):
        self.stopped = stopped
        self.told: list[bool] = []

    def any(self, *seen: bool) -> list[bool]:
        self.told += seen
        return [each or self.stopped for each in seen]


def worker(monkeypatch: pytest.MonkeyPatch, others: OtherRanks, *, cancelled: bool) -> Worker:
    made = Worker.__new__(Worker)
    made._device = torch.device("cpu")
    made._control = object()  # type: ignore[assignment]

    def compiled(*_: Any) -> None:
        if cancelled:
            raise StepCancelled("stopped before block 3")

    for name, value in {"_conditioned": None, "_mesh": None, "_check": 0.0}.items():
        monkeypatch.setattr(made, name, lambda *_, value=value, **__: value, raising=False)
    monkeypatch.setattr(made, "_compiled", compiled)
    monkeypatch.setattr(loop, "Agreement", lambda *_: others)
    monkeypatch.setattr(loop, "Sampling", lambda *_, **__: pytest.fail("the sampling has begun"))
    return made


@pytest.mark.parametrize(("cancelled", "others_stopped"), [(True, False), (False, True), (True, True)])
def test_a_cancel_while_blocks_are_compiled_stops_all_batch_groups(
    monkeypatch: pytest.MonkeyPatch, cancelled: bool, others_stopped: bool
):
    """Each group compiles by itself, so one may stop where another one has finished: none may begin alone."""
    others = OtherRanks(stopped=others_stopped)
    with pytest.raises(StepCancelled):
        worker(monkeypatch, others, cancelled=cancelled)._sample(MESSAGE)
    assert others.told == [cancelled]
