"""What an installed copy holds, what its modules may import, and who may look at whom."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llama_mp.config import load_size, size_names
from llama_mp.memory import weight_bytes

ROOT = Path(__file__).resolve().parents[1]

# The rooms of the house, top to bottom: a module imports only what stands below it.
WITH_TORCH = [
    "launch",  # every file of it: none looks at another
    "llama_mp",
    "llama_mp.measure",
    "llama_mp.examine",
    "llama_mp.network",
    "llama_mp.ward",
    "llama_mp.ceiling",
    "llama_mp.llm",
    "llama_mp.loading",
    "llama_mp.compare_logits",
    "llama_mp.deterministic",
    "llama_mp.engine",
    "llama_mp.seen",
    "llama_mp.offload",
    "llama_mp.stream",
    "llama_mp.graphs",
    "llama_mp.runner",
    "llama_mp.model",
    "llama_mp.layers",
    "llama_mp.quantizer",
    "llama_mp.causal",
    "llama_mp.fused",
    "llama_mp.cuda_elementwise",
    "llama_mp.kernels",
    "llama_mp.cuda",
    "llama_mp.cuda_kernels",
    "llama_mp.cuda_attention",
    "llama_mp.quant",
    "llama_mp.cache",
    "llama_mp.parallel",
    "llama_mp.world",
    "llama_mp.liveness",
    "llama_mp.shared_memory",
    "llama_mp.machine",
    "llama_mp.sampling",
    "llama_mp.transfer",
    "llama_mp.checkpoint",
    "llama_mp.checkpoint.reshard",
    "llama_mp.checkpoint.write",
    "llama_mp.checkpoint.cut",
    "llama_mp.checkpoint.meta_sink",
    "llama_mp.checkpoint.hf_sink",
    "llama_mp.checkpoint.sink",
    "llama_mp.checkpoint.verify",
    "llama_mp.checkpoint.structure",
    "llama_mp.checkpoint.compare",
    "llama_mp.checkpoint.scan",
    "llama_mp.checkpoint.load",
    "llama_mp.checkpoint.random",
    "llama_mp.checkpoint.gguf",
    "llama_mp.checkpoint.hf",
    "llama_mp.checkpoint.meta",
    "llama_mp.checkpoint.source",
    "llama_mp.dtypes",
    "llama_mp.rope",  # the frequencies are checked against those that a GGUF file stores
]
WITHOUT_TORCH = [
    "llama_mp.slurm.supervisor",
    "llama_mp.slurm.own_job",
    "llama_mp.slurm.report",
    "llama_mp.slurm.cluster",
    "llama_mp.slurm.request",
    "llama_mp.slurm.resources",
    "llama_mp.slurm.work",
    "llama_mp.slurm.flags",
    "llama_mp.slurm.script",
    "llama_mp.slurm.site",
    "llama_mp.slurm",
    "llama_mp.reshard_request",
    "llama_mp.bench",
    "llama_mp.doctor_text",
    "llama_mp.doctor",
    "llama_mp.leftovers",
    "llama_mp.ports",
    "llama_mp.guide",
    "llama_mp.plan_text",
    "llama_mp.plan",
    "llama_mp.headers",
    "llama_mp.budget",
    "llama_mp.fit",
    "llama_mp.advice",
    "llama_mp.gpus",
    "llama_mp.batch",
    "llama_mp.chat",
    "llama_mp.terminal",
    "llama_mp.conversation",
    "llama_mp.answer",
    "llama_mp.request",
    "llama_mp.tokenizer_export",
    "llama_mp.tokenizer_files",
    "llama_mp.chat_format",
    "llama_mp.template_sandbox",
    "llama_mp.template_meter",
    "llama_mp.tokenizer_json",
    "llama_mp.tokenizer_tiktoken",
    "llama_mp.tokenizer_sentencepiece",
    "llama_mp.tokenizer_byte_level",
    "llama_mp.tokenizer_settings",
    "llama_mp.tokenizer",
    "llama_mp.vocabulary",
    "llama_mp.cli",
    "llama_mp.stdout",
    "llama_mp.attempt_output",
    "llama_mp.output",
    "llama_mp.run_file",
    "llama_mp.prompts",
    "llama_mp.status",
    "llama_mp.parts",
    "llama_mp.lines",
    "llama_mp.attempt",
    "llama_mp.launcher",
    "llama_mp.slurm.roll_call",
    "llama_mp.packed",
    "llama_mp.progress",
    "llama_mp.partial",
    "llama_mp.checkpoint.torch_file",
    "llama_mp.checkpoint.archive",
    "llama_mp.checkpoint.checklist",
    "llama_mp.checkpoint.manifest",
    "llama_mp.checkpoint.digests",
    "llama_mp.checkpoint.fault",
    "llama_mp.records",
    "llama_mp.memory",
    "llama_mp.virtual",
    "llama_mp.runtime",
    "llama_mp.activations",
    "llama_mp.workload",
    "llama_mp.chunks",
    "llama_mp.locate",
    "llama_mp.hf_config",
    "llama_mp.params_json",
    "llama_mp.gguf_header",
    "llama_mp.layout",
    "llama_mp.config",
    "llama_mp.flags",
    "llama_mp.files",
    "llama_mp.pinning",
    "llama_mp.compiled",
    "llama_mp.cores",
    "llama_mp.deaths",
    "llama_mp.errors",
    "llama_mp.version",
]
ROOMS = WITH_TORCH + WITHOUT_TORCH
# Packages of the extras, which an installation without them does not have.
EXTRAS = ["hypothesis", "matplotlib", "pre_commit", "pytest", "ruff", "tiktoken", "transformers", "triton"]
WITH_TRITON = "llama_mp.cuda_"  # which torch for GPUs brings along: imported where one is to compute


def modules_on_disk() -> dict[str, Path]:
    """Dotted name of every module of llama_mp/ and launch/, and its file."""
    files = sorted([*ROOT.glob("llama_mp/**/*.py"), *ROOT.glob("launch/*.py")])
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


MODULES = modules_on_disk()


def room(module: str) -> int:
    """Place of `module` in ROOMS, counted from the top."""
    name = "launch" if module.startswith("launch.") else module
    assert name in ROOMS, f"{module} has no place in ROOMS of this file"
    return ROOMS.index(name)


def project_imports(file: Path) -> set[str]:
    """Modules of this project that `file` imports anywhere in its text, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}:{node.lineno}: write the import out, from llama_mp on"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= submodules or {node.module}
    return {name for name in found if name.split(".")[0] in ("llama_mp", "launch")}


def run_python(code: str, *arguments: str, cwd: Path, options: tuple[str, ...] = ()) -> str:
    """The standard output of `code` in a fresh interpreter that inherits no PYTHONPATH."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *options, "-c", code, *arguments]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", MODULES)
def test_module_has_a_room_and_imports_point_down(module: str) -> None:
    here = room(module)
    upward = [name for name in project_imports(MODULES[module]) if room(name) <= here]
    assert not upward, f"{module} imports {upward}, which do not stand below it"


def test_lower_rooms_import_without_torch(tmp_path: Path) -> None:
    code = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    importlib.import_module(name)
    assert "torch" not in sys.modules, f"{name} imports torch"
"""
    names = [name for name in MODULES if name in WITHOUT_TORCH]
    run_python(code, str(ROOT), *names, cwd=tmp_path)


def test_every_module_imports_with_base_dependencies_only(tmp_path: Path) -> None:
    code = """
import importlib, json, runpy, sys
root, extras, modules, scripts = map(json.loads, sys.argv[1:])
sys.path.insert(0, root)
sys.modules.update(dict.fromkeys(extras))  # None there: an import fails as if it were not installed
for name in modules:
    importlib.import_module(name)
for script in scripts:
    runpy.run_path(script, run_name="imported")
"""
    modules = [name for name in MODULES if not name.startswith(("launch.", WITH_TRITON))]
    scripts = [str(file) for name, file in MODULES.items() if name.startswith("launch.")]
    run_python(code, *map(json.dumps, (str(ROOT), EXTRAS, modules, scripts)), cwd=tmp_path)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip installed the project, as users do, and nothing else."""
    # from a copy, because a build leaves its scraps beside the sources, and old scraps would enter the wheel
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("llama_mp", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    # the build backend is the setuptools of the test extra: nothing is fetched
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return target


def test_installed_copy_holds_every_module_and_size(installed: Path) -> None:
    modules = {str(file.relative_to(installed)) for file in installed.glob("llama_mp/**/*.py")}
    assert modules == {str(file.relative_to(ROOT)) for name, file in MODULES.items() if name.startswith("llama_mp")}
    sizes = {file.name: file.read_bytes() for file in installed.glob("llama_mp/configs/*")}
    assert sizes == {file.name: file.read_bytes() for file in ROOT.glob("configs/*")}
    others = {file.name for pattern in ("*.c", "*.jinja") for file in (installed / "llama_mp").glob(pattern)}
    assert others == {file.name for file in ROOT.glob("llama_mp/*") if file.suffix in (".c", ".jinja")}
    assert list(installed.glob("llama_mp-*.dist-info/**/LICENSE"))


def test_installed_copy_plans_every_size(installed: Path, tmp_path: Path) -> None:
    code = """
import json, sys
sys.path.insert(0, sys.argv[1])
import llama_mp.config
from llama_mp.config import load_size, size_names
from llama_mp.memory import weight_bytes
assert llama_mp.config.__file__.startswith(sys.argv[1]), llama_mp.config.__file__
print(json.dumps({size: weight_bytes(load_size(size), 0, 2, "fp16") for size in size_names()}))
"""
    # -I -S: neither this checkout nor any installed package is on the path, so the plan needs none of them
    planned = json.loads(run_python(code, str(installed), cwd=tmp_path, options=("-I", "-S")))
    assert planned == {size: weight_bytes(load_size(size), 0, 2, "fp16") for size in size_names()}
