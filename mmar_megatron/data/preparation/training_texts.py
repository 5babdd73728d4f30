"""The texts that a tokenizer is trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator

from mmar_megatron.data.preparation.plan import Plan
from mmar_megatron.data.preparation.unfinished import Unfinished

MOST_RECORDS = 200_000
"""More teach a tokenizer nothing, and cost memory and minutes."""
_LONGEST = 1000
"""Characters of a piece: SentencePiece leaves out what is longer than 4,192 bytes."""


def training_texts(unfinished: Unfinished, plan: Plan) -> tuple[list[str], int, int]:
    """The texts of the training records, or of evenly spread ones; of how many records they are, and how many there are."""
    total = sum(shard.end - shard.begin for shard in plan.shards if shard.split == "train")
    used = min(total, MOST_RECORDS)
    texts = []
    for number, of_record in enumerate(_texts_of_records(unfinished, plan)):
        if (number + 1) * used // total > number * used // total:
            texts += [piece for text in of_record for piece in pieces(text)]
    return texts, used, total


def _texts_of_records(unfinished: Unfinished, plan: Plan) -> Iterator[list[str]]:
    for block, rows in plan.kept_rows("train"):
        wanted = set(rows)
        with (unfinished.looks / f"{block:06d}.texts").open(encoding="utf-8") as lines:
            yield from (json.loads(line) for row, line in enumerate(lines) if row in wanted)


def pieces(text: str) -> list[str]:
    """The text in pieces that SentencePiece takes."""
    return [text[begin : begin + _LONGEST] for begin in range(0, len(text), _LONGEST)]
