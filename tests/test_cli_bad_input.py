from pathlib import Path

import pytest
import torch
import yaml


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.fixture
def refused(tiny, bimamba, tmp_path):
    """Runs `fit` on a tiny recipe and returns its one sentence, having checked that nothing is left behind."""

    def run(*args: object, recipe: Path | None = None, command: str = "fit") -> str:
        recipe = recipe or tiny.teacher_recipe
        before = tree(tmp_path), tree(tiny.folder)
        answer = bimamba(command, "-c", recipe, f"--trainer.default_root_dir={tmp_path / 'run'}", *args)
        after = tree(tmp_path), tree(tiny.folder)
        assert answer.code == 1, answer
        assert "Traceback" not in answer.err
        caches = {path for path in after[1] - before[1] if "cache" in path.parts}
        assert after == (before[0], before[1] | caches)
        (sentence,) = [line for line in answer.err.splitlines() if line.startswith("bimamba: ")]
        assert len(sentence) < 600
        return sentence.removeprefix("bimamba: ")

    return run


@pytest.fixture
def recipe(tiny, tmp_path):
    """Writes the distillation recipe with one setting changed."""

    def write(path: str, value: object) -> Path:
        settings = yaml.safe_load(tiny.distill_recipe.read_text())
        inner = settings
        *outer, key = path.split(".")
        for name in outer:
            inner = inner[name]
        inner[key] = value
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(settings))
        return file

    return write


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("trainr", "trainer"),
        ("trainer.max_step", "max_steps"),
        ("model.init_args.techer", "teacher"),
        ("model.init_args.optimizer.warmup_step", "warmup_steps"),
        ("model.init_args.binarizer.init_args", "pattern"),
        ("data.init_args.contxt", "context"),
        ("checkpoint", "every_n_train_steps"),
    ],
)
def test_a_misspelt_key_in_a_recipe_is_answered_by_the_nearest(refused, recipe, path, nearest):
    value = {"binarizer.init_args": {"patern": "row"}, "checkpoint": {"every_n_train_step": 5}}
    sentence = refused(recipe=recipe(path, next((v for k, v in value.items() if path.endswith(k)), 3)))
    assert f"did you mean '{nearest}'?" in sentence


@pytest.mark.parametrize(
    ("arg", "nearest"),
    [
        ("--trainer.max_step=5", "max_steps"),
        ("--model.config.d_modle=5", "d_model"),
        ("--model.init_args.config.d_modle=5", "d_model"),
        ("--model.optimizer.lrr=5", "lr"),
        ("--data.batchsize=5", "batch_size"),
        ("--chekpoint.every_n_train_steps=5", "checkpoint"),
        ("--trainer.callbacks+=bimamba_lit.callbacks.BitFlip", "bimamba_lit.callbacks.BitFlips"),
        ("--model=Pretrian", "Pretrain"),
        ("--max_steps=5", "trainer.max_steps"),
        ("--activation_checkpointing=true", "model.activation_checkpointing"),
        ("--context=5", "data.context"),
    ],
)
def test_a_misspelt_option_is_answered_by_the_nearest(refused, arg, nearest):
    assert f"did you mean '{nearest}'?" in refused(arg)


@pytest.mark.parametrize(
    ("arg", "told"),
    [
        ("--trainer.max_steps=many", "trainer.max_steps: 'many' is not right, it must be a whole number"),
        ("--model.config.d_model=wide", "d_model: 'wide' is not right"),
        ("--data.context=1.5", "data.context: 1.5 is not right"),
        ("--model.optimizer.lr=-1", "lr -1"),
        ("--model.optimizer.warmup_steps=-1", "warmup_steps is -1"),
        ("--data.context=0", "context: 0 is out of range"),
        ("--model.config.d_model=-8", "d_model"),
        ("--data.tokenizer=nowhere.json", "nowhere.json"),
        ("--trainer.max_steps=-1", "the schedule has no length"),
        ("--model.config.vocab_size=99", "vocab_size 99"),
        ("--data.train=nowhere.txt", "nowhere.txt"),
        ("--seed_everything=4294967296", "seed_everything: 4294967296 is out of range, it must be 0 to 4294967295"),
    ],
)
def test_a_wrong_value_is_told(refused, arg, told):
    assert told in refused("--trainer.max_epochs=1", arg)


@pytest.mark.parametrize("text", ["[" * 100_000, "- " * 100_000, "a: {b: " + "{c: " * 100_000])
def test_what_is_nested_too_deeply_for_libyaml_is_told(bimamba, tiny, tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    answer = bimamba("fit", "-c", path)
    assert (answer.code, answer.err) == (1, f"bimamba: {path} is nested too deeply to be a recipe")
    answer = bimamba("fit", "-c", tiny.teacher_recipe, f"--model.config={text}")
    assert (answer.code, answer.err) == (1, "bimamba: model.config: the value is nested too deeply to be a setting")


@pytest.mark.parametrize(
    ("arg", "told"),
    [
        ("--model.binarizer=Pretrain", "there is no LatentLinear 'Pretrain'"),
        ("--model.binarizer=torch.nn.Linear", "is no LatentLinear"),
        ("--model.binarizer=FBJ", "did you mean 'FBI'?"),
        ("--model.binarizer=my_scheme.Mine", "there is no class 'my_scheme.Mine'"),
        ("--model.targets=[in_prj]", "did you mean 'in_proj'?"),
        ("--model.divergence=kl", "'soft_ce' or 'forward_kl' or 'reverse_kl'"),
        ("--model.teacher=nowhere", "nowhere"),
    ],
)
def test_a_wrong_student_is_told(refused, tiny, arg, told):
    assert told in refused(arg, recipe=tiny.distill_recipe)


def test_what_is_no_dotted_name_is_not_hinted_at(refused, tiny):
    told = refused("--model.binarizer=./my_scheme.Mine", recipe=tiny.distill_recipe)
    assert told.rstrip().endswith("there is no class './my_scheme.Mine'")


def test_a_recipe_without_a_needed_setting(refused, tiny, tmp_path):
    settings = yaml.safe_load(tiny.distill_recipe.read_text())
    del settings["model"]["init_args"]["teacher"]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings))
    assert "has no 'teacher', which Distill needs" in refused(recipe=file)


def damaged(tiny, folder: Path) -> dict[str, Path]:
    whole = (tiny.teacher / "checkpoints" / "last.ckpt").read_bytes()
    (folder / "short.ckpt").write_bytes(whole[: len(whole) // 2])
    torch.save({"state_dict": {"a": torch.zeros(1)}}, folder / "foreign.ckpt")
    (folder / "text.ckpt").write_text("not a checkpoint")
    return {name: folder / f"{name}.ckpt" for name in ("short", "foreign", "text", "missing")}


TOLD = {"short": "cut short", "foreign": "of another program", "text": "checkpoint", "missing": "there is no"}


@pytest.mark.parametrize("kind", TOLD)
def test_a_bad_checkpoint_wherever_one_is_taken(refused, bimamba, tiny, tmp_path, kind):
    path = damaged(tiny, tmp_path)[kind]
    assert TOLD[kind] in refused(f"--model.teacher={path}", recipe=tiny.distill_recipe)
    assert TOLD[kind] in refused("--ckpt_path", path)
    answer = bimamba("generate", "--ckpt", path, "--prompt", "a")
    assert answer.code == 1 and TOLD[kind] in answer.err and "Traceback" not in answer.err


def test_a_checkpoint_of_another_model(refused, tiny):
    last = tiny.teacher / "checkpoints" / "last.ckpt"
    assert "d_model: 32 there, 64 here" in refused("--ckpt_path", last, "--model.config.d_model=64")
    assert "binarization" in refused("--ckpt_path", last, recipe=tiny.distill_recipe)


def test_a_teacher_of_another_vocabulary_or_tokenizer(refused, tiny, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    for size in (300, 257):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator([tiny.text.read_text(), "ab" * 100, *map(str, range(999))], trainer)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        told = refused(f"--data.tokenizer={tmp_path / 'tokenizer.json'}", recipe=tiny.distill_recipe)
        assert ("another tokenizer" if size == 257 else "vocabulary of 257 tokens") in told


@pytest.mark.parametrize(("content", "told"), [(b"", "is empty"), (b"\xff\xfe\x00bad" * 300, "UTF-8"), (b"a", "token")])
def test_a_bad_text_file(refused, tmp_path, content, told):
    (tmp_path / "bad.txt").write_bytes(content)
    assert told in refused(f"--data.train={tmp_path / 'bad.txt'}")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("trainer:\n  max_steps: [1\nmodel: 3\n", "line 3"),
        ("a: ${nothing.there}\n", "nothing.there"),
        ("- a\n- b\n", "is not a recipe"),
        (b"\xff\xfe\xff", "is not a YAML text file"),
    ],
)
def test_a_broken_recipe(refused, tmp_path, content, told):
    file = tmp_path / "broken.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert told in refused(recipe=file)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU says")
def test_a_gpu_that_is_not_there(refused):
    told = "trainer.accelerator: torch finds no GPU here: set it to cpu or auto"
    assert refused("--trainer.accelerator=gpu") == told


def test_a_missing_recipe_is_answered_by_the_nearest(refused, tiny):
    assert "did you mean 'distill.yaml'?" in refused(recipe=tiny.folder / "distil.yaml")


def test_a_folder_is_not_answered_by_its_own_name(refused, tmp_path):
    (tmp_path / "recipes").mkdir()
    assert "recipes is a folder, and a recipe is a file: give " in refused(recipe=tmp_path / "recipes")


@pytest.mark.parametrize(
    ("content", "told"), [("modle: {}\n", "did you mean 'model'?"), ("", "no model"), ("trainer: {}\n", "no model")]
)
def test_a_recipe_without_a_model(refused, tmp_path, content, told):
    file = tmp_path / "bare.yaml"
    file.write_text(content)
    assert told in refused(recipe=file)


def test_commands_themselves(bimamba):
    answer = bimamba("fitt")
    assert answer.code == 1 and "did you mean 'fit'?" in answer.err
    answer = bimamba("fit")
    assert answer.code == 1 and "needs a recipe" in answer.err
    answer = bimamba("generate", "--prompt", "a")
    assert answer.code == 2 and "--ckpt" in answer.err
    answer = bimamba("recipes", "cp", "quickstart_techer", "here")
    assert answer.code == 1 and "did you mean 'quickstart_teacher.yaml'?" in answer.err
    answer = bimamba("compare", "runs/nowhere")
    assert answer.code == 1 and "there is no run folder" in answer.err


def test_debug_shows_where_an_error_arose(bimamba, tiny):
    answer = bimamba("--debug", "fit", "-c", tiny.folder / "nowhere.yaml")
    assert answer.code == 1 and "Traceback" in answer.err


def test_a_setting_of_a_callback_out_of_range_is_refused(refused):
    assert "every_n_train_steps=-1. Must be >= 0" in refused("--checkpoint.every_n_train_steps=-1")


def test_settings_of_the_trainer_that_do_not_fit_the_machine_or_each_other(refused):
    assert refused("--trainer.devices=0").startswith("trainer: ")
    assert refused("--trainer.accelerator=tpu").startswith("trainer: ")
    sharded = "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy"
    parts = ["--trainer.strategy.data_parallel_size=3", "--trainer.strategy.tensor_parallel_size=1"]
    told = refused(sharded, *parts)
    assert "data_parallel_size is 3" in told and "set data_parallel_size to 1" in told
    twice = ["--trainer.callbacks+=bimamba_lit.callbacks.BitFlips"] * 2
    assert refused(*twice).startswith("trainer.callbacks: BitFlips is there 2 times")


def test_a_checkpoint_that_training_cannot_go_on_from(refused, tiny, tmp_path):
    progress = "epoch_loop.automatic_optimization.optim_progress"
    changes = {
        "its loops.fit_loop lacks epoch_progress": lambda c: c["loops"]["fit_loop"].pop("epoch_progress"),
        f"its loops.fit_loop.{progress} is no mapping but 3": lambda c: c["loops"]["fit_loop"].update({progress: 3}),
        f"its loops.fit_loop.epoch_progress.total.ready is {1 << 63} where a value such as": lambda c: c["loops"][
            "fit_loop"
        ]["epoch_progress"]["total"].update(ready=1 << 63),  # no int64
        "its optimizer_states.state.exp_avg is a tensor of shape (2,)": lambda c: c["optimizer_states"][0]["state"][
            0
        ].update(exp_avg=torch.zeros(2)),
        "its optimizer_states.param_groups[0].lr is a str where a value such as": lambda c: c["optimizer_states"][0][
            "param_groups"
        ][0].update(lr="much"),
        "its lr_schedulers has the unknown step": lambda c: c["lr_schedulers"][0].update(step=1),
        "cannot be taken up by this run": lambda c: c["state_dict"].popitem(),
    }
    for told, change in changes.items():
        checkpoint = torch.load(tiny.teacher / "checkpoints" / "last.ckpt", weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, tmp_path / "changed.ckpt")
        assert told in refused("--ckpt_path", tmp_path / "changed.ckpt", "--trainer.max_steps=12")
