"""Many prompts of everything, with everything that goes wrong: `python -m tests.soak --prompts 200 [--seed N]`.

Each prompt draws a model, a size, a split, a place for the weights and a LoRA or none, and sometimes trouble: a Cancel
in the middle, a worker that is killed, models that are freed. Its result must have the bits of the first prompt like
it. Memory and descriptors are counted in the same state, after a warm-up and at the end.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, equal

from parallel.errors import EngineError, WorkerDiedError
from parallel.host import calls, running
from parallel.host.remote_model import RemoteModel
from tests.distributed.changed_weights import changed
from tests.distributed.process_facts import memory
from tests.distributed.tiny_models import COGVIDEOX, FLUX, HUNYUAN, WAN, Inputs, TinyModels, recipe_of

DEVICES = "cpu,cpu"
SIZES = {"small": {"height": 8, "width": 6}, "odd": {"height": 10, "width": 14}}
SPLITS: dict[str, dict[str, Any]] = {"ulysses": {}, "ring": {"ring_degree": 2}, "cfg": {"cfg_degree": 2}}
PLACES = ("replicate", "shard", "offload")
TROUBLE = {"none": 70, "cancel": 14, "kill": 6, "free": 10}
STEPS = 4
LONG_S = 120.0
"""What counts as hanging."""


class Cancelled(Exception):
    """Stands for ComfyUI's InterruptProcessingException."""


@dataclass(frozen=True)
class Prompt:
    """What is drawn."""

    network: str
    size: str
    split: str
    place: str
    lora: bool

    @property
    def possible(self) -> bool:
        """Two prompts side by side leave one device for each: there is nobody to share weights with."""
        return not (self.split == "cfg" and self.place == "shard")


@dataclass
class Tally:
    """What has come of it."""

    prompts: int = 0
    trouble: Counter[str] = field(default_factory=Counter)
    """What has happened; a prompt that ended before its turn came counts as `none`."""
    wrong: list[str] = field(default_factory=list)
    hung: int = 0
    messages: set[str] = field(default_factory=set)
    slowest_s: float = 0.0
    host_bytes: list[int] = field(default_factory=list)
    worker_bytes: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    def growth(self, figures: list[int]) -> float:
        """Of the last quarter over the second one, the first after the warm-up."""
        quarter = max(1, len(figures) // 4)
        return statistics.median(figures[-quarter:]) / statistics.median(figures[quarter : 2 * quarter] or figures) - 1

    def to_json(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts,
            "trouble": dict(self.trouble),
            "wrong": self.wrong,
            "hung": self.hung,
            "messages": sorted(self.messages),
            "slowest_s": round(self.slowest_s, 1),
            "host_growth": round(self.growth(self.host_bytes), 3),
            "worker_growth": round(self.growth(self.worker_bytes), 3),
            "descriptors": sorted(set(self.descriptors)),
        }


class Soak:
    """Prompts, one after the other.

    Args:
        folder: where the models are written.
        seed: of what is drawn.
    """

    def __init__(self, folder: Path, seed: int):
        self.tally = Tally()
        self._draw = random.Random(seed)
        self._models = TinyModels(folder)
        self._known: dict[Prompt, list[Tensor]] = {}
        self._loaded: dict[tuple[str, str, str], RemoteModel] = {}

    def run(self, prompts: int) -> Tally:
        for _ in range(prompts):
            self._prompt()
        running.stop_all()
        return self.tally

    def _drawn(self) -> Prompt:
        while True:
            prompt = Prompt(
                self._draw.choice((HUNYUAN, FLUX, WAN, COGVIDEOX)),
                self._draw.choice(list(SIZES)),
                self._draw.choice(list(SPLITS)),
                self._draw.choice(PLACES),
                self._draw.random() < 0.3,
            )
            if prompt.possible:
                return prompt

    def _prompt(self) -> None:
        prompt = self._drawn()
        (trouble,) = self._draw.choices(list(TROUBLE), list(TROUBLE.values()))
        self.tally.prompts += 1
        began = time.monotonic()
        if trouble == "free":
            self._free()
        results = self._troubled(prompt, trouble) if trouble in ("cancel", "kill") else self._results(prompt)
        took = time.monotonic() - began
        self.tally.slowest_s = max(self.tally.slowest_s, took)
        self.tally.hung += took > LONG_S
        if results is None:
            self.tally.trouble[trouble] += 1
            return
        self._compare(prompt, results)
        self._measure()
        self.tally.trouble["free" if trouble == "free" else "none"] += 1

    def _model(self, prompt: Prompt) -> RemoteModel:
        key = (prompt.network, prompt.split, prompt.place)
        if key not in self._loaded:
            path = self._models.path(prompt.network)
            self._loaded[key] = RemoteModel(recipe_of(path, DEVICES, weights=prompt.place, **SPLITS[prompt.split]))
        model = self._loaded[key]
        for other in self._loaded.values():  # ComfyUI would make room, too
            if other is not model:
                other.weights.unload()
        model.weights.ensure_loaded()
        names = self._patched(prompt)
        version = ("lora", *names) if names else None
        model.weights.replace(version, names, changed(self._models.path(prompt.network)))
        return model

    def _patched(self, prompt: Prompt) -> list[str]:
        if not prompt.lora:
            return []
        linear = self._loaded[prompt.network, prompt.split, prompt.place].recipe.linear
        return sorted(f"{layer.name}.weight" for layer in linear)[:3]

    def _results(self, prompt: Prompt, poll: Any = None) -> list[Tensor]:
        """Of some steps with two conditions."""
        model = self._model(prompt)
        text = {"valid": (5,)} if prompt.network == HUNYUAN else {}
        requests = [Inputs(prompt.network, seed=seed, **SIZES[prompt.size], **text).make(str(seed)) for seed in (0, 1)]
        found: list[Tensor] = []
        for _ in range(STEPS):
            found = [result.clone() for result in model.steps(requests, conditions=2, poll=poll)]
        return found

    def _troubled(self, prompt: Prompt, trouble: str) -> list[Tensor] | None:
        """A prompt that does not come to its end, most often."""
        model = self._model(prompt)
        group = model.weights.group
        assert group is not None
        polls, after = 0, self._draw.randint(1, 20)

        def poll() -> None:
            nonlocal polls
            polls += 1
            if polls == after:
                if trouble == "cancel":
                    raise Cancelled
                os.kill(self._draw.choice(group.pids), signal.SIGKILL)

        try:
            return self._results(prompt, poll)
        except Cancelled:
            return None
        except WorkerDiedError as error:
            self.tally.messages.add(" ".join(word for word in str(error).split() if not word.strip("(),;.").isdigit()))
            return None

    def _free(self) -> None:
        for model in self._loaded.values():
            model.weights.unload()

    def _compare(self, prompt: Prompt, results: list[Tensor]) -> None:
        known = self._known.setdefault(prompt, results)
        if not all(equal(a, b) for a, b in zip(known, results, strict=True)):
            self.tally.wrong.append(str(prompt))

    def _measure(self) -> None:
        """With one model loaded, between two prompts."""
        gc.collect()
        (group,) = running.running()
        self.tally.host_bytes.append(memory(os.getpid(), "Anon"))
        self.tally.worker_bytes.append(max(memory(pid, "Anon") for pid in group.pids))
        self.tally.descriptors.append(len(list(Path("/proc/self/fd").iterdir())))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    calls._SLICE_S = 0.0005  # polled often, also in short steps
    with tempfile.TemporaryDirectory(prefix="sequence-parallel-soak-") as folder:
        began = time.monotonic()
        try:
            tally = Soak(Path(folder), options.seed).run(options.prompts)
        except EngineError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print(json.dumps({**tally.to_json(), "seconds": round(time.monotonic() - began)}, indent=1))
    return int(bool(tally.wrong or tally.hung))


if __name__ == "__main__":
    sys.exit(main())
