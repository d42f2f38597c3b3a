"""Two machines simulated on one: network namespaces with host names and ssh, joined by a veth."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import needs

# Options for JOB: a run long enough to interrupt. At this low rate all process counts agree.
LONG = ("--train.epochs", "40", "--optim.lr", "0.001")
ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Machine:
    """A network namespace with its own host name. Files and processes are shared.

    Attributes:
        name: host name, and name of the namespace.
        address: IP address of its end of the cable.
    """

    name: str
    address: str

    @property
    def hosts(self) -> Path:
        """The file that is mounted as its /etc/hosts."""
        return Path(tempfile.gettempdir(), f"{self.name}.hosts")

    def command(self, *arguments: str) -> list[str]:
        """Return the command line that runs `arguments` on this machine."""
        enter = ["nsenter", f"--net=/run/netns/{self.name}", "unshare", "--uts", "--mount"]
        begin = f"hostname {self.name} && mount --bind {self.hosts} /etc/hosts"
        return [*enter, "sh", "-c", f'{begin} && exec "$@"', "sh", *arguments]


# The names contain the process ID, because several test processes may run at once.
MACHINES = (
    Machine(f"cifar-a-{os.getpid()}", "10.99.0.1"),
    Machine(f"cifar-b-{os.getpid()}", "10.99.0.2"),
)
SETTINGS = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
}


def needs_two_machines(*programs: str) -> None:
    """Skip the test if two machines with these programs cannot be simulated here."""
    needs("ip", "nsenter", "unshare", *programs)
    probe = ["unshare", "--net", "--uts", "--mount", "ip", "link", "set", "lo", "up"]
    done = subprocess.run(probe, capture_output=True, timeout=30)
    if done.returncode:
        pytest.skip("no permission to create network namespaces; run as root")


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Set up both as Debian does, each with its name on 127.0.1.1, and remove them afterwards."""
    try:
        for machine in MACHINES:
            run("ip", "netns", "add", machine.name)
            others = [f"{other.address} {other.name}\n" for other in MACHINES if other != machine]
            own = f"127.0.0.1 localhost\n127.0.1.1 {machine.name}\n"
            machine.hosts.write_text(own + "".join(others))
        first, second = MACHINES
        ends = ["netns", first.name, "type", "veth", "peer", "name", "cable", "netns", second.name]
        run("ip", "link", "add", "cable", *ends)
        for machine in MACHINES:
            inside = ["ip", "-netns", machine.name]
            run(*inside, "address", "add", f"{machine.address}/24", "dev", "cable")
            run(*inside, "link", "set", "lo", "up")
            run(*inside, "link", "set", "cable", "up")
        yield first, second
    finally:
        _remove()


def cut_cable() -> None:
    """Take down the link between the machines."""
    run("ip", "-netns", MACHINES[0].name, "link", "set", "cable", "down")


@contextmanager
def ssh_servers(folder: Path) -> Iterator[Path]:
    """Serve ssh on both machines, and yield a folder for the PATH with an ssh that can log in."""
    folder.mkdir()
    for key in ("server", "client"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    Path("/run/sshd").mkdir(exist_ok=True)
    settings = " ".join(f"{name}={value}" for name, value in SETTINGS.items())
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/server\nAuthorizedKeysFile {folder}/client.pub\nStrictModes no\n"
        "UsePAM no\nPidFile none\nPermitRootLogin yes\n"
        # Set after the startup files of the login shell, which may set anything.
        f'ForceCommand exec env {settings} sh -c "$SSH_ORIGINAL_COMMAND"\n'
    )
    (folder / "ssh_config").write_text(
        f"IdentityFile {folder}/client\nStrictHostKeyChecking no\nLogLevel ERROR\n"
        "UserKnownHostsFile /dev/null\n"
    )
    ssh = folder / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    ssh.chmod(0o755)
    sshd = [str(shutil.which("sshd")), "-D", "-f", str(folder / "sshd_config")]
    servers = [
        subprocess.Popen([*machine.command(*sshd), "-E", str(folder / f"{machine.name}.log")])
        for machine in MACHINES
    ]
    try:
        for machine in MACHINES:
            probe = machine.command("bash", "-c", f"exec 3<> /dev/tcp/{machine.address}/22")
            wait_until(lambda probe=probe: _works(probe))
        yield ssh.parent
    finally:
        for server in servers:
            server.terminate()
            server.wait(timeout=30)


def wait_until(happened: Callable[[], object]) -> None:
    """Wait until a condition holds, for two minutes at most."""
    end = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.1)


def run(*arguments: str) -> None:
    """Run a short command; fail if it fails."""
    subprocess.run(arguments, check=True, timeout=30)


def _works(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, timeout=30).returncode == 0


def _remove() -> None:
    for machine in MACHINES:
        subprocess.run(["ip", "netns", "delete", machine.name], capture_output=True, timeout=30)
        machine.hosts.unlink(missing_ok=True)
