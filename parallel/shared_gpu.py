"""Several ranks on one GPU, for tests: one card then shows what several ranks do over NCCL.

NCCL refuses two ranks of one host on one device. Told that each rank is a host of its own, it connects them by sockets
on the loopback interface, so this says nothing about speed. Seen with NCCL 2.28.9 and two to four ranks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

VARIABLE = "SEQUENCE_PARALLEL_SHARED_GPU"
"""`1` lets a device list name a GPU several times (`cuda:0,cuda:0`)."""


def allowed(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether device lists may name a GPU several times."""
    return environment.get(VARIABLE) == "1"


def nccl_variables(rank: int) -> dict[str, str]:
    """The environment by which NCCL takes this rank for one of another host."""
    return {
        "NCCL_HOSTID": f"sequence-parallel-{rank}",
        "NCCL_NET": "Socket",
        "NCCL_IB_DISABLE": "1",
        "NCCL_SOCKET_IFNAME": "lo",
    }
