"""The servers of `rollout.addresses`: checked at the start, and taken for the run. No torch here, but for CUDA."""

from __future__ import annotations

import math
import os
import shlex
import threading
from contextlib import suppress
from urllib.parse import urlsplit

import httpx

from gkd.config import SAMPLER_PORT, Config
from gkd.errors import ConfigError
from gkd.serving import sampler_protocol as protocol
from gkd.serving.replicas import (
    CONNECT_TIMEOUT_S,
    Replica,
    ReplicaPool,
    Role,
    ServerFailedError,
    ServerRefusedError,
    host_options,
)
from gkd.serving.sampler_protocol import LEASE_S, RunIdentity, ServedSamplerModel

_RENEWED_EVERY_S = LEASE_S / 6
_UNHEARD = (httpx.HTTPError, ServerFailedError, ServerRefusedError)


class SamplerReplicas:
    """Servers of one student's architecture; who uses them says which of them hold its weights."""

    def __init__(self, config: Config) -> None:
        """Asks every server what it serves. Raises ConfigError if one does not answer or does not fit the run."""
        self._config = config
        role = Role("rollout", "no sampler", "gkd sampler", protocol.DESCRIPTION_PATH, self._start_command)
        self.pool = ReplicaPool(config.rollout, role, cool_down_s=math.inf)
        self._renewing: threading.Thread | None = None
        self._is_over = threading.Event()
        try:
            self.served = self._ask()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Gives the servers back, and lets go of them."""
        if self._renewing is not None:
            self._is_over.set()
            self._renewing.join()  # or it would take them again
            self._renewing = None
            self._tell_all(protocol.LEASE_END_PATH)
        self.pool.close()

    def work_for(self, run: RunIdentity) -> None:
        """Every request from here on is this run's."""
        self.pool.say_with_all(run.headers)

    def take_all(self) -> str:
        """Takes every server for the run until `close`; on one rank. Returns why that cannot be, or nothing."""
        self._renewing = threading.Thread(target=self._renew, name="sampler leases", daemon=True)
        self._renewing.start()
        for replica in self.pool.replicas:
            try:
                self.take(replica)
            except _UNHEARD as error:
                return f"rollout.addresses: {replica.address}: {self.pool.reason(error)}"
        return ""

    def take(self, replica: Replica) -> None:
        """Raises ServerRefusedError if it works for another run, and what the pool raises."""
        self.pool.post_json(replica, protocol.LEASE_PATH, {})

    def _renew(self) -> None:
        """A step may be long, and nothing asked of the servers meanwhile."""
        while not self._is_over.wait(_RENEWED_EVERY_S):
            self._tell_all(protocol.LEASE_PATH)

    def _tell_all(self, path: str) -> None:
        """Who does not hear it is found out by whoever needs an answer."""
        for replica in self.pool.replicas:
            with suppress(*_UNHEARD):
                self.pool.post_json(replica, path, {}, CONNECT_TIMEOUT_S)

    @property
    def timeout_s(self) -> float:
        return self._config.rollout.timeout_s

    def check_student(self, architecture: str) -> None:
        """Raises ConfigError unless the servers' model has the student's architecture."""
        served = self.served
        if served.architecture != architecture:
            raise ConfigError(
                f"rollout.addresses: {', '.join(self._config.rollout.addresses or ())} serves {served.model} "
                f"({served.architecture}), which has another architecture than the student ({architecture}); serve the "
                "student's own model, with --layers where student.init.layers cuts it"
            )

    def _ask(self) -> ServedSamplerModel:
        described = [self.pool.describe(replica, ServedSamplerModel) for replica in self.pool.replicas]
        self.pool.check_agreement(described, ("architecture", "dtype", "vocabulary_rows"))
        for replica, served in zip(self.pool.replicas, described, strict=True):
            self._check(replica.address, served)
        return described[0]

    def _check(self, address: str, served: ServedSamplerModel) -> None:
        config, start = self._config, self._start_command(address)
        wanted = config.rollout.weight_transfer
        if served.dtype != config.student.dtype:
            raise ConfigError(
                f"rollout.addresses: {address} samples in {served.dtype}, but student.dtype is {config.student.dtype}; "
                f"start it with: {start}"
            )
        if served.max_tokens < config.longest_sampled:
            raise ConfigError(
                f"rollout.addresses: {address} takes {served.max_tokens} tokens, but a sequence or a probe can reach "
                f"{config.longest_sampled}; start it with --max-model-tokens {config.longest_sampled} or more"
            )
        if wanted not in ("auto", served.weight_transfer):
            raise ConfigError(
                f"rollout.weight_transfer: {wanted}, but {address} takes weights by {served.weight_transfer}; start it "
                f"with: {start} --weight-transfer {wanted}, or set this to auto"
            )
        _check_transfer(address, served)

    def _start_command(self, address: str) -> str:
        student = self._config.student
        layers = "" if student.init is None else f" --layers {str(student.init.layers).strip('[]').replace(' ', '')}"
        port = urlsplit(address).port or SAMPLER_PORT
        model = shlex.quote(student.model or self._config.teacher.model)
        return f"gkd serve-sampler {model}{layers} --dtype {student.dtype}{host_options(address)} --port {port}"


def _check_transfer(address: str, served: ServedSamplerModel) -> None:
    if served.weight_transfer == "file" and not os.access(served.weights_folder or "", os.W_OK):
        raise ConfigError(
            f"rollout.weight_transfer: {address} looks for weights in {served.weights_folder}, which cannot be written "
            "here; start it with --weight-transfer gloo, or with a --weights-folder that both sides have"
        )
    if served.weight_transfer == "nccl":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(
                f"rollout.weight_transfer: {address} takes weights by nccl, which needs CUDA here too; start it with "
                "--weight-transfer gloo"
            )
