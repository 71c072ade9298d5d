"""Answers of any model to given prompts, outside of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gkd.config import DROPPABLE, DataConfig
from gkd.data import load_prompts, render_message
from gkd.engines.sampling import SamplerSpec
from gkd.models import end_token_ids, load_tokenizer, pad_token_id, read_config, read_generation_config, resolve_model
from gkd.rollout.offline import start_sampler
from gkd.seeding import derive_seed
from gkd.types import Prompt, SampleRequest, SamplingSettings


def generate_answers(
    model: str,
    *,
    messages: Sequence[str],
    file: Path | None,
    engine: str,
    dtype: str,
    settings: SamplingSettings,
    samples: int,
    seed: int,
) -> list[dict[str, str | int]]:
    """`prompt`, `sample` and `completion` for every sample; `messages` are user messages, `file` is training data.

    Raises ModelError or DataError.
    """
    path = resolve_model(model, key="MODEL")
    config = read_config(path, key="MODEL")
    tokenizer = load_tokenizer(path, key="MODEL")
    context = getattr(config, "max_position_embeddings", None) or 4096
    limits = DataConfig(  # pyright: ignore[reportCallIssue]
        train=str(file or model),
        max_prompt_tokens=max(1, context - settings.max_new_tokens),
        allow_dropped=list(DROPPABLE),  # said, and answered as the model's own template has it
    )
    prompts: list[Prompt] = [render_message(text, tokenizer) for text in messages]
    if file is not None:
        prompts += load_prompts(str(file), "train", tokenizer, limits, key="--file").prompts
    settings = replace(settings, stop_token_ids=end_token_ids(tokenizer, read_generation_config(path), config))
    sampler = start_sampler(
        SamplerSpec(
            engine=engine,
            model_folder=path,
            dtype=dtype,
            max_model_tokens=min(context, max(len(p.token_ids) for p in prompts) + settings.max_new_tokens),
            pad_token_id=pad_token_id(tokenizer),
        )
    )
    draws = [(prompt, sample) for prompt in prompts for sample in range(samples)]
    requests = [
        SampleRequest(prompt.token_ids, derive_seed(seed, "generate", place, sample))
        for place, (prompt, sample) in enumerate(draws)
    ]
    completions = sampler.generate(requests, settings)
    sampler.close()
    return [
        {
            "prompt": prompt.text,
            "sample": sample,
            "completion": tokenizer.decode(list(completion.token_ids), skip_special_tokens=True).strip(),  # pyright: ignore
        }
        for (prompt, sample), completion in zip(draws, completions, strict=True)
    ]
