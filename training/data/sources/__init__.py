"""Raw material of training data, fetched or drawn: packages, voices, recordings, noise and text."""
