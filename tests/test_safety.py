"""No code that comes with data is run: what could do so does not stand in the sources."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("llama_mp/**/*.py"), *ROOT.glob("launch/*.py"), *ROOT.glob("benchmarks/*.py")])
# pickletools only names what a pickle holds.
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pandas", "jsonpickle"}
CALLS = {"eval", "exec", "compile", "__import__", "unpickle", "loads_pickle", "os.system", "torch.hub.load"}
ALLOWED = {
    # the class of what torch raises for a pickle that it refuses
    ("llama_mp/checkpoint/meta.py", "import pickle"),
    # the pickle's operations, which it writes
    ("llama_mp/checkpoint/meta_sink.py", "import pickle"),
}


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or a chain of attributes, else an empty text."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def given(call: ast.Call, name: str) -> object:
    """The constant that a call gives for `name`, None where it gives none."""
    values = [keyword.value for keyword in call.keywords if keyword.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


def dangers(text: str) -> list[str]:
    """What could run code from data, in the words of the source."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [f"import {alias.name}" for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(f"from {node.module} import")
        elif (
            isinstance(node, ast.Attribute) and "_object" in node.attr and dotted(node).startswith(("dist.", "torch."))
        ):
            found.append(dotted(node))  # gather_object and its like, which pickle
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in CALLS or given(node, "allow_pickle") or given(node, "shell") or given(node, "trust_remote_code"):
                found.append(f"{name}()")
            if name.endswith("torch.load") and given(node, "weights_only") is not True:
                found.append("torch.load() without weights_only=True")
            if name.startswith("pickle.") and name != "pickle.UnpicklingError":
                found.append(f"{name}()")
            if name.startswith("yaml.") and name != "yaml.safe_load":
                found.append(f"{name}()")
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_code_from_data_is_run(file: Path) -> None:
    name = str(file.relative_to(ROOT))
    found = [danger for danger in dangers(file.read_text(encoding="utf-8")) if (name, danger) not in ALLOWED]
    assert not found, f"{name}: {found}"


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib, os",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=trusted)",
        "dist.all_gather_object(found, value)",
        "torch.distributed.broadcast_object_list(values)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "exec(text)",
        "yaml.load(text)",
        "subprocess.run(text, shell=True)",
        "pickle.loads(content)",
    ],
)
def test_what_would_run_code_is_seen(line: str) -> None:
    assert dangers(line)


def test_what_would_not_is_left_alone() -> None:
    assert not dangers(
        "torch.load(path, mmap=True, weights_only=True)\nnp.load(path)\nre.compile(text)\nimport pickletools"
    )
