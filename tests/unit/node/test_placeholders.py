from __future__ import annotations

import pytest

from hpc_gym.node.placeholders import Values, numbered, wanted_endpoints
from hpc_gym.plan.plan import ConfigFile, Probe, Process

ENDPOINTS = {
    "rollout-0": "10.0.0.1:4000",
    "rollout-10": "10.0.0.3:4000",
    "rollout-2": "10.0.0.2:4000",
    "master": "10.0.0.9:1",
}
VALUES = Values(
    plain={"node": "rollout-0", "private_dir": "/tmp/hg"},
    ports={"gym": 20609},
    fds={"rollout-0": 7},
    endpoint=ENDPOINTS.__getitem__,
    endpoint_names=tuple(ENDPOINTS),
)


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("{private_dir}/vllm-0.sock", "/tmp/hg/vllm-0.sock"),
        ("{port:gym}-{port:gym+99}", "20609-20708"),
        ("{fd:rollout-0}", "7"),
        ("{host:master}:{portof:master} {endpoint:master}", "10.0.0.9:1 10.0.0.9:1"),
        ("{endpoints:rollout}", "10.0.0.1:4000,10.0.0.2:4000,10.0.0.3:4000"),
        ("{python} -m x", "/venv/bin/python -m x"),
    ],
)
def test_a_placeholder_is_replaced(text: str, filled: str) -> None:
    assert VALUES.fill(text, "/venv/bin/python") == filled


@pytest.mark.parametrize(
    "text", ['{"backend": "hpc_gym"}', "${address}", "${oc.env:HOME}", "{unknown}", "{}", "{{ node }}"]
)
def test_what_is_no_placeholder_stays(text: str) -> None:
    assert VALUES.fill(text) == text


def test_an_undeclared_name_is_refused() -> None:
    with pytest.raises(KeyError, match="nobody"):
        VALUES.fill("{port:nobody}")


def test_a_process_waits_for_the_endpoints_it_names_anywhere() -> None:
    process = Process(
        name="rank-0",
        role="train",
        kind="task",
        runtime="base",
        argv=("x", "{host:master}"),
        env={"SERVERS": "{endpoints:rollout}"},
        files=(ConfigFile("f", "{port:gym}"),),
        ready=Probe("notify"),
    )
    assert wanted_endpoints(process, ENDPOINTS) == set(ENDPOINTS)


def test_numbered_names_are_in_the_order_of_their_numbers() -> None:
    assert numbered("rollout", ["rollout-10", "rollout-2", "rollout-x", "rollout", "my-rollout-1"]) == [
        "rollout-2",
        "rollout-10",
    ]
