"""
A local page that follows runs while they train: `python plot.py --serve --out_dir=out`.

Every second the page, live.html, requests /data.json, which is made from the runs' log.jsonl. For
each new model.bin, ./run (or sample.py, if ./run is not built) generates a story in a separate
process.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from configurator import UserError, check_range
from report.curves import Run, find_folders, thinned
from system.progress import print_line
from training.runlog import LOG

HERE = os.path.dirname(os.path.abspath(__file__))
REPO = os.path.dirname(HERE)
HOSTS = ("127.0.0.1", "localhost")
N_POINTS = 600  # maximum points per curve sent for a single run
MAX_RUNS = 60  # shown on the page
RECENT = 20  # log lines from which the remaining time is estimated
STORY_S = 120  # time limit for a story
POLL_S = 1.0  # between checks for a new model
CLIENT_S = 10  # from a client's connection to the end of its response
MAX_CLIENTS = 64  # at once
FIELDS = {
    "train": ("step", "tokens", "train_s", "loss", "grad_norm", "lr", "tok_s"),
    "evals": ("step", "tokens", "train_s", "val_loss", "val_bpb"),
}


def seconds_left(run):
    """Estimate the seconds until a run is done, or return None if that is impossible."""
    config, lines = run.start.get("config", {}), run.train[-RECENT:]
    if run.end or not lines or not config:
        return None
    first = last = lines[-1]
    if config.get("max_minutes"):
        return max(0.0, 60 * config["max_minutes"] - last["train_s"])
    for line in reversed(lines):  # time_s restarts when a run is resumed
        if line["time_s"] > first["time_s"]:
            break
        first = line
    n_steps = last["step"] - first["step"]
    if n_steps <= 0 or "max_iters" not in config:
        return None
    return (last["time_s"] - first["time_s"]) / n_steps * (config["max_iters"] - last["step"])


def state_of(run, n_points):
    """Return what the page shows of a run, ready for JSON."""
    config, last = run.start.get("config", {}), run.train[-1] if run.train else {}
    changed = last_change(run)
    state = {
        "name": run.name,
        "state": run.end.get("reason", "running"),
        "age": max(0.0, time.time() - changed) if changed else None,
        "step": last.get("step", 0),
        "max_iters": None if config.get("max_minutes") else config.get("max_iters"),
        "max_minutes": config.get("max_minutes") or None,
        "train_s": last.get("train_s", 0),
        "seconds_left": seconds_left(run),
        "tok_s": last.get("tok_s"),
        "mfu": last.get("mfu"),
        "n_params": run.start.get("n_params"),
        "device": run.start.get("device_name"),
        "skipped": run.n_skipped,
    }
    for kind, names in FIELDS.items():
        lines = thinned(getattr(run, kind), n_points)
        state[kind] = {name: [line.get(name) for line in lines] for name in names}
    return state


class Watcher:
    """The runs in some folders, and a story by their latest model."""

    def __init__(self, paths, start, engine):
        self.paths, self.start, self.lock = paths, start, threading.Lock()
        self.engine = os.path.abspath(engine) if engine else os.path.join(REPO, "run")
        self.runs, self.story, self.version = {}, None, None  # version: (path, mtime) of the model
        self.problem, self.process = "", None
        self.starting, self.is_closed = threading.Lock(), False  # no process starts after close()

    def state(self):
        """Return everything that the page shows."""
        with self.lock:
            try:
                for folder, name in find_folders(self.paths).items():
                    self.runs.setdefault(folder, Run(folder)).name = name
                self.problem = ""
            except UserError:  # a log may appear later
                self.problem = f"no {LOG} in {', '.join(self.paths)} yet"
            for run in self.runs.values():
                with contextlib.suppress(OSError):  # still show the others
                    run.read()
            newest = sorted(self.runs.values(), key=last_change, reverse=True)[:MAX_RUNS]
            # in a fixed order, so that each run keeps its color
            runs = [run for run in self.runs.values() if run in newest]
            n_points = max(60, N_POINTS // max(1, len(runs) // 4))
            states = [state_of(run, n_points) for run in runs]
        return {"runs": states, "story": self.story, "problem": self.problem, "now": time.time()}

    def update_stories(self):
        """Generate a story for every new model.bin, forever."""
        while True:
            with contextlib.suppress(OSError, UserError):
                self.update_story()
            time.sleep(POLL_S)

    def update_story(self):
        with self.lock:
            runs = {os.path.join(folder, "model.bin"): run for folder, run in self.runs.items()}
        models = list(filter(os.path.exists, runs))
        if not models:
            return
        path = max(models, key=os.path.getmtime)
        version = path, os.path.getmtime(path)
        if version == self.version:
            return
        self.version = version
        run = runs[path]
        text, step = self.generate(path), run.best.get("step")
        self.story = {"text": text, "run": run.name, "step": step, "time": version[1]}

    def generate(self, model):
        """Return a story by a model.bin, or the reason why there is none, in brackets."""
        if os.access(self.engine, os.X_OK):
            command = [self.engine, model, "-i", self.start, "-t", "0.8", "-s", "1", "-n", "256"]
        else:
            command = [
                *(sys.executable, os.path.join(REPO, "sample.py"), f"--checkpoint={model}"),
                *(f"--start={self.start}", "--temperature=0.8", "--seed=1"),
            ]
        # leave the cores to training
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        try:
            with self.starting:
                if self.is_closed:
                    return ""
                self.process = subprocess.Popen(command, env=environment, **pipes)
        except OSError as e:
            return f"(no story: cannot run {command[0]}: {e.strerror})"
        with self.process:
            try:
                out, err = self.process.communicate(timeout=STORY_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                return f"(no story within {STORY_S} s)"
        if self.process.returncode:
            lines = err.decode(errors="replace").strip().splitlines()
            return f"(no story: {lines[-1] if lines else 'the engine failed'})"
        return out.decode(errors="replace").strip()

    def close(self):
        """Kill the process that generates a story; it would outlive this one."""
        with self.starting:
            self.is_closed = True
            if self.process:
                self.process.kill()


def last_change(run):
    try:
        return os.stat(run.path).st_mtime
    except OSError:
        return 0.0


class Server(ThreadingHTTPServer):
    """
    A server with one thread per client. It disconnects slow clients after CLIENT_S, and the oldest
    client if there are more than MAX_CLIENTS.
    """

    daemon_threads = True
    request_queue_size = MAX_CLIENTS

    def __init__(self, *args):
        self.clients = {}  # {socket: time of its connection}, oldest first
        super().__init__(*args)

    def process_request(self, request, address):
        self.clients[request] = time.monotonic()
        if len(self.clients) > MAX_CLIENTS:
            self.disconnect(next(iter(self.clients)))
        super().process_request(request, address)

    def service_actions(self):
        limit = time.monotonic() - CLIENT_S
        for request in [r for r, connected in list(self.clients.items()) if connected < limit]:
            self.disconnect(request)

    def disconnect(self, request):
        self.clients.pop(request, None)
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)  # ends its thread too

    def shutdown_request(self, request):
        self.clients.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request, address):
        """Print an error, unless it is only a client that left or was disconnected."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            print_line(f"a request failed: {type(error).__name__}: {error}", sys.stderr)


def handler(watcher):
    """Return the class that answers requests for the page and its data."""
    with open(os.path.join(HERE, "live.html"), "rb") as f:
        page = f.read()

    class Handler(BaseHTTPRequestHandler):
        timeout = CLIENT_S

        def do_GET(self):
            host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
            path = self.path.partition("?")[0]
            if host not in HOSTS:  # DNS rebinding: a website's name resolves to this machine
                self.send_error(403)
            elif path == "/":
                self.respond("text/html; charset=utf-8", page)
            elif path == "/data.json":
                state = json.dumps(watcher.state(), allow_nan=False)
                self.respond("application/json", state.encode())
            else:
                self.send_error(404)

        def respond(self, content_type, body):
            self.send_response(200)
            for name, value in (
                ("Content-Type", content_type),
                ("Content-Length", str(len(body))),
                ("Cache-Control", "no-store"),
                ("X-Content-Type-Options", "nosniff"),
            ):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    return Handler


def serve_runs(paths, port, start, engine):
    """
    Serve the page for the runs in some folders until Ctrl-C; the folders may appear later. Raises
    UserError if the port is taken.
    """
    check_range(0, 65535, port=port)
    if engine and not os.access(engine, os.X_OK):
        raise UserError(f"engine = {engine}: expected a program; to build one, run: make run")
    watcher = Watcher(paths, start, engine)
    problem = watcher.state()["problem"]
    try:
        server = Server(("127.0.0.1", port), handler(watcher))
    except OSError as e:
        raise UserError(
            f"cannot use port {port}: {e.strerror}; choose another --port, or 0 for any free port"
        ) from None
    try:
        with contextlib.suppress(KeyboardInterrupt):
            # these stop the page as Ctrl-C does
            for signum in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
                signal.signal(signum, signal.default_int_handler)
            if start:
                threading.Thread(target=watcher.update_stories, daemon=True).start()
            if problem:
                print_line(f"waiting for a run: {problem}")
            address = f"http://127.0.0.1:{server.server_address[1]}"
            print_line(f"{address} follows {', '.join(paths)}; press Ctrl-C to stop")
            sys.stdout.flush()
            server.serve_forever(poll_interval=0.2)
    finally:
        watcher.close()
