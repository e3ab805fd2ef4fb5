"""Predictions from machine code: the model's units do what they are meant to, and a kernel's code is understood."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from requant_kernels.dense_sparse.triton.layer import HERE
from requant_kernels.dense_sparse.triton.table import tables

from benchmarks.kernel_timing.shapes import Load, Shape
from benchmarks.prediction import launches, measured
from benchmarks.prediction.code import Instruction, longest_loop, parse, path
from benchmarks.prediction.gpus import H200, Gpu
from benchmarks.prediction.processor import Access, Processor

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the compiler's cache would be the GPU's")
IDEAL = replace(H200, issue=1.0)


def _one(name: str, **fields: object) -> Instruction:
    plain = {
        "operands": "",
        "predicate": "",
        "stall": 1,
        "written": None,
        "read": None,
        "waits": (),
        "function": "",
        "line": "",
    }
    return Instruction(name, **plain | fields)


def _cycles(
    code: list[Instruction], warps: int = 1, programs: int = 1, resident: int = 64, gpu: Gpu = IDEAL, **access: Access
) -> float:
    def place(one: Instruction) -> Access | None:
        return access.get(one.function)

    return Processor(code, place, gpu, warps).run([list(range(len(code)))], programs, resident)


def test_a_scheduler_issues_one_instruction_a_cycle() -> None:
    code = [_one("FFMA")] * 100
    assert _cycles(code) == pytest.approx(100, abs=5)
    assert _cycles(code, warps=4) == pytest.approx(100, abs=20)
    assert _cycles(code, warps=8) == pytest.approx(200, abs=20)


def test_an_instruction_takes_its_scheduler_longer() -> None:
    code = [_one("FFMA")] * 100
    busy = replace(H200, issue=1.6)
    assert _cycles(code, warps=4, gpu=busy) == pytest.approx(160, abs=20)
    assert _cycles(code, warps=8, gpu=busy) == pytest.approx(320, abs=20)
    # Others do not see it where the warp would have waited longer itself.
    stalled = [_one("FFMA", stall=10)] * 10
    assert _cycles(stalled, gpu=busy) == _cycles(stalled)


def test_a_fence_holds_back_its_warp() -> None:
    code = [_one("MEMBAR.ALL.GPU"), _one("FFMA")]
    assert _cycles(code) == pytest.approx(H200.fence, abs=5)


def test_copies_behind_the_end_go_nowhere() -> None:
    copy = [_one("LDGSTS.E.128", function="load"), _one("LDGDEPBAR")]
    code = [*copy, _one("DEPBAR.LE", operands="SB0, 0x0"), *copy, _one("BRA", predicate="@P0", target=2), _one("EXIT")]
    [way] = launches.paths(code, 3, 1)
    n = len(code)
    assert way == [0, 1, *[2, 3, 4, 5] * 2, 2, 3 + n, 4, 5, 6]
    processor = Processor(code, lambda one: Access("memory", 4096) if one.function else None, IDEAL, 1)
    assert processor.run([[3 + n]], 1, 1) < 5
    assert processor.waits.keys() == {3}


def test_whole_numbers_have_half_the_lanes() -> None:
    assert _cycles([_one("LOP3")] * 100) == pytest.approx(200, abs=5)
    mixed = [_one("LOP3"), _one("FFMA")] * 50
    assert _cycles(mixed) == pytest.approx(100, abs=5)


def test_a_stall_holds_back_its_warp_alone() -> None:
    code = [_one("FFMA", stall=10)] * 10
    assert _cycles(code) == pytest.approx(91, abs=5)
    assert _cycles(code, warps=16) == pytest.approx(91, abs=20)


def test_who_waits_for_a_scoreboard_waits_for_the_memory() -> None:
    load = _one("LDG.E", written=2, function="load")
    access = {"load": Access("memory", 128)}
    alone = _cycles([load, _one("FFMA")], **access)
    waited = _cycles([load, _one("FFMA", waits=(2,))], **access)
    assert alone < 20
    assert waited == pytest.approx(H200.to_memory + 128 / H200.memory, abs=10)
    # What shares a scoreboard is waited for as well, as fast as it would have been there itself.
    near = [load, _one("LDG.E", written=2, function="near"), _one("FFMA", waits=(2,))]
    assert _cycles(near, near=Access("l1", 128), **access) >= waited


def test_what_is_waited_for_is_known() -> None:
    code = [_one("LDG.E", written=2, function="load"), _one("FFMA", stall=9), _one("FFMA", waits=(2,)), _one("FFMA")]
    processor = Processor(code, lambda one: Access("memory", 128) if one.function else None, IDEAL, 1)
    cycles = processor.run([[0, 1, 2, 3]], 1, 1)
    assert processor.waits.most_common(1) == [(2, pytest.approx(cycles - 12, abs=3))]


def test_memory_is_shared_out() -> None:
    code = [_one("LDG.E.128", written=0, function="load")] * 50 + [_one("FFMA", waits=(0,))]
    cycles = _cycles(code, warps=8, programs=16, load=Access("memory", 512))
    assert cycles == pytest.approx(16 * 8 * 50 * 512 / H200.memory + H200.to_memory, rel=0.02)


def test_programs_that_do_not_fit_come_later() -> None:
    code = [_one("FFMA", stall=4)] * 100
    assert _cycles(code, programs=4, resident=4) < 450
    assert _cycles(code, programs=4, resident=1) > 1600


def test_a_barrier_waits_for_the_slowest_warp() -> None:
    """Warps of one program take the same path, on one scheduler one after the other where the unit is busy."""
    code = [*[_one("LOP3")] * 20, _one("BAR.SYNC"), _one("FFMA")]
    assert _cycles(code, warps=8) >= 2 * 2 * 20 + 20


def test_copies_are_waited_for_by_their_number() -> None:
    copy, group = _one("LDGSTS.E.128", function="load"), _one("LDGDEPBAR")
    access = {"load": Access("memory", 512)}
    for allowed, least, most in (("0x0", H200.to_memory, 1e9), ("0x1", 0, 100)):
        code = [copy, group, _one("DEPBAR.LE", operands=f"SB0, {allowed}"), _one("FFMA")]
        assert least <= _cycles(code, **access) <= most


@pytest.mark.parametrize("layer", ["o", "gate_up"])
def test_launches_take_about_as_long_as_measured(layer: str) -> None:
    """On an H200 (docs/ROOFLINE.md): a layer whose columns are split and one whose are not. A quarter is what the worst
    is off."""
    found = [one for one in measured.launches() if one.layer == layer and one.scheme == "W4 g128"]
    assert {one.tokens for one in found} == {1, 4, 16, 64}
    for one in found:
        run = measured.predicted(one, H200)
        assert run.seconds * 1e6 == pytest.approx(one.micros, rel=0.26), one
        assert 0.25 < run.issued < 0.6


@pytest.mark.parametrize(("tokens", "columns"), [(1, 1024), (16, 4096), (64, 1024), (1024, 1024)])
def test_a_launch(tokens: int, columns: int) -> None:
    """No layer takes less time than its bytes, nor less with entries than without; four times as many rows as
    fill the GPU take longer."""
    predict = launches.Predictor(H200, tables()["h200"])
    load = Load(Shape("", "", 16384, columns), 4, 128, 0.005, tokens)
    time = predict(load)
    whole = H200.memory * H200.processors * H200.clock
    assert time > load.shape.weights / 2 / whole
    assert time < 100e-6 * max(1, tokens / 64)
    assert predict(replace(load, density=0.0)) < time
    larger = replace(load, shape=replace(load.shape, rows=65536))
    assert predict(larger) > 1.5 * time


@pytest.mark.parametrize(
    ("module", "name"),
    [("requant_kernels.dense_sparse.triton.one", "one_kernel"), ("triton.language.standard", "cdiv")],
)
def test_the_compiler_s_cache_names_a_checkout_that_is_gone(module: str, name: str) -> None:
    """What Triton compiled of the same text there serves here too, with the places of then."""
    spec = find_spec(module)
    assert spec
    assert spec.origin
    text = Path(spec.origin).read_text().splitlines()
    line = next(number for number, one in enumerate(text, 1) if one.startswith(f"def {name}("))
    here = f"""\t//## File "/gone/lib/{module.replace(".", "/")}.py", line {line + 1}
        /*0000*/                   EXIT ;                     /* 0x000000000000794d */
                                                              /* 0x000fea0003800000 */"""
    [one] = parse(here)
    assert (one.function, one.line) == (name, f"{Path(spec.origin).name}:{line + 1}")


def test_loads_are_told_apart() -> None:
    table = tables()["h200"]
    load = Load(Shape("", "", 16384, 1024), 4, 128, 0.005, 1)
    code = launches.compiled("h200", table.tiles[0], load, "90", 0).code
    loop = longest_loop(code)
    found = [launches.access(code[at]) for at in loop if code[at].base == "LDG"]
    levels = [access.level for access in found if access]
    # two fours of x, x at the columns of a slot; four sets of codes, two rows' steps, a slot
    assert sorted(levels) == ["gather", "l1", "l1", *["memory"] * 7]
    assert sum(access.bytes for access in found if access and access.level == "memory") == 4 * 512 + 2 * 32 + 128
    assert all(code[at].written is not None for at in loop if code[at].base == "LDG")
    whole = path(code, 0, len(code))
    assert code[whole[-1]].base == "EXIT"
    assert loop.start in whole


@pytest.mark.parametrize("splits", [2, 4, 8])
def test_programs_that_share_a_tile_read_as_much_as_they_store(splits: int) -> None:
    """Each adds up its part of all shares."""
    table = tables()["h200"]
    tile = replace(table.largest(64, 4, False), up_to=64)
    load = Load(Shape("", "", 4096, 4096), 4, 128, 0.005, 1)
    code = launches.compiled("h200", tile, load, "90", HERE).code
    loop = longest_loop(code)
    assert any("MMA" in code[at].name for at in loop)
    for way in launches.paths(code, 4, splits):
        behind = [code[at] for at in way[len(way) - way[::-1].index(loop[-1]) :] if at < len(code)]
        stored = sum(one.bytes for one in behind if one.base == "STG" and one.function == "finish")
        assert stored == tile.strips * 16 * tile.tokens * 4 // (32 * tile.warps)
        assert sum(one.bytes for one in behind if one.function == "added_up" and one.base == "LDG") == stored
        assert (
            sum(one.bytes for one in behind if one.function == "_write" and one.base == "STG") == stored // 2 // splits
        )
