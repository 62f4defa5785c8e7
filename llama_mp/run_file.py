"""OUTPUT.run.json: which run the lines of an output belong to, so that those of two are never mixed."""

import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llama_mp.errors import RequestError
from llama_mp.prompts import Prompt


def fingerprint(*, model: Mapping[str, Any], flags: Mapping[str, Any], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What must be equal for a run to continue another's output.

    `model` and `flags` hold JSON values and only what changes results (no batch size, no MP degree); the prompts go
    in as a digest over ids, texts, messages and each one's sampling, in their order.
    """
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(asdict(prompt), sort_keys=True).encode() + b"\n")
    return {
        "model": dict(model),
        "flags": dict(flags),
        "prompts": {"count": len(prompts), "sha256": digest.hexdigest()},
    }


def run_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.run.json")


def as_read_back(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """`fingerprint` as its file holds it: tuples are lists."""
    return json.loads(json.dumps(fingerprint))


def check_same_run(output: Path, wanted: Mapping[str, Any], folders: Sequence[Path] = ()) -> None:
    """Raise RequestError unless the lines at `output`, and in `folders`, are of the run that `wanted` describes."""
    path, names = run_path(output), " ".join(shlex.quote(str(name)) for name in (output, *folders))
    remedy = f"give another --output, or delete {names} and its .run.json"
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise RequestError(
            f"{output} holds lines, but {path.name}, which would say of which run, is missing; "
            f"give another --output, or delete {names}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not JSON; {remedy}") from error
    there, here = dict(leaves(found)), dict(leaves(wanted))
    for key in here | there:
        if there.get(key) != here.get(key):
            raise RequestError(
                f"{output} is of another run: {key} was {there.get(key, 'absent')} there "
                f"and is {here.get(key, 'absent')} now; {remedy}"
            )


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """`("flags.seed", "1")` and so on: each JSON value below `value`, long ones shortened but never made equal."""
    if isinstance(value, dict) and value:
        for name, below in value.items():
            yield from leaves(below, f"{key}.{name}" if key else name)
        return
    text = json.dumps(value, sort_keys=True)
    if len(text) > 60:
        text = f"{text[:40]}... (sha256 {hashlib.sha256(text.encode()).hexdigest()[:8]})"
    yield key, text
