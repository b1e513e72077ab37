"""A made-up study with every table of a real one, for tests of what only reads tables."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from drs.comparators import comparator_table
from drs.granulated import granulated_table
from drs.marks import mark_failed_checks
from drs.partial import partial_correlation_table

STATISTICS = [
    "nonlabel_var_log", "nonlabel_std", "nonlabel_cv", "nonlabel_entropy", "nonlabel_max", "nonlabel_gap",
    "label_prob", "margin", "logit_norm",
]  # fmt: skip
LINF, L2 = ["fgsm", "pgd", "worst_linf"], ["cw_torchattacks", "cw", "worst_l2"]
GRID = {
    ("mnist", "lenet"): ([0.0, 0.0005, 0.001, 0.005, 0.02, 0.05], 4, ["0.1", "0.2", "0.3"], ["1", "2", "3"]),
    ("cifar10", "smallcnn"): ([0.0, 0.001, 0.005], 3, ["1/255", "2/255", "4/255"], ["0.25", "0.5", "1"]),
}
KEYS = ["run_id", "data", "model", "loss", "loss_weight", "seed"]


def _epsilon(label: str) -> float:
    top, _, bottom = label.partition("/")
    return float(top) / float(bottom or 1)


def _accuracy(rng: np.random.Generator) -> tuple[pd.DataFrame, pd.DataFrame]:
    cells, statistics = [], []
    for (data, model), (weights, seeds, linf, l2) in GRID.items():
        start = 0.97 if data == "mnist" else 0.80
        for weight in weights:
            for seed in range(seeds):
                run_id = f"{data}-{weight:g}-{seed}"
                loss = "dr_softmax" if weight else "ce"
                excluded = "near chance on clean data" if (data, weight, seed) == ("mnist", 0.05, 3) else None
                identity = dict(zip(KEYS, (run_id, data, model, loss, weight, seed), strict=True))
                gain = np.log10(1 + weight / 0.0005)
                clean = start - 0.01 * gain + rng.normal(0, 0.004)
                cells.append({**identity, "attack": "clean", "norm": "", "epsilon": 0.0, "epsilon_label": "0",
                              "n": 10000, "robust_accuracy": clean, "clean": clean, "cumulative": False,
                              "excluded": excluded})  # fmt: skip
                for attack in LINF + L2:
                    weak = {"fgsm": 1.0, "pgd": 0.8, "cw_torchattacks": 1.1}.get(attack, 0.15)
                    labels = linf if attack in LINF else l2
                    if attack == "cw_torchattacks":
                        labels = [*labels, "inf"]
                    for step, label in enumerate(labels):
                        share = clean * np.exp(-(step + 1) * (1.3 - 0.4 * weak * gain)) + rng.normal(0, 0.01)
                        cells.append({**identity, "attack": attack, "norm": "linf" if attack in LINF else "l2",
                                      "epsilon": _epsilon(label) if label != "inf" else np.inf, "epsilon_label": label,
                                      "n": 100 if attack in ("cw", "worst_l2") else 1000,
                                      "robust_accuracy": float(np.clip(share, 0, 1)), "cumulative": False,
                                      "clean": round(clean, 2),
                                      "excluded": excluded})  # fmt: skip
                noise = rng.normal(0, 0.05, len(STATISTICS))
                values = [6.0 / (1 + 400 * weight) * (1 + noise[0]), *(0.3 / (1 + gain) + noise[1:] / 5)]
                statistics.append({**identity, **{f"stat.{k}": v for k, v in zip(STATISTICS, values, strict=True)}})
    return pd.DataFrame(cells), pd.DataFrame(statistics)


def _models(accuracy: pd.DataFrame, statistics: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    cells = accuracy[accuracy["attack"] != "clean"]
    named = cells.assign(column="acc." + cells["attack"] + "@" + cells["epsilon_label"])
    wide = named.pivot(index="run_id", columns="column", values="robust_accuracy")
    finite = cells[np.isfinite(cells["epsilon"])]
    means = finite.groupby(["run_id", "attack"])["robust_accuracy"].mean().unstack()
    means.columns = [f"acc.{name}@mean" for name in means.columns]
    clean = accuracy[accuracy["attack"] == "clean"].set_index("run_id")
    models = statistics.set_index("run_id").join(wide).join(means)
    models["clean_accuracy"] = clean["robust_accuracy"]
    models["excluded"] = clean["excluded"]
    models["train_seconds"] = rng.uniform(20, 25, len(models))
    models["images_seen"] = 400000
    models["n_clean"], models["n_attacked"] = 10000, 1000
    models["norm.cw"] = 1.2 + rng.normal(0, 0.05, len(models))
    return models.reset_index()


def _correlations(models: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    rows = []
    for data, model in [*GRID, ("pooled", "pooled")]:
        inside = models[(models["data"] == data) | (data == "pooled")]
        inside = inside[inside["excluded"].isna()]
        for statistic in STATISTICS:
            for column in [name for name in inside if str(name).startswith("acc.")] + ["clean_accuracy"]:
                both = inside[[f"stat.{statistic}", column]].dropna()
                if both.empty:
                    continue
                for method in ("spearman", "pearson", "kendall"):
                    value = both.corr(method="pearson").iloc[0, 1]
                    p = float(rng.uniform(0, 0.05 if abs(value) > 0.5 else 1))
                    rows.append({"data": data, "model": model, "statistic": statistic,
                                 "attack": str(column).removeprefix("acc.").replace("clean_accuracy", "clean"),
                                 "method": method, "n_models": len(both), "coefficient": value,
                                 "ci_low": max(-1, value - 0.2), "ci_high": min(1, value + 0.2),
                                 "p_value": p, "q_value": min(1, 1.5 * p)})  # fmt: skip
    return pd.DataFrame(rows)


def _profile(rng: np.random.Generator) -> pd.DataFrame:
    rows = []
    for (data, model), (weights, seeds, _, _) in GRID.items():
        for weight in weights:
            for rank in range(1, 10):
                median = 1e-2 * 10 ** (-rank * 0.7 / (1 + 100 * weight)) * (1 + rng.uniform(0, 0.05))
                rows.append({"data": data, "model": model, "loss": "dr_softmax" if weight else "ce",
                             "loss_weight": weight, "rank": rank, "q25": median / 3, "median": median,
                             "q75": median * 3, "n": 10000 * seeds})  # fmt: skip
    return pd.DataFrame(rows)


def _landing(models: pd.DataFrame, rng: np.random.Generator) -> tuple[pd.DataFrame, pd.DataFrame]:
    rows, matrices = [], []
    for row in models.to_dict("records"):
        linf, l2 = GRID[row["data"], row["model"]][2:]
        for attack, labels in {"fgsm": linf, "pgd": linf, "cw_torchattacks": ["inf"], "cw": l2}.items():
            for label in labels:
                rows.append({**{key: row[key] for key in KEYS}, "attack": attack, "epsilon_label": label,
                             "n_flips": int(rng.integers(200, 900)), "runner_up_rate": rng.uniform(0.4, 0.9),
                             "chance": 1 / 9, "matrix_correlation": rng.uniform(0.4, 0.95),
                             "excluded": row["excluded"]})  # fmt: skip
    for (data, model), (_, _, linf, _) in GRID.items():
        for loss, weight in (("ce", 0.0), ("dr_softmax", 0.005)):
            for kind in ("softmax", "confusion"):
                values = rng.dirichlet(np.full(9, 0.5), 10)
                for i in range(10):
                    for j in range(10):
                        value = np.nan if i == j else values[i, j - (j > i)]
                        matrices.append({"data": data, "model": model, "loss": loss, "loss_weight": weight,
                                         "attack": "pgd", "epsilon_label": linf[1], "kind": kind, "true_class": i,
                                         "other_class": j, "value": value})  # fmt: skip
    return pd.DataFrame(rows), pd.DataFrame(matrices)


def _training(models: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    rows = []
    for row in models.to_dict("records"):
        for epoch in range(1, 9):
            loss = (1 + 60 * row["loss_weight"]) * np.exp(-epoch / 3) + rng.uniform(0, 0.02)
            rows.append({**{key: row[key] for key in KEYS}, "epoch": epoch, "train_loss": loss,
                         "train_accuracy": 1 - 0.4 * np.exp(-epoch / 2) + rng.normal(0, 0.005),
                         "val_loss": loss * 1.1, "val_accuracy": 0.98 - 0.4 * np.exp(-epoch / 2), "seconds": 2.5,
                         "learning_rate": 0.1, "excluded": row["excluded"]})  # fmt: skip
    return pd.DataFrame(rows)


def _differences(models: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    rows = []
    for (data, model), (weights, seeds, _, _) in GRID.items():
        inside = models[models["data"] == data]
        names = {str(c).removeprefix("acc."): c for c in inside if str(c).endswith("@mean")}
        for weight in weights[1:]:
            for name, column in {**names, "clean": "clean_accuracy", "norm.cw": "norm.cw"}.items():
                base = inside.loc[inside["loss"] == "ce", column].mean()
                own = inside.loc[inside["loss_weight"] == weight, column].mean()
                half = float(rng.uniform(0.01, 0.05))
                rows.append({"data": data, "model": model, "loss": "dr_softmax", "loss_weight": weight,
                             "baseline": "ce", "attack": name,
                             "n_pairs": seeds, "baseline_mean": base, "loss_mean": own, "difference": own - base,
                             "sd": half / 2, "ci_low": own - base - half, "ci_high": own - base + half})  # fmt: skip
    return pd.DataFrame(rows)


def _claims() -> pd.DataFrame:
    statements = {
        "C1": "Post-attack results correlate with the non-label softmax distribution.",
        "C2": "DR-softmax improves robustness.",
        "C3": "It costs no significant time.",
        "C4": "Standard accuracy has no significant positive correlation with softmax stochasticity.",
        "C5": "The gain is not gradient masking.",
    }
    verdicts = [
        "supported against weak attacks only", "not supported", "supported", "inconclusive (n too small)",
        "not supported",
    ]  # fmt: skip
    rows = []
    for data, model in [("all", "all"), *GRID]:
        for (claim, statement), verdict in zip(statements.items(), verdicts, strict=True):
            rows.append({"claim": claim, "statement": statement, "verdict": verdict,
                         "effect": 1.0123 if claim == "C3" else 0.0417, "ci_low": -0.0123, "ci_high": 0.1234, "n": 23,
                         "evidence": f"{claim} in {data}/{model}: |rho| < 0.5 & a * b, pgd@mean", "data": data,
                         "model": model})  # fmt: skip
    claims = pd.DataFrame(rows)
    claims.loc[(claims["data"] == "all") & claims["claim"].isin(["C2", "C3"]), ["ci_low", "ci_high"]] = np.nan
    return claims


def _timing() -> pd.DataFrame:
    return pd.DataFrame([
        {"data": data, "model": model, "loss": "dr_softmax", "loss_weight": 0.005, "baseline": "ce", "batch_size": 128,
         "n_pairs": 60, "baseline_ms": 12.345, "loss_ms": 12.678, "ratio": 1.027, "ci_low": 1.011, "ci_high": 1.043,
         "device": "cpu"}
        for data, model in GRID
    ])  # fmt: skip


def _worst_case(models: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for row in models.to_dict("records"):
        linf, l2 = GRID[row["data"], row["model"]][2:]
        for norm, label in (("linf", linf[1]), ("l2", l2[1])):
            rows.append({**{key: row[key] for key in KEYS}, "procedure": "standard", "norm": norm,
                         "epsilon": _epsilon(label), "epsilon_label": label, "n": 100, "clean": row["clean_accuracy"],
                         "pgd": row[f"acc.pgd@{linf[1]}"] if norm == "linf" else np.nan,
                         "worst": row[f"acc.worst_{norm}@{label}"], "excluded": row["excluded"]})  # fmt: skip
    return pd.DataFrame(rows)


def _sanity(models: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    rows = []
    for row in models.to_dict("records"):
        for check in ("objective_gap", "zero_gradient", "transfer_not_stronger"):
            figure = float(rng.uniform(0, 0.03))
            passed = "not run" if check.startswith("transfer") else "fail" if figure > 0.02 else "pass"
            rows.append({**{key: row[key] for key in KEYS}, "check": check, "figure": figure, "ci_low": 0.0,
                         "ci_high": 0.05, "threshold": 0.02, "passed": passed, "n": 100, "epsilon_label": "0.1",
                         "detail": "a sentence", "excluded": row["excluded"]})  # fmt: skip
    return pd.DataFrame(rows)


def _sample_correlations(models: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    rows = [
        {**{key: row[key] for key in KEYS}, "attack": "fmn_l2", "statistic": statistic, "n": 90, "n_not_found": 1,
         "coefficient": rng.uniform(-1, 1), "ci_low": -0.2, "ci_high": 0.2, "p_value": 0.1,
         "excluded": row["excluded"]}
        for row in models.to_dict("records")
        for statistic in STATISTICS
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _minimal_norms(models: pd.DataFrame) -> pd.DataFrame:
    """CW, on 20 of the 100 images, misses a tenth of those of cross-entropy on MNIST, and otherwise none."""
    rows = []
    for row in models.to_dict("records"):
        misses = row["loss"] == "ce" and row["data"] == "mnist"
        label = GRID[row["data"], row["model"]][3][1]
        rows.append({**{key: row[key] for key in KEYS}, "attack": "cw", "norm": "l2", "epsilon": _epsilon(label),
                     "epsilon_label": label, "n": 20, "median": 1.5, "median_smallest": 1.25, "n_fixed": 20,
                     "n_missed": 2 if misses else 0, "missed": 0.1 if misses else 0.0,
                     "excluded": row["excluded"]})  # fmt: skip
    return pd.DataFrame(rows)


def with_failed_checks(tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Let the models of DR-softmax at 0.005 fail a check, but one that passes, as every table of a study tells it."""
    models = tables["models"]
    fails = np.isclose(models["loss_weight"], 0.005) & (models["seed"] != 1)
    models = models.assign(failed_checks=np.where(fails, "objective_gap", ""))
    compared = comparator_table(models, tables["accuracy"], tables["worst_case"])
    return mark_failed_checks(tables | {"models": models, "comparators": compared})


PROVENANCE = {
    "study": "tiny",
    "suites": ["paper"],
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "dirty": False,
    "created": "2025-01-02T03:04:05+00:00",
    "versions": {"python": "3.11.9", "torch": "2.13.0"},
    "hardware": {"cpu": "Some | CPU", "cores": 2, "memory_gib": 23.5, "gpu": None},
    "wall_seconds": {"train": 741.5, "attack": 432.1},
    "data": {"mnist": {"test": {"images": "6d87" * 16, "labels": "ddef" * 16}}},
    "attacks": {"pgd": {"norm": "linf", "steps": 20, "step_size": "epsilon/4"}, "cw": {"norm": "l2", "steps": 100}},
    "epsilons": {"mnist": {"linf": ["0.1", "0.2", "0.3"]}},
    "n_attacked": {"mnist": 1000, "cifar10": 1000},
}


def study_tables(seed: int = 0) -> dict[str, pd.DataFrame]:
    """Return every table of a made-up study: MNIST with 24 models (one excluded), CIFAR-10 with nine."""
    rng = np.random.default_rng(seed)
    accuracy, statistics = _accuracy(rng)
    models = _models(accuracy, statistics, rng)
    landing, matrices = _landing(models, rng)
    failed = {"run_id": "x", "data": "cifar10", "model": "smallcnn", "loss": "dr_softmax", "loss_weight": 0.02,
              "seed": 0, "reason": "diverged: the loss became nan", "epoch": 2}  # fmt: skip
    worst_case = _worst_case(models)
    return {
        "models": models,
        "worst_case": worst_case,
        "comparators": comparator_table(models, accuracy, worst_case),
        "sanity": _sanity(models, rng),
        "sample_correlations": _sample_correlations(models, rng),
        "minimal_norms": _minimal_norms(models),
        "partial_correlations": partial_correlation_table(models, n_bootstrap=50, n_permutations=49),
        "granulated": granulated_table(models, n_permutations=49),
        "accuracy": accuracy,
        "softmax_profile": _profile(rng),
        "landing": landing,
        "landing_matrices": matrices,
        "training": _training(models, rng),
        "failures": pd.DataFrame([failed]),
        "timing": _timing(),
        "paired_differences": _differences(models, rng),
        "correlations": _correlations(models, rng),
        "claims": _claims(),
    }


def write_study(study_dir: Path, tables: dict[str, pd.DataFrame] | None = None) -> Path:
    """Write a made-up study, without its per-model run folders, and return its folder."""
    (study_dir / "tables").mkdir(parents=True)
    for name, table in (study_tables() if tables is None else tables).items():
        table.to_csv(study_dir / "tables" / f"{name}.csv", index=False)
    (study_dir / "provenance.json").write_text(json.dumps(PROVENANCE))
    return study_dir
