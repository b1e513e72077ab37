"""Files and names that come from elsewhere: nothing in them is executed, and no name leads out of the results.

Arrays with objects in them are in test_array_files and test_data_cache, the pickles of a data set in
test_data_sources.
"""

import pickle
from pathlib import Path

import pytest
import torch
from conftest import compose_train
from hydra import compose, initialize_config_dir
from real_data import Touch, refused

from drs.config import PROJECT_ROOT, TrainConfig, evaluate_config, run_id
from drs.config_checks import check_study
from drs.errors import DamagedFileError, UserError
from drs.evaluation import read_runs
from drs.runs import RunFolder, run_folder, study_folder
from drs.sweeper import register_plugins
from drs.training import train


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return compose_train(
        "data=digits", "model=mlp", "loss=ce", "epochs=1", "batch_size=64", f"results_dir={tmp_path}/results",
        "study=s", "progress=false",
    )  # fmt: skip


@pytest.fixture
def run(config: TrainConfig) -> RunFolder:
    train(config)
    return run_folder(config)


def without_digests(run: RunFolder) -> None:
    """Let the status vouch for nothing, as one who forges a run would."""
    run.write_status(**{**run.status(), "files": {}})


def test_weights_are_never_unpickled(run: RunFolder, tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", run.path / "checkpoint.safetensors"
    without_digests(run)
    for protocol in (0, 2, 5):
        path.write_bytes(pickle.dumps({"weight": Touch(trace)}, protocol))
        with pytest.raises(DamagedFileError, match=r"checkpoint\.safetensors: not a whole safetensors file"):
            run.load_model(torch.device("cpu"))
    torch.save({"weight": Touch(trace)}, path)
    with pytest.raises(DamagedFileError, match=r"checkpoint\.safetensors: not a whole safetensors file"):
        run.load_model(torch.device("cpu"))
    # A header of the right form that announces more than there is.
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(DamagedFileError, match=r"checkpoint\.safetensors: not a whole safetensors file"):
        run.load_model(torch.device("cpu"))
    assert not trace.exists()


@pytest.mark.parametrize(
    "payload",
    [
        "!!python/object/apply:os.system ['touch {trace}']",
        "!!python/object/new:subprocess.Popen [['touch', '{trace}']]",
        "!!python/name:os.system",
        "!!python/module:antigravity",
    ],
)
def test_config_of_a_run_executes_nothing(run: RunFolder, tmp_path: Path, payload: str) -> None:
    trace, path = tmp_path / "trace", run.path / "config.yaml"
    without_digests(run)
    text = path.read_text()
    path.write_text(text + "more: " + payload.format(trace=trace) + "\n")
    refused(run.config, str(path), "not a config", "python/")
    path.write_text(text.replace("seed: 0", "seed: " + payload.format(trace=trace)))
    refused(run.config, str(path), "not a config", "python/")
    assert not trace.exists()


@pytest.mark.parametrize(
    "text", ["- 1\n- 2\n", "just words", "a: [", "\x00", "a: 1\na: 2\n", "&a [*a, *a]", "a: &x {b: *x}\n"]
)
def test_config_of_another_form_is_one_line(run: RunFolder, text: str) -> None:
    (run.path / "config.yaml").write_text(text)
    refused(run.config, "config.yaml: ")


def test_config_of_a_run_reads_nothing_of_this_machine(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "swordfish")
    path = run.path / "config.yaml"
    path.write_text(path.read_text().replace("study: s", "study: ${oc.env:SECRET}"))
    assert "swordfish" not in refused(run.config, "config.yaml: holds an interpolation")


def test_status_of_another_form_is_one_line(run: RunFolder) -> None:
    for text in (
        "[1]",
        "nonsense",
        "",
        '{"state": "done"',
        "\udcff",
        '{"state": "done", "checksum": "0"}',
        "[" * 100_000,
    ):
        (run.path / "status.json").write_text(text, errors="surrogateescape")
        refused(run.status, "status.json: ")


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "../x", "a/b", "/etc", "/", "a\\b", "~", "~root", "-x", ".hidden", "a b", "a\n", "a\0b",
        "x" * 101, "\u2024\u2024", "\uff0e\uff0e\uff0fx", "a\u2215b", "a\u2044b", "stu\u0301dy", "\u202ename",
        "a\u200bb", "\uff41", "\u0660", "$HOME", "$(id)", "a;b", "a*", "reference", "bench",
    ],
)  # fmt: skip
def test_name_of_a_study_is_one_plain_component(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be one path component"):
        check_study(name)
    with pytest.raises(UserError, match="must be one path component"):
        study_folder(str(tmp_path), name)


def test_both_entrypoints_refuse_such_a_name() -> None:
    with pytest.raises(UserError, match=r"study=\.\./x: must be one path component"):
        compose_train("study=../x")
    register_plugins()
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        for name in ("../x", "/tmp/x", "a/b"):
            with pytest.raises(UserError, match="must be one path component"):
                evaluate_config(compose("evaluate", [f"study={name}"]))


def test_study_that_is_a_link_out_of_the_results_is_refused(tmp_path: Path) -> None:
    outside, results = tmp_path / "outside", tmp_path / "results"
    outside.mkdir()
    results.mkdir()
    (results / "away").symlink_to(outside)
    (results / "up").symlink_to("..")
    for name in ("away", "up"):
        refused(lambda name=name: study_folder(str(results), name), f"study={name}: ", "is a link to", "results_dir=")
    (results / "real").mkdir()
    (results / "alias").symlink_to("real")
    assert study_folder(str(results), "alias") == results / "alias"
    # The results may lie on another disk.
    (tmp_path / "link").symlink_to(results)
    assert study_folder(str(tmp_path / "link"), "real") == results / "real"


def test_run_is_named_by_its_config_and_a_copy_is_no_second_model(run: RunFolder, config: TrainConfig) -> None:
    study = run.path.parent.parent
    for name in ("copy", "0123456789ab", "..evil", "a\nb"):
        folder = run.path.parent / name
        folder.mkdir()
        for path in run.path.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    configs, failures = read_runs(study)
    assert len(failures) == 4
    assert all(f"the id of its config is {run_id(config)}" in failure.error for failure in failures)
    assert {item.run_id for item in configs} - {failure.run.run_id for failure in failures} == {run.run_id}
