"""
Uploads and downloads, all at the user's request: models and checkpoints on the Hugging Face hub,
metrics on Weights & Biases. They need optional packages, and access tokens from the environment or
from .env.
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

UPLOADS = "uploads"  # folder in out_dir for checkpoints that wait for their upload
TIMEOUT_S = 300  # for a response from the hub; its client would wait forever
MAX_FAILED = 3  # failed uploads kept for another try; more could fill the disk
CHECKPOINTS = "checkpoints"  # folder of a run's checkpoints in its repository on the hub
COMPANIONS = ("log.jsonl", "tokenizer.model", "tokenizer.bin", "wandb_id")  # uploaded with them
WITH_RUN = ("log.jsonl", "wandb_id")  # downloaded with them
NAME = re.compile(r"ckpt_(\d+)\.pt")
WAITS_S = (2, 10, 60, 300)  # pauses before a failed upload is retried


def need(package, extra="export", feature="this command"):
    """Import an optional package, or raise UserError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        hint = f"pip install '.[{extra}]'"
        raise UserError(f"{feature} needs the package {package}: {hint}") from None


def secret(name):
    """Return an access token from the environment or from a line NAME=value in .env, or None."""
    token = os.environ.get(name)
    if not token and os.path.isfile(".env"):
        with open(".env", encoding="utf-8-sig", errors="replace") as f:
            for line in f:
                key, _, value = line.strip().removeprefix("export ").partition("=")
                if key.strip() == name:
                    token = value.partition(" #")[0].strip().strip("\"'")
    token = (token or "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise UserError(f"{name} is not an access token: expected letters and digits")
    return token or None


# ---- models on the hub


def fetch_model(name):
    """Download a model, user/name or user/name@revision, to the hub's cache; return its folder."""
    hub = need("huggingface_hub")
    name, _, revision = name.partition("@")
    options = {"revision": revision or None, "token": secret("HF_TOKEN")}
    patterns = ["*config.json", "model*.safetensors", "model*.index.json", "tokenizer*"]
    try:
        folder = hub.snapshot_download(name, allow_patterns=patterns, **options)
        if not any(file.endswith(".safetensors") for file in os.listdir(folder)):
            hub.snapshot_download(name, allow_patterns=["pytorch_model*"], **options)
        return folder
    except Exception as e:  # the hub, the network, or the name
        raise UserError(f"cannot download {name}: {reason(e)}") from None


def check_push(name, dry_run=False):
    """Raise UserError if an upload to user/name is sure to fail, without asking the hub."""
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
    """Upload a folder as the model user/name on the hub, creating it if needed."""
    hub = need("huggingface_hub")
    files = {n: os.path.getsize(os.path.join(folder, n)) for n in sorted(os.listdir(folder))}
    for file, size in files.items():
        print(f"  {file}  {size:,} bytes")
    if dry_run:
        print(f"dry run: these {len(files)} files would be uploaded to {name}; nothing was sent")
        return
    api = hub.HfApi(token=secret("HF_TOKEN"))
    try:
        api.create_repo(name, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload model")
    except Exception as e:
        raise UserError(
            f"cannot upload to {name}: {reason(e)}; {folder} is complete, so run the same command "
            f"again"
        ) from None
    print(f"uploaded to {done.repo_url}")


def reason(error):
    """Return the message of an error in one line, without the access token."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or type(error).__name__
    return text.replace(secret("HF_TOKEN") or "\0", "***")


# ---- checkpoints on the hub


class Uploads:
    """
    Uploads a run's checkpoints to user/name in the background, each as one commit with the log and
    the tokenizer. Failed uploads are retried, also at the end. Training never waits for them and
    never stops because of them. `failed` lists the checkpoints that did not arrive.
    """

    def __init__(self, repo, out_dir, private=True, keep_local=True, is_new=False):
        """
        is_new: this is a new run, so refuse a repository that has checkpoints. Raises UserError if
        uploads cannot start, before training does.
        """
        self.repo, self.out_dir, self.keep_local = repo, out_dir, keep_local
        check_push(repo)
        set_hub_timeout()
        self.api = need("huggingface_hub").HfApi(token=secret("HF_TOKEN"))
        try:
            self.api.create_repo(repo, private=private, exist_ok=True)
            existing = checkpoints_of(repo) if is_new else {}
        except Exception as e:
            raise UserError(f"cannot upload to {repo}: {reason(e)}") from None
        if existing:
            raise UserError(
                f"{repo} already has {existing[max(existing)]} from another run: use another "
                f"--hub_repo, or continue that run with --resume=auto and an empty --out_dir"
            )
        need("huggingface_hub.utils").disable_progress_bars()
        self.queue, self.arrived, self.failed = queue.Queue(), [], []
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()
        with contextlib.suppress(FileNotFoundError):  # left by a run that was killed
            for name in sorted(os.listdir(self.staged(""))):
                if NAME.fullmatch(name):
                    self.queue.put(name)
                else:
                    remove(self.staged(name))

    def staged(self, name):
        return os.path.join(self.out_dir, UPLOADS, name)

    def submit(self, path, name):
        """Upload a checkpoint, a file or a folder, as `name`; `path` may be deleted right after."""
        staged, part = self.staged(name), self.staged(f"{name}.part")
        try:
            remove(part)
            os.makedirs(os.path.join(part, CHECKPOINTS))
            link_or_copy(path, os.path.join(part, CHECKPOINTS, name))
            for other in COMPANIONS:  # copies, because the log grows
                if os.path.exists(source := os.path.join(self.out_dir, other)):
                    shutil.copy(source, os.path.join(part, other))
            replace(part, staged)
        except OSError as e:
            remove(part)
            warn(f"cannot prepare the upload of {name}: {reason(e)}")
            return
        while len(self.failed) > MAX_FAILED:
            remove(self.staged(dropped := self.failed.pop(0)))
            warn(f"gave up uploading {dropped} to {self.repo}: too many uploads have failed")
        self.tidy()
        self.queue.put(name)

    def tidy(self):
        """Delete local copies of uploaded earlier checkpoints, unless keep_local is set."""
        for earlier in self.arrived if not self.keep_local else ():
            remove(os.path.join(self.out_dir, earlier))

    def work(self):
        while (name := self.queue.get()) is not None:
            if not self.send(name):
                self.failed.append(name)

    def send(self, name):
        """Upload a staged checkpoint, with retries, and delete it; return whether it arrived."""
        for wait in WAITS_S:
            if self.send_once(name, f"retrying in {wait} s"):
                return True
            if self.ending.wait(wait):
                return False
        return self.send_once(name, "retrying at the end of training")

    def send_once(self, name, then):
        staged = self.staged(name)
        if not os.path.isdir(staged):  # a resumed run submitted the same step twice
            return True
        try:
            self.api.upload_folder(
                repo_id=self.repo, folder_path=staged, commit_message=f"Checkpoint {name}"
            )
        except Exception as e:  # from the hub or the network
            warn(f"cannot upload {name} to {self.repo}: {reason(e)}; {then}")
            return False
        remove(staged)
        self.arrived.append(name)
        return True

    def finish(self):
        """Wait for all uploads and retry the failed ones; return whether all arrived."""
        self.queue.put(None)
        self.ending.set()
        print(f"waiting for uploads to {self.repo}")
        self.thread.join()
        for wait in (*WAITS_S, 0):
            then = f"retrying in {wait} s" if wait else "it stays on this machine"
            self.failed = [name for name in self.failed if not self.send_once(name, then)]
            if not self.failed:
                break
            time.sleep(wait)
        self.tidy()
        with contextlib.suppress(OSError):
            os.rmdir(self.staged(""))
        return not self.failed


def set_hub_timeout():
    """Make huggingface_hub's requests fail after TIMEOUT_S without a response."""
    with contextlib.suppress(ImportError, AttributeError):  # in other versions
        from huggingface_hub import set_client_factory
        from huggingface_hub.utils._http import default_client_factory

        def factory():
            client = default_client_factory()
            client.timeout = TIMEOUT_S
            return client

        set_client_factory(factory)


def checkpoints_of(repo):
    """Return {step: name} of the checkpoints of user/name on the hub."""
    files = need("huggingface_hub").HfApi(token=secret("HF_TOKEN")).list_repo_files(repo)
    names = {file.split("/")[1] for file in files if file.startswith(f"{CHECKPOINTS}/")}
    return {int(m[1]): m[0] for m in map(NAME.fullmatch, names) if m}


def fetch_latest(repo, out_dir):
    """
    Download the latest checkpoint of user/name, if there is one, to out_dir/ckpt.pt, with its log.
    Raises UserError if the hub cannot be reached.
    """
    hub, staged = need("huggingface_hub"), os.path.join(out_dir, "fetched.part")
    set_hub_timeout()
    try:
        checkpoints = checkpoints_of(repo)
        if not checkpoints:
            return
        name = checkpoints[max(checkpoints)]
        print(f"{out_dir} has no checkpoint: continuing from {name} of {repo}")
        patterns = [f"{CHECKPOINTS}/{name}", f"{CHECKPOINTS}/{name}/*", *WITH_RUN]
        hub.snapshot_download(
            repo, allow_patterns=patterns, local_dir=staged, token=secret("HF_TOKEN")
        )
    except hub.errors.RepositoryNotFoundError:
        return
    except Exception as e:
        raise UserError(f"cannot download a checkpoint from {repo}: {reason(e)}") from None
    for other in WITH_RUN:
        if os.path.exists(source := os.path.join(staged, other)):
            os.replace(source, os.path.join(out_dir, other))
    os.replace(os.path.join(staged, CHECKPOINTS, name), os.path.join(out_dir, "ckpt.pt"))
    remove(staged)


# ---- metrics


class Metrics:
    """
    Copies a run's log to Weights & Biases. The run's id there is kept in out_dir/wandb_id, so a
    resumed run continues it. On the first failure, warn and stop logging; training continues.
    """

    def __init__(self, project, name, out_dir, config):
        """Start or continue a run. Raises UserError without the package or an access token."""
        wandb = need("wandb", "wandb", "wandb_project")
        if key := secret("WANDB_API_KEY"):
            os.environ["WANDB_API_KEY"] = key
        is_online = os.environ.get("WANDB_MODE", "online") == "online"
        if is_online and not (key or wandb.api.api_key):
            raise UserError(
                "wandb_project needs an access token: set WANDB_API_KEY, or write it to .env as "
                "WANDB_API_KEY=..., or set WANDB_MODE=offline"
            )
        id_path = os.path.join(out_dir, "wandb_id")
        options = {"project": project, "name": name or None, "config": config, "dir": out_dir}
        if os.path.exists(id_path):
            with open(id_path, encoding="utf-8") as f:
                options |= {"id": f.read().strip(), "resume": "allow"}
        try:
            self.run = wandb.init(**options)
            self.run.define_metric("*", step_metric="step")
        except Exception as e:
            raise UserError(f"cannot start a wandb run of {project}: {reason(e)}") from None
        with open(id_path, "w", encoding="utf-8") as f:
            f.write(self.run.id)

    @contextlib.contextmanager
    def surviving(self):
        try:
            yield
        except Exception as e:
            self.run = None
            warn(f"wandb failed ({reason(e)}); training continues without it")

    def log(self, kind, values):
        """Log the numbers in a line of kind "train" or "eval" as kind/name, at its step."""
        if self.run is None or kind not in ("train", "eval"):
            return
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
        step = numbers.pop("step")  # logged as a metric, because wandb's own step cannot go back
        with self.surviving():
            self.run.log({"step": step, **{f"{kind}/{k}": v for k, v in numbers.items()}})

    def finish(self):
        if self.run is not None:
            with self.surviving():
                self.run.finish()


def warn(text):
    print_line(f"warning: {text}", sys.stderr)
