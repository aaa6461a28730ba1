"""The paper's tables and figures from one command: every evaluation that they need, each once, and
what came out beside what is printed."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from spd_fast import files, paper
from spd_fast.distributed import barrier, process_group, rank
from spd_fast.errors import InputError
from spd_fast.evaluate import PATIENCE, EvaluateConfig, check, evaluate
from spd_fast.models import pick_device
from spd_fast.report import write_report
from spd_fast.reproduce_figures import FIGURES, check_targets, write_figures
from spd_fast.reproduce_page import write_page
from spd_fast.reproduce_table import Job, as_csv, as_markdown, as_text, compare

DATASETS = {"visa": "VisA", "mvtec": "MVTec-AD"}
# In the output directory: RUNS/<weights>/<dataset>_<protocol>_<method>, each by `evaluate`;
# COMPARED/<dataset>_<protocol>_<method>.html, all weights in one report; FIGURE_FILES.
RUNS, COMPARED, FIGURE_FILES = "runs", "compared", "figures"


@dataclass(frozen=True)
class ReproduceConfig:
    """What `spd-fast reproduce` takes; see its help for the meaning of each."""

    targets: tuple[str, ...]  # names in `paper.TABLES` and in FIGURES
    weights: dict[str, str]  # by the names of the paper's rows, the keys of `paper.BACKBONES`
    out: str
    data: dict[str, str]  # directories, by the keys of DATASETS
    # Of all evaluations. Data, protocol, method, weights and output follow from the tables.
    settings: EvaluateConfig
    backbone: str | None = None  # in place of the paper's


def reproduce(config: ReproduceConfig) -> dict[Job, str]:
    """Do every evaluation that the tables and figures need and that weights and data are given for.

    Writes into `config.out`: per table a CSV and a Markdown file, figures as PNG and PDF, reports
    that compare the weights, and `reproduce.html`, which has all of it. An evaluation that is
    finished is not done again; one that fails is reported and leaves its cells empty.

    Returns:
        What failed, and why; a category counts as "<weights>, ...: <category>".

    Raises:
        InputError: an unknown table, figure or name of weights, no data or weights for any of the
            numbers, or a wrong setting.
    """
    check_targets(config.targets)
    tables = [paper.table(name) for name in config.targets if name not in FIGURES]
    jobs = _jobs(config)
    for job in jobs:
        check(_settings(config, job))
    out = files.make_output_dir(config.out)
    with process_group(pick_device(config.settings.device), PATIENCE):
        runs, failed = {}, {}
        for number, job in enumerate(jobs):
            tqdm.write(f"== {number + 1} of {len(jobs)}: {job.title}")
            try:
                runs[job] = evaluate(_settings(config, job))
            except InputError as error:
                failed[job.title] = str(error)
                tqdm.write(f"{job.title} failed: {error}")
                continue
            for name, reason in runs[job]["failed"].items():
                failed[f"{job.title}: {name}"] = reason
        if not rank():
            _write(config, tables, runs, failed, out)
        barrier()
    return failed


def _jobs(config: ReproduceConfig) -> list[Job]:
    """In the order of the targets."""
    for name in config.weights:
        if name not in paper.BACKBONES:
            raise InputError(
                f"the paper has no weights {name!r}; it has {', '.join(paper.BACKBONES)}"
            )
    needed = dict.fromkeys(job for target in config.targets for job in _needed(target))
    for root in config.data.values():
        if not Path(root).is_dir():
            raise InputError(f"there is no directory {root}")
    if not needed:
        raise InputError(f"{', '.join(config.targets)}: give a table as well, whose runs are drawn")
    jobs = [job for job in needed if job.weights in config.weights and job.dataset in config.data]
    if not jobs:
        datasets = dict.fromkeys(f"--{job.dataset}" for job in needed)
        weights = dict.fromkeys(job.weights for job in needed)
        raise InputError(
            f"nothing to do: for {', '.join(config.targets)} give {' or '.join(datasets)}, and "
            f"weights for one of {', '.join(weights)} at least"
        )
    return jobs


def _needed(target: str) -> Iterator[Job]:
    if target in FIGURES:
        for table in FIGURES[target].tables:
            yield from _needed(table)
        return
    for row in paper.table(target).rows:
        for cell in row.cells:
            yield Job.of(cell.quantity)


def _settings(config: ReproduceConfig, job: Job) -> EvaluateConfig:
    return replace(
        config.settings,
        data=config.data[job.dataset],
        out=str(Path(config.out) / RUNS / job.weights / job.name),
        protocol=job.protocol,
        method=job.method,
        backbone=config.backbone or paper.BACKBONES[job.weights],
        weights=config.weights[job.weights],
        name=job.weights,
    )


def _write(config: ReproduceConfig, tables: list, runs: dict, failed: dict, out: Path) -> None:
    compared = []
    for table in tables:
        rows = compare(table, runs)
        compared.append((table, rows))
        files.write_text(out / f"{table.name}.csv", as_csv(table, rows))
        files.write_text(out / f"{table.name}.md", as_markdown(table, rows))
        print(as_text(table, rows), end="\n\n")
    reports = _write_reports(runs, out)
    figures = write_figures(config, runs, files.make_output_dir(out / FIGURE_FILES), failed)
    write_page(out / "reproduce.html", config, compared, figures, reports, failed)
    for title, reason in failed.items():
        print(f"{title} failed: {reason}")
    print(f"page: {out / 'reproduce.html'}")


def _write_reports(runs: dict, out: Path) -> dict[str, str]:
    """Title and place of a report for each evaluation, with the runs of all weights."""
    directory = files.make_output_dir(out / COMPARED)
    reports = {}
    for job in runs:
        if job.name not in reports:
            together = [run for other, run in runs.items() if other.name == job.name]
            title = f"{DATASETS[job.dataset]}, {job.protocol}, {job.method}"
            write_report(together, directory / f"{job.name}.html", title)
            reports[job.name] = title
    return {title: f"{COMPARED}/{name}.html" for name, title in reports.items()}
