"""Whole steps and runs: where their time goes, how it grows, and how far the plan was off."""
