"""ComfyUI's nodes between the loader and the sampler: each works with the pack's MODEL, or is refused by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tests.comfyui import model_files
from tests.comfyui.graphs import GraphBuilder, Link, Setting, Swapped, Text, add_sampling, with_audio

WHOLE = {"start_percent": 0.0, "end_percent": 1.0}
TEXT = Text(width=4096)


def texts(width: int, **more: Any) -> dict[str, Text]:
    return {"positive": Text(width=width, **more), "negative": Text(seed=12, tokens=5, width=width)}


VIDEO = Setting(cfg=4.0)  # HunyuanVideo: one block of each kind
FLUX = Setting(checkpoint=model_files.FLUX, picture=True, cfg=4.0)
WAN = Setting(checkpoint=model_files.WAN, length=9, cfg=4.0, **texts(4096))
LONG = Setting(checkpoint=model_files.WAN, length=25, positive=TEXT, negative=TEXT)
QWEN = Setting(checkpoint=model_files.QWEN_IMAGE, picture=True, width=72, cfg=4.0)
SD35 = Setting(checkpoint=model_files.SD35, picture=True, width=112, height=80, cfg=4.0, **texts(48))
H3 = Setting(
    checkpoint=model_files.H3, empty="EmptyMiniMaxH3LatentAV", audio=True, width=96, height=160, length=22, cfg=4.0,
    **texts(48),
)  # fmt: skip
LTX23 = Setting(
    checkpoint=model_files.LTX23, empty="EmptyLTXVLatentVideo", audio=True, width=160, height=96, length=17, cfg=4.0,
    arrange=with_audio, **texts(192, valid=6),
)  # fmt: skip
LTXV = Setting(
    checkpoint=model_files.LTXV_CAUSAL, empty="EmptyLTXVLatentVideo", width=160, height=96, length=33, cfg=4.0,
    positive=Text(valid=6), negative=Text(seed=12, valid=6),
)  # fmt: skip
SEEDVR2 = Setting(checkpoint=model_files.SEEDVR2, length=9, height=80, cfg=4.0)
CAUSAL = replace(WAN, checkpoint=model_files.WAN_CAUSAL, chain="cfg_guider")
SDXL = Setting(
    checkpoint=model_files.SDXL, whole=True, picture=True, empty_picture="EmptyLatentImage", cfg=4.0,
    positive=Text(tokens=9), negative=Text(seed=12, tokens=9),
)  # fmt: skip

Add = Callable[[GraphBuilder, Link], Link]
"""Adds nodes behind a MODEL and returns the one that goes on."""


@dataclass(frozen=True)
class Case:
    """One node in a graph."""

    node: str
    add: Add
    setting: Setting = VIDEO
    says: tuple[str, ...] = ()
    """What the message has, if it is refused, beside its name."""
    no_effect: bool = False
    """Whether it changes nothing here with ComfyUI's own loader, either."""
    tolerance: float = 1e-5
    required: bool = False
    """Whether the model does not run without the node."""


def node(class_type: str, setting: Setting = VIDEO, **inputs: Any) -> Case:
    """One that takes a MODEL and returns one."""
    more = {name: inputs.pop(name) for name in ("says", "no_effect", "tolerance") if name in inputs}
    return Case(class_type, lambda builder, model: builder.add(class_type, model=model, **inputs), setting, **more)


def skipping(class_type: str, setting: Setting, layers: str = "0", **more: Any) -> Case:
    if class_type == "SkipLayerGuidanceSD3":
        return node(class_type, setting, layers=layers, scale=3.0, **WHOLE)
    scale = {} if class_type == "SkipLayerGuidanceDiTSimple" else {"scale": 3.0, "rescaling_scale": 0.5}
    return node(class_type, setting, double_layers=layers, single_layers=layers, **scale, **WHOLE, **more)


def windows(class_type: str, setting: Setting, length: int, overlap: int, **more: Any) -> Case:
    return node(
        class_type, setting, context_length=length, context_overlap=overlap, context_schedule="standard_static",
        context_stride=1, closed_loop=False, fuse_method="pyramid", split_conds_to_windows=False, **more,
    )  # fmt: skip


def _switch(builder: GraphBuilder, model: Link) -> Link:
    shifted = builder.add("ModelSamplingSD3", model=model, shift=3.0)
    return builder.add("ComfySwitchNode", switch=True, on_false=model, on_true=shifted)


def _lora_loader(builder: GraphBuilder, model: Link) -> Link:
    clip = builder.add("SPTestNoClip")
    lora = {"lora_name": "hunyuan_native.safetensors", "strength_model": 0.8, "strength_clip": 0.0}
    return builder.add("LoraLoader", model=model, clip=clip, **lora)


def _patched(class_type: str, **more: Any) -> Add:
    """Behind a node that runs another network inside the blocks."""

    def add(builder: GraphBuilder, model: Link) -> Link:
        inputs: dict[str, Any] = {"model_patch": builder.add("SPTestModelPatch"), **more}
        if class_type == "USOStyleReference":
            inputs["clip_vision_output"] = builder.add("SPTestCLIPVisionOutput", tokens=4, width=64)
        else:
            inputs["image"] = builder.add("EmptyImage", width=64, height=48, batch_size=1, color=0x808080)
        if class_type.endswith("Controlnet"):
            inputs["vae"] = builder.add("SPTestVAE", channels=16, stride=8, seed=3)
        return builder.add(class_type, model=model, **inputs)

    return add


def _guided(class_type: str, **inputs: Any) -> Add:
    """In the place of CFGGuider, whose prompts it takes; `negative_model` loads a second one."""

    def add(builder: GraphBuilder, model: Link) -> Link:
        (guider,) = (each for each in builder.graph.values() if each["class_type"] == "CFGGuider")
        guider["class_type"] = class_type
        del guider["inputs"]["cfg"]
        guider["inputs"] |= inputs
        if class_type == "DualCFGGuider":
            guider["inputs"] |= {"cond1": guider["inputs"].pop("positive"), "cond2": builder.add_text(Text(seed=21))}
        elif class_type == "PerpNegGuider":
            guider["inputs"] |= {"empty_conditioning": builder.add_text(Text(seed=21))}
        return model

    return add


def _as_it_is(builder: GraphBuilder, model: Link) -> Link:
    """The node is in the graph of each such setting."""
    return model


def _in_place_of(class_type: str, other: str, *drop: str, **inputs: Any) -> Add:
    """Another node, with the first one's inputs but for some, and with these."""

    def add(builder: GraphBuilder, model: Link) -> Link:
        (found,) = (each for each in builder.graph.values() if each["class_type"] == class_type)
        found["class_type"] = other
        kept = {name: value for name, value in found["inputs"].items() if name not in drop}
        found["inputs"] = kept | inputs
        return model

    return add


def _sampler_custom(builder: GraphBuilder, model: Link) -> Link:
    sampler = builder.add("KSamplerSelect", sampler_name="euler")
    sigmas = builder.add("BasicScheduler", model=model, scheduler="simple", steps=3, denoise=1.0)
    custom = {"add_noise": True, "noise_seed": VIDEO.seed, "sampler": sampler, "sigmas": sigmas}
    drop = ("seed", "steps", "sampler_name", "scheduler", "denoise")
    return _in_place_of("KSampler", "SamplerCustom", *drop, **custom)(builder, model)


def _latent_operation(builder: GraphBuilder, model: Link) -> Link:
    operation = builder.add("LatentOperationTonemapReinhard", multiplier=0.5)
    return builder.add("LatentApplyOperationCFG", model=model, operation=operation)


def _perp_neg(builder: GraphBuilder, model: Link) -> Link:
    empty = builder.add_text(Text(seed=21))
    return builder.add("PerpNeg", model=model, empty_conditioning=empty, neg_scale=1.0)


def with_seedvr2(builder: GraphBuilder, model: Link, negative: int = 1) -> Link:
    """Makes both prompts; `negative`: which of them is the negative one."""
    (sampler,) = (each for each in builder.graph.values() if each["class_type"] == "KSampler")
    latent = builder.add("SPTestVideoLatent", seed=2, frames=3, height=10, width=8, channels=16)
    made, _ = builder.add("SeedVR2Conditioning", model=model, vae_conditioning=latent)
    sampler["inputs"] |= {"positive": [made, 0], "negative": [made, negative]}
    return model


def _start_image(builder: GraphBuilder, width: int, height: int) -> dict[str, Any]:
    image = builder.add("EmptyImage", width=width, height=height, batch_size=1, color=0x808080)
    vae = builder.add("SPTestVAE", channels=16, stride=8, seed=3)
    return {"start_image": image, "vae": vae, "width": width, "height": height, "length": 9}


def _infinite_talk(builder: GraphBuilder, model: Link) -> Link:
    (sampler,) = (each for each in builder.graph.values() if each["class_type"] == "KSampler")
    return builder.add(
        "WanInfiniteTalkToVideo",
        model=model,
        model_patch=builder.add("SPTestModelPatch"),
        positive=sampler["inputs"]["positive"],
        negative=sampler["inputs"]["negative"],
        audio_encoder_output_1=builder.add("SPTestAudioEncoderOutput"),
        mode="single_speaker",
        motion_frame_count=9,
        audio_scale=1.0,
        **_start_image(builder, 64, 48),
    )


def _ar_image(builder: GraphBuilder, model: Link) -> Link:
    return builder.add("ARVideoI2V", model=model, batch_size=1, **_start_image(builder, 64, 48))


def _second_model(builder: GraphBuilder, model: Link) -> Link:
    loader = builder.graph[model[0]]
    other = {**loader, "inputs": {**loader["inputs"], "unet_name": model_files.NO_GUIDANCE}}
    builder.graph["second"] = other
    return _guided("DualModelGuider", cfg=4.0, model_negative=["second", 0])(builder, model)


def _masked(builder: GraphBuilder, setting: Setting, positive: Link, latent: Link) -> tuple[Link, Link]:
    mask = builder.add("SolidMask", value=0.4, width=setting.width, height=setting.height)
    return positive, builder.add("SetLatentNoiseMask", samples=latent, mask=mask)


def _reference_audio(builder: GraphBuilder, model: Link) -> Link:
    """Its prompts go to the sampler, too."""
    (sampler,) = (each for each in builder.graph.values() if each["class_type"] == "KSampler")
    made = builder.add(
        "LTXVReferenceAudio",
        model=model,
        positive=sampler["inputs"]["positive"],
        negative=sampler["inputs"]["negative"],
        reference_audio=builder.add("EmptyAudio", duration=1.0, sample_rate=44100, channels=2),
        audio_vae=builder.add("SPTestSoundVAE"),
        identity_guidance_scale=2.0,
        **WHOLE,
    )
    sampler["inputs"] |= {"positive": [made[0], 1], "negative": [made[0], 2]}
    return made


_CFG_GUIDER = replace(VIDEO, chain="cfg_guider")
_ADVANCED = {"add_noise": "enable", "start_at_step": 0, "end_at_step": 10000, "return_with_leftover_noise": "disable"}
_ROPE = {f"{what}_{axis}": value for what, value in (("scale", 1.5), ("shift", 2.0)) for axis in "xyt"}
_MULTIPLY = {"q": 1.1, "k": 0.9, "v": 1.2, "out": 0.8}
_INSIDE = ("cannot be used with Load Diffusion Model \\(SP\\)", "remove the node")

CASES = [
    node("LoraLoaderModelOnly", lora_name="hunyuan_native.safetensors", strength_model=0.8),
    Case("LoraLoader", _lora_loader),
    Case("ComfySwitchNode", _switch),
    node("ModelSamplingSD3", shift=3.0),
    node("ModelSamplingAuraFlow", QWEN, shift=2.5),
    node("ModelSamplingFlux", FLUX, max_shift=1.15, base_shift=0.5, width=64, height=48),
    node("ModelSamplingLTXV", LTX23, max_shift=2.05, base_shift=0.95),
    node("ModelSamplingDiscrete", SDXL, sampling="eps", zsnr=False),
    node("ModelSamplingContinuousEDM", SDXL, sampling="v_prediction", sigma_max=120.0, sigma_min=0.002),
    node("ModelSamplingContinuousV", SDXL, sampling="v_prediction", sigma_max=500.0, sigma_min=0.03),
    node("ModelNoiseScale", noise_scale=0.7),
    node("MiniMaxH3SigmaShift", H3, shift_video=8.0, shift_audio=2.0),
    node("CFGNorm", QWEN, strength=0.7),
    node("CFGOverride", cfg=2.0, start_percent=0.0, end_percent=0.5),
    node("CFGZeroStar"),
    node("RescaleCFG", SDXL, multiplier=0.7),
    node("APG", eta=0.5, norm_threshold=2.0, momentum=0.1),
    node("TCFG"),
    node("Mahiro"),
    node("FreSca", FLUX, scale_low=1.0, scale_high=1.5, freq_cutoff=1),
    node("Epsilon Scaling", scaling_factor=1.1),
    node("TemporalScoreRescaling", tsr_k=0.8, tsr_sigma=1.0),
    node("DifferentialDiffusion", replace(VIDEO, arrange=_masked), strength=0.6),
    node("ScaleROPE", WAN, **_ROPE),
    windows("ContextWindowsManual", LONG, 3, 1, dim=2, freenoise=False, cond_retain_index_list="",
            latent_retain_index_list="", causal_window_fix=True),
    windows("WanContextWindowsManual", LONG, 9, 4, freenoise=True, retain_first_frame=False),
    node("LTXVContextWindows", LTXV, context_length=17, context_overlap=8, context_schedule="standard_static",
         fuse_method="pyramid", freenoise=True, retain_first_frame=True, split_conds_to_windows=False,
         context_stride=1, closed_loop=False),
    node("EasyCache", replace(VIDEO, steps=6), reuse_threshold=3.0, verbose=False, **WHOLE),
    node("LazyCache", replace(VIDEO, steps=6), reuse_threshold=3.0, verbose=False, **WHOLE),
    node("LTXVSpatioTemporalGuidance", LTX23, scale=1.0, blocks="0", **WHOLE),
    node("LTXVModalityGuidance", LTX23, modality_scale=3.0, **WHOLE),
    Case("LTXVReferenceAudio", _reference_audio, LTX23),
    node("UNetSelfAttentionMultiply", SDXL, **_MULTIPLY),
    node("UNetCrossAttentionMultiply", SDXL, **_MULTIPLY),
    node("UNetTemporalAttentionMultiply", SDXL, self_structural=0.5, self_temporal=0.6, cross_structural=0.7,
         cross_temporal=0.8),
    node("RenormCFG", FLUX, cfg_trunc=100.0, renorm_cfg=0.5),
    node("VideoLinearCFGGuidance", replace(SDXL, batch=2), min_cfg=1.0),
    node("VideoTriangleCFGGuidance", replace(SDXL, batch=3), min_cfg=1.0),
    Case("LatentApplyOperationCFG", _latent_operation),
    Case("PerpNeg", _perp_neg),
    Case("ARVideoI2V", _ar_image, WAN, no_effect=True),
    Case("SeedVR2Conditioning", with_seedvr2, SEEDVR2, required=True),
    node("ChromaRadianceOptions", FLUX, preserve_wrapper=True, start_sigma=1.0, end_sigma=0.0, nerf_tile_size=16,
         force_sequential_txt_ids=True, no_effect=True),
    node("HiDreamO1PatchSeamSmoothing", SD35, pattern="symmetric", passes="2", blend="average", strength=1.0,
         no_effect=True, **WHOLE),
    node("SPTestOption", name="of_a_newer_node", plain=True, no_effect=True),
    skipping("SkipLayerGuidanceDiT", VIDEO),
    skipping("SkipLayerGuidanceDiT", FLUX),
    skipping("SkipLayerGuidanceDiT", WAN, "1"),
    skipping("SkipLayerGuidanceDiT", QWEN, "0, 7"),
    skipping("SkipLayerGuidanceDiT", H3),
    skipping("SkipLayerGuidanceDiT", LTX23),
    skipping("SkipLayerGuidanceDiTSimple", WAN),
    skipping("SkipLayerGuidanceDiTSimple", SDXL, no_effect=True),
    skipping("SkipLayerGuidanceSD3", SD35, "1"),
    node("ModelAttentionBackend", attention="pytorch attention", no_effect=True),
    node("SPTestAttentionBackend", WAN, name="split", no_effect=True),
    Case("KSampler", _as_it_is, no_effect=True),
    Case("KSamplerAdvanced", _in_place_of("KSampler", "KSamplerAdvanced", "seed", "denoise", noise_seed=VIDEO.seed,
                                          **_ADVANCED), no_effect=True),
    Case("SamplerCustom", _sampler_custom, no_effect=True),
    Case("BasicScheduler", _as_it_is, _CFG_GUIDER, no_effect=True),
    Case("BetaSamplingScheduler", _in_place_of("BasicScheduler", "BetaSamplingScheduler", "scheduler", "denoise",
                                               alpha=0.6, beta=0.6), _CFG_GUIDER),
    Case("SDTurboScheduler", _in_place_of("BasicScheduler", "SDTurboScheduler", "scheduler"),
         replace(SDXL, chain="cfg_guider")),
    Case("BasicGuider", _as_it_is, replace(VIDEO, chain="basic_guider"), no_effect=True),
    Case("CFGGuider", _as_it_is, _CFG_GUIDER, no_effect=True),
    Case("PerpNegGuider", _guided("PerpNegGuider", cfg=4.0, neg_scale=1.0), _CFG_GUIDER),
    Case("DualCFGGuider", _guided("DualCFGGuider", cfg_conds=3.0, cfg_cond2_negative=2.0, style="regular"),
         _CFG_GUIDER),
    Case("DualModelGuider", _second_model, _CFG_GUIDER),
    Case("LTXVDualCFGGuider", _guided("LTXVDualCFGGuider", video_cfg=3.0, audio_cfg=7.0),
         replace(LTX23, chain="cfg_guider")),
    node("LoraLoaderBypassModelOnly", lora_name="hunyuan_native.safetensors", strength_model=1.0,
         says=("LoRA in bypass mode", "use Load LoRA")),
    node("FluxKVCache", replace(FLUX, checkpoint=model_files.FLUX2_KLEIN), says=("remove the node",)),
    node("NAGuidance", FLUX, nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5, says=_INSIDE),
    node("PerturbedAttentionGuidance", scale=3.0, says=_INSIDE),
    node("SelfAttentionGuidance", SDXL, scale=0.5, blur_sigma=2.0, says=_INSIDE),
    node("HyperTile", SDXL, tile_size=32, swap_size=2, max_depth=0, scale_depth=False, says=_INSIDE),
    node("TomePatchModel", SDXL, ratio=0.3, says=_INSIDE),
    node("FreeU_V2", SDXL, b1=1.3, b2=1.4, s1=0.9, s2=0.2, says=_INSIDE),
    node("PatchModelAddDownscale", SDXL, block_number=1, downscale_factor=2.0, downscale_after_skip=True,
         downscale_method="bilinear", upscale_method="bilinear", **WHOLE, says=_INSIDE),
    Case("QwenImageDiffsynthControlnet", _patched("QwenImageDiffsynthControlnet", strength=1.0), QWEN, _INSIDE),
    Case("ZImageFunControlnet", _patched("ZImageFunControlnet", strength=1.0), QWEN, _INSIDE),
    Case("USOStyleReference", _patched("USOStyleReference"), FLUX, _INSIDE),
    Case("AnimaLLLiteApply", _patched("AnimaLLLiteApply", strength=1.0, **WHOLE), FLUX, _INSIDE),
    Case("WanInfiniteTalkToVideo", _infinite_talk, WAN, _INSIDE),
    Case("BlockSparseAttention", lambda builder, model: builder.add("SPTestBlockSparseAttention", model=model), H3,
         _INSIDE),
    Case("SamplerARVideo", _in_place_of("KSamplerSelect", "SamplerARVideo", "sampler_name", num_frame_per_block=1),
         CAUSAL, _INSIDE),
    node("WanAnimate2Cache", WAN, device="cpu", dtype="default", says=(*_INSIDE, "animate2_cache")),
    node("SPTestOption", name="memory", plain=False, says=(*_INSIDE, "memory")),
    node("SPTestAttention", says=(*_INSIDE, "attention override")),
    node("ModelComputeDtype", dtype="bf16", says=("ModelComputeDtype",)),
]  # fmt: skip

NEWER = {"MiniMaxH3FunControlNetApply": False, "QwenImage21Cache": True}
"""Nodes of newer ComfyUIs that no test has run → whether they should work: the one sets a block patch, the other an
option that is plain data."""


def graph(case: Case, swapped: Swapped | None, *, without: bool = False) -> Any:
    """The case's graph; `without` its node."""
    builder, setting = GraphBuilder(), case.setting
    load = builder.add_whole_loader if setting.whole else builder.add_loader
    model = load(setting.checkpoint, swapped)
    add_sampling(builder, setting, model)
    if without:
        return builder.graph
    readers = [
        (each, name) for each in builder.graph.values() for name, link in each["inputs"].items() if link is model
    ]
    patched = case.add(builder, model)
    for each, name in readers:
        each["inputs"][name] = patched
    return builder.graph
