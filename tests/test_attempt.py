"""Who a run is inside a job, as its environment tells."""

import pytest

from llama_mp.attempt import ATTEMPT, SHARE, Attempt


def told(monkeypatch, name: str, share: str | None = None) -> Attempt:
    monkeypatch.setenv(ATTEMPT, name)
    if share is not None:
        monkeypatch.setenv(SHARE, share)
    return Attempt.of_environment()


def test_outside_of_a_job_there_is_none(monkeypatch):
    monkeypatch.delenv(ATTEMPT, raising=False)
    monkeypatch.setenv(SHARE, "1/2")
    assert Attempt.of_environment() is None


def test_a_job(monkeypatch):
    attempt = told(monkeypatch, "12-3")
    assert (attempt.name, attempt.job, attempt.number, attempt.share) == ("12-3", "12", 3, None)
    assert attempt.share_of([1, 2, 3]) == [1, 2, 3]


def test_tasks_of_an_array_share_the_prompts(monkeypatch):
    attempts = [told(monkeypatch, f"12_{i}-0", f"{i}/4") for i in range(4)]
    assert {attempt.job for attempt in attempts} == {"12"}
    assert ["".join(attempt.share_of("abcdef")) for attempt in attempts] == ["ae", "bf", "c", "d"]
    assert sorted(i for attempt in attempts for i in attempt.share_of(range(99))) == list(range(99))
    assert list(attempts[3].share_of("ab")) == []


@pytest.mark.parametrize(("name", "share"), [("", None), ("../12-0", None), ("12", None), ("12-0", "3"), ("12-0", "")])
def test_what_our_supervisor_never_sets_is_our_own_fault(monkeypatch, name, share):
    with pytest.raises(AssertionError):
        told(monkeypatch, name, share)
