"""The documents are true: code runs, transcripts are real, links lead somewhere, figures are the measured ones."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

import dwconv
from dwconv.bench.results import from_json
from dwconv.cli import _parser, main
from dwconv.sources import BORDER
from dwconv.variants import REGISTRY

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
EXAMPLE = "four_rows"  # the variant that CONTRIBUTING.md adds; nothing of it exists

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the documents show a machine without a GPU")
every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(path: Path) -> Iterator[tuple[int, str, str, str]]:
    """(line, language, text, the lines before) of every fenced block."""
    text = path.read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, found.start()) + 2, found[1], found[2], text[: found.start()]


def prose(path: Path) -> str:
    """The document without its blocks of code; lines keep their numbers."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```$", lambda m: "\n" * m[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)


# ---- code ----


@every_document
def test_examples_run(path):
    """Python blocks with >>> are run as doctests, a document's one after the other in one namespace."""
    namespace = {"torch": torch, "dwconv": dwconv}
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(optionflags=flags)
    torch.manual_seed(0)
    for line, language, text, _ in blocks(path):
        if language == "python" and ">>>" in text:
            example = doctest.DocTestParser().get_doctest(text, namespace, path.name, str(path), line - 1)
            report: list[str] = []
            runner.run(example, out=report.append, clear_globs=False)
            assert not runner.failures, "".join(report)
            namespace |= example.globs


@every_document
def test_other_python_parses_and_its_names_exist(path):
    """Python blocks without >>> (they need a GPU, or stand for a file): what they take from dwconv must be there."""
    for line, language, text, _ in blocks(path):
        if language != "python" or ">>>" in text:
            continue
        for node in ast.walk(ast.parse(text, f"{path}, block at line {line}")):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dwconv") and not node.level:
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), f"{path}:{line}: {ast.unparse(node)}"
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dwconv":
                assert hasattr(dwconv, node.attr), f"{path}:{line}: dwconv.{node.attr} doesn't exist"


def collapsed(text: str) -> str:
    """Words with one space between them, without the borders of tables."""
    return " ".join(re.sub(r"[│┃┏┓┗┛┡┩┳╇┴├┤┼└┘━─┬]", " ", text).split())


def transcripts(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(command, the lines below it that are not "…") of every console block."""
    for _, language, text, _ in blocks(path):
        if language == "console":
            for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                command, *lines = part.splitlines()
                yield command, [line for line in lines if line.strip() not in ("", "…")]


@without_gpu
@every_document
def test_transcripts_are_what_the_commands_print(path, tmp_path, monkeypatch, set_variable):
    """The lines of a console block stand in the command's output, in order; wrapping and borders don't count."""
    set_variable("DWCONV_EMULATOR_OPTIMIZE", None)  # as users have it
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "build").mkdir()
    for command, lines in transcripts(path):
        if command == "make demo":
            recipe = re.search(r"^demo:.*\n(?:\t.*\n)*?\t\$\(BIN\)/(dwconv .*)$", (ROOT / "Makefile").read_text(), re.M)
            assert recipe
            command = recipe[1]
        program, *arguments = command.split()
        assert program == "dwconv"
        printed = io.StringIO()
        assert main(arguments, Console(file=printed, width=118)) == 0
        rest = collapsed(printed.getvalue())
        for line in lines:
            before, found, rest = rest.partition(collapsed(line))
            assert found, f"`{command}` doesn't print {line!r} there, but: {(before or rest)[:600]}"


@without_gpu
def test_the_excerpt_of_an_exported_file_is_real(tmp_path):
    page = ROOT / "docs" / "optimize.md"
    [excerpt] = [text for _, language, text, _ in blocks(page) if language == "text"]
    out = tmp_path / "82.py"
    printed = io.StringIO()
    command = ["optimize", str(ROOT / "examples/kernelbench/82_square_square.py"), "-o", str(out), "--no-bench"]
    assert main(command, Console(file=printed)) == 0
    rest = out.read_text(encoding="utf-8")
    for part in excerpt.split("…\n"):
        before, found, rest = rest.partition(part)
        assert found, f"the exported file has no such lines there:\n{part}\n{before[:200]}"


COMMAND = re.compile(r"(?:^|\s|\$ |`)dwconv (optimize|explain|bench|env)\b([^\n`#]*)", re.MULTILINE)


@every_document
def test_options_of_commands_exist(path):
    """Every --option that stands behind `dwconv COMMAND` is one of that command's."""
    helps = {
        name: command.format_help()
        for action in _parser()._subparsers._group_actions  # type: ignore[union-attr]
        for name, command in action.choices.items()  # type: ignore[union-attr]
    }
    for found in COMMAND.finditer(path.read_text(encoding="utf-8")):
        for option in re.findall(r"--[a-z][a-z-]*", found[2]):
            assert option in helps[found[1]] or option == "--debug", f"{path}: dwconv {found[1]} has no {option}"


@every_document
def test_make_targets_exist(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"(?:^ {4}|`|\$ )make ([a-z-]+)", path.read_text(encoding="utf-8"), re.MULTILINE):
        assert target in targets, f"{path}: make {target}"


# ---- links and files ----


def anchors(path: Path) -> set[str]:
    """The headings of a document as GitHub names them."""
    headings = re.findall(r"^#+ +(.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_document
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{path} links to {target}"
        assert file.is_relative_to(ROOT), f"{path} links out of the repository: {target}"
        if anchor:
            assert anchor in anchors(file), f"{path} links to {target}, but {file.name} has no such heading"


FILE = re.compile(r"`([\w.<>*-]*(?:/[\w.<>*-]+)+\.(?:py|cuh|h|cpp|md|json|toml|txt|svg)|[\w-]+/[\w./-]*/)`")


@every_document
def test_files_in_backticks_exist(path):
    """`kernels/tile16.cuh`: from the root, the document's folder or src/dwconv; <gpu> and * match any name."""
    for name in FILE.findall(prose(path)):
        if EXAMPLE in name or name.startswith("build/"):
            continue
        pattern = re.sub(r"<\w+>", "*", name)
        places = (ROOT, path.parent, ROOT / "src" / "dwconv")
        assert any(next(place.glob(pattern), None) for place in places), f"{path} names {name}, which doesn't exist"


def test_pictures_are_used_and_well_formed():
    from xml.etree import ElementTree

    text = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    for picture in (ROOT / "docs" / "pictures").iterdir():
        assert f"pictures/{picture.name})" in text, f"{picture.name} stands in no document"
        if picture.suffix == ".svg":
            ElementTree.parse(picture)


def test_every_document_is_on_the_map():
    in_map = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs").rglob("*.md"):
        assert path.name == "README.md" or f"({path.relative_to(ROOT / 'docs')})" in in_map, path


# ---- variants ----


def test_every_variant_has_its_files():
    package = ROOT / "src" / "dwconv"
    signs = {  # what only a variant's own file holds, not those that several share
        package / "variants": 'stem = "{stem}"',
        package / "kernels": BORDER,
        package / "optimize" / "host": "{stem}_launch(",
        ROOT / "docs" / "variants": "# {stem}",
    }
    for folder, sign in signs.items():
        files = [path for path in folder.iterdir() if path.suffix in (".py", ".cuh", ".md")]
        stems = {path.stem for path in files if sign.format(stem=path.stem) in path.read_text(encoding="utf-8")}
        if folder.name == "host":  # those that can be exported
            assert stems <= set(REGISTRY), f"{folder} holds launches of variants that are not registered"
        else:
            assert stems == set(REGISTRY), f"{folder} doesn't hold exactly the registered variants"


@pytest.mark.parametrize("stem", REGISTRY)
def test_pages_have_the_same_sections(stem):
    page = ROOT / "docs" / "variants" / f"{stem}.md"
    headings = re.findall(r"^## (.*)$", prose(page), re.MULTILINE)
    assert page.read_text(encoding="utf-8").startswith(f"# {stem}\n")
    for section in ("Geometry", "What is legal", "Cost model", "What limits it", "Where it was measured"):
        assert section in headings, f"{page} has no section {section!r}"


# ---- figures ----


def table_script() -> types.ModuleType:
    path = ROOT / "benchmarks" / "readme_table.py"
    spec = importlib.util.spec_from_file_location("readme_table", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readmes_figures_are_the_measured_ones():
    script = table_script()
    readme = README.read_text(encoding="utf-8")
    for name, text in script.tables(script.RESULTS).items():
        assert script.between_markers(readme, name) == text, "run python benchmarks/readme_table.py"
    for file, _ in script.TABLES.values():
        report = from_json((script.RESULTS / file).read_text(encoding="utf-8"))
        assert report.conditions.device
        assert not report.wrong


def test_the_attainments_on_the_map_are_the_measured_ones():
    report = from_json((table_script().RESULTS / "kernelbench.json").read_text(encoding="utf-8"))
    kind = ("float32", "channels_first")
    in_kind = [case for case in report.cases if (case.problem.dtype, case.problem.layout) == kind]
    [case] = [case for case in in_kind if case.name.startswith("82_")]
    in_map = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for stem in REGISTRY:
        shown = re.search(rf"^\| \[{stem}\].*\| ([\d.]+|–) \|$", in_map, re.MULTILINE)
        row = case.row("dwconv" if stem == "direct_nchw" else stem)
        assert shown, f"docs/README.md has no row for {stem}"
        assert shown[1] == ("–" if row is None else f"{row.attainment:.2f}")


def test_a_table_is_replaced_and_nothing_else():
    script = table_script()
    before = "a\n<!-- models -->\nold\n<!-- /models -->\nb | c\n"
    after = script.with_table(before, "models", "new")
    assert after == "a\n<!-- models -->\n\nnew\n\n<!-- /models -->\nb | c\n"
    assert script.with_table(after, "models", "new") == after
    with pytest.raises(SystemExit, match="must hold"):
        script.with_table(before, "results", "new")


# ---- the worked example ----


def apply_diff(text: str, diff: str) -> str:
    """The text with a diff's hunks applied; they are found by their lines."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE):
        old = "".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] in " -")
        new = "".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] in " +")
        assert text.count(old) == 1, f"CONTRIBUTING.md changes lines that are not there:\n{old}"
        text = text.replace(old, new)
    return text


def follow_the_steps(tree: Path) -> None:
    """Writes what CONTRIBUTING.md's worked example says into a copy of the repository."""
    for _, language, text, before in blocks(ROOT / "CONTRIBUTING.md"):
        named = re.findall(r"^\*\*\d\. .*?`([^`]+)`", before, re.MULTILINE | re.DOTALL)
        assert named, f"no step names the file of a {language} block"
        file = tree / named[-1]
        file.write_text(apply_diff(file.read_text(), text) if language == "diff" else text, encoding="utf-8")


EDGES_OF_THE_EXAMPLE = f"""
import sys

sys.path.insert(0, "tests")
import edge_plans  # of this copy
import test_edges

from dwconv.device import H200
from dwconv.emulator import build

plans = [plan for plan in edge_plans.chosen_plans(H200) if plan.variant == "{EXAMPLE}"][::4]
assert {{plan.problem.dtype for plan in plans}} == {{"float16", "bfloat16", "float32", "float64"}}
build.build_many(plans)
for plan in plans:
    test_edges.test_result_is_within_rounding(plan)
    test_edges.test_non_finite_inputs_reach_their_windows_only(plan)
"""


def test_the_worked_example_works(tmp_path):
    """A few tests of each kind, in the copy: all of them take as long as they do here."""
    for folder in ("src", "tests", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "conftest.py"):
        shutil.copy(ROOT / name, tmp_path)
    follow_the_steps(tmp_path)
    path = os.pathsep.join(str(tmp_path / folder) for folder in ("src", "tests", "tests/cpu"))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}

    def run(*arguments: str) -> None:
        command = [sys.executable, *arguments]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]

    run("-c", EDGES_OF_THE_EXAMPLE)
    chosen = (
        f"choose.py::test_every_variant_serves_what_it_names[{EXAMPLE}]",
        "imports.py::test_imports_run_one_way",
        f"compile.py::test_default_plans_compile_without_spills[sm_90-{EXAMPLE}]",
        "export.py::test_launches_are_those_of_variants",
        f"export.py::test_launches_are_the_plans[{EXAMPLE}]",
        "docs.py::test_every_variant_has_its_files",
        "docs.py::test_every_document_is_on_the_map",
        f"docs.py::test_pages_have_the_same_sections[{EXAMPLE}]",
    )
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/cpu/test_{name}" for name in chosen))


def test_the_worked_example_keeps_the_style(tmp_path):
    """ruff, mypy and clang-format find nothing to change, where they are installed."""
    tree = tmp_path / "tree"
    for folder in ("src", "docs"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", ".clang-format"):
        shutil.copy(ROOT / name, tree)
    follow_the_steps(tree)
    package = tree / "src" / "dwconv"
    python = [package / "variants" / f"{EXAMPLE}.py", package / "variants" / "__init__.py"]
    cuda = [package / "kernels" / f"{EXAMPLE}.cuh", package / "optimize" / "host" / f"{EXAMPLE}.cuh"]
    folder = Path(sys.executable).parent
    for tool, *arguments in (
        ["ruff", "check", "--no-cache", *python],
        ["ruff", "format", "--no-cache", "--check", *python],
        ["clang-format", "--dry-run", "-Werror", *cuda],
    ):
        found = shutil.which(str(tool), path=f"{folder}{os.pathsep}{os.environ.get('PATH', '')}")
        if found:
            result = subprocess.run([found, *map(str, arguments)], cwd=tree, capture_output=True, text=True)
            assert result.returncode == 0, result.stdout + result.stderr
