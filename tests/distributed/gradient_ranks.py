"""One rank of the gradient tests, started as `python -m tests.distributed.gradient_ranks RANK WORLD STORE RESULTS`.

Each case differentiates a whole tiny HunyuanVideo: split over the ranks, and alone on every rank as the reference.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from parallel.adapters import two_stream
from parallel.adapters.base import StepContext
from parallel.attention.kernels import Sdpa
from parallel.degrees import Degrees
from parallel.mesh import Mesh
from parallel.wire.control import ControlPage
from parallel.worker.ranks import ParallelContext, Ranks, SoloContext
from parallel.worker.resident import ResidentModel
from tests.distributed.devices import meet
from tests.distributed.tiny_models import Inputs, on


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    inputs: Inputs
    ring: int = 1
    weights: tuple[float, ...] = ()
    """One per rank; empty means equal."""
    checkpointed: bool = False
    """Activations of the blocks are computed again in the backward pass."""


CASES = [
    Case(name="ulysses", inputs=Inputs(valid=(5,))),
    Case(name="ulysses, odd tokens", inputs=Inputs(frames=3, height=10, width=6, text=7, valid=(5,))),
    Case(name="ulysses, checkpointed", inputs=Inputs(valid=(5,)), checkpointed=True),
    Case(name="ring or hybrid", inputs=Inputs(frames=3, height=10, width=6, valid=(7,)), ring=2),
    Case(name="ring or hybrid, checkpointed", inputs=Inputs(valid=(7,)), ring=2, checkpointed=True),
    Case(name="unequal speeds", inputs=Inputs(frames=3, height=6), weights=(3.0, 1.0, 1.0, 2.0)),
    Case(name="two samples", inputs=Inputs(batch=2, valid=(5, 8))),
]
LARGE = Inputs(frames=8, height=32, width=32, text=32)
"""2048 + 32 tokens, so that activations outweigh what does not depend on tokens."""


_NOTHING = 1e-3
"""Below this part of the largest gradient, one is nothing but rounding (a bias of keys, which softmax cancels)."""


@dataclass(frozen=True)
class Result:
    case: str
    errors: dict[str, float]
    """Relative difference of the gradient of each input and weight, summed over the ranks, from one rank alone."""


class Peak(TorchDispatchMode):
    """Bytes of tensors made inside that were alive at the same time, at most.

    Args:
        weights: what does not count, also when it is seen through a view.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.bytes = self._now = 0
        self._sizes = {weight.untyped_storage().data_ptr(): 0 for weight in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage.data_ptr()
        if not key or key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self._now += storage.nbytes()
        self.bytes = max(self.bytes, self._now)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


def differentiate(model: ResidentModel, inputs: Inputs, context: StepContext) -> dict[str, Tensor]:
    """Gradients of a weighted sum of this rank's part of the prediction."""
    leaves = _leaves(model, inputs)
    out = _forward(model, leaves, inputs, context)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device)
    targets = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad} | dict(model.model.named_parameters())
    gradients = torch.autograd.grad((out * direction).sum(), list(targets.values()), allow_unused=True)
    return {
        name: torch.zeros_like(target) if gradient is None else gradient
        for (name, target), gradient in zip(targets.items(), gradients, strict=True)
    }


def _leaves(model: ResidentModel, inputs: Inputs) -> dict[str, Tensor]:
    x, timestep, conditioning = on(model.device, inputs)
    leaves = {"x": x, **conditioning}
    for name in ("x", "context", "y"):
        leaves[name].requires_grad_()
    return {**leaves, "timestep": timestep}


def _forward(model: ResidentModel, leaves: dict[str, Tensor], inputs: Inputs, context: StepContext) -> Tensor:
    conditioning = {name: tensor for name, tensor in leaves.items() if name not in ("x", "timestep")}
    out = torch.zeros_like(leaves["x"])
    prepared = model.adapter.prepare(conditioning)
    model.adapter.step(model.model, leaves["x"], leaves["timestep"], prepared, out, context)
    return out


def run_case(case: Case, model: ResidentModel, rank: int, world: int) -> Result:
    context = _context(case.weights[:world] or (1.0,) * world, case.ring, model.device)
    with pytest.MonkeyPatch.context() as patch:
        if case.checkpointed:
            for name in ("_dual_stream_block", "_single_stream_block"):
                block = partial(checkpoint, getattr(two_stream, name), use_reentrant=False)
                patch.setattr(two_stream, name, block)
        gradients = differentiate(model, case.inputs, context)
    for gradient in gradients.values():
        dist.all_reduce(gradient)
    expected = differentiate(model, case.inputs, SoloContext(Sdpa()))
    largest = max(right.abs().max().item() for right in expected.values())
    errors = {}
    for name, right in expected.items():
        scale = max(right.abs().max().item(), _NOTHING * largest)
        errors[name] = (gradients[name] - right).abs().max().item() / scale
    return Result(case.name, errors)


def activation_peaks(model: ResidentModel, world: int) -> tuple[int, int]:
    """Of a forward pass with gradients: split, and alone."""
    peaks = []
    for context in (_context((1.0,) * world, 1, model.device), SoloContext(Sdpa())):
        leaves = _leaves(model, LARGE)
        with Peak(model.model.parameters()) as peak:
            out = _forward(model, leaves, LARGE, context)
        assert out.requires_grad
        peaks.append(peak.bytes)
        del out
    return peaks[0], peaks[1]


def _context(weights: tuple[float, ...], ring: int, device: torch.device) -> ParallelContext:
    degrees = Degrees(ring=ring, ulysses=len(weights) // ring)
    ranks = Ranks(weights, device, Sdpa())
    control = ControlPage.create()
    control.reset(len(weights))
    return ParallelContext(ranks, Mesh.build(degrees), control)


def main(rank: int, world: int, store: str, results: str, checkpoint_path: str) -> None:
    device = meet(rank, world, store)
    recipe = {"path": checkpoint_path, "weight_dtype": "float32", "compute_dtype": "float32"}
    model = ResidentModel(recipe, device, lambda done, total: None)
    model.model.requires_grad_(True)
    answer = {
        "gradients": [
            asdict(run_case(case, model, rank, world)) for case in CASES if case.ring == 1 or device.type == "cpu"
        ],
        "peaks": activation_peaks(model, world),
    }
    Path(results).write_text(json.dumps(answer))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
