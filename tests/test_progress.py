"""Progress of long work: lines now and then, a bar on a terminal, nothing for what is short."""

import io
import sys

import pytest

from llama_mp import progress
from llama_mp.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as a list of one number that the test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_ten_seconds_and_none_before(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("checking") as told:
        for second in range(1, 26):
            clock[0] = 100.0 + second
            told(second * 500_000_000, 13_000_000_000)
    assert capsys.readouterr() == (
        "",
        "checking: 5.0 of 13.0 GB, 0.50 GB/s, 16 s left\nchecking: 10.0 of 13.0 GB, 0.50 GB/s, 6 s left\n",
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal_that_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("checking") as told:
        told(0, 2_000_000)
        told(1_000_000, 2_000_000)
        told.bar.refresh()
    shown = sys.stderr.getvalue()
    assert "checking:  50%" in shown and "1.00M/2.00M" in shown
    assert shown.split("\r")[-2].strip() == "" and "\n" not in shown


def test_work_that_never_began_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("checking"):
        pass
    assert capsys.readouterr() == ("", "")
