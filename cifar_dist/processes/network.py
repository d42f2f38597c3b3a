"""The network interface through which the machines of a launch reach each other."""

import ipaddress
import os
import socket

from cifar_dist.processes.peers import Peers


def choose_interface(peers: Peers) -> None:
    """Set GLOO_SOCKET_IFNAME to the network interface that connects the machines.

    By default gloo uses the address of the host name, which may not resolve and which Debian maps
    to 127.0.1.1. Runs on GPUs use gloo too, to agree on signals.
    """
    # The first machine may reach itself through its loopback interface; the others do not.
    addresses = peers.exchange("address", address_towards(os.environ["MASTER_ADDR"]))
    outside = [address for address in addresses if not ipaddress.ip_address(address).is_loopback]
    interface = interface_of(address_towards((*outside, "127.0.0.1")[0]))
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def address_towards(host: str) -> str:
    """Return the local address of this machine's route to `host`. Nothing is sent."""
    family, kind, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """Return the name of the network interface that has the address, or None."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if address in [entry.address for entry in addresses]:
            return name
    return None
