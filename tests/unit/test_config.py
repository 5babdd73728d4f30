"""Configuration: which source wins, what is refused and in which words, and that what is printed can be read again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from megatron.core.transformer.transformer_config import TransformerConfig

from mmar_megatron import config as configuration
from mmar_megatron.config import CommandLine, Config, parse_command_line
from mmar_megatron.config_checks import validate_world

SIZES = [
    *("--model.backbone.num_layers", "4", "--model.backbone.hidden_size", "32", "--model.backbone.num_attention_heads", "4"),
    *("--train.global_batch_size", "8", "--train.micro_batch_size", "2"),
]
PP2 = ["--parallel.pipeline_model_parallel_size=2"]
TP2 = ["--parallel.tensor_model_parallel_size=2"]
INTERLEAVED = [*PP2, "--parallel.virtual_pipeline_model_parallel_size=2"]


@pytest.fixture(scope="module", autouse=True)
def one_parser() -> Iterator[None]:
    """Built once: it does not remember what it parsed, and takes as long to build as to use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configuration, "build_parser", functools.cache(configuration.build_parser))
        yield


def parse(*options: str) -> CommandLine:
    return parse_command_line([*SIZES, *options])


def error_of(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one line on standard error with which the command line is refused."""
    with pytest.raises(SystemExit) as stopped:
        parse(*options)
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


# --- where values come from -----------------------------------------------------------------------------------------------------


def test_later_sources_win(tmp_path: Path) -> None:
    first = write(
        tmp_path / "first.yaml", "train: {steps: 11, log_every: 12}\noptimizer: {lr: 0.5, betas: [0.8, 0.9]}\nseed: 5\n"
    )
    second = write(tmp_path / "second.yaml", "train: {log_every: 22}\noptimizer: {lr: 0.25}\n")
    config = parse("--config", first, "--config", second, "--optimizer.lr", "0.125").config
    assert config.optimizer.lr == 0.125  # command line
    assert config.train.log_every == 22  # second file
    assert (config.train.steps, config.seed, config.optimizer.betas) == (11, 5, (0.8, 0.9))  # first file
    assert (config.train.micro_batch_size, config.optimizer.eps) == (2, 1e-8)  # neither
    assert parse("--config", second, "--config", first).config.train.log_every == 12


def test_a_file_after_an_option_wins(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "train: {steps: 11}\n")
    assert parse("--train.steps", "3", "--config", file).config.train.steps == 11


def test_fields_of_the_backbone_pass_by_their_own_names() -> None:
    backbone = parse(
        "--model.backbone.layernorm_epsilon=0.25",
        "--model.backbone.num_query_groups=2",
        "--model.backbone.recompute_granularity=selective",
        "--model.backbone.init_method_std=0.5",
        "--model.backbone.activation_func=torch.nn.functional.gelu",
    ).config.model.backbone
    assert isinstance(backbone, TransformerConfig)
    assert (backbone.layernorm_epsilon, backbone.num_query_groups, backbone.recompute_granularity) == (0.25, 2, "selective")
    assert backbone.init_method_std == 0.5
    assert backbone.activation_func is torch.nn.functional.gelu


def test_backbone_is_llama_like_unless_said_otherwise() -> None:
    backbone = parse().config.model.backbone
    assert (backbone.normalization, backbone.gated_linear_unit, backbone.add_bias_linear) == ("RMSNorm", True, False)
    assert backbone.activation_func is torch.nn.functional.silu
    assert (backbone.hidden_dropout, backbone.attention_dropout) == (0, 0)
    # What megatron-core derives itself, from the sizes given.
    assert (backbone.ffn_hidden_size, backbone.kv_channels, backbone.num_query_groups) == (128, 8, 4)


def test_what_follows_from_other_sections() -> None:
    config = parse(*TP2, *PP2, "--parallel.sequence_parallel=true", "--precision.dtype=bf16").config
    backbone = config.model.backbone
    assert (backbone.tensor_model_parallel_size, backbone.pipeline_model_parallel_size) == (2, 2)
    assert backbone.sequence_parallel
    assert (backbone.params_dtype, backbone.pipeline_dtype, backbone.bf16) == (torch.bfloat16, torch.bfloat16, True)
    assert (backbone.overlap_p2p_comm, backbone.batch_p2p_comm) == (False, True)
    assert backbone.calculate_per_token_loss
    interleaved = parse(*INTERLEAVED).config.model.backbone
    assert (interleaved.virtual_pipeline_model_parallel_size, interleaved.overlap_p2p_comm) == (2, True)
    assert not interleaved.batch_p2p_comm
    assert interleaved.params_dtype is torch.float32


@pytest.mark.parametrize(
    ("option", "source"),
    [
        ("tensor_model_parallel_size=2", "parallel.tensor_model_parallel_size makes it 1"),
        ("sequence_parallel=true", "parallel.sequence_parallel makes it False"),
        ("bf16=true", "precision.dtype makes it False"),
        ("params_dtype=torch.bfloat16", "precision.dtype makes it torch.float32"),
        ("context_parallel_size=2", "parallel.context_parallel_size makes it 1"),
    ],
)
def test_contradiction_of_a_derived_field(option: str, source: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.backbone\.{option.split('=')[0]} is .*, but {source}: leave out the former"):
        parse(f"--model.backbone.{option}")


def test_agreement_with_a_derived_field_is_no_contradiction() -> None:
    assert parse(*TP2, "--model.backbone.tensor_model_parallel_size=2").config.model.backbone.tensor_model_parallel_size == 2


# --- mistakes in names and types ------------------------------------------------------------------------------------------------

TYPOS = {
    "train.step": "train.steps",
    "trian.steps": "train.steps",
    "resum": "resume",
    "data.codec.patchsize": "data.codec.patch_size",
    "model.backbone.num_layer": "model.backbone.num_layers",
}


@pytest.mark.parametrize("typo", TYPOS)
def test_typo_on_the_command_line(typo: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected = f"error: there is no option '{typo}'; did you mean '{TYPOS[typo]}'?"
    assert error_of(capsys, f"--{typo}", "3") == expected
    assert error_of(capsys, f"--{typo}=3") == expected


@pytest.mark.parametrize("typo", TYPOS)
def test_typo_in_a_file(typo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content: Any = 3
    for key in reversed(typo.split(".")):
        content = {key: content}
    file = write(tmp_path / "a.yaml", yaml.safe_dump(content))
    assert error_of(capsys, "--config", file) == f"error: there is no option '{typo}'; did you mean '{TYPOS[typo]}'?"


def test_a_name_like_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(capsys, "--zzzzzz", "3") == "error: there is no option 'zzzzzz'"


@pytest.mark.parametrize(
    ("option", "value"), [("train.steps", "many"), ("precision.dtype", "fp16"), ("engine", "other"), ("optimizer.betas", "[0.9]")]
)
def test_value_of_the_wrong_type(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(capsys, f"--{option}", value)
    assert option in line
    assert value.strip("[]") in line


def test_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "nowhere.yaml")
    assert path in error_of(capsys, "--config", path)


def test_no_abbreviations(capsys: pytest.CaptureFixture[str]) -> None:
    """An abbreviation that works today is another option's name tomorrow."""
    assert "there is no option 'run'" in error_of(capsys, "--run", "somewhere")


# --- contradictions -------------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[list[str], str]] = {
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
    "context parallelism": (["--parallel.context_parallel_size=2"], r"set parallel\.context_parallel_size to 1"),
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
        r"num_layers 5 is not divisible by the 2 pieces of the pipeline",
    ),
    "layers over chunks": ([*INTERLEAVED, "--model.backbone.num_layers=6"], r"num_layers 6 is not divisible by the 4 pieces"),
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
        ["--parallel.overlap_param_gather=true", "--parallel.overlap_grad_reduce=true"],
        ["--data.sequence_length=69"],
        ["--checkpoint.init_from=a", "--resume=never"],
        ["--model.alignment_loss_weight=1", "--model.alignment_features=8"],
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


# --- reading what was written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        [],
        [*TP2, *INTERLEAVED, "--parallel.sequence_parallel=true", "--precision.dtype=bf16"],
        ["--data.languages=[en, zh]", "--optimizer.betas=[0.5, 0.75]", "--data.generate=shapes", "--checkpoint.init_from=运行/a"],
        ["--model.backbone.activation_func=torch.nn.functional.gelu", "--model.backbone.recompute_granularity=selective"],
        ["--model.backbone.kv_channels=12", "--model.backbone.init_method_std=0.5"],
        # What megatron-core would take by itself, but not this program.
        [
            "--model.backbone.hidden_dropout=0.1",
            "--model.backbone.add_bias_linear=true",
            "--model.backbone.layernorm_epsilon=1e-5",
        ],
    ],
)
def test_resolved_configuration_reads_back_equal(options: list[str], tmp_path: Path) -> None:
    once = parse(*options)
    file = write(tmp_path / "config.yaml", once.yaml)
    again = parse_command_line(["--config", file])
    assert plain(again.config) == plain(once.config)
    assert again.yaml == once.yaml


def plain(config: Config) -> dict[str, Any]:
    """Of the functions that megatron-core makes for itself at each construction, only that they are there."""
    found = {f.name: getattr(config.model.backbone, f.name) for f in fields(config.model.backbone)}
    backbone = {name: "made" if callable(value) and "<locals>" in repr(value) else value for name, value in found.items()}
    backbone = {name: "made" if type(value).__name__ == "partial" else value for name, value in backbone.items()}
    rest = {
        f.name: dataclasses.asdict(getattr(config, f.name))
        for f in fields(config)
        if is_dataclass(getattr(config, f.name)) and f.name != "model"
    }
    model = {f.name: getattr(config.model, f.name) for f in fields(config.model) if f.name != "backbone"}
    scalars = {f.name: getattr(config, f.name) for f in fields(config) if not is_dataclass(getattr(config, f.name))}
    return {"backbone": backbone, "model": model, **rest, **scalars}


def test_resolved_configuration_is_short() -> None:
    """Of the backbone's 240 fields only those that this program or the user decides."""
    backbone = yaml.safe_load(parse("--model.backbone.num_query_groups=2").yaml)["model"]["backbone"]
    given = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
    assert {name: backbone[name] for name in given} == given
    assert backbone.keys() == given.keys() | configuration.BACKBONE_DEFAULTS.keys()


def test_dry_run() -> None:
    assert parse("--dry_run").dry_run
    assert not parse().dry_run


def options_of(section: type, prefix: str = "") -> list[str]:
    """Every dotted name below a dataclass, but not below the backbone, whose documentation is megatron-core's."""
    found = []
    for f in fields(section):
        name = f"{prefix}{f.name}"
        nested = getattr(configuration, str(f.type), None)
        if isinstance(nested, type) and is_dataclass(nested) and nested is not TransformerConfig:
            found += options_of(nested, f"{name}.")
        else:
            found.append(name)
    return found


def test_help_has_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_command_line(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    names = options_of(Config)
    assert len(names) > 60
    assert [name for name in names if f"--{name} " not in text] == []
    assert "--model.backbone.num_layers " in text


def test_help_documents_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_command_line(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for documentation in (
        "Noise levels drawn for each masked token in one pass.",
        "Share of text-to-image samples whose caption is dropped, for classifier-free guidance.",
        "Steps between checkpoints; one follows the last step too. 0: never.",
    ):
        assert documentation in text


def test_print_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse("--train.steps=17", "--print_config")
    assert stopped.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"]["steps"] == 17


@pytest.mark.parametrize("over", ["", "tiny_emoji.yaml", "tiny_stage2.yaml"])
def test_example_configurations_are_valid(over: str) -> None:
    examples = Path(__file__).resolve().parents[2] / "examples" / "configs"
    files = [examples / "tiny.yaml", *([examples / over] if over else [])]
    parse_command_line([option for file in files for option in ("--config", str(file))])
