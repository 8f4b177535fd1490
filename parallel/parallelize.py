"""Sequence parallelism for scripts: one line on a diffusers pipeline's transformer.

    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    parallelize(pipe.transformer, mesh)

under `torchrun --nproc-per-node 4 script.py`, also over several machines. Every rank runs the same script with the same
seed and gets the whole result. In training, average the weights' gradients over the ranks, as DDP and FSDP do.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .attention.kernels import Kernel
from .errors import ConfigError
from .plans.diffusers import PLANS
from .split.hooks import Split
from .split.ranks import SequenceRanks
from .split.routes import ThroughTorch
from .split.sites import Plan

AXES = ("ring", "ulysses")


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    weights: Sequence[float] | None = None,
    plan: Plan | None = None,
    kernel: Kernel | None = None,
) -> Split:
    """Runs `model` sequence-parallel over the ranks of `mesh`, from now until `remove` of the result is called.

    Args:
        model: a diffusers transformer, with the same weights on every rank.
        mesh: one axis, over which Ulysses exchanges tokens for heads (a ring, if its name is `ring`), or the axes
            `ring` and `ulysses`. Pass a submesh if other axes split other work, such as `mesh["ulysses"]` beside a
            data-parallel axis.
        weights: relative speed of each rank; equal by default.
        plan: split plan of the model's class; by default the one in `parallel/plans/diffusers.py`.
        kernel: local attention kernel of a ring; PyTorch's own by default. Without a ring the model's own attention
            runs.

    Raises:
        ConfigError: mesh, weights or model are not usable.
    """
    names = mesh.mesh_dim_names or ()
    if mesh.ndim > 1 and names != AXES:
        raise ConfigError(f"mesh has the axes {names or mesh.ndim}; allowed are one axis, or {AXES} in this order")
    size = mesh.size()
    if weights is not None and (len(weights) != size or min(weights) <= 0):
        raise ConfigError(f"weights is {list(weights)}; expected {size} numbers above 0, one for each rank of mesh")
    if plan is None and (plan := PLANS.get(type(model).__name__)) is None:
        raise ConfigError(f"model is a {type(model).__name__}; plans exist for {', '.join(sorted(PLANS))}")
    rings = mesh.ndim > 1 or names == ("ring",)
    ring_degree = mesh.size(0) if rings else 1
    ulysses_degree = size // ring_degree
    place = mesh.get_coordinate()
    assert place is not None, "this process is one of the mesh"
    ranks = SequenceRanks(
        weights or [1.0] * size,
        place[0] * ulysses_degree + place[1] if mesh.ndim > 1 else place[0],
        ulysses=mesh.get_group(mesh.ndim - 1) if ulysses_degree > 1 else None,
        ring=mesh.get_group(0) if ring_degree > 1 else None,
        ring_degree=ring_degree,
        kernel=kernel,
    )
    return Split(model, plan, ranks, ThroughTorch)
