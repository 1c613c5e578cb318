"""How long the weights of many names take, alone and jointly, beside the solve with weights that are known.

`python -m benchmarks.weights_speed --width 768 --names 10 100 1000`: names of `--rows` states each, as contexts and
positions give them, against a prior of 2,000 words, all of random states like CLIP's (`solve_terms.clip_like`). One
table, and one JSON object: seconds of `group_weights`, of `joint_weights` (medians), of `solve` in all and of `solve`
with the weights given; and how far the names are from their common share of the way with either.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.solve_terms import clip_like
from realera_edit.calibration import common_shares, group_weights, joint_weights, shares
from realera_edit.config import EditConfig
from realera_edit.solve import solve
from realera_edit.statistics import Keep, Pairs, second_moment

PRIOR, SPREAD = 2000, 0.3


def problem(names: int, rows: int, width: int, seed: int) -> tuple[Pairs, Keep]:
    """Names whose rows scatter around a state of their own by `SPREAD` of their norm, each with one target."""
    states = clip_like(2 * names + PRIOR, width, seed).double()
    x, y, kept = torch.split(states, [names, names, PRIOR])
    group = torch.arange(names).repeat_interleave(rows)
    noise = torch.randn(len(group), width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight = torch.full((len(group),), 1 / rows, dtype=torch.float64)
    extra = torch.zeros(len(group), dtype=torch.bool)
    pairs = Pairs(x[group] + SPREAD * noise, y[group], weight, group, extra)
    return pairs, Keep(second_moment(kept), None, kept[:0])


def measured(names: int, options: argparse.Namespace) -> dict[str, float]:
    """Seconds and shares of one number of names."""
    pairs, keep = problem(names, options.rows, options.width, options.seed)
    config = EditConfig()
    wanted = 1 - torch.full((names,), config.strength_for(names), dtype=torch.float64) / (1 + config.overshoot)
    assert keep.second is not None
    kept = keep.second + config.ridge * float(keep.second.diagonal().mean()) * torch.eye(options.width)
    lower = torch.linalg.cholesky(kept)
    solving = functools.partial(solve, pairs, keep, residual=wanted, ridge=config.ridge)
    alone, _, gone = group_weights(pairs, pairs.x, lower, wanted)
    share = common_shares(gone, wanted)
    joint = solving().group_weight
    calls: dict[str, Callable[[], object]] = {
        "alone": lambda: group_weights(pairs, pairs.x, lower, wanted),
        "jointly": lambda: joint_weights(pairs, pairs.x, kept, alone, share),
        "solve": solving,
        "solve_given": lambda: solving(group_weight=joint),
    }
    seconds = {name: [common.timed(call)[0] for _ in range(options.repeat)] for name, call in calls.items()}

    def off(weight: Tensor) -> float:
        factor = solving(group_weight=weight).factor
        return float((shares(pairs, factor.map(pairs.x) - pairs.x) - share).abs().max())

    return {
        "names": names,
        "rows": len(pairs.x),
        **{name: common.median(values) for name, values in seconds.items()},
        "off_alone": off(alone),
        "off_jointly": off(joint),
    }


def main() -> None:
    """Measure, print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--width", type=int, default=768, help="of the text space: 768 of SD 1.x, 1024 of 2.x, 2048 of XL")
    add("--names", type=int, nargs="+", default=[10, 100, 1000])
    add("--rows", type=int, default=42, help="states of each name")
    add("--repeat", type=int, default=3)
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = [measured(names, options) for names in options.names]
    print(
        "| names | rows | alone, s | jointly, s | solve, s | solve with given weights, s | off, alone | off, jointly |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in found:
        times = (f"{row[name]:.2f}" for name in ("alone", "jointly", "solve", "solve_given"))
        cells = [row["names"], row["rows"], *times, f"{row['off_alone']:.3f}", f"{row['off_jointly']:.3f}"]
        print("| " + " | ".join(map(str, cells)) + " |")
    record = {"command": "python -m benchmarks.weights_speed " + " ".join(sys.argv[1:]), **vars(options)}
    print(json.dumps({**record, "results": found, "versions": common.versions(), "machine": common.machine()}))


if __name__ == "__main__":
    main()
