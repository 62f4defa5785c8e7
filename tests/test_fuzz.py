"""Files of every format, damaged by a seed: never a crash, a hang, unbounded memory or a deed; always one clear line.

A case that fails is run again by its number alone: outcomes([number], ...)."""

import collections
import random
from pathlib import Path

import pytest
from fuzzing import READERS, Outcome, outcomes
from specimens import write_all


@pytest.fixture(scope="module")
def specimens(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("specimens")
    return folder, write_all(folder)


def run(seeds: range, specimens: tuple[Path, list[str]], place: Path) -> list[Outcome]:
    found = list(outcomes(seeds, *specimens, place))
    faults = [f"case {o.seed}, {o.specimen}: {o.fault} {o.said}" for o in found if o.fault]
    assert not faults, f"{len(faults)} of {len(found)} cases, such as\n" + "\n".join(faults[:10])
    assert sorted(outcome.seed for outcome in found) == list(seeds)
    return found


def test_1000_damaged_files(specimens: tuple[Path, list[str]], tmp_path: Path) -> None:
    found = run(range(1000), specimens, tmp_path)
    loaded = [outcome for outcome in found if not outcome.said]
    assert 150 < len(loaded) < 600, "the damage is too small, or too large, to try anything"
    refused = collections.Counter(outcome.specimen for outcome in found if outcome.said)
    assert all(refused[name] > 20 for name in specimens[1]), refused


@pytest.mark.slow
def test_10000_other_damaged_files(specimens: tuple[Path, list[str]], tmp_path: Path) -> None:
    run(range(1000, 11_000), specimens, tmp_path)


def test_the_specimens_are_whole(specimens: tuple[Path, list[str]]) -> None:
    folder, names = specimens
    for name in names:
        READERS[name.split()[0]](folder / name, random.Random(0))


DEEDS = {
    "abort": "the process ended, code -6",
    "exit": "the process ended, code 3",
    "hang": "it hangs",
    "allocate": "MemoryError",
    "mkdir": "code was run: ",
    "write": "code was run: ",
    "raise": "ZeroDivisionError",
    "panic": "KeyboardInterrupt",
    "print": "printed: ",
    "unexpected": "not a clear line: ",
    "refuse": "",
}


def test_every_misdeed_would_be_seen(tmp_path: Path) -> None:
    for deed in DEEDS:
        (tmp_path / f"misdeed {deed}").mkdir()
    names = [f"misdeed {deed}" for deed in DEEDS]
    found = list(outcomes(range(len(names)), tmp_path, names, tmp_path / "work", num_workers=1, timeout_s=3))
    assert len(found) == len(DEEDS)
    for outcome in found:
        expected = DEEDS[outcome.specimen.split()[1]]
        assert expected in outcome.fault and bool(outcome.fault) == bool(expected), outcome
