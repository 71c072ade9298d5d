"""What was chosen by the device has to be the same on all ranks."""

from __future__ import annotations

from gkd.config import Config, known, settled_values
from gkd.errors import ConfigError
from gkd.train.distributed import from_main, max_over_ranks


def check_same_settings(config: Config) -> None:
    """Raises ConfigError, on all ranks, if `auto` became something else on one of them. Collective."""
    own = {key: known(value) for key, value in settled_values(config).items()}
    of_main = from_main(own)
    assert of_main is not None
    others = [key for key in own if max_over_ranks(float(own[key] != of_main[key]))]
    if others:
        chosen = ", ".join(f"{key}={str(of_main[key]).lower()}" for key in others)
        raise ConfigError(f"auto is not the same on all ranks, as their devices differ; set {chosen}, or others")
