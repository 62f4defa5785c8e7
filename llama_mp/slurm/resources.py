"""What a job needs: nodes, GPUs, cores, main memory and time, from the plan unless they were given."""

import math
from dataclasses import dataclass
from typing import NoReturn

from llama_mp.advice import Device, tokens_per_s
from llama_mp.errors import RequestError, counted
from llama_mp.fit import as_flags
from llama_mp.gpus import Gpu, card_of
from llama_mp.memory import check_layout, host_bytes
from llama_mp.plan import Plan
from llama_mp.slurm.flags import ClusterConfig, ModelJobFlags, ReshardJobFlags
from llama_mp.slurm.site import Site
from llama_mp.slurm.work import Work
from llama_mp.virtual import degrees

GB, GIB, MIB = 1e9, 2**30, 2**20
USUAL_GPUS = 8  # of a node, where nothing says how many
USUAL_CPUS, MOST_CPUS = 4, 8  # for a rank: where nothing says how many a node has, and at most
HOST_MARGIN = 1.1
# Of `launch/reshard.py`: torch, the tokenizer and the chunks in flight take half of it at most.
RESHARD_BYTES = 2 * GIB
STORAGE_BYTES_PER_S = 0.2e9  # a share of a busy network file system
CARD_BYTES_PER_S = 1e12  # of a card whose bandwidth is not known
CPU_BYTES_PER_S = 1e10  # of a rank: a few cores' share of the memory's
SPEED = 0.5  # of what the bandwidth allows
TIME_MARGIN, TIME_STEP_S = 2, 600


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Of each node, but for the number of nodes and the time."""

    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    cpus_per_node: int
    mem_mib: int
    time_s: int


@dataclass(frozen=True, kw_only=True)
class Demand:
    """The flags of a job that runs a model, the site, and the work, where it is known."""

    flags: ModelJobFlags
    site: Site
    work: Work | None

    @property
    def on_cpu(self) -> bool:
        return self.flags.device == "cpu"

    @property
    def card(self) -> Gpu | None:
        if self.on_cpu:
            return None
        return card_of(self.flags.gpu, self.flags.vram_gib) or self.site.card

    def resources(self) -> Resources:
        """Raises RequestError for what does not fit, what leaves GPUs idle, and what is above the site's limits."""
        flags = self.flags
        if flags.mp is not None and flags.mp < 1:
            raise RequestError(f"--mp is {flags.mp}, but must be at least 1")
        if self.work is None:
            self.check_all_given()
        nodes, ranks = self.spread()
        if self.work is not None:
            check_layout(self.work.config, nodes * ranks, flags.quant, flags.deterministic)
            self.check_fits(nodes * ranks)
        return Resources(
            nodes=nodes,
            ranks_per_node=ranks,
            gpus_per_node=0 if self.on_cpu else ranks,
            cpus_per_node=cpus(flags, self.site, ranks),
            mem_mib=memory(flags, self.site, self.host_bytes(nodes, ranks), is_exact=self.on_cpu and not flags.force),
            time_s=flags.time_s or self.seconds(nodes * ranks),
        )

    def check_all_given(self) -> None:
        """Raise RequestError unless the flags say what a plan would, if there were a checkpoint to plan for."""
        shape = ("mp",) if self.on_cpu else ("nodes", "gpus_per_node")
        missing = [f"--{name}" for name in (*shape, "mem_gib", "time") if getattr(self.flags, name) is None]
        if missing:
            raise RequestError(
                f"no checkpoint at {self.flags.ckpt_dir} yet, so nothing can be planned: give --size, "
                f"or {', '.join(missing)}"
            )

    # ---- ranks and nodes ---------------------------------------------------------------------------------------

    @property
    def most_per_node(self) -> int:
        """Ranks that a node takes."""
        if self.on_cpu:
            return self.flags.mp or 1
        return self.flags.gpus_per_node or self.site.gpus_per_node or USUAL_GPUS

    def spread(self) -> tuple[int, int]:
        """Nodes, and ranks on each: as given, or the fewest that fit the card; without a card as many as the checkpoint
        has shards."""
        flags, limit = self.flags, self.site.gpus_per_node
        if limit is not None and (flags.gpus_per_node or 0) > limit:
            raise RequestError(f"--gpus_per_node is {flags.gpus_per_node}, and a node has {limit} (site file)")
        ranks = flags.mp or (1 if self.on_cpu else None)
        if ranks is None and flags.nodes and flags.gpus_per_node:
            ranks = flags.nodes * flags.gpus_per_node
        if ranks is None:
            ranks = self.fewest()
        return self.spread_of(ranks) or self.refuse_spread(ranks)

    def spread_of(self, ranks: int) -> tuple[int, int] | None:
        """Nodes, and ranks on each, if all nodes have as many and none is idle."""
        nodes = self.flags.nodes or -(-ranks // self.most_per_node)
        per_node, left = divmod(ranks, nodes)
        is_as_given = self.on_cpu or self.flags.gpus_per_node in (None, per_node)
        return (nodes, per_node) if left == 0 and per_node <= self.most_per_node and is_as_given else None

    def refuse_spread(self, ranks: int) -> NoReturn:
        nodes = self.flags.nodes or -(-ranks // self.most_per_node)
        per_node = self.flags.gpus_per_node or -(-ranks // nodes)
        total = nodes * per_node
        if self.on_cpu:
            raise RequestError(f"{counted(ranks, 'rank')} over {nodes} nodes: give --mp {total}, as many for each")
        if per_node > self.most_per_node:
            raise RequestError(
                f"--mp {ranks} over {counted(nodes, 'node')} takes {per_node} GPUs of a node, and one has "
                f"{self.most_per_node}: give more --nodes, or --gpus_per_node where yours have more"
            )
        there = f"{counted(nodes, 'node')} with {counted(per_node, 'GPU')}"
        if total < ranks:
            raise RequestError(f"--mp {ranks} on {there} each: give --mp {total}, or more of them")
        raise RequestError(
            f"--mp {ranks} on {there} each: {counted(total - ranks, 'GPU')} would be idle; give --mp {total}, or other "
            "--nodes and --gpus_per_node"
        )

    def fewest(self) -> int:
        """The smallest number of ranks that the nodes can be given, and that fits. Raises RequestError for none."""
        config, shards = self.work.config, self.work.num_files or self.work.config.native_mp
        possible = [ranks for ranks in degrees(config, self.flags.deterministic) if self.spread_of(ranks)]
        for ranks in possible:
            if ranks >= shards if self.card is None else self.fits(ranks):
                return ranks
        if not possible or self.card is None or self.work.force:
            raise RequestError(
                f"no number of ranks up to {config.num_heads}, the heads of {config.name}, suits: give --mp"
            )
        on_one_node = [ranks for ranks in possible if ranks <= self.most_per_node]
        raise self.does_not_fit(max(on_one_node or possible[:1]))

    # ---- memory ------------------------------------------------------------------------------------------------

    def plan(self, ranks: int) -> Plan:
        work = self.work
        return Plan(
            config=work.config,
            mp=ranks,
            workload=work.workload,
            card=self.card,
            checkpoint_bytes=work.checkpoint_bytes,
        )

    def fits(self, ranks: int) -> bool:
        return self.plan(ranks).fits

    def check_fits(self, ranks: int) -> None:
        card, workload = self.card, self.work.workload
        if card is not None and workload.dtype == "bf16" and not card.has_bf16:
            raise RequestError(f"--dtype bf16, but {card.name} computes no bf16: use --dtype fp16")
        if card is not None and not self.work.force and not self.fits(ranks):
            raise self.does_not_fit(ranks)

    def does_not_fit(self, ranks: int) -> RequestError:
        plan = self.plan(ranks)
        workload = plan.workload
        ways = " or ".join(as_flags(option) for option in plan.advice[:2])
        remedy = f"give {ways}, or --force to try" if ways else "give a larger card, or --force to try"
        return RequestError(
            f"{plan.config.name} over {counted(ranks, 'rank')} in {workload.dtype} does not fit: one needs "
            f"{plan.per_rank.total_bytes / GB:.2f} GB with {workload.batch_size} x {workload.seq_len} tokens of cache, "
            f"and {plan.card.name} has {plan.card.usable_bytes / GB:.2f} GB; {remedy}"
        )

    def host_bytes(self, nodes: int, ranks: int) -> int | None:
        """Main memory of the ranks of a node."""
        if self.work is None:
            return None
        total = nodes * ranks
        return host_bytes(self.work.config, total, self.plan(total).settled) * ranks // total

    # ---- time --------------------------------------------------------------------------------------------------

    def seconds(self, ranks: int) -> int:
        """Twice (checkpoint bytes / 0.2 GB/s + tokens / (half of the tokens/s that the bandwidth allows))."""
        plan, card = self.plan(ranks), self.card
        rate = CPU_BYTES_PER_S if self.on_cpu else CARD_BYTES_PER_S
        if card is not None:
            rate = card.bandwidth_bytes_per_s or rate
        speed = tokens_per_s(plan.config, ranks, plan.settled, Device(0, rate))
        return rounded_up(self.work.checkpoint_bytes / STORAGE_BYTES_PER_S + self.work.tokens / (speed * SPEED))


def reshard_resources(flags: ReshardJobFlags, site: Site, num_bytes: int | None) -> Resources:
    """One node, no GPU. `num_bytes`: to read and to write; None where the input is not there yet."""
    if num_bytes is None and flags.time is None:
        raise RequestError(f"no checkpoint at {flags.input} yet, so nothing can be planned: give --time")
    return Resources(
        nodes=1,
        ranks_per_node=1,
        gpus_per_node=0,
        cpus_per_node=cpus(flags, site, 1, usual=MOST_CPUS),
        mem_mib=memory(flags, site, RESHARD_BYTES, is_exact=False),
        time_s=flags.time_s or rounded_up(num_bytes / STORAGE_BYTES_PER_S),
    )


def rounded_up(seconds: float) -> int:
    """With its margin, in whole steps."""
    return math.ceil(TIME_MARGIN * seconds / TIME_STEP_S) * TIME_STEP_S or TIME_STEP_S


def cpus(flags: ClusterConfig, site: Site, ranks: int, usual: int = USUAL_CPUS) -> int:
    """Cores of a node for its `ranks`. Raises RequestError for more than there are."""
    there = site.cpus_per_node
    share = usual if there is None else max(1, min(MOST_CPUS, there // ranks))
    wanted = flags.cpus_per_node or ranks * share
    if there is not None and wanted > there:
        raise RequestError(f"{wanted} CPUs for {counted(ranks, 'rank')} of a node, and it has {there} (site file)")
    return wanted


def memory(flags: ClusterConfig, site: Site, needed_bytes: int | None, *, is_exact: bool) -> int:
    """MiB of a node. Raises RequestError for more than there are, and for less than is needed, if that `is_exact`."""
    planned = 0 if needed_bytes is None else math.ceil(needed_bytes * HOST_MARGIN / MIB)
    wanted = planned if flags.mem_gib is None else math.ceil(flags.mem_gib * GIB / MIB)
    there = site.mem_gib_per_node
    if there is not None and wanted * MIB > there * GIB:
        raise RequestError(
            f"{wanted * MIB / GIB:.1f} GiB of main memory for a node, and it has {there:g} (site file): "
            "give more --nodes, or less --mem_gib"
        )
    if is_exact and needed_bytes is not None and wanted * MIB < needed_bytes:
        raise RequestError(
            f"--mem_gib {flags.mem_gib:g}, but the ranks of a node need {needed_bytes / GIB:.2f} GiB of main memory: "
            f"give --mem_gib {planned / 1024:.1f}, or --force to try"
        )
    return wanted
