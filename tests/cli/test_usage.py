"""Wrong command lines: exit code 2, one line that names the value, nothing done."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from durable import __version__
from tests.cli.conftest import Ran

WRONG = [
    ("worker -c 0", "0 is not in the range"),
    ("worker -c -1", "-1 is not in the range"),
    ("worker -c 10000", "10000 processes"),
    ("worker -c 20001", "20001 is not in the range"),
    ("worker -P threads -c 2000", "more than 1000 threads"),
    ("worker -P greenlets", "'greenlets'"),
    ("worker -c two", "'two'"),
    ("worker -c", "-c"),
    ("worker -Q", "-Q"),
    ("worker -Q ''", "queue must be"),
    ("worker -Q default,", "queue must be"),
    ("worker -Q 'Big Queue'", "'Big Queue'"),
    ("worker -Q default:0", "'default:0'"),
    ("worker -Q default:ten", "'default:ten'"),
    ("worker -Q default:1001", "1001 processes"),
    ("worker -Q a,b,a", "'a' is given twice"),
    ("worker -Q a:600,b:600", "1200 processes"),
    ("worker --prefetch lots", "'lots'"),
    ("worker --prefetch 0", "'0'"),
    ("worker --drain-timeout nan", "'nan'"),
    ("worker --drain-timeout -5", "'-5'"),
    ("worker -l loud", "'loud'"),
    ("worker -n ''", "the name must be 1 to"),
    ("worker --no-such-option", "--no-such-option"),
    ("wroker", "'wroker'"),
    ("result abc", "'abc' is no instance id"),
    ("result 1,2,", "'1,2,' is no instance id"),
    ("result 0", "'0' is no instance id"),
    ("result 99999999999999999999", "is no instance id"),
    ("result 1 --timeout soon", "'soon'"),
    ("show abc", "'abc' is no instance id"),
    ("show", "Missing argument"),
    ("cancel 1,2,", "separate several ids with spaces"),
    ("cancel", "give ids or correlation keys"),
    ("call tasks.ad", "did you mean 'tasks.add'"),
    ("call tasks.add", "missing a required argument: 'a'"),
    ("call tasks.add --args [1,2,3]", "too many positional arguments"),
    ("call tasks.add --kwargs '{\"c\": 1}'", "argument"),
    ("call tasks.add --args '[1,'", "line 1, column 4"),
    ("call tasks.add --args '{}'", "must be a JSON array"),
    ("call tasks.add --kwargs '[1]'", "must be a JSON object"),
    ("call tasks.add --args [NaN]", "NaN is not JSON"),
    (f"call tasks.add --args {'[' * 200_000}", "nested too deeply"),
    ("call tasks.add --args '[\"\\ud800\"]'", "lone surrogate"),
    ("call tasks.add --args [1] --countdown -1", "'-1'"),
    ("call tasks.add --args [1] --eta tomorrow", "'tomorrow' is no time"),
    ("call tasks.add --args [1] --eta 2030-01-01T00:00:00", "no time zone"),
    ("call tasks.add --args [1] --eta 2030-01-01T00:00:00Z --countdown 1", "not both"),
    ("call tasks.add --args [1] --expires 2001-01-01T00:00:00Z", "in the past"),
    ("call tasks.add --args [1] --priority 40000", "40000"),
    ("call tasks.add --args [1] --queue 'Q Q'", "'Q Q'"),
    ("call tasks.add --args [1] --key ''", "correlation key"),
    ("call tasks.add --args [1] --wait soon", "'soon'"),
    ("list --status broken", "'broken'"),
    ("list --limit -1", "-1"),
    ("list --limit many", "'many'"),
    ("list --schema 'x; drop'", "'x; drop'"),
    ("list -A tasks --schema other", "not both"),
    ("migrate --status --sql", "--status alone"),
    ("purge", "say --yes"),
    ("server sotp", "'sotp'"),
    ("server stop --mode gently", "'gently'"),
    ("completion tcsh", "'tcsh'"),
]


@pytest.mark.parametrize(("line", "said"), WRONG, ids=[line[:60] for line, _ in WRONG])
def test_a_wrong_command_line_ends_with_2_and_one_line(
    durable: Callable[..., Ran], shop: Path, line: str, said: str
) -> None:
    ran = durable(*shlex.split(line))
    assert ran.code == 2
    assert said in ran.error
    assert ran.out == ""


@pytest.mark.parametrize("line", ["--help", "", "worker --help", "call -h", "server", "server start --help"])
def test_help_needs_no_app(durable: Callable[..., Ran], line: str) -> None:
    ran = durable(*line.split())
    assert ran.code == 0
    assert "Usage: durable" in ran.out


def test_the_help_tells_how_to_complete_and_which_exit_codes_there_are(durable: Callable[..., Ran]) -> None:
    ran = durable("--help")
    assert "_DURABLE_COMPLETE=bash_source durable" in ran.out
    assert "2 wrong usage, 3 wrong app" in ran.out


def test_the_demos_help_comes_from_the_demo(durable: Callable[..., Ran]) -> None:
    ran = durable("demo", "--help")
    assert ran.code == 0
    assert "--files" in ran.out


def test_a_wrong_setting_in_the_environment_stops_the_demo_but_not_the_help(process: Callable[..., Ran]) -> None:
    wrong = {"DURABLE_LEASE_TTL": "ture"}
    assert process("--help", env=wrong).code == 0
    ran = process("demo", env=wrong)
    assert ran.code == 3
    assert "DURABLE_LEASE_TTL must be a number, got 'ture'" in ran.error


def test_the_version(process: Callable[..., Ran]) -> None:
    assert process("--version").out == f"durable {__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_durable(durable: Callable[..., Ran], shell: str) -> None:
    ran = durable("completion", shell)
    assert ran.code == 0
    assert f"_DURABLE_COMPLETE={shell}_complete" in ran.out


def test_completion_completes_commands(process: Callable[..., Ran]) -> None:
    ran = process(
        env={"_DURABLE_COMPLETE": "bash_complete", "COMP_WORDS": "durable wor", "COMP_CWORD": "1"},
    )
    assert ran.out.splitlines() == ["plain,worker", "plain,workers"]
