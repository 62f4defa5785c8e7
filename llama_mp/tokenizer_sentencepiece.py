"""LLaMA's kind of tokenizer: a sentencepiece model, from its own file or composed from a GGUF file's metadata."""

from collections.abc import Mapping
from typing import Any

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto, NormalizerSpec, TrainerSpec

from llama_mp.errors import RequestError
from llama_mp.tokenizer import Tokenizer
from llama_mp.tokenizer_settings import Settings
from llama_mp.vocabulary import BYTE, CONTROL, REMEDY, Vocabulary, gguf_array, gguf_bool, gguf_vocabulary, settle_types


class SentencePieceTokenizer(Tokenizer):
    def __init__(self, vocabulary: Vocabulary, model: ModelProto) -> None:
        super().__init__(vocabulary)
        for piece, kind in zip(model.pieces, vocabulary.types, strict=True):
            if piece.type != kind:
                piece.type = kind
        try:
            self._processor = SentencePieceProcessor(model_proto=model.SerializeToString())
        except RuntimeError as error:
            raise RequestError(f"tokenizer: sentencepiece refuses the vocabulary: {error}{REMEDY}") from error

    def _encode_plain(self, text: str, at_start: bool) -> list[int]:
        return self._processor.encode(text)

    def _text_bytes(self, text: str) -> bytes:
        return piece_to_bytes(text)

    def model(self) -> ModelProto:
        """The model in use, whatever it came from: the content of a tokenizer.model."""
        return ModelProto.FromString(self._processor.serialized_model_proto())


def piece_to_bytes(text: str) -> bytes:
    return text.replace("▁", " ").encode()


def tokenizer_from_sentencepiece(model: ModelProto, settings: Settings) -> Tokenizer:
    """The tokenizer of a file whose content `model` is; what `settings` say goes before it."""
    tokens, types = [p.piece for p in model.pieces], [p.type for p in model.pieces]
    by_text = dict(zip(tokens, range(len(tokens)), strict=True))
    bos_id, eos_id = settings.token_ids(by_text, model.trainer_spec.bos_piece, model.trainer_spec.eos_piece)
    for token_id in {bos_id, eos_id} - {None}:
        types[token_id] = CONTROL
    vocabulary = Vocabulary(
        tokens=tokens,
        types=settle_types(tokens, types),
        bos_id=bos_id,
        eos_id=eos_id,
        other_end_ids=settings.end_ids,
        adds_bos=bos_id is not None and settings.adds_bos is not False,
    )
    return SentencePieceTokenizer(vocabulary, model)


def gguf_sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    """A sentencepiece model composed from the metadata, so that the real library does the work."""
    vocabulary = gguf_vocabulary(metadata, {"bos": 1, "eos": 2}, adds_bos=True)
    scores = gguf_array(metadata, "scores", (float, int), len(vocabulary.tokens))
    model = ModelProto(
        trainer_spec=TrainerSpec(model_type=TrainerSpec.BPE, byte_fallback=BYTE in vocabulary.types),
        normalizer_spec=NormalizerSpec(
            name="identity",
            add_dummy_prefix=gguf_bool(metadata, "add_space_prefix", default=True),
            remove_extra_whitespaces=False,
            escape_whitespaces=True,
        ),
    )
    for text, score, kind in zip(vocabulary.tokens, scores, vocabulary.types, strict=True):
        model.pieces.add(piece=text, score=score, type=kind)
    return SentencePieceTokenizer(vocabulary, model)
