"""The house rules that imports can break: offline -> kernels <- vllm_requant, one idea a module."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "requant_kernels": ROOT / "kernels" / "requant_kernels",
    "requant": ROOT / "offline" / "requant",
    "vllm_requant": ROOT / "vllm_requant",
}
FORBIDDEN = {
    "requant_kernels": {"requant", "vllm_requant", "vllm", "transformers"},
    "requant": {"vllm_requant", "vllm"},
    "vllm_requant": {"requant"},
}
LINES = 400


def modules(package: str) -> list[Path]:
    return sorted(PACKAGES[package].rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""


@pytest.mark.parametrize("package", PACKAGES)
def test_dependencies_point_one_way(package):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(package)
        for name in imported(ast.parse(path.read_text()))
        if name.split(".")[0] in FORBIDDEN[package]
    ]
    assert not wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_outgrows_one_idea(package):
    long = {
        str(path.relative_to(ROOT)): n for path in modules(package) if (n := len(path.read_text().split("\n"))) > LINES
    }
    assert not long


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_says_what_it_is(package):
    silent = [
        str(path.relative_to(ROOT)) for path in modules(package) if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent
