"""Train every part of the reference model and write it as a diffusers folder.

`python -m benchmarks.reference_model.build --out realera_edit/models/emoji`; what the cache holds is not trained
again, so a run that was broken off goes on.
"""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import torch

from benchmarks.reference_model import denoiser, text_encoder, vae
from benchmarks.reference_model.pictures import DEFAULT_CACHE, load
from benchmarks.reference_model.texts import SPLITS, write_splits

CARD = Path(__file__).with_name("card.md")
NOTICE = Path(__file__).with_name("NOTICE")


def assemble(out: Path, cache: Path = DEFAULT_CACHE, until: int | None = None) -> None:
    """Write the trained parts to `out` in float16, with the list of concepts, the model card and the NOTICE."""
    from diffusers import StableDiffusionPipeline

    concepts = load(cache, vae.SIZE).concepts
    if not SPLITS.exists():
        write_splits(concepts, SPLITS, cache)
    student = text_encoder.train(cache)
    pipe = StableDiffusionPipeline(
        vae=vae.train(cache),
        text_encoder=student.model,
        tokenizer=text_encoder.load_tokenizer(cache / "training" / "tokenizer"),
        unet=denoiser.train(cache, until=until),
        scheduler=denoiser.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(out, safe_serialization=True)
    forget_origin(out)
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):  # for transformers before 5 as well
        shutil.copyfile(cache / "training" / "tokenizer" / name, out / "tokenizer" / name)
    rows = [dataclasses.asdict(concept) for concept in concepts]
    (out / "concepts.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", "utf-8")
    shutil.copyfile(CARD, out / "README.md")
    shutil.copyfile(NOTICE, out / "NOTICE")


def forget_origin(out: Path) -> None:
    """Take the place where a model was trained, which is nobody's business, out of its configurations."""
    for config in out.glob("*/config.json"):
        content = json.loads(config.read_text("utf-8"))
        content.pop("_name_or_path", None)
        config.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def main() -> None:
    """Train what is missing, write the folder, print its size."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--until", type=int, help="stop the U-Net at this step and take it as it is")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    assemble(options.out, options.cache, options.until)
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(f"{options.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
