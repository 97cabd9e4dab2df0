"""
Which modules the repository has and which ones each imports, read from the sources.
tests/test_repo.py checks these arrows against FLOORS; doc/architecture.md shows them.
"""

import ast
import subprocess
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent

# From the ground up: each may import from its own floor and from those above it in this list
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
SCRIPTS = {*FLOORS[-1], "system/bootstrap.py"}  # which nobody imports
OUTSIDE = ("tests/", "config/", "experiments/", "examples/")  # programs' inputs, and users


def tracked(*patterns):
    """The paths of the files in the repository that match some of the patterns."""
    command = ["git", "ls-files", "--", *patterns]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    return [path for path in done.stdout.splitlines() if (REPO / path).exists()]


def module_paths():
    """{dotted name: path in the repository} of every module on a floor."""
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
    The modules among `names` that a module's source imports, also inside functions. The main block
    of a module that is a script too does not count: nobody who imports the module runs it.
    """
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not is_main_block(node)]
    found = set()
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
            found.add(target)
    return found - {"", name}


def arrows():
    """{module: the modules that it imports}, as dotted names."""
    names = module_paths()
    return {
        name: imports_of((REPO / path).read_text(encoding="utf-8"), name, names)
        for name, path in names.items()
    }


def arrows_of_paths():
    """[(path, path that it imports)] of all modules, sorted."""
    names = module_paths()
    return sorted((names[a], names[b]) for a, imported in arrows().items() for b in imported)


def room(path):
    """The entry of FLOORS that a path belongs to: itself, or its folder."""
    return f"{path.partition('/')[0]}/" if "/" in path else path


def floor(path):
    """The number of the floor that a path is on; that of a floor above all if it is on none."""
    return next((i for i, rooms in enumerate(FLOORS) if room(path) in rooms), len(FLOORS))


def cycle(graph):
    """A list of modules that import each other in a circle, the first one repeated; [] if none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        return e.args[1]
    return []


def imports_by_room():
    """{entry of FLOORS: the entries that its modules import}, both in the order of FLOORS."""
    rooms = [name for entries in FLOORS for name in entries]
    found = {(room(path), room(other)) for path, other in arrows_of_paths()}
    return {
        here: [name for name in rooms if name != here and (here, name) in found] for here in rooms
    }


def with_arrows(page):
    """The text of doc/architecture.md with the last column of its table as the imports are."""
    imports, lines = imports_by_room(), page.splitlines()
    for i, line in enumerate(lines):
        cells = line.split("|")
        if len(cells) == 5 and (name := cells[1].strip(" `")) in imports:
            shown = ", ".join(f"`{other}`" for other in imports[name]) or "nothing"
            lines[i] = "|".join([*cells[:3], f" {shown} ", ""])
    return "\n".join(lines) + "\n"


def rooms_shown(page):
    """The first column of the table in doc/architecture.md."""
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    return [cells[1].strip(" `") for cells in rows if len(cells) == 5]
