"""A process with less than usual."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def few_descriptors(most: int) -> Iterator[None]:
    """This process may open files up to descriptor `most`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
