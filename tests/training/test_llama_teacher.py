"""The paper's teacher is a LLaMA: a tiny one, as transformers writes it, teaches through the command."""

import json

import pytest
import torch
import yaml

transformers = pytest.importorskip("transformers")


def test_a_student_learns_from_a_llama_folder(tiny, bimamba, tmp_path):
    teacher = tmp_path / "llama"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=264, max_position_embeddings=64, **sizes)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(teacher)
    recipe = yaml.safe_load(tiny.distill_recipe.read_text())
    student = {"d_model": 32, "n_layer": 1, "headdim": 16, "d_state": 16, "chunk_size": 16}
    recipe["model"]["init_args"] |= {"teacher": str(teacher), "student": student}
    recipe["data"]["init_args"] |= {"separate_documents": True}
    recipe["trainer"] |= {"max_steps": 2, "default_root_dir": str(tmp_path / "run")}
    file = tmp_path / "llama.yaml"
    file.write_text(yaml.safe_dump(recipe))
    answer = bimamba("fit", "-c", file)
    assert answer.code == 0, answer.err
    figures = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert figures["scheme"] == "FBI" and 0 <= figures["agreement"] <= 1
    refused = bimamba("fit", "-c", file, "--model.student=teacher", f"--trainer.default_root_dir={tmp_path / 'other'}")
    assert refused.code == 1 and f"the teacher {teacher} is no Mamba model" in refused.err
