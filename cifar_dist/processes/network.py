"""The network interface through which the machines of a launch reach each other."""

import ipaddress
import os
import socket
from typing import TYPE_CHECKING

from cifar_dist.processes.peers import Peers

if TYPE_CHECKING:
    pass


def choose_interface(peers: Peers) -> None:
    """Have gloo use the network interface through which the machines reach each other.

    Its own choice is the address of the host's name, which may not resolve, and which Debian puts
    on 127.0.1.1. GPUs use gloo too, for agreeing on signals.
    """
    # The first machine may reach itself through its loopback: then the others know the way.
    told = peers.tell("address", address_towards(os.environ["MASTER_ADDR"]))
    outside = [address for address in told if not ipaddress.ip_address(address).is_loopback]
    interface = interface_of(address_towards((*outside, "127.0.0.1")[0]))
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def address_towards(host: str) -> str:
    """Return the address from which this machine would reach `host`; nothing is sent."""
    family, kind, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """Return the name of the network interface that has the address, if one does."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if address in [entry.address for entry in addresses]:
            return name
    return None
