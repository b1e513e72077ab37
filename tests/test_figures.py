"""The figures: drawn from a made-up study, told apart, counted, and with no text on top of other text."""

import re
import warnings
from collections.abc import Iterator

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy.stats import binomtest
from synthetic import study_tables, with_failed_checks

from drs.comparators import comparator_table
from drs.figure_axes import legible, statistic_scale
from drs.figure_cost import masking_gap
from drs.figure_plan import KINDS, plan_figures
from drs.figure_style import (
    EXCLUDED_COLOUR,
    attacks,
    of_group,
    of_setting,
    records,
    setting_label,
    setting_style,
    settings,
    shown_setting,
    span,
    wilson_interval,
)
from drs.figure_summary import summary, summary_rows
from drs.figures import (
    MOST_BANDS,
    correlation_heatmap,
    epsilon_curves,
    statistic_vs_accuracy,
    training_curves,
    where_attacks_land,
)

TABLES = study_tables()
PLAN = {figure.name: figure for figure in plan_figures(TABLES)}
MARKED = {figure.name: figure for figure in plan_figures(with_failed_checks(TABLES))}
NAMING = [name for name, figure in MARKED.items() if figure.kind != "correlation_heatmap" and "entropy" not in name]


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(scope="module")
def drawn() -> dict[str, Figure]:
    return {name: figure.draw() for name, figure in PLAN.items()}


def _texts(figure: Figure) -> list[Text]:
    figure.draw_without_rendering()
    outside = set()  # ticks beyond an axis' limits keep their labels but are not drawn
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks() + axis.get_minor_ticks():
            if not low <= tick.get_loc() <= high:
                outside |= {tick.label1, tick.label2}
    texts = figure.findobj(Text)
    return [text for text in texts if text not in outside and text.get_visible() and text.get_text().strip()]


def _words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in _texts(figure))


def test_every_kind_is_planned_for_every_group() -> None:
    assert {figure.kind for figure in PLAN.values()} == set(KINDS)
    for tag in ("mnist-lenet", "cifar10-smallcnn"):
        for kind in ("epsilon_curves", "where_attacks_land", "training_curves"):
            assert f"{kind}-{tag}" in PLAN
        assert f"statistic_vs_accuracy-nonlabel_var_log-{tag}" in PLAN


@pytest.mark.parametrize("name", PLAN)
def test_text_is_inside_the_figure_and_does_not_overlap(drawn: dict[str, Figure], name: str) -> None:
    figure = drawn[name]
    boxes = []
    for text in _texts(figure):
        box = text.get_window_extent()
        if box.width == 0 or (text.axes is not None and not text.axes.axison):
            continue
        shown = text.get_text()
        assert figure.bbox.x0 - 1 <= box.x0 and box.x1 <= figure.bbox.x1 + 1, f"{shown!r} leaves the figure"
        assert figure.bbox.y0 - 1 <= box.y0 and box.y1 <= figure.bbox.y1 + 1, f"{shown!r} leaves the figure"
        if text.get_rotation() % 90 == 0:  # the box around slanted text is mostly empty
            boxes.append((box, shown))
    for i, (box, shown) in enumerate(boxes):
        for other, other_shown in boxes[i + 1 :]:
            width = min(box.x1, other.x1) - max(box.x0, other.x0)
            height = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert min(width, height) < 1.5, f"{shown!r} overlaps {other_shown!r}"


@pytest.mark.parametrize("name", PLAN)
def test_legends_cover_no_axes(drawn: dict[str, Figure], name: str) -> None:
    drawn[name].draw_without_rendering()
    boxes = [axis.get_window_extent() for axis in drawn[name].axes if axis.axison]
    for legend in [*drawn[name].legends, *(one for sub in drawn[name].subfigs for one in sub.legends)]:
        assert not any(legend.get_window_extent().overlaps(box) for box in boxes)


@pytest.mark.parametrize("name", PLAN)
def test_every_figure_says_its_n(drawn: dict[str, Figure], name: str) -> None:
    words = _words(drawn[name])
    counted = {
        "summary": r"mnist, lenet: DR 0.005[^\n]* \([34] seeds\)",
        "statistic_vs_accuracy": r"PGD, 1000 images\nρ[\s\S]*worst case L2, 100 images\nρ[\s\S]*(23|9) models\n",
        "epsilon_curves": r"3(–4)? seeds × 1000 images[\s\S]*3(–4)? seeds × 100 images",
        "nonlabel_distribution": r"n = 40000 [\s\S]*n = 30000 ",
        "correlation_heatmap": r"n = 23 models[\s\S]*n = 9 models[\s\S]*n = 32 models",
        "where_attacks_land": r"(23|9) models\n[0-9–]+ flips a model",
        "training_curves": r"n = 3–4 seeds [^\n]*; 1 excluded model left out\n|n = 3 seeds [^;\n]*\n",
        "masking_gap": r"DR 0.005 \(n = [34]\)[\s\S]*100 images",
        "robustness_against_time": r"(23|9) models × 100 images",
    }
    assert re.search(counted[PLAN[name].kind], words), words


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    before = dict(matplotlib.rcParams)
    training_curves(TABLES["training"], "mnist", "lenet")
    assert dict(matplotlib.rcParams) == before


def test_summary_shows_both_gains_and_the_time_of_each_row(drawn: dict[str, Figure]) -> None:
    rows = summary_rows(TABLES["comparators"], TABLES["timing"])
    assert {setting[0] for _, _, setting in rows} >= {"dr_softmax"}
    axes = drawn["summary"].axes
    for position, (data, model, setting) in enumerate(rows):
        gain = of_setting(of_group(TABLES["comparators"], data, model), setting).iloc[0]
        time = of_setting(of_group(TABLES["timing"], data, model), setting).iloc[0]
        wanted = 100 * gain["gain_pgd"], 100 * gain["gain_worst"], time["ratio"]
        for axis, value in zip(axes, wanted, strict=True):
            points = [line for line in axis.lines if line.get_marker() == "o" and line.get_ydata()[0] == position]
            assert [line.get_xdata()[0] for line in points] == [value]
    alone = TABLES["comparators"].assign(gain_pgd_low=np.nan, gain_pgd_high=np.nan)
    markers = [line.get_marker() for line in summary(alone, TABLES["timing"]).axes[0].lines[: len(rows)]]
    assert markers == ["D"] * len(rows), "no interval is not an interval of no width"


def test_points_are_the_table(drawn: dict[str, Figure]) -> None:
    figure = drawn["statistic_vs_accuracy-nonlabel_var_log-mnist-lenet"]
    axis = next(axis for axis in figure.axes if axis.get_title().startswith("PGD"))
    points = {
        (x, y): line.get_color() for line in axis.lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    }
    rows = TABLES["models"][TABLES["models"]["data"] == "mnist"]
    assert len(points) == len(rows) == 24
    for row in records(rows.rename(columns={"stat.nonlabel_var_log": "x", "acc.pgd@mean": "y"})):
        colour = EXCLUDED_COLOUR if isinstance(row.excluded, str) else setting_style(row.loss, row.loss_weight)["color"]
        assert any(np.allclose((row.x, 100 * row.y), point) and found == colour for point, found in points.items())
    crosses = [line for line in axis.lines if line.get_marker() == "x"]
    assert [len(line.get_xdata()) for line in crosses] == [1]  # the excluded model
    row = TABLES["correlations"].query(
        "data == 'mnist' and statistic == 'nonlabel_var_log' and attack == 'pgd@mean' and method == 'spearman'"
    )
    assert f"ρ = {row['coefficient'].item():.2f}".replace("-", "−") in axis.get_title()


def test_models_that_fail_a_check_are_hollow_and_the_artists_few_however_many_models() -> None:
    models = TABLES["models"].query("data == 'cifar10'").assign(failed_checks="")
    models.iloc[[1, 4], models.columns.get_loc("failed_checks")] = "zero_gradient"
    many = pd.concat([models.assign(run_id=models["run_id"] + f"-{copy}") for copy in range(20)], ignore_index=True)
    arguments = TABLES["accuracy"], TABLES["correlations"], "nonlabel_var_log", "cifar10", "smallcnn"
    drawn = [statistic_vs_accuracy(rows, *arguments).axes[0] for rows in (models, many)]
    for axis, copies in zip(drawn, (1, 20), strict=True):
        hollow = [line for line in axis.lines if line.get_markerfacecolor() == "white"]
        heights = np.concatenate([line.get_ydata() for line in hollow])
        expected = np.repeat(100 * models["acc.fgsm@mean"].iloc[[1, 4]], copies)
        assert np.allclose(np.sort(heights), np.sort(expected))
    assert len(drawn[0].lines) == len(drawn[1].lines)


@pytest.mark.parametrize("name", NAMING)
def test_what_fails_a_check_is_marked_and_hollow_and_nothing_else_is(name: str) -> None:
    figure = MARKED[name].draw()
    words = _words(figure)
    named = re.findall(r"\bDR 0\.005\b(?: †)?", words)
    assert named and set(named) == {"DR 0.005 †"}
    assert len(re.findall(r"(?<!DR 0\.005) †", words)) == 0, "the others pass"
    assert "†, hollow: fails a check" in words
    ours = setting_style("dr_softmax", 0.005)["color"]
    drawn = [line for axis in figure.axes for line in axis.lines if line.get_marker() not in ("None", "", "_", "x")]
    hollow = {line.get_color() for line in drawn if line.get_markerfacecolor() == "white"}
    assert hollow == {ours}
    full = [line for line in drawn if line.get_color() == ours and line.get_markerfacecolor() != "white"]
    of_models = ("statistic_vs_accuracy", "robustness_against_time", "where_attacks_land")
    assert bool(full) == name.startswith(of_models), "of the models, one passes; a setting is hollow as a whole"


@pytest.mark.parametrize(("pairs", "failed"), [(1, ""), (1, "zero_gradient 1/1"), (4, ""), (4, "zero_gradient 1/4")])
def test_one_pair_is_a_diamond_and_hollow_means_a_failed_check(pairs: int, failed: str) -> None:
    rows = TABLES["comparators"].query("data == 'mnist' and loss_weight == 0.005")
    rows = rows.assign(n_pairs=pairs, failed_checks=failed)
    if pairs == 1:
        rows = rows.assign(**{f"gain_{kind}_{end}": np.nan for kind in ("pgd", "worst") for end in ("low", "high")})
    for figure in (masking_gap(rows), summary(rows, TABLES["timing"])):
        points = [line for axis in figure.axes[:2] for line in axis.lines if line.get_marker() in ("o", "s", "D")]
        assert len(points) == 2
        assert all((line.get_marker() == "D") == (pairs == 1) for line in points)
        assert all((line.get_markerfacecolor() == "white") == bool(failed) for line in points)
        keys = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        assert ("one pair of seeds, no interval" in keys) == (pairs == 1)
        assert ("†, hollow: fails a check" in keys) == bool(failed)


def test_bars_are_wilson_intervals_of_the_attacked_images(drawn: dict[str, Figure]) -> None:
    axis = drawn["statistic_vs_accuracy-nonlabel_var_log-cifar10-smallcnn"].axes[0]
    bars = {tuple(segment[:, 1]) for bar in axis.collections for segment in bar.get_segments()}
    share = TABLES["models"].query("data == 'cifar10'")["acc.fgsm@mean"].iloc[0]
    low, high = 100 * wilson_interval([share], [1000])[:, 0]
    assert any(np.allclose(bar, (low, high)) for bar in bars)


def test_names_of_ticks_do_not_run_into_each_other() -> None:
    ticks, names = [0, 0.25, 0.5, 1, 2, 2.44], ["0", "0.25", "0.5", "1", "2", "∞"]
    assert legible(ticks, names) == ["0", "0.25", "\n0.5", "1", "2", "∞"]
    assert legible(ticks[:-1], names[:-1]) == ["0", "0.25", "0.5", "1", "2"]
    assert legible([0, 1, 2, 3, 100], ["0.00", "0.01", "0.02", "0.03", "1"]) == ["0.00", "\n0.01", "", "", "1"]
    assert legible([4, 5, 6], ["0.9", "0.99", "0.999"], width=8) == ["0.9", "0.99", "\n0.999"]
    assert legible([4, 5, 6], ["0.9", "0.99", "0.999"]) == ["0.9", "0.99", "0.999"]


def test_every_epsilon_is_named(drawn: dict[str, Figure]) -> None:
    """Fashion-MNIST's are closest together: 0.01 and 0.02 of 0.1."""
    rows = TABLES["accuracy"].query("data == 'mnist' and attack == 'pgd'")
    moved = {"0.1": "0.01", "0.2": "0.02", "0.3": "0.1"}
    near = rows.assign(epsilon_label=rows["epsilon_label"].map(moved))
    near = near.assign(epsilon=near["epsilon_label"].astype(float))
    axis = epsilon_curves(near, "mnist", "lenet").axes[0]
    assert [tick.get_text().strip() for tick in axis.get_xticklabels()] == ["0", "0.01", "0.02", "0.1"]


def test_shares_close_to_1_are_spread_out() -> None:
    models = TABLES["models"].query("data == 'mnist'")
    assert statistic_scale(pd.Series([0.4, 0.5, 0.9])) == "linear"
    assert statistic_scale(pd.Series([0.4, 0.5, 1.0])) == "linear", "no logit of 1"
    assert statistic_scale(pd.Series([-0.4, 0.9999])) == "linear"
    assert statistic_scale(pd.Series([0.01, 0.5])) == "log"
    assert statistic_scale(pd.Series([0.4, 0.9999])) == "logit"
    even = models.assign(**{"stat.nonlabel_entropy": 1 - np.logspace(-0.2, -6, len(models))})
    figure = statistic_vs_accuracy(
        even, TABLES["accuracy"], TABLES["correlations"], "nonlabel_entropy", "mnist", "lenet"
    )
    (names,) = {tuple(tick.get_text().strip() for tick in axis.get_xticklabels()) for axis in figure.axes[:1]}
    assert names == ("0.5", "0.9", "0.99", "0.999", "0.9999", "0.99999", "0.999999")[: len(names)]
    assert len(names) >= 5


def test_mean_of_seeds_stands_out_from_their_points(drawn: dict[str, Figure]) -> None:
    axis = next(axis for axis in drawn["where_attacks_land-mnist-lenet"].axes if axis.get_title().startswith("PGD"))
    points = [line.get_zorder() for line in axis.lines if line.get_linestyle() == "None"]
    bars = [bar.get_zorder() for bar in axis.collections]
    assert bars and min(bars) > max(points)


def test_curves_are_means_over_seeds_without_excluded_models(drawn: dict[str, Figure]) -> None:
    axis = next(axis for axis in drawn["epsilon_curves-mnist-lenet"].axes if axis.get_title().startswith("PGD"))
    rows = TABLES["accuracy"].query("data == 'mnist' and loss_weight == 0.05 and seed < 3")
    expected = [100 * rows[rows["attack"] == "pgd"]["clean"].mean()]
    assert expected[0] != pytest.approx(100 * rows[rows["attack"] == "clean"]["robust_accuracy"].mean(), abs=1e-9)
    for epsilon in (0.1, 0.2, 0.3):
        cells = rows[(rows["attack"] == "pgd") & np.isclose(rows["epsilon"], epsilon)]
        expected.append(100 * cells["robust_accuracy"].mean())
    drawn_lines = [np.asarray(line.get_ydata()) for line in axis.lines if len(line.get_ydata()) == 4]
    assert any(np.allclose(line, expected) for line in drawn_lines)
    chance = [line.get_ydata() for line in axis.lines if line.get_linestyle() == ":"]
    assert np.allclose(chance, 10)


def test_epsilons_written_in_255_steps_are_drawn_so(drawn: dict[str, Figure]) -> None:
    axis = drawn["epsilon_curves-cifar10-smallcnn"].axes[0]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["0", "1", "2", "4"]
    assert "1/255" in axis.get_xlabel()


def test_unbounded_attack_stands_apart(drawn: dict[str, Figure]) -> None:
    axis = next(axis for axis in drawn["epsilon_curves-mnist-lenet"].axes if "torchattacks" in axis.get_title())
    assert axis.get_xticklabels()[-1].get_text() == "∞"
    assert all(np.isfinite(np.asarray(line.get_xdata(), float)).all() for line in axis.lines)


def test_heat_map_hatches_what_is_not_significant() -> None:
    rows = TABLES["correlations"].copy()
    rows = rows[(rows["data"] == "mnist") & (rows["method"] == "spearman")]
    shown = (rows["attack"] == "clean") | rows["attack"].str.endswith("@mean")
    rows["q_value"] = 0.01
    rows.loc[rows.index[shown][:5], "q_value"] = 0.2
    rows.loc[rows.index[shown][5], "coefficient"] = np.nan
    axis = correlation_heatmap(rows).axes[0]
    assert sum(patch.get_hatch() is not None for patch in axis.patches) == 5
    assert sum(text.get_text() == "–" for text in axis.texts) == 1
    assert len(axis.texts) == shown.sum()


def test_landing_shows_every_model_once(drawn: dict[str, Figure]) -> None:
    axis = next(axis for axis in drawn["where_attacks_land-mnist-lenet"].axes if axis.get_title().startswith("PGD"))
    rows = TABLES["landing"].query("data == 'mnist' and attack == 'pgd' and epsilon_label == '0.2'")
    rows = rows[rows["excluded"].isna()]
    points = np.concatenate([line.get_xdata() for line in axis.lines if line.get_linestyle() == "None"])
    assert np.allclose(np.sort(points), np.sort(100 * rows["runner_up_rate"]))


def test_bands_are_left_out_where_they_would_cover_each_other() -> None:
    rows = TABLES["accuracy"].query("data == 'mnist' and loss == 'dr_softmax' and loss_weight == 0.005")
    for n_settings, n_bands in ((16, 16), (17, 0)):
        many = [rows.assign(loss_weight=0.001 * (1 + i), run_id=rows["run_id"] + str(i)) for i in range(n_settings)]
        figure = epsilon_curves(pd.concat(many), "mnist", "lenet")
        panel = next(axis for axis in figure.axes if axis.get_title().startswith("PGD"))
        assert len(panel.collections) == n_bands
        assert ("too many losses for bands" in figure.get_suptitle()) == (n_bands == 0)


@pytest.mark.parametrize(("table", "kind"), [("accuracy", "epsilon_curves"), ("training", "training_curves")])
def test_losses_too_many_for_bands_are_shared_out_over_two_figures(table: str, kind: str) -> None:
    rows = TABLES[table].query("data == 'mnist' and loss == 'dr_softmax' and loss_weight == 0.005")
    ce = TABLES[table].query("data == 'mnist' and loss == 'ce'")
    others = [rows.assign(loss=loss, loss_weight=0.0, run_id=rows["run_id"] + loss) for loss in ("gce", "trades")]

    def legends(n_weights: int, *more: pd.DataFrame) -> dict[str, list[str]]:
        weights = [rows.assign(loss_weight=1.0 + i, run_id=rows["run_id"] + str(i)) for i in range(n_weights)]
        plan = plan_figures({**TABLES, table: pd.concat([ce, *weights, *more])})
        own = [figure for figure in plan if figure.name.startswith(f"{kind}-mnist-lenet")]
        return {
            f"{figure.name}: {figure.title}": [
                text.get_text() for text in figure.draw().legends[0].get_texts() if text.get_text() != "chance"
            ]
            for figure in own
        }

    name, title = f"{kind}-mnist-lenet", KINDS[kind]
    assert list(legends(MOST_BANDS - 3, *others)) == [f"{name}: mnist, lenet: {title}"]
    assert list(legends(MOST_BANDS)) == [f"{name}: mnist, lenet: {title}"], "there is nothing to share out"
    assert legends(MOST_BANDS - 2, *others) == {
        f"{name}: mnist, lenet, DR-softmax: {title}": ["CE", *(f"DR {1 + i}" for i in range(MOST_BANDS - 2))],
        f"{name}-others: mnist, lenet, other losses and procedures: {title}": ["CE", "GCE", "TRADES"],
    }


def test_study_of_excluded_models_only_can_be_drawn() -> None:
    tables = {name: table.copy() for name, table in study_tables().items()}
    for name in ("models", "accuracy", "landing", "training", "worst_case", "softmax_profile"):
        if "excluded" in tables[name]:
            tables[name]["excluded"] = "near chance on clean data"
    kinds = set()
    for planned in plan_figures(tables):
        planned.draw().draw_without_rendering()
        kinds.add(planned.kind)
    assert not kinds & {"epsilon_curves", "training_curves", "where_attacks_land", "robustness_against_time"}


def test_smallest_study_can_be_drawn() -> None:
    tables = {name: table for name, table in study_tables().items()}
    keep = {"cifar10-0-0", "cifar10-0.005-0"}
    for name in ("models", "accuracy", "landing", "training", "worst_case"):
        tables[name] = tables[name][tables[name]["run_id"].isin(keep)]
    tables["comparators"] = comparator_table(tables["models"], tables["accuracy"], tables["worst_case"])
    for name in ("correlations", "landing_matrices"):
        tables[name] = tables[name].iloc[:0]
    tables["softmax_profile"] = tables["softmax_profile"].query("data == 'cifar10' and loss_weight != 0.001")
    kinds = set()
    for planned in plan_figures(tables):
        planned.draw().draw_without_rendering()
        kinds.add(planned.kind)
    assert kinds == set(KINDS) - {"correlation_heatmap"}
    figure = statistic_vs_accuracy(
        tables["models"], tables["accuracy"], tables["correlations"], "margin", "cifar10", "smallcnn"
    )
    assert "no coefficient" in _words(figure)


def test_model_that_withstands_everything_or_nothing_is_drawn() -> None:
    landing = TABLES["landing"].copy()
    landing["n_flips"], landing["runner_up_rate"], landing["matrix_correlation"] = 0, np.nan, np.nan
    where_attacks_land(landing, TABLES["landing_matrices"], "mnist", "lenet").draw_without_rendering()
    accuracy = TABLES["accuracy"].copy()
    accuracy["robust_accuracy"] = 0.0
    epsilon_curves(accuracy, "mnist", "lenet").draw_without_rendering()


def test_colour_is_fixed_per_loss_and_darker_for_more_weight() -> None:
    weights = [0.0001, 0.001, 0.01, 0.1]
    light = [sum(matplotlib.colors.to_rgb(setting_style("dr_softmax", weight)["color"])) for weight in weights]
    assert light == sorted(light, reverse=True) and len(set(light)) == 4
    losses = ["ce", "dr_softmax", "label_smoothing", "gce", "cot", "logit_squeezing", "confidence_penalty", "mine"]
    styles = [setting_style(loss, 0.005) for loss in losses]
    assert len({style["color"] for style in styles}) == len({style["marker"] for style in styles}) == len(losses)


def test_names_and_order() -> None:
    table = pd.DataFrame({"loss": ["cot", "dr_softmax", "ce", "dr_softmax"], "loss_weight": [0.0, 0.02, 0.0, 0.005]})
    assert settings(table) == [("ce", 0.0), ("dr_softmax", 0.005), ("dr_softmax", 0.02), ("cot", 0.0)]
    assert [setting_label(*setting) for setting in settings(table)] == ["CE", "DR 0.005", "DR 0.02", "COT"]
    assert shown_setting(table) == ("dr_softmax", 0.005)
    assert shown_setting(table, "gce") is None
    assert attacks(["worst_l2", "square", "pgd@mean", "clean"]) == ["clean", "pgd@mean", "square", "worst_l2"]
    assert (span([4, 3]), span([2, 2]), span([])) == ("3–4", "2", "0")


@pytest.mark.parametrize(("hits", "n"), [(0, 1000), (3, 10), (137, 1000), (1000, 1000)])
def test_wilson_interval_agrees_with_scipy(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert np.allclose(wilson_interval([hits / n], [n])[:, 0], (expected.low, expected.high), atol=1e-12)
