"""Is what README.md says still so? Its commands are understood, what it names exists, its block of code runs.

A failure names the line of README.md and what is wrong there.
"""
import argparse
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from itertools import dropwhile, takewhile
from pathlib import Path

import pytest

from tiny import arguments

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SIX = {path.stem: path for path in sorted(ROOT.glob("0[1-6]_*.py"))}
METHOD_FILES = sorted(path.name for path in (ROOT / "methods").glob("[a-z]*.py"))
PYTHON = re.compile(r"^(.*/)?python3?$")
OWN_METHOD, STAGES, COMMANDS = "change one stage", "which function is which stage", "two commands"  # headings, in any case


def line_of(offset: int) -> int:
    return TEXT.count("\n", 0, offset) + 1


def section(heading: str) -> tuple[int, str]:
    """The first line under the heading that begins like this, and what stands there up to the next heading."""
    found = re.search(rf"^#+ *{heading}[^\n]*\n", TEXT, re.M | re.I)
    assert found, f"README.md has no heading {heading!r}"
    rest = TEXT[found.end():]
    without_code = re.sub(r"^```.*?^```", lambda block: " " * len(block[0]), rest, flags=re.M | re.S)
    end = re.search(r"^#+ ", without_code, re.M)
    return line_of(found.end()), rest[:end.start() if end else None]


def table(heading: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The first table under a heading: its head, and each row with its line."""
    first, text = section(heading)
    lines = dropwhile(lambda line: not line[1].startswith("|"), enumerate(text.split("\n"), first))
    rows = [(number, [cell.strip() for cell in line.strip().strip("|").split("|")])
            for number, line in takewhile(lambda line: line[1].startswith("|"), lines)]
    assert len(rows) > 2, f"README.md:{first}: no table under {heading!r}"
    return rows[0][1], rows[2:]


def spans(text: str, first: int = 1) -> list[tuple[int, str]]:
    """What stands between backticks, with its line; not in blocks of code."""
    text = re.sub(r"^(```.*?^```|    .*?$)", lambda block: re.sub(r"[^\n]", " ", block[0]), text, flags=re.M | re.S)
    return [(first + text.count("\n", 0, found.start()), " ".join(found[1].split()))
            for found in re.finditer(r"`([^`]+)`", text)]


def block_lines() -> list[tuple[int, str]]:
    """Lines of code blocks, which are indented by four or stand in a fence of sh or bash; one that ends with \\ goes on."""
    lines, fence, whole = [], "", True
    for number, line in enumerate(TEXT.split("\n"), 1):
        if line.startswith("```"):
            fence = "" if fence else line
        elif line.startswith("    ") and not fence or re.match("```(sh|bash|console|shell)?$", fence):
            lines, line = (lines, line.strip()) if whole else (lines[:-1], lines[-1][1] + " " + line.strip())
            whole = not line.endswith("\\")
            lines.append((number, line.rstrip("\\ ")))
    return lines


def commands() -> list[tuple[int, list[str]]]:
    """Line, and words from the script on: of blocks, and of spans that begin with python, torchrun or a script and go on."""
    found = []
    for number, text in block_lines() + spans(TEXT):
        for part in re.split("&&|;|\\|", text.split("  #")[0]):
            try:
                words = shlex.split(part)
            except ValueError:  # an apostrophe: not a command
                continue
            while words and re.match(r"^\w+=\S*$", words[0]):
                del words[0]
            scripts = [n for n, word in enumerate(words) if word.endswith(".py")]
            starts = words and (PYTHON.match(words[0]) or words[0] == "torchrun" or (scripts[:1] == [0] and len(words) > 1))
            if starts and scripts and not words[scripts[0]].startswith("tests/test_"):  # these are pytest's
                found.append((number, words[scripts[0]:]))
    return found


def labelled(rows: list) -> list:
    return [pytest.param(*row, id=f"line {row[0]}: {' '.join(row[1])}") for row in rows]


# ------------------------------------------------------------------------------------------------------------- commands

class Parsed(BaseException):
    """The command line is understood; nothing is run."""


STANDS_FOR = {"N": "1", "X": "0.5", "NAME": "weclip"}  # words that a reader replaces


def test_there_are_commands_to_check():
    assert len(commands()) >= 20, commands()


@pytest.mark.parametrize("line, words", labelled(commands()))
def test_every_command_is_understood_by_its_file(line, words, monkeypatch, capsys):
    """By the file's own options. Paths need not exist; N, X and NAME stand for something."""
    script, *argv = words
    path = ROOT / script
    assert path.is_file(), f"README.md:{line}: there is no {script}"
    if not re.search("parse_args|demo_options", path.read_text(encoding="utf-8")):
        return  # it takes no options
    monkeypatch.syspath_prepend(str(path.parent))
    module = import_module(path.stem if path.parent in (ROOT, ROOT / "tests") else f"{path.parent.name}.{path.stem}")
    if own_method_name() in argv:  # it inherits its row
        argv[argv.index(own_method_name())] = "weclip"
    argv = [STANDS_FOR.get(word, word) for word in argv]

    def parsed(real):
        def parse(self, *args):
            real(self, *args)
            raise Parsed
        return parse

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, parsed(getattr(argparse.ArgumentParser, name)))
    if hasattr(module, "resumed_command"):
        monkeypatch.setattr(module, "resumed_command", lambda known: {})  # the run is not here
    monkeypatch.setattr(sys, "argv", [str(path), *argv])
    try:
        module.main()
    except Parsed:
        return
    except (SystemExit, Exception) as error:
        said = (capsys.readouterr().err.strip().splitlines() or [str(error)])[-1]
        pytest.fail(f"README.md:{line}: `{' '.join(words)}` is not understood: {said}", pytrace=False)


def test_the_two_commands_are_those_of_the_pipeline():
    """.ci/run types the first, with fewer steps, and takes the second from README: the first line that has -m pytest."""
    first, text = section(COMMANDS)
    lines = [line for line in text.split("\n") if "-m venv" in line]
    assert len(lines) == 2, f"README.md:{first}: wanted two lines with `-m venv` under {COMMANDS!r}, found {len(lines)}"
    pipeline = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for part in lines[0].strip().split(" && "):
        assert f"\n{part}" in pipeline, f"README.md:{first}: no line of .ci/run begins as the first command, with `{part}`"
    taken = next((line for line in TEXT.split("\n") if "-m pytest" in line), None)
    assert taken == lines[1], f"README.md: .ci/run types the first line with `-m pytest`: {taken!r} is not the second command"
    assert "grep -m1 -- '-m pytest' README.md" in pipeline


# ---------------------------------------------------------------------------------------------------- what README names

def test_every_file_of_the_project_that_is_named_exists():
    wrong = []
    for line, text in spans(TEXT):
        for name in re.findall(r"(?<![\w./-])((?:[\w.+-]+/)*\w+\.py)\b", text):
            stands_for_another = re.search(r"\bNAME\b|_NAME|^OTHER", name) or name in (f"methods/{own_method_name()}.py",)
            if not stands_for_another and not (ROOT / name).is_file():
                wrong.append(f"README.md:{line}: there is no {name}")
    assert not wrong, "\n".join(wrong)


def resolves(module: str | None, name: str) -> bool:
    """Is it in that file; or in any of the six, or a stage of a method?"""
    modules = [import_module(stem) for stem in ([module] if module else SIX)]
    places = modules if module else [*modules, import_module("04_decoder").WeCLIP]
    for place in places:
        for part in name.split("."):
            place = getattr(place, part, None)
        if place is not None:
            return True
    return False


def test_every_function_and_class_that_is_named_exists():
    """NN_file.name everywhere, `class NAME`, and each word of the second column of the table of stages."""
    named = [(line, found[1], found[2]) for line, text in spans(TEXT)
             if (found := re.match(r"^(0\d_\w+)\.((?!py\b)[A-Za-z_][\w.]*)(\(.*\))?$", text))]
    named += [(line, None, text.removeprefix("class ")) for line, text in spans(TEXT) if re.match(r"^class \w+$", text)]
    for number, cells in table(STAGES)[1]:
        for line, text in spans(cells[1], number):
            found = re.match(r"^(?:(0\d_\w+)\.)?([A-Za-z_][\w.]*)(\(.*\))?$", text)
            assert found, f"README.md:{line}: {text!r} in the column of functions is no function"
            named.append((line, found[1], found[2]))
    assert len(named) >= 20
    wrong = [f"README.md:{line}: there is no {name} in {module or 'the six files'}" for line, module, name in named
             if module and module not in SIX or not resolves(module, name)]
    assert not wrong, "\n".join(wrong)


def test_every_picture_exists_and_a_command_stands_beside_it():
    """Within fifteen lines, before or after; a picture that nothing links is left over."""
    pictures = [(line_of(found.start()), found[1] or found[2])
                for found in re.finditer(r'!\[[^\]]*\]\(([^)\s]+)[^)]*\)|<img[^>]*src="([^"]+)"', TEXT)]
    assert pictures, "README.md shows no picture"
    beside = {number for number, _ in commands()}
    wrong = [f"README.md:{line}: there is no {path}" for line, path in pictures if not (ROOT / path).is_file()]
    wrong += [f"README.md:{line}: no command within 15 lines of {path}" for line, path in pictures
              if not beside & set(range(line - 15, line + 16))]
    linked = {path for _, path in pictures}
    wrong += [f"{path.relative_to(ROOT)}: README.md does not show it" for path in (ROOT / ".github").glob("*.png")
              if path.relative_to(ROOT).as_posix() not in linked]
    assert not wrong, "\n".join(wrong)


def test_every_method_stands_in_the_table_of_the_family():
    rows = table("the family")[1]
    text = "\n".join(" ".join(cells) for _, cells in rows)
    missing = [name for name in METHOD_FILES if f"methods/{name}" not in text]
    assert not missing, f"README.md:{rows[0][0]}: the table of the family lacks {', '.join(missing)}"


def test_readme_is_short():
    count = len(TEXT.splitlines())
    assert count <= 350, f"README.md has {count} lines, wanted at most 350"


# -------------------------------------------------------------------------------------------------- tests that it names

def test_each_k_selects_a_test():
    """Of `[FILE] -k WORDS`, words joined by and, or; each stage of the table has one in the column whose head says pytest."""
    named = [(line, found[1], found[2] or found[3]) for line, text in block_lines() + spans(TEXT)
             for found in re.finditer(r"""(?:(tests/\w+\.py) )?-k (?:["']([^"']+)["']|(\w+))""", text)]
    head, rows = table(STAGES)
    columns = [number for number, cell in enumerate(head) if "pytest" in cell]
    assert columns, f"README.md:{rows[0][0] - 2}: the table of stages has no column whose head says pytest"
    bare = [f"README.md:{number}: no `tests/FILE.py -k WORDS` for the stage {cells[0]!r}" for number, cells in rows
            if not any("-k " in cell for cell in cells[columns[0]:columns[0] + 1])]
    assert not bare, "\n".join(bare)
    files = [file for _, file, _ in named]
    line = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "--ignore", __file__]
    line += ["tests"] if None in files else sorted(set(files))
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    tests = [text.lower() for text in done.stdout.splitlines() if "::" in text]
    assert done.returncode == 0 and tests, f"a test file that README names cannot be read: {done.stdout[-2000:]}{done.stderr}"

    def selects(file: str | None, words: str) -> bool:
        there = [test.partition("::")[2] for test in tests if test.startswith(file or "")]
        ways = [each.split(" and ") for each in words.lower().split(" or ")]
        return any(all(word in test for word in way) for way in ways for test in there)

    wrong = [f"README.md:{line}: -k {words!r} selects no test of {file or 'tests/'}" for line, file, words in named
             if words != own_method_name() and not selects(file, words)]  # its own method is not here: it is tested below
    assert not wrong, "\n".join(wrong)


# --------------------------------------------------------------------------------------------- its block of code: a method

def own_method() -> tuple[str, str]:
    """The name and the text of the method that stands as a block of code under its heading."""
    first, text = section(OWN_METHOD)
    block, name = re.search(r"^```python\n(.*?)^```", text, re.M | re.S), re.search(r"methods/(\w+)\.py", text)
    assert block and name, f"README.md:{first}: wanted `methods/NAME.py` and a block ```python under {OWN_METHOD!r}"
    return name[1], block[1]


def own_method_name() -> str | None:
    try:
        return own_method()[0]
    except AssertionError:
        return None


@pytest.fixture(scope="module")
def with_own_method(tmp_path_factory) -> tuple[Path, str]:
    """A copy of the project with the block in its file."""
    folder, (name, text) = tmp_path_factory.mktemp("project"), own_method()
    assert name not in {Path(file).stem for file in METHOD_FILES}, f"methods/{name}.py is there already"
    for path in [*SIX.values(), ROOT / "methods", ROOT / "shapes", ROOT / "tests"]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    (folder / "methods" / f"{name}.py").write_text(text, encoding="utf-8")
    return folder, name


def test_the_method_in_readme_keeps_the_contract(with_own_method):
    """tests/test_methods.py finds it as it finds each file of methods/."""
    folder, name = with_own_method
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_methods.py", "-k", name]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"^[5-9] passed", done.stdout, re.M), done.stdout[-3000:] + done.stderr


def test_the_method_in_readme_trains(with_own_method, world, tmp_path):
    folder, name = with_own_method
    options = arguments(world, tmp_path / "run", "--method", "weclip", "--max-iters", 2)
    options[options.index("weclip")] = name
    done = subprocess.run([sys.executable, folder / "05_train.py", *options], capture_output=True, text=True)
    assert done.returncode == 0 and "step      2/2" in done.stdout, done.stdout[-3000:] + done.stderr


def test_the_method_in_readme_is_short():
    """About ten lines below its imports, none too long."""
    _, text = own_method()
    long = [line for line in text.splitlines() if len(line) > 126]
    assert not long, f"longer than 126 characters: {long}"
    body = text[text.index("class METHOD"):]
    assert len([line for line in body.splitlines() if line.strip()]) <= 18
