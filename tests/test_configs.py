"""configs/*.toml against the published parameter counts, and what `--size` forgives and refuses."""

import tomllib

import pytest

from llama_mp import config as config_module
from llama_mp.config import ModelConfig, config_from_mapping, configs_folder, load_size, size_names
from llama_mp.errors import RequestError

# Parameters as published: LLaMA paper, table 2, and the model cards of the other families.
PUBLISHED_PARAMS = {
    "7B": 6.74e9,
    "13B": 13.02e9,
    "33B": 32.53e9,
    "65B": 65.29e9,
    "llama2-7b": 6.74e9,
    "llama2-13b": 13.02e9,
    "llama2-70b": 68.98e9,
    "llama3-8b": 8.03e9,
    "llama3-70b": 70.55e9,
    "llama3.2-1b": 1.236e9,
    "llama3.2-3b": 3.213e9,
    "smollm2-135m": 134.5e6,
}
# Shards of Meta's own downloads; SmolLM2 has none and is one file.
NATIVE_MP = {"7B": 1, "13B": 2, "33B": 4, "65B": 8, "llama2-7b": 1, "llama2-13b": 2, "llama2-70b": 8} | {
    "llama3-8b": 1,
    "llama3-70b": 8,
    "llama3.2-1b": 1,
    "llama3.2-3b": 1,
    "smollm2-135m": 1,
}


def num_params(config: ModelConfig) -> int:
    """Weights of the whole model, written out again so that a wrong formula elsewhere is not its own oracle."""
    q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = config.dim * (2 * q_dim + 2 * kv_dim)  # wq, wo; wk, wv
    feed_forward = 3 * config.dim * config.hidden_dim  # w1, w2, w3
    block = attention + feed_forward + 2 * config.dim  # and two norms
    vocabularies = 1 if config.tied_embeddings else 2
    return config.num_layers * block + vocabularies * config.vocab_size * config.dim + config.dim


def test_sizes_are_the_published_ones_smallest_first_in_each_family() -> None:
    assert size_names() == list(PUBLISHED_PARAMS)


@pytest.mark.parametrize("size", PUBLISHED_PARAMS)
def test_parameter_count_is_the_published_one(size: str) -> None:
    assert num_params(load_size(size)) == pytest.approx(PUBLISHED_PARAMS[size], rel=1e-3)


@pytest.mark.parametrize("size", PUBLISHED_PARAMS)
def test_family_facts(size: str) -> None:
    config = load_size(size)
    assert config.name == size
    assert config.source
    assert config.native_mp == NATIVE_MP[size]
    assert config.num_heads % config.native_mp == 0
    llama_1_or_2 = config.vocab_size == 32000
    assert config.embedding_axis == (1 if llama_1_or_2 else 0)
    assert config.rope_theta == (1e4 if llama_1_or_2 else 1e5 if size.startswith("smollm2") else 5e5)
    assert (config.rope_scaling is not None) == size.startswith("llama3.2")
    assert config.tied_embeddings == size.startswith(("llama3.2", "smollm2"))


@pytest.mark.parametrize("size", PUBLISHED_PARAMS)
def test_file_states_every_figure_that_differs_between_families(size: str) -> None:
    keys = tomllib.loads((configs_folder() / f"{size}.toml").read_text(encoding="utf-8")).keys()
    assert keys >= {"source", "norm_eps", "context_length", "native_mp", "embedding_axis", "vocab_size"}


@pytest.mark.parametrize(
    ("asked", "meant"),
    [("30b", "33B"), ("30B", "33B"), ("65b", "65B"), ("Llama3-8B", "llama3-8b"), ("SmolLM2-135M", "smollm2-135m")],
)
def test_size_forgives(asked: str, meant: str) -> None:
    assert load_size(asked) == load_size(meant)


def test_unknown_size_names_the_nearest_and_all() -> None:
    with pytest.raises(RequestError, match=r"^--size 14B is not known \(did you mean 13B\?\); sizes: 7B, .*135m$"):
        load_size("14B")


@pytest.mark.parametrize("size", ["", "../configs/7B", "7B.toml", "gpt-neox-20b"])
def test_unknown_size_is_refused(size: str) -> None:
    with pytest.raises(RequestError, match="is not known"):
        load_size(size)


def test_unknown_key_in_a_file_is_refused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (configs_folder() / "7B.toml").read_text(encoding="utf-8")
    (tmp_path / "mine.toml").write_text(text + "n_heads = 32\n", encoding="utf-8")
    monkeypatch.setattr(config_module, "configs_folder", lambda: tmp_path)
    with pytest.raises(RequestError, match=r"model mine: unknown keys \['n_heads'\]; valid keys: .*num_heads"):
        load_size("mine")


def test_impossible_figures_are_refused() -> None:
    good = {"dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 128, "vocab_size": 100}
    assert config_from_mapping({"name": "tiny"} | good).head_dim == 16
    for change, words in [
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"dim": 66}, "dim 66 is not a multiple of num_heads 4"),
        ({"num_layers": 0}, "num_layers is 0, but must be at least 1"),
    ]:
        with pytest.raises(RequestError, match=f"model tiny: {words}"):
            config_from_mapping({"name": "tiny"} | good | change)
