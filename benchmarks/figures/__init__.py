"""Figures of README and docs: made of results, and held against them."""
