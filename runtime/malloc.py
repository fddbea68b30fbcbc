"""glibc's memory for a program on a CPU: in pages of 2 MiB where Linux gives them only on request, and given back."""

import ctypes
import os
import sys
from contextlib import suppress

SETTING = "GLIBC_TUNABLES"  # if the user sets it, even to nothing, it is left alone
LARGE_PAGES = "glibc.malloc.hugetlb=1"
_POLICY = "/sys/kernel/mm/transparent_hugepage/enabled"
_RESTARTED = "TRANSFORMER_RESTARTED"  # ends a loop: a privileged Python never sees SETTING


def restart_with_large_pages() -> None:
    """Re-execute this program once, as the same process, so that glibc asks for large pages, if that has an effect.

    It is called before anything heavy is imported. XLA returns its temporary memory after each step and gets fresh
    pages, which the kernel has to zero: 134,000 page faults a step at 6 x 384, a tenth of its time. glibc reads the
    setting only at the start of a process. See its manual, "Memory Allocation Tunables".
    """
    decided = SETTING in os.environ or _RESTARTED in os.environ
    if not decided and _can_ask() and _is_the_program():
        environment = {**os.environ, SETTING: LARGE_PAGES, _RESTARTED: "1"}
        with suppress(OSError):
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _can_ask() -> bool:
    """Whether glibc is 2.35 or newer, on a kernel that gives large pages only on request."""
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()  # "glibc 2.36"
        with open(_POLICY) as policy:
            on_demand = "[madvise]" in policy.read()
        return on_demand and name == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)
    except (OSError, ValueError, AttributeError):  # another system or C library
        return False


def _is_the_program() -> bool:
    """Whether the command line would run the same program again: not in a notebook, debugger or profiler."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = [*(["-m", spec.name] if spec else sys.argv[:1]), *sys.argv[1:]]
    options, named = sys.orig_argv[1 : -len(program)], sys.orig_argv[-len(program) :]
    return named == program and all(option.startswith("-") for option in options)


def give_back_freed() -> None:
    """Hand memory that was freed back to the system at once, where the C library can (`malloc_trim`).

    After Orbax has written a large state, glibc would keep half a GiB in pieces into which no later array fits.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
