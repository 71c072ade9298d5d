"""vLLM behind a served sampler: completions with weights of a known version, which come from a trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from gkd.engines.sampling import SamplerSpec, start_llm
from gkd.engines.thread import EngineThread
from gkd.engines.vllm import (
    VllmRequest,
    completion_of,
    drop_prefix_cache,
    held_in,
    importing_vllm,
    probed_logprobs,
    refresh_tied_head,
    vllm_probe,
    vllm_request,
    without_dynamo_on_cpu,
)
from gkd.errors import SamplerError
from gkd.models.held import WeightChecksums
from gkd.serving.sampler_protocol import CompletionQuery, Transfer
from gkd.types import Completion, SampleRequest

T = TypeVar("T")


class NotHeldError(Exception):
    """The engine does not hold the weights, or is not in the update, that a request is for."""


@dataclass(frozen=True)
class FromUpdate(Generic[T]):
    """What came of a request, and the update that brought the weights which it came from."""

    answer: T
    update: str


@dataclass
class _Weights:
    """What came with one update. Complete: finished with all pieces. Accepted: proven by the trainer."""

    update: str
    version: int
    pieces: int = 0
    is_complete: bool = False
    is_accepted: bool = False


class SamplerEngine:
    """vLLM in a thread of this process. Updates wait for completions under way; completions wait for updates."""

    def __init__(self, spec: SamplerSpec, transfer: Transfer, *, on_failure: Callable[[], None]) -> None:
        """Returns when the engine is ready. Raises ModelError if vLLM is not installed or cannot run the model.

        `on_failure` is called, from the engine's thread, if the engine dies later.
        """
        self._weights: _Weights | None = None  # the engine thread's own
        self._is_updating = False
        self._thread = EngineThread(lambda: self._start(spec, transfer), name="sampler engine", on_failure=on_failure)
        self.max_tokens = self._thread.max_tokens
        self.close = self._thread.close

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive

    def complete(self, prompt_ids: Sequence[int], query: CompletionQuery) -> Future[FromUpdate[Completion]]:
        """Fails with NotHeldError unless the weights are of the query's update, and accepted."""
        request = SampleRequest(tuple(prompt_ids), query.seed)

        def prepare() -> VllmRequest:
            self._check_held(query.update, must_be_accepted=True)
            return vllm_request(request, query.settings, self._rows)

        return self._thread.submit(prepare, lambda output: _from_update(output, completion_of(output)))

    def probe(self, token_ids: Sequence[int], update: str) -> Future[FromUpdate[Sequence[float]]]:
        """As `Sampler.probe`. Fails with NotHeldError unless the weights are of `update`; nobody need have accepted
        them."""

        def prepare() -> VllmRequest:
            self._check_held(update, must_be_accepted=False)
            return vllm_probe(token_ids)

        return self._thread.submit(prepare, lambda output: _from_update(output, probed_logprobs(output)))

    def held_weights(self, update: str) -> Future[WeightChecksums]:
        """As `Sampler.held_weights`. Fails with NotHeldError as `probe` does."""

        def look(engine: Any) -> WeightChecksums:
            return held_in(engine, self._check_held(update, must_be_accepted=False).version)

        return self._thread.run_alone(look)

    def _check_held(self, update: str, *, must_be_accepted: bool) -> _Weights:
        held = self._weights
        if held is None or not held.is_complete or (must_be_accepted and not held.is_accepted):
            raise NotHeldError("the sampler holds no complete, proven weights; it does not generate")
        if held.update != update:
            raise NotHeldError(f"the sampler holds the weights of update {held.update}, not {update}")
        return held

    # ---- updates; each of these fails with NotHeldError out of turn

    def connect(self, info: dict[str, Any]) -> Future[None]:
        """Tells the weight-transfer engine of the trainer, or where its files are."""
        return self._thread.run_alone(
            lambda engine: engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": info})
        )

    def start_update(self, update: str, version: int) -> Future[None]:
        """From here on nothing is completed. An update that was not finished is given up."""

        def start(engine: Any) -> None:
            self._weights = None
            if self._is_updating:
                self._is_updating = False
                engine.collective_rpc("finish_weight_update")
            engine.collective_rpc("start_weight_update")
            self._is_updating = True
            self._weights = _Weights(update, version)

        return self._thread.run_alone(start)

    def receive_piece(self, update: str, piece: dict[str, Any]) -> Future[None]:
        def receive(engine: Any) -> None:
            weights = self._in_update(update)
            try:
                engine.collective_rpc("update_weights", kwargs={"update_info": piece})
            except Exception:
                self._weights, self._is_updating = None, False  # vLLM has given the update up
                raise
            weights.pieces += 1

        return self._thread.run_alone(receive)

    def finish_update(self, update: str, pieces: int) -> Future[None]:
        def finish(engine: Any) -> None:
            weights = self._in_update(update)
            if weights.pieces != pieces:
                raise NotHeldError(f"{weights.pieces} of {pieces} pieces of the update have arrived")
            self._is_updating = False
            engine.collective_rpc("finish_weight_update")
            engine.set_weight_version(update)
            engine.apply_model(refresh_tied_head)
            drop_prefix_cache(engine)
            weights.is_complete = True

        return self._thread.run_alone(finish)

    def accept(self, update: str) -> Future[None]:
        def accept(_: Any) -> None:
            if self._weights is None or self._weights.update != update or not self._weights.is_complete:
                raise NotHeldError("these weights are not the ones that the sampler holds")
            self._weights.is_accepted = True

        return self._thread.run_alone(accept)

    def _in_update(self, update: str) -> _Weights:
        if self._weights is None or self._weights.update != update or self._weights.is_complete:
            raise NotHeldError("the sampler is not in this update")
        return self._weights

    def _start(self, spec: SamplerSpec, transfer: Transfer) -> Any:
        with importing_vllm():
            from vllm.config import WeightTransferConfig

            from gkd.engines.transfer import register_engines
        register_engines()
        self._llm = start_llm(spec, weight_transfer_config=WeightTransferConfig(backend=transfer))
        self._rows: int = self._llm.model_config.get_vocab_size()
        without_dynamo_on_cpu().__enter__()  # for as long as this process lives
        return self._llm.llm_engine


def _from_update(output: Any, answer: T) -> FromUpdate[T]:
    updates = {span.version for span in output.outputs[0].weight_versions or ()}
    if len(updates) != 1:
        raise SamplerError(f"vLLM answered from weights of {len(updates)} updates, not of one")
    return FromUpdate(answer, updates.pop())
