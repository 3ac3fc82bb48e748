"""`vpw`: a thin front for `runs` and the generated scenes; heavy imports wait until a command needs them."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Visual parsing workbench: pre-train, probe and look.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

bench = typer.Typer(help="Measure what things cost here.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench, name="bench")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `vpw`. Exit code 2: wrong parameters, nothing was started; 1: it failed on the way."""
    try:
        app(_paired(sys.argv[1:] if arguments is None else arguments), prog_name="vpw")
    except Exception as error:  # a known one gets a short message, another goes on
        code = _exit_code(error)
        if code is None:
            raise
        print(_short(error), file=sys.stderr)
        sys.exit(code)


@app.command()
def run(
    notebook: Annotated[str, typer.Argument(help="a name in notebooks/, such as 01_pretrain, or a path")],
    name: Annotated[str, typer.Option(help="the run's name; empty: a hash of its settings")] = "",
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", metavar="KEY VALUE", help="a notebook parameter; repeatable"),
    ] = None,
) -> None:
    """Execute a notebook in its run folder; the same call again resumes, or says that it is complete.

    Ctrl-C and SIGTERM are passed on: training writes a checkpoint before it stops.
    """
    from vpworkbench.jobs import notebooks as execution

    with _told():
        execution.run_notebook(notebook, name=name, parameters=_parameters(notebook, parameter or []))


@app.command()
def train(
    notebook: Annotated[str, typer.Argument(help="01_pretrain or 04_finetune")],
    name: Annotated[str, typer.Option(help="the run's name; without -p its settings are taken")] = "",
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", metavar="KEY VALUE", help="a notebook parameter; repeatable"),
    ] = None,
) -> None:
    """Train a run without its notebook, for torchrun and accelerate launch; `vpw run` goes on behind it."""
    from vpworkbench.jobs import notebooks as execution

    with _told():
        print(execution.train_run(notebook, name=name, parameters=_parameters(notebook, parameter or [])))


@app.command()
def sweep(
    grid: Annotated[Path, typer.Argument(help="yaml: notebook, name, parameters, and a grid or jobs")],
    workers: Annotated[int, typer.Option(help="jobs at once here; 0: one for each GPU, or one", min=0)] = 0,
    scheduler: Annotated[str, typer.Option(help="address of a Dask scheduler, such as tcp://host:8786")] = "",
) -> None:
    """Run a grid or a list of notebook jobs; complete ones are skipped, failed ones reported at the end."""
    from vpworkbench.jobs import sweep

    with _told():
        table = sweep.sweep(sweep.read_jobs(grid), workers=workers, scheduler=scheduler)
    print(table[["notebook", "name", "state"]].to_string(index=False))
    failed = table[table["state"] == "failed"]
    for row in failed.itertuples():
        print(f"\n{row.error}", file=sys.stderr)
    if len(failed):
        raise typer.Exit(1)


@app.command("runs")
def list_all() -> None:
    """List all runs, with what their summaries say."""
    from vpworkbench import runs

    table = runs.list_runs()
    if table.empty:
        print(f"no runs in {runs.runs_root()}")
    else:
        print(table.to_string(index=False, na_rep="", max_colwidth=40))


@app.command()
def scenes(
    folder: Annotated[Path, typer.Argument(help="made; if it holds these very scenes, nothing is done")],
    images: Annotated[int | None, typer.Option(help="training images")] = None,
    val: Annotated[int | None, typer.Option(help="validation images")] = None,
    test: Annotated[int | None, typer.Option(help="test images")] = None,
    image_px: Annotated[int | None, typer.Option(help="side of the square images")] = None,
    difficulty: Annotated[str | None, typer.Option(help="easy, medium or hard")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
) -> None:
    """Generate scenes with exact ground truth, in the published formats."""
    from vpworkbench.scenes.write import write_scenes
    from vpworkbench.settings import checked
    from vpworkbench.settings.scenes import SceneSettings

    given = {
        "images": images, "val": val, "test": test,
        "image_px": image_px, "difficulty": difficulty, "seed": seed,
    }  # fmt: skip
    settings = checked(SceneSettings, {key: value for key, value in given.items() if value is not None})
    print(write_scenes(folder, settings))


@app.command()
def regions(
    source: Annotated[str, typer.Argument(help="'scenes', the folder of generated scenes, or of NLVR v1")],
    folder: Annotated[Path, typer.Argument(help="made; what visual.region_files names. The same call goes on")],
    preset: Annotated[str, typer.Option(help="whose scenes: those that 01_pretrain generates")] = "tiny",
    epochs: Annotated[float, typer.Option(help="passes over the scenes: as a parser was given; 1 for a look")] = 8,
    images: Annotated[int, typer.Option(help="scenes; 0: the preset's, of tiny 12,000")] = 0,
    width: Annotated[int, typer.Option(help="channels of a feature")] = 128,
    seed: Annotated[int, typer.Option(help="of weights, order and mirroring")] = 0,
) -> None:
    """Region features of true boxes, by a small CNN trained on scene labels: one npz for each image."""
    from vpworkbench.settings import RegionSettings, checked
    from vpworkbench.settings import preset as named
    from vpworkbench.train.region_features import make_regions

    scenes = named(preset).data.scenes.model_dump() | ({"images": images} if images else {})
    given = {"source": source if source == "scenes" else str(Path(source).expanduser().absolute())}
    given |= {"scenes": scenes, "width": width, "seed": seed, "train": {"epochs": epochs, "images": 64}}
    with _told():
        made = make_regions(folder.expanduser(), checked(RegionSettings, given))
    print(", ".join(f"{name} {value:.3g}" for name, value in made.items() if name != "images"))
    print(f"{made['images']} images: {folder}")


@app.command()
def doctor(
    path: Annotated[str, typer.Argument(help="an annotation file, a folder with any number of them, or easy-vqa")],
    place: Annotated[
        list[str] | None, typer.Option(help="folder or zip of images; repeatable; default: beside the annotations")
    ] = None,
    images: Annotated[bool, typer.Option(help="decode every image, or only see that it is there")] = True,
    task: Annotated[str, typer.Option(help="of a csv or jsonl: vqa, nlvr1, nlvr2, snli-ve; told by its labels")] = "",
    text_tokens: Annotated[int, typer.Option(help="longest text in tokens, [CLS] and [SEP] included", min=3)] = 40,
    tokenizer: Annotated[
        str, typer.Option(help="minilm, a BERT's or a checkpoint's folder; default: built from the training texts")
    ] = "",
    answer_count: Annotated[int, typer.Option(help="VQA: questions that an answer stands for to be known")] = 9,
    regions: Annotated[str, typer.Option(help="region files of the images, all of them read: npz or BUTD tsv")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="everything, as JSON")] = False,
) -> None:
    """Examine a set before a run: broken records, missing images, overlaps. Exit code 1 where it has errors."""
    import json

    from vpworkbench.data.doctor import diagnose
    from vpworkbench.data.task_readers import TASK_FILES
    from vpworkbench.errors import SettingsError
    from vpworkbench.settings import nearest

    if task and task not in TASK_FILES:
        raise SettingsError(f"--task {task}: no such task{nearest(task, TASK_FILES)} (known: {', '.join(TASK_FILES)})")
    found = diagnose(
        path, images=images, places=place or (), task=task,
        text_tokens=text_tokens, tokenizer=tokenizer, answer_count=answer_count, regions=regions,
    )  # fmt: skip
    print(json.dumps(found.to_json(), indent=2) if as_json else found)
    if not found.is_sound:
        raise typer.Exit(1)


@app.command()
def predict(
    checkpoint: Annotated[str, typer.Argument(help="a fine-tuned run or checkpoint")],
    image: Annotated[list[Path] | None, typer.Option(help="an image; twice for NLVR2")] = None,
    text: Annotated[str, typer.Option(help="question, statement or hypothesis")] = "",
    table: Annotated[
        Path | None, typer.Option(help="csv or json lines with image (image2) and text: one prediction a row")
    ] = None,
    place: Annotated[
        list[str] | None, typer.Option(help="folder or zip of the table's images; repeatable; default: beside it")
    ] = None,
    regions: Annotated[str, typer.Option(help="of a model that reads regions: those of these images")] = "",
) -> None:
    """What a fine-tuned model answers, with its probability; for a table, csv on standard output."""
    from vpworkbench.errors import SettingsError
    from vpworkbench.subjects import load_task
    from vpworkbench.train.finetune import predict_table

    if (image or text) if table else (place or not image or not text):
        raise SettingsError("give --image and --text, or --table and, where its images are elsewhere, --place")
    model = load_task(checkpoint)
    if regions:
        from vpworkbench.data.inputs import use_regions

        use_regions(model.base, regions)
    if table is not None:
        print(predict_table(model, table, images=place or ()).to_csv(index=False), end="")
        return
    for label, share in list(model.predict(list(image or []), text).items())[:5]:
        print(f"{share:6.1%}  {label}")


@app.command()
def explore(
    checkpoint: Annotated[str, typer.Argument(help="a run or checkpoint, also fine-tuned; none: the shipped one")] = "",
    data: Annotated[str, typer.Option(help="a captioned set, its held-out pictures are shown; none: scenes")] = "",
    beside: Annotated[str, typer.Option(help="a second run or checkpoint on the same input, drawn under it")] = "",
    regions: Annotated[
        str, typer.Option(help="of models that read regions: folder of npz or BUTD tsv; none: the run's")
    ] = "",
    port: Annotated[int, typer.Option(help="of 127.0.0.1")] = 8866,
    browser: Annotated[bool, typer.Option(help="open the page")] = True,
) -> None:
    """Serve the explorer as a page without code, by Voila, with Jupyter's token."""
    from vpworkbench.explorer.serve import serve

    serve(checkpoint, data, beside=beside, regions=regions, port=port, browser=browser)


@bench.command("probes")
def bench_probes(
    tokens: Annotated[str, typer.Option(help="lengths of the sequences, with commas")] = "300,600,1200,2400",
    repeats: Annotated[int, typer.Option(help="turns that every route takes", min=1)] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    memory_gib: Annotated[float, typer.Option(help="what a route may take before it counts as dead")] = 4.0,
    longest: Annotated[int, typer.Option(help="length at which the search for its death ends")] = 9_600,
) -> None:
    """Flow and NMI against the plain forward, attention maps and scikit-learn: JSON and a figure."""
    from vpworkbench.bench import probe_bench, write_report
    from vpworkbench.errors import SettingsError
    from vpworkbench.runs import run_folder
    from vpworkbench.train.engine import pick_device

    try:
        lengths = [int(length) for length in tokens.split(",")]
    except ValueError:
        raise SettingsError(f"--tokens {tokens}: whole numbers with commas, such as 300,600") from None
    if min(lengths) < 40:
        raise SettingsError(f"--tokens {tokens}: at least 40 each")
    result = probe_bench(
        lengths=lengths, repeats=repeats, device=pick_device(device).type, memory_gib=memory_gib, longest=longest,
        progress=_line,
    )  # fmt: skip
    page = write_report(result, run_folder("bench", "probes"))
    for part in result["timed"]:
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in part["ratio"].items())
        print(f"{part['tokens']:6} tokens{' padded' if part['padded'] else '':8} time over plain: {ratios}")
    for part in result["peak_mib"]:
        print(f"{part['tokens']:6} tokens, {part['route']:6} peak {part['mib']:8.0f} MiB beside the model")
    print("dies at", result.get("dies_at", "not looked for"), "| NMI, times scikit-learn's speed:", end=" ")
    print(f"{result['nmi']['speedup']:.1f}", page, sep="\n")


@bench.command("train")
def bench_train(
    presets: Annotated[str, typer.Option(help="presets, with commas")] = "tiny",
    images: Annotated[int, typer.Option(help="images in a step", min=2)] = 4,
    repeats: Annotated[int, typer.Option(help="steps that a figure is the median of", min=1)] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    workers: Annotated[int, typer.Option(help="processes that prepare batches", min=0)] = 1,
    vilt: Annotated[bool, typer.Option(help="Hugging Face's ViLT-B/32 beside them")] = False,
) -> None:
    """Pairs a second, where a step's time goes, model FLOPs utilisation, memory: JSON and a figure."""
    from vpworkbench.bench_train import train_bench, write_report
    from vpworkbench.runs import run_folder
    from vpworkbench.train.engine import pick_device

    result = train_bench(
        presets.split(","), images=images, repeats=repeats, device=pick_device(device).type, workers=workers,
        vilt=vilt, progress=_line,
    )  # fmt: skip
    page = write_report(result, run_folder("bench", "train"))
    for name, part in result["presets"].items():
        phases = ", ".join(f"{phase} {share:.1%}" for phase, share in part["phases"].items())
        used = ", ".join(f"{piece} {share:.1%}" for piece, share in part["mfu"].items())
        ratios = ", ".join(f"{ratio} {value:.3g}" for ratio, value in part["ratios"].items())
        print(f"{name}: {part['pairs_per_s']:.3g} pairs/s, {part['images_per_s']:.3g} images/s; {phases}")
        print(f"  MFU: {used}; peak {part['peak_mib']:.0f} MiB; ratios: {ratios}")
    print(page)


def _parameters(notebook: str, pairs: list[str]) -> dict[str, object]:
    from vpworkbench.jobs import notebooks as execution

    defaults = execution.notebook_parameters(execution.find_notebook(notebook))
    return execution.parse_parameters(_split(pairs), defaults)


@contextmanager
def _told() -> Iterator[None]:
    """Messages go to standard output; a stop by a signal becomes the exit code that a shell gives it."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("vpworkbench").setLevel(logging.INFO)
    try:
        yield
    except KeyboardInterrupt as stop:
        number, *message = stop.args or (2,)
        print(*message, end="\n" if message else "", file=sys.stderr)
        raise typer.Exit(128 + number) from None


@bench.command("retrieval")
def bench_retrieval(
    preset: Annotated[str, typer.Option(help="whose sizes are measured")] = "ablation-224",
    images: Annotated[int, typer.Option(help="images of the matrix that a turn computes", min=1)] = 4,
    captions: Annotated[int, typer.Option(help="captions of that matrix", min=1)] = 100,
    repeats: Annotated[int, typer.Option(help="turns that every route takes", min=1)] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    partial_images: Annotated[
        int, typer.Option(help="cuda: images scored with 5,000 captions at paper-384's sizes", min=1)
    ] = 32,
) -> None:
    """Scoring all pairs against the plain loop over pairs: JSON and a figure. On a GPU also Flickr30k's test time."""
    from vpworkbench.bench_retrieval import retrieval_bench, write_report
    from vpworkbench.runs import run_folder
    from vpworkbench.train.engine import pick_device

    kind = pick_device(device).type
    result = retrieval_bench(
        name=preset, images=images, captions=captions, repeats=repeats, device=kind,
        partial=("paper-384", partial_images, 5_000) if kind == "cuda" else None, progress=_line,
    )  # fmt: skip
    page = write_report(result, run_folder("bench", "retrieval"))
    for route, rate in result["pairs_per_s"].items():
        print(f"{route:12} {rate:10.3g} pairs/s, {result['ratio'][route]:.2f} times naive")
    print(f"largest difference of scores {result['largest_difference']:.1e}")
    if part := result.get("partial"):
        print(f"{part['preset']}: {part['pairs_per_s']:.0f} pairs/s, {part['images']} images x {part['captions']} "
              f"captions in {part['seconds']:.0f} s; 1,000 x 5,000 at that rate: {part['extrapolated_minutes']:.1f} "
              "minutes")  # fmt: skip
    print(page)


@bench.command("explorer")
def bench_explorer(
    events: Annotated[int, typer.Option(help="of each kind; the first two do not count", min=3)] = 20,
    tokens: Annotated[str, typer.Option(help="lengths at which pages are compared, with commas")] = "64,128,184,256",
    scripts: Annotated[
        str, typer.Option(help="folder of the scripts that bertviz and CircuitsVis load; none: from the network")
    ] = "",
) -> None:
    """The explorer in JupyterLab, from event to drawing, and its page against bertviz and CircuitsVis."""
    from vpworkbench.bench_explorer import TARGETS_MS, explorer_bench, write_report
    from vpworkbench.runs import run_folder

    lengths = [int(length) for length in tokens.split(",") if length]
    result = explorer_bench(events=events, tokens=lengths, scripts=scripts, progress=_line)
    page = write_report(result, run_folder("bench", "explorer"))
    for name, part in result["events"].items():
        wanted = ", ".join(f"{target:,}" for target in TARGETS_MS.get(name, ()) if target)
        print(
            f"{name:30} median {part['median']:8.1f} ms, p95 {part['p95']:8.1f} ms"
            + f" (target {wanted})" * bool(wanted)
        )
    print(f"run-all to the first view drawn: {result['first_view_s']} s, all views: {result['all_views_s']} s")
    for name, pages in result["pages"].items():
        for length, part in pages.items():
            print(f"{name:12} N {length}: built in {part['build_s']:.2f} s, {part['bytes'] / 1e6:.1f} MB, "
                  f"first drawing {part['first_drawing_s']} s")  # fmt: skip
    print(page)


def _line(what: str, done: int, total: int) -> None:
    print(f"{what}: {done}/{total}", file=sys.stderr)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"vpworkbench {version('vpworkbench')}")
        except PackageNotFoundError:
            print("vpworkbench, not installed (make install)")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version and stop")
    ] = False,
) -> None: ...


def _paired(arguments: list[str]) -> list[str]:
    """`-p KEY VALUE` as `-p KEY=VALUE`: typer knows no repeated option with two values."""
    paired, rest = [], list(arguments)
    while rest:
        paired.append(rest.pop(0))
        if paired[-1] in ("-p", "--parameter") and rest:
            key = rest.pop(0)
            paired.append(f"{key}={rest.pop(0)}" if "=" not in key and rest else key)
    return paired


def _split(pairs: list[str]) -> dict[str, str]:
    from vpworkbench.errors import SettingsError

    if lonely := [pair for pair in pairs if "=" not in pair]:
        raise SettingsError(f"-p {lonely[0]}: a parameter needs a value (-p KEY VALUE)")
    return dict(pair.split("=", maxsplit=1) for pair in pairs)


def _exit_code(error: Exception) -> int | None:
    """2: wrong parameters; 1: failed on the way; None: a bug of ours, whose traceback is wanted."""
    from vpworkbench.errors import CheckpointError, DataError, RunError, SettingsError

    if isinstance(error, (SettingsError, DataError, CheckpointError, FileNotFoundError, FileExistsError)):
        return 2
    return 1 if isinstance(error, (RunError, OSError)) else None


def _short(error: Exception, most: int = 12) -> str:
    lines = f"error: {error}".splitlines()
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        lines.append("free some space; the same call then resumes")
    if len(lines) > most:
        lines[most - 1 :] = [f"... and {len(lines) - most + 1} more lines"]
    return "\n".join(line[:300] for line in lines)


if __name__ == "__main__":
    main()
