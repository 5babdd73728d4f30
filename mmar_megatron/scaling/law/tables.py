"""A fit as text, as json and as a table of the runs."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from mmar_megatron.scaling.law.fitting import PARAMETERS, Answer, LossFit
from mmar_megatron.scaling.law.intervals import LEVEL, Interval
from mmar_megatron.scaling.law.points import Points
from mmar_megatron.scaling.law.remarks import all_remarks, number, with_ends

HEADS_OF_ANSWERS = ("budget, FLOPs", "parameters", "tokens", "tokens a parameter", "loss")


def parameter_rows(fit: LossFit) -> list[tuple[str, str, str, str]]:
    """Name, value, low, high: of the law, and of the best use of compute."""
    intervals: dict[str, Interval] = {**fit.parameters, "a: best N ~ C^a": fit.a, "b: best D ~ C^b": fit.b}
    return [(name, number(each.value), number(each.low), number(each.high)) for name, each in intervals.items()]


def answer_row(answer: Answer) -> tuple[str, ...]:
    """In the order of HEADS_OF_ANSWERS."""
    best = (answer.params, answer.tokens, answer.tokens_per_param, answer.loss)
    return (number(answer.flops), *map(with_ends, best))


def held_out_rows(points: Points, fit: LossFit) -> list[tuple[str, str, str, str]]:
    """Run, measured, predicted, error; none where nothing was held out."""
    held = fit.held_out
    if isinstance(held, str):
        return []
    return [
        (points.names[row], number(fit.loss_I[row]), number(predicted), f"{error:+.3%}")
        for row, predicted, error in zip(held.rows, held.predicted, held.errors, strict=True)
    ]


def as_text(points: Points, fits: Sequence[LossFit]) -> str:
    """For the terminal and table.txt."""
    return "\n\n".join("\n".join(_text(points, fit)) for fit in fits) + "\n"


def _text(points: Points, fit: LossFit) -> list[str]:
    lines = [
        f"{fit.column}: {len(points.names)} runs, L = E + A / N^alpha + B / D^beta, {100 * LEVEL:.0f} % intervals from "
        f"{len(fit.samples.alpha):,} resamples",
        *_columns([("", "value", "low", "high"), *parameter_rows(fit)]),
        "",
    ]
    if held := held_out_rows(points, fit):
        lines += [*_columns([("the largest budget, held out", "measured", "predicted", "error"), *held]), ""]
    lines += _columns([HEADS_OF_ANSWERS, *map(answer_row, fit.answers)])
    for answer in fit.answers:
        lines += [
            f"  there, at {number(answer.flops)} FLOPs, {column} is {with_ends(loss)}" for column, loss in answer.others.items()
        ]
    lines += [f"  a single run scatters by {fit.scatter:.2%} about its expected loss", ""]
    return lines + [f"  {said}" for said in all_remarks(points, fit)]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))])
        for first, *rest in rows
    ]


def as_json(points: Points, fits: Sequence[LossFit], *, source: str) -> dict[str, Any]:
    """By loss; the five numbers of the law stand first."""
    return {fit.column: _json(points, fit, source=source) for fit in fits}


def _json(points: Points, fit: LossFit, *, source: str) -> dict[str, Any]:
    check, held = fit.check, fit.held_out
    return {
        **{name: fit.parameters[name].as_dict() for name in PARAMETERS},
        "a": fit.a.as_dict(),
        "b": fit.b.as_dict(),
        "level": LEVEL,
        "undetermined": list(fit.undetermined),
        "answers": [_answer(answer) for answer in fit.answers],
        "held_out": held
        if isinstance(held, str)
        else {
            "runs": [points.names[row] for row in held.rows],
            "predicted": list(held.predicted),
            "errors": list(held.errors),
            "mean_error": held.mean,
        },
        "isoflop": {
            "agrees": check.agrees if check.possible else None,
            "a": _optional(check.exponent),
            "a_of_law": check.exponent_of_law,
            "difference": _optional(check.difference),
            "size_ratio": _optional(check.ratio),
            "budgets": [
                {"name": each.budget.name, "flops": each.budget.flops, "runs": len(each.budget.members)}
                | {"best_params": _optional(each.best), "best_params_of_law": each.best_of_law}
                for each in check.parabolas
            ],
            "left_out": list(check.skipped),
        },
        "scatter": fit.scatter,
        "far_off": {points.names[row]: float(fit.residual_I[row]) for row in fit.far},
        "flops": "column" if points.flops_are_given else "6 N D",
        "flops_per_param_and_token": points.flops_per_product,
        "runs": len(points.names),
        "resamples": len(fit.samples.alpha),
        "starts": fit.fitted.starts,
        "starts_agreeing": fit.fitted.agreeing,
        "converged": fit.fitted.converged,
        "source": source,
        "remarks": all_remarks(points, fit),
    }


def _answer(answer: Answer) -> dict[str, Any]:
    return {
        "flops": answer.flops,
        "n_params": _optional(answer.params),
        "n_tokens": _optional(answer.tokens),
        "tokens_per_param": _optional(answer.tokens_per_param),
        "loss": _optional(answer.loss),
        "other_losses": _optionals(answer.others),
    }


def _optional(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else interval.as_dict()


def _optionals(intervals: Mapping[str, Interval | None]) -> dict[str, dict[str, float] | None]:
    return {name: _optional(interval) for name, interval in intervals.items()}


def as_csv(points: Points, fits: Sequence[LossFit]) -> str:
    """The runs, and of each loss what was measured, what the law says, and the relative residual."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    heads = [head for fit in fits for head in (fit.column, f"{fit.column}_predicted", f"{fit.column}_residual")]
    writer.writerow(["run", "n_params", "n_tokens", "flops", *heads])
    for row, name in enumerate(points.names):
        figures = [each[row] for fit in fits for each in (fit.loss_I, fit.predicted_I, fit.residual_I)]
        own = (points.params_I[row], points.tokens_I[row], points.flops_I[row])
        writer.writerow([name, *(f"{float(value):.10g}" for value in (*own, *figures))])
    return file.getvalue()
