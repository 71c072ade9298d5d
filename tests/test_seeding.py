"""Seeds are pure functions of what they are for."""

from __future__ import annotations

from gkd.seeding import derive_seed, derive_uniform


def test_seeds_are_the_same_on_every_machine() -> None:
    assert derive_seed(0, "sample", 1, 2, 3) == 8316396515516744703
    assert derive_seed(0, "sample", 1, 2, 3) == derive_seed(0, "sample", 1, 2, 3)


def test_seeds_fit_63_bits_and_differ_in_every_index() -> None:
    seeds = {derive_seed(s, "x", a, b) for s in range(8) for a in range(8) for b in range(8)}
    assert len(seeds) == 512
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "x", 1, 23) != derive_seed(0, "x", 12, 3)


def test_uniforms_are_uniform() -> None:
    draws = [derive_uniform(0, i) for i in range(20_000)]
    assert all(0.0 <= u < 1.0 for u in draws)
    for tenth in range(10):
        share = sum(tenth / 10 <= u < (tenth + 1) / 10 for u in draws) / len(draws)
        assert abs(share - 0.1) < 0.01  # 4.7 standard deviations
