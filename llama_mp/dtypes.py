"""The types that weights have in a run and in a checkpoint, as torch has them and as --dtype names them."""

import torch

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def narrowest(dtypes: set[torch.dtype]) -> str:
    """The name of the --dtype that holds values of all `dtypes`."""
    return DTYPE_NAMES.get(next(iter(dtypes)), "fp32") if len(dtypes) == 1 else "fp32"


def torch_name(dtype: torch.dtype) -> str:
    """As a config.json writes it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")
