"""gkd's servers with transformers where vLLM is: python -m benchmarks.runs.without_vllm serve-sampler MODEL ...

Command line, routes, guards, weight updates and the engine's thread are gkd's own; what is not stands for its engine.
It answers one request at a time, so an answer depends on the request and the weights alone: a run on such servers is
reproducible bit by bit, as with the transformers sampler in its own process. It starts in seconds.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load
from transformers import AutoConfig

from gkd.engines.prefill import PrefillSettings
from gkd.engines.sampling import SamplerSpec
from gkd.engines.thread import EngineThread
from gkd.engines.updated import FromUpdate, SamplerEngine
from gkd.models import load_causal_lm
from gkd.models.held import WeightChecksums
from gkd.rollout.hf import HfSampler
from gkd.serving.sampler_protocol import CompletionQuery, Transfer
from gkd.types import Completion, SampleRequest, SamplingSettings


class _OneByOne:
    """What gkd asks of vLLM's LLMEngine. `answer` makes the output for a request, which it alone reads."""

    def __init__(self, max_tokens: int, answer: Callable[[Any], Any]) -> None:
        self.model_config = SimpleNamespace(max_model_len=max_tokens)
        self.engine_core = SimpleNamespace(shutdown=lambda: None)
        self._answer = answer
        self._waiting: deque[tuple[str, Any]] = deque()

    def add_request(self, request_id: str, prompt: Any, params: Any) -> None:
        self._waiting.append((request_id, prompt))

    def step(self) -> list[Any]:
        request_id, request = self._waiting.popleft()
        return [SimpleNamespace(request_id=request_id, finished=True, answer=self._answer(request))]


class _Sampler(_OneByOne):
    """With weights that come in pieces from a folder."""

    def __init__(self, spec: SamplerSpec) -> None:
        self.sampler = HfSampler(spec.model_folder, dtype=spec.dtype, device=torch.device("cpu"), pad_token_id=0)
        config = AutoConfig.from_pretrained(spec.model_folder)
        super().__init__(spec.max_model_tokens or config.max_position_embeddings, self._complete_or_probe)
        self._update, self._folder = "", Path()

    def _complete_or_probe(self, request: tuple[SampleRequest, SamplingSettings] | list[int]) -> FromUpdate[Any]:
        if isinstance(request, list):
            return FromUpdate(self.sampler.probe(request)[0], self._update)
        sample, settings = request
        return FromUpdate(self.sampler.generate([sample], settings)[0], self._update)

    def collective_rpc(self, method: str, kwargs: Any = None) -> None:
        if method == "init_weight_transfer_engine":
            self._folder = Path(kwargs["init_info"]["folder"])
        elif method == "update_weights":
            self._receive(**kwargs["update_info"])

    def _receive(self, size_bytes: int, sha256: str, file: str) -> None:
        data = (self._folder / Path(file).name).read_bytes()
        if len(data) != size_bytes or hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError("a piece of the weights arrived damaged")
        self.sampler.update_weights(load(data).items(), 0)

    def set_weight_version(self, version: str) -> None:
        self._update = version

    def reset_prefix_cache(self) -> bool:
        return True

    def apply_model(self, call: Callable[[Any], Any]) -> list[Any]:
        """What vLLM has to do to a model of its own after an update."""
        return []


class TransformersSampler(SamplerEngine):
    def _start(self, spec: SamplerSpec, transfer: Transfer) -> Any:
        return _Sampler(spec)

    def complete(self, prompt_ids: Sequence[int], query: CompletionQuery) -> Future[FromUpdate[Completion]]:
        request = SampleRequest(tuple(prompt_ids), query.seed), query.settings
        return self._answered(request, query.update, must_be_accepted=True)

    def probe(self, token_ids: Sequence[int], update: str) -> Future[FromUpdate[Sequence[float]]]:
        return self._answered(list(token_ids), update, must_be_accepted=False)

    def _answered(self, request: Any, update: str, *, must_be_accepted: bool) -> Future[Any]:
        def prepare() -> tuple[Any, None]:
            self._check_held(update, must_be_accepted=must_be_accepted)
            return request, None

        return self._thread.submit(prepare, lambda output: output.answer)

    def held_weights(self, update: str) -> Future[WeightChecksums]:
        def look(engine: Any) -> WeightChecksums:
            return engine.sampler.held_weights(self._check_held(update, must_be_accepted=False).version)[0]

        return self._thread.run_alone(look)


class TransformersPrefill:
    """As `PrefillEngine`."""

    def __init__(
        self, model: str, settings: PrefillSettings, *, revision: str | None, on_failure: Callable[[], None]
    ) -> None:
        def start() -> _OneByOne:
            causal: Any = load_causal_lm(model, settings.dtype, revision=revision).eval()
            most = settings.max_model_tokens or causal.config.max_position_embeddings
            return _OneByOne(most, lambda token_ids: _states(causal, token_ids))

        self._thread = EngineThread(start, name="teacher engine", on_failure=on_failure)
        self.max_tokens, self.close = self._thread.max_tokens, self._thread.close

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive

    def submit(self, token_ids: Sequence[int]) -> Future[torch.Tensor]:
        return self._thread.submit(lambda: (list(token_ids), None), lambda output: output.answer)


@torch.no_grad()
def _states(causal: Any, token_ids: list[int]) -> torch.Tensor:
    return causal.model(torch.tensor([token_ids])).last_hidden_state[0]


def main() -> None:
    from gkd.cli.main import main as gkd
    from gkd.servers import sampler, teacher

    sampler.SamplerEngine, teacher.PrefillEngine = TransformersSampler, TransformersPrefill  # pyright: ignore
    gkd()


if __name__ == "__main__":
    main()
