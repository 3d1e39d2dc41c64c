"""Asks suites of questions, scores the replies and reports figures."""
