"""Trains variants of the embedded model from one base and compares them."""
