"""Messages between the host and its workers: a class for each operation, and the reply of a worker.

Every rank receives the same operation, except `Tile`, which is sent to a single rank.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..compilation.settings import CompileSettings
from ..degrees import Degrees
from .shared import TensorRef
from .trees import Tree
from .typed import from_plain, to_plain

OPERATIONS: dict[str, type[Operation]] = {}
"""Maps names of operations to their classes."""
Plain = dict[str, Any]
"""JSON object whose format another module defines; each attribute names its source."""


class Operation:
    """Base class of all operations; an instance is sent as one message. Subclasses are frozen dataclasses.

    Attributes:
        name: name of the operation in messages and in error texts.
    """

    __slots__ = ()
    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        OPERATIONS[cls.name] = cls

    def to_json(self, number: int = 0, segments: Sequence[Plain] = ()) -> Plain:
        """Returns the message as JSON.

        Args:
            number: number that the reply repeats (`Reply.id`); 0 if no reply is awaited.
            segments: name and size of each segment whose descriptor is sent with the message.
        """
        return {"op": self.name, "arguments": to_plain(self), "id": number, "segments": segments}


def read(message: Plain) -> Operation:
    """Restores an operation from the result of `Operation.to_json`. `message` may be any JSON object.

    Raises:
        TypeError: it names no operation, has missing or additional fields, or a field has the wrong type.
        ValueError: a class rejects the value of a field.
    """
    name = message.get("op")
    if not isinstance(name, str) or name not in OPERATIONS:
        raise TypeError(f"op is {reprlib.repr(name)}, which is no operation")
    return from_plain(OPERATIONS[name], message.get("arguments"))


# --- replies ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An exception in a worker."""

    type: str
    message: str
    traceback: str
    expected: bool
    """True if the engine raised it on purpose."""
    out_of_memory: bool
    resumable: bool
    """True if, as far as this rank can tell, the state that it shares with other ranks is unchanged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Memory use of a rank, in bytes."""

    used: int
    """Used by its process: on a GPU, reserved by PyTorch's allocator (in use or cached); on a CPU, resident."""
    free: int | None
    """Free on its GPU, whichever processes use the rest; None on a CPU: the host reads the system's memory itself."""
    cached: int
    """Reserved on its GPU but unused: available to its next step, and to no other process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """Reply of one rank to an operation."""

    id: int
    """Number of the message that it answers."""
    launched: dict[str, int]
    """Maps groups of ranks to the number of operations this rank has launched there (`worker.ranks.Ranks.launched`)."""
    memory: MemoryUse | None
    """Memory use after the operation; None if the device has failed and does not report it."""
    result: Any = None
    """Result as JSON; None if the operation failed or was cancelled."""
    error: Failure | None = None


# --- models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsHome:
    """Placement of a model's weights."""

    mode: str
    """One of `placement.MODES` except `auto`."""
    sharing: int
    """Number of ranks of a sequence, over which sharded weights are distributed."""
    segment: str = ""
    """Name of an empty segment for offloaded weights; the workers take ownership of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load(Operation):
    """Builds a network and loads its weights."""

    name = "load"
    model: str
    recipe: Plain
    """Result of `host.recipe.Recipe.to_json`."""
    home: WeightsHome
    fp8: Plain | None
    """Result of `quantise.settings.FP8Choice.to_json`; None to load without quantising."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unload(Operation):
    """Frees a model."""

    name = "unload"
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights(Operation):
    """Replaces weights of the file, and restores the file's weights."""

    name = "weights"
    model: str
    put: dict[str, list[TensorRef]] = field(default_factory=dict)
    """Maps names of weights to the plain tensors of their replacements (`plain.plain_tensors`)."""
    patches: dict[str, Tree] = field(default_factory=dict)
    """Maps names of weights of a GGUF file to the patches that their layers apply (`comfyui.gguf.plain_patches`)."""
    tensors: dict[str, TensorRef] = field(default_factory=dict)
    """Tensors of the patches, by their names in `patches`."""
    restore: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetCache(Operation):
    """Frees the cache of a finished sampling. No reply is awaited, and the model may have been unloaded."""

    name = "forget cache"
    model: str
    sampling: int


# --- steps and samplings ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """Changes to the conditioning tensors that workers keep from step to step, so that each is sent only once."""

    put: dict[str, TensorRef]
    """Maps keys to tensors of which the worker keeps a copy."""
    drop: list[str]
    """Keys of tensors to drop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRule:
    """Cache between the steps of one sampling."""

    sampling: int
    """Number that is unique to the sampling and never reused."""
    rule: Plain
    """Result of `cache.settings.CacheSettings.rule`."""
    active: bool
    """True if this step may skip blocks; a sampling uses `RunNetwork.active` instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One call of the network."""

    x: TensorRef
    timestep: TensorRef
    out: TensorRef
    conditioning: dict[str, str]
    """Maps names of tensors to keys of kept conditioning."""
    label: str
    """Label, arguments and parts: see `sampling.step_request.StepRequest`."""
    arguments: Tree
    parts: list[list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step(Operation):
    """Runs this rank's part of requests; the degrees determine the samples of its group."""

    name = "step"
    model: str
    degrees: Degrees
    requests: list[Request]
    conditioning: Conditioning
    cache: CacheRule | None
    compile: CompileSettings | None
    watch: bool = False
    """True if the step runs again only to find the first values that are not finite; the result is a `NotFinite`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NotFinite:
    """Location of the first NaN or infinite values on a rank in a second run, see `worker.finite`."""

    place: int
    """Index of the block whose output has them; −1: in the input `name`; `blocks` or more: in no block."""
    name: str
    """Name of the block or the input; empty if neither has them."""
    blocks: int
    """Number of blocks that have run."""
    finite: bool
    """True if this rank's part of the prediction was finite in the second run."""


Terms = list[Any]
"""Sum of products, each [factor, [number, …]]: factor × the product of the latents with these numbers; without numbers
the factor itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """Computes a latent, in fp32."""

    evaluate: int
    """Number of the latent."""
    terms: Terms


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One call of the network in a sampling."""

    request: Request
    latents: list[int]
    """Numbers of the latents that make up x, along the batch."""
    results: list[int]
    """Numbers of the latents into which the prediction is split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunNetwork:
    """Runs passes side by side."""

    passes: list[Pass]
    degrees: int
    """Index into `Sample.degrees`."""
    active: bool
    """True if a cache may skip blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Reports that a step is done."""

    step: int
    """Number of the step, from 0."""
    steps: int
    denoised: Terms
    x: Terms


@dataclass(frozen=True, slots=True, kw_only=True)
class Previews:
    """Shared memory for latents that are sent back while a sampling runs."""

    wanted: TensorRef
    """[1]: number of previews that the ranks may write so far; set by the host."""
    shown: TensorRef
    """[ranks, 2]: number of previews that each rank has written, and the step of the last one."""
    latents: list[list[TensorRef]]
    """Two pairs (denoised, x), written alternately."""
    interval_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptState:
    """Shared memory for the state from which a sampling can resume after a step if its workers are lost."""

    places: dict[str, list[int]]
    """Maps the index of a `Report` in the program to the latents, except constants, that later instructions need."""
    latents: list[list[TensorRef]]
    """Two rows of latents, each long enough for any state; written alternately."""
    done: TensorRef
    """[ranks]: index of the last `Report` whose state each rank has written; −1 at first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample(Operation):
    """Runs a whole sampling."""

    name = "sample"
    model: str
    degrees: list[Degrees]
    size: int
    """Number of elements of a latent."""
    constants: dict[str, TensorRef]
    """Maps numbers of latents to latents that the host supplies."""
    program: list[Evaluate | RunNetwork | Report]
    free: list[list[int]]
    """For each instruction, the numbers of the latents that are not needed after it."""
    result: Terms
    out: TensorRef
    previews: Previews | None
    kept: KeptState | None
    conditioning: Conditioning
    cache: CacheRule | None
    compile: CompileSettings | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Space reserved in a segment, in bytes."""

    segment: str
    size: int
    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Operation):
    """Runs this rank's part of one of a network's methods."""

    name = "call"
    model: str
    method: str
    degrees: Degrees
    arguments: Tree
    held: dict[str, str]
    """Maps names of tensors in the arguments to keys of kept conditioning."""
    conditioning: Conditioning
    room: Room


@dataclass(frozen=True, slots=True, kw_only=True)
class Collect(Operation):
    """Writes the result of the last call, which did not fit into its room."""

    name = "collect"
    model: str
    room: Room


# --- tiles ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadVAE(Operation):
    """Rebuilds ComfyUI's VAE from weights in shared memory."""

    name = "load vae"
    vae: str
    source: Plain
    """See `worker.native_vae.NativeVAE`."""
    state: dict[str, TensorRef]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadVAE(Operation):
    """Frees a VAE."""

    name = "unload vae"
    vae: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BeginTiles(Operation):
    """Announces the segments for tiles to all ranks."""

    name = "begin tiles"
    vae: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile(Operation):
    """Decodes or encodes one tile, on one rank."""

    name = "tile"
    vae: str
    direction: str
    x: TensorRef
    """Elements of the input, flat; `shape` and `stride` restore its memory format, which affects bits of the result."""
    shape: list[int]
    stride: list[int]
    out: Room


# --- the group --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FP8Support(Operation):
    """Queries the FP8 matrix products that each rank's device supports."""

    name = "fp8 support"


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeMemory(Operation):
    """Queries the free and total memory of each rank's device and of the machine."""

    name = "free memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recover(Operation):
    """Frees the remains of an operation for which every rank ran out of memory, and tests the device."""

    name = "recover"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest(Operation):
    """Releases the memory of a finished sampling's activations to other processes."""

    name = "rest"


# --- benchmarks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Echo(Operation):
    """Copies x to out; each rank copies its share."""

    name = "echo"
    x: TensorRef
    out: TensorRef


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention(Operation):
    """Measures one joint attention on random data, see `worker.measurement`."""

    name = "attention"
    degrees: Degrees
    tokens: int
    heads: int
    head_dim: int
    batch: int
    pipeline: int
    dtype: str
    check: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Slow(Operation):
    """Slows each rank down by its factor in `times` from now on."""

    name = "slow"
    times: list[int]
