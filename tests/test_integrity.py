"""A finished run vouches for its files: one that is damaged is told and trained again, and comes out the same."""

import json
from pathlib import Path

import pytest
from conftest import compose_train

from drs.config import TrainConfig
from drs.errors import DamagedFileError
from drs.integrity import check_files, describe_files, has_changed, with_checksum
from drs.jobs import settled
from drs.runs import RunFolder, run_folder
from drs.training import train


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return compose_train(
        "data=digits", "model=mlp", "loss=ce", "epochs=1", "batch_size=64", f"results_dir={tmp_path}/results",
        "study=s", "progress=false",
    )  # fmt: skip


def contents(run: RunFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.path.iterdir()}


def flip(content: bytes, position: float) -> bytes:
    place = int(position * (len(content) - 1))
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_damaged_run_is_told_and_trained_again(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(config)
    run = run_folder(config)
    whole = contents(run)
    assert set(whole) == {"checkpoint.safetensors", "config.yaml", "metrics.csv", "status.json"}
    damages = [(name, flip(content, position)) for name, content in whole.items() for position in (0.05, 0.5, 1.0)]
    damages += [(name, content[:-1]) for name, content in whole.items() if name != "status.json"]
    damages += [("status.json", whole["status.json"][:-3]), ("status.json", b""), ("checkpoint.safetensors", None)]
    damages.append(("status.json", whole["status.json"].replace(b'"epochs": 1', b'"epochs": 3')))
    trained = 0
    for name, damaged in damages:
        path = run.path / name
        path.unlink() if damaged is None else path.write_bytes(damaged)
        result = settled(config)
        if name == "status.json" and result is not None:
            # A flipped bit of white space is none.
            assert json.loads(damaged or b"") == json.loads(whole[name])
            path.write_bytes(whole[name])
            continue
        assert result is None, f"{name} is damaged, and is not found to be"
        capsys.readouterr()
        if trained < 4:
            assert train(config).state == "done"
            assert f"trains again: {name} is damaged (" in capsys.readouterr().out
            again = contents(run)
            assert again["checkpoint.safetensors"] == whole["checkpoint.safetensors"]
            assert again["config.yaml"] == whole["config.yaml"]
            trained += 1
            whole = again
        path.write_bytes(whole[name])
    found = settled(config)
    assert found is not None and found.state == "skipped"
    assert trained == 4


def test_large_file_is_told_by_its_size_where_a_run_is_skipped_and_by_its_digest_where_it_is_read(
    tmp_path: Path,
) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    recorded = describe_files(tmp_path, ("a",))
    check_files(tmp_path, recorded, ("a", "unknown"))
    (tmp_path / "a").write_bytes(b"y" * 100)
    check_files(tmp_path, recorded, ("a",), hash_up_to=99)
    for limit in (100, None):
        with pytest.raises(DamagedFileError, match="its SHA-256 is"):
            check_files(tmp_path, recorded, ("a",), hash_up_to=limit)
    (tmp_path / "a").write_bytes(b"x" * 99)
    with pytest.raises(DamagedFileError, match="has 99 bytes, but 100 were written"):
        check_files(tmp_path, recorded, ("a",), hash_up_to=50)
    (tmp_path / "a").unlink()
    with pytest.raises(DamagedFileError, match=r"cannot be read \(No such file"):
        check_files(tmp_path, recorded, ("a",))


def test_checksum_of_a_status_covers_everything_else_in_it() -> None:
    status = with_checksum({"state": "done", "seconds": 0.1 + 0.2, "files": {"a": {"bytes": 1}}})
    assert not has_changed(json.loads(json.dumps(status)))
    assert with_checksum(status) == status
    for change in ({"state": "failed"}, {"seconds": 0.3}, {"files": {"a": {"bytes": 2}}}, {"more": 1}):
        assert has_changed({**status, **change})
    assert not has_changed({"state": "done"}), "a status of before there were checksums"
