"""The pages of docs/: every command in them is run, and prints what the page shows below it.

A block of `sh` is run, in order, in a folder of the page's own that looks like the repository's root. A block with a
file's name after the language is saved under it, for a command below to use. A block of `text` is what the command
above prints on a terminal: `...` stands for any lines where it is one, for any text within one. A refusal shown is one
that must come.
"""

import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from factory import (
    MODELS,
    finish_gguf,
    gguf_name,
    gguf_writer,
    hf_cache,
    hugging_face,
    meta_tensors,
    write_hf,
    write_meta,
)
from kinds import gguf_of_sentencepiece
from running import ROOT, run

from llama_mp.batch import InferFlags
from llama_mp.bench import BenchFlags
from llama_mp.chat import ChatFlags
from llama_mp.checkpoint.verify import VerifyFlags
from llama_mp.cli import describe
from llama_mp.cores import cores_at_hand
from llama_mp.doctor import DoctorFlags
from llama_mp.plan import PlanFlags
from llama_mp.reshard_request import ReshardFlags
from llama_mp.slurm.flags import BenchJobFlags, InferJobFlags, ReshardJobFlags, StatusFlags, VerbFlags

DOCS = ROOT / "docs"
PAGES = sorted(page.name for page in DOCS.glob("*.md"))
BLOCK = re.compile(r"^```(\w*) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
OTHER_FLAGS = {"standalone", "nproc_per_node", "help", "temprature"}  # the last is refused
SBATCH_FLAGS = {"constraint", "exclusive", "export", "gres", "parsable", "qos"}
SBATCH_FLAGS |= {"cpus", "gpus", "job", "mem", "ntasks", "open", "requeue", "signal"}  # up to their first hyphen


class Block(NamedTuple):
    language: str
    file: str
    content: str


def blocks_of(page: str) -> list[Block]:
    return [Block(*found) for found in BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))]


def pattern_of(shown: str) -> str:
    """The regular expression of outputs that a page shows as `shown`."""
    lines = shown.splitlines()
    return "".join(
        r"(?:.*\n)*" if line == "..." else ".*".join(map(re.escape, line.split("..."))) + r"\n" for line in lines
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    """A home folder with the checkpoints that the pages name, all of them one tiny model."""
    home, config = tmp_path_factory.mktemp("home"), MODELS["gqa"]
    model, models = hugging_face(config), home / "llama-mp"
    write_meta(models / "my-model", config, meta_tensors(model), mp=2)
    (models / "tokenizer.model").symlink_to(tokenizer_file)  # one folder up, as in Meta's downloads
    for folder in (models / "my-hf-model", home / "download"):
        write_hf(folder, model)
        (folder / "tokenizer.model").symlink_to(tokenizer_file)
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    hf_cache(home / "download", home / ".cache" / "huggingface" / "hub" / "models--ORG--NAME")
    writer = gguf_writer(models / "my-model.gguf", config)
    vocabulary = gguf_of_sentencepiece(tokenizer_file)
    writer.add_tokenizer_model(vocabulary["tokenizer.ggml.model"])
    writer.add_token_list(vocabulary["tokenizer.ggml.tokens"])
    writer.add_token_scores(vocabulary["tokenizer.ggml.scores"])
    writer.add_token_types(vocabulary["tokenizer.ggml.token_type"])
    for name, tensor in meta_tensors(model).items():
        writer.add_tensor(gguf_name(name), tensor.numpy())
    finish_gguf(writer, models / "my-model.gguf")
    return home


def terminal(commands: str, folder: Path, home: Path, **variables: str) -> tuple[int, str]:
    """The exit code of shell commands run in `folder`, and all that they print, in order."""
    environment = {
        "HOME": str(home),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),  # the code beside these pages, whatever is installed
        "PYTHONUNBUFFERED": "1",  # both outputs in the order in which a terminal shows them
    } | variables
    done = run("bash", "-ec", f'exec 2>&1; cd "$0"\n{commands}', folder, **environment)
    return done.code, done.stdout


def marked(page: str) -> object:
    """A bench takes its time, and so do blocks from the disk and a dozen checkpoints: each has quick tests of its own.
    Jobs need a cluster."""
    slow = dict.fromkeys(("bench.md", "offload.md", "reshard.md"), pytest.mark.slow)
    marks = slow | {"slurm.md": pytest.mark.slurm}
    return pytest.param(page, marks=marks[page]) if page in marks else page


@pytest.fixture(scope="module")
def checks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, home: Path) -> Iterator[dict]:
    """The check of each page that is asked for, on its way: several at once, as most of it is an interpreter starting
    on one core."""
    name = test_every_command_of_a_page_prints_what_it_shows.__name__
    chosen = [item for item in request.session.items if item.originalname == name]
    pages = [item.callspec.params["page"] for item in chosen]
    cluster = request.getfixturevalue("slurm_cluster") if "slurm.md" in pages else None
    variables = {"SLURM_CONF": str(cluster.conf)} if cluster else {}
    with ThreadPoolExecutor(cores_at_hand()) as pool:
        yield {
            page: pool.submit(check_page, page, tmp_path_factory.mktemp("page"), home, **variables) for page in pages
        }
    if cluster:
        cluster.cancel_all()


@pytest.mark.parametrize("page", [marked(page) for page in PAGES])
def test_every_command_of_a_page_prints_what_it_shows(page: str, checks: dict[str, Future]) -> None:
    checks[page].result()


def check_page(page: str, tmp_path: Path, home: Path, **variables: str) -> None:
    """Run the page's commands in `tmp_path`."""
    for name in ("launch", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    blocks = blocks_of(page)
    assert any(block.language == "sh" for block in blocks)
    for block, after in zip(blocks, [*blocks[1:], Block("", "", "")], strict=True):
        if block.file:
            (tmp_path / block.file).write_text(block.content)
        elif block.language == "sh":
            code, printed = terminal(block.content, tmp_path, home, **variables)
            shown = after.content if after.language == "text" else "...\n"
            refused = re.search("^error: ", shown, re.MULTILINE)
            checked = r"^error: (\d+ (fault|difference)|other logits)"
            found = re.search(checked, shown, re.MULTILINE)  # by a check that was done
            assert code == (1 if found else 2 if refused else 0), f"{block.content}{printed}"
            assert re.fullmatch(pattern_of(shown), printed), f"{block.content}{shown}---\n{printed}"


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_takes_part_in_the_test(page: str) -> None:
    blocks = blocks_of(page)
    assert 2 * len(blocks) == (DOCS / page).read_text(encoding="utf-8").count("```")
    for i, block in enumerate(blocks):
        if block.language == "text":
            assert i > 0 and blocks[i - 1].language == "sh"
        elif block.file:
            assert any(block.file in later.content for later in blocks[i + 1 :] if later.language == "sh")
        else:
            assert block.language == "sh"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_flags_that_there_are_and_readme_names_the_page(page: str) -> None:
    verbs = (InferFlags, ChatFlags, BenchFlags, ReshardFlags, VerifyFlags, PlanFlags)
    verbs += (DoctorFlags, VerbFlags, InferJobFlags, BenchJobFlags, ReshardJobFlags, StatusFlags)
    known = {name for verb in verbs for name in describe(verb)}
    named = set(re.findall(r"--([a-z_]+)", (DOCS / page).read_text(encoding="utf-8")))
    assert named <= known | OTHER_FLAGS | SBATCH_FLAGS
    assert f"(docs/{page})" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("shown", "printed", "equal"),
    [
        ("a\n", "a\n", True),
        ("a\n", "a\nb\n", False),
        ("a\n...\n", "a\nb\nc\n", True),
        ("a\n...\n", "a\n", True),
        ("...\nc\n", "a\nb\n", False),
        ("in ... s\n", "in 1.3 s\n", True),
        ("in ... s\n", "in 1\n3 s\n", False),
        ("a.c\n", "abc\n", False),
    ],
)
def test_what_a_page_shows_is_matched_line_by_line(shown: str, printed: str, equal: bool) -> None:
    assert bool(re.fullmatch(pattern_of(shown), printed)) is equal
