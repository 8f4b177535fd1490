"""One rank of the property tests: `python -m tests.distributed.property_ranks RANK WORLD STORE NETWORK=FOLDER …`.

Reads cases from its standard input, one JSON object a line, and answers each with a line: how far this rank's part of
every sample is from the whole sample on one device, for one attention or for a whole model.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from parallel.attention.common_memory import CommonMemory
from parallel.attention.kernels import Sdpa
from parallel.attention.traffic import Traffic
from parallel.degrees import Degrees
from parallel.mesh import Mesh
from parallel.plan import AttentionPlan, share_of
from parallel.split import SequenceRanks
from parallel.wire.control import ControlPage
from parallel.worker.ranks import ParallelContext, Ranks
from parallel.worker.split_network import SplitNetwork
from tests.distributed.devices import meet
from tests.distributed.tiny_models import Inputs, on, recipe_of

HEAD_DIM = 16


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the ranks share the work."""

    dp: int = 1
    cfg: int = 1
    ring: int = 1
    ulysses: int = 1
    weights: tuple[float, ...]
    """One per rank of the world."""
    common: bool = False
    """Ulysses exchanges go through common memory where they can."""

    @property
    def degrees(self) -> Degrees:
        return Degrees(dp=self.dp, cfg=self.cfg, ring=self.ring, ulysses=self.ulysses)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Joint attention of a batch whose samples have texts of unequal length, padded to the longest."""

    plan: Plan
    heads: int
    video: int
    padded: int
    """Text tokens with padding."""
    valid: tuple[int, ...]
    """Text tokens without padding, one per sample."""
    pipeline: int = 1
    dtype: str = "float32"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelCase:
    """One step of a tiny model, in fp32."""

    plan: Plan
    inputs: dict[str, Any]
    """Of `Inputs`."""


@dataclass(frozen=True)
class Sample:
    """What one rank found in one sample."""

    sample: int
    error: float
    """max |ours − reference| over this rank's tokens; the reference is computed in fp32 with padding masked out."""
    single_error: float
    """The same of attention on one device in the case's dtype, over all tokens."""
    ulp: float
    """Of the reference's largest value, in the case's dtype."""
    counted: tuple[int, int]
    """Collectives and bytes sent to others."""
    predicted: tuple[int, int]
    """The same as the plan has it: two all-to-alls per chunk of heads, one exchange per hop of a ring."""


def run_case(case: Case, ranks: Ranks) -> list[Sample]:
    mesh = ranks.mesh(case.plan.degrees)
    batch, dtype = len(case.valid), getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(case.seed)
    shape = (3, batch, case.video + case.padded, case.heads, HEAD_DIM)
    q, k, v = torch.randn(shape, generator=generator).to(ranks.device, dtype)
    padding = torch.stack([torch.randperm(case.padded, generator=generator) for _ in case.valid]).to(ranks.device)
    (rows,) = share_of([batch], mesh.group, mesh.degrees.groups)
    return [
        _run_sample(case, ranks, mesh, i, q[i], k[i], v[i], padding[i] < case.valid[i])
        for i in range(rows.start, rows.stop)
    ]


def _run_sample(
    case: Case, ranks: Ranks, mesh: Mesh, sample: int, q: Tensor, k: Tensor, v: Tensor, valid: Tensor
) -> Sample:
    """q, k, v: [S, H, D] with padding; valid: [T], which text tokens count."""
    keep = torch.cat([torch.ones(case.video, dtype=torch.bool, device=valid.device), valid])
    whole = [x.transpose(0, 1)[None] for x in (q, k, v)]  # [1, H, S, D]
    reference = _masked(*(x.float() for x in whole), keep)
    single = _masked(*whole, keep)

    total = case.video + case.valid[sample]
    plan = AttentionPlan.of_sequence(total, case.heads, mesh.members(case.plan.weights), mesh.degrees.ring)
    mine = slice(*plan.token_ranges[mesh.sp_rank])
    traffic = Traffic(on_cuda=ranks.device.type == "cuda")
    attention = ranks.joint_attention(plan, mesh, case.pipeline, traffic)
    out = attention(*(x[keep][mine][None] for x in (q, k, v)))
    largest = reference.abs().max().item()
    return Sample(
        sample=sample,
        error=(out[0].float() - reference[mine]).abs().max().item(),
        single_error=(single.float() - reference).abs().max().item(),
        ulp=torch.finfo(out.dtype).eps * 2 ** math.floor(math.log2(largest)),
        counted=(traffic.collectives, traffic.bytes_sent),
        predicted=(
            _collectives(plan, mesh.sp_rank, case.pipeline),
            plan.exchange_bytes(mesh.sp_rank, 1, HEAD_DIM, out.element_size()),
        ),
    )


def _collectives(plan: AttentionPlan, rank: int, pipeline: int) -> int:
    row = plan.local_heads[plan.row(rank)]
    chunks = max(1, min(pipeline, *row)) if plan.ulysses_degree > 1 else 1
    hops = plan.ring_degree - 1 if plan.local_heads[rank] else 0
    return chunks * (hops + (2 if plan.ulysses_degree > 1 else 0))


def run_model(case: ModelCase, ranks: Ranks, network: SplitNetwork, control: ControlPage) -> float:
    """Relative error of what this rank has written."""
    request = on(ranks.device, Inputs(**case.inputs).make())
    mesh = ranks.mesh(case.plan.degrees)
    ranks.weights = case.plan.weights
    (rows,) = share_of([len(request.x)], mesh.group, mesh.degrees.groups)
    if rows.start == rows.stop:
        return 0.0
    for name, tensor in request.conditioning.items():
        network.put_conditioning(name, tensor)
    untouched = 2.0**20
    split = torch.full_like(request.x, untouched)
    alone = torch.empty_like(split)
    context = ParallelContext(ranks, mesh, control)
    for out, sequence in (
        (split, ranks.sequence(mesh, context, network.attention, "step")),
        (alone, SequenceRanks((1.0,))),
    ):
        held = {name: name for name in request.conditioning}
        message = request.message(request.x, request.timestep, out, held)  # no places: the tensors themselves
        network.step(message, rows, lambda tensor: tensor, sequence)
    written = split != untouched
    return ((split - alone)[written].abs().max() / alone[rows].abs().max()).item() if written.any() else 0.0


def _masked(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Attention that knows nothing of plans: [1, H, S, D] → the valid rows, [S, H, D]."""
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep[None, None, None])
    return out[0].transpose(0, 1)[keep]


def _plan(fields: dict[str, Any]) -> Plan:
    return Plan(**{**fields, "weights": tuple(fields["weights"])})


def main(rank: int, world: int, store: str, folders: list[str]) -> None:
    device = meet(rank, world, store, timeout_s=30)
    with open(f"{store}.memory", "a+b") as file:
        memory = CommonMemory(file.fileno(), rank, world) if device.type == "cpu" and CommonMemory.supported() else None
    kernel, equal = Sdpa(), (1.0,) * world
    variants = {False: Ranks(equal, device, kernel), True: Ranks(equal, device, kernel, memory)}
    control = ControlPage.create()
    control.reset(world)
    networks = {
        name: SplitNetwork(recipe_of(Path(path), "cpu").to_json(), device, lambda done, total: None)
        for name, _, path in (entry.partition("=") for entry in folders)
    }
    with torch.no_grad():
        for line in sys.stdin:
            fields: dict[str, Any] = json.loads(line)
            plan = _plan(fields.pop("plan"))
            ranks = variants[plan.common]
            if "inputs" in fields:
                case = ModelCase(plan=plan, inputs=fields["inputs"])
                answer: Any = run_model(case, ranks, networks[case.inputs["network"]], control)
            else:
                samples = run_case(Case(plan=plan, **{**fields, "valid": tuple(fields["valid"])}), ranks)
                answer = [asdict(sample) for sample in samples]
            print(json.dumps(answer), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
