"""``quantization_config`` of a checkpoint -> a method for each layer of the model."""

import re
from typing import Any

import torch
import vllm
from requant_kernels.errors import SchemeError
from requant_kernels.scheme import OUTPUT_HEAD, QUANT_METHOD, CheckpointScheme, LayerScheme, check_output_head
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from vllm_requant.versions import check_version

_LOG = init_logger(__name__)
# Linear layers that are never rounded in flight: routers, gates of linear attention, what vLLM's latent attention takes
# apart, and the output heads of classifiers and reward models.
KEPT = (
    "gate",
    "router",
    "shared_expert_gate",
    "in_proj_a",
    "in_proj_b",
    "in_proj_ba",
    "kv_b_proj",
    "score",
    "classifier",
)
# Nor what turns images and sound into inputs of a language model, whatever vLLM's models call it.
TOWER = re.compile(r"visual|(vision|audio|vit)_\w+|embed_(vision|audio)|(\w+_)?projector|connector|resampler|vpm|apm")


class RequantConfig(QuantizationConfig):  # type: ignore[misc]
    """What vLLM asks about a requant checkpoint, or about a model to be rounded in flight."""

    def __init__(self, scheme: CheckpointScheme | None = None) -> None:
        """vLLM gives no ``scheme`` where nothing declares one: ``--quantization requant`` on an unquantized model.

        Raises RuntimeError for an untested vLLM.
        """
        check_version(vllm.__version__)
        super().__init__()
        self.scheme = scheme
        self.in_flight = scheme is None
        self.mappers: list[Any] = []
        self.hf_config: Any = None
        self._asked: set[str] = set()  # names of layers, as a pattern may mean them

    def __repr__(self) -> str:
        return f"RequantConfig({self.scheme})"

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # decoding to an ordinary matrix runs wherever torch does

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RequantConfig":
        """Raises RuntimeError for an untested vLLM, SchemeError for a configuration that is not understood."""
        return cls(CheckpointScheme.from_dict(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """vLLM calls it once, before the model is built. A scheme that config.json does not declare, from
        ``--hf-overrides``, is one to round by. Raises SchemeError where it declares another one."""
        from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

        file = get_hf_file_to_dict("config.json", model_name, revision)
        if file is None and hf_config is not None and hf_config.name_or_path:  # where --hf-config-path points
            file = get_hf_file_to_dict("config.json", hf_config.name_or_path)
        stored = file.get("quantization_config") if file else None
        ours = stored and stored.get("quant_method") == QUANT_METHOD
        if ours and CheckpointScheme.from_dict(stored) != self.scheme:
            raise SchemeError(
                "quantization_config: this checkpoint is quantized, as its config.json says; neither --hf-overrides "
                "nor --hf-config-path can say otherwise"
            )
        self.in_flight |= file is not None and not stored
        if self.in_flight and self.scheme and self.scheme.for_layer(OUTPUT_HEAD) not in (None, self.scheme.scheme):
            raise SchemeError(f"{OUTPUT_HEAD}: an output head is not rounded in flight; leave its override out")
        self.hf_config = hf_config

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.mappers.append(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        # These modules import all of vLLM's layers, which a plugin must not do while it registers.
        from vllm.config import get_current_vllm_config_or_none
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        from vllm_requant.linear import DenseSparseLinearMethod, W8A8LinearMethod
        from vllm_requant.moe import experts_method
        from vllm_requant.names import unfused
        from vllm_requant.tensor_parallel import refuse_degree

        current = get_current_vllm_config_or_none()
        if current and current.model_config:
            refuse_degree(current)
        prefix = prefix.removeprefix(".")  # some models of vLLM call their head ".lm_head" (stablelm.py)
        if prefix.endswith(".kv_b_proj"):
            _refuse_compiled(prefix)
        if isinstance(layer, LinearBase):
            names = unfused(prefix, self.packed_modules_mapping)
            scheme = self._common_scheme(prefix, names)
            if scheme is None or (self.in_flight and _kept(prefix)):
                return UnquantizedLinearMethod()
            if self.in_flight:
                scheme = self._roundable(scheme, layer.input_size, prefix)
            kind = W8A8LinearMethod if scheme.activations else DenseSparseLinearMethod
            # of several stages none has all layers
            whole = not current or current.parallel_config.pipeline_parallel_size == 1
            tell = {"when_built": self.tell_unmatched} if self.in_flight and whole else {}
            return kind(scheme, names, in_flight=self.in_flight, **tell)
        if isinstance(layer, RoutedExperts):
            method = experts_method(layer, prefix, self._common_scheme)
            if method and self.in_flight:
                raise SchemeError(
                    f'{prefix}: experts can not be rounded in flight; make a checkpoint, or ignore them ("ignore" of '
                    "--hf-overrides)"
                )
            return method
        if isinstance(layer, VocabParallelEmbedding) and not self.in_flight:
            return self._vocabulary_method(layer, prefix)
        return None

    def tell_unmatched(self) -> None:
        """Warns, once, of each pattern that no layer of the model has matched. It is no refusal, because vLLM does not
        ask about every layer that a configuration may rightly name: routers, say, or those that only a draft has."""
        asked, self._asked = self._asked, set()
        patterns = (*self.scheme.overrides, *self.scheme.ignore) if self.scheme and asked else ()
        for pattern in patterns:
            if not any(re.fullmatch(pattern, name) for name in (*asked, OUTPUT_HEAD)):
                _LOG.warning("quantization_config: %r matches no layer that could be rounded", pattern)

    def _roundable(self, scheme: LayerScheme, columns: int, prefix: str) -> LayerScheme:
        """By which the layer ``prefix`` of ``columns`` inputs is rounded; the log says so once. Raises SchemeError."""
        from vllm_requant.in_flight import fitted, refuse_unroundable

        if self.scheme is None:
            scheme = fitted(scheme, columns)
        refuse_unroundable(scheme, columns, prefix)
        _LOG.info_once(
            "linear layers are rounded to nearest while they are loaded: %s (`requant quantize` loses less)",
            scheme.describe(),
        )
        return scheme

    def _vocabulary_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """For the output head, and for embeddings where they are tied to it. Raises SchemeError for a scheme that no
        output head can have."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from vllm_requant.vocabulary import EmbeddingMethod, OutputHeadMethod

        assert self.scheme is not None
        head = isinstance(layer, ParallelLMHead)
        if head:
            prefix = prefix or OUTPUT_HEAD  # which some models of vLLM do not name (exaone_moe.py)
        elif not self._tied:
            return None
        # embeddings have no scheme of their own, and in some models of vLLM no name
        scheme = self._common_scheme(prefix, [prefix]) if head else self.scheme.for_layer(OUTPUT_HEAD)
        if scheme is None:
            return None
        check_output_head(scheme, prefix if head else OUTPUT_HEAD)
        _refuse_score(prefix if head else OUTPUT_HEAD)
        if head:
            return OutputHeadMethod(scheme, [prefix])
        _refuse_draft(prefix)
        return EmbeddingMethod(scheme, [prefix or "embed_tokens"])

    @property
    def _tied(self) -> bool:
        """Asked late: vLLM unties embeddings where the checkpoint holds a head of its own."""
        config = self.hf_config
        return config is not None and bool(config.get_text_config().tie_word_embeddings)

    def _common_scheme(self, prefix: str, names: list[str]) -> LayerScheme | None:
        """The scheme of the layers ``names`` that vLLM fuses into ``prefix``. Raises SchemeError where they differ."""
        from vllm_requant.in_flight import DEFAULT
        from vllm_requant.names import original_names, scheme_of

        self._asked.update(old for name in names for old in original_names(name, self.mappers))
        schemes = [scheme_of(name, self.scheme or DEFAULT, self.mappers) for name in names]
        for name, scheme in zip(names, schemes, strict=True):
            if scheme != schemes[0]:
                raise SchemeError(
                    f"{prefix}: vLLM fuses {names[0]} and {name}, so both must be quantized alike or both ignored"
                )
        return schemes[0]


def _kept(prefix: str) -> bool:
    parts = prefix.split(".")
    return parts[-1] in KEPT or any(map(TOWER.fullmatch, parts))


def _refuse_compiled(prefix: str) -> None:
    """Raises SchemeError for ``prefix``, a layer of latent attention, where vLLM compiles for a CPU: the graph that
    PyTorch makes reads a router's scores before oneDNN has written them (0.32, PyTorch 2.13; deepseek_v3)."""
    from vllm.config import CompilationMode, get_current_vllm_config_or_none
    from vllm.platforms import current_platform

    current = get_current_vllm_config_or_none()
    if current and current_platform.is_cpu() and current.compilation_config.mode != CompilationMode.NONE:
        raise SchemeError(
            f"{prefix}: quantized models with latent attention come out wrong where vLLM compiles them for a CPU; add "
            """--enforce-eager -cc.custom_ops='["-rotary_embedding"]'"""
        )


def _refuse_score(name: str) -> None:
    """Raises SchemeError where vLLM would make a reranker's head of rows of the quantized output head ``name``, which
    it reads as if they were weights."""
    from vllm.config import get_current_vllm_config_or_none

    current = get_current_vllm_config_or_none()
    model = current.model_config if current else None
    configs = (model.hf_config, model.hf_text_config) if model and model.convert_type == "classify" else ()
    if any(getattr(config, "classifier_from_token", None) for config in configs):
        raise SchemeError(
            f"{name}: a classifier can not be made of a quantized output head (classifier_from_token); quantize "
            "without --quantize-lm-head"
        )


def _refuse_draft(prefix: str) -> None:
    """Raises SchemeError for the embeddings ``prefix`` where a draft would share them if its own width were that of
    their weight, which is an int8 layout: vLLM would leave the draft's uninitialised."""
    from vllm.config import get_current_vllm_config_or_none

    current = get_current_vllm_config_or_none()
    speculative = current.speculative_config if current else None
    if speculative and speculative.use_eagle() and speculative.method != "mtp":
        raise SchemeError(
            f"{prefix or 'embed_tokens'}: quantized embeddings can not be shared with a draft of method "
            f"{speculative.method!r}; quantize without --quantize-lm-head, or leave speculative decoding out"
        )
