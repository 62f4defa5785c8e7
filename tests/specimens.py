"""Tiny whole files of every format that is read, for fuzzing.py to damage. Written once, copied for each case."""

import base64
import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import sentencepiece
import tokenizers
import torch
from damage import write_manifest
from factory import MODELS, finish_gguf, gguf_name, gguf_writer, hugging_face, meta_tensors, write_hf, write_meta
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from llama_mp.vocabulary import BYTE_OF_LETTER

CONFIG = replace(
    MODELS["gqa"], name="fuzzed", dim=32, num_heads=4, head_dim=8, hidden_dim=32, num_layers=1, vocab_size=64
)
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}{{ bos_token }}"
)
LETTERS = {byte: letter for letter, byte in BYTE_OF_LETTER.items()}


def write_all(folder: Path) -> list[str]:
    """Every specimen, a folder each; their names. A name's first word says by which reader it is read."""
    model = hugging_face(CONFIG)
    write_meta(folder / "checkpoint meta", CONFIG, meta_tensors(model), 2)
    write_hf(folder / "checkpoint hf", model)
    write_hf(folder / "checkpoint hf index", model, "20KB")
    write_gguf_of(folder / "checkpoint gguf", meta_tensors(model), GGMLQuantizationType.F32)
    write_gguf_of(folder / "checkpoint gguf q8", meta_tensors(model), GGMLQuantizationType.Q8_0)
    write_manifest(write_meta(folder / "checkpoint manifest", CONFIG, meta_tensors(model), 2))
    listed = write_meta(folder / "checkpoint checklist", CONFIG, meta_tensors(model), 1)
    sums = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in listed.iterdir()}
    (listed / "checklist.chk").write_text("".join(f"{md5}  {name}\n" for name, md5 in sums.items()))
    (listed / "consolidated.00.pth").chmod(0o644)
    write_tokenizers(folder)
    prompts = folder / "prompts"
    prompts.mkdir()
    messages = [{"role": "user", "content": "Hi"}]
    lines = [
        {"id": "a", "prompt": "One"},
        {"id": 2, "messages": messages, "seed": 3},
        {"id": "c", "prompt": "x", "stop": "\n"},
    ]
    (prompts / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return sorted(path.name for path in folder.iterdir())


def write_gguf_of(folder: Path, tensors: dict[str, torch.Tensor], kind: GGMLQuantizationType) -> None:
    folder.mkdir()
    writer = gguf_writer(folder / "model.gguf", CONFIG)
    texts = [LETTERS[byte] for byte in range(256)] + ["he", "ll", "hell"]
    byte_level = kind == GGMLQuantizationType.F32
    writer.add_tokenizer_model("gpt2" if byte_level else "llama")
    if byte_level:
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_merges(["h e", "l l", "he ll"])
    else:
        texts = ["<unk>", "<s>", "</s>", "▁", *"helo", "he", "ll"]
    writer.add_token_list([*texts, "<|end|>", "<tool>"])
    writer.add_token_types([*([1] * len(texts) if byte_level else [2, 3, 3, *[1] * (len(texts) - 3)]), 3, 4])
    if not byte_level:
        writer.add_token_scores([float(-i) for i in range(len(texts) + 2)])
        writer.add_add_space_prefix(True)
    writer.add_bos_token_id(len(texts) if byte_level else 1)
    writer.add_eos_token_id(len(texts) if byte_level else 2)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in tensors.items():
        plain = tensor.dim() == 1
        data = tensor.numpy() if plain else quantize(tensor.numpy(), kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=GGMLQuantizationType.F32 if plain else kind)
    finish_gguf(writer, folder / "model.gguf")


def write_tokenizers(folder: Path) -> None:
    for name in ("sentencepiece", "charsmap", "tiktoken", "bytes", "pieces"):
        place = folder / f"tokenizer {name}"
        place.mkdir()
        settings = {"chat_template": TEMPLATE}
        (place / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
        if name == "bytes":
            byte_level().save(str(place / "tokenizer.json"))
            settings |= {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "add_bos_token": True}
        elif name == "pieces":
            pieces().save(str(place / "tokenizer.json"))
            (place / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
        elif name == "tiktoken":
            tokens = [bytes([byte]) for byte in range(256)] + [b"he", b"ll", b"hell"]
            lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
            (place / "tokenizer.model").write_bytes(b"".join(lines))
            (place / "chat_template.jinja").write_text(TEMPLATE)
        else:
            (place / "tokenizer.model").write_bytes(sentencepiece_model(name == "charsmap"))
        (place / "tokenizer_config.json").write_text(json.dumps(settings))


def sentencepiece_model(with_rules: bool) -> bytes:
    """With rules for the normalization of characters, or as LLaMA's, which have none."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello hell", "the quick brown fox", "jumps over it"] * 5),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="nfkc" if with_rules else "identity",
        user_defined_symbols=["<tool>"],
        minloglevel=2,
    )
    proto = ModelProto.FromString(model.getvalue())
    proto.trainer_spec.ClearField("input")
    return proto.SerializeToString()


def byte_level() -> tokenizers.Tokenizer:
    texts = [LETTERS[byte] for byte in range(256)] + ["he", "ll", "hell"]
    merges = [("h", "e"), ("l", "l"), ("he", "ll")]
    library = tokenizers.Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=merges))
    split = pre_tokenizers.Split(tokenizers.Regex(r"\p{N}{1,3}| ?\p{L}+|\s+"), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    library.normalizer = normalizers.NFC()
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<s>", "</s>"])
    library.add_tokens(["<tool>"])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 259)])
    return library


def pieces() -> tokenizers.Tokenizer:
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"helo", "he", "ll"]
    vocab = {text: i for i, text in enumerate(texts)}
    library = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[("h", "e"), ("l", "l")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return library
