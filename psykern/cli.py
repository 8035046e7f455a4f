"""The commands: ``psykern score``, ``plan``, ``compare``, ``lm-eval``, ``demo`` and ``models``.

Exit status: 0 done; 1 an error stopped it; 2 wrong usage; 3 done, but some rows were rejected; 130 and 143 stopped by
SIGINT (Ctrl-C) and SIGTERM. Before anything is computed such a signal ends ``psykern score`` at once. Later the first
one lets it finish the wave in hand, a second stops it at once; either way the same command goes on with the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import psykern
from psykern import Settings, Shard, demo
from psykern.listing import models_table
from psykern.signals import EXIT_SIGNAL, handling, stop_signals

if TYPE_CHECKING:
    from psykern import Run

LETTER = "[A-Z]"  # the responses of the study's accuracy subset
EXIT_ERROR, EXIT_REJECTS = 1, 3

_METAVARS = {"date": "YYYY-MM-DD", "device": "NAME"}
# What a setting's own help does not say: how the command line takes it.
_FLAG_HELP = {
    "condition": "; several share one load of the weights and go to RUN/NAME",
    "discrete": "; without a pattern: one capital letter",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is returned."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["lm-eval"]:  # before the parser, which would take the harness's options for its own
        return _answered(lambda: _lm_eval(arguments[1:]))
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        settings = _settings(options)
        _shard(getattr(options, "shard", None))
    except ValueError as error:
        parser.error(str(error))
    return _answered(lambda: options.command(options, settings))


def _answered(command: Callable[[], int]) -> int:
    """The exit status of ``command``; what a user can act on is said in a line."""
    try:
        return command()
    except KeyboardInterrupt:
        print("psykern: interrupted; records written so far are kept", file=sys.stderr)
        return EXIT_SIGNAL + signal.SIGINT
    except (psykern.PsykernError, psykern.BackendError) as error:
        print(f"psykern: error: {error}", file=sys.stderr)
        return EXIT_ERROR


class _CommandParser(argparse.ArgumentParser):
    """A command's own parser: its help shows the defaults."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="psykern", description="Scores human behaviour under language models.")
    parser.add_argument("--version", action="version", version=f"psykern {psykern.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_CommandParser)
    _add_score(commands.add_parser("score", help="score transcripts: one record per response"))
    plan = commands.add_parser("plan", help="what scoring would cost; needs no weights")
    _add_input(plan)
    plan.set_defaults(command=_plan)
    _add_compare(commands.add_parser("compare", help="set finished runs against each other: tables, figures, a page"))
    commands.add_parser(
        "lm-eval", add_help=False, help="lm-evaluation-harness with psykern; its arguments are passed on"
    )
    show = commands.add_parser("demo", help="score the shipped sample with two shipped tiny models and compare them")
    show.add_argument("--out", metavar="FOLDER", help="new folder for runs and report; default: a temporary one")
    show.add_argument("--quiet", action="store_true", help="no progress bar")
    show.set_defaults(command=_demo)
    commands.add_parser("models", help="the kinds of model, and what is tested of each").set_defaults(command=_models)
    return parser


def _add_score(score: argparse.ArgumentParser) -> None:
    _add_input(score)
    score.add_argument("--out", required=True, metavar="RUN", help="folder or fsspec URL for the records")
    score.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on with the same run where RUN holds one; --no-resume: RUN must be new or empty",
    )
    score.add_argument(
        "--shard", metavar="I/N", help="score only every N-th unit from I (0 to N-1) on; the last process finishes RUN"
    )
    score.add_argument(
        "--cache",
        metavar="FOLDER",
        default=os.environ.get("PSYKERN_CACHE"),
        help="keep tokens there for the next run on the same data; default: $PSYKERN_CACHE, else nowhere",
    )
    score.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="score with an actor per GPU, or group of cores, of a Ray cluster; without an address the one at hand",
    )
    score.add_argument("--ray-workers", type=int, metavar="N", help="actors; default: as many as there is room for")
    score.add_argument("--ray-cpus", type=int, metavar="N", help="cores of an actor; default: 2, or its GPU's share")
    score.set_defaults(command=_score)


def _add_compare(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("runs", metavar="RUN", nargs="+", help="folders that `psykern score` wrote")
    compare.add_argument("--out", required=True, metavar="REPORT", help="new folder for the report")
    compare.add_argument("--pairs", metavar="CSV", help="columns base, post, kind; default: the study's own pairs")
    compare.add_argument("--models", metavar="YAML", help="family, size, kind and base of models the study has not")
    compare.add_argument("--domains", metavar="CSV", help="columns study, domain")
    compare.add_argument("--unpaired", action="store_true", help="allow runs without a partner")
    compare.add_argument("--quiet", action="store_true", help="do not say what is being read")
    compare.set_defaults(command=_compare)


def _add_input(parser: argparse.ArgumentParser) -> None:
    """The model, the data and every setting, with its default."""
    parser.add_argument("model", metavar="MODEL", help="model folder or hub id")
    parser.add_argument("data", metavar="DATA", nargs="+", help="files, folders or hub dataset ids")
    parser.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of the hub id MODEL, as owner/name@REV says too"
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="PATH",
        help="folder or hub id of a LoRA adapter, merged into MODEL; several share one base and go to RUN/NAME",
    )
    defaults = Settings()
    for name, hint in get_type_hints(Settings, include_extras=True).items():
        kind, about = get_args(hint)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            default=getattr(defaults, name),
            help=about.help + _FLAG_HELP.get(name, ""),
            **_taken(name, kind),
        )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _taken(name: str, kind: Any) -> dict[str, Any]:
    """How a flag takes its value, by the setting's type."""
    if name == "condition":
        return {"type": _conditions, "metavar": "NAME[,NAME]"}
    if name == "discrete":
        return {"nargs": "?", "const": LETTER, "metavar": "PATTERN"}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if kind is bool:
        return {"action": "store_true"}
    if int in (kind, *get_args(kind)):
        return {"type": int, "metavar": "N"}
    if name in _METAVARS:
        return {"metavar": _METAVARS[name]}
    return {"nargs": "+", "metavar": "NAME"}


def _settings(options: argparse.Namespace) -> Settings:
    if not hasattr(options, "protocol"):
        return Settings()
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(Settings)}
    values["condition"] = options.condition[0]
    values["studies"] = tuple(options.studies) if options.studies else None
    return Settings(**values)


def _conditions(text: str) -> list[str]:
    """One condition, or several that commas separate."""
    names = text.split(",")
    known = get_args(get_type_hints(Settings)["condition"])
    if not set(names) <= set(known) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected different ones of {', '.join(known)}, got {text!r}")
    return names


def _score(options: argparse.Namespace, settings: Settings) -> int:
    adapters = options.adapter
    if options.ray is not None and (options.shard is not None or len(options.condition) > 1 or len(adapters) > 1):
        raise psykern.PsykernError("ray: takes one condition, one adapter and no --shard; its workers share the units")
    with stop_signals(at_once=options.ray is None) as stop, _caveats():
        how: dict[str, Any] = {
            "revision": options.revision,
            "resume": options.resume,
            "cache": options.cache or None,
            "stop": stop.asked,
            "quiet": options.quiet,
        }
        where = (options.model, options.data, options.out)
        try:
            if options.ray is not None:
                workers = psykern.Workers(options.ray or None, options.ray_workers, options.ray_cpus)
                how["adapter"] = next(iter(adapters), None)
                return _report(psykern.score_on_cluster(*where, settings, workers=workers, **how))
            how["shard"] = _shard(options.shard)
            if len(adapters) > 1:
                conditions = options.condition if len(options.condition) > 1 else None
                return _report_each(psykern.score_adapters(*where, adapters, settings, conditions=conditions, **how))
            how["adapter"] = next(iter(adapters), None)
            if len(options.condition) == 1:
                return _report(psykern.score(*where, settings, **how))
            return _report_each(psykern.score_conditions(*where, options.condition, settings, **how))
        except psykern.InterruptedRun as error:
            print(f"psykern: {error}", file=sys.stderr)
            return EXIT_SIGNAL + stop.received[0]


def _report_each(runs: Sequence[Run]) -> int:
    """Each by what it differs in from the others."""
    statuses = []
    for run in runs:
        adapter, is_one = run.manifest.adapter, len({of.manifest.adapter for of in runs}) == 1
        print(f"{run.manifest.condition if is_one or adapter is None else run.folder}:")
        statuses.append(_report(run))
    return max(statuses)


def _shard(text: str | None) -> Shard:
    """Raises ValueError."""
    index, slash, count = ("0/1" if text is None else text).partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise ValueError(f"shard: expected I/N, two numbers, got {text!r}")
    return Shard(int(index), int(count))


@contextmanager
def _caveats() -> Iterator[None]:
    """What will be slow is said in one line each."""
    slow = (psykern.SlowDtypeWarning, psykern.NoSharingWarning)
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, slow):
                print(f"psykern: {message}", file=sys.stderr)
            else:
                others(message, category, *where, **more)

        warnings.showwarning = show
        for of in slow:
            warnings.simplefilter("always", of)
        yield


def _compare(options: argparse.Namespace, settings: Settings) -> int:
    del settings  # a comparison takes none
    compare = psykern.compare_runs  # which is loaded now, while Ctrl-C ends the process at once
    with handling(signal.default_int_handler, signal.SIGINT):  # what is half written is removed
        comparison = compare(
            options.runs,
            options.out,
            pairs=options.pairs,
            models=options.models,
            domains=options.domains,
            unpaired=options.unpaired,
            progress=_no_progress if options.quiet else _progress,
        )
    return _report_comparison(comparison, options.out)


def _progress(line: str) -> None:
    print(f"psykern: {line}", file=sys.stderr)


def _no_progress(line: str) -> None:
    del line


def _report_comparison(comparison: psykern.Comparison, out: str | Path) -> int:
    table = psykern.format_comparison(comparison)
    if table:
        print(table)
    print(f"report: {Path(out) / 'report.html'}")
    return 0


def _demo(options: argparse.Namespace, settings: Settings) -> int:
    out = Path(options.out or tempfile.mkdtemp(prefix="psykern-demo-"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise psykern.RunFolderError(f"{out}: expected a new or empty folder")
    score, compare, runs = psykern.score, psykern.compare_runs, []  # loaded now, as in a comparison
    with (
        handling(signal.default_int_handler, signal.SIGINT),
        tempfile.TemporaryDirectory(prefix="psykern-model-") as folder,
    ):
        for model in (demo.MODEL, demo.build_posttrained(Path(folder) / demo.POSTTRAINED.parent.name)):
            print(f"{model.name}:")
            run = score(model, demo.SAMPLE, out / model.name, settings, quiet=options.quiet)
            _report(run)
            runs.append(run.folder)
        comparison = compare(runs, out / "report", models=demo.MODELS, domains=demo.DOMAINS)
    _report_comparison(comparison, out / "report")
    print("The tiny models are a demonstration: one was trained for minutes on other participants of these studies,")
    print("the other then for seconds to give its own likeliest answer. Their numbers say that psykern works, nothing")
    print("about people or language models.")
    return 0


def _lm_eval(arguments: Sequence[str]) -> int:
    try:
        from psykern.integrations.lm_eval import run_harness
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise psykern.PsykernError("lm-evaluation-harness is not installed: pip install 'psykern[lm-eval]'") from error
    return run_harness(arguments)


def _models(options: argparse.Namespace, settings: Settings) -> int:
    del options, settings
    print(models_table())
    return 0


def _report(run: Run) -> int:
    counts = run.manifest.counts
    print(psykern.format_summary(run.summary))
    print(
        f"{counts.responses:,} responses of {counts.transcripts:,} transcripts; {counts.tokens:,} tokens, "
        f"{counts.computed_tokens:,} computed after sharing; {run.manifest.seconds['total']:.1f} s, "
        f"{run.manifest.tokens_per_second:,.0f} tokens/s"
    )
    if counts.over_length_transcripts or counts.dropped_responses:
        print(
            f"longer than the model's context: {counts.over_length_transcripts:,} transcripts skipped, "
            f"{counts.dropped_responses:,} responses dropped"
        )
    if counts.without_metadata_transcripts:
        print(f"nothing is known of the participants of {counts.without_metadata_transcripts:,} transcripts: left out")
    _report_people(run)
    print(f"records: {run.folder}")
    if run.manifest.finished is None:
        print(f"{run.units_done:,} of {run.units_total:,} units are done; the others are for other shards")
        return 0
    if counts.rejects:
        print(f"psykern: {counts.rejects:,} rows were rejected: {run.folder}/rejects.jsonl", file=sys.stderr)
        return EXIT_REJECTS
    return 0


def _report_people(run: Run) -> None:
    counts = run.manifest.counts
    if counts.without_id_transcripts:
        print(
            f"{counts.without_id_transcripts:,} transcripts name no participant: each is a person of its own, called "
            "by its file's hash and its line"
        )
    if counts.shared_participants:
        print(
            f"{counts.shared_participants:,} participants' ids are in more than one file of their experiment: see "
            "--same-participants"
        )
    if counts.repeated_transcripts:
        print(
            f"{counts.repeated_transcripts:,} transcripts repeat an earlier one of their participant: they count again"
        )


def _plan(options: argparse.Namespace, settings: Settings) -> int:
    for name, given in (("condition", options.condition), ("adapter", options.adapter)):
        if len(given) > 1:
            raise psykern.PsykernError(f"{name}: a plan is of one {name}, got {','.join(given)}")
    how = {"adapter": next(iter(options.adapter), None), "revision": options.revision, "quiet": options.quiet}
    estimate = psykern.estimate(options.model, options.data, settings, **how)
    print(psykern.format_estimate(estimate))
    for error in estimate.rejects:
        print(f"psykern: rejected: {error}", file=sys.stderr)
    return EXIT_REJECTS if estimate.rejects else 0
