"""One rank of the whole prefix's test: `python -m tests.distributed.whole_prefix_ranks RANK WORLD STORE RESULTS`.

A network with the calls of Qwen-Image 2.1: text and reference images, then the image, each of which sees what is
before it; one attention for each. It runs alone, and by that class's plan within all splits of the world.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.attention.kernels import Sdpa
from parallel.degrees import Degrees
from parallel.plans.comfyui import PLANS
from parallel.split import Split
from parallel.wire.control import ControlPage
from parallel.worker.ranks import ParallelContext, Ranks
from tests.distributed.devices import meet

HEADS, WIDTH = 4, 32
CASES: dict[str, tuple[list[int], int]] = {
    "text": ([7], 30),
    "text and references": ([3, 12, 2, 9], 25),
    "a token of text": ([1], 9),
    "less of each than ranks": ([1, 1], 3),
}
"""Lengths of what is before the image (texts and references take turns), and the image's."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def optimized_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **options: Any
) -> Tensor:
    """As ComfyUI's: [B, S, H · D], or [B, H, S, D] with `skip_reshape`."""
    if (override := options.get("transformer_options", {}).pop("optimized_attention_override", None)) is not None:
        return override(optimized_attention, q, k, v, heads, mask=mask, **options)
    if not options.get("skip_reshape"):
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out if options.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(
        self,
        x: Tensor,
        mod: Sequence[float],
        pe: Tensor,
        attn_fn: Any,
        prefix_len: int,
        transformer_options: Any = None,
    ) -> Tensor:
        out = self.out(attn_fn(*self.qkv(x + pe).chunk(3, dim=-1)))
        x[:, :prefix_len].add_(out[:, :prefix_len], alpha=mod[0])
        x[:, prefix_len:].add_(out[:, prefix_len:], alpha=mod[1])
        return x


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(Block() for _ in range(3))
        self.proj_out = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor, pe: Tensor, before: Sequence[int]) -> Tensor:
        ends = [sum(before[: place + 1]) for place in range(len(before))]
        masks = [None if place % 2 else torch.ones(n, end, dtype=torch.bool, device=x.device).tril(end - n)
                 for place, (n, end) in enumerate(zip(before, ends, strict=True))]  # fmt: skip
        segments = [*zip([0, *ends[:-1]], ends, masks, strict=True), (ends[-1], x.shape[1], None)]

        def attn_fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # as there, the options are not the block's
            outs = [
                optimized_attention(q[:, start:end], k[:, :end], v[:, :end], HEADS, mask, transformer_options={})
                for start, end, mask in segments
            ]
            return torch.cat(outs, dim=1)

        for block in self.transformer_blocks:
            x = block(x, (0.5, 1.0), pe, attn_fn, ends[-1], {})
        return self.proj_out(x[:, ends[-1] :])


def main(rank: int, world: int, store: str, results: str) -> None:
    device = meet(rank, world, store, timeout_s=30)
    torch.manual_seed(1)
    network = Network().to(device).requires_grad_(False)
    weights = tuple(1.0 + each for each in range(world))
    ranks = Ranks(weights, device, Sdpa())
    control = ControlPage.create()
    control.reset(world)
    differences = {}
    for case, (before, image) in CASES.items():
        x, pe = torch.randn(2, 2, sum(before) + image, WIDTH, device=device)
        alone = network(x.clone(), pe[:1], before)
        for ring in (degree for degree in range(1, world + 1) if world % degree == 0):
            mesh = ranks.mesh(Degrees(ulysses=world // ring, ring=ring))
            sequence = ranks.sequence(mesh, ParallelContext(ranks, mesh, control), "sdpa", "step")
            split = Split(network, PLANS["QwenImage21Transformer2DModel"], sequence)  # type: ignore[arg-type]
            together = network(x.clone(), pe[:1], before)
            split.remove()
            differences[f"{case}, ring {ring}"] = ((together - alone).abs().amax() / alone.abs().amax()).item()
    Path(results).write_text(json.dumps(differences))
    dist.barrier()  # else a rank may leave while another still reads from it
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5])
