"""The range of vLLM versions that the tests have run on, stated once."""

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

SUPPORTED = SpecifierSet(">=0.30,<0.34")


def check_version(version: str) -> None:
    """Raises RuntimeError, one line, where ``version`` of vLLM is outside the tested range."""
    try:
        known = SUPPORTED.contains(Version(version), prereleases=True)
    except InvalidVersion:
        known = False
    if not known:
        raise RuntimeError(
            f"vllm-requant is tested with vLLM {SUPPORTED} and refuses vLLM {version}: install such a vLLM, or a "
            "vllm-requant made for yours"
        )
