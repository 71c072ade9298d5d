"""Setups that several tests plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gkd.config import load_config
from gkd.planning.devices import device_named
from gkd.planning.models import architectures
from gkd.planning.settled import make_setup
from gkd.planning.setup import Setup

REPOSITORY = Path(__file__).parent.parent
PLANNED = REPOSITORY / "configs" / "planned"


def setup_of(name: str, devices: int, *overrides: str, gpu: str = "h100", **options: Any) -> Setup:
    """A config of configs/planned on so many devices."""
    config = load_config(PLANNED / f"{name}.yaml", overrides)
    return make_setup(config, *architectures(config), device_named(gpu), devices, **options)
