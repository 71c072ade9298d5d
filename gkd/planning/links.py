"""What goes over the links between devices, and how long it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gkd.planning.devices import RING_LATENCY_S
from gkd.planning.setup import Setup


@dataclass(frozen=True)
class Link:
    """What one training device sends or receives over one kind of link in a step."""

    name: str
    link: str  # "node", "network", "device" or "host"
    bytes_a_step: float
    seconds: float


def collective(setup: Setup, name: str, size_bytes: float, count: float) -> Link:
    """An all-gather or reduce-scatter of `size_bytes` in all, in `count` pieces, over all training devices.

    Rings pass each device's links once: inside a node its own, between nodes all of a node's together.
    """
    ranks, device = setup.devices, setup.device
    if ranks == 1:
        return Link(name, "device", 0.0, 0.0)
    within = ranks <= device.devices_a_node
    rate = device.node_link_bytes_per_s
    if not within:
        rate = min(rate, device.network_bytes_per_s * device.devices_a_node)
    sent = size_bytes * (ranks - 1) / ranks
    waiting = count * RING_LATENCY_S * math.ceil(ranks / device.devices_a_node)
    return Link(name, "node" if within else "network", sent, sent / rate / device.efficiency.link + waiting)
