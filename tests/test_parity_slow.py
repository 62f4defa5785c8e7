"""More of test_parity: the degrees between, and the real model over a real text."""

from pathlib import Path

import jobs
import numpy as np
import pytest
import torch
from factory import HF_NAMES, MODELS, VOCAB_SIZE, checkpoint, hugging_face, meta_tensors, write_hf, write_meta
from ranks import Ranks
from transformers import LlamaForCausalLM

from llama_mp.checkpoint.load import open_source
from llama_mp.layout import Span
from llama_mp.tokenizer_files import read_tokenizer

pytestmark = pytest.mark.slow

TEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
    "it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of "
    "Darkness, it was the spring of hope, it was the winter of despair. In 1859, 17 people had $3.50 each."
)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("mp", [5, 6, 7])
@pytest.mark.parametrize("name", MODELS)
def test_degrees_that_nobody_saves_at(ranks: Ranks, tmp_path: Path, tokenizer_file: Path, name: str, mp: int) -> None:
    """A longer prompt, from 3 shards."""
    config = MODELS[name]
    model = hugging_face(config)
    prompt = [(7 * i * i + 3) % VOCAB_SIZE for i in range(150)]
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0].numpy()
    folder = write_meta(tmp_path, config, meta_tensors(model), 3)
    [found] = ranks.run(mp, jobs.ask, paths=[folder], tokenizer=tokenizer_file, prompt=prompt, num_tokens=2)[0]
    assert relative_error(found.logits, expected) <= 1e-4


@pytest.fixture(scope="module")
def smollm2(smollm2_file: Path) -> LlamaForCausalLM:
    """Hugging Face's model with the weights of the GGUF file."""
    source = open_source(checkpoint(smollm2_file))
    model = hugging_face(source.config)
    state = {}
    for hf_name in model.state_dict():
        name = hf_name.removeprefix("model.")
        for theirs, metas in HF_NAMES.items():
            name = name.replace(theirs, metas)
        if name == "output.weight":
            name = "tok_embeddings.weight"  # tied
        shape = source.shape(name)
        tensor = source.read(name, Span(0, shape[0]), Span(0, shape[-1] if len(shape) == 2 else 1)).float()
        if ".wq." in name or ".wk." in name:  # pairs to halves
            tensor = tensor.view(-1, source.config.head_dim // 2, 2, shape[1]).transpose(1, 2).reshape(shape)
        state[hf_name] = tensor
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("mp", [1, 2, 3, 4, 8])
def test_the_real_model_over_a_real_text(ranks: Ranks, smollm2: LlamaForCausalLM, smollm2_file: Path, mp: int) -> None:
    tokenizer, _ = read_tokenizer(smollm2_file)
    prompt = tokenizer.encode(TEXT, bos=False)
    with torch.inference_mode():
        expected = smollm2(torch.tensor([prompt])).logits[0].numpy()
        greedy = smollm2.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=-1)
    [found] = ranks.run(mp, jobs.ask, paths=[smollm2_file], tokenizer=smollm2_file, prompt=prompt, num_tokens=8)[0]
    assert relative_error(found.logits, expected) <= 1e-4
    assert found.tokens == greedy[0, len(prompt) :].tolist()


@pytest.mark.parametrize("mp", [1, 3])
def test_the_real_model_from_every_format(
    ranks: Ranks, smollm2: LlamaForCausalLM, smollm2_file: Path, tmp_path: Path, mp: int
) -> None:
    """Meta's folder and Hugging Face's hold in fp32 what the GGUF file dequantizes to."""
    source = open_source(checkpoint(smollm2_file))
    paths = [
        smollm2_file,
        write_meta(tmp_path / "meta", source.config, meta_tensors(smollm2), 2),
        write_hf(tmp_path / "hf", smollm2, "200MB"),
    ]
    tokenizer, _ = read_tokenizer(smollm2_file)
    prompt = tokenizer.encode("The three primary colors are", bos=False)
    found = ranks.run(mp, jobs.ask, paths=paths, tokenizer=smollm2_file, prompt=prompt, num_tokens=24)[0]
    assert [f.tokens for f in found] == [found[0].tokens] * len(paths)
    assert all(np.array_equal(f.logits, found[0].logits) for f in found)
