"""Tests of the Triton kernels in Triton's interpreter.  Triton decides when it is imported whether
it interprets, so they have a process of their own:

    TRITON_INTERPRET=1 pytest tests/triton/interpreter

Those that ask only for numbers also run on Triton's compiled code (docs/design/emulation.md):

    ATTN_EXT_EMULATED_RUNS=triton-ptx pytest tests/triton/interpreter/test_mixes.py

What a test named test_planted_bug... sees is decided by sources alone: where tests/seen has it of
these (tests/helpers/seen.py), it is computed again in turn only.
"""

import os

import numpy as np
import pytest
import seen
import triton_seen

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = os.environ.get("ATTN_EXT_EMULATED_RUNS") == "triton-ptx"
if not INTERPRETING and not COMPILED:
    collect_ignore_glob = ["test_*.py"]
elif INTERPRETING:
    import triton
    from triton.runtime import interpreter

    if triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        # Triton 3.6 makes an int of an array of one element, which numpy 2.4 refuses
        patch = interpreter._patch_lang_tensor

        def patch_lang_tensor(tensor, scope):
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

        interpreter._patch_lang_tensor = patch_lang_tensor

    # The interpreter of Triton 3.6 to 3.9 goes through all of triton.language at each call of a
    # function of a kernel, to replace what a launch has replaced already: half of the time of these
    # tests.  Once a launch and module is enough.
    replaced = set()
    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__

    def patch_lang_once(fn):
        if id(fn.__globals__) in replaced:
            return interpreter._LangPatchScope()
        replaced.add(id(fn.__globals__))
        return patch_lang(fn)

    def launch_anew(self, *args, **kwargs):
        replaced.clear()
        return launch(self, *args, **kwargs)

    if triton.__version__.startswith(("3.6.", "3.7.", "3.8.", "3.9.")):
        interpreter._patch_lang = patch_lang_once
        interpreter.GridExecutor.__call__ = launch_anew


@pytest.fixture(autouse=True)
def quiet():
    """inf - inf and 0 * NaN are what some cases are about; numpy need not warn of them."""
    with np.errstate(all="ignore"):
        yield


def is_planted(item) -> bool:
    """Whether a test's outcome is decided by sources alone, and hence known for these."""
    return INTERPRETING and item.name.startswith("test_planted_bug")


def line(item) -> str:
    """The line of a test in the table."""
    return f"{item.path.stem}: {item.name}"


def pytest_collection_finish(session):
    """Two planted bugs are due at each commit, whatever was seen."""
    session.due = seen.sample([line(item) for item in session.items if is_planted(item)], 2)


def pytest_pyfunc_call(pyfuncitem):
    """A call whose outcome is known is done."""
    if is_planted(pyfuncitem):
        name, digest = line(pyfuncitem), triton_seen.interpreted(pyfuncitem.path)
        due = pyfuncitem.session.due
        return seen.known(triton_seen.INTERPRETED, name, digest, due) or None
    return None


def pytest_runtest_makereport(item, call):
    """What was computed and passed is written down, where that is asked for."""
    if call.when == "call" and call.excinfo is None and is_planted(item):
        digest = triton_seen.interpreted(item.path)
        seen.passed(triton_seen.INTERPRETED, line(item), digest)
