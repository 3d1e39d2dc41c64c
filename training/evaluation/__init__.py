"""Evaluation: suites, runners, scoring, statistics, reports, calibration and the latent probe."""
