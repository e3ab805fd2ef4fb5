"""Shared by the whole suite: reproducible property tests, the fixture model."""

import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

# A loaded machine must not fail a property test; the same examples on every run.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("suite")

FIXTURES = Path(__file__).parent / "fixtures"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none on this machine"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """The same random tensors in every run, fixtures' too, whichever tests ran before in the same process."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def micro_llama() -> Path:
    """A trained 1.05 M parameter Llama in bfloat16."""
    return FIXTURES / "micro-llama-en"


@pytest.fixture(scope="session")
def persuasion() -> Path:
    """Held-out public-domain prose."""
    return FIXTURES / "persuasion.txt"


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Children can be interrupted: a shell that runs the suite in the background makes all of them ignore SIGINT, and
    what a process handles is not ignored by its children."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)
