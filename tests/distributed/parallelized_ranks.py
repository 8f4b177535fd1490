"""One rank of the tests of `parallelize`, started as `python -m tests.distributed.parallelized_ranks RANK WORLD STORE
RESULTS`: diffusers' own classes, split over the ranks and alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.parallelize import parallelize


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def hunyuan_video(heads: int, image_condition_type: str | None = "token_replace") -> nn.Module:
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=heads, attention_head_dim=16, num_layers=2,
        num_single_layers=2, num_refiner_layers=1, text_embed_dim=24, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
        guidance_embeds=True, image_condition_type=image_condition_type,
    )  # fmt: skip


def hunyuan_video_of_text(heads: int) -> nn.Module:
    """Its blocks are of other classes: what the others take, these swallow as `*args`."""
    return hunyuan_video(heads, None)


def flux(heads: int) -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=heads,
        joint_attention_dim=24, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def wan(heads: int) -> nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=24, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=64,
    )  # fmt: skip


def cogvideox(heads: int) -> nn.Module:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=24, num_layers=2, sample_width=10, sample_height=6, sample_frames=9, max_text_seq_length=5,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip


def hunyuan_video_inputs(valid: int = 7, batch: int = 1) -> dict[str, Tensor]:
    mask = (torch.arange(7)[None] < valid).long().expand(batch, 7)
    return {
        "hidden_states": random(batch, 4, 3, 6, 10),
        "timestep": torch.full((batch,), 600.0),
        "encoder_hidden_states": random(batch, 7, 24),
        "encoder_attention_mask": mask,
        "pooled_projections": random(batch, 8),
        "guidance": torch.full((batch,), 6000.0),
    }


def flux_inputs(text: int = 5, batch: int = 1, control_width: int = 0) -> dict[str, Any]:
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(5.0), torch.arange(7.0))
    more: dict[str, Any] = {}
    if control_width:
        more["controlnet_block_samples"] = [random(batch, 35, control_width, seed=2)]
    return {
        "hidden_states": random(batch, 35, 8),
        "encoder_hidden_states": random(batch, text, 24),
        "pooled_projections": random(batch, 8),
        "timestep": torch.full((batch,), 0.6),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.full((batch,), 3.5),
        **more,
    }


def wan_inputs(per_token: bool = False, batch: int = 1) -> dict[str, Tensor]:
    timestep = torch.full((batch,), 600.0)
    if per_token:
        timestep = torch.tensor([0.0] * 15 + [600.0] * 30).expand(batch, 45)
    return {
        "hidden_states": random(batch, 4, 3, 6, 10),
        "timestep": timestep,
        "encoder_hidden_states": random(batch, 5, 24),
    }


def cogvideox_inputs(batch: int = 1) -> dict[str, Any]:
    positions = random(45, 16)
    return {
        "hidden_states": random(batch, 3, 4, 6, 10),
        "encoder_hidden_states": random(batch, 5, 24),
        "timestep": torch.full((batch,), 600.0),
        "image_rotary_emb": (positions.cos(), positions.sin()),
    }


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[int], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    """For this number of heads."""


CASES = [
    Case("HunyuanVideo", hunyuan_video, lambda _: hunyuan_video_inputs()),
    Case("HunyuanVideo, 3 of 7 texts padded, batch 2", hunyuan_video, lambda _: hunyuan_video_inputs(4, 2)),
    Case("HunyuanVideo, 1 text token", hunyuan_video, lambda _: hunyuan_video_inputs(1)),
    Case("HunyuanVideo without token_replace", hunyuan_video_of_text, lambda _: hunyuan_video_inputs()),
    Case("FLUX", flux, lambda _: flux_inputs()),
    Case("FLUX, 2 text tokens, batch 2", flux, lambda _: flux_inputs(2, 2)),
    Case("FLUX, residuals of a ControlNet", flux, lambda heads: flux_inputs(control_width=16 * heads)),
    Case("Wan", wan, lambda _: wan_inputs()),
    Case("Wan, a timestep per token, batch 2", wan, lambda _: wan_inputs(True, 2)),
    Case("CogVideoX", cogvideox, lambda _: cogvideox_inputs()),
    Case("CogVideoX, batch 2", cogvideox, lambda _: cogvideox_inputs(2)),
]
"""45 or 35 video tokens: no number of ranks here divides both."""


def meshes(world: int) -> list[tuple[str, DeviceMesh, list[float] | None]]:
    """Description, mesh, weights."""
    found: list[tuple[str, DeviceMesh, list[float] | None]] = [
        ("ulysses", init_device_mesh("cpu", (world,)), None),
        ("ulysses, unequal", init_device_mesh("cpu", (world,)), [3.0, *[1.0] * (world - 1)]),
        ("ring", init_device_mesh("cpu", (world,), mesh_dim_names=("ring",)), None),
    ]
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
        found.append(("ring × ulysses, unequal", mesh, [2.0, 1.0, 1.0, 1.0]))
    return found


def made(case: Case, heads: int) -> nn.Module:
    torch.manual_seed(0)
    model = case.make(heads).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(random(*parameter.shape) * (0.3 if parameter.ndim > 1 else 1.0))
    return model


def difference(a: Tensor, b: Tensor) -> float:
    """Relative."""
    return float((a - b).abs().max() / b.abs().max())


def gradients(model: nn.Module, inputs: dict[str, Any], target: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(**inputs, return_dict=False)[0]
    (out - target).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(case: Case, mesh: DeviceMesh, weights: list[float] | None, heads: int) -> dict[str, float]:
    """The largest differences of the result, of the gradients averaged over the ranks, and after `remove`."""
    model, inputs = made(case, heads), case.inputs(heads)
    with torch.no_grad():
        alone = model(**inputs, return_dict=False)[0]
    target = random(*alone.shape, seed=9)
    expected = gradients(model, inputs, target)
    split = parallelize(model, mesh, weights=weights)
    with torch.no_grad():
        found = {"result": difference(model(**inputs, return_dict=False)[0], alone)}
    averaged = gradients(model, inputs, target)
    found["gradients"] = float("inf")
    if averaged.keys() == expected.keys():
        flat = torch.cat([gradient.flatten() for gradient in averaged.values()])
        dist.all_reduce(flat)
        reference = torch.cat([expected[name].flatten() for name in averaged])
        found["gradients"] = difference(flat / dist.get_world_size(), reference)
    split.remove()
    with torch.no_grad():
        found["removed"] = difference(model(**inputs, return_dict=False)[0], alone)
    return found


def main(rank: int, world: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    found = {
        f"{case.name}; {heads} heads; {how}": compare(case, mesh, weights, heads)
        for how, mesh, weights in meshes(world)
        for case in CASES
        for heads in (3, 4)
    }
    Path(results).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
