"""What is asked of a data set that is being prepared."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings that decide what the data set holds; resuming asks for the same."""

    image_size: int
    vocab_size: int
    """Of a tokenizer trained here."""
    validation: float = 0.01
    """Share of the records that is held out, by a hash."""
    min_size: int = 0
    """Pixels along the short side."""
    max_aspect: float | None = None
    """Long side by short side."""
    deduplicate: bool = True
    samples_per_shard: int = 4096
    text_tokens: int = 1024
    """Longer texts without pictures are cut into pieces."""
    keep_pictures: bool = True
    """Store pixels even where encoders make moments of them."""
    encoder_batch: int = 64
    """Pictures given to an encoder at a time. Sums are rounded by it, so it is of the recipe."""

    def check(self) -> None:
        """Raises ValueError where a value makes no sense."""
        if not 0 <= self.validation < 1:
            raise ValueError(f"--validation {self.validation} is not a share in [0, 1)")
        if self.max_aspect is not None and self.max_aspect < 1:
            raise ValueError(f"--max_aspect {self.max_aspect} is the long side by the short side: give at least 1")
        for name in ("image_size", "samples_per_shard", "text_tokens", "encoder_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} is not positive")

    @property
    def settings(self) -> dict[str, Any]:
        """As json."""
        return asdict(self)
