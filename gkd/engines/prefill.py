"""vLLM that only prefills: token ids in, hidden states after the final norm out.

Legend: T positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gkd.engines.thread import EngineThread
from gkd.engines.vllm import engine_arguments, importing_vllm, vllm_failures
from gkd.models import local_folder

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PrefillSettings:
    """`max_model_tokens` None is the model's own context."""

    dtype: str
    max_model_tokens: int | None
    tensor_parallel_size: int
    gpu_memory_utilization: float
    kv_cache_gib: float


class PrefillEngine:
    """vLLM in a thread of this process; requests may come from any thread at any time."""

    def __init__(
        self, model: str, settings: PrefillSettings, *, revision: str | None, on_failure: Callable[[], None]
    ) -> None:
        """Returns when the engine is ready. Raises ModelError if vLLM is not installed or cannot run the model.

        `on_failure` is called, from the engine's thread, if the engine dies later.
        """
        self._thread = EngineThread(
            lambda: _start(model, settings, revision), name="teacher engine", on_failure=on_failure
        )
        self.max_tokens = self._thread.max_tokens
        self.close = self._thread.close

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive

    def submit(self, token_ids: Sequence[int]) -> Future[torch.Tensor]:
        """The states [T, H] of one sequence, on the CPU, in the engine's dtype. The caller checks length and ids."""
        return self._thread.submit(lambda: _request(token_ids), lambda output: output.outputs.data)


def _request(token_ids: Sequence[int]) -> tuple[Any, Any]:
    from vllm import PoolingParams, TokensPrompt

    params = PoolingParams(task="token_embed", use_activation=False)
    return TokensPrompt(prompt_token_ids=list(token_ids)), params


def _start(model: str, settings: PrefillSettings, revision: str | None) -> Any:
    with importing_vllm():
        from vllm import EngineArgs, LLMEngine
        from vllm.config import PoolerConfig
    arguments = engine_arguments(
        str(local_folder(model, revision=revision, key="model")),
        key="model",
        dtype=settings.dtype,
        max_model_tokens=settings.max_model_tokens,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        kv_cache_gib=settings.kv_cache_gib,
    )
    arguments |= {
        "tensor_parallel_size": settings.tensor_parallel_size,
        "runner": "pooling",
        "convert": "embed",
        "pooler_config": PoolerConfig(task="token_embed", use_activation=False),
        # else vLLM widens the states of a pooling model to float32
        "hf_overrides": arguments["hf_overrides"] | {"head_dtype": "model"},
        "enable_prefix_caching": False,  # a cached prefix has no states
        "enforce_eager": True,  # graphs are for decoding
    }
    with vllm_failures(model):
        return LLMEngine.from_engine_args(EngineArgs(**arguments))
