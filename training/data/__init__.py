"""Builds and reads training data: scenes, questions, traces, clips and data sets."""
