"""Ahead-of-time compilation says what it is there to say."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")

from requant_kernels import aot

NAME = "h200 one W4 g128 symmetric bf16 sparse"


def chosen() -> aot.Variant:
    return next(variant for variant in aot.variants(False) if variant.name == NAME)


def test_a_kernel_passes_and_is_reported(tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "requant_kernels.aot", "--only", NAME, "--target", "90", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [row] = json.loads(report.read_text())
    assert (row["name"], row["target"], row["matrix"], row["spill"], row["failure"]) == (NAME, "90", "mma", 0, "")
    assert 0 < row["registers"] < 256
    assert row["barriers"] == 0  # with one token each warp runs alone
    assert row["loop"] > 100


def test_a_missing_matrix_instruction_fails():
    report = aot.compile_variant(replace(chosen(), targets={"90": "wgmma"}), "90")
    assert report.failure == "uses mma instead of wgmma"


def test_too_much_shared_memory_fails(monkeypatch):
    monkeypatch.setitem(aot.SHARED_MEMORY, "90", 1000)
    report = aot.compile_variant(chosen(), "90")
    assert report.failure.endswith("bytes of shared memory, 1000 are there")


def test_what_does_not_compile_fails_with_the_compilers_words():
    constants = chosen().constants | {"GROUP": 24}
    report = aot.compile_variant(replace(chosen(), constants=constants), "90")
    assert report.failure.startswith("does not compile: ")


def test_the_longest_loop_is_the_one_that_is_reported():
    code = """
        /*0000*/                   MOV R1, R2 ;
        /*0010*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0020*/              @P0  BRA 0x10 ;
        /*0030*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/             @!P1  BRA 0x30 ;
        /*0060*/                   BRA 0x80 ;
        /*0070*/                   BRA 0x70;
        /*0080*/                   EXIT ;
    """
    assert aot.longest_loop(code) == ["IADD3", "BAR.SYNC.DEFER_BLOCKING", "BRA"]


def test_names_are_unique():
    names = [variant.name for variant in aot.variants(False)]
    assert len(names) == len(set(names))
