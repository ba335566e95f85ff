"""Training a model whose weights are spread over devices (FSDP2), for Lightning's ``ModelParallelStrategy``.

Every block is gathered when it is needed and let go after; the embedding, the final norm and the head belong to the
whole step, since the loss reads the head. Gathered weights are in fp32 and computation is in the trainer's precision
(``bf16-mixed`` is autocast), so the figures are those of one device up to the order of sums.
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from bimamba_lit.distill import CausalTeacher
from bimamba_lit.errors import UserError
from bimamba_lit.models import MambaLM

_STEPS = ("training_step", "validation_step")


def shard_(module: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the parameters of ``module`` over the data-parallel devices of ``mesh``, in place.

    The marks on parameters (``_no_weight_decay``) stay. Every process must hold the same values before, which a common
    seed gives.

    Args:
        module: A module with ``training_step`` and ``validation_step``, which is its forward pass.
        mesh: Lightning's mesh, with the dimensions ``data_parallel`` and ``tensor_parallel``.

    Raises:
        UserError: If the mesh asks for tensor parallelism.
    """
    if (tensor := mesh["tensor_parallel"].size()) > 1:
        raise UserError(
            f"trainer.strategy: tensor_parallel_size is {tensor}, and weights are sharded over data-parallel devices "
            "only: set data_parallel_size to the number of devices and tensor_parallel_size to 1"
        )
    marks = {name: dict(parameter.__dict__) for name, parameter in module.named_parameters()}
    over = mesh["data_parallel"]
    _shard_blocks(module, over)
    fully_shard(module, mesh=over)
    for name, parameter in module.named_parameters():
        parameter.__dict__.update(marks[name])
    for step in _STEPS:
        register_fsdp_forward_method(module, step)


class ShardedTeacher(nn.Module):
    """A frozen teacher spread over devices: its blocks are gathered one after another, its head for the loss.

    Args:
        teacher: The teacher, whole and with the same values in every process.
        mesh: Lightning's mesh.
    """

    def __init__(self, teacher: MambaLM | CausalTeacher, mesh: DeviceMesh) -> None:
        super().__init__()
        self.whole = teacher
        over = mesh["data_parallel"]
        _shard_blocks(teacher, over)
        fully_shard(self, mesh=over, reshard_after_forward=True)

    @property
    def device(self) -> torch.device:
        """Where this process's part of the weights is."""
        return self.whole.device

    def forward(
        self, input_ids: Tensor, seq_idx: Tensor | None, with_residuals: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return hidden states ``(B, L, D)``, the head ``(V, D)`` and, if wanted, the residual stream after each block.

        The head is a copy, which outlives what is gathered.
        """
        residuals: list[Tensor] = []
        wanted = {"residuals": residuals} if with_residuals else {}
        hidden = self.whole.backbone(input_ids, seq_idx=seq_idx, **wanted)
        return hidden, self.whole.head_weight.clone(), residuals


def _shard_blocks(model: nn.Module, over: DeviceMesh) -> None:
    """Spread every block of a model, each to be gathered by itself."""
    stacks = [child for child in model.modules() if isinstance(child, nn.ModuleList)]
    for stack in reversed(stacks):  # those inside of others first
        for block in stack:
            fully_shard(block, mesh=over)
