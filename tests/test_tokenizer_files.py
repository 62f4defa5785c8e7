"""Which tokenizer and which chat template a file and its folder give, whatever they are called; and what is refused."""

import base64
import json
import os
import shutil
from pathlib import Path

import pytest
from kinds import Kind, gguf_of_sentencepiece, write_json_bytes, write_tiktoken
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from llama_mp.chat_format import render_chat
from llama_mp.errors import RequestError
from llama_mp.tokenizer_files import gguf_template, kind_of, load_tokenizer, read_tokenizer, tokenizer_from_gguf

CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, sentencepiece_file: Path, smollm2_file: Path) -> dict[str, Path]:
    """A file of each kind, its name saying nothing, in a folder of its own."""
    made = {kind: tmp_path_factory.mktemp(kind) / "file" for kind in ("sentencepiece", "tiktoken", "json", "gguf")}
    made["sentencepiece"].write_bytes(sentencepiece_file.read_bytes())
    write_tiktoken(made["tiktoken"])
    shutil.move(write_json_bytes(made["json"].parent), made["json"])
    made["gguf"].symlink_to(smollm2_file)
    return made


def test_the_kind_is_found_by_content(files: dict[str, Path], kinds: dict[str, Kind]) -> None:
    assert {kind: kind_of(path) for kind, path in files.items()} == {kind: kind for kind in files}
    alike = {"sentencepiece": "sentencepiece", "tiktoken": "tiktoken", "json": "json bytes", "gguf": "gguf gpt2"}
    for kind, path in files.items():
        expected = kinds[alike[kind]].tokenizer
        for tokenizer in (load_tokenizer(path), read_tokenizer(path)[0]):
            assert tokenizer.encode("Some text.", bos=False) == expected.encode("Some text.", bos=False)
            assert (tokenizer.special, tokenizer.eos_ids) == (expected.special, expected.eos_ids)


# ---- templates -------------------------------------------------------------------------------------------------


def test_without_a_template_anywhere(files: dict[str, Path], smollm2_metadata: dict) -> None:
    assert read_tokenizer(files["gguf"])[1] == smollm2_metadata["tokenizer.chat_template"]
    assert read_tokenizer(files["sentencepiece"])[1] is None
    assert read_tokenizer(files["json"])[1] is None, "a folder of Hugging Face's without one is a base model"
    tokenizer, template = read_tokenizer(files["tiktoken"])
    header = tokenizer.encode_template("<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>")
    assert render_chat(template, CHAT, tokenizer)[: len(header)] == header


@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken", "json"])
def test_a_template_beside_the_tokenizer_or_the_checkpoint(kind: str, files: dict[str, Path], tmp_path: Path) -> None:
    checkpoint, beside = tmp_path / "checkpoint", tmp_path / "beside"
    checkpoint.mkdir(), beside.mkdir()
    path = Path(shutil.copy(files[kind], beside))
    (checkpoint / "chat_template.jinja").write_text("of the checkpoint")
    assert read_tokenizer(path, checkpoint)[1] == "of the checkpoint"
    (beside / "tokenizer_config.json").write_text('{"chat_template": "of the config"}')
    (beside / "chat_template.jinja").write_text("of the tokenizer")
    assert read_tokenizer(path, checkpoint)[1] == "of the tokenizer"
    (beside / "chat_template.jinja").unlink(), (checkpoint / "chat_template.jinja").unlink()
    assert read_tokenizer(path, checkpoint)[1] == "of the config"


def test_ends_that_the_checkpoint_s_folder_names(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9]}')
    assert 9 in read_tokenizer(files["sentencepiece"], tmp_path)[0].eos_ids
    assert 9 not in read_tokenizer(files["sentencepiece"], files["gguf"])[0].eos_ids


def test_a_format_that_is_asked_for_goes_before_any_template(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("of the checkpoint")
    assert "[INST]" in read_tokenizer(files["sentencepiece"], tmp_path, "llama2")[1]
    assert "<|eot_id|>" in read_tokenizer(files["tiktoken"], tmp_path, "llama3")[1]
    for kind, name, missing in (
        ("tiktoken", "llama2", "<s>, </s>, which"),
        ("sentencepiece", "llama3", "<|begin_of_text|>, <|start_header_id|>, <|end_header_id|>, <|eot_id|>, which"),
    ):
        with pytest.raises(RequestError) as caught:
            read_tokenizer(files[kind], chat_format=name)
        assert f"--chat_format {name} needs the special tokens {missing}" in str(caught.value)


# ---- refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html>\n<html>", "an HTML page"),
        (b"\n\n<html><body>404", "an HTML page"),
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
    for read in (load_tokenizer, read_tokenizer):
        with pytest.raises(RequestError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "a tokenizer.model, a tokenizer.json or a .gguf file is needed" in str(caught.value)
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
    torn.write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(RequestError, match="not a whole GGUF file"):
        load_tokenizer(torn)


def test_a_config_in_place_of_the_tokenizer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text('{"bos_token": "<s>"}')
    with pytest.raises(RequestError, match=r"tokenizer_config.json: JSON, but no tokenizer.json"):
        load_tokenizer(path)


# ---- what the fuzz test found ----------------------------------------------------------------------------------


def test_pieces_that_are_no_texts(sentencepiece_file: Path, tmp_path: Path) -> None:
    content = sentencepiece_file.read_bytes()
    for text in (b"<t\xffol>", b"<t\0ol>"):
        (tmp_path / "tokenizer.model").write_bytes(content.replace(b"<tool>", text, 1))
        with pytest.raises(RequestError, match="pieces that are no texts"):
            load_tokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("template", [7, ["a"], "\udc80"])
def test_a_template_in_gguf_that_is_no_text(template: object) -> None:
    with pytest.raises(RequestError, match=r"tokenizer.chat_template of the GGUF file is not UTF-8 text"):
        gguf_template({"tokenizer.chat_template": template})


@pytest.mark.parametrize("key", ["add_bos_token", "add_space_prefix"])
def test_a_switch_in_gguf_that_is_neither(sentencepiece_file: Path, key: str) -> None:
    metadata = gguf_of_sentencepiece(sentencepiece_file)
    with pytest.raises(RequestError, match=f"{key} is 'yes', but must be true or false"):
        tokenizer_from_gguf(metadata | {f"tokenizer.ggml.{key}": "yes"})


def test_tokens_of_endless_length(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    single = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
    file.write_bytes(single + base64.b64encode(b"a" * 3_000_000) + b" 256\n")
    with pytest.raises(RequestError, match="a token of 3000000 bytes"):
        load_tokenizer(file)
    vocab = {"type": "BPE", "vocab": {"a" * 3_000_000: 0}, "merges": []}
    pipeline = {"model": vocab, "added_tokens": [], "decoder": {"type": "ByteLevel"}}
    file.write_text(json.dumps(pipeline))
    with pytest.raises(RequestError, match="a token of 3000000 characters"):
        load_tokenizer(file)


def test_a_tokenizer_of_gigabytes(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    for start in (b"\n\x0e\n\x05<unk>", b"{", b"YQ== 0\n"):
        file.write_bytes(start)
        os.truncate(file, 5 << 30)
        with pytest.raises(RequestError, match=f"has {5 << 30} bytes, but no such file"):
            load_tokenizer(file)
