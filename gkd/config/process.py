"""What the environment says of this process."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from gkd.environment import adopt_slurm_launch


class Launch(BaseModel):
    """Which process of how many this is, as torchrun, the deepspeed launcher, srun or nobody said."""

    model_config = ConfigDict(frozen=True)
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls) -> Launch:
        adopt_slurm_launch()
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
        )

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def exit_copy() -> Path | None:
    """Where `gkd launch` looks for how the run has ended: $GKD_EXIT_FILE."""
    return Path(os.environ["GKD_EXIT_FILE"]) if os.environ.get("GKD_EXIT_FILE") else None


def cache_folder() -> Path:
    """Where converted models and teacher completions are kept: $GKD_CACHE, else ~/.cache/gkd."""
    return Path(os.environ.get("GKD_CACHE") or Path.home() / ".cache" / "gkd")


def instruction_limits() -> dict[str, str]:
    """What is set of the variables that hold libraries to fewer instructions than the CPU has."""
    names = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
    return {name: os.environ[name] for name in names if name in os.environ}
