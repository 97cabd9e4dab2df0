"""modal_app.py with a folder instead of Modal's volume, and this machine instead of Modal's."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import (
    PATIENCE_S,
    REPO,
    TINY,
    read_log,
    wait_until,
)

modal = pytest.importorskip("modal")

import modal_app  # noqa: E402
from configurator import UserError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:The .* function is executing locally")

# a script that records its arguments, then runs the code in ACT
STUB = """
import json, os, pathlib, signal, sys, time
with open("calls.jsonl", "a") as f:
    print(json.dumps(sys.argv), file=f)
exec(os.environ.get("ACT", ""))
"""


class Volume:
    """The methods of modal.Volume that modal_app.py calls, for a folder."""

    def __init__(self, root):
        self.root, self.commits = root, 0
        root.mkdir()

    def commit(self):
        self.commits += 1

    def reload(self):
        pass

    def iterdir(self, path, recursive):
        assert path == "/" and recursive
        for p in self.root.rglob("*"):
            kind = modal.types.FileEntryType.FILE if p.is_file() else modal.types.FileEntryType(2)
            stat, name = p.stat(), p.relative_to(self.root).as_posix()
            yield modal.types.FileEntry(name, kind, int(stat.st_mtime), stat.st_size)

    def read_file(self, path):
        data = (self.root / path).read_bytes()
        yield from (data[i : i + 1000] for i in range(0, len(data), 1000))

    @contextlib.contextmanager
    def batch_upload(self, force):
        assert force
        self.batch = []
        yield self
        for local, remote in self.batch:
            target = self.root / remote.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            if os.path.isdir(local):
                shutil.copytree(local, target, dirs_exist_ok=True)
            else:
                shutil.copy(local, target)

    def put_file(self, local, remote):
        assert os.path.isfile(local)
        self.batch.append((local, remote))

    def put_directory(self, local, remote):
        assert os.path.isdir(local)
        self.batch.append((local, remote))

    def remove_file(self, path, recursive=False):
        (shutil.rmtree if recursive else os.remove)(self.root / path)


class Here:
    """A function of the app that runs on this machine."""

    def __init__(self, function):
        self.function, self.options = function, {}

    def with_options(self, **options):
        self.options = options
        return self

    def remote(self, *args):
        return self.function.local(*args)

    def map(self, inputs, kwargs, return_exceptions):
        assert return_exceptions
        for i in inputs:
            try:
                yield self.function.local(i, **kwargs)
            except Exception as e:
                yield e


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """The volume that modal_app.py sees, and its functions on this machine."""
    volume = Volume(tmp_path / "vol")
    settings = {"VOLUME_DIR": str(volume.root), "ENGINE_DIR": str(tmp_path / "engine")}
    settings |= {"APP_DIR": str(REPO), "CORES": 1, "POLL_S": 0.01, "volume": volume}
    for name in ("prepare", "prepare_for", "prepare_shard", "train", "inference"):
        settings[name] = Here(getattr(modal_app, name))
    for name, value in settings.items():
        monkeypatch.setattr(modal_app, name, value)
    monkeypatch.setenv("CFLAGS", "-std=c11 -O1 -ffp-contract=off")
    monkeypatch.chdir(tmp_path)
    return volume


@pytest.fixture
def stubs(cloud, tmp_path, monkeypatch):
    """Replace our scripts by ones that record their arguments; returns a reader of the records."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("tinystories.py", "webtext.py", "train.py"):
        (tree / name).write_text(STUB)
    monkeypatch.setattr(modal_app, "APP_DIR", str(tree))

    def calls():
        path = tree / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [" ".join(json.loads(line)) for line in lines]

    return calls


def files(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


# ---- end to end


@pytest.mark.slow
def test_from_nothing_to_a_story_and_back_to_an_empty_volume(cloud, tmp_path, capfd):
    flags = f"{' '.join(TINY)} --vocab_size=105 --max_iters=12 --eval_interval=6 --save_interval=3"
    modal_app.main(
        command="prepare", source="practice", vocab_size=105, flags="--n_stories=300 --seed=2"
    )
    assert (cloud.root / "data" / "practice" / "tok105" / "shards.json").exists()
    before = files(cloud.root)
    modal_app.main(source="practice", gpu="none", flags=flags)
    assert before.items() <= files(cloud.root).items()  # the data was not prepared again
    out = cloud.root / "out"
    assert read_log(out)[-1]["reason"] == "finished" and read_log(out)[-1]["step"] == 12
    assert not modal_app.train.options  # no GPU

    capfd.readouterr()
    for _ in range(2):
        modal_app.main(command="inference", prompt="Tim had", steps=20, seed=1, temperature=0.0)
    printed = capfd.readouterr().out
    stories = [line for line in printed.splitlines() if line.startswith("Tim had")]
    assert len(stories) == 2 and stories[0] == stories[1], printed
    assert printed.count("-o run") == 1  # compiled once

    modal_app.main(command="transfer")
    assert (tmp_path / "out" / "model.bin").read_bytes() == (out / "model.bin").read_bytes()
    modal_app.main(command="transfer", path="out", local_path="copy")
    assert files(tmp_path / "copy") == files(out)
    modal_app.main(command="transfer", action="upload", path="out2", local_path="copy")
    assert files(cloud.root / "out2") == files(out)
    modal_app.main(
        command="transfer", action="upload", path="out2/model.bin", local_path="out/model.bin"
    )

    modal_app.main(command="cleanup")
    kept = set(files(out))
    assert {"ckpt.pt", "best.pt", "model.bin", "tokenizer.bin", "log.jsonl"} <= kept
    assert "deleting out/ckpt_000009.pt" in capfd.readouterr().out
    assert not [name for name in kept if name.startswith("ckpt_")]
    modal_app.main(command="cleanup", path="out2")
    assert not (cloud.root / "out2").exists() and out.exists()
    modal_app.main(command="cleanup", path="/")
    assert not list(cloud.root.iterdir())


@pytest.mark.slow
def test_the_same_command_continues_a_killed_run(cloud, practice, monkeypatch):
    """SIGKILL at the first commit, which follows the first checkpoint."""
    shutil.copytree(practice, cloud.root / "data" / "practice")
    children = []

    class Child(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            if "--print-settings" not in args[0]:
                children.append(self)

    def commit():
        if len(children) == 1:
            assert (cloud.root / "out" / "ckpt.pt").exists()
            children[0].kill()

    flags = " ".join([*TINY, "--max_iters=60", "--save_interval=2"])
    command = {"source": "practice", "gpu": "cpu", "flags": flags}
    monkeypatch.setattr(subprocess, "Popen", Child)
    with monkeypatch.context() as patch:
        patch.setattr(cloud, "commit", commit)
        with pytest.raises(
            UserError, match=r"train\.py config/tok105\.py .* was killed by signal 9"
        ):
            modal_app.main(**command)
    step = read_log(cloud.root / "out")[-1]["step"]
    assert 2 <= step < 60
    modal_app.main(**command)
    log = read_log(cloud.root / "out")
    starts = [line["config"]["max_iters"] for line in log if line["kind"] == "start"]
    assert starts == [60, 60] and log[-1]["step"] == 60
    assert [line["step"] for line in log if line["kind"] == "eval"] == [20, 40, 60]


# ---- training


def start(cloud, **options):
    """Train with the stub; its ready-made shards exist."""
    write(cloud.root, "data/tok105/data00.bin")
    modal_app.main(**options)


def test_the_default_prepares_then_trains_on_a_gpu(cloud, stubs):
    modal_app.main()
    data, out = cloud.root / "data", cloud.root / "out"
    assert stubs() == [
        f"tinystories.py download --pretokenized=105 --data_dir={data} --num_workers=1",
        f"train.py config/tok105.py --data_dir={data} --out_dir={out} --resume=auto",
    ]
    assert modal_app.train.options == {"gpu": "L4", "cpu": 4}
    start(cloud, out_dir="out/b", flags='--max_iters=5 "--dtype=float32"', vocab_size=105)
    places = f"--data_dir={data} --out_dir={out}/b --resume=auto"
    assert stubs() == [
        f"train.py config/tok105.py {places} --vocab_size=105 --max_iters=5 --dtype=float32"
    ]


def test_several_gpus_use_torchrun(cloud, stubs, monkeypatch):
    commands = []
    monkeypatch.setattr(modal_app, "watch", lambda command, path: commands.append(command) or 0)
    start(cloud, gpu="h100:8")
    assert modal_app.train.options == {"gpu": "H100:8", "cpu": 32}
    assert commands[0][1:6] == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=8", "train.py")
    ]


def test_each_checkpoint_is_committed(cloud, stubs, monkeypatch):
    """The stub writes the next checkpoint once the previous one is committed."""
    act = """
out = pathlib.Path(sys.argv[3].partition("=")[2])
for i in range(3):
    (out / "part").write_text(str(i))
    (out / "part").replace(out / "ckpt.pt")  # whole at once, as train.py does
    deadline = time.monotonic() + 600
    while not (out / f"committed{i}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
"""
    committed = []

    def commit():
        committed.append((cloud.root / "out" / "ckpt.pt").read_text())
        write(cloud.root, f"out/committed{len(committed) - 1}")  # the stub goes on from here

    monkeypatch.setattr(cloud, "commit", commit)
    monkeypatch.setenv("ACT", act)
    (cloud.root / "out").mkdir()
    start(cloud)
    assert committed == ["0", "1", "2", "2"]  # the last commit is at the end


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_is_passed_on_once_and_saved_files_are_committed(cloud, stubs, signum):
    """The signal goes to the container's whole session; train.py, in another, gets one SIGTERM."""
    act = """
def save(signum, frame):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(0.3)
    pathlib.Path("saved").write_text("")
    sys.exit()
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, lambda *_: os._exit(1))
pathlib.Path("started").write_text("")
time.sleep(600)
"""
    code = f"""
import sys, types; sys.path.insert(0, {str(REPO)!r})
import modal_app
modal_app.APP_DIR = {modal_app.APP_DIR!r}
commit = lambda: print("committed", flush=True)
modal_app.volume = types.SimpleNamespace(commit=commit, reload=lambda: None)
modal_app.train.local([], "out", 1)
"""
    environment = {**os.environ, "ACT": act}
    tree = Path(modal_app.APP_DIR)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    wait_until((tree / "started").exists)
    os.killpg(process.pid, signum)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (tree / "saved").exists(), err
    assert out.splitlines() == ["committed"] and "KeyboardInterrupt" in err


def test_failed_commands_are_not_retried_but_killed_ones_are(cloud, stubs, monkeypatch):
    monkeypatch.setenv("ACT", "sys.exit(3)")
    with pytest.raises(UserError, match=r"train\.py config/tok105\.py .* ended with status 3"):
        start(cloud)
    result = modal_app.train.remote(["--max_iters=0"], "out", 1)  # returned to Modal, not raised
    assert isinstance(result, UserError) and cloud.commits == 2
    monkeypatch.setenv("ACT", "os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(modal_app.Killed, match="was killed by signal 9"):
        modal_app.train.remote(["--max_iters=0"], "out", 1)


# ---- data


@pytest.mark.parametrize("source", ["practice", "tinystories"])
def test_stories_get_a_vocabulary_of_the_requested_size(cloud, stubs, source):
    data = cloud.root / "data" / ("practice" if source == "practice" else "")
    modal_app.main(command="prepare", source=source, vocab_size=300, flags="--vocab_mb=20")
    end = f"--data_dir={data} --num_workers=1 --vocab_mb=20"
    vocabulary = f"--vocab_source=custom --vocab_size=300 {end}"
    bring = "synth" if source == "practice" else "download"
    assert stubs() == [
        f"tinystories.py {bring} {end}",
        f"tinystories.py train_vocab {vocabulary}",
        f"tinystories.py pretokenize {vocabulary}",
    ]
    assert cloud.commits == 3
    write(data, "tok300.model", "TinyStories_all_data/data00.json")
    modal_app.main(command="prepare", source=source, vocab_size=300)
    stages = [call.split()[1] for call in stubs()]
    assert stages == (["pretokenize"] if source == "practice" else ["download", "pretokenize"])


def test_training_prepares_the_shards_that_its_settings_need(cloud, stubs):
    """The preset and the flags set the vocabulary; incomplete shards are continued."""
    flags = "--vocab_source=bpe"
    modal_app.main(source="practice", config="config/story.py", flags=flags)
    assert [call.split()[:4] for call in stubs()][1:3] == [
        ["tinystories.py", stage, "--vocab_source=bpe", "--vocab_size=1024"]
        for stage in ("train_vocab", "pretokenize")
    ]
    shards = cloud.root / "data" / "practice" / "bpe1024"
    shards.mkdir(parents=True)
    for is_complete in (False, True):
        (shards / "shards.json").write_text(json.dumps({"complete": is_complete}))
        modal_app.main(source="practice", config="config/story.py", flags=flags)
        assert any("pretokenize" in call for call in stubs()) != is_complete
    with pytest.raises(UserError, match=r"unknown setting --max_itters: did you mean --max_iters"):
        modal_app.main(flags="--max_itters=5")
    assert not stubs()


def test_a_large_corpus_is_divided_among_machines(cloud, stubs):
    data = cloud.root / "data" / "fineweb-edu"
    modal_app.main(command="prepare", source="fineweb-edu", machines=3, flags="--limit=9")
    same = f"--source=fineweb-edu --vocab_size=49152 --data_dir={data} --limit=9"
    assert stubs() == [
        f"webtext.py train_vocab {same}",
        *(f"webtext.py prepare {same} --shard={i}/3" for i in range(3)),
        f"webtext.py merge {same} --shards=3",
    ]
    write(data, "bpe49152.model")
    modal_app.main(source="fineweb-edu", machines=2, flags="--max_iters=5")
    *calls, training = stubs()
    assert [call.split()[1] for call in calls] == ["prepare", "prepare", "merge"]
    end = "--resume=auto --vocab_source=bpe --vocab_size=49152 --max_iters=5"
    assert f"--data_dir={data} " in training and training.endswith(end)


def test_ready_made_shards_and_text_on_the_volume_are_sources(cloud, stubs):
    modal_app.main(command="prepare", source="fineweb-6b")
    assert [call.split()[:2] for call in stubs()] == [["webtext.py", "prepare"]]
    write(cloud.root, "texts/mine.jsonl")
    modal_app.main(command="prepare", source="texts/mine.jsonl", machines=1, vocab_size=500)
    text, data = cloud.root / "texts" / "mine.jsonl", cloud.root / "data" / "mine"
    same = f"--source={text} --vocab_size=500 --data_dir={data}"
    assert stubs()[1] == f"webtext.py prepare {same} --shard=0/1"
    with pytest.raises(
        UserError, match=r"source = texts/yours\.jsonl: expected one of babyllama, "
    ):
        modal_app.main(command="prepare", source="texts/yours.jsonl")


def test_one_failed_or_killed_machine_fails_the_command(cloud, stubs, monkeypatch):
    """The others still finish their parts."""
    ends = {"ended with status 1": "sys.exit(1)"}
    ends |= {"killed by signal 9": "os.kill(os.getpid(), signal.SIGKILL)"}
    for message, end in ends.items():
        monkeypatch.setenv("ACT", f"if sys.argv[-1] == '--shard=1/3': {end}")
        with pytest.raises(UserError, match=rf"1 of 3 machines failed.*--shard=1/3 .*{message}"):
            modal_app.main(command="prepare", source="fineweb", machines=3)
        stages = [call.split()[1] for call in stubs()]
        assert stages == ["train_vocab", *["prepare"] * 3]  # and no merge


# ---- stories


def test_a_prompt_is_passed_unchanged_and_runs_no_shell(cloud, stubs, tmp_path, capsys):
    tree = Path(modal_app.APP_DIR)
    (tree / "engine").mkdir()
    for name in ("run.c", "engine/kernels.h"):
        (tree / name).write_text("")
    print_args = """#!/bin/sh\\nfor arg; do printf "[%%s]" "$$arg"; done\\n"""
    (tree / "Makefile").write_text(f"run: run.c\n\t@printf '{print_args}' > run; chmod +x run\n")
    write(cloud.root, "out/model.bin")
    prompt = """"It's" $(touch ran) `touch ran`; touch ran\n| touch ran & -n 5 \\ '"""
    modal_app.main(command="inference", prompt=prompt, steps=9, flags="-k 40")
    args = [cloud.root / "out/model.bin", "-i", prompt, *"-t 0.8 -p 0.9 -n 9 -k 40".split()]
    assert capsys.readouterr().out == "".join(f"[{arg}]" for arg in args) + "\n"
    assert not list(tmp_path.rglob("ran"))


# ---- errors


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"gpu": "L5"}, r"gpu = L5: expected one of none, T4, L4, .*; add :2 to :8 for"),
        ({"gpu": "H100:9"}, r"gpu = H100:9: expected"),
        ({"gpu": "H100:"}, r"gpu = H100:: expected"),
        (
            {"config": "config/tok15.py"},
            r"config/tok15.py does not exist in this folder; choose one of: config",
        ),
        ({"config": "/etc/passwd"}, r"config = /etc/passwd: expected a path"),
        ({"flags": '--a="b'}, r"flags = .*No closing quotation"),
        (
            {"flags": "--out-dir=/tmp/x"},
            r"--out-dir=/tmp/x cannot be used in --flags: use --source",
        ),
        ({"out_dir": "../out"}, r"out_dir = ../out: expected a path from the root"),
        ({"source": "../../etc"}, r"source = ../../etc: expected a path from the root"),
        ({"command": "prepare", "machines": 0}, r"machines = 0: expected a number from 1 to 100"),
        ({"command": "prepare", "vocab_size": -1}, r"vocab_size = -1: expected a size, or 0"),
        ({"command": "inference"}, r"out/model.bin does not exist on the volume; train first"),
        ({"command": "inference", "out_dir": "/"}, r"out_dir = /: expected a path"),
        ({"command": "transfer", "path": "../x"}, r"path = ../x: expected a path from the root"),
        ({"command": "transfer", "path": "/x"}, r"path = /x: expected a path from the root"),
        (
            {"command": "transfer", "path": "out/x"},
            r"out/x does not exist on the volume; choose one of: out/a",
        ),
        (
            {"command": "transfer", "path": "x/y"},
            r"x/y does not exist on the volume; choose one of: out",
        ),
        (
            {"command": "transfer", "action": "upload", "path": "here/x"},
            r"here/x does not exist on this machine; choose one of: b",
        ),
        ({"command": "transfer", "action": "upload", "path": "a/../../x"}, r"expected a path"),
        (
            {"command": "cleanup", "path": "out/x"},
            r"out/x does not exist on the volume; choose one of: out/a",
        ),
        ({"command": "cleanup", "path": ".."}, r"path = ..: expected a path from the root"),
    ],
)
def test_bad_options_are_refused_with_one_sentence(cloud, stubs, tmp_path, options, sentence):
    write(cloud.root, "out/a")
    write(tmp_path, "here/b")
    before = files(tmp_path)
    with pytest.raises(UserError, match=sentence):
        modal_app.main(**options)
    assert files(tmp_path) == before and not stubs()


def test_an_incomplete_download_replaces_nothing(cloud, tmp_path, monkeypatch):
    write(cloud.root, "out/model.bin")
    write(tmp_path, "out/model.bin")
    monkeypatch.setattr(cloud, "read_file", lambda path: iter([b"half"]))
    with pytest.raises(UserError, match=r"only 4 of the 13 bytes of out/model\.bin arrived; try"):
        modal_app.main(command="transfer")
    assert files(tmp_path / "out") == {"model.bin": b"out/model.bin"}


# ---- cleaning up


def test_cleanup_prints_what_it_deletes_and_keeps_what_is_needed(cloud, capsys):
    kept = ["data/tok105/data00.bin", "data/texts.tar.gz", "out/ckpt.pt", "out/log.jsonl"]
    kept += ["out/ckpt.pt.7.part", "previous/ckpt.pt", "out2/ckpt_000002.pt"]
    doomed = ["data/tok105.tar.gz", "data/x.bin.9.part/a", "out/ckpt_000002.pt", "out/b.part.etag"]
    doomed += ["out/previous/ckpt_000001.pt", "out/previous_2/ckpt.pt"]
    write(cloud.root, *kept, *doomed)
    for name in ("data/x.bin.9.part", "out/b.part.etag"):
        os.utime(cloud.root / name, (0, time.time() - 2 * 3600))
    modal_app.main(command="cleanup", dry_run=True)
    assert set(files(cloud.root)) == {*kept, *doomed}
    assert "would delete out/previous, 27 bytes: an earlier run" in capsys.readouterr().out
    modal_app.main(command="cleanup")
    printed = capsys.readouterr().out
    assert set(files(cloud.root)) == set(kept)
    for path in (doomed[0], doomed[2], "out/previous", "out/previous_2", "data/x.bin.9.part"):
        assert f"deleting {path}, " in printed
    assert f"{sum(map(len, doomed))} bytes were deleted" in printed
    assert "75 bytes in     5 files of out\n" in printed


# ---- what Modal imports


def python(*args, **options):
    command = [sys.executable, "-W", "ignore", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, **options)


@pytest.mark.slow
def test_the_command_line_without_an_account(tmp_path):
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "COLUMNS": "200"}
    run = ["-m", "modal", "run", REPO / "modal_app.py"]
    done = python(*run, "--help", env=environment, cwd=tmp_path)
    assert done.returncode == 0 and "--vocab-size INTEGER" in done.stdout, done.stderr
    done = python(*run, "--command", "tain", env=environment, cwd=tmp_path)
    assert done.returncode == 2 and "'tain' is not one of 'train', 'prepare'" in done.stderr
    code = "import contextlib, modal.cli.run, modal.__main__"
    code += "; modal.cli.run.run_app = lambda *_, **__: contextlib.nullcontext()"
    code += "; modal.__main__.main()"
    done = python("-c", code, *run[2:], "--gpu", "L5", env=environment, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: gpu = L5: expected one of none")
    assert done.stderr.count("\n") == 1
    done = python(REPO / "modal_app.py", env=environment)
    assert done.returncode == 1 and "error: start this file with Modal" in done.stderr


def test_a_container_may_have_the_file_in_another_folder_than_the_rest(tmp_path):
    shutil.copy(REPO / "modal_app.py", tmp_path)
    environment = {"PYTHONPATH": str(REPO), "MODAL_VOLUME_DIR": "/elsewhere", "HOME": str(tmp_path)}
    code = "import modal_app; print(modal_app.__file__, *modal_app.app.registered_functions)"
    code += "; print(modal_app.VOLUME_DIR)"
    done = python("-c", code, env=environment, cwd=tmp_path)
    names = "prepare prepare_for prepare_shard train inference"
    assert done.stdout.split() == [
        str(tmp_path / "modal_app.py"),
        *names.split(),
        "/elsewhere",
    ], done.stderr


def test_without_modal_one_sentence_says_how_to_install_it():
    code = "import sys; sys.modules['modal'] = None; import modal_app"
    done = python("-c", code, cwd=REPO)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr == "error: modal_app.py needs the package modal: pip install modal\n"


def test_this_machine_needs_only_modal():
    """It may lack torch and every other package that the other scripts need."""
    names = [
        re.split("[=; ]", line)[0] for line in (REPO / "requirements.txt").read_text().split("\n")
    ]
    assert "torch" in names
    code = f"import sys; sys.modules |= dict.fromkeys({[*filter(None, names)]}); import modal_app"
    done = python("-c", f"{code}; print(modal_app.app.name)", cwd=REPO)
    assert done.stdout == "modded-llama2-c\n", done.stderr


def test_only_code_is_sent():
    ignored = modal.FilePatternMatcher(*modal_app.NOT_SENT)
    for path in (
        *".git/HEAD .env .venv/x data/tok105.bin out/ckpt.pt run run_debug libllama2.so".split(),
        *"__pycache__/a.pyc tests/__pycache__/a.pyc mine/ckpt.pt mine/model.bin a.part".split(),
    ):
        assert ignored(Path(path)), path
    for path in (
        *"train.py run.c engine/kernels.h Makefile".split(),
        *"config/tok105.py formats/__init__.py requirements.txt".split(),
    ):
        assert not ignored(Path(path)), path
