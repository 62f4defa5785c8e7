"""The site file: what is the same for every job of a cluster, written once."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llama_mp.errors import RequestError
from llama_mp.flags import check_at_least, checked
from llama_mp.gpus import Gpu, card_of, find_gpu

SITE_FILE = Path("~/.config/llama_mp/slurm.toml")


@dataclass(frozen=True, kw_only=True)
class Site:
    """A cluster, as its site file describes it; nothing is known of one without."""

    partition: str | None = None
    account: str | None = None
    gpu: str | None = None  # a card that the plan knows by name
    vram_gib: float | None = None  # of any other
    gpus_per_node: int | None = None  # the limits of a node
    cpus_per_node: int | None = None
    mem_gib_per_node: float | None = None
    gpu_flag: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    interface: str | None = None  # the network between nodes, as `ip link` calls it
    python: str | None = None
    setup: tuple[str, ...] = ()  # lines of bash that come before
    options: tuple[str, ...] = ()  # of sbatch

    @property
    def card(self) -> Gpu | None:
        return card_of(self.gpu, self.vram_gib)


def read_site(path: Path | None) -> Site:
    """The site file at `path`, by default the user's own, where there is one. Raises RequestError for what is wrong in
    it, with the file's name and the key's."""
    file = path or SITE_FILE.expanduser()
    if path is None and not file.exists():
        return Site()
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"site file {file} cannot be read: {error.strerror}; check --cluster") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise RequestError(f"site file {file} is not TOML: {error}") from error
    try:
        site = Site(**checked(Site, values))
        check(site)
    except RequestError as error:
        raise RequestError(f"site file {file}: {str(error).replace('--', '', 1)}") from error
    return site


def check(site: Site) -> None:
    """Raise RequestError for values that no cluster has."""
    if site.gpu is not None and site.vram_gib is not None:
        raise RequestError("gpu and vram_gib are both there: drop one")
    check_at_least(site, gpus_per_node=1, cpus_per_node=1, mem_gib_per_node=1, vram_gib=1)
    if site.gpu is not None:
        find_gpu(site.gpu)  # raises for one that is not known
