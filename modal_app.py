"""
The scripts of this folder on machines of Modal (modal.com).

    modal run modal_app.py                      # = --command train: from nothing to a model
    modal run modal_app.py --gpu H100:8 --config config/speedrun_gpu.py --source tinystories
    modal run modal_app.py --command inference --prompt "Once upon a time"
    modal run modal_app.py --command transfer --action download --path out/model.bin
    modal run modal_app.py --command cleanup

Texts, shards and runs lie on one volume, below data and in out. main(), at the end, has all
options: as Modal imports this file a second time in the container, where the rest of the folder is
in APP_DIR, settings are its parameters and no globals.

To add a source of text, touch VOCAB_SIZES and make_data().
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
    sys.exit("error: modal is not installed here: pip install modal")

from configurator import UserError, one_sentence_errors, printable, split_words
from system.files import atomic_write, read_json
from system.remote import secret

HERE = Path(__file__).resolve().parent
APP_DIR = "/app"  # this folder, in the container
VOLUME_DIR = os.environ.get("MODAL_VOLUME_DIR", "/vol")  # the volume, in the container
ENGINE_DIR = os.path.join(tempfile.gettempdir(), "engine")  # where ./run is compiled
NOT_SENT = (
    ".* data out ablations fuzz run run_debug *.so **/__pycache__ **/*.pt **/*.bin **/*.part"
).split()
EXTRAS = ["export", "fast", "wandb", "web"]  # of pyproject.toml
TOKENS = ("HF_TOKEN", "WANDB_API_KEY")  # passed on where they are set, here or in .env
DAY = 24 * 60 * 60  # seconds: the longest call that Modal allows
CORES = 8  # of a machine that prepares data
POLL_S = 5.0  # seconds between two looks for a new checkpoint
PART_AGE_S = 3600  # a younger .part file may be being written

GPUS = "T4 L4 A10 L40S A100 A100-40GB A100-80GB RTX-PRO-6000 H100 H100! H200 B200 B200+".split()
# of each source of text, unless --vocab-size says otherwise
VOCAB_SIZES = {
    "babyllama": 105,  # TinyStories as BabyLlama's ready-made shards, of 105 or 128
    "tinystories": 4096,
    "practice": 1024,  # stories that synth.py writes, without a download
    **dict.fromkeys(["fineweb", "fineweb-edu", "openwebtext", "fineweb-6b"], 49152),
}
STORIES = ("babyllama", "tinystories", "practice")  # by tinystories.py; all else by webtext.py


image = (
    modal.Image.debian_slim(python_version="3.11")
    .apt_install("gcc", "libc6-dev", "make")
    .pip_install_from_requirements(str(HERE / "requirements.txt"))
    .pip_install_from_pyproject(str(HERE / "pyproject.toml"), optional_dependencies=EXTRAS)
    .env({"PYTHONPATH": APP_DIR, "PYTHONUNBUFFERED": "1", "MODAL_VOLUME_DIR": VOLUME_DIR})
    .env({"TORCHINDUCTOR_CACHE_DIR": "/tmp/compiled"})  # many small files: not for a volume
    .add_local_dir(HERE, APP_DIR, ignore=NOT_SENT)
)
volume = modal.Volume.from_name("tinystories-volume", create_if_missing=True)
tokens = {name: token for name in TOKENS if (token := secret(name))}
secrets = [modal.Secret.from_dict(tokens)]
app = modal.App("modded-llama2-c", image=image, volumes={VOLUME_DIR: volume}, secrets=secrets)


# ---- on a machine of Modal


class Killed(UserError):
    """A command that a signal ended: worth another try, where one that refuses is not."""


def told(function):
    """
    Have a function return its UserError, for answer() to raise here: what is raised there Modal
    tries again, and prints with a traceback.
    """

    @functools.wraps(function)
    def wrapped(*words, **options):
        try:
            return function(*words, **options)
        except Killed:
            raise
        except UserError as e:
            return e

    return wrapped


def answer(result):
    if isinstance(result, UserError):
        raise result
    return result


def check(command, status):
    """Raise UserError, or Killed, unless a command ended with status 0."""
    if status < 0:
        raise Killed(f"{shlex.join(command)} was ended by signal {-status}")
    if status:
        raise UserError(f"{shlex.join(command)} ended with status {status}; above is what it said")


def call(*command, stdout=None):
    """Run a command among the scripts, no shell between; returns its stdout where it is piped."""
    done = subprocess.run(command, cwd=APP_DIR, stdout=stdout)
    check(command, done.returncode)
    return done.stdout


def step(script, *words, makes=""):
    """Run a script, unless what it makes is there; what it wrote lasts, even of a failure."""
    if os.path.exists(makes):
        print(f"{makes} is there already")
        return
    try:
        call(sys.executable, script, *words)
    finally:
        volume.commit()


@app.function(cpu=CORES, timeout=DAY)
@told
def prepare(source, vocab_size, machines, flags):
    """The text, the vocabulary and the shards of a source; `flags` are for the script."""
    from dataset import DataPaths

    volume.reload()
    kind = "custom" if source in STORIES else "bpe"
    make_data(source, DataPaths(data_dir_of(source), kind, vocab_size), machines, flags)


@app.function(cpu=CORES, timeout=DAY)
@told
def prepare_for(words, source, machines):
    """
    Check these words for train.py and make the shards that it will want, unless they are there:
    before a GPU waits for it.
    """
    from dataset import DataPaths
    from training.settings import resolved

    volume.reload()
    settings = resolved(tuple(words))
    paths = DataPaths(data_dir_of(source), settings["vocab_source"], settings["vocab_size"])
    sidecar = os.path.join(paths.shards, "shards.json")
    if os.path.exists(sidecar):
        is_complete = read_json(sidecar).get("complete", True)
    else:  # BabyLlama's shards have none, and are all there or not at all
        is_complete = source == "babyllama" and os.path.exists(paths.shards)
    if not is_complete:
        make_data(source, paths, machines, [])


def data_dir_of(source):
    """The folder of a source: data itself for TinyStories, else one of its own below it."""
    return str(Path(VOLUME_DIR, "data", "" if source in STORIES[:2] else Path(source).stem))


def make_data(source, paths, machines, flags):
    """Bring the text of a source to the volume and make shards of it; what is there is kept."""
    if source not in STORIES:
        make_web_data(source, paths, machines, flags)
        return
    flags = [f"--data_dir={paths.data_dir}", f"--num_workers={CORES}", *flags]
    if source == "babyllama":
        step("tinystories.py", "download", f"--pretokenized={paths.vocab_size}", *flags)
        return
    if source == "practice":
        step("tinystories.py", "synth", *flags, makes=paths.stories)
    else:
        step("tinystories.py", "download", *flags)
    flags = [f"--vocab_source={paths.vocab_source}", f"--vocab_size={paths.vocab_size}", *flags]
    if not paths.is_llama2:  # whose tokenizer.model the user has to upload
        step("tinystories.py", "train_vocab", *flags, makes=paths.tokenizer_model)
    step("tinystories.py", "pretokenize", *flags)


def make_web_data(source, paths, machines, flags):
    """As make_data(): one vocabulary, then shards by several machines at once."""
    text = source if source in VOCAB_SIZES else os.path.join(VOLUME_DIR, source)
    if source not in VOCAB_SIZES and not os.path.exists(text):
        raise UserError(
            f"source = {source!r}: expected one of {', '.join(VOCAB_SIZES)}, or the path of a text "
            f"on the volume, where this is not"
        )
    place = [f"--vocab_size={paths.vocab_size}", f"--data_dir={paths.data_dir}"]
    words = [f"--source={text}", *place, *flags]
    if source == "fineweb-6b":  # downloaded as shards: nothing to share out
        step("webtext.py", "prepare", *words)
        return
    step("webtext.py", "train_vocab", *words, makes=paths.tokenizer_model)
    options = {"n": machines, "words": words}
    results = prepare_shard.map(range(machines), kwargs=options, return_exceptions=True)
    failed = {i: result for i, result in enumerate(results) if isinstance(result, Exception)}
    if failed:
        raise UserError(
            f"{len(failed)} of {machines} machines failed, the first with: "
            f"{next(iter(failed.values()))}; the same command does their shards again"
        )
    volume.reload()
    step("webtext.py", "merge", *words, f"--shards={machines}")


@app.function(cpu=CORES, timeout=DAY, retries=2)
@told
def prepare_shard(i, n, words):
    """The part of machine `i` of `n` in a large corpus."""
    volume.reload()
    step("webtext.py", "prepare", *words, f"--shard={i}/{n}")


# a machine that is taken away is replaced at once; the tries are for runs of many days, and Killed
@app.function(cpu=4, timeout=DAY, retries=modal.Retries(max_retries=10), single_use_containers=True)
@told
def train(words, out_dir, n_gpus):
    """Run train.py with these words, on with the latest checkpoint in out_dir if there is one."""
    volume.reload()
    launch = [sys.executable]
    if n_gpus > 1:  # as torchrun does
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_gpus}"]
    command = [*launch, "train.py", *words]
    check(command, watch(command, os.path.join(VOLUME_DIR, out_dir, "ckpt.pt")))


def watch(command, checkpoint):
    """
    Run a command, committing the volume at each new checkpoint and at the end; returns its status.
    SIGTERM, Ctrl-C and a cancelled call become one SIGTERM, at which train.py saves and ends.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    # in a session of its own: at a second signal, as the system might send, train.py ends unsaved
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
        process.kill()  # if a further interrupt left it running
        signal.signal(signal.SIGTERM, before)
        volume.commit()


def written_at(path):
    """When a file was written, in ns; None while there is none."""
    with contextlib.suppress(FileNotFoundError):
        return os.stat(path).st_mtime_ns


@app.function(cpu=4, timeout=3600)
@told
def inference(prompt, out_dir, flags):
    """The story that ./run tells by out_dir's model.bin; the prompt is one word of its command."""
    volume.reload()
    model = os.path.join(VOLUME_DIR, out_dir, "model.bin")
    if not os.path.exists(model):
        raise UserError(
            f"there is no {out_dir}/model.bin on the volume: train first (--command train), or "
            f"bring one (--command transfer --action upload --path {out_dir})"
        )
    os.makedirs(ENGINE_DIR, exist_ok=True)
    for name in ("run.c", "kernels.h", "Makefile"):  # with their times: make runs once a container
        shutil.copy2(os.path.join(APP_DIR, name), ENGINE_DIR)
    call("make", "--no-print-directory", "-C", ENGINE_DIR, "run")
    command = [os.path.join(ENGINE_DIR, "run"), model, "-i", prompt, *flags]
    return call(*command, stdout=subprocess.PIPE).decode(errors="replace")


# ---- here: files of the volume


def inside(path, what):
    """A path below the volume's root, tidied; UserError where it would lead out of it."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts:
        raise UserError(
            f"{what} = {path!r}: expected a path from the root of the volume, without / before it "
            f"and .. in it, such as out/model.bin"
        )
    return posixpath.join(*parts)


def on_volume():
    """{path: entry} of all files and folders of the volume, sorted by path."""
    entries = {entry.path.strip("/"): entry for entry in volume.iterdir("/", recursive=True)}
    return {path: entry for path, entry in sorted(entries.items()) if path}


def is_file(entry):
    return entry.type == modal.types.FileEntryType.FILE


def files_of(path, entries):
    """{path: entry} of the files that are `path` or in it; UserError where there is neither."""
    if path not in entries:
        beside = [p for p in entries if posixpath.dirname(p) == posixpath.dirname(path)]
        top = [p for p in entries if "/" not in p]
        raise UserError(absent(path, "on the volume", beside or top))
    return {p: e for p, e in entries.items() if is_file(e) and f"{p}/".startswith(f"{path}/")}


def absent(path, where, names):
    more = ", ..." if len(names) > 20 else ""
    return f"{path} is not {where}; there is: {', '.join(names[:20]) or 'nothing'}{more}"


def download(path, local):
    """Copy a file or folder of the volume to `local`, where each file appears whole or not."""
    for name, entry in files_of(path, on_volume()).items():
        relative = posixpath.relpath(inside(name, "path"), path)  # "." for a file itself
        target = os.path.normpath(os.path.join(local, relative))
        with atomic_write(target) as f:
            for chunk in volume.read_file(name):
                f.write(chunk)
            if f.tell() != entry.size:
                raise UserError(
                    f"{f.tell():,} of the {entry.size:,} bytes of {name} came: try again"
                )
        print(printable(f"{target}: {entry.size:,} bytes"))


def upload(path, local):
    """Copy a file or folder from here to the volume, all at once, over what has the same name."""
    if not os.path.exists(local):
        folder = os.path.dirname(local) or "."
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        raise UserError(absent(local, "on this machine", names))
    with volume.batch_upload(force=True) as batch:
        (batch.put_directory if os.path.isdir(local) else batch.put_file)(local, f"/{path}")
    print(f"{local} is {path} on the volume")


def leftovers(entries):
    """{path: why} of what a finished run does not need."""
    found = {}
    for path, entry in entries.items():
        folder, name = posixpath.split(path)
        if any(path.startswith(f"{other}/") for other in found):
            continue
        if re.fullmatch(r"previous(_\d+)?", name) and f"{folder}/log.jsonl" in entries:
            found[path] = "an earlier run"
        elif re.fullmatch(r"ckpt_\d+\.pt", name) and f"{folder}/ckpt.pt" in entries:
            found[path] = "an earlier checkpoint"
        elif name.endswith((".part", ".part.etag")) and entry.mtime < time.time() - PART_AGE_S:
            found[path] = "half-written, and left so for an hour"
        elif name.endswith(".tar.gz") and path.removesuffix(".tar.gz") in entries:
            found[path] = "an archive that is unpacked"
    return found


# ---- the commands


def parse_gpu(gpu):
    """(Modal's name or None, how many) of L4, H100:8, none and the like."""
    if gpu.lower() in ("none", "cpu"):
        return None, 1
    kind, colon, number = gpu.upper().partition(":")
    if kind not in GPUS or (colon and number not in list("12345678")):
        raise UserError(
            f"gpu = {gpu!r}: expected none, or one of {', '.join(GPUS)}, with :2 to :8 for several"
        )
    return gpu.upper(), int(number or 1)


def text_of(o):
    """(source, size of its vocabulary, machines), as far as they can be checked here."""
    if not 1 <= o.machines <= 100:
        raise UserError(f"machines = {o.machines}: expected 1 to 100")
    if o.vocab_size < 0:
        raise UserError(f"vocab_size = {o.vocab_size}: expected a size, or 0 for the usual one")
    source = o.source if o.source in VOCAB_SIZES else inside(o.source, "source")
    return source, o.vocab_size or VOCAB_SIZES.get(source, 49152), o.machines


def run_prepare(o):
    answer(prepare.remote(*text_of(o), split_words(o.flags, "flags")))


def run_train(o):
    gpu, n_gpus = parse_gpu(o.gpu)
    source, vocab_size, machines = text_of(o)
    out_dir, flags = inside(o.out_dir, "out_dir"), split_words(o.flags, "flags")
    if not (HERE / inside(o.config, "config")).is_file():
        presets = sorted(f"config/{path.name}" for path in HERE.glob("config/*.py"))
        raise UserError(absent(o.config, "in this folder", presets))
    for flag in flags:
        if flag.partition("=")[0].replace("-", "_") in ("__data_dir", "__out_dir", "__resume"):
            raise UserError(f"{flag} cannot be in --flags: give --source and --out-dir")
    words = [o.config, f"--data_dir={data_dir_of(source)}", f"--out_dir={VOLUME_DIR}/{out_dir}"]
    words += ["--resume=auto"]
    if source not in STORIES:
        words += ["--vocab_source=bpe"]
    if source not in STORIES or o.vocab_size:  # else the config's
        words += [f"--vocab_size={vocab_size}"]
    words += flags
    answer(prepare_for.remote(words, source, machines))
    on_machine = train.with_options(gpu=gpu, cpu=4 * n_gpus) if gpu else train
    answer(on_machine.remote(words, out_dir, n_gpus))
    print(f"next: modal run modal_app.py --command transfer --path {out_dir}/model.bin")


def run_inference(o):
    flags = ["-t", str(o.temperature), "-p", str(o.top_p), "-n", str(o.steps)]
    flags += [] if o.seed is None else ["-s", str(o.seed)]
    out_dir = inside(o.out_dir, "out_dir")
    flags += split_words(o.flags, "flags")
    print(printable(answer(inference.remote(o.prompt, out_dir, flags))))


def run_transfer(o):
    path = inside(o.path or "out/model.bin", "path")
    (upload if o.action == "upload" else download)(path, o.local_path or path)


def run_cleanup(o):
    entries, sizes = on_volume(), {}
    for path, entry in entries.items():
        if is_file(entry):
            sizes.setdefault(posixpath.dirname(path) or "/", []).append(entry.size)
    for folder, found in sizes.items():
        print(printable(f"{sum(found):>18,} bytes in {len(found):>5,} files of {folder}"))
    doomed = leftovers(entries)
    if o.path == "/":
        doomed = dict.fromkeys((path for path in entries if "/" not in path), "all is to go")
    elif o.path:
        doomed = {inside(o.path, "path"): "as --path says"}
    total = 0
    for path, why in doomed.items():
        n_bytes = sum(entry.size for entry in files_of(path, entries).values())
        verb = "would delete" if o.dry_run else "deleting"
        print(printable(f"{verb} {path}, {n_bytes:,} bytes: {why}"))
        total += n_bytes
        if not o.dry_run:
            volume.remove_file(path, recursive=not is_file(entries[path]))
    print(f"{total:,} bytes {'would be' if o.dry_run else 'are'} deleted")


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
    flags: str = "",  # more words for train.py, tinystories.py, webtext.py or ./run
    out_dir: str = "out",  # of the run, on the volume
    source: str = "babyllama",  # of the text: one of VOCAB_SIZES, or a path on the volume
    vocab_size: int = 0,  # 0: the config's in train, the source's in prepare
    machines: int = 4,  # that share a large corpus
    gpu: str = "L4",  # for train: none, or one of GPUS, H100:8 for eight
    config: str = "config/tok105.py",
    prompt: str = "Once upon a time",  # for inference, as all to seed
    temperature: float = 0.8,
    top_p: float = 0.9,
    steps: int = 256,  # tokens
    seed: int | None = None,  # the same seed tells the same story
    action: Literal["download", "upload"] = "download",  # for transfer
    path: str = "",  # on the volume: for transfer, and for cleanup, where / is everything
    local_path: str = "",  # here, where it is not the same
    dry_run: bool = False,  # cleanup only says what it would delete
):
    """What `modal run modal_app.py` does on this machine."""
    options = SimpleNamespace(**locals())
    one_sentence_errors()
    COMMANDS[command](options)


if __name__ == "__main__":
    sys.exit("error: this is for Modal to run: modal run modal_app.py (--help lists the options)")
