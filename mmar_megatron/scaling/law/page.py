"""The report: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from mmar_megatron.data.inspection.markup import figure, percent, table
from mmar_megatron.data.inspection.style import STYLE
from mmar_megatron.scaling.law.fitting import LossFit
from mmar_megatron.scaling.law.intervals import LEVEL, Interval
from mmar_megatron.scaling.law.points import Points
from mmar_megatron.scaling.law.remarks import number, on_check, on_far, on_flops, on_held_out, on_search, with_ends
from mmar_megatron.scaling.law.tables import HEADS_OF_ANSWERS, answer_row, held_out_rows, parameter_rows

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_OWN_STYLE = """
.plot { max-width: 100%; height: auto; display: block; border: 1px solid var(--line); border-radius: 8px; }
.warning { border-left: 4px solid var(--learned); padding: 4px 12px; max-width: 75ch; }
"""
_ALTS = {
    "isoflop": "losses by size along budgets, with the law's curves and parabolas",
    "frontier": "best size, best tokens and their loss by compute, with bands",
    "residuals": "residuals by compute",
}


def render(points: Points, fits: Sequence[LossFit], *, plots: Sequence[Mapping[str, bytes]], source: str) -> str:
    """The HTML file.

    Args:
        plots: of each loss, PNG files by name.
        source: what the runs were read from.
    """
    title = f"Scaling laws of {source}"
    links = "".join(f'<a href="#loss-{k}">{escape(fit.column)}</a>' for k, fit in enumerate(fits))
    sections = "".join(
        f'<section id="loss-{k}"><h2>{escape(fit.column)}</h2>{_section(points, fit, k, plots=of_fit)}</section>'
        for k, (fit, of_fit) in enumerate(zip(fits, plots, strict=True))
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><link rel="icon" href="data:,">'
        f"<style>{STYLE}{_OWN_STYLE}</style></head><body><header><h1>{escape(title)}</h1>"
        f"<p>L = E + A / N<sup>alpha</sup> + B / D<sup>beta</sup>, of {len(points.names):,} runs with N parameters and D tokens. "
        f"{escape(on_flops(points))} Intervals are {100 * LEVEL:.0f} %, from drawing the runs anew.</p>"
        f'<nav aria-label="Losses">{links}</nav></header><main>{sections}</main>'
        f'<footer class="soft">Made by tools/sweep.py fit.</footer></body></html>\n'
    )


def _section(points: Points, fit: LossFit, k: int, *, plots: Mapping[str, bytes]) -> str:
    alarms = [f"{said}." for said in fit.undetermined] + on_far(points, fit)
    check = on_check(fit)
    check_kind = "" if not fit.check.possible or fit.check.agrees else " class=warning"
    answers = [[escape(cell) for cell in answer_row(answer)] for answer in fit.answers]
    return (
        "".join(f"<p class=warning>{escape(said)}</p>" for said in alarms)
        + "<h3>What to train</h3>"
        + table(HEADS_OF_ANSWERS, answers, title=f"The best use of a budget; {100 * LEVEL:.0f} % intervals of what is expected")
        + _others(fit)
        + f"<p class=soft>A single run scatters by {percent(f'{k}.scatter', fit.scatter)} about its expected loss.</p>"
        + _plot(plots, "frontier")
        + "<h3>The law</h3>"
        + table(["", "value", "low", "high"], _parameters(fit, k), title=f"{100 * LEVEL:.0f} % intervals")
        + f"<p class=soft>{escape(on_search(fit))}</p>"
        + "<h3>The largest budget, held out</h3>"
        + f"<p>{escape(on_held_out(points, fit))}</p>"
        + _held_out(points, fit)
        + "<h3>Cross-check by IsoFLOP parabolas</h3>"
        + "".join(f"<p{check_kind}>{escape(said)}</p>" for said in check)
        + _plot(plots, "isoflop")
        + _parabolas(fit)
        + "<h3>The runs</h3>"
        + _plot(plots, "residuals")
        + _runs(points, fit)
    )


def _plot(plots: Mapping[str, bytes], name: str) -> str:
    if name not in plots:
        return ""
    uri = f"data:image/png;base64,{base64.b64encode(plots[name]).decode()}"
    return f'<img class="plot" src="{uri}" alt="{_ALTS[name]}">'


def _parameters(fit: LossFit, k: int) -> list[list[str]]:
    intervals: list[Interval] = [*fit.parameters.values(), fit.a, fit.b]
    return [
        [escape(name), *(figure(f"{k}.{name.split(':')[0]}.{end}", getattr(interval, end), said) for end, said in ends)]
        for (name, *said), interval in zip(parameter_rows(fit), intervals, strict=True)
        for ends in [zip(("value", "low", "high"), said, strict=True)]
    ]


def _others(fit: LossFit) -> str:
    rows = [
        [number(answer.flops), escape(column), escape(with_ends(loss))]
        for answer in fit.answers
        for column, loss in answer.others.items()
    ]
    return (
        table(["budget, FLOPs", "loss", "expected"], rows, title="The other losses at that size and these tokens") if rows else ""
    )


def _held_out(points: Points, fit: LossFit) -> str:
    rows = [[escape(cell) for cell in row] for row in held_out_rows(points, fit)]
    return table(["run", "measured", "predicted", "error"], rows, title="Predicted by all other runs") if rows else ""


def _parabolas(fit: LossFit) -> str:
    rows = [
        [
            escape(each.budget.name),
            f"{len(each.budget.members)}",
            escape(with_ends(each.best)),
            "none" if each.best_of_law is None else number(each.best_of_law),
        ]
        for each in fit.check.parabolas
    ]
    head = ["budget", "runs", "best size", "of the law's own losses"]
    return table(head, rows, title="Lowest points of the parabolas, in parameters") if rows else ""


def _runs(points: Points, fit: LossFit) -> str:
    columns = (points.params_I, points.tokens_I, points.flops_I, fit.loss_I, fit.predicted_I)
    rows = [
        [escape(name), *(number(float(column[row])) for column in columns), f"{fit.residual_I[row]:+.3%}"]
        for row, name in enumerate(points.names)
    ]
    head = ["run", "parameters", "tokens", "FLOPs", "measured", "predicted", "residual"]
    return table(head, rows, title="In bold: far off the law", chosen=fit.far)
