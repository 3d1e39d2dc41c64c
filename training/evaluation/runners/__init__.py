"""Runners for the items of a suite: a local checkpoint, a server over HTTP, and the baseline cascade."""
