"""The picture of a run, from a real metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from mmar_megatron.training.metrics import MetricsWriter
from tools.plot_run import PANELS, describe, draw, load_runs, main, running_mean


def make_run(run_dir: Path, *, steps: int = 40, validation: bool = True) -> Path:
    writer = MetricsWriter(run_dir, resume_step=None, enabled=True)
    for step in range(1, steps + 1):
        metrics: dict[str, float | None] = {
            "loss_text": 3.0 / step,
            "loss_image": 0.8 / step if step != 7 else float("nan"),
            "grad_norm": 1.0 / step,
            "lr": 1e-3,
            "tokens_per_second": 17000.0,
            "mfu": None,
        }
        if validation and step % 10 == 0:
            metrics |= {"val_loss_text": 2.0 / step, "val_loss_text_wrong_image": 3.0}
            metrics |= {"val_loss_image": 0.5, "val_loss_image_zero": 0.8, "val_loss_image_wrong_text": 1.5}
        writer.write(metrics, step=step)
    writer.close()
    return run_dir


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]


def curves(axes: Axes) -> list[np.ndarray]:
    """(steps, values) of each line of a panel, [2, P]."""
    return [np.asarray(line.get_xydata()).T for line in axes.get_lines()]


def test_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(tmp_path / "quickstart")
    main([str(run_dir)])
    out = run_dir / "curves.png"
    assert capsys.readouterr().out == f"wrote {out}\n"
    pixels_HW3 = np.asarray(Image.open(out).convert("RGB"))
    assert pixels_HW3.shape[0] > 600
    assert pixels_HW3.shape[1] > 1200
    run_colour = np.array([0x00, 0x72, 0xB2])
    assert (pixels_HW3 == run_colour).all(axis=-1).sum() > 1000, "the run's lines are not on the picture"
    assert not list(run_dir.glob(".partial*"))


def test_lines_hold_the_logged_values(tmp_path: Path) -> None:
    runs = load_runs([make_run(tmp_path / "a")])
    figure = draw(runs)
    assert titles(figure) == [panel.title for panel in PANELS]
    training_2P, mean_2P, held_out_2P = curves(figure.axes[0])
    assert training_2P == pytest.approx(np.array([range(1, 41), [3.0 / step for step in range(1, 41)]]))
    assert mean_2P[0] == pytest.approx(training_2P[0])
    assert held_out_2P == pytest.approx(np.array([[10, 20, 30, 40], [0.2, 0.1, 2 / 30, 0.05]]))
    image_training_2P = curves(figure.axes[1])[0]
    assert 7 not in image_training_2P[0], "a step that is not finite is left out"
    own_2P, other_2P = curves(figure.axes[2])
    assert own_2P[1] == pytest.approx(0.5 / 0.8)
    assert other_2P[1] == pytest.approx(1.5 / 0.8)
    texts = [text.get_text() for text in figure.axes[2].texts]
    assert {"own caption", "another's", "predicting zero"} <= set(texts)


def test_several_runs_with_and_without_validation(tmp_path: Path) -> None:
    directories = [make_run(tmp_path / "a"), make_run(tmp_path / "b", steps=25, validation=False)]
    main([*map(str, directories), "--out", str(tmp_path / "new" / "both.png")])
    assert (tmp_path / "new" / "both.png").exists()
    runs = load_runs(directories)
    assert len({run.colour for run in runs}) == 2
    assert describe(runs[0]) == [
        "40 steps",
        "held-out text loss 0.050",
        "held-out image loss 0.500, 62.5% of zero's",
        "another's caption costs 3.0x in image loss",
        "another's image: text loss 3.00",
    ]
    assert describe(runs[1]) == ["25 steps"]


def test_panels_without_data_are_left_out(tmp_path: Path) -> None:
    figure = draw(load_runs([make_run(tmp_path / "a", validation=False)]))
    assert titles(figure) == ["Text loss", "Image loss", "Gradient norm", "Learning rate", "Throughput"]


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    runs = load_runs([make_run(tmp_path / "x" / "run", steps=2), make_run(tmp_path / "y" / "run", steps=2)])
    assert [run.name for run in runs] == [str(tmp_path / "x" / "run"), str(tmp_path / "y" / "run")]


def test_a_directory_without_metrics_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([str(tmp_path)])
    assert exit_info.value.code == 2
    assert "has no logged step" in capsys.readouterr().err
    assert not (tmp_path / "curves.png").exists()


def test_running_mean() -> None:
    assert running_mean([5.0] * 100) == pytest.approx([5.0] * 100)
    rising = [float(i) for i in range(100)]
    assert running_mean(rising)[2:-2] == pytest.approx(rising[2:-2])
    assert running_mean([1.0]) == [1.0]
