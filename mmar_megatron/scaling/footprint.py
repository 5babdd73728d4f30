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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmar_megatron import parallel
from mmar_megatron.config import Config, TransformerConfig
from mmar_megatron.data.batch import Batch
from mmar_megatron.model.attention import MixedAttention
from mmar_megatron.model.image_geometry import ImageGeometry
from mmar_megatron.model.layer_specs import RMSNorm
from mmar_megatron.model.mmar_model import MMARModel, build_model


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
class Footprint:
    """Of one piece and one microbatch on one rank; bytes."""

    parameters: int
    """Their number."""
    row_parallel: int
    """Those of them whose gradients are summed over the tensor-parallel ranks, which see different rows."""
    saved: int
    """Kept from forward to backward, the piece's input included, and its output, but for the loss."""
    peak: int
    """Most that there is at a time in forward and backward, beside weights and the microbatch; `saved` is within."""
    batch: int
    """Of the microbatch itself."""
    traffic: Mapping[str, int]
    """Sent to other tensor-parallel ranks by each kind of collective, as rings do."""

    def times(self, microbatches: int) -> Footprint:
        """Of so many microbatches in one: all but the weights grows alike."""
        return Footprint(
            parameters=self.parameters,
            row_parallel=self.row_parallel,
            saved=self.saved * microbatches,
            peak=self.peak * microbatches,
            batch=self.batch * microbatches,
            traffic={kind: sent * microbatches for kind, sent in self.traffic.items()},
        )


def run_on_fake_tensors(
    config: Config, piece: Piece, *, microbatch: Microbatch, geometry: ImageGeometry, vocab_size: int
) -> Footprint:
    """Of a piece that is run as it is, all layers of it. Arguments as `footprint`'s."""
    ranks = config.parallel.tensor_model_parallel_size
    with _fake_piece(config, piece, geometry=geometry, vocab_size=vocab_size) as model:
        batch = fake_batch(microbatch, geometry=geometry, config=config)
        given = () if piece.first else (_hidden_states(config, microbatch).requires_grad_(),)
        of_batch = [tensor for f in fields(batch) if isinstance(tensor := getattr(batch, f.name), Tensor)]
        saved, watch = _Saved(model), _Watch(ranks=ranks, there=[*model.parameters(), *model.buffers(), *of_batch])
        with watch:
            with torch.autograd.graph.saved_tensors_hooks(saved.note, lambda tensor: tensor):
                model.set_input_tensor([*given] or [None])
                out = model(batch)
                if piece.last:
                    out = out.text + out.image + out.alignment
            if not piece.last:
                saved.note(out)  # megatron-core's schedules keep what they have sent until the gradient comes back
            out.backward(torch.ones_like(out))
        return Footprint(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            row_parallel=sum(p.numel() for p in model.parameters() if getattr(p, "sum_gradients_across_tp_domain", False)),
            saved=saved.bytes,
            peak=watch.peak + sum(tensor.nbytes for tensor in given),
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

    def __init__(self, model: nn.Module) -> None:
        self._of_model = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._sizes: dict[int, int] = {}

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._of_model:
            self._sizes[storage._cdata] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())


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
        self.peak = 0
        self._live = 0
        self._share = (ranks - 1) / ranks
        self._seen = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind, times, whole = self._RINGS[func._schema.name.removeprefix("c10d::")]
            self.sent[kind] += round(times * self._share * whole(args).nbytes)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        self._live += storage.nbytes()
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._live -= size
