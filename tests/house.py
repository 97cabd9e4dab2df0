"""
The repository's modules and their imports, read from the sources. tests/test_repo.py checks the
imports against FLOORS; doc/architecture.md shows them.
"""

import ast
import subprocess
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent

# From the ground up: a module may import from its own floor and from earlier ones in this list
FLOORS = (
    ("configurator.py", "system/"),
    ("text/",),
    ("bpe.py",),
    ("tokenizer.py",),
    ("dataset.py",),
    ("attention.py", "loss.py", "model.py", "optim.py"),
    ("training/",),
    ("formats/",),  # which reads checkpoints
    ("report/",),
    ("bench/",),
    (
        "tinystories.py",
        "webtext.py",
        "train.py",
        "sample.py",
        "generate.py",
        "export.py",
        "sweep.py",
        "plot.py",
        "modal_app.py",
    ),
)
SCRIPTS = {*FLOORS[-1], "system/bootstrap.py"}  # never imported
OUTSIDE = ("tests/", "config/", "experiments/", "examples/")  # not on any floor


def tracked(*patterns):
    """Return the paths of existing files in the repository that match any of the patterns."""
    command = ["git", "ls-files", "--", *patterns]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    return [path for path in done.stdout.splitlines() if (REPO / path).exists()]


def module_paths():
    """Return {dotted name: path in the repository} for every module outside OUTSIDE."""
    names = {}
    for path in tracked("*.py"):
        if not path.startswith(OUTSIDE):
            name = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
            names[name] = path
    return names


def is_main_block(node):
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def imports_of(source, name, names):
    """
    Return the modules among `names` that a module's source imports, also inside functions. The main
    block of a module that is also a script does not count, because importing it does not run it.
    """
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not is_main_block(node)]
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *filter(None, [node.module])])
            dotted = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in dotted:
            while target and target not in names:
                target = target.rpartition(".")[0]
            imported.add(target)
    return imported - {"", name}


def arrows():
    """Return {module: set of modules that it imports}, as dotted names."""
    names = module_paths()
    return {
        name: imports_of((REPO / path).read_text(encoding="utf-8"), name, names)
        for name, path in names.items()
    }


def arrows_of_paths():
    """Return [(path, path that it imports)] for all modules, sorted."""
    names = module_paths()
    return sorted((names[a], names[b]) for a, imported in arrows().items() for b in imported)


def room(path):
    """Return the entry of FLOORS for a path: the path itself or its folder."""
    return f"{path.partition('/')[0]}/" if "/" in path else path


def floor(path):
    """Return the number of the floor of a path, or len(FLOORS) if it is on none."""
    return next((i for i, rooms in enumerate(FLOORS) if room(path) in rooms), len(FLOORS))


def cycle(graph):
    """Return a list of modules that import each other in a cycle, closed by the first, or []."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        return e.args[1]
    return []


def imports_by_room():
    """Return {entry of FLOORS: entries that its modules import}, both in the order of FLOORS."""
    rooms = [name for entries in FLOORS for name in entries]
    pairs = {(room(path), room(other)) for path, other in arrows_of_paths()}
    return {
        here: [name for name in rooms if name != here and (here, name) in pairs] for here in rooms
    }


def with_arrows(page):
    """Return the text of doc/architecture.md with the imports in the last column of its table."""
    imports, lines = imports_by_room(), page.splitlines()
    for i, line in enumerate(lines):
        cells = line.split("|")
        if len(cells) == 5 and (name := cells[1].strip(" `")) in imports:
            shown = ", ".join(f"`{other}`" for other in imports[name]) or "nothing"
            lines[i] = "|".join([*cells[:3], f" {shown} ", ""])
    return "\n".join(lines) + "\n"


def rooms_shown(page):
    """Return the first column of the table in doc/architecture.md."""
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    return [cells[1].strip(" `") for cells in rows if len(cells) == 5]
