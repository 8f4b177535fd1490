"""Memory of two workers that hold a network of about 165 MB, and what `auto` decides; run with ComfyUI's Python as

    python -m tests.comfyui.network_memory COMFYUI FOLDER

Prints one line of JSON: {"whole": bytes of the file; mode: {"nbytes", "reason", "loading" and "rest": bytes of each
worker's own memory, at most while loading and between calls, "copies": of memory files of weights, "left": of these
after unloading}; "auto": {case: reason or message}}.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import tests.distributed.process_facts as facts  # before ComfyUI, which has a package of tests, too
from parallel.comfyui.start import prepare
from parallel.config import SequenceParallelConfig
from parallel.errors import ConfigError
from parallel.host.recipe import Recipe
from parallel.host.remote_model import RemoteModel
from parallel.wire.messages import FreeMemory
from parallel.worker.free_memory import host_memory

ARGUMENTS = {"cpu": True}
BLOCKS = {"small.safetensors": 2, "large.safetensors": 12}


def main(comfyui: str, folder: Path) -> None:
    torch.set_grad_enabled(False)
    prepare(comfyui, ARGUMENTS)
    from tests.comfyui.split_models import CASES, krea2, network_of

    for name, layers in BLOCKS.items():
        network = network_of("Krea2", krea2(4) | {"layers": layers})
        save_file({key: value.contiguous() for key, value in network.state_dict().items()}, folder / name)
    args, named = CASES["Krea 2"].inputs(network)
    whole = (folder / "large.safetensors").stat().st_size

    def remote(weights: str, name: str = "large.safetensors", **changes: Any) -> RemoteModel:
        size = (folder / name).stat().st_size
        recipe = Recipe(
            library="comfyui", path=str(folder / name), weight_dtype=None, network="SingleStreamDiT",
            config=SequenceParallelConfig(devices="cpu,cpu", weights=weights), nbytes=size, in_the_file=size, heads=4,
            arguments={}, channels=16, linear=(), options={"folder": comfyui, "arguments": ARGUMENTS},
        )  # fmt: skip
        return RemoteModel(replace(recipe, **changes))

    def call(model: RemoteModel) -> None:
        model.call("forward", args, {**named, "transformer_options": {}})

    told: dict[str, Any] = {"whole": whole, "auto": {}}
    for weights in ("replicate", "shard", "offload"):  # what comes later is weights only
        model = remote(weights, "small.safetensors")
        model.weights.ensure_loaded()
        call(model)
        model.weights.unload()
    group = model_group(remote("replicate", "small.safetensors"))
    for weights in ("replicate", "shard", "offload"):
        group.call(FreeMemory())
        before = facts.weight_copies(group.pids)
        model = remote(weights)
        with facts.MemoryPeaks(group.pids) as loading:
            nbytes = model.weights.ensure_loaded()
        call(model)
        at_rest = {pid: facts.memory(pid, "Anon") for pid in group.pids}
        held = facts.weight_copies(group.pids) - before
        assert model.weights.placement is not None
        reason = model.weights.placement.reason
        model.weights.unload()
        told[weights] = {
            "nbytes": nbytes,
            "reason": reason,
            "loading": [loading.peak[pid] - loading.before[pid] for pid in group.pids],
            "rest": [at_rest[pid] - facts.memory(pid, "Anon") for pid in group.pids],
            "copies": held,
            "left": facts.weight_copies(group.pids) - before,
        }
    much = int(0.7 * host_memory().free)
    for case, changes in {
        "mapped": {},
        "cast": {"nbytes": much, "in_the_file": 0},
        "too large": {"nbytes": 2**50, "in_the_file": 0},
    }.items():
        model = remote("auto", "small.safetensors", **changes)
        try:
            model.weights.ensure_loaded()
            assert model.weights.placement is not None
            told["auto"][case] = f"{model.weights.placement.mode}: {model.weights.placement.reason}"
            model.weights.unload()
        except ConfigError as error:
            told["auto"][case] = str(error)
    print(json.dumps(told))


def model_group(model: RemoteModel) -> Any:
    """The workers of a network."""
    model.weights.ensure_loaded()
    group = model.weights.group
    model.weights.unload()
    assert group is not None
    return group


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
