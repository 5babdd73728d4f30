"""Contradictions in a configuration, each refused in one sentence with the fix, before anything is built."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

if TYPE_CHECKING:
    from mmar_megatron.config import Config

DEFAULT_PATCH_SIZE = {"patch": 4, "vae": 1}
"""Of `data.codec`, by its kind."""
AT_LEAST_ONE = (
    *("model.backbone.num_layers", "model.backbone.hidden_size", "model.backbone.num_attention_heads"),
    *("model.make_vocab_size_divisible_by", "model.embedding_vit.num_layers", "model.embedding_vit.hidden_size"),
    *("model.embedding_vit.num_attention_heads", "model.head.depth", "model.head.width", "model.head.timestep_multiplier"),
    "model.head.row_multiple",
    *("model.diffusion.num_timesteps", "data.codec.image_size", "data.sequence_length"),
    *("parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size", "parallel.context_parallel_size"),
    *("train.steps", "train.micro_batch_size", "train.global_batch_size", "train.log_every"),
    "train.spike_window",
    *("validation.samples", "validation.timesteps", "preview.images", "preview.rounds", "preview.sampling_steps"),
    *("checkpoint.max_in_flight", "data.packing_window", "data.shuffle_block", "data.shuffle_pool"),
)
NOT_NEGATIVE = (
    *("data.read_ahead", "data.cache_gb"),
    *("seed", "data.num_workers", "validation.every", "preview.every", "checkpoint.every", "model.alignment_loss_weight"),
    *("checkpoint.keep_last", "checkpoint.keep_every"),
    *("train.max_bad_steps", "train.spike_zscore", "train.hang_timeout_s"),
    *("optimizer.lr", "optimizer.min_lr", "optimizer.warmup_steps", "optimizer.weight_decay", "optimizer.clip_grad"),
)
SHARES = (
    "data.mask_ratio.minimum",
    "data.caption_dropout",
    "data.horizontal_flip",
    "data.max_bad_fraction",
    "optimizer.ema_decay",
)
NOT_EMPTY = ("data.languages", "validation.mask_ratios")
NOT_OURS = {
    "normalization": ("RMSNorm", "the backbone's norm is RMSNorm"),
    "rotary_interleaved": (False, "the rotary embedding turns halves, as in Llama"),
    "window_size": (None, "attention reaches over the whole sequence"),
    "num_moe_experts": (None, "the backbone is dense"),
    "multi_latent_attention": (False, "attention is grouped-query attention"),
    "cross_entropy_fusion_impl": ("native", "the fused cross-entropy is megatron-core's own"),
    "fp8_dot_product_attention": (False, "FP8 is for matrix products with weights"),
    "fp8_multi_head_attention": (False, "FP8 is for matrix products with weights"),
}
"""Fields of megatron-core's that would be ignored, and what holds in their place."""
OTHER_SPLITS = (
    *("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage", "pipeline_model_parallel_layout"),
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
)
"""Fields of megatron-core's that say what `parallel.pipeline_split` says too."""

SPARED_LAYERS = {"num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 0}
"""Layers of the backbone that stay in bf16 under FP8, unless something else is asked for."""
FP8_MULTIPLE = 16
"""Of both sides of each matrix, which Transformer Engine's FP8 kernels ask for."""
FP8_BLOCK = 128
"""Of what is gathered over tensor-parallel ranks in blocks with scales of their own: whole blocks."""


def validate(cfg: Namespace) -> None:
    """Refuse what contradicts itself or cannot be built.

    Raises:
        ValueError: with the option and the fix.
    """
    _check_ranges(cfg)
    _check_model(cfg)
    _check_layout(cfg)
    _check_pipeline(cfg)
    _check_recomputation(cfg)
    _check_data(cfg)
    _check_precision(cfg)
    if cfg.engine == "deepspeed":
        _check_deepspeed(cfg)
    _check_profile(cfg.train)
    _divides(cfg, "train.global_batch_size", "train.micro_batch_size")
    _require(
        cfg.checkpoint.init_from is None or cfg.resume in ("auto", "never"),
        "checkpoint.init_from starts anew from weights alone, resume continues a run: give one of them.",
    )
    _require(cfg.optimizer.ema_decay < 1, "optimizer.ema_decay 1 would average nothing: lower it.")
    _require(
        cfg.checkpoint.keep_last > 0 or cfg.checkpoint.keep_every == 0,
        "checkpoint.keep_every spares checkpoints from checkpoint.keep_last, which is 0 and deletes none: set that too.",
    )
    _require(
        cfg.checkpoint.init_from or not cfg.checkpoint.init_from_average,
        "checkpoint.init_from_average needs checkpoint.init_from: give that too.",
    )


def _check_profile(train: Namespace) -> None:
    if train.profile is None:
        return
    written = re.fullmatch(r"(\d+):(\d+)", train.profile, flags=re.ASCII)
    _require(written, f"train.profile {train.profile} is not of the form A:B: give the first and the last step to profile.")
    assert written is not None
    first, last = map(int, written.groups())
    _require(
        1 <= first <= last <= train.steps,
        f"train.profile {train.profile} is not a range of the steps 1 to {train.steps} of the run: change it, or train.steps.",
    )


def _check_deepspeed(cfg: Namespace) -> None:
    stage, parallel = cfg.deepspeed.zero_stage, cfg.parallel
    _require(
        parallel.pipeline_model_parallel_size == 1,
        "engine deepspeed has no pipeline: set parallel.pipeline_model_parallel_size 1, or use the engine native.",
    )
    for option in ("overlap_grad_reduce", "overlap_param_gather"):
        _require(not parallel[option], f"parallel.{option} is megatron-core's: leave it out with engine deepspeed.")
    # Its own loop would not tell Transformer Engine's layers when weights have changed.
    _require(
        cfg.model.backbone.transformer_impl == "local",
        "engine deepspeed trains megatron-core's own layers: set model.backbone.transformer_impl local, or engine native.",
    )
    _require(
        cfg.optimizer.ema_decay == 0,
        "engine deepspeed keeps no moving average of the weights: set optimizer.ema_decay 0, or use the engine native.",
    )
    _require(
        stage > 1 or cfg.precision.dtype == "fp32",
        f"deepspeed.zero_stage {stage} with bf16 runs through optimizers of DeepSpeed's that do not train as the others do: use "
        "stage 2 or 3, or precision.dtype fp32.",
    )
    _require(
        stage > 0 or not cfg.deepspeed.offload_optimizer,
        "deepspeed.offload_optimizer needs a zero_stage of 1 or more: raise it.",
    )
    _require(stage == 3 or not cfg.deepspeed.offload_parameters, "deepspeed.offload_parameters needs zero_stage 3: raise it.")


def _require(condition: Any, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _divides(cfg: Namespace, larger: str, smaller: str) -> None:
    _require(
        cfg[larger] % cfg[smaller] == 0,
        f"{larger} {cfg[larger]} is not divisible by {smaller} {cfg[smaller]}: change one of them.",
    )


def _check_ranges(cfg: Namespace) -> None:
    for option in AT_LEAST_ONE:
        _require((cfg[option] or 0) >= 1, f"{option} is {cfg[option]}: it must be at least 1.")
    for option in NOT_NEGATIVE:
        _require(cfg[option] >= 0, f"{option} is {cfg[option]}: it must not be negative.")
    for option in SHARES:
        _require(0 <= cfg[option] <= 1, f"{option} is {cfg[option]}: it is a share, between 0 and 1.")
    for option in NOT_EMPTY:
        _require(cfg[option], f"{option} is empty: give at least one.")
    for name, (ours, reason) in NOT_OURS.items():
        _require(cfg.model.backbone[name] == ours, f"model.backbone.{name} would be ignored, for {reason}: leave it out.")


def _check_model(cfg: Namespace) -> None:
    model, backbone = cfg.model, cfg.model.backbone
    if backbone.num_query_groups is not None:
        _divides(cfg, "model.backbone.num_attention_heads", "model.backbone.num_query_groups")
    if backbone.kv_channels is None:
        _divides(cfg, "model.backbone.hidden_size", "model.backbone.num_attention_heads")
    width = backbone.kv_channels or backbone.hidden_size // backbone.num_attention_heads
    _require(
        width % 2 == 0,
        f"A head is {width} channels wide, which the rotary embedding cannot halve: change model.backbone.kv_channels.",
    )
    if model.attention == "flex":
        _check_flex(backbone, width=width)
    _require(
        model.head.compile != "graphs" or model.head.row_multiple > 1,
        "model.head.compile graphs wants few numbers of rows: give model.head.row_multiple, such as an eighth of a microbatch's "
        "image tokens.",
    )
    _divides(cfg, "model.embedding_vit.hidden_size", "model.embedding_vit.num_attention_heads")
    _require(
        model.alignment_loss_weight == 0 or model.alignment_features > 0,
        "model.alignment_loss_weight is not 0: give model.alignment_features, the width of the teacher's features.",
    )
    rotary = model.rotary_scaling
    _require(rotary.factor > 0, f"model.rotary_scaling.factor is {rotary.factor}: it must be above 0.")
    _require(
        0 < rotary.low_freq_factor < rotary.high_freq_factor,
        f"model.rotary_scaling.low_freq_factor {rotary.low_freq_factor} must be above 0 and below high_freq_factor "
        f"{rotary.high_freq_factor}: change one of them.",
    )
    _require(
        cfg.preview.sampling_steps <= model.diffusion.num_timesteps,
        f"preview.sampling_steps {cfg.preview.sampling_steps} is more than the model.diffusion.num_timesteps "
        f"{model.diffusion.num_timesteps} there are: lower it.",
    )


def _check_flex(backbone: Namespace, *, width: int) -> None:
    _require(
        backbone.attention_dropout == 0,
        "model.attention flex knows no dropout: set model.backbone.attention_dropout 0, or model.attention dense.",
    )
    _require(
        width >= 16,
        f"model.attention flex takes heads of at least 16 channels, and they have {width}: change model.backbone.kv_channels, or "
        "set model.attention dense.",
    )


def _check_precision(cfg: Namespace) -> None:
    backbone, fp8 = cfg.model.backbone, cfg.precision.fp8
    _require(
        backbone.transformer_impl in ("local", "transformer_engine"),
        f"model.backbone.transformer_impl {backbone.transformer_impl} is for serving: set local or transformer_engine.",
    )
    _require(
        not backbone.cross_entropy_loss_fusion or cfg.precision.dtype == "bf16",
        "model.backbone.cross_entropy_loss_fusion rounds gradients to bf16: leave it out, or set precision.dtype bf16.",
    )
    _require(
        not backbone.tp_comm_overlap or (backbone.transformer_impl == "transformer_engine" and cfg.parallel.sequence_parallel),
        "model.backbone.tp_comm_overlap is of Transformer Engine's layers under sequence parallelism: set "
        "model.backbone.transformer_impl transformer_engine and parallel.sequence_parallel true, or leave it out.",
    )
    for option in ("fp8_param", "fp4"):
        _require(not backbone[option], f"model.backbone.{option} is not for these weights, which stay in bf16: leave it out.")
    if fp8 == "off":
        _require(
            not backbone.first_last_layers_bf16,
            "model.backbone.first_last_layers_bf16 spares layers from FP8, and precision.fp8 is off: leave it out.",
        )
        return
    _require(
        backbone.transformer_impl == "transformer_engine",
        f"precision.fp8 {fp8} is for Transformer Engine's layers: set model.backbone.transformer_impl transformer_engine.",
    )
    _require(cfg.precision.dtype == "bf16", f"precision.fp8 {fp8} is for bf16 weights: set precision.dtype bf16.")
    _require(
        fp8 != "delayed" or not backbone.first_last_layers_bf16,
        "precision.fp8 delayed is for all layers: leave out model.backbone.first_last_layers_bf16, or set fp8 tensorwise.",
    )
    _check_spared_layers(cfg)
    misfit = fp8_misfit(cfg)
    _require(misfit is None, misfit or "")


def _check_spared_layers(cfg: Namespace) -> None:
    backbone, stages = cfg.model.backbone, cfg.parallel.pipeline_model_parallel_size
    most = backbone.num_layers // stages
    for option, default in SPARED_LAYERS.items():
        count = backbone[option]
        _require(
            cfg.precision.fp8 != "delayed" or count == default,
            f"precision.fp8 delayed is for all layers: leave out model.backbone.{option}, or set fp8 tensorwise.",
        )
        # megatron-core compares with an even split, whatever the split is.
        _require(
            0 <= count <= most,
            f"model.backbone.{option} {count} must be 0 to {most}, as megatron-core takes no more than {backbone.num_layers} "
            f"layers over {stages} pipeline stages are: change it.",
        )


def fp8_misfit(cfg: Namespace | Config) -> str | None:
    """Why Transformer Engine's FP8 kernels cannot multiply the matrices of this layout, if they cannot."""
    for what, size, multiple, option in _fp8_sides(cfg):
        if size % multiple:
            sides = f"matrices with sides here in multiples of {multiple}"
            return f"precision.fp8 {cfg.precision.fp8} wants {sides}, and {what} {size}: change {option}."
    return None


def _fp8_sides(cfg: Namespace | Config) -> Iterator[tuple[str, int, int, str]]:
    """Of the matrices that one rank multiplies in a layer: what is, how many, a multiple of what, the option that changes it."""
    backbone, parallel = cfg.model.backbone, cfg.parallel
    ranks = parallel.tensor_model_parallel_size
    on_each = f" on each of {ranks} tensor-parallel ranks" if ranks > 1 else ""
    heads, groups = backbone.num_attention_heads, backbone.num_query_groups or backbone.num_attention_heads
    channels = backbone.kv_channels or backbone.hidden_size // heads
    ffn = 4 * backbone.hidden_size if backbone.ffn_hidden_size is None else backbone.ffn_hidden_size
    positions, of_positions = (
        cfg.train.micro_batch_size * cfg.data.sequence_length,
        "train.micro_batch_size or data.sequence_length",
    )
    gathered = FP8_BLOCK if parallel.sequence_parallel and cfg.precision.fp8 == "blockwise" else FP8_MULTIPLE
    yield "the hidden size is", backbone.hidden_size, gathered, "model.backbone.hidden_size"
    for what, size, option in (
        ("the heads' channels", heads * channels, "model.backbone.kv_channels"),
        ("queries, keys and values", (heads + 2 * groups) * channels, "model.backbone.kv_channels"),
        ("the feed-forward size's channels", ffn, "model.backbone.ffn_hidden_size"),
    ):
        yield f"{what}{on_each} are", size // ranks, FP8_MULTIPLE, option
    if parallel.sequence_parallel:
        yield f"the positions of a microbatch{on_each} are", positions // ranks, gathered, of_positions
    else:
        yield "the positions of a microbatch are", positions, gathered, of_positions


def _check_layout(cfg: Namespace) -> None:
    parallel, backbone = cfg.parallel, cfg.model.backbone
    tensor = "parallel.tensor_model_parallel_size"
    _divides(cfg, "model.backbone.num_attention_heads", tensor)
    if backbone.num_query_groups is not None:
        _divides(cfg, "model.backbone.num_query_groups", tensor)
    _divides(cfg, "model.make_vocab_size_divisible_by", tensor)
    if parallel.sequence_parallel:
        _require(cfg[tensor] > 1, f"parallel.sequence_parallel shards over {tensor} 1: switch it off, or raise that.")
        _divides(cfg, "data.sequence_length", tensor)
    _require(
        parallel.context_parallel_size == 1,
        "Context parallelism does not know the mixed attention mask: set parallel.context_parallel_size to 1, and for long "
        "sequences use parallel.sequence_parallel with tensor parallelism, and recomputation.",
    )
    _require(
        not parallel.overlap_param_gather or parallel.overlap_grad_reduce,
        "parallel.overlap_param_gather needs parallel.overlap_grad_reduce: switch that on too.",
    )


def _check_pipeline(cfg: Namespace) -> None:
    parallel, backbone = cfg.parallel, cfg.model.backbone
    chunks, split = parallel.virtual_pipeline_model_parallel_size, parallel.pipeline_split
    if chunks is not None:
        _require(
            parallel.pipeline_model_parallel_size > 1 and chunks > 1,
            "The interleaved schedule needs parallel.pipeline_model_parallel_size and virtual_pipeline_model_parallel_size "
            "above 1: raise them, or leave out the latter.",
        )
        # megatron-core 0.16.1 does not check this, and its results are silently wrong.
        _require(parallel.overlap_p2p_comm, "The interleaved schedule needs parallel.overlap_p2p_comm: switch it on.")
    pieces, layers = parallel.pipeline_model_parallel_size * (chunks or 1), backbone.num_layers
    others = [name for name in OTHER_SPLITS if backbone[name]]
    if split == "even":
        _require(
            others or layers % pieces == 0,
            f"model.backbone.num_layers {layers} is not divisible by the {pieces} pieces of the pipeline: "
            "change one of them, or set parallel.pipeline_split to auto.",
        )
        return
    _require(
        not others,
        f"parallel.pipeline_split and model.backbone.{''.join(others[:1])} both divide the layers: leave out one of them.",
    )
    _require(
        pieces <= layers,
        f"The {pieces} pieces of the pipeline are more than model.backbone.num_layers {layers}: use fewer stages or chunks.",
    )
    if split != "auto":
        _require(
            len(split) == pieces and min(split) >= 0 and sum(split) == layers,
            f"parallel.pipeline_split {split} must be {pieces} numbers (one for each piece of the pipeline), none negative, that "
            f"add up to model.backbone.num_layers {layers}: change it.",
        )
        # Its chunk would have no parameters, and megatron-core's checkpoints would lose it.
        _require(
            all(split[1:-1]),
            f"parallel.pipeline_split {split} leaves a piece empty: only the first and the last may have no layers, change it.",
        )


def _check_recomputation(cfg: Namespace) -> None:
    """megatron-core finds out in the first step, and says that an index is out of range."""
    parallel, backbone = cfg.parallel, cfg.model.backbone
    if backbone.recompute_granularity != "full" or backbone.recompute_method != "uniform" or not backbone.recompute_num_layers:
        return
    together, layers, split = backbone.recompute_num_layers, backbone.num_layers, parallel.pipeline_split
    pieces = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    if split == "auto" and pieces > 1:
        fits = together == 1
    else:
        fits = all(of_piece % together == 0 for of_piece in ([layers // pieces] if isinstance(split, str) else split))
    _require(
        fits,
        f"model.backbone.recompute_num_layers {together} must divide the layers of each piece of the pipeline (of pipeline_split "
        "auto, only 1 does for certain): change it, or take recompute_method block.",
    )


def _check_data(cfg: Namespace) -> None:
    data = cfg.data
    _check_codec(cfg)
    _divides(cfg, "data.shuffle_pool", "data.shuffle_block")
    _check_tasks("data.tasks", data.tasks)
    _check_sources(data)
    _require(data.mask_ratio.std > 0, f"data.mask_ratio.std is {data.mask_ratio.std}: it must be above 0.")
    _require(
        all(0 < ratio <= 1 for ratio in cfg.validation.mask_ratios),
        f"validation.mask_ratios are shares above 0 and up to 1, not {cfg.validation.mask_ratios}: change them.",
    )


def _check_tasks(option: str, tasks: Namespace) -> None:
    weights = vars(tasks)
    for name, weight in weights.items():
        _require(weight >= 0, f"{option}.{name} is {weight}: it must not be negative.")
    _require(any(weights.values()), f"{option} are all 0: make one of them positive.")


def _check_sources(data: Namespace) -> None:
    sources = data.sources
    for name, source in sources.items():
        _require(
            source.weight > 0, f"data.sources.{name}.weight is {source.weight}: it must be above 0, or leave the source out."
        )
        if source.tasks is not None:
            _check_tasks(f"data.sources.{name}.tasks", source.tasks)
    _require(
        not sources or data.generate is None,
        "data.generate makes the data set at data.path, which is not read where there are data.sources: leave out one of them.",
    )
    _require(
        data.validation_source is None or data.validation_source in sources,
        f"data.validation_source {data.validation_source} is none of data.sources {sorted(sources)}: change it.",
    )


def _check_codec(cfg: Namespace) -> None:
    codec = cfg.data.codec
    _require(
        codec.patch_size is None or codec.patch_size >= 1,
        f"data.codec.patch_size is {codec.patch_size}: it must be at least 1.",
    )
    if codec.kind == "vae":
        # How many tokens an image is follows from the auto-encoder's own config: seen to where that is opened.
        _require(codec.path, "data.codec.kind is vae: give data.codec.path, the directory of the auto-encoder.")
        return
    _require(codec.path is None, "data.codec.path is for data.codec.kind vae: leave it out, or set that.")
    patch_size = DEFAULT_PATCH_SIZE["patch"] if codec.patch_size is None else codec.patch_size
    _require(
        codec.image_size % patch_size == 0,
        f"data.codec.image_size {codec.image_size} is not divisible by data.codec.patch_size {patch_size}: change one of them.",
    )
    image_tokens = (codec.image_size // patch_size) ** 2
    _require(
        image_tokens + 4 < cfg.data.sequence_length,
        f"An image is {image_tokens} tokens, which with its marks and some text does not fit data.sequence_length "
        f"{cfg.data.sequence_length}: make that larger, or data.codec.patch_size.",
    )


def validate_world(config: Config, *, world_size: int) -> None:
    """Refuse a number of processes that does not fit the layout and the batch.

    Raises:
        ValueError: as it says.
    """
    parallel, train = config.parallel, config.train
    replica = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    _require(
        world_size % replica == 0,
        f"{world_size} processes do not divide into replicas of {replica} "
        "(parallel.tensor_model_parallel_size x pipeline_model_parallel_size): start a multiple of that.",
    )
    ranks = world_size // replica
    _require(
        train.global_batch_size % (train.micro_batch_size * ranks) == 0,
        f"train.global_batch_size {train.global_batch_size} is not "
        f"divisible by train.micro_batch_size {train.micro_batch_size} x {ranks} data-parallel ranks: change one of them.",
    )
    microbatches = train.global_batch_size // (train.micro_batch_size * ranks)
    if parallel.virtual_pipeline_model_parallel_size is not None:
        _require(
            microbatches % parallel.pipeline_model_parallel_size == 0,
            f"The interleaved schedule needs the number of microbatches "
            f"({microbatches}) to be a multiple of parallel.pipeline_model_parallel_size: change train.global_batch_size.",
        )


def validate_machine(config: Config, *, compute_capability: tuple[int, int] | None) -> None:
    """Refuse what this machine cannot compute; a run can be planned on any.

    Args:
        compute_capability: of its GPUs; None: it has none.

    Raises:
        ValueError: as it says.
    """
    model, fp8 = config.model, config.precision.fp8
    if compute_capability is None:
        _require(
            model.attention == "dense",
            f"model.attention {model.attention} needs a GPU, for torch has no backward pass of it on a CPU: set it to dense.",
        )
        _require(
            model.head.compile == "off",
            f"model.head.compile {model.head.compile} needs a GPU: set it to off.",
        )
        _require(fp8 == "off", f"precision.fp8 {fp8} needs a GPU: set it to off.")
        _require(
            model.backbone.transformer_impl == "local",
            "model.backbone.transformer_impl transformer_engine needs a GPU: set it to local.",
        )
        return
    major, minor = compute_capability
    _require(
        fp8 == "off" or compute_capability >= (9, 0),
        f"precision.fp8 {fp8} needs a GPU of compute capability 9.0 (Hopper) or more, and this has {major}.{minor}: set it off.",
    )
