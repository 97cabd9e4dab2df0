"""
Run this repository's scripts on Modal's machines (modal.com).

    modal run modal_app.py                      # --command train: from nothing to a model
    modal run modal_app.py --gpu H100:8 --config config/speedrun_gpu.py --source tinystories
    modal run modal_app.py --command inference --prompt "Once upon a time"
    modal run modal_app.py --command transfer --action download --path out/model.bin
    modal run modal_app.py --command cleanup

Everything is stored on one volume: text and shards in data, runs in out. All options are parameters
of main(), at the end. They are not globals, because Modal imports this file again in the container,
where the other files are in APP_DIR.

To add a source of text, change VOCAB_SIZES and make_data().
"""

import contextlib
import functools
import os
import posixpath
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Literal

try:
    import modal
except ImportError:
    sys.exit("error: modal_app.py needs the package modal: pip install modal")

from configurator import UserError, one_sentence_errors, printable, split_words
from system.files import atomic_write, read_json
from system.remote import secret

HERE = Path(__file__).resolve().parent
APP_DIR = "/app"  # this folder in the container
VOLUME_DIR = os.environ.get("MODAL_VOLUME_DIR", "/vol")  # the volume in the container
ENGINE_DIR = os.path.join(tempfile.gettempdir(), "engine")  # ./run is compiled here
NOT_SENT = (
    ".* data out ablations fuzz run run_debug *.so **/__pycache__ **/*.pt **/*.bin **/*.part"
).split()
EXTRAS = ["export", "fast", "wandb", "web"]  # of pyproject.toml
TOKENS = ("HF_TOKEN", "WANDB_API_KEY")  # passed on if set in the environment or in .env
DAY = 24 * 60 * 60  # seconds; Modal's limit for a call
CORES = 8  # of each machine that prepares data
POLL_S = 5.0  # seconds between checks for a new checkpoint
PART_AGE_S = 3600  # a newer .part file may still be in use

GPUS = "T4 L4 A10 L40S A100 A100-40GB A100-80GB RTX-PRO-6000 H100 H100! H200 B200 B200+".split()
# Default vocabulary size for each source of text
VOCAB_SIZES = {
    "babyllama": 105,  # TinyStories as BabyLlama's ready-made shards, 105 or 128
    "tinystories": 4096,
    "practice": 1024,  # generated stories, without a download
    **dict.fromkeys(["fineweb", "fineweb-edu", "openwebtext", "fineweb-6b"], 49152),
}
STORIES = ("babyllama", "tinystories", "practice")  # for tinystories.py; others: webtext.py


image = (
    modal.Image.debian_slim(python_version="3.11")
    .apt_install("gcc", "libc6-dev", "make")
    .pip_install_from_requirements(str(HERE / "requirements.txt"))
    .pip_install_from_pyproject(str(HERE / "pyproject.toml"), optional_dependencies=EXTRAS)
    .env({"PYTHONPATH": APP_DIR, "PYTHONUNBUFFERED": "1", "MODAL_VOLUME_DIR": VOLUME_DIR})
    .env({"TORCHINDUCTOR_CACHE_DIR": "/tmp/compiled"})  # too many files for the volume
    .add_local_dir(HERE, APP_DIR, ignore=NOT_SENT)
)
volume = modal.Volume.from_name("tinystories-volume", create_if_missing=True)
tokens = {name: token for name in TOKENS if (token := secret(name))}
secrets = [modal.Secret.from_dict(tokens)]
app = modal.App("modded-llama2-c", image=image, volumes={VOLUME_DIR: volume}, secrets=secrets)


# ---- on Modal's machines


class Killed(UserError):
    """A command was killed by a signal, so it is worth retrying, unlike one that failed."""


def returns_error(function):
    """
    Make a function return its UserError, which unwrap() raises on this machine. If the function
    raised it, Modal would retry the call and print a traceback.
    """

    @functools.wraps(function)
    def wrapped(*args, **options):
        try:
            return function(*args, **options)
        except Killed:
            raise
        except UserError as e:
            return e

    return wrapped


def unwrap(result):
    """Return the result of a remote call, or raise it if it is a UserError."""
    if isinstance(result, UserError):
        raise result
    return result


def check(command, status):
    """Raise Killed or UserError if a command did not end with status 0."""
    if status < 0:
        raise Killed(f"{shlex.join(command)} was killed by signal {-status}")
    if status:
        raise UserError(f"{shlex.join(command)} ended with status {status}; see its output above")


def call(*command, stdout=None):
    """Run a command in APP_DIR, without a shell; return its stdout if that is a pipe."""
    done = subprocess.run(command, cwd=APP_DIR, stdout=stdout)
    check(command, done.returncode)
    return done.stdout


def step(script, *args, result=""):
    """Run a script unless its result exists, and commit its files even if it fails."""
    if os.path.exists(result):
        print(f"{result} already exists")
        return
    try:
        call(sys.executable, script, *args)
    finally:
        volume.commit()


@app.function(cpu=CORES, timeout=DAY)
@returns_error
def prepare(source, vocab_size, machines, flags):
    """Prepare the text, vocabulary and shards of a source; `flags` are passed to the script."""
    from dataset import DataPaths

    volume.reload()
    kind = "custom" if source in STORIES else "bpe"
    make_data(source, DataPaths(data_dir_of(source), kind, vocab_size), machines, flags)


@app.function(cpu=CORES, timeout=DAY)
@returns_error
def prepare_for(args, source, machines):
    """Check the arguments of train.py, and make the shards it needs if missing, without a GPU."""
    from dataset import DataPaths
    from training.settings import resolved

    volume.reload()
    settings = resolved(tuple(args))
    paths = DataPaths(data_dir_of(source), settings["vocab_source"], settings["vocab_size"])
    sidecar = os.path.join(paths.shards, "shards.json")
    if os.path.exists(sidecar):
        is_complete = read_json(sidecar).get("complete", True)
    else:  # BabyLlama's shards have no sidecar; their folder is complete or absent
        is_complete = source == "babyllama" and os.path.exists(paths.shards)
    if not is_complete:
        make_data(source, paths, machines, [])


def data_dir_of(source):
    """Return the folder of a source: data for TinyStories, a subfolder of it for others."""
    return str(Path(VOLUME_DIR, "data", "" if source in STORIES[:2] else Path(source).stem))


def make_data(source, paths, machines, flags):
    """Download or generate a source's text and make shards of it; existing results are kept."""
    if source not in STORIES:
        make_web_data(source, paths, machines, flags)
        return
    flags = [f"--data_dir={paths.data_dir}", f"--num_workers={CORES}", *flags]
    if source == "babyllama":
        step("tinystories.py", "download", f"--pretokenized={paths.vocab_size}", *flags)
        return
    if source == "practice":
        step("tinystories.py", "synth", *flags, result=paths.stories)
    else:
        step("tinystories.py", "download", *flags)
    flags = [f"--vocab_source={paths.vocab_source}", f"--vocab_size={paths.vocab_size}", *flags]
    if not paths.is_llama2:  # the user uploads the Llama 2 tokenizer.model
        step("tinystories.py", "train_vocab", *flags, result=paths.tokenizer_model)
    step("tinystories.py", "pretokenize", *flags)


def make_web_data(source, paths, machines, flags):
    """make_data() for webtext.py: one vocabulary, then shards on several machines at once."""
    text = source if source in VOCAB_SIZES else os.path.join(VOLUME_DIR, source)
    if source not in VOCAB_SIZES and not os.path.exists(text):
        raise UserError(
            f"source = {source}: expected one of {', '.join(VOCAB_SIZES)}, or the path of a text "
            f"on the volume"
        )
    args = [f"--source={text}", f"--vocab_size={paths.vocab_size}"]
    args += [f"--data_dir={paths.data_dir}", *flags]
    if source == "fineweb-6b":  # downloaded as shards, so there is nothing to divide
        step("webtext.py", "prepare", *args)
        return
    step("webtext.py", "train_vocab", *args, result=paths.tokenizer_model)
    options = {"n": machines, "args": args}
    results = prepare_shard.map(range(machines), kwargs=options, return_exceptions=True)
    failed = {i: result for i, result in enumerate(results) if isinstance(result, Exception)}
    if failed:
        raise UserError(
            f"{len(failed)} of {machines} machines failed, the first with: "
            f"{next(iter(failed.values()))}; run the same command to redo their shards"
        )
    volume.reload()
    step("webtext.py", "merge", *args, f"--shards={machines}")


@app.function(cpu=CORES, timeout=DAY, retries=2)
@returns_error
def prepare_shard(i, n, args):
    """Prepare the part of a large corpus for machine `i` of `n`."""
    volume.reload()
    step("webtext.py", "prepare", *args, f"--shard={i}/{n}")


# Modal restarts preempted calls automatically; retries are for runs longer than DAY and for Killed
@app.function(cpu=4, timeout=DAY, retries=modal.Retries(max_retries=10), single_use_containers=True)
@returns_error
def train(args, out_dir, n_gpus):
    """Run train.py with these arguments, which include --resume=auto."""
    volume.reload()
    launch = [sys.executable]
    if n_gpus > 1:  # the same as torchrun
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_gpus}"]
    command = [*launch, "train.py", *args]
    check(command, watch(command, os.path.join(VOLUME_DIR, out_dir, "ckpt.pt")))


def watch(command, checkpoint):
    """
    Run a command, and commit the volume at each new checkpoint and at the end; return its status.
    SIGTERM, Ctrl-C and a cancelled call all become one SIGTERM, on which train.py saves and exits.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    # in a new session: the system may signal the whole session, and on a second signal train.py
    # would exit without saving
    process = subprocess.Popen(command, cwd=APP_DIR, start_new_session=True)
    seen = written_at(checkpoint)
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=POLL_S)
            if (now := written_at(checkpoint)) not in (seen, None):
                seen = now
                volume.commit()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        process.kill()  # if another interrupt left it running
        signal.signal(signal.SIGTERM, before)
        volume.commit()


def written_at(path):
    """Return a file's modification time in ns, or None if it does not exist."""
    with contextlib.suppress(FileNotFoundError):
        return os.stat(path).st_mtime_ns


@app.function(cpu=4, timeout=3600)
@returns_error
def inference(prompt, out_dir, flags):
    """Generate a story with ./run and out_dir's model.bin; the prompt is a single argument."""
    volume.reload()
    model = os.path.join(VOLUME_DIR, out_dir, "model.bin")
    if not os.path.exists(model):
        raise UserError(
            f"{out_dir}/model.bin does not exist on the volume; train first (--command train), or "
            f"upload one (--command transfer --action upload --path {out_dir})"
        )
    os.makedirs(ENGINE_DIR, exist_ok=True)  # copies keep their times: make compiles once
    for name in ("run.c", "Makefile"):
        shutil.copy2(os.path.join(APP_DIR, name), ENGINE_DIR)
    headers = os.path.join(ENGINE_DIR, "engine")
    shutil.copytree(os.path.join(APP_DIR, "engine"), headers, dirs_exist_ok=True)
    call("make", "--no-print-directory", "-C", ENGINE_DIR, "run")
    command = [os.path.join(ENGINE_DIR, "run"), model, "-i", prompt, *flags]
    return call(*command, stdout=subprocess.PIPE).decode(errors="replace")


# ---- on this machine: files on the volume


def inside(path, name):
    """Normalize a path relative to the volume's root; raise UserError if it leads outside."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts:
        raise UserError(
            f"{name} = {path}: expected a path from the root of the volume, without a leading / or "
            f"any .., such as out/model.bin"
        )
    return posixpath.join(*parts)


def on_volume():
    """Return {path: entry} for all files and folders on the volume, sorted by path."""
    entries = {entry.path.strip("/"): entry for entry in volume.iterdir("/", recursive=True)}
    return {path: entry for path, entry in sorted(entries.items()) if path}


def is_file(entry):
    return entry.type == modal.types.FileEntryType.FILE


def files_of(path, entries):
    """Return {path: entry} for the file `path` or the files in that folder, or raise UserError."""
    if path not in entries:
        siblings = [p for p in entries if posixpath.dirname(p) == posixpath.dirname(path)]
        top = [p for p in entries if "/" not in p]
        raise UserError(missing(path, "on the volume", siblings or top))
    return {p: e for p, e in entries.items() if is_file(e) and f"{p}/".startswith(f"{path}/")}


def missing(path, where, names):
    """Return the message for a path that does not exist, with the names that do."""
    more = ", ..." if len(names) > 20 else ""
    choices = f"; choose one of: {', '.join(names[:20])}{more}" if names else ""
    return f"{path} does not exist {where}{choices}"


def download(path, local):
    """Copy a file or folder from the volume to `local`; each file is written atomically."""
    for name, entry in files_of(path, on_volume()).items():
        relative = posixpath.relpath(inside(name, "path"), path)  # "." if path is a file
        target = os.path.normpath(os.path.join(local, relative))
        with atomic_write(target) as f:
            for chunk in volume.read_file(name):
                f.write(chunk)
            if f.tell() != entry.size:
                raise UserError(
                    f"only {f.tell():,} of the {entry.size:,} bytes of {name} arrived; try again"
                )
        print(printable(f"{target}: {entry.size:,} bytes"))


def upload(path, local):
    """Copy a local file or folder to the volume in one batch, replacing existing files."""
    if not os.path.exists(local):
        folder = os.path.dirname(local) or "."
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        raise UserError(missing(local, "on this machine", names))
    with volume.batch_upload(force=True) as batch:
        (batch.put_directory if os.path.isdir(local) else batch.put_file)(local, f"/{path}")
    print(f"uploaded {local} to {path} on the volume")


def leftovers(entries):
    """Return {path: reason} for files and folders that a finished run does not need."""
    reasons = {}
    for path, entry in entries.items():
        folder, name = posixpath.split(path)
        if any(path.startswith(f"{other}/") for other in reasons):
            continue
        if re.fullmatch(r"previous(_\d+)?", name) and f"{folder}/log.jsonl" in entries:
            reasons[path] = "an earlier run"
        elif re.fullmatch(r"ckpt_\d+\.pt", name) and f"{folder}/ckpt.pt" in entries:
            reasons[path] = "an earlier checkpoint"
        elif name.endswith((".part", ".part.etag")) and entry.mtime < time.time() - PART_AGE_S:
            reasons[path] = "an incomplete file, unchanged for an hour"
        elif name.endswith(".tar.gz") and path.removesuffix(".tar.gz") in entries:
            reasons[path] = "an archive that has been unpacked"
    return reasons


# ---- commands


def parse_gpu(gpu):
    """Parse "L4", "H100:8" or "none" to (Modal's name or None, number of GPUs)."""
    if gpu.lower() in ("none", "cpu"):
        return None, 1
    kind, colon, number = gpu.upper().partition(":")
    if kind not in GPUS or (colon and number not in list("12345678")):
        raise UserError(
            f"gpu = {gpu}: expected one of none, {', '.join(GPUS)}; add :2 to :8 for several GPUs"
        )
    return gpu.upper(), int(number or 1)


def text_options(o):
    """Return (source, vocabulary size, machines), checked as far as possible on this machine."""
    if not 1 <= o.machines <= 100:
        raise UserError(f"machines = {o.machines}: expected a number from 1 to 100")
    if o.vocab_size < 0:
        raise UserError(f"vocab_size = {o.vocab_size}: expected a size, or 0 for the default")
    source = o.source if o.source in VOCAB_SIZES else inside(o.source, "source")
    return source, o.vocab_size or VOCAB_SIZES.get(source, 49152), o.machines


def run_prepare(o):
    unwrap(prepare.remote(*text_options(o), split_words(o.flags, "flags")))


def run_train(o):
    gpu, n_gpus = parse_gpu(o.gpu)
    source, vocab_size, machines = text_options(o)
    out_dir, flags = inside(o.out_dir, "out_dir"), split_words(o.flags, "flags")
    if not (HERE / inside(o.config, "config")).is_file():
        presets = sorted(f"config/{path.name}" for path in HERE.glob("config/*.py"))
        raise UserError(missing(o.config, "in this folder", presets))
    for flag in flags:
        if flag.partition("=")[0].replace("-", "_") in ("__data_dir", "__out_dir", "__resume"):
            raise UserError(f"{flag} cannot be used in --flags: use --source and --out-dir")
    args = [o.config, f"--data_dir={data_dir_of(source)}", f"--out_dir={VOLUME_DIR}/{out_dir}"]
    args += ["--resume=auto"]
    if source not in STORIES:
        args += ["--vocab_source=bpe"]
    if source not in STORIES or o.vocab_size:  # otherwise the config decides
        args += [f"--vocab_size={vocab_size}"]
    args += flags
    unwrap(prepare_for.remote(args, source, machines))
    remote_train = train.with_options(gpu=gpu, cpu=4 * n_gpus) if gpu else train
    unwrap(remote_train.remote(args, out_dir, n_gpus))
    print(f"next: modal run modal_app.py --command transfer --path {out_dir}/model.bin")


def run_inference(o):
    flags = ["-t", str(o.temperature), "-p", str(o.top_p), "-n", str(o.steps)]
    flags += [] if o.seed is None else ["-s", str(o.seed)]
    out_dir = inside(o.out_dir, "out_dir")
    flags += split_words(o.flags, "flags")
    print(printable(unwrap(inference.remote(o.prompt, out_dir, flags))))


def run_transfer(o):
    path = inside(o.path or "out/model.bin", "path")
    (upload if o.action == "upload" else download)(path, o.local_path or path)


def run_cleanup(o):
    entries, sizes = on_volume(), {}
    for path, entry in entries.items():
        if is_file(entry):
            sizes.setdefault(posixpath.dirname(path) or "/", []).append(entry.size)
    for folder, in_folder in sizes.items():
        print(printable(f"{sum(in_folder):>18,} bytes in {len(in_folder):>5,} files of {folder}"))
    reasons = leftovers(entries)
    if o.path == "/":
        reasons = dict.fromkeys(
            (path for path in entries if "/" not in path), "requested by --path"
        )
    elif o.path:
        reasons = {inside(o.path, "path"): "requested by --path"}
    total = 0
    for path, reason in reasons.items():
        n_bytes = sum(entry.size for entry in files_of(path, entries).values())
        verb = "would delete" if o.dry_run else "deleting"
        print(printable(f"{verb} {path}, {n_bytes:,} bytes: {reason}"))
        total += n_bytes
        if not o.dry_run:
            volume.remove_file(path, recursive=not is_file(entries[path]))
    print(f"{total:,} bytes {'would be' if o.dry_run else 'were'} deleted")


COMMANDS = {
    "train": run_train,
    "prepare": run_prepare,
    "inference": run_inference,
    "transfer": run_transfer,
    "cleanup": run_cleanup,
}


@app.local_entrypoint()
def main(
    command: Literal["train", "prepare", "inference", "transfer", "cleanup"] = "train",
    flags: str = "",  # more arguments for train.py, tinystories.py, webtext.py or ./run
    out_dir: str = "out",  # folder of the run on the volume
    source: str = "babyllama",  # of text: one of VOCAB_SIZES, or a path on the volume
    vocab_size: int = 0,  # 0: from the config for train, from the source for prepare
    machines: int = 4,  # number of machines that prepare a large corpus
    gpu: str = "L4",  # for train: none, or one of GPUS; H100:8 for eight
    config: str = "config/tok105.py",
    prompt: str = "Once upon a time",  # for inference, like temperature, top_p, steps and seed
    temperature: float = 0.8,
    top_p: float = 0.9,
    steps: int = 256,  # tokens
    seed: int | None = None,  # the same seed gives the same story
    action: Literal["download", "upload"] = "download",  # for transfer
    path: str = "",  # on the volume, for transfer and cleanup; cleanup deletes everything for /
    local_path: str = "",  # on this machine; empty: the same as path
    dry_run: bool = False,  # cleanup only prints what it would delete
):
    """What `modal run modal_app.py` does on this machine."""
    options = SimpleNamespace(**locals())
    one_sentence_errors()
    COMMANDS[command](options)


if __name__ == "__main__":
    sys.exit("error: start this file with Modal: modal run modal_app.py (--help lists the options)")
