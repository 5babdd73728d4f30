"""Configuration: nested dataclasses, filled by defaults <- YAML <- command line.

    python pretrain_mmar.py --config a.yaml [--config b.yaml] [--section.key VALUE ...]

Later sources win. Each part of the system receives its own section, never the root. `model.backbone` is megatron-core's own
`TransformerConfig`: any of its fields may be given by its own name. What follows from another section (parallel sizes, dtypes) is
filled in from there, and a contradiction is refused before anything is built, in one sentence with the fix.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, NoReturn

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from mmar_megatron import platform
from mmar_megatron.config_checks import SPARED_LAYERS, validate

platform.prepare_for_megatron()
set_parsing_settings(docstring_parse_attribute_docstrings=True)  # --help shows the line under each field

from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402


@dataclass(kw_only=True)
class EmbeddingViTConfig:
    """The small bidirectional vision transformer that reads the clean (visible) image tokens."""

    num_layers: int = 4
    hidden_size: int = 384
    num_attention_heads: int = 6
    mlp_ratio: float = 4.0


@dataclass(kw_only=True)
class HeadConfig:
    """The diffusion head: MAR's residual MLP.

    MAR's sizes (depth x width): default 3 x 1024, B 6 x 1024, L 8 x 1280, H 12 x 1536.
    """

    depth: int = 3
    width: int = 1024
    timestep_multiplier: int = 4
    """Noise levels drawn for each masked token in one pass."""
    row_multiple: int = 1
    """The masked tokens of a rank are filled up to a multiple of this in training, so that few numbers of them occur."""
    compile: Literal["off", "kernels", "graphs"] = "off"
    """In training on a GPU. `kernels`: torch.compile fuses what lies between the matrix products; `graphs`: and all are launched
    at once, by a CUDA graph for each number of rows."""


@dataclass(kw_only=True)
class DiffusionConfig:
    """The noise process of the diffusion head."""

    schedule: Literal["cosine", "cosine_zero_snr", "linear_interpolation"] = "cosine"
    """`cosine` is MAR's; `cosine_zero_snr` ends at pure noise; `linear_interpolation` is x_t = (1 - t) x + t eps."""
    parameterization: Literal["v", "eps", "x", "flow"] = "v"
    """What the head predicts."""
    num_timesteps: int = 1000
    """Discrete noise levels in training."""
    sampling_steps: int = 25
    """Head evaluations for each image token when painting."""
    sampler: Literal["ddim", "ancestral", "dpm_solver++"] = "dpm_solver++"
    """In 25 steps it is where `ddim` is in 100: docs/performance.md, Painting."""


@dataclass(kw_only=True)
class RotaryScalingConfig:
    """How a pretrained backbone stretches its rotary position embedding over a longer context."""

    scaling: Literal["none", "linear", "llama3"] = "none"
    """`linear`: position interpolation; `llama3`: Llama 3.1's, which leaves short wavelengths as they are."""
    factor: float = 1.0
    """By which frequencies are divided."""
    low_freq_factor: float = 1.0
    """`llama3`: wavelengths above `original_max_position` / this are stretched in full."""
    high_freq_factor: float = 4.0
    """`llama3`: wavelengths below `original_max_position` / this are left."""
    original_max_position: int = 8192
    """`llama3`: context of the model before it was stretched."""


@dataclass(kw_only=True)
class ModelConfig:
    """The MMAR model: backbone, EmbeddingViT, projectors, diffusion head."""

    # No instance as default: it would fill sizes that follow from others (ffn_hidden_size from hidden_size) too early.
    backbone: TransformerConfig = field(default_factory=dict)
    """megatron-core's `TransformerConfig`: any of its fields by its own name."""
    embedding_vit: EmbeddingViTConfig = field(default_factory=EmbeddingViTConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    attention: Literal["dense", "flex"] = "dense"
    """Of the backbone. `dense`: torch's fused kernels under a mask of all pairs; `flex`: FlexAttention on a GPU, which leaves out
    what the mask leaves empty."""
    tie_embeddings: bool = True
    """Share the word embeddings with the output layer."""
    rotary_base: float = 10000.0
    """Base of the rotary position embedding."""
    rotary_scaling: RotaryScalingConfig = field(default_factory=RotaryScalingConfig)
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""
    image_loss_weight: float = 1.0
    text_loss_weight: float = 1.0
    alignment_loss_weight: float = 0.0
    """Weight of 1 - cos(W h, f), which pulls clean images' features f of a frozen teacher (in the shards) into the backbone."""
    alignment_features: int = 0
    """Width of the teacher features in the shards; needed where `alignment_loss_weight` is not 0."""


@dataclass(kw_only=True)
class CodecConfig:
    """Image <-> continuous tokens. Must agree with what the shards were made with."""

    kind: Literal["patch", "vae"] = "patch"
    """`patch`: the pixels of each patch are one token: lossless by construction. `vae`: the latents of an auto-encoder."""
    path: str | None = None
    """`vae`: directory of a `diffusers.AutoencoderKL`; its config has the scale and the shift of the latents."""
    image_size: int = 32
    """Pixels along each side."""
    patch_size: int | None = None
    """Pixels (`vae`: latents) along each side of a patch, which is one token; none: 4 (`vae`: 1)."""


@dataclass(kw_only=True)
class TaskConfig:
    """Relative weights of the kinds of sequence."""

    text_to_image: float = 0.5
    """[text][image]: trains P(image | text)."""
    image_to_text: float = 0.5
    """[image][text], the image fully visible: trains P(text | image)."""
    image_only: float = 0.0
    """[image]: trains P(image)."""


@dataclass(kw_only=True)
class MaskRatioConfig:
    """Share of an image's tokens that is masked, drawn for each sample."""

    distribution: Literal["truncated_normal", "uniform"] = "truncated_normal"
    mean: float = 1.0
    """Of the normal distribution before truncation (MAR: 1.0)."""
    std: float = 0.25
    """Of the normal distribution before truncation (MAR: 0.25)."""
    minimum: float = 0.7
    """Lower bound: 0.7 in stage 1, 0 in stage 2."""


@dataclass(kw_only=True)
class SourceConfig:
    """One of several data sets."""

    path: str
    """A directory made by `tools/prepare_data.py`, or the URL of one."""
    weight: float = 1.0
    """Share of the documents that come from here, relative to the other sources'."""
    tasks: TaskConfig | None = None
    """None: `data.tasks`."""


@dataclass(kw_only=True)
class DataConfig:
    """What is read, and how samples become sequences."""

    path: str = "data/shapes"
    """A directory made by `tools/prepare_data.py`, or the URL of one (s3://, gs://, https://): tars and index."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Several such data sets by name, to be mixed; `path` is then not read."""
    validation_source: str | None = None
    """Of the sources, the one whose held-out samples validate; none: the first."""
    generate: Literal["shapes"] | None = None
    """Make this data set at `path` if nothing is there yet."""
    tokenizer: str | None = None
    """SentencePiece model, or directory or tokenizer.json of Hugging Face; none: the `tokenizer.model` beside the index."""
    codec: CodecConfig = field(default_factory=CodecConfig)
    sequence_length: int = 128
    packing: bool = False
    """Put as many documents into each sequence as fit; else one."""
    packing_window: int = 4096
    """Documents that are planned, and packed, together."""
    tasks: TaskConfig = field(default_factory=TaskConfig)
    mask_ratio: MaskRatioConfig = field(default_factory=MaskRatioConfig)
    caption_dropout: float = 0.1
    """Share of text-to-image samples whose caption is dropped, for classifier-free guidance."""
    horizontal_flip: float = 0.0
    """Share of samples whose pictures are mirrored; where captions say left and right, 0."""
    languages: list[str] = field(default_factory=lambda: ["en"])
    """One caption is drawn from these, in each epoch anew."""
    shuffle_block: int = 1024
    """Neighbouring samples that are read in about the same time."""
    shuffle_pool: int = 16384
    """Samples, of as many such blocks as it takes, among which the order is random; a multiple of `shuffle_block`."""
    num_workers: int = 1
    """Loader processes on each rank; 0 loads in the training process."""
    read_ahead: int = 2
    """Microbatches of each worker whose bytes are fetched in advance, where the data are not on local disks."""
    cache_dir: str | None = None
    """Keep what was fetched from a URL here, for all processes of the machine."""
    cache_gb: float = 50.0
    """Size of that cache."""
    max_bad_fraction: float = 0.01
    """Stop when more than this share of the samples read cannot be decoded."""


@dataclass(kw_only=True)
class ParallelConfig:
    """How the model is laid out over the processes."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks on each pipeline stage (interleaved 1F1B); needs `overlap_p2p_comm`."""
    pipeline_split: Literal["even", "auto"] | list[int] = "even"
    """Layers on each stage, first stage first. Where stages have several chunks: on the first chunk of each stage, then on the
    second of each, and so on. `auto`: such that the operations of the stages differ least."""
    sequence_parallel: bool = False
    """Shard the activations between the tensor-parallel linears along the sequence."""
    context_parallel_size: int = 1
    overlap_p2p_comm: bool = True
    """Overlap pipeline communication with computation (used by the interleaved schedule)."""
    overlap_grad_reduce: bool = False
    """Overlap the data-parallel gradient reduction with the backward pass."""
    grad_bucket_size: int | None = None
    """Parameters in one such reduction; none: megatron-core's choice."""
    overlap_param_gather: bool = False
    """Overlap the gather of updated parameters with the next forward pass."""


@dataclass(kw_only=True)
class PrecisionConfig:
    """Number formats. The loss, the noise process, gradients' reduction and the optimizer's state are fp32 always."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the parameters and activations."""
    fp8: Literal["off", "delayed", "tensorwise", "blockwise"] = "off"
    """How the matrix products of the backbone's layers are scaled in FP8 while training, by Transformer Engine: by recent largest
    values, by the tensor's own, or by blocks' own. All else, and all evaluation, is in `dtype`; so is the first layer, but under
    `delayed` (`model.backbone.num_layers_at_start_in_bf16`)."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule. No weight decay on norms, biases, embeddings of position and mask, and the head."""

    lr: float = 1e-3
    min_lr: float = 0.0
    """Where the cosine ends."""
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 50
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.02
    clip_grad: float = 3.0
    """Largest gradient norm; 0: no clipping."""
    ema_decay: float = 0.0
    """Of the exponential moving average of the weights, kept in fp32 (MAR: 0.9999); 0: none is kept."""


@dataclass(kw_only=True)
class TrainConfig:
    """Length and batch sizes of the run, and when a step or the whole run is given up."""

    steps: int = 1000
    micro_batch_size: int = 8
    """Sequences in one forward pass of one data-parallel rank."""
    global_batch_size: int = 8
    """Sequences in one optimizer step."""
    log_every: int = 10
    profile: str | None = None
    """`A:B`: profile steps A to B, into `run_dir`/profile."""
    max_bad_steps: int = 10
    """Stop after as many skipped steps in a row, with a diagnosis; 0: never."""
    spike_zscore: float = 0.0
    """Skip steps whose loss lies this many robust standard deviations above the recent median; 0: none."""
    spike_window: int = 128
    """Good steps that are recent."""
    hang_timeout_s: float = 1800.0
    """Seconds without progress after which a rank is taken to hang and ends the run; 0: collectives fail after an hour."""


@dataclass(kw_only=True)
class ValidationConfig:
    """Held-out losses on a fixed grid of (mask ratio x timestep x noise), so that its noise does not hide a trend."""

    every: int = 200
    """Steps between validations; one follows the last step too. 0: never."""
    samples: int = 240
    """Held-out samples read, each once for each task."""
    mask_ratios: list[float] = field(default_factory=lambda: [0.75, 0.875, 1.0])
    """Sample i has its i-th, cyclically."""
    timesteps: int = 4
    """Evenly spaced noise levels for each masked token."""


@dataclass(kw_only=True)
class PreviewConfig:
    """Images painted during training for held-out captions."""

    every: int = 500
    """Steps between previews; 0: never."""
    images: int = 8
    rounds: int = 16
    """Masked auto-regressive rounds."""
    sampling_steps: int = 25
    """Diffusion steps of the head in each round."""
    guidance_scale: float = 2.0


@dataclass(kw_only=True)
class CheckpointConfig:
    """Saving and starting points."""

    every: int = 500
    """Steps between checkpoints; one follows the last step too. 0: never."""
    async_save: bool = False
    """Write in the background while training goes on."""
    max_in_flight: int = 1
    """Background saves at a time; a further one waits for the oldest. Each holds a copy of the state in host memory."""
    on_failure: Literal["continue", "stop"] = "continue"
    """When a checkpoint cannot be saved: say so and train on, or end the run."""
    keep_last: int = 0
    """Delete all but this many of the newest, once the newest has been read back whole; 0: delete none."""
    keep_every: int = 0
    """Of these, keep those whose step is a multiple of this for ever; 0: none."""
    init_from: str | None = None
    """Start from the weights alone of this checkpoint or run directory (stage 2)."""
    init_from_average: bool = False
    """Take the moving average of those weights in their place."""


EngineName = Literal["native", "deepspeed"]


@dataclass(kw_only=True)
class DeepSpeedConfig:
    """With `engine: deepspeed`, what ZeRO divides over the data-parallel ranks."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """0: nothing; 1: the optimizer's state; 2: gradients too; 3: parameters too."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in host memory, and update there."""
    offload_parameters: bool = False
    """Of stage 3, keep the parameters in host memory too."""
    zero_options: dict[str, Any] = field(default_factory=dict)
    """Further entries of DeepSpeed's `zero_optimization` by their own names, such as bucket sizes."""


@dataclass(kw_only=True)
class Config:
    """Pretrains an MMAR model. `--config FILE` may be given several times; later files and options win."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    engine: EngineName = "native"
    """`native`: megatron-core's distributed optimizer and pipeline; `deepspeed`: ZeRO."""
    run_dir: str = "runs/default"
    resume: str = "auto"
    """`auto`: continue what is in `run_dir`; `never`: refuse a run directory that is not empty; or the path of a checkpoint."""
    seed: int = 1234


BACKBONE_DEFAULTS: dict[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": "torch.nn.functional.silu",
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "layernorm_epsilon": 1e-6,
    "bias_dropout_fusion": False,
    "transformer_impl": "local",
    # Transformer Engine's own: megatron-core would scale by the last pass alone, and cut what has grown since.
    "fp8_amax_history_len": 1024,
    "fp8_amax_compute_algo": "max",
    # The first layer errs most in FP8, the last no more than any: docs/numerics.md.
    **SPARED_LAYERS,
}
"""Where MMAR's backbone (Llama- and Qwen-like) differs from megatron-core's defaults. Any may be overridden."""


def frees_sent_outputs(parallel: ParallelConfig) -> bool:
    """Whether a pipeline stage lets go of its output once it is sent, and does not wait for its gradient.

    Not in the interleaved schedule: up to release 0.16 megatron-core would free there what is still on its way
    (Megatron-LM pull request 4047).
    """
    return parallel.pipeline_model_parallel_size > 1 and parallel.virtual_pipeline_model_parallel_size is None


def _derived_backbone_fields(cfg: Namespace) -> dict[str, tuple[Any, str]]:
    """Fields of the backbone that other sections decide: name -> (value, the option that decides it)."""
    parallel, dtype = cfg.parallel, {"fp32": torch.float32, "bf16": torch.bfloat16}[cfg.precision.dtype]
    derived: dict[str, tuple[Any, str]] = {
        name: (parallel[name], f"parallel.{name}")
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "context_parallel_size",
            "sequence_parallel",
        )
    }
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    # Overlap exists in the interleaved schedule alone; megatron-core refuses batched communication beside it.
    derived["overlap_p2p_comm"] = (interleaved and parallel.overlap_p2p_comm, "parallel.overlap_p2p_comm")
    derived["batch_p2p_comm"] = (not interleaved, "parallel.virtual_pipeline_model_parallel_size")
    decides = "parallel.overlap_p2p_comm" if interleaved else "parallel.pipeline_model_parallel_size"
    derived["deallocate_pipeline_outputs"] = (frees_sent_outputs(parallel), decides)
    derived |= dict.fromkeys(("params_dtype", "pipeline_dtype"), (dtype, "precision.dtype"))
    derived["bf16"] = (dtype is torch.bfloat16, "precision.dtype")
    fp8 = cfg.precision.fp8
    # `hybrid`: weights and activations have more bits of mantissa, gradients more of exponent, which a block does not need.
    derived["fp8"] = ({"off": None, "blockwise": "e4m3"}.get(fp8, "hybrid"), "precision.fp8")
    # Which layers are kept in bf16 is for the counts to say. Transformer Engine's delayed scaling is for all layers.
    derived["first_last_layers_bf16"] = (fp8 in ("tensorwise", "blockwise"), "precision.fp8")
    derived["fp8_recipe"] = (_backbone_defaults()["fp8_recipe"] if fp8 == "off" else fp8, "precision.fp8")
    # Losses are sums that the training step divides once by the global counts; megatron-core must not divide by anything.
    derived["calculate_per_token_loss"] = (True, "the training step")
    derived["use_cpu_initialization"] = (not platform.HAS_CUDA, "the machine")
    return derived


class _Parser(ArgumentParser):
    """Errors of one sentence: the 300 lines of usage that argparse prints before them would bury it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = [option[2:] for action in self._actions for option in action.option_strings if option.startswith("--")]
        on_command_line = re.match(r"unrecognized arguments: --([\w.]+)", message)
        at_top_of_file = re.match(r"Option '([\w.]+)' is not accepted", message)
        in_file = re.match(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
        if found := on_command_line or at_top_of_file or in_file:
            unknown = ".".join(found.groups())
            near = difflib.get_close_matches(unknown, known, n=1)
            message = f"there is no option '{unknown}'" + (f"; did you mean '{near[0]}'?" if near else "")
        print("error: " + " ".join(message.split()), file=sys.stderr)
        raise SystemExit(2)


def build_parser() -> ArgumentParser:
    """The command line of `pretrain_mmar.py`."""
    parser = _Parser(prog="pretrain_mmar.py", description=Config.__doc__, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file; may be given several times, later ones win")
    parser.add_argument("--dry_run", action="store_true", help="validate, print the plan, and stop before training")
    parser.add_class_arguments(Config)
    parser.set_defaults({f"model.backbone.{name}": value for name, value in BACKBONE_DEFAULTS.items()})
    return parser


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """What the command line of `pretrain_mmar.py` says."""

    config: Config
    yaml: str
    """The resolved configuration, for `--config`."""
    dry_run: bool


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """Parse, fill in what follows from other sections, validate.

    Raises:
        SystemExit: an unknown key or a value of the wrong type (one sentence on standard error), `--help`, `--print_config`.
        ValueError: a contradiction.
    """
    parser = build_parser()
    # DeepSpeed's launcher puts it there; it is in the environment too.
    words = [word for word in argv if not word.startswith("--local_rank=")]
    cfg = parser.parse_args(words)
    dry_run = cfg.pop("dry_run")
    cfg.pop("config")
    validate(cfg)
    _check_spared_layers(cfg, given=parser.parse_args(words, defaults=False))
    resolved = _to_yaml(parser, cfg)
    for name, (value, source) in _derived_backbone_fields(cfg).items():
        given = cfg.model.backbone[name]
        if given not in (value, _backbone_defaults()[name]):
            raise ValueError(f"model.backbone.{name} is {given}, but {source} makes it {value}: leave out the former.")
        cfg.model.backbone[name] = value
    config = parser.instantiate(cfg)
    return CommandLine(config=Config(**{f.name: config[f.name] for f in fields(Config)}), yaml=resolved, dry_run=dry_run)


def _check_spared_layers(cfg: Namespace, *, given: Namespace) -> None:
    """That a `false` was given, and is not the default, shows in what was given alone."""
    if cfg.precision.fp8 in ("tensorwise", "blockwise") and given.get("model.backbone.first_last_layers_bf16") is False:
        raise ValueError(
            "model.backbone.first_last_layers_bf16 is False, but precision.fp8 makes it True: leave out the former, and to spare "
            "no layer set model.backbone.num_layers_at_start_in_bf16 0."
        )


def _backbone_defaults() -> dict[str, Any]:
    return {f.name: f.default for f in fields(TransformerConfig)}


def _to_yaml(parser: ArgumentParser, cfg: Namespace) -> str:
    """All sections; of the 240 fields of the backbone only what differs from megatron-core's defaults or ours."""
    values = yaml.safe_load(parser.dump(cfg, skip_none=False))
    given, defaults = cfg.model.backbone, _backbone_defaults()
    values["model"]["backbone"] = {
        name: value
        for name, value in values["model"]["backbone"].items()
        if name in BACKBONE_DEFAULTS or (defaults[name] is not MISSING and given[name] != defaults[name])
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
