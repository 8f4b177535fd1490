"""FLUX.1's inputs: what is refused by name, and where reference pictures lie."""

from __future__ import annotations

import pytest
import torch

from parallel.adapters.base import pack_text, unpack_text
from parallel.adapters.flux import FluxAdapter, _offsets
from parallel.errors import UnsupportedError
from tests.unit.inputs import of_shapes

ADAPTER = FluxAdapter()
CONFIG = {"in_channels": 64, "out_channels": 64, "joint_attention_dim": 32, "pooled_projection_dim": 768}
INPUTS: dict[str, tuple[int, ...]] = {
    "x": (1, 16, 9, 6), "timestep": (1,), "context": (1, 8, 32), "y": (1, 768), "guidance": (1,),
}  # fmt: skip
REFERENCES = {"ref_latents.0": (1, 16, 3, 4), "ref_latents.1": (1, 16, 8, 8)}


def test_references_do_not_count_as_tokens_of_the_latent():
    for method in (None, "offset", "index", "uxo"):
        placed = {} if method is None else {"ref_latents_method": pack_text(method)}
        assert ADAPTER.check_inputs(CONFIG, of_shapes(INPUTS | REFERENCES) | placed) == 5 * 3
    assert ADAPTER.check_inputs(CONFIG, of_shapes(INPUTS)) == 5 * 3


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"attention_mask": (1, 8), "refs.0": (1, 16, 3, 4)}, "cannot use the input attention_mask, refs.0 yet"),
        ({"ref_latents.1": (1, 4, 8, 8)}, r"\[1, 16, height, width\] for this latent; ref_latents.1 is \[1, 4, 8, 8\]"),
        ({"ref_latents.0": (2, 16, 8, 8)}, r"ref_latents.0 is \[2, 16, 8, 8\]"),
        ({"ref_latents.0": (1, 16, 1, 8, 8)}, r"ref_latents.0 is \[1, 16, 1, 8, 8\]"),
        ({"x": (1, 16, 2, 9, 6)}, r"\[batch, 16, height, width\]; it is \[1, 16, 2, 9, 6\]"),
    ],
)
def test_inputs_that_cannot_be_honoured_are_named(changes: dict[str, tuple[int, ...]], complaint: str):
    with pytest.raises(UnsupportedError, match=complaint):
        ADAPTER.check_inputs(CONFIG, of_shapes(INPUTS | changes))


@pytest.mark.parametrize("method", ["index_timestep_zero", "unheard_of"])
def test_a_method_that_cannot_be_honoured_is_named(method: str):
    """On the host, before anything is sent: workers that have no part of the step would not see it."""
    with pytest.raises(UnsupportedError, match=f"reference method {method}; choose offset, index, uxo"):
        ADAPTER.check_inputs(CONFIG, of_shapes(INPUTS | REFERENCES) | {"ref_latents_method": pack_text(method)})


def test_more_than_ten_references_keep_their_order():
    references = {f"ref_latents.{i}": torch.full((1, 16, 2, 2), float(i)) for i in reversed(range(12))}
    prompt = ADAPTER.prepare({"context": torch.zeros(1, 8, 32)} | references)
    assert [int(reference[0, 0, 0, 0]) for reference in prompt.references] == list(range(12))


def test_places_of_references():
    """In tokens of 2 × 2, rounded up."""
    sizes = [(4, 8), (6, 4), (2, 3)]
    references = [torch.zeros(1, 16, *size) for size in sizes]
    x = torch.zeros(1, 16, 9, 6)
    assert _offsets(references, "index", x) == [(1, 0, 0), (2, 0, 0), (3, 0, 0)]
    assert _offsets(references, "uxo", x) == [(0, 5, 3), (0, 7, 7), (0, 10, 9)]
    assert _offsets(references, "offset", x) == [(1, 0, 0), (1, 2, 0), (1, 0, 4)]


def test_text_survives_packing():
    packed = pack_text("uxo")
    assert packed.shape == (1, 3)
    assert unpack_text(packed) == "uxo"


def test_the_self_checks_example_is_a_legal_step():
    for world in (2, 3, 8):
        example = ADAPTER.example(CONFIG, world, torch.float32)
        assert any(name.startswith("ref_latents") for name in example)
        assert ADAPTER.check_inputs(CONFIG, example) > world
