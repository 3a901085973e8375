"""A Python interpreter that starts with torch already imported: tests of the real commands take a third of the time.

A server imports torch and matplotlib once and then forks for each start. It imports no module of the project. The
forked process executes the script as __main__, so each run reads the project's code and its environment afresh. The
client is called like `python`, also by torchrun. It passes arguments, environment, directory and standard streams to
the server, forwards signals, and ends as the script ends. A client that is killed takes the script with it. Linux only.
RAWGPT_COLD_START=1 starts a new interpreter for each run instead.
"""

import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress

MODULES = [
    *("torch", "torch.distributed.checkpoint", "torch.distributed.tensor", "torch.distributed.fsdp", "torch._dynamo"),
    *("torch.distributed.optim", "torch.distributed.launcher.api", "torch.distributed.elastic.multiprocessing.errors"),
    *("torch.nn.attention.flex_attention", "matplotlib.pyplot", "numpy", "yaml", "safetensors.torch"),
    *("pydantic.main", "pydantic.types", "pydantic.json_schema"),
]
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCONT)


# --- client: imports as little as possible ---


def client(arguments):
    if "TORCHELASTIC_RUN_ID" in os.environ:  # end with torchrun, like a worker (util/launcher.py)
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(f"\0{os.environ['WARM_PYTHON']}")  # an abstract address: no file
    for number in FORWARDED:
        signal.signal(number, lambda number, frame: connection.send(bytes([number])))
    request = json.dumps({"argv": arguments, "env": dict(os.environ), "cwd": os.getcwd()}).encode()
    socket.send_fds(connection, [len(request).to_bytes(4, "little")], [0, 1, 2])
    connection.sendall(request)
    status = int(connection.recv(16) or 256)  # an empty answer: the server is gone
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) in FORWARDED:
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


# --- server ---


def serve(address):
    """Forks for each connection, until stdin ends. Returns the request in the process that is to execute it."""
    import gc
    import importlib

    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"\0{address}")
    listening.listen(64)
    print("listening", flush=True)
    for module in MODULES:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, reap)
    while True:
        ready, _, _ = select.select([listening, 0], [], [])
        if 0 in ready:
            os._exit(0)
        connection, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return monitor(connection)
        connection.close()


def reap(*_):
    """Waits for ended monitors, so that their CPU time counts as the server's."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def monitor(connection):
    """Forks the script and reports its end to the client. Returns the request in the forked process."""
    header, streams, _, _ = socket.recv_fds(connection, 4, 3)
    size, request = int.from_bytes(header, "little"), b""
    while len(request) < size:
        request += connection.recv(size - len(request))
    if (pid := os.fork()) == 0:
        connection.close()
        for target, stream in enumerate(streams):
            os.dup2(stream, target)
            os.close(stream)
        return json.loads(request)
    for stream in (0, 1, 2, *streams):  # the reader of the output waits for the script only
        os.close(stream)
    process = os.pidfd_open(pid)
    while True:
        ready, _, _ = select.select([connection, process], [], [])
        if process in ready:
            connection.send(str(os.waitpid(pid, 0)[1]).encode())
            os._exit(0)
        signals = connection.recv(16)
        for number in signals or [signal.SIGKILL]:
            os.kill(pid, number)
        if not signals:
            os._exit(0)


def execute(request):
    """Executes a request as `python` does: -u, then a script or -m and a module, then its arguments."""
    import runpy
    import types

    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for name, stream in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        setattr(sys, name, open(stream, "w" if stream else "r", buffering=1, closefd=False))
    sys.path[1:1] = filter(None, request["env"].get("PYTHONPATH", "").split(":"))
    arguments = request["argv"][1:] if request["argv"][0] == "-u" else request["argv"]
    if arguments[0] == "-m":
        sys.path[0], sys.argv = os.getcwd(), arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    script = arguments[0]
    sys.path[0], sys.argv = os.path.dirname(os.path.abspath(script)), arguments
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__file__ = script
    with open(script) as f:
        code = compile(f.read(), script, "exec")
    exec(code, main.__dict__)


if __name__ == "__main__":
    if "WARM_PYTHON" in os.environ:
        client(sys.argv[1:])
    else:
        execute(serve(sys.argv[1]))
