"""What is served: a folder and the dtype of activations, as `MODEL@float32` names them."""

from dataclasses import dataclass
from pathlib import Path

from requant.errors import InputError

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Served:
    path: Path
    dtype: str

    @classmethod
    def parse(cls, text: str) -> "Served":
        """Activations are bfloat16 where no dtype is named. Raises InputError where no model is there."""
        path, _, dtype = text.rpartition("@")
        served = cls(Path(path), dtype) if path and dtype in DTYPES else cls(Path(text), DTYPES[0])
        if not (served.path / "config.json").is_file():
            raise InputError(f"{text}: no folder with config.json; a dtype after @ is one of {', '.join(DTYPES)}")
        return served

    @property
    def name(self) -> str:
        return f"{self.path.resolve().name}, {self.dtype}"

    def disk_bytes(self) -> int:
        """Of its weights in safetensors; of the whole folder where they are in another format."""
        files = list(self.path.glob("*.safetensors")) or [file for file in self.path.iterdir() if file.is_file()]
        return sum(file.stat().st_size for file in files)


def parse_all(texts: list[str]) -> list[Served]:
    """Raises InputError where two would share a name, which tells them apart in every table."""
    models = [Served.parse(text) for text in texts]
    names = [served.name for served in models]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{twice}: two models of this name; rename a folder, or choose another dtype")
    return models
