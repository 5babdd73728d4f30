"""The effect of FP8 on a model as a table."""

from __future__ import annotations

from typing import Any

HEAD = ("format", "layers in bf16", "z error", "v error", "image loss", "text loss", "gradient: cosine", "error")


def effect_table(found: dict[str, Any]) -> str:
    """Markdown of what `measure_effect` found."""
    lines = [
        f"{found['checkpoint']}: {found['parameters']:,} parameters, {found['layers']} layers; {found['masked_tokens']:,} masked "
        f"tokens. In fp32 the image loss is {found['loss_image_fp32']:.5f}, the text loss {found['loss_text_fp32']:.5f}.",
        "",
        _row(*HEAD),
        _row("---", "---", *["---:"] * (len(HEAD) - 2)),
    ]
    for row in found["rows"]:
        losses = (f"{row[f'{kind} loss']:.5f} ({row[f'{kind} loss change']:+.2%})" for kind in ("image", "text"))
        numbers = (f"{row['z error']:.2%}", f"{row['v error']:.2%}", *losses)
        lines.append(
            _row(row["format"], row["layers in bf16"], *numbers, f"{row['gradient cosine']:.5f}", f"{row['gradient error']:.2%}")
        )
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
