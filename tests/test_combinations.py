"""Every combination of options, in every format: the same logits, or refused."""

import itertools

import pytest
import torch
from conftest import logits_of, random_model
from test_formats import close, transformers_model

from configurator import UserError
from formats import gguf as gguffile
from formats import huggingface
from formats.modelbin import export_model, read_bin

# name: off, on
OPTIONS = {
    "tie_embeddings": (True, False),
    "qk_norm": (False, True),
    "norm_gains": (True, False),
    "activation": ("swiglu", "relu2"),
    "logit_softcap": (0.0, 5.0),
    "embedding_norm": (False, True),
    "residual_scalars": (False, True),
    "value_embeddings": (0, 1),
    "bigram_rows": (0, 16),
    "smear": (False, True),
}
WINDOWS = {
    "none": {},
    "some": {"sliding_window": 3, "window_pattern": "SL"},
    "all": {"sliding_window": 3, "window_pattern": "S"},
}
COMBINATIONS = [dict(zip(OPTIONS, v, strict=True)) for v in itertools.product(*OPTIONS.values())]
CONVOLUTIONS = {"embedding_conv": 4, "key_conv": 3}
COMBINATIONS += [{**options, **CONVOLUTIONS} for options in COMBINATIONS[::5]]  # all take minutes
SIZES = {"dim": 16, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 24, "vocab_size": 512}
TOKENS = torch.randint(3, 512, (1, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def check(tmp_path, tokenizers, builds, monkeypatch):
    """
    A function that exports a model and compares its logits. It returns the architecture or version
    that stores the model, or None if it was refused.
    """
    monkeypatch.setattr("os.fsync", lambda fd: None)

    def in_hf(model):
        huggingface.write_folder(model, str(tmp_path / "hf"), "fp32", None, {})
        theirs = transformers_model(tmp_path / "hf")
        return type(theirs).__name__, theirs(TOKENS).logits

    def in_gguf(model):
        path = tmp_path / "model.gguf"
        path.unlink(missing_ok=True)
        try:
            gguffile.write_gguf(model, path, "fp32", tokenizers[512], {})
        except UserError as e:
            assert "gguf cannot store" in str(e) and not path.exists()
            return None, None
        return gguffile.architecture(model.args), gguffile.read_gguf(path)[0].eval()(TOKENS)

    def in_bin(model, version):
        path = tmp_path / "model.bin"
        path.unlink(missing_ok=True)
        try:
            export_model(model, path, version)
        except UserError as e:
            assert "version 0 cannot store" in str(e) and version == 0 and not path.exists()
            return None, None
        logits = logits_of(builds["harness", "fast"], path, TOKENS[0].tolist(), 512)
        assert close(torch.from_numpy(logits.copy()), model(TOKENS)[0])
        return version, read_bin(path).eval()(TOKENS)

    exports = {"hf": in_hf, "gguf": in_gguf}
    exports |= {"version 0": lambda m: in_bin(m, 0), "version 3": lambda m: in_bin(m, 3)}

    @torch.no_grad()
    def check_export(to, options):
        model = random_model(**SIZES, **options)
        stored_as, logits = exports[to](model)
        assert logits is None or close(logits, model(TOKENS)), (to, stored_as, options)
        return stored_as

    return check_export


# {format: {windows: {architecture or version, None if refused: number of combinations}}}
STORED = {
    "hf": {
        "none": {"LlamaForCausalLM": 2, "Qwen3ForCausalLM": 2, "ModdedLlamaForCausalLM": 1225},
        "some": {"Qwen3ForCausalLM": 2, "ModdedLlamaForCausalLM": 1227},
        "all": {"MistralForCausalLM": 2, "Qwen3ForCausalLM": 2, "ModdedLlamaForCausalLM": 1225},
    },
    "gguf": {
        "none": {"llama": 2, "qwen3": 2, None: 1225},
        "some": {None: 1229},
        "all": {None: 1229},
    },
    "version 0": {"none": {0: 2, None: 1227}, "some": {None: 1229}, "all": {None: 1229}},
    "version 3": {windows: {3: 1229} for windows in WINDOWS},
}


@pytest.mark.slow
@pytest.mark.parametrize("to, windows", [(to, w) for to in STORED for w in WINDOWS])
def test_every_combination_has_our_logits_or_is_refused(check, to, windows):
    assert len(COMBINATIONS) * len(WINDOWS) == (2**10 + 205) * 3
    counts = {}
    for options in COMBINATIONS:
        stored_as = check(to, {**options, **WINDOWS[windows]})
        counts[stored_as] = counts.get(stored_as, 0) + 1
    assert counts == STORED[to][windows]


ALONE = [{name: on} for name, (_, on) in OPTIONS.items()]
ALONE += [{name: on} for name, on in CONVOLUTIONS.items()]
ALONE += [{**WINDOWS[w], "qk_norm": is_on} for w in ("some", "all") for is_on in (False, True)]


@pytest.mark.parametrize("to", STORED)
def test_each_option_alone_has_our_logits_or_is_refused(check, to):
    for options in [{}, *ALONE]:
        check(to, options)
