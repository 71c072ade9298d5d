"""vLLM that samples in this process, on CUDA or on CPU: tokens in, tokens out."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gkd.config import LoraConfig, RolloutConfig, known
from gkd.engines.vllm import (
    VllmRequest,
    completion_of,
    drop_prefix_cache,
    engine_arguments,
    held_in,
    importing_vllm,
    own_shared_memory,
    probed_logprobs,
    refresh_tied_head,
    spare_process_groups,
    vllm_failures,
    vllm_probe,
    vllm_request,
    without_dynamo_on_cpu,
)
from gkd.errors import SamplerError, WeightSyncError, one_line
from gkd.models import save_adapter
from gkd.models.held import WeightChecksums
from gkd.types import Completion, SampleRequest, SamplingSettings

if TYPE_CHECKING:
    import torch

_KEY = "rollout.engine"
_ADAPTER = "student"
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM 0.32 reserves room for


@dataclass(frozen=True)
class SamplerSpec:
    """Everything that is needed to start a sampler, as plain values that travel between processes.

    What has the name of a key of the config's `rollout` section is that key's value.
    """

    engine: str
    model_folder: str  # or what names it, with the revision, until somebody has found it
    dtype: str
    max_model_tokens: int | None  # None: the model's own context
    pad_token_id: int = 0  # transformers
    max_num_seqs: int | Literal["auto"] = 64  # auto, as of dtype: until somebody has settled it
    kv_cache_gib: float = 1.0
    gpu_memory_utilization: float = 0.3
    enforce_eager: bool | Literal["auto"] = True
    seed: int = 0
    lora: LoraConfig | None = None  # the sampler applies an adapter, which is all that its updates bring
    tensor_parallel: int = 1  # ranks, of a process group that is there already, that hold a share of the weights each
    sleep_level: int = 0  # of `VllmSampler.sleep`
    revision: str | None = None
    key: str = "student.model"  # what an error about the model starts with

    @classmethod
    def of(cls, rollout: RolloutConfig, **others: Any) -> SamplerSpec:
        """`others` are the fields that are no keys of that section."""
        keys = {field.name for field in fields(cls)} & type(rollout).model_fields.keys()
        return cls(**{key: getattr(rollout, key) for key in keys}, **others)


def start_llm(spec: SamplerSpec, **further: Any) -> Any:
    """A `vllm.LLM`; `further` are arguments of it. Raises ModelError if vLLM is not installed or cannot run the
    model."""
    import torch

    if spec.tensor_parallel > 1:
        further["tensor_parallel_size"] = spec.tensor_parallel
        further["distributed_executor_backend"] = "external_launcher"  # this process is one of them
    if spec.sleep_level and torch.cuda.is_available():  # elsewhere sleeping gives nothing back
        further["enable_sleep_mode"] = True
    if spec.lora is not None:
        further |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _lora_rank(spec.lora)}
    with importing_vllm("install it, or set it to transformers", key=f"{_KEY}: "):
        from vllm import LLM
    arguments = engine_arguments(
        spec.model_folder,
        key=_KEY,
        dtype=spec.dtype,
        max_model_tokens=spec.max_model_tokens,
        gpu_memory_utilization=spec.gpu_memory_utilization,
        kv_cache_gib=spec.kv_cache_gib,
    )
    shared = own_shared_memory() if spec.tensor_parallel > 1 and not torch.cuda.is_available() else nullcontext()
    with vllm_failures(spec.model_folder), shared:
        llm = LLM(
            max_num_seqs=known(spec.max_num_seqs),
            enforce_eager=known(spec.enforce_eager),
            seed=spec.seed & 0x7FFFFFFF,  # vLLM's own seed is 32 bits; each request brings a full one
            **arguments,
            **further,
        )
    spare_process_groups(llm.llm_engine)
    return llm


def _lora_rank(lora: LoraConfig) -> int:
    return next(size for size in _LORA_RANKS if size >= lora.rank)


class VllmSampler:
    """Implements `Sampler` with `vllm.LLM`, in this process."""

    def __init__(self, spec: SamplerSpec) -> None:
        """Raises ModelError if vLLM is not installed or cannot run the model."""
        self._llm: Any = start_llm(spec)
        self._rows: int = self._llm.model_config.get_vocab_size()
        self._lora = spec.lora
        self._adapter: Any = None  # vLLM's request for it, once there is one
        self._sleep_level, self._is_asleep = spec.sleep_level, False

    def generate(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[Completion]:
        """Raises SamplerError while it sleeps, or if vLLM leaves out a completion or its log-probabilities."""
        if not requests:
            return []
        return [
            completion_of(output) for output in self._run([vllm_request(r, settings, self._rows) for r in requests])
        ]

    def probe(self, token_ids: Sequence[int]) -> list[Sequence[float]]:
        return [probed_logprobs(output) for output in self._run([vllm_probe(token_ids)])]

    def _run(self, requests: Sequence[VllmRequest]) -> list[Any]:
        """vLLM's outputs, in order. Raises SamplerError if there is another number of them, or none to be had."""
        if self._is_asleep:  # vLLM would wait for ever
            raise SamplerError("the sampler sleeps until the next update of its weights")
        prompts, params = zip(*requests, strict=True)
        with without_dynamo_on_cpu():
            outputs = self._llm.generate(list(prompts), list(params), use_tqdm=False, lora_request=self._adapter)
        if len(outputs) != len(requests):
            raise SamplerError(f"vLLM returned {len(outputs)} outputs for {len(requests)} requests")
        return outputs

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        if self._is_asleep:
            self._llm.wake_up(["weights"])
        if self._lora is not None:
            self._adapter = self._load_adapter(weights, self._lora)
        else:
            try:
                self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
            except (ValueError, KeyError, AssertionError) as error:  # names or shapes that its model does not have
                raise WeightSyncError(f"vLLM does not take the student's weights: {one_line(str(error))}") from error
            self._llm.apply_model(refresh_tied_head)
        if self._is_asleep:
            self._llm.wake_up(["kv_cache"])  # no sooner: gathering the weights takes memory too
            self._is_asleep = False
        drop_prefix_cache(self._llm)

    def held_weights(self, version: int) -> list[WeightChecksums]:
        """None of an adapter, which vLLM keeps in a form of its own."""
        if self._lora is not None:
            return [WeightChecksums()]
        return [held_in(self._llm, version)]

    def accept_weights(self) -> None:
        """Nobody else has to know."""

    def sleep(self) -> None:
        """Level 1: the cache is dropped and the weights wait in host memory; 2: both are dropped. 0: stays awake."""
        if self._sleep_level and not self._is_asleep:
            self._llm.sleep(self._sleep_level)
            self._is_asleep = True

    def _load_adapter(self, weights: Iterable[tuple[str, torch.Tensor]], lora: LoraConfig) -> Any:
        """Replaces the adapter by `weights`, on the way of vLLM's own: through a folder. Raises SamplerError."""
        from vllm.lora.request import LoRARequest

        with tempfile.TemporaryDirectory(dir=_shared_memory()) as folder:
            save_adapter(Path(folder), weights, lora)
            try:
                self._llm.llm_engine.add_lora(LoRARequest(_ADAPTER, 1, folder, load_inplace=True))
            except (ValueError, TypeError) as error:  # TypeError: half of a pair is missing
                why = str(error).splitlines()[0]
                raise SamplerError(f"rollout.lora_sync: vLLM refuses the adapter ({why}); set it to merged") from error
            return LoRARequest(_ADAPTER, 1, folder)  # by its number: the folder is not read again

    def close(self) -> None:
        self._llm = None


def _shared_memory() -> str | None:
    """A folder in memory, where there is one; else None, the usual place of temporary files."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
