"""Graphs -> folders in the compressed-tensors format: back into a graph, and into transformers, with the same integers and numbers."""

import json

import pytest
import torch
from torch import nn

import qgraph
from qgraph.errors import ModelError
from tests.quantized_files import (
    DYNAMIC,
    IDS,
    Net,
    Tied,
    Wrapper,
    close,
    folder_of,
    integers,
    values,
    weight,
)


def source_of(path, module):
    folder_of(path, module.state_dict())
    (path / "config.json").write_text(json.dumps({"model_type": "net", "tie_word_embeddings": False}))
    (path / "tokenizer.json").write_text("{}")
    return path


def quantized(module, recipe):
    return qgraph.quantize(Wrapper(module).eval(), [(IDS,)], example_inputs=(IDS,), recipe=recipe, dynamic_shapes=DYNAMIC)


@pytest.mark.parametrize("recipe", ["w4a16-g16", "w4a16-g16-sym", "w8a16", "w4a16", "w8a8", "w8a8-token"])
def test_a_saved_checkpoint_comes_back_with_the_same_integers_and_numbers(tmp_path, recipe):
    module = Net().eval()
    gm = quantized(module, recipe)
    folder = qgraph.save_checkpoint(gm, tmp_path / "out", source=source_of(tmp_path / "source", module))
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    again = qgraph.from_checkpoint(Wrapper(Net()).eval(), folder, (IDS,), dynamic_shapes=DYNAMIC)
    assert integers(gm).keys() == integers(again).keys() == {"model.gate", "model.up", "model.head"}
    assert all(torch.equal(q, integers(again)[name]) for name, q in integers(gm).items())
    if recipe == "w8a8":  # beside linears it quantizes products, for which the format has no place
        assert close(again(IDS), gm(IDS), 0.05)
    else:
        assert torch.equal(gm(IDS), again(IDS))


def test_unsigned_integers_of_another_format_are_stored_as_signed_ones_with_the_same_numbers(tmp_path):
    tensors = {f"model.{n}": v for n, v in values().items()} | {
        "model.embed.weight": torch.randn(50, 64),
        "model.gate.weight": weight(48, 64, 32, zero=True, seed=7),
        "model.up.weight": weight(48, 64, 32),
    }
    gm = qgraph.from_checkpoint(Wrapper(Net()).eval(), tensors, (IDS,))
    folder = qgraph.save_checkpoint(gm, tmp_path / "out", source=source_of(tmp_path / "source", Net()))
    found = qgraph.load_checkpoint(folder)
    assert torch.equal(found["gate.weight"].q, (tensors["model.gate.weight"].q.int() - 8).to(torch.int8))
    assert found["gate.weight"].zero_point is not None and found["up.weight"].zero_point is not None
    assert torch.equal(qgraph.from_checkpoint(Net().eval(), found, (IDS,))(IDS), gm(IDS))


def test_layers_of_several_formats_are_named(tmp_path):
    module = Net().eval()
    recipe = qgraph.load_recipe("w4a16-g16", ["rules={model.head: {weights: {bits: 8}}, model.up: null}"])
    folder = qgraph.save_checkpoint(quantized(module, recipe), tmp_path / "out", source=source_of(tmp_path / "source", module))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert [g["targets"] for g in config["config_groups"].values()] == [["gate"], ["head"]]
    assert config["ignore"] == ["up"] and config["format"] == "pack-quantized"


def test_tied_weights_stay_tied_unless_quantization_tells_them_apart(tmp_path):
    class Deep(Tied):
        def __init__(self):
            super().__init__()
            self.mid = nn.Linear(64, 64)

        def forward(self, ids):
            return self.head(self.mid(self.embed(ids)))

    deep = Deep().eval()
    source = folder_of(tmp_path / "source", {n: t for n, t in deep.state_dict().items() if n != "head.weight"})
    (source / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    in_float = qgraph.load_recipe("w4a16-g16", ["embeddings=null", "rules={model.head: null}"])
    apart = qgraph.load_recipe("w4a16-g16", ["rules={model.head: {weights: {bits: 4, group: 16}}}"])
    for recipe, tied in ((in_float, True), ("w4a16-g16", True), (apart, False)):
        gm = quantized(deep, recipe)
        folder = qgraph.save_checkpoint(gm, tmp_path / str(len(list(tmp_path.iterdir()))), source=source)
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is tied
        found = qgraph.load_checkpoint(folder)
        assert set(found) == {"embed.weight", "mid.weight", "mid.bias"} | (set() if tied else {"head.weight"})
        again = Deep()
        if not tied:
            again.head.weight = nn.Parameter(torch.zeros(50, 64))
        assert close(qgraph.from_checkpoint(again.eval(), found, (IDS,))(IDS), gm(IDS))


def test_what_the_format_cannot_say_is_refused_and_nothing_is_written(tmp_path):
    module = Net().eval()
    source = source_of(tmp_path / "source", module)
    good = quantized(module, "w4a16-g16")
    cases = [
        (
            qgraph.from_checkpoint(Wrapper(Net()).eval(), {f"model.{n}": v for n, v in values().items()}, (IDS,)),
            "sorts its columns or adds minima",
        ),
        (quantized(module, "w4a8-g16"), "activations as int8 .* per group of 16 .* have no place in the format"),
        (qgraph.capture(module, (IDS,)), "from a converted graph"),
    ]
    for gm, message in cases:
        with pytest.raises(ModelError, match=message):
            qgraph.save_checkpoint(gm, tmp_path / "out", source=source)
    with pytest.raises(ModelError, match="exists already"):
        qgraph.save_checkpoint(good, source, source=source)
    with pytest.raises(ModelError, match="the folder .*absent does not exist"):
        qgraph.save_checkpoint(good, tmp_path / "absent" / "out", source=source)
    with pytest.raises(ModelError, match="no folder with a .safetensors file"):
        qgraph.save_checkpoint(good, tmp_path / "out", source=tmp_path / "nothing")
    folder_of(tmp_path / "more", {"extra.weight": torch.ones(2), **module.state_dict()})
    (tmp_path / "more" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="nothing for the parameter 'extra.weight'"):
        qgraph.save_checkpoint(good, tmp_path / "out", source=tmp_path / "more")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["more", "source"]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    module = Net().eval()
    source, gm = source_of(tmp_path / "source", module), quantized(module, "w4a16-g16")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qgraph.checkpoints.save.write", full)
    with pytest.raises(ModelError, match="out cannot be written: No space left on device"):
        qgraph.save_checkpoint(gm, tmp_path / "out", source=source)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A small decoder of transformers with tied embeddings: (module that gives logits, ids, its folder)."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=128)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True)).eval()
    folder = tmp_path_factory.mktemp("llama") / "source"
    model.save_pretrained(folder)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm = model

        def forward(self, input_ids):
            return self.lm(input_ids=input_ids, use_cache=False).logits

    return Logits().eval(), torch.randint(0, 128, (2, 16)), folder


@pytest.mark.parametrize("recipe", ["w4a16-g32-sym", "w4a16-g32", "w8a16", "w8a8", "w8a8-token"])
def test_transformers_loads_a_saved_checkpoint_and_computes_the_same(tmp_path, llama, recipe):
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    module, ids, source = llama
    gm = qgraph.quantize(module, [(ids,)], example_inputs=(ids,), recipe=recipe)
    folder = qgraph.save_checkpoint(gm, tmp_path / "out", source=source)
    # compressed-tensors 0.20 makes zero points of another shape than it writes, unless it dequantizes while it loads
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if recipe == "w4a16-g32" else {}
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    assert not any(info.values())
    with torch.no_grad():
        found, expected = model(input_ids=ids).logits, gm(ids)
    # scales per token are absmax / 127.5 there, / 127 here
    assert close(found, expected, 0.02 if recipe == "w8a8-token" else 1e-6)
