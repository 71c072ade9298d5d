"""vLLM in this process, on CUDA or on CPU: tokens in, tokens out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from gkd.environment import cpu_kv_cache_bytes, prepare_vllm
from gkd.errors import ModelError, SamplerError
from gkd.types import Completion, SampleRequest, SamplingSettings

if TYPE_CHECKING:
    import torch


def _without_dynamo_on_cpu() -> AbstractContextManager[None]:
    """Where Dynamo only compiles one small helper and costs seconds at the first request.

    A context and no environment variable: the process's other users of `torch.compile` keep it.
    """
    import torch

    return nullcontext() if torch.cuda.is_available() else torch.compiler.set_stance("force_eager")


class VllmSampler:
    """Implements `Sampler` with `vllm.LLM`.

    Raises ModelError if vLLM is not installed or cannot run the model.
    """

    def __init__(
        self,
        model_folder: str,
        *,
        dtype: str,
        max_model_tokens: int,
        seed: int = 0,
        max_num_seqs: int = 64,
        kv_cache_gib: float = 1.0,
        gpu_memory_utilization: float = 0.3,
        enforce_eager: bool = True,
    ) -> None:
        prepare_vllm()
        try:
            from vllm import LLM
        except ImportError as error:
            raise ModelError(
                f"rollout.engine: vLLM cannot be imported ({error}); install it, or set it to transformers"
            ) from error
        self._llm: Any = LLM(
            model=model_folder,
            dtype=dtype,  # pyright: ignore[reportArgumentType]
            max_model_len=max_model_tokens,
            max_num_seqs=max_num_seqs,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_memory_bytes=cpu_kv_cache_bytes(kv_cache_gib),
            enforce_eager=enforce_eager,
            seed=seed & 0x7FFFFFFF,  # vLLM's own seed is 32 bits; each request brings a full one
            skip_tokenizer_init=True,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            trust_remote_code=False,
        )

    def generate(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[Completion]:
        """Raises SamplerError if vLLM returns another number of completions, or one without log-probabilities."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        if not requests:
            return []
        prompts = [TokensPrompt(prompt_token_ids=list(request.prompt_ids)) for request in requests]
        params = [
            SamplingParams(
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
                seed=request.seed,
                max_tokens=settings.max_new_tokens,
                stop_token_ids=list(settings.stop_token_ids),
                ignore_eos=True,  # the stop ids above already hold the model's end tokens
                logprobs=0,  # the sampled token's own
                detokenize=False,
            )
            for request in requests
        ]
        with _without_dynamo_on_cpu():
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
        if len(outputs) != len(requests):
            raise SamplerError(f"vLLM returned {len(outputs)} completions for {len(requests)} requests")
        return [_completion(output.outputs[0]) for output in outputs]

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self._llm.apply_model(_refresh_tied_head)
        if not self._llm.reset_prefix_cache():
            raise SamplerError("vLLM could not drop the prefix cache of the old weights")

    def close(self) -> None:
        self._llm = None


def _refresh_tied_head(model: Any) -> None:
    """Packs a tied output head again.

    vLLM 0.32 reloads the embedding in place, but a head that shares it counts as "not loaded": on CPU it goes on
    multiplying with the packed copy of the old weights. Without packing (CUDA) this does nothing.
    """
    head = getattr(model, "lm_head", None)
    if head is not None and getattr(model.config, "tie_word_embeddings", False):
        head.quant_method.process_weights_after_loading(head)


def _completion(output: Any) -> Completion:
    token_ids = tuple(output.token_ids)
    if output.logprobs is None or len(output.logprobs) != len(token_ids):
        raise SamplerError("vLLM returned a completion without the log-probabilities of its tokens")
    logprobs = tuple(float(position[token].logprob) for position, token in zip(output.logprobs, token_ids, strict=True))
    reason = "stop" if output.finish_reason == "stop" else "length"
    return Completion(token_ids=token_ids, logprobs=logprobs, finish_reason=reason)
