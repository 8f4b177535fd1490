"""Several ranks on one GPU, for tests: one GPU then suffices to run several ranks over NCCL.

NCCL refuses two ranks of one host on one device. If each rank has its own host id, NCCL connects them by sockets on the
loopback interface, so timings say nothing about real speed. Tried with NCCL 2.28.9 and two to four ranks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

VARIABLE = "SEQUENCE_PARALLEL_SHARED_GPU"
"""`1` lets a device list name a GPU several times (`cuda:0,cuda:0`)."""


def allowed(environment: Mapping[str, str] = os.environ) -> bool:
    """Returns True if device lists may name a GPU several times."""
    return environment.get(VARIABLE) == "1"


def nccl_variables(rank: int) -> dict[str, str]:
    """Returns the environment variables with which NCCL treats this rank as one on another host."""
    return {
        "NCCL_HOSTID": f"sequence-parallel-{rank}",
        "NCCL_NET": "Socket",
        "NCCL_IB_DISABLE": "1",
        "NCCL_SOCKET_IFNAME": "lo",
    }
