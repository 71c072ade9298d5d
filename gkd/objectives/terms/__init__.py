"""What an objective is a sum of: one term a file, and the table of their kinds.

A new one is a subclass of `Term` and an entry of TERMS, here or in a plugin (`TERMS.register("my_term", MyTerm)`).
Every divergence of `gkd.objectives.closed_forms` is a term by its name.
"""

from gkd.objectives.terms.base import Term
from gkd.objectives.terms.divergence import DivergenceTerm
from gkd.registry import Registry

_DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd", "alpha")

TERMS: Registry[type[Term]] = Registry(
    "kind",
    {
        **dict.fromkeys(_DIVERGENCES, "gkd.objectives.terms.divergence:DivergenceTerm"),
        "cross_entropy": "gkd.objectives.terms.cross_entropy:CrossEntropy",
        "hidden_states": "gkd.objectives.terms.hidden_states:HiddenStates",
        "relations": "gkd.objectives.terms.relations:Relations",
        "rkd": "gkd.objectives.terms.rkd:RelationalDistillation",
        "reference_kl": "gkd.objectives.terms.reference_kl:ReferenceKl",
        "policy_gradient": "gkd.objectives.terms.policy_gradient:PolicyGradient",
    },
)

__all__ = ["TERMS", "DivergenceTerm", "Term"]
