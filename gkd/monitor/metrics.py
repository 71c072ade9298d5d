"""The names of all metrics, defined here and nowhere else: what is not listed cannot be logged.

`docs/metrics.md` shows this table; a test keeps the two equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

MetricValue = float | int | str

METRICS: dict[str, str] = {  # name -> "unit: meaning"
    "step": "count: index of the step, from 0; the terminal shows the number of steps done, one more",
    "loss": "nats: what the optimizer minimises, over the global batch",
    "objective/*/loss": "the term's own: value of the term of that name, unweighed; mean over the tokens it is for",
    "objective/*/weight": "factor: weight of the term of that name, as its schedule has it at the step",
    "objective/stage": "count: stages that `objective.weights: {rule: adaptive}` has ended before the step",
    "objective/transfer_efficiency": "nats per million tokens: fall of the held-out divergence a million scored "
    "tokens, over the last window of evaluations; with that rule only",
    "objective/temperature": "factor: divides both sides' logits in the step's divergences",
    "task/*/loss": "nats: terms x weights, as in `loss`, of the rows whose `task` has that name; mean over their "
    "tokens, without weights of rows and tokens",
    "task/*/tokens": "tokens: scored in these rows in the step, over all ranks",
    "divergence/forward_kl": "nats: KL(teacher || student), mean over the step's tokens that a term compares with it",
    "divergence/reverse_kl": "nats: KL(student || teacher), mean over the same tokens",
    "divergence/topk_forward_kl": "nats: KL(teacher || student) of K + 1 outcomes, the tokens of a teacher's top k and "
    "all others as one: at most the KL over the vocabulary; mean over the step's tokens that such a teacher scored",
    "divergence/topk_reverse_kl": "nats: KL(student || teacher) of the same outcomes, mean over the same tokens",
    "divergence/aligned_forward_kl": "nats: KL(teacher || student) of what the vocabularies of a teacher with another "
    "tokenizer and of the student have in common; mean over the step's tokens that such a teacher has a span for",
    "divergence/aligned_reverse_kl": "nats: KL(student || teacher) of the same outcomes, mean over the same tokens",
    "divergence/first_token_*": "nats: one of these, of the first token of each completion alone; far above the mean "
    "where what student and teacher read ends differently",
    "entropy/student": "nats: entropy of the student's next-token distribution, mean over scored tokens",
    "entropy/teacher": "nats: entropy of the teacher's next-token distribution, mean over scored tokens",
    "agreement/top1": "fraction: scored tokens where student and teacher have the same most likely token",
    "agreement/aligned_top1": "fraction: tokens with a span of a teacher with another tokenizer where both sides have "
    "the same likeliest outcome",
    "tokens/scored": "tokens: scored in the step, over all ranks",
    "tokens/generated": "tokens: sampled from the student in the step, over all ranks",
    "tokens/scored_per_s": "tokens/s: `tokens/scored` by `time/step_s`, the speed of the whole run",
    "tokens/generated_per_s": "tokens/s: `tokens/generated` by `time/sample_s`, the speed of the sampler",
    "time/sample_s": "s: sampling and fetching completions",
    "time/score_s": "s: the teacher's forward passes",
    "time/forward_backward_s": "s: forward, divergence and backward of the student",
    "time/optimizer_s": "s: gradient clipping and the optimizer",
    "time/train_s": "s: `time/forward_backward_s` + `time/optimizer_s`",
    "time/sync_s": "s: the student's weights into the sampler, and their proof",
    "time/other_s": "s: the rest of `time/step_s`: data, logging, and a checkpoint or an evaluation in between",
    "time/step_s": "s: wall time since the end of the last step",
    "mixture/*": "fraction: the step's samples whose completion is from the source of that name",
    "sync/max_logprob_error": "nats: largest difference of a log-probability, trainer against sampler, on the probe",
    "sync/mean_logprob_error": "nats: mean absolute difference of the log-probabilities on the probe",
    "mismatch/k3": "nats: KL(sampler || trainer), the mean of r - 1 - log r with r = p_trainer / p_sampler of a token",
    "mismatch/max_abs_log_ratio": "nats: largest |log r| of a token that was sampled from the student in the step",
    "mismatch/effective_sample_share": "fraction: (sum r)^2 / (N sum r^2), what weights r would leave of the tokens",
    "leakage/ngram_share": "fraction: runs of 5 tokens in texts that the student sampled in the step which stand in "
    "what only its teacher reads; where teachers have a view of their own",
    "leakage/sample_share": "fraction: such texts that hold any such run",
    "samples/mean_tokens": "tokens: length of the texts that were sampled from the student in the step, on average",
    "samples/truncated_share": "fraction: of these texts, those that were cut off before an end token",
    "samples/repeated_share": "fraction: of a text's 4-grams, those that stood in it before; mean over these texts",
    "environment/turns": "turns: of a conversation, mean over those of the step; with `environment` only, as the next",
    "environment/observed_tokens": "tokens: of an environment in a conversation, read and not trained; mean",
    "environment/done_share": "fraction: conversations that their environment ended",
    "environment/timeout_share": "fraction: conversations that ended because an observation took too long",
    "reward/mean": "reward: sum over its turns of a conversation's, mean over those of the step that were judged",
    "reward/flat_share": "fraction: prompts of the step whose samples all earned the same, of those with several; "
    "they have no advantage over one another",
    "grad_norm": "norm: of the whole gradient, before clipping",
    "lr": "rate: learning rate of the step",
    "weights_version": "count: optimizer steps behind the weights that the step's completions were sampled from",
    "rollout/staleness": "count: optimizer steps behind the newest weights that the student's samples of the step "
    "were, on average; with `rollout.staleness` only",
    "rollout/teacher_share": "fraction: tokens that the teacher drew, of the texts that student and teacher drew "
    "together in the step; with `mixture.mixed` or `mixture.speculative` only",
    "heldout/forward_kl": "nats: KL(teacher || student), mean over the held-out prompts' scored tokens",
    "heldout/reverse_kl": "nats: KL(student || teacher), mean over the held-out prompts' scored tokens",
    "heldout/jsd": "nats: Jensen-Shannon divergence at beta 0.5, mean over the held-out prompts' scored tokens",
    "heldout/topk_forward_kl": "nats: as `divergence/topk_forward_kl`, mean over the held-out prompts' scored tokens",
    "heldout/topk_reverse_kl": "nats: as `divergence/topk_reverse_kl`, mean over the held-out prompts' scored tokens",
    "heldout/topk_jsd": "nats: Jensen-Shannon divergence at beta 0.5 of the same outcomes, mean over the same tokens",
    "heldout/aligned_forward_kl": "nats: as `divergence/aligned_forward_kl`, mean over the held-out prompts' scored "
    "tokens with a span",
    "heldout/aligned_reverse_kl": "nats: as `divergence/aligned_reverse_kl`, mean over the same tokens",
    "heldout/aligned_jsd": "nats: Jensen-Shannon divergence at beta 0.5 of the same outcomes, mean over the same "
    "tokens",
}


def description_of(name: str) -> str | None:
    """ "unit: meaning" of a metric, or None for one that is not listed. A "*" of the list stands for one name."""
    if name in METRICS:
        return METRICS[name]
    return next((METRICS[pattern] for pattern in METRICS if "*" in pattern and _matches(name, pattern)), None)


def in_order(names: Iterable[str]) -> list[str]:
    """Names of metrics in the order of the list, unknown ones last."""
    order = {pattern: place for place, pattern in enumerate(METRICS)}

    def place(name: str) -> int:
        if name in order:
            return order[name]
        return next((order[pattern] for pattern in order if "*" in pattern and _matches(name, pattern)), len(order))

    return sorted(names, key=lambda name: (place(name), name))


def _matches(name: str, pattern: str) -> bool:
    before, after = pattern.split("*")
    middle = name[len(before) : len(name) - len(after)]
    return name.startswith(before) and name.endswith(after) and bool(middle) and "/" not in middle


def merge_metrics(*groups: Mapping[str, MetricValue]) -> dict[str, MetricValue]:
    """One mapping of all groups, in order.

    Raises ValueError for a name that is not in METRICS, for a value that is not a plain number or string (a tensor
    would make the device wait at a place nobody sees), and for a name that comes twice with different values.
    """
    merged: dict[str, MetricValue] = {}
    for group in groups:
        for name, value in group.items():
            if description_of(name) is None:
                raise ValueError(f"metric {name!r} is not described in gkd/monitor/metrics.py: add it there")
            if isinstance(value, bool) or not isinstance(value, (float, int, str)):
                raise ValueError(f"metric {name!r} is a {type(value).__name__}: give a plain float, int or str")
            if name in merged and not _same(merged[name], value):
                raise ValueError(f"metric {name!r} is logged twice in one step: {merged[name]!r} and {value!r}")
            merged[name] = value
    return merged


def metrics_table() -> str:
    """METRICS as a Markdown table, the one in docs/metrics.md."""
    rows = ["| name | unit | meaning |", "|---|---|---|"]
    for name, description in METRICS.items():
        unit, meaning = description.split(": ", 1)
        rows.append(f"| `{name}` | {unit} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(rows) + "\n"


def _same(first: MetricValue, second: MetricValue) -> bool:
    if isinstance(first, float) and isinstance(second, float) and math.isnan(first) and math.isnan(second):
        return True
    return first == second
