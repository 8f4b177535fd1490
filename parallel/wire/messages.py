"""What the host asks of its workers, a class for each operation, and what a worker replies.

Every rank gets the same, but for `Tile`, which one rank gets.
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
"""Name → class."""
Plain = dict[str, Any]
"""JSON that another module knows: its docstring says which."""


class Operation:
    """Of one message. Subclasses are frozen dataclasses.

    Attributes:
        name: in messages, and in errors for people.
    """

    __slots__ = ()
    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        OPERATIONS[cls.name] = cls

    def to_json(self, number: int = 0, segments: Sequence[Plain] = ()) -> Plain:
        """The message.

        Args:
            number: of the reply (`Reply.id`); 0 where nobody waits for one.
            segments: name and size of those whose descriptors come along.
        """
        return {"op": self.name, "arguments": to_plain(self), "id": number, "segments": segments}


def read(message: Plain) -> Operation:
    """Reads what `Operation.to_json` has made. `message` may be any JSON object.

    Raises:
        TypeError: it names no operation, or lacks fields of it, or has others.
        ValueError: a field has a value that its class refuses.
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
    """The engine raised it on purpose."""
    out_of_memory: bool
    resumable: bool
    """What this rank shares with others is as before, as far as it can tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Of a rank, in bytes."""

    used: int
    """By its process: of the GPU by PyTorch's allocator, in use or cached; on a CPU what is resident."""
    free: int | None
    """What its GPU has left, whoever uses the others; None on a CPU: the host looks at the system's memory itself."""
    cached: int
    """Of its GPU, what it has taken and does not use: free for its next step, and only for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """To an operation."""

    id: int
    """The message's."""
    launched: dict[str, int]
    """Group of ranks → how many collectives this rank has launched there (`worker.ranks.Ranks.launched`)."""
    memory: MemoryUse | None
    """None of a device that has failed and answers no more."""
    result: Any = None
    """JSON; None if it failed or was cancelled."""
    error: Failure | None = None


# --- models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsHome:
    """Where a model's weights go."""

    mode: str
    """One of `placement.MODES` but `auto`."""
    sharing: int
    """Ranks of a sequence, which share sharded ones."""
    segment: str = ""
    """An empty memory file for offloaded ones, which belongs to the workers from then on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load(Operation):
    """Builds a network and makes its weights resident."""

    name = "load"
    model: str
    recipe: Plain
    """`host.recipe.Recipe.to_json`."""
    home: WeightsHome
    fp8: Plain | None
    """`quantise.settings.FP8Choice.to_json`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unload(Operation):
    """Frees a model."""

    name = "unload"
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights(Operation):
    """Puts weights in the place of the file's, and the file's back in theirs."""

    name = "weights"
    model: str
    put: dict[str, list[TensorRef]] = field(default_factory=dict)
    """Weight → what it consists of (`plain.plain_tensors`)."""
    patches: dict[str, Tree] = field(default_factory=dict)
    """Weight of a GGUF file → what its layer adds to it (`comfyui.gguf.plain_patches`)."""
    tensors: dict[str, TensorRef] = field(default_factory=dict)
    """Of the patches, by their names there."""
    restore: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetCache(Operation):
    """Frees what a sampling that is over has remembered. Nobody waits for it, and the model may be gone."""

    name = "forget cache"
    model: str
    sampling: int


# --- steps and samplings ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """What stays the same from step to step: each tensor travels once."""

    put: dict[str, TensorRef]
    """Key → tensor to keep a copy of."""
    drop: list[str]
    """Keys to forget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRule:
    """A cache between steps, in this sampling."""

    sampling: int
    """A number that is never used again."""
    rule: Plain
    """`cache.settings.CacheSettings.rule`."""
    active: bool
    """Whether this step may skip blocks; a sampling says so for each pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One call of the network."""

    x: TensorRef
    timestep: TensorRef
    out: TensorRef
    conditioning: dict[str, str]
    """Name → key of what is kept."""
    label: str
    """See `sampling.step_request.StepRequest`, as for the following."""
    arguments: Tree
    parts: list[list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step(Operation):
    """Runs this rank's part of requests; which samples are its group's follows from the degrees."""

    name = "step"
    model: str
    degrees: Degrees
    requests: list[Request]
    conditioning: Conditioning
    cache: CacheRule | None
    compile: CompileSettings | None
    watch: bool = False
    """Only to find where values stop being finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NotFinite:
    """Where a rank has met the first values that are NaN or infinite in a second run, see `worker.finite`."""

    place: int
    """Blocks that had run before that one; −1: in the input `name`; as many as `blocks` or more: in none of them."""
    name: str
    blocks: int
    """How many have run."""
    finite: bool
    """Whether this rank's part of the prediction was finite this time."""


Terms = list[Any]
"""A sum of products: factor × the product of the latents with these numbers, [factor, [number, …]] each; without
latents the factor itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """Computes a latent, in fp32."""

    evaluate: int
    """Its number."""
    terms: Terms


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One call of the network in a sampling."""

    request: Request
    latents: list[int]
    """Those that x is made of."""
    results: list[int]
    """Those that the prediction is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunNetwork:
    """Passes side by side."""

    passes: list[Pass]
    degrees: int
    """Which of the sampling's."""
    active: bool
    """Whether a cache may skip blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A step is done."""

    step: int
    """From 0."""
    steps: int
    denoised: Terms
    x: Terms


@dataclass(frozen=True, slots=True, kw_only=True)
class Previews:
    """Where latents are shown while a sampling runs."""

    wanted: TensorRef
    """[1]: how many may be shown."""
    shown: TensorRef
    """[ranks, 2]: how many a rank has shown, and of which step the last one was."""
    latents: list[list[TensorRef]]
    """Two pairs, denoised and x, which take turns."""
    interval_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptState:
    """Where a sampling leaves what it needs to go on behind a step, in case its workers are lost."""

    places: dict[str, list[int]]
    """Place of a `Report` in the program → the latents that later instructions need, but constants."""
    latents: list[list[TensorRef]]
    """Room for as many, twice: they take turns."""
    done: TensorRef
    """[ranks]: the last place whose latents a rank has left there; −1 at first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample(Operation):
    """Runs a whole sampling."""

    name = "sample"
    model: str
    degrees: list[Degrees]
    size: int
    """Elements of a latent."""
    constants: dict[str, TensorRef]
    """Number → latent that is given."""
    program: list[Evaluate | RunNetwork | Report]
    free: list[list[int]]
    """Latents that nobody needs after each instruction."""
    result: Terms
    out: TensorRef
    previews: Previews | None
    kept: KeptState | None
    conditioning: Conditioning
    cache: CacheRule | None
    compile: CompileSettings | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Space in a segment."""

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
    """Name of a tensor in the arguments → key of what is kept."""
    conditioning: Conditioning
    room: Room


@dataclass(frozen=True, slots=True, kw_only=True)
class Collect(Operation):
    """Writes the result of the last call, which did not fit."""

    name = "collect"
    model: str
    room: Room


# --- tiles ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadVAE(Operation):
    """Rebuilds ComfyUI's VAE around weights that the host shares."""

    name = "load vae"
    vae: str
    source: Plain
    """See `worker.native_vae.NativeVAE`."""
    state: dict[str, TensorRef]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadVAE(Operation):
    """Frees it."""

    name = "unload vae"
    vae: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BeginTiles(Operation):
    """All ranks hear of the segments that tiles will travel in."""

    name = "begin tiles"
    vae: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile(Operation):
    """Decodes or encodes one tile, on one rank."""

    name = "tile"
    vae: str
    direction: str
    x: TensorRef
    """Its elements; shape and strides follow, since another memory format gives other bits."""
    shape: list[int]
    stride: list[int]
    out: Room


# --- the group --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FP8Support(Operation):
    """Which FP8 products each rank's device has."""

    name = "fp8 support"


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeMemory(Operation):
    """How much memory each rank's device has, and the machine."""

    name = "free memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recover(Operation):
    """After an operation for which no rank had the memory: frees what it has left, and tries the device."""

    name = "recover"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest(Operation):
    """After a sampling: other processes can have what its activations took."""

    name = "rest"


# --- benchmarks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Echo(Operation):
    """Each rank writes its share of x to out."""

    name = "echo"
    x: TensorRef
    out: TensorRef


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention(Operation):
    """One joint attention on random data, see `worker.measurement`."""

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
    """From here on each rank is so many times slower."""

    name = "slow"
    times: list[int]
