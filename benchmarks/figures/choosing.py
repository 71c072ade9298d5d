"""Draws what the divergences want: python -m benchmarks.figures.choosing [FOLDER]

Three pictures for docs/choosing.md, computed by `gkd.divergence` from small made-up distributions in a few seconds:
the best a student with one bump can do for a teacher with two, the gradient at a token the teacher wants, and where a
temperature moves the gradient. Nothing is random. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gkd
from benchmarks.figures.sections.style import OURS, PEER, TEXT, figure
from benchmarks.records import ROOT, say

PLOTS = ROOT / "docs" / "plots"
TEACHER, STUDENT = PEER, OURS
TOKENS = 60


@dataclass(frozen=True)
class Choice:
    """A divergence as a reader knows it, and as `gkd.divergence` takes it."""

    label: str
    kind: str
    beta: float = 0.5
    alpha: float = 0.1

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
        options = {"beta": self.beta, "alpha": self.alpha, "temperature": temperature}
        return gkd.divergence(student_logits, teacher_logits, self.kind, reduction="sum", **options)  # pyright: ignore


CHOICES = (
    Choice("forward KL", "forward_kl"),
    Choice("JSD, β = 0.1", "jsd", beta=0.1),
    Choice("JSD, β = 0.5", "jsd"),
    Choice("JSD, β = 0.9", "jsd", beta=0.9),
    Choice("skewed reverse KL, α = 0.1", "skew_reverse_kl"),
    Choice("reverse KL", "reverse_kl"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=PLOTS)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("modes", draw_modes), ("gradients", draw_gradients), ("temperatures", draw_temperatures)):
        path = folder / f"choosing_{name}.svg"
        draw(path)
        say(f"{path}")


# ---- what the pictures show


def two_bumps() -> Tensor:
    """Logits [TOKENS] of a teacher with a broad bump of 60 % and a narrow one of 40 %."""
    token = torch.arange(TOKENS, dtype=torch.float64)
    bumps = [share * normal(token, centre, width) for share, centre, width in ((0.6, 18.0, 5.0), (0.4, 44.0, 2.5))]
    return sum(bumps, torch.full_like(token, 1e-6)).log()


def normal(token: Tensor, centre: float, width: float) -> Tensor:
    """The bell curve's share of every token."""
    shape = torch.exp(-0.5 * ((token - centre) / width) ** 2)
    return shape / shape.sum()


def best_single_bump(choice: Choice, teacher_logits: Tensor) -> tuple[Tensor, float]:
    """The student probabilities [TOKENS] with one bump that the divergence likes best, and its value in nats."""
    starts = [fitted(choice, teacher_logits, centre, width) for centre in (10.0, 30.0, 50.0) for width in (2.0, 12.0)]
    logits, value = min(starts, key=lambda found: found[1])
    return logits.softmax(-1), value


def fitted(choice: Choice, teacher_logits: Tensor, centre: float, width: float) -> tuple[Tensor, float]:
    """A local minimum over centre and width, from a start."""
    place = torch.tensor([centre, width], dtype=torch.float64).requires_grad_()
    token = torch.arange(TOKENS, dtype=torch.float64)
    optimizer = torch.optim.LBFGS([place], max_iter=200, line_search_fn="strong_wolfe")

    def logits() -> Tensor:
        return -0.5 * ((token - place[0]) / place[1]) ** 2

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = choice(logits()[None], teacher_logits[None])
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    return logits().detach(), closure().item()


def gradient_at_wanted_token(choice: Choice, student_probability: Tensor, teacher_probability: float) -> Tensor:
    """-dD/dlogit of one of two tokens, at each student probability [n] of it: how hard the student is pushed up."""
    teacher = torch.tensor([teacher_probability, 1.0 - teacher_probability], dtype=torch.float64).log()
    student = torch.stack([student_probability, 1.0 - student_probability], dim=-1).log().requires_grad_()
    choice(student, teacher.expand_as(student)).backward()
    assert student.grad is not None
    return -student.grad[:, 0]


def gradient_beyond(choice: Choice, temperature: float, rank: int) -> float:
    """Share of the gradient's absolute sum that falls on tokens past `rank`: Zipf teacher, student half as sharp."""
    teacher = -1.5 * torch.arange(1, 5001, dtype=torch.float64).log()
    student = (0.5 * teacher).requires_grad_()
    choice(student[None], teacher[None], temperature).backward()
    assert student.grad is not None
    size = student.grad.abs()
    return (size[rank:].sum() / size.sum()).item()


# ---- the pictures


def draw_modes(path: Path) -> None:
    teacher_logits = two_bumps()
    teacher = teacher_logits.softmax(-1)
    with figure(path, rows=2, columns=3, size=(8.4, 3.8), share_x=True) as grid:
        for axes, choice in zip(grid, CHOICES, strict=True):
            student, value = best_single_bump(choice, teacher_logits)
            axes.fill_between(range(TOKENS), teacher, color=TEACHER, alpha=0.55, label="teacher")
            axes.plot(range(TOKENS), student, color=STUDENT, linewidth=2, label="best student with one bump")
            axes.set_title(f"{choice.label}: {value:.2f} nats", loc="left", fontsize=9)
            axes.set_yticks([])
        grid[0].legend(frameon=False, fontsize=7)
        for axes in grid[3:]:
            axes.set_xlabel("token")


def draw_gradients(path: Path) -> None:
    student = torch.logspace(-4, -0.01, 200, dtype=torch.float64)
    with figure(path, rows=1, columns=1, size=(6.4, 3.2)) as (axes,):
        for choice, colour in zip(CHOICES, shades(len(CHOICES)), strict=True):
            push = gradient_at_wanted_token(choice, student, teacher_probability=0.5)
            axes.plot(student, push, color=colour, label=choice.label, linewidth=1.8)
        axes.axhline(0.0, color=TEXT, linewidth=0.6)
        axes.set_xscale("log")
        axes.set_ylim(-0.55, 1.1)
        axes.set_xlabel("student's probability of a token to which the teacher gives 0.5")
        axes.set_ylabel("push on its logit")
        axes.legend(frameon=False, fontsize=7, ncols=2)


def draw_temperatures(path: Path) -> None:
    temperatures = [2.0 ** (step / 4) for step in range(-4, 11)]
    with figure(path, rows=1, columns=1, size=(6.4, 3.0)) as (axes,):
        for choice, colour in zip(CHOICES, shades(len(CHOICES)), strict=True):
            share = [100 * gradient_beyond(choice, temperature, rank=20) for temperature in temperatures]
            axes.plot(temperatures, share, color=colour, label=choice.label, linewidth=1.8)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("temperature of the loss")
        axes.set_ylabel("% of the gradient past the\nteacher's 20 likeliest of 5000 tokens", fontsize=8)
        axes.legend(frameon=False, fontsize=7)


def shades(count: int) -> list[Any]:
    """From the teacher's side of the family (forward KL) to the student's (reverse KL)."""
    colours = importlib.import_module("matplotlib").colormaps["plasma"]
    return [colours(0.25 + 0.6 * index / (count - 1)) for index in range(count)]


if __name__ == "__main__":
    main()
