"""A checkpoint's architecture with what only its tensors tell, from headers alone: without weights, without torch."""

from dataclasses import replace

from llama_mp.checkpoint.torch_file import read_pickle
from llama_mp.config import ModelConfig
from llama_mp.errors import RequestError
from llama_mp.gguf_header import read_header
from llama_mp.locate import Checkpoint
from llama_mp.tokenizer_files import read_tokenizer


def whole_config(checkpoint: Checkpoint) -> ModelConfig:
    """The config of `checkpoint` with its vocabulary, and whether its embeddings are tied.

    Raises RequestError where the vocabulary is stated nowhere."""
    config = checkpoint.config
    if checkpoint.kind == "gguf":
        tensors = read_header(checkpoint.files[0]).tensors
        config = replace(config, tied_embeddings="output.weight" not in tensors)
        if "token_embd.weight" in tensors:
            config = replace(config, vocab_size=tensors["token_embd.weight"].shape[0])
    elif checkpoint.kind == "meta":
        config = replace(config, tied_embeddings=not names_output(checkpoint))
    return config if config.vocab_size else replace(config, vocab_size=vocabulary_size(checkpoint))


def names_output(checkpoint: Checkpoint) -> bool:
    """Whether the first shard has an output matrix of its own: its pickle names every tensor, and is not unpickled."""
    return b"output.weight" in read_pickle(checkpoint.files[0])


def vocabulary_size(checkpoint: Checkpoint) -> int:
    """The ids of the tokenizer, which LLaMA 1 and 2 leave the vocabulary's size to."""
    if checkpoint.tokenizer is None:
        raise RequestError(f"{checkpoint.path} states no vocabulary: copy the model's tokenizer there, or give --size")
    tokenizer, _ = read_tokenizer(checkpoint.tokenizer, checkpoint.path, "auto")
    return tokenizer.vocab_size
