"""What this machine has, for tests that need it or its absence."""

from engines.device import NoGpuError, current_gpu


def has_gpu() -> bool:
    try:
        current_gpu()
    except NoGpuError:
        return False
    return True


def why_no_gpu() -> str:
    """Empty where there is one."""
    try:
        current_gpu()
    except NoGpuError as error:
        return str(error)
    return ""
