"""Which models and settings fail a sanity check, told in every row of every table that is about one of them."""

import pandas as pd

from drs.selection import group_models, standard_models

MARK = "†"  # after a model that fails a sanity check, or a setting of which one does
MARK_NOTE = (
    f"A loss marked {MARK} has a model that fails at least one sanity check. In a figure, a hollow marker is such a "
    "model or, where it stands for all models of a loss, such a loss. The section on sanity checks says which check."
)
COLUMN = "failed_checks"
SETTING = ["data", "model", "loss", "loss_weight"]
_UNMARKED = ("comparators", "failures")
"""Tables that count failed checks themselves, or hold no model."""


def has_failed(rows: pd.DataFrame) -> "pd.Series[bool]":
    """Say for every row whether its model, or one of its setting, fails a sanity check."""
    if COLUMN not in rows:
        return pd.Series(False, index=rows.index)
    names = rows[COLUMN].astype(object)
    return names.notna() & (names.astype(str).str.strip() != "")


def failed_checks_of(models: pd.DataFrame, run_id: str) -> list[str] | None:
    """Return the sanity checks that a model of models.csv fails, or None where the table says nothing of it."""
    own = models[models["run_id"] == run_id]
    if own.empty or COLUMN not in own:
        return None
    return [name for name in own[COLUMN].fillna("").astype(str).iloc[0].split(";") if name]


def correlated_note(models: pd.DataFrame) -> str:
    """Say how many of the models that are correlated fail a sanity check, group by group; nothing where none does.

    A coefficient is of many models, so that no mark can stand beside it.
    """
    told = []
    for data, model, rows in group_models(standard_models(models)):
        failing = int(has_failed(rows).sum())
        told += [f"{failing} of {len(rows)} models of {data}, {model}"] if failing else []
    if not told:
        return ""
    return (
        f"At least one sanity check ({MARK}) is failed by {'; '.join(told)}. Their accuracies enter the coefficients "
        "like all others."
    )


def mark_failed_checks(tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Give every table of models or settings the column ``failed_checks``, where models.csv has one.

    Returns:
        The tables. A row of one model has the names of the checks that it fails, joined by semicolons; a row of one
        setting has how many of its models fail each, such as ``objective_gap 2/6; more_steps 1/6``, excluded models
        left out. Both are empty where no check fails.
    """
    models = tables["models"]
    if COLUMN not in models:
        return tables
    failed = models.assign(**{COLUMN: models[COLUMN].astype(object).fillna("").astype(str)})
    of_model = failed.drop_duplicates("run_id").set_index("run_id")[COLUMN]
    reasons = models["excluded"].astype(object) if "excluded" in models else pd.Series("", index=models.index)
    usable = failed[reasons.isna() | (reasons.astype(str).str.strip() == "")]
    of_setting = usable.groupby(SETTING)[COLUMN].agg(counted)
    marked = {}
    for name, table in tables.items():
        marked[name] = table
        if name in _UNMARKED:
            continue
        if "run_id" in table:
            marked[name] = table.assign(**{COLUMN: table["run_id"].map(of_model).fillna("")})
        elif set(SETTING) <= set(table):
            keys = pd.MultiIndex.from_frame(table[SETTING].astype({"loss_weight": float}))
            marked[name] = table.assign(**{COLUMN: of_setting.reindex(keys).fillna("").to_numpy()})
    return marked


def counted(failed: "pd.Series[str]") -> str:
    """Write how many of some models fail each check, from the names that each of them fails."""
    names = failed.str.split(";").explode()
    counts = names[names != ""].value_counts(sort=False)
    return "; ".join(f"{name} {number}/{len(failed)}" for name, number in counts.items())
