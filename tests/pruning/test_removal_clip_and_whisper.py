"""Every operation on CLIP's two towers, and on Whisper's encoder and decoder."""

import pytest
import torch
from transformers import CLIPModel

import billhook as bh
from billhook.model.layers import prunable
from billhook.units.blocks import skipping
from billhook.units.find import find_units
from kit.clip_and_whisper import clip, clip_batch, whisper, whisper_batch

CASES = {"clip": (clip, clip_batch), "whisper": (whisper, whisper_batch)}


def made(name):
    build, batch = CASES[name]
    return build().eval(), batch()


def answer(model, batch):
    with torch.no_grad():
        output = model.eval()(**batch)
    return output.logits_per_image if isinstance(model, CLIPModel) else output.logits


def goes_on(model, batch, folder):
    """Saves a model, and compares what is loaded: logits, and what it writes."""
    bh.save(model, folder / "out")
    loaded = bh.load(folder / "out")
    assert torch.equal(answer(loaded, batch), answer(model, batch))
    if not isinstance(model, CLIPModel):
        sound = batch["input_features"]
        assert torch.equal(loaded.generate(sound, max_new_tokens=5), model.generate(sound, max_new_tokens=5))


@pytest.mark.daily("clip-channel", "whisper-residual")
@pytest.mark.parametrize(
    ("name", "kind"),
    [("clip", "head"), ("clip", "channel"), ("whisper", "head"), ("whisper", "channel"), ("whisper", "residual")],
)
def test_units_go_as_if_they_were_masked(tmp_path, name, kind):
    """Of CLIP in both towers; of Whisper in the encoder, in the decoder's own attention and in that to the encoder."""
    model, batch = made(name)
    units = find_units(model, kind)
    if name == "clip":
        assert {place.partition(".")[0] for place in units} == {"text_model", "vision_model"}
    elif kind == "head":
        counts = [sum(part in place for place in units) for part in (".encoder.", "decoder", "encoder_attn")]
        assert counts == [2, 4, 2]
    gone = {place: [number % 2, 2] for number, place in enumerate(units)}
    whole = answer(model, batch)
    with bh.mask(model, gone, kind):
        expected = answer(model, batch)
    bh.pruning.prune_units(model, gone, kind=kind)
    found = answer(model, batch)
    if kind != "residual":  # norms of fewer channels are others
        assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, whole, atol=1e-2)
    goes_on(model, batch, tmp_path)


def test_blocks_of_both_towers_go_as_if_they_were_skipped(tmp_path):
    model, batch = made("clip")
    gone = {"text_model.encoder.layers": [0], "vision_model.encoder.layers": [1]}
    with skipping(model, gone):
        expected = answer(model, batch)
    bh.pruning.prune_units(model, gone, kind="block")
    assert torch.allclose(answer(model, batch), expected, rtol=1e-5)
    goes_on(model, batch, tmp_path)
    plain = CLIPModel.from_pretrained(tmp_path / "out")
    assert (plain.config.text_config.num_hidden_layers, plain.config.vision_config.num_hidden_layers) == (1, 1)
    assert torch.equal(answer(plain, batch), answer(model, batch))


def test_widths_that_the_output_shows_stay():
    """CLIP returns the hidden states of both towers beside what it compares."""
    model = clip()
    with pytest.raises(ValueError, match="cannot be removed from .*: the model's output has it"):
        bh.pruning.prune_units(model, {place: [0] for place in find_units(model, "residual")}, kind="residual")


def test_kv_heads_are_merged_in_both_towers(tmp_path):
    model, batch = made("clip")
    bh.convert_kv_heads(model, 2, "svd", [batch])
    merged = [
        name for name, linear in model.named_modules() if name.endswith(("k_proj", "v_proj")) and linear.weight.shape == (8, 16)
    ]
    assert len(merged) == 8
    goes_on(model, batch, tmp_path)


@pytest.mark.daily("whisper")
@pytest.mark.parametrize("name", CASES)
def test_scores_repair_and_weights(tmp_path, name):
    model, _ = made(name)
    batches = [CASES[name][1](seed) for seed in range(2)]
    plan = bh.plan(model, bh.Taylor(), batches, heads=0.5, channels=0.25)
    bh.apply(model, plan, weights=bh.repair(model, plan, batches))
    bh.prune(model, bh.Wanda(), batches, sparsity=0.5)
    zeros = {place: float((linear.weight == 0).float().mean()) for place, linear in prunable(model).items()}
    assert set(zeros.values()) == {0.5}
    if name == "whisper":
        assert {"model.encoder.conv2", "model.decoder.layers.0.encoder_attn.q_proj"} <= zeros.keys()
    goes_on(model, batches[0], tmp_path)
