"""Fetches or draws the raw material of training data: packages, voices, recordings, noise and text."""
