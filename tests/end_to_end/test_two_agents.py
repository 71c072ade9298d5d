"""Two torchrun agents that find each other over c10d, on two machines: the losses of one process.

The machines are network namespaces with a cable between them where this user may make such, else two loopback
addresses. The sampler is served on one and the teacher on the other. Everything is float32 and prompts are completed
one at a time, so that no sum depends on what else runs: the rollouts are the same in all runs.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from launching import check, read_metrics, run
from teacher_servers import TeacherServer, start_server

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
STEPS = 5
LOOPBACK = ("127.0.0.1", "127.0.0.2")
CABLE = "gkd0"  # the interface in each namespace


@dataclass(frozen=True)
class Machine:
    """`prefix` runs a command there."""

    address: str
    prefix: tuple[str, ...]

    def free_port(self) -> int:
        if self.address not in LOOPBACK:
            return 29400  # nothing else is there
        with socket.create_server((self.address, 0)) as listener:
            return listener.getsockname()[1]


def namespaces(cleaning: ExitStack) -> list[Machine]:
    """Two network namespaces. Raises CalledProcessError where this user may not make them."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    names = [f"gkd-{os.getpid()}-{side}" for side in "ab"]
    for name in names:
        ip("netns", "add", name)
        cleaning.callback(ip, "netns", "del", name)
    ip("link", "add", "name", CABLE, "netns", names[0], "type", "veth", "peer", "name", CABLE, "netns", names[1])
    machines: list[Machine] = []
    for name, address in zip(names, ("10.77.0.1", "10.77.0.2"), strict=True):
        ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
        for interface in ("lo", CABLE):
            ip("-n", name, "link", "set", interface, "up")
        machines.append(Machine(address, ("ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={CABLE}")))
    return machines


def two_machines(cleaning: ExitStack) -> list[Machine]:
    try:
        if shutil.which("ip"):
            return namespaces(cleaning)
    except subprocess.CalledProcessError:
        pass
    return [Machine(address, ("env", "GLOO_SOCKET_IFNAME=lo")) for address in LOOPBACK]


@dataclass(frozen=True)
class Cluster:
    machines: list[Machine]
    sampler: TeacherServer
    teacher: TeacherServer
    folder: Path
    values: dict[str, Any]  # of a config with everything served

    def config(self, name: str, **sections: dict[str, Any]) -> Path:
        """Sections are whole ones, instead of those of `values`."""
        run_section = {"run": {"name": name, "dir": str(self.folder / name), "steps": STEPS, "seed": 5}}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**self.values, **run_section, **sections}))
        return path

    def losses(self, name: str) -> list[float]:
        records = read_metrics(self.folder / name)
        assert all(record["sync/max_logprob_error"] < 1e-4 for record in records)
        return [record["loss"] for record in records]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_student: Path) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("two-agents")
    rows = [{"prompt": f"prompt {i} " + "x" * i} for i in range(16)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with ExitStack() as cleaning:
        here, there = machines = two_machines(cleaning)
        sampler = start_on(here, tiny_student, folder, "--max-num-seqs", "1", command="serve-sampler")
        cleaning.callback(sampler.process.kill)
        teacher = start_on(there, tiny_teacher, folder)
        cleaning.callback(teacher.process.kill)
        for server in (sampler, teacher):
            server.wait_until_ready(240)
        served = {"placement": "served", "token_file": str(folder / "token")}
        values = {
            "teacher": {"model": str(tiny_teacher), "dtype": "float32", "addresses": [teacher.address], **served},
            "student": {"model": str(tiny_student), "dtype": "float32"},
            "data": {"train": str(folder / "train.jsonl"), "max_prompt_tokens": 64},
            "rollout": {"max_concurrency": 1, "max_new_tokens": 12, "addresses": [sampler.address], **served},
            "optim": {"lr": 1e-3, "batch_size": 8, "micro_batch_size": 4},
        }
        yield Cluster(machines, sampler, teacher, folder, values)


def start_on(
    machine: Machine, model: Path, folder: Path, *options: str, command: str = "serve-teacher"
) -> TeacherServer:
    words = ("--host", machine.address, "--dtype", "float32", "--max-model-tokens", "256", "--kv-cache-gib", "0.1")
    return start_server(model, folder, *words, *options, command=command, prefix=machine.prefix)


@pytest.fixture(scope="module")
def one_process(cluster: Cluster) -> list[float]:
    """The losses of a run without a launcher, on the first machine."""
    machine = cluster.machines[0]
    command = [*machine.prefix, sys.executable, "-m", "gkd", "train", cluster.config("one")]
    check(run(command))
    losses = cluster.losses("one")
    assert len(losses) == STEPS and abs(losses[0] - losses[-1]) > 1e-3, "it learns"
    return losses


def two_agents(machines: Sequence[Machine], config: Path, *overrides: str) -> None:
    """One rank on each machine. Fails if either agent fails."""
    endpoint = f"{machines[0].address}:{machines[0].free_port()}"

    def agent(machine: Machine) -> subprocess.CompletedProcess[str]:
        is_first = machine is machines[0]  # torchrun would look for the endpoint among the host name's addresses
        meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint, "--rdzv_conf", f"is_host={is_first}"]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        command = [*launcher, *meeting, "--local_addr", machine.address]
        words = [*machine.prefix, *command, "-m", "gkd", "train", config, *overrides]
        return run(words)

    with ThreadPoolExecutor(2) as pool:
        for result in list(pool.map(agent, machines)):
            check(result)


def test_with_sampler_and_teacher_served(cluster: Cluster, one_process: list[float]) -> None:
    two_agents(cluster.machines, cluster.config("served"), "deepspeed.zero_stage=3")
    assert cluster.losses("served") == pytest.approx(one_process, abs=1e-4)
    assert sorted(path.name for path in (cluster.folder / "served" / "logs").iterdir()) == ["rank_0.log", "rank_1.log"]


@pytest.mark.long
def test_with_a_sampler_on_each_machine_and_the_teacher_sharded(cluster: Cluster, one_process: list[float]) -> None:
    teacher = {name: cluster.values["teacher"][name] for name in ("model", "dtype")}
    config = cluster.config(
        "colocated",
        teacher={**teacher, "placement": "sharded"},
        rollout={"engine": "vllm", "max_num_seqs": 1, "max_new_tokens": 12, "kv_cache_gib": 0.1},
    )
    two_agents(cluster.machines, config, "deepspeed.zero_stage=3")
    assert cluster.losses("colocated") == pytest.approx(one_process, abs=1e-4)
