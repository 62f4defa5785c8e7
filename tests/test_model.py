"""What building a model must not cost. What it computes is compared with Hugging Face's in test_parity.py."""

from pathlib import Path

import pytest
from running import ROOT, torchrun

SCRIPT = """
import sys
from llama_mp.config import RunConfig, load_size
from llama_mp.model import build
from llama_mp.parallel import connect
world = connect(RunConfig(device="cpu"))
model = build(load_size("smollm2-135m"), world.size)
assert all(parameter.is_meta for parameter in model.parameters())
heavy = {"torch._dynamo", "sympy"} & set(sys.modules)
world.close()
assert not heavy, f"{heavy} imported: seconds and 70 MB of every rank"
"""


@pytest.mark.parametrize("mp", [1, 2])
def test_a_model_is_built_without_torchs_compiler(tmp_path: Path, mp: int) -> None:
    script = tmp_path / "build.py"
    script.write_text(SCRIPT)
    done = torchrun(mp, script, PYTHONPATH=str(ROOT))
    assert done.code == 0, done.stderr
