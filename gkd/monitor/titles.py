"""What people read in place of the names of divergences and phases."""

DIVERGENCE_TITLES = {
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "jsd": "JSD",
    "tvd": "total variation",
    "topk_forward_kl": "top-k forward KL",
    "topk_reverse_kl": "top-k reverse KL",
    "topk_jsd": "top-k JSD",
    "aligned_forward_kl": "aligned forward KL",
    "aligned_reverse_kl": "aligned reverse KL",
    "aligned_jsd": "aligned JSD",
}
PHASE_TITLES = {  # in the order of a step
    "sample": "sample",
    "score": "score",
    "forward_backward": "forward, backward",
    "optimizer": "optimizer",
    "sync": "sync weights",
    "other": "rest of the steps",
}
