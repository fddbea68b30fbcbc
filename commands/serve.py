"""Answer OpenAI's completions with a trained model, and show a page to try it on."""

import socket
import threading
from functools import partial
from pathlib import Path

from absl import flags

import run_lib
from commands.flags import define_checkpoint, parse_flags
from corpus.chat import chat_tokens
from runtime import devices, programs
from runtime.errors import UserError, one_line
from runtime.screen.console import Console
from runtime.signals import StopSignals

_LOCAL = ["localhost", "127.0.0.1", "::1"]


def _define(values: flags.FlagValues) -> None:
    define_checkpoint(values)
    flags.DEFINE_string("host", "127.0.0.1", "The address to listen on; other machines reach 0.0.0.0.", values)
    flags.DEFINE_integer("port", 8000, "0 takes a free one.", 0, 65535, values)
    flags.DEFINE_integer("max_batch", 8, "Texts that are written at the same time.", 1, None, values)
    flags.DEFINE_integer("queue", 256, "Texts that may wait; one more is refused.", 0, None, values)
    flags.DEFINE_integer("max_tokens", 4096, "The most that a request may ask for.", 1, None, values)
    flags.DEFINE_integer("timeout", 600, "Seconds after which a text ends.", 1, None, values)
    flags.DEFINE_integer("grace", 30, "Seconds in which texts may end after SIGTERM or Ctrl-C.", 1, None, values)


def main(argv: list[str]) -> None:
    values, console = parse_flags("serve", __doc__, argv, _define), Console()
    try:
        import uvicorn

        from serving.api import Service
        from serving.engine import Engine
    except ModuleNotFoundError as error:
        raise UserError(f"serve: needs {error.name}; pip install -r requirements-serve.txt") from error
    workdir, host = Path(values.workdir), values.host
    stopping = "stopping: what is being written is finished; once more stops at once"
    with StopSignals(lambda _: console.warn(stopping)) as stop:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listening = socket.create_server((host, values.port), family=family, backlog=1024)
        except OSError as error:
            message = f"--port={values.port}: cannot listen on {host} ({one_line(error)}); name another"
            raise UserError(message) from error
        with listening:
            programs.set_up_compile_cache(console.warn)
            devices.start_jax()
            model, tokenizer, config, meta = run_lib.load_model(workdir, values.step, console.warn, values.weights)
            with console.busy("compiling"), devices.memory_limit("--max_batch", "lower it"):
                size = values.max_batch, values.queue
                engine = Engine(model, tokenizer.ends, tokenizer.unsampled, *size, warn=console.warn)
            chat = partial(chat_tokens, tokenizer) if config.chat else None
            hosts = [*_LOCAL, host] if host in _LOCAL else []
            name = workdir.resolve().name
            service = Service(engine, tokenizer, name, values.max_tokens, values.timeout, chat, hosts)
            quiet = {"log_config": None, "access_log": False, "lifespan": "off", "ws": "none"}
            server = uvicorn.Server(uvicorn.Config(service.app(), timeout_graceful_shutdown=values.grace, **quiet))
            # The library takes over the signals if it runs in the main thread.
            thread = threading.Thread(target=server.run, args=([listening],), name="http", daemon=True)
            with engine:
                thread.start()
                address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
                console.line(f"{workdir} (checkpoint {meta['step']}) at {address} and {address}/v1; Ctrl-C stops")
                if host not in _LOCAL:
                    console.warn(f"--host={host}: everybody who reaches this address may use the model")
                while thread.is_alive() and stop.signum is None and engine.error is None:
                    thread.join(0.1)
                server.should_exit = True
                thread.join()
        stop.raise_if_set()
