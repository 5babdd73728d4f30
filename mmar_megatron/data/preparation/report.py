"""What was prepared: for the terminal, and as report.json beside the index."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmar_megatron.data.index import NO_LANGUAGE, SPLITS, Index, Split

REPORT_NAME = "report.json"
_WIDTH = 16


class Lengths(NamedTuple):
    """Tokens of texts."""

    mean: float
    most: int
    median: int
    most_of_95_percent: int
    texts: int

    @staticmethod
    def of(tokens: NDArray[Any]) -> Lengths:
        """Of a column."""
        median, high = np.percentile(tokens, (50, 95))
        return Lengths(float(tokens.mean()), int(tokens.max()), int(median), int(high), len(tokens))


@dataclass(kw_only=True)
class Report:
    """What was made."""

    directory: Path
    samples: dict[Split, int]
    dropped: dict[str, int]
    """By reason."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """By reason, the names of some."""
    pictures: int
    bytes: int
    text_tokens: int
    image_tokens: int
    vocab_size: int
    caption_tokens: dict[str, Lengths]
    """By language, tokens of a caption; "text": of a content sample."""
    seconds: float
    """Of the run that finished it."""
    resumed: bool = False
    """Whether an earlier run had done some of it; nothing is then said of pictures a second."""

    @staticmethod
    def of(directory: Path, *, index: Index, **rest: Any) -> Report:
        """What the index says, and the rest."""
        names = dict(enumerate(index.languages)) | {NO_LANGUAGE: "text"}
        codes = np.unique(index.text_language).tolist()
        pictures = int(index.images.sum(dtype=np.int64))
        return Report(
            directory=directory,
            samples={split: index.count(split) for split in SPLITS},
            pictures=pictures,
            bytes=sum(shard.bytes for shard in index.shards),
            text_tokens=int(index.text_tokens.sum(dtype=np.int64)),
            image_tokens=pictures * index.num_tokens,
            caption_tokens={names[code]: Lengths.of(index.text_tokens[index.text_language == code]) for code in codes},
            **rest,
        )

    def save(self, directory: Path) -> None:
        """Writes report.json."""
        content = {**asdict(self), "directory": str(self.directory)}
        content["caption_tokens"] = {language: lengths._asdict() for language, lengths in self.caption_tokens.items()}
        content["pictures_per_second"] = self._rate
        (directory / REPORT_NAME).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @property
    def _rate(self) -> float | None:
        return None if self.resumed else round(self.pictures / max(self.seconds, 1e-9), 1)

    def __str__(self) -> str:
        kept = ", ".join(f"{count:,} {split}" for split, count in self.samples.items())
        lines = [f"{self.directory}: {kept} in {self.seconds:.1f} s"]

        def say(name: str, value: str) -> None:
            lines.append(f"  {name:{_WIDTH}} {value}")

        say("dropped", ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items()) or "none")
        for reason, names in self.examples.items():
            say("", f"{reason}: {', '.join(names)}" + (" ..." if self.dropped.get(reason, 0) > len(names) else ""))
        say("pictures", f"{self.pictures:,}" + ("" if self._rate is None else f", {self._rate:,.0f} a second"))
        say("shards", f"{self.bytes / 1e6:,.1f} MB")
        say("vocabulary", f"{self.vocab_size:,}")
        say("tokens", f"{self.text_tokens:,} of text, {self.image_tokens:,} of images")
        for language, of in self.caption_tokens.items():
            what = "of a text" if language == "text" else f"of a caption, {language}"
            say("", f"{of.mean:.1f} {what} (median {of.median}, 95 % up to {of.most_of_95_percent}, at most {of.most:,})")
        return "\n".join(lines)
