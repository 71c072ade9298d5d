"""Rows of the efficiency axis: counts that are exact, and speeds that were measured here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from gkd.engines.sampling import SamplerSpec
from gkd.errors import GkdError
from gkd.evaluate.figures import COLUMNS, Axis, Cell, Figure, Row
from gkd.evaluate.sizes import parameter_counts
from gkd.evaluate.speed import Speed, Workload, measure_speed, spread

Note = Callable[[str], None]
_SPEED_ROWS: tuple[tuple[str, str, Callable[[Speed], Cell]], ...] = (
    ("first_token_ms", "ms", lambda speed: spread([1e3 * seconds for seconds in speed.first_token_s])),
    ("tokens_per_s", "tokens/s", lambda speed: spread(speed.tokens_per_s)),
    ("peak_memory_bytes", "bytes", lambda speed: Figure(speed.peak_memory_bytes)),
)
_SPEED_TITLES = {"first_token_ms": "first token", "tokens_per_s": "generation", "peak_memory_bytes": "peak memory"}


def efficiency_axis(
    folders: Mapping[str, Path],
    specs: Mapping[str, Mapping[str, SamplerSpec]],
    workload: Workload,
    flops: Callable[[Path, float], float],
    note: Note,
) -> Axis:
    """`specs` holds a sampler for each engine and column; `flops` counts those of a token in a context of so many.

    What cannot be measured, be it an engine that is not installed, leaves its reason in the cells.
    """
    rows = _count_rows(folders, workload.context_tokens, flops)
    for engine, by_column in specs.items():
        speeds = {column: _speed(spec, column, workload, note) for column, spec in by_column.items()}
        for name, unit, figure_of in _SPEED_ROWS:
            cells = {c: speed if isinstance(speed, str) else figure_of(speed) for c, speed in speeds.items()}
            rows.append(Row(f"{engine}_{name}", f"{_SPEED_TITLES[name]}, {engine}", unit, cells))
    settings = {
        "prompt_tokens": workload.prompt_tokens,
        "completion_tokens": workload.completion_tokens,
        "batch_size": workload.batch_size,
        "repeats": workload.repeats,
        "flops_context_tokens": workload.context_tokens,
    }
    return Axis(tuple(rows), settings=settings)


def _count_rows(folders: Mapping[str, Path], context_tokens: float, flops: Callable[[Path, float], float]) -> list[Row]:
    counts = {column: parameter_counts(folder) for column, folder in folders.items()}
    flops_cells = {column: _flops_cell(folder, context_tokens, flops) for column, folder in folders.items()}
    return [
        Row("parameters", "parameters", "parameters", {c: Figure(total) for c, (total, _) in counts.items()}),
        Row(
            "non_embedding_parameters",
            "parameters outside embeddings",
            "parameters",
            {c: Figure(inner) for c, (_, inner) in counts.items()},
        ),
        Row("flops_a_token", "FLOPs a token", "FLOPs", flops_cells),
    ]


def _flops_cell(folder: Path, context_tokens: float, flops: Callable[[Path, float], float]) -> Cell:
    try:
        return Figure(flops(folder, context_tokens))
    except GkdError as error:  # an architecture that nobody counted
        return str(error)


def _speed(spec: SamplerSpec, column: str, workload: Workload, note: Note) -> Speed | str:
    note(f"timing the {COLUMNS[column]} with {spec.engine}")
    try:
        return measure_speed(spec, workload)
    except GkdError as error:
        return f"{spec.engine}: {error}"
