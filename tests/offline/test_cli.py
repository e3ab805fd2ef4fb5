"""The command line: exit codes, what goes to which stream, options over recipes."""

import json

import pytest
from requant import api
from requant.cli import main
from requant.progress import track
from requant.recipe import Recipe
from requant_kernels.scheme import WeightScheme


def test_quantize_prints_one_line_and_check_and_inspect_agree(llama, tmp_path, capsys):
    out = str(tmp_path / "out")
    options = ["--method", "rtn", "--bits", "3", "--group-size", "32", "--symmetric", "--outliers", "1%"]
    assert main(["quantize", str(llama), "-o", out, *options]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}: {api.inspect(out)[1].describe()}\n"
    assert printed.err.splitlines() == ["quantizing blocks: 1/2", "quantizing blocks: 2/2"]
    assert main(["check", out, "--tp", "1,2"]) == 0
    assert capsys.readouterr().out == f"{out}: sound, tensor parallel 1, tensor parallel 2\n"
    assert main(["inspect", out]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 14 + 1 + 1
    assert " ".join(lines[1].split()) == (
        "model.layers.0.self_attn.q_proj 64 x 64 w3 g32 sym + sparse 4.33 1.00 % 0.00 MB"
    )


def test_json_is_the_only_thing_on_stdout(llama, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["quantize", str(llama), "-o", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "requant_report.json").read_text())
    assert main(["inspect", str(out), "--json"]) == 0
    inspected = json.loads(capsys.readouterr().out)
    assert inspected["total"] == report["total"]
    assert [row["bits_per_weight"] for row in inspected["layers"]] == [
        row["bits_per_weight"] for row in report["layers"]
    ]


def test_options_override_the_recipe(llama, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("weights: {bits: 2, group_size: 32, symmetric: true}\noutliers: 2%\nignore: ['.*down_proj']\n")
    more = ["--bits", "8", "--no-symmetric", "--seed", "5", "--ignore", ".*o_proj", "--json"]
    assert main(["quantize", str(llama), "-o", str(tmp_path / "out"), "--recipe", str(recipe), *more]) == 0
    expected = Recipe(WeightScheme(8, 32, symmetric=False), outliers=0.02, ignore=(".*down_proj", ".*o_proj"), seed=5)
    assert json.loads(capsys.readouterr().out)["recipe"] == expected.to_dict()


def test_check_prints_a_line_for_each_defect(quantized, capsys):
    assert main(["check", str(quantized), "--tp", "3"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("config.json: model.layers.0.") for line in lines)


def test_check_tells_what_a_degree_does_to_a_sound_checkpoint(quantized, capsys):
    assert main(["check", str(quantized), "--tp", "4"]) == 0
    sound, *remarks = capsys.readouterr().out.splitlines()
    assert sound == f"{quantized}: sound, tensor parallel 4"
    assert remarks == api.tensor_parallel_remarks(quantized, (4,))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["quantize"],
        ["quantize", "model", "-o", "out", "--bits", "5"],
        ["quantize", "model", "-o", "out", "--base", "magic"],
        ["quantize", "model", "-o", "out", "--method", "rtn", "--recipe", "rtn-w4"],
        ["check", "out", "--tp", "0"],
        ["check", "out", "--tp", "two"],
        ["eval", "model"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: requant" in capsys.readouterr().err


def test_an_interrupted_run_leaves_nothing(llama, tmp_path, capsys, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("requant.pipeline.quantize_layer", interrupted)
    assert main(["quantize", str(llama), "-o", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("total", "lines"), [(3, [1, 2, 3]), (10, range(1, 11)), (40, range(4, 41, 4))])
def test_progress_off_a_terminal_is_at_most_ten_lines(total, lines, capsys):
    assert list(track(range(total), total, "work")) == list(range(total))
    assert capsys.readouterr().err.splitlines() == [f"work: {line}/{total}" for line in lines]
