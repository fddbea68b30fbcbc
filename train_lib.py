"""The trainer, to be read from top to bottom. The step is in training/step.py, evaluation in training/evaluate.py."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import config_lib
import run_lib
from corpus.tokenizer import UnknownCharacters
from input_pipeline import Batches, place, prefetch
from reports import summary
from reports.plots import plot_loss
from reports.run_page import write_after_training
from reports.sinks import append_measured
from run_lib import Run
from runtime import devices
from runtime.checkpoints.manager import Checkpoints, val_tokens_of
from runtime.distributed import peers_alive
from runtime.errors import Interrupted, UserError
from runtime.files import MetricsFile, append_text, cut_back, size_of, write_json
from runtime.multihost import require_same
from runtime.processes import by_first, is_first, num_processes, process_id
from runtime.programs import compile_seconds, set_up_compile_cache
from runtime.screen.console import Console
from runtime.signals import StopSignals
from runtime.trackers import Trackers
from runtime.watchdog import Watchdog
from runtime.workdir import WorkdirLock, move_aside, prepare_workdir, removed_if_unused
from training.budget import EVALUATED, measure, steps_in, total_steps
from training.clock import Clock, side_work
from training.cost import flops_per_token, mfu, parameter_counts
from training.dispatch import check, kept, longest, ready, spans
from training.ema import average_of, begin_with
from training.evaluate import Evaluator, bits_per_byte
from training.health import Divergence
from training.optimizer import groups_of, schedule_shape
from training.step import Step, make_step
from transformer.model import Params, Transformer, model_of
from transformer.sampling import Sampling, generate
from transformer.sharding import most_parts, shardings_of, whole
from transformer.xla import random_key


def train(
    config: ConfigDict,
    workdir: str | Path,
    fresh: bool = False,
    profile: tuple[int, int] | None = None,
    rebatch: bool = False,
) -> Run:
    """Train a model, or go on where the run in `workdir` stopped.

    Args:
      fresh: move an earlier run in `workdir` aside and start from step 0.
      profile: write a trace of the real steps from the first number to before the second to `workdir/profile`.
      rebatch: the run may go on with another batch size or accumulation; it continues in the data where it stopped.

    Raises Interrupted after a signal, when the state is saved, and the errors of `runtime.errors`.
    """
    config_lib.check(config)
    config = config_lib.in_parts(config)
    with removed_if_unused(workdir), Console(silent=not is_first()) as console:
        workdir = prepare_workdir(workdir, run_lib.FILES)
        if not fresh:
            run_lib.require_no_others_files(workdir)
        console.doing("starting the devices")
        shared = config.batch_size if fresh else run_lib.batch_to_share(config, workdir)
        devices.set_up_cpu_devices(config.cpu_devices, shared, console.warn)
        set_up_compile_cache(console.warn)
        config_lib.check_devices(config, len(devices.start_jax()))
        with StopSignals(console.warn, config.warning_signal) as stop, WorkdirLock(workdir, console.warn) as lock:
            require_same(lock.holder(), f"workdir {workdir}")  # a new run's would look the same, wherever it lies
            if fresh:
                by_first(partial(move_aside, workdir, console.line))
            trainer = None
            try:
                with (
                    Watchdog(workdir, config.watchdog_seconds) as watchdog,
                    Checkpoints(workdir, config.keep) as checkpoints,
                    peers_alive(),
                    devices.memory_limit("config.batch_size", "lower it, and raise config.accumulation_steps instead"),
                ):
                    trainer = Trainer(config, workdir, checkpoints, console, stop, watchdog, rebatch)
                    return trainer.run(profile)
            finally:
                if trainer:
                    trainer.trackers.finish()  # last: a slow upload must not cost a checkpoint


class Trainer:
    """One session of a run: its set-up, and its loop."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        checkpoints: Checkpoints,
        console: Console,
        stop: StopSignals,
        watchdog: Watchdog,
        rebatch: bool,
    ):
        self.config, self.workdir, self.checkpoints = config, workdir, checkpoints
        self.console, self.stop, self.watchdog = console, stop, watchdog
        self.tracing: bool | None = None  # whether a trace is being written; None: none was
        latest = checkpoints.latest()
        allow = cache(lambda step: run_lib.require_same_run(checkpoints.meta(step), config, workdir, rebatch))
        if latest is not None:  # checked before anything is loaded
            config = self.config = run_lib.in_parts_as_began(config, checkpoints.meta(latest), workdir)
            allow(latest)
        source = workdir if checkpoints.steps() else Path(config.init_from) if config.init_from else None
        console.doing("reading the text")
        self.data = run_lib.load_data(config, console.line, run_lib.load_tokenizer(source) if source else None)
        self.tokenizer = self.data.tokenizer
        own = {"cpu_devices": None, "data_dir": None}  # which each process may set as it likes
        require_same(config_lib.to_dict(config) | own, "config")
        require_same((self.data.sha256, self.tokenizer.fingerprint), f"config.dataset: {config.dataset}")
        self.sample_prompt = self.tokenizer.opening if config.sample_prompt == "\n" else config.sample_prompt
        try:
            self.tokenizer.encode(self.sample_prompt)
        except UnknownCharacters as error:
            raise UserError(f"config.sample_prompt: {error}; leave them out") from error
        how = run_lib.dtype_of(config, None if latest is None else checkpoints.meta(latest))
        self.model_config = run_lib.model_config_for(config, self.tokenizer, how.dtype)
        run_lib.require_documents(config, self.data, console.warn if source == workdir else None)
        self.mesh = config_lib.mesh_of(config, devices.start_jax())
        init_key, dropout_key = jax.random.split(random_key(config.seed))
        if config.micro_batch:
            console.doing("looking how many sequences fit at once")
            config = self.config = run_lib.in_largest_parts(config, self.model_config, self.mesh, dropout_key)
            console.line(f"micro_batch auto: {config.batch_size:,} sequences at once, the most that fit")
        of_model, of_batch = most_parts(self.mesh)
        devices.require_memory(
            3 * 4 * sum(parameter_counts(self.model_config).values()) // of_model,
            2 * config.batch_size * config.context_len * config.embedding_dim // of_batch,
        )
        self.placement = partial(shardings_of, mesh=self.mesh)
        self.arithmetic = run_lib.arithmetic_of(self.model_config, self.mesh)
        self.evaluate = Evaluator(self.model_config, self.mesh, config.batch_size)
        periods = {key: config[key] for key in ("eval_every", "sample_every", "save_every")}
        self.tokens_per_step = config.batch_size * config.context_len * config.accumulation_steps
        self.work_ahead = side_work(self.tokens_per_step, self.data.val.num_tokens, config.eval_tokens, **periods)
        build = partial(self._build, dropout_key)
        resumed = run_lib.resume(*(checkpoints, build, allow, config, workdir, self.data, self.placement, console.warn))
        step = resumed.step if resumed else build()
        self.rates = [group.rate for group in groups_of(step.labels).values()]
        self.val_tokens = config.eval_tokens if config.eval_tokens < self.data.val.num_tokens - 1 else 0  # 0: on all
        init, self.train_step = ready(step, config.steps_per_dispatch > 1, self.kept)
        self.metrics_file = MetricsFile(workdir / run_lib.METRICS_FILE)
        self.growing = {name: workdir / name for name in run_lib.GROWING_FILES}
        facts = summary.facts(workdir, config, self.model_config, self.data, step, self.mesh, self.total, how.why)
        console.header(summary.lines(facts), summary.panels(facts))
        if config.print_per_layer_params:
            for name, leaf in step.state.params.items():
                console.line(f"  {name:<40} {leaf.shape!s:>14} {step.labels[name]}")

        console.doing("making the weights")
        if resumed:
            self._resume(resumed)
        else:
            self._begin(init, init_key)
        if source:
            run_lib.check_finite(self.state.params, source)
        if self.step < self.total:
            checkpoints.require_room(1 if resumed else 2, self.state)
        watched = config.max_bad_steps, config.skip_spikes, step.state.params, jax.device_get(self.state.metrics)
        self.divergence = Divergence(*watched, console.warn, self.model_config.vocab_size)

        settings = config_lib.to_dict(config)
        told = {"timed_steps": self.timed, "flops_per_token": flops_per_token(self.model_config)}
        told["arithmetic"] = self.arithmetic["dtype"]  # what config.dtype="auto" came to
        write_json(workdir / run_lib.CONFIG_FILE, {"config": settings, **told, **devices.environment()})
        write_json(workdir / run_lib.TOKENIZER_FILE, self.tokenizer.to_dict())
        with self.clock.pause():
            enabled, logged = config_lib.trackers_of(config) if is_first() else [], self.step - (not self.reported)
            self.trackers = Trackers(enabled, workdir.name, settings, workdir, console.warn, logged)
        for name, where in self.trackers.where.items():
            console.line(f"{name:<12}{where}")

    @property
    def step(self) -> int:
        """The number of real steps made."""
        return self.micro_step // self.config.accumulation_steps

    def _build(self, key: jax.Array, micro_step: int = 0, meta: dict[str, Any] | None = None) -> Step:
        """Make the step, and set the batches and the run's length, after `micro_step` micro-batches of a checkpoint."""
        config, read = self.config, meta["position"] if meta else 0
        at = lambda c, micro_step: {"batch_size": c.batch_size, "offset": read - micro_step * c.batch_size}
        self.batches = Batches(
            self.data.train, config.context_len, seed=config.seed, order=config.order, **at(config, micro_step)
        )
        settings, health = config_lib.optimizer_config(config), (config.spike_sigmas, config.skip_spikes)
        make = lambda total, *first: make_step(settings, self.model_config, total, key, self.mesh, *health, *first)
        flops, self.timed = flops_per_token(self.model_config), (meta or {}).get("timed_steps", 0)

        def total(c: ConfigDict, batches: Batches) -> int:
            k, epochs = c.accumulation_steps, batches.steps(c.epochs) if c.epochs else None
            a_sequence = flops * c.context_len
            a_step = a_sequence * c.batch_size * k
            # Steps of another size, before --rebatch, have read so many sequences more, or fewer.
            left = batches.offset and c.max_flops and max(a_step, c.max_flops - a_sequence * batches.offset)
            return total_steps(epochs, k, c.max_steps, self.timed, left or c.max_flops, a_step)

        if config.max_seconds and not meta:
            self.timed = self._time(make(total(config, self.batches)), key)
        self.total = self.total_before = total(config, self.batches)
        if meta:
            old = run_lib.config_of(meta, self.workdir)
            self.total_before = total(old, replace(self.batches, **at(old, run_lib.micro_step_of(meta))))
        self.first_total = (meta or {}).get("first_total", self.total_before)
        of_batches = config.batch_size, config.steps_per_dispatch
        seed = config.seed if config.dropout or config.steps_per_dispatch > 1 else None  # loops keep what has no effect
        self.kept = kept(self.mesh, settings, health, self.model_config, self.total, self.first_total, of_batches, seed)
        return make(self.total, self.first_total)

    def _time(self, step: Step, key: jax.Array) -> int:
        """The steps that `max_seconds` are enough for."""
        config, seconds = self.config, self.config.max_seconds
        self.console.doing("timing some steps")
        batch_at = lambda i: place(self.batches, self.mesh, 1, range(i, i + 1))
        val, tokens = self.data.val, max(EVALUATED, self.evaluate.tokens_at_once)
        evaluate = lambda params: self.evaluate(params, val, tokens, self.stop.raise_if_set)
        read = min(tokens, val.num_tokens - 1)  # not the targets alone: of a conversation some have none
        pace = measure(step, key, batch_at, config.accumulation_steps, evaluate, read, seconds)
        steps = steps_in(seconds, pace, self.work_ahead)
        self.console.line(f"max_seconds {seconds:g}: enough for {steps:,} steps of {1000 * pace.step:.3g} ms")
        return steps

    def _begin(self, init: Callable, key: jax.Array) -> None:
        """Start a new run, with initial weights or those of `init_from`."""
        self.state = init(key)
        if self.config.init_from:
            from_there = Path(self.config.init_from), self.placement, self.console.warn, self.config.init_weights
            self.state = begin_with(self.state, run_lib.load_weights(*from_there, wanted=self.model_config)[0])
        run_lib.require_nothing_lost(self.metrics_file, self.checkpoints)
        self.micro_step, self.ahead, self.clock, self.reported = 0, 0, Clock(), True
        self.compiled_before = -compile_seconds()  # in earlier sessions, less what the process had compiled before
        self.val_loss = self.best_val_loss = self.best_step = None
        self.saved: tuple[int, bool] | None = None  # the last checkpoint's micro-step, and whether it was reported
        for path in self.growing.values():
            cut_back(path, 0, self.console.warn)

    def _resume(self, resumed: run_lib.Resumed) -> None:
        """Go on from a checkpoint, and drop what was logged after it."""
        self.state, self.micro_step, self.ahead, meta = resumed.state, resumed.micro_step, resumed.ahead, resumed.meta
        self.clock, self.reported = Clock(meta["elapsed_seconds"]), meta["reported"]
        same = val_tokens_of(meta) == self.val_tokens
        self.best_val_loss, self.best_step = (meta["best_val_loss"], meta["best_step"]) if same else (None, None)
        self.val_loss = meta["val_loss"]
        self.compiled_before = meta.get("compile_seconds", 0.0) - compile_seconds()
        self.saved = (self.micro_step, self.reported)
        if self.step > self.total:
            limits = " or ".join(key for key in ("max_steps", "epochs", "max_flops") if self.config[key])
            raise UserError(
                f"config.{limits}: the run in {self.workdir} is at step {self.step}, past {self.total}; raise it"
            )
        if changed := run_lib.other_arithmetic(meta, self.arithmetic):
            self.console.warn(f"not as in the session before: {changed}; the numbers will differ (docs/exactness.md)")
        for name, path in self.growing.items():
            cut_back(path, meta["sizes"].get(name, 0), self.console.warn)
        self.console.line(f"{'resuming' if self.step < self.total else 'already'} at step {self.step}")
        if self.step < self.total != self.total_before:
            rates = partial(schedule_shape, config_lib.optimizer_config(self.config), first_total=self.first_total)
            self.console.line(summary.going_on(rates, self.step, self.total_before, self.total))

    def run(self, profile: tuple[int, int] | None) -> Run:
        """Train until the last step, or until a signal."""
        k, end = self.config.accumulation_steps, self.total * self.config.accumulation_steps
        every = [value for key, value in self.config.items() if key.endswith("_every")]
        most = longest(self.micro_step, end, self.config.steps_per_dispatch, k, every)
        make_batch = lambda span: (span, place(self.batches, self.mesh, most, span))
        dispatches = spans(self.micro_step, end, most, k, every, profile or ())
        try:
            if not self.reported:  # the last session stopped between the step and its report
                self._report(self.state.metrics)
            with self.console.progress(self.total, self.step, "compiling the step") as update:
                for span, batch in prefetch(make_batch, dispatches):
                    self.stop.raise_if_set()
                    if profile:
                        self._profile(*profile)
                    with jax.transfer_guard("disallow"):  # no implicit transfer to or from the host
                        self.state, step_metrics = self.train_step(self.state, batch)
                    self.micro_step = span.stop
                    if not self.clock.in_laps:  # the session's first step compiles, so it is not timed
                        jax.block_until_ready(step_metrics)
                        self.clock.start_laps(self.micro_step)
                    self.watchdog.beat()
                    if self.micro_step % k == 0:
                        self.reported = False
                        self._report(step_metrics)
                        update(self.step)
        except Interrupted:
            self._save()
            self.console.line(f"saved step {self.step}; the same command goes on from here")
            if self.tracing:
                self._end_trace()
            raise
        except BaseException:
            if self.tracing:
                with contextlib.suppress(Exception):  # it must not hide the error
                    jax.profiler.stop_trace()
            raise
        if self.tracing:
            self._end_trace()
        if profile and self.tracing is None:
            first, last = profile
            self.console.warn(f"--profile_steps: no trace, as this session made no step from {first} to before {last}")
        with self.watchdog.pause():  # only the last save is still watched
            self.console.doing("drawing the curves")
            history = run_lib.read_metrics(self.workdir, self.console.warn)
            by_first(lambda: plot_loss(history, self.workdir / run_lib.CURVES_FILE, self.workdir.name))
            losses, model = (self.val_loss, self.best_val_loss, self.best_step), self._model(self.state.params)
            run = Run(model, self.tokenizer, history, self.workdir, self.step, *losses, self.val_tokens)
            if self.config.report:
                self.console.doing("writing report.html")
                by_first(lambda: write_after_training(run, self.console.warn))
            self.console.closing(*summary.closing(run, self.clock.elapsed))
        return run

    def _report(self, step_metrics: dict[str, jax.Array]) -> None:
        """All that is due after a real step: evaluation, log, sample, checkpoint.

        If a signal interrupts it, the checkpoint says so (`reported`), and the next session does it again.
        """
        config, step, last = self.config, self.step, self.step == self.total
        due = lambda every: last or (every > 0 and step % every == 0)
        self.sizes = {name: size_of(path) for name, path in self.growing.items()}
        evaluated = due(config.eval_every)
        logged = evaluated or due(config.log_every)
        if logged:
            row = self._row(step_metrics)
            if evaluated:
                with self._side_work("evaluation", "evaluating"):
                    compared = self._evaluate(self.val_tokens)
                    row |= compared
                    if last and self.val_tokens:
                        row |= self._evaluate(0) | {f"prefix_{key}": value for key, value in compared.items()}
                    if config.report:
                        about = self.growing[run_lib.SINKS_FILE], self.data.val, self.tokenizer
                        by_first(partial(append_measured, *about, self._model(self.state.params), row))
            self.metrics_file.append(row)
            self.console.step_line(row, self.total)
            self.trackers.log(row, step)
            with self.clock.pause(), self.watchdog.pause():
                check(self.kept)
                self.checkpoints.load_orbax()
        if due(config.sample_every):
            with self._side_work("sample", "sampling"):
                by_first(partial(self._sample, self._model(average_of(self.state.opt_state) or self.state.params)))
        self.reported = True
        score = compared.get("ema_val_loss", compared["val_loss"]) if evaluated else None
        improved = evaluated and (self.best_val_loss is None or score < self.best_val_loss)
        if improved:
            self.best_val_loss, self.best_step = score, step
        asked = (num_processes() == 1 or logged) and self.stop.take_save_request()
        if improved or asked or due(config.save_every):
            with self.clock.pause("save"), self.console.busy("saving"):
                self._save(score)
            if asked:
                self.console.line(f"saved step {step}, as a signal asked for it")

    @contextlib.contextmanager
    def _side_work(self, work: str, doing: str) -> Iterator[None]:
        """Work besides the steps, with its time kept apart. If it runs out of memory, the state is saved first."""
        advice = "set it to 512, or lower it: of so many tokens are the logits there at once"
        rescue = self._save if num_processes() == 1 else lambda: None  # several processes would have to save together
        enough = devices.memory_limit("config.loss_chunk", advice, rescue)
        with self.clock.pause(work), self.watchdog.pause(), self.console.busy(doing), enough:
            yield

    def _row(self, step_metrics: dict[str, jax.Array]) -> dict[str, Any]:
        """The row of metrics.jsonl for this step. Seconds are per real step since the last row, without side work."""
        config, step, k = self.config, self.step, self.config.accumulation_steps
        on_host = {name: value.item() for name, value in jax.device_get(step_metrics).items()}
        self.divergence.check(step, config.lr * on_host["lr_factor"], on_host)
        factor = on_host.pop("lr_factor")
        row = {
            "step": step,
            "tokens": self.batches.position(self.micro_step) * config.context_len,
            "loss": on_host.pop("loss"),
            "grad_norm": on_host.pop("grad_norm"),
            **{rate: config[rate] * factor for rate in self.rates},
            **dict.fromkeys(["step_seconds", "tokens_per_second", "mfu", "eta_seconds"]),
            "elapsed_seconds": self.clock.elapsed,
            "compile_seconds": self.compiled_before + compile_seconds(),  # the part of these in which XLA compiled
            "peak_memory_bytes": devices.peak_memory_bytes(self.mesh.local_devices[0]),
        }
        if (seconds := self.clock.lap(self.micro_step)) is not None:
            rate = self.tokens_per_step / (seconds * k)
            row["step_seconds"], row["tokens_per_second"] = seconds * k, rate
            kind = self.mesh.devices.flat[0].device_kind
            row["mfu"] = mfu(flops_per_token(self.model_config), rate, self.mesh.size, kind)
            row["eta_seconds"] = self.clock.left(step, self.total, k, self.work_ahead)
        return row | on_host

    def _evaluate(self, max_tokens: int) -> dict[str, float | None]:
        val = self.data.val
        self.val_loss, tokens = self.evaluate(self.state.params, val, max_tokens, self.stop.raise_if_set)
        per_byte = bits_per_byte(self.val_loss, tokens, val, self.tokenizer)
        row = {"val_loss": self.val_loss, "bits_per_byte": per_byte, "val_tokens": tokens}
        if average := average_of(self.state.opt_state):
            row["ema_val_loss"], _ = self.evaluate(average, val, max_tokens, self.stop.raise_if_set)
        return row

    def _model(self, params: Params) -> Transformer:
        """The model on the first device alone. All processes must call it."""
        of_first = lambda p: whole(p, self.mesh).addressable_shards[0].data  # the others hold one array at a time
        return model_of(self.model_config, {name: of_first(p) for name, p in params.items()})

    def _sample(self, model: Transformer) -> None:
        config, prompt = self.config, self.sample_prompt
        sampling = Sampling(config.temperature, seed=config.seed)
        begin = run_lib.prompt_of(config, self.tokenizer, prompt)
        text = prompt + generate(model, self.tokenizer, [begin], config.sample_tokens, sampling)[0]
        append_text(self.workdir / run_lib.SAMPLES_FILE, f"--- step {self.step} ---\n{text}\n\n")  # for `read_samples`
        self.console.sample(self.step, text)
        self.trackers.samples(partial(run_lib.read_samples, self.workdir))

    def _save(self, val_loss: float | None = None) -> None:
        """Save a checkpoint of this micro-step, with what a later session needs besides the arrays."""
        check(self.kept)
        if self.saved == (self.micro_step, self.reported):
            return
        self.saved = (self.micro_step, self.reported)
        if self.reported:
            self.sizes = {name: size_of(path) for name, path in self.growing.items()}
        meta = {
            **run_lib.identity(self.config, self.tokenizer),
            "data_sha256": self.data.sha256,
            "micro_step": self.micro_step,
            "first_total": self.first_total,
            "timed_steps": self.timed,
            "arithmetic": self.arithmetic,
            "elapsed_seconds": self.clock.elapsed,
            "compile_seconds": self.compiled_before + compile_seconds(),
            "reported": self.reported,
            "sizes": self.sizes,
            "val_loss": self.val_loss,
            "best_val_loss": self.best_val_loss,
            "best_step": self.best_step,
        }
        number, position = self.micro_step + self.ahead, self.batches.position(self.micro_step)
        self.checkpoints.save(number, self.state.params, self.state[1:], meta, val_loss, position, self.val_tokens)

    def _profile(self, first: int, last: int) -> None:
        """Trace the real steps from `first` to before `last`; called before each dispatch."""
        if self.tracing and self.step >= last:
            self._end_trace()
        elif self.tracing is None and first <= self.step < last:
            jax.profiler.start_trace(self.workdir / "profile" / str(process_id() or ""))  # files are named by host
            self.tracing = True

    def _end_trace(self) -> None:
        self.tracing = False
        jax.block_until_ready(self.state)
        jax.profiler.stop_trace()
        self.console.line(f"wrote a trace to {self.workdir / 'profile'}")
