"""Jobs on a real SLURM: submitted as a user does, interrupted as clusters do, answered exactly once in the end.

The oracle is the same model run here, at MP = 1.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from factory import MODELS, hugging_face, meta_tensors, write_meta
from running import ROOT, Done, environment_of
from slurm_cluster import SlurmCluster

from llama_mp import LLM

pytestmark = pytest.mark.slurm

NUM_PROMPTS, ENOUGH = 40, 6  # prompts of a batch; after how many it is interrupted
GEN_LEN, LONG_GEN_LEN = 40, 120
GREEDY = ["--temperature", "0", "--dtype", "fp32", "--device", "auto"]  # auto: the cluster's GPUs are pretended
SITE = 'interface = "lo"\ncpus_per_node = 4\n'


class Folder(NamedTuple):
    """Where a user submits from."""

    path: Path
    slurm: SlurmCluster

    def submit(self, *flags: str | Path) -> Done:
        """`launch/submit.py` with these words, and the site file where they are a verb's."""
        site = [] if flags[0] in ("status", "logs", "cancel") else ["--cluster", "site.toml"]
        command = [sys.executable, ROOT / "launch" / "submit.py", *flags, *site]
        env = self.slurm.env | {"PYTHONPATH": str(ROOT), "LLAMA_MP_THREADS": "1"}
        done = subprocess.run(command, cwd=self.path, env=env, capture_output=True, text=True, timeout=400)
        return Done(done.returncode, done.stdout, done.stderr)

    def job(self, *flags: str | Path) -> str:
        """The id of a job that was taken."""
        done = self.submit(*flags)
        assert done.code == 0, done.stderr
        assert done.stdout.strip().isdecimal(), done.stdout
        return done.stdout.strip()

    def ended(self, job: str, state: str = "COMPLETED", timeout: float = 150) -> None:
        """Wait until the job is in `state`; none of its processes is left anywhere."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        self.slurm.until_state(job, *over, timeout=timeout)
        assert self.slurm.field(job, "JobState") == state, self.log()
        self.slurm.until(lambda: not self.slurm.strays(), "end of all processes", 15)

    def log(self) -> str:
        return "\n".join(file.read_text(errors="replace") for file in sorted(self.path.glob("*.out")))

    def num_done(self, output: str = "out.jsonl") -> int:
        return sum(file.read_bytes().count(b"\n") for file in self.path.glob(f"{output}.parts/*.jsonl"))

    def until_in_the_middle(self, output: str = "out.jsonl") -> None:
        self.slurm.until(lambda: self.num_done(output) >= ENOUGH, f"{ENOUGH} answers: {self.log()}", 90)
        assert self.num_done(output) < NUM_PROMPTS // 2, "too fast to be interrupted"

    def answers(self, output: str = "out.jsonl") -> dict[str, str]:
        """Completions by id. Each id is there once, in the order of the prompts, and nothing of the parts is left."""
        records = [json.loads(line) for line in (self.path / output).read_bytes().splitlines()]
        ids = [record["id"] for record in records]
        assert ids == [json.loads(line)["id"] for line in (self.path / "prompts.jsonl").read_bytes().splitlines()]
        assert not (self.path / f"{output}.parts").exists()
        return {record["id"]: record["completion"] for record in records}

    def status(self, output: str = "out.jsonl") -> dict:
        return json.loads((self.path / f"{output}.status").read_bytes())


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    """A tiny random model in a folder whose name no shell takes as it is."""
    config = MODELS["gqa"]
    folder = write_meta(tmp_path_factory.mktemp("a model's") / "$1 tiny", config, meta_tensors(hugging_face(config)), 2)
    (folder / "tokenizer.model").symlink_to(tokenizer_file)
    return folder


PROMPTS = {f"q{number}": f"Once upon a time {number}" for number in range(NUM_PROMPTS)}


def answers_here(model: Path, prompts: dict, gen_len: int) -> dict[str, str]:
    """What the model answers to `prompts`, by their ids, on this machine and at MP = 1."""
    with LLM(model, dtype="fp32", device="cpu") as llm:
        answers = llm.generate(list(prompts.values()), temperature=0, max_gen_len=gen_len)
    return dict(zip(prompts, (answer["completion"] for answer in answers), strict=True))


@pytest.fixture(scope="session")
def expected(model: Path) -> dict[str, str]:
    return answers_here(model, PROMPTS, GEN_LEN)


@pytest.fixture(scope="session")
def long_expected(model: Path) -> dict[str, str]:
    return answers_here(model, PROMPTS, LONG_GEN_LEN)


@pytest.fixture
def folder(slurm: SlurmCluster, tmp_path: Path) -> Folder:
    path = tmp_path / "a user's folder"
    path.mkdir()
    (path / "site.toml").write_text(SITE)
    lines = (json.dumps({"id": id, "prompt": prompt}) for id, prompt in PROMPTS.items())
    (path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return Folder(path, slurm)


def batch(model: Path, *flags: str) -> list[str | Path]:
    """The words of an infer job over `model`, two rows at a time: slow enough to be interrupted."""
    words = ["infer", "--ckpt_dir", model, "--prompts_file", "prompts.jsonl", "--output", "out.jsonl", *GREEDY]
    size = ["--max_gen_len", str(GEN_LEN), "--max_batch_size", "2"]
    return [*words, *size, *([] if "--nodes" in flags else ["--nodes", "2", "--gpus_per_node", "1"]), *flags]


def long_batch(model: Path, *flags: str) -> list[str | Path]:
    """One that takes longer than SLURM needs to notice things: half a minute."""
    words = [str(LONG_GEN_LEN) if word == str(GEN_LEN) else word for word in batch(model, *flags)]
    words[words.index("--max_batch_size") + 1] = "1"
    return words


# ---- one model over several nodes --------------------------------------------------------------------------------


def test_smollm2_over_two_nodes_of_two_ranks_answers_as_one_rank_does(folder, smollm2_file):
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    lines = [{"id": "0", "prompt": "Once upon a time"}, {"id": "1", "messages": chat}]
    (folder.path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--ckpt_dir", smollm2_file, "--prompts_file", "prompts.jsonl", "--output", "out.jsonl", *GREEDY]
    place = ["--nodes", "2", "--gpus_per_node", "2", "--max_gen_len", "8", "--wait"]
    done = folder.submit("infer", *words, *place)
    assert done.code == 0, folder.log()
    assert folder.answers() == answers_here(smollm2_file, {"0": "Once upon a time", "1": chat}, 8)
    folder.ended(done.stdout.strip())


# ---- what interrupts a job ---------------------------------------------------------------------------------------


def requeue(folder: Folder, job: str) -> None:
    folder.slurm.sh(f"scontrol requeue {job}")


def set_a_node_down(folder: Folder, job: str) -> None:
    folder.slurm.set_down(folder.slurm.field(job, "BatchHost").replace("n1", "n2"))


def preempt(folder: Folder, job: str) -> None:
    folder.slurm.sh("sbatch --partition=urgent --nodes=4 --exclusive --output=/dev/null --wrap='sleep 1'")


def kill_a_rank(folder: Folder, job: str) -> None:
    environments = {process: environment_of(Path(f"/proc/{process}")) for process in folder.slurm.strays("n2")}
    (rank,) = (process for process, environment in environments.items() if b"RANK=1" in environment)
    os.kill(rank, signal.SIGKILL)


@pytest.mark.parametrize("interrupt", [requeue, set_a_node_down, preempt, kill_a_rank])
def test_a_job_that_is_interrupted_answers_each_prompt_once(
    folder: Folder, model: Path, expected: dict, interrupt: Callable[[Folder, str], None]
) -> None:
    job = folder.job(*batch(model, "--time", "10"))
    folder.until_in_the_middle()
    interrupt(folder, job)
    folder.ended(job)
    folder.slurm.set_up("n2")
    assert folder.answers() == expected
    assert folder.slurm.field(job, "Restarts") == "1"
    status = folder.status()
    assert (status["code"], status["done"], status["all"], status["attempt"]) == (0, NUM_PROMPTS, NUM_PROMPTS, 1)
    assert status["done_before"] >= ENOUGH
    assert status["restarts"] == (1 if interrupt is kill_a_rank else 0)


def test_a_rank_that_dies_is_named_within_seconds(folder, model):
    job = folder.job(*batch(model, "--max_restarts", "0"))
    folder.until_in_the_middle()
    start = time.monotonic()
    kill_a_rank(folder, job)
    folder.ended(job, "FAILED")
    assert time.monotonic() - start < 15
    assert "error: rank 1 on n2 was killed by SIGKILL" in folder.log()
    assert folder.slurm.field(job, "ExitCode") == "1:0"
    assert folder.status()["error"].startswith("rank 1 on n2 was killed by SIGKILL")
    assert folder.num_done() == folder.status()["done"] >= ENOUGH


def test_a_job_outlasts_its_time_limit(folder, model, long_expected):
    """SLURM looks every 30 s whether a limit is near: this job takes longer, and has made some progress by then."""
    job = folder.job(*long_batch(model, "--time", "1"))
    folder.ended(job, timeout=300)
    assert folder.answers() == long_expected
    assert int(folder.slurm.field(job, "Restarts")) >= 1
    assert "at the time limit" in folder.log()


def held_job(folder: Folder, *flags: str | Path) -> str:
    """The job of these flags, by plain sbatch and its script; it begins when it is released."""
    (folder.path / "job.sbatch").write_text(folder.submit(*flags, "--dry_run").stdout)
    return folder.slurm.sh("sbatch --parsable --hold job.sbatch", cwd=folder.path).strip()


def test_a_wrong_request_is_not_tried_again(folder, model):
    """The checkpoint was there at submission, and is gone when the job begins."""
    moved = folder.path / "model"
    moved.symlink_to(model)
    job = held_job(folder, *batch(moved))
    moved.unlink()
    folder.slurm.sh(f"scontrol release {job}")
    folder.ended(job, "FAILED")
    assert (folder.slurm.field(job, "ExitCode"), folder.slurm.field(job, "Restarts")) == ("2:0", "0")
    assert folder.log().count("error: ") == folder.log().count("srun: error: ") + 1
    assert folder.status()["code"] == 2


def test_a_rank_without_a_gpu_of_its_own_does_not_start(folder, model):
    (folder.path / "job.sbatch").write_text(folder.submit(*batch(model), "--dry_run").stdout)
    job = folder.slurm.sh("sbatch --parsable --gpus-per-node=2 job.sbatch", cwd=folder.path).strip()
    folder.ended(job, "FAILED")
    assert folder.slurm.field(job, "ExitCode") == "2:0"
    assert "error: node n1 has 2 GPUs for 1 rank" in folder.log()


def test_a_node_that_is_thought_lost_and_goes_on_spoils_nothing(folder, model, long_expected):
    """The first node's daemon dies, and with it SLURM's knowledge of what goes on there: rank 0, and the supervisor."""
    job = folder.job(*long_batch(model, "--time", "10"))
    folder.slurm.until(lambda: folder.num_done() > 0, "a first answer", 90)  # SLURM takes half a minute to notice
    lost = folder.slurm.field(job, "BatchHost")
    folder.slurm.lose(lost)
    folder.slurm.until(lambda: folder.slurm.field(job, "Restarts") == "1", "a second start", 60)
    assert folder.slurm.strays(lost), "the first attempt has ended already"
    folder.slurm.until_state(job, "COMPLETED", timeout=150)
    folder.slurm.power_on(lost)
    folder.slurm.set_up(lost)
    folder.slurm.until(lambda: not folder.slurm.strays(), "end of all processes", 60)
    assert folder.answers() == long_expected
    assert folder.slurm.field(job, "Restarts") == "1"


# ---- several jobs ------------------------------------------------------------------------------------------------


def test_an_array_of_four_merges_to_the_same_output(folder, model, expected):
    done = folder.submit(*batch(model, "--nodes", "1", "--gpus_per_node", "1", "--array", "4"), "--wait")
    assert done.code == 0, done.stderr + folder.log()
    assert folder.answers() == expected
    assert (folder.status()["code"], folder.status()["done"]) == (0, NUM_PROMPTS)


def test_infer_follows_a_reshard(folder, model, expected):
    first = folder.job("reshard", "--input", model, "--output", "mp3", "--mp", "3")
    place = ["--nodes", "1", "--gpus_per_node", "2", "--mem_gib", "1", "--time", "5", "--after", first]
    words = batch(Path("mp3"), *place)
    second = folder.job(*words)
    assert not (folder.path / "mp3").exists(), "submitted before there is anything to read"
    folder.ended(second)
    assert folder.slurm.field(first, "JobState") == "COMPLETED"
    assert len(list((folder.path / "mp3").glob("consolidated.*.pth"))) == 3
    assert folder.answers() == expected


def test_a_reshard_that_fails_cancels_what_follows(folder, model):
    moved = folder.path / "model"
    moved.symlink_to(model)
    first = held_job(folder, "reshard", "--input", moved, "--output", "mp3", "--mp", "3")
    moved.unlink()
    place = ["--nodes", "1", "--gpus_per_node", "1", "--mem_gib", "1", "--time", "5", "--after", first]
    second = folder.job(*batch(Path("mp3"), *place))
    folder.slurm.sh(f"scontrol release {first}")
    folder.ended(first, "FAILED")
    assert folder.slurm.field(first, "ExitCode") == "2:0"
    folder.ended(second, "CANCELLED")
    assert f"job {first}, which it waited for, failed" in folder.submit("status", second).stdout


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--partition", "nowhere"], "partition"),
        (["--nodes", "8", "--gpus_per_node", "1"], "node"),
        (["--nodes", "1", "--gpus_per_node", "8"], ""),
        (["--time", "2-00:00:00"], "time"),
        (["--mp", "3", "--nodes", "2", "--gpus_per_node", "2"], "idle"),
        (["--log_dir", "nowhere"], "nowhere"),
        (["--after", "99999"], "99999"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(folder, model, words, said):
    given = words if "--nodes" in words else [*words, "--nodes", "2", "--gpus_per_node", "1"]
    assert said in folder.submit(*batch(model, *given)).refusal
    assert folder.slurm.sh("squeue --noheader") == ""


def test_missing_folders_and_checkpoints_are_refused(folder, model):
    words = [word if word != "out.jsonl" else "nowhere/out.jsonl" for word in batch(model)]
    assert "nowhere" in folder.submit(*words).refusal
    assert "no-model" in folder.submit(*batch(Path("no-model"))).refusal
