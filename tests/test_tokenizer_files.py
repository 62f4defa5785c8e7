"""Files that are not what --tokenizer needs: each is refused by what it is."""

from pathlib import Path

import pytest
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from llama_mp.errors import RequestError
from llama_mp.tokenizer_files import load_tokenizer


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"IQ== 0\nIg== 1\nIw== 2\n", "tiktoken format, not supported yet"),
        (b"<!DOCTYPE html>\n<html>", "an HTML page"),
        (b"\n\n<html><body>404", "an HTML page"),
        (b'{"version": "1.0"}', "JSON, not supported yet"),
        (b"GGUF\x03\x00\x00\x00", "a GGUF file"),
        (b"PK\x03\x04rest", "a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer"),
        (b"", "an empty file"),
        (b"\x00\x01\x02", "not a sentencepiece model"),
        (b"\x12\x00", "no pieces"),
    ],
)
def test_other_files_are_refused_by_what_they_are(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value) and "sentencepiece tokenizer.model is needed" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_torn_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file"):
        load_tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(RequestError, match="a folder"):
        load_tokenizer(tmp_path)
    torn = tmp_path / "torn.model"
    model = ModelProto()
    for piece in ("<unk>", "a", "b"):
        model.pieces.add(piece=piece)
    torn.write_bytes(model.SerializeToString()[:-2])
    with pytest.raises(RequestError, match="cut short"):
        load_tokenizer(torn)
