"""SIGKILL at random moments of a sweep, its evaluation and its report; ``--kills 50`` is the long form."""

from pathlib import Path

import forked
import pytest

DRIVER = Path(__file__).with_name("killing.py")


def test_nothing_is_lost_to_kills(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    kills = request.config.getoption("--kills")
    seed = request.config.getoption("--kill-seed")
    size = "small" if kills < 20 else "whole"
    arguments = [str(tmp_path), f"--kills={kills}", f"--seed={seed}", f"--size={size}"]
    done = forked.run(DRIVER, *arguments, out=tmp_path / "driver", seconds=300 + 60 * kills)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.strip().splitlines()[-1]
    assert int(summary.split()[0]) >= kills
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{summary}")
