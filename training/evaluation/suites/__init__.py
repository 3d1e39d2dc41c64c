"""Evaluation suites: one module each, or one for several of a kind, named in `SUITES`.

A new suite is one module and one line here; the choices of `hyper eval --suite` follow.
"""

from __future__ import annotations

from collections.abc import Mapping

from training.evaluation.suites import around_speech, data_file, human, long, open_questions, scenes, wordings
from training.evaluation.suites.item import Suite

SUITES: Mapping[str, Suite] = {
    **scenes.SUITES,
    **wordings.SUITES,
    "open": open_questions.SUITE,
    "human": human.SUITE,
    "long": long.SUITE,
    "around-speech": around_speech.SUITE,
    **data_file.SUITES,
}
"""Every suite by its name."""
