"""Two machines on this one: a network, a host name and an ssh server each, joined by a cable."""

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

# For JOB: long enough to be met while it trains, and slow to learn, for the sake of equal integers.
LONG = ("--train.epochs", "40", "--optim.lr", "0.001")
ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Machine:
    """A network namespace with a host name of its own; files and processes are shared.

    Attributes:
        name: what the machines call it, and its namespace.
        address: of its end of the cable.
    """

    name: str
    address: str

    @property
    def hosts(self) -> Path:
        """Its /etc/hosts."""
        return Path(tempfile.gettempdir(), f"{self.name}.hosts")

    def command(self, *arguments: str) -> list[str]:
        """Return the command line that runs `arguments` on this machine."""
        enter = ["nsenter", f"--net=/run/netns/{self.name}", "unshare", "--uts", "--mount"]
        begin = f"hostname {self.name} && mount --bind {self.hosts} /etc/hosts"
        return [*enter, "sh", "-c", f'{begin} && exec "$@"', "sh", *arguments]


# Names of this test process: another one may be having its own two.
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
    """Skip the test if this machine cannot play two machines with these programs."""
    needs("ip", "nsenter", "unshare", *programs)
    probe = ["unshare", "--net", "--uts", "--mount", "ip", "link", "set", "lo", "up"]
    done = subprocess.run(probe, capture_output=True, timeout=30)
    if done.returncode:
        pytest.skip("making network namespaces is not permitted; run as root")


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Set both up as Debian does, each with its name on 127.0.1.1; remove them at the end."""
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
    """Unplug it; it is gone with the machines."""
    run("ip", "-netns", MACHINES[0].name, "link", "set", "cable", "down")


@contextmanager
def ssh_servers(folder: Path) -> Iterator[Path]:
    """Serve ssh on both machines, and return a folder for the PATH whose ssh may log in."""
    folder.mkdir()
    for key in ("server", "client"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    Path("/run/sshd").mkdir(exist_ok=True)
    settings = " ".join(f"{name}={value}" for name, value in SETTINGS.items())
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/server\nAuthorizedKeysFile {folder}/client.pub\nStrictModes no\n"
        "UsePAM no\nPidFile none\nPermitRootLogin yes\n"
        # After what the login shell reads, which may be anything here.
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
    """Wait for something that takes seconds, two minutes at most."""
    end = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.1)


def run(*arguments: str) -> None:
    """Run a command that is soon done."""
    subprocess.run(arguments, check=True, timeout=30)


def _works(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, timeout=30).returncode == 0


def _remove() -> None:
    for machine in MACHINES:
        subprocess.run(["ip", "netns", "delete", machine.name], capture_output=True, timeout=30)
        machine.hosts.unlink(missing_ok=True)
