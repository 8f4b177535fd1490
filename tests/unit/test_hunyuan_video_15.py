"""HunyuanVideo 1.5's adapter: checkpoints, inputs, and what is refused. A step's result is tested in distributed/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.adapters.hunyuan_video_15 import HunyuanVideo15Adapter
from parallel.adapters.registry import adapter_for
from parallel.checkpoints.source import Source, TensorInfo, open_source
from parallel.demo.checkpoint import write_tiny_hunyuan_video_15
from parallel.errors import CheckpointError, UnsupportedError
from tests.unit.inputs import of_shapes

ADAPTER = HunyuanVideo15Adapter()
VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {"heads": 1, "depth": 1, "context_dim": 32},
    "deeper": {"heads": 2, "depth": 3, "context_dim": 64},
}

# ComfyUI's own names and shapes of one block and of everything around it, hidden size 128.
D, TEXT, BYT5, WIDE, IMAGE = 128, 32, 1472, 2048, 1152
LINEAR = {
    "img_in.proj": (D, 65, 1, 1, 1), "time_in.in_layer": (D, 256), "time_in.out_layer": (D, D),
    "txt_in.input_embedder": (D, TEXT), "txt_in.c_embedder.in_layer": (D, TEXT), "txt_in.c_embedder.out_layer": (D, D),
    "txt_in.t_embedder.in_layer": (D, 256), "txt_in.t_embedder.out_layer": (D, D),
    "byt5_in.layernorm": (BYT5,), "byt5_in.fc1": (WIDE, BYT5), "byt5_in.fc2": (WIDE, WIDE), "byt5_in.fc3": (D, WIDE),
    "vision_in.proj.0": (IMAGE,), "vision_in.proj.1": (IMAGE, IMAGE), "vision_in.proj.3": (D, IMAGE),
    "vision_in.proj.4": (D,), "final_layer.linear": (32, D), "final_layer.adaLN_modulation.1": (2 * D, D),
    **{f"double_blocks.0.{stream}_attn.qkv": (3 * D, D) for stream in ("img", "txt")},
    **{f"double_blocks.0.{stream}_attn.proj": (D, D) for stream in ("img", "txt")},
    **{f"double_blocks.0.{stream}_mlp.0": (4 * D, D) for stream in ("img", "txt")},
    **{f"double_blocks.0.{stream}_mlp.2": (D, 4 * D) for stream in ("img", "txt")},
    **{f"double_blocks.0.{stream}_mod.lin": (6 * D, D) for stream in ("img", "txt")},
    **{
        f"txt_in.individual_token_refiner.blocks.{i}.{name}": shape
        for i in range(2)
        for name, shape in {
            "norm1": (D,), "norm2": (D,), "self_attn.qkv": (3 * D, D), "self_attn.proj": (D, D), "mlp.0": (4 * D, D),
            "mlp.2": (D, 4 * D), "adaLN_modulation.1": (2 * D, D),
        }.items()
    },
}  # fmt: skip
RELEASED = {
    **{f"{name}.weight": shape for name, shape in LINEAR.items()},
    **{f"{name}.bias": shape[:1] for name, shape in LINEAR.items()},
    **{
        f"double_blocks.0.{stream}_attn.norm.{kind}_norm.weight": (D,)
        for stream in ("img", "txt")
        for kind in ("query", "key")
    },
    "cond_type_embedding.weight": (3, D),
}
INPUTS: dict[str, tuple[int, ...]] = {
    "x": (1, 65, 3, 5, 3), "timestep": (1,), "context": (1, 8, TEXT), "txt_byt5": (1, 4, BYT5), "guidance": (1,),
    "clip_fea": (1, 6, IMAGE), "y": (1, 768),
}  # fmt: skip


def source_of(shapes: dict[str, tuple[int, ...]]) -> Source:
    infos = {name: TensorInfo(shape, torch.float32) for name, shape in shapes.items()}
    return Source("model.safetensors", infos, {}, None, {})


CONFIG = ADAPTER.model_config(source_of(RELEASED))


def test_the_tensors_have_the_names_and_shapes_of_the_released_ones():
    assert ADAPTER.native_tensors(CONFIG) == RELEASED


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_configuration_is_read_back_from_the_shapes(tmp_path: Path, variant: str):
    written = write_tiny_hunyuan_video_15(tmp_path / "model.safetensors", **VARIANTS[variant])
    assert ADAPTER.model_config(open_source(str(tmp_path / "model.safetensors"))).items() >= written.items()


def test_tencents_names_of_blocks_are_understood():
    """As in ComfyUI, which renames them."""
    renamed = {name.replace("_attn.qkv", "_attn_qkv").replace("_mlp.0", "_mlp.fc1"): s for name, s in RELEASED.items()}
    assert renamed != RELEASED
    assert isinstance(adapter_for(source_of(renamed)), HunyuanVideo15Adapter)
    assert ADAPTER.model_config(source_of(renamed)) == CONFIG
    (piece,) = ADAPTER.pieces("double_blocks.0.img_mlp.fc1.weight", (4 * D, D), CONFIG)
    assert piece.name == "transformer_blocks.0.ff.net.0.proj.weight"


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("marker", "relative"),
    [
        ("time_r_in.in_layer.weight", r"1\.5 with MeanFlow \(step-distilled and super-resolution"),
        ("time_r_in.mlp.0.weight", "with MeanFlow"),
        ("guidance_in.in_layer.weight", "with embedded guidance"),
        ("single_blocks.0.linear1.weight", "with single-stream blocks"),
    ],
)
def test_relatives_are_refused_by_name(marker: str, relative: str):
    source = source_of(RELEASED | {marker: (1,)})
    with pytest.raises(UnsupportedError, match=relative):
        adapter_for(source).model_config(source)


@pytest.mark.parametrize(("key", "value"), [("use_meanflow", True), ("rope_theta", 10000.0), ("mlp_ratio", 2.0)])
def test_a_folder_of_another_kind_is_refused_by_name(tmp_path: Path, key: str, value: Any):
    config = {"_class_name": "HunyuanVideo15Transformer3DModel", key: value}
    with pytest.raises(UnsupportedError, match=f"{key} is {json.dumps(value).capitalize()}"):
        ADAPTER.model_config(Source(str(tmp_path), {}, {}, config, {}))


def test_an_incomplete_file_is_named():
    shapes = {name: shape for name, shape in RELEASED.items() if not name.startswith("txt_in.input")}
    with pytest.raises(CheckpointError, match=r"looks like HunyuanVideo 1\.5, but is incomplete.*txt_in\.input"):
        ADAPTER.model_config(source_of(shapes))


def test_good_inputs_give_the_number_of_tokens():
    assert ADAPTER.check_inputs(CONFIG, of_shapes(INPUTS)) == 3 * 5 * 3


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"ref_latent": (1, 32, 1, 5, 3)}, "1.5 .SP. cannot use the input ref_latent yet"),
        ({"guiding_frame_index": (1,)}, "cannot use the input guiding_frame_index yet"),
        ({"txt_byt5": (1, 4, 64)}, r"txt_byt5 has the shape \[1, 4, 64\].*1472.*from ByT5"),
        ({"clip_fea": (1, 6, 1280)}, r"clip_fea has the shape \[1, 6, 1280\].*1152.*from SigLIP"),
        ({"x": (1, 33, 3, 5, 3)}, r"HunyuanVideo 1\.5 needs a latent of shape \[batch, 65,"),
        ({"timestep": (1, 3)}, r"one timestep per sample; got \[1, 3\]"),
        ({"attention_mask": (1, 12)}, r"attention_mask has the shape \[1, 12\]; the text is \[1, 8, 32\]"),
    ],
)
def test_inputs_that_cannot_be_honoured_are_named(changes: dict[str, tuple[int, ...]], complaint: str):
    with pytest.raises(UnsupportedError, match=complaint):
        ADAPTER.check_inputs(CONFIG, of_shapes(INPUTS | changes))
