"""One rank of the gradient tests: `python -m tests.distributed.gradient_ranks RANK WORLD STORE RESULTS FOLDER`.

Each case differentiates a whole tiny HunyuanVideo: split over the ranks by `parallelize`, and alone on every rank as
the reference.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.diffusers.folder import transformer_class
from parallel.parallelize import AXES, parallelize
from parallel.split import Split
from tests.distributed.devices import meet
from tests.distributed.tiny_models import HUNYUAN, Inputs, arguments, on

DIFFERENTIATED = ("hidden_states", "encoder_hidden_states", "pooled_projections")
"""Inputs, beside the weights."""


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
    """Relative difference of the gradient of each input and weight, averaged over the ranks, from one rank alone."""


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


def differentiate(model: Any, inputs: Inputs, device: torch.device) -> dict[str, Tensor]:
    """Gradients of a weighted sum of the prediction."""
    given = _given(inputs, device)
    out = model(**given)[0]
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device)
    targets = {name: given[name] for name in DIFFERENTIATED} | dict(model.named_parameters())
    gradients = torch.autograd.grad((out * direction).sum(), list(targets.values()), allow_unused=True)
    return {
        name: torch.zeros_like(target) if gradient is None else gradient
        for (name, target), gradient in zip(targets.items(), gradients, strict=True)
    }


def run_case(case: Case, model: Any, device: torch.device) -> Result:
    expected = differentiate(model, case.inputs, device)
    if case.checkpointed:
        model.enable_gradient_checkpointing()
    split = _split(model, case.weights, case.ring, device)
    gradients = differentiate(model, case.inputs, device)
    split.remove()
    model.disable_gradient_checkpointing()
    largest = max(right.abs().max().item() for right in expected.values())
    errors = {}
    for name, right in expected.items():
        dist.all_reduce(gradients[name])
        averaged = gradients[name] / dist.get_world_size()
        scale = max(right.abs().max().item(), _NOTHING * largest)
        errors[name] = (averaged - right).abs().max().item() / scale
    return Result(case.name, errors)


def activation_peaks(model: Any, device: torch.device) -> tuple[int, int]:
    """Of a forward pass with gradients: split, and alone."""
    split = _split(model, (), 1, device)
    peak = _peak(model, device)
    split.remove()
    return peak, _peak(model, device)


def _peak(model: Any, device: torch.device) -> int:
    given = _given(LARGE, device)
    with Peak(model.parameters()) as peak:
        out = model(**given)[0]
    assert out.requires_grad
    return peak.bytes


def _given(inputs: Inputs, device: torch.device) -> dict[str, Any]:
    given = arguments(on(device, inputs.make()))
    for name in DIFFERENTIATED:
        given[name].requires_grad_()
    return given


def _split(model: Any, weights: tuple[float, ...], ring: int, device: torch.device) -> Split:
    world = dist.get_world_size()
    mesh = init_device_mesh(device.type, (ring, world // ring), mesh_dim_names=AXES)
    return parallelize(model, mesh, weights=weights[:world] or None)


def main(rank: int, world: int, store: str, results: str, folder: str) -> None:
    device = meet(rank, world, store)
    model = transformer_class(HUNYUAN).from_pretrained(folder).to(device)
    cases = [case for case in CASES if case.ring == 1 or device.type == "cpu"]
    answer = {
        "gradients": [asdict(run_case(case, model, device)) for case in cases],
        "peaks": activation_peaks(model, device),
    }
    Path(results).write_text(json.dumps(answer))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
