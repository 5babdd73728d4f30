"""Forecasts, to be read by a person or a program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmar_megatron.scaling.footprint import Activations
from mmar_megatron.scaling.forecast import RESERVE, Forecast, StageForecast
from mmar_megatron.scaling.search import Found, options_of
from mmar_megatron.scaling.tables import columns, size
from mmar_megatron.scaling.timing import Range

_SHOWN = 10


def table(forecast: Forecast) -> str:
    """Memory of each stage, what is sent, and the time of a step."""
    blocks = (_memory(forecast), _traffic(forecast), _time(forecast))
    return "\n\n".join("\n".join(block) for block in blocks)


def _memory(forecast: Forecast) -> list[str]:
    stages = list(enumerate(forecast.stages))
    columns_of_first = [name.replace("_", " ") for name in _memory_of(forecast.stages[0])]
    rows: list[tuple[str, ...]] = [("memory of a GPU", "in flight", *columns_of_first, "together")]
    for number, stage in stages:
        rows.append((f"  stage {number}", f"{stage.in_flight}", *map(size, _memory_of(stage).values()), size(stage.total)))
    recomputed: list[tuple[str, ...]] = [("all activations", "recomputing no layer", "together", "each layer", "together")]
    for number, stage in stages:
        sizes = (sum_ for each in (stage.without_recompute, stage.with_recompute) for sum_ in (each.total, stage.total_of(each)))
        recomputed.append((f"  stage {number}", *map(size, sizes)))
    verdict = "fits" if forecast.fits else "DOES NOT FIT"
    return [
        *columns(rows),
        "  with the fullest rows, when activations are most: those of logits, of head rows, and all others",
        "  in flight: passes of chunks that are kept at a time; optimizer: with the moving average of the weights",
        *columns(recomputed),
        f"  with {size(RESERVE)} for CUDA, NCCL and fragmentation: {size(forecast.needed)} of the {forecast.gpu.name}'s "
        f"{size(forecast.gpu.memory)}: {verdict}",
    ]


def _memory_of(stage: StageForecast) -> dict[str, int]:
    """Bytes of a rank by column, which add up to `stage.total`."""
    return {
        "weights": stage.model.weights,
        "gradients": stage.model.gradients,
        "optimizer": stage.model.optimizer,
        **_activations_of(stage.activations),
        "batches": stage.batches,
        "buffers": stage.buffers,
    }


def _activations_of(activations: Activations) -> dict[str, int]:
    return {"activations": activations.layers, "logits": activations.logits, "head_rows": activations.head_rows}


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
        "stages": [_stage_as_json(stage) for stage in forecast.stages],
        "sent_in_a_step": dict(forecast.traffic),
        "waiting": forecast.bubble._asdict(),
        "step_s": forecast.step._asdict(),
        "mfu": forecast.mfu._asdict(),
        "options": options_of(forecast.layout),
    }


def _stage_as_json(stage: StageForecast) -> dict[str, Any]:
    alternatives = {"without_recompute": stage.without_recompute, "with_recompute": stage.with_recompute}
    return {
        "layers": list(stage.layers),
        **_memory_of(stage),
        "together": stage.total,
        **{name: {**_activations_of(each), "together": stage.total_of(each)} for name, each in alternatives.items()},
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
