"""Rows of a result for people to read."""

from __future__ import annotations

import sys
from typing import Any


def show(found: dict[str, Any]) -> dict[str, Any]:
    """The same, with its `rows` as a Markdown table, and what was skipped and why, on standard error."""
    rows = found["rows"]
    table = [[*rows[0]], ["---"] * len(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    lines += [f"{name} is left out: {reason}" for name, reason in found.get("skipped", {}).items()]
    print("\n".join(lines), file=sys.stderr)
    return found


def _cell(value: object) -> str:
    if isinstance(value, list):
        return " to ".join(map(_cell, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
