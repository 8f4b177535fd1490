"""Where a network's weights are, on one rank: whose turn it is, what travels, what is put in a weight's place. Results
over several ranks are tested in distributed/ and comfyui/."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from parallel.config import SequenceParallelConfig
from parallel.diffusers.folder import recipe
from parallel.diffusers.tiny import TINY, tiny_request, write_tiny
from parallel.errors import CheckpointError
from parallel.sampling.step_request import StepRequest
from parallel.split import SequenceRanks
from parallel.wire.plain import plain_tensors
from parallel.wire.shared import Segment, TensorRef
from parallel.worker import sharded
from parallel.worker.homes import Home, MakeHome, Order, Replicated, by_block
from parallel.worker.offloaded import Offloaded
from parallel.worker.packed import weights_of
from parallel.worker.sharded import Sharded
from parallel.worker.split_network import SplitNetwork

CPU = torch.device("cpu")


class OneRank:
    """Stands for a process group."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each gathering, which is of one rank."""
    sizes: list[int] = []

    def gather(whole: Tensor, mine: Tensor, group: Any, async_op: bool) -> None:
        sizes.append(len(mine))
        whole.copy_(mine)

    monkeypatch.setattr(sharded.dist, "all_gather_into_tensor", gather)
    return sizes


MAKE: Mapping[str, Callable[[], MakeHome]] = {
    "replicated": lambda: Replicated,
    "sharded": lambda: partial(Sharded, group=OneRank()),  # type: ignore[arg-type]
    "offloaded": lambda: partial(Offloaded, file=Segment.create("weights", 0), rank=0, ranks=1),
}


def linears() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)


def home_of(network: nn.Sequential, make: MakeHome, dtypes: Mapping[str, torch.dtype] | None = None) -> Home:
    """Its last layer belongs to no block."""
    rest, blocks = by_block(weights_of(network, dtypes or {}), list(network)[:-1])
    return make(rest, blocks, CPU, lambda done, total: None)


@pytest.fixture(params=MAKE)
def make(request: pytest.FixtureRequest, gathered: list[int]) -> Iterator[MakeHome]:
    yield MAKE[request.param]()


# --- turns --------------------------------------------------------------------------------------------------------


def test_blocks_that_a_cache_skips_are_not_gathered(monkeypatch: pytest.MonkeyPatch, gathered: list[int]) -> None:
    network, x = linears(), torch.ones(1, 4)
    expected = network(x)
    home = home_of(network, MAKE["sharded"]())
    with home.in_use():
        assert torch.equal(network(x), expected)
    assert len(gathered) == 1 + 2, "what belongs to no block, and each block"
    gathered.clear()
    network[0].register_forward_hook(lambda *_: setattr(home, "skipping", lambda: True))
    monkeypatch.setattr(network[1], "forward", lambda x: x)
    with home.in_use():
        network(x)
    assert len(gathered) == 1 + 1


@pytest.mark.parametrize("network", TINY)
def test_a_block_is_used_in_its_turn_only(tmp_path: Path, gathered: list[int], network: str) -> None:
    """So its weights can be elsewhere at any other time: a shard's are not there then."""
    write_tiny(tmp_path / "tiny", network)
    made = recipe(str(tmp_path / "tiny"), SequenceParallelConfig(devices="cpu")).to_json()
    whole, parts = (SplitNetwork(made, CPU, lambda *_: None, MAKE[kind]()) for kind in ("replicated", "sharded"))
    # On some CPUs a product of one row depends on where in memory the weight begins.
    torch.testing.assert_close(step(parts, tiny_request(network)), step(whole, tiny_request(network)))
    assert len(gathered) >= 1 + 3
    assert all(parameter.is_meta for parameter in parts._network.parameters()), "nothing is left between calls"


@torch.no_grad()
def step(model: SplitNetwork, request: StepRequest) -> Tensor:
    """The prediction of one rank."""
    tensors = {"x": request.x, "timestep": request.timestep, "out": torch.empty_like(request.x)}
    for name, tensor in request.conditioning.items():
        model.put_conditioning(name, tensor)
    x, timestep, out = (TensorRef(name, 0, (), "float32") for name in tensors)
    message = request.message(x, timestep, out, {name: name for name in request.conditioning})
    model.step(message, slice(None), lambda place: tensors[place.segment], SequenceRanks((1.0,)))
    return tensors["out"]


def test_a_shard_that_nobody_has_brought_cannot_be_computed_with(gathered: list[int]) -> None:
    network = linears()
    home_of(network, MAKE["sharded"]())
    with pytest.raises((RuntimeError, NotImplementedError)):
        network(torch.ones(1, 4)).tolist()


def test_the_next_block_is_the_one_that_came_next_last_time() -> None:
    """Lists may take turns; before anything is known it is the next number."""
    order = Order(4)
    assert [order.after(number) for number in (0, 2, 1, 3)] == [1, 3, 2, None]
    order.begin()
    assert [order.after(number) for number in (0, 2, 1, 3)] == [2, 1, 3, None]


# --- weights ------------------------------------------------------------------------------------------------------


def test_a_weight_is_replaced_and_restored_and_the_others_stay(make: MakeHome) -> None:
    network, x = linears(), torch.ones(1, 4)
    original = {name: value.clone() for name, value in network.state_dict().items()}
    home = home_of(network, make)
    for changed in ("0.weight", "2.bias"):  # of a block, and of none
        values = {**original, changed: original[changed] + 1}
        expected = torch.func.functional_call(linears(), values, x)
        home.put(changed, [values[changed]])
        with home.in_use():
            assert torch.equal(network(x), expected)
        home.put(changed, [original[changed]])
        with home.in_use():
            assert torch.equal(network(x), torch.func.functional_call(linears(), original, x))


def test_what_does_not_fit_is_named(make: MakeHome) -> None:
    home = home_of(linears(), make)
    with pytest.raises(CheckpointError, match=r"the network has no weight '3\.weight'"):
        home.put("3.weight", [torch.ones(4, 4)])
    with pytest.raises(CheckpointError, match=r"the weight 0.weight has the shape \[4, 4\], received \[4, 5\]"):
        home.put("0.weight", [torch.ones(4, 5)])


def test_weights_are_kept_in_the_dtype_that_was_asked_for(make: MakeHome) -> None:
    """Also what is put in their place; and a home takes as much memory as that says."""
    network = linears()
    names = list(network.state_dict())
    home = home_of(network, make, dict.fromkeys(names, torch.bfloat16))
    home.put("1.bias", [torch.full((4,), 1 / 3)])
    with home.in_use():
        found = network(torch.ones(1, 4, dtype=torch.bfloat16))
        assert found.dtype == torch.bfloat16
    assert home.nbytes <= sum(parameter.numel() * 2 + 64 for parameter in linears().parameters())


# --- quantised weights --------------------------------------------------------------------------------------------


class Scaled(Tensor):
    """int8 × a scale."""

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> Scaled:
        made: Any = Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=values.device)
        made.values, made.scale = values, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], rest: Any, size: Any, stride: Any) -> Scaled:
        return cls(inner["values"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*tree_map_only(cls, lambda x: x.values * x.scale, args), **(kwargs or {}))


def scaled(value: int, scale: float) -> list[Tensor]:
    """What a weight consists of."""
    return [torch.full((4, 4), value, dtype=torch.int8), torch.tensor(scale)]


def with_scaled(value: int, scale: float) -> nn.Sequential:
    """Layers, the first of which has such a weight."""
    network = linears()
    network[0]._parameters["weight"] = Scaled(*scaled(value, scale))
    return network


def test_a_quantised_weight_keeps_its_class_and_all_it_consists_of(make: MakeHome) -> None:
    x = torch.ones(1, 4)
    network = with_scaled(3, 0.5)
    home = home_of(network, make)
    for put in (None, (5, 0.25)):
        if put is not None:
            home.put("0.weight", scaled(*put))
        with home.in_use():
            assert torch.equal(network(x), with_scaled(*(put or (3, 0.5)))(x))
    home.put("0.weight", plain_tensors(Scaled(*scaled(3, 0.5))))
    with home.in_use():
        assert torch.equal(network(x), with_scaled(3, 0.5)(x))


def test_only_what_is_quantised_likewise_takes_its_place(make: MakeHome) -> None:
    home = home_of(with_scaled(3, 0.5), make)
    with pytest.raises(CheckpointError, match=r"the weight 0.weight is quantised as .*, and is given"):
        home.put("0.weight", [torch.ones(4, 4)])
