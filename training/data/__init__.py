"""Training data: scenes, questions, traces, clips and data sets."""
