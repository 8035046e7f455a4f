"""Where the time of a run goes, by Python's profiler: own time of every compiled function that took part, the rest of
Python as one line. The model and the transcripts are those of ``providers``; one run warms up.

    python benchmarks/profile_score.py [--layers 24] [--mix small] [--name profile_cpu.csv]
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness import print_row, write_csv
from providers import MIXES, Study, load_studies, make_checkpoint, run_psykern

from psykern.data.tokenizer import Tokenizer
from psykern.kernels.compute import Compute
from psykern.models.model import Model

LEAST_SHARE = 0.001  # of the run; less counts as "rest"


def profile(study: Study, model: Model, tokenizer: Tokenizer) -> list[dict[str, object]]:
    run_psykern(model, study, tokenizer)
    profiler = cProfile.Profile()
    profiler.enable()
    run_psykern(model, study, tokenizer)
    profiler.disable()
    functions = pstats.Stats(profiler).get_stats_profile().func_profiles
    total = sum(f.tottime for f in functions.values())
    compiled = {
        name.split(" of ")[0].strip("<{}>").removeprefix("built-in method "): f
        for name, f in functions.items()
        if f.file_name == "~" and f.tottime >= LEAST_SHARE * total
    }
    parts = {name: (f.tottime, int(str(f.ncalls).split("/")[0])) for name, f in compiled.items()}
    parts["rest"] = (total - sum(seconds for seconds, _ in parts.values()), 0)
    table = []
    for name, (seconds, calls) in sorted(parts.items(), key=lambda part: -part[1][0]):
        row = {"study": study.name, "layers": model.num_layers, "function": name, "calls": calls}
        table.append({**row, "seconds": round(seconds, 3), "share": round(seconds / total, 4)})
        print_row(table[-1])
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--mix", choices=MIXES, default="small")
    parser.add_argument("--name", help="CSV file in results/; default: no file")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        make_checkpoint(Path(temporary), options.layers)
        folder = Path(temporary) / "torch.float32"
        model = Model(folder, Compute.resolve("cpu"))
        tokenizer = Tokenizer.load(folder)
        table = [row for s in load_studies(MIXES[options.mix], tokenizer) for row in profile(s, model, tokenizer)]
    if options.name:
        print(f"written: {write_csv(options.name, table)}")


if __name__ == "__main__":
    main()
