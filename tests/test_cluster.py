"""SLURM's commands: what they print, recorded and made up; and, marked slurm, what a real cluster refuses."""

import os
from pathlib import Path

import pytest
from running import ROOT
from slurm_cluster import SlurmCluster

from llama_mp.errors import RequestError, one_line
from llama_mp.slurm import cluster
from llama_mp.slurm.cluster import Unreachable, jobs_of, parse, submit

RECORDED = (ROOT / "tests" / "data" / "scontrol.txt").read_text().splitlines()
HEAD = "#!/bin/bash\n#SBATCH --output=/dev/null\n"


def shown(text, stream=1):
    """A shell command that prints `text`."""
    return "printf '%s\\n' '{}' >&{}".format(text.replace("'", "'\\''"), stream)


def test_records_of_what_scontrol_printed() -> None:
    failed, requeued, hostile, orphan, waiting, running = map(parse, RECORDED)
    assert (failed.id, failed.task, failed.state, failed.reason) == ("1", "", "FAILED", "NonZeroExitCode")
    assert (failed.code, failed.signal, failed.nodes, failed.restarts) == (2, 0, "n1", 0)
    assert (failed.start, failed.end) == ("2026-11-23T11:28:39", "2026-11-23T11:28:41")
    assert (failed.time_limit, failed.command, failed.dependency) == ("00:10:00", "/home/ann/ok.sh", "")
    assert (failed.log, failed.folder, failed.is_over) == ("/home/ann/ok.sh-1.out", "/home/ann", True)
    assert (requeued.restarts, requeued.nodes, requeued.command, requeued.state) == (1, "", "", "CANCELLED")
    assert (hostile.state, hostile.code, hostile.signal) == ("FAILED", 0, 53)  # not those in its name and comment
    assert (hostile.reason, hostile.folder) == ("JobLaunchFailure", "/home/ann")
    assert hostile.log == "/home/ann/a=b State=c/x JobState=FAKE y-19 Reason=x % #1.out"
    assert (orphan.reason, orphan.dependency) == ("DependencyNeverSatisfied", "afterok:21(failed)")
    assert (waiting.id, waiting.task, waiting.log, waiting.is_over) == ("35_[1-3]", "1-3", "", False)
    assert (running.id, running.task, running.state) == ("35_0", "0", "RUNNING")
    assert (running.folder, running.nodes) == ("/home/ann/rec dir", "n[3-4]")
    assert running.log == "/home/ann/rec dir/65B infer=1-35_0.out"


def test_tasks_come_in_their_order(commands) -> None:
    tasks = [RECORDED[5].replace("ArrayTaskId=0", f"ArrayTaskId={task}") for task in (10, 2)]
    commands("scontrol", shown("\n".join([RECORDED[4].replace("=1-3", "=11-13%2"), *tasks])))
    assert [job.id for job in jobs_of("35")] == ["35_2", "35_10", "35_[11-13]"]


@pytest.mark.parametrize(
    ("tail", "log"),
    [
        (" StdErr=/a b.out StdIn=/dev/null StdOut=/a b.out", "/a b.out"),
        (" StdErr= StdIn=/dev/null StdOut=/a.out TresPerNode=gres/gpu:2 TresPerTask=cpu=4 OOMKillStep=0", "/a.out"),
        (
            " AdminComment=x=y Comment=StdIn= z StdErr=/a.out StdIn=/dev/null StdOut=/a.out MailUser=ann MailType=END",
            "/a.out",
        ),
        ("", ""),
    ],
)
def test_what_other_releases_print_after_the_folder(tail: str, log: str) -> None:
    job = parse(RECORDED[0].split(" StdErr=")[0] + tail)
    assert (job.folder, job.log) == ("/home/ann", log)


def test_a_forgotten_job_is_looked_up_in_the_accounts(commands) -> None:
    commands("scontrol", shown("slurm_load_jobs error: Invalid job id specified", 2) + "; exit 1")
    rows = [
        [
            "12_0",
            "CANCELLED by 1000",
            "None",
            "n[1-2]",
            "2026-11-23T11:28:39",
            "Unknown",
            "00:10:00",
            "0:15",
            "/home/a b",
        ],
        ["12_[3-4%2]", "PENDING", "Resources", "None assigned", "Unknown", "Unknown", "00:10:00", "0:0", "/home/a b"],
    ]
    commands("sacct", "echo site advice >&2; " + shown("\n".join(map("\x1f".join, rows))))
    task, waiting = jobs_of("12")
    assert (task.id, task.task, task.state, task.signal) == ("12_0", "0", "CANCELLED", 15)
    assert (task.nodes, task.start, task.end, task.folder) == ("n[1-2]", "2026-11-23T11:28:39", "", "/home/a b")
    assert (waiting.id, waiting.task, waiting.reason, waiting.nodes) == ("12_[3-4%2]", "3-4", "Resources", "")


def test_a_job_that_nobody_remembers(commands) -> None:
    commands("scontrol", shown("slurm_load_jobs error: Invalid job id specified", 2) + "; exit 1")
    commands("sacct", shown("Slurm accounting storage is disabled", 2) + "; exit 1")
    with pytest.raises(RequestError, match=r"^SLURM knows no job 12 .* the \.status file"):
        jobs_of("12")
    commands("sacct", "exit 0")
    with pytest.raises(RequestError, match="SLURM knows no job 12 "):
        jobs_of("12")


@pytest.mark.parametrize("id", ["", "x", "12_", "12 13", "-1", "12_3_4", "12;ls", "12\n"])
def test_an_id_that_is_none_asks_nobody(commands, id: str) -> None:
    with pytest.raises(RequestError, match="is no job's id"):
        jobs_of(id)


def test_commands_that_are_not_there_or_get_no_answer(commands) -> None:
    with pytest.raises(RequestError, match=r"^sbatch is not on this machine: .* --dry_run"):
        submit(HEAD)
    with pytest.raises(RequestError, match=r"^scontrol is not on this machine: "):
        jobs_of("12")
    commands(
        "scontrol", shown("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", 2) + "; exit 1"
    )
    with pytest.raises(Unreachable, match=r"^scontrol: .*Unable to contact slurm controller.*; run it on a node"):
        jobs_of("12")


def test_variables_of_a_job_around_us_are_not_handed_on(commands, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_TIME_FORMAT", "SLURM_CONF", "SBATCH_QOS"):
        monkeypatch.setenv(name, "x")
    commands("sbatch", 'echo "12$SLURM_JOB_ID$SLURM_TIME_FORMAT;$SLURM_CONF$SBATCH_QOS"; test "$*" = --parsable')
    commands("scontrol", shown(RECORDED[0]))
    assert submit(HEAD) == "12"
    assert cluster.call("sbatch", "--parsable") == "12;xx\n"


def test_a_users_defaults_for_sbatch_count_for_less_than_the_script(commands, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PARTITION", "TIMELIMIT", "NO_REQUEUE", "MEM_PER_NODE", "OPEN_MODE", "ACCOUNT"):
        monkeypatch.setenv(f"SBATCH_{name}", name)
    said = [f"#SBATCH --{option}" for option in ("partition=main", "time=5", "requeue", "mem=1M", "open-mode=append")]
    commands("sbatch", "set | while read name; do case $name in SBATCH_*) echo $name;; esac; done")
    assert cluster.call("sbatch", text="\n".join(said)) == "SBATCH_ACCOUNT='ACCOUNT'\n"


def test_the_answer_after_a_submission_is_not_needed(commands) -> None:
    commands("sbatch", "echo 12; echo 'sbatch: 3 hours left' >&2")
    commands("scontrol", shown("slurm_load_jobs error: Unable to contact slurm controller", 2) + "; exit 1")
    assert submit(HEAD) == "12"


@pytest.mark.parametrize(
    ("reason", "never"),
    [
        ("PartitionConfig", True),
        ("PartitionTimeLimit", True),
        ("PartitionNodeLimit", True),
        ("QOSMaxWallDurationPerJobLimit", True),
        ("AssocMaxNodePerJobLimit", True),
        ("Job's_account_not_known,_so_it_can't_use_this_partition_(main_allows_abc)", True),
        ("PartitionDown", False),
        ("QOSMaxJobsPerUserLimit", False),
        ("AssocGrpGRES", False),
        ("ReqNodeNotAvail,_UnavailableNodes:n1", False),
        ("Nodes_required_for_job_are_DOWN,_DRAINED_or_reserved_for_jobs_in_higher_priority_partitions", False),
        ("Resources", False),
        ("", False),
    ],
)
def test_reasons_for_which_a_job_waits_for_ever(reason: str, never: bool) -> None:
    waiting = RECORDED[4].replace("Reason=Resources", f"Reason={reason}").replace("Reason=Priority", f"Reason={reason}")
    assert parse(waiting).never_starts == never
    assert parse(RECORDED[5].replace("Reason=None", f"Reason={reason}")).never_starts is False  # it runs


def test_a_parent_that_will_never_start(commands) -> None:
    commands("scontrol", shown(RECORDED[4].replace("Reason=Resources", "Reason=BadConstraints")))
    with pytest.raises(RequestError, match=r"^--after 35: job 35_\[1-3\] will never start \(BadConstraints\), so "):
        submit("#SBATCH --dependency=afterok:35\n")


# ---- on a cluster --------------------------------------------------------------------------------------------------


def refusal(*options: str) -> str:
    with pytest.raises(RequestError) as raised:
        submit(HEAD + "".join(f"#SBATCH {option}\n" for option in options) + "sleep 60\n")
    text = one_line(raised.value)
    assert text.startswith("sbatch: ") and "; " in text
    return text


@pytest.mark.slurm
def test_what_sbatch_refuses(slurm: SlurmCluster) -> None:
    assert refusal("--partition=nowhere").endswith("; give one of these as --partition: main, urgent")
    assert "Node count specification invalid; lower --nodes" in refusal("--nodes=9")
    assert "More processors requested than permitted; lower" in refusal("--cpus-per-task=99")
    assert "Memory specification can not be satisfied" in refusal("--mem=999999999M")
    assert "lower --time" in refusal("--time=9999")
    assert "Requested node configuration is not available; lower" in refusal("--gpus-per-node=5")
    assert "check gpu_flag and options of the site file" in refusal("--gres=tpu:1")
    assert "check gpu_flag and options of the site file" in refusal("--bogus")
    assert "; lower --array" in refusal("--array=0-99999999")
    assert slurm.sh("squeue --noheader") == ""


@pytest.mark.slurm
def test_jobs_that_are_not_there(slurm: SlurmCluster) -> None:
    array = submit(HEAD + "#SBATCH --array=0-1\nexit 0\n")
    for id in ("99999", "99999_1", f"{array}_7"):
        with pytest.raises(RequestError, match=f"^SLURM knows no job {id} "):
            jobs_of(id)


@pytest.mark.slurm
def test_an_unknown_parent_and_a_failed_one(slurm: SlurmCluster) -> None:
    """sbatch takes both: without a word it starts the first at once, and the second never."""
    after = HEAD + "#SBATCH --dependency=afterok:{}\n#SBATCH --kill-on-invalid-dep=yes\n"
    with pytest.raises(RequestError, match=r"^--after 99999: SLURM knows no job 99999 "):
        submit(after.format(99999))
    failing = submit(HEAD + "exit 3\n")
    slurm.until_state(failing, "FAILED")
    with pytest.raises(RequestError, match=rf"^--after {failing}: job {failing} has failed \(FAILED\)"):
        submit(after.format(failing))
    assert slurm.sh("squeue --noheader") == ""


@pytest.mark.slurm
def test_a_job_that_would_wait_for_ever(slurm: SlurmCluster) -> None:
    """Sites without EnforcePartLimits let it in."""
    conf = slurm.conf.read_text()
    slurm.conf.write_text(conf.replace("EnforcePartLimits=ALL", "EnforcePartLimits=NO"))
    slurm.sh("scontrol reconfigure")
    try:
        for request in ("--nodes=9", "--cpus-per-task=99", "--time=9999", "--time=9999\n#SBATCH --array=0-2"):
            with pytest.raises(
                RequestError, match=r"^SLURM would never start this job \(Partition.*, so it was cancelled: lower "
            ):
                submit(f"{HEAD}#SBATCH {request}\n")
        assert slurm.sh("squeue --noheader") == ""
        slurm.sh("scontrol update partitionname=main AllowAccounts=abc")
        with pytest.raises(RequestError, match=r"never start this job \(Job's_account.* give an --account"):
            submit(HEAD)
        slurm.sh("scontrol update partitionname=main AllowAccounts=ALL")
        slurm.sh("scontrol update nodename=n4 state=drain reason=test")
        waiting = submit(f"{HEAD}#SBATCH --nodes=4\nsleep 60\n")  # until the node is back, not for ever
        assert slurm.field(waiting, "JobState") == "PENDING"
    finally:
        slurm.conf.write_text(conf)
        slurm.sh("scontrol reconfigure; scontrol update partitionname=main AllowAccounts=ALL; scancel -u root")
        slurm.set_up("n4")


@pytest.mark.slurm
def test_what_the_controller_says_of_a_job(
    slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = "#SBATCH --nodes=2 --gpus-per-node=4 --output=out-%A_%a.txt --array=0-2\n"
    id = submit(f"#!/bin/bash\n{options}sleep 60\n")
    slurm.until(lambda: [job.state for job in jobs_of(id)] == ["RUNNING", "RUNNING", "PENDING"], "two of three tasks")
    first, second, third = jobs_of(id)
    assert [first.id, second.id, third.id] == [f"{id}_0", f"{id}_1", f"{id}_2"] or third.id == f"{id}_[2]"
    assert {first.nodes, second.nodes} == {"n[1-2]", "n[3-4]"}
    assert Path(first.log) == tmp_path / f"out-{id}_0.txt" and Path(first.folder) == tmp_path
    assert cluster.script_of(second.id) == f"#!/bin/bash\n{options}sleep 60\n"
    cluster.cancel(id)
    slurm.until(lambda: all(job.state == "CANCELLED" for job in jobs_of(id)), "end of all tasks")
    assert os.listdir(tmp_path) and [job.id for job in jobs_of(f"{id}_1")] == [f"{id}_1"]
