"""Weights that pass through a device: whatever the order in which its streams get on, a block finds its own weights.

The streams are simulated: each is a queue of what it has been given, and a schedule, drawn at random, says whose turn
it is. A stream stops where it waits for another one.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel.worker import passing
from parallel.worker.passing import Passing


class Event:
    def __init__(self) -> None:
        self.done = False


class Stream:
    """What CUDA's streams promise: in order each, and nothing among them but where one waits."""

    def __init__(self, device: Any = None):
        self.queue: deque[Callable[[], bool]] = deque()
        """Each returns whether it could be done."""

    def give(self, work: Callable[[], None]) -> None:
        def run() -> bool:
            work()
            return True

        self.queue.append(run)

    def record_event(self) -> Event:
        event = Event()
        self.give(lambda: setattr(event, "done", True))
        return event

    def wait_event(self, event: Event) -> None:
        self.queue.append(lambda: event.done)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


class Device:
    """Stands for `torch.cuda`."""

    Event = Event

    def __init__(self) -> None:
        self.main = Stream()
        self.streams = [self.main]
        self._current = self.main

    def Stream(self, device: Any) -> Stream:
        self.streams.append(Stream())
        return self.streams[-1]

    def current_stream(self, device: Any = None) -> Stream:
        return self._current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        yield
        self._current = before

    def run(self, schedule: random.Random) -> None:
        """Everything it has been given."""
        while waiting := [stream for stream in self.streams if stream.queue]:
            schedule.shuffle(waiting)
            for stream in waiting:
                if stream.queue[0]():
                    stream.queue.popleft()
                    break
            else:
                pytest.fail("all streams wait for each other")


class Cargo:
    """Parameters that travel together.

    Args:
        parameters: each with its offset in their bytes in host memory, and now at home in them.
    """

    def __init__(self, parameters: list[tuple[nn.Parameter, int]]):
        self._parameters = [(parameter, parameter.data, offset) for parameter, offset in parameters]

    def land(self, device: Tensor) -> None:
        for parameter, home, offset in self._parameters:
            parameter.data = device[offset : offset + home.nbytes].view(home.dtype).view(home.shape)

    def leave(self) -> None:
        for parameter, home, _ in self._parameters:
            parameter.data = home


SIZES = (3, 5, 2, 5)
"""Parameters of each block: the larger ones leave remains of theirs behind the smaller ones."""


class Network:
    """Blocks whose parameters hold the block's number and a version."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.device = Device()
        monkeypatch.setattr(passing, "cuda", self.device)
        monkeypatch.setattr(passing, "_copy", self._copy)
        self.wrong: list[tuple[int, Tensor]] = []
        self._version = 0.0
        self.blocks = [[nn.Parameter(torch.zeros(4)) for _ in range(size)] for size in (*SIZES, 1)]
        self._hosts = [torch.zeros(len(block) * 16, dtype=torch.uint8) for block in self.blocks]
        for block, host in zip(self.blocks, self._hosts, strict=True):
            for i, parameter in enumerate(block):
                parameter.data = host[i * 16 : i * 16 + 16].view(torch.float32)
        self.homes = {parameter.data_ptr() for block in self.blocks for parameter in block}
        cargo: list[Any] = [Cargo([(parameter, i * 16) for i, parameter in enumerate(block)]) for block in self.blocks]
        self.change()
        self.passing = Passing(cargo, self._hosts, torch.device("cpu"))

    def _copy(self, to: Tensor, host: Tensor) -> None:
        self.device.current_stream().give(lambda: (to.copy_(host), None)[1])

    def change(self) -> None:
        """Other weights, in host memory."""
        self._version += 100
        for number, host in enumerate(self._hosts):
            host.view(torch.float32).fill_(self._version + number)

    def step(self, blocks: Sequence[int]) -> None:
        self.passing.begin()
        for number in blocks:
            self.passing.bring(number)
            for block in (number, -1):
                self._compute(block)

    def _compute(self, number: int) -> None:
        """Launches a look at the weights that the block has now."""
        expected = self._version + number % len(self.blocks)
        found = [parameter.data for parameter in self.blocks[number]]

        def look() -> None:
            self.wrong += [(number, tensor.clone()) for tensor in found if not (tensor == expected).all()]

        self.device.main.give(look)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    return Network(monkeypatch)


PASSES = {
    "all": [0, 1, 2, 3],
    "first block only, as a cache leaves": [0],
    "a look at the first block before": [0, 0, 1, 2, 3],
    "stopped in the middle": [0, 1, 2],
}


@pytest.mark.parametrize("first", PASSES)
@pytest.mark.parametrize("second", PASSES)
def test_each_block_computes_with_its_own_weights(monkeypatch: pytest.MonkeyPatch, first: str, second: str):
    for seed in range(20):
        network = Network(monkeypatch)
        for blocks in (PASSES[first], PASSES[second], PASSES["all"]):
            network.step(blocks)
        network.device.run(random.Random(seed))
        assert not network.wrong


def test_blocks_in_any_order(monkeypatch: pytest.MonkeyPatch):
    for seed in range(20):
        network, order = Network(monkeypatch), random.Random(seed)
        network.step([order.randrange(len(SIZES)) for _ in range(30)])
        network.device.run(order)
        assert not network.wrong


def test_changed_weights_are_fetched_again(network: Network):
    schedule = random.Random(0)
    network.step([0, 1])
    network.device.run(schedule)
    network.change()
    network.passing.forget()
    network.step([0, 1, 2, 3])
    network.device.run(schedule)
    assert not network.wrong


def test_the_check_sees_a_copy_that_does_not_wait(network: Network, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Stream, "wait_stream", lambda self, other: None)
    for seed in range(20):
        network.step([0, 1, 2, 3])
        network.device.run(random.Random(seed))
    assert network.wrong


def test_a_copy_is_asked_for_before_the_block_that_it_is_to_hide_behind(network: Network):
    """Else it could not be made meanwhile."""
    network.step([0])
    network.device.run(random.Random(0))
    network.passing.bring(1)
    copies = network.device.streams[1]
    assert copies.queue, "block 2 has not been asked for"


def test_a_block_that_is_not_on_the_device_is_at_home(network: Network):
    network.step([0, 1, 2])
    network.device.run(random.Random(0))
    at_home = [all(p.data_ptr() in network.homes for p in block) for block in network.blocks]
    assert at_home == [True, True, False, True, False], "block 3 is on the way, what is no block's is on the device"


def test_memory_on_the_device(network: Network):
    assert network.passing.nbytes == 16 * (2 * max(SIZES) + 1)
