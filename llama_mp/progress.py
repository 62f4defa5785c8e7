"""How far a long piece of work on many bytes has come, on stderr: a bar on a terminal, else a line now and then."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_EVERY_S = 10.0
GB = 1e9


class Progress:
    """Called with (bytes done, bytes in all), as often as one likes, by one thread at a time."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: tqdm | None = None
        self.begun = self.said = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.begun

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        if sys.stderr is not None and sys.stderr.isatty():
            if self.bar is None:
                self.bar = tqdm(total=total_bytes, desc=self.title, unit="B", unit_scale=True, leave=False)
            self.bar.update(done_bytes - self.bar.n)
            return
        now = time.monotonic()
        if now - self.said >= LINE_EVERY_S:
            self.said = now
            rate = done_bytes / (now - self.begun)
            left = f", {(total_bytes - done_bytes) / rate:.0f} s left" if rate else ""
            share = f"{done_bytes / GB:.1f} of {total_bytes / GB:.1f} GB"
            print(f"{self.title}: {share}, {rate / GB:.2f} GB/s{left}", file=sys.stderr, flush=True)
