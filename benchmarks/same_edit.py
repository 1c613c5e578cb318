"""Whether an edit by file and the same edit of a loaded pipeline give the same weights, at the model's true shapes.

`python -m benchmarks.same_edit --model DIR --concepts 10` edits a diffusers folder with `edit_model`, loads the result
as a pipeline in the dtype of its files, edits the loaded original, compares every tensor of the two denoisers, and
takes one step of the edited one. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.clip_tokenizer import invented_names
from realera_edit import EditConfig, edit_model

PRESERVE = ("dog", "guitar")
SIZE = 64  # pixels of the one step: small, since a processor multiplies 16-bit numbers slowly


def load(model: Path) -> Any:
    """The pipeline in the dtype that its U-Net is stored in."""
    from diffusers import DiffusionPipeline
    from safetensors import safe_open

    (weights, *_) = sorted((model / "unet").glob("*.safetensors"))
    with safe_open(weights, "pt") as file:
        dtype = file.get_tensor(next(iter(file.keys()))).dtype
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compared(model: Path, names: list[str], work: Path, config: EditConfig) -> dict[str, Any]:
    """Seconds of both edits, how many tensors there are, changed and differ, and the largest difference."""
    start = time.perf_counter()
    edit_model(str(model), names, preserve=PRESERVE, config=config).save(work / "out", undo=False)
    filed = time.perf_counter() - start
    pipe = load(model)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items() if "attn2.to_" in name}
    start = time.perf_counter()
    edit_model(pipe, names, preserve=PRESERVE, config=config)
    edited = time.perf_counter() - start
    memory = pipe.unet.state_dict()
    changed = sum(not torch.equal(memory[name], value) for name, value in before.items())
    del pipe  # all but its denoiser: two whole pipelines would not fit beside each other
    saved = load(work / "out")
    written = saved.unet.state_dict()
    differing = {name: float((memory[name].double() - written[name].double()).abs().max()) for name in memory}
    differing = {name: value for name, value in differing.items() if value}
    with torch.inference_mode():
        picture = saved(PRESERVE[0], num_inference_steps=1, height=SIZE, width=SIZE, output_type="latent").images
    return {
        "dtype": str(memory[next(iter(memory))].dtype).removeprefix("torch."),
        "tensors": len(memory),
        "changed": changed,
        "differing": len(differing),
        "largest_difference": max(differing.values(), default=0.0),
        "step_is_finite": bool(torch.isfinite(picture).all()),
        "seconds": {"file": filed, "memory": edited},
    }


def main() -> int:
    """Compare and print; exit status 1 if any tensor differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder such as benchmarks.shapes writes")
    parser.add_argument("--concepts", type=int, default=10)
    parser.add_argument("--prior-words", type=int, default=EditConfig.prior_words, help="fewer take less time")
    parser.add_argument("--work", type=Path, help="where the edited folder is made and removed  [default: beside]")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=options.work or options.model.parent))
    try:
        config = EditConfig(prior_words=options.prior_words)
        found = compared(options.model, invented_names(options.concepts), work, config)
    finally:
        shutil.rmtree(work)
    record = {
        "command": "python -m benchmarks.same_edit " + " ".join(sys.argv[1:]),
        "model": options.model.name,
        "machine": common.machine(),
        "versions": common.versions(),
        **found,
    }
    print(
        f"{found['tensors']} tensors, {found['changed']} changed, {found['differing']} differ between file and memory"
    )
    print(json.dumps(record))
    return int(bool(found["differing"]) or not found["changed"] or not found["step_is_finite"])


if __name__ == "__main__":
    sys.exit(main())
