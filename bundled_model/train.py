"""A model without training, and the steps that train it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from bundled_model.batches import stream
from bundled_model.curriculum import PHASES
from leattn.tiny.tokenizer import CHAT_END, EOS
from leattn.training import Collator, targets

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

HIDDEN, LAYERS, HEADS, KV_HEADS, MLP = 128, 4, 4, 2, 256
READY = 0.9
"""Running accuracy at which a phase is over."""


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of 0.7 million weights, input and output embedding shared."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("sdpa")  # the one that takes a boolean mask
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(CHAT_END)]
    look_back(model)
    return model


@torch.no_grad()
def look_back(model: LlamaForCausalLM, sharpness: float = 0.79, frequencies: int = 4) -> None:
    """Start the first head of layer 0 as one that looks at the token before.

    To answer from a text, a layer must first tell every token what stood before it; only then can a
    later one look for "what came after Zarvia". In trials from random weights alone the model was
    still guessing after 500 to 960 steps; from here it was right in 90 % of the pairs after 980.

    All embeddings get one direction in common, on which the head's queries and keys agree when the
    key is one position behind.
    """
    embedding = model.model.embed_tokens.weight  # [vocabulary, hidden]
    common = F.normalize(torch.randn(embedding.shape[1]), dim=0)
    embedding += common * embedding.std() * embedding.shape[1] ** 0.5
    attention = model.model.layers[0].self_attn
    size = attention.head_dim
    angle = model.model.rotary_emb.inv_freq[:frequencies]
    key, query = torch.zeros(size), torch.zeros(size)
    key[:frequencies] = 1
    # The key rotated back by one position; RoPE pairs dimension i with i + size / 2.
    query[:frequencies] = angle.cos()
    query[size // 2 : size // 2 + frequencies] = -angle.sin()
    attention.k_proj.weight[:size] += sharpness * torch.outer(key, common)
    attention.q_proj.weight[:size] += sharpness * torch.outer(query, common)


def loss_of(model: LlamaForCausalLM, batch: dict[str, torch.Tensor], endings: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The loss on the answers, scalar, and how many of them are right, 0 to 1.

    `endings`, ``[E]``, are the ids that may follow an answer: the full stop and the end, which are learnt at once and count
    little. Only the tokens that predict something go through the output embedding.
    """
    labels = batch.pop("labels")
    hidden = model.model(**batch, use_cache=False).last_hidden_state  # [B, S, hidden]
    answers = targets(labels, hidden.shape[1])
    logits = model.lm_head(hidden[answers.row, answers.column])  # [A, vocabulary]
    is_value = ~torch.isin(answers.id, endings)
    each = F.cross_entropy(logits, answers.id, reduction="none")
    loss = each[is_value].mean()
    if not is_value.all():
        loss = loss + 0.1 * each[~is_value].mean()
    return loss, float((logits[is_value].argmax(-1) == answers.id[is_value]).float().mean())


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    seed: int,
    batch_size: int,
    rate: float = 1e-3,
    decay_from: float = 0.55,
    first_phase: int = 0,
    checkpoint: Callable[[], None] = lambda: None,
) -> None:
    """Trains in place, with a progress bar; the last part of the steps lets the learning rate fall to zero.

    `checkpoint` is called every few hundred steps, so that an interrupted run leaves something.
    """
    from tqdm import tqdm

    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    phase, seen, running = first_phase, 0, 0.0
    began = time.monotonic()
    endings = torch.tensor(tokenizer.convert_tokens_to_ids([".", EOS, CHAT_END]))
    collate = Collator(model, tokenizer)
    model.train()
    with closing(stream(collate, seed, batch_size, lambda: phase)) as batches, tqdm(total=steps, mininterval=2) as bar:
        for step in range(1, steps + 1):
            batch = next(batches)
            fall = (steps - step) / (steps * (1 - decay_from))
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, step / 50, fall)
            loss, accuracy = loss_of(model, batch.tensors(), endings)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if batch.phase == phase:
                running = accuracy if seen == 0 else 0.95 * running + 0.05 * accuracy
                seen += 1
            if step % 250 == 0:
                checkpoint()
            bar.update()
            bar.set_postfix_str(f"{PHASES[phase]}, {100 * running:.0f} % right", refresh=False)
            if seen >= 30 and running > READY and phase < len(PHASES) - 1:
                bar.write(f"step {step}, {time.monotonic() - began:.0f} s: {PHASES[phase]} learnt")
                phase, seen = phase + 1, 0
    model.train(False)
    print(f"{steps} steps, {time.monotonic() - began:.0f} s, last phase: {PHASES[phase]}, {100 * running:.1f} % right")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes the folder anew: whoever reads it finds all of the old files or all of the new ones."""
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (out.with_name(f".{out.name}.{part}-{os.getpid()}") for part in ("new", "old"))
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh, save_jinja_files=False)
    for file in fresh.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner alone, and a package is for everyone
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)
