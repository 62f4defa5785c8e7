"""Whether all ranks go on: each tells the others that it lives and how far it is, and no one waits for who does not.

A thread in every rank beats: it writes the rank's whereabouts to torchrun's store, and reads those of the others. The
rank's own thread may be deep in a collective that cannot be interrupted; so this thread ends the process where another
rank has been silent for --step_timeout. What it says names the rank, its host, the step and the collective.
"""

import contextlib
import json
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch.distributed as dist

from llama_mp import deaths, errors
from llama_mp.errors import INTERRUPTED, LAUNCHED, LostContact, RunError, counted

BEAT_S = 1.0
BACKSTOP_S = 2.0  # beyond the limit, in which the rank's own thread may say it better
NOTICED_S = 3.0  # a rank silent for so long is suspected once something else has failed
DYING_S = 0.5
MEETING_S = 30.0  # for ranks of a busy machine to connect with each other, however short --step_timeout is
START_S = 600.0  # for torch to be imported from a slow network disk
LEAVE_S, LEADER_LEAVES_S = 1.0, 5.0  # for a rank that is ended, to do what it has to do
TERMINATED = 128 + signal.SIGTERM


@dataclass(kw_only=True)
class Whereabouts:
    """How far a rank is. `collective`: how many there were; `waits_in`: the one that it is in; no step: it idles."""

    host: str = ""
    pid: int = 0
    born: str = ""
    beat: int = 0
    step: int = 0
    is_in_step: bool = False
    collective: int = 0
    waits_in: str = ""

    def __str__(self) -> str:
        place = (
            f"step {self.step}" if self.is_in_step else f"the wait after step {self.step}" if self.step else "set-up"
        )
        return f"{place}, {self.waits_in} {self.collective}" if self.waits_in else place


here = Whereabouts()  # of this process


@contextlib.contextmanager
def step() -> Iterator[None]:
    """Around what all ranks compute at once."""
    here.step += 1
    here.is_in_step = True
    yield
    here.is_in_step = False  # not after an error: where it came from is still to be told


@contextlib.contextmanager
def collective(name: str) -> Iterator[None]:
    here.collective += 1
    here.waits_in = name
    yield
    here.waits_in = ""


class Pulse(threading.Thread):
    """This rank's beats, and its ear for those of the others. Who waits in the `store` keeps all other threads of its
    process out, this one too: only the forming of groups does, until `meeting_is_over`."""

    def __init__(self, store: dist.Store, rank: int, size: int, limit_s: float) -> None:
        super().__init__(daemon=True)
        self.store, self.rank, self.size = store, rank, size
        self.step_timeout_s, self.limit_s = limit_s, max(limit_s, MEETING_S)
        self.others = [other for other in range(size) if other != rank]
        self.known: dict[int, Whereabouts] = {}
        self.heard_s, self.beaten_s = dict.fromkeys(self.others, time.monotonic()), time.monotonic()
        self.oom_kills = deaths.num_oom_kills()
        self.is_over = False
        self.wake, self.waker = os.pipe()
        self.num_interrupts = 0
        host, pid = deaths.own_host(), os.getpid()
        vars(here).update(vars(Whereabouts(host=host, pid=pid, born=deaths.born(pid))))
        errors.set_place(lambda: f"rank {rank} on {host}, in {here}")

    # ---- beating -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        with contextlib.suppress(dist.DistError):  # without the store torchrun is gone, and this rank with it
            while not self.is_over:
                self.beat()
                self.listen()
                if self.silent(self.limit_s + BACKSTOP_S):
                    self.give_up()
                self.answer(self.woken())

    def hear_signals(self) -> None:
        """Be told of signals at once, as the main thread is not while it waits in a collective. For ranks of torchrun,
        which sends them when another rank has ended, or somebody ends it."""
        os.set_blocking(self.waker, False)
        signal.set_wakeup_fd(self.waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, ignore)

    def woken(self) -> int:
        """Wait for the time of a beat, or until a signal comes: its number, else 0."""
        ready, _, _ = select.select([self.wake], [], [], min(BEAT_S, self.step_timeout_s / 5))
        return os.read(self.wake, 1)[0] if ready else 0

    def beat(self) -> None:
        if self.was_away():  # suspended, and the others with it: they are given their time anew
            self.heard_s = dict.fromkeys(self.others, time.monotonic())
        self.beaten_s = time.monotonic()
        here.beat += 1
        self.store.set(f"pulse/{self.rank}", json.dumps(asdict(here)))

    def listen(self) -> None:
        heard = {other for other, at in self.known.items() if at.beat}
        there = [other for other in self.others if other in heard or self.store.check([f"pulse/{other}"])]
        said = self.store.multi_get([f"pulse/{other}" for other in there]) if there else []
        for other, told in zip(there, said, strict=True):
            found = Whereabouts(**json.loads(told))
            if other not in self.known or found.beat != self.known[other].beat:
                self.heard_s[other] = time.monotonic()
            self.known[other] = found

    def meeting_is_over(self) -> None:
        """From here on a rank is silent after the step timeout."""
        self.heard_s = dict.fromkeys(self.others, time.monotonic())
        self.limit_s = self.step_timeout_s

    def stop(self) -> None:
        self.is_over = True
        os.write(self.waker, b"\0")
        self.join()
        if signal.getsignal(signal.SIGTERM) is ignore:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.close(self.wake)
        os.close(self.waker)

    def meet(self, all_known: list[list]) -> None:
        """Know every rank's host and process, from before the first beat that is heard of it."""
        for other in self.others:
            host, pid, when_born = all_known[other]
            self.known.setdefault(other, Whereabouts(host=host, pid=pid, born=when_born))
            self.heard_s[other] = time.monotonic()

    # ---- judging -------------------------------------------------------------------------------------------------

    def was_away(self) -> bool:
        """Whether this rank itself did not beat for a while, so that it cannot tell of others."""
        return time.monotonic() - self.beaten_s > NOTICED_S

    def silent(self, limit_s: float) -> list[int]:
        """Ranks that have not been heard for so long. One that has never been is still starting, and has more time."""
        if self.was_away():
            return []
        now = time.monotonic()
        return [
            other
            for other, heard_s in self.heard_s.items()
            if now - heard_s > (limit_s if other in self.known else max(limit_s, START_S))
        ]

    def check(self) -> None:
        """Raise LostContact when another rank is silent: for who waits for it with its own thread."""
        if self.silent(self.limit_s):
            raise self.lost()

    def gone(self) -> list[int]:
        """Ranks of this host whose process has ended."""
        return [
            other for other in self.on_this_host() if not deaths.is_here(self.known[other].pid, self.known[other].born)
        ]

    def on_this_host(self) -> list[int]:
        return [other for other in self.others if other in self.known and self.known[other].host == here.host]

    def verdict(self, *, for_gpu: bool = False) -> tuple[str, bool]:
        """What is known of the ranks because of which this one does not get on, and whether that is the first cause.
        `for_gpu`: it waits for its GPU, whose sums may be in a graph, where none is counted."""
        if gone := self.gone():
            return f"{self.named(gone)} died in {here}{self.of_memory()}", False
        if silent := self.silent(self.suspicious_s):
            why = {deaths.why_still(self.known[other].pid) for other in silent if other in self.on_this_host()}
            return (
                f"{self.named(silent)} did not answer for {self.silence_s(silent):.0f} s in {here} (--step_timeout "
                f"{self.limit_s:g}){': ' if why else ''}{', '.join(sorted(why))}"
            ), True
        in_time = f"in --step_timeout, {self.limit_s:g} s"
        behind = [other for other, at in self.known.items() if here.waits_in and at.collective < here.collective]
        if behind:
            return f"{self.named(behind)} did not come to {here} {in_time}: it hangs, or computes for longer", True
        if for_gpu:
            late = [other for other, at in self.known.items() if at.step < here.step]
            who = f"{self.named(late)} did not come to" if late else "the GPUs did not finish"
            return f"{who} step {here.step} {in_time}: one hangs, or computes for longer; see nvidia-smi", True
        return (
            f"rank {self.rank} on {here.host} lost contact with the others in {here}; the first failure says why",
            False,
        )

    @property
    def suspicious_s(self) -> float:
        return min(NOTICED_S, self.limit_s)

    def named(self, ranks: list[int]) -> str:
        return " and ".join(f"rank {rank} on {self.known[rank].host}" for rank in ranks if rank in self.known)

    def silence_s(self, ranks: list[int]) -> float:
        return max(time.monotonic() - self.heard_s[rank] for rank in ranks)

    def of_memory(self) -> str:
        killed = deaths.num_oom_kills() - self.oom_kills
        if not killed:
            return ": it was killed, or ended by an error of its own; see the output above, and the kernel's log"
        return (
            f": the kernel killed {counted(killed, 'process')} because memory ran out; start more ranks, or lower "
            "--max_batch_size, --max_seq_len"
        )

    # ---- ending --------------------------------------------------------------------------------------------------

    def lost(self, *, for_gpu: bool = False) -> RunError:
        """The error of this rank, which does not get on because of another one: LostContact where that one has ended,
        and the first failure is its own. Silent ranks of this host are ended: torchrun would wait half a minute for one
        that is stopped."""
        deadline = time.monotonic() + DYING_S  # a process closes its connections before it is gone
        while not self.gone() and not self.silent(self.suspicious_s) and time.monotonic() < deadline:
            time.sleep(0.02)
        verdict, is_first = self.verdict(for_gpu=for_gpu)
        errors.may_speak()  # before any is ended: for others it would then be one that died
        for other in set(self.silent(self.suspicious_s)) & set(self.on_this_host()):
            deaths.end(self.known[other].pid, self.known[other].born, signal.SIGKILL)
        return RunError(verdict) if is_first else LostContact(verdict)

    def give_up(self) -> None:
        """End this process, whose own thread waits for what will not come."""
        code = errors.report(self.lost())
        os._exit(code)

    def answer(self, number: int) -> None:
        """A signal has come, or 0: none."""
        if number == signal.SIGTERM:
            self.leave()
        if number == signal.SIGINT:
            self.num_interrupts += 1
            if self.num_interrupts > 1:
                os._exit(INTERRUPTED)
            seconds = LEAVE_S if self.rank else LEADER_LEAVES_S  # rank 0 keeps what is done
            threading.Thread(target=exit_after, args=(seconds, INTERRUPTED), daemon=True).start()

    def leave(self) -> None:
        """torchrun ends this rank: because another one has ended, of which there may be something to say, or because it
        is itself told to."""
        if LAUNCHED not in os.environ:  # else the launcher says it
            time.sleep(LEAVE_S / 2)  # the main thread may be about to
            if self.gone() and errors.may_speak():
                errors.say(self.verdict()[0], "error")
        if signal.getsignal(signal.SIGTERM) is not ignore:
            time.sleep(LEAVE_S)  # a terminal is to be put right
        os._exit(TERMINATED)


def exit_after(seconds: float, code: int) -> None:
    time.sleep(seconds)
    os._exit(code)


def ignore(number: int, frame: object) -> None:
    """The pulse hears the signal as well, at once, and acts on it."""
