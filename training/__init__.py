"""Builds perception-aware audio QA data, trains HyPeR checkpoints on it, evaluates and exports them."""
