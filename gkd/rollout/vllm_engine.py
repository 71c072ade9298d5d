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
from gkd.models import save_adapter
from gkd.types import Completion, SampleRequest, SamplingSettings

if TYPE_CHECKING:
    import torch

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


def start_vllm(model_folder: str, settings: VllmSettings, **further: Any) -> Any:
    """A `vllm.LLM`; `further` are arguments of it. Raises ModelError if vLLM is not installed or cannot run the
    model."""
    prepare_vllm()
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

    def generate(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[Completion]:
        """Raises SamplerError if vLLM returns another number of completions, or one without log-probabilities."""
        if not requests:
            return []
        prompts, params = zip(*(vllm_request(request, settings) for request in requests), strict=True)
        with without_dynamo_on_cpu():
            outputs = self._llm.generate(list(prompts), list(params), use_tqdm=False, lora_request=self._adapter)
        if len(outputs) != len(requests):
            raise SamplerError(f"vLLM returned {len(outputs)} completions for {len(requests)} requests")
        return [completion_of(output.outputs[0]) for output in outputs]

    def probe(self, request: SampleRequest, settings: SamplingSettings) -> list[Completion]:
        return self.generate([request], settings)

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        if self._lora is not None:
            self._adapter = self._load_adapter(weights, self._lora)
        else:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
            self._llm.apply_model(refresh_tied_head)
        drop_prefix_cache(self._llm)

    def accept_weights(self) -> None:
        """Nobody else has to know."""

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


def vllm_request(request: SampleRequest, settings: SamplingSettings) -> tuple[Any, Any]:
    """The request as vLLM's prompt and sampling parameters."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        seed=request.seed,
        max_tokens=settings.max_new_tokens,
        stop_token_ids=list(settings.stop_token_ids),
        ignore_eos=True,  # the stop ids above already hold the model's end tokens
        logprobs=0,  # the sampled token's own
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    return TokensPrompt(prompt_token_ids=list(request.prompt_ids)), params


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
    token_ids = tuple(output.token_ids)
    if output.logprobs is None or len(output.logprobs) != len(token_ids):
        raise SamplerError("vLLM returned a completion without the log-probabilities of its tokens")
    logprobs = tuple(float(position[token].logprob) for position, token in zip(output.logprobs, token_ids, strict=True))
    reason = "stop" if output.finish_reason == "stop" else "length"
    return Completion(token_ids=token_ids, logprobs=logprobs, finish_reason=reason)
