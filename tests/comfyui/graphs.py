"""Graphs in ComfyUI's API format: the same setting with the native loader or with the pack's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from tests.comfyui.server import Graph

Link = list[Any]
ModelNode = tuple[str, tuple[tuple[str, Any], ...]]

OUTPUT = "latent"


@dataclass(frozen=True)
class Swapped:
    """The SP Config that replaces the native loader; 0 and "auto" leave the choice to the pack."""

    devices: str = "cpu,cpu"
    ulysses_degree: int = 0
    ring_degree: int = 0
    cfg_degree: int = 0
    dp_degree: int = 0
    weights: str = "auto"
    attention: str = "auto"
    on_failure: str = "error"


@dataclass(frozen=True)
class Text:
    """A prompt of `tokens` tokens, of which the first `valid` count (all when None)."""

    seed: int = 11
    tokens: int = 8
    valid: int | None = None
    guidance: float = 6.0
    width: int = 64
    glyphs: int = 0  # tokens of ByT5, for HunyuanVideo 1.5
    pooled: int = 768


@dataclass(frozen=True)
class Setting:
    """All that decides the result of a sampling graph."""

    checkpoint: str = "tiny.safetensors"
    whole: bool = False  # a checkpoint with VAE and more, for Load Checkpoint
    weight_dtype: str = "default"
    width: int = 64
    height: int = 48
    length: int = 5
    batch: int = 1
    picture: bool = False  # a latent without frames, for FLUX
    empty_picture: str = "EmptySD3LatentImage"  # the node that makes a picture's latent
    empty: str = "EmptyHunyuanLatentVideo"  # the node that makes a video's latent
    start_image: str = ""  # the node that puts a first frame in, see `add_start_image`
    image_tokens: int = 0  # of CLIP, for WanImageToVideo and HunyuanVideo15ImageToVideo
    seed: int = 7
    steps: int = 3
    cfg: float = 1.0
    sampler: str = "euler"
    scheduler: str = "simple"
    chain: str = "ksampler"  # or "sp_sampler"; or "basic_guider", "cfg_guider": SamplerCustomAdvanced with that guider
    positive: Text = Text()
    negative: Text = Text(seed=12)
    model_nodes: tuple[ModelNode, ...] = ()  # nodes between the loader and the sampler
    audio: bool = False  # the latent has an audio part, too; all is saved as one row
    arrange: Arrange | None = None  # nodes between the positive prompt, the latent and the sampler

    @property
    def tokens(self) -> int:
        """Latent tokens of one sample in the transformer."""
        return (self.width // 16) * (self.height // 16) * ((self.length - 1) // 4 + 1)


Arrange = Callable[["GraphBuilder", Setting, Link, Link], tuple[Link, Link]]
"""Adds nodes to a graph: (…, positive prompt, latent) → the two that go on."""

_seeds = count(1000)


def fresh(setting: Setting, **changes: Any) -> Setting:
    """A setting with a seed that nothing used before, so that ComfyUI cannot answer from its cache."""
    return replace(setting, seed=next(_seeds), **changes)


def model_node(class_type: str, **inputs: Any) -> ModelNode:
    """A node that takes a model and returns a model, e.g. model_node("ModelSamplingSD3", shift=3.0)."""
    return class_type, tuple(inputs.items())


class GraphBuilder:
    """Collects nodes; `add` returns the link to the node's first output."""

    def __init__(self) -> None:
        self.graph: Graph = {}

    def add(self, class_type: str, node_id: str | None = None, **inputs: Any) -> Link:
        node_id = node_id or str(len(self.graph) + 1)
        self.graph[node_id] = {"class_type": class_type, "inputs": inputs}
        return [node_id, 0]

    def add_whole_loader(self, checkpoint: str, swapped: Swapped | None) -> Link:
        """Outputs model, CLIP and VAE."""
        if swapped is None:
            return self.add("CheckpointLoaderSimple", ckpt_name=checkpoint)
        return self.add("SPLoadCheckpoint", ckpt_name=checkpoint, sp_config=self.add("SPConfig", **vars(swapped)))

    def add_loader(self, checkpoint: str, swapped: Swapped | None, weight_dtype: str = "default") -> Link:
        if swapped is None:
            return self.add("UNETLoader", unet_name=checkpoint, weight_dtype=weight_dtype)
        config = self.add("SPConfig", **vars(swapped))
        return self.add("SPLoadDiffusionModel", unet_name=checkpoint, weight_dtype=weight_dtype, sp_config=config)

    def add_text(self, text: Text) -> Link:
        return self.add(
            "SPTestConditioning",
            seed=text.seed,
            tokens=text.tokens,
            valid_tokens=text.tokens if text.valid is None else text.valid,
            width=text.width,
            pooled_width=text.pooled,
            guidance=text.guidance,
            glyph_tokens=text.glyphs,
        )


def sampling_graph(setting: Setting, swapped: Swapped | None = None) -> Graph:
    """Loader, model nodes, sampler and SaveLatent (node id OUTPUT)."""
    builder = GraphBuilder()
    if setting.whole:
        model = builder.add_whole_loader(setting.checkpoint, swapped)
    else:
        model = builder.add_loader(setting.checkpoint, swapped, setting.weight_dtype)
    for class_type, inputs in setting.model_nodes:
        model = builder.add(class_type, model=model, **dict(inputs))
    add_sampling(builder, setting, model)
    return builder.graph


def add_sampling(builder: GraphBuilder, setting: Setting, model: Link, output: str = OUTPUT) -> None:
    """Everything behind the model; `output` is SaveLatent's node id."""
    positive, negative = builder.add_text(setting.positive), builder.add_text(setting.negative)
    size = {"width": setting.width, "height": setting.height, "batch_size": setting.batch}
    if setting.start_image:
        positive, negative, latent = add_start_image(builder, setting, positive, negative)
    elif setting.picture:
        latent = builder.add(setting.empty_picture, **size)
    else:
        latent = builder.add(setting.empty, length=setting.length, **size)
    if setting.arrange is not None:
        positive, latent = setting.arrange(builder, setting, positive, latent)
    if setting.chain in ("ksampler", "sp_sampler"):
        samples = builder.add(
            "KSampler" if setting.chain == "ksampler" else "SPSampler",
            model=model,
            seed=setting.seed,
            steps=setting.steps,
            cfg=setting.cfg,
            sampler_name=setting.sampler,
            scheduler=setting.scheduler,
            positive=positive,
            negative=negative,
            latent_image=latent,
            denoise=1.0,
        )
    else:
        if setting.chain == "basic_guider":
            guider = builder.add("BasicGuider", model=model, conditioning=positive)
        else:
            guider = builder.add("CFGGuider", model=model, positive=positive, negative=negative, cfg=setting.cfg)
        samples = builder.add(
            "SamplerCustomAdvanced",
            noise=builder.add("RandomNoise", noise_seed=setting.seed),
            guider=guider,
            sampler=builder.add("KSamplerSelect", sampler_name=setting.sampler),
            sigmas=builder.add(
                "BasicScheduler", model=model, scheduler=setting.scheduler, steps=setting.steps, denoise=1.0
            ),
            latent_image=latent,
        )
    if setting.audio:
        samples = builder.add("SPTestFlatLatent", samples=samples)
    builder.add("SaveLatent", node_id=output, samples=samples, filename_prefix="latents/test")


def with_audio(builder: GraphBuilder, setting: Setting, positive: Link, latent: Link) -> tuple[Link, Link]:
    """7 audio tokens beside the video."""
    audio = builder.add("SPTestVideoLatent", seed=2, frames=0, height=7, width=16, channels=8)
    return positive, builder.add("LTXVConcatAVLatent", video_latent=latent, audio_latent=audio)


def add_start_image(builder: GraphBuilder, setting: Setting, positive: Link, negative: Link) -> tuple[Link, Link, Link]:
    """Positive, negative and latent, with a grey picture as the first frame.

    `start_image` is one of WanImageToVideo, Wan22ImageToVideoLatent, HunyuanVideo15ImageToVideo, LTXVImgToVideo behind
    LTXVConditioning, and InstructPixToPixConditioning, which encodes the one picture and no frames behind it.
    """
    if setting.start_image == "InstructPixToPixConditioning":
        pixels = builder.add("EmptyImage", width=setting.width, height=setting.height, batch_size=1, color=0x808080)
        vae = builder.add("SPTestVAE", channels=16, stride=8, seed=3)
        texts = {"positive": positive, "negative": negative}
        node, _ = builder.add(setting.start_image, vae=vae, pixels=pixels, **texts)
        size = {"width": setting.width, "height": setting.height, "batch_size": setting.batch}
        return [node, 0], [node, 1], builder.add(setting.empty, length=setting.length, **size)
    size = {"width": setting.width, "height": setting.height, "batch_size": setting.batch, "length": setting.length}
    size["start_image"] = builder.add("EmptyImage", width=64, height=64, batch_size=1, color=0x808080)
    if setting.start_image == "Wan22ImageToVideoLatent":
        vae = builder.add("SPTestVAE", channels=48, stride=16, seed=3)
        return positive, negative, builder.add("Wan22ImageToVideoLatent", vae=vae, **size)
    if setting.start_image == "LTXVImgToVideo":
        size["image"] = size.pop("start_image")
        vae = builder.add("SPTestVAE", channels=128, stride=32, seed=3)
        node, _ = builder.add("LTXVConditioning", positive=positive, negative=negative, frame_rate=23.976)
        texts = {"positive": [node, 0], "negative": [node, 1]}
        node, _ = builder.add("LTXVImgToVideo", vae=vae, strength=0.9, **texts, **size)
        return [node, 0], [node, 1], [node, 2]
    channels, stride, width = (32, 16, 1152) if setting.start_image == "HunyuanVideo15ImageToVideo" else (16, 8, 1280)
    if setting.image_tokens:
        size["clip_vision_output"] = builder.add("SPTestCLIPVisionOutput", tokens=setting.image_tokens, width=width)
    vae = builder.add("SPTestVAE", channels=channels, stride=stride, seed=3)
    node, _ = builder.add(setting.start_image, vae=vae, positive=positive, negative=negative, **size)
    return [node, 0], [node, 1], [node, 2]


def two_stage_graph(first: str, second: str, setting: Setting, swapped: Swapped | None = None) -> Graph:
    """Two checkpoints share the steps, half each; ends with SaveLatent as `sampling_graph` does."""
    builder = GraphBuilder()
    positive, negative = builder.add_text(setting.positive), builder.add_text(setting.negative)
    positive, negative, latent = add_start_image(builder, setting, positive, negative)
    half = setting.steps // 2
    stages = ((first, 0, half, "enable"), (second, half, setting.steps, "disable"))
    for checkpoint, start, end, leftover_noise in stages:
        latent = builder.add(
            "KSamplerAdvanced",
            model=builder.add_loader(checkpoint, swapped),
            add_noise="disable" if start else "enable",
            noise_seed=setting.seed,
            steps=setting.steps,
            cfg=setting.cfg,
            sampler_name=setting.sampler,
            scheduler=setting.scheduler,
            positive=positive,
            negative=negative,
            latent_image=latent,
            start_at_step=start,
            end_at_step=end,
            return_with_leftover_noise=leftover_noise,
        )
    builder.add("SaveLatent", node_id=OUTPUT, samples=latent, filename_prefix="latents/test")
    return builder.graph
