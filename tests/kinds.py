"""A tokenizer of every kind, trained in a second on the texts of strings.py, beside the library that is its oracle."""

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import tiktoken
import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from strings import strings
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llama_mp.tokenizer import Tokenizer
from llama_mp.tokenizer_files import load_tokenizer, tokenizer_from_gguf
from llama_mp.vocabulary import BYTE_OF_LETTER

# As Meta publishes them.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
    255: "<|reserved_special_token_247|>",
}


@dataclass(kw_only=True)
class Kind:
    """`encode`, `decode`: the oracle's, without special tokens in texts. `prefix`: what decoding puts before a text."""

    tokenizer: Tokenizer
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    prefix: str = ""


def write_sentencepiece(path: Path) -> Path:
    """A model trained with the settings of LLaMA's tokenizer.model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in strings(600) if "\x00" not in text] * 2),
        model_writer=model,
        model_type="bpe",
        vocab_size=1200,
        byte_fallback=True,
        split_digits=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["<tool>", "<|odd|>"],
        control_symbols=["[CTRL]"],
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


def gguf_of_sentencepiece(path: Path) -> dict:
    """The metadata that a converter writes for a sentencepiece model."""
    model = ModelProto.FromString(path.read_bytes())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in model.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in model.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in model.pieces],
    }


def trained_bytes(pattern: str, vocab_size: int, ignore_merges: bool = False) -> tokenizers.Tokenizer:
    """Byte-level BPE of the tokenizers library, its vocabulary in the order of the merges."""
    library = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(strings(600), trainer)
    return library


def write_tiktoken(path: Path) -> Path:
    """A file like Llama 3's tokenizer.model."""
    library = trained_bytes(LLAMA3_WORDS, 900)
    by_id = sorted((i, text) for text, i in library.get_vocab().items())
    tokens = [bytes(map(BYTE_OF_LETTER.__getitem__, text)) for _, text in by_id]
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path


def tiktoken_oracle(path: Path) -> tiktoken.Encoding:
    ranks = {}
    for line in path.read_text().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    special = {text: len(ranks) + offset for offset, text in LLAMA3_SPECIAL.items()}
    return tiktoken.Encoding(name="llama3", pat_str=LLAMA3_WORDS, mergeable_ranks=ranks, special_tokens=special)


def write_json_bytes(folder: Path) -> Path:
    """A folder like Llama 3's on the hub: special tokens after the vocabulary, one of them with its own manners."""
    library = trained_bytes(LLAMA3_WORDS, 700, ignore_merges=True)
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    library.add_special_tokens(special)
    library.add_special_tokens([tokenizers.AddedToken("<end>", lstrip=True, rstrip=True, special=True)])
    library.add_tokens(["<tool>", tokenizers.AddedToken("<|looks|>", special=False)])
    bos = (special[0], library.token_to_id(special[0]))
    template = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[bos])
    library.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    library.save(str(folder / "tokenizer.json"))
    write_config(folder, bos_token=special[0], eos_token=special[1])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [bos[1] + 1, bos[1] + 4]}))
    return folder / "tokenizer.json"


def write_json_pieces(folder: Path, model_file: Path, legacy: bool) -> Path:
    """A folder like Llama 2's on the hub, made of a sentencepiece model: by normalizers, or later by Metaspace."""
    model = ModelProto.FromString(model_file.read_bytes())
    vocab = {piece.piece: i for i, piece in enumerate(model.pieces)}
    vocab |= {"<s": len(vocab)}  # half of a control token
    library = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges_of(vocab), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if legacy:
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        library.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(steps)
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    library.add_special_tokens(["<unk>", "<s>", "</s>", "[CTRL]", "<|odd|>"])
    library.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    library.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    write_config(folder, unk_token="<unk>")
    return folder / "tokenizer.json"


def merges_of(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every cut of every piece, control tokens' too: a file may well hold such."""
    cuts = ((text[:at], text[at:]) for text in vocab if len(text) > 1 for at in range(1, len(text)))
    return [(left, right) for left, right in cuts if left in vocab and right in vocab]


def write_config(folder: Path, **tokens: object) -> None:
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def json_oracle(path: Path) -> PreTrainedTokenizerFast:
    """transformers', told to leave special tokens in a text alone."""
    return PreTrainedTokenizerFast.from_pretrained(path.parent, split_special_tokens=True)


def of_json(path: Path, prefix: str = "") -> Kind:
    oracle = json_oracle(path)
    return Kind(
        tokenizer=load_tokenizer(path),
        encode=lambda text: oracle.encode(text, add_special_tokens=False),
        decode=lambda ids: oracle.decode(ids),
        prefix=prefix,
    )


def of_tiktoken(path: Path) -> Kind:
    oracle = tiktoken_oracle(path)
    return Kind(
        tokenizer=load_tokenizer(path),
        encode=lambda text: oracle.encode(text, disallowed_special=()),
        decode=oracle.decode,
    )


def of_sentencepiece(path: Path, tokenizer: Tokenizer) -> Kind:
    """The oracle is the library with the file, in which <|odd|> is made the control token that it looks like."""
    model = ModelProto.FromString(path.read_bytes())
    [odd] = [piece for piece in model.pieces if piece.piece == "<|odd|>"]
    odd.type = ModelProto.SentencePiece.CONTROL
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    return Kind(tokenizer=tokenizer, encode=oracle.encode, decode=oracle.decode, prefix=" ")


def of_smollm2(metadata: dict) -> Kind:
    """The oracle is the pipeline of SmolLM2's own tokenizer.json, with the tokens and merges of the GGUF file."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    vocab = {text: i for i, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]]
    pipeline = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    oracle = tokenizers.Tokenizer.from_str(json.dumps(pipeline))
    return Kind(
        tokenizer=tokenizer_from_gguf(metadata),
        encode=lambda text: oracle.encode(text).ids,
        decode=lambda ids: oracle.decode(ids, skip_special_tokens=False),
    )


def every_kind(folder: Path, smollm2_metadata: dict) -> dict[str, Kind]:
    folders = {name: folder / name for name in ("sentencepiece", "tiktoken", "bytes", "legacy", "metaspace")}
    for path in folders.values():
        path.mkdir()
    model = write_sentencepiece(folders["sentencepiece"] / "tokenizer.model")
    return {
        "sentencepiece": of_sentencepiece(model, load_tokenizer(model)),
        "gguf llama": of_sentencepiece(model, tokenizer_from_gguf(gguf_of_sentencepiece(model))),
        "gguf gpt2": of_smollm2(smollm2_metadata),
        "tiktoken": of_tiktoken(write_tiktoken(folders["tiktoken"] / "tokenizer.model")),
        "json bytes": of_json(write_json_bytes(folders["bytes"])),
        "json legacy": of_json(write_json_pieces(folders["legacy"], model, legacy=True), prefix=" "),
        "json metaspace": of_json(write_json_pieces(folders["metaspace"], model, legacy=False), prefix=" "),
    }
