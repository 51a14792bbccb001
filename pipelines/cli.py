"""The command line. Every command imports what it needs when it runs, so `forja --help` answers at once."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from components.artifact import ForjaError
from pipelines.checkout import find_root, only_writer, run_code_of, set_environment

app = typer.Typer(
    help="From text to a promoted language model: each result versioned, gated and resumable.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
DEMO = Path("conf/demo.yaml")
Recipe = Annotated[Path, typer.Option("--recipe", "-r", help="A recipe in conf/.")]
Sets = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change one key; may be repeated.")]


@app.command()
def run(
    recipe: Recipe = DEMO,
    set_: Sets = [],  # noqa: B006  # typer reads it, nobody changes it
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Prefect's log too.")] = False,
) -> None:
    """Take a recipe through every stage to a promoted model. The same command resumes after an interruption."""
    from pipelines.run import run as run_recipe

    raise typer.Exit(run_recipe(find_root(), recipe, set_, verbose))


@app.command()
def plan(recipe: Recipe = DEMO, set_: Sets = []) -> None:  # noqa: B006
    """What `run` would do and why, with the time and memory it took last. Runs and writes nothing."""
    from pipelines import recipe as recipes
    from pipelines import status

    root = find_root()
    status.show_plan(status.plan(root, recipes.compose(root, recipe, set_)))


@app.command()
def use(recipe: Annotated[Path, typer.Argument(help="A recipe in conf/.")], set_: Sets = []) -> None:  # noqa: B006
    """Write params.yaml from a recipe, for `dvc repro`."""
    from pipelines import recipe as recipes

    root = find_root()
    with only_writer(root):
        recipes.use(root, recipe, set_)


@app.command()
def stage(name: str) -> None:
    """Run one stage on the artifacts that lie here, as dvc.yaml calls it."""
    from pipelines import ranks
    from pipelines.stages import run_stage

    run_stage(find_root(), name)
    ranks.leave()


@app.command()
def ingest(
    source: Annotated[list[str], typer.Argument(help="Files, folders, globs, hf:org/name, python-docs or problems.")],
    shape: Annotated[str | None, typer.Option(help="The records' shape, where it is not recognised.")] = None,
    table: Annotated[str | None, typer.Option(help="The table that the rows go to.")] = None,
    licence: Annotated[str | None, typer.Option(help="The licence of rows that do not say theirs.")] = None,
    lang: Annotated[
        str | None, typer.Option(help="Of rows that do not say theirs: en, es, or auto to look at each.")
    ] = None,
    split: Annotated[str, typer.Option(help="auto, hash, train, val or test.")] = "auto",
    package: Annotated[str | None, typer.Option(help="python-docs: an installed package to learn from.")] = None,
) -> None:
    """Take a new data snapshot by hand. Recipes leave it in place until you take another."""
    from pipelines.ingest import by_hand

    said = {"shape": shape, "table": table, "licence": licence, "lang": lang, "split": split}
    by_hand(find_root(), [{"source": s, **said} for s in source], package)


data = typer.Typer(help="Look at data, and at what changed in it.", no_args_is_help=True)
app.add_typer(data, name="data")


@data.command()
def diff(
    old: Annotated[str, typer.Argument(help="A git revision.")] = "HEAD",
    new: Annotated[str | None, typer.Argument(help="Another; without it, what lies here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Which rows came, went and changed between two snapshots, by table and source."""
    from pipelines.data_diff import show

    show(find_root(), old, new, as_json)


@data.command()
def audit(
    paths: Annotated[list[str], typer.Argument(help="Files, folders or globs of any shape.")],
    against: Annotated[list[str], typer.Option(help="A set that must not be trained on; may be repeated.")] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """What is in data: rows, shapes, languages, duplicates, contamination, personal data, poison. Writes nothing."""
    from pipelines.audit import show

    show(paths, against, as_json)


@app.command()
def promote() -> None:
    """Look at the gates again and, if every one holds, make the quantized model champion."""
    from pipelines import dvc
    from pipelines import promote as promotion
    from pipelines.console import console, gate_table, say

    root = find_root()
    with only_writer(root):
        gates = promotion.read_gates(root)[1]
        console.print(gate_table(gates))
        done = promotion.promote(root, dvc.read_yaml(root / "params.yaml"), {})
        say(f"{done.name} version {done.version} is {done.alias}{'' if done.new else ', as before'}.")


@app.command()
def status(as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False) -> None:
    """Stages fresh or stale and why, their metrics, and the ids in DVC, MLflow and Prefect."""
    from pipelines import status as standing

    standing.show_status(standing.status(find_root()), as_json)


@app.command()
def generate(
    prompt: str,
    model: Annotated[Path | None, typer.Option(help="A checkpoint folder; the champion by default.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from the k likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(min=1e-9, max=1, help="Draw from the likeliest that sum to p.")] = 1.0,
    min_p: Annotated[float, typer.Option(min=0, max=1, help="Draw from those p times as likely as the first.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(min=1e-9, help="Above 1: tokens seen count less.")] = 1.0,
    stop: Annotated[list[str], typer.Option(help="End before this text; may be repeated.")] = [],  # noqa: B006
    seed: int = 0,
    lang: Annotated[str, typer.Option(help="Which prompt template: en or es.")] = "en",
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without a template.")] = False,
) -> None:
    """Let a model speak; its words are shown as they come."""
    from pipelines.generate import speak

    if "" in stop:
        raise ForjaError("--stop: empty; give some text")
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    options |= {"repetition_penalty": repetition_penalty, "stop_strings": stop, "max_new_tokens": max_tokens}
    for piece in speak(find_root(), prompt, model, lang, raw, **options):
        print(piece, end="", flush=True)
    print()


@app.command()
def score(
    file: Annotated[str, typer.Argument(help="A file with text, or - for standard input.")],
    model: Annotated[Path | None, typer.Option(help="A checkpoint folder; the champion by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="Each token too.")] = False,
    context: Annotated[int | None, typer.Option(help="Tokens of a window; by default what the model sees.")] = None,
) -> None:
    """How likely a model finds a text: tokens, log-probability and bits a byte."""
    from pipelines import score as scoring

    scoring.show(scoring.score(find_root(), scoring.read_text(file), model, context), as_json, tokens)


@app.command("eval")
def eval_(
    model: Annotated[Path, typer.Option(help="A checkpoint folder.")],
    tasks: Annotated[str, typer.Option(help="Tasks, groups or tags of lm-evaluation-harness, with commas between.")],
    data: Annotated[
        Path | None, typer.Option(help="A folder with their data; without it they come from the hub.")
    ] = None,
    few_shot: Annotated[int | None, typer.Option(help="Examples before each question; by default the task's.")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows of each task; by default all.")] = None,
    lang: Annotated[str | None, typer.Option(help="Ask through the model's prompt template of this language.")] = None,
    seed: Annotated[int, typer.Option(help="Of the examples that a task draws.")] = 1234,
    fresh: Annotated[bool, typer.Option("--fresh", help="Score anew what was scored before.")] = False,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write it to this file too, for machines.")] = None,
) -> None:
    """lm-evaluation-harness' benchmarks (MMLU, HellaSwag, ARC ...) on a model, each number with its interval."""
    from pipelines.benchmarks import show

    asked = tuple(filter(None, (name.strip() for name in tasks.split(","))))
    said = {"tasks": asked, "few_shot": few_shot, "limit": limit, "lang": lang, "seed": seed}
    show(find_root(), model, data, said, fresh, as_json)


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="A Hugging Face folder, hf:org/name, or a llama2.c .bin.")],
    out: Annotated[Path, typer.Argument(help="The checkpoint folder to make.")],
    tokenizer: Annotated[Path | None, typer.Option(help="A llama2.c model's tokenizer.bin.")] = None,
) -> None:
    """Make a checkpoint of someone else's model. Nothing is unpickled, and none of its code is run."""
    from components.data.hub import fetch
    from components.model.interop import import_model
    from pipelines.console import say

    config = import_model(fetch(source), out, tokenizer)
    say(f"{out}: {config.layers} layers, {config.width} wide, {config.vocab_size:,} tokens, context {config.context:,}")


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    format_: Annotated[Literal["hf"], typer.Option("--format", help="hf: a Hugging Face folder.")] = "hf",
) -> None:
    """Write a checkpoint as others read it."""
    from components.model.interop import export_model
    from pipelines.console import say

    say(f"{out}: a {export_model(model, out)} of Hugging Face's, in float32")


@app.command()
def report(
    open_it: Annotated[bool, typer.Option("--open", help="Show it in a browser.")] = False,
    out: Annotated[Path, typer.Option(help="Where to write it.")] = Path("report.html"),
) -> None:
    """The last run as one self-contained HTML file."""
    from pipelines.console import say
    from pipelines.report import write

    path = write(find_root(), out.resolve())
    say(f"{path}")
    if open_it:
        typer.launch(path.as_uri())


@app.command()
def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Two or more: an alias, a version, a recipe, an MLflow run id or its start, a git revision."
        ),
    ] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write it to this file, for machines.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write it to this file, as one page.")] = None,
) -> None:
    """Runs side by side, each held against the first: recipes, measures with intervals, gates, curves, answers."""
    from pipelines.compare import show

    show(find_root(), runs or [], as_json, html)


@app.command()
def ui(
    prefect_port: Annotated[int, typer.Option(help="Port of Prefect's pages.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow's pages.")] = 5000,
) -> None:
    """Serve Prefect's and MLflow's pages for this checkout on 127.0.0.1, until Ctrl-C."""
    from pipelines.ui import serve

    serve(find_root(), prefect_port, mlflow_port)


def main(arguments: list[str] | None = None) -> Any:
    """The door: a user's mistake is one line on stderr and exit code 2, or the error's own; others keep a traceback."""
    set_environment()
    try:
        if not any(a in ("--help", "-h") for a in sys.argv[1:]) and len(sys.argv) > 1:
            run_code_of(find_root())
        return app(arguments, prog_name="forja")
    except ForjaError as e:
        from pipelines.console import fail

        fail(str(e))
        sys.exit(e.exit_code)


if __name__ == "__main__":
    main()
