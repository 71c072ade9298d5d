"""All randomness of a run comes from here: a seed is a pure function of (run seed, what it is for, indices).

Nothing keeps a generator's state between steps, so the order of ranks, a resume or a retry cannot change a draw.
"""

from __future__ import annotations

import hashlib

_UNIT_BITS = 53


def derive_seed(seed: int, *path: int | str) -> int:
    """A 63-bit seed for `path`, e.g. `derive_seed(seed, "sample", step, prompt_id, sample_index)`.

    The same on every machine and Python version (BLAKE2b of the path's text), unlike `hash()`.
    """
    text = "/".join([str(seed), *map(str, path)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def derive_uniform(seed: int, *path: int | str) -> float:
    """A number in [0, 1) for `path`, with 53 random bits."""
    return (derive_seed(seed, *path) >> (63 - _UNIT_BITS)) / (1 << _UNIT_BITS)
