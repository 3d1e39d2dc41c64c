"""A policy in shards (FSDP2): two ranks on CPU, each a process with half of every tensor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn

from hyper_model.audio_encoder import LogMel
from hyper_model.checkpoint import open_checkpoint
from hyper_model.trace import build_prompt
from training.policy import branch, load_tensors, named_tensors, open_policy, pack


def batch(directory: Path) -> dict[str, Any]:
    tokenizer = open_checkpoint(directory, verify=False).tokenizer
    prompt = build_prompt(tokenizer, "What is heard?")
    samples_S = np.random.default_rng(0).standard_normal(16_000).astype(np.float32) * 0.1
    written = [[70, 71, 72], [80, 81]]
    row = branch(prompt, [(each, each) for each in written], prompt.index(tokenizer.audio_id), 0)
    return pack([row], [LogMel(80)(samples_S)], pad_id=0, is_encoded=False)


def step(model: Any, directory: Path) -> float:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = -model(**batch(directory)).logprobs_N.mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def run_rank(rank: int, directory: Path, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    policy: Any = open_policy(open_checkpoint(directory, verify=False))
    for layer in policy.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in policy.parameters())
    before = {name: tensor.clone() for name, tensor in named_tensors(policy)}
    loss = step(policy, directory)
    after = {name: tensor.clone() for name, tensor in named_tensors(policy)}
    # And back again, as in a resumed run.
    load_tensors(policy, before.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(policy))
    torch.save({"loss": loss, "after": after}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_sharded_policy_takes_the_step_of_a_whole_one(random_checkpoint: Path, tmp_path: Path) -> None:
    spawn(run_rank, (random_checkpoint, tmp_path), nprocs=2)
    whole = open_policy(open_checkpoint(random_checkpoint, verify=False))
    loss = step(whole, random_checkpoint)
    expected = dict(named_tensors(whole))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert abs(found["loss"] - loss) < 1e-4
        assert found["after"].keys() == expected.keys()
        for name, tensor in found["after"].items():
            torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-3, msg=name)
