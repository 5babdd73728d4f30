"""Where the time of some steps goes: a trace to look at in chrome://tracing or Perfetto, and a table of the model's parts.

Parts are marked by hooks on the modules, which are there only while steps are profiled: a run without a profile pays nothing.
What runs backward has no module around it. torch numbers what it records to go backward, and by that number an operation of the
backward pass belongs to the part in which its counterpart ran.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.hooks import RemovableHandle

from mmar_megatron import platform
from mmar_megatron.model.mmar_model import MMARModel
from mmar_megatron.parallel import ParallelGroups

PROFILE = "profile"
"""Directory in `run_dir`."""
PARTS = ("data", "embedding", "attention", "linears", "logits", "head", "communication", "optimizer", "other")
"""`linears` are those of the backbone's layers, `embedding` is all in front of them, EmbeddingViT too."""

_MARK, _STEP = "mmar: ", "mmar step "
_BY_NAME = {
    **dict.fromkeys(("nccl:", "gloo:", "c10d::", "_c10d_functional::"), "communication"),
    "Optimizer.step": "optimizer",
}
"""Of operations that say themselves what they are, by how their names begin."""


@dataclass(frozen=True)
class Times:
    """Of a part, in microseconds; without what other parts within it take."""

    host: float = 0.0
    device: float = 0.0

    def __add__(self, other: Times) -> Times:
        return Times(self.host + other.host, self.device + other.device)


class Profile:
    """Profiles the steps of `train.profile` that this process takes, on one rank of each pipeline stage.

    Args:
        steps: `A:B`, from step A to step B; none: nothing is profiled.
        run_dir: of the run.
        models: this rank's model chunks.
        groups: process groups.
    """

    def __init__(self, steps: str | None, *, run_dir: Path, models: Sequence[MMARModel], groups: ParallelGroups) -> None:
        first, last = map(int, steps.split(":")) if steps else (0, -1)
        chosen = groups.data.rank() == 0 and groups.tensor.rank() == 0
        self._steps = range(first, last + 1) if chosen else range(0)
        self._directory = run_dir / PROFILE
        self._models = models
        self._hooks: list[RemovableHandle] = []
        self._profiler: Any = None
        self._taken: list[int] = []

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Within, a step runs; it is profiled if it is one of those."""
        if number not in self._steps:
            yield
            return
        if self._profiler is None:
            self._start()
        with record_function(f"{_STEP}{number}"):
            yield
        self._taken.append(number)

    def part(self, name: str) -> AbstractContextManager[Any]:
        """What runs within belongs to this part."""
        assert name in PARTS
        return nullcontext() if self._profiler is None else record_function(_MARK + name)

    def due(self, number: int) -> bool:
        """Whether this was the last of the steps, so that `close` has something to write."""
        return self._profiler is not None and number >= self._steps[-1]

    def close(self) -> None:
        """Write what was profiled, be it all steps or those before the run was stopped; if nothing was, nothing."""
        if self._profiler is None:
            return
        self._profiler.stop()
        for hook in self._hooks:
            hook.remove()
        name = f"steps_{self._taken[0]:08d}-{self._taken[-1]:08d}_rank_{torch.distributed.get_rank():05d}"
        self._directory.mkdir(parents=True, exist_ok=True)
        text, trace = (self._directory / f".{name}.{ending}" for ending in ("txt", "json.gz"))
        text.write_text(table(self._profiler.events(), steps=len(self._taken)))
        self._profiler.export_chrome_trace(str(trace))
        for partial in (text, trace):
            partial.rename(partial.with_name(partial.name.removeprefix(".")))
        self._profiler = None

    def _start(self) -> None:
        for model in self._models:
            for module, part in _parts(model):
                self._hooks += _marked(module, part)
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if platform.HAS_CUDA else [])
        self._profiler = profile(activities=activities)
        self._profiler.start()


def _parts(model: MMARModel) -> Iterator[tuple[nn.Module, str]]:
    if model.pre_process:
        yield model.embedding, "embedding"
    for layer in model.decoder.layers:
        attention, mlp = layer.self_attention, layer.mlp
        yield attention.core_attention, "attention"
        yield from (
            (linear, "linears") for linear in (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2)
        )
    if model.post_process:
        yield model.output_layer, "logits"
        yield model.post_projector, "head"
        yield model.diffusion_head, "head"
        if model.settings.alignment_loss_weight > 0:
            yield model.alignment_projector, "head"


def _marked(module: nn.Module, part: str) -> list[RemovableHandle]:
    open_ranges: list[Any] = []

    def enter(module: nn.Module, arguments: Any) -> None:
        open_ranges.append(record_function(_MARK + part))
        open_ranges[-1].__enter__()

    def leave(module: nn.Module, arguments: Any, output: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


# --- the table ------------------------------------------------------------------------------------------------------------------


def table(events: Iterable[Any], *, steps: int) -> str:
    """Time of a step by part, as text: the host's (this process's threads), and on a GPU the device's.

    Args:
        events: torch's, of a profile.
        steps: how many they are of.
    """
    times = by_part(events)
    total = sum(times.values(), Times())
    columns = ["host"] + (["device"] if total.device else [])
    lines = [f"means of {steps} {'step' if steps == 1 else 'steps'}, ms", ""]
    lines.append(f"{'part':16}" + "".join(f"{name:>12}{'share':>9}" for name in columns))
    for part, spent in [*times.items(), ("together", total)]:
        cells = ((getattr(spent, name), getattr(total, name)) for name in columns)
        lines.append(f"{part:16}" + "".join(f"{own / steps / 1e3:12.3f}{own / whole:9.1%}" for own, whole in cells))
    return "\n".join(lines) + "\n"


def by_part(events: Iterable[Any]) -> dict[str, Times]:
    """Time of the profiled steps by part, of operations alone: what an operation calls counts where that belongs."""
    on_host = sorted((event for event in events if event.device_type == DeviceType.CPU), key=lambda event: event.time_range.start)
    steps = [event.time_range for event in on_host if event.name.startswith(_STEP)]
    times: dict[str, Times] = defaultdict(Times)
    for event, part in with_parts(on_host):
        if any(step.start <= event.time_range.start < step.end for step in steps):
            # The device's timeline has the marks too, as if they were kernels: these carry the name of what started them.
            device = sum(kernel.duration for kernel in event.kernels if kernel.name != event.name)
            times[part] += Times(event.self_cpu_time_total, device)
    return {part: times[part] for part in PARTS if part in times}


def with_parts(on_host: Iterable[Any]) -> Iterator[tuple[Any, str]]:
    """The host's events, in the order of their beginnings, each with its part."""
    counterparts: dict[tuple[int, int], str] = {}
    known: dict[int, str] = {}
    for event in on_host:
        part = known[id(event)] = _own_part(event, counterparts) or known.get(id(event.cpu_parent), "other")
        if event.sequence_nr >= 0 and not event.fwd_thread:
            # Of several with a number the last is the one that goes backward; those before it recorded nothing.
            counterparts[event.thread, event.sequence_nr] = part
        yield event, part


def _own_part(event: Any, counterparts: dict[tuple[int, int], str]) -> str | None:
    if event.name.startswith(_MARK):
        return event.name.removeprefix(_MARK)
    for beginning, part in _BY_NAME.items():
        if event.name.startswith(beginning):
            return part
    # What runs backward has the thread in which its counterpart ran; threads count from 1.
    return counterparts.get((event.fwd_thread, event.sequence_nr)) if event.fwd_thread else None
