"""The config of a student that is yet to be made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gkd.config import StudentInit
from gkd.models.load import read_config
from gkd.models.subset import config_of_layers
from gkd.models.width import narrow_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def student_config(source: str, init: StudentInit | None, *, revision: str | None = None) -> PreTrainedConfig:
    """Of what `init` makes of the resolved model `source`, or of that model itself.

    Raises ConfigError, naming the key, for what it does not have, and ModelError.
    """
    whole = read_config(source, revision=revision)
    if init is None:
        return whole
    available = whole.get_text_config().num_hidden_layers
    init.check_fits(available)
    # which ones it will be is measured later; the first ones are certainly of the kinds that stand there
    layers = range(init.count(available)) if init.is_measured else init.layers
    kept = config_of_layers(source, available if layers is None else layers, revision=revision)
    return kept if init.width is None else narrow_config(kept, init.width)
