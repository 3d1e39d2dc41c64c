"""What a HyPeR model means: its sounds, its traces, its pauses, its checkpoints. Knows no HTTP."""
