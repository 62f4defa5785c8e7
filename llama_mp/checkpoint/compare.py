"""Two checkpoints of any format and degree, compared slice by slice: the same model, to the last bit?"""

from collections.abc import Callable, Iterator

import torch

from llama_mp.checkpoint.digests import OnProgress, in_threads
from llama_mp.checkpoint.fault import Difference
from llama_mp.checkpoint.scan import Tally, bits, chunks
from llama_mp.checkpoint.source import Source, as_matrix
from llama_mp.dtypes import torch_name
from llama_mp.layout import Span, matrix_shape
from llama_mp.params_json import differences


def compare(
    ours: Source,
    theirs: Source,
    *,
    dtype_of: Callable[[str], torch.dtype] | None = None,
    on_progress: OnProgress | None = None,
) -> Iterator[Difference]:
    """In what `ours` differs from `theirs`: architecture, names, shapes, types, and every element's bits.

    With `dtype_of`, theirs are converted to the type that it gives for each name before they are compared."""
    for text in differences(ours.config, theirs.config):
        yield Difference(None, f"the configuration has {text}")
    here, there = set(ours.names()), set(theirs.names())
    for name in sorted(here ^ there):
        yield Difference(name, "is missing" if name in there else "is not in the other")
    alike, other_types = [], {}
    for name in (name for name in ours.names() if name in there):
        found, expected = ours.dtype(name), dtype_of(name) if dtype_of else theirs.dtype(name)
        if ours.shape(name) != theirs.shape(name):
            yield Difference(name, f"has shape {ours.shape(name)}, not {theirs.shape(name)}")
        elif found != expected:
            other_types.setdefault((found, expected), []).append(name)
        else:
            alike.append(name)
    yield from type_differences(other_types)
    yield from value_differences(ours, theirs, alike, on_progress)


def type_differences(names: dict[tuple[torch.dtype, torch.dtype], list[str]]) -> Iterator[Difference]:
    """One line for each pair of types: as a rule it is all tensors that have another one."""
    for (found, expected), (first, *others) in names.items():
        with_others = f", with {len(others)} other tensors," if others else ""
        yield Difference(first, f"is{with_others} {torch_name(found)}, not {torch_name(expected)}: not compared")


def value_differences(
    ours: Source, theirs: Source, names: list[str], on_progress: OnProgress | None
) -> Iterator[Difference]:
    sizes = [ours.dtype(name).itemsize * size_of(ours.shape(name)) for name in names]
    done = 0
    found = in_threads(lambda name: difference(ours, theirs, name), names)
    for num_bytes, text in zip(sizes, found, strict=True):
        if text:
            yield text
        done += num_bytes
        if on_progress:
            on_progress(done, sum(sizes))


def difference(ours: Source, theirs: Source, name: str) -> Difference | None:
    """What differs in the tensor `name`, whose shape is the same in both, after theirs took the type of ours."""
    shape, dtype = ours.shape(name), ours.dtype(name)
    cols = Span(0, matrix_shape(shape)[1])
    tally, values = Tally(shape), ()
    for rows in chunks(shape):
        here = as_matrix(ours.read(name, rows, cols))
        there = as_matrix(theirs.read(name, rows, cols)).to(dtype)
        if torch.equal(bits(here), bits(there)):
            continue
        if tally.add(bits(here) != bits(there), rows.start):
            row, col = tally.first
            values = (here[row - rows.start, col].item(), there[row - rows.start, col].item())
    if not tally.count:
        return None
    value, expected = map(repr, values)
    other_bits = " with those bits" if value == expected else ""  # NaN of another kind
    place = f"the first at {tally.place}, {value}, not {expected}{other_bits}"
    return Difference(name, f"{tally.count} of {size_of(shape)} elements differ, {place}")


def size_of(shape: tuple[int, ...]) -> int:
    num_rows, num_cols = matrix_shape(shape)
    return num_rows * num_cols
