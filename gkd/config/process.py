"""What the environment says of this process."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from gkd.environment import adopt_slurm_launch, launch_number
from gkd.errors import MachineError


class Launch(BaseModel):
    """Which process of how many this is, as torchrun, the deepspeed launcher, srun or nobody said."""

    model_config = ConfigDict(frozen=True)
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    meeting_point: str = ""  # HOST:PORT where several ranks find one another

    @classmethod
    def from_environment(cls) -> Launch:
        """Raises MachineError, naming the variable, for one that is no number, or that is missing beside another."""
        adopt_slurm_launch()
        launch = cls(
            rank=launch_number("RANK", 0),
            local_rank=launch_number("LOCAL_RANK", 0),
            world_size=launch_number("WORLD_SIZE", 1, least=1),
        )
        if launch.rank >= launch.world_size:
            raise MachineError(f"RANK is {launch.rank}, but WORLD_SIZE makes ranks 0 to {launch.world_size - 1}")
        if launch.world_size == 1:
            return launch
        port = launch_number("MASTER_PORT", least=1)
        if not os.environ.get("MASTER_ADDR"):
            raise MachineError(f"MASTER_ADDR is not set, where {launch.world_size} ranks meet; launchers set it")
        return launch.model_copy(update={"meeting_point": f"{os.environ['MASTER_ADDR']}:{port}"})

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def exit_copy() -> Path | None:
    """Where `gkd launch` looks for how the run has ended: $GKD_EXIT_FILE."""
    return Path(os.environ["GKD_EXIT_FILE"]) if os.environ.get("GKD_EXIT_FILE") else None


def cache_folder() -> Path:
    """Where converted models and teacher completions are kept: $GKD_CACHE, else ~/.cache/gkd.

    Raises MachineError where neither is known.
    """
    if chosen := os.environ.get("GKD_CACHE"):
        return Path(chosen)
    try:
        return Path.home() / ".cache" / "gkd"
    except RuntimeError:
        raise MachineError("HOME is not set, and this user has no home folder: set HOME, or GKD_CACHE") from None


def instruction_limits() -> dict[str, str]:
    """What is set of the variables that hold libraries to fewer instructions than the CPU has."""
    names = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
    return {name: os.environ[name] for name in names if name in os.environ}
