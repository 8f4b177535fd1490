"""What a split's hooks cost on the host, per block and rank: `python -m tests.benchmarks.hooks [--comfyui FOLDER]`.

Diffusers' HunyuanVideo, whose attention is torch's, and ComfyUI's FLUX, whose attention has an override; both as deep
as the real ones and with tiny widths. Their blocks are called as always, but do nothing except attend once, so that the
hooks stand out. Two ranks, of which this process is one, and whose exchange is left out: attention is computed from
this rank's tokens. Compared in turn with the same on as many tokens without a split. One thread; medians of its CPU
time, which other processes disturb least.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.attention import between
from parallel.plans import comfyui
from parallel.plans import diffusers as plans_of_diffusers
from parallel.split import Plan, SequenceRanks, Split
from parallel.split.hooks import MakeRoutes
from parallel.split.routes import ThroughOptions, ThroughTorch

ROUNDS = 100


def emptied(blocks: Iterable[nn.Module], stub: Callable[..., Any]) -> None:
    """Replaces what the blocks compute. Their hooks look at the class, and stay as they are."""
    for block in blocks:
        block.forward = stub  # type: ignore[method-assign]


def heads(*streams: Tensor) -> Tensor:
    """q, k or v of these tokens: [1, 2, S, 16]."""
    return streams[0].new_zeros(1, 2, sum(x.shape[1] for x in streams), 16)


def hunyuan_video() -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """The network, the whole input, and one of as many tokens as a rank has."""
    from diffusers import HunyuanVideoTransformer3DModel

    network = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=20,
        num_single_layers=40, num_refiner_layers=1, text_embed_dim=8, pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )  # fmt: skip

    def stub(hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        F.scaled_dot_product_attention(*[heads(hidden_states, encoder_hidden_states)] * 3)
        return hidden_states, encoder_hidden_states

    emptied([*network.transformer_blocks, *network.single_transformer_blocks], stub)
    whole = {
        "hidden_states": torch.randn(1, 4, 1, 4, 8), "timestep": torch.ones(1), "guidance": torch.ones(1),
        "encoder_hidden_states": torch.randn(1, 8, 8), "encoder_attention_mask": torch.ones(1, 8),
        "pooled_projections": torch.randn(1, 8), "return_dict": False,
    }  # fmt: skip
    half = {
        "hidden_states": torch.randn(1, 4, 1, 4, 4), "encoder_hidden_states": torch.randn(1, 4, 8),
        "encoder_attention_mask": torch.ones(1, 4),
    }  # fmt: skip
    return network, whole, half


def flux(folder: Path) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """Likewise."""
    sys.path.insert(0, str(folder))
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    from comfy.ldm.flux.model import Flux
    from comfy.ldm.modules.attention import attention_pytorch
    from comfy.ops import disable_weight_init

    network = Flux(
        dtype=torch.float32, device="cpu", operations=disable_weight_init, in_channels=16, out_channels=16,
        vec_in_dim=8, context_in_dim=8, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=19, depth_single_blocks=38,
        axes_dim=[4, 6, 6], txt_ids_dims=[], theta=10000, qkv_bias=True, guidance_embed=False, patch_size=2,
    )  # fmt: skip

    def double(img: Tensor, txt: Tensor, transformer_options: Any, **_: Any) -> tuple[Tensor, Tensor]:
        x = heads(txt, img)
        attention_pytorch(x, x, x, 2, skip_reshape=True, transformer_options=transformer_options)
        return img, txt

    def single(x: Tensor, transformer_options: Any, **_: Any) -> Tensor:
        q = heads(x)
        attention_pytorch(q, q, q, 2, skip_reshape=True, transformer_options=transformer_options)
        return x

    emptied(network.double_blocks, double)
    emptied(network.single_blocks, single)
    whole = {
        "x": torch.randn(1, 16, 4, 8), "timestep": torch.ones(1), "context": torch.randn(1, 8, 8),
        "y": torch.randn(1, 8), "transformer_options": {},
    }  # fmt: skip
    return network, whole, {"x": torch.randn(1, 16, 4, 4), "context": torch.randn(1, 4, 8)}


def unexchanged(self: object, q: Tensor, k: Tensor, v: Tensor, compute: Callable[..., Tensor], mask: object) -> Tensor:
    """In place of the exchange."""
    return compute(q, k, v)


def seconds(run: Callable[[], object]) -> float:
    began = time.thread_time()
    run()
    return time.thread_time() - began


def measure(
    network: nn.Module, whole: Mapping[str, Any], half: Mapping[str, Any], plan: Plan, routes: MakeRoutes
) -> None:
    network.eval().requires_grad_(False)
    two = SequenceRanks((1.0, 1.0), 0)
    two.gather = lambda x, dim, counts: torch.cat([x] * 2, dim)  # type: ignore[method-assign]
    alone, split, blocks = [], [], 0
    for _ in range(ROUNDS):
        alone.append(seconds(lambda: network(**{**whole, **half})))
        hooks = Split(network, plan, two, routes)
        blocks = len(hooks.blocks)
        network(**whole)  # fills what is kept
        split.append(seconds(lambda: network(**whole)))
        hooks.remove()
    us = 1e6 * (median(split) - median(alone)) / blocks
    print(
        f"{type(network).__name__}, {blocks} blocks: {1e3 * median(alone):.2f} ms for a rank's tokens without a split,"
        f" {1e3 * median(split):.2f} ms with it: hooks {us:.0f} µs a block (torch {torch.__version__})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, help="ComfyUI's folder, to measure its FLUX, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    between.StreamAttention._attend = unexchanged  # type: ignore[assignment]
    between.joint_attention = lambda *_, **__: None  # type: ignore[assignment]
    network, *inputs = hunyuan_video()
    measure(network, *inputs, plans_of_diffusers.PLANS[type(network).__name__], ThroughTorch)
    if options.comfyui is not None:
        network, *inputs = flux(options.comfyui)
        measure(network, *inputs, comfyui.plan_of(network), ThroughOptions)


if __name__ == "__main__":
    with torch.no_grad():
        main()
