"""Planned runs against the trainer's own counting, and the rules by which a grid is laid out."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmar_megatron.config import parse_command_line
from mmar_megatron.data.batch import IGNORE
from mmar_megatron.data.loader import TrainLoader
from mmar_megatron.model.mmar_model import padded_vocab_size
from mmar_megatron.scaling.flops import ModelShape, StepCounts, step_flops
from mmar_megatron.sweep import journal
from mmar_megatron.sweep.grid import choose, expected_optimum, lay_out, learning_rate
from mmar_megatron.sweep.measuring import Measured
from mmar_megatron.sweep.planning import make_plan
from mmar_megatron.sweep.records import PlannedRun, SweepPlan, read_plan
from mmar_megatron.sweep.shapes import Shape
from mmar_megatron.sweep.spec import LearningRateSpec, Spec, read_spec
from mmar_megatron.training.building import open_source
from tests.unit.command_line import share_parser
from tests.unit.sweep.sweeps import tiny_options

ROOT = Path(__file__).resolve().parents[3]
BUDGETS = [2e10, 6e10]


@pytest.fixture(scope="module")
def spec_path(coarse_shapes_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    base = {**tiny_options(), "preview": {"every": 100}}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    values = {
        "configs": [str(folder / "base.yaml")],
        "family": {"widths": [64, 16, 32, 48], "head_size": 8, "width_per_layer": 16, "heads_per_group": 2, "vit_ratio": 0.5},
        "budgets": BUDGETS,
        "sizes_per_budget": 3,
        "learning_rate": {"value": 1e-3, "width": 32},
        "seeds": [7],
        "max_epochs": 10,
        "options": {"data": {"path": str(coarse_shapes_dir)}, "model": {"backbone": recompute}, "validation": {"samples": 16}},
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def table_and_plan(spec_path: Path) -> tuple[str, SweepPlan]:
    with pytest.MonkeyPatch.context() as patch:
        share_parser(patch)
        table = make_plan(spec_path, out=spec_path.parent / "sweep", say=lambda _: None)
    return table, read_plan(spec_path.parent / "sweep")


def arguments(plan: SweepPlan, run: PlannedRun) -> list[str]:
    words = plan.command(run)
    return words[words.index("--config") :]


def test_each_run_has_its_budget_by_the_trainers_count(
    table_and_plan: tuple[str, SweepPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shape from the configuration that a run starts with, rows counted in its real batches, as the trainer counts them."""
    share_parser(monkeypatch)
    _, plan = table_and_plan
    assert [run.budget for run in plan.runs] == [budget for budget in BUDGETS for _ in range(3)]
    counts: StepCounts | None = None
    for run in plan.runs:
        config = parse_command_line(arguments(plan, run)).config
        source = open_source(config)
        batches = 120
        if counts is None:  # the data are the same for all
            loader = TrainLoader(
                source,
                seed=7,
                timestep_multiplier=1,
                micro_batch_size=8,
                global_batch_size=8,
                data_parallel_rank=0,
                data_parallel_size=1,
            )
            labels = masked = images = 0
            for batch in islice(iter(loader), batches):
                labels += int((batch.labels_BS != IGNORE).sum())
                masked += int(batch.masked_MN.sum())
                images += len(batch.latents_MNC)
            counts = StepCounts(sequences=8 * batches, sequence_length=48, images=images, labels=labels, masked=masked)
            assert run.tokens / run.steps == pytest.approx(loader.state.tokens / batches, rel=0.02)
        shape = ModelShape.of(
            config.model,
            vocab_size=padded_vocab_size(config.model, source.tokenizer.vocab_size),
            tokens_per_image=source.codec.num_tokens,
            token_channels=source.codec.channels,
            condition_width=config.model.head.width,
        )
        of_a_step = step_flops(shape, counts, repeated_layers=shape.num_layers).executed / batches
        assert run.flops / run.steps == pytest.approx(of_a_step, rel=0.01)
        assert abs(run.flops - run.budget) <= 0.5 * run.flops / run.steps, "within half a step"
        assert config.train.steps == run.steps and config.run_dir == str(plan.run_dir(run))


def test_settings_follow_from_size_and_length(table_and_plan: tuple[str, SweepPlan], monkeypatch: pytest.MonkeyPatch) -> None:
    share_parser(monkeypatch)
    table, plan = table_and_plan
    seen = set()
    for run in plan.runs:
        config = parse_command_line(arguments(plan, run)).config
        backbone = config.model.backbone
        width = backbone.hidden_size
        seen.add(width)
        assert backbone.num_layers == width // 16 and backbone.num_attention_heads == width // 8
        assert backbone.num_query_groups == width // 16 and backbone.ffn_hidden_size == 32 * math.ceil(width / 12)
        assert config.model.embedding_vit.hidden_size == width // 2
        assert backbone.init_method_std == pytest.approx((0.4 / width) ** 0.5, rel=1e-4)
        assert config.optimizer.lr == run.learning_rate == pytest.approx(1e-3 * 32 / width, rel=1e-5)
        assert config.optimizer.warmup_steps == math.ceil(0.05 * run.steps)
        assert config.validation.every == config.checkpoint.every == math.ceil(run.steps / 4)
        assert (config.validation.samples, config.preview.every, config.seed) == (16, 0, 7)
        assert run.name in table
    assert len(seen) >= 3
    lines = table.splitlines()
    assert max(map(len, lines)) <= 300 and lines[0].split()[:3] == ["run", "parameters", "lr"]
    repeated = [run.name for run in plan.runs if run.epochs > 10]
    assert repeated and [line.split()[0] for line in lines if line.endswith("*")] == repeated
    assert f"{len(repeated)} runs, marked by *, read their data more than 10 times" in table
    assert "2 budgets of 3 sizes give wide intervals" in table


def test_a_plan_may_grow_but_not_change_what_has_begun(spec_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share_parser(monkeypatch)
    out = spec_path.parent / "grown"
    values = yaml.safe_load(spec_path.read_text())

    def planned(**changes: Any) -> None:
        path = spec_path.parent / "changed.yaml"
        path.write_text(yaml.safe_dump(values | changes))
        make_plan(path, out=out, say=lambda _: None)

    planned(budgets=[2e10], validations=2)
    planned(budgets=[2e10])
    (first, *_) = read_plan(out).runs
    journal.begin(read_plan(out).run_dir(first))
    planned(budgets=[2e10, 6e10])
    assert len(read_plan(out).runs) == 6
    for changes in ({"budgets": [6e10]}, {"budgets": [2e10, 6e10], "seeds": [8]}):
        with pytest.raises(ValueError, match=f"has begun the run {first.name}, which this plan would change or leave out"):
            planned(**changes)
    assert len(read_plan(out).runs) == 6


def test_cluster_example_on_this_machine(coarse_shapes_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.1B to 7B under DeepSpeed, weights on the meta device; of the configuration the data alone are others."""
    monkeypatch.chdir(ROOT)
    share_parser(monkeypatch)
    codec = {"kind": "patch", "path": None, "image_size": 32, "patch_size": 8}
    local = {"data": {"sources": {}, "path": str(coarse_shapes_dir), "codec": codec, "packing_window": 256}}
    (tmp_path / "local.yaml").write_text(yaml.safe_dump(local))
    values = yaml.safe_load((ROOT / "examples/scaling/sweep_cluster.yaml").read_text())
    values["configs"].append(str(tmp_path / "local.yaml"))
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(values))
    make_plan(tmp_path / "spec.yaml", out=tmp_path / "sweep", say=lambda _: None)
    plan = read_plan(tmp_path / "sweep")
    assert len(plan.runs) == 30
    sizes = sorted({run.n_params for run in plan.runs})
    assert 0.5e8 < sizes[0] < 1.5e8 and 6e9 < sizes[-1] < 7.5e9
    assert plan.launch[-2:] == ["--nproc_per_node", "8"] and "--time=24:00:00" in plan.slurm
    for run in plan.runs:
        assert abs(run.flops - run.budget) <= 0.5 * run.flops / run.steps
    config = parse_command_line(arguments(plan, plan.runs[-1])).config
    assert config.engine == "deepspeed" and config.model.backbone.bf16 and config.model.backbone.hidden_size == 4096


def test_tiny_example(coarse_shapes_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On other data: 3 budgets of 4 sizes, as its heading says."""
    monkeypatch.chdir(ROOT)
    share_parser(monkeypatch)
    local = {"data": {"path": str(coarse_shapes_dir), "codec": {"patch_size": 8}}}
    (tmp_path / "local.yaml").write_text(yaml.safe_dump(local))
    values = yaml.safe_load((ROOT / "examples/scaling/sweep_tiny.yaml").read_text())
    values["configs"].append(str(tmp_path / "local.yaml"))
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(values))
    make_plan(tmp_path / "spec.yaml", out=tmp_path / "sweep", say=lambda _: None)
    runs = read_plan(tmp_path / "sweep").runs
    assert [run.budget for run in runs] == [budget for budget in (2.5e12, 5e12, 1e13) for _ in range(4)]


# --- the rules, on shapes whose step costs 6 N FLOPs for each of its 100 tokens -------------------------------------------------


def shapes(*sizes: float) -> list[Measured]:
    return [
        Measured(
            shape=Shape(f"n{size:g}", {}),
            options={},
            width=round(size**0.5),
            n_params=round(size),
            step_flops=600 * round(size),
            step_tokens=100,
            step_epochs=1e-4,
        )
        for size in sizes
    ]


def spec(**changes: Any) -> Spec:
    given = {"configs": [], "budgets": [1e12], "learning_rate": LearningRateSpec(value=1e-3, width=100), "sizes_per_budget": 3}
    return Spec(**{**given, **changes})


LADDER = [1e3 * 1.5**k for k in range(20)]


@pytest.mark.parametrize("budget", [1e10, 1e12, 1e14])
def test_the_optimum_is_where_the_budget_pays_20_tokens_for_each_parameter(budget: float) -> None:
    best = (budget / (6 * 20)) ** 0.5
    for measured in (shapes(*LADDER), shapes(1e3, 1e7), shapes(1e5)):
        assert expected_optimum(measured, budget=budget, tokens_per_parameter=20) == pytest.approx(best, rel=1e-6)


def test_sizes_lie_around_the_optimum() -> None:
    chosen = [each.n_params for each in choose(shapes(*LADDER), around=1e5, count=6, spread=3)]
    assert len(set(chosen)) == 6 and chosen == sorted(chosen)
    assert chosen[0] == pytest.approx(1e5 / 3, rel=0.25) and chosen[-1] == pytest.approx(3e5, rel=0.25)
    assert sum(size < 1e5 for size in chosen) == 3
    # At the end of the ladder those nearest to the optimum are kept.
    assert [each.n_params for each in choose(shapes(1e3, 2e3, 4e3, 8e3, 1e6), around=1e3, count=3, spread=3)] == [1e3, 2e3, 4e3]


def test_equal_seeds_for_all_sizes() -> None:
    runs, _ = lay_out(spec(seeds=[3, 4], budgets=[1e12, 1e13]), shapes(*LADDER))
    assert len(runs) == 12 == len({run.name for run in runs})
    for seed in (3, 4):
        assert [(run.budget, run.shape) for run in runs if run.seed == seed] == [(run.budget, run.shape) for run in runs[::2]]


def test_what_a_grid_refuses_and_what_it_says() -> None:
    with pytest.raises(ValueError, match=r"3 runs would have fewer than 50 steps: 1e08-n\S+ \(\d+\), .*; raise the budgets"):
        lay_out(spec(budgets=[1e8]), shapes(1e4, 2e4, 4e4))
    with pytest.raises(ValueError, match="there are 2 shapes for sizes_per_budget 3: add shapes"):
        lay_out(spec(), shapes(1e4, 2e4))
    _, remarks = lay_out(spec(), shapes(1e3, 2e3, 4e3))
    assert any(
        "budget 1e+12: the optimum is expected at 9.13e+04 parameters" in said and "add larger" in said for said in remarks
    )
    _, remarks = lay_out(spec(max_epochs=1e9, budgets=[10.0**k for k in range(9, 14)], sizes_per_budget=6), shapes(*LADDER))
    assert remarks == []


def test_learning_rate_falls_with_the_width() -> None:
    assert learning_rate(LearningRateSpec(value=1e-3, width=128), width=512) == 2.5e-4
    assert learning_rate(LearningRateSpec(value=1e-3, width=128, exponent=-0.5), width=512) == 5e-4


GOOD = "configs: []\nbudgets: [1e12]\nlearning_rate: {value: 1e-3, width: 32}\nfamily: {widths: [32]}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + "budget: 1", "spec.yaml: .*budget"),
        (GOOD.replace("1e12", "much"), "spec.yaml: .*budgets"),
        (GOOD.replace("1e12", "-1"), "the smallest of budgets is -1.0: it must be above 0"),
        (GOOD.replace("family: {widths: [32]}", ""), "give either `family`"),
        (GOOD + "shapes: [{name: a, options: {}}]", "give either `family`"),
        (GOOD + "warmup: 1.5", "warmup is 1.5"),
        (GOOD + "spread: 1", "spread is 1.0"),
        (GOOD + "seeds: [1, 1]", "`seeds` has something twice"),
        (GOOD.replace("1e12", "1e12, 1.0000001e12"), "`budgets` has something twice"),
        (GOOD + "slurm: [time=3]", "not a long option of sbatch"),
    ],
)
def test_mistakes_in_a_specification(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(GOOD)
    assert read_spec(path).budgets == [1e12]
    path.write_text(text)
    with pytest.raises(ValueError, match=said) as refused:
        read_spec(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"options": {"train": {"steps": 5}}}, "options may not have train.steps, which the sweep sets"),
        ({"family": {"widths": [20], "head_size": 8}}, "width 20 is not a multiple of family.head_size 8"),
        ({"family": {"widths": [24], "head_size": 8, "heads_per_group": 2}}, "3 heads, which do not divide"),
        ({"family": None, "shapes": [{"name": "a/b", "options": {}}]}, "name 'a/b' becomes that of a directory"),
        ({"processes": 3}, "3 data-parallel ranks: change one of them"),
    ],
)
def test_mistakes_in_what_is_to_be_trained(
    spec_path: Path, tmp_path: Path, changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    share_parser(monkeypatch)
    values = yaml.safe_load(spec_path.read_text()) | changes
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not None}))
    with pytest.raises(ValueError, match=said):
        make_plan(tmp_path / "spec.yaml", out=tmp_path / "sweep", say=lambda _: None)
    assert not (tmp_path / "sweep").exists()
