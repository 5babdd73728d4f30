"""What is said of a fit in words, the same on the terminal, in fit.json and on the page."""

from __future__ import annotations

from mmar_megatron.scaling.law.fitting import LossFit
from mmar_megatron.scaling.law.intervals import Interval
from mmar_megatron.scaling.law.points import Points

_DIFFERENT = 1.1
"""Factor between the largest and the smallest FLOPs for each parameter and token from which it is said."""
_MOST_NAMED = 6


def number(value: float) -> str:
    """Four digits: 0.3478, 482.0, 1.164e+20."""
    return f"{value:#.4g}"


def with_ends(interval: Interval | None) -> str:
    """value (low to high)."""
    if interval is None:
        return "not determined"
    return f"{number(interval.value)} ({number(interval.low)} to {number(interval.high)})"


def on_flops(points: Points) -> str:
    """Where the FLOPs come from."""
    if not points.flops_are_given:
        return "FLOPs are 6 N D, an approximation: there is no column `flops`."
    said = f"FLOPs are the column `flops`; a budget C is {number(points.flops_per_product)} N D"
    if points.flops_spread < _DIFFERENT:
        return f"{said}, as in the runs."
    return (
        f"{said}, a mean: between the runs this factor differs by {points.flops_spread:.2f}x, and best sizes are off accordingly."
    )


def on_search(fit: LossFit) -> str:
    """How sure the minimum is."""
    fitted = fit.fitted
    found = f"{fitted.agreeing} of {fitted.starts} starts ended at this minimum"
    return f"{found}." if fitted.converged else f"{found}; the optimiser did not settle there, so take these figures for a guess."


def on_far(points: Points, fit: LossFit) -> list[str]:
    """One sentence for each run far off the law."""
    said = []
    for row in fit.far[:_MOST_NAMED]:
        ratio = fit.loss_I[row] / fit.predicted_I[row]
        where = f"{ratio:.2f} times what the law expects" if abs(ratio - 1) > 0.2 else f"{ratio - 1:+.2%} off the law"
        kind = ", so it has probably diverged" if ratio > 1.2 else ""
        said.append(f"{points.names[row]} is {where}{kind}; its pull on the fit is bounded, but look at it.")
    if len(fit.far) > _MOST_NAMED:
        said.append(f"{len(fit.far) - _MOST_NAMED} more runs are far off the law; runs.csv has all residuals.")
    return said


def on_held_out(points: Points, fit: LossFit) -> str:
    """How the largest budget was predicted."""
    held = fit.held_out
    if isinstance(held, str):
        return f"The largest budget could not be held out: {held}."
    runs = "run" if len(held.rows) == 1 else f"{len(held.rows)} runs"
    largest = number(float(points.flops_I[list(held.rows)].max()))
    return (
        f"Held out: the {runs} of the largest budget (up to {largest} FLOPs), predicted by all others with a mean error of "
        f"{held.mean:.3%}. The law above is fitted to all runs, these too."
    )


def on_check(fit: LossFit) -> list[str]:
    """Whether parabolas and law agree."""
    check = fit.check
    skipped = [f"Left out of the cross-check: {'; '.join(check.skipped)}."] if check.skipped else []
    if not check.possible or check.ratio is None:
        return ["The cross-check by IsoFLOP parabolas is not possible: no budget has a usable parabola.", *skipped]
    budgets = f"{len(check.parabolas)} {'budget' if len(check.parabolas) == 1 else 'budgets'}"
    found = f"best sizes are {with_ends(check.ratio)} times those of the law's own parabolas at the same runs"
    if check.exponent is not None and check.difference is not None:
        found += (
            f", and grow as C^a with a = {with_ends(check.exponent)}, where the law's own parabolas give "
            f"{number(check.exponent_of_law or 0.0)} and the law {number(fit.a.value)}; difference {with_ends(check.difference)}"
        )
    where = f" (most clearly at {', '.join(check.differing)})" if check.differing else ""
    verdict = (
        "They agree."
        if check.agrees
        else f"THEY DISAGREE{where}: along the budgets the losses do not have the law's shape, so do not trust its best sizes."
    )
    said = [f"IsoFLOP parabolas of {budgets}: {found} (intervals of differences: 99.5 %). {verdict}"]
    bias = (check.exponent_of_law or fit.a.value) - fit.a.value
    if abs(bias) > 0.02:
        said.append(
            f"On this grid parabolas by themselves err: they find a = {number(fit.a.value + bias)} even of losses that follow a "
            f"law with a = {number(fit.a.value)}. So a plain fit of parabolas would mislead here."
        )
    return said + skipped


def all_remarks(points: Points, fit: LossFit) -> list[str]:
    """Everything, what is most urgent first."""
    return [
        *(f"{said}." for said in fit.undetermined),
        *on_far(points, fit),
        on_held_out(points, fit),
        *on_check(fit),
        on_search(fit),
        on_flops(points),
    ]
