"""What a flags class accepts from JSON and from Python callers."""

from pathlib import Path
from typing import Any

import pytest

from llama_mp.config import RunConfig, SamplingConfig
from llama_mp.errors import RequestError
from llama_mp.flags import checked


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("size", None, None),
        ("size", "7B", "7B"),
        ("ckpt_dir", "a/b", Path("a/b")),
        ("ckpt_dir", Path("a"), Path("a")),
        ("ckpt_dir", "~/x", Path.home() / "x"),
        ("dtype", "bf16", "bf16"),
        ("max_seq_len", 5, 5),
        ("step_timeout", 5, 5),
    ],
)
def test_takes_what_fits(name: str, value: Any, expected: Any) -> None:
    assert checked(RunConfig, {name: value}) == {name: expected}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dtype", "fp8", "dtype is 'fp8', but must be one of auto, fp32"),
        ("device", "gpu", "device is 'gpu', but must be one of auto, cpu, cuda"),
        ("max_batch_size", "8", "max_batch_size is '8', but must be a whole number"),
        ("max_batch_size", True, "max_batch_size is True"),
        ("max_batch_size", 2.0, "max_batch_size is 2.0"),
        ("ckpt_dir", 3, "ckpt_dir is 3, but must be a path or None"),
        ("sise", "7B", "unknown field 'sise' \\(did you mean size\\?\\); valid: size, "),
    ],
)
def test_refuses_what_does_not(name: str, value: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        checked(RunConfig, {name: value})


@pytest.mark.parametrize("value", ["a", ["a"], ("a",)])
def test_one_text_or_several(value: Any) -> None:
    assert SamplingConfig().override({"stop": value}).stop == ("a",)
    with pytest.raises(RequestError, match="stop is 3, but must be a text or a list of texts"):
        SamplingConfig().override({"stop": 3})
