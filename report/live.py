"""
A page on this machine that follows runs while they train: `python plot.py --serve --out_dir=out`.

The page is live.html; it asks /data.json every second, which is made from the runs' log.jsonl. The
latest story is told whenever there is a new model.bin, by ./run where it is built and else by
sample.py, in a process of its own.
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

HERE = os.path.dirname(os.path.abspath(__file__))
REPO = os.path.dirname(HERE)
HOSTS = ("127.0.0.1", "localhost")
N_POINTS = 600  # of a curve that are sent, where there is one run
MOST_RUNS = 60  # that a page shows
RECENT = 20  # lines of the log that the time left is estimated from
STORY_S = 120  # after which a story is given up
LOOK_S = 1.0  # between looks for a new model
CLIENT_S = 10  # from a client's connection to the end of its answer
MOST_CLIENTS = 64  # at once
FIELDS = {
    "train": ("step", "tokens", "train_s", "loss", "grad_norm", "lr", "tok_s"),
    "evals": ("step", "tokens", "train_s", "val_loss", "val_bpb"),
}


def seconds_left(run):
    """An estimate of the seconds until a run is done; None where it cannot be told."""
    config, lines = run.start.get("config", {}), run.train[-RECENT:]
    if run.end or not lines or not config:
        return None
    first = last = lines[-1]
    if config.get("max_minutes"):
        return max(0.0, 60 * config["max_minutes"] - last["train_s"])
    for line in reversed(lines):  # the clock begins anew where a run was resumed
        if line["time_s"] > first["time_s"]:
            break
        first = line
    n_steps = last["step"] - first["step"]
    if n_steps <= 0 or "max_iters" not in config:
        return None
    return (last["time_s"] - first["time_s"]) / n_steps * (config["max_iters"] - last["step"])


def state_of(run, n_points):
    """What the page shows of a run, as JSON can carry it."""
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
    """The runs of some folders, and the story of the latest model among them."""

    def __init__(self, paths, start, engine):
        self.paths, self.start, self.lock = paths, start, threading.Lock()
        self.engine = os.path.abspath(engine) if engine else os.path.join(REPO, "run")
        self.runs, self.story, self.told = {}, None, None
        self.problem, self.teller = "", None
        self.starting, self.is_closed = threading.Lock(), False  # no story begins after close()

    def look(self):
        """The state of everything, for the page."""
        with self.lock:
            try:
                for folder, name in find_folders(self.paths).items():
                    self.runs.setdefault(folder, Run(folder)).name = name
                self.problem = ""
            except UserError:  # it may come yet
                self.problem = f"train.py has no log in {', '.join(self.paths)} yet"
            for run in self.runs.values():
                with contextlib.suppress(OSError):  # the others are shown all the same
                    run.read()
            newest = sorted(self.runs.values(), key=last_change, reverse=True)[:MOST_RUNS]
            # in the order of their names, so that each keeps its colour
            runs = [run for run in self.runs.values() if run in newest]
            n_points = max(60, N_POINTS // max(1, len(runs) // 4))
            states = [state_of(run, n_points) for run in runs]
        return {"runs": states, "story": self.story, "problem": self.problem, "now": time.time()}

    def tell_stories(self):
        """Forever: a story for every new model.bin."""
        while True:
            with contextlib.suppress(OSError, UserError):
                self.tell_one()
            time.sleep(LOOK_S)

    def tell_one(self):
        with self.lock:
            runs = {os.path.join(folder, "model.bin"): run for folder, run in self.runs.items()}
        models = list(filter(os.path.exists, runs))
        if not models:
            return
        path = max(models, key=os.path.getmtime)
        version = path, os.path.getmtime(path)
        if version == self.told:
            return
        self.told = version
        run = runs[path]
        text, step = self.text_of(path), run.best.get("step")
        self.story = {"text": text, "run": run.name, "step": step, "time": version[1]}

    def text_of(self, model):
        """A story by model.bin, or a sentence on why there is none."""
        if os.access(self.engine, os.X_OK):
            words = [self.engine, model, "-i", self.start, "-t", "0.8", "-s", "1", "-n", "256"]
        else:
            words = [
                *(sys.executable, os.path.join(REPO, "sample.py"), f"--checkpoint={model}"),
                *(f"--start={self.start}", "--temperature=0.8", "--seed=1"),
            ]
        # training wants the cores
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        try:
            with self.starting:
                if self.is_closed:
                    return ""
                self.teller = subprocess.Popen(words, env=environment, **pipes)
        except OSError as e:
            return f"(no story: {words[0]}: {e.strerror})"
        with self.teller:
            try:
                out, err = self.teller.communicate(timeout=STORY_S)
            except subprocess.TimeoutExpired:
                self.teller.kill()
                return f"(no story within {STORY_S} s)"
        if self.teller.returncode:
            lines = err.decode(errors="replace").strip().splitlines()
            return f"(no story: {lines[-1] if lines else 'the engine failed'})"
        return out.decode(errors="replace").strip()

    def close(self):
        """End the process that tells a story, which would outlive this one."""
        with self.starting:
            self.is_closed = True
            if self.teller:
                self.teller.kill()


def last_change(run):
    try:
        return os.stat(run.path).st_mtime
    except OSError:
        return 0.0


class Server(ThreadingHTTPServer):
    """
    Answers each client in a thread. A client that is slow to ask or to read is cut off after
    CLIENT_S, and the oldest one where there are more than MOST_CLIENTS.
    """

    daemon_threads = True
    request_queue_size = MOST_CLIENTS

    def __init__(self, *words):
        self.clients = {}  # {socket: when it came}, the oldest first
        super().__init__(*words)

    def process_request(self, request, address):
        self.clients[request] = time.monotonic()
        if len(self.clients) > MOST_CLIENTS:
            self.cut_off(next(iter(self.clients)))
        super().process_request(request, address)

    def service_actions(self):
        late = time.monotonic() - CLIENT_S
        for request in [r for r, came in list(self.clients.items()) if came < late]:
            self.cut_off(request)

    def cut_off(self, request):
        self.clients.pop(request, None)
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)  # its thread finds the connection closed

    def shutdown_request(self, request):
        self.clients.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request, address):
        """Says what went wrong; a client that has left or was cut off is nothing to tell."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            print_line(f"a request failed: {type(error).__name__}: {error}", sys.stderr)


def handler(watcher):
    """The class that answers requests: the page, and its data."""
    with open(os.path.join(HERE, "live.html"), "rb") as f:
        page = f.read()

    class Handler(BaseHTTPRequestHandler):
        timeout = CLIENT_S

        def do_GET(self):
            host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
            path = self.path.partition("?")[0]
            if host not in HOSTS:  # a page of the web that has this machine's address as its name
                self.send_error(403)
            elif path == "/":
                self.answer("text/html; charset=utf-8", page)
            elif path == "/data.json":
                state = json.dumps(watcher.look(), allow_nan=False)
                self.answer("application/json", state.encode())
            else:
                self.send_error(404)

        def answer(self, kind, body):
            self.send_response(200)
            for name, value in (
                ("Content-Type", kind),
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
    Serve the page for the runs of some folders until Ctrl-C; folders may come into being later.
    Raises UserError where the port is taken.
    """
    check_range(0, 65535, port=port)
    if engine and not os.access(engine, os.X_OK):
        raise UserError(f"engine = {engine} is not a program; build it with: make run")
    watcher = Watcher(paths, start, engine)
    problem = watcher.look()["problem"]
    try:
        server = Server(("127.0.0.1", port), handler(watcher))
    except OSError as e:
        raise UserError(
            f"port {port} cannot be used ({e.strerror}): give another with --port, or 0 for any"
        ) from None
    try:
        with contextlib.suppress(KeyboardInterrupt):
            for signum in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):  # as Ctrl-C
                signal.signal(signum, signal.default_int_handler)
            if start:
                threading.Thread(target=watcher.tell_stories, daemon=True).start()
            if problem:
                print_line(f"waiting for a run: {problem}")
            address = f"http://127.0.0.1:{server.server_address[1]}"
            print_line(f"{address} follows {', '.join(paths)}; Ctrl-C ends it")
            sys.stdout.flush()
            server.serve_forever(poll_interval=0.2)
    finally:
        watcher.close()
