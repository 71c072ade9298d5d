"""Objectives, and their losses and gradients in float64 from the definitions, without any of the engine.

Legend: n tokens of one sequence, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gradient_job import REWARDS, own_places, rollouts_for, shaken, with_sampler_logprobs
from torch import Tensor
from transformers import AutoModelForCausalLM

from gkd.config.objective import ObjectiveConfig
from gkd.models import model_shape
from gkd.train.state_terms import StateTerms
from gkd.types import Rollout

# Every kind of term and token weight at least once; those of one objective share rows, or divide them by source.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "hinton": {
        "terms": [
            {"kind": "jsd", "on": ["student"]},
            {"kind": "jsd", "name": "soft", "weight": 0.7, "on": ["dataset"]},
            {"kind": "cross_entropy", "weight": 0.3, "on": ["dataset"]},
        ]
    },
    "by source": {
        "temperature": 1.5,
        "terms": [
            {"kind": "skew_forward_kl", "alpha": 0.1, "on": ["dataset"]},
            {"kind": "skew_reverse_kl", "alpha": 0.1, "on": ["student"]},
        ],
    },
    "four terms": {
        "temperature": 2.0,
        "terms": [
            {"kind": "skew_forward_kl", "alpha": 0.1, "on": ["dataset"]},
            {"kind": "skew_reverse_kl", "alpha": 0.1, "on": ["student"]},
            {"kind": "cross_entropy", "on": ["dataset"], "weight": 0.3},
            {"kind": "forward_kl", "weight": 0.5, "token_weight": {"teacher_entropy": {"threshold": 5.45}}},
        ],
    },
    "entropy aware": {
        "terms": [
            {"kind": "reverse_kl"},
            {"kind": "forward_kl", "token_weight": {"teacher_entropy": {"threshold": 5.3}}},
        ]
    },
    "adaptive": {
        "terms": [
            {"kind": "forward_kl", "token_weight": {"adaptive": {}}},
            {"kind": "reverse_kl", "token_weight": {"adaptive": {}}},
        ]
    },
    "weighed by rows": {
        "terms": [
            {"kind": "forward_kl", "token_weight": {"student_entropy": {"proportional": True}}},
            {"kind": "jsd", "beta": 0.3, "token_weight": {"divergence": {"proportional": True, "d_max": 0.1}}},
            {"kind": "alpha", "alpha": 0.4, "token_weight": {"divergence": {"threshold": 0.3}}},
            {"kind": "tvd", "token_weight": {"uncertain_or_wrong": {"d_max": 0.8}}},
        ]
    },
    "drift": {"reduction": "sequence_mean", "kind": "reverse_kl", "token_weight": {"drift": {"gamma": 0.5}}},
    "importance": {
        "terms": [
            {"kind": "jsd", "token_weight": {"importance": {"level": "token"}}},
            {"kind": "reverse_kl", "weight": 0.5, "token_weight": {"importance": {"level": "sequence", "cap": 1.5}}},
        ]
    },
    "labels": {
        "terms": [
            {"kind": "cross_entropy", "on": ["dataset"]},
            {"kind": "policy_gradient", "on": ["student"], "constant": -1.0},
        ]
    },
    "minillm": {
        "terms": [
            {"kind": "policy_gradient", "advantage": "teacher", "clip_range": 0.2, "on": ["student"], "weight": 0.7},
            {"kind": "cross_entropy", "on": ["dataset"], "weight": 0.5},
            {
                "kind": "policy_gradient",
                "name": "sampled",
                "advantage": "teacher",
                "single_step": "sampled",
                "length_normalize": False,
                "token_weight": {"importance": {"level": "token"}},
                "on": ["student"],
                "weight": 0.02,
            },
        ]
    },
    "drawn together": {
        "terms": [
            {"kind": "policy_gradient", "advantage": "teacher", "clip_range": 0.2, "on": ["mixed"]},
            {"kind": "forward_kl", "token_weight": {"importance": {"level": "token"}}, "on": ["mixed"], "weight": 0.5},
            {"kind": "reverse_kl", "on": ["student", "dataset"]},
        ]
    },
    "policy beside a divergence": {
        "reduction": "sequence_mean",
        "terms": [
            {"kind": "forward_kl"},
            {"kind": "policy_gradient", "on": ["student"], "constant": 0.4, "weight": 0.5},
        ],
    },
    "held to what it was": {
        "temperature": 2.0,
        "terms": [
            {"kind": "reference_kl", "weight": 0.4},
            {"kind": "forward_kl", "on": ["dataset", "mixed"]},
            {"kind": "jsd", "on": ["student"], "weight": 0.5},
            {"kind": "reference_kl", "name": "covering", "direction": "forward", "on": ["mixed", "dataset"]},
            {
                "kind": "reference_kl",
                "name": "unsure",
                "weight": 0.2,
                "token_weight": {"teacher_entropy": {"threshold": 5.4}},
            },
        ],
    },
    "held alone": {"reduction": "sequence_mean", "terms": [{"kind": "reference_kl"}]},
    "states beside a divergence": {
        "terms": [
            {"kind": "reverse_kl", "on": ["student"]},
            {"kind": "hidden_states", "weight": 0.5, "on": ["dataset"]},
            {"kind": "hidden_states", "name": "every", "layers": "uniform", "distance": "cosine", "tokens": "all"},
            {"kind": "relations", "relation_heads": 2, "outputs": ["hidden", "key"], "tokens": "scored"},
        ]
    },
    "conversations": {
        "terms": [
            {"kind": "forward_kl", "token_weight": {"importance": {"level": "sequence"}}},
            {"kind": "jsd", "weight": 0.5, "token_weight": {"drift": {"gamma": 0.5}}},
            {"kind": "policy_gradient", "advantage": "teacher", "clip_range": 0.2, "on": ["student"], "weight": 0.7},
            {"kind": "hidden_states", "layers": "uniform", "tokens": "all"},
            {"kind": "hidden_states", "name": "scored", "tokens": "scored"},
            {"kind": "rkd", "weight": 0.3},
        ]
    },
    "conversations, judged": {
        "terms": [
            {"kind": "policy_gradient", "advantage": "reward", "clip_range": 0.2, "on": ["student"]},
            {
                "kind": "policy_gradient",
                "name": "plain",
                "advantage": "reward",
                "normalize_std": False,
                "token_weight": {"importance": {"level": "token"}},
                "on": ["student"],
                "weight": 0.5,
            },
            {"kind": "forward_kl", "reward_below": 1.0},
            {"kind": "jsd", "reward_from": 0.5, "reward_below": 2.0, "weight": 0.3},
            {"kind": "hidden_states", "reward_from": 1.0},
            {"kind": "rkd", "reward_from": 0.25, "weight": 0.3},
        ]
    },
    "judged, by sequence": {
        "reduction": "sequence_mean",
        "terms": [
            {"kind": "reverse_kl", "on": ["student"], "reward_below": 0.5},
            {"kind": "policy_gradient", "advantage": "reward", "on": ["student"], "reward_from": 0.5},
        ],
    },
    "conversations by sequence": {
        "reduction": "sequence_mean",
        "terms": [{"kind": "reverse_kl"}, {"kind": "cross_entropy", "weight": 0.1}],
    },
    "sequences and their states": {
        "reduction": "sequence_mean",
        "terms": [
            {"kind": "rkd", "weight": 0.3},
            {"kind": "rkd", "name": "sampled", "distance": 0.5, "angle": 0.0, "on": ["student"]},
            {"kind": "hidden_states", "layers": [[0, 0], [1, 3]], "tokens": "all", "on": ["student"]},
            {"kind": "forward_kl", "on": ["student"]},
        ],
    },
}

# Of a teacher that is wider than the student, and without a term over the vocabulary: projectors are trained beside it.
OF_A_WIDE_TEACHER: dict[str, dict[str, Any]] = {
    "projected states": {
        "terms": [
            {"kind": "hidden_states", "layers": "uniform", "distance": "normalized_mse", "weight": 0.7},
            {"kind": "hidden_states", "name": "off", "weight": 0.0},
            {"kind": "relations", "relation_heads": 4, "layers": [[1, 2], [2, 4]], "on": ["student"]},
            {"kind": "rkd", "distance": 0.2, "angle": 3.0},
        ]
    }
}

Model = Callable[[Tensor], Tensor]


def reference(
    student: Path, teacher: Path, objective: dict[str, Any], name: str = ""
) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    """Loss, gradients by parameter, and each term's mean value, one sequence at a time."""
    s = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64).train()
    t = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64).eval()
    before = shaken(AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)).double()
    rollouts = [r for r in with_sampler_logprobs(rollouts_for(name), s) if r.completion_ids]
    terms = objective.get("terms") or [{k: v for k, v in objective.items() if k not in ("reduction", "temperature")}]
    by_sequence = objective.get("reduction") == "sequence_mean"
    denominator = len(rollouts) if by_sequence else sum(len(own_places(r)) for r in rollouts)
    heat = objective.get("temperature", 1.0)
    projectors = fresh_projectors(objective, s.config, t.config)
    kept = {model: keep_projections(model) for model in (s, t)}
    total = torch.zeros((), dtype=torch.float64)
    values: dict[str, list[Tensor]] = {}
    vectors: dict[str, list[list[Tensor]]] = {}
    for rollout in rollouts:
        ids, prompt = torch.tensor([rollout.token_ids]), len(rollout.draw.prompt.token_ids)
        span = torch.tensor([prompt - 1 + place for place in own_places(rollout)])
        every = torch.tensor([*range(prompt), *(prompt + place for place in own_places(rollout))])
        own = s(ids, output_hidden_states=True)
        with torch.no_grad():
            other = t(ids, output_hidden_states=True)
        logits, teacher_logits = own.logits[0, span], other.logits[0, span]
        row_weight = rollout.draw.prompt.weight / (len(span) if by_sequence else 1)
        for term in terms:
            name = term.get("name", term["kind"])
            if (
                rollout.source not in term.get("on", DEFAULT_ON.get(term["kind"], [rollout.source]))
                or term.get("weight", 1.0) == 0
                or not earned_enough(term, rollout)
            ):
                continue
            if term["kind"] == "rkd":
                vectors.setdefault(name, []).append([side.hidden_states[-1][0, span].mean(0) for side in (own, other)])
                continue
            if term["kind"] in ("hidden_states", "relations"):
                places = span if term.get("tokens", DEFAULT_TOKENS[term["kind"]]) == "scored" else every
                value = (
                    states_value(
                        term,
                        [states[0, places] for states in own.hidden_states],
                        [states[0, places] for states in other.hidden_states],
                        projectors.get(name, []),
                    )
                    if term["kind"] == "hidden_states"
                    else relations_value(term, outputs_of(own, kept[s]), outputs_of(other, kept[t]))[places]
                )
                weight: Tensor | float = len(span) / len(value)
            else:
                value = (
                    reference_value(term, logits, before(ids).logits[0, span].detach())
                    if term["kind"] == "reference_kl"
                    else term_value(term, logits, teacher_logits, rollout, heat)
                )
                weight = token_weight(term, logits.detach(), teacher_logits, rollout, heat)
            values.setdefault(name, []).append(value.detach())
            total = total + term.get("weight", 1.0) * row_weight * (weight * value).sum() / denominator
    for term in terms:
        if term["kind"] == "rkd":
            name = term.get("name", "rkd")
            batch_value = rkd_value(term, *zip(*vectors[name], strict=True))
            values[name] = [batch_value.detach()[None]]
            total = total + term.get("weight", 1.0) * batch_value
    total.backward()
    every_projector = [p for own in projectors.values() for p in own]
    trained = [*s.named_parameters(), *((f"projectors.{i}.weight", p) for i, p in enumerate(every_projector))]
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained}
    return total.item(), gradients, {name: torch.cat(found).mean().item() for name, found in values.items()}


def fresh_projectors(objective: dict[str, Any], student: Any, teacher: Any) -> dict[str, list[Tensor]]:
    """By term. Where they begin is the engine's to say; nothing else here is."""
    found: dict[str, list[Tensor]] = {}
    terms = (
        ObjectiveConfig.model_validate(objective).state_pairs(
            model_shape(student, "student"), model_shape(teacher, "teacher")
        )
        if "terms" in objective
        else {}
    )
    places = iter(StateTerms(terms, seed=0).projectors.double())
    for name, pairs in terms.items():
        found[name] = [next(places).weight for pair in pairs if pair.is_projected]
    return found


DEFAULT_ON = {"reference_kl": ["student"]}
DEFAULT_TOKENS = {"hidden_states": "scored", "relations": "all"}
Outputs = dict[str, list[Tensor]]  # by "hidden", "q_proj" and so on: [T, width] of each layer


def keep_projections(model: Any) -> dict[str, dict[int, Tensor]]:
    """Filled by each forward."""
    kept: dict[str, dict[int, Tensor]] = {name: {} for name in ("q_proj", "k_proj", "v_proj")}
    for index, layer in enumerate(model.model.layers):
        for name, found in kept.items():
            module = getattr(layer.self_attn, name)
            module.register_forward_hook(lambda _, __, out, found=found, index=index: found.update({index: out[0]}))
    return kept


def outputs_of(forward: Any, kept: dict[str, dict[int, Tensor]]) -> Outputs:
    own = {name: [found[0], *(found[i] for i in sorted(found))] for name, found in kept.items()}  # from 1 on
    return {"hidden": [states[0] for states in forward.hidden_states], **own}


def relations_value(term: dict[str, Any], student: Outputs, teacher: Outputs) -> Tensor:
    """[T], position by position."""
    first, last = len(student["hidden"]) - 1, len(teacher["hidden"]) - 1
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "hidden": "hidden"}
    found = []
    for name in (names[output] for output in term.get("outputs", ["query", "key", "value"])):
        for i, j in term.get("layers", [(first, last)]):
            sides = (student[name][i], teacher[name][j])
            for a, b in zip(*(x.chunk(term["relation_heads"], dim=1) for x in sides), strict=True):
                rows = []
                for t in range(len(a)):
                    q, p = ((x[: t + 1] @ x[t] / x.shape[1] ** 0.5).softmax(0) for x in (a, b))
                    rows.append((p * (p.log() - q.log())).sum())
                found.append(torch.stack(rows))
    return torch.stack(found).mean(0)


def rkd_value(term: dict[str, Any], student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Pair by pair, and triple by triple."""

    def huber(x: Tensor, y: Tensor) -> Tensor:
        gap = (x - y).abs()
        return 0.5 * gap**2 if gap <= 1 else gap - 0.5

    def distances(side: Sequence[Tensor]) -> list[Tensor]:
        found = [(a - b).norm() for a, b in itertools.combinations(side, 2)]
        return [length / torch.stack(found).mean() for length in found]

    def angles(side: Sequence[Tensor]) -> list[Tensor]:
        return [
            torch.nn.functional.cosine_similarity(side[i] - side[j], side[k] - side[j], dim=0)
            for i, j, k in itertools.permutations(range(len(side)), 3)
        ]

    weighed = ((distances, term.get("distance", 1.0)), (angles, term.get("angle", 2.0)))
    return torch.stack(
        [
            weight * torch.stack([huber(a, b) for a, b in zip(of(student), of(teacher), strict=True)]).mean()
            for of, weight in weighed
        ]
    ).sum()


def states_value(
    term: dict[str, Any], student: list[Tensor], teacher: list[Tensor], projectors: list[Tensor]
) -> Tensor:
    """[n], from states [n, H] of each layer."""
    first, last = len(student) - 1, len(teacher) - 1
    layers = term.get("layers", "last")
    pairs = {"last": [(first, last)], "uniform": [(i, i * last // first) for i in range(1, first + 1)]}
    found = []
    for index, (i, j) in enumerate(layers if isinstance(layers, list) else pairs[layers]):
        a, b = student[i] @ projectors[index].T if projectors else student[i], teacher[j]
        found.append({
            "mse": lambda a, b: ((a - b) ** 2).sum(-1) / b.shape[-1],
            "cosine": lambda a, b: 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1),
            "normalized_mse": lambda a, b: ((a - b) ** 2).sum(-1) / (b**2).sum(-1),
        }[term.get("distance", "mse")](a, b))  # fmt: skip
    return torch.stack(found).mean(0)


def reference_value(term: dict[str, Any], student: Tensor, before: Tensor) -> Tensor:
    """[n], from logits [n, V], whatever the objective's temperature."""
    q, r = student.softmax(-1), before.softmax(-1)
    return kl(r, q) if term.get("direction") == "forward" else kl(q, r)


def own_ids(rollout: Rollout) -> Tensor:
    return torch.tensor(rollout.completion_ids)[own_places(rollout)]


def term_value(term: dict[str, Any], student: Tensor, teacher: Tensor, rollout: Rollout, heat: float) -> Tensor:
    """[n], from logits [n, V]."""
    kind = term["kind"]
    own = student.log_softmax(-1).gather(-1, own_ids(rollout)[:, None])[:, 0]
    if kind == "cross_entropy":
        return -own
    if kind == "policy_gradient" and term.get("advantage") == "reward":
        return grpo(term, own, rollout)
    if kind == "policy_gradient" and "advantage" in term:
        return minillm(term, student, teacher, rollout)
    if kind == "policy_gradient":
        return -term["constant"] * own
    q, p = (student / heat).softmax(-1), (teacher / heat).softmax(-1)
    beta, alpha = term.get("beta", 0.5), term.get("alpha", 0.1)
    if kind == "jsd":
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    if kind == "alpha":
        return ((p**alpha * q ** (1 - alpha)).sum(-1) - 1) / (alpha * (alpha - 1))
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "skew_forward_kl": lambda: kl(p, alpha * p + (1 - alpha) * q),
        "skew_reverse_kl": lambda: kl(q, (1 - alpha) * p + alpha * q),
        "tvd": lambda: 0.5 * (p - q).abs().sum(-1),
    }[kind]()


def earned_enough(term: dict[str, Any], rollout: Rollout) -> bool:
    if "reward_from" not in term and "reward_below" not in term:
        return True
    start, below = term.get("reward_from", -math.inf), term.get("reward_below", math.inf)
    return rollout.reward is not None and start <= rollout.reward < below


def grpo(term: dict[str, Any], own: Tensor, rollout: Rollout) -> Tensor:
    """[n]: -A log Q of each token, with the gradient of PPO's ratio; prompts are the completions' numbers modulo 3."""
    group = [reward for index, reward in REWARDS.items() if index % 3 == rollout.draw.prompt.index]
    if rollout.reward is None:
        return own * 0.0
    advantage = rollout.reward - sum(group) / len(group)
    if term.get("normalize_std", True):
        advantage /= torch.tensor(group, dtype=torch.float64).std().item() + 1e-6
    if "clip_range" not in term:
        return -advantage * own
    assert rollout.logprobs is not None
    leaf = own.detach().requires_grad_()
    ratio = (leaf - torch.tensor(rollout.logprobs, dtype=torch.float64)).exp()
    low, high = 1 - term["clip_range"], 1 + term["clip_range"]
    surrogate = -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    return torch.autograd.grad(surrogate.sum(), leaf)[0] * own


def minillm(term: dict[str, Any], student: Tensor, teacher: Tensor, rollout: Rollout) -> Tensor:
    """[n]: the reverse KL and -R log Q of each token as published, one by one; with the gradient of PPO's ratio."""
    labels = own_ids(rollout)[:, None]
    own = student.log_softmax(-1).gather(-1, labels)[:, 0]
    reward = (teacher.log_softmax(-1).gather(-1, labels)[:, 0] - own).detach()
    values = []
    for place in range(len(own)):
        is_exact = term.get("single_step", "exact") == "exact"
        later = reward[place + is_exact :]
        gain = later.sum()
        if term.get("length_normalize", True):
            gain = gain / max(1, len(later))
        value = -gain * own[place]
        if "clip_range" in term:
            low, high = 1 - term["clip_range"], 1 + term["clip_range"]
            assert rollout.logprobs is not None
            leaf = own[place].detach().requires_grad_()
            old = rollout.logprobs[place]
            ratio = (leaf - (leaf.detach() if math.isnan(old) else old)).exp()
            clipped = -torch.minimum(ratio * gain, ratio.clamp(low, high) * gain)
            value = torch.autograd.grad(clipped, leaf)[0] * own[place]
        if is_exact:
            value = value + kl(student[place].softmax(-1), teacher[place].softmax(-1))
        values.append(value)
    return torch.stack(values)


def kl(first: Tensor, second: Tensor) -> Tensor:
    return (first * (first.log() - second.log())).sum(-1)


def entropy(probabilities: Tensor) -> Tensor:
    return -(probabilities * probabilities.log()).sum(-1)


def token_weight(term: dict[str, Any], student: Tensor, teacher: Tensor, rollout: Rollout, heat: float) -> Tensor:
    """[n], the product of the term's token weights."""
    q, p = (student / heat).softmax(-1), (teacher / heat).softmax(-1)
    own = (logits.log_softmax(-1).gather(-1, own_ids(rollout)[:, None])[:, 0]
           for logits in (student, teacher))  # fmt: skip
    student_own, teacher_own = own
    by_divergence = {"divergence", "uncertain_or_wrong"} & term.get("token_weight", {}).keys()
    divergence = term_value(term, student, teacher, rollout, heat) if by_divergence else torch.zeros(())
    weight = torch.ones(len(student), dtype=torch.float64)
    if term.get("advantage") == "teacher":
        share = rollout.teacher_share
        weight = student_own.exp() / (share * teacher_own.exp() + (1 - share) * student_own.exp())
    for name, options in term.get("token_weight", {}).items():
        if name in ("teacher_entropy", "student_entropy"):
            uncertainty = entropy(p if name == "teacher_entropy" else q)
            weight = weight * (
                above(uncertainty, options["threshold"])
                if "threshold" in options
                else uncertainty / math.log(student.shape[-1])
            )
        elif name == "divergence":
            share = (divergence / options.get("d_max", 1.0)).clamp(max=1.0)
            weight = weight * (above(divergence, options["threshold"]) if "threshold" in options else share)
        elif name == "uncertain_or_wrong":
            h, d = entropy(q) / math.log(student.shape[-1]), (divergence / options["d_max"]).clamp(max=1.0)
            weight = weight * (h + d - h * d)
        elif name == "drift":
            gap = (teacher_own - student_own).abs()
            before = torch.tensor([gap[:place].sum() for place in range(len(gap))], dtype=torch.float64)
            weight = weight * (1 + options["gamma"] * (1 - before / gap.sum()))
        elif name == "importance" and rollout.logprobs is not None:
            ratio = (student_own - torch.tensor(rollout.logprobs, dtype=torch.float64)).nan_to_num(0.0)
            if options["level"] == "sequence":
                ratio = ratio.sum().expand_as(ratio)
            weight = weight * ratio.exp().clamp(max=options.get("cap", 2.0))
        elif name == "adaptive":
            weight = weight * adaptive(p, q, term["kind"])
    return weight


def above(measure: Tensor, threshold: float) -> Tensor:
    """Which tokens count must not hang on rounding, and both must occur for the test to mean anything."""
    assert (measure - threshold).abs().min() > 1e-5
    return (measure >= threshold).double()


def adaptive(p: Tensor, q: Tensor, kind: str) -> Tensor:
    """Row by row: the head is the fewest of the teacher's most likely tokens with half of its mass."""
    shares = []
    for teacher, student in zip(p, q, strict=True):
        head, mass = [], 0.0
        for token in teacher.argsort(descending=True).tolist():
            if mass >= 0.5:
                break
            head.append(token)
            mass += teacher[token].item()
        gap = (teacher - student).abs()
        shares.append(gap[head].sum() / gap.sum())
    forward = torch.stack(shares)
    return forward if kind == "forward_kl" else 1 - forward
