"""NeMo Gym's processes: on the rollout nodes, or on nodes of their own with an environment server beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hpc_gym.config.schema import Experiment
from hpc_gym.plan.gym_code import WORKING_DIRECTORY
from hpc_gym.plan.nemo_gym import POLICY_CONFIG
from hpc_gym.plan.plan import ConfigFile, Link, Probe, Process
from hpc_gym.plan.processes import BASE, Names, role_env


@dataclass(frozen=True)
class GymSetup:
    """How NeMo Gym is started, wherever it runs."""

    text: str
    """Our configuration (`nemo_gym.node_config`)."""
    config_paths: Sequence[str]
    """The environments' own."""
    links: tuple[Link, ...] = ()
    """Where there are servers of the user's own (`gym_code`)."""


def gym_process(
    experiment: Experiment, names: Names, setup: GymSetup, role: Literal["rollout", "environment"]
) -> Process:
    """NeMo Gym with the servers of all environments, on a node of that role."""
    own = "{attempt_dir}/gym/{node}.yaml"
    # Later configurations win: ours comes last. Quoted as Hydra's override grammar wants it.
    paths = ",".join(f"'{path}'" for path in (POLICY_CONFIG, *setup.config_paths, own))
    env = {
        # Ray binds to loopback only with this switch (ray 2.60); its sockets need a short path.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_TMPDIR": "{private_dir}",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Whoever reaches Ray's port without a token runs code as this user. By itself Ray (2.60) keeps its token in
        # the home directory, readable by others, one for all jobs.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": "{private_dir}/token",
    }
    argv = (
        *(("env", "-C", WORKING_DIRECTORY) if setup.links else ()),
        *("gym", "env", "start", f"+config_paths=[{paths}]"),
        # Hydra writes a folder of its own wherever it is started.
        *("hydra.run.dir={private_dir}/hydra", "hydra.output_subdir=null"),
    )
    return Process(
        name="gym",
        role=role,
        kind="service",
        runtime=names.gym,
        argv=argv,
        env=role_env(experiment, role, env),
        files=(ConfigFile(own, setup.text),),
        links=setup.links,
        ports=("gym-head", "gym*100"),
        ready=Probe(kind="gym", target="gym-head"),
        ready_within_s=experiment.supervision.gym_ready_s,
        alive_within_s=experiment.supervision.alive_s,
        restarts=experiment.supervision.restarts,
        # Its servers have nothing to save, and `gym env start` (0.4.0) takes any grace whole.
        stop_grace_s=1.0,
    )


def environment_processes(
    experiment: Experiment, names: Names, setup: GymSetup, index: int, judges: str | None
) -> tuple[Process, ...]:
    """NeMo Gym and the environment server of environment node `index`. `judges`: endpoints that serve the judge."""
    endpoint = f"environment-{index}"
    argv = (
        *("{python}", "-m", "hpc_gym.rollout.environment_server", "--run-dir", "{run_dir}", "--node", "{node}"),
        *("--fd", f"{{fd:{endpoint}}}", "--policy-port", "{port:policy}", "--gym-port", "{port:gym-head}"),
        *("--rollouts", "{endpoints:rollout}", *(("--judges", judges) if judges else ())),
        *("--secrets", "{secrets}"),
    )
    server = Process(
        name="environment-server",
        role="environment",
        kind="service",
        runtime=BASE,
        argv=argv,
        env=role_env(experiment, "environment", {}),
        ports=("policy",),
        listen=(endpoint,),
        ready=Probe(kind="notify"),
        ready_within_s=experiment.supervision.gym_ready_s,
        alive_within_s=experiment.supervision.alive_s,
        restarts=experiment.supervision.restarts,
    )
    return (gym_process(experiment, names, setup, "environment"), server)
