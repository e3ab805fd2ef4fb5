import pytest
from requant_kernels.errors import SchemeError
from requant_kernels.scheme import ActivationScheme, CheckpointScheme, LayerScheme, SparseScheme, WeightScheme

W4 = LayerScheme(WeightScheme(4, 64), SparseScheme())
W8 = LayerScheme(WeightScheme(8))
W8A8 = LayerScheme(WeightScheme(8), activations=ActivationScheme(dynamic=False, symmetric=False), bias_correction=True)


def test_dict_round_trip():
    scheme = CheckpointScheme(W4, {r".*\.down_proj": W8, ".*": W8A8}, ("lm_head",), {"requant": "0.1.0"})
    assert CheckpointScheme.from_dict(scheme.to_dict()) == scheme


def test_ignore_wins_then_the_first_override_then_the_default():
    scheme = CheckpointScheme(W4, {r".*\.mlp\..*": W8, r".*": W4}, (r"lm_head", r".*\.0\.mlp\.up_proj"))
    assert scheme.for_layer("lm_head") is None
    assert scheme.for_layer("model.layers.0.mlp.up_proj") is None
    assert scheme.for_layer("model.layers.1.mlp.up_proj") == W8
    assert scheme.for_layer("model.layers.1.self_attn.q_proj") == W4


def test_patterns_match_whole_names():
    assert CheckpointScheme(W4, ignore=("lm_head",)).for_layer("draft.lm_head_2") == W4


def w8a8(**changes):
    return {"scheme": {"weights": {"bits": 8}, "activations": {"dynamic": True}} | changes}


BAD = {
    "unknown version": ({"version": 2}, "version: 2 is not 1"),
    "version missing": ({"version": None}, "version: None"),
    "other method": ({"quant_method": "gptq"}, "quant_method: 'gptq'"),
    "unknown key": ({"magic": 1}, "unknown key 'magic'"),
    "unknown weight key": ({"scheme": {"weights": {"bits": 4, "desc_act": True}}}, "weights: unknown key 'desc_act'"),
    "5 bits": ({"scheme": {"weights": {"bits": 5}}}, "weights.bits: 5"),
    "bits missing": ({"scheme": {"weights": {}}}, "key 'bits' is missing"),
    "group of 48": ({"scheme": {"weights": {"bits": 4, "group_size": 48}}}, "weights.group_size: 48"),
    "8 bit codebook": ({"scheme": {"weights": {"bits": 8, "codebook": True}}}, "weights.codebook"),
    "other sparse format": ({"scheme": {"weights": {"bits": 4}, "sparse": {"format": "ell"}}}, "sparse.format"),
    "unknown activation key": (w8a8(activations={"dynamic": True, "groups": 2}), "activations: unknown key 'groups'"),
    "dynamic missing": (w8a8(activations={}), "activations: key 'dynamic' is missing"),
    "dynamic no bool": (w8a8(activations={"dynamic": "token"}), "activations.dynamic: 'token'"),
    "4 bit activations": (w8a8(activations={"dynamic": True, "bits": 4}), "activations.bits: 4 is not 8"),
    "activations with 4 bit weights": (w8a8(weights={"bits": 4}), "activations: need weights of 8 bits"),
    "activations with groups": (w8a8(weights={"bits": 8, "group_size": 64}), "activations: need weights of 8 bits"),
    "activations with sparse": (w8a8(sparse={"format": "csr"}), "activations: need .* without codebook or sparse"),
    "bias correction a number": (w8a8(bias_correction=1), "bias_correction: 1 is not true or false"),
    "scheme no object": ({"scheme": [4]}, "scheme: expected an object"),
    "broken pattern": ({"ignore": ["("]}, "not a regular expression"),
    "broken override": ({"overrides": {"(": {"weights": {"bits": 4}}}}, "not a regular expression"),
    "endless pattern": ({"ignore": ["a{99999999999999}"]}, "not a regular expression"),
    "pattern too deep": ({"ignore": ["(" * 10000]}, "not a regular expression"),
    "ignore no list": ({"ignore": "lm_head"}, "ignore: expected a list"),
    "producer no object": ({"producer": "x"}, "producer: expected an object"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_bad_config_is_refused_with_the_key(change, message):
    with pytest.raises(SchemeError, match=message):
        CheckpointScheme.from_dict(CheckpointScheme(W4).to_dict() | change)


def test_a_missing_key_is_named():
    with pytest.raises(SchemeError, match="key 'scheme' is missing"):
        CheckpointScheme.from_dict({"quant_method": "requant", "version": 1})


def test_groups_must_divide():
    with pytest.raises(SchemeError, match="group_size 64 does not divide in_features 96"):
        WeightScheme(4, 64).groups(96)
