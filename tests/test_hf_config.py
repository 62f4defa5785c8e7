"""Hugging Face's config.json as published, in both spellings of the rotations, and what is refused of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factory import MODELS, hugging_face
from transformers import AutoConfig, LlamaConfig, MistralConfig

from llama_mp.config import ModelConfig, RopeScaling, load_size, size_names
from llama_mp.errors import RequestError
from llama_mp.hf_config import FIELDS, LLAMA3_FIELDS, hf_config_of, read_hf_config

# As in the downloads (transformers 4), without the keys that say nothing of the architecture.
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
LLAMA_3_SCALING = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_3_2_1B = LLAMA_2_7B | {
    "attention_bias": False,
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rope_scaling": LLAMA_3_SCALING,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
SMOLLM2 = LLAMA_2_7B | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
MISTRAL = LLAMA_2_7B | {
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32768,
}
PUBLISHED = {"llama2-7b": LLAMA_2_7B, "llama3.2-1b": LLAMA_3_2_1B, "smollm2-135m": SMOLLM2}


def read(folder: Path, values: Any) -> ModelConfig:
    (folder / "config.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return read_hf_config(folder / "config.json")


def refusal(folder: Path, values: Any) -> str:
    with pytest.raises(RequestError) as caught:
        read(folder, values)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(folder / "config.json"))
    return str(caught.value)


def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


# ---- read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_files_give_the_known_size(tmp_path: Path, size: str) -> None:
    config, known = read(tmp_path, PUBLISHED[size]), load_size(size)
    # Of Meta's files, and where our own figures come from.
    own = {name: getattr(config, name) for name in ("embedding_axis", "native_mp", "source")}
    assert config == ModelConfig(**{**vars(known), **own})


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_5_writes(tmp_path: Path, name: str) -> None:
    hugging_face(MODELS[name]).config.save_pretrained(tmp_path)
    config = read_hf_config(tmp_path / "config.json")
    assert config == ModelConfig(**{**vars(MODELS[name]), "name": tmp_path.name, "embedding_axis": 0})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({}, {"rope_theta": 10000.0}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_theta": 500000, "rope_type": "default"}),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, {"rope_theta": 5e5, "rope_type": "default"}),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA_3_SCALING}, {"rope_theta": 5e5} | LLAMA_3_SCALING),
    ],
)
def test_both_spellings_mean_what_transformers_makes_of_them(tmp_path: Path, old: dict, new: dict) -> None:
    base = without(LLAMA_3_2_1B, "rope_theta", "rope_scaling")
    configs = [read(tmp_path, base | old), read(tmp_path, base | {"rope_parameters": new})]
    configs.append(read(tmp_path, base | old | {"rope_parameters": new}))  # as tools write it that serve both
    assert configs[0] == configs[1] == configs[2]
    theirs = LlamaConfig.from_dict(base | old).rope_parameters
    assert configs[0].rope_theta == theirs["rope_theta"]
    assert (configs[0].rope_scaling is not None) == (theirs["rope_type"] == "llama3")


def test_llama_3s_four_numbers_and_both_names_of_the_type(tmp_path: Path) -> None:
    numbers = {
        "factor": 2,
        "low_freq_factor": 3.0,
        "high_freq_factor": 5.0,
        "original_max_position_embeddings": 4096,
    }
    expected = RopeScaling(factor=2, low_freq_factor=3.0, high_freq_factor=5.0, original_context_length=4096)
    for kind in ({"type": "llama3"}, {"rope_type": "llama3"}, {"type": "llama3", "rope_type": "llama3"}):
        assert read(tmp_path, LLAMA_2_7B | {"rope_scaling": numbers | kind}).rope_scaling == expected
    later = without(numbers, "original_max_position_embeddings") | {"rope_type": "llama3"}
    beside = {"rope_scaling": later, "original_max_position_embeddings": 4096}
    assert read(tmp_path, LLAMA_2_7B | beside).rope_scaling == expected


def test_what_is_left_out_or_null_is_transformers_default(tmp_path: Path) -> None:
    left_out = ("num_key_value_heads", "head_dim", "tie_word_embeddings", "rope_scaling", "hidden_act", "rope_theta")
    bare, theirs = without(LLAMA_2_7B, *left_out), LlamaConfig()
    for values in (bare, bare | dict.fromkeys(left_out)):
        config = read(tmp_path, values)
        assert config.num_kv_heads == theirs.num_key_value_heads == 32
        assert config.head_dim == theirs.head_dim == 128
        assert config.tied_embeddings == theirs.tie_word_embeddings
        assert config.rope_theta == 10000.0


def test_heads_whose_width_is_not_the_models_divided(tmp_path: Path) -> None:
    assert read(tmp_path, MISTRAL | {"hidden_size": 5120, "head_dim": 128}).head_dim == 128  # Mistral Nemo


def test_mistral_without_a_sliding_window_is_llama(tmp_path: Path) -> None:
    config = read(tmp_path, MISTRAL)
    assert config == read(tmp_path, MISTRAL | {"model_type": "llama"})
    assert (config.num_kv_heads, config.context_length) == (8, 32768)
    assert read(tmp_path, without(MISTRAL, "num_key_value_heads")).num_kv_heads == MistralConfig().num_key_value_heads


def test_other_models_are_named_after_their_folder(tmp_path: Path) -> None:
    folder = tmp_path / "models--mistralai--Mistral-7B-Instruct-v0.3" / "snapshots" / "c170c708"
    folder.mkdir(parents=True)
    assert read(tmp_path, MISTRAL).name == tmp_path.name
    assert read(folder, MISTRAL).name == "Mistral-7B-Instruct-v0.3"


# ---- refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["qwen2", "mixtral", "gpt2", "smollm3", None, ["llama"], "LLAMA"])
def test_other_architectures_are_refused_with_the_list(tmp_path: Path, model_type: Any) -> None:
    said = refusal(tmp_path, LLAMA_2_7B | {"model_type": model_type})
    assert f"model_type is {model_type!r}" in said
    assert said.endswith("supported: llama, mistral")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"attention_bias": True}, "attention_bias is True, but LLaMA's architecture has False"),
        ({"mlp_bias": True}, "mlp_bias is True, but LLaMA's architecture has False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but LLaMA's architecture has 'silu'"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "the weights are quantized (gptq), which",
        ),
        ({"quantization_config": "awq"}, "the weights are quantized (awq), which"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
        ({"hidden_size": "4096"}, "hidden_size is '4096', but must be of type int"),
        ({"hidden_size": 4096.5}, "hidden_size is 4096.5, but must be of type int"),
        ({"hidden_size": 0}, "dim is 0, but must be at least 1"),
        ({"hidden_size": 4095}, "dim 4095 is not a multiple of num_heads 32"),
        ({"num_key_value_heads": 5}, "num_heads 32 is not a multiple of num_kv_heads 5"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"num_hidden_layers": 10**9}, "num_layers is 1000000000, more than any model has"),
        ({"rms_norm_eps": 0}, "norm_eps is 0, but must be above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, but must be of type float"),
        ({"rope_theta": "10000"}, "rope_theta is '10000', but must be of type float"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', but must be of type bool"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3', but must be of type dict"),
    ],
)
def test_values_that_make_another_model_or_none(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    assert words in refusal(tmp_path, LLAMA_2_7B | values)


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "linear", "factor": 2.0}, "rope scaling of type 'linear' is not supported"),
        ({"type": "dynamic", "factor": 2.0}, "rope scaling of type 'dynamic' is not supported"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 32}, "rope scaling of type 'yarn' is not supported"),
        ({"rope_type": ["llama3"]}, "rope scaling of type ['llama3'] is not supported"),
        ({"type": "default", "rope_type": "llama3"}, "states rope_type twice, 'default' and 'llama3'"),
        (without(LLAMA_3_SCALING, "factor"), "rope scaling of type llama3 lacks factor"),
        (without(LLAMA_3_SCALING, "factor", "low_freq_factor"), "lacks factor, low_freq_factor"),
        (LLAMA_3_SCALING | {"attention_factor": 2.0}, "of type llama3 has unknown keys: attention_factor"),
        (LLAMA_3_SCALING | {"factor": "8"}, "factor is '8', but must be of type float"),
        (LLAMA_3_SCALING | {"factor": 0.5}, "factor must be at least 1"),
        (LLAMA_3_SCALING | {"low_freq_factor": 4.0}, "low below high"),
        (LLAMA_3_SCALING | {"original_max_position_embeddings": 0}, "original_context_length must be at least 1"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is not 1"),
        ({"full_attention": {"rope_type": "default"}}, "has unknown keys: full_attention"),
    ],
)
def test_rotations_of_other_kinds(tmp_path: Path, spelling: str, rope: dict[str, Any], words: str) -> None:
    assert words in refusal(tmp_path, LLAMA_2_7B | {spelling: rope})


def test_two_spellings_that_contradict(tmp_path: Path) -> None:
    values = LLAMA_2_7B | {"rope_theta": 10000.0, "rope_parameters": {"rope_theta": 20000.0}}
    assert "states rope_theta twice, 10000.0 and 20000.0; remove the wrong one" in refusal(tmp_path, values)


@pytest.mark.parametrize("window", [{"sliding_window": 4096}, {}])
def test_mistral_with_a_sliding_window(tmp_path: Path, window: dict[str, int]) -> None:
    """Left out, it is 4096."""
    said = refusal(tmp_path, without(MISTRAL, "sliding_window") | window)
    assert f"sliding_window is {MistralConfig().sliding_window}, which is not supported" in said


def test_missing_keys_are_listed(tmp_path: Path) -> None:
    said = refusal(tmp_path, without(LLAMA_2_7B, "hidden_size", "rms_norm_eps"))
    assert said.endswith("lacks hidden_size, rms_norm_eps; take config.json from the same download")


def test_files_that_are_no_objects(tmp_path: Path) -> None:
    for text in ("", "<html>", "{", "[" * 100_000):
        assert "is not JSON (" in refusal(tmp_path, text)
    for text in ("[]", "3"):
        assert "is not a JSON object; take config.json" in refusal(tmp_path, text)
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        read_hf_config(tmp_path / "nowhere.json")


# ---- written ---------------------------------------------------------------------------------------------------

ALL = [*map(load_size, size_names()), *MODELS.values()]


def as_read(config: ModelConfig, folder: Path) -> ModelConfig:
    """`config` but for what config.json cannot say: a model that is known is recognized, another is the folder's."""
    if config.name in MODELS:
        return replace(config, name=folder.name, embedding_axis=0)
    known = {field: getattr(ModelConfig, field) for field in ("native_mp", "source")}
    return replace(config, embedding_axis=0, **known)


@pytest.mark.parametrize("config", ALL, ids=lambda config: config.name)
def test_what_we_write_reads_back_as_the_same_model(tmp_path: Path, config: ModelConfig) -> None:
    values = hf_config_of(config, dtype="bfloat16", bos_id=1, eos_ids=[2])
    assert as_read(read(tmp_path, values), tmp_path) == as_read(config, tmp_path)


@pytest.mark.parametrize("config", ALL, ids=lambda config: config.name)
def test_transformers_makes_the_same_model_of_it(tmp_path: Path, config: ModelConfig) -> None:
    eos_ids = [2, 7] if config.rope_scaling else [2]
    read(tmp_path, hf_config_of(config, dtype="bfloat16", bos_id=1, eos_ids=eos_ids))
    found = AutoConfig.from_pretrained(tmp_path)
    assert (found.model_type, found.architectures) == ("llama", ["LlamaForCausalLM"])
    for key, field in FIELDS.items():
        assert getattr(found, key) == getattr(config, field)
    assert (found.num_key_value_heads, found.head_dim) == (config.num_kv_heads, config.head_dim)
    assert found.tie_word_embeddings == config.tied_embeddings
    assert (found.dtype, found.bos_token_id) == (torch.bfloat16, 1)
    assert found.eos_token_id == (eos_ids if config.rope_scaling else 2)
    assert (found.hidden_act, found.attention_bias, found.mlp_bias) == ("silu", False, False)
    rope = found.rope_parameters
    assert rope["rope_theta"] == config.rope_theta
    if config.rope_scaling:
        assert rope["rope_type"] == "llama3"
        assert {field: rope[key] for key, field in LLAMA3_FIELDS.items()} == vars(config.rope_scaling)
    else:
        assert rope["rope_type"] == "default"


def test_tokens_that_are_not_known_are_null(tmp_path: Path) -> None:
    values = hf_config_of(MODELS["gqa"], dtype="float32", bos_id=None, eos_ids=[])
    assert values["bos_token_id"] is None and values["eos_token_id"] is None
    read(tmp_path, values)
    assert AutoConfig.from_pretrained(tmp_path).eos_token_id is None
