"""launch/multi_machine.sh and torchrun on two machines that are simulated on one."""

import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from cifar_dist.processes.network import address_towards, choose_interface, interface_of
from tests.helpers import JOB, Integers, status_of, write_folder
from tests.helpers import tested as integers_of
from tests.launching.machines import (
    LONG,
    ROOT,
    SETTINGS,
    Machine,
    cut_cable,
    needs_two_machines,
    ssh_servers,
    two_machines,
    wait_until,
)

SCRIPT = str(ROOT / "launch" / "multi_machine.sh")
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    needs_two_machines("sshd", "ssh", "ssh-keygen")
    with two_machines() as both:
        yield both


@pytest.fixture
def start(machines: tuple[Machine, Machine], tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts the script on the first machine, to train JOB on both."""
    hosts = " ".join(machine.name for machine in machines)

    def launch(*options: str) -> subprocess.Popen[str]:
        words = machines[0].command("bash", SCRIPT, *JOB, *options, "--out", str(tmp_path / "run"))
        path = f"{folder}:{SETTINGS['PATH']}"
        return _popen(words, {**SETTINGS, "PATH": path, "HOSTS": hosts})

    with ssh_servers(tmp_path / "ssh") as folder:
        yield launch


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_torchrun_on_two_machines(
    rendezvous: str,
    machines: tuple[Machine, Machine],
    alone: Callable[..., Integers],
    tmp_path: Path,
) -> None:
    with _torchrun(rendezvous, machines, tmp_path / "run") as processes:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output
    assert integers_of(tmp_path / "run") == alone()


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_torchrun_names_the_endpoint_that_it_could_not_reach(
    rendezvous: str, machines: tuple[Machine, Machine], tmp_path: Path
) -> None:
    cut_cable()
    first = machines[0].name
    with _torchrun(rendezvous, machines, tmp_path / "run") as processes:
        for process in processes:
            output, _ = process.communicate(timeout=90)
            assert process.returncode == 1, output
    assert re.search(rf"time.*{first}.*29500", output), output  # the second machine's
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("without", [0, 1])
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_both_machines_print_why_one_of_them_cannot_start(
    rendezvous: str, without: int, machines: tuple[Machine, Machine], tmp_path: Path
) -> None:
    roots = [write_folder(tmp_path / "set", {"train": 36, "test": 9})] * 2
    roots[without] = tmp_path / "absent"
    options = ("--data.name", "imagefolder", "--train.batch_size", "4")
    own = (["--data.root", str(roots[0])], ["--data.root", str(roots[1])])
    with _torchrun(rendezvous, machines, tmp_path / "run", *options, own=own) as processes:
        outputs = [process.communicate(timeout=90)[0] for process in processes]
    line = f"error: data.root '{roots[without]}' is not a folder"
    for output in outputs:
        assert re.findall("^error: .*", output, re.M)[0].startswith(line), output
        assert "stopped by a signal" not in output


def examine(machine: Machine, rank: int, first: Machine, folder: Path) -> tuple[int, str]:
    """Run the doctor on one of two machines, with the first one as rendezvous endpoint."""
    config = folder / f"{rank}.yaml"
    config.write_text(
        "distributed_type: MULTI_GPU\nnum_machines: 2\nnum_processes: 2\nmain_process_port: 29500\n"
        f"machine_rank: {rank}\nmain_process_ip: {first.name}\n"
    )
    doctor = ["python", "-m", "cifar_dist", "doctor", "--accelerate-config", str(config), *JOB]
    with _popen(machine.command(*doctor), SETTINGS) as process:
        output, _ = process.communicate(timeout=60)
    return process.returncode, output


@pytest.mark.slow
def test_the_doctor_names_the_machine_that_cannot_be_reached(
    machines: tuple[Machine, Machine], tmp_path: Path
) -> None:
    first, second = machines
    code, output = examine(second, 1, first, tmp_path)
    assert f"note: {first.name} answers, but nothing listens on port 29500 yet" in output
    assert "export GLOO_SOCKET_IFNAME=cable" in output  # its name is on 127.0.1.1
    assert code == 1
    cut_cable()
    code, output = examine(second, 1, first, tmp_path)
    assert f"error: machine 1 cannot reach {first.name}:29500 (" in output
    assert code == 2


@pytest.mark.slow
def test_the_doctor_runs_on_two_machines(machines: tuple[Machine, Machine], tmp_path: Path) -> None:
    module = "cifar_dist.launching.doctor"
    with _torchrun("static", machines, tmp_path / "run", module=module) as processes:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    output = "".join(outputs)
    assert re.search(r"^rank 0: cifar-a-\d+, cpu\nrank 1: cifar-b-\d+, cpu$", output, re.M)
    assert re.search(r"^all reduce: correct; latency \d+ us, [\d.]+ GB/s", output, re.M)


@pytest.mark.slow
def test_the_wrong_network_interface_is_named(
    machines: tuple[Machine, Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with _torchrun("static", machines, tmp_path / "run", "--train.timeout", "10") as processes:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert re.search(r"^error: .*connectFullMesh.*GLOO_SOCKET_IFNAME", "".join(outputs), re.M)


@pytest.mark.slow
def test_the_script_trains_on_two_machines(
    start: Start, alone: Callable[..., Integers], tmp_path: Path
) -> None:
    with start() as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert re.search(r"^cifar-a-\d+: finished at step 20", output, re.M)
    assert integers_of(tmp_path / "run") == alone()


@pytest.mark.slow
def test_a_machine_that_cannot_be_reached_is_named(
    start: Start, machines: tuple[Machine, Machine]
) -> None:
    cut_cable()
    with start() as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 255
    assert f"ssh: connect to host {machines[1].name} port 22" in output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_the_script_saves_the_run(
    number: signal.Signals, start: Start, alone: Callable[..., Integers], tmp_path: Path
) -> None:
    with start(*LONG) as process:
        _wait_until_it_trains(process, tmp_path / "run")
        process.send_signal(number)
        assert process.wait(timeout=60) in (128 + number, -number)
    if number == signal.SIGKILL:  # it could not wait for the machines
        wait_until(lambda: status_of(tmp_path / "run")["state"] != "running")
    assert status_of(tmp_path / "run")["state"] == "preempted", status_of(tmp_path / "run")
    wait_until(lambda: not _workers(tmp_path / "run"))
    _finish(start, alone, tmp_path / "run")


@pytest.mark.slow
def test_when_one_worker_is_killed_all_exit_and_the_same_command_resumes(
    start: Start, machines: tuple[Machine, Machine], alone: Callable[..., Integers], tmp_path: Path
) -> None:
    with start(*LONG, "--checkpoint.every_steps", "7") as process:
        _wait_until_it_trains(process, tmp_path / "run")
        victim = next(worker for worker in _workers(tmp_path / "run") if worker[1] == "1")
        victim[0].kill()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert re.search(
        rf"^{machines[0].name}: error: rank 1 exited without an error message", output, re.M
    )
    assert status_of(tmp_path / "run")["state"] == "failed"
    assert not _workers(tmp_path / "run")
    _finish(start, alone, tmp_path / "run", "--checkpoint.every_steps", "7")


def test_the_script_prints_its_usage() -> None:
    for hosts, options in (("", ["--out", "run"]), ("a b", ["--config", "smoke"])):
        with _popen(["bash", SCRIPT, *options], {"HOSTS": hosts}) as process:
            output, _ = process.communicate(timeout=30)
        assert process.returncode == 2
        assert output.startswith('error: use HOSTS="node1 node2" bash launch/multi_machine.sh')
        assert output.count("\n") == 1


@pytest.mark.parametrize("fails", ["", "b"])
def test_the_command_on_each_machine_and_the_exit_code(fails: str, tmp_path: Path) -> None:
    torchrun = 'echo "$@"\n'
    if fails:
        torchrun += f"""case "$*" in
          *"--node_rank 1"*) while [ ! -e {tmp_path}/trains ]; do sleep 0.1; done; exit 7 ;;
        esac
        trap 'echo saved; kill %1; exit 1' TERM; touch {tmp_path}/trains; sleep 30 & wait"""
    shims = {"ssh": 'for last; do :; done; exec sh -c "$last"', "torchrun": torchrun}
    shims["python"] = "echo 4"  # GPUs
    for name, lines in shims.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    settings = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOSTS": "me@a me@b"}
    checkout = tmp_path / "checkout"  # without a .venv, whose torchrun would come first
    (checkout / "launch").mkdir(parents=True)
    script = shutil.copy(SCRIPT, checkout / "launch")
    command = ["bash", str(script), "--config", "my own.yaml", "--out", "SHARED/run"]
    with _popen(command, settings) as process:
        output, _ = process.communicate(timeout=20)
    assert process.returncode == (7 if fails else 0), output
    assert ("me@a: saved" in output) == bool(fails)
    for rank, host in enumerate("ab"):
        assert (
            f"me@{host}: --nnodes 2 --nproc_per_node 4 --node_rank {rank} --master_addr a "
            "--master_port 29500 --rdzv_conf timeout=120 -m cifar_dist.train --resume auto "
            "--config my own.yaml --out SHARED/run\n"
        ) in output


def test_the_interface_is_that_of_the_route_to_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    loopback = interface_of(address_towards("127.0.0.1"))
    assert loopback in ("lo", "lo0")
    assert interface_of("203.0.113.1") is None  # not an address of this machine
    with pytest.raises(socket.gaierror):
        address_towards("no-such-host.invalid")
    # Two processes on one machine whose name is on 127.0.1.1; GLOO_SOCKET_IFNAME overrides.
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    for chosen in ("", "eth7"):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", chosen)
        if not chosen:
            monkeypatch.delenv("GLOO_SOCKET_IFNAME")
        peers = SimpleNamespace(exchange=lambda what, address: [address, "127.0.1.1"])
        choose_interface(peers)  # type: ignore[arg-type]
        assert os.environ["GLOO_SOCKET_IFNAME"] == (chosen or loopback)


@contextmanager
def _torchrun(
    rendezvous: str,
    machines: tuple[Machine, Machine],
    out: Path,
    *options: str,
    module: str = "cifar_dist.train",
    own: tuple[list[str], list[str]] = ([], []),
) -> Iterator[list[subprocess.Popen[str]]]:
    """Start torchrun with JOB on each machine, and options per machine; finally end it."""
    place = f"{machines[0].name}:29500"
    processes = []
    for rank, machine in enumerate(machines):
        meet = {
            "static": ["--node_rank", str(rank), "--master_addr", machines[0].name],
            "c10d": ["--rdzv_backend", "c10d", "--rdzv_id", "job", "--rdzv_endpoint", place],
        }[rendezvous]
        seconds = {"static": "timeout=15", "c10d": "join_timeout=15,read_timeout=15"}[rendezvous]
        launch = ["torchrun", "--nnodes", "2", "--nproc_per_node", "1", *meet]
        train = ["-m", module, *JOB, *options, *own[rank], "--resume", "auto", "--out", str(out)]
        command = machine.command(*launch, "--rdzv_conf", seconds, *train)
        processes.append(_popen(command, SETTINGS))
    try:
        yield processes
    finally:
        for process in processes:
            process.terminate()
            process.communicate(timeout=60)


def _popen(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _finish(start: Start, alone: Callable[..., Integers], out: Path, *options: str) -> None:
    """Start the same command again, and compare the result with that of an uninterrupted run."""
    assert integers_of(out)[-1][0] < 400
    with start(*LONG, *options) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert integers_of(out) == alone(*LONG)


def _wait_until_it_trains(process: subprocess.Popen[str], out: Path) -> None:
    wait_until(lambda: (out / "metrics.jsonl").exists() and integers_of(out))
    assert process.poll() is None


def _workers(out: Path) -> list[tuple[psutil.Process, str]]:
    """Return the training processes of the run folder `out`, with their ranks."""
    found = []
    for process in psutil.process_iter(["cmdline", "exe"]):
        words = process.info["cmdline"] or []
        if words[1:3] == ["-u", "-m"] and str(out) in words:
            found.append((process, process.environ()["RANK"]))
    return found
