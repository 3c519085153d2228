"""Pretrained weights from local files: saved here, by timm and transformers, and read back through them."""

import json
import shutil
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from test_pipeline import IMAGES, command, toy
from transformers import BertTokenizer, GPT2Config, GPT2LMHeadModel

from clipcap_lib import checkpoint, train
from clipcap_lib.config import InputError, ModelConfig, preset
from clipcap_lib.corpora import miniature
from clipcap_lib.data import load_prepared
from clipcap_lib.files import read_json
from clipcap_lib.model import ClipCap
from clipcap_lib.prepare import prepare
from clipcap_lib.pretrained import identity, load_pretrained, training_tokenizer
from clipcap_lib.tokenizer import build_tokenizer, build_vocabulary, decode, encode

CAPTIONS = ["一只红色的狗在草地上", "两只猫", "一个男人在海边跑步,跑!"]


@pytest.fixture(scope="module")
def bert_vocabulary() -> list[str]:
    """The form of BERT's Chinese vocabulary: special tokens in its middle, pieces of words, letters."""
    characters = sorted({c for caption in CAPTIONS for c in caption} | set("蓝黄绿白黑紫车树花鸟鱼船球房子左右边有和三四"))
    return ["[PAD]", "[unused1]", "[unused2]", "a", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, "##a"]


@pytest.fixture(scope="module")
def gpt_folder(tmp_path_factory, bert_vocabulary):
    """A GPT-2 with its tokenizer, as such models are published."""
    folder = tmp_path_factory.mktemp("gpt")
    torch.manual_seed(3)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(bert_vocabulary), n_positions=64, n_embd=32, n_layer=2, n_head=2)
                    ).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(bert_vocabulary) + "\n", encoding="utf-8")
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def config(**options):
    model = ModelConfig(encoder="resnet10t", image_size=32, image_tokens="grid", layers=2, width=32, heads=2, context=30)
    return replace(toy(), model=model, **options)


def test_captions_get_the_ids_of_the_gpts_own_tokenizer(gpt_folder, tmp_path, bert_vocabulary):
    build_tokenizer(build_vocabulary(CAPTIONS)).save_pretrained(tmp_path / "tokenizer")
    ours = training_tokenizer(config(gpt_weights=str(gpt_folder)), tmp_path)
    theirs = BertTokenizer.from_pretrained(gpt_folder)
    found = encode(ours, CAPTIONS, 30)
    assert found == theirs(CAPTIONS)["input_ids"]
    assert encode(ours, ["两只A猫"], 30) == theirs(["两只A猫"])["input_ids"] == encode(ours, ["两只a猫"], 30)
    exact = tmp_path / "exact"
    BertTokenizer(vocab=str(gpt_folder / "vocab.txt"), do_lower_case=False).save_pretrained(exact)
    cased = training_tokenizer(config(gpt_weights=str(exact)), tmp_path)
    assert encode(cased, ["两只A猫"], 30) == BertTokenizer.from_pretrained(exact)(["两只A猫"])["input_ids"]
    assert encode(cased, ["两只A猫"], 30) != encode(cased, ["两只a猫"], 30)
    few = {token: number for number, token in enumerate(bert_vocabulary[:8])}
    BertTokenizer(vocab=few).save_pretrained(tmp_path / "few")
    with pytest.raises(InputError, match="knows 0 of the .* characters"):
        training_tokenizer(config(gpt_weights=str(tmp_path / "few")), tmp_path)
    assert found[0][0] == 5 and found[0][-1] == 6 == ours.sep_token_id, "its end token is not 3"
    assert [decode(ours, ids) for ids in found] == CAPTIONS
    info = checkpoint.model_info(ours)
    assert info == {"vocab_size": len(bert_vocabulary), "pad_id": 0, "start_id": 5, "end_id": 6}


def test_a_pretrained_gpt_reads_behind_the_image_as_it_did_from_zero(gpt_folder, tmp_path):
    settings = config(gpt_weights=str(gpt_folder))
    build_tokenizer(build_vocabulary(CAPTIONS)).save_pretrained(tmp_path / "tokenizer")
    tokenizer = training_tokenizer(settings, tmp_path)
    model = train.new_model(settings, tokenizer, 1).eval()
    before = model.gpt.transformer.wpe.weight.detach().clone()
    load_pretrained(model, settings)
    theirs = GPT2LMHeadModel.from_pretrained(gpt_folder).eval()
    ids = torch.tensor(encode(tokenizer, CAPTIONS[:1], 30))
    with torch.inference_mode():
        torch.testing.assert_close(model.language_logits(ids), theirs(input_ids=ids).logits)
    first = model.prefix_length
    assert first > 1
    assert torch.equal(model.gpt.transformer.wpe.weight[:first], before[:first]), "rows of image tokens stay random"
    assert torch.equal(model.gpt.transformer.wpe.weight[first:], theirs.transformer.wpe.weight[:30])


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_image_weights_come_from_a_file_through_timm(ending, tmp_path):
    torch.manual_seed(4)
    source = timm.create_model("resnet10t", num_classes=1000)
    path = tmp_path / f"weights.{ending}"
    (save_file if ending == "safetensors" else torch.save)(source.state_dict(), path)
    settings = config(image_weights=str(path))
    model = ClipCap(replace(settings.model, vocab_size=10))
    load_pretrained(model, settings)
    for name, tensor in model.image_encoder.backbone.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name


def test_the_originals_backbone_loads_from_a_file(tmp_path):
    source = timm.create_model("res2next50", num_classes=1000)
    save_file(source.state_dict(), tmp_path / "res2next50.safetensors")
    settings = replace(preset("hualu"), image_weights=str(tmp_path / "res2next50.safetensors"))
    model = ClipCap(replace(settings.model, vocab_size=10, layers=1, width=32, heads=2))
    load_pretrained(model, settings)
    assert torch.equal(model.image_encoder.backbone.conv1.weight, source.conv1.weight)


def test_weights_that_cannot_be_had_stop_the_run(tmp_path, gpt_folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = ClipCap(replace(config().model, vocab_size=20))
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    bare = tmp_path / "bare"
    GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=64, n_embd=16, n_layer=1, n_head=1)).save_pretrained(bare)
    for options, words in ({"image_weights": str(tmp_path / "none.pth")}, "none.pth: no such file"), (
            {"image_weights": str(tmp_path / "broken.pth")}, "broken.pth: the pretrained weights cannot be had"), (
            {"image_weights": str(tmp_path / "other.safetensors")}, "not weights of resnet10t"), (
            {"gpt_weights": str(tmp_path / "nowhere")}, "nowhere: the pretrained configuration cannot be had"), (
            {"gpt_weights": str(bare)}, "does not fit the preset's: n_layer 1 instead of 2; n_embd 16 instead of 32"):
        with pytest.raises(InputError, match=words):
            load_pretrained(model, config(**options))
    weights = load_file(gpt_folder / "model.safetensors")
    shutil.copytree(gpt_folder, tmp_path / "stripped")
    for left in ({name: tensor for name, tensor in weights.items() if ".h.1." not in name}, {"other": torch.zeros(1)}):
        save_file(left, tmp_path / "stripped" / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match="stripped: these are not weights of a GPT-2 of 2 layers: .* missing"):
            load_pretrained(model, config(gpt_weights=str(tmp_path / "stripped")))
    for changed, words in (({"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon 0.001"), ({"n_inner": 8}, "n_inner 8"),
                           ({"tie_word_embeddings": False}, "tie_word_embeddings False")):
        (tmp_path / "stripped" / "config.json").write_text(json.dumps({**read_json(gpt_folder / "config.json"), **changed}))
        with pytest.raises(InputError, match=f"does not fit the preset's: {words}"):
            load_pretrained(model, config(gpt_weights=str(tmp_path / "stripped")))
    with pytest.raises(InputError, match="bare: the pretrained tokenizer cannot be had|has no"):
        training_tokenizer(config(gpt_weights=str(bare)), tmp_path)
    load_pretrained(model, config())  # random weights, as asked for


def test_other_content_at_the_same_path_is_other_weights(tmp_path):
    assert identity("random") == "random" and identity("some/hub-name") == "some/hub-name"
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"1")
    found = [identity(str(file)), identity(str(tmp_path))]
    (tmp_path / "README.md").write_text("of no weight")
    assert [identity(str(file)), identity(str(tmp_path))] == found
    file.write_bytes(b"2")
    assert not {identity(str(file)), identity(str(tmp_path))} & set(found)


def test_a_preset_asks_for_weights_only_when_told_and_a_missing_file_ends_the_command(tmp_path, capsys, monkeypatch):
    corpora = miniature.write_corpora(tmp_path / "corpora", images=IMAGES, processes=1)
    run = tmp_path / "runs" / "miniature"
    prepare(toy(), run / "data", corpora, processes=1, report=lambda line: None)
    code, said = command(run, capsys, monkeypatch, "train", "--image-weights", str(tmp_path / "none.pth"))
    assert code == 2 and "none.pth: no such file of image weights" in said and said.count("\n") == 1
    assert not list(run.glob("*/*/best"))


def test_both_stages_train_from_pretrained_weights_and_the_captioner_loads_without_them(tmp_path, gpt_folder):
    corpora = miniature.write_corpora(tmp_path / "corpora", images={"flickr8k-cn": {"train": 24, "val": 6, "test": 4}},
                                      processes=1)
    run = tmp_path / "miniature"
    save_file(timm.create_model("resnet10t", num_classes=5).state_dict(), tmp_path / "weights.safetensors")
    settings = config(gpt_weights=str(gpt_folder), image_weights=str(tmp_path / "weights.safetensors"))
    settings = replace(settings, image=replace(settings.image, epochs=0))
    prepare(settings, run / "data", corpora, processes=1, report=lambda line: None)
    train.pretrain_clip(settings, run)
    folder = train.finetune_captioner(settings, run, "model1")
    (tmp_path / "weights.safetensors").unlink()
    said = []
    train.finetune_captioner(settings, run, "model1", progress=said.append)
    assert [line["event"] for line in said] == ["done before"], "its weights came from CLIP, not from the file"
    with pytest.raises(InputError, match="no such file of image weights"):
        train.pretrain_clip(settings, run)
    assert checkpoint.exists(run / "clip" / "all" / "best"), "and nothing is lost"
    model = checkpoint.load(folder / "best")
    assert model.end_id == 6 and model.tokenizer.sep_token_id == 6
    picture = load_prepared(run / "data", "val")[0]["image"]
    assert isinstance(model.caption([picture], max_length=6)[0], str)
