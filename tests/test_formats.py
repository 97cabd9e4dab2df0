"""Models in other formats: read back exactly, run by transformers with our logits, or refused."""

import io
import json
import os
import runpy
import shutil
import struct
import sys
import zlib

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import EVERYTHING, REPO, bin_of, logits_of, random_model, refused, script
from local_hub import Hub
from test_tokenizer import generated_texts

from configurator import UserError
from formats import gguf as gguffile
from formats import huggingface
from formats import table as formats
from formats.hftokenizer import byte_level_from_json
from formats.modelbin import export_model, read_bin, read_fingerprint
from formats.table import FORMATS, load, recognize
from formats.tensors import windows
from system.remote import need
from tokenizer import byte_level_json, open_tokenizer, train_sentencepiece
from training.checkpoint import load_checkpoint, save_file

# name: options, the class of transformers that loads it
CASES = {
    "plain": ({}, "LlamaForCausalLM"),
    "gqa": ({"n_kv_heads": 2, "hidden_dim": 88}, "LlamaForCausalLM"),
    "untied": ({"tie_embeddings": False, "rope_theta": 5e5, "norm_eps": 1e-6}, "LlamaForCausalLM"),
    "padded": ({"vocab_multiple": 64, "n_kv_heads": 1}, "LlamaForCausalLM"),
    "padded_untied": ({"vocab_multiple": 64, "tie_embeddings": False}, "LlamaForCausalLM"),
    "portable": ({"qk_norm": True, "n_kv_heads": 2}, "Qwen3ForCausalLM"),
    "portable_untied": ({"qk_norm": True, "tie_embeddings": False}, "Qwen3ForCausalLM"),
    "windows": ({"qk_norm": True, "sliding_window": 5, "n_layers": 4}, "Qwen3ForCausalLM"),
    "softcap": ({"logit_softcap": 5.0}, "ModdedLlamaForCausalLM"),
    "modded": (EVERYTHING, "ModdedLlamaForCausalLM"),
    "gated": ({"smear": True, "bigram_rows": 64, "sliding_window": 4}, "ModdedLlamaForCausalLM"),
}
IN_GGUF = ("LlamaForCausalLM", "Qwen3ForCausalLM")


def sized(tokenizer, **options):
    return random_model(**{"vocab_size": tokenizer.vocab_size, **options})


def same_model(found, model):
    """Equal tensors, but for rows past the vocabulary, and equal ModelArgs in what is exported."""
    expected, state = model.state_dict(), found.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name][: len(tensor)]), name
    args = model.args.to_dict()
    differing = {k for k, value in found.args.to_dict().items() if value != args[k]}
    assert differing <= {"vocab_multiple", "window_pattern"}
    assert windows(found.args) == windows(model.args)


def transformers_model(folder, name="CausalLM"):
    """The model as a user of transformers gets it; remote code only where it must be."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())
    trust = "auto_map" in config
    assert AutoConfig.from_pretrained(folder, trust_remote_code=trust).vocab_size
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).eval()


def export(*words):
    """Run export.py in this process, which has all it needs in memory; UserError comes through."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export.py", *map(str, words)])
        patch.setattr(sys, "excepthook", sys.excepthook)
        runpy.run_path(str(REPO / "export.py"), run_name="__main__")


def close(found, expected):
    return (found - expected).abs().max() <= 1e-4 * expected.abs().max()


# ---- round trips


ROUND_TRIPS = [
    (to, name)
    for to in FORMATS
    for name, (options, kind) in CASES.items()
    if to != "gguf" or (kind in IN_GGUF and "sliding_window" not in options)
]


@pytest.mark.parametrize("to, name", ROUND_TRIPS)
def test_round_trips_are_exact(tmp_path, tokenizers, to, name):
    """From a checkpoint to any format and back to a checkpoint, in two commands' worth of calls."""
    options, _ = CASES[name]
    tokenizer = tokenizers[512]
    model = sized(tokenizer, **options)
    path = str(tmp_path / f"there{FORMATS[to].ending or '_hf'}")
    FORMATS[to].write(model, path, "fp32", tokenizer, {})
    assert recognize(path) == to
    loaded = load(path, tokenizer="" if to != "bin" else tokenizer.model_path)
    same_model(loaded.model, model)
    text = "Once upon a time, there was Zoë. 😀\n"
    assert loaded.tokenizer.encode(text) == tokenizer.encode(text)
    back = str(tmp_path / "back" / "ckpt.pt")
    FORMATS["checkpoint"].write(loaded.model, back, "fp32", loaded.tokenizer, {})
    again = load(back)
    same_model(again.model, model)
    assert again.tokenizer.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("which", ["gpt2", "gpt4"])
@pytest.mark.parametrize("to", FORMATS)
def test_byte_level_tokenizers_travel_too(tmp_path, tokenizers, to, which, run):
    tokenizer = tokenizers[which]
    model = sized(tokenizer, qk_norm=True)
    path = str(tmp_path / f"there{FORMATS[to].ending or '_hf'}")
    FORMATS[to].write(model, path, "fp32", tokenizer, {})
    loaded = load(path, tokenizer="" if to != "bin" else tokenizer.model_path)
    same_model(loaded.model, model)
    for text in generated_texts(200, seed=3):
        assert loaded.tokenizer.encode(text) == tokenizer.encode(text)
    assert loaded.tokenizer.stop == (tokenizer.bos_id,)
    FORMATS["bin"].write(loaded.model, str(tmp_path / "m" / "m.bin"), "fp32", loaded.tokenizer, {})
    done = run(tmp_path / "m" / "m.bin", "-t", "0", "-i", "Once upon", "-n", "32")
    ids = tokenizer.encode("Once upon")
    told = [*ids, *model.generate(ids, 33 - len(ids), temperature=0, stop=tokenizer.stop)]
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().removesuffix("\n") == tokenizer.decode(told)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizers):
    """The out_dir of a run, as far as exports look at it."""
    folder, tokenizer = tmp_path_factory.mktemp("finished"), tokenizers[512]
    model = sized(tokenizer, **EVERYTHING)
    value = {"model": model.state_dict(), "model_args": model.args.to_dict(), "iter_num": 60}
    config = {"max_seq_len": 32, "optimizer": "muon", "data_dir": str(folder)}
    value |= {"config": config, "n_sequences": 480, "train_s": 90.0}
    for name in ("best.pt", "ckpt.pt"):
        save_file(folder / name, value)
    lines = [{"kind": "start", "config": {}, "train_tokens": 123456, "device_name": "a processor"}]
    evaluated = {"kind": "eval", "tokens": 9, "time_s": 1.0, "train_s": 1.0, "val_loss": 2.5}
    lines += [{**evaluated, "step": n, "val_bpb": n / 100} for n in (40, 60)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{")
    (folder / "tokenizer.model").write_bytes(tokenizer.proto)
    return folder


@pytest.mark.slow
def test_from_a_run_to_a_folder_and_on(tmp_path, finished, run):
    """sample.py tells the same of a run, of what was made of it, and ./run of its model.bin."""
    best, folder, back = finished / "best.pt", tmp_path / "hf", tmp_path / "back" / "ckpt.pt"
    done = script("export.py", folder, "--format=hf", f"--checkpoint={best}")
    assert done.returncode == 0, done.stderr
    export(back, f"--from-hf={folder}")
    words = ["--temperature=0", "--max_new_tokens=20", "--start=Once"]
    told = [script("sample.py", f"--checkpoint={one}", *words) for one in (best, folder, back)]
    assert all(done.returncode == 0 for done in told), [done.stderr for done in told]
    assert len({done.stdout for done in told}) == 1 and told[0].stdout.startswith("Once")
    export(tmp_path / "r" / "model.bin", f"--from-hf={folder}")
    told_in_c = run(tmp_path / "r" / "model.bin", "-t", 0, "-n", 12, "-i", "Once").stdout
    assert told[0].stdout.startswith(told_in_c.decode(errors="replace").strip("\ufffd\n"))

    card = (folder / "README.md").read_text()
    for part in (
        "| steps | 60 |",
        "| tokens seen | 15,360 |",
        "| training | 1.5 minutes |",
        "| training text | 123,456 tokens |",
        "| validation | 0.6000 bits per byte |",
        "| activation | relu2 |",
        "trust_remote_code=True",
    ):
        assert part in card
    assert str(finished) not in card + (folder / "config.json").read_text()
    assert card.startswith("---\nlanguage: en\nlicense: unknown\n")
    assert "license: unknown" in done.stdout and "\n# Story teller of " in card
    words = ["--format=hf", f"--checkpoint={best}", "--license=mit", "--language=de"]
    assert script("export.py", folder, *words, "--title=Tim  und\nLily").returncode == 0
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlanguage: de\nlicense: mit\n") and "\n# Tim und Lily\n" in card
    refused(script("export.py", folder, *words[:-1], "--language=a\nb"), "expected a short code")
    words[0] = tmp_path / "x.bin"
    refused(script("export.py", *words[:3]), "license is for --format=hf and --format=gguf")


def test_a_theta_that_is_a_whole_number(tmp_path, tokenizers):
    """JSON has 500000 where GGUF must have 500000.0."""
    import gguf

    huggingface.write_folder(
        sized(tokenizers[512]), str(tmp_path / "hf"), "fp32", tokenizers[512], {}
    )
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "rope_theta": 500000}))
    loaded = load(str(tmp_path / "hf"))
    gguffile.write_gguf(loaded.model, str(tmp_path / "m.gguf"), "fp32", loaded.tokenizer, {})
    field = gguf.GGUFReader(tmp_path / "m.gguf").fields["llama.rope.freq_base"]
    assert field.types == [gguf.GGUFValueType.FLOAT32] and field.contents() == 500000


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_the_bytes(tmp_path, tokenizers, dtype):
    model = sized(tokenizers[512], **EVERYTHING)
    for to in ("hf", "safetensors"):
        path = str(tmp_path / f"there{FORMATS[to].ending or '_hf'}")
        FORMATS[to].write(model, path, dtype, tokenizers[512], {})
        found, number_format = load(path).model.state_dict(), huggingface.TORCH_DTYPES[dtype]
        for name, tensor in model.state_dict().items():
            expected = tensor[: len(found[name])].to(number_format).float()
            assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "q8_0", "q4_0"])
def test_number_formats_of_gguf(tmp_path, tokenizers, capsys, dtype):
    model = sized(tokenizers[512], dim=64, hidden_dim=88)
    gguffile.write_gguf(model, tmp_path / "model.gguf", dtype, tokenizers[512], {})
    found = gguffile.read_gguf(tmp_path / "model.gguf")[0].state_dict()
    worst = {"fp16": 3e-4, "bf16": 3e-3, "q8_0": 8e-3, "q4_0": 0.1}[dtype]
    for name, tensor in model.state_dict().items():
        error = (found[name] - tensor).norm() / tensor.norm()
        assert error <= (0 if tensor.dim() == 1 else worst), name
    said = capsys.readouterr().out
    assert ("2 tensors, such as blk.0.ffn_down.weight, stay in F16" in said) == ("q" in dtype)


# ---- transformers


@pytest.mark.parametrize("name", CASES)
def test_transformers_has_our_logits_and_tells_the_same(tmp_path, tokenizers, name):
    options, kind = CASES[name]
    model = sized(tokenizers[105], **options)
    huggingface.write_folder(model, str(tmp_path / "hf"), "fp32", tokenizers[105], {})
    theirs = transformers_model(tmp_path / "hf")
    assert type(theirs).__name__ == kind
    tokens = torch.randint(3, 105, (2, 24))
    with torch.no_grad():
        assert close(theirs(tokens).logits, model(tokens))
    words = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": None}
    found = theirs.generate(tokens[:1, :6], **words)[0, 6:].tolist()
    assert found == list(model.generate(tokens[0, :6].tolist(), 16, temperature=0))


def test_our_modeling_file_does_what_transformers_asks_of_it(tmp_path, tokenizers):
    """Padding on the left and on the right, beams with a cache and without, a loss, gradients."""
    model = sized(tokenizers[105], **EVERYTHING)
    huggingface.write_folder(model, str(tmp_path / "hf"), "fp32", None, {})
    theirs = transformers_model(tmp_path / "hf")
    tokens = torch.randint(3, 105, (1, 9))
    for left in (4, 0):
        padded = torch.nn.functional.pad(tokens, (left, 4 - left), value=2)
        mask = torch.zeros(1, 13, dtype=torch.int64)
        mask[:, left : left + 9] = 1
        with torch.no_grad():
            found = theirs(padded, attention_mask=mask).logits[:, left : left + 9]
            assert close(found, model(tokens))
    words = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    padded = torch.nn.functional.pad(tokens, (4, 0), value=2)
    mask = (torch.arange(13) >= 4).long()[None]
    found = theirs.generate(padded, attention_mask=mask, **words)[0, 13:].tolist()
    assert found == list(model.generate(tokens[0].tolist(), 12, temperature=0))
    beams = [
        theirs.generate(tokens, num_beams=3, use_cache=use_cache, **words)
        for use_cache in (True, False)
    ]
    assert torch.equal(*beams)
    loss, expected = theirs(tokens, labels=tokens).loss, model(tokens[:, :-1], tokens[:, 1:])
    assert abs(loss - expected) < 1e-5
    loss.backward()
    expected.backward()
    gradients = dict(model.named_parameters())
    for name in ("smear_gate.weight", "residual_scalars", "bigram_embeddings.weight"):
        found = dict(theirs.named_parameters())[f"model.{name}"].grad
        assert close(found, gradients[name].grad), name
    for words, part in (
        ({"inputs_embeds": torch.zeros(1, 9, 48)}, "give input_ids"),
        ({"output_hidden_states": True}, "does not return hidden states"),
        (
            {"attention_mask": torch.ones(1, 1, 9, 9, dtype=torch.bool)},
            "expected an attention_mask",
        ),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]])}, "one text a row"),
    ):
        with pytest.raises(ValueError, match=part):
            theirs(tokens, **words)
    with pytest.raises(ValueError, match="stays as it is"):
        theirs.resize_token_embeddings(120)
    halves = theirs(tokens, labels=tokens, num_items_in_batch=torch.tensor(16)).loss
    assert abs(halves - loss / 2) < 1e-5  # 8 places of 16
    theirs.save_pretrained(tmp_path / "again")
    again = transformers_model(tmp_path / "again")
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("name", ["plain", "modded"])
def test_the_cards_code_tells_a_story_and_stops(tmp_path, tokenizers, name, capsys, monkeypatch):
    model = sized(tokenizers[512], **CASES[name][0])
    huggingface.write_folder(model, str(tmp_path / "hf"), "fp32", tokenizers[512], {})
    card = (tmp_path / "hf" / "README.md").read_text()
    monkeypatch.chdir(tmp_path / "hf")
    exec(card.partition("```python\n")[2].partition("```")[0], found := {})
    assert capsys.readouterr().out.startswith("Once upon a time")
    config = found["model"].generation_config
    assert config.eos_token_id == [2, 1] and config.bos_token_id == 1
    huggingface.write_folder(model, str(tmp_path / "bare"), "fp32", None, {})
    for name in ("config.json", "generation_config.json"):  # of a vocabulary that is not ours
        assert "token_id" not in (tmp_path / "bare" / name).read_text()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen3"])
def test_folders_that_transformers_wrote(tmp_path, builds, kind, tied):
    import transformers

    windows = {
        "Mistral": {"sliding_window": 5},
        "Qwen3": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    }
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=300,
        hidden_size=48,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        rope_theta=500000.0,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        **windows.get(kind, {}),
    )
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    model = load(str(tmp_path / "hf")).model.eval()
    assert model.args.rope_theta == 500000 and model.args.norm_eps == 1e-6
    tokens = torch.randint(0, 300, (1, 32))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert close(model(tokens), expected)
    export_model(model, tmp_path / "model.bin")
    path = tmp_path / "model.bin"
    found = logits_of(builds["harness", "checked"], path, tokens[0].tolist(), 300)
    assert close(torch.from_numpy(found.copy()), expected[0])


@pytest.mark.parametrize("which", [105, 512, 1500, "gpt2", "gpt4"])
def test_autotokenizer_has_our_ids(tmp_path, tokenizers, which):
    from transformers import AutoTokenizer

    tokenizer = tokenizers[which]
    huggingface.write_folder(sized(tokenizer), str(tmp_path / "hf"), "fp32", tokenizer, {})
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    texts = [*generated_texts(4000, seed=4), "<|endoftext|>", "a<|endoftext|><|end|> b"]
    texts += [c * n for c in ("a", " ", "\n", "ha", "é") for n in range(24)] + ["\0", "a\0b"]
    for text, their_ids in zip(texts, theirs(texts)["input_ids"], strict=True):
        ids = tokenizer.encode(text)
        assert their_ids == ids, text
        if which != 105 and "<|" not in text:
            assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    ids = [theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id]
    assert ids == [tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_id]


@pytest.mark.slow
def test_a_tokenizer_json_alone_is_enough_to_sample(tmp_path, tokenizers, capsys):
    model = sized(tokenizers[512])
    huggingface.write_folder(model, str(tmp_path / "hf"), "fp32", tokenizers[512], {})
    os.remove(tmp_path / "hf" / "tokenizer.model")
    found, text = load(str(tmp_path / "hf")).tokenizer, "Once upon a time, Zoë said 😀"
    ids = tokenizers[512].encode(text)
    assert found.encode(text) == found.encode(text.encode()) == ids and found.decode(ids) == text
    assert found.encode("") == [1] and {1, 2} == {*found.stop}
    done = script("sample.py", f"--checkpoint={tmp_path / 'hf'}", "--start=Once upon a time")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time") and len(done.stdout) > 20
    export(tmp_path / "m.bin", f"--from-hf={tmp_path / 'hf'}")
    assert "only a tokenizer.model is exported" in capsys.readouterr().out
    with pytest.raises(UserError, match="needs the tokenizer"):
        export(tmp_path / "m.gguf", f"--from-hf={tmp_path / 'hf'}")


def test_what_a_tokenizer_json_does_is_transformers(tmp_path, tokenizers):
    """It neither pads nor truncates, and what the library cannot do ends in a sentence."""
    tokenizer, path = tokenizers["gpt2"], tmp_path / "hf" / "tokenizer.json"
    huggingface.write_folder(sized(tokenizer), str(tmp_path / "hf"), "fp32", tokenizer, {})
    os.remove(tmp_path / "hf" / "tokenizer.model")
    whole = json.loads(path.read_text())
    padding = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 1, "pad_type_id": 0, "pad_token": "a"}
    truncation = {"direction": "Left", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps({**whole, "padding": padding, "truncation": truncation}))
    assert load(str(tmp_path / "hf")).tokenizer.encode("Once upon") == tokenizer.encode("Once upon")
    begin = whole["post_processor"]["special_tokens"]["<|endoftext|>"]
    for ids, part in (([1 << 20], "it has no token 1048576"), (None, "no entry found for key")):
        wrong = {"<|endoftext|>": {**begin, "ids": ids}} if ids else {}
        wrong = {**whole["post_processor"], "special_tokens": wrong}
        path.write_text(json.dumps({**whole, "post_processor": wrong}))
        with pytest.raises(UserError, match=rf"tokenizer.json cannot be read: .*{part}"):
            load(str(tmp_path / "hf")).tokenizer.encode("Once upon")
    path.write_text(json.dumps(whole))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "generation_config.json").unlink()
    for ids, stop in ((5, (5,)), ([5, 7], (5, 7)), (1 << 40, ()), (None, ())):
        text = json.dumps({**config, "bos_token_id": None, "eos_token_id": ids})
        (tmp_path / "hf" / "config.json").write_text(text)
        assert load(str(tmp_path / "hf")).tokenizer.stop == stop
    for ids in ("5", True, -1, [5, None]):
        (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "eos_token_id": ids}))
        with pytest.raises(UserError, match=r"eos_token_id = .*; expected ids of tokens"):
            load(str(tmp_path / "hf"))


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": False, "value_embeddings": 1}])
def test_rows_without_a_piece_are_never_drawn(tmp_path, tokenizers, capsys, run, options):
    """An embedding that was padded to a round number of rows is cut to the tokenizer's pieces."""
    tokenizer = tokenizers[512]
    padded = random_model(vocab_size=576, **options)
    with torch.no_grad():
        padded.output.weight[512:] *= 9  # would be drawn
    huggingface.write_folder(padded, str(tmp_path / "hf"), "fp32", None, {})
    (tmp_path / "hf" / "tokenizer.model").write_bytes(tokenizer.proto)
    loaded = load(str(tmp_path / "hf"))
    assert "note: 64 of 576 tokens have no piece" in capsys.readouterr().out
    tokens = torch.tensor([tokenizer.encode("Once upon")])
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens), padded(tokens)[..., :512])
    export(tmp_path / "m" / "m.bin", f"--from-hf={tmp_path / 'hf'}")
    done = run(tmp_path / "m" / "m.bin", "-t", "0", "-i", "Once upon", "-n", "20")
    assert done.returncode == 0, done.stderr
    ids = tokens[0].tolist()
    told = [*ids, *loaded.model.generate(ids, 21 - len(ids), 0, stop=tokenizer.stop)]
    assert done.stdout.decode(errors="replace").removesuffix("\n") == tokenizer.decode(told)
    (tmp_path / "hf" / "tokenizer.model").write_bytes(tokenizers[105].proto)
    with pytest.raises(UserError, match="105 pieces, but the model's vocabulary has 576"):
        load(str(tmp_path / "hf"))
    formats.write_checkpoint(padded, str(tmp_path / "c" / "c.pt"), "fp32", None, {})
    with pytest.raises(UserError, match="512 pieces, but the model's vocabulary has 576"):
        load(str(tmp_path / "c" / "c.pt"), tokenizer=tokenizer.model_path)


# ---- Meta's releases


def meta_release(folder, model, n_files):
    """The files of a release with its matrices spread over n_files, as Llama 2 has them."""
    args = model.args
    folder.mkdir()
    params = {"dim": args.dim, "n_layers": args.n_layers, "n_heads": args.n_heads}
    params |= {"n_kv_heads": args.n_kv_heads, "norm_eps": args.norm_eps, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps({**params, "multiple_of": 256}))
    for i in range(n_files):
        part = {"rope.freqs": torch.zeros(6)}
        for name, tensor in model.state_dict().items():
            by_columns = name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight"))
            axis = 1 if by_columns else 0
            part[name] = tensor if tensor.dim() == 1 else tensor.chunk(n_files, axis)[i].clone()
        torch.save(part, folder / f"consolidated.{i:02}.pth")


@pytest.mark.parametrize("n_files", [1, 2])
def test_metas_releases(tmp_path, n_files):
    model = random_model(tie_embeddings=False, n_kv_heads=2, max_seq_len=4096, vocab_size=106)
    meta_release(tmp_path / "release", model, n_files)
    assert recognize(str(tmp_path / "release")) == "meta"
    same_model(load(str(tmp_path / "release")).model, model)
    export(tmp_path / "m.bin", f"--from-meta={tmp_path / 'release'}")
    same_model(read_bin(tmp_path / "m.bin"), model)
    params = json.loads((tmp_path / "release" / "params.json").read_text())
    for change, part in (
        ({"use_scaled_rope": True}, "use_scaled_rope = True is unknown"),
        ({"moe": {}}, "moe = {} is unknown"),
        ({"n_layers": 3}, "it has no layers.2."),
        ({"n_layers": 1}, "has no place in this model"),
        ({"dim": 64}, "expected"),
        ({"n_heads": 5}, "does not divide"),
    ):
        (tmp_path / "release" / "params.json").write_text(json.dumps({**params, **change}))
        with pytest.raises(UserError, match="cannot be read") as e:
            load(str(tmp_path / "release"))
        assert part in str(e.value)
    (tmp_path / "release" / "params.json").write_text(json.dumps(params))
    (tmp_path / "release" / "consolidated.00.pth").write_bytes(b"half")
    with pytest.raises(UserError, match="cannot be read"):
        load(str(tmp_path / "release"))


# ---- what is refused


# format, options of the model, --dtype, size of the vocabulary, a part of the sentence
REFUSED = (
    *(
        ("gguf", {name: value}, "fp32", 512, f"gguf cannot carry {name} = {value}")
        for name, value in (
            ("norm_gains", False),
            ("activation", "relu2"),
            ("logit_softcap", 5.0),
            ("sliding_window", 8),
            ("embedding_norm", True),
            ("residual_scalars", True),
            ("value_embeddings", 1),
            ("bigram_rows", 16),
            ("smear", True),
        )
    ),
    ("gguf", {}, "fp32", 105, "which has no byte pieces"),
    ("gguf", {}, "int8", 512, "dtype = int8: expected one of fp32, fp16, bf16, q8_0, q4_0"),
    ("hf", {}, "int8", 512, "dtype = int8: expected one of fp32, bf16, fp16"),
    ("safetensors", {}, "q4_0", 512, "dtype = q4_0: expected one of fp32, bf16, fp16"),
    ("checkpoint", {}, "bf16", 512, "dtype = bf16: expected one of fp32"),
    ("bin", {}, "fp16", 512, "dtype = fp16: expected one of fp32, bf16, int8, int4"),
    ("bin", {"sliding_window": 1 << 25, "max_seq_len": 64}, "fp32", 512, "version 3 cannot carry"),
)


@pytest.mark.parametrize("to, options, dtype, size, part", REFUSED)
def test_what_is_not_carried_is_refused(tmp_path, tokenizers, to, options, dtype, size, part):
    source, tokenizer = str(tmp_path / "source" / "ckpt.pt"), tokenizers[size]
    formats.write_checkpoint(sized(tokenizer, **options), source, "fp32", tokenizer, {})
    with pytest.raises(UserError) as e:
        out = tmp_path / "new" / "out"
        export(out, f"--checkpoint={source}", f"--format={to}", f"--dtype={dtype}")
    assert part in str(e.value)
    assert os.listdir(tmp_path) == ["source"]


def test_commands_that_contradict_themselves(tmp_path, tokenizers, finished):
    best, out = f"--checkpoint={finished / 'best.pt'}", tmp_path / "out"
    model = sized(tokenizers[512])
    formats.write_bin(model, str(tmp_path / "a" / "model.bin"), "fp32", None, {})
    bin_ = tmp_path / "a" / "model.bin"
    mine = tmp_path / "a" / "z"
    mine.mkdir()
    for name in ("README.md", "tokenizer.model", "tok128.bin"):
        (mine / name).write_text("mine")
    before = {name: (finished / name).read_bytes() for name in ("best.pt", "ckpt.pt", "log.jsonl")}
    for words, part in (
        ([out, best, "--version=3", "--format=hf"], "only --format=bin has versions"),
        ([out, best, "--push-to-hub=a/b"], "give --format=hf"),
        ([out, best, "--format=hf", "--dry-run"], "give --push-to-hub"),
        ([out, f"--from-bin={bin_}", "--format=hf"], "there is no tokenizer.model beside"),
        ([out, f"--from-bin={bin_}", f"--tokenizer={tmp_path / 'x'}"], "does not exist"),
        ([out, f"--from-bin={bin_}", f"--tokenizer={tokenizers[105].model_path}"], "105 pieces"),
        (
            [bin_, f"--from-bin={bin_}", "--dtype=int8"],
            "which belongs to what is read, would be lost",
        ),
        (
            [finished / "ckpt.pt", best, "--format=bin"],
            "is a checkpoint, and would be lost",
        ),
        ([finished / "ckpt.pt", f"--from-bin={bin_}"], "exists, and would be lost"),
        ([finished, best, "--format=hf"], "which belongs to what is read, would be lost"),
        (
            [tmp_path / "a", best, "--format=hf"],
            "model.bin, which does not belong to an export",
        ),
        ([finished / "log.jsonl", best, "--format=hf"], "it is a file; name a folder"),
        ([out, f"--from-hf={tmp_path / 'none'}"], "is not a folder"),
        ([out, f"--from-hf={finished}"], "cannot read"),
        ([out, f"--from-gguf={bin_}"], "is damaged or not a GGUF file"),
        ([out, f"--from-gguf={tmp_path / 'none'}"], "cannot read"),
        (["", best], "the path to write is empty"),
        ([mine / "README.md", best, "--format=bin"], "exists and is no model of this format"),
        ([mine / "tokenizer.model", best, "--format=bin"], "exists and is no model of this format"),
        ([mine / "tok128.bin", best], "exists and is no model of this format"),
        ([f"{out}/", best], "is a folder, or the tokenizer's"),
        ([tmp_path / "tokenizer.bin", best], "is a folder, or the tokenizer's"),
        ([out, best, "--format=hf", "--push-to-hub=a b/c", "--dry-run"], "cannot upload to a b/c"),
        ([out, best, "--format=hf", "--push-to-hub=c", "--dry-run"], "expected user/name"),
        ([out, f"--from-bin={finished / 'best.pt'}"], "is no model.bin"),
        ([out, f"--from-safetensors={bin_}"], "is damaged or no safetensors file"),
        ([out, f"--from-meta={tmp_path}"], "params.json"),
        ([out, "--checkpoint=hf:a/b c"], "cannot download a/b c"),
    ):
        with pytest.raises(UserError) as e:
            export(*words)
        assert part in str(e.value)
        assert os.listdir(tmp_path) == ["a"]
    for name, data in before.items():
        assert (finished / name).read_bytes() == data
    refused(script("export.py", out, best, "--format=hf", "--dtype=int8"), "dtype = int8")
    for words in (["--format=onnx"], [f"--from-bin={bin_}"]):
        assert script("export.py", out, best, *words).returncode == 2


# of a config.json: what changes, and a part of the sentence
FOREIGN = (
    ({"model_type": "gpt2"}, "model_type = gpt2; expected llama or"),
    ({"hidden_act": "gelu"}, "hidden_act = gelu; expected a model without it, or silu"),
    ({"attention_bias": True}, "attention_bias = True"),
    ({"mlp_bias": True}, "mlp_bias = True"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'rope_type': 'llama3'"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "expected rotary angles without scaling"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_scaling = "),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "'partial_rotary_factor': 0.5"),
    ({"head_dim": 64}, "head_dim = 64; expected hidden_size / num_attention_heads, 12"),
    ({"num_attention_heads": 5}, "does not divide"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling = "),
    ({"rope_scaling": "linear"}, "rope_scaling = linear"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, "rope_parameters = "),
    ({"hidden_size": "wide"}, "dim = 'wide': expected a whole number"),
    ({"layer_types": ["full_attention", "chunked_attention"]}, "'chunked_attention']; expected"),
    ({"layer_types": ["full_attention"]}, "layer_types = ['full_attention']; expected"),
    (
        {
            "model_type": "qwen3",
            "layer_types": ["linear_attention"] * 2,
            "use_sliding_window": True,
        },
        "layer_types = ['linear_attention', 'linear_attention']; expected",
    ),
    ({"num_hidden_layers": 2.0}, "n_layers = 2.0: expected a whole number"),
    ({"tie_word_embeddings": "false"}, "tie_embeddings = 'false': expected true or false"),
    ({"model_type": ["llama"]}, "cannot be read"),
    ({"model_type": "modded_llama", "bigram_rows": 1 << 28}, "it has no model.bigram_embeddings"),
    ({"model_type": "modded_llama", "layer_windows": [-1, 0]}, "windows = [-1, 0]"),
    ({"max_position_embeddings": 1 << 24, "head_dim": None}, "more than this program reads"),
    ({"hidden_size": 96, "head_dim": 24}, "expected (105, 96)"),
    ({"num_hidden_layers": 3}, "it has no model.layers.2."),
    ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight has no place"),
    ({"tie_word_embeddings": False}, "it has no lm_head.weight"),
    ({"model_type": "mistral", "num_hidden_layers": 1 << 40}, "n_layers = 1099511627776: expected"),
    (
        {"model_type": "qwen3", "use_sliding_window": "false"},
        "use_sliding_window = false; expected",
    ),
    ({"model_type": "qwen3", "layer_types": {}}, "layer_types = {}; expected a list of words"),
    ({"head_dim": ""}, "head_dim = ; expected a whole number"),
    ({"max_position_embeddings": 1 << 22}, "more than this program reads for a model of"),
    ({"hidden_act": "x" * 5000}, "xxx ..."),
)


@pytest.mark.parametrize("change, part", FOREIGN)
def test_folders_that_this_model_does_not_compute(tmp_path, tokenizers, change, part):
    huggingface.write_folder(sized(tokenizers[105]), str(tmp_path / "hf"), "fp32", None, {})
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError) as e:
        load(str(tmp_path / "hf"))
    assert part in str(e.value)


# of a config.json, and of a GGUF file: what older writers leave out, and values that change nothing
NEUTRAL_CONFIGS = (
    {"hidden_act": "swish"},
    {"hidden_act": None, "attention_bias": None, "mlp_bias": False, "quantization_config": None},
    {"head_dim": None, "num_key_value_heads": None, "rope_theta": None},
    {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 1.0}},
    {"rope_parameters": {"rope_type": "default", "factor": None}, "partial_rotary_factor": 1.0},
    {"layer_types": ["full_attention"] * 2, "sliding_window": 4096, "pretraining_tp": 1},
)


@pytest.mark.parametrize("change", NEUTRAL_CONFIGS)
def test_config_fields_that_change_nothing(tmp_path, tokenizers, change):
    model = sized(tokenizers[105])
    huggingface.write_folder(model, str(tmp_path / "hf"), "fp32", None, {})
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, **change}))
    same_model(load(str(tmp_path / "hf")).model, model)


@pytest.mark.parametrize(
    "key, value, is_neutral",
    [(key, value, True) for key, values in gguffile.NEUTRAL.items() for value in values]
    + [("expert_count", 8, False), ("rope.scaling.type", "yarn", False), ("new", 0.0, False)],
)
def test_gguf_keys_that_change_nothing(tmp_path, tokenizers, monkeypatch, key, value, is_neutral):
    put_args = gguffile.put_args

    def with_another(f, kind, args):
        put_args(f, kind, args)
        put = {str: f.add_string, bool: f.add_bool, int: f.add_uint32, float: f.add_float32}
        put[type(value)](f"{kind}.{key}", value)

    monkeypatch.setattr(gguffile, "put_args", with_another)
    model, path = sized(tokenizers[512]), str(tmp_path / "m.gguf")
    gguffile.write_gguf(model, path, "fp32", tokenizers[512], {})
    if is_neutral:
        same_model(load(path).model, model)
    else:
        with pytest.raises(UserError, match=f"llama.{key} = {value}; expected a model without it"):
            load(path)


def test_a_tokenizer_json_without_what_older_writers_leave_out(tmp_path, tokenizers):
    bpe = tokenizers["gpt2"].bpe
    value = byte_level_json(bpe)
    del value["model"]["type"]
    value["added_tokens"] = [
        {"id": t["id"], "content": t["content"]} for t in value["added_tokens"]
    ]
    value["model"]["merges"] = [" ".join(pair) for pair in value["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    assert byte_level_from_json(tmp_path / "tokenizer.json").to_bytes() == bpe.to_bytes()


def test_damaged_folders_and_files(tmp_path, tokenizers):
    from safetensors.torch import load_file
    from safetensors.torch import save_file as save_tensors

    folder, model = tmp_path / "hf", sized(tokenizers[512])
    huggingface.write_folder(model, str(folder), "fp32", tokenizers[512], {})
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole = weights.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}  # else mapped
    for data in (b"", whole[:5], whole[:1000], whole[:-4]):
        weights.write_bytes(data)
        with pytest.raises(UserError, match="damaged or no safetensors file"):
            load(str(folder))
    save_tensors({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.zeros(3)}, weights)
    with pytest.raises(UserError, match=r"q_proj.bias has no place in this model"):
        load(str(folder))
    save_tensors({**tensors, "lm_head.weight": torch.zeros(512, 48)}, weights)
    with pytest.raises(UserError, match=r"lm_head.weight is not the embedding it is tied to"):
        load(str(folder))
    save_tensors(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, weights
    )
    same_model(load(str(folder)).model, model)
    index = folder / "model.safetensors.index.json"
    os.replace(weights, tmp_path / "elsewhere.safetensors")
    for name, part in (
        ("../elsewhere.safetensors", "it names ../elsewhere.safetensors, a file elsewhere"),
        (str(tmp_path / "elsewhere.safetensors"), "a file elsewhere"),
        ("other.safetensors", "other.safetensors does not exist"),
        (["model.safetensors"], "it has no weight_map of files"),
    ):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match=part):
            load(str(folder))
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(tmp_path / "elsewhere.safetensors", folder / name)
    index.write_text(json.dumps({"weight_map": dict.fromkeys("0123", "a.safetensors")}))
    same_model(load(str(folder)).model, model)
    index.write_text('{"weight_map": {"1": "a.safetensors", "2": "b.safetensors"}}')
    with pytest.raises(UserError, match=r"b.safetensors .* is in another file as well"):
        load(str(folder))
    index.write_text("{}")
    with pytest.raises(UserError, match="has no weight_map"):
        load(str(folder))
    for text, part in (
        ("{", "is not JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "model_type"),
    ):
        config.write_text(text)
        with pytest.raises(UserError, match=part):
            load(str(folder))
    for name in ("fp32.gguf", "one.safetensors"):
        path = tmp_path / name
        FORMATS[name.rpartition(".")[2]].write(model, str(path), "fp32", tokenizers[512], {})
        data = path.read_bytes()
        for n in (8, 100, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:n])
            with pytest.raises(UserError, match=r"damaged or no|cannot be read|ends at byte"):
                load(str(path))


def test_weights_of_older_programs(tmp_path, tokenizers):
    """pytorch_model.bin, whole or in parts, is read without running what may be in it."""
    from safetensors.torch import load_file

    folder, model = tmp_path / "hf", sized(tokenizers[105])
    huggingface.write_folder(model, str(folder), "fp32", None, {})
    tensors = load_file(folder / "model.safetensors")
    os.remove(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    same_model(load(str(folder)).model, model)
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    same_model(load(str(folder)).model, model)
    torch.save({**tensors, "evil": print}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="is damaged, or holds more than tensors"):
        load(str(folder))
    os.remove(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no model.safetensors and no pytorch_model.bin"):
        load(str(folder))
    parts, index = [{}, {}], {}
    for i, (name, tensor) in enumerate(tensors.items()):
        parts[i % 2][name], index[name] = tensor, f"pytorch_model-{i % 2}.bin"
    for i, part in enumerate(parts):
        torch.save(part, folder / f"pytorch_model-{i}.bin")
    path = folder / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    same_model(load(str(folder)).model, model)


def test_what_stands_in_place_of_the_file(tmp_path, tokenizers):
    """A Git LFS pointer, and a part of a split GGUF, are named with the way out."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 42\n"
    model, way_out = sized(tokenizers[512]), "is a Git LFS pointer, .* run git lfs pull"
    huggingface.write_folder(model, str(tmp_path / "hf"), "fp32", tokenizers[512], {})
    for path in (tmp_path / "hf").iterdir():
        whole = path.read_bytes()
        path.write_text(pointer)
        with pytest.raises(UserError, match=f"{path.name} {way_out}"):
            load(str(tmp_path / "hf"))
        path.write_bytes(whole)
    for name in ("m.gguf", "ckpt.pt", "m.bin", "m.safetensors", "other"):
        (tmp_path / name).write_text(pointer)
        with pytest.raises(UserError, match=f"{name} {way_out}"):
            load(str(tmp_path / name))
        with pytest.raises(UserError, match=f"{name} {way_out}"):
            load(str(tmp_path / "hf"), tokenizer=str(tmp_path / name))
    with pytest.raises(UserError, match=f"ckpt.pt {way_out}"):
        load_checkpoint(str(tmp_path / "ckpt.pt"))
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m-00001-of-00002.gguf", "llama")
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="one of 2 parts of a split GGUF: join them with"):
        load(str(tmp_path / "m-00001-of-00002.gguf"))


def test_damaged_model_bins(tmp_path, tokenizers):
    model, path = sized(tokenizers[105], **EVERYTHING), tmp_path / "model.bin"
    plain = sized(tokenizers[105])
    for one, version in ((plain, 0), (model, 3)):
        export_model(one, path, version)
        data = path.read_bytes()
        sizes = 0, 3, 27, 28, 79, 80, 83, 84, 90, 300, len(data) // 2, len(data) - 1, len(data) + 1
        for size in sizes:
            path.write_bytes((data + b"\0")[:size])
            with pytest.raises(UserError, match=r"no model.bin that this version reads|ends at"):
                read_bin(path)
        rng = np.random.default_rng(0)
        for _ in range(60):  # every field of the headers
            broken = bytearray(data)
            at = int(rng.integers(0, 28 if version == 0 else 100)) // 4 * 4
            values = (0, -1, 2, 7, 1 << 20, 0x7FFFFFFF, int(rng.integers(1 << 31)))
            broken[at : at + 4] = struct.pack("<i", int(rng.choice(values)))
            path.write_bytes(broken)
            try:
                read_bin(path)
            except UserError as e:
                assert "\n" not in str(e)
    export_model(plain, path, 0)
    data = bytearray(path.read_bytes())
    at = 28 + 4 * (plain.n_params())
    data[at : at + 4] = struct.pack("<f", 0.5)
    path.write_bytes(data)
    with pytest.raises(UserError, match="rotary angles are not those of rope_theta = 10000"):
        read_bin(path)


def test_a_folder_is_replaced_only_by_its_own_kind(tmp_path, tokenizers):
    folder = tmp_path / "hf"
    for seed in (0, 1):
        model = random_model(seed=seed, vocab_size=512)
        huggingface.write_folder(model, str(folder) + "/", "fp32", tokenizers[512], {})
        same_model(load(str(folder)).model, model)
    (tmp_path / "link").symlink_to("hf")
    huggingface.write_folder(model, str(tmp_path / "link"), "fp32", tokenizers[512], {})
    assert sorted(os.listdir(tmp_path)) == ["hf", "link"] and (tmp_path / "link").is_symlink()
    for name in ("notes.txt", ".git", "model.bin", "tokenizer_corpus.txt", "model_backup"):
        (folder / name).write_text("mine")
        with pytest.raises(UserError, match=f"it holds {name}"):
            huggingface.write_folder(model, str(folder), "fp32", tokenizers[512], {})
        (folder / name).unlink()
    (folder / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"README.md was not written by export.py"):
        huggingface.write_folder(model, str(folder), "fp32", tokenizers[512], {})
    (folder / "README.md").unlink()
    with pytest.raises(UserError, match=r"README.md was not written by export.py"):
        huggingface.write_folder(model, str(folder), "fp32", tokenizers[512], {})


def test_a_full_disk_leaves_nothing(tmp_path, tokenizers, monkeypatch):
    import gguf
    import huggingface_hub
    from safetensors import SafetensorError

    def full(*words, **others):
        raise error

    model, path = sized(tokenizers[512]), str(tmp_path / "out")
    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", full)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    for to in ("hf", "gguf"):
        for error in (SafetensorError("No space left"), OSError(28, "No space left")):
            if to == "gguf" and not isinstance(error, OSError):
                continue
            with pytest.raises(UserError, match=f"cannot write {path}: No space left"):
                FORMATS[to].write(model, path, "fp32", tokenizers[512], {})
            assert not os.listdir(tmp_path)


def test_sizes_past_a_shard_are_split(tmp_path, tokenizers, monkeypatch):
    monkeypatch.setattr(huggingface, "MAX_SHARD", "50KB")
    model = sized(tokenizers[512], **EVERYTHING)
    huggingface.write_folder(model, str(tmp_path / "hf"), "fp32", tokenizers[512], {})
    assert len([n for n in os.listdir(tmp_path / "hf") if n.endswith(".safetensors")]) > 3
    same_model(load(str(tmp_path / "hf")).model, model)


def test_a_missing_package_says_how_to_install_it():
    with pytest.raises(UserError, match=r"this needs no_such_package: pip install .\[export\]"):
        need("no_such_package")


def test_the_tokenizer_goes_with_the_model(tmp_path, tokenizers):
    tokenizer, other = tokenizers[512], tokenizers[1500]
    for to in ("bin", "checkpoint", "safetensors"):
        ending, write = FORMATS[to].ending, FORMATS[to].write
        for name in ("a", "b"):
            write(sized(tokenizer), str(tmp_path / f"{name}{ending}"), "fp32", tokenizer, {})
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(UserError, match="is of another tokenizer; name a file in another"):
            write(sized(other), str(tmp_path / f"c{ending}"), "fp32", other, {})
        assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert (tmp_path / "tokenizer.bin").read_bytes() == bin_of(tokenizer).read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(other.proto)
    with pytest.raises(UserError, match="was trained with another tokenizer than"):
        load(str(tmp_path / "a.pt"))
    assert load(str(tmp_path / "a.pt"), tokenizer=tokenizer.model_path).tokenizer.vocab_size == 512


def test_a_model_file_knows_its_tokenizer(tmp_path, tokenizers, stories):
    """Another one of the same size is refused; a file without a fingerprint takes any."""
    tokenizer, path = tokenizers[512], str(tmp_path / "a.bin")
    other = tmp_path / "other.model"
    other.write_bytes(train_sentencepiece(stories[500:900], 512)[0])
    model = sized(tokenizer, qk_norm=True)
    FORMATS["bin"].write(model, path, "fp32", tokenizer, {})
    assert read_fingerprint(path) == tokenizer.fingerprint == zlib.crc32(tokenizer.c_file())
    assert load(path, tokenizer=tokenizer.model_path).tokenizer.hash == tokenizer.hash
    with pytest.raises(UserError, match=r"a\.bin was trained with another .*other"):
        load(path, tokenizer=str(other))
    shutil.copy(other, tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match="give the right one with --tokenizer=PATH"):
        load(path)
    export_model(model, path, 3)
    assert read_fingerprint(path) == 0 and load(path).tokenizer.hash == open_tokenizer(other).hash
    checkpoint = str(tmp_path / "a.pt")
    os.remove(tmp_path / "tokenizer.model")
    FORMATS["checkpoint"].write(model, checkpoint, "fp32", tokenizer, {})
    with pytest.raises(UserError, match=r"a\.pt was trained with another .*other"):
        load(checkpoint, tokenizer=str(other))


@pytest.mark.parametrize("to", ["hf", "gguf", "safetensors"])
def test_numbers_too_large_for_fp16_are_refused(tmp_path, tokenizers, to):
    model = sized(tokenizers[512])
    model.layers[0].feed_forward.w1.weight.data[0, 0] = 1e5
    with pytest.raises(UserError, match=r"fp16 cannot carry .*, which has numbers up to 100000"):
        FORMATS[to].write(model, str(tmp_path / "out"), "fp16", tokenizers[512], {})
    assert not os.listdir(tmp_path)


def trained_by_sentencepiece(path, stories, **words):
    settings = {"model_type": "bpe", "normalization_rule_name": "identity", "byte_fallback": True}
    settings |= {"vocab_size": 700, "minloglevel": 2, "character_coverage": 1.0, **words}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(stories[:500]), model_writer=model, **settings
    )
    path.write_bytes(model.getvalue())
    return open_tokenizer(path)


def test_tokenizers_of_other_kinds(tmp_path, stories):
    """Spaces that are folded, or not put before a text, are carried; the rest is refused."""
    from transformers import AutoTokenizer

    for i, words in enumerate(({"remove_extra_whitespaces": True}, {"add_dummy_prefix": False})):
        tokenizer = trained_by_sentencepiece(tmp_path / f"{i}.model", stories, **words)
        folder = str(tmp_path / f"hf{i}")
        huggingface.write_folder(sized(tokenizer), folder, "fp32", tokenizer, {})
        theirs = AutoTokenizer.from_pretrained(folder)
        for text in [*generated_texts(800, seed=5), "  a   b  ", " ", "\n a \n  b "]:
            assert theirs(text)["input_ids"] == tokenizer.encode(text), text
    with pytest.raises(UserError, match="which folds spaces"):
        tokenizer = open_tokenizer(tmp_path / "0.model")
        gguffile.write_gguf(sized(tokenizer), str(tmp_path / "m"), "fp32", tokenizer, {})
    for words, part in (
        ({"model_type": "unigram"}, "is not BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "replaces characters"),
        ({"user_defined_symbols": ["<pet>"]}, "has user-defined pieces"),
    ):
        tokenizer = trained_by_sentencepiece(tmp_path / "other.model", stories, **words)
        for to in ("hf", "gguf"):
            with pytest.raises(UserError, match=f"{to} cannot carry .*, which {part}"):
                FORMATS[to].write(sized(tokenizer), str(tmp_path / "m"), "fp32", tokenizer, {})
    assert not (tmp_path / "m").exists()


def test_a_hostile_gguf_ends_soon(tmp_path, tokenizers):
    start, name = b"GGUF" + struct.pack("<IQQ", 3, 0, 1), struct.pack("<Q", 3) + b"a.b"
    values = [struct.pack("<IIQ", 9, inner, 1 << 40) for inner in (4, 8, 9)]
    values += [struct.pack("<IQ", 8, 1 << 60), struct.pack("<I", 77), b""]
    for value in values:
        (tmp_path / "m.gguf").write_bytes(start + name + value + bytes(200))
        with pytest.raises(UserError, match=r"ends at byte|is damaged|cannot be read"):
            load(str(tmp_path / "m.gguf"))


def gguf_with(path, tokenizer, **more):
    """A GGUF file of a random model, with other values of some fields tokenizer.ggml.*."""
    add = need("gguf").GGUFWriter.add_key_value

    def changed(self, key, value, kind, sub_type=None):
        value = more.get(key.removeprefix("tokenizer.ggml."), value)
        add(self, key, value, kind, sub_type)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(need("gguf").GGUFWriter, "add_key_value", changed)
        gguffile.write_gguf(sized(tokenizer), str(path), "fp32", tokenizer, {})


def test_a_gguf_whose_tokenizer_does_not_fit_is_refused(tmp_path, tokenizers):
    path, pieces = str(tmp_path / "m.gguf"), tokenizers[512]
    for more, part in (
        ({"scores": [0.0] * 511}, "tokenizer.ggml.scores = 511 values; expected 512"),
        ({"bos_token_id": 5}, r"the ids of unk, BOS and EOS = \[0, 5, 2\]"),
        ({"token_type": [-1] * 512}, "tokenizer.ggml.token_type = .* expected what llama.cpp"),
    ):
        gguf_with(path, pieces, **more)
        with pytest.raises(UserError, match=part):
            load(path)
        assert load(path, tokenizer=pieces.model_path).tokenizer.vocab_size == 512


def test_tensors_that_share_their_bytes_are_refused(tmp_path, tokenizers):
    """A small file cannot stand for a large model, and no number is read twice."""
    path = tmp_path / "m.gguf"
    gguf_with(path, tokenizers[512])
    places = [t.field.offset for t in need("gguf").GGUFReader(path).tensors]
    data = bytearray(path.read_bytes())
    path.write_bytes(data + bytes(32))
    with pytest.raises(UserError, match=r"it has \d+ bytes, and its tensors end at \d+"):
        load(str(path))
    data[places[2] - 8 : places[2]] = bytes(8)  # the offset of the second tensor
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"blk.0.attn_norm.weight begins at \d+, expected \d+"):
        load(str(path))
    huggingface.write_folder(sized(tokenizers[105]), str(tmp_path / "hf"), "fp32", None, {})
    os.remove(tmp_path / "hf" / "model.safetensors")
    one = torch.zeros(1000)
    torch.save({str(i): one for i in range(1000)}, tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"1,000,000 numbers in files of [\d,]+ bytes"):
        load(str(tmp_path / "hf"))


@pytest.mark.parametrize("to", FORMATS)
def test_weights_that_are_not_finite_are_refused(tmp_path, tokenizers, to):
    model, path = sized(tokenizers[512]), str(tmp_path / f"m{FORMATS[to].ending}")
    with torch.no_grad():
        model.layers[0].attention.wq.weight[1, 2] = float("nan")
    FORMATS[to].write(model, path, "fp32", tokenizers[512], {})
    with pytest.raises(UserError, match="has weights that are not finite"):
        load(path, tokenizer=tokenizers[512].model_path)


# ---- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_upload_and_download(hub, tmp_path, finished):
    folder = tmp_path / "hf"
    words = [folder, "--format=hf", f"--checkpoint={finished / 'best.pt'}"]
    done = script("export.py", *words, "--push-to-hub=me/tiny", cwd=tmp_path)
    refused(done, "HF_TOKEN")
    assert not hub.models and not folder.exists()
    (tmp_path / ".env").write_text('OTHER=1\nexport HF_TOKEN="hf_secret" # mine\r\n')
    done = script("export.py", *words, "--push-to-hub=me/tiny", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0 and "nothing was sent" in done.stdout and not hub.models
    done = script("export.py", *words, "--push-to-hub=me/tiny", "--private", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"uploaded to {hub.url}/me/tiny" in done.stdout
    assert hub.tokens - {None} == {"Bearer hf_secret"} and hub.private == {"me/tiny"}
    assert hub.models["me/tiny"] == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert "hf_secret" not in done.stdout + done.stderr
    told = [
        script("sample.py", f"--checkpoint={one}", "--temperature=0", "--max_new_tokens=20")
        for one in (finished / "best.pt", "hf:me/tiny")
    ]
    assert told[1].returncode == 0, told[1].stderr
    assert told[0].stdout == told[1].stdout
    refused(script("sample.py", "--checkpoint=hf:me/other"), "cannot download me/other")
    done = script("sample.py", "--checkpoint=hf:me/tiny", env={**os.environ, "HF_TOKEN": "hf a\n"})
    refused(done, "HF_TOKEN is no access token")
    assert "hf a" not in done.stderr
    hub.shutdown()
    hub.server_close()
    done = script("sample.py", "--checkpoint=hf:me/tiny", "--temperature=0", "--max_new_tokens=20")
    assert done.stdout == told[0].stdout  # from the cache, as without a network
    done = script("export.py", *words, "--push-to-hub=me/tiny", cwd=tmp_path)
    refused(done, "cannot upload to me/tiny", "is whole, run the same command again")
