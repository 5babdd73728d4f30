"""Configuration: which source wins, what is refused and in which words, and that what is printed can be read again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import yaml
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.transformer.transformer_config import TransformerConfig

from mmar_megatron import config as configuration
from mmar_megatron.config import Config, DiffusionConfig, RotaryScalingConfig, parse_command_line
from mmar_megatron.diffusion import ParameterizationName, SamplerKind, ScheduleName
from mmar_megatron.model.rotary import RotaryScaling
from tests.unit.command_line import FP8, INTERLEAVED, PP2, TP2, parse, share_parser


@pytest.fixture(scope="module", autouse=True)
def one_parser() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        share_parser(patch)
        yield


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
    assert backbone.deallocate_pipeline_outputs and not parse().config.model.backbone.deallocate_pipeline_outputs
    assert backbone.calculate_per_token_loss
    interleaved = parse(*INTERLEAVED).config.model.backbone
    assert (interleaved.virtual_pipeline_model_parallel_size, interleaved.overlap_p2p_comm) == (2, True)
    assert not interleaved.batch_p2p_comm and not interleaved.deallocate_pipeline_outputs
    assert interleaved.params_dtype is torch.float32


@pytest.mark.parametrize(
    ("recipe", "options", "formats", "spared"),
    [
        ("off", [], None, None),
        ("tensorwise", [], "hybrid", (1, 0)),
        ("delayed", [], "hybrid", None),
        ("blockwise", [], "e4m3", (1, 0)),
        ("blockwise", ["--model.backbone.num_layers_at_start_in_bf16=0"], "e4m3", (0, 0)),
        ("tensorwise", ["--model.backbone.num_layers_at_end_in_bf16=1"], "hybrid", (1, 1)),
    ],
)
def test_what_follows_from_fp8(recipe: str, options: list[str], formats: str | None, spared: tuple[int, int] | None) -> None:
    """Which formats, and which layers are in bf16; as megatron-core asks it, not of delayed scaling."""
    backbone = parse(*FP8, f"--precision.fp8={recipe}", *options).config.model.backbone
    assert (backbone.fp8, backbone.first_last_layers_bf16) == (formats, spared is not None)
    assert backbone.fp8_recipe == ("delayed" if recipe == "off" else recipe)
    assert (backbone.fp8_amax_history_len, backbone.fp8_amax_compute_algo) == (1024, "max")
    start, end = spared or (0, 0)
    kept = [is_first_last_bf16_layer(backbone, number) for number in range(4)]
    assert kept == [number < start or number >= 4 - end for number in range(4)]


@pytest.mark.parametrize(
    ("option", "source"),
    [
        ("tensor_model_parallel_size=2", "parallel.tensor_model_parallel_size makes it 1"),
        ("sequence_parallel=true", "parallel.sequence_parallel makes it False"),
        ("deallocate_pipeline_outputs=true", "parallel.pipeline_model_parallel_size makes it False"),
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


EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_every_example_is_a_configuration(file: Path) -> None:
    """The tiny model's and the chaos run's by themselves, the others over the tiny model's."""
    alone = file.stem in ("tiny", "chaos")
    over = [] if alone else ["--config", str(file.with_name("tiny.yaml")), "--data.generate", "null"]
    config = parse_command_line([*over, "--config", str(file)]).config
    assert all(source.path.startswith("data/") for source in config.data.sources.values())


@pytest.mark.parametrize(
    ("part", "name", "known"),
    [
        (DiffusionConfig, "schedule", ScheduleName),
        (DiffusionConfig, "parameterization", ParameterizationName),
        (DiffusionConfig, "sampler", SamplerKind),
        (RotaryScalingConfig, "scaling", RotaryScaling),
    ],
)
def test_choices_are_what_the_parts_know(part: type, name: str, known: object) -> None:
    assert get_type_hints(part)[name] == known
