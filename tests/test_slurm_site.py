"""The site file: what it may say, and what is said of one that is wrong."""

from pathlib import Path

import pytest

from llama_mp.errors import RequestError
from llama_mp.slurm.site import Site, read_site

WHOLE = """
partition = "gpu"
account = "abc"
gpu = "A100 80GB"
gpus_per_node = 4
cpus_per_node = 64
mem_gib_per_node = 512
gpu_flag = "gres"
interface = "ib0"
python = "python3"
setup = ["module load cuda/12.4", "source ~/venv/bin/activate"]
options = ["--qos=high"]
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".config" / "llama_mp").mkdir(parents=True)
    return tmp_path


def test_every_key(tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    file.write_text(WHOLE)
    site = read_site(file)
    assert site == Site(
        partition="gpu",
        account="abc",
        gpu="A100 80GB",
        gpus_per_node=4,
        cpus_per_node=64,
        mem_gib_per_node=512,
        gpu_flag="gres",
        interface="ib0",
        python="python3",
        setup=("module load cuda/12.4", "source ~/venv/bin/activate"),
        options=("--qos=high",),
    )
    assert site.card.name == "A100 80GB SXM"


def test_the_user_s_own_is_taken_where_it_is(home: Path) -> None:
    assert read_site(None) == Site() and Site().card is None
    (home / ".config" / "llama_mp" / "slurm.toml").write_text("vram_gib = 80")
    assert read_site(None).card.memory_bytes == 80 * 2**30


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partion = 'gpu'", "unknown field 'partion' (did you mean partition?); valid: partition, account, gpu, vram"),
        ("partition = 1", "partition is 1, but must be a text"),
        ("gpus_per_node = '8'", "gpus_per_node is '8', but must be a whole number"),
        ("gpus_per_node = 0", "gpus_per_node is 0, but must be at least 1"),
        ("mem_gib_per_node = nan", "mem_gib_per_node is nan, but must be at least 1"),
        ("gpu_flag = 'gpus'", "gpu_flag is 'gpus', but must be one of gpus-per-node, gres"),
        ("setup = [1]", "setup is [1], but must be a text or a list of texts"),
        ("gpu = 'A100'\nvram_gib = 80", "gpu and vram_gib are both there: drop one"),
        ("gpu = 'RTX 3090 X'", "gpu RTX 3090 X is not known; nearest: RTX 3090"),
        ("gpu = ''", "gpu  is not known"),
        ("gpu =", "is not TOML: "),
        ("[a]\nb = 1", "unknown field 'a'"),
        ("a = '\udcff'", "is not TOML: "),
    ],
)
def test_a_fault_is_told_with_the_file_and_the_key(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "site.toml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(RequestError) as caught:
        read_site(file)
    assert str(caught.value).startswith(f"site file {file}") and said in str(caught.value)


def test_one_that_is_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read: No such file or directory; check --cluster"):
        read_site(tmp_path / "none.toml")
    with pytest.raises(RequestError, match="cannot be read: Is a directory"):
        read_site(tmp_path)
