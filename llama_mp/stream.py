"""Blocks that come to the device one at a time: some stay, the others take turns in two slots.

A block is one flat buffer, in which its parameters have their places; `Streamed` stands where the model's list of
layers was, and hands out the same blocks in the same order. While one computes in its slot, the next comes to the
other; after the last one comes the first, for the next token.
"""

import mmap
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import nn

from llama_mp.errors import RunError
from llama_mp.layout import padded
from llama_mp.memory import BLOCK_SLOTS
from llama_mp.virtual import ALIGNMENT

PRIVATE_PAGES = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
# Fills a flat buffer in main memory with the bytes of a block.
Read = Callable[[int, torch.Tensor], None]


class Place(NamedTuple):
    """Of a parameter in its block's buffer, from byte `start`."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Packing:
    """Where the parameters of a block lie in its buffer. All blocks of a model are alike."""

    places: dict[str, Place]

    @classmethod
    def of(cls, parameters: Mapping[str, torch.Tensor]) -> "Packing":
        places, start = {}, 0
        for name, parameter in parameters.items():
            places[name] = Place(start, tuple(parameter.shape), parameter.dtype)
            start += padded(parameter.nbytes, ALIGNMENT)
        return cls(places)

    @property
    def num_bytes(self) -> int:
        """Of the buffer."""
        return sum(padded(place.num_bytes, ALIGNMENT) for place in self.places.values())

    @property
    def parameter_bytes(self) -> int:
        return sum(place.num_bytes for place in self.places.values())

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parameters in the buffer `flat`."""
        return {
            name: flat[place.start : place.start + place.num_bytes].view(place.dtype).view(place.shape)
            for name, place in self.places.items()
        }

    def fill(self, flat: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> None:
        for name, view in self.views(flat).items():
            view.copy_(parameters[name])

    def as_json(self) -> dict[str, list]:
        return {name: [p.start, p.shape, str(p.dtype).removeprefix("torch.")] for name, p in self.places.items()}

    @classmethod
    def from_json(cls, told: Mapping[str, Sequence]) -> "Packing":
        return cls({name: Place(at, tuple(shape), getattr(torch, dtype)) for name, (at, shape, dtype) in told.items()})


def place_in(block: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Let `tensors` be the parameters of `block`, every one of them, of whatever type and shape they are."""
    assert tensors.keys() == {name for name, _ in block.named_parameters()}, sorted(tensors)
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))


def host_buffer(num_bytes: int, device: torch.device) -> torch.Tensor:
    """A flat buffer in main memory, from which a GPU can copy by itself: pages of its own, pinned afterwards. torch's
    pinned memory comes in powers of two, up to twice what is asked for; malloc's may share pages, which pin once."""
    flat = torch.frombuffer(mmap.mmap(-1, num_bytes, flags=PRIVATE_PAGES), dtype=torch.uint8)
    if device.type == "cuda":
        cudart = torch.cuda.cudart()
        if status := int(cudart.cudaHostRegister(flat.data_ptr(), num_bytes, 0)):
            raise RunError(
                f"the GPU's driver pins no further {num_bytes / 1e9:.2f} GB of main memory (cudaError {status}): "
                "free some, or give --offload disk"
            )
        weakref.finalize(flat, cudart.cudaHostUnregister, flat.data_ptr()).atexit = False
    return flat


class Slot:
    """A buffer on the device, and the block whose parameters lie in it."""

    def __init__(self, block: nn.Module, packing: Packing, device: torch.device) -> None:
        self.block, self.flat = block, torch.empty(packing.num_bytes, dtype=torch.uint8, device=device)
        place_in(block, packing.views(self.flat))


# ---- how blocks come ---------------------------------------------------------------------------------------------


class Carrier(Protocol):
    """Brings blocks to slots. `begin` and `wait` are called by the thread that computes, for each slot in turn."""

    def begin(self, index: int, slot: Slot) -> None:
        """Have block `index` come to `slot` as soon as what was computed with the slot so far is done."""

    def wait(self, slot: Slot) -> None:
        """What is computed from now on finds the block in its slot. Raises what kept it from coming."""

    def close(self) -> None:
        """Return when nothing is on its way any more."""


class HostCarrier:
    """Slots in main memory, filled by a thread of its own: on a CPU, what is computed is done when it returns."""

    def __init__(self, read: Read) -> None:
        self.read, self.worker = read, ThreadPoolExecutor(1, "blocks")
        self.coming: dict[Slot, Future[None]] = {}

    def begin(self, index: int, slot: Slot) -> None:
        self.coming[slot] = self.worker.submit(self.read, index, slot.flat)

    def wait(self, slot: Slot) -> None:
        self.coming[slot].result()

    def close(self) -> None:
        self.worker.shutdown(cancel_futures=True)


class CudaCarrier:
    """Slots on a GPU, filled from buffers in main memory on a stream of their own. `free` marks, on the stream that
    computes, the last use of a slot; `filled` the end of its copy."""

    def __init__(self, buffers: Mapping[int, torch.Tensor], device: torch.device) -> None:
        self.buffers, self.device = buffers, device
        self.stream = torch.cuda.Stream(device)
        self.free: dict[Slot, torch.cuda.Event] = {}
        self.filled: dict[Slot, torch.cuda.Event] = {}

    def begin(self, index: int, slot: Slot) -> None:
        self.mark_free(slot)
        self.copy(self.buffers[index], slot)

    def mark_free(self, slot: Slot) -> None:
        self.free.setdefault(slot, torch.cuda.Event()).record(torch.cuda.current_stream(self.device))
        self.filled.setdefault(slot, torch.cuda.Event())

    def copy(self, buffer: torch.Tensor, slot: Slot) -> None:
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.free[slot])
            slot.flat.copy_(buffer, non_blocking=True)
            self.filled[slot].record(self.stream)

    def wait(self, slot: Slot) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.filled[slot])

    def close(self) -> None:
        self.stream.synchronize()


class CudaDiskCarrier(CudaCarrier):
    """The same by way of one buffer in main memory for each slot, which a thread fills from the disk."""

    def __init__(self, read: Read, device: torch.device, num_bytes: int) -> None:
        super().__init__({}, device)
        self.read, self.num_bytes = read, num_bytes
        # A thread begins on the first device, on which waiting for an event would make a context of this rank too.
        self.worker = ThreadPoolExecutor(1, "blocks", initializer=torch.cuda.set_device, initargs=(device,))
        self.stages: dict[Slot, torch.Tensor] = {}
        self.coming: dict[Slot, Future[None]] = {}

    def begin(self, index: int, slot: Slot) -> None:
        if slot not in self.stages:
            self.stages[slot] = host_buffer(self.num_bytes, self.device)
        self.mark_free(slot)
        self.coming[slot] = self.worker.submit(self.carry, index, slot)

    def carry(self, index: int, slot: Slot) -> None:
        self.filled[slot].synchronize()  # the copy that still reads the stage, if there is one
        self.read(index, self.stages[slot])
        self.copy(self.stages[slot], slot)

    def wait(self, slot: Slot) -> None:
        self.coming[slot].result()
        super().wait(slot)

    def close(self) -> None:
        self.worker.shutdown(cancel_futures=True)
        super().close()


# ---- the list of layers --------------------------------------------------------------------------------------------


def spread(num_layers: int, num_streamed: int) -> list[int]:
    """The layers that come and go, evenly among those that stay: a copy has the time of these, too."""
    return [i for i in range(num_layers) if (i + 1) * num_streamed // num_layers > i * num_streamed // num_layers]


class Streamed(nn.Module):
    """The blocks of a model in order, for one pass after the other. A block is good until the next one is asked for."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        packing: Packing,
        staying: Mapping[int, torch.Tensor],
        carrier: Carrier,
        device: torch.device,
    ) -> None:
        """`staying`: the buffers of blocks that stay on the device; the others, more than there are slots, come by
        `carrier`. `blocks` have no data yet; the first of those that come and go serve as slots."""
        super().__init__()
        self.carrier, self.is_passing = carrier, False
        self.order = [i for i in range(len(blocks)) if i not in staying]
        assert len(self.order) > BLOCK_SLOTS, f"{len(self.order)} blocks for {BLOCK_SLOTS} slots"
        for i, flat in staying.items():
            place_in(blocks[i], packing.views(flat))
        self.slots = [Slot(blocks[i], packing, device) for i in self.order[:BLOCK_SLOTS]]
        self.staying = {i: blocks[i] for i in staying}
        self.on_device = nn.ModuleList([*self.staying.values(), *(slot.block for slot in self.slots)])
        self.parameter_bytes = packing.parameter_bytes * len(blocks)  # of all blocks, wherever they are
        self.rewind()

    def rewind(self) -> None:
        """Have the first blocks come, whatever is in the slots or on its way."""
        self.turn = 0
        for index, slot in zip(self.order, self.slots, strict=False):
            self.carrier.begin(index, slot)

    def __iter__(self) -> Iterator[nn.Module]:
        if self.is_passing:  # the pass before was broken off
            self.rewind()
        self.is_passing = True
        for i in range(len(self.staying) + len(self.order)):
            if i in self.staying:
                yield self.staying[i]
                continue
            slot = self.slots[self.turn % BLOCK_SLOTS]
            self.carrier.wait(slot)
            yield slot.block
            self.carrier.begin(self.order[(self.turn + BLOCK_SLOTS) % len(self.order)], slot)
            self.turn += 1
        self.is_passing = False

    def close(self) -> None:
        """Nothing is on its way, and no thread is left, when it returns. No pass may follow."""
        self.carrier.close()
