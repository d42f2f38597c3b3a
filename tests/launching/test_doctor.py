"""The doctor: on this machine, with all processes of a launch, and on a log."""

import io
import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from cifar_dist.launching import doctor
from cifar_dist.launching.findings import Finding
from cifar_dist.launching.forecast import fit_line
from cifar_dist.launching.known_errors import KNOWN, explain
from tests.helpers import TINY, command, free_port, run_command

MODULE = "cifar_dist.launching.doctor"


@pytest.fixture(autouse=True)
def no_choice_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset OMP_NUM_THREADS: the tests set it to 1, and the doctor would report that."""
    monkeypatch.delenv("OMP_NUM_THREADS")


def examined(*argv: str, **environment: str) -> tuple[int, dict[str, Any]]:
    """Run the doctor without a launcher, and return its exit code and JSON report."""
    shown = io.StringIO()
    with mock.patch.dict(os.environ, environment), redirect_stdout(shown):
        code = doctor.main([*TINY, *argv, "--json"])
    return code, json.loads(shown.getvalue())


def codes(found: dict[str, Any]) -> set[str]:
    return {finding["code"] for finding in found["findings"]}


def write_config(path: Path, **values: Any) -> Path:
    path.write_text(yaml.safe_dump({"distributed_type": "MULTI_GPU", "num_processes": 2} | values))
    return path


def test_this_machine_is_fine() -> None:
    done = run_command([sys.executable, "-m", MODULE, *TINY])
    assert done.returncode == 0, done.stdout
    assert "no problems found" in done.stdout


def test_a_taken_port_is_found_with_its_holder(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        config = write_config(tmp_path / "two.yaml", main_process_port=port)
        code, found = examined("--accelerate-config", str(config))
    assert code == 2
    finding, other = found["findings"]
    assert (finding["code"], other["code"]) == ("port-taken", "no-devices")
    assert f"port {port} is in use by process {os.getpid()}" in finding["message"]


def test_three_processes_on_two_machines(tmp_path: Path) -> None:
    address = {"main_process_ip": "127.0.0.1", "main_process_port": 29511}
    values = address | {"num_machines": 2, "num_processes": 3}
    code, found = examined("--accelerate-config", str(write_config(tmp_path / "c.yaml", **values)))
    assert code == 2
    assert {"total", "loopback-endpoint"} <= codes(found)


@pytest.mark.slow
def test_of_three_processes_on_two_machines_only_two_start(tmp_path: Path) -> None:
    address = {"main_process_ip": "127.0.0.1", "main_process_port": free_port()}
    values = address | {"num_machines": 2, "num_processes": 3, "mixed_precision": "no"}
    config = write_config(tmp_path / "c.yaml", **values)
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    launch += ["--config_file", str(config), "--machine_rank"]
    train = ["-m", "cifar_dist.train", *TINY, "--out", str(tmp_path / "run")]
    running = [subprocess.Popen([*launch, str(rank), *train]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert json.loads((tmp_path / "run/run.json").read_text())["world_size"] == 2
    assert "total" in codes(examined("--accelerate-config", str(config))[1])


def test_the_default_configuration_is_reported(tmp_path: Path) -> None:
    (tmp_path / "accelerate").mkdir()
    path = write_config(tmp_path / "accelerate/default_config.yaml", rdzv_backend="c10d")
    code, found = examined(HF_HOME=str(tmp_path))
    assert code == 1
    assert codes(found) == {"default-config", "ignored-key", "no-devices"}
    assert str(path) in found["configuration"]


def test_a_run_folder_of_another_recipe_is_found(tmp_path: Path) -> None:
    assert run_command([*command(), *TINY, "--out", str(tmp_path / "run")]).returncode == 0
    code, found = examined("--optim.lr", "0.5", "--out", str(tmp_path / "run"))
    assert (code, codes(found)) == (2, {"out"})


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--model.name", "torchvision/alexnet", "torchvision/alexnet cannot process"),
        ("--model.name", "nowhere.py:Net", "there is no file 'nowhere.py'"),
        ("--data.limit_train", "8", "exceeds the 8 training images"),
    ],
)
def test_a_recipe_that_cannot_be_trained_is_an_error(option: str, value: str, message: str) -> None:
    code, found = examined(option, value)
    assert (code, codes(found)) == (2, {"recipe"})
    assert message in found["findings"][0]["message"]


def test_a_missing_dataset_is_reported_once(tmp_path: Path) -> None:
    code, found = examined("--data.name", "imagefolder", "--data.root", str(tmp_path / "none"))
    assert [finding["code"] for finding in found["findings"]] == ["dataset"]
    assert code == 0


def test_a_slurm_script_is_checked(tmp_path: Path) -> None:
    script = tmp_path / "job.sbatch"
    script.write_text("#SBATCH --ntasks-per-node=8\nsrun torchrun -m cifar_dist.train\n")
    code, found = examined("--script", str(script))
    assert (code, codes(found)) == (2, {"tasks", "not-requeued"})


@pytest.mark.parametrize(
    "launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)]
)
def test_two_processes_measure_latency_and_bandwidth(launcher: str, tmp_path: Path) -> None:
    start = command(2, launcher, MODULE)
    done = run_command([*start, *TINY, "--out", str(tmp_path / "run"), "--json"])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    link = found["all_reduce"]
    seconds = {int(size): value for size, value in link["seconds"].items()}
    assert min(seconds) == 1 << 10
    assert 0 < seconds[1 << 10] < seconds[25 << 20] < 10
    constant, per_byte = fit_line(seconds)  # with two processes: latency, 1 / bandwidth
    assert link["latency_seconds"] == pytest.approx(max(0.0, constant))
    assert link["bytes_per_second"] == pytest.approx(1 / per_byte)
    assert {"rank_0", "rank_1", "slowest_over_fastest"} <= found.keys()
    assert not any(finding["level"] == "error" for finding in found["findings"])
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_processes_with_different_configurations_are_named(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"{rank}/accelerate").mkdir(parents=True)
        write_config(tmp_path / f"{rank}/accelerate/default_config.yaml", debug=bool(rank))
    script = tmp_path / "start.sh"
    script.write_text(
        f'#!/bin/bash\nexport HF_HOME={tmp_path}/$RANK\nexec {sys.executable} -m {MODULE} "$@"\n'
    )
    script.chmod(0o755)
    torchrun = command(2, "torchrun")[:-2]
    done = run_command([*torchrun, "--no_python", str(script), *TINY])
    assert done.returncode != 0
    assert "error: configuration is" in done.stdout
    assert "on rank 1" in done.stdout


@pytest.mark.slow
def test_a_launcher_that_started_one_of_two_processes_is_reported() -> None:
    launch = command(2, "accelerate", MODULE)
    launch[launch.index("--multi_gpu")] = "--cpu"
    done = run_command([*launch, *TINY])
    assert done.returncode != 0
    assert "error: accelerate launch was asked for several processes" in done.stdout


@pytest.mark.slow
def test_a_process_that_hangs_is_named(tmp_path: Path) -> None:
    worker = [*command(2, module="tests.worker"), "hang_in_doctor", "1"]
    began = time.monotonic()
    done = run_command([*worker, *TINY])
    assert done.returncode != 0
    assert "error: rank 1 did not arrive within" in done.stdout
    assert "in the first all-reduce (rank 1 is in worker.py:" in done.stdout
    assert time.monotonic() - began < 90


LOGS = {
    "port-taken": "RuntimeError: The server socket has failed to listen [::]:29500 (errno: 98 - "
    "Address already in use). EADDRINUSE",
    "libuv": "use_libuv was requested but PyTorch was built without libuv support",
    "wrong-interface": "RuntimeError: Gloo connectFullMesh failed with [127.0.1.1]:3: refused",
    "download": "error: cifar10 is not in 'data' and could not be downloaded (https://x)",
    "late": "[rank1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12)",
    "device-twice": "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1b000",
    "unknown-key": "ValueError: The config file at c.yaml had unknown keys (['fp16'])",
    "no-machine-rank": "TypeError: int() argument must be a string, a bytes-like object or a real "
    "number, not 'NoneType'",
    "no-address": "rdzv_endpoint=None:29500",
    "killed": "  exitcode  : -9 (pid: 812)",
    "shared-memory": "DataLoader worker is killed by signal: Bus error.",
    "crashed": "  exitcode  : -11 (pid: 3)",
    "memory": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
    "disk": "OSError: [Errno 28] No space left on device",
    "no-meeting": "torch.distributed.elastic.rendezvous.api.RendezvousTimeoutError",
    "unreachable": "OSError: [Errno 113] No route to host",
    "unknown-host": "socket.gaierror: [Errno -2] Name or service not known",
    "nccl": "ncclUnhandledCudaError: Call to CUDA function failed.",
    "too-few-devices": "CUDA error: invalid device ordinal",
    "driver": "The NVIDIA driver on your system is too old (found version 11040).",
    "architecture": "CUDA error: no kernel image is available for execution on the device",
    "wrong-type": "AttributeError: 'bool' object has no attribute 'lower'",
    "alone": "the launcher asked for 2 processes, but Accelerate joined 1",
    "peer-to-peer": "NotImplementedError: Using RTX 4000 series doesn't support",
    "shapes-differ": "op.preamble.length <= op.nbytes. 20 vs 16",
    "unused-parameters": "Expected to have finished reduction in the prior iteration",
    "time-limit": "slurmstepd: error: *** JOB 7 CANCELLED AT 12:00 DUE TO TIME LIMIT ***",
    "preempted": "torch.distributed.elastic.multiprocessing.api.SignalException: got signal: 15",
    "files": "OSError: [Errno 24] Too many open files",
}


@pytest.mark.parametrize(("code", "log"), LOGS.items(), ids=LOGS)
def test_known_errors_are_explained(code: str, log: str) -> None:
    found = explain(f"epoch 1/2\n{log}\n")
    assert code in {finding.code for finding in found}
    assert all(finding.message.startswith("line 2: ") for finding in found)


def test_errors_are_explained_in_the_order_of_the_log() -> None:
    found = explain("\n".join(reversed(LOGS.values())))
    lines = [int(finding.message.split(":")[0].removeprefix("line ")) for finding in found]
    assert lines == sorted(lines)
    assert len(set(lines)) == len(LOGS)


def test_every_known_error_has_a_log() -> None:
    assert {known.code for known in KNOWN} == LOGS.keys()


def test_interleaved_tracebacks_are_separated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = """\
    [rank1]: Traceback (most recent call last):
    [rank0]: Traceback (most recent call last):
    [rank1]:   File "train.py", line 7, in step
    [rank0]:   File "train.py", line 9, in reduce
    [rank0]: RuntimeError: Connection closed by peer [127.0.0.1]:2
    [rank1]: ValueError: the cause
    """
    (tmp_path / "log").write_text(textwrap.dedent(log))
    assert doctor.main(["--explain", str(tmp_path / "log")]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "[rank1]: ValueError: the cause"
    assert not any("rank0" in line for line in lines)


def test_a_log_without_errors_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log").write_text("all is well\n")
    assert doctor.main(["--explain", str(tmp_path / "log")]) == 1
    assert "contains no known error" in capsys.readouterr().out
    assert doctor.main(["--explain", str(tmp_path / "absent")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_log_can_be_read_from_a_pipe() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cifar_dist", "doctor", "--explain", "-", "--json"],
        input=LOGS["memory"],
        capture_output=True,
        text=True,
    )
    (finding,) = json.loads(done.stdout)["findings"]
    assert Finding(**finding).code == "memory"
    assert done.returncode == 2
