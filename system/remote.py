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
import time

from configurator import UserError
from system.files import link_or_copy, remove, replace
from system.progress import print_line

UPLOADS = "uploads"  # folder in out_dir of what is on its way
TIMEOUT_S = 300  # without an answer of the hub, which by itself would be waited for for ever
MOST_WAITING = 3  # that did not arrive and are kept for another try, lest they fill the disk
CHECKPOINTS = "checkpoints"  # folder of a run's checkpoints in its repository on the hub
COMPANIONS = ("log.jsonl", "tokenizer.model", "tokenizer.bin", "wandb_id")  # go there with them
WITH_RUN = ("log.jsonl", "wandb_id")  # and are fetched with them
NAME = re.compile(r"ckpt_(\d+)\.pt")
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
        with open(".env", encoding="utf-8-sig", errors="replace") as f:
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
    words = {"revision": revision or None, "token": secret("HF_TOKEN")}
    patterns = ["*config.json", "model*.safetensors", "model*.index.json", "tokenizer*"]
    try:
        folder = hub.snapshot_download(name, allow_patterns=patterns, **words)
        if not any(file.endswith(".safetensors") for file in os.listdir(folder)):
            hub.snapshot_download(name, allow_patterns=["pytorch_model*"], **words)
        return folder
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
    print(f"uploaded to {done.repo_url}")


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

    def __init__(self, repo, out_dir, private=True, keep_local=True, is_new=False):
        """
        is_new: the run begins, so that a repository with another's checkpoints is refused. Raises
        UserError where uploads cannot begin, before anything is trained.
        """
        self.repo, self.out_dir, self.keep_local = repo, out_dir, keep_local
        check_push(repo)
        limit_waiting()
        self.api = need("huggingface_hub").HfApi(token=secret("HF_TOKEN"))
        try:
            self.api.create_repo(repo, private=private, exist_ok=True)
            found = checkpoints_of(repo) if is_new else {}
        except Exception as e:
            raise UserError(f"cannot upload to {repo}: {reason(e)}") from None
        if found:
            raise UserError(
                f"{repo} has {found[max(found)]} of another run: give another --hub_repo, or go on "
                f"with that run in an empty --out_dir by --resume=auto"
            )
        need("huggingface_hub.utils").disable_progress_bars()
        self.queue, self.arrived, self.failed = queue.Queue(), [], []
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()
        with contextlib.suppress(FileNotFoundError):  # of a run that was killed
            for name in sorted(os.listdir(self.staged(""))):
                if NAME.fullmatch(name):
                    self.queue.put(name)
                else:
                    remove(self.staged(name))

    def staged(self, name):
        return os.path.join(self.out_dir, UPLOADS, name)

    def submit(self, path, name):
        """Send a checkpoint, a file or a folder, as `name`; what becomes of `path` is no matter."""
        staged, part = self.staged(name), self.staged(f"{name}.part")
        try:
            remove(part)
            os.makedirs(os.path.join(part, CHECKPOINTS))
            link_or_copy(path, os.path.join(part, CHECKPOINTS, name))
            for other in COMPANIONS:  # as they are now: the log grows
                if os.path.exists(source := os.path.join(self.out_dir, other)):
                    shutil.copy(source, os.path.join(part, other))
            replace(part, staged)
        except OSError as e:
            remove(part)
            warn(f"cannot prepare the upload of {name}: {reason(e)}")
            return
        while len(self.failed) > MOST_WAITING:
            remove(self.staged(given_up := self.failed.pop(0)))
            warn(f"{given_up} will not reach {self.repo}: too many are waiting")
        self.tidy()
        self.queue.put(name)

    def tidy(self):
        """Delete here what has arrived and has become an earlier checkpoint, if that is asked."""
        for earlier in self.arrived if not self.keep_local else ():
            remove(os.path.join(self.out_dir, earlier))

    def work(self):
        while (name := self.queue.get()) is not None:
            if not self.send(name):
                self.failed.append(name)

    def send(self, name):
        """Whether a staged checkpoint arrived, after some tries; it is then no more staged."""
        for wait in WAITS_S:
            if self.send_once(name, f"again in {wait} s"):
                return True
            if self.ending.wait(wait):
                return False
        return self.send_once(name, "it is tried again at the end")

    def send_once(self, name, then):
        staged = self.staged(name)
        if not os.path.isdir(staged):  # the same step was sent twice: that of a resumed run
            return True
        try:
            self.api.upload_folder(
                repo_id=self.repo, folder_path=staged, commit_message=f"Checkpoint {name}"
            )
        except Exception as e:  # of the hub or the network
            warn(f"cannot upload {name} to {self.repo}: {reason(e)}; {then}")
            return False
        remove(staged)
        self.arrived.append(name)
        return True

    def finish(self):
        """Wait for all uploads, try some more what failed; returns whether all arrived."""
        self.queue.put(None)
        self.ending.set()
        print(f"waiting for uploads to {self.repo}")
        self.thread.join()
        for wait in (*WAITS_S, 0):
            then = f"again in {wait} s" if wait else "it stays here"
            self.failed = [name for name in self.failed if not self.send_once(name, then)]
            if not self.failed:
                break
            time.sleep(wait)
        self.tidy()
        with contextlib.suppress(OSError):
            os.rmdir(self.staged(""))
        return not self.failed


def limit_waiting():
    """Have huggingface_hub give up a request that is not answered for TIMEOUT_S."""
    with contextlib.suppress(ImportError, AttributeError):  # another version of it
        from huggingface_hub import set_client_factory
        from huggingface_hub.utils._http import default_client_factory

        def factory():
            client = default_client_factory()
            client.timeout = TIMEOUT_S
            return client

        set_client_factory(factory)


def checkpoints_of(repo):
    """{step: name} of the checkpoints of user/name on the hub."""
    files = need("huggingface_hub").HfApi(token=secret("HF_TOKEN")).list_repo_files(repo)
    names = {file.split("/")[1] for file in files if file.startswith(f"{CHECKPOINTS}/")}
    return {int(m[1]): m[0] for m in map(NAME.fullmatch, names) if m}


def fetch_latest(repo, out_dir):
    """
    Bring the latest checkpoint of user/name, with its log, into out_dir as ckpt.pt, if there is
    one. Raises UserError where the hub does not answer.
    """
    hub, staged = need("huggingface_hub"), os.path.join(out_dir, "fetched.part")
    limit_waiting()
    try:
        found = checkpoints_of(repo)
        if not found:
            return
        name = found[max(found)]
        print(f"{out_dir} has no checkpoint: going on from {name} of {repo}")
        wanted = [f"{CHECKPOINTS}/{name}", f"{CHECKPOINTS}/{name}/*", *WITH_RUN]
        hub.snapshot_download(
            repo, allow_patterns=wanted, local_dir=staged, token=secret("HF_TOKEN")
        )
    except hub.errors.RepositoryNotFoundError:
        return
    except Exception as e:
        raise UserError(f"cannot fetch a checkpoint of {repo}: {reason(e)}") from None
    for other in WITH_RUN:
        if os.path.exists(source := os.path.join(staged, other)):
            os.replace(source, os.path.join(out_dir, other))
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
    print_line(f"warning: {text}", sys.stderr)
