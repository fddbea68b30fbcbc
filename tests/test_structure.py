"""The shape of the source: imports run one way, and what was read as data is never run."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the top down: a module imports only what stands below it. A name stands for a module of the root or for a folder;
# the modules of one folder may import each other, but never in a circle.
LAYERS = [
    *("benchmarks", "main", "commands", "serving", "train_lib", "reports", "run_lib", "config_lib", "configs"),
    *("training", "input_pipeline", "interop", "corpus", "runtime", "transformer"),
]
ALONE = {"runtime", "transformer"}  # import nothing else of the project
SHARED_BY_COMMANDS = ("commands.flags", "commands.foreign")
INSIDE_TRANSFORMER = [
    *({"sampling"}, {"model"}, {"config"}, {"stack", "kernels.choose"}, {"kernels.plain", "kernels.chunked"}),
    *({"kernels.vendor", "attention", "rotary", "half"}, {"xla"}, {"sharding", "ranges", "forms"}),
]
OUTSIDE_WORLD = {"os", "sys", "pathlib", "shutil", "logging", "absl", "ml_collections", "orbax", "rich", "wandb"}
NO_PRODUCT = {"tests", "benchmarks", "docs", "launch", "notebooks"}


def read_sources() -> dict[str, str]:
    """Dotted name -> source of every module of the product."""
    paths = [*ROOT.glob("*.py"), *(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text() for path in paths}


def imports_of(name: str, source: str) -> set[str]:
    """Dotted names of all that a module imports, inside functions too. `from a import b` may mean a or a.b: both."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *filter(None, [node.module])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def roots_of(name: str, source: str) -> set[str]:
    """The top-level packages that a module imports."""
    return {target.partition(".")[0] for target in imports_of(name, source)}


def calls_of(source: str) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]


def back_arrows(sources: dict[str, str]) -> list[str]:
    """Imports that run the wrong way, as "a -> b"."""
    wrong = []
    graph: dict[str, set[str]] = {}
    for name, source in sources.items():
        package, _, inner = name.partition(".")
        graph[name] = imports_of(name, source) & sources.keys() - {name}
        for target in graph[name]:
            other, _, other_inner = target.partition(".")
            if package == other == "transformer" and inner != "__init__":
                rank = {module: i for i, group in enumerate(INSIDE_TRANSFORMER) for module in group}
                fine = rank[inner] < rank[other_inner]
            elif package == other:
                fine = package != "commands" or target.startswith(SHARED_BY_COMMANDS)
            else:
                fine = LAYERS.index(package) < LAYERS.index(other) and package not in ALONE
            if not fine:
                wrong.append(f"{name} -> {target}")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        wrong.append(" -> ".join(error.args[1]))
    return wrong


def test_imports_run_one_way():
    sources = read_sources()
    assert {name.partition(".")[0] for name in sources} == set(LAYERS)
    assert back_arrows(sources) == []


@pytest.mark.parametrize(
    "name, line",
    [
        ("runtime.files", "import train_lib"),
        ("runtime.screen.text", "from transformer import sampling"),
        ("transformer.sampling", "from corpus.tokenizer import Tokenizer"),
        ("transformer.sampling", "from runtime import errors"),
        ("transformer.config", "from . import model"),
        ("transformer.attention", "from .model import MLP"),
        ("training.step", "import config_lib"),
        ("training.muon", "from training.optimizer import OptimizerConfig"),
        ("corpus.files", "import input_pipeline"),
        ("config_lib", "def late():\n    from run_lib import load_model"),
        ("run_lib", "from reports import summary"),
        ("commands.eval", "from commands import sample"),
        ("runtime.errors", "from runtime.files import read_json"),
        ("input_pipeline", "from configs import default\nimport config_lib"),
    ],
)
def test_a_planted_back_arrow_is_seen(name, line):
    sources = read_sources()
    sources[name] += f"\n{line}\n"
    assert back_arrows(sources)


def test_the_root_holds_five_modules():
    assert len(list(ROOT.glob("*.py"))) <= 5


def test_errors_imports_nothing_and_the_transformer_knows_no_world_outside():
    sources = read_sources()
    assert imports_of("runtime.errors", sources["runtime.errors"]) == set()
    for name, source in sources.items():
        roots, package = roots_of(name, source), name.partition(".")[0]
        if package == "transformer":
            called = {getattr(call.func, "id", "") for call in calls_of(source)}
            assert not roots & OUTSIDE_WORLD and not called & {"print", "open"}, name
        if package in ("transformer", "training", "runtime", "corpus", "interop", "input_pipeline"):
            assert "ml_collections" not in roots, f"{name} sees the whole config"
        assert name == "runtime.checkpoints.manager" or "orbax" not in roots, name


def test_an_optimizer_is_named_in_its_own_file_in_the_table_and_where_its_keys_are():
    """Whoever else reports of optimizers asks training/optimizer.py; recipes set keys, benchmarks compare by name."""
    named = {name for name, source in read_sources().items() if re.search("muon|adamw", source, re.IGNORECASE)}
    elsewhere = {name for name in named if name.partition(".")[0] not in ("benchmarks", "configs")}
    own = {f"training.{file}" for file in ("muon", "normuon", "optimizer")}
    assert (elsewhere, "configs.default" in named) == (own, True)


def test_what_is_traced_asks_for_no_devices():
    """Those of the mesh may be elsewhere. A model alone, without a mesh, takes JAX's own choice, in one place."""
    asking = ("jax.default_backend", "jax.devices", "jax.local_devices", "jax.extend.backend.get_backend")
    found = [
        f"{name}: {call}"
        for name, source in read_sources().items()
        if name.partition(".")[0] in ("transformer", "training")
        for call in (ast.unparse(call.func) for call in calls_of(source))
        if call in asking
    ]
    assert set(found) == {"transformer.xla: jax.extend.backend.get_backend"}


@pytest.mark.parametrize("module", ["corpus.encode", "commands.prepare"])
def test_what_encodes_text_loads_no_jax(module):
    code = f"import sys, {module}; print(*sorted({{'jax', 'jaxlib', 'flax', 'optax'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_what_is_read_is_never_run():
    for name, source in read_sources().items():
        assert not roots_of(name, source) & {"pickle", "marshal", "shelve", "dill"}, name
        for call in calls_of(source):
            where = f"{name}:{call.lineno}"
            assert getattr(call.func, "id", "") not in ("eval", "exec", "compile"), where
            assert not any(keyword.arg == "allow_pickle" for keyword in call.keywords), where


READERS = {  # who opens files, and why it is not `runtime.files` that does
    "runtime.files": "the one reader of what lies in a run's directory",
    "runtime.workdir": "the lock, which is held open",
    "runtime.checkpoints.integrity": "hashes the files of a checkpoint, once they were found to be regular",
    "runtime.watchdog": "writes while everything hangs",
    **dict.fromkeys(["runtime.devices", "runtime.malloc", "runtime.screen.console"], "the system's own"),
    **dict.fromkeys(["config_lib", "commands.typos", "commands.sample"], "this program's source, os.devnull"),
    **dict.fromkeys(["corpus.fetch", "corpus.prepare", "corpus.rebuild", "corpus.dataset"], "data that it wrote"),
    "corpus.tokenizer": "what a library says",
}


def opens(source: str) -> list[str]:
    """Calls that read a file, or take JSON that somebody wrote."""
    calls = [ast.unparse(call.func) for call in calls_of(source)]
    return [name for name in calls if re.fullmatch(r"(.+\.)?(open|read_text|read_bytes)|json\.loads?", name)]


def test_one_module_reads_the_files_of_a_run():
    named = {"read_text", "read_bytes"}  # of runtime.files, imported
    found = {name for name, source in read_sources().items() if set(opens(source)) - named}
    assert found - {name for name in found if name.startswith("benchmarks.")} == READERS.keys()


def test_torch_reads_tensors_and_nothing_else():
    calls = [ast.unparse(call) for source in read_sources().values() for call in calls_of(source)]
    loads = [call for call in calls if call.startswith("torch.load(")]
    assert loads and all("weights_only=True" in call for call in loads), loads


def test_an_installed_copy_has_every_module():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    modules = [name for name in read_sources() if name.partition(".")[0] not in NO_PRODUCT]
    folders = {f"transformer_jax.{name.rpartition('.')[0]}".rstrip(".") for name in modules}
    assert set(listed["packages"]) == folders
    beside = {f"{name.partition('.')[2]}/{file}" for name, files in listed["package-data"].items() for file in files}
    found = {path for kind in ("css", "html") for path in ROOT.glob(f"*/*.{kind}") if path.parent.name in LAYERS}
    assert beside == {path.relative_to(ROOT).as_posix() for path in found}


def test_the_source_can_be_read_in_an_evening():
    """The files of docs/reading.md's list, numbered in their order."""
    listed = re.findall(r"^\d+\. \[([\w/]+\.py)\]", (ROOT / "docs" / "reading.md").read_text(), re.MULTILINE)
    assert listed[0] == "main.py" and {"transformer/model.py", "transformer/attention.py"} < set(listed)
    assert sum((ROOT / path).read_text().count("\n") for path in listed) <= 1_800


def test_the_tree_of_the_readme_is_the_tree_that_is_there():
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") < 200
    tree = readme.partition("## The tree")[2]
    lines = re.findall(r"^    (\S+?)(?:/| {2,}|, |$)", tree, re.MULTILINE)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    there = {path.partition("/")[0] for path in tracked if not path.startswith(".")}
    named = {name for line in lines for name in ([line] if line != "LICENSE" else [line, "pyproject.toml"])}
    rest = {name for name in there - named if not re.fullmatch(r"requirements.*\.txt|README\.md", name)}
    assert (named - there, rest) == (set(), set())


def test_training_begins_without_what_its_first_steps_do_not_need():
    """Orbax comes with the first row, pictures at the end, and what asks the network when it is asked."""
    code = "import sys, main; from commands.typos import load; load('train'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    later = {"orbax.checkpoint", "matplotlib", "wandb", "torch", "transformers", "urllib.request"}
    assert {"jax", "optax"} < (loaded := set(done.stdout.split())) and not later & loaded
