"""A full disk, as this process sees it."""

import contextlib
import resource


@contextlib.contextmanager
def full_disk(after: int):
    """Inside, no file grows beyond ``after`` bytes; writing more raises an OSError without a file name."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
