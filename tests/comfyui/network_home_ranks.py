"""One rank of the tests of networks' homes, run with ComfyUI's Python as

    python -m tests.comfyui.network_home_ranks RANK WORLD STORE RESULTS COMFYUI FOLDER CASE …

Loads the file of each case into every home, and writes `{case: {home: what came of it}}`.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from parallel.comfyui.start import prepare
from parallel.plans.comfyui import plan_of
from parallel.split import SequenceRanks
from parallel.split.blocks import planned_blocks
from parallel.wire.shared import Segment
from parallel.wire.trees import flatten
from parallel.worker.fp8_linear import quantised as quantised_linear
from parallel.worker.homes import Replicated
from parallel.worker.offloaded import Offloaded
from parallel.worker.sharded import Sharded
from parallel.worker.split_network import SplitNetwork
from tests.comfyui.quantised_networks import quantised

ARGUMENTS = {"cpu": True, "use_pytorch_cross_attention": True}


@dataclass(frozen=True)
class File:
    """What is loaded."""

    case: str
    """Of `split_models.CASES`."""
    form: str = ""
    """In which its layers are quantised, of `quantised_networks.FORMATS`."""
    dtype: torch.dtype = torch.float32
    """Of the file's other tensors."""
    weight_dtype: str | None = None
    """As chosen in the loader."""
    scheme: str | None = None
    """Of FP8 Quantize (SP)."""

    @property
    def fp8(self) -> dict[str, Any] | None:
        return None if self.scheme is None else {"scheme": self.scheme, "skip": []}


def file_of(name: str) -> File:
    """`CASE`, or `CASE; FORMAT`, or `CASE; in DTYPE`, or `CASE; as WEIGHT_DTYPE`, or `CASE; FP8 SCHEME`."""
    case, _, more = name.partition("; ")
    if more.startswith("in "):
        return File(case, dtype=getattr(torch, more[3:]))
    if more.startswith("as "):
        return File(case, weight_dtype=more[3:])
    if more.startswith("FP8 "):
        return File(case, scheme=more[4:])
    return File(case, form=more)


def write(file: File, path: Path) -> None:
    """The file."""
    from tests.comfyui.split_models import CASES, metadata_of, network_of

    case = CASES[file.case]
    network = network_of(case.supported, case.config(4))
    tensors = quantised(network, file.form) if file.form else network.state_dict()
    if file.dtype != torch.float32:
        tensors = {name: tensor.to(file.dtype) for name, tensor in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata_of(case, 4))


def some_weights(network: SplitNetwork, tensors: dict[str, Tensor]) -> list[str]:
    """One of the last block, and one of none, that are not quantised; and of the first block's, the one in the most
    parts."""
    blocks = planned_blocks(network._network, plan_of(network._network))
    plain = {
        id(p): name
        for name, p in network._network.named_parameters()
        if type(p.data) is Tensor and p.ndim and name in tensors
    }
    inside = [[plain[id(p)] for p in block.parameters() if id(p) in plain] for block in blocks]
    rest = [name for name in plain.values() if not any(name in names for names in inside)]
    return [max(names, key=lambda name: tensors[name].numel()) for names in (inside[0], inside[-1], rest)]


class Stopped(Exception):
    """Stands for StepCancelled."""


def empty_file(path: Path) -> Segment:
    """A file that all ranks map, as the host's memory files are."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(descriptor, 64)
    return Segment("weights", descriptor, 64)


def whole_blocks(network: SplitNetwork) -> int:
    """Blocks whose weights are here."""
    blocks = planned_blocks(network._network, plan_of(network._network))
    return sum(all(not parameter.is_meta for parameter in block.parameters()) for block in blocks)


class Run:
    """One network in one home.

    Args:
        case: of `split_models`.
        ranks: that share the sequence.
    """

    def __init__(self, network: SplitNetwork, case: Any, ranks: SequenceRanks):
        self.network = network
        args, named = case.inputs(network._network)
        self._held: dict[str, Tensor] = {}
        tree = {"args": list(args), "named": {**named, "transformer_options": {}}}
        self._arguments = flatten(tree, "", self._held)
        self._ranks = ranks
        self.counts: list[int] = []

    def __call__(self, stop_before: int | None = None) -> Tensor:
        from tests.comfyui.split_models import flat

        self.counts = []

        def enter_block() -> None:
            self.counts.append(whole_blocks(self.network))
            if stop_before is not None and len(self.counts) > stop_before:
                raise Stopped

        self._ranks.enter_block = enter_block
        for name, tensor in self._held.items():  # anew, since a network may work in place
            self.network.put_conditioning(name, tensor)
        return flat(self.network.call("forward", self._arguments, {name: name for name in self._held}, self._ranks))


def told_of(run: Run, expected: list[Tensor], changed: dict[str, Tensor]) -> dict[str, Any]:
    """What a home makes of calls, of replaced weights and of a call that is stopped.

    Args:
        expected: without and with replaced weights.
    """
    told: dict[str, Any] = {"equal": [torch.equal(run(), expected[0]) for _ in range(2)], "counts": run.counts}
    for name, tensor in changed.items():
        run.network.put_weight(name, [tensor])
    dist.barrier()
    told["replaced"] = torch.equal(run(), expected[1])
    run.network.restore_weights(list(changed))
    dist.barrier()
    told["restored"] = torch.equal(run(), expected[0])
    try:
        run(stop_before=1)
    except Stopped:
        told["left"] = whole_blocks(run.network)
    told["after a stop"] = torch.equal(run(), expected[0])
    told["nbytes"] = run.network.nbytes
    return told


def main(rank: int, world: int, store: str, results: str, comfyui: str, folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    prepare(comfyui, ARGUMENTS)
    from tests.comfyui.split_models import CASES, network_of

    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    group = dist.group.WORLD
    assert group is not None
    ranks = SequenceRanks((1,) * world, rank, ulysses=group)
    found: dict[str, Any] = {}
    for name in names:
        file, path = file_of(name), Path(folder) / "network.safetensors"
        case = CASES[file.case]
        if rank == 0:
            write(file, path)
        dist.barrier()
        recipe = {
            "library": "comfyui", "path": str(path), "weight_dtype": file.weight_dtype,
            "network": type(network_of(case.supported, case.config(4))).__name__,
            "options": {"folder": comfyui, "arguments": ARGUMENTS},
        }  # fmt: skip
        homes: dict[str, Any] = {
            "replicate": Replicated,
            "shard": partial(Sharded, group=group),
            "shard ahead": partial(Sharded, group=group, ahead=True),
            "offload": partial(Offloaded, file=empty_file(Path(folder) / f"{name}.copy"), rank=rank, ranks=world),
        }
        expected: list[Tensor] = []
        changed: dict[str, Tensor] = {}
        found[name] = {}
        for mode, home in homes.items():
            network = SplitNetwork(recipe, torch.device("cpu"), lambda done, total: None, home, file.fp8)
            dist.barrier()
            run = Run(network, case, ranks)
            if mode == "replicate":
                tensors = network._file.tensors()
                changed = {weight: 0.5 - tensors[weight] for weight in some_weights(network, tensors)}
                expected = [run()]
                for weight, tensor in changed.items():
                    network.put_weight(weight, [tensor])
                expected.append(run())
                network.restore_weights(list(changed))
            told = told_of(run, expected, changed)
            told["changes"] = not torch.equal(*expected)
            told["blocks"] = len(planned_blocks(network._network, plan_of(network._network)))
            told["fp8"] = network.fp8_report
            found[name][mode] = told
            network.close()
        if file.scheme:
            told, selection = found[name]["replicate"], network._selection
            network = SplitNetwork(recipe, torch.device("cpu"), lambda done, total: None)
            run = Run(network, case, ranks)
            exact = run()
            told["rounding"] = float((expected[0] - exact).norm() / exact.norm())
            told["nbytes without"] = network.nbytes
            tensors = network._file.tensors()
            for weight in selection.weights:
                values, scale = quantised_linear(file.scheme, tensors[weight])
                network.put_weight(weight, [values.float() * scale])
            told["only weights are rounded"] = torch.equal(run(), expected[0])
        dist.barrier()
    Path(results).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
