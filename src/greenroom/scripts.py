"""Somebody's script with greenroom behind its offloading, as plain Python would run it."""

from __future__ import annotations

import builtins
import functools
import io
import os
import runpy
import sys
import types
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader

Hook = Callable[[type[BaseException], BaseException, types.TracebackType | None], object]


def run_script(path: str, arguments: Sequence[str]) -> None:
    """Run a file like ``python path ...``.

    The process is the script's from here on: nothing is put back when it ends. What it raises is
    raised, ``SystemExit`` included.
    """
    sys.argv = [path, *arguments]
    _set_first_path(os.path.dirname(os.path.realpath(path)))
    # Not runpy: it takes __main__ away when the script ends, with threads perhaps still in it.
    full = os.path.abspath(path)
    main = types.ModuleType("__main__")
    vars(main).update(
        __file__=full,
        __cached__=None,
        __builtins__=builtins,
        __loader__=SourceFileLoader("__main__", full),
        __annotations__={},
    )
    sys.modules["__main__"] = main

    def execute() -> None:
        with io.open_code(full) as file:
            code = compile(file.read(), full, "exec", dont_inherit=True)
        exec(code, vars(main))

    _let_go(execute)


def run_module(name: str, arguments: Sequence[str]) -> None:
    """Run a module like ``python -m name ...``; else like `run_script`."""
    sys.argv = [name, *arguments]
    _set_first_path(os.getcwd())
    _let_go(lambda: runpy.run_module(name, run_name="__main__", alter_sys=True))


def _set_first_path(folder: str) -> None:
    # With -P, Python puts nothing there.
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = folder


def _let_go(execute: Callable[[], object]) -> None:
    try:
        execute()
    except BaseException:
        # Python prints the traceback once this process has nothing more to do: let it leave out
        # the frames above the script's.
        sys.excepthook = functools.partial(_print_without_ours, sys.excepthook)
        raise


def _print_without_ours(
    hook: Hook, kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
    is_below = False
    kept = trace
    while kept is not None and not (is_below and not _is_ours(kept)):
        is_below = is_below or kept.tb_frame.f_code is _let_go.__code__
        kept = kept.tb_next
    if is_below:
        error.__traceback__ = trace = kept
    hook(kind, error, trace)


def _is_ours(trace: types.TracebackType) -> bool:
    return trace.tb_frame.f_globals.get("__name__") in (__name__, "runpy")
