"""How large the pieces are that large things are worked on or sent in.

Plain numbers without torch: `gkd plan` counts with the same ones that the losses and the weight updates use.
"""

from __future__ import annotations

WEIGHT_PIECE_BYTES = 128 << 20  # of a weight update to a served sampler, or one parameter that is larger
# Logits of one side of a chunk of the fused loss. Rather few and large chunks: each reads both heads and updates a
# gradient.
LOSS_CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
# Of whole parameters that one collective operation brings together; one that is larger is a bucket by itself. On a CPU
# bytes count, not operations, and fresh memory beyond the allocator's limit costs more than what it holds.
GATHER_BUCKET_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}


def loss_chunk_bytes(device_type: str) -> int:
    """The default of the fused losses on a device of torch's type `device_type`."""
    return LOSS_CHUNK_BYTES.get(device_type, LOSS_CHUNK_BYTES["cpu"])


def gather_bucket_bytes(device_type: str) -> int:
    """Of ZeRO-3's weights on their way out, on a device of torch's type `device_type`."""
    return GATHER_BUCKET_BYTES.get(device_type, GATHER_BUCKET_BYTES["cpu"])
