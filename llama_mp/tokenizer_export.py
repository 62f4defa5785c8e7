"""The tokenizer of any checkpoint as the small files of a folder, for ourselves and for Hugging Face's libraries.

What exists is passed on byte for byte. What does not is composed: a tokenizer.json by the library that reads it, and
the settings beside it. The composed file gives every text the ids that the original gives it, except where Hugging
Face's format has no word for what sentencepiece does:
- Of different pieces with one and the same score sentencepiece merges the leftmost first, a tokenizer.json the one
  with the lower id. For the runs of spaces in LLaMA's own model, which have one score, that comes to the same.
- Pieces of type UNUSED are never made, not even on the way to others.
- In a model with user-defined symbols: the text of a token that no merges make (a control, byte or unknown one) becomes
  this token where it is all there is between one such symbol and the next or the text's end; also between the text's
  start and these, if the model puts no space there.
- With rules for the normalization of characters, which LLaMA's models have none of: sequences of characters that are
  normalized together, such as a letter and several marks, or Korean in single letters.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto, NormalizerSpec, TrainerSpec
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from llama_mp.errors import RequestError
from llama_mp.files import read_small
from llama_mp.tokenizer import Tokenizer
from llama_mp.tokenizer_byte_level import ByteLevelTokenizer
from llama_mp.tokenizer_files import MAX_TOKENIZER_BYTES, folders_of_settings, kind_of, load_tokenizer, read_tokenizer
from llama_mp.tokenizer_sentencepiece import SentencePieceTokenizer
from llama_mp.tokenizer_settings import find, read_object, read_settings
from llama_mp.vocabulary import NORMAL, UNKNOWN, USER_DEFINED

SETTINGS_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)


def tokenizer_folder(tokenizer_path: Path, checkpoint: Path, *, hugging_face: bool) -> dict[str, bytes]:
    """The files, by name, with which a folder has the tokenizer and the chat template that `read_tokenizer` finds for
    these two paths; with `hugging_face` transformers.AutoTokenizer finds them there too.

    Raises RequestError for a damaged tokenizer, and for one that Hugging Face's format cannot express.
    """
    kind = kind_of(tokenizer_path)
    tokenizer, template = read_tokenizer(tokenizer_path, checkpoint)
    folders = folders_of_settings(tokenizer_path, checkpoint)
    if kind == "gguf":
        files = composed_settings(tokenizer, template)
        if isinstance(tokenizer, SentencePieceTokenizer):
            files["tokenizer.model"] = tokenizer.model().SerializeToString()
        if hugging_face or "tokenizer.model" not in files:  # a Meta folder's tokenizer.model would go before it
            files["tokenizer.json"] = composed_json(tokenizer)
    elif kind == "json":
        files = existing_settings(folders) | {"tokenizer.json": read_small(tokenizer_path, MAX_TOKENIZER_BYTES)}
        model = tokenizer_path.parent / "tokenizer.model"
        if model.is_file() and model != tokenizer_path and (hugging_face or is_alike(model, folders, tokenizer)):
            files["tokenizer.model"] = read_small(model, MAX_TOKENIZER_BYTES)
    else:
        files = {"tokenizer.model": read_small(tokenizer_path, MAX_TOKENIZER_BYTES)}
        if hugging_face:
            files |= composed_settings(tokenizer, template) | {"tokenizer.json": composed_json(tokenizer)}
            # Only these two: the others hold tokens, which could be added to those of the composed file.
            kept = {"generation_config.json", "chat_template.jinja"}
            files |= {name: content for name, content in existing_settings(folders).items() if name in kept}
        else:
            files |= existing_settings(folders)
    return files


# ---- settings --------------------------------------------------------------------------------------------------


def existing_settings(folders: Sequence[Path]) -> dict[str, bytes]:
    """The files beside a tokenizer, each from the first folder that has it. What read_settings finds in config.json,
    which is not among them, is kept too."""
    files = {name: read_small(path) for name in SETTINGS_FILES if (path := find(name, folders))}
    ends = read_settings(folders).end_ids
    if ends and not read_object("generation_config.json", folders):
        files["generation_config.json"] = to_json({"eos_token_id": ends})
    return files


def composed_settings(tokenizer: Tokenizer, template: str | None) -> dict[str, bytes]:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the one that takes tokenizer.json as it is
        "bos_token": tokenizer.bos_token or None,
        "eos_token": tokenizer.eos_token or None,
        "add_bos_token": tokenizer.adds_bos,
        "clean_up_tokenization_spaces": False,  # transformers before version 5 would, when decoding
        "chat_template": template,
    }
    files = {"tokenizer_config.json": to_json({key: value for key, value in config.items() if value is not None})}
    if tokenizer.eos_ids:
        files["generation_config.json"] = to_json({"eos_token_id": sorted(tokenizer.eos_ids)})
    return files


def to_json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def is_alike(model: Path, folders: Sequence[Path], tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer.model that stands beside a tokenizer.json is the same tokenizer, nothing added to either.

    Meta's own programs need it in a Meta folder. But there it goes before tokenizer.json.
    """
    try:
        other = load_tokenizer(model, read_settings(folders))
    except RequestError:  # tokens that the settings name were added to tokenizer.json
        return False
    parts = ("tokens", "special", "bos_id", "eos_ids", "adds_bos")
    probe = "Two  words" + "".join(f"{special} two  words\n" for special in tokenizer.special)
    return all(getattr(other, part) == getattr(tokenizer, part) for part in parts) and (
        other.encode_template(probe) == tokenizer.encode_template(probe)
    )


# ---- tokenizer.json --------------------------------------------------------------------------------------------


def composed_json(tokenizer: Tokenizer) -> bytes:
    if isinstance(tokenizer, SentencePieceTokenizer):
        library = library_of_pieces(tokenizer.model())
    else:
        assert isinstance(tokenizer, ByteLevelTokenizer)
        library = library_of_bytes(tokenizer)
    in_order = sorted(tokenizer.special, key=tokenizer.special.__getitem__)
    library.add_special_tokens([tokenizers.AddedToken(text, normalized=False, special=True) for text in in_order])
    if tokenizer.adds_bos:
        bos = (tokenizer.bos_token, tokenizer.bos_id)
        library.post_processor = processors.TemplateProcessing(single=[bos[0], "$A"], special_tokens=[bos])
    return library.to_str().encode()


def library_of_bytes(tokenizer: ByteLevelTokenizer) -> tokenizers.Tokenizer:
    pipeline = tokenizer.pipeline()
    # The control tokens too: the library gives added tokens that are not in here ids of its own choice. No merge makes
    # them. Neither does one make a token of type UNKNOWN, which is no `unk_token`: that would stand for missing bytes.
    pipeline["model"]["vocab"] = {text: i for i, text in enumerate(tokenizer.tokens)}
    library = tokenizers.Tokenizer.from_str(json.dumps(pipeline))
    library.decoder = decoders.ByteLevel()
    return library


def library_of_pieces(model: ModelProto) -> tokenizers.Tokenizer:
    spec, trainer = model.normalizer_spec, model.trainer_spec
    if trainer.model_type != TrainerSpec.BPE or trainer.treat_whitespace_as_suffix or not spec.escape_whitespaces:
        raise RequestError(
            "tokenizer: a tokenizer.json can be made only of a sentencepiece model like LLaMA's, of type BPE and with "
            "▁ before words; a Meta folder takes the tokenizer.model as it is"
        )
    user_defined = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED]
    library = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece.piece: i for i, piece in enumerate(model.pieces)},
            merges=merges_by_score(model),
            unk_token=next((piece.piece for piece in model.pieces if piece.type == UNKNOWN), None),
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
            ignore_merges=bool(user_defined),
        )
    )
    library.normalizer = normalizers.Sequence(normalizing_steps(spec))
    if user_defined:
        # Cut out here, not as added tokens: before the text after one of those the library would put a ▁.
        longest_first = sorted(user_defined, key=len, reverse=True)
        pattern = tokenizers.Regex("|".join(map(re.escape, longest_first)))
        library.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    strip = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return library


def normalizing_steps(spec: NormalizerSpec) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        try:
            steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
        except Exception as error:  # the library raises no other class, whatever the fault
            raise RequestError(
                f"the tokenizer's rules for characters are damaged: {error}; download it again"
            ) from error
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(tokenizers.Regex(r"\A +| +\z|(?<= ) +"), ""))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    return [*steps, normalizers.Replace(" ", "▁")]


def merges_by_score(model: ModelProto) -> list[tuple[str, str]]:
    """Every cut of every piece, the pieces of the best scores first: sentencepiece's own order of merging.

    Which cut of a piece goes first plays no part: see tokenizer_tiktoken.py.
    """
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == NORMAL}
    best_first = sorted(scores, key=scores.__getitem__, reverse=True)
    cuts = ((text[:at], text[at:]) for text in best_first for at in range(1, len(text)))
    return [(left, right) for left, right in cuts if left in scores and right in scores]
