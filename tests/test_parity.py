"""The whole way from a checkpoint to tokens against Hugging Face's LlamaForCausalLM, at every degree."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import gguf
import jobs
import numpy as np
import pytest
import torch
from factory import MODELS, hugging_face, meta_tensors, tiny, write_gguf, write_hf, write_meta
from ranks import Ranks

from llama_mp.config import ModelConfig, RopeScaling, load_size

DEGREES = (1, 2, 3, 4, 8)
PROMPT = [1, 17, 300, 4, 250, 99, 42, 330, 5, 6, 7]
NUM_TOKENS = 6


@lru_cache(maxsize=1)
def oracle(config: ModelConfig) -> tuple[np.ndarray, list[int]]:
    """Hugging Face's logits of the prompt, and its greedy tokens."""
    model = hugging_face(config)
    with torch.inference_mode():
        tokens = list(PROMPT)
        logits = model(torch.tensor([tokens])).logits[0].numpy()
        for _ in range(NUM_TOKENS):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return logits, tokens[len(PROMPT) :]


@lru_cache(maxsize=1)
def folders(config: ModelConfig, root: Path) -> list[Path]:
    """Meta folders of all source degrees, and one of Hugging Face in several files."""
    model = hugging_face(config)
    tensors = meta_tensors(model)
    metas = [write_meta(root / config.name / f"mp{mp}", config, tensors, mp) for mp in DEGREES]
    return [*metas, write_hf(root / config.name / "hf", model, "100KB")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("mp", DEGREES)
@pytest.mark.parametrize("name", MODELS)
def test_equals_hugging_face_from_every_source(
    ranks: Ranks, root: Path, tokenizer_file: Path, name: str, mp: int
) -> None:
    config = MODELS[name]
    logits, tokens = oracle(config)
    found = ranks.run(
        mp, jobs.ask, paths=folders(config, root), tokenizer=tokenizer_file, prompt=PROMPT, num_tokens=NUM_TOKENS
    )[0]
    assert [f.tokens for f in found] == [tokens] * (len(DEGREES) + 1)
    assert relative_error(found[0].logits, logits) <= 1e-4
    # The same parameters, whatever they were cut from.
    assert all(np.array_equal(f.logits, found[0].logits) for f in found)


def test_52_heads_at_mp_8(ranks: Ranks, root: Path, tokenizer_file: Path) -> None:
    config = tiny("heads-52-52", 52, 52)
    logits, tokens = oracle(config)
    paths = [write_meta(root / config.name, config, meta_tensors(hugging_face(config)), 4)]
    [found] = ranks.run(8, jobs.ask, paths=paths, tokenizer=tokenizer_file, prompt=PROMPT, num_tokens=NUM_TOKENS)[0]
    assert found.tokens == tokens
    assert relative_error(found.logits, logits) <= 1e-4


# A GGUF file states the factor of Llama 3's scaling alone; its other constants are those of Llama 3.1.
GGUF_MODELS = MODELS | {"rope": replace(MODELS["rope"], rope_scaling=RopeScaling(factor=8.0), rope_theta=500000.0)}


# What is read from a GGUF file is proved to be equal at every degree; the middle ones here take their time.
@pytest.mark.parametrize("mp", [1, *(pytest.param(mp, marks=pytest.mark.slow) for mp in (2, 4)), 3, 8])
@pytest.mark.parametrize("name", GGUF_MODELS)
def test_gguf_equals_hugging_face(ranks: Ranks, root: Path, tokenizer_file: Path, name: str, mp: int) -> None:
    config = GGUF_MODELS[name]
    logits, tokens = oracle(config)
    path = root / f"{name}.gguf"
    if not path.exists():
        write_gguf(path, config, meta_tensors(hugging_face(config)), gguf.GGMLQuantizationType.F32)
    [found] = ranks.run(mp, jobs.ask, paths=[path], tokenizer=tokenizer_file, prompt=PROMPT, num_tokens=NUM_TOKENS)[0]
    assert found.tokens == tokens
    assert relative_error(found.logits, logits) <= 1e-4


@pytest.mark.parametrize("mp", [3, 6])
def test_the_shape_of_7b_without_its_bytes(ranks: Ranks, mp: int) -> None:
    assert all(ranks.run(mp, jobs.shapes_agree, config=load_size("7B")))
