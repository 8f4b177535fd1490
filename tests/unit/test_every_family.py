"""What every family in the registry must fulfil. A new one is tested here as soon as it has a writer of tiny files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel.adapters.base import Adapter
from parallel.adapters.native import NativeTensors
from parallel.adapters.registry import FAMILIES, adapter_for
from parallel.attention.kernels import Sdpa
from parallel.cache.blocks import StepPasses, TeaCache
from parallel.checkpoints.source import Source, open_source
from parallel.degrees import Degrees
from parallel.demo.checkpoint import SCALED_LAYOUTS, WRITERS
from parallel.errors import UnsupportedError
from parallel.quantise.selection import select
from parallel.worker.homes import Replicated, watch_blocks
from parallel.worker.ranks import SoloContext
from parallel.worker.resident import ResidentModel
from tests.golden import vectors

PACKAGE = Path(__file__).parents[2]
TINY: dict[str, Any] = {"heads": 1, "depth": 2}
CASES = [
    pytest.param(family, options, id=f"{family}-{name}")
    for family in FAMILIES
    for name, options in {
        "plain": {},
        "prefix": {"prefix": "model.diffusion_model."},
        "bf16": {"dtype": torch.bfloat16},
        **{layout: {"scaled": layout} for layout in SCALED_LAYOUTS},
    }.items()
]


def written(folder: Path, family: str, **options: Any) -> tuple[Source, Adapter, dict[str, Any]]:
    """A tiny checkpoint, and what the engine makes of its header."""
    WRITERS[family](folder / "tiny.safetensors", **TINY, **options)
    source = open_source(str(folder / "tiny.safetensors"))
    adapter = FAMILIES[family]()
    return source, adapter, adapter.model_config(source)


def example(adapter: Adapter, config: dict[str, Any], ranks: int = 2) -> dict[str, Tensor]:
    return adapter.example(config, ranks, torch.float32)


def test_every_family_can_be_written_and_has_golden_vectors():
    assert set(WRITERS) == set(FAMILIES), "parallel/demo/checkpoint.py lacks a writer"
    compared = {vectors.read(name).checkpoint["family"] for name in vectors.names()}
    assert compared == set(FAMILIES), "tests/golden/make_golden.py lacks a case"


@pytest.mark.parametrize(("family", "options"), CASES)
def test_a_file_is_of_one_family_and_fills_every_parameter_once(tmp_path: Path, family: str, options: dict[str, Any]):
    source, adapter, config = written(tmp_path, family, **options)
    assert isinstance(adapter_for(source), FAMILIES[family])
    assert [name for name, other in FAMILIES.items() if other.detect(source.tensors)] == [family]
    assert adapter.native_tensors(config) == {name: info.shape for name, info in source.tensors.items()}
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in adapter.model_class()(**config).named_parameters()}
    filled: dict[str, torch.Size] = {}
    for name, info in source.tensors.items():
        whole = torch.zeros(info.shape, device="meta")
        rows = []
        for piece in adapter.pieces(name, info.shape, config):
            assert piece.name not in filled, f"{piece.name} is filled twice"
            filled[piece.name] = piece.take(whole).shape
            rows += piece.take(torch.arange(info.shape[0])).tolist()
        assert sorted(rows) == list(range(info.shape[0])), f"rows of {name} are lost or doubled"
    assert filled == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_diffusers_folder_is_recognised(tmp_path: Path, family: str):
    written(tmp_path, family)
    recipe = {"path": str(tmp_path / "tiny.safetensors"), "weight_dtype": "float32", "compute_dtype": "float32"}
    model: Any = ResidentModel(recipe, torch.device("cpu"), lambda done, total: None).model
    model.save_pretrained(tmp_path / "folder")
    source = open_source(str(tmp_path / "folder"))
    assert [name for name, other in FAMILIES.items() if other.detect_diffusers(source.config or {})] == [family]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_example_is_a_legal_step(tmp_path: Path, family: str):
    _, adapter, config = written(tmp_path, family)
    for ranks in (2, 3, 8):
        assert adapter.check_inputs(config, example(adapter, config, ranks)) > ranks


class OneAtATime(Replicated):
    """Blocks whose weights are there for their own turn; at any other time they are not numbers."""

    def __init__(self, model: nn.Module, device: torch.device):
        super().__init__(model, device)
        self._blocks = watch_blocks(model, self)
        self._values: list[list[Tensor]] = []
        self.brought: list[int] = []

    def hide(self) -> None:
        self._values = [[parameter.data for parameter in block.parameters()] for block in self._blocks]
        self._show(-1)

    def bring(self, index: int) -> None:
        self.brought.append(index)
        self._show(index)

    def _show(self, index: int) -> None:
        for number, (block, values) in enumerate(zip(self._blocks, self._values, strict=True)):
            for parameter, value in zip(block.parameters(), values, strict=True):
                parameter.data = value if number == index else torch.full_like(value, torch.nan)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_is_used_in_its_turn_only(tmp_path: Path, family: str):
    """So its weights can be elsewhere at any other time: on other ranks, or in host memory."""
    _, adapter, config = written(tmp_path, family)
    recipe = {"path": str(tmp_path / "tiny.safetensors"), "weight_dtype": "float32", "compute_dtype": "float32"}
    whole, model = (
        ResidentModel(recipe, torch.device("cpu"), lambda done, total: None, home) for home in (Replicated, OneAtATime)
    )
    turns: Any = model.home
    turns.hide()
    results = []
    for resident in (whole, model):
        inputs = example(adapter, config)
        x, timestep = inputs.pop("x"), inputs.pop("timestep")
        results.append(torch.empty(adapter.output_shape(config, tuple(x.shape))))
        context = SoloContext(Sdpa())
        cache = TeaCache(0.0, torch.device("cpu"), coefficients=[1.0])  # which looks into the first block before
        cache.begin_step(Degrees(), active=True)
        context.cache = StepPasses(cache, 0, (), lambda sums: None)
        with torch.no_grad():
            adapter.step(resident.model, x, timestep, adapter.prepare(inputs), results[-1], context)
    assert len(turns._blocks) >= 2
    assert sorted(set(turns.brought)) == list(range(len(turns._blocks)))
    assert torch.equal(*results)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_cannot_be_honoured_is_named(tmp_path: Path, family: str):
    _, adapter, config = written(tmp_path, family)
    inputs = example(adapter, config)
    latent = inputs["x"]
    for changes, said in [
        ({"unheard_of": torch.zeros(1)}, "unheard_of"),
        ({"control.0": torch.zeros(1)}, "control.0"),
        ({"x": latent[:, :1]}, f"[{latent.shape[0]}, 1, "),
        ({"context": inputs["context"][..., :-1]}, str(list(inputs["context"][..., :-1].shape))),
    ]:
        with pytest.raises(UnsupportedError) as refusal:
            adapter.check_inputs(config, inputs | changes)
        assert said in str(refusal.value)
    del inputs["context"]
    with pytest.raises(UnsupportedError, match="text encoder"):
        adapter.check_inputs(config, inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_is_for_the_blocks_and_not_for_their_modulation(tmp_path: Path, family: str):
    source, adapter, config = written(tmp_path, family)
    tensors = NativeTensors(source, adapter, config)
    dtypes = {"storage": torch.float32, "compute": torch.float32}
    found = select(source, adapter, tensors, scheme="weight_only", skip=(), **dtypes)
    assert found.weights
    for name in found.weights:
        assert re.match(r"\w*blocks\.\d+\.", name) and not re.search("norm|mod", name), f"{name}: see not_quantised"


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_else_knows_a_family(family: str):
    """A family is its own file and a line in the registry; the tiny checkpoints import it to make theirs."""
    files = [path for half in ("nodes", "parallel") for path in (PACKAGE / half).rglob("*.py")]
    line = f"import {FAMILIES[family].__name__}\n"
    users = {path.relative_to(PACKAGE).as_posix() for path in files if line in path.read_text()}
    assert users == {"parallel/adapters/registry.py", "parallel/demo/checkpoint.py"}
