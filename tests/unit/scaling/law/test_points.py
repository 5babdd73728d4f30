"""What is read from a table, and what is said of one that cannot be fitted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmar_megatron.scaling.law.points import read_points

HEAD = "n_params,n_tokens,loss\n"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "points.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_columns_are_found_by_name_and_others_ignored(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "\ufeffnote, loss ,n_tokens,n_params,flops,run,val\n"
        'good,2.5,1e9,1e7,7e16,a,3\n"odd, and ""quoted""",2.25,2000000000,10000000,1.3e17,a,4\n,2,1e9,3e7,2e17,,5\n',
    )
    points = read_points(path, losses=["loss", "val"])
    np.testing.assert_array_equal(points.params_I, [1e7, 1e7, 3e7])
    np.testing.assert_array_equal(points.tokens_I, [1e9, 2e9, 1e9])
    np.testing.assert_array_equal(points.losses["val"], [3, 4, 5])
    np.testing.assert_array_equal(points.run_I, [0, 0, 1])
    assert points.names == ("a, row 1", "a, row 2", "row 3")
    assert points.flops_are_given and points.budgets is None
    assert points.flops_per_product == pytest.approx(np.cbrt(7 * 6.5 * 20 / 3))
    assert points.flops_spread == pytest.approx(7 / 6.5)


def test_flops_are_six_nd_where_there_is_no_column(tmp_path: Path) -> None:
    points = read_points(written(tmp_path, HEAD + "1e7,1e9,3\n2e7,1e9,2\n"), losses=["loss"])
    np.testing.assert_array_equal(points.flops_I, [6e16, 12e16])
    assert not points.flops_are_given and points.flops_per_product == pytest.approx(6)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("n_params,loss\n1,2\n", "no column `n_tokens`, only n_params, loss$"),
        (
            "n_params,n_tokens,val\n1,2,3\n",
            "no column `loss`, only n_params, n_tokens, val: name the column of the loss by --loss",
        ),
        ("", "no column `n_params`"),
        (HEAD, "no rows"),
        (HEAD + "1e7,1e9,3\n1e7,2e9,nan\n", "row 2, line 3: `loss` is nan, which is not finite"),
        (HEAD + "1e7,1e9,3\n1e7,2e9,inf\n", "row 2, line 3: `loss` is inf, which is not finite"),
        (HEAD + "1e7,1e9,\n", "row 1, line 2: `loss` is missing"),
        (HEAD + "1e7,1e9\n", "row 1, line 2: `loss` is missing"),
        (HEAD + "1e7,1e9,-3\n", "row 1, line 2: `loss` is -3, but must be above 0"),
        (HEAD + "0,1e9,3\n", "row 1, line 2: `n_params` is 0, but must be above 0"),
        (HEAD + "1e7,many,3\n", "row 1, line 2: `n_tokens` is 'many', which is not a number"),
        ("run," + HEAD + "small,1e7,1e9,nan\n", r"row 1 \(small\), line 2: `loss` is nan"),
    ],
)
def test_tables_that_cannot_be_fitted_are_refused_by_row(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_points(written(tmp_path, text), losses=["loss"])
