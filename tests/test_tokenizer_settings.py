"""The small files of a Hugging Face folder: which of them counts, and what is refused."""

import json
from pathlib import Path

import pytest

from llama_mp.errors import RequestError
from llama_mp.tokenizer_settings import Settings, read_settings


def write(folder: Path, **files: object) -> Path:
    """`tokenizer_config={...}` writes tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_nothing_is_said_where_there_is_nothing(tmp_path: Path) -> None:
    assert read_settings([tmp_path]) == Settings()


def test_tokens_are_texts_or_objects(tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "add_bos_token": True}
    assert read_settings([write(tmp_path, tokenizer_config=config)]) == Settings(
        bos_token="<s>", eos_token="</s>", adds_bos=True
    )


def test_tokenizer_config_goes_before_special_tokens_map(tmp_path: Path) -> None:
    tokens = {"bos_token": "<map>", "eos_token": "</map>"}
    folder = write(tmp_path, special_tokens_map=tokens, tokenizer_config={"bos_token": "<s>"})
    found = read_settings([folder])
    assert (found.bos_token, found.eos_token) == ("<s>", "</map>")
    write(tmp_path, tokenizer_config={"bos_token": None})
    assert read_settings([folder]).bos_token is None


@pytest.mark.parametrize(("value", "ends"), [(None, ()), (5, (5,)), ([5, 7], (5, 7)), ([], ())])
def test_ends_are_one_id_or_several(tmp_path: Path, value: object, ends: tuple[int, ...]) -> None:
    assert read_settings([write(tmp_path, config={"eos_token_id": value})]).end_ids == ends
    write(tmp_path, config={"eos_token_id": 99}, generation_config={"eos_token_id": value, "x": 1})
    assert read_settings([tmp_path]).end_ids == ends, "generation_config.json goes before config.json"


def test_the_first_folder_goes_before_the_second(tmp_path: Path) -> None:
    near = write(tmp_path / "near", tokenizer_config={"bos_token": "<near>"})
    far = write(tmp_path / "far", tokenizer_config={"eos_token": "</far>"}, config={"eos_token_id": 1})
    assert read_settings([near, far]) == Settings(bos_token="<near>", end_ids=(1,))


def test_the_template_of_the_config(tmp_path: Path) -> None:
    def template(value: object) -> str | None:
        return read_settings([write(tmp_path, tokenizer_config={"chat_template": value})]).template

    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert (template("X"), template(named), template(named[:1]), template(None)) == ("X", "D", None, None)


def test_a_template_file_goes_before_the_config(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config={"chat_template": "config"})
    (tmp_path / "chat_template.jinja").write_text("file é", encoding="utf-8")
    assert read_settings([tmp_path]).template == "file é"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", b"{", "is not JSON, or cut short"),
        ("tokenizer_config.json", b"\xff\xfe", "is not JSON, or cut short"),
        ("generation_config.json", b"[1]", "is JSON, but not an object"),
        ("tokenizer_config.json", b'{"bos_token": 1}', "bos_token of tokenizer_config.json is 1, but must be a text"),
        ("tokenizer_config.json", b'{"add_bos_token": "no"}', "add_bos_token .* 'no', but must be true or false"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "neither a text nor a list"),
        ("generation_config.json", b'{"eos_token_id": ["</s>"]}', "eos_token_id .* must be whole numbers"),
        ("generation_config.json", b'{"eos_token_id": true}', "eos_token_id .* must be whole numbers"),
        ("chat_template.jinja", b"\xff\xfe", "is not UTF-8 text"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=message):
        read_settings([tmp_path])
