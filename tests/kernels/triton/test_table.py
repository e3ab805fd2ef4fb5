"""Launch tables: every layer and token count finds one way to run; bad tables are refused."""

import json
from dataclasses import replace

import pytest
import torch
from requant_kernels.dense_sparse.interface import LayerConfig
from requant_kernels.dense_sparse.triton import IMPLEMENTATION
from requant_kernels.dense_sparse.triton.implementation import supports
from requant_kernels.dense_sparse.triton.table import choose, parse, shared_out, tables, widened
from requant_kernels.scheme import LayerScheme, WeightScheme

TILE = {"kernel": "one", "up_to": 1, "tokens": 1, "strips": 1, "stages": 3, "programs": 100, "k_warps": 4}
DECODE = {"strips": 1, "k_warps": 4, "stages": 2, "workspace_mib": 32}
TABLE = {"names": ["X1"], "source": "test", "pdl": True, "tiles": [TILE], "decode": DECODE}
CONFIG = LayerConfig(
    LayerScheme(WeightScheme(4, 64)), 64, 128, 64, torch.bfloat16, torch.bfloat16, torch.device("cuda")
)


@pytest.mark.parametrize("name", tables())
def test_shipped_tables_cover_every_layer_from_one_token_on(name):
    table = tables()[name]
    for bits, codebook in ((2, False), (3, False), (4, False), (8, False), (4, True)):
        first = table.tile(1, bits, codebook)
        assert first is not None
        regimes = table.regimes(bits, codebook)
        assert regimes[0] >= 1
        reached = {table.tile(tokens, bits, codebook) for tokens in range(1, 3000)}
        assert {table.tile(tokens, bits, codebook) for tokens in regimes} == reached
        assert None in reached


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("Other", "default"),
    ],
)
def test_the_device_name_chooses_the_table(device, name):
    assert choose(device)[0] == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "fast"}, "'fast' is not 'one' or 'middle'"),
        ({"up_to": 2}, "up_to 2 and tokens 1 are not 1"),
        ({"kernel": "middle"}, "k_warps must be 1"),
        ({"columns": 64}, "columns 64 is not 128 or 256"),
        ({"columns": 256, "span": 128}, "span 128 is not 256 or as many as columns, 256"),
        ({"blocks": 3}, "unknown key 'blocks'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_tile_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        parse(TABLE | {"tiles": [TILE | change]})


@pytest.mark.parametrize(
    ("tiles", "blocks", "k_warps", "programs"),
    [
        (1792, 16, 2, 1848),
        (1000, 16, 2, 1848),
        (900, 16, 4, 924),
        (256, 56, 8, 462),
        (16, 16, 8, 462),
        (16, 3, 2, 1848),
    ],
)
def test_the_columns_of_few_tiles_are_split_among_warps_first(tiles, blocks, k_warps, programs):
    tile = tables()["h200"].tiles[0]
    wide = widened(tile, tiles, blocks)
    assert (wide.k_warps, wide.warps, wide.programs) == (k_warps, k_warps, programs)
    assert wide.k_warps * wide.programs <= tile.k_warps * tile.programs


@pytest.mark.parametrize(("blocks", "k_warps"), [(1, 1), (8, 1), (9, 2), (16, 2), (56, 4), (1000, 4)])
def test_rows_are_decoded_by_warps_with_several_blocks_each(blocks, k_warps):
    decode = shared_out(tables()["h200"].decode, blocks)
    assert (decode.k_warps, decode.warps) == (k_warps, k_warps)


def test_a_table_survives_json():
    assert parse(json.loads(json.dumps(TABLE))) == parse(TABLE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "serve with --dtype bfloat16 or float16"),
        ({"stored_dtype": torch.float16}, "serve in one dtype"),
        ({"group_size": 8}, "groups of 8 columns after slicing"),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_cover_is_said(change, reason):
    able, why = supports(replace(CONFIG, **change))
    assert not able
    assert reason in why


def test_covered_layers():
    assert supports(CONFIG) == (True, "")
    assert supports(replace(CONFIG, group_size=100, in_features=100)) == (True, "")


def test_a_cpu_is_refused():
    able, why = IMPLEMENTATION.can_implement(replace(CONFIG, device=torch.device("cpu")))
    assert not able
    assert "not on cpu" in why
