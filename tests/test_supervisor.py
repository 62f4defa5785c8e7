"""What follows from how an attempt ended, and how it is started: without a cluster, which is in test_slurm_jobs.py."""

import signal
import sys
import time

import pytest

from llama_mp.attempt import Attempt
from llama_mp.errors import RequestError
from llama_mp.slurm import cluster, supervisor
from llama_mp.slurm.own_job import Now
from llama_mp.slurm.supervisor import (
    End,
    Job,
    Progress,
    Step,
    Supervisor,
    SupervisorFlags,
    job_of,
    next_move,
    step_command,
    step_environment,
)
from llama_mp.status import read_status, write_status

JOB = {"SLURM_JOB_ID": "12"}
TASK = {
    "SLURM_JOB_ID": "15",
    "SLURM_ARRAY_JOB_ID": "12",
    "SLURM_ARRAY_TASK_ID": "7",
    "SLURM_ARRAY_TASK_MIN": "3",
    "SLURM_ARRAY_TASK_COUNT": "4",
    "SLURM_ARRAY_TASK_STEP": "2",
    "SLURM_RESTART_COUNT": "1",
    "SLURM_CPUS_PER_TASK": "6",
}


def test_a_job_and_a_task_of_an_array():
    assert job_of(JOB, ["n1"]) == Job("12", 12, "12-0", None, ["n1"], None)
    assert job_of(JOB | {"SLURM_RESTART_COUNT": "2"}, ["n1"]).attempt == "12-2"
    assert job_of(TASK, ["n1", "n2"]) == Job("12_7", 15, "12_7-1", "2/4", ["n1", "n2"], "6")


def test_an_array_with_gaps_is_refused():
    with pytest.raises(RequestError, match="gaps"):
        job_of(TASK | {"SLURM_ARRAY_TASK_ID": "11"}, ["n1"])


def test_the_step_is_a_task_on_each_node():
    one, two = step_command(job_of(JOB, ["n1"]), ["verb"]), step_command(job_of(TASK, ["n1", "n2"]), ["verb", "a b"])
    assert one[-1:] == ["verb"] and "--ntasks=1" in one and not any("cpus" in word for word in one)
    assert two[-3:] == ["--cpus-per-task=6", "verb", "a b"] and {"--nodes=2", "--kill-on-bad-exit=1"} < set(two)
    assert "--export=ALL" in one  # whatever the site exports to jobs


def test_the_step_learns_who_it_is():
    told = step_environment(job_of(TASK, ["n1", "n2"]), "10.0.0.1")
    assert told["LLAMA_MP_NODES"] == "n1,n2" and told["MASTER_ADDR"] == "10.0.0.1"
    assert (told["LLAMA_MP_ATTEMPT"], told["LLAMA_MP_SHARE"]) == ("12_7-1", "2/4")
    jobs = [job_of(JOB | {"SLURM_RESTART_COUNT": str(n)}, ["n1"]) for n in range(8)] + [job_of(TASK, ["n1"])]
    jobs += [job_of(TASK | {"SLURM_JOB_ID": "16"}, ["n1"])]  # it may share its first node with another task
    ports = {step_environment(job, "a")["MASTER_PORT"] for job in jobs}
    assert len(ports) == len(jobs) and all(10_000 <= int(port) < 30_000 for port in ports)
    assert "LLAMA_MP_SHARE" not in step_environment(job_of(JOB, ["n1"]), "a")


# ---- what follows ------------------------------------------------------------------------------------------------

PREEMPTED, LIMIT, SIGNAL = "by preemption", "at the time limit", "by a signal"


@pytest.mark.parametrize(
    ("end", "restarts", "requeued", "restarts_after"),
    [
        (End(0, None, True), 0, False, 0),
        (End(0, PREEMPTED, True), 0, False, 0),  # it was faster than the signal
        (End(2, None, False), 0, False, 0),
        (End(2, LIMIT, True), 0, False, 0),
        (End(1, None, True), 0, True, 1),
        (End(1, None, True), 2, True, 3),
        (End(1, None, True), 3, False, 3),
        (End(1, None, False), 0, False, 0),
        (End(143, PREEMPTED, True), 3, True, 3),
        (End(143, PREEMPTED, False), 3, True, 3),
        (End(143, SIGNAL, False), 0, True, 0),
        (End(143, LIMIT, True), 3, True, 3),
        (End(143, LIMIT, False), 0, True, 1),
        (End(143, LIMIT, False), 3, False, 3),
    ],
)
def test_what_becomes_of_the_job(end, restarts, requeued, restarts_after):
    move = next_move(end, restarts, 3)
    assert (move.requeues, move.restarts) == (requeued, restarts_after), move


@pytest.mark.parametrize(
    ("signals", "is_preempted", "left_s", "told"),
    [
        ([], False, 1e6, None),
        ([], True, 1e6, PREEMPTED),  # SLURM ended the step's tasks, and said nothing to the script
        ([10], True, 8.0, PREEMPTED),
        ([10], False, 100.0, LIMIT),
        ([15], False, 1e6, SIGNAL),
    ],
)
def test_how_an_attempt_was_stopped(signals, is_preempted, left_s, told):
    supervisor = Supervisor(SupervisorFlags(), ["verb"])
    for number in signals:
        supervisor.note_signal(number, None)
    assert supervisor.how_stopped(Now("RUNNING", 0, is_preempted, left_s)) == told


def test_restarts_can_be_forbidden():
    assert not next_move(End(1, None, True), 0, 0).requeues


# ---- the step ----------------------------------------------------------------------------------------------------


def ran(code: str, is_to_stop: bool = False) -> tuple[int, Step]:
    step = Step([sys.executable, "-c", code], {})
    return step.wait(lambda: is_to_stop), step


def test_the_first_failure_counts(capfd):
    said = "srun: error: n2: task 1: Exited with exit code 2\nsrun: error: n1: task 0: Terminated\n"
    lines = "hello\nerror: first\nerror: second\n" + said
    code, step = ran(f"import sys; sys.stderr.write({lines!r}); sys.exit(143)")
    assert (code, step.error) == (2, "first")
    assert capfd.readouterr().err == lines


def test_an_error_in_json_is_one_too():
    line = '{"time": 1.5, "rank": 1, "kind": "error", "text": "no \\u00e9"}'
    assert ran(f"import sys; sys.stderr.write({line!r} + chr(10)); sys.exit(1)")[1].error == "no \u00e9"


def test_a_task_that_was_killed_is_a_failure():
    assert ran("import sys; sys.stderr.write('srun: error: n1: task 0: Killed\\n'); sys.exit(137)")[0] == 1
    assert ran("raise SystemExit(5)")[0] == 5
    assert ran("")[0] == 0


def test_what_is_not_utf8_passes(capfd):
    assert ran(r"import os; os.write(2, b'\xff\n')")[0] == 0
    assert capfd.readouterr().err


def test_a_step_that_is_to_stop_ends():
    assert ran("import time; time.sleep(60)", is_to_stop=True)[0] != 0


# ---- an attempt, by commands that stand in for SLURM's -----------------------------------------------------------

RUNNING = "JobId=12 JobState=RUNNING Restarts=0 EndTime=Unknown PreemptTime=None"


@pytest.fixture
def attempt(tmp_path, monkeypatch, commands):
    """Runs a shell command as task 7 of an array, or as job 12; what scontrol was asked is in asked.txt."""
    asked = tmp_path / "asked.txt"
    commands("srun", 'while [ "$1" != verb ]; do shift; done; exec /bin/sh -c "$2"')

    def supervised(
        script, *, shows=RUNNING, requeues="echo 'Requested operation is presently disabled for job 12' >&2; exit 1"
    ):
        show, answer = f"echo '{shows}'" if shows else "echo 'Unable to contact slurm controller' >&2; exit 1", requeues
        cases = (
            f'"show hostnames"*) echo n1;; "show node"*) echo NodeAddr=a;; "show job"*) {show};; requeue*) {answer};;'
        )
        commands("scontrol", f'echo "$*" >> {asked}; case "$*" in {cases} esac')
        return Supervisor(SupervisorFlags(output=tmp_path / "o.jsonl"), ["verb", script]).run(), asked.read_text()

    for name, value in (JOB | {"SLURM_JOB_NODELIST": "n1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cluster, "PATIENCE_S", -1.0)
    monkeypatch.setattr(supervisor, "KILLED_S", 0)
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)]
    yield supervised
    for number, handler in zip((signal.SIGUSR1, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


def test_a_job_is_done_though_the_controller_does_not_answer(attempt):
    assert attempt("exit 0", shows=None)[0] == 0


def test_a_step_that_was_told_of_a_preemption_by_itself(attempt, tmp_path):
    shows = RUNNING.replace("PreemptTime=None", "PreemptTime=2026-11-23T12:00:00")
    code, asked = attempt("exit 143", shows=shows, requeues="true")
    assert "requeue incomplete 12" in asked
    assert (read_status(tmp_path / "o.jsonl.status")["code"], code) == (None, 143)


def test_a_requeued_job_ends_as_soon_as_slurm_wants_it_to(attempt, tmp_path, monkeypatch):
    """SLURM's signal goes to all processes of the script, scontrol among them."""
    monkeypatch.setattr(supervisor, "KILLED_S", 120)
    start = time.monotonic()
    attempt("kill -USR1 $PPID; exit 143", requeues="kill -TERM $PPID $$")
    assert read_status(tmp_path / "o.jsonl.status")["code"] is None and time.monotonic() - start < 60


def test_a_task_of_an_array_asks_about_itself_alone(attempt, monkeypatch):
    """The number of one task is that of the array."""
    for name, value in (TASK | {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "0"}).items():
        monkeypatch.setenv(name, value)
    asked = attempt("kill -USR1 $PPID; exit 143", requeues="true")[1].splitlines()
    assert asked[-2:] == ["show job -o 12_7", "requeue incomplete 12_7"]


def test_a_job_that_slurm_does_not_requeue_ends_with_its_code(attempt, tmp_path, capfd):
    code, _ = attempt("trap '' TERM; echo 'error: rank 1 is gone' >&2; kill -TERM $PPID; exit 7")
    assert code == read_status(tmp_path / "o.jsonl.status")["code"] == 7
    said = "Requested operation is presently disabled for job 12; leave --no-requeue out"
    assert f"is not requeued after all: scontrol: {said}" in capfd.readouterr().err


def test_a_process_that_could_not_say_why_it_ended_is_told_of(attempt, tmp_path, capfd):
    assert attempt("echo 'srun: error: n1: task 0: Killed' >&2; exit 137")[0] == 1
    (said,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("error: "))
    assert said.startswith("error: node n1: Killed; ") and said.endswith(
        read_status(tmp_path / "o.jsonl.status")["error"]
    )


@pytest.mark.parametrize("shows", ["JobState=CANCELLED Restarts=0", "JobState=RUNNING Restarts=1"])
def test_a_job_that_slurm_has_ended_is_left_alone(attempt, tmp_path, shows):
    code, asked = attempt("exit 9", shows=shows)
    assert code == 9 and "requeue" not in asked and not (tmp_path / "o.jsonl.status").exists()


def test_without_an_output_every_restart_counts():
    assert Progress(None, Attempt.of("12-3", None)).restarts == 3


def test_what_attempts_before_have_done_is_not_forgotten(tmp_path):
    """This one ended before it could look."""
    before = {"job": "12", "attempt": 0, "done": 7, "all": 9, "done_before": 3, "restarts": 1}
    write_status(tmp_path / "o.jsonl.status", before)
    progress = Progress(tmp_path / "o.jsonl", Attempt.of("12-1", None))
    assert (str(progress), progress.has_grown, progress.restarts) == ("(7 of 9 done)", False, 1)
