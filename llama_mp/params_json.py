"""Meta's `params.json`, both ways: what its keys mean, and how a folder of ours explains itself.

Meta's file leaves out the context length, the embedding axis and, in LLaMA 1 and 2, the vocabulary (-1). Folders that
we write hold what is missing under one key of their own, which Meta's keys beside it do not contradict.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llama_mp.config import ModelConfig, RopeScaling, config_from_mapping, load_size, size_names
from llama_mp.errors import RequestError
from llama_mp.files import read_small
from llama_mp.layout import padded_sizes

OWN_KEY = "llama_mp"
SHARDS_KEY = "shards"  # below our own: how the folder is cut
REQUIRED = ("dim", "n_layers", "n_heads")
TYPES = {
    **dict.fromkeys((*REQUIRED, "n_kv_heads", "multiple_of", "vocab_size"), int),
    **dict.fromkeys(("ffn_dim_multiplier", "norm_eps", "rope_theta"), float),
    **dict.fromkeys(("rope_scaling_factor", "rope_high_freq_factor"), float),
    "use_scaled_rope": bool,
    OWN_KEY: dict,
}
SCALED_CONTEXT = 131072  # tokens: of every model that Meta published with use_scaled_rope
# Say nothing about the weights: sizes of Meta's own buffers and run.
WITHOUT_MEANING = ("max_batch_size", "max_seq_len", "model_parallel_size")
UNKNOWN_VOCAB = 0  # in a ModelConfig: taken from the tensors when they are opened


def read_params(path: Path) -> ModelConfig:
    """The architecture that `path`, a params.json, states; named after the known size that it equals."""
    values = read_object(path)
    check_values(path, values)
    own = {key: value for key, value in (values.get(OWN_KEY) or {}).items() if key != SHARDS_KEY}
    fields = own | meta_fields(values, own) | {"name": own.get("name", path.absolute().parent.name)}
    try:
        config = config_from_mapping(fields)
    except TypeError as error:
        raise RequestError(f"{path}: {OWN_KEY} does not describe a model ({error}); write the folder again") from error
    return config if own else complete_from_known(config, values)


def stated_degree(path: Path) -> int | None:
    """The number of shards that `path`, a params.json, says there are; Meta's own does not say."""
    own = read_object(path).get(OWN_KEY)
    cut = own.get(SHARDS_KEY) if isinstance(own, dict) else None
    mp = cut.get("mp") if isinstance(cut, dict) else None
    return mp if type(mp) is int else None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises RequestError when there is none."""
    remedy = f"take {path.name} from the same download"
    content = read_small(path)
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not JSON ({error}); {remedy}") from error
    if not isinstance(values, dict):
        raise RequestError(f"{path} is not a JSON object; {remedy}")
    return values


def check_values(path: Path, values: dict[str, Any]) -> None:
    """Raise RequestError for missing and unknown keys, and for values of a wrong type."""
    missing = [key for key in REQUIRED if values.get(key) is None]
    valid = {*TYPES, *WITHOUT_MEANING}
    unknown = sorted(set(values) - valid)
    if missing or unknown:
        fault = f"lacks {', '.join(missing)}" if missing else f"has keys of another architecture: {', '.join(unknown)}"
        raise RequestError(f"{path} {fault}; known keys: {', '.join(sorted(valid))}")
    for key in sorted(set(values) & set(TYPES)):
        if values[key] is not None and not has_type(values[key], TYPES[key]):
            raise RequestError(f"{path}: {key} is {values[key]!r}, but must be of type {TYPES[key].__name__}")
    multiple_of = values.get("multiple_of")
    if multiple_of is not None and multiple_of < 1:
        raise RequestError(f"{path}: multiple_of is {multiple_of}, but must be at least 1")


def has_type(value: Any, kind: type) -> bool:
    """Whether a JSON value is of `kind`; a whole number passes for a float, and no number is beyond all measure."""
    if kind in (int, float):
        return type(value) in (int, kind) and abs(value) < 2**53  # NaN is not
    return isinstance(value, kind)


def meta_fields(values: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """ModelConfig's fields from Meta's keys."""
    given = {key: value for key, value in values.items() if value is not None}
    vocab_size = given.get("vocab_size", -1)  # -1, in LLaMA 1 and 2: the tokenizer's
    fields = {
        "dim": given["dim"],
        "num_layers": given["n_layers"],
        "num_heads": given["n_heads"],
        "num_kv_heads": given.get("n_kv_heads", given["n_heads"]),
        "hidden_dim": own.get("hidden_dim")
        or hidden_dim(given["dim"], given.get("multiple_of", 256), given.get("ffn_dim_multiplier")),
        "vocab_size": vocab_size if vocab_size > 0 else own.get("vocab_size", UNKNOWN_VOCAB),
        "norm_eps": given.get("norm_eps", 1e-5),
        "rope_theta": float(given.get("rope_theta", 10000.0)),
    }
    if given.get("use_scaled_rope") and "rope_scaling" not in own:
        fields["rope_scaling"] = {
            "factor": given.get("rope_scaling_factor", 8.0),
            "high_freq_factor": given.get("rope_high_freq_factor", 4.0),
        }
        fields["context_length"] = SCALED_CONTEXT
    return fields


def hidden_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Width of the feed-forward network: 2/3 of 4 x dim, times `multiplier`, up to a multiple (Meta's model.py)."""
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return -(-hidden // multiple_of) * multiple_of


def complete_from_known(config: ModelConfig, values: dict[str, Any]) -> ModelConfig:
    """`config` with what Meta's keys leave out, of the model in configs/ that it equals, if any."""
    known = known_equal(config)
    if known is None:
        return config
    scaling = config.rope_scaling
    if scaling and "rope_scaling_factor" not in values:
        scaling = known.rope_scaling or scaling
    return replace(
        config,
        name=known.name,
        context_length=known.context_length,
        native_mp=known.native_mp,
        embedding_axis=known.embedding_axis,
        rope_scaling=scaling,
    )


def known_equal(config: ModelConfig) -> ModelConfig | None:
    """The model in configs/ that has this architecture and at least this context length, which tells Llama 3 from 3.1.

    LLaMA 1 and Llama 2 of one size differ in norm_eps and context length alone: the nearer is taken."""
    equal = [
        known
        for known in map(load_size, size_names())
        if not differences(config, known) and config.context_length <= known.context_length
    ]

    def distance(known: ModelConfig) -> tuple[float, int]:
        return abs(known.norm_eps - config.norm_eps), known.context_length - config.context_length

    return min(equal, key=distance, default=None)


def differences(config: ModelConfig, known: ModelConfig) -> list[str]:
    """The fields in which two architectures differ, as texts `field a, not b`.

    An unknown vocabulary differs from none."""
    names = ["dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_dim", "rope_theta"]
    if config.vocab_size != UNKNOWN_VOCAB:
        names.append("vocab_size")
    pairs = [(name, getattr(config, name), getattr(known, name)) for name in names]
    return [f"{name} {a}, not {b}" for name, a, b in pairs if a != b]


def params_of(
    config: ModelConfig, *, mp: int, embedding_axis: int, original: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The params.json of a Meta folder of `config` in mp shards, embeddings split on `embedding_axis`.

    Meta's keys, as in the `original` if there is one, and under our own all that they cannot say: the model
    (`config.embedding_axis` is that of Meta's own files, whatever this folder's), and how the folder is cut."""
    own = asdict(config) | {
        SHARDS_KEY: {"mp": mp, "embedding_axis": embedding_axis, "padded_sizes": padded_sizes(config, mp)}
    }
    return {**(original or meta_keys(config)), OWN_KEY: own}


def meta_keys(config: ModelConfig) -> dict[str, Any]:
    """Meta's own keys: its loader multiplies out the feed-forward width from multiple_of 1 and a multiplier for it."""
    base = int(2 * (4 * config.dim) / 3)
    keys = {
        "dim": config.dim,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "multiple_of": 1,
        "ffn_dim_multiplier": (config.hidden_dim + 0.5) / base,  # int() of the product is exact in the middle
        "norm_eps": config.norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_theta,
    }
    if isinstance(config.rope_scaling, RopeScaling):
        keys["use_scaled_rope"] = True
    return keys
