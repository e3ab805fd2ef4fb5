"""The text that perplexity is measured on: a file read whole, or WikiText-2 joined as the field does it."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from requant.errors import InputError

WIKITEXT2 = "wikitext2"


@dataclass(frozen=True)
class Text:
    """``name`` is for people; ``sha256``, of the content in UTF-8, identifies it."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        return sha256(self.content.encode()).hexdigest()


def read_text(spec: str | Path) -> Text:
    """'wikitext2' (the raw test split, rows joined by blank lines as the field does), or a UTF-8 file, read whole with
    every line end as \\n. Raises InputError."""
    if str(spec) == WIKITEXT2 and not Path(spec).exists():
        return Text("WikiText-2 raw test", "\n\n".join(_wikitext2()))
    path = Path(spec)
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: the text can not be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start})") from None
    return Text(path.name, content)


def _wikitext2() -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(
            "--text wikitext2: needs the package datasets (pip install 'vllm-requant[hub]'); or give a file"
        ) from None
    try:
        rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise InputError(f"--text wikitext2: not to be had from the hub ({reason}); or give a file") from None
    return list(rows["text"])
