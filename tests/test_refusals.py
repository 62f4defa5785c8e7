"""Refusals from end to end over two ranks, one of each kind: where the failure is seen, and by whom.

Every way to break a checkpoint is in test_errors.py, where the ranks are there already: here each costs a start.
"""

import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest
from running import INFER, ROOT, Done, infer, run, start, torchrun

BOUND_S = 30  # 10 s on a machine that does nothing else
# Where root runs the tests, permission bits bind only without the capability to pass over them.
WITHOUT_OVERRIDE = ("setpriv", "--bounding-set", "-dac_override", "--inh-caps", "-dac_override")
# A file may grow to so many bytes: for a writer a disk that is full then, and it needs no mount, so no root.
FILE_LIMIT = ("prlimit", "--fsize={}")


@pytest.fixture(scope="module")
def cut(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose second shard was cut short."""
    folder = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("cut") / "model"))
    os.truncate(folder / "consolidated.01.pth", 20_000)
    return folder


@pytest.fixture
def no_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which `import torch` ends the process with a code that no command has."""
    (tmp_path / "no_torch").mkdir()
    (tmp_path / "no_torch" / "torch.py").write_text("import os\nos._exit(99)\n")
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path / "no_torch"), str(ROOT)])}


def in_time(begun: float) -> bool:
    return time.monotonic() - begun < BOUND_S


# ---- before torch ------------------------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_context(tiny: Path, no_torch: dict[str, str]) -> None:
    said = infer("--mp", "2", "--ckpt_dir", tiny, "--prompt", "word " * 300, **no_torch).refusal
    assert said.endswith("tokens, and the context of gqa is 256: shorten the prompt")


def test_more_ranks_than_heads(tiny: Path, no_torch: dict[str, str]) -> None:
    said = infer("--mp", "16", "--ckpt_dir", tiny, "--prompt", "Hi", **no_torch).refusal
    assert said == "16 ranks for model gqa with 8 attention heads: use between 1 and 8 ranks"


def test_groups_of_int4_across_ranks(tiny: Path, no_torch: dict[str, str]) -> None:
    said = infer("--mp", "2", "--ckpt_dir", tiny, "--prompt", "Hi", "--quant", "int4", **no_torch).refusal
    assert said == (
        "--quant int4 over 2 ranks: model gqa has heads of 8, which groups of 32 would reach across; "
        "use --quant int8, or one rank"
    )


def test_threads_that_are_no_number(tiny: Path, no_torch: dict[str, str]) -> None:
    said = infer("--mp", "2", "--ckpt_dir", tiny, "--prompt", "Hi", LLAMA_MP_THREADS="all", **no_torch).refusal
    assert said == "LLAMA_MP_THREADS is 'all', but must be a whole number above 0"


def test_an_output_that_may_not_be_written(tiny: Path, tmp_path: Path, no_torch: dict[str, str]) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    path = folder / "out.jsonl"
    wrapper = WITHOUT_OVERRIDE if os.geteuid() == 0 else ()
    command = [sys.executable, INFER, "--mp", "2", "--ckpt_dir", tiny, "--prompt", "Hi", "--output", path]
    said = run(*wrapper, *command, **no_torch).refusal
    assert said.startswith(
        f"--output: {path} cannot be opened for reading and writing: Permission denied; give another"
    )


# ---- a full disk -------------------------------------------------------------------------------------------------


def limited(size_bytes: int, *flags: str | Path, **env: str) -> Done:
    wrapper = [part.format(size_bytes) for part in FILE_LIMIT]
    return run(*wrapper, sys.executable, INFER, *flags, **env)


def test_a_disk_that_is_full_from_the_beginning(tiny: Path, tmp_path: Path, no_torch: dict[str, str]) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    flags = ["--mp", "2", "--ckpt_dir", tiny, "--prompt", "Hi", "--output", folder / "out.jsonl"]
    said = limited(0, *flags, **no_torch).refusal
    assert "out.jsonl.run.json" in said and "File too large; give another path" in said
    assert list(folder.iterdir()) == [], "nothing is left for the next run to stumble over"


@pytest.mark.slow
def test_a_disk_that_fills_up(tiny: Path, tmp_path: Path) -> None:
    prompts, path = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"id": str(i), "prompt": "Once upon a time"}) + "\n" for i in range(40)))
    flags = ["--mp", "2", "--ckpt_dir", tiny, "--prompts_file", prompts, "--output", path, "--max_gen_len", "16"]
    begun = time.monotonic()
    done = limited(6000, *flags, "--dtype", "fp32")  # above the run file: nothing else of a run is written to disk
    assert in_time(begun)
    num_kept = len(path.read_bytes().splitlines())
    assert 0 < num_kept < 40
    assert done.code == 1
    assert done.error == (
        f"{path} cannot be written: File too large; the {num_kept} finished prompts in it are kept: "
        "make room and run the same command again to continue"
    )


# ---- files, once the ranks have started --------------------------------------------------------------------------


def is_cut(error: str, cut: Path) -> bool:
    return error.startswith(f"{cut / 'consolidated.01.pth'} is not a whole torch file (") and error.endswith(
        "copy it again"
    )


def error_under_torchrun(done: Done) -> str:
    """Our one line, among some forty of torchrun's own; its code is 1 for every failure."""
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.code == 1 and done.stdout == "", done
    return line.removeprefix("error: ")


def test_a_file_that_all_ranks_refuse(cut: Path) -> None:
    begun = time.monotonic()
    done = infer("--mp", "2", "--ckpt_dir", cut, "--prompt", "Hi")
    assert in_time(begun)
    assert is_cut(done.refusal, cut)


@pytest.mark.slow
def test_under_torchrun_one_of_the_ranks_that_refuse_speaks(cut: Path) -> None:
    done = torchrun(2, INFER, "--ckpt_dir", cut, "--prompt", "Hi")
    assert is_cut(error_under_torchrun(done), cut)


# Two machines of one run, of which the second has a bad copy: rank 1 reads another folder than rank 0.
OTHER_FOLDER = """
import os, runpy, sys
good, bad, script = sys.argv[1:4]
sys.argv = [script, "--ckpt_dir", bad if os.environ["RANK"] == "1" else good, *sys.argv[4:]]
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.slow
def test_under_torchrun_what_rank_1_alone_refuses_is_said_once(cut: Path, tiny: Path, tmp_path: Path) -> None:
    script = tmp_path / "two_machines.py"
    script.write_text(OTHER_FOLDER)
    done = torchrun(2, script, tiny, cut, INFER, "--prompt", "Hi")
    rank, _, text = error_under_torchrun(done).partition(": ")
    assert rank == "rank 1" and is_cut(text, cut)


# ---- shared memory -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small /dev/shm, in a namespace of its own")
@pytest.mark.slow
def test_a_dev_shm_of_4_kb_is_enough(tiny: Path) -> None:
    """Containers have 64 MB of it; ranks on a CPU need none."""
    small = 'mount -t tmpfs -o size=4k tmpfs /dev/shm && exec "$@"'
    flags = ["--mp", "2", "--ckpt_dir", tiny, "--prompt", "Hi", "--max_gen_len", "4"]
    done = run("unshare", "--mount", "sh", "-c", small, "sh", sys.executable, INFER, *flags)
    assert done.code == 0, done.stderr


# ---- ports -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_runs_at_once_while_torchruns_usual_port_is_taken(tiny: Path) -> None:
    with socket.socket() as taken:
        try:
            taken.bind(("", 29500))
            taken.listen()
        except OSError:
            pass  # somebody else has it: as good
        flags = ["--mp", "2", "--ckpt_dir", tiny, "--prompt", "Hi", "--max_gen_len", "4", "--temperature", "0"]
        runs = [start(sys.executable, INFER, *flags) for _ in range(2)]
        ends = [each.wait() for each in runs]
    assert [done.code for done in ends] == [0, 0], ends
    assert ends[0].stdout == ends[1].stdout != ""
