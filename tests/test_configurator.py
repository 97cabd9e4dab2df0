"""Settings: what is parsed, what is refused, and what --help prints."""

import io
import shlex
import subprocess
import sys

import pytest
from conftest import REPO, refused, script, unwrapped

from configurator import (
    UserError,
    apply,
    configure,
    listed_paths,
    print_help,
    printable,
    settings_of,
)


def namespace(**more):
    values = {"batch_size": 32, "rate": 0.1, "name": "out", "compile": False, "stage": ""}
    return {"__file__": str(REPO / "train.py"), "CONSTANT": 3, "_hidden": 1, **values, **more}


def applied(*args, **options):
    values = namespace()
    apply(values, args, **options)
    return values


def test_an_override_file_may_start_with_a_byte_order_mark(tmp_path):
    (tmp_path / "small.py").write_text("\ufeffbatch_size = 8\n")
    assert applied(str(tmp_path / "small.py"))["batch_size"] == 8


def test_characters_that_the_terminal_cannot_encode_are_escaped(monkeypatch):
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "ascii"))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    configure(namespace(), argv=[])
    print("caf\xe9 \u2585 \udcff", flush=True)
    assert out.getvalue() == b"caf\\xe9 \\u2585 \\udcff\n"


@pytest.mark.parametrize(
    "arg, key, value",
    [
        ("--batch_size=8", "batch_size", 8),
        ("--batch-size=8", "batch_size", 8),
        ("--batch_size=1e4", "batch_size", 10000),
        ("--rate=1", "rate", 1.0),
        ("--rate=5e-4", "rate", 5e-4),
        ("--name=a=b=c", "name", "a=b=c"),
        ("--name=", "name", ""),
        ("--compile", "compile", True),
        ("--compile=True", "compile", True),
        ("--compile=false", "compile", False),
    ],
)
def test_the_default_determines_the_type(arg, key, value):
    parsed = applied(arg)[key]
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    "arg, part",
    [
        ("--batch_size=many", "--batch_size=many: expected a whole number"),
        ("--batch_size=1.5", "expected a whole number"),
        ("--rate=fast", "expected a number"),
        ("--compile=perhaps", "expected True or False"),
        ("--batch_sise=8", "did you mean --batch_size?"),
        ("--batch_size", "needs a value"),
        ("--CONSTANT=4", "unknown setting"),
        ("--_hidden=4", "unknown setting"),
        ("--zzz=1", "--help lists them all"),
        ("batch_size=8", "settings have the form --key=value"),
        ("missing.py", "does not exist"),
    ],
)
def test_bad_arguments_are_refused_with_a_sentence(arg, part):
    with pytest.raises(UserError) as e:
        applied(arg)
    assert part in str(e.value)


@pytest.mark.parametrize(
    "args, hint", [(["--batch_size", "64"], "64"), (["--batch_size", "--rate=1"], "32")]
)
def test_a_value_after_a_space_is_shown_with_an_equals_sign(args, hint):
    with pytest.raises(UserError, match=f"needs a value: write --batch_size={hint}$"):
        apply(namespace(), args)


def test_later_arguments_win_and_are_returned():
    values = namespace()
    assert apply(values, ["--batch_size=1", "--batch_size=2"]) == {"batch_size": "--batch_size=2"}
    assert values["batch_size"] == 2


def test_paths_may_contain_commas(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1,2").mkdir()
    assert listed_paths("a,lr=1,2, b,,lr=1") == ["a", "lr=1,2", "b", "lr=1"]
    assert listed_paths("lr=1,2") == ["lr=1,2"]
    assert listed_paths(" , ") == []
    settings = {"what": "", "__file__": "x.py"}
    apply(settings, ["a", "lr=1,2"], "what", many=True)
    assert listed_paths(settings["what"]) == ["a", "lr=1,2"]


def test_one_bare_argument_is_the_positional_setting():
    assert applied("synth", "--batch_size=2", positional="stage")["stage"] == "synth"
    with pytest.raises(UserError):
        applied("synth", "pretokenize", positional="stage")


def test_override_files_set_settings_or_are_refused(tmp_path):
    good = tmp_path / "good.py"
    good.write_text("_half = batch_size // 2\nbatch_size = _half\nrate = 1\n")
    values = applied(str(good), "--rate=2")
    assert (values["batch_size"], values["rate"]) == (16, 2.0)
    for text, part in [
        ("batch_sise = 3", "did you mean --batch_size?"),
        ("if rate > 0:\n    batch_size = 3", "line 1: expected name = value, where the value"),
        ("a, rate = 1, 2", "line 1: expected name = value, where the value"),
        ("b = 1", "unknown setting --b"),
        ("batch_size = 'many'", "batch_size = 'many': expected a whole number, like 32"),
        ("batch_size = (", "SyntaxError"),
        ("batch_size = 1 / 0", "ZeroDivisionError"),
    ]:
        bad = tmp_path / "bad.py"
        bad.write_text(text)
        with pytest.raises(UserError) as e:
            applied(str(bad))
        assert part in str(e.value) and "bad.py" in str(e.value)
    assert not applied(str(tmp_path / "good.py"))["compile"]
    bad.write_bytes(b"batch_size = 3  # f\xfcnf")
    with pytest.raises(UserError, match=r"cannot read override file .*bad\.py: UnicodeDecode"):
        applied(str(bad))
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(UserError, match=r"folder\.py is a folder"):
        applied(str(tmp_path / "folder.py"))


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "from os import system",
        "__import__('os').mkdir('{marker}')",
        "name = __import__('os').getcwd()",
        "name = open('{marker}', 'w').name",
        "batch_size = [__import__('os').mkdir('{marker}') for _ in '1'] and 3",
        "batch_size = (lambda: 3)()",
        "name = f'{{rate}}'",
        "name = name.upper()",
        "name = later",
        "batch_size = 9 ** 9 ** 9",
        "name = 'a' * 1000000000",
        "name = '%1000000000d' % 1",
        "rate.x = 1",
        "batch_size: int = 3",
        "def f(): pass",
    ],
)
def test_override_files_are_parsed_and_not_executed(tmp_path, line):
    path, marker = tmp_path / "bad.py", tmp_path / "ran"
    path.write_text(f'"""A file from a stranger."""\n\nrate = 1\n{line.format(marker=marker)}\n')
    with pytest.raises(UserError, match="line 4: expected name = value, where the value"):
        applied(str(path))
    assert not marker.exists()


def test_override_files_may_use_arithmetic(tmp_path):
    path = tmp_path / "good.py"
    lines = ['"""Text."""', "_n = batch_size // 5", "batch_size = -(_n - 8) ** 2 % 100 + 1"]
    lines += ['name = "a" "b"', 'name += " --c"', "rate = 1 / 4 - 1e-3", "compile = True"]
    path.write_text("\n".join(lines))
    values = applied(str(path))
    assert (values["batch_size"], values["name"]) == (97, "ab --c")
    assert values["rate"] == 0.249 and values["compile"] is True


def test_the_home_folder_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path = tmp_path / "home.py"
    path.write_text('name = "~/out"\n')
    assert applied(str(path))["name"] == "/home/me/out"
    for text, expected in [
        ("~/out", "/home/me/out"),
        ("~/a,~/b", "/home/me/a,/home/me/b"),
        ("FILE:~/prompt.txt", "FILE:/home/me/prompt.txt"),
        ("~nobody-here/x", "~nobody-here/x"),
        ("https://site/~me/x", "https://site/~me/x"),
        ("a ~ b", "a ~ b"),
    ]:
        assert applied(f"--name={text}")["name"] == expected
    assert applied("~/models", positional="stage")["stage"] == "/home/me/models"


def test_a_closed_pipe_causes_no_traceback():
    command = f"{shlex.quote(sys.executable)} {REPO / 'train.py'} --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("Train a Llama") and done.stderr == ""


def test_scripts_work_from_any_directory(tmp_path):
    train = [sys.executable, str(REPO / "train.py")]
    help_text = subprocess.run([*train, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert help_text.returncode == 0
    assert "--batch_size=2" in help_text.stdout and "sequences per micro-batch" in help_text.stdout
    # config/story.py is found beside the script, so only the data is missing
    done = subprocess.run([*train, "config/story.py"], capture_output=True, text=True, cwd=tmp_path)
    refused(done, "no token shards", "tinystories.py pretokenize --vocab_size=1024")


@pytest.mark.parametrize("name", "train tinystories webtext bpe sample generate sweep plot".split())
def test_no_line_of_help_is_longer_than_100_columns(name):
    done = script(f"{name}.py", "--help")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 15 and [line for line in lines if len(line) > 100] == []


def test_help_aligns_comments_and_wraps_them(tmp_path, capsys):
    values = {"dim": 256, "name": "", "texts": "data/one.txt,data/two.txt,data/three.txt"}
    values |= {"stage": "train", "seed": 1}
    comments = {
        "dim": "width",
        "name": f"a comment of{' many' * 20} words",
        "texts": "long default",
    }
    lines = [f"{name} = {value!r}  # {comments.get(name, '')}" for name, value in values.items()]
    path = tmp_path / "x.py"
    path.write_text("\n".join(["# the model", *lines[:-1], "", "# the rest", lines[-1]]))
    values |= {"__file__": str(path), "__doc__": "Do it."}
    print_help(values, settings_of(values), "stage")
    expected = f"""\
Do it.

usage: python x.py STAGE [--key=value ...] [override_file.py ...]
Each setting is shown with its default; nothing after the = means empty.

the model:
  --dim=256  width
  --name=    a comment of{" many" * 15}
             many many many many many words
  --texts=data/one.txt,data/two.txt,data/three.txt
             long default

the rest:
  --seed=1
"""
    assert capsys.readouterr().out == expected


@pytest.mark.slow
def test_every_setting_is_explained():
    for name in ("train.py", "sample.py", "generate.py", "tinystories.py"):
        done = subprocess.run(
            [sys.executable, str(REPO / name), "--help"], capture_output=True, text=True
        )
        lines = [line for line in unwrapped(done.stdout).splitlines() if line.startswith("  --")]
        unexplained = [line.split()[0] for line in lines if len(line.split(None, 1)) < 2]
        assert len(lines) > 8 and not unexplained


def test_only_control_characters_are_escaped():
    kept = "a\u00a0b 👩\u200d👩\u200d👧 می\u200cخواهم \u00adx\n\t"
    assert printable(kept) == kept
    assert printable("\x1b[31m\x9b\u202e\udc80\r\x7f") == r"\x1b[31m\x9b\u202e\udc80\r\x7f"
