"""Hugging Face's folders as a source: the slices that Meta's order asks for, and every way of not being one."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factory import MODELS, checkpoint, hf_cache, hugging_face, meta_tensors, write_hf
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_sources import check_slices, refusal
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from llama_mp.checkpoint.hf import open_file, rows_in_halves
from llama_mp.checkpoint.load import open_source
from llama_mp.errors import RequestError
from llama_mp.layout import Span

MODEL = MODELS["heads-9-3"]
UNTIED = replace(MODEL, tied_embeddings=False)
WIDE_HEADS = replace(MODELS["gqa"], head_dim=12)  # q has more rows than the model dimension
SHARD_SIZE = "60KB"
Q = "model.layers.1.self_attn.q_proj.weight"


def one_file(folder: Path, model: LlamaForCausalLM | None = None) -> Path:
    """The one weight file of a Hugging Face folder."""
    return write_hf(folder, model or hugging_face(UNTIED)) / "model.safetensors"


def rewrite(file: Path, **change: torch.Tensor | None) -> None:
    """Tensors put into `file`, or with None taken out; dots of their names written as two underscores."""
    tensors = load_file(file) | {name.replace("__", "."): tensor for name, tensor in change.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


# ---- slices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_size", ["5GB", SHARD_SIZE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slices_of_one_file_and_of_many(tmp_path: Path, shard_size: str, dtype: torch.dtype) -> None:
    model = hugging_face(UNTIED).to(dtype)
    path = checkpoint(write_hf(tmp_path, model, shard_size))
    assert (len(path.files) > 3) == (shard_size == SHARD_SIZE)
    source = open_source(path)
    assert source.config == replace(UNTIED, name=tmp_path.name)
    check_slices(source, meta_tensors(model))


@pytest.mark.parametrize("config", [*MODELS.values(), WIDE_HEADS], ids=lambda c: c.name)
def test_slices_of_every_model(tmp_path: Path, config: object) -> None:
    model = hugging_face(config)
    check_slices(open_source(checkpoint(write_hf(tmp_path, model))), meta_tensors(model), 2)


def test_slices_through_the_links_of_a_cache(tmp_path: Path) -> None:
    model = hugging_face(UNTIED)
    cache = hf_cache(write_hf(tmp_path / "x", model, SHARD_SIZE), tmp_path / "models--a--b")
    check_slices(open_source(checkpoint(cache / "snapshots" / "0123abcd")), meta_tensors(model), 1)


@given(st.sampled_from([2, 8, 10, 64, 128]), st.integers(0, 600), st.integers(1, 600))
def test_rows_of_any_span_stand_where_whole_heads_say(head_dim: int, start: int, length: int) -> None:
    num_heads = -(-(start + length) // head_dim)
    halves = torch.arange(num_heads * head_dim).view(num_heads, 2, head_dim // 2)
    in_pairs = halves.transpose(1, 2).flatten()
    assert torch.equal(rows_in_halves(Span(start, start + length), head_dim), in_pairs[start : start + length])


def test_reads_no_more_than_asked_for(tmp_path: Path) -> None:
    source = open_source(checkpoint(one_file(tmp_path, hugging_face(UNTIED).bfloat16()).parent))
    source.read("layers.0.attention.wq.weight", Span(3, 10), Span(20, 60))  # begins and ends within a head
    source.read("layers.0.feed_forward.w2.weight", Span(3, 10), Span(20, 80))
    source.read("norm.weight", Span(0, 72), Span(0, 1))
    assert source.bytes_read == 2 * (7 * 40 + 7 * 60 + 72)


@pytest.mark.parametrize(
    ("matrices", "precision"), [("float16", "fp16"), ("bfloat16", "bf16"), ("float32", "fp32"), (None, "fp32")]
)
def test_precision(tmp_path: Path, matrices: str | None, precision: str) -> None:
    """Vectors do not count; a mixture (None) needs fp32."""
    file = one_file(tmp_path, hugging_face(UNTIED).to(getattr(torch, matrices or "float16")))
    norms = {name.replace(".", "__"): t.float() for name, t in load_file(file).items() if t.dim() == 1}
    rewrite(file, **norms, **({} if matrices else {"lm_head__weight": torch.ones(331, 72).bfloat16()}))
    assert open_source(checkpoint(tmp_path)).precision == precision


def test_a_header_of_any_length(tmp_path: Path) -> None:
    """Files of old writers do not align their tensors."""
    file = one_file(tmp_path, hugging_face(UNTIED).bfloat16())
    tensors = meta_tensors(hugging_face(UNTIED).bfloat16())
    content = file.read_bytes()
    [length] = struct.unpack("<Q", content[:8])
    for spaces in (1, 2, 3):
        header = content[8 : 8 + length] + b" " * spaces
        file.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
        check_slices(open_source(checkpoint(tmp_path)), tensors, 1)


def test_mistral_without_a_window_is_read_as_what_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 90, "num_hidden_layers": 2, "vocab_size": 331}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "sliding_window": None}
    model = MistralForCausalLM(MistralConfig(**sizes, **heads, max_position_embeddings=256))
    check_slices(open_source(checkpoint(write_hf(tmp_path, model))), meta_tensors(model), 1)


# ---- tied embeddings, buffers ----------------------------------------------------------------------------------


def test_tied_embeddings_are_what_the_config_declares(tmp_path: Path) -> None:
    model = hugging_face(MODEL)
    file = one_file(tmp_path, model)
    assert "lm_head.weight" not in load_file(file)
    check_slices(open_source(checkpoint(tmp_path)), meta_tensors(model), 1)
    rewrite(file, lm_head__weight=torch.ones(331, 72))
    check_slices(open_source(checkpoint(tmp_path)), meta_tensors(model), 1)


def test_a_missing_output_is_no_declaration(tmp_path: Path) -> None:
    rewrite(one_file(tmp_path), lm_head__weight=None)
    assert "output.weight is missing" in refusal(tmp_path)


def test_rotation_frequencies_are_known_and_ignored(tmp_path: Path) -> None:
    model = hugging_face(UNTIED)
    inv_freq = {f"model__layers__{i}__self_attn__rotary_emb__inv_freq": torch.ones(4).double() for i in range(2)}
    rewrite(one_file(tmp_path, model), **inv_freq)
    check_slices(open_source(checkpoint(tmp_path)), meta_tensors(model), 1)


# ---- not this model --------------------------------------------------------------------------------------------


def test_missing_unknown_and_wrongly_shaped_tensors_are_listed_in_one_line(tmp_path: Path) -> None:
    file = one_file(tmp_path)
    bias = {"model__layers__1__self_attn__q_proj__bias": torch.ones(72)}
    rewrite(file, model__norm__weight=None, model__layers__0__mlp__up_proj__weight=torch.ones(3, 72), **bias)
    said = refusal(tmp_path)
    assert said.startswith(f"{tmp_path} does not hold the model that its header describes: norm.weight is missing; ")
    assert "model.layers.1.self_attn.q_proj.bias is unknown" in said
    assert "layers.0.feed_forward.w3.weight has shape (3, 72), not (90, 72)" in said


def test_metas_names_are_no_names_of_hugging_face(tmp_path: Path) -> None:
    rewrite(one_file(tmp_path), tok_embeddings__weight=torch.ones(331, 72))
    assert "tok_embeddings.weight is there twice" in refusal(tmp_path)


def test_a_tensor_in_the_index_but_in_no_file(tmp_path: Path) -> None:
    write_hf(tmp_path, hugging_face(UNTIED), SHARD_SIZE)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    rewrite(tmp_path / index["weight_map"][Q], **{Q.replace(".", "__"): None})
    assert "layers.1.attention.wq.weight is missing" in refusal(tmp_path)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    write_hf(tmp_path, hugging_face(UNTIED), SHARD_SIZE)
    files = sorted(tmp_path.glob("*.safetensors"))
    rewrite(files[-1], **{name.replace(".", "__"): tensor for name, tensor in load_file(files[0]).items()})
    said = refusal(tmp_path)
    assert said.startswith(f"{files[-1]}: model.")
    assert "is there twice; check that all its files come from one download" in said


@pytest.mark.parametrize(("dtype", "kind"), [(torch.int32, "I32"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_types_that_are_no_plain_floats(tmp_path: Path, dtype: torch.dtype, kind: str) -> None:
    file = one_file(tmp_path)
    rewrite(file, **{Q.replace(".", "__"): torch.ones(72, 72).to(dtype)})
    assert refusal(tmp_path) == f"{file}: {Q} is {kind}, but only F32, F16, BF16 are read"


# ---- files that are not whole ----------------------------------------------------------------------------------


def file_refusal(file: Path) -> str:
    with pytest.raises(RequestError) as caught:
        open_file(file)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{file} is not a whole safetensors file (")
    assert str(caught.value).endswith("; download it again")
    return str(caught.value)


def test_a_file_cut_anywhere(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"lm_head.weight": torch.ones(50, 5), "model.norm.weight": torch.ones(5)}, file)
    content = file.read_bytes()
    for length in (*range(0, len(content), 7), len(content) - 1):
        file.write_bytes(content[:length])
        file_refusal(file)
    file.write_bytes(content + b"\0")
    file_refusal(file)


def test_files_of_other_kinds(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for content in (b"<!DOCTYPE html><p>Log in</p>", b"version https://git-lfs.github.com/spec/v1\n"):
        file.write_bytes(content)
        assert f"it begins with {content[:8]!r}" in file_refusal(file)


@pytest.mark.parametrize("length", [3 << 30, 1 << 62, (1 << 64) - 1])
def test_a_header_of_gigabytes_is_not_believed(tmp_path: Path, length: int) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", length) + b"{")
        opened.truncate(4 << 30)  # a hole: the bytes are there
    assert "header too large" in file_refusal(file)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b"\xff\xfe{}",
        b'{"w": 3}',
        b'{"w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
        b'"v": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_headers_that_lie(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    file_refusal(file)


def test_a_header_larger_than_any_models_is_not_parsed(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", 90_000_000) + b"{")
        opened.truncate(1 << 30)
    assert "header too large: 90000000 bytes" in file_refusal(file)
