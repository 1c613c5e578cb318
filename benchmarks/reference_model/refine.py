"""The U-Net's and the text encoder's further trainings: more styles, and more names of each concept.

`python -m benchmarks.reference_model.refine --start DIR --stage second --out NEXT` trains one part of a finished model
on, and leaves the others as they are. The U-Net's further names are WordNet's nouns that the text encoder's teacher
takes for a concept's; none of them, and no word in them, is an unseen alias. The stage `meaning` is the text encoder's
(see `meaning`).

The third stage drops the min-SNR weights: they give the noisiest steps next to no weight (0.005 at the last one), and
it is there that the text, not the noisy picture, must decide what is drawn and in which style. The fourth draws those
steps more often: from a noisy picture of the right style the model kept it, and lost it where it began from nothing.
The fifth and the sixth, after `meaning`, are for the states of the new text encoder.
"""

import argparse
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.reference_model import denoiser, meaning, text_encoder
from benchmarks.reference_model.build import forget_origin
from benchmarks.reference_model.denoiser import Recipe
from benchmarks.reference_model.pictures import DEFAULT_CACHE, read_concepts
from benchmarks.reference_model.splits import find_wordnet
from benchmarks.reference_model.texts import DRAWABLE, read_nouns, shown_aliases, unseen_aliases
from benchmarks.reference_model.training import Schedule
from realera_edit.hub import resolve

STAGES = {
    "second": (
        Schedule(steps=5000, rate=6e-4, warmup=200, decay=0.8, average=0.998, seed=7),
        Recipe(plain=0.25, label=0.6),
    ),
    "third": (
        Schedule(steps=4000, rate=6e-4, warmup=100, decay=0.8, average=0.998, seed=8),
        Recipe(plain=0.25, label=0.6, gamma=None),
    ),
    "fourth": (
        Schedule(steps=5000, rate=6e-4, warmup=100, decay=1.0, average=0.998, seed=9),
        Recipe(empty=0.08, plain=0.12, label=0.8, gamma=None, late=1.0),
    ),
    "fifth": (
        Schedule(steps=1800, rate=4e-4, warmup=50, decay=1.0, average=0.998, seed=11),
        Recipe(empty=0.08, plain=0.15, label=0.6, gamma=None, late=1.0),
    ),
    "sixth": (
        Schedule(steps=750, rate=2.5e-4, warmup=25, decay=1.0, average=0.996, seed=12),
        Recipe(empty=0.08, plain=0.15, label=0.7, gamma=None, late=1.0),
    ),
}
MEANING = "meaning"  # the stage of the text encoder
NEAR, MARGIN = 0.5, 0.05  # cosine to the nearest label, and how much less it must be to the second
MOST = 8  # names of one concept, the nearest ones


def phrases(text: str) -> set[str]:
    """Every run of whole words of a text."""
    words = text.split()
    return {" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}


def related_names(cache: Path = DEFAULT_CACHE) -> dict[str, list[str]]:
    """Label to the nouns whose teacher's vector is clearly nearest to it, nearest first."""
    labels = [concept.label for concept in read_concepts(cache / "pictures.json")]
    barred = {name for names in unseen_aliases().values() for name in names} | {label.lower() for label in labels}
    drawable = (noun.lemma for noun in read_nouns(find_wordnet(cache)) if noun.file in DRAWABLE)
    nouns = [noun for noun in dict.fromkeys(drawable) if not phrases(noun) & barred]
    known = text_encoder.teach([label.lower() for label in labels], cache).float()
    near, place = (text_encoder.teach(nouns, cache).float() @ known.T).topk(2, 1)
    clear = (near[:, 0] > NEAR) & (near[:, 0] - near[:, 1] > MARGIN)
    found: dict[str, list[str]] = {}
    for i in near[:, 0].argsort(descending=True, stable=True).tolist():
        names = found.setdefault(labels[int(place[i, 0])], [])
        if clear[i] and len(names) < MOST:
            names.append(nouns[i])
    return found


def together(*many: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The names of each label in all mappings."""
    return {label: [name for names in many for name in names.get(label, ())] for names in many for label in names}


def train(start: Path, stage: str, cache: Path = DEFAULT_CACHE, until: int | None = None) -> Any:
    """The U-Net of the model at `start`, trained further."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    unet = UNet2DConditionModel.from_pretrained(start, subfolder="unet", dtype=torch.float32)
    weights = (start / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    schedule, recipe = STAGES[stage]
    key = hashlib.sha256(weights).hexdigest()[:16]
    run = denoiser.trainer(cache, schedule, f"unet_{stage}", recipe, unet.train(), key)
    if run.step < (until or schedule.steps):
        encoder = CLIPTextModel.from_pretrained(start, subfolder="text_encoder", dtype=torch.float32).eval()
        autoencoder = AutoencoderKL.from_pretrained(start, subfolder="vae", dtype=torch.float32).eval()
        tokenizer = text_encoder.load_tokenizer(start / "tokenizer")
        names = together(shown_aliases(), related_names(cache))
        data = denoiser.load_data(cache, encoder, tokenizer, autoencoder, names)
        run.run(denoiser.batch_loss(run.module, data, denoiser.BATCH, recipe), until)
    run.finish()
    return run.module.eval().cpu()


def main() -> None:
    """Train one part on, and write the whole model with it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--start", required=True, help="checkpoint folder of `build`, or emoji")
    parser.add_argument("--stage", choices=[*STAGES, MEANING], required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--until", type=int, help="stop at this step and take it as it is")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = resolve(options.start)
    if options.out.exists():
        parser.error(f"{options.out} exists")
    if options.stage == MEANING:
        part, module = "text_encoder", meaning.train(start, options.cache, options.until)
    else:
        part, module = "unet", train(start, options.stage, options.cache, options.until)
    shutil.copytree(start, options.out)
    module.half().save_pretrained(options.out / part, safe_serialization=True)
    forget_origin(options.out)


if __name__ == "__main__":
    main()
