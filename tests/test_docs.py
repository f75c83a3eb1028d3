"""The documents: a command they show is run here, or by a test that is named; what they name is there."""

from __future__ import annotations

import argparse
import ast
import csv
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main
import yaml
from playwright.sync_api import Browser
from typer.core import TyperGroup
from typer.exceptions import TyperException
from typer.testing import CliRunner

from flows.cli import app
from flows.stages import phantoms
from flows.study.content import read_content
from tests.conftest import ROOT, make_project, work_in

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

SHELL = ("", "sh")  # every line is a command; an indented block has the language ""
CONSOLE = "console"  # those that begin with $; so it is in every block that has such a line
OTHER = ("python", "yaml", "json", "ini", "diff", "text")


class Block(NamedTuple):
    """A block of code."""

    page: str
    line: int
    language: str
    text: str


class Command(NamedTuple):
    """A command of a block, its words without comment and without what is set before them."""

    page: str
    line: int
    words: tuple[str, ...]
    text: str  # as the lists below have it; of several lines how the first begins


def blocks_of(page: Path) -> Iterator[Block]:
    """Fenced blocks, and blocks that are indented by four after an empty line and outside of a list."""
    name, lines = page.relative_to(ROOT).as_posix(), page.read_text(encoding="utf-8").splitlines()
    i, before = 0, ""
    while i < len(lines):
        start, line = i, lines[i]
        if fence := re.match(r"( *)```(\S*)", line):
            i += 1
            while not lines[i].startswith(f"{fence[1]}```"):
                i += 1
            yield Block(name, start + 1, fence[2], "\n".join(lines[start + 1 : i]))
        elif line.startswith("    ") and not lines[i - 1].strip() and not re.match(r"[-*] |\d+\. ", before):
            while i + 1 < len(lines) and (lines[i + 1].startswith("    ") or not lines[i + 1].strip()):
                i += 1
            yield Block(name, start + 1, "", "\n".join(each[4:] for each in lines[start : i + 1]).rstrip())
        elif line.strip() and not line.startswith(" "):
            before = line
        i += 1


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def commands_in(block: Block) -> Iterator[Command]:
    """The commands of a block: a line each, or as many as the shell wants; further ones after &&."""
    lines = block.text.splitlines()
    is_console = block.language == CONSOLE or any(line.startswith("$ ") for line in lines)
    if block.language not in (*SHELL, CONSOLE):
        return
    if not block.language and not is_console:
        parts = re.split(r"\n\s*\n", block.text)
        lines = "\n".join(part for part in parts if not is_printed(part)).splitlines()
    whole = ""
    for line in lines:
        if not whole and is_console and not line.startswith("$ "):
            continue
        whole += line.removeprefix("$ ") if not whole else f"\n{line}"
        if not is_whole(whole):
            continue
        for part in parts_of(whole):
            while part and re.match(r"[A-Za-z_]+=", part[0]):
                part = part[1:]
            if part:
                words = (part[0].removeprefix(".venv/bin/"), *part[1:])
                text = " ".join(words) if "\n" not in whole else f"{whole.partition(chr(10))[0][:60]} ..."
                yield Command(block.page, block.line, words, text)
        whole = ""
    if whole:  # the shell waits for more, so it is no command; the first test says so
        yield Command(block.page, block.line, ("?",), whole)


def is_printed(text: str) -> bool:
    """Whether no line of an indented block begins with a program, so that it shows what one printed."""
    first = [line.split()[0].removeprefix(".venv/bin/") for line in text.splitlines() if line.strip()]
    return not any(word in TAKES or re.match(r"[A-Za-z_]+=", word) or shutil.which(word) for word in first)


def is_whole(command: str) -> bool:
    """Whether the shell would not wait for a further line."""
    if not re.search(r"[\n{}|\\'\"]|\bdo\b", command):
        return True
    asked = ["bash", "-n", "-c", command]
    return not command.endswith("\\") and subprocess.run(asked, capture_output=True).returncode == 0


def parts_of(command: str) -> list[list[str]]:
    """The words before, between and after &&; what follows a pipe belongs to what stands before it."""
    parts: list[list[str]] = [[]]
    for word in shlex.split(command.replace("\\\n", " "), comments=True):
        if word == "&&":
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


MAIN_JOB = "test_pipeline.py::test_the_flow_runs_every_stage_in_order"
OPERATION = "test_stack.py::test_a_scheduled_run_registers_a_model_and_a_failed_one_is_reported"
TEAM = "test_team.py::test_a_fresh_clone_pulls_the_pushed_outputs_and_is_up_to_date"
EXPERIMENT = "test_team.py::test_an_experiment_with_another_parameter_is_shown_next_to_the_study"
REPRODUCED = "test_team.py::test_a_run_is_reproduced_from_its_tags_alone"
HERE = "test_docs.py::test_the_commands_do_what_the_pages_say"
POSTGRESQL = "test_stack.py::test_a_scheduled_run_registers_a_model_on_postgresql_behind_a_password"
RETRAINED = "test_retrain.py::test_new_images_are_taken_in_and_the_champion_changes_only_by_the_gate"
CLUSTER = "test_runners.py::test_only_the_shard_of_a_killed_worker_is_repeated"
PARSED = "test_docs.py::test_a_command_is_one_that_its_program_takes"

# In this order, in one project of 39 images with a folder ``new`` of two images and a broken one.
RUN_HERE = (
    "medfocus doctor",
    "mkdir -p ../images",
    "cp -r data/phantoms/breast_ultrasound/train ../images/mine",
    "medfocus init ../images/mine",
    "medfocus init data/phantoms/breast_ultrasound --name breast",
    "medfocus run --params studies/breast.yaml",
    "medfocus study",
    "medfocus report --params studies/breast.yaml",
    "medfocus models",
    "medfocus models card medfocus-breast",
    "medfocus predict new --out answers --model medfocus-breast",
    "medfocus models export breast.zip --model medfocus-breast",
    "medfocus models import breast.zip --name medfocus-breast",
)
PREDICT = "medfocus predict new --out answers --model medfocus-breast"  # ends with 1, as its page shows

PG_DUMP = "pg_dump --host /tmp/medfocus-XXXXXXXX --username medfocus --format custom --file"

BREAST = "data/phantoms/breast_ultrasound"
MALIGNANT = f"{BREAST}/test/malignant"
COCO = "medfocus convert coco"

# The test that runs the like of a command, the command, and why it is not run here.
NOT_RUN_HERE = {
    "test_cli.py::test_a_project_can_be_created_anywhere_and_its_stages_run": {
        "medfocus new films": "is for where no clone is",
    },
    "test_package.py::test_the_lock_satisfies_the_declared_dependencies": {
        "make install": "minutes, and the network",
    },
    MAIN_JOB: {
        "make run": "minutes: three data sets and five draws",
        "make study": "hours: every system",
    },
    PARSED: {
        "make test": "it is what runs this",
        "pip install medfocusclip[dask]": "the network",
        "git clone ... medfocusclip": "no address",
        "cd medfocusclip": "needs the clone",
        "source .venv/bin/activate": "changes a shell",
    },
    "test_audit.py::test_a_known_vulnerability_fails_the_check_and_names_the_fixed_version": {
        "make check": "it is run beside the tests",
    },
    HERE: {
        "make report": "needs the study of make run",
        "medfocus run --params studies/mine.yaml": "as that of studies/breast.yaml",
        "medfocus predict ../new --out answers --model medfocus-mine": "as that of new",
        "medfocus predict new --out answers --model medfocus-mine --force": "as that of medfocus-breast",
        f"medfocus predict {MALIGNANT} --out answers --model medfocus-phantom-breast": "needs make run",
    },
    "test_stack.py::test_the_mlflow_server_shows_the_projects_database_on_loopback": {
        "make ui": "runs until Ctrl-C",
    },
    POSTGRESQL: {
        "make up": "runs until Ctrl-C",
        f"{PG_DUMP} mlflow.dump mlflow": "needs make up",
        f"{PG_DUMP} prefect.dump prefect": "needs make up",
    },
    OPERATION: {
        "make up SQLITE=1": "runs until Ctrl-C",
        "export PREFECT_API_URL=http://127.0.0.1:4200/api": "the address of make up",
        "prefect deployment run retrain/study --param params_file=studies/busi.yaml": (
            "needs make up, and the images"
        ),
    },
    "test_operations.py::test_mlflow_does_not_start_beyond_loopback_without_a_password": {
        "make up HOST=0.0.0.0": "no test listens beyond loopback",
    },
    "test_docs.py::test_the_site_has_no_broken_link_and_loads_nothing_from_elsewhere": {
        "make docs": "the same by python -m",
    },
    "test_pipeline.py::test_after_dvc_repro_the_flow_has_nothing_to_do": {
        "make repro": "minutes",
    },
    "test_pocket.py::test_a_few_held_out_images_confirm_the_packaged_figures": {
        "make pocket": "an hour",
    },
    RETRAINED: {
        "make retrain": "minutes",
        "make rollback": "needs two champions",
    },
    REPRODUCED: {
        "make reproduce RUN=...": "needs a run",
        "make reproduce RUN=f81aa2...": "needs a run",
    },
    "test_cli.py::test_weights_that_cannot_be_fetched_are_named_with_the_download_command": {
        "medfocus models fetch facebook/sam2.1-hiera-tiny": "the network",
    },
    "test_cli.py::test_explain_writes_a_sheet_and_a_row_for_each_image": {
        f"medfocus explain {MALIGNANT}/00000.png --out why --model medfocus-phantom-breast": "needs make run",
    },
    "test_app.py::test_a_click_on_the_page_changes_the_probabilities": {
        "medfocus app": "runs until Ctrl-C",
        "medfocus app --model medfocus-mine": "runs until Ctrl-C",
        "medfocus app --model medfocus-phantom-brain@1": "runs until Ctrl-C",
        "medfocus app --port 0 --no-browser": "runs until Ctrl-C",
    },
    "test_convert.py::test_medmnist_is_converted_without_loss": {
        "medfocus convert medmnist pneumoniamnist.npz ../images/pneumonia": "no such file",
    },
    "test_convert.py::test_a_data_set_is_downloaded_by_name_or_the_error_names_the_fix": {
        "medfocus convert medmnist breastmnist --size 224 ../images/breast": "the network",
    },
    "test_convert.py::test_instances_become_known_regions_and_labels": {
        "medfocus convert coco instances.json ../images/lesions --images images": "no such file",
        f"{COCO} data/own/instances.json data/own/lesions --images {BREAST}": "no such file",
    },
    "test_cli.py::test_init_reads_through_a_wrapping_folder_and_reports_it": {
        "medfocus init data/own/archive --name busi-like --modality breast_ultrasound": "no such archive",
    },
    "test_cli.py::test_init_guesses_the_columns_from_their_values": {
        f"medfocus init {BREAST}/befunde.csv --name clinic": "no such table",
        "medfocus init data/own/scans/befunde.csv": "no such table",
    },
    "test_cli.py::test_init_reads_patients_and_modality_from_dicom_headers": {
        "medfocus init images/films": "no such films",
    },
    "test_cli.py::test_init_of_volumes_writes_the_slices_setting": {
        "medfocus init images/heads --modality brain_mri": "no such volumes",
    },
    "test_cli.py::test_every_frame_of_a_file_gets_a_row_with_its_name": {
        "medfocus predict new --out answers --model medfocus-chest@1": "no such model",
        "cut -d, -f1-2 answers/predictions.csv": "the same",
    },
    "test_ingest.py::test_every_unusable_file_is_left_out_in_one_report": {
        "medfocus init data/own/scans --modality breast_ultrasound": "no such folder",
    },
    "test_cards.py::test_every_test_set_has_its_scores_with_wilson_intervals": {
        "medfocus models card medfocus-phantom-breast@1": "as that of medfocus-breast",
        "medfocus models card medfocus-phantom-breast --sheet": "as that of medfocus-breast",
    },
    "test_serve.py::test_every_json_form_of_mlflow_gets_the_evaluations_answers": {
        "export MLFLOW_TRACKING_URI=sqlite:///mlflow.db": "for the server below",
        "export MLFLOW_LOGGING_LEVEL=ERROR MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true": "the same",
        "mlflow models serve --model-uri models:/medfocus-phantom-bre ...": "runs until Ctrl-C",
        """printf '{"dataframe_records": [{"image": "%s"}], "params": { ...""": "asks the server",
        """{ printf '{"params": {"overlay": false}, "dataframe_records" ...""": "asks the server",
    },
    "test_serve.py::test_a_request_can_omit_overlays": {
        """printf '{"dataframe_records": [{"image": "%s"}]}' "$(base64  ...""": "asks the server",
    },
    "test_serve.py::test_the_answer_to_a_faulty_image_has_place_fault_and_fix_alone": {
        """echo '{"dataframe_records": [{"image": "not base64!"}]}' | ...""": "asks the server",
    },
    "test_serve.py::test_the_answer_to_a_request_without_the_column_names_it": {
        """echo '{"dataframe_records": [{"scan": "aGVsbG8="}]}' | ...""": "asks the server",
    },
    EXPERIMENT: {
        "dvc exp run --name short --set-param methods.medfocusclip.epochs=30": "needs a study that was run",
        "dvc exp show --only-changed": "needs an experiment",
        "dvc plots diff HEAD short": "needs an experiment",
    },
    TEAM: {
        "dvc remote add --default team s3://bucket/medfocus": "no such bucket",
        "dvc push": "needs the remote",
        "dvc pull": "needs the remote",
        "dvc repro": "needs what was pulled",
        "git clone ...": "no address",
    },
    "test_pipeline.py::test_a_killed_flow_repeats_only_unfinished_cells": {
        "python tests/faults/kill.py --instants 100": "half an hour",
    },
    "test_shards.py::test_a_full_disk_leaves_no_partial_shard": {
        "python tests/faults/disk.py": "minutes, and root",
    },
    "faults/test_servers.py::test_mlflow_s_server_must_answer_before_anything_is_computed": {
        "python tests/faults/servers.py": "minutes",
    },
    "test_tracking.py::test_a_changed_clock_does_not_fail_the_run_of_a_living_process": {
        "python tests/faults/clock.py": "moves the clock",
    },
    "test_operations.py::test_a_deployment_has_a_flow_with_its_parameters_a_time_limit_and_failure_hooks": {
        'prefect deployment run backfill/backfill --param datasets=["phantom-chest"]': "needs make up",
    },
    CLUSTER: {
        "dask scheduler": "runs until Ctrl-C",
        "dask worker tcp://SCHEDULER:8786 --nthreads 1 --nworkers 1": "needs a second machine",
    },
}


def test_every_command_of_the_documents_is_run_here_or_says_where_the_like_is() -> None:
    shown: dict[str, list[str]] = {}
    for command in COMMANDS:
        shown.setdefault(command.text, []).append(f"{command.page}:{command.line}")
    elsewhere = [text for each in NOT_RUN_HERE.values() for text in each]
    known = {*RUN_HERE, *elsewhere}
    assert len(known) == len(RUN_HERE) + len(elsewhere), "one is listed twice"
    unknown = {text: places for text, places in shown.items() if text not in known}
    fix = "run it here, name in NOT_RUN_HERE the test that runs the like, or fence it as text"
    assert not unknown, f"{fix}: {unknown}"
    assert known <= shown.keys(), f"no page shows these any more: {known - shown.keys()}"


@pytest.mark.parametrize("test", sorted(NOT_RUN_HERE))
def test_where_the_like_is_run_is_a_test(test: str) -> None:
    file, _, name = test.partition("::")
    assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


def takes_medfocus(words: Sequence[str]) -> None:
    """The command line, by the Typer app itself and to the last option, without running it."""

    def descend(command: Any, name: str | None, words: list[str], parent: Any = None) -> None:
        context = command.make_context(name, words, parent=parent)
        if isinstance(command, TyperGroup) and (left := [*context._protected_args, *context.args]):
            name, command, words = command.resolve_command(context, left)
            descend(command, name, words, context)

    descend(typer.main.get_command(app), "medfocus", list(words))


def takes_make(words: Sequence[str]) -> None:
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class ParsedError(Exception):
    """The arguments are good."""


def takes_python(words: Sequence[str], *, is_whole_line: bool = True) -> None:
    """A module or a script with its own parser, which is stopped when the arguments were parsed.

    Of a line that is not whole only the options have to exist.
    """
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, given: Any = None, space: Any = None) -> None:
        if is_whole_line:
            parse(self, given, space)
        assert {word for word in words if word.startswith("--")} <= self._option_string_actions.keys(), words
        raise ParsedError

    is_module, name = words[0] == "-m", words[1] if words[0] == "-m" else words[0]
    file = ROOT / (name.replace(".", "/") if is_module else name)
    source = next(place for place in (file, file.with_suffix(".py"), file / "__main__.py") if place.is_file())
    if "argparse" not in source.read_text(encoding="utf-8"):  # it takes nothing, and would start to work
        assert words[-1] == name
        return
    run: Callable[..., object] = runpy.run_module if is_module else runpy.run_path
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, name, raising=False)  # another test may have imported it
        patch.chdir(ROOT)
        patch.setattr(sys, "path", [str(ROOT), *sys.path])
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", ["python", *words[2 if is_module else 1 :]])
        with pytest.raises(ParsedError):
            run(name, run_name="__main__")


def takes_dvc(words: Sequence[str]) -> None:
    from dvc.cli.parser import get_main_parser

    get_main_parser().parse_args(list(words))


def takes_prefect(words: Sequence[str]) -> None:
    """``deployment run FLOW/NAME --param NAME=VALUE``, by prefect.yaml."""
    assert tuple(words[:2]) == ("deployment", "run") and words[3] == "--param"
    flow, _, name = words[2].partition("/")
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    (deployment,) = (each for each in deployments if each["name"] == name)
    assert deployment["entrypoint"].endswith(f":{flow}")
    assert words[4].partition("=")[0] in deployment["parameters"]


def takes_pip(words: Sequence[str]) -> None:
    """``install medfocusclip[EXTRA]``, by pyproject.toml."""
    package = re.fullmatch(r"medfocusclip\[(\w+)\]", words[1])
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert words[0] == "install" and package and package[1] in extras["optional-dependencies"]


def takes_anything(words: Sequence[str]) -> None:
    """Of programs that are none of ours, each line is in NOT_RUN_HERE by its words."""


TAKES: dict[str, Callable[[Sequence[str]], None]] = {
    "medfocus": takes_medfocus,
    "make": takes_make,
    "python": takes_python,
    "dvc": takes_dvc,
    "prefect": takes_prefect,
    "pip": takes_pip,
    **dict.fromkeys(
        (
            "cd",
            "cp",
            "cut",
            "dask",
            "echo",
            "export",
            "git",
            "mkdir",
            "mlflow",
            "pg_dump",
            "printf",
            "source",
            "{",
        ),
        takes_anything,
    ),
}


COMMANDS = [command for block in BLOCKS for command in commands_in(block)]


@pytest.mark.parametrize("program", sorted({command.words[0] for command in COMMANDS}))
def test_a_command_is_one_that_its_program_takes(program: str) -> None:
    for words in sorted({command.words for command in COMMANDS if command.words[0] == program}):
        try:
            TAKES[program](words[1:])
        except (TyperException, SystemExit) as error:
            pytest.fail(f"{' '.join(words)}: {error}")


# --- What stands in the text ---------------------------------------------------------------------


class Span(NamedTuple):
    """Code inside of a line of text."""

    page: str
    line: int
    text: str


def spans_of(page: Path) -> Iterator[Span]:
    inside = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.lstrip().startswith("```"):
            inside = not inside
        elif not inside and not line.startswith("    "):
            for found in re.finditer(r"(?<!`)`([^`]+)`(?!`)", line):
                yield Span(page.relative_to(ROOT).as_posix(), number, found[1])


SPANS = [span for page in PAGES for span in spans_of(page)]


def options_of(path: Sequence[str]) -> set[str]:
    """The options of a command of ``medfocus``; () is the program itself."""
    command: Any = typer.main.get_command(app)
    for word in path:
        assert isinstance(command, TyperGroup), path
        command = command.commands[word]
    return {option for each in command.params for option in each.opts} | {"--help"}


def test_commands_in_the_text_exist_with_their_options() -> None:
    for page, line, text in SPANS:
        words = text.split()
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if words[:1] == ["medfocus"] and len(words) > 1 and not words[1].startswith("--"):
            group = 2 if words[1] == "models" and len(words) > 2 and words[2].isalpha() else 1
            path = [word for word in words[1 : 1 + group] if word.islower()]
            given = {word.partition("=")[0] for word in words if word.startswith("-")}
            assert given <= options_of(path), f"{page}:{line}: {text}"
        elif words[:1] == ["make"] and len(words) > 1:
            takes_make([word for word in words[1:] if "<" not in word])
        elif words[:2] == ["python", "-m"]:
            takes_python(words[1:], is_whole_line=False)


def anchors_of(page: Path) -> set[str]:
    """Of the headings, as a git viewer makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def test_links_lead_somewhere_in_a_git_viewer_too() -> None:
    count = 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if target.startswith(("http://", "https://")):
                continue
            file, _, anchor = target.partition("#")
            place = page.parent / file if file else page
            assert place.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors_of(place), f"{page.name}: {target}"
            count += 1
    assert count > 50


MADE = ("data/", "reports/", "site/", "mlruns/", "studies/mine")  # by a run, or by the reader
PLACES = "compose|docs|examples|flows|medfocus|studies|tests"


def test_files_that_the_documents_name_are_there() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = listed.stdout.splitlines()
    for page, line, text in SPANS:
        named = re.fullmatch(rf"(?:(?:{PLACES})/)?[\w/-]*[\w-]\.(?:py|md|ipynb|toml|yaml|lock)", text)
        if not named or text.startswith(MADE):
            continue
        found = any(f"/{file}".endswith(f"/{text}") for file in files)
        assert found or text in ("busi.yaml", "card.md", "datasheet.md"), f"{page}:{line}: {text}"


def test_tests_that_the_documents_name_are_there() -> None:
    files = [*(ROOT / "tests").glob("test_*.py"), *(ROOT / "tests" / "faults").glob("test_*.py")]
    tests = {
        node.name
        for file in files
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    named = [span for span in SPANS if re.fullmatch(r"test_\w+_\w+", span.text)]
    assert len(named) > 10
    for page, line, text in named:
        assert text in tests, f"{page}:{line}: {text}"


def test_settings_that_the_documents_name_are_in_params_yaml() -> None:
    params = read_content(ROOT / "params.yaml")
    named = 0
    for page, line, text in SPANS:
        if not re.fullmatch(r"[a-z_]+(\.[a-z_+0-9-]+)+", text) or text.split(".")[0] not in params:
            continue
        if text.endswith((".csv", ".md", ".png", ".py", ".yaml")):
            continue
        place: Any = params
        for key in text.split("."):
            assert isinstance(place, dict) and key in place, f"{page}:{line}: {text}"
            place = place[key]
        named += 1
    assert named > 5


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}:{block.line}")
def test_a_block_says_what_it_is_and_can_be_read(block: Block) -> None:
    assert block.language in (*SHELL, CONSOLE, *OTHER), "say sh, console or text"
    if block.language == "python":
        compile(block.text, f"{block.page}:{block.line}", "exec")
    elif block.language in ("yaml", "json"):
        assert yaml.safe_load(block.text) is not None


def accuracies() -> dict[tuple[str, str, str, str], str]:
    """Read accuracy.csv: data set, test set, system and percent of train -> the score as pages show it."""
    with (ROOT / "docs" / "results" / "accuracy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        (row["dataset"], row["test_set"], system_of(row), row["percent_of_train"]): shown(
            row["accuracy"], row
        )
        for row in rows
    }


def system_of(row: dict[str, str]) -> str:
    return row["method"] if row["focus"] == "none" else f"{row['method']} ({row['focus']})"


def shown(value: str, row: dict[str, str]) -> str:
    return f"{value} ± {row['half_width']}" if row["half_width"] else value


def scores_in(page: str) -> Iterator[tuple[str, str, str, str]]:
    """The scores in a page's tables of accuracy: data set, system, percent of train, score."""
    heading, head = "", list[str]()
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if not line.startswith("|"):
            head = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        head = head or cells
        if cells[0] in (head[0], "training images") or set(line) <= set("|-:"):
            continue
        percent = head[0].partition(" ")[0]
        for column, cell in zip(head[1:], cells[1:], strict=True):
            if cell == "–" or column == "per class":
                continue
            if head[0] == "percent of train":
                yield heading, cells[0], column.removesuffix(" %"), cell
            elif head[0].endswith("% of train") and "per class" in head:
                yield cells[0], column, percent, cell
            elif head[0].endswith("% of train"):
                yield column, cells[0], "0" if cells[0].startswith("clip-zero-shot") else percent, cell


@pytest.mark.parametrize(
    ("page", "least"), [("README.md", 60), ("docs/results.md", 500), ("docs/methods.md", 100)]
)
def test_the_scores_of_a_page_are_those_of_the_csv(page: str, least: int) -> None:
    known = accuracies()
    official = {key[0] for key in known if key[1] == "official"}
    scores = list(scores_in(page))
    assert len(scores) >= least
    for dataset, system, percent, score in scores:
        test_set = "official" if dataset in official else "clean"
        assert known.get((dataset, test_set, system, percent)) == score, (dataset, system, percent)


def test_the_figures_in_the_text_of_choosing_a_method_stand_in_the_csv() -> None:
    known = set(accuracies().values())
    for name, column in (("differences", "difference"), ("controls", "difference")):
        with (ROOT / "docs" / "results" / f"{name}.csv").open(newline="") as file:
            known |= {shown(row[column].lstrip("+-"), row) for row in csv.DictReader(file)}
    told = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    figures = re.findall(r"\d+\.\d ± \d+\.\d", told)
    assert len(figures) > 20
    assert [figure for figure in figures if figure not in known] == []


def test_every_room_is_in_the_tree_and_in_the_figure_of_the_architecture() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("start:tree")[2]
    drawn = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    for package in ("medfocus", "flows"):
        for room in (ROOT / package).glob("*/__init__.py"):
            assert f" {room.parent.name}/ " in tree, room
            assert f">{room.parent.name}<" in drawn or f">{room.parent.name}: " in drawn, room


def test_the_figure_of_the_architecture_has_the_stages_of_dvc_yaml() -> None:
    drawn = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert re.findall(r'id="stage-(\w+)"', drawn) == list(stages)
    for name, stage in stages.items():
        box = drawn.partition(f'id="stage-{name}"')[2].partition("</g>")[0]
        (folder,) = re.findall(r">((?:data|reports)/\w+)<", box)
        assert any(out.startswith(folder) for out in stage.get("do", stage)["outs"]), name


# --- What is run ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project of seconds, with the images that the pages speak of, as the working directory."""
    from prefect.testing.utilities import prefect_test_harness

    folder = tmp_path_factory.mktemp("docs") / "medfocusclip"
    folder.mkdir()
    make_project(folder)
    with pytest.MonkeyPatch.context() as patch, prefect_test_harness(server_startup_timeout=120):
        work_in(folder, patch)
        phantoms.main(["--modality", "breast_ultrasound"])
        drawn = folder / "data" / "phantoms" / "breast_ultrasound"
        (folder / "new").mkdir()
        for name, image in zip("ab", sorted((drawn / "test").rglob("*.png")), strict=False):
            shutil.copyfile(image, folder / "new" / f"{name}.png")
        (folder / "new" / "c.png").write_bytes(b"no image")
        yield folder


def test_the_commands_do_what_the_pages_say(project: Path) -> None:
    printed = {}
    for text in RUN_HERE:
        words = shlex.split(text)
        if words[0] != "medfocus":
            subprocess.run(words, check=True)
            continue
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == (1 if text == PREDICT else 0), f"{text}: {result.output}"
        printed[text] = result.output
        if "--name breast" in text:
            shorten(project / "studies" / "breast.yaml")
    assert "2 of 3: answers/predictions.csv" in printed[PREDICT]


def test_the_python_of_the_first_pages_runs(project: Path, sets_tracking_uri: None) -> None:
    """After ``test_the_commands_do_what_the_pages_say``, which registers the model."""
    (fit,), (load,) = (
        [block.text for block in BLOCKS if (block.page, block.language) == (page, "python")]
        for page in ("README.md", "docs/start.md")
    )
    images = sorted((project / "data" / "phantoms" / "breast_ultrasound" / "train").rglob("*.png"))
    given = {
        "images": images,
        "labels": [image.parent.name for image in images],
        "others": images[:2],
    }
    exec(fit, given)
    shutil.copyfile(images[0], "image.png")
    store = f"sqlite:///{project / 'mlflow.db'}"  # MLflow keeps a store by its URI, whatever folder it is in
    registered = load.replace("medfocus-phantom-breast@champion", "medfocus-breast/1")
    registered = registered.replace("sqlite:///mlflow.db", store)
    assert "medfocus-breast/1" in registered and store in registered
    found: dict[str, Any] = {}
    exec(registered.replace("model.predict", "answer = model.predict"), found)
    assert {"label", "overlay"} <= set(found["answer"].columns)


def shorten(study: Path) -> None:
    """What ``init`` wrote, corrected to a few cells of seconds."""
    content = yaml.safe_load(study.read_text(encoding="utf-8"))
    content["study"] |= {
        "methods": {"clip-linear-probe": ["none"], "medfocusclip": ["none"]},
        "percents": [100],
        "seeds": [0],
        "only": {},
    }
    study.write_text(yaml.safe_dump(content), encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_has_no_broken_link_and_loads_nothing_from_elsewhere(site: Path) -> None:
    files = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(files) > len(PAGES) - 2
    for file in files:
        text = file.read_text(encoding="utf-8")
        loaded = re.findall(
            r"<(?:link|script|img|iframe|source)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*>", text
        )
        loaded += re.findall(r"url\(\"?(?:https?:)?//[^)]*\)|@import[^;]*//[^;]*;", text)
        assert not [tag for tag in loaded if 'rel="canonical"' not in tag], file.name
        if file.suffix == ".html":
            assert "For research use only" in text, file.name


def test_the_site_is_searched_where_it_is_opened_as_a_file(site: Path, browser: Browser) -> None:
    asked: list[str] = []
    with browser.new_page() as page:
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site / "start.html").as_uri())
        page.click("input.md-search__input")
        ready = "!document.querySelector('.md-search-result__meta').textContent.includes('Initializing')"
        page.wait_for_function(ready)
        page.keyboard.type("cocoop")  # the theme listens to keys
        page.wait_for_selector(".md-search-result__link")
        found = page.inner_text(".md-search-result__list")
    assert "CoCoOp run out of memory" in found
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}


# --- The examples of docs/extending.md -----------------------------------------------------------


def changed(text: str, hunk: str) -> str:
    """A text with the lines (or parts) of a hunk that begin with - taken out and those with + put in."""
    lines = hunk.splitlines()
    before = "\n".join(line[1:] for line in lines if line[0] in " -")
    after = "\n".join(line[1:] for line in lines if line[0] in " +")
    assert text.count(before) == 1, f"stands {text.count(before)} times there: {before}"
    return text.replace(before, after)


def test_the_examples_of_extending_meet_the_contracts(tmp_path: Path) -> None:
    own = shutil.ignore_patterns("__pycache__", "*.safetensors")
    for name in ("medfocus", "flows", "studies"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=own)
    for file in (ROOT / "medfocus" / "data").glob("*.safetensors"):
        (tmp_path / "medfocus" / "data" / file.name).symlink_to(file)
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=own)
    for name in ("params.yaml", "pyproject.toml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    new = []
    for block in (each for each in BLOCKS if each.page == "docs/extending.md"):
        first, _, rest = block.text.partition("\n")
        file = tmp_path / first.removeprefix("# ")
        if block.language == "python":
            file.write_text(f"{rest}\n", encoding="utf-8")
            new.append(file.relative_to(tmp_path).as_posix())
        elif block.language == "diff":
            text = file.read_text(encoding="utf-8")
            for hunk in rest.split("\n@@\n"):
                text = changed(text, hunk)
            file.write_text(text, encoding="utf-8")
    tests = [file for file in new if file.startswith("tests/")]
    assert len(tests) == 3 and len(new) == 5
    theirs = "least-squares or dim or ridge or metaimage or default_params or unknown_mode"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-vv", "-k", theirs, *tests]
    command += [f"tests/test_{room}.py" for room in ("methods", "focus", "params")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    passed = re.findall(r"\[(least-squares|[\d.-]*dim)[\d.-]*\] PASSED", done.stdout)
    assert len(passed) >= 10 and {"least-squares", "dim"} <= set(passed), done.stdout
