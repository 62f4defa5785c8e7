"""The cards that a plan knows by name: how much memory they have and how fast they read it."""

import difflib
import re
import shutil
import subprocess
from dataclasses import dataclass

from llama_mp.errors import RequestError

MIB, GIB = 2**20, 2**30
GB = 10**9
# Of what nvidia-smi shows as memory.total the driver keeps this share or a little less: torch finds 24217 of 24564 MiB
# on an RTX 4090.
RESERVED = 0.015
NVIDIA_SMI = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]


@dataclass(frozen=True)
class Gpu:
    """A card. `memory_bytes`: memory.total of nvidia-smi, error correction as shipped; bandwidth as NVIDIA states."""

    name: str
    memory_bytes: int
    bandwidth_bytes_per_s: float | None  # None: a card that the table does not know
    has_bf16: bool
    source: str

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_bytes * (1 - RESERVED))

    @property
    def has_kernels(self) -> bool:
        """Whether it runs kernels of our own: those, too, are for compute capability 8.0 and later."""
        return self.has_bf16


def series(source: str, has_bf16: bool, cards: str) -> list[Gpu]:
    """A line of `cards` for each: name; memory in MiB; bandwidth in GB/s (GB = 1e9 bytes)."""
    rows = [[part.strip() for part in line.split(";")] for line in cards.strip().splitlines()]
    return [Gpu(name, int(mib) * MIB, int(rate) * GB, has_bf16, source) for name, mib, rate in rows]


# bf16: compute capability 8.0 (Ampere) and later.
GPUS = [
    *series(
        "NVIDIA GeForce GTX 10 series, specifications on nvidia.com (Pascal)",
        False,
        """
        GTX 1060 6GB;     6144;   192
        GTX 1070;         8192;   256
        GTX 1080;         8192;   320
        GTX 1080 Ti;     11264;   484
        """,
    ),
    *series(
        "NVIDIA GeForce GTX 16 and RTX 20 series, specifications on nvidia.com (Turing)",
        False,
        """
        GTX 1660 Ti;      6144;   288
        RTX 2060;         6144;   336
        RTX 2070;         8192;   448
        RTX 2080;         8192;   448
        RTX 2080 Ti;     11264;   616
        TITAN RTX;       24576;   672
        """,
    ),
    *series(
        "NVIDIA GeForce RTX 30 series, specifications on nvidia.com (Ampere)",
        True,
        """
        RTX 3060;        12288;   360
        RTX 3070;         8192;   448
        RTX 3080;        10240;   760
        RTX 3080 Ti;     12288;   912
        RTX 3090;        24576;   936
        RTX 3090 Ti;     24564;  1008
        """,
    ),
    *series(
        "NVIDIA GeForce RTX 40 series, specifications on nvidia.com (Ada Lovelace)",
        True,
        """
        RTX 4060;         8188;   272
        RTX 4060 Ti 16GB; 16380;  288
        RTX 4070;        12282;   504
        RTX 4070 Ti SUPER; 16376; 672
        RTX 4080;        16376;   717
        RTX 4090;        24564;  1008
        """,
    ),
    *series(
        "NVIDIA GeForce RTX 50 series, specifications on nvidia.com (Blackwell)",
        True,
        """
        RTX 5060 Ti 16GB; 16311;  448
        RTX 5070;        12227;   672
        RTX 5070 Ti;     16303;   896
        RTX 5080;        16303;   960
        RTX 5090;        32607;  1792
        """,
    ),
    *series(
        "NVIDIA Quadro RTX datasheets (Turing)",
        False,
        """
        Quadro RTX 6000; 24576;   672
        Quadro RTX 8000; 49152;   672
        """,
    ),
    *series(
        "NVIDIA RTX A2000, A4000, A5000, A6000, RTX 4000 and 6000 Ada, RTX PRO 6000 datasheets",
        True,
        """
        RTX A2000 12GB;  12282;   288
        RTX A4000;       16376;   448
        RTX A5000;       24564;   768
        RTX A6000;       49140;   768
        RTX 4000 Ada;    20475;   360
        RTX 6000 Ada;    49140;   960
        RTX PRO 6000 Blackwell; 97887; 1792
        """,
    ),
    *series(
        "NVIDIA Tesla P40, P100, V100 and T4 datasheets (Pascal, Volta, Turing)",
        False,
        """
        Tesla P40;       23040;   346
        Tesla P100 16GB; 16384;   732
        Tesla V100 16GB; 16384;   900
        Tesla V100 32GB; 32768;   900
        Tesla T4;        15360;   320
        """,
    ),
    *series(
        "NVIDIA A10, A30, A40, A100, L4 and L40S datasheets (Ampere, Ada Lovelace)",
        True,
        """
        A10;             23028;   600
        A30;             24576;   933
        A40;             46068;   696
        L4;              23034;   300
        L40S;            46068;   864
        A100 40GB;       40960;  1555
        A100 80GB PCIe;  81920;  1935
        A100 80GB SXM;   81920;  2039
        """,
    ),
    *series(
        "NVIDIA H100, H200, GH200 and B200 datasheets (Hopper, Blackwell)",
        True,
        """
        H100 PCIe;       81559;  2000
        H100 SXM;        81559;  3350
        H200;           143771;  4800
        GH200 96GB;      97871;  4000
        B200;           183359;  8000
        """,
    ),
]
# What drivers call a card, and what people leave out, beside its name above.
ALIASES = {
    "A100": "A100 40GB",
    "A100-PCIE-40GB": "A100 40GB",
    "A100-SXM4-40GB": "A100 40GB",
    "A100-SXM4-80GB": "A100 80GB SXM",
    "A100 80GB": "A100 80GB SXM",
    "H100": "H100 SXM",
    "H100 80GB": "H100 SXM",
    "H100 80GB HBM3": "H100 SXM",
    "GH200 480GB": "GH200 96GB",
    "V100": "Tesla V100 16GB",
    "V100-SXM2-16GB": "Tesla V100 16GB",
    "V100-SXM2-32GB": "Tesla V100 32GB",
    "V100-PCIE-16GB": "Tesla V100 16GB",
    "V100-PCIE-32GB": "Tesla V100 32GB",
    "P100": "Tesla P100 16GB",
    "P100-PCIE-16GB": "Tesla P100 16GB",
    "RTX 4000 Ada Generation": "RTX 4000 Ada",
    "RTX 6000 Ada Generation": "RTX 6000 Ada",
}
NUM_NEAREST = 3


def plain(name: str) -> str:
    """What of a card's name tells it from others: letters and digits, without the maker and the line it is sold in."""
    words = re.sub(r"\b(nvidia|geforce|tesla|quadro)\b", "", name.lower())
    return re.sub(r"^(rtx|gtx)(?=a?\d)", "", re.sub("[^a-z0-9]", "", words))


BY_NAME = {plain(gpu.name): gpu for gpu in GPUS}
BY_NAME |= {plain(alias): BY_NAME[plain(name)] for alias, name in ALIASES.items()}


def find_gpu(name: str) -> Gpu:
    """The card called `name`: case, blanks, NVIDIA and GeForce forgiven. Raises RequestError with the nearest names."""
    wanted = plain(name)
    if wanted in BY_NAME:
        return BY_NAME[wanted]
    near = [known for known in BY_NAME if wanted and known.startswith(wanted)]
    near = near or difflib.get_close_matches(wanted, BY_NAME, n=NUM_NEAREST, cutoff=0.5)
    names = list(dict.fromkeys(BY_NAME[match].name for match in near)) or [gpu.name for gpu in GPUS]
    raise RequestError(
        f"--gpu {name} is not known; {'nearest' if near else 'known'}: {', '.join(names)}; "
        "or give its memory with --vram_gib"
    )


def card_of(name: str | None, vram_gib: float | None) -> Gpu | None:
    """The card that is named, or any other by its memory; None where neither is given."""
    if vram_gib is not None:
        return Gpu(f"a card of {vram_gib:g} GiB", int(vram_gib * GIB), None, True, "--vram_gib")
    return None if name is None else find_gpu(name)


def gpu_of_this_machine() -> Gpu | None:
    """The first card that nvidia-smi lists, with the memory that it states; None where there is none."""
    if shutil.which(NVIDIA_SMI[0]) is None:
        return None
    listed = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=10)
    first = re.match(r"(.+), (\d+)$", listed.stdout, re.MULTILINE)
    if listed.returncode or not first:
        return None
    name, memory_bytes = first[1], int(first[2]) * MIB
    known = BY_NAME.get(plain(name))
    rate, has_bf16 = (known.bandwidth_bytes_per_s, known.has_bf16) if known else (None, True)
    return Gpu(name, memory_bytes, rate, has_bf16, "nvidia-smi")
