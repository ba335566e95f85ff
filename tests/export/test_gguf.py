"""GGUF, read back with gguf's own reader: the model that llama.cpp would build of it computes what ours does."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from bimamba_lit import MambaConfig, MambaLM
from bimamba_lit.binarize import FBI, BinaryLinear, ScaledSign, Sign, binarize_, pack_
from bimamba_lit.data.tokenizer import ByteTokenizer
from bimamba_lit.errors import UserError
from bimamba_lit.export.gguf import export_gguf
from bimamba_lit.export.q1_0 import fit

gguf = pytest.importorskip("gguf")
IDS = torch.randint(61, (2, 21), generator=torch.Generator().manual_seed(1))
SIZES = {"d_model": 128, "headdim": 64, "ngroups": 2}


class ByBlock(BinaryLinear):
    """One learnable scale by row and 64 or 128 inputs."""

    width = 128

    def __init__(self, linear):
        super().__init__(linear)
        self.group = nn.Parameter(self.latent.detach().abs().unflatten(1, (-1, self.width)).mean(2))

    def terms(self):
        return {"group_scale": self.group}


class ByInputToo(ByBlock):
    def terms(self):
        return {"in_scale": torch.linspace(-1, 2, self.in_features), "out_scale": self.group[:, 0]}


def binary(make, scheme=ScaledSign, targets=("in_proj", "out_proj"), **options):
    lm = binarize_(make(**SIZES | options), scheme, targets)
    for name, parameter in lm.named_parameters():
        if name.endswith("_shift"):
            nn.init.zeros_(parameter)
    return lm


def read(path):
    reader = gguf.GGUFReader(path)
    return {field.name: field.contents() for field in reader.fields.values()}, {t.name: t for t in reader.tensors}


def signs_and_scales(tensor):
    """Read Q1_0 as ggml defines it: fp16 d and 16 bytes a block of 128, +d where the bit is set, else -d."""
    blocks = np.asarray(tensor.data).reshape(tensor.data.shape[0], -1, 18)
    scale = blocks[..., :2].copy().view(np.float16)[..., 0]
    bits = np.unpackbits(blocks[..., 2:], axis=-1, bitorder="little").astype(np.float32) * 2 - 1
    return torch.from_numpy(bits), torch.from_numpy(scale.astype(np.float32))


def values(tensor):
    if tensor.tensor_type == gguf.GGMLQuantizationType.Q1_0:
        signs, scale = signs_and_scales(tensor)
        return (signs * scale[..., None]).flatten(1)
    return torch.from_numpy(np.asarray(tensor.data).astype(np.float32))


def rebuilt(lm, path):
    """Build a dense model from a file, finding tensors by gguf's own table of names."""
    config = lm.config
    arch = {"mamba": gguf.MODEL_ARCH.MAMBA, "mamba2": gguf.MODEL_ARCH.MAMBA2}[config.mixers[0]]
    names = gguf.get_tensor_name_map(arch, config.n_layer)
    _, tensors = read(path)
    dense = MambaLM(MambaConfig.from_dict(config.to_dict() | {"pad_vocab_size_multiple": 1}))
    used = set()
    for name, old in dense.state_dict().items():
        if name == "lm_head.weight" and config.tie_embeddings:
            continue
        theirs = names.get_name(name.replace("dt_bias", "dt_proj.bias"), try_suffixes=(".weight", ".bias"))
        used.add(theirs)
        new = values(tensors[theirs])
        if name.endswith("A_log"):
            new = (-new).log()
        with torch.no_grad():
            old.copy_(new.reshape(old.shape))
    assert used == tensors.keys()
    return dense


@pytest.mark.parametrize(
    "scheme", [ScaledSign, Sign, FBI, lambda layer: FBI(layer, pattern="row"), ByBlock, ByInputToo]
)
def test_the_model_in_the_file_is_the_source(make, error, tmp_path, scheme):
    lm = binary(make, scheme)
    export_gguf(lm, tmp_path / "lm.gguf", None)
    # What the file rounds to fp16, rounded in the source too.
    with torch.no_grad():
        lm.backbone.embedding.weight.copy_(lm.backbone.embedding.weight.half())
    found, expected = rebuilt(lm, tmp_path / "lm.gguf")(IDS).logits, lm(IDS).logits
    assert error(found, expected) < 2e-3  # scales in fp16
    for i, block in enumerate(lm.backbone.layers):
        for theirs, layer in (("ssm_in", block.mixer.in_proj), ("ssm_out", block.mixer.out_proj)):
            signs, scale = signs_and_scales(read(tmp_path / "lm.gguf")[1][f"blk.{i}.{theirs}.weight"])
            assert torch.equal(signs.flatten(1), torch.where(layer.latent > 0, 1.0, -1.0))
            fitted = fit(layer, after_norm=True).scale
            assert torch.equal(scale, fitted.detach().half().float())


@pytest.mark.parametrize("tied", [True, False])
def test_mamba_1(make, error, tmp_path, tied):
    lm = binary(make, mixer="mamba", tie_embeddings=tied, ngroups=1)
    for original in (lm, pack_(lm)):
        export_gguf(original, tmp_path / "lm.gguf", None)
        fields, tensors = read(tmp_path / "lm.gguf")
        assert fields["general.architecture"] == "mamba" and fields["mamba.ssm.time_step_rank"] == 8
        assert ("output.weight" in tensors) != tied
        assert error(rebuilt(lm, tmp_path / "lm.gguf")(IDS).logits, lm(IDS).logits) < 2e-3


def test_a_binary_head_and_what_the_file_says(make, error, tmp_path):
    lm = binary(make, FBI, ["lm_head", "in_proj", "out_proj"])
    lm.config.tie_embeddings = False
    export_gguf(lm, tmp_path / "lm.gguf", None)
    fields, tensors = read(tmp_path / "lm.gguf")
    assert tensors["output.weight"].tensor_type == gguf.GGMLQuantizationType.Q1_0
    assert fields == fields | {
        "general.architecture": "mamba2",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q1_0,
        "mamba2.block_count": 2,
        "mamba2.embedding_length": 128,
        "mamba2.ssm.conv_kernel": 4,
        "mamba2.ssm.inner_size": 256,
        "mamba2.ssm.state_size": 8,
        "mamba2.ssm.time_step_rank": 4,
        "mamba2.ssm.group_count": 2,
        "mamba2.vocab_size": 61,
        "tokenizer.ggml.model": "none",
    }


@pytest.mark.parametrize(
    ("scheme", "options", "kinds", "words"),
    [
        (FBI, {}, "F16 F32", r"in_proj \(FBI\) does not fit Q1_0: it has a shift that is not zero \(in_shift\)"),
        (lambda layer: ScaledSign(layer, centred_rows=True), {}, "F16 F32", r"a shift that is not zero \(out_shift\)"),
        (type("Narrow", (ByBlock,), {"width": 64}), {}, "F16 F32", r"\(Narrow\) .*one scale for 64 inputs"),
        (ScaledSign, {"d_model": 64}, "F16 F32 Q1_0", "it has 64 inputs, not a multiple of 128"),
        (
            ScaledSign,
            {"keep": ["dt"]},
            "F16 F32 Q1_0",
            r"in_proj \(ScaledSign\) .* it has rows in full precision \(dt\)",
        ),
        (FBI, {"mixer": "mamba"}, "F16 F32 Q1_0", r"out_proj \(FBI\).* a scale by input and no norm right before it"),
    ],
)
def test_layers_that_do_not_fit_are_refused_by_name_or_written_as_f16(
    make, error, tmp_path, scheme, options, kinds, words
):
    sizes = {name: value for name, value in options.items() if name != "keep"}
    lm = binarize_(make(**SIZES | sizes | {"ngroups": 1}), scheme, keep_rows={"in_proj": options.get("keep", [])})
    if "mixer" in options:
        lm = binary(make, scheme, **options, ngroups=1)
    path = tmp_path / "lm.gguf"
    path.write_bytes(b"what was there")
    with pytest.raises(UserError, match=words):
        export_gguf(lm, path, None)
    assert path.read_bytes() == b"what was there" and list(tmp_path.iterdir()) == [path]
    export_gguf(lm, path, None, fallback="f16")
    assert {tensor.tensor_type.name for tensor in read(path)[1].values()} == set(kinds.split())
    assert error(rebuilt(lm, path)(IDS).logits, lm(IDS).logits) < 3e-3


def test_a_scale_by_input_that_is_the_same_for_whole_blocks(make):
    layer = FBI(nn.Linear(256, 8, bias=False))
    with torch.no_grad():
        layer.in_shift.zero_()
        layer.in_scale.copy_(torch.tensor([0.5, 2.0]).repeat_interleave(128))
    assert torch.equal(fit(layer, after_norm=False).scale, torch.tensor([[0.5, 2.0]]).expand(8, 2))
    with torch.no_grad():
        layer.in_scale[3] += 1e-3
    assert "no norm" in fit(layer, after_norm=False)
    assert torch.equal(fit(layer, after_norm=True).gain, layer.in_scale)


def test_a_model_of_both_mixers_and_a_missing_package(make, tmp_path, monkeypatch):
    lm = binary(make, mixer=["mamba", "mamba2"], ngroups=1)
    with pytest.raises(UserError, match="mixes Mamba-1 and Mamba-2"):
        export_gguf(lm, tmp_path / "lm.gguf", None)
    with pytest.raises(UserError, match="the fallback can be f16, not 'f32'"):
        export_gguf(lm, tmp_path / "lm.gguf", None, fallback="f32")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'bimamba-lit\[gguf\]'"):
        export_gguf(lm, tmp_path / "lm.gguf", None)


def test_a_vanishing_scale_is_refused(make, tmp_path):
    lm = binary(make)
    with torch.no_grad():
        lm.backbone.layers[1].mixer.in_proj.latent[3] *= 1e-9
    with pytest.raises(UserError, match=r"a scale of backbone.layers.1.mixer.in_proj is too small for float16"):
        export_gguf(lm, tmp_path / "lm.gguf", None)


@pytest.mark.parametrize(("embedding", "kind", "off"), [("int8", "Q8_0", 0.01), ("int4", "Q4_0", 0.2)])
def test_an_embedding_in_few_bits(make, error, tmp_path, embedding, kind, off):
    lm = binary(make, tie_embeddings=False)
    export_gguf(lm, tmp_path / "lm.gguf", None, embedding=embedding)
    _, tensors = read(tmp_path / "lm.gguf")
    for name, weight in (("token_embd.weight", lm.backbone.embedding.weight), ("output.weight", lm.lm_head.weight)):
        assert tensors[name].tensor_type.name == kind
        found = gguf.dequantize(np.asarray(tensors[name].data), tensors[name].tensor_type)
        assert 0 < error(torch.from_numpy(found), weight[:61]) < off
    with pytest.raises(UserError, match="the embedding can be int8 or int4 where its width is a multiple of 32"):
        export_gguf(lm, tmp_path / "lm.gguf", None, embedding="int3")


def bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox " * 50 + "jumps over the lazy dog " * 50], trainer)
    return tokenizer


def test_a_vocabulary(make, tmp_path):
    tokenizer = bpe()
    tokenizer.add_tokens(["    "])
    size = tokenizer.get_vocab_size()
    export_gguf(binary(make, vocab_size=size + 5), tmp_path / "lm.gguf", tokenizer.to_str())
    fields, _ = read(tmp_path / "lm.gguf")
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "gpt-2"
    tokens = fields["tokenizer.ggml.tokens"]
    assert tokens[:size] == [tokenizer.id_to_token(i) for i in range(size)] and tokens[-1] == f"[PAD{size + 4}]"
    assert fields["tokenizer.ggml.token_type"] == [3, *[1] * (size - 2), 4, *[5] * 5]
    merged = {"".join(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]}
    assert merged <= set(tokens) and len(merged) == size - 258
    assert fields["tokenizer.ggml.eos_token_id"] == 0


def test_bytes_as_a_vocabulary(make, tmp_path):
    export_gguf(binary(make, vocab_size=257), tmp_path / "lm.gguf", ByteTokenizer().to_json())
    fields, _ = read(tmp_path / "lm.gguf")
    assert fields["tokenizer.ggml.tokens"][65] == "A" and fields["tokenizer.ggml.tokens"][32] == "Ġ"
    assert fields["tokenizer.ggml.token_type"] == [*[1] * 256, 3] and fields["tokenizer.ggml.eos_token_id"] == 256


def test_vocabularies_that_do_not_fit(make, tmp_path):
    lm = binary(make)
    with pytest.raises(UserError, match="the tokenizer has 257 tokens and the model knows 61"):
        export_gguf(lm, tmp_path / "lm.gguf", ByteTokenizer().to_json())
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str()
    with pytest.raises(UserError, match="the tokenizer is a WordLevel split by None"):
        export_gguf(lm, tmp_path / "lm.gguf", words)
    assert not list(tmp_path.iterdir())
