"""Formats: models read back exactly, have the same logits in transformers, or are refused."""

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

# name: options, and the class of transformers that loads the model
READABLE = [name for name in FORMATS if name != "html"]  # the others can be read back

CASES = {
    "plain": ({}, "LlamaForCausalLM"),
    "gqa": ({"n_kv_heads": 2, "hidden_dim": 88}, "LlamaForCausalLM"),
    "untied": ({"tie_embeddings": False, "rope_theta": 5e5, "norm_eps": 1e-6}, "LlamaForCausalLM"),
    "padded": ({"vocab_multiple": 64, "n_kv_heads": 1}, "LlamaForCausalLM"),
    "padded_untied": ({"vocab_multiple": 64, "tie_embeddings": False}, "LlamaForCausalLM"),
    "portable": ({"qk_norm": True, "n_kv_heads": 2}, "Qwen3ForCausalLM"),
    "portable_untied": ({"qk_norm": True, "tie_embeddings": False}, "Qwen3ForCausalLM"),
    "windows": (
        {"qk_norm": True, "sliding_window": 5, "window_pattern": "SSSL", "n_layers": 4},
        "Qwen3ForCausalLM",
    ),
    "softcap": ({"logit_softcap": 5.0}, "ModdedLlamaForCausalLM"),
    "modded": (EVERYTHING, "ModdedLlamaForCausalLM"),
    "convolutions": (
        {"embedding_conv": 4, "key_conv": 3, "bigram_rows": 64, "smear": True, "qk_norm": True},
        "ModdedLlamaForCausalLM",
    ),
    "gated": ({"smear": True, "bigram_rows": 64, "sliding_window": 4}, "ModdedLlamaForCausalLM"),
}
IN_GGUF = ("LlamaForCausalLM", "Qwen3ForCausalLM")


def sized(tokenizer, **options):
    return random_model(**{"vocab_size": tokenizer.vocab_size, **options})


def assert_same_model(actual, model):
    """Assert equal tensors, except for rows past the vocabulary, and equal exported ModelArgs."""
    expected, state = model.state_dict(), actual.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name][: len(tensor)]), name
    args = model.args.to_dict()
    differing = {k for k, value in actual.args.to_dict().items() if value != args[k]}
    assert differing <= {"vocab_multiple", "window_pattern", "bos_id"}
    assert windows(actual.args) == windows(model.args)


def transformers_model(folder, name="CausalLM"):
    """Load a model like a user of transformers, with remote code only if it is needed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())
    trust = "auto_map" in config
    assert AutoConfig.from_pretrained(folder, trust_remote_code=trust).vocab_size
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).eval()


def export(*args):
    """Run export.py in this process, which is faster; a UserError is raised here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export.py", *map(str, args)])
        patch.setattr(sys, "excepthook", sys.excepthook)
        runpy.run_path(str(REPO / "export.py"), run_name="__main__")


def close(actual, expected):
    return (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


# ---- round trips


ROUND_TRIPS = [
    (to, name)
    for to in READABLE
    for name, (options, kind) in CASES.items()
    if to != "gguf" or (kind in IN_GGUF and "sliding_window" not in options)
]


@pytest.mark.parametrize("to, name", ROUND_TRIPS)
def test_round_trips_are_exact(tmp_path, tokenizers, to, name):
    """A checkpoint is the same after a conversion to any format and back."""
    options, _ = CASES[name]
    tokenizer = tokenizers[512]
    model = sized(tokenizer, **options)
    path = str(tmp_path / f"there{FORMATS[to].ending or '_hf'}")
    FORMATS[to].write(model, path, "fp32", tokenizer, {})
    assert recognize(path) == to
    loaded = load(path, tokenizer="" if to != "bin" else tokenizer.model_path)
    assert_same_model(loaded.model, model)
    text = "Once upon a time, there was Zoë. 😀\n"
    assert loaded.tokenizer.encode(text) == tokenizer.encode(text)
    back = str(tmp_path / "back" / "ckpt.pt")
    FORMATS["checkpoint"].write(loaded.model, back, "fp32", loaded.tokenizer, {})
    reloaded = load(back)
    assert_same_model(reloaded.model, model)
    assert reloaded.tokenizer.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("which", ["gpt2", "gpt4"])
@pytest.mark.parametrize("to", READABLE)
def test_byte_level_tokenizers_are_exported_too(tmp_path, tokenizers, to, which, run):
    tokenizer = tokenizers[which]
    model = sized(tokenizer, qk_norm=True)
    path = str(tmp_path / f"there{FORMATS[to].ending or '_hf'}")
    FORMATS[to].write(model, path, "fp32", tokenizer, {})
    loaded = load(path, tokenizer="" if to != "bin" else tokenizer.model_path)
    assert_same_model(loaded.model, model)
    for text in generated_texts(200, seed=3):
        assert loaded.tokenizer.encode(text) == tokenizer.encode(text)
    assert loaded.tokenizer.stop == (tokenizer.bos_id,)
    FORMATS["bin"].write(loaded.model, str(tmp_path / "m" / "m.bin"), "fp32", loaded.tokenizer, {})
    done = run(tmp_path / "m" / "m.bin", "-t", "0", "-i", "Once upon", "-n", "32")
    ids = tokenizer.encode("Once upon")
    story = [*ids, *model.generate(ids, 33 - len(ids), temperature=0, stop=tokenizer.stop)]
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().removesuffix("\n") == tokenizer.decode(story)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizers):
    """The out_dir of a run, with only what exports read."""
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
def test_a_run_exported_as_a_folder_and_back_generates_the_same(tmp_path, finished, run):
    """sample.py does so with the run, the folder and the new checkpoint, ./run with a model.bin."""
    best, folder, back = finished / "best.pt", tmp_path / "hf", tmp_path / "back" / "ckpt.pt"
    done = script("export.py", folder, "--format=hf", f"--checkpoint={best}")
    assert done.returncode == 0, done.stderr
    export(back, f"--from-hf={folder}")
    args = ["--temperature=0", "--max_new_tokens=20", "--start=Once"]
    runs = [script("sample.py", f"--checkpoint={path}", *args) for path in (best, folder, back)]
    assert all(done.returncode == 0 for done in runs), [done.stderr for done in runs]
    assert len({done.stdout for done in runs}) == 1 and runs[0].stdout.startswith("Once")
    export(tmp_path / "r" / "model.bin", f"--from-hf={folder}")
    from_c = run(tmp_path / "r" / "model.bin", "-t", 0, "-n", 12, "-i", "Once").stdout
    assert runs[0].stdout.startswith(from_c.decode(errors="replace").strip("\ufffd\n"))

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
    assert "license: unknown" in done.stdout and "\n# Storyteller with " in card
    args = ["--format=hf", f"--checkpoint={best}", "--license=mit", "--language=de"]
    assert script("export.py", folder, *args, "--title=Tim  und\nLily").returncode == 0
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlanguage: de\nlicense: mit\n") and "\n# Tim und Lily\n" in card
    refused(script("export.py", folder, *args[:-1], "--language=a\nb"), "expected a short code")
    args[0] = tmp_path / "x.bin"
    refused(script("export.py", *args[:3]), "bin cannot store the license: use --format=hf or gguf")


def test_an_integer_rope_theta_becomes_a_float_in_gguf(tmp_path, tokenizers):
    """JSON may have 500000, but GGUF must have 500000.0."""
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
def test_fp16_and_bf16_round_each_weight_once(tmp_path, tokenizers, dtype):
    model = sized(tokenizers[512], **EVERYTHING)
    for to in ("hf", "safetensors"):
        path = str(tmp_path / f"there{FORMATS[to].ending or '_hf'}")
        FORMATS[to].write(model, path, dtype, tokenizers[512], {})
        state, torch_dtype = load(path).model.state_dict(), huggingface.TORCH_DTYPES[dtype]
        for name, tensor in model.state_dict().items():
            expected = tensor[: len(state[name])].to(torch_dtype).float()
            assert torch.equal(state[name], expected), name


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "q8_0", "q4_0"])
def test_gguf_weights_are_close_in_every_dtype(tmp_path, tokenizers, capsys, dtype):
    model = sized(tokenizers[512], dim=64, hidden_dim=88)
    gguffile.write_gguf(model, tmp_path / "model.gguf", dtype, tokenizers[512], {})
    state = gguffile.read_gguf(tmp_path / "model.gguf")[0].state_dict()
    limit = {"fp16": 3e-4, "bf16": 3e-3, "q8_0": 8e-3, "q4_0": 0.1}[dtype]
    for name, tensor in model.state_dict().items():
        error = (state[name] - tensor).norm() / tensor.norm()
        assert error <= (0 if tensor.dim() == 1 else limit), name
    note = "2 tensors, such as blk.0.ffn_down.weight, are stored as F16, because"
    assert (note in capsys.readouterr().out) == ("q" in dtype)


# ---- transformers


@pytest.mark.parametrize("name", CASES)
def test_transformers_has_our_logits_and_generates_the_same(tmp_path, tokenizers, name):
    options, kind = CASES[name]
    model = sized(tokenizers[105], **options)
    huggingface.write_folder(model, str(tmp_path / "hf"), "fp32", tokenizers[105], {})
    theirs = transformers_model(tmp_path / "hf")
    assert type(theirs).__name__ == kind
    tokens = torch.randint(3, 105, (2, 24))
    with torch.no_grad():
        assert close(theirs(tokens).logits, model(tokens))
    greedy = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": None}
    ids = theirs.generate(tokens[:1, :6], **greedy)[0, 6:].tolist()
    assert ids == list(model.generate(tokens[0, :6].tolist(), 16, temperature=0))


def test_our_modeling_file_supports_what_transformers_expects(tmp_path, tokenizers):
    """Padding on either side, beam search with and without a cache, a loss, and gradients."""
    model = sized(tokenizers[105], **EVERYTHING)
    huggingface.write_folder(model, str(tmp_path / "hf"), "fp32", None, {})
    theirs = transformers_model(tmp_path / "hf")
    tokens = torch.randint(3, 105, (1, 9))
    for left in (4, 0):
        padded = torch.nn.functional.pad(tokens, (left, 4 - left), value=2)
        mask = torch.zeros(1, 13, dtype=torch.int64)
        mask[:, left : left + 9] = 1
        with torch.no_grad():
            logits = theirs(padded, attention_mask=mask).logits[:, left : left + 9]
            assert close(logits, model(tokens))
    greedy = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    padded = torch.nn.functional.pad(tokens, (4, 0), value=2)
    mask = (torch.arange(13) >= 4).long()[None]
    ids = theirs.generate(padded, attention_mask=mask, **greedy)[0, 13:].tolist()
    assert ids == list(model.generate(tokens[0].tolist(), 12, temperature=0))
    beams = [
        theirs.generate(tokens, num_beams=3, use_cache=use_cache, **greedy)
        for use_cache in (True, False)
    ]
    assert torch.equal(*beams)
    loss, expected = theirs(tokens, labels=tokens).loss, model(tokens[:, :-1], tokens[:, 1:])
    assert abs(loss - expected) < 1e-5
    loss.backward()
    expected.backward()
    gradients = dict(model.named_parameters())
    for name in (
        "smear_gate.weight",
        "residual_scalars",
        "bigram_embeddings.weight",
        "embedding_conv",
    ):
        gradient = dict(theirs.named_parameters())[f"model.{name}"].grad
        assert close(gradient, gradients[name].grad), name
    for kwargs, part in (
        ({"inputs_embeds": torch.zeros(1, 9, 48)}, "pass input_ids"),
        ({"output_hidden_states": True}, "does not return hidden states"),
        (
            {"attention_mask": torch.ones(1, 1, 9, 9, dtype=torch.bool)},
            "expected an attention_mask",
        ),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]])}, "one text per row"),
    ):
        with pytest.raises(ValueError, match=part):
            theirs(tokens, **kwargs)
    with pytest.raises(ValueError, match="cannot be resized"):
        theirs.resize_token_embeddings(120)
    half = theirs(tokens, labels=tokens, num_items_in_batch=torch.tensor(16)).loss
    assert abs(half - loss / 2) < 1e-5  # 8 positions of 16
    theirs.save_pretrained(tmp_path / "copy")
    copy = transformers_model(tmp_path / "copy")
    assert torch.equal(copy(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("name", ["plain", "modded"])
def test_the_code_in_the_model_card_runs_and_stops_at_eos_and_bos(
    tmp_path, tokenizers, name, capsys, monkeypatch
):
    model = sized(tokenizers[512], **CASES[name][0])
    huggingface.write_folder(model, str(tmp_path / "hf"), "fp32", tokenizers[512], {})
    card = (tmp_path / "hf" / "README.md").read_text()
    monkeypatch.chdir(tmp_path / "hf")
    exec(card.partition("```python\n")[2].partition("```")[0], names := {})
    assert capsys.readouterr().out.startswith("Once upon a time")
    config = names["model"].generation_config
    assert config.eos_token_id == [2, 1] and config.bos_token_id == 1
    huggingface.write_folder(model, str(tmp_path / "bare"), "fp32", None, {})
    for name in ("config.json", "generation_config.json"):  # whose ids are unknown
        assert "token_id" not in (tmp_path / "bare" / name).read_text()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen3"])
def test_folders_written_by_transformers_have_the_same_logits_here(tmp_path, builds, kind, tied):
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
    logits = logits_of(builds["harness", "checked"], path, tokens[0].tolist(), 300)
    assert close(torch.from_numpy(logits.copy()), expected[0])


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
    fast, text = load(str(tmp_path / "hf")).tokenizer, "Once upon a time, Zoë said 😀"
    ids = tokenizers[512].encode(text)
    assert fast.encode(text) == fast.encode(text.encode()) == ids and fast.decode(ids) == text
    assert fast.encode("") == [1] and {1, 2} == {*fast.stop}
    done = script("sample.py", f"--checkpoint={tmp_path / 'hf'}", "--start=Once upon a time")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time") and len(done.stdout) > 20
    export(tmp_path / "m.bin", f"--from-hf={tmp_path / 'hf'}")
    assert "is not exported, because it is not a tokenizer.model" in capsys.readouterr().out
    with pytest.raises(UserError, match="needs the tokenizer"):
        export(tmp_path / "m.gguf", f"--from-hf={tmp_path / 'hf'}")


def test_a_tokenizer_json_encodes_as_in_transformers(tmp_path, tokenizers):
    """It neither pads nor truncates, and an error of the library becomes one sentence."""
    tokenizer, path = tokenizers["gpt2"], tmp_path / "hf" / "tokenizer.json"
    huggingface.write_folder(sized(tokenizer), str(tmp_path / "hf"), "fp32", tokenizer, {})
    os.remove(tmp_path / "hf" / "tokenizer.model")
    whole = json.loads(path.read_text())
    padding = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 1, "pad_type_id": 0, "pad_token": "a"}
    truncation = {"direction": "Left", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps({**whole, "padding": padding, "truncation": truncation}))
    assert load(str(tmp_path / "hf")).tokenizer.encode("Once upon") == tokenizer.encode("Once upon")
    bos = whole["post_processor"]["special_tokens"]["<|endoftext|>"]
    for ids, part in (([1 << 20], "it has no token 1048576"), (None, "no entry found for key")):
        special = {"<|endoftext|>": {**bos, "ids": ids}} if ids else {}
        post_processor = {**whole["post_processor"], "special_tokens": special}
        path.write_text(json.dumps({**whole, "post_processor": post_processor}))
        with pytest.raises(UserError, match=rf"cannot read .*tokenizer.json: .*{part}"):
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
        with pytest.raises(UserError, match=r"eos_token_id = .*; expected token ids"):
            load(str(tmp_path / "hf"))


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": False, "value_embeddings": 1}])
def test_tokens_without_a_piece_are_never_sampled(tmp_path, tokenizers, capsys, run, options):
    """An embedding padded to a round number of rows is cut to the tokenizer's pieces."""
    tokenizer = tokenizers[512]
    padded = random_model(vocab_size=576, **options)
    with torch.no_grad():
        padded.output.weight[512:] *= 9  # makes them likely
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
    story = [*ids, *loaded.model.generate(ids, 21 - len(ids), 0, stop=tokenizer.stop)]
    assert done.stdout.decode(errors="replace").removesuffix("\n") == tokenizer.decode(story)
    (tmp_path / "hf" / "tokenizer.model").write_bytes(tokenizers[105].proto)
    with pytest.raises(UserError, match="105 pieces, but the model's vocabulary has 576"):
        load(str(tmp_path / "hf"))
    formats.write_checkpoint(padded, str(tmp_path / "c" / "c.pt"), "fp32", None, {})
    with pytest.raises(UserError, match="512 pieces, but the model's vocabulary has 576"):
        load(str(tmp_path / "c" / "c.pt"), tokenizer=tokenizer.model_path)


# ---- Meta's releases


def meta_release(folder, model, n_files):
    """Write a release like Llama 2's, with the matrices split over n_files."""
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
def test_releases_by_meta_are_read(tmp_path, n_files):
    model = random_model(tie_embeddings=False, n_kv_heads=2, max_seq_len=4096, vocab_size=106)
    meta_release(tmp_path / "release", model, n_files)
    assert recognize(str(tmp_path / "release")) == "meta"
    assert_same_model(load(str(tmp_path / "release")).model, model)
    export(tmp_path / "m.bin", f"--from-meta={tmp_path / 'release'}")
    assert_same_model(read_bin(tmp_path / "m.bin"), model)
    params = json.loads((tmp_path / "release" / "params.json").read_text())
    for change, part in (
        ({"use_scaled_rope": True}, "use_scaled_rope = True is not supported"),
        ({"moe": {}}, "moe = {} is not supported"),
        ({"n_layers": 3}, "layers.2.attention_norm.weight is missing"),
        ({"n_layers": 1}, "is not a tensor of this model"),
        ({"dim": 64}, "expected"),
        ({"n_heads": 5}, "does not divide"),
    ):
        (tmp_path / "release" / "params.json").write_text(json.dumps({**params, **change}))
        with pytest.raises(UserError, match="cannot read ") as e:
            load(str(tmp_path / "release"))
        assert part in str(e.value)
    (tmp_path / "release" / "params.json").write_text(json.dumps(params))
    (tmp_path / "release" / "consolidated.00.pth").write_bytes(b"half")
    with pytest.raises(UserError, match="cannot read "):
        load(str(tmp_path / "release"))


# ---- what is refused


# format, options of the model, --dtype, vocabulary size, part of the error
REFUSED = (
    *(
        ("gguf", {name: value}, "fp32", 512, f"gguf cannot store {name} = {value}: use --format=")
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
    ("bin", {"sliding_window": 1 << 25, "max_seq_len": 64}, "fp32", 512, "version 3 cannot store"),
)


@pytest.mark.parametrize("to, options, dtype, size, part", REFUSED)
def test_what_a_format_cannot_store_is_refused(
    tmp_path, tokenizers, to, options, dtype, size, part
):
    source, tokenizer = str(tmp_path / "source" / "ckpt.pt"), tokenizers[size]
    formats.write_checkpoint(sized(tokenizer, **options), source, "fp32", tokenizer, {})
    with pytest.raises(UserError) as e:
        out = tmp_path / "new" / "out"
        export(out, f"--checkpoint={source}", f"--format={to}", f"--dtype={dtype}")
    assert part in str(e.value)
    assert os.listdir(tmp_path) == ["source"]


def test_commands_that_make_no_sense_are_refused(tmp_path, tokenizers, finished):
    best, out = f"--checkpoint={finished / 'best.pt'}", tmp_path / "out"
    model = sized(tokenizers[512])
    formats.write_bin(model, str(tmp_path / "a" / "model.bin"), "fp32", None, {})
    bin_ = tmp_path / "a" / "model.bin"
    mine = tmp_path / "a" / "z"
    mine.mkdir()
    mine_too = ("notes.bin", "notes.safetensors")
    for name in ("README.md", "tokenizer.model", "tok128.bin", *mine_too):
        (mine / name).write_text("mine, and long enough for a header " * 3)
    before = {name: (finished / name).read_bytes() for name in ("best.pt", "ckpt.pt", "log.jsonl")}
    for args, part in (
        (
            [out, best, "--version=3", "--format=hf"],
            "--version cannot be used with --format=hf: use --format=bin",
        ),
        (
            [out, best, "--push-to-hub=a/b"],
            "--push-to-hub cannot be used with --format=bin: use --format=hf",
        ),
        ([out, best, "--format=hf", "--dry-run"], "--push-to-hub=USER/NAME is missing"),
        ([out, f"--from-bin={bin_}", "--format=hf"], "no tokenizer.model found for"),
        ([out, f"--from-bin={bin_}", f"--tokenizer={tmp_path / 'x'}"], "does not exist"),
        ([out, f"--from-bin={bin_}", f"--tokenizer={tokenizers[105].model_path}"], "105 pieces"),
        (
            [bin_, f"--from-bin={bin_}", "--dtype=int8"],
            "already exists and is part of the model to read",
        ),
        (
            [finished / "ckpt.pt", best, "--format=bin"],
            "already exists and is a checkpoint; choose another",
        ),
        (
            [finished / "ckpt.pt", f"--from-bin={bin_}"],
            "already exists and would be overwritten",
        ),
        ([finished, best, "--format=hf"], "already exists and is part of the model to read"),
        (
            [tmp_path / "a", best, "--format=hf"],
            "contains model.bin, which no export writes",
        ),
        ([finished / "log.jsonl", best, "--format=hf"], "it is a file; choose a folder"),
        ([out, f"--from-hf={tmp_path / 'none'}"], "is not a folder"),
        ([out, f"--from-hf={finished}"], "cannot read"),
        ([out, f"--from-gguf={bin_}"], "is damaged or not a GGUF file"),
        ([out, f"--from-gguf={tmp_path / 'none'}"], "cannot read"),
        (["", best], "PATH is empty: pass the file or folder to write"),
        *(
            ([mine / name, best, "--format=bin"], "exists and is not a model of --format=bin")
            for name in ("README.md", "tokenizer.model")
        ),
        ([mine / "tok128.bin", best], "exists and is not a model of --format=bin"),
        ([mine / "notes.bin", best], "exists and is not a model of --format=bin"),
        (
            [mine / "notes.safetensors", best],
            "exists and is not a model of --format=safetensors",
        ),
        ([f"{out}/", best], "is a folder or the tokenizer"),
        ([tmp_path / "tokenizer.bin", best], "is a folder or the tokenizer"),
        ([out, best, "--format=hf", "--push-to-hub=a b/c", "--dry-run"], "cannot upload to a b/c"),
        ([out, best, "--format=hf", "--push-to-hub=c", "--dry-run"], "expected user/name"),
        ([out, f"--from-bin={finished / 'best.pt'}"], "is damaged or not a model.bin"),
        ([out, f"--from-safetensors={bin_}"], "is damaged or not a safetensors file"),
        ([out, f"--from-meta={tmp_path}"], "params.json"),
        ([out, "--checkpoint=hf:a/b c"], "cannot download a/b c"),
    ):
        with pytest.raises(UserError) as e:
            export(*args)
        assert part in str(e.value)
        assert os.listdir(tmp_path) == ["a"]
    for name, data in before.items():
        assert (finished / name).read_bytes() == data
    refused(script("export.py", out, best, "--format=hf", "--dtype=int8"), "dtype = int8")
    for args, part in (
        (
            "--format=onnx",
            "error: format = onnx: expected one of bin, hf, gguf, safetensors, check",
        ),
        (f"--from-bin={bin_}", "error: argument --from-bin"),
    ):
        done = script("export.py", out, best, args)
        assert done.returncode == 2 and done.stderr.startswith(part)
        assert done.stderr.count("\n") == 1


# changes of a config.json, and part of the error
FOREIGN = (
    ({"model_type": "gpt2"}, "model_type = gpt2; expected llama or"),
    ({"hidden_act": "gelu"}, "hidden_act = gelu; expected silu or swish, or no such field"),
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
    ({"model_type": ["llama"]}, "cannot read "),
    (
        {"model_type": "modded_llama", "bigram_rows": 1 << 28},
        "model.bigram_embeddings.weight is missing",
    ),
    ({"model_type": "modded_llama", "layer_windows": [-1, 0]}, "windows = [-1, 0]"),
    ({"max_position_embeddings": 1 << 24, "head_dim": None}, "its RoPE tables would be larger"),
    ({"hidden_size": 96, "head_dim": 24}, "expected (105, 96)"),
    ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
    ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight is not a tensor of"),
    ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
    ({"model_type": "mistral", "num_hidden_layers": 1 << 40}, "n_layers = 1099511627776: expected"),
    (
        {"model_type": "qwen3", "use_sliding_window": "false"},
        "use_sliding_window = false; expected",
    ),
    ({"model_type": "qwen3", "layer_types": {}}, "layer_types = {}; expected a list of strings"),
    ({"head_dim": ""}, "head_dim = ; expected a whole number"),
    ({"max_position_embeddings": 1 << 22}, "4194304: its RoPE tables would be larger"),
    ({"hidden_act": "x" * 5000}, "xxx ..."),
)


@pytest.mark.parametrize("change, part", FOREIGN)
def test_folders_of_models_that_ours_cannot_compute_are_refused(tmp_path, tokenizers, change, part):
    huggingface.write_folder(sized(tokenizers[105]), str(tmp_path / "hf"), "fp32", None, {})
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError) as e:
        load(str(tmp_path / "hf"))
    assert part in str(e.value)


# Changes of a config.json with no effect: fields that older programs omit, and neutral values
NEUTRAL_CONFIGS = (
    {"hidden_act": "swish"},
    {"hidden_act": None, "attention_bias": None, "mlp_bias": False, "quantization_config": None},
    {"head_dim": None, "num_key_value_heads": None, "rope_theta": None},
    {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 1.0}},
    {"rope_parameters": {"rope_type": "default", "factor": None}, "partial_rotary_factor": 1.0},
    {"layer_types": ["full_attention"] * 2, "sliding_window": 4096, "pretraining_tp": 1},
)


@pytest.mark.parametrize("change", NEUTRAL_CONFIGS)
def test_neutral_config_fields_are_accepted(tmp_path, tokenizers, change):
    model = sized(tokenizers[105])
    huggingface.write_folder(model, str(tmp_path / "hf"), "fp32", None, {})
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, **change}))
    assert_same_model(load(str(tmp_path / "hf")).model, model)


@pytest.mark.parametrize(
    "key, value, is_neutral",
    [(key, value, True) for key, values in gguffile.NEUTRAL.items() for value in values]
    + [("expert_count", 8, False), ("rope.scaling.type", "yarn", False), ("new", 0.0, False)],
)
def test_only_neutral_gguf_keys_are_accepted(
    tmp_path, tokenizers, monkeypatch, key, value, is_neutral
):
    put_args = gguffile.put_args

    def put_args_and_key(f, kind, args):
        put_args(f, kind, args)
        put = {str: f.add_string, bool: f.add_bool, int: f.add_uint32, float: f.add_float32}
        put[type(value)](f"{kind}.{key}", value)

    monkeypatch.setattr(gguffile, "put_args", put_args_and_key)
    model, path = sized(tokenizers[512]), str(tmp_path / "m.gguf")
    gguffile.write_gguf(model, path, "fp32", tokenizers[512], {})
    if is_neutral:
        assert_same_model(load(path).model, model)
    else:
        error = f"llama.{key} = {value}; expected (.+, or )?no such field"
        with pytest.raises(UserError, match=error):
            load(path)


def test_a_tokenizer_json_of_an_older_program_is_read(tmp_path, tokenizers):
    bpe = tokenizers["gpt2"].bpe
    value = byte_level_json(bpe)
    del value["model"]["type"]
    value["added_tokens"] = [
        {"id": t["id"], "content": t["content"]} for t in value["added_tokens"]
    ]
    value["model"]["merges"] = [" ".join(pair) for pair in value["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    assert byte_level_from_json(tmp_path / "tokenizer.json").to_bytes() == bpe.to_bytes()


def test_damaged_folders_and_files_are_refused(tmp_path, tokenizers):
    from safetensors.torch import load_file
    from safetensors.torch import save_file as save_tensors

    folder, model = tmp_path / "hf", sized(tokenizers[512])
    huggingface.write_folder(model, str(folder), "fp32", tokenizers[512], {})
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole = weights.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}  # not mapped
    for data in (b"", whole[:5], whole[:1000], whole[:-4]):
        weights.write_bytes(data)
        with pytest.raises(UserError, match="damaged or not a safetensors file"):
            load(str(folder))
    save_tensors({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.zeros(3)}, weights)
    with pytest.raises(UserError, match=r"q_proj.bias is not a tensor of this model"):
        load(str(folder))
    save_tensors({**tensors, "lm_head.weight": torch.zeros(512, 48)}, weights)
    with pytest.raises(UserError, match=r"lm_head.weight differs from the embedding it is tied to"):
        load(str(folder))
    save_tensors(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, weights
    )
    assert_same_model(load(str(folder)).model, model)
    index = folder / "model.safetensors.index.json"
    os.replace(weights, tmp_path / "elsewhere.safetensors")
    for name, part in (
        ("../elsewhere.safetensors", "../elsewhere.safetensors is outside its folder"),
        (str(tmp_path / "elsewhere.safetensors"), "is outside its folder"),
        ("other.safetensors", "other.safetensors does not exist"),
        (["model.safetensors"], "it has no weight_map of files"),
    ):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match=part):
            load(str(folder))
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(tmp_path / "elsewhere.safetensors", folder / name)
    index.write_text(json.dumps({"weight_map": dict.fromkeys("0123", "a.safetensors")}))
    assert_same_model(load(str(folder)).model, model)
    index.write_text('{"weight_map": {"1": "a.safetensors", "2": "b.safetensors"}}')
    with pytest.raises(UserError, match=r"b.safetensors: .* is also in another file"):
        load(str(folder))
    index.write_text("{}")
    with pytest.raises(UserError, match="has no weight_map"):
        load(str(folder))
    for text, part in (
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
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
            with pytest.raises(UserError, match=r"damaged or not|cannot read|ends at byte"):
                load(str(path))


def test_weights_of_older_programs_are_read(tmp_path, tokenizers):
    """pytorch_model.bin, whole or in parts, is read without running code in it."""
    from safetensors.torch import load_file

    folder, model = tmp_path / "hf", sized(tokenizers[105])
    huggingface.write_folder(model, str(folder), "fp32", None, {})
    tensors = load_file(folder / "model.safetensors")
    os.remove(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    assert_same_model(load(str(folder)).model, model)
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same_model(load(str(folder)).model, model)
    torch.save({**tensors, "evil": print}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="is damaged or contains more than tensors"):
        load(str(folder))
    os.remove(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no weights: expected model.safetensors or pytorch_model"):
        load(str(folder))
    parts, index = [{}, {}], {}
    for i, (name, tensor) in enumerate(tensors.items()):
        parts[i % 2][name], index[name] = tensor, f"pytorch_model-{i % 2}.bin"
    for i, part in enumerate(parts):
        torch.save(part, folder / f"pytorch_model-{i}.bin")
    path = folder / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    assert_same_model(load(str(folder)).model, model)


def test_lfs_pointers_and_split_ggufs_are_refused_with_a_hint(tmp_path, tokenizers):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 42\n"
    model, hint = sized(tokenizers[512]), "is a Git LFS pointer, .* run git lfs pull"
    huggingface.write_folder(model, str(tmp_path / "hf"), "fp32", tokenizers[512], {})
    for path in (tmp_path / "hf").iterdir():
        whole = path.read_bytes()
        path.write_text(pointer)
        with pytest.raises(UserError, match=f"{path.name} {hint}"):
            load(str(tmp_path / "hf"))
        path.write_bytes(whole)
    for name in ("m.gguf", "ckpt.pt", "m.bin", "m.safetensors", "other"):
        (tmp_path / name).write_text(pointer)
        with pytest.raises(UserError, match=f"{name} {hint}"):
            load(str(tmp_path / name))
        with pytest.raises(UserError, match=f"{name} {hint}"):
            load(str(tmp_path / "hf"), tokenizer=str(tmp_path / name))
    with pytest.raises(UserError, match=f"ckpt.pt {hint}"):
        load_checkpoint(str(tmp_path / "ckpt.pt"))
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m-00001-of-00002.gguf", "llama")
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="one of 2 parts of a split GGUF file: join them with"):
        load(str(tmp_path / "m-00001-of-00002.gguf"))


def test_damaged_model_bins_are_refused(tmp_path, tokenizers):
    model, path = sized(tokenizers[105], **EVERYTHING), tmp_path / "model.bin"
    plain = sized(tokenizers[105])
    for original, version in ((plain, 0), (model, 3)):
        export_model(original, path, version)
        data = path.read_bytes()
        sizes = 0, 3, 27, 28, 79, 80, 83, 84, 90, 300, len(data) // 2, len(data) - 1, len(data) + 1
        for size in sizes:
            path.write_bytes((data + b"\0")[:size])
            with pytest.raises(UserError, match=r"is damaged or not a model.bin"):
                read_bin(path)
        rng = np.random.default_rng(0)
        for _ in range(60):  # any field of the header
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
    with pytest.raises(UserError, match="rotary angles do not match rope_theta = 10000"):
        read_bin(path)


def test_only_a_folder_from_an_earlier_export_is_replaced(tmp_path, tokenizers):
    folder = tmp_path / "hf"
    for seed in (0, 1):
        model = random_model(seed=seed, vocab_size=512)
        huggingface.write_folder(model, str(folder) + "/", "fp32", tokenizers[512], {})
        assert_same_model(load(str(folder)).model, model)
    (tmp_path / "link").symlink_to("hf")
    huggingface.write_folder(model, str(tmp_path / "link"), "fp32", tokenizers[512], {})
    assert sorted(os.listdir(tmp_path)) == ["hf", "link"] and (tmp_path / "link").is_symlink()
    for name in ("notes.txt", ".git", "model.bin", "tokenizer_corpus.txt", "model_backup"):
        (folder / name).write_text("mine")
        with pytest.raises(UserError, match=f"exists and contains {name}, which no export writes"):
            huggingface.write_folder(model, str(folder), "fp32", tokenizers[512], {})
        (folder / name).unlink()
    (folder / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"README.md was not written by export.py"):
        huggingface.write_folder(model, str(folder), "fp32", tokenizers[512], {})
    (folder / "README.md").unlink()
    with pytest.raises(UserError, match=r"README.md was not written by export.py"):
        huggingface.write_folder(model, str(folder), "fp32", tokenizers[512], {})


def test_a_full_disk_leaves_no_partial_files(tmp_path, tokenizers, monkeypatch):
    import gguf
    import huggingface_hub
    from safetensors import SafetensorError

    def full(*args, **kwargs):
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


def test_large_models_are_split_into_shards(tmp_path, tokenizers, monkeypatch):
    monkeypatch.setattr(huggingface, "MAX_SHARD", "50KB")
    model = sized(tokenizers[512], **EVERYTHING)
    huggingface.write_folder(model, str(tmp_path / "hf"), "fp32", tokenizers[512], {})
    assert len([n for n in os.listdir(tmp_path / "hf") if n.endswith(".safetensors")]) > 3
    assert_same_model(load(str(tmp_path / "hf")).model, model)


def test_the_error_for_a_missing_package_says_how_to_install_it():
    message = r"this command needs the package no_such_package: pip install '.\[export\]'"
    with pytest.raises(UserError, match=message):
        need("no_such_package")


def test_the_tokenizer_is_written_with_the_model(tmp_path, tokenizers):
    tokenizer, other = tokenizers[512], tokenizers[1500]
    for to in ("bin", "checkpoint", "safetensors"):
        ending, write = FORMATS[to].ending, FORMATS[to].write
        for name in ("a", "b"):
            write(sized(tokenizer), str(tmp_path / f"{name}{ending}"), "fp32", tokenizer, {})
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(
            UserError, match="exists and is another tokenizer; choose another folder"
        ):
            write(sized(other), str(tmp_path / f"c{ending}"), "fp32", other, {})
        assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert (tmp_path / "tokenizer.bin").read_bytes() == bin_of(tokenizer).read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(other.proto)
    with pytest.raises(UserError, match="was trained with a tokenizer other than"):
        load(str(tmp_path / "a.pt"))
    assert load(str(tmp_path / "a.pt"), tokenizer=tokenizer.model_path).tokenizer.vocab_size == 512


def test_a_model_file_accepts_only_its_own_tokenizer(tmp_path, tokenizers, stories):
    """Another one of the same size is refused, unless the file has no fingerprint."""
    tokenizer, path = tokenizers[512], str(tmp_path / "a.bin")
    other = tmp_path / "other.model"
    other.write_bytes(train_sentencepiece(stories[500:900], 512)[0])
    model = sized(tokenizer, qk_norm=True)
    FORMATS["bin"].write(model, path, "fp32", tokenizer, {})
    assert read_fingerprint(path) == tokenizer.fingerprint == zlib.crc32(tokenizer.c_file())
    assert load(path, tokenizer=tokenizer.model_path).tokenizer.hash == tokenizer.hash
    with pytest.raises(UserError, match=r"a\.bin was trained with a tokenizer other than .*other"):
        load(path, tokenizer=str(other))
    shutil.copy(other, tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match="pass the right one with --tokenizer=PATH"):
        load(path)
    export_model(model, path, 3)
    assert read_fingerprint(path) == 0 and load(path).tokenizer.hash == open_tokenizer(other).hash
    checkpoint = str(tmp_path / "a.pt")
    os.remove(tmp_path / "tokenizer.model")
    FORMATS["checkpoint"].write(model, checkpoint, "fp32", tokenizer, {})
    with pytest.raises(UserError, match=r"a\.pt was trained with a tokenizer other than .*other"):
        load(checkpoint, tokenizer=str(other))


@pytest.mark.parametrize("to", ["hf", "gguf", "safetensors"])
def test_weights_too_large_for_fp16_are_refused(tmp_path, tokenizers, to):
    model = sized(tokenizers[512])
    model.layers[0].feed_forward.w1.weight.data[0, 0] = 1e5
    with pytest.raises(UserError, match=r"fp16 cannot store .*, which has values up to 100000"):
        FORMATS[to].write(model, str(tmp_path / "out"), "fp16", tokenizers[512], {})
    assert not os.listdir(tmp_path)


def trained_by_sentencepiece(path, stories, **options):
    settings = {"model_type": "bpe", "normalization_rule_name": "identity", "byte_fallback": True}
    settings |= {"vocab_size": 700, "minloglevel": 2, "character_coverage": 1.0, **options}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(stories[:500]), model_writer=model, **settings
    )
    path.write_bytes(model.getvalue())
    return open_tokenizer(path)


def test_other_sentencepiece_options_are_exported_or_refused(tmp_path, stories):
    """Collapsed spaces and texts without a space before them are supported; the rest is refused."""
    from transformers import AutoTokenizer

    for i, options in enumerate(({"remove_extra_whitespaces": True}, {"add_dummy_prefix": False})):
        tokenizer = trained_by_sentencepiece(tmp_path / f"{i}.model", stories, **options)
        folder = str(tmp_path / f"hf{i}")
        huggingface.write_folder(sized(tokenizer), folder, "fp32", tokenizer, {})
        theirs = AutoTokenizer.from_pretrained(folder)
        for text in [*generated_texts(800, seed=5), "  a   b  ", " ", "\n a \n  b "]:
            assert theirs(text)["input_ids"] == tokenizer.encode(text), text
    with pytest.raises(UserError, match="which collapses spaces"):
        tokenizer = open_tokenizer(tmp_path / "0.model")
        gguffile.write_gguf(sized(tokenizer), str(tmp_path / "m"), "fp32", tokenizer, {})
    for options, part in (
        ({"model_type": "unigram"}, "is not BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "replaces characters"),
        ({"user_defined_symbols": ["<pet>"]}, "has user-defined pieces"),
    ):
        tokenizer = trained_by_sentencepiece(tmp_path / "other.model", stories, **options)
        for to in ("hf", "gguf"):
            with pytest.raises(UserError, match=f"{to} cannot store .*, because it {part}"):
                FORMATS[to].write(sized(tokenizer), str(tmp_path / "m"), "fp32", tokenizer, {})
    assert not (tmp_path / "m").exists()


def test_a_hostile_gguf_is_refused_quickly(tmp_path, tokenizers):
    start, name = b"GGUF" + struct.pack("<IQQ", 3, 0, 1), struct.pack("<Q", 3) + b"a.b"
    values = [struct.pack("<IIQ", 9, inner, 1 << 40) for inner in (4, 8, 9)]
    values += [struct.pack("<IQ", 8, 1 << 60), struct.pack("<I", 77), b""]
    for value in values:
        (tmp_path / "m.gguf").write_bytes(start + name + value + bytes(200))
        with pytest.raises(UserError, match=r"ends at byte|is damaged|cannot read"):
            load(str(tmp_path / "m.gguf"))


def gguf_with(path, tokenizer, **changes):
    """Write a GGUF file of a random model, with some fields tokenizer.ggml.* changed."""
    add = need("gguf").GGUFWriter.add_key_value

    def changed(self, key, value, kind, sub_type=None):
        value = changes.get(key.removeprefix("tokenizer.ggml."), value)
        add(self, key, value, kind, sub_type)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(need("gguf").GGUFWriter, "add_key_value", changed)
        gguffile.write_gguf(sized(tokenizer), str(path), "fp32", tokenizer, {})


def test_a_gguf_with_an_inconsistent_tokenizer_is_refused(tmp_path, tokenizers):
    path, pieces = str(tmp_path / "m.gguf"), tokenizers[512]
    for changes, part in (
        ({"scores": [0.0] * 511}, "tokenizer.ggml.scores = 511 values; expected 512"),
        ({"bos_token_id": 5}, r"the ids of unk, BOS and EOS = \[0, 5, 2\]"),
        ({"token_type": [-1] * 512}, "tokenizer.ggml.token_type = .* expected what llama.cpp"),
    ):
        gguf_with(path, pieces, **changes)
        with pytest.raises(UserError, match=part):
            load(path)
        assert load(path, tokenizer=pieces.model_path).tokenizer.vocab_size == 512


def test_tensors_that_share_their_bytes_are_refused(tmp_path, tokenizers):
    """So a small file cannot claim to be a large model, and no bytes are read twice."""
    path = tmp_path / "m.gguf"
    gguf_with(path, tokenizers[512])
    offsets = [t.field.offset for t in need("gguf").GGUFReader(path).tensors]
    data = bytearray(path.read_bytes())
    path.write_bytes(data + bytes(32))
    with pytest.raises(UserError, match=r"it has \d+ bytes, but its tensors end at \d+"):
        load(str(path))
    data[offsets[2] - 8 : offsets[2]] = bytes(8)  # where the second tensor starts
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"blk.0.attn_norm.weight starts at \d+, expected \d+"):
        load(str(path))
    huggingface.write_folder(sized(tokenizers[105]), str(tmp_path / "hf"), "fp32", None, {})
    os.remove(tmp_path / "hf" / "model.safetensors")
    shared = torch.zeros(1000)
    torch.save({str(i): shared for i in range(1000)}, tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"1,000,000 values in files of [\d,]+ bytes"):
        load(str(tmp_path / "hf"))


@pytest.mark.parametrize("to", READABLE)
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
    args = [folder, "--format=hf", f"--checkpoint={finished / 'best.pt'}"]
    done = script("export.py", *args, "--push-to-hub=me/tiny", cwd=tmp_path)
    refused(done, "HF_TOKEN")
    assert not hub.models and not folder.exists()
    (tmp_path / ".env").write_text('OTHER=1\nexport HF_TOKEN="hf_secret" # mine\r\n')
    done = script("export.py", *args, "--push-to-hub=me/tiny", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0 and "nothing was sent" in done.stdout and not hub.models
    done = script("export.py", *args, "--push-to-hub=me/tiny", "--private", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"uploaded to {hub.url}/me/tiny" in done.stdout
    assert hub.tokens - {None} == {"Bearer hf_secret"} and hub.private == {"me/tiny"}
    assert hub.models["me/tiny"] == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert "hf_secret" not in done.stdout + done.stderr
    samples = [
        script("sample.py", f"--checkpoint={path}", "--temperature=0", "--max_new_tokens=20")
        for path in (finished / "best.pt", "hf:me/tiny")
    ]
    assert samples[1].returncode == 0, samples[1].stderr
    assert samples[0].stdout == samples[1].stdout
    refused(script("sample.py", "--checkpoint=hf:me/other"), "cannot download me/other")
    done = script("sample.py", "--checkpoint=hf:me/tiny", env={**os.environ, "HF_TOKEN": "hf a\n"})
    refused(done, "HF_TOKEN is not an access token")
    assert "hf a" not in done.stderr
    hub.shutdown()
    hub.server_close()
    done = script("sample.py", "--checkpoint=hf:me/tiny", "--temperature=0", "--max_new_tokens=20")
    assert done.stdout == samples[0].stdout  # from the cache, since the hub is gone
    done = script("export.py", *args, "--push-to-hub=me/tiny", cwd=tmp_path)
    refused(done, "cannot upload to me/tiny", "is complete, so run the same command again")
