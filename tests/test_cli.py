"""The command line: what is wrong is one line on stderr and an exit status, never a traceback."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags as absl_flags
from helpers import ROOT, assert_one_line, finished_run, make_text, run_main, tiny_config

import commands.flags
import config_lib
import main
import run_lib
import train_lib
from commands import typos
from configs import default
from runtime import devices
from runtime.errors import StorageError, UserError

DEFAULTS = default.get_config()


def test_help_does_not_wait_for_jax():
    program = "import main, sys; main.main(['--help']); sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)


def test_help_needs_neither_a_path_nor_a_reader():
    with open("/dev/full", "w") as full:
        environment = os.environ | {"PYTHONSAFEPATH": "1"}
        command = [sys.executable, ROOT / "main.py", "--help"]
        done = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail with a status, in one line that begins with `start` and has `words`."""

    def check(argv: list[str], start: str, *words: str, status: int = 2) -> None:
        capsys.readouterr()
        assert main.main(argv) == status
        assert_one_line(capsys.readouterr().err, f"error: {start}", *words)

    return check


@pytest.fixture
def trained(monkeypatch):
    """Stands in for the trainer: the configs and workdirs that it was called with."""
    calls = []
    monkeypatch.setattr(train_lib, "train", lambda config, workdir, **flags: calls.append((config, workdir, flags)))
    return calls


# --- Training: what is given reaches the trainer, or is refused ------------------------------------------------------

WRONG_TYPE = {
    int: ("whole number", ["abc", "1.5", "nan", ""]),
    float: ("number", ["abc", ""]),
    bool: ("True or False", ["maybe", "2", "1.0"]),
    tuple: ("two numbers", ["a,b", "0.9;0.95"]),
}


@pytest.mark.parametrize("key", [key for key, value in DEFAULTS.items() if type(value) in WRONG_TYPE])
def test_a_value_of_the_wrong_type_names_the_key(key, refused, trained):
    expected, texts = WRONG_TYPE[type(DEFAULTS[key])]
    for text in texts:
        refused([f"--config.{key}={text}"], f"config.{key}: ", expected, repr(text))
    assert not trained


@pytest.mark.parametrize("key", [key for key, value in DEFAULTS.items() if type(value) in (int, float)])
def test_any_number_is_taken_or_refused_in_one_line(key, capsys, trained):
    for text in ("-1", "0", "nan", "inf", "-inf", "1e300", "1" + "0" * 30, "9" * 400):
        trained.clear()
        status = main.main([f"--config={ROOT}/configs/default.py", f"--config.{key}={text}"])
        error = capsys.readouterr().err
        if status:
            assert (status, trained) == (2, [])
            assert_one_line(error, "error: config.", key)  # epochs=0 is impossible together with max_steps=0
        else:
            assert error == "" and trained[0][0][key] == float(text) and math.isfinite(float(text))


@pytest.mark.parametrize(
    "argv, start, words",
    [
        (["--config.num_head=2"], "config.num_head: unknown key", "did you mean num_heads?"),
        (["--config.num_head", "2"], "config.num_head: unknown key", "did you mean num_heads?"),
        (["--config.zzzz=2"], "config.zzzz: unknown key", ""),
        (["--config.num_heads=3"], "config.embedding_dim: 128 is not divisible by num_heads 3", "use 129"),
        (["--config.schedule=cosin"], "config.schedule: ", "did you mean cosine?"),
        (["--config=configs/nowhere.py"], "--config=configs/nowhere.py: no such file", "configs/"),
        (["--config=configs"], "--config=configs: no such file", "configs/"),
        (["--wrkdir=a"], "--wrkdir: unknown flag", "did you mean workdir?"),
        (["--lr=0.1"], "--lr: unknown flag", "did you mean --config.lr?"),
        (["--dataset=F"], "--dataset: unknown flag", "did you mean --config.dataset?"),
        (["--learning_rate", "1"], "--learning_rate: unknown flag", "did you mean --config.lr?"),
        (["--config.learning_rate=1"], "config.learning_rate: unknown key", "did you mean lr?"),
        (["--noconfig.use_moun"], "config.use_moun: unknown key", "did you mean use_muon?"),
        (["eval", "--stop=3"], "--stop: unknown flag\n", ""),
        (["plan", "--config.num_blocks=2147483647"], "config.num_blocks: 2147483647 would take", "at most 1000"),
        (["generate"], "generate: unknown command; did you mean sample?", "use one of train, sample, eval"),
        (["--fresh=maybe"], "--fresh=maybe: ", ""),
        (["train", "quickly"], "quickly: not a flag", "--name=value"),
        (["--config.use_muon", "False"], "False: not a flag", "--name=value"),
        (["trian"], "trian: unknown command; did you mean train?", "use one of train, sample, eval"),
        (["--profile_steps=10"], "--profile_steps: ", "FIRST:LAST"),
        (["--profile_steps=15:10"], "--profile_steps: ", "'15:10'"),
        (["--profile_steps=a:b"], "--profile_steps: ", "'a:b'"),
        (["--profile_steps=-1:3"], "--profile_steps: ", "'-1:3'"),
        (["sample", "--num_tokens=-1"], "--num_tokens=-1: ", ""),
        (["sample", "--num_tokens=many"], "--num_tokens=many: ", ""),
        (["sample", "--temperature=nan"], "--temperature: ", "nan"),
        (["sample", "--temperature=-0.5"], "--temperature: ", "-0.5"),
        (["sample", "--top_k=-1"], "--top_k: ", "-1"),
        (["sample", "--top_p=0"], "--top_p: ", "0"),
        (["sample", "--min_p=2"], "--min_p: ", "2"),
        (["sample", "--seed=-1"], "--seed: ", "-1"),
        (["sample", "--config=configs/default.py"], "--config: unknown flag", ""),
        (["sample", "Once upon a time"], "Once upon a time: not a flag", ""),
        (["eval", "--split=tset"], "--split=tset: ", "train"),
        (["eval", "--step=last"], "--step=last: ", ""),
        (["eval", "--workdir=/nowhere/at all"], "--workdir=/nowhere/at all: no such directory", "train first"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(argv, start, words, refused, trained):
    refused(argv, start, words)
    assert not trained


@pytest.mark.parametrize(
    "source, words",
    [
        ("def get_config(:\n", "SyntaxError"),
        ("import no_such_module_anywhere\n", "no_such_module_anywhere"),
        ("def get_config():\n    return 1 / 0\n", "ZeroDivisionError"),
        ("def get_config():\n    raise ValueError('first line\\nsecond line')\n", "second line"),
        (
            "from configs import default\n\n\ndef get_config():\n"
            "    config = default.get_config()\n    config.lr = 'fast'\n    return config\n",
            "'lr'",
        ),
    ],
)
def test_a_broken_config_file_is_named(source, words, tmp_path, refused, trained):
    path = tmp_path / "broken.py"
    path.write_text(source)
    refused([f"--config={path}"], f"--config={path}: ", words)


@pytest.mark.parametrize(
    "line, words",
    [
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import sys; sys.exit()", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("exec('while True: pass')", "not done after 0.3 s; does it loop?"),
        ("get_config()", "RecursionError"),
    ],
)
def test_a_config_file_that_ends_the_program_or_never_ends_is_named(line, words, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(commands.flags, "_CONFIG_SECONDS", 0.3)
    path = tmp_path / "odd.py"
    for source in (f"{line}\n", f"def get_config():\n    {line}\n"):
        if line != "get_config()" or source != f"{line}\n":
            path.write_text(source)
            refused([f"--config={path}"], f"--config={path}: ", words)


def test_ctrl_c_while_a_config_file_runs_is_the_user_s(tmp_path):
    path = tmp_path / "slow.py"
    path.write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    assert main.main([f"--config={path}"]) == 130


def test_mistakes_are_told_without_jax():
    program = "import main, sys; print(main.main(sys.argv[1:])); sys.exit('jax' in sys.modules)"
    for argv in (["--lr=1"], ["generate"], ["--config.learning_rate=1"], ["eval", "--stop=x"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *argv], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout == "2\n" and done.stderr.startswith("error: ")


@pytest.mark.parametrize("command", main.COMMANDS)
def test_the_flags_read_from_the_source_are_those_that_are_there(command):
    values = absl_flags.FlagValues()
    getattr(importlib.import_module(f"commands.{command}"), "_define", lambda values: None)(values)
    found, keys = typos.flags_of(command)
    assert set(values) == {name for name in found if not name.startswith("config")} - typos._OF_ALL.keys()
    assert all((values[name].boolean == (found[name] == "bool")) for name in values)
    if keys:
        assert set(keys) == set(DEFAULTS)
        assert all((found[f"config.{key}"] == "bool") == isinstance(DEFAULTS[key], bool) for key in keys)


def test_a_value_that_looks_like_a_flag_is_none():
    typos.check_words("sample", ["--prompt", "--lr", "--noreplace_unknown", "--", "--x"], ["sample"])
    with pytest.raises(UserError, match="--lr"):
        typos.check_words("sample", ["--replace_unknown", "--lr"], ["sample"])


def test_without_its_packages_the_program_says_what_to_do():
    command = [sys.executable, "-S", str(ROOT / "main.py"), "verify"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": ""}, check=False)
    assert done.returncode == 2
    assert_one_line(done.stderr, f": not installed for {sys.executable}; activate the environment", "pip install -r")


def test_a_config_file_with_an_unknown_key_names_the_key(tmp_path, refused, trained):
    path = tmp_path / "odd.py"
    path.write_text(
        "from configs import default\n\n\ndef get_config():\n"
        "    config = default.get_config()\n    config.num_layer = 3\n    return config\n"
    )
    refused([f"--config={path}"], "config.num_layer: unknown key")


def test_the_config_s_name_elsewhere_on_the_line_stays_as_it_is():
    words = ["--config", "shakespeare", "--workdir", "shakespeare", "--config.run=shakespeare"]
    values = commands.flags.parse_flags("train", "", words, commands.flags.define_checkpoint, config=True)
    assert (values.workdir, values.config.run) == ("shakespeare", "shakespeare") and values.config.num_blocks == 4
    values = commands.flags.parse_flags("eval", "", ["--workdir=~/runs/a"], commands.flags.define_checkpoint)
    assert values.workdir == f"{Path.home()}/runs/a"
    assert str(commands.flags.default_workdir(["-config=configs/enwik8.py"], DEFAULTS)) == "runs/enwik8"


def test_a_wrong_value_is_told_though_another_is_given_as_a_word_of_its_own(refused):
    refused(["--config.num_blocks", "2", "--config.lr=fast"], "config.lr: expected a number, got 'fast'")
    refused(["--config.report", "--config.num_blocks", "two"], "config.num_blocks: expected a whole number, got 'two'")


def test_flags_reach_the_trainer(trained):
    flags = ["--config.lr=0.5", "--config.betas=0.8,0.9", "--config.use_muon=False", "--config.run=a b", "--fresh"]
    assert main.main(flags) == 0
    assert main.main(["train", "--workdir=here", "--profile_steps=3:5", "--noconfig.use_muon", "--rebatch"]) == 0
    (first, first_dir, first_flags), (second, second_dir, second_flags) = trained
    assert (first.lr, first.betas, first.use_muon) == (0.5, (0.8, 0.9), False) and not second.use_muon
    assert (str(first_dir), first_flags) == ("runs/a b", {"fresh": True, "profile": None, "rebatch": False})
    assert (str(second_dir), second_flags) == ("here", {"fresh": False, "profile": (3, 5), "rebatch": True})


def assert_fits_a_screen(text: str, lines: int) -> None:
    assert text.count("\n") <= lines and max(map(len, text.splitlines())) <= 80


def test_help_is_no_error_and_fits_a_screen(capsys):
    for argv in (["--help"], ["-h"], ["help"]):
        assert main.main(argv) == 0
        text = capsys.readouterr().out
        assert_fits_a_screen(text, 23)
        assert all(f"  {name} " in text for name in main.COMMANDS)
    for command in main.COMMANDS:
        with pytest.raises(SystemExit) as done:
            main.main([command, "--help"])
        text = capsys.readouterr().out
        assert done.value.code == 0 and "--debug" in text
        with_keys = "--config=FILE" in text
        assert_fits_a_screen(text, 39 if with_keys else 23)
        if with_keys:
            values = {key: config_lib.written(DEFAULTS[key]) for key in default.MOST_USED}
            assert all(f"    {key}={value} " in text for key, value in values.items())
        assert with_keys == (command in ("train", "sweep", "config", "plan"))


def test_a_bug_is_no_expected_error(monkeypatch, capsys):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(train_lib, "train", broken)
    with pytest.raises(ZeroDivisionError):
        main.main([])
    monkeypatch.setattr(train_lib, "train", lambda *_, **__: (_ for _ in ()).throw(StorageError("x: full")))
    assert main.main([]) == 5 and capsys.readouterr().err == "error: x: full\n"
    with pytest.raises(StorageError):
        main.main(["--debug"])


def test_a_process_ends_with_the_status_and_one_line(tmp_path):
    for argv, environment in ((["--config.num_head=2"], {}), ([f"--workdir={tmp_path}"], {"JAX_PLATFORMS": "abacus"})):
        done = run_main(*argv, **environment)
        assert done.returncode == 2 and done.stdout == ""
        assert_one_line(done.stderr, *environment.values())


# --- Sampling and evaluating ----------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the finished run's directory, to be damaged."""
    return Path(shutil.copytree(finished_run().workdir, tmp_path / "copy"))


def sample(capsys, *flags: str) -> str:
    workdir = finished_run().workdir
    capsys.readouterr()
    assert main.main(["sample", f"--workdir={workdir}", *flags]) == 0
    return capsys.readouterr().out


def test_sample_writes_so_many_tokens_and_the_same_for_a_seed(capsys):
    prompt = "--prompt=The miller"
    first = sample(capsys, prompt, "--num_tokens=40")
    assert first.startswith("The miller") and len(first) == len("The miller") + 40 + len("\n")
    assert sample(capsys, prompt, "--num_tokens=40") == first
    assert sample(capsys, prompt, "--num_tokens=40", "--seed=1") != first
    greedy = sample(capsys, prompt, "--num_tokens=40", "--temperature=0")
    assert sample(capsys, prompt, "--num_tokens=40", "--temperature=0", "--seed=1") == greedy
    assert sample(capsys, prompt, "--num_tokens=0") == "The miller\n"


def test_sample_needs_known_characters_unless_told_to_replace_them(capsys, refused):
    workdir = f"--workdir={finished_run().workdir}"
    refused(["sample", workdir, "--prompt=A µ!"], "--prompt: ", "'µ' at 2", "--replace_unknown")
    assert sample(capsys, "--prompt=A µ!", "--replace_unknown", "--num_tokens=0") == "A   \n"


def test_a_long_prompt_is_cut_with_a_note(capsys):
    workdir = finished_run().workdir
    capsys.readouterr()
    assert main.main(["sample", f"--workdir={workdir}", "--prompt=" + "at " * 9, "--num_tokens=1"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("at " * 9) and "27 tokens" in output.err and "last 16" in output.err


def test_sample_stops_quietly_when_nobody_reads():
    command = [sys.executable, str(ROOT / "main.py"), "sample", f"--workdir={finished_run().workdir}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, "--num_tokens=100000"], stdin=subprocess.DEVNULL, **pipes) as process:
        assert process.stdout.read(5)
        process.stdout.close()
        assert process.wait(60) == 0 and process.stderr.read() == b""


def test_what_cannot_be_read_back_is_named(copy, refused):
    for command in ("sample", "eval"):
        refused([command, f"--workdir={copy}", "--step=17"], str(copy), "no such checkpoint", "30", status=3)
    (copy / "tokenizer.json").write_text("{}")
    refused(["sample", f"--workdir={copy}"], str(copy / "tokenizer.json"), "not a saved tokenizer")
    shutil.copy(finished_run().workdir / "tokenizer.json", copy)
    shutil.rmtree(copy / "checkpoints")
    refused(["sample", f"--workdir={copy}"], str(copy), "no checkpoints", status=3)
    (copy / "checkpoints").mkdir()
    refused(["eval", f"--workdir={copy}"], str(copy), "no checkpoint", status=3)
    for content in ("", "{", "[]", '{"config": 3}', '{"config": {"zork": 3}}'):
        (copy / "config.json").write_text(content)
        refused(["sample", f"--workdir={copy}"], "", "config")
    (copy / "config.json").unlink()
    refused(["eval", f"--workdir={copy}"], str(copy / "config.json"))


def test_eval_of_each_split_and_checkpoint(capsys, refused):
    run = finished_run()
    data = run_lib.load_data(tiny_config(), say=print)
    capsys.readouterr()
    results = {}
    for name, flags in (("val", []), ("train", ["--split=train"]), ("earlier", ["--step=28"])):
        assert main.main(["eval", f"--workdir={run.workdir}", *flags]) == 0
        results[name] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["val"]["loss"] == pytest.approx(run.best_val_loss, abs=1e-6)
    assert results["val"]["tokens"] == data.val.num_tokens - 1
    assert results["train"]["tokens"] == data.train.num_tokens - 1
    assert (results["earlier"]["step"], results["val"]["step"]) == (28, run.best_step)
    assert results["earlier"]["loss"] > results["val"]["loss"]
    refused(["eval", f"--workdir={run.workdir}", "--split=test"], "--split=test: ", "test_fraction")


def evaluate(capsys, *flags: str, workdir: Path | None = None) -> dict:
    finished_run()
    capsys.readouterr()
    assert main.main(["eval", f"--workdir={workdir or finished_run().workdir}", *flags]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_eval_scores_any_text_whole(tmp_path, capsys, refused):
    """The exact loss of a text of its own, shorter than a window or longer, by a sum over its tokens."""
    model, tokenizer, _, _ = run_lib.load_model(finished_run().workdir)
    for text in ("My aunt", "The miller forgets two eels at 7.\nA heron finds it at 2.\n"):
        (tmp_path / "other.txt").write_text(text)
        (tmp_path / "tokens.jsonl").unlink(missing_ok=True)
        tokens = f"--tokens={tmp_path / 'tokens.jsonl'}"
        result = evaluate(capsys, f"--dataset={tmp_path / 'other.txt'}", tokens)
        assert (result["split"], result["tokens"]) == ("all", len(text) - 1)
        ids, losses = tokenizer.encode(text).tolist(), []
        for start in range(0, len(ids) - 1, 16):
            window = np.array([ids[start : start + 17]])
            log_probs = np.asarray(jax.nn.log_softmax(model(window[:, :-1])))[0]
            losses += [float(-row[target]) for row, target in zip(log_probs, window[0, 1:], strict=True)]
        assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert result["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
        assert result["bits_per_byte"] == pytest.approx(np.mean(losses) / np.log(2), rel=1e-5)  # ASCII by characters
        rows = [json.loads(line) for line in (tmp_path / "tokens.jsonl").read_text().splitlines()]
        assert "".join(row["text"] for row in rows) == text and [row["id"] for row in rows] == ids
        assert [row["token"] for row in rows] == list(range(len(text))) and rows[0]["log_prob"] is None
        np.testing.assert_allclose([-row["log_prob"] for row in rows[1:]], losses, rtol=0, atol=1e-5)
    flags = ["eval", f"--workdir={finished_run().workdir}", f"--dataset={tmp_path / 'other.txt'}"]
    refused([*flags, tokens], f"{tokens}: is there already; name a new file")
    (tmp_path / "other.txt").write_text("A µ heron")
    refused(flags, f"--dataset: {tmp_path}/other.txt: ", "'µ' at 2", "set --unknown_characters to replace or drop")
    assert evaluate(capsys, flags[2], "--unknown_characters=drop")["tokens"] == len("A  heron") - 1
    assert evaluate(capsys, flags[2], "--unknown_characters=replace")["tokens"] == len("A   heron") - 1
    (tmp_path / "other.txt").write_text("A")
    refused(flags, "--dataset: ", "other.txt has 1 in the whole text", "give two tokens or more")
    refused([*flags[:2], "--dataset=gone.txt"], "--dataset: no file 'gone.txt'")


def test_eval_wants_the_runs_own_text_wherever_it_lies(copy, tmp_path, capsys, refused):
    """The bytes decide: the same elsewhere are the run's, others in their place are not."""
    own = evaluate(capsys)
    (tmp_path / "moved.txt").write_text(make_text())
    assert evaluate(capsys, f"--dataset={tmp_path / 'moved.txt'}") == own
    saved = json.loads((copy / "config.json").read_text())
    saved["config"]["dataset"] = str(tmp_path / "moved.txt")
    (copy / "config.json").write_text(json.dumps(saved))
    assert evaluate(capsys, workdir=copy) == own
    assert evaluate(capsys, "--split=all", workdir=copy)["tokens"] == len(make_text()) - 1
    (tmp_path / "moved.txt").write_text(make_text(seed=1))
    refused(
        ["eval", f"--workdir={copy}"], "--dataset: the text has changed since this run began", "name it as --dataset"
    )
    changed = evaluate(capsys, f"--dataset={tmp_path / 'moved.txt'}", "--split=val", workdir=copy)
    assert changed["split"] == "val" and changed["loss"] != own["loss"]
    (tmp_path / "moved.txt").unlink()
    refused(["eval", f"--workdir={copy}"], "--dataset: no file", "moved.txt")


# --- Devices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cpu_devices, batch_size, cores, flags, expected",
    [
        ("auto", 12, 8, "", ([6], "--xla_cpu_multi_thread_eigen=false")),
        ("auto", 7, 4, "--a=b", ([1], "--a=b")),
        ("3", 7, 1, "--a=b", ([3], "--a=b --xla_cpu_multi_thread_eigen=false")),
        ("3", 6, 8, "--xla_force_host_platform_device_count=2", ([], "--xla_force_host_platform_device_count=2")),
    ],
)
def test_cores_become_devices_before_jax_starts(monkeypatch, cpu_devices, batch_size, cores, flags, expected):
    counts = []
    monkeypatch.setattr(devices, "_show_cpu_devices", lambda count: counts.append(count) or True)
    monkeypatch.setattr(devices, "physical_cores", lambda: cores)
    monkeypatch.setenv("XLA_FLAGS", flags)
    devices.set_up_cpu_devices(cpu_devices, batch_size, warn=pytest.fail)
    assert (counts, devices.os.environ["XLA_FLAGS"]) == expected
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "5")  # a user's own
    devices.set_up_cpu_devices(cpu_devices, batch_size, warn=pytest.fail)
    assert counts == expected[0]


def test_a_new_process_shows_the_devices_asked_for():
    code = (
        "import jax; from runtime import devices; devices.set_up_cpu_devices('3', 6, print); print(jax.device_count())"
    )
    usual = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=usual, capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"


def test_jax_that_is_running_stays_as_it_is(monkeypatch):
    jax.devices()
    warnings = []
    monkeypatch.setenv("XLA_FLAGS", "--other")
    devices.set_up_cpu_devices(str(jax.device_count()), 1000, warnings.append)
    assert warnings == []
    devices.set_up_cpu_devices(str(jax.device_count() + 1), 1000, warnings.append)
    assert len(warnings) == 1 and devices.os.environ["XLA_FLAGS"] == "--other"


def test_there_is_a_core_at_least():
    assert 1 <= devices.physical_cores() <= (devices.os.cpu_count() or 1)


def test_a_platform_that_is_not_there_is_named(monkeypatch):
    def missing():
        raise RuntimeError("Unable to initialize backend\nabacus")

    monkeypatch.setattr(jax, "devices", missing)
    monkeypatch.setenv("JAX_PLATFORMS", "abacus")
    with pytest.raises(UserError, match=r"^JAX_PLATFORMS=abacus: [^\n]*$"):
        devices.start_jax()
