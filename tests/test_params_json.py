"""Meta's params.json as published, what is refused of it, and our own folders' way there and back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factory import MODELS
from hypothesis import given
from hypothesis import strategies as st

from llama_mp.config import ModelConfig, RopeScaling, load_size, size_names
from llama_mp.errors import RequestError
from llama_mp.params_json import UNKNOWN_VOCAB, differences, known_equal, params_of, read_params

# As in Meta's downloads.
LLAMA_1 = {
    "7B": {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06, "vocab_size": -1},
    "13B": {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-06, "vocab_size": -1},
    "33B": {"dim": 6656, "multiple_of": 256, "n_heads": 52, "n_layers": 60, "norm_eps": 1e-06, "vocab_size": -1},
    "65B": {"dim": 8192, "multiple_of": 256, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1},
}
LLAMA_2 = {
    "llama2-7b": LLAMA_1["7B"] | {"norm_eps": 1e-05},
    "llama2-13b": LLAMA_1["13B"] | {"norm_eps": 1e-05},
    "llama2-70b": LLAMA_1["65B"] | {"multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_kv_heads": 8},
}
LLAMA_3_VALUES = {"n_kv_heads": 8, "vocab_size": 128256, "norm_eps": 1e-05, "rope_theta": 500000.0}
LLAMA_3 = {
    "llama3-8b": LLAMA_3_VALUES
    | {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 1024, "ffn_dim_multiplier": 1.3},
    "llama3-70b": LLAMA_3_VALUES
    | {"dim": 8192, "n_layers": 80, "n_heads": 64, "multiple_of": 4096, "ffn_dim_multiplier": 1.3},
    "llama3.2-1b": LLAMA_3_VALUES
    | {"dim": 2048, "n_layers": 16, "n_heads": 32, "multiple_of": 256, "ffn_dim_multiplier": 1.5}
    | {"use_scaled_rope": True},
    "llama3.2-3b": LLAMA_3_VALUES
    | {"dim": 3072, "n_layers": 28, "n_heads": 24, "multiple_of": 256, "ffn_dim_multiplier": 1.0}
    | {"use_scaled_rope": True},
}
META = LLAMA_1 | LLAMA_2 | LLAMA_3
LLAMA_3_1_8B = LLAMA_3["llama3-8b"] | {"use_scaled_rope": True}
TINY = {"dim": 64, "n_layers": 2, "n_heads": 4, "multiple_of": 32, "norm_eps": 1e-5, "vocab_size": 100}


def read(folder: Path, values: Any) -> ModelConfig:
    (folder / "params.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return read_params(folder / "params.json")


@pytest.mark.parametrize("size", META)
def test_metas_own_files_give_the_known_size(tmp_path: Path, size: str) -> None:
    config, known = read(tmp_path, META[size]), load_size(size)
    stated = {"vocab_size": UNKNOWN_VOCAB if META[size]["vocab_size"] == -1 else known.vocab_size}
    # What only the tensors tell, and where our own figures come from.
    untold = {name: getattr(config, name) for name in ("tied_embeddings", "source")}
    assert config == replace(known, **stated, **untold)


def test_a_downloads_norm_eps_tells_llama_1_from_2_where_it_can(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA_1["7B"]).context_length == 2048
    assert read(tmp_path, LLAMA_2["llama2-7b"]).context_length == 4096


def test_llama_3_2_scales_by_32_and_3_1_by_8(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA_3["llama3.2-1b"]).rope_scaling == RopeScaling(factor=32.0)
    config = read(tmp_path, LLAMA_3_1_8B)
    assert config.rope_scaling == RopeScaling(factor=8.0)
    assert config.context_length == 131072
    assert config.name == tmp_path.name, "Llama 3.1 is not Llama 3"


def test_a_stated_scaling_factor_is_taken(tmp_path: Path) -> None:
    stated = {"rope_scaling_factor": 16, "rope_high_freq_factor": 2}
    for values in (LLAMA_3["llama3.2-1b"], LLAMA_3_1_8B):
        assert read(tmp_path, values | stated).rope_scaling == RopeScaling(factor=16, high_freq_factor=2)


def test_an_unknown_model_is_named_after_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read(tmp_path, TINY)
    assert (config.name, config.hidden_dim, config.num_kv_heads, config.vocab_size) == (tmp_path.name, 192, 4, 100)
    monkeypatch.chdir(tmp_path)
    assert read_params(Path("params.json")).name == tmp_path.name


def test_keys_of_metas_run_say_nothing(tmp_path: Path) -> None:
    more = {"max_batch_size": 32, "max_seq_len": 2048, "model_parallel_size": 8, "n_kv_heads": None}
    assert read(tmp_path, TINY | more) == read(tmp_path, TINY)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            TINY | {"moe_args": {}, "quantization_args": 1},
            "has keys of another architecture: moe_args, quantization_args;",
        ),
        ({"dim": 64}, "lacks n_layers, n_heads; known keys: dim, "),
        (TINY | {"dim": None}, "lacks dim;"),
        ([TINY], "is not a JSON object"),
        ("", "is not JSON"),
        ('{"dim": 64', "is not JSON"),
        ("<html>", "is not JSON"),
        (TINY | {"dim": "4096"}, "dim is '4096', but must be of type int"),
        (TINY | {"dim": 64.5}, "dim is 64.5, but must be of type int"),
        (TINY | {"n_heads": True}, "n_heads is True, but must be of type int"),
        (TINY | {"n_layers": [2]}, r"n_layers is \[2\], but must be of type int"),
        (TINY | {"norm_eps": "small"}, "norm_eps is 'small', but must be of type float"),
        (json.dumps(TINY | {"norm_eps": float("nan")}), "norm_eps is nan, but must be of type float"),
        (TINY | {"use_scaled_rope": "yes"}, "use_scaled_rope is 'yes', but must be of type bool"),
        (TINY | {"rope_scaling_factor": "8"}, "rope_scaling_factor is '8', but must be of type float"),
        (TINY | {"dim": 10**30}, "dim is 10+, but must be of type int"),
        (TINY | {"llama_mp": []}, r"llama_mp is \[\], but must be of type dict"),
        (TINY | {"llama_mp": {"rope_scaling": 5}}, "llama_mp does not describe a model"),
        (TINY | {"llama_mp": {"rope_scaling": {"low_freq_factor": 1}}}, "llama_mp does not describe a model"),
        (TINY | {"llama_mp": {"degree": 5}}, r"unknown keys \['degree'\]"),
        (TINY | {"llama_mp": {"hidden_dim": "96"}}, "hidden_dim is '96', but must be a whole number"),
        (TINY | {"dim": 0}, "dim is 0, but must be at least 1"),
        (TINY | {"n_heads": 5}, "dim 64 is not a multiple of num_heads 5"),
        (TINY | {"n_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        (TINY | {"n_layers": 10**9}, "num_layers is 1000000000, more than any model has"),
        (TINY | {"norm_eps": 0}, "norm_eps is 0, but must be above 0"),
        (TINY | {"multiple_of": -8}, "multiple_of is -8, but must be at least 1"),
        (TINY | {"multiple_of": 0}, "multiple_of is 0, but must be at least 1"),
        (TINY | {"ffn_dim_multiplier": -1}, "hidden_dim is -160, but must be at least 1"),
        (TINY | {"use_scaled_rope": True, "rope_scaling_factor": 0}, "factor must be at least 1"),
    ],
)
def test_refusals_are_one_line(tmp_path: Path, values: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        read(tmp_path, values)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_not_json(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_bytes(b"\x80\x02}q\x00")
    with pytest.raises(RequestError, match="is not JSON"):
        read_params(tmp_path / "params.json")


# ---- our own folders -------------------------------------------------------------------------------------------


def metas_hidden_dim(dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """As Meta's model.py computes it: any loader of Meta's format finds the width by this."""
    hidden_dim = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        hidden_dim = int(ffn_dim_multiplier * hidden_dim)
    return multiple_of * ((hidden_dim + multiple_of - 1) // multiple_of)


@pytest.mark.parametrize("config", [*map(load_size, size_names()), *MODELS.values()], ids=lambda config: config.name)
@pytest.mark.parametrize("axis", [0, 1])
def test_our_own_folder_reads_back_exactly(tmp_path: Path, config: ModelConfig, axis: int) -> None:
    params = params_of(config, mp=3, embedding_axis=axis)
    assert read(tmp_path, params) == config
    assert metas_hidden_dim(config.dim, params["multiple_of"], params["ffn_dim_multiplier"]) == config.hidden_dim
    assert params.get("use_scaled_rope", False) == (config.rope_scaling is not None)


@given(half_dim=st.integers(1, 20_000), hidden_dim=st.integers(1, 200_000))
def test_metas_formula_gives_the_width_from_what_we_write(half_dim: int, hidden_dim: int) -> None:
    config = replace(MODELS["mha"], dim=2 * half_dim, num_heads=1, num_kv_heads=1, head_dim=2, hidden_dim=hidden_dim)
    params = params_of(config, mp=1, embedding_axis=0)
    assert metas_hidden_dim(config.dim, params["multiple_of"], params["ffn_dim_multiplier"]) == hidden_dim


# ---- known sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", size_names())
def test_each_known_size_equals_itself_alone(size: str) -> None:
    assert known_equal(load_size(size)) == load_size(size)


def test_differences_name_both_values_and_forgive_an_unknown_vocabulary() -> None:
    known = load_size("7B")
    changed = replace(known, num_layers=33, vocab_size=32001)
    assert differences(changed, known) == ["num_layers 33, not 32", "vocab_size 32001, not 32000"]
    assert differences(replace(known, vocab_size=UNKNOWN_VOCAB), known) == []
    assert known_equal(changed) is None
