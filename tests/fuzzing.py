"""Cases of the fuzz test: a specimen copied, damaged by a seed, and read by all that reads such files.

The processes in which that is done have little memory, and their deeds are watched."""

import gc
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from mutations import damage
from ranks import SERVER

from llama_mp.chat_format import render_chat
from llama_mp.checkpoint.load import load_shard, open_source
from llama_mp.checkpoint.verify import VerifyFlags, verify
from llama_mp.config import SamplingConfig
from llama_mp.errors import RequestError, RunError, one_line
from llama_mp.headers import whole_config
from llama_mp.layout import shards
from llama_mp.locate import checkpoint_at
from llama_mp.prompts import read_prompts_file
from llama_mp.tokenizer_export import tokenizer_folder
from llama_mp.tokenizer_files import read_tokenizer

MEMORY_BYTES = 1 << 30  # beside what the imported libraries take
CASE_TIMEOUT_S = 60
MAX_LINE = 4500
# What no reader does: the names that Python gives to such deeds.
DEEDS = {
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.chmod",
    "subprocess.Popen", "socket.connect", "pty.spawn", "pickle.find_class", "ctypes.dlopen",
}  # fmt: skip
_watch: list[str] | None = None  # what was done in the current case; None: not watched


class Outcome(NamedTuple):
    """What became of one case. `fault`: empty where all is well; `said`: the one line, empty for what was loaded."""

    seed: int
    specimen: str
    said: str
    fault: str
    seconds: float


def watched(event: str, arguments: tuple[Any, ...]) -> None:
    if _watch is not None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in DEEDS or writes:
            _watch.append(f"{event}{arguments}"[:200])


# ---- reading ---------------------------------------------------------------------------------------------------


def read_checkpoint(folder: Path, rng: random.Random) -> None:
    """All that is read of a checkpoint, the values of one rank of two among it."""
    verify(VerifyFlags(path=folder)).as_json  # noqa: B018
    checkpoint = checkpoint_at(folder)
    whole_config(checkpoint)
    source = open_source(checkpoint)
    held = sum(source.dtype(name).itemsize * count(source.shape(name)) for name in source.names())
    size = sum(file.stat().st_size for file in checkpoint.files)
    assert held <= size * 4, f"{held} bytes of tensors from files of {size}"  # Q8_0 counted as fp32
    if source.config.num_heads < 2:
        return
    import torch

    for shard in shards(source.config, rng.randrange(2), 2).values():
        load_shard(shard, source, dtype=torch.float32, device=torch.device("cpu"))
    if checkpoint.kind == "gguf":
        read_texts(folder, checkpoint.files[0], rng)


def count(shape: Sequence[int]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total


def read_tokens(folder: Path, rng: random.Random) -> None:
    names = ("tokenizer.model", "tokenizer.json")
    path = next((folder / name for name in names if os.path.lexists(folder / name)), folder / names[0])
    read_texts(folder, path, rng)


def read_texts(folder: Path, path: Path, rng: random.Random) -> None:
    tokenizer, template = read_tokenizer(path, folder)
    ids = tokenizer.encode("hello  hell\u00e9 <tool></s> 12345 \U0001f916\n\u0301", bos=tokenizer.bos_id is not None)
    assert all(0 <= i < tokenizer.vocab_size for i in ids), f"ids {ids} of {tokenizer.vocab_size} tokens"
    tokenizer.decode(range(tokenizer.vocab_size))
    if rng.random() < 0.3:
        tokenizer_folder(path, folder, hugging_face=True)
    if template:
        render_chat(template, [{"role": "user", "content": "hello"}], tokenizer)


def read_prompts(folder: Path, rng: random.Random) -> None:
    read_prompts_file(folder / "prompts.jsonl", SamplingConfig())


def misdeed(folder: Path, rng: random.Random) -> None:
    """What a reader must not do, which the folder's name says: are we seen?"""
    deed = (folder / "deed").read_text().split()[1]
    {
        "abort": os.abort,
        "exit": lambda: os._exit(3),
        "hang": lambda: time.sleep(1000),
        "allocate": lambda: bytearray(2 * MEMORY_BYTES),
        "mkdir": lambda: os.mkdir(folder.parent / "canary"),
        "write": lambda: (folder / "file").write_text(""),
        "raise": lambda: 1 / 0,
        "panic": lambda: signal.raise_signal(signal.SIGINT),
        "print": lambda: os.write(2, b"panicked"),
        "unexpected": lambda: raise_(RequestError("unexpected KeyError")),
        "refuse": lambda: raise_(RequestError("all is well")),
    }[deed]()


def raise_(error: Exception) -> None:
    raise error


READERS = {"checkpoint": read_checkpoint, "tokenizer": read_tokens, "prompts": read_prompts, "misdeed": misdeed}


def damaged_copy(specimen: Path, folder: Path, rng: random.Random, canary: Path) -> None:
    """`folder` with the files of the `specimen`, one or two of them damaged."""
    shutil.copytree(specimen, folder)
    files = sorted(folder.iterdir())
    if not files:
        (folder / "deed").write_text(specimen.name)
        return
    chosen = [rng.choice(files) for _ in range(rng.choice((1, 1, 1, 2)))]
    for file in dict.fromkeys(chosen):
        if file.is_file():  # the one before it may have taken its name
            damage(file, rng, canary)
    if "checklist" in specimen.name:  # an honest digest of a terabyte takes its time
        for file in folder.iterdir():
            if file.is_file() and not file.is_symlink() and file.stat().st_size >= MEMORY_BYTES:
                os.truncate(file, 1 << 20)


def run_case(seed: int, specimens: Path, names: Sequence[str], place: Path) -> Outcome:
    global _watch
    rng = random.Random(seed)
    specimen = names[seed % len(names)]
    folder, canary = place / "specimen", place / "canary"
    shutil.rmtree(place)
    place.mkdir()
    damaged_copy(specimens / specimen, folder, rng, canary)
    start = time.monotonic()
    said = fault = ""
    _watch = deeds = []
    try:
        READERS[specimen.split()[0]](folder, rng)
    except (RequestError, RunError) as error:
        said = one_line(error)
    except OSError as error:
        said = one_line(error)
        fault = "" if error.filename is not None else f"{type(error).__name__}: {error}"
    except BaseException as error:  # what Rust calls a panic is no Exception
        fault = "".join(traceback_lines(error))
    _watch = None
    if said.startswith("unexpected ") or not said.isprintable() or len(said) > MAX_LINE:
        fault = fault or f"not a clear line: {said[:300]!r}"
    if canary.exists() or deeds:
        fault = f"code was run: {deeds}"
    printed = os.fstat(2).st_size
    if printed:
        fault = fault or f"printed: {os.pread(2, 500, 0)!r}"
        os.ftruncate(2, 0)
        os.lseek(2, 0, os.SEEK_SET)
    return Outcome(seed, specimen, said, fault, time.monotonic() - start)


def traceback_lines(error: BaseException) -> list[str]:
    import traceback

    return traceback.format_exception(error, limit=-6)


# ---- processes -------------------------------------------------------------------------------------------------


def serve(connection: Connection, seeds: Sequence[int], specimens: Path, names: Sequence[str], place: Path) -> None:
    """Run the cases of `seeds`, sending the outcome of each. Memory for more than MEMORY_BYTES is not to be had."""
    place.mkdir(exist_ok=True)
    printed = os.memfd_create("printed")
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.environ["RAYON_NUM_THREADS"] = os.environ["TOKENIZERS_PARALLELISM"] = "1"
    sys.addaudithook(watched)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number, seed in enumerate(seeds):
        connection.send(run_case(seed, specimens, names, place))
        if number % 20 == 19:
            gc.collect()
    connection.send(None)


class Worker:
    """A process that runs cases, and another one in its place where a case ends it."""

    def __init__(self, seeds: Sequence[int], specimens: Path, names: Sequence[str], place: Path) -> None:
        self.seeds, self.arguments = list(seeds), (specimens, names, place)
        self.start()

    def start(self) -> None:
        self.connection, theirs = SERVER.Pipe()
        self.process = SERVER.Process(target=serve, args=(theirs, self.seeds, *self.arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.since = time.monotonic()

    def outcome(self) -> Outcome | None:
        """The next one, which is there, or is overdue; None after the last."""
        try:
            found = self.connection.recv() if self.connection.poll() else "it hangs"
        except EOFError:
            self.process.join()
            found = f"the process ended, code {self.process.exitcode}"
        if found is None:
            self.process.join()
        elif isinstance(found, str):
            self.process.kill()
            self.process.join()
            names = self.arguments[1]
            found = Outcome(self.seeds[0], names[self.seeds[0] % len(names)], "", found, time.monotonic() - self.since)
            del self.seeds[0]
            self.start()
        else:
            del self.seeds[0]
        self.since = time.monotonic()
        return found


def outcomes(
    seeds: Sequence[int],
    specimens: Path,
    names: Sequence[str],
    place: Path,
    num_workers: int = 2,
    timeout_s: float = CASE_TIMEOUT_S,
) -> Iterator[Outcome]:
    """Of all cases, in the order in which they end."""
    place.mkdir(exist_ok=True)
    workers = [Worker(seeds[n::num_workers], specimens, names, place / str(n)) for n in range(num_workers)]
    try:
        while workers:
            ready = wait([worker.connection for worker in workers], 1)
            late = [w for w in workers if time.monotonic() - w.since > timeout_s]
            for worker in {w for w in workers if w.connection in ready} | set(late):
                found = worker.outcome()
                if found is None:
                    workers.remove(worker)
                else:
                    yield found
    finally:
        for worker in workers:
            worker.process.kill()
