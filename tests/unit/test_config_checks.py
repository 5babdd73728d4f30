"""Contradictions and impossible values, each refused in one sentence with the fix; and what only just fits, accepted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mmar_megatron.config import parse_command_line
from mmar_megatron.config_checks import validate_machine, validate_world
from tests.unit.command_line import FP8, INTERLEAVED, PP2, TP2, parse, share_parser


@pytest.fixture(scope="module", autouse=True)
def one_parser() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        share_parser(patch)
        yield


ZERO = "--engine=deepspeed"
SP = [*TP2, "--parallel.sequence_parallel=true"]
UNIFORM = [
    *("--model.backbone.recompute_granularity", "full", "--model.backbone.recompute_method", "uniform"),
    "--model.backbone.recompute_num_layers",
]
REFUSED: dict[str, tuple[list[str], str]] = {
    "groups of recomputed layers that leave a rest": (
        [*UNIFORM, "3"],
        r"model\.backbone\.recompute_num_layers 3 must divide the layers of each piece",
    ),
    "groups of recomputed layers and layers dealt out one by one": (
        [*UNIFORM, "2", *PP2, "--parallel.pipeline_split", "auto"],
        r"of pipeline_split auto, only 1 does for certain",
    ),
    "ZeRO and a pipeline": ([ZERO, *PP2], r"engine deepspeed has no pipeline: set parallel\.pipeline_model_parallel_size 1"),
    "ZeRO and megatron-core's overlap": (
        [ZERO, "--parallel.overlap_grad_reduce=true"],
        r"parallel\.overlap_grad_reduce is megatron-core's: leave it out with engine deepspeed",
    ),
    "ZeRO and an average": (
        [ZERO, "--optimizer.ema_decay=0.9"],
        r"keeps no moving average of the weights: set optimizer\.ema_decay 0",
    ),
    "bf16 without copies": (
        [ZERO, "--deepspeed.zero_stage=0", "--precision.dtype=bf16"],
        r"zero_stage 0 with bf16 .*: use stage 2 or 3, or precision\.dtype fp32",
    ),
    "bf16 at stage 1": (
        [ZERO, "--deepspeed.zero_stage=1", "--precision.dtype=bf16"],
        r"zero_stage 1 with bf16 .*: use stage 2 or 3",
    ),
    "nothing to offload": (
        [ZERO, "--deepspeed.zero_stage=0", "--deepspeed.offload_optimizer=true"],
        r"deepspeed\.offload_optimizer needs a zero_stage of 1 or more: raise it",
    ),
    "whole parameters offloaded": (
        [ZERO, "--deepspeed.offload_parameters=true"],
        r"offload_parameters needs zero_stage 3: raise it",
    ),
    "ZeRO and Transformer Engine": (
        [ZERO, "--model.backbone.transformer_impl=transformer_engine"],
        r"trains megatron-core's own layers: set model\.backbone\.transformer_impl local",
    ),
    "layers for serving": (
        ["--model.backbone.transformer_impl=inference_optimized"],
        r"transformer_impl inference_optimized is for serving: set local or transformer_engine",
    ),
    "FP8 in megatron-core's layers": (
        ["--precision.fp8=tensorwise", "--precision.dtype=bf16"],
        r"fp8 tensorwise is for Transformer Engine's layers: set model\.backbone\.transformer_impl transformer_engine",
    ),
    "FP8 of fp32": (
        [*FP8, "--precision.dtype=fp32", "--precision.fp8=delayed"],
        r"fp8 delayed is for bf16 weights: set precision\.dtype bf16",
    ),
    "weights in FP8": ([*FP8, "--precision.fp8=delayed", "--model.backbone.fp8_param=true"], r"fp8_param .*: leave it out"),
    "bf16 layers in bf16": (
        [*FP8, "--model.backbone.first_last_layers_bf16=true"],
        r"first_last_layers_bf16 spares layers from FP8, and precision\.fp8 is off: leave it out",
    ),
    "bf16 layers under delayed scaling": (
        [*FP8, "--precision.fp8=delayed", "--model.backbone.first_last_layers_bf16=true"],
        r"leave out model\.backbone\.first_last_layers_bf16, or set fp8 tensorwise",
    ),
    "no bf16 layers": (
        [*FP8, "--precision.fp8=tensorwise", "--model.backbone.first_last_layers_bf16=false"],
        r"is False, but precision\.fp8 makes it True: .* set model\.backbone\.num_layers_at_start_in_bf16 0",
    ),
    "some bf16 layers under delayed scaling": (
        [*FP8, "--precision.fp8=delayed", "--model.backbone.num_layers_at_end_in_bf16=1"],
        r"leave out model\.backbone\.num_layers_at_end_in_bf16, or set fp8 tensorwise",
    ),
    "more bf16 layers than a stage has": (
        [*FP8, *PP2, "--precision.fp8=blockwise", "--model.backbone.num_layers_at_start_in_bf16=3"],
        r"num_layers_at_start_in_bf16 3 must be 0 to 2, .* 4 layers over 2 pipeline stages are: change it",
    ),
    "fewer than no bf16 layers": (
        [*FP8, "--precision.fp8=blockwise", "--model.backbone.num_layers_at_end_in_bf16=-1"],
        r"num_layers_at_end_in_bf16 -1 must be 0 to 4",
    ),
    "FP8 by another name": (
        [*FP8, "--model.backbone.fp8=e4m3"],
        r"model\.backbone\.fp8 is e4m3, but precision\.fp8 makes it None: leave out the former",
    ),
    **{
        f"FP8, {what}": ([*FP8, "--precision.fp8=blockwise", *options], rf"sides here in multiples of {multiple}, and {message}")
        for what, options, multiple, message in (
            (
                "hidden size",
                ["--model.backbone.hidden_size=40", "--model.backbone.kv_channels=8"],
                16,
                r"the hidden size is 40: change model\.backbone\.hidden_size",
            ),
            (
                "heads",
                ["--model.backbone.kv_channels=10"],
                16,
                r"the heads' channels are 40: change model\.backbone\.kv_channels",
            ),
            (
                "queries, keys and values",
                ["--model.backbone.num_query_groups=1", "--model.backbone.kv_channels=4"],
                16,
                r"queries, keys and values are 24",
            ),
            (
                "feed-forward",
                [*TP2, "--model.backbone.ffn_hidden_size=48"],
                16,
                r"the feed-forward size's channels on each of 2 tensor-parallel ranks are 24: change",
            ),
            (
                "positions",
                ["--data.sequence_length=84"],
                16,
                r"the positions of a microbatch are 168: change train\.micro_batch_size or data\.sequence_length",
            ),
            (
                "hidden size gathered in blocks",
                [*SP, "--data.sequence_length=128"],
                128,
                r"the hidden size is 32: change",
            ),
            (
                "positions gathered in blocks",
                [*SP, "--model.backbone.hidden_size=128", "--data.sequence_length=144"],
                128,
                r"the positions of a microbatch on each of 2 tensor-parallel ranks are 144",
            ),
        )
    },
    "a profile of one step": (
        ["--train.profile=3"],
        r"train\.profile 3 is not of the form A:B: give the first and the last step",
    ),
    "a profile that ends before it begins": (["--train.profile=7:6"], r"profile 7:6 is not a range of the steps 1 to 1000"),
    "a profile behind the last step": (
        ["--train.profile=3:9", "--train.steps=8"],
        r"profile 3:9 is not a range of the steps 1 to 8 of the run: change it, or train\.steps",
    ),
    "dropout in FlexAttention": (
        ["--model.attention=flex", "--model.backbone.attention_dropout=0.1", "--model.backbone.kv_channels=16"],
        r"attention flex knows no dropout: set model\.backbone\.attention_dropout 0, or model\.attention dense",
    ),
    "narrow heads in FlexAttention": (
        ["--model.attention=flex", "--model.backbone.kv_channels=14"],
        r"heads of at least 16 channels, and they have 14: change model\.backbone\.kv_channels",
    ),
    "auto-encoder from nowhere": (["--data.codec.kind=vae"], r"kind is vae: give data\.codec\.path"),
    "auto-encoder for patches": (["--data.codec.path=vae"], r"data\.codec\.path is for data\.codec\.kind vae: leave it out"),
    "source without weight": (
        ['--data.sources={"a": {"path": "a", "weight": 0}}'],
        r"data\.sources\.a\.weight is 0.*: it must be above 0, or leave the source out",
    ),
    "source without tasks": (
        ['--data.sources={"a": {"path": "a", "tasks": {"text_to_image": 0, "image_to_text": 0}}}'],
        r"data\.sources\.a\.tasks are all 0: make one of them positive",
    ),
    "source with a task below 0": (
        ['--data.sources={"a": {"path": "a", "tasks": {"text_to_image": -1}}}'],
        r"data\.sources\.a\.tasks\.text_to_image is -1.*: it must not be negative",
    ),
    "data made and not read": (
        ['--data.sources={"a": {"path": "a"}}', "--data.generate=shapes"],
        r"data\.path, which is not read where there are data\.sources: leave out one",
    ),
    "validation on nothing": (
        ['--data.sources={"a": {"path": "a"}}', "--data.validation_source=b"],
        r"data\.validation_source b is none of data\.sources \['a'\]: change it",
    ),
    "pool over blocks": (
        ["--data.shuffle_pool=100"],
        r"data\.shuffle_pool 100 is not divisible by data\.shuffle_block 1024: change one",
    ),
    "heads over ranks": (
        ["--parallel.tensor_model_parallel_size=3"],
        r"num_attention_heads 4 is not divisible by parallel\.tensor_model_parallel_size 3: change one",
    ),
    "groups over ranks": (
        [*TP2, "--model.backbone.num_query_groups=1"],
        r"num_query_groups 1 is not divisible by parallel\.tensor_model_parallel_size 2: change one",
    ),
    "heads over groups": (
        ["--model.backbone.num_query_groups=3"],
        r"num_attention_heads 4 is not divisible by model\.backbone\.num_query_groups 3: change one",
    ),
    "width over heads": (
        ["--model.backbone.hidden_size=30"],
        r"hidden_size 30 is not divisible by model\.backbone\.num_attention_heads 4: change one",
    ),
    "head without halves": (
        ["--model.backbone.kv_channels=7"],
        r"A head is 7 channels wide, .*: change model\.backbone\.kv_channels",
    ),
    "vocabulary over ranks": (
        [*TP2, "--model.make_vocab_size_divisible_by=1"],
        r"make_vocab_size_divisible_by 1 is not divisible by parallel\.tensor_model_parallel_size 2: change one",
    ),
    "sequence parallelism alone": (
        ["--parallel.sequence_parallel=true"],
        r"tensor_model_parallel_size 1: switch it off, or raise",
    ),
    "sequence over ranks": (
        [*TP2, "--parallel.sequence_parallel=true", "--data.sequence_length=129"],
        r"data\.sequence_length 129 is not divisible by parallel\.tensor_model_parallel_size 2",
    ),
    "context parallelism": (
        ["--parallel.context_parallel_size=2"],
        r"set parallel\.context_parallel_size to 1, and for long sequences use parallel\.sequence_parallel",
    ),
    "chunks without stages": (
        ["--parallel.virtual_pipeline_model_parallel_size=2"],
        r"interleaved schedule needs parallel\.pipeline_model_parallel_size and .* above 1: raise them, or leave out",
    ),
    "one chunk": (
        [*PP2, "--parallel.virtual_pipeline_model_parallel_size=1"],
        r"virtual_pipeline_model_parallel_size above 1: raise them, or leave out",
    ),
    "interleaving without overlap": (
        [*INTERLEAVED, "--parallel.overlap_p2p_comm=false"],
        r"interleaved schedule needs parallel\.overlap_p2p_comm: switch it on",
    ),
    "layers over stages": (
        [*PP2, "--model.backbone.num_layers=5"],
        r"num_layers 5 is not divisible by the 2 pieces of the pipeline: .* set parallel\.pipeline_split to auto",
    ),
    "layers over chunks": ([*INTERLEAVED, "--model.backbone.num_layers=6"], r"num_layers 6 is not divisible by the 4 pieces"),
    "two divisions of the layers": (
        [*PP2, "--parallel.pipeline_split=auto", "--model.backbone.num_layers_in_first_pipeline_stage=1"],
        r"pipeline_split and model\.backbone\.num_layers_in_first_pipeline_stage both divide the layers: leave out one",
    ),
    "a list and megatron-core's layout": (
        [*PP2, "--parallel.pipeline_split=[2,2]", "--model.backbone.pipeline_model_parallel_layout=Ett|ttL"],
        r"pipeline_split and model\.backbone\.pipeline_model_parallel_layout both divide the layers: leave out one",
    ),
    "more pieces than layers": (
        [*INTERLEAVED, "--parallel.pipeline_split=auto", "--model.backbone.num_layers=3"],
        r"The 4 pieces of the pipeline are more than model\.backbone\.num_layers 3: use fewer",
    ),
    "too few pieces": (
        [*INTERLEAVED, "--parallel.pipeline_split=[2,2]"],
        r"pipeline_split \[2, 2\] must be 4 numbers .* that add up to model\.backbone\.num_layers 4: change it",
    ),
    "too many layers": ([*PP2, "--parallel.pipeline_split=[2,3]"], r"\[2, 3\] must be 2 numbers .* add up to .* 4: change it"),
    "fewer layers than none": ([*PP2, "--parallel.pipeline_split=[5,-1]"], r"\[5, -1\] must be 2 numbers .*, none negative"),
    "an empty piece": (
        [*INTERLEAVED, "--parallel.pipeline_split=[1,0,3,0]"],
        r"\[1, 0, 3, 0\] leaves a piece empty: only the first",
    ),
    "gather without reduce": (
        ["--parallel.overlap_param_gather=true"],
        r"overlap_param_gather needs parallel\.overlap_grad_reduce: switch that on too",
    ),
    "batch over microbatches": (
        ["--train.micro_batch_size=3"],
        r"global_batch_size 8 is not divisible by train\.micro_batch_size 3: change one of them",
    ),
    "image over patches": (
        ["--data.codec.patch_size=5"],
        r"image_size 32 is not divisible by data\.codec\.patch_size 5: change one",
    ),
    "image in sequence": (
        ["--data.sequence_length=68"],
        r"An image is 64 tokens, .* does not fit data\.sequence_length 68: make that larger, or data\.codec\.patch_size",
    ),
    "EmbeddingViT's heads": (
        ["--model.embedding_vit.num_attention_heads=5"],
        r"embedding_vit\.hidden_size 384 is not divisible by model\.embedding_vit\.num_attention_heads 5: change one",
    ),
    "no task": (
        ["--data.tasks.text_to_image=0", "--data.tasks.image_to_text=0"],
        r"data\.tasks are all 0: make one of them positive",
    ),
    "alignment's width": (
        ["--model.alignment_loss_weight=1"],
        r"give model\.alignment_features, the width of the teacher's features",
    ),
    "two starting points": (
        ["--checkpoint.init_from=a", "--resume=b"],
        r"init_from starts anew from weights alone, resume continues a run: give one of them",
    ),
    "nothing masked": (
        ["--validation.mask_ratios=[0.5, 0]"],
        r"mask_ratios are shares above 0 and up to 1, not \[0\.5, 0\.0\]: change",
    ),
    "levels that are not there": (
        ["--preview.sampling_steps=1001"],
        r"sampling_steps 1001 is more than the model\.diffusion\.num_timesteps 1000 there are: lower it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradiction_is_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as refused:
        parse(*options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "option",
    [
        *("train.global_batch_size=0", "train.micro_batch_size=0", "train.log_every=0", "train.steps=-1"),
        *("parallel.tensor_model_parallel_size=0", "parallel.pipeline_model_parallel_size=0"),
        *("data.codec.patch_size=0", "data.languages=[]", "data.caption_dropout=2", "data.mask_ratio.minimum=1.5"),
        *("data.mask_ratio.std=0", "data.tasks.image_only=-1", "seed=-1", "optimizer.lr=-1"),
        *("model.embedding_vit.num_attention_heads=0", "model.head.timestep_multiplier=0", "model.diffusion.num_timesteps=0"),
        *("preview.images=0", "validation.mask_ratios=[]", "validation.samples=0"),
        *("model.backbone.normalization=LayerNorm", "model.backbone.rotary_interleaved=true", "model.backbone.num_moe_experts=4"),
    ],
)
def test_impossible_value_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=option.split("=")[0].replace(".", r"\.")) as refused:
        parse(f"--{option}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["num_layers", "hidden_size", "num_attention_heads"])
def test_sizes_of_the_backbone_must_be_given(name: str) -> None:
    without = [f"--model.backbone.{other}=4" for other in ("num_layers", "hidden_size", "num_attention_heads") if other != name]
    with pytest.raises(ValueError, match=rf"model\.backbone\.{name} is .*: it must be at least 1"):
        parse_command_line(without)


@pytest.mark.parametrize(
    "options",
    [
        [*TP2, *INTERLEAVED, "--parallel.sequence_parallel=true"],
        [*PP2, "--model.backbone.num_layers=5", "--model.backbone.num_layers_in_first_pipeline_stage=2"],
        [*PP2, "--model.backbone.num_layers=5", "--parallel.pipeline_split=auto"],
        [*INTERLEAVED, "--parallel.pipeline_split=[0,3,1,0]"],
        ["--parallel.pipeline_split=auto"],
        ["--parallel.overlap_param_gather=true", "--parallel.overlap_grad_reduce=true"],
        ["--data.sequence_length=69"],
        ["--checkpoint.init_from=a", "--resume=never"],
        ["--model.alignment_loss_weight=1", "--model.alignment_features=8"],
        ["--model.attention=flex", "--model.backbone.kv_channels=16"],
        [*FP8, "--precision.fp8=delayed", *SP, "--data.sequence_length=80"],
        [*FP8, "--precision.fp8=blockwise", *SP, "--data.sequence_length=128", "--model.backbone.hidden_size=128"],
        [*FP8, "--precision.fp8=tensorwise", "--model.backbone.first_last_layers_bf16=true"],
        [*FP8, *PP2, "--precision.fp8=tensorwise", "--model.backbone.num_layers_at_start_in_bf16=2"],
        [*FP8, "--precision.fp8=delayed", "--model.backbone.num_layers_at_start_in_bf16=1"],
        ["--train.profile=8:8", "--train.steps=8"],
    ],
)
def test_what_only_just_fits_is_accepted(options: list[str]) -> None:
    parse(*options)


@pytest.mark.parametrize(
    ("options", "world_size", "message"),
    [
        (TP2, 3, r"3 processes do not divide into replicas of 2 .*: start a multiple of that"),
        ([*TP2, *PP2], 6, r"6 processes do not divide into replicas of 4"),
        ([], 3, r"global_batch_size 8 is not divisible by train\.micro_batch_size 2 x 3 data-parallel ranks: change one"),
        ([], 8, r"global_batch_size 8 is not divisible by train\.micro_batch_size 2 x 8 data-parallel ranks"),
        (
            [*INTERLEAVED, "--train.global_batch_size=6"],
            2,
            r"number of microbatches \(3\) to be a multiple of parallel\.pipeline_model_parallel_size",
        ),
    ],
)
def test_a_number_of_processes_that_does_not_fit(options: list[str], world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_world(parse(*options).config, world_size=world_size)


@pytest.mark.parametrize(("options", "world_size"), [([], 1), ([], 4), (TP2, 2), (TP2, 8), ([*TP2, *PP2], 16), (INTERLEAVED, 2)])
def test_a_number_of_processes_that_fits(options: list[str], world_size: int) -> None:
    validate_world(parse(*options).config, world_size=world_size)


HOPPER, AMPERE = (9, 0), (8, 0)
NEEDS_A_GPU = {
    "FlexAttention": (
        ["--model.attention=flex", "--model.backbone.kv_channels=16"],
        r"attention flex needs a GPU, .*: set it to dense",
    ),
    "Transformer Engine": (FP8, r"transformer_impl transformer_engine needs a GPU: set it to local"),
    "FP8": ([*FP8, "--precision.fp8=delayed"], r"fp8 delayed needs a GPU: set it to off"),
}


@pytest.mark.parametrize("what", NEEDS_A_GPU)
def test_what_needs_a_gpu_is_refused_without_one(what: str) -> None:
    options, message = NEEDS_A_GPU[what]
    config = parse(*options).config
    validate_machine(config, compute_capability=HOPPER)
    with pytest.raises(ValueError, match=message) as refused:
        validate_machine(config, compute_capability=None)
    assert "\n" not in str(refused.value)


def test_fp8_needs_hopper() -> None:
    config = parse(*FP8, "--precision.fp8=tensorwise").config
    with pytest.raises(ValueError, match=r"capability 9\.0 \(Hopper\) or more, and this has 8\.0: set it off"):
        validate_machine(config, compute_capability=AMPERE)
    validate_machine(parse(*FP8).config, compute_capability=AMPERE)


def test_the_default_needs_no_gpu() -> None:
    validate_machine(parse().config, compute_capability=None)
