"""Networks of diffusers' classes in released sizes with random weights, and one rank's share of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.attention.kernels import select
from parallel.degrees import Degrees
from parallel.diffusers.folder import transformer_class
from parallel.plans.diffusers import PLANS
from parallel.split import SequenceRanks, Split
from parallel.split.routes import ThroughTorch
from parallel.wire.control import ControlPage
from parallel.worker.ranks import ParallelContext, Ranks

Named = dict[str, Any]
"""Arguments of `forward`."""
Random = Callable[..., Tensor]
"""Shape → values."""


@dataclass(frozen=True)
class Size:
    """Of one step: the latent's shape, and the text's tokens and width."""

    latent: tuple[int, ...]
    text: int
    width: int = 4096


@dataclass(frozen=True)
class Model:
    """A released model."""

    network: str
    """Its class."""
    title: str
    config: Mapping[str, Any]
    blocks: Mapping[str, tuple[str, int]]
    """List of blocks → the class's argument for its length, and how many blocks the model has."""
    inputs: Callable[[Size, Random], Named]
    size: Size
    toy_size: Size
    toy: Mapping[str, Any] = field(default_factory=dict)
    """Changes of `config` that make it tiny."""

    @property
    def slices(self) -> int:
        """The blocks of all lists are so many equal slices."""
        return min(count for _, count in self.blocks.values())

    def of_slices(self, slices: int) -> dict[str, int]:
        """List → blocks in so many slices."""
        return {name: slices * (count // self.slices) for name, (_, count) in self.blocks.items()}


def _flux(size: Size, random: Random) -> Named:
    batch, channels, height, width = size.latent
    rows, columns = height // 2, width // 2
    return {
        "hidden_states": random(batch, rows * columns, 4 * channels),
        "encoder_hidden_states": random(batch, size.text, size.width),
        "pooled_projections": random(batch, 768),
        "guidance": random(batch).abs(),
        "timestep": random(batch).abs(),
        "img_ids": random(rows * columns, 3).float(),
        "txt_ids": random(size.text, 3).float() * 0,
    }


def _hunyuan_video(size: Size, random: Random) -> Named:
    batch = size.latent[0]
    return {
        "hidden_states": random(*size.latent),
        "encoder_hidden_states": random(batch, size.text, size.width),
        "encoder_attention_mask": torch.ones(batch, size.text, dtype=torch.long, device=random(1).device),
        "pooled_projections": random(batch, 768),
        "guidance": 1000 * random(batch).abs(),
        "timestep": 1000 * random(batch).abs(),
    }


def _wan(size: Size, random: Random) -> Named:
    return {
        "hidden_states": random(*size.latent),
        "encoder_hidden_states": random(size.latent[0], size.text, size.width),
        "timestep": 1000 * random(size.latent[0]).abs(),
    }


_TOY = {"num_attention_heads": 2}
FLUX = Model(
    "FluxTransformer2DModel",
    "FLUX.1, 1024 × 1024",
    {
        "in_channels": 64, "guidance_embeds": True, "joint_attention_dim": 4096, "num_attention_heads": 24,
        "attention_head_dim": 128, "pooled_projection_dim": 768, "axes_dims_rope": (16, 56, 56),
    },
    {"transformer_blocks": ("num_layers", 19), "single_transformer_blocks": ("num_single_layers", 38)},
    _flux,
    Size((1, 16, 128, 128), 512),
    Size((1, 16, 16, 16), 16, 64),
    _TOY | {"joint_attention_dim": 64},
)  # fmt: skip
HUNYUAN_VIDEO = Model(
    "HunyuanVideoTransformer3DModel",
    "HunyuanVideo, 720p, 129 frames",
    {
        "in_channels": 16, "out_channels": 16, "num_attention_heads": 24, "attention_head_dim": 128,
        "num_refiner_layers": 2, "patch_size": 2, "patch_size_t": 1, "guidance_embeds": True, "text_embed_dim": 4096,
        "pooled_projection_dim": 768,
    },
    {"transformer_blocks": ("num_layers", 20), "single_transformer_blocks": ("num_single_layers", 40)},
    _hunyuan_video,
    Size((1, 16, 33, 90, 160), 256),  # 118,800 tokens
    Size((1, 16, 2, 8, 8), 16, 64),
    _TOY | {"text_embed_dim": 64},
)  # fmt: skip
WAN = Model(
    "WanTransformer3DModel",
    "Wan 2.1 14B, 720p, 81 frames",
    {
        "in_channels": 16, "out_channels": 16, "num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824,
        "text_dim": 4096, "freq_dim": 256,
    },
    {"blocks": ("num_layers", 40)},
    _wan,
    Size((1, 16, 21, 90, 160), 512),  # 75,600 tokens
    Size((1, 16, 2, 8, 8), 16, 64),
    _TOY | {"ffn_dim": 256, "text_dim": 64},
)  # fmt: skip


def default_device() -> torch.device:
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def settle(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_on(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Random:
    """N(0, 1), the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator).to(device, dtype)


@torch.no_grad()
def network_of(model: Model, slices: int, device: torch.device, *, toy: bool) -> Any:
    """The class's network with so many slices of its blocks. Its weights are N(0, 0.02), the same each time."""
    from diffusers.models.modeling_utils import no_init_weights

    lengths = {argument: model.of_slices(slices)[name] for name, (argument, _) in model.blocks.items()}
    made = transformer_class(model.network)
    with no_init_weights():  # on the CPU, in memory that is never touched: its buffers are to have values
        network: nn.Module = made(**{**model.config, **(model.toy if toy else {}), **lengths})
    dtype = default_dtype(device)
    for number, (name, parameter) in enumerate(list(network.named_parameters())):
        kept = torch.float32 if _stays_in_fp32(network, name) else dtype
        values = torch.empty(parameter.shape, dtype=kept, device=device)
        values.normal_(0, 0.02, generator=torch.Generator(device).manual_seed(number))
        path, _, leaf = name.rpartition(".")
        network.get_submodule(path)._parameters[leaf] = nn.Parameter(values, requires_grad=False)
    for module in network.modules():
        module._buffers.update({name: b if b is None else b.to(device) for name, b in module._buffers.items()})
    return network.eval()


def _stays_in_fp32(network: nn.Module, name: str) -> bool:
    wanted = getattr(network, "_keep_in_fp32_modules", None) or ()
    return any(part in name.split(".") for part in wanted)


def inputs_of(model: Model, device: torch.device, *, toy: bool) -> Named:
    """Arguments of one step."""
    named = model.inputs(model.toy_size if toy else model.size, random_on(device, default_dtype(device)))
    return {**named, "return_dict": False}


@contextmanager
def split(model: Model, network: nn.Module) -> Iterator[Split]:
    """Inside, the network runs as under its plan in a worker; on one rank at first."""
    made = Split(network, PLANS[model.network], SequenceRanks((1.0,)), ThroughTorch)
    try:
        yield made
    finally:
        made.remove()


@contextmanager
def share(device: torch.device, world_size: int) -> Iterator[Callable[[Split, Callable[[], Any]], None]]:
    """Rank 0 of a Ulysses group of `world_size`, without peers: what runs a step of a split network as that rank."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    control = ControlPage.create()
    control.reset(world_size)
    ranks = Ranks((1.0,) * world_size, device, select("auto", device), alone=True)

    def run(split: Split, step: Callable[[], Any]) -> None:
        mesh = ranks.mesh(Degrees(ulysses=world_size))
        context = ParallelContext(ranks, mesh, control)
        split.ranks = ranks.sequence(mesh, context, "sdpa", world_size)
        step()
        settle(device)
        context.finish()

    try:
        yield run
    finally:
        control.close()
        dist.destroy_process_group()
