"""`python -m tests.chaos --seed 7 --seconds 20`, or `--seeds 1-10 --seconds 120` for the long run."""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from pathlib import Path

import click

from tests.chaos.cluster import POOLS
from tests.chaos.run import Verdict, run_seed
from tests.chaos.table import FAULTS, chosen


def _seeds(text: str) -> list[int]:
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        seeds += range(int(first), int(last or first) + 1)
    return seeds


@click.command()
@click.option("--seed", type=int, help="One seed: everything that is drawn derives from it.")
@click.option("--seeds", default="1", show_default=True, help="Several, one after another: 1-10 or 3,7.")
@click.option("--seconds", default=60.0, show_default=True, help="How long the storm of one seed lasts.")
@click.option("--workers", default=3, show_default=True, help="Worker commands.")
@click.option("--children", default=2, show_default=True, help="Worker processes of each.")
@click.option(
    "--only",
    default="",
    help="Faults to draw from, by name or pattern (fork-*), a comma between: " + ", ".join(f.name for f in FAULTS),
)
@click.option(
    "--pools",
    default=",".join(POOLS),
    show_default=True,
    help="Kinds of worker processes: one command after another has the next of them, beginning with the seed's.",
)
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Keep logs there, whatever the verdict.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(
    seed: int | None,
    seeds: str,
    seconds: float,
    workers: int,
    children: int,
    only: str,
    pools: str,
    keep: Path | None,
    as_json: bool,
) -> None:
    """Hurt a working fleet, and decide whether every promise held. Exit code 1 if one did not."""
    try:
        names = chosen([name.strip() for name in only.split(",") if name.strip()])
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--only") from error
    for number in (signal.SIGTERM, signal.SIGINT):  # a shell's background job ignores SIGINT
        signal.signal(number, lambda *_: sys.exit(130))  # everything it has started ends with it
    verdicts: list[Verdict] = []
    for chosen_seed in [seed] if seed is not None else _seeds(seeds):
        verdict = run_seed(
            chosen_seed, seconds, workers=workers, children=children, only=names, pools=pools.split(","), keep=keep
        )
        verdicts.append(verdict)
        if not as_json:
            tell(verdict)
    if as_json:
        click.echo(json.dumps([verdict.as_json() for verdict in verdicts], indent=2, default=str))
    elif len(verdicts) > 1:
        click.echo(total(verdicts))
    sys.exit(any(verdict.violations for verdict in verdicts))


def tell(verdict: Verdict) -> None:
    """Print one seed's figures, and of a bad one what was wrong."""
    click.echo(verdict.line())
    for name, why in verdict.skipped.items():
        click.echo(f"  skipped {name}: {why}")
    for rule, count in sorted(Counter(violation.rule for violation in verdict.violations).items()):
        click.echo(f"  {rule} {count} times")
    for violation in verdict.violations[:20]:
        click.echo(f"  {violation.rule}: {violation.text}")


def total(verdicts: list[Verdict]) -> str:
    """Return the sum of several seeds in one line."""
    return (
        f"{len(verdicts)} seeds, {sum(v.took for v in verdicts) / 60:.1f} min:"
        f" {sum(v.injected for v in verdicts)} faults, {sum(v.instances for v in verdicts)} instances,"
        f" {sum(v.steps for v in verdicts)} steps, {sum(v.signals for v in verdicts)} signals,"
        f" lost {sum(v.lost for v in verdicts)}, doubled {sum(v.doubled for v in verdicts)},"
        f" harmed {sum(v.harmed for v in verdicts)},"
        f" violations {sum(len(v.violations) for v in verdicts)}"
    )


if __name__ == "__main__":
    main()
