"""
Settings of a script: its top-level globals, overridden from the command line.

    from configurator import configure

    batch_size = 32  # sequences per step
    out_dir = "out"  # folder for checkpoints

    configure(globals())

`python script.py --batch_size=8 config/small.py --compile` applies its arguments from left to
right: `--key=value` overrides one setting; an override file (plain Python assignments, which are
parsed and not executed) overrides several. The type of the default determines how a value is
parsed: an int literal is fine for a float, and `--flag` alone sets a bool to True. Everything after
the first `=` is the value. A path may start with `~/`. `--help` lists every setting with its
default and comment.
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
import textwrap
import tokenize
import traceback

SETTING_TYPES = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
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
HOME = re.compile(r"(^|[,=:])(~[^/,]*)(?=/)")  # ~ at the start of a value, or of a path in it
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
PRINT_SETTINGS = "--print-settings"  # lets a program ask what a command line means
HELP_WIDTH, HELP_INDENT = 100, 36  # columns of --help, and the limit for where its comments start

# Control characters, lone surrogates, and direction overrides, which can hide text. The joiners and
# spaces that some scripts and emoji need are not included.
CONTROL_CHARS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(Exception):
    """An error that the user can fix; the message says what is wrong and what to do."""


def printable(text):
    r"""Return text that is safe to print: control characters become \x1b and the like."""
    return CONTROL_CHARS.sub(lambda match: repr(match[0])[1:-1], text)


def one_sentence_errors():
    """
    Make the script end with one sentence instead of a traceback on an uncaught UserError or a file
    that cannot be read or written. Characters that the terminal cannot encode are escaped.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="backslashreplace")

    def hook(kind, error, trace):
        if issubclass(kind, (UserError, OSError)):  # closes progress bars before the message
            traceback.clear_frames(trace)
        if issubclass(kind, UserError):
            text = printable(str(error)).replace("\n", r"\n").replace("\t", r"\t")  # one line
            print(f"error: {text}", file=sys.stderr)
        elif issubclass(kind, BrokenPipeError):  # the reader has closed the pipe
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
    """At the end of a script, exit with status 1 and a message if output cannot be written."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except OSError as e:
        print(f"error: cannot write the output: {e.strerror}", file=sys.stderr, flush=True)
        os._exit(1)  # the only way to set the exit status this late


def settings_of(namespace):
    """
    Return the settings in a namespace: every name bound to a bool, int, float or str, except
    CONSTANTS and names that start with an underscore.
    """
    return {
        name: value
        for name, value in namespace.items()
        if type(value) in SETTING_TYPES and not name.startswith("_") and not name.isupper()
    }


def check_name(name, settings, where=""):
    """Raise UserError with the closest match if `name` is not one of `settings`."""
    if name not in settings:
        near = difflib.get_close_matches(name, settings, n=1, cutoff=0.5)
        hint = f"did you mean --{near[0]}?" if near else "--help lists them all"
        raise UserError(f"{where}unknown setting --{name}: {hint}")


def parse(name, text, default):
    """Parse `text` as the type of `default`; raise UserError if it does not fit."""
    value, stripped = text, text.strip()
    if isinstance(default, bool):
        for boolean, spellings in BOOLS.items():
            if stripped.lower() in spellings:
                return boolean
    elif not isinstance(default, str):
        for kind in (float, int):  # 1e4 is a good way to write an int
            with contextlib.suppress(ValueError):
                value = kind(stripped)
    return coerce(value, default, f"--{name}={text}")


def coerce(value, default, assignment):
    """Convert `value` to the type of `default`, or raise UserError quoting `assignment`."""
    kind = type(default)
    if type(value) is kind:
        return expand_home(value) if kind is str else value
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    raise UserError(f"{assignment}: expected {SETTING_TYPES[kind]}, like {default!r}")


def expand_home(text):
    """Expand each ~ at the start of a path to the home folder; after `=` shells often do not."""
    return HOME.sub(lambda match: match[1] + os.path.expanduser(match[2]), text)


def value_of(node, scope):
    """
    Evaluate an expression of literals, names in `scope` and arithmetic. Raises ValueError for
    anything else, and for operands large enough to exhaust memory.
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
    """Return {name: value} for an assignment; raise ValueError for any other statement."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
        return {}
    if isinstance(node, ast.AugAssign):
        node = ast.Assign([node.target], ast.BinOp(node.target, node.op, node.value))
    if not isinstance(node, ast.Assign) or not all(isinstance(t, ast.Name) for t in node.targets):
        raise ValueError
    return dict.fromkeys((target.id for target in node.targets), value_of(node.value, scope))


def read_override_file(path, settings):
    """
    Return {name: value} for the settings that an override file assigns. The file may use current
    values (`dim = n_heads * 48`), and names that start with an underscore as helpers. It is parsed
    and not executed, so a stranger's file can change settings and nothing else.
    """
    file = path
    if not os.path.isfile(file):  # `config/x.py` works from any directory
        file = os.path.join(os.path.dirname(os.path.abspath(__file__)), path)
    if not os.path.isfile(file):
        is_folder = os.path.isdir(path) or os.path.isdir(file)
        raise UserError(f"override file {path} {'is a folder' if is_folder else 'does not exist'}")
    with open(file, "rb") as f:
        source = f.read()
    scope, overrides = dict(settings), {}
    try:
        for node in ast.parse(source.decode("utf-8-sig"), file).body:
            try:
                values = assigned(node, scope)
            except ValueError:
                raise UserError(
                    f"{path}, line {node.lineno}: expected name = value, where the value has only "
                    f"numbers, text, earlier names and arithmetic"
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
        raise UserError(f"cannot read override file {path}: {type(e).__name__}: {e}") from None
    return overrides


def comments_of(path):
    """
    Return ({name: comment}, {name: heading}) from a script's source. A setting's comment follows
    `name = value` on the same line, at the top level or in the final `if __name__ == "__main__"`
    block. A heading is a whole-line comment above the first setting of a group.
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
    argument = f" {positional.upper()}" if positional else ""
    print(f"usage: python {script}{argument} [--key=value ...] [override_file.py ...]")
    flags = {name: f"  --{name}={value}" for name, value in settings.items() if name != positional}
    empty = "; nothing after the = means empty" if "" in map(settings.get, flags) else ""
    print(f"Each setting is shown with its default{empty}.")
    comments, headings = comments_of(namespace["__file__"])
    widths = [len(flag) + 2 for flag in flags.values()]
    indent = max((width for width in widths if width <= HELP_INDENT), default=HELP_INDENT)
    if next(iter(settings)) not in headings:
        print()
    for name in settings:
        if name in headings:
            print(f"\n{headings[name]}:")
        if name in flags:
            print_setting(flags[name], comments.get(name, ""), indent)


def print_setting(flag, comment, indent):
    """Print a line of help, wrapped at HELP_WIDTH, with its comment starting at column `indent`."""
    lines = textwrap.wrap(comment, HELP_WIDTH - indent, break_on_hyphens=False)
    if lines and len(flag) + 2 <= indent:
        print(f"{flag:<{indent}}{lines.pop(0)}")
    else:
        print(flag)
    for line in lines:
        print(" " * indent + line)


def apply(namespace, argv, positional=None, many=False):
    """
    Apply the arguments in `argv` to the settings in `namespace`; raise UserError at the first bad
    one. `positional` is the str setting that receives a bare argument; with `many` it receives
    several, joined by commas. Returns {setting: the last argument that set it}.
    """
    settings = settings_of(namespace)
    given = {}
    for arg, following in itertools.zip_longest(argv, argv[1:]):
        if arg.startswith("--") and len(arg) > 2:
            key, equals, text = arg[2:].partition("=")
            name = key.replace("-", "_")
            check_name(name, settings)
            default = settings[name]
            if not equals and not isinstance(default, bool):
                is_value = following and not following.startswith("--")
                value = following if is_value else default or "..."
                raise UserError(f"--{key} needs a value: write --{key}={value}")
            changes = {name: parse(name, text, default) if equals else True}
        elif arg.endswith(".py"):
            changes = read_override_file(arg, settings)
        elif positional and (many or positional not in given) and not arg.startswith("-"):
            value = expand_home(arg)
            changes = {
                positional: f"{settings[positional]},{value}" if positional in given else value
            }
        else:
            raise UserError(f"unexpected argument {arg!r}: settings have the form --key=value")
        namespace.update(changes)
        given |= dict.fromkeys(changes, arg)
        settings = settings_of(namespace)
    return given


def check_range(low, high=math.inf, **settings):
    """Raise UserError for the first setting that is not in the range, or is infinite."""
    for name, value in settings.items():
        if not low <= value <= high or value == math.inf:
            expected = f"at least {low}" if high == math.inf else f"a number from {low} to {high}"
            raise UserError(f"{name} = {value}: expected {expected}")


def split_words(text, name):
    """Split the value of the setting `name` into words as a shell would, or raise UserError."""
    try:
        return shlex.split(text)
    except ValueError as e:
        raise UserError(f"{name} = {text!r}: expected words quoted as in a shell ({e})") from None


def listed_paths(text):
    """Split a comma-separated list of paths. A comma in the name of an existing path is kept."""
    parts, paths = text.split(","), []
    while parts:
        joined = {n: ",".join(parts[:n]).strip() for n in range(len(parts), 0, -1)}
        n = next((n for n, path in joined.items() if os.path.exists(path)), 1)
        paths.append(joined[n])
        del parts[:n]
    return list(filter(None, paths))


def configure(namespace, positional=None, argv=None, many=False):
    """
    Override a script's globals in place from the command line; see the top of this file. --help
    prints help and exits; --print-settings prints all settings as JSON and exits. A bad argument,
    and any later UserError, ends the script with one sentence and status 1. Returns {setting: the
    last argument that set it}.
    """
    one_sentence_errors()
    argv = sys.argv[1:] if argv is None else argv
    if PRINT_SETTINGS in argv:
        argv = [arg for arg in argv if arg != PRINT_SETTINGS]
        given = apply(namespace, argv, positional, many)
        print(json.dumps({"settings": settings_of(namespace), "given": sorted(given)}))
        sys.exit(0)
    if "--help" in argv or "-h" in argv:
        print_help(namespace, settings_of(namespace), positional)
        sys.stdout.flush()  # here, so that a closed pipe causes no traceback
        sys.exit(0)
    return apply(namespace, argv, positional, many)
