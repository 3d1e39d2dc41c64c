"""Numbers in words, without hyphens, commas or "and": the form of spoken lines."""

from __future__ import annotations

from num2words import num2words


def spell_number(number: int) -> str:
    """Return a whole number below a million in words.

    Raises:
        ValueError: The number is negative or too large.
    """
    if not 0 <= number < 1_000_000:
        raise ValueError(f"numbers from 0 to 999,999 are spelled, got {number}")
    return _spoken(num2words(number))


def spell_ordinal(number: int) -> str:
    """Return "twenty third" for 23."""
    return _spoken(num2words(number, to="ordinal"))


def spell_year(year: int) -> str:
    """Return a year from 1100 to 2099 in its spoken form: "nineteen oh five", "two thousand four", "twenty twelve"."""
    return _spoken(num2words(year, to="year"))


def _spoken(text: str) -> str:
    return text.replace(" and ", " ").replace(",", "").replace("-", " ")
