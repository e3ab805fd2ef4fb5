"""Arguments of `requant bench`, and what is refused in one line before anything is started."""

import pytest
from requant import figures
from requant.bench import command
from requant.bench.models import Served, parse_all
from requant.bench.workloads import SHAPES, Shape, Workload, longest, workloads
from requant.cli import _parser, main
from requant.errors import InputError


def parsed(*arguments: str):
    return _parser().parse_args(["bench", *arguments])


def test_defaults():
    given = parsed("out")
    assert given.streams == (1, 8, 32)
    assert [shape.kind for shape in given.workloads] == ["decode", "prefill", "mixed"]
    assert (given.against, given.vllm, given.repetitions) == ([], [], 3)


def test_what_follows_vllm_goes_to_the_servers():
    given = parsed("out", "--against", "a", "b", "--against", "c", "--vllm", "--enforce-eager", "--max-num-seqs", "4")
    assert given.against == ["a", "b", "c"]
    assert given.vllm == ["--enforce-eager", "--max-num-seqs", "4"]


def test_lengths_are_chosen_by_kind():
    assert parsed("out", "--workloads", "mixed,decode:8:16").workloads == (SHAPES["mixed"], Shape("decode", 8, 16))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "OUT"),
        (["out", "--streams", "0"], "'0' is not a whole number of at least 1"),
        (["out", "--streams", "1,x"], "'x' is not a whole number of at least 1"),
        (["out", "--repetitions", "0"], "'0' is not a whole number of at least 1"),
        (["out", "--workloads", "encode"], "'encode' is not a list of decode, prefill, mixed"),
        (["out", "--workloads", "decode:8"], "'decode:8' is not a list of decode"),
        (["out", "--workloads", "decode:0:8"], "'decode:0:8' is not a list of decode"),
        (["out", "--workloads", "decode,decode:8:8"], "names a kind twice"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, list) else "",
)
def test_wrong_usage_is_exit_code_2(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert "usage: requant bench" in printed
    assert said in printed


def test_a_dtype_follows_the_folder(micro_llama):
    assert Served.parse(str(micro_llama)) == Served(micro_llama, "bfloat16")
    assert Served.parse(f"{micro_llama}@float32") == Served(micro_llama, "float32")
    assert Served.parse(str(micro_llama)).name == "micro-llama-en, bfloat16"


def test_an_at_sign_may_belong_to_the_folder(tmp_path):
    folder = tmp_path / "me@home"
    folder.mkdir()
    (folder / "config.json").touch()
    assert Served.parse(str(folder)) == Served(folder, "bfloat16")


def test_weights_alone_count_on_disk(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(10))
    assert Served.parse(str(tmp_path)).disk_bytes() == 12
    (tmp_path / "a.safetensors").write_bytes(bytes(5))
    (tmp_path / "b.safetensors").write_bytes(bytes(6))
    assert Served.parse(str(tmp_path)).disk_bytes() == 11


def test_two_models_need_two_names(micro_llama):
    parse_all([str(micro_llama), f"{micro_llama}@float32"])
    with pytest.raises(InputError, match="two models of this name"):
        parse_all([str(micro_llama), f"{micro_llama}@bfloat16"])


def test_every_shape_at_every_number_of_streams():
    works = workloads([Shape("decode", 8, 4), Shape("prefill", 64, 1)], [1, 8])
    assert [work.name for work in works] == [
        "decode, 1 stream",
        "decode, 8 streams",
        "prefill, 1 stream",
        "prefill, 8 streams",
    ]
    assert [work.prompts for work in works] == [4, 16, 4, 16]
    assert longest(works) == 65 + 16
    assert Workload(SHAPES["decode"], 1).throughput == "output_throughput"
    assert Workload(SHAPES["mixed"], 1).throughput == "total_token_throughput"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["bench", *arguments]) == 1
    printed = capsys.readouterr()
    assert not printed.out
    [line] = printed.err.splitlines()
    return line


def test_a_missing_model(capsys, tmp_path):
    assert f"error: {tmp_path / 'none'}: no folder with config.json" in refusal(capsys, str(tmp_path / "none"))
    assert "one of bfloat16, float16, float32" in refusal(capsys, f"{tmp_path}@fp32")


def test_no_vllm(capsys, micro_llama, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert "vLLM is not installed" in refusal(capsys, str(micro_llama))


def test_a_plot_that_can_not_be_drawn(capsys, micro_llama, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: object())
    assert "ends in one of .png" in refusal(capsys, str(micro_llama), "--plot", "out.gif")
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    assert "pip install 'vllm-requant[plot]'" in refusal(capsys, str(micro_llama), "--plot", "out.png")


def test_a_folder_that_is_not_there(capsys, micro_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: object())
    path = str(tmp_path / "none" / "out.json")
    assert "its folder does not exist" in refusal(capsys, str(micro_llama), "--json", path)
