"""The logits of two checkpoints beside each other: what tells a fault from rounding, and when it cannot be told."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import held
import pytest
import torch
from damage import change, checked, meta
from factory import MODELS, hugging_face, meta_tensors, tiny, write_hf, write_meta
from ranks import alone
from running import run
from test_verify import VERIFY

from llama_mp.checkpoint.fault import Difference
from llama_mp.checkpoint.verify import LogitsCheck
from llama_mp.compare_logits import compare_logits
from llama_mp.layout import global_shapes
from llama_mp.memory import parameters

PADDED = MODELS["heads-9-3"]
EQUAL = (True, "equal to the last bit after each of 16 tokens")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """One model in Meta's format over three shards, and in Hugging Face's."""
    model = hugging_face(PADDED)
    return write_meta(tmp_path / "meta", PADDED, meta_tensors(model), 3), write_hf(tmp_path / "hf", model)


def test_other_shards_and_another_format_make_the_same_logits(pair: tuple[Path, Path]) -> None:
    assert alone(compare_logits, *pair) == EQUAL


def test_one_value_changes_them(pair: tuple[Path, Path]) -> None:
    change(pair[0], 1, "layers.1.attention.wv.weight", (0, 0), 7.0)
    equal, text = alone(compare_logits, *pair)
    assert equal is False
    assert f" of {16 * PADDED.vocab_size} differ, by " in text


def test_what_no_tensor_shows(pair: tuple[Path, Path]) -> None:
    """All values are equal, and the model is another one; from end to end."""
    folder, other = pair
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | {"norm_eps": 0.01}))
    done = run(sys.executable, VERIFY, folder, "--against", other, "--json", LLAMA_MP_THREADS="2")
    assert (done.code, done.error) == (1, "other logits: keep the one that you trust")
    told = json.loads(done.stdout)
    assert told["differences"] == [] and told["logits"]["equal"] is False
    assert " differ, by " in told["logits"]["text"]


def test_how_it_is_told(pair: tuple[Path, Path]) -> None:
    report = checked(pair[0], against=pair[1])
    first, second = replace(report, logits=LogitsCheck(*EQUAL)).lines
    assert [first] == report.lines and second == f"logits: {EQUAL[1]}"
    unknown = replace(report, logits=LogitsCheck(None, "why"))
    assert unknown.failure is None and unknown.lines[1:] == ["logits: not compared: why"]
    other = replace(report, differences=[Difference("a", "differs")], logits=LogitsCheck(False, "9 of 9 differ"))
    assert other.failure == f"1 difference from {pair[1]} and other logits: keep the one that you trust"
    assert other.lines == ["a: differs", "logits: 9 of 9 differ"]


def test_faults_are_not_computed_with(pair: tuple[Path, Path]) -> None:
    change(pair[0], 0, "norm.weight", 3, float("nan"))
    done = run(sys.executable, VERIFY, *pair[:1], "--against", pair[1])
    assert done.code == 1 and "logits" not in done.stdout


def test_when_they_are_not_compared(pair: tuple[Path, Path], tmp_path: Path) -> None:
    few = meta(tmp_path / "few", 2, tiny("few", 4, 4))
    other = meta(tmp_path / "other", 1, replace(PADDED, vocab_size=330))
    assert compare_logits(few, few) == (None, "few has 4 attention heads, and this takes 8")
    assert compare_logits(pair[0], other) == (None, "the vocabularies have 331 and 330 tokens")
    equal, text = compare_logits(pair[0], tmp_path)
    assert equal is None and str(tmp_path) in text
    equal, text = alone(held.without_memory, *pair)
    assert equal is None
    assert text.startswith("the vocabulary and a block of heads-9-3 take 0.00 GB in fp32, and 0.00 GB of main memory")


def test_one_block_of_one_of_them_is_held(tmp_path: Path) -> None:
    sizes = {"dim": 512, "head_dim": 64, "hidden_dim": 2816, "num_layers": 8, "vocab_size": 4000}
    config = replace(MODELS["mha"], **sizes)
    tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in global_shapes(config).items()}
    one, three = (write_meta(tmp_path / str(mp), config, tensors, mp) for mp in (1, 3))
    measured = alone(held.comparing_logits, one, three)
    planned = parameters(config, 0, 1, "none", "fp32", deterministic=True)
    assert measured["equal"] is True
    assert measured["peak"] < planned.block + planned.others + 40e6 < 8 * planned.block
