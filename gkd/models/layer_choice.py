"""Which layers of a model to keep, by what is measured on a few texts.

divergence       removes one layer after another, each time the one whose loss leaves the least forward KL between the
                 whole model and the rest (mean over the texts' tokens).
block_influence  keeps the layers with the largest 1 - cos(what a layer reads, what it writes), mean over the tokens, on
                 the whole model (ShortGPT, arXiv 2403.03853, equation 1).

Legend: R rows (variants of a text), T positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from gkd.errors import ModelError
from gkd.models.attention import use_short_attention
from gkd.models.heads import output_head
from gkd.models.layer_stack import LayerStack, Passage
from gkd.models.load import load_causal_lm
from gkd.ops import divergence
from gkd.ops.heads import Head

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
_ROUNDING = 1.001  # a row alone and a row among others are not added up in the same order


@dataclass(frozen=True)
class Removal:
    """A layer that goes. `figure`: nats a token once it is gone (divergence), or the layer's influence."""

    layer: int
    figure: float


@dataclass(frozen=True)
class LayerChoice:
    """`removed` in the order of removal; `forward_kl` of the whole model to what is kept, in nats a token."""

    layers: tuple[int, ...]
    removed: tuple[Removal, ...]
    forward_kl: float

    def as_record(self) -> dict[str, Any]:
        """Plain values for JSON; `from_record` reads them."""
        return {**asdict(self), "layers": list(self.layers), "removed": [asdict(one) for one in self.removed]}

    def on_the_way(self) -> Iterator[LayerChoice]:
        """Of a greedy search: what it would have ended with at each larger number of layers."""
        for count in range(1, len(self.removed)):
            back = (one.layer for one in self.removed[count:])
            layers, removed = tuple(sorted((*self.layers, *back))), self.removed[:count]
            yield LayerChoice(layers, removed, removed[-1].figure)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> LayerChoice:
        """Raises KeyError, TypeError or ValueError for anything else than such a record."""
        removed = tuple(Removal(int(one["layer"]), float(one["figure"])) for one in record["removed"])
        return cls(tuple(map(int, record["layers"])), removed, float(record["forward_kl"]))


def choose_by_measure(
    folder: Path, rule: str, count: int, texts: Sequence[tuple[int, ...]], *, dtype: str, device: torch.device, key: str
) -> LayerChoice:
    """The `count` layers of the model in `folder` that `rule` (see above) keeps, measured on `texts` (token ids).

    The model's weights are in `dtype`; what is between its layers, its logits and the KL in float32. `divergence` takes
    at most (layers^3 - count^3) / 6 forwards of one layer and (layers^2 - count^2) / 2 of the output head.
    Raises ModelError, starting with `key`, where the model's layers cannot be called one by one or overflow `dtype`.
    """
    model = load_causal_lm(str(folder), dtype, key=key)
    use_short_attention(model)
    chooser = LayerChooser(model.to(device), texts, key)  # pyright: ignore[reportArgumentType]  its stub lacks `to`
    logger.info("measuring the %d layers of %s for %s on %d tokens", chooser.layers, folder, rule, chooser.tokens)
    choice = CHOOSERS[rule](chooser, count)
    if not math.isfinite(choice.forward_kl):
        raise ModelError(f"{key}: states of the cut model are beyond {dtype}; set student.dtype to float32 or bfloat16")
    return choice


class LayerChooser:
    """Measures what layers of `model` are worth on `texts` (token ids), on the model's device."""

    def __init__(self, model: PreTrainedModel, texts: Sequence[tuple[int, ...]], key: str) -> None:
        """Raises ModelError, starting with `key`, if the model's layers cannot be called one by one."""
        self._stack, self._head = LayerStack(model, key), output_head(model)
        self._dtype = model.dtype
        self._passages = [self._stack.enter(ids) for ids in texts]
        self.layers, self.tokens = len(self._stack), sum(map(len, texts))

    def by_divergence(self, count: int) -> LayerChoice:
        """`count` layers, by greedy removal."""
        kept, removed, started = list(range(self.layers)), [], time.perf_counter()
        while len(kept) > count:
            place, cost = self.cheapest_removal(kept)
            removed.append(Removal(kept.pop(place), cost))
            spent_s = time.perf_counter() - started
            left_s = spent_s * _calls(len(kept), count) / _calls(self.layers, len(kept))
            logger.info(
                "without layer %d, %d of %d left: %.3f nats a token (%.0f s, about %.0f s to go)",
                removed[-1].layer, len(kept), self.layers, cost, spent_s, left_s,
            )  # fmt: skip
        return LayerChoice(tuple(kept), tuple(removed), removed[-1].figure)

    def by_block_influence(self, count: int) -> LayerChoice:
        """The `count` layers of largest influence, in their order."""
        influences = self.block_influences()
        ranked = sorted(range(len(influences)), key=influences.__getitem__)
        gone = ranked[: len(influences) - count]
        kept = tuple(sorted(ranked[len(gone) :]))
        removed = tuple(Removal(layer, influences[layer]) for layer in gone)
        return LayerChoice(kept, removed, self.forward_kl(kept))

    def cheapest_removal(self, kept: Sequence[int]) -> tuple[int, float]:
        """The place in `kept` of the layer whose removal leaves the least forward KL, and that in nats a token.

        After the first text the most promising layer is measured on all of them. As no token's KL is negative, a layer
        whose loss costs more on the texts so far is out, and is not followed any further.
        """
        places, sums = list(range(len(kept))), torch.zeros(len(kept), dtype=torch.float64)
        bound = math.inf
        for passage in self._passages:
            sums[places] += self._forward_kl_sums(self._without_each(kept, places, passage), passage)
            if bound == math.inf:
                best = int(sums.argmin())
                bound = self.forward_kl([*kept[:best], *kept[best + 1 :]]) * self.tokens * _ROUNDING
            places = [place for place in places if sums[place] <= bound]
        place = min(places, key=sums.__getitem__)
        return place, float(sums[place]) / self.tokens

    def forward_kl(self, kept: Sequence[int]) -> float:
        """KL(whole model ‖ model of the `kept` layers) in nats a token."""
        total = 0.0
        for passage in self._passages:
            states = passage.states[0]
            for layer in kept:
                states = self._stack.run(layer, states, passage)
            total += float(self._forward_kl_sums(self._stack.leave(states, passage), passage))
        return total / self.tokens

    def block_influences(self) -> list[float]:
        """Of each layer of the whole model 1 - cos(input, output), mean over tokens."""
        sums = torch.zeros(self.layers, dtype=torch.float64)
        for passage in self._passages:
            states = torch.cat(passage.states).double()  # [layers + 1, T, H]
            cosines = torch.cosine_similarity(states[:-1], states[1:], dim=-1)
            sums += (1.0 - cosines).sum(1).cpu()
        return (sums / self.tokens).tolist()

    def _without_each(self, kept: Sequence[int], places: Sequence[int], passage: Passage) -> torch.Tensor:
        """Final states [len(places), T, H] of models of the layers `kept` without the one at the first place, without
        the one at the second, and so on; `places` rise.

        One walk over the layers, which all variants have in common up to the layer that they lack.
        """
        rows = passage.states[0]  # the variants that lack an earlier layer, and last the one that lacks none
        for place, layer in enumerate(kept):
            after = self._stack.run(layer, rows, passage)
            rows = torch.cat([after[:-1], rows[-1:], after[-1:]]) if place in places else after
        return self._stack.leave(rows[:-1], passage)

    def _forward_kl_sums(self, states: torch.Tensor, passage: Passage) -> torch.Tensor:
        """Of each row of `states` [R, T, H] the sum over the text's positions, in nats: [R] float64."""
        rows, positions, width = states.shape
        teacher = self._logits(passage.final_states[0])(slice(0, positions))
        logits = self._logits(states.reshape(rows * positions, width))
        sums = [
            divergence(logits(slice(start, start + positions)), teacher, "forward_kl")
            for start in range(0, rows * positions, positions)
        ]
        return torch.stack(sums).double().cpu().nan_to_num(nan=math.inf)

    def _logits(self, states: torch.Tensor) -> Callable[[slice], torch.Tensor]:
        """A function of rows of `states` [N, H] that gives their logits, in float32 or float64."""
        head = Head.of("student", states.to(self._dtype), self._head).detached()
        columns = head.weight.shape[0]
        wide = torch.float64 if states.dtype == torch.float64 else torch.float32
        product = head.product(columns, None, None, wide)

        def logits(rows: slice) -> torch.Tensor:
            out = torch.empty(rows.stop - rows.start, columns, dtype=wide, device=states.device)
            return head.logits(product, rows, out)

        return logits


# the values of student.init.choose that are measured
CHOOSERS: dict[str, Callable[[LayerChooser, int], LayerChoice]] = {
    "divergence": LayerChooser.by_divergence,
    "block_influence": LayerChooser.by_block_influence,
}


def _calls(layers: int, count: int) -> int:
    """Layer calls of a greedy removal from `layers` down to `count`, a row each, if every layer is followed."""
    return sum(left * (left + 1) // 2 for left in range(count + 1, layers + 1))
