"""Tiny random models, and checkpoints written from them: what the tests compare with, and what they load.

The oracle is Hugging Face's LlamaForCausalLM. Its q and k rows stand in halves of a head, Meta's in pairs.
"""

import json
from dataclasses import replace
from pathlib import Path

import gguf
import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama_mp.config import ModelConfig, RopeScaling
from llama_mp.layout import Shard, global_shapes, shards
from llama_mp.locate import Checkpoint, config_of, files_of
from llama_mp.params_json import params_of
from llama_mp.rope import scaled_frequencies

VOCAB_SIZE = 331  # prime: padded at every degree


def tiny(name: str, num_heads: int, num_kv_heads: int, **other: object) -> ModelConfig:
    """A two-layer model whose widths divide by as little as possible."""
    fields = {"hidden_dim": 90, "vocab_size": VOCAB_SIZE, "context_length": 256, "embedding_axis": 0} | other
    return ModelConfig(
        name=name, dim=num_heads * 8, num_layers=2, num_heads=num_heads, num_kv_heads=num_kv_heads, **fields
    )


MODELS = {
    config.name: config
    for config in (
        tiny("mha", 8, 8, embedding_axis=1),
        tiny("gqa", 8, 2, rope_theta=500000.0),
        tiny("tied", 8, 4, tied_embeddings=True),
        tiny("rope", 8, 2, rope_scaling=RopeScaling(factor=8.0, original_context_length=64), rope_theta=500.0),
        tiny("heads-9-3", 9, 3, tied_embeddings=True),
        tiny("heads-13-13", 13, 13),
    )
}


def hugging_face(config: ModelConfig, seed: int = 0) -> LlamaForCausalLM:
    """The oracle for `config`, in fp32, with random weights large enough that its logits differ clearly."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling:
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_context_length,
        }
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=config.dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.hidden_dim,
            vocab_size=config.vocab_size,
            rms_norm_eps=config.norm_eps,
            rope_parameters=rope,
            max_position_embeddings=config.context_length,
            tie_word_embeddings=config.tied_embeddings,
            initializer_range=0.2,
            attn_implementation="eager",
        )
    ).eval()


HF_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
}


def meta_tensors(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The model's weights in Meta's names and row order, unsplit."""
    config = model.config
    tensors = {}
    for hf_name, tensor in model.state_dict().items():
        if hf_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = hf_name.removeprefix("model.")
        for old, new in HF_NAMES.items():
            name = name.replace(old, new)
        if ".wq." in name or ".wk." in name:
            halves = tensor.view(-1, 2, config.head_dim // 2, config.hidden_size)
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        tensors[name] = tensor.clone()
    return tensors


def random_tensors(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights in Meta's names, unsplit, where no oracle computes with them."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in global_shapes(config).items()}


def cut(shard: Shard, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """One parameter of one rank, zeros where nothing is placed."""
    sources = [p.source for p in shard.placements] or list(tensors)
    dtype = tensors[sources[0]].dtype
    parameter = torch.zeros(shard.shape, dtype=dtype)
    matrix = parameter if parameter.dim() == 2 else parameter[:, None]
    for p in shard.placements:
        whole = tensors[p.source] if tensors[p.source].dim() == 2 else tensors[p.source][:, None]
        part = whole[slice(*p.rows), slice(*p.cols)]
        matrix[p.row : p.row + len(p.rows), p.col : p.col + len(p.cols)] = part
    return parameter


def write_meta(folder: Path, config: ModelConfig, tensors: dict[str, torch.Tensor], mp: int) -> Path:
    """A Meta folder of degree `mp`; embeddings on axis 0 where the model dimension does not divide."""
    axis = config.embedding_axis if config.dim % mp == 0 else 0
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(mp):
        held = shards(config, rank, mp, embedding_axis=axis)
        torch.save({name: cut(shard, tensors) for name, shard in held.items()}, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params_of(config, mp=mp, embedding_axis=axis)))
    return folder


def write_hf(folder: Path, model: LlamaForCausalLM, max_shard_size: str = "5GB") -> Path:
    """A folder as transformers writes it; of many files with an index where `max_shard_size` ("60KB") is small."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def hf_cache(folder: Path, repository: Path) -> Path:
    """A model's folder as Hugging Face's cache keeps it: the files of `folder` moved to blobs, links in a snapshot."""
    snapshot = repository / "snapshots" / "0123abcd"
    for path in (snapshot, repository / "blobs", repository / "refs"):
        path.mkdir(parents=True)
    (repository / "refs" / "main").write_text(snapshot.name)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(repository / "blobs" / f"{number:04x}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{number:04x}"))
    return repository


GGUF_NAMES = {
    "tok_embeddings": "token_embd",
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}


def write_gguf(
    path: Path, config: ModelConfig, tensors: dict[str, torch.Tensor], kind: gguf.GGMLQuantizationType
) -> Path:
    """A GGUF file, written by the gguf package, its matrices quantized as `kind`; without a tokenizer."""
    writer = gguf_writer(path, config)
    if config.rope_scaling:  # as llama.cpp has it: what each frequency is divided by
        factors = scaled_frequencies(replace(config, rope_scaling=None)) / scaled_frequencies(config)
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    for name, tensor in tensors.items():
        plain = tensor.dim() == 1
        data = tensor.numpy() if plain else gguf.quants.quantize(tensor.numpy(), kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=gguf.GGMLQuantizationType.F32 if plain else kind)
    return finish_gguf(writer, path)


def gguf_writer(path: Path, config: ModelConfig, architecture: str = "llama") -> gguf.GGUFWriter:
    """A GGUF file begun: its metadata say `config`, tensors are to be added."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(config.name)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    return writer


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor in Meta's names."""
    name = "output_norm.weight" if name == "norm.weight" else name.replace("layers.", "blk.")
    for old, new in GGUF_NAMES.items():
        name = name.replace(old, new)
    return name


def finish_gguf(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def checkpoint(path: Path) -> Checkpoint:
    """What `locate` makes of `path`, no tokenizer asked for."""
    kind, files = files_of(path)
    return Checkpoint(path=path, kind=kind, files=files, config=config_of(path, kind, files), tokenizer=files[0])


def write_tokenizer(path: Path) -> Path:
    """A sentencepiece model with VOCAB_SIZE pieces at most, trained on a few sentences: bytes fill it up."""
    text = "The quick brown fox jumps over the lazy dog. Once upon a time there was a model that answered questions."
    trainer_text = path.with_suffix(".txt")
    trainer_text.write_text("\n".join(text.split(". ") * 3))
    sentencepiece.SentencePieceTrainer.train(
        input=str(trainer_text),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=VOCAB_SIZE - 5,
        byte_fallback=True,
        minloglevel=2,
    )
    return path.with_suffix(".model")
