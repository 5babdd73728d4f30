"""What each part of a training step takes, by marks in the device's work: one process computes one part after the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from mmar_megatron import platform
from mmar_megatron.benchmarks.timing import WARM_UP, median
from mmar_megatron.data.batch import Batch
from mmar_megatron.engine.native import NativeEngine

PARTS = ("embedding", "backbone", "logits", "head", "reduction", "optimizer", "rest")


def measure_parts(
    engine: NativeEngine, microbatches: Sequence[Batch], *, learning_rate: float, rounds: int
) -> list[dict[str, Any]]:
    """Seconds of each of `PARTS` and its share of the step, medians. The engine, of one process, keeps the marks.

    `embedding` is EmbeddingViT with its projector, and the words; the cross-entropy is counted to `logits`, PostProjector and the
    noise process to `head`, to `optimizer` all that follows the reduction of gradients, to `rest` moving data to the device.
    """
    watch = _Watch(engine)
    of_rounds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    shares: dict[str, list[float]] = defaultdict(list)
    for number in range(-WARM_UP, rounds):
        start = platform.mark()
        engine.train_step(microbatches, learning_rate=learning_rate)
        end = platform.mark()
        platform.synchronize()
        found = watch.read(start, end)
        if number >= 0:
            for part, seconds in found.items():
                of_rounds[part].append(seconds)
                shares[part].append(sum(seconds) / platform.seconds_between(start, end))
    return [
        {
            "part": part,
            "forward_s": median([forward for forward, _ in of_rounds[part]]),
            "backward_s": median([backward for _, backward in of_rounds[part]]),
            "share": round(median(shares[part]), 4),
        }
        for part in PARTS
    ]


class _Watch:
    """Sets marks where a part begins and ends: forward where it is called, backward where its output's and input's gradients
    are known. What needs no gradient of its input, the embedding, ends where the next forward pass or the reduction begins."""

    def __init__(self, engine: NativeEngine) -> None:
        model = engine.last_stage
        assert model is not None
        self._spans: list[tuple[str, int, Any, Any]] = []
        self._open: list[tuple[str, Any]] = []
        model.embedding.forward = self._watched("embedding", model.embedding.forward)  # type: ignore[method-assign]
        model.decoder.forward = self._watched("backbone", model.decoder.forward)
        model.text_errors = self._watched("logits", model.text_errors)  # type: ignore[method-assign]
        model.image_errors = self._watched("head", model.image_errors)  # type: ignore[method-assign]
        self._finalize = engine.backbone.finalize_model_grads_func
        engine.backbone.finalize_model_grads_func = self._reduce

    def read(self, start: Any, end: Any) -> dict[str, tuple[float, float]]:
        """Of the step between these marks: seconds forward and backward of each part; and forgets them."""
        found = {part: [0.0, 0.0] for part in PARTS}
        for part, direction, begun, ended in [*self._spans, ("optimizer", 0, self._reduced, end)]:
            found[part][direction] += platform.seconds_between(begun, ended)
        found["rest"][0] = platform.seconds_between(start, end) - sum(map(sum, found.values()))
        self._spans.clear()
        return {part: (forward, backward) for part, (forward, backward) in found.items()}

    def _watched(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            begun = platform.mark()
            self._end_all(begun)
            output = function(*args, **kwargs)
            self._spans.append((part, 0, begun, platform.mark()))
            result: Tensor = output[0] if isinstance(output, tuple) else output
            inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
            backward: list[Any] = []

            def begin(gradient: Tensor) -> None:
                backward.append(platform.mark())
                if not inputs:
                    self._open.append((part, backward[0]))

            def finish(gradient: Tensor) -> None:
                self._spans.append((part, 1, backward[0], platform.mark()))

            result.register_hook(begin)
            if inputs:
                inputs[0].register_hook(finish)
            return output

        return run

    def _end_all(self, now: Any) -> None:
        self._spans += [(part, 1, opened, now) for part, opened in self._open]
        self._open.clear()

    def _reduce(self, *args: Any, **kwargs: Any) -> None:
        begun = platform.mark()
        self._end_all(begun)
        self._finalize(*args, **kwargs)
        self._reduced = platform.mark()
        self._spans.append(("reduction", 0, begun, self._reduced))
