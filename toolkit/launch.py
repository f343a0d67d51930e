"""Runs a module as one of the package `ark`, whatever this folder is called, and with nothing of it installed.

    python toolkit/launch.py ark.toolkit.doctor --json

The pack's own __init__ is passed over: where a host can be imported, it would be.
"""

import os
import runpy
import sys
import types

if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    if sys.path and os.path.abspath(sys.path[0]) == here:
        sys.path.pop(0)  # its names are the package's
    package = types.ModuleType("ark")
    package.__path__ = [os.path.dirname(here)]
    sys.modules["ark"] = package
    sys.argv.pop(0)
    runpy.run_module(sys.argv[0], run_name="__main__")
