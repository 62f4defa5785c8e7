"""Each id exactly once, through kills, full disks and second writers; a refused run changes nothing."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_mp.config import SamplingConfig
from llama_mp.errors import RequestError, RunError
from llama_mp.output import Output
from llama_mp.prompts import Prompt
from llama_mp.run_file import fingerprint

RUN = {"model": {"name": "tiny", "dim": 8}, "flags": {"dtype": "fp32", "stop": ("a", "b")}, "prompts": {"count": 2}}


def record(id: str, **more) -> dict:
    return {"id": id, "completion": 'caf\u00e9 \u2028\n"', "logprobs": [-0.5], "finish_reason": "stop", **more}


def ids(path: Path) -> list[str]:
    assert path.read_bytes().endswith(b"\n")
    return [json.loads(line)["id"] for line in path.read_bytes().splitlines()]


def finished(path: Path, *names: str) -> Path:
    with Output(path, RUN) as out:
        for name in names:
            out.write(record(name))
    return path


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir() if p.is_file()}


def refused(path: Path, match: str, run: dict = RUN) -> None:
    """Opening fails with one line that matches, and leaves every file beside `path` as it was."""
    before = snapshot(path.parent) if path.parent.is_dir() else None
    with pytest.raises(RequestError, match=match) as caught:
        Output(path, run)
    assert "\n" not in str(caught.value).replace(path.name, "")
    assert before == (snapshot(path.parent) if path.parent.is_dir() else None)


@pytest.fixture(params=["out.jsonl", "a 0.jsonl", 'a\'; echo "x".jsonl', "\u00e9\n0"])
def path(request, tmp_path) -> Path:
    return tmp_path / request.param


def test_lines_are_there_at_once_and_a_rerun_continues(path):
    with Output(path, RUN) as out:
        assert out.done == set()
        out.write(record("a"))
        assert path.read_text(encoding="utf-8") == (
            '{"id":"a","completion":"caf\u00e9 \u2028\\n\\"","logprobs":[-0.5],"finish_reason":"stop"}\n'
        )
        out.write(record("b", finish_reason="error", error="too long"))
    with Output(path, RUN) as out:
        assert out.done == {"a", "b"}
        out.write(record("c"))
        assert out.done == {"a", "b", "c"}
    assert ids(path) == ["a", "b", "c"]
    run_file = path.with_name(path.name + ".run.json")
    assert json.loads(run_file.read_text()) == json.loads(json.dumps(RUN))
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, run_file.name])


def test_a_write_is_one_system_call(tmp_path, monkeypatch):
    calls = []
    write = os.write
    with Output(tmp_path / "o", RUN) as out:
        monkeypatch.setattr(os, "write", lambda file, data: calls.append(data) or write(file, data))
        out.write(record("a", completion="x" * 300_000))
    assert len(calls) == 1


def test_an_id_is_never_written_twice(tmp_path):
    with Output(finished(tmp_path / "o", "a"), RUN) as out, pytest.raises(AssertionError):
        out.write(record("a"))


@pytest.mark.parametrize("torn", [b'{"id": "b", "comp', b'{"id": "b"}', b"\0\0\0", b"{", b'{"id": "\xc3'])
def test_a_torn_last_line_is_computed_again(tmp_path, torn):
    path = finished(tmp_path / "o", "a")
    with path.open("ab") as file:
        file.write(torn)
    with Output(path, RUN) as out:
        assert out.done == {"a"}
        out.write(record("b"))
    assert ids(path) == ["a", "b"]


def test_a_torn_first_line(tmp_path):
    path = finished(tmp_path / "o")
    path.write_bytes(b'{"id')
    assert ids(finished(path, "a")) == ["a"]


@pytest.mark.parametrize(
    "line", [b"not json", b"", b"[1]", b'{"prompt": "x"}', b'{"id": 3}', b'{"id": "\xff"}', b"[" * 99999]
)
def test_an_unreadable_line_is_named(tmp_path, line):
    path = finished(tmp_path / "o", "a")
    path.write_bytes(path.read_bytes() + line + b'\n{"id": "c"}\n{"torn')
    refused(path, r"o:2: not a record; take the line out")


def test_an_id_twice_is_named(tmp_path):
    path = finished(tmp_path / "o", "a", "b")
    path.write_bytes(path.read_bytes() + b'{"id": "a"}\n')
    refused(path, "o:3: id 'a' is that of line 1 too")


def test_another_run_is_not_mixed_in(path):
    finished(path, "a")
    refused(
        path,
        r'flags.dtype was "fp32" there and is "bf16" now; give another --output, or delete ',
        RUN | {"flags": {"dtype": "bf16", "stop": ["a"]}},
    )
    refused(path, 'flags.quant was absent there and is "int8" now', RUN | {"flags": {**RUN["flags"], "quant": "int8"}})
    refused(path, "model.dim was 8 there and is absent now", RUN | {"model": {"name": "tiny"}})
    long = RUN | {"model": {"name": "tiny" * 9999, "dim": 8}}
    refused(path, r'model.name was "tiny" there and is "(tiny)+ti*n*y*\.\.\. \(sha256 [0-9a-f]{8}\) now', long)
    path.with_name(path.name + ".run.json").write_text("{")
    refused(path, "run.json is not JSON")
    path.with_name(path.name + ".run.json").unlink()
    refused(path, "(?s)holds lines, but .* is missing; give another --output, or delete ")


def test_long_values_that_begin_alike_differ(tmp_path):
    path = tmp_path / "o"
    with Output(path, {"flags": "x" * 100 + "a"}) as out:
        out.write(record("a"))
    refused(path, "is of another run: flags was", {"flags": "x" * 100 + "b"})


def test_an_empty_output_belongs_to_nobody(tmp_path):
    path = tmp_path / "o"
    path.touch()  # killed between the making of the two files
    finished(path)  # or before its first line
    other = RUN | {"flags": {}}
    with Output(path, other) as out:
        out.write(record("a"))
    refused(path, "another run")


def test_a_second_writer_is_refused(tmp_path):
    path = tmp_path / "o"
    with Output(path, RUN) as out:
        refused(path, "another run is writing .*/o; wait")
        refused(path, "another run is writing", RUN | {"flags": {}})
        out.write(record("a"))
        refused(path, "another run is writing")
    with Output(path, RUN) as out:
        assert out.done == {"a"}


def test_a_refused_run_lets_go_of_the_lock(tmp_path):
    path = finished(tmp_path / "o", "a")
    num_open = len(os.listdir("/proc/self/fd"))
    refused(path, "another run", {"flags": 1})
    assert len(os.listdir("/proc/self/fd")) == num_open
    finished(path, "b")


def test_places_that_hold_no_output(tmp_path):
    refused(tmp_path, "is a folder; give a file in it, such as .*/out.jsonl")
    refused(tmp_path / "no" / "o", "there is no folder .*/no; make it with mkdir -p")
    (tmp_path / "null").symlink_to("/dev/null")
    refused(tmp_path / "null", "not a regular file")
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "not a regular file")
    refused(tmp_path / ("x" * 300), "File name too long")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file" / "o", "there is no folder")


def test_no_permission(tmp_path, monkeypatch):
    # Root may write anywhere, so the refusal of the system call is played.
    def deny(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", deny)
    refused(tmp_path / "o", "o cannot be opened for reading and writing: Permission denied; give another path")


def test_a_run_file_that_cannot_be_written(tmp_path, monkeypatch):
    def fill(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fill)
    with pytest.raises(RequestError, match=r"o\.run\.json cannot be opened .*No space left"):
        Output(tmp_path / "o", RUN)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "o").touch()
    with pytest.raises(RequestError, match="No space left"):
        Output(tmp_path / "o", RUN)
    assert list(tmp_path.iterdir()) == [tmp_path / "o"]  # not ours to remove
    monkeypatch.undo()
    assert ids(finished(tmp_path / "o", "a")) == ["a"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def lock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", lock)
    with pytest.raises(RequestError, match="this file system has no locks"):
        Output(tmp_path / "o", RUN)


FILL = """
import resource, sys
from pathlib import Path
from llama_mp.errors import report
from llama_mp.output import Output
with Output(Path(sys.argv[1]), {}) as out:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        for i in range(10):
            out.write({"id": str(i), "completion": "x" * 1500})
    except Exception as error:
        raise SystemExit(report(error))
"""


def test_a_full_disk_keeps_whole_lines(tmp_path):
    path = tmp_path / "o"
    done = subprocess.run([sys.executable, "-c", FILL, path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {path} cannot be written: File too large; the 2 finished prompts in it are kept: "
        "make room and run the same command again to continue\n"
    )
    assert ids(path) == ["0", "1"]
    with Output(path, {}) as out:
        assert out.done == {"0", "1"}


def test_a_full_disk_seen_at_the_end(tmp_path, monkeypatch):
    def fill(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    out = Output(tmp_path / "o", RUN)
    monkeypatch.setattr(os, "fsync", fill)
    with pytest.raises(RunError, match="No space left on device; the 0 finished"):
        out.close()
    monkeypatch.undo()
    finished(tmp_path / "o", "a")  # the lock is free


NUM_RECORDS = 20_000
KILLED = """
import sys
from pathlib import Path
from llama_mp.output import Output
print("imported", flush=True)
with Output(Path(sys.argv[1]), {"run": 1}) as out:
    todo = [id for id in map(str, range(NUM_RECORDS)) if id not in out.done]
    for id in todo:
        out.write({"id": id, "completion": id * 200})
        if id == todo[0]:
            print("first line", flush=True)
""".replace("NUM_RECORDS", str(NUM_RECORDS))


def test_killed_at_any_moment_each_id_is_there_once(tmp_path):
    path = tmp_path / "o"
    moments_s = [0.0, 0.002, 0.005, 0.01]  # after the start of Python, then after the first new line
    for after_first_line in (False, True):
        for moment_s in moments_s:
            process = subprocess.Popen([sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE)
            assert process.stdout.readline() == b"imported\n"
            if after_first_line:
                assert process.stdout.readline() == b"first line\n"
            time.sleep(moment_s)
            process.kill()
            process.communicate()
            assert process.returncode == -signal.SIGKILL
    subprocess.run([sys.executable, "-c", KILLED, path], check=True, capture_output=True)
    assert ids(path) == [str(i) for i in range(NUM_RECORDS)]


def prompt(**changes) -> Prompt:
    return Prompt(**{"id": "a", "text": "t", "sampling": SamplingConfig()} | changes)


def test_fingerprint_covers_every_part_of_every_prompt():
    chat = {"text": None, "messages": ({"role": "user", "content": "t"},)}
    variants = [
        [prompt()],
        [prompt(id="b")],
        [prompt(text="u")],
        [prompt(**chat)],
        [prompt(**chat | {"messages": ({"role": "system", "content": "t"},)})],
        [prompt(sampling=SamplingConfig(seed=2))],
        [prompt(), prompt(id="b")],
        [prompt(id="b"), prompt()],
        [],
    ]
    prints = [fingerprint(model={"name": "m"}, flags={"dtype": "fp32"}, prompts=v) for v in variants]
    assert len({json.dumps(p) for p in prints}) == len(variants)
    assert prints[0] == fingerprint(model={"name": "m"}, flags={"dtype": "fp32"}, prompts=[prompt()])
    assert prints[0]["prompts"]["count"] == 1 and len(prints[0]["prompts"]["sha256"]) == 64


def test_no_torch():
    code = "import sys, llama_mp.output, llama_mp.prompts; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
