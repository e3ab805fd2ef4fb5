"""What a run has measured, on disk while it goes on, and the loop in which a failure costs one unit of work alone."""

import json
import os
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.kernel_timing.cells import Cell

SECONDS_BETWEEN_WRITES = 5


class Unit(NamedTuple):
    """Work that may fail without the rest: what it is called, and its cells, measured while they are asked for."""

    name: str
    cells: Iterator[Cell]


class Record:
    """Cells, units that failed, and names of units that the time did not allow. ``about``: what the file begins with;
    ``path``: None writes none."""

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self.path = path
        self.about = about
        self.cells: list[Cell] = []
        self.failures: list[dict[str, str]] = []
        self.left_out: list[str] = []
        self._written = time.monotonic()

    def add(self, cell: Cell) -> None:
        """Takes the cell; writes the file where that was not done for a while."""
        self.cells.append(cell)
        if time.monotonic() > self._written + SECONDS_BETWEEN_WRITES:
            self.write()

    def fail(self, name: str, error: Exception) -> None:
        """Prints the failure of a unit and keeps it."""
        print(f"{name}: FAILED: {reason(error)}")
        self.failures.append({"unit": name, "error": reason(error), "traceback": traceback.format_exc()})

    def write(self) -> None:
        """The file as it now is."""
        self._written = time.monotonic()
        if self.path:
            measured = {"failures": self.failures, "left_out": self.left_out, "cells": [asdict(c) for c in self.cells]}
            write_json(self.path, self.about | measured)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """In place of the whole file, which is never there in part."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(unfinished, path)


def reason(error: Exception) -> str:
    """One line of it."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else repr(error)


def usable(device: torch.device) -> bool:
    """Whether the device still answers. After an access out of bounds it never does again in this process; an error
    of cuBLAS or of a capture, whose text says "CUDA error" as well, leaves it as it was."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return False
    return True


def run(units: Iterable[Unit], record: Record, device: torch.device, deadline: float) -> None:
    """Measures the units in turn, none begun after ``deadline`` on the monotonic clock. A unit that raises costs its
    remaining cells; the run ends early only where the device is lost with it."""
    for unit in units:
        if time.monotonic() > deadline:
            record.left_out.append(unit.name)
            continue
        try:
            for cell in unit.cells:
                record.add(cell)
        except Exception as error:  # whatever it is, it is this unit's result
            record.fail(unit.name, error)
            if not usable(device):
                print("the device does not answer any more: nothing else was measured")
                return
    if record.left_out:
        print(f"not measured, the time was used up: {len(record.left_out)} units, the first {record.left_out[0]}")
