from __future__ import annotations

import socket

from hpc_gym.node.ports import Ports, is_free, listening


def test_a_held_port_is_refused_to_other_jobs_and_given_to_its_server() -> None:
    ports = Ports()
    port = ports.single()
    assert not is_free(port)
    socket.create_server(("127.0.0.1", port)).close()
    socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True).close()
    ports.release()
    assert is_free(port)


def test_two_reservations_never_overlap() -> None:
    jobs = [Ports() for _ in range(20)]
    taken: set[int] = set()
    for job in jobs:
        first = job.block(100)
        mine = {job.single(), *range(first, first + 100)}
        assert len(mine) == 101
        assert not taken & mine
        taken |= mine
    for job in jobs:
        job.release()


def test_every_port_of_a_block_passes_the_bind_test_of_its_user() -> None:
    ports = Ports()
    first = ports.block(100)
    assert all(is_free(port) for port in range(first, first + 100))
    ports.release()


def test_a_block_avoids_ports_that_somebody_uses() -> None:
    # One port of every cell of the grid but a few is taken: only those few are left.
    holders = []
    low, high = 20480 // 128, 29696 // 128
    for cell in range(low, high):
        if cell not in (low + 7, low + 8):
            holder = socket.socket()
            try:
                holder.bind(("", cell * 128 + 50))
            except OSError:
                holder.close()
                continue
            holders.append(holder)
    ports = Ports()
    found = set()
    try:
        for _ in range(2):
            try:
                found.add(ports.block(100) // 128)
            except OSError:
                break
    finally:
        ports.release()
        for holder in holders:
            holder.close()
    assert found == {low + 7, low + 8}


def test_a_listening_socket_takes_connections_before_anybody_accepts() -> None:
    with listening("127.0.0.1") as server:
        assert server.getsockname()[1] < 32768
        socket.create_connection(server.getsockname(), timeout=1).close()
