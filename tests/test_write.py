"""A run that is killed, or that fills the disk, is finished by the next one, with the same bytes; in bounded memory."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import held
import pytest
import torch
from factory import MODELS, random_tensors, write_meta
from ranks import alone
from running import infer
from test_reshard import reshard

from llama_mp import LLM
from llama_mp.partial import JOURNAL, Partial, partial_path

TESTS = Path(__file__).parent
GQA = MODELS["gqa"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_meta(tmp_path / "source", GQA, random_tensors(GQA, torch.bfloat16), 2)


def run(script: str, *arguments: object) -> list[dict]:
    """The JSON lines that a script of the tests prints, in a process of its own."""
    command = [sys.executable, TESTS / script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_killed_at_random_moments_and_finished_each_time(source: Path) -> None:
    with TemporaryDirectory(dir="/dev/shm") as folder:  # in memory: a kill of the process loses nothing there either
        reports = run("killed.py", source, folder, 28)
    assert len(reports) == 28
    for report in reports:
        assert report["killed"] == -9 and report["finished"] == 0, report
        assert report["equal"] and report["left"] == ["out"], report
        assert report["whole"] == report["recorded"], report  # what was whole is not done again


def test_a_damaged_part_of_an_interrupted_run_is_done_again(source: Path, tmp_path: Path) -> None:
    """A machine that lost power may have kept the journal, and not the data."""
    expected = reshard(source, tmp_path / "expected", mp=3)
    interrupt(source, tmp_path / "out", after=12)
    journal = (partial_path(tmp_path / "out") / JOURNAL).read_text().splitlines()
    names = [json.loads(line)[0] for line in journal[1:]]
    assert len(names) >= 12
    place = json.loads((expected / "manifest.json").read_text())["files"]["consolidated.01.pth"]["tensors"][names[3]]
    with (partial_path(tmp_path / "out") / "consolidated.01.pth").open("r+b") as file:
        file.seek(place["offset"])
        file.write(bytes(place["bytes"]))
    reshard(source, tmp_path / "out", mp=3)
    assert contents(tmp_path / "out") == contents(expected)


def interrupt(source: Path, output: Path, after: int) -> None:
    """Begin, and fail as Ctrl-C does, once some tensors are whole."""
    record, count = Partial.record, 0

    def recorded(self: Partial, part: str, value: object) -> None:
        nonlocal count
        record(self, part, value)
        count += 1
        if count == after:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Partial, "record", recorded)
        reshard(source, output, mp=3)
    assert not output.exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


FILL = """
import json, shutil, sys
from pathlib import Path
from llama_mp.checkpoint.reshard import Job
from llama_mp.errors import RunError
from llama_mp.reshard_request import ReshardFlags, check_request
source, disk = Path(sys.argv[1]), Path(sys.argv[2])
flags = ReshardFlags(input=source, output=disk / "out", mp=3)

def fill(done, total):
    if done > total // 2 and not (disk / "ballast").exists():
        (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - 8192))

try:
    Job.open(flags, check_request(flags)).run(fill)
    error = None
except RunError as failed:
    error = str(failed)
left = sorted(path.name for path in disk.iterdir())
(disk / "ballast").unlink()
num_whole = Job.open(flags, check_request(flags)).run()
print(json.dumps({"error": error, "left": left, "whole": num_whole, "after": sorted(p.name for p in disk.iterdir())}))
shutil.copytree(disk / "out", sys.argv[3])
"""


def namespaces_are_allowed() -> bool:
    return subprocess.run(["unshare", "--mount", "--map-root-user", "true"], check=False).returncode == 0


@pytest.mark.skipif(not namespaces_are_allowed(), reason="no user may mount here, as a small disk would have to be")
def test_a_full_disk_leaves_what_the_next_run_finishes(source: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in source.iterdir()) * 3
    mount = f'mount -t tmpfs -o size={size} tmpfs "$2" && exec "$0" -c "$FILL" "$@"'
    command = [
        "unshare",
        "--mount",
        "--map-root-user",
        "sh",
        "-c",
        mount,
        sys.executable,
        source,
        disk,
        tmp_path / "copy",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "FILL": FILL}
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["error"].startswith(f"{disk / 'out.partial'} cannot be written: No space left on device; ")
    assert "run the same command again to continue" in report["error"]
    assert (report["left"], report["after"]) == (["ballast", "out.partial"], ["out"])
    assert report["whole"] > 0
    assert contents(tmp_path / "copy") == contents(reshard(source, tmp_path / "expected", mp=3))


@pytest.fixture(scope="module")
def chain(smollm2_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list]]:
    """SmolLM2 from its GGUF file to 2 shards, from these to 3, from these to Hugging Face; what each took."""
    folder, source, taken = tmp_path_factory.mktemp("chain"), smollm2_file, []
    for name, flags in [("mp2", {"mp": 2}), ("mp3", {"mp": 3}), ("hf", {"format": "hf"})]:
        taken.append(alone(held.resharding, source, folder / name, **flags))
        source = folder / name
    yield folder, taken
    shutil.rmtree(folder)  # 1.6 GB


def test_memory_does_not_grow_with_the_checkpoint(chain: tuple[Path, list]) -> None:
    """SmolLM2 in fp32 is 0.54 GB; at most 0.1 GB and twice the largest tensor of a shard are allowed."""
    for taken, largest, announced in chain[1]:
        assert taken <= 100e6 + 2 * largest
        assert taken <= announced + 10e6


@pytest.mark.slow
def test_the_answer_is_the_same_from_each(chain: tuple[Path, list]) -> None:
    """Of the two formats: what is in the first folder is in the second, which was read from it."""
    question, answer = "What is the capital of France?", "The capital of France is Paris."
    done = infer("--ckpt_dir", chain[0] / "mp3", "--mp", "3", "--chat", "--temperature", "0", "--prompt", question)
    assert (done.code, done.stdout) == (0, answer + "\n"), done
    with LLM(chain[0] / "hf", dtype="fp32") as llm:
        [found] = llm.generate([[{"role": "user", "content": question}]], temperature=0.0, max_gen_len=16)
    assert found["completion"] == answer
