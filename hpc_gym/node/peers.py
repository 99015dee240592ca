"""The supervisors of an attempt as the coordinator knows them: who is there, what they publish, what is said to all."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from hpc_gym.node.channel import Channel, Message
from hpc_gym.plan.plan import Node


@dataclass
class Peer:
    """A supervisor that has joined. Times are monotonic."""

    node: Node
    host: str
    channel: Channel
    last_heard: float
    connected: bool = True
    released: bool = False
    """Nothing of its node is left."""

    @property
    def rank(self) -> int:
        return self.node.rank


class Peers:
    """By rank. Whoever joins late, or again, hears of all endpoints and orders so far."""

    def __init__(self, nodes: Collection[Node], hosts: Collection[str]) -> None:
        """`hosts`: names of the nodes' machines in rank order, where they are known before anybody joins."""
        self._nodes = {node.rank: node for node in nodes}
        self._hosts = dict(enumerate(hosts))
        self._joined: dict[int, Peer] = {}
        self._endpoints: dict[int, Mapping[str, str]] = {}
        self._orders: list[Message] = []

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._joined.values())

    def __contains__(self, rank: int) -> bool:
        return rank in self._joined

    def missing(self) -> list[Node]:
        """The nodes from which nobody has joined."""
        return [node for rank, node in self._nodes.items() if rank not in self._joined]

    def connected(self, rank: int) -> bool:
        return rank in self._joined and self._joined[rank].connected

    def host(self, rank: int) -> str:
        """The host name of a node, "" while nobody knows it."""
        return self._joined[rank].host if rank in self._joined else self._hosts.get(rank, "")

    def join(self, channel: Channel, hello: Message) -> Peer:
        """Takes in the supervisor that said `hello`, and tells it what the others know."""
        rank = int(hello["rank"])
        peer = Peer(self._nodes[rank], str(hello["host"]), channel, time.monotonic())
        self._joined[rank] = peer
        channel.send(self._registry())
        for order in self._orders:
            channel.send(order)
        return peer

    def publish(self, peer: Peer, endpoints: Mapping[str, str]) -> None:
        """Tells all nodes the endpoints of one."""
        self._endpoints[peer.rank] = endpoints
        self.tell(self._registry())

    def order(self, message: Message) -> None:
        """Tells all, and those that join only now."""
        self._orders.append(message)
        self.tell(message)

    def tell(self, message: Message) -> None:
        """Tells all that are there."""
        for peer in self:
            peer.channel.send(message)

    def release(self, node: str) -> None:
        """Nothing of that node is left, and nothing more comes from there."""
        for peer in self:
            peer.released = peer.released or peer.node.name == node

    def give_up(self, rank: int) -> None:
        """A node from which nothing comes any more."""
        if rank in self._joined:
            self._joined[rank].connected = False

    def silent_since(self, moment: float, lost: Collection[str]) -> bool:
        """Whether a node that may have something to tell, and is not among the `lost`, was not heard since `moment`."""
        return any(not peer.released and peer.last_heard < moment and peer.node.name not in lost for peer in self)

    def all_released(self, never_come: Collection[str]) -> bool:
        """Whether no node is left that could still say that it is free. One that has not joined yet will, but for
        those in `never_come`.
        """
        gone = all(peer.released or not peer.connected for peer in self)
        return gone and all(node.name in never_come for node in self.missing())

    def _registry(self) -> Message:
        return {"type": "endpoints", "endpoints": {str(rank): found for rank, found in self._endpoints.items()}}
