"""Several processes, one run.

    torchrun --nproc_per_node 8 train_rl.py --reward pav --policy DIR --verifier DIR --run-dir runs/big --shard
    torchrun --nproc_per_node 2 train_sft.py --task planted --device cpu --threads 1          # two CPU processes

One rule: every process holds the same numbers at the same line of the script. What is a row of a batch is dealt out and
gathered again (completions in sample.generate, values in pav.step_values, the loss in the three training steps); all else
(data, shuffling, rewards, advantages) each process computes for itself from the same seeds. Losses are sums over rows with
denominators of the whole batch, so gradients only add up, and N processes are one process up to the order of float additions.
Rank 0 alone writes: metrics, checkpoints, files of rollouts. If one process dies torchrun ends the others, and the same
command goes on from the last checkpoint, with any number of processes.

--shard: FSDP2 (torch.distributed.fsdp.fully_shard) keeps parameters, gradients and optimizer moments in N pieces and gathers one
layer at a time in training; for generation each process gathers all weights once a step, in their dtype. What that costs in
memory: docs/scale.md. Left out: sharded checkpoints (rank 0 writes whole ones, which transformers reads), sharding the KL
reference and the verifier, tensor and pipeline parallelism.

Without torchrun every function here is a no-op for one process.
"""

import copy
import os
import sys

import torch
import torch.distributed as dist

_whole = {}  # id of a sharded model -> (the model, its copy in one piece, refilled whenever it is asked for)


def size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    return dist.get_rank() if size() > 1 else 0


def size_asked():
    """Processes that torchrun started, before join()."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device):
    """Enter the process group that torchrun made room for -> this process' device. Its printing is rank 0's."""
    if size_asked() < 2 or dist.is_initialized():
        return device
    cuda = device.startswith("cuda")
    if cuda:
        device = f"cuda:{int(os.environ['LOCAL_RANK'])}"
        torch.cuda.set_device(device)  # before the process group, which takes the current one
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)
    return device


def leave(code=0):
    """The last line of a process: nothing for one alone, but for sys.exit where code is not 0; does not return among others.

    A good end waits for the others, whose last message would break. Then os._exit: destroy_process_group() frees nothing while
    anybody holds the group (FSDP's modules do, and the default arguments of torch.distributed.nn.functional, if torch.optim has
    imported it meanwhile), and gloo's threads, met by the interpreter's own end, abort it now and then with code -6."""
    if size() > 1:
        if code == 0:
            barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def barrier():
    if size() > 1:
        largest(0)  # an all-reduce on the CPU: dist.barrier() would want the GPU


def agreed(value):
    """Rank 0's opinion, in every process: whether a file exists must not depend on who looked first."""
    if size() == 1:
        return value
    box = torch.tensor([int(value)])
    dist.broadcast(box, 0)
    return bool(box.item())


# ----------------------------------------------------------------------------------------------------
# Rows: dealt out and gathered.


def share(n, r=None):
    """range of the rows of a batch of n that process r (default: this one) works on: neighbours, in order."""
    r, s = rank() if r is None else r, size()
    return range(n * r // s, n * (r + 1) // s)


def gather(part, n):
    """part [len(share(n)), ...] on the CPU -> [n, ...], the rows of all processes in order."""
    if size() == 1:
        return part
    longest = max(len(share(n, r)) for r in range(size()))
    padded = part.new_zeros(longest, *part.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in range(size())]
    dist.all_gather(parts, padded)
    return torch.cat([p[: len(share(n, r))] for r, p in enumerate(parts)])


def largest(number):
    """max over processes, of a number."""
    return _reduced([number], dist.ReduceOp.MAX)[0] if size() > 1 else number


def summed(numbers, maxima=()):
    """{name: number} -> the same, summed over processes; those named in maxima: the largest."""
    if size() == 1:
        return numbers
    add = {k: v for k, v in numbers.items() if k not in maxima}
    out = dict(zip(add, _reduced(list(add.values()), dist.ReduceOp.SUM)))
    return out | {k: largest(numbers[k]) for k in maxima if k in numbers}


def _reduced(values, op):
    box = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(box, op)
    return box.tolist()


# ----------------------------------------------------------------------------------------------------
# Gradients and sharded weights.


def is_sharded(model):
    return size() > 1 and any(isinstance(p, dist.tensor.DTensor) for p in model.parameters())


def shard(model):
    """Split every parameter over the processes, layer by layer (FSDP2). model: a Transformer, or a module with one in
    .backbone. To be called with the weights loaded and before the optimizer is made. One process: nothing happens."""
    if size() == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    _whole[id(model)] = (model, copy.deepcopy(model).requires_grad_(False))
    mesh = init_device_mesh(next(model.parameters()).device.type, (size(),))
    for layer in getattr(model, "backbone", model).layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(model):
    """A plain copy of a sharded model, gathered now, to generate with and to save; any other model: itself. Collective."""
    if not is_sharded(model):
        return model
    plain = _whole[id(model)][1]
    with torch.no_grad():
        for mine, theirs in zip(plain.parameters(), model.parameters()):
            mine.copy_(theirs.full_tensor())
    return plain


def full(tensor):
    """A DTensor in one piece, another tensor as it is. Collective."""
    return tensor.full_tensor() if size() > 1 and isinstance(tensor, dist.tensor.DTensor) else tensor


def like(parameter, tensor):
    """This process' piece of tensor, if parameter is sharded; else tensor on the parameter's device."""
    if size() > 1 and isinstance(parameter, dist.tensor.DTensor):
        return dist.tensor.distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    return tensor.to(parameter.device)


def backward(loss, model):
    """loss.backward(), for a loss that is this process' share of a sum. FSDP takes the mean over processes: undone here."""
    (loss * size() if is_sharded(model) else loss).backward()


def sum_gradients(params):
    """Add up the gradients of all processes, where FSDP has not done so: one all-reduce of all of them side by side."""
    grads = [p.grad for p in params if p.grad is not None]
    if size() == 1 or not grads or isinstance(grads[0], dist.tensor.DTensor):
        return
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for g, part in zip(grads, flat.split([g.numel() for g in grads])):
        g.copy_(part.view_as(g))


def clip(params, limit):
    """Clip to the global norm of the whole gradient; returns the norm before, a float."""
    return float(full(torch.nn.utils.clip_grad_norm_(params, limit)))
