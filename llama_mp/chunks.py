"""How much is in flight at once: sizes that the work keeps to, and that the plan of its memory counts with."""

import functools

# Tokens of a prompt in one pass: enough for full speed, little enough for flat memory. A GPU's products are at theirs
# from about 1000 on, and between passes it waits for the host.
PREFILL_CHUNK = {"cpu": 512, "cuda": 2048}
SCORED_CHUNK = 64  # the same where logits of each token are wanted: chunk x vocabulary in fp32
# Of a matrix quantized at once, or made the type of a product: what stays in a cache, and keeps a GPU busy for a while.
QUANTIZE_ELEMENTS = {"cpu": 1 << 19, "cuda": 8 << 20}
PRODUCT_BYTES = {"cpu": 2 << 20, "cuda": 16 << 20}
# Of such rows, so that what some of them make begins where cuBLAS can write 16 bytes at a time.
PRODUCT_ROWS = {"cpu": 1, "cuda": 8}
LOAD_ELEMENTS = 8 << 20  # of a checkpoint's tensor read at once, beside the rank's own weights: 32 MiB in fp32


@functools.cache
def batch_sizes(num_slots: int) -> tuple[int, ...]:
    """The numbers of rows, up to `num_slots`, that steps of a GPU are recorded for: few, and above 8 each at most half
    as many again as the one before."""
    doubled = (rows for power in range(num_slots.bit_length()) for rows in (8 << power, 12 << power))
    return (*(rows for rows in (1, 2, 4, *doubled) if rows < num_slots), num_slots)
