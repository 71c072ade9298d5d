"""The losses against their peers: time, memory, error."""

import os

# Read where torch starts on a GPU. Implementations that take turns leave blocks of every size behind; without this the
# largest would pay for that in ms.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
