"""Diffusers' transformer folders: what the host knows of one, what the worker builds, what damaged ones are told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallel.config import SequenceParallelConfig
from parallel.diffusers.folder import CONFIG, NetworkFile, read_config, recipe
from parallel.diffusers.tensors import mapped
from parallel.diffusers.tiny import TINY, write_tiny
from parallel.errors import CheckpointError, UnsupportedError
from parallel.plans.diffusers import CHAINS, PLANS
from parallel.split import SequenceRanks, Split
from parallel.split.routes import ThroughTorch

HUNYUAN, FLUX, WAN, COGVIDEOX = TINY
FILE = "diffusion_pytorch_model.safetensors"
INDEX = f"{FILE}.index.json"
CPU = torch.device("cpu")
CONFIGURATION = SequenceParallelConfig(devices="cpu,cpu")
SMALL: dict[str, dict[str, Any]] = {
    HUNYUAN: {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1},
    FLUX: {"num_layers": 1, "num_single_layers": 1},
    WAN: {"num_layers": 1},
    COGVIDEOX: {"num_layers": 1},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Class → a folder of it, in bf16 with one head. Nobody changes them."""
    made = {}
    for network in TINY:
        made[network] = tmp_path_factory.mktemp("folders") / network
        write_tiny(made[network], network, heads=1, dtype=torch.bfloat16, **SMALL[network])
    return made


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """One to be damaged."""
    return Path(shutil.copytree(folders[WAN], tmp_path / "folder"))


def network_of(folder: Path, weight_dtype: torch.dtype | None = None) -> tuple[Any, dict[str, torch.dtype]]:
    return NetworkFile(str(folder), weight_dtype, CPU).network()


def rewritten(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Under another name first: the tensors may be mapped from the file."""
    save_file(tensors, folder / "new")
    (folder / "new").replace(folder / FILE)


# --- what is there ------------------------------------------------------------------------------------------------


def test_every_planned_class_has_a_tiny_one() -> None:
    assert set(TINY) == set(PLANS)


@pytest.mark.parametrize("network", TINY)
def test_the_worker_builds_what_diffusers_loads(folders: dict[str, Path], network: str) -> None:
    """Every parameter, as it is in the file; buffers and settings as in any network of the class."""
    expected = getattr(diffusers, network).from_pretrained(folders[network], torch_dtype=torch.bfloat16)
    found, changed = network_of(folders[network])
    assert type(found) is type(expected) and not found.training and not changed
    assert not any(parameter.requires_grad for parameter in found.parameters())
    stored = load_file(folders[network] / FILE)
    assert {name for name, _ in found.named_parameters()} == set(stored)
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, stored[name]), name
    buffers = dict(expected.named_buffers())
    for name, buffer in found.named_buffers():
        assert torch.equal(buffer, buffers[name].to(buffer.dtype)), name


@pytest.mark.parametrize("weight_dtype", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("network", TINY)
def test_the_host_knows_what_the_worker_will_keep(
    folders: dict[str, Path], network: str, weight_dtype: torch.dtype | None
) -> None:
    made = recipe(str(folders[network]), CONFIGURATION, weight_dtype)
    built, changed = network_of(folders[network], weight_dtype)
    kept = {name: changed.get(name, parameter.dtype) for name, parameter in built.named_parameters()}
    assert made.nbytes == sum(p.numel() * kept[name].itemsize for name, p in built.named_parameters())
    assert made.in_the_file == sum(p.nbytes for name, p in built.named_parameters() if name not in changed)
    assert (made.network, made.library, made.heads) == (network, "diffusers", 1)
    assert {layer.name: layer.itemsize for layer in made.linear} == {
        name: kept[f"{name}.weight"].itemsize for name, m in built.named_modules() if type(m) is torch.nn.Linear
    }


def test_what_diffusers_keeps_in_fp32_stays_so(folders: dict[str, Path], tmp_path: Path) -> None:
    """Wan's time embedding, norms and modulation."""
    write_tiny(tmp_path / "wan", WAN, heads=1, **SMALL[WAN])
    _, changed = network_of(tmp_path / "wan", torch.bfloat16)
    assert set(changed.values()) == {torch.bfloat16}
    unchanged = {name.removesuffix(".weight").removesuffix(".bias") for name in set(load_file(tmp_path / "wan" / FILE))}
    unchanged -= {name.removesuffix(".weight").removesuffix(".bias") for name in changed}
    assert {"blocks.0.scale_shift_table", "condition_embedder.time_embedder.linear_1", "blocks.0.norm2"} <= unchanged
    assert not any(".attn1." in name for name in unchanged)
    _, changed = network_of(folders[WAN], torch.bfloat16)
    assert set(changed.values()) == {torch.float32}, "a file has them in bf16"


def test_the_shape_of_a_prediction_is_known(folders: dict[str, Path]) -> None:
    """Channels, and where they are."""
    made = {network: recipe(str(path), CONFIGURATION) for network, path in folders.items()}
    where = {network: (each.channels, each.channels_dim) for network, each in made.items()}
    assert where == {HUNYUAN: (16, 1), FLUX: (64, -1), WAN: (16, 1), COGVIDEOX: (16, 2)}


@pytest.mark.parametrize("network", TINY)
def test_plans_and_chains_name_what_the_installed_diffusers_has(folders: dict[str, Path], network: str) -> None:
    built, _ = network_of(folders[network])
    Split(built, PLANS[network], SequenceRanks((1.0,)), ThroughTorch).remove()
    chain = CHAINS[network]
    assert all(len(built.get_submodule(path)) for path in chain.blocks)


def test_a_configuration_may_leave_out_what_has_a_default(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    whole = recipe(str(folder), CONFIGURATION)
    del config["image_dim"], config["out_channels"]
    (folder / CONFIG).write_text(json.dumps(config))
    found = recipe(str(folder), CONFIGURATION)
    assert (found.channels, found.nbytes, found.arguments["image_dim"]) == (whole.channels, whole.nbytes, None)


def test_a_tensor_that_diffusers_ignores_in_its_old_folders_is_ignored(folder: Path) -> None:
    whole = recipe(str(folder), CONFIGURATION)
    rewritten(folder, load_file(folder / FILE) | {"blocks.0.attn2.norm_added_q.weight": torch.ones(128)})
    network_of(folder)
    assert recipe(str(folder), CONFIGURATION).nbytes == whole.nbytes


def in_shards(folder: Path) -> None:
    """Two files with an index, as `save_pretrained` writes them."""
    tensors = load_file(folder / FILE)
    names, weight_map = sorted(tensors), {}
    for i, part in enumerate((names[:4], names[4:])):
        shard = f"diffusion_pytorch_model-{i + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / FILE).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_folder_of_several_files(folder: Path) -> None:
    """A file that the index does not name is ignored."""
    expected = load_file(folder / FILE)
    in_shards(folder)
    save_file({"proj_out.bias": torch.zeros(2)}, folder / "zz_backup.safetensors")
    found = mapped(str(folder))
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, "", "{", "[]", "null", '{"num_layers": 2}', b"\xff\xfe"])
def test_a_folder_without_a_whole_configuration_is_refused(folder: Path, content: str | bytes | None) -> None:
    if content is None:
        (folder / CONFIG).unlink()
    else:
        (folder / CONFIG).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=f"{folder} is no transformer folder of diffusers: {CONFIG}: "):
        recipe(str(folder), CONFIGURATION)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    for path in (tmp_path / "nothing", tmp_path / "model.safetensors"):
        with pytest.raises(CheckpointError, match=f"{path} is no transformer folder of diffusers"):
            read_config(str(path))


@pytest.mark.parametrize("name", ["MochiTransformer3DModel", "UNet2DConditionModel", "os", ["WanTransformer3DModel"]])
def test_a_class_without_a_plan_is_named(folder: Path, name: Any) -> None:
    config = json.loads((folder / CONFIG).read_text()) | {"_class_name": name}
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"which has no plan; plans exist for CogVideoX.*, Flux.*, Hunyuan.*, W"):
        recipe(str(folder), CONFIGURATION)


@pytest.mark.parametrize("changes", [{"num_layers": "two"}, {"num_attention_heads": None}, {"patch_size": 7}])
def test_values_that_the_class_does_not_take_are_told_with_the_path(folder: Path, changes: dict[str, Any]) -> None:
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | changes))
    with pytest.raises(CheckpointError, match=f"{folder}: WanTransformer3DModel cannot be made as {CONFIG} says: "):
        recipe(str(folder), CONFIGURATION)


def whole(path: Path) -> bytes:
    return path.read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / FILE).unlink(),
        *(
            lambda folder, kept=kept: (folder / FILE).write_bytes(whole(folder / FILE)[: int(kept * 10_000)])
            for kept in (0, 0.0001, 0.01, 1)
        ),
        lambda folder: (folder / FILE).write_bytes(whole(folder / FILE)[:-10]),
        lambda folder: (folder / FILE).write_bytes(b"<!DOCTYPE html><html><body>404: not found</body></html>"),
        lambda folder: (folder / FILE).write_bytes((2**62).to_bytes(8, "little") + bytes(100)),
    ],
    ids=["missing", "empty", "one byte", "in its header", "in its tensors", "nearly whole", "a page", "a large header"],
)
def test_a_damaged_file_is_refused(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=f"{folder} is damaged or incomplete: "):
        recipe(str(folder), CONFIGURATION)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_shard_is_refused(folder: Path, damage: str) -> None:
    in_shards(folder)
    shard = folder / "diffusion_pytorch_model-00002-of-00002.safetensors"
    shard.unlink() if damage == "missing" else shard.write_bytes(whole(shard)[:-10])
    with pytest.raises(CheckpointError, match=f"{folder} is damaged or incomplete: "):
        recipe(str(folder), CONFIGURATION)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_refused(folder: Path, content: str) -> None:
    (folder / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=f"{folder} is damaged or incomplete: "):
        recipe(str(folder), CONFIGURATION)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"proj_out.bias": None}, "lacks 1 tensors of WanTransformer3DModel, e.g. proj_out.bias"),
        (
            {"lora.up": torch.zeros(2), "lora.down": torch.zeros(2)},
            r"has, and should not have, 2 tensors of WanTransformer3DModel, e.g. lora\.\w+, lora",
        ),
        ({"proj_out.bias": torch.zeros(2)}, r"'proj_out.bias' has the shape \[2\], but WanTransformer3DModel needs"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, changes: dict[str, Tensor | None], complaint: str) -> None:
    tensors = load_file(folder / FILE) | changes
    rewritten(folder, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(CheckpointError, match=complaint):
        network_of(folder)


def test_a_folder_that_bitsandbytes_has_quantised_is_refused(folder: Path) -> None:
    """Its weights are of another shape or have companions, whatever packages are installed."""
    name = "blocks.0.attn1.to_q.weight"
    tensors = load_file(folder / FILE)
    for changes in ({f"{name}.absmax": torch.ones(1)}, {name: torch.zeros(8192, 1, dtype=torch.uint8)}):
        rewritten(folder, tensors | changes)
        with pytest.raises(CheckpointError, match=r"blocks\.0\.attn1\.to_q"):
            network_of(folder)
