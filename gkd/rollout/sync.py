"""Weights from the trainer into the sampler: complete, proven, versioned.

Complete: every parameter of the trainer arrives once, in its full shape. Proven by contents: the sampler holds, bit by
bit, what was sent (`gkd.models.held`). Proven by result: sampler and trainer score the same text, the probe; if their
log-probabilities disagree by more than rounding, nothing more is generated.
The probe is longer than a block of the sampler's prefix cache, so that states of older weights are found there.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gkd.config import PROBE_TOKENS, Dtype
from gkd.errors import PartError, WeightSyncError
from gkd.models.held import FORMS, Forms, WeightChecksums, differences
from gkd.rollout.base import Sampler
from gkd.seeding import derive_seed
from gkd.serving.patience import Patience
from gkd.types import Completion, SampleRequest, SamplingSettings, WeightStream

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)
_LEAST_IN_HALF, _OF_ROUNDING = 0.05, 4.0
_UNMEASURED_IN_HALF = 0.5  # where weights are not in float32 there is nothing to compare the rounding with


@dataclass
class Tolerance:
    """Of the probe's mean log-probability difference, in nats: at most how far rounding alone takes two engines apart.

    Where the trainer computes in less than float32 it is a multiple of what that rounding does to the trainer's own
    log-probabilities: a student that was just cut out of its teacher has activations of 1e4, and loses far more by it
    than one that was trained.
    """

    least: float
    of_rounding: float = 0.0  # times the rounding; 0: none is measured

    @classmethod
    def of(cls, chosen: float | None, dtype: Dtype) -> Tolerance:
        """`chosen` is rollout.sync_tolerance."""
        if chosen is not None:
            return cls(chosen)
        return cls(1e-3) if dtype == "float32" else cls(_LEAST_IN_HALF, _OF_ROUNDING)

    def limit(self, rounding: float | None) -> float:
        """None: it could not be measured."""
        if not self.of_rounding:
            return self.least
        return _UNMEASURED_IN_HALF if rounding is None else max(self.least, self.of_rounding * rounding)


class SyncedSampler:
    """A sampler that refuses to generate unless its weights are proven to be the trainer's.

    `max_over_ranks` makes all ranks agree on the largest error, so that they fail together instead of hanging. An
    update that no server takes is sent again for `retry_s`.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        probe_ids: Callable[[int], Sequence[int]],
        tolerance: Tolerance,
        sent_dtype: Dtype | None = None,
        max_over_ranks: Callable[[float], float] = lambda value: value,
        retry_s: float = 0.0,
        known_fault: str = "",
    ) -> None:
        """`probe_ids` gives each version's text. `sent_dtype` is what the sampler holds weights in; None: as they
        come. `known_fault` of the engine with such a model, and what to do, ends what is said of other weights."""
        self._sampler = sampler
        self._retry_s = retry_s
        self._known_fault = f"; {known_fault}" if known_fault else ""
        self._probe_ids = probe_ids
        self._tolerance = tolerance
        self._sent_dtype: Dtype | None = sent_dtype
        self._max_over_ranks = max_over_ranks
        self._proven = False
        self._proof: _Proof | None = None
        self.tolerance = tolerance.limit(None)  # nats
        self._is_rounding_known = False
        self.weights_version: int | None = None

    def generate(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[Completion]:
        """Raises WeightSyncError while the sampler's weights are not proven."""
        if not self._proven:
            raise WeightSyncError("the sampler holds no complete, proven weights; it does not generate")
        return self._sampler.generate(requests, settings)

    def load_weights(self, weights: WeightStream, version: int) -> dict[str, float]:
        """Streams `weights` in, proves them, and sets the version. Returns the `sync/*` metrics.

        Raises WeightSyncError if a parameter is missing, unknown, repeated or misshapen, if the sampler holds others
        than were sent, or if the probe's mean log-probability error exceeds the tolerance, and what the sampler raises.
        """
        patience = Patience(self._retry_s)
        while True:
            try:
                return self._load(weights, version)
            except PartError as error:  # one that is temporary is on all ranks
                patience.start()
                if not (error.is_temporary and self._max_over_ranks(patience.pause())):
                    raise

    def _load(self, weights: WeightStream, version: int) -> dict[str, float]:
        self._proven = False
        self.weights_version = None
        sent = _Sent(weights, version, self._sent_dtype, self._proof)
        try:
            self._sampler.update_weights(sent, version)
        except WeightSyncError as error:
            raise WeightSyncError(f"{error}{self._known_fault}", is_temporary=error.is_temporary) from error
        sent.raise_faults()
        self._compare_contents(sent.checksums, version)
        if not self._is_rounding_known:
            self.measure_rounding(weights, version)
        metrics = self._compare_logprobs(weights, version)
        self._sampler.accept_weights()
        self._proven = True
        self.weights_version = version
        return metrics

    def measure_rounding(self, weights: WeightStream, version: int) -> None:
        """Sets the tolerance by what the trainer's dtype does to its log-probabilities now. Collective."""
        rounding: float | None = None
        if self._tolerance.of_rounding:
            ids = self._probe_ids(version)
            exact = weights.exact_logprobs(ids, 1)
            if exact is not None:
                own = weights.token_logprobs(ids, 1)
                rounding = self._max_over_ranks(sum(abs(a - b) for a, b in zip(own, exact, strict=True)) / len(own))
        self.tolerance = self._tolerance.limit(rounding)
        self._is_rounding_known = True

    def _compare_contents(self, sent: WeightChecksums, version: int) -> None:
        """Raises WeightSyncError on all ranks if an engine of any holds something else than was sent."""
        held = self._sampler.held_weights(version)
        if self._proof is None:
            self._proof = _Proof.of(sent, held)
        found = [self._proof.differences(sent, engine) for engine in held]
        if not self._max_over_ranks(float(sum(map(len, found)))):
            return
        named = next(((engine.origin, names) for engine, names in zip(held, found, strict=True) if names), None)
        what = "on another rank"
        if named is not None:
            origin, names = named
            what = f"{f'at {origin} ' if origin else ''}in {len(names)} tensors, the first is {names[0]}"
        raise WeightSyncError(
            f"after the update to version {version} the sampler holds other weights than it was sent, {what}"
            f"{self._known_fault}"
        )

    def _compare_logprobs(self, weights: WeightStream, version: int) -> dict[str, float]:
        errors = self._probe_errors(weights, self._probe_ids(version))
        mean = self._max_over_ranks(max((sum(e) / len(e) for e in errors), key=_nan_is_largest))
        largest = self._max_over_ranks(max(itertools.chain.from_iterable(errors), key=_nan_is_largest))
        if not mean <= self.tolerance:  # a NaN must not pass; the rounding may have grown since it was measured
            self.measure_rounding(weights, version)
        if not mean <= self.tolerance:
            raise WeightSyncError(
                f"after the update to version {version} the sampler's log-probabilities differ from the trainer's by "
                f"{mean:.3g} on average ({largest:.3g} at most) over {len(errors[0])} probe tokens; "
                f"the tolerance is {self.tolerance:.3g}. If the two engines only round differently, set "
                f"rollout.sync_tolerance, or student.dtype: float32{self._known_fault}"
            )
        return {"sync/mean_logprob_error": mean, "sync/max_logprob_error": largest}

    def _probe_errors(self, weights: WeightStream, token_ids: Sequence[int]) -> list[list[float]]:
        """Of each engine and probe token."""
        answers = self._sampler.probe(token_ids)
        trainer = weights.token_logprobs(token_ids, 1)
        return [[abs(a - b) for a, b in zip(trainer, sampler, strict=True)] for sampler in answers]

    def fall_behind(self) -> None:
        """The trainer's weights changed, and the sampler is not asked before the next `load_weights`."""
        self._proven = False
        self.weights_version = None

    def sleep(self) -> None:
        """Nothing more is generated before the next `load_weights`."""
        self._sampler.sleep()

    def close(self) -> None:
        self._proven = False
        self._sampler.close()


def _nan_is_largest(value: float) -> float:
    return math.inf if math.isnan(value) else value


class _Proof:
    """What the first update showed of the forms in which engines keep the tensors that they are sent."""

    def __init__(self, forms: Mapping[str, Forms], reordered: frozenset[str]) -> None:
        self._forms, self._reordered = forms, reordered

    @classmethod
    def of(cls, sent: WeightChecksums, held: Sequence[WeightChecksums]) -> _Proof:
        """An engine may lay a matrix out in another order, so that it differs from the start: as long as the engine's
        log-probabilities are right, such a matrix is left to them."""
        forms = {name: held[0].forms(name) for name in sent.whole}
        reordered = {name for engine in held for name in differences(sent, engine) if name in engine.may_be_reordered}
        unseen = sorted({name for name, kept in forms.items() if not kept} | reordered)
        if unseen:
            _log.warning(
                "%d of %d tensors cannot be compared with what the sampler holds (the first is %s): the probe's "
                "log-probabilities alone prove them",
                len(unseen), len(forms), unseen[0],
            )  # fmt: skip
        return cls(forms, frozenset(reordered))

    def forms(self, name: str) -> Forms:
        """Those that have to be computed of what is sent."""
        return self._forms.get(name, FORMS)

    def differences(self, sent: WeightChecksums, held: WeightChecksums) -> list[str]:
        return [name for name in differences(sent, held) if name not in self._reordered]


class _Sent:
    """Passes on what belongs, with its checksums, and remembers what does not.

    Nothing is raised on the way: an engine that is cut off in the middle of an update cannot take another.
    """

    def __init__(self, weights: WeightStream, version: int, dtype: Dtype | None, proof: _Proof | None) -> None:
        self._weights, self._version, self._dtype, self._proof = weights, version, dtype, proof
        self._missing = dict(weights.shapes)
        self._faults: list[str] = []
        self.checksums = WeightChecksums()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        import torch

        for name, tensor in self._weights:
            shape = self._missing.pop(name, None)
            if shape is None:
                self._faults.append(f"{name}: unknown or sent twice")
            elif tuple(tensor.shape) != shape:
                self._faults.append(f"{name}: shape {tuple(tensor.shape)}, expected {shape}")
            else:
                sent = tensor if self._dtype is None else tensor.to(getattr(torch, self._dtype))
                self.checksums.add(name, sent, self._version, self._proof.forms(name) if self._proof else FORMS)
                yield name, sent

    def raise_faults(self) -> None:
        faults = self._faults
        if self._missing:
            faults = [*faults, f"{len(self._missing)} not sent, the first is {next(iter(self._missing))}"]
        if faults:
            raise WeightSyncError("the update of the sampler's weights is incomplete: " + "; ".join(faults))


def probe_text(prompts: Sequence[Sequence[int]], vocabulary: int, seed: int, version: int) -> list[int]:
    """`PROBE_TOKENS` token ids, others for every version: half of them from prompts, half from all of the vocabulary.

    `vocabulary` is how many ids there are.
    """
    first = derive_seed(seed, "probe", version) % len(prompts)
    texts = (prompts[place % len(prompts)] for place in itertools.count(first))
    known = list(itertools.islice(itertools.chain.from_iterable(texts), PROBE_TOKENS // 2))
    return known + [derive_seed(seed, "probe", version, i) % vocabulary for i in range(PROBE_TOKENS - len(known))]
