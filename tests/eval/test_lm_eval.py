import json
import lzma
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from bimamba_lit import MambaConfig, MambaLM
from bimamba_lit.binarize import FBI, binarize_, pack_
from bimamba_lit.data.tokenizer import ByteTokenizer
from bimamba_lit.errors import UserError
from bimamba_lit.eval import zeroshot
from bimamba_lit.eval.lm_eval_adapter import BimambaLM
from bimamba_lit.eval.zeroshot import COLUMNS, build_task, find_tasks, rows_of, run_tasks

BYTES = ByteTokenizer()
LETTERS = {"text": ["sand", "a stone", "water"], "label": ["A", "B", "C"]}
ROWS: dict[str, list[dict[str, Any]]] = {
    "piqa": [
        {"goal": "Cool a drink", "sol1": "add ice", "sol2": "add a hot stone", "label": 0},
        {"goal": "Open a jar ", "sol1": "sing", "sol2": "turn its lid", "label": 1},
        {"goal": "Dry hands", "sol1": "use a towel", "sol2": "use a lake", "label": 0},
    ],
    "winogrande": [{"sentence": "Ann thanked Bea as _ had helped.", "option1": "Ann", "option2": "Bea", "answer": "2"}],
    "openbookqa": [{"question_stem": "Plants drink", "choices": LETTERS, "answerKey": "C"}],
    "arc_easy": [{"question": "What is wet?", "choices": LETTERS, "answerKey": "C"}],
    "arc_challenge": [{"question": "What is hard?", "choices": LETTERS, "answerKey": "B"}],
    "boolq": [{"passage": "Ice -- Ice is cold.", "question": "is ice hot", "label": 0}],
    "hellaswag": [
        {
            "activity_label": "Tea",
            "ctx_a": "A kettle [title] boils.",
            "ctx_b": "the man",
            "endings": ["pours it.", "sleeps  [step] well.", "runs.", "sings."],
            "label": "1",
        }
    ],
}
# Prompt, and answers or (for WinoGrande) prompts and the answer, as lm-eval's definitions render them.
RENDERED = {
    "piqa": ("Question: Cool a drink\nAnswer:", [" add ice", " add a hot stone"]),
    "openbookqa": ("Plants drink", [" sand", " a stone", " water"]),
    "arc_easy": ("Question: What is wet?\nAnswer:", [" sand", " a stone", " water"]),
    "arc_challenge": ("Question: What is hard?\nAnswer:", [" sand", " a stone", " water"]),
    "boolq": ("Ice -- Ice is cold.\nQuestion: is ice hot?\nAnswer:", [" no", " yes"]),
    "hellaswag": ("Tea: A kettle. boils. The man", [" pours it.", " sleeps  well.", " runs.", " sings."]),
}


def build(**options: object) -> MambaLM:
    torch.manual_seed(1)
    sizes = {"d_model": 32, "n_layer": 2, "d_state": 16, "vocab_size": 257} | options
    return MambaLM(MambaConfig(**sizes)).eval()


@pytest.fixture(scope="module")
def lm() -> MambaLM:
    return build(headdim=16, chunk_size=16)


def ask(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, 0, ("task", 0, 1)) for args in arguments]


@torch.no_grad()
def plain(lm: MambaLM, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Full forward in one go, log-probabilities in float64."""
    logits = lm(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1].double()
    ids = torch.tensor(continuation)
    return float(logits.log_softmax(-1).gather(1, ids[:, None]).sum()), bool((logits.argmax(-1) == ids).all())


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("options", [{"headdim": 16, "chunk_size": 16}, {"mixer": "mamba"}], ids=["mamba2", "mamba1"])
def test_log_likelihoods_are_those_of_a_full_forward(options, batch_size):
    lm = build(**options)
    greedy = chr(int(lm(torch.tensor([list(b"The cat")])).logits[0, -1, :128].argmax()))
    pairs = [
        ("The cat", " sat"),
        ("The cat", " slept on the mat, été"),
        ("The cat", greedy),
        ("The dog", " ran"),
        ("", "No context"),
        ("A longer context with its trailing space ", "moved"),
        ("The cat", " sat"),
    ]
    found = BimambaLM(lm, BYTES, batch_size).loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (nats, likeliest) in zip(pairs, found, strict=True):
        # As lm-eval has it: nothing stands before an empty context but the token that ends texts, and spaces that end a
        # context belong to what follows.
        spaces = " " * (len(context) - len(context.rstrip()))
        ids = list(context.rstrip().encode()) or [256]
        expected = plain(lm, ids, list((spaces + continuation).encode()))
        assert nats == pytest.approx(expected[0], rel=1e-5) and likeliest == expected[1]


def test_long_contexts_lose_their_beginning(lm):
    adapter = BimambaLM(lm, BYTES, max_length=10)
    (found,) = adapter.loglikelihood(ask("loglikelihood", ("0123456789abcdef", "xyz")), disable_tqdm=True)
    assert found[0] == pytest.approx(plain(lm, list(b"89abcdef"), list(b"xyz"))[0], rel=1e-5)
    with pytest.raises(UserError, match="continuation has 12 tokens and max_length is 10"):
        adapter.loglikelihood(ask("loglikelihood", ("0", "123456789abc")), disable_tqdm=True)


def test_rolling_counts_every_token_once(lm):
    text = "0123456789abcdefghijklm"
    adapter = BimambaLM(lm, BYTES, max_length=10, batch_size=2)
    found = adapter.loglikelihood_rolling(ask("loglikelihood_rolling", (text,), ("short",)), disable_tqdm=True)
    # Ten tokens after the one that ends texts, ten after the last of those, and three with as much as fits before them.
    ids = list(text.encode())
    expected = plain(lm, [256], ids[:10])[0] + plain(lm, ids[9:10], ids[10:20])[0] + plain(lm, ids[12:20], ids[20:])[0]
    assert found == pytest.approx([expected, plain(lm, [256], list(b"short"))[0]], rel=1e-5)


def test_texts_go_on_to_the_first_stop(lm):
    def likeliest(prompt: str, count: int) -> list[int]:
        ids = list(prompt.encode())
        for _ in range(count):
            ids.append(int(lm(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt.encode()) :]

    prompts = ["The cat", "The dog", "A hat", "Elsewhere"]
    whole = [BYTES.decode(ids[: ids.index(256)] if 256 in ids else ids) for ids in (likeliest(p, 12) for p in prompts)]
    stop = whole[0][4:6]
    requests = ask("generate_until", *[(p, {"until": [stop], "max_gen_toks": 12, "do_sample": False}) for p in prompts])
    found = BimambaLM(lm, BYTES, batch_size=2).generate_until(requests, disable_tqdm=True)
    assert found == [text.split(stop)[0] for text in whole]
    assert len(found[0]) <= 4
    with pytest.raises(UserError, match="sampling with top_p is not supported"):
        BimambaLM(lm, BYTES).generate_until(
            ask("generate_until", ("a", {"do_sample": True, "top_p": 0.9})), disable_tqdm=True
        )


@pytest.mark.parametrize("name", ROWS)
def test_requests_are_those_of_lm_evals_own_task(name, monkeypatch):
    import datasets
    import lm_eval.tasks

    def requests(task: Any) -> list[tuple[str, str]]:
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests(limit=None)
        return [instance.args for instance in task.instances]

    ours = requests(build_task(name, ROWS[name]))
    # lm-eval's own definition, given what its hub data set would hold in every split.
    given = datasets.DatasetDict(
        {split: datasets.Dataset.from_list(ROWS[name]) for split in ("train", "validation", "test")}
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: given)
    folder = Path(lm_eval.tasks.__file__).parent / zeroshot._FOLDERS.get(name, name)
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    assert ours == requests(manager.load([name])["tasks"][name])
    if name == "winogrande":
        assert ours == [("Ann thanked Bea as Ann", " had helped."), ("Ann thanked Bea as Bea", " had helped.")]
    else:
        prompt, answers = RENDERED[name]
        assert ours[: len(answers)] == [(prompt, answer) for answer in answers]


@pytest.fixture
def task_data(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, rows in ROWS.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (folder / f"{name}.val.jsonl.xz").write_bytes(lzma.compress(lines))
    return folder


def test_accuracies_match_plain_ones_and_packing_changes_nothing(lm, task_data):
    found = run_tasks(lm, BYTES, find_tasks(["all"], task_data), None, 4)
    assert [task.task for task in found] == list(COLUMNS)
    right = right_by_length = 0
    for row in ROWS["piqa"]:
        prompt = list(f"Question: {row['goal']}\nAnswer:".encode())
        scores = [plain(lm, prompt, list(f" {row[key]}".encode()))[0] for key in ("sol1", "sol2")]
        lengths = [len(row[key]) for key in ("sol1", "sol2")]
        right += scores.index(max(scores)) == row["label"]
        by_length = [score / length for score, length in zip(scores, lengths, strict=True)]
        right_by_length += by_length.index(max(by_length)) == row["label"]
    piqa = found[0]
    assert piqa.questions == 3 and piqa.accuracy == pytest.approx(right / 3)
    assert piqa.normalized_accuracy == pytest.approx(right_by_length / 3)
    winogrande = [
        plain(lm, list(f"Ann thanked Bea as {who}".encode()), list(b" had helped."))[0] for who in ("Ann", "Bea")
    ]
    assert found[1].accuracy == float(winogrande[1] > winogrande[0])

    binary = binarize_(build(headdim=16, chunk_size=16), FBI)
    asked = find_tasks(["piqa"], task_data)
    latent = run_tasks(binary, BYTES, asked, 2, 4)
    assert latent == run_tasks(pack_(binary), BYTES, asked, 2, 4) and latent[0].questions == 2


def test_the_command_writes_what_the_tasks_came_to(tiny, bimamba, task_data, tmp_path):
    out = tmp_path / "out.json"
    args = ["--tasks", "piqa,boolq", "--task_data", task_data, "--out", out]
    answer = bimamba("evaluate", "--ckpt", tiny.teacher, *args)
    assert answer.code == 0, answer.err
    assert "piqa" in answer.out and "mean" in answer.out
    written = json.loads(out.read_text())
    assert [task["task"] for task in written["tasks"]] == ["piqa", "boolq"]
    assert written["mean_accuracy"] == pytest.approx(sum(task["accuracy"] for task in written["tasks"]) / 2)


def test_boolq_takes_both_forms(tmp_path):
    path = tmp_path / "boolq.jsonl"
    path.write_text(json.dumps({"passage": "p", "question": "q", "answer": True, "title": "t"}) + "\n")
    assert rows_of("boolq", path) == [{"passage": "p", "question": "q", "label": 1}]


@pytest.mark.parametrize(
    ("name", "row", "sentence"),
    [
        ("piqa", {"goal": "g", "sol1": "a", "label": 0}, r"line 1: piqa needs the column 'sol2' \(there: 'goal'"),
        ("piqa", {"goal": "g", "sol1": "a", "sol2": 3, "label": 0}, "'sol2' holds int, which piqa cannot have there"),
        ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": 2}, "the answer '2' is none of 0, 1"),
        ("winogrande", ROWS["winogrande"][0] | {"sentence": "no gap"}, "has no _ where the answer goes"),
        ("arc_easy", ROWS["arc_easy"][0] | {"answerKey": "E"}, "the answer 'E' is none of A, B, C"),
        ("openbookqa", ROWS["openbookqa"][0] | {"choices": {"text": ["a"]}}, "'choices' needs two lists"),
    ],
)
def test_wrong_rows_are_told(name, row, sentence, tmp_path):
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=sentence):
        rows_of(name, tmp_path / f"{name}.jsonl")


def test_wrong_tasks_are_told(task_data, tmp_path, monkeypatch):
    for names, folder, sentence in (
        (["piqaa"], task_data, "there is no task 'piqaa'; did you mean 'piqa'?"),
        (["piqa"], None, "--tasks needs --task_data"),
        (["piqa"], tmp_path / "none", "none is not a folder"),
        (["all"], tmp_path, "holds no file named after a task"),
        (["piqa"], tmp_path, r"must hold one file piqa\*.jsonl .* and has none"),
    ):
        with pytest.raises(UserError, match=sentence):
            find_tasks(names, folder)
    (task_data / "piqa.more.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="has piqa.more.jsonl, piqa.val.jsonl.xz"):
        find_tasks(["piqa"], task_data)
    monkeypatch.setattr(zeroshot, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'bimamba-lit\[eval\]'"):
        find_tasks(["piqa"], task_data)


def test_arguments_of_lm_evals_command(tiny):
    adapter = BimambaLM.create_from_arg_string(
        f"pretrained={tiny.teacher},max_length=64", {"batch_size": "auto", "max_batch_size": None, "device": "cpu"}
    )
    assert adapter.batch_size == 16 and adapter.max_length == 64 and adapter.device.type == "cpu"
    with pytest.raises(UserError, match="batch_size: 'many' is not a whole number"):
        BimambaLM(tiny.teacher, batch_size="many", device="cpu")
    with pytest.raises(UserError, match="needs its tokenizer beside it"):
        BimambaLM(adapter.lm)


def test_the_entry_point_leads_to_the_model():
    from lm_eval.api.registry import get_model

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lm_eval.models"]["bimamba"].partition(":")
    assert getattr(import_module(module), name) is BimambaLM is get_model("bimamba")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # lm-eval's backend and transformers warn of their own ways
def test_lm_evals_hugging_face_backend_gives_the_same(tmp_path):
    pytest.importorskip("accelerate", reason="lm-eval's Hugging Face backend needs it")
    from lm_eval.models.huggingface import HFLM

    from bimamba_lit.export.transformers_folder import export_transformers

    lm = binarize_(build(headdim=16, chunk_size=16), FBI).eval()
    export_transformers(lm, tmp_path, BYTES.to_json(), dtype="float32")
    theirs = HFLM(pretrained=str(tmp_path), device="cpu", dtype="float32", batch_size=2, max_length=40)
    ours = BimambaLM(pack_(lm), BYTES, max_length=40)
    pairs = [("The cat ", "sat"), ("The cat", " slept"), ("", "Nothing before"), ("A long text " * 5, "with an end")]
    for one, other in zip(
        ours.loglikelihood(ask("loglikelihood", *pairs)),
        theirs.loglikelihood(ask("loglikelihood", *pairs)),
        strict=True,
    ):
        assert one[0] == pytest.approx(other[0], rel=1e-4) and one[1] == other[1]
    texts = ask("loglikelihood_rolling", ("A text longer than a window of forty. " * 3,), ("short",))
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-4)
    settings = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}
    prompts = ask("generate_until", ("The cat", settings), ("A text that is " * 4, settings))
    assert ours.generate_until(prompts) == theirs.generate_until(prompts)


@pytest.mark.slow
def test_lm_evals_own_command_runs_a_model(tiny, task_data, tmp_path):
    (tmp_path / "tasks.yaml").write_text(
        json.dumps(
            {
                "task": "local_piqa",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"validation": str(task_data / "piqa.val.jsonl.xz")}},
                "output_type": "multiple_choice",
                "validation_split": "validation",
                "doc_to_text": "Question: {{goal}}\nAnswer:",
                "doc_to_target": "label",
                "doc_to_choice": "{{[sol1, sol2]}}",
                "metric_list": [{"metric": "acc"}],
            }
        )
    )
    command = [sys.executable, "-m", "bimamba_lit.eval.lm_eval_main", "--model", "bimamba", "--tasks", "local_piqa"]
    command += ["--model_args", f"pretrained={tiny.teacher}", "--include_path", str(tmp_path), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "local_piqa" in done.stdout
