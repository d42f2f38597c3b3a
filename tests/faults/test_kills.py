"""After SIGKILL at any time the newest checkpoint is intact, and the result does not change."""

from pathlib import Path

import pytest

from tests.faults.campaign import kill_runs


@pytest.mark.fault(1, 2, 3)
@pytest.mark.parametrize(
    ("processes", "kills"), [pytest.param(1, 8, marks=pytest.mark.slow), (2, 6)]
)
def test_killed_runs_end_with_the_same_weights(processes: int, kills: int, tmp_path: Path) -> None:
    tally = kill_runs(processes, kills, tmp_path, seed=processes)
    assert tally.wrong == []
    assert tally.kills == kills
    assert tally.in_save >= kills // 3


@pytest.mark.slow
@pytest.mark.fault(1, 2, 3)
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_write_of_a_save_survives_a_kill(processes: int, tmp_path: Path) -> None:
    tally = kill_runs(processes, 60, tmp_path, seed=9)
    assert tally.wrong == []
    assert tally.in_save >= 24
