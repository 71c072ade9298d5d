"""Ways to distil beyond a divergence and a mixture, each beside the method that lacks nothing but it.

Weights and options are those of configs/methods, where there is a config of the method.
"""

from __future__ import annotations

from typing import Any

from gkd.bench.methods import FORWARD, REVERSE, SFT, SKEW, START, SUPERVISED_KD, Cell, Keys, Method, gkd, share
from gkd.bench.sizes import Size

ON_POLICY_FORWARD, ON_POLICY_REVERSE, HALF_SKEW = gkd(FORWARD, 1.0), gkd(REVERSE, 1.0), gkd(SKEW, 0.5)
_FORWARD, _REVERSE, _LABELS = {"kind": "forward_kl"}, {"kind": "reverse_kl"}, {"kind": "cross_entropy"}


def _terms(*terms: Keys, **others: Any) -> Keys:
    return {**others, "terms": list(terms)}


def _added(label: str, beside: Method, objective: Keys, **others: Any) -> Method:
    """To the mixture of the method that it stands beside, unless another is given."""
    return Method(label, "addition", others.pop("mixture", beside.mixture), objective, beside=beside.label, **others)


# ---- what the teacher's layers and texts look like, beside the forward KL

FEATURES = _added(
    "hidden states",
    SUPERVISED_KD,
    _terms(_FORWARD, {"kind": "hidden_states", "layers": "uniform", "distance": "normalized_mse", "weight": 0.1}),
)
RELATIONS = _added(
    "relations of q, k, v (MiniLM v2)",
    SUPERVISED_KD,
    _terms(_FORWARD, {"kind": "relations", "relation_heads": 4, "weight": 0.1}),
)
RKD = _added(
    "relations among texts (RKD)",
    SUPERVISED_KD,
    _terms(_FORWARD, {"kind": "rkd", "distance": 1.0, "angle": 2.0, "weight": 0.5}),
)

# ---- whole texts

HALF_REVERSE = _added(
    "reverse KL and labels, λ = 0.5",
    ON_POLICY_REVERSE,
    _terms({**_REVERSE, "on": ["student"]}, {**_LABELS, "on": ["dataset"]}),
    mixture=share(0.5),
)
_BY_TEACHER = {"kind": "policy_gradient", "advantage": "teacher", "clip_range": 0.2}
MINILLM = _added("MiniLLM", HALF_REVERSE, _terms({**_BY_TEACHER, "on": ["student"]}, {**_LABELS, "on": ["dataset"]}))
MINILLM_MIXED = _added(
    "MiniLLM, a fifth of the tokens the teacher's",
    MINILLM,
    _terms({**_BY_TEACHER, "on": ["mixed"]}, {**_LABELS, "on": ["dataset"]}),
    mixture={"student": 0.0, "mixed": 0.5, "dataset": 0.5},
    rollout={"mixed": {"teacher_share": 0.2}},
)

# ---- corrected by the teacher

SPECULATIVE = _added(
    "forward KL on texts that the teacher corrects (speculative)",
    ON_POLICY_FORWARD,
    FORWARD.keys,
    mixture={"student": 0.0, "speculative": 1.0},
    rollout={"speculative": {"top_k": 3, "block_tokens": 4}},  # of 39 tokens, and answers of six
)

# ---- by source, and by token

DISTILLM_2 = _added(
    "skew KLs by source (DistiLLM-2)",
    HALF_SKEW,
    _terms(
        {"kind": "skew_forward_kl", "alpha": 0.1, "on": ["dataset"]},
        {"kind": "skew_reverse_kl", "alpha": 0.1, "on": ["student"]},
    ),
)
ENTROPY_AWARE = _added(
    "reverse KL, forward where the teacher is unsure",
    ON_POLICY_REVERSE,
    _terms(_REVERSE, {**_FORWARD, "token_weight": {"teacher_entropy": {"threshold": 0.5}}}),
)
UNCERTAIN_OR_WRONG = _added(
    "reverse KL on uncertain or wrong tokens (TIP)",
    ON_POLICY_REVERSE,
    _terms({**_REVERSE, "token_weight": {"uncertain_or_wrong": {}}}),
)
DRIFT = _added(
    "reverse KL, more on early tokens (IW-OPD)", ON_POLICY_REVERSE, _terms({**_REVERSE, "token_weight": {"drift": {}}})
)
ADAPTIVE_KL = _added(
    "forward and reverse KL by head and tail (AKL)",
    SUPERVISED_KD,
    _terms({**_FORWARD, "token_weight": {"adaptive": {}}}, {**_REVERSE, "token_weight": {"adaptive": {}}}),
)
REPLAY = _added(
    "reverse KL, half of the texts replayed",
    ON_POLICY_REVERSE,
    _terms({**_REVERSE, "token_weight": {"importance": {"cap": 2.0}}}),
    mixture={"student": 0.5, "replay": 0.5},
    rollout={"replay": {"size": 512, "max_age": 8}},
)

# ---- strength that follows progress, and a chain

SOFT_AND_HARD = _added(
    "soft and hard labels, T = 2",
    SUPERVISED_KD,
    _terms({**_FORWARD, "weight": 0.9}, {**_LABELS, "weight": 0.1}, temperature=2.0),
)
DYNAMIC_WEIGHTS = _added(
    "soft and hard, dynamic weight average",
    SOFT_AND_HARD,
    {**SOFT_AND_HARD.objective, "weights": {"rule": "dwa", "window": 20, "temperature": 2.0}},
)
ADAPTIVE = _added(
    "soft to hard as the transfer slows",
    SOFT_AND_HARD,
    {
        **SOFT_AND_HARD.objective,
        "weights": {"rule": "adaptive", "window": 2, "share": 0.3, "cooling": 0.8, "shift": 0.1},
    },
    evaluations=12,
)
ASSISTANT = _added("teacher assistant", SUPERVISED_KD, FORWARD.keys, through_assistant=True)


def soft_then_hard(steps: int) -> Method:
    """By schedules, in a run of about `steps`."""
    return _added(
        "soft, then hard",
        SOFT_AND_HARD,
        _terms(
            {**_FORWARD, "weight": {"from": 0.9, "to": 0.5, "steps": steps}},
            {**_LABELS, "weight": {"from": 0.1, "to": 0.5, "steps": steps}},
            temperature={"from": 3.0, "to": 1.0, "steps": max(1, 2 * steps // 3), "shape": "cosine"},
        ),
    )


def methods(size: Size) -> tuple[Method, ...]:
    """What matters most first, each after the one that it stands beside."""
    return (
        *(START, SFT, SUPERVISED_KD, ON_POLICY_REVERSE, FEATURES, RELATIONS, ASSISTANT),
        *(HALF_REVERSE, MINILLM, ENTROPY_AWARE, SOFT_AND_HARD, ADAPTIVE),
        *(HALF_SKEW, DISTILLM_2, MINILLM_MIXED, RKD, UNCERTAIN_OR_WRONG, DRIFT, ADAPTIVE_KL, REPLAY),
        *(DYNAMIC_WEIGHTS, soft_then_hard(size.about_steps), ON_POLICY_FORWARD, SPECULATIVE),
    )


def cells(size: Size) -> list[Cell]:
    """Method by method: what is cut off has whole seeds of those that it has."""
    return [Cell(method, seed) for method in methods(size) for seed in range(size.seeds)]
