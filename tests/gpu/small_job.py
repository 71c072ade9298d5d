"""Some of everything that the CUDA kernels do, for sanitizers and profilers: tests/gpu/small_job.py [--large]"""

from __future__ import annotations

import sys

import torch

import gkd
from gkd.objectives import KINDS


def small() -> None:
    """Odd sizes and offsets, every kind and dtype, on and off chip, with ignored rows and padded vocabularies."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for kind in KINDS:
            for vocabulary, offset in ((1, 0), (1003, 0), (4096, 1), (32003, 0)):
                wide = torch.randn(3, vocabulary + offset + 5, device="cuda", dtype=dtype)
                student = wide[:, offset:].requires_grad_()
                teacher = torch.randn(3, vocabulary + 5, device="cuda", dtype=dtype)
                weights = torch.tensor([1.0, 0.0, 2.0], device="cuda")
                loss = gkd.divergence(
                    student,
                    teacher,
                    kind,
                    weights=weights,
                    student_valid_vocab=vocabulary,
                    teacher_valid_vocab=vocabulary,
                )
                loss.backward()
                gkd.divergence(student, teacher, kind, reduction="none").sum().backward()
            ids = torch.randint(-1, 1000, (3, 9), device="cuda")
            logits = torch.randn(3, 1003, device="cuda", dtype=dtype).requires_grad_()
            gkd.topk_divergence(logits, ids, torch.rand(3, 9, device="cuda").log() - 4, kind).backward()
    hidden, head = torch.randn(70, 64, device="cuda").bfloat16(), torch.randn(5003, 64, device="cuda").bfloat16()
    sides = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    labels = torch.randint(5003, (70,), device="cuda")
    options = {"labels": labels, "hard_label_weight": 0.3, "temperature": 2.0, "chunk_bytes": 16 * 5003 * 4}
    gkd.linear_divergence(*sides, hidden, head, "jsd", byproducts=True, **options)[0].backward()
    torch.cuda.synchronize()


def large() -> None:
    """One call of a realistic size for each of the two that a bar is set for."""
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        student = torch.randn(4096, 128256, device="cuda", dtype=torch.bfloat16).requires_grad_()
        teacher = torch.randn(4096, 128256, device="cuda", dtype=torch.bfloat16)
        gkd.divergence(student, teacher, kind).backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    _ = large() if "--large" in sys.argv else small()
