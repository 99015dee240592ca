"""The first all-reduce of real ranks: `collectives.py`. The last rank stays away from a second one; the others tell."""

from __future__ import annotations

import json
import os
import time

import psutil

from hpc_gym.training import ranks as ranks_module
from hpc_gym.training.ranks import CollectiveFailed, Ranks, check_collectives, start_distributed


def main() -> None:
    start_distributed(60.0)
    ranks = Ranks()
    facts: dict[str, object] = {"seconds": check_collectives(ranks)}
    listening = {each.laddr.ip for each in psutil.Process().net_connections() if each.status == "LISTEN"}
    facts["listening"] = sorted(listening)
    ranks_module._SMALL_WITHIN_S = 2.0
    if ranks.rank == ranks.world_size - 1:
        ranks.barrier()
        time.sleep(4)
    else:
        try:
            check_collectives(ranks)
        except CollectiveFailed as error:
            facts["failure"] = str(error)
    print(json.dumps(facts), flush=True)
    # The group is broken, and its destructor would wait for it.
    os._exit(0)


if __name__ == "__main__":
    main()
