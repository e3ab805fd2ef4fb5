"""The search for a launch table, without a GPU: what it tries, what it refuses, and the table that it writes."""

import contextlib
import io
import itertools
import json
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from requant_kernels.dense_sparse.triton.table import Decode, Tile, parse, tables

from benchmarks.kernel_timing import layers, shapes, tuning

BITS = 3
WRONG = 99  # stages, which the interpreter does not look at
ONE = Tile("one", up_to=1, tokens=1, strips=8, stages=2, programs=1)
MIDDLE = Tile("middle", up_to=20, tokens=32, strips=8, stages=2, programs=1)


def geometry(tile: Tile | None) -> Tile | None:
    return tile and replace(tile, bits=None, codebook=None)


@pytest.mark.parametrize(("name", "processors", "columns"), [("h200", 132, 256), ("a100", 108, 128)])
def test_the_search_includes_what_is_shipped(name, processors, columns):
    for tile in tables()[name].tiles:
        if not tile.codebook:
            assert geometry(tile) in tuning.candidates(tile.up_to, processors, columns), tile


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("tuned_bits", [2, 4])
def test_layers_that_were_not_tuned_keep_the_table_in_use(monkeypatch, ended, tuned_bits):
    monkeypatch.setattr(tuning, "_triton_version", lambda: "any")
    before = tables()["h200"]
    tuned = [ONE, replace(MIDDLE, up_to=64, tokens=64)]
    decode = replace(before.decode, workspace_mib=128)
    own = replace(before, tiles=tuple(tuned), decode=decode)
    data = tuning.table_data(own, tuned_bits, before, "NVIDIA H100 80GB HBM3", ended=ended)
    table = parse(json.loads(json.dumps(data)))
    assert (table.names, table.decode) == (("NVIDIA H100 80GB HBM3",), decode)
    for tokens, bits, codebook in product((1, 2, 16, 64, 65, 256, 257), (2, 3, 4, 8), (False, True)):
        now, then = geometry(table.tile(tokens, bits, codebook)), geometry(before.tile(tokens, bits, codebook))
        if (bits, codebook) != (tuned_bits, False):
            assert now == then, (tokens, bits, codebook)
        elif tokens <= 64:
            assert now == tuned[tokens > 1]
        else:
            assert now == (None if ended else then)


class Faulty(tuning.Triton):
    """Adds to what one candidate computes."""

    def apply(self, *arguments):
        wrong = any(tile.stages == WRONG for tile in self._table.tiles)
        return super().apply(*arguments) + wrong


def tuned(path: Path, seconds: float) -> tuple[int, str]:
    """Exit status and what was printed; each timing is shorter than the one before."""
    found = {1: [ONE, replace(ONE, stages=WRONG)], 20: [MIDDLE]}
    clock = itertools.count(1000, -1)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(tuning, "ENDS", (1, 20))
        patch.setattr(tuning, "WORKSPACES", (1, 2))
        patch.setattr(tuning, "DECODED_TOKENS", 70)
        patch.setattr(tuning, "Triton", Faulty)
        patch.setattr(tuning, "candidates", lambda up_to, *_: found[up_to])
        patch.setattr(tuning, "microseconds", lambda *_: float(next(clock)))
        setting = layers.Setting(torch.device("cpu"), torch.float16)
        search = tuning.Search(BITS, shapes.TINY, 20, time.monotonic() + seconds, path)
        status, table = tuning.tune(search, layers.INTERPRETED, setting)
    assert table == (parse(json.loads(path.read_text())) if path.exists() else layers.INTERPRETED)
    return status, said.getvalue()


def test_what_computes_something_else_is_named_and_never_chosen(interpreted, tmp_path):
    path = tmp_path / "table.json"
    status, said = interpreted(tuned, path, 600)
    assert status == 0, said
    assert f"stages={WRONG}" in next(line for line in said.splitlines() if "discarded: ArithmeticError" in line)
    table = parse(json.loads(path.read_text()))
    assert [geometry(table.tile(tokens, BITS, False)) for tokens in (1, 20)] == [ONE, MIDDLE]
    assert table.decode == Decode(strips=8, k_warps=1, stages=2, workspace_mib=2)
    assert list(tmp_path.iterdir()) == [path]


def test_tuning_keeps_to_its_time(interpreted, tmp_path):
    status, said = interpreted(tuned, tmp_path / "table.json", 0)
    assert status == 1
    assert "not decided, the time was used up" in said
