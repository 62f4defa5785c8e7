"""Numbers on their way between main memory and the device, without either waiting for the other."""

from collections.abc import Callable, Sequence

import torch


def upload(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """`values`, nested lists too, on `device`. For a GPU the copy is queued behind what it computes: from pinned
    memory, because from any other it would be waited for."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


class Download:
    """A tensor's copy in main memory, there as soon as the device has come so far."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.host, self.event = tensor, None
        if tensor.device.type == "cuda":
            pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self.host, self.event = pinned.copy_(tensor, non_blocking=True), torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(tensor.device))

    def get(self, wait: Callable[[torch.cuda.Event], None] = torch.cuda.Event.synchronize) -> torch.Tensor:
        """The copy. `wait` returns when an event has come."""
        if self.event is not None:
            wait(self.event)
        return self.host
