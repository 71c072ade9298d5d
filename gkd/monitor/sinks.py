"""Where the metrics of a step go: a JSON line always, TensorBoard and Weights & Biases if asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from gkd.errors import RunFolderError
from gkd.files import finite, write_atomically
from gkd.monitor.metrics import MetricValue
from gkd.run_files import RunFiles, parse_record


class MetricSink(Protocol):
    """Takes one record a step."""

    def log(self, step: int, metrics: Mapping[str, MetricValue]) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """One JSON object a line, `step` first, handed to the operating system before `log` returns.

    NaN and infinities are written as null: strict JSON that every reader parses. Opening an existing file drops
    a last line that a crash cut short. Raises OSError that names the file, e.g. when the disk is full.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._keep(lambda step: True)
        # Unbuffered: a line that did not fit on the disk must not come back to fail in close().
        self._file = self.path.open("ab", buffering=0)

    def log(self, step: int, metrics: Mapping[str, object]) -> None:
        record = finite({"step": step, **metrics})
        rest = memoryview(json.dumps(record, allow_nan=False).encode() + b"\n")
        try:
            while rest:  # a raw write may take a part only
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def truncate_after(self, step: int) -> None:
        """Drops the records of later steps, which a resumed run does again. -1 drops all.

        The file is replaced in one step, so a crash leaves the old one or the new one.
        Raises RunFolderError (file:line) for a line before the last that is not a record.
        """
        self._file.close()
        self._keep(lambda recorded: recorded <= step)
        self._file = self.path.open("ab", buffering=0)

    def close(self) -> None:
        self._file.close()

    def _keep(self, wanted: Callable[[int], bool]) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        kept = [line + b"\n" for line, record in _records(self.path, content) if wanted(record["step"])]
        if b"".join(kept) != content:
            write_atomically(self.path, b"".join(kept))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, oldest first; a last line that was cut short is left out.

    Raises RunFolderError (file:line) for any other line that is not a record.
    """
    path = Path(path)
    return [record for _, record in _records(path, path.read_bytes())]


class TensorBoardSink:
    """Scalars under the metrics' own names; strings as text. Imports torch when made.

    TensorBoard hides what a run before this one wrote for `start_step` and later.
    """

    def __init__(self, folder: str | Path, start_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start_step)

    def log(self, step: int, metrics: Mapping[str, MetricValue]) -> None:
        for name, value in metrics.items():
            if isinstance(value, str):
                self._writer.add_text(name, value, step)
            elif name != "step":
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Weights & Biases. A resumed run continues the same W&B run, whose id is kept in the run folder."""

    def __init__(self, run_folder: str | Path, name: str, config: Mapping[str, Any], project: str = "gkd") -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        id_file = RunFiles(Path(run_folder)).wandb_id
        known_id = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None
        # An unattended run must not wait for a login, and W&B's capture of stdout would break the progress bar.
        settings = wandb.Settings(login_timeout=30, init_timeout=60, console="off")
        self._run = wandb.init(
            project=project,
            name=name,
            id=known_id,
            resume="allow" if known_id else None,
            dir=str(run_folder),
            config=dict(config),
            settings=settings,
        )
        if known_id is None:
            write_atomically(id_file, f"{self._run.id}\n".encode())

    def log(self, step: int, metrics: Mapping[str, MetricValue]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class OptionalSink:
    """A sink that training does not depend on: at its first failure `warn` is called once and it falls silent."""

    def __init__(self, name: str, make: Callable[[], MetricSink], warn: Callable[[str], None]) -> None:
        self._name, self._warn = name, warn
        self._sink: MetricSink | None = None
        self._attempt(lambda: setattr(self, "_sink", make()))

    def log(self, step: int, metrics: Mapping[str, MetricValue]) -> None:
        if (sink := self._sink) is not None:
            self._attempt(lambda: sink.log(step, metrics))

    def close(self) -> None:
        if (sink := self._sink) is not None:
            self._attempt(sink.close)
            self._sink = None

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001  (whatever a service, a network or an import may raise)
            self._sink = None
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._warn(f"warning: {self._name} is off for the rest of the run ({reason}); metrics.jsonl goes on")


def _records(path: Path, content: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    """The lines of a metrics file without their ends, each with its record."""
    lines = content.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    records: list[tuple[bytes, dict[str, Any]]] = []
    for number, line in enumerate(lines, start=1):
        record = parse_record(line)
        if record is not None:
            records.append((line, record))
        elif number < len(lines):
            raise RunFolderError(f"{path}:{number}: not a metrics record; mend or remove this line")
    return records
