"""Where a model comes from: a local folder, a GGUF file, or a name on the hub; refused early, in one line."""

import io
import json
import re
import shutil
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import is_progress_bar_enabled

from requant.architectures import MULTIMODAL, architecture_of, refuse_unknown
from requant.errors import InputError
from requant.models import as_stored, auto_class

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
# All that belongs to a model besides its weights and config.json; copied byte for byte.
_SIDECARS = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
    "*processor_config.json",
)


@dataclass(frozen=True)
class Source:
    """``name``: what a model card may show. ``raw``: config.json as it stands, or what a GGUF declares. ``gguf``: the
    file in ``folder`` that holds everything, or None."""

    name: str
    folder: Path
    raw: dict[str, Any] = field(repr=False)
    gguf: str | None = None

    @property
    def path(self) -> Path:
        """What must not be overwritten."""
        return self.folder / self.gguf if self.gguf else self.folder

    def where(self) -> dict[str, Any]:
        """The arguments by which transformers finds it."""
        return {"pretrained_model_name_or_path": self.folder} | ({"gguf_file": self.gguf} if self.gguf else {})

    def tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            return AutoTokenizer.from_pretrained(**self.where())
        except Exception as error:  # the tokenizers library raises bare exceptions
            raise InputError(f"{self.folder}: its tokenizer can not be loaded ({_first_line(error)})") from None


def resolve(model: str | Path) -> Source:
    """A folder with config.json, a GGUF file or a folder with just one, or a hub name. Raises InputError."""
    if not str(model):  # Path("") would be the current folder, which nobody meant
        raise InputError("the name of the model is empty")
    path = Path(model)
    if path.is_file() and path.suffix == ".gguf":
        return _gguf(path)
    if path.is_dir():
        ggufs = list(path.glob("*.gguf"))
        if (path / "config.json").is_file():
            return Source(path.resolve().name, path, _read_raw(path / "config.json"))
        if len(ggufs) == 1:
            return _gguf(ggufs[0])
        raise InputError(f"{model}: holds no config.json" + (f" and {len(ggufs)} GGUF files: name one" * bool(ggufs)))
    if path.exists() or not _HUB_NAME.fullmatch(str(model)):
        raise InputError(f"{model}: no such model folder")
    try:
        folder = snapshot_download(str(model), allow_patterns=["config.json", "README.md", *_WEIGHTS, *_SIDECARS])
    except (OSError, ValueError) as error:
        raise InputError(f"{model}: no such folder, and not to be had from the hub ({_first_line(error)})") from None
    return Source(str(model), Path(folder), _read_raw(Path(folder) / "config.json"))


def _gguf(path: Path) -> Source:
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # whatever is wrong in it, and a missing package
        raise InputError(f"{path}: not readable as GGUF ({_first_line(error)})") from None
    return Source(path.stem, path.parent, config.to_dict(), path.name)


def _read_raw(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({_first_line(error)})") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise InputError(f"{path}: names no model_type")
    return raw


def read_config(source: Source) -> PreTrainedConfig:
    """Raises InputError for whatever is not an unquantized causal LM of a supported architecture."""
    refuse_unusable(source)
    return supported_config(source, str(source.folder))


def supported_config(source: Source, where: str) -> PreTrainedConfig:
    """Raises InputError, which ``where`` begins, for an architecture that is not supported."""
    refuse_unknown(source.raw["model_type"], where)  # first: transformers may not know it either
    config = auto_config(source)
    architecture_of(config)
    return config


def refuse_unusable(source: Source) -> None:
    """Raises InputError unless ``source`` is an unquantized causal language model."""
    names = source.raw.get("architectures") or []
    kinds = ("ForCausalLM", "ForConditionalGeneration") if source.raw["model_type"] in MULTIMODAL else "ForCausalLM"
    if names and not any(str(name).endswith(kinds) for name in names):
        raise InputError(f"{source.folder}: not a causal language model, but {', '.join(map(str, names))}")
    quantization = source.raw.get("quantization_config")
    if quantization is not None:
        named = quantization if isinstance(quantization, dict) else {}
        method = named.get("quant_method", "an unnamed method")
        raise InputError(f"{source.folder}: its weights are already quantized ({method}); start from the original")


def load(source: Source, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model on the CPU in ``dtype``, by default as it is stored (a GGUF is decoded to bf16). Raises InputError
    where weights are absent, which transformers would fill with random numbers, or unknown, which it would drop."""
    kwargs = source.where() | {"output_loading_info": True}
    if source.gguf:
        kwargs |= {
            "config": auto_config(source),
            "quantization_config": GgufConfig(dequantize=True),
            "dtype": dtype or torch.bfloat16,
        }
    else:
        kwargs |= {"use_safetensors": True, "dtype": dtype or "auto"}
    # the bar of a GGUF's tensors does not ask transformers' own switch
    silenced = bool(source.gguf) and not is_progress_bar_enabled()
    try:
        with redirect_stderr(io.StringIO()) if silenced else nullcontext():
            model, info = auto_class(auto_config(source)).from_pretrained(**kwargs)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{source.folder}: can not be loaded ({_first_line(error)})") from None
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{source.folder}: {missing[0]} is missing ({len(missing)} tensors in all)")
    if unknown := sorted(info["unexpected_keys"]):
        raise InputError(f"{source.folder}: {unknown[0]} belongs to no {model.config.model_type} of transformers")
    # it may be silent, or wrong: transformers ties nothing where the files hold a head of its own
    model.config.tie_word_embeddings = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return as_stored(model)


def write_sidecars(source: Source, folder: Path) -> None:
    """Tokenizer, chat template and generation config into ``folder``: copied, or made from what a GGUF declares."""
    if source.gguf:
        source.tokenizer().save_pretrained(folder)
        GenerationConfig.from_model_config(auto_config(source)).save_pretrained(folder)
        return
    for pattern in _SIDECARS:
        for path in sorted(source.folder.glob(pattern)):
            target = folder / path.relative_to(source.folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def auto_config(source: Source) -> PreTrainedConfig:
    """The configuration as transformers understands it. Raises InputError where it does not."""
    try:
        return AutoConfig.for_model(**source.raw) if source.gguf else AutoConfig.from_pretrained(source.folder)
    except Exception as error:  # a wrong value in it may surface as anything
        raise InputError(f"{source.folder}: its configuration can not be read ({_first_line(error)})") from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
