"""A real SLURM on this machine: a controller and four nodes on loopback, each node with four pretended GPUs.

It needs root, and munged, slurmctld and slurmd (Debian: slurm-wlm and munge, built with multiple slurmd). All its
daemons are children of this process, all its files lie in one folder, and it listens on loopback alone.
"""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

from running import environment_of

NODES = [f"n{number}" for number in range(1, 5)]
CPUS, GPUS, MEMORY_MIB = 4, 4, 200_000  # of a node; the memory is a promise (config_overrides): nothing checks it
GRACE_S = 8  # between the signals of a preemption and its kill
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
INHERITED = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_")  # of a job that these tests may themselves be run in
PORTS = range(15_000, 30_000)  # below those that the kernel gives to outgoing connections

# cred_expire: how long a requeued job waits for its next start, 120 s by default. Node names resolve nowhere, so each
# node has its address here. Without preempt_send_user_signal a preempted job gets no --signal.
SLURM_CONF = """\
ClusterName=lab
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
MailProg=/bin/true
CommunicationParameters=NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
SlurmctldParameters=preempt_send_user_signal
EnforcePartLimits=ALL
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=5
CompleteWait=0
MinJobAge=3600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace_s} MaxTime=60 DefaultTime=10
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=60 DefaultTime=10
"""
# SLURM drops a count of devices without files, and refuses regular files.
GRES_CONF = "AutoDetect=off\nNodeName=n[1-4] Name=gpu File=/dev/null,/dev/zero,/dev/full,/dev/random\n"


def free_ports(count):
    """`count` neighbouring ports that are free now."""
    while True:
        first = random.randrange(PORTS.start, PORTS.stop - count)
        with contextlib.ExitStack() as opened, contextlib.suppress(OSError):
            for port in range(first, first + count):
                opened.enter_context(socket.socket()).bind(("", port))
            return list(range(first, first + count))


class SlurmCluster:
    """The cluster in a folder of its own. `env` is what a command needs to talk to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.conf = root / "etc" / "slurm.conf"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(INHERITED)}
        self.env = inherited | {"SLURM_CONF": str(self.conf)}
        self.daemons = {}

    def start(self):
        """Return when all nodes are idle: about a second."""
        self._write_files()
        munge = self.root / "munge"
        paths = [f"--{kind}={munge}/munge.{end}" for kind, end in (("key-file", "key"), ("socket", "sock"))]
        paths += [f"--pid-file={munge}/munge.pid", f"--log-file={munge}/munge.log", f"--seed-file={munge}/munge.seed"]
        self._spawn("munged", "munged", "--foreground", "--num-threads=4", *paths)
        self.until((munge / "munge.sock").exists, "munged's socket")
        self._spawn("slurmctld", "slurmctld", "-D", "-c", "-f", str(self.conf))
        for node in NODES:
            self.power_on(node)
        self.until(self.all_idle, "idle nodes")
        return self

    def stop(self) -> None:
        """End all jobs and all daemons; nothing of the cluster is left running."""
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired, AssertionError):
            self.cancel_all()
        for name in [*(name for name in self.daemons if name in NODES), "slurmctld", "munged"]:
            if daemon := self.daemons.pop(name, None):
                daemon.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    daemon.wait(3)
                daemon.kill()
                daemon.wait()
        kill(self.strays())

    def sh(self, command: str, *, cwd: Path | None = None, check: bool = True, timeout: float = 60) -> str:
        """The stdout of a shell command that talks to this cluster."""
        done = subprocess.run(
            command, shell=True, env=self.env, cwd=cwd, text=True, capture_output=True, timeout=timeout
        )
        if check and done.returncode:
            raise RuntimeError(f"{command}: code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def until(self, holds, what: str, timeout: float = 30) -> None:
        """Wait until `holds()`. Fails after `timeout` s, or when a daemon has ended."""
        end = time.monotonic() + timeout
        while not holds():
            for name, daemon in self.daemons.items():
                assert daemon.poll() is None, f"{name} ended with {daemon.returncode}; see {self.root}/log"
            assert time.monotonic() < end, f"no {what} in {timeout} s\n{self.shown()}"
            time.sleep(0.05)

    def shown(self) -> str:
        """Its nodes and jobs, once there is who tells of them."""
        return self.sh("sinfo -N; squeue", check=False) if "slurmctld" in self.daemons else ""

    def field(self, job: str, name: str) -> str:
        """One word of `scontrol show job`, such as JobState, Reason, Restarts, ExitCode."""
        shown = self.sh(f"scontrol show job -o {job}")
        return shown.split(f" {name}=", 1)[1].split()[0]

    def until_state(self, job: str, *states: str, timeout: float = 60) -> None:
        self.until(lambda: self.field(job, "JobState") in states, f"job {job} in {states}", timeout)

    def cancel_all(self) -> None:
        """End all jobs at once, and wait until their nodes are free."""
        self.sh("scancel --signal=KILL --full --user=root; scancel --user=root", timeout=10)
        self.until(lambda: not self.sh("squeue --noheader"), "empty queue")

    def set_down(self, node: str) -> None:
        """What an administrator does to a broken node: its jobs are ended or requeued at once. As its daemon lives, it
        comes back by itself after some seconds (ReturnToService=2)."""
        self.sh(f"scontrol update nodename={node} state=down reason=test")

    def set_up(self, node: str) -> None:
        """Let a node that is down or drained take jobs again."""
        self.sh(f"scontrol update nodename={node} state=resume", check=False)  # refused when it is up already
        self.until(lambda: not re.search("down|drain", self.sh(f"sinfo -hN -n {node} -o %T")), f"{node} up")

    def power_on(self, node: str) -> None:
        self._spawn(node, "slurmd", "-D", "-N", node, "-f", str(self.conf))

    def lose(self, node: str) -> None:
        """SLURM hears no more of the node, on which all goes on."""
        daemon = self.daemons.pop(node)
        daemon.kill()
        daemon.wait()

    def power_off(self, node: str) -> None:
        """Power loss: its daemon, its step daemons and all tasks die in the same moment."""
        self.lose(node)
        kill(self.strays(node))

    def all_idle(self) -> bool:
        return self.sh("sinfo -hNo %T -p main", check=False).split() == ["idle"] * len(NODES)

    def strays(self, node: str | None = None) -> set[int]:
        """Processes of jobs on this cluster (on `node`): tasks, known by their environment, and their slurmstepd."""
        conf, named = f"SLURM_CONF={self.conf}".encode(), f"SLURMD_NODENAME={node or ''}".encode()
        found = set()
        for process in Path("/proc").glob("[0-9]*"):
            environ = environment_of(process)
            if conf not in environ or not any(part == named if node else part.startswith(named) for part in environ):
                continue
            found.add(int(process.name))
            with contextlib.suppress(OSError):  # it has ended
                parent = process.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1]
                if Path(f"/proc/{parent}/cmdline").read_bytes().startswith(b"slurmstepd"):
                    found.add(int(parent))
        return found

    def _spawn(self, name: str, *command: str) -> None:
        """Start a daemon in the foreground, as a child: one that detaches itself would be nobody's to end."""
        with open(self.root / "log" / f"{name}.out", "ab") as log:
            self.daemons[name] = subprocess.Popen(
                command, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _write_files(self) -> None:
        for folder in ("etc", "munge", "state", "log", "run", *(f"spool/{node}" for node in NODES)):
            (self.root / folder).mkdir(parents=True)
        for folder in (self.root / "munge", self.root, *self.root.parents):
            if not folder.stat().st_mode & 0o001:  # munged demands that everybody can get at its socket
                folder.chmod(0o711)
        key = self.root / "munge" / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        controller, *ports = free_ports(1 + len(NODES))
        lines = [
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.{11 + index} Port={ports[index]} "
            f"CPUs={CPUS} RealMemory={MEMORY_MIB} Gres=gpu:{GPUS}"
            for index, node in enumerate(NODES)
        ]
        conf = SLURM_CONF.format(root=self.root, port=controller, nodes="\n".join(lines), grace_s=GRACE_S)
        self.conf.write_text(conf)
        self.conf.with_name("gres.conf").write_text(GRES_CONF)


def kill(processes) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
