"""Plans of diffusers' transformers, by class."""

from __future__ import annotations

from collections.abc import Mapping

from ..split.chain import Chain
from ..split.rules import Before, Grouped, Residuals, Tokens, Trimmed
from ..split.sites import Plan, Site

I, T, V = ("image",), ("text",), ("video",)  # noqa: E741
TI, VT = (*T, *I), (*V, *T)

FLUX: Plan = {
    "": Site(
        cut={
            "controlnet_block_samples": Residuals(Tokens(I)),
            "controlnet_single_block_samples": Residuals(Tokens(I)),
        }
    ),
    "transformer_blocks": (
        _BLOCK := Site(
            cut={
                "hidden_states": Tokens(I),
                "encoder_hidden_states": Tokens(T),
                "image_rotary_emb": (Tokens(TI, 0), Tokens(TI, 0)),
            },
            whole="temb joint_attention_kwargs",
            attention={"attn": (TI, TI)},
        )
    ),
    "single_transformer_blocks": _BLOCK,
    "proj_out": Site(join=Tokens(I)),
}


def _hunyuan_block(positions: str) -> Site:
    return Site(
        cut={
            "hidden_states": Tokens(V),
            "attention_mask": Trimmed(VT),
            "encoder_hidden_states": Tokens(T),
            positions: (Tokens(V, 0), Tokens(V, 0)),
            "num_tokens?": Before(V),
        },
        whole="temb token_replace_emb? args?",  # the plain blocks accept these and ignore them
        attention={"attn": (VT, VT)},
    )


HUNYUAN_VIDEO: Plan = {
    "transformer_blocks": _hunyuan_block("freqs_cis"),
    "single_transformer_blocks": _hunyuan_block("image_rotary_emb"),
    "proj_out": Site(join=Tokens(V)),
}

WAN: Plan = {
    "blocks": Site(
        cut={
            "hidden_states": Tokens(V),
            "temb": Grouped("video", 4),
            "rotary_emb": (Tokens(V), Tokens(V)),
        },
        whole="encoder_hidden_states",
        attention={"attn1": (V, V)},
        join=Tokens(V),  # here, since a modulation per token follows
    ),
}

COGVIDEOX: Plan = {
    "transformer_blocks": Site(
        cut={
            "hidden_states": Tokens(V),
            "encoder_hidden_states": Tokens(T),
            "image_rotary_emb": (Tokens(V, 0), Tokens(V, 0)),
        },
        whole="temb attention_kwargs",
        attention={"attn1": ((*T, *V), (*T, *V))},
    ),
    "proj_out": Site(join=Tokens(V)),
}

PLANS: Mapping[str, Plan] = {
    "CogVideoXTransformer3DModel": COGVIDEOX,
    "FluxTransformer2DModel": FLUX,
    "HunyuanVideoTransformer3DModel": HUNYUAN_VIDEO,
    "WanTransformer3DModel": WAN,
}
"""Maps classes to plans."""

CHANNELS_DIM: Mapping[str, int] = {"CogVideoXTransformer3DModel": 2, "FluxTransformer2DModel": -1}
"""Maps classes to the dim of their latent that has the channels, if it is not dim 1."""

CHAINS: Mapping[str, Chain] = {
    "CogVideoXTransformer3DModel": Chain(
        blocks={"transformer_blocks": "hidden_states encoder_hidden_states"}, hidden="hidden_states", modulated="temb"
    ),
    "FluxTransformer2DModel": Chain(
        blocks={
            "transformer_blocks": "encoder_hidden_states hidden_states",
            "single_transformer_blocks": "encoder_hidden_states hidden_states",
        },
        hidden="hidden_states",
    ),
    "HunyuanVideoTransformer3DModel": Chain(
        blocks={
            "transformer_blocks": "hidden_states encoder_hidden_states",
            "single_transformer_blocks": "hidden_states encoder_hidden_states",
        },
        hidden="hidden_states",
    ),
    "WanTransformer3DModel": Chain(blocks={"blocks": "hidden_states"}, hidden="hidden_states", modulated="temb"),
}
"""Maps classes to the blocks that caches between steps may skip; see `plans.comfyui.CHAINS`."""
