"""A process with less than usual: few descriptors, a short life."""

import os
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def few_descriptors(most: int) -> Iterator[None]:
    """This process may open files up to descriptor `most`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


KILLED = 137
CHANGES = ("replace", "rename", "unlink", "mkdir", "rmdir")  # what a folder looks like changes in these calls alone


def died_at(number: int, work: Callable[[], object]) -> bool:
    """Do `work` in a forked child that dies, with nothing done behind it, just before its `number`-th change of a folder.

    Returns:
        False if it ended before, without an error.
    """
    sys.stdout.flush()
    child = os.fork()
    if not child:
        code, parent, count = 1, os.getpid(), 0

        def counted(change: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                nonlocal count
                count += os.getpid() == parent
                if count == number:
                    os._exit(KILLED)
                return change(*args, **options)

            return call

        try:
            for name in CHANGES:
                setattr(os, name, counted(getattr(os, name)))
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED), code
    return code == KILLED
