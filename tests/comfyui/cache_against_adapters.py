"""Samplings under a cache by the adapters and by ComfyUI's own networks, in one process of ComfyUI's Python."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.attention import kernels
from parallel.cache.blocks import BlockCache, StepPasses, block_cache
from parallel.cache.hooked import cached_blocks
from parallel.degrees import Degrees
from parallel.demo.checkpoint import WRITERS
from parallel.plans.comfyui import CHAINS, plan_of
from parallel.split import SequenceRanks, Split
from parallel.worker.ranks import SoloContext
from parallel.worker.resident import ResidentModel
from tests.comfyui.cached_ranks import CPU, difference, moved, rule

SIZES: dict[str, dict[str, int]] = {
    "wan": {"depth": 3},
    "flux": {"depth": 2, "depth_single": 2},
    "hunyuan_video": {"depth": 2, "depth_single": 2},
}
THRESHOLDS = {"first_block": 0.1, "teacache": 0.04}
AMOUNTS = (0.0, 0.02, 0.04, 0.3, 0.31, 0.33)
"""How far the latent has moved at each step: little, and once a lot."""


def of_adapter(resident: ResidentModel, inputs: dict[str, Tensor], cache: BlockCache | None) -> Tensor:
    """One step."""
    conditioning = dict(inputs)
    x, timestep = conditioning.pop("x"), conditioning.pop("timestep")
    context = SoloContext(kernels.select("auto", CPU))
    if cache is not None:
        cache.begin_step(Degrees(), active=True)
        context.cache = StepPasses(cache, "cond", tuple(x.shape), lambda sums: None)
    out = torch.empty(resident.adapter.output_shape(resident.config, tuple(x.shape)))
    resident.adapter.step(resident.model, x, timestep, resident.adapter.prepare(conditioning), out, context)
    return out


def of_network(network: Any, split: Split, inputs: dict[str, Tensor], cache: BlockCache) -> Tensor:
    """The same by ComfyUI's class."""
    named: dict[str, Any] = dict(inputs)
    x, timestep = named.pop("x"), named.pop("timestep")
    for name in [name for name in named if name.startswith("ref_latents.")]:
        named.setdefault("ref_latents", []).append(named.pop(name))
    cache.begin_step(Degrees(), active=True)
    passes = StepPasses(cache, "cond", tuple(x.shape), lambda sums: None)
    with cached_blocks(network, plan_of(network), CHAINS[type(network).__name__], split, passes):
        result: Tensor = network(x, timestep, transformer_options={}, **named)
    return result


def against_adapters(folder: Path, families: Iterable[str]) -> dict[str, Any]:
    """`{family and cache: {hits of each step by both, largest difference, how much skipping changes}}`, of tiny files
    that are written to `folder`."""
    from parallel.comfyui.network import NetworkFile

    found: dict[str, Any] = {}
    for family in families:
        path = folder / f"{family}.safetensors"
        WRITERS[family](path, **SIZES[family])
        recipe = {"path": str(path), "weight_dtype": "float32", "compute_dtype": "float32"}
        resident = ResidentModel(recipe, CPU, lambda done, total: None)
        network = NetworkFile(str(path), torch.float32, CPU).network()[0]
        split = Split(network, plan_of(network), SequenceRanks((1.0,)))
        first = resident.adapter.example(resident.config, 2, torch.float32)
        for kind, threshold in THRESHOLDS.items():
            caches = [block_cache(rule(threshold, kind), CPU) for _ in range(2)]
            hits, differences, shown = [], [], []
            for amount in AMOUNTS:
                inputs = first | {
                    "x": moved(first["x"], amount),
                    "timestep": first["timestep"] * (1 - amount / 100),
                }
                ours, theirs = of_adapter(resident, inputs, caches[0]), of_network(network, split, inputs, caches[1])
                hits.append([cache.tally.hits for cache in caches])
                differences.append(difference(theirs, ours))
                if hits[-1] == [1, 1]:
                    shown.append(difference(ours, of_adapter(resident, inputs, None)))
            found[f"{family}, {kind}"] = {
                "hits": hits,
                "difference": max(differences),
                "shown": min(shown, default=0.0),
            }
        split.remove()
    return found
