"""Where the student's sampler can be: what a run needs to know of it there, before anything heavy is loaded.

A further placement is a class here, with its name in the table, and that name and its keys in the config.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from gkd.config import Config
from gkd.engines.sampling import SamplerSpec
from gkd.errors import ConfigError
from gkd.rollout.base import Sampler
from gkd.rollout.offline import start_sampler
from gkd.rollout.replicas import SamplerReplicas
from gkd.rollout.tensor_parallel import TensorParallelSampler
from gkd.serving.sampler_protocol import RunIdentity, architecture_digest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


FromMain = Callable[[Any], Any]  # the main rank's value, on all


class Neighbours(Protocol):
    """The ranks that share one engine."""

    place: int  # this one's among them

    def gather(self, value: Any) -> list[Any]:
        """What all of them gave, in their order."""
        ...


@dataclass(frozen=True)
class Site:
    """The rank that samples. `from_main` hands the main rank's value to all; `neighbours` of a count is collective."""

    device_type: str
    is_main: bool
    from_main: FromMain
    neighbours: Callable[[int], Neighbours]


class SamplerPlacement:
    """The sampler of a config, where that says it is. What is said here is true of one without servers."""

    def __init__(self, config: Config) -> None:
        """Asks the sampler's servers, if it has any, and nobody asks them again: connections stay open until `close`.

        Raises ConfigError if one does not answer, or does not fit the run.
        """
        self._config = config

    def close(self) -> None:
        """Lets go of the servers."""

    def check_student(self, student_config: PreTrainedConfig) -> None:
        """Raises ConfigError unless the servers can take the weights of such a student."""

    def take(self, run: RunIdentity, *, is_main: bool, from_main: FromMain) -> None:
        """The servers work for this run alone, until `close`. Collective. Raises ConfigError if another run has one."""

    def build(self, spec: SamplerSpec, site: Site) -> Sampler:
        """`spec` is of the student, with whole weights. Raises ModelError."""
        raise NotImplementedError


class Local(SamplerPlacement):
    """One engine a rank, in its process, or one for rollout.tensor_parallel of them."""

    def build(self, spec: SamplerSpec, site: Site) -> Sampler:
        sampler = start_sampler(replace(spec, lora=self._config.sampler_lora(site.device_type)))
        if spec.tensor_parallel == 1:
            return sampler
        neighbours = site.neighbours(spec.tensor_parallel)
        return TensorParallelSampler(sampler, gather=neighbours.gather, place=neighbours.place)


class Served(SamplerPlacement):
    """Behind `gkd serve-sampler`, which is sent the weights."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._replicas = SamplerReplicas(config)

    def close(self) -> None:
        self._replicas.close()

    def check_student(self, student_config: PreTrainedConfig) -> None:
        self._replicas.check_student(architecture_digest(student_config))

    def take(self, run: RunIdentity, *, is_main: bool, from_main: FromMain) -> None:
        self._replicas.work_for(run)
        refusal = from_main(self._replicas.take_all() if is_main else None)
        if refusal:
            raise ConfigError(refusal)

    def build(self, spec: SamplerSpec, site: Site) -> Sampler:
        from gkd.rollout.served import ServedSampler

        return ServedSampler(self._replicas, is_main=site.is_main, from_main=site.from_main)


PLACEMENTS: dict[str, type[SamplerPlacement]] = {"local": Local, "served": Served}


def place_sampler(config: Config) -> SamplerPlacement:
    """The sampler of the config. Raises ConfigError as its placement does."""
    return PLACEMENTS[config.rollout.placement](config)
