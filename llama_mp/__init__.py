"""llama-mp: model-parallel inference for LLaMA checkpoints. `from llama_mp import LLM`."""

from typing import Any

__all__ = ["LLM"]


def __getattr__(name: str) -> Any:
    """LLM on first use: planning, help and refusals need no torch."""
    if name != "LLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llama_mp.llm import LLM

    return LLM
