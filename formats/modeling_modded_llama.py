"""
A Llama with the options of modded-llama2.c, for transformers. This file ships with the weights:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

It needs only torch and transformers. Batches may be padded on either side, with an attention_mask.
The cache stores the token ids in an extra layer after those of keys and values, because some of the
options look at earlier tokens, and with key_conv the keys before the convolution in further layers.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast


class ModdedLlamaConfig(PretrainedConfig):
    """Llama's fields, then the options. With all options off, the model is Llama 2."""

    model_type = "modded_llama"
    keys_to_ignore_at_inference = ("past_key_values",)

    DEFAULTS = {  # noqa: RUF012
        "vocab_size": 4096,
        "hidden_size": 288,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "qk_norm": False,  # RMSNorm of each query and key head, before RoPE
        "norm_gains": True,  # RMSNorm has learned gains
        "activation": "swiglu",  # or relu2: w2(relu(w1 x)²), without up_proj
        "logit_softcap": 0.0,  # c: logits become c * tanh(logits / c); 0: no cap
        "embedding_norm": False,  # RMSNorm after the embedding
        "residual_scalars": False,  # the input of layer i is a_i x + b_i x0; x0 is the embedding
        "value_embeddings": 0,  # the first n layers add a token embedding to their values
        "bigram_rows": 0,  # rows of a hashed (previous token, token) table added to the embedding
        "smear": False,  # a gate adds the embedding of the previous token
        "embedding_conv": 0,  # tokens in a causal convolution of the first layer's input; 0: none
        "key_conv": 0,  # tokens in a causal convolution of each layer's keys; 0: none
    }

    def __init__(self, use_cache=True, **fields):
        """layer_windows: how many positions each layer sees, including its own; 0: all."""
        fields = {**self.DEFAULTS, **fields}
        n_heads, n_layers = fields["num_attention_heads"], fields["num_hidden_layers"]
        fields["head_dim"] = fields["hidden_size"] // n_heads
        fields["num_key_value_heads"] = fields.get("num_key_value_heads") or n_heads
        fields["layer_windows"] = list(fields.get("layer_windows") or [0] * n_layers)
        self.use_cache = use_cache
        super().__init__(**fields)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps), computed in float32, times the gains, if any."""

    def __init__(self, config, size):
        super().__init__()
        self.size, self.eps = (size,), config.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(size)) if config.norm_gains else None

    def forward(self, x):
        weight = None if self.weight is None else self.weight.float()
        return F.rms_norm(x.float(), self.size, weight, self.eps).to(x.dtype)


def causal_conv(x, weight, T):
    """
    Return y[t] = x[t] + sum over j >= 1 of weight[..., j - 1] * x[t - j] for the last T of x
    (..., S, n), with x = 0 before the first. weight: (..., n, taps - 1).
    """
    taps, S = weight.shape[-1] + 1, x.shape[-2]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    y = x[..., S - T :, :]
    for j in range(1, taps):
        end = S + taps - 1 - j
        y = y + weight[..., None, :, j - 1] * padded[..., end - T : end, :]
    return y


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.raw_layer = config.num_hidden_layers + 1 + layer  # of the cache
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        if config.key_conv:
            self.key_conv = nn.Parameter(torch.zeros(kv_size, config.key_conv - 1))
        if config.qk_norm:
            self.q_norm = RMSNorm(config, config.head_dim)
            self.k_norm = RMSNorm(config, config.head_dim)

    def forward(self, x, extra_values, cos, sin, mask, is_token, cache):
        """
        x (B, T, hidden_size); extra_values (B, T, kv_size) or None; cos, sin (T, head_dim / 2);
        mask (B, 1, T, S), true for the keys that a query attends to; is_token (B, T), false for
        padding, or None.
        """
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        v = v if extra_values is None else v + extra_values
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        if hasattr(self, "key_conv"):
            raw = k if is_token is None else k * is_token[:, None, :, None]
            if cache is not None:
                raw = cache.update(raw, raw[..., :0], self.raw_layer)[0]
            k = causal_conv(raw, self.key_conv.unflatten(0, (-1, self.head_dim)), k.shape[2])
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        is_grouped = q.shape[1] > k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=is_grouped)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def rotate(x, cos, sin):
    """Apply RoPE to x (B, heads, T, head_dim); value i of a head pairs with i + head_dim / 2."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.is_gated = config.activation == "swiglu"
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        if self.is_gated:
            self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x):
        if self.is_gated:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(F.relu(self.gate_proj(x)).square())


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config, config.hidden_size)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config, config.hidden_size)
        self.mlp = MLP(config)

    def forward(self, x, *rest):
        x = x + self.self_attn(self.input_layernorm(x), *rest)
        return x + self.mlp(self.post_attention_layernorm(x))


class ModdedLlamaPreTrainedModel(PreTrainedModel):
    config_class = ModdedLlamaConfig
    base_model_prefix = "model"
    _no_split_modules = ("Block",)
    _supports_sdpa = True


class ModdedLlamaModel(ModdedLlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        n, size = config.num_hidden_layers, config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(n))
        self.norm = RMSNorm(config, size)
        if config.embedding_norm:
            self.embedding_norm = RMSNorm(config, size)
        if config.residual_scalars:
            self.residual_scalars = nn.Parameter(torch.ones(n))
            self.x0_scalars = nn.Parameter(torch.zeros(n))
        kv_size = config.num_key_value_heads * config.head_dim
        self.value_embeddings = nn.ModuleList(
            nn.Embedding(config.vocab_size, kv_size) for _ in range(config.value_embeddings)
        )
        if config.bigram_rows:
            self.bigram_embeddings = nn.Embedding(config.bigram_rows, size)
        if config.smear:
            self.smear_gate = nn.Linear(size, 1, bias=False)
        if config.embedding_conv:
            self.embedding_conv = nn.Parameter(torch.zeros(size, config.embedding_conv - 1))
        self.post_init()

    def normed_embedding(self, tokens):
        x = self.embed_tokens(tokens)
        return self.embedding_norm(x) if self.config.embedding_norm else x

    def embed(self, tokens, previous):
        """
        Return the input of the first layer before its convolution, (B, T, hidden_size). previous
        (B, T): the token before each one, -1 if there is none.
        """
        x = self.normed_embedding(tokens)
        if self.config.smear:
            gate = torch.sigmoid(self.smear_gate(x)) * (previous >= 0)[..., None]
            x = x + gate.to(x.dtype) * self.normed_embedding(previous.clamp(min=0))
        if self.config.bigram_rows:
            mixed = (previous * 36313) ^ (tokens * 27191)
            rows = torch.where(previous < 0, 0, 1 + mixed % (self.config.bigram_rows - 1))
            x = x + self.bigram_embeddings(rows)
        return x

    def first_input(self, all_tokens, T):
        """
        Return the input of the first layer for the last T of all_tokens (B, S), -1 for padding:
        (B, T, hidden_size).
        """
        n = max(self.config.embedding_conv - 1, 0)
        ids = F.pad(all_tokens, (n + 1, 0), value=-1)[:, -(n + 1 + T) :]
        x = self.embed(ids[:, 1:].clamp(min=0), ids[:, :-1])
        if not n:
            return x
        return causal_conv(x * (ids[:, 1:] >= 0)[..., None], self.embedding_conv, T)

    def forward(self, tokens, attention_mask=None, cache=None):
        """
        tokens (B, T) follow the S - T tokens in the cache; attention_mask (B, S) is 0 for padding
        -> (B, T, hidden_size).
        """
        config, T = self.config, tokens.shape[1]
        all_tokens = tokens  # (B, S)
        if cache is not None:
            n_raw = config.num_hidden_layers if config.key_conv else 0
            while len(cache.layers) < config.num_hidden_layers + 1 + n_raw:
                cache.layers.append(DynamicLayer())
            ids = tokens[:, None, :, None]
            all_tokens = cache.update(ids, ids, config.num_hidden_layers)[0][:, 0, :, 0]
        S = all_tokens.shape[1]
        position = torch.arange(S, device=tokens.device)
        distance = position[S - T :, None] - position  # (T, S): from a query back to a key
        causal, is_token = distance >= 0, None
        if attention_mask is not None and not attention_mask.all():
            is_token = attention_mask[:, :S].bool()  # (B, S)
            all_tokens = torch.where(is_token, all_tokens, -1)
        masks = {}
        for window in {*config.layer_windows}:
            mask = (causal & (distance < window) if window else causal)[None, None]
            if is_token is not None:  # padding attends to itself, so that no row is empty
                mask = mask & is_token[:, None, None] | (distance == 0)
            masks[window] = mask

        freqs = torch.arange(0, config.head_dim, 2, device=tokens.device).float()
        freqs = config.rope_theta ** (-freqs / config.head_dim)
        angles = torch.outer(position[S - T :].float(), freqs)
        cos, sin = angles.cos(), angles.sin()

        is_new_token = None if is_token is None else is_token[:, S - T :]
        x = x0 = self.first_input(all_tokens, T)
        for i, block in enumerate(self.layers):
            if config.residual_scalars:
                x = self.residual_scalars[i] * x + self.x0_scalars[i] * x0
            extra_values = None
            if i < config.value_embeddings:
                extra_values = self.value_embeddings[i](tokens)
            mask = masks[config.layer_windows[i]]
            x = block(x, extra_values, cos, sin, mask, is_new_token, cache)
        return self.norm(x)


class ModdedLlamaForCausalLM(ModdedLlamaPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = ModdedLlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def resize_token_embeddings(self, *args, **kwargs):
        raise ValueError("this model's vocabulary is in several tables and cannot be resized")

    def forward(
        self,
        input_ids,
        attention_mask=None,
        past_key_values=None,
        use_cache=None,
        labels=None,
        logits_to_keep=0,
        return_dict=True,
        **kwargs,
    ):
        """
        Return the logits (B, T, vocab_size), or those of the last logits_to_keep positions if that
        is not 0. With labels (B, T), -100 to ignore a position, also return the mean cross-entropy
        of predicting each label from the positions before it.
        """
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("this model looks up token ids in several tables: pass input_ids")
        if kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
            raise ValueError("this model does not return hidden states or attentions")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("expected an attention_mask (batch, positions)")
        positions = kwargs.get("position_ids")
        if positions is not None and attention_mask is None and (positions.diff() != 1).any():
            raise ValueError("this model needs one text per row: position_ids cannot restart")
        if past_key_values is not None and not isinstance(past_key_values, DynamicCache):
            raise ValueError("this model needs a DynamicCache")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        x = self.model(input_ids, attention_mask, past_key_values)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, cap = self.lm_head(x[:, keep]), self.config.logit_softcap
        if cap:
            logits = (cap * torch.tanh(logits.float() / cap)).to(x.dtype)
        loss = None
        if labels is not None:
            n = kwargs.get("num_items_in_batch")  # from Trainer, for steps of several batches
            size = self.config.vocab_size
            loss = self.loss_function(logits, labels, vocab_size=size, num_items_in_batch=n)
        if not return_dict:
            return (logits,) if loss is None else (loss, logits)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
