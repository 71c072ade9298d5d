"""What every engine of vLLM has in common: its start, its requests and outputs, and what it leaves to its users."""

from __future__ import annotations

import logging
import math
import os
import uuid
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from gkd.errors import ModelError, SamplerError
from gkd.models import owns_head
from gkd.models.held import WeightChecksums
from gkd.models.unpacked import is_packed, unpacked
from gkd.types import Completion, SampleRequest, SamplingSettings

VllmRequest = tuple[Any, Any]  # vLLM's prompt and sampling parameters


# ---- its start


@contextmanager
def importing_vllm(advice: str = "install gkd[cuda] or gkd[cpu]", key: str = "") -> Iterator[None]:
    """Around what imports vLLM. Raises ModelError, starting with `key`, if it cannot be: with `advice` what to do."""
    # what vLLM reads while it is imported: one process, as tensors are handed over, and quiet
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    logging.getLogger("vllm").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    try:
        yield
    except ImportError as error:
        raise ModelError(f"{key}vLLM cannot be imported ({error}); {advice}") from error


def engine_arguments(
    folder: str,
    *,
    key: str,
    dtype: str,
    max_model_tokens: int | None,
    gpu_memory_utilization: float,
    kv_cache_gib: float,
) -> dict[str, Any]:
    """Of vLLM's EngineArgs, those of any engine here: tokens in, no tokenizer, no remote code, and quiet.

    Raises ModelError, starting with `key`, for weights that cannot be read.
    """
    if is_packed(folder, key=key) and not _reads_packed(dtype):
        folder = unpacked(folder, key=key)
    return {
        "model": folder,
        "hf_overrides": {"tie_word_embeddings": False} if owns_head(folder, key=key) else {},
        "dtype": dtype,
        "max_model_len": max_model_tokens,
        "gpu_memory_utilization": gpu_memory_utilization,
        "kv_cache_memory_bytes": _cpu_kv_cache_bytes(kv_cache_gib),
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "trust_remote_code": False,
    }


def _reads_packed(dtype: str) -> bool:
    """Whether vLLM has a kernel for packed weights here: in half precision, and on a CPU with AVX-512."""
    import torch

    has_kernel = torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return has_kernel and dtype != "float32"


def _cpu_kv_cache_bytes(gib: float) -> int | None:
    """None on a GPU, where its share of the memory decides."""
    import torch

    return None if torch.cuda.is_available() else round(gib * 2**30)


@contextmanager
def vllm_failures(model: str) -> Iterator[None]:
    """Raises ModelError, in one line, for what vLLM raises when it cannot run `model`."""
    try:
        yield
    except (ValueError, RuntimeError, NotImplementedError, OSError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"vLLM cannot run {model}: {reason}") from error


def without_dynamo_on_cpu() -> AbstractContextManager[None]:
    """Where Dynamo only compiles one small helper and costs seconds at the first request.

    A context and no environment variable: the process's other users of `torch.compile` keep it.
    """
    import torch

    return nullcontext() if torch.cuda.is_available() else torch.compiler.set_stance("force_eager")


def spare_process_groups(engine: Any) -> None:
    """`engine`, vLLM's LLMEngine, frees what is its own when it is collected, and leaves the process's groups alone.

    vLLM 0.32 ends them all then, whenever Python gets to it: the trainer's, and those of an engine started since.
    """
    client = engine.engine_core
    client._finalizer.detach()
    weakref.finalize(client, client.engine_core.model_executor.shutdown)


@contextmanager
def own_shared_memory() -> Iterator[None]:
    """While an engine starts that ranks of a launcher share, on a CPU: its shared memory is met by no other run.

    vLLM 0.32 gives it one name in all such engines of a machine, and frees it in a teardown that a rank does not come
    to: the next run would fail, and one beside it would mix its sums with ours. Here each group of ranks has a name of
    its own, which is gone once all of them have opened it.
    """
    import torch.distributed as dist
    from vllm.distributed.device_communicators import cpu_communicator

    of_vllm = cpu_communicator._CPUSHMDistributed
    original, names = of_vllm.make_group_name, list[str]()

    def own_name(communicator: Any) -> str:
        name = [f"gkd-{uuid.uuid4().hex}"]
        dist.broadcast_object_list(name, src=communicator.ranks[0], group=communicator.device_group)
        names.extend(name)
        return name[0]

    of_vllm.make_group_name = staticmethod(own_name)
    try:
        yield
    finally:
        of_vllm.make_group_name = original
        for name in names:
            for file in Path("/dev/shm").glob(f"*{name}*"):
                file.unlink(missing_ok=True)


# ---- its requests and outputs


def vllm_request(request: SampleRequest, settings: SamplingSettings, vocabulary_rows: int) -> VllmRequest:
    """`vocabulary_rows` are the model's: vLLM refuses to exclude an id that it has not."""
    settings = request.limited(settings)
    excluded = range(settings.shared_vocab or vocabulary_rows, vocabulary_rows)
    return _request(
        request.prompt_ids,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        seed=request.seed,
        max_tokens=settings.max_new_tokens,
        stop_token_ids=list(settings.stop_token_ids),
        ignore_eos=True,  # the stop ids above already hold the model's end tokens
        logprobs=0,  # the sampled token's own, before anything is excluded
        logit_bias=dict.fromkeys(excluded, -math.inf) or None,
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


# ---- its weights


def drop_prefix_cache(engine: Any) -> None:
    """Forgets the states of old weights in `engine`, a vLLM LLM or LLMEngine. Raises SamplerError if it refuses."""
    if not engine.reset_prefix_cache():
        raise SamplerError("vLLM could not drop the prefix cache of the old weights")


def held_in(engine: Any, version: int) -> WeightChecksums:
    """Of the weights that `engine`, a vLLM LLM or LLMEngine, has held since its update to `version`."""
    from gkd.engines.held import held_weights

    with without_dynamo_on_cpu():
        return engine.apply_model(partial(held_weights, version=version))[0]


def refresh_tied_head(model: Any) -> None:
    """Packs a tied output head again.

    vLLM 0.32 reloads the embedding in place, but a head that shares it counts as "not loaded": on CPU it goes on
    multiplying with the packed copy of the old weights. Without packing (CUDA) this does nothing.
    """
    head = getattr(model, "lm_head", None)
    if head is not None and getattr(model.config, "tie_word_embeddings", False):
        head.quant_method.process_weights_after_loading(head)
