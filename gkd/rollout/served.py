"""A sampler in processes of its own: `gkd serve-sampler` generates, on this machine or on others."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
from pydantic import ValidationError

from gkd.errors import SamplerError, WeightSyncError
from gkd.models.held import WeightChecksums
from gkd.rollout.checks import check_completion
from gkd.rollout.replicas import SamplerReplicas
from gkd.serving import sampler_protocol as protocol
from gkd.serving.replicas import NoServerLeftError, Replica, ServerFailedError, ServerLostError, ServerRefusedError
from gkd.serving.sampler_protocol import CompletionQuery, HeldWeights, ProbeQuery
from gkd.serving.threads import map_in_threads
from gkd.types import Completion, SampleRequest, SamplingSettings

if TYPE_CHECKING:
    import torch

FromMain = Callable[[Any], Any]
T = TypeVar("T")


class ServedSampler:
    """Implements `Sampler` with requests to the servers of `replicas`, one a completion, many at once.

    Every rank generates; the main rank sends the weights. A server that fails, or misses an update, gets no work until
    an update has reached it whole. `from_main` hands the main rank's value to all.
    """

    def __init__(self, replicas: SamplerReplicas, *, is_main: bool, from_main: FromMain) -> None:
        self._replicas, self._pool = replicas, replicas.pool
        self._is_main, self._from_main = is_main, from_main
        self._sender: Any = None
        if is_main:
            from gkd.rollout.weight_transfer import WeightSender

            self._sender = WeightSender(replicas)
        self._update, self._version = "", -1
        self._holding: list[Replica] = []

    def generate(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[Completion]:
        """Raises SamplerError if no server is left that completes a request, or if one answers something else."""
        update = self._update

        def complete(request: SampleRequest) -> Completion:
            try:
                return self._pool.attempt(lambda r: self._complete(r, request, request.limited(settings), update))
            except NoServerLeftError as error:
                raise SamplerError(
                    f"no served sampler is left that completes a prompt: {error}", is_temporary=True
                ) from None

        return map_in_threads(complete, requests, self._pool.requests_at_once)

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Raises WeightSyncError, on all ranks, if not one server took all of them."""
        self._version = version
        if self._is_main:
            self._update = f"{version}-{uuid.uuid4().hex}"  # no other run's, whatever its versions are
            self._holding = self._sender.send(weights, self._update, version)
        else:
            for _ in weights:  # takes part in gathering them
                pass
        self._agree(version)

    def probe(self, token_ids: Sequence[int]) -> list[Sequence[float]]:
        """By every server that holds the weights; one that does not answer is set aside.

        Raises SamplerError, on all ranks, if one answers something else than was asked, or if none answers.
        """
        return self._ask_holding(lambda replica: self._probe(replica, token_ids))

    def held_weights(self, version: int) -> list[WeightChecksums]:
        """As `probe` does."""
        return self._ask_holding(self._held)

    def _ask_holding(self, ask: Callable[[Replica], T]) -> list[T]:
        answers, reason, is_temporary = self._from_main(self._ask_each(ask) if self._is_main else None)
        if not answers:
            raise SamplerError(f"no served sampler could be probed: {reason}", is_temporary=is_temporary)
        return answers

    def _ask_each(self, ask: Callable[[Replica], T]) -> tuple[list[T], str, bool]:
        """The answers; or none, why, and whether that may change: the other ranks have to know it too."""
        answers: list[T] = []
        reasons: list[str] = []
        for replica in list(self._holding):
            try:
                answers.append(ask(replica))
            except (httpx.HTTPError, ServerFailedError) as error:
                reasons.append(f"{replica.address}: {self._pool.reason(error)}")
                self._pool.set_down(replica, reasons[-1])
                self._holding.remove(replica)
            except SamplerError as error:
                return [], str(error), False
        return answers, "; ".join(reasons), True

    def accept_weights(self) -> None:
        """Raises WeightSyncError, on all ranks, if no server is left to accept them."""
        if self._is_main:
            self._holding = self._sender.post(self._holding, protocol.ACCEPT_PATH, {"update": self._update})
        self._agree(self._version)

    def sleep(self) -> None:
        """The servers' memory is their own."""

    def close(self) -> None:
        self._replicas.close()

    def _agree(self, version: int) -> None:
        """The same servers on all ranks: those that hold the weights; the others get no work."""
        mine = None
        if self._is_main:
            reasons = "; ".join(self._sender.failures.values())
            mine = self._update, [replica.address for replica in self._holding], reasons
        self._update, addresses, reasons = self._from_main(mine)
        if not addresses:
            raise WeightSyncError(
                f"no served sampler took the weights of version {version}: {reasons}", is_temporary=True
            )
        for replica in self._pool.replicas:
            if replica.address in addresses:
                self._pool.take_back(replica)
            else:
                self._pool.set_down(replica, f"{replica.address}: it has no weights of version {version}")

    def _complete(
        self, replica: Replica, request: SampleRequest, settings: SamplingSettings, update: str
    ) -> Completion:
        query = CompletionQuery.of(settings, seed=request.seed, update=update)
        limit_bytes = settings.max_new_tokens * protocol.BYTES_A_TOKEN

        def read(headers: httpx.Headers, body: bytearray) -> Completion:
            if len(body) > limit_bytes:
                raise ValueError(f"more than the {settings.max_new_tokens} tokens that were asked for")
            completion = protocol.completion_from_bytes(body, headers.get(protocol.FINISH_REASON_HEADER))
            check_completion(completion, settings, self._replicas.served.vocabulary_rows)
            return completion

        return self._ask(replica, protocol.COMPLETIONS_PATH, query, request.prompt_ids, limit_bytes, read)

    def _probe(self, replica: Replica, token_ids: Sequence[int]) -> Sequence[float]:
        query = ProbeQuery(update=self._update)
        size_bytes = (len(token_ids) - 1) * protocol.LOGPROB_BYTES

        def read(_: httpx.Headers, body: bytearray) -> Sequence[float]:
            if len(body) != size_bytes:
                raise ValueError(f"{len(body)} bytes for a probe, instead of {size_bytes}")
            return protocol.logprobs_from_bytes(body)

        return self._ask(replica, protocol.PROBE_PATH, query, token_ids, size_bytes, read)

    def _held(self, replica: Replica) -> WeightChecksums:
        try:
            body = self._pool.post_json(replica, protocol.HELD_PATH, {"update": self._update})
            held = HeldWeights.model_validate_json(body)
        except ServerRefusedError as error:
            raise ServerFailedError(str(error)) from None
        except ValidationError:
            raise SamplerError(f"{replica.address}: its answer holds no checksums of its weights") from None
        return WeightChecksums(
            held.whole, held.columns, origin=replica.address, may_be_reordered=frozenset(held.may_be_reordered)
        )

    def _ask(
        self,
        replica: Replica,
        path: str,
        query: ProbeQuery,
        token_ids: Sequence[int],
        limit_bytes: int,
        read: Callable[[httpx.Headers, bytearray], T],
    ) -> T:
        """What `read` makes of the answer from the weights that `query` names, of which it gets little more than
        `limit_bytes`; its ValueError becomes a SamplerError."""
        try:
            headers, body = self._pool.post_token_ids(replica, path, query.params, token_ids, limit_bytes + 1)
            answered = headers.get(protocol.UPDATE_HEADER)
            if answered != query.update:
                raise ValueError(f"answered from the weights of update {answered!r}, not {query.update!r}")
            return read(headers, body)
        except ServerRefusedError as error:
            if error.status in (protocol.CONFLICT, protocol.LOCKED):  # it was restarted, or another run took it
                raise ServerLostError(str(error)) from None
            raise SamplerError(f"{replica.address}: {error}") from None
        except ValueError as error:
            raise SamplerError(f"{replica.address}: {error}") from None
