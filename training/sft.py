"""Stage I: trains projector and decoder to write the perceptual trace, over the frozen encoder's precomputed states.

Axes: B sequences of a batch, T positions, A audio tokens, D encoder width, H hidden width, V vocabulary.
Plain token-normalised cross entropy on the trace; prompt, audio and latent tokens carry none. Sequences are drawn anew
each step (clip, then question), so what a step sees depends on the seed and the step alone: that is what resume needs.
Knows nothing of synthesizers, scenes' sound or the engine.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.spawn import spawn
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM

from hyper_model.trace import TraceTokenizer
from training import lean
from training.assets import MissingDataError
from training.clips import Clip, open_clips
from training.questions import draw_example
from training.recipes import SftRecipe
from training.tokens import IGNORED, build_tokenizer, encode_example

ENCODER_WIDTH = 384


class MiniPolicy(nn.Module):
    """The trained half of the embedded checkpoint: Qwen2-Audio's linear projector and a small Qwen2 decoder."""

    def __init__(self, recipe: SftRecipe, vocab_size: int) -> None:
        super().__init__()
        self.projector = nn.Linear(ENCODER_WIDTH, recipe.hidden_size)
        self.decoder = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=vocab_size,
                hidden_size=recipe.hidden_size,
                intermediate_size=recipe.ffn_size,
                num_hidden_layers=recipe.num_layers,
                num_attention_heads=recipe.num_heads,
                num_key_value_heads=recipe.num_kv_heads,
                max_position_embeddings=2048,
                tie_word_embeddings=True,
                use_cache=False,
            )
        )

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the summed cross entropy of the batch's labelled positions."""
        embedded_BTH = self.decoder.get_input_embeddings()(batch.token_ids_BT)
        audio_NH = self.projector(batch.states_ND.to(self.projector.weight.dtype))
        embedded_BTH = embedded_BTH.masked_scatter(batch.is_audio_BT[..., None], audio_NH)
        # Padding stands right of every label and attention is causal, so no mask is needed.
        hidden_BTH = lean.hidden_states(self.decoder, embedded_BTH)
        has_loss_BT = batch.labels_BT != IGNORED
        logits_NV = self.decoder.lm_head(hidden_BTH[has_loss_BT])
        return nn.functional.cross_entropy(logits_NV.float(), batch.labels_BT[has_loss_BT], reduction="sum")


class Batch:
    """Right-padded sequences with the clips' states flattened in order of their audio positions."""

    def __init__(self, rows: list[tuple[list[int], list[int], int, torch.Tensor]], pad_id: int) -> None:
        lengths = [len(ids) - 1 + len(states) for ids, _, _, states in rows]
        shape = (len(rows), max(lengths))
        self.token_ids_BT = torch.full(shape, pad_id)
        self.labels_BT = torch.full(shape, IGNORED)
        self.is_audio_BT = torch.zeros(shape, dtype=torch.bool)
        for b, (ids, labels, at, states) in enumerate(rows):
            end, length = at + len(states), lengths[b]
            self.token_ids_BT[b, :at] = torch.tensor(ids[:at])
            self.token_ids_BT[b, end:length] = torch.tensor(ids[at + 1 :])
            self.labels_BT[b, :at] = torch.tensor(labels[:at])
            self.labels_BT[b, end:length] = torch.tensor(labels[at + 1 :])
            self.is_audio_BT[b, at:end] = True
        self.states_ND = torch.cat([states for *_, states in rows])


class ExampleStream:
    """Draws the training batches: over the same clips, step s sees the same sequences whenever it is run."""

    def __init__(self, clips: list[Clip], tokenizer: TraceTokenizer, recipe: SftRecipe) -> None:
        self.clips, self.tokenizer, self.recipe = clips, tokenizer, recipe

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Draw the batch of a step, or one process's share of it."""
        recipe = self.recipe
        # One pass over the clips in a shuffled order each epoch, sorted by length inside a window of eight batches:
        # padding costs time, and a window keeps the order random enough.
        window_steps = 8
        window, place = divmod(step, window_steps)
        size = recipe.batch_size * window_steps
        indices = [self._clip_index(window * size + i) for i in range(size)]
        indices.sort(key=lambda i: self.clips[i].num_tokens)
        batches = [indices[i * recipe.batch_size : (i + 1) * recipe.batch_size] for i in range(window_steps)]
        random.Random(f"{recipe.seed}/window/{window}").shuffle(batches)
        rng = random.Random(f"{recipe.seed}/step/{step}")
        seeds = [rng.getrandbits(32) for _ in batches[place]]
        mine = list(zip(batches[place], seeds, strict=True))[rank::world_size]
        return Batch([self._row(i, random.Random(seed)) for i, seed in mine], self.tokenizer.end_of_text_id)

    def _clip_index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.clips))
        if getattr(self, "_epoch", None) != epoch:
            self._order = list(range(len(self.clips)))
            random.Random(f"{self.recipe.seed}/epoch/{epoch}").shuffle(self._order)
            self._epoch = epoch
        return self._order[place]

    def _row(self, index: int, rng: random.Random) -> tuple[list[int], list[int], int, torch.Tensor]:
        clip = self.clips[index]
        example = draw_example(clip.scene, rng)
        encoded = encode_example(self.tokenizer, example, latent_tokens=self.recipe.latent_tokens)
        states = clip.states(ENCODER_WIDTH).float()
        for _ in range(round(self.recipe.dropout_states * len(states) / 3)):
            start = rng.randrange(len(states))
            states[start : start + 3] = 0.0
        return encoded.token_ids, encoded.labels, encoded.audio_position, states


def learning_rate(step: int, recipe: SftRecipe) -> float:
    """Linear warm-up, then cosine to `min_learning_rate`."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = min(1.0, (step - recipe.warmup_steps) / max(1, recipe.num_steps - recipe.warmup_steps))
    span = recipe.learning_rate - recipe.min_learning_rate
    return recipe.min_learning_rate + span * 0.5 * (1.0 + math.cos(math.pi * progress))


class SftTrainer:
    """Owns policy, optimizer and step; saves and resumes them.

    The policy is float32; forward and backward run on a bfloat16 copy. With several processes each takes every n-th
    sequence of a batch and gradients are summed, so a step means the same whatever their number.

    Args:
        run_dir: where `tokenizer.json`, `state.pt`, `recipe.json` and `log.jsonl` live; a run found there is resumed.
        rank: this process's number; 0 alone writes files.
    """

    def __init__(
        self, recipe: SftRecipe, clips_folder: Path, run_dir: Path, *, rank: int = 0, world_size: int = 1
    ) -> None:
        self.recipe, self.run_dir, self.rank, self.world_size = recipe, run_dir, rank, world_size
        self.clips_folder = clips_folder
        self.clips = list(open_clips(clips_folder, ENCODER_WIDTH))
        self.tokenizer = TraceTokenizer.from_file(run_dir / "tokenizer.json")
        torch.manual_seed(recipe.seed)
        self.policy = MiniPolicy(recipe, self.tokenizer.vocab_size)
        self.working = copy.deepcopy(self.policy).to(torch.bfloat16)
        decayed = [p for p in self.policy.parameters() if p.dim() > 1]
        others = [p for p in self.policy.parameters() if p.dim() <= 1]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)
        self.step = 0
        if (run_dir / "state.pt").exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.run_dir / "state.pt", weights_only=True)
        self.policy.load_state_dict(state["policy"], strict=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        for working, master in zip(self.working.parameters(), self.policy.parameters(), strict=True):
            working.copy_(master)

    def save(self) -> None:
        """Write the state beside the old one and rename it into place."""
        partial = self.run_dir / "state.pt.partial"
        torch.save(
            {"policy": self.policy.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}, partial
        )
        partial.rename(self.run_dir / "state.pt")

    def train_step(self, batch: Batch) -> float:
        """Take one optimizer step on this process's share of a batch; returns the mean loss of the whole batch.

        Raises:
            FloatingPointError: the loss is not finite; the state on disk stays the last good one.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.recipe)
        loss_sum = self.working(batch)
        loss_sum.backward()
        masters = list(self.policy.parameters())
        # One buffer: every gradient, then the loss and its number of positions.
        totals = torch.tensor([loss_sum.item(), float((batch.labels_BT != IGNORED).sum())])
        gradients = [p.grad.flatten().float() for p in self.working.parameters() if p.grad is not None]
        buffer = torch.cat([*gradients, totals])
        if self.world_size > 1:
            torch.distributed.all_reduce(buffer)
        loss = float(buffer[-2] / buffer[-1])
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss {loss} at step {self.step}")
        buffer /= buffer[-1].clone()
        offset = 0
        for master in masters:
            master.grad = buffer[offset : offset + master.numel()].view_as(master)
            offset += master.numel()
        nn.utils.clip_grad_norm_(masters, self.recipe.max_grad_norm)
        self.optimizer.step()
        self.working.zero_grad(set_to_none=True)
        self._refresh()
        self.step += 1
        return loss

    def train(self) -> None:
        """Run to the recipe's last step, with a progress bar, a log line every 20 steps and regular saves."""
        stream = ExampleStream(self.clips, self.tokenizer, self.recipe)
        saved_s, smooth = time.monotonic(), None
        is_writer = self.rank == 0
        log_file = self.run_dir / "log.jsonl" if is_writer else Path("/dev/null")
        with (
            tqdm(
                total=self.recipe.num_steps, initial=self.step, desc="Stage I", unit="step", disable=not is_writer
            ) as bar,
            log_file.open("a", encoding="utf-8") as log,
        ):
            while self.step < self.recipe.num_steps:
                started_s = time.monotonic()
                loss = self.train_step(stream.batch(self.step, self.rank, self.world_size))
                smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
                bar.update()
                if is_writer and self.step % 20 == 0:
                    seconds = time.monotonic() - started_s
                    bar.set_postfix(loss=f"{smooth:.3f}")
                    log.write(json.dumps({"step": self.step, "loss": loss, "smooth": smooth, "step_s": seconds}) + "\n")
                    log.flush()
                if is_writer and time.monotonic() - saved_s > self.recipe.save_every_s:
                    self.save()
                    saved_s = time.monotonic()
        if is_writer:
            self.save()


def prepare_run(recipe: SftRecipe, clips_folder: Path, run_dir: Path) -> None:
    """Write the run's recipe and, once, its tokenizer.

    Raises:
        MissingDataError: there are no clips to train on, or the run there was made by another recipe.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(recipe), indent=2) + "\n"
    recipe_file = run_dir / "recipe.json"
    if recipe_file.exists() and recipe_file.read_text(encoding="utf-8") != text:
        raise MissingDataError(f"{run_dir} was trained by another recipe: remove it, or choose another work folder")
    recipe_file.write_text(text, encoding="utf-8")
    if (run_dir / "tokenizer.json").exists():
        return
    clips = list(itertools.islice(open_clips(clips_folder, ENCODER_WIDTH), 4_000))
    if not clips:
        raise MissingDataError(f"no clips in {clips_folder}: build them first (make scenes)")
    rng = random.Random(recipe.seed)
    tokenizer = build_tokenizer((draw_example(clip.scene, rng) for clip in clips), recipe.vocab_size)
    tokenizer.save(str(run_dir / "tokenizer.json"))


def _train_rank(rank: int, recipe: SftRecipe, clips_folder: Path, run_dir: Path, world_size: int) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        rendezvous = f"file://{(run_dir / 'rendezvous').resolve()}"
        torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    SftTrainer(recipe, clips_folder, run_dir, rank=rank, world_size=world_size).train()
    if world_size > 1:
        torch.distributed.destroy_process_group()


def train(recipe: SftRecipe, clips_folder: Path, run_dir: Path, *, num_processes: int = 1) -> None:
    """Train a recipe to its end, resuming a run found in `run_dir`; one process a core is fastest on CPU."""
    prepare_run(recipe, clips_folder, run_dir)
    (run_dir / "rendezvous").unlink(missing_ok=True)
    num_processes = min(num_processes, recipe.batch_size)
    arguments = (recipe, clips_folder, run_dir, num_processes)
    if num_processes == 1:
        _train_rank(0, *arguments)
    else:
        spawn(_train_rank, arguments, nprocs=num_processes)
