"""The environment of workers, as a whole: what is set, kept and left out."""

from __future__ import annotations

import pytest

from parallel import shared_gpu
from parallel.config import SequenceParallelConfig
from parallel.errors import ConfigError
from parallel.host import environment
from parallel.host.environment import initial_environment, worker_environment

COMFYUI = "backend:cudaMallocAsync"
CHOSEN = {
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "1073741824",
    "NCCL_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "3",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONUNBUFFERED": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "TORCHINDUCTOR_COMPILE_THREADS": "3",
}


def of(now: dict[str, str], started: dict[str, str] | None = None, rank: int = 0) -> dict[str, str]:
    return worker_environment(now, {"PATH": "/bin"} if started is None else started, threads=3, rank=rank)


def test_of_an_empty_host():
    assert of({}) == CHOSEN


def test_what_a_user_sets_for_torch_nccl_and_cuda_is_inherited():
    users = {
        "CUDA_LAUNCH_BLOCKING": "1",
        "CUDA_VISIBLE_DEVICES": "3,1",
        "HF_HOME": "/models",
        "MKL_NUM_THREADS": "8",
        "NCCL_DEBUG": "INFO",
        "NCCL_P2P_DISABLE": "1",
        "PATH": "/bin",
        "PYTORCH_TUNABLEOP_ENABLED": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "9",
        "TORCH_LOGS": "dynamo",
    }
    assert of(users) == CHOSEN | users


def test_what_belongs_to_another_process_group_or_binds_threads_to_cores_is_left_out():
    others = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "KMP_AFFINITY", "OMP_PROC_BIND"]
    assert of(dict.fromkeys(others, "1")) == CHOSEN


def test_what_workers_must_have_is_set_over_the_users():
    assert of({"OMP_NUM_THREADS": "64", "GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0"}) == CHOSEN


USERS = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"


@pytest.mark.parametrize(
    ("started", "now", "expected"),
    [
        pytest.param({}, {USERS[0]: COMFYUI}, CHOSEN, id="ComfyUI sets it"),
        pytest.param({USERS[0]: COMFYUI}, {USERS[0]: f"{COMFYUI},{COMFYUI}"}, CHOSEN, id="restarted by execv"),
        pytest.param({}, {USERS[0]: "max_split_size_mb:64"}, CHOSEN, id="a pack sets it"),
        pytest.param(
            {USERS[0]: "max_split_size_mb:64"},
            {USERS[0]: f"max_split_size_mb:64,{COMFYUI}"},
            {USERS[0]: "max_split_size_mb:64"},
            id="the user, and ComfyUI appends",
        ),
        pytest.param(
            {USERS[0]: f"max_split_size_mb:64,{COMFYUI}"},
            {USERS[0]: f"max_split_size_mb:64,{COMFYUI},{COMFYUI}"},
            {USERS[0]: "max_split_size_mb:64"},
            id="the user, ComfyUI, and restarted",
        ),
        pytest.param(
            {USERS[1]: COMFYUI},
            {USERS[1]: COMFYUI, USERS[0]: COMFYUI},
            {USERS[1]: COMFYUI},
            id="the user, by the name that ComfyUI does not use",
        ),
        pytest.param(
            {USERS[0]: "expandable_segments:False", USERS[1]: "max_split_size_mb:64"},
            {},
            {USERS[0]: "expandable_segments:False", USERS[1]: "max_split_size_mb:64"},
            id="the user, both, and a pack removes them",
        ),
        pytest.param({USERS[0]: ""}, {USERS[0]: COMFYUI}, CHOSEN, id="set to nothing"),
    ],
)
def test_the_allocator_is_the_users_or_our_own(started: dict[str, str], now: dict[str, str], expected: dict[str, str]):
    without = {name: value for name, value in CHOSEN.items() if name not in USERS}
    wanted = without | {name: expected[name] for name in USERS if name in expected}
    assert of(now, {"PATH": "/bin"} | started) == wanted


def test_the_present_environment_counts_where_the_initial_one_is_not_known():
    """As in a process with a title of its own."""
    assert of({USERS[0]: COMFYUI}, {}) == CHOSEN
    assert of({USERS[0]: f"max_split_size_mb:64,{COMFYUI}"}, {})[USERS[0]] == "max_split_size_mb:64"


def test_the_initial_environment_is_not_what_was_set_since(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SET_SINCE", "1")
    found = initial_environment()
    assert found and "SET_SINCE" not in found


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b"ComfyUI: my title\0\0PATH=/bin\0"])
def test_an_overwritten_environment_is_not_known(monkeypatch: pytest.MonkeyPatch, tmp_path, content: bytes):
    (tmp_path / "environ").write_bytes(content)
    monkeypatch.setattr(environment, "Path", lambda _: tmp_path / "environ")
    assert initial_environment() == {}


def test_ranks_that_share_a_gpu_are_hosts_of_their_own_to_nccl():
    environments = [of({shared_gpu.VARIABLE: "1", "NCCL_NET": "IB"}, rank=rank) for rank in range(2)]
    assert environments == [
        CHOSEN
        | {
            "NCCL_HOSTID": f"sequence-parallel-{rank}",
            "NCCL_IB_DISABLE": "1",
            "NCCL_NET": "Socket",
            "SEQUENCE_PARALLEL_SHARED_GPU": "1",
        }
        for rank in range(2)
    ]


def test_a_gpu_named_twice_needs_the_switch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(shared_gpu.VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="devices names cuda:0 2 times; a GPU can hold one worker"):
        SequenceParallelConfig(devices="cuda:0*2,cuda:0")
    monkeypatch.setenv(shared_gpu.VARIABLE, "1")
    assert SequenceParallelConfig(devices="cuda:0*2,cuda:0").devices == "cuda:0*2,cuda:0"
