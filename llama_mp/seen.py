"""Which ids each slot's request has seen, for its repetition penalty."""

import torch

from llama_mp.request import Request
from llama_mp.transfer import upload


class Seen:
    """`mask_SV`, bool [slots, vocabulary], on the device of the logits. There is none until a request has a penalty;
    what it says of those without one means nothing."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.mask_SV: torch.Tensor | None = None

    def begin(self, slot: int, request: Request, logits_NV: torch.Tensor) -> None:
        """`request`, whose prompt has these logits, takes `slot`."""
        if request.sampling.repetition_penalty == 1:
            return
        if self.mask_SV is None:
            self.mask_SV = logits_NV.new_zeros(self.num_slots, logits_NV.shape[1], dtype=torch.bool)
        self.mask_SV[slot] = False
        self.mask_SV[slot, upload(request.prompt, logits_NV.device)] = True

    def of(self, slots: slice) -> torch.Tensor | None:
        return None if self.mask_SV is None else self.mask_SV[slots]

    def add(self, slots: slice, tokens_B: torch.Tensor) -> None:
        if self.mask_SV is not None:
            self.mask_SV[slots].scatter_(1, tokens_B[:, None], True)

    def move(self, source: int, target: int) -> None:
        if self.mask_SV is not None:
            self.mask_SV[target] = self.mask_SV[source]
