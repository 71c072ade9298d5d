"""What the ranks multiply in."""

from __future__ import annotations

from gkd.config import Config, dtypes_of
from gkd.errors import ConfigError
from gkd.train.distributed import from_main, max_over_ranks


def check_same_dtypes(config: Config) -> None:
    """Raises ConfigError, on all ranks, if `auto` became another dtype on one of them. Collective."""
    own = dtypes_of(config)
    assert "auto" not in own.values(), "the config of a run is a settled one: gkd.config.settle"
    of_main = from_main(own)
    assert of_main is not None
    if max_over_ranks(float(own != of_main)):
        chosen = ", ".join(f"{key}={dtype}" for key, dtype in of_main.items())
        raise ConfigError(f"dtype: auto is not the same on all ranks, as their devices differ; set {chosen}, or others")
