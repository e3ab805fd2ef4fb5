"""Values on a command line, for argparse: each raises ArgumentTypeError, which it prints, for what it does not take."""

from argparse import ArgumentTypeError


def number(text: str) -> int:
    """A whole number of at least 1."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def numbers(text: str) -> tuple[int, ...]:
    """Such numbers, separated by commas, each once."""
    return tuple(dict.fromkeys(number(part) for part in text.split(",")))
