"""
Runs scripts for the tests in forks of a process that has already loaded torch, because loading it
takes most of a short script's time. Each input line is a request, each output line its answer:

    {"argv": [script, args...], "cwd": folder, "env": {}, "out": file, "err": file} -> exit status

argv can also be ["-m", module, args...].
"""

import atexit
import contextlib
import json
import os
import runpy
import sys
import threading

import numpy  # noqa: F401
import requests  # noqa: F401
import sentencepiece  # noqa: F401
import torch
import torch._dynamo
import torch.distributed  # noqa: F401
import tqdm  # noqa: F401


def run(request):
    """Do what `python argv...` does, from the start of the script to its exit status."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_TRUNC), number)
    sys.argv = request["argv"]
    is_module = sys.argv[0] == "-m"
    sys.path[0] = os.getcwd() if is_module else os.path.dirname(sys.argv[0])
    status = 0
    try:
        if is_module:
            del sys.argv[0]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    for line in sys.stdin:
        child = os.fork()
        if not child:
            try:
                run(json.loads(line))
            finally:
                os._exit(1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
