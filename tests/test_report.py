"""The report and the figure files, written from a made-up study."""

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import made_once
from synthetic import PROVENANCE, study_tables, with_failed_checks, write_study

from drs.comparators import comparator_table
from drs.comparison import compare_with_reference
from drs.errors import UserError
from drs.figure_style import attack_label, setting_label, wilson_interval
from drs.markdown import escape, probability
from drs.report import draw_figures, plan_figures, read_tables, write_report
from drs.report_losses import comparator_section
from drs.report_tables import differences_section, models_section
from drs.report_text import failures_section, scoring_section, summary
from drs.tables import write_tables
from drs.verdicts import RULES

ROOT = Path(__file__).parent.parent
TABLES = study_tables()


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with its figures, and beside it a list of what ``draw_figures`` returned."""

    def draw(folder: Path) -> None:
        names = [path.name for path in draw_figures(write_study(folder / "tiny"))]
        (folder / "drawn.json").write_text(json.dumps(names))

    shutil.copytree(made_once(tmp_path_factory, "drawn", draw), folder := tmp_path_factory.mktemp("studies") / "drawn")
    return folder


@pytest.fixture(scope="module")
def study(drawn: Path) -> Path:
    return drawn / "tiny"


@pytest.fixture(scope="module")
def files(drawn: Path, study: Path) -> list[Path]:
    return [study / "figures" / name for name in json.loads((drawn / "drawn.json").read_text())]


@pytest.fixture(scope="module")
def text(study: Path, files: list[Path]) -> str:
    return write_report(study).read_text(encoding="utf-8")


def _section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def _tables(section: str) -> list[list[list[str]]]:
    """Read every Markdown table of a section: rows of cells, header first."""
    found: list[list[list[str]]] = [[]]
    for line in section.splitlines():
        if line.startswith("|"):
            cells = line.replace("\\|", "\0").strip("|").split("|")
            found[-1].append([cell.strip().replace("\0", "|") for cell in cells])
        elif found[-1]:
            found.append([])
    return [[rows[0], *rows[2:]] for rows in found if rows]


def _number(cell: str) -> float:
    return float(cell.split()[0].replace("−", "-"))


def test_figures_are_png_and_pdf_of_the_whole_plan(study: Path, files: list[Path]) -> None:
    names = [figure.name for figure in plan_figures(read_tables(study))]
    assert [path.name for path in files] == [f"{name}.{ending}" for name in names for ending in ("png", "pdf")]
    assert all(path.read_bytes()[:4] in (b"\x89PNG", b"%PDF") for path in files)
    assert sorted(path.name for path in (study / "figures").iterdir()) == sorted(path.name for path in files)


def test_redrawing_gives_the_same_bytes_and_removes_only_stale_figures(study: Path, files: list[Path]) -> None:
    figure = study / "figures" / "correlation_heatmap.pdf"
    before = figure.read_bytes()
    stale = study / "figures" / "correlation_heatmap-old.png"
    other_kind = study / "figures" / "training_curves-gone-mlp.pdf"
    mine = study / "figures" / "poster.png"
    for path in (stale, other_kind, mine):
        path.write_bytes(b"x")
    written = draw_figures(study, "correlation_heatmap")
    assert [path.name for path in written] == ["correlation_heatmap.png", "correlation_heatmap.pdf"]
    assert figure.read_bytes() == before
    assert not stale.exists() and other_kind.exists() and mine.exists()
    draw_figures(study, "training_curves")
    assert not other_kind.exists() and mine.exists()
    mine.unlink()
    with pytest.raises(ValueError, match="kind must be one of"):
        draw_figures(study, "pie")


def test_claims_stand_on_top_and_every_one_is_there(text: str) -> None:
    assert text.startswith("# tiny: ")
    assert text.index("## Claims") < text.index("## How the verdicts are decided") < text.index("## Models")
    overall, *others = _tables(_section(text, "Claims"))
    claims = TABLES["claims"]
    assert len(others) == 2
    for rows, (data, model) in zip([overall, *others], [("all", "all"), *_groups()], strict=True):
        expected = claims[(claims["data"] == data) & (claims["model"] == model)]
        assert [row[0] for row in rows[1:]] == list(expected["claim"])
        assert [row[2].strip("*") for row in rows[1:]] == list(expected["verdict"])
        assert [row[4] for row in rows[1:]] == [str(n) for n in expected["n"]]
        assert [row[5] for row in rows[1:]] == [escape(e).replace("\\|", "|") for e in expected["evidence"]]
        effects = {row[0]: row[3] for row in rows[1:]}
        assert effects["C1"] == "ρ = 0.04 [−0.01, 0.12]"
        assert effects["C2"] == ("+4.2 points" if data == "all" else "+4.2 [−1.2, +12.3] points")
        assert effects["C3"].startswith("× 1.012")


def _groups() -> list[tuple[str, str]]:
    return [("mnist", "lenet"), ("cifar10", "smallcnn")]


def test_summary_speaks_from_the_claims(text: str) -> None:
    said = text.split("\n\n")[1]
    assert "33 trained models" in said and "1000 test images or fewer" in said
    for row in TABLES["claims"].query("data == 'all'").itertuples():
        assert row.statement in said and f"**{row.verdict.capitalize()}**" in said
    assert "strong attacks were not run" in said


def test_summary_says_where_a_check_saw_more_images_than_any_attack() -> None:
    assert "1000 test images or fewer." in summary(TABLES, strong_suite=True)
    sanity = TABLES["sanity"].assign(n=[2000, *TABLES["sanity"]["n"][1:]])
    said = summary({**TABLES, "sanity": sanity}, strong_suite=True)
    assert "1000 test images or fewer; whether PGD has converged was checked on 2000." in said


def test_rules_are_the_codes_own(text: str) -> None:
    assert RULES.strip() in text


@pytest.mark.parametrize("number", [0, 1])
def test_models_table_holds_the_tables_means(text: str, number: int) -> None:
    header, *rows = _tables(_section(text, "Models"))[number]
    data = _groups()[number][0]
    models = TABLES["models"][(TABLES["models"]["data"] == data) & TABLES["models"]["excluded"].isna()]
    assert len(rows) == models["loss_weight"].nunique()
    for row, (weight, seeds) in zip(rows, models.groupby("loss_weight"), strict=True):
        cells = dict(zip(header, row, strict=True))
        assert cells["loss"] == setting_label("dr_softmax" if weight else "ce", weight)
        assert cells["n seeds"] == str(len(seeds))
        expected = {"clean (%)": 100 * seeds["clean_accuracy"], "training (s)": seeds["train_seconds"]}
        expected["median norm, CW, n = 100"] = seeds["norm.cw"]
        for attack in ("fgsm", "pgd", "cw_torchattacks", "cw", "worst_linf", "worst_l2"):
            few = ", n = 100" if attack in ("cw", "worst_l2") else ""
            expected[f"{attack_label(attack)} (%){few}"] = 100 * seeds[f"acc.{attack}@mean"]
        assert set(cells) == {"loss", "n seeds", *expected}
        for name, values in expected.items():
            mean, spread, *bounds = re.split(r" ± | \[", cells[name])
            assert (len(bounds) > 0) == ("(%), n = 100" in name), "an interval over images is for few of them"
            assert float(mean) == pytest.approx(values.mean(), abs=0.051)
            assert float(spread) == pytest.approx(values.std(), abs=0.051)


def test_accuracy_table_holds_every_cell(text: str) -> None:
    for rows, (data, _) in zip(_tables(_section(text, "Robust accuracy")), _groups(), strict=True):
        accuracy = TABLES["accuracy"][(TABLES["accuracy"]["data"] == data) & TABLES["accuracy"]["excluded"].isna()]
        seen = {(row[0], row[1]): row for row in rows[1:]}
        cells = accuracy.groupby(["attack", "epsilon_label"])
        assert len(seen) == len(rows) - 1 == cells.ngroups
        for (attack, label), group in cells:
            epsilon = {"clean": "", "inf": "∞"}.get(attack if attack == "clean" else label, label)
            row = seen[attack_label(attack), epsilon]
            means = 100 * group.groupby("loss_weight")["robust_accuracy"].mean()
            assert np.allclose([_number(cell) for cell in row[2:-1]], means, atol=0.0501)
            n = int(group["n"].iloc[0])
            assert row[-1] == str(n)
            bounds = [re.findall(r"\[(\d+),\s(\d+)\]", cell) for cell in row[2:-1]]
            wilson = [[tuple(f"{end:.0f}" for end in 100 * wilson_interval([m / 100], n)[:, 0])] for m in means]
            assert bounds == (wilson if n < 1000 else [[]] * len(means)), (attack, label)


def test_differences_hold_points_and_norms(text: str) -> None:
    header, *rows = _tables(_section(text, "Differences to cross-entropy"))[0]
    at = TABLES["paired_differences"].query("data == 'mnist' and loss_weight == 0.005").set_index("attack")
    row = dict(zip(header, next(row for row in rows if row[0] == "DR 0.005"), strict=True))
    assert _number(row["PGD"]) == pytest.approx(100 * at["difference"]["pgd@mean"], abs=0.0501)
    assert "CW (torchattacks)" in row and "CW, n = 100" in row, "100 images are fewer than the worst case has"
    assert _number(row["median norm, CW, n = 100"]) == pytest.approx(at["difference"]["norm.cw"], abs=0.000501)
    low, high = row["clean"].split("[")[1].rstrip("]").replace("−", "-").split(", ")
    assert (float(low), float(high)) == pytest.approx(tuple(100 * at.loc["clean", ["ci_low", "ci_high"]]), abs=0.0501)
    assert row["n pairs"] == "4"


def test_correlations_give_n_and_the_strongest_other(text: str) -> None:
    primary, strongest = _tables(_section(text, "Correlations"))
    correlations = TABLES["correlations"]
    for row in primary[1:]:
        data = row[0].split("/")[0]
        attack = next(
            name
            for name in correlations["attack"].unique()
            if (name == "clean" or name.endswith("@mean")) and attack_label(name.removesuffix("@mean")) == row[1]
        )
        of = correlations[(correlations["data"] == data) & (correlations["attack"] == attack)]
        own = of[of["statistic"] == "nonlabel_var_log"].set_index("method")
        assert row[2] == str(own["n_models"].iloc[0])
        for cell, method in zip(row[3:6], ("spearman", "pearson", "kendall"), strict=True):
            assert _number(cell) == pytest.approx(own["coefficient"][method], abs=0.00501)
        assert row[7] == probability(own["q_value"]["spearman"])
        others = of[(of["statistic"] != "nonlabel_var_log") & (of["method"] == "spearman")].set_index("statistic")
        other = next(line for line in strongest[1:] if line[:2] == row[:2])
        assert other[2] == others["coefficient"].abs().idxmax()
        assert other[3] == str(others["n_models"].iloc[0])


def test_landing_and_timing_hold_the_tables_numbers(text: str) -> None:
    rows = _tables(_section(text, "Where attacks land"))[0]
    row = next(row for row in rows if row[:3] == ["mnist/lenet", "PGD, ε 0.2", "DR 0.005"])
    at = TABLES["landing"].query(
        "data == 'mnist' and attack == 'pgd' and epsilon_label == '0.2' and loss_weight == 0.005"
    )
    assert row[3:5] == ["4", str(at["n_flips"].sum())]
    assert _number(row[5]) == pytest.approx(100 * at["runner_up_rate"].mean(), abs=0.0501)
    assert row[6] == "11.1"
    assert _number(row[7]) == pytest.approx(at["matrix_correlation"].mean(), abs=0.00501)
    header, timing, _ = _tables(_section(text, "Training and its time"))[0]
    assert dict(zip(header, timing, strict=True))["ratio"] == "1.027 [1.011, 1.043]"


def test_failed_and_excluded_are_counted_and_listed(text: str) -> None:
    section = _section(text, "Failed and excluded models")
    assert "1 run failed, or has no whole evaluation, and enters no table" in section
    assert "1 of 33 finished models is excluded" in section
    failed, excluded = _tables(section)
    assert failed[1] == ["cifar10/smallcnn", "DR 0.02", "0", "diverged: the loss became nan (epoch 2)"]
    assert excluded[1][:3] == ["mnist/lenet", "DR 0.05", "3"] and "near chance" in excluded[1][3]


def test_a_sweep_over_many_weights_is_listed_in_part_with_a_pointer_to_the_whole(
    study: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "losses and weights are shown" not in text
    monkeypatch.setattr("drs.figure_style.MOST_SETTINGS", 3)
    short = write_report(study).read_text(encoding="utf-8")
    # The ends and the published weight, and of CIFAR-10 all three.
    few = {"CE", "DR 0.005", "DR 0.05", "DR 0.001"}
    for title, name in {
        "Models": "models", "Robust accuracy": "accuracy", "Sanity checks": "sanity", "All losses and procedures":
        "comparators", "Where attacks land": "landing",
        "Statistics and minimal perturbations, sample by sample": "sample_correlations",
    }.items():  # fmt: skip
        section = _section(short, title)
        assert f"3 of 6 losses and weights are shown; all are in tables/{name}.csv." in section
        shown = {cell.removesuffix(" †") for part in _tables(section) for row in part for cell in row}
        assert {cell for cell in shown if re.fullmatch(r"CE|DR [0-9.]+", cell)} == few
    write_report(study)


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a study of which a setting, DR-softmax at 0.005, has models that fail a check."""
    study = write_study(tmp_path_factory.mktemp("marked") / "tiny", with_failed_checks(TABLES))
    return write_report(study).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "title",
    [
        "Models", "Statistics and minimal perturbations, sample by sample", "Robust accuracy", "Sanity checks",
        "How much of the gain is masking", "All losses and procedures", "Differences to cross-entropy",
        "Where attacks land", "Training and its time", "Minimal norms, and whether they converged",
    ],
)  # fmt: skip
def test_a_setting_that_fails_a_check_is_marked_wherever_it_is_named(marked: str, text: str, title: str) -> None:
    names = [cell for part in _tables(_section(marked, title)) for row in part for cell in row]
    names = [cell for cell in names if re.fullmatch(r"(CE|DR [0-9.]+)( †)?", cell)]
    assert "DR 0.005 †" in names and "DR 0.005" not in names
    assert {cell for cell in names if "†" in cell} == {"DR 0.005 †"}, "the others pass"
    assert "†" not in _section(text, title)


@pytest.mark.parametrize("title", ["Correlations", "Partial correlations", "Granulated coefficients"])
def test_coefficients_say_how_many_of_their_models_fail_a_check(marked: str, text: str, title: str) -> None:
    counted = "(†) is failed by 3 of 23 models of mnist, lenet; 2 of 9 models of cifar10, smallcnn."
    assert counted in _section(marked, title)
    assert "is failed by" not in text
    captions = {figure.kind: figure.caption for figure in plan_figures(with_failed_checks(TABLES))}
    assert counted in captions["correlation_heatmap"]


def test_report_says_that_the_rules_were_fixed_and_the_attacks_were_not(text: str) -> None:
    section = _section(text, "How the verdicts are decided")
    assert "settings of attacks were made stronger" in section and "checks were made stricter" in section


def test_the_mark_is_explained_on_top_of_the_report(marked: str, text: str) -> None:
    assert "A loss marked † has a model that fails at least one sanity check." in marked.split("\n## ")[0]
    assert "a hollow marker is such a model" in marked.split("\n## ")[0]
    assert "†" not in text.split("\n## ")[0]


def test_an_excluded_model_that_fails_a_check_is_marked() -> None:
    models = TABLES["models"].assign(failed_checks=lambda rows: np.where(rows["excluded"].isna(), "", "more_steps"))
    excluded = _tables(failures_section(TABLES["failures"], models))[1]
    assert [row[1] for row in excluded[1:]] == ["DR 0.05 †"]


def test_every_table_of_models_or_settings_says_which_checks_fail(tmp_path: Path) -> None:
    models = with_failed_checks(TABLES)["models"]
    write_tables(tmp_path, TABLES | {"models": models})
    seen = set()
    for name, whole in TABLES.items():
        if name in ("failures", "comparators") or "loss_weight" not in whole:
            continue
        table = pd.read_csv(tmp_path / "tables" / f"{name}.csv", keep_default_na=False)
        ours = np.isclose(table["loss_weight"], 0.005)
        assert set(table.loc[~ours, "failed_checks"]) == {""} or ours.all()
        if "run_id" in table:
            assert set(table.loc[ours & (table["seed"] != 1), "failed_checks"]) == {"objective_gap"}
            assert set(table.loc[ours & (table["seed"] == 1), "failed_checks"]) == {""}
        else:
            wanted = table["data"].map({"mnist": "objective_gap 3/4", "cifar10": "objective_gap 2/3"})
            assert (table["failed_checks"] == wanted)[ours].all()
        seen.add(name)
    assert seen >= {
        "models", "accuracy", "worst_case", "sanity", "sample_correlations", "landing", "training", "timing",
        "softmax_profile", "paired_differences", "minimal_norms",
    }  # fmt: skip
    compared = compare_with_reference(tmp_path, write_study(tmp_path / "before", TABLES))
    assert set(compared["status"]) == {"agrees", "information"}, "further columns are no difference"


def test_median_norms_of_few_images_are_not_printed() -> None:
    accuracy = TABLES["accuracy"].assign(n=lambda rows: rows["n"].mask(rows["attack"] == "cw", 9))
    models, differences, comparators = (TABLES[name] for name in ("models", "paired_differences", "comparators"))
    for section in (
        models_section(models, accuracy), differences_section(differences, accuracy),
        comparator_section(comparators, accuracy),
    ):  # fmt: skip
        assert "fewer than 10 images is not printed" in section
        columns = [
            {row[part[0].index(head)] for row in part[1:]}
            for part in _tables(section) for head in part[0] if re.search(r"norm, CW, n = 9", head)
        ]  # fmt: skip
        assert columns == [{"n = 9"}] * 2


def test_every_attack_that_decides_is_among_those_of_all_losses_with_its_n() -> None:
    pgd = TABLES["accuracy"].query("attack == 'pgd'")
    more = [
        pgd.assign(attack=name, n=n, cumulative=cumulative)
        for name, n, cumulative in (
            ("margin_pgd", 1000, False), ("apgd_ce", 1000, True), ("adaptive", 1000, True), ("apgd_t", 16, True),
            ("fab_t", 16, True), ("square", 16, True), ("hop_skip_jump", 2, False),
        )
    ]  # fmt: skip
    accuracy = pd.concat([TABLES["accuracy"], *more])
    section = comparator_section(comparator_table(TABLES["models"], accuracy, TABLES["worst_case"]), accuracy)
    parts = dict(part.split("\n", 1) for part in section.split("\n#### ")[1:][:4])
    heads = {title: _tables(body)[0][0][2:] for title, body in parts.items()}
    assert heads == {
        "L∞, each attack on its own":
        ["clean", "FGSM", "PGD", "margin PGD", "HopSkipJump, n = 2", "worst case L∞"],
        "L∞, one attack after another":
        ["APGD-CE", "adaptive", "APGD-T, n = 16", "FAB-T, n = 16", "Square, n = 16", "worst case L∞"],
        "L2, each attack on its own": ["clean", "CW (torchattacks)", "CW, n = 100", "worst case L2, n = 100"],
        "Minimal norms and time": ["norm, CW, n = 100", "training (s)", "training, for 10 000 images (s)"],
    }  # fmt: skip
    for body in parts.values():
        head, *rows = _tables(body)[0]
        for row in rows:
            for name, cell in zip(head, row, strict=True):
                assert ("[" in cell) == ("n = " in name and not name.startswith("norm")), (name, cell)


def test_report_says_which_attack_did_not_run_for_which_models() -> None:
    provenance = {"attacks": {"pgd": {"kind": "pgd"}, "transfer": {"kind": "transfer"}}}
    pgd = TABLES["accuracy"].query("attack == 'pgd'")
    assert "did not run" not in scoring_section({"attacks": {"pgd": {"kind": "pgd"}}}, TABLES)
    some = pgd[(pgd["data"] != "mnist") | (pgd["loss"] != "ce")].assign(attack="transfer")
    section = scoring_section(provenance, TABLES | {"accuracy": pd.concat([pgd, some])})
    (line,) = re.findall(r"^- .*did not run.*$", section, re.MULTILINE)
    assert line.startswith("- transfer did not run for 4 of 24 models of mnist/lenet (CE): a transfer attack takes")
    assert "cross-entropy model of the same data, architecture and seed" in line
    none = scoring_section(provenance, TABLES | {"accuracy": pgd})
    assert "did not run for 24 of 24 models of mnist/lenet" in none and "for 9 of 9 models of cifar10" in none


def test_long_lists_of_runs_are_cut_and_counted(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drs.report_text.MOST_RUNS", 2)
    tables = read_tables(study)
    many = pd.concat([tables["failures"]] * 5)
    section = failures_section(many, tables["models"])
    assert "5 runs failed" in section and "The other 3 are in tables/failures.csv." in section
    assert "tables/models.csv" not in section, "one excluded model is no long list"
    assert [len(part) for part in _tables(section)] == [1 + 2, 1 + 1]


def test_every_embedded_figure_exists_and_every_figure_is_embedded(study: Path, files: list[Path], text: str) -> None:
    links = [line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert sorted(links) == sorted(f"figures/{path.name}" for path in files if path.suffix == ".png")
    assert all((study / link).is_file() for link in links)
    numbers = [int(line.split(".")[0].removeprefix("*Figure ")) for line in text.splitlines() if line[:8] == "*Figure "]
    assert sorted(numbers) == list(range(1, len(links) + 1))


def test_provenance_and_limits(text: str) -> None:
    section = _section(text, "Provenance")
    assert PROVENANCE["commit"] in section and "torch = 2.13.0" in section and "742 s" in section
    assert "Some \\| CPU" in section and "6d87" * 16 in section
    assert "steps = 20" in _section(text, "Attacks and how they are scored")
    limits = _section(text, "Limits of this study")
    assert "23 models, 3–4 seeds" in limits
    assert "± 3.1 points on 1000 images (FGSM, PGD" in limits
    assert "± 9.6 points on 100 images (CW, worst case L2)" in limits
    assert "paper` suite" in limits


def test_strong_suite_changes_the_limits(tmp_path: Path) -> None:
    study = write_study(tmp_path / "strong")
    more = {"suites": ["paper", "strong"], "dirty": True, "batches_halved": {"mnist-0-0 pgd@0.1": "80 to 20"}}
    (study / "provenance.json").write_text(json.dumps({**PROVENANCE, **more}))
    text = write_report(study).read_text()
    assert "strong attacks were not run, so nothing" not in text and "attacks of the `paper` suite were run" not in text
    assert "with uncommitted changes" in text
    assert "A GPU's memory ran out under these attacks" in text
    assert ["mnist-0-0 pgd@0.1", "80 to 20"] in _tables(_section(text, "Attacks and how they are scored"))[-1]
    assert "No figure" not in text and "![" not in text  # none was drawn, so none is linked


def test_short_and_missing_tables_still_make_a_report(tmp_path: Path) -> None:
    keep = {"cifar10-0-0", "cifar10-0.005-0"}
    tables = {"models": TABLES["models"], "accuracy": TABLES["accuracy"], "training": TABLES["training"]}
    tables = {name: rows[rows["run_id"].isin(keep)] for name, rows in tables.items()}
    tables |= {"failures": TABLES["failures"].iloc[:0], "correlations": TABLES["correlations"].iloc[:0]}
    study = write_study(tmp_path / "short", tables)
    (study / "tables" / "timing.csv").touch()
    (study / "provenance.json").unlink()
    written = draw_figures(study)
    text = write_report(study).read_text()
    kinds = {path.stem.split("-")[0] for path in written}
    assert kinds == {"statistic_vs_accuracy", "epsilon_curves", "training_curves"}
    for sentence in (
        "No run failed.", "None of the 2 finished models is excluded.", "no claims table", "No training step was",
        "Too few models", "no provenance.json", "no paired difference", "No attack was examined",
    ):  # fmt: skip
        assert sentence in text
    assert not re.search(r"\bnan\b", text.lower())
    cell = _tables(_section(text, "Models"))[0][1][2]
    assert cell == f"{100 * tables['models']['clean_accuracy'].iloc[0]:.1f}"  # one seed: no spread


def test_names_are_read_as_text(tmp_path: Path) -> None:
    tables = dict(TABLES)
    for name in ("models", "accuracy"):
        rows = TABLES[name][TABLES[name]["run_id"] == "mnist-0-0"]
        tables[name] = rows.assign(run_id="1234567e89")
    tables["accuracy"] = tables["accuracy"].query("attack == 'cw'").replace({"epsilon_label": {"1": "1.0"}})
    study = write_study(tmp_path / "names", tables)
    assert set(read_tables(study)["models"]["run_id"]) == {"1234567e89"}
    assert list(read_tables(study)["accuracy"]["epsilon_label"]) == ["1.0", "2", "3"]


def test_user_errors_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tables/models.csv"):
        draw_figures(tmp_path / "absent")
    study = write_study(tmp_path / "broken")
    (study / "provenance.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        write_report(study)
    TABLES["accuracy"].drop(columns="epsilon").to_csv(study / "tables" / "accuracy.csv", index=False)
    with pytest.raises(UserError, match="lacks the column 'epsilon'"):
        draw_figures(study)
    TABLES["models"].iloc[:0].to_csv(study / "tables" / "models.csv", index=False)
    with pytest.raises(UserError, match="holds no model"):
        write_report(study)
    assert not (study / "figures").exists() and not (study / "REPORT.md").exists()
