"""Processes that can only live together, as the parts of a vLLM over several nodes: when one ends, none of the others
can go on, and most would not even notice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from hpc_gym.node.channel import Message
from hpc_gym.node.process import ManagedProcess


class Bonds:
    """Starts all processes of one word (`Process.together`) again where one of them ends, on whichever nodes they are.

    Every life belongs to a round of its word. Whoever ends calls for the next round; whoever still lives in an earlier
    one is ended, and lives again in the newest. So two that die of one another, or at once, cost one round.
    """

    def __init__(self, processes: Sequence[ManagedProcess], send: Callable[[Message], None]) -> None:
        """`processes`: those of this node. `send`: to the coordinator, which passes it on to all nodes."""
        self._processes = processes
        self._send = send
        self._newest: dict[str, int] = {}
        self._rounds: dict[str, int] = {}
        """By name of the process, that of its life."""

    def begin(self, process: ManagedProcess) -> None:
        """To be called before each life."""
        process.given_up = asyncio.get_running_loop().create_future()
        self._rounds[process.spec.name] = self._newest.get(process.spec.together, 0)

    def restart(self, process: ManagedProcess) -> None:
        """To be called when a life has ended and another is to follow."""
        if process.spec.together:
            number = self._rounds.get(process.spec.name, 0) + 1
            self._learn(process.spec.together, number)
            self._send({"type": "restart", "together": process.spec.together, "round": number})

    def take(self, message: Message) -> None:
        """What `restart` of any node sent."""
        together, number = str(message["together"]), int(message["round"])
        self._learn(together, number)
        for process in self._processes:
            behind = self._rounds.get(process.spec.name, number) < number
            if process.spec.together == together and behind and not process.given_up.done():
                process.given_up.set_result(f"another part of {together} has ended, and they can only live together")

    def _learn(self, together: str, number: int) -> None:
        self._newest[together] = max(self._newest.get(together, 0), number)
