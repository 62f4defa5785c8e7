"""What is refused before weights are read, and what is not; free memory as the kernel and control groups state it."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from factory import MODELS
from running import CHAT, infer, run, torchrun
from running import INFER as INFER_FILE

from llama_mp import LLM, fit
from llama_mp import llm as llm_module
from llama_mp.checkpoint.hf import hf_name
from llama_mp.config import ModelConfig, load_size
from llama_mp.errors import RequestError
from llama_mp.fit import Room, check_fits, free_host_bytes
from llama_mp.layout import global_shapes
from llama_mp.measure import summary
from llama_mp.memory import Workload, rank_memory

GIB = 2**30
SEVEN = load_size("7B")
WORK = Workload(dtype="fp16", batch_size=4, seq_len=2048)


def room(free_bytes: int, *, is_shared: bool = False) -> Room:
    return Room(free_bytes, "on cuda:0", is_shared)


# ---- the rule ----------------------------------------------------------------------------------------------------


def test_refused_is_only_what_weights_and_cache_alone_do_not_fit() -> None:
    memory = rank_memory(SEVEN, 1, WORK)
    certain = memory.weights_bytes + memory.kv_cache_bytes
    check_fits(SEVEN, 1, WORK, room(certain))
    with pytest.raises(RequestError, match="7B over 1 rank in fp16 does not fit"):
        check_fits(SEVEN, 1, WORK, room(certain - 1))
    check_fits(SEVEN, 1, WORK, room(memory.kv_cache_bytes), has_weights=True)
    with pytest.raises(RequestError, match=r"in fp16 with weights in int8 does not fit: a rank needs 6\.89 GB"):
        check_fits(SEVEN, 1, replace(WORK, quant="int8"), room(memory.kv_cache_bytes))
    with pytest.raises(RequestError, match=r"needs 4\.29 GB of cache for 4 x 2048 tokens, and 4\.29 GB are"):
        check_fits(SEVEN, 1, WORK, room(memory.kv_cache_bytes - 1), has_weights=True)


def test_the_refusal_says_what_is_needed_what_is_free_and_what_to_do() -> None:
    with pytest.raises(RequestError) as refused:
        check_fits(SEVEN, 1, WORK, room(15 * 10**9))
    assert re.fullmatch(
        r"7B over 1 rank in fp16 does not fit: a rank needs 13\.48 GB of weights and 4\.29 GB of cache for 4 x 2048 "
        r"tokens, and 15\.00 GB are free on cuda:0; give --mp 2 or --quant int8, or --force to try",
        str(refused.value),
    )


def test_more_ranks_are_not_advised_in_one_memory() -> None:
    for free in (GIB // 2, 2 * GIB, 8 * GIB, 14 * GIB):
        for is_shared in (True, False):
            with pytest.raises(RequestError) as refused:
                check_fits(SEVEN, 1, WORK, room(free, is_shared=is_shared))
            text = str(refused.value)
            assert "--force" in text
            assert ("--mp" in text) is (not is_shared and free > GIB)
            assert ("give --quant" in text or "give --offload" in text or "give --mp" in text) is (free > GIB)


def test_in_main_memory_too_blocks_may_wait_on_the_disk() -> None:
    work = Workload(dtype="bf16", seq_len=512, device="cpu")
    with pytest.raises(RequestError, match=r"7B over 1 rank .* give .*--offload disk.*, or --force to try"):
        check_fits(SEVEN, 1, work, Room(4 * GIB, "for it in main memory", is_shared=True))


# ---- free memory -------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a machine's own figures: 10 GiB available, 1 GiB of swap, in the control group /a/b."""
    (tmp_path / "meminfo").write_text(
        f"MemAvailable: {10 * GIB // 1024} kB\nSwapFree: {GIB // 1024} kB\nHugePages_Free: 0\n"
    )
    (tmp_path / "own").write_text("0::/a/b\n")
    (tmp_path / "cgroup" / "a" / "b").mkdir(parents=True)
    monkeypatch.setattr(fit, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(fit, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(fit, "CGROUPS", tmp_path / "cgroup")
    return tmp_path


def limit(folder: Path, maximum: str, used: int, cached: int) -> None:
    (folder / "memory.max").write_text(f"{maximum}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - cached}\ninactive_file {cached}\nactive_file 0\n")


def test_without_limits_free_is_what_is_available_and_swap(machine: Path) -> None:
    assert free_host_bytes() == 11 * GIB
    limit(machine / "cgroup" / "a", "max", 3 * GIB, 0)
    assert free_host_bytes() == 11 * GIB


def test_the_narrowest_control_group_limits_and_its_page_cache_is_free(machine: Path) -> None:
    limit(machine / "cgroup" / "a" / "b", str(8 * GIB), 6 * GIB, 4 * GIB)
    assert free_host_bytes() == 7 * GIB
    limit(machine / "cgroup" / "a", str(5 * GIB), 3 * GIB, 0)
    assert free_host_bytes() == 3 * GIB
    limit(machine / "cgroup", str(GIB), 2 * GIB, 0)
    assert free_host_bytes() == GIB


def test_in_a_container_the_limit_stands_at_the_root(machine: Path) -> None:
    (machine / "own").write_text("0::/\n")
    limit(machine / "cgroup", str(4 * GIB), 2 * GIB, GIB)
    assert free_host_bytes() == 4 * GIB


def test_a_machine_of_the_first_kind_of_control_groups(machine: Path) -> None:
    (machine / "own").write_text("4:memory:/a\n")
    assert free_host_bytes() == 11 * GIB


def test_this_machine_has_free_memory() -> None:
    assert 64 * 2**20 < free_host_bytes() < 2**45


# ---- in use ------------------------------------------------------------------------------------------------------


def write_zeros(file: Path, name: str, shape: tuple[int, ...]) -> None:
    """A safetensors file of one bf16 tensor whose data the disk does not hold: it gives zeros."""
    num_bytes = 2 * math.prod(shape)
    text = json.dumps({name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, num_bytes]}}).encode()
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + num_bytes)


def write_huge(folder: Path, tokenizer: Path) -> Path:
    """A Hugging Face folder of 1 TB of weights, of which the disk holds a few KB; a file for each tensor, since the
    kernel maps none that is larger than the machine's memory."""
    sizes = {"dim": 8192, "num_layers": 80, "num_heads": 64, "num_kv_heads": 64, "hidden_dim": 1 << 18}
    config = ModelConfig(name="huge", vocab_size=MODELS["gqa"].vocab_size, **sizes)
    folder.mkdir()
    weight_map = {}
    for number, (name, shape) in enumerate(global_shapes(config).items()):
        weight_map[hf_name(name)] = f"model-{number:05d}.safetensors"
        write_zeros(folder / weight_map[hf_name(name)], hf_name(name), shape)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    values = {"model_type": "llama", "hidden_size": config.dim, "num_hidden_layers": config.num_layers}
    values |= {"num_attention_heads": config.num_heads, "intermediate_size": config.hidden_dim, "rms_norm_eps": 1e-5}
    values |= {"vocab_size": config.vocab_size, "max_position_embeddings": 512, "rope_theta": 1e4, "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "tokenizer.model").symlink_to(tokenizer)
    return folder


REFUSED = (
    r"huge over %d ranks? in bf16 does not fit: a rank needs \d+\.\d\d GB of weights and .* are free for it in main"
)


@pytest.fixture(scope="module")
def huge_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    return write_huge(tmp_path_factory.mktemp("sparse") / "huge", tokenizer_file)


def test_infer_refuses_before_weights_are_read(huge_folder: Path) -> None:
    flags = ("--ckpt_dir", huge_folder, "--device", "cpu", "--prompt", "a", "--max_gen_len", "2")
    assert re.match(REFUSED % 1, infer(*flags).refusal)
    assert re.match(REFUSED % 2, infer(*flags, "--mp", "2").refusal)


@pytest.mark.slow
def test_infer_refuses_under_torchrun_too(huge_folder: Path) -> None:
    flags = ("--ckpt_dir", huge_folder, "--device", "cpu", "--prompt", "a", "--max_gen_len", "2")
    assert re.search(REFUSED % 2, torchrun(2, INFER_FILE, *flags).stderr)


def test_chat_refuses_too(huge_folder: Path) -> None:
    (huge_folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    done = run(sys.executable, CHAT, "--ckpt_dir", huge_folder, "--device", "cpu")
    assert re.match(REFUSED % 1, done.refusal)


def test_a_cache_without_room_is_refused_too_and_force_tries(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [GIB]
    monkeypatch.setattr(llm_module, "free_room", lambda device, local_size: room(free[0], is_shared=True))
    with LLM(tiny, dtype="fp32", device="cpu") as llm:
        free[0] = 1000
        with pytest.raises(RequestError, match=r"needs 0.00 GB of cache for 2 x \d+ tokens, and 0.00 GB are free on"):
            llm.generate(["a", "b"], max_gen_len=2)
        free[0] = GIB
        assert len(llm.generate(["a"], max_gen_len=2)) == 1  # the model is as it was
    free[0] = 1000
    with pytest.raises(RequestError, match=r"needs 0\.00 GB of weights"):
        LLM(tiny, dtype="fp32", device="cpu")
    with LLM(tiny, dtype="fp32", device="cpu", force=True) as llm:
        assert len(llm.generate(["a"], max_gen_len=2)) == 1


def test_the_end_line_holds_the_plan_of_the_largest_cache(tiny: Path) -> None:
    config = MODELS["gqa"]
    with LLM(tiny, dtype="fp32", device="cpu") as llm:
        llm.generate(["a", "b"], max_gen_len=3, temperature=0)
        llm.generate(["a"], max_gen_len=200, temperature=0)
        shapes = [(2, len(llm.codec.tokenizer.encode("a", bos=True)) + 3), (1, 201)]
        plans = [
            rank_memory(config, 1, Workload(dtype="fp32", batch_size=b, seq_len=n, device="cpu")).allocated_bytes
            for b, n in shapes
        ]
        planned_bytes = llm.planned.allocated_bytes
        assert abs(planned_bytes - max(plans)) < 10_000  # a token or two of the prompt
        assert f"(planned {planned_bytes / 1e9:.2f} GB)" in summary(llm)
        assert llm.shape[0] == 1 and llm.shape[1] > 200
