"""What SECURITY.md promises: nothing unsafe is called, no known-bad release is allowed, nothing is fetched unasked."""

import ast
import re
import socket
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FOLDERS = ("bimamba_lit", "kernels", "callbacks", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

# Whatever is loaded by these can run code.
UNPICKLERS = {
    "pickle": {"load", "loads", "Unpickler"},
    "_pickle": {"load", "loads", "Unpickler"},
    "cPickle": {"load", "loads", "Unpickler"},
    "dill": {"load", "loads"},
    "cloudpickle": {"load", "loads"},
    "joblib": {"load"},
    "marshal": {"load", "loads"},
    "shelve": {"open"},
    "pandas": {"read_pickle"},
    "yaml": {"unsafe_load", "unsafe_load_all", "full_load", "full_load_all", "load_all"},
    "os": {"system", "popen"},
    "torch.hub": {"load", "load_state_dict_from_url", "download_url_to_file"},
    "torch.package": {"PackageImporter"},
    "code": {"interact"},
}
BUILTINS = {"eval", "exec", "compile", "__import__"}
KEYWORDS = {  # what each may be, if it is given
    "weights_only": True,
    "trust_remote_code": False,
    "allow_pickle": False,
    "shell": False,
    "use_safetensors": True,
}
SAFE_LOADERS = {"SafeLoader", "CSafeLoader"}


def unsafe(source: str) -> Iterator[str]:
    """Yield what is unsafe in Python source, with its line."""
    tree = ast.parse(source)
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    names = dict(imported_names(tree))
    restricted = {id(base) for node in ast.walk(tree) if is_restricted(node) for base in node.bases}
    for node in ast.walk(tree):
        dotted = full_name(node, names)
        module, _, function = dotted.rpartition(".")
        if id(node) in restricted:
            continue
        if function in UNPICKLERS.get(module, ()):
            yield f"{node.lineno}: {dotted}"
        if dotted in ("torch.load", "torch.serialization.load", "yaml.load"):
            call = called.get(id(node))
            if call is None or not is_safe_load(call, module):
                yield f"{node.lineno}: {dotted}"
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
                yield f"{node.lineno}: {node.func.id}"
            for keyword in node.keywords:
                right = KEYWORDS.get(keyword.arg or "")
                if right is not None and not is_constant(keyword.value, right):
                    yield f"{node.lineno}: {keyword.arg}"


def imported_names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield the local names of what is imported, and their full names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.asname, alias.name) if alias.asname else (alias.name.split(".")[0],) * 2
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def full_name(node: ast.AST, names: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return names.get(node.id, "")
    if isinstance(node, ast.Attribute) and (inner := full_name(node.value, names)):
        return f"{inner}.{node.attr}"
    return ""


def is_restricted(node: ast.AST) -> bool:
    """Say whether a class says itself which names a pickle may stand for."""
    return isinstance(node, ast.ClassDef) and any(getattr(part, "name", "") == "find_class" for part in node.body)


def is_constant(node: ast.AST, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def is_safe_load(call: ast.Call, module: str) -> bool:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if module == "yaml":
        loader = given.get("Loader", call.args[1] if len(call.args) > 1 else None)
        return isinstance(loader, ast.Attribute) and loader.attr in SAFE_LOADERS
    return "weights_only" in given and is_constant(given["weights_only"], True)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import torch\ntorch.load(f, weights_only=flag)",
        "from torch import load as read\nread(f)",
        "import torch\nread = torch.load",
        "from functools import partial\nimport torch\npartial(torch.load, f)",
        "import pickle\npickle.loads(b)",
        "from pickle import Unpickler\nUnpickler(f).load()",
        "import pickle as p\ncall(p.load)",
        "import pickle\nclass Mine(pickle.Unpickler): pass",
        "import joblib\njoblib.load(f)",
        "import yaml\nyaml.load(f)",
        "import yaml\nyaml.load(f, Loader=yaml.Loader)",
        "import yaml\nyaml.unsafe_load(f)",
        "eval(text)",
        "exec(text)",
        "__import__(name)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=settings.trust)",
        "AutoModel.from_pretrained(p, use_safetensors=False)",
        "import subprocess\nsubprocess.run(c, shell=True)",
        "import os\nos.system(c)",
        "import torch\ntorch.hub.load(a, b)",
        "from torch.hub import load\nload(a, b)",
        "Trainer().fit(m, weights_only=None)",
    ],
)
def test_the_search_finds(source):
    assert list(unsafe(source))


def test_the_search_leaves_sound_code_alone():
    sound = """
import pickle, numpy, torch, yaml
torch.load(f, map_location="cpu", weights_only=True)
yaml.safe_load(f); yaml.load(f, Loader=yaml.SafeLoader)
numpy.load(f); model.eval(); load(f); pickle.UnpicklingError
fit(weights_only=True, trust_remote_code=False)
class Restricted(pickle.Unpickler):
    def find_class(self, module, name): raise pickle.UnpicklingError
"""
    assert not list(unsafe(sound))


# In tests alone, of what they made themselves.
ALLOWED = {
    "tests/data/test_tokens.py": {"pickle.loads"},  # what a data worker is sent
    "tests/test_errors.py": {"pickle.loads"},  # likewise
    "tests/distill/test_causal_teacher.py": {"__import__"},  # a package that is not installed
    "tests/export/test_gguf.py": {"__import__"},
    "tests/test_readme.py": {"exec"},  # the README's own examples
}


def test_nothing_is_loaded_or_run_unsafely():
    assert len(FILES) > 200
    found = {
        f"{path.relative_to(ROOT)}:{one}"
        for path in FILES
        for one in unsafe(path.read_text(encoding="utf-8"))
        if one.split(": ")[1] not in ALLOWED.get(path.relative_to(ROOT).as_posix(), ())
    }
    assert found == set()


def test_no_exported_program_is_loaded():
    sources = {path: path.read_text(encoding="utf-8") for path in FILES if "tests" not in path.relative_to(ROOT).parts}
    for path, source in sources.items():
        names = dict(imported_names(tree := ast.parse(source)))
        loaded = {full_name(node, names) for node in ast.walk(tree)} & {"torch.jit.load", "torch.export.load"}
        assert not loaded, path


def test_recipes_name_code_of_known_packages_only():
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        for name in re.findall(r"class_path:\s*([\w.]+)", path.read_text()):
            assert name.split(".")[0] in ("bimamba_lit", "lightning", "torch"), f"{path.name}: {name}"
        assert isinstance(yaml.safe_load(path.read_text()), dict)


# Releases that must not be installed, and why: the newest bad one of each range.
KNOWN_BAD = {
    "lightning": {"2.6.2": "GHSA-w37p-236h-pfx3", "2.6.3": "GHSA-w37p-236h-pfx3"},
    "torch": {"2.5.1": "CVE-2025-32434", "2.9.1": "CVE-2026-24747"},
    "transformers": {"4.56.0": "CVE-2026-4372", "5.2.0": "CVE-2026-4372", "5.0.0rc2": "CVE-2026-1839"},
    "pyarrow": {"14.0.0": "CVE-2023-47248", "23.0.0": "CVE-2026-25087"},
    "filelock": {"3.20.0": "CVE-2025-68146", "3.20.2": "CVE-2026-22701"},
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_known_bad_releases_are_excluded():
    extras = [one for extra in PROJECT["optional-dependencies"].values() for one in extra]
    required = [Requirement(one) for one in [*PROJECT["dependencies"], *extras]]
    pins = dict(re.findall(r"(?m)^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text()))
    told = (ROOT / "SECURITY.md").read_text()
    for name, versions in KNOWN_BAD.items():
        specifiers = [one.specifier for one in required if one.name == name]
        assert specifiers, name
        for version, reason in versions.items():
            assert not any(specifier.contains(version, prereleases=True) for specifier in specifiers), (name, reason)
        assert all(specifier.contains(pins[name]) for specifier in specifiers)
        assert name in told


def test_every_dependency_has_a_lower_bound():
    for one in PROJECT["dependencies"]:
        assert any(specifier.operator == ">=" for specifier in Requirement(one).specifier), one


@pytest.fixture
def network(monkeypatch):
    """No way out of this machine; what was tried is kept."""
    tried = []

    def refuse(*args, **_):
        tried.append(args)
        raise OSError("the network is blocked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tried


def test_nothing_is_fetched_unless_a_setting_names_the_hub(tiny, bimamba, tmp_path, network):
    student = f"--trainer.default_root_dir={tmp_path / 'student'}"
    commands = [
        ("fit", "-c", tiny.distill_recipe, student, "--trainer.max_steps=1"),
        ("validate", "-c", tiny.distill_recipe, student, "--ckpt_path=last"),
        ("teacher-logits", "-c", tiny.distill_recipe, "--out", tmp_path / "logits", "--top_k=4"),
        ("generate", "--ckpt", tmp_path / "student", "--prompt", "a", "--max_new_tokens", 3),
        ("evaluate", "--ckpt", tmp_path / "student", "--text", tiny.text, "--context", 32, "--device", "cpu"),
        ("export", "--ckpt", tmp_path / "student", "--format", "safetensors", "--out", tmp_path / "packed"),
        ("convert", "--from", tmp_path / "packed", "--to", tmp_path / "latent"),
        ("recipes",),
    ]
    for command in commands:
        answer = bimamba(*command)
        assert answer.code == 0 and not network, (command, answer, network)
    for setting in ("model.teacher", "data.tokenizer"):
        answer = bimamba("fit", "-c", tiny.distill_recipe, student, f"--{setting}=hub:nobody/nothing")
        assert answer.code == 1 and "hub:nobody/nothing" in answer.err and "Traceback" not in answer.err
        assert network, setting  # it would have been fetched: the block works
        network.clear()
