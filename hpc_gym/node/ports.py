"""Ports of a node that nobody else can be given while we hold them.

Ports lie below the ephemeral range, so that no outgoing connection takes one, and above Ray's worker ports
(10002-19999). A single port is held by a bound socket that does not listen: its user, who binds with SO_REUSEADDR as
every server of ours does, gets it, while the reservation of another job, which binds without, does not. A block of
ports must pass NeMo Gym's own bind tests, which do without SO_REUSEADDR, so there only the port before the block is
held: blocks lie on a common grid, and that one stands for the whole. Single ports are taken from a quarter of the range
where no blocks are.
"""

from __future__ import annotations

import random
import socket
from pathlib import Path

_GRID = 128
_LOWEST = 20480


class Ports:
    """Ports reserved by this process, until `release`."""

    def __init__(self) -> None:
        self._held: list[socket.socket] = []
        self._range = _range()

    def single(self) -> int:
        """One free TCP port, held. Raises OSError when there is none."""
        low, high = _singles(*self._range)
        for _ in range(200):
            port = random.randrange(low, high)
            if held := _hold(port):
                self._held.append(held)
                return port
        raise OSError(f"no free TCP port found between {low} and {high} on this node")

    def block(self, count: int) -> int:
        """The first of `count` free TCP ports in a row, guarded. Raises OSError when there is none."""
        low, high = self._range[0], _singles(*self._range)[0]
        cells = -(-(count + 1) // _GRID)
        starts = range(low // _GRID, high // _GRID - cells + 1)
        for start in random.sample(starts, len(starts)):
            guard = start * _GRID
            guards = [_hold(guard + _GRID * cell) for cell in range(cells)]
            if all(guards) and all(is_free(port) for port in range(guard + 1, guard + count + 1) if port % _GRID):
                self._held.extend(each for each in guards if each)
                return guard + 1
            for each in guards:
                if each:
                    each.close()
        raise OSError(f"no {count} free TCP ports in a row found between {low} and {high} on this node")

    def release(self) -> None:
        for held in self._held:
            held.close()
        self._held.clear()


def listening(address: str) -> socket.socket:
    """A TCP socket that listens on `address`, on a port outside the ephemeral range, inheritable once it is passed
    on.
    """
    low, high = _singles(*_range())
    for _ in range(200):
        port = random.randrange(low, high)
        if not is_free(port):
            continue
        try:
            return socket.create_server((address, port), backlog=1024)
        except OSError:
            continue
    raise OSError(f"no free TCP port found on {address} between {low} and {high}")


def is_free(port: int) -> bool:
    """Whether `port` can be bound on all addresses at this moment."""
    if held := _hold(port):
        held.close()
    return held is not None


def _hold(port: int) -> socket.socket | None:
    held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        held.bind(("", port))
    except OSError:
        held.close()
        return None
    # Only from now on: the bind itself must collide with others' reservations.
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return held


def _singles(low: int, high: int) -> tuple[int, int]:
    """The part of the range that no blocks are in."""
    return (low + (high - low) // 4 * 3) // _GRID * _GRID, high


def _range() -> tuple[int, int]:
    try:
        ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        ephemeral = 32768
    high = ephemeral if ephemeral >= _LOWEST + 20 * _GRID else 32768
    return _LOWEST, min(high, 61000)
