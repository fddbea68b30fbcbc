"""Signals at awkward moments: the state is saved, or the checkpoint before is whole."""

import os
import signal
import subprocess
import sys

import pytest
from helpers import ROOT, arguments, assert_same_state, finished_run, losses, run_patched, signal_before, tiny_config

import main
import train_lib
from runtime.checkpoints.manager import Checkpoints
from training import step
from transformer import sampling


def assert_goes_on(workdir, config) -> None:
    """The same command once more ends as if nothing had been."""
    assert main.main(arguments(config, workdir)) == 0
    reference = finished_run()
    assert losses(workdir) == losses(reference.workdir)
    assert_same_state(workdir, reference, config, 30)


def test_a_signal_while_the_step_compiles_is_not_lost(tmp_path, monkeypatch, capsys):
    make = step.make_train_step

    def make_train_step(*args, **kwargs):
        step = make(*args, **kwargs)

        def compiling(state, batch):
            if not sent:  # the first call is the one that compiles
                sent.append(signal.raise_signal(signal.SIGTERM))
            return step(state, batch)

        return compiling

    sent: list = []
    monkeypatch.setattr(step, "make_train_step", make_train_step)
    assert main.main(arguments(tiny_config(), tmp_path)) == 143
    assert "saved step 1; the same command goes on from here" in capsys.readouterr().out
    monkeypatch.undo()
    assert_goes_on(tmp_path, tiny_config())


@pytest.mark.parametrize("signum, status", [(signal.SIGUSR1, 0), (signal.SIGUSR2, 140), (signal.SIGHUP, 129)])
def test_a_scheduler_s_warning_and_a_hangup_save(tmp_path, monkeypatch, capsys, signum, status):
    config = tiny_config(save_every=100, eval_every=100, warning_signal="stop" if signum == signal.SIGUSR2 else "save")
    monkeypatch.setattr(train_lib, "prefetch", signal_before(signum, 13))
    assert main.main(arguments(config, tmp_path)) == status
    assert "saved step 1" in capsys.readouterr().out
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == ([14, 30] if status == 0 else [13])
    monkeypatch.undo()
    assert main.main(arguments(config, tmp_path)) == 0
    assert [loss for _, loss, _ in losses(tmp_path)] == [loss for _, loss, _ in losses(finished_run().workdir)]


def test_a_signal_while_a_sample_is_written_is_not_lost(tmp_path, monkeypatch, capsys):
    generate = sampling.generate

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return generate(*args)

    monkeypatch.setattr(train_lib, "generate", interrupted)
    assert main.main(arguments(tiny_config(), tmp_path)) == 130
    assert "saved step 12;" in capsys.readouterr().out
    monkeypatch.undo()
    assert_goes_on(tmp_path, tiny_config())


def test_a_signal_before_the_loop_saves_nothing_and_breaks_nothing(tmp_path, monkeypatch):
    load = train_lib.run_lib.load_data

    def load_data(*args):
        signal.raise_signal(signal.SIGTERM)
        return load(*args)

    monkeypatch.setattr(train_lib.run_lib, "load_data", load_data)
    assert main.main(arguments(tiny_config(), tmp_path)) == 143
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest() == 0


def test_a_second_signal_in_a_slow_save_ends_at_once_and_the_checkpoint_before_is_whole(tmp_path):
    slow_save = """if True:
        import signal, threading, time
        from helpers import signal_before
        import train_lib
        from runtime.checkpoints.manager import Checkpoints
        train_lib.prefetch = signal_before(signal.SIGINT, 13)
        save = Checkpoints.save
        def slow(self, step, *args):
            if step == 13:
                threading.Timer(0.05, lambda: signal.raise_signal(signal.SIGINT)).start()
                time.sleep(60)
            save(self, step, *args)
            self._manager.wait_until_finished()
        Checkpoints.save = slow
    """
    done = run_patched(slow_save, *arguments(tiny_config(), tmp_path))
    assert done.returncode == 130
    assert done.stderr.count("\n") == 1 and "once more stops at once" in done.stderr
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest() == 10
    assert_goes_on(tmp_path, tiny_config())


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_before_there_is_anything_to_save(signum, status):
    """While the libraries are being imported or the devices wake up: no traceback."""
    code = f"import os\nos.kill(os.getpid(), {int(signum)})\nimport time\ntime.sleep(30)"
    patch = f"import main, commands.train\ndef now(*_):\n exec({code!r})\ncommands.train.main = now"
    done = run_patched(patch)
    assert (done.returncode, done.stderr) == (status, "")


def test_an_error_in_the_step_keeps_the_checkpoint_that_was_being_written(tmp_path, monkeypatch):
    """A bug of ours at step 12: a traceback, and the save of step 10 in the background is waited for."""
    report = train_lib.Trainer._report

    def broken(trainer, metrics):
        if trainer.step == 12:
            raise ZeroDivisionError
        report(trainer, metrics)

    monkeypatch.setattr(train_lib.Trainer, "_report", broken)
    with pytest.raises(ZeroDivisionError):
        main.main(arguments(tiny_config(), tmp_path))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest() == 10
    monkeypatch.undo()
    assert_goes_on(tmp_path, tiny_config())


def test_a_second_run_in_the_same_workdir_is_refused_and_the_first_undisturbed(tmp_path, monkeypatch, capsys):
    report, refused = train_lib.Trainer._report, []

    def intruded(trainer, metrics):
        if trainer.step == 9:
            command = [sys.executable, str(ROOT / "main.py"), *arguments(tiny_config(), tmp_path)]
            refused.append(subprocess.run(command, capture_output=True, text=True, timeout=120, check=False))
        report(trainer, metrics)

    monkeypatch.setattr(train_lib.Trainer, "_report", intruded)
    assert_goes_on(tmp_path, tiny_config())
    (second,) = refused
    assert second.returncode == 2 and second.stderr.count("\n") == 1
    assert second.stderr.startswith(f"error: workdir {tmp_path}: in use by pid {os.getpid()} on ")
