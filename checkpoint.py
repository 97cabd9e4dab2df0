"""
Checkpoints: a dict of plain values and tensors that torch.save writes and weights_only loads.

    model            state dict of the Transformer
    model_args       ModelArgs as a dict
    optimizer        state dict
    iter_num         steps done
    n_sequences      training sequences seen: the loader's position
    train_s          seconds of training so far
    best_val_loss    lowest validation loss so far, nats a token
    scaler           state of the gradient scaler of float16, empty without
    tokenizer_hash   of the tokenizer model, "" where it is unknown
    config           the settings of train.py
    rng              state of torch's random numbers, on the CPU and on the device in use

llama2.c's own checkpoints have the same names for model, model_args, optimizer and iter_num, and
load for export and sampling.
"""

import os

import torch

from configurator import UserError
from files import atomic_write
from model import ModelArgs, Transformer


def save_checkpoint(path, checkpoint):
    """Write a checkpoint; the one that was at `path` stays until the new one is whole."""
    try:
        with atomic_write(path) as f:
            torch.save(checkpoint, f)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        raise UserError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}") from None


def load_checkpoint(path, device="cpu"):
    """Read a checkpoint. Raises UserError, in one sentence, for a file that is none."""
    if not os.path.isfile(path):
        raise UserError(f"checkpoint {path} does not exist; train one with: python train.py")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except Exception:  # what torch raises on foreign bytes is open-ended
        raise UserError(f"{path} is damaged or no checkpoint of this program") from None
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        raise UserError(f"{path} is no checkpoint: it has no model and model_args")
    return checkpoint


def load_model(checkpoint, path):
    """The Transformer of a loaded checkpoint; `path` is for the error message."""
    try:
        model = Transformer(ModelArgs.from_dict(checkpoint["model_args"]))
        # a compiled model's parameters carry a prefix in llama2.c's checkpoints
        state = {k.removeprefix("_orig_mod."): v for k, v in checkpoint["model"].items()}
        model.load_state_dict(state)
    except (ValueError, TypeError, RuntimeError, AttributeError) as e:
        raise UserError(f"{path} does not fit this model: {str(e).splitlines()[0]}") from None
    return model
