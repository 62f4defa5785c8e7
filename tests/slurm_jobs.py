"""Jobs in tests: what a command line of submit.py becomes, with the site file that it finds."""

import json
from pathlib import Path
from typing import Any

import pytest

from llama_mp.cli import parse
from llama_mp.errors import RequestError
from llama_mp.slurm.flags import JOBS
from llama_mp.slurm.request import job_of
from llama_mp.slurm.script import Job


def empty_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let `folder`, in which nothing is, be the folder of submission and the user's own."""
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("LLAMA_MP_HOME", raising=False)
    monkeypatch.chdir(folder)
    return folder


def job(verb: str, *words: str | Path, **site: Any) -> Job:
    """The job of a command line, at a site whose file holds `site`."""
    argv = [str(word) for word in words]
    if site:
        Path("site.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in site.items()))
        argv += ["--cluster", "site.toml"]
    return job_of(verb, parse(JOBS[verb], argv), "launch/submit.py")[0]


def planned(*words: str, **site: Any) -> Job:
    """A job of 65B, of which there are no files."""
    return job("infer", "--size", "65B", "--dry_run", *words, **site)


def refusal(verb: str, *words: str | Path, **site: Any) -> str:
    with pytest.raises(RequestError) as caught:
        job(verb, *words, **site)
    return str(caught.value)


def words_after(asked: Job) -> str:
    return " ".join(asked.verb)
