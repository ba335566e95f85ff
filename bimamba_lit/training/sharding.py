"""Training a model whose weights are spread over devices (FSDP2), for Lightning's ``ModelParallelStrategy``.

Every block is gathered when it is needed and let go after; the embedding, the final norm and the head belong to the
whole step, since the loss reads the head. Gathered weights are in fp32 and computation is in the trainer's precision
(``bf16-mixed`` is autocast), so the figures are those of one device up to the order of sums.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from bimamba_lit.errors import UserError
from bimamba_lit.models.lm import Block

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
    for block in [child for child in module.modules() if isinstance(child, Block)]:
        fully_shard(block, mesh=over)
    fully_shard(module, mesh=over)
    for name, parameter in module.named_parameters():
        parameter.__dict__.update(marks[name])
    for step in _STEPS:
        register_fsdp_forward_method(module, step)
