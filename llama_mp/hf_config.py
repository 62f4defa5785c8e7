"""Hugging Face's `config.json`: the architecture it states, if that is LLaMA's. Needs no torch.

The file carries keys of training, of tools and of generation beside those of the architecture, so unknown ones pass;
those that would change what the model computes are read, or refused where they ask for something else.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama_mp.config import ModelConfig, RopeScaling
from llama_mp.errors import RequestError
from llama_mp.params_json import has_type, known_equal, read_object

# The model types that compute exactly what LLaMA computes from tensors of the same names, and the defaults of theirs
# that are not LLaMA's. The rest is near, but not equal: qwen2 adds biases, qwen3 norms of q and k, gemma and granite
# factors, phi3 fuses its matrices, smollm3 leaves rotations out. (SmolLM, TinyLlama, Yi and others are of type llama.)
MODEL_TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},  # LLaMA's, where sliding_window is null
}
FIELDS = {
    "hidden_size": "dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "hidden_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "norm_eps",
}
TYPES = {
    **dict.fromkeys((*FIELDS, "num_key_value_heads", "head_dim"), int),
    **dict.fromkeys(("rms_norm_eps", "rope_theta"), float),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), bool),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), dict),
    "hidden_act": str,
}
ROPE_TYPES = {
    **dict.fromkeys(("rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor"), float),
    "original_max_position_embeddings": int,
    "rope_type": str,
}
# Of transformers 4, which keeps these beside rope_scaling; version 5 keeps them within rope_parameters.
ROPE_BESIDE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
LLAMA3_FIELDS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_context_length",
}


def read_hf_config(path: Path) -> ModelConfig:
    """The architecture that `path`, a config.json, states; named after the known size that it equals.

    Raises RequestError for a model that is not LLaMA's architecture, and for missing and wrong values."""
    values = read_object(path)
    model_type = values.get("model_type")
    if model_type not in list(MODEL_TYPES):
        raise RequestError(
            f"{path}: model_type is {model_type!r}, which is not LLaMA's architecture; "
            f"supported: {', '.join(MODEL_TYPES)}"
        )
    # null means as much as an absent key everywhere but in sliding_window
    values = {k: v for k, v in (MODEL_TYPES[model_type] | values).items() if v is not None}
    missing = [key for key in FIELDS if key not in values]
    if missing:
        raise RequestError(f"{path} lacks {', '.join(missing)}; take config.json from the same download")
    check_types(path, values, TYPES)
    check_plain(path, values)
    rope_theta, rope_scaling = rope_of(path, values)
    try:
        config = ModelConfig(
            **{field: values[key] for key, field in FIELDS.items()},
            name=name_of(path.absolute().parent),
            num_kv_heads=values.get("num_key_value_heads", values["num_attention_heads"]),
            head_dim=values.get("head_dim", 0),
            tied_embeddings=values.get("tie_word_embeddings", False),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling and RopeScaling(**rope_scaling),
            embedding_axis=0,
        )
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error
    known = known_equal(config)
    return replace(config, name=known.name, embedding_axis=known.embedding_axis) if known else config


def name_of(folder: Path) -> str:
    """The folder's name; in the cache of Hugging Face (models--ORG--NAME/snapshots/HASH) the model's."""
    return folder.parent.parent.name.split("--")[-1] if folder.parent.name == "snapshots" else folder.name


def check_types(path: Path, values: dict[str, Any], types: dict[str, type]) -> None:
    for key in sorted(set(values) & set(types)):
        if not has_type(values[key], types[key]):
            raise RequestError(f"{path}: {key} is {values[key]!r}, but must be of type {types[key].__name__}")


def check_plain(path: Path, values: dict[str, Any]) -> None:
    """Raise RequestError for what makes a model of a supported type another architecture."""
    if values.get("quantization_config"):
        method = values["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise RequestError(
            f"{path}: the weights are quantized ({method}), which is not read from safetensors; "
            "take the model's unquantized files, or a .gguf"
        )
    for key, plain in {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}.items():
        if values.get(key, plain) != plain:
            raise RequestError(f"{path}: {key} is {values[key]!r}, but LLaMA's architecture has {plain!r}")
    if values["model_type"] == "mistral" and "sliding_window" in values:
        raise RequestError(
            f"{path}: sliding_window is {values['sliding_window']!r}, which is not supported; "
            "only Mistral models where it is null are LLaMA's architecture"
        )


def rope_of(path: Path, values: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, fields of RopeScaling or None) from both spellings, that of transformers 4 and that of 5."""
    rope: dict[str, Any] = {}
    beside = {key: values[key] for key in ROPE_BESIDE if key in values}
    for part in (beside, values.get("rope_scaling", {}), values.get("rope_parameters", {})):
        for key, value in part.items():
            key = "rope_type" if key == "type" else key
            if value is not None and rope.setdefault(key, value) != value:
                raise RequestError(f"{path} states {key} twice, {rope[key]!r} and {value!r}; remove the wrong one")
    kind, theta = rope.pop("rope_type", "default"), rope.pop("rope_theta", 10000.0)
    if kind not in ("default", "llama3"):
        raise RequestError(f"{path}: rope scaling of type {kind!r} is not supported; only llama3 and default are")
    check_types(path, rope | {"rope_theta": theta}, ROPE_TYPES)
    if rope.pop("partial_rotary_factor", 1) != 1:
        raise RequestError(f"{path}: partial_rotary_factor is not 1, but LLaMA's architecture rotates whole heads")
    unknown = sorted(set(rope) - set(LLAMA3_FIELDS))
    missing = [key for key in LLAMA3_FIELDS if key not in rope] if kind == "llama3" else []
    if missing or unknown:
        fault = f"lacks {', '.join(missing)}" if missing else f"has unknown keys: {', '.join(unknown)}"
        raise RequestError(f"{path}: rope scaling of type {kind} {fault}")
    return float(theta), {field: rope[key] for key, field in LLAMA3_FIELDS.items()} if kind == "llama3" else None


def hf_config_of(config: ModelConfig, *, dtype: str, bos_id: int | None, eos_ids: Sequence[int]) -> dict[str, Any]:
    """The config.json of `config`, whose weights are of torch's `dtype` ("bfloat16")."""
    [eos_id] = eos_ids if len(eos_ids) == 1 else [list(eos_ids) or None]
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(config, field) for key, field in FIELDS.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tied_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
    }
    if config.rope_scaling:
        scaling = {key: getattr(config.rope_scaling, field) for key, field in LLAMA3_FIELDS.items()}
        values["rope_scaling"] = {"rope_type": "llama3", **scaling}
    return values
