"""Weight-transfer engines for vLLM where NCCL is none: pieces of the weights from files or over gloo.

A piece is a safetensors file of some parameters under their Hugging Face names. Its hash comes with the request that
announces it, over the route that the token guards: bytes from anyone else are not loaded.
"""

from __future__ import annotations

import functools
import hashlib
import re
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors.torch import load
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from gkd.serving.gloo_pair import GlooPair

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.config.weight_transfer import WeightTransferConfig


@dataclass
class PieceInfo(WeightTransferUpdateInfo):
    size_bytes: int
    sha256: str
    file: str = ""  # its name in the weights folder; gloo: empty


@dataclass
class FileInit(WeightTransferInitInfo):
    folder: str


@dataclass
class GlooInit(WeightTransferInitInfo):
    host: str
    port: int
    timeout_s: float


Init = TypeVar("Init", FileInit, GlooInit)


class PieceEngine(WeightTransferEngine[Init, PieceInfo]):
    """Loads pieces in checkpoint format, in any number, layer by layer."""

    update_info_cls = PieceInfo

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: torch.nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self._is_begun = False

    def start_weight_update(self) -> None:
        if self._is_begun:  # an update that was cut off: vLLM's loaders count on from where it stopped
            self.finish_weight_update()
        initialize_layerwise_reload(self.model)
        self._is_begun = True

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        self._is_begun = False

    def receive_weights(self, update_info: PieceInfo) -> None:
        """Raises ValueError for bytes that are not the announced ones."""
        data = self._receive(update_info)
        if len(data) != update_info.size_bytes or hashlib.sha256(data).hexdigest() != update_info.sha256:
            raise ValueError("a piece of the weights arrived damaged: its size or sha256 is not the one announced")
        loader: Any = self.model
        loader.load_weights(list(load(data).items()))

    @abstractmethod
    def _receive(self, piece: PieceInfo) -> bytes: ...

    def shutdown(self) -> None:
        """Nothing is held."""


class FileEngine(PieceEngine[FileInit]):
    """Reads pieces in one folder, and nowhere else."""

    init_info_cls = FileInit

    def init_transfer_engine(self, init_info: FileInit) -> None:
        self._folder = Path(init_info.folder)

    def _receive(self, piece: PieceInfo) -> bytes:
        if not re.fullmatch(r"[0-9a-f-]+\.safetensors", piece.file):
            raise ValueError(f"{piece.file[:80]!r} is no name of a piece")
        return (self._folder / piece.file).read_bytes()


class GlooEngine(PieceEngine[GlooInit]):
    """Receives pieces from the trainer's main rank, in a pair of their own."""

    init_info_cls = GlooInit
    _pair: GlooPair | None = None

    def init_transfer_engine(self, init_info: GlooInit) -> None:
        self._pair = None
        self._pair = GlooPair(init_info.host, init_info.port, timeout_s=init_info.timeout_s)

    def _receive(self, piece: PieceInfo) -> bytes:
        if self._pair is None:
            raise ValueError("no trainer has connected")
        return self._pair.receive(piece.size_bytes)

    def shutdown(self) -> None:
        self._pair = None


@functools.cache
def register_engines() -> None:
    """Makes `file` and `gloo` known to vLLM, beside its own `nccl`."""
    WeightTransferEngineFactory.register_engine("file", FileEngine)
    WeightTransferEngineFactory.register_engine("gloo", GlooEngine)
