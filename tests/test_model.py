"""What building a model must not cost. What it computes is compared with Hugging Face's in test_parity.py."""

import sys

import pytest
from ranks import Ranks

from llama_mp.config import RunConfig, load_size
from llama_mp.model import build
from llama_mp.parallel import connect


def check_building() -> None:
    """In a rank in which nothing has run."""
    world = connect(RunConfig(device="cpu"))
    model = build(load_size("smollm2-135m"), world.size)
    assert all(parameter.is_meta for parameter in model.parameters())
    heavy = {"torch._dynamo", "sympy"} & set(sys.modules)
    world.close()
    assert not heavy, f"{heavy} imported: seconds and 70 MB of every rank"


@pytest.mark.parametrize("mp", [1, 2])
def test_a_model_is_built_without_torchs_compiler(mp: int) -> None:
    young = Ranks()
    young.run(mp, check_building)
    young.stop()
