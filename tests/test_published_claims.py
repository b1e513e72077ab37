"""The claims in the repository, decided anew from the tables beside them."""

from io import StringIO
from pathlib import Path

import pandas as pd
import pytest

from drs.claims import decide_claims
from drs.config import PROJECT_ROOT

STUDIES = sorted((PROJECT_ROOT / "results" / "reference").glob("*/tables"))
NAMES = ("run_id", "data", "model", "loss", "attack", "norm", "epsilon_label", "excluded", "device")


def read(tables: Path, name: str) -> pd.DataFrame:
    table = pd.read_csv(tables / f"{name}.csv", dtype=dict.fromkeys(NAMES, str))
    return table.fillna({"excluded": ""}) if "excluded" in table else table


@pytest.mark.parametrize("tables", STUDIES, ids=lambda tables: tables.parent.name)
def test_claims_are_what_the_rules_of_now_make_of_the_published_tables(tables: Path) -> None:
    decided = decide_claims(
        *(read(tables, name) for name in ("models", "correlations", "timing", "landing")),
        strong_suite=True, worst_case=read(tables, "worst_case"), sanity=read(tables, "sanity"),
        minimal_norms=read(tables, "minimal_norms"), outcomes=read(tables, "image_outcomes"),
    )  # fmt: skip
    text = StringIO()
    decided.to_csv(text, index=False)
    written = pd.read_csv(StringIO(text.getvalue()))
    pd.testing.assert_frame_equal(written, pd.read_csv(tables / "claims.csv"), rtol=1e-9)
