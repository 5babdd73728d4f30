"""What a piece of the pipeline keeps and sends for one microbatch, found by running it: the very code that trains, forward and
backward, on fake tensors, which have shapes and no storage, in process groups that are only pretended.

What differs from a GPU: torch's attention and its norm for CPUs run here. The norm is given the form that it has on GPUs;
attention under an additive mask saves the same on both.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from types import MethodType
from typing import Any

import torch
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmar_megatron import parallel
from mmar_megatron.config import Config, TransformerConfig
from mmar_megatron.data.batch import Batch
from mmar_megatron.model.attention import MixedAttention
from mmar_megatron.model.image_geometry import ImageGeometry
from mmar_megatron.model.layer_specs import RMSNorm
from mmar_megatron.model.mmar_model import MMARModel, build_model

_PART_OF_LOSS = {"text_loss": "logits", "image_loss": "head_rows", "alignment_loss": "head_rows"}
"""Methods of the model, and under which part of `Activations` is counted what they make."""


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """What is in one microbatch."""

    sequences: int
    sequence_length: int
    images: int
    labels: int
    masked: int


@dataclass(frozen=True)
class Piece:
    """Layers that a rank runs at a time, and what it runs before and after them."""

    layers: int
    first: bool = True
    last: bool = True


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes, by what they are there for; those of several moments or pieces add up part by part."""

    layers: int = 0
    """With the embedding before them and EmbeddingViT: all that is neither of the others."""
    logits: int = 0
    """Of the rows with a label: hidden states, logits, probabilities, and gradients of these and of the output layer."""
    head_rows: int = 0
    """Of the image tokens to be learned, the same of PostProjector and diffusion head, and of the teacher's projector."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.layers + self.logits + self.head_rows

    def __add__(self, other: Activations) -> Activations:
        return Activations(**{part: own + getattr(other, part) for part, own in vars(self).items()})

    def __sub__(self, other: Activations) -> Activations:
        return Activations(**{part: own - getattr(other, part) for part, own in vars(self).items()})

    def times(self, number: float) -> Activations:
        """So many times as much, rounded to whole bytes."""
        return Activations(**{part: round(number * own) for part, own in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Of one piece and one microbatch on one rank; bytes."""

    parameters: int
    """Their number."""
    row_parallel: int
    """Those of them whose gradients are summed over the tensor-parallel ranks, which see different rows."""
    saved: Activations
    """Kept from forward to backward, the piece's input included, but not its output."""
    sent: int
    """The output that goes to the next piece; 0 of the last one."""
    peak: Activations
    """What there is beside weights and the microbatch when it is most, in forward or backward; `saved` is within."""
    batch: int
    """Of the microbatch itself."""
    traffic: Mapping[str, int]
    """Sent to other tensor-parallel ranks by each kind of collective, as rings do."""

    def times(self, microbatches: int) -> Footprint:
        """Of so many microbatches in one: all but the weights grows alike."""
        return Footprint(
            parameters=self.parameters,
            row_parallel=self.row_parallel,
            saved=self.saved.times(microbatches),
            sent=self.sent * microbatches,
            peak=self.peak.times(microbatches),
            batch=self.batch * microbatches,
            traffic={kind: sent * microbatches for kind, sent in self.traffic.items()},
        )

    def keeping_output(self) -> Footprint:
        """Where what is sent is kept until its gradient comes back."""
        output = Activations(layers=self.sent)
        return replace(self, saved=self.saved + output, peak=self.peak + output)


def run_on_fake_tensors(
    config: Config, piece: Piece, *, microbatch: Microbatch, geometry: ImageGeometry, vocab_size: int
) -> Footprint:
    """Of a piece that is run as it is, all layers of it. Arguments as `footprint`'s."""
    ranks = config.parallel.tensor_model_parallel_size
    with _fake_piece(config, piece, geometry=geometry, vocab_size=vocab_size) as model:
        batch = fake_batch(microbatch, geometry=geometry, config=config)
        given = () if piece.first else (_hidden_states(config, microbatch).requires_grad_(),)
        of_batch = [tensor for f in fields(batch) if isinstance(tensor := getattr(batch, f.name), Tensor)]
        watch = _Watch(ranks=ranks, there=[*model.parameters(), *model.buffers(), *of_batch])
        saved = _Saved(model, watch=watch)
        for loss, part in _PART_OF_LOSS.items():
            setattr(model, loss, watch.counting(part, getattr(model, loss)))
        with watch:
            with torch.autograd.graph.saved_tensors_hooks(saved.note, lambda tensor: tensor):
                model.set_input_tensor([*given] or [None])
                out = model(batch, return_hidden=piece.last)
                if piece.last:
                    out.register_hook(lambda gradient: watch.enter("layers"))
                    sums = model.losses(out, batch=batch)
                    out = sums.text + sums.image + sums.alignment
            sent = 0 if piece.last else out.nbytes
            edge, gradient = get_gradient_edge(out), partial(torch.ones, out.shape, dtype=out.dtype)
            del out  # as sent: it is let go of before its gradient comes
            torch.autograd.backward(edge, gradient())
        return Footprint(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            row_parallel=sum(p.numel() for p in model.parameters() if getattr(p, "sum_gradients_across_tp_domain", False)),
            saved=saved.bytes,
            sent=sent,
            peak=watch.peak + Activations(layers=sum(tensor.nbytes for tensor in given)),
            batch=sum(tensor.nbytes for tensor in of_batch),
            traffic=dict(watch.sent),
        )


@contextmanager
def _fake_piece(config: Config, piece: Piece, *, geometry: ImageGeometry, vocab_size: int) -> Iterator[MMARModel]:
    """The piece as the stage of a pipeline of up to three, each with so many layers."""
    stages = 3 - piece.first - piece.last
    layout = replace(
        config.parallel,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=None,
    )
    backbone = _of_pieces(config.model.backbone, stages=stages, layers=piece.layers)
    tensor_ranks = config.parallel.tensor_model_parallel_size
    groups = parallel.initialize_fake(layout, rank=0 if piece.first else tensor_ranks, world_size=stages * tensor_ranks)
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)  # whose states, which fake tensors lack, are never read
    try:
        with torch.device("meta"):
            (model,) = build_model(
                replace(config.model, backbone=backbone, attention="dense", head=replace(config.model.head, compile="off")),
                geometry=geometry,
                vocab_size=vocab_size,
                groups=groups,
                seed=0,
                draw_weights=False,
            )
        with FakeTensorMode():
            _make_fake(model)
            yield model
    finally:
        initialize_rng_tracker(force_reset=True)
        parallel.leave()


def _of_pieces(backbone: TransformerConfig, *, stages: int, layers: int) -> TransformerConfig:
    backbone = copy.copy(backbone)
    backbone.perform_initialization = False
    backbone.use_cpu_initialization = True
    # Transformer Engine's modules are not everywhere, and want a device; they keep about the same.
    backbone.transformer_impl, backbone.fp8 = "local", None
    backbone.num_layers = stages * layers
    backbone.pipeline_model_parallel_size = stages
    backbone.virtual_pipeline_model_parallel_size = None
    backbone.pipeline_model_parallel_layout = None
    backbone.pipeline_dtype = backbone.params_dtype
    return backbone


def _make_fake(model: nn.Module) -> None:
    """Parameters and buffers on the meta device become fake ones of a CPU; gradients are let go of at once, as engines do."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
                fake.__dict__.update(parameter.__dict__)  # megatron-core's marks
                fake.register_post_accumulate_grad_hook(_let_go)
                module._parameters[name] = fake
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        if isinstance(module, MixedAttention):
            module.as_on_gpus = True
        if isinstance(module, RMSNorm):
            module.forward = MethodType(_norm_as_on_gpus, module)  # type: ignore[method-assign]


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None


def _norm_as_on_gpus(norm: RMSNorm, x: Tensor) -> Tensor:
    return _FusedNorm.apply(x, norm.weight)


class _FusedNorm(torch.autograd.Function):
    """What torch's kernel for GPUs keeps: the input and one number for each row. That for CPUs keeps fp32 copies of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def fake_batch(microbatch: Microbatch, *, geometry: ImageGeometry, config: Config) -> Batch:
    """Of the microbatch's shape, with zeros in it: how much is to be learned counts, and where that is, is all one."""
    sequence = (microbatch.sequences, microbatch.sequence_length)
    image = (max(1, microbatch.images), geometry.grid_height * geometry.grid_width)
    levels, features = config.model.head.timestep_multiplier, config.model.alignment_features
    aligned = microbatch.images * image[1] - microbatch.masked if config.model.alignment_loss_weight > 0 else 0
    long = partial(torch.zeros, dtype=torch.int64)
    return Batch(
        tokens_BS=long(sequence),
        labels_BS=long(sequence),
        position_ids_BS=long(sequence),
        document_ids_BS=long(sequence),
        span_ids_BS=long(sequence),
        latents_MNC=torch.zeros((*image, geometry.channels)),
        image_positions_MN=long(image),
        visible_MN=torch.zeros(image, dtype=torch.bool),
        masked_MN=torch.zeros(image, dtype=torch.bool),
        timesteps_MNR=torch.zeros((*image, levels)),
        noise_MNRC=torch.zeros((*image, levels, geometry.channels)),
        teacher_MNF=torch.zeros((*image, features)) if config.model.alignment_loss_weight > 0 else None,
        sample_ids_BK=long((microbatch.sequences, 1)),
        labelled_L=long(microbatch.labels),
        masked_P=long(microbatch.masked),
        aligned_V=long(aligned),
    )


def _hidden_states(config: Config, microbatch: Microbatch) -> Tensor:
    """What the stage before sends."""
    backbone, layout = config.model.backbone, config.parallel
    positions = microbatch.sequence_length // (layout.tensor_model_parallel_size if layout.sequence_parallel else 1)
    return torch.zeros((positions, microbatch.sequences, backbone.hidden_size), dtype=backbone.params_dtype)


class _Saved:
    """Bytes that autograd keeps, each storage once, without parameters."""

    def __init__(self, model: nn.Module, *, watch: _Watch) -> None:
        self._of_model = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._watch = watch
        self._sizes: dict[int, tuple[str, int]] = {}

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._of_model:
            self._sizes[storage._cdata] = self._watch.part_of(storage), storage.nbytes()
        return tensor

    @property
    def bytes(self) -> Activations:
        sums: Counter[str] = Counter()
        for part, size in self._sizes.values():
            sums[part] += size
        return Activations(**sums)


class _Watch(TorchDispatchMode):
    """Of all operations within: the most bytes that were there at a time of what they made, and what collectives sent.

    A ring of t ranks sends (t - 1) / t of what is gathered or scattered; an all-reduce is both.
    """

    _RINGS: Mapping[str, tuple[str, int, Callable[[tuple[Any, ...]], Tensor]]] = {
        "allreduce_": ("all-reduce", 2, lambda args: args[0][0]),
        "_allgather_base_": ("all-gather", 1, lambda args: args[0]),
        "_reduce_scatter_base_": ("reduce-scatter", 1, lambda args: args[1]),
    }

    def __init__(self, *, ranks: int, there: Sequence[Tensor]) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self.peak = Activations()
        self._part = "layers"
        self._live: Counter[str] = Counter()
        self._share = (ranks - 1) / ranks
        self._parts: dict[int, str] = {tensor.untyped_storage()._cdata: "layers" for tensor in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind, times, whole = self._RINGS[func._schema.name.removeprefix("c10d::")]
            self.sent[kind] += round(times * self._share * whole(args).nbytes)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def counting(self, part: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        """The same function; what it makes, and what its backward pass makes, is of this part.

        Autograd runs what was computed last first, so that it comes to all of one function before it comes to what was computed
        earlier, which has a hook of its own or is entered by the caller's.
        """

        def computed(*args: Any, **kwargs: Any) -> Any:
            self.enter(part)
            out = compute(*args, **kwargs)
            self.enter("layers")
            for tensor in tree_leaves(out):
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self.enter(part))
            return out

        return computed

    def enter(self, part: str) -> None:
        """From here on."""
        self._part = part

    def part_of(self, storage: torch.UntypedStorage) -> str:
        """That it was made for; what was there before is of the layers."""
        return self._parts.get(storage._cdata, "layers")

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._parts:
            return
        self._parts[storage._cdata] = part = self._part
        self._live[part] += storage.nbytes()
        if self._live.total() > self.peak.total:
            self.peak = Activations(**self._live)
        weakref.finalize(storage, self._gone, storage._cdata, part, storage.nbytes())

    def _gone(self, key: int, part: str, size: int) -> None:
        del self._parts[key]
        self._live[part] -= size
