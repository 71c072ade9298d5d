"""A LoRA student's adapter into a sampler that applies it, right and spoilt; a process of its own for vLLM.

python lora_sampler_job.py MODEL_FOLDER ENGINE     prints one JSON object
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lora_job import LORA
from lora_state_job import new_engine

from gkd.config import Launch, LoraConfig
from gkd.engines.sampling import SamplerSpec
from gkd.errors import RunError
from gkd.models import adapter_parameters
from gkd.rollout.offline import start_sampler
from gkd.rollout.sync import SyncedSampler, Tolerance, probe_text
from gkd.train import distributed
from gkd.types import SampleRequest, SamplingSettings, WeightStream


class Spoilt:
    """A `WeightStream` in which one tensor is left out or changed."""

    def __init__(self, weights: WeightStream, fault: str) -> None:
        self._weights, self._fault = weights, fault
        self.shapes: Mapping[str, tuple[int, ...]] = weights.shapes

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for index, (name, tensor) in enumerate(self._weights):
            if index == 1 and self._fault == "missing":
                continue
            yield name, -tensor if index == 1 and self._fault == "negated" else tensor

    def token_logprobs(self, token_ids: Sequence[int], start: int) -> list[float]:
        return self._weights.token_logprobs(token_ids, start)


def main() -> None:
    folder, engine_name = sys.argv[1:]
    distributed.initialize(Launch())
    student: Any = new_engine(folder, 0)
    sampler = SyncedSampler(
        start_sampler(SamplerSpec(engine_name, folder, "float32", 256, 0, lora=LoraConfig(**LORA))),
        probe_ids=partial(probe_text, [[3 + (7 * j) % 250 for j in range(30)]], 259, 0),
        tolerance=Tolerance(1e-3),
    )
    request, settings = SampleRequest((5, 80, 90, 33), 1), SamplingSettings(20)
    errors, completions = [], []
    for version in range(3):
        metrics = sampler.load_weights(student.adapter_weights(), version)
        errors.append(metrics["sync/max_logprob_error"])
        completions.append(sampler.generate([request], settings)[0].logprobs)
        for name, parameter in adapter_parameters(student._engine.module.model).items():
            if ".lora_B." in name:
                parameter.data.normal_(std=0.05)
    caught = {}
    for fault in ("missing", "negated"):
        try:
            sampler.load_weights(Spoilt(student.adapter_weights(), fault), 9)
            caught[fault] = "passed"
        except RunError as error:
            caught[fault] = str(error)
    again = sampler.load_weights(student.adapter_weights(), 10)["sync/max_logprob_error"]
    left = [str(path) for path in Path("/dev/shm").glob("tmp*/adapter_config.json")]
    print(json.dumps({"errors": [*errors, again], "completions": completions, "caught": caught, "left": left}))
    sampler.close()


if __name__ == "__main__":
    main()
