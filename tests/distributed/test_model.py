"""A whole step of tiny models: any number of workers gives what one gives, and one gives what diffusers gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallel.diffusers.folder import CONFIG
from parallel.diffusers.tiny import TINY
from parallel.errors import CheckpointError, UnsupportedError, WorkerError
from parallel.host import memory
from parallel.host.recipe import Recipe
from parallel.host.remote_model import RemoteModel
from parallel.plans.diffusers import PLANS
from parallel.sampling.step_request import StepRequest
from parallel.split.sites import PlanError
from parallel.wire.channel import Channel, Message
from parallel.wire.shared import TensorRef, lay_out
from tests.distributed.changed_weights import WEIGHTS
from tests.distributed.devices import chosen, kind
from tests.distributed.tiny_models import (
    COGVIDEOX,
    FLUX,
    WAN,
    Inputs,
    Model,
    StartGroup,
    TinyModels,
    arguments,
    loaded,
    recipe_of,
    relative_difference,
    row,
    step,
    stock,
)
from tests.thinned import one_in, thinned

MANY = ("cpu,cpu", "cpu*3,cpu,cpu", "cpu,cpu,cpu,cpu")
FOUR = MANY[-1]
PADDED = Inputs(valid=(5,))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def no_guidance(request: StepRequest) -> dict[str, Any]:
    return {"guidance": None}


def control(request: StepRequest) -> dict[str, Any]:
    """ControlNet's results: one for two blocks, and one for each."""
    shape = len(request.x), request.x.shape[1], 256
    return {
        "controlnet_block_samples": [random(*shape)],
        "controlnet_single_block_samples": [random(*shape), -random(*shape)],
    }


def picture(request: StepRequest) -> dict[str, Any]:
    """What CLIP sees of a first frame."""
    return {"encoder_hidden_states_image": random(len(request.x), 5, 48)}


def two_pictures(request: StepRequest) -> dict[str, Any]:
    """Of a first and a last frame; the network wants them one below the other."""
    return {"encoder_hidden_states_image": random(2 * len(request.x), 3, 48)}


def clean_first_frame(request: StepRequest) -> dict[str, Any]:
    """A time for each token."""
    _, _, frames, height, width = request.x.shape
    times = request.timestep[:, None].repeat(1, frames * (height // 2) * (width // 2))
    times[:, : (height // 2) * (width // 2)] = 0
    return {"timestep": times}


def places_of_pairs(request: StepRequest) -> dict[str, Any]:
    """A token is of two frames."""
    cos, sin = arguments(request)["image_rotary_emb"]
    return {"image_rotary_emb": (cos[: len(cos) // 2], sin[: len(sin) // 2])}


def offset(request: StepRequest) -> dict[str, Any]:
    return {**places_of_pairs(request), "ofs": torch.full((1,), 2.0)}


def no_places(request: StepRequest) -> dict[str, Any]:
    return {"image_rotary_emb": None}


REPLACED = {"image_condition_type": "token_replace"}
I2V: dict[str, Any] = {"in_channels": 36, "image_dim": 48, "added_kv_proj_dim": 256}
PAIRS: dict[str, Any] = {"patch_size_t": 2, "patch_bias": False}
LEARNED: dict[str, Any] = {
    "use_learned_positional_embeddings": True, "sample_height": 8, "sample_width": 8, "sample_frames": 5,
}  # fmt: skip
MODELS = {
    # HunyuanVideo
    "even": Model(),
    "odd_tokens": Model(Inputs(frames=3, height=10, width=6, text=7)),
    "two_tokens": Model(Inputs(frames=1, height=2, width=4, text=1)),
    "padded_text": Model(PADDED),
    "one_text_token": Model(Inputs(text=1)),
    "mostly_text": Model(Inputs(frames=1, height=4, width=4, text=40)),
    "batch_2": Model(Inputs(batch=2)),
    "batch_2_equal_masks": Model(Inputs(batch=2, valid=(5, 5))),
    "batch_2_unequal_masks": Model(Inputs(batch=2, valid=(5, 8), frames=3, height=6)),
    "one_head": Model(PADDED, {"heads": 1}),
    "three_heads": Model(PADDED, {"heads": 3}),
    "four_heads": Model(PADDED, {"heads": 4}),
    "several_blocks": Model(PADDED, {"num_layers": 1, "num_single_layers": 4, "seed": 4}),
    "without_guidance": Model(Inputs(valid=(5,), others=no_guidance), {"guidance_embeds": False}),
    "token_replace": Model(Inputs(frames=3, height=10, width=6, valid=(5,)), REPLACED),  # 15 of 45 tokens
    "token_replace_of_two_frames": Model(Inputs(), REPLACED),
    "token_replace_of_one_frame": Model(Inputs(frames=1, text=30), REPLACED),
    "token_replace_batch_2": Model(Inputs(batch=2, valid=(5, 8), frames=3, height=6), REPLACED),
    "latent_concat": Model(
        Inputs(channels=33, valid=(5,)), {"in_channels": 33, "image_condition_type": "latent_concat"}
    ),
    # FLUX
    "flux": Model(Inputs(FLUX)),
    "flux_odd_tokens": Model(Inputs(FLUX, frames=1, height=10, width=6, text=7, batch=2)),
    "flux_mostly_text": Model(Inputs(FLUX, frames=1, height=4, width=4, text=40)),
    "flux_without_guidance": Model(Inputs(FLUX, others=no_guidance), {"guidance_embeds": False}),
    "flux_without_controlnet": Model(Inputs(FLUX, frames=1, height=10, width=6, batch=2)),
    "flux_controlnet": Model(Inputs(FLUX, frames=1, height=10, width=6, batch=2, others=control)),
    # Wan
    "wan": Model(Inputs(WAN)),
    "wan_odd_tokens": Model(Inputs(WAN, frames=3, height=10, width=6)),
    "wan_five_tokens": Model(Inputs(WAN, frames=5, height=2, width=2)),
    "wan_one_head": Model(Inputs(WAN, frames=3), {"heads": 1}),
    "wan_three_heads": Model(Inputs(WAN, frames=3, height=6), {"heads": 3}),
    "wan_batch_2": Model(Inputs(WAN, batch=2, frames=3, height=6)),
    "wan_22_i2v": Model(Inputs(WAN, channels=36), {"in_channels": 36}),
    "wan_i2v_without_picture": Model(Inputs(WAN, channels=36, text=512), I2V),
    "wan_i2v": Model(Inputs(WAN, channels=36, text=512, others=picture), I2V),
    "wan_i2v_batch_2": Model(Inputs(WAN, channels=36, text=512, height=10, batch=2, others=picture), I2V),
    "wan_first_and_last_frame": Model(
        Inputs(WAN, channels=36, text=512, batch=2, others=two_pictures), I2V | {"pos_embed_seq_len": 6}
    ),
    "wan_22_5b_first_frame": Model(Inputs(WAN, others=clean_first_frame)),
    "wan_22_5b_batch_2": Model(Inputs(WAN, frames=3, height=10, width=6, batch=2, others=clean_first_frame)),
    # CogVideoX
    "cogvideox": Model(Inputs(COGVIDEOX)),
    "cogvideox_odd_tokens": Model(Inputs(COGVIDEOX, frames=3, height=10, width=6, text=7)),
    "cogvideox_mostly_text": Model(Inputs(COGVIDEOX, frames=1, height=4, width=4, text=30)),
    "cogvideox_three_heads": Model(Inputs(COGVIDEOX, height=6), {"heads": 3}),
    "cogvideox_2b": Model(
        Inputs(COGVIDEOX, frames=3, height=6, width=10, others=no_places), {"use_rotary_positional_embeddings": False}
    ),
    "cogvideox_i2v_batch_2": Model(
        Inputs(COGVIDEOX, channels=32, height=6, batch=2), {"in_channels": 32, "out_channels": 16}
    ),
    "cogvideox_learned_positions": Model(Inputs(COGVIDEOX), LEARNED),
    "cogvideox_15": Model(Inputs(COGVIDEOX, frames=4, others=places_of_pairs), PAIRS),
    "cogvideox_15_i2v": Model(
        Inputs(COGVIDEOX, channels=32, frames=2, height=6, width=10, batch=2, others=offset),
        PAIRS | {"in_channels": 32, "out_channels": 16, "ofs_embed_dim": 128},
    ),
}
DEGREES = [
    ("cpu,cpu", {"ring_degree": 2}),
    ("cpu*3,cpu,cpu", {"ring_degree": 3}),
    (FOUR, {"ring_degree": 2}),
    (FOUR, {"ulysses_degree": 1, "ring_degree": 4}),
    (FOUR, {"dp_degree": 2}),
    (FOUR, {"cfg_degree": 2, "ring_degree": 2}),
]
UNDER_ANY_DEGREES = [
    "odd_tokens", "mostly_text", "batch_2_unequal_masks", "four_heads", "token_replace_batch_2",
    "flux_odd_tokens", "flux_controlnet", "wan_odd_tokens", "wan_first_and_last_frame", "wan_22_5b_batch_2",
    "cogvideox_odd_tokens", "cogvideox_15_i2v",
]  # fmt: skip


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
            recipe = recipe_of(model.path(self._tiny_models), devices, model.weight_dtype, **degrees)
            self._known[key] = step(self._model(devices, recipe), model.inputs)
        return self._known[key]

    def _model(self, devices: str, recipe: Recipe) -> RemoteModel:
        if devices not in self._loaded or self._loaded[devices].recipe != recipe:
            if devices in self._loaded:
                self._loaded[devices].weights.unload()
            self._loaded[devices] = RemoteModel(recipe, group=self._start_group(devices))
            self._loaded[devices].weights.ensure_loaded()
        return self._loaded[devices]

    def unload(self) -> None:
        for model in self._loaded.values():
            model.weights.unload()


@pytest.fixture(scope="module")
def predict(start_group: StartGroup, tiny_models: TinyModels) -> Iterator[Predictions]:
    predictions = Predictions(start_group, tiny_models)
    yield predictions
    predictions.unload()


def test_every_class_with_a_plan_has_models():
    assert {model.inputs.network for model in MODELS.values()} == set(PLANS) == set(TINY)


@pytest.mark.parametrize("name", one_in(3, [(name,) for name in MODELS]))
def test_one_worker_gives_what_diffusers_gives(predict: Predictions, tiny_models: TinyModels, name: str):
    """On a CPU to the bit."""
    model = MODELS[name]
    expected = stock(model.path(tiny_models), model.inputs.make())
    if chosen() == "cpu":
        assert torch.equal(predict(name, "cpu"), expected)
    else:
        assert relative_difference(predict(name, "cpu"), expected) <= kind().process


@pytest.mark.slow
@pytest.mark.parametrize(("name", "devices"), thinned(list(MODELS), MANY, 4))
def test_many_workers_give_what_one_gives(predict: Predictions, name: str, devices: str):
    assert relative_difference(predict(name, devices), predict(name, "cpu")) <= kind().split


@pytest.mark.parametrize(("name", "devices", "degrees"), thinned(UNDER_ANY_DEGREES, DEGREES, 4))
def test_any_degrees_give_what_one_worker_gives(predict: Predictions, name: str, devices: str, degrees: dict[str, int]):
    assert relative_difference(predict(name, devices, **degrees), predict(name, "cpu")) <= kind().split


@pytest.mark.parametrize(
    ("devices", "degrees"), [("cpu", {}), ("cpu,cpu", {"cfg_degree": 2}), (FOUR, {"cfg_degree": 2}), (FOUR, {})]
)
def test_cond_and_uncond_side_by_side(
    start_group: StartGroup, tiny_models: TinyModels, devices: str, degrees: dict[str, int]
):
    """Texts of unequal length cannot share a batch, but they can share a step."""
    requests = [Inputs(valid=(5,)).make("cond"), Inputs(text=3, seed=5).make("uncond")]
    with loaded(start_group("cpu"), tiny_models.path()) as remote:
        expected = [remote.steps([request])[0] for request in requests]
    with loaded(start_group(devices), tiny_models.path(), **degrees) as remote:
        for _ in range(2):
            for result, reference in zip(remote.steps(requests, conditions=2), expected, strict=True):
                assert relative_difference(result, reference) <= kind().split


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("even", "padded_text"),
        ("padded_text", "several_blocks"),
        ("padded_text", "without_guidance"),
        ("even", "token_replace_of_two_frames"),
        ("flux", "flux_without_guidance"),
        ("flux_without_controlnet", "flux_controlnet"),
        ("wan", "wan_22_5b_first_frame"),
        ("wan_i2v_without_picture", "wan_i2v"),
        ("cogvideox", "cogvideox_learned_positions"),
    ],
)
def test_what_differs_shows(predict: Predictions, first: str, second: str):
    """The comparisons here would notice an ignored mask, weight or input."""
    assert relative_difference(predict(first, "cpu"), predict(second, "cpu")) > 1000 * kind().split


def test_a_sample_of_a_batch_equals_the_sample_alone(
    predict: Predictions, start_group: StartGroup, tiny_models: TinyModels
):
    """Unequal texts neither attend to padding nor to each other."""
    request = MODELS["batch_2_unequal_masks"].inputs.make()
    with loaded(start_group("cpu"), tiny_models.path()) as remote:
        alone = [remote.steps([row(request, i)])[0] for i in range(2)]
    batched = predict("batch_2_unequal_masks", "cpu,cpu")
    assert relative_difference(batched, torch.cat(alone)) <= kind().split


def test_two_models_side_by_side(start_group: StartGroup, tiny_models: TinyModels, predict: Predictions):
    group, names = start_group("cpu,cpu"), ("padded_text", "wan_odd_tokens")
    first, second = (MODELS[name] for name in names)
    with loaded(group, first.path(tiny_models)) as a, loaded(group, second.path(tiny_models)) as b:
        for _ in range(2):
            for name, model, remote in zip(names, (first, second), (a, b), strict=True):
                assert torch.equal(step(remote, model.inputs), predict(name, "cpu,cpu"))


def test_a_result_is_not_overwritten_by_the_next_step(start_group: StartGroup, tiny_models: TinyModels):
    with loaded(start_group("cpu,cpu"), tiny_models.path()) as remote:
        first = step(remote, PADDED)
        kept = first.clone()
        second = step(remote, replace(PADDED, seed=7))
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)


def test_sizes_may_change_from_step_to_step(start_group: StartGroup, tiny_models: TinyModels):
    sizes = [Inputs(), Inputs(frames=4, height=16, width=16), Inputs(frames=1, height=4, width=6), Inputs()]
    with loaded(start_group("cpu,cpu"), tiny_models.path()) as remote:
        results = [step(remote, inputs) for inputs in sizes]
    with loaded(start_group("cpu"), tiny_models.path()) as remote:
        for inputs, result in zip(sizes, results, strict=True):
            assert relative_difference(result, step(remote, inputs)) <= kind().split
    assert torch.equal(results[0], results[-1])


# --- refusals: named, and the workers stay usable -----------------------------------------------------------------


def test_an_input_that_does_not_fit_is_refused(start_group: StartGroup, tiny_models: TinyModels):
    group, right = start_group("cpu,cpu"), MODELS["flux_controlnet"].inputs
    wrong = replace(right, others=lambda request: {"controlnet_block_samples": [random(len(request.x), 20, 256)]})
    with loaded(group, tiny_models.path(FLUX)) as remote:
        pids, expected = group.pids, step(remote, right)
        with pytest.raises(WorkerError, match="a control residual of 20 tokens, 5 more than image has") as caught:
            step(remote, wrong)
        assert caught.value.remote_type == PlanError.__name__
        assert remote.weights.loaded
        assert torch.equal(step(remote, right), expected)
        assert group.pids == pids


@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"])
def test_an_argument_that_the_network_does_not_have_is_refused(
    start_group: StartGroup, tiny_models: TinyModels, devices: str
):
    """By name, before any work; the workers and the weights stay. Also where only one of two groups is given it."""
    group, known = start_group(devices), Inputs()
    with loaded(group, tiny_models.path(), cfg_degree=group.layout.world_size) as remote:
        before, pids = step(remote, known), group.pids
        requests = [known.make("cond"), Inputs(others=lambda _: {"unheard_of": 0.5}).make("uncond")]
        with pytest.raises(
            WorkerError, match="unexpected keyword argument 'unheard_of'; it takes hidden_states, "
        ) as error:
            remote.steps(requests, conditions=2)
        assert error.value.remote_type == UnsupportedError.__name__
        assert torch.equal(step(remote, known), before)
        assert group.pids == pids


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["single_transformer_blocks.0.attn.to_q.bias"]
    rewrite(folder, tensors)


def with_another_tensor(folder: Path) -> None:
    rewrite(folder, load_file(folder / WEIGHTS) | {"lora.down": torch.zeros(2)})


def of_another_shape(folder: Path) -> None:
    rewrite(folder, load_file(folder / WEIGHTS) | {"proj_out.bias": torch.zeros(2)})


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Under another name first: the tensors may be mapped from the file."""
    save_file(tensors, folder / "new")
    (folder / "new").replace(folder / WEIGHTS)


def truncated(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def without_its_file(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def without_a_configuration(folder: Path) -> None:
    (folder / CONFIG).unlink()


def of_another_class(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text()) | {"_class_name": "MochiTransformer3DModel"}
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (without_a_tensor, r"lacks 1 tensors of \w+, e.g. single_transformer_blocks.0.attn.to_q.bias"),
        (with_another_tensor, r"has, and should not have, 1 tensors of \w+, e.g. lora.down"),
        (of_another_shape, r"tensor 'proj_out.bias' has the shape \[2\], but \w+ needs \[64\]"),
    ],
    ids=["without_a_tensor", "with_another_tensor", "of_another_shape"],
)
def test_a_folder_that_the_workers_cannot_load(
    start_group: StartGroup, tiny_models: TinyModels, tmp_path: Path, damage: Callable[[Path], None], complaint: str
):
    folder = damaged(tiny_models, tmp_path, damage)
    group = start_group("cpu,cpu")
    with pytest.raises(WorkerError, match=f"{folder}:? {complaint}") as caught, loaded(group, folder):
        pass
    assert caught.value.remote_type == CheckpointError.__name__
    assert group.alive


@pytest.mark.parametrize(
    ("damage", "kind_of_error", "complaint"),
    [
        (truncated, CheckpointError, "is damaged or incomplete: "),
        (without_its_file, CheckpointError, f"is damaged or incomplete: .*{WEIGHTS}"),
        (without_a_configuration, CheckpointError, f"is no transformer folder of diffusers: {CONFIG}"),
        (of_another_class, UnsupportedError, "is a MochiTransformer3DModel, which has no plan; plans exist for Cog"),
    ],
    ids=["truncated", "without_its_file", "without_a_configuration", "of_another_class"],
)
def test_a_folder_that_is_refused_before_any_worker_is_started(
    tiny_models: TinyModels,
    tmp_path: Path,
    damage: Callable[[Path], None],
    kind_of_error: type[Exception],
    complaint: str,
):
    folder = damaged(tiny_models, tmp_path, damage)
    with pytest.raises(kind_of_error, match=f"{folder} {complaint}"):
        recipe_of(folder, "cpu,cpu")


def damaged(tiny_models: TinyModels, tmp_path: Path, damage: Callable[[Path], None]) -> Path:
    folder = tmp_path / "folder"
    shutil.copytree(tiny_models.path(), folder)
    damage(folder)
    return folder


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
    request = PADDED.make()
    with loaded(start_group("cpu,cpu"), tiny_models.path()) as remote:
        (first,) = remote.steps([request])
        monkeypatch.setattr(memory, "lay_out", laid_out)  # where all of a step's tensors are laid out
        monkeypatch.setattr(Channel, "send", counted_send)
        (again,) = remote.steps([PADDED.make()])
    assert torch.equal(first, again)
    assert sum(written) == request.x.nbytes + request.timestep.nbytes + again.nbytes
    assert 0 < sum(sent) < 4096  # the request to two workers, nothing else
