"""What a split's hooks cost on the host, per block and rank: `python -m tests.benchmarks.hooks [COMFYUI]`.

Diffusers' HunyuanVideo (two kinds of blocks, joint attention) with tokens and widths so small that Python takes all the
time; two ranks, of which this process is one, and whose exchange is left out: attention is computed from this rank's
tokens. Compared in turn with the same model on one rank, where hooks do nothing but look. One thread; medians.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor

from parallel.attention import between
from parallel.parallelize import PLANS
from parallel.split import SequenceRanks, Split
from parallel.split.routes import ThroughTorch

ROUNDS = 60
LAYERS = 12


def model() -> HunyuanVideoTransformer3DModel:
    return HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=LAYERS,
        num_single_layers=LAYERS, num_refiner_layers=1, text_embed_dim=8, pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    ).eval().requires_grad_(False)  # fmt: skip


def unexchanged(self: object, q: Tensor, k: Tensor, v: Tensor, compute: Callable[..., Tensor], mask: object) -> Tensor:
    """In place of the exchange."""
    return compute(q, k, v)


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    torch.set_num_threads(1)
    between.StreamAttention._attend = unexchanged  # type: ignore[assignment]
    between.joint_attention = lambda *_, **__: None  # type: ignore[assignment]
    network = model()
    whole = {
        "hidden_states": torch.randn(1, 4, 1, 4, 8), "timestep": torch.ones(1), "guidance": torch.ones(1),
        "encoder_hidden_states": torch.randn(1, 8, 8), "encoder_attention_mask": torch.ones(1, 8),
        "pooled_projections": torch.randn(1, 8), "return_dict": False,
    }  # fmt: skip
    half = whole | {"hidden_states": torch.randn(1, 4, 1, 4, 4), "encoder_hidden_states": torch.randn(1, 4, 8),
                    "encoder_attention_mask": torch.ones(1, 4)}  # fmt: skip
    alone, split = [], []
    two = SequenceRanks((1.0, 1.0), 0)
    two.gather = lambda x, dim, counts: torch.cat([x] * 2, dim)  # type: ignore[method-assign]
    for _ in range(ROUNDS):
        alone.append(seconds(lambda: network(**half)))
        hooks = Split(network, PLANS[type(network).__name__], two, ThroughTorch)
        network(**whole)  # fills what is kept
        split.append(seconds(lambda: network(**whole)))
        hooks.remove()
    blocks = 2 * LAYERS
    us = 1e6 * (median(split) - median(alone)) / blocks
    print(
        f"{blocks} blocks: {1e3 * median(alone):.2f} ms of this rank's tokens alone, {1e3 * median(split):.2f} ms split"
    )
    print(f"hooks: {us:.0f} µs a block (torch {torch.__version__})")


if __name__ == "__main__":
    with torch.no_grad():
        main()
