"""What is told of jobs: lines from made-up records, and, marked slurm, of small jobs on a real cluster."""

import dataclasses
import json
import time
from datetime import datetime
from pathlib import Path

import pytest
from running import ROOT
from slurm_cluster import SlurmCluster

from llama_mp.errors import RequestError, RunError
from llama_mp.parts import parts_folder
from llama_mp.slurm import cluster, report
from llama_mp.slurm.cluster import JobRecord, Unreachable, parse, submit
from llama_mp.status import status_path

RECORDED = (ROOT / "tests" / "data" / "scontrol.txt").read_text().splitlines()
FAILED, REQUEUED, UNSTARTED, ORPHAN, WAITING, RUNNING = map(parse, RECORDED)
STATUS = {"job": "35", "attempt": 0, "code": None, "done": 17, "all": 40, "done_before": 5, "tokens": 812}
STATUS |= {"tokens_per_s": 30.52, "started": 1_000_000, "updated": 1_000_060, "restarts": 0, "error": None}
# Stands for the last line of a job of ours, and does nothing: the supervisor's words are only read.
LAST_LINE = ": python -m llama_mp.slurm.supervisor --output o.jsonl --max_restarts 3 -- python launch/infer.py\n"


def changed(job: JobRecord, **changes) -> JobRecord:
    return dataclasses.replace(job, **changes)


def write_status(output: Path, share=None, **changes) -> None:
    path = status_path(output, share)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(STATUS | changes))


def test_a_line_for_each_state() -> None:
    assert report.line(FAILED) == "1  FAILED on n1, exit code 2"
    assert report.line(UNSTARTED) == "19  FAILED (JobLaunchFailure) on n1, signal 53"
    assert report.line(ORPHAN) == "22  CANCELLED (job 21, which it waited for, failed)"
    waiting = changed(WAITING, start="2026-11-23T11:56:24", reason="Resources", restarts=2)
    assert report.line(waiting) == "35_[1-3]  PENDING (Resources), 2 restarts, starts about 2026-11-23 11:56"
    # 12 prompts took 60 s, 23 are left: 115 s after the last update
    end = f"{datetime.fromtimestamp(1_000_175):%Y-%m-%d %H:%M}"
    line = f"35_0  RUNNING on n[3-4], 1 restart, 17 of 40 prompts, 30.5 tokens/s, ends about {end}"
    assert report.line(changed(RUNNING, restarts=1), STATUS) == line


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"done_before": 17, "tokens_per_s": 0.0}, "17 of 40 prompts"),  # nothing yet
        ({"done_before": 17}, "17 of 40 prompts, 30.5 tokens/s"),
        ({"job": "34"}, "17 of 40 prompts"),  # its speed was another job's: this one still loads
        ({"code": 0, "done": 40}, "40 of 40 prompts"),
        ({"done": 0, "done_before": 0, "all": None, "tokens_per_s": 0.0}, "0 of ? prompts"),  # it was killed early
    ],
)
def test_what_is_not_known_is_not_told(changes: dict, told: str) -> None:
    assert report.line(RUNNING, STATUS | changes) == f"35_0  RUNNING on n[3-4], {told}"


@pytest.mark.parametrize(
    ("words", "output"),
    [
        ("--output out.jsonl --max_restarts 3", "/w/out.jsonl"),
        ("--output '/a b/it'\"'\"'s $x.jsonl'", "/a b/it's $x.jsonl"),
        ("--max_restarts 3 --output=--x.jsonl", "/w/--x.jsonl"),
        ("--max_restarts 3", None),
        ("'", None),
    ],
)
def test_the_output_is_found_in_the_script(monkeypatch: pytest.MonkeyPatch, words: str, output: str | None) -> None:
    script = (
        f"#!/bin/bash\n# infer --output no.jsonl\nexec p -m llama_mp.slurm.supervisor {words} -- p --output no.jsonl\n"
    )
    for array in (None, 8):
        more = "" if array is None else f"#SBATCH --array=0-{array - 1}\n"
        monkeypatch.setattr(cluster, "script_of", lambda id, more=more: script.replace("\n", f"\n{more}", 1))
        found = report.answers_of(changed(RUNNING, folder="/w"))
        assert found == (output and report.Answers(output=Path(output), num_tasks=array))


def test_no_answers_are_found_where_the_script_is_not_shown_or_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "script_of", lambda id: "#!/bin/bash\necho --output x -- y\n")
    assert report.answers_of(RUNNING) is None

    def refuse(id):
        raise RequestError("Access denied")

    monkeypatch.setattr(cluster, "script_of", refuse)
    assert report.answers_of(RUNNING) is None


def test_totals(tmp_path: Path) -> None:
    output = tmp_path / "o.jsonl"
    one, array = report.Answers(output=output, num_tasks=None), report.Answers(output=output, num_tasks=2)
    assert one.total() == array.total() == "" and array.status("0-1") is None
    write_status(output)
    assert one.total() == "17 of 40 prompts"
    write_status(output, (0, 2), done=3, all=20, done_before=0)
    assert array.total() == "3 of 20 prompts of the tasks that have begun"
    write_status(output, (1, 2), done=4, all=20, done_before=0)
    assert array.total() == "7 of 40 prompts" and array.status("1")["done"] == 4
    for attempt, count in (("35-0", 13), ("35-1", 3), ("35_1-0", 6)):  # answered, and not told yet
        lines = [json.dumps({"id": str(i)}) for i in range(count)]
        (parts_folder(output) / f"{attempt}.jsonl").write_text("\n".join([*lines, '{"id": "to']))
    assert one.total() == "18 of 40 prompts", "5 of attempts before, and 13 of the one that the status is of"
    assert array.total() == "9 of 40 prompts" and array.status("0")["done"] == 3
    for share in ((0, 2), (1, 2)):
        status_path(output, share).unlink()
    output.write_text("{}\n" * 40)  # all tasks are merged
    assert array.total() == "all 40 prompts"


def test_a_controller_that_is_being_restarted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    answers = iter(
        [Unreachable("no answer"), Unreachable("no answer"), [RUNNING], [changed(RUNNING, state="COMPLETED")]]
    )

    def jobs_of(id):
        if isinstance(answer := next(answers), Exception):
            raise answer
        return answer

    monkeypatch.setattr(cluster, "jobs_of", jobs_of)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    report.wait("35_0")
    told = ["no answer; asking again for 15 minutes", "35_0  RUNNING on n[3-4]", "35_0  COMPLETED on n[3-4]"]
    assert capsys.readouterr().err.splitlines() == told
    monkeypatch.setattr(cluster, "PATIENCE_S", -1.0)
    answers = iter([Unreachable("no answer")])
    with pytest.raises(Unreachable):
        report.wait("35_0")


def test_an_interrupted_wait_leaves_the_job_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster, "jobs_of", lambda id: [RUNNING])
    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        report.wait("35")
    assert "job 35 goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "kind", "told"),
    [
        ({}, RequestError, "job 1: the folder is gone; make it"),
        ({"code": 1}, RunError, "job 1: the folder is gone; make it"),
        ({"state": "CANCELLED", "code": 0, "signal": 15}, RunError, "job 1 was cancelled: submit it again"),
        ({"state": "TIMEOUT", "code": 0}, RunError, "job 1 reached its time limit of 00:10:00: "),
        ({"state": "NODE_FAIL", "code": 1}, RunError, r"job 1 ended as NODE_FAIL \(exit code 1\): "),
        ({"log": "/nowhere/x", "code": 3}, RunError, r"job 1 ended as FAILED \(exit code 3\): .* is /nowhere/x"),
        ({"log": "", "code": 1}, RunError, "SLURM does not say where its log is"),
        (
            {"log": "/nowhere/x", "reason": "JobLaunchFailure", "code": 0},
            RunError,
            "not be started on n1: .*/nowhere/x",
        ),
    ],
)
def test_why_a_job_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, kind: type, told: str
) -> None:
    log = tmp_path / "log"
    log.write_text(
        "error: before\n" + "x" * report.TAIL_BYTES + "\n1: error: the folder is gone; make it\nsrun: error: y\n"
    )
    job = changed(FAILED, **{"log": str(log)} | changes)
    monkeypatch.setattr(cluster, "jobs_of", lambda id: [job])
    with pytest.raises(kind, match=f"^{told}" if told.startswith("job") else told):
        report.wait("1")


# ---- on a cluster --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a test whose jobs run on the cluster."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script(*body: str, options: str = "") -> str:
    return "\n".join(["#!/bin/bash", "#SBATCH --output=log-%j.txt", options, *body, LAST_LINE])


@pytest.mark.slurm
def test_status_and_logs_of_a_running_job(slurm: SlurmCluster, folder: Path, capsys: pytest.CaptureFixture) -> None:
    id = submit(script("echo 'hé' $'\\xff'; sleep 60", options="#SBATCH --nodes=2 --gpus-per-node=2"))
    slurm.until_state(id, "RUNNING")
    report.status(id)
    assert capsys.readouterr().out == f"{id}  RUNNING on n[1-2]\n"
    write_status(folder / "o.jsonl", job=id)
    report.status(id)
    assert capsys.readouterr().out.startswith(f"{id}  RUNNING on n[1-2], 17 of 40 prompts, 30.5 tokens/s, ends about ")
    report.status(id, json=True)
    (job,) = json.loads(capsys.readouterr().out)
    assert (job["id"], job["state"], job["nodes"], job["answers"]["done"]) == (id, "RUNNING", "n[1-2]", 17)
    log = folder / f"log-{id}.txt"
    slurm.until(lambda: log.is_file() and log.stat().st_size, "its log")
    report.logs(id)
    assert capsys.readouterr() == ("hé \ufffd\n", f"{log}\n")


@pytest.mark.slurm
def test_jobs_that_wait_have_no_log(slurm: SlurmCluster, folder: Path, capsys: pytest.CaptureFixture) -> None:
    id = submit(script(options="#SBATCH --hold"))
    report.status(id)
    assert capsys.readouterr().out == f"{id}  PENDING (JobHeldUser)\n"
    with pytest.raises(RequestError, match=rf"^job {id}  PENDING \(JobHeldUser\): it has written no log {folder}/log-"):
        report.logs(id)


@pytest.mark.slurm
def test_cancel_says_what_is_kept(slurm: SlurmCluster, folder: Path, capsys: pytest.CaptureFixture) -> None:
    id = submit(script("sleep 60"))
    slurm.until_state(id, "RUNNING")
    write_status(folder / "o.jsonl", job=id, done_before=17, tokens_per_s=0)
    report.cancel(id)
    line, kept = capsys.readouterr().out.splitlines()
    assert line == f"cancelled {id}  RUNNING on n1, 17 of 40 prompts"
    assert kept.startswith(f"17 of 40 prompts are kept for {folder}/o.jsonl: ")
    slurm.until_state(id, "CANCELLED")
    with pytest.raises(RunError, match=f"^job {id} was cancelled: "):
        report.wait(id)
    report.cancel(id)
    assert capsys.readouterr().out == f"job {id} has ended already: CANCELLED\n"


@pytest.mark.slurm
def test_an_array(slurm: SlurmCluster, folder: Path, capsys: pytest.CaptureFixture) -> None:
    options = "#SBATCH --array=0-2\n#SBATCH --nodes=2 --gpus-per-node=4"
    id = submit(script("echo $SLURM_ARRAY_TASK_ID; sleep 60", options=options))
    slurm.until(lambda: [job.state for job in cluster.jobs_of(id)] == ["RUNNING", "RUNNING", "PENDING"], "two tasks")
    for task, done in ((0, 3), (1, 4)):
        write_status(folder / "o.jsonl", (task, 3), job=id, done=done, all=20, done_before=done)
    logs = [Path(job.log) for job in cluster.jobs_of(id)[:2]]
    slurm.until(lambda: all(log.is_file() and log.read_text() for log in logs), "both logs")
    report.logs(id)
    assert capsys.readouterr() == ("0\n1\n", "".join(f"{log}\n" for log in logs))
    report.status(id)
    first, second, third, total = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{id}_0  RUNNING on n[") and ", 3 of 20 prompts" in first and ", 4 of 20" in second
    assert third.startswith(f"{id}_2  PENDING (") and total == f"{id}  7 of 40 prompts of the tasks that have begun"
    report.cancel(f"{id}_1")
    assert capsys.readouterr().out.startswith(f"cancelled {id}_1  RUNNING")
    slurm.until_state(f"{id}_1", "CANCELLED")
    report.cancel(id)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == [f"{id}_0", f"{id}_2"] and lines[-1].startswith("7 of 40 ")


@pytest.mark.slurm
def test_wait_for_a_job_that_is_requeued(slurm: SlurmCluster, folder: Path, capsys: pytest.CaptureFixture) -> None:
    """It must not be taken for ended in between."""
    id = submit(script('[ -n "$SLURM_RESTART_COUNT" ] || { sleep 1; scontrol requeue $SLURM_JOB_ID; sleep 60; }'))
    report.wait(id)
    lines = capsys.readouterr().err.splitlines()
    assert any("PENDING (BeginTime), 1 restart" in line for line in lines)
    assert lines[-1] == f"{id}  COMPLETED on n1, 1 restart"


@pytest.mark.slurm
def test_wait_raises_what_the_job_says(slurm: SlurmCluster, folder: Path, capsys: pytest.CaptureFixture) -> None:
    refused = submit(script("echo 'error: no such model; check --size' >&2; exit 2"))
    with pytest.raises(RequestError, match=f"^job {refused}: no such model; check --size$"):
        report.wait(refused)
    killed = submit(script("kill -9 $$"))
    with pytest.raises(
        RunError, match=rf"^job {killed} ended as FAILED \(signal 9\): .* log is {folder}/log-{killed}\.txt$"
    ):
        report.wait(killed)
    unwritable = submit(script().replace("log-%j.txt", "missing/log.txt"))
    with pytest.raises(RunError, match=f"^job {unwritable} could not be started on n[1-4]: .*{folder}/missing/log.txt"):
        report.wait(unwritable)
    array = submit(script("exit $((SLURM_ARRAY_TASK_ID == 1 ? 2 : 0))", options="#SBATCH --array=0-2"))
    with pytest.raises(RequestError, match=rf"^job {array}_1 ended as FAILED \(exit code 2\)"):
        report.wait(array)


@pytest.mark.slurm
@pytest.mark.parametrize("kill", ["--kill-on-invalid-dep=yes", ""])
def test_a_failed_parent(slurm: SlurmCluster, folder: Path, capsys: pytest.CaptureFixture, kill: str) -> None:
    parent = submit(script("sleep 1; exit 1"))
    child = submit(script(options=f"#SBATCH --dependency=afterok:{parent} {kill}"))
    with pytest.raises(RunError, match=f"^job {child} did not run: job {parent}, which it waited for, failed; see"):
        report.wait(child)
    assert f"{child}  PENDING (Dependency)" in capsys.readouterr().err
    report.status(child)
    assert capsys.readouterr().out.endswith(f" (job {parent}, which it waited for, failed)\n")
