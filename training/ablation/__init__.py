"""Ablation: variants of the embedded model, trained from one base and compared."""
