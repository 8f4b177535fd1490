"""A worker's life: join the group, then answer the host's messages one after the other until it says stop or dies."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
import queue
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from .. import numerics
from ..attention import kernels
from ..attention.common_memory import CommonMemory
from ..attention.traffic import Traffic
from ..cache.blocks import BlockCache, StepPasses, Tally
from ..checkpoints.source import Stored
from ..compilation.blocks import CompiledBlocks
from ..compilation.settings import CompileSettings
from ..degrees import Degrees
from ..errors import EngineError, StepCancelled, UnsupportedError
from ..mesh import Mesh
from ..plan import SequencePlan, share_of
from ..wire.channel import Channel, ChannelClosed, Message
from ..wire.control import SIZE as CONTROL_SIZE
from ..wire.control import ControlPage
from ..wire.shared import Segment, TensorRef, dtype_name
from . import faults
from .fp8_linear import support
from .free_memory import device_memory, host_memory
from .homes import MakeHome, Replicated
from .libraries import Libraries
from .measurement import Slowed, measure_attention
from .native_vae import NativeVAE
from .network_calls import NetworkCalls
from .offloaded import Offloaded
from .phases import Phases
from .ranks import ParallelContext, Ranks, SoloContext, join
from .resident import Progress, ResidentModel
from .sampling import Agreement, Sampling
from .split_network import SplitNetwork

if TYPE_CHECKING:
    from ..compilation.modules import CompiledModules

_PR_SET_PDEATHSIG = 1
_PROGRESS_INTERVAL_S = 0.1
_BLOCKS_OF_A_PASS = 2**20
"""More than any step of a sampling enters."""


class Worker:
    """The state of one rank.

    Args:
        channel: to the host.
        rank: place in the world.
        weights: relative speed of each rank.
        device: this rank's device.
        attention: kernel name, see `config.ATTENTION_KERNELS`.
        store: descriptor of the file through which the ranks meet.
        common: descriptor of the file that is the common memory of CPU ranks.
        family: of the model that will be loaded first, if the host knows: its class is imported while the ranks meet.
    """

    def __init__(
        self,
        channel: Channel,
        *,
        rank: int,
        weights: tuple[float, ...],
        device: torch.device,
        attention: str,
        store: int,
        common: int,
        family: str | None,
    ):
        self._channel = channel
        self._rank = rank
        self._device = device
        usable = device.type == "cpu" and CommonMemory.supported()
        memory = CommonMemory(common, rank, len(weights)) if usable else None
        self._ranks = Ranks(weights, device, kernels.select(attention, device), memory)
        self._libraries = Libraries(family, device)
        join(rank, len(weights), device, store)
        self._segments: dict[str, Segment] = {}
        self._control: ControlPage | None = None
        self._models: dict[str, Any] = {}
        """`ResidentModel` or, see `NetworkCalls`, `SplitNetwork`."""
        self._vaes: dict[str, NativeVAE] = {}
        self._checked: set[tuple[str, torch.dtype, str | None, Degrees]] = set()
        self._operations: dict[str, Callable[[Message], dict[str, Any]]] = {
            "fp8 support": self._fp8_support,
            "free memory": self._free_memory,
            "recover": self._recover,
            "load": self._load,
            "unload": self._unload,
            "weights": self._weights,
            "forget_cache": self._forget_cache,
            "rest": self._rest,
            "step": self._step,
            "sample": self._sample,
            "echo": self._echo,
            "attention": self._attention,
            "slow": self._slow,
            "load vae": self._load_vae,
            "unload vae": self._unload_vae,
            "begin tiles": self._begin_tiles,
            "tile": self._tile,
        }
        self._operations |= NetworkCalls(
            self._ranks,
            device,
            self._models,
            self._model,
            self._tensor,
            self._page,
            self._load_progress,
            self._segments.pop,
        ).operations
        self._times = 1

    def run(self, inbox: queue.Queue[tuple[Message, list[int]]]) -> None:
        """Answers messages until `stop`."""
        while True:
            message, fds = inbox.get()
            if message["op"] == "stop":
                return
            if message["op"] == "attach":
                self._attach(message["segments"], fds)
                continue
            figures: dict[str, int | None] = {}
            attached = False
            try:
                self._attach(message["segments"], fds)
                attached = True
                self._libraries.wait()
                with Slowed(self._times) if self._times > 1 else contextlib.nullcontext():
                    result = self._operations[message["op"]](message)
                reply = {"ok": True, "result": result}
            except StepCancelled:
                reply = {"ok": True, "result": None, "cancelled": True}
            except BaseException as error:
                figures = self._figures()
                reply = {"ok": False, "error": faults.describe(error, attached)}
                faults.let_go(error)
            self._channel.send(
                {"id": message["id"], "launched": self._ranks.launched(), **(figures or self._figures()), **reply}
            )

    # --- operations ---------------------------------------------------------------------------------------------

    def _fp8_support(self, message: Message) -> dict[str, Any]:
        """Which FP8 products this rank's device has."""
        with torch.no_grad():
            return {"support": support(self._device)}

    def _free_memory(self, message: Message) -> dict[str, Any]:
        """Of this rank's device, and of the machine."""
        self._give_memory_back()
        return {"device": asdict(device_memory(self._device)), "host": asdict(host_memory())}

    def _recover(self, message: Message) -> dict[str, Any]:
        """After an operation for which no rank had the memory: frees what it has left, and tries the device."""
        for model in self._models.values():
            model.forget_cache()
        self._give_memory_back()
        faults.probe(self._device)
        return {}

    def _load(self, message: Message) -> dict[str, Any]:
        """Makes a model resident; the self-check runs the first time a family is used in a dtype."""
        self._drop_model(message["model"])
        began = time.perf_counter()
        with torch.no_grad():
            home = self._home(message["weights"])
            model = ResidentModel(message["recipe"], self._device, self._load_progress(), home, message["fp8"])
            self._models[message["model"]] = model
        weights_s = time.perf_counter() - began - model.libraries_s
        seconds = {"libraries": self._libraries.take_waited() + model.libraries_s, "weights": weights_s}
        return {"nbytes": model.nbytes, "family": model.adapter.family, "fp8": model.fp8_report, "seconds": seconds}

    def _load_progress(self) -> Progress:
        """Tells the host how far loading has come; stops it on Cancel."""
        told = time.monotonic()

        def progress(done: int, total: int) -> None:
            nonlocal told
            assert self._control is not None
            self._control.beat(self._rank)
            if self._control.cancel_requested:
                raise StepCancelled("stopped while loading")
            if time.monotonic() - told > _PROGRESS_INTERVAL_S or done == total:
                told = time.monotonic()
                self._channel.send({"event": "progress", "done": done, "total": total})

        return progress

    def _page(self) -> ControlPage:
        assert self._control is not None
        return self._control

    def _home(self, wanted: Message) -> MakeHome:
        """Where the host wants a model's weights."""
        mode = wanted["mode"]
        if mode == "shard":
            from .sharded import Sharded  # FSDP2 takes a second to import

            return partial(Sharded, group=self._ranks.weights_group(wanted["sharing"]))
        if mode == "offload":
            file = self._segments.pop(wanted["segment"])
            return partial(Offloaded, file=file, rank=self._rank, ranks=self._ranks.world_size)
        return Replicated

    def _unload(self, message: Message) -> dict[str, Any]:
        self._drop_model(message["model"])
        for name in message["drop"]:
            self._drop_segment(name)
        self._give_memory_back()
        return {}

    def _drop_model(self, name: str) -> None:
        if (model := self._models.pop(name, None)) is not None:
            model.close()

    def _give_memory_back(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            ctypes.CDLL(None).malloc_trim(0)
        if self._ranks.memory is not None:
            self._ranks.memory.release()

    def _weights(self, message: Message) -> dict[str, Any]:
        """Puts tensors in the place of the checkpoint's, and the checkpoint's back in theirs."""
        model = self._model(message["model"])
        assert isinstance(model, ResidentModel)
        model.forget_cache()
        with torch.no_grad():
            for name, ref in message["put"].items():
                model.put_weight(name, Stored(self._tensor(ref), message["scales"].get(name)))
            model.restore_weights(message["restore"])
        return {}

    def _forget_cache(self, message: Message) -> dict[str, Any]:
        """Frees what a sampling that is over has remembered. Nobody waits for it, and the model may be gone."""
        if (model := self._models.get(message["model"])) is not None:
            model.forget_cache(message["sampling"])
        return {}

    def _rest(self, message: Message) -> dict[str, Any]:
        """After a sampling: other processes can have what its activations took. On a CPU keeping it is quicker, and the
        system can reclaim it.
        """
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return {}

    def _step(self, message: Message) -> dict[str, Any]:
        """Runs this rank's part of one or more requests; which samples are its group's follows from the degrees."""
        model = self._conditioned(message)
        assert self._control is not None
        mesh = self._mesh(message["degrees"], cached=message["cache"] is not None)
        with torch.no_grad():
            self_check_s = self._check(model, mesh)
            blocks = self._compiled(model, message["compile"], mesh)
            began = time.perf_counter()
            context = ParallelContext(self._ranks, mesh, self._control)
            cache = None
            if (wanted := message["cache"]) is not None:
                cache = model.cache(wanted["sampling"], wanted["rule"])
                cache.begin_step(mesh.degrees, wanted["active"])
            self._run_requests(model, message["requests"], mesh, context, cache, blocks)
        counted = {} if cache is None else {"cache": asdict(cache.tally)}
        if blocks is not None:
            counted["compile"] = asdict(blocks.take_tally())
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "self_check_s": self_check_s, **context.traffic.to_json(), **counted}

    def _sample(self, message: Message) -> dict[str, Any]:
        """Runs a whole sampling. What it returns, and counts of a cache, is kept apart by the degrees of its passes."""
        model = self._conditioned(message)
        assert self._control is not None
        control = self._control
        cached = message["cache"] is not None
        meshes = [self._mesh(degrees, cached=cached) for degrees in message["degrees"]]
        contexts: list[ParallelContext] = []
        traffic = Traffic()
        seconds, tallies = [0.0 for _ in meshes], [Tally() for _ in meshes]

        def passes(instruction: dict[str, Any]) -> None:
            which = instruction["degrees"]
            mesh = meshes[which]
            # Batch groups may have run unequal numbers of blocks; under the next degrees their ranks may be one group.
            context = ParallelContext(self._ranks, mesh, control, first_block=len(contexts) * _BLOCKS_OF_A_PASS)
            contexts.append(context)
            cache = None
            if (wanted := message["cache"]) is not None:
                cache = model.cache(wanted["sampling"], wanted["rule"])
                cache.begin_step(mesh.degrees, instruction["active"])
            began = time.perf_counter()
            self._run_requests(model, instruction["network"], mesh, context, cache, compilers[which])
            seconds[which] += time.perf_counter() - began
            if cache is not None:
                tallies[which].add(cache.tally)

        def told(done: int, total: int) -> None:
            self._channel.send({"event": "progress", "done": done, "total": total})

        agreement = Agreement(self._device, traffic)
        compilers: list[CompiledBlocks | CompiledModules | None] = []
        with torch.no_grad():
            stopped, self_check_s = False, 0.0
            try:
                for mesh in meshes:
                    self_check_s += self._check(model, mesh)
                compilers += [self._compiled(model, message["compile"], mesh) for mesh in meshes]
            except StepCancelled:  # in this rank's batch group; another one may just have finished
                stopped = True
            if agreement.any(stopped)[0]:
                raise StepCancelled("stopped before the first pass")
            began = time.perf_counter()
            sampling = Sampling(
                message,
                rank=self._rank,
                world_size=self._ranks.world_size,
                tensor_at=self._tensor,
                agreement=agreement,
                cancel_requested=lambda: control.cancel_requested,
            )
            sampling.run(passes, told)
        for context in contexts:
            traffic.include(context.traffic)
        blocks = next(iter(compilers), None)  # one for all degrees
        counted = {} if blocks is None else {"compile": asdict(blocks.take_tally())}
        return {
            **counted,
            "seconds": time.perf_counter() - began,
            "self_check_s": self_check_s,
            **traffic.to_json(),
            "degrees": [
                {"seconds": took, "cache": asdict(tally)} for took, tally in zip(seconds, tallies, strict=True)
            ],
        }

    def _mesh(self, degrees: dict[str, int], *, cached: bool) -> Mesh:
        """The mesh, and all groups that it needs: they are made by all ranks of the world together, and later a batch
        group may stop before another one."""
        mesh = self._ranks.mesh(Degrees(**degrees))
        if cached:
            self._ranks.total(mesh, Traffic())
        return mesh

    def _conditioned(self, message: Message) -> ResidentModel | SplitNetwork:
        """The model of a message, with the conditioning that comes along."""
        model = self._model(message["model"])
        model.drop_conditioning(message["drop"])
        for key, ref in message["put"].items():
            model.put_conditioning(key, self._tensor(ref))
        return model

    def _model(self, name: str) -> ResidentModel | SplitNetwork:
        if name not in self._models:
            raise EngineError(f"the workers do not have {name} any more: queue the prompt again")
        return self._models[name]

    def _run_requests(
        self,
        model: ResidentModel | SplitNetwork,
        requests: list[dict[str, Any]],
        mesh: Mesh,
        context: ParallelContext,
        cache: BlockCache | None,
        compiler: CompiledBlocks | CompiledModules | None,
    ) -> None:
        """This rank's part of requests that run side by side; the results lie in shared memory when it returns."""
        if isinstance(compiler, CompiledBlocks):
            context.compiler = compiler
        total = None if cache is None else self._ranks.total(mesh, context.traffic)
        batches = [request["x"]["shape"][0] for request in requests]
        for request, rows in zip(requests, share_of(batches, mesh.group, mesh.degrees.groups), strict=True):
            if rows.stop > rows.start:
                if cache is not None and total is not None:
                    samples = (request["label"], rows.start, rows.stop)
                    context.cache = StepPasses(cache, samples, tuple(request["x"]["shape"]), total)
                if isinstance(model, SplitNetwork):
                    work = (id(model), rows.stop - rows.start, tuple(request["x"]["shape"]))
                    sequence = self._ranks.sequence(mesh, context, model.attention, work)
                    modules = None if isinstance(compiler, CompiledBlocks) else compiler
                    model.step(request, rows, self._tensor, sequence, context.cache, modules)
                    continue
                x, timestep, out = (self._tensor(request[name]) for name in ("x", "timestep", "out"))
                model.step(x, timestep, request["conditioning"], rows, out, context)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        context.finish()

    def _load_vae(self, message: Message) -> dict[str, Any]:
        """Rebuilds ComfyUI's VAE around the weights that the host shares; a CPU rank computes with them where they are.

        Raises:
            UnsupportedError: it would not be the same VAE.
        """
        state = {name: self._tensor(ref) for name, ref in message["state"].items()}
        vae = NativeVAE(message["source"], state, self._device)
        self._vaes[message["vae"]] = vae
        if self._device.type != "cpu":
            self._drop_segment(message["vae"])
        return {"nbytes": vae.nbytes}

    def _unload_vae(self, message: Message) -> dict[str, Any]:
        self._vaes.pop(message["vae"], None)
        self._drop_segment(message["vae"])
        self._give_memory_back()
        return {}

    def _begin_tiles(self, message: Message) -> dict[str, Any]:
        """All ranks hear of the segments that tiles will travel in."""
        if message["vae"] not in self._vaes:
            raise EngineError(f"the workers do not have {message['vae']} any more: queue the prompt again")
        return {}

    def _tile(self, message: Message) -> dict[str, Any]:
        """Decodes or encodes one tile."""
        assert self._control is not None
        if self._control.cancel_requested:
            raise StepCancelled("stopped before a tile")
        self._control.beat(self._rank)
        began = time.perf_counter()
        try:
            x = self._tensor(message["x"]).as_strided(message["shape"], message["stride"])
            result = self._vaes[message["vae"]].run(message["direction"], x)
            room = message["out"]
            ref = TensorRef(room["segment"], room["offset"], tuple(result.shape), dtype_name(result.dtype))
            if ref.nbytes > room["size"]:
                raise UnsupportedError(f"a tile of {ref.nbytes} bytes came out where {room['size']} were expected")
            self._tensor(ref.to_json()).copy_(result)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise
        return {"seconds": time.perf_counter() - began, "out": ref.to_json()}

    def _echo(self, message: Message) -> dict[str, Any]:
        """Writes this rank's share of the input to the output: a remote call without a model."""
        began = time.perf_counter()
        x, out = self._tensor(message["inputs"]["x"]).flatten(), self._tensor(message["out"]).flatten()
        share = -(-x.numel() // self._ranks.world_size)
        mine = slice(self._rank * share, (self._rank + 1) * share)
        out[mine].copy_(x[mine])
        return {"seconds": time.perf_counter() - began}

    def _attention(self, message: Message) -> dict[str, Any]:
        """One attention on random data, for the benchmarks."""
        mesh = self._ranks.mesh(Degrees(**message["degrees"]))
        plan = SequencePlan(
            tuple(message["streams"]), message["heads"], mesh.members(self._ranks.weights), mesh.degrees.ring
        )
        traffic = Traffic(on_cuda=self._device.type == "cuda")
        return measure_attention(
            self._ranks.joint_attention(plan, mesh, message["pipeline"], traffic),
            traffic,
            plan,
            mesh.sp_rank,
            self._ranks.kernel,
            batch=message["batch"],
            head_dim=message["head_dim"],
            dtype=getattr(torch, message["dtype"]),
            device=self._device,
            check=message.get("check", False),
        )

    def _slow(self, message: Message) -> dict[str, Any]:
        """From here on this rank is so many times slower, for the benchmarks."""
        self._times = message["times"][self._rank]
        return {}

    # --- parts --------------------------------------------------------------------------------------------------

    def _check(self, model: ResidentModel | SplitNetwork, mesh: Mesh) -> float:
        """Split against alone, before the first step of a family in a dtype and mesh; all ranks are here together.

        A network's attention is checked where it runs (`attention.row_check`), and its hooks check what they cut.

        Returns:
            The seconds it took; 0 where it had been done.
        """
        if isinstance(model, SplitNetwork):
            return 0.0
        key = (model.adapter.family, model.compute_dtype, model.scheme, mesh.degrees)
        if mesh.degrees.sp == 1 or key in self._checked:
            return 0.0
        assert self._control is not None
        began = time.perf_counter()
        context = ParallelContext(self._ranks, mesh, self._control)
        model.self_check(context, SoloContext(self._ranks.kernel), mesh.degrees, context.add_up)
        self._checked.add(key)
        return time.perf_counter() - began

    def _compiled(
        self, model: ResidentModel | SplitNetwork, wanted: dict[str, Any] | None, mesh: Mesh
    ) -> CompiledBlocks | CompiledModules | None:
        """The compiler of the model's blocks, which are compared with uncompiled ones before their first step.

        A network's are where they run. For the others that is of use with dynamic sizes only: else what is compiled for
        the small step is for nothing else. Whether it is done is known to all ranks alike, whatever has become of a
        rank's compiler.
        """
        if wanted is None:
            return None
        control, settings = self._control, CompileSettings(**wanted)
        assert control is not None
        if isinstance(model, SplitNetwork):
            return model.compiled(settings, lambda: control.beat(self._rank))
        blocks = model.compiled(settings, lambda: control.beat(self._rank))
        if settings.dynamic and mesh.degrees not in blocks.checked:
            compiled, uncompiled = (ParallelContext(self._ranks, mesh, control) for _ in range(2))
            model.check_compiled(blocks, compiled, uncompiled, mesh.degrees)
            blocks.checked.add(mesh.degrees)
        return blocks

    def _tensor(self, ref: dict[str, Any]) -> torch.Tensor:
        place = TensorRef.from_json(ref)
        return self._segments[place.segment].tensor(place)

    def _drop_segment(self, name: str) -> None:
        if segment := self._segments.pop(name, None):
            segment.close()

    def _attach(self, announced: list[dict[str, Any]], fds: list[int]) -> None:
        """Maps segments that the host shares for the first time, or in a new size."""
        for entry, fd in zip(announced, fds, strict=True):
            segment = Segment(entry["name"], fd, entry["size"])
            if segment.name == "control":
                assert segment.size == CONTROL_SIZE
                self._control = ControlPage(segment)
                continue
            self._drop_segment(segment.name)
            self._segments[segment.name] = segment

    def _figures(self) -> dict[str, int | None]:
        """Of this rank's memory; none of a device that has failed and answers no more."""
        with contextlib.suppress(RuntimeError):
            return {"memory": self._memory(), "free": self._free(), "cached": self._cached()}
        return {}

    def _memory(self) -> int:
        """Bytes that this process has taken: of the GPU by PyTorch's allocator, in use or cached; on a CPU what is
        resident."""
        if self._device.type == "cuda":
            return torch.cuda.memory_reserved(self._device)
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def _free(self) -> int | None:
        """Bytes that the GPU has left, whoever uses the others; the host looks after the system's memory itself."""
        return int(torch.cuda.mem_get_info(self._device)[0]) if self._device.type == "cuda" else None

    def _cached(self) -> int:
        """Bytes of the GPU that this process has taken and does not use: free for its next step, and only for it."""
        if self._device.type != "cuda":
            return 0
        return torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)


class _ToHost(logging.Handler):
    """Sends this worker's own log records to the host, which logs them with the rank."""

    def __init__(self, channel: Channel):
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self._channel.send({"event": "log", "level": record.levelno, "text": self.format(record)})


def main(settings: dict[str, Any], entered: float) -> None:
    """Entry point of the process.

    Args:
        settings: see `host.process`.
        entered: when Python ran the process's first line, by `time.monotonic`, the system's clock.
    """
    phases = Phases(settings["started"])
    phases.end("python", entered)
    phases.end("torch")
    faulthandler.enable()
    # Ended with the host, also by SIGKILL. The host's end of the socket closing says the same (see _listen);
    # this one works even while the interpreter is busy.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != settings["host_pid"]:
        sys.exit("the host is gone")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches us too; the host decides
    torch.set_num_threads(settings["threads"])
    numerics.apply(settings["switches"])
    device = torch.device(settings["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.synchronize(device)  # makes the context here, where it is timed
    phases.end("device")

    channel = Channel(socket.socket(fileno=settings["fd"]))
    root = logging.getLogger("sequence_parallel")
    root.setLevel(logging.INFO)
    root.addHandler(_ToHost(channel))
    inbox: queue.Queue[tuple[Message, list[int]]] = queue.Queue()
    threading.Thread(target=_listen, args=(channel, inbox), name="listen", daemon=True).start()
    worker = Worker(
        channel,
        rank=settings["rank"],
        weights=tuple(settings["weights"]),
        device=device,
        attention=settings["attention"],
        store=settings["store"],
        common=settings["common"],
        family=settings["family"],
    )
    phases.end("meeting")
    channel.send({"event": "ready", "pid": os.getpid(), "seconds": phases.seconds, **_describe_device(device)})
    worker.run(inbox)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # taking down an interpreter with all its modules costs seconds on a busy machine


def _describe_device(device: torch.device) -> dict[str, Any]:
    """A name for people, and bytes of memory."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"title": properties.name, "total": int(properties.total_memory)}
    return {"title": "CPU", "total": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}


def _listen(channel: Channel, inbox: queue.Queue[tuple[Message, list[int]]]) -> None:
    """Reads the host's messages while the main thread computes, and leaves at once when the host is gone."""
    while True:
        try:
            inbox.put(channel.receive())
        except ChannelClosed:
            os._exit(0)
