"""Tensors cut into pieces: the right bytes, each read once and written once, and faults that end it at once."""

import os
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from itertools import chain
from pathlib import Path

import pytest
import torch
from factory import MODELS, checkpoint, cut, random_tensors, write_meta

from llama_mp.checkpoint import cut as module
from llama_mp.checkpoint.cut import Digest, Writer, converted, cut_tensors, write_at
from llama_mp.checkpoint.load import open_source
from llama_mp.checkpoint.sink import Piece
from llama_mp.config import ModelConfig
from llama_mp.errors import RunError
from llama_mp.layout import Span, global_shapes, shards

SIXTEEN = replace(MODELS["gqa"], name="16", num_heads=16, num_kv_heads=4, dim=64, head_dim=8, num_layers=1)


class Held:
    """A source of tensors in memory that counts how often each element was asked for."""

    def __init__(self, config: ModelConfig, tensors: dict[str, torch.Tensor]) -> None:
        self.config, self.tensors, self.precision, self.bytes_read = config, tensors, "fp32", 0
        self.times_read = {name: torch.zeros(tensor.shape, dtype=torch.int32) for name, tensor in tensors.items()}

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, rows: Span, cols: Span) -> torch.Tensor:
        place = (slice(*rows), slice(*cols))[: self.tensors[name].dim()]
        self.times_read[name][place] += 1
        return self.tensors[name][place]


def pieces_of(config: ModelConfig, mp: int, dtype: torch.dtype, **options: int) -> dict[str, list[Piece]]:
    """All pieces of all ranks in one file, with odd gaps between them."""
    offset, pieces = 3, {name: [] for name in global_shapes(config)}
    for rank in range(mp):
        for name, shard in shards(config, rank, mp).items():
            pieces[name].append(Piece(file="f", name=name, shard=shard, dtype=dtype, offset=offset, **options))
            offset += pieces[name][-1].num_bytes + 5
    return pieces


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    opened = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    yield opened
    os.close(opened)


def run(
    source: Held, pieces: dict[str, list[Piece]], file: int, *, num_threads: int = 2
) -> tuple[dict[str, list[Digest]], list[int]]:
    """The digests by tensor, and the numbers of bytes that were told of."""
    told: list[int] = []
    names = source.names()
    done = cut_tensors(names, source, pieces, {"f": file}, num_threads=num_threads, on_bytes=told.append)
    found = dict(done)
    assert sorted(found) == sorted(names)
    return found, told


def content(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.fixture
def times_written(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each byte of a file was written."""
    counted, pwrite, lock = Counter(), os.pwrite, threading.Lock()

    def counting(file: int, some: memoryview, offset: int) -> int:
        num_written = pwrite(file, some, offset)
        with lock:
            counted.update(range(offset, offset + num_written))
        return num_written

    monkeypatch.setattr(os, "pwrite", counting)
    return counted


@pytest.mark.parametrize("chunk", [1, 777, 1 << 21])
@pytest.mark.parametrize(
    ("config", "mp"),
    [(MODELS["mha"], mp) for mp in (1, 2, 3, 8)]
    + [(MODELS["gqa"], mp) for mp in (3, 4, 6, 8)]
    + [(MODELS["heads-9-3"], mp) for mp in (2, 5, 9)]
    + [(MODELS["heads-13-13"], 4), (SIXTEEN, 7), (SIXTEEN, 16)],
    ids=lambda value: value.name if isinstance(value, ModelConfig) else str(value),
)
def test_every_degree_is_cut_as_the_layout_says(
    monkeypatch: pytest.MonkeyPatch, file: int, config: ModelConfig, mp: int, chunk: int
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    config = replace(config, num_layers=1)
    source, pieces = Held(config, random_tensors(config)), pieces_of(config, mp, torch.float32)
    digests, told = run(source, pieces, file)
    for name, of_name in pieces.items():
        for piece, digest in zip(of_name, digests[name], strict=True):
            expected = content(cut(piece.shard, source.tensors))
            assert os.pread(file, piece.num_bytes, piece.offset) == expected, name
            assert digest == Digest(zlib.crc32(expected), sha256(expected).hexdigest())
        assert (source.times_read[name] == 1).all(), name
    assert sum(told) == sum(piece.num_bytes for piece in chain(*pieces.values()))


@pytest.mark.parametrize("chunk", [1, 1000, 1 << 21])
@pytest.mark.parametrize("block", [7, 1 << 18])
@pytest.mark.parametrize("mp", [1, 3, 8])
def test_each_byte_is_written_once_and_no_other(
    monkeypatch: pytest.MonkeyPatch, file: int, times_written: Counter, chunk: int, block: int, mp: int
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(module, "BLOCK_BYTES", block)
    config = replace(MODELS["gqa"], num_layers=1, vocab_size=31, dim=16, hidden_dim=10, head_dim=2)
    pieces = pieces_of(config, mp, torch.bfloat16)
    run(Held(config, random_tensors(config, torch.bfloat16)), pieces, file)
    wanted = chain(*(range(p.offset, p.offset + p.num_bytes) for p in chain(*pieces.values())))
    assert times_written == Counter(wanted)


def test_a_write_in_part_goes_on_where_it_ended(monkeypatch: pytest.MonkeyPatch, file: int) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda opened, some, offset: pwrite(opened, some[:3], offset))
    write_at(file, memoryview(b"0123456789"), 2)
    assert os.pread(file, 100, 0) == b"\0\0" + b"0123456789"


@pytest.mark.parametrize("chunk", [1, 100, 1 << 21])
def test_rows_in_halves_are_whole_heads(monkeypatch: pytest.MonkeyPatch, file: int, chunk: int) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    config = replace(MODELS["gqa"], num_layers=1)
    source = Held(config, random_tensors(config))
    pieces = pieces_of(config, 1, torch.float32, halved_heads=config.head_dim)
    name = "layers.0.attention.wk.weight"
    source.tensors = {name: source.tensors[name]}
    run(source, {name: pieces[name]}, file)
    wk = source.tensors[name]
    expected = wk.view(-1, config.head_dim // 2, 2, config.dim).transpose(1, 2).reshape(wk.shape)
    assert os.pread(file, wk.nbytes, pieces[name][0].offset) == content(expected)


def test_from_a_checkpoint_on_disk_and_into_another_type(tmp_path: Path, file: int) -> None:
    config = MODELS["heads-9-3"]
    tensors = random_tensors(config)
    source = open_source(checkpoint(write_meta(tmp_path / "model", config, tensors, 4)))
    pieces = pieces_of(config, 5, torch.float16)
    list(cut_tensors(source.names(), source, pieces, {"f": file}, num_threads=2, on_bytes=lambda _: None))
    for piece in chain(*pieces.values()):
        expected = content(cut(piece.shard, tensors).half())
        assert os.pread(file, piece.num_bytes, piece.offset) == expected, piece.name


# ---- types -----------------------------------------------------------------------------------------------------

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("values", "dtype", "words"),
    [
        ([1.0, 65520.0], torch.float16, r"w holds 65520, which is beyond the range of float16 \(at most 65504\)"),
        ([-1e5, 7e4], torch.float16, "w holds 100000,"),
        ([3.4e38, 0.0], torch.bfloat16, r"w holds 3\.4e\+38, which is beyond the range of bfloat16"),
        ([INF, 70000.0], torch.float16, "w holds 70000,"),
        ([NAN, 70000.0, 1.0], torch.float16, "w holds 70000,"),
    ],
)
def test_a_number_beyond_the_range_is_named(values: list[float], dtype: torch.dtype, words: str) -> None:
    with pytest.raises(RunError, match=f"{words}.*use another --dtype"):
        converted("w", torch.tensor([values]), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_is_no_number_already_is_kept(dtype: torch.dtype) -> None:
    part = torch.tensor([[INF, -INF, NAN, 1.5]])
    result = converted("w", part, dtype)
    assert result.dtype == dtype
    assert torch.equal(result.float()[0, [0, 1, 3]], part[0, [0, 1, 3]]) and result[0, 2].isnan()


def test_the_largest_numbers_pass() -> None:
    part = torch.tensor([[65504.0, -65504.0, 65519.0]])
    assert converted("w", part, torch.float16).tolist() == [[65504.0, -65504.0, 65504.0]]


def test_the_same_type_is_not_copied() -> None:
    part = torch.tensor([[1.0, INF]])
    assert converted("w", part, torch.float32) is part


def test_a_number_beyond_the_range_ends_the_run(file: int) -> None:
    source = Held(MODELS["gqa"], random_tensors(MODELS["gqa"]))
    source.tensors["layers.1.feed_forward.w2.weight"][3, 4] = -1e6
    with pytest.raises(RunError, match=r"layers\.1\.feed_forward\.w2\.weight holds 1e\+06"):
        run(source, pieces_of(MODELS["gqa"], 2, torch.float16), file)


# ---- faults ----------------------------------------------------------------------------------------------------


class Faulty(Held):
    """Fails at its first norm; all other reading is slow."""

    def read(self, name: str, rows: Span, cols: Span) -> torch.Tensor:
        if name == "norm.weight":
            raise OSError(5, "Input/output error")
        time.sleep(0.005)
        return super().read(name, rows, cols)


@pytest.mark.parametrize("num_threads", [1, 2, 8])
def test_a_fault_in_one_tensor_stops_the_others(monkeypatch: pytest.MonkeyPatch, file: int, num_threads: int) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    config = MODELS["gqa"]
    source = Faulty(config, random_tensors(config))
    source.tensors = dict(sorted(source.tensors.items(), key=lambda item: item[0] != "norm.weight"))
    num_rows = sum(shape[0] for shape in global_shapes(config).values())
    begun = threading.active_count()
    with pytest.raises(OSError, match="Input/output error"):
        run(source, pieces_of(config, 1, torch.float32), file, num_threads=num_threads)
    assert threading.active_count() == begun
    assert sum(int(times.sum() > 0) for times in source.times_read.values()) <= num_threads
    assert sum(int((times.flatten() > 0).sum()) for times in source.times_read.values()) < num_rows * config.dim // 4


def test_who_stops_listening_stops_the_work(monkeypatch: pytest.MonkeyPatch, file: int) -> None:
    config = MODELS["gqa"]
    source = Held(config, random_tensors(config))
    begun = threading.active_count()
    done = cut_tensors(
        source.names(), source, pieces_of(config, 1, torch.float32), {"f": file}, num_threads=2, on_bytes=lambda _: None
    )
    next(done)
    done.close()
    assert threading.active_count() == begun


@pytest.mark.parametrize("ends_well", [True, False])
def test_torchs_threads_are_as_many_as_before(file: int, ends_well: bool) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    seen = []

    class Watched(Held if ends_well else Faulty):
        def read(self, name: str, rows: Span, cols: Span) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            return super().read(name, rows, cols)

    try:
        config = replace(MODELS["gqa"], num_layers=1)
        source = Watched(config, random_tensors(config))
        try:
            run(source, pieces_of(config, 1, torch.float32), file)
            assert ends_well
        except OSError:
            assert not ends_well
        assert set(seen) == {1} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("given", [(0, 20), (20, 64)])
def test_zeros_never_stand_for_rows_that_did_not_come(file: int, given: tuple[int, int]) -> None:
    config = replace(MODELS["gqa"], num_layers=1)
    [piece] = pieces_of(config, 1, torch.float32)["norm.weight"]
    writer = Writer(piece, file, lambda _: None)
    writer.take(Span(*given), torch.ones(len(Span(*given)), 1))
    with pytest.raises(AssertionError, match=r"norm\.weight: (20|44) elements"):
        writer.finish()


def test_a_source_that_gives_too_few_rows(file: int) -> None:
    class Short(Held):
        def read(self, name: str, rows: Span, cols: Span) -> torch.Tensor:
            return super().read(name, rows, cols)[:-1]

    config = replace(MODELS["gqa"], num_layers=1)
    with pytest.raises(AssertionError, match="rows of Span"):
        run(Short(config, random_tensors(config)), pieces_of(config, 2, torch.float32), file)
