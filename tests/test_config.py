"""Every key is documented and read, every config is possible, and what is impossible is one clear line."""

import ast
import importlib
import json
import math
import re
import tokenize
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
from helpers import assert_possible_or_refused, finished_run, tiny_config

import config_lib
from commands import flags
from configs import default, finetune, ladder, shakespeare
from runtime.errors import UserError
from runtime.trackers import TRACKERS
from training.optimizer import GROUPS, OptimizerConfig
from transformer.config import TransformerConfig
from transformer.sharding import mesh_sizes

ROOT = Path(__file__).parent.parent
KEYS = list(default.get_config())
MODEL = partial(TransformerConfig, 7)
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
ORIGINAL = (
    *("num_blocks", "num_heads", "embedding_dim", "mlp_dim", "context_len", "batch_size", "epochs", "max_steps", "lr"),
    *("muon_lr", "muon_momentum", "betas", "eps", "weight_decay", "use_muon", "accumulation_steps", "lr_warmup_ratio"),
    *("min_lr_ratio", "tokenizer", "dataset", "temperature", "run", "wandb_enabled", "save_every"),
    "print_per_layer_params",
)


def another(value: object) -> object:
    """A value of the same type that is not this one."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "x"
        case tuple():
            return (0.5, 0.5)


# --- The keys -------------------------------------------------------------------------------------------------------


def test_every_key_is_documented_where_it_is_set():
    with (ROOT / "configs" / "default.py").open("rb") as file:
        tokens = list(tokenize.tokenize(file.readline))
    commented = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    found = {
        match[1]: number
        for number, line in enumerate((ROOT / "configs" / "default.py").read_text().splitlines(), 1)
        if (match := re.match(r" +config\.(\w+) = ", line))
    }
    assert sorted(found) == KEYS
    assert [key for key, number in found.items() if number not in commented] == []


def reads(tree: ast.AST) -> set[str]:
    """Keys that are read from a config, or from `Wanted`, which is made of one: config.KEY, self.config.KEY, c.KEY and
    the like; checks do not count."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and re.match("_?check", node.name):
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            base = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            if base in ("config", "c", "wanted"):
                found.add(node.attr)
        found |= reads(node)
    return found


def product_files() -> list[Path]:
    folders = (
        ROOT / name for name in ("commands", "corpus", "interop", "reports", "runtime", "training", "transformer")
    )
    return [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]


def test_every_key_is_read():
    assert reads(ast.parse("def check(config): config.lr\ndef f(c): return self.config.eps + c.seed")) == {
        "eps",
        "seed",
    }
    sources = {path: path.read_text() for path in product_files()}
    read = set().union(*(reads(ast.parse(text)) for text in sources.values()))
    read |= {f"{name}_enabled" for name in TRACKERS} | {group.rate for group in GROUPS.values()}
    # The classes hand some fields out under their own names.
    for config_class in (TransformerConfig, OptimizerConfig):
        body = (ROOT / Path(*config_class.__module__.split("."))).with_suffix(".py").read_text()
        node = next(n for n in ast.parse(body).body if isinstance(n, ast.ClassDef) and n.name == config_class.__name__)
        methods = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name != "__post_init__"]
        own = {n.attr for m in methods for n in ast.walk(m) if isinstance(n, ast.Attribute)}
        read |= own & {field.name for field in fields(config_class)}
    assert sorted(set(KEYS) - read) == []


def test_the_originals_flags_are_keys():
    assert set(ORIGINAL) - set(KEYS) == set()


def test_the_tables_name_only_keys_and_every_number_has_a_range():
    of_fields = [{field.name: field.type for field in fields(part)} for part in (TransformerConfig, OptimizerConfig)]
    types = [config_lib.RANGES, *of_fields]
    ranged = [key for part in types for key, kind in part.items() if hasattr(kind, "__metadata__")]
    assert len(ranged) == len(set(ranged))
    numbers = {key for key, value in default.get_config().items() if type(value) in (int, float)}
    assert set(ranged) == numbers | {"vocab_size"}
    assert set(KEYS) >= config_lib.FREE_ON_RESUME | set(config_lib.CHOICES)


def test_the_defaults_of_the_classes_are_those_of_the_config():
    """But for the dtype, which a config may leave to the device."""
    own = {field.name: field.default for part in (TransformerConfig, OptimizerConfig) for field in fields(part)}
    assert own.keys() - set(KEYS) == {"vocab_size", "document_start", "answer_start", "answer_end"}
    differ = {name: (own[name], value) for name, value in default.get_config().items() if own.get(name, value) != value}
    assert differ == {"dtype": ("float32", "auto")}


@pytest.mark.parametrize(
    "make, name, value",
    [
        *(
            (partial(TransformerConfig, 7), *bad)
            for bad in [("num_blocks", 0), ("sliding_window", -1), ("dropout", 1.0)]
        ),
        *(
            (partial(TransformerConfig, 7), *bad)
            for bad in [("norm_eps", 0.0), ("rope_theta", 1.0), ("head_dim", 2**31)]
        ),
        *((OptimizerConfig, *bad) for bad in [("lr", math.nan), ("newton_schulz_steps", 0), ("betas", (0.9, 1.0))]),
        *((OptimizerConfig, *bad) for bad in [("grad_clip", math.inf), ("min_lr_ratio", 1.5), ("muon_momentum", -0.5)]),
    ],
)
def test_a_class_refuses_what_its_config_does_in_the_same_words(make, name, value):
    with pytest.raises(ValueError, match=rf"^{name}: must be [^\n]*$") as refused:
        make(**{name: value})
    config = default.get_config()
    config[name] = value
    with pytest.raises(UserError) as by_config:
        config_lib.check(config)
    assert str(by_config.value) == f"config.{refused.value}"


# --- The configs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_possible_and_survives_json(name):
    get_config = importlib.import_module(f"configs.{name}").get_config
    config = get_config(str(finished_run().workdir)) if name in ("finetune", "chat") else get_config()
    before = config_lib.to_dict(config)
    config_lib.check(config)
    assert config_lib.to_dict(config) == before
    again = config_lib.from_dict(json.loads(json.dumps(before)))
    assert again == config and [type(again[key]) for key in KEYS] == [type(config[key]) for key in KEYS]


def test_finetune_takes_the_model_of_a_run_and_nothing_else_of_it(tmp_path):
    run = finished_run()
    config, begun_with = finetune.get_config(str(run.workdir)), tiny_config()
    assert config.init_from == str(run.workdir) and config.tokenizer == begun_with.tokenizer
    shape = {field.name for field in fields(TransformerConfig)}
    differing = [key for key in KEYS if config[key] != begun_with[key]]
    assert not shape & set(differing) and {"lr", "dataset", "batch_size", "save_every", "max_steps"} <= set(differing)
    with pytest.raises(UserError, match=r"write configs/finetune.py:RUN"):
        finetune.get_config()
    with pytest.raises(UserError, match="no/run"):
        finetune.get_config("no/run")
    for no_run in ('{"model_type": "llama"}', '{"config": [1]}'):
        (tmp_path / "config.json").write_text(no_run)
        with pytest.raises(UserError, match=f"python main.py import --from={tmp_path}"):
            finetune.get_config(str(tmp_path))


def test_the_ladder_goes_through_the_model_of_the_recipe():
    made, tuned = ladder.get_config(), shakespeare.get_config()
    length = {"max_steps", "eval_every", "save_every", "weight_decay", "muon_lr"}
    assert {key for key in KEYS if made[key] != tuned[key]} == {*length, "head_dim"}
    assert made.head_dim == tuned.embedding_dim // tuned.num_heads
    assert (made.max_steps, made.muon_lr, made.weight_decay) == (1024, 0.01, 0.0977)


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 6, 8, 16, 99])
def test_all_follows_from_the_depth_by_the_rules_that_it_states(depth):
    c, base = ladder.get_config(str(depth)), ladder.get_config("4")
    config_lib.check(c)
    shape = c.num_blocks, c.num_heads, c.head_dim, c.embedding_dim, c.mlp_dim
    assert shape == (depth, depth, 32, 32 * depth, 128 * depth)
    tokens = lambda c: c.max_steps * c.batch_size * c.context_len
    assert tokens(c) == pytest.approx(2**18 * depth, rel=2e-3)
    assert c.batch_size % 2 == 0 and abs(c.batch_size - 16 * (depth / 4) ** 0.383) <= 1
    assert c.muon_lr / c.batch_size**0.5 == pytest.approx(base.muon_lr / 16**0.5, rel=1e-3)
    assert c.lr / c.batch_size**0.5 * c.embedding_dim**0.5 == pytest.approx(base.lr / 16**0.5 * 128**0.5, rel=3e-3)
    assert 1 / (c.muon_lr * c.weight_decay) == pytest.approx(c.max_steps, rel=3e-2)
    assert c.save_every == c.eval_every == math.ceil(c.max_steps / 4)


@pytest.mark.parametrize("depth", ["", "0", "-2", "4.0", "100", "four", "\u0664", "4\n", "9" * 5000])
def test_a_depth_that_is_none_is_refused(depth):
    with pytest.raises(UserError, match=r"^--config=configs/ladder\.py:DEPTH: a whole number .*, got .{2,22}$"):
        ladder.get_config(depth)


def test_from_dict_fills_in_new_keys_and_refuses_unknown_ones():
    saved = config_lib.to_dict(default.get_config())
    del saved["keep"]
    assert config_lib.from_dict(saved) == default.get_config()
    for odd in ({"zork": 1}, {"lr": "fast"}, {"lr": -1.0}, {"num_blocks": 2.5}, {"use_muon": "no"}):
        with pytest.raises(UserError, match=rf"^config\.{next(iter(odd))}: [^\n]*$"):
            config_lib.from_dict(saved | odd)


# --- Checking -------------------------------------------------------------------------------------------------------


def test_a_mesh_is_checked_against_the_devices():
    config = default.get_config()
    config.batch_size = 6
    sizes = lambda text, devices: tuple(mesh_sizes(text, devices).values())
    assert sizes("", 6) == (6, 1, 1, 1) and sizes("tensor=2, data=3", 6) == (3, 1, 1, 2)
    assert sizes("data=-1,sequence=5,fsdp=2", 30) == (3, 2, 5, 1) and sizes("fsdp=-1", 1) == (1, 1, 1, 1)
    for text, devices, wrong in [
        ("data=2,fsdp=2", 8, r"'data=2,fsdp=2' needs 4 devices and there are 8; "),
        ("data=-1,tensor=4", 6, r"'data=-1,tensor=4' needs a multiple of 4 devices and there are 6; "),
        ("fsdp=8", 1, r"'fsdp=8' needs 8 devices and there is 1; "),
    ]:
        config.mesh = text
        with pytest.raises(UserError, match=rf"^config\.mesh: {wrong}"):
            config_lib.check_devices(config, devices)
    config.mesh = "data=2,fsdp=2,tensor=2"
    with pytest.raises(UserError, match=r"^config\.batch_size: 6 is not divisible by 4 devices; use 4 or 8$"):
        config_lib.check_devices(config, 8)
    config.mesh = "data=2,fsdp=3,tensor=8"  # rows are split over the first two axes alone
    config_lib.check_devices(config, 48)


@pytest.mark.parametrize("old, name", [(True, "logit"), (False, "none"), ("True", "logit"), ("false", "none")])
def test_true_and_false_stay_names_for_sinks_and_none(old, name):
    config = default.get_config()
    config.attention_sink = old
    config_lib.check(config)
    assert config_lib.to_dict(config)["attention_sink"] == name
    assert config_lib.transformer_config(config, 7, "float32").attention_sink == name
    present = default.get_config()
    present.attention_sink = name
    config_lib.check_resume(config, present, Path("runs/old"))


@pytest.mark.parametrize("key", KEYS)
def test_any_number_in_any_key_is_possible_or_refused_in_one_line(key):
    for value in (-1, 0, 10**30, -1.0, 0.0, math.nan, math.inf, 1e300, True, None, "", "?", (), (1.0, math.nan)):
        assert_possible_or_refused(key, value)


@pytest.mark.parametrize(
    "changes, key, words",
    [
        ({"num_heads": 3}, "embedding_dim", "128 is not divisible by num_heads 3; use 129"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads", "3 does not divide num_heads 4"),
        ({"head_dim": 5, "position": "rope"}, "head_dim", "even"),
        ({"window_pattern": "LX"}, "window_pattern", "'LX'"),
        ({"epochs": 0, "max_steps": 0}, "max_steps", "never end"),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "val_fraction", "< 1"),
        ({"schedule": "cosin"}, "schedule", "did you mean cosine?"),
        ({"order": "zigzag"}, "order", "use one of shuffle, sequential, random"),
        ({"betas": (0.9, 1.0)}, "betas", "below 1"),
        ({"cpu_devices": "many"}, "cpu_devices", "auto"),
        ({"cpu_devices": "1000000"}, "cpu_devices", "batch_size"),
        ({"mesh": "data=2,pipeline=4"}, "mesh", "unknown axis 'pipeline'; name each of data, fsdp, sequence, tensor"),
        ({"mesh": "fsdp=2,fsdp=4"}, "mesh", "twice"),
        ({"mesh": "data=0"}, "mesh", "data must be a whole number from 1"),
        ({"mesh": "tensor"}, "mesh", "tensor must be a whole number from 1"),
        ({"mesh": "data=-1,fsdp=-1"}, "mesh", "only one axis"),
        ({"run": "a/b"}, "run", "--workdir"),
        ({"sample_prompt": ""}, "sample_prompt", "empty"),
    ],
)
def test_what_is_impossible_together_is_named(changes, key, words):
    config = default.get_config()
    config.update(changes)
    with pytest.raises(UserError, match=rf"^config\.{key}: [^\n]*$") as refused:
        config_lib.check(config)
    assert words in str(refused.value)


def test_a_batch_must_split_over_the_devices():
    config = default.get_config()
    config.batch_size = 10
    config_lib.check_devices(config, 5)
    with pytest.raises(UserError, match=r"^config\.batch_size: 10 is not divisible by 8 devices; use 8 or 16$"):
        config_lib.check_devices(config, 8)
    with pytest.raises(UserError, match=r"use 16$"):
        config_lib.check_devices(config, 16)


# --- Resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_a_resume_may_change_how_a_run_is_watched_and_nothing_else(key):
    old, new = default.get_config(), default.get_config()
    new[key] = another(old[key])
    if key in config_lib.FREE_ON_RESUME:
        config_lib.check_resume(old, new, Path("runs/a"))
        return
    with pytest.raises(UserError, match=rf"^config\.{key}: [^\n]*$") as refused:
        config_lib.check_resume(old, new, Path("runs/a"))
    message = str(refused.value)
    assert message.index(repr(old[key])) < message.index(repr(new[key]))
    assert all(way in message for way in ("--workdir", "--fresh", "--config.init_from=runs/a"))


@pytest.mark.parametrize(
    "schedule, possible", [("constant", True), ("constant_linear", True), ("cosine", False), ("linear", False)]
)
@pytest.mark.parametrize("key", ["max_steps", "epochs"])
def test_which_schedules_allow_another_length(schedule, possible, key):
    old, new = default.get_config(), default.get_config()
    old.schedule = new.schedule = schedule
    old[key], new[key] = 6, 8
    if possible:
        config_lib.check_resume(old, new, Path("a"))
        return
    with pytest.raises(UserError, match=rf"^config\.{key}: .*'{schedule}' .* 6, .* 8 .*init_from=a$"):
        config_lib.check_resume(old, new, Path("a"))


@pytest.mark.parametrize(
    "argv, run, workdir",
    [
        ([], "", "runs/shakespeare"),
        (["--config=configs/enwik8.py"], "", "runs/enwik8"),
        (["--config", "configs/enwik8.py"], "", "runs/enwik8"),
        (["--config=configs/enwik8.py"], "with sinks", "runs/with sinks"),
        (["--config=configs/default.py", "--config=configs/enwik8.py"], "", "runs/enwik8"),  # the last one counts
    ],
)
def test_the_workdir_is_named_after_the_config_or_the_run(argv, run, workdir):
    config = default.get_config()
    config.run = run
    assert flags.default_workdir(argv, config) == Path(workdir)
