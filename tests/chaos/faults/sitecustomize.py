"""Inject faults into the training loop of every process that has this directory in PYTHONPATH.

At step FAULT_STEP, from 0, rank FAULT_RANK raises a TypeError. STEP_SECONDS is added to each step, so that a
signal arrives between two steps.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import time

_MODULE = "orchestrator.train.loop"


class _Loader(importlib.abc.Loader):
    def __init__(self, real):
        self._real = real

    def create_module(self, spec):
        return self._real.create_module(spec)

    def exec_module(self, module):
        self._real.exec_module(module)
        run_step = module.run_step

        def changed(engine, context, step, clock):
            time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
            if (str(step), str(context.rank)) == (os.environ.get("FAULT_STEP"), os.environ.get("FAULT_RANK")):
                raise TypeError(f"unsupported operand at {id(object()):#x}")
            return run_step(engine, context, step, clock)

        module.run_step = changed


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != _MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        spec.loader = _Loader(spec.loader)
        return spec


if {"FAULT_STEP", "STEP_SECONDS"} & os.environ.keys():
    sys.meta_path.insert(0, _Finder())
