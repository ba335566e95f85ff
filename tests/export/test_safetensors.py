"""Packed safetensors: what is in the file, what is loaded from it, and what it weighs."""

import json

import pytest
import torch
from safetensors.torch import load_file

from bimamba_lit import MambaConfig, MambaLM
from bimamba_lit.binarize import FBI, BinaryLinear, PackedLinear, ScaledSign, binarize_, pack_
from bimamba_lit.errors import UserError
from bimamba_lit.export.safetensors import export_safetensors
from bimamba_lit.models.count import count_parameters, true_bits
from bimamba_lit.models.quantized_table import QuantizedTable, quantize_tables_

IDS = torch.randint(61, (2, 21), generator=torch.Generator().manual_seed(1))
# method.md: d_model, layers, vocabulary, 1-bit GiB.
PAPER = [
    (1536, 48, 50288, 0.228),
    (2048, 48, 50288, 0.340),
    (2560, 64, 50288, 0.545),
    (2560, 64, 32000, 0.458),
]


def logits(lm):
    with torch.no_grad():
        return lm(IDS).logits


def binary(make, scheme=FBI, **options):
    return binarize_(make(**options), scheme)


def rounded_(lm, dtype):
    """Round everything but the signs of a packed model."""
    with torch.no_grad():
        for tensor in lm.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(dtype))
    return lm


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("scheme", [FBI, lambda layer: FBI(layer, pattern="row"), ScaledSign])
@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_the_loaded_model_is_the_source_rounded(make, error, tmp_path, dtype, scheme, mixer):
    lm = binary(make, scheme, mixer=mixer)
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    export_safetensors(lm, tmp_path, None, dtype=dtype)
    assert all(torch.equal(before[name], tensor) for name, tensor in lm.state_dict().items()), "the source was changed"
    loaded = MambaLM.from_pretrained(tmp_path)
    for (name, layer), source in zip(
        [(n, m) for n, m in loaded.named_modules() if isinstance(m, PackedLinear)],
        [m for m in lm.modules() if isinstance(m, BinaryLinear)],
        strict=True,
    ):
        assert torch.equal(layer.signs, source.packed_signs()), name
    assert {t.dtype for t in loaded.state_dict().values()} == {torch.uint8, torch.float32}
    assert error(logits(loaded), logits(rounded_(pack_(lm), getattr(torch, dtype)))) < 1e-6


@pytest.mark.parametrize(("embedding", "group"), [("int8", None), ("int8", 8), ("int4", 16), ("int4", None)])
@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_in_few_bits(make, error, tmp_path, embedding, group, tied):
    lm = binary(make, tie_embeddings=tied)
    export_safetensors(lm, tmp_path, None, embedding=embedding, group_size=group)
    stored = load_file(tmp_path / "model.safetensors")
    bits = int(embedding[3:])
    codes = stored["backbone.embedding.table.codes"]
    assert codes.nbytes == 64 * 32 * bits // 8 and stored["backbone.embedding.table.scale"].dtype == torch.float16
    assert ("lm_head.table.codes" in stored) != tied
    loaded = MambaLM.from_pretrained(tmp_path)
    tables = [loaded.backbone.embedding.weight, loaded.lm_head.weight]
    for mine, theirs in zip(tables, [lm.backbone.embedding.weight, lm.lm_head.weight], strict=True):
        off = (mine - theirs).unflatten(1, (-1, group or 32)).abs()
        step = theirs.unflatten(1, (-1, group or 32)).abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        assert (off <= (0.57 if bits == 8 else 3.5) * step).all()
    # The same model with the tables spelled out computes the same.
    source = rounded_(pack_(lm), torch.float16)
    with torch.no_grad():
        source.backbone.embedding.weight.copy_(tables[0])
        source.lm_head.weight.copy_(tables[1])
    assert error(logits(loaded), logits(source)) < 1e-6
    state = loaded.init_state(2)
    _, state = loaded.prefill(IDS[:, :-1], state)
    assert error(loaded.step(IDS[:, -1], state)[0], logits(source)[:, -1]) < 1e-5
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(MambaLM.from_pretrained(tmp_path / "again")), logits(loaded))


def test_four_bits_choose_the_better_scale():
    torch.manual_seed(0)
    weight = torch.randn(50, 64)
    table = QuantizedTable(weight, 4, 32)
    plain = (weight.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 7).half().float()
    rounded = ((weight.unflatten(1, (-1, 32)) / plain).round().clamp(-7, 7) * plain).flatten(1)
    assert (table.slice(0, 50) - weight).norm() < 0.97 * (rounded - weight).norm()
    assert torch.equal(table.rows(torch.tensor([[3, 49]])), table.slice(0, 50)[None, [3, 49]])


def test_a_table_of_zeros():
    table = QuantizedTable(torch.zeros(4, 8), 8)
    assert not table.slice(0, 4).any()


def packed_on_meta(d_model, n_layer, vocab_size):
    with torch.device("meta"):
        lm = MambaLM(MambaConfig(d_model=d_model, n_layer=n_layer, vocab_size=vocab_size))
        return pack_(binarize_(lm, FBI))


def stored_bits(lm):
    """The bits of the tensors that the file holds, in 16 bits what is not whole numbers."""
    seen = {id(tensor): tensor for tensor in lm.state_dict(keep_vars=True).values()}
    return sum(t.numel() * (16 if t.is_floating_point() else 8 * t.element_size()) for t in seen.values())


@pytest.mark.parametrize(("d_model", "n_layer", "vocab_size", "one_bit"), PAPER)
def test_the_size_of_the_papers_models(d_model, n_layer, vocab_size, one_bit):
    lm = packed_on_meta(d_model, n_layer, vocab_size)
    assert abs(stored_bits(lm) / 8 / 2**30 / one_bit - 1) < 0.02
    before = true_bits(lm)
    quantize_tables_(lm, 8)
    assert stored_bits(lm) == true_bits(lm) == before - 8 * vocab_size * d_model + 16 * vocab_size


@pytest.mark.parametrize("double_inputs", [{}, {"out_proj": 0.6}], ids=["one sign", "two signs"])
@pytest.mark.parametrize("embedding", [None, "int8", "int4"])
def test_the_file_is_as_long_as_its_true_bits(make, tmp_path, embedding, double_inputs):
    lm = binarize_(make(d_model=64, vocab_size=1000), FBI, double_inputs=double_inputs)
    export_safetensors(lm, tmp_path, None, embedding=embedding)
    file = tmp_path / "model.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    loaded = MambaLM.from_pretrained(tmp_path)
    assert 8 * (file.stat().st_size - header) == true_bits(loaded)
    assert header < 12_000
    entries = 1000 * 64
    scales = 0 if embedding is None else 1000
    assert count_parameters(loaded).total == count_parameters(lm).total + scales
    assert true_bits(lm) - true_bits(loaded) == entries * (16 - int((embedding or "int16")[3:])) - 16 * scales


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"embedding": "int3"}, "the embedding can be int8 or int4, not 'int3'"),
        ({"embedding": "int8", "group_size": 5}, "the group size must divide the embedding's width 32, and 5 does not"),
        ({"group_size": 8}, "choose int8 or int4 too"),
        ({"dtype": "int8"}, "dtype must be float16, bfloat16, float32, not 'int8'"),
    ],
)
def test_wrong_options(make, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        export_safetensors(binary(make), tmp_path / "out", None, **options)
    assert not (tmp_path / "out").exists()


def test_a_table_is_quantized_once(make, tmp_path):
    lm = binary(make)
    export_safetensors(lm, tmp_path, None, embedding="int8")
    with pytest.raises(UserError, match="8 bits an entry already"):
        export_safetensors(MambaLM.from_pretrained(tmp_path), tmp_path / "out", None, embedding="int4")


def test_a_binary_head_keeps_its_signs(make, error, tmp_path):
    lm = binarize_(binary(make), ScaledSign, targets=["lm_head"])
    export_safetensors(lm, tmp_path, '{"type": "bytes"}', embedding="int8")
    loaded = MambaLM.from_pretrained(tmp_path)
    assert isinstance(loaded.lm_head, PackedLinear)
    assert json.loads((tmp_path / "config.json").read_text())["tables"] == {"bits": 8, "group_size": None}
    assert (tmp_path / "tokenizer.json").read_text() == '{"type": "bytes"}'
