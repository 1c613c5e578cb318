"""Solve and apply, beside UCE's per-layer loop given the same terms, and beside the product alone.

`python -m benchmarks.solve_speed --shape sd15 --concepts 100 --json`; the last line is one JSON object.

* ours: statistics, solve, and the new weights of all layers; weights are in memory in float32, as UCE holds them.
* loop: `layer_loop`, every projection; with more than a minute of it, one projection of each size, scaled by their
  number (`loop_layers_timed` says how many were timed).
* floor: the stacked product alone, one factor known in advance applied to the stacked weights into fresh memory,
  low-rank or full, whichever is less work.
* encoding: all distinct prompts of the concepts and their one target, in all contexts of their kind: `PromptEncoder`
  beside one at a time at full length. ratio_end_to_end adds the solve; its variant `..._target_each_time` lets the
  loop encode the target anew with every concept, as UCE's own program does.
* relative_error: |W'_ours - W'| / |W' - W| over the first projection of each size, W' solved in float64 per layer.

The three are timed in turn in every round; figures are medians over the rounds, after a warm-up.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import common, encode_speed
from benchmarks.clip_tokenizer import invented_names
from benchmarks.layer_loop import Term, edit_layer, edit_layers, exact_layer
from benchmarks.solve_terms import KEPT, Problem, clip_like, random_weights
from realera_edit.apply import apply_factor
from realera_edit.solve import Solution, solve

LOOP_LIMIT = 60.0  # seconds of one whole loop, beyond which a part is timed and scaled
LOOP_TOTAL = 120.0  # seconds of all rounds of the loop together


def edit(problem: Problem, weights: Sequence[Tensor]) -> tuple[list[Tensor], Solution]:
    """Our side, from states to the new weights of all layers."""
    pairs = problem.pairs()
    ones = torch.ones(len(problem.x), dtype=torch.float64, device=problem.x.device)
    solution = solve(
        pairs, problem.keep(), residual=ones, ridge=problem.ridge, clouds=problem.clouds(pairs), group_weight=ones
    )
    return apply_factor(solution.factor, weights), solution


class Floor:
    """The stacked product alone. The rank is the number of independent erased keys, at most the width."""

    def __init__(self, problem: Problem, stack: Tensor) -> None:
        width, count = stack.shape[1], len(problem.x)
        self.stack, self.rank = stack, width if problem.cloudy else min(count, width)
        self.low = 2 * self.rank < width
        size = self.rank if self.low else width
        self.left = torch.randn(width, size, device=stack.device) / width
        self.right = torch.randn(size, width, device=stack.device) / size

    @property
    def form(self) -> str:
        """Which product it is."""
        return "low-rank" if self.low else "full"

    def __call__(self) -> Tensor:
        if self.low:
            return torch.addmm(self.stack, self.stack @ self.left, self.right)
        return self.stack @ self.left


class Loop:
    """The timed per-layer loop, on every projection or on one of each size."""

    def __init__(self, weights: Sequence[Tensor], terms: Sequence[Term], lam: float, device: str) -> None:
        self.terms, self.lam, self.device = terms, lam, device
        self.counts = Counter(len(weight) for weight in weights)
        self.examples = {rows: next(w for w in weights if len(w) == rows) for rows in self.counts}
        edit_layer(next(iter(self.examples.values())), terms, lam)  # warm-up
        self.whole = self._scaled() <= LOOP_LIMIT
        self.timed = list(weights) if self.whole else list(self.examples.values())

    def _scaled(self) -> float:
        """Seconds of the whole loop from one projection of each size."""
        seconds = 0.0
        for rows, weight in self.examples.items():
            one, _ = common.timed(lambda w=weight: edit_layer(w, self.terms, self.lam), self.device)  # type: ignore[misc]
            seconds += one * self.counts[rows]
        return seconds

    def seconds(self) -> float:
        """Seconds of the whole loop."""
        if not self.whole:
            return self._scaled()
        return common.timed(lambda: edit_layers(self.timed, self.terms, self.lam), self.device)[0]


def error(new: Tensor, exact: Tensor, old: Tensor) -> float:
    """|new - exact| / |exact - old|."""
    return float((new.double() - exact).norm() / (exact - old.double()).norm())


def errors(loop: Loop, weights: Sequence[Tensor], new: Sequence[Tensor]) -> dict[str, Any]:
    """The largest relative error of both sides over the first projection of each size."""
    places = [next(i for i, w in enumerate(weights) if len(w) == rows) for rows in loop.counts]
    mine, other = [], []
    for place in places:
        old = weights[place]
        exact = exact_layer(old, loop.terms, loop.lam)
        mine.append(error(new[place], exact, old))
        other.append(error(edit_layer(old, loop.terms, loop.lam), exact, old))
    largest = common.largest
    return {"relative_error": largest(mine), "relative_error_loop": largest(other), "error_layers": places}


def run(problem: Problem, stack: Tensor, weights: list[Tensor], device: str, repeat: int) -> dict[str, Any]:
    """Time the three sides in turn."""
    new, solution = edit(problem, weights)
    after_edit = common.peak_memory(device)
    floor = Floor(problem, stack)
    floor()
    loop = Loop(weights, problem.terms(), solution.ridge, device)
    found = errors(loop, weights, new)
    del new
    ours: list[float] = []
    bare: list[float] = []
    plain: list[float] = []
    for _ in range(repeat):
        ours.append(common.timed(lambda: edit(problem, weights), device)[0])
        bare.append(common.timed(floor, device)[0])
        if sum(plain) < LOOP_TOTAL:
            plain.append(loop.seconds())
    seconds = {"ours": common.median(ours), "loop": common.median(plain), "floor": common.median(bare)}
    return {
        "ratio_vs_layer_loop": seconds["loop"] / seconds["ours"],
        "ratio_vs_floor": common.median([a / b for a, b in zip(ours, bare, strict=True)]),
        **found,
        "seconds": seconds,
        "seconds_fastest": {"ours": min(ours), "loop": min(plain), "floor": min(bare)},
        "form": "dense" if solution.factor.right is None else "low-rank",
        "rank": solution.factor.rank,
        "condition": solution.condition,
        "floor_form": floor.form,
        "floor_rank": floor.rank,
        "layers": len(weights),
        "rows": len(stack),
        "width": stack.shape[1],
        "loop_layers_timed": len(loop.timed),
        "loop_rounds": len(plain),
        "peak_bytes_after_edit": after_edit,
    }


def make_problem(options: argparse.Namespace, width: int, encoders: Any) -> Problem:
    """States of the wanted kind: each concept's end token, its target, and a handful of kept ones."""
    count, seed = options.concepts, options.seed
    if options.states == "encoder":
        names = invented_names(2 * count + KEPT)
        states = encode_speed.end_states(encoders, names)
    else:
        states = clip_like(2 * count + KEPT, width, seed).to(options.device)
    x, y, kept = torch.split(states, [count, count, KEPT])
    return Problem(x, y, kept, options.neighbours, options.moments, seed)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The whole record of one run."""
    record = {
        "command": "python -m benchmarks.solve_speed " + " ".join(sys.argv[1:]),
        **{name: getattr(options, name) for name in ("shape", "concepts", "neighbours", "moments", "states")},
        **{name: getattr(options, name) for name in ("device", "seed", "repeat")},
        "threads": torch.get_num_threads(),
        "machine": common.machine(),
        "versions": common.versions(),
    }
    if options.device.startswith("cuda"):
        record["gpu"] = torch.cuda.get_device_name(options.device)
    wanted = options.encode or options.states == "encoder"
    encoders = encode_speed.load_encoders(options.shape, options.device, options.seed) if wanted else None
    stack, weights = random_weights(options.shape, options.device, options.seed)
    record |= run(make_problem(options, stack.shape[1], encoders), stack, weights, options.device, options.repeat)
    del stack, weights
    if options.encode and encoders is not None:
        found = encode_speed.compare(encoders, options.concepts, options.device, min(options.repeat, 3))
        seconds = record["seconds"] | found.pop("seconds")
        record |= found | {"seconds": seconds}
        plain, mine = seconds["encode_loop"] + seconds["loop"], seconds["encode_ours"] + seconds["ours"]
        record["ratio_end_to_end"] = plain / mine
        again = found["encode_loop_target_each_time"] + seconds["loop"]
        record["ratio_end_to_end_target_each_time"] = again / mine
    return record | common.peak_memory(options.device)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=("sd15", "sd21", "sdxl", "tiny-sd15", "tiny-sd21", "tiny-sdxl"), default="sd15")
    add("--concepts", type=int, default=100)
    add("--neighbours", type=int, default=0, help="sampled isotropic neighbours of each concept")
    add("--moments", action="store_true", help="the exact moments of the neighbours in place of samples")
    add("--states", choices=("clip-like", "encoder"), default="clip-like", help="states to solve with")
    add("--encode", action=argparse.BooleanOptionalAction, default=True, help="time the text encoding too")
    add("--device", default="cpu")
    add("--repeat", type=int, default=5, help="rounds, after a warm-up")
    add("--threads", type=int, help="threads of torch")
    add("--seed", type=int, default=0)
    add("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    common.show(measure(options), options.json)


if __name__ == "__main__":
    main()
