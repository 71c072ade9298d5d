"""What a model's files and its architecture say of its size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from gkd.evaluate.figures import Axis, Cell, Figure, Row
from gkd.models.load import empty_model, read_config
from gkd.models.quantized_files import packed_scheme, plain_shapes
from gkd.models.weight_files import read_header, weight_files


def stored_parameters(folder: Path) -> int:
    """Sum over the tensors in a folder's safetensors headers. A tied head that is stored once counts once, and packed
    weights count as the numbers that they stand for."""
    scheme = packed_scheme(read_config(str(folder), key="model"), str(folder), "model")
    headers = [read_header(file, "model") for file in weight_files(folder, "model")]
    shapes = {name: tuple(entry["shape"]) for header in headers for name, entry in header.items()}
    return sum(map(math.prod, (shapes if scheme is None else plain_shapes(shapes, scheme)).values()))


def weight_file_bytes(folder: Path) -> int:
    """Of the safetensors files that hold the model's weights."""
    return sum(file.stat().st_size for file in weight_files(folder, "model"))


def parameter_counts(folder: Path) -> tuple[int, int]:
    """(all parameters, those outside of input embedding and output head) of an architecture; shared ones once."""
    model = empty_model(read_config(str(folder), key="model"))
    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = {id(p) for module in ends if module is not None for p in module.parameters()}
    return sum(sizes.values()), sum(size for key, size in sizes.items() if key not in embeddings)


def compression_axis(folders: Mapping[str, Path]) -> Axis:
    """Parameters and bytes as the files hold them, and as shares of the teacher's. Nothing is loaded."""
    parameters = {column: stored_parameters(folder) for column, folder in folders.items()}
    size_bytes = {column: weight_file_bytes(folder) for column, folder in folders.items()}
    return Axis(
        (
            Row("parameters", "parameters on disk", "parameters", _figures(parameters)),
            Row("bytes", "weights on disk", "bytes", _figures(size_bytes)),
            Row("parameters_of_teacher", "parameters, of the teacher's", "share", _shares(parameters)),
            Row("bytes_of_teacher", "weights, of the teacher's", "share", _shares(size_bytes)),
        )
    )


def _figures(values: Mapping[str, int]) -> dict[str, Cell]:
    return {column: Figure(value) for column, value in values.items()}


def _shares(values: Mapping[str, int]) -> dict[str, Cell]:
    return {column: Figure(value / values["teacher"]) for column, value in values.items()}
