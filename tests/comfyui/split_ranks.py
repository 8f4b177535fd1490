"""One rank of the tests of the split plans, run with ComfyUI's Python as

    python -m tests.comfyui.split_ranks RANK WORLD STORE RESULTS COMFYUI plain|every|PATTERN

Compares ComfyUI's own networks under their plans with themselves alone, and writes `{case: {split: difference}}`.
PATTERN is a regular expression for names of cases, which run under every split.
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.comfyui.start import prepare
from parallel.plans.comfyui import handed_on, plan_of
from parallel.split import PlanError, SequenceRanks, Split
from parallel.split.handing_on import skippable

SPLITS = ("Ulysses 2", "ring 2", "2 × 2", "3 unequal")


def views(rank: int) -> dict[str, SequenceRanks | None]:
    """This rank's place in each split; None where it has none. All ranks of the world call."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    across = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    three = dist.new_group([0, 1, 2])
    return {
        "Ulysses 2": SequenceRanks((1, 1), rank, ulysses=pairs[0]) if rank < 2 else None,
        "ring 2": SequenceRanks((1, 1), rank - 2, ring=pairs[1], ring_degree=2) if rank >= 2 else None,
        "2 × 2": SequenceRanks((1, 1, 1, 1), rank, ulysses=pairs[rank // 2], ring=across[rank % 2], ring_degree=2),
        "3 unequal": SequenceRanks((4, 2, 1), rank, ulysses=three) if rank < 3 else None,
    }


class Unexchanged(SequenceRanks):
    """Ranks whose attention sees their own keys only: what a plan without routes would give."""

    def attention(self, plan: Any) -> Any:
        return lambda q, k, v, compute, mask: compute(q, k, v)


def difference(found: Tensor, alone: Tensor) -> float:
    """Relative to the largest value; infinite where something is missing."""
    if found.shape != alone.shape or not found.isfinite().all():
        return float("inf")
    return float((found - alone).abs().max() / alone.abs().max())


def compare(network: nn.Module, run: Callable[[], Tensor], ranks: dict[str, SequenceRanks | None]) -> dict[str, float]:
    """Differences on this rank: `one rank` is 0 where all bits are equal, and so is `removed`."""
    alone = run()
    found: dict[str, float] = {}
    for name, view in {"one rank": SequenceRanks((1.0,)), **ranks}.items():
        if view is None:
            continue
        split = Split(network, plan_of(network), view)
        try:
            result = run()
        finally:
            split.remove()
        equal = torch.equal(result, alone)
        found[name] = difference(result, alone) if view.size > 1 else float(not equal)
    found["removed"] = float(not torch.equal(run(), alone))
    return found


def without_exchange(network: nn.Module, run: Callable[[], Tensor], view: SequenceRanks) -> float:
    """How wrong the result is when no rank hears of the others' keys. Both ranks of a pair call."""
    alone = run()
    deaf = Unexchanged(view.weights, view.rank, ulysses=view._ulysses)
    split = Split(network, plan_of(network), deaf)
    try:
        return difference(run(), alone)
    finally:
        split.remove()


def skipping(network: nn.Module, run: Callable[[Any], Tensor], view: SequenceRanks) -> dict[str, float]:
    """Differences where a node skips blocks, the first ones or all of them; of a network that asks for such functions.
    All ranks call."""
    plan, found = plan_of(network), {}
    for which, numbers in {"first skipped": range(1), "all skipped": range(99)}.items():
        places = [(kind, number) for kind in ("double_block", "single_block") for number in numbers]
        called: list[bool] = []
        alone = run({"dit": dict.fromkeys(places, lambda args, extra, called=called: called.append(True) or args)})
        if not called or not (returned := handed_on(type(network).__name__)):
            continue
        split = Split(network, plan, view)
        try:
            with skippable(network, plan, returned, split) as skip:
                found[which] = difference(run({"dit": dict.fromkeys(places, skip)}), alone)
        finally:
            split.remove()
    return found


def renamed_arguments(network: nn.Module) -> Iterator[tuple[str, str]]:
    """Renames each argument that the plan cuts, one at a time; yields its name and what the installation says."""
    plan = plan_of(network)
    for path, site in plan.items():
        module = network.get_submodule(path.partition(".*.")[0])
        target = module[0] if isinstance(module, nn.ModuleList) else module
        target = target.get_submodule(path.partition(".*.")[2])
        parameters = inspect.signature(type(target).forward).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            continue  # takes any name; what the plan does not know is refused when it is given
        for argument in (name for name in site.cut if not name.endswith("?")):
            original, target.__class__ = type(target), _renamed(type(target), argument)
            try:
                Split(network, plan, SequenceRanks((1.0,))).remove()
                yield f"{path}.{argument}", ""
            except PlanError as error:
                yield f"{path}.{argument}", str(error)
            finally:
                target.__class__ = original


def _renamed(kind: Any, argument: str) -> Any:
    """A copy of a class, as a newer version of ComfyUI might have it."""
    signature = inspect.signature(kind.forward)
    parameters = [
        parameter.replace(name=f"new_{parameter.name}") if parameter.name == argument else parameter
        for parameter in signature.parameters.values()
    ]

    def forward(self: Any, *args: Any) -> Any:
        return kind.forward(self, *args)

    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return type(kind.__name__, (kind,), {"forward": forward})


def main(rank: int, world: int, store: str, results: str, comfyui: str, which: str) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    # As on GPUs. The CPU's default adds a boolean mask as 1, where a ring, as torch, leaves the key out.
    prepare(comfyui, {"cpu": True, "use_pytorch_cross_attention": True})
    from tests.comfyui.split_models import CASES, ONE_OF_EACH_CLASS, flat, network_of

    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    ranks = views(rank)
    found: dict[str, Any] = {}
    names = (
        ONE_OF_EACH_CLASS
        if which == "plain"
        else [name for name in CASES if which == "every" or re.search(which, name)]
    )
    for number, name in enumerate(names):
        case = CASES[name]
        for heads in case.heads if which != "plain" else case.heads[number % 2 :][:1]:
            network = network_of(case.supported, case.config(heads))

            def run(
                replaced: Any = None, network: nn.Module = network, inputs: Callable[[Any], Any] = case.inputs
            ) -> Tensor:
                args, named = inputs(network)
                options = {"cond_or_uncond": [0]} | ({} if replaced is None else {"patches_replace": replaced})
                return flat(network(*args, transformer_options=options, **named))

            chosen = ranks
            if which == "plain":  # one split each, in turn, beside the one across both axes
                turn = next(itertools.islice(itertools.cycle(SPLITS), number, None))
                chosen = {split: view for split, view in ranks.items() if split in (turn, "2 × 2")}
            found[f"{name}; {heads} heads"] = told = compare(network, run, chosen)
            routed = any(site.attention for site in plan_of(network).values())
            if routed and name in ONE_OF_EACH_CLASS and (view := ranks["Ulysses 2"]) is not None:
                told["without exchange"] = without_exchange(network, run, view)
            if (view := ranks["2 × 2"]) is not None:
                told |= skipping(network, run, view)
            if rank == 3:
                told["renamed"] = dict(renamed_arguments(network))
    Path(results).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
