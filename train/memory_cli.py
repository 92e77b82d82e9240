"""`precog memory`. Everything heavy is imported inside the command."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command("memory")
def memory_command(
    config: Annotated[Path, typer.Argument(help="TOML file of the experiment.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="table.field=value ...", metavar="[TABLE.FIELD=VALUE]...")
    ] = None,
    card_gib: Annotated[
        float | None, typer.Option("--card-gib", min=0, help="Memory of the card, to mark what fits.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="End with one JSON line on standard output.")] = False,
) -> None:
    """Predict the memory of training in each plan that [memory] allows, without a card or weights."""
    from shared.console import run_command

    run_command(lambda: _memory(config, overrides or [], card_gib, json_output))


def _memory(path: Path, overrides: list[str], card_gib: float | None, json_output: bool) -> None:
    import json

    from shared.config import load_config
    from shared.console import quiet_libraries, say, table
    from train.memory import GIB, RESERVED_PER_ALLOCATED, describe
    from train.outlook import predict_plans

    quiet_libraries()
    outlook = predict_plans(load_config(path, overrides))
    rows: list[tuple[str, str]] = []
    lines: list[dict[str, object]] = []
    for plan, found in outlook.predictions:
        reserved = found.peak * RESERVED_PER_ALLOCATED / GIB
        fits = card_gib is None or reserved <= card_gib
        verdict = "" if card_gib is None else f", {'fits' if fits else 'does not fit'} in {card_gib:g} GiB"
        shown = f"{found.peak / GIB:.2f} GiB allocated, about {reserved:.2f} GiB reserved{verdict}"
        rows.append((describe(plan), shown))
        sizes = {name: getattr(found, name) / GIB for name in ("peak", "loaded", "kept")}
        lines.append({"plan": describe(plan), "reserved": reserved, "fits": fits} | sizes)
    table(f"Memory of training on {outlook.pack_name}, simulated", rows)
    if card_gib is not None:
        first = next((line["plan"] for line in lines if line["fits"]), None)
        say(f"memory = auto would take: {first}" if first else f"no plan fits in {card_gib:g} GiB; try int8 or rank")
    if json_output:
        print(json.dumps({"pack": outlook.pack_name, "simulated_gib": lines}))  # noqa: T201
