"""The client's examples run, each on a TPM of its own; and so does what its page shows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples" / "client").glob("*.py"))
PAGE = ROOT / "docs" / "client.md"
LIMIT_S = 60


def run(program, **environment):
    ended = subprocess.run(
        [sys.executable, program],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


EXPECTED = {
    "delegation": "TPM_BADINDEX",
    "many_tasks": "PCR 11 is",
    "nv_area": "TPM_AREA_LOCKED",
    "quote": "PCR 10 was",
    "seal_to_pcrs": "TPM_WRONGPCRVAL",
    "sign": "signed:",
    "transport": "the TPM has signed what went through",
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example, tpm12_simulator):
    assert EXPECTED[example.stem] in run(example, TPM_DEVICE=str(tpm12_simulator.socket))


def test_page_names_every_example():
    text = PAGE.read_text()
    assert all(f"../examples/client/{example.name}" in text for example in EXAMPLES)


def test_code_of_the_page_runs_in_its_order(tpm12_simulator, tmp_path):
    program = tmp_path / "page.py"
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    program.write_text("\n".join(blocks))
    assert "PCR 10:" in run(program, TPM_DEVICE=str(tpm12_simulator.socket))
