"""What a model is, what a run is, what a request asks for: frozen objects, built from files and flags.

Every class checks itself: an impossible value is a RequestError that names the numbers.
Fields made by `flag` carry their help text, so that a command line can be built from the class (cli.py).
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from llama_mp.cores import threads_asked
from llama_mp.errors import RequestError, did_you_mean
from llama_mp.flags import Flags, check_at_least, checked, flag

DEFAULT_SIZE = "smollm2-135m"
MAX_TIMEOUT_S = 1_000_000
MAX_GIB = 1_000_000
MAX_LAYERS = 10_000  # far beyond any model: a damaged header must not make us list billions of tensors
SIZE_ALIASES = {"30b": "33B"}  # the paper says 33B, Meta's download folder says 30B


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's frequency scaling: long wavelengths are divided by `factor`, with a smooth ramp between."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192

    def __post_init__(self) -> None:
        if not 1 <= self.factor < float("inf") or not self.low_freq_factor < self.high_freq_factor:
            raise RequestError(f"rope scaling {self}: factor must be at least 1, and low below high")
        if self.original_context_length < 1:
            raise RequestError(f"rope scaling {self}: original_context_length must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A LLaMA architecture in global numbers: nothing here depends on a model-parallel degree in use."""

    name: str
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden_dim: int
    vocab_size: int  # 0: not stated, taken from the tensors when they are opened
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = False
    context_length: int = 2048
    native_mp: int = 1  # shards of Meta's own download
    embedding_axis: Literal[0, 1] = 1  # axis on which Meta's files split tok_embeddings
    head_dim: int = 0  # 0: dim / num_heads
    source: str = ""  # where the figures come from

    def __post_init__(self) -> None:
        for name in ("dim", "num_layers", "num_heads", "num_kv_heads", "hidden_dim", "context_length"):
            self.check_whole(name, least=1)
        self.check_whole("vocab_size", least=0)
        self.check_whole("head_dim", least=0)
        if self.num_layers > MAX_LAYERS:
            raise RequestError(f"model {self.name}: num_layers is {self.num_layers}, more than any model has")
        for name in ("norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < float("inf"):
                raise RequestError(f"model {self.name}: {name} is {getattr(self, name)}, but must be above 0")
        if self.num_heads % self.num_kv_heads:
            raise RequestError(
                f"model {self.name}: num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if not self.head_dim:
            if self.dim % self.num_heads:
                raise RequestError(f"model {self.name}: dim {self.dim} is not a multiple of num_heads {self.num_heads}")
            object.__setattr__(self, "head_dim", self.dim // self.num_heads)
        if self.head_dim % 2:
            raise RequestError(f"model {self.name}: head_dim {self.head_dim} is odd, but rotations take pairs")

    def check_whole(self, name: str, *, least: int) -> None:
        value = getattr(self, name)
        if type(value) is not int:
            raise RequestError(f"model {self.name}: {name} is {value!r}, but must be a whole number")
        if value < least:
            raise RequestError(f"model {self.name}: {name} is {value}, but must be at least {least}")

    @property
    def num_queries_per_kv(self) -> int:
        return self.num_heads // self.num_kv_heads


def configs_folder() -> Path:
    """Where the sizes lie: inside an installed package, beside the package in a checkout (setup.cfg maps them)."""
    package = Path(__file__).parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def size_names() -> list[str]:
    """The names that `--size` knows: by family, smallest first."""
    names = [path.stem for path in configs_folder().glob("*.toml")]
    # digits and the text between them alternate, so that numbers are compared with numbers: 7B before 13B
    return sorted(names, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])


def load_size(size: str) -> ModelConfig:
    """The architecture that configs/ holds under `size`, letter case and `30B` forgiven."""
    known = {name.lower(): name for name in size_names()}
    wanted = SIZE_ALIASES.get(size.lower(), size).lower()
    if wanted not in known:
        sizes = ", ".join(known.values())
        raise RequestError(f"--size {size} is not known{did_you_mean(size, known.values())}; sizes: {sizes}")
    text = (configs_folder() / f"{known[wanted]}.toml").read_text(encoding="utf-8")
    return config_from_mapping({"name": known[wanted]} | tomllib.loads(text))


def config_from_mapping(values: Mapping[str, Any]) -> ModelConfig:
    """A ModelConfig from a config file's keys; an unknown key is an error that lists the valid ones."""
    valid = [f.name for f in fields(ModelConfig)]
    unknown = sorted(set(values) - set(valid))
    if unknown:
        raise RequestError(f"model {values.get('name')}: unknown keys {unknown}; valid keys: {', '.join(valid)}")
    scaling = values.get("rope_scaling") or {}
    strange = sorted(set(scaling) - {f.name for f in fields(RopeScaling)})
    if strange:
        raise RequestError(f"model {values.get('name')}: unknown keys of rope_scaling {strange}")
    return ModelConfig(**{**values, "rope_scaling": RopeScaling(**scaling) if scaling else None})


def check_deterministic(flags: Any) -> None:
    """Raise RequestError when `flags` ask for the same bits everywhere, and for what makes others."""
    for name in ("quant", "offload"):
        value = getattr(flags, name)
        if flags.deterministic and value != "none":
            raise RequestError(f"--deterministic and --{name} {value} are both given: drop one")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Flags):
    """How a model is run: the model flags of the commands' contract."""

    size: str | None = flag(None, f"a model of configs/; {DEFAULT_SIZE} when --ckpt_dir is absent too")
    ckpt_dir: Path | None = flag(None, "a folder of consolidated.NN.pth or safetensors, or a .gguf file")
    tokenizer: Path | None = flag(None, "tokenizer file; default: beside the checkpoint, one folder up, or in the GGUF")
    chat_format: Literal["auto", "llama2", "llama3"] = flag("auto", "how chats are written; auto: the model's template")
    dtype: Literal["auto", "fp32", "tf32", "fp16", "bf16"] = flag("auto", "precision of weights and computation")
    quant: Literal["none", "int8", "int4"] = flag("none", "weights of the matrices in fewer bits")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "where the model runs")
    offload: Literal["none", "cpu", "disk"] = flag("none", "where blocks wait that come to the device one at a time")
    device_memory_gib: float | None = flag(None, "GiB a rank may take there with --offload; default: what is free")
    host_memory_gib: float | None = flag(None, "GiB of main memory for a rank's blocks; on a CPU, from disk: for all")
    deterministic: bool = flag(False, "the same bits over 1, 2, 4 and 8 ranks; slower")
    eager: bool = flag(False, "on a GPU launch each kernel by itself: no CUDA graphs")
    max_seq_len: int | None = flag(None, "tokens of prompt and answer that a row holds; default: from the prompts")
    max_batch_size: int = flag(8, "rows computed at once")
    step_timeout: float = flag(60.0, "seconds after which a silent rank ends the run")
    force: bool = flag(False, "try even what does not fit the free memory")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, max_seq_len=2, max_batch_size=1)
        for name in ("device_memory_gib", "host_memory_gib"):
            limit = getattr(self, name)
            if limit is not None and self.offload == "none":
                raise RequestError(f"--{name} is for blocks that wait elsewhere: give --offload cpu or disk too")
            if limit is not None and not 0 < limit < MAX_GIB:
                raise RequestError(f"--{name} is {limit}, but must be above 0 and below {MAX_GIB}")
        threads = threads_asked()  # wrong ones are refused with the request, before any rank starts
        check_deterministic(self)
        if self.deterministic and threads not in (None, 1):
            raise RequestError(f"--deterministic computes with one thread, and LLAMA_MP_THREADS is {threads}: unset it")
        if not 0 < self.step_timeout <= MAX_TIMEOUT_S:
            raise RequestError(
                f"--step_timeout is {self.step_timeout}, but must be above 0 and at most {MAX_TIMEOUT_S}"
            )


@dataclass(frozen=True, kw_only=True)
class LogConfig(Flags):
    """For the verbs that run a model."""

    log_json: bool = flag(False, "write what is told on standard error as JSON, an object a line")


@dataclass(frozen=True, kw_only=True)
class DrawingConfig(Flags):
    """How the tokens of an answer are drawn, and when it ends."""

    max_gen_len: int = flag(128, "tokens to generate at most")
    temperature: float = flag(0.6, "0 is greedy")
    top_p: float = flag(0.9, "sample from the smallest set of tokens with this probability")
    top_k: int = flag(0, "sample from this many tokens; 0: all")
    min_p: float = flag(0.0, "drop tokens less probable than this fraction of the best one")
    repetition_penalty: float = flag(1.0, "divides the positive logits of tokens seen, multiplies the negative ones")
    seed: int = flag(1, "the same seed, id and prompt give the same text, whatever runs beside it")
    stop: tuple[str, ...] = flag((), "end at this text, which is left out; may be given several times")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, max_gen_len=1, temperature=0, top_k=0, min_p=0)
        if not 0 < self.top_p <= 1:
            raise RequestError(f"--top_p is {self.top_p}, but must be above 0 and at most 1")
        if self.min_p > 1:
            raise RequestError(f"--min_p is {self.min_p}, but must be at most 1")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise RequestError(f"--repetition_penalty is {self.repetition_penalty}, but must be between 0.01 and 100")
        if "" in self.stop:
            raise RequestError("--stop is empty, but must be a text of at least one character")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(DrawingConfig):
    """What one request asks of the generation: also what is returned beside the answer."""

    logprobs: bool = flag(False, "log-probability of each generated token")
    prompt_logprobs: bool = flag(False, "log-probability of each prompt token but the first")
    echo: bool = flag(False, "put the prompt before the completion")

    def override(self, values: Mapping[str, Any]) -> "SamplingConfig":
        """This request with the flags of one prompts-file line; wrong names and types are errors."""
        return replace(self, **checked(SamplingConfig, values, others=("id", "prompt", "messages")))
