"""Plans of ComfyUI's diffusion models, by class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..split.chain import Chain
from ..split.rules import (
    Before,
    Behind,
    BehindWhole,
    Cropped,
    Frames,
    Grid,
    Grouped,
    Guides,
    Last,
    Own,
    OwnGroups,
    Ranges,
    Residuals,
    SampleLengths,
    Segment,
    Tokens,
    Trimmed,
    WholeGroups,
)
from ..split.sites import LOCAL, Plan, Site

A, I, J, T, V = ("audio",), ("image",), ("joint",), ("text",), ("video",)  # noqa: E741
R = ("reference",)
TI, IT, TV, VT = (*T, *I), (*I, *T), (*T, *V), (*V, *T)
CONTROL = Site(cut={"control": Residuals(Tokens(I))})

MINIMAX_H3: Plan = {
    "blocks": Site(
        cut={"x": Tokens(J, 0), "mod_segments": Ranges(J), "rope_freqs": Tokens(J, 1)},
        whole="t_emb",
        attention={"": (J, J)},
    ),
    "final_layer": Site(
        cut={"video_seg": Segment("video", J), "audio_seg": Segment("audio", J)},
        whole="x t_emb",
        join=(Segment("video", J), Segment("audio", J)),
    ),
}

LTX2: Plan = {
    "transformer_blocks": Site(
        cut={
            "x": (Tokens(V), Tokens(A)),
            "v_timestep": Frames("video"),
            "a_timestep": Tokens(A),
            "v_pe": (Tokens(V), None),
            "a_pe": (Tokens(A), None),
            "v_cross_pe": (Tokens(V), None),
            "a_cross_pe": (Tokens(A), None),
            "v_cross_scale_shift_timestep": Frames("video"),
            "a_cross_scale_shift_timestep": Tokens(A),
            "v_cross_gate_timestep": Frames("video"),
            "a_cross_gate_timestep": Tokens(A),
            "self_attention_mask?": Guides(),
        },
        whole="v_context a_context attention_mask v_prompt_timestep? a_prompt_timestep?",
        attention={
            "attn1": (V, V),
            "audio_attn1": (A, A),
            "audio_to_video_attn": (V, A),
            "video_to_audio_attn": (A, V),
        },
        join=(Tokens(V), Tokens(A)),  # here, since the model cuts reference audio off by its whole length
    ),
}

LTXV: Plan = {
    "transformer_blocks": Site(
        cut={"x": Tokens(V), "timestep": Tokens(V), "pe": (Tokens(V), None), "self_attention_mask?": Guides()},
        whole="context attention_mask prompt_timestep?",
        attention={"attn1": (V, V)},
        join=Tokens(V),
    ),
}

LUMINA: Plan = {  # Z-Image, too
    "noise_refiner": Site(
        cut={"x": Tokens(I), "freqs_cis": Tokens(I), "timestep_zero_index?": Ranges(I)},
        whole="x_mask adaln_input",
        attention={"": (I, I)},
        join=Tokens(I),  # here, since the model counts the text by the length of the whole
    ),
    "layers": Site(
        cut={"x": Tokens(J), "freqs_cis": Tokens(J), "timestep_zero_index?": Ranges(J)},
        whole="x_mask adaln_input",
        attention={"": (J, J)},
    ),
    "final_layer": Site(cut={"timestep_zero_index?": Ranges(J)}, whole="x c", join=Tokens(J)),
}

_WAN = Site(
    cut={"x": Tokens(V), "e": Grouped("video", 4), "freqs": Tokens(V)},
    whole="context context_img_len?",
    attention={"self_attn": (V, V)},
)
WAN: Plan = {"blocks": _WAN, "head": Site(cut={"e": Grouped("video", 3)}, whole="x", join=Tokens(V))}
WAN_VACE: Plan = {**WAN, "vace_blocks": replace(_WAN, cut={"c": Tokens(V), **_WAN.cut})}
WAN_ANIMATE: Plan = {  # a face's motion, for the tokens of its frame
    **WAN,
    "face_adapter.fuser_blocks": Site(
        cut={"motion_vec": OwnGroups("video"), "x": WholeGroups("video")}, whole="", join_each=WholeGroups("video")
    ),
}
WAN_HUMO: Plan = {  # 16 audio tokens, for the video tokens of their frame
    **WAN,
    "blocks": replace(_WAN, whole="context context_img_len? audio"),
    "blocks.*.audio_cross_attn_wrapper": Site(
        cut={"audio": OwnGroups("video", 16), "x": WholeGroups("video")}, whole="", join_each=WholeGroups("video")
    ),
}
_SOUND = Site(  # audio for the tokens of its frame; reference tokens follow
    cut={
        "audio_emb": OwnGroups("video", until="seq_len"),
        "audio_emb_global": OwnGroups("video", until="seq_len"),
        "x": WholeGroups("video"),
        "seq_len": WholeGroups("video"),
    },
    whole="block_id scale?",
    join_each=WholeGroups("video"),
)
WAN_S2V: Plan = {
    "blocks": replace(_WAN, cut={**_WAN.cut, "e": Grouped("video", 4, cut_off=True)}),
    "audio_injector": _SOUND,
    "head": Site(cut={"e": Grouped("video", 3, cut_off=True)}, whole="x", join=Tokens(V)),
}
WAN_DANCER: Plan = {**WAN, "music_injector": _SOUND, "head_global": WAN["head"]}

FLUX: Plan = {  # Chroma, too
    "": CONTROL,
    "double_blocks": Site(
        cut={
            "img": Tokens(I),
            "txt": Tokens(T),
            "pe": Tokens(TI, 2),
            "modulation_dims_img?": Ranges(I),
        },
        whole="vec attn_mask",
        attention={"": (TI, TI)},
    ),
    "single_blocks": Site(
        cut={
            "x": Tokens(TI),
            "pe": Tokens(TI, 2),
            "modulation_dims?": Ranges(TI, behind="text"),
        },
        whole="vec attn_mask",
        attention={"": (TI, TI)},
    ),
    "final_layer": Site(cut={"modulation_dims?": Ranges(I)}, whole="x vec", join=Tokens(I)),
}

CHROMA_RADIANCE: Plan = {
    **{name: site for name, site in FLUX.items() if name != "final_layer"},
    "single_blocks": replace(FLUX["single_blocks"], join=Behind("text", Tokens(I))),  # pixels follow
}

HUNYUAN_DIT: Plan = {
    "": CONTROL,
    "blocks": Site(
        cut={"x": Tokens(I), "freq_cis_img": (Tokens(I, 0), Tokens(I, 0)), "skip": Tokens(I)},
        whole="c text_states",
        attention={"attn1": (I, I)},
    ),
    "final_layer": Site(join=Tokens(I)),
}

HUNYUAN_VIDEO: Plan = {
    "": CONTROL,
    "double_blocks": Site(
        cut={
            "img": Tokens(I),
            "attn_mask": Trimmed(TI),
            "txt": Tokens(T),
            "pe": Tokens(TI, 2),
            "modulation_dims_img": Ranges(I),
            "modulation_dims_txt": Ranges(T),
        },
        whole="vec",
        attention={"": (TI, TI)},
    ),
    "single_blocks": Site(
        cut={
            "attn_mask": Trimmed(TI),
            "x": Tokens(TI),
            "pe": Tokens(TI, 2),
            "modulation_dims": Ranges(TI),
        },
        whole="vec",
        attention={"": (TI, TI)},
        join=Behind("text", Tokens(I)),  # here, since the model cuts a reference off by its whole length
    ),
}

HUNYUAN_VIDEO_15: Plan = {
    "": CONTROL,
    "double_blocks": replace(HUNYUAN_VIDEO["double_blocks"], join=(Tokens(I), None)),
}

AURA_FLOW: Plan = {
    "double_layers": Site(cut={"c": Tokens(T), "x": Tokens(I)}, whole="global_cond", attention={"": (TI, TI)}),
    "single_layers": Site(cut={"cx": Tokens(TI)}, whole="global_cond", attention={"": (TI, TI)}),
    "final_linear": Site(join=Tokens(I)),
}

SD3: Plan = {
    "": CONTROL,
    "joint_blocks": Site(
        positional="context x",
        cut={"context": Tokens(T), "x": Tokens(I)},
        whole="c use_checkpoint",
        attention={"": [(TI, TI), (I, I)]},  # SD3.5 Medium has the second one, too
    ),
    "final_layer": Site(join=Tokens(I)),
}

COGVIDEOX: Plan = {
    "blocks": Site(
        cut={
            "hidden_states": Tokens(V),
            "encoder_hidden_states": Tokens(T),
            "image_rotary_emb": (Tokens(V, 0), Tokens(V, 0)),
        },
        whole="temb",
        attention={"": (TV, TV)},
    ),
    "proj_out": Site(join=Tokens(V)),
}

ERNIE_IMAGE: Plan = {
    "layers": Site(
        cut={"x": Tokens(J), "rotary_pos_emb": Tokens(J)},
        whole="temb",
        attention={"self_attention": (J, J)},
    ),
    "final_linear": Site(join=Tokens(J)),
}

_HIDREAM = Site(whole="adaln_input", attention={"": (IT, IT)})
HIDREAM: Plan = {  # between the blocks the model appends another text to the first: there the text is whole
    "double_stream_blocks": replace(
        _HIDREAM,
        cut={"image_tokens": Tokens(I), "text_tokens": Tokens(T), "rope": Tokens(IT)},
        join_each=(None, Tokens(T)),
    ),
    "single_stream_blocks": replace(
        _HIDREAM,
        cut={"image_tokens": Behind("image", Tokens(T)), "rope": Tokens(IT)},
        join_each=Behind("image", Tokens(T)),
    ),
    "final_layer": Site(join=Tokens(I)),
}

_LENS = {
    "hidden_states": Tokens(I),
    "attention_mask": Trimmed(IT, stays_whole=False),
    "encoder_hidden_states": Tokens(T),
}
LENS: Plan = {
    "transformer_blocks": Site(
        cut={**_LENS, "freqs_cis": Tokens(IT, 2)},
        whole="temb",
        attention={"": (IT, IT)},
    ),
    "proj_out": Site(join=Tokens(I)),
}

MOCHI: Plan = {
    "blocks": Site(
        cut={
            "x": Tokens(V),
            "crop_y": Cropped("text", of="y"),
            "y": Tokens(T),
            "rope_cos": Tokens(V, 0),
            "rope_sin": Tokens(V, 0),
        },
        whole="c",
        attention={"": (VT, VT)},
    ),
    "final_layer": Site(join=Tokens(V)),
}


def _omnigen2(streams: tuple[str, ...], join: Any = None) -> Site:
    return Site(
        cut={"hidden_states": Tokens(streams), "image_rotary_emb": Tokens(streams)},
        whole="attention_mask temb",
        attention={"": (streams, streams)},
        join=join,
    )


OMNIGEN2: Plan = {
    "noise_refiner": _omnigen2(I, Tokens(I)),
    "ref_image_refiner": _omnigen2(R, Tokens(R)),
    "layers": _omnigen2(J),
    "norm_out": Site(join=Tokens(J)),
}

M = ("images",)
TM = (*T, *M)
BOOGU: Plan = {
    "noise_refiner": OMNIGEN2["noise_refiner"],
    "ref_image_refiner": OMNIGEN2["ref_image_refiner"],
    "double_stream_layers": Site(
        cut={
            "img_hidden_states": Tokens(M),  # references and noise
            "instruct_hidden_states": Tokens(T),
            "joint_rotary_emb": Tokens(TM),
            "img_rotary_emb": Tokens(M),
        },
        whole="temb joint_attention_mask img_attention_mask",
        attention={"img_instruct_attn.processor": (TM, TM), "img_self_attn": (M, M)},
    ),
    "single_stream_layers": _omnigen2(TM),
    "norm_out": Site(join=Tokens(TM)),
}

IDEOGRAM4: Plan = {
    "layers": Site(cut={"x": Tokens(J), "freqs_cis": Tokens(J)}, whole="attn_mask adaln_input", attention={"": (J, J)}),
    "final_layer": Site(join=Tokens(J)),
}

JOY_IMAGE: Plan = {
    "double_blocks": Site(
        cut={"hidden_states": Tokens(I), "encoder_hidden_states": Tokens(T), "image_rotary_emb": Tokens(I)},
        whole="temb",
        attention={"": (IT, IT)},
        join=(Tokens(I), None),  # here, since the model cuts references off by their whole length
    ),
}

_STABLE_AUDIO = Site(
    cut={"x": Tokens(A), "rotary_pos_emb": (Tokens(A, 0), None), "local_add_cond": Last(A)},
    whole="global_cond context",
    attention={"self_attn": (A, A)},
    join=Tokens(A),  # here, since the model cuts off what it has put before the latent
)
STABLE_AUDIO: Plan = {"transformer.layers": _STABLE_AUDIO}
STABLE_AUDIO_SCALED: Plan = {  # after `to_out` each attention takes the mean of all tokens
    "transformer.layers": _STABLE_AUDIO,
    **{f"transformer.layers.*.{name}.to_out": Site(join_each=Tokens(A)) for name in ("self_attn", "cross_attn")},
    **{f"transformer.layers.*.{name}": Site(join_each=Own(Tokens(A))) for name in ("self_attn", "cross_attn")},
}

KREA2: Plan = {
    "blocks": Site(
        cut={"x": Tokens(J), "freqs": Tokens(J, 2), "timestep_zero_index?": Before(J)},
        whole="vec mask?",
        attention={"": (J, J)},
    ),
    "last": Site(join=Tokens(J)),
}

QWEN_IMAGE: Plan = {
    "": CONTROL,
    "transformer_blocks": Site(
        cut={
            "hidden_states": Tokens(I),
            "encoder_hidden_states_mask": Trimmed(T),
            "encoder_hidden_states": Tokens(T),
            "image_rotary_emb": Tokens(TI, 2),
            "timestep_zero_index?": Before(I),
        },
        whole="temb",
        attention={"": (TI, TI)},
    ),
    "proj_out": Site(join=Tokens(I)),
}

QWEN_IMAGE_21: Plan = {  # text and references do not see the image: every rank computes them
    "transformer_blocks": Site(
        cut={"x": BehindWhole("prefix", "prefix_len", Tokens(I)), "pe": BehindWhole("prefix", "prefix_len", Tokens(I))},
        whole="mod attn_fn prefix_len",
        attention={"": [(I, ("prefix", *I)), LOCAL]},
        by_name=True,
    ),
    "proj_out": Site(join=Tokens(I)),
}

KANDINSKY5: Plan = {
    "visual_transformer_blocks": Site(
        cut={"visual_embed": Tokens(V), "freqs": Tokens(V)},
        whole="text_embed time_embed",
        attention={"self_attention": (V, V)},
        join=Tokens(V),
    ),
}

COSMOS_PREDICT2: Plan = {  # Anima, too
    "blocks": Site(
        cut={
            "x_B_T_H_W_D": Grid("video"),
            "emb_B_T_D": Grouped("video", 3),
            "rope_emb_L_1_1_D": Tokens(V),
            "adaln_lora_B_T_3D": Grouped("video", 3),
            "extra_per_block_pos_emb": Grid("video"),
        },
        whole="crossattn_emb",
        attention={"self_attn": (V, V)},
        join=Grid("video"),
    ),
}

SEEDVR2: Plan = {  # it attends in windows, whose tokens may be any rank's: every rank computes all windows
    "blocks": Site(cut={"vid": Tokens(V, 0)}, whole="txt vid_shape txt_shape emb cache"),
    "blocks.*.ada": Site(
        cut={"hid_len": SampleLengths("vid", "video")}, whole="vid txt layer mode emb cache branch_tag"
    ),
    "blocks.*.attn.proj_qkv": Site(join_each=(Tokens(V, 0), None)),
    "blocks.*.attn.proj_out": Site(cut={"vid": Tokens(V, 0)}, whole="txt"),
    "vid_out.proj": Site(join=Tokens(V, 0)),
}


@dataclass(frozen=True, slots=True)
class ByModel:
    """Plans of a class whose networks differ."""

    plans: tuple[Plan, ...]
    choose: Callable[[Any], int]
    """Returns the index of the plan of a network."""


PLANS: Mapping[str, Plan | ByModel] = {
    "Anima": COSMOS_PREDICT2,
    "AnimateWanModel": WAN_ANIMATE,
    "AsymmDiTJoint": MOCHI,
    "AudioDiffusionTransformer": ByModel(
        (STABLE_AUDIO, STABLE_AUDIO_SCALED), lambda network: network.transformer.layers[0].self_attn.feat_scale
    ),
    "BooguTransformer2DModel": BOOGU,
    "CameraWanModel": WAN,
    "Chroma": FLUX,
    "ChromaRadiance": CHROMA_RADIANCE,
    "CogVideoXTransformer3DModel": COGVIDEOX,
    "ErnieImageModel": ERNIE_IMAGE,
    "Flux": FLUX,
    "HiDreamImageTransformer2DModel": HIDREAM,
    "HumoWanModel": WAN_HUMO,
    "HunYuanDiT": HUNYUAN_DIT,
    "HunyuanVideo": ByModel((HUNYUAN_VIDEO_15, HUNYUAN_VIDEO), lambda network: bool(len(network.single_blocks))),
    "Ideogram4Transformer2DModel": IDEOGRAM4,
    "JoyImageTransformer3DModel": JOY_IMAGE,
    "Kandinsky5": KANDINSKY5,
    "LTXAVModel": LTX2,
    "LTXVModel": LTXV,
    "LensTransformer2DModel": LENS,
    "MMDiT": AURA_FLOW,
    "MageFlowTransformer2DModel": QWEN_IMAGE,
    "MiniMaxH3Model": MINIMAX_H3,
    "MiniTrainDIT": COSMOS_PREDICT2,
    "NaDiT": SEEDVR2,
    "NextDiT": LUMINA,
    "OmniGen2Transformer2DModel": OMNIGEN2,
    "OpenAISignatureMMDITWrapper": SD3,
    "QwenImage21Transformer2DModel": QWEN_IMAGE_21,
    "QwenImageTransformer2DModel": QWEN_IMAGE,
    "SingleStreamDiT": KREA2,
    "SCAIL2WanModel": WAN,
    "SCAILWanModel": WAN,
    "VaceWanModel": WAN_VACE,
    "WanDancerModel": WAN_DANCER,
    "WanModel": WAN,
    "WanModel_S2V": WAN_S2V,
}
"""Maps classes to their plan or plans."""

_FLUX_CHAIN = Chain(
    blocks={"double_blocks": "img txt", "single_blocks": "x"},
    hidden="img",
    leave="final_layer.x",
    modulated="img_attn.qkv",
)
_COSMOS_CHAIN = Chain(blocks={"blocks": "x_B_T_H_W_D"}, hidden="x_B_T_H_W_D")
_WAN_CHAIN = Chain(blocks={"blocks": "x"}, hidden="x", leave="head.x", modulated="e")
CHAINS: Mapping[str, Chain] = {
    "Anima": _COSMOS_CHAIN,
    "AsymmDiTJoint": Chain(blocks={"blocks": "x y"}, hidden="x", modulated="attn.qkv_x"),
    "AudioDiffusionTransformer": Chain(blocks={"transformer.layers": "x"}, hidden="x"),
    "Chroma": _FLUX_CHAIN,
    "CogVideoXTransformer3DModel": Chain(
        blocks={"blocks": "hidden_states encoder_hidden_states"}, hidden="hidden_states", modulated="temb"
    ),
    "Flux": _FLUX_CHAIN,
    "HunYuanDiT": Chain(blocks={"blocks": "x"}, hidden="x"),
    "HunyuanVideo": replace(_FLUX_CHAIN, leave=""),
    "Kandinsky5": Chain(blocks={"visual_transformer_blocks": "visual_embed"}, hidden="visual_embed"),
    "LTXAVModel": Chain(blocks={"transformer_blocks": "x"}, hidden="x"),
    "LTXVModel": Chain(blocks={"transformer_blocks": "x"}, hidden="x", modulated="attn1"),
    "MiniMaxH3Model": Chain(blocks={"blocks": "x"}, hidden="x", leave="final_layer.x"),
    "MiniTrainDIT": _COSMOS_CHAIN,
    "NextDiT": Chain(blocks={"layers": "x"}, hidden="x", leave="final_layer.x"),
    "OpenAISignatureMMDITWrapper": Chain(blocks={"joint_blocks": "context x"}, hidden="x", leave="final_layer.x"),
    "QwenImageTransformer2DModel": Chain(
        blocks={"transformer_blocks": "encoder_hidden_states hidden_states"}, hidden="hidden_states"
    ),
    "SingleStreamDiT": Chain(blocks={"blocks": "x"}, hidden="x", leave="last.x"),
    "VaceWanModel": replace(_WAN_CHAIN, beside={"vace_blocks": "c c"}),
    "WanModel": _WAN_CHAIN,
}
"""Maps classes to the blocks that caches between steps may skip; a class without an entry has none."""

_HANDED_ON: Mapping[str, Mapping[str, str]] = {
    **dict.fromkeys((name for name in PLANS if "Wan" in name), _WAN_CHAIN.blocks),
    "ChromaRadiance": _FLUX_CHAIN.blocks,
    "JoyImageTransformer3DModel": {"double_blocks": "hidden_states encoder_hidden_states"},
    "Kandinsky5": {},  # calls the function that replaces a block with arguments that its blocks do not take
    "LensTransformer2DModel": {"transformer_blocks": "encoder_hidden_states hidden_states"},
    "MMDiT": {"double_layers": "c x", "single_layers": "cx"},
    "MageFlowTransformer2DModel": {"transformer_blocks": "encoder_hidden_states hidden_states"},
}
"""Maps classes to entries in the form of `Chain.blocks`, which take precedence over those of their chains."""


def handed_on(name: str) -> Mapping[str, str]:
    """Maps each list of blocks to the arguments that are returned as a block's results when a node skips it; empty if
    none can be skipped.

    Args:
        name: name of the network's class.
    """
    chain = CHAINS.get(name)
    return _HANDED_ON.get(name, {} if chain is None else chain.blocks)


@dataclass(frozen=True, slots=True)
class Described:
    """Description of a model for users."""

    title: str
    makes: tuple[str, ...]
    verified: str
    """Comparison with ComfyUI's own model in the tests: whole samplings in a server, or single calls of the network."""
    compiled: bool = True
    """True if its blocks are compiled; false where they receive no `transformer_options`."""
    teacache: str = ""
    """Models of the class that have a published polynomial."""


_SAMPLED, _CALLED, _UNRUN = "samplings", "calls", "not yet: newer than 0.33"
DESCRIBED: Mapping[str, Described] = {
    "MiniMaxH3Model": Described("MiniMax H3", ("T2V", "I2V", "edit"), _SAMPLED),
    "LTXAVModel": Described("LTX-2, 2.3, with audio", ("T2V", "I2V"), _SAMPLED),
    "NextDiT": Described("Z-Image, Omni, Lumina 2", ("T2I", "edit"), _SAMPLED),
    "SingleStreamDiT": Described("Krea 2", ("T2I", "edit"), _SAMPLED),
    "VaceWanModel": Described("Wan 2.1 VACE", ("T2V", "I2V", "edit"), _SAMPLED),
    "Flux": Described("FLUX.1, FLUX.2, Kontext, Klein", ("T2I", "edit"), _SAMPLED, teacache="FLUX.1"),
    "WanModel": Described("Wan 2.1, 2.2", ("T2V", "I2V"), _SAMPLED, teacache="2.1"),
    "QwenImageTransformer2DModel": Described("Qwen-Image, Edit, Layered", ("T2I", "edit"), _SAMPLED),
    "QwenImage21Transformer2DModel": Described("Qwen-Image 2.1", ("T2I", "edit"), _UNRUN, compiled=False),
    "HunyuanVideo": Described("HunyuanVideo, 1.5", ("T2V", "I2V"), _SAMPLED, teacache="the first"),
    "LTXVModel": Described("LTX-Video", ("T2V", "I2V"), _SAMPLED, teacache="0.9.1"),
    "AsymmDiTJoint": Described("Mochi 1", ("T2V",), _SAMPLED, teacache="yes"),
    "CogVideoXTransformer3DModel": Described("CogVideoX 2B, 5B, 1.5", ("T2V", "I2V"), _SAMPLED, teacache="yes"),
    "OpenAISignatureMMDITWrapper": Described("Stable Diffusion 3, 3.5", ("T2I",), _SAMPLED),
    "AnimateWanModel": Described("Wan 2.2 Animate", ("I2V",), _CALLED),
    "WanModel_S2V": Described("Wan 2.2 S2V", ("I2V",), _CALLED),
    "HumoWanModel": Described("HuMo", ("T2V", "I2V"), _CALLED),
    "CameraWanModel": Described("Wan 2.1, 2.2 Fun Camera", ("I2V",), _CALLED),
    "SCAILWanModel": Described("SCAIL", ("I2V",), _CALLED),
    "SCAIL2WanModel": Described("SCAIL-2", ("I2V",), _SAMPLED),
    "WanDancerModel": Described("WanDancer", ("I2V",), _CALLED),
    "HiDreamImageTransformer2DModel": Described("HiDream I1, E1", ("T2I", "edit"), _CALLED),
    "OmniGen2Transformer2DModel": Described("OmniGen2", ("T2I", "edit"), _CALLED),
    "ErnieImageModel": Described("ERNIE-Image", ("T2I",), _CALLED, compiled=False),
    "Ideogram4Transformer2DModel": Described("Ideogram 4", ("T2I",), _CALLED),
    "JoyImageTransformer3DModel": Described("JoyImage", ("T2I", "edit"), _CALLED),
    "BooguTransformer2DModel": Described("Boogu", ("T2I", "edit"), _CALLED),
    "MageFlowTransformer2DModel": Described("Mage-Flow", ("T2I", "edit"), _CALLED),
    "LensTransformer2DModel": Described("Lens", ("T2I",), _CALLED),
    "HunYuanDiT": Described("Hunyuan-DiT", ("T2I",), _CALLED, compiled=False),
    "MMDiT": Described("AuraFlow", ("T2I",), _CALLED),
    "Chroma": Described("Chroma", ("T2I",), _CALLED),
    "ChromaRadiance": Described("Chroma Radiance", ("T2I",), _CALLED),
    "Kandinsky5": Described("Kandinsky 5", ("T2V", "T2I"), _CALLED),
    "AudioDiffusionTransformer": Described("Stable Audio", ("T2A",), _SAMPLED),
    "MiniTrainDIT": Described("Cosmos Predict 2", ("T2I", "I2V"), _CALLED),
    "Anima": Described("Anima", ("T2I",), _CALLED),
    "NaDiT": Described("SeedVR2", ("upscale",), _SAMPLED),
}
"""Maps classes to the descriptions of their models."""

METHODS: Mapping[str, tuple[str, ...]] = {
    "Anima": ("preprocess_text_embeds",),
    "LTXAVModel": ("preprocess_text_embeds",),
    "MiniMaxH3Model": ("preprocess_text_embeds",),
}
"""Maps classes to the methods that ComfyUI calls besides `forward`, and which need weights."""

READ: Mapping[str, tuple[str, ...]] = {"NaDiT": ("positive_conditioning", "negative_conditioning")}
"""Maps classes to small buffers that ComfyUI's nodes read from the network."""

BY_HALVES = ("NaDiT",)
"""Classes whose networks swap the halves of a batch with both prompts, so that its samples cannot be distributed."""


def plan_of(network: Any) -> Plan:
    """Returns the plan of a network; empty if its class has none: then samples and prompts run side by side, and
    nothing else is split."""
    if (plan := PLANS.get(type(network).__name__)) is None:
        return {}
    return plan.plans[plan.choose(network)] if isinstance(plan, ByModel) else plan


def takes_control(plan: Plan) -> bool:
    """Returns True if the plan cuts a ControlNet's residuals, or, being empty, need not."""
    return not plan or ("" in plan and "control" in plan[""].cut)
