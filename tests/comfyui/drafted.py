"""Classes whose plans the tests draft: constructor's arguments, inputs of forward, the same with a larger latent."""

from __future__ import annotations

from typing import Any

CLASSES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "Flux": (
        {
            "in_channels": 16, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": 48, "hidden_size": 384,
            "mlp_ratio": 4.0, "num_heads": 3, "depth": 2, "depth_single_blocks": 2, "axes_dim": [16, 56, 56],
            "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
        },
        ["y=[1,32]", "guidance=[1]"],
        [],
    ),
    "WanModel": (
        {"dim": 384, "num_heads": 3, "ffn_dim": 128, "num_layers": 2, "text_dim": 48},
        ["timestep=[1,3]"],
        ["timestep=[1,5]"],
    ),
    "NextDiT": (
        {
            "in_channels": 16, "dim": 384, "cap_feat_dim": 48, "n_layers": 3, "qk_norm": True, "n_heads": 3,
            "n_kv_heads": 3, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "z_image_modulation": True,
            "pad_tokens_multiple": 32,
        },
        ["num_tokens=7"],
        [],
    ),
    "PixDiT_T2I": ({}, ["context=[1,7,2304]"], []),
    "HiDreamImageTransformer2DModel": (
        {
            "axes_dims_rope": [64, 32, 32], "caption_channels": [48, 40], "in_channels": 16, "llama_layers": [0, 1],
            "num_attention_heads": 3, "num_routed_experts": 2, "num_activated_experts": 1, "num_layers": 1,
            "num_single_layers": 1, "patch_size": 2, "text_emb_dim": 32,
        },
        ["y=[1,32]", "encoder_hidden_states_llama3=[1,2,5,40]"],
        [],
    ),
    "NoSuchModel": ({}, [], []),
    "OmniGen2Transformer2DModel": ({}, [], []),
}  # fmt: skip
