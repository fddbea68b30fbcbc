"""A real step's sequences in parts: how many at once fit the devices, and that the run is the one of those parts."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import assert_same_state, losses, tiny_config, train_until

import config_lib
import run_lib
import train_lib
from commands.plan import plan_step
from runtime import devices
from runtime.errors import UserError
from training import micro_batch
from training.micro_batch import largest_part, program_bytes
from training.optimizer import OptimizerConfig
from transformer.sharding import DATA, FSDP, make_mesh

CHANGES = {
    "use_muon": False,
    "context_len": 64,
    "max_steps": 5,
    "eval_every": 3,
    "save_every": 3,
    "sample_every": 0,
    "sample_tokens": 1,
}


@pytest.fixture
def sized(monkeypatch):
    """`largest_part` of 12 sequences where a compiled step takes 100 bytes each and the rule says 110."""
    looked_at = []

    def program(step, batch_size, context_len, mesh):
        assert step.state == 12 // batch_size
        looked_at.append(batch_size)
        if batch_size == refused:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")
        return batch_size

    def choose(memory, parts=1, compiles=True, no_room=0):
        nonlocal refused
        refused = no_room
        looked_at.clear()
        mesh = SimpleNamespace(shape={DATA: parts, FSDP: 1})
        build = lambda settings: SimpleNamespace(state=settings.accumulation_steps)
        model = SimpleNamespace(context_len=8)
        return largest_part(OptimizerConfig(), model, 12, build, mesh, memory, compiles), list(looked_at)

    refused = 0
    monkeypatch.setattr(micro_batch, "compiled", program)
    monkeypatch.setattr(micro_batch, "program_bytes", lambda size: 100 * size)
    monkeypatch.setattr(micro_batch, "held_bytes", lambda settings, model, size, state, mesh: {"all": 110 * size})
    return choose


def test_the_largest_part_that_fits_is_taken(sized):
    assert sized(1400) == (12, [12])
    assert sized(1300) == (6, [12, 6])
    assert sized(667) == (6, [6])  # the rule says of 12 that they cannot fit
    assert sized(666) == (4, [6, 4])
    assert sized(445, parts=2) == (4, [4]) and sized(334, parts=2) == (2, [2])  # 3 cannot be divided by two devices
    assert sized(1400, compiles=False) == (6, []) and sized(1467, compiles=False) == (12, [])
    assert sized(1400, no_room=12) == (6, [12, 6])
    with pytest.raises(UserError, match=r"^config\.micro_batch: 2 sequences at once need .* GiB on each device"):
        sized(222, parts=2)


def test_the_smallest_memory_of_all_processes_decides(sized, monkeypatch):
    memory = iter([1 / 3])
    monkeypatch.setattr(micro_batch, "from_all", lambda own: np.stack([own, own * next(memory, 1)]))
    assert sized(1400)[0] == 4


def test_processes_whose_compilers_differ_take_the_same_part(sized, monkeypatch):
    """The other needs a tenth more than this one, which alone would take 12."""
    of_other = iter([1, *[1.1] * 9])
    monkeypatch.setattr(micro_batch, "from_all", lambda own: np.stack([own, own * next(of_other)]))
    assert sized(1400) == (6, [12, 6])


@pytest.fixture
def room_for_2(monkeypatch):
    """Devices in which the first program that is compiled has no room, and the second has."""
    sizes = iter([1e9, 8e8])
    monkeypatch.setattr(devices, "memory_available", lambda: 1e9)
    monkeypatch.setattr(micro_batch, "program_bytes", lambda program: program_bytes(program) and next(sizes))


def test_a_run_is_that_of_the_parts_found_and_keeps_them(room_for_2, tmp_path, capsys, monkeypatch):
    """To the bit, also cut within a real step and resumed where more fits."""
    auto = tiny_config(**CHANGES, batch_size=4, micro_batch="auto")
    train_until(7, auto, tmp_path / "auto")
    monkeypatch.setattr(devices, "memory_available", lambda: 1 << 60)
    train_lib.train(auto, tmp_path / "auto")
    began, went_on = capsys.readouterr().out.split("saved step 3")
    assert "micro_batch auto: 2 sequences at once" in began and "micro_batch auto" not in went_on
    assert began.count(said := "2 sequences of 64 tokens, 2 a step") == went_on.count(said) == 1
    kept = run_lib.read_config(tmp_path / "auto")
    assert (kept.batch_size, kept.accumulation_steps, kept.micro_batch) == (2, 2, "")

    divided = tiny_config(**CHANGES, batch_size=2, accumulation_steps=2)
    reference = train_lib.train(divided, tmp_path / "divided")
    assert losses(tmp_path / "auto") == losses(tmp_path / "divided")
    assert_same_state(tmp_path / "auto", reference, divided, 10)

    assert [run_lib.batch_to_share(auto, tmp_path / name) for name in ("auto", "new")] == [2, 4]  # among CPU devices
    *_, meta = run_lib.load_model(tmp_path / "auto", 10)
    other = tiny_config(**CHANGES, batch_size=5, micro_batch="auto")
    assert run_lib.in_parts_as_began(other, meta, tmp_path).batch_size == 1  # what divides 2 and 5
    with pytest.raises(UserError, match=r"config\.accumulation_steps: .* has 2, this config 3; use --rebatch"):
        train_lib.train(tiny_config(**CHANGES, batch_size=6, micro_batch="auto"), tmp_path / "auto")


def test_a_number_is_another_way_to_say_it():
    by_number = config_lib.in_parts(tiny_config(batch_size=12, micro_batch="3"))
    assert by_number.to_dict() == tiny_config(batch_size=3, accumulation_steps=4).to_dict()
    auto = tiny_config(batch_size=12, micro_batch="auto")
    assert config_lib.in_parts(auto) is auto


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"micro_batch": "3"}, "micro_batch"),
        ({"micro_batch": "0"}, "micro_batch"),
        ({"micro_batch": "most"}, "micro_batch"),
        ({"micro_batch": "auto", "accumulation_steps": 2}, "accumulation_steps"),
    ],
)
def test_what_means_nothing_is_refused(changes, key):
    with pytest.raises(UserError, match=rf"^config\.{key}: "):
        config_lib.check(tiny_config(**changes))


def test_plan_divides_by_its_rule():
    config, mesh = tiny_config(**CHANGES, batch_size=4, micro_batch="auto"), make_mesh(devices=jax.devices()[:1])
    whole = plan_step(config, 34, None, mesh)
    assert whole.config.batch_size == 4
    memory = sum(whole.memory.values())  # of which a tenth stays free
    divided = plan_step(config, 34, None, mesh, memory)
    assert (divided.config.batch_size, divided.config.accumulation_steps, divided.tokens) == (2, 2, whole.tokens)


def test_files_in_a_container_s_memory_are_as_good_as_free(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "_CGROUP", str(tmp_path / "memory"))
    for name, text in (("max", "3000000\n"), ("current", "2900000\n"), ("stat", "anon 5\ninactive_file 900000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert devices.memory_available() == 1_000_000 // jax.local_device_count()
    (tmp_path / "memory.stat").unlink()  # some sandboxes do not show it; the limit holds there too
    assert devices.memory_available() == 100_000 // jax.local_device_count()


def test_memory_that_is_available_is_no_more_than_the_machine_has():
    machine = devices.os.sysconf("SC_PAGE_SIZE") * devices.os.sysconf("SC_PHYS_PAGES")
    assert 2**20 < devices.memory_available() <= machine // jax.local_device_count()


def test_a_device_that_does_not_tell_its_memory_has_not_the_machines(monkeypatch):
    monkeypatch.setattr(devices.jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(devices, "_own_memory", lambda: None)
    with pytest.raises(UserError, match=r"^config\.micro_batch: this device does not tell its memory"):
        devices.memory_available()
    monkeypatch.setattr(devices, "_own_memory", lambda: 5)
    assert devices.memory_available() == 5
