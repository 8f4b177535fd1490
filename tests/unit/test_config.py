"""What a user may write into SP Config, and what an unusable setting is told."""

from __future__ import annotations

import pytest
import torch

from parallel.config import SequenceParallelConfig, WorkerDevice, parse_devices, resolve
from parallel.degrees import Degrees
from parallel.errors import ConfigError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Pretends that this machine has so many GPUs."""

    def pretend(count: int, capability: tuple[int, int] = (9, 0)) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return pretend


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cpu", [("cpu", 1)]),
        ("cpu,cpu", [("cpu", 1), ("cpu", 1)]),
        ("cpu:3", [("cpu", 1)]),
        ("cuda:0,cuda:1", [("cuda:0", 1), ("cuda:1", 1)]),
        ("cuda:1,cuda:0", [("cuda:1", 1), ("cuda:0", 1)]),
        ("cuda:0*2", [("cuda:0", 2)]),
        (" CUDA:0 * 2 , cuda:11*0.5", [("cuda:0", 2), ("cuda:11", 0.5)]),
        ("cuda:007", [("cuda:7", 1)]),
    ],
)
def test_device_lists(text: str, expected: list[tuple[str, float]]):
    assert parse_devices(text) == tuple(WorkerDevice(name=name, weight=weight) for name, weight in expected)


@pytest.mark.parametrize("text", ["auto", " Auto "])
def test_auto_is_left_to_the_machine(text: str):
    assert parse_devices(text) is None


@pytest.mark.parametrize(
    ("text", "offender"),
    [
        ("", "''"),
        ("  ", "'  '"),
        ("cpu,", "''"),
        ("cuda:0,,cuda:1", "''"),
        ("cuda", "'cuda'"),
        ("gpu:0", "'gpu:0'"),
        ("mps", "'mps'"),
        ("cuda:x", "'cuda:x'"),
        ("cuda:-1", "'cuda:-1'"),
        ("cuda:0;cuda:1", "'cuda:0;cuda:1'"),
        ("0,1", "'0'"),
        ("auto,cpu", "'auto'"),
        ("cuda:0*", "'cuda:0*'"),
        ("cuda:0*fast", "'cuda:0*fast'"),
        ("cuda:0*-1", "'cuda:0*-1'"),
        ("cuda:0*0", "'cuda:0*0'"),
        ("cpu*0.0", "'cpu*0.0'"),
        pytest.param("cpu*" + "9" * 400, "'cpu*9", id="infinite"),
        ("cuda:0,cuda:0", "cuda:0"),
        ("cpu,cuda:0", "'cpu,cuda:0'"),
    ],
)
def test_an_unusable_device_list_is_named(text: str, offender: str):
    with pytest.raises(ConfigError) as caught:
        SequenceParallelConfig(devices=text)
    assert str(caught.value).startswith("devices ")
    assert offender in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("value", [None, 2, ["cpu"]])
def test_devices_must_be_text(value: object):
    with pytest.raises(ConfigError, match=r"^devices is .*allowed are"):
        SequenceParallelConfig(devices=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("knob", ["ulysses_degree", "ring_degree", "cfg_degree", "dp_degree"])
@pytest.mark.parametrize("value", [-1, 1.5, "2", True, None])
def test_a_degree_must_be_a_count(knob: str, value: object):
    with pytest.raises(ConfigError) as caught:
        SequenceParallelConfig(**{knob: value})  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"{knob} is {value!r}; allowed are 0")


@pytest.mark.parametrize(
    ("knob", "choices"),
    [
        ("weights", ["auto", "replicate", "shard", "offload"]),
        ("attention", ["auto", "sdpa", "cudnn", "flash", "sage"]),
    ],
)
def test_a_choice_that_does_not_exist_lists_those_that_do(knob: str, choices: list[str]):
    with pytest.raises(ConfigError) as caught:
        SequenceParallelConfig(**{knob: "fastest"})
    assert str(caught.value) == f"{knob} is 'fastest'; allowed are {', '.join(choices)}"
    for choice in choices:
        SequenceParallelConfig(**{knob: choice})


def test_auto_takes_every_gpu(gpus):
    gpus(3)
    layout = resolve(SequenceParallelConfig())
    assert [device.name for device in layout.devices] == ["cuda:0", "cuda:1", "cuda:2"]
    assert (layout.world_size, layout.device_type) == (3, "cuda")
    assert "3 visible GPUs" in layout.reason


def test_auto_without_a_gpu_is_one_cpu_worker_and_says_so(gpus):
    gpus(0)
    layout = resolve(SequenceParallelConfig())
    assert [device.name for device in layout.devices] == ["cpu"]
    assert "no GPU is visible" in layout.reason


def test_a_layout_keeps_order_and_speeds(gpus):
    gpus(2)
    layout = resolve(SequenceParallelConfig(devices="cuda:1*2,cuda:0"))
    assert [(device.name, device.weight) for device in layout.devices] == [("cuda:1", 2.0), ("cuda:0", 1.0)]
    assert layout.speeds == (2.0, 1.0)
    assert layout.describe() == "cuda:1*2,cuda:0"


@pytest.mark.parametrize(("count", "exist"), [(0, "no GPU (only cpu)"), (2, "cuda:0, cuda:1")])
def test_a_gpu_that_does_not_exist_is_named_with_those_that_do(gpus, count: int, exist: str):
    gpus(count)
    with pytest.raises(ConfigError) as caught:
        resolve(SequenceParallelConfig(devices="cuda:5"))
    assert "cuda:5" in str(caught.value)
    assert str(caught.value).endswith(f"it has {exist}")


def test_degrees_are_those_that_were_asked_for():
    layout = resolve(SequenceParallelConfig(devices="cpu,cpu,cpu,cpu", ulysses_degree=2, dp_degree=2))
    degrees, _ = layout.degrees.choose(conditions=1, heads=24)
    assert degrees == Degrees(ulysses=2, ring=1, cfg=1, dp=2)


def test_degrees_that_do_not_fit_the_devices_are_refused_with_every_factor():
    with pytest.raises(ConfigError) as caught:
        resolve(SequenceParallelConfig(devices="cpu,cpu,cpu,cpu", ulysses_degree=3))
    message = str(caught.value)
    for factor in ("ulysses_degree 3", "ring_degree auto", "cfg_degree auto", "dp_degree auto"):
        assert factor in message
    assert "must be the number of devices, 4" in message


def test_other_degrees_need_no_other_processes():
    two = [resolve(SequenceParallelConfig(devices="cpu,cpu", ring_degree=ring)) for ring in (1, 2)]
    assert two[0].same_workers(two[1])
    assert not two[0].same_workers(resolve(SequenceParallelConfig(devices="cpu*2,cpu")))
    assert not two[0].same_workers(resolve(SequenceParallelConfig(devices="cpu,cpu", attention="sdpa")))


@pytest.mark.parametrize("attention", ["cudnn", "flash", "sage"])
def test_a_gpu_kernel_on_the_cpu_is_refused(attention: str):
    with pytest.raises(ConfigError, match=f"attention is '{attention}', which needs CUDA devices"):
        resolve(SequenceParallelConfig(devices="cpu", attention=attention))


@pytest.mark.parametrize("attention", ["cudnn", "flash", "sage"])
def test_a_kernel_that_a_gpu_is_too_old_for_is_refused(gpus, attention: str):
    gpus(2, capability=(7, 5))
    complaint = f"attention is '{attention}', which needs GPUs of compute capability 8.0 or later; cuda:0 has 7.5"
    with pytest.raises(ConfigError, match=complaint):
        resolve(SequenceParallelConfig(attention=attention))


def test_a_kernel_whose_package_is_missing_is_refused(gpus, monkeypatch: pytest.MonkeyPatch):
    gpus(1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="attention is 'sage', but the package sageattention is not installed"):
        resolve(SequenceParallelConfig(devices="cuda:0", attention="sage"))


@pytest.mark.parametrize(
    ("devices", "degrees", "complaint"),
    [
        ("cpu", {}, "devices names one device; allowed are auto, replicate and offload"),
        ("cpu,cpu", {"cfg_degree": 2}, "with cfg_degree 2 and dp_degree auto each sequence has only 1 of"),
        ("cpu,cpu,cpu,cpu", {"cfg_degree": 2, "dp_degree": 2}, "each sequence has only 1 of the 4 devices"),
        (
            "cpu,cpu",
            {"ulysses_degree": 1, "ring_degree": 1},
            "cfg_degree auto and dp_degree auto each sequence has only 1",
        ),
    ],
)
def test_shard_needs_devices_that_share_a_sequence(devices: str, degrees: dict[str, int], complaint: str):
    with pytest.raises(ConfigError, match=f"^weights is 'shard'.*{complaint}"):
        resolve(SequenceParallelConfig(devices=devices, weights="shard", **degrees))
    for other in ("auto", "replicate", "offload"):
        resolve(SequenceParallelConfig(devices=devices, weights=other, **degrees))


@pytest.mark.parametrize("degrees", [{}, {"ring_degree": 2}, {"cfg_degree": 2}, {"dp_degree": 2}])
def test_shard_over_the_devices_of_a_sequence(degrees: dict[str, int]):
    resolve(SequenceParallelConfig(devices="cpu,cpu,cpu,cpu", weights="shard", **degrees))
