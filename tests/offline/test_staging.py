"""OUT appears whole or not at all, and nothing is left beside it."""

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from requant import api, staging
from requant.errors import InputError
from requant.recipe import Recipe
from requant.staging import staged
from requant_kernels.scheme import WeightScheme

RECIPE = Recipe(WeightScheme(4, 32, symmetric=False), outliers=0.02)

# Dies after the second shard as a machine that loses power would.
KILLED = """
import os, signal, sys
from requant import api, checkpoint
from requant.recipe import Recipe
from requant_kernels.scheme import WeightScheme
flush = checkpoint.ShardWriter._flush
def dying(writer):
    flush(writer)
    if len(writer._shards) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.ShardWriter._flush = dying
recipe = Recipe(WeightScheme(4, 32, symmetric=False), outliers=0.02)
api.quantize(sys.argv[1], sys.argv[2], recipe, max_shard_size="40KB")
"""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)


def test_success_renames_and_failure_removes(tmp_path):
    with staged(tmp_path / "out") as folder:
        write(folder, "{}")
        assert names(tmp_path) == {".out.partial"}
    assert names(tmp_path) == {"out"}
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "other") as folder:
        write(folder, str(1 / 0))
    assert names(tmp_path) == {"out"}


def test_an_existing_folder_is_kept_unless_told_otherwise(tmp_path):
    with staged(tmp_path / "out") as folder:
        write(folder, "old")
    with pytest.raises(InputError, match="out: exists; use --overwrite"), staged(tmp_path / "out"):
        pass
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "out", overwrite=True) as folder:
        write(folder, str(1 / 0))
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    with staged(tmp_path / "out", overwrite=True) as folder:
        write(folder, "new")
    assert (tmp_path / "out" / "config.json").read_text() == "new"
    assert names(tmp_path) == {"out"}


def test_overwrite_replaces_models_only(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="is no model folder"), staged(home, overwrite=True):
        pass
    assert names(home) == {"letter.txt"}


@pytest.mark.parametrize("place", ["model", "model/sub/out", "."], ids=["same", "inside", "around"])
def test_a_place_that_overlaps_the_model_is_refused(place, tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    with pytest.raises(InputError, match="overlaps"), staged(tmp_path / place, overwrite=True, source=source):
        pass
    assert names(tmp_path) == {"model"}


def test_a_place_beside_a_gguf_file_is_none_of_its_own(tmp_path):
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    with staged(tmp_path / "out", source=gguf) as folder:
        write(folder, "{}")
    assert names(tmp_path) == {"model.gguf", "out"}
    with pytest.raises(InputError, match="overlaps"), staged(tmp_path, overwrite=True, source=gguf):
        pass


def test_two_runs_do_not_write_one_folder(tmp_path):
    with (
        staged(tmp_path / "out") as folder,
        pytest.raises(InputError, match="another run is writing it"),
        staged(tmp_path / "out"),
    ):
        pass
    assert not folder.exists()


@pytest.mark.parametrize(
    ("step", "refusal", "left"),
    [("out", "another run is writing it", "new"), (".out.partial", None, "newer")],
    ids=["before the new one is in place", "before the old one is removed"],
)
def test_a_run_that_starts_amid_the_swap_of_another_does_not_disturb_it(step, refusal, left, tmp_path, monkeypatch):
    with staged(tmp_path / "out") as folder:
        write(folder, "old")
    rename = Path.rename

    def renamed(path: Path, target: Path) -> Path:
        result = rename(path, target)
        if path.name == step:
            monkeypatch.setattr(Path, "rename", rename)
            try:
                with staged(tmp_path / "out", overwrite=True) as other:
                    write(other, "newer")
            except InputError as error:
                refusals.append(str(error))
        return result

    refusals: list[str] = []
    with staged(tmp_path / "out", overwrite=True) as folder:
        write(folder, "new")
        monkeypatch.setattr(Path, "rename", renamed)
    assert refusals == ([f"{tmp_path / 'out'}: {refusal}"] if refusal else [])
    assert (tmp_path / "out" / "config.json").read_text() == left
    assert names(tmp_path) == {"out"}


def test_a_failure_after_publishing_leaves_the_folder_of_the_next_run_alone(tmp_path, monkeypatch):
    next_run = staged(tmp_path / "out", overwrite=True)

    def published(*_: object) -> None:
        (tmp_path / ".out.partial").rename(tmp_path / "out")
        next_run.__enter__()
        raise OSError("gone")

    with monkeypatch.context() as patched:
        patched.setattr(staging, "_publish", published)
        with pytest.raises(OSError, match="gone"), staged(tmp_path / "out") as folder:
            write(folder, "new")
    write(tmp_path / ".out.partial", "newer")
    next_run.__exit__(None, None, None)
    assert (tmp_path / "out" / "config.json").read_text() == "newer"


def test_a_run_that_finished_meanwhile_is_not_replaced_unless_told_otherwise(tmp_path, monkeypatch):
    acquire = staging._acquire

    def late(partial: Path, out: Path) -> int:
        out.mkdir()
        write(out, "first")
        return acquire(partial, out)

    monkeypatch.setattr(staging, "_acquire", late)
    with pytest.raises(InputError, match="exists"), staged(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "config.json").read_text() == "first"
    assert names(tmp_path) == {"out"}


def test_a_swap_that_was_cut_short_is_finished(tmp_path):
    for name in (".out.replaced", ".out.partial"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, name)
    with pytest.raises(InputError, match="exists"), staged(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "config.json").read_text() == ".out.replaced"


def test_a_killed_run_leaves_nothing_that_loads_and_the_next_one_clears_it(llama, quantized, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(llama), str(out)], check=False, capture_output=True)
    assert done.returncode == -9, done.stderr
    assert not out.exists()
    partial = tmp_path / ".out.partial"
    assert len(list(partial.glob("shard-*"))) == 2
    assert [str(defect) for defect in api.check(partial)] == ["config.json: No such file or directory"]
    api.quantize(llama, out, RECIPE, max_shard_size="40KB")
    assert names(tmp_path) == {"out"}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in quantized.iterdir()
    }


@pytest.mark.parametrize("limit", [1_000, 30_000, 100_000], ids=["weights", "later-shard", "tokenizer"])
def test_a_full_disk_is_one_line_and_leaves_nothing(limit, llama, micro_llama, tmp_path):
    source = Path(shutil.copytree(llama, tmp_path / "model"))
    shutil.copy(micro_llama / "tokenizer.json", source)  # larger than any shard
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(InputError, match=r"out(\.partial)?: can not be written .*File too large"):
            api.quantize(source, tmp_path / "out", RECIPE, max_shard_size="40KB")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == {"model"}
