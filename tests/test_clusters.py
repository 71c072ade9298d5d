"""The examples for clusters: valid by Kubernetes' published schema, and what they start is a run of gkd."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from gkd.config import load_config

CONFIGS = Path(__file__).parent.parent / "configs"
VERSIONS = ("1.31", "1.37")


def manifests() -> dict[str, Any]:
    text = (CONFIGS / "kubernetes" / "train.yaml").read_text()
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all(text)}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_manifests_are_kubernetes_own(version: str) -> None:
    found = manifests()
    assert found.keys() == {"Service", "Job"}
    for manifest in found.values():
        kubernetes_validate.validate(manifest, version, strict=True)
    found["Job"]["spec"]["podFailurePolicy"]["rules"][1]["onExitCode"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(found["Job"], version, strict=True)


def test_pods_find_the_first_one_by_its_name() -> None:
    found = manifests()
    job, service = found["Job"], found["Service"]
    pod = job["spec"]["template"]
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    script = pod["spec"]["containers"][0]["args"][0]
    assert f"--master-addr {job['metadata']['name']}-0.{service['metadata']['name']} " in script
    assert "gkd launch -- torchrun" in script and pod["spec"]["terminationGracePeriodSeconds"] > 500
    assert f"--nnodes {job['spec']['completions']} " in script and job["spec"]["parallelism"] == 2


def started(script: str) -> list[str]:
    """The overrides that a script's run is given."""
    words = shlex.split(re.sub(r"\\\n|\$\([^)]*\)", " ", script))
    text = " ".join(words[words.index("train") :]) if "train" in words else " ".join(words)
    return re.findall(r"\w+\.\w+=[^\s;]+", text)


@pytest.mark.parametrize(
    "script",
    [
        manifests()["Job"]["spec"]["template"]["spec"]["containers"][0]["args"][0],
        yaml.safe_load((CONFIGS / "skypilot" / "train.yaml").read_text())["run"],
    ],
    ids=["kubernetes", "skypilot"],
)
def test_what_is_started_is_a_run(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    overrides = started(script)
    config = load_config(CONFIGS / "single_gpu.yaml", overrides)
    assert config.run.save_every == 50 and config.deepspeed.zero_stage == 2 and config.run.dir is not None
    config.check_world_size(16)
    assert re.search(r"config\.resolved\.json\".*--resume", script) and "torchrun --nnodes" in script
