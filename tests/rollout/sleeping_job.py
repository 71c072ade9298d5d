"""A sampler on a GPU that sleeps; a process of its own, as two vLLM engines do not share one.

python sleeping_job.py MODEL_FOLDER LEVEL     prints one JSON object: the share of the GPU that sleeping gave back, and
the largest difference of a text's log-probabilities before and after.
"""

from __future__ import annotations

import json
import sys

import torch

from gkd.engines.sampling import SamplerSpec
from gkd.models import load_causal_lm
from gkd.rollout.offline import start_sampler

TEXT = tuple(range(3, 200))


def main(folder: str, level: int) -> None:
    spec = SamplerSpec("vllm", folder, "float32", 256, 0, gpu_memory_utilization=0.3, sleep_level=level)
    sampler = start_sampler(spec)
    weights = [(name, p.detach().cuda()) for name, p in load_causal_lm(folder, "float32").named_parameters()]
    sampler.update_weights(weights, version=0)
    before = torch.tensor(sampler.probe(TEXT)[0])
    free_bytes, all_bytes = torch.cuda.mem_get_info()
    sampler.sleep()
    given_back = (torch.cuda.mem_get_info()[0] - free_bytes) / all_bytes
    sampler.update_weights(weights, version=1)
    difference = (torch.tensor(sampler.probe(TEXT)[0]) - before).abs().max().item()
    print(json.dumps({"given_back": given_back, "difference": difference}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
