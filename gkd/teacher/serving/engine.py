"""vLLM that only prefills: token ids in, hidden states after the final norm out.

Legend: T positions, H hidden size.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gkd.environment import cpu_kv_cache_bytes, prepare_vllm
from gkd.errors import ModelError

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)
_STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class EngineSettings:
    """`max_model_tokens` None is the model's own context."""

    dtype: str
    max_model_tokens: int | None
    tensor_parallel_size: int
    gpu_memory_utilization: float
    kv_cache_gib: float


@dataclass(frozen=True)
class _Job:
    token_ids: Sequence[int]
    states: Future[torch.Tensor]


class PrefillEngine:
    """A vLLM engine with a thread of its own, in this process: no copy of the states between processes.

    Requests may come from any thread at any time; the engine batches what waits (continuous batching).
    """

    def __init__(
        self, model: str, settings: EngineSettings, *, revision: str | None, on_failure: Callable[[], None]
    ) -> None:
        """Returns when the engine is ready. Raises ModelError if vLLM is not installed or cannot run the model.

        `on_failure` is called, from the engine's thread, if the engine dies later.
        """
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._on_failure = on_failure
        self.is_alive = True
        started: Future[int] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(model, settings, revision, started), name="teacher engine", daemon=True
        )
        self._thread.start()
        self.max_tokens = started.result()

    def submit(self, token_ids: Sequence[int]) -> Future[torch.Tensor]:
        """The states [T, H] of one sequence, on the CPU, in the engine's dtype. The caller checks length and ids."""
        job = _Job(token_ids, Future())
        if self.is_alive:
            self._jobs.put(job)
        else:
            job.states.set_exception(RuntimeError("the engine has stopped"))
        return job.states

    def close(self) -> None:
        """Stops; to be called when no request is waited for any more."""
        self._jobs.put(None)
        self._thread.join(_STOP_TIMEOUT_S)

    def _run(self, model: str, settings: EngineSettings, revision: str | None, started: Future[int]) -> None:
        # built and used in one thread: the number of OpenMP threads and the current GPU are a thread's own settings
        try:
            engine = _start_vllm(model, settings, revision)
        except BaseException as error:  # noqa: BLE001  (raised again where the engine is waited for)
            started.set_exception(error)
            return
        started.set_result(engine.model_config.max_model_len)
        running: dict[str, Future[torch.Tensor]] = {}
        try:
            self._serve(engine, running)
        except Exception as error:  # noqa: BLE001  (told to everyone who waits, and the server stops)
            _log.exception("the engine failed")
            self._fail(running, error)
        finally:
            engine.engine_core.shutdown()

    def _serve(self, engine: Any, running: dict[str, Future[torch.Tensor]]) -> None:
        count = 0
        while True:
            for job in self._waiting_jobs(block=not running):
                if job is None:
                    return
                count += 1
                _add(engine, str(count), job, running)
            for output in engine.step() if running else ():
                running.pop(output.request_id).set_result(output.outputs.data)

    def _waiting_jobs(self, *, block: bool) -> list[_Job | None]:
        jobs = [self._jobs.get()] if block else []
        while not self._jobs.empty():
            jobs.append(self._jobs.get())
        return sorted(jobs, key=lambda job: job is None)  # a stop comes after everything that arrived before it

    def _fail(self, running: dict[str, Future[torch.Tensor]], error: Exception) -> None:
        self.is_alive = False
        self._on_failure()
        waiting = [job.states for job in self._waiting_jobs(block=False) if job is not None]
        for states in [*running.values(), *waiting]:
            if not states.done():
                states.set_exception(RuntimeError(f"the engine failed: {error}"))


def _add(engine: Any, request_id: str, job: _Job, running: dict[str, Future[torch.Tensor]]) -> None:
    from vllm import PoolingParams, TokensPrompt

    if not job.states.set_running_or_notify_cancel():
        return
    try:
        params = PoolingParams(task="token_embed", use_activation=False)
        engine.add_request(request_id, TokensPrompt(prompt_token_ids=list(job.token_ids)), params)
    except Exception as error:  # noqa: BLE001  (one request that vLLM refuses is no reason to stop)
        job.states.set_exception(RuntimeError(f"vLLM refused the sequence: {error}"))
        return
    running[request_id] = job.states


def _start_vllm(model: str, settings: EngineSettings, revision: str | None) -> Any:
    prepare_vllm()
    try:
        from vllm import EngineArgs, LLMEngine
        from vllm.config import PoolerConfig
    except ImportError as error:
        raise ModelError(f"vLLM cannot be imported ({error}); install gkd[cuda] or gkd[cpu]") from error
    arguments: dict[str, Any] = {
        "model": model,
        "revision": revision,
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_tokens,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "kv_cache_memory_bytes": cpu_kv_cache_bytes(settings.kv_cache_gib),
        "runner": "pooling",
        "convert": "embed",
        "pooler_config": PoolerConfig(task="token_embed", use_activation=False),
        "hf_overrides": {"head_dtype": "model"},  # else vLLM widens the states of a pooling model to float32
        "enable_prefix_caching": False,  # a cached prefix has no states
        "enforce_eager": True,  # graphs are for decoding
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "trust_remote_code": False,
    }
    try:
        return LLMEngine.from_engine_args(EngineArgs(**arguments))
    except (ValueError, RuntimeError, NotImplementedError, OSError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"vLLM cannot serve {model}: {reason}") from error
