"""LoRA files in the formats and key names that users have, on a few tensors of each part of the tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH = 256  # hidden size of the tiny models
NARROW = 192  # of Mochi's and LTXV's
_RANK = 4

Shape = tuple[int, ...]
Form = Callable[[torch.Generator, Shape], dict[str, Tensor]]


def _random(generator: torch.Generator, *shape: int, size: float = 0.1) -> Tensor:
    return torch.randn(shape, generator=generator) * size


def _kohya(generator: torch.Generator, shape: Shape) -> dict[str, Tensor]:
    return {
        "lora_down.weight": _random(generator, _RANK, shape[1]),
        "lora_up.weight": _random(generator, shape[0], _RANK),
        "alpha": torch.tensor(2.0),
    }


def _peft(generator: torch.Generator, shape: Shape) -> dict[str, Tensor]:
    return {"lora_A.weight": _random(generator, _RANK, shape[1]), "lora_B.weight": _random(generator, shape[0], _RANK)}


def _peft_of_another_shape(generator: torch.Generator, shape: Shape) -> dict[str, Tensor]:
    return _peft(generator, shape) | {"reshape_weight": torch.tensor(shape)}


def _dora(generator: torch.Generator, shape: Shape) -> dict[str, Tensor]:
    return _kohya(generator, shape) | {"dora_scale": 1 + _random(generator, shape[0], 1).abs()}


def _loha(generator: torch.Generator, shape: Shape) -> dict[str, Tensor]:
    return {
        "hada_w1_a": _random(generator, shape[0], _RANK, size=0.3),
        "hada_w1_b": _random(generator, _RANK, shape[1], size=0.3),
        "hada_w2_a": _random(generator, shape[0], _RANK, size=0.3),
        "hada_w2_b": _random(generator, _RANK, shape[1], size=0.3),
        "alpha": torch.tensor(2.0),
    }


def _lokr(generator: torch.Generator, shape: Shape) -> dict[str, Tensor]:
    return {
        "lokr_w1": _random(generator, 8, 4),
        "lokr_w2": _random(generator, shape[0] // 8, shape[1] // 4),
        "alpha": torch.tensor(2.0),
    }


def _difference(generator: torch.Generator, shape: Shape) -> dict[str, Tensor]:
    return {"diff": _random(generator, *shape, size=0.02), "diff_b": _random(generator, shape[0])}


_QKV, _SQUARE, _UP = (3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH)
_LINEAR1, _LINEAR2 = (7 * WIDTH, WIDTH), (WIDTH, 5 * WIDTH)

# File name → form of the patches, and the names of the patched layers with their weights' shapes.
_FILES: dict[str, tuple[Form, dict[str, Shape]]] = {
    # HunyuanVideo
    "hunyuan_native": (
        _kohya,
        {
            "diffusion_model.double_blocks.0.img_attn.qkv": _QKV,
            "diffusion_model.single_blocks.0.linear1": _LINEAR1,
            "diffusion_model.final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
            "diffusion_model.txt_in.individual_token_refiner.blocks.0.self_attn.qkv": _QKV,
        },
    ),
    "hunyuan_kohya": (
        _kohya,
        {"lora_unet_double_blocks_0_txt_mlp_0": _UP, "lora_unet_single_blocks_0_linear2": _LINEAR2},
    ),
    "hunyuan_diffusion_pipe": (
        _peft,
        {
            "transformer.double_blocks.0.img_attn_proj": _SQUARE,
            "transformer.double_blocks.0.img_mod.linear": (6 * WIDTH, WIDTH),
            "transformer.double_blocks.0.txt_mlp.fc1": _UP,
        },
    ),
    "hunyuan_differences": (
        _difference,
        {"diffusion_model.double_blocks.0.img_mlp.0": _UP, "diffusion_model.img_in.proj": (WIDTH, 16, 1, 2, 2)},
    ),
    "hunyuan_dora": (_dora, {"diffusion_model.double_blocks.0.img_attn.qkv": _QKV}),
    "hunyuan_loha": (_loha, {"diffusion_model.double_blocks.0.img_attn.qkv": _QKV}),
    "hunyuan_lokr": (_lokr, {"diffusion_model.double_blocks.0.img_attn.qkv": _QKV}),
    # FLUX
    "flux_native": (
        _kohya,
        {
            "diffusion_model.double_blocks.0.txt_attn.qkv": _QKV,
            "diffusion_model.single_blocks.0.linear2": _LINEAR2,
            "diffusion_model.final_layer.linear": (64, WIDTH),
        },
    ),
    "flux_kohya": (
        _kohya,
        {"lora_unet_double_blocks_0_img_attn_qkv": _QKV, "lora_unet_single_blocks_0_linear1": _LINEAR1},
    ),
    "flux_diffusers": (
        _peft,
        {
            "transformer.transformer_blocks.0.attn.to_q": _SQUARE,
            "transformer.transformer_blocks.0.attn.add_v_proj": _SQUARE,
            "transformer.transformer_blocks.0.ff.net.0.proj": _UP,
            "transformer.single_transformer_blocks.0.attn.to_k": _SQUARE,
            "transformer.single_transformer_blocks.0.proj_mlp": _UP,
            "transformer.single_transformer_blocks.0.norm.linear": _QKV,
        },
    ),
    "flux_differences": (_difference, {"diffusion_model.img_in": (WIDTH, 64)}),
    # Wan
    "wan_native": (
        _kohya,
        {"diffusion_model.blocks.0.self_attn.q": _SQUARE, "diffusion_model.blocks.1.ffn.0": (384, WIDTH)},
    ),
    "wan_kohya": (_kohya, {"lora_unet_blocks_0_cross_attn_v": _SQUARE, "lora_unet_blocks_1_self_attn_o": _SQUARE}),
    "wan_differences": (_difference, {"diffusion_model.blocks.0.self_attn.k": _SQUARE}),
    # HunyuanVideo 1.5
    "hv15_native": (
        _kohya,
        {
            "diffusion_model.double_blocks.0.img_attn.qkv": _QKV,
            "diffusion_model.double_blocks.1.txt_mod.lin": (6 * WIDTH, WIDTH),
            "diffusion_model.byt5_in.fc3": (WIDTH, 2048),
            "diffusion_model.final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
        },
    ),
    # CogVideoX, half as wide
    "cogvideox_native": (
        _kohya,
        {
            "diffusion_model.blocks.0.q": (WIDTH // 2, WIDTH // 2),
            "diffusion_model.blocks.1.ff_proj": (2 * WIDTH, WIDTH // 2),
            "diffusion_model.blocks.1.norm1.linear": (3 * WIDTH, 96),
            "diffusion_model.patch_embed.text_proj": (WIDTH // 2, 64),
            "diffusion_model.proj_out": (64, WIDTH // 2),
        },
    ),
    # Mochi
    "mochi_native": (
        _kohya,
        {
            "diffusion_model.blocks.0.attn.qkv_x": (3 * NARROW, NARROW),
            "diffusion_model.blocks.1.mlp_x.w1": (1024, NARROW),
            "diffusion_model.final_layer.mod": (2 * NARROW, NARROW),
        },
    ),
    # LTXV
    "ltxv_diffusers": (
        _peft,
        {
            "diffusion_model.transformer_blocks.0.attn1.to_q": (NARROW, NARROW),
            "diffusion_model.transformer_blocks.1.attn2.to_v": (NARROW, NARROW),
            "diffusion_model.transformer_blocks.1.ff.net.0.proj": (4 * NARROW, NARROW),
        },
    ),
    # Qwen-Image
    "qwen_diffusers": (
        _peft,
        {
            "transformer.transformer_blocks.0.attn.to_q": _SQUARE,
            "transformer.transformer_blocks.1.img_mod.1": (6 * WIDTH, WIDTH),
        },
    ),
    "qwen_kohya": (
        _kohya,
        {
            "lora_unet_transformer_blocks_0_attn_add_v_proj": _SQUARE,
            "lora_unet_transformer_blocks_0_img_mlp_net_0_proj": _UP,
        },
    ),
    "flux_control": (_peft_of_another_shape, {"diffusion_model.img_in": (WIDTH, 128)}),
    # FLUX.2
    "flux2_native": (
        _kohya,
        {
            "diffusion_model.double_blocks.0.txt_attn.qkv": _QKV,
            "diffusion_model.single_blocks.0.linear2": (WIDTH, 4 * WIDTH),
            "diffusion_model.double_stream_modulation_img.lin": (6 * WIDTH, WIDTH),
            "diffusion_model.final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
        },
    ),
    "flux2_diffusers": (
        _peft,
        {
            "transformer.transformer_blocks.0.attn.to_q": _SQUARE,
            "transformer.transformer_blocks.0.attn.add_v_proj": _SQUARE,
            "transformer.transformer_blocks.0.ff.linear_in": (6 * WIDTH, WIDTH),
            "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj": (9 * WIDTH, WIDTH),
        },
    ),
}
HUNYUAN_VIDEO = tuple(name for name in _FILES if name.startswith("hunyuan"))
FLUX = tuple(name for name in _FILES if name.startswith("flux_") and name != "flux_control")
WAN = tuple(name for name in _FILES if name.startswith("wan"))
COGVIDEOX = tuple(name for name in _FILES if name.startswith("cogvideox"))
HUNYUAN_15 = tuple(name for name in _FILES if name.startswith("hv15"))
OTHERS = tuple(name for name in _FILES if name.startswith(("mochi", "ltxv", "qwen", "flux2")))


def write_lora_files(folder: Path) -> None:
    """Writes all of them, as `NAME.safetensors`."""
    for seed, (name, (form, layers)) in enumerate(_FILES.items()):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"{layer}.{leaf}": tensor
            for layer, shape in layers.items()
            for leaf, tensor in form(generator, shape).items()
        }
        save_file(tensors, folder / f"{name}.safetensors")
