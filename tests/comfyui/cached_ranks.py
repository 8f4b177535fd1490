"""One rank of the tests of caches between the blocks of ComfyUI's own networks, run with ComfyUI's Python as

    python -m tests.comfyui.cached_ranks RANK WORLD STORE RESULTS COMFYUI plain|every|PATTERN

PATTERN is a regular expression for names of cases, which run under every split. Of classes without a chain none runs.
Runs each network for some steps under a cache, alone and split, and writes `{case: {split: facts}}`, see `facts`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.cache.blocks import BlockCache, StepPasses, block_cache
from parallel.cache.hooked import cached_blocks
from parallel.comfyui.start import prepare
from parallel.degrees import Degrees
from parallel.plans.comfyui import CHAINS, plan_of
from parallel.split import SequenceRanks, Split

CPU = torch.device("cpu")
NEVER, ALWAYS = 0.0, 1e9
PLAIN = ("FLUX, ControlNet", "LTX-2.3")
STRADDLING = ("LTX-2.3", "Wan")
"""Cases in which the ranks of a sequence would decide differently."""

Step = Callable[[StepPasses | None], Tensor]
"""Runs the network once."""
Total = Callable[[Tensor], None]


def rule(threshold: float, kind: str = "first_block") -> dict[str, Any]:
    more = {"most_in_a_row": 0} if kind == "first_block" else {"coefficients": [1.0, 0.0]}
    return {"kind": kind, "threshold": threshold, **more}


def moved(value: Any, amount: float, only_second_half: bool = False) -> Any:
    """A latent some way on, or one of several parts."""
    if isinstance(value, list):
        return [moved(part, amount, only_second_half) for part in value]
    away = torch.randn(value.shape, generator=torch.Generator().manual_seed(7))
    if only_second_half:
        away[:, :, : value.shape[2] // 2] = 0
    return value + amount * away


class Steps:
    """The steps of one sampling of a network, each with another latent."""

    def __init__(self, network: nn.Module, inputs: Callable[[Any], Any], split: Split | None, total: Total):
        self._network, self._inputs, self._split, self._total = network, inputs, split, total

    def run(self, amount: float, cache: BlockCache | None = None, **options: Any) -> Tensor:
        """One step; `cache` may skip its blocks."""
        from tests.comfyui.split_models import flat

        args, named = self._inputs(self._network)
        args = (moved(args[0], amount, **options), *args[1:])
        if cache is None:
            return flat(self._network(*args, transformer_options={}, **named))
        assert self._split is not None
        cache.begin_step(Degrees(), active=True)
        passes = StepPasses(cache, "cond", (), self._total)
        chain = CHAINS[type(self._network).__name__]
        with cached_blocks(self._network, plan_of(self._network), chain, self._split, passes):
            return flat(self._network(*args, transformer_options={}, **named))


@contextmanager
def watched(network: nn.Module, kind: str, replace: list[Tensor] | None = None) -> Iterator[dict[str, list[Tensor]]]:
    """The hidden states from which on a cache may skip blocks, and where they leave; there they are replaced by the sum
    of the former and of `replace`. With plain hooks, and every block runs."""
    chain = CHAINS[type(network).__name__]
    seen: dict[str, list[Tensor]] = {}
    lists = [list(network.get_submodule(path).children()) for path in chain.blocks]
    returned = [names.split() for names, blocks in zip(chain.blocks.values(), lists, strict=True) if blocks]
    blocks = [block for blocks in lists for block in blocks]

    def parts(value: Any) -> list[Tensor]:
        return [value] if isinstance(value, Tensor) else list(value)

    def first(module: nn.Module, args: Any, result: Any) -> None:
        value = result if len(returned[0]) == 1 else result[returned[0].index(chain.hidden)]
        seen["first"] = [x.clone() for x in parts(value)]

    def before_first(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        value = kwargs[chain.hidden] if chain.hidden in kwargs else args[0]
        seen["first"] = [x.clone() for x in parts(value)]

    def leaving(value: Any) -> None:
        dim = 0 if value_has_no_batch(network) else 1
        last = [
            x.narrow(dim, x.shape[dim] - y.shape[dim], y.shape[dim])
            for x, y in zip(parts(value), seen["first"], strict=True)
        ]
        seen["last"] = [x.clone() for x in last]
        if replace is not None:
            for x, y, change in zip(last, seen["first"], replace, strict=True):
                x.copy_(y + change)

    def last(module: nn.Module, args: Any, result: Any) -> None:
        names = returned[-1]
        leaving(result if len(names) == 1 else result[names.index(chain.hidden)])

    def before_exit(module: nn.Module, args: Any) -> None:
        leaving(args[0])

    if kind == "teacache":
        handles = [blocks[0].register_forward_pre_hook(before_first, with_kwargs=True)]
    else:
        handles = [blocks[0].register_forward_hook(first)]
    if chain.leave:
        handles.append(network.get_submodule(chain.leave.rpartition(".")[0]).register_forward_pre_hook(before_exit))
    else:
        handles.append(blocks[-1].register_forward_hook(last))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def value_has_no_batch(network: nn.Module) -> bool:
    return type(network).__name__ == "MiniMaxH3Model"


def expected(steps: Steps, network: nn.Module, kind: str, amounts: Sequence[float]) -> tuple[list[Tensor], Tensor]:
    """Results when all steps but the first skip what a cache may skip, by one rank without a cache; and the last one's
    when nothing is added for the skipped blocks."""
    with watched(network, kind) as seen:
        results = [steps.run(amounts[0])]
    change = [a - b for a, b in zip(seen["last"], seen["first"], strict=True)]
    for amount in amounts[1:]:
        with watched(network, kind, change):
            results.append(steps.run(amount))
    with watched(network, kind, [torch.zeros_like(x) for x in change]):
        nothing = steps.run(amounts[-1])
    return results, nothing


@contextmanager
def counted(network: nn.Module) -> Iterator[list[int]]:
    """How often a block of the chain has computed."""
    chain, runs = CHAINS[type(network).__name__], [0]

    def add(module: nn.Module, args: Any) -> None:
        runs[0] += 1

    handles = []
    for path in [*chain.blocks, *chain.beside]:
        for block in network.get_submodule(path).children():
            last = [module for module in block.modules() if isinstance(module, nn.Linear)][-1]
            handles.append(last.register_forward_pre_hook(add))
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


def difference(found: Tensor, reference: Tensor) -> float:
    if found.shape != reference.shape or not found.isfinite().all():
        return float("inf")
    return float((found - reference).abs().max() / reference.abs().max())


def facts(
    network: nn.Module, inputs: Callable[[Any], Any], view: SequenceRanks, total: Total, kind: str = "first_block"
) -> dict[str, Any]:
    """What a cache does in a network split so:

    `zero`: whether a threshold of 0 changes a bit of a step under the same split.
    `skipped`: difference from `expected`, the largest of the steps.
    `hits`, `blocks`: of these steps, and blocks computed in each.
    `shown`: how much skipping changes, and how much what is added changes: the least.
    `left`: names of modules that have another forward than before.
    """
    amounts = (0.0, 0.03, 0.06)
    alone = Steps(network, inputs, None, total)
    references, nothing = expected(alone, network, kind, amounts)
    computed = alone.run(amounts[-1])
    split = Split(network, plan_of(network), view)
    try:
        steps = Steps(network, inputs, split, total)
        never, always = block_cache(rule(NEVER, kind), CPU), block_cache(rule(ALWAYS, kind), CPU)
        plain = [steps.run(amount) for amount in amounts[:2]]
        zero = all(torch.equal(steps.run(a, never), b) for a, b in zip(amounts[:2], plain, strict=True))
        results, hits, blocks = [], [], []
        for amount in amounts:
            with counted(network) as runs:
                results.append(steps.run(amount, always))
            hits.append(always.tally.hits)
            blocks.append(runs[0])
        after = steps.run(amounts[0])
    finally:
        split.remove()
    return {
        "zero": zero and never.tally.passes == 1 and never.tally.hits == 0,
        "skipped": max(difference(a, b) for a, b in zip(results, references, strict=True)),
        "hits": hits,
        "blocks": blocks,
        "shown": min(difference(references[-1], computed), difference(references[-1], nothing)),
        "left": [name for name, module in network.named_modules() if "forward" in module.__dict__],
        "after": torch.equal(after, plain[0]),
    }


def straddling(
    network: nn.Module, inputs: Callable[[Any], Any], view: SequenceRanks, total: Total
) -> dict[str, list[int]]:
    """Hits of a step whose latent has changed for one rank's tokens only, with thresholds on both sides of what all
    tokens have changed by, and between that and what some rank's own have."""
    sums: list[Tensor] = []

    def recorded(of_rank: Tensor) -> None:
        sums.append(of_rank.clone())
        total(of_rank)
        sums.append(of_rank.clone())

    split = Split(network, plan_of(network), view)
    try:
        steps = Steps(network, inputs, split, recorded)

        def second(threshold: float) -> int:
            cache = block_cache(rule(threshold), CPU)
            steps.run(0.0, cache)
            steps.run(0.5, cache, only_second_half=True)
            return cache.tally.hits

        second(ALWAYS)
        of_rank, of_all = (float((changes / sizes).max()) for changes, sizes in sums)
        others: list[Any] = [None] * view.size
        dist.all_gather_object(others, of_rank)
        low, high = (of_all + min(others)) / 2, (of_all + max(others)) / 2
        return {"apart": [int(min(others) < low < of_all < high < max(others))], "hits": [second(low), second(high)]}
    finally:
        split.remove()


def sequence_total(sums: Tensor) -> None:
    dist.all_reduce(sums)


def main(rank: int, world: int, store: str, results: str, comfyui: str, which: str) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    prepare(comfyui, {"cpu": True, "use_pytorch_cross_attention": True})
    from tests.comfyui.split_models import CASES, network_of

    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    pair = dist.new_group(list(range(world)))
    views = {"Ulysses": SequenceRanks((2.0, 1.0), rank, ulysses=pair)}
    if which != "plain":
        views |= {"ring": SequenceRanks((1.0, 1.0), rank, ring=pair, ring_degree=2)}
        views |= {"phantoms": SequenceRanks((60.0, 1.0), rank, ulysses=pair)}
    found: dict[str, Any] = {}
    chosen = [name for name in CASES if which == "every" or re.search(which, name)]
    for name in PLAIN if which == "plain" else chosen:
        case = CASES[name]
        network = network_of(case.supported, case.config(case.heads[0]))
        if type(network).__name__ not in CHAINS:
            continue
        kinds = ["first_block", "teacache"] if CHAINS[type(network).__name__].modulated else ["first_block"]
        for kind in kinds:
            told = found[f"{name}, {kind}"] = {
                split: facts(network, case.inputs, view, sequence_total, kind) for split, view in views.items()
            }
            if which != "plain":
                told["one rank"] = facts(network, case.inputs, SequenceRanks((1.0,)), lambda sums: None, kind)
        if name in STRADDLING:
            found[f"{name}, unequal change"] = straddling(network, case.inputs, views["Ulysses"], sequence_total)
    Path(results).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
