"""One rank of the tests of compiled blocks of ComfyUI's own networks, run with ComfyUI's Python as

    python -m tests.comfyui.compiled_ranks RANK WORLD STORE RESULTS COMFYUI BACKEND CASE …

Runs four steps of each case uncompiled and compiled, with other timesteps at each step, and writes what was compiled.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import tests.comfyui  # noqa: F401  # before ComfyUI's folder, which has a package of that name, is on the path
from parallel.comfyui.start import prepare
from parallel.compilation.modules import CompiledModules
from parallel.compilation.settings import CompileSettings
from parallel.plans.comfyui import plan_of
from parallel.split import SequenceRanks, Split

STEPS = 4

_torch_compile = torch.compile


def _trace(backend: str, function: Callable[..., Any], *, fullgraph: bool, dynamic: bool, options: Any) -> Any:
    """Traces and guards as ever, but generates no code."""
    return _torch_compile(function, fullgraph=fullgraph, dynamic=dynamic, backend=backend)


def scaled(value: Any, factor: float) -> Any:
    """Timesteps of another step."""
    return type(value)(scaled(item, factor) for item in value) if isinstance(value, list | tuple) else value * factor


def main(rank: int, world: int, store: str, results: str, comfyui: str, backend: str, *names: str) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    logging.basicConfig(level=logging.WARNING)
    prepare(comfyui, {"cpu": True})
    from tests.comfyui.split_models import CASES, flat, network_of

    if backend != "inductor":
        torch.compile = partial(_trace, backend)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    found: dict[str, Any] = {}
    for name in names:
        case = CASES[name]
        began = time.process_time()
        network = network_of(case.supported, case.config(4))
        (x, timestep, *rest), named = case.inputs(network)
        ranks = SequenceRanks((2.0, 1.0)[:world], rank, ulysses=dist.group.WORLD if world > 1 else None)
        split = Split(network, plan_of(network), ranks)
        compiler = CompiledModules(CompileSettings(), lambda: None, torch.device("cpu"))

        def step(number: int) -> Tensor:
            options = {"sigmas": torch.tensor([1 - number / 10]), "cond_or_uncond": [0, 1][: 1 + number % 2]}
            t = scaled(timestep, 1 - number / 10)  # noqa: B023
            return flat(network(x, t, *rest, transformer_options=options, **named))  # noqa: B023

        steps = []
        for number in range(STEPS):
            expected = step(number)
            with compiler.on(split.blocks):
                result = step(number)
            difference = float((result - expected).abs().max() / expected.abs().max())
            steps.append({"difference": difference, **asdict(compiler.take_tally())})
        split.remove()
        left = [name for name, module in network.named_modules() if "forward" in vars(module)]
        found[name] = {"steps": steps, "left": left}
        print(name, [(s["graphs"], s["recompilations"], s["breaks"], f"{s['difference']:.0e}") for s in steps],
              steps[-1]["kinds"], steps[-1]["failure"], f"{time.process_time() - began:.1f} s", flush=True)  # fmt: skip
        torch.compiler.reset()
    Path(results).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
