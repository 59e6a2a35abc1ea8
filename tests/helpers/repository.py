"""The source tree, and Python files of it that are no modules of a package."""

import importlib.util
import runpy
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]


def load(path: str):
    """The file as a module of its own name; path: from the top of the tree."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_script(path: str, *arguments: str) -> int:
    """Run a file of the tree as the command line would, in this process, which has torch already;
    its exit code."""
    file = ROOT / path
    argv = mock.patch.object(sys, "argv", [str(file), *map(str, arguments)])
    with argv, mock.patch.object(sys, "path", [str(file.parent), *sys.path]):
        try:
            runpy.run_path(str(file), run_name="__main__")
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
                return 1
            return end.code or 0
    return 0
