"""Tiny random transformers of diffusers, in its own folders, and inputs for them: for the demo and the tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..sampling.step_request import StepRequest
from .folder import transformer_class
from .request import request

TEXT_WIDTH = 64
HEAD_DIM = 128
_POOLED = 768

_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "HunyuanVideoTransformer3DModel": {
        "in_channels": 16,
        "out_channels": 16,
        "attention_head_dim": HEAD_DIM,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 2,
        "text_embed_dim": TEXT_WIDTH,
        "pooled_projection_dim": _POOLED,
    },
    "FluxTransformer2DModel": {
        "in_channels": 64,
        "attention_head_dim": HEAD_DIM,
        "num_layers": 2,
        "num_single_layers": 2,
        "joint_attention_dim": TEXT_WIDTH,
        "pooled_projection_dim": _POOLED,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    },
    "WanTransformer3DModel": {
        "in_channels": 16,
        "out_channels": 16,
        "attention_head_dim": HEAD_DIM,
        "num_layers": 3,
        "text_dim": TEXT_WIDTH,
        "ffn_dim": 256,
        "freq_dim": 64,
    },
    "CogVideoXTransformer3DModel": {
        "in_channels": 16,
        "out_channels": 16,
        "attention_head_dim": 64,
        "num_layers": 3,
        "text_embed_dim": TEXT_WIDTH,
        "time_embed_dim": 128,
        "max_text_seq_length": 8,
        "use_rotary_positional_embeddings": True,
    },
}
TINY = tuple(_CONFIGS)
"""Names of the available classes."""


def write_tiny(folder: Path, network: str, *, heads: int = 2, seed: int = 0, dtype: Any = None, **changes: Any) -> None:
    """Writes the folder of a tiny transformer.

    NumPy's RandomState stream is frozen for good, so a seed gives the same weights with every version. They have
    sensible magnitudes: N(0, 1/√fan_in), norms near 1, biases near 0.

    Args:
        folder: created if needed.
        network: one of TINY.
        dtype: dtype of the weights; fp32 by default.
        changes: arguments of the class that replace the tiny ones.
    """
    made: Any = transformer_class(network)
    model = made(**{**_CONFIGS[network], "num_attention_heads": heads, **changes})
    if dtype is not None:
        model.to(dtype)
    random = np.random.RandomState(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = random.standard_normal(tuple(parameter.shape)).astype(np.float32)
            if parameter.ndim < 2:
                values = 0.1 * values + (1 if "norm" in name and name.endswith("weight") else 0)
            else:
                values /= np.sqrt(np.prod(parameter.shape[1:]))
            parameter.copy_(torch.from_numpy(np.asarray(values)))
    model.save_pretrained(folder)


def tiny_request(
    network: str,
    *,
    frames: int = 2,
    height: int = 8,
    width: int = 8,
    text: int = 8,
    valid: Sequence[int] | None = None,
    batch: int = 1,
    channels: int = 16,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    label: str = "",
) -> StepRequest:
    """Returns the request for a call of a tiny transformer on random inputs.

    Args:
        network: one of TINY.
        frames, height, width: of the latent.
        text: number of text tokens.
        valid: number of these that a mask leaves to each sample, HunyuanVideo only; None leaves all.
        channels: number of channels of the latent.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    context = random(batch, text, TEXT_WIDTH)
    timestep = torch.linspace(900, 300, batch)
    if network == "FluxTransformer2DModel":
        tokens = frames * (height // 2) * (width // 2)
        places = torch.arange(tokens)
        columns = width // 2
        ids = torch.stack([torch.zeros(tokens), places // columns, places % columns], 1)
        return request(
            random(batch, tokens, 4 * channels),
            timestep / 1000,
            label=label,
            encoder_hidden_states=context,
            pooled_projections=random(batch, _POOLED),
            guidance=torch.full((batch,), 3.5),
            img_ids=ids,
            txt_ids=torch.zeros(text, 3),
        )
    x = random(batch, channels, frames, height, width)
    named: dict[str, Any] = {"encoder_hidden_states": context}
    if network == "HunyuanVideoTransformer3DModel":
        named["pooled_projections"] = random(batch, _POOLED)
        named["guidance"] = torch.full((batch,), 6000.0)
        mask = torch.arange(text)[None] < torch.tensor(valid or [text] * batch)[:, None]
        named["encoder_attention_mask"] = mask.long()
    if network == "CogVideoXTransformer3DModel":
        x = x.transpose(1, 2)
        tokens = frames * (height // 2) * (width // 2)
        angles = random(tokens, 64).float()
        named["image_rotary_emb"] = (angles.cos(), angles.sin())
    return request(x.contiguous(), timestep, label=label, **named)
