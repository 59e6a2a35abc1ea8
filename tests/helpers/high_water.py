"""The memory that a script of its own process takes."""

import os
import subprocess
import sys

# Not getrusage's ru_maxrss, which begins with the memory of the process that started this one.
_PRELUDE = """
def high_water():
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
"""


# glibc raises this threshold to the largest block that was freed, and keeps smaller ones for later:
# what it kept of several tensors that never lived together was counted, 99 to 185 MiB from one run
# to the next where 72 were in use at once.  A fixed threshold gives each such block back.
_GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}


def grown_mib(script: str) -> float:
    """By how much the largest resident set grew after the line of `script` that says
    `before = high_water()`."""
    text = f"{_PRELUDE}{script}\nprint(high_water() - before)\n"
    env = {**os.environ, **_GIVEN_BACK}
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) / 1024
