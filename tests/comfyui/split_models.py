"""Tiny random networks of ComfyUI's own classes, and inputs as its samplers hand them over.

To be imported where ComfyUI can be, after its `comfy.cli_args`. Sizes are the smallest that ComfyUI's detection reads
back from the file; where it takes a size for granted, the released one's stands here.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments in order and by name."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network and one input."""

    supported: str
    """ComfyUI's entry in `comfy.supported_models`."""
    config: Callable[[int], dict[str, Any]]
    """Heads → what its detection would find."""
    inputs: Callable[[Any], Call]
    """Network → arguments of a call."""
    heads: tuple[int, ...] = (3, 4)
    metadata: bool = field(default=False)
    """Its files carry the configuration in their header."""


def random(*shape: int, seed: int = 0) -> Tensor:
    """N(0, 1), the same for the same shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


# ---------------------------------------------------------------------------------------------------- configurations


def flux(heads: int, **more: Any) -> dict[str, Any]:
    return {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096,
        "hidden_size": 128 * heads, "mlp_ratio": 4.0, "num_heads": heads, "depth": 2, "depth_single_blocks": 2,
        "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
        "txt_ids_dims": [],
    } | more  # fmt: skip


def flux2(heads: int) -> dict[str, Any]:
    return flux(
        heads, image_model="flux2", in_channels=32, out_channels=32, vec_in_dim=None, axes_dim=[32] * 4, theta=2000,
        patch_size=1, qkv_bias=False, txt_ids_dims=[3], global_modulation=True, mlp_silu_act=True, ops_bias=False,
        default_ref_method="index", ref_index_scale=10.0, mlp_ratio=3.0, context_in_dim=48,
    )  # fmt: skip


def chroma(heads: int) -> dict[str, Any]:
    config = flux(
        heads, image_model="chroma", in_channels=64, out_channels=64, context_in_dim=48, in_dim=64,
        out_dim=128 * heads, hidden_dim=64, n_layers=2,
    )  # fmt: skip
    del config["guidance_embed"]
    return config


def hunyuan_dit(heads: int, **more: Any) -> dict[str, Any]:
    return {
        "image_model": "hydit", "depth": 6, "hidden_size": 64 * heads, "num_heads": heads, "mlp_ratio": 2.0,
        "text_states_dim": 48, "text_states_dim_t5": 64, "text_len": 7, "text_len_t5": 5,
    } | more  # fmt: skip


def hunyuan(heads: int, **more: Any) -> dict[str, Any]:
    config = flux(
        heads, image_model="hunyuan_video", patch_size=[1, 2, 2], context_in_dim=64, theta=256, byt5=False,
        meanflow=False, use_cond_type_embedding=False, vision_in_dim=None, meanflow_sum=False,
    )  # fmt: skip
    del config["txt_ids_dims"]
    return config | more


def hunyuan_15(heads: int) -> dict[str, Any]:
    return hunyuan(
        heads, in_channels=12, patch_size=[1, 1, 1], out_channels=8, vec_in_dim=None, depth_single_blocks=0,
        guidance_embed=False, byt5=True, use_cond_type_embedding=True, vision_in_dim=1152, meanflow_sum=True,
    )  # fmt: skip


def wan(heads: int, **more: Any) -> dict[str, Any]:
    return {
        "image_model": "wan2.1", "model_type": "t2v", "dim": 128 * heads, "out_dim": 16, "num_heads": heads,
        "ffn_dim": 128, "num_layers": 2, "patch_size": (1, 2, 2), "freq_dim": 256, "window_size": (-1, -1),
        "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6, "in_dim": 16, "text_dim": 4096,
    } | more  # fmt: skip


def wan_vace(heads: int) -> dict[str, Any]:
    return wan(heads, model_type="vace", vace_layers=2, vace_in_dim=96)


def wan_kind(kind: str, **more: Any) -> Callable[[int], dict[str, Any]]:
    """Of a class of its own."""
    return lambda heads: wan(heads, model_type=kind, **more)


def animate(heads: int) -> dict[str, Any]:
    return wan(heads, model_type="animate", in_dim=36, num_layers=5)


def aura_flow(heads: int) -> dict[str, Any]:
    return {
        "in_channels": 4, "out_channels": 4, "cond_seq_dim": 48, "patch_size": 2, "n_double_layers": 2, "n_layers": 4,
        "dim": 64 * heads, "n_heads": heads, "global_conddim": 64 * heads, "max_seq": 256,
    }  # fmt: skip


def stable_audio(heads: int, **more: Any) -> dict[str, Any]:
    return {
        "audio_model": "dit1.0", "global_cond_dim": 1536, "project_cond_tokens": False, "embed_dim": 64 * heads,
        "io_channels": 8, "input_concat_dim": 0, "depth": 3, "num_heads": heads, "cond_token_dim": 64,
        "timestep_features_type": "learned",
    } | more  # fmt: skip


def stable_audio_3(heads: int) -> dict[str, Any]:
    return stable_audio(
        heads, global_cond_dim=768, global_cond_shared_embed=True, global_cond_type="adaLN", num_memory_tokens=4,
        local_add_cond_dim=9, norm_type="rms_norm", attn_kwargs={"qk_norm": "rms", "differential": True},
        timestep_features_type="expo",
    )  # fmt: skip


def sd3(heads: int, *, medium: bool = True) -> dict[str, Any]:
    return {
        "in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": heads, "input_size": None,
        "adm_in_channels": 32, "num_patches": 64, "pos_embed_max_size": 8, "pos_embed_scaling_factor": None,
        "qk_norm": "rms", "x_block_self_attn_layers": [0, 1] if medium else [],
        "context_embedder_config": {
            "target": "torch.nn.Linear", "params": {"in_features": 48, "out_features": 64 * heads},
        },
    }  # fmt: skip


def cogvideox(heads: int, **more: Any) -> dict[str, Any]:
    return {
        "image_model": "cogvideox", "num_attention_heads": heads, "attention_head_dim": 64, "in_channels": 16,
        "out_channels": 16, "time_embed_dim": 64, "text_embed_dim": 48, "num_layers": 2, "patch_size": 2,
        "use_rotary_positional_embeddings": True, "sample_height": 6, "sample_width": 10, "sample_frames": 9,
        "max_text_seq_length": 9,
    } | more  # fmt: skip


def ernie(heads: int) -> dict[str, Any]:
    return {
        "image_model": "ernie", "hidden_size": 128 * heads, "num_attention_heads": heads, "num_layers": 3,
        "ffn_hidden_size": 128, "in_channels": 16, "out_channels": 16, "text_in_dim": 48,
    }  # fmt: skip


def hidream(heads: int) -> dict[str, Any]:
    return {
        "image_model": "hidream", "attention_head_dim": 128, "axes_dims_rope": [64, 32, 32],
        "caption_channels": [48, 40], "max_resolution": [128, 128], "in_channels": 16, "out_channels": 16,
        "llama_layers": [0, 1, 1, 2], "num_attention_heads": heads, "num_routed_experts": 2, "num_activated_experts": 1,
        "num_layers": 2, "num_single_layers": 2, "patch_size": 2, "text_emb_dim": 32,
    }  # fmt: skip


def boogu(heads: int) -> dict[str, Any]:
    return {
        "image_model": "boogu", "hidden_size": 120 * heads, "num_layers": 2, "num_double_stream_layers": 2,
        "num_refiner_layers": 1, "num_attention_heads": heads, "num_kv_heads": 1 if heads % 2 else 2,
        "instruction_feat_dim": 48,
    }  # fmt: skip


def chroma_radiance(heads: int) -> dict[str, Any]:
    return chroma(heads) | {
        "image_model": "chroma_radiance", "in_channels": 3, "out_channels": 3, "patch_size": 16,
        "nerf_hidden_size": 16, "nerf_mlp_ratio": 4, "nerf_depth": 2, "nerf_max_freqs": 8, "nerf_tile_size": 512,
        "nerf_final_head_type": "conv", "nerf_embedder_dtype": torch.float32, "use_x0": True,
        "use_sequential_txt_ids": False,
    }  # fmt: skip


def ideogram4(heads: int) -> dict[str, Any]:
    return {
        "image_model": "ideogram4", "in_channels": 16, "num_layers": 3, "num_attention_heads": heads,
        "attention_head_dim": 128, "intermediate_size": 128, "adaln_dim": 32, "llm_features_dim": 48,
        "mrope_section": [24, 20, 20],
    }  # fmt: skip


def joy_image(heads: int) -> dict[str, Any]:
    return {
        "image_model": "joyimage", "hidden_size": 128 * heads, "num_attention_heads": heads, "text_dim": 48,
        "num_layers": 2,
    }  # fmt: skip


def mage_flow(heads: int) -> dict[str, Any]:
    return {
        "image_model": "mage_flow", "in_channels": 16, "out_channels": 16, "num_layers": 2,
        "num_attention_heads": heads, "joint_attention_dim": 48,
    }  # fmt: skip


def pixart() -> dict[str, Any]:
    """Of a class that has no plan; ComfyUI's detection knows this width only."""
    return {
        "image_model": "pixart_sigma", "num_heads": 16, "patch_size": 2, "hidden_size": 1152, "in_channels": 4,
        "depth": 1, "input_size": 64, "pe_interpolation": 1, "model_max_length": 12, "micro_condition": False,
    }  # fmt: skip


def ovis(heads: int) -> dict[str, Any]:
    return flux(
        heads, vec_in_dim=None, guidance_embed=False, yak_mlp=True, txt_norm=True, txt_ids_dims=[1, 2],
        context_in_dim=48,
    )  # fmt: skip


def lens(heads: int) -> dict[str, Any]:
    return {
        "image_model": "lens", "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 64,
        "num_attention_heads": heads, "enc_hidden_dim": 24, "selected_layer_index": [1, 2],
    }  # fmt: skip


def mochi(heads: int) -> dict[str, Any]:
    return {
        "image_model": "mochi_preview", "depth": 2, "patch_size": 2, "num_heads": heads, "hidden_size_x": 128 * heads,
        "hidden_size_y": 64, "mlp_ratio_x": 12288 / (128 * heads), "mlp_ratio_y": 4.0, "learn_sigma": False,
        "in_channels": 12, "qk_norm": True, "qkv_bias": False, "out_bias": True, "attn_drop": 0.0,
        "patch_embed_bias": True, "posenc_preserve_area": True, "timestep_mlp_bias": True, "attend_to_padding": False,
        "timestep_scale": 1000.0, "use_t5": True, "t5_feat_dim": 48, "t5_token_length": 9, "rope_theta": 10000.0,
    }  # fmt: skip


def omnigen2(heads: int) -> dict[str, Any]:
    return {
        "image_model": "omnigen2", "patch_size": 2, "in_channels": 16, "hidden_size": 96 * heads, "num_layers": 2,
        "num_refiner_layers": 1, "num_attention_heads": heads, "num_kv_heads": 1 if heads % 2 else 2,
        "text_feat_dim": 48,
    }  # fmt: skip


def minimax_h3(heads: int, **more: Any) -> dict[str, Any]:
    return {
        "image_model": "minimax_h3", "num_layers": 3, "token_refiner_num_layers": 2, "hidden_size": 256,
        "latents_dim": 24, "audio_latents_dim": 32, "attention_head_dim": 128, "num_attention_heads": heads,
        "ffn_hidden_size": 128, "text_dim": 48, "timestep_input_dim": 64, "time_embed_hidden_size": 64,
        "time_embed_dim": 64, "rope_inv_freq_len": 16,
    } | more  # fmt: skip


def ltx2(heads: int, **more: Any) -> dict[str, Any]:
    return {
        "image_model": "ltxav", "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": heads,
        "cross_attention_dim": 32 * heads, "audio_attention_head_dim": 16, "audio_num_attention_heads": heads,
        "audio_cross_attention_dim": 16 * heads, "caption_channels": 48, "connector_attention_head_dim": 24,
        "connector_num_attention_heads": 2, "connector_num_layers": 1, "rope_type": "split",
        "frequencies_precision": "float64", "positional_embedding_max_pos": [20, 2048, 2048],
    } | more  # fmt: skip


def ltx23(heads: int) -> dict[str, Any]:
    more = ("apply_gated_attention", "cross_attention_adaln", "caption_proj_before_connector")
    return ltx2(heads, **dict.fromkeys(more, True))


def ltxv(heads: int) -> dict[str, Any]:
    return {
        "image_model": "ltxv", "num_layers": 3, "attention_head_dim": 32, "num_attention_heads": heads,
        "cross_attention_dim": 32 * heads, "caption_channels": 48,
    }  # fmt: skip


def sdxl() -> dict[str, Any]:
    """A UNet of ComfyUI's, with SDXL's conditioning on sizes."""
    return {
        "in_channels": 4, "out_channels": 4, "model_channels": 64, "channel_mult": [1, 2, 4],
        "num_res_blocks": [1, 1, 1], "transformer_depth": [0, 1, 1], "transformer_depth_middle": 1,
        "transformer_depth_output": [0, 0, 1, 1, 1, 1], "num_head_channels": 64, "context_dim": 64,
        "use_linear_in_transformer": True, "use_spatial_transformer": True, "num_classes": "sequential",
        "adm_in_channels": 768 + 6 * 256, "image_size": 32, "use_checkpoint": False, "legacy": False,
        "use_temporal_attention": False,
    }  # fmt: skip


def lumina(heads: int, **more: Any) -> dict[str, Any]:
    return {
        "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 128 * heads, "cap_feat_dim": 48,
        "n_layers": 3, "qk_norm": True, "n_heads": heads, "n_kv_heads": heads, "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 1.0, "z_image_modulation": True,
        "time_scale": 1000.0, "pad_tokens_multiple": 32,
    } | more  # fmt: skip


def lumina2(heads: int) -> dict[str, Any]:
    return lumina(heads, z_image_modulation=False, pad_tokens_multiple=None, n_kv_heads=1)


def krea2(heads: int) -> dict[str, Any]:
    return {
        "image_model": "krea2", "features": 128 * heads, "channels": 16, "patch": 2, "layers": 3, "heads": heads,
        "kvheads": 1 if heads % 2 else heads // 2, "txtlayers": 3, "txtdim": 80, "multiplier": 4,
    }  # fmt: skip


def qwen_image(heads: int) -> dict[str, Any]:
    return {
        "image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "attention_head_dim": 128,
        "num_attention_heads": heads, "joint_attention_dim": 48,
    }  # fmt: skip


def cosmos(heads: int, name: str = "cosmos_predict2", text: int = 48) -> dict[str, Any]:
    return {
        "image_model": name, "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16,
        "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 128 * heads,
        "concat_padding_mask": True, "crossattn_emb_channels": text, "pos_emb_cls": "rope3d",
        "pos_emb_learnable": True, "use_adaln_lora": True, "adaln_lora_dim": 16, "num_blocks": 3, "num_heads": heads,
        "rope_enable_fps_modulation": False,
    }  # fmt: skip


def anima(heads: int) -> dict[str, Any]:
    return cosmos(heads, "anima", 1024)


def seedvr2(heads: int, **more: Any) -> dict[str, Any]:
    """As of 3B: only some blocks have weights of their own for the text."""
    return {
        "image_model": "seedvr2", "vid_dim": 128 * heads, "heads": heads, "num_layers": 4, "mm_layers": 2,
        "norm_eps": 1e-5, "mlp_type": "swiglu", "vid_out_norm": True,
    } | more  # fmt: skip


def kandinsky5(heads: int) -> dict[str, Any]:
    return {
        "image_model": "kandinsky5", "model_dim": 64 * heads, "time_dim": 64, "ff_dim": 128, "visual_embed_dim": 64,
        "num_text_blocks": 1, "num_visual_blocks": 3, "axes_dims": (16, 24, 24), "in_text_dim": 48, "in_text_dim2": 48,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ inputs


def call(x: tuple[int, ...], t: Any, context: tuple[int, ...], **named: Any) -> Callable[[Any], Call]:
    """One latent, the timesteps, a text; a tuple among `named` is the shape of a further tensor."""

    def make(network: Any) -> Call:
        more = {name: random(*value) if isinstance(value, tuple) else value for name, value in named.items()}
        return (random(*x), torch.tensor(t)), {"context": random(*context), **more}

    return make


def flux_call(
    *, text: int = 7, batch: int = 1, method: str | None = None, control: bool = False, packed: bool = True
) -> Callable[[Any], Call]:
    """35 image tokens. `method`: with two references, embedded so. `packed`: four latent values to a token."""

    def make(network: Any) -> Call:
        parameters = network.params
        channels = parameters.in_channels
        more: dict[str, Any] = {"guidance": torch.tensor([3.5])}
        if method is not None:
            references = [random(batch, channels, 6, 4, seed=5), random(batch, channels, 2, 6, seed=6)]
            more |= {"ref_latents": references, "ref_latents_method": method}
        if control:
            residuals = [random(batch, 35, network.hidden_size, seed=seed) for seed in (1, 2)]
            more["control"] = {"input": [residuals[0], None], "output": [None, residuals[1]]}
        if parameters.vec_in_dim:
            more["y"] = random(batch, parameters.vec_in_dim)
        x = random(batch, channels, 10, 14) if packed else random(batch, channels, 5, 7)
        return (x, torch.full((batch,), 0.6)), {"context": random(batch, text, parameters.context_in_dim), **more}

    return make


def hunyuan_call(*, padding: int = 0, reference: bool = False, image: bool = False) -> Callable[[Any], Call]:
    mask = (torch.arange(11)[None] < 11 - padding).long() if padding else None
    more: dict[str, Any] = {"attention_mask": mask, "guidance": torch.tensor([6.0]), "y": (1, 768)}
    if image:
        more["guiding_frame_index"] = torch.tensor([0.0])
    if reference:
        more["ref_latent"] = (1, 16, 1, 6, 10)
    return call((1, 16, 3, 6, 10), [600.0], (1, 11, 64), **more)


def wan_call(
    *, batch: int = 1, t: Any = None, channels: int = 16, size: tuple[int, int] = (6, 10), **named: Any
) -> Callable[[Any], Call]:
    t = [600.0] * batch if t is None else t
    return call((batch, channels, 3, *size), t, (batch, 9, 4096), **named)


def seedvr2_call(*, batch: int = 1) -> Callable[[Any], Call]:
    """45 tokens a sample, in several windows."""
    t = [600.0, 300.0][:batch]
    return call((batch, 16, 3, 6, 10), t, (batch, 9, 5120), condition=(batch, 17, 3, 6, 10))


def animate_call(*, face: bool = True, **named: Any) -> Callable[[Any], Call]:
    """With a pose and a face. What takes the face from pixels stands in: it takes 512 × 512 of them."""

    def make(network: Any) -> Call:
        network.motion_encoder.get_motion = lambda pixels: random(len(pixels), 512, seed=9)
        conditions = {"clip_fea": (1, 257, 1280), "pose_latents": (1, 16, 2, 6, 10)}
        args, more = wan_call(channels=36, **conditions | named)(network)
        return args, more | ({"face_pixel_values": torch.zeros(len(args[0]), 3, 5, 1, 1)} if face else {})

    return make


def h3_call(*, conditions: str = "", masks: bool = False, text: int = 7) -> Callable[[Any], Call]:
    """Video of 3 frames with audio; `conditions`: keyframes, or references."""

    def make(network: Any) -> Call:
        payload: dict[str, Any] = {"audio_scale": 1.7}
        more: dict[str, Any] = {}
        if conditions == "keyframes":
            video, audio = random(1, 24, 1, 6, 10, seed=4), random(1, 32, 2, 3, seed=4)
            payload |= {
                "keyframes": [{"resolved_frame_index": 4, "latent": video, "audio_latent": audio}],
                "cond_video_latents": [video],
                "cond_audio_latents": [audio],
                "text_token_tags": torch.tensor([1, 1, 0, 0, 0, 1, 1]),
                "visual_cond_noise_aug": 0.95,
            }
        if conditions == "references":
            image, video, audio = random(1, 24, 1, 4, 6, seed=6), random(1, 24, 2, 4, 4, seed=7), random(1, 32, 2, 5)
            sized = {"latent_t": 2, "latent_h": 4, "latent_w": 4, "ref_audio_t": 5}
            payload |= {
                "refs": [
                    {"kind": "image", "latent_h": 4, "latent_w": 6, "latent": image},
                    {"kind": "video_audio", **sized, "latent": video, "audio_latent": audio},
                ],
                "cond_video_latents": [image, video],
                "cond_audio_latents": [audio],
            }
        if masks:
            video_mask, audio_mask = torch.ones(1, 1, 3, 5, 9), torch.ones(1, 1, 2, 9)
            video_mask[:, :, 0], video_mask[:, :, 1, :3] = 0.0, 0.5
            audio_mask[..., :4] = 0.25
            more = {"denoise_mask": video_mask, "audio_denoise_mask": audio_mask}
        x = [random(1, 24, 3, 5, 9), random(1, 32, 2, 9)]
        named = {"context": random(1, text, 48), "minimax_payload": payload, **more}
        return (x, torch.tensor([600.0])), named

    return make


def ltx2_call(*, mode: str = "", batch: int = 1, audio: int = 7) -> Callable[[Any], Call]:
    """45 video tokens with audio. `mode`: kept frame, inpaint, guide, or reference audio."""
    frames, height, width = 3, 3, 5

    def make(network: Any) -> Call:
        more: dict[str, Any] = {}
        mask = torch.ones(batch, 1, frames, height, width)
        video_t, audio_t = torch.full((batch,), 0.7), torch.full((batch,), 0.7)
        if mode == "kept frame":
            mask[:, :, 0] = 0.1
            audio_t = (torch.linspace(0.2, 1, audio) * 0.7).expand(batch, audio)
        if mode == "inpaint":
            mask = torch.rand(mask.shape, generator=torch.Generator().manual_seed(3))
        if mode == "guide":  # a keyframe at the end, attended to with half the strength, and one token left out
            each = height * width
            mask[:, :, -1], mask[:, :, 1, 0, 0] = 0.0, -1.0
            at = torch.zeros(batch, 3, each, 2)
            at[:, 1] = (torch.arange(each) // width)[None, :, None] * 32.0
            at[:, 2] = (torch.arange(each) % width)[None, :, None] * 32.0
            entry = {"strength": 0.5, "pre_filter_count": each, "pixel_mask": None, "latent_shape": [1, height, width]}
            more |= {"keyframe_idxs": at, "guide_attention_entries": [entry]}
        if mode == "reference audio":
            more["ref_audio"] = {"tokens": random(batch, 4, 128, seed=9)}
        if mode in ("kept frame", "inpaint", "guide"):
            video_t, more["denoise_mask"] = (mask * 0.7).flatten(1), mask
        width_of_text = 96
        if network.caption_proj_before_connector:
            width_of_text = network.inner_dim + network.audio_inner_dim
        x = [random(batch, 128, frames, height, width), random(batch, 8, audio, 16)]
        text_mask = torch.tensor([[1] * 6 + [0] * 3] * batch)
        named = {"context": random(batch, 9, width_of_text), "attention_mask": text_mask, "frame_rate": 25, **more}
        return (x, (video_t, audio_t)), named

    return make


def picture_call(text: int, width: int, *, batch: int = 1, frames: bool = False, **named: Any) -> Callable[[Any], Call]:
    """35 image tokens."""
    x = (batch, 16, 1, 10, 14) if frames else (batch, 16, 10, 14)
    return call(x, [0.6] * batch, (batch, text, width), **named)


def qwen_control(network: Any) -> Call:
    args, named = picture_call(2, 48, frames=True)(network)
    residuals = [random(1, 35, network.inner_dim, seed=1), None]
    return args, {**named, "control": {"input": residuals}}


def hunyuan_dit_call(*, batch: int = 1, control: bool = False) -> Callable[[Any], Call]:
    """35 image tokens, and two texts whose padding the model replaces by what it has learned."""

    def make(network: Any) -> Call:
        masks = {"text_embedding_mask": (7, 4), "text_embedding_mask_t5": (5, 2)}
        named = {name: torch.tensor([[1] * valid + [0] * (n - valid)] * batch) for name, (n, valid) in masks.items()}
        named |= {"encoder_hidden_states_t5": random(batch, 5, 64), "image_meta_size": random(batch, 6)}
        if control:  # a residual for each of the skips, the last first
            named["control"] = {"output": [random(batch, 35, network.hidden_size, seed=n) for n in (1, 2)]}
        return call((batch, 4, 10, 14), [0.6] * batch, (batch, 7, 48), **named)(network)

    return make


def sd3_control(network: Any) -> Call:
    args, named = picture_call(2, 48, batch=2, y=(2, 32))(network)
    residuals = [random(2, 35, network.hidden_size, seed=1), None, random(2, 35, network.hidden_size, seed=2)]
    return args, {**named, "control": {"output": residuals}}


_IMAGE = {"channels": 36, "clip_fea": (1, 257, 1280)}
_S2V = wan_kind("s2v", audio_dim=48, audio_inject_layers=[0, 1])
_HEARD = {"audio_embed": (1, 25, 48, 12)}
_HUMO_HEARD = {"audio_embed": (1, 3, 8, 5, 1280)}
_SIX_OF_NINE = torch.tensor([[1] * 6 + [0] * 3])
_MASKED = torch.tensor([[[True] * 5 + [False] * 2 + [True] * 35]])
_OMNI = {"ref_latents": [random(1, 16, 6, 8, seed=4)], "ref_contexts": [random(1, 5, 48), random(1, 3, 48, seed=5)]}
_KEPT = {"ref_latents": [random(1, 16, 6, 8, seed=4)], "ref_latents_method": "index_timestep_zero"}
_KEPT_FRAME = {**_KEPT, "ref_latents": [random(1, 16, 1, 6, 8, seed=4)]}
_FIVE_OF_SEVEN = torch.tensor([[1] * 5 + [0] * 2])

CASES: dict[str, Case] = {
    "MiniMax H3": Case(supported="MiniMaxH3", config=minimax_h3, inputs=h3_call()),
    "MiniMax H3, keyframes, tags": Case(
        supported="MiniMaxH3", config=minimax_h3, inputs=h3_call(conditions="keyframes")
    ),
    "MiniMax H3, references, masks": Case(
        supported="MiniMaxH3", config=minimax_h3, inputs=h3_call(conditions="references", masks=True, text=2)
    ),
    "MiniMax H3, modulation curves": Case(
        supported="MiniMaxH3",
        config=lambda heads: minimax_h3(heads, adaln_curve_grid=17),
        inputs=h3_call(conditions="references", masks=True),
    ),
    "LTX-2": Case(supported="LTXAV", config=ltx2, inputs=ltx2_call(), metadata=True),
    "LTX-2, reference audio": Case(
        supported="LTXAV", config=ltx2, inputs=ltx2_call(mode="reference audio", audio=3), metadata=True
    ),
    "LTX-2.3": Case(supported="LTXAV", config=ltx23, inputs=ltx2_call(), metadata=True),
    "LTX-2.3, kept frame, batch 2": Case(
        supported="LTXAV", config=ltx23, inputs=ltx2_call(mode="kept frame", batch=2), metadata=True
    ),
    "LTX-2.3, inpaint": Case(supported="LTXAV", config=ltx23, inputs=ltx2_call(mode="inpaint"), metadata=True),
    "LTX-2.3, guide": Case(supported="LTXAV", config=ltx23, inputs=ltx2_call(mode="guide"), metadata=True),
    "LTXV": Case(
        supported="LTXV", config=ltxv, inputs=call((1, 128, 3, 3, 5), [0.7], (1, 9, 48), attention_mask=_SIX_OF_NINE)
    ),
    "Z-Image": Case(
        supported="Lumina2", config=lumina, inputs=call((1, 16, 18, 14), [0.4], (1, 19, 48), num_tokens=19)
    ),
    "Z-Image Omni": Case(
        supported="Lumina2",
        config=lambda heads: lumina(heads, siglip_feat_dim=24),
        inputs=call((1, 16, 18, 14), [0.4], (1, 19, 48), num_tokens=19, **_OMNI),
    ),
    "Lumina 2, batch 2": Case(
        supported="Lumina2", config=lumina2, inputs=call((2, 16, 18, 14), [0.4] * 2, (2, 19, 48), num_tokens=19)
    ),
    "Wan": Case(supported="WAN21_T2V", config=wan, inputs=wan_call()),
    "Wan, batch 2": Case(supported="WAN21_T2V", config=wan, inputs=wan_call(batch=2)),
    "Wan, a timestep per frame": Case(supported="WAN22_T2V", config=wan, inputs=wan_call(t=[[0.0, 600.0, 300.0]])),
    "Wan, image to video": Case(
        supported="WAN21_I2V",
        config=lambda heads: wan(heads, model_type="i2v", in_dim=36),
        inputs=wan_call(channels=36, clip_fea=(1, 257, 1280)),
    ),
    "Wan, context latents": Case(
        supported="WAN21_T2V", config=wan, inputs=wan_call(context_latents=[random(1, 16, 1, 4, 6, seed=8)])
    ),
    "Wan VACE": Case(
        supported="WAN21_Vace",
        config=wan_vace,
        inputs=wan_call(vace_context=(1, 2, 96, 3, 6, 10), vace_strength=[0.7, 1.0]),
    ),
    "Wan Fun, reference": Case(
        supported="WAN21_FunControl2V",
        config=lambda heads: wan(heads, in_dim=48, in_dim_ref_conv=16),
        inputs=wan_call(channels=48, reference_latent=(1, 16, 6, 10)),
    ),
    "Wan Camera": Case(
        supported="WAN21_Camera",
        config=wan_kind("camera", in_dim=32),
        inputs=wan_call(camera_conditions=(1, 24, 3, 48, 80), **_IMAGE | {"channels": 32}),
    ),
    "Wan Animate": Case(supported="WAN22_Animate", config=animate, inputs=animate_call()),
    "Wan Animate, no face": Case(supported="WAN22_Animate", config=animate, inputs=animate_call(face=False)),
    "Wan Animate, batch 2": Case(
        supported="WAN22_Animate",
        config=animate,
        inputs=animate_call(batch=2, clip_fea=(2, 257, 1280)),
    ),
    "Wan HuMo": Case(supported="WAN21_HuMo", config=wan_kind("humo"), inputs=wan_call(**_HUMO_HEARD)),
    "Wan HuMo, reference": Case(
        supported="WAN21_HuMo",
        config=wan_kind("humo"),
        inputs=wan_call(**_HUMO_HEARD, reference_latent=(1, 16, 1, 6, 10)),
    ),
    "Wan S2V, pose": Case(
        supported="WAN22_S2V", config=_S2V, inputs=wan_call(**_HEARD, control_video=(1, 16, 3, 6, 10))
    ),
    "Wan S2V, reference": Case(
        supported="WAN22_S2V", config=_S2V, inputs=wan_call(**_HEARD, reference_latent=(1, 16, 1, 6, 10))
    ),
    "Wan S2V, reference, motion": Case(
        supported="WAN22_S2V",
        config=_S2V,
        inputs=wan_call(size=(8, 8), **_HEARD, reference_latent=(1, 16, 1, 8, 8), reference_motion=(1, 16, 19, 8, 8)),
    ),
    "WanDancer": Case(
        supported="WAN22_WanDancer",
        config=wan_kind("wandancer", in_dim=36, audio_inject_layers=[0, 1]),
        inputs=wan_call(size=(8, 12), **_IMAGE, audio_embed=(1, 30, 35), clip_fea_ref=(1, 257, 1280)),
    ),
    "SCAIL, pose, reference": Case(
        supported="WAN21_SCAIL",
        config=wan_kind("scail", in_dim=20),
        inputs=wan_call(
            channels=20, clip_fea=(1, 257, 1280), pose_latents=(1, 20, 3, 2, 6), reference_latent=(1, 20, 1, 6, 10)
        ),
    ),
    "SCAIL-2, pose, masks": Case(
        supported="WAN21_SCAIL2",
        config=wan_kind("scail2", in_dim=20),
        inputs=wan_call(
            channels=20,
            clip_fea=(1, 257, 1280),
            pose_latents=(1, 20, 3, 2, 6),
            reference_latent=(1, 20, 1, 6, 10),
            ref_mask_latents=(1, 28, 4, 6, 10),
            sam_latents=(1, 28, 3, 2, 6),
        ),
    ),
    "SeedVR2": Case(supported="SeedVR2", config=seedvr2, inputs=seedvr2_call()),
    "SeedVR2, batch 2": Case(supported="SeedVR2", config=seedvr2, inputs=seedvr2_call(batch=2)),
    "AuraFlow": Case(supported="AuraFlow", config=aura_flow, inputs=call((1, 4, 10, 14), [0.6], (1, 7, 48))),
    "Hunyuan-DiT": Case(
        supported="HunyuanDiT1",
        config=lambda heads: hunyuan_dit(heads, image_model="hydit1", size_cond=True, use_style_cond=True),
        inputs=hunyuan_dit_call(),
    ),
    "Hunyuan-DiT, ControlNet, batch 2": Case(
        supported="HunyuanDiT", config=hunyuan_dit, inputs=hunyuan_dit_call(batch=2, control=True)
    ),
    "Stable Audio": Case(
        supported="StableAudio", config=stable_audio, inputs=call((1, 8, 41), [0.6], (1, 9, 64), global_embed=(1, 1536))
    ),
    "Stable Audio, mean of all tokens, batch 2": Case(
        supported="StableAudio",
        config=lambda heads: stable_audio(heads, attn_kwargs={"qk_norm": "ln", "feat_scale": True}),
        inputs=call((2, 8, 41), [0.6] * 2, (2, 9, 64), global_embed=(2, 1536)),
    ),
    "Stable Audio 3, inpaint": Case(
        supported="StableAudio3",
        config=stable_audio_3,
        inputs=call((1, 8, 41), [0.6], (1, 9, 64), global_embed=(1, 768), local_add_cond=(1, 9, 41)),
    ),
    "SD3": Case(
        supported="SD3",
        config=lambda heads: sd3(heads, medium=False) | {"qk_norm": None},
        inputs=picture_call(1, 48, y=(1, 32)),
    ),
    "SD3.5 Medium": Case(supported="SD3", config=sd3, inputs=picture_call(7, 48, y=(1, 32))),
    "SD3.5 Medium, ControlNet, batch 2": Case(supported="SD3", config=sd3, inputs=sd3_control),
    "CogVideoX": Case(supported="CogVideoX_T2V", config=cogvideox, inputs=call((1, 16, 3, 6, 10), [600.0], (1, 9, 48))),
    "CogVideoX, learned positions, batch 2": Case(
        supported="CogVideoX_I2V",
        config=lambda heads: cogvideox(
            heads, in_channels=32, use_rotary_positional_embeddings=False, use_learned_positional_embeddings=True
        ),
        inputs=call((2, 32, 3, 6, 10), [600.0] * 2, (2, 9, 48)),
        heads=(3,),  # its positions ask for a width that 3 divides
    ),
    "CogVideoX 1.5, image to video": Case(
        supported="CogVideoX_I2V",
        config=lambda heads: cogvideox(heads, in_channels=32, patch_size_t=2, ofs_embed_dim=64),
        inputs=call((1, 32, 3, 6, 10), [600.0], (1, 9, 48), ofs=torch.tensor([2.0])),
    ),
    "ERNIE-Image": Case(supported="ErnieImage", config=ernie, inputs=call((1, 16, 5, 7), [600.0], (1, 7, 48))),
    "ERNIE-Image, batch 2": Case(
        supported="ErnieImage", config=ernie, inputs=call((2, 16, 5, 7), [600.0] * 2, (2, 2, 48))
    ),
    "HiDream": Case(
        supported="HiDream",
        config=hidream,
        inputs=picture_call(5, 48, y=(1, 32), encoder_hidden_states_llama3=(1, 3, 7, 40)),
    ),
    "HiDream, batch 2": Case(
        supported="HiDream",
        config=hidream,
        inputs=picture_call(1, 48, batch=2, y=(2, 32), encoder_hidden_states_llama3=(2, 3, 1, 40)),
    ),
    "Lens": Case(supported="Lens", config=lens, inputs=call((1, 16, 5, 7), [0.6], (1, 7, 48))),
    "Lens, padded": Case(
        supported="Lens",
        config=lens,
        inputs=call((1, 16, 5, 7), [0.6], (1, 7, 48), attention_mask=torch.tensor([[1] * 5 + [0] * 2])),
    ),
    "Lens, unequal texts": Case(
        supported="Lens",
        config=lens,
        inputs=call((2, 16, 5, 7), [0.6] * 2, (2, 7, 48), attention_mask=torch.tensor([[1] * 5 + [0] * 2, [1] * 7])),
    ),
    "Mochi": Case(
        supported="GenmoMochi",
        config=mochi,
        inputs=call((1, 12, 3, 6, 10), [0.6], (1, 9, 48), attention_mask=_SIX_OF_NINE, num_tokens=6),
    ),
    "Mochi, no padding, batch 2": Case(
        supported="GenmoMochi",
        config=mochi,
        inputs=call((2, 12, 3, 6, 10), [0.6] * 2, (2, 9, 48), attention_mask=torch.ones(2, 9), num_tokens=9),
    ),
    "OmniGen2": Case(supported="Omnigen2", config=omnigen2, inputs=picture_call(7, 48, num_tokens=7)),
    "OmniGen2, references": Case(
        supported="Omnigen2",
        config=omnigen2,
        inputs=picture_call(7, 48, num_tokens=7, ref_latents=[random(1, 16, 6, 8), random(1, 16, 4, 2)]),
    ),
    "Boogu": Case(supported="Boogu", config=boogu, inputs=picture_call(7, 48, num_tokens=7)),
    "Boogu, references": Case(
        supported="Boogu",
        config=boogu,
        inputs=picture_call(2, 48, num_tokens=2, ref_latents=[random(1, 16, 6, 8), random(1, 16, 4, 2)]),
    ),
    "Chroma Radiance": Case(
        supported="ChromaRadiance",
        config=chroma_radiance,
        inputs=call((1, 3, 80, 112), [0.6], (1, 7, 48), guidance=torch.tensor([0.0])),
    ),
    "Ideogram 4, padded": Case(
        supported="Ideogram4",
        config=ideogram4,
        inputs=call((1, 16, 5, 7), [0.6], (1, 7, 48), attention_mask=torch.tensor([[0] * 2 + [1] * 5])),
    ),
    "Ideogram 4, no text": Case(
        supported="Ideogram4",
        config=ideogram4,
        inputs=lambda network: ((random(1, 16, 5, 7), torch.tensor([0.6])), {"context": None}),
    ),
    "JoyImage": Case(supported="JoyImage", config=joy_image, inputs=picture_call(7, 48, frames=True)),
    "JoyImage, references": Case(
        supported="JoyImage",
        config=joy_image,
        inputs=picture_call(2, 48, frames=True, ref_latents=[random(1, 16, 1, 6, 8)]),
    ),
    "Mage-Flow, padded, reference": Case(
        supported="MageFlow",
        config=mage_flow,
        inputs=call(
            (1, 16, 5, 7),
            [0.6],
            (1, 7, 48),
            attention_mask=torch.tensor([[1] * 5 + [0] * 2]),
            ref_latents=[random(1, 16, 3, 4)],
        ),
    ),
    "Ovis-Image": Case(supported="Flux", config=ovis, inputs=flux_call()),
    "FLUX": Case(supported="Flux", config=flux, inputs=flux_call()),
    "FLUX, 2 text tokens, batch 2": Case(supported="Flux", config=flux, inputs=flux_call(text=2, batch=2)),
    "FLUX, references": Case(supported="Flux", config=flux, inputs=flux_call(method="uxo")),
    "FLUX, ControlNet": Case(supported="Flux", config=flux, inputs=flux_call(method="offset", control=True)),
    "FLUX.2, clean references": Case(
        supported="Flux2", config=flux2, inputs=flux_call(method="index_timestep_zero", packed=False)
    ),
    "Chroma, masked": Case(
        supported="Chroma",
        config=chroma,
        inputs=picture_call(7, 48, guidance=torch.tensor([0.0]), attention_mask=_MASKED),
    ),
    "HunyuanVideo": Case(supported="HunyuanVideo", config=hunyuan, inputs=hunyuan_call()),
    "HunyuanVideo, padded": Case(supported="HunyuanVideo", config=hunyuan, inputs=hunyuan_call(padding=5)),
    "HunyuanVideo, first frame, padded": Case(
        supported="HunyuanVideo", config=hunyuan, inputs=hunyuan_call(padding=9, image=True)
    ),
    "HunyuanVideo, reference": Case(
        supported="HunyuanVideo", config=hunyuan, inputs=hunyuan_call(padding=9, reference=True)
    ),
    "HunyuanVideo 1.5": Case(
        supported="HunyuanVideo15",
        config=hunyuan_15,
        inputs=call((1, 12, 3, 3, 5), [600.0], (1, 9, 64), txt_byt5=(1, 5, 1472), clip_fea=(1, 4, 1152)),
    ),
    "Krea 2": Case(supported="Krea2", config=krea2, inputs=picture_call(7, 240)),
    "Krea 2, clean reference": Case(supported="Krea2", config=krea2, inputs=picture_call(7, 240, **_KEPT)),
    "Qwen-Image": Case(supported="QwenImage", config=qwen_image, inputs=picture_call(7, 48, frames=True)),
    "Qwen-Image, padded, clean reference": Case(
        supported="QwenImage",
        config=qwen_image,
        inputs=picture_call(7, 48, frames=True, attention_mask=_FIVE_OF_SEVEN, **_KEPT_FRAME),
    ),
    "Qwen-Image, ControlNet": Case(supported="QwenImage", config=qwen_image, inputs=qwen_control),
    "Kandinsky 5": Case(
        supported="Kandinsky5", config=kandinsky5, inputs=call((1, 16, 3, 6, 10), [600.0], (1, 9, 48), y=(1, 48))
    ),
    "Cosmos Predict 2": Case(
        supported="CosmosT2IPredict2", config=cosmos, inputs=call((1, 16, 3, 6, 10), [[0.1, 0.6, 0.6]], (1, 9, 48))
    ),
    "Anima": Case(supported="Anima", config=anima, inputs=picture_call(9, 1024, frames=True)),
}
"""35 to 73 tokens, most of them odd, so that no number of ranks divides them."""

ONE_OF_EACH_CLASS = (
    "MiniMax H3, references, masks", "LTX-2.3, kept frame, batch 2", "LTXV", "Z-Image", "Wan, a timestep per frame",
    "Wan VACE", "FLUX, ControlNet", "Chroma, masked", "HunyuanVideo, padded", "Krea 2",
    "Qwen-Image, padded, clean reference", "Kandinsky 5", "Cosmos Predict 2", "Anima", "Wan Animate",
    "Wan HuMo, reference", "Wan S2V, reference", "ERNIE-Image", "HiDream", "Lens, padded", "Mochi",
    "OmniGen2, references", "SD3.5 Medium, ControlNet, batch 2",
    "Hunyuan-DiT, ControlNet, batch 2", "Stable Audio, mean of all tokens, batch 2", "Stable Audio 3, inpaint",
    "SeedVR2, batch 2",
)  # fmt: skip
"""For the plain run, but for classes all of whose rules another one has, too: the extended run has each."""


# ---------------------------------------------------------------------------------------------------------- networks


_PERIOD = 65537
"""Values after which those of a large tensor repeat: a prime, so that no two rows are alike."""


def weight(name: str, shape: torch.Size) -> Tensor:
    """A random value, by the tensor's name: results are of order 1, every input shows in them, and attention is
    peaked, so that a key left out or taken twice shows, too."""
    count = math.prod(shape)
    period = _PERIOD if count > 8 * _PERIOD else max(count, 1)
    values = torch.randn(period, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    values = values.repeat(-(-count // period))[:count].reshape(shape)
    last = name.rsplit(".", 1)[-1]
    if re.search(
        r"(q|k|query|key)_?norm\w*\.(weight|scale)$|(norm_(added_)?|ln_)[qk](\.(vid|txt|all))?\.(weight|scale)$", name
    ):
        return 2 + 0.2 * values
    if len(shape) <= 1 or math.prod(shape) == max(shape):
        return ("norm" in name and last in ("weight", "scale", "gamma")) + 0.1 * values
    if last in ("modulation", "scale_shift_table"):
        return 0.4 * values
    return values / math.prod(shape[1:]) ** 0.5


def empty_network(supported: str, config: dict[str, Any], device: str = "meta") -> nn.Module:
    """ComfyUI's network of a configuration, in fp32, without weights."""
    import comfy.supported_models

    model_config: Any = getattr(comfy.supported_models, supported)(dict(config))
    # Sizes that its detection takes for granted, too; but no mark of a kind.
    model_config.unet_config.update({name: value for name, value in config.items() if name != "causal_ar"})
    model_config.set_inference_dtype(torch.float32, None)
    network: nn.Module = model_config.get_model(conditioners(supported, config), device=device).diffusion_model
    return network


def conditioners(supported: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """What a file has beside the network: ComfyUI's models embed Stable Audio's durations."""
    if not supported.startswith("StableAudio"):
        return {}
    from comfy.ldm.audio.embedders import NumberConditioner

    kind = config["timestep_features_type"] if supported == "StableAudio3" else "learned"
    state = NumberConditioner(768, fourier_features_type=kind).state_dict()
    prefix = "conditioner.conditioners.seconds"
    return {
        f"{prefix}_{which}.{name}": weight(name, tensor.shape)
        for which in ("start", "total")
        for name, tensor in state.items()
    }


def network_of(supported: str, config: dict[str, Any]) -> nn.Module:
    """The same with weights."""
    network = empty_network(supported, config, "cpu")
    network.load_state_dict({name: weight(name, tensor.shape) for name, tensor in network.state_dict().items()})
    return network.requires_grad_(False)


def metadata_of(case: Case, heads: int) -> dict[str, str] | None:
    """Of its file's header."""
    return {"config": json.dumps({"transformer": case.config(heads)})} if case.metadata else None


def flat(result: Any) -> Tensor:
    """All values that a network returns."""
    return torch.cat([part.reshape(-1) for part in (result if isinstance(result, list | tuple) else [result])])
