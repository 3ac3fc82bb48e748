"""`vpw`, the command line: each command reads its options and calls one function of the package."""

from __future__ import annotations

import errno
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from vpworkbench import __version__
from vpworkbench.errors import CheckpointError, DataError, RunError, SettingsError

app = typer.Typer(
    help="Visual parsing workbench: pre-train, probe and look.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Parameters = Annotated[
    list[str] | None,
    typer.Option("--parameter", "-p", metavar="KEY VALUE", help="a parameter of the notebook; repeatable"),
]
Places = Annotated[
    list[str] | None, typer.Option(help="folder or zip of images; repeatable; default: beside the annotations")
]


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `vpw`. Exit code 2: wrong parameters, nothing was started; 1: a failure on the way."""
    try:
        app(_paired(sys.argv[1:] if arguments is None else arguments), prog_name="vpw")
    except (SettingsError, DataError, CheckpointError, FileNotFoundError, FileExistsError) as error:
        _end(error, code=2)
    except (RunError, OSError) as error:  # others are bugs of the package and keep their traceback
        _end(error, code=1)


@app.command()
def run(
    notebook: Annotated[str, typer.Argument(help="a name in notebooks/, such as 01_pretrain, or a path")],
    name: Annotated[str, typer.Option(help="the run's name; empty: a hash of its settings")] = "",
    parameter: Parameters = None,
    again: Annotated[bool, typer.Option("--again", help="execute a complete run once more; trains nothing")] = False,
    until: Annotated[str, typer.Option(metavar="CELL-TAG", help="stop after the first cell with this tag")] = "",
) -> None:
    """Execute a notebook in its run folder; the same call again resumes it, or reports that it is complete.

    Ctrl-C and SIGTERM are passed on: training writes a checkpoint before it stops.
    """
    from vpworkbench.jobs.notebooks import run_notebook

    with _reporting():
        run_notebook(notebook, name=name, parameters=_parameters(notebook, parameter), again=again, until=until)


@app.command()
def train(
    notebook: Annotated[str, typer.Argument(help="01_pretrain or 04_finetune")],
    name: Annotated[str, typer.Option(help="the run's name; without -p, its settings are used")] = "",
    parameter: Parameters = None,
) -> None:
    """Train a run without its notebook, for torchrun and accelerate launch; `vpw run` continues after training."""
    from vpworkbench.jobs.notebooks import train_run

    with _reporting():
        print(train_run(notebook, name=name, parameters=_parameters(notebook, parameter)))


@app.command()
def sweep(
    grid: Annotated[Path, typer.Argument(help="yaml: notebook, name, parameters, and a grid or jobs")],
    workers: Annotated[int, typer.Option(help="jobs at once here; 0: one for each GPU, or one", min=0)] = 0,
    scheduler: Annotated[str, typer.Option(help="address of a Dask scheduler, such as tcp://host:8786")] = "",
) -> None:
    """Run a grid or a list of notebook jobs; complete ones are skipped, failed ones reported at the end."""
    from vpworkbench.jobs import sweep

    with _reporting():
        table = sweep.sweep(sweep.read_jobs(grid), workers=workers, scheduler=scheduler)
    print(table[["notebook", "name", "state"]].to_string(index=False))
    failed = table[table["state"] == "failed"]
    for row in failed.itertuples():
        print(f"\n{row.error}", file=sys.stderr)
    if len(failed):
        raise typer.Exit(1)


@app.command("runs")
def list_runs(
    notebook: Annotated[str, typer.Argument(help="only runs of this notebook; empty: all")] = "",
    where: Annotated[str, typer.Option(help="a condition, such as 'itm_accuracy > 0.9 and mask_budget < 8'")] = "",
) -> None:
    """List all runs with the values of their summaries."""
    from vpworkbench.jobs.results import find_runs
    from vpworkbench.runs import runs_root

    table = find_runs(notebook, where).drop(columns="folder")
    rows = table.to_string(index=False, na_rep="", max_colwidth=40)
    print(f"no such runs in {runs_root()}" if table.empty else rows)


@app.command()
def scenes(
    folder: Annotated[Path, typer.Argument(help="a new folder; one with exactly these scenes is left as it is")],
    pairs: Annotated[bool, typer.Option("--pairs", help="minimal pairs instead: see docs/formats.md")] = False,
    images: Annotated[int | None, typer.Option(help="training images; with --pairs, pairs")] = None,
    val: Annotated[int | None, typer.Option(help="validation images")] = None,
    test: Annotated[int | None, typer.Option(help="test images")] = None,
    image_px: Annotated[int | None, typer.Option(help="side of the square images")] = None,
    difficulty: Annotated[str | None, typer.Option(help="easy, medium or hard")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
) -> None:
    """Generate scenes with exact ground truth, in the published formats."""
    from vpworkbench.scenes.pairs import write_pairs
    from vpworkbench.scenes.write import write_scenes
    from vpworkbench.settings import PairSettings, SceneSettings, checked

    given = {"pairs" if pairs else "images": images, "val": val, "test": test}
    given |= {"image_px": image_px, "difficulty": difficulty, "seed": seed}
    kind, write = (PairSettings, write_pairs) if pairs else (SceneSettings, write_scenes)
    settings = checked(kind, {key: value for key, value in given.items() if value is not None})
    print(write(folder, settings))


@app.command()
def regions(
    source: Annotated[str, typer.Argument(help="'scenes', a folder of generated scenes, of NLVR v1 or of photographs")],
    folder: Annotated[Path, typer.Argument(help="for visual.region_files; the same call again resumes")],
    preset: Annotated[str, typer.Option(help="train on the scenes of this preset of 01_pretrain")] = "tiny",
    epochs: Annotated[float, typer.Option(help="passes over the scenes: 8, as for other families; 1 for a look")] = 8,
    images: Annotated[int, typer.Option(help="scenes; 0: those of the preset (tiny: 12,000)")] = 0,
    width: Annotated[int, typer.Option(help="channels of a feature")] = 128,
    seed: Annotated[int, typer.Option(help="seed of weights, order and mirroring")] = 0,
    detector: Annotated[str, typer.Option(help="photographs: a Faster R-CNN of torchvision")] = "",
    weights: Annotated[str, typer.Option(help="photographs: a file for the detector; default: torchvision's own")] = "",
) -> None:
    """One npz of regions for each image: of true boxes, by a small CNN trained on scene labels; or of a detector's."""
    of_the_cnn = (preset, epochs, images, width, seed) != ("tiny", 8, 0, 128, 0)
    if weights and not detector or detector and of_the_cnn:
        raise typer.BadParameter("--weights goes with --detector; the other options are for the CNN that scenes train")
    if detector:
        from vpworkbench.data.detected import detect_regions

        with _reporting():
            found = detect_regions(source, folder.expanduser(), detector=detector, weights=weights)
        print(f"{found['images']} images, {found['regions']:.1f} regions each: {folder}")
        return
    from vpworkbench.settings import RegionSettings, checked
    from vpworkbench.settings import preset as named
    from vpworkbench.train.region_features import make_regions

    scenes = named(preset).data.scenes.model_dump() | ({"images": images} if images else {})
    given = {"source": source if source == "scenes" else str(Path(source).expanduser().absolute())}
    given |= {"scenes": scenes, "width": width, "seed": seed, "train": {"epochs": epochs, "images": 64}}
    with _reporting():
        made = make_regions(folder.expanduser(), checked(RegionSettings, given))
    print(", ".join(f"{name} {value:.3g}" for name, value in made.items() if name != "images"))
    print(f"{made['images']} images: {folder}")


@app.command()
def doctor(
    path: Annotated[str, typer.Argument(help="an annotation file, a folder with any number of them, or easy-vqa")],
    place: Places = None,
    images: Annotated[bool, typer.Option(help="decode every image, or only check that it exists")] = True,
    task: Annotated[str, typer.Option(help="vqa, nlvr1, nlvr2 or snli-ve; default: recognised by its labels")] = "",
    text_tokens: Annotated[int, typer.Option(help="longest text in tokens, [CLS] and [SEP] included", min=3)] = 40,
    tokenizer: Annotated[str, typer.Option(help="minilm, or the folder of a BERT; default: built from the texts")] = "",
    answer_count: Annotated[int, typer.Option(help="VQA: keep answers given for at least N train+val questions")] = 9,
    regions: Annotated[str, typer.Option(help="region files of the images, npz or BUTD tsv; all are read")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="everything, as JSON")] = False,
) -> None:
    """Examine a set before a run: broken records, missing images, overlaps. Exit code 1 if it has errors."""
    from vpworkbench.data.doctor import diagnose
    from vpworkbench.data.task_readers import TASK_FILES
    from vpworkbench.settings import nearest

    if task and task not in TASK_FILES:
        raise SettingsError(f"--task {task}: no such task{nearest(task, TASK_FILES)} (known: {', '.join(TASK_FILES)})")
    options = {"text_tokens": text_tokens, "tokenizer": tokenizer, "answer_count": answer_count, "regions": regions}
    found = diagnose(path, images=images, places=place or (), task=task, **options)
    print(json.dumps(found.to_json(), indent=2) if as_json else found)
    if not found.is_sound:
        raise typer.Exit(1)


@app.command()
def predict(
    checkpoint: Annotated[str, typer.Argument(help="a fine-tuned run or checkpoint")],
    image: Annotated[list[Path] | None, typer.Option(help="an image; twice for NLVR2")] = None,
    text: Annotated[str, typer.Option(help="question, statement or hypothesis")] = "",
    table: Annotated[Path | None, typer.Option(help="csv or json lines with image (image2) and text")] = None,
    place: Places = None,
    regions: Annotated[str, typer.Option(help="for models that read regions: the region files of these images")] = "",
) -> None:
    """Answers of a fine-tuned model with their probabilities; for a table, csv on standard output."""
    from vpworkbench.data.inputs import use_regions
    from vpworkbench.subjects import load_task
    from vpworkbench.tasks.predict import predict_table

    if (image or text) if table else (place or not image or not text):
        raise SettingsError("give --image and --text, or --table and, if its images are elsewhere, --place")
    model = load_task(checkpoint)
    if regions:
        use_regions(model.base, regions)
    if table is not None:
        print(predict_table(model, table, images=place or ()).to_csv(index=False), end="")
        return
    for label, share in list(model.predict(list(image or []), text).items())[:5]:
        print(f"{share:6.1%}  {label}")


@app.command()
def explore(
    checkpoint: Annotated[str, typer.Argument(help="a run or checkpoint, also fine-tuned; default: the shipped")] = "",
    data: Annotated[str, typer.Option(help="a captioned set, whose held-out pictures are shown; default: scenes")] = "",
    beside: Annotated[str, typer.Option(help="a second run or checkpoint, shown below on the same input")] = "",
    regions: Annotated[str, typer.Option(help="for models that read regions: npz or BUTD tsv; default: its own")] = "",
    port: Annotated[int, typer.Option(help="port of 127.0.0.1")] = 8866,
    browser: Annotated[bool, typer.Option(help="open the page")] = True,
) -> None:
    """Serve the explorer as a page without code, by Voila, with Jupyter's token."""
    from vpworkbench.explorer.serve import serve

    serve(checkpoint, data, beside=beside, regions=regions, port=port, browser=browser)


def _parameters(notebook: str, pairs: list[str] | None) -> dict[str, object]:
    from vpworkbench.jobs.parameters import find_notebook, notebook_parameters, parse_parameters

    texts = {}
    for pair in pairs or ():
        key, equals, text = pair.partition("=")
        if not equals:
            raise SettingsError(f"-p {key}: a parameter needs a value (-p KEY VALUE)")
        texts[key] = text
    return parse_parameters(texts, notebook_parameters(find_notebook(notebook)))


@contextmanager
def _reporting() -> Iterator[None]:
    """Print log messages on standard output; turn an interrupt into the exit code that a shell gives it."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("vpworkbench").setLevel(logging.INFO)
    try:
        yield
    except KeyboardInterrupt as stop:
        number, *message = stop.args or (2,)
        print(*message, end="\n" if message else "", file=sys.stderr)
        raise typer.Exit(128 + number) from None


@app.callback(invoke_without_command=True)
def _common(version: Annotated[bool, typer.Option("--version", help="show the version and stop")] = False) -> None:
    if version:
        print(f"vpworkbench {__version__}")
        raise typer.Exit


def _paired(arguments: list[str]) -> list[str]:
    """`-p KEY VALUE` as `-p KEY=VALUE`: typer has no repeated option with two values."""
    paired, rest = [], list(arguments)
    while rest:
        paired.append(rest.pop(0))
        if paired[-1] in ("-p", "--parameter") and rest:
            key = rest.pop(0)
            paired.append(f"{key}={rest.pop(0)}" if "=" not in key and rest else key)
    return paired


def _end(error: Exception, *, code: int) -> NoReturn:
    """Print a short message and end the process."""
    lines = f"error: {error}".splitlines()
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        lines.append("free some space; the same call then resumes")
    if len(lines) > 12:
        lines[11:] = [f"... and {len(lines) - 11} more lines"]
    print("\n".join(line[:300] for line in lines), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
