"""``teacher-logits``: a recipe's teacher is run over the recipe's training text once, for any number of students."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import default_collate

from bimamba_lit.data import TextDataModule
from bimamba_lit.data.blocks import TrainBlocks
from bimamba_lit.distill import load_teacher
from bimamba_lit.distill.store_teacher import Batch, sequences_a_shard, sha256_of, store_teacher
from bimamba_lit.distill.stored_teacher import Manifest
from bimamba_lit.errors import UserError
from bimamba_lit.training.command_line import CommandLine, build
from bimamba_lit.training.distill import Distill

COMMAND = "teacher-logits"
DESCRIPTION = "Run a recipe's teacher over its training text once, and keep its likeliest tokens for students to learn."


def run(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: The arguments after it.

    Raises:
        UserError: If a setting or a file is not right.
    """
    parser = argparse.ArgumentParser(
        prog=f"bimamba {COMMAND}",
        usage=f"bimamba {COMMAND} -c RECIPE.yaml --out DIR [--top_k K] [--key value ...]",
        description=DESCRIPTION + " Train from them with --model.teacher=DIR.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write; one begun is gone on with")
    parser.add_argument("--top_k", type=int, default=64, help="tokens kept of each position (default: %(default)s)")
    own, recipe = parser.parse_known_args(list(args))
    command_line = build(COMMAND, "fit", recipe, _Built)
    model, data = command_line.model, command_line.datamodule
    if not isinstance(model, Distill):
        raise UserError(
            f"{COMMAND}: the recipe's model must be Distill, whose teacher is asked, not {type(model).__name__}"
        )
    if not isinstance(data, TextDataModule):
        raise UserError(f"{COMMAND}: the recipe's data must be a TextDataModule, whose sequences have numbers")
    if model.stored is not None:
        raise UserError(f"model.teacher: {model.stored.folder} holds logits already: give the teacher itself")
    _write(model, data, command_line.trainer, Path(own.out), own.top_k)


class _Built(CommandLine):
    """Builds what a recipe says and runs nothing."""

    def before_instantiate_classes(self) -> None:
        """Make no run folder."""

    def instantiate_trainer(self, **_: Any) -> Any:
        """Build the trainer, for its device and precision."""
        return self.make_trainer(logger=False, callbacks=[])

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def _write(model: Distill, data: TextDataModule, trainer: Any, out: Path, top_k: int) -> None:
    if trainer.world_size > 1:
        raise UserError(
            f"trainer.devices: {COMMAND} runs on one device: set --trainer.devices=1, and start it once for each "
            "device with the same --out: every process takes shards that no other has"
        )
    assert model.teacher_path is not None
    if not 1 <= top_k <= data.vocab_size:
        raise UserError(f"--top_k: {top_k} is out of range, it must be 1 to the {data.vocab_size} of the vocabulary")
    data.setup("fit")
    blocks = data.train_blocks()
    teacher = load_teacher(model.teacher_path, data.vocab_size, data.tokenizer.to_json())
    manifest = Manifest(
        teacher=model.teacher_path,
        teacher_sha256=sha256_of(teacher),
        tokenizer=data.tokenizer.to_json(),
        data=data.training_data(),
        vocab_size=data.vocab_size,
        top_k=top_k,
        temperature=model.temperature,
        context=data.context,
        sequences=sum(blocks.counts),
        sequences_a_shard=sequences_a_shard(top_k, data.vocab_size, data.context),
    )
    device = trainer.strategy.root_device
    teacher.to(device)

    def batches(numbers: range) -> Iterator[Batch]:
        for batch in _batches(blocks, numbers, data.batch_size):
            yield {name: tensor.to(device) for name, tensor in batch.items()}

    done = store_teacher(teacher, batches, out, manifest, trainer.precision_plugin.forward_context)
    if done:
        size = sum(file.stat().st_size for file in out.iterdir())
        tokens = manifest.sequences * manifest.context
        print(
            f"{out}: {manifest.sequences:,} sequences of {manifest.context} tokens, {size / 1e9:.3g} GB, "
            f"{size / tokens:.0f} bytes a token; train from it with --model.teacher={out}"
        )


def _batches(blocks: TrainBlocks, numbers: range, size: int) -> Iterator[Batch]:
    for first in range(0, len(numbers), size):
        yield default_collate([blocks[number] for number in numbers[first : first + size]])
