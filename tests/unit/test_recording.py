"""Recording a sampler: the same mathematics, or a reason; never another result."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.sampling.program import Network, Program
from parallel.sampling.recording import NotRecordable, RecordedLatent, Recorder, in_parts, packed
from parallel.sampling.step_request import StepRequest
from parallel.wire.messages import Evaluate, Terms

SHAPE = (2, 3, 4)
CPU = torch.device("cpu")
CALL: Any = {"dict": {"args": {"list": []}, "named": {"dict": {}}}}
"""Of the network's arguments, which are not recorded."""


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


NOISE, MASK, IMAGE = random(1), random(2).gt(0).float(), random(3)


def network(x: Tensor, timestep: Tensor) -> Tensor:
    """Stands for a network: any function of the latent and the time."""
    return torch.tanh(x.roll(1, dims=-1) * 1.5 + timestep[:, None, None])


def recorder(most_bytes: int = 2**20) -> Recorder:
    return Recorder(SHAPE, CPU, most_bytes=most_bytes)


def predict(x: Tensor, time: float) -> Tensor:
    """The network's answer, or a place for it."""
    timestep = torch.full((len(x),), time)
    if isinstance(x, RecordedLatent):
        request = StepRequest(x, timestep, {}, CALL)
        return x.recorder.network(request, x.shape, conditions=frozenset({0}), sigma=time)
    return network(x, timestep)


def play(program: Program) -> tuple[Tensor, int]:
    """What the workers make of a program, and how many latents they hold at most."""
    latents = dict(program.constants)
    most = 0

    def value(terms: Terms) -> Tensor:
        total = torch.zeros(program.shape)
        for factor, numbers in terms:
            product = torch.ones(program.shape)
            for number in numbers:
                product = product * latents[number]
            total += factor * product
        return total

    for instruction, freed in zip(program.instructions, program.last_uses(), strict=True):
        if isinstance(instruction, Evaluate):
            latents[instruction.evaluate] = value(instruction.terms)
        elif isinstance(instruction, Network):
            for each in instruction.passes:
                x = torch.cat([latents[number] for number in each.latents])
                parts = network(x, each.request.timestep).chunk(len(each.results))
                latents |= dict(zip(each.results, parts, strict=True))
        most = max(most, len(latents) - len(program.constants))
        for number in freed:
            del latents[number]
    return value(program.result), most


def assert_recorded(function: Callable[[Tensor], Tensor]) -> Program:
    """The function of a latent gives the same when it is recorded first."""
    here = recorder()
    program = here.finish(function(here.given(NOISE.clone())))
    torch.testing.assert_close(play(program)[0], function(NOISE.clone()), rtol=1e-5, atol=1e-6)
    return program


# --- arithmetic ---------------------------------------------------------------------------------------------------

SIGMA = torch.tensor(0.7)
ROWS = torch.tensor([0.5, 2.0]).view(2, 1, 1)


def in_place(x: Tensor) -> Tensor:
    y = x * 2
    view = y.view(y.shape)
    view += IMAGE  # y too
    y *= 0.5
    y -= 1
    y /= SIGMA
    return y + view


def zeros(x: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    total += x * torch.ones_like(x)
    total /= torch.ones_like(x) * 2
    return total


def masked(x: Tensor) -> Tensor:
    x = x * MASK + (0.3 * IMAGE + 0.7 * x) * (1 - MASK)
    return x * MASK / (1 + MASK)


def batched(x: Tensor) -> Tensor:
    a, b = predict(torch.cat([x, x * 0.5]), 0.4).chunk(2)
    return b + (a - b) * 3


def rounded(x: Tensor) -> Tensor:
    prediction = predict(x.to(torch.float32), 0.4).float()
    return x - prediction * SIGMA


def stacked(x: Tensor) -> Tensor:
    y = predict(x, 0.4)
    return torch.tensordot(torch.stack([x, y], dim=1), torch.tensor([0.3, 2.0]), dims=([1], [0]))


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sums": lambda x: 2 * x - x / SIGMA + 3 - (1 - x) * SIGMA - IMAGE + (-x),
    "broadcast": lambda x: x * ROWS + IMAGE[:1] / ROWS,
    "random": lambda x: x + torch.randn_like(x, generator=None) * 0 + torch.lerp(x, IMAGE, 0.25),
    "in_place": in_place,
    "zeros": zeros,
    "masked": masked,
    "batched": batched,
    "rounded": rounded,
    "stacked": stacked,
    "clone": lambda x: x.clone().add_(1) + x,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_same_result(name: str):
    assert_recorded(FUNCTIONS[name])


def test_the_same_in_inference_mode():
    """In which ComfyUI samples; PyTorch then takes another way to the same operations."""
    with torch.inference_mode():
        for function in FUNCTIONS.values():
            assert_recorded(function)


def test_random_numbers_are_drawn_as_the_sampler_draws_them():
    def function(x: Tensor) -> Tensor:
        return x + torch.randn_like(x) * SIGMA + torch.randn(x.size(), dtype=x.dtype, layout=x.layout, device=x.device)

    torch.manual_seed(4)
    here = recorder()
    program = here.finish(function(here.given(NOISE)))
    after = torch.get_rng_state()
    torch.manual_seed(4)
    torch.testing.assert_close(play(program)[0], function(NOISE))
    assert torch.equal(torch.get_rng_state(), after)


# --- what cannot be recorded --------------------------------------------------------------------------------------

REFUSED: dict[str, Callable[[Any], Any]] = {
    "item": lambda x: x * float(x.flatten()[0]),
    "norm": lambda x: x / x.norm(),
    "maximum": lambda x: x.clamp(max=1),
    "condition": lambda x: x if (x > 0).any() else -x,
    "part": lambda x: x[:, :1].expand(x.shape),
    "shifted": lambda x: x.roll(1, dims=-1),
    "square": lambda x: x * x,
    "reciprocal": lambda x: 1 / x,
    "into_another": lambda x: torch.zeros(SHAPE).add_(x),
    "written_in_part": lambda x: torch.cat([x, x]).chunk(2)[0].mul_(2),
    "half_batch": lambda x: x.chunk(2)[0],
    "other_shape": lambda x: x.reshape(-1),
    "larger_batch": lambda x: x + torch.ones(4, 3, 4),
    "rounded_sum": lambda x: x.bfloat16() + 1,
    "rounded_and_back": lambda x: x.bfloat16().float(),
    "rounded_after_use": lambda x: (predict(x, 0.5), x.bfloat16().float())[1],
    "double": lambda x: x.double(),
    "infinite": lambda x: x / 0.0,
    "not_a_number": lambda x: x * float("nan"),
    "nothing": lambda x: None,
    "channels": lambda x: torch.cat([x, x], dim=1),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_reason_where_it_cannot_be_recorded(name: str):
    here = recorder()
    with pytest.raises(NotRecordable):
        here.finish(REFUSED[name](here.given(NOISE)))


def test_a_prediction_is_rounded_already():
    """The network answers in its own dtype, and ComfyUI goes on in fp32."""
    here = recorder()
    x = here.given(NOISE)
    answer = here.network(
        StepRequest(x.bfloat16(), torch.ones(2), {}, CALL), SHAPE, conditions=frozenset({0}), sigma=1.0
    )
    assert answer.dtype == torch.bfloat16
    assert here.finish(x - answer.float()).networks[0].passes[0].request.x.dtype == torch.bfloat16


def test_too_much_noise_is_refused():
    here = recorder(most_bytes=3 * NOISE.nbytes)
    x = here.given(NOISE)
    for i in range(2):
        x = x + random(10 + i)
    with pytest.raises(NotRecordable, match="memory"):
        x + random(20)


# --- what the workers get -----------------------------------------------------------------------------------------


def test_equal_tensors_travel_once():
    def function(x: Tensor) -> Tensor:
        for i in range(5):
            x = predict(x * MASK + (IMAGE + 0) * (1 - MASK), i / 5) * MASK
        return x

    assert len(assert_recorded(function).constants) == 3, "the noise, the mask, and the image outside it"


@pytest.mark.parametrize("memory", [1, 3])
def test_long_samplings_hold_few_latents(memory: int):
    """Neither the latents that are held nor the sums grow with the steps."""

    def function(x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        for i in range(40):
            seen = [x - predict(x, i / 40) * 0.5, *seen][:memory]
            x = 0.9 * x + sum(0.1 / (j + 1) * each for j, each in enumerate(seen))
        return x

    program = assert_recorded(function)
    assert len(program.networks) == 40
    assert play(program)[1] <= 2 * memory + 2
    assert max(len(i.terms) for i in program.instructions if isinstance(i, Evaluate)) <= 12


def test_passes_run_together_unless_one_needs_the_other():
    here = recorder()
    x = here.given(NOISE)
    first, second = predict(x, 0.5), predict(x, 0.5)
    third = predict(first, 0.5)
    program = here.finish(first + second + third)
    assert [len(network.passes) for network in program.networks] == [2, 1]


def unpacked(latent: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """As ComfyUI's `unpack_latents`."""
    parts = []
    for shape in shapes:
        cut = prod(shape[1:])
        part, latent = latent[:, :, :cut], latent[:, :, cut:]
        parts.append(part.reshape([part.shape[0], *shape[1:]]))
    return parts


def test_a_packed_latent_goes_through_a_network_in_parts():
    shapes = [(1, 2, 3), (1, 4, 1)]
    recorder = Recorder((1, 1, 10), CPU, most_bytes=2**20)
    x = recorder.given(random(1, 1, 1, 10)) * 2.0
    latent, parts = packed(unpacked(x.to(torch.bfloat16), shapes))
    assert (tuple(latent.shape), latent.dtype, parts) == ((1, 1, 10), torch.bfloat16, ((2, 3), (4, 1)))
    request = StepRequest(latent, torch.ones(1), {}, CALL, parts=parts)
    prediction = recorder.network(request, latent.shape, conditions=frozenset({0}), sigma=1.0)
    given = in_parts(prediction, parts)
    assert [tuple(part.shape) for part in given] == shapes
    joined = torch.cat([part.reshape(part.shape[0], 1, -1) for part in given], dim=-1)
    program = recorder.finish(x - joined.float())
    (network,) = program.networks
    assert network.passes[0].request.parts == parts
    assert [numbers for _, numbers in program.result] == [network.passes[0].latents, network.passes[0].results]


def test_parts_are_joined_as_they_were_cut_or_not_recorded():
    recorder = Recorder((1, 1, 10), CPU, most_bytes=2**20)
    first, second = unpacked(recorder.given(random(1, 1, 1, 10)), [(1, 6), (1, 4)])
    with pytest.raises(NotRecordable, match="another way than they were cut"):
        packed([second, first])
    with pytest.raises(NotRecordable, match="leaves a part of the latent out"):
        torch.cat([first.reshape(1, 1, -1)], dim=-1)
    with pytest.raises(NotRecordable, match=r"applies aten\.mul to a part"):
        first * 2


def test_real_parts_are_packed_as_comfyui_does():
    parts = [random(1, 2, 3, 4), random(2, 2, 5)]
    latent, shapes = packed(parts)
    assert torch.equal(latent, torch.cat([part.reshape(2, 1, -1) for part in parts], dim=-1))
    assert all(
        torch.equal(a, b) for a, b in zip(unpacked(latent, [(0, *shape) for shape in shapes]), parts, strict=True)
    )
    assert packed(parts[:1]) == (parts[0], ())
