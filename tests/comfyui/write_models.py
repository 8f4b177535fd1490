"""Writes tiny models of ComfyUI's own classes in its own file layout, with its Python:

python -m tests.comfyui.write_models COMFYUI FOLDER
"""

from __future__ import annotations

import json
import re
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.comfyui import model_files as names
from tests.comfyui import split_models
from tests.comfyui.lora_files import write_lora_files

_PREFIX = "model.diffusion_model."
_TEXT = 64
SCALED_LAYOUTS = ("marker_0", "marker_2", "comfy_quant", "metadata")
"""How files of scaled fp8 name their scales; `marker_N` is the older way, N the marker's count of elements."""
_UNSCALED = ("img_in", "final_layer.linear", "cond_type_embedding", "patch_embed.")

_FLUX2 = (".linear_in.", ".linear_out.", ".to_qkv_mlp_proj.", "single_transformer_blocks.0.attn.to_out.")
"""Of diffusers' names, those of FLUX.2 only."""

# ComfyUI's names of HunyuanVideo's tensors → Tencent's.
_ORIGINAL = [
    (r"^(txt_in\.t_embedder|time_in|guidance_in)\.in_layer\.", r"\1.mlp.0."),
    (r"^(txt_in\.t_embedder|time_in|guidance_in)\.out_layer\.", r"\1.mlp.2."),
    (r"^txt_in\.c_embedder\.in_layer\.", "txt_in.c_embedder.linear_1."),
    (r"^txt_in\.c_embedder\.out_layer\.", "txt_in.c_embedder.linear_2."),
    (r"_attn\.qkv\.", "_attn_qkv."),
    (r"_attn\.proj\.", "_attn_proj."),
    (r"_attn\.norm\.query_norm\.", "_attn_q_norm."),
    (r"_attn\.norm\.key_norm\.", "_attn_k_norm."),
    (r"\.norm\.query_norm\.", ".q_norm."),
    (r"\.norm\.key_norm\.", ".k_norm."),
    (r"_mod\.lin\.", "_mod.linear."),
    (r"\.modulation\.lin\.", ".modulation.linear."),
    (r"(_mlp|\.\d+\.mlp)\.0\.", r"\1.fc1."),
    (r"(_mlp|\.\d+\.mlp)\.2\.", r"\1.fc2."),
]


@dataclass(frozen=True, kw_only=True)
class File:
    """How a file is written."""

    supported: str
    """ComfyUI's entry in `comfy.supported_models`."""
    config: dict[str, Any]
    """What its detection finds."""
    seed: int = 0
    dtype: torch.dtype = torch.float32
    prefix: str = ""
    scaled: str = ""
    """One of SCALED_LAYOUTS, for a file of that kind."""
    scaled_dtype: torch.dtype = torch.float8_e4m3fn
    original_names: bool = False
    marks: tuple[str, ...] = ()
    """Empty tensors that the file has besides."""
    metadata: bool = False
    """The configuration is in its header."""


def hunyuan(*, depth: int = 1, depth_single: int = 1, **more: Any) -> dict[str, Any]:
    return split_models.hunyuan(
        2, depth=depth, depth_single_blocks=depth_single, context_in_dim=_TEXT, in_channels=16, **more
    )


def flux() -> dict[str, Any]:
    return split_models.flux(2, depth=1, depth_single_blocks=1, context_in_dim=_TEXT)


def flux2(**more: Any) -> dict[str, Any]:
    sizes = {"in_channels": 128, "out_channels": 128, "depth": 1, "depth_single_blocks": 1, "context_in_dim": _TEXT}
    return split_models.flux2(2) | sizes | more


def wan(**more: Any) -> dict[str, Any]:
    return split_models.wan(2, ffn_dim=384, **more)


def hunyuan_15() -> dict[str, Any]:
    return split_models.hunyuan_15(2) | {"in_channels": 65, "out_channels": 32, "depth": 2, "context_in_dim": _TEXT}


def cogvideox(heads: int = 2, **more: Any) -> dict[str, Any]:
    sizes = {"time_embed_dim": 96, "text_embed_dim": _TEXT, "sample_height": 60, "sample_width": 90}
    return split_models.cogvideox(heads, **sizes, sample_frames=49, max_text_seq_length=226, **more)


def mochi() -> dict[str, Any]:
    width = 192
    return split_models.mochi(2) | {
        "hidden_size_x": width, "hidden_size_y": 96, "mlp_ratio_x": 12288 / width, "t5_feat_dim": _TEXT,
        "t5_token_length": 256,
    }  # fmt: skip


def ltxv(heads: int, causal: bool = False) -> dict[str, Any]:
    return split_models.ltxv(heads) | {
        "num_layers": 2, "attention_head_dim": 64, "cross_attention_dim": 64 * heads, "caption_channels": _TEXT,
        "causal_temporal_positioning": causal,
    }  # fmt: skip


def qwen_image() -> dict[str, Any]:
    return split_models.qwen_image(2) | {"joint_attention_dim": _TEXT}


def stable_audio_3() -> dict[str, Any]:
    channels = {"io_channels": 256, "local_add_cond_dim": 257}
    return split_models.stable_audio_3(3) | channels | {"cond_token_dim": 768, "project_cond_tokens": True}


_HUNYUAN_KINDS: dict[str, dict[str, Any]] = {
    "hunyuan_video_fp16.safetensors": {"dtype": torch.float16},
    "hunyuan_video_bf16.safetensors": {"dtype": torch.bfloat16},
    "hunyuan_video_fp8.safetensors": {"dtype": torch.float8_e4m3fn},
    "hunyuan_video_scaled_0.safetensors": {"scaled": "marker_0", "dtype": torch.bfloat16},
    "hunyuan_video_scaled_2.safetensors": {"scaled": "marker_2", "original_names": True, "prefix": _PREFIX},
    "hunyuan_video_comfy_quant.safetensors": {"scaled": "comfy_quant"},
    "hunyuan_video_metadata.safetensors": {"scaled": "metadata"},
}
_FLUX_KINDS: dict[str, dict[str, Any]] = {
    "flux_bf16.safetensors": {"dtype": torch.bfloat16, "prefix": _PREFIX},
    "flux_fp8.safetensors": {"dtype": torch.float8_e4m3fn},
    "flux_scaled_0.safetensors": {"scaled": "marker_0", "prefix": _PREFIX},
    "flux_scaled_2.safetensors": {"scaled": "marker_2", "dtype": torch.float16},
    "flux_comfy_quant.safetensors": {"scaled": "comfy_quant", "dtype": torch.bfloat16},
}


def files() -> dict[str, File]:
    """Name → how it is written."""
    video = {"supported": "HunyuanVideo"}
    cog = {"supported": "CogVideoX_I2V"}
    found = {
        names.TINY: File(**video, config=hunyuan()),
        names.DEEP: File(**video, config=hunyuan(depth=8, depth_single=24), seed=1),
        names.ORIGINAL_NAMES: File(**video, config=hunyuan(), seed=2, original_names=True, prefix=_PREFIX),
        names.NO_GUIDANCE: File(**video, config=hunyuan(guidance_embed=False), seed=3),
        names.IMAGE_TO_VIDEO: File(**video, config=hunyuan() | {"in_channels": 33}, seed=4),
        names.FLUX: File(supported="Flux", config=flux()),
        names.WAN: File(supported="WAN21_T2V", config=wan(), prefix=_PREFIX),
        names.WAN_COMFY_QUANT: File(supported="WAN21_T2V", config=wan(), scaled="comfy_quant"),
        names.WAN_I2V: File(supported="WAN21_I2V", config=wan(model_type="i2v", in_dim=36), seed=1),
        names.WAN_22_I2V: File(supported="WAN21_T2V", config=wan(in_dim=36), seed=2),
        names.WAN_22_5B: File(supported="WAN22_T2V", config=wan(in_dim=48, out_dim=48), seed=3),
        names.HUNYUAN_15: File(supported="HunyuanVideo15", config=hunyuan_15(), prefix=_PREFIX),
        names.HUNYUAN_15_SCALED: File(supported="HunyuanVideo15", config=hunyuan_15(), scaled="comfy_quant"),
        names.COGVIDEOX: File(supported="CogVideoX_T2V", config=cogvideox()),
        names.COGVIDEOX_I2V: File(**cog, config=cogvideox() | {"in_channels": 32}, prefix=_PREFIX),
        names.COGVIDEOX_15_I2V: File(**cog, config=cogvideox(patch_size_t=2, ofs_embed_dim=96) | {"in_channels": 32}),
        names.COGVIDEOX_SCALED: File(supported="CogVideoX_T2V", config=cogvideox(), scaled="comfy_quant"),
        names.COGVIDEOX_LEARNED: File(
            supported="CogVideoX_T2V",
            config=cogvideox(3, use_learned_positional_embeddings=True) | {"use_rotary_positional_embeddings": False},
        ),
        names.MOCHI: File(supported="GenmoMochi", config=mochi()),
        names.LTXV: File(supported="LTXV", config=ltxv(2), prefix=_PREFIX, scaled="comfy_quant", metadata=True),
        names.LTXV_CAUSAL: File(supported="LTXV", config=ltxv(3, causal=True), seed=1, metadata=True),
        names.QWEN_IMAGE: File(supported="QwenImage", config=qwen_image()),
        names.QWEN_IMAGE_2511: File(
            supported="QwenImage", config=qwen_image(), seed=1, marks=("__index_timestep_zero__",)
        ),
        names.FLUX2: File(supported="Flux2", config=flux2(), prefix=_PREFIX),
        names.FLUX2_KLEIN: File(supported="Flux2", config=flux2(guidance_embed=False), seed=1, scaled="comfy_quant"),
        names.H3: File(supported="MiniMaxH3", config=split_models.minimax_h3(4)),
        names.LTX23: File(supported="LTXAV", config=split_models.ltx23(4), metadata=True),
        names.PIXART: File(supported="PixArtSigma", config=split_models.pixart()),
        names.SD35: File(supported="SD3", config=split_models.sd3(4) | {"adm_in_channels": 768}, prefix=_PREFIX),
        names.STABLE_AUDIO_3: File(supported="StableAudio3", config=stable_audio_3()),
        names.KREA2: File(supported="Krea2", config=split_models.krea2(4)),
        names.Z_IMAGE: File(supported="Lumina2", config=split_models.lumina(3)),
        names.SEEDVR2: File(supported="SeedVR2", config=split_models.seedvr2(4)),
        names.WAN_CAUSAL: File(supported="WAN21_CausalAR_T2V", config=wan(causal_ar=True), metadata=True),
        names.WAN_VACE: File(supported="WAN21_Vace", config=split_models.wan_vace(3)),
    }
    found |= {name: File(**video, config=hunyuan(), **kind) for name, kind in _HUNYUAN_KINDS.items()}
    return found | {name: File(supported="Flux", config=flux(), **kind) for name, kind in _FLUX_KINDS.items()}


def tensors_of(network: nn.Module, seed: int) -> dict[str, Tensor]:
    """Random weights of a sensible size: N(0, 1/√fan_in), norms near 1, biases near 0.

    NumPy's RandomState stream is frozen for good, so a seed gives the same weights with every version.
    """
    random = np.random.RandomState(seed)
    tensors = {}
    for name, tensor in sorted(network.state_dict().items()):
        values = random.standard_normal(tuple(tensor.shape)).astype(np.float32)
        if tensor.ndim > 1:
            values *= np.prod(tensor.shape[1:]) ** -0.5
        else:
            values = 0.1 * values + ("norm" in name and name.endswith((".weight", ".scale")))
        tensors[name] = torch.from_numpy(np.asarray(values, dtype=np.float32))
    return tensors


def scaled_fp8(
    tensors: dict[str, Tensor], layout: str, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Rounds the weights of linear layers to fp8 with one scale each, but for the first and the last.

    Args:
        tensors: a whole network.
        layout: one of SCALED_LAYOUTS.
        dtype: the fp8 one.

    Returns:
        Tensors and metadata of the file.
    """
    assert layout in SCALED_LAYOUTS, layout
    found: dict[str, Tensor] = {}
    layers: dict[str, dict[str, str]] = {}
    new = layout in ("comfy_quant", "metadata")
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or not name.endswith(".weight") or name.startswith(_UNSCALED):
            found[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        scale = tensor.float().abs().max() / torch.finfo(dtype).max
        found[name] = (tensor / scale).to(dtype)
        found[f"{layer}.{'weight_scale' if new else 'scale_weight'}"] = scale
        found[f"{layer}.{'input_scale' if new else 'scale_input'}"] = torch.tensor(0.5)
        layers[layer] = {"format": str(dtype).removeprefix("torch.")}
        if layout == "comfy_quant":
            found[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(layers[layer]).encode()), dtype=torch.uint8)
    if not new:
        found["scaled_fp8"] = torch.empty(int(layout[-1]), dtype=dtype)
    return found, {"_quantization_metadata": json.dumps({"layers": layers})} if layout == "metadata" else {}


def write(path: Path, file: File) -> None:
    """Writes one file."""
    tensors = tensors_of(split_models.empty_network(file.supported, file.config), file.seed)
    tensors |= split_models.conditioners(file.supported, file.config)
    tensors |= {name: torch.zeros(0) for name in file.marks}
    if file.original_names:
        for pattern, replacement in _ORIGINAL:
            tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    tensors = {name: tensor.to(file.dtype) for name, tensor in tensors.items()}
    metadata = {"config": json.dumps({"transformer": file.config})} if file.metadata else {}
    if file.scaled:
        tensors, more = scaled_fp8(tensors, file.scaled, file.scaled_dtype)
        metadata |= more
    save_file({file.prefix + name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def _write_folder(folder: Path, file: File) -> None:
    """The same weights as diffusers has them in its folders."""
    from comfy.utils import flux_to_diffusers

    tensors = tensors_of(split_models.empty_network(file.supported, file.config), file.seed)
    sizes = {name: file.config[name] for name in ("depth", "depth_single_blocks", "hidden_size")}
    found = {}
    for theirs, ours in flux_to_diffusers(sizes).items():
        name, part, *change = (ours, None) if isinstance(ours, str) else ours
        if name not in tensors or any(part in theirs for part in _FLUX2):
            continue
        tensor = tensors[name] if part is None else tensors[name].narrow(*part)
        for swap in change:
            tensor = swap(tensor)  # of two halves: its own inverse
        found[theirs] = tensor.contiguous()
    folder.mkdir()
    save_file(found, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))


_COGVIDEOX = [
    (r"^blocks\.", "transformer_blocks."),
    (r"\.(q|k|v)\.(weight|bias)$", r".attn1.to_\1.\2"),
    (r"\.norm_(q|k)\.", r".attn1.norm_\1."),
    (r"\.attn_out\.", ".attn1.to_out.0."),
    (r"\.ff_proj\.", ".ff.net.0.proj."),
    (r"\.ff_out\.", ".ff.net.2."),
    (r"^time_embedding_linear_", "time_embedding.linear_"),
]
"""ComfyUI's names of CogVideoX's tensors → diffusers'."""


def _write_cogvideox_folder(folder: Path, file: File) -> None:
    """The same weights in diffusers' names."""
    tensors = tensors_of(split_models.empty_network(file.supported, file.config), file.seed)
    for pattern, replacement in _COGVIDEOX:
        tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    told = {name: value for name, value in file.config.items() if name != "image_model"}
    folder.mkdir()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"_class_name": "CogVideoXTransformer3DModel", **told}))


_LTX_VAE = {
    "dims": 3, "in_channels": 3, "out_channels": 3, "latent_channels": 128, "norm_layer": "pixel_norm", "patch_size": 4,
    "latent_log_var": "uniform", "causal_decoder": False, "encoder_base_channels": 16, "decoder_base_channels": 16,
    "blocks": [["res_x", 1], *([["compress_all", 1], ["res_x", 1]] * 3)],
}  # fmt: skip


_RESIDUALS = {"resblock": "1", "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3, 5]]}
_LTX_SOUND: dict[str, Any] = {
    "audio_vae": {
        "model": {
            "params": {
                "sampling_rate": 16000,
                "ddconfig": {
                    "ch": 8, "out_ch": 2, "ch_mult": [1, 2, 4], "num_res_blocks": 1, "attn_resolutions": [],
                    "in_channels": 2, "resolution": 256, "z_channels": 8, "mel_bins": 64, "norm_type": "pixel",
                    "causality_axis": "height", "mid_block_add_attention": False,
                },
            },
        },
        "preprocessing": {"stft": {"filter_length": 1024, "hop_length": 160}},
    },
    "vocoder": {
        "vocoder": {
            "upsample_rates": [5, 4, 2, 2, 2], "upsample_kernel_sizes": [11, 8, 4, 4, 4],
            "upsample_initial_channel": 64, **_RESIDUALS,
        },
        "bwe": {
            "upsample_rates": [6, 5, 2, 2, 2], "upsample_kernel_sizes": [12, 11, 4, 4, 4],
            "upsample_initial_channel": 64, "input_sampling_rate": 16000, "output_sampling_rate": 48000,
            "hop_length": 80, "n_fft": 512, "num_mels": 64, **_RESIDUALS,
        },
    },
}  # fmt: skip
"""As in the header of LTX-2.3's files."""


def _text_encoders(seed: int) -> dict[str, Tensor]:
    """SDXL's two, tiny, by a checkpoint's names."""
    from comfy.diffusers_convert import convert_text_enc_state_dict_v20
    from tiny_detection import TinySDXLClip

    made = tensors_of(TinySDXLClip(dtype=torch.float32), seed)
    large = convert_text_enc_state_dict_v20(made, "clip_g")
    small = {name: tensor for name, tensor in made.items() if name.startswith("clip_l.transformer.text_model.")}
    renamed = {name.replace("clip_g", "conditioner.embedders.1.model", 1): tensor for name, tensor in large.items()}
    return renamed | {name.replace("clip_l", "conditioner.embedders.0", 1): tensor for name, tensor in small.items()}


def _write_checkpoints(folder: Path) -> None:
    """Networks with what lies beside them in checkpoints."""
    from comfy.ldm.lightricks.vae.audio_vae import AudioVAE
    from comfy.ldm.lightricks.vae.causal_video_autoencoder import VideoVAE
    from comfy.taesd.taesd import TAESD
    from tiny_detection import CLIP_WIDTHS

    def save(name: str, network: dict[str, Tensor], beside: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        named = {_PREFIX + key: tensor for key, tensor in network.items()} | beside
        whole = {key: tensor.contiguous() for key, tensor in named.items()}
        save_file(whole, folder / name, {"config": json.dumps(metadata)} if metadata else {})

    vae = {f"first_stage_model.{name}": tensor for name, tensor in tensors_of(TAESD(), 1).items()}
    unet = tensors_of(split_models.empty_network("SDXL", split_models.sdxl()), 0)
    save(names.SDXL, unet, {**vae, "v_pred": torch.zeros(0)}, {})
    pooled = split_models.sdxl() | {"adm_in_channels": CLIP_WIDTHS["clip_g"] + 6 * 256}
    unet = tensors_of(split_models.empty_network("SDXL", pooled), 3)
    save(names.SDXL_WHOLE, unet, vae | _text_encoders(4), {})

    vae = {f"vae.{name}": tensor for name, tensor in tensors_of(VideoVAE(config=_LTX_VAE), 1).items()}
    sound = tensors_of(AudioVAE({"config": _LTX_SOUND}), 2)
    deviations = "autoencoder.per_channel_statistics.std-of-means"
    sound[deviations] = sound[deviations].abs() + 0.5
    sound = {re.sub("^autoencoder", "audio_vae", name): tensor for name, tensor in sound.items()}
    projection = {
        f"text_embedding_projection.{part}_aggregate_embed.weight": split_models.random(width, 96)
        for part, width in (("video", 128), ("audio", 64))
    }
    config = split_models.ltx23(4)
    network = tensors_of(split_models.empty_network("LTXAV", config), 0)
    metadata = {"transformer": config, "vae": _LTX_VAE, **_LTX_SOUND}
    save(names.LTX23_WHOLE, network, vae | sound | projection, metadata)
    config = split_models.ltx23(32) | {"num_layers": 4}
    large = split_models.empty_network("LTXAV", config).state_dict()
    metadata = {"transformer": config, "vae": _LTX_VAE}
    _write_with_holes(folder / names.LTX23_LARGE, vae, {_PREFIX + name: large[name] for name in large}, metadata)


def _write_with_holes(path: Path, tensors: dict[str, Tensor], holes: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Writes a checkpoint at once, however large: of `holes`, in fp32, the file has nothing, which reads as zeros."""
    header: dict[str, Any] = {"__metadata__": {"config": json.dumps(config)}}
    end = 0
    for name, tensor in (tensors | holes).items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.numpy().tobytes())
        file.truncate(8 + len(text) + end)


def _write_krea_lora(path: Path) -> None:
    layers = {"diffusion_model.blocks.0.attn.wq": (512, 512), "diffusion_model.blocks.2.mlp.up": (1408, 512)}
    lora = {}
    for layer, (rows, columns) in layers.items():
        lora[f"{layer}.lora_A.weight"] = 0.1 * split_models.random(4, columns)
        lora[f"{layer}.lora_B.weight"] = 0.1 * split_models.random(rows, 4)
    save_file(lora, path)


def main(comfyui: str, models: Path) -> None:
    """Fills a ComfyUI models folder."""
    from parallel.comfyui.start import prepare

    prepare(comfyui, {"cpu": True})
    sys.path.append(str(Path(__file__).parent / "test_pack"))
    import comfy.ldm.genmo.joint_model.asymm_models_joint as mochi

    # Mochi's blocks take the released width for granted, see `test_pack.tiny_detection`.
    feed_forward = mochi.FeedForward
    mochi.FeedForward = lambda **options: feed_forward(**options | {"hidden_size": 4 * options["in_features"]})
    folder = models / "diffusion_models"
    for name, file in files().items():
        write(folder / name, file)
    _write_folder(folder / names.FLUX_FOLDER, files()[names.FLUX])
    _write_cogvideox_folder(folder / names.COGVIDEOX_FOLDER, files()[names.COGVIDEOX])
    _write_checkpoints(models / "checkpoints")
    write_lora_files(models / "loras")
    _write_krea_lora(models / "loras" / names.LORA)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
