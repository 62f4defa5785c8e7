"""Loading a model whose blocks wait in main memory or on the disk: each leaves the device before the next one loads."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from llama_mp.compiled import cache_folder
from llama_mp.config import ModelConfig, RunConfig
from llama_mp.errors import RequestError, say
from llama_mp.memory import Workload, num_streamed, parameters
from llama_mp.model import Transformer, fill
from llama_mp.packed import BlockFile, identity
from llama_mp.stream import Carrier, CudaCarrier, CudaDiskCarrier, HostCarrier, Packing, Streamed, host_buffer, spread
from llama_mp.world import World

Parameters = Mapping[str, torch.Tensor]


class Store(Protocol):
    """Where the blocks of one rank wait. `add` each, then `finish`; `close` ends its threads and lets go of it all."""

    has_blocks: bool  # from an earlier run, so that none need be added

    def add(self, index: int, parameters: Parameters) -> None: ...

    def finish(self) -> tuple[Packing, dict[int, torch.Tensor], Carrier]:
        """How a block is packed, the buffers of those that stay on the device, and what brings the others."""

    def forget(self) -> None:
        """Keep nothing for later runs."""

    def close(self) -> None: ...


class HostStore:
    """In main memory, a buffer for each block that comes and goes."""

    has_blocks = False

    def __init__(self, streamed: Sequence[int], device: torch.device) -> None:
        self.streamed, self.device = set(streamed), device
        self.waiting: dict[int, torch.Tensor] = {}
        self.staying: dict[int, torch.Tensor] = {}
        self.carrier: Carrier | None = None

    def add(self, index: int, parameters: Parameters) -> None:
        self.packing = Packing.of(parameters)
        if index in self.streamed:
            flat = self.waiting[index] = host_buffer(self.packing.num_bytes, self.device)
        else:
            flat = self.staying[index] = torch.empty(self.packing.num_bytes, dtype=torch.uint8, device=self.device)
        self.packing.fill(flat, parameters)

    def finish(self) -> tuple[Packing, dict[int, torch.Tensor], Carrier]:
        on_gpu = self.device.type == "cuda"
        self.carrier = CudaCarrier(self.waiting, self.device) if on_gpu else HostCarrier(self.read)
        return self.packing, self.staying, self.carrier

    def read(self, index: int, flat: torch.Tensor) -> None:
        np.copyto(flat.numpy(), self.waiting[index].numpy())  # torch's copy would wake a second team of threads

    def forget(self) -> None:
        pass

    def close(self) -> None:
        if self.carrier:
            self.carrier.close()
        self.carrier = None  # which knows this store: without the circle, memory is free at once
        self.waiting.clear()


class DiskStore:
    """In a file of the cache folder: all blocks, so that it serves whichever of them stay on the device."""

    def __init__(self, file: BlockFile, streamed: Sequence[int], device: torch.device) -> None:
        self.file, self.streamed, self.device = file, set(streamed), device
        self.has_blocks = file.told is not None
        self.packing = Packing.from_json(file.told) if self.has_blocks else None
        self.flat: torch.Tensor | None = None  # in main memory, on the way to the file or from it to the device
        self.carrier: Carrier | None = None

    def add(self, index: int, parameters: Parameters) -> None:
        if self.has_blocks:  # another rank did not have its own, and all load together
            return
        self.packing = Packing.of(parameters)
        self.flat = torch.zeros(self.packing.num_bytes, dtype=torch.uint8) if self.flat is None else self.flat
        self.packing.fill(self.flat, parameters)
        self.file.write(index, memoryview(self.flat.numpy()))

    def finish(self) -> tuple[Packing, dict[int, torch.Tensor], Carrier]:
        if not self.has_blocks:
            self.file.finish(self.packing.as_json())
        self.flat = None
        staying = {i: self.to_device(i) for i in range(self.file.num_blocks) if i not in self.streamed}
        if self.device.type == "cuda":
            self.carrier = CudaDiskCarrier(self.read, self.device, self.packing.num_bytes)
        else:
            self.carrier = HostCarrier(self.read)
        return self.packing, staying, self.carrier

    def to_device(self, index: int) -> torch.Tensor:
        flat = torch.empty(self.packing.num_bytes, dtype=torch.uint8)
        self.read(index, flat)
        return flat.to(self.device)

    def read(self, index: int, flat: torch.Tensor) -> None:
        self.file.read(index, memoryview(flat.numpy()))

    def forget(self) -> None:
        self.file.forget()

    def close(self) -> None:
        if self.carrier:
            self.carrier.close()
        self.carrier = None
        self.file.close()


def open_store(
    run: RunConfig, files: Sequence[Path], config: ModelConfig, workload: Workload, world: World
) -> Store | None:
    """Where the blocks of this rank will wait; None where all of them stay on the device. `files`: the checkpoint's.

    Raises RequestError where the disk cannot take them."""
    streamed = spread(config.num_layers, num_streamed(config, workload))
    if not streamed:
        return None
    if run.offload == "cpu":
        return HostStore(streamed, world.device)
    name = identity(files, repr(config), workload.dtype, workload.quant, world.rank, world.size)
    try:
        folder = cache_folder() / "blocks" / name
    except OSError as error:
        raise RequestError(f"--offload disk has no place for its file: {error}") from error
    buffer_bytes = parameters(config, world.rank, world.size, workload.quant, workload.dtype).buffer
    file = BlockFile(folder, config.num_layers, buffer_bytes)
    if file.told is None and world.is_leader:
        say(f"writing {file.file_bytes / 1e9:.2f} GB of blocks to {folder}, this once")
    return DiskStore(file, streamed, world.device)


def fill_streamed(
    model: Transformer, loaded: Iterable[tuple[str, torch.Tensor]], store: Store, device: torch.device
) -> None:
    """Give `model` its weights, of which the blocks come from `store`. `loaded`: parameters in the order of the layers,
    without those of the blocks where the store has them."""
    others: dict[str, torch.Tensor] = {}
    for block, group in itertools.groupby(loaded, key=lambda item: block_of(item[0])):
        if block is None:
            others |= group
        else:
            store.add(int(block.split(".")[1]), {name.split(".", 2)[2]: parameter for name, parameter in group})
    blocks, model.layers = list(model.layers), nn.ModuleList()
    fill(model, others)
    packing, staying, carrier = store.finish()
    model.layers = Streamed(blocks, packing, staying, carrier, device)


def block_of(name: str) -> str | None:
    """The block that the parameter `name` is in: "layers.7"."""
    return ".".join(name.split(".")[:2]) if name.startswith("layers.") else None


def weight_bytes_of(model: Transformer) -> int:
    """Bytes of a rank's weights, wherever they wait; tied embeddings count once."""
    named, elsewhere = model.named_parameters(), 0
    if isinstance(model.layers, Streamed):
        named, elsewhere = ((n, p) for n, p in named if block_of(n) is None), model.layers.parameter_bytes
    return elsewhere + sum({p.data_ptr(): p.nbytes for _, p in named}.values())
