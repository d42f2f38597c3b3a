"""A Slurm cluster of one controller and two nodes, without munge or systemd, on two machines."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.launching.machines import ROOT, SETTINGS, Machine

# Debian: slurmctld, slurmd, slurm-client
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo", "squeue")


class Cluster:
    """Runs Slurm's commands on the first machine."""

    def __init__(self, machines: tuple[Machine, Machine], folder: Path) -> None:
        self.machines = machines
        self.environment = {**os.environ, **SETTINGS, "SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *arguments: str) -> str:
        """Return the output of a command."""
        return subprocess.run(
            self.machines[0].command(*arguments),
            env=self.environment,
            cwd=ROOT,
            check=True,
            timeout=30,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout

    def facts(self, job: str) -> dict[str, str]:
        """Return the fields of a job, by name, from scontrol."""
        words = self.run("scontrol", "show", "job", job, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, *states: str) -> str:
        """Wait until the job is in one of the states, and return that state."""
        end = time.monotonic() + 150
        while (state := self.facts(job)["JobState"]) not in states:
            assert time.monotonic() < end, state
            time.sleep(0.3)
        return state


@contextmanager
def running(machines: tuple[Machine, Machine], folder: Path) -> Iterator[Cluster]:
    """Start a cluster, and end its jobs and daemons afterwards."""
    folder.mkdir()
    names = ",".join(machine.name for machine in machines)
    (folder / "slurm.conf").write_text(
        f"ClusterName=test\nSlurmctldHost={machines[0].name}({machines[0].address})\n"
        "AuthType=auth/none\nCredType=cred/none\nSlurmUser=root\nSlurmdUser=root\n"
        "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nMpiDefault=none\n"
        "SelectType=select/cons_tres\nSelectTypeParameters=CR_CPU\nReturnToService=2\n"
        f"StateSaveLocation={folder}/state\nSlurmdSpoolDir={folder}/%n\n"
        f"SlurmctldPidFile={folder}/slurmctld.pid\nSlurmdPidFile={folder}/%n.pid\n"
        f"SlurmctldLogFile={folder}/slurmctld.log\nSlurmdLogFile={folder}/%n.log\n"
        f"SlurmdParameters=config_overrides\nNodeName={names} CPUs=2 State=UNKNOWN\n"
        f"PartitionName=all Nodes={names} Default=YES MaxTime=60 State=UP\n"
    )
    (folder / "state").mkdir()
    cluster = Cluster(machines, folder)
    commands = [machines[0].command("slurmctld", "-D", "-c")]
    commands += [machine.command("slurmd", "-D", "-N", machine.name) for machine in machines]
    quiet = subprocess.DEVNULL
    daemons = [
        subprocess.Popen(command, env=cluster.environment, stdout=quiet, stderr=quiet)
        for command in commands
    ]
    try:
        end = time.monotonic() + 60
        while _idle_nodes(cluster) < len(machines):
            assert time.monotonic() < end, (folder / "slurmctld.log").read_text()
            time.sleep(0.3)
        yield cluster
    finally:
        _end_jobs(cluster)
        for daemon in daemons:
            daemon.terminate()
            daemon.wait(timeout=60)


def _idle_nodes(cluster: Cluster) -> int:
    try:
        return cluster.run("sinfo", "--noheader", "--Node", "--states", "idle").count("\n")
    except subprocess.CalledProcessError:  # the controller is not up yet
        return 0


def _end_jobs(cluster: Cluster) -> None:
    try:
        cluster.run("scancel", "--full", "--signal", "KILL", "--user", "root")
        cluster.run("scancel", "--user", "root")
        end = time.monotonic() + 60
        while cluster.run("squeue", "--noheader").strip() and time.monotonic() < end:
            time.sleep(0.3)
    except (subprocess.SubprocessError, OSError) as error:
        print(f"jobs may be left: {error}")
