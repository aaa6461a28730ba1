"""The paper's tables and figures from one command: every evaluation that they need, each once, and
what came out beside what is printed."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from spd_fast import files, paper
from spd_fast.datasets import read_dataset
from spd_fast.distributed import barrier, process_group, rank
from spd_fast.errors import InputError
from spd_fast.evaluate import CATEGORY, PATIENCE, EvaluateConfig, check, evaluate, split_of
from spd_fast.evaluate_category import SHOTS
from spd_fast.models import load_backbone, pick_device
from spd_fast.report import write_report
from spd_fast.reproduce_figures import FIGURES, check_targets, write_figures
from spd_fast.reproduce_page import FIGURE_FILES, write_page
from spd_fast.reproduce_table import Job, as_csv, as_markdown, as_text, compare
from spd_fast.reproduce_warnings import CATEGORIES, unlike_the_paper

# In the output directory: RUNS/<weights>/<dataset>_<protocol>_<method>, each by `evaluate`;
# COMPARED/<dataset>_<protocol>_<method>.html, all weights in one report; FIGURE_FILES.
RUNS, COMPARED = "runs", "compared"


@dataclass(frozen=True)
class ReproduceConfig:
    """What `spd-fast reproduce` takes; see its help for the meaning of each."""

    targets: tuple[str, ...]  # names in `paper.TABLES` and in FIGURES
    weights: dict[str, str]  # by the names of the paper's rows, the keys of `paper.BACKBONES`
    out: str
    data: dict[str, str]  # directories, by the names in `paper.DATASETS`
    # Of all evaluations. Data, protocol, method, weights and output follow from the tables.
    settings: EvaluateConfig
    backbone: str | None = None  # in place of the paper's


def reproduce(config: ReproduceConfig) -> dict[str, str]:
    """Do every evaluation that the tables and figures need and that weights and data are given for.

    Writes into `config.out`: per table a CSV and a Markdown file, figures as PNG and PDF, reports
    that compare the weights, and `reproduce.html`, which has all of it. An evaluation that is
    finished is not done again; one that fails is reported and leaves its cells empty.

    Returns:
        Why something failed, by its name: of a category "<weights>, ...: <category>".

    Raises:
        InputError: an unknown table, figure or name of weights, no data or weights for any of the
            numbers, or a wrong setting.
    """
    check_targets(config.targets)
    tables = [paper.table(name) for name in config.targets if name not in FIGURES]
    jobs = _jobs(config)
    settings = _settings_of(config, jobs)
    out = files.make_output_dir(config.out)
    with process_group(pick_device(config.settings.device), PATIENCE):
        runs, failed = {}, {}
        for number, (job, its) in enumerate(settings.items()):
            tqdm.write(f"== {number + 1} of {len(settings)}: {job.title}")
            try:
                runs[job] = evaluate(its)
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
    if not needed and "curves" in config.targets:
        raise InputError("curves: give a table as well, whose runs are drawn")
    jobs = [job for job in needed if job.weights in config.weights and job.dataset in config.data]
    if needed and not jobs:
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


def _settings_of(config: ReproduceConfig, jobs: list[Job]) -> dict[Job, EvaluateConfig]:
    """Of each job that has one of the categories; what would stop a job is said before the first
    begins."""
    for name, source in config.weights.items():
        if CATEGORY not in source:
            load_backbone(config.backbone or paper.BACKBONES[name], source)
    names: dict[str, set] = {}
    for dataset, protocol in dict.fromkeys((job.dataset, split_of(job.protocol)) for job in jobs):
        found = {category.name for category in read_dataset(config.data[dataset], protocol)}
        for other, its in CATEGORIES.items():
            if other != dataset and found <= its:
                raise InputError(
                    f"--{dataset} {config.data[dataset]} holds categories of "
                    f"{paper.PRINTED[other]}: {', '.join(sorted(found))}"
                )
        names.setdefault(dataset, set()).update(found)
    wanted = config.settings.category
    for name in wanted:
        if jobs and not any(name in found for found in names.values()):
            known = ", ".join(sorted(set().union(*names.values())))
            raise InputError(f"there is no category {name!r}; there are {known}")
    settings = {}
    for job in jobs:
        own = tuple(name for name in wanted if name in names[job.dataset])
        if own or not wanted:
            settings[job] = _settings(config, job, own)
            check(settings[job])
    return settings


def _settings(config: ReproduceConfig, job: Job, category: tuple[str, ...]) -> EvaluateConfig:
    settings = config.settings
    if settings.epochs and settings.iterations:  # each for the protocols that the paper has it for
        settings = replace(settings, **{"epochs" if job.protocol in SHOTS else "iterations": None})
    return replace(
        settings,
        category=category,
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
        own = {job: run for job, run in runs.items() if job in set(_needed(table.name))}
        files.write_text(out / f"{table.name}.md", as_markdown(table, rows, unlike_the_paper(own)))
        print(as_text(table, rows), end="\n\n")
    reports = _write_reports(runs, out)
    figures = write_figures(config, runs, files.make_output_dir(out / FIGURE_FILES), failed)
    warnings = unlike_the_paper(runs)
    write_page(out / "reproduce.html", config, warnings, compared, figures, reports, failed)
    if warnings:
        print("not comparable with the paper:", *warnings, sep="\n  ")
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
            write_report(together, directory / f"{job.name}.html", job.setting)
            reports[job.name] = job.setting
    return {title: f"{COMPARED}/{name}.html" for name, title in reports.items()}
