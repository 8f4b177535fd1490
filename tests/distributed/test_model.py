"""A whole step of tiny HunyuanVideos: any number of workers gives what one gives, and what diffusers' model gives."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallel.adapters.base import pack_text
from parallel.adapters.registry import FAMILIES
from parallel.errors import CheckpointError, ConfigError, UnsupportedError, WorkerError
from parallel.host import memory, remote_transformer
from parallel.host.recipe import Recipe
from parallel.host.remote_model import RemoteModel
from parallel.host.step_request import StepRequest
from parallel.wire.channel import Channel, Message
from parallel.wire.shared import TensorRef, lay_out
from parallel.worker.resident import ResidentModel
from tests.distributed.devices import kind
from tests.distributed.tiny_models import (
    CogVideoXInputs,
    Flux2Inputs,
    Hunyuan15Inputs,
    Inputs,
    LTXVInputs,
    MochiInputs,
    Model,
    QwenImageInputs,
    StartGroup,
    TinyModels,
    WanInputs,
    loaded,
    recipe_of,
    relative_difference,
)
from tests.thinned import thinned

MANY = ("cpu,cpu", "cpu*3,cpu,cpu", "cpu,cpu,cpu,cpu")
FOUR = MANY[-1]
SPLIT_TOLERANCE, STOCK_TOLERANCE = kind().split, kind().reference
PADDED = Inputs(valid=(5,))

MODELS = {
    # one checkpoint, loaded once
    "even": Model(),
    "odd_tokens": Model(inputs=Inputs(frames=3, height=10, width=6, text=7)),
    "padded_text": Model(inputs=PADDED),
    "padding_first": Model(inputs=Inputs(valid=(5,), padding_first=True)),
    "one_text_token": Model(inputs=Inputs(text=1)),
    "mostly_text": Model(inputs=Inputs(frames=1, height=4, width=4, text=40)),
    "batch_2": Model(inputs=Inputs(batch=2)),
    "batch_2_equal_masks": Model(inputs=Inputs(batch=2, valid=(5, 5))),
    "batch_2_unequal_masks": Model(inputs=Inputs(batch=2, valid=(5, 8), frames=3, height=6)),
    "first_frame": Model(inputs=Inputs(frames=3, height=10, width=6, valid=(5,), first_frame=0)),  # 15 of 45 tokens
    "first_frame_of_one": Model(inputs=Inputs(frames=1, text=30, first_frame=0)),
    "first_frame_batch_2": Model(inputs=Inputs(batch=2, valid=(5, 8), frames=3, height=6, first_frame=0)),
    "first_frame_by_time": Model(inputs=Inputs(frames=3, height=10, width=6, valid=(5,), first_frame=40)),
    # others
    "one_head": Model({"heads": 1}, PADDED),
    "three_heads": Model({"heads": 3}, PADDED),
    "four_heads": Model({"heads": 4}, PADDED),
    "several_blocks": Model({"depth": 2, "depth_single": 3, "seed": 4}, PADDED),
    "original_names": Model({"names": "original"}, PADDED),
    "prefix": Model({"prefix": "model.diffusion_model."}, PADDED),
    "original_names_and_prefix": Model({"names": "original", "prefix": "model.model."}, PADDED),
    "no_guidance": Model({"guidance": False}, PADDED),
    "first_frame_without_guidance": Model({"guidance": False}, Inputs(first_frame=0)),
    "image_to_video": Model({"in_channels": 33}, Inputs(channels=33, valid=(5,))),
    "bf16_file": Model({"dtype": torch.bfloat16}, PADDED),
    "fp8_storage": Model({}, PADDED, torch.float8_e4m3fn),
    "scaled_fp8": Model({"scaled": "comfy_quant"}, PADDED),
}


TWO_REFERENCES = ((9, 7), (4, 12))
FLUX = {
    "flux": Model({"family": "flux"}, Inputs(frames=None, sigma=True)),
    "flux_odd_size": Model({"family": "flux"}, Inputs(frames=None, height=9, width=7, sigma=True, batch=2)),
    "flux_reference": Model({"family": "flux"}, Inputs(frames=None, references=((8, 8),), sigma=True)),
    "flux_references": Model(
        {"family": "flux"}, Inputs(frames=None, height=9, width=7, references=TWO_REFERENCES, sigma=True, batch=2)
    ),
    "flux_references_index": Model(
        {"family": "flux"}, Inputs(frames=None, references=TWO_REFERENCES, method="index", sigma=True)
    ),
    "flux_references_uxo": Model(
        {"family": "flux"}, Inputs(frames=None, references=TWO_REFERENCES, method="uxo", sigma=True)
    ),
    "flux_references_offset": Model(
        {"family": "flux"}, Inputs(frames=None, references=TWO_REFERENCES, method="offset", sigma=True)
    ),
    "flux_without_guidance": Model({"family": "flux", "guidance": False}, Inputs(frames=None, sigma=True)),
}
MODELS |= FLUX

T2V: dict[str, Any] = {"family": "wan", "context_dim": 64}
I2V = T2V | {"in_channels": 36, "clip": True}
TI2V = T2V | {"in_channels": 48, "out_channels": 48}
WAN = {
    "wan": Model(T2V, WanInputs()),
    "wan_odd_size": Model(T2V, WanInputs(frames=3, height=9, width=7)),
    "wan_five_tokens": Model(T2V, WanInputs(frames=5, height=2, width=2)),
    "wan_one_head": Model(T2V | {"heads": 1}, WanInputs(frames=3)),
    "wan_three_heads": Model(T2V | {"heads": 3}, WanInputs(frames=3, height=6)),
    "wan_batch_2": Model(T2V, WanInputs(batch=2, frames=3, height=6)),
    "wan_prefix": Model(T2V | {"prefix": "model.diffusion_model."}, WanInputs()),
    "wan_fp8_storage": Model(T2V, WanInputs(), torch.float8_e4m3fn),
    "wan_i2v": Model(I2V, WanInputs(channels=36, image=5)),
    "wan_i2v_without_image": Model(I2V, WanInputs(channels=36)),
    "wan_i2v_batch_2": Model(I2V, WanInputs(channels=36, image=5, batch=2, height=10)),
    "wan_i2v_512_text_tokens": Model(I2V, WanInputs(channels=36, image=5, text=512, batch=2)),
    "wan_first_and_last_frame": Model(I2V | {"clip_positions": 6}, WanInputs(channels=36, image=6)),
    "wan_22_i2v": Model(T2V | {"in_channels": 36}, WanInputs(channels=36, image=5)),
    "wan_22_5b": Model(TI2V, WanInputs(channels=48)),
    "wan_22_5b_first_frame": Model(TI2V, WanInputs(channels=48, frames=3, height=6, clean_frames=1)),
    "wan_22_5b_batch_2": Model(TI2V, WanInputs(channels=48, frames=3, height=6, clean_frames=2, batch=2)),
}
MODELS |= WAN

VIDEO_15: dict[str, Any] = {"family": "hunyuan_video_15"}
HUNYUAN_15 = {
    "hunyuan_15": Model(VIDEO_15, Hunyuan15Inputs()),
    "hunyuan_15_odd_size": Model(VIDEO_15, Hunyuan15Inputs(frames=3, height=5, width=3, text=7, image=4)),
    "hunyuan_15_padded_text": Model(VIDEO_15, Hunyuan15Inputs(valid=(5,), image=4)),
    "hunyuan_15_mostly_text": Model(VIDEO_15, Hunyuan15Inputs(frames=1, height=2, width=2, text=5, glyphs=9, image=30)),
    "hunyuan_15_text_only": Model(VIDEO_15, Hunyuan15Inputs(text=1, glyphs=0)),
    "hunyuan_15_unequal_batch": Model(VIDEO_15, Hunyuan15Inputs(batch=2, valid=(5, 8), image=4, height=3)),
    "hunyuan_15_fp8_storage": Model(VIDEO_15, Hunyuan15Inputs(), torch.float8_e4m3fn),
}
MODELS |= HUNYUAN_15

COG: dict[str, Any] = {"family": "cogvideox"}
COG_15 = COG | {"frames_per_patch": 2}
COGVIDEOX = {
    "cogvideox": Model(COG, CogVideoXInputs()),
    "cogvideox_odd_size": Model(COG, CogVideoXInputs(frames=3, height=9, width=7, text=7)),
    "cogvideox_mostly_text": Model(COG, CogVideoXInputs(frames=1, height=4, width=4, text=30)),
    "cogvideox_i2v_batch_2": Model(COG | {"in_channels": 32}, CogVideoXInputs(channels=32, batch=2, height=6)),
    "cogvideox_learned_positions": Model(COG | {"learned_positions": 40}, CogVideoXInputs()),
    "cogvideox_fp8_storage": Model(COG, CogVideoXInputs(), torch.float8_e4m3fn),
    "cogvideox_15": Model(COG_15, CogVideoXInputs(frames=4)),
    "cogvideox_15_odd_size": Model(COG_15, CogVideoXInputs(frames=5, height=5, width=7)),
    "cogvideox_15_i2v": Model(
        COG_15 | {"in_channels": 32, "ofs": True}, CogVideoXInputs(channels=32, batch=2, height=6, ofs=True)
    ),
    "cogvideox_15_scaled_fp8": Model(COG_15 | {"scaled": "comfy_quant"}, CogVideoXInputs(frames=4)),
}
MODELS |= COGVIDEOX

MOCHI: dict[str, Any] = {"family": "mochi"}
MODELS |= {
    "mochi": Model(MOCHI, MochiInputs()),
    "mochi_padded": Model(MOCHI, MochiInputs(valid=5)),
    "mochi_odd_batch_2": Model(MOCHI | {"heads": 3}, MochiInputs(frames=3, height=6, width=10, valid=3, batch=2)),
    "mochi_fp8_storage": Model(MOCHI, MochiInputs(valid=1), torch.float8_e4m3fn),
}

LTXV: dict[str, Any] = {"family": "ltxv"}
MODELS |= {
    "ltxv": Model(LTXV, LTXVInputs()),
    "ltxv_padded": Model(LTXV, LTXVInputs(valid=(5,))),
    "ltxv_odd_first_frame": Model(
        LTXV | {"heads": 3, "causal": True},
        LTXVInputs(frames=3, height=3, width=5, valid=(5, 8), rate=23.976, clean_frames=1, batch=2),
    ),
    "ltxv_fp8_storage": Model(LTXV, LTXVInputs(valid=(1,)), torch.float8_e4m3fn),
}

QWEN: dict[str, Any] = {"family": "qwen_image"}
CLEAN = QWEN | {"clean_references": True}
MODELS |= {
    "qwen": Model(QWEN, QwenImageInputs()),
    "qwen_padded": Model(QWEN, QwenImageInputs(valid=(5,))),
    "qwen_fp8_storage": Model(QWEN, QwenImageInputs(valid=(1,)), torch.float8_e4m3fn),
    "qwen_clean_references": Model(CLEAN, QwenImageInputs(references=((8, 4), (4, 8)))),
    "qwen_odd_clean_references": Model(
        CLEAN | {"heads": 3},
        QwenImageInputs(height=9, width=7, valid=(5, 8), references=TWO_REFERENCES, batch=2),
    ),
    "qwen_layered": Model(QWEN | {"layered": True}, QwenImageInputs(frames=3, references=((6, 5),), text=1)),
}

FLUX2: dict[str, Any] = {"family": "flux2"}
KLEIN = FLUX2 | {"guidance": False}
MODELS |= {
    "flux2": Model(FLUX2, Flux2Inputs()),
    "flux2_references": Model(FLUX2, Flux2Inputs(references=((3, 5), (4, 2)))),
    "flux2_klein": Model(KLEIN, Flux2Inputs()),
    "flux2_klein_mostly_text": Model(KLEIN, Flux2Inputs(height=2, width=2, text=30, references=((2, 1),))),
    "flux2_odd_clean_references": Model(
        FLUX2 | {"heads": 3, "depth": 2, "depth_single": 2},
        Flux2Inputs(height=5, width=3, references=((3, 5), (1, 1)), method="index_timestep_zero", batch=2),
    ),
    "flux2_fp8_storage": Model(FLUX2, Flux2Inputs(text=1), torch.float8_e4m3fn),
    "flux2_scaled_fp8": Model(KLEIN | {"scaled": "comfy_quant"}, Flux2Inputs()),
}


def stock_model(path: Path) -> Any:
    """diffusers' own model with the weights of a checkpoint, in this process."""
    recipe = {"path": str(path), "weight_dtype": "float32", "compute_dtype": "float32"}
    return ResidentModel(recipe, torch.device("cpu"), lambda done, total: None).model


def test_every_family_has_models():
    assert {model.checkpoint.get("family", "hunyuan_video") for model in MODELS.values()} == set(FAMILIES)


DEGREES = [
    ("cpu,cpu", {"ring_degree": 2}),
    ("cpu*3,cpu,cpu", {"ring_degree": 3}),
    (FOUR, {"ring_degree": 2}),
    (FOUR, {"ulysses_degree": 1, "ring_degree": 4}),
    (FOUR, {"dp_degree": 2}),
    (FOUR, {"cfg_degree": 2, "ring_degree": 2}),
]


class Predictions:
    """Each model's prediction on each device list, computed when it is first asked for.

    A group keeps one model loaded until another one is asked for.
    """

    def __init__(self, start_group: StartGroup, tiny_models: TinyModels):
        self._start_group, self._tiny_models = start_group, tiny_models
        self._known: dict[tuple[str, str, str], Tensor] = {}
        self._loaded: dict[str, RemoteModel] = {}

    def __call__(self, name: str, devices: str, **degrees: int) -> Tensor:
        key = name, devices, repr(degrees)
        if key not in self._known:
            model = MODELS[name]
            path = self._tiny_models.path(**model.checkpoint)
            recipe = recipe_of(path, devices, model.weight_dtype, **degrees)
            self._known[key] = self._model(devices, recipe).step(*model.inputs.make())
        return self._known[key]

    def _model(self, devices: str, recipe: Recipe) -> RemoteModel:
        if devices not in self._loaded or self._loaded[devices].recipe != recipe:
            if devices in self._loaded:
                self._loaded[devices].unload()
            self._loaded[devices] = RemoteModel(recipe, group=self._start_group(devices))
            self._loaded[devices].ensure_loaded()
        return self._loaded[devices]

    def unload(self) -> None:
        for model in self._loaded.values():
            model.unload()


@pytest.fixture(scope="module")
def predict(start_group: StartGroup, tiny_models: TinyModels) -> Iterator[Predictions]:
    predictions = Predictions(start_group, tiny_models)
    yield predictions
    predictions.unload()


@pytest.mark.parametrize(("name", "devices"), thinned(list(MODELS), MANY, 4))
def test_many_workers_give_what_one_gives(predict: Predictions, name: str, devices: str):
    assert relative_difference(predict(name, devices), predict(name, "cpu")) <= SPLIT_TOLERANCE


DEEP = [
        "odd_tokens", "mostly_text", "batch_2_unequal_masks", "four_heads", "first_frame_batch_2",
        "flux_odd_size", "flux_references", "wan_odd_size", "wan_i2v_batch_2", "wan_22_5b_batch_2",
        "hunyuan_15_unequal_batch", "cogvideox_15_i2v",
        "mochi_odd_batch_2", "ltxv_odd_first_frame", "qwen_odd_clean_references",
        "flux2_odd_clean_references",
]  # fmt: skip


@pytest.mark.parametrize(("name", "devices", "degrees"), thinned(DEEP, DEGREES, 4))
def test_any_degrees_give_what_one_worker_gives(predict: Predictions, name: str, devices: str, degrees: dict[str, int]):
    assert relative_difference(predict(name, devices, **degrees), predict(name, "cpu")) <= SPLIT_TOLERANCE


@pytest.mark.parametrize(
    ("devices", "degrees"), [("cpu", {}), ("cpu,cpu", {"cfg_degree": 2}), (FOUR, {"cfg_degree": 2}), (FOUR, {})]
)
def test_cond_and_uncond_side_by_side(
    start_group: StartGroup, tiny_models: TinyModels, devices: str, degrees: dict[str, int]
):
    """Texts of unequal length cannot share a batch, but they can share a step."""
    cond, uncond = Inputs(valid=(5,)).make(), Inputs(text=3, seed=5).make()
    with loaded(start_group("cpu"), tiny_models.path()) as remote:
        expected = [remote.step(*inputs) for inputs in (cond, uncond)]
    with loaded(start_group(devices), tiny_models.path(), **degrees) as remote:
        for _ in range(2):
            results = remote.steps([StepRequest(*cond), StepRequest(*uncond)], conditions=2)
            for result, reference in zip(results, expected, strict=True):
                assert relative_difference(result, reference) <= SPLIT_TOLERANCE


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("original_names", "padded_text"),
        ("prefix", "padded_text"),
        ("original_names_and_prefix", "padded_text"),
        ("wan_prefix", "wan"),
    ],
)
def test_the_dialect_of_a_checkpoint_does_not_matter(predict: Predictions, name: str, plain: str):
    assert torch.equal(predict(name, "cpu"), predict(plain, "cpu"))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("even", "padded_text"),
        ("padded_text", "padding_first"),
        ("padded_text", "bf16_file"),
        ("padded_text", "fp8_storage"),
        ("padded_text", "scaled_fp8"),
        ("padded_text", "several_blocks"),
        ("padded_text", "no_guidance"),
        ("flux", "flux_without_guidance"),
        ("first_frame", "first_frame_by_time"),
        ("flux", "flux_reference"),
        ("flux_references_offset", "flux_references_index"),
        ("flux_references_offset", "flux_references_uxo"),
        ("wan", "wan_fp8_storage"),
        ("wan_i2v", "wan_i2v_without_image"),
        ("wan_i2v", "wan_first_and_last_frame"),
        ("hunyuan_15", "hunyuan_15_fp8_storage"),
        ("hunyuan_15", "hunyuan_15_padded_text"),
        ("cogvideox", "cogvideox_fp8_storage"),
        ("cogvideox", "cogvideox_learned_positions"),
        ("cogvideox_15", "cogvideox_15_scaled_fp8"),
        ("mochi", "mochi_padded"),
        ("ltxv", "ltxv_padded"),
        ("qwen", "qwen_padded"),
        ("qwen", "qwen_clean_references"),
        ("flux2", "flux2_klein"),
        ("flux2", "flux2_references"),
        ("flux2_klein", "flux2_scaled_fp8"),
    ],
)
def test_what_differs_shows(predict: Predictions, first: str, second: str):
    """The comparisons here would notice an ignored mask, dtype, weight or guidance."""
    assert relative_difference(predict(first, "cpu"), predict(second, "cpu")) > 10 * SPLIT_TOLERANCE


def test_a_sample_of_a_batch_equals_the_sample_alone(predict: Predictions, start_group: StartGroup, tiny_models):
    """Unequal texts neither attend to padding nor to each other."""
    x, timestep, conditioning = MODELS["batch_2_unequal_masks"].inputs.make()
    with loaded(start_group("cpu"), tiny_models.path()) as remote:
        for i in range(2):
            row = slice(i, i + 1)
            single = remote.step(x[row], timestep[row], {name: tensor[row] for name, tensor in conditioning.items()})
            batched = predict("batch_2_unequal_masks", "cpu,cpu")[row]
            assert relative_difference(batched, single) <= SPLIT_TOLERANCE


@pytest.mark.parametrize(
    ("checkpoint", "inputs"),
    [
        ({}, Inputs(valid=(8,))),
        ({"heads": 3, "depth": 2, "depth_single": 2}, Inputs(frames=3, height=10, width=6, valid=(8, 8), batch=2)),
        ({"guidance": False}, Inputs(valid=(8,))),
        ({"in_channels": 33}, Inputs(channels=33, valid=(8,))),
    ],
)
def test_one_worker_gives_what_diffusers_gives(
    start_group: StartGroup, tiny_models: TinyModels, checkpoint: dict, inputs: Inputs
):
    """Without padding: diffusers takes the text's mean over valid tokens only, ComfyUI and this engine over all."""
    path = tiny_models.path(**checkpoint)
    stock = stock_model(path)
    assert type(stock).__name__ == "HunyuanVideoTransformer3DModel"
    x, timestep, conditioning = inputs.make()
    with torch.no_grad():
        (expected,) = stock(
            x,
            timestep,
            conditioning["context"],
            conditioning["attention_mask"],
            conditioning["y"],
            conditioning["guidance"] * 1000 if stock.config.guidance_embeds else None,
            return_dict=False,
        )
    with loaded(start_group("cpu"), path) as remote:
        assert relative_difference(remote.step(x, timestep, conditioning), expected) <= STOCK_TOLERANCE


@pytest.mark.parametrize("name", ["wan", "wan_i2v_512_text_tokens", "wan_22_5b_batch_2"])
def test_one_worker_gives_what_diffusers_gives_for_wan(predict: Predictions, tiny_models: TinyModels, name: str):
    """diffusers takes the last 512 tokens for the text, and what comes before for the image."""
    model = MODELS[name]
    stock = stock_model(tiny_models.path(**model.checkpoint))
    assert type(stock).__name__ == "WanTransformer3DModel"
    with torch.device("cpu"):  # its position table: no weight, hence never loaded
        stock.rope = type(stock.rope)(128, (1, 2, 2), 1024)
    x, timestep, conditioning = model.inputs.make()
    if timestep.ndim == 2:  # diffusers wants one per token
        timestep = timestep.repeat_interleave(x.shape[3] * x.shape[4] // 4, dim=1)
    with torch.no_grad():
        (expected,) = stock(x, timestep, conditioning["context"], conditioning.get("clip_fea"), return_dict=False)
    assert relative_difference(predict(name, "cpu"), expected) <= STOCK_TOLERANCE


def test_one_worker_gives_what_diffusers_gives_for_hunyuan_video_15(predict: Predictions, tiny_models: TinyModels):
    """Without padding, and with all three kinds of text tokens: diffusers takes a picture of zeros for none."""
    model = MODELS["hunyuan_15_odd_size"]
    resident = {
        "path": str(tiny_models.path(**model.checkpoint)),
        "weight_dtype": "float32",
        "compute_dtype": "float32",
    }
    stock = ResidentModel(resident, torch.device("cpu"), lambda done, total: None).model
    assert type(stock).__name__ == "HunyuanVideo15Transformer3DModel"
    x, timestep, conditioning = model.inputs.make()
    texts = conditioning["context"], conditioning["txt_byt5"]
    masks = [torch.ones(text.shape[:2]) for text in texts]
    with torch.no_grad():
        (expected,) = stock(
            x, timestep, texts[0], masks[0], None, texts[1], masks[1], conditioning["clip_fea"], return_dict=False
        )
    assert relative_difference(predict("hunyuan_15_odd_size", "cpu"), expected) <= STOCK_TOLERANCE


COG_FOLDERS: dict[str, tuple[dict[str, Any], dict[str, Any], CogVideoXInputs]] = {
    # name → the file, changes of config.json, inputs; where positions are added, diffusers needs 226 tokens of text
    "2b": (COG, {"use_rotary_positional_embeddings": False}, CogVideoXInputs(frames=3, height=6, width=10, text=226)),
    "2b_batch_2": (COG, {"use_rotary_positional_embeddings": False}, CogVideoXInputs(batch=2, text=226)),
    "5b": (COG, {"sample_height": 8, "sample_width": 14}, CogVideoXInputs(height=12, width=8)),
    "5b_larger": (COG, {"sample_height": 4, "sample_width": 6}, CogVideoXInputs(frames=1, height=6, width=14)),
    "5b_i2v": (
        COG | {"in_channels": 32, "learned_positions": 24},
        {
            "use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True,
            "sample_height": 6, "sample_width": 8, "sample_frames": 5,
        },
        CogVideoXInputs(channels=32, height=6, width=8, text=226),
    ),
    "15": (COG_15, {}, CogVideoXInputs(frames=4, height=4, width=6)),
    "15_i2v": (
        COG_15 | {"in_channels": 32, "ofs": True}, {}, CogVideoXInputs(channels=32, frames=2, ofs=True, batch=2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"])
@pytest.mark.parametrize("name", COG_FOLDERS)
def test_a_cogvideox_folder_gives_what_diffusers_gives(
    start_group: StartGroup, tiny_models: TinyModels, tmp_path: Path, name: str, devices: str
):
    """With positions as its pipelines make them, which differ from those of ComfyUI for single files."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    checkpoint, changes, inputs = COG_FOLDERS[name]
    stock_model(tiny_models.path(**checkpoint)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    stock = CogVideoXTransformer3DModel.from_pretrained(tmp_path).eval()
    x, timestep, conditioning = inputs.make()
    patches = (config["patch_size_t"] or 1, 2, 2)
    frames, height, width = (size // patch for size, patch in zip(x.shape[2:], patches, strict=True))
    base = config["sample_height"] // 2, config["sample_width"] // 2
    grid: dict[str, Any] = {"crops_coords": get_resize_crop_region_for_grid((height, width), base[1], base[0])}
    if config["patch_size_t"]:
        grid = {"crops_coords": None, "grid_type": "slice", "max_size": base}
    table = get_3d_rotary_pos_embed(64, grid_size=(height, width), temporal_size=frames, **grid)
    with torch.no_grad():
        (expected,) = stock(
            x.transpose(1, 2),
            conditioning["context"],
            timestep,
            ofs=conditioning.get("ofs"),
            image_rotary_emb=table if config["use_rotary_positional_embeddings"] else None,
            return_dict=False,
        )
    with loaded(start_group(devices), tmp_path) as remote:
        prediction = remote.step(x, timestep, conditioning)
    assert relative_difference(prediction, expected.transpose(1, 2)) <= STOCK_TOLERANCE


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("name", ["mochi", "mochi_odd_batch_2"])
def test_one_worker_gives_what_diffusers_gives_for_mochi(predict: Predictions, tiny_models: TinyModels, name: str):
    """diffusers' time runs from 0 to 1000, against ComfyUI's, and so does its prediction."""
    model = MODELS[name]
    stock = stock_model(tiny_models.path(**model.checkpoint))
    assert type(stock).__name__ == "MochiTransformer3DModel"
    x, timestep, conditioning = model.inputs.make()
    with torch.no_grad():
        (expected,) = stock(
            x, conditioning["context"], 1000 * (1 - timestep), conditioning["attention_mask"], return_dict=False
        )
    assert relative_difference(predict(name, "cpu"), -expected) <= STOCK_TOLERANCE


@pytest.mark.parametrize("name", ["ltxv", "ltxv_padded", "ltxv_odd_first_frame"])
def test_one_worker_gives_what_diffusers_gives_for_ltxv(predict: Predictions, tiny_models: TinyModels, name: str):
    """diffusers takes a token's place from its caller: in frames at 25 a second, as its pipelines give it."""
    model = MODELS[name]
    stock = stock_model(tiny_models.path(**model.checkpoint))
    assert type(stock).__name__ == "LTXVideoTransformer3DModel"
    x, timestep, conditioning = model.inputs.make()
    frames = 8 * torch.arange(x.shape[2])
    if stock.config["causal_temporal_positioning"]:
        frames = (frames - 7).clamp(min=0)
    rows, columns = (32.0 * torch.arange(size) for size in x.shape[3:])
    places = torch.meshgrid(frames / model.inputs.rate, rows, columns, indexing="ij")
    with torch.no_grad():
        (expected,) = stock(
            x.flatten(2).transpose(1, 2),
            conditioning["context"],
            1000 * timestep,
            conditioning.get("attention_mask"),
            video_coords=torch.stack(places).flatten(1).repeat(len(x), 1, 1),
            return_dict=False,
        )
    expected = expected.transpose(1, 2).unflatten(2, x.shape[2:])
    assert relative_difference(predict(name, "cpu"), expected) <= STOCK_TOLERANCE


@pytest.mark.parametrize("name", ["qwen", "qwen_padded", "qwen_clean_references"])
def test_one_worker_gives_what_diffusers_gives_for_qwen_image(predict: Predictions, tiny_models: TinyModels, name: str):
    """Of an even number of tokens each way: of an odd one diffusers has the centre one token further."""
    model = MODELS[name]
    stock = stock_model(tiny_models.path(**model.checkpoint))
    assert type(stock).__name__ == "QwenImageTransformer2DModel"
    with torch.device("cpu"):  # its position table: no weight, hence never loaded
        stock.pos_embed = type(stock.pos_embed)(10000, [16, 56, 56], scale_rope=True)
    x, timestep, conditioning = model.inputs.make()
    pictures = [x, *(tensor for name, tensor in conditioning.items() if name.startswith("ref_latents."))]
    tokens = [rearrange(p, "b c t (h ph) (w pw) -> b (t h w) (c ph pw)", ph=2, pw=2) for p in pictures]
    with torch.no_grad():
        (expected,) = stock(
            torch.cat(tokens, dim=1),
            conditioning["context"],
            conditioning.get("attention_mask"),
            timestep,
            [[(1, p.shape[3] // 2, p.shape[4] // 2) for p in pictures]],
            return_dict=False,
        )
    expected = expected[:, : tokens[0].shape[1]]
    expected = rearrange(expected, "b (h w) (c ph pw) -> b c 1 (h ph) (w pw)", h=x.shape[3] // 2, ph=2, pw=2)
    assert relative_difference(predict(name, "cpu"), expected) <= STOCK_TOLERANCE


@pytest.mark.parametrize("name", ["flux2", "flux2_references", "flux2_klein"])
def test_one_worker_gives_what_diffusers_gives_for_flux2(predict: Predictions, tiny_models: TinyModels, name: str):
    """diffusers takes each token's plane, row, column and place in the text from its caller."""
    model = MODELS[name]
    stock = stock_model(tiny_models.path(**model.checkpoint))
    assert type(stock).__name__ == "Flux2Transformer2DModel"
    x, timestep, conditioning = model.inputs.make()
    pictures = [x, *(tensor for name, tensor in conditioning.items() if name.startswith("ref_latents."))]
    one = torch.arange(1)
    places = [
        torch.cartesian_prod(10 * i + one, torch.arange(picture.shape[2]), torch.arange(picture.shape[3]), one)
        for i, picture in enumerate(pictures)
    ]
    text = torch.cartesian_prod(one, one, one, torch.arange(conditioning["context"].shape[1]))
    with torch.no_grad():
        (expected,) = stock(
            torch.cat([picture.flatten(2).transpose(1, 2) for picture in pictures], dim=1),
            conditioning["context"],
            timestep,
            torch.cat(places),
            text,
            conditioning["guidance"],
            return_dict=False,
        )
    expected = expected[:, : x.shape[2] * x.shape[3]].transpose(1, 2).unflatten(2, x.shape[2:])
    assert relative_difference(predict(name, "cpu"), expected) <= STOCK_TOLERANCE


def test_two_models_side_by_side(start_group: StartGroup, tiny_models: TinyModels, predict: Predictions):
    group = start_group("cpu,cpu")
    first, second = MODELS["padded_text"], MODELS["several_blocks"]
    with (
        loaded(group, tiny_models.path(**first.checkpoint)) as a,
        loaded(group, tiny_models.path(**second.checkpoint)) as b,
    ):
        for _ in range(2):
            assert torch.equal(a.step(*first.inputs.make()), predict("padded_text", "cpu,cpu"))
            assert torch.equal(b.step(*second.inputs.make()), predict("several_blocks", "cpu,cpu"))


def test_a_result_is_not_overwritten_by_the_next_step(start_group: StartGroup, tiny_models: TinyModels):
    with loaded(start_group("cpu,cpu"), tiny_models.path()) as remote:
        first = remote.step(*PADDED.make())
        kept = first.clone()
        second = remote.step(*Inputs(valid=(5,), seed=7).make())
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)


def test_sizes_may_change_from_step_to_step(start_group: StartGroup, tiny_models: TinyModels):
    sizes = [Inputs(), Inputs(frames=4, height=16, width=16), Inputs(frames=1, height=4, width=6), Inputs()]
    with loaded(start_group("cpu,cpu"), tiny_models.path()) as remote:
        results = [remote.step(*inputs.make()) for inputs in sizes]
    with loaded(start_group("cpu"), tiny_models.path()) as remote:
        for inputs, result in zip(sizes, results, strict=True):
            assert relative_difference(result, remote.step(*inputs.make())) <= SPLIT_TOLERANCE
    assert torch.equal(results[0], results[-1])


# --- refusals: named, before any work, and the workers stay usable ------------------------------------------------


def test_more_workers_than_tokens_are_refused(start_group: StartGroup, tiny_models: TinyModels):
    group = start_group("cpu,cpu,cpu,cpu")
    with loaded(group, tiny_models.path()) as remote:
        with pytest.raises(
            ConfigError, match=r"devices gives 4 ranks to one sequence, but this latent has only 2 tokens"
        ):
            remote.step(*Inputs(frames=1, height=2, width=4).make())
        assert remote.step(*Inputs().make()).isfinite().all()


def test_an_unknown_input_is_refused(start_group: StartGroup, tiny_models: TinyModels):
    x, timestep, conditioning = Inputs().make()
    with loaded(start_group("cpu,cpu"), tiny_models.path()) as remote:
        with pytest.raises(UnsupportedError, match=r"cannot use the input ref_latent \(guidance_type custom"):
            remote.step(x, timestep, conditioning | {"ref_latent": x[:, :, :1]})
        assert remote.step(x, timestep, conditioning).isfinite().all()


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        pytest.param("padded_text", {"attention_mask": torch.ones(1, 8)}, "attention_mask is floating", id="mask"),
        pytest.param("flux_references", {"ref_latents_method": pack_text("far")}, "reference method far", id="method"),
    ],
)
def test_a_value_that_cannot_be_honoured_is_refused_before_anything_is_sent(
    start_group: StartGroup, tiny_models: TinyModels, name: str, changes: dict[str, Tensor], complaint: str
):
    """Of several batch groups only some would see it, and the group would have to be started again."""
    group, model = start_group(FOUR), MODELS[name]
    x, timestep, conditioning = model.inputs.make()
    with loaded(group, tiny_models.path(**model.checkpoint), dp_degree=4) as remote:
        pids, expected = group.pids, remote.step(x, timestep, conditioning)
        with pytest.raises(UnsupportedError, match=complaint):
            remote.step(x, timestep, conditioning | changes)
        assert torch.equal(remote.step(x, timestep, conditioning), expected)
        assert group.pids == pids


def test_a_checkpoint_that_the_workers_cannot_load(start_group: StartGroup, tiny_models: TinyModels, tmp_path):
    """The header looks right, the content is not: found by the workers."""
    tensors = load_file(tiny_models.path())
    del tensors["single_blocks.0.linear2.bias"]
    save_file(tensors, tmp_path / "lost.safetensors")
    group = start_group("cpu,cpu")
    with (
        pytest.raises(WorkerError, match=r"lost.safetensors lacks 1 tensors") as caught,
        loaded(group, tmp_path / "lost.safetensors"),
    ):
        pass
    assert caught.value.remote_type == CheckpointError.__name__
    assert group.alive


def test_only_latents_cross_after_the_first_step(
    start_group: StartGroup, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
):
    """Weights and conditioning do not travel again, also not when they come as new tensors of the same values."""
    written: list[int] = []
    sent: list[int] = []

    def laid_out(segment: str, tensors: Sequence[tuple[Sequence[int], torch.dtype]]) -> tuple[list[TensorRef], int]:
        refs, size = lay_out(segment, tensors)
        written.extend(ref.nbytes for ref in refs)
        return refs, size

    def counted_send(channel: Channel, message: Message, fds: tuple[int, ...] = ()) -> None:
        sent.append(len(json.dumps(message)))
        send(channel, message, fds)

    send = Channel.send
    x, timestep, conditioning = PADDED.make()
    with loaded(start_group("cpu,cpu"), tiny_models.path()) as remote:
        first = remote.step(x, timestep, conditioning)
        monkeypatch.setattr(remote_transformer, "lay_out", laid_out)
        monkeypatch.setattr(memory, "lay_out", laid_out)
        monkeypatch.setattr(Channel, "send", counted_send)
        again = remote.step(x, timestep, {name: tensor.clone() for name, tensor in conditioning.items()})
    assert torch.equal(first, again)
    assert sum(written) == x.nbytes + timestep.nbytes + again.nbytes
    assert 0 < sum(sent) < 4096  # the request to two workers, nothing else
