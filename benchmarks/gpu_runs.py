"""The processes of benchmarks/gpu.py: what is asked of each, and what it answered."""

import json
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from llama_mp.errors import RequestError, RunError, say
from llama_mp.flags import Flags, check_at_least, flag, flag_words

HERE = Path(__file__).parent
BENCH = HERE.parent / "launch" / "bench.py"
LIMIT_S = 420  # for one process: the longest compile takes half of it
MOST_LINES = 4  # shown of what a process says beside its answer


@dataclass(frozen=True, kw_only=True)
class RunFlags(Flags):
    size: tuple[str, ...] = flag(("7B", "llama3-8b"), "shapes of configs/; may be given several times")
    prompt_len: int = flag(128, "tokens of the prompt before those that are decoded")
    gen_len: int = flag(256, "tokens decoded")
    prefill_len: int = flag(2048, "tokens of the prompt that is measured by itself")
    gpt_fast: Path | None = flag(None, "folder of a checkout of gpt-fast")
    device: Literal["cuda", "cpu"] = flag("cuda", "cpu: to try the program where there is no GPU")
    out: Path | None = flag(None, "folder of gpu.jsonl, and of the records in runs/; default: nothing is kept")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, prompt_len=1, gen_len=2, prefill_len=1)
        if self.gpt_fast is not None and not (self.gpt_fast / "generate.py").is_file():
            raise RequestError(f"--gpt_fast {self.gpt_fast}: no generate.py there; give the folder of a checkout")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise RequestError("no CUDA device answers: launch/doctor.py tells why; --device cpu tries the program")


@dataclass
class Runs:
    """Runs each process once, and remembers what it answered: other parts may compare with it."""

    asked: RunFlags
    answers: dict[tuple[str, ...], dict[str, Any] | RunError] = field(default_factory=dict)

    @property
    def ceiling(self) -> dict[str, Any]:
        return self.side("ceiling")

    def ours(self, size: str, *, is_recorded: bool = False, **flags: Any) -> dict[str, Any]:
        """What launch/bench.py says of random weights in the shape of `size`; `flags` are its."""
        wanted = {"size": size, "prompt_len": self.asked.prompt_len, "gen_len": self.asked.gen_len}
        wanted |= {"dtype": "bf16", "device": self.asked.device} | flags
        words = [w for name, value in wanted.items() for w in flag_words(name, None if value is True else str(value))]
        record = ["--record", str(self.asked.out / "runs")] if is_recorded and self.asked.out is not None else []
        return self.answer(BENCH, ["--random_weights", *words], record)

    def side(self, kind: str, **wanted: Any) -> dict[str, Any]:
        """What gpu_side.py says."""
        return self.answer(HERE / "gpu_side.py", [kind, json.dumps({"device": self.asked.device} | wanted)])

    def peer(self, kind: str, size: str, **wanted: Any) -> dict[str, Any]:
        """What gpu_peers.py says, of the same prompt and number of tokens."""
        lengths = {"prompt_len": self.asked.prompt_len, "gen_len": self.asked.gen_len}
        told = {"device": self.asked.device, "size": size} | lengths | wanted
        return self.answer(HERE / "gpu_peers.py", [kind, json.dumps(told)])

    def answer(self, script: Path, words: list[str], unremembered: list[str] | None = None) -> dict[str, Any]:
        """`unremembered`: words that change nothing of the answer. What failed once fails again at once."""
        key = (script.name, *words)
        if key not in self.answers:
            try:
                self.answers[key] = last_line(script, [*words, *(unremembered or [])], self.asked.out)
            except RunError as error:
                self.answers[key] = error
        answer = self.answers[key]
        if isinstance(answer, RunError):
            raise answer
        return answer


def last_line(script: Path, words: list[str], folder: Path | None) -> dict[str, Any]:
    """The JSON that a script ends with. Raises RunError with what it said last where it fails, or takes too long.

    All that it said is then in errors.log of `folder`, and where it succeeds the last of it is shown: a figure without
    CUDA graphs, say, is another one."""
    named = f"{script.name} {shlex.join(words)}"
    code, answer, said = run_to_end(script, words)
    lines = [line for line in said.splitlines() if line.strip()]
    if folder is not None and lines:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "errors.log").open("a") as log:
            log.write(f"{named}\n{said}\n")
    if code is None:
        raise RunError(f"{named}: not done in {LIMIT_S} s")
    if code != 0:
        raise RunError(f"{named}: {lines[-1] if lines else code}")
    for line in lines[-MOST_LINES:]:
        say(f"{named}: {line}")
    return json.loads(answer.splitlines()[-1])


def run_to_end(script: Path, words: list[str]) -> tuple[int | None, str, str]:
    """Exit code, None where it took too long, and what was written to standard output and standard error."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([sys.executable, str(script), *words], stdout=output, stderr=errors)
        try:
            code = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            process.kill()
        output.seek(0), errors.seek(0)
        return code, output.read(), errors.read()
