"""Where the words of each process go: a file for every rank, the console for rank 0."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_dist.config import parse_recipe
from cifar_dist.launching import doctor
from cifar_dist.train import run
from tests.helpers import TINY, command, run_command, status_of


def test_every_rank_has_a_file_and_rank_0_the_console(tmp_path: Path) -> None:
    worker = [*command(2, module="tests.worker"), "speak", *TINY, "--out", str(tmp_path)]
    done = run_command(worker)
    assert done.returncode == 0, done.stderr
    words = {rank: (tmp_path / f"logs/rank-{rank}.log").read_text() for rank in (0, 1)}
    assert re.match(r"# 20\S+, rank 1, process \d+ on \S+\n", words[1])
    for rank in (0, 1):
        for stream in ("output", "errors"):
            assert words[rank].count(f"{stream} of rank {rank}\n") == 20
            assert f"{stream} of rank {1 - rank}" not in words[rank]
    assert done.stdout.count("output of rank 0") == done.stderr.count("errors of rank 0") == 20
    assert "of rank 1" not in done.stdout + done.stderr
    assert "finished at step 20" in words[0]


def test_the_first_failure_comes_last_with_its_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = [*command(2, module="tests.worker"), "fail_on", "1", *TINY, "--out", str(tmp_path)]
    done = run_command(worker)
    assert done.returncode != 0
    said = done.stderr[: done.stderr.index("error: rank 1 failed at step 0: ZeroDivisionError")]
    assert said.rstrip().endswith("ZeroDivisionError: the bug in question")
    assert said.count("Traceback (most recent call last)") == 1  # and not that of losing it
    (tmp_path / "log").write_text(done.stdout + done.stderr)
    assert doctor.main(["--explain", str(tmp_path / "log")]) == 2
    assert capsys.readouterr().out.rstrip().endswith("ZeroDivisionError: the bug in question")
    log = (tmp_path / "logs/rank-1.log").read_text()
    assert "ZeroDivisionError: the bug in question" in log
    assert status_of(tmp_path)["message"].startswith("rank 1 failed at step 0: ZeroDivisionError")


def test_a_console_that_goes_away_does_not_end_the_run(tmp_path: Path) -> None:
    started = [*command(), *TINY, "--out", str(tmp_path)]
    with subprocess.Popen(started, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("cifar_dist: ")
        process.stdout.close()  # as when the terminal or the connection is gone
        assert process.wait(timeout=120) == 0
    assert status_of(tmp_path)["state"] == "finished"
    assert "finished at step 20" in (tmp_path / "logs/rank-0.log").read_text()


@pytest.mark.parametrize("environment", [{}, {"PYTHONUNBUFFERED": "1"}])
def test_a_reader_that_has_seen_enough_hears_no_more(environment: dict[str, str]) -> None:
    line = f"{sys.executable} -m cifar_dist plan | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line], env=os.environ | environment, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_a_log_that_cannot_be_written_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    assert run(parse_recipe([*TINY, "--out", str(tmp_path)])[0]).state == "finished"
    assert "warning: the log failed, training goes on" in capsys.readouterr().out


def test_a_continued_run_continues_its_log_and_gives_the_streams_back(tmp_path: Path) -> None:
    before = sys.stdout, sys.stderr
    run(parse_recipe([*TINY, "--out", str(tmp_path)])[0])
    first = (tmp_path / "logs/rank-0.log").read_text()
    run(parse_recipe([*TINY, "--train.epochs", "3", "--out", str(tmp_path)])[0])
    whole = (tmp_path / "logs/rank-0.log").read_text()
    assert whole.startswith(first)
    assert "continues at step 20" in whole[len(first) :]
    assert (sys.stdout, sys.stderr) == before
