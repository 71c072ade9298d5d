"""vLLM that only prefills: token ids in, hidden states after the final norm out.

Legend: T positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gkd.environment import cpu_kv_cache_bytes, prepare_vllm, vllm_failures
from gkd.errors import ModelError
from gkd.models import local_folder, owns_head
from gkd.serving.engine import EngineThread

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class EngineSettings:
    """`max_model_tokens` None is the model's own context."""

    dtype: str
    max_model_tokens: int | None
    tensor_parallel_size: int
    gpu_memory_utilization: float
    kv_cache_gib: float


class PrefillEngine:
    """vLLM in a thread of this process; requests may come from any thread at any time."""

    def __init__(
        self, model: str, settings: EngineSettings, *, revision: str | None, on_failure: Callable[[], None]
    ) -> None:
        """Returns when the engine is ready. Raises ModelError if vLLM is not installed or cannot run the model.

        `on_failure` is called, from the engine's thread, if the engine dies later.
        """
        self._thread = EngineThread(
            lambda: _start_vllm(model, settings, revision), name="teacher engine", on_failure=on_failure
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


def _start_vllm(model: str, settings: EngineSettings, revision: str | None) -> Any:
    prepare_vllm()
    try:
        from vllm import EngineArgs, LLMEngine
        from vllm.config import PoolerConfig
    except ImportError as error:
        raise ModelError(f"vLLM cannot be imported ({error}); install gkd[cuda] or gkd[cpu]") from error
    folder = str(local_folder(model, revision=revision, key="model"))
    overrides: dict[str, Any] = {"head_dtype": "model"}  # else a pooling model's states are widened to float32
    if owns_head(folder, key="model"):
        overrides["tie_word_embeddings"] = False
    arguments: dict[str, Any] = {
        "model": folder,
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_tokens,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "kv_cache_memory_bytes": cpu_kv_cache_bytes(settings.kv_cache_gib),
        "runner": "pooling",
        "convert": "embed",
        "pooler_config": PoolerConfig(task="token_embed", use_activation=False),
        "hf_overrides": overrides,
        "enable_prefix_caching": False,  # a cached prefix has no states
        "enforce_eager": True,  # graphs are for decoding
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "trust_remote_code": False,
    }
    with vllm_failures(model):
        return LLMEngine.from_engine_args(EngineArgs(**arguments))
