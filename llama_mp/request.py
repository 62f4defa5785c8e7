"""A request on its way through the engine: token ids, nothing of text."""

from dataclasses import dataclass, field
from typing import Literal

from llama_mp.config import SamplingConfig


@dataclass(kw_only=True, eq=False)
class Request:
    """`prompt` ids, and what has been generated so far. Setting `finish_reason` ends it at the next step."""

    id: str
    prompt: list[int]
    sampling: SamplingConfig
    tokens: list[int] = field(default_factory=list)  # generated, the end-of-sequence token left out
    logprobs: list[float] = field(default_factory=list)  # of `tokens`, when asked for
    prompt_logprobs: list[float] = field(default_factory=list)  # of prompt[1:], when asked for
    finish_reason: Literal["stop", "length", "error"] | None = None
