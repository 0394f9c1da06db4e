"""Changes of a module that are asked for before a program runs, and made once the program has imported it."""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType


class AfterImport(importlib.abc.MetaPathFinder):
    """Finds the module `name` as Python does, and calls `change(module)` once it has been imported."""

    def __init__(self, name: str, change: Callable[[ModuleType], object]):
        self.name, self.change = name, change
        sys.meta_path.insert(0, self)

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        exec_module = spec.loader.exec_module

        def execute(module):
            exec_module(module)
            self.change(module)

        spec.loader.exec_module = execute
        return spec
