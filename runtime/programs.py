"""Compiled programs: the cache in which JAX keeps them, and whole ones, for which a start need not trace.

The cache is set up before JAX's backend starts.
"""

import contextlib
import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.monitoring

from runtime.devices import processor
from runtime.errors import UserError, one_line
from runtime.files import parse_json, read_file, replacing, user_cache
from runtime.processes import is_one_command, num_processes

_MOST_KEPT = 32  # whole programs
_asked: list[tuple[int, tuple[str, bool]]] = []  # thread, and the key that JAX's cache was asked for, and had or not


def set_up_compile_cache(warn: Callable[[str], None]) -> None:
    """Keep compiled programs in the user's cache folder, so that the next start does not compile again.

    JAX_COMPILATION_CACHE_DIR names another folder. A damaged program is compiled again; `warn` gets one line at most.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        try:
            (cache := user_cache()).mkdir(parents=True, exist_ok=True)
        except (OSError, UserError) as error:
            warn(f"compiled programs are not kept: {one_line(error)}")
            return
        jax.config.update("jax_compilation_cache_dir", str(cache))
    with contextlib.suppress(ImportError, AttributeError):  # private to JAX: without it, JAX's own cache is used as is
        from jax._src import compilation_cache

        plain = getattr(compilation_cache.get_file_cache, "plain", compilation_cache.get_file_cache)

        def get_file_cache(path: str) -> Any:
            found = plain(path)
            return found and (_SealedCache(found[0], Path(path), warn), found[1])

        get_file_cache.plain = plain  # type: ignore[attr-defined]
        compilation_cache.get_file_cache = get_file_cache
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def compile_seconds() -> float:
    """Seconds that XLA has spent in this process on compiling or on reading the cache, since the first call."""
    return _listened_to()[0]


@cache
def _listened_to() -> list[float]:
    seconds = [0.0]

    def heard(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds[0] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(heard)
    return seconds


class _SealedCache:
    """JAX's cache of compiled programs; each is preceded by the hash of its name and its bytes.

    JAX itself runs whatever it finds under a name and never replaces it: a program that a full disk has cut short, or
    that somebody has exchanged, would be tried at every start.
    """

    def __init__(self, cache: Any, folder: Path, warn: Callable[[str], None]) -> None:
        self._cache, self._folder, self._warn = cache, folder, warn
        self._path = cache._path  # JAX's own log reads it
        self._told = False

    def get(self, key: str) -> bytes | None:
        name, program = f"{key}-sealed", None
        with self._noted("read"):
            found = self._cache.get(name)
            if found is not None and found[:32] == _seal(name, found[32:]):
                program = found[32:]
            elif found is not None:
                for file in self._folder.glob(f"{name}-*"):
                    file.unlink()
                self._tell("damaged ones were removed")
        _asked.append((threading.get_ident(), (key, program is not None)))
        return program

    def put(self, key: str, value: bytes) -> None:
        with self._noted("written"):
            self._cache.put(name := f"{key}-sealed", _seal(name, value) + value)

    @contextlib.contextmanager
    def _noted(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._tell(f"cannot be {what}: {error.strerror}")

    def _tell(self, problem: str) -> None:
        if not self._told:
            self._warn(f"compiled programs in {self._folder}: {problem}")
        self._told = True


def _seal(name: str, value: bytes) -> bytes:
    return hashlib.sha256(name.encode() + value).digest()


# --- Whole programs -----------------------------------------------------------------------------------------------


class Kept:
    """A compiled program that an earlier process has kept; it is read in the background, from here on.

    JAX's cache is asked with the traced program, and tracing takes longer than to read it. So a program lies beside
    that cache, under the hash of what it was made of and of every file that its process had loaded; what that misses,
    `is_current` finds, which traces it once there is time. Only for a process of one command: others may change them.
    """

    def __init__(self, made_of: str, devices: Iterable[jax.Device]) -> None:
        """made_of: what the program depends on besides source, settings and devices (of its mesh, in order)."""
        self._start: Path | None = None
        self._unchecked: tuple[Callable, Any, str] | None = None
        folder = jax.config.jax_compilation_cache_dir or "://"
        with contextlib.suppress(Exception):  # all of this only saves time, by what JAX does not promise to keep
            from jax.experimental import serialize_executable  # here, as what a thread loads would be hashed or not

            self._serializer = serialize_executable
            debugging = jax.config.values["jax_debug_nans"] or jax.config.values["jax_debug_infs"]
            if is_one_command() and num_processes() == 1 and "://" not in folder and not debugging:
                self._devices = list(devices)
                self._start = Path(folder) / f"start-{_hash_of(made_of, self._devices)}"
                self._background = ThreadPoolExecutor(1)
                self._reading = self._background.submit(self._read)

    def of(self, function: Callable, result: Any) -> Callable:
        """`function`, of `jax.jit`, traced later if its program was kept. `result` is a tree like what it returns."""
        if self._start is None:
            return function
        program: Callable | None = None
        structure = jax.tree.structure(result)

        def first(*args: Any) -> Any:
            nonlocal program
            shapes = jax.tree.map(_shape_of, args)
            if found := self._reading.result():
                flat, text = found
                program = lambda *args: structure.unflatten(flat(*jax.tree.leaves(args)))
                try:
                    made = jax.block_until_ready(program(*args))
                    self._unchecked = function, shapes, text
                    return made
                except jax.errors.JaxRuntimeError:
                    self._forget()
                    raise
                except (TypeError, ValueError):  # JAX refuses arguments of other types or places than at compilation
                    pass
            program = self._compile(function, shapes)
            return program(*args)

        def call(*args: Any) -> Any:
            nonlocal program
            try:
                return program(*args) if program else first(*args)
            except (TypeError, ValueError):  # JAX refuses arguments of other types or places than at first
                program = function
                return function(*args)

        return call

    def is_current(self) -> bool:
        """Whether the program that runs is the one to which the function is traced now; if not, it is removed."""
        if not self._unchecked:
            return True
        function, shapes, text = self._unchecked
        self._unchecked = None
        current = _hash_of_text(function.lower(*shapes)) == text
        if not current:
            self._forget()
        return current

    def _read(self) -> tuple[Callable, str] | None:
        """The program as a function of arrays, and the hash of its text; None where there is none to be trusted."""
        with contextlib.suppress(Exception):  # whatever a file holds, the program can be compiled
            start = parse_json(_read_sealed(self._start))
            program = _read_sealed(self._start.with_name(start["program"]))
            takes, gives = (jax.tree.structure((0,) * number) for number in start["arrays"])
            structures = jax.tree.structure((takes.unflatten([0] * takes.num_leaves), {})), gives
            places = {"backend": self._devices[0].client, "execution_devices": self._devices}
            return self._serializer.deserialize_and_load(program, *structures, **places), start["text"]
        return None

    def _compile(self, function: Callable, shapes: Any) -> Callable:
        _asked.clear()
        lowered = function.lower(*shapes)
        compiled = lowered.compile()
        mine = [found for thread, found in _asked if thread == threading.get_ident()]
        if len(mine) == 1:  # else there is no cache
            arrays = len(jax.tree.leaves(shapes)), compiled.out_tree.num_leaves
            self._background.submit(self._keep, lowered, compiled, arrays, *mine[0])
        return compiled

    def _keep(
        self, lowered: jax.stages.Lowered, compiled: jax.stages.Compiled, arrays: tuple[int, int], key: str, known: bool
    ) -> None:
        """Keeps a program under JAX's key for it.

        One that JAX had `known`, and has read from its cache, cannot be written again: what comes of it does not run.
        """
        with contextlib.suppress(Exception):  # not every kind of device can write it, and the disk may be full
            program = self._start.with_name(f"program-{key}")
            if not known:
                _write_sealed(program, self._serializer.serialize(compiled)[0])
            if program.exists():
                told = {"program": program.name, "arrays": arrays, "text": _hash_of_text(lowered)}
                _write_sealed(self._start, json.dumps(told).encode())
            for kind in ("program", "start"):
                paths = sorted(program.parent.glob(f"{kind}-*"), key=lambda path: path.stat().st_mtime)
                for old in paths[:-_MOST_KEPT]:
                    for file in (old, *old.parent.glob(f"{old.name.removeprefix('program-')}-sealed*")):
                        file.unlink()  # JAX's too, as what JAX has is not kept again

    def _forget(self) -> None:
        with contextlib.suppress(OSError):
            self._start.unlink(missing_ok=True)


def _shape_of(x: jax.Array) -> jax.ShapeDtypeStruct:
    place = x.sharding if x.committed else None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place, weak_type=getattr(x, "weak_type", False))


def _hash_of_text(lowered: jax.stages.Lowered) -> str:
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()


def _hash_of(made_of: str, devices: list[jax.Device]) -> str:
    settings = {name: value for name, value in jax.config.values.items() if name != "jax_compilation_cache_dir"}
    prefixes = "CUDA", "JAX", "LIBTPU", "NVIDIA", "TF", "TPU", "XLA"
    environment = {name: value for name, value in os.environ.items() if name.startswith(prefixes)}
    kinds = [(device.id, device.device_kind, device.client.platform_version) for device in devices]
    told = made_of, sys.version, processor(), kinds, sorted(settings.items()), sorted(environment.items())
    return hashlib.sha256(repr((*told, _loaded_files())).encode()).hexdigest()


@cache
def _loaded_files() -> list[tuple[str, int, int, int]]:
    """Every file that this process had loaded as a module by then: its size, when it was changed, and its entry was."""
    paths = {getattr(module, "__file__", None) for module in list(sys.modules.values())} - {None}
    found = ((path, os.stat(path)) for path in sorted(paths))
    return [(path, state.st_size, state.st_mtime_ns, state.st_ctime_ns) for path, state in found]


def _read_sealed(path: Path) -> bytes:
    """Raises ValueError if the file is damaged, and removes it."""
    content = read_file(path)
    if content[:32] != _seal(path.name, content[32:]):
        path.unlink()
        raise ValueError(f"{path} is damaged")
    with contextlib.suppress(OSError):  # another user's folder
        os.utime(path)  # the ones unused for longest are removed
    return content[32:]


def _write_sealed(path: Path, content: bytes) -> None:
    with replacing(path) as unfinished:
        unfinished.write_bytes(_seal(path.name, content) + content)
