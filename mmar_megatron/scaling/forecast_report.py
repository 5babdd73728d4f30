"""Forecasts, to be read by a person or a program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmar_megatron.scaling.forecast import RESERVE, Forecast
from mmar_megatron.scaling.search import Found, options_of
from mmar_megatron.scaling.tables import columns, size
from mmar_megatron.scaling.timing import Range

_SHOWN = 10


def table(forecast: Forecast) -> str:
    """Memory of each stage, what is sent, and the time of a step."""
    blocks = (_memory(forecast), _traffic(forecast), _time(forecast))
    return "\n\n".join("\n".join(block) for block in blocks)


def _memory(forecast: Forecast) -> list[str]:
    heading = ("memory of a GPU", "in flight", "model", "activations", "if none", "if each", "batches", "buffers", "together")
    rows: list[tuple[str, ...]] = [heading]
    for number, stage in enumerate(forecast.stages):
        sizes = (
            *(stage.model.total, stage.activations, stage.without_recompute, stage.with_recompute),
            *(stage.batches, stage.buffers, stage.total),
        )
        rows.append((f"  stage {number}", f"{stage.in_flight}", *map(size, sizes)))
    verdict = "fits" if forecast.fits else "DOES NOT FIT"
    return [
        *columns(rows),
        "  if none, if each: layer were recomputed; in flight: passes of chunks that are kept at a time; with the fullest rows",
        f"  with {size(RESERVE)} for CUDA, NCCL and fragmentation: {size(forecast.needed)} of the {forecast.gpu.name}'s "
        f"{size(forecast.gpu.memory)}: {verdict}",
    ]


def _traffic(forecast: Forecast) -> list[str]:
    sent = sorted(forecast.traffic.items(), key=lambda kind_and_size: -kind_and_size[1])
    rows = [("sent by the busiest GPU in a step", size(sum(forecast.traffic.values())))]
    return columns(rows + [(f"  {kind}", size(sent_of_kind)) for kind, sent_of_kind in sent])


def _time(forecast: Forecast) -> list[str]:
    lines = [f"a step, forecast: {_seconds(forecast.step)}, MFU {_percent(forecast.mfu)}"]
    if len(forecast.stages) > 1:
        works = " | ".join(_seconds(stage.seconds) for stage in forecast.stages)
        lines += [f"  own work of the stages: {works}", f"  they wait for each other for {_percent(forecast.bubble)} of the time"]
    return lines


def found_table(found: Found) -> str:
    """The fastest layouts that fit, and the options for the first."""
    if not found.fitting:
        smallest = found.smallest
        return (
            f"none of {found.layouts} layouts fits: {smallest.layout.describe()} needs least, {size(smallest.needed)} of "
            f"{size(smallest.gpu.memory)}; take more GPUs, or ones with more memory"
        )
    rows: list[tuple[str, ...]] = [("layout", "micro batch", "memory", "waiting", "a step", "MFU")]
    rows += [_row(forecast) for forecast in found.fitting[:_SHOWN]]
    best = found.fitting[0]
    return "\n".join(
        [
            f"{len(found.fitting)} of {found.layouts} layouts fit; the fastest, by the middle of what is forecast:",
            *columns(rows),
            "",
            "the first one:",
            *(f"  {option}" for option in options_of(best.layout)),
        ]
    )


def _row(forecast: Forecast) -> tuple[str, ...]:
    layout = forecast.layout
    return (
        layout.describe(),
        f"{layout.config.train.micro_batch_size}",
        size(forecast.needed),
        _percent(forecast.bubble),
        _seconds(forecast.step),
        _percent(forecast.mfu),
    )


def as_json(forecast: Forecast) -> dict[str, Any]:
    """The same for a program; bytes and seconds."""
    return {
        "layout": forecast.layout.describe(),
        "world_size": forecast.layout.world_size,
        "gpu": forecast.gpu.name,
        "fits": forecast.fits,
        "memory_needed": forecast.needed,
        "stages": [_stage_as_json(forecast, number) for number in range(len(forecast.stages))],
        "sent_in_a_step": dict(forecast.traffic),
        "waiting": forecast.bubble._asdict(),
        "step_s": forecast.step._asdict(),
        "mfu": forecast.mfu._asdict(),
        "options": options_of(forecast.layout),
    }


def _stage_as_json(forecast: Forecast, number: int) -> dict[str, Any]:
    stage = forecast.stages[number]
    return {
        "layers": list(stage.layers),
        "weights": stage.model.weights,
        "gradients": stage.model.gradients,
        "optimizer": stage.model.optimizer,
        "activations": stage.activations,
        "activations_without_recompute": stage.without_recompute,
        "activations_with_recompute": stage.with_recompute,
        "batches": stage.batches,
        "buffers": stage.buffers,
        "in_flight": stage.in_flight,
        "seconds": stage.seconds._asdict(),
    }


def _seconds(seconds: Range) -> str:
    return _between(seconds, lambda value: f"{value:.3g}") + " s"


def _percent(share: Range) -> str:
    low, high = sorted(share)
    return f"{low:.0%} to {high:.0%}".replace("% to", " to") if f"{low:.0%}" != f"{high:.0%}" else f"{low:.0%}"


def _between(values: Sequence[float], shown: Any) -> str:
    low, high = (shown(value) for value in sorted(values))
    return low if low == high else f"{low} to {high}"
