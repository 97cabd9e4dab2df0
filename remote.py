"""
What leaves this machine, and what is fetched by name, where the user asks for it and only then:
models and checkpoints on the Hugging Face hub, metrics on Weights & Biases. Both need packages of
their own, and access tokens from the environment or a file .env.
"""

import contextlib
import importlib
import os
import queue
import re
import shutil
import sys
import threading

from tqdm import tqdm

from configurator import UserError
from files import link_or_copy, remove

CHECKPOINTS = "checkpoints"  # folder of a run's checkpoints in its repository on the hub
COMPANIONS = ("log.jsonl", "tokenizer.model", "tokenizer.bin")  # go there with them
WAITS_S = (2, 10, 60, 300)  # before an upload that failed is tried again


def need(package, extra="export"):
    """The module of an optional package; UserError says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"this needs {package}: pip install .[{extra}]") from None


def secret(name):
    """An access token from the environment, or from a file .env with lines NAME=value; or None."""
    found = os.environ.get(name)
    if not found and os.path.isfile(".env"):
        with open(".env", encoding="utf-8", errors="replace") as f:
            for line in f:
                key, _, value = line.strip().removeprefix("export ").partition("=")
                if key.strip() == name:
                    found = value.partition(" #")[0].strip().strip("\"'")
    found = (found or "").strip()
    if not re.fullmatch(r"[!-~]*", found):
        raise UserError(f"{name} is no access token: expected letters and digits")
    return found or None


# ---- models on the hub


def fetch_model(name):
    """The folder of a model of the hub, user/name or user/name@revision, kept in its cache."""
    hub = need("huggingface_hub")
    name, _, revision = name.partition("@")
    patterns = ["*config.json", "model*.safetensors", "model*.index.json", "tokenizer*"]
    try:
        return hub.snapshot_download(
            name, revision=revision or None, allow_patterns=patterns, token=secret("HF_TOKEN")
        )
    except Exception as e:  # of the hub, of the network, of the name
        raise UserError(f"cannot download {name}: {reason(e)}") from None


def check_push(name, dry_run=False):
    """Raise UserError unless an upload to user/name can begin, as far as can be seen from here."""
    hub = need("huggingface_hub")
    try:
        need("huggingface_hub.utils").validate_repo_id(name)
    except ValueError as e:
        raise UserError(f"cannot upload to {name}: {reason(e)}") from None
    if "/" not in name:
        raise UserError(f"cannot upload to {name}: expected user/name")
    if not (dry_run or secret("HF_TOKEN") or hub.get_token()):
        raise UserError(
            f"cannot upload to {name} without an access token: set HF_TOKEN, or write it to .env "
            f"as HF_TOKEN=..."
        )


def push(folder, name, private=False, dry_run=False):
    """Upload a folder as a model of the hub, user/name, which is made if it is not there."""
    hub = need("huggingface_hub")
    files = {n: os.path.getsize(os.path.join(folder, n)) for n in sorted(os.listdir(folder))}
    for file, size in files.items():
        print(f"  {file}  {size:,} bytes")
    if dry_run:
        print(f"dry run: these {len(files)} files would go to {name}; nothing was sent")
        return
    api = hub.HfApi(token=secret("HF_TOKEN"))
    try:
        api.create_repo(name, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload model")
    except Exception as e:
        raise UserError(
            f"cannot upload to {name}: {reason(e)}; {folder} is whole, run the same command again"
        ) from None
    print(f"uploaded to {done.repo_url if hasattr(done, 'repo_url') else name}")


def reason(error):
    """What an error says, in one line, without the access token."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or type(error).__name__
    return text.replace(secret("HF_TOKEN") or "\0", "***")


# ---- checkpoints on the hub


class Uploads:
    """
    Sends the checkpoints of a run to user/name in the background, each as one commit with the log
    and the tokenizer. What fails is tried again, and at the end once more; training never waits
    for it and never stops because of it. Names of the files that did not arrive are in `failed`.
    """

    def __init__(self, repo, out_dir, private=True, keep_local=True):
        """Raises UserError where the repository cannot be made, before anything is trained."""
        self.repo, self.out_dir, self.keep_local = repo, out_dir, keep_local
        check_push(repo)
        self.api = need("huggingface_hub").HfApi(token=secret("HF_TOKEN"))
        try:
            self.api.create_repo(repo, private=private, exist_ok=True)
        except Exception as e:
            raise UserError(f"cannot upload to {repo}: {reason(e)}") from None
        need("huggingface_hub.utils").disable_progress_bars()
        self.queue, self.arrived, self.failed = queue.Queue(), [], []
        self.ending = threading.Event()
        self.thread = None
        with contextlib.suppress(FileNotFoundError):  # of a run that was killed
            for name in sorted(os.listdir(os.path.join(out_dir, "uploads"))):
                self.send_in_background(name)

    def submit(self, path, name):
        """Send a checkpoint, a file or a folder, as `name`; what becomes of `path` is no matter."""
        staged = os.path.join(self.out_dir, "uploads", name)
        os.makedirs(os.path.join(staged, CHECKPOINTS), exist_ok=True)
        link_or_copy(path, os.path.join(staged, CHECKPOINTS, name))
        for other in COMPANIONS:  # as they are now: the log grows
            if os.path.exists(source := os.path.join(self.out_dir, other)):
                shutil.copy(source, os.path.join(staged, other))
        if not self.keep_local:  # those that became earlier ones since
            for earlier in self.arrived:
                remove(os.path.join(self.out_dir, earlier))
        self.send_in_background(name)

    def send_in_background(self, name):
        self.queue.put(name)
        if self.thread is None:
            self.thread = threading.Thread(target=self.work, daemon=True)
            self.thread.start()

    def work(self):
        while (name := self.queue.get()) is not None:
            if not self.send(name):
                self.failed.append(name)

    def send(self, name):
        """Whether a staged checkpoint arrived; its staged files are then removed."""
        staged = os.path.join(self.out_dir, "uploads", name)
        for wait in (*WAITS_S, None):
            try:
                self.api.upload_folder(
                    repo_id=self.repo, folder_path=staged, commit_message=f"Checkpoint {name}"
                )
            except Exception as e:  # of the hub or the network
                last = self.ending.is_set() or wait is None
                then = "it is tried once more at the end" if wait is None else f"again in {wait} s"
                warn(f"cannot upload {name} to {self.repo}: {reason(e)}; {then}")
                if last:
                    return False
                self.ending.wait(wait)
            else:
                remove(staged)
                self.arrived.append(name)
                return True
        return False

    def finish(self):
        """Wait for all uploads, try once more what failed; returns whether all arrived."""
        if self.thread:
            self.queue.put(None)
            if not self.queue.empty() or self.thread.is_alive():
                print(f"waiting for uploads to {self.repo}")
            self.thread.join()
        self.ending.set()
        self.failed = [name for name in self.failed if not self.send(name)]
        with contextlib.suppress(OSError):
            os.rmdir(os.path.join(self.out_dir, "uploads"))
        return not self.failed


def fetch_latest(repo, out_dir):
    """
    Bring the latest checkpoint of user/name, with its log, into out_dir as ckpt.pt, if there is
    one. Raises UserError where the hub does not answer.
    """
    hub, staged = need("huggingface_hub"), os.path.join(out_dir, "fetched.part")
    try:
        files = hub.HfApi(token=secret("HF_TOKEN")).list_repo_files(repo)
        pattern = re.compile(rf"{CHECKPOINTS}/(ckpt_(\d+)\.pt)(/|$)")
        found = {int(m[2]): m[1] for m in map(pattern.match, files) if m}
        if not found:
            return
        name = found[max(found)]
        print(f"{out_dir} has no checkpoint: going on from {name} of {repo}")
        wanted = [f"{CHECKPOINTS}/{name}", f"{CHECKPOINTS}/{name}/*", "log.jsonl"]
        hub.snapshot_download(
            repo, allow_patterns=wanted, local_dir=staged, token=secret("HF_TOKEN")
        )
    except hub.errors.RepositoryNotFoundError:
        return
    except Exception as e:
        raise UserError(f"cannot fetch a checkpoint of {repo}: {reason(e)}") from None
    if os.path.exists(log := os.path.join(staged, "log.jsonl")):
        os.replace(log, os.path.join(out_dir, "log.jsonl"))
    os.replace(os.path.join(staged, CHECKPOINTS, name), os.path.join(out_dir, "ckpt.pt"))
    remove(staged)


# ---- metrics


class Metrics:
    """
    The lines of a run's log on Weights & Biases, in the run whose id lies in out_dir/wandb_id: a
    resumed run goes on in it. A failure is said once and ends this, not the training.
    """

    def __init__(self, project, name, out_dir, config):
        """Raises UserError where wandb is not installed, or has no access token, at the start."""
        wandb = need("wandb", "wandb")
        if key := secret("WANDB_API_KEY"):
            os.environ["WANDB_API_KEY"] = key
        is_online = os.environ.get("WANDB_MODE", "online") == "online"
        if is_online and not (key or wandb.api.api_key):
            raise UserError(
                "wandb_project needs an access token: set WANDB_API_KEY, or write it to .env as "
                "WANDB_API_KEY=..., or set WANDB_MODE=offline"
            )
        id_path = os.path.join(out_dir, "wandb_id")
        words = {"project": project, "name": name or None, "config": config, "dir": out_dir}
        if os.path.exists(id_path):
            with open(id_path, encoding="utf-8") as f:
                words |= {"id": f.read().strip(), "resume": "allow"}
        try:
            self.run = wandb.init(**words)
            self.run.define_metric("*", step_metric="step")
        except Exception as e:
            raise UserError(f"cannot begin a run of {project} on wandb: {reason(e)}") from None
        with open(id_path, "w", encoding="utf-8") as f:
            f.write(self.run.id)

    @contextlib.contextmanager
    def surviving(self):
        try:
            yield
        except Exception as e:
            self.run = None
            warn(f"wandb fails ({reason(e)}); training goes on without it")

    def log(self, kind, values):
        """One line of the log: its numbers as kind/name, at its step."""
        if self.run is None or kind not in ("train", "eval"):
            return
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
        step = numbers.pop("step")  # a value of its own: a resumed run may go back
        with self.surviving():
            self.run.log({"step": step, **{f"{kind}/{k}": v for k, v in numbers.items()}})

    def finish(self):
        if self.run is not None:
            with self.surviving():
                self.run.finish()


def warn(text):
    tqdm.write(f"warning: {text}", file=sys.stderr)
