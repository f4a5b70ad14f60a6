"""Each statement of the README beside the tests that prove it; figures are in page_figures.py."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
if not README.is_file():
    pytest.skip("these tests run from an installed package, without README.md", allow_module_level=True)

# words of the README, and in lines that are indented "file: tests" that prove what is said there, without their "test_"
PROOFS: dict[str, list[str]] = {}
for line in (ROOT / "tests" / "readme_proofs.txt").read_text().splitlines():
    if line.startswith(" "):
        PROOFS[next(reversed(PROOFS))].append(line.strip())
    elif not line.startswith("#"):
        PROOFS[line] = []


def paragraphs() -> list[str]:
    """Without headings, pictures, the tables that are generated, and the heads of tables; a row of a table is one."""
    text = re.sub(r"<!-- table:.*?<!-- end -->", "", README.read_text(), flags=re.DOTALL)
    text = re.sub(r"^(\|.*\|)$", r"\n\1\n", text, flags=re.MULTILINE)
    code = re.findall(r"```.*?```", text, re.DOTALL)
    rest = re.split(r"\n\s*\n", re.sub(r"```.*?```", "\n\n", text, flags=re.DOTALL))
    no_claim = re.compile(r"#|!\[|\|[ -|]*$|\| \| CPU kernels|\| \[")
    return [" ".join(block.split()) for block in [*code, *rest] if block.strip() and not no_claim.match(block.strip())]


def test_every_paragraph_is_proved() -> None:
    unproved = [text for text in paragraphs() if not any(words in text for words in PROOFS)]
    assert not unproved, "\n\n".join(unproved)


@pytest.mark.parametrize("words", PROOFS)
def test_the_proof_is_there(words: str) -> None:
    assert words in " ".join(README.read_text().split()), "the README says something else now: so may the tests"
    assert PROOFS[words]
    for place in PROOFS[words]:
        name, _, tests = place.partition(": ")
        tree = ast.parse((ROOT / "tests" / f"test_{name}.py").read_text())
        found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert not {f"test_{test}" for test in tests.split()} - found, place
