"""Values on a command line, for argparse: each raises ValueError for what it does not take."""


def number(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def numbers(text: str) -> tuple[int, ...]:
    """Such numbers, separated by commas."""
    return tuple(number(part) for part in text.split(","))
