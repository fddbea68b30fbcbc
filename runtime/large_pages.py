"""Memory in pages of 2 MiB for a program on a CPU, where Linux gives them only to who asks."""

import os
import sys
from contextlib import suppress

SETTING = "GLIBC_TUNABLES"  # whoever sets it, to nothing too, has decided
LARGE_PAGES = "glibc.malloc.hugetlb=1"
_POLICY = "/sys/kernel/mm/transparent_hugepage/enabled"
_RESTARTED = "TRANSFORMER_RESTARTED"  # for a Python with privileges, whom the setting is kept from: never twice


def restart_with_large_pages() -> None:
    """Begin this program anew, as the same process, so that glibc asks for large pages, where that changes anything.

    To be called before anything heavy is imported. XLA gives its temporary memory back after each step, and it comes
    anew as pages to be zeroed: 134,000 faults a step at 6 x 384, a tenth of its time. glibc reads the setting once, at
    the start of a process. See its manual, "Memory Allocation Tunables".
    """
    decided = SETTING in os.environ or _RESTARTED in os.environ
    if not decided and _can_ask() and _is_the_program():
        environment = {**os.environ, SETTING: LARGE_PAGES, _RESTARTED: "1"}
        with suppress(OSError):
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _can_ask() -> bool:
    """Whether there is a glibc of 2.35 or newer, on a kernel that gives large pages on demand and not unasked."""
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()  # "glibc 2.36"
        with open(_POLICY) as policy:
            on_demand = "[madvise]" in policy.read()
        return on_demand and name == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)
    except (OSError, ValueError, AttributeError):  # another system or C library
        return False


def _is_the_program() -> bool:
    """Whether the command line names what runs, so that it would run again: no notebook, debugger or profiler."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = [*(["-m", spec.name] if spec else sys.argv[:1]), *sys.argv[1:]]
    options, named = sys.orig_argv[1 : -len(program)], sys.orig_argv[-len(program) :]
    return named == program and all(option.startswith("-") for option in options)
