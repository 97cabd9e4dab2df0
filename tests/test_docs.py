"""
Check README.md and doc/ against the code: file tree, links, settings, log fields and imports.

    python tests/test_docs.py    # rewrites doc/settings.md and the table in doc/architecture.md
"""

import re
import shlex

import house
import pytest
from conftest import REPO, read_log, script, unwrapped

from configurator import PRINT_SETTINGS

REWRITE = "rewrite it with: python tests/test_docs.py"
SETTINGS, ARCHITECTURE = REPO / "doc" / "settings.md", REPO / "doc" / "architecture.md"
# export.py and modal_app.py do not use configurator.py
WITH_SETTINGS = {"tinystories.py", "webtext.py", "train.py", "sample.py", "generate.py"}
WITH_SETTINGS |= {"sweep.py", "plot.py"}
OPTIONAL = {"mfu"}  # fields that not every machine logs

SETTINGS_HEAD = """\
# Settings of train.py

Which settings does train.py have, what are their defaults, and what does each one do?

`--key=value` overrides a setting, and a file of assignments overrides several (`config/*.py`, see
[config/README.md](../config/README.md)). Both are applied from left to right. `--arch` sets the
architecture options that you do not set; see [model.md](model.md). This page is generated from
`python train.py --help`. The other scripts also list their settings with `--help`.
"""


def settings_page():
    """Return the text of doc/settings.md, from `train.py --help`."""
    done = script("train.py", "--help")
    assert done.returncode == 0, done.stderr
    text, rows = unwrapped(done.stdout), []
    for line in text[text.index("\nusage:") :].splitlines():
        if match := re.fullmatch(r"  --(\w+)=(\S*)(?: +(.*))?", line):
            name, default, meaning = match.groups(default="")
            shown = f"`{default}`" if default else ""
            rows.append(f"| `{name}` | {shown} | {meaning.replace('|', chr(92) + '|')} |")
        elif heading := re.fullmatch(r"(\S.*):", line):
            heading = heading[1][0].upper() + heading[1][1:]
            rows += ["", f"## {heading}", "", "| setting | default | meaning |", "|---|---|---|"]
    return SETTINGS_HEAD + "\n".join(rows) + "\n"


def test_the_page_of_settings_matches_help():
    page = settings_page()
    assert page.count("\n| `") > 50
    assert SETTINGS.read_text(encoding="utf-8") == page, REWRITE


def test_the_page_of_architecture_shows_the_imports():
    page = ARCHITECTURE.read_text(encoding="utf-8")
    assert house.rooms_shown(page) == [name for rooms in house.FLOORS for name in rooms]
    assert house.with_arrows(page) == page, REWRITE


def test_architecture_names_functions_that_exist():
    page = ARCHITECTURE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w./]+\.(?:py|c|h))` \| (.*) \|$", page, re.MULTILINE)
    named = [(path, name) for path, text in rows for name in re.findall(r"`([\w.]+)\(\)`", text)]
    assert len(named) > 30
    for path, name in named:
        source = (REPO / path).read_text(encoding="utf-8")
        assert f"{name.rpartition('.')[2]}(" in source, f"{path} has no {name}()"


def documented_fields():
    """Return {kind: names of its fields} from doc/log-fields.md."""
    fields = {}
    for section in (REPO / "doc" / "log-fields.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        kind = re.match(r"(?:Every line but )?`(\w+)`", section)[1]
        kind = "all" if section.startswith("Every") else kind
        cells = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
        fields[kind] = set(re.findall(r"`(\w+)`", " ".join(cells)))
    for kind in fields.keys() - {"all", "start"}:
        fields[kind] |= fields["all"]
    del fields["all"]
    return fields


def test_the_page_of_log_fields_has_exactly_the_fields_of_a_run(trained):
    documented, lines = documented_fields(), read_log(trained)
    assert {line["kind"] for line in lines} == documented.keys()
    for line in lines:
        assert line.keys() | OPTIONAL == documented[line["kind"]] | OPTIONAL, line["kind"]


def pages():
    return [REPO / path for path in house.tracked("*.md")]


def anchors(page):
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_existing_files_and_headings():
    for page in pages():
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if re.match(r"https?:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name} links to {link}"
            assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


def documented_commands():
    """Return [(script, args...)] for every command in code blocks that runs such a script."""
    commands = set()
    for page in pages():
        blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            names = [i for i, word in enumerate(words) if word in WITH_SETTINGS]
            if names and words[0] in ("python", "torchrun"):
                end = words.index("&&") if "&&" in words else len(words)
                commands.add((words[names[0]], *words[names[0] + 1 : end]))
    return sorted(commands)


@pytest.mark.slow
def test_documented_commands_use_existing_settings():
    commands = documented_commands()
    assert len(commands) > 40
    for name, *args in commands:
        done = script(name, *args, PRINT_SETTINGS, cwd=REPO)
        assert done.returncode == 0, f"{name} {shlex.join(args)}: {done.stderr}"


def test_readme_is_short_and_links_to_each_page():
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    assert len(readme.encode()) <= 14_000
    for page in (REPO / "doc").glob("*.md"):
        assert f"(doc/{page.name})" in readme, f"README.md does not link to doc/{page.name}"


def tree_of_readme():
    """Return the paths in README.md's file tree."""
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    block = next(b for b in readme.split("```") if "\ntrain.py " in b)
    folder, paths = "", set()
    for line in block.strip().splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            paths.add(name)
        else:
            paths.add(folder + name)
    return paths


def test_the_file_tree_in_readme_matches_the_repository():
    """It has one line per module, or one for a folder without lines for its files."""
    shown = tree_of_readme()
    whole = {path for path in shown if path.endswith("/")}
    whole -= {path for path in whole if any(p != path and p.startswith(path) for p in shown)}
    code = house.tracked("*.py", "*.c", "*.h", "*.html")
    code = {path for path in code if not path.endswith("__init__.py")}
    for path in code:
        folder = f"{path.partition('/')[0]}/"
        assert path in shown or folder in whole, f"README.md's file tree lacks {path}"
    for path in shown:
        assert (REPO / path).exists(), f"README.md's file tree has {path}, which does not exist"


if __name__ == "__main__":
    SETTINGS.write_text(settings_page(), encoding="utf-8")
    ARCHITECTURE.write_text(house.with_arrows(ARCHITECTURE.read_text("utf-8")), encoding="utf-8")
