"""Numbers and tables as Markdown."""

import numpy as np
import pandas as pd
import pytest

from drs.markdown import NONE, escape, fixed, mean_sd, probability, significant, table


def test_cells_are_escaped() -> None:
    assert escape("a|b\n_c_ worst_linf <d> `e` *f* \\") == "a\\|b \\_c\\_ worst_linf &lt;d&gt; \\`e\\` \\*f\\* \\\\"
    assert escape("0.1 [0, 1] a[b](c) [d][e]") == "0.1 [0, 1] a[b\\](c) [d\\][e]"
    assert escape(None) == escape(float("nan")) == ""
    assert table(["a", "b"], [["1", "2"]]).splitlines()[1] == "| --- | ---: |"
    with pytest.raises(ValueError, match="number of cells"):
        table(["a", "b"], [["1"]])


def test_numbers_are_rounded_and_dashed() -> None:
    assert (fixed(-0.004), fixed(-1.236), fixed(0.5, 1, sign=True), fixed(np.nan)) == ("0.00", "−1.24", "+0.5", NONE)
    assert [significant(value) for value in (1234.5, 0.012345, 0)] == ["1234", "0.0123", "0"]
    assert (probability(0.0001), probability(0.0421), probability(np.nan)) == ("&lt; 0.001", "0.042", NONE)
    assert mean_sd(pd.Series([0.5, 0.7, np.nan]), scale=100.0) == "60.0 ± 14.1"
    assert mean_sd(pd.Series([1.234, 1.3]), digits=None) == "1.27 ± 0.05"
    assert mean_sd(pd.Series([np.nan])) == NONE
