"""What README.md says of files, flags, sizes and make targets, against what there is."""

import re

import pytest
from running import ROOT

from llama_mp.batch import InferFlags
from llama_mp.bench import BenchFlags
from llama_mp.chat import ChatFlags
from llama_mp.checkpoint.verify import VerifyFlags
from llama_mp.cli import describe
from llama_mp.config import size_names
from llama_mp.doctor import DoctorFlags
from llama_mp.plan import PlanFlags
from llama_mp.reshard_request import ReshardFlags
from llama_mp.slurm.flags import BenchJobFlags, InferJobFlags, ReshardJobFlags, StatusFlags, VerbFlags

README = (ROOT / "README.md").read_text(encoding="utf-8")
FLAGS_OF_OTHERS = {"help", "nproc_per_node"}


def listed_files() -> list[str]:
    tree = README.split("## Files")[1].split("```")[1]
    return [line.split()[0] for line in tree.strip().splitlines()]


def test_the_tree_lists_every_file_of_the_code_once_and_nothing_that_is_not_there():
    listed = listed_files()
    files = (file for folder in ("llama_mp", "launch") for file in (ROOT / folder).rglob("*"))
    code = {str(file.relative_to(ROOT)) for file in files if file.suffix in (".py", ".c", ".jinja")}
    assert code - set(listed) == set()
    assert [path for path in listed if not (ROOT / path).exists()] == []
    assert len(listed) == len(set(listed))


def test_every_flag_is_there_and_none_that_is_not():
    verbs = (InferFlags, ChatFlags, BenchFlags, PlanFlags, ReshardFlags, VerifyFlags)
    verbs += (DoctorFlags, VerbFlags, InferJobFlags, BenchJobFlags, ReshardJobFlags, StatusFlags)
    flags = [flag for verb in verbs for flag in describe(verb).values()]
    known = {flag.name for flag in flags if not flag.positional}
    named = set(re.findall(r"--([a-z_]+)", README))
    assert named - FLAGS_OF_OTHERS == known


def test_every_size_is_there_and_none_that_is_not():
    (paragraph,) = re.findall(r"^7B, 13B.*?\.\n", README, re.MULTILINE | re.DOTALL)
    named = re.sub(r"\(.*?\)", "", paragraph).rstrip(".\n").split(",")
    assert [name.strip() for name in named] == size_names()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"^make ([\w-]+)|`make ([\w-]+)`", README, re.MULTILINE))))
def test_every_make_target_named_is_there(target):
    assert re.search(rf"^{''.join(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_prompts_of_the_demo_are_those_shown():
    shown = re.findall(r"^> (.*)$", README, re.MULTILINE)
    assert shown == re.findall(r'"content": "(.*?)"', (ROOT / "docs" / "demo.jsonl").read_text())
