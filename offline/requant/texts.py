"""The text that perplexity is measured on: a file read whole, or WikiText-2 joined as the field does it."""

from dataclasses import dataclass
from hashlib import sha256
from io import StringIO
from pathlib import Path

from requant.errors import InputError

WIKITEXT2 = "wikitext2"


@dataclass(frozen=True)
class Text:
    """``name`` is for people; ``sha256``, of the file's bytes or of the joined rows, identifies the content."""

    name: str
    content: str
    sha256: str


def read_text(spec: str | Path) -> Text:
    """'wikitext2' (the raw test split, rows joined by blank lines as the field does), or a UTF-8 file, read whole with
    every line end as \\n. Raises InputError."""
    if str(spec) == WIKITEXT2 and not Path(spec).exists():
        joined = "\n\n".join(_wikitext2())
        return Text("WikiText-2 raw test", joined, sha256(joined.encode()).hexdigest())
    path = Path(spec)
    try:
        raw = path.read_bytes()
        content = StringIO(raw.decode(), newline=None).read()
    except OSError as error:
        raise InputError(f"{path}: the text can not be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start})") from None
    return Text(path.name, content, sha256(raw).hexdigest())


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
