"""Data, training, evaluation and export of HyPeR checkpoints for perception-aware audio QA."""
