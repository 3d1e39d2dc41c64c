"""The meaning of a HyPeR model: audio, traces, pauses and checkpoints, without HTTP."""
