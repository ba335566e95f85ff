"""The quickstart: the commands that the README shows one by one, run one after another in one process.

A step whose run is finished is passed over and one that was interrupted is resumed, so that it can be run again.
"""

import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from bimamba_lit.cli import main

TEACHER, STUDENT = "runs/quickstart_teacher", "runs/quickstart_student"
UNTRAINED, UNTRAINED_SIGN = "runs/quickstart_untrained", "runs/quickstart_untrained_sign"
COMPARISON = "runs/quickstart_comparison"
EXPORTED = "runs/quickstart_student.pt"

STEPS = [
    ("A Mamba-2 teacher in full precision, trained on bytes", "fit -c recipes/quickstart_teacher.yaml", TEACHER),
    ("Its 1-bit student, distilled from it (Bi-Mamba's scheme)", "fit -c recipes/quickstart_student.yaml", STUDENT),
    (
        "The teacher binarized without training: signs with a scale per row",
        "validate -c recipes/quickstart_untrained.yaml --model.binarizer=ScaledSign",
        UNTRAINED,
    ),
    (
        "The teacher binarized without training: signs alone",
        "validate -c recipes/quickstart_untrained.yaml --model.binarizer=Sign "
        f"--trainer.default_root_dir={UNTRAINED_SIGN}",
        UNTRAINED_SIGN,
    ),
    ("Side by side", f"compare {TEACHER} {STUDENT} {UNTRAINED} {UNTRAINED_SIGN} --out {COMPARISON}", None),
    ("What the student writes", f"generate --ckpt {STUDENT} --prompt 'def ' --max_new_tokens 240", None),
    (
        "The student as one file for where this package is not",
        f"export --ckpt {STUDENT} --format torchscript --out {EXPORTED}",
        None,
    ),
]

BARE = """
import os, sys, time
sys.modules["bimamba_lit"] = None  # importing it fails
import torch
model = torch.jit.load(sys.argv[1])
print(f"{sys.argv[1]}: {os.path.getsize(sys.argv[1]) / 1024:.0f} KiB; tokens a second:", end="")
prompt = torch.tensor([list(b"def ")])
for mode in ("exact", "fast", "small"):
    model.prepare(mode)
    for _ in range(2):  # the first run is profiled, the second compiled
        model.generate(prompt, 8, 0.8)
    start = time.perf_counter()
    model.generate(prompt, 200, 0.8)
    print(f" {200 / (time.perf_counter() - start):.0f} ({mode})", end="")
print()
"""

NEXT = f"""
**Where everything lies**

* `{TEACHER}`, `{STUDENT}`: `config.yaml`, `checkpoints/last.ckpt`, `metrics.csv`, `samples.md`, `summary.json`
* `{COMPARISON}/report.md`, `report.csv`, `report.png`: the table above and its plot
* `{EXPORTED}`: the student as TorchScript; `torch.jit.load` is all it needs

**What to do next**

* Swap the binarizer: `bimamba fit -c recipes/quickstart_student.yaml --model.binarizer=ScaledSign`
* Watch signs flip and scales move: `tensorboard --logdir runs`
* Share it, with a model card: `bimamba share {STUDENT} --out my_student`
* Distill on your own text: `bimamba recipes cp distill .`, then edit the copy
"""


def quickstart() -> None:
    """Run every step and say where the results lie; a step that fails ends the program with its one sentence."""
    console = Console()
    start = time.monotonic()
    for title, command, folder in STEPS:
        console.rule(f"[bold]{title}", align="left")
        console.print(f"$ bimamba {command}\n", style="bold cyan", highlight=False, soft_wrap=True)
        args = shlex.split(command)
        if folder is not None and (Path(folder) / "summary.json").is_file():
            console.print(f"{folder} is finished already; `make clean` to start over\n")
            continue
        if args[0] == "fit" and folder is not None and (Path(folder) / "checkpoints" / "last.ckpt").is_file():
            args += ["--ckpt_path", "last"]
        main(args)
        console.print()
    console.rule("[bold]The file in a Python that cannot import this package", align="left")
    subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", BARE, EXPORTED], check=True)
    console.rule(align="left")
    console.print(Markdown(NEXT))
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    console.print(f"\nDone in {minutes} min {seconds} s.")


if __name__ == "__main__":
    quickstart()
