"""What dtype="auto" stands for: which processors, measured once, kept with the run."""

import json
import shutil

import jax
import numpy as np
import pytest
from helpers import losses, tiny_config

import run_lib
import train_lib
from runtime import devices
from runtime.errors import NoCheckpointError
from training import precision
from training.precision import Choice, best_here
from transformer.model import params_of

ZEN = "AMD EPYC; fpu avx2 avx512_bf16 avx512f"


@pytest.fixture
def here(monkeypatch, tmp_path):
    """A function that puts this process on a processor that gains so much; gives the measurements made."""
    measured: list[float] = []
    usual = jax.config.jax_compilation_cache_dir

    def put(processor: str, gain: float = 0.0) -> list[float]:
        best_here.cache_clear()
        monkeypatch.setattr(devices, "processor", lambda: processor)
        monkeypatch.setattr(precision, "half_precision_gain", lambda: measured.append(gain) or gain)
        return measured

    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield put
    jax.config.update("jax_compilation_cache_dir", usual)
    best_here.cache_clear()


@pytest.mark.parametrize(
    "processor, gain, dtype, why",
    [
        (ZEN, 1.74, "bfloat16_matmul", "auto: bfloat16 products run 1.7 x as fast"),
        (ZEN, 1.34, "float32", "auto: bfloat16 products run 1.3 x as fast"),
        ("Xeon; avx512f amx_bf16 amx_tile", 3.0, "bfloat16_matmul", "auto: bfloat16 products run 3.0 x as fast"),
        (ZEN, 0.9, "float32", "auto: bfloat16 products run 0.9 x as fast"),
        ("Xeon; avx512f avx512_bf16x", 3.0, "float32", "auto: no bfloat16 unit"),
        ("", 3.0, "float32", "auto: no bfloat16 unit"),
    ],
)
def test_a_cpu_takes_bfloat16_products_where_it_has_a_unit_and_they_are_faster(here, processor, gain, dtype, why):
    measured = here(processor, gain)
    assert best_here("cpu") == Choice(dtype, why)
    assert len(measured) == ("no" not in why)
    assert best_here("tpu") == best_here("cuda") == Choice("bfloat16", "auto")


def test_process_0_decides_for_all(here, monkeypatch):
    here("Xeon; avx512f")
    monkeypatch.setattr(precision, "from_all", lambda own: np.stack([np.float64(2.5), own]))
    assert best_here("cpu").dtype == "bfloat16_matmul"
    here(ZEN, 2.0)
    monkeypatch.setattr(precision, "from_all", lambda own: np.stack([np.float64(0), own]))
    assert best_here("cpu").dtype == "float32"


def test_a_processor_is_measured_once(here, tmp_path):
    choice = lambda *where: (len(here(*where)), best_here("cpu").dtype)[1]
    assert choice(ZEN, 2.5) == "bfloat16_matmul"
    measured = here(ZEN, 0.5)
    assert best_here("cpu").dtype == "bfloat16_matmul" and len(measured) == 1
    assert choice("Intel; amx_bf16", 0.7) == "float32"
    assert choice(ZEN, 0.5) == "bfloat16_matmul" and len(measured) == 2
    file = tmp_path / devices.MEASURED
    known = json.loads(file.read_text())
    for damaged in (b"{", b"[]", b"\xff", json.dumps(dict.fromkeys(known, "2")).encode(), b'{"another": 2.5}'):
        file.write_bytes(damaged)
        before = len(measured)
        assert choice(ZEN, 0.5) == "float32" and len(measured) == before + 1
        assert choice(ZEN, 2.5) == "float32" and len(measured) == before + 1
    file.unlink()
    file.mkdir()  # cannot be read or written
    assert choice(ZEN, 2.5) == "bfloat16_matmul"


def test_the_gain_is_a_ratio_of_times():
    assert 0 < precision.half_precision_gain() < 1000


def test_a_run_keeps_the_arithmetic_that_auto_began_with(here, tmp_path, capsys):
    config = tiny_config(max_steps=6, sample_every=0, dtype="auto")
    here(ZEN, 2.5)
    train_lib.train(config, tmp_path / "begun")
    assert "cpu (cpu), bfloat16_matmul (auto: bfloat16 products run 2.5 x as fast)" in capsys.readouterr().out
    begun = shutil.copytree(tmp_path / "begun", tmp_path / "elsewhere")
    config.max_steps = 9
    train_lib.train(config, tmp_path / "begun")
    here("Another; sse2")
    capsys.readouterr()
    train_lib.train(config, begun)
    told = capsys.readouterr()
    assert "bfloat16_matmul (auto: as the run began)" in told.out and "not as in the session" not in told.err
    assert losses(begun) == losses(tmp_path / "begun")
    model, _, _, meta = run_lib.load_model(begun)
    assert model.config.dtype == meta["arithmetic"]["dtype"] == "bfloat16_matmul"
    assert all(value.dtype == "float32" for value in params_of(model).values())
    train_lib.train(tiny_config(max_steps=2, dtype="auto", init_from=str(begun)), tmp_path / "tuned")
    assert "float32 (auto: no bfloat16 unit)" in capsys.readouterr().out


def test_a_checkpoint_says_what_auto_was(here):
    config = tiny_config(dtype="auto")
    here(ZEN, 2.5)
    assert run_lib.dtype_of(config, None).dtype == "bfloat16_matmul"
    assert run_lib.dtype_of(config, {run_lib.IMPORTED_FROM: "x"}).dtype == "bfloat16_matmul"
    assert run_lib.dtype_of(config, {"step": 4}).dtype == "float32"  # of an older build
    assert run_lib.dtype_of(config, {"arithmetic": {"dtype": "bfloat16"}}).dtype == "bfloat16"
    assert run_lib.dtype_of(tiny_config(), {"arithmetic": {"dtype": "bfloat16"}}) == Choice("float32")
    with pytest.raises(NoCheckpointError, match="dtype: 'int3'"):
        run_lib.dtype_of(config, {"arithmetic": {"dtype": "int3"}})
