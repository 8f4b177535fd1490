"""Lets ComfyUI load tiny networks of families whose sizes its detection does not read from the file.

The networks themselves are ComfyUI's own. Applied where ComfyUI runs, in the workers too: see `at_start`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import comfy.ldm.genmo.joint_model.asymm_models_joint as mochi
import comfy.ldm.seedvr.model as seedvr2
import comfy.model_detection as model_detection
import comfy.sdxl_clip as sdxl_clip
import comfy.supported_models as supported_models

HIDDEN_OF_THE_ASSERTION = 1536 * 8
"""ComfyUI's Mochi blocks assert that their MLP has this width, the released one's."""


def _mochi_sizes(shape_of: dict[str, Any]) -> dict[str, Any]:
    hidden = shape_of["x_embedder.proj.weight"][0]
    return {
        "depth": 1 + max(int(name.split(".")[1]) for name in shape_of if name.startswith("blocks.")),
        "num_heads": shape_of["pos_frequencies"][1],
        "hidden_size_x": hidden,
        "hidden_size_y": shape_of["t5_yproj.weight"][0],
        "t5_feat_dim": shape_of["t5_yproj.weight"][1],
        "mlp_ratio_x": HIDDEN_OF_THE_ASSERTION / hidden,
    }


def _qwen_image_sizes(shape_of: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_attention_heads": shape_of["img_in.weight"][0] // 128,
        "joint_attention_dim": shape_of["txt_norm.weight"][0],
    }


def _lumina_sizes(shape_of: dict[str, Any]) -> dict[str, Any]:
    """As of Z-Image, of another width."""
    width, head_dim = shape_of["cap_embedder.1.weight"][0], 128
    if width in _LUMINA_WIDTHS:
        return {}
    return {
        "n_heads": width // head_dim,
        "n_kv_heads": width // head_dim,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
        "rope_theta": 256.0,
        "ffn_dim_multiplier": 1.0,
        "z_image_modulation": True,
        "time_scale": 1000.0,
        "pad_tokens_multiple": 32,
    }


_LUMINA_WIDTHS = (2304, 3840)
"""Those that ComfyUI knows."""


def _anima_sizes(shape_of: dict[str, Any]) -> dict[str, Any]:
    rank, width = shape_of["blocks.0.adaln_modulation_self_attn.1.weight"]
    return {"num_heads": width // 128, "adaln_lora_dim": rank}


_SIZES = {"mochi_preview": _mochi_sizes, "qwen_image": _qwen_image_sizes, "lumina2": _lumina_sizes}
_SIZES |= {"anima": _anima_sizes}


CLIP_WIDTHS = {"clip_l": 24, "clip_g": 40}
"""Of SDXL's two text encoders, tiny. Together they are the width of the UNet's context."""


class TinySDXLClip(sdxl_clip.SDXLClipModel):
    """ComfyUI's, by its own option for other sizes."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None):
        sizes = {
            f"{name}_model_config": {
                "hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 2, "num_hidden_layers": 3,
            }
            for name, width in CLIP_WIDTHS.items()
        }  # fmt: skip
        super().__init__(device, dtype, (model_options or {}) | sizes)


SEEDVR2_7B = 768
"""Width of a tiny network that ComfyUI is to take for the one of 7B: it goes by the released one's."""


class _WidthOf7B(int):
    def __eq__(self, other: object) -> bool:
        return other in (int(self), SEEDVR2_7B)

    __hash__ = int.__hash__


def _seedvr2(shape_of: dict[str, Any]) -> dict[str, Any]:
    """A tiny one's configuration. ComfyUI tells SeedVR2's networks by their last blocks."""
    width = shape_of["txt_in.weight"][0]
    blocks = {int(name.split(".")[1]) for name in shape_of if name.startswith("blocks.")}
    apart = [number for number in blocks if f"blocks.{number}.attn.proj_qkv.vid.weight" in shape_of]
    config = {"image_model": "seedvr2", "vid_dim": width, "heads": width // 128, "norm_eps": 1e-5}
    config |= {"num_layers": len(blocks), "mm_layers": len(apart)}
    if width == SEEDVR2_7B:
        return config | {"rope_type": "rope3d", "rope_dim": 64, "mlp_type": "normal"}
    return config | {"mlp_type": "swiglu", "vid_out_norm": True}


class TinySDXL(supported_models.SDXL):
    """ComfyUI knows its UNets by their sizes; how wide the pooled text is does not matter here."""

    unet_config: ClassVar = {
        name: value for name, value in supported_models.SDXL.unet_config.items() if name != "adm_in_channels"
    } | {"model_channels": 64, "transformer_depth": [0, 1, 1], "context_dim": 64}

    def clip_target(self, state_dict: Any = None) -> Any:
        return supported_models.supported_models_base.ClipTarget(sdxl_clip.SDXLTokenizer, TinySDXLClip)


def apply() -> None:
    """Makes the detection read these sizes from the file; of released files it finds what it found before."""
    detect = model_detection.detect_unet_config

    def detect_sizes(state_dict: dict[str, Any], key_prefix: str, metadata: Any = None) -> Any:
        shapes = {name.removeprefix(key_prefix): tuple(t.shape) for name, t in state_dict.items()}
        if "positive_conditioning" in shapes and "blocks.31.attn.proj_qkv.all.weight" not in shapes:
            return _seedvr2(shapes)
        config = detect(state_dict, key_prefix, metadata=metadata)
        if config is not None and (sizes := _SIZES.get(config.get("image_model", ""))):
            config |= sizes(shapes)
        return config

    model_detection.detect_unet_config = detect_sizes
    supported_models.models.append(TinySDXL)
    feed_forward = mochi.FeedForward
    seedvr2.SEEDVR2_7B_VID_DIM = _WidthOf7B(seedvr2.SEEDVR2_7B_VID_DIM)
    mochi.FeedForward = lambda **options: feed_forward(**options | {"hidden_size": 4 * options["in_features"]})
