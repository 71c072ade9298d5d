"""What a run needs of this machine, tried out: nothing is loaded, and nothing stays behind."""

from __future__ import annotations

import importlib.metadata
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from gkd.config import Config, cache_folder
from gkd.environment import CXX_COMPILERS, unsafe_switches
from gkd.errors import InputError
from gkd.extras import require, require_vllm
from gkd.planning.devices import device_named
from gkd.planning.disk import checkpoint_bytes, result_bytes, run_folder_bytes
from gkd.planning.memory import gb
from gkd.planning.models import architectures
from gkd.planning.settled import make_setup
from gkd.system_errors import explained, nearest_above, write_fault

_LEAST_SHARED_BYTES = 1 << 30
_LEAST_FREE_BYTES = 1 << 30  # of the cache and of temporary files
_OF_A_RUN = ("cli", "train", "cpu", "cuda")  # extras


class Finding(NamedTuple):
    """A `fault` stops any run, a `warning` some."""

    level: Literal["ok", "warning", "fault"]
    what: str
    text: str


def examine(config: Config | None = None) -> Iterator[Finding]:
    """Of the machine; with a config also whether its run's folder can be written and has room."""
    yield from _packages()
    yield _vllm(config)
    yield _program("git", ("git",), "environment.json of a run will hold no revision")
    without = "DeepSpeed's own optimizers and torch.compile need one, the defaults do not"
    yield _program("compiler", CXX_COMPILERS, without)
    yield _shared_memory(Path("/dev/shm"))
    yield _loopback()
    yield from _places()
    yield from (Finding("warning", name, f"is set: {danger}; unset it") for name, danger in unsafe_switches().items())
    if config is not None:
        yield _run_folder(config)


def _packages() -> Iterator[Finding]:
    """Against the ranges that were tested together. A package that is not there belongs to an extra that is not."""
    try:
        require("gkd train", "train")
    except InputError as error:
        yield Finding("fault", "packages", str(error))
        return
    from packaging.requirements import Requirement

    count = 0
    for text in importlib.metadata.requires("gkd") or ():
        requirement = Requirement(text)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in _OF_A_RUN):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        count += 1
        if not requirement.specifier.contains(version, prereleases=True):
            yield Finding("warning", requirement.name, f"is {version}; tested with {requirement.specifier}")
    yield Finding("ok", "packages", f"{count} that a run needs were compared with the tested ranges")


def _vllm(config: Config | None) -> Finding:
    """Without a config nobody knows whether it is needed."""
    samples = config is not None and config.rollout.engine == "vllm" and config.rollout.placement == "local"
    try:
        require_vllm("rollout.engine", "or set it to transformers")
    except InputError as error:
        return Finding("fault" if samples else "warning", "vLLM", str(error))
    return Finding("ok", "vLLM", "is installed")


def _program(what: str, names: tuple[str, ...], without: str) -> Finding:
    found = next((path for name in names if (path := shutil.which(name)) is not None), None)
    if found is None:
        return Finding("warning", what, f"none of {', '.join(names)} in PATH: {without}")
    return Finding("ok", what, found)


def _shared_memory(folder: Path) -> Finding:
    if not folder.is_dir():
        return Finding("warning", str(folder), "is not there: adapters go to the sampler through a disk")
    total_bytes = shutil.disk_usage(folder).total
    if total_bytes < _LEAST_SHARED_BYTES:
        text = f"has {gb(total_bytes)}, which NCCL and engines over several ranks may exceed; --shm-size of a container"
        return Finding("warning", str(folder), text)
    return Finding("ok", str(folder), f"has {gb(total_bytes)}")


def _loopback() -> Finding:
    """Where ranks of a machine, and servers on it, meet. gloo also looks up the machine's own name."""
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
    except OSError as error:
        return Finding("fault", "loopback", f"no port of 127.0.0.1 can be bound ({error.strerror}): bring `lo` up")
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        text = f"{name!r}, this machine's name, has no address: several ranks may not meet; add it to /etc/hosts"
        return Finding("warning", "loopback", text)
    return Finding("ok", "loopback", f"port {port} could be bound")


def _places() -> Iterator[Finding]:
    try:
        cache = cache_folder()
    except InputError as error:
        yield Finding("fault", "cache", str(error))
    else:
        yield _place("cache", cache, _LEAST_FREE_BYTES)
    yield _place("temporary files", Path(tempfile.gettempdir()), _LEAST_FREE_BYTES)


def _run_folder(config: Config) -> Finding:
    """What all ranks write together is as large on one device."""
    try:
        student, teacher = architectures(config)
        setup = make_setup(config, student, teacher, device_named("cpu"), 1)
    except InputError as error:
        finding = _place("run folder", config.run.folder, 0)
        return finding if finding.level != "ok" else Finding("warning", "run folder", f"its size is not known: {error}")
    sizes = f"a checkpoint takes {gb(checkpoint_bytes(setup))}, final/ {gb(result_bytes(setup))}"
    return _place("run folder", config.run.folder, run_folder_bytes(config, setup), sizes)


def _place(what: str, folder: Path, needed_bytes: float, sizes: str = "") -> Finding:
    if (fault := write_fault(folder)) is not None:
        return Finding("fault", what, explained(fault) or str(fault))
    folder = nearest_above(folder)
    free_bytes = shutil.disk_usage(folder).free
    text = f"{folder} has {gb(free_bytes)} free" + (f"; {sizes}" if sizes else "")
    if free_bytes < needed_bytes:
        return Finding("warning", what, f"{text}; {gb(needed_bytes)} may be needed at once: make room, or keep less")
    return Finding("ok", what, text)
