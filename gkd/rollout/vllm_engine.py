"""vLLM in this process, on CUDA or on CPU: tokens in, tokens out."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gkd.config import LoraConfig
from gkd.environment import cpu_kv_cache_bytes, prepare_vllm, vllm_failures
from gkd.errors import ModelError, SamplerError
from gkd.models import owns_head, save_adapter
from gkd.types import Completion, SampleRequest, SamplingSettings

if TYPE_CHECKING:
    import torch

VllmRequest = tuple[Any, Any]  # vLLM's prompt and sampling parameters
_ADAPTER = "student"
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM 0.32 reserves room for


def without_dynamo_on_cpu() -> AbstractContextManager[None]:
    """Where Dynamo only compiles one small helper and costs seconds at the first request.

    A context and no environment variable: the process's other users of `torch.compile` keep it.
    """
    import torch

    return nullcontext() if torch.cuda.is_available() else torch.compiler.set_stance("force_eager")


@dataclass(frozen=True)
class VllmSettings:
    """How vLLM runs a model; `max_model_tokens` None is the model's own context."""

    dtype: str
    max_model_tokens: int | None
    seed: int = 0
    max_num_seqs: int = 64
    kv_cache_gib: float = 1.0
    gpu_memory_utilization: float = 0.3
    enforce_eager: bool = True
    tensor_parallel: int = 1  # ranks, of a process group that is there already, that hold a share of the weights each
    sleep_level: int = 0  # of `VllmSampler.sleep`


def start_vllm(model_folder: str, settings: VllmSettings, **further: Any) -> Any:
    """A `vllm.LLM`; `further` are arguments of it. Raises ModelError if vLLM is not installed or cannot run the
    model."""
    import torch

    prepare_vllm()
    if settings.tensor_parallel > 1:
        further["tensor_parallel_size"] = settings.tensor_parallel
        further["distributed_executor_backend"] = "external_launcher"  # this process is one of them
    if owns_head(model_folder, key="rollout.engine"):
        further["hf_overrides"] = {"tie_word_embeddings": False}
    if settings.sleep_level and torch.cuda.is_available():  # elsewhere sleeping gives nothing back
        further["enable_sleep_mode"] = True
    try:
        from vllm import LLM
    except ImportError as error:
        raise ModelError(
            f"rollout.engine: vLLM cannot be imported ({error}); install it, or set it to transformers"
        ) from error
    with vllm_failures(model_folder):
        return LLM(
            model=model_folder,
            dtype=settings.dtype,  # pyright: ignore[reportArgumentType]
            max_model_len=settings.max_model_tokens,
            max_num_seqs=settings.max_num_seqs,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            kv_cache_memory_bytes=cpu_kv_cache_bytes(settings.kv_cache_gib),
            enforce_eager=settings.enforce_eager,
            seed=settings.seed & 0x7FFFFFFF,  # vLLM's own seed is 32 bits; each request brings a full one
            skip_tokenizer_init=True,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            trust_remote_code=False,
            **further,
        )


class VllmSampler:
    """Implements `Sampler` with `vllm.LLM`, in this process."""

    def __init__(self, model_folder: str, settings: VllmSettings, lora: LoraConfig | None = None) -> None:
        """Raises ModelError if vLLM is not installed or cannot run the model."""
        adapters: dict[str, Any] = {}
        if lora is not None:
            adapters = {
                "enable_lora": True,
                "max_loras": 1,
                "max_lora_rank": next(size for size in _LORA_RANKS if size >= lora.rank),
            }
        self._llm: Any = start_vllm(model_folder, settings, **adapters)
        self._lora = lora
        self._adapter: Any = None  # vLLM's request for it, once there is one
        self._sleep_level, self._is_asleep = settings.sleep_level, False

    def generate(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[Completion]:
        """Raises SamplerError while it sleeps, or if vLLM leaves out a completion or its log-probabilities."""
        if not requests:
            return []
        return [completion_of(output) for output in self._run([vllm_request(r, settings) for r in requests])]

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
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
            self._llm.apply_model(refresh_tied_head)
        if self._is_asleep:
            self._llm.wake_up(["kv_cache"])  # no sooner: gathering the weights takes memory too
            self._is_asleep = False
        drop_prefix_cache(self._llm)

    def accept_weights(self) -> None:
        """Nobody else has to know."""

    def sleep(self) -> None:
        """Level 1: the cache is dropped and the weights wait in host memory; 2: both are dropped. 0: stays awake."""
        if self._sleep_level:
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


def vllm_request(request: SampleRequest, settings: SamplingSettings) -> VllmRequest:
    return _request(
        request.prompt_ids,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        seed=request.seed,
        max_tokens=settings.max_new_tokens,
        stop_token_ids=list(settings.stop_token_ids),
        ignore_eos=True,  # the stop ids above already hold the model's end tokens
        logprobs=0,  # the sampled token's own
    )


def vllm_probe(token_ids: Sequence[int]) -> VllmRequest:
    """To score a text, by whatever the prefix cache holds of it: after an update that must be nothing."""
    return _request(
        token_ids,
        max_tokens=1,  # the least that vLLM does
        prompt_logprobs=0,  # each token's own
        skip_reading_prefix_cache=False,
    )


def _request(token_ids: Sequence[int], **params: Any) -> VllmRequest:
    """Tokens in, tokens out, all at once."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **params)
    return TokensPrompt(prompt_token_ids=list(token_ids)), sampling


def drop_prefix_cache(engine: Any) -> None:
    """Forgets the states of old weights in `engine`, a vLLM LLM or LLMEngine. Raises SamplerError if it refuses."""
    if not engine.reset_prefix_cache():
        raise SamplerError("vLLM could not drop the prefix cache of the old weights")


def _shared_memory() -> str | None:
    """A folder in memory, where there is one; else None, the usual place of temporary files."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def refresh_tied_head(model: Any) -> None:
    """Packs a tied output head again.

    vLLM 0.32 reloads the embedding in place, but a head that shares it counts as "not loaded": on CPU it goes on
    multiplying with the packed copy of the old weights. Without packing (CUDA) this does nothing.
    """
    head = getattr(model, "lm_head", None)
    if head is not None and getattr(model.config, "tie_word_embeddings", False):
        head.quant_method.process_weights_after_loading(head)


def completion_of(output: Any) -> Completion:
    """Of vLLM's output for a `vllm_request`. Raises SamplerError if log-probabilities are missing."""
    completion = output.outputs[0]
    token_ids = tuple(completion.token_ids)
    logprobs = _logprobs_of(token_ids, completion.logprobs)
    reason = "stop" if completion.finish_reason == "stop" else "length"
    return Completion(token_ids=token_ids, logprobs=logprobs, finish_reason=reason)


def probed_logprobs(output: Any) -> tuple[float, ...]:
    """Of the second token and all after it, from vLLM's output for a `vllm_probe`.

    Raises SamplerError if vLLM took states of older weights from its prefix cache, or if log-probabilities are missing.
    """
    if output.num_cached_tokens:
        raise SamplerError(f"vLLM still holds the states of {output.num_cached_tokens} tokens from before the update")
    return _logprobs_of(output.prompt_token_ids[1:], (output.prompt_logprobs or [None])[1:])


def _logprobs_of(token_ids: Sequence[int], positions: Sequence[Any] | None) -> tuple[float, ...]:
    if positions is None or len(positions) != len(token_ids):
        raise SamplerError("vLLM returned tokens without their log-probabilities")
    return tuple(float(position[token].logprob) for position, token in zip(positions, token_ids, strict=True))
