"""Hugging Face's folders and its cache: what of them is found, and what is missing named."""

import json
import os
from pathlib import Path

import pytest
from factory import hf_cache, hugging_face
from test_locate import CONFIG, gguf_file, meta_folder, refusal_of

from llama_mp.config import RunConfig
from llama_mp.locate import locate

INDEX = "model.safetensors.index.json"
PARTS = tuple(f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3))


def hf_folder(folder: Path, *names: str) -> Path:
    """A Hugging Face folder as far as `locate` looks: its weight files are empty, with an index where there are two."""
    folder.mkdir(parents=True)
    names = names or ("model.safetensors",)
    for name in (*names, "tokenizer.json"):
        (folder / name).touch()
    if len(names) > 1:
        weight_map = {f"tensor{i}": name for i, name in enumerate((*names, *reversed(names)))}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map}))
    hugging_face(CONFIG).config.save_pretrained(folder)
    return folder


# ---- found -----------------------------------------------------------------------------------------------------


def test_a_folder_of_safetensors(tmp_path: Path) -> None:
    one = hf_folder(tmp_path / "tiny llama")
    found = locate(RunConfig(ckpt_dir=one))
    assert (found.kind, found.path, found.config.name) == ("hf", one, "tiny llama")
    assert (found.files, found.tokenizer) == ((one / "model.safetensors",), one / "tokenizer.json")
    many = hf_folder(tmp_path / "many", *reversed(PARTS))
    (many / "consolidated.safetensors").touch()  # Mistral's own format lies beside, and is not in the index
    assert locate(RunConfig(ckpt_dir=many)).files == tuple(many / name for name in PARTS)


def test_the_nearest_tokenizer_serves_and_tokenizer_json_before_tokenizer_model(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").touch()
    (folder / "tokenizer.model").touch()
    assert locate(RunConfig(ckpt_dir=folder)).tokenizer == folder / "tokenizer.model"
    (folder / "tokenizer.json").touch()  # which holds the tokens that were added later
    assert locate(RunConfig(ckpt_dir=folder)).tokenizer == folder / "tokenizer.json"


def test_the_cache_of_hugging_face(tmp_path: Path) -> None:
    cache = hf_cache(hf_folder(tmp_path / "x", *PARTS), tmp_path / "models--someone--Tiny-Llama")
    snapshot = cache / "snapshots" / "0123abcd"
    for path in (cache, snapshot):
        found = locate(RunConfig(ckpt_dir=path))
        assert (found.kind, found.path, found.config.name) == ("hf", snapshot, "Tiny-Llama")
        assert found.files == tuple(snapshot / name for name in PARTS)
        assert found.tokenizer == snapshot / "tokenizer.json"


def test_a_cache_that_does_not_say_which_snapshot(tmp_path: Path) -> None:
    cache = hf_cache(hf_folder(tmp_path / "x"), tmp_path / "models--a--b")
    (cache / "refs" / "main").write_text("ffff")
    assert f"lacks the snapshot ffff that {cache / 'refs' / 'main'} names; snapshots: 0123abcd; name" in refusal_of(
        cache
    )
    (cache / "refs" / "main").unlink()  # a revision was downloaded by its hash
    assert locate(RunConfig(ckpt_dir=cache)).path == cache / "snapshots" / "0123abcd"
    (cache / "snapshots" / "fedc").mkdir()
    assert f"{cache} has no refs/main; snapshots: 0123abcd, fedc; name one with --ckpt_dir" in refusal_of(cache)


def test_a_gguf_beside_safetensors_is_named_by_itself(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m")
    file = gguf_file(folder / "m.gguf")
    assert locate(RunConfig(ckpt_dir=folder)).kind == "hf"
    assert locate(RunConfig(ckpt_dir=file)).kind == "gguf"


# ---- refused ---------------------------------------------------------------------------------------------------


def test_files_that_an_index_names_and_that_are_not_there(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", *PARTS)
    for name in PARTS[1:]:
        (folder / name).unlink()
    assert refusal_of(folder) == (
        f"{folder} lacks {PARTS[1]}, {PARTS[2]} of the 3 files in {INDEX}: copy what is missing there"
    )
    (folder / INDEX).unlink()
    assert refusal_of(folder) == (f"{folder} lacks model.safetensors or {INDEX}: copy it there from the same download")


@pytest.mark.parametrize(
    "content",
    [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"w": 3}}]
    + [{"weight_map": {"w": name}} for name in ("../m.safetensors", "/etc/m.safetensors", "weights.bin", "")],
)
def test_an_index_that_is_none(tmp_path: Path, content: object) -> None:
    folder = hf_folder(tmp_path / "m", *PARTS)
    (folder / INDEX).write_text(json.dumps(content))
    assert refusal_of(folder).startswith(f"{folder / INDEX} has no weight_map of tensors to files beside it; take it")


@pytest.mark.parametrize("name", ["config.json", PARTS[1], INDEX])
def test_links_that_lead_nowhere(tmp_path: Path, name: str) -> None:
    cache = hf_cache(hf_folder(tmp_path / "x", *PARTS), tmp_path / "models--a--b")
    link = cache / "snapshots" / "0123abcd" / name
    link.resolve().unlink()
    assert refusal_of(cache) == f"{link} is a link to {os.readlink(link)}, which is not there: download the model again"


def test_folders_that_hold_two_models_or_say_so(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", *PARTS)
    (folder / "model.safetensors").touch()
    assert refusal_of(folder).startswith(f"{folder} holds model.safetensors and {INDEX}: remove the one that is not")
    meta = meta_folder(tmp_path / "both")
    (meta / "model.safetensors").touch()
    assert (
        refusal_of(meta) == f"{meta} holds consolidated.NN.pth and safetensors: move one of the two to another folder"
    )


def test_no_config_json(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m")
    (folder / "config.json").unlink()
    assert refusal_of(folder) == f"{folder} lacks config.json: copy it there from the same download"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_a_folder_of_pickles_only(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert refusal_of(tmp_path) == (
        f"{tmp_path} holds pytorch_model.bin, which is not read: convert it to safetensors "
        "(transformers: from_pretrained, then save_pretrained)"
    )


@pytest.mark.parametrize("content", [b"\xff\xfe", b"../../..", b"\0", b"x" * 5000])
def test_a_name_of_the_snapshot_that_is_none(tmp_path: Path, content: bytes) -> None:
    repository = hf_cache(hf_folder(tmp_path / "model"), tmp_path / "models--a--b")
    (repository / "refs" / "main").write_bytes(content)
    assert "lacks the snapshot" in refusal_of(repository)
    os.truncate(repository / "refs" / "main", 1 << 40)
    assert f"main has {1 << 40} bytes, but no such file" in refusal_of(repository)
