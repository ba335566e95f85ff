"""``torch.export``: ``.pt2`` files that compilers (AOTInductor, ExecuTorch) and bare PyTorch read.

A graph cannot choose how to unpack, so it unpacks its 1-bit weights in every call, as TorchScript's ``small`` does; a
compiler may fold that away. Batch and length are dynamic.
"""

import io
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from bimamba_lit.binarize.formats import check_format
from bimamba_lit.export.deployable import deployable, extra_files
from bimamba_lit.export.deployed_model import DeployedLM
from bimamba_lit.export.options import check_is_file
from bimamba_lit.files import replacing
from bimamba_lit.models import MambaLM

_EXAMPLE = (3, 130)  # batch and length to trace with, neither special; the graph holds for any
_DYNAMIC: Any = Dim.DYNAMIC
_WHERE_FROM = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


class _Prefill(nn.Module):
    def __init__(self, model: DeployedLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return self.model.prefill(ids, [memory.clone() for memory in state])


class _Step(_Prefill):
    def forward(self, ids: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return self.model.step(ids, [memory.clone() for memory in state])


def export_pt2(
    lm: MambaLM, out: Path, tokenizer_json: str | None, dtype: str = "float16", embedding: str | None = None
) -> None:
    """Write a model as two programs: NAME.pt2 reads many tokens, NAME.step.pt2 one.

    Both take ids, (B, L) or (B,), and a state, and return logits and the new state. A state begins as zeros of the
    shapes in the extra file ``model.json``; ``tokenizer.json`` is another where there is a tokenizer.

    Args:
        lm: The model: latent, packed or in full precision.
        out: The first of the files to write.
        tokenizer_json: The tokenizer as the JSON text of its ``to_json()``.
        dtype: What everything that is not a sign is stored in.
        embedding: ``int8`` stores the embedding and the head as 8-bit integers with a scale a row.

    Raises:
        UserError: If the format cannot hold the model, an option is wrong, a weight does not fit ``dtype``, or the
            files cannot be written.
    """
    files = [out, out.with_name(f"{out.stem}.step.pt2")]
    for file in files:
        check_is_file(file, "pt2")
    check_format(lm, "pt2")
    model = deployable(lm, dtype, embedding)
    model.prepare("small")
    shapes_of_state = [list(memory.shape[1:]) for memory in model.init_state(1)]
    extra = extra_files(model, tokenizer_json, dtype=dtype, embedding=embedding, state=shapes_of_state)
    ids = torch.zeros(_EXAMPLE, dtype=torch.int64)
    state = model.init_state(len(ids))
    with ExitStack() as stack:  # both are written before the first is moved into place
        for file, module, example in zip(files, (_Prefill(model), _Step(model)), (ids, ids[:, 0]), strict=True):
            shapes = (dict.fromkeys(range(example.ndim), _DYNAMIC), [{0: _DYNAMIC}] * len(state))
            program = _traced(module, (example, state), shapes)
            content = io.BytesIO()  # where a disk is full, PyTorch's own writer ends the whole process
            torch.export.save(program, content, extra_files=extra)
            stack.enter_context(replacing(file)).write_bytes(content.getvalue())


def _traced(module: nn.Module, args: tuple[Any, ...], shapes: tuple[Any, ...]) -> ExportedProgram:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of PyTorch's own inner workings
        program = torch.export.export(module, args, dynamic_shapes=shapes, strict=False)
    for inner in program.graph_module.modules():
        if isinstance(inner, torch.fx.GraphModule):
            for node in inner.graph.nodes:  # where in whose files an op comes from: nine tenths of a small archive
                for key in _WHERE_FROM:
                    node.meta.pop(key, None)
    program.example_inputs = None
    return program
