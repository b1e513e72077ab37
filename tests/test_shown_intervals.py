"""Reports and figures show intervals that hold for other images too, and say which they show."""

from functools import partial

import numpy as np
import pandas as pd
from synthetic import study_tables

from drs import figure_cost, figure_summary
from drs.figure_plan import plan_figures
from drs.report_checks import masking_section
from drs.report_tables import differences_section
from drs.report_text import limits_section
from drs.shown_intervals import shown_differences, shown_gains

TABLES = study_tables()
BOTH, ALONE = (
    "95 % intervals over seeds and images, for other seeds and other images",
    "95 % t intervals over seeds, for",
)


def with_images(tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Give gains intervals over seeds and images of 17 points around 0, and those of norms and clean accuracy none."""
    differences, comparators = tables["paired_differences"], tables["comparators"]
    attacked = ~differences["attack"].isin(["clean", "norm.cw"])
    crossed = {"n_images": 100.0, "crossed_low": -0.17, "crossed_high": 0.17}
    wide = {name: np.where(attacked, value, np.nan) for name, value in crossed.items()}
    ends = {
        f"{gain}_crossed_{end}": 0.17 * sign
        for gain in ("gain_pgd", "gain_worst", "share")
        for end, sign in (("low", -1), ("high", 1))
    }
    shown = comparators["gain_pgd"].notna()
    ends = {name: np.where(shown, value, np.nan) for name, value in ends.items()}
    return tables | {
        "paired_differences": differences.assign(**wide),
        "comparators": comparators.assign(**ends),
    }


def test_differences_are_shown_with_the_interval_that_counts_images() -> None:
    tables = with_images(TABLES)
    text = differences_section(tables["paired_differences"], tables["accuracy"])
    before = differences_section(TABLES["paired_differences"], TABLES["accuracy"])
    assert BOTH in text and "but of clean accuracy and norms over seeds alone" in text
    assert ALONE in before and BOTH not in before and "but of clean" not in before
    assert "[−17.0, +17.0]" in text and "[−17.0, +17.0]" not in before
    rows = shown_differences(tables["paired_differences"]).set_index("attack")
    old = TABLES["paired_differences"].set_index("attack")
    assert rows.loc["clean", "ci_low"].tolist() == old.loc["clean", "ci_low"].tolist()
    assert set(rows.loc["pgd@mean", "ci_high"]) == {0.17}


def test_gains_are_shown_with_the_interval_that_counts_images() -> None:
    text, before = masking_section(with_images(TABLES)["comparators"]), masking_section(TABLES["comparators"])
    assert BOTH in text and "[−17.0, +17.0]" in text and "[−0.17, 0.17]" in text
    assert ALONE in before and "[−17.0, +17.0]" not in before
    assert shown_gains(TABLES["comparators"]) is TABLES["comparators"]


def test_limits_say_what_the_interval_of_a_difference_counts() -> None:
    assert "comes from seeds and images" in limits_section(with_images(TABLES), True)
    assert "comes from the seeds" in limits_section(TABLES, True)


def test_figures_draw_the_interval_that_counts_images() -> None:
    tables = with_images(TABLES)
    plans = {figure.kind: figure for figure in plan_figures(tables)}
    for kind in ("masking_gap", "summary"):
        assert BOTH in plans[kind].caption
    draw = {
        "gap": partial(figure_cost.masking_gap, tables["comparators"]),
        "summary": partial(figure_summary.summary, tables["comparators"], tables["timing"]),
    }
    for name, drawn in draw.items():
        bars = [
            [float(x) for x in path.vertices[:, 0]]
            for axis in drawn().axes[:2]
            for lines in axis.collections
            for path in lines.get_paths()
        ]
        assert any(np.allclose(bar, [-17, 17]) for bar in bars), name
