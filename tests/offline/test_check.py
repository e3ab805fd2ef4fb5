"""`requant check` names file, tensor and matter of every defect; transformers refuses the same checkpoints."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from requant import api
from requant.recipe import Recipe
from requant_kernels.errors import CheckpointError
from requant_kernels.scheme import WeightScheme
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
DOWN = "model.layers.1.mlp.down_proj"
Tamper = Callable[[Path], None]


def edit_json(name: str, change: Callable[[dict], object]) -> Tamper:
    def tamper(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        change(data)
        (folder / name).write_text(json.dumps(data))

    return tamper


def edit_config(**changes: object) -> Tamper:
    return edit_json("config.json", lambda config: config.update(changes))


def edit_scheme(**changes: object) -> Tamper:
    return edit_json("config.json", lambda config: config["quantization_config"].update(changes))


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def edit_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Tamper:
    """Rewrites the shard of tensor ``name`` with ``change`` applied to a copy of it."""

    def tamper(folder: Path) -> None:
        shard = shard_of(folder, name)
        tensors = load_file(shard)
        tensors[name] = change(tensors[name].clone()).contiguous()
        save_file(tensors, shard, metadata={"format": "pt"})

    return tamper


def put(index: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        wide = tensor.to(torch.float64)  # uint16 knows no assignment
        wide.view(-1)[index] = value
        return wide.to(tensor.dtype)

    return change


def drop_tensor(folder: Path) -> None:
    name = f"{DOWN}.weight_scale"
    shard = shard_of(folder, name)
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})
    edit_json(INDEX, lambda index: index["weight_map"].pop(name))(folder)


def add_tensor(folder: Path) -> None:
    shard = shard_of(folder, f"{DOWN}.weight_scale")
    save_file(load_file(shard) | {f"{DOWN}.g_idx": torch.zeros(3)}, shard, metadata={"format": "pt"})
    edit_json(INDEX, lambda index: index["weight_map"].update({f"{DOWN}.g_idx": shard.name}))(folder)


def truncate(folder: Path) -> None:
    shard = shard_of(folder, f"{DOWN}.weight_packed")
    shard.write_bytes(shard.read_bytes()[:-100])


def garbage(folder: Path) -> None:
    shard_of(folder, f"{DOWN}.weight_packed").write_bytes(b"\xff" * 64)


def remove_shard(folder: Path) -> None:
    shard_of(folder, f"{DOWN}.weight_packed").unlink()


def stray_shard(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / "extra.safetensors")


def send_to(file: str) -> Tamper:
    return edit_json(INDEX, lambda index: index["weight_map"].update({f"{DOWN}.weight_packed": file}))


def no_weights(folder: Path) -> None:
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()


def not_json(name: str) -> Tamper:
    return lambda folder: (folder / name).write_text("{") and None


def stored_twice(named: int, other: int) -> Tamper:
    """A tensor of the shard that is number ``named``, where the index has it, in the shard ``other`` too."""

    def tamper(folder: Path) -> None:
        shards = sorted(folder.glob("*.safetensors"))
        name, tensor = next(iter(load_file(shards[named]).items()))
        save_file(load_file(shards[other]) | {name: tensor}, shards[other], metadata={"format": "pt"})

    return tamper


SHARD = r"model-\d{5}-of-\d{5}\.safetensors"
DEFECTS = {
    "column out of range": (
        edit_tensor(f"{DOWN}.sparse_columns", put(-1, 128)),
        rf"{SHARD}: {DOWN}.sparse_columns: 128 is outside \[0, 128\)",
    ),
    "columns not ascending": (
        edit_tensor(f"{DOWN}.sparse_columns", lambda columns: columns.int().flip(0).to(torch.uint16)),
        rf"{SHARD}: {DOWN}.sparse_columns: not ascending",
    ),
    "columns of another dtype": (
        edit_tensor(f"{DOWN}.sparse_columns", lambda columns: columns.to(torch.int64)),
        rf"{SHARD}: {DOWN}.sparse_columns: dtype torch.int64, expected torch.uint16",
    ),
    "offsets not monotone": (
        edit_tensor(f"{DOWN}.sparse_row_offsets", put(1, 1000)),
        rf"{SHARD}: {DOWN}.sparse_row_offsets: not monotone",
    ),
    "offsets not closed": (
        edit_tensor(f"{DOWN}.sparse_row_offsets", put(-1, 1)),
        rf"{SHARD}: {DOWN}.sparse_row_offsets: not monotone",
    ),
    "offsets without a dimension": (
        edit_tensor(f"{DOWN}.sparse_row_offsets", lambda offsets: offsets[0]),
        rf"{SHARD}: {DOWN}.sparse_row_offsets: shape \[\], expected one dimension",
    ),
    "a value is NaN": (
        edit_tensor(f"{DOWN}.sparse_values", put(0, float("nan"))),
        rf"{SHARD}: {DOWN}.sparse_values: not finite",
    ),
    "a scale is NaN": (
        edit_tensor(f"{DOWN}.weight_scale", put(0, float("nan"))),
        rf"{SHARD}: {DOWN}.weight_scale: not finite",
    ),
    "a scale is zero": (
        edit_tensor(f"{DOWN}.weight_scale", put(0, 0.0)),
        rf"{SHARD}: {DOWN}.weight_scale: not positive",
    ),
    "a scale of another dtype": (
        edit_tensor(f"{DOWN}.weight_scale", torch.Tensor.float),
        rf"{SHARD}: {DOWN}.weight_scale: dtype F32, but BF16 by config.json",
    ),
    "a scale of another shape": (
        edit_tensor(f"{DOWN}.weight_scale", lambda scale: scale[:, :1]),
        rf"{SHARD}: {DOWN}.weight_scale: shape \[64, 1\], expected \[64, 4\]",
    ),
    "codes of another shape": (
        edit_tensor(f"{DOWN}.weight_packed", lambda packed: packed[:, :-4]),
        rf"{SHARD}: {DOWN}.weight_packed: shape \[64, 12\], but \[64, 16\] by config.json",
    ),
    "codes of another dtype": (
        edit_tensor(f"{DOWN}.weight_packed", lambda packed: packed.to(torch.int64)),
        rf"{SHARD}: {DOWN}.weight_packed: torch.int64 \[64, 16\], not int32",
    ),
    "zero points with a tail": (
        edit_tensor(f"{DOWN}.weight_zero_point", lambda words: words | 1 << 30),
        rf"{SHARD}: {DOWN}.weight_zero_point: not zero above a row's last code",
    ),
    "an embedding is infinite": (
        edit_tensor("model.embed_tokens.weight", put(5, float("inf"))),
        rf"{SHARD}: model.embed_tokens.weight: not finite",
    ),
    "a tensor is missing": (drop_tensor, rf"{INDEX}: {DOWN}.weight_scale: missing"),
    "a tensor too many": (add_tensor, rf"{SHARD}: {DOWN}.g_idx: not expected in this model"),
    "a tensor twice, named first": (stored_twice(0, -1), rf"{SHARD}: model\.\S+: in model-00001-of-\d+\S+ as well"),
    "a tensor twice, named last": (stored_twice(-1, 0), rf"{SHARD}: model\.\S+: in model-00001-of-\d+\S+ as well"),
    "a truncated shard": (truncate, rf"{SHARD}: not a whole safetensors file"),
    "a shard of garbage": (garbage, rf"{SHARD}: not a whole safetensors file"),
    "an absent shard": (remove_shard, rf"{INDEX}: {SHARD}: named here, but absent"),
    "a stray shard": (stray_shard, r"extra\.safetensors: no part of this checkpoint"),
    "no weights at all": (no_weights, r"model\.safetensors: absent"),
    "a path in the index": (
        send_to("../model.safetensors"),
        rf"{INDEX}: '\.\./model\.safetensors': not the plain name",
    ),
    "a pickle in the index": (send_to("model.bin"), rf"{INDEX}: 'model\.bin': not the plain name"),
    "a list in the index": (
        edit_json(INDEX, lambda index: index["weight_map"].update({"x.weight": ["model.bin"]})),
        rf"{INDEX}: .*model\.bin.*: not the plain name",
    ),
    "a number in the index": (edit_json(INDEX, lambda index: index.update(weight_map=3)), rf"{INDEX}: no weight_map"),
    "an index that is no JSON": (not_json(INDEX), rf"{INDEX}: not JSON"),
    "a config that is no JSON": (not_json("config.json"), r"config\.json: not JSON"),
    "an unknown version": (edit_scheme(version=2), r"config\.json: version: 2 is not 1"),
    "an unknown key": (edit_scheme(beta=1), r"config\.json: quantization_config: unknown key 'beta'"),
    "another method": (edit_scheme(quant_method="gptq"), r"config\.json: quant_method: 'gptq' is not 'requant'"),
    "a wrong scheme": (
        edit_scheme(scheme={"weights": {"bits": 4, "group_size": 32, "symmetric": True}}),
        rf"{SHARD}: model\.layers\.0\.mlp\.down_proj\.sparse_columns: not expected in this model",
    ),
    "a group that does not divide": (
        edit_scheme(scheme={"weights": {"bits": 4, "group_size": 256, "symmetric": False}, "sparse": {}}),
        rf"{SHARD}: {DOWN}.weight_packed: group_size 256 does not divide in_features 128",
    ),
    "a fused layer split": (
        edit_scheme(ignore=["lm_head", r".*k_proj"]),
        r"config\.json: model\.layers\.0: self_attn\.q_proj, .* must share one scheme",
    ),
    "no quantization_config": (
        edit_json("config.json", lambda config: config.pop("quantization_config")),
        r"config\.json: no quantization_config",
    ),
    "another width": (
        edit_config(intermediate_size=256),
        rf"{SHARD}: {DOWN}.weight_packed: shape \[64, 16\], but \[64, 32\] by config.json",
    ),
    "more blocks": (edit_config(num_hidden_layers=3), rf"{INDEX}: model\.layers\.2\..*: missing"),
    "a norm of integers": (
        edit_tensor("model.norm.weight", lambda weight: weight.to(torch.int32)),
        rf"{SHARD}: model.norm.weight: dtype I32, but BF16 by config.json",
    ),
    "a nonsensical width": (edit_config(hidden_size="wide"), r"config\.json: .*hidden_size"),
    "an unknown architecture": (edit_config(model_type="gpt2"), r"config\.json: architecture 'gpt2' is not supported"),
    "a producer that is none": (edit_scheme(producer="x"), r"config\.json: producer: expected an object"),
    "a list of dtypes": (edit_config(dtype=["bfloat16"]), r"config\.json: dtype: \['bfloat16'\] is not one of"),
    "another dtype": (edit_config(dtype="int8"), r"config\.json: dtype: 'int8' is not one of"),
}


def test_a_sound_checkpoint_has_no_defects(quantized):
    assert api.check(quantized, tensor_parallel=(1, 2, 4)) == []


@pytest.mark.parametrize(("tamper", "expected"), DEFECTS.values(), ids=DEFECTS)
def test_each_defect_is_named_and_nothing_loads(tamper, expected, checkpoint):
    tamper(checkpoint)
    lines = [str(defect) for defect in api.check(checkpoint)]
    assert any(re.fullmatch(f"{expected}.*", line) for line in lines), lines
    with pytest.raises(CheckpointError) as refusal:
        api.load_quantized(checkpoint)
    assert str(refusal.value) == lines[0]


@pytest.fixture
def static(llama, tmp_path) -> Path:
    """A W8A8 checkpoint with one static, asymmetric step for the inputs of every layer."""
    out = tmp_path / "static"
    recipe = Recipe.from_dict({"weights": {"bits": 8}, "activations": {"mode": "dynamic", "symmetric": False}})
    api.quantize(llama, out, recipe)
    edit_json(
        "config.json", lambda config: config["quantization_config"]["scheme"]["activations"].update(dynamic=False)
    )(out)
    tensors = load_file(out / "model.safetensors")
    layers = [name.removesuffix("weight_scale") for name in tensors if name.endswith(".weight_scale")]
    tensors |= {f"{layer}input_scale": torch.full((1,), 0.5, dtype=torch.bfloat16) for layer in layers}
    tensors |= {f"{layer}input_zero_point": torch.full((1,), 3, dtype=torch.int8) for layer in layers}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize(
    ("changed", "first"),
    [
        ("self_attn.v_proj.input_scale", "self_attn.q_proj.input_scale"),
        ("self_attn.k_proj.input_zero_point", "self_attn.q_proj.input_zero_point"),
        ("mlp.up_proj.input_scale", "mlp.gate_proj.input_scale"),
    ],
)
def test_static_steps_of_layers_that_run_as_one_must_be_the_same(changed, first, static):
    assert api.check(static) == []
    tensors = load_file(static / "model.safetensors")
    tensors[f"model.layers.1.{changed}"] += 1
    tensors["model.layers.1.mlp.down_proj.input_scale"] += 1  # runs alone
    save_file(tensors, static / "model.safetensors", metadata={"format": "pt"})
    [defect] = api.check(static)
    assert str(defect) == (
        f"model.safetensors: model.layers.1.{changed}: differs from model.layers.1.{first}, "
        "but they run as one layer in vLLM and must share one"
    )
    with pytest.raises(CheckpointError, match="must share one"):
        api.load_quantized(static)


def test_two_defects_are_two_lines(checkpoint):
    edit_tensor(f"{DOWN}.weight_scale", put(0, -1.0))(checkpoint)
    edit_tensor("model.layers.0.self_attn.q_proj.sparse_values", put(0, float("inf")))(checkpoint)
    lines = [str(defect) for defect in api.check(checkpoint)]
    assert [line.split(": ")[1] for line in lines] == [
        "model.layers.0.self_attn.q_proj.sparse_values",
        f"{DOWN}.weight_scale",
    ]


@pytest.mark.parametrize(
    ("degree", "expected"),
    [
        (
            3,
            [
                "self_attn.q_proj: 4 attention heads",
                "self_attn.k_proj: 2 key/value heads",
                "mlp.down_proj: 128 inner",
            ],
        ),
        (4, []),  # the two key/value heads are copied
        (8, ["self_attn.q_proj: 4 attention heads"]),
    ],
)
def test_a_degree_that_is_not_possible_is_named_with_its_layers(degree, expected, quantized):
    lines = [str(defect) for defect in api.check(quantized, tensor_parallel=(1, degree))]
    assert len(lines) == len(expected)
    for line, part in zip(lines, expected, strict=True):
        assert line.startswith(f"config.json: model.layers.0.{part}")
        assert f"{degree} ranks" in line


def test_a_layer_that_makes_queries_keys_and_values_at_once_is_named_for_either(tiny, tmp_path):
    api.quantize(tiny("phi3"), tmp_path / "out", Recipe(WeightScheme(4, 32)))
    lines = [str(defect) for defect in api.check(tmp_path / "out", tensor_parallel=(3,))]
    fused = "config.json: model.layers.0.self_attn.qkv_proj"
    assert [line.partition(": 3 ranks")[0].rpartition(" heads")[0] for line in lines[:2]] == [
        f"{fused}: 4 attention",
        f"{fused}: 2 key/value",
    ]
    assert lines[2].startswith("config.json: model.layers.0.mlp.down_proj: 128 inner")


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("qwen3_5_text", {}, ["linear_attn.in_proj_qkv: 2 heads of linear attention"]),
        (
            "falcon_h1",
            {"mamba_n_heads": 2, "mamba_d_head": 64, "mamba_n_groups": 2},
            ["mamba.in_proj: 2 heads of state space layers", "mamba.in_proj: 2 groups of state space layers"],
        ),
    ],
)
def test_what_is_beside_attention_has_heads_too(kind, changes, expected, tiny, tmp_path):
    api.quantize(tiny(kind, **changes), tmp_path / "out", Recipe(WeightScheme(4, 32)))
    lines = [str(defect) for defect in api.check(tmp_path / "out", tensor_parallel=(4,))]
    assert lines == [f"config.json: model.layers.0.{why} can not be split over 4 ranks" for why in expected]


def test_groups_that_a_degree_cuts_are_told_and_are_no_defects(quantized, llama, tmp_path):
    """Group 32: four ranks have 16 columns each of o_proj and 32 of down_proj."""
    assert api.tensor_parallel_remarks(quantized, (1, 2)) == []
    assert api.tensor_parallel_remarks(quantized, (4,)) == [
        "model.layers.0.self_attn.o_proj and 1 more: 4 ranks of 16 columns cut groups of 32 into groups of 16"
    ]
    api.quantize(llama, tmp_path / "rows", Recipe(WeightScheme(4, -1)))
    assert api.tensor_parallel_remarks(tmp_path / "rows", (4,)) == []


def test_an_override_gives_one_layer_another_scheme(llama, tmp_path, checkpoint):
    """What a mixed checkpoint will look like: here two layers of one bit width taken from another run."""
    api.quantize(llama, tmp_path / "other", Recipe(WeightScheme(8, 64)))
    other = load_file(tmp_path / "other" / "model.safetensors")
    for block in range(2):
        layer = f"model.layers.{block}.mlp.down_proj"
        shard = shard_of(checkpoint, f"{layer}.weight_packed")
        index = json.loads((checkpoint / INDEX).read_text())
        for name in [name for name in index["weight_map"] if name.startswith(layer)]:
            path = checkpoint / index["weight_map"].pop(name)
            save_file({key: value for key, value in load_file(path).items() if key != name}, path)
        parts = {name: tensor for name, tensor in other.items() if name.startswith(layer)}
        save_file(load_file(shard) | parts, shard, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(parts, shard.name)
        (checkpoint / INDEX).write_text(json.dumps(index))
    edit_scheme(overrides={r".*down_proj": {"weights": {"bits": 8, "group_size": 64, "symmetric": True}}})(checkpoint)
    assert api.check(checkpoint) == []
    rows, _ = api.inspect(checkpoint)
    assert {row.describe() for row in rows if row.name.endswith("down_proj")} == {"w8 g64 sym"}
    loaded, whole = api.load_quantized(checkpoint), api.load_quantized(tmp_path / "other")
    assert torch.equal(loaded.get_parameter(f"{DOWN}.weight"), whole.get_parameter(f"{DOWN}.weight"))
