from __future__ import annotations

import pytest

from hpc_gym.node.lost_nodes import Component, without


def test_a_component_lets_go_of_its_lost_nodes_and_keeps_the_rest() -> None:
    component = Component("71", ("gpu-3", "gpu-4", "gpu-7"))
    assert without(component, ["gpu-4", "cpu-1"]) == Component("71", ("gpu-3", "gpu-7"))


def test_host_names_with_a_domain_are_the_nodes_that_slurm_knows_without() -> None:
    left = without(Component("71", ("gpu-3", "gpu-4")), ["gpu-4.cluster.example"])
    assert left == Component("71", ("gpu-3",))


@pytest.mark.parametrize("lost", [[], ["gpu-9"], ["gpu-3", "gpu-4"]], ids=["none", "another's", "all"])
def test_a_component_stays_as_it_is_where_it_lost_no_node_or_all_of_them(lost: list[str]) -> None:
    assert without(Component("71", ("gpu-3", "gpu-4")), lost) is None
