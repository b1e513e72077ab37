"""README.md says what the reference study's tables say, and its code runs."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from synthetic import study_tables, with_failed_checks, write_study

from drs import readme, readme_claims
from drs.config import PROJECT_ROOT
from drs.errors import UserError
from drs.readme import README_STUDY, fill

README = (PROJECT_ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = PROJECT_ROOT / "results" / "reference" / README_STUDY


def test_numbers_in_the_readme_come_from_the_reference_tables() -> None:
    assert fill(README, REFERENCE) == README, "make readme"


def test_a_number_typed_by_hand_would_be_noticed() -> None:
    assert fill(README.replace("**not supported**", "**supported**"), REFERENCE) == README
    with pytest.raises(UserError, match="claims"):
        fill(README.replace("<!-- claims -->", ""), REFERENCE)


def test_an_inconclusive_group_says_what_it_lacks(tmp_path: Path) -> None:
    claims = study_tables()["claims"]
    lines = {}
    for verdict in ("inconclusive (n too small)", "not supported"):
        reasons = {"verdict": verdict, "evidence": "2 pairs of seeds; 3 are needed. Change in points: none."}
        study = tmp_path / verdict[:3]
        write_study(study, {"models": study_tables()["models"], "claims": claims.assign(**reasons)})
        lines[verdict] = re.findall(r"mnist/lenet: (.*?)(?:<br>| \|)", readme_claims.claims_block(study))
    assert lines["not supported"]
    for unclear, clear in zip(*lines.values(), strict=True):
        assert unclear == clear.replace("not supported", "inconclusive (n too small)") + "; 2 pairs of seeds"


def test_verdicts_for_weak_attacks_and_the_worst_case_are_named_unless_both_are_open() -> None:
    reasons = [
        ("not supported", "FGSM -0.30, PGD -0.20"),
        ("inconclusive", "FGSM -0.30, PGD -0.20"),
        ("inconclusive", "FGSM 0.10: not shown (no coefficient) for FGSM, and not ruled out"),
        ("not supported", "5 settings of loss and weight; 6 are needed, seeds do not replace them"),
    ]
    each = [f"Weak attacks {verdict} ({reason}), worst case inconclusive (0.1). More." for verdict, reason in reasons]
    rows = [pd.Series({"verdict": "inconclusive (n too small)", "evidence": evidence}) for evidence in each]
    said = "weak attacks not supported, worst case inconclusive"
    assert [readme_claims.why_open(row) for row in rows] == [said, "", "", said]


def test_pairs_on_more_images_fill_a_block_only_where_they_are_there(tmp_path: Path) -> None:
    tables = study_tables()
    write_study(tmp_path / "one", tables)
    assert readme_claims.pairs_block(tmp_path / "one") is None
    text = "".join(f"<!-- {name} -->\nby hand\n<!-- /{name} -->\n" for name in (*readme.BLOCKS, *readme.BESIDE))
    before = fill(text, tmp_path / "one")
    assert "<!-- pairs -->\nby hand\n<!-- /pairs -->" in before and before.count("by hand") == len(readme.BESIDE)
    claims = tables["claims"].assign(n_images=np.where(tables["claims"]["claim"] == "C2", 500.0, np.nan))
    open_one = (claims["claim"] == "C5") & (claims["data"] == "mnist")
    claims.loc[open_one, ["verdict", "evidence"]] = "inconclusive (n too small)", "No gain under PGD is shown. More."
    claims.loc[claims["claim"] == "C2", "n"] = 8
    write_study(tmp_path / "pairs", tables | {"claims": claims})
    after = fill(text, tmp_path / "one")
    assert after.count("by hand") == len(readme.BESIDE) - 1
    lines = str(readme_claims.pairs_block(tmp_path / "one")).splitlines()
    assert lines[2] == (
        "| mnist/lenet | not supported; +4.2 [−1.2, +12.3] points | inconclusive (n too small); share = 0.04 "
        "[−0.01, 0.12]<br>no gain under PGD is shown | 8 | 500 |"
    )
    assert len(lines) == 6 and "results/reference/pairs/REPORT.md#differences-to-cross-entropy" in lines[-1]


def test_many_weights_fill_a_block_with_what_c1_and_c4_come_to(tmp_path: Path) -> None:
    tables = study_tables()
    write_study(tmp_path / "one", tables)
    assert readme_claims.weights_block(tmp_path / "one") is None
    columns = {"data": "mnist", "model": "lenet", "statistic": "nonlabel_var_log", "method": "spearman"}
    attacks = ["clean", "pgd@mean", "worst_linf@mean"]
    rows = pd.DataFrame({"attack": attacks, "coefficient": [0.3, -0.4, 0.5], "n_models": 36, "n_settings": 17})
    rows = rows.assign(**columns, ci_low=[0.1, -0.6, np.nan], ci_high=[0.5, -0.2, np.nan], p_value=0.1, q_value=0.2)
    claims = tables["claims"][tables["claims"]["data"].isin(["all", "mnist"])].copy()
    for name, verdict, evidence in (
        (
            "C1",
            "inconclusive (n too small)",
            "Weak attacks not supported (PGD -0.40), worst case inconclusive (0.5). More.",
        ),
        ("C4", "supported", "Not significantly positive."),
    ):
        own = (claims["claim"] == name) & (claims["data"] == "mnist")
        claims.loc[own, ["verdict", "evidence"]] = verdict, evidence
        claims.loc[own, "n"] = 36
    write_study(tmp_path / "weights", tables | {"claims": claims, "correlations": rows})
    lines = str(readme_claims.weights_block(tmp_path / "one")).splitlines()
    assert lines[0] == ("|  | C1 | ρ, PGD | ρ, worst case Linf | ρ, worst case L2 | C4 | models | settings |")
    assert lines[2] == (
        "| mnist/lenet | inconclusive (n too small)<br>weak attacks not supported, worst case inconclusive | "
        "−0.40 [−0.60, −0.20] | 0.50 | – | supported; ρ = 0.30 [0.10, 0.50] | 36 | 17 |"
    )
    assert len(lines) == 5 and lines[-1].endswith("(results/reference/weights/REPORT.md#correlations).")


def test_a_study_of_ones_own_is_listed_alone_and_the_reference_whole(tmp_path: Path) -> None:
    names = {}
    for parent in ("reference", "results"):
        for name in ("one", "two"):
            write_study(tmp_path / parent / name, {"models": study_tables()["models"]})
        names[parent] = re.findall(r"^\| \[(\w+)\]", readme.studies_block(tmp_path / parent / "two"), re.M)
    assert names == {"reference": ["one", "two"], "results": ["two"]}


def test_open_questions_are_answered_from_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"data": "mnist", "model": "lenet", "loss_weight": 0.0, "n_seeds": 2, "mean.clean": 0.97, "n_pairs": np.nan}
    ours = {**row, "loss": "dr_softmax", "loss_weight": 0.005, "n_pairs": 4, "gain_pgd": 0.04, "gain_worst": -0.01}
    bounds = {"gain_pgd_low": 0.01, "gain_pgd_high": 0.07, "gain_worst_low": -0.03, "gain_worst_high": 0.01}
    trained = {**row, "loss": "adversarial", "mean.worst_linf": 0.85}
    both = {**trained, "loss": "adversarial+dr_softmax", "loss_weight": 0.005, "mean.worst_linf": 0.86}
    write_study(
        tmp_path / "one",
        {"models": study_tables()["models"], "comparators": pd.DataFrame([ours | bounds, trained, both])},
    )
    bench = pd.read_csv(readme.BENCH)
    bench.loc[bench["case"].str.endswith("256 x 50257"), ["ratio", "low", "high"]] = [1.5, 1.4, 1.6]
    bench.loc[bench["case"].str.endswith("256 x 50257") & (bench["device"] == "cuda"), "ratio"] = 1.45
    bench.loc[bench["case"].str.endswith("1024 x 1000"), "ratio"] = np.nan
    bench.to_csv(tmp_path / "bench.csv", index=False)
    (tmp_path / "provenance.json").write_text('{"gpu_loss": {"hardware": {"gpu": "Some Card"}}}')
    monkeypatch.setattr(readme, "BENCH", tmp_path / "bench.csv")
    text = readme.questions_block(tmp_path / "one")
    assert "mnist/lenet: +4.0 [+1.0, +7.0] points under PGD, −1.0 [−3.0, +1.0] in the worst case, n = 4" in text
    assert "AT 97.0 % clean and 85.0 % in the worst case (n = 2); AT + DR 0.005 97.0 % clean and 86.0 %" in text
    threads = "× 1.50 [1.40, 1.60] on 1 thread, × 1.50 [1.40, 1.60] on 2 threads"
    assert f"256 × 50257 logits, CPU: {threads}; Some Card: × 1.45 [1.40, 1.60]" in text
    assert "1024 × 1000 logits, CPU: not measured; GPU: not measured" in text


def test_gains_have_intervals_and_steps_their_time(tmp_path: Path) -> None:
    tables = study_tables()
    row = {"data": "mnist", "model": "lenet", "loss_weight": 0.0, "n_seeds": 3, "gain_pgd": np.nan}
    gains = {"gain_pgd": 0.04, "gain_worst": -0.01, "gain_pgd_low": 0.01, "gain_pgd_high": 0.07}
    ours = {
        **row,
        **gains,
        "loss": "dr_softmax",
        "loss_weight": 0.005,
        "gain_worst_low": -0.03,
        "gain_worst_high": 0.01,
    }
    single = {**row, "loss": "gce", "loss_weight": 0.333, "gain_pgd": 0.02, "gain_worst": 0.01}
    step = {"data": "mnist", "model": "lenet", "loss": "dr_softmax", "baseline": "ce", "ratio": 1.234}
    tables["comparators"] = pd.DataFrame([{**row, "loss": "ce"}, ours, single])
    tables["timing"] = pd.DataFrame([step]).reindex(columns=tables["timing"].columns)
    write_study(tmp_path / "one", tables)
    ce, dr, gce = readme.survival_block(tmp_path / "one").splitlines()[2:]
    assert ce.endswith("| – | – | × 1 |") and re.search(r"^\| mnist/lenet, ε .+, \d+ images \| CE \| 3 \|", ce)
    assert dr.endswith("| +4.0 [+1.0, +7.0] | −1.0 [−3.0, +1.0] | × 1.23 |")
    assert gce.endswith("| +2.0 | +1.0 | – |")
    first = readme.accuracy_block(tmp_path / "one").splitlines()[2]
    accuracy, models = tables["accuracy"], tables["models"]
    counts = [
        accuracy.query("data == 'mnist' and attack == @name")["n"].min() for name in ("pgd", "cw_torchattacks", "cw")
    ]
    clean = models.query("data == 'mnist'")["n_clean"].min()
    assert f"| {' / '.join(str(int(number)) if number == number else '–' for number in (clean, *counts))} |" in first


def test_a_setting_that_fails_a_check_is_marked_and_the_mark_explained(tmp_path: Path) -> None:
    tables = study_tables()
    losses = ("adversarial", "adversarial+dr_softmax")
    for name in ("models", "worst_case"):
        ours = tables[name].query("data == 'mnist' and loss_weight == 0.005")
        more = [ours.assign(loss=loss, run_id=loss + ours["run_id"]) for loss in losses]
        tables[name] = pd.concat([tables[name], *more], ignore_index=True)
    passing, failing = (
        write_study(tmp_path / name, whole)
        for name, whole in (("passing", tables), ("failing", with_failed_checks(tables)))
    )
    rows = {}
    for block in ("accuracy", "survival", "questions"):
        assert "†" not in readme.BLOCKS[block](passing)
        rows[block], *notes = readme.BLOCKS[block](failing).split("\n\n† ")
        assert len(notes) == 1 and notes[0].startswith(
            "A model of this loss fails at least one of the [sanity checks]("
        )
        assert notes[0].endswith("in doubt, if only by an image or two.")
    for block in ("accuracy", "survival"):
        named = re.findall(r"\| ((?:CE|(?:AT \+ )?DR [0-9.]+)(?: †)?) \|", rows[block])
        assert "DR 0.005 †" in named and "DR 0.005" not in named and "CE" in named and "CE †" not in named
    assert re.search(r"mnist/lenet †: .+? points under PGD", rows["questions"]), rows["questions"]
    assert "cifar10/smallcnn †: " in rows["questions"]
    assert re.search(r"AT 0\.005 † .*AT \+ DR 0\.005 † ", rows["questions"])


def test_files_that_the_readme_links_to_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (PROJECT_ROOT / target).exists(), target


def test_sections_that_the_readme_links_to_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)#([^)]+)\)", README)
    assert len(links) >= 5
    for target, anchor in links:
        headings = re.findall(r"^#+ (.+)$", (PROJECT_ROOT / target).read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, (target, anchor)


def test_loss_snippet_runs_in_a_loop_of_the_readers_own(tmp_path: Path) -> None:
    snippet = next(code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "DRSoftmaxLoss" in code)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    before = model[1].weight.detach().clone()
    loader = [(torch.rand(8, 1, 2, 2), torch.arange(8) % 3)]
    names = {"model": model, "loader": loader, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    exec(compile(snippet, "README.md", "exec"), names)
    assert not torch.equal(model[1].weight, before)


def test_readme_names_the_two_commands() -> None:
    for command in ("make reproduce", "make test"):
        assert command in README
