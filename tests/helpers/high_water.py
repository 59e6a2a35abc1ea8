"""The memory that a script of its own process takes."""

import subprocess
import sys

# Not getrusage's ru_maxrss, which begins with the memory of the process that started this one.
_PRELUDE = """
def high_water():
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
"""


def grown_mib(script: str) -> float:
    """By how much the largest resident set grew after the line of `script` that says
    `before = high_water()`."""
    text = f"{_PRELUDE}{script}\nprint(high_water() - before)\n"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) / 1024
