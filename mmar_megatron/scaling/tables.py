"""Tables for a terminal, sizes and durations."""

from __future__ import annotations

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Rows with their columns aligned: the first `left` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if k < left else cell.rjust(width) for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def duration(seconds: float) -> str:
    """As a person says it, such as 1:02:03, or 2 d 3 h."""
    if seconds >= 48 * 3600:
        days, rest = divmod(round(seconds), 24 * 3600)
        return f"{days} d {rest // 3600} h"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(number: int) -> str:
    """Bytes as a person reads them."""
    return f"{number / 2**30:,.2f} GiB" if number >= 2**29 else f"{number / 2**20:,.1f} MiB"
