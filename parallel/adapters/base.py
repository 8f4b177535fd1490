"""What a family must say of itself, and what the worker hands it for a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..attention.joint import JointAttention
from ..attention.traffic import Traffic
from ..cache.blocks import Blocks, Probe, StepPasses, last_of
from ..checkpoints.source import Source, TensorInfo
from ..plan import SequencePlan

BlockFunction = TypeVar("BlockFunction", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Piece:
    """Where (a part of) a checkpoint tensor goes."""

    name: str
    """Parameter of the diffusers model."""
    take: Callable[[Tensor], Tensor] = lambda tensor: tensor
    """The part, as a view where possible. It picks and orders rows (the first dimension), and nothing else."""


def pack_text(text: str) -> Tensor:
    """A choice that a node has made, or a number, as a conditioning input: [1, n] uint8.

    A number travels as text because conditioning tensors are rounded to the compute dtype: 23.976 in bf16 is 24.
    """
    return torch.tensor([list(text.encode())], dtype=torch.uint8)


def unpack_text(tensor: Tensor) -> str:
    """What `pack_text` has packed."""
    return bytes(tensor[0].tolist()).decode()


class StepContext(ABC):
    """The ranks, as an adapter sees them during one step."""

    rank: int
    """Among the ranks that share the sequence."""
    cache: StepPasses | None = None
    """Remembers what blocks have added, for steps that skip them."""
    compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
    """Compiles the function of a kind of block, where the user asked for that (`compilation.blocks.CompiledBlocks`)."""
    traffic: Traffic | None = None
    """Counts and times the communication, if anybody asks."""

    @abstractmethod
    def plan(self, streams: tuple[int, ...], heads: int) -> SequencePlan:
        """The split of a joint sequence of these stream lengths."""

    @abstractmethod
    def attention(self, plan: SequencePlan) -> JointAttention:
        """Joint attention under `plan`."""

    @abstractmethod
    def enter_block(self, plan: SequencePlan) -> None:
        """To be called before each transformer block: a sign of life, and where Cancel takes effect.

        Raises:
            StepCancelled: the host asked to stop; raised on all ranks before the same block.
        """

    def block(self, function: BlockFunction) -> BlockFunction:
        """The function of one kind of block, compiled if the user asked for it; each rank compiles it once, at its
        first call, for all blocks of this kind.

        Args:
            function: of a module, not made anew for each step. It takes its block's module, tensors (also in tuples and
                dataclasses) and this step's `attention`, by position, and touches nothing else that changes. It may
                attend several times if each attention needs the result of the one before: ranks compile on their own
                and must not exchange them in different orders.
        """
        return function if self.compiler is None else self.compiler(function)  # type: ignore[return-value]

    def run_blocks(self, plan: SequencePlan, hidden: Tensor, blocks: Blocks, probe: Probe) -> Tensor:
        """Runs the network's blocks, or as many as a cache leaves to be run: once for each pass through the network.

        Args:
            hidden: [B, S_r, hidden] of this rank's tokens of the latent, before the first block.
            blocks: yields these hidden states after each block.
            probe: their modulated form, the input of the first block's attention; or what modulates them, where the
                family's TeaCache looks at that.

        Returns:
            The hidden states after the last block.
        """
        if self.cache is not None:
            return self.cache.run(plan, hidden, blocks, probe)
        return last_of(blocks, hidden)


class Adapter(ABC):
    """A model family. Stateless: one instance serves every model of the family."""

    family: ClassVar[str]
    """Key in the registry, and the family's name in messages."""
    title: ClassVar[str]
    """The family's name for people, with the versions that are meant."""
    makes: ClassVar[tuple[str, ...]]
    """What of: `T2V`, `I2V` (video from text, or from a picture and text), `T2I`, `edit` (pictures likewise)."""
    verified: ClassVar[str] = "ComfyUI"
    """Against whose results its tests compare it, besides what all families have in common."""
    full_precision: ClassVar[tuple[str, ...]] = ()
    """Parameters of the diffusers model that ComfyUI keeps in fp32, whatever the storage dtype."""
    read_directly: ClassVar[tuple[str, ...]] = ()
    """Modules (patterns of their names) whose parameters `step` reads itself: fp8 storage leaves them out, since it
    casts a layer's parameters when the layer is called."""

    not_quantised: ClassVar[tuple[str, ...]] = ()
    """Linear layers (patterns of ComfyUI's names, see `quantise.selection.matches`) that FP8 leaves as they are:
    embedders, modulations and the last layer. Their error would be in every token or in the result, and they take a
    small part of the time."""

    @classmethod
    @abstractmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> bool:
        """Whether a single-file checkpoint with these tensors is of this family."""

    @classmethod
    @abstractmethod
    def detect_diffusers(cls, config: Mapping[str, Any]) -> bool:
        """Whether a diffusers folder with this `config.json` is of this family."""

    @abstractmethod
    def model_config(self, source: Source) -> dict[str, Any]:
        """Arguments of the diffusers model class, from shapes alone (or the folder's config.json).

        Raises:
            UnsupportedError: a variant that this adapter would compute wrongly.
        """

    @abstractmethod
    def model_class(self) -> Callable[..., nn.Module]:
        """The diffusers model's class. Imported here and not before: it takes seconds, and the host needs no model."""

    @abstractmethod
    def pieces(self, name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> list[Piece]:
        """Parameters of the diffusers model that the checkpoint tensor `name` becomes."""

    @abstractmethod
    def native_tensors(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the family's single-file checkpoint in ComfyUI's own layout."""

    @abstractmethod
    def check_inputs(self, config: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> int:
        """Checks the inputs of a step before any work; returns the latent's token count.

        Args:
            config: as `model_config` gave it.
            inputs: name → every tensor of the step: `x`, `timestep` and the conditioning, in which the tensors of a
                list `refs` are named `refs.0`, `refs.1` and so on, and a text is packed (`pack_text`).

        Raises:
            UnsupportedError: an input that this adapter does not know, or cannot honour.
        """

    def output_shape(self, config: Mapping[str, Any], x_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the prediction for a latent of `x_shape`."""
        return (x_shape[0], config["out_channels"], *x_shape[2:])

    @abstractmethod
    def prepare(self, conditioning: Mapping[str, Tensor]) -> Any:
        """Work that depends on the conditioning alone (e.g. trimming padding), done once per prompt.

        Args:
            conditioning: name → tensor on this rank's device, floating-point ones in the compute dtype.
        """

    @abstractmethod
    def step(
        self,
        model: nn.Module,
        x: Tensor,
        timestep: Tensor,
        prepared: Any,
        out: Tensor,
        context: StepContext,
    ) -> None:
        """Runs the network on this rank's tokens and writes its part of the prediction.

        Args:
            model: the diffusers model, on this rank's device.
            x: the whole latent as ComfyUI hands it to its own network; shared memory, only this rank's part is read.
            timestep: as ComfyUI hands it over, fp32, on this rank's device.
            prepared: what `prepare` returned.
            out: the whole prediction in shared memory; only this rank's part is written.
            context: the ranks.
        """

    @abstractmethod
    def example(self, config: Mapping[str, Any], world_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """A small random step (`x`, `timestep`, conditioning) for the self-check, uneven on purpose."""
