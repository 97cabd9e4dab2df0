"""
Settings of a script: its own top-level globals, overridden from the command line.

    from configurator import configure

    batch_size = 32  # sequences per step
    out_dir = "out"  # where checkpoints go

    configure(globals())

`python script.py --batch_size=8 config/small.py --compile` then reads, from left to right,
`--key=value` overrides and override files (plain assignments in the syntax of Python, which are
read and not run). The type of the default decides how a value is parsed: an int literal is fine for
a float, `--flag` alone means True for a bool, and everything after the first `=` belongs to the
value. A path may begin with `~/`. `--help` lists every setting with its default and its comment.
"""

import ast
import atexit
import contextlib
import difflib
import errno
import itertools
import json
import math
import operator
import os
import re
import shlex
import sys
import tokenize
import traceback

SETTING_TYPES = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
BOOLS = {True: ("true", "1", "yes", "on"), False: ("false", "0", "no", "off")}
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
HOME = re.compile(r"(^|[,=:])(~[^/,]*)(?=/)")  # where a path begins: the text, or one of its parts
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
PRINT_SETTINGS = "--print-settings"  # for programs that need to know what a command line means


# control characters, lone surrogates, and overrides of the direction, which can hide text; not the
# joiners and spaces that scripts and emoji need
STEERING = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(Exception):
    """Something the user has to change; the message says what was wrong and what to do."""


def printable(text):
    r"""Text as a terminal may show it: what would steer it becomes \x1b and the like."""
    return STEERING.sub(lambda match: repr(match[0])[1:-1], text)


def one_sentence_errors():
    """
    From here on an uncaught UserError, or a file that cannot be read or written, ends the script
    with a sentence instead of a traceback. A terminal that lacks a character gets its code.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has no such method
            stream.reconfigure(errors="backslashreplace")

    def hook(kind, error, trace):
        if issubclass(kind, (UserError, OSError)):  # progress bars close before the sentence
            traceback.clear_frames(trace)
        if issubclass(kind, UserError):
            text = printable(str(error)).replace("\n", r"\n").replace("\t", r"\t")  # in one line
            print(f"error: {text}", file=sys.stderr)
        elif issubclass(kind, BrokenPipeError):  # who read the output has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        elif issubclass(kind, OSError) and error.filename:
            print(printable(f"error: {error.filename}: {error.strerror}"), file=sys.stderr)
        elif issubclass(kind, OSError) and error.errno in DISK_ERRORS:
            print(f"error: cannot write the output or a file: {error.strerror}", file=sys.stderr)
        elif issubclass(kind, KeyboardInterrupt):
            print("\ninterrupted", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook
    atexit.register(flush_output)


def flush_output():
    """At the end of a script: exit with 1 and a sentence if its output cannot be written."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # who read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except OSError as e:
        print(f"error: cannot write the output: {e.strerror}", file=sys.stderr, flush=True)
        os._exit(1)  # at this point nothing else changes the exit status


def settings_of(namespace):
    """
    The settings in a namespace: its names bound to a bool, int, float or str, those that start with
    an underscore and CONSTANTS left out.
    """
    return {
        name: value
        for name, value in namespace.items()
        if type(value) in SETTING_TYPES and not name.startswith("_") and not name.isupper()
    }


def check_name(name, settings, where=""):
    """Raise UserError, naming the nearest setting, where `name` is none of them."""
    if name not in settings:
        near = difflib.get_close_matches(name, settings, n=1, cutoff=0.5)
        hint = f"did you mean --{near[0]}?" if near else "--help lists them all"
        raise UserError(f"{where}unknown setting --{name}: {hint}")


def parse(name, text, default):
    """Parse `text` to the type of `default`; raise UserError where it does not fit."""
    word, value = text.strip(), text
    if isinstance(default, bool):
        for value_of_words, words in BOOLS.items():
            if word.lower() in words:
                return value_of_words
    elif not isinstance(default, str):
        for kind in (float, int):  # 1e4 is a good way to write an int
            with contextlib.suppress(ValueError):
                value = kind(word)
    return coerce(value, default, f"--{name}={text}")


def coerce(value, default, what):
    """`value` in the type of `default`; UserError, beginning with `what`, where it does not fit."""
    kind = type(default)
    if type(value) is kind:
        return in_home(value) if kind is str else value
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    raise UserError(f"{what}: expected {SETTING_TYPES[kind]}, like {default!r}")


def in_home(text):
    """A text with the home folder in place of each ~ that begins a path: shells often leave it."""
    return HOME.sub(lambda match: match[1] + os.path.expanduser(match[2]), text)


def value_of(node, scope):
    """
    The value of an expression of literals, names in `scope` and arithmetic. ValueError for any
    other, and for numbers and texts so large that they would only exhaust the memory.
    """
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in scope:
        return scope[node.id]
    if not isinstance(node, (ast.UnaryOp, ast.BinOp)):
        raise ValueError
    nodes = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
    operands = [value_of(n, scope) for n in nodes]
    if all(isinstance(x, (int, float)) and abs(x) < 1e300 for x in operands):
        is_small = not isinstance(node.op, ast.Pow) or operands[1] <= 64
    else:
        is_text = isinstance(node.op, ast.Add) and all(isinstance(x, str) for x in operands)
        is_small = is_text and sum(map(len, operands)) < 1e6
    if not is_small or type(node.op) not in OPERATORS:
        raise ValueError
    return OPERATORS[type(node.op)](*operands)


def assigned(node, scope):
    """{name: value} that a line of an override file assigns; ValueError where it does more."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
        return {}
    if isinstance(node, ast.AugAssign):
        node = ast.Assign([node.target], ast.BinOp(node.target, node.op, node.value))
    if not isinstance(node, ast.Assign) or not all(isinstance(t, ast.Name) for t in node.targets):
        raise ValueError
    return dict.fromkeys((target.id for target in node.targets), value_of(node.value, scope))


def read_override_file(path, settings):
    """
    {name: value} of the settings that an override file assigns. It may compute with the settings
    as they stand (`dim = n_heads * 48`); helper names start with an underscore. It is read, and not
    run, so a file from a stranger can set settings and nothing else.
    """
    found = path
    if not os.path.isfile(found):  # `config/x.py` works from any directory
        found = os.path.join(os.path.dirname(os.path.abspath(__file__)), path)
    if not os.path.isfile(found):
        is_folder = os.path.isdir(path) or os.path.isdir(found)
        raise UserError(f"override file {path} {'is a folder' if is_folder else 'does not exist'}")
    with open(found, "rb") as f:
        source = f.read()
    scope, overrides = dict(settings), {}
    try:
        for node in ast.parse(source.decode("utf-8-sig"), found).body:
            try:
                values = assigned(node, scope)
            except ValueError:
                raise UserError(
                    f"{path}, line {node.lineno}: expected only lines like name = value, with "
                    f"numbers, texts, names set before it and arithmetic"
                ) from None
            for name, value in values.items():
                if not name.startswith("_"):
                    check_name(name, settings, f"{path}: ")
                    value = coerce(value, settings[name], f"{path}: {name} = {value!r}")
                    overrides[name] = value
                scope[name] = value
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"override file {path} fails with {type(e).__name__}: {e}") from None
    return overrides


def comments_of(path):
    """
    What a script's source says of its settings: ({name: comment}, {name: heading}). A comment
    stands behind `name = value` at the top level, or in the block of `if __name__ == "__main__"` at
    the end; a heading is a comment on a line of its own before the first setting of a group.
    """
    with open(path, "rb") as f:
        tokens = list(tokenize.tokenize(f.readline))
    first_on_line, comments, headings, indent, heading = {}, {}, {}, 0, None
    for token in tokens:
        row, column = token.start
        if token.line.startswith("if __name__"):
            indent = 4
        if token.type == tokenize.NAME and column in (0, indent):
            first_on_line[row] = token.string
            if heading:
                headings[token.string], heading = heading, None
        elif token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ")
            if row in first_on_line:
                comments[first_on_line[row]] = text
            elif column in (0, indent):
                heading = text.strip("-") and text
    return comments, headings


def print_help(namespace, settings, positional):
    script = os.path.basename(namespace["__file__"])
    if spec := namespace.get("__spec__"):  # started by python -m
        script = f"-m {spec.name}"
    print((namespace.get("__doc__") or script).strip() + "\n")
    words = f" {positional.upper()}" if positional else ""
    print(f"usage: python {script}{words} [--key=value ...] [override_file.py ...]")
    comments, headings = comments_of(namespace["__file__"])
    width = max(len(f"--{name}={value}") for name, value in settings.items())
    if next(iter(settings)) not in headings:
        print()
    for name, value in settings.items():
        if name in headings:
            print(f"\n{headings[name]}:")
        if name != positional:
            print(f"  {f'--{name}={value}':<{width}}  {comments.get(name, '')}".rstrip())


def apply(namespace, argv, positional=None, many=False):
    """
    Apply the words of `argv` to the settings in `namespace`; raise UserError at the first that
    does not fit. `positional` names a str setting that takes the one bare word that is no file.
    With `many`, further bare words are added to it with commas between them. Returns {setting: the
    last word that gave it}.
    """
    settings = settings_of(namespace)
    given = {}
    for word, following in itertools.zip_longest(argv, argv[1:]):
        if word.startswith("--") and len(word) > 2:
            key, equals, text = word[2:].partition("=")
            name = key.replace("-", "_")
            check_name(name, settings)
            default = settings[name]
            if not equals and not isinstance(default, bool):
                is_value = following and not following.startswith("--")
                value = following if is_value else default or "..."
                raise UserError(f"--{key} needs a value, after an equals sign: --{key}={value}")
            changes = {name: parse(name, text, default) if equals else True}
        elif word.endswith(".py"):
            changes = read_override_file(word, settings)
        elif positional and (many or positional not in given) and not word.startswith("-"):
            value = in_home(word)
            changes = {
                positional: f"{settings[positional]},{value}" if positional in given else value
            }
        else:
            raise UserError(f"cannot read {word!r}: settings are given as --key=value")
        namespace.update(changes)
        given |= dict.fromkeys(changes, word)
        settings = settings_of(namespace)
    return given


def check_range(least, most=math.inf, **settings):
    """Raise UserError for the first of some numbers, given by name, that is out of the range."""
    for name, value in settings.items():
        if not least <= value <= most or value == math.inf:
            among = f"at least {least}" if most == math.inf else f"a number from {least} to {most}"
            raise UserError(f"{name} = {value}: expected {among}")


def split_words(text, name):
    """The words in the text of a setting, split as a shell would; UserError with its name."""
    try:
        return shlex.split(text)
    except ValueError as e:
        raise UserError(f"{name} = {text!r} cannot be split into words ({e})") from None


def listed_paths(text):
    """
    The paths in a list with commas. A comma belongs to a name where something has that name.
    """
    parts, paths = text.split(","), []
    while parts:
        joined = {n: ",".join(parts[:n]).strip() for n in range(len(parts), 0, -1)}
        n = next((n for n, path in joined.items() if os.path.exists(path)), 1)
        paths.append(joined[n])
        del parts[:n]
    return list(filter(None, paths))


def configure(namespace, positional=None, argv=None, many=False):
    """
    Override a script's globals in place from the command line; see the top of this file. Prints
    help and exits on --help; on --print-settings prints all settings as JSON and exits. Anything
    that it cannot use, and any later UserError, ends the script with one sentence and status 1.
    Returns {setting: the last word that gave it}.
    """
    one_sentence_errors()
    argv = sys.argv[1:] if argv is None else argv
    if PRINT_SETTINGS in argv:
        argv = [word for word in argv if word != PRINT_SETTINGS]
        given = apply(namespace, argv, positional, many)
        print(json.dumps({"settings": settings_of(namespace), "given": sorted(given)}))
        sys.exit(0)
    if "--help" in argv or "-h" in argv:
        print_help(namespace, settings_of(namespace), positional)
        sys.stdout.flush()  # while a reader who has gone is still no traceback
        sys.exit(0)
    return apply(namespace, argv, positional, many)
