"""
Settings of a script: its own top-level globals, overridden from the command line.

    from configurator import configure

    batch_size = 32  # sequences per step
    out_dir = "out"  # where checkpoints go

    configure(globals())

`python script.py --batch_size=8 config/small.py --compile` then reads, from left to right,
`--key=value` overrides and override files (Python files of plain assignments). The type of the
default decides how a value is parsed: an int literal is fine for a float, `--flag` alone means True
for a bool, and everything after the first `=` belongs to the value. `--help` lists every setting
with its default and its comment.
"""

import ast
import contextlib
import difflib
import json
import math
import os
import sys
import tokenize

SETTING_TYPES = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
PRINT_SETTINGS = "--print-settings"  # for programs that need to know what a command line means


class UserError(Exception):
    """Something the user has to change; the message says what was wrong and what to do."""


def one_sentence_errors():
    """
    From here on an uncaught UserError, or a file that cannot be read or written, ends the script
    with a sentence instead of a traceback. A terminal that lacks a character gets its code.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has no such method
            stream.reconfigure(errors="backslashreplace")

    def hook(kind, error, traceback):
        if issubclass(kind, UserError):
            # in one line, and no file can send commands to a terminal
            text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))
            print(f"error: {text}", file=sys.stderr)
        elif issubclass(kind, BrokenPipeError):  # who read the output has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        elif issubclass(kind, OSError) and error.filename:
            print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        elif issubclass(kind, KeyboardInterrupt):
            print("\ninterrupted", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, traceback)

    sys.excepthook = hook


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
    kind = type(default)
    word = text.strip()
    if kind is str:
        return text
    if kind is bool:
        if word.lower() in ("true", "1", "yes", "on"):
            return True
        if word.lower() in ("false", "0", "no", "off"):
            return False
        raise UserError(f"--{name}={text}: expected {SETTING_TYPES[bool]}")
    with contextlib.suppress(ValueError):
        return kind(word)
    with contextlib.suppress(ValueError):  # 1e4 is a good way to write an int
        value = float(word)
        if value.is_integer():
            return int(value)
    raise UserError(f"--{name}={text}: expected {SETTING_TYPES[kind]}, like {default}")


def coerce(name, value, default, where):
    """Check a value from an override file against the type of the default."""
    kind = type(default)
    if type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    expected = SETTING_TYPES[kind]
    raise UserError(f"{where}: {name} = {value!r}: expected {expected}, like {default!r}")


def assigned_names(tree, path):
    """The names that a parsed file assigns to; UserError where it does more than assign."""
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
            targets = [node.target]
        elif isinstance(node, (ast.Expr, ast.Import, ast.ImportFrom)):
            targets = []
        else:
            raise UserError(f"{path}, line {node.lineno}: expected only lines like name = value")
        for target in targets:
            yield from (leaf.id for leaf in ast.walk(target) if isinstance(leaf, ast.Name))


def read_override_file(path, namespace, settings):
    """
    Run an override file and return {name: value} for the settings it assigns. It may compute with
    the settings as they stand (`dim = n_heads * 48`); helper names start with an underscore.
    """
    found = path
    if not os.path.isfile(found):  # `config/x.py` works from any directory
        found = os.path.join(os.path.dirname(os.path.abspath(__file__)), path)
    if not os.path.isfile(found):
        is_folder = os.path.isdir(path) or os.path.isdir(found)
        raise UserError(f"override file {path} {'is a folder' if is_folder else 'does not exist'}")
    with open(found, "rb") as f:
        source = f.read()
    scope = {name: namespace[name] for name in settings}
    try:
        tree = ast.parse(source.decode("utf-8-sig"), found)
        names = list(assigned_names(tree, path))
        exec(compile(tree, found, "exec"), scope)
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"override file {path} fails with {type(e).__name__}: {e}") from None
    overrides = {}
    for name in names:
        if name.startswith("_"):
            continue
        check_name(name, settings, f"{path}: ")
        overrides[name] = coerce(name, scope[name], settings[name], path)
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


def apply(namespace, argv, positional=None):
    """
    Apply the words of `argv` to the settings in `namespace`; raise UserError at the first that
    does not fit. `positional` names a str setting that takes the one bare word that is no file.
    Returns the names of the settings that were given.
    """
    settings = settings_of(namespace)
    given = set()
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            key, equals, text = word[2:].partition("=")
            name = key.replace("-", "_")
            check_name(name, settings)
            default = settings[name]
            if not equals and not isinstance(default, bool):
                raise UserError(f"--{key} needs a value: --{key}={default or '...'}")
            changes = {name: parse(name, text, default) if equals else True}
        elif word.endswith(".py"):
            changes = read_override_file(word, namespace, settings)
        elif positional and positional not in given and not word.startswith("-"):
            changes = {positional: word}
        else:
            raise UserError(f"cannot read {word!r}: settings are given as --key=value")
        namespace.update(changes)
        given |= set(changes)
        settings = settings_of(namespace)
    return given


def check_range(least, most=math.inf, **settings):
    """Raise UserError for the first of some numbers, given by name, that is out of the range."""
    for name, value in settings.items():
        if not least <= value <= most or value == math.inf:
            among = f"at least {least}" if most == math.inf else f"a number from {least} to {most}"
            raise UserError(f"{name} = {value}: expected {among}")


def configure(namespace, positional=None, argv=None):
    """
    Override a script's globals in place from the command line; see the top of this file. Prints
    help and exits on --help; on --print-settings prints all settings as JSON and exits. Anything
    that it cannot use, and any later UserError, ends the script with one sentence and status 1.
    Returns the names of the settings that were given.
    """
    one_sentence_errors()
    argv = sys.argv[1:] if argv is None else argv
    if PRINT_SETTINGS in argv:
        given = apply(namespace, [word for word in argv if word != PRINT_SETTINGS], positional)
        print(json.dumps({"settings": settings_of(namespace), "given": sorted(given)}))
        sys.exit(0)
    if "--help" in argv or "-h" in argv:
        print_help(namespace, settings_of(namespace), positional)
        sys.stdout.flush()  # while a reader who has gone is still no traceback
        sys.exit(0)
    return apply(namespace, argv, positional)
