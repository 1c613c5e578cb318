"""Pictures of prompts and seeds, drawn with any text-to-image pipeline into a folder with which a broken run goes on.

A picture depends on model, prompt, seed and settings alone: each has a random generator of its own, so that its batch
mates change it by rounding at most, and one seed gives the same noise in two models.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import CheckpointError, ConfigError
from .files import write_atomically
from .folder import PICKLES, read_json
from .hub import resolve
from .tensorfile import to_bytes

FORMAT = "realera-edit pictures 1"
INDEX = "index.json"
# Called as progress(label, done, total) after each batch.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn. `height`, `width` in pixels, None: the pipeline's own; `negative`: "" is none."""

    steps: int = 18
    guidance: float = 4.0
    height: int | None = None
    width: int | None = None
    negative: str = ""

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.guidance >= 0:
            raise ConfigError(f"steps {self.steps} and guidance {self.guidance:g}: expected at least 1 and 0")

    def name(self, prompt: str, seed: int) -> str:
        """File name of a picture: a hash of everything but the model."""
        key = json.dumps([prompt, seed, *asdict(self).values()])
        return hashlib.sha256(key.encode()).hexdigest()[:20] + ".png"


@dataclass(frozen=True)
class Team:
    """The processes that draw together, one under plain Python, several under `accelerate launch`."""

    rank: int = 0
    size: int = 1
    state: Any = None

    @classmethod
    def of_environment(cls) -> Team:
        """Accelerate's `PartialState` where several processes were launched and accelerate is installed."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or importlib.util.find_spec("accelerate") is None:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes, state)

    @property
    def device(self) -> str:
        """Where this process draws unless told otherwise: a GPU of its own if there is one."""
        if self.state is not None and self.state.device.type != "cpu":
            return str(self.state.device)
        return "cuda" if torch.cuda.is_available() else "cpu"

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.state is not None:
            self.state.wait_for_everyone()


class PictureFolder:
    """PNG files of one model drawn in one way; `index.json` says which."""

    def __init__(self, folder: Path, model: str, drawing: Drawing) -> None:
        """Open or create it for the model with fingerprint `model`. `CheckpointError` if it belongs to another."""
        self.folder, self.drawing = folder, drawing
        wanted = {"format": FORMAT, "model": model, "drawing": asdict(drawing)}
        if (folder / INDEX).exists():
            self._check(read_json(folder / INDEX), wanted)
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / INDEX, (json.dumps(wanted, indent=1, ensure_ascii=False) + "\n").encode())
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be written: {error}") from error

    def _check(self, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        if found.get("format") != FORMAT:
            raise CheckpointError(f"{self.folder / INDEX}: not of pictures of realera-edit; choose another output")
        if found.get("model") != wanted["model"]:
            what = "of another model (its weights or their precision differ)"
        elif found.get("drawing") != wanted["drawing"]:
            old = found.get("drawing") or {}
            pairs = [(key, old.get(key), value) for key, value in wanted["drawing"].items() if old.get(key) != value]
            what = "drawn otherwise (" + ", ".join(f"{key} {was}, not {now}" for key, was, now in pairs) + ")"
        else:
            return
        raise CheckpointError(f"{self.folder}: holds pictures {what}; choose another output, or delete it")

    def path(self, prompt: str, seed: int) -> Path:
        """Where the picture is, or will be."""
        return self.folder / self.drawing.name(prompt, seed)

    def save(self, prompt: str, seed: int, picture: np.ndarray) -> None:
        """Write a uint8 picture [H, W, 3]; it is there whole or not at all."""
        import io

        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        try:
            write_atomically(self.path(prompt, seed), buffer.getvalue())
        except OSError as error:
            raise CheckpointError(f"{self.path(prompt, seed)}: cannot be written: {error}") from error

    def load(self, shots: Sequence[tuple[str, int]]) -> np.ndarray:
        """Pictures uint8 [n, H, W, 3]. `CheckpointError` for one that is missing or damaged."""
        from PIL import Image

        found = []
        for path in (self.path(*shot) for shot in shots):
            try:
                with Image.open(path) as image:
                    found.append(np.asarray(image.convert("RGB")))
            except FileNotFoundError:
                raise CheckpointError(f"{path}: no such picture; draw it first") from None
            except (OSError, SyntaxError, ValueError) as error:  # PIL calls a torn PNG a syntax error
                raise CheckpointError(f"{path}: damaged ({error}); delete it and draw again") from error
        return np.stack(found) if found else np.zeros((0, 1, 1, 3), np.uint8)


def draw(
    pipe: Any,
    folder: PictureFolder,
    shots: Iterable[tuple[str, int]],
    *,
    batch: int = 16,
    team: Team | None = None,
    label: str = "drawing",
    progress: Progress | None = None,
) -> int:
    """Draw every (prompt, seed) that `folder` has no picture of; how many this process drew.

    Which shots share a batch depends on the list alone, so several processes draw what one draws, each its own
    batches, and all return when all are done.
    """
    team = team or Team()
    wanted = list(dict.fromkeys(shots))
    mine = [wanted[at : at + batch] for at in range(0, len(wanted), batch)][team.rank :: team.size]
    left = [[shot for shot in part if not folder.path(*shot).exists()] for part in mine]
    total, done = sum(map(len, left)), 0
    for part in left:
        if not part:
            continue
        for shot, picture in zip(part, _pictures(pipe, part, folder.drawing), strict=True):
            folder.save(*shot, picture)
        done += len(part)
        if progress is not None:
            progress(label, done, total)
    team.wait()
    return done


def _pictures(pipe: Any, shots: Sequence[tuple[str, int]], drawing: Drawing) -> np.ndarray:
    """uint8 [n, H, W, 3] from one call of the pipeline."""
    options: dict[str, Any] = {name: getattr(drawing, name) for name in ("height", "width") if getattr(drawing, name)}
    if drawing.negative:
        options["negative_prompt"] = [drawing.negative] * len(shots)
    options |= _pictures_given(pipe, len(shots), drawing)
    images = pipe(
        prompt=[prompt for prompt, _ in shots],
        num_inference_steps=drawing.steps,
        guidance_scale=drawing.guidance,
        generator=[torch.Generator().manual_seed(seed) for _, seed in shots],
        output_type="np",
        **options,
    ).images
    found = np.asarray(images, dtype=np.float64)
    if not np.isfinite(found).all():
        raise CheckpointError("the model drew NaN: its weights or its precision are not sound; try --dtype float32")
    return (found * 255).round().clip(0, 255).astype(np.uint8)


def _pictures_given(pipe: Any, count: int, drawing: Drawing) -> dict[str, Any]:
    """What an inpainting pipeline draws `count` whole pictures from: nothing, masked. `CheckpointError` for others that
    need a picture.
    """
    asked = inspect.signature(pipe.__call__).parameters
    if "image" not in asked:
        return {}
    if "mask_image" not in asked:
        raise CheckpointError(
            f"{type(pipe).__name__} draws from a picture beside the text; evaluate a text-to-image or inpainting one"
        )
    sample = getattr(pipe.unet.config, "sample_size", None) or 64
    sides = sample if isinstance(sample, (list, tuple)) else (sample, sample)
    height, width = (
        given or int(side) * pipe.vae_scale_factor
        for given, side in zip((drawing.height, drawing.width), sides, strict=True)
    )
    return {
        "image": torch.zeros(count, 3, height, width),
        "mask_image": torch.ones(count, 1, height, width),
        "height": height,
        "width": width,
        "strength": 1.0,
    }


def drawable(model: Any, revision: str | None = None) -> Any:
    """The folder of `model`, a path or hub id, that pictures can be drawn from; a loaded pipeline is given back.

    So that a model of another kind is told of before work is done on the first. Raises `CheckpointError`.
    """
    if not isinstance(model, (str, Path)):
        return model
    path = resolve(model, revision)
    if os.path.isfile(path) or path.suffix in (*PICKLES, ".safetensors"):
        raise CheckpointError(f"{path}: pictures are drawn from diffusers folders; convert the single file to one")
    read_json(path / "model_index.json")
    return path


def open_pipeline(
    model: str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    revision: str | None = None,
) -> Any:
    """A diffusers folder or hub id as a quiet pipeline without safety checker. Safetensors only. `CheckpointError`."""
    import diffusers
    import transformers

    path = drawable(model, revision)
    names = read_json(path / "model_index.json")
    without = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in names else {}
    with _quiet(diffusers.utils.logging, transformers.logging):
        try:
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                str(path),
                torch_dtype=dtype or torch.float32,
                local_files_only=True,
                use_safetensors=True,
                variant=variant,
                **without,
            )
        except Exception as error:  # diffusers raises many kinds for a damaged or foreign folder
            first = (str(error).strip().splitlines() or [""])[0]
            raise CheckpointError(f"{path}: cannot be loaded by diffusers: {first}") from error
    _pictures_given(pipe, 1, Drawing())
    pipe.set_progress_bar_config(disable=True)
    for module in modules_of(pipe).values():
        module.eval().requires_grad_(False)
    try:
        pipe.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has no error of its own for this
        first = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(f"device {device!r} cannot be used: {first}; leave --device out") from error
    for part in (pipe.unet, pipe.vae) if hasattr(pipe, "unet") else ():
        part.to(memory_format=torch.channels_last)  # faster convolutions, the same numbers
    return pipe


@contextlib.contextmanager
def _quiet(*logs: Any) -> Iterator[None]:
    """Without the bars and remarks of loading, nor diffusers' notice of a new name for `torch_dtype`."""
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)


def modules_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """The networks of a pipeline by name."""
    components = getattr(pipe, "components", {})
    return {name: part for name, part in sorted(components.items()) if isinstance(part, torch.nn.Module)}


def fingerprint(pipe: Any) -> str:
    """SHA-256 over every weight (name, dtype, bytes), the scheduler's settings and the tokenizers' vocabularies."""
    digest = hashlib.sha256(type(pipe).__name__.encode())
    for part, module in modules_of(pipe).items():
        for name, value in sorted(module.state_dict().items()):
            digest.update(f"{part}.{name}{value.dtype}{tuple(value.shape)}".encode())
            digest.update(to_bytes(value))
    for name, part in sorted(getattr(pipe, "components", {}).items()):
        if hasattr(part, "get_vocab"):
            digest.update(repr((name, sorted(part.get_vocab().items()))).encode())
    scheduler = getattr(pipe, "scheduler", None)
    config = {**getattr(scheduler, "config", {}), "class": type(scheduler).__name__}
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    return digest.hexdigest()
