"""The shape of the source: imports run one way, and what was read as data is never run."""

import ast
import graphlib
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the top down: a module imports only what stands below it. A name stands for a module or for a package's modules;
# those of one package may import each other, but never in a circle.
LAYERS = [
    *("benchmarks", "main", "commands", "train_lib", "dispatch_lib", "eval_lib", "report_lib", "compare_lib"),
    *("planning", "talk_lib", "panels_lib", "run_lib", "sink_lib"),
    *("step_lib", "corpus", "config_lib", "config_docs", "configs", "input_pipeline", "runtime", "transformer"),
]
INSIDE_TRANSFORMER = [
    *({"sampling", "step", "sinks", "cost", "interop", "interop_tokenizer"}, {"optimizer", "interop_families", "loss"}),
    *({"health"}, {"model"}, {"layers", "flash"}, {"plain"}, {"attention", "rotary"}),
    *({"tokenizer", "dense"}, {"sharding"}),
]
READ_IN_AN_EVENING = [
    *("main", "train_lib", "input_pipeline"),
    *("transformer.model", "transformer.attention", "transformer.optimizer", "transformer.sampling"),
]
OUTSIDE_WORLD = {"os", "sys", "pathlib", "shutil", "logging", "absl", "ml_collections", "orbax", "rich", "wandb"}


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
            if target == "runtime.errors":
                fine = True
            elif package == other == "transformer" and inner != "__init__":
                rank = {module: i for i, group in enumerate(INSIDE_TRANSFORMER) for module in group}
                fine = rank[inner] < rank[other_inner]
            elif package == other:
                fine = package != "commands"
            else:
                fine = LAYERS.index(package) < LAYERS.index(other)
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
        ("transformer.tokenizer", "from runtime import files"),
        ("transformer.model", "from . import step"),
        ("transformer.attention", "from .model import MLP"),
        ("transformer.step", "import config_lib"),
        ("config_lib", "def late():\n    from run_lib import load_model"),
        ("commands.eval", "from commands import sample"),
        ("runtime.errors", "from runtime.files import read_json"),
        ("input_pipeline", "from configs import default\nimport config_lib"),
    ],
)
def test_a_planted_back_arrow_is_seen(name, line):
    sources = read_sources()
    sources[name] += f"\n{line}\n"
    assert back_arrows(sources)


def test_errors_imports_nothing_and_the_transformer_knows_no_world_outside():
    sources = read_sources()
    assert imports_of("runtime.errors", sources["runtime.errors"]) == set()
    for name, source in sources.items():
        roots, package = roots_of(name, source), name.partition(".")[0]
        if package == "transformer":
            called = {getattr(call.func, "id", "") for call in calls_of(source)}
            assert not roots & OUTSIDE_WORLD and not called & {"print", "open"}, name
        if package in ("transformer", "runtime", "input_pipeline"):
            assert "ml_collections" not in roots, f"{name} sees the whole config"
        assert name == "runtime.checkpoint" or "orbax" not in roots, name


def test_what_is_read_is_never_run():
    for name, source in read_sources().items():
        assert not roots_of(name, source) & {"pickle", "marshal", "shelve", "dill"}, name
        for call in calls_of(source):
            where = f"{name}:{call.lineno}"
            assert getattr(call.func, "id", "") not in ("eval", "exec", "compile"), where
            assert not any(keyword.arg == "allow_pickle" for keyword in call.keywords), where


def test_torch_reads_tensors_and_nothing_else():
    calls = [ast.unparse(call) for source in read_sources().values() for call in calls_of(source)]
    loads = [call for call in calls if call.startswith("torch.load(")]
    assert loads and all("weights_only=True" in call for call in loads), loads


def test_an_installed_copy_has_every_module():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(listed["py-modules"]) == {path.stem for path in ROOT.glob("*.py")}
    packages = {path.parent.name for path in ROOT.glob("*/*.py")} - {
        "tests",
        "benchmarks",
        "docs",
        "launch",
        "notebooks",
    }
    assert set(listed["packages"]) == packages


def test_the_source_can_be_read_in_an_evening():
    lines = {name: source.count("\n") for name, source in read_sources().items()}
    assert sum(lines[name] for name in READ_IN_AN_EVENING) < 1_800
