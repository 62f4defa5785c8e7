"""Run records: what they hold, what they never hold, and that none is lost or torn."""

import json
import multiprocessing
import socket
import sys
from pathlib import Path

import pytest
from running import CHAT, infer, run

from llama_mp import LLM, records
from llama_mp.batch import InferFlags
from llama_mp.bench import BenchFlags
from llama_mp.chat import ChatFlags
from llama_mp.cli import parse, usage
from llama_mp.errors import RequestError
from llama_mp.measure import end_run

RECORD = {"size": "7B", "mp": 2, "device": "NVIDIA A100-SXM4-40GB", "dtype": "fp16", "date": "2026-01-31", "x": 1}
NAME = "7b-mp2-nvidia-a100-sxm4-40gb-fp16-2026-01-31"


@pytest.fixture
def alice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody with a name, on a machine with a name."""
    monkeypatch.setenv("HOME", "/home/alice")
    for name in ("LOGNAME", "USER"):
        monkeypatch.setenv(name, "alice")
    monkeypatch.setattr(socket, "gethostname", lambda: "wonder.land.example")
    monkeypatch.delenv("LLAMA_MP_LAUNCHED", raising=False)
    monkeypatch.setattr("sys.argv", ["/home/alice/llama-mp/launch/infer.py"])


def command(*argv: str, flags_class: type = InferFlags, ranks: int = 1) -> str:
    return records.command_of(parse(flags_class, argv), ranks)


# ---- files ---------------------------------------------------------------------------------------------------------


def test_a_name_says_what_ran_and_no_file_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there yet"
    paths = [records.save(folder, RECORD | {"x": x}) for x in range(3)]
    assert [path.name for path in paths] == [f"{NAME}.json", f"{NAME}-2.json", f"{NAME}-3.json"]
    assert [json.loads(path.read_text())["x"] for path in paths] == [0, 1, 2]
    assert sorted(folder.iterdir()) == sorted(paths)  # nothing temporary is left


@pytest.mark.parametrize(
    ("size", "stem"), [("../up", "up"), ("a b/c", "a-b-c"), ("llama3.2-1b", "llama3.2-1b"), ("7B", "7b")]
)
def test_a_name_is_one_of_a_file(tmp_path: Path, size: str, stem: str) -> None:
    path = records.save(tmp_path, RECORD | {"size": size})
    assert path.parent == tmp_path and path.name.startswith(f"{stem}-mp2-")


def save_some(folder: Path, number: int) -> None:
    for x in range(10):
        records.save(folder, RECORD | {"x": [number, x]})


def test_runs_that_end_at_once_all_leave_their_record(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=save_some, args=(tmp_path, number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = [tuple(json.loads(file.read_text())["x"]) for file in tmp_path.iterdir()]
    assert sorted(found) == [(number, x) for number in range(4) for x in range(10)]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llama_mp.files.os.fsync", full)
    with pytest.raises(OSError):
        records.save(tmp_path, RECORD)
    assert list(tmp_path.iterdir()) == []


# ---- the flag ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], None),
        (["--record"], records.RUNS),
        (["--record", "--echo"], records.RUNS),
        (["--record", "some/where"], Path("some/where")),
        (["--record=some/where"], Path("some/where")),
        (["--record=-x"], Path("-x")),
        (["--echo", "--record", "a b"], Path("a b")),
    ],
)
def test_record_stands_alone_or_with_a_folder(argv: list[str], expected: Path | None) -> None:
    assert parse(InferFlags, argv).record == expected


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--record="], "--record is '', but must be a path"),
        (["--record", "a", "b"], "unexpected argument 'b'"),
        (["--record", "-x"], "unknown option '-x'"),
        (["--record", "--record", "a"], "--record is given twice: 'docs/runs' and 'a'"),
        (["--record", "/dev/null/runs"], "/dev/null is no folder that can be written"),
        (["--norecord"], "unknown flag --norecord"),
    ],
)
def test_wrong_uses_are_refused(argv: list[str], said: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse(InferFlags, argv)
    assert said in str(refused.value)


@pytest.mark.parametrize("flags_class", [InferFlags, ChatFlags, BenchFlags])
def test_help_shows_that_the_folder_is_optional(flags_class: type) -> None:
    assert "--record [PATH]" in usage(flags_class, "python x", "")


# ---- what is told ----------------------------------------------------------------------------------------------------


def test_a_command_holds_what_was_asked_and_nothing_of_the_user(alice: None) -> None:
    said = command("--ckpt_dir", "/home/alice/models/my 7B", "--prompt", "dear alice", "--stop", "END", "--mp", "2")
    assert said == "python launch/infer.py --stop ... --ckpt_dir ~/'models/my 7B' --prompt ... --mp 2"
    assert command("--chat", "--prompt", "a") == "python launch/infer.py --prompt ... --chat"
    assert command("--ckpt_dir", "~/m") == "python launch/infer.py --ckpt_dir ~/m"
    assert command("--ckpt_dir=/home/alice") == "python launch/infer.py --ckpt_dir ~"
    assert command("--prompts_file", "/data/alice/secret/p.txt") == "python launch/infer.py --prompts_file .../p.txt"
    assert command("--ckpt_dir", "/data/alice") == "python launch/infer.py --ckpt_dir .../..."
    assert command("--ckpt_dir", "runs/alice-7B/wonder") == "python launch/infer.py --ckpt_dir runs/...-7B/..."
    assert command("--ckpt_dir", "malice") == "python launch/infer.py --ckpt_dir malice"
    assert command("--system", "I am alice", flags_class=ChatFlags) == "python launch/infer.py --system ..."
    assert command("--record", "/home/alice/r", "--output", "/x/alice.jsonl") == "python launch/infer.py"


def test_a_command_starts_the_ranks_as_they_were_started(alice: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command("--top_k", "3", ranks=4) == "torchrun --nproc_per_node=4 launch/infer.py --top_k 3"
    monkeypatch.setenv("LLAMA_MP_LAUNCHED", "1")
    assert command("--mp", "4", ranks=4) == "python launch/infer.py --mp 4"


@pytest.mark.parametrize(
    ("files", "flags", "variables", "kind"),
    [
        ({}, "fpu hypervisor", {}, "virtual machine"),
        ({"sys_vendor": "Amazon EC2"}, "hypervisor", {}, "cloud VM (AWS)"),
        ({"sys_vendor": "Amazon EC2", "marks": ""}, "hypervisor", {}, "container, cloud VM (AWS)"),
        ({"sys_vendor": "alice's basement"}, "hypervisor", {"SLURM_JOB_ID": "7"}, "SLURM, virtual machine"),
        ({"sys_vendor": "LENOVO", "chassis_type": "10"}, "fpu", {}, "laptop"),
        ({"sys_vendor": "Amazon EC2", "chassis_type": "23"}, "fpu", {}, "physical machine"),
    ],
)
def test_the_kind_of_machine_is_what_can_be_told(
    files: dict[str, str], flags: str, variables: dict[str, str], kind: str, tmp_path: Path, monkeypatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(records, "DMI", tmp_path)
    monkeypatch.setattr(records, "CONTAINER_MARKS", (tmp_path / "marks",))
    monkeypatch.setattr(records, "cpu_fields", lambda: {"flags": flags})
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    assert records.kind_of_machine() == kind


def test_this_machine_is_described() -> None:
    told = records.environment({"torch": "2.x"})
    assert told["cores"] >= 1 and told["cpu"] and told["kind"]
    assert list(told["versions"]) == ["python", "torch"]
    assert 1e8 < records.host_memory_bytes() < 1e14


def test_infer_records_its_run_without_names_or_words(tiny: Path, tmp_path: Path) -> None:
    home = tmp_path / "queenofhearts"
    models = home / "models"
    models.mkdir(parents=True)
    (models / "tiny").symlink_to(tiny)
    names = {"HOME": str(home), "USER": "queenofhearts", "LOGNAME": "queenofhearts"}
    flags = ("--ckpt_dir", models / "tiny", "--prompt", "Off with her head", "--max_gen_len", "4", "--temperature", "0")
    done = infer(*flags, "--record", home / "runs", **names)
    assert done.code == 0, done.stderr
    (file,) = (home / "runs").iterdir()
    text = file.read_text()
    for private in ("queenofhearts", "Off with", socket.gethostname(), str(tmp_path)):
        assert private not in text
    record = json.loads(text)
    assert (
        record["command"]
        == "python launch/infer.py --max_gen_len 4 --temperature 0.0 --ckpt_dir ~/models/tiny --prompt ..."
    )
    assert (record["verb"], record["mp"], record["batch_size"], record["weights"]) == ("infer", 1, 1, "checkpoint")
    assert record["ttft_s"] > 0 and record["peak_memory_bytes"] > 0
    assert record["planned_memory_bytes"] == sum(v for k, v in record["plan"].items() if k != "runtime_bytes")


def test_no_record_unless_asked_and_something_was_computed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with LLM(tiny) as llm:
        end_run(llm, InferFlags(record=tmp_path / "runs"))
        llm.generate(["a"], max_gen_len=2)
        end_run(llm, InferFlags())
        assert list(tmp_path.iterdir()) == []
        end_run(llm, InferFlags(record=tmp_path / "runs"))
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_a_conversation_is_recorded_without_its_words(tmp_path: Path) -> None:
    done = run(sys.executable, CHAT, "--record", tmp_path, "--max_gen_len", "4", text="What is love?\n")
    assert done.code == 0, done.stderr
    (file,) = tmp_path.iterdir()
    record = json.loads(file.read_text())
    assert (record["verb"], record["size"], record["batch_size"]) == ("chat", "smollm2-135m", 1)
    assert record["command"] == "python launch/chat.py --max_gen_len 4" and "love" not in file.read_text()
